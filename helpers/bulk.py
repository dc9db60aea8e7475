"""Classify Parquet files with a saved approach in several processes, with Ray Data.

python -m helpers.bulk documents/ --with saved/ --out classified/ --workers 2
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset

from helpers import profiles, runs, tasks
from helpers.errors import BookError

COLUMNS = ("predicted", "probabilities")  # what is added to a file's own
RETRIES = 2  # of a file whose worker was killed
START = 600  # seconds that the workers have to start
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15, a worker on a busy machine needs minutes for its imports
}


class Classifier:
    """What a worker does: load the approach once, then classify file after file.

    Args:
        saved: the folder that an approach's `save` wrote.
        out: the folder for the classified files.
        text: the column that holds the documents.
        batch_size: documents that are in memory at a time.
        threads: of this process.
        tokens: of each document that are read; None for all.
    """

    def __init__(self, saved: Path, out: Path, text: str, batch_size: int, threads: int, tokens: int | None = None) -> None:
        torch.set_num_threads(threads)
        self.saved, self.out, self.text, self.batch_size, self.tokens = saved, out, text, batch_size, tokens
        self.approach = None

    def __call__(self, batch: dict) -> dict:
        """Classify the file `batch["path"]`; returns its name, number of documents, seconds and what it was refused for."""
        (path,), start = map(Path, batch["path"]), time.perf_counter()
        try:
            self.approach = self.approach or runs.APPROACHES[_saved_approach(self.saved)].load(self.saved)
            documents, refused = self._file(path), ""
        except BookError as error:
            documents, refused = 0, str(error)
        done = {"path": path.name, "documents": documents, "seconds": time.perf_counter() - start, "refused": refused}
        return {name: np.array([value]) for name, value in done.items()}

    def _file(self, path: Path) -> int:
        """Written under another name and renamed when complete, so that a killed worker leaves a whole file or none."""
        source, part = pyarrow.parquet.ParquetFile(path), self.out / f".{path.name}.{os.getpid()}.part"
        labels = pyarrow.list_(pyarrow.string()) if self.approach.multi_label else pyarrow.string()
        added = [pyarrow.field(*each) for each in zip(COLUMNS, (labels, pyarrow.list_(pyarrow.float32())), strict=True)]
        schema, first = pyarrow.schema([*source.schema_arrow, *added], source.schema_arrow.metadata), 0
        with pyarrow.parquet.ParquetWriter(part, schema) as target:
            for rows in source.iter_batches(self.batch_size):
                try:
                    said = self._said(rows.column(self.text).to_pylist())
                except BookError as error:
                    raise BookError(f"{path.name}, from row {first} on: {error}") from error
                new = [pyarrow.array(values, field.type) for field, values in zip(added, said, strict=True)]
                target.write_batch(pyarrow.record_batch([*rows.columns, *new], schema=schema))
                first += len(rows)
        part.replace(self.out / path.name)
        return first

    def _said(self, texts: list[str | None]) -> tuple[list, list]:
        """For each text its label (a list of labels in a multi-label task) and its probabilities; None where there is no text."""
        predicted, probabilities = [None] * len(texts), [None] * len(texts)
        rows = [row for row, text in enumerate(texts) if text and text.strip()]
        if rows:
            labels, several = np.array(self.approach.labels), self.approach.multi_label
            unknown = [0] * len(labels) if several else 0
            cut = tasks.first_tokens(self.approach.tokenizer, self.tokens) if self.tokens else str
            said = self.approach.predict(
                Dataset.from_dict({"text": [cut(texts[row]) for row in rows], "label": [unknown] * len(rows)})
            )
            for row, decided, each in zip(rows, said.predicted, said.probabilities, strict=True):
                predicted[row] = labels[decided.astype(bool)].tolist() if several else labels[decided].item()
                probabilities[row] = each.tolist()
        return predicted, probabilities


def classify(
    documents: str | Path,
    saved: str | Path,
    out: str | Path,
    *,
    text: str = "text",
    tokens: int | None = None,
    workers: int = 2,
    batch_size: int = 256,
) -> list[dict]:
    """Classify every Parquet file of a folder, a file at a time in each of `workers` processes.

    A file that is in `out` already is left alone, so a run that was stopped goes on where it was. The file of a worker that is
    killed is given to another one, `RETRIES` times at most. Ray is started here and stopped at the end; call `ray.init` before,
    with the address of a cluster whose machines all see the three folders, to use that one.

    Args:
        documents: a folder of `.parquet` files.
        saved: the folder that an approach's `save` wrote.
        out: a new folder, or that of the run to go on with; its files have the names, columns and rows of the documents', and
            `predicted` (a label, or a list of labels) and `probabilities` (of all labels, in the approach's order), both null
            where there is no text.
        text: the column that holds the documents.
        tokens: of each document that are read, as in training; None for all.
        workers: processes; there are no more of them than files, or GPUs under the full profile.
        batch_size: documents that a worker holds in memory at a time.

    Returns:
        For each file that was classified now: `path`, `documents` and `seconds`.

    Raises:
        BookError: no files, a file without the column or with one of the names that are added, a document that the approach
            refuses (all other files are classified then), or a file whose workers are killed again and again.
    """
    documents, saved, out = (Path(each).expanduser().resolve() for each in (documents, saved, out))
    _saved_approach(saved)
    files = sorted(documents.glob("*.parquet"))
    if not files:
        raise BookError(f"There are no .parquet files in {documents}. Give the folder that holds them.")
    if not isinstance(workers, int) or workers < 1:
        raise BookError(f"workers is {workers!r}, but it has to be a whole number, 1 or more.")
    for path in files:
        _check(path, text)
    to_do = [path for path in files if not (out / path.name).exists()]
    if not to_do:
        return []
    out.mkdir(parents=True, exist_ok=True)
    on_gpu = profiles.current().device == "cuda"
    workers = min(workers, len(to_do), torch.cuda.device_count() if on_gpu else len(to_do))
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.update(_RAY)
    with _silence():
        import ray.data  # takes a second, and is needed here alone

        begun = not ray.is_initialized()
        try:
            if begun:
                there = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
                options = {"num_cpus": workers, "include_dashboard": False, "runtime_env": {"env_vars": there}}
                ray.init("local", log_to_driver=False, **options)
            rows = ray.data.from_items([{"path": str(path)} for path in to_do], override_num_blocks=len(to_do))
            rows.context.enable_progress_bars, rows.context.wait_for_min_actors_s = False, START
            done = rows.map_batches(
                Classifier,
                fn_constructor_args=(saved, out, text, batch_size, threads, tokens),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
                num_gpus=1 if on_gpu else None,
                max_task_retries=RETRIES,
                max_restarts=RETRIES * len(to_do),
            ).take_all()
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.GetTimeoutError) as error:
            reason = "A file's workers were killed again and again, for want of memory perhaps: try fewer, or a small batch_size."
            if isinstance(error, TimeoutError):
                reason = f"The workers did not all start within {START} seconds: try fewer."
            raise BookError(f"{reason} What was classified until then is in {out}; run it again to go on.") from None
        finally:
            if begun:
                ray.shutdown()
            for part in out.glob(".*.part"):  # of workers that were killed
                part.unlink()
    refused = [each["refused"] for each in done if each["refused"]]
    if refused:
        raise BookError(f"{refused[0]} ({len(refused)} of {len(to_do)} files). The others are in {out}; run it again to go on.")
    return [{name: each[name] for name in ("path", "documents", "seconds")} for each in done]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what Ray reports of itself to stdout and stderr, some of it past Python."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _saved_approach(saved: Path) -> str:
    """The name of the approach that a folder holds."""
    if not (saved / "approach.json").exists():
        raise BookError(f"{saved} holds no saved approach: there is no approach.json in it. Give the folder that `save` wrote.")
    return json.loads((saved / "approach.json").read_text(encoding="utf-8"))["approach"]


def _check(path: Path, text: str) -> None:
    """Refuse a file that cannot be classified."""
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BookError(f"{path.name} cannot be read as Parquet ({reason}). Take it out or replace it.") from error
    if text not in schema.names:
        raise BookError(f"{path.name} has no column {text!r}, only {', '.join(schema.names)}. Name the one with the texts.")
    if not pyarrow.types.is_string(schema.field(text).type) and not pyarrow.types.is_large_string(schema.field(text).type):
        raise BookError(f"{path.name}: the column {text!r} holds {schema.field(text).type}, no text. Name another one.")
    for name in COLUMNS:
        if name in schema.names:
            raise BookError(f"{path.name} has a column {name!r} already. Rename it, or it would be lost.")


def main(arguments: list[str] | None = None) -> None:
    """Classify the Parquet files of a folder. Stop it whenever you like: run it again and it goes on."""
    parser = argparse.ArgumentParser(prog="python -m helpers.bulk", description=main.__doc__)
    parser.add_argument("documents", type=Path, help="a folder of .parquet files")
    parser.add_argument("--with", dest="saved", type=Path, required=True, help="the folder of a saved approach")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the classified files")
    parser.add_argument("--text", default="text", help="the column with the documents (default: text)")
    parser.add_argument("--tokens", type=int, help="of each document that are read, as in training (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes, or GPUs where there are some (default: 2)")
    given, start = parser.parse_args(arguments), time.perf_counter()
    try:
        done = classify(given.documents, given.saved, given.out, text=given.text, tokens=given.tokens, workers=given.workers)
    except BookError as error:
        sys.exit(str(error))
    n, seconds = sum(each["documents"] for each in done), time.perf_counter() - start
    print(f"{len(done)} files with {n} documents in {seconds:.0f} seconds are in {given.out}")


if __name__ == "__main__":
    from helpers import bulk  # under the name by which the workers find it

    bulk.main()
