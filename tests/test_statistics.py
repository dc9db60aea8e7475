"""The statistics of chapter 06, each against a library, a worked example or a simulation."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score

from helpers import runs
from helpers.errors import BookError
from helpers.evaluation import (
    Predictions,
    compare,
    comparisons,
    evaluate,
    expected_calibration_error,
    measure,
    minimum_detectable_effect,
    pool,
    power,
    reliability,
    risk_coverage,
    spread,
)


def random_predictions(seed, n=80, n_labels=4, skill=2.0, name="x", gold=None, **more):
    generator = np.random.default_rng(seed)
    gold = generator.integers(n_labels, size=n) if gold is None else gold
    logits = generator.normal(size=(len(gold), n_labels))
    logits[np.arange(len(gold)), gold] += skill
    odds = np.exp(logits)
    return Predictions(name, tuple("abcdefgh"[:n_labels]), odds / odds.sum(axis=1, keepdims=True), gold, **more)


def with_counts(only_a, only_b, both=30, neither=10):
    """Two classifiers that disagree as said, on two labels."""
    correct_a = np.repeat([True, False, True, False], [only_a, only_b, both, neither])
    correct_b = np.repeat([False, True, True, False], [only_a, only_b, both, neither])
    gold = np.arange(len(correct_a)) % 2
    return tuple(
        Predictions(name, ("x", "y"), np.eye(2)[np.where(correct, gold, 1 - gold)], gold)
        for name, correct in {"a": correct_a, "b": correct_b}.items()
    )


@pytest.fixture(scope="module")
def pair():
    a = random_predictions(1, name="a")
    return a, random_predictions(2, skill=1.0, name="b", gold=a.gold)


def test_macro_f1_difference_and_interval_are_those_of_scikit_learn_on_every_resample(pair):
    a, b = pair

    def difference(rows):
        scores = [f1_score(a.gold[rows], p.predicted[rows], labels=range(4), average="macro", zero_division=0) for p in pair]
        return scores[0] - scores[1]

    found = compare(a, b, n_resamples=100, seed=5)
    expected = bootstrap(
        (np.arange(80),), difference, vectorized=False, n_resamples=100, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert found["macro_f1_difference"] == pytest.approx(difference(np.arange(80)))
    assert (found["macro_f1_low"], found["macro_f1_high"]) == pytest.approx((expected.low, expected.high))


def test_paired_interval_is_the_one_of_scipy_on_paired_data(pair):
    a, b = pair
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


def test_a_classifier_against_itself_is_no_different(pair):
    found = compare(pair[0], pair[0], n_resamples=100)
    assert found["macro_f1_difference"] == found["macro_f1_low"] == found["macro_f1_high"] == 0


def test_holm_by_hand():
    family = comparisons({str(n): with_counts(n, 0) for n in (6, 8, 4, 10)}, n_resamples=50)
    raw = [2 * 0.5**n for n in (6, 8, 4, 10)]  # 1/32, 1/128, 1/8, 1/512
    assert family["p_value"].tolist() == pytest.approx(raw)
    assert family["p_holm"].tolist() == pytest.approx([2 / 32, 3 / 128, 1 / 8, 4 / 512])
    assert family.index.tolist() == ["6", "8", "4", "10"]


def test_holm_never_falls_below_the_p_value_nor_above_bonferroni():
    family = comparisons({str(n): with_counts(n, 12 - n) for n in range(13)}, n_resamples=50)
    assert (family["p_holm"] >= family["p_value"] - 1e-12).all()
    assert (family["p_holm"] <= np.minimum(13 * family["p_value"], 1) + 1e-12).all()


def copied(predictions, times, grouped):
    """The same documents `times` times over, with or without saying so."""
    rows = np.repeat(np.arange(len(predictions.gold)), times)
    groups = rows if grouped else None
    return Predictions(
        predictions.approach, predictions.labels, predictions.probabilities[rows], predictions.gold[rows], groups=groups
    )


def test_groups_of_one_document_change_nothing(pair):
    alone = [Predictions(p.approach, p.labels, p.probabilities, p.gold, groups=np.arange(80)) for p in pair]
    assert compare(*alone, n_resamples=200) == compare(*pair, n_resamples=200)


def test_copies_of_documents_in_groups_are_no_evidence(pair):
    once = compare(*pair, n_resamples=4000)
    grouped = compare(*(copied(p, 4, True) for p in pair), n_resamples=4000)
    naive = compare(*(copied(p, 4, False) for p in pair), n_resamples=4000)
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
    with pytest.raises(BookError, match="3 groups for 80 documents"):
        random_predictions(1, groups=np.arange(3))


def test_micro_f1_difference_is_that_of_scikit_learn():
    generator = np.random.default_rng(3)
    gold = generator.integers(2, size=(50, 4))
    a, b = (Predictions(name, tuple("abcd"), generator.random((50, 4)), gold) for name in "ab")
    scores = [f1_score(gold, each.predicted, average="micro") for each in (a, b)]
    found = compare(a, b, n_resamples=200)
    assert found["micro_f1_difference"] == pytest.approx(scores[0] - scores[1])
    assert found["micro_f1_low"] < found["micro_f1_difference"] < found["micro_f1_high"]


@pytest.mark.parametrize("other", ["test set", "gold", "labels"])
def test_other_documents_are_refused(pair, other):
    a = random_predictions(1, name="a", test_set="one")
    b = {
        "test set": random_predictions(1, name="b", test_set="two"),
        "gold": random_predictions(9, name="b", test_set="one"),
        "labels": random_predictions(1, name="b", n_labels=5),
    }[other]
    with pytest.raises(BookError, match="a and b were not tested on the same documents"):
        compare(a, b)


def test_pooling_puts_the_test_sets_behind_one_another():
    parts = [random_predictions(seed, seconds=2.0, tokens=7, test_set=f"s{seed}") for seed in (1, 2)]
    whole = pool(parts)
    assert whole.correct.tolist() == [*parts[0].correct, *parts[1].correct]
    assert (whole.seconds, whole.tokens, whole.test_set) == (4.0, 14, "s1 s2")
    other = pool([random_predictions(seed, test_set=f"s{seed}", name="y") for seed in (1, 3)])
    with pytest.raises(BookError, match="same documents"):
        compare(whole, other)


def test_spread_finds_what_a_simulation_put_in():
    generator, results = np.random.default_rng(0), []
    for seed in range(300):
        correct = generator.random(500) < np.clip(generator.normal(0.8, 0.03), 0, 1)
        results.append(Predictions("x", ("a", "b"), np.eye(2)[np.where(correct, 0, 1)], np.zeros(500), test_set=str(seed)))
    found = spread(results)
    assert found["mean"] == pytest.approx(0.8, abs=0.005)
    assert found["documents"] == pytest.approx((0.8 * 0.2 / 500) ** 0.5, rel=0.05)
    assert found["training"] == pytest.approx(0.03, rel=0.15)
    assert found["between_seeds"] ** 2 == pytest.approx(found["documents"] ** 2 + found["training"] ** 2)


def test_spread_is_never_negative_and_needs_different_test_sets():
    same = [random_predictions(1, test_set=str(seed)) for seed in range(3)]
    assert spread(same)["training"] == spread(same)["between_seeds"] == 0
    with pytest.raises(BookError, match="one seed has no spread"):
        spread(same[:1])
    with pytest.raises(BookError, match="same test set"):
        spread([same[0], same[0]])


@pytest.mark.parametrize("n, disagree, difference", [(300, 0.1, 0.05), (500, 0.2, 0.03), (100, 0.3, 0.1)])
def test_power_is_what_a_simulation_of_the_test_finds(n, disagree, difference):
    generator = np.random.default_rng(0)
    k = generator.binomial(n, disagree, size=20_000)
    wins = generator.binomial(k, (disagree + difference) / (2 * disagree))
    p_values = np.minimum(2 * binom.cdf(np.minimum(wins, k - wins), k, 0.5), 1)
    found = np.mean(p_values <= 0.05)
    assert power(difference, n, disagree) == pytest.approx(found, abs=0.01)


def test_detectable_effect_has_the_power_it_promises_and_falls_with_the_documents():
    effects = [minimum_detectable_effect(n, 0.1) for n in (100, 300, 1000, 5000)]
    assert effects == sorted(effects, reverse=True)
    for n, effect in zip((100, 300, 1000, 5000), effects, strict=True):
        assert power(effect, n, 0.1) == pytest.approx(0.8, abs=1e-6)
    # Connor 1987, Biometrics 43: the normal approximation
    n, z_alpha, z_beta, effect = 5000, 1.959964, 0.841621, effects[-1]
    assert n == pytest.approx((z_alpha * 0.1**0.5 + z_beta * (0.1 - effect**2) ** 0.5) ** 2 / effect**2, rel=0.03)


def test_detectable_effect_knows_its_limits():
    assert np.isnan(minimum_detectable_effect(20, 0.05))  # one document of twenty shows nothing
    for share in (0, 1.5, -0.1):
        with pytest.raises(BookError, match="share of the documents"):
            minimum_detectable_effect(100, share)


def two_labels(confidence, correct):
    confidence = np.asarray(confidence)
    return Predictions("x", ("a", "b"), np.stack([confidence, 1 - confidence], axis=1), np.where(correct, 0, 1))


def test_calibration_error_by_hand():
    predictions = two_labels([0.95, 0.95, 0.75, 0.65], [True, False, True, True])
    rows = reliability(predictions)
    assert rows["documents"].tolist() == [1, 1, 2]
    assert rows["accuracy"].tolist() == [1, 1, 0.5]
    # (|1 - .65| + |1 - .75| + 2 |.5 - .95|) / 4
    assert expected_calibration_error(predictions) == pytest.approx((0.35 + 0.25 + 0.9) / 4)


def test_reliability_is_the_curve_of_scikit_learn():
    predictions = random_predictions(4, n=500)
    rows = reliability(predictions)
    frequency, mean = calibration_curve(predictions.correct, predictions.probabilities.max(axis=1), n_bins=10)
    assert rows["accuracy"].tolist() == pytest.approx(frequency.tolist())
    assert rows["confidence"].tolist() == pytest.approx(mean.tolist())
    assert rows["documents"].sum() == 500


def test_calibration_error_is_small_if_confidence_is_true_and_does_not_know_the_order():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, size=20_000)
    correct = generator.random(20_000) < confidence
    error = expected_calibration_error(two_labels(confidence, correct))
    assert error < 0.015
    order = generator.permutation(20_000)
    assert expected_calibration_error(two_labels(confidence[order], correct[order])) == pytest.approx(error)
    assert expected_calibration_error(two_labels(np.full(10, 1.0), [False] * 10)) == pytest.approx(1)


def test_calibration_of_many_labels_a_document_counts_every_label():
    predictions = Predictions("x", ("a", "b"), [[0.95, 0.15], [0.95, 0.85]], [[1, 0], [0, 1]])
    assert reliability(predictions)["documents"].tolist() == [1, 1, 2]
    assert expected_calibration_error(predictions) == pytest.approx((0.15 + 0.15 + 0.9) / 4)


def test_risk_and_coverage_by_hand():
    rows = risk_coverage(two_labels([0.9, 0.8, 0.7, 0.6], [True, True, False, True]))
    assert rows["coverage"].tolist() == [0.25, 0.5, 0.75, 1]
    assert rows["risk"].tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])
    tied = risk_coverage(two_labels([0.9, 0.7, 0.7, 0.7], [True, False, True, True]))  # answered together, in any order
    assert tied["coverage"].tolist() == [0.25, 1]
    assert tied["risk"].tolist() == pytest.approx([0, 1 / 4])


def test_risk_of_answering_everything_is_the_error_rate():
    predictions = random_predictions(3)
    rows = risk_coverage(predictions)
    assert rows["coverage"].iloc[-1] == 1
    assert rows["risk"].iloc[-1] == pytest.approx(1 - predictions.correct.mean())
    assert rows["coverage"].is_monotonic_increasing


def test_risk_of_many_labels_a_document_goes_by_the_least_certain():
    rows = risk_coverage(Predictions("x", ("a", "b"), [[0.9, 0.9], [0.99, 0.6]], [[1, 1], [1, 0]]))
    assert rows["coverage"].tolist() == [0.5, 1]
    assert rows["risk"].tolist() == [0, 0.5]


def test_memory_of_a_block_is_its_own():
    runs.give_back_memory()  # else the block may get memory that earlier tests have freed and the process has kept
    with measure() as small:
        pass
    with measure() as large:
        block = bytearray(200_000_000)
        block[::4096] = b"x" * len(block[::4096])
        del block
    with measure() as after:
        pass
    if small.peak_memory is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert large.peak_memory - small.peak_memory > 150_000_000
    assert large.peak_memory - after.peak_memory > 150_000_000
