"""Your own file: read with everything that is wrong with it named, reported on, and cut to what can be learned.

>>> data = read("tickets.csv", text="message", label="team")
>>> print(data.in_words)
Each document has one label: 'team' has 4 of them.
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import train_test_split
from transformers import PreTrainedTokenizerBase

from helpers.corpora import Document, excerpt, labels_of, normalised, remove_duplicates
from helpers.errors import BookError
from helpers.lab import tables
from helpers.lab.tables import HALF_CHARACTER, as_text

SEPARATORS = (";", "|", ",")  # that a column of several labels may have
LEAST = {False: 5, True: 10}  # documents a label needs, single- and multi-label, to be in every split
NEAR = 0.9  # cosine between two texts' TF-IDF from which one is a near copy of the other
NEAR_MOST = 20_000  # documents among which near copies are looked for: it takes time with the square of their number
LONG = 1_000_000  # characters that no document should have
# A word may have one letter and holds all but spaces and punctuation: vowel signs and emoji too. Each Chinese or Japanese
# character is a word.
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|[^\s!-/:-@\[-`{-~\u2010-\u2027\u3000-\u30ff\u3400-\u9fff\uff00-\uff20]+"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_ONES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}


@dataclass(frozen=True)
class Labelled:
    """The documents of a file, with what was found and done on the way."""

    name: str  # of the file
    documents: list[Document] = field(repr=False)  # with text, label (several labels are a tuple) and group
    multi_label: bool  # whether a document can have several labels
    in_words: str  # how the labels were understood, to be confirmed by whoever knows
    warnings: tuple[str, ...] = ()  # one line each

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
) -> Labelled:
    """Read CSV, TSV, JSON lines or Parquet. What cannot be repaired is refused, what can be is done and named in `warnings`.

    Rows without text or label are left out, and so are copies of a text, near copies with the same labels, and texts with two
    labels. Spellings of a label that differ in case, spaces or composed characters become one.

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
    columns, names = ([each] if isinstance(each, str) else list(each) for each in (text, label))
    table = tables.read(path, [*columns, *names, *filter(None, [group])])
    warnings = []
    halves = table.index[table.map(lambda cell: bool(HALF_CHARACTER.search(str(cell)))).any(axis=1)]
    if len(halves):
        warnings.append(f"{_count(halves, 'row')} with half a character, replaced by \ufffd, first {halves.name} {halves[0]}.")
    for column in columns:
        odd = table[column].map(lambda cell: isinstance(cell, (list, dict, bytes)))
        tables.refuse(path, table[column], odd, "no text. Name the column with the texts.")
    texts = table[columns].map(as_text).agg(" ".join, axis=1).map(as_text)
    filled = texts[texts != ""]
    if len(filled) and filled.map(_NUMBER.fullmatch).astype(bool).all():
        raise BookError(f"{path.name}: {columns[0]!r} holds numbers ({filled.iloc[0]}), no texts. Name the column of the texts.")
    labels, multi_label, in_words = _labels(path, table[names], multi_label)
    rows = pd.DataFrame({"text": texts, "label": labels, "group": table[group].map(as_text) if group else ""}, dtype=object)

    for what, column in {"text": "text", "label": "label", **({repr(group): "group"} if group else {})}.items():
        missing = rows.index[rows[column].isna() | (rows[column] == "")]
        if len(missing):
            warnings.append(f"{_count(missing, 'row')} without {what} left out, first {missing.name} {missing[0]}.")
            rows = rows.drop(missing)
    if rows.empty:
        asked = ", ".join(map(repr, [*columns, *names]))
        raise BookError(f"{path.name}: no row has both a text and a label. Check the columns {asked}.")
    long = rows.text[rows.text.str.len() > LONG]
    if len(long):
        such = excerpt(long.iloc[0])
        warnings.append(f"{_count(long, 'text')} longer than {LONG:,} characters: {such}. Only its beginning will be read.")
    rows["label"] = _one_spelling(rows.label, warnings)
    documents = [Document(*row) for row in rows.itertuples(index=False)]  # each label a tuple, up to the end
    data = Labelled(path.name, documents, multi_label, in_words)
    if 1 < len(data.labels) > len(documents) / 2:
        raise BookError(f"{path.name}: {len(rows):,} documents have {len(data.labels):,} labels. Are the labels in {names[0]!r}?")
    documents = _without_near_copies(_without_copies(documents, multi_label, warnings), warnings)
    warnings += _hard_to_learn(replace(data, documents=documents))
    if not multi_label:
        documents = [each._replace(label=each.label[0]) for each in documents]
    return replace(data, documents=documents, warnings=tuple(warnings))


def cut(data: Labelled, n: int | None, seed: int = 0) -> Labelled:
    """At most `n` documents, single labels in proportion, without the labels that have too few of them (`LEAST`).

    Raises:
        BookError: fewer than two labels are left.
    """
    documents, warnings = data.documents, list(data.warnings)
    if n is not None and n < len(documents):
        gold = [document.label for document in documents]
        fits = not data.multi_label and min(Counter(gold).values()) > 1 and len(set(gold)) <= min(n, len(gold) - n)
        rows, _ = train_test_split(np.arange(len(gold)), train_size=n, stratify=gold if fits else None, random_state=seed)
        documents = [documents[row] for row in sorted(rows)]
        warnings.append(f"{n:,} of {len(data.documents):,} documents are used.")
    least, counts = LEAST[data.multi_label], replace(data, documents=documents).labels
    rare = sorted(label for label in data.labels if counts[label] < least)
    if sum(count >= least for count in counts.values()) < 2:
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
    named = [any(normalised(one) in normalised(each.text) for one in labels_of(each)) for each in data.documents]
    counts, n = data.labels, len(data.documents)
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    rows = {
        "documents": f"{n:,}",
        "labels": f"{len(counts):,}",
        "most frequent label": f"{most}: {many:,}, {many / n:.0%} of the documents",
        "rarest label": f"{least}: {few:,}",
        "tokens a document": f"median {np.median(lengths):,.0f}",
        f"longer than the {n_tokens} tokens that are read": f"{(lengths > n_tokens).mean():.0%} of the documents",
        "with the name of their label in them": f"{np.mean(named):.0%} of the documents",
    }
    if data.multi_label:
        rows["labels a document"] = f"{sum(counts.values()) / n:.1f} on average"
    if data.documents[0].group:
        rows["groups"] = f"{len({each.group for each in data.documents}):,}"
    return pd.DataFrame({"value": rows})


def _labels(path: Path, cells: pd.DataFrame, multi_label: bool | None) -> tuple[pd.Series, bool, str]:
    """Each row's labels as a tuple (None if nothing is said), whether there can be several, and that in words."""
    several = "A document can have several labels"
    if len(cells.columns) > 1:
        if multi_label is False:
            raise BookError("Several label columns make a multi-label task. Name one column, or let there be several labels.")
        for name in cells:
            unclear = cells[name].map(lambda cell: as_text(cell).lower() not in _ONES)
            tables.refuse(path, cells[name], unclear, "not 0 or 1. Write 1 where the label applies, else 0.")
        ones = cells.map(lambda cell: _ONES[as_text(cell).lower()])
        found = pd.Series([tuple(cells.columns[row]) for row in ones.to_numpy()], cells.index, dtype=object)
        return found, True, f"{several}, one for each of the {len(cells.columns)} columns."
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
    separator = None if multi_label is False else _separator(names[names != ""], multi_label)
    if separator:
        found = names.map(lambda cell: tuple(sorted({part.strip() for part in cell.split(separator)} - {""})) if cell else None)
        n = names.str.contains(separator, regex=False).sum()
        return found, True, f"{several}: {n:,} of {len(names):,} cells of {column!r} have {separator!r} between names."
    found = names.map(lambda name: (name,) if name else None)
    if multi_label:
        return found, True, f"{several} in {column!r}."
    return found, False, f"Each document has one label: {column!r} has {names[names != ''].map(normalised).nunique():,} of them."


def _separator(cells: pd.Series, multi_label: bool | None) -> str | None:
    """What stands between several labels: its parts are fewer than the cells' different contents, and come again and again."""
    different = cells.unique()
    for separator in SEPARATORS:
        parts = Counter(part.strip() for cell in different for part in cell.split(separator))
        joined = [part.strip() for cell in different if separator in cell for part in cell.split(separator)]
        if joined and (multi_label or sum(parts[part] > 1 for part in joined) > 0.8 * len(joined)):
            return separator
    return None


def _one_spelling(labels: pd.Series, warnings: list[str]) -> pd.Series:
    spellings: dict[str, list[str]] = {}
    for name, _ in Counter(name for names in labels for name in names).most_common():
        spellings.setdefault(normalised(name), []).append(name)
    differing = [names for names in spellings.values() if len(names) > 1]
    if differing:
        first = " and ".join(map(repr, differing[0]))
        warnings.append(f"{_count(differing, 'label')} written in several ways, such as {first}: taken as one.")
    return labels.map(lambda names: tuple(sorted({spellings[normalised(name)][0] for name in names})))


def _without_copies(documents: list[Document], multi_label: bool, warnings: list[str]) -> list[Document]:
    labels: dict[str, list] = {}
    for each in documents:
        labels.setdefault(normalised(each.text), []).append(each.label)
    torn = [text for text, found in labels.items() if len(set(found)) > 1]
    copies = sum(len(found) - 1 for found in labels.values() if len(set(found)) == 1)
    if torn:
        done = "their labels are united" if multi_label else "left out"
        warnings.append(f"{_count(torn, 'text')} with different labels: {done}, such as {excerpt(torn[0])}.")
    if copies:
        warnings.append(f"{copies:,} of {len(documents):,} documents are copies of another one: left out.")
    return remove_duplicates(documents, "unite" if multi_label else "drop")


def _without_near_copies(documents: list[Document], warnings: list[str], batch: int = 500) -> list[Document]:
    """Leave out a text whose TF-IDF lies within `NEAR` of an earlier one's with the same labels (chapter 01)."""
    if len(documents) > NEAR_MOST:
        warnings.append(f"{len(documents):,} documents are too many to look for near copies: none was left out.")
        return documents
    try:
        vectors = TfidfVectorizer(token_pattern=WORD, dtype=np.float32).fit_transform([each.text[:10_000] for each in documents])
    except ValueError:  # no text has a word
        return documents
    labels, _ = pd.factorize(pd.Series([each.label for each in documents]))
    near = set()
    for start in range(0, len(documents), batch):
        like = (vectors[start : start + batch] @ vectors.T >= NEAR).tocoo()
        row, earlier = start + like.row, like.col
        near.update(row[(earlier < row) & (labels[earlier] == labels[row])].tolist())
    if near:
        such = excerpt(documents[min(near)].text)
        warnings.append(f"{_count(near, 'document')} nearly the same as another one: left out, such as {such}.")
    return [each for row, each in enumerate(documents) if row not in near]


def _hard_to_learn(data: Labelled) -> list[str]:
    """Refuse labels that no training can learn; name what it will find hard."""
    counts, warnings = data.labels, []
    if len(counts) < 2:
        only = f"only {next(iter(counts))!r}" if counts else "none"
        raise BookError(f"{data.name}: classification needs two labels or more, but the documents have {only}.")
    numbers = [label for label in counts if _NUMBER.fullmatch(label)]
    if len(numbers) == len(counts) and any("." in label for label in numbers):
        raise BookError(f"{data.name}: the labels are measurements ({numbers[0]}, …), no classes. Put them into named ranges.")
    if numbers:
        warnings.append(f"Labels are numbers, such as {numbers[0]!r}. Instruction tuning reads names: write what they mean.")
    odd = [label for label in counts if label.lower() in ("none", "null", "n/a", "na", "unknown", "-", "?")]
    if odd:
        n = counts[odd[0]]
        warnings.append(f"{odd[0]!r} is taken for a label, of {n:,} documents. Clear the cells if it stands for none.")
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    if many > 20 * few:
        warnings.append(f"Labels are out of balance: {most!r} has {many:,} documents, {least!r} {few:,}.")
    return warnings


def _count(things: Collection, noun: str) -> str:
    return f"{len(things):,} {noun}" if len(things) == 1 else f"{len(things):,} {noun}s"
