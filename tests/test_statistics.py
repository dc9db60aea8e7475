"""The statistics of chapters 06 to 08, each against a library, a worked example or a simulation."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_predictions, with_counts
from scipy.stats import binom
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score

from helpers.bootstrap import scores
from helpers.errors import BookError
from helpers.evaluation import Predictions
from helpers.lab.statistics import (
    METRICS,
    comparisons,
    decide,
    expected_calibration_error,
    minimum_detectable_effect,
    of_settings,
    over_seeds,
    power,
)
from helpers.records import predictions_of


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
    # (|1 - .65| + |1 - .75| + 2 |.5 - .95|) / 4
    assert expected_calibration_error(predictions) == pytest.approx((0.35 + 0.25 + 0.9) / 4)


def test_calibration_error_is_that_of_the_curve_of_scikit_learn():
    predictions = random_predictions(4, n=500)
    confidence = predictions.probabilities.max(axis=1)
    frequency, mean = calibration_curve(predictions.correct, confidence, n_bins=10)
    documents, _ = np.histogram(confidence, bins=10, range=(0, 1))
    expected = np.average(np.abs(frequency - mean), weights=documents[documents > 0])
    assert expected_calibration_error(predictions) == pytest.approx(expected)


def test_calibration_error_is_small_if_confidence_is_true_and_does_not_know_the_order():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, size=20_000)
    correct = generator.random(20_000) < confidence
    error = expected_calibration_error(two_labels(confidence, correct))
    assert error < 0.015
    order = generator.permutation(20_000)
    assert expected_calibration_error(two_labels(confidence[order], correct[order])) == pytest.approx(error)
    assert expected_calibration_error(two_labels(np.full(10, 1.0), [False] * 10)) == pytest.approx(1)


def run_of(name, seed, right, setting=8, **settings):
    """A record of 40 documents in 20 groups, of two labels; `right` says which are predicted right."""
    gold = np.arange(40) % 2
    predicted = np.where(right, gold, 1 - gold)
    groups = [f"{(row // 2) + 100 * seed:08x}" for row in range(40)]
    key = {"task": "news", "options": {"per_class": setting}, "seed": seed, "profile": "quick", "settings": settings}
    parts = {"gold": gold.tolist(), "probabilities": np.eye(2)[predicted].tolist(), "groups": groups}
    return {"key": key, "name": name, "labels": ["a", "b"], "test_set": f"test {seed}", "cost": {}, **parts}


def said(records):
    return [predictions_of(record) for record in records]


def answers(share, seed=0):
    return np.random.default_rng(seed).random(40) < share


def test_a_difference_over_seeds_is_the_mean_of_theirs():
    good, bad = ([run_of(name, seed, answers(share, seed)) for seed in (0, 1, 2)] for name, share in (("a", 0.95), ("b", 0.6)))
    found = over_seeds(*map(said, (good, bad)), n_resamples=2000)
    f1 = [[f1_score(r["gold"], np.argmax(r["probabilities"], 1), average="macro") for r in side] for side in (good, bad)]
    assert found["difference"] == pytest.approx(np.mean(np.subtract(*f1)))
    assert found["low"] < found["difference"] < found["high"] and found["p_value"] < 0.01
    back = over_seeds(*map(said, (bad, good)), n_resamples=2000)
    assert back["difference"] == -found["difference"] and back["low"] == pytest.approx(-found["high"])


def test_seeds_that_disagree_widen_the_interval():
    b = [run_of("b", seed, answers(0.7, 9)) for seed in (0, 1, 2)]
    alike = [run_of("a", seed, answers(0.8, 1)) for seed in (0, 1, 2)]
    apart = [run_of("a", seed, answers(share, 1)) for seed, share in ((0, 0.6), (1, 0.8), (2, 1.0))]
    narrow, wide = (over_seeds(said(each), said(b), n_resamples=2000) for each in (alike, apart))
    assert wide["high"] - wide["low"] > 1.3 * (narrow["high"] - narrow["low"])


def test_nothing_is_shown_where_nothing_is():
    same = [run_of("a", seed, answers(0.8, seed)) for seed in (0, 1)]
    found = over_seeds(said(same), said(same), n_resamples=500)
    assert (found["difference"], found["low"], found["high"], found["p_value"]) == (0, 0, 0, 1)


def test_records_are_sorted_by_setting_and_name():
    made = [run_of("a", 1, answers(0.5), rank=4), run_of("b", 0, answers(0.5)), run_of("a", 0, answers(0.5), rank=4)]
    found = of_settings([*made, run_of("a", 0, answers(0.5), setting=32, rank=4)])
    assert {key: [r["key"]["seed"] for r in rows] for key, rows in found.items()} == {
        ("news, 8", "a"): [0, 1],
        ("news, 8", "b"): [0],
        ("news, 32", "a"): [0],
    }


@pytest.mark.parametrize(
    "other, words",
    [
        (run_of("a", 1, answers(0.5), rank=4, prefix="Say:"), "prefix is 'Say:', elsewhere ''"),
        (run_of("a", 1, answers(0.5), rank=4, prefix="", probe_init=False), "probe_init is False, elsewhere None"),
        (run_of("b", 0, answers(0.5), rank=4, base_model="other"), "base_model is 'other', elsewhere None"),
        (run_of("b", 0, answers(0.5), rank=8), "rank is 8, elsewhere 4"),
        (run_of("b", 0, answers(0.5)) | {"test_set": "another"}, "test_set is 'another', elsewhere 'test 0'"),
        (run_of("a", 0, answers(0.5), rank=4, prefix=""), "two records of seed 0"),
    ],
)
def test_records_that_do_not_belong_together_are_refused(other, words):
    with pytest.raises(BookError, match=words) as caught:
        of_settings([run_of("a", 0, answers(0.5), rank=4, prefix=""), other])
    assert "\n" not in str(caught.value)


def test_other_seeds_are_not_compared():
    a, b = ([run_of(name, seed, answers(0.5))] for name, seed in (("a", 0), ("b", 1)))
    with pytest.raises(BookError, match="different groups"):
        over_seeds(said(a), said(b))


def test_decisions_are_chosen_for_the_metric_on_validation():
    generator = np.random.default_rng(0)
    gold = np.eye(4, dtype=int)[generator.integers(0, 4, 300)]  # always one label
    probabilities = np.clip(0.3 * gold + generator.random((300, 4)) * 0.4, 0, 1)
    validation, test = (
        Predictions("a", tuple("abcd"), probabilities[half], gold[half]) for half in (slice(150), slice(150, 300))
    )
    exact = decide(test, validation, "accuracy")
    best_cut = max(replace(test, thresholds=cut).correct.mean() for cut in np.linspace(0, 1, 101))
    assert exact.correct.mean() > best_cut + 0.02  # no threshold alone gives "at least one label"
    assert exact.predicted.sum(axis=1).min() == 1
    for metric, number in (("accuracy", 0), ("micro_f1", 2)):
        chosen = scores(decide(validation, validation, metric))[number]
        assert all(chosen >= scores(decide(validation, validation, other))[number] for other in METRICS)
