"""A file of texts in, the same file with labels and probabilities out, by any saved approach (chapter 11)."""

import argparse
import contextlib
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from helpers import profiles
from helpers.approach import Approach
from helpers.errors import BookError
from helpers.evaluation import Predictions
from helpers.lab import statistics, tables

ROWS, STREAMED = 1024, 32  # in memory at a time, of a file and of standard input


def batches(table: tables.Table) -> Iterator[list[dict]]:
    """All rows, so many at a time. BookError: they have a column already that would be added; or as of `Table`."""
    rows, n = (row for _, row in table), ROWS if table.lines is None else STREAMED
    for batch in iter(lambda: list(islice(rows, n)), []):
        for name in {"predicted", "probability"} & set(batch[0]):
            raise BookError(f"{table.path.name} has a column {name!r} already. Rename it, or it would be lost.")
        yield batch


def write(table: tables.Table, out: IO, done: Iterable[tuple[list[dict], dict[str, list]]]) -> None:
    """Write rows of `table` with the columns that are added to them, in the format that they came in."""
    target = None
    for rows, new in done:
        more = [dict(zip(new, each, strict=True)) for each in zip(*new.values(), strict=True)]
        if table.parquet:
            if target is None:
                kinds = [(name, pyarrow.string() if name == "predicted" else pyarrow.float64()) for name in new]
                before = tables.parquet(table.path, table.columns).schema_arrow
                target = pyarrow.parquet.ParquetWriter(out, pyarrow.schema([*before, *kinds]))
            both = [row | one for row, one in zip(rows, more, strict=True)]
            target.write_table(pyarrow.Table.from_pylist(both, target.schema))
        elif not table.delimiter:
            out.writelines(f"{json.dumps(row | one, ensure_ascii=False)}\n" for row, one in zip(rows, more, strict=True))
        else:
            options = {"delimiter": table.delimiter, "lineterminator": "\n"}
            plain, quoted = csv.writer(out, **options), csv.writer(out, **options, quoting=csv.QUOTE_ALL)
            target = target or plain.writerow([*table.header, *new])
            for cells in ([*row.values(), *one.values()] for row, one in zip(rows, more, strict=True)):
                (quoted if any("\r" in str(cell) for cell in cells) else plain).writerow(cells)  # Python quotes \n only
        out.flush()
    if table.parquet and target:
        target.close()


def probabilities_of(approach: Approach, rows: list[dict], columns: list[str]) -> np.ndarray:
    """Shape (n_rows, n_labels), float32: NaN where a row has no text."""
    texts = [" ".join(filter(None, (tables.as_text(row.get(column)) for column in columns))) for row in rows]
    found = np.full((len(texts), len(approach.labels)), np.nan, np.float32)
    if filled := [row for row, text in enumerate(texts) if text]:
        found[filled] = approach.predict_proba([texts[row] for row in filled])
    return found


def added(approach: Approach, probabilities: np.ndarray) -> dict[str, list]:
    """What rows get: `predicted`, and its `probability`; several labels are joined by `;`, and each has a column with its own.

    None where there is no text. Labels are decided as the approach says (`use`), else at 0.5.
    """
    without, labels = np.isnan(probabilities[:, 0]), np.array(approach.labels)
    rows = np.where(without[:, None], 0, probabilities).astype(float)
    if approach.multi_label:
        decided = Predictions("", approach.labels, rows, np.zeros(rows.shape, int))
        decided = statistics.decided(decided, **approach.use.get("decision", {"threshold": 0.5, "at_least_one": False}))
        found = {"predicted": [";".join(labels[row == 1]) for row in decided.predicted]}
        found |= {f"probability of {label}": column.round(6).tolist() for label, column in zip(labels, rows.T, strict=True)}
    else:
        found = {"predicted": labels[rows.argmax(axis=1)].tolist(), "probability": rows.max(axis=1).round(6).tolist()}
    return {name: [None if no else each for each, no in zip(column, without, strict=True)] for name, column in found.items()}


def predict(approach: Approach, file: tables.Table, out: Path) -> np.ndarray:
    """Write the rows of `file` with what is `added` to the file `out`; returns the probabilities, (n_rows, n_labels).

    They are kept beside `out` as they come, so that a run that was stopped or killed goes on, if file and approach are the same.
    BookError: `out` exists or has another ending.
    """
    if out.exists() or out.suffix.lower() != file.path.suffix.lower():
        why = "exists already; nothing was overwritten" if out.exists() else f"has another ending than {file.path.name}"
        raise BookError(f"{out} {why}. Give another --out.")
    n_rows, n_labels = sum(map(len, batches(file))), len(approach.labels)  # what cannot be read is named first
    if not n_rows:
        raise BookError(f"{file.path.name} has no rows.")
    path, status = str(file.path.resolve()), file.path.stat()
    stamp = [path, status.st_size, status.st_mtime, file.columns, approach.labels, approach.training_seconds]
    part = out.with_name(f"{out.name}.{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:8]}.part")
    with part.open("ab") as kept, tqdm(total=n_rows, unit="row", disable=None) as bar:
        n_done = kept.tell() // (4 * n_labels)
        kept.truncate(4 * n_labels * n_done)  # it was killed while it wrote
        for rows in batches(file):
            if to_do := rows[n_done:]:
                kept.write(probabilities_of(approach, to_do, file.columns).tobytes())
                kept.flush()
            n_done = max(0, n_done - len(rows))
            bar.update(len(rows))  # which counts nothing where there is no terminal
    probabilities = np.fromfile(part, np.float32).reshape(n_rows, n_labels)
    each = iter(probabilities)
    done = ((rows, added(approach, np.array([*islice(each, len(rows))]))) for rows in batches(file))
    options = {"mode": "wb"} if file.parquet else {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with open(written := out.with_name(f"{out.name}.tmp"), **options) as target:
        write(file, target, done)
    written.replace(out)
    part.unlink()
    return probabilities


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Nobody else writes `out` while the block runs. Timeout: somebody does."""
    with FileLock(lock := Path(f"{out}.lock"), timeout=0):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def predict_folder(approach: Approach, folder: Path, out: Path, open_file: Callable[[Path], tables.Table]) -> tuple[int, int]:
    """Do to all files of a folder what `predict` does, into the folder `out`; returns how many files and rows it was.

    What is in `out` is left alone. Several processes share the work: each takes files that no other one is writing, and those
    of a process that was killed, where that one was. BookError, when all others are done: a file that cannot be labelled.
    """
    refused, before, n_rows = {}, None, []
    files = sorted(each for each in folder.iterdir() if each.suffix.lower() in tables.SUFFIXES)
    if not files:
        raise BookError(f"There are no files in {folder} that end in {', '.join(tables.SUFFIXES)}.")
    out.mkdir(parents=True, exist_ok=True)
    while (to_do := [each for each in files if each not in refused and not (out / each.name).exists()]) and to_do != before:
        before = to_do  # files that others were writing are tried once more, for a process may have been killed
        for path in to_do:
            try:
                with locked(out / path.name):
                    if not (out / path.name).exists():  # else another process has just done it
                        n_rows.append(len(predict(approach, open_file(path), out / path.name)))
            except Timeout:
                continue
            except BookError as error:
                refused[path] = str(error)
    for path, why in refused.items():
        where = "" if path.name in why else f"{path.name}: "
        raise BookError(f"{where}{why} ({len(refused)} of {len(files)} files; the others are in {out}.)")
    return len(n_rows), sum(n_rows)


def main(arguments: list[str] | None = None) -> None:
    """Label the texts of a file with a saved approach: the same file comes out, with the columns `predicted` and `probability`.

    Stop it whenever you like: it goes on where it was. Several labels are joined by `;`, and each has a column with its
    probability. Of a folder all files are labelled; start the command twice, and two processes share them.
    """
    examples = Path(__file__).with_name("predict_examples.txt").read_text(encoding="utf-8")
    options = {"epilog": examples, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m helpers.predict", description=main.__doc__, **options)
    add = parser.add_argument
    add("model", type=Path, help="the folder of a saved approach, such as tickets-compared/head")
    add("file", help="a .csv, .tsv, .jsonl or .parquet file with a row for each text, a folder of them, or - for standard input")
    add("--out", type=Path, help="the file to write, with the same ending, or the folder (default: standard output)")
    add("--text", nargs="+", help="the column with the texts, or several to be joined (default: as in training, else text)")
    add("--encoding", help="of a text file, such as cp1252 (default: found out)")
    add("--format", choices=("jsonl", "csv", "tsv"), default="jsonl", help="of standard input (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        tables.utf8_streams(given.encoding)
        profiles.quiet()
        stream, out = given.file == "-", given.out and given.out.expanduser()
        approach = Approach.load(given.model)
        columns, path = given.text or approach.use.get("text", ["text"]), Path(f"lines.{given.format}" if stream else given.file)

        def opened(path: Path) -> tables.Table:
            file = tables.Table(path.expanduser(), columns, given.encoding, sys.stdin if stream else None)
            print(*(f"warning: {line}\n" for line in file.warnings), sep="", end="", file=sys.stderr)
            return file

        if path.expanduser().is_dir():
            if not out or out.is_file():
                raise BookError(f"{path} is a folder: give another one as --out.")
            n_files, n_rows = predict_folder(approach, path.expanduser(), out, opened)
            print(f"{n_files:,} files with {n_rows:,} rows were labelled. They are in {out}.")
            return
        file = opened(path)
        if out is None or stream:
            if out or file.parquet:
                raise BookError("Standard input goes to standard output: leave out --out." if out else "Parquet needs an --out.")
            found = ((rows, probabilities_of(approach, rows, columns)) for rows in batches(file))
            write(file, sys.stdout, ((rows, added(approach, each)) for rows, each in found))
            return
        with locked(out):
            without = np.isnan(predict(approach, file, out)[:, 0])
        print(f"{len(without):,} rows are in {out}, {without.sum():,} of them without a text and so without a label.")
    except Timeout:
        sys.exit(f"{given.out} is being written by another process. Wait for it, or give another --out.")
    except (BookError, LookupError, UnicodeDecodeError) as error:  # the last two: of standard input
        sys.exit(str(error) if isinstance(error, BookError) else f"Standard input: {error}. Name its --encoding.")


if __name__ == "__main__":
    main()
