import time

import numpy as np
import pytest
from sklearn.metrics import f1_score
from statsmodels.stats.proportion import proportion_confint

from helpers.errors import BookError
from helpers.evaluation import Predictions, compare, evaluate, measure, show, table

ABC = ("a", "b", "c")


def said(predicted, gold, labels=ABC, name="x", **cost):
    """Predictions that say `predicted` with certainty."""
    return Predictions(name, labels, np.eye(len(labels))[np.asarray(predicted)], gold, **cost)


def right(correct, name="x", **cost):
    """Predictions of two labels that are right where `correct` says so."""
    correct = np.asarray(correct, dtype=bool)
    gold = np.arange(len(correct)) % 2
    return said(np.where(correct, gold, 1 - gold), gold, ("a", "b"), name, **cost)


@pytest.mark.parametrize(
    "probabilities, gold, words",
    [
        ([[0.5, 0.5]], [0], "shape (1, 2), expected (1, 3)"),
        ([[1, 0, 0]], [0, 1], "shape (1, 3), expected (2, 3)"),
        ([1, 0, 0], [0], "shape (3,), expected (1, 3)"),
        ([[1, 0, 0], [0.5, 0.5, 0.5]], [0, 1], "row 1 is no probability"),
        ([[2.0, -1.0, -3.0]], [0], "row 0 is no probability"),
        ([[1.5, -0.5, 0.0]], [0], "row 0 is no probability"),
        ([[1, 0, 0], [np.nan, 0.5, 0.5]], [0, 1], "row 1 is no probability"),
        ([[np.inf, 0, 0]], [0], "row 0 is no probability"),
        ([[1, 0, 0]], [3], "gold labels run to 3"),
        ([[1, 0, 0], [1, 0, 0]], [-1, 0], "gold labels"),
        (np.empty((0, 3)), [], "no document"),
    ],
)
def test_predictions_are_refused(probabilities, gold, words):
    with pytest.raises(BookError) as caught:
        Predictions("probe", ABC, probabilities, gold)
    message = str(caught.value)
    assert message.startswith("probe: ") and words in message and "\n" not in message


def test_predicted_correct_and_throughput():
    predictions = Predictions("x", ABC, [[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], [1, 2], seconds=0.5)
    assert predictions.predicted.tolist() == [1, 0]
    assert predictions.correct.tolist() == [True, False]
    assert predictions.documents_per_second == 4
    assert np.isnan(said([0], [0]).documents_per_second)


@pytest.mark.parametrize("n_correct, low, high", [(50, 0.4038315, 0.5961685), (100, 0.9630065, 1.0), (0, 0.0, 0.0369935)])
def test_accuracy_and_its_wilson_interval_by_hand(n_correct, low, high):
    scores = evaluate(right(np.arange(100) < n_correct))
    assert scores["accuracy"] == n_correct / 100
    assert (scores["accuracy_low"], scores["accuracy_high"]) == pytest.approx((low, high), abs=1e-7)
    assert (scores["accuracy_low"], scores["accuracy_high"]) == pytest.approx(proportion_confint(n_correct, 100, method="wilson"))


def test_confidence_widens_the_intervals():
    predictions = right(np.arange(60) % 3 > 0)
    narrow, wide = evaluate(predictions, confidence=0.5), evaluate(predictions, confidence=0.99)
    for metric in ("accuracy", "macro_f1"):
        assert wide[f"{metric}_low"] < narrow[f"{metric}_low"] < narrow[f"{metric}_high"] < wide[f"{metric}_high"]
    assert (wide["accuracy_low"], wide["accuracy_high"]) == pytest.approx(proportion_confint(40, 60, alpha=0.01, method="wilson"))


def random_said(seed, n=120):
    generator = np.random.default_rng(seed)
    gold = generator.integers(0, 3, n)
    predicted = np.where(generator.random(n) < 0.6, gold, generator.integers(0, 3, n))
    return said(predicted, gold, (*ABC, "never"))


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_is_that_of_scikit_learn_also_with_a_label_that_never_occurs(seed):
    predictions = random_said(seed)
    expected = f1_score(predictions.gold, predictions.predicted, labels=[0, 1, 2, 3], average="macro", zero_division=0)
    assert evaluate(predictions)["macro_f1"] == pytest.approx(expected)
    assert expected < 0.75  # the fourth label counts as 0


def test_bootstrap_of_macro_f1_is_that_of_scikit_learn_on_every_resample():
    predictions, n_resamples = random_said(0, n=40), 200
    scores = evaluate(predictions, n_resamples=n_resamples, seed=3)
    rows = np.random.default_rng(3).integers(0, 40, (n_resamples, 40))
    resampled = [
        f1_score(predictions.gold[index], predictions.predicted[index], labels=range(4), average="macro", zero_division=0)
        for index in rows
    ]
    expected = np.percentile(resampled, [2.5, 97.5])
    assert (scores["macro_f1_low"], scores["macro_f1_high"]) == pytest.approx(expected, abs=1e-9)


def test_bootstrap_is_reproducible_and_seeded():
    predictions = random_said(0)
    assert evaluate(predictions, seed=5) == evaluate(predictions, seed=5)
    assert evaluate(predictions, seed=5)["macro_f1_low"] != evaluate(predictions, seed=6)["macro_f1_low"]


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_the_score(seed):
    scores = evaluate(random_said(seed))
    for metric in ("accuracy", "macro_f1"):
        assert 0 <= scores[f"{metric}_low"] < scores[metric] < scores[f"{metric}_high"] <= 1


def test_order_of_documents_does_not_matter():
    predictions = random_said(0)
    order = np.random.default_rng(9).permutation(len(predictions.gold))
    shuffled = Predictions("x", predictions.labels, predictions.probabilities[order], predictions.gold[order])
    first, second = evaluate(predictions), evaluate(shuffled)
    for key in ("accuracy", "accuracy_low", "accuracy_high", "macro_f1"):
        assert first[key] == pytest.approx(second[key], abs=1e-12)


def test_perfect_predictions_end_at_one():
    gold = np.arange(60) % 3
    scores = evaluate(said(gold, gold))
    assert scores["accuracy"] == scores["macro_f1"] == scores["macro_f1_high"] == 1
    assert scores["accuracy_high"] == pytest.approx(1, abs=1e-12)
    assert 0.9 < scores["accuracy_low"] < 1


@pytest.fixture
def pair():
    """Right: both 20, only the first 9, only the second 1, neither 10."""
    return right([1] * 20 + [1] * 9 + [0] + [0] * 10, "a"), right([1] * 20 + [0] * 9 + [1] + [0] * 10, "b")


def test_exact_mcnemar_by_hand(pair):
    result = compare(*pair)
    assert (result["only_a"], result["only_b"]) == (9, 1)
    assert result["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert result["difference"] == pytest.approx(8 / 40)
    assert result["low"] < 8 / 40 < result["high"] < 1


def test_comparison_the_other_way_round_has_the_other_sign(pair):
    result, back = compare(*pair), compare(*pair[::-1])
    assert back["difference"] == -result["difference"]
    assert (back["only_a"], back["only_b"]) == (1, 9)
    assert back["p_value"] == result["p_value"]
    assert (back["low"], back["high"]) == pytest.approx((-result["high"], -result["low"]))


def test_comparison_is_paired():
    """The same two accuracies: near-certain when one is right wherever the other is, open when they disagree at random."""
    a, inside = right([1] * 30 + [0] * 10), right([1] * 24 + [0] * 16)
    apart = right([0] * 10 + [1] * 20 + [1] * 4 + [0] * 6)
    assert inside.correct.sum() == apart.correct.sum()
    assert compare(a, inside)["p_value"] < 0.05 < compare(a, apart)["p_value"]
    assert compare(a, inside)["low"] > compare(a, apart)["low"]


def test_equal_predictions_do_not_differ(pair):
    result = compare(pair[0], pair[0])
    assert (result["difference"], result["low"], result["high"], result["p_value"]) == (0, 0, 0, 1)


def test_difference_that_is_the_same_everywhere():
    result = compare(right([1] * 10), right([0] * 10))
    assert (result["difference"], result["low"], result["high"]) == (1, 1, 1)
    assert result["p_value"] == pytest.approx(2 / 2**10)


@pytest.mark.parametrize(
    "other",
    [
        said([0, 1], [1, 0], ("a", "b"), "two"),
        said([0, 1, 0], [0, 1, 0], ("a", "b"), "two"),
        said([0, 1], [0, 1], ("b", "a"), "two"),
    ],
    ids=["gold", "number", "labels"],
)
def test_comparison_on_other_documents_is_refused(other):
    with pytest.raises(BookError, match="one and two were not tested on the same documents") as caught:
        compare(said([0, 1], [0, 1], ("a", "b"), "one"), other)
    assert "\n" not in str(caught.value)


def test_table_has_a_row_for_each_approach(pair):
    a = right(pair[0].correct, "a", seconds=0.5, training_seconds=12.25, trainable_parameters=1_234_567)
    results = table([a, pair[1]])
    assert list(results.index) == ["a", "b"] and results.index.name == "approach"
    assert list(results.columns) == [
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "macro_f1",
        "macro_f1_low",
        "macro_f1_high",
        "micro_f1",
        "trainable_parameters",
        "training_seconds",
        "documents_per_second",
    ]
    assert results.loc["a", "accuracy"] == 72.5
    assert results.loc["a", "documents_per_second"] == 80
    assert results.loc["a", "macro_f1_low"] == pytest.approx(100 * evaluate(a)["macro_f1_low"])


def test_shown_table_is_for_readers(pair):
    a = right(pair[0].correct, "a", seconds=0.5, training_seconds=1234.4, trainable_parameters=1_234_567)
    shown = show(table([a, pair[1]]))
    assert list(shown.index) == ["a", "b"]
    assert [column.strip() for column in shown.columns] == [
        "accuracy %",
        "95 % interval",
        "macro-F1 %",
        "95 % interval",
        "trained numbers",
        "training s",
        "documents/s",
    ]
    low, high = (100 * limit for limit in proportion_confint(29, 40, method="wilson"))
    assert list(shown.iloc[0, :2]) == ["72.5", f"{low:.1f}\xa0to\xa0{high:.1f}"]
    scores = evaluate(a)
    assert shown.iloc[0, 2] == f"{100 * scores['macro_f1']:.1f}"
    assert shown.iloc[0, 3] == f"{100 * scores['macro_f1_low']:.1f}\xa0to\xa0{100 * scores['macro_f1_high']:.1f}"
    assert list(shown.iloc[0, 4:]) == ["1,234,567", "1,234", "80.0"]
    assert list(shown.iloc[1, 4:]) == ["0", "0.0", "—"]


def test_measure_times_the_block():
    with measure() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 1
    seconds = cost.seconds
    time.sleep(0.01)
    assert cost.seconds == seconds


def test_one_document_has_no_interval():
    with pytest.raises(BookError, match="one document"):
        evaluate(said([0], [0]))
