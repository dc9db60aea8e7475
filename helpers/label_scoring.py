"""How likely is each label after the prompt? All labels at once, nothing generated (chapter 05).

One forward pass reads the prompt. The labels' tokens form a trie; its likely branches are walked over the key-value cache.
"""

import copy
import os.path
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from helpers import prompts as prompting
from helpers.errors import BookError

_ROWS = 128  # (prompt, branch) pairs in one forward pass
NO_LABEL = "none"  # what a list says of a document without labels
SHORTEST_PREFIX = 8  # tokens; less is not worth a cache


def label_tokens(
    labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, space: str = " ", prompt: str = "x"
) -> list[list[int]]:
    """Token ids of each label as training sees them: those of `prompt`, `space` and label, less those of the prompt.

    When one label's tokens begin another's (`tech`, `tech support`), the shorter would win whatever the model thinks of
    its end, so the end-of-sequence token is appended to every label. BookError: labels that cannot be told apart so.
    """
    end = prompt[-40:]  # more than a tokenizer joins across the border
    before = tokenizer(end).input_ids
    ids = []
    for number, label in enumerate(labels):
        if not label.strip():
            raise BookError(f"Label number {number} is empty ({label!r}), so there is nothing to score. Give it a name.")
        whole = tokenizer(end + space + label).input_ids
        tokens = whole[len(before) :]
        if whole[: len(before)] != before:
            raise BookError(f"The tokenizer joins the end of the prompt ({end!r}) with the label {label!r}. End it otherwise.")
        if tokens in ids:
            other = labels[ids.index(tokens)]
            raise BookError(f"The tokenizer cannot tell the labels {other!r} and {label!r} apart. Rename one.")
        ids.append(tokens)
    whole_labels = set(map(tuple, ids))
    if any(tuple(tokens[:n]) in whole_labels for tokens in ids for n in range(1, len(tokens))):
        ids = [tokens + [tokenizer.eos_token_id] for tokens in ids]
    return ids


@dataclass
class _Branch:
    """Trie nodes with one child each, read together; but of a long run the first alone, which is enough to rule out most."""

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
    """Log-probability of every label as the continuation of every prompt, float32, shape (n_prompts, n_labels).

    Tokens with which all prompts begin (an instruction) are read once, not once a prompt. Labels are walked as a trie, likely
    branches first, until those not walked hold at most `tolerance` of the probability of all labels, and share it: the softmax
    is that of one forward pass for each label to within `tolerance`. What a row's probabilities lack to 1 is for no label.

    Args:
        prompts: without the label and without the space before it.
        space: between prompt and label; "" behind a chat template, which ends with a line break.
    """
    if not prompts:
        return torch.empty(0, len(labels))
    branches, roots = _trie(label_tokens(labels, tokenizer, space, prompts[0]))
    first_tokens = [branches[root].tokens[0] for root in roots]
    to_walk = any(len(branch.tokens) > 1 for branch in branches)
    encoded = tokenizer(prompts).input_ids
    shared = os.path.commonprefix([text[:-1] for text in encoded]) if len(prompts) > 1 else []
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if len(shared) < SHORTEST_PREFIX or (window and max(map(len, encoded)) >= window):
        shared = []  # padding between it and the text would use up places in a sliding window
    if shared:
        prefix = model(torch.tensor([shared], device=model.device), use_cache=True, logits_to_keep=1).past_key_values
    scores = torch.empty(len(prompts), len(labels))
    for rows, batch in prompting.batches(prompts, tokenizer, batch_size, side="left", skip=len(shared)):
        mask = torch.nn.functional.pad(batch.attention_mask, (len(shared), 0), value=1).to(model.device)
        cache = _select(prefix, [0] * len(rows)) if shared else DynamicCache(config=model.config) if to_walk else None
        start = _read(model, batch.input_ids, mask, cache, logits_to_keep=torch.tensor([-1]))[:, -1, first_tokens].cpu().numpy()
        scores[rows] = torch.from_numpy(_walk(branches, roots, start, len(labels), model, cache, mask, tolerance)).float()
    return scores


def list_items(labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Labels as a list has them: each with a comma behind it, then each with the end of sequence, then `NO_LABEL` with it.

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
    """Probability that each label stands in the list that continues the prompt, float32 in 0..1, (n_prompts, n_labels).

    A model that writes a list puts nearly all of its probability on one label a step, whatever it thinks of the others. So the
    labels are scored at every step of the likeliest list, and a label's probabilities are added up: a lower bound, since lists
    that begin otherwise are left out. Of at most `most` steps, one follows where the list goes on with a probability above 1 %.
    """
    items, n = list_items(labels, tokenizer), len(labels)
    found = torch.zeros(len(prompts), n)
    reached = torch.ones(len(prompts))  # probability of the list written so far
    texts, rows = list(prompts), list(range(len(prompts)))
    written = torch.zeros(len(prompts), len(items), dtype=torch.bool)
    for _ in range(min(most, n)):
        scores = score_labels([texts[row] for row in rows], items, model, tokenizer, batch_size, tolerance, space)
        scores = scores.masked_fill(written[rows], -torch.inf).softmax(-1) * reached[rows, None]
        goes_on, ends = scores[:, :n], scores[:, n : 2 * n]
        found[rows] += goes_on + ends
        for row, label, probability in zip(rows, goes_on.argmax(1).tolist(), goes_on.amax(1), strict=True):
            texts[row] += f"{space}{labels[label]},"
            written[row, [label, n + label]], reached[row] = True, probability
        space = " "  # behind the comma
        rows = [row for row in rows if reached[row] > 0.01]
    return found.clamp(max=1)


def _walk(branches, roots, start, n_labels, model, cache, mask, tolerance) -> np.ndarray:
    """From the log-probabilities of the first tokens, (n_prompts, n_roots), to those of the labels, (n_prompts, n_labels)."""
    reached = np.full((len(start), len(branches)), -np.inf)  # up to a branch's first token, or to its end once that is read
    is_open = np.zeros(reached.shape, dtype=bool)
    has_more = np.array([bool(branch.children) or len(branch.tokens) > branch.start + 1 for branch in branches])
    reached[:, roots], is_open[:, roots] = start, has_more[roots]
    while pairs := [(row, b) for row in range(len(start)) for b in _needed(reached[row], is_open[row], tolerance)]:
        pairs.sort(key=lambda pair: len(branches[pair[1]].tokens))  # like lengths together: little padding
        for first in range(0, len(pairs), _ROWS):
            some = pairs[first : first + _ROWS]
            for (row, b), (later, forks) in zip(some, _follow(some, branches, model, cache, mask), strict=True):
                below = branches[b].children
                is_open[row, b], is_open[row, below] = False, has_more[below]
                reached[row, below] = reached[row, b] + later + forks
                reached[row, b] = -np.inf if below else reached[row, b] + later
    scores = np.full((len(start), n_labels), -np.inf)
    for row, b in np.argwhere(reached > -np.inf):
        scores[row, branches[b].labels] = reached[row, b] - np.log(len(branches[b].labels))
    return scores


def _needed(reached: np.ndarray, is_open: np.ndarray, tolerance: float) -> np.ndarray:
    """The fewest open branches of one prompt, the most likely ones, without which the others hold at most `tolerance`."""
    numbers = np.flatnonzero(is_open)
    numbers = numbers[reached[numbers].argsort()]
    shares = np.exp(reached - reached.max())
    return numbers[shares[numbers].cumsum() > tolerance * shares.sum()]


def _follow(pairs, branches, model, cache, mask) -> Iterator[tuple[float, np.ndarray]]:
    """Read branches behind their prompts: log-probabilities of what follows a branch's first token, and of its children."""
    rows = [row for row, _ in pairs]
    read = [torch.tensor(branches[b].tokens if branches[b].children else branches[b].tokens[:-1]) for _, b in pairs]
    ids, is_read = (pad_sequence(each, batch_first=True) for each in (read, [torch.ones_like(tokens) for tokens in read]))
    mask = torch.cat([mask[rows], is_read.to(mask.device)], dim=1)
    found = _read(model, ids, mask, _select(cache, rows))
    asked, ends = [], []  # (row, position, token) of all that is read off, so that a GPU is waited for once
    for row, (_, b) in enumerate(pairs):
        start, tokens = branches[b].start, branches[b].tokens
        asked += [(row, place, tokens[place + 1]) for place in range(start, len(tokens) - 1)]
        asked += [(row, len(tokens) - 1, branches[child].tokens[len(tokens)]) for child in branches[b].children]
        ends.append(len(asked))
    values = np.split(found[tuple(torch.tensor(asked).T)].cpu().numpy(), ends[:-1])
    for (_, b), of_pair in zip(pairs, values, strict=True):
        n_later = len(of_pair) - len(branches[b].children)
        yield of_pair[:n_later].sum(), of_pair[n_later:]


def _read(model, ids, mask, cache, **options) -> torch.Tensor:
    """Log-probabilities behind each of `ids`, which follow what the cache holds; `mask` is over both, float32."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # without padding, for GPT-2 and its kind
    inputs = dict(input_ids=ids.to(model.device), attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits = model(**inputs, use_cache=cache is not None, **options).logits.float()
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _select(cache: DynamicCache, rows: list[int]) -> DynamicCache:
    """A cache of these rows; the one it is taken from stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
    return chosen
