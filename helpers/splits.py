"""Which document goes into which split."""

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
        seed: of the split and of the choice of training documents.

    Raises:
        BookError: splits that do not fit the data, or `per_class` where it has no meaning.
    """
    multi_label = gold.ndim == 2
    if groups.any() and not groups.all():
        raise BookError(f"{name}: document {np.argmax(groups == '')} has no group, others have. Give every one a group, or none.")
    if per_class is not None and (n_train is not None or multi_label):
        raise BookError(f"{name}: per_class goes neither with n_train nor with a multi-label task. Use n_train alone.")
    n_wanted = n_train if n_train is not None else len(labels) * (1 if per_class is None else per_class)
    too_small = min(n_validation, n_test) < (2 if multi_label else len(labels)) or n_wanted < 1
    if too_small or n_validation + n_test + n_wanted > len(gold):
        raise BookError(
            f"{name} has {len(gold)} documents of {len(labels)} labels: {n_test} for test, {n_validation} for validation and "
            f"{n_wanted} for training do not fit. Each split needs at least one document a label."
        )
    index = {part: np.flatnonzero(published == part) for part in SPLITS[1:]}
    rest = np.flatnonzero(~np.isin(published, SPLITS[1:]))
    for part, size, share in (("test", n_test, 0.2), ("validation", n_validation, 0.125)):  # an eighth of four fifths
        if not len(index[part]):
            try:
                if groups.all():
                    shuffle = GroupShuffleSplit(1, test_size=share, random_state=seed)
                    kept, chosen = next(shuffle.split(rest, groups=groups[rest]))
                    rest, index[part] = rest[kept], rest[chosen]
                else:
                    stratify = None if multi_label else np.array(labels)[gold[rest]]
                    rest, index[part] = train_test_split(rest, test_size=size, stratify=stratify, random_state=seed)
            except ValueError as error:  # too few documents, of a label or at all, or too few groups
                raise BookError(f"{name}: {part} cannot be split off ({error}). Add documents, or groups of them.") from error
        if len(index[part]) < size:
            raise BookError(f"{name}: {len(index[part])} documents can be used for {part}, fewer than n_{part}={size}. Lower it.")
        if len(index[part]) > size:
            index[part] = np.random.default_rng(seed).choice(index[part], size, replace=False)
    generator = np.random.default_rng(seed)
    if n_train is not None:
        if n_train > len(rest):
            raise BookError(f"{name}: {len(rest)} documents are left for training, fewer than n_train={n_train}. Lower it.")
        rest = generator.choice(rest, n_train, replace=False)
    elif per_class is not None:
        of_labels = [rest[gold[rest] == label] for label in range(len(labels))]
        for label, rows in zip(labels, of_labels, strict=True):
            if len(rows) < per_class:
                wanted = f"fewer than per_class={per_class}. Lower per_class, n_validation or n_test."
                raise BookError(f"{name}: label {label!r} has {len(rows)} training documents left, {wanted}")
        rest = generator.permutation(np.concatenate([generator.choice(rows, per_class, replace=False) for rows in of_labels]))
    return index | {"train": rest}
