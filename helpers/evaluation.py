"""Predictions, the same for every approach, and what is computed from them (chapter 06)."""

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
from scipy.stats import bootstrap, permutation_test
from sklearn.metrics import precision_recall_curve
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from helpers import profiles
from helpers.errors import BookError

_open_blocks: list[SimpleNamespace] = []  # the costs of the `measure` blocks that are running, outermost first


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an approach predicts for the documents of a test set, and what that cost. BookError: shapes or values do not fit.

    Attributes:
        probabilities: (n_documents, n_labels), columns as in `labels`; every row sums to 1, except in a multi-label task.
        gold: (n_documents,), indices into `labels`; multi-label (n_documents, n_labels), zeros and ones.
        seconds, training_seconds: wall-clock time of predicting, tokenization included, and of training.
        tokens: read while predicting, without padding; 0 for approaches without a tokenizer.
        peak_memory: while predicting, in bytes, as `measure` has it.
        test_set: a fingerprint of the test documents, "" if unknown.
        groups: (n_documents,), which documents come from one source (an attacker, a patent subclass) and so are right or
            wrong together; None if each stands for itself. Intervals and tests draw whole groups.
        thresholds: multi-label, the probability from which a label is predicted: one, or one for each label or cell.
        runs: (n_documents,), which run (seed) predicted a document, filled by `pool`; None if one run did.
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
    runs: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=float))
        object.__setattr__(self, "gold", np.asarray(self.gold, dtype=int))
        if problem := self._problem(self.probabilities, self.gold, (len(self.gold), len(self.labels))):
            raise BookError(f"{self.approach}: {problem}")

    def _problem(self, probabilities: np.ndarray, gold: np.ndarray, shape: tuple[int, int]) -> str | None:
        if probabilities.shape != shape:
            return f"probabilities have the shape {probabilities.shape}, expected {shape} (n_documents, n_labels)."
        if len(gold) == 0:
            return "there is no document to evaluate. Give it a test set."
        if self.groups is not None and len(self.groups) != len(gold):
            return f"there are {len(self.groups)} groups for {len(gold)} documents. Give one each."
        sums = np.ones(len(gold)) if self.multi_label else probabilities.sum(axis=1)
        valid = ((probabilities >= 0) & (probabilities <= 1.001)).all(axis=1) & np.isclose(sums, 1, atol=1e-3)
        if not valid.all():  # NaN is not valid either
            row, mend = int(valid.argmin()), "sigmoid" if self.multi_label else "softmax"
            return f"row {row} has no probabilities ({probabilities[row]}): use a {mend}."
        if self.multi_label and (gold.shape != shape or not np.isin(gold, (0, 1)).all()):
            return f"multi-label gold needs zeros and ones in the shape {shape}."
        if not self.multi_label and (gold.min() < 0 or gold.max() >= len(self.labels)):
            return f"gold labels run to {gold.max()}, but there are {len(self.labels)} labels."
        return None

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
    """`with measure() as cost:` gives a block's `cost.seconds` and `cost.peak_memory` in bytes. Blocks may be nested.

    On a GPU the peak is that of tensors; on a CPU that of the whole process, which only Linux tells (None elsewhere).
    """
    on_gpu = profiles.current().device == "cuda"
    cost = SimpleNamespace(seconds=0.0, peak_memory=None)
    _note_peak(on_gpu)  # for the blocks around this one, before it is reset
    _open_blocks.append(cost)
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if on_gpu:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
        _note_peak(on_gpu)
        _open_blocks.pop()


def _note_peak(on_gpu: bool) -> None:
    """Tell every open block the most bytes since the last call, and count anew."""
    if on_gpu:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, TypeError):  # no such file, no such line
            return
    for cost in _open_blocks:
        cost.peak_memory = max(cost.peak_memory or 0, peak)


def evaluate(predictions: Predictions, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Scores in 0..1: `accuracy`, `accuracy_low`, `accuracy_high`, `macro_f1`, `macro_f1_low`, `macro_f1_high`, `micro_f1`.

    Wilson's interval for accuracy, a percentile bootstrap over documents or groups for macro-F1: both are about other test
    documents, not about another training. Macro-F1 is over the labels in gold; of pooled runs it is the mean over runs.
    Multi-label accuracy is that of whole label sets; single-label micro-F1 is the accuracy. BookError: one document or group.
    """
    low, high = _interval(lambda weights: _metrics(predictions, weights), predictions, confidence, n_resamples, seed)
    accuracy, macro_f1, micro_f1 = _metrics(predictions)
    wilson = proportion_confint(int(predictions.correct.sum()), len(predictions.gold), alpha=1 - confidence, method="wilson")
    names = ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "macro_f1_low", "macro_f1_high", "micro_f1")
    values = (accuracy, *wilson, macro_f1, low[1], high[1], micro_f1)
    return dict(zip(names, map(float, values), strict=True))


def _metrics(predictions: Predictions, weights: np.ndarray | None = None) -> np.ndarray:
    """Accuracy, macro-F1 and micro-F1, where document d counts `weights[n, d]` times, shape (3, n); without weights (3,)."""
    if weights is None:
        return _metrics(predictions, np.ones((1, len(predictions.gold))))[:, 0]
    gold, predicted = predictions.gold, predictions.predicted
    if not predictions.multi_label:
        gold, predicted = (np.eye(len(predictions.labels))[each] for each in (gold, predicted))
    hits, counted = gold * predicted, gold + predicted
    runs = np.zeros(len(gold)) if predictions.runs is None else predictions.runs
    of_runs = []
    for rows in (runs == run for run in np.unique(runs)):
        drawn = weights[:, rows]
        f1 = 2 * (drawn @ hits[rows]) / np.maximum(drawn @ counted[rows], 1)
        of_runs.append(np.ma.array(f1, mask=drawn @ gold[rows] == 0).mean(axis=1))
    accuracy = weights @ predictions.correct / weights.sum(axis=1)
    micro_f1 = 2 * (weights @ hits.sum(axis=1)) / np.maximum(weights @ counted.sum(axis=1), 1)
    return np.stack([accuracy, np.ma.stack(of_runs).mean(axis=0).filled(0), micro_f1])


def _units(predictions: Predictions) -> np.ndarray:
    """What a resample draws: the number of each document's group, or of the document itself, shape (n_documents,)."""
    groups = np.arange(len(predictions.gold)) if predictions.groups is None else predictions.groups
    return np.unique(groups, return_inverse=True)[1]


def _interval(statistic: Callable, predictions: Predictions, confidence: float, n_resamples: int, seed: int) -> tuple:
    """Percentile bootstrap, low and high, of a statistic of how often each document was drawn, (n_resamples, n_documents)."""
    units = _units(predictions)
    n_units = units.max() + 1
    if n_units < 2:
        raise BookError(f"{predictions.approach}: one document, or one group of them, gives no interval. Evaluate on more.")

    def of_resamples(drawn: np.ndarray, axis: int) -> np.ndarray:
        counts = np.stack([np.bincount(row, minlength=n_units) for row in np.atleast_2d(drawn)])
        return statistic(counts[:, units].astype(float))

    options = {"confidence_level": confidence, "n_resamples": n_resamples, "batch": 1000, "rng": np.random.default_rng(seed)}
    interval = bootstrap((np.arange(n_units),), of_resamples, vectorized=True, method="percentile", **options)
    return interval.confidence_interval.low, interval.confidence_interval.high


def best_thresholds(validation: Predictions, per_label: bool = False) -> float | np.ndarray:
    """The threshold with the highest micro-F1 on validation documents, for `dataclasses.replace(test, thresholds=…)`.

    With `per_label` one for each label, shape (n_labels,), from its own F1; a label that no document has gets the common one.
    BookError: a single-label task.
    """
    if not validation.multi_label:
        raise BookError(f"{validation.approach}: a single-label task has no thresholds; it predicts the most probable label.")

    def best(gold: np.ndarray, probabilities: np.ndarray) -> float:
        precision, recall, cuts = precision_recall_curve(gold, probabilities)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        chosen = int(f1[:-1].argmax())
        below = cuts[chosen - 1] if chosen else 0.0
        return float((cuts[chosen] + below) / 2)  # halfway to the next lower probability, which is not predicted

    common = best(validation.gold.ravel(), validation.probabilities.ravel())
    if not per_label:
        return common
    columns = zip(validation.gold.T, validation.probabilities.T, strict=True)
    return np.array([best(*column) if column[0].any() else common for column in columns])


def compare(a: Predictions, b: Predictions, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> dict[str, float]:
    """Is `a` better than `b` on the same documents? Paired, because both predict each of them.

    Returns:
        `difference` in accuracy (a - b, in -1..1) with its paired bootstrap interval `low`, `high`; the same for macro-F1 as
        `macro_f1_difference`, `macro_f1_low`, `macro_f1_high`, and for micro-F1; `only_a` and `only_b`, the documents that
        just one of them gets right; `p_value` of the exact McNemar test on these two counts or, where documents share a
        group, of a permutation test that swaps a and b in whole groups.

    Raises:
        BookError: documents, groups or runs are not the same, or there is only one document or group.
    """
    same = a.test_set == b.test_set or not (a.test_set and b.test_set)
    if a.labels != b.labels or not np.array_equal(a.gold, b.gold) or not same:
        raise BookError(f"{a.approach} and {b.approach} were not tested on the same documents: compare them on one test set.")
    for name in ("groups", "runs"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise BookError(f"{a.approach} and {b.approach} have different {name}. Give both the same {name}, or neither any.")

    def difference(weights: np.ndarray | None = None) -> np.ndarray:
        return _metrics(a, weights) - _metrics(b, weights)

    low, high = _interval(difference, a, confidence, n_resamples, seed)
    found = {}
    for name, values in {"difference": difference(), "low": low, "high": high}.items():
        found |= {f"{metric}{name}": float(value) for metric, value in zip(("", "macro_f1_", "micro_f1_"), values, strict=True)}
    found |= {"only_a": int((a.correct & ~b.correct).sum()), "only_b": int((b.correct & ~a.correct).sum())}
    units = _units(a)
    if len(units) == units.max() + 1:
        test = mcnemar([[0, found["only_a"]], [found["only_b"], 0]], exact=True)
    else:
        sides = [np.bincount(units, weights=each.correct) for each in (a, b)]
        options = {"permutation_type": "samples", "vectorized": True, "batch": 1000, "rng": np.random.default_rng(seed)}
        test = permutation_test(sides, lambda x, y, axis: (x - y).sum(axis=axis), **options)
    return found | {"p_value": float(test.pvalue)}


def pool(results: Sequence[Predictions]) -> Predictions:
    """One approach's predictions on several test sets, one a seed, as if they were one: for `compare` and calibration.

    Intervals and tests are over documents, or groups of them: a document of several test sets needs the same group in all.
    """
    joined = {}
    for name in ("probabilities", "gold", "groups"):
        parts = [getattr(each, name) for each in results]
        joined[name] = None if any(part is None for part in parts) else np.concatenate(parts)
    return replace(
        results[0],
        **joined,
        seconds=sum(each.seconds for each in results),
        training_seconds=float(np.mean([each.training_seconds for each in results])),
        tokens=sum(each.tokens for each in results),
        test_set=" ".join(each.test_set for each in results).strip(),
        thresholds=np.concatenate([np.broadcast_to(each.thresholds, each.probabilities.shape) for each in results]),
        runs=np.repeat(np.arange(len(results)), [len(each.gold) for each in results]),
    )


def table(results: Iterable[Predictions]) -> pd.DataFrame:
    """A row for each approach: `evaluate` in percent, and the cost, unrounded; `show` formats it."""
    rows = []
    for each in results:
        scores = {name: 100 * value for name, value in evaluate(each).items()}
        cost = {name: getattr(each, name) for name in ("trainable_parameters", "training_seconds", "documents_per_second")}
        rows.append({"approach": each.approach, **scores, **cost})
    return pd.DataFrame(rows).set_index("approach")


def show(results: pd.DataFrame) -> pd.DataFrame:
    """`table` as a reader wants to see it: scores in percent with their 95 % intervals, whole numbers with commas."""

    def rounded(value: float) -> str:
        return "—" if np.isnan(value) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"

    shown = pd.DataFrame(index=results.index.rename(None))
    for metric, heading, interval in (("accuracy", "accuracy %", "95 % interval"), ("macro_f1", "macro-F1 %", "95 % interval ")):
        score, low, high = (results[f"{metric}{end}"].map("{:.1f}".format) for end in ("", "_low", "_high"))
        shown[heading] = score
        shown[interval] = low + "\xa0to\xa0" + high
    shown["trained numbers"] = results["trainable_parameters"].map("{:,}".format)
    shown["training s"] = results["training_seconds"].map(rounded)
    shown["documents/s"] = results["documents_per_second"].map(rounded)
    return shown
