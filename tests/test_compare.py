"""From a file to a verdict: the command, what it leaves behind, and what it refuses to touch."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import WORDS
from datasets import Dataset
from huggingface_hub import ModelCard

from helpers import records, tasks
from helpers.approach import Approach
from helpers.errors import BookError
from helpers.evaluation import Predictions, evaluate
from helpers.lab import compare, own_data, predict
from helpers.lab.approaches import APPROACHES

ROOT = Path(__file__).resolve().parent.parent
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
def without_encoder(monkeypatch):
    """It needs a large model: it fails, which has to be said."""
    monkeypatch.setattr(APPROACHES["FineTunedEncoder"], "fit", lambda self, task: (_ for _ in ()).throw(BookError("not here")))


def command(file, out, tiny_model, *more):
    compare.main([str(file), "--text", "text", "--out", str(out), "--base-model", tiny_model, "--epochs", "1", *more])


def of_readme(folder, heading):
    return (folder / "README.md").read_text().partition(f"## {heading}")[2].partition("\n## ")[0]


def test_both_approaches_read_the_names_of_the_labels_unless_they_are_many_or_several(file, tiny_model, monkeypatch):
    planned = compare.plan(own_data.read(file, "text", "label"), base_model=tiny_model, of="colour", epochs=1)
    head, instruction = (planned.settings[kind] for kind in ("EmbeddingHead", "InstructionTuned"))
    assert head == instruction and head["prefix"] == "Classify the text by its colour into {labels}.\n\ntext: "
    assert head["suffix"] == "\n\nlabel:" and planned.longer > 1
    assert planned.settings["FrozenProbe"] == {"suffix": "\n\nThe colour of this text is"}
    several = compare.plan(own_data.read(file, "text", "labels"), base_model=tiny_model, of="colour", epochs=1)
    monkeypatch.setattr(compare, "NAMED", 2)
    many = compare.plan(own_data.read(file, "text", "label"), base_model=tiny_model, of="colour", epochs=1)
    for each in (several, many):
        assert each.settings["EmbeddingHead"]["suffix"] == "\n\nThe colour of this text is" and each.longer == 1
        assert (
            "prefix" not in each.settings["EmbeddingHead"] and each.settings["InstructionTuned"] == each.settings["EmbeddingHead"]
        )


def test_one_command_from_the_file_to_the_verdict_and_to_labels_for_new_texts(
    file, tiny_model, without_encoder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    command(file, out, tiny_model, "--label", "label", "--minutes", "3")
    said = capsys.readouterr()
    assert "Each document has one label: 'label' has 3 of them." in said.out and "MiniLM, fine-tuned(" not in said.out
    assert "**MiniLM, fine-tuned** could not be trained." in said.out and "BookError: not here" in said.err
    saved = {folder for name, folder in compare.FOLDERS.items() if folder != "encoder"}
    assert {"report.md", "table.csv", "labels.csv", "records.jsonl", "compared.json", *saved} == set(os.listdir(out)) - {
        "records.jsonl.lock"
    }
    report, made = (out / "report.md").read_text(), records.read(out / "records.jsonl")
    table, labels = (pd.read_csv(out / f"{name}.csv", index_col=0) for name in ("table", "labels"))
    assert len(made) == len(table) == 4 and labels["test documents"].sum() == 30

    data = compare.plan(own_data.read(file, "text", "label"), base_model=tiny_model, of="label", epochs=1, minutes=3)
    for record in made:
        # values were chosen on validation documents, the least and the greatest of them inside of what was tried
        assert len(record["tried"]) >= 3 and record["chosen"] in record["tried"]
        # report, table, card and record say the same of what is saved, and the card says how to use it
        folder = out / compare.FOLDERS[record["name"]]
        accuracy = 100 * record["metrics"]["accuracy"]
        assert table.loc[record["name"], "accuracy"] == pytest.approx(accuracy)
        assert f"| {accuracy:.1f} " in next(line for line in report.splitlines() if line.startswith(f"| {record['name']}"))
        values = {each.metric_type: each.metric_value for each in ModelCard((folder / "README.md").read_text()).data.eval_results}
        assert values == pytest.approx({"accuracy": record["metrics"]["accuracy"], "f1": record["metrics"]["macro_f1"]})
        assert f"| accuracy | {accuracy:.1f} |" in (folder / "README.md").read_text()
        for label, f1 in labels[record["name"]].items():
            row = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"| {label} "))
            assert float(row.split("|")[3]) == pytest.approx(f1, abs=0.06)
        texts = list(data.splits[0].test["text"])
        assert np.allclose(Approach.load(folder).predict_proba(texts), record["probabilities"], atol=1e-4)
        code = re.search(r"```python\n(.*?)```", of_readme(folder, "Use"), re.S)[1]
        names = {}
        exec(code, names)
        assert names["probabilities"].shape == (1, 3)

    # what the last line says works, in another folder
    monkeypatch.chdir(tmp_path)
    recommended = re.search(r"python -m helpers.predict (\S+) (\S+) --out (\S+)", said.out)
    documents(20)[["text", "who"]].to_csv("new.csv", index=False)
    predict.main(list(recommended.group(1, 2)) + ["--out", recommended[3]])
    assert list(pd.read_csv(recommended[3]).columns) == ["text", "who", "predicted", "probability"]

    # a second call makes nothing anew
    before = (out / "records.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="with other settings. Give a new folder; nothing was overwritten"):
        command(file, out, tiny_model, "--label", "label", "--minutes", "3", "--tokens", "32")
    command(file, out, tiny_model, "--label", "label", "--minutes", "3")
    assert (out / "records.jsonl").read_bytes() == before


def test_several_labels_and_groups_and_the_decision_is_saved(file, tiny_model, without_encoder, tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ("--n-test", "8", "--n-validation", "4")
    command(file, out, tiny_model, "--label", "labels", "--group", "who", "--minutes", "1", *sizes)
    said = capsys.readouterr().out
    assert "A document can have several labels" in said and "Take **" in said
    made = records.read(out / "records.jsonl")
    planned = compare.plan(own_data.read(file, "text", "labels", group="who"), "labels", tiny_model, n_test=8, n_validation=4)
    (task,) = planned.splits
    assert task.multi_label and len(task.test) == 8
    split = {name: set(getattr(task, name)["group"]) for name in tasks.SPLITS}
    assert not split["train"] & split["test"] and not split["train"] & split["validation"]
    for record, result in zip(made, compare.results(made).values(), strict=True):
        folder = out / compare.FOLDERS[record["name"]]
        rows = pd.DataFrame({"text": task.test["text"]})
        rows.to_json(tmp_path / "test.jsonl", orient="records", lines=True)
        predict.main([str(folder), str(tmp_path / "test.jsonl"), "--out", str(tmp_path / f"{folder.name}.jsonl")])
        got = [json.loads(line)["predicted"] for line in (tmp_path / f"{folder.name}.jsonl").open()]
        assert got == [";".join(np.array(task.labels)[row == 1]) for row in result.predicted]
        scores = evaluate(result)
        assert f"| macro-F1 | {100 * scores['macro_f1']:.1f} |" in (folder / "README.md").read_text()
        assert f"{100 * scores['macro_f1']:.1f}" in said


def test_more_minutes_use_more_documents_with_the_values_that_were_chosen(tiny_model, without_encoder, tmp_path):
    file = tmp_path / "many.csv"
    documents(700).to_csv(file, index=False)
    used = {}
    for minutes in (0.02, 3.0):
        plan = compare.plan(own_data.read(file, "text", "label"), "label", tiny_model, minutes=minutes, epochs=1, n_test=60)
        made = compare.run(plan, tmp_path / str(minutes), progress=False)
        used[minutes] = {record["name"]: record["key"]["options"]["n_train"] for record in made}
        (task,) = plan.splits
        assert used[minutes]["TF-IDF + linear SVM"] == len(task.train)  # always all of them
        assert all((record["minutes"] > minutes) == (used[minutes][record["name"]] < len(task.train)) for record in made)
    assert used[0.02][compare.HEAD] == compare.LEAST and used[3.0][compare.HEAD] == len(task.train)
    kept = records.read(tmp_path / "3.0" / "records.jsonl")
    searched, trained = (
        next(r for r in kept if r["name"] == "frozen embedding + probe" and ("tried" in r) == s) for s in (True, False)
    )
    assert trained["key"]["settings"]["C"] == searched["chosen"]["settings"]["C"] and trained["test_set"] == searched["test_set"]


def test_a_run_killed_at_any_point_goes_on(file, tiny_model, tmp_path):
    arguments = [str(file), "--text", "text", "--label", "label", "--base-model", tiny_model, "--epochs", "1", "--minutes", "1"]
    arguments += ["--out", str(tmp_path / "out")]
    path, seen = tmp_path / "out" / "records.jsonl", []
    for n_records in (0, 3):
        process = subprocess.Popen([sys.executable, "-m", "helpers.compare", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.time() + 300
        while process.poll() is None and time.time() < deadline:
            if (tmp_path / "out" / "compared.json").exists() and len(
                path.read_bytes().splitlines() if path.exists() else []
            ) >= n_records:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(path.read_bytes() if path.exists() else b"")
    torn = tmp_path / "out" / "head"  # and another was killed while it saved
    torn.mkdir(exist_ok=True)
    (torn / "half").write_text("torn")
    (torn / "approach.json").unlink(missing_ok=True)
    compare.main(arguments)
    assert path.read_bytes().startswith(seen[1]) and len(records.read(path)) == 5
    assert "## Verdict" in (tmp_path / "out" / "report.md").read_text() and (torn / "approach.json").exists()


@pytest.mark.parametrize("n", [3, 20, 10**6])
def test_some_documents_have_all_labels_and_test_documents_stay(n, tiny_task):
    several = [[int(label == n) for n in range(3)] for label in tiny_task.train["label"]]
    for task in (tiny_task, tasks.Task("x", tiny_task.labels, *(
        Dataset.from_dict({"text": getattr(tiny_task, split)["text"], "label": several[: len(getattr(tiny_task, split))]})
        for split in tasks.SPLITS), multi_label=True)):  # fmt: skip
        found = compare.with_fewer(task, n)
        assert len(found.train) == len(set(found.train["text"])) == min(n, len(task.train))
        assert all(found.counts()["train"].values()) and set(found.train["text"]) <= set(task.train["text"])
        assert found.test["text"][:] == task.test["text"][:] and found.validation is task.validation


def test_labels_without_test_documents_are_named(tmp_path, tiny_model):
    rows = documents(80).assign(who=lambda rows: [f"p{n % 8}" for n in range(len(rows))])
    rare = pd.DataFrame({"text": [f"a vote on {n} of the house" for n in range(40)], "label": "politics", "who": "one"})
    pd.concat([rows, rare]).to_csv(tmp_path / "grouped.csv", index=False)
    data = own_data.read(tmp_path / "grouped.csv", "text", "label", group="who")
    plan = compare.plan(data, "label", tiny_model, n_test=8, n_validation=6)
    assert "'politics' has no test document in one of the splits" in plan.data.warnings[-1]


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
        (("--label", "label", "--seeds", "0"), "seeds is 0, but it has to be more than 0"),
        (("--label", "label", "--minutes", "-1"), "minutes is -1.0, but it has to be more than 0"),
        (("--label", "label", "--tokens", "5000"), "--tokens 5000 do not fit: .* has room for"),
        (("--label", "label", "--encoding", "klingon"), "cannot be read as klingon"),
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


(SVM, ENCODER, _), HEAD, INSTRUCTION = compare.BASELINES, compare.HEAD, compare.INSTRUCTION


@pytest.mark.parametrize(
    ("wrong", "validation", "chosen"),
    [
        ({SVM: 100, HEAD: 40, INSTRUCTION: 41}, {HEAD: 30, INSTRUCTION: 31}, HEAD),  # equal: the one ahead on validation
        ({SVM: 100, HEAD: 40, INSTRUCTION: 41}, {HEAD: 31, INSTRUCTION: 30}, INSTRUCTION),
        ({SVM: 100, HEAD: 80, INSTRUCTION: 20}, {HEAD: 30, INSTRUCTION: 31}, INSTRUCTION),
        ({SVM: 100, HEAD: 99, INSTRUCTION: 98}, {HEAD: 30, INSTRUCTION: 31}, SVM),  # not shown to be better
        ({SVM: 10, HEAD: 99, INSTRUCTION: 98}, {HEAD: 30, INSTRUCTION: 31}, SVM),
    ],
)
def test_the_verdict_needs_an_interval_behind_it(wrong, validation, chosen):
    made = [record(name, n, validation_wrong=validation.get(name, 50)) for name, n in wrong.items()]
    found, text = compare.verdict(made)
    assert found == chosen and text.startswith(f"Take **{chosen}**")
    assert text.count("at 97.5 %") == 2 == text.count("accuracy ") and "**MiniLM, fine-tuned** could not be trained." in text


def test_the_finalists_are_chosen_on_validation():
    made = [
        record(SVM, 100, validation_wrong=90),
        record(ENCODER, 10, validation_wrong=100),  # better on test, but nobody may look there first
        record(HEAD, 41, validation_wrong=20),
        record(INSTRUCTION, 40, validation_wrong=30),
    ]
    found, text = compare.verdict(made)
    assert found == HEAD and f"{HEAD} against {SVM}" in text and f"against {ENCODER}" not in text


def test_without_an_approach_nothing_is_claimed():
    found, text = compare.verdict([record(SVM, 10)])
    assert found == SVM and text.count("could not be trained") == 4 and "better" not in text


def test_a_lead_on_rare_labels_is_seen():
    gold = np.repeat([0, 1], [90, 10])
    said = {"majority": np.zeros(100, int), "rare": np.repeat([0, 1, 1], [85, 5, 10])}
    made = {name: Predictions(name, ("often", "rare"), np.eye(2)[each], gold) for name, each in said.items()}
    table = compare.of_labels(made)
    assert table.index.tolist() == ["rare", "often"] and table["test documents"].tolist() == [10, 90]
    assert table["majority"].round(1).tolist() == [0.0, 94.7] and table["rare"].round(1).tolist() == [80.0, 97.1]


def test_multi_label_thresholds_come_from_validation():
    said = {"gold": [[1, 0], [0, 1]] * 20, "probabilities": [[0.3, 0.1], [0.1, 0.3]] * 20}
    made = {**record(HEAD, 0), **said, "validation": said}
    (result,) = compare.results([made]).values()
    assert isinstance(result, Predictions) and result.correct.all() and 0.1 < result.thresholds < 0.3


def test_every_seed_has_a_split_of_its_own(file, tiny_model):
    plan = compare.plan(own_data.read(file, "text", "label"), "label", tiny_model, 2, n_validation=9, n_test=12)
    first, second = plan.splits
    assert {name: len(getattr(first, name)) for name in tasks.SPLITS} == {"train": 69, "validation": 9, "test": 12}
    assert set(first.test["text"]) != set(second.test["text"])
    keys = [plan.key("TfidfSvm", seed, 20, 3, None) for seed in (0, 1)]
    assert keys[0]["task"] != keys[1]["task"] and [key["options"]["n_train"] for key in keys] == [20, 20]


def test_documents_are_cut_by_the_base_model_that_is_compared(file, tiny_model):
    plan = compare.plan(own_data.read(file, "text", "label"), "label", tiny_model, tokens=3)
    cut = tasks.first_tokens(compare.base_models.load_tokenizer(tiny_model), 3)
    assert all(cut(text) == text for task in plan.splits for text in task.train["text"])
    assert {plan.key(kind, 0, 20, 3, None)["settings"].get("base_model") for kind in compare.METHODS} >= {tiny_model}


def test_a_base_that_is_not_built_like_llama_has_all_its_layers_trained(file, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = compare.base_models.load_tokenizer()
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    plan = compare.plan(own_data.read(file, "text", "label"), "label", str(tmp_path / "gpt2"))
    assert plan.settings["EmbeddingHead"]["n_layers"] is None


def test_an_unknown_size_is_refused(file):
    with pytest.raises(BookError, match="size 'n_tests'. Did you mean 'n_test'"):
        compare.plan(own_data.read(file, "text", "label"), n_tests=3)


def test_help_and_pages_agree(capsys):
    pages = [(ROOT / "book" / "11_your_own_data.ipynb").read_text(), (ROOT / "README.md").read_text()]
    pages += [path.read_text() for path in (ROOT / "helpers" / "lab").glob("*_examples.txt")]
    for name, command in {"compare": compare.main, "predict": predict.main}.items():
        with pytest.raises(SystemExit, match="0"):
            command(["--help"])
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        lines = [line for page in pages for line in re.findall(rf"python -m helpers\.{name} ([^\n\"`|]*)", page)]
        assert len(lines) >= 4 and all(set(re.findall(r"--[a-z][a-z-]*", line)) <= known for line in lines), lines


def test_the_command_has_a_door_of_its_old_name(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("helpers.compare", run_name="__main__")
    assert "python -m helpers.compare" in capsys.readouterr().out
