"""Make recorded runs: python -m helpers.lab.sweeps book/results/side_by_side.yaml."""

import argparse
import ctypes
import gc
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import date
from importlib.metadata import version
from itertools import repeat
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset
from filelock import FileLock
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save as as_bytes
from sklearn.model_selection import ParameterGrid
from tqdm.auto import tqdm

from helpers import base_models, corpora, downloads, profiles, records, tasks
from helpers.checkpoints import write_whole
from helpers.errors import BookError, check_name
from helpers.evaluation import Predictions, evaluate
from helpers.lab import as_it_comes, search
from helpers.lab.approaches import APPROACHES

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "scikit-learn")
CONTENT_FREE = ("N/A", "[MASK]", "...")  # what contextual calibration asks about (Zhao et al. 2021, arXiv 2102.09690)
_COST = ("training_seconds", "seconds", "documents_per_second", "trainable_parameters")
_SWEEP = {"tasks": list, "seeds": list, "approaches": list, "validation": bool, "base_model": str, "full": dict}
_OPTIONS = ("words", "tokens", "part", "per_class", "n_train", "n_validation", "n_test", "conflicting", "wrong_labels", "kept")


def provenance(precision: str | None = None) -> dict:
    """What made a record: device, threads, how it computes, library versions, commit (None without git) and date."""
    profile = profiles.current(precision)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = re.search(r"model name\s*: (.*)", cpuinfo)
    unknown, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" rev-parse --short HEAD')
    return {
        "device": torch.cuda.get_device_name() if profile.device == "cuda" else (processor or [0, platform.processor()])[1],
        "threads": torch.get_num_threads(),
        "dtype": str(profile.dtype).removeprefix("torch."),
        "quantization": "NF4" if profile.quantization else None,
        "float32_matmul_precision": profile.float32_products,
        "attention": profile.attention,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": None if unknown else commit,
        "date": date.today().isoformat(),
    }


def other_versions(made: Iterable[dict]) -> list[str]:
    """One line for every library version that made some of these records and is not the one installed here."""
    here = {name: version(name).split("+")[0] for name in LIBRARIES}
    counts = Counter(item for record in made for item in record["provenance"]["versions"].items())
    others = {(name, then): n for (name, then), n in counts.items() if then.split("+")[0] != here.get(name)}
    return [f"{n} records were made with {name} {then}; here it is {here.get(name)}." for (name, then), n in others.items()]


def append(path: str | Path, record: dict) -> bool:
    """Add `record` to the file, unless it holds the same run already; returns whether it was added. A torn last line goes.

    The file is replaced whole, under a lock: whenever the process dies it has the record or does not, and two can write to it.
    """
    path = Path(path)
    with FileLock(f"{path}.lock"):
        before = records.read(path)
        if any(record["key"] == each["key"] for each in before):
            return False
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[: len(before)] if before else []
        lines.append(json.dumps(records.pack(record), ensure_ascii=False))
        write_whole(path, "".join(f"{line}\n" for line in lines))
    return True


def load_task(key: dict) -> tasks.Task:
    """The task of a run in the splits of its seed, its documents cut to `words`, or to `tokens` of the base model `tokenizer`.

    `part`, `wrong_labels` and `kept` are those of `as_it_comes`.
    """
    options, source = dict(key["options"]), corpora.TASKS[key["task"]]
    tokenizer = options.pop("tokenizer", base_models.DEFAULT)
    if "words" in options:
        options["shorten"] = tasks.first_words(options.pop("words"))
    documents, part = source.read(), options.pop("part", None)
    if part or "tokens" in options:
        model_tokenizer = base_models.load_tokenizer(tokenizer)
        options["shorten"] = as_it_comes.part_of(model_tokenizer, options.pop("tokens", None), part or "first")
        documents = as_it_comes.distinct(documents, model_tokenizer) if part else documents
    share, kept = options.pop("wrong_labels", None), options.pop("kept", None)
    task = tasks.split(key["task"], documents, **{"conflicting": source.conflicting, "seed": key["seed"], **options})
    if share is not None:
        task = as_it_comes.wrong_labels(task, share, key["seed"])
    return task if kept is None else as_it_comes.rare_labels(task, kept, key["seed"])


def test_set(task: tasks.Task) -> str:
    """A fingerprint of the test documents with their labels: equal only for the same documents in the same order."""
    rows = [[document["label"], document["text"]] for document in task.test]
    return hashlib.sha256(json.dumps([task.labels, rows], ensure_ascii=False).encode()).hexdigest()


def groups_of(task: tasks.Task) -> list[str]:
    """For each test document a short fingerprint of its group, or of its text: equal for the same one in other splits."""
    column = "group" if "group" in task.test.column_names else "text"
    return [hashlib.sha256(each.encode()).hexdigest()[:8] for each in task.test[column]]


def run(key: dict, save: str | Path | None = None, task: tasks.Task | None = None) -> dict:
    """Make one run and return its record, with those on validation and `CONTENT_FREE` texts if the key says `validation`.

    `save` is a folder for what is trained, `task` has the documents if they are not those of a task of the book.
    """
    give_back_memory()  # so that the peak is that of this run
    made_with = provenance(key["settings"].get("precision"))
    task = task or load_task(key)  # what can go wrong does so before the training
    kind, folder, searched = APPROACHES[key["approach"]], _search_folder(key), {}
    take_peak()
    if any(isinstance(value, list) for value in key["settings"].values()):
        approach, tried = search.search(kind, key["settings"], task, folder)
        searched = {"chosen": max(tried, key=search.rank), "tried": tried}
    else:
        approach = kind(**key["settings"])
        if epochs := search.fit(approach, task):
            searched = {"chosen": max(epochs, key=search.rank), "epochs": epochs}
    training_peak = take_peak()
    if save is not None:
        approach.save(save)
    found = replace(approach.predict(task.test), test_set=test_set(task), groups=np.array(groups_of(task)))
    model = getattr(approach, "model", None)
    adapter = as_bytes(get_peft_model_state_dict(model), {"format": "pt"}) if isinstance(model, PeftModel) else b""
    cost = {name: getattr(found, name) for name in _COST}
    cost |= {"training_peak_memory": training_peak, "adapter_bytes": len(adapter) or None}
    cost["tokens"] = approach.count_tokens(tasks.texts_of(task.test))
    blank = Dataset.from_dict({"text": list(CONTENT_FREE), "label": task.validation["label"][:1] * len(CONTENT_FREE)})
    asked = {"validation": task.validation, "content_free": blank} if key.get("validation") else {}
    record = {
        "key": key,
        "name": found.approach,
        "content_hash": task.content_hash(),
        "test_set": found.test_set,
        "labels": found.labels,
        "cost": cost,
        "provenance": made_with,
        "groups": found.groups.tolist(),
        **searched,
        **_written(found),
        **{name: _written(approach.predict(documents)) for name, documents in asked.items()},
    }
    return record | {"metrics": evaluate(records.predictions_of(record))}  # of what is recorded, rounded as it is


def _search_folder(key: dict) -> Path:
    """Where a search that was stopped goes on; it goes when the run is recorded."""
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return downloads.cache_folder() / "searches" / fingerprint


def _written(predictions: Predictions) -> dict:
    return {"gold": predictions.gold.tolist(), "probabilities": predictions.probabilities.round(5).tolist()}


def give_back_memory() -> None:
    """Return what earlier runs in this process held to the system, as far as it lets us."""
    gc.collect()
    torch.cuda.empty_cache()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # in glibc only


def take_peak() -> int | None:
    """The most bytes since the last call: on a GPU of tensors, on a CPU of the whole process, which only Linux tells."""
    if profiles.current().device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    except (OSError, TypeError):  # no such file, no such line
        return None


def keys(sweep: dict | list[dict], known: Iterable[str] = corpora.TASKS) -> list[dict]:
    """Every run of a sweep, or of a list of them, each once: task by task and seed by seed, all approaches in all their settings.

    `tasks` and `approaches` are lists of `name: options`. A list as an approach's option is a run for each value; a list in its
    option `choose` is one run that tries the values on validation (`search`). `base_model` is that of every approach that has the
    book's, and its tokenizer cuts the documents for all approaches alike; `full` is what is different under the full profile;
    `validation: true`, see `run`. `known` are the names that tasks may have. BookError: an unknown or missing name of anything.
    """
    if isinstance(sweep, list):
        every = {json.dumps(key, sort_keys=True): key for each in sweep for key in keys(each, known)}
        return list(every.values())
    profile = profiles.current().name
    sweep = {"validation": False, "base_model": base_models.DEFAULT, "full": {}} | checked(sweep, "entry of a sweep", _SWEEP)
    full = checked(sweep["full"], "entry of `full`", _SWEEP)
    sweep |= full if profile == "full" else {}
    for entry, kind in _SWEEP.items():
        if not isinstance(sweep.get(entry), kind) or sweep[entry] == []:
            raise BookError(f"A sweep needs {entry!r}, a {kind.__name__} that is not empty. It has {sweep.get(entry)!r}.")
    base_model, found = sweep["base_model"], []
    every_run = itertools.product(_named(sweep["tasks"]), sweep["seeds"], _named(sweep["approaches"]))
    for (task, options), seed, (name, settings) in every_run:
        checked({task: options}, "task", known)
        checked({name: settings}, "approach", APPROACHES)
        defaults = {each.name: each.default for each in fields(APPROACHES[name])}
        options = checked(options, "option of a task", _OPTIONS)
        settings = checked(settings, f"setting of {name}", {"choose": None} | defaults)
        choose = checked(settings.pop("choose", None), f"setting of {name} to choose", defaults)
        for setting, values in choose.items():
            if not isinstance(values, list) or not values or setting in settings:
                raise BookError(f"{name}, choose: {setting} needs a list of values to try, and no value beside it.")
        if "tokens" in options and base_model != base_models.DEFAULT:
            options["tokenizer"] = base_model
        if defaults.get("base_model") == base_models.DEFAULT:
            settings.setdefault("base_model", base_model)
        settings |= {"seed": seed} if "seed" in defaults else {}
        for one in ParameterGrid({name: value if isinstance(value, list) else [value] for name, value in settings.items()}):
            # all settings, so that a record does not count any more when a default has changed
            one = asdict(APPROACHES[name](**one)) | choose
            key = {"approach": name, "settings": one, "task": task, "options": options}
            key |= {"seed": seed, "profile": profile} | ({"validation": True} if sweep["validation"] else {})
            if key not in found:
                found.append(key)
    return found


def _named(entries: list) -> list[tuple[str, dict | None]]:
    """Names and options of `- name: {option: value}` or just `- name`."""
    return [pair for entry in entries for pair in (entry if isinstance(entry, dict) else {entry: None}).items()]


def missing(sweep: str | Path, path: str | Path | None = None) -> list[dict]:
    """The runs of a sweep file that `path` (or the file beside it) does not hold yet."""
    done = [record["key"] for record in records.read(path or Path(sweep).with_suffix(".jsonl"))]
    return [key for key in keys(load_sweep(Path(sweep))) if key not in done]


def make(
    to_do: list[dict], path: str | Path, save: Callable | None = None, progress: bool = True, task: tasks.Task | None = None
) -> list[str]:
    """Make runs, each recorded in `path` as soon as it is done; a line for each that failed is returned.

    `save` gives for a key the folder for what its run trains, or None; `task` is that of `run`.
    """
    failed = []
    for key in (bar := tqdm(to_do, unit="run", disable=not progress)):
        bar.set_postfix_str(records.title(key))
        if key in [record["key"] for record in records.read(path)]:
            continue  # another process made it
        try:
            append(path, run(key, save(key) if save else None, task))
            shutil.rmtree(_search_folder(key), ignore_errors=True)
        except Exception as error:
            failed.append(f"{records.title(key)}: {type(error).__name__}: {error}")
            tqdm.write(failed[-1], file=sys.stderr)
    return failed


def make_in_parallel(to_do: list[dict], path: Path, workers: int) -> list[str]:
    """`make` in so many processes with one thread each: on a CPU two of them get more done than one with two threads."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker) as pool:
        failed = pool.map(make, ([key] for key in to_do), repeat(path), repeat(None), repeat(False))
        return [line for lines in tqdm(failed, total=len(to_do), unit="run") for line in lines]


def _begin_worker() -> None:
    profiles.quiet()
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()  # no work without a parent


def main(arguments: list[str] | None = None) -> None:
    """Make the runs of a sweep that are not recorded yet. Stop it whenever you like: it goes on where it was."""
    parser = argparse.ArgumentParser(prog="python -m helpers.lab.sweeps", description=main.__doc__)
    parser.add_argument("sweep", type=Path, help="a YAML file; the records go beside it, as .jsonl")
    parser.add_argument("--out", type=Path, help="the records' file, if it is another one")
    parser.add_argument("--list", action="store_true", help="only say what is recorded and what is not")
    usual = min(2, os.cpu_count() or 1) if profiles.current().device == "cpu" else 1
    parser.add_argument("--workers", type=int, default=usual, help="processes, one thread each (here %(default)s)")
    given = parser.parse_args(arguments)
    path = given.out or given.sweep.with_suffix(".jsonl")
    try:
        wanted, to_do = keys(load_sweep(given.sweep)), missing(given.sweep, path)
        made = [record for record in records.read(path) if record["key"] in wanted]
        print(f"{path}: {len(made)} of {len(wanted)} runs are recorded", *other_versions(made), sep="\n")
        if given.list:
            print(*(f"not yet run: {records.title(key)}" for key in to_do), sep="\n")
            return
        failed = make_in_parallel(to_do, path, given.workers) if given.workers > 1 else make(to_do, path)
    except BookError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{len(failed)} of {len(to_do)} runs failed; the others are recorded.")
    print(f"{path}: all {len(wanted)} runs are recorded")


def load_sweep(sweep: Path) -> dict:
    """What a YAML file holds; BookError if it cannot be read."""
    try:
        return yaml.safe_load(sweep.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BookError(f"{sweep} cannot be read as YAML: {' '.join(str(error).split())}") from error


def checked(given: dict | None, kind: str, known: Iterable[str]) -> dict:
    """A copy of `given`, empty if None; BookError if it is no dictionary, or has a name that is not in `known`."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise BookError(f"Each {kind} is written as `name: value`, not {given!r}.")
    for name in given:
        check_name(kind, name, known)
    return dict(given)


if __name__ == "__main__":
    main()
