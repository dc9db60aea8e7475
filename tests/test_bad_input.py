"""What users hand in by mistake: one line that says what is wrong, or a correct result, never silence."""

import shutil

import numpy as np
import pytest
from conftest import WORDS
from datasets import Dataset
from transformers import AutoTokenizer

from helpers.baselines import FrozenProbe
from helpers.embedding_head import EmbeddingHead
from helpers.errors import BookError
from helpers.instruction import InstructionTuned
from helpers.tasks import SPLITS, Task

APPROACHES = {
    "probe": lambda model: FrozenProbe(model),
    "head": lambda model: EmbeddingHead(model, n_layers=1, epochs=1),
    "head, random start": lambda model: EmbeddingHead(model, n_layers=1, epochs=1, probe_init=False),
    "instruction": lambda model: InstructionTuned(model, n_layers=1, epochs=1),
}
every_approach = pytest.mark.parametrize("make", APPROACHES.values(), ids=APPROACHES.keys())


@pytest.fixture(scope="module")
def fitted(tiny_model, tiny_task):
    return {name: make(tiny_model).fit(tiny_task) for name, make in APPROACHES.items()}


@pytest.mark.parametrize("text", ["", "  \n", None])
@pytest.mark.parametrize("name", APPROACHES)
def test_empty_texts_are_refused_by_row(name, text, fitted):
    documents = Dataset.from_dict({"text": ["the goal", text], "label": [0, 0]})
    with pytest.raises(BookError, match="row 1: the text is") as caught:
        fitted[name].predict(documents)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", APPROACHES)
def test_a_missing_column_is_named(name, fitted):
    with pytest.raises(BookError, match="no column 'text', only body, label"):
        fitted[name].predict(Dataset.from_dict({"body": ["the goal"], "label": [0]}))


@pytest.mark.parametrize("name", APPROACHES)
def test_texts_beyond_the_context_are_refused_when_predicting(name, fitted):
    documents = Dataset.from_dict({"text": ["the goal", "goal " * 2100], "label": [0, 0]})
    with pytest.raises(BookError, match="Text 1 has .* the model takes 2048") as caught:
        fitted[name].predict(documents)
    assert "\n" not in str(caught.value)


@every_approach
def test_texts_beyond_the_context_are_refused_before_training(make, tiny_model, tiny_task):
    parts = {split: getattr(tiny_task, split) for split in SPLITS}
    rows = parts["train"].to_list()
    rows[4]["text"] = "goal " * 2100
    with pytest.raises(BookError, match="Text 4 has .* the model takes 2048"):
        make(tiny_model).fit(Task("long", tiny_task.labels, **{**parts, "train": Dataset.from_list(rows)}))


@every_approach
def test_a_class_with_one_document(make, tiny_model, tiny_task):
    parts = {split: getattr(tiny_task, split) for split in SPLITS}
    parts["train"] = parts["train"].select([0, 1, 2, 3, 4, 6, 7, 9, 10])  # one document of the last label
    assert parts["train"]["label"].count(2) == 1
    said = make(tiny_model).fit(Task("rare", tiny_task.labels, **parts)).predict(tiny_task.test)
    assert np.isfinite(said.probabilities).all()


@every_approach
def test_400_labels_some_the_beginning_of_others(make, tiny_model):
    flat = [word for words in WORDS.values() for word in words]
    labels = tuple(f"{a} {b}" if a != b else a for a in flat[:20] for b in flat[:20])
    assert len(set(labels)) == 400 and {"goal", "goal striker"} <= set(labels)
    splits = {
        split: Dataset.from_dict({"text": [f"{split} {label} again" for label in labels], "label": list(range(400))})
        for split in SPLITS
    }
    task = Task("many", labels, **splits)
    said = make(tiny_model).fit(task).predict(task.test.select(range(20)))
    assert said.probabilities.shape == (20, 400)
    assert np.allclose(said.probabilities.sum(axis=1), 1, atol=1e-4)


@every_approach
def test_a_tokenizer_without_padding_token_and_chat_template(make, tiny_model, tiny_task, fitted, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.chat_template = None, None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    bare = AutoTokenizer.from_pretrained(folder)
    assert bare.pad_token is None and bare.chat_template is None
    expected = next(fitted[name] for name in APPROACHES if APPROACHES[name] is make).predict(tiny_task.test)
    said = make(str(folder)).fit(tiny_task).predict(tiny_task.test)
    assert np.allclose(said.probabilities, expected.probabilities, atol=1e-5)
