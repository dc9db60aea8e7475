"""Recorded runs: what a table or figure is drawn from, one JSON object a line, with everything needed to believe it.

python -m helpers.runs book/results/side_by_side.yaml
"""

import argparse
import ctypes
import gc
import hashlib
import inspect
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm

from helpers import base_models, baselines, distillation, embedding_head, instruction, profiles, sources, tasks
from helpers.errors import BookError, unknown_name
from helpers.evaluation import Predictions, evaluate, measure

APPROACHES = {
    each.__name__: each
    for each in (
        baselines.Majority,
        baselines.TfidfSvm,
        baselines.FrozenProbe,
        baselines.FineTunedEncoder,
        distillation.DistilledEncoder,
        distillation.DistilledTfidf,
        embedding_head.EmbeddingHead,
        instruction.InstructionTuned,
    )
}
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "scikit-learn")
SHORTEN = {  # what a sweep may say of a task, and how its texts are then shortened
    "words": tasks.first_words,
    "tokens": lambda n: tasks.first_tokens(base_models.load_tokenizer(), n),
}
_SWEEP = ("tasks", "seeds", "approaches", "validation", "base_model", "full")
CONTENT_FREE = ("N/A", "[MASK]", "...")  # what contextual calibration asks about
_SPLIT = tuple(name for name, each in inspect.signature(tasks.split).parameters.items() if each.kind is each.KEYWORD_ONLY)


def provenance() -> dict:
    """Device, threads, library versions, commit and date."""
    profile = profiles.current()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name() if profile.device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(profile.dtype).removeprefix("torch."),
        "quantization": "NF4" if profile.quantization else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": git.stdout.strip() or None,
        "date": date.today().isoformat(),
    }


def other_versions(records: Iterable[dict]) -> list[str]:
    """One line for every library version that made some of `records` and is not the one installed here."""
    here, counted = {name: version(name).split("+")[0] for name in LIBRARIES}, {}
    for record in records:
        for name, then in record["provenance"]["versions"].items():
            if then.split("+")[0] != here.get(name):
                counted[name, then] = counted.get((name, then), 0) + 1
    return [f"{n} records were made with {name} {then}; here it is {here.get(name)}." for (name, then), n in counted.items()]


def read(path: str | Path) -> list[dict]:
    """The records of a file, oldest first; none if there is no such file.

    A last line without an end was torn by a crash or a cut copy: it is left out, with a word on stderr, and `append` takes
    it away. A record from before an approach had some setting gets that setting's default.

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
            if approach := APPROACHES.get(record["key"].get("approach")):
                record["key"]["settings"] = asdict(approach()) | record["key"]["settings"]
            run = json.dumps(record["key"], sort_keys=True)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            if last:
                print(f"{path}: the last line is torn and left out; its run will be made again.", file=sys.stderr)
                break
            raise BookError(f"{path}, line {number} is no record ({error!r}). Delete it; its run is then made again.") from error
        if run in seen:
            raise BookError(f"{path}, line {number} records the same run as line {seen[run]}. Delete one of them.")
        seen[run] = number
        records.append(record)
    return records


def append(path: str | Path, record: dict) -> bool:
    """Add `record` to the file, unless it holds the same run already; returns whether it was added.

    The new file is written beside the old one and put in its place at once, under a lock: whenever the process dies, the
    file has the record or does not have it, and two processes can write to it.
    """
    path = Path(path)
    with FileLock(f"{path}.lock"):
        records = read(path)
        if any(record["key"] == each["key"] for each in records):
            return False
        written = path.with_name(f"{path.name}.tmp")
        with open(written, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in [*records, record])
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
    return True


def predictions_of(record: dict) -> Predictions:
    """A record's predictions, as its approach gave them (probabilities to five digits)."""
    kept = ("seconds", "training_seconds", "trainable_parameters", "tokens", "peak_memory")
    cost = {name: record["cost"][name] for name in kept}
    probabilities, gold = np.array(record["probabilities"]), np.array(record["gold"])
    if gold.ndim == 1:
        probabilities /= probabilities.sum(axis=1, keepdims=True)  # undo what rounding did to many labels
    groups = None if record["groups"] is None else np.array(record["groups"])
    known = {"test_set": record["test_set"], "groups": groups}
    return Predictions(record["name"], tuple(record["labels"]), probabilities, gold, **cost, **known)


def frame(records: Iterable[dict]) -> pd.DataFrame:
    """Records as a table to filter, group and draw: a row each, with the record itself in the column `record`.

    Returns:
        Columns `task` (with what was kept of its texts), `approach` (its name), `seed`, `rank` (NaN without LoRA), `profile`,
        the metrics in 0..1, the cost and `record`.
    """
    rows = []
    for record in records:
        key = record["key"]
        options = key["options"]
        kept = "".join(f", {options[name]} {name}" for name in SHORTEN if name in options)
        rows.append(
            {
                "task": key["task"] + kept,
                "approach": record["name"],
                "seed": key["seed"],
                "rank": key["settings"].get("rank"),
                "profile": key["profile"],
                **record["metrics"],
                **record["cost"],
                "record": record,
            }
        )
    return pd.DataFrame(rows)


def validation_of(record: dict) -> Predictions:
    """A record's predictions for the validation documents, to choose thresholds and temperatures on.

    Raises:
        BookError: the sweep did not ask for them.
    """
    if "validation" not in record:
        raise BookError(f"{_title(record['key'])}: nothing was recorded on validation. Put `validation: true` into its sweep.")
    return predictions_of({**record, **record["validation"], "test_set": "", "groups": None})


def load_task(key: dict) -> tasks.Task:
    """The task of a run, in the splits of its seed."""
    options = dict(key["options"])
    for name, shorten in SHORTEN.items():
        if name in options:
            options["shorten"] = shorten(options.pop(name))
    return tasks.load(key["task"], seed=key["seed"], **options)


def test_set(task: tasks.Task) -> str:
    """A fingerprint of the test documents with their labels: equal only for the same documents in the same order."""
    rows = [[document["label"], document["text"]] for document in task.test]
    return hashlib.sha256(json.dumps([task.labels, rows], ensure_ascii=False).encode()).hexdigest()


def groups_of(task: tasks.Task) -> list[str]:
    """For each test document a short fingerprint of its group, or of its text: equal for the same one in other splits."""
    column = "group" if "group" in task.test.column_names else "text"
    return [hashlib.sha256(each.encode()).hexdigest()[:8] for each in task.test[column]]


def run(key: dict, save: str | Path | None = None) -> dict:
    """Make one run and return its record.

    Args:
        key: what is run: `approach` and its `settings`, `task` and its `options`, `seed`, `profile`; with `validation`, what
            the approach says about the validation documents and about `CONTENT_FREE` texts is recorded too.
        save: a folder for the trained adapter, see `Adapted.save`.
    """
    give_back_memory()  # so that the peak is that of this run
    task = load_task(key)
    with measure() as training:
        approach = APPROACHES[key["approach"]](**key["settings"]).fit(task)
    if save is not None:
        approach.save(save)
    said = replace(approach.predict(task.test), test_set=test_set(task), groups=np.array(groups_of(task)))
    more = {}
    if key.get("validation"):
        blank = Dataset.from_dict({"text": list(CONTENT_FREE), "label": task.validation["label"][: len(CONTENT_FREE)]})
        asked = {"validation": task.validation, "content_free": blank}
        more = {name: _said(approach.predict(documents)) for name, documents in asked.items()}
    record = {
        "key": key,
        "name": said.approach,
        "content_hash": task.content_hash(),
        "test_set": said.test_set,
        "labels": said.labels,
        "metrics": None,
        "cost": {
            "training_seconds": said.training_seconds,
            "training_peak_memory": training.peak_memory,
            "seconds": said.seconds,
            "documents_per_second": said.documents_per_second,
            "tokens_per_second": said.tokens / said.seconds if said.tokens else None,
            "tokens": said.tokens,
            "peak_memory": said.peak_memory,
            "trainable_parameters": said.trainable_parameters,
            "adapter_bytes": _adapter_bytes(approach),
        },
        "provenance": provenance(),
        "groups": said.groups.tolist(),
        **_said(said),
        **more,
    }
    return record | {"metrics": evaluate(predictions_of(record))}  # of what is recorded, rounded as it is


def _said(said: Predictions) -> dict:
    return {"gold": said.gold.tolist(), "probabilities": said.probabilities.round(5).tolist()}


def keys(sweep: dict) -> list[dict]:
    """Every run of a sweep, each once: task by task and seed by seed, all approaches in all their settings.

    Args:
        sweep: `tasks` and `approaches`, lists of `name: options`, where an approach's option may be a list, which is tried
            value by value; `seeds`; optionally `validation: true`, see `run`; `base_model`, for every approach that has the
            book's base model; and `full`, what is different under the full profile.

    Raises:
        BookError: an unknown entry, task, option, approach or setting (the nearest is suggested), or one that is missing.
    """
    profile = profiles.current().name
    sweep = checked(sweep, "entry of a sweep", _SWEEP)
    different = checked(sweep.pop("full", None) or {}, "entry of `full`", _SWEEP[:-1])
    sweep |= different if profile == "full" else {}
    for entry in _SWEEP[:3]:
        if not isinstance(sweep.get(entry), list) or not sweep[entry]:
            raise BookError(f"A sweep needs {entry!r}, a list with one entry or more. It has {sweep.get(entry)!r}.")
    found = []
    for task, seed, approach in itertools.product(sweep["tasks"], sweep["seeds"], sweep["approaches"]):
        (task, options), (name, settings) = _named(task), _named(approach)
        if task not in sources.TASKS:
            raise unknown_name("task", task, sources.TASKS)
        if name not in APPROACHES:
            raise unknown_name("approach", name, APPROACHES)
        defaults = {each.name: each.default for each in fields(APPROACHES[name])}
        options = checked(options, "option of a task", (*SHORTEN, *(set(_SPLIT) - {"shorten", "seed"})))
        settings = checked(settings, f"setting of {name}", defaults)
        if "base_model" in sweep and defaults.get("base_model") == base_models.DEFAULT:
            settings.setdefault("base_model", sweep["base_model"])
        if "seed" in defaults:
            settings["seed"] = seed
        grid = [value if isinstance(value, list) else [value] for value in settings.values()]
        for values in itertools.product(*grid):
            # all settings, so that a record does not count any more when a default has changed
            complete = asdict(APPROACHES[name](**dict(zip(settings, values, strict=True))))
            made = {"approach": name, "settings": complete, "task": task, "options": options, "seed": seed, "profile": profile}
            made |= {"validation": True} if sweep.get("validation") else {}
            if made not in found:
                found.append(made)
    return found


def missing(sweep: str | Path, path: str | Path | None = None) -> list[dict]:
    """The runs of a sweep file that `path` (or the file beside it) does not hold yet.

    Raises:
        BookError: the file is no sweep, or what `keys` and `read` refuse.
    """
    done = [record["key"] for record in read(path or Path(sweep).with_suffix(".jsonl"))]
    return [key for key in keys(load_sweep(Path(sweep))) if key not in done]


def make(
    to_do: Iterable[dict], path: str | Path, save: Callable[[dict], Path | None] = lambda key: None, progress: bool = True
) -> list[str]:
    """Make runs one after the other, each recorded in `path` as soon as it is done.

    Args:
        save: the folder for the adapter of a run, or None.
        progress: show a bar.

    Returns:
        One line for each run that failed; the others are made all the same.
    """
    failed = []
    bar = tqdm(list(to_do), unit="run", disable=not progress)
    for key in bar:
        bar.set_postfix_str(_title(key))
        if key in [record["key"] for record in read(path)]:
            continue  # another process made it
        try:
            append(path, run(key, save(key)))
        except Exception as error:
            failed.append(f"{_title(key)}: {type(error).__name__}: {error}")
            tqdm.write(failed[-1], file=sys.stderr)
    return failed


def main(arguments: list[str] | None = None) -> None:
    """Make the runs of a sweep that are not recorded yet. Stop it whenever you like: it goes on where it was."""
    parser = argparse.ArgumentParser(prog="python -m helpers.runs", description=main.__doc__)
    parser.add_argument("sweep", type=Path, help="a YAML file; the records go beside it, as .jsonl")
    parser.add_argument("--out", type=Path, help="the records' file, if it is another one")
    parser.add_argument("--list", action="store_true", help="only say what is recorded and what is not")
    given = parser.parse_args(arguments)
    path = given.out or given.sweep.with_suffix(".jsonl")
    try:
        wanted, to_do = keys(load_sweep(given.sweep)), missing(given.sweep, path)
        made = [record for record in read(path) if record["key"] in wanted]
        print(f"{path}: {len(made)} of {len(wanted)} runs are recorded", *other_versions(made), sep="\n")
        if given.list:
            print(*(f"not yet run: {_title(key)}" for key in to_do), sep="\n")
            return
        failed = make(to_do, path)
    except BookError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{len(failed)} of {len(to_do)} runs failed; the others are recorded.")
    print(f"{path}: all {len(wanted)} runs are recorded")


def load_sweep(sweep: Path) -> dict:
    """What a sweep file says.

    Raises:
        BookError: it cannot be read, or is no YAML with entries.
    """
    try:
        found = yaml.safe_load(sweep.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BookError(f"{sweep} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise BookError(f"{sweep} is no sweep: it needs the entries {', '.join(_SWEEP[:3])}.")
    return found


def checked(given: dict | None, kind: str, known: Iterable[str]) -> dict:
    """A copy of `given`, an empty one of None.

    Raises:
        BookError: it is no dictionary, or one of its names is not in `known`; the nearest is suggested.
    """
    if not isinstance(given or {}, dict):
        raise BookError(f"Each {kind} is written as `name: value`, not {given!r}.")
    for name in given or {}:
        if name not in known:
            raise unknown_name(kind, name, known)
    return dict(given or {})


def _named(entry: dict | str) -> tuple[str, dict | None]:
    """`- name: options` or just `- name`."""
    if isinstance(entry, str):
        return entry, None
    if not isinstance(entry, dict) or len(entry) != 1:
        raise BookError(f"A task or an approach is written as `- name: {{option: value}}`, not {entry!r}.")
    return next(iter(entry.items()))


def _title(key: dict) -> str:
    """A run in a few words: what differs from the defaults."""
    defaults = asdict(APPROACHES[key["approach"]]()) | {"seed": key["seed"]}
    changed = [f"{name}={value}" for name, value in key["settings"].items() if defaults[name] != value]
    options = [f"{name}={value}" for name, value in key["options"].items()]
    return f"{key['task']}({', '.join(options)}) {key['approach']}({', '.join(changed)}) seed {key['seed']}"


def give_back_memory() -> None:
    """Return what earlier runs in this process held to the system, as far as it lets us."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # in glibc only


def _adapter_bytes(approach) -> int | None:
    """What a trained adapter and its head take on disk; None where there is no adapter."""
    if not hasattr(getattr(approach, "model", None), "peft_config"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        approach.model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _processor() -> str:
    """The CPU's name, as /proc/cpuinfo has it on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
