"""The chapter on confidence, sets of labels and two models against the records, computed once more by other means."""

import nbformat
import numpy as np
import pytest
from conftest import BOOK, glued_in, stored_rows
from scipy.stats import beta
from sklearn.metrics import f1_score

from helpers.records import read

MINILM, PROMPT, HEAD = "MiniLM, fine-tuned", "instruction, labels named", "head, random start"


@pytest.fixture(scope="module")
def glued():
    return glued_in("when_unsure")


@pytest.fixture(scope="module")
def records():
    """By documents per class and method, in the order of their seeds."""
    found = {}
    for record in sorted(read(BOOK / "results" / "fair.jsonl"), key=lambda record: record["key"]["seed"]):
        if record["key"]["task"] == "bbc-headlines" and record["key"]["seed"] < 3:
            found.setdefault((record["key"]["options"]["per_class"], record["name"]), []).append(record)
    return found


def said(glued, name):
    return float("".join(glued[name]["text/plain"]))


def of(record, part=None):
    part = record[part] if part else record
    probabilities = np.array(part["probabilities"])
    return probabilities / probabilities.sum(1, keepdims=True), np.array(part["gold"])


def cell_that_begins(text):
    (found,) = [cell.source for cell in nbformat.read(BOOK / "when_unsure.ipynb", 4).cells if cell.source.startswith(text)]
    return found


@pytest.mark.parametrize("short, method", [("prompt", PROMPT), ("head", HEAD)])
def test_the_errors_of_the_surer_half_are_those_of_the_records(glued, records, short, method):
    halves, everything = [], []
    for record in records[32, method]:
        probabilities, gold = of(record)
        wrong, sure = probabilities.argmax(1) != gold, probabilities.max(1)
        halves.append(100 * wrong[sure >= np.sort(sure)[-250]].mean())
        everything.append(100 * wrong.mean())
    assert said(glued, f"half_{short}") == pytest.approx(np.mean(halves), abs=0.3)  # equally sure ones at the limit
    assert said(glued, f"all_{short}") == pytest.approx(np.mean(everything), abs=0.15)


def test_the_sets_are_those_of_the_records_and_cover_what_theory_says(glued, records):
    shown = {(row[0], int(row[1])): row for row in stored_rows(glued["conformal_table"])[1:]}
    assert len(shown) == 8
    for (method, per_class), row in shown.items():
        covered, sizes = [], []
        for record in records[per_class, method]:
            probabilities, gold = of(record, "validation")
            strange = 1 - probabilities[np.arange(200), gold]
            cut = np.quantile(strange, np.ceil(201 * 0.9) / 200, method="inverted_cdf")
            probabilities, gold = of(record)
            sets = 1 - probabilities <= cut
            covered.append(sets[np.arange(len(gold)), gold].mean())
            sizes.append(sets.sum(1).mean())
        assert float(row[2].split(" ")[0]) == pytest.approx(100 * np.mean(covered), abs=0.3), method
        assert float(row[3]) == pytest.approx(np.mean(sizes), abs=0.02), method
        low, high = beta.interval(0.9999, 181, 20)  # of the coverage that 200 calibration documents can give
        assert low - 0.06 < min(covered) and max(covered) < high + 0.06, method


@pytest.mark.parametrize("per_class", [8, 32])
def test_the_pair_is_that_of_the_records(glued, records, per_class):
    f1, passed = {"pair": [], "minilm": [], "prompt": []}, []
    for first, second in zip(records[per_class, MINILM], records[per_class, PROMPT], strict=True):
        (mine, gold), (its, _) = of(first), of(second)
        unsure = mine.max(1) < np.quantile(of(first, "validation")[0].max(1), 0.25)
        pair = np.array([(a + b) / 2 if ask else a for a, b, ask in zip(mine, its, unsure, strict=True)])
        passed.append(100 * unsure.mean())
        for name, probabilities in (("pair", pair), ("minilm", mine), ("prompt", its)):
            f1[name].append(100 * f1_score(gold, probabilities.argmax(1), average="macro"))
    assert said(glued, f"passed_{per_class}") == pytest.approx(np.mean(passed), abs=0.2)
    for name in ("minilm", "prompt"):
        difference = np.mean(f1["pair"]) - np.mean(f1[name])
        assert said(glued, f"{name}_{per_class}_difference") == pytest.approx(difference, abs=0.2)
        assert said(glued, f"{name}_{per_class}_low") > 0


def chapter(records, change=lambda method, probabilities: probabilities):
    """What the chapter's cells need, its records changed."""
    from helpers.evaluation import Predictions

    names = {}
    exec(cell_that_begins("from dataclasses").split("profile =")[0], names)
    names |= {"glue": lambda *_: None, "test": {}, "validation": {}, "MINILM": MINILM, "PROMPT": PROMPT, "HEAD": HEAD}
    for part in ("test", "validation"):
        for key, made in records.items():
            names[part][key] = []
            for record in made:
                probabilities, gold = of(record, None if part == "test" else part)
                names[part][key].append(Predictions(key[1], tuple(record["labels"]), change(key[1], probabilities), gold))
    exec(cell_that_begins("def cascade"), names)
    exec(cell_that_begins("def f1_of").split("SHARES")[0], names)
    return names


def test_the_claim_that_the_pair_is_better_holds_and_fails_without_a_second_opinion(records):
    few = {key: made for key, made in records.items() if key[1] in (MINILM, PROMPT)}
    claim = cell_that_begins("gains = {}")
    exec(claim, chapter(few))
    with pytest.raises(AssertionError):  # a second model that knows nothing
        exec(claim, chapter(few, lambda method, p: np.full_like(p, 0.2) if method == PROMPT else p))


def test_a_calibration_set_that_is_too_small_is_refused_with_the_number_needed(records):
    names = {"np": np}
    exec(cell_that_begins("def limit").split("cut =")[0], names)
    limit = names["limit"]
    with pytest.raises(ValueError, match="8 calibration documents are too few for 90.0%: give at least 9"):
        limit(np.linspace(0, 1, 8), 0.1)
    assert limit(np.linspace(0, 1, 9), 0.1) == 1
    with pytest.raises(ValueError, match="at least 999"):
        limit(np.linspace(0, 1, 200), 0.001)
    drawn = np.random.default_rng(0).uniform(size=(2000, 100))  # the strangeness of right labels, whatever the model
    covered = [row[-1] <= limit(row[:-1], 0.1) for row in drawn]
    assert 0.88 < np.mean(covered) < 0.92
