"""Recorded runs, which the book's figures and sentences are drawn from: one JSON object a line, probabilities included.

A run is known by its `key`: the approach's class name and settings, the task and its options, seed and profile. These names are
frozen: code may move, and what has to be renamed goes through `RENAMED`. `helpers.lab.sweeps` makes the records.
"""

import copy
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.errors import BookError
from helpers.evaluation import Predictions

_COST = ("seconds", "training_seconds", "trainable_parameters", "tokens", "peak_memory")  # what `Predictions` takes of it

# The new name of an approach ("Class") or of a setting ("Class.setting", by the class's old name); None: the setting is gone.
RENAMED: dict[str, str | None] = {}

# The default that each setting had when it was introduced, or when recording began if it is older than that. A record without a
# setting was made before it and counts with this one, whatever the default is today: add new settings, do not follow changes.
_MODEL = {"base_model": "SmolLM2-135M-Instruct", "suffix": "\n\nThe topic of this article is"}
_TRAINING = {"learning_rate": 5e-4, "batch_size": 8, "seed": 0, "checkpoints": None}
_ADAPTER = {"n_layers": 10, "rank": 16, "lora": {}, "precision": None}
_PROMPT = {"prefix": "", "chat": False, "shots": 0, "verbalizer": None, "ask": "list", "order": "task", "prompt_loss_weight": 0.0}
_ENCODER = {"base_model": "all-MiniLM-L6-v2", "n_layers": None, "learning_rate": 2e-4, "batch_size": 16, "seed": 0}
_STUDENT = {"teacher": "teachers", "of": "EmbeddingHead", "seed": 0}
_HEAD = {"probe_init": True, "causal": True, "epochs": 2, "name": "embedding head + LoRA"}
_PROBE = {"pooling": "last", "layer": None, "causal": True, "quantized": True, "name": "frozen embedding + probe"}
DEFAULTS = {
    "Majority": {"name": "majority class"},
    "TfidfSvm": {"C": 1.0, "name": "TF-IDF + linear SVM"},
    "FrozenProbe": {**_MODEL, **_PROBE},
    "FineTunedEncoder": {**_ENCODER, "epochs": 5, "name": "MiniLM, fine-tuned"},
    "DistilledEncoder": {**_ENCODER, **_STUDENT, "epochs": 4, "temperature": 2.0, "name": "MiniLM, distilled"},
    "DistilledTfidf": {**_STUDENT, "C": 10.0, "name": "TF-IDF, distilled"},
    "EmbeddingHead": {**_MODEL, **_ADAPTER, **_TRAINING, **_HEAD},
    "InstructionTuned": {**_MODEL, **_ADAPTER, **_TRAINING, **_PROMPT, "epochs": 4, "name": "instruction tuning + LoRA"},
}


def read(path: str | Path) -> list[dict]:
    """The records of a file, oldest first, in today's names and with every setting; none if there is no such file.

    A last line without an end was torn by a crash or a cut copy: it is left out, with a word on stderr.

    Raises:
        BookError: another line that is no record, or two records of the same run.
    """
    path, records, seen = Path(path), [], {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if last and not line:
            break
        try:
            record = json.loads(line)
            record["key"] = _migrated(record["key"])
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            if last:
                print(f"{path}: the last line is torn and left out; its run will be made again.", file=sys.stderr)
                break
            raise BookError(f"{path}, line {number} is no record ({error!r}). Delete it; its run is then made again.") from error
        run = json.dumps(record["key"], sort_keys=True)
        if run in seen:
            raise BookError(f"{path}, line {number} records the same run as line {seen[run]}. Delete one of them.")
        seen[run] = number
        records.append(record)
    return records


def _migrated(key: dict) -> dict:
    """A run's key in today's names, with the settings that its record lacks."""
    if "approach" not in key:
        return key
    approach = key["approach"]
    settings = copy.deepcopy(DEFAULTS.get(approach, {})) | key["settings"]
    settings = {RENAMED.get(f"{approach}.{name}", name): value for name, value in settings.items()}
    settings.pop(None, None)
    return key | {"approach": RENAMED.get(approach, approach), "settings": settings}


def title(key: dict) -> str:
    """A run in a few words: its task, and what differs from `DEFAULTS`."""
    defaults = DEFAULTS.get(key["approach"], {}) | {"seed": key["seed"]}
    changed = [f"{name}={value}" for name, value in key["settings"].items() if name not in defaults or defaults[name] != value]
    options = [f"{name}={value}" for name, value in key["options"].items()]
    return f"{key['task']}({', '.join(options)}) {key['approach']}({', '.join(changed)}) seed {key['seed']}"


def predictions_of(record: dict) -> Predictions:
    """A record's predictions, with probabilities to five digits."""
    cost = {name: record["cost"][name] for name in _COST}
    probabilities, gold = np.array(record["probabilities"]), np.array(record["gold"])
    if gold.ndim == 1:
        probabilities /= probabilities.sum(axis=1, keepdims=True)  # undo what rounding did to many labels
    groups = None if record["groups"] is None else np.array(record["groups"])
    labels, test_set = tuple(record["labels"]), record["test_set"]
    return Predictions(record["name"], labels, probabilities, gold, **cost, test_set=test_set, groups=groups)


def validation_of(record: dict) -> Predictions:
    """A record's predictions for the validation documents; BookError if the sweep did not ask for them."""
    if "validation" not in record:
        raise BookError(f"{title(record['key'])}: nothing was recorded on validation. Put `validation: true` into its sweep.")
    return predictions_of({**record, **record["validation"], "test_set": "", "groups": None})


def frame(records: Iterable[dict]) -> pd.DataFrame:
    """Records as a table to filter, group and draw, a row each.

    Columns are `task` (and what is read of its texts), `approach` (its name), `seed`, `profile`, `rank` (NaN without LoRA), the
    metrics in 0..1, the cost (seconds, bytes, counts) and the `record` itself.
    """
    rows = []
    for record in records:
        key, options = record["key"], record["key"]["options"]
        cut = "".join(f", {options[name]} {name}" for name in ("words", "tokens") if name in options)
        cut += f" of {options['tokenizer']}" if "tokenizer" in options else ""
        known = {"task": key["task"] + cut, "approach": record["name"], "seed": key["seed"], "profile": key["profile"]}
        known |= {"rank": key["settings"].get("rank"), **record["metrics"], **record["cost"], "record": record}
        rows.append(known)
    return pd.DataFrame(rows)
