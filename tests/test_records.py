"""Reading records: damaged files, old records with today's names and settings, predictions and tables."""

import ast
import inspect
import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

from helpers import records
from helpers.errors import BookError
from helpers.lab.approaches import APPROACHES

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results"


def fake(number):
    return {"key": {"seed": number}, "filler": "x" * 100}


@pytest.fixture
def record():
    return {
        "key": {
            "approach": "TfidfSvm",
            "settings": {"name": "SVM", "C": 0.5},
            "task": "bbc",
            "options": {"per_class": 4, "words": 16},
            "seed": 3,
            "profile": "quick",
        },
        "name": "SVM",
        "labels": ["a", "b"],
        "gold": [0, 1],
        "probabilities": [[0.9, 0.1], [0.2, 0.8]],
        "groups": ["x", "y"],
        "test_set": "0a",
        "metrics": {"accuracy": 1.0},
        "cost": {"seconds": 2.0, "training_seconds": 1.0, "trainable_parameters": 5, "tokens": 0, "peak_memory": None},
    }


def written(path, *made):
    path.write_text("".join(json.dumps(each) + "\n" for each in made), encoding="utf-8")
    return path


def test_no_file_is_no_records(tmp_path):
    assert records.read(tmp_path / "none.jsonl") == []


def test_a_benchmark_is_read_too():
    path = RESULTS.parent / "benchmarks" / "one_gpu.jsonl"
    assert records.read(path) == [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("line", ['{"key": ', "3", "[]", "{}", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    whole = json.dumps(fake(1))
    (tmp_path / "torn.jsonl").write_text(f"{line}\n{whole}\n")
    with pytest.raises(BookError, match="torn.jsonl, line 1 is no record") as caught:
        records.read(tmp_path / "torn.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("end", "n", "words"), [("\n", 2, ""), ("", 2, ""), ("torn", 1, "the last line is torn")])
def test_a_last_line_counts_if_it_is_whole(tmp_path, capsys, end, n, words):
    text = f"{json.dumps(fake(1))}\n{json.dumps(fake(2))}"
    (tmp_path / "last.jsonl").write_text(text[:-20] if end == "torn" else text + end)
    assert records.read(tmp_path / "last.jsonl") == [fake(1), fake(2)][:n]
    assert words in capsys.readouterr().err


def test_two_records_of_one_run_are_refused(tmp_path, record):
    old = json.loads(json.dumps(record))
    record["key"]["settings"]["C"] = 1.0
    del old["key"]["settings"]["C"]  # the same run, from before the setting
    with pytest.raises(BookError, match="line 2 records the same run as line 1"):
        records.read(written(tmp_path / "twice.jsonl", old, record))


def test_a_record_from_before_a_setting_counts_with_the_default_that_it_was_introduced_with(tmp_path, record, monkeypatch):
    del record["key"]["settings"]["C"]
    path = written(tmp_path / "older.jsonl", record)
    assert records.read(path)[0]["key"]["settings"] == {"C": 1.0, "analyzer": "word", "name": "SVM"}
    monkeypatch.setattr(APPROACHES["TfidfSvm"].__init__, "__defaults__", (3.0, "char_wb", "another name"))  # today's defaults
    assert asdict(APPROACHES["TfidfSvm"]())["C"] == 3.0
    assert records.read(path)[0]["key"]["settings"] == {"C": 1.0, "analyzer": "word", "name": "SVM"}


def test_defaults_are_not_shared_between_records(tmp_path, record):
    record["key"] |= {"approach": "EmbeddingHead", "settings": {}}
    path = written(tmp_path / "older.jsonl", record)
    records.read(path)[0]["key"]["settings"]["lora"]["use_dora"] = True
    assert records.read(path)[0]["key"]["settings"]["lora"] == {}


def test_every_setting_that_a_record_lacks_has_the_default_of_its_introduction():
    lacking = set()
    for path in RESULTS.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            key = json.loads(line)["key"]
            if key["approach"] == "FullFineTuning":  # a class of chapter 03
                continue
            given = {field.name for field in fields(APPROACHES[key["approach"]])} - set(key["settings"])
            lacking |= {(key["approach"], name) for name in given}
    assert ("InstructionTuned", "prompt_loss_weight") in lacking
    assert not {(approach, name) for approach, name in lacking if name not in records.DEFAULTS[approach]}


@pytest.mark.parametrize("approach", APPROACHES)
def test_every_setting_has_a_line_and_no_line_is_of_another_setting(approach):
    settings = {records.RENAMED.get(f"{approach}.{name}", name) for name in records.DEFAULTS[approach]}
    assert settings - {None} == {field.name for field in fields(APPROACHES[approach])}


def test_renamed_approaches_and_settings_are_read_by_their_new_names(tmp_path, record, monkeypatch):
    path = written(tmp_path / "old.jsonl", record)
    monkeypatch.setattr(records, "RENAMED", {"TfidfSvm": "WordCounts", "TfidfSvm.C": "strength", "TfidfSvm.name": None})
    key = records.read(path)[0]["key"]
    assert (key["approach"], key["settings"]) == ("WordCounts", {"strength": 0.5, "analyzer": "word"}) and key["seed"] == 3


def test_records_are_read_without_the_lab_or_any_approach():
    tree = ast.parse(inspect.getsource(records))
    names = {alias.name for each in ast.walk(tree) if isinstance(each, ast.Import) for alias in each.names}
    names |= {each.module for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)}
    assert {name for name in names if name.startswith("helpers")} == {"helpers.errors", "helpers.evaluation"}


def test_rounded_probabilities_of_many_labels_are_probabilities(record):
    n = 20_000
    many = {"labels": [f"label {i}" for i in range(n)], "gold": [0], "groups": None}
    many["probabilities"] = [[0.5] + [0.00004] * (n - 1)]
    assert records.predictions_of(record | many).probabilities.sum() == pytest.approx(1)


def test_predictions_of_a_record(record):
    found = records.predictions_of(record)
    assert (found.approach, found.labels, found.test_set, found.seconds) == ("SVM", ("a", "b"), "0a", 2.0)
    assert found.groups.tolist() == ["x", "y"] and np.allclose(found.probabilities, record["probabilities"])


def test_predictions_on_validation_are_there_or_the_run_that_lacks_them_is_named(record):
    with pytest.raises(BookError, match=r"^bbc\(per_class=4, words=16\) TfidfSvm\(name=SVM, C=0.5\) seed 3: nothing") as caught:
        records.validation_of(record)
    assert "\n" not in str(caught.value)
    validation = {"gold": [1], "probabilities": [[0.3, 0.7]]}
    found = records.validation_of(record | {"validation": validation})
    assert found.gold.tolist() == [1] and found.groups is None and found.test_set == ""


@pytest.mark.parametrize(
    ("options", "task"),
    [
        ({"words": 16}, "bbc, 16 words"),
        ({"tokens": 64}, "bbc, 64 tokens"),
        ({"tokens": 64, "tokenizer": "Qwen"}, "bbc, 64 tokens of Qwen"),
        ({}, "bbc"),
    ],
)
def test_records_as_a_table(record, options, task):
    record["key"]["options"] = options
    adapter = json.loads(json.dumps(record))
    adapter["key"]["settings"]["rank"] = 8
    table = records.frame([record, adapter])
    assert table["task"].tolist() == [task, task] and table["approach"].tolist() == ["SVM", "SVM"]
    assert np.isnan(table["rank"][0]) and table["rank"][1] == 8
    assert table[["accuracy", "seconds", "seed"]].values.tolist() == [[1.0, 2.0, 3]] * 2 and table["record"][0] is record


@pytest.mark.parametrize("shape", [(3, 5), (1, 66), (4, 2)])
def test_a_packed_record_comes_back_as_it_was(shape):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(shape[1]), shape[0]).round(5)
    probabilities[0] = np.eye(shape[1])[0]
    part = {"gold": [0] * shape[0], "probabilities": probabilities.tolist()}
    whole = {
        **part,
        "groups": ["00ab34cd", "ffffffff", "00000000", "1" * 8][: shape[0]],
        "validation": part,
        "key": {"seed": 1},
    }
    packed = json.dumps(records.pack(whole))
    assert records.unpack(json.loads(packed)) == whole and len(packed) < len(json.dumps(whole))
    assert records.unpack(whole) == whole  # of the time before they were packed


def test_the_books_records_are_packed_and_small():
    paths = [path for path in RESULTS.iterdir() if path.suffix == ".jsonl"]
    assert sum(path.stat().st_size for path in paths) < 15e6
    assert not [path.name for path in paths if '"probabilities": [' in path.read_text(encoding="utf-8")]
