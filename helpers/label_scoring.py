"""How likely is each label after the prompt? All labels at once, nothing generated (chapter 05).

One forward pass reads the prompt. The labels' tokens form a trie, and only its likely branches are walked, over the prompt's
key-value cache.
"""

import copy
import os.path
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from helpers import prompts as prompting
from helpers.errors import BookError

_ROWS = 128  # (prompt, branch) pairs in one forward pass
NO_LABEL = "none"  # what a list says of a document without labels
_SHORTEST_PREFIX = 8  # tokens; less is not worth a cache
_END = 40  # characters of the prompt's end that are tokenized with each label


def label_tokens(
    labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, space: str = " ", prompt: str = "x"
) -> list[list[int]]:
    """Token ids of each label as training sees them: those of `prompt`, `space` and label, less those of the prompt.

    When one label's tokens begin another's (`tech`, `tech support`), the shorter would win whatever the model thinks of
    its end, so the end-of-sequence token is appended to every label.

    Args:
        prompt: what stands before the label; its end decides, since a tokenizer may join characters across the border.

    Raises:
        BookError: an empty label, two labels with the same tokens, or one that shares a token with the prompt.
    """
    for number, label in enumerate(labels):
        if not label.strip():
            raise BookError(f"Label number {number} is empty ({label!r}), so there is nothing to score. Give it a name.")
    end = prompt[-_END:]
    before = tokenizer(end).input_ids
    ids = []
    for label in labels:
        whole = tokenizer(end + space + label).input_ids
        if whole[: len(before)] != before:
            raise BookError(f"The tokenizer joins the end of the prompt ({end!r}) with the label {label!r}. End it otherwise.")
        ids.append(whole[len(before) :])
    first_with: dict[tuple[int, ...], int] = {}
    for number, label in enumerate(ids):
        other = first_with.setdefault(tuple(label), number)
        if other != number:
            raise BookError(f"The tokenizer cannot tell the labels {labels[other]!r} and {labels[number]!r} apart. Rename one.")
    if any(tuple(label[:n]) in first_with for label in ids for n in range(1, len(label))):
        ids = [label + [tokenizer.eos_token_id] for label in ids]
    return ids


@dataclass
class _Branch:
    """Trie nodes with one child each, that are read together.

    A run of several such nodes makes two branches, its first token and the rest, because one token is enough to rule out most.
    """

    tokens: list[int]  # from the prompt on
    start: int  # tokens[:start] are those of the branches above
    labels: list[int]  # that begin with `tokens`
    children: list[int] = field(default_factory=list)


def _trie(ids: list[list[int]]) -> tuple[list[_Branch], list[int]]:
    """All branches, and the numbers of those that start at the prompt."""
    branches: list[_Branch] = []

    def grow(labels: list[int], start: int, rest: bool = False) -> list[int]:
        grown = []
        for first in dict.fromkeys(ids[label][start] for label in labels):
            below = [label for label in labels if ids[label][start] == first]
            run = os.path.commonprefix([ids[label] for label in below])
            cut = len(run) > start + 2 and not rest
            branch = _Branch(run[: start + 1] if cut else run, start, below)
            grown.append(len(branches))
            branches.append(branch)
            if cut or len(below) > 1:
                branch.children = grow(below, len(branch.tokens), rest=cut)
        return grown

    return branches, grow(list(range(len(ids))), 0)


@torch.inference_mode()
def score_labels(
    prompts: list[str],
    labels: tuple[str, ...],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    tolerance: float = 1e-4,
    space: str = " ",
) -> torch.Tensor:
    """Log-probability of every label as the continuation of every prompt. Every answer is a label, none has to be parsed.

    One forward pass over the prompt gives the first token of all labels. Tokens with which all prompts begin (an instruction)
    are read once, not once a prompt. The rest of the labels is walked as a trie over the prompt's key-value cache, likely
    branches first, until those not walked hold at most `tolerance` of the probability of all labels.

    Args:
        prompts: without the label and without the space before it.
        labels: of any number of tokens; see `label_tokens`.
        tolerance: 0 walks everything.
        space: between prompt and label; "" behind a chat template, which ends with a line break.

    Returns:
        float32 tensor of shape (n_prompts, n_labels). Its softmax differs nowhere by more than `tolerance` from that of one
        forward pass for each label; labels on a branch that was not walked share the branch's probability. The rows are not
        normalised: what is missing to 1 is the probability of saying something that is no label.

    Raises:
        BookError: labels that cannot be told apart, or a prompt longer than the model takes.
    """
    if not labels:
        raise BookError("There are no labels to score. Give at least one.")
    if not prompts:
        return torch.empty(0, len(labels))
    branches, roots = _trie(label_tokens(labels, tokenizer, space, prompts[0]))
    first_tokens = [branches[root].tokens[0] for root in roots]
    read_on = any(len(branch.tokens) > 1 for branch in branches)
    encoded = tokenizer(prompts).input_ids
    shared = os.path.commonprefix([text[:-1] for text in encoded]) if len(prompts) > 1 else []
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if len(shared) < _SHORTEST_PREFIX or (window and max(map(len, encoded)) >= window):
        shared = []  # padding between it and the text would use up places in a sliding window
    if shared:
        prefix = model(torch.tensor([shared], device=model.device), use_cache=True, logits_to_keep=1).past_key_values
    scores = torch.empty(len(prompts), len(labels))
    for rows, batch in prompting.batches(prompts, tokenizer, batch_size, side="left", skip=len(shared)):
        batch = batch.to(model.device)
        mask = torch.nn.functional.pad(batch.attention_mask, (len(shared), 0), value=1)
        cache = _select(prefix, [0] * len(rows)) if shared else DynamicCache(config=model.config) if read_on else None
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=_positions(mask)[:, len(shared) :],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        ).logits[:, -1]
        start = logits.float().log_softmax(-1)[:, first_tokens].cpu().numpy()
        scores[rows] = torch.from_numpy(_walk(branches, roots, start, len(labels), model, cache, mask, tolerance)).float()
    return scores


def list_items(labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Labels as a list has them: each with a comma behind it, then each with the end of sequence, then `NO_LABEL` with it.

    Raises:
        BookError: a label with a comma in it, or one that is called like `NO_LABEL`.
    """
    for label in labels:
        if "," in label or label.strip() == NO_LABEL:
            raise BookError(f"The label {label!r} cannot stand in a list of labels (no commas, not {NO_LABEL!r}). Rename it.")
    return (*(f"{label}," for label in labels), *(label + tokenizer.eos_token for label in (*labels, NO_LABEL)))


def score_label_lists(
    prompts: list[str],
    labels: tuple[str, ...],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    tolerance: float = 1e-4,
    space: str = " ",
    most: int = 4,
) -> torch.Tensor:
    """Probability that each label stands in the list of labels that continues the prompt. Nothing is sampled.

    A model that writes a list puts nearly all of its probability on one label a step, whatever it thinks of the others. So the
    labels are scored at every step of the likeliest list, and a label's probabilities are added up: first in the list, second
    behind the likeliest first, and so on. Lists that begin otherwise are left out, so it is a lower bound.

    Args:
        prompts, batch_size, tolerance, space: as for `score_labels`.
        most: steps; a prompt takes another one only if its list goes on with a probability of more than 1 %.

    Returns:
        float32 tensor of shape (n_prompts, n_labels), each in 0..1.

    Raises:
        BookError: what `list_items` and `score_labels` refuse.
    """
    items, n = list_items(labels, tokenizer), len(labels)
    found = torch.zeros(len(prompts), n)
    reached = torch.ones(len(prompts))  # probability of the list written so far
    texts, rows = list(prompts), list(range(len(prompts)))
    written = torch.zeros(len(prompts), n, dtype=torch.bool)
    for _ in range(min(most, n)):
        scores = score_labels([texts[row] for row in rows], items, model, tokenizer, batch_size, tolerance, space)
        repeated = torch.cat([written[rows], written[rows], torch.zeros(len(rows), 1, dtype=torch.bool)], dim=1)
        scores = scores.masked_fill(repeated, -torch.inf).softmax(-1) * reached[rows, None]
        goes_on, ends = scores[:, :n], scores[:, n : 2 * n]
        found[rows] += goes_on + ends
        best = goes_on.argmax(1)
        for row, label, probability in zip(rows, best.tolist(), goes_on.amax(1), strict=True):
            texts[row] += f"{space}{labels[label]},"
            written[row, label], reached[row] = True, probability
        space = " "  # behind the comma
        rows = [row for row in rows if reached[row] > 0.01]
        if not rows:
            break
    return found.clamp(max=1)


def _walk(branches, roots, start, n_labels, model, cache, mask, tolerance) -> np.ndarray:
    """From the log-probabilities of the first tokens, (n_prompts, n_roots), to those of the labels, (n_prompts, n_labels)."""
    reached = np.full((len(start), len(branches)), -np.inf)  # up to a branch's first token; up to the end where it is settled
    is_open = np.zeros(reached.shape, dtype=bool)
    is_settled = np.zeros(reached.shape, dtype=bool)

    def reach(row: int, numbers: list[int], log_probabilities: np.ndarray) -> None:
        reached[row, numbers] = log_probabilities
        ends = np.array([not branches[b].children and len(branches[b].tokens) == branches[b].start + 1 for b in numbers])
        is_settled[row, numbers], is_open[row, numbers] = ends, ~ends

    for row in range(len(start)):
        reach(row, roots, start[row])
    while pairs := [
        (row, b) for row in range(len(start)) for b in _needed(reached[row], is_open[row], is_settled[row], tolerance)
    ]:
        pairs.sort(key=lambda pair: len(branches[pair[1]].tokens))  # like lengths together: little padding
        for first in range(0, len(pairs), _ROWS):
            some = pairs[first : first + _ROWS]
            for (row, b), (later, forks) in zip(some, _follow(some, branches, model, cache, mask), strict=True):
                reached[row, b] += later
                is_open[row, b], is_settled[row, b] = False, not branches[b].children
                if branches[b].children:
                    reach(row, branches[b].children, reached[row, b] + forks)
    scores = np.empty((len(start), n_labels))
    for row, b in np.argwhere(is_open | is_settled):
        scores[row, branches[b].labels] = reached[row, b] - np.log(len(branches[b].labels))
    return scores


def _needed(reached: np.ndarray, is_open: np.ndarray, is_settled: np.ndarray, tolerance: float) -> np.ndarray:
    """The fewest open branches of one prompt, the most likely ones, without which the others hold more than `tolerance`."""
    numbers = np.flatnonzero(is_open)
    numbers = numbers[reached[numbers].argsort()]
    highest = reached[is_open | is_settled].max()
    settled = np.exp(reached[is_settled] - highest).sum()
    left = np.exp(reached[numbers] - highest).cumsum()
    if not len(numbers) or left[-1] <= tolerance * settled:
        return numbers[:0]
    return numbers[left > tolerance * (settled + left[-1])]


def _follow(pairs, branches, model, cache, mask) -> Iterator[tuple[float, np.ndarray]]:
    """Read branches behind their prompts: log-probabilities of what follows a branch's first token, and of its children."""
    rows = [row for row, _ in pairs]
    read = [torch.tensor(branches[b].tokens if branches[b].children else branches[b].tokens[:-1]) for _, b in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(read, batch_first=True).to(model.device)
    lengths = torch.tensor([len(tokens) for tokens in read], device=model.device)
    mask = torch.cat([mask[rows], (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()], dim=1)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=_positions(mask)[:, -ids.shape[1] :],
        past_key_values=_select(cache, rows),
        use_cache=True,
    ).logits.float()
    logits -= logits.logsumexp(-1, keepdim=True)
    for row, (_, b) in enumerate(pairs):
        branch = branches[b]
        later = branch.tokens[branch.start + 1 :]
        places = torch.arange(branch.start, branch.start + len(later))
        forks = [branches[child].tokens[branches[child].start] for child in branch.children]
        yield float(logits[row, places, later].sum()), logits[row, lengths[row] - 1, forks].cpu().numpy()


def _select(cache: DynamicCache, rows: list[int]) -> DynamicCache:
    """A cache of these rows; the one it is taken from stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
    return chosen


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions that do not count padding on the left, also for models with absolute positions (GPT-2)."""
    return (mask.cumsum(1) - 1).clamp(min=0)
