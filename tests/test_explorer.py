"""What the page of all records is made of. (The page in a browser: `test_site`.)"""

import importlib.util
import json

import numpy as np
import pytest
from conftest import BOOK

from helpers import records


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


explorer = load(BOOK / "_ext" / "explorer.py")
measured = load(BOOK.parent / ".ci" / "document_lengths.py")
LINES = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in sorted((BOOK / "results").glob("*.jsonl"))}


def rows_of(data):
    """The runs as the script in the page reads them."""
    runs = data["runs"]
    texts = set(runs["texts"])
    return [
        {name: runs["strings"][value] if name in texts and value is not None else value for name, value in pairs}
        for pairs in (zip(runs["columns"], row, strict=True) for row in runs["rows"])
    ]


@pytest.fixture(scope="module")
def everything():
    explorer.recorded.cache_clear()
    return explorer.data()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of results with nothing in it but lengths."""
    (tmp_path / explorer.LENGTHS).write_text('{"known": {"words": 7}}', encoding="utf-8")
    monkeypatch.setattr(explorer, "RESULTS", tmp_path)
    explorer.recorded.cache_clear()
    yield tmp_path
    explorer.recorded.cache_clear()


def record(seed=0, task="known", tried=True, name="head", gold=(0, 1, 0, 1), **settings):
    """A line of a file, as `helpers.lab.sweeps` writes it."""
    probabilities = [[0.9, 0.1]] * len(gold)
    settings = {"learning_rate": [1e-3, 2e-3] if tried else 5e-4, "epochs": 4, "rank": 16, "seed": seed, "name": name} | settings
    key = {
        "approach": "EmbeddingHead",
        "settings": settings,
        "task": task,
        "options": {"per_class": 4, "n_test": 4},
        "seed": seed,
    }
    scores = {f"{metric}{end}": 0.5 for metric in ("accuracy", "macro_f1") for end in ("", "_low", "_high")} | {"micro_f1": 0.5}
    cost = {"training_seconds": 1.0, "seconds": 1.0, "documents_per_second": 4.0, "training_peak_memory": None}
    made = {
        "key": key | {"profile": "quick"},
        "name": name,
        "labels": ["a", "b"],
        "gold": list(gold),
        "probabilities": probabilities,
    }
    made |= {"test_set": "x", "groups": None, "metrics": scores, "cost": cost}
    made["provenance"] = {
        "device": "cpu",
        "dtype": "float32",
        "quantization": None,
        "threads": 1,
        "commit": "0",
        "date": "2026-01-01",
    }
    if tried:
        made["chosen"] = {"settings": {"learning_rate": 2e-3}, "epoch": 2}
        made["tried"] = [made["chosen"], {"settings": {"learning_rate": 1e-3}, "epoch": 4}]
    return made


def write(path, *made):
    path.write_text("".join(json.dumps(each) + "\n" for each in made), encoding="utf-8")


def test_every_line_of_every_file_is_a_row_with_its_own_score_rate_and_choice(everything):
    rows = rows_of(everything)
    lines = [(file, json.loads(line)) for file, lines in LINES.items() for line in lines]
    assert len(rows) == len(lines) > 400
    for row, (file, line) in zip(rows, lines, strict=True):
        key, metrics = line["key"], line["metrics"]
        assert (row["file"], row["seed"], row["labels"]) == (file, key["seed"], len(line["labels"]))
        found = [row["macro_f1"], row["low"], row["high"]]
        assert found == pytest.approx([100 * metrics[f"macro_f1{end}"] for end in ("", "_low", "_high")], abs=0.006)
        assert (row["how"] == "validation") == ("tried" in line) and row["tried"] == (len(line.get("tried", [])) or None)
        rate = line.get("chosen", {}).get("settings", {}).get("learning_rate", key["settings"].get("learning_rate"))
        assert row["rate"] == (None if key["settings"].get("epochs") == 0 else rate)
    assert {row["how"] for row in rows} >= {"validation", "fixed"}
    attacked = [row for row in rows if row["file"] == "hostile"]
    assert all("documents" in row["condition"] for row in attacked)


def test_settings_hold_the_runs_that_chose_on_validation_and_no_others(everything):
    chosen = [row for row in rows_of(everything) if row["how"] == "validation"]
    methods = [(setting, method) for setting in everything["settings"] for method in setting["methods"]]
    assert sum(len(method["seeds"]) for _, method in methods) == len(chosen)
    for setting, method in methods:
        same = ("task", "per_class", "test")
        mine = [r for r in chosen if r["method"] == method["method"] and all(r[name] == setting[name] for name in same)]
        assert set(method["scores"]) <= {row["macro_f1"] for row in mine}
        assert method["mean"] == pytest.approx(np.mean(method["scores"]), abs=0.02)
        assert method["low"] <= method["mean"] <= method["high"] and len(method["seeds"]) == len(method["rates"])


def test_new_records_of_any_file_task_and_method_appear_by_themselves(folder):
    write(folder / "new.jsonl", record(0), record(1), record(0, rank=2), record(0, task="never seen"), record(0, tried=False))
    write(folder / "again.jsonl", record(0))  # the same run once more
    found = explorer.data()
    assert len(rows_of(found)) == 6
    known, unseen = found["settings"]
    assert (known["task"], known["words"], known["per_class"]) == ("known", 7, 4)
    assert (unseen["task"], unseen["words"]) == ("never seen", None)
    assert [(each["variant"], each["seeds"]) for each in known["methods"]] == [("rank 16", [0, 1]), ("rank 2", [0])]
    assert known["methods"][0]["rates"] == [2e-3, 2e-3]


def test_what_has_several_labels_or_was_attacked_is_in_the_table_alone(folder):
    attacked = record(1)
    attacked["key"]["documents"] = "attacked"
    write(folder / "new.jsonl", record(0, gold=[[0, 1], [1, 1], [1, 0], [0, 0]]), attacked)
    found = explorer.data()
    assert found["settings"] == []
    assert [(row["several"], row["per_class"], row["condition"]) for row in rows_of(found)] == [
        (True, None, ""),
        (False, 4, "documents attacked"),
    ]


def test_no_records_make_an_empty_page(folder):
    assert explorer.data() == {"runs": {"columns": [], "texts": [], "strings": [], "rows": []}, "settings": []}
    assert explorer.rates_chosen() == []


def test_interval_of_one_seed_is_that_of_its_documents_and_several_seeds_count():
    fair = [each for each in records.read(BOOK / "results" / "fair.jsonl") if each["name"] == "head, random start"][:3]
    mean, low, high = explorer.mean_and_interval(fair[:1])
    metrics = fair[0]["metrics"]
    assert mean == pytest.approx(100 * metrics["macro_f1"], abs=0.01)
    assert (low, high) == pytest.approx((100 * metrics["macro_f1_low"], 100 * metrics["macro_f1_high"]), abs=0.7)
    mean, *_ = explorer.mean_and_interval(fair)
    assert mean == pytest.approx(np.mean([100 * each["metrics"]["macro_f1"] for each in fair]), abs=0.01)


def test_every_recorded_task_has_a_measured_length():
    table = json.loads(measured.TABLE.read_text(encoding="utf-8"))
    recorded = {name for name, how in measured.recorded().items() if how}
    assert recorded <= table.keys(), "run python .ci/document_lengths.py"
    for name in ("bbc-headlines", "bbc, 32 words"):
        assert measured.lengths(**measured.recorded()[name]) == table[name]
