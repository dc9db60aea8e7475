"""Predictions, the same for every approach, and what is computed from them.

After `Predictions` nothing knows which approach it came from: the same metric code for all makes the comparison fair.
Chapter 06 explains the statistics.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from scipy.stats import binom, bootstrap, permutation_test
from sklearn.metrics import f1_score, precision_recall_curve
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from helpers.errors import BookError


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an approach says about the documents of a test set, and what it cost.

    Attributes:
        approach: its name in tables and figures.
        labels: the label names, in the order of the columns of `probabilities`.
        probabilities: shape (n_documents, n_labels); every row sums to 1, except in a multi-label task.
        gold: shape (n_documents,), the true label of each document as an index into `labels`; in a multi-label task
            (n_documents, n_labels), zeros and ones.
        seconds: wall-clock time of predicting all documents, tokenization included.
        training_seconds: wall-clock time of training.
        trainable_parameters: numbers that training changed.
        tokens: the model read while predicting, padding left out; 0 for approaches without a tokenizer.
        peak_memory: while predicting, in bytes, as `measure` has it.
        thresholds: multi-label, from which probability on a label is said: one for all labels, or one each, or (of results
            that `pool` put together) one for each document and label.
        test_set: a fingerprint of the test documents, "" if unknown; `compare` refuses two that differ.
        groups: shape (n_documents,), which documents come from one source (an attacker, a patent subclass) and so are right or
            wrong together; None if each stands for itself. Intervals and tests then draw whole groups.

    Raises:
        BookError: shapes that do not match, rows that are no probabilities, gold labels outside `labels`.
    """

    approach: str
    labels: tuple[str, ...]
    probabilities: np.ndarray
    gold: np.ndarray
    seconds: float = 0.0
    training_seconds: float = 0.0
    trainable_parameters: int = 0
    tokens: int = 0
    peak_memory: int | None = None
    test_set: str = ""
    groups: np.ndarray | None = None
    thresholds: float | np.ndarray = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=float))
        object.__setattr__(self, "gold", np.asarray(self.gold, dtype=int))
        expected = (len(self.gold), len(self.labels))
        if self.probabilities.shape != expected:
            raise BookError(
                f"{self.approach}: probabilities have the shape {self.probabilities.shape}, expected {expected} "
                "(n_documents, n_labels)."
            )
        if len(self.gold) == 0:
            raise BookError(f"{self.approach}: there is no document to evaluate. Give it a test set.")
        if self.groups is not None and len(self.groups) != len(self.gold):
            raise BookError(
                f"{self.approach}: there are {len(self.groups)} groups for {len(self.gold)} documents. Give one each."
            )
        if self.multi_label:
            wrong = ~((self.probabilities >= 0) & (self.probabilities <= 1)).all(axis=1)
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise BookError(f"{self.approach}: row {row} has no probabilities ({self.probabilities[row]}): use a sigmoid.")
            if self.gold.shape != expected or not np.isin(self.gold, (0, 1)).all():
                raise BookError(f"{self.approach}: multi-label gold needs zeros and ones in the shape {expected}.")
            return
        wrong = ~np.isclose(self.probabilities.sum(axis=1), 1, atol=1e-3) | (self.probabilities < 0).any(axis=1)
        if wrong.any():  # NaN is never close to 1, so it is caught here too
            row = int(np.flatnonzero(wrong)[0])
            raise BookError(f"{self.approach}: row {row} is no probability distribution ({self.probabilities[row]}): softmax it.")
        if self.gold.min() < 0 or self.gold.max() >= len(self.labels):
            raise BookError(f"{self.approach}: gold labels run to {self.gold.max()}, but there are {len(self.labels)} labels.")

    @property
    def multi_label(self) -> bool:
        """Whether a document can have several labels."""
        return self.gold.ndim == 2

    @property
    def predicted(self) -> np.ndarray:
        """The most probable label of each document, shape (n_documents,); multi-label, every label from its threshold on."""
        return (self.probabilities >= self.thresholds).astype(int) if self.multi_label else self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Which documents are right, shape (n_documents,), bool; multi-label, where all labels are."""
        right = self.predicted == self.gold
        return right.all(axis=1) if self.multi_label else right

    @property
    def documents_per_second(self) -> float:
        """Throughput of predicting, at whatever batch size the approach used."""
        return len(self.gold) / self.seconds if self.seconds else float("nan")


@contextlib.contextmanager
def measure() -> Iterator[SimpleNamespace]:
    """Time a block and its peak memory: `seconds` and, in bytes, `peak_memory`.

    On a GPU that is the memory of tensors; on a CPU what the whole process holds at most, Python and libraries included,
    which only Linux tells (None elsewhere).

    >>> with measure() as cost:
    ...     trainer.train()
    >>> cost.seconds, cost.peak_memory
    """
    gpu = torch.cuda.is_available()
    cost = SimpleNamespace(seconds=0.0, peak_memory=None)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _resident_memory(reset=True)
    start = time.perf_counter()
    yield cost
    if gpu:
        torch.cuda.synchronize()
    cost.seconds = time.perf_counter() - start
    cost.peak_memory = torch.cuda.max_memory_allocated() if gpu else _resident_memory()


def _resident_memory(reset: bool = False) -> int | None:
    """Most bytes this process had in memory since the last reset; None where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def evaluate(predictions: Predictions, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Accuracy with its Wilson interval and macro-F1 with its bootstrap interval (percentile, over documents).

    Both intervals say how much the score would move on another test set of the same size, for this one trained model.
    They say nothing about another training set or seed. The Wilson interval takes documents one by one; the other one draws
    whole `groups`, if there are any.

    Returns:
        `accuracy`, `accuracy_low`, `accuracy_high`, `macro_f1`, `macro_f1_low`, `macro_f1_high`, `micro_f1`, all in 0..1. In a
        multi-label task accuracy is that of whole label sets; in a single-label task micro-F1 is the accuracy.

    Raises:
        BookError: there is only one document.
    """
    gold, predicted = _indicators(predictions)
    n_documents = len(gold)
    if n_documents < 2:
        raise BookError(f"{predictions.approach}: one document gives no interval. Evaluate on more.")
    low, high = proportion_confint(int(predictions.correct.sum()), n_documents, alpha=1 - confidence, method="wilson")

    options = (_units(predictions), confidence, n_resamples, seed)
    interval = _bootstrap(lambda weights: _macro_f1(weights, gold, predicted), *options)
    return {
        "accuracy": predictions.correct.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": f1_score(gold, predicted, average="macro", zero_division=0),
        "macro_f1_low": interval[0],
        "macro_f1_high": interval[1],
        "micro_f1": f1_score(gold, predicted, average="micro", zero_division=0),
    }


def _indicators(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Gold and predicted labels as zeros and ones, each of shape (n_documents, n_labels)."""
    if predictions.multi_label:
        return predictions.gold, predictions.predicted
    numbers = np.arange(len(predictions.labels))
    return tuple((each[:, None] == numbers).astype(int) for each in (predictions.gold, predictions.predicted))


def _macro_f1(weights: np.ndarray, gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """scikit-learn's macro-F1 where document d counts `weights[..., d]` times, for all rows of weights at once."""
    total = weights @ (gold + predicted)
    return np.mean(2 * (weights @ (gold * predicted)) / np.maximum(total, 1), axis=-1)


def _micro_f1(weights: np.ndarray, gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """scikit-learn's micro-F1, weighted like `_macro_f1`."""
    total = weights @ (gold + predicted).sum(axis=1)
    return 2 * (weights @ (gold * predicted).sum(axis=1)) / np.maximum(total, 1)


def _units(predictions: Predictions) -> np.ndarray:
    """What a bootstrap draws: the number of each document's group, or of the document itself, shape (n_documents,)."""
    groups = np.arange(len(predictions.gold)) if predictions.groups is None else predictions.groups
    return np.unique(groups, return_inverse=True)[1]


def _bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], units: np.ndarray, confidence: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of `statistic`, a function of how often each document was drawn, shape (n_resamples, n_documents)."""
    n_units = units.max() + 1

    def of_rows(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        rows = np.atleast_2d(rows)
        shifted = rows + n_units * np.arange(len(rows))[:, None]
        return statistic(np.bincount(shifted.ravel(), minlength=rows.size).reshape(rows.shape)[:, units].astype(float))

    interval = bootstrap(
        (np.arange(n_units),),
        of_rows,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=n_resamples,
        batch=1000,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def best_thresholds(validation: Predictions, per_label: bool = False) -> float | np.ndarray:
    """From which probability on a multi-label classifier should say a label: where F1 on validation documents is highest.

    Args:
        per_label: one threshold for each label, from its own F1, instead of one for all from micro-F1. A label without a
            positive document in validation gets the common one.

    Returns:
        A threshold in 0..1 or, per label, shape (n_labels,). Use it with `dataclasses.replace(test, thresholds=…)`.

    Raises:
        BookError: a single-label task, which has no thresholds.
    """
    if not validation.multi_label:
        raise BookError(f"{validation.approach}: a single-label task has no thresholds; the most probable label is said.")

    def best(gold: np.ndarray, probabilities: np.ndarray) -> float:
        precision, recall, cuts = precision_recall_curve(gold, probabilities)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        chosen = int(f1[:-1].argmax())
        below = cuts[chosen - 1] if chosen else 0.0
        return float((cuts[chosen] + below) / 2)  # halfway to the next lower probability, which was not to be said

    common = best(validation.gold.ravel(), validation.probabilities.ravel())
    if not per_label:
        return common
    columns = zip(validation.gold.T, validation.probabilities.T, strict=True)
    return np.array([best(*column) if column[0].any() else common for column in columns])


def compare(a: Predictions, b: Predictions, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> dict[str, float]:
    """Is `a` better than `b` on the same documents? Paired, because both were asked about each of them.

    Returns:
        `difference` in accuracy (a - b, in -1..1) with its paired bootstrap interval `low`, `high`; the same for macro-F1 as
        `macro_f1_difference`, `macro_f1_low`, `macro_f1_high`, and for micro-F1; `only_a` and `only_b`, the documents that
        just one of them gets right; `p_value` of the exact McNemar test on these two counts. Where documents share a group,
        it is that of a permutation test which swaps a and b in whole groups: McNemar's test with groups of one document.

    Raises:
        BookError: the two were not asked about the same documents, or there is only one document.
    """
    same = a.test_set == b.test_set or not (a.test_set and b.test_set)
    if a.labels != b.labels or not np.array_equal(a.gold, b.gold) or not same:
        raise BookError(f"{a.approach} and {b.approach} were not tested on the same documents: compare them on one test set.")
    if len(a.gold) < 2:
        raise BookError(f"{a.approach} and {b.approach}: one document gives no interval. Compare them on more.")
    both, only_a = int((a.correct & b.correct).sum()), int((a.correct & ~b.correct).sum())
    only_b, neither = int((~a.correct & b.correct).sum()), int((~a.correct & ~b.correct).sum())
    right = a.correct.astype(int) - b.correct.astype(int)
    (gold, said_a), (_, said_b) = _indicators(a), _indicators(b)

    def macro_f1(weights: np.ndarray) -> np.ndarray:
        return _macro_f1(weights, gold, said_a) - _macro_f1(weights, gold, said_b)

    def micro_f1(weights: np.ndarray) -> np.ndarray:
        return _micro_f1(weights, gold, said_a) - _micro_f1(weights, gold, said_b)

    units = _units(a)
    options = (units, confidence, n_resamples, seed)
    low, high = _bootstrap(lambda weights: weights @ right / weights.sum(-1), *options)
    macro_low, macro_high = _bootstrap(macro_f1, *options)
    micro_low, micro_high = _bootstrap(micro_f1, *options)
    if len(units) == units.max() + 1:
        p_value = mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue
    else:
        sides = [np.bincount(units, weights=each.correct) for each in (a, b)]
        p_value = permutation_test(
            sides,
            lambda x, y, axis: (x - y).sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).pvalue
    return {
        "difference": right.mean(),
        "low": low,
        "high": high,
        "macro_f1_difference": float(macro_f1(np.ones(len(right)))),
        "macro_f1_low": macro_low,
        "macro_f1_high": macro_high,
        "micro_f1_difference": float(micro_f1(np.ones(len(right)))),
        "micro_f1_low": micro_low,
        "micro_f1_high": micro_high,
        "only_a": only_a,
        "only_b": only_b,
        "p_value": float(p_value),
    }


def comparisons(pairs: dict[str, tuple[Predictions, Predictions]], **options) -> pd.DataFrame:
    """`compare` for every pair, with the p-values of the whole family adjusted by Holm's method as `p_holm`.

    Args:
        pairs: what to call each comparison, and its two sides.
        options: of `compare`.

    Returns:
        A DataFrame with one row a pair; the chance of one false "better" anywhere in it is at most 5 % at `p_holm` < 0.05.
    """
    rows = pd.DataFrame({name: compare(a, b, **options) for name, (a, b) in pairs.items()}).T
    return rows.assign(p_holm=multipletests(rows["p_value"], method="holm")[1])


def pool(results: Sequence[Predictions]) -> Predictions:
    """One approach's predictions on several test sets (seeds) as if they were one: for `compare` and calibration.

    Its intervals and tests are over documents, or groups of them: give a document that several test sets drew the same group
    in all of them. What training sets and seeds add shows in `spread` only.
    """
    first = results[0]
    grouped = all(each.groups is not None for each in results)
    return replace(
        first,
        probabilities=np.concatenate([each.probabilities for each in results]),
        gold=np.concatenate([each.gold for each in results]),
        seconds=sum(each.seconds for each in results),
        tokens=sum(each.tokens for each in results),
        test_set=" ".join(each.test_set for each in results).strip(),
        groups=np.concatenate([each.groups for each in results]) if grouped else None,
        thresholds=np.concatenate([np.broadcast_to(each.thresholds, each.probabilities.shape) for each in results]),
    )


def spread(results: Sequence[Predictions]) -> dict[str, float]:
    """How much of one approach's spread in accuracy comes from the test documents, how much from training.

    Every seed draws its own training and test documents, so the variance between seeds is the sum of both. That of the
    documents is known, p (1 - p) / n; what is left comes from the training documents and the seed (method of moments,
    never below zero). With three seeds it is a rough figure.

    Returns:
        `mean` accuracy and the standard deviations `between_seeds` (observed), `documents` and `training`, all in 0..1.

    Raises:
        BookError: there is one result only, or two of them have the same test set.
    """
    if len(results) < 2:
        raise BookError(f"{results[0].approach}: one seed has no spread. Record at least two.")
    known = [each.test_set for each in results if each.test_set]
    if len(known) != len(set(known)):
        raise BookError(f"{results[0].approach}: two results have the same test set, so its documents add no spread. Drop one.")
    accuracy = np.array([each.correct.mean() for each in results])
    documents = np.mean([p * (1 - p) / len(each.gold) for p, each in zip(accuracy, results, strict=True)])
    between = accuracy.var(ddof=1)
    return {
        "mean": accuracy.mean(),
        "between_seeds": between**0.5,
        "documents": documents**0.5,
        "training": max(between - documents, 0.0) ** 0.5,
    }


def power(difference: float, n_documents: int, disagree: float, alpha: float = 0.05) -> float:
    """Chance that the exact McNemar test finds a true `difference` in accuracy between two classifiers.

    Args:
        difference: in 0..disagree.
        disagree: share of the documents on which just one of the two is right.
    """
    k = np.arange(n_documents + 1)  # documents on which they disagree
    cut = binom.ppf(alpha / 2, k, 0.5) - 1  # so few on one side: significant
    share = (disagree + difference) / (2 * disagree)
    significant = binom.cdf(cut, k, share) + binom.sf(k - cut - 1, k, share)
    return float(binom.pmf(k, n_documents, disagree) @ significant)


def minimum_detectable_effect(n_documents: int, disagree: float, wanted_power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference in accuracy that `n_documents` show with `wanted_power` (chapter 01 derives it).

    Returns:
        The difference in 0..disagree, or NaN where even winning every disagreement would not be enough.

    Raises:
        BookError: `disagree` is no share of the documents.
    """
    if not 0 < disagree <= 1:
        raise BookError(f"disagree is {disagree}, but it is a share of the documents: more than 0, at most 1.")
    if power(disagree, n_documents, disagree, alpha) < wanted_power:
        return float("nan")
    return brentq(lambda difference: power(difference, n_documents, disagree, alpha) - wanted_power, 1e-9, disagree)


def _confidence(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """How sure, and whether right: a document's most probable label; multi-label, every label of every document."""
    if predictions.multi_label:
        return predictions.probabilities.ravel(), predictions.gold.ravel().astype(bool)
    return predictions.probabilities.max(axis=1), predictions.correct


def reliability(predictions: Predictions, n_bins: int = 10) -> pd.DataFrame:
    """Confidence against accuracy in `n_bins` bins of equal width: calibrated where the two are equal.

    Returns:
        One row a bin that has documents, with `confidence`, `accuracy` (means) and `documents`; in a multi-label task every
        label of every document is one, with its probability and whether it is true.
    """
    confidence, correct = _confidence(predictions)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    rows = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct.astype(float), "documents": 1})
    return rows.groupby("bin").agg({"confidence": "mean", "accuracy": "mean", "documents": "sum"})


def expected_calibration_error(predictions: Predictions, n_bins: int = 10) -> float:
    """Mean distance between confidence and accuracy over the bins of `reliability`, weighted by documents, in 0..1.

    Guo et al. 2017, arXiv 1706.04599.
    """
    rows = reliability(predictions, n_bins)
    return float(np.average((rows["confidence"] - rows["accuracy"]).abs(), weights=rows["documents"]))


def risk_coverage(predictions: Predictions) -> pd.DataFrame:
    """Error rate among the most confident documents, for every number of documents answered.

    Returns:
        A row for every distinct confidence, most confident first: `coverage`, the share of documents at least so sure, and
        `risk`, the share of wrong ones among them. Multi-label: a document is as sure as its least certain label, and
        right if all of its labels are.
    """
    sure = predictions.probabilities.max(axis=1)
    if predictions.multi_label:
        sure = np.maximum(predictions.probabilities, 1 - predictions.probabilities).min(axis=1)
    order = np.argsort(-sure, kind="stable")
    answered = np.arange(1, len(order) + 1)
    risk = np.cumsum(~predictions.correct[order]) / answered
    last = np.append(np.diff(sure[order]) != 0, True)  # equally sure documents are answered together
    return pd.DataFrame({"coverage": answered[last] / len(order), "risk": risk[last]})


def table(results: Iterable[Predictions]) -> pd.DataFrame:
    """One row for each approach: accuracy and macro-F1 in percent with 95 % intervals, and cost.

    Returns:
        A DataFrame indexed by approach; figures in the numeric columns are unrounded, so format it for display
        with `show`.
    """
    rows = []
    for predictions in results:
        metrics = {name: 100 * value for name, value in evaluate(predictions).items()}
        rows.append(
            {
                "approach": predictions.approach,
                **metrics,
                "trainable_parameters": predictions.trainable_parameters,
                "training_seconds": predictions.training_seconds,
                "documents_per_second": predictions.documents_per_second,
            }
        )
    return pd.DataFrame(rows).set_index("approach")


def show(results: pd.DataFrame) -> pd.DataFrame:
    """`table` as a reader wants to see it: scores in percent with their 95 % intervals, whole numbers with commas."""

    def interval(name: str) -> pd.Series:
        return results.apply(lambda row: f"{row[f'{name}_low']:.1f} to {row[f'{name}_high']:.1f}".replace(" ", "\xa0"), axis=1)

    def rounded(value: float) -> str:
        return "—" if np.isnan(value) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"

    return pd.DataFrame(
        {
            "accuracy %": results["accuracy"].map("{:.1f}".format),
            "95 % interval": interval("accuracy"),
            "macro-F1 %": results["macro_f1"].map("{:.1f}".format),
            "95 % interval ": interval("macro_f1"),
            "trained numbers": results["trainable_parameters"].map("{:,}".format),
            "training s": results["training_seconds"].map(rounded),
            "documents/s": results["documents_per_second"].map(rounded),
        }
    ).rename_axis(None)
