from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WORDS
from datasets import Dataset
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM

from helpers import tasks
from helpers.base_models import load_tokenizer
from helpers.baselines import FineTunedEncoder, FrozenProbe, Majority, TfidfSvm
from helpers.corpora import Document
from helpers.embedding_head import EmbeddingHead
from helpers.embeddings import fit_probe
from helpers.errors import BookError
from helpers.evaluation import Predictions, best_thresholds, compare, evaluate, pool
from helpers.lab.approaches import InstructionTuned, score_questions
from helpers.label_scoring import list_items, score_label_lists
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


def test_instruction_learns_the_lists_of_the_training_documents(tiny_model, task):
    tuned = InstructionTuned(tiny_model, n_layers=None, epochs=25, learning_rate=1e-2).fit(task)
    said = tuned.predict(task.train)
    assert said.correct.mean() > 0.9
    assert said.probabilities.shape == (28, 3) and ((said.probabilities >= 0) & (said.probabilities <= 1)).all()
    backwards = Dataset.from_list(task.train.to_list()[::-1])
    assert np.allclose(tuned.predict(backwards, batch_size=3).probabilities[::-1], said.probabilities, atol=1e-4)


def test_instruction_says_none_of_documents_without_a_label(tiny_model):
    rows = documents(range(4)).to_list() + [{"text": f"{n} nothing at all", "label": [0, 0, 0]} for n in range(8)]
    task = Task("tiny", tuple(WORDS), Dataset.from_list(rows), documents([4]), documents([5]), multi_label=True)
    tuned = InstructionTuned(tiny_model, n_layers=None, epochs=25, learning_rate=1e-2).fit(task)
    assert tuned.predict(task.train).predicted[-8:].sum() == 0


@pytest.mark.parametrize("label", ["sun, moon", "none"])
def test_labels_that_cannot_stand_in_a_list_are_refused(tiny_model, label):
    task = Task("tiny", (*tuple(WORDS)[:2], label), *[documents([row]) for row in range(3)], multi_label=True)
    with pytest.raises(BookError, match=f"{label}' cannot stand in a list") as caught:
        InstructionTuned(tiny_model, epochs=1, n_layers=1).fit(task)
    assert "\n" not in str(caught.value)


LABELS = ("sports", "tech", "OS Credential Dumping")


@pytest.fixture(scope="module")
def scorer(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), load_tokenizer(tiny_model)


def of_items(text, scorer):
    """Probability of each item behind `text` among all items, by one forward pass each."""
    model, tokenizer = scorer
    prompt, scores = tokenizer(text).input_ids, []
    for item in list_items(LABELS, tokenizer):
        ids = tokenizer(" " + item).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(ids)))
    return np.array(scores)


def every_list(text, scorer, said=()):
    """All lists with their probabilities, each label once."""
    scores = np.exp(of_items(text + "".join(f" {LABELS[n]}," for n in said), scorer))
    for n in said:
        scores[[n, n + 3]] = 0
    scores /= scores.sum()
    yield said, scores[6]  # and none
    for n in range(3):
        if n not in said:
            yield (*said, n), scores[n + 3]
            for longer, probability in every_list(text, scorer, (*said, n)) if len(said) < 2 else [((*said, n), 1.0)]:
                yield longer, scores[n] * probability


def test_the_first_step_of_a_list_is_exact(scorer):
    text = "the goal and the laptop. Topics:"
    found = score_label_lists([text, "another"], LABELS, *scorer, tolerance=0, most=1)
    scores = np.exp(of_items(text, scorer))
    scores /= scores.sum()
    assert np.allclose(found[0].numpy(), scores[:3] + scores[3:6], atol=1e-5)


def test_a_list_never_gives_a_label_more_than_all_lists_do(scorer):
    for text in ("the goal and the laptop. Topics:", "one server"):
        found = score_label_lists([text], LABELS, *scorer, tolerance=0)[0].numpy()
        exact = np.zeros(3)
        for said, probability in every_list(text, scorer):
            exact[list(said)] += probability
        one_step = score_label_lists([text], LABELS, *scorer, tolerance=0, most=1)[0].numpy()
        assert (found <= exact + 1e-5).all() and (found >= one_step - 1e-5).all()
        assert found.sum() > one_step.sum() + 1e-3


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


def test_thresholds_are_where_f1_is_highest():
    generator = np.random.default_rng(0)
    gold = (generator.random((300, 3)) < (0.5, 0.2, 0.05)).astype(int)
    noisy = np.clip(0.25 * gold + generator.normal(0.2, 0.1, gold.shape), 0, 1)
    said = Predictions("x", ("a", "b", "c"), noisy, gold)
    cuts = np.linspace(0, 1, 501)
    common, each = best_thresholds(said), best_thresholds(said, per_label=True)
    micro = [f1_score(gold, noisy >= cut, average="micro", zero_division=0) for cut in cuts]
    assert evaluate(replace(said, thresholds=common), n_resamples=9)["micro_f1"] >= max(micro)
    per_label = [max(f1_score(gold[:, n], noisy[:, n] >= cut, zero_division=0) for cut in cuts) for n in range(3)]
    assert evaluate(replace(said, thresholds=each), n_resamples=9)["macro_f1"] >= np.mean(per_label)
    assert replace(said, thresholds=each).predicted[:, 2].tolist() == (noisy[:, 2] >= each[2]).astype(int).tolist()


def test_a_label_without_a_positive_gets_the_common_threshold():
    gold = GOLD.copy()
    gold[:, 1] = 0
    said = Predictions("x", ("a", "b", "c"), SAID.probabilities, gold)
    assert best_thresholds(said, per_label=True)[1] == best_thresholds(said)


def test_a_single_label_task_has_no_thresholds():
    with pytest.raises(BookError, match="x: a single-label task has no thresholds"):
        best_thresholds(Predictions("x", ("a", "b"), [[0.5, 0.5]], [0]))


def test_pooled_results_keep_the_thresholds_of_each():
    parts = [replace(SAID, thresholds=0.3), replace(SAID, thresholds=np.array([0.2, 0.9, 0.6])), SAID]
    assert np.array_equal(pool(parts).predicted, np.concatenate([each.predicted for each in parts]))
    assert len({each.predicted.tobytes() for each in parts}) == 3


def test_comparison_is_about_whole_label_sets():
    perfect = Predictions("y", SAID.labels, GOLD.astype(float), GOLD)
    outcome = compare(perfect, SAID)
    assert (outcome["only_a"], outcome["only_b"], outcome["difference"]) == (2, 0, 0.5)


@pytest.mark.parametrize(
    "probabilities, gold, words",
    [
        ([[0.5, 1.5]], [[1, 0]], "row 0 has no probabilities"),
        ([[0.5, np.nan]], [[1, 0]], "row 0 has no probabilities"),
        ([[0.5, 0.5]], [[1, 0, 0]], r"gold needs the shape \(1, 2\) and numbers from 0 to 1"),
        ([[0.5, 0.5]], [[1, 2]], r"gold needs the shape \(1, 2\) and numbers from 0 to 1"),
    ],
)
def test_wrong_predictions_are_refused(probabilities, gold, words):
    with pytest.raises(BookError, match=words) as caught:
        Predictions("x", ("a", "b"), probabilities, gold)
    assert "\n" not in str(caught.value)


def test_a_question_about_each_label_learns_the_training_documents(tiny_model, task):
    tuned = InstructionTuned(tiny_model, n_layers=None, rank=32, epochs=50, learning_rate=3e-3, ask="questions").fit(task)
    said = tuned.predict(task.train)
    assert said.correct.mean() > 0.9
    assert np.allclose(tuned.predict(task.train, batch_size=3).probabilities, said.probabilities, atol=1e-4)


def test_a_question_is_answered_as_by_one_pass_for_each_label(scorer):
    model, tokenizer = scorer
    prompts = ["the goal and one bank. Is it", "one laptop. Is it"]
    found = score_questions(prompts, LABELS, model, tokenizer)
    yes, no = (tokenizer(f" {answer}").input_ids[0] for answer in ("yes", "no"))
    for prompt, row in zip(prompts, found, strict=True):
        for label, probability in zip(LABELS, row, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([tokenizer(f"{prompt} {label}?").input_ids])).logits[0, -1]
            assert float(probability) == pytest.approx(float(logits[[yes, no]].softmax(-1)[0]), abs=1e-5)


def test_questions_are_about_own_labels_and_two_others(tiny_model, task):
    tuned = InstructionTuned(tiny_model, epochs=0, ask="questions").fit(task)
    examples = tuned._examples(task)
    first = [
        (prompt.split()[-1], said) for prompt, said in zip(*examples.values(), strict=True) if prompt.startswith("0 the goal\n")
    ]
    assert first[0] == ("sports?", " yes") and sorted(first[1:]) == [("money?", " no"), ("tech?", " no")]
    all_three = [
        said for prompt, said in zip(*examples.values(), strict=True) if "0 the goal and the bank and the software" in prompt
    ]
    assert all_three == [" yes"] * 3


@pytest.mark.parametrize(
    ("order", "expected"),
    [("task", " sports, money, tech"), ("frequent", " tech, sports, money"), ("rare", " money, sports, tech")],
)
def test_a_list_is_in_the_order_that_is_asked_for(tiny_model, order, expected):
    rows = documents(range(4)).to_list() + [{"text": f"{n} server", "label": [n % 2, 0, 1]} for n in range(4)]
    task = Task("tiny", tuple(WORDS), Dataset.from_list(rows), documents([4]), documents([5]), multi_label=True)
    tuned = InstructionTuned(tiny_model, epochs=0, order=order).fit(task)
    assert tuned._examples(task)["completion"][6] == expected


def test_a_random_order_is_another_one_for_each_document_and_the_same_for_a_seed(tiny_model, task):
    said = [InstructionTuned(tiny_model, epochs=0, order="random").fit(task)._examples(task)["completion"] for _ in "ab"]
    assert said[0] == said[1]
    assert len(set(said[0][6::7])) > 1 and all(sorted(each[1:].split(", ")) == sorted(WORDS) for each in said[0][6::7])


@pytest.mark.parametrize("baseline", [TfidfSvm(C=10.0), FineTunedEncoder(epochs=30)])
def test_baselines_learn_several_labels(baseline, task):
    said = baseline.fit(task).predict(task.train)
    assert said.multi_label and said.correct.mean() > 0.9


def test_the_majority_has_the_frequency_of_each_label(task):
    said = Majority().fit(task).predict(task.test)
    assert np.allclose(said.probabilities, np.mean(task.train["label"], axis=0))


def test_a_label_of_all_training_documents_is_always_said(task):
    rows = [{**row, "label": [1, *row["label"][1:]]} for row in task.train.to_list()]
    always = Task("tiny", tuple(WORDS), Dataset.from_list(rows), task.validation, task.test, multi_label=True)
    said = TfidfSvm().fit(always).predict(task.test)
    assert said.predicted[:, 0].all() and not said.predicted[:, 1].all()


def test_labels_without_a_positive_are_refused_by_name(task):
    rows = [{**row, "label": [row["label"][0], 0, row["label"][2]]} for row in task.train.to_list()]
    with pytest.raises(BookError, match="has label 'money', which no training document has"):
        Task("tiny", tuple(WORDS), Dataset.from_list(rows), task.validation, task.test, multi_label=True)


@pytest.mark.parametrize("label", [[1, 0], [1, 0, 2], 1, [1, 0, 0, 0], "sports"])
def test_label_lists_of_the_wrong_shape_are_refused_with_their_row(task, label):
    class Column(list):
        column_names = ["text", "label"]

        def __getitem__(self, name):
            return [row[name] for row in self] if isinstance(name, str) else super().__getitem__(name)

    rows = Column([*task.train.to_list(), {"text": "something else", "label": label}])
    with pytest.raises(BookError, match="tiny, train, row 28: label .* is no list of 3 zeros and ones") as caught:
        Task("tiny", tuple(WORDS), rows, task.validation, task.test, multi_label=True)
    assert "\n" not in str(caught.value)


def test_the_order_of_a_documents_labels_means_nothing():
    names = tuple(WORDS)
    rows = [(f"document {n}", tuple(name for name, on in zip(names, SETS[n % 7], strict=True) if on)) for n in range(40)]

    def split(labels_of):
        return tasks.split("x", [Document(text, labels_of(labels)) for text, labels in rows], n_validation=8, n_test=8)

    given = split(lambda labels: labels).content_hash()
    assert split(lambda labels: labels[::-1]).content_hash() == given
    assert split(lambda labels: labels + labels[:1]).content_hash() == given  # named twice
    assert split(lambda labels: labels[:1]).content_hash() != given


def test_a_test_document_with_a_label_that_training_never_saw_is_refused(task):
    rows = [{**row, "label": [row["label"][0], 0, row["label"][2]]} for row in task.train.to_list() if row["label"][1] == 0]
    with pytest.raises(BookError, match="tiny: validation row 1 has label 'money', which no training document has"):
        Task("tiny", tuple(WORDS), Dataset.from_list(rows), task.validation, task.test, multi_label=True)
    with pytest.raises(BookError, match="gold needs the shape"):
        Predictions("x", ("sports", "tech"), [[0.5, 0.5]], [[1, 0, 1]])  # three labels at test, two in training
