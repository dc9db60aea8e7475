"""Your own file: read with everything that is wrong with it named, reported on, and cut to what can be learned (chapter 11)."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from transformers import PreTrainedTokenizerBase

from helpers.corpora import Document, excerpt, labels_of, normalised, remove_duplicates
from helpers.errors import BookError
from helpers.lab import tables
from helpers.lab.tables import HALF_CHARACTER, as_text

RETURN = re.compile("\r")
SEPARATORS = (";", "|", ",")  # that a column of several labels may have
LEAST = {False: 5, True: 10}  # documents a label needs, single- and multi-label, to be in every split
NEAR = 0.9  # cosine between two texts' TF-IDF from which one is a near copy of the other
NEAR_MOST = 20_000  # documents among which near copies are looked for: it takes time with the square of their number
# A word holds all but spaces and punctuation: vowel signs and emoji too. Each Chinese or Japanese character is a word.
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|[^\s!-/:-@\[-`{-~\u2010-\u2027\u3000-\u30ff\u3400-\u9fff\uff00-\uff20]+"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_ONES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}


@dataclass(frozen=True)
class Labelled:
    """The documents of a file, with what was found and done on the way."""

    name: str  # of the file
    documents: list[Document] = field(repr=False)  # with text, label (several labels are a tuple) and group
    multi_label: bool  # whether a document can have several labels
    in_words: str  # how the labels were understood, to be confirmed by whoever knows
    warnings: tuple[str, ...] = ()  # one line each
    columns: tuple[str, ...] = ()  # with the texts

    @property
    def labels(self) -> Counter:
        """How many documents have each label, the most frequent first."""
        return Counter(dict(Counter(label for each in self.documents for label in labels_of(each)).most_common()))


def read(
    path: str | Path,
    text: str | list[str],
    label: str | list[str],
    *,
    group: str | None = None,
    multi_label: bool | None = None,
    encoding: str | None = None,
) -> Labelled:
    """Read CSV, TSV, JSON lines or Parquet. What cannot be repaired is refused, what can be is done and named in `warnings`.

    Rows without text or label are left out, and so are copies of a text, near copies with the same labels, and texts with two
    labels. Spellings of a label that differ in case, spaces or composed characters become one. BookError says what to do.

    Args:
        text: the column with the texts, or several that are joined by a space, such as title, first claim and abstract.
        label: the column with the label, or with several of them (a list, or names between `;`, `|` or `,`); or several
            columns of zeros and ones, each named after its label.
        group: a column; documents that have the same in it (customer, source) are never split between training and test.
        multi_label: whether a document can have several labels; None finds out.
        encoding: of a text file, such as `cp1252`; None finds out and names it.
    """
    path = Path(path).expanduser()
    columns, names = ([each] if isinstance(each, str) else list(each) for each in (text, label))
    wanted = [*columns, *names, *filter(None, [group])]
    rows = tables.Table(path, wanted, encoding)
    found = {place: [row.get(name) for name in wanted] for place, row in rows}
    table, warnings = pd.DataFrame(found.values(), pd.Index(found, name=rows.place), wanted, dtype=object), rows.warnings
    if table.empty:
        raise BookError(f"{path.name} has no rows. Give a file with a row for each document.")
    for sign, what in ((HALF_CHARACTER, "half a character, replaced by \ufffd"), (RETURN, "a carriage return, read as a space")):
        found = table.index[table.map(lambda cell, sign=sign: bool(sign.search(str(cell)))).any(axis=1)]
        _note(warnings, found, "row", f"with {what}, first {table.index.name}")
    for column in columns:
        odd = table[column].map(lambda cell: isinstance(cell, (list, dict, bytes)))
        tables.refuse(path, table[column], odd, "no text. Name the column with the texts.")
    texts = table[columns].map(as_text).agg(" ".join, axis=1).map(as_text)
    filled = texts[texts != ""]
    if len(filled) and filled.str.fullmatch(_NUMBER).all():
        raise BookError(f"{path.name}: {columns[0]!r} holds numbers ({filled.iloc[0]}), no texts. Name the column of the texts.")
    labels, multi_label, in_words = _labels(path, table[names], multi_label)
    rows = pd.DataFrame({"text": texts, "label": labels, "group": table[group].map(as_text) if group else ""}, dtype=object)

    for column, what in {"text": "text", "label": "label", **({"group": repr(group)} if group else {})}.items():
        lost = rows.index[rows[column].isna() | (rows[column] == "")]
        _note(warnings, lost, "row", f"without {what} left out, first {lost.name}")
        rows = rows.drop(lost)
    if rows.empty:
        asked = ", ".join(map(repr, [*columns, *names]))
        raise BookError(f"{path.name}: no row has both a text and a label. Check the columns {asked}.")
    rows["label"] = _one_spelling(rows.label, warnings)
    documents = [Document(*row) for row in rows.itertuples(index=False)]  # each label a tuple, up to the end
    data = Labelled(path.name, documents, multi_label, in_words)
    if 1 < len(data.labels) > len(documents) / 2:
        raise BookError(f"{path.name}: {len(rows):,} documents have {len(data.labels):,} labels. Are the labels in {names[0]!r}?")
    documents = _without_near_copies(_without_copies(documents, multi_label, warnings), warnings)
    warnings += _hard_to_learn(replace(data, documents=documents))
    if not multi_label:
        documents = [each._replace(label=each.label[0]) for each in documents]
    return replace(data, documents=documents, warnings=tuple(warnings), columns=tuple(columns))


def cut(data: Labelled) -> Labelled:
    """The documents without the labels that have too few of them (`LEAST`). BookError: fewer than two labels are left."""
    documents, warnings, least, counts = data.documents, list(data.warnings), LEAST[data.multi_label], data.labels
    rare = sorted(label for label in counts if counts[label] < least)
    named = ", ".join(f"{label!r} ({counts[label]})" for label in rare[:3]) + ", …" * (len(rare) > 3)
    if len(counts.keys() - set(rare)) < 2:
        few = f"fewer than two labels have {least} documents among {len(documents):,}, not {named}"
        raise BookError(f"{data.name}: {few}. Label more of them, or put labels together.")
    if rare:
        s = "s" * (len(rare) > 1)
        warnings.append(f"{len(rare):,} label{s} with fewer than {least} documents left out: {named}. Nobody can test them.")
        kept = [each._replace(label=tuple(one for one in labels_of(each) if one not in rare)) for each in documents]
        documents = kept if data.multi_label else [each._replace(label=each.label[0]) for each in kept if each.label]
    return replace(data, documents=documents, warnings=tuple(warnings))


def report(data: Labelled, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> pd.DataFrame:
    """What is in the file, a line each, as text in the column `value`, with how much of the documents `n_tokens` cut off."""
    lengths = np.array([len(ids) for ids in tokenizer([each.text[: 40 * n_tokens] for each in data.documents]).input_ids])
    named = [any(normalised(one) in normalised(each.text) for one in labels_of(each)) for each in data.documents]
    counts, n, groups = data.labels, len(data.documents), {each.group for each in data.documents}
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    rows = {
        "documents": f"{n:,}",
        "labels": f"{len(counts):,}",
        "labels a document": f"{counts.total() / n:.1f} on average" if data.multi_label else None,
        "most frequent label": f"{most}: {many:,}, {many / n:.0%} of the documents",
        "rarest label": f"{least}: {few:,}",
        "tokens a document": f"median {np.median(lengths):,.0f}",
        f"longer than the {n_tokens} tokens that are read": f"{(lengths > n_tokens).mean():.0%} of the documents",
        "with the name of their label in them": f"{np.mean(named):.0%} of the documents",
        "groups": f"{len(groups):,}" if groups != {""} else None,
    }
    return pd.DataFrame({"value": rows}).dropna()


def _labels(path: Path, cells: pd.DataFrame, multi_label: bool | None) -> tuple[pd.Series, bool, str]:
    """Each row's labels as a tuple (None if nothing is said), whether there can be several, and that in words."""
    several = "A document can have several labels"
    if len(cells.columns) > 1:
        ones = cells.map(lambda cell: _ONES.get(as_text(cell).lower()))
        for name in cells:
            tables.refuse(path, cells[name], ones[name].isna(), "not 0 or 1. Write 1 where the label applies, else 0.")
        found = [tuple(cells.columns[row]) for row in ones.to_numpy(bool)]
        return pd.Series(found, cells.index, dtype=object), True, f"{several}, one for each of the {len(cells.columns)} columns."
    column, cells = cells.columns[0], cells.iloc[:, 0]
    odd = cells.map(lambda cell: isinstance(cell, (dict, bytes)))
    tables.refuse(path, cells, odd, "no name. Use a name, or a list of names.")
    names, lists = cells.map(as_text), cells.map(tables.as_list)
    n_listed = lists.map(len, na_action="ignore")
    written_as_lists = cells.map(lambda cell: isinstance(cell, list)) | names.str.match(r"""[\[({]\s*['"]""")
    without_quotes = lists[names != ""].notna().all() and (n_listed > 1).any()  # [garden, harbour]
    if written_as_lists.any() or without_quotes:
        tables.refuse(path, cells, lists.isna() & (names != ""), "while other rows have lists of names. Use lists.")
        if multi_label is not False:
            return lists, True, f"{several}: {column!r} holds lists of them."
        tables.refuse(path, cells, n_listed > 1, "so its documents can have several labels.")
        names = lists.map("".join, na_action="ignore").fillna("")
    if names[names != ""].str.fullmatch(r"-?\d+(\.0)?").all():
        names = names.str.removesuffix(".0")  # whole numbers, written so where one was missing
    filled = names[names != ""]
    separator = None if multi_label is False else _separator(filled, multi_label)
    if separator:
        found = names.map(lambda cell: tuple(sorted({part.strip() for part in cell.split(separator)} - {""})) or None)
        n = names.str.contains(separator, regex=False).sum()
        return found, True, f"{several}: {n:,} of {len(names):,} cells of {column!r} have {separator!r} between names."
    in_words = f"{several} in {column!r}."
    if not multi_label:
        in_words = f"Each document has one label: {column!r} has {filled.map(normalised).nunique():,} of them."
    return names.map(lambda name: (name,) if name else None), bool(multi_label), in_words


def _separator(cells: pd.Series, multi_label: bool | None) -> str | None:
    """What stands between several labels: its parts are fewer than the cells' different contents, and come again and again."""
    for separator in SEPARATORS:
        split = [[part.strip() for part in cell.split(separator)] for cell in cells.unique()]
        parts = Counter(part for cell in split for part in cell)
        joined = [part for cell in split if len(cell) > 1 for part in cell]
        if joined and (multi_label or sum(parts[part] > 1 for part in joined) > 0.8 * len(joined)):
            return separator
    return None


def _one_spelling(labels: pd.Series, warnings: list[str]) -> pd.Series:
    spellings: dict[str, list[str]] = {}
    for name, _ in Counter(name for names in labels for name in names).most_common():
        spellings.setdefault(normalised(name), []).append(name)
    differing = [names for names in spellings.values() if len(names) > 1]
    such = [" and ".join(map(repr, names)) for names in differing]
    _note(warnings, such, "label", "written in several ways, such as", ": taken as one.")
    return labels.map(lambda names: tuple(sorted({spellings[normalised(name)][0] for name in names})))


def _without_copies(documents: list[Document], multi_label: bool, warnings: list[str]) -> list[Document]:
    rows = pd.DataFrame({"text": [normalised(each.text) for each in documents], "label": [each.label for each in documents]})
    n_labels = rows.groupby("text", sort=False).label.nunique()
    torn, done = n_labels.index[n_labels > 1], "their labels are united" if multi_label else "left out"
    _note(warnings, torn.map(excerpt), "text", f"with different labels: {done}, such as")
    copies = (rows.text.duplicated() & ~rows.text.isin(torn)).sum()
    if copies:
        warnings.append(f"{copies:,} of {len(documents):,} documents are copies of another one: left out.")
    return remove_duplicates(documents, "unite" if multi_label else "drop")


def _without_near_copies(documents: list[Document], warnings: list[str]) -> list[Document]:
    """Leave out a text whose TF-IDF lies within `NEAR` of an earlier one's with the same labels (chapter 01)."""
    if len(documents) > NEAR_MOST:
        warnings.append(f"{len(documents):,} documents are too many to look for near copies: none was left out.")
        return documents
    try:
        vectors = TfidfVectorizer(token_pattern=WORD, dtype=np.float32).fit_transform([each.text[:10_000] for each in documents])
    except ValueError:  # no text has a word
        return documents
    like = NearestNeighbors(radius=1 - NEAR, metric="cosine").fit(vectors).radius_neighbors_graph().tocoo()
    labels, _ = pd.factorize(pd.Series([each.label for each in documents]))
    near = set(like.row[(like.col < like.row) & (labels[like.col] == labels[like.row])].tolist())
    such = [excerpt(documents[row].text) for row in sorted(near)]
    _note(warnings, such, "document", "nearly the same as another one: left out, such as")
    return [each for row, each in enumerate(documents) if row not in near]


def _hard_to_learn(data: Labelled) -> list[str]:
    """Refuse labels that no training can learn; name what it will find hard."""
    counts, warnings = data.labels, []
    if len(counts) < 2:
        only = f"only {next(iter(counts))!r}" if counts else "none"
        raise BookError(f"{data.name}: classification needs two labels or more, but the documents have {only}.")
    numbers = [label for label in counts if re.fullmatch(_NUMBER, label)]
    if len(numbers) == len(counts) and any("." in label for label in numbers):
        raise BookError(f"{data.name}: the labels are measurements ({numbers[0]}, …), no classes. Put them into named ranges.")
    if numbers:
        warnings.append(f"Labels are numbers, such as {numbers[0]!r}. Instruction tuning reads names: write what they mean.")
    odd = [label for label in counts if label.lower() in ("none", "null", "n/a", "na", "unknown", "-", "?")]
    if odd:
        n = counts[odd[0]]
        warnings.append(f"{odd[0]!r} is taken for a label, of {n:,} documents. Clear the cells if it stands for none.")
    return warnings


def _note(warnings: list[str], found: Sequence, noun: str, what: str, end: str = ".") -> None:
    """Add `2 rows …` to the warnings, with the first of them, if there are any."""
    if len(found):
        warnings.append(f"{len(found):,} {noun}{'s' * (len(found) > 1)} {what} {found[0]}{end}")
