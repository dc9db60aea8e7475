"""Tables of text in files: CSV, TSV, JSON lines and Parquet, every cell as it stands there and every row with its place."""

import ast
import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet

from helpers.corpora import excerpt
from helpers.errors import BookError, unknown_name

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # what is left of an emoji that was cut in the middle


def read(path: Path, columns: list[str]) -> pd.DataFrame:
    """The named columns of a file, of shape (n_rows, len(columns)), nothing guessed: in CSV and TSV every cell is text.

    Fields are parted as the header is, by a comma, semicolon, tab or bar; UTF-8 and UTF-16, line ends of any system. The index
    says where a row stands and is called `line` or, in Parquet, `row`. BookError: anything that cannot be read, with its line.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        near = sorted(each.name for each in (path if path.is_dir() else path.parent).glob("*") if each.suffix in SUFFIXES)
        raise BookError(f"There is no file {path}." + (f" There is {near[0]}." if near else ""))
    if suffix not in SUFFIXES:
        raise BookError(f"{path.name}: only {', '.join(SUFFIXES)} can be read. Save the table as one of them.")
    readers = {".parquet": _from_parquet, ".csv": _from_delimited, ".tsv": _from_delimited}
    table = readers.get(suffix, _from_json_lines)(path, columns) if path.stat().st_size else pd.DataFrame()
    if table.empty:
        raise BookError(f"{path.name} has no rows. Give a file with a row for each document.")
    return table


def refuse(path: Path, cells: pd.Series, wrong: pd.Series, what: str) -> None:
    """Raise BookError for the first cell of a column where `wrong` is true, with its place and `what` is wrong with it."""
    for place, cell in cells[wrong].items():
        raise BookError(f"{path.name}, {cells.index.name} {place}: {cells.name!r} holds {excerpt(str(cell))}, {what}")


def as_text(cell: object) -> str:
    """A cell in composed characters (NFC) and with single spaces: "" for a missing one, a whole number written as one."""
    if cell is None or cell != cell or str(cell).strip().lower() == "nan":
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return " ".join(unicodedata.normalize("NFC", HALF_CHARACTER.sub("\ufffd", str(cell))).split())


def as_list(cell: object) -> tuple[str, ...] | None:
    """The names in a list, or in what pandas, numpy or JSON writes of one as text, sorted; None for anything else."""
    if not isinstance(cell, list):
        text = as_text(cell)
        if not re.fullmatch(r"[\[({].*[\])}]", text):
            return None
        try:
            cell = ast.literal_eval(re.sub(r"""(['"])\s+(?=['"])""", r"\1, ", text))  # numpy writes no commas
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # names without quotes
            cell = [name.strip(" '\"") for name in text[1:-1].split(",")]
    if not isinstance(cell, (list, tuple, set)) or not all(isinstance(name, (str, int, float, type(None))) for name in cell):
        return None
    return tuple(sorted({as_text(name) for name in cell} - {""}))


def _need(path: Path, columns: list[str], there: list[str]) -> None:
    for name in columns:
        if name not in there:
            raise BookError(f"{path.name}: {unknown_name('column', name, there)}")
        if max(there.count(name), columns.count(name)) > 1:
            raise BookError(
                f"{path.name}: {name!r} is named twice, by its header or by you. Texts, labels and groups are different columns."
            )


def _from_parquet(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _need(path, columns, file.schema_arrow.names)
        rows = file.read(columns).to_pylist()  # pandas would make floats of whole numbers where one is missing
    except (pyarrow.ArrowException, OSError) as error:
        raise BookError(f"{path.name} cannot be read as Parquet ({str(error).splitlines()[0]}). Write it again.") from error
    return pd.DataFrame(rows, columns=columns, dtype=object).rename_axis("row")


def _from_json_lines(path: Path, columns: list[str]) -> pd.DataFrame:
    rows = {}
    for number, line in enumerate(_content(path).split("\n"), start=1):
        try:
            rows |= {number: dict(json.loads(line).items())} if line.strip() else {}
        except (ValueError, AttributeError, RecursionError) as error:
            what = f"is no JSON object: {excerpt(line.strip())}"
            raise BookError(f"{path.name}, line {number} {what}. Write one object a line.") from error
    _need(path, columns, list({name: None for row in rows.values() for name in row}))
    cells = [[row.get(name) for name in columns] for row in rows.values()]
    return pd.DataFrame(cells, pd.Index(rows, name="line"), columns, dtype=object)


def _from_delimited(path: Path, columns: list[str]) -> pd.DataFrame:
    content, usual = _content(path), "\t" if path.suffix.lower() == ".tsv" else ","
    headers = {each: next(_rows(path, content, each), (1, []))[1] for each in (usual, ";", "\t", "|", ",")}
    headers = {each: [" ".join(cell.split()) for cell in header] for each, header in headers.items()}
    delimiter = max(headers, key=lambda each: len(set(columns) & set(headers[each])))  # of equals the usual one
    _need(path, columns, header := headers[delimiter])
    rows = dict(_rows(path, content, delimiter, strict=True))
    for line, cells in rows.items():
        if len(cells) != len(header):
            found = f"{len(cells)} fields between {delimiter!r} where the header has {len(header)}"
            raise BookError(f"{path.name}, line {line}: {found}. Quote texts that hold one; end no row with one.")
    return pd.DataFrame(list(rows.values()), pd.Index(rows, name="line"), header, dtype=object).iloc[1:][columns]


def _rows(path: Path, content: str, delimiter: str, **options) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, each with its first line. (pandas fills short rows, shifts long ones, and names no line.)"""
    csv.field_size_limit(10**9)
    reader, line = csv.reader(io.StringIO(content), delimiter=delimiter, **options), 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        what = f"the row that begins in line {line} is not readable as CSV ({error})"
        raise BookError(f"{path.name}: {what}. Check its quotes.") from error


def _content(path: Path) -> str:
    """The text of a file, with the line ends of Windows and of old Macs made `\\n`."""
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = len((error.object[: error.start] + b".").splitlines()), f"byte {error.object[error.start]:#04x}"
        raise BookError(f"{path.name}, line {line}: {byte} is no UTF-8. If it is a text file, save it as UTF-8.") from error
    return content.replace("\r\n", "\n").replace("\r", "\n")
