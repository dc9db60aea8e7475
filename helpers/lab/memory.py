"""Bytes of a training step: counted before anything is loaded, and what the allocator says (chapter 09)."""

import contextlib
import copy
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from helpers import base_models, profiles
from helpers.embedding_head import float32_head
from helpers.errors import BookError, unknown_name

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler announces itself on standard error otherwise

TASK_TYPES = {"head": "SEQ_CLS", "instruction": "CAUSAL_LM"}
PRECISIONS = ("nf4", "bfloat16", "float32")
N_LABELS = 5  # of a head that is counted
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # half a byte a weight, an 8-bit scale for 64, a 32-bit one for 256 scales
OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2}  # a trained weight


@dataclass(frozen=True)
class Recipe:
    """What decides about the bytes and seconds of a training, and hardly about what is learned.

    An unknown sampling, loss or optimizer raises a BookError that suggests the nearest.
    """

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


# The recipe that tutorials copy; and how `EmbeddingHead` and `InstructionTuned` train: fewer blocks instead of checkpointing.
STOCK = Recipe(kbit_preparation=True, reentrant=True, sampling="random", loss="trl")
UPPER = Recipe(checkpointing=False, n_layers=10)


class BytesAlive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed: `now`, and at most `peak`.

    Takes real and fake tensors (`FakeTensorMode`: a shape and no memory). What `model` holds is not counted.
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
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    cost.peak = int(np.cumsum([0, *(event.nbytes() for event in in_order)]).max())


def held(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a model's frozen parameters and buffers, and of what is trained in it; shared weights count once."""
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(each.nbytes for each in tensors if each.requires_grad)
    return sum(each.nbytes for each in tensors) - trained, trained


class _Multiply4bit(torch.autograd.Function):
    """What a 4-bit layer allocates while it multiplies, forth and back: its weights in the computation's dtype."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.shape = shape
        return torch.nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return gradient @ gradient.new_empty(ctx.shape), None


def _pack(layer: torch.nn.Linear) -> None:
    """Give `layer`, in place, as many bytes as a layer of bitsandbytes has; there are no weights in them."""
    shape, size = layer.weight.shape, round(layer.weight.numel() * NF4_BYTES)
    layer.compute_dtype = layer.weight.dtype  # in which PEFT makes adapters
    layer.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(x: torch.Tensor) -> torch.Tensor:
        made = _Multiply4bit.apply(x.to(layer.compute_dtype), shape)
        return made if layer.bias is None else made + layer.bias

    layer.forward = forward


def materialize(model: torch.nn.Module, make: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Put `make(name, tensor)` in the place of all that lies on the meta device, one by one; what is shared stays shared."""
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old.is_meta and old not in made:
                    new = made[old] = make(name, old)
                    if isinstance(old, torch.nn.Parameter) and not isinstance(new, torch.nn.Parameter):
                        made[old] = torch.nn.Parameter(new, old.requires_grad)
                tensors[name] = made.get(old, old)


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
    blocks: int = 2,
) -> dict[str, int]:
    """Bytes of one training step with LoRA on all linear layers, counted without weights, memory or GPU.

    It counts what the code asks for: fused kernels of a GPU need less, its allocator rounds up, its context comes on top.

    Args:
        shape: what `base_models.shape_of` takes; any architecture.
        approach: `head` or `instruction`.
        batch_size, length: documents, and tokens of each, padding included.
        precision: of the base model's weights, one of `PRECISIONS`; but with `float32` the step is made under autocast.
        label_tokens: positions whose logits are taken for instruction tuning. TRL's loss takes all on a CPU: not counted.
        blocks: the step is made with so many blocks and with one more; each further one costs what that one does.

    Returns:
        `weights` (frozen), `adapters`, `optimizer`; `activations`, what the forward pass keeps for the backward pass;
        `temporary`, what there is beyond that at the worst moment, gradients among it; `peak`, the sum.

    Raises:
        BookError: an unknown approach or precision, a text longer than the model takes, or as `base_models.fetch`.
    """
    for what, value, known in (("approach", approach, TASK_TYPES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise unknown_name(what, value, known)
    config = base_models.shape_of(shape)
    if length > config.max_position_embeddings:
        raise BookError(f"{shape} takes {config.max_position_embeddings} tokens, so a length of {length} does not fit it.")
    total = config.num_hidden_layers
    base_models.check_n_layers(recipe.n_layers, total)
    upper = recipe.n_layers or total

    def step_of(n_blocks: int, n_adapted: int) -> np.ndarray:
        small = copy.deepcopy(config)
        small.num_hidden_layers = n_blocks
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:n_blocks]
        model = base_models.on_meta(small, N_LABELS if approach == "head" else None)
        model = model.to(torch.float32 if precision == "float32" else torch.bfloat16)
        for layer in model.base_model.modules():
            if precision == "nf4" and isinstance(layer, torch.nn.Linear):
                _pack(layer)
        model = adapted(model, approach, precision, rank, replace(recipe, n_layers=n_adapted))
        n_logits = length if recipe.loss == "all" else label_tokens
        return _bytes_of_step(model, approach, precision != "float32", batch_size, length, n_logits)

    fewer, more = step_of(blocks, blocks), step_of(blocks + 1, blocks + 1)
    step = fewer + (upper - blocks) * (more - fewer)
    if upper < total:
        step += (total - upper) * (step_of(blocks + 1, blocks) - fewer)
    weights, adapters, n_trained, activations, *phases = step.tolist()
    counted = {"weights": weights, "adapters": adapters, "optimizer": n_trained * OPTIMIZER_BYTES[recipe.optim]}
    counted |= {"activations": activations, "temporary": max(phases) - activations}
    return counted | {"peak": sum(counted.values())}


def _bytes_of_step(model: PeftModel, approach: str, autocast: bool, batch_size: int, length: int, n_logits: int) -> np.ndarray:
    """Frozen and trained bytes, trained weights, what the forward pass keeps; most bytes of the passes, gradients."""
    with FakeTensorMode():
        materialize(model, lambda name, each: torch.empty(each.shape, dtype=each.dtype))
        ids = torch.zeros((batch_size, length), dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        if approach == "head":
            batch["labels"] = ids[:, 0]
        else:
            batch |= {"labels": ids[:, :n_logits], "logits_to_keep": n_logits}
        with BytesAlive(model) as alive, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
            kept, forward = alive.now, alive.peak
            alive.peak = kept
        with alive:
            loss.backward()
        trained = [each for each in model.parameters() if each.requires_grad]
        gradients = sum(each.grad.nbytes for each in trained)
        return np.array([*held(model), sum(each.numel() for each in trained), kept, forward, alive.peak, gradients])


def largest_batch(shape: str, approach: str, memory: float, **options) -> int:
    """The most documents whose training step fits into `memory` bytes, 0 if not even one does; `options` of `count_step`."""

    def needs(batch_size: int) -> int:
        return count_step(shape, approach, batch_size=batch_size, **options)["peak"]

    four, eight = needs(4), needs(8)
    fits = max(0, int((memory - four) / (eight - four) * 4 + 4))  # about: what the worst moment is may change on the way
    while fits and needs(fits) > memory:
        fits -= 1
    while needs(fits + 1) <= memory:
        fits += 1
    return fits


def check_fits(shape: str, approach: str, memory: float, *, batch_size: int, **options) -> None:
    """Raise a BookError that says what would fit if a step needs more than `memory` bytes; `options` of `count_step`."""
    needs = count_step(shape, approach, batch_size=batch_size, **options)["peak"]
    if needs <= memory:
        return
    fits = largest_batch(shape, approach, memory, **options)
    advice = f"A batch of {fits} would fit" if fits else "Not even one document fits: take a smaller model or shorter documents"
    if not options.get("recipe", Recipe()).checkpointing:
        advice += ", or switch checkpointing on"
    raise BookError(
        f"{shape} with {batch_size} documents of {options['length']} tokens needs about {needs / 1e9:.1f} GB for {approach}, "
        f"there are {memory / 1e9:.1f} GB. {advice}."
    )
