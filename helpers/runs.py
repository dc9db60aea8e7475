"""Recorded runs: what a table or figure is drawn from, one JSON object a line, with everything needed to believe it.

python -m helpers.runs book/results/two_approaches.yaml
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml
from filelock import FileLock
from tqdm.auto import tqdm

from helpers import base_models, baselines, embedding_head, instruction, profiles, tasks
from helpers.errors import BookError, unknown_name
from helpers.evaluation import Predictions, evaluate

APPROACHES = {
    each.__name__: each
    for each in (
        baselines.Majority,
        baselines.TfidfSvm,
        baselines.FrozenProbe,
        baselines.FineTunedEncoder,
        embedding_head.EmbeddingHead,
        instruction.InstructionTuned,
    )
}
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "scikit-learn")


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


def read(path: str | Path) -> list[dict]:
    """The records of a file, oldest first; none if there is no such file.

    Raises:
        BookError: a line that is no record.
    """
    path, records = Path(path), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BookError(
                f"{path}, line {number} is no record ({error.msg}). Delete the line; its run is then made again."
            ) from error
    return records


def predictions_of(record: dict) -> Predictions:
    """A record's predictions, as its approach gave them (probabilities to five digits)."""
    kept = ("seconds", "training_seconds", "trainable_parameters", "tokens", "peak_memory")
    cost = {name: record["cost"][name] for name in kept}
    probabilities = np.array(record["probabilities"])
    return Predictions(record["name"], tuple(record["labels"]), probabilities, np.array(record["gold"]), **cost)


def run(path: str | Path, key: dict) -> dict:
    """Make one run and append its record to `path`.

    Args:
        key: what is run: `approach` and its `settings`, `task` and its `options`, `seed`.
    """
    options = dict(key["options"])
    if "tokens" in options:
        options["shorten"] = tasks.first_tokens(base_models.load_tokenizer(), options.pop("tokens"))
    if "words" in options:
        options["shorten"] = tasks.first_words(options.pop("words"))
    task = tasks.load(key["task"], seed=key["seed"], **options)
    said = APPROACHES[key["approach"]](**key["settings"]).fit(task).predict(task.test)
    record = {
        "key": key,
        "name": said.approach,
        "content_hash": task.content_hash(),
        "labels": said.labels,
        "metrics": evaluate(said),
        "cost": {
            "training_seconds": said.training_seconds,
            "seconds": said.seconds,
            "documents_per_second": said.documents_per_second,
            "tokens": said.tokens,
            "trainable_parameters": said.trainable_parameters,
            "peak_memory": said.peak_memory,
        },
        "provenance": provenance(),
        "gold": said.gold.tolist(),
        "probabilities": said.probabilities.round(5).tolist(),
    }
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with FileLock(f"{path}.lock"), open(path, "a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return record


def keys(sweep: dict) -> list[dict]:
    """Every run of a sweep: all approaches with all their settings, on all seeds.

    Raises:
        BookError: an unknown approach or setting (the nearest is suggested).
    """
    found = []
    for seed, (name, settings) in itertools.product(
        sweep["seeds"], [pair for each in sweep["approaches"] for pair in each.items()]
    ):
        if name not in APPROACHES:
            raise unknown_name("approach", name, APPROACHES)
        for setting in settings or {}:
            if setting not in APPROACHES[name].__dataclass_fields__:
                raise unknown_name(f"setting of {name}", setting, APPROACHES[name].__dataclass_fields__)
        seeded = {"seed": seed} if "seed" in APPROACHES[name].__dataclass_fields__ else {}
        # all settings, so that a record does not count any more when a default has changed
        complete = asdict(APPROACHES[name](**(settings or {}), **seeded))
        found.append({"approach": name, "settings": complete, "task": sweep["task"], "options": sweep["options"], "seed": seed})
    return found


def main(arguments: list[str] | None = None) -> None:
    """Make the runs of a sweep file that are not recorded yet, one after another."""
    parser = argparse.ArgumentParser(prog="python -m helpers.runs", description=main.__doc__)
    parser.add_argument("sweep", type=Path, help="a YAML file; the records go beside it, as .jsonl")
    sweep = parser.parse_args(arguments).sweep
    records = sweep.with_suffix(".jsonl")
    try:
        wanted = keys(yaml.safe_load(sweep.read_text(encoding="utf-8")))
        done = [record["key"] for record in read(records)]
        for key in tqdm([key for key in wanted if key not in done]):
            run(records, key)
    except BookError as error:
        sys.exit(str(error))
    print(f"{records}: all {len(wanted)} runs are recorded")


def _processor() -> str:
    """The CPU's name, as /proc/cpuinfo has it on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
