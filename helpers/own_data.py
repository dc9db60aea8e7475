"""Your own file: read with everything that is wrong with it named, reported on, and cut to what can be learned.

>>> data = read("tickets.csv", text="message", label="team")
>>> print(data.in_words)
Each document has one label: 'team' has 4 of them.
"""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import train_test_split
from transformers import PreTrainedTokenizerBase

from helpers.errors import BookError, unknown_name
from helpers.sources import Document, excerpt, normalised, remove_duplicates

SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None, ".parquet": None}
SEPARATORS = (";", "|", ",")  # that a column of several labels may have
LEAST = {False: 5, True: 10}  # documents a label needs, single- and multi-label, to be in every split
NEAR = 0.9  # cosine between two texts' TF-IDF from which one is a near copy of the other
NEAR_MOST = 20_000  # documents among which near copies are looked for: it takes time with the square of their number
LONG = 1_000_000  # characters that no document should have
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}


@dataclass(frozen=True)
class Labelled:
    """The documents of a file, with what was found and done on the way.

    Attributes:
        name: of the file.
        documents: with text, label (several labels are a tuple) and group.
        multi_label: whether a document can have several labels.
        in_words: how the labels were understood, to be confirmed by whoever knows.
        warnings: one line each.
    """

    name: str
    documents: list[Document] = field(repr=False)
    multi_label: bool
    in_words: str
    warnings: tuple[str, ...] = ()

    @property
    def labels(self) -> Counter:
        """How many documents have each label, the most frequent first."""
        return Counter(dict(Counter(label for each in self.documents for label in labels_of(each)).most_common()))


def labels_of(document: Document) -> tuple[str, ...]:
    """A document's labels, also where it can have only one."""
    return document.label if isinstance(document.label, tuple) else (document.label,)


def read(
    path: str | Path,
    text: str | list[str],
    label: str | list[str],
    *,
    group: str | None = None,
    multi_label: bool | None = None,
) -> Labelled:
    """Read CSV, TSV, JSON lines or Parquet. What cannot be repaired is refused, what can be is done and named in `warnings`.

    Rows without text or label are left out, and so are copies and near copies of a text, and texts with two labels. Spellings
    of a label that differ in case or spaces become one.

    Args:
        path: by its ending `.csv`, `.tsv`, `.jsonl`, `.ndjson` or `.parquet`.
        text: the column with the texts, or several that are joined by a space, such as title, first claim and abstract.
        label: the column with the label, or with several of them (a list, or names between `;`, `|` or `,`); or several
            columns of zeros and ones, each named after its label.
        group: a column; documents that have the same in it (customer, source) are never split between training and test.
        multi_label: whether a document can have several labels; None finds out.

    Raises:
        BookError: one line with the file, the line or column, and what to do.
    """
    path = Path(path).expanduser()
    names = [label] if isinstance(label, str) else list(label)
    columns = [text] if isinstance(text, str) else list(text)
    rows = _rows(path, [*columns, *names, *([group] if group else [])])
    warnings: list[str] = []
    texts = [" ".join(filter(None, (_text_of(path, column, row, where) for column in columns))) for where, row in rows]
    _refuse_numbers(path, columns[0], texts)
    given, multi_label, in_words = _labels(path, names, rows, multi_label)

    kept, empty, unlabelled, without_group = [], [], [], []
    for (where, row), content, one in zip(rows, texts, given, strict=True):
        of = _cell(row[group]) if group else ""
        if not content:
            empty.append(where)
        elif one is None:
            unlabelled.append(where)
        elif group and not of:
            without_group.append(where)
        else:
            kept.append(Document(content, one, of))
    for what, left_out in (("text", empty), ("label", unlabelled), (f"{group!r}", without_group)):
        if left_out:
            warnings.append(f"{_count(left_out, 'row')} without {what} left out, first {left_out[0]}.")
    if not kept:
        asked = ", ".join(map(repr, [*columns, *names]))
        raise BookError(f"{path.name}: no row has both a text and a label. Check the columns {asked}.")
    long = [excerpt(document.text) for document in kept if len(document.text) > LONG]
    if long:
        warnings.append(f"{_count(long, 'text')} longer than {LONG:,} characters: {long[0]}. Only its beginning will be read.")
    kept = _one_spelling(kept, multi_label, warnings)
    n_labels = len(Labelled(path.name, kept, multi_label, in_words).labels)
    if n_labels > len(kept) / 2 and n_labels > 1:
        raise BookError(f"{path.name}: {len(kept):,} documents have {n_labels:,} labels. Are the labels in {names[0]!r}?")
    kept = _without_copies(kept, multi_label, warnings)
    data = Labelled(path.name, kept, multi_label, in_words, tuple(warnings))
    return _checked(data)


def cut(data: Labelled, n: int | None, seed: int = 0) -> Labelled:
    """At most `n` documents, single labels in proportion, without the labels that have too few of them (`LEAST`).

    Raises:
        BookError: fewer than two labels are left.
    """
    documents, warnings = data.documents, list(data.warnings)
    if n is not None and n < len(documents):
        gold = None if data.multi_label else [document.label for document in documents]
        stratify = gold if gold and min(Counter(gold).values()) > 1 and len(set(gold)) <= min(n, len(documents) - n) else None
        rows, _ = train_test_split(np.arange(len(documents)), train_size=n, stratify=stratify, random_state=seed)
        documents = [documents[row] for row in sorted(rows)]
        warnings.append(f"{n:,} of {len(data.documents):,} documents are used.")
    least = LEAST[data.multi_label]
    counts = replace(data, documents=documents).labels
    rare = sorted(label for label in data.labels if counts[label] < least)
    if len(counts) - sum(label in counts for label in rare) < 2:
        most = ", ".join(f"{label!r} {count}" for label, count in counts.most_common(3))
        raise BookError(
            f"{data.name}: fewer than two labels have {least} documents among {len(documents):,} ({most}). "
            "Label more of them, or put labels together."
        )
    if rare:
        named = ", ".join(f"{label!r} ({counts[label]})" for label in rare[:3]) + (", …" if len(rare) > 3 else "")
        warnings.append(f"{_count(rare, 'label')} with fewer than {least} documents left out: {named}. Nobody can test them.")
        if data.multi_label:
            documents = [each._replace(label=tuple(one for one in each.label if one not in rare)) for each in documents]
        else:
            documents = [each for each in documents if each.label not in rare]
    return replace(data, documents=documents, warnings=tuple(warnings))


def report(data: Labelled, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> pd.DataFrame:
    """What is in the file, a line each: documents, labels, balance, lengths, and how much `n_tokens` cut off.

    Returns:
        One column, `value`, of text.
    """
    lengths = np.array([len(ids) for ids in tokenizer([each.text[: 40 * n_tokens] for each in data.documents]).input_ids])
    counts = data.labels
    (most, many), (least, few) = counts.most_common(1)[0], counts.most_common()[-1]
    rows = {
        "documents": f"{len(data.documents):,}",
        "labels": f"{len(counts):,}",
        "most frequent label": f"{most}: {many:,}, {many / len(data.documents):.0%} of the documents",
        "rarest label": f"{least}: {few:,}",
        "tokens a document": f"median {np.median(lengths):,.0f}",
        f"longer than the {n_tokens} tokens that are read": f"{(lengths > n_tokens).mean():.0%} of the documents",
    }
    named = [any(normalised(one) in normalised(each.text) for one in labels_of(each)) for each in data.documents]
    rows["with the name of their label in them"] = f"{np.mean(named):.0%} of the documents"
    if data.multi_label:
        rows["labels a document"] = f"{np.mean([len(each.label) for each in data.documents]):.1f} on average"
    if data.documents[0].group:
        rows["groups"] = f"{len({each.group for each in data.documents}):,}"
    return pd.DataFrame({"value": rows})


def _rows(path: Path, columns: list[str]) -> list[tuple[str, dict]]:
    """Every row of the file with the words for where it stands; only `columns`."""
    if path.is_dir():
        raise BookError(f"{path} is a folder. Give the file in it.")
    if not path.exists():
        near = sorted(each.name for each in path.parent.glob("*") if each.suffix in SUFFIXES) if path.parent.is_dir() else []
        raise BookError(f"There is no file {path}." + (f" There is {near[0]}." if near else ""))
    if path.suffix.lower() not in SUFFIXES:
        raise BookError(f"{path.name}: only {', '.join(SUFFIXES)} can be read. Save the table as one of them.")
    if not path.stat().st_size:
        raise BookError(f"{path.name} is empty. Give a file with a row for each document.")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise BookError(f"The column {twice!r} is named twice: texts, labels and groups stand in different ones.")
    kind = path.suffix.lower()
    rows = list(_from_parquet(path, columns) if kind == ".parquet" else _from_text(path, columns, SUFFIXES[kind]))
    if not rows:
        raise BookError(f"{path.name} has no rows. Give a file with a row for each document.")
    return rows


def _need(path: Path, columns: list[str], there: list[str]) -> None:
    for name in columns:
        if name not in there:
            error = unknown_name("column", name, map(str, there))
            raise BookError(f"{path.name}: {error} It has {', '.join(map(str, there))}.")
        if there.count(name) > 1:
            raise BookError(f"{path.name} has two columns {name!r}. Rename one.")


def _from_parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, dict]]:
    try:
        _need(path, columns, pyarrow.parquet.read_schema(path).names)
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise BookError(f"{path.name} cannot be read as Parquet ({reason}). Write it again.") from error
    return ((f"row {number}", row) for number, row in enumerate(rows))


def _from_text(path: Path, columns: list[str], separator: str | None) -> Iterator[tuple[str, dict]]:
    raw = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        content = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BookError(
            f"{path.name}, line {line}: byte {raw[error.start]:#04x} is no UTF-8. If it is a text file, save it as UTF-8."
        ) from error
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise BookError(f"{path.name}, line {line} holds a zero byte: that is no text file. Give another one.")
    lines = content.split("\n")
    yield from _from_json(path, columns, lines) if separator is None else _from_csv(path, columns, lines, separator)


def _from_json(path: Path, columns: list[str], lines: list[str]) -> Iterator[tuple[str, dict]]:
    there: dict[str, None] = {}
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                hint = " Write one object a line." if number == 1 and line.strip() == "[" else " Mend or delete the line."
                raise BookError(f"{path.name}, line {number} is no JSON ({error.msg}).{hint}") from error
            if not isinstance(row, dict):
                raise BookError(
                    f"{path.name}, line {number} is no JSON object: {excerpt(line.strip())}. Write one object a line."
                )
            there |= dict.fromkeys(row)
            rows.append((f"line {number}", row))
    _need(path, columns, list(there))
    for where, row in rows:
        yield where, {name: row.get(name) for name in columns}


def _from_csv(path: Path, columns: list[str], lines: list[str], separator: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(10**9)
    delimiters = dict.fromkeys((separator, ";", "\t", "|", ","))
    headers = {each: next(csv.reader(lines[:1], delimiter=each), []) for each in delimiters}
    delimiter = max(headers, key=lambda each: len(set(columns) & set(headers[each])))  # of equals the file's own
    header = headers[delimiter]
    _need(path, columns, header)
    reader, begins = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True), 1
    try:
        for number, cells in enumerate(reader):
            here, begins = begins, reader.line_num + 1
            if not number or not cells:
                continue
            if len(cells) != len(header):
                hint = "Quote the texts that hold one" if len(cells) > len(header) else "Fill it up"
                what = {"\t": "tab"}.get(delimiter, delimiter)
                raise BookError(
                    f"{path.name}, line {here}: {len(cells)} fields between {what!r} where the header has {len(header)}. {hint}."
                )
            yield f"line {here}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BookError(
            f"{path.name}: the row that begins in line {begins} is not readable as CSV ({error}). Check its quotes."
        ) from error


def _text_of(path: Path, column: str, row: dict, where: str) -> str:
    value = row[column]
    if isinstance(value, (list, dict, bytes)):
        raise BookError(f"{path.name}, {where}: {column!r} holds {excerpt(str(value))}, no text. Name the column with the texts.")
    return _cell(value)


def _cell(value: object) -> str:
    """A cell as text; missing ones are empty, and a whole number is written as one."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    cell = " ".join(str(value).split())
    return "" if cell.lower() == "nan" else cell


def _refuse_numbers(path: Path, column: str, texts: list[str]) -> None:
    filled = [text for text in texts if text]
    if filled and all(_is_number(text) for text in filled):
        raise BookError(f"{path.name}: the column {column!r} holds numbers ({filled[0]}), no texts. Name the one with the texts.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _labels(path: Path, names: list[str], rows: list, multi_label: bool | None) -> tuple[list, bool, str]:
    """Each row's label (None if it has none), whether there can be several, and that in words."""
    if len(names) > 1:
        if multi_label is False:
            raise BookError("Several label columns make a multi-label task. Name one column, or let there be several labels.")
        found = []
        for where, row in rows:
            cells = {name: _cell(row[name]).lower() for name in names}
            for name, cell in cells.items():
                if cell not in ("0", "1", "true", "false", ""):
                    raise BookError(
                        f"{path.name}, {where}: label column {name!r} holds {row[name]!r}. Write 1 where it applies, else 0."
                    )
            found.append(tuple(name for name, cell in cells.items() if cell in ("1", "true")))
        return found, True, f"A document can have several labels, one for each of the {len(names)} columns."
    (column,) = names
    values = [row[column] for _, row in rows]
    if any(isinstance(value, (list, tuple)) for value in values):
        if multi_label is False and any(isinstance(value, list) and len(value) > 1 for value in values):
            raise BookError(f"{path.name}: {column!r} holds lists of labels, so its documents can have several.")
        found = [_several(path, column, row[column], where) for where, row in rows]
        return found, True, f"A document can have several labels: {column!r} holds lists of them."
    for (where, _), value in zip(rows, values, strict=True):
        if isinstance(value, (dict, bytes)):
            raise BookError(f"{path.name}, {where}: the label is {excerpt(str(value))}. Use a name, or a list of names.")
    cells = [_cell(value) for value in values]
    separator = _separator(cells, multi_label)
    if separator:
        several = sum(separator in cell for cell in cells)
        found = [tuple(sorted({part.strip() for part in cell.split(separator)} - {""})) if cell else None for cell in cells]
        words = f"{several:,} of {len(cells):,} cells of {column!r} have {separator!r} between names."
        return found, True, f"A document can have several labels: {words}"
    found = [cell or None for cell in cells]
    if multi_label:
        return [cell if cell is None else (cell,) for cell in found], True, f"A document can have several labels in {column!r}."
    n = len({normalised(cell) for cell in cells if cell})
    return found, False, f"Each document has one label: {column!r} has {n:,} of them."


def _several(path: Path, column: str, value: object, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, (str, int)) for each in value):
        raise BookError(f"{path.name}, {where}: {column!r} holds {value!r}, while other rows have lists of names. Use lists.")
    return tuple(sorted({" ".join(str(each).split()) for each in value} - {""}))


def _separator(cells: list[str], multi_label: bool | None) -> str | None:
    """What stands between several labels: its parts are fewer than the cells' different contents, and come again and again."""
    if multi_label is False:
        return None
    filled = [cell for cell in cells if cell]
    for separator in SEPARATORS:
        joined = [cell for cell in filled if separator in cell]
        parts = Counter(part.strip() for cell in set(filled) for part in cell.split(separator))
        again = sum(parts[part.strip()] > 1 for cell in set(joined) for part in cell.split(separator))
        total = sum(len(cell.split(separator)) for cell in set(joined))
        if joined and (multi_label or again > 0.8 * total):
            return separator
    return None


def _one_spelling(documents: list[Document], multi_label: bool, warnings: list[str]) -> list[Document]:
    counts = Counter(one for each in documents for one in labels_of(each))
    spellings: dict[str, list[str]] = {}
    for name, _ in counts.most_common():
        spellings.setdefault(normalised(name), []).append(name)
    differing = [names for names in spellings.values() if len(names) > 1]
    if differing:
        first = " and ".join(map(repr, differing[0]))
        warnings.append(f"{_count(differing, 'label')} written in several ways, such as {first}: taken as one.")
    best = {name: names[0] for names in spellings.values() for name in names}
    if multi_label:
        return [each._replace(label=tuple(sorted({best[name] for name in each.label}))) for each in documents]
    return [each._replace(label=best[each.label]) for each in documents]


def _without_copies(documents: list[Document], multi_label: bool, warnings: list[str]) -> list[Document]:
    labels: dict[str, set] = {}
    for each in documents:
        labels.setdefault(normalised(each.text), set()).add(each.label)
    torn = {key: found for key, found in labels.items() if len(found) > 1}
    if torn:
        done = "their labels are united" if multi_label else "left out"
        warnings.append(f"{_count(torn, 'text')} with different labels: {done}, such as {excerpt(next(iter(torn)))}.")
    copies = sum(normalised(each.text) not in torn for each in documents) - (len(labels) - len(torn))
    if copies:
        warnings.append(f"{copies:,} of {len(documents):,} documents are copies of another one: left out.")
    kept = remove_duplicates(documents, "unite" if multi_label else "drop")
    near = _near_copies([each.text for each in kept]) if len(kept) <= NEAR_MOST else []
    if len(kept) > NEAR_MOST:
        warnings.append(f"{len(kept):,} documents are too many to look for near copies: none was left out.")
    if near:
        warnings.append(
            f"{_count(near, 'document')} nearly the same as another one: left out, such as {excerpt(kept[near[0]].text)}."
        )
    left_out = set(near)
    return [each for row, each in enumerate(kept) if row not in left_out]


def _near_copies(texts: list[str], batch: int = 500) -> list[int]:
    """Rows whose TF-IDF lies within `NEAR` of an earlier row's (chapter 01)."""
    try:
        vectors = TfidfVectorizer(dtype=np.float32).fit_transform([text[:10_000] for text in texts])
    except ValueError:  # no text has a word
        return []
    found = []
    for start in range(0, vectors.shape[0], batch):
        like = (vectors[start : start + batch] @ vectors.T >= NEAR).tocoo()
        found += [start + row for row, column in zip(like.row, like.col, strict=True) if column < start + row]
    return sorted(set(found))


def _checked(data: Labelled) -> Labelled:
    """Refuse what no training can learn; name what it will find hard."""
    counts = data.labels
    warnings = list(data.warnings)
    if len(counts) < 2:
        only = f"only {next(iter(counts))!r}" if counts else "none"
        raise BookError(f"{data.name}: classification needs two labels or more, but the documents have {only}.")
    numbers = [label for label in counts if _is_number(label)]
    if len(numbers) == len(counts) and any("." in label for label in numbers):
        raise BookError(f"{data.name}: the labels are measurements ({numbers[0]}, …), no classes. Put them into named ranges.")
    if numbers:
        warnings.append(f"Labels are numbers, such as {numbers[0]!r}. Instruction tuning reads names: write what they mean.")
    odd = [label for label in counts if label.lower() in ("none", "null", "n/a", "na", "unknown", "-", "?")]
    if odd:
        warnings.append(
            f"{odd[0]!r} is taken for a label, of {counts[odd[0]]:,} documents. Clear the cells if it stands for none."
        )
    most, least = counts.most_common()[0], counts.most_common()[-1]
    if most[1] > 20 * least[1]:
        warnings.append(f"Labels are out of balance: {most[0]!r} has {most[1]:,} documents, {least[0]!r} {least[1]:,}.")
    return replace(data, warnings=tuple(warnings))


def _count(things: Collection, noun: str) -> str:
    return f"{len(things):,} {noun}" if len(things) == 1 else f"{len(things):,} {noun}s"
