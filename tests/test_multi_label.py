import numpy as np
import pytest
from conftest import WORDS
from datasets import Dataset
from sklearn.metrics import f1_score

from helpers.baselines import FrozenProbe
from helpers.embedding_head import EmbeddingHead, fit_probe
from helpers.errors import BookError
from helpers.evaluation import Predictions, compare, evaluate
from helpers.instruction import InstructionTuned
from helpers.tasks import Task

SETS = ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1])


def documents(rows):
    texts, labels = [], []
    for row in rows:
        for label in SETS:
            words = [words[row] for words, on in zip(WORDS.values(), label, strict=True) if on]
            texts.append(f"{row} the " + " and the ".join(words))
            labels.append(label)
    return Dataset.from_dict({"text": texts, "label": labels})


@pytest.fixture(scope="module")
def task():
    return Task("tiny", tuple(WORDS), documents(range(4)), documents([4]), documents([5]), multi_label=True)


def test_head_learns_the_training_documents(tiny_model, task):
    head = EmbeddingHead(tiny_model, n_layers=None, epochs=12, learning_rate=1e-2).fit(task)
    said = head.predict(task.train)
    assert said.correct.mean() > 0.9
    assert said.probabilities.shape == (28, 3) and ((said.probabilities >= 0) & (said.probabilities <= 1)).all()
    assert np.ptp(said.probabilities.sum(axis=1)) > 0.5


def test_untrained_head_is_the_probe(tiny_model, task):
    head = EmbeddingHead(tiny_model, learning_rate=0.0, n_layers=1).fit(task).predict(task.test)
    probe = FrozenProbe(tiny_model).fit(task).predict(task.test)
    assert np.allclose(head.probabilities, probe.probabilities, atol=1e-5)
    assert np.ptp(probe.probabilities, axis=0).min() > 0.01


def test_round_trip_keeps_it_multi_label(tiny_model, task, tmp_path):
    head = EmbeddingHead(tiny_model, n_layers=1, learning_rate=1e-2).fit(task)
    again = EmbeddingHead.load(head.save(tmp_path / "saved"))
    assert np.array_equal(again.predict(task.test).probabilities, head.predict(task.test).probabilities)


def test_a_label_of_every_document_starts_at_zero():
    generator = np.random.default_rng(0)
    embeddings, gold = generator.normal(size=(20, 5)), generator.integers(0, 2, size=(20, 3))
    gold[:, 1] = 1
    probe = fit_probe(embeddings, gold)
    assert probe.coef_.shape == (3, 5)
    assert not probe.coef_[1].any() and probe.coef_[[0, 2]].any(axis=1).all()
    one = fit_probe(embeddings, gold[:, 0])
    assert np.allclose(embeddings @ probe.coef_[0], embeddings @ (one.coef_[1] - one.coef_[0]))


def test_instruction_tuning_refuses_in_one_line(tiny_model, task):
    with pytest.raises(BookError, match="multi-label, and this approach says one label") as caught:
        InstructionTuned(tiny_model).fit(task)
    assert "\n" not in str(caught.value)


GOLD = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1]])
SAID = Predictions("x", ("a", "b", "c"), [[0.9, 0.1, 0.2], [0.5, 0.4, 0.1], [0.3, 0.6, 0.8], [0.1, 0.9, 0.7]], GOLD)


def test_predicted_and_correct():
    assert SAID.multi_label
    assert SAID.predicted.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert SAID.correct.tolist() == [True, False, False, True]


def test_metrics_are_those_of_scikit_learn():
    scores = evaluate(SAID)
    assert scores["accuracy"] == 0.5
    for average in ("micro", "macro"):
        assert scores[f"{average}_f1"] == pytest.approx(f1_score(GOLD, SAID.predicted, average=average))
    assert scores["macro_f1_low"] <= scores["macro_f1"] <= scores["macro_f1_high"]


def test_comparison_is_about_whole_label_sets():
    perfect = Predictions("y", SAID.labels, GOLD.astype(float), GOLD)
    outcome = compare(perfect, SAID)
    assert (outcome["only_a"], outcome["only_b"], outcome["difference"]) == (2, 0, 0.5)


@pytest.mark.parametrize(
    "probabilities, gold, words",
    [
        ([[0.5, 1.5]], [[1, 0]], "row 0 has no probabilities"),
        ([[0.5, np.nan]], [[1, 0]], "row 0 has no probabilities"),
        ([[0.5, 0.5]], [[1, 0, 0]], "zeros and ones in the shape"),
        ([[0.5, 0.5]], [[1, 2]], "zeros and ones in the shape"),
    ],
)
def test_wrong_predictions_are_refused(probabilities, gold, words):
    with pytest.raises(BookError, match=words) as caught:
        Predictions("x", ("a", "b"), probabilities, gold)
    assert "\n" not in str(caught.value)
