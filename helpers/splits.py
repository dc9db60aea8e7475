"""Which document goes into which split."""

from collections import Counter

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from helpers.errors import BookError

SPLITS = ("train", "validation", "test")


def split_rows(
    name: str,
    gold: np.ndarray,
    labels: tuple[str, ...],
    groups: np.ndarray,
    published: np.ndarray,
    *,
    per_class: int | None = None,
    n_train: int | None = None,
    n_validation: int = 200,
    n_test: int = 500,
    by_group: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Row numbers of each split: as the publisher split if he did, else by group if there are groups, else at random.

    A fifth of the groups is set aside for test and a tenth for validation; `n_test` and `n_validation` documents are drawn
    from them. A random split of single-label documents keeps the classes in proportion.

    Args:
        name: of the task, for messages.
        gold: shape (n_documents,), indices into `labels`; multi-label (n_documents, n_labels), zeros and ones.
        groups, published: shape (n_documents,), str: a document's group and its split of the publisher, empty where none.
        per_class: training documents of each class (single-label); None keeps all that validation and test leave.
        n_train: training documents in all, drawn at random; not together with `per_class`.
        n_validation, n_test: documents in these splits.
        by_group: False splits at random although there are groups, to see what that hides (chapter 01).
        seed: of the split and of the choice of training documents.

    Raises:
        BookError: splits larger than the data, or both `per_class` and `n_train`.
    """
    multi_label = gold.ndim == 2
    if per_class is not None and (n_train is not None or multi_label):
        raise BookError(f"{name}: per_class goes neither with n_train nor with a multi-label task. Use n_train alone.")
    for option, number in {"per_class": per_class, "n_train": n_train, "n_validation": n_validation, "n_test": n_test}.items():
        if number is not None and number < 1:
            raise BookError(f"{name}: {option} is {number}, but every split needs at least one document.")
    needed = n_validation + n_test + (n_train or (per_class or 1) * len(labels))
    if min(n_validation, n_test) < (2 if multi_label else len(labels)) or needed > len(gold):
        raise BookError(
            f"{name} has {len(gold)} documents of {len(labels)} labels: {n_test} for test, {n_validation} for validation and "
            f"{n_train or (f'{per_class} per class' if per_class else 'the rest')} for training do not fit. "
            "Each split needs at least one document a label."
        )
    index = {part: np.flatnonzero(published == part) for part in SPLITS[1:]}
    rest = np.flatnonzero(~np.isin(published, SPLITS[1:]))
    for part, size, share in (("test", n_test, 0.2), ("validation", n_validation, 0.125)):  # an eighth of four fifths
        if not len(index[part]) and by_group and groups.all():
            if len(set(groups[rest])) < 2:
                raise BookError(f"{name}: there are too few groups to split by. Use by_group=False, if it does not mix them.")
            kept, chosen = next(GroupShuffleSplit(1, test_size=share, random_state=seed).split(rest, groups=groups[rest]))
            index[part], rest = rest[chosen], rest[kept]
        elif not len(index[part]):
            if size >= len(rest):
                raise BookError(f"{name}: {len(rest)} documents can be used for {part}, too few for n_{part}={size}. Lower it.")
            if not multi_label:
                label, count = min(Counter(gold[rest].tolist()).items(), key=lambda item: item[1])
                if count < 2:
                    raise BookError(
                        f"{name}: label {labels[label]!r} has too few documents to be in every split. Add some, or drop it."
                    )
            stratify = None if multi_label else gold[rest]
            rest, index[part] = train_test_split(rest, test_size=size, stratify=stratify, random_state=seed)
        if len(index[part]) < size:
            raise BookError(f"{name}: {len(index[part])} documents can be used for {part}, fewer than n_{part}={size}. Lower it.")
        if len(index[part]) > size:
            index[part] = np.random.default_rng(seed).choice(index[part], size, replace=False)
    if per_class is not None:
        rest = _choose(rest, gold, per_class, labels, name, seed)
    elif n_train is not None:
        if n_train > len(rest):
            raise BookError(f"{name}: {len(rest)} documents are left for training, fewer than n_train={n_train}. Lower it.")
        rest = np.random.default_rng(seed).choice(rest, n_train, replace=False)
    return index | {"train": rest}


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
