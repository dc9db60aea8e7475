"""Recorded runs, which the book's figures and sentences are drawn from: one JSON object a line, probabilities included.

A run is known by its `key`: the approach's class name and settings, the task and its options, seed and profile. These names are
frozen: code may move, and what has to be renamed goes through `RENAMED`. `helpers.lab.sweeps` makes the records.
"""

import base64
import copy
import json
import sys
import zlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.errors import BookError
from helpers.evaluation import Predictions

# The new name of an approach ("Class") or of a setting ("Class.setting", by the class's old name); None: the setting is gone.
RENAMED: dict[str, str | None] = {}

# The default that each setting had when it was introduced, or when recording began if it is older than that. A record without a
# setting was made before it and counts with this one, whatever the default is today: add new settings, do not follow changes.
DEFAULTS: dict[str, dict] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def read(path: str | Path) -> list[dict]:
    """The records of a file, oldest first, in today's names and with every setting; none if there is no such file.

    A last line without an end was torn by a crash or a cut copy: it is left out, with a word on stderr. BookError: another line
    that is no record, or two records of the same run.
    """
    path, records = Path(path), {}
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            record = json.loads(line)
            record["key"] = _migrated(record["key"])
            record = unpack(record)
        except (ValueError, TypeError, KeyError, zlib.error) as error:
            if number > len(lines):
                print(f"{path}: the last line is torn and left out; its run will be made again.", file=sys.stderr)
                break
            raise BookError(f"{path}, line {number} is no record ({error!r}). Delete it; its run is then made again.") from error
        run = json.dumps(record["key"], sort_keys=True)
        if run in records:
            first = list(records).index(run) + 1
            raise BookError(f"{path}, line {number} records the same run as line {first}. Delete one of them.")
        records[run] = record
    return list(records.values())


def _migrated(key: dict) -> dict:
    """A run's key in today's names, with the settings that its record lacks."""
    if "settings" not in key:  # a benchmark's
        return key
    approach = key["approach"]
    settings = copy.deepcopy(DEFAULTS.get(approach, {})) | key["settings"]
    settings = {RENAMED.get(f"{approach}.{name}", name): value for name, value in settings.items()}
    settings.pop(None, None)
    return key | {"approach": RENAMED.get(approach, approach), "settings": settings}


def pack(record: dict) -> dict:
    """A record as a file holds it: five digits of each probability, and the groups, compressed, as text (base 85)."""
    if "probabilities" not in record:  # a benchmark's
        return record
    record = {name: pack(value) if isinstance(value, dict) and "gold" in value else value for name, value in record.items()}
    digits = np.round(np.array(record["probabilities"]) * 100_000).astype("<u4")
    planes = digits.view(np.uint8).reshape(-1, 4).T[:3]  # the lowest bytes of all numbers, then the next: alike beside alike
    record["probabilities"] = _compressed(planes.tobytes())
    if record.get("groups"):
        record["groups"] = _compressed(bytes.fromhex("".join(record["groups"])))
    return record


def unpack(record: dict) -> dict:
    """What `pack` was given: lists, of a row for each document. A record that is not packed stays as it is."""
    record = {name: unpack(value) if isinstance(value, dict) and "gold" in value else value for name, value in record.items()}
    n_documents = len(record.get("gold", []))
    if isinstance(record.get("probabilities"), str):
        planes = np.frombuffer(_expanded(record["probabilities"]), np.uint8).reshape(3, -1).astype(int)
        digits = planes[0] + 256 * planes[1] + 65_536 * planes[2]
        record["probabilities"] = (digits / 100_000).reshape(n_documents, -1).tolist()
    if isinstance(record.get("groups"), str):
        fingerprints = _expanded(record["groups"]).hex()
        record["groups"] = [fingerprints[8 * row : 8 * row + 8] for row in range(n_documents)]
    return record


def _compressed(content: bytes) -> str:
    return base64.b85encode(zlib.compress(content, 9)).decode()


def _expanded(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


def title(key: dict) -> str:
    """A run in a few words: its task, and what differs from `DEFAULTS`."""
    defaults = (DEFAULTS.get(key["approach"], {}) | {"seed": key["seed"]}).items()
    changed = [f"{name}={value}" for name, value in key["settings"].items() if (name, value) not in defaults]
    options = [f"{name}={value}" for name, value in key["options"].items()]
    return f"{key['task']}({', '.join(options)}) {key['approach']}({', '.join(changed)}) seed {key['seed']}"


def predictions_of(record: dict) -> Predictions:
    """A record's predictions; its probabilities are those to five digits."""
    cost = {field.name: record["cost"][field.name] for field in fields(Predictions) if field.name in record["cost"]}
    probabilities, gold = np.array(record["probabilities"]), np.array(record["gold"])
    if gold.ndim == 1:
        probabilities /= probabilities.sum(axis=1, keepdims=True)  # undo what rounding did to many labels
    more = {"test_set": record["test_set"], "groups": None if record["groups"] is None else np.array(record["groups"])}
    return Predictions(record["name"], tuple(record["labels"]), probabilities, gold, **cost, **more)


def validation_of(record: dict) -> Predictions:
    """A record's predictions for the validation documents; BookError if the sweep did not ask for them."""
    if "validation" not in record:
        raise BookError(f"{title(record['key'])}: nothing was recorded on validation. Put `validation: true` into its sweep.")
    return predictions_of({**record, **record["validation"], "test_set": "", "groups": None})


def frame(records: Iterable[dict]) -> pd.DataFrame:
    """Records as a table to filter, group and draw, a row each, with metrics in 0..1 and the cost in seconds, bytes and counts.

    `task` says what is read of its texts, `rank` is NaN without LoRA, and `record` is the record itself.
    """
    rows = []
    for record in records:
        key, options = record["key"], record["key"]["options"]
        task = key["task"] + "".join(f", {options[name]} {name}" for name in ("words", "tokens") if name in options)
        task += f" of {options['tokenizer']}" if "tokenizer" in options else ""
        task += "".join(f", {name} {options[name]}" for name in ("part", "wrong_labels", "kept") if name in options)
        row = {"task": task, "approach": record["name"], "seed": key["seed"], "profile": key["profile"]}
        rows.append(row | {"rank": key["settings"].get("rank")} | record["metrics"] | record["cost"] | {"record": record})
    return pd.DataFrame(rows)
