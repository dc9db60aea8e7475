"""Chapter 13: labels that are wrong or rare, and parts of long documents."""

import numpy as np
import pytest
from conftest import BOOK, glued_in
from datasets import Dataset
from sklearn.metrics import f1_score

from helpers.base_models import DEFAULT, load_tokenizer
from helpers.corpora import Document
from helpers.errors import BookError
from helpers.lab.as_it_comes import distinct, part_of, rare_labels, wrong_labels
from helpers.records import read
from helpers.tasks import SPLITS, Task


def made(n_of_each, labels=("sports", "tech", "business")):
    """A task with so many documents of every label in each split."""
    splits = {}
    for split, n in zip(SPLITS, n_of_each, strict=True):
        gold = np.tile(np.arange(len(labels)), n).tolist()
        splits[split] = Dataset.from_dict({"text": [f"{split} {row}" for row in range(len(gold))], "label": gold})
    return Task("made", labels, **splits)


def labels_of(task, split="train"):
    return np.array(getattr(task, split)["label"])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_so_many_labels_are_another_one_and_test_documents_keep_theirs(share):
    task = made((20, 10, 10))
    worse = wrong_labels(task, share, seed=0)
    for split in SPLITS[:2]:
        assert (labels_of(worse, split) != labels_of(task, split)).mean() == pytest.approx(share, abs=0.02)
        assert getattr(worse, split)["text"] == getattr(task, split)["text"]
    assert labels_of(worse, "test").tolist() == labels_of(task, "test").tolist()


def test_what_is_wrong_stays_wrong_in_the_same_way_when_more_labels_are():
    task = made((20, 10, 10))
    right, some, more = (labels_of(wrong_labels(task, share, seed=1)) for share in (0.0, 0.2, 0.4))
    assert (more == some)[some != right].all()
    assert not np.array_equal(some, labels_of(wrong_labels(task, 0.2, seed=2)))


def test_a_label_gets_documents_of_its_number_and_validation_in_proportion():
    task = made((16, 8, 4))
    rare = rare_labels(task, [16, 4, 1], seed=0)
    assert np.bincount(labels_of(rare)).tolist() == [16, 4, 1]
    assert np.bincount(labels_of(rare, "validation")).tolist() == [8, 2, 1]
    assert rare.test["text"] == task.test["text"]
    assert set(rare.train["text"]) <= set(task.train["text"])
    assert np.bincount(labels_of(rare_labels(task, [16, 4, 1], seed=1))).tolist() == [1, 16, 4]


def test_a_part_is_the_first_the_last_or_both_ends_of_a_document():
    tokenizer = load_tokenizer(DEFAULT)
    text = " ".join(f"word{number}" for number in range(200))
    first, last, both = (part_of(tokenizer, 24, part)(text) for part in ("first", "last", "both"))
    assert text.startswith(first) and text.endswith(last)
    start, end = both.split(" … ")
    assert first.startswith(start) and last.endswith(end)
    for part in (first, last):
        assert 22 <= len(tokenizer(part, add_special_tokens=False).input_ids) <= 25
    assert part_of(tokenizer, None, "whole")(text) == text
    assert part_of(tokenizer, 24, "last")("so short") == part_of(tokenizer, 24, "both")("so short") == "so short"


def test_documents_that_begin_or_end_alike_are_left_once():
    tokenizer = load_tokenizer(DEFAULT)
    one, two, three = (" ".join(f"{word}{number}" for number in range(40)) for word in ("a", "b", "c"))
    texts = [f"{one} {two}", f"{one} {three}", f"{three} {two}", f"{two} {one}"]
    kept = distinct([Document(text, "tech") for text in texts], tokenizer)
    assert [document.text for document in kept] == [texts[0], texts[3]]
    cut = [part_of(tokenizer, 48, part)(document.text) for document in kept for part in ("first", "last", "both")]
    assert len(set(cut)) == len(cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: wrong_labels(task, 1.0, 0), "needs 0 ≤ share < 1"),
        (lambda task: wrong_labels(task, 0.95, 0), "no train document of '.*' keeps its label. Lower wrong_labels"),
        (lambda task: rare_labels(task, [4, 2], 0), "a number of at least 1 for each of its 3 labels"),
        (lambda task: rare_labels(task, [40, 2, 1], 0), "train has 4 documents of 'sports', fewer than 40. Lower kept"),
        (lambda task: part_of(None, 8, "middle"), "middle"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(change, message):
    with pytest.raises(BookError, match=message) as caught:
        change(made((4, 4, 4)))
    assert "\n" not in str(caught.value)


NAMES = {"TF-IDF + linear SVM": "words", "MiniLM, fine-tuned": "encoder", "head, random start": "head"}
NAMES |= {"instruction, labels named": "prompt"}


@pytest.fixture(scope="module")
def recorded():
    return [record for record in read(BOOK / "results" / "as_it_comes.jsonl") if record["name"] in NAMES]


@pytest.fixture(scope="module")
def glued():
    found = glued_in("13_data_as_it_comes").items()
    return {name: float("".join(data["text/plain"])) for name, data in found if "text/html" not in data}


def f1(record, probabilities=None):
    predicted = np.array(record["probabilities"] if probabilities is None else probabilities).argmax(axis=1)
    return 100 * f1_score(record["gold"], predicted, average="macro")


def test_runs_with_wrong_labels_are_judged_on_the_same_right_ones(recorded):
    found = {}
    for record in (each for each in recorded if "wrong_labels" in each["key"]["options"]):
        share, seed = record["key"]["options"]["wrong_labels"], record["key"]["seed"]
        found.setdefault(seed, {})[share] = record["content_hash"]
        assert record["test_set"] == found.setdefault(("test", seed), record["test_set"])
    for seed in range(3):
        assert set(found[seed]) == {0.0, 0.2, 0.4} and len(set(found[seed].values())) == 3


def test_what_wrong_labels_cost_is_that_of_the_records(recorded, glued):
    scores = {}
    for record in recorded:
        if "wrong_labels" in record["key"]["options"]:
            scores.setdefault((NAMES[record["name"]], record["key"]["options"]["wrong_labels"]), []).append(f1(record))
    for name in NAMES.values():
        for share, words in ((0.2, "fifth"), (0.4, "two_fifths")):
            lost = np.mean(scores[name, 0.0]) - np.mean(scores[name, share])
            assert glued[f"lost_{name}_{words}"] == pytest.approx(lost, abs=0.1)


def test_what_the_division_brings_is_that_of_the_records(recorded, glued):
    gains = {}
    for record in recorded:
        if "kept" in record["key"]["options"] and record["name"] != "TF-IDF + linear SVM":
            documents = np.roll([64, 32, 16, 8, 4], record["key"]["seed"])
            shifted = np.log(np.array(record["probabilities"]) + 1e-6) - np.log(documents)  # logits, less those of the shares
            gains.setdefault(NAMES[record["name"]], []).append(f1(record, shifted) - f1(record))
    assert set(gains) == {"encoder", "head", "prompt"}
    for name, each in gains.items():
        assert len(each) == 5 and glued[f"shift_f1_{name}"] == pytest.approx(np.mean(each), abs=0.1)
