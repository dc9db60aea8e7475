"""What the code gave before helpers/ was rearranged, so that rearranging it changes no number and no old record.

The golden values are the records in book/results, golden.json beside this file, and the adapters in first_edition/. The latter
two were made by `python tests/test_golden.py --write`; do not write them anew to make a test pass. Values of trained models
hold for the library versions under "made_with" in golden.json.
"""

import functools
import hashlib
import inspect
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import conftest
import numpy as np
import pytest
from datasets import Dataset

# The imports from helpers/, under the names used below: this block alone may change, everything else stays as it is.
from helpers.lab.approaches import APPROACHES
from helpers.lab.sweeps import groups_of, keys, load_sweep, load_task, missing, provenance
from helpers.lab.sweeps import test_set as fingerprint_of_test
from helpers.records import read
from helpers.tasks import Task

# (end of the imports from helpers/)

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden.json"
FIRST_EDITION = HERE / "first_edition"
SWEEPS = sorted(json.loads(GOLDEN.read_text(encoding="utf-8"))["counts"])  # of the first edition

# Approach, its settings and the task of each run of a tiny model.
TINY_RUNS = {
    "head": ("EmbeddingHead", {}, "single"),
    "head from random numbers": ("EmbeddingHead", {"probe_init": False}, "single"),
    "head of all layers": ("EmbeddingHead", {"n_layers": None}, "single"),
    "head, not causal": ("EmbeddingHead", {"causal": False}, "single"),
    "head, other suffix, seed and batches": ("EmbeddingHead", {"suffix": " is about", "seed": 3, "batch_size": 5}, "single"),
    "head, rank-stabilized": ("EmbeddingHead", {"lora": {"use_rslora": True}}, "single"),
    "head, several labels": ("EmbeddingHead", {}, "multi"),
    "head from random numbers, several labels": ("EmbeddingHead", {"probe_init": False}, "multi"),
    "instruction": ("InstructionTuned", {}, "single"),
    "instruction, all layers": ("InstructionTuned", {"n_layers": None}, "single"),
    "instruction, chat": (
        "InstructionTuned",
        {"chat": True, "prefix": "One of {labels}. Which?\n\n", "suffix": ""},
        "single",
    ),
    "instruction, shots without training": ("InstructionTuned", {"shots": 1, "epochs": 0}, "single"),
    "instruction, as it comes": ("InstructionTuned", {"epochs": 0}, "single"),
    "instruction, loss over the prompt": ("InstructionTuned", {"prompt_loss_weight": 0.1}, "single"),
    "instruction, verbalizer": (
        "InstructionTuned",
        {"verbalizer": {"sports": "games", "money": "wealth", "tech": "machines"}},
        "single",
    ),
    "instruction, rank-stabilized": ("InstructionTuned", {"lora": {"use_rslora": True}}, "single"),
    "instruction, other seed and batches": ("InstructionTuned", {"seed": 3, "batch_size": 5}, "single"),
    "instruction, list of labels": ("InstructionTuned", {}, "multi"),
    "instruction, list, frequent first": ("InstructionTuned", {"order": "frequent"}, "multi"),
    "instruction, list, rare first": ("InstructionTuned", {"order": "rare"}, "multi"),
    "instruction, list, random order": ("InstructionTuned", {"order": "random"}, "multi"),
    "instruction, list in a chat": ("InstructionTuned", {"chat": True}, "multi"),
    "instruction, questions": ("InstructionTuned", {"ask": "questions"}, "multi"),
    "probe of the last token": ("FrozenProbe", {"pooling": "last"}, "single"),
    "probe of the mean": ("FrozenProbe", {"pooling": "mean"}, "single"),
    "probe of the maximum": ("FrozenProbe", {"pooling": "max"}, "single"),
    "probe with attention": ("FrozenProbe", {"pooling": "attention"}, "single"),
    "probe of one layer": ("FrozenProbe", {"layer": 1}, "single"),
    "probe, not causal": ("FrozenProbe", {"causal": False}, "single"),
    "probe, several labels": ("FrozenProbe", {}, "multi"),
    "probe with attention, several labels": ("FrozenProbe", {"pooling": "attention"}, "multi"),
}
# Where a run says nothing else: two epochs, on the upper of two layers, at rates that change what the tiny model says.
TRAINED = {
    "EmbeddingHead": dict(n_layers=1, rank=4, learning_rate=1e-2, epochs=2, batch_size=4),
    "InstructionTuned": dict(n_layers=1, rank=4, learning_rate=2e-2, epochs=2, batch_size=4),
    "FrozenProbe": {},
}
# scikit-learn ends its search for these probes a step earlier or later, as rounding has it: 2e-4 between one thread and two.
LESS_EXACT = ("head, several labels", "probe, several labels", "probe with attention, several labels", "probe of the mean")
SAVED = {"head": "EmbeddingHead", "instruction": "InstructionTuned"}  # folders of first_edition/
BASE_OF_SAVED = "folder-of-the-tiny-model"  # stands in them for the base model's folder
RERUN_SEEDS = {  # which recorded runs of TF-IDF are made again, in these files
    "side_by_side": {"bbc": 0, "bbc-headlines": 1, "ipc-sections": 2, "attack-techniques": 0},
    "multi_label": {"attack-tactics": 2},
    "distillation": {"bbc": 1},
}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOOK_PROFILE", "quick")
        yield


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny_tasks(tiny_task):
    return {"single": tiny_task, "multi": multi_label_task()}


@pytest.fixture(scope="module")
def smaller_model(tmp_path_factory):
    return conftest.save_tiny(tmp_path_factory.mktemp("smaller") / "tiny", hidden_size=16)


def multi_label_task():
    """Labels of different frequency, and documents without any."""
    words, labels = list(conftest.WORDS.values()), ([1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0])

    def documents(rows):
        texts = [
            f"{row} notes on " + (" and the ".join(one[row] for one, on in zip(words, label, strict=True) if on) or "nothing")
            for row in rows
            for label in labels
        ]
        return Dataset.from_dict({"text": texts, "label": [label for _ in rows for label in labels]})

    splits = dict(train=documents(range(3)), validation=documents([3]), test=documents([4, 5]))
    return Task("tiny, several labels", tuple(conftest.WORDS), **splits, multi_label=True)


@functools.cache
def records_of(sweep):
    return read(conftest.BOOK / "results" / f"{sweep}.jsonl")


@functools.cache
def task_named(name):
    return load_task(json.loads(name))


def task_of(record):
    """The task of a record as the code reads it now, each read once."""
    return task_named(json.dumps({name: record["key"][name] for name in ("task", "options", "seed")}, sort_keys=True))


def counts_of(sweep):
    path = conftest.BOOK / "results" / f"{sweep}.yaml"
    return {"records": len(records_of(sweep)), "keys": len(keys(load_sweep(path))), "missing": len(missing(path))}


def defaults_now():
    return {name: asdict(approach()) for name, approach in APPROACHES.items()}


def hash_of_keys(sweep, defaults):
    """sha256 of all keys of a file after reading, of their settings those that `defaults` has: there may be new ones."""
    found = []
    for record in records_of(sweep):
        key = record["key"]
        known = {name: value for name, value in key["settings"].items() if name in defaults[key["approach"]]}
        found.append(json.dumps({**key, "settings": known}, sort_keys=True))
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def tiny_run(name, base_model, tasks):
    """What a tiny model says about the test documents, shape (n_documents, n_labels)."""
    approach, settings, task = TINY_RUNS[name]
    made = APPROACHES[approach](base_model=base_model, **TRAINED[approach] | settings)
    return made.fit(tasks[task]).predict(tasks[task].test).probabilities


def loaded(name, base_model, folder):
    """The adapter in first_edition/`name`, loaded from a copy in `folder` with the base model's tokenizer beside it."""
    shutil.copytree(FIRST_EDITION / name, folder)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(BASE_OF_SAVED, base_model), encoding="utf-8")
    for path in Path(base_model).iterdir():
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, folder)
    return APPROACHES[SAVED[name]].load(folder)


def test_every_recorded_task_still_has_the_same_documents():
    assert len({id(task_of(record)) for sweep in [*SWEEPS, "fair"] for record in records_of(sweep)}) >= 31
    wrong = []
    for record in (record for sweep in [*SWEEPS, "fair"] for record in records_of(sweep)):
        task = task_of(record)
        if task.content_hash() != record["content_hash"] or list(task.labels) != record["labels"]:
            wrong.append(record["key"])
    assert wrong == []


def test_test_sets_and_groups_still_have_their_fingerprints():
    wrong = []
    for record in (record for sweep in SWEEPS for record in records_of(sweep)):
        task = task_of(record)
        now = {"test_set": fingerprint_of_test(task), "groups": list(groups_of(task)), "gold": list(task.test["label"])}
        wrong += [(record["key"], name) for name, value in now.items() if record[name] != value]
    assert wrong == []


def test_sweeps_ask_for_as_many_runs_and_files_hold_as_many_records(golden):
    assert {sweep: counts_of(sweep) for sweep in SWEEPS} == golden["counts"]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_reading_old_records_gives_them_the_settings_they_had(golden, sweep):
    assert hash_of_keys(sweep, golden["defaults"]) == golden["keys_sha256"][sweep]


def test_defaults_are_what_they_were(golden):
    now = defaults_now()
    for name, settings in golden["defaults"].items():
        assert {setting: value for setting, value in now[name].items() if setting in settings} == settings, name


def rerun(record):
    key, task = record["key"], task_of(record)
    return APPROACHES[key["approach"]](**key["settings"]).fit(task).predict(task.test).probabilities


def test_majority_says_what_was_recorded():
    records = [record for sweep in SWEEPS for record in records_of(sweep) if record["key"]["approach"] == "Majority"]
    assert len(records) >= 18
    for record in records:
        assert rerun(record) == pytest.approx(np.array(record["probabilities"]), abs=1e-5), record["key"]


def test_tfidf_says_what_was_recorded():
    n_rerun = 0
    for sweep, seeds in RERUN_SEEDS.items():
        for record in records_of(sweep):
            key = record["key"]
            if key["approach"] in ("TfidfSvm", "DistilledTfidf") and seeds.get(key["task"]) == key["seed"]:
                assert rerun(record) == pytest.approx(np.array(record["probabilities"]), abs=1e-5), key
                n_rerun += 1
    assert n_rerun >= 6


@pytest.mark.parametrize("name", TINY_RUNS)
def test_a_tiny_model_says_what_it_said(golden, tiny_model, tiny_tasks, name):
    within = 1e-3 if name in LESS_EXACT else 1e-4
    assert tiny_run(name, tiny_model, tiny_tasks) == pytest.approx(np.array(golden["tiny"][name]), abs=within)


def test_golden_values_differ_from_uniform_and_from_each_other(golden):
    tiny = {name: np.array(values) for name, values in golden["tiny"].items()}
    for name, values in tiny.items():
        assert np.ptp(values, axis=0).max() > 0.05, name  # documents differ
        for other, others in tiny.items():
            assert name == other or values.shape != others.shape or np.abs(values - others).max() > 5e-3, (name, other)


@pytest.mark.parametrize("name", SAVED)
def test_an_adapter_saved_by_the_first_edition_is_still_read(golden, smaller_model, tiny_task, tmp_path, name):
    approach = loaded(name, smaller_model, tmp_path / "copy")
    assert approach.labels == tiny_task.labels and not approach.multi_label
    said = approach.predict(tiny_task.test).probabilities
    assert said == pytest.approx(np.array(golden["first_edition"][name]), abs=1e-4)


def write():
    """Make golden.json and first_edition/ with the code as it is."""
    tiny_task = inspect.unwrap(conftest.tiny_task)()  # the function below the fixture
    tasks = {"single": tiny_task, "multi": multi_label_task()}
    defaults = defaults_now()
    golden = {
        "made_with": provenance(),
        "counts": {sweep: counts_of(sweep) for sweep in SWEEPS},
        "defaults": defaults,
        "keys_sha256": {sweep: hash_of_keys(sweep, defaults) for sweep in SWEEPS},
        "first_edition": {},
        "tiny": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        base_model = conftest.save_tiny(Path(scratch) / "tiny")
        for name in TINY_RUNS:
            golden["tiny"][name] = tiny_run(name, base_model, tasks).astype(float).round(6).tolist()
        base_model = conftest.save_tiny(Path(scratch) / "smaller", hidden_size=16)
        for name, approach in SAVED.items():
            made = APPROACHES[approach](base_model=base_model, **TRAINED[approach] | {"rank": 2}).fit(tiny_task)
            golden["first_edition"][name] = made.predict(tiny_task.test).probabilities.astype(float).round(6).tolist()
            saved = made.save(Path(scratch) / name)
            (FIRST_EDITION / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(saved / "adapter_model.safetensors", FIRST_EDITION / name)
            for file in ("adapter_config.json", "approach.json"):
                text = (saved / file).read_text(encoding="utf-8").replace(base_model, BASE_OF_SAVED)
                (FIRST_EDITION / name / file).write_text(text, encoding="utf-8")
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_golden.py --write makes the golden values anew; pytest checks them.")
    write()
