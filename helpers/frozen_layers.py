"""Layers below the lowest adapter give the same hidden states in every epoch, so they are computed once (chapter 04)."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from helpers import base_models
from helpers.errors import BookError


class CachedLayers(torch.nn.Module):
    """Stands where the token embedding stood: token ids in, hidden states above the frozen layers out.

    A text's states are computed when it is first seen and kept in `states`, n_tokens · hidden_size numbers a text.
    `attention_mask` is that of the next ids, None where nothing is padding. If it is longer than they are, they go on where the
    last single text ended, over a key-value cache.
    """

    def __init__(self, decoder: PreTrainedModel, n_frozen: int, states: dict[tuple[int, ...], torch.Tensor]) -> None:
        super().__init__()
        self.whole = (decoder.embed_tokens, decoder.layers)
        lower = copy.copy(decoder)
        lower._modules = {**decoder._modules, "layers": decoder.layers[:n_frozen].eval(), "norm": torch.nn.Identity()}
        self._lower = (lower,)  # in a tuple, so that its weights are not registered a second time
        self._states = states
        self.attention_mask: torch.Tensor | None = None
        self._begun: tuple[int, ...] = ()  # the last single text

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Shape (n_texts, n_tokens) to (n_texts, n_tokens, hidden_size); zeros where there is padding."""
        kept = (torch.ones_like(input_ids) if self.attention_mask is None else self.attention_mask).bool().cpu()
        n_read = kept.shape[1] - input_ids.shape[1]
        if n_read not in (0, len(self._begun)):
            raise RuntimeError("Cached layers read on behind one text that all rows share. Use `whole_model` for other caches.")
        begun, kept = self._begun[:n_read], kept[:, n_read:]
        texts = [begun + tuple(row[where].tolist()) for row, where in zip(input_ids.cpu(), kept, strict=True)]
        self._begun = texts[0] if len(texts) == 1 and not begun else self._begun
        if new := [text for text in dict.fromkeys(texts) if text not in self._states]:
            (lower,) = self._lower
            rows = [torch.tensor(text) for text in new]
            ids, mask = (pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows]))
            states = lower(ids.to(lower.device), attention_mask=mask.to(lower.device), use_cache=False).last_hidden_state.cpu()
            self._states |= {text: state[: len(text)].clone() for text, state in zip(new, states, strict=True)}
        states = [self._states[text][len(begun) :] for text in texts]
        out = states[0].new_zeros(*input_ids.shape, states[0].shape[-1])
        for row, where, state in zip(out, kept, states, strict=True):
            row[where] = state
        return out.to(input_ids.device)


class _Skipped(torch.nn.Module):
    """Stands where a layer stood; in a key-value cache it leaves how many tokens were read, and no more."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden_states: torch.Tensor, past_key_values=None, **_) -> torch.Tensor:
        if past_key_values is not None:
            nothing = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            past_key_values.update(nothing, nothing, self.number)
        return hidden_states


@contextlib.contextmanager
def cached_lower_layers(
    model: PreTrainedModel | PeftModel, n_layers: int | None, states: dict[tuple[int, ...], torch.Tensor] | None = None
) -> Iterator[None]:
    """Within the block, what lies below the upper `n_layers` blocks is computed once for each text; None does nothing.

    Losses, gradients and names of adapters are those of the whole model, and after the block it is whole again. Use it around
    training, where the same texts come in every epoch. The layers below are frozen, and stay so.

    Args:
        model: of Llama's kind (`embed_tokens`, `layers`, `norm`), with LoRA on the upper `n_layers` blocks at most; it may
            also get its adapters within the block. BookError: it is another kind, or has adapters lower down.
        states: what an earlier block has computed, of the same base model in the same precision under the same `n_layers`; what
            this block computes is added, (n_tokens, hidden_size) for the token ids of each text.
    """
    if n_layers is None:
        yield
        return
    decoder = _decoder_of(model)
    other = BookError(f"{type(decoder).__name__} is not built like Llama, so no layer can be computed once. Use n_layers=None.")
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm")):
        raise other
    base_models.check_n_layers(n_layers, len(decoder.layers))
    n_frozen = len(decoder.layers) - n_layers
    embedding, layers = decoder.embed_tokens, decoder.layers
    if any("lora" in name for name, _ in layers[:n_frozen].named_parameters()):
        raise BookError(f"There are adapters below the upper {n_layers} layers, so these are not frozen. Use n_layers=None.")
    for module in (embedding, layers[:n_frozen]):
        module.requires_grad_(False)
    cached = CachedLayers(decoder, n_frozen, {} if states is None else states)

    def note_padding(_, args, kwargs) -> None:
        cached.attention_mask = kwargs.get("attention_mask")

    @torch.no_grad()
    def sample() -> torch.Tensor:
        return decoder(torch.arange(3, device=decoder.device)[None], use_cache=False).last_hidden_state

    expected = sample()
    hook = decoder.register_forward_pre_hook(note_padding, with_kwargs=True)
    try:
        decoder.embed_tokens = cached
        decoder.layers = torch.nn.ModuleList([*map(_Skipped, range(n_frozen)), *layers[n_frozen:]])
        if not torch.allclose(sample(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise other  # some models scale their embeddings, for one
        yield
    finally:
        hook.remove()
        decoder.embed_tokens, decoder.layers = embedding, layers


@contextlib.contextmanager
def whole_model(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within the block, `model` is whole although it stands in a block of `cached_lower_layers`: it can read over a cache."""
    decoder = _decoder_of(model)
    cached = decoder.embed_tokens, decoder.layers
    if isinstance(cached[0], CachedLayers):
        decoder.embed_tokens, decoder.layers = cached[0].whole
    try:
        yield
    finally:
        decoder.embed_tokens, decoder.layers = cached


def _decoder_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
