"""Predictions, the same for every approach, and what is computed from them (chapter 06)."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import precision_recall_curve
from statsmodels.stats.proportion import proportion_confint

from helpers import bootstrap, profiles
from helpers.errors import BookError


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an approach predicts for the documents of a test set, and what that cost. BookError: shapes or values do not fit.

    Attributes:
        probabilities: (n_documents, n_labels); every row sums to 1, except in a multi-label task.
        gold: (n_documents,), indices into `labels`; multi-label (n_documents, n_labels), zeros and ones.
        seconds, training_seconds: wall-clock time of predicting, tokenization included, and of training.
        test_set: a fingerprint of the test documents, "" if unknown.
        groups: (n_documents,), which documents are right or wrong together (of one attacker, say): they are drawn together.
        thresholds: multi-label, the probability from which a label is predicted: one, or one for each label or cell.
        runs: (n_documents,), which run (seed) predicted a document, filled by `pool`.
    """

    approach: str
    labels: tuple[str, ...]
    probabilities: np.ndarray
    gold: np.ndarray
    seconds: float = 0.0
    training_seconds: float = 0.0
    trainable_parameters: int = 0
    test_set: str = ""
    groups: np.ndarray | None = None
    thresholds: float | np.ndarray = 0.5
    runs: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=float))
        object.__setattr__(self, "gold", np.asarray(self.gold, dtype=int))
        shape, n = (len(self.gold), len(self.labels)), 2 if self.multi_label else len(self.labels)
        if self.probabilities.shape != shape or (self.groups is not None and len(self.groups) != shape[0]):
            raise BookError(f"{self.approach}: probabilities need the shape {shape}, and groups, if any, {shape[:1]}.")
        if self.gold.shape != shape[: self.gold.ndim] or not np.isin(self.gold, range(n)).all():
            raise BookError(f"{self.approach}: gold needs the shape {shape[: self.gold.ndim]} and numbers from 0 to {n - 1}.")
        sums = 1 if self.multi_label else self.probabilities.sum(axis=1)
        valid = (self.probabilities == self.probabilities.clip(0, 1.001)).all(axis=1) & np.isclose(sums, 1, atol=1e-3)
        for row in np.flatnonzero(~valid):
            raise BookError(f"{self.approach}: row {row} has no probabilities ({self.probabilities[row]}). Use softmax/sigmoid.")

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
        return (self.predicted == self.gold).reshape(len(self.gold), -1).all(axis=1)

    @property
    def documents_per_second(self) -> float:
        """Throughput of predicting, at whatever batch size the approach used."""
        return len(self.gold) / self.seconds if self.seconds else float("nan")


@contextlib.contextmanager
def measure() -> Iterator[SimpleNamespace]:
    """`with measure() as cost:` gives a block's wall-clock time as `cost.seconds`; a GPU has done then what it was asked for."""
    wait = torch.cuda.synchronize if profiles.current().device == "cuda" else lambda: None
    cost = SimpleNamespace(seconds=0.0)
    wait()
    start = time.perf_counter()
    yield cost
    wait()
    cost.seconds = time.perf_counter() - start


def evaluate(predictions: Predictions, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Scores in 0..1: `accuracy`, `accuracy_low`, `accuracy_high`, `macro_f1`, `macro_f1_low`, `macro_f1_high`, `micro_f1`.

    A percentile bootstrap over documents or groups; for accuracy Wilson's interval, widened to that where documents share a group
    or runs are pooled. Both are about other test documents, not about another training. Macro-F1 is over the labels in gold.
    Multi-label accuracy is that of whole label sets; single-label micro-F1 is the accuracy. BookError: one document or group.
    """
    scores = partial(bootstrap.scores, predictions)
    lows, highs = bootstrap.interval(scores, predictions, confidence, n_resamples, seed)  # in the order of `scores`
    accuracy, macro_f1, micro_f1 = scores()
    low, high = proportion_confint(int(predictions.correct.sum()), len(predictions.gold), alpha=1 - confidence, method="wilson")
    if not bootstrap.independent(predictions):
        low, high = min(low, lows[0]), max(high, highs[0])
    found = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    found |= {"macro_f1": macro_f1, "macro_f1_low": lows[1], "macro_f1_high": highs[1], "micro_f1": micro_f1}
    return {name: float(value) for name, value in found.items()}


def best_thresholds(validation: Predictions, per_label: bool = False) -> float | np.ndarray:
    """The threshold of the highest micro-F1 on validation documents, for `dataclasses.replace(test, thresholds=…)`.

    With `per_label` one for each label, shape (n_labels,), from its own F1; a label that no document has gets the common one.
    """
    if not validation.multi_label:
        raise BookError(f"{validation.approach}: a single-label task has no thresholds; it predicts the most probable label.")

    def best(gold: np.ndarray, probabilities: np.ndarray) -> float:
        precision, recall, cuts = precision_recall_curve(gold, probabilities)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        chosen = int(f1[:-1].argmax())
        return float(cuts[chosen] + (cuts[chosen - 1] if chosen else 0.0)) / 2  # halfway to the next one, not predicted

    common = best(validation.gold.ravel(), validation.probabilities.ravel())
    if not per_label:
        return common
    columns = zip(validation.gold.T, validation.probabilities.T, strict=True)
    return np.array([best(*column) if column[0].any() else common for column in columns])


def compare(a: Predictions, b: Predictions, confidence: float = 0.95, n_resamples: int = 9999, seed: int = 0) -> dict[str, float]:
    """Is `a` better than `b` on the same documents? Paired, because both predict each of them.

    Returns `difference` in accuracy (a - b, in -1..1) with its bootstrap interval `low`, `high`; the same with `macro_f1_` and
    `micro_f1_` before these names; `only_a` and `only_b`, the documents that just one of them gets right; `p_value` of the exact
    McNemar test on these two or, where documents share a group, of a permutation test that swaps a and b in whole groups.

    BookError: documents, groups or runs are not the same, or there is only one document or group.
    """
    bootstrap.check_pair(a, b)

    def difference(drawn: np.ndarray | None = None) -> np.ndarray:
        return bootstrap.scores(a, drawn) - bootstrap.scores(b, drawn)

    low, high = bootstrap.interval(difference, a, confidence, n_resamples, seed)
    found = {}
    for name, values in {"difference": difference(), "low": low, "high": high}.items():
        found |= {f"{metric}{name}": float(value) for metric, value in zip(("", "macro_f1_", "micro_f1_"), values, strict=True)}
    only_a, only_b = (a.correct & ~b.correct).sum(), (b.correct & ~a.correct).sum()
    return found | {"only_a": int(only_a), "only_b": int(only_b), "p_value": bootstrap.p_value(a, b, seed)}


def pool(results: Sequence[Predictions]) -> Predictions:
    """Join the predictions of several seeds. A document that is in several test sets must have the same group in each."""
    grouped = all(each.groups is not None for each in results)
    return replace(
        results[0],
        probabilities=np.concatenate([each.probabilities for each in results]),
        gold=np.concatenate([each.gold for each in results]),
        groups=np.concatenate([each.groups for each in results]) if grouped else None,
        seconds=sum(each.seconds for each in results),
        training_seconds=float(np.mean([each.training_seconds for each in results])),
        test_set=" ".join(each.test_set for each in results).strip(),
        thresholds=np.concatenate([np.broadcast_to(each.thresholds, each.probabilities.shape) for each in results]),
        runs=np.repeat(np.arange(len(results)), [len(each.gold) for each in results]),
    )


def table(results: Iterable[Predictions]) -> pd.DataFrame:
    """A row for each approach: `evaluate` in percent, and the cost, unrounded; `show` formats it."""
    rows = []
    for each in results:
        cost = {name: getattr(each, name) for name in ("trainable_parameters", "training_seconds", "documents_per_second")}
        rows.append({"approach": each.approach} | {name: 100 * value for name, value in evaluate(each).items()} | cost)
    return pd.DataFrame(rows).set_index("approach")


def show(results: pd.DataFrame) -> pd.DataFrame:
    """`table` as a reader wants to see it: scores in percent with their 95 % intervals, whole numbers with commas."""
    shown = pd.DataFrame(index=results.index.rename(None))
    for metric, heading, interval in (("accuracy", "accuracy %", "95 % interval"), ("macro_f1", "macro-F1 %", "95 % interval ")):
        score, low, high = (results[f"{metric}{end}"].map("{:.1f}".format) for end in ("", "_low", "_high"))
        shown[heading], shown[interval] = score, low + "\xa0to\xa0" + high
    shown["trained numbers"] = results["trainable_parameters"].map("{:,}".format)
    for heading, name in {"training s": "training_seconds", "documents/s": "documents_per_second"}.items():
        shown[heading] = [f"{value:,.{int(value < 100)}f}".replace("nan", "—") for value in results[name]]
    return shown
