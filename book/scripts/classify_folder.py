"""Classify a folder of Parquet files with a saved approach, on some processes.

    python classify_folder.py documents/ --with saved/ --out classified/

Files come out with their names, rows and columns, and two columns more:
`predicted` (a label, or a list of labels) and `probabilities` (of all labels,
in the approach's order). Both are null where there is no text. A file that is
in the out folder already is left alone, so a run that was stopped goes on.
"""

import argparse
import contextlib
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import torch

BOOK = Path(__file__).resolve().parents[2]  # the folder that holds `helpers`
sys.path.insert(0, str(BOOK))
os.environ.setdefault(  # all GPUs: a worker gets one of them
    "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
)

from helpers import profiles, tasks  # noqa: E402
from helpers.approach import Approach  # noqa: E402
from helpers.errors import BookError  # noqa: E402

ADDED = ("predicted", "probabilities")
RETRIES = 2  # of a file whose worker was killed
START = 600  # seconds that the workers have to start
BATCH = 256  # documents that a worker has in memory at a time
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # at Ray's 15, a worker on a busy machine needs minutes for its imports
    "RAY_worker_niceness": "0",
}


def load(saved):
    """The approach in a folder, and what gives its probabilities of texts."""
    approach = Approach.load(saved)
    return approach, approach.predict_proba


class Classifier:
    """A worker: loads the approach once, then takes file after file."""

    def __init__(self, saved, out, text, threads, tokens=None, run=0):
        torch.set_num_threads(threads)
        self.saved, self.out, self.text, self.run = saved, out, text, run
        self.tokens, self.approach = tokens, None

    def __call__(self, batch):
        """Classify the file `batch["path"]`; says how it went."""
        (path,), start = map(Path, batch["path"]), time.perf_counter()
        documents, refused = 0, ""
        try:
            if self.approach is None:
                self.approach, self.predict_proba = load(self.saved)
            documents = self.classify(path)
        except BookError as error:
            refused = str(error)
        done = {
            "path": path.name,
            "documents": documents,
            "seconds": time.perf_counter() - start,
            "refused": refused,
        }
        return {name: np.array([value]) for name, value in done.items()}

    def classify(self, path):
        """Write the classified file; returns its number of rows.

        It has another name until it is complete. So a worker that is killed
        leaves a whole file or none.
        """
        source = pyarrow.parquet.ParquetFile(path)
        part = self.out / f".{path.name}.{self.run}.{os.getpid()}.part"
        word = pyarrow.string()
        label = pyarrow.list_(word) if self.approach.multi_label else word
        kinds = (label, pyarrow.list_(pyarrow.float32()))
        added = [
            pyarrow.field(*each) for each in zip(ADDED, kinds, strict=True)
        ]
        before = source.schema_arrow
        schema = pyarrow.schema([*before, *added], before.metadata)
        n = 0
        with pyarrow.parquet.ParquetWriter(part, schema) as target:
            for rows in source.iter_batches(BATCH):
                try:
                    answers = self.answers(rows.column(self.text).to_pylist())
                except BookError as error:
                    where = f"{path.name}, from row {n} on"
                    raise BookError(f"{where}: {error}") from error
                columns = [
                    pyarrow.array(values, kind)
                    for values, kind in zip(answers, kinds, strict=True)
                ]
                columns = [*rows.columns, *columns]
                target.write_batch(pyarrow.record_batch(columns, schema=schema))
                n += len(rows)
        part.replace(self.out / path.name)
        return n

    def answers(self, texts):
        """A label (or a list) and probabilities for each text, or None."""
        predicted, probabilities = [None] * len(texts), [None] * len(texts)
        rows = [n for n, text in enumerate(texts) if text and text.strip()]
        if not rows:
            return predicted, probabilities
        cut = str
        if self.tokens:
            cut = tasks.first_tokens(self.approach.tokenizer, self.tokens)
        found = self.predict_proba([cut(texts[row]) for row in rows])
        labels = np.array(self.approach.labels)
        for row, each in zip(rows, found, strict=True):
            several = self.approach.multi_label
            chosen = labels[each >= 0.5 if several else each.argmax()]
            predicted[row], probabilities[row] = chosen.tolist(), each.tolist()
        return predicted, probabilities


def of_another_run(part):
    """Whether a process that still runs, and is not this one, has begun it."""
    run = part.suffixes[-3][1:]
    return (
        run.isdigit()
        and int(run) != os.getpid()
        and psutil.pid_exists(int(run))
    )


def check(path, text):
    """Refuse a file that cannot be classified."""
    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BookError(
            f"{path.name} cannot be read as Parquet ({reason}). "
            "Take it out or replace it."
        ) from error
    if text not in schema.names:
        raise BookError(
            f"{path.name} has no column {text!r}, only "
            f"{', '.join(schema.names)}. Name the one with the texts."
        )
    kind = schema.field(text).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    words = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
    if values not in words:
        raise BookError(
            f"{path.name}: the column {text!r} holds {kind}, no text. "
            "Name another one."
        )
    for name in ADDED:
        if name in schema.names:
            raise BookError(
                f"{path.name} has a column {name!r} already. "
                "Rename it, or it would be lost."
            )


@contextlib.contextmanager
def silence():
    """Drop what Ray reports of itself, some of it past Python."""
    kept = os.dup(2)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def session(workers):
    """Ray on this machine while the block runs, or the Ray that is there.

    For a cluster, call `ray.init` with its address before; its machines have
    to see the three folders.
    """
    os.environ.update(RAY)
    import ray  # takes a second, and is needed here alone

    if ray.is_initialized():
        yield
        return
    path = [str(BOOK), str(Path(__file__).resolve().parent), *sys.path]
    ray.init(
        "local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path)}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def run_workers(to_do, workers, *arguments):
    """Give the files to the workers; what each file's worker said."""
    import ray.data

    on_gpu = profiles.current().device == "cuda"
    gpus = torch.cuda.device_count() if on_gpu else len(to_do)
    workers = min(workers, len(to_do), gpus)
    threads = max(1, (os.cpu_count() or 1) // workers)
    saved, out, text, tokens = arguments
    with session(workers):
        files = [{"path": str(path)} for path in to_do]
        rows = ray.data.from_items(files, override_num_blocks=len(files))
        rows.context.enable_progress_bars = False
        rows.context.wait_for_min_actors_s = START
        # retries and restarts have no parameters of their own in Ray 2.60
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        try:
            return rows.map_batches(
                Classifier,
                fn_constructor_args=(
                    saved,
                    out,
                    text,
                    threads,
                    tokens,
                    os.getpid(),
                ),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    size=workers, max_tasks_in_flight_per_actor=1
                ),
                num_gpus=1 if on_gpu else None,
                max_task_retries=RETRIES,
                max_restarts=RETRIES * len(files),
            ).take_all()
        except ray.exceptions.GetTimeoutError:
            reason = (
                f"Not all workers started within {START} seconds: try fewer."
            )
        except (
            ray.exceptions.RayActorError,
            ray.exceptions.OutOfMemoryError,
        ):
            reason = (
                "A file's workers were killed again and again, for want of "
                "memory perhaps: try fewer."
            )
    raise BookError(
        f"{reason} What was classified until then is in {out}; "
        "run it again to go on."
    )


def classify(documents, saved, out, text="text", tokens=None, workers=2):
    """Classify all Parquet files of a folder that are not in `out` yet.

    Returns for each file that was classified now its name, number of documents
    and seconds. BookError says what cannot be classified; if that is one
    document, all other files are classified.
    """
    documents, saved, out = (
        Path(each).expanduser().resolve() for each in (documents, saved, out)
    )
    if not (saved / "approach.json").exists():
        raise BookError(
            f"{saved} holds no saved approach: there is no approach.json "
            "in it. Give the folder that `save` wrote."
        )
    files = sorted(documents.glob("*.parquet"))
    if not files:
        raise BookError(
            f"There are no .parquet files in {documents}. "
            "Give the folder that holds them."
        )
    if workers < 1:
        raise BookError(f"workers is {workers}, but it has to be 1 or more.")
    for path in files:
        check(path, text)
    to_do = [path for path in files if not (out / path.name).exists()]
    if not to_do:
        return []
    out.mkdir(parents=True, exist_ok=True)
    try:
        with silence():
            done = run_workers(to_do, workers, saved, out, text, tokens)
    finally:
        for part in out.glob(".*.part"):  # of workers that were killed
            if not of_another_run(part):
                part.unlink(missing_ok=True)
    refused = [each["refused"] for each in done if each["refused"]]
    if refused:
        raise BookError(
            f"{refused[0]} ({len(refused)} of {len(to_do)} files). "
            f"The others are in {out}; run it again to go on."
        )
    return done


def main(arguments=None):
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("documents", help="a folder of .parquet files")
    add("--with", dest="saved", required=True, help="a saved approach's folder")
    add("--out", required=True, help="the folder for the classified files")
    add("--text", default="text", help="the column with the documents")
    add(
        "--tokens",
        type=int,
        help="of each document that are read, as in training (default: all)",
    )
    add(
        "--workers", type=int, default=2, help="processes, or GPUs (default: 2)"
    )
    given, start = parser.parse_args(arguments), time.perf_counter()
    try:
        done = classify(**vars(given))
    except BookError as error:
        sys.exit(str(error))
    n, seconds = sum(d["documents"] for d in done), time.perf_counter() - start
    print(
        f"{len(done)} files with {n} documents in {seconds:.0f} seconds "
        f"are in {given.out}"
    )


if __name__ == "__main__":
    main()
