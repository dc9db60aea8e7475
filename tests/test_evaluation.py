import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_predictions, with_counts
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import f1_score
from statsmodels.stats.proportion import proportion_confint

from helpers import profiles
from helpers.errors import BookError
from helpers.evaluation import Predictions, compare, evaluate, measure, pool, show, table

ABC = ("a", "b", "c")


def certain(predicted, gold, labels=ABC, name="x", **cost):
    """Predictions of `predicted`, each with probability 1."""
    return Predictions(name, labels, np.eye(len(labels))[np.asarray(predicted)], gold, **cost)


def right(correct, name="x", **cost):
    """Predictions of two labels that are right where `correct` says so."""
    correct = np.asarray(correct, dtype=bool)
    gold = np.arange(len(correct)) % 2
    return certain(np.where(correct, gold, 1 - gold), gold, ("a", "b"), name, **cost)


@pytest.mark.parametrize(
    "probabilities, gold, words",
    [
        ([[0.5, 0.5]], [0], "need the shape (1, 3)"),
        ([[1, 0, 0]], [0, 1], "need the shape (2, 3)"),
        ([1, 0, 0], [0], "need the shape (1, 3)"),
        ([[1, 0, 0], [0.5, 0.5, 0.5]], [0, 1], "row 1 has no probabilities"),
        ([[2.0, -1.0, -3.0]], [0], "row 0 has no probabilities"),
        ([[1.5, -0.5, 0.0]], [0], "row 0 has no probabilities"),
        ([[1, 0, 0], [np.nan, 0.5, 0.5]], [0, 1], "row 1 has no probabilities"),
        ([[np.inf, 0, 0]], [0], "row 0 has no probabilities"),
        ([[1, 0, 0]], [3], "gold needs the shape (1,) and numbers from 0 to 2"),
        ([[1, 0, 0], [1, 0, 0]], [-1, 0], "gold needs"),
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
    assert np.isnan(certain([0], [0]).documents_per_second)


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


def random_labels(seed, n=120):
    generator = np.random.default_rng(seed)
    gold = generator.integers(0, 3, n)
    predicted = np.where(generator.random(n) < 0.6, gold, generator.integers(0, 3, n))
    return certain(predicted, gold, (*ABC, "never"))


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_is_that_of_scikit_learn_over_the_labels_in_gold(seed):
    predictions = random_labels(seed)
    expected = f1_score(predictions.gold, predictions.predicted, labels=[0, 1, 2], average="macro")
    assert evaluate(predictions)["macro_f1"] == pytest.approx(expected)
    assert expected > f1_score(predictions.gold, predictions.predicted, labels=[0, 1, 2, 3], average="macro", zero_division=0)


def macro_f1(gold, predicted):
    """scikit-learn's, over the labels that occur in `gold`."""
    present = np.unique(gold) if gold.ndim == 1 else np.flatnonzero(gold.any(axis=0))
    return f1_score(gold, predicted, labels=present, average="macro", zero_division=0)


def test_bootstrap_of_macro_f1_is_that_of_scikit_learn_on_every_resample():
    predictions, n_resamples = random_predictions(0, n=20, n_labels=8), 200
    scores = evaluate(predictions, n_resamples=n_resamples, seed=3)
    rows = np.random.default_rng(3).integers(0, 20, (n_resamples, 20))
    resampled = [macro_f1(predictions.gold[index], predictions.predicted[index]) for index in rows]
    assert min(len(np.unique(predictions.gold[index])) for index in rows) < 6  # labels are absent from many resamples
    expected = np.percentile(resampled, [2.5, 97.5])
    assert (scores["macro_f1_low"], scores["macro_f1_high"]) == pytest.approx(expected, abs=1e-9)


def test_many_rare_labels_leave_the_score_inside_its_interval():
    predictions = random_predictions(0, n=300, n_labels=66, skill=4.0)
    scores = evaluate(predictions)
    below = (scores["macro_f1"] - scores["macro_f1_low"]) / (scores["macro_f1_high"] - scores["macro_f1_low"])
    assert 0.3 < below < 0.7


def test_macro_f1_of_several_labels_a_document_leaves_out_those_that_no_document_has():
    gold = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    predictions = Predictions("x", ABC, [[0.9, 0.8, 0.6], [0.9, 0.1, 0.1], [0.2, 0.9, 0.1]], gold)
    assert evaluate(predictions)["macro_f1"] == pytest.approx((1 + 0.5) / 2)  # and not a third of it
    assert evaluate(replace(predictions, gold=np.zeros((3, 3))))["macro_f1"] == 0


@pytest.fixture(scope="module")
def seeds():
    """Two approaches on three test sets, of which one is small and lacks a label."""
    sizes = {1: (40, 5), 2: (60, 5), 3: (25, 4)}
    of_a = [random_predictions(seed, n, 5, name="a", gold=np.arange(n) % present) for seed, (n, present) in sizes.items()]
    return of_a, [random_predictions(9 + n, len(a.gold), 5, 1.0, "b", a.gold) for n, a in enumerate(of_a)]


def test_macro_f1_of_pooled_seeds_is_the_mean_over_seeds(seeds):
    of_a, of_b = seeds
    pooled = pool(of_a)
    assert pooled.runs.tolist() == [0] * 40 + [1] * 60 + [2] * 25
    mean_a, mean_b = (np.mean([macro_f1(each.gold, each.predicted) for each in of]) for of in seeds)
    assert evaluate(pooled)["macro_f1"] == pytest.approx(mean_a)
    assert abs(mean_a - macro_f1(pooled.gold, pooled.predicted)) > 0.002  # what it would be as one run
    found = compare(pooled, pool(of_b), n_resamples=200)
    assert found["macro_f1_difference"] == pytest.approx(mean_a - mean_b)
    assert found["macro_f1_low"] < found["macro_f1_difference"] < found["macro_f1_high"]
    assert found["difference"] == pytest.approx(pooled.correct.mean() - pool(of_b).correct.mean())  # over documents


def test_every_resample_of_pooled_seeds_takes_the_mean_over_seeds(seeds):
    pooled, n_resamples = pool(seeds[0]), 100
    scores = evaluate(pooled, n_resamples=n_resamples, seed=3)
    resampled = []
    for rows in np.random.default_rng(3).integers(0, 125, (n_resamples, 125)):
        of_run = [rows[pooled.runs[rows] == run] for run in range(3)]
        resampled.append(np.mean([macro_f1(pooled.gold[index], pooled.predicted[index]) for index in of_run]))
    assert (scores["macro_f1_low"], scores["macro_f1_high"]) == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=1e-9)


def test_a_seed_that_a_resample_does_not_draw_does_not_count():
    parts = [certain([0, 1], [0, 1], groups=np.array(["x", "x"])), certain([0, 0], [0, 1], groups=np.array(["y", "y"]))]
    scores = evaluate(pool(parts))  # a resample has both groups, or one of them twice
    assert scores["macro_f1"] == pytest.approx((1 + 1 / 3) / 2)
    assert (scores["macro_f1_low"], scores["macro_f1_high"]) == pytest.approx((1 / 3, 1))


def test_bootstrap_is_reproducible_and_seeded():
    predictions = random_labels(0)
    assert evaluate(predictions, seed=5) == evaluate(predictions, seed=5)
    assert evaluate(predictions, seed=5)["macro_f1_low"] != evaluate(predictions, seed=6)["macro_f1_low"]


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_the_score(seed):
    scores = evaluate(random_labels(seed))
    for metric in ("accuracy", "macro_f1"):
        assert 0 <= scores[f"{metric}_low"] < scores[metric] < scores[f"{metric}_high"] <= 1


def test_order_of_documents_does_not_matter():
    predictions = random_labels(0)
    order = np.random.default_rng(9).permutation(len(predictions.gold))
    shuffled = Predictions("x", predictions.labels, predictions.probabilities[order], predictions.gold[order])
    first, second = evaluate(predictions), evaluate(shuffled)
    for key in ("accuracy", "accuracy_low", "accuracy_high", "macro_f1"):
        assert first[key] == pytest.approx(second[key], abs=1e-12)


def test_perfect_predictions_end_at_one():
    gold = np.arange(60) % 3
    scores = evaluate(certain(gold, gold))
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
        certain([0, 1], [1, 0], ("a", "b"), "two"),
        certain([0, 1, 0], [0, 1, 0], ("a", "b"), "two"),
        certain([0, 1], [0, 1], ("b", "a"), "two"),
    ],
    ids=["gold", "number", "labels"],
)
def test_comparison_on_other_documents_is_refused(other):
    with pytest.raises(BookError, match="one and two have different (gold|labels): compare them on the same documents") as caught:
        compare(certain([0, 1], [0, 1], ("a", "b"), "one"), other)
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


@pytest.mark.parametrize("groups", [None, np.array(["x", "x", "x"])])
def test_one_document_or_group_has_no_interval(groups):
    predictions = certain([0], [0]) if groups is None else certain([0, 1, 2], [0, 1, 1], groups=groups)
    for call in (evaluate, lambda each: compare(each, each)):
        with pytest.raises(BookError, match="x: one document, or one group of them, gives no interval") as caught:
            call(predictions)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def random_pair():
    a = random_predictions(1, name="a")
    return a, random_predictions(2, skill=1.0, name="b", gold=a.gold)


def test_macro_f1_difference_and_interval_are_those_of_scikit_learn_on_every_resample(random_pair):
    a, b = random_pair

    def difference(rows):
        scores = [
            f1_score(a.gold[rows], p.predicted[rows], labels=range(4), average="macro", zero_division=0) for p in random_pair
        ]
        return scores[0] - scores[1]

    found = compare(a, b, n_resamples=100, seed=5)
    expected = bootstrap(
        (np.arange(80),), difference, vectorized=False, n_resamples=100, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert found["macro_f1_difference"] == pytest.approx(difference(np.arange(80)))
    assert (found["macro_f1_low"], found["macro_f1_high"]) == pytest.approx((expected.low, expected.high))


def test_paired_interval_is_the_one_of_scipy_on_paired_data(random_pair):
    a, b = random_pair
    found = compare(a, b, n_resamples=500, seed=3)
    expected = bootstrap(
        (a.correct.astype(float), b.correct.astype(float)),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        n_resamples=500,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("only_a, only_b, p", [(10, 2, 0.03857421875), (5, 0, 0.0625), (3, 3, 1.0), (0, 0, 1.0)])
def test_mcnemar_is_the_sign_test_on_the_disagreements(only_a, only_b, p):
    found = compare(*with_counts(only_a, only_b), n_resamples=100)
    assert found["p_value"] == pytest.approx(p)
    if only_a + only_b:
        assert found["p_value"] == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)


def copied(predictions, times, grouped):
    """The same documents `times` times over, with or without saying so."""
    rows = np.repeat(np.arange(len(predictions.gold)), times)
    groups = rows if grouped else None
    return Predictions(
        predictions.approach, predictions.labels, predictions.probabilities[rows], predictions.gold[rows], groups=groups
    )


GROUPS = np.arange(80) // 4


@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [
        ({"groups": GROUPS}, {}),
        ({}, {"groups": GROUPS}),
        ({"groups": GROUPS}, {"groups": np.arange(80) // 5}),
        ({"runs": GROUPS}, {}),
        ({"runs": GROUPS}, {"runs": np.arange(80) // 5}),
    ],
)
def test_unequal_groups_and_runs_are_refused(random_pair, of_a, of_b):
    with pytest.raises(BookError, match=f"^a and b have different {next(iter(of_a or of_b))}") as caught:
        compare(replace(random_pair[0], **of_a), replace(random_pair[1], **of_b))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("groups", [None, GROUPS, np.arange(80) // 16])
def test_either_way_round_a_comparison_says_the_same(random_pair, groups):
    a, b = (replace(each, groups=groups) for each in random_pair)
    there, back = compare(a, b, n_resamples=500), compare(b, a, n_resamples=500)
    assert there["p_value"] == back["p_value"] and (there["only_a"], there["only_b"]) == (back["only_b"], back["only_a"])
    for metric in ("", "macro_f1_", "micro_f1_"):
        mirrored = [-back[f"{metric}{name}"] for name in ("difference", "high", "low")]
        assert [there[f"{metric}{name}"] for name in ("difference", "low", "high")] == pytest.approx(mirrored, abs=1e-12)


def test_groups_of_one_document_change_nothing(random_pair):
    alone = [Predictions(p.approach, p.labels, p.probabilities, p.gold, groups=np.arange(80)) for p in random_pair]
    assert compare(*alone, n_resamples=200) == compare(*random_pair, n_resamples=200)


def test_copies_of_documents_in_groups_are_no_evidence(random_pair):
    once = compare(*random_pair, n_resamples=4000)
    grouped = compare(*(copied(p, 4, True) for p in random_pair), n_resamples=4000)
    naive = compare(*(copied(p, 4, False) for p in random_pair), n_resamples=4000)
    assert grouped["p_value"] == pytest.approx(once["p_value"], abs=0.03)
    assert naive["p_value"] < once["p_value"] / 4
    for name in ("low", "high", "macro_f1_low", "macro_f1_high", "micro_f1_low", "micro_f1_high"):
        assert grouped[name] == pytest.approx(once[name], abs=0.01)
    assert naive["high"] - naive["low"] < 0.6 * (once["high"] - once["low"])


def test_groups_that_are_always_right_together_widen_an_interval():
    right = np.repeat(np.random.default_rng(0).random(20) < 0.6, 10)
    said = np.eye(2)[np.where(right, 0, 1)]
    of_groups, of_documents = (
        evaluate(Predictions("x", ("a", "b"), said, np.zeros(200), groups=groups))
        for groups in (np.repeat(np.arange(20), 10), None)
    )
    width, naive = (each["macro_f1_high"] - each["macro_f1_low"] for each in (of_groups, of_documents))
    assert 2 < width / naive < 5  # about the square root of 10


def test_pooling_keeps_groups_only_if_all_have_them():
    with_groups = random_predictions(1, groups=np.arange(80) // 2)
    assert pool([with_groups, with_groups]).groups.tolist() == (np.arange(80) // 2).tolist() * 2
    assert pool([with_groups, random_predictions(2)]).groups is None


def test_a_group_is_needed_for_each_document():
    with pytest.raises(BookError, match=r"groups, if any, \(80,\)"):
        random_predictions(1, groups=np.arange(3))


def test_micro_f1_difference_is_that_of_scikit_learn():
    generator = np.random.default_rng(3)
    gold = generator.integers(2, size=(50, 4))
    a, b = (Predictions(name, tuple("abcd"), generator.random((50, 4)), gold) for name in "ab")
    scores = [f1_score(gold, each.predicted, average="micro") for each in (a, b)]
    found = compare(a, b, n_resamples=200)
    assert found["micro_f1_difference"] == pytest.approx(scores[0] - scores[1])
    assert found["micro_f1_low"] < found["micro_f1_difference"] < found["micro_f1_high"]


def test_pooling_puts_the_test_sets_behind_one_another():
    parts = [random_predictions(seed, seconds=2.0, test_set=f"s{seed}") for seed in (1, 2)]
    whole = pool(parts)
    assert whole.correct.tolist() == [*parts[0].correct, *parts[1].correct]
    assert (whole.seconds, whole.test_set) == (4.0, "s1 s2")
    other = pool([random_predictions(seed, test_set=f"s{seed}", name="y") for seed in (1, 3)])
    with pytest.raises(BookError, match="same documents"):
        compare(whole, other)


def test_a_gpu_has_done_what_was_timed(monkeypatch):
    waited = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(synchronize=lambda: waited.append(len(waited))))
    monkeypatch.setattr(profiles, "current", lambda: SimpleNamespace(device="cuda"))
    with measure():
        assert waited == [0]
    assert waited == [0, 1]


def test_pooled_costs():
    parts = [random_predictions(seed, seconds=2.0, training_seconds=float(seed)) for seed in (1, 2)]
    pooled = pool(parts)
    assert (pooled.seconds, pooled.training_seconds) == (4.0, 1.5)  # in all; of one training


def test_documents_that_share_a_group_widen_the_interval_of_accuracy():
    right = np.repeat(np.random.default_rng(0).random(20) < 0.7, 10)  # twenty groups, right or wrong together
    gold = np.arange(200) % 2
    alone = certain(np.where(right, gold, 1 - gold), gold)
    grouped = replace(alone, groups=np.repeat([f"g{n}" for n in range(20)], 10))
    narrow, wide = evaluate(alone), evaluate(grouped)
    assert (narrow["accuracy_low"], narrow["accuracy_high"]) == proportion_confint(right.sum(), 200, method="wilson")
    assert wide["accuracy_high"] - wide["accuracy_low"] > 2 * (narrow["accuracy_high"] - narrow["accuracy_low"])
    same_twice = evaluate(pool([grouped, grouped]))
    assert same_twice["accuracy_high"] - same_twice["accuracy_low"] > 1.8 * (narrow["accuracy_high"] - narrow["accuracy_low"])
