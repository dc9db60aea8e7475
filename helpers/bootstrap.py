"""What stands behind `evaluation`: scores of resampled documents or whole groups of them, intervals, tests."""

from collections.abc import Callable

import numpy as np
from scipy.stats import bootstrap, permutation_test
from statsmodels.stats.contingency_tables import mcnemar

from helpers.errors import BookError


def scores(predictions, weights: np.ndarray | None = None) -> np.ndarray:
    """Accuracy, macro-F1 and micro-F1, shape (3, …), where documents count as `weights` says, shape (…, n_documents)."""
    weights = np.ones(len(predictions.gold)) if weights is None else weights
    gold, predicted = predictions.gold, predictions.predicted
    if not predictions.multi_label:
        gold, predicted = (np.eye(len(predictions.labels))[each] for each in (gold, predicted))
    hits, counted = gold * predicted, gold + predicted
    runs = np.zeros(len(gold)) if predictions.runs is None else predictions.runs
    of_runs = []
    for rows in (runs == run for run in np.unique(runs)):
        present, *f1 = (weights[..., rows] @ each[rows] for each in (gold, hits, counted))
        f1 = np.ma.array(2 * f1[0] / np.maximum(f1[1], 1), mask=present == 0)
        of_runs.append(f1.mean(axis=-1, keepdims=True))
    accuracy = weights @ predictions.correct / weights.sum(axis=-1)
    macro_f1 = np.ma.filled(np.ma.concatenate(of_runs, axis=-1).mean(axis=-1), 0)
    micro_f1 = 2 * (weights @ hits.sum(axis=1)) / np.maximum(weights @ counted.sum(axis=1), 1)
    return np.stack([accuracy, macro_f1, micro_f1])


def _units(predictions) -> np.ndarray:
    """What a resample draws: the number of each document's group, or of the document itself, shape (n_documents,)."""
    groups = np.arange(len(predictions.gold)) if predictions.groups is None else predictions.groups
    return np.unique(groups, return_inverse=True)[1]


def check_pair(a, b) -> None:
    """Raise BookError if `a` and `b` are not of the same documents, groups and runs."""
    for name in ("labels", "gold", "groups", "runs", *(["test_set"] if a.test_set and b.test_set else [])):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise BookError(f"{a.approach} and {b.approach} have different {name}: compare them on the same documents.")


def independent(predictions) -> bool:
    """Whether every document is a unit of its own, predicted by one run."""
    return predictions.runs is None and len(np.unique(_units(predictions))) == len(predictions.gold)


def _weights(drawn: np.ndarray, unit_of: np.ndarray) -> np.ndarray:
    """How often each document counts where these units were drawn, shape (n_resamples, n_documents)."""
    return np.stack([np.bincount(row, minlength=unit_of.max() + 1) for row in drawn])[:, unit_of].astype(float)


def resamples(predictions, n_resamples: int, seed: int) -> np.ndarray:
    """How often each document counts in resamples of whole groups, shape (n_resamples, n_documents)."""
    unit_of = _units(predictions)
    n_units = unit_of.max() + 1
    return _weights(np.random.default_rng(seed).integers(0, n_units, (n_resamples, n_units)), unit_of)


def interval(statistic: Callable, predictions, confidence: float, n_resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Low and high of a statistic of how often each document was drawn, shape (n_resamples, n_documents)."""
    unit_of = _units(predictions)
    n_units = len(np.unique(unit_of))
    if n_units < 2:
        raise BookError(f"{predictions.approach}: one document, or one group of them, gives no interval. Evaluate on more.")

    def of_resamples(drawn: np.ndarray, axis: int) -> np.ndarray:
        return statistic(_weights(np.atleast_2d(drawn), unit_of))

    options = {"confidence_level": confidence, "n_resamples": n_resamples, "batch": 1000, "rng": np.random.default_rng(seed)}
    found = bootstrap((np.arange(n_units),), of_resamples, vectorized=True, method="percentile", **options)
    return found.confidence_interval.low, found.confidence_interval.high


def p_value(a, b, seed: int) -> float:
    """The exact McNemar test or, where documents share a group, a permutation test that swaps a and b in whole groups."""
    units = _units(a)
    if len(units) == len(np.unique(units)):
        only_a, only_b = (a.correct & ~b.correct).sum(), (b.correct & ~a.correct).sum()
        return float(mcnemar([[0, only_a], [only_b, 0]], exact=True).pvalue)
    sides = [np.bincount(units, weights=each.correct) for each in (a, b)]
    options = {"permutation_type": "samples", "vectorized": True, "batch": 1000, "rng": np.random.default_rng(seed)}
    return float(permutation_test(sides, lambda x, y, axis: (x - y).sum(axis=axis), **options).pvalue)
