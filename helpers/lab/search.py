"""Every approach at its own best: settings of a grid are tried on validation documents, and of each the best epoch is kept."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from datasets import Dataset
from sklearn.model_selection import ParameterGrid
from transformers import TrainerCallback

from helpers.approach import Approach
from helpers.bootstrap import scores
from helpers.checkpoints import write_whole
from helpers.errors import BookError
from helpers.evaluation import Predictions, best_thresholds, measure
from helpers.tasks import Task

BEYOND = 3  # so many values at most are tried outside of a grid whose best one lies at its edge
# settings that the lower layers' states, or a probe's embeddings, depend on
_OF_LOWER = ("base_model", "n_layers", "precision", "causal", "pooling", "layer", "quantized")
VALIDATIONS = 4  # at most in one training


def on_validation(approach: Approach, documents: Dataset) -> dict[str, float]:
    """How good `approach` is on validation documents: `macro_f1`, `micro_f1`, `log_loss` (nats a decision), and the `seconds`.

    Multi-label scores are those at the threshold of the best micro-F1 (`evaluation.best_thresholds`).
    """
    with measure() as cost:
        probabilities = approach.predict_proba(list(documents["text"]))
    if not np.isfinite(probabilities).all():  # steps were too large: the training went astray
        return {"macro_f1": 0.0, "micro_f1": 0.0, "log_loss": 1e6, "seconds": cost.seconds}
    found = Predictions(approach.name, approach.labels, probabilities, documents["label"])
    if found.multi_label:
        found = replace(found, thresholds=best_thresholds(found))
        of_gold = np.where(found.gold == 1, found.probabilities, 1 - found.probabilities)
    else:
        of_gold = found.probabilities[np.arange(len(found.gold)), found.gold]
    _, macro_f1, micro_f1 = map(float, scores(found))
    log_loss = float(-np.log(of_gold.clip(1e-12)).mean())
    found = {"macro_f1": macro_f1, "micro_f1": micro_f1, "log_loss": log_loss, "seconds": cost.seconds}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def rank(tried: dict) -> tuple[float, float]:
    """What the best one of `on_validation`s has most of: macro-F1, and of equal ones the least log loss."""
    return tried["macro_f1"], -tried["log_loss"]


class BestEpoch(TrainerCallback):
    """Asks the approach about validation documents after every epoch and, at the end, gives it the weights of the best one.

    That is the Trainer's `load_best_model_at_end`, for approaches whose answers are not the Trainer's: labels are scored, and the
    layers below the adapters are computed once. Of more than `VALIDATIONS` epochs every second one (third, …) is asked, the last
    in any case. `epochs` has a result of `on_validation` for each, with the number of the `epoch`.
    """

    def __init__(self, approach: Approach, validation: Dataset) -> None:
        self.approach, self.validation, self.epochs = approach, validation, []

    def on_epoch_end(self, args, state, control, model, **_) -> None:
        """Keep the trained weights if no earlier epoch was better."""
        epoch, last = round(state.epoch), round(args.num_train_epochs)
        if epoch % -(-last // VALIDATIONS) and epoch != last:
            return
        model.eval()
        self.epochs.append({"epoch": epoch} | on_validation(self.approach, self.validation))
        model.train()
        if self.epochs[-1] is max(self.epochs, key=rank):
            trained = ((name, each) for name, each in model.named_parameters() if each.requires_grad)
            self._best = {name: each.detach().clone() for name, each in trained}

    def on_train_end(self, args, state, control, model, **_) -> None:
        """Give the weights back."""
        model.load_state_dict(self._best, strict=False)


@dataclass
class BestEpochOption:
    """`best_epoch` for approaches that are trained with the Trainer: the weights after the best epoch (`BestEpoch`)."""

    best_epoch: bool = False

    def fit(self, task: Task) -> Self:
        """As `Approach.fit`. BookError: the best epoch together with checkpoints."""
        if self.best_epoch and getattr(self, "checkpoints", None):
            raise BookError("The best epoch is known only to a training in one piece: use checkpoints=None with best_epoch.")
        self.callbacks = [BestEpoch(self, task.validation)] if self.best_epoch else []
        return super().fit(task)


def fit(approach: Approach, task: Task) -> list[dict]:
    """Fit in place, the time for validation left out of `training_seconds`; returns what `BestEpoch` saw, nothing without it."""
    approach.fit(task)
    epochs = [each for callback in approach.callbacks for each in callback.epochs]
    approach.training_seconds -= sum(each["seconds"] for each in epochs)
    return epochs


def search(kind: type[Approach], settings: dict, task: Task, folder: Path) -> tuple[Approach, list[dict]]:
    """Try every configuration of a grid on `task.validation`, and more of them while the best one lies at an edge.

    The layers below the adapters are computed once for all. What is done lies in `folder`: a stopped search goes on there.

    Args:
        settings: of `kind`; a list holds the values to try.

    Returns:
        The fitted approach of the best configuration, and for each that was tried its `settings`, what `on_validation` said, and
        `training_seconds` without validation; where the best epoch is kept, also its number and all `epochs` that were asked.
    """
    grid = {name: values for name, values in settings.items() if isinstance(values, list)}
    notes, lower_states = folder / "tried.json", {}
    shutil.rmtree(folder / "new", ignore_errors=True)  # of a search that was stopped while it saved
    tried = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else []
    for chosen in _to_try(grid, tried):
        approach = kind(**settings | chosen)
        approach.lower_states = lower_states.setdefault(tuple(getattr(approach, name, None) for name in _OF_LOWER), {})
        epochs = fit(approach, task)
        row = {"settings": chosen, "training_seconds": round(approach.training_seconds, 2)}
        row |= max(epochs, key=rank) if epochs else on_validation(approach, task.validation)
        row |= {"epochs": epochs} if epochs else {}
        if not tried or rank(row) > max(map(rank, tried)):
            approach.save(folder / "new")
            shutil.rmtree(folder / "best", ignore_errors=True)
            (folder / "new").rename(folder / "best")
        tried.append(row)
        write_whole(notes, json.dumps(tried))
    return kind.load(folder / "best"), tried


def _to_try(grid: dict[str, list], tried: list[dict]) -> Iterator[dict]:
    """Configurations that are not in `tried`, which grows meanwhile: those of the grid, then those beyond its edges."""
    for chosen in ParameterGrid(grid):
        if chosen not in [row["settings"] for row in tried]:
            yield chosen
    while beyond := beyond_edge(grid, tried):
        yield beyond


def beyond_edge(grid: dict[str, list], tried: list[dict]) -> dict | None:
    """The configuration to try next, where the best value of a setting is the least or greatest one tried; else None.

    Only numbers above zero have edges. None too for one value, or once `BEYOND` values outside of the grid were tried.
    """
    best = max(tried, key=rank)["settings"]
    for name, values in grid.items():
        others = {other: value for other, value in best.items() if other != name}
        values_tried = [row["settings"][name] for row in tried if row["settings"].items() >= others.items()]
        numbers = all(type(value) in (int, float) and value > 0 for value in values)
        if not numbers or not 2 <= len(values_tried) < len(values) + BEYOND:
            continue
        ordered = sorted(values_tried)
        outside = {ordered[0]: ordered[0] ** 2 / ordered[1], ordered[-1]: ordered[-1] ** 2 / ordered[-2]}
        if best[name] in outside:
            value = type(values[0])(float(f"{outside[best[name]]:.3g}"))  # whole numbers stay whole
            if value and value not in values_tried:
                return best | {name: value}
    return None
