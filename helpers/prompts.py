"""From texts to prompts to batches of tokens: nothing that a document holds can steer the model, nothing is cut in silence."""

import re
from collections.abc import Iterator

from transformers import BatchEncoding, PreTrainedTokenizerBase

from helpers.errors import BookError


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What steers a model wherever it stands in a text: special tokens, and added ones that the chat template writes."""
    template, added = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or (token.content in template and not token.content.isspace())}
    return tuple(sorted((found | set(tokenizer.all_special_tokens)) - {""}, key=lambda token: (-len(token), token)))


def sanitize_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase, before: str = "", after: str = "") -> list[str]:
    """Each document between `before` and `after`; a control token in it is broken by a space and read as text.

    So is one that only arises where document and frame meet. The frame keeps its own, and a document without any is unchanged.
    BookError: one cannot be broken.
    """
    tokens = control_tokens(tokenizer)
    pattern = re.compile("|".join(re.escape(token) for token in tokens if token[1:]) or "(?!)")

    def meet(left: str, right: str) -> bool:
        return any(left.endswith(token[:n]) and right.startswith(token[n:]) for token in tokens for n in range(1, len(token)))

    prompts = []
    for text in texts:
        while (broken := pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)) != text:
            text = broken
        text = " " * meet(before, text + after) + text
        text += " " * meet(before + text, after)
        prompts.append(before + text + after)
    check_control_tokens(prompts, f"{before}x{after}", tokenizer)
    return prompts


def check_control_tokens(prompts: list[str], ordinary: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prompts whose control tokens are not those of `ordinary`, the prompt of a document that has none.

    A tokenizer may find a control token where its text does not stand, in letters of another width for instance.
    """
    ids = set(tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer))))
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        ids.discard(tokenizer.unk_token_id)  # what an encoder makes of an emoji
    expected, *found = ([token for token in each if token in ids] for each in tokenizer([ordinary, *prompts]).input_ids)
    for row, tokens in enumerate(found):
        if tokens != expected:
            raise BookError(f"Text {row} has control tokens of the model that cannot be broken. Drop it, or take them out.")


def check_open_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that closes every text, as those of embedding models do: no label can be read behind such an end."""
    closed, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    if closed[-1] != plain[-1]:
        token = tokenizer.convert_ids_to_tokens(closed[-1])
        raise BookError(f"The tokenizer appends {token!r} to every text, so no label can follow. Take a causal base model.")


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text; BookError if it has none, or more than the model takes."""
    encoded = tokenizer(texts).input_ids
    for row, ids in enumerate(encoded):
        if not ids:
            raise BookError(f"Text {row} is empty ({texts[row]!r}), so there is nothing to read. Drop it or give it a text.")
        if len(ids) > tokenizer.model_max_length:
            most = f"the model takes {tokenizer.model_max_length}"
            raise BookError(f"Text {row} has {len(ids)} tokens, {most}. Shorten the documents (`tasks.load(…, shorten=…)`).")
    return encoded


def batches(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, batch_size: int, side: str = "right", skip: int = 0
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """Tokenized batches of texts of like length, longest first, with the rows that each batch answers for.

    Args:
        side: where the padding goes, `right` or `left`.
        skip: leave out the first tokens of every text, which must have more.

    Yields:
        Indices into `texts`, and `input_ids` and `attention_mask` of shape (len(rows), n_tokens).
    """
    encoded = encode(texts, tokenizer)
    order = sorted(range(len(texts)), key=lambda row: -len(encoded[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, tokenizer.pad({"input_ids": [encoded[row][skip:] for row in rows]}, padding_side=side, return_tensors="pt")
