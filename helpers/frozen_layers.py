"""Layers below the lowest adapter give the same hidden states in every epoch, so they are computed once (chapter 04)."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from helpers import base_models
from helpers.errors import BookError


class CachedLayers(torch.nn.Module):
    """Stands where the token embedding stood: token ids in, hidden states above the frozen layers out.

    A text's states are computed when it is first seen and then looked up, whatever it is padded with and on which side. They
    are kept in main memory, n_tokens · hidden_size numbers a text.

    Attributes:
        attention_mask: of the ids that come next, None where nothing is padding; the decoder's hook sets it.
    """

    def __init__(self, decoder: PreTrainedModel, n_frozen: int) -> None:
        super().__init__()
        lower = copy.copy(decoder)
        lower._modules = {**decoder._modules, "layers": decoder.layers[:n_frozen].eval(), "norm": torch.nn.Identity()}
        self._lower = (lower,)  # in a tuple, so that its weights are not registered a second time
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self.attention_mask: torch.Tensor | None = None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Shape (n_texts, n_tokens) to (n_texts, n_tokens, hidden_size); zeros where there is padding."""
        kept = torch.ones_like(input_ids) if self.attention_mask is None else self.attention_mask
        kept = kept.bool().cpu()
        texts = [tuple(row[where].tolist()) for row, where in zip(input_ids.cpu(), kept, strict=True)]
        self._compute([text for text in dict.fromkeys(texts) if text not in self._states])
        states = [self._states[text] for text in texts]
        out = states[0].new_zeros(*input_ids.shape, states[0].shape[-1])
        for row, where, state in zip(out, kept, states, strict=True):
            row[where] = state
        return out.to(input_ids.device)

    @torch.no_grad()
    def _compute(self, texts: list[tuple[int, ...]]) -> None:
        if not texts:
            return
        (lower,) = self._lower
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        states = lower(ids.to(lower.device), attention_mask=mask.to(lower.device), use_cache=False).last_hidden_state.cpu()
        for text, state in zip(texts, states, strict=True):
            self._states[text] = state[: len(text)].clone()


class _Skipped(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_) -> torch.Tensor:
        return hidden_states


@contextlib.contextmanager
def cached_lower_layers(model: PreTrainedModel | PeftModel, n_layers: int | None) -> Iterator[None]:
    """Within the block, what lies below the upper `n_layers` blocks is computed once for each text and then cached.

    Nothing else changes: losses, gradients and the names of the adapters are those of the whole model, and after the block
    the model is whole again. Use it around training, where the same texts come in every epoch. The layers below are frozen,
    and stay so.

    Args:
        model: of Llama's kind (`embed_tokens`, `layers`, `norm`), with LoRA on the upper `n_layers` blocks at most; it may
            also get its adapters within the block.
        n_layers: as for `base_models.upper_lora`; None does nothing.

    Raises:
        BookError: a model of another kind or with fewer layers, or adapters in the lower ones.
    """
    if n_layers is None:
        yield
        return
    decoder = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm")):
        raise _other_kind(decoder)
    base_models.check_n_layers(n_layers, len(decoder.layers))
    n_frozen = len(decoder.layers) - n_layers
    embedding, lower = decoder.embed_tokens, list(decoder.layers[:n_frozen])
    if any("lora" in name for layer in lower for name, _ in layer.named_parameters()):
        raise BookError(f"There are adapters below the upper {n_layers} layers, so these are not frozen. Use n_layers=None.")
    for module in (embedding, *lower):
        module.requires_grad_(False)
    cached = CachedLayers(decoder, n_frozen)

    def note_padding(_, args, kwargs) -> None:
        cached.attention_mask = kwargs.get("attention_mask")

    sample = torch.arange(3, device=decoder.device)[None]
    expected = _last_hidden_state(decoder, sample)
    hook = decoder.register_forward_pre_hook(note_padding, with_kwargs=True)
    try:
        decoder.embed_tokens = cached
        for index in range(n_frozen):
            decoder.layers[index] = _Skipped()
        if not torch.allclose(_last_hidden_state(decoder, sample), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise _other_kind(decoder)  # some models scale their embeddings, for one
        yield
    finally:
        hook.remove()
        decoder.embed_tokens = embedding
        for index, layer in enumerate(lower):
            decoder.layers[index] = layer


@torch.no_grad()
def _last_hidden_state(decoder: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return decoder(ids, use_cache=False).last_hidden_state


def _other_kind(decoder: PreTrainedModel) -> BookError:
    return BookError(
        f"{type(decoder).__name__} is not built like Llama, so its lower layers cannot be computed once. Use n_layers=None."
    )
