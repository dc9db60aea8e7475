"""Bytes of a training step: counted before anything is loaded, and what the allocator says (chapter 09)."""

import bisect
import contextlib
import copy
import functools
import itertools
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedConfig, PreTrainedModel

from helpers import base_models, profiles
from helpers.embedding_head import float32_head
from helpers.errors import BookError, unknown_name

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler announces itself on standard error otherwise

TASK_TYPES = {"head": "SEQ_CLS", "instruction": "CAUSAL_LM"}
N_LABELS = 5  # of a head that is counted
BLOCKS = 2  # a step is made with so many blocks and with one more; each further one costs what that one does
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # half a byte a weight, an 8-bit scale for 64, a 32-bit one for 256 scales
OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2}  # a trained weight


@dataclass(frozen=True)
class Recipe:
    """What decides about the bytes and seconds of a training, and hardly about what is learned."""

    kbit_preparation: bool = False  # `prepare_model_for_kbit_training`: all that is not quantized becomes float32
    checkpointing: bool = True  # keep one hidden state a block, and compute the rest once more in the backward pass
    reentrant: bool = False  # the older kind of checkpointing
    sampling: str = "group_by_length"  # against padding, or `random`
    loss: str = "labels"  # of instruction tuning: logits of `all` tokens or of the `labels` (`LabelTokensTrainer`); `trl`'s own
    optim: str = "adamw_torch_fused"  # one of `OPTIMIZER_BYTES`
    float32_adapters: bool = True  # as PEFT makes them; or in the dtype of the computation
    n_layers: int | None = None  # LoRA on the upper so many blocks, so that no backward pass goes below; None for all

    def __post_init__(self) -> None:
        known = {"sampling": ("random", "group_by_length"), "loss": ("all", "trl", "labels"), "optim": OPTIMIZER_BYTES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise unknown_name(f"value of `{name}`", getattr(self, name), values)


# How `EmbeddingHead` and `InstructionTuned` train: fewer blocks instead of checkpointing.
UPPER = Recipe(checkpointing=False, n_layers=10)


class BytesAlive(TorchDispatchMode):
    """Counts the bytes that operations make, until they are freed: `now`, and at most `peak`; what `model` holds does not count.

    Fake tensors (`FakeTensorMode`: a shape and no memory) count like real ones.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages = {each.untyped_storage()._cdata: 0 for each in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for storage in [each.untyped_storage() for each in tree_iter(made) if isinstance(each, torch.Tensor)]:
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return made

    def _freed(self, key: int) -> None:
        self.now -= self._storages.pop(key)


@contextlib.contextmanager
def allocated() -> Iterator[SimpleNamespace]:
    """The most that the allocator hands out in a block, above what was held when it began: `peak`, in bytes.

    On a GPU (full profile) from `torch.cuda`'s counters; on a CPU from a slow record of all allocations: do not time the block.
    """
    cost = SimpleNamespace(peak=0)
    if profiles.current().device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield cost
        cost.peak = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield cost
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    cost.peak = max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def held(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a model's frozen parameters and buffers, and of what is trained in it; shared weights count once."""
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(each.nbytes for each in tensors if each.requires_grad)
    return sum(each.nbytes for each in tensors) - trained, trained


def _forward_4bit(layer: torch.nn.Linear, shape: torch.Size, x: torch.Tensor) -> torch.Tensor:
    """What a 4-bit layer allocates: its weights in bfloat16, anew in the backward pass, not kept in between."""
    unpacked = functools.partial(torch.empty, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda weight: weight.shape, unpacked):
        return torch.nn.functional.linear(x.bfloat16(), unpacked(shape), layer.bias)


def _without_weights(config: PreTrainedConfig, n_blocks: int, approach: str, precision: str) -> PreTrainedModel:
    """The lowest `n_blocks` on the meta device; with `nf4` a layer has as many bytes as one of bitsandbytes."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = n_blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_blocks]
    model = base_models.on_meta(config, N_LABELS if approach == "head" else None)
    model = model.to(torch.float32 if precision == "float32" else torch.bfloat16)
    for layer in model.base_model.modules():
        if precision == "nf4" and isinstance(layer, torch.nn.Linear):
            layer.compute_dtype = torch.bfloat16  # in which PEFT makes adapters
            layer.forward = functools.partial(_forward_4bit, layer, layer.weight.shape)
            packed = torch.empty(round(layer.weight.numel() * NF4_BYTES), dtype=torch.uint8, device="meta")
            layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    return model


def adapted(model: PreTrainedModel, approach: str, precision: str, rank: int, recipe: Recipe) -> PeftModel:
    """`model` with LoRA on all linear layers of the blocks that `recipe` names, and a float32 head, ready to be trained."""
    model.is_loaded_in_4bit = precision == "nf4"  # what PEFT asks
    switch = {"use_reentrant": recipe.reentrant}
    if recipe.kbit_preparation:
        model = prepare_model_for_kbit_training(model, recipe.checkpointing, switch)
    if approach == "head":  # as `load_classifier` makes it
        float32_head(model)
    lora = base_models.upper_lora(model, TASK_TYPES[approach], rank, recipe.n_layers)
    model = get_peft_model(model, lora, autocast_adapter_dtype=recipe.float32_adapters)
    if recipe.checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(switch)
    model.config.use_cache = False
    return model.train()


def count_step(
    shape: str,
    approach: str,
    *,
    batch_size: int,
    length: int,
    rank: int = 16,
    precision: str = "nf4",
    recipe: Recipe = Recipe(),
    label_tokens: int = 4,
) -> dict[str, int]:
    """Bytes of one training step with LoRA on all linear layers, counted without weights, memory or GPU.

    It counts what the code asks for: fused kernels of a GPU need less, its allocator rounds up, its context comes on top. The
    step is made under autocast unless `precision` is `float32`, and takes the logits of `label_tokens` positions for instruction
    tuning, unless the recipe's loss is that of `all`; TRL's takes all on a CPU: not counted. `length` includes padding.

    Returns:
        `weights` (frozen), `adapters`, `optimizer`; `activations`, what the forward pass keeps for the backward pass;
        `temporary`, what there is beyond that at the worst moment, gradients among it; `peak`, the sum.
    """
    for what, value, known in (("approach", approach, TASK_TYPES), ("precision", precision, ("nf4", "bfloat16", "float32"))):
        if value not in known:
            raise unknown_name(what, value, known)
    config = base_models.shape_of(shape)
    if length > config.max_position_embeddings:
        raise BookError(f"{shape} takes {config.max_position_embeddings} tokens, so a length of {length} does not fit it.")
    total = config.num_hidden_layers
    base_models.check_n_layers(recipe.n_layers, total)
    upper = recipe.n_layers or total
    n_logits = length if recipe.loss == "all" else label_tokens

    def step_of(n_blocks: int, n_adapted: int) -> np.ndarray:
        """Frozen and trained bytes, trained weights, what the forward pass keeps; the most bytes of either pass."""
        model = _without_weights(config, n_blocks, approach, precision)
        model = adapted(model, approach, precision, rank, replace(recipe, n_layers=n_adapted))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu").tie_weights()
            ids = torch.zeros((batch_size, length), dtype=torch.long)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            if approach == "head":
                batch["labels"] = ids[:, 0]
            else:
                batch |= {"labels": ids[:, :n_logits], "logits_to_keep": n_logits}
            with BytesAlive(model) as alive, torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
                loss = model(**batch).loss
                kept, forward = alive.now, alive.peak
                alive.peak = kept
            with alive:
                loss.backward()
            return np.array([*held(model), model.get_nb_trainable_parameters()[0], kept, forward, alive.peak])

    fewer, more = step_of(BLOCKS, BLOCKS), step_of(BLOCKS + 1, BLOCKS + 1)
    step = fewer + (upper - BLOCKS) * (more - fewer)
    if upper < total:
        step += (total - upper) * (step_of(BLOCKS + 1, BLOCKS) - fewer)
    weights, adapters, n_trained, activations, *phases = step.tolist()
    counted = {"weights": weights, "adapters": adapters, "optimizer": n_trained * OPTIMIZER_BYTES[recipe.optim]}
    counted |= {"activations": activations, "temporary": max(*phases, adapters) - activations}  # gradients
    return counted | {"peak": sum(counted.values())}


def check_fits(shape: str, approach: str, memory: float, *, batch_size: int, **options) -> None:
    """Raise a BookError that says what would fit if a step needs more than `memory` bytes; `options` of `count_step`."""

    def needs(n: int) -> int:
        return count_step(shape, approach, batch_size=n, **options)["peak"]

    if (needed := needs(batch_size)) <= memory:
        return
    fits = bisect.bisect(range(1, batch_size), memory, key=needs)
    advice = f"A batch of {fits} would fit" if fits else "Not even one document fits: take a smaller model or shorter documents"
    if not options.get("recipe", Recipe()).checkpointing:
        advice += ", or switch checkpointing on"
    raise BookError(
        f"{shape} with {batch_size} documents of {options['length']} tokens needs about {needed / 1e9:.1f} GB for {approach}, "
        f"there are {memory / 1e9:.1f} GB. {advice}."
    )
