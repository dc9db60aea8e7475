"""Tasks: labelled text, split once, checked once, given to every approach in the same form.

>>> task = load("bbc", per_class=32, n_test=300, shorten=first_tokens(tokenizer, 64))
>>> task.train[0]
{'text': 'Ad sales boost Time Warner profit …', 'label': 0}
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from helpers.corpora import TASKS, Document, excerpt, normalised, remove_duplicates
from helpers.errors import BookError, unknown_name
from helpers.splits import SPLITS, split_rows


@dataclass(frozen=True)
class Task:
    """Labelled text in three splits. Everything that can be wrong with it is refused when it is made.

    Attributes:
        name: of the task, for tables and messages.
        labels: the label names; a document's label is an index into them.
        train, validation, test: `datasets.Dataset` with the columns `text` (str) and `label` (int, 0 ≤ label < n_labels; in
            a multi-label task a list of n_labels zeros and ones); `split` adds the column `group`, if the documents have groups.
        multi_label: whether a document can have several labels.

    Raises:
        BookError: a missing column, an empty split, a text that is empty or no string, a label outside `labels`, equal or
            empty label names, a label that training never saw, or the same text in two splits (but for case and white space).
    """

    name: str
    labels: tuple[str, ...]
    train: Dataset = field(repr=False)
    validation: Dataset = field(repr=False)
    test: Dataset = field(repr=False)
    multi_label: bool = False

    def __post_init__(self) -> None:
        _check_label_names(self.name, self.labels)
        first_seen: dict[str, str] = {}
        for split in SPLITS:
            documents = getattr(self, split)
            _check_split(f"{self.name}, {split}", documents, self.labels, self.multi_label)
            for row, text in enumerate(documents["text"]):
                other = first_seen.setdefault(normalised(text), split)
                if other != split:
                    raise BookError(
                        f"{self.name}: {split} row {row} has the same text as a row of {other} ({excerpt(text)}). "
                        "Remove duplicates before you split."
                    )
        seen = self._positives("train").any(axis=0)
        for split in SPLITS[1:]:
            unseen = self._positives(split) & ~seen
            if unseen.any():
                row, label = np.argwhere(unseen)[0]
                raise BookError(
                    f"{self.name}: {split} row {row} has label {self.labels[label]!r}, which no training document has. "
                    "Add training documents of that label, or drop it from every split."
                )
        for label in np.flatnonzero(~seen):
            raise BookError(f"{self.name}: no document at all has the label {self.labels[label]!r}. Take it out of `labels`.")

    def _positives(self, split: str) -> np.ndarray:
        """Which document of `split` has which label, shape (n_documents, n_labels), bool."""
        gold = np.array(getattr(self, split)["label"])
        return gold.astype(bool) if self.multi_label else np.arange(len(self.labels)) == gold[:, None]

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents of each label in each split, as `{split: {label: n}}`."""
        return {split: dict(zip(self.labels, self._positives(split).sum(axis=0).tolist(), strict=True)) for split in SPLITS}

    def content_hash(self) -> str:
        """sha256 over labels, texts and splits: equal hashes mean the same documents in the same order."""
        rows = [[split, document["label"], document["text"]] for split in SPLITS for document in getattr(self, split)]
        return hashlib.sha256(json.dumps([self.labels, rows], ensure_ascii=False).encode()).hexdigest()


def load(name: str, **options) -> Task:
    """Read one of the book's tasks (`corpora.TASKS`) and `split` it.

    Args:
        name: `bbc`, `attack-techniques`, `ipc-sections` and so on.
        options: of `split`, such as `per_class=32`, `n_test=300`, `shorten=first_words(32)`, `seed=0`.

    Raises:
        BookError: an unknown task (the nearest is suggested), or anything that `split` or `Task` refuses.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    source = TASKS[name]
    return split(name, source.read(), **{"conflicting": source.conflicting, **options})


def split(
    name: str, documents: list[Document], *, shorten: Callable[[str], str] | None = None, conflicting: str = "refuse", **options
) -> Task:
    """Remove duplicates and split: as the publisher did if he did, else by group if there are groups, else at random.

    Texts are shortened before duplicates are looked for, so that no two splits share what the model reads.

    Args:
        name: for tables and messages.
        documents: from `corpora`, or your own.
        shorten: what a document is cut to, for every approach alike: `first_words(32)`, `first_tokens(tokenizer, 64)`.
        conflicting: see `corpora.remove_duplicates`.
        options: of `splits.split_rows`, such as `per_class=32`, `n_test=300`, `seed=0`.

    Raises:
        BookError: no documents, or anything that `split_rows` or `Task` refuses.
    """
    if shorten is not None:
        documents = [document._replace(text=shorten(document.text)) for document in documents]
    documents = remove_duplicates(documents, conflicting)
    if not documents:
        raise BookError(f"{name}: there are no documents. Give at least a few of each label.")
    multi_label = isinstance(documents[0].label, tuple)
    if multi_label:
        labels = tuple(sorted({label for document in documents for label in document.label}))
        gold = np.array([[int(label in document.label) for label in labels] for document in documents])
    else:
        labels = tuple(sorted({document.label for document in documents}))
        numbers = {label: number for number, label in enumerate(labels)}
        gold = np.array([numbers[document.label] for document in documents])
    groups = np.array([document.group for document in documents])
    published = np.array([document.split for document in documents])
    splits = {}
    for part, rows in split_rows(name, gold, labels, groups, published, **options).items():
        columns = {"text": [documents[row].text for row in rows], "label": gold[rows].tolist()}
        if groups.all():
            columns["group"] = groups[rows].tolist()
        splits[part] = Dataset.from_dict(columns)
    return Task(name, labels, **splits, multi_label=multi_label)


def first_words(n: int) -> Callable[[str], str]:
    """A `shorten` that keeps the first `n` words."""
    return lambda text: " ".join(text.split()[:n])


def first_tokens(tokenizer: PreTrainedTokenizerBase, n: int) -> Callable[[str], str]:
    """A `shorten` that keeps the first `n` tokens of `tokenizer`.

    Shortening the text itself, and not the model's input, gives every approach the same words to read, and keeps the
    suffix or the label that is appended later from being cut off.
    """

    def shorten(text: str) -> str:
        words = text.split(maxsplit=n)  # n tokens never reach beyond n words
        head = text[: len(text) - len(words[n])] if len(words) > n else text
        options = dict(add_special_tokens=False, split_special_tokens=True)  # control tokens are text
        encoded = tokenizer(head, return_offsets_mapping=True, **options)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= n:
            return head.rstrip()
        kept = n
        while kept and offsets[kept][0] < offsets[kept - 1][1]:  # a character of several tokens stays whole or goes
            kept -= 1
        return head[: offsets[kept - 1][1]] if kept else ""

    return shorten


def texts_of(documents: Dataset) -> list[str]:
    """The texts of a split or of any other data set with the column `text`.

    Raises:
        BookError: there is no such column, or a text is empty or no string.
    """
    if "text" not in documents.column_names:
        raise BookError(f"There is no column 'text', only {', '.join(documents.column_names) or 'none'}. Rename yours.")
    for row, text in enumerate(documents["text"]):
        if not isinstance(text, str) or not text.strip():
            raise BookError(f"Row {row}: the text is {text!r}. Drop the row or give it a text.")
    return list(documents["text"])


def gold_of(documents: Dataset) -> list:
    """The column `label` of a split or of any other data set.

    Raises:
        BookError: there is no such column.
    """
    if "label" not in documents.column_names:
        raise BookError(
            f"There is no column 'label', only {', '.join(documents.column_names) or 'none'}. Rename yours, or add one of zeros "
            "if you only want the probabilities of unlabelled texts."
        )
    return documents["label"]


def _check_label_names(name: str, labels: tuple[str, ...]) -> None:
    if len(labels) < 2:
        raise BookError(f"{name} has {len(labels)} label(s): classification needs at least two.")
    names: dict[str, str] = {}
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise BookError(f"{name}: label number {labels.index(label)} is empty or no text ({label!r}). Give it a name.")
        key = normalised(label)
        if key in names:
            raise BookError(f"{name}: labels {names[key]!r} and {label!r} are the same but for case or spaces. Rename one.")
        names[key] = label


def _check_split(where: str, documents: Dataset, labels: tuple[str, ...], multi_label: bool) -> None:
    for column in ("text", "label"):
        if column not in documents.column_names:
            raise BookError(
                f"{where}: there is no column {column!r}, only {', '.join(documents.column_names) or 'none'}. Rename yours."
            )
    if len(documents) == 0:
        raise BookError(f"{where}: the split is empty. Give it at least one document of each label.")
    for row, (text, label) in enumerate(zip(documents["text"], documents["label"], strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise BookError(f"{where}, row {row}: the text is {text!r}. Drop the row or give it a text.")
        if multi_label:
            if not isinstance(label, list) or len(label) != len(labels) or not set(label) <= {0, 1}:
                raise BookError(
                    f"{where}, row {row}: label {label!r} is no list of {len(labels)} zeros and ones, one for each label."
                )
        elif not isinstance(label, int) or not 0 <= label < len(labels):
            raise BookError(
                f"{where}, row {row}: label {label!r} is no index into the {len(labels)} labels. Use 0 to {len(labels) - 1}."
            )
