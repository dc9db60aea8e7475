"""Chapter 06 and the decision guide against the records, computed once more by other means."""

import re

import nbformat
import numpy as np
import pytest
from conftest import BOOK, glued_in, stored_table
from sklearn.metrics import f1_score

from helpers.records import read

SWEEPS = ("side_by_side", "rank_grid", "zero_shot", "few_documents")
SHORT = {
    "the head": "embedding head + LoRA",
    "instruction tuning": "instruction tuning + LoRA",
    "the fine-tuned encoder": "MiniLM, fine-tuned",
    "the frozen probe": "frozen embedding + probe",
    "the svm on word counts": "TF-IDF + linear SVM",
}


@pytest.fixture(scope="module")
def glued():
    return glued_in("06_side_by_side")


@pytest.fixture(scope="module")
def records():
    return [record for record in read(BOOK / "results" / "side_by_side.jsonl") if record["key"]["profile"] == "quick"]


def task_of(record):
    key = record["key"]
    return key["task"] + "".join(f", {key['options'][unit]} {unit}" for unit in ("words", "tokens") if unit in key["options"])


def said(record):
    return np.array(record["probabilities"]).argmax(axis=1)


def test_the_metrics_of_every_record_are_those_of_its_predictions():
    for path in (BOOK / "results").glob("*.jsonl"):
        for record in read(path):
            gold, probabilities = np.array(record["gold"]), np.array(record["probabilities"])
            room = 1e-9
            if gold.ndim == 1:
                predicted, right = said(record), gold == said(record)
                room += (np.diff(np.sort(probabilities, axis=1)[:, -2:]) < 1e-5).mean()  # rounding can turn these
            else:
                predicted = (probabilities >= 0.5).astype(int)
                right = (gold == predicted).all(axis=1)
            present = np.unique(gold) if gold.ndim == 1 else np.flatnonzero(gold.any(axis=0))
            macro_f1 = f1_score(gold, predicted, labels=present, average="macro", zero_division=0)
            assert record["metrics"]["accuracy"] == pytest.approx(right.mean(), abs=room), record["key"]
            assert record["metrics"]["macro_f1"] == pytest.approx(macro_f1, abs=4 * room), record["key"]


def test_the_table_has_the_means_of_the_records(glued, records):
    shown = stored_table(glued["side_by_side_table"])
    assert len(shown) >= 6 * 3
    for (approach, task), text in shown.items():
        f1 = [100 * r["metrics"]["macro_f1"] for r in records if (task_of(r), r["name"]) == (task, approach)]
        assert len(f1) >= 3
        assert text == f"{np.mean(f1):.1f} ± {np.std(f1, ddof=1):.1f}"


def test_every_sentence_of_the_verdict_has_its_test(glued, records):
    tasks = dict.fromkeys(task for _, task in stored_table(glued["side_by_side_table"]))
    pairs = [(a, b) for a, b in map(names_in, verdict(glued))]
    family = {}
    for a, b in dict.fromkeys(pairs):
        for task in tasks:
            right, groups = {name: [] for name in (a, b)}, []
            for r in sorted(records, key=lambda r: r["key"]["seed"]):
                if task_of(r) == task and r["name"] in right:
                    right[r["name"]] += list(said(r) == np.array(r["gold"]))
                    groups += r["groups"] if r["name"] == a else []
            difference = np.array(right[a]).astype(int) - np.array(right[b])
            each = np.bincount(np.unique(groups, return_inverse=True)[1], weights=difference)  # sum of every group
            flips = np.random.default_rng(1).choice([-1, 1], (9999, len(each))) @ each
            p = (1 + (np.abs(flips) >= abs(each.sum())).sum()) / 10_000
            family[a, b, task] = (np.sign(each.sum()), p)
    order = sorted(family, key=lambda key: family[key][1])
    adjusted = np.maximum.accumulate([family[key][1] * (len(order) - i) for i, key in enumerate(order)])
    sure = {key for key, p in zip(order, adjusted, strict=True) if not 0.04 < p < 0.06}  # other draws, other digits
    assert len(sure) >= len(order) - 3
    shown = {key: family[key][0] if p < 0.05 else 0 for key, p in zip(order, adjusted, strict=True)}
    claimed = {}
    for sentence in verdict(glued):
        a, b = names_in(sentence)
        sign = 1 if " is more accurate " in sentence else -1 if " is less accurate " in sentence else 0
        for task in sentence.rstrip(".").rsplit(" on ", 1)[-1].split("; "):
            claimed[a, b, task] = sign
    assert set(claimed) == set(shown) and {key: claimed[key] for key in sure} == {key: shown[key] for key in sure}


def verdict(glued):
    return [line[2:] for line in "".join(glued["verdict"]["text/markdown"]).splitlines() if line.startswith("- ")]


def names_in(sentence):
    found = sorted((sentence.lower().index(short), name) for short, name in SHORT.items() if short in sentence.lower())
    assert len(found) == 2, sentence
    return found[0][1], found[1][1]


def test_every_rule_of_the_guide_is_pasted_and_names_records_that_exist(glued):
    guide = (BOOK / "choosing.md").read_text()
    pasted = re.findall(r"```\{glue\} (\S+)\n:doc: 06_side_by_side.ipynb\n```", guide)
    rules = {name for name in glued if name.startswith("rule_")}
    assert rules | {"verdict"} <= set(pasted) <= set(glued)
    for name in rules:
        (sweep,) = re.findall(r"\*\(`results/(\w+)\.jsonl`, [^)]+\)\*$", "".join(glued[name]["text/markdown"]))
        assert sweep in SWEEPS and (BOOK / "results" / f"{sweep}.jsonl").stat().st_size
    prose = re.sub(r"```.*?```|\(\S+\)|chapter \d\d", "", guide, flags=re.S)
    assert re.findall(r"\d+", prose) in (["135"], []), "figures come from the records"


def test_what_is_made_of_records_is_compared_at_every_run():
    live = ("lands(", "task = ", "# Set-up", "import ", "provenance", "with_alt_text")
    for cell in nbformat.read(BOOK / "06_side_by_side.ipynb", 4).cells:
        if cell.cell_type == "code" and cell.outputs and not any(word in cell.source for word in live):
            assert "nbval-check-output" in cell.metadata.get("tags", []), cell.source[:80]


def test_all_records_say_where_they_come_from():
    for path in (BOOK / "results").glob("*.jsonl"):
        for record in read(path):
            made = record["provenance"]
            assert (
                made["device"] and made["date"] and made["commit"] and set(made["versions"]) >= {"torch", "transformers", "peft"}
            )
            assert len(record["test_set"]) == len(record["content_hash"]) == 64
            assert len(record["gold"]) == len(record["probabilities"])
