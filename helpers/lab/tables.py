"""Tables of text in files: CSV, TSV, JSON lines and Parquet, every cell as it stands there and every row with its place."""

import ast
import csv
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import charset_normalizer
import pandas as pd
import pyarrow.parquet

from helpers.corpora import excerpt
from helpers.errors import BookError, unknown_name

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # what is left of an emoji that was cut in the middle
UNICODE = ["utf_16", "utf_16_le", "utf_16_be"]
ENCODINGS = ["cp1251", "koi8_r", "shift_jis", "euc_jp", "gb18030", "big5", "euc_kr"]  # of letters that are not Latin
_RETURN = "\ue00d"  # stands for a carriage return that ends no line, which `csv` does not read
_LOOKED_AT = 1 << 16  # bytes or letters at the beginning of a file that tell zero bytes and line ends


def utf8_streams(encoding: str | None = None) -> None:
    """Let standard output be UTF-8, whatever the system's locale says, and standard input too, or in `encoding`."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            given, errors = (encoding or "utf-8", "strict") if stream is sys.stdin else ("utf-8", "backslashreplace")
            stream.reconfigure(encoding=given, errors=errors)


def check(path: Path) -> None:
    """Refuse a file that is not there or has another ending than `SUFFIXES`."""
    if not path.is_file():
        near = sorted(each.name for each in (path if path.is_dir() else path.parent).glob("*") if each.suffix in SUFFIXES)
        raise BookError(f"There is no file {path}." + (f" There is {near[0]}." if near else ""))
    if path.suffix.lower() not in SUFFIXES:
        raise BookError(f"{path.name}: only {', '.join(SUFFIXES)} can be read. Save the table as one of them.")


def encoding_of(path: Path, warnings: list[str]) -> str:
    """UTF-8, UTF-16, or an old encoding, which a warning names with words that tell. BookError: the file is no text.

    Where few letters are foreign it is one of Western Europe: cp1252 or, if that has not all of them, latin-1.
    """
    with path.open("rb") as file:
        head = file.read(_LOOKED_AT)
        file.seek(0)
        not_utf8 = (line for line in file if line.decode("utf-8", "ignore").encode("utf-8") != line)
        odd = [head] if b"\0" in head else list(islice(not_utf8, 1000))
    raw = b"".join(odd)
    if not raw:
        return "utf-8-sig"
    foreign = raw.translate(None, bytes(range(128)))
    if b"\0" not in head and len(foreign) < 0.25 * len(raw):
        found = "latin-1" if set(foreign) & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "cp1252"
    elif guess := charset_normalizer.from_bytes(raw, cp_isolation=UNICODE if b"\0" in head else ENCODINGS).best():
        found = guess.encoding
    else:
        raise BookError(f"{path.name} is no text in any encoding that is known here. If it is one, name it: --encoding …")
    if found not in UNICODE:
        words = " ".join(word for word in odd[0].decode(found, "replace").split() if not word.isascii())
        warnings.append(f"Read as {found}, for it is no UTF-8: {excerpt(words)}. If that looks wrong: --encoding …")
    return found


def lines_of(path: Path, encoding: str) -> Iterator[str]:
    """The lines of a text file, with the line ends of Windows and of old Macs made `\\n`. BookError: another encoding."""
    try:
        with path.open(encoding=encoding, newline="") as file:
            head = file.read(_LOOKED_AT)
        of_a_mac = head.count("\r") > head.count("\r\n") + head.count("\n")
        with path.open(encoding=encoding, newline=None if of_a_mac else "\n") as file:
            for line in file:
                yield line.replace("\r\n", "\n").replace("\r", _RETURN)
    except (LookupError, UnicodeError) as error:
        raise BookError(f"{path.name} cannot be read as {encoding} ({error}). Name another: --encoding latin-1, say.") from error


class Table:
    """The rows of a file, or of `lines` in the format that `path` ends in: CSV, TSV, Parquet, else JSON lines.

    Gives `(place, {column: cell})`; `place` says whether that is a `line`, a row's first one, or a `row`. Fields are parted as
    the header is, by a comma, semicolon, tab or bar: `delimiter`, "" without a header. `warnings` has the encoding, if it is an
    old one. BookError: as of `check`; and while it is read, a row that is none, or no such column.
    """

    def __init__(self, path: Path, columns: list[str], encoding: str | None = None, lines: Iterable[str] | None = None) -> None:
        self.path, self.columns, self.lines, self.parquet = path, columns, lines, path.suffix.lower() == ".parquet"
        self.place, self.delimiter, self.header, self.warnings = "row" if self.parquet else "line", "", [], []
        if lines is None:
            check(path)
            self._encoding = None if self.parquet else encoding or encoding_of(path, self.warnings)

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        if self.parquet:
            batches = parquet(self.path, self.columns).iter_batches(1024)
            return enumerate(row for batch in batches for row in batch.to_pylist())
        lines = lines_of(self.path, self._encoding) if self.lines is None else iter(self.lines)
        return self._records(lines) if self.path.suffix.lower() in (".csv", ".tsv") else self._objects(lines)

    def _records(self, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
        first = [""]
        for line in lines:
            first.append(line)
            if line.strip() and not "".join(first).count('"') % 2:  # else a header that goes on, or nothing yet
                break
        usual = "\t" if self.path.suffix.lower() == ".tsv" else ","
        headers = {each: next(self._fields(first, each, 1), (1, []))[1] for each in (usual, ";", "\t", "|", ",")}
        headers = {each: [" ".join(cell.split()) for cell in header] for each, header in headers.items()}
        self.delimiter = max(headers, key=lambda each: len(set(self.columns) & set(headers[each])))  # of equals the usual one
        self.header = headers[self.delimiter]
        if self.header:
            need(self.path, self.columns, self.header)
        names = [name if name not in self.header[:n] else f"{name}.{n}" for n, name in enumerate(self.header)]
        for line, cells in self._fields(lines, self.delimiter, len(first), strict=True):
            if len(cells) != len(names):
                found = f"{len(cells)} fields between {self.delimiter!r} where the header has {len(names)}"
                raise BookError(f"{self.path.name}, line {line}: {found}. Quote texts that hold one; end no row with one.")
            yield line, dict(zip(names, cells, strict=True))

    def _fields(self, lines: Iterable[str], delimiter: str, start: int, **options) -> Iterator[tuple[int, list[str]]]:
        """Rows that are not empty, each with its first line. (pandas fills short rows, shifts long ones, and names no line.)"""
        csv.field_size_limit(10**9)
        reader, line = csv.reader(lines, delimiter=delimiter, **options), start
        try:
            for cells in reader:
                if cells:
                    yield line, [cell.replace(_RETURN, "\r") for cell in cells]
                line = start + reader.line_num
        except csv.Error as error:
            what = f"the row that begins in line {line} is not readable as CSV ({error})"
            raise BookError(f"{self.path.name}: {what}. Check its quotes.") from error

    def _objects(self, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
        there: dict[str, None] = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = dict(json.loads(line.replace(_RETURN, " ")).items()) if line.strip() else {}
            except (ValueError, AttributeError, RecursionError) as error:
                what = f"is no JSON object: {excerpt(line.strip())}"
                raise BookError(f"{self.path.name}, line {number} {what}. Write one object a line.") from error
            there |= dict.fromkeys(row)
            if row:
                yield number, row
        if there:
            need(self.path, self.columns, list(there))


def parquet(path: Path, columns: list[str]) -> pyarrow.parquet.ParquetFile:
    """A Parquet file that has these columns. BookError: it has not, or is none."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise BookError(f"{path.name} cannot be read as Parquet ({str(error).splitlines()[0]}). Write it again.") from error
    need(path, columns, file.schema_arrow.names)
    return file


def need(path: Path, columns: list[str], there: list[str]) -> None:
    """Refuse a file without one of these columns, or with one of them twice."""
    for name in columns:
        if name not in there:
            raise BookError(f"{path.name}: {unknown_name('column', name, there)}")
        if max(there.count(name), columns.count(name)) > 1:
            raise BookError(
                f"{path.name}: {name!r} is named twice, by its header or by you. Texts, labels and groups are different columns."
            )


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
