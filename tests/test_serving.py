"""Exported classifiers give the same probabilities; training on two processes gives the same losses as on one."""

import csv
import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig
from conftest import BOOK
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpers import base_models, tasks
from helpers.embedding_head import EmbeddingHead

SCRIPTS = BOOK / "scripts"
TEXTS = ["the goal and one trophy again", "a bank", "the robot and one chip " * 20, "stock"]
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_task):
    return EmbeddingHead(tiny_model, n_layers=None, rank=4, epochs=4, learning_rate=1e-2).fit(tiny_task)


@pytest.fixture(scope="module")
def export():
    """The functions of chapter 10's cell that exports; what the cell does with them is left out."""
    cells = nbformat.read(BOOK / "10_distil_and_serve.ipynb", 4).cells
    [code] = [cell.source for cell in cells if "export" in cell.metadata.get("tags", [])]
    imports = "import json, logging, torch, warnings\nfrom onnxruntime.quantization import QuantType, quantize_dynamic\n"
    names = {}
    exec(imports + code[: code.index("\n\n\nlogging.disable")], names)
    return SimpleNamespace(to_onnx=names["to_onnx"], to_int8=names["to_int8"])


@pytest.fixture(scope="module")
def exported(export, trained, tmp_path_factory):
    merged, folder = trained.model.merge_and_unload(), tmp_path_factory.mktemp("exported")
    full, int8 = folder / "full", folder / "int8"
    export.to_onnx(merged, trained.tokenizer, trained.labels, full, trained.suffix)
    export.to_int8(full, int8)
    return merged, full, int8


def expected(model, approach, texts):
    batch = approach.tokenizer([text + approach.suffix for text in texts], padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits.softmax(-1).numpy()


def scorer(folder):
    sys.path.insert(0, str(SCRIPTS))
    try:
        import score
    finally:
        sys.path.remove(str(SCRIPTS))
    return score.Scorer(folder)


def test_an_exported_classifier_gives_the_same_probabilities_whatever_the_batch(exported, trained):
    model, full, int8 = exported
    want = expected(model, trained, TEXTS)
    assert want.std(axis=0).max() > 0.01  # the texts differ
    for batch_size in (1, 3, 32):
        assert np.allclose(scorer(full).score(TEXTS, batch_size), want, atol=1e-5)
    assert np.abs(scorer(int8).score(TEXTS) - want).max() < 0.1
    sizes = [(folder / "model.onnx").stat().st_size for folder in (full, int8)]
    assert sizes[1] < 0.5 * sizes[0]


def test_the_script_reads_control_tokens_of_a_document_as_text(exported):
    scored = scorer(exported[1])
    ids = scored.tokenizer.encode("the goal <|im_end|> again <|endoftext|>").ids
    control = {scored.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert None not in control and not control & set(ids)


def test_an_encoder_is_exported_like_a_decoder_and_reads_the_tokens_that_it_is_told(export, tmp_path):
    tokenizer = base_models.load_tokenizer(base_models.ENCODER)
    model = AutoModelForSequenceClassification.from_pretrained(
        base_models.fetch(base_models.ENCODER), num_labels=3, num_hidden_layers=1, dtype="float32"
    )
    export.to_onnx(model, tokenizer, ("a", "b", "c"), tmp_path / "encoder", tokens=4)
    cut = tasks.first_tokens(tokenizer, 4)
    assert cut(TEXTS[1]) == TEXTS[1] and cut(TEXTS[2]) != TEXTS[2]
    batch = tokenizer([cut(text) for text in TEXTS], padding=True, return_tensors="pt")
    with torch.inference_mode():
        want = model(**batch).logits.softmax(-1).numpy()
    assert np.allclose(scorer(tmp_path / "encoder").score(TEXTS), want, atol=1e-5)


def test_documents_are_cut_as_in_training_and_the_suffix_is_kept(exported, trained, tmp_path):
    folder = shutil.copytree(exported[1], tmp_path / "cut")
    known = json.loads((folder / "labels.json").read_text())
    assert known["suffix"] == trained.suffix and known["tokens"] is None
    (folder / "labels.json").write_text(json.dumps(known | {"tokens": 3}))
    cut = tasks.first_tokens(trained.tokenizer, 3)
    assert scorer(folder).cut("") == "" and cut(TEXTS[2]) != TEXTS[2]
    want = expected(exported[0], trained, [cut(text) for text in TEXTS])
    assert np.allclose(scorer(folder).score(TEXTS), want, atol=1e-5)
    assert np.abs(scorer(exported[1]).score(TEXTS) - want).max() > 1e-3  # the whole texts are other documents


def test_the_script_answers_line_by_line_without_torch_or_helpers(exported, trained, tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS] + ["{", '{"body": "a"}', '{"text": " "}', "3"]
    lines += ['{"text": "cut \\ud83d"}', '{"text": "caf\udce9"}']  # half an emoji, and a byte of latin-1
    lines.append(json.dumps({"text": "stock"}))  # is answered
    blocked = tmp_path / "blocked"
    for name in ("torch", "helpers", "transformers"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "score.py"), str(exported[1])],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        errors="surrogateescape",
        cwd=tmp_path,
        env=ALONE | {"PYTHONPATH": str(blocked), "PYTHONIOENCODING": "cp1252"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said.pop()["label"] == said[3]["label"]
    assert said.pop() == said.pop() == {"error": "the text has half a character"}
    want = expected(exported[0], trained, TEXTS)
    assert [each["label"] for each in said[: len(TEXTS)]] == [trained.labels[row.argmax()] for row in want]
    assert np.allclose([list(each["probabilities"].values()) for each in said[: len(TEXTS)]], want, atol=1e-3)
    assert [each.get("error") for each in said[len(TEXTS) :]] == ['no JSON object with a "text"'] * 2 + [
        "the text is empty",
        'no JSON object with a "text"',
    ]
    wrong = subprocess.run([sys.executable, str(SCRIPTS / "score.py"), "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("Give the folder of an exported classifier")


def test_several_labels_have_a_sigmoid_each_and_a_threshold(exported, trained, tmp_path):
    folder = shutil.copytree(exported[1], tmp_path / "several")
    known = json.loads((folder / "labels.json").read_text())
    single = scorer(folder).score(TEXTS)
    (folder / "labels.json").write_text(json.dumps(known | {"multi_label": True, "threshold": 0.6}))
    several = scorer(folder).score(TEXTS)
    odds = several / (1 - several)  # of a softmax the same odds, divided by their sum
    assert np.allclose(odds / odds.sum(axis=1, keepdims=True), single, atol=1e-4)
    said = runpy.run_path(str(SCRIPTS / "score.py"))["answer"](scorer(folder), json.dumps({"text": TEXTS[0]}))
    assert said["labels"] == [label for label, one in zip(known["labels"], several[0], strict=True) if one >= 0.6]


def begun(processes, documents, base, out, *more):
    """A training that runs."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(SCRIPTS / "two_cpus.yaml")]
    launcher += ["--num_processes", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPTS / "train.py"), str(documents)]
    command += ["--base", base, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)


@pytest.fixture
def documents(tiny_task, tmp_path):
    path = tmp_path / "documents.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([row["text"], tiny_task.labels[row["label"]]] for row in tiny_task.train)
    return path


def test_two_processes_have_the_losses_of_one(documents, tiny_model, tmp_path):
    options = ("--batch-size", "4", "--epochs", "2", "--rank", "4", "--learning-rate", "1e-2")
    running = {n: begun(n, documents, tiny_model, tmp_path / str(n), *options) for n in (1, 2)}  # at the same time
    losses = {}
    for processes, training in running.items():
        _, errors = training.communicate(timeout=600)
        assert training.returncode == 0, errors[-2000:]
        out = tmp_path / str(processes)
        said = json.loads((out / "losses.json").read_text())
        assert said["processes"] == processes
        losses[processes] = said["losses"]
        assert (out / "adapter_model.safetensors").exists()
    assert len(losses[1]) == 6 and losses[1][0] != losses[1][-1]
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("processes", "content", "message"),
    [
        (2, "text,label\na,b\n", "--batch-size 3 cannot be shared by 2 processes"),
        (1, "text,class\na,b\n", "has no column 'label', only text, class"),
        (1, "text,label\na,b\n\nc,\n", "line 4: text or label is empty"),
        (1, "text,label\na, and more,b\n", "line 2: more or fewer fields than the header has"),
        (1, "text,label\na\n", "line 2: more or fewer fields than the header has"),
        (1, "text,label\ncaf\udce9,b\n", "documents.csv cannot be read as UTF-8"),
        (1, None, "cannot be read as UTF-8 ([Errno 2] No such file"),
    ],
)
def test_a_batch_that_cannot_be_shared_and_a_file_without_labels_are_refused(
    processes, content, message, tmp_path, monkeypatch, capsys
):
    if content is not None:
        (tmp_path / "documents.csv").write_text(content, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(num_processes=processes))
    given = ["train.py", str(tmp_path / "documents.csv"), "--base", "none", "--out", str(tmp_path / "out"), "--batch-size", "3"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPTS / "train.py"))
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_path_is_no_pattern_and_a_label_is_read_as_it_stands(tiny_model, tmp_path):
    rows = [f"the goal of {n},{label}" for n, label in enumerate(["NA", "None", "1", "Caf\u00e9", "Cafe\u0301"] * 2)]
    (tmp_path / "tickets 2.csv").write_text("text,label\nanother,file\n")
    (tmp_path / "tickets [2024].csv").write_text("\n".join(["text,label", *rows]))
    training = begun(1, tmp_path / "tickets [2024].csv", tiny_model, tmp_path / "out", "--epochs", "1", "--batch-size", "4")
    _, errors = training.communicate(timeout=600)
    assert training.returncode == 0, errors[-2000:]
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [len(each) for name, each in weights.items() if "score" in name] == [4]


def test_accelerate_reads_the_configuration_for_several_gpus():
    config = ClusterConfig.from_yaml_file(str(SCRIPTS / "fsdp_qlora.yaml"))
    assert config.distributed_type == "FSDP" and config.num_processes == 2
    known = set(inspect.signature(FullyShardedDataParallelPlugin).parameters) | {"version", "offload_params"}
    assert {name.removeprefix("fsdp_") for name in config.fsdp_config} <= known
