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
from sklearn.preprocessing import LabelEncoder, MultiLabelBinarizer
from transformers import PreTrainedTokenizerBase

from helpers.corpora import TASKS, Document, excerpt, normalised, remove_duplicates
from helpers.errors import BookError, check_name, check_texts
from helpers.splits import SPLITS, split_rows


@dataclass(frozen=True)
class Task:
    """Labelled text in three splits. Everything that can be wrong with it is refused when it is made, with a `BookError`.

    Attributes:
        labels: the label names; a document's label is an index into them.
        train, validation, test: with the columns `text` (str) and `label` (int, 0 ≤ label < n_labels; in a multi-label task
            a list of n_labels zeros and ones); `split` adds the column `group`, if the documents have groups.
        multi_label: whether a document can have several labels.
    """

    name: str
    labels: tuple[str, ...]
    train: Dataset = field(repr=False)
    validation: Dataset = field(repr=False)
    test: Dataset = field(repr=False)
    multi_label: bool = False

    def __post_init__(self) -> None:
        self._check_label_names()
        first_seen: dict[str, str] = {}
        for split in SPLITS:
            for row, text in enumerate(texts_of(getattr(self, split), f"{self.name}, {split}")):
                if (other := first_seen.setdefault(normalised(text), split)) != split:
                    raise BookError(f"{self.name}: {split} row {row} repeats a text of {other} ({excerpt(text)}). Remove it.")
            self._check_gold(split)
        seen = self._positives("train").any(axis=0)
        for split in SPLITS[1:]:  # here and elsewhere: a loop that raises names the first of what is wrong
            for row, label in np.argwhere(self._positives(split) & ~seen):
                name = self.labels[label]
                raise BookError(f"{self.name}: {split} row {row} has label {name!r}, which no training document has. Add some.")
        for label in np.flatnonzero(~seen):
            raise BookError(f"{self.name}: no document at all has the label {self.labels[label]!r}. Take it out of `labels`.")

    def _check_label_names(self) -> None:
        if len(self.labels) < 2:
            raise BookError(f"{self.name} has {len(self.labels)} label(s): classification needs at least two.")
        names: dict[str, str] = {}
        for number, label in enumerate(self.labels):
            if not isinstance(label, str) or not label.strip():
                raise BookError(f"{self.name}: label number {number} is empty or no text ({label!r}). Give it a name.")
            if other := names.get(normalised(label)):
                raise BookError(f"{self.name}: labels {other!r} and {label!r} are the same but for case or spaces. Rename one.")
            names[normalised(label)] = label

    def _check_gold(self, split: str) -> None:
        where, n = f"{self.name}, {split}", len(self.labels)
        for row, label in enumerate(column(getattr(self, split), "label", where)):
            if self.multi_label:
                wanted = f"list of {n} zeros and ones, one for each label."
                good = isinstance(label, list) and len(label) == n and set(label) <= {0, 1}
            else:
                wanted = f"index into the {n} labels. Use 0 to {n - 1}."
                good = isinstance(label, int) and 0 <= label < n
            if not good:
                raise BookError(f"{where}, row {row}: label {label!r} is no {wanted}")

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
    """One of the book's tasks (`corpora.TASKS`), such as `bbc`; options are those of `split`. BookError: an unknown name."""
    check_name("task", name, TASKS)
    return split(name, TASKS[name].read(), **{"conflicting": TASKS[name].conflicting, **options})


def split(
    name: str, documents: list[Document], *, shorten: Callable[[str], str] | None = None, conflicting: str = "refuse", **options
) -> Task:
    """Shorten documents, then remove duplicates, so that no two splits share what a model reads, then split.

    Args:
        shorten: what a document is cut to, for every approach alike: `first_words(32)`, `first_tokens(tokenizer, 64)`.
        conflicting: see `corpora.remove_duplicates`.
        options: of `splits.split_rows`, such as `per_class=32`, `n_test=300`, `seed=0`; what it and `Task` refuse is refused.
    """
    if shorten is not None:
        documents = [document._replace(text=shorten(document.text)) for document in documents]
    documents = remove_duplicates(documents, conflicting)
    if not documents:
        raise BookError(f"{name}: there are no documents. Give at least a few of each label.")
    multi_label = isinstance(documents[0].label, tuple)
    encoder = MultiLabelBinarizer() if multi_label else LabelEncoder()
    gold = encoder.fit_transform([document.label for document in documents])
    labels = tuple(encoder.classes_.tolist())
    groups = np.array([document.group for document in documents])
    published = np.array([document.split for document in documents])  # "" where the publisher has not split them
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

    It shortens the document, not the finished prompt: all approaches read the same words, and the suffix is never cut off.
    """

    def shorten(text: str) -> str:  # control tokens in it are text
        words = text.split(maxsplit=n)  # n tokens never reach beyond n words
        head = text[: len(text) - len(words[n])] if len(words) > n else text
        offsets = tokenizer(head, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True).offset_mapping
        if len(offsets) <= n:
            return head.rstrip()
        kept = n
        while kept and offsets[kept][0] < offsets[kept - 1][1]:  # a character of several tokens stays whole or goes
            kept -= 1
        return head[: offsets[kept - 1][1]] if kept else ""

    return shorten


def texts_of(documents: Dataset, where: str = "documents") -> list[str]:
    """The column `text` of a split or any other data set; `where` begins messages. BookError: it is missing, a text is empty."""
    texts = column(documents, "text", where)
    check_texts(texts, where)
    return texts


def column(documents: Dataset, name: str, where: str = "documents") -> list:
    """Any column, refused as by `texts_of`. (Texts without labels go to an approach's `predict_proba`.)"""
    if name not in documents.column_names:
        raise BookError(f"{where}: no column {name!r}, only {', '.join(documents.column_names) or 'none'}. Rename yours.")
    if len(documents) == 0:
        raise BookError(f"{where}: the column {name!r} is empty. Give at least one document of each label.")
    return list(documents[name])
