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
    "instruction, no chat template": "tuned LM + instruction, no chat template",
    "instruction, bare": "tuned LM + cue",
}
PAPER = ("tuned LM + instruction", "head + cue")
COMPARED = {
    "closest to the paper": PAPER,
    "both read the instruction": ("tuned LM + instruction", "head + instruction"),
    "both read the cue": ("tuned LM + cue", "head + cue"),
    "the very same tokens": ("tuned LM + instruction, no chat template", "head + instruction"),
}
FOUR = {name for sides in list(COMPARED.values())[:3] for name in sides}
SMALL = {"frozen probe", "TF-IDF + SVM", "MiniLM, fine-tuned"}
ON_CPU = ", on a CPU"


@pytest.fixture(scope="module")
def glued():
    return glued_in("06_side_by_side")


@pytest.fixture(scope="module")
def records():
    """By setting and method, as the chapter calls them, in the order of their seeds."""
    found = {}
    for file, methods, where in (("fair_gpu", FOUR, ""), ("fair", SMALL, ""), ("fair", FOUR | SMALL | {*SHORT.values()}, ON_CPU)):
        made = read(BOOK / "results" / f"{file}.jsonl")
        for record in sorted(made, key=lambda record: record["key"]["seed"]):
            key, name = record["key"], SHORT.get(record["name"], record["name"])
            if name in methods:
                found.setdefault((SETTINGS[key["task"], key["options"]["per_class"]] + where, name), []).append(record)
    return {place: made for place, made in found.items() if len(made) >= 3}


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
    assert filled == {(setting, name) for setting, name in records if ON_CPU not in setting} and len(filled) >= 35
    for (method, place), text in shown.items():
        if text != "—":
            f1 = [100 * macro_f1(record) for record in records[place, method]]
            mean, spread = map(float, text.split(" ± "))
            assert mean == pytest.approx(np.mean(f1), abs=0.11) and spread == pytest.approx(np.std(f1, ddof=1), abs=0.11)


@pytest.mark.parametrize(("table", "least"), [("head_against_instruction", 17), ("again", 8)])
def test_the_differences_and_their_intervals_are_those_of_the_records(glued, records, table, least):
    shown = stored_table(glued[table])
    generator = np.random.default_rng(5)
    rows = {row for row, _ in shown}
    assert len(rows) >= least
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


NAMED, BARE, RANDOM, INSTRUCTED = "tuned LM + instruction", "tuned LM + cue", "head + cue", "head + instruction"
MINILM, PROBE, COUNTS = "MiniLM, fine-tuned", "frozen probe", "TF-IDF + SVM"
START, PLAIN = "head + cue, probe start", "tuned LM + instruction, no chat template"
INTERVALS = {  # of the t-test and of the bootstrap
    "ahead": ((1, 9), (2, 8)),
    "probably ahead": ((-1, 9), (2, 8)),
    "no clear difference": ((-3, 4), (-2, 3)),
    "probably behind": ((-9, -1), (-8, 2)),
}


def claims(table):
    """The cell with this table of claims, up to where they are held, and what it needs to run."""
    cells = nbformat.read(BOOK / "06_side_by_side.ipynb", 4).cells
    (source,) = [cell.source for cell in cells if "claim" in cell.metadata.get("tags", []) and f"{table} = {{" in cell.source]
    places = [*SETTINGS.values()]
    names = {"np": np, "PLACES": places, "AGAIN": [place + ON_CPU for place in places[:2]], "glue": lambda *_: None, "FOUR": FOUR}
    names |= {name: globals()[name] for name in ("NAMED", "BARE", "RANDOM", "INSTRUCTED", "START", "PLAIN", "PROBE", "MINILM")}
    names |= {"COUNTS": COUNTS, "differences": lambda *_: np.array([1.0]), "said": {}}
    names |= {"t_interval": lambda *which: names["said"][which][0], "bootstrap": lambda *which: names["said"][which][1]}
    return source.rpartition(f"\nhold({table})")[0], names


@pytest.mark.parametrize("table", ["SAID", "SAID_AGAIN"])
def test_every_verdict_fails_when_the_records_say_otherwise(table):
    source, names = claims(table)
    if table != "SAID":
        before, _ = claims("SAID")
        exec(before, names)
    exec(source, names)
    right = {tuple(sides): INTERVALS[said] for *sides, said in names[table].values()}
    assert len(right) == len(names[table]) >= 15
    names["said"].update(right)
    exec(f"hold({table})", names)
    for which, intervals in right.items():
        for others in INTERVALS.values():
            if others != intervals:
                names["said"][which] = others
                with pytest.raises(AssertionError):
                    exec(f"hold({table})", names)
        names["said"][which] = intervals


def test_the_verdicts_are_those_of_the_records_by_other_means(records):
    """The sign of the t-test's interval, by scipy's own; the bootstrap's is compared with the table above."""
    from scipy.stats import ttest_rel

    for table in ("SAID", "SAID_AGAIN"):
        source, names = claims("SAID")
        exec(source, names)
        exec(claims(table)[0], names)
        for place, one, other, said in names[table].values():
            sides = [[100 * macro_f1(record) for record in records[place, name]] for name in (one, other)]
            n = min(map(len, sides))
            low, high = ttest_rel(*(side[:n] for side in sides)).confidence_interval()
            if said == "ahead":
                assert low > -0.3 and high > 0, (place, one, other)
            elif said == "no clear difference":
                assert low < 0.3 and high > -0.3, (place, one, other)


def test_the_intervals_of_seeds_alone_are_those_of_a_t_test(glued, records):
    from scipy.stats import ttest_1samp

    shown = stored_table(glued["head_against_instruction"]) | stored_table(glued["again"])
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
