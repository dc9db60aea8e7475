"""Chapter 06, the decision guide and the comparison's records, computed once more by other means."""

import re

import nbformat
import numpy as np
import pytest
from conftest import BOOK, glued_in, stored_table
from sklearn.metrics import f1_score

from helpers.records import read

SETTINGS = {  # as the chapter calls them
    ("bbc-headlines", 8): "headlines, 8 per class",
    ("bbc-headlines", 32): "headlines, 32 per class",
    ("bbc-headlines", 64): "headlines, 64 per class",
    ("ipc-sections", 32): "patent titles, 32 per class",
    ("attack-techniques", 4): "techniques, 4 per class",
    ("bbc", 32): "articles, 32 per class",
}
SHORT = {
    "frozen embedding + probe": "frozen probe",
    "TF-IDF + linear SVM": "TF-IDF + SVM",
    "head, random start": "head + cue",
    "head, probe start": "head + cue, probe start",
    "head, instruction": "head + instruction",
    "instruction, labels named": "tuned LM + instruction",
    "instruction, labels not named": "tuned LM + instruction",
    "instruction, bare": "tuned LM + cue",
}
PAPER = ("tuned LM + instruction", "head + cue")
COMPARED = {
    "closest to the paper": PAPER,
    "both read the instruction": ("tuned LM + instruction", "head + instruction"),
    "both read the cue": ("tuned LM + cue", "head + cue"),
}
FEW, MORE = "headlines, 8 per class", "headlines, 32 per class"


@pytest.fixture(scope="module")
def glued():
    return glued_in("06_side_by_side")


@pytest.fixture(scope="module")
def records():
    """By setting and method, as the chapter calls them, in the order of their seeds."""
    found = {}
    for record in sorted(read(BOOK / "results" / "fair.jsonl"), key=lambda record: record["key"]["seed"]):
        key = record["key"]
        place = SETTINGS[key["task"], key["options"]["per_class"]], SHORT.get(record["name"], record["name"])
        found.setdefault(place, []).append(record)
    found = {place: made for place, made in found.items() if len(made) >= 3}
    four = {name for sides in COMPARED.values() for name in sides}
    for setting in SETTINGS.values():  # a seed counts when all of these have it
        n_seeds = [len(made) for (its, name), made in found.items() if its == setting and name in four]
        for (its, _), made in found.items():
            if its == setting and n_seeds:
                del made[min(n_seeds) :]
    return found


def said(record):
    return np.array(record["probabilities"]).argmax(axis=1)


def macro_f1(record, rows=slice(None)):
    gold = np.array(record["gold"])[rows]
    return f1_score(gold, said(record)[rows], labels=np.unique(gold), average="macro", zero_division=0)


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
    filled = {(place, method) for (method, place), text in shown.items() if text != "—"}
    compared = {setting for setting, name in records if name == PAPER[0]} & {s for s, name in records if name == PAPER[1]}
    assert filled == {(setting, name) for setting, name in records if setting in compared} and len(filled) >= 15
    for (method, place), text in shown.items():
        if text != "—":
            f1 = [100 * macro_f1(record) for record in records[place, method]]
            mean, spread = map(float, text.split(" ± "))
            assert mean == pytest.approx(np.mean(f1), abs=0.11) and spread == pytest.approx(np.std(f1, ddof=1), abs=0.11)


def test_the_differences_and_their_intervals_are_those_of_the_records(glued, records):
    shown = stored_table(glued["head_against_instruction"])
    generator = np.random.default_rng(5)
    rows = {row for row, _ in shown}
    assert len(rows) >= 6
    for row in rows:
        place, what = row.rsplit(", ", 1)
        one, other = (records[place, name] for name in COMPARED[what])
        one, other = (side[: min(len(one), len(other))] for side in (one, other))
        differences = [macro_f1(a) - macro_f1(b) for a, b in zip(one, other, strict=True)]
        drawn = []  # documents of each seed; single documents, which is right where groups are
        for a, b in zip(one, other, strict=True):
            assert a["test_set"] == b["test_set"]
            groups = np.unique(a["groups"], return_inverse=True)[1]
            rows_of = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
            drawn.append([])
            for _ in range(150):
                rows = np.concatenate([rows_of[group] for group in generator.integers(0, len(rows_of), len(rows_of))])
                drawn[-1].append(macro_f1(a, rows) - macro_f1(b, rows))
        seeds = generator.integers(0, len(drawn), (2000, len(drawn)))
        means = [np.mean([drawn[seed][generator.integers(150)] for seed in drawn_seeds]) for drawn_seeds in seeds]
        low, high = np.quantile(means, [0.025, 0.975])
        of_paper = {
            column: float(shown[row, column]) for column in ("instruction − head, points", "bootstrap, from", "bootstrap, to")
        }
        expected = (100 * np.mean(differences), 100 * low, 100 * high)
        assert list(of_paper.values()) == pytest.approx(expected, abs=1.2)
        assert of_paper["instruction − head, points"] == pytest.approx(expected[0], abs=0.11)


def test_every_search_ended_inside_its_grid():
    for sweep in sorted((BOOK / "results").glob("fair*.jsonl")):
        for record in read(sweep):
            if "learning_rate" in record["chosen"]["settings"]:
                rates = [tried["settings"]["learning_rate"] for tried in record["tried"]]
                assert len(rates) >= 3
                assert min(rates) < record["chosen"]["settings"]["learning_rate"] < max(rates), record["key"]
            best = max(record["tried"], key=lambda tried: (tried["macro_f1"], -tried["log_loss"]))
            assert record["chosen"]["settings"] == best["settings"]


NAMED, BARE, RANDOM, START = "tuned LM + instruction", "tuned LM + cue", "head + cue", "head + cue, probe start"
MINILM, PROBE, INSTRUCTED = "MiniLM, fine-tuned", "frozen probe", "head + instruction"
RECORDED = {  # difference, low, high, in 0..1
    (FEW, NAMED, RANDOM): (0.078, 0.033, 0.122),
    (MORE, NAMED, RANDOM): (0.074, 0.042, 0.105),
    (MORE, INSTRUCTED, RANDOM): (0.056, 0.032, 0.081),
    (MORE, NAMED, BARE): (0.064, 0.041, 0.088),
    (MORE, NAMED, INSTRUCTED): (0.018, -0.010, 0.046),
    (MORE, BARE, RANDOM): (0.010, -0.026, 0.041),
    (FEW, NAMED, INSTRUCTED): (0.052, 0.023, 0.081),
    (FEW, BARE, RANDOM): (0.051, 0.020, 0.082),
    (FEW, INSTRUCTED, RANDOM): (0.026, -0.007, 0.058),
    (MORE, RANDOM, START): (0.027, 0.007, 0.048),
    (MORE, MINILM, NAMED): (0.011, -0.017, 0.039),
    (MORE, MINILM, INSTRUCTED): (0.029, -0.013, 0.071),
    (FEW, MINILM, NAMED): (0.049, 0.023, 0.074),
}
ALONE = {  # by a t-test over the seeds: whether zero is excluded
    (MORE, NAMED, RANDOM): True,
    (FEW, NAMED, RANDOM): True,
    (MORE, INSTRUCTED, RANDOM): True,
    (MORE, NAMED, BARE): True,
    (FEW, NAMED, INSTRUCTED): True,
    (FEW, BARE, RANDOM): True,
    (MORE, RANDOM, START): True,
    (FEW, INSTRUCTED, PROBE): False,
    (FEW, BARE, INSTRUCTED): True,
    (MORE, INSTRUCTED, BARE): False,
    (FEW, MINILM, NAMED): True,
}
ORDER = {
    FEW: (RANDOM, PROBE, INSTRUCTED, BARE, NAMED, MINILM),
    MORE: (PROBE, RANDOM, BARE, INSTRUCTED, NAMED),
}  # in every seed, the best last


@pytest.mark.parametrize("changed", [None, *RECORDED, *(("alone", *each) for each in ALONE), *ORDER], ids=str)
def test_the_verdict_fails_when_the_records_say_otherwise(changed):
    cells = nbformat.read(BOOK / "06_side_by_side.ipynb", 4).cells
    (claim,) = [cell.source for cell in cells if "claim" in cell.metadata.get("tags", []) and "def against" in cell.source]
    found, alone, order = dict(RECORDED), dict(ALONE), dict(ORDER)
    if changed in found:
        difference, low, high = found[changed]
        found[changed] = (0.001, -0.03, 0.03) if low > 0 else (difference + 0.2, low + 0.2, high + 0.2)
    elif changed in order:
        order[changed] = (order[changed][1], order[changed][0], *order[changed][2:])  # the probe and the random start
    elif changed:
        alone[changed[1:]] = not alone[changed[1:]]

    def over_seeds(one, other):
        place, one = one
        values = found.get((place, one, other[1]), (0.03, 0.01, 0.05))  # a figure in a sentence that another check holds
        return dict(zip(("difference", "low", "high"), values, strict=True), p_value=0.001)

    def differences(place, one, other):
        steps = order[place].index(one) - order[place].index(other)
        either = (place, {one, other}) == (FEW, {PROBE, RANDOM}) and changed != FEW  # one seed this way, one that
        return np.array([steps, -steps] if either else [steps])

    names = {
        "over_seeds": over_seeds,
        "pair": lambda place, one, other: ((place, one), (place, other)),
        "t_interval": lambda *which: (1.0, 9.0) if alone[which] else (-3.0, 20.0),
        "differences": differences,
        **{"NAMED": NAMED, "BARE": BARE, "RANDOM": RANDOM, "START": START, "INSTRUCTED": INSTRUCTED},
        "glue": lambda *_: None,
    }
    if changed is None:
        exec(claim, names)
    else:
        with pytest.raises(AssertionError):
            exec(claim, names)


def test_the_intervals_of_seeds_alone_are_those_of_a_t_test(glued, records):
    from scipy.stats import ttest_1samp

    shown = stored_table(glued["head_against_instruction"])
    for row in {row for row, _ in shown}:
        place, what = row.rsplit(", ", 1)
        one, other = (np.array([100 * macro_f1(record) for record in records[place, name]]) for name in COMPARED[what])
        n = min(len(one), len(other))
        assert int(shown[row, "seeds"]) == n
        interval = ttest_1samp(one[:n] - other[:n], 0).confidence_interval()
        assert [float(shown[row, column]) for column in ("from", "to")] == pytest.approx(interval, abs=0.3)
        assert float(shown[row, "p"]) == pytest.approx(ttest_1samp(one[:n] - other[:n], 0).pvalue, abs=0.01)


def test_the_guide_is_one_page_without_numbers_of_its_own(glued):
    guide = (BOOK / "choosing.md").read_text()
    pasted = re.findall(r"```\{glue\} (\S+)\n:doc: 06_side_by_side.ipynb\n```", guide)
    assert {"side_by_side_figure", "side_by_side_table"} <= set(pasted) <= set(glued)
    prose = re.sub(r"```.*?```|\{cite:t\}`\w+`|\(\S+\)|\[[\d.]+\]|chapter \d\d|\w+ 20\d\d", "", guide, flags=re.S)
    assert len(prose.split()) < 700
    assert re.findall(r"\d+", prose) in (["135"], [])


def test_what_is_made_of_records_is_compared_at_every_run():
    live = ("search(", "# Set-up", "import ", "with_alt_text", "tasks.load", "def ")
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
