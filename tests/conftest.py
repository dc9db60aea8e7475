"""What several test files share: a base model that trains in a second, and a task that fits it."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("BOOK_PROFILE", "quick")  # the same tests on a machine with a GPU
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # two files at a time share the cores: set before torch starts
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

BOOK = Path(__file__).resolve().parent.parent / "book"
WORDS = {
    "sports": ["goal", "striker", "match", "league", "coach", "stadium", "penalty", "trophy"],
    "money": ["bank", "shares", "profit", "market", "dollar", "investor", "budget", "loan"],
    "tech": ["software", "browser", "laptop", "chip", "network", "robot", "server", "code"],
}


def glued_in(chapter):
    """What a chapter keeps, by name: the stored outputs' data."""
    import nbformat

    found = {}
    for cell in nbformat.read(BOOK / f"{chapter}.ipynb", 4).cells:
        for output in cell.get("outputs", []):
            if name := output.get("metadata", {}).get("scrapbook", {}).get("name"):
                found[name] = output.data
    return found


def stored_rows(data):
    """A stored table as lists of texts, heading first."""
    from bs4 import BeautifulSoup

    rows = BeautifulSoup("".join(data["text/html"]), "html.parser").find_all("tr")
    return [[cell.get_text() for cell in row.find_all(("th", "td"))] for row in rows]


def stored_table(data):
    """A stored table as {(row, column): text}."""
    heading, *rows = stored_rows(data)
    return {(row[0], column): text for row in rows for column, text in zip(heading[1:], row[1:], strict=True)}


def save_tiny(folder, hidden_size=32):
    """Store a Llama of two layers with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers.base_models import load_tokenizer

    tokenizer = load_tokenizer()
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # large enough that a wrong position or mask changes the answer
        dtype="float32",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base_model") / "tiny")


@pytest.fixture(scope="session")
def tiny_task():
    from datasets import Dataset

    from helpers.tasks import Task

    splits = {}
    for split, rows in {"train": range(4), "validation": range(4, 6), "test": range(6, 8)}.items():
        documents = [
            (f"the {words[row]} and one {words[row - 1]}" + " again" * row, label)
            for row in rows
            for label, words in enumerate(WORDS.values())
        ]
        splits[split] = Dataset.from_dict({"text": [text for text, _ in documents], "label": [label for _, label in documents]})
    return Task("tiny", tuple(WORDS), **splits)


def random_predictions(seed, n=80, n_labels=4, skill=2.0, name="x", gold=None, **more):
    """Predictions that are right more often than chance, by `skill`."""
    import numpy as np

    from helpers.evaluation import Predictions

    generator = np.random.default_rng(seed)
    gold = generator.integers(n_labels, size=n) if gold is None else gold
    logits = generator.normal(size=(len(gold), n_labels))
    logits[np.arange(len(gold)), gold] += skill
    odds = np.exp(logits)
    return Predictions(name, tuple(f"label {n}" for n in range(n_labels)), odds / odds.sum(axis=1, keepdims=True), gold, **more)


def with_counts(only_a, only_b, both=30, neither=10):
    """Two classifiers of two labels that disagree as asked."""
    import numpy as np

    from helpers.evaluation import Predictions

    correct_a = np.repeat([True, False, True, False], [only_a, only_b, both, neither])
    correct_b = np.repeat([False, True, True, False], [only_a, only_b, both, neither])
    gold = np.arange(len(correct_a)) % 2
    return tuple(
        Predictions(name, ("x", "y"), np.eye(2)[np.where(correct, gold, 1 - gold)], gold)
        for name, correct in {"a": correct_a, "b": correct_b}.items()
    )
