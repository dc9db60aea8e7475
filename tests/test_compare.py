"""From a file to a verdict: the command, what it leaves behind, and what it refuses to touch."""

import os
import runpy

import numpy as np
import pandas as pd
import pytest
from conftest import WORDS
from huggingface_hub import ModelCard

from helpers import corpora, records, tasks
from helpers.errors import BookError
from helpers.evaluation import Predictions
from helpers.lab import compare, own_data, sweeps
from helpers.lab.approaches import APPROACHES

FLAT = {word: label for label, words in WORDS.items() for word in words}


def documents(n=90):
    """One of three labels each, told by a word; every sixth has a second label; written by one of twenty people."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(n):
        word, other = generator.choice(list(FLAT), 2, replace=False)
        text = f"the {word} of number {number} and nothing else in {generator.integers(1000)}"
        labels = sorted({FLAT[word], FLAT[other]} if number % 6 == 0 else {FLAT[word]})
        rows.append({"text": text, "label": FLAT[word], "labels": ";".join(labels), "who": f"p{number % 20}"})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "notes.csv"
    documents().to_csv(path, index=False)
    return path


@pytest.fixture
def without_two_baselines(monkeypatch):
    """Those that need a large model: they fail, which has to be said."""
    for name in ("FrozenProbe", "FineTunedEncoder"):
        monkeypatch.setattr(APPROACHES[name], "fit", lambda self, task: (_ for _ in ()).throw(BookError("not here")))


def sources_of(file, *columns, **options):
    """The documents of the file as the command reads them."""
    return compare.sources_of(own_data.cut(own_data.read(file, "text", *columns, **options), None))


def command(file, out, tiny_model, *more):
    compare.main([str(file), "--text", "text", "--out", str(out), "--base-model", tiny_model, "--epochs", "1", *more])


def test_one_command_from_the_file_to_the_verdict_and_again(file, tiny_model, without_two_baselines, tmp_path, capsys):
    out = tmp_path / "out"
    command(file, out, tiny_model, "--label", "label")
    said = capsys.readouterr().out
    assert "Each document has one label: 'label' has 3 of them." in said
    assert "Take **" in said and "FrozenProbe" not in said and "**frozen embedding + probe** could not be run." in said
    assert {"report.md", "table.csv", "records.jsonl", "compared.json", "head", "instruction"} <= set(os.listdir(out))
    report = (out / "report.md").read_text()
    assert "## Verdict" in report and "1 split(s), 30 test documents each" in report
    made, sources = records.read(out / "records.jsonl"), sources_of(file, "label")
    assert len(made) == 4 and {record["name"] for record in made} >= set(compare.TRAINED)

    # the table is that of the records, and the adapter is the one that was tested
    table = pd.read_csv(out / "table.csv", index_col=0)
    for record in made:
        assert table.loc[record["name"], "accuracy"] == pytest.approx(100 * record["metrics"]["accuracy"])
        if record["name"] in compare.TRAINED:
            folder = out / compare.TRAINED[record["name"]]
            task = sweeps.load_task(record["key"], sources)
            again = APPROACHES[record["key"]["approach"]].load(folder).predict(task.test)
            assert np.allclose(again.probabilities, record["probabilities"], atol=1e-4)
            card = (folder / "README.md").read_text()
            values = {each.metric_type: each.metric_value for each in ModelCard(card).data.eval_results}
            assert values == {"accuracy": record["metrics"]["accuracy"], "f1": record["metrics"]["macro_f1"]}
            assert f"| accuracy | {100 * record['metrics']['accuracy']:.1f} |" in card and "`sports`" in card
            assert f'Approach.load("{compare.TRAINED[record["name"]]}")' in card and ".predict_proba([" in card

    # a second call makes nothing anew
    before = (out / "records.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="with other settings. Give a new folder; nothing was overwritten"):
        command(file, out, tiny_model, "--label", "label", "--tokens", "32")
    command(file, out, tiny_model, "--label", "label")
    assert (out / "records.jsonl").read_bytes() == before


def test_several_labels_and_groups(file, tiny_model, without_two_baselines, tmp_path, capsys):
    out = tmp_path / "out"
    command(file, out, tiny_model, "--label", "labels", "--group", "who", "--n-test", "8", "--n-validation", "4")
    said = capsys.readouterr().out
    assert "A document can have several labels" in said and "Take **" in said
    record = records.read(out / "records.jsonl")[-1]
    task = sweeps.load_task(record["key"], sources_of(file, "labels", group="who"))
    assert task.multi_label and len(task.test) == 8
    split = {name: set(getattr(task, name)["group"]) for name in tasks.SPLITS}
    assert not split["train"] & split["test"] and not split["train"] & split["validation"]
    assert 0 < float(np.max(compare.results([record])[record["name"]].thresholds)) < 1


def test_check_only_looks(file, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    command(file, out, tiny_model, "--label", "label", "--check")
    assert "rarest label" in capsys.readouterr().out and not out.exists()


def test_help_has_examples_that_parse(capsys):
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--help"])
    said = capsys.readouterr().out
    assert said.count("python -m helpers.compare ") >= 5 and "--multi-label, --no-multi-label" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--label", "lable"), "There is no column 'lable'. Did you mean 'label'?"),
        (("--label", "label", "--seeds", "0"), "seeds is 0, but it has to be 1 or more"),
        (("--label", "label", "--n-test", "500"), "do not fit"),
        (("--label", "label", "--base-model", "SmolLM3"), "There is no base model 'SmolLM3'. Did you mean"),
    ],
)
def test_refused_in_one_line_before_anything_is_written(file, tiny_model, tmp_path, arguments, said):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=said) as caught:
        command(file, out, tiny_model, *arguments)
    assert "\n" not in str(caught.value) and not out.exists()


def test_nothing_is_overwritten(file, tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds something else, .* Give a new folder; nothing was overwritten"):
        command(file, out, tiny_model, "--label", "label")
    assert os.listdir(out) == ["thesis.txt"]

    (out / "thesis.txt").rename(out / "compared.json")
    (out / "compared.json").write_text('{"file": "others.csv", "task": "others.csv 1234"}')
    with pytest.raises(SystemExit, match="or a comparison of other documents or"):
        command(file, out, tiny_model, "--label", "label")
    assert os.listdir(out) == ["compared.json"]


def record(name, wrong, n=400, seconds=1.0, seed=0, validation_wrong=None):
    """A record of an approach that gets the first documents wrong."""
    gold = np.arange(n) % 2

    def said_with(wrong):
        predicted = np.where(np.arange(n) < wrong, 1 - gold, gold)
        return {"gold": gold.tolist(), "probabilities": np.eye(2)[predicted].tolist()}

    said, validation = said_with(wrong), said_with(wrong if validation_wrong is None else validation_wrong)
    cost = {"seconds": seconds, "training_seconds": 1, "trainable_parameters": 1, "tokens": 1, "peak_memory": 1}
    key = {"approach": "Majority", "settings": {"name": name}, "task": "t", "options": {}, "seed": seed}
    more = {"labels": ["a", "b"], "test_set": f"s{seed}", "groups": None, "cost": cost, "validation": validation}
    return {"key": key, "name": name, **more, **said}


(SVM, _, ENCODER), HEAD, INSTRUCTION = compare.BASELINES, compare.HEAD, compare.INSTRUCTION


@pytest.mark.parametrize(
    ("wrong", "seconds", "chosen"),
    [
        ({SVM: 100, HEAD: 40, INSTRUCTION: 41}, {HEAD: 1, INSTRUCTION: 2}, HEAD),  # equal: the faster one
        ({SVM: 100, HEAD: 40, INSTRUCTION: 41}, {HEAD: 2, INSTRUCTION: 1}, INSTRUCTION),
        ({SVM: 100, HEAD: 80, INSTRUCTION: 20}, {HEAD: 1, INSTRUCTION: 2}, INSTRUCTION),
        ({SVM: 100, HEAD: 99, INSTRUCTION: 98}, {HEAD: 1, INSTRUCTION: 2}, SVM),  # not shown to be better
        ({SVM: 10, HEAD: 99, INSTRUCTION: 98}, {HEAD: 1, INSTRUCTION: 2}, SVM),
    ],
)
def test_the_verdict_needs_an_interval_behind_it(wrong, seconds, chosen):
    made = [record(name, n, seconds=seconds.get(name, 0.1)) for name, n in wrong.items()]
    found, text = compare.verdict(made)
    assert found == chosen and f"Take **{chosen}**" in text
    assert text.count("at 97.5 %") == 2 and "**MiniLM, fine-tuned** could not be run." in text


def test_the_finalists_are_chosen_on_validation_and_a_small_lead_in_speed_does_not_count():
    made = [
        record(SVM, 100, validation_wrong=90),
        record(ENCODER, 10, validation_wrong=100),  # better on test, but nobody may look there first
        record(HEAD, 41, seconds=1.0, validation_wrong=20),
        record(INSTRUCTION, 40, seconds=0.9, validation_wrong=30),
    ]
    found, text = compare.verdict(made)
    assert found == HEAD and f"{HEAD} against {SVM}" in text and f"against {ENCODER}" not in text


def test_without_an_approach_nothing_is_claimed():
    found, text = compare.verdict([record(SVM, 10)])
    assert found == SVM and text.count("could not be run") == 4 and "better" not in text


def test_multi_label_thresholds_come_from_validation():
    said = {"gold": [[1, 0], [0, 1]] * 20, "probabilities": [[0.3, 0.1], [0.1, 0.3]] * 20}
    made = {**record(HEAD, 0), **said, "validation": said}
    (result,) = compare.results([made]).values()
    assert isinstance(result, Predictions) and result.correct.all() and 0.1 < result.thresholds < 0.3


def test_own_documents_are_cut_before_the_split(file, tiny_model):
    data = own_data.read(file, "text", "label")
    data, keys = compare.plan(data, n_train=20, n_validation=9, n_test=12, seeds=2, base_model=tiny_model)
    assert len(data.documents) == 41 and [key["seed"] for key in keys] == [0] * 6 + [1] * 6
    assert keys[0]["task"] not in corpora.TASKS  # the book's own tasks are not touched
    task = sweeps.load_task(keys[0], compare.sources_of(data))
    assert {name: len(getattr(task, name)) for name in tasks.SPLITS} == {"train": 20, "validation": 9, "test": 12}


@pytest.mark.parametrize("base_model", [None, "tiny"])
def test_documents_are_cut_by_the_base_model_that_is_compared(file, tiny_model, base_model):
    options = {} if base_model is None else {"base_model": tiny_model}
    _, keys = compare.plan(own_data.read(file, "text", "label"), **options)
    assert {key["options"].get("tokenizer") for key in keys} == {options.get("base_model")}
    assert {key["settings"].get("base_model") for key in keys} >= set(options.values())


def test_an_unknown_size_is_refused(file):
    with pytest.raises(BookError, match="size 'n_tests'. Did you mean 'n_test'"):
        compare.plan(own_data.read(file, "text", "label"), n_tests=3)


def test_the_command_has_a_door_of_its_old_name(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("helpers.compare", run_name="__main__")
    assert "python -m helpers.compare" in capsys.readouterr().out
