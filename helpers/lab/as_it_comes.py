"""Tasks made worse on purpose (chapter 13): wrong labels, rare labels, and other parts of long documents."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from helpers.corpora import Document
from helpers.errors import BookError, unknown_name
from helpers.tasks import Task, first_tokens

PARTS = ("first", "last", "both", "whole")


def wrong_labels(task: Task, share: float, seed: int) -> Task:
    """`task` with so large a `share` (0 ≤ share < 1) of training and validation labels replaced by another label at random.

    A document that has a wrong label at one share has the same one at every greater share; test documents keep theirs.

    Raises:
        BookError: a share out of range, several labels a document, or a label with no rightly labelled training document left.
    """
    if task.multi_label or not 0 <= share < 1:
        raise BookError(f"{task.name}: wrong_labels={share!r} needs 0 ≤ share < 1 and one label a document.")
    changed, generator = {}, np.random.default_rng([seed, 13])
    for split in ("train", "validation"):
        documents = getattr(task, split)
        gold = np.array(documents["label"])
        others = (gold + generator.integers(1, len(task.labels), len(gold))) % len(task.labels)
        wrong = generator.permutation(len(gold))[: round(share * len(gold))]
        given = gold.copy()
        given[wrong] = others[wrong]
        for label in set(range(len(task.labels))) - set(gold[given == gold]):
            name = task.labels[label]
            raise BookError(f"{task.name}: no {split} document of {name!r} keeps its label. Lower wrong_labels or add documents.")
        changed[split] = documents.remove_columns("label").add_column("label", given.tolist())
    return replace(task, **changed)


def rare_labels(task: Task, kept: list[int], seed: int) -> Task:
    """`task` with `kept` training documents of its labels, the first so many of each, and validation cut in proportion.

    Which label gets which number moves on by one with each `seed`. Test documents stay. BookError: a number does not fit.
    """
    if task.multi_label or len(kept) != len(task.labels) or min(kept) < 1:
        raise BookError(f"{task.name}: kept={kept} needs a number of at least 1 for each of its {len(task.labels)} labels.")
    numbers = np.roll(kept, seed)
    changed = {}
    for split in ("train", "validation"):
        documents = getattr(task, split)
        gold = np.array(documents["label"])
        most = max(kept) if split == "train" else np.bincount(gold, minlength=len(kept)).min()
        rows = []
        for label, number in enumerate(numbers):
            wanted = max(1, round(most * number / max(kept)))
            of_label = np.flatnonzero(gold == label)
            if len(of_label) < wanted:
                has = f"{len(of_label)} documents of {task.labels[label]!r}, fewer than {wanted}"
                raise BookError(f"{task.name}: {split} has {has}. Lower kept.")
            rows += of_label[:wanted].tolist()
        changed[split] = documents.select(sorted(rows))
    return replace(task, **changed)


def part_of(tokenizer: PreTrainedTokenizerBase, n: int | None, part: str) -> Callable[[str], str]:
    """A `shorten` that keeps `n` tokens of a document: the `first`, the `last`, half from `both` ends, or the `whole`."""
    if part not in PARTS:
        raise unknown_name("part of a document", part, PARTS)
    if part == "first":
        return first_tokens(tokenizer, n)

    options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True, "verbose": False}

    def shorten(text: str) -> str:
        offsets = tokenizer(text, **options).offset_mapping
        if part == "whole" or len(offsets) <= n:
            return text
        if part == "last":
            return text[offsets[-n][0] :].strip()
        return f"{text[: offsets[n // 2 - 1][1]].strip()} … {text[offsets[-(n // 2)][0] :].strip()}"

    return shorten


def distinct(documents: list[Document], tokenizer: PreTrainedTokenizerBase, n: int = 32) -> list[Document]:
    """Without documents whose first or last `n` tokens an earlier one has too: every `part_of` leaves the same ones."""
    cuts = {part: part_of(tokenizer, n, part) for part in ("first", "last")}
    seen, kept = set(), []
    for document in documents:
        ends = {(part, cut(document.text)) for part, cut in cuts.items()}
        if not ends & seen:
            kept.append(document)
        seen |= ends
    return kept
