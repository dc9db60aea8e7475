"""Predictions, the same for every approach, and what is computed from them.

After `Predictions` nothing knows which approach it came from: the same metric code for all makes the comparison fair.
Chapter 06 explains the statistics.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap
from sklearn.metrics import f1_score
from statsmodels.stats.contingency_tables import mcnemar
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
        peak_memory: bytes of GPU memory in use at most; None on a CPU.

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
        """The most probable label of each document, shape (n_documents,); multi-label, every label of probability 0.5 or more."""
        return (self.probabilities >= 0.5).astype(int) if self.multi_label else self.probabilities.argmax(axis=1)

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
    """Time a block, and its peak GPU memory where there is a GPU.

    >>> with measure() as cost:
    ...     trainer.train()
    >>> cost.seconds, cost.peak_memory
    """
    gpu = torch.cuda.is_available()
    cost = SimpleNamespace(seconds=0.0, peak_memory=None)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield cost
    if gpu:
        torch.cuda.synchronize()
        cost.peak_memory = torch.cuda.max_memory_allocated()
    cost.seconds = time.perf_counter() - start


def evaluate(predictions: Predictions, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Accuracy with its Wilson interval and macro-F1 with its bootstrap interval (percentile, over documents).

    Both intervals say how much the score would move on another test set of the same size, for this one trained model.
    They say nothing about another training set or seed.

    Returns:
        `accuracy`, `accuracy_low`, `accuracy_high`, `macro_f1`, `macro_f1_low`, `macro_f1_high`, `micro_f1`, all in 0..1. In a
        multi-label task accuracy is that of whole label sets; in a single-label task micro-F1 is the accuracy.

    Raises:
        BookError: there is only one document.
    """
    gold, predicted = predictions.gold, predictions.predicted
    n_documents, n_labels = predictions.probabilities.shape
    if n_documents < 2:
        raise BookError(f"{predictions.approach}: one document gives no interval. Evaluate on more.")
    if not predictions.multi_label:
        gold, predicted = (labels[:, None] == np.arange(n_labels) for labels in (gold, predicted))
    low, high = proportion_confint(int(predictions.correct.sum()), n_documents, alpha=1 - confidence, method="wilson")

    def macro_f1(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        """scikit-learn's macro-F1 of all resamples at once: 2 · both / (gold + predicted), averaged over labels."""
        per_label = []
        for is_gold, is_predicted in zip(gold.T.astype(bool), predicted.T.astype(bool), strict=True):
            total = is_gold[rows].sum(axis=axis) + is_predicted[rows].sum(axis=axis)
            per_label.append(2 * (is_gold & is_predicted)[rows].sum(axis=axis) / np.maximum(total, 1))
        return np.mean(per_label, axis=0)

    interval = bootstrap(
        (np.arange(n_documents),),
        macro_f1,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=n_resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {
        "accuracy": predictions.correct.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": f1_score(gold, predicted, average="macro", zero_division=0),
        "macro_f1_low": interval.low,
        "macro_f1_high": interval.high,
        "micro_f1": f1_score(gold, predicted, average="micro", zero_division=0),
    }


def compare(a: Predictions, b: Predictions, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> dict[str, float]:
    """Is `a` more accurate than `b` on the same documents? Paired, because both were asked about each of them.

    Returns:
        `difference` in accuracy (a - b, in -1..1) with its paired bootstrap interval `low`, `high`; `only_a` and `only_b`,
        the documents that just one of them gets right; `p_value` of the exact McNemar test on these two counts.

    Raises:
        BookError: the two do not have the same gold labels, so they are not about the same documents.
    """
    if a.labels != b.labels or not np.array_equal(a.gold, b.gold):
        raise BookError(f"{a.approach} and {b.approach} were not tested on the same documents: compare them on one test set.")
    both, only_a = int((a.correct & b.correct).sum()), int((a.correct & ~b.correct).sum())
    only_b, neither = int((~a.correct & b.correct).sum()), int((~a.correct & ~b.correct).sum())
    difference = a.correct.astype(int) - b.correct.astype(int)
    low = high = float(difference[0])
    if np.ptp(difference):  # the bootstrap is not defined for a constant
        interval = bootstrap(
            (difference,),
            np.mean,
            method="percentile",
            confidence_level=confidence,
            n_resamples=n_resamples,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = interval.low, interval.high
    return {
        "difference": difference.mean(),
        "low": low,
        "high": high,
        "only_a": only_a,
        "only_b": only_b,
        "p_value": mcnemar([[both, only_a], [only_b, neither]], exact=True).pvalue,
    }


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
