import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainerCallback

from helpers.approach import Approach
from helpers.baselines import FineTunedEncoder, FrozenProbe, Majority, TfidfSvm
from helpers.embedding_head import EmbeddingHead
from helpers.errors import BookError
from helpers.instruction import InstructionTuned
from helpers.lab import approaches
from helpers.tasks import SPLITS, Task

BOTH = {"head": EmbeddingHead, "instruction": InstructionTuned}
both = pytest.mark.parametrize("kind", BOTH.values(), ids=BOTH.keys())
SETTINGS = dict(n_layers=1, rank=4, learning_rate=1e-2, batch_size=4)

LOADER = """
import sys, numpy as np
from datasets import Dataset
from helpers.approach import Approach
folder, documents, out = sys.argv[1:]
np.save(out, Approach.load(folder).predict_proba(list(Dataset.from_json(documents)["text"])))
"""


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_task):
    return {kind: kind(tiny_model, epochs=2, **SETTINGS).fit(tiny_task) for kind in BOTH.values()}


@both
def test_a_saved_approach_predicts_the_same_in_a_fresh_process(kind, trained, tiny_task, tmp_path):
    folder, documents = trained[kind].save(tmp_path / "saved"), tmp_path / "documents.jsonl"
    tiny_task.test.to_json(documents)
    command = [sys.executable, "-W", "ignore", "-c", LOADER, folder, documents, tmp_path / "found.npy"]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    expected = trained[kind].predict(tiny_task.test).probabilities
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)
    assert np.ptp(expected, axis=0).max() > 0.1
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 100_000  # without the base model


@both
def test_what_is_loaded_knows_labels_settings_and_cost(kind, trained, tmp_path):
    again = kind.load(trained[kind].save(tmp_path / "saved"))
    assert again == trained[kind]  # all settings
    assert again.labels == trained[kind].labels and again.training_seconds == trained[kind].training_seconds > 0


@both
def test_merged_into_the_full_weights_it_predicts_the_same(kind, trained, tiny_task, tmp_path):
    again = kind.load(trained[kind].save(tmp_path / "saved"))
    again.model = again.model.merge_and_unload()
    merged = again.predict(tiny_task.test).probabilities
    assert not any("lora" in name for name, _ in again.model.named_parameters())
    assert np.allclose(merged, trained[kind].predict(tiny_task.test).probabilities, atol=1e-4)


@both
def test_saving_refuses_in_one_line(kind, trained, tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused = {"nothing to save": (kind(tiny_model), tmp_path / "new"), "something else": (trained[kind], tmp_path)}
    for words, (approach, folder) in refused.items():
        with pytest.raises(BookError, match=words) as caught:
            approach.save(folder)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists() and (tmp_path / "notes.txt").read_text() == "mine"
    trained[kind].save(tmp_path / "twice")
    trained[kind].save(tmp_path / "twice")


BASELINES = {
    "majority": lambda model: Majority(),
    "svm": lambda model: TfidfSvm(C=2.0),
    "probe": lambda model: FrozenProbe(model, pooling="mean"),
    "encoder": lambda model: FineTunedEncoder(model, epochs=1),
}


@pytest.mark.parametrize("make", BASELINES.values(), ids=BASELINES.keys())
def test_every_baseline_is_saved_and_loaded_like_the_approaches(make, tiny_model, tiny_task, tmp_path):
    fitted = make(tiny_model).fit(tiny_task)
    again = Approach.load(fitted.save(tmp_path / "saved"))
    assert again == fitted and again.labels == tiny_task.labels and not again.multi_label
    texts = list(tiny_task.test["text"])
    assert np.allclose(again.predict_proba(texts), fitted.predict_proba(texts), atol=1e-6)
    assert np.allclose(fitted.predict_proba(texts), fitted.predict(tiny_task.test).probabilities, atol=1e-6)


def test_a_folder_with_an_option_of_an_ablation_says_who_loads_it(trained, tmp_path):
    folder = trained[EmbeddingHead].save(tmp_path / "saved")
    note = json.loads((folder / "approach.json").read_text())
    note["settings"] |= {"causal": True, "precision": None, "lora": {}}  # as the first edition wrote them
    (folder / "approach.json").write_text(json.dumps(note))
    assert Approach.load(folder) == trained[EmbeddingHead]
    note["settings"]["causal"] = False
    (folder / "approach.json").write_text(json.dumps(note))
    with pytest.raises(BookError, match="causal=False: use helpers.lab.approaches.EmbeddingHead.load") as caught:
        Approach.load(folder)
    assert "\n" not in str(caught.value)


def test_loading_refuses_in_one_line(trained, tmp_path):
    with pytest.raises(BookError, match="no approach.json"):
        EmbeddingHead.load(tmp_path)
    folder = trained[InstructionTuned].save(tmp_path / "saved")
    with pytest.raises(BookError, match="Use InstructionTuned.load") as caught:
        EmbeddingHead.load(folder)
    assert "\n" not in str(caught.value)


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_step_begin(self, args, state, control, **kwargs):
        if state.epoch >= self.epochs:
            raise Killed


@pytest.fixture
def steps(monkeypatch):
    """Kill trainings after so many epochs, and count the optimizer steps of every training."""
    original, settings = Trainer.train, {"kill": None, "steps": []}

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            settings["steps"][-1] += 1

    def train(trainer, **options):
        settings["steps"].append(0)
        trainer.add_callback(Count())
        if settings["kill"] is not None:
            trainer.add_callback(KillAfter(settings["kill"]))
        return original(trainer, **options)

    monkeypatch.setattr(Trainer, "train", train)
    return settings


@both
@pytest.mark.parametrize("half_written", [False, True])
def test_a_stopped_training_goes_on_to_the_same_end(kind, half_written, tiny_model, tiny_task, tmp_path, steps):
    expected = kind(tiny_model, epochs=3, **SETTINGS).fit(tiny_task).predict(tiny_task.test).probabilities
    settings = dict(epochs=3, checkpoints=str(tmp_path / "checkpoints"), **SETTINGS)
    steps["kill"] = 2
    with pytest.raises(Killed):
        kind(tiny_model, **settings).fit(tiny_task)
    checkpoints = sorted((tmp_path / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6"]
    if half_written:  # killed while the last one was written
        (checkpoints[-1] / "trainer_state.json").unlink()
    steps["kill"] = None
    again = kind(tiny_model, **settings).fit(tiny_task).predict(tiny_task.test).probabilities
    assert np.allclose(again, expected, atol=1e-6)
    assert steps["steps"] == [9, 6, 6 if half_written else 3]
    kind(tiny_model, **settings).fit(tiny_task)
    assert steps["steps"][-1] == 0


def test_a_killed_process_loses_no_complete_checkpoint(tiny_model, tiny_task, tmp_path):
    """The whole process ends without a word, as with kill -9."""
    script = """
import os, sys
sys.path.insert(0, "tests")
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from helpers.embedding_head import EmbeddingHead
from helpers.tasks import Task
model, folder, data, epochs = sys.argv[1:]

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.epoch >= 1 and epochs == "killed":
            os._exit(9)

original = Trainer.train
Trainer.train = lambda trainer, **options: (trainer.add_callback(Kill()), original(trainer, **options))
splits = {split: Dataset.from_json(f"{data}/{split}.jsonl") for split in ("train", "validation", "test")}
head = EmbeddingHead(model, n_layers=1, rank=4, learning_rate=1e-2, batch_size=4, epochs=2, checkpoints=folder)
head.fit(Task("tiny", ("sports", "money", "tech"), **splits)).save(f"{data}/saved")
"""
    for split in SPLITS:
        getattr(tiny_task, split).to_json(tmp_path / f"{split}.jsonl")
    arguments = [sys.executable, "-W", "ignore", "-c", script, tiny_model, str(tmp_path / "checkpoints"), str(tmp_path)]
    options = dict(capture_output=True, cwd=Path(__file__).parent.parent)
    assert subprocess.run([*arguments, "killed"], **options).returncode == 9
    assert not (tmp_path / "saved").exists()
    assert subprocess.run([*arguments, "whole"], **options).returncode == 0
    expected = EmbeddingHead(tiny_model, epochs=2, **SETTINGS).fit(tiny_task).predict(tiny_task.test).probabilities
    again = EmbeddingHead.load(tmp_path / "saved").predict(tiny_task.test).probabilities
    assert np.allclose(again, expected, atol=1e-6)


@both
def test_checkpoints_of_another_training_are_refused(kind, tiny_model, tiny_task, tmp_path):
    settings = dict(epochs=1, checkpoints=str(tmp_path), **SETTINGS)
    kind(tiny_model, **settings).fit(tiny_task)
    with pytest.raises(BookError, match="rank was 4, now it is 2") as first:
        kind(tiny_model, **{**settings, "rank": 2}).fit(tiny_task)
    parts = {split: getattr(tiny_task, split) for split in SPLITS}
    fewer = Task("tiny", tiny_task.labels, **{**parts, "train": tiny_task.train.select(range(9))})
    with pytest.raises(BookError, match="documents was") as second:
        kind(tiny_model, **settings).fit(fewer)
    assert "\n" not in str(first.value) + str(second.value)
    other = InstructionTuned if kind is EmbeddingHead else EmbeddingHead
    with pytest.raises(BookError, match="checkpoints of another training"):
        other(tiny_model, **settings).fit(tiny_task)
    assert json.loads((tmp_path / "training.json").read_text())["rank"] == 4


@both
def test_padding_side_and_order_do_not_matter(kind, trained, tiny_task, tmp_path):
    expected = trained[kind].predict(tiny_task.test).probabilities
    again = kind.load(trained[kind].save(tmp_path / "saved"))
    again.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", padding_side="left")
    backwards = Dataset.from_list(tiny_task.test.to_list()[::-1])
    assert np.allclose(again.predict(backwards, batch_size=2).probabilities[::-1], expected, atol=1e-4)


@both
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "5e-4"}, "YAML reads 5e-4 as text: write 5.0e-4"),
    ],
)
def test_settings_without_a_training_are_refused(kind, settings, words):
    with pytest.raises(BookError, match=words) as caught:
        kind(**settings)
    assert "\n" not in str(caught.value)


@both
def test_documents_without_labels_are_refused_before_anything_is_computed(kind, trained, tiny_task, monkeypatch):
    monkeypatch.setattr(trained[kind], "model", None)
    with pytest.raises(BookError, match="no column 'label', only text"):
        trained[kind].predict(tiny_task.test.remove_columns("label"))


def test_options_given_as_a_tuple_are_the_same_training(tiny_model, tiny_task, tmp_path):
    lora = {"target_modules": ("q_proj", "v_proj")}
    settings = dict(epochs=1, checkpoints=str(tmp_path), lora=lora, **SETTINGS)
    first, second = (approaches.EmbeddingHead(tiny_model, **settings).fit(tiny_task) for _ in range(2))
    assert np.allclose(*(each.predict_proba(list(tiny_task.test["text"])) for each in (first, second)), atol=1e-6)


def test_a_checkpoint_cut_short_is_not_used(tiny_model, tiny_task, tmp_path):
    settings = dict(epochs=2, checkpoints=str(tmp_path), **SETTINGS)
    expected = EmbeddingHead(tiny_model, **settings).fit(tiny_task).predict(tiny_task.test).probabilities
    last = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    (last / "trainer_state.json").write_text((last / "trainer_state.json").read_text()[:40])
    again = EmbeddingHead(tiny_model, **settings).fit(tiny_task).predict(tiny_task.test).probabilities
    assert np.allclose(again, expected, atol=1e-6)


def test_an_empty_text_is_named_also_without_labels(trained):
    for approach in trained.values():
        with pytest.raises(BookError, match="row 1: the text is ' '"):
            approach.predict_proba(["a match", " "])


def test_a_folder_of_a_student_says_which_class_loads_it(trained, tmp_path):
    folder = trained[EmbeddingHead].save(tmp_path / "saved")
    note = json.loads((folder / "approach.json").read_text())
    (folder / "approach.json").write_text(json.dumps(note | {"approach": "DistilledEncoder"}))
    with pytest.raises(BookError, match="use helpers.lab.approaches.DistilledEncoder.load"):
        Approach.load(folder)
