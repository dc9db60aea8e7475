"""Students: what they learn from, their loss, and that they say what their teacher says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.special import log_softmax, softmax

from helpers.errors import BookError
from helpers.lab import approaches, sweeps
from helpers.lab.approaches import DistilledEncoder, DistilledTfidf, FineTunedEncoder, distillation_loss, soften, training_targets
from helpers.tasks import Task


@pytest.fixture
def taught(tiny_task, tmp_path, monkeypatch):
    """A task, and the records of a teacher that is sure of the opposite of what the labels say."""
    monkeypatch.setattr(approaches, "KEPT", 2)
    n, n_labels = len(tiny_task.validation), len(tiny_task.labels)
    said = np.full((n, n_labels), 0.1 / (n_labels - 1))
    said[np.arange(n), (np.array(tiny_task.validation["label"]) + 1) % n_labels] = 0.9
    record = {
        "key": {"approach": "EmbeddingHead", "settings": {}, "seed": 0},
        "content_hash": tiny_task.content_hash(),
        "validation": {"probabilities": said.tolist()},
    }
    (tmp_path / "teachers.jsonl").write_text(json.dumps(record) + "\n")
    return tiny_task, str(tmp_path / "teachers.jsonl"), said


def test_a_temperature_divides_the_logits():
    logits = np.random.default_rng(0).normal(size=(5, 4))
    assert np.allclose(soften(softmax(logits, axis=1), 3.0), softmax(logits / 3, axis=1))
    assert soften(np.eye(3), 2.0)[0].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    with pytest.raises(BookError, match="The temperature is 0"):
        soften(np.eye(3), 0)


def test_the_loss_is_the_divergence_and_its_gradient_does_not_fade_with_the_temperature():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    teacher = softmax(np.random.default_rng(0).normal(size=(6, 4)), axis=1)
    got = distillation_loss(logits, torch.tensor(soften(teacher, 2.0)), 2.0)
    soft = soften(teacher, 2.0)
    expected = 4 * (soft * (np.log(soft) - log_softmax(logits.numpy() / 2, axis=1))).sum(1).mean()
    assert got.item() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(torch.tensor(np.log(teacher)), torch.tensor(soften(teacher, 2.0)), 2.0).item() < 1e-6
    sizes = []
    for temperature in (4.0, 16.0):
        given = logits.clone().requires_grad_()
        distillation_loss(given, torch.tensor(soften(teacher, temperature)), temperature).backward()
        sizes.append(given.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


def test_training_targets_have_the_labels_of_training_documents_and_never_those_of_others(taught):
    task, teacher, said = taught
    texts, probabilities = training_targets(task, teacher, "EmbeddingHead", 0)
    n = len(task.train)
    assert texts == [*task.train["text"], *task.validation["text"][:-2]]
    assert (probabilities[:n] == np.eye(len(task.labels))[task.train["label"]]).all()
    assert np.allclose(probabilities[n:], said[:-2])
    kept = task.validation["text"][-2:]
    assert not set(kept) & set(texts)


def test_students_say_what_the_teacher_says_and_not_what_the_labels_say(taught, tiny_model):
    task, teacher, said = taught
    unlabelled = Task("no training signal", task.labels, task.train.select(range(len(task.labels))), task.validation, task.test)
    record = json.loads(Path(teacher).read_text())
    Path(teacher).write_text(json.dumps(record | {"content_hash": unlabelled.content_hash()}))
    taught_on = unlabelled.validation.select(range(len(unlabelled.validation) - 2))
    for student in (
        DistilledTfidf(teacher=teacher),
        DistilledEncoder(tiny_model, teacher=teacher, epochs=40, learning_rate=1e-2, temperature=1.0),
    ):
        got = student.fit(unlabelled).predict(taught_on)
        agreement = (got.predicted == said[:-2].argmax(1)).mean()
        assert agreement > 0.8, student
        assert not np.isnan(got.probabilities).any()


def test_fewer_layers_are_fewer_weights(tiny_task, tiny_model):
    sizes = [
        FineTunedEncoder(tiny_model, n_layers=n, epochs=1).fit(tiny_task).predict(tiny_task.test).trainable_parameters
        for n in (1, None)
    ]
    assert sizes[0] < sizes[1]
    with pytest.raises(BookError, match="so n_layers=99 does not fit"):
        FineTunedEncoder(tiny_model, n_layers=99).fit(tiny_task)


def test_a_teacher_that_was_not_recorded_is_named(taught):
    task, teacher, _ = taught
    with pytest.raises(BookError, match="teachers.jsonl has no record of EmbeddingHead with seed 1 on these documents"):
        training_targets(task, teacher, "EmbeddingHead", 1)
    other = Task("other", task.labels, task.test, task.validation, task.train)
    with pytest.raises(BookError, match="no record of EmbeddingHead with seed 0 on these documents"):
        training_targets(other, teacher, "EmbeddingHead", 0)
    few = Task("few", task.labels, task.train, Dataset.from_dict(task.validation[:2]), task.test)
    with pytest.raises(BookError, match="more than 2 validation documents"):
        training_targets(few, teacher, "EmbeddingHead", 0)


def test_the_sweep_of_students_asks_for_the_teachers_documents():
    results = approaches.RESULTS
    students, teachers = (sweeps.keys(sweeps.load_sweep(results / f"{name}.yaml")) for name in ("distillation", "teachers"))
    documents = {(key["task"], str(key["options"]), key["seed"]) for key in teachers}
    assert {(key["task"], str(key["options"]), key["seed"]) for key in students} == documents
    assert {key["settings"]["of"] for key in students if "of" in key["settings"]} <= {key["approach"] for key in teachers}
