"""Bytes of a training step: counted before anything is loaded, and what the allocator says (chapter 09)."""

import contextlib
import copy
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from helpers import base_models
from helpers.errors import BookError, unknown_name

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler announces itself on standard error otherwise

TASK_TYPES = {"head": "SEQ_CLS", "instruction": "CAUSAL_LM"}
PRECISIONS = ("nf4", "bfloat16", "float32")
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # half a byte a weight, an 8-bit scale for 64, a 32-bit one for 256 scales
OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}  # a trained weight


@dataclass(frozen=True)
class Recipe:
    """What decides about the bytes and seconds of a training, and hardly about what is learned.

    Attributes:
        kbit_preparation: `prepare_model_for_kbit_training`, which makes all that is not quantized float32.
        checkpointing: keep one hidden state a block, and compute the rest once more in the backward pass.
        reentrant: the older kind of checkpointing.
        sampling: `random`, or `group_by_length` against padding.
        loss: of instruction tuning: `all`, the model's own, which takes the logits of the prompt too; `trl`, as SFTTrainer
            has it; or `labels`, logits where there is a label to learn (`LabelTokensTrainer`).
        optim: one of `OPTIMIZER_BYTES`.
        float32_adapters: as PEFT makes them; False keeps them in the model's dtype.
        compile: with `torch.compile`.
        liger: with the kernels of the Liger library, which has to be installed.
        n_layers: LoRA on the upper so many blocks, so that no backward pass goes below them; None for all.
    """

    kbit_preparation: bool = False
    checkpointing: bool = True
    reentrant: bool = False
    sampling: str = "group_by_length"
    loss: str = "labels"
    optim: str = "adamw_torch_fused"
    float32_adapters: bool = True
    compile: bool = False
    liger: bool = False
    n_layers: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no training can have.

        Raises:
            BookError: an unknown sampling, loss or optimizer; the nearest is suggested.
        """
        known = {"sampling": ("random", "group_by_length"), "loss": ("all", "trl", "labels"), "optim": OPTIMIZER_BYTES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise unknown_name(f"value of `{name}`", getattr(self, name), values)


# The recipe that tutorials copy, and the steps from it to this book's.
STOCK = Recipe(kbit_preparation=True, reentrant=True, sampling="random", loss="trl")
# How `EmbeddingHead` and `InstructionTuned` are set by default: fewer blocks to train instead of checkpointing.
UPPER = Recipe(checkpointing=False, n_layers=10)


class BytesAlive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed: `now`, and at most `peak`.

    Works on real tensors and, with `FakeTensorMode`, on tensors that have a shape and no memory. What `model` holds is not
    counted.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages = {each.untyped_storage()._cdata: 0 for each in [*model.parameters(), *model.buffers()]}

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._storages.pop(key)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for each in tree_iter(made):
            if isinstance(each, torch.Tensor):
                self._add(each.untyped_storage())
        return made


@contextlib.contextmanager
def allocated() -> Iterator[SimpleNamespace]:
    """What the allocator hands out at most in a block, above what was held when it began: `peak`, in bytes.

    On a GPU from `torch.cuda`'s counters, on a CPU from the profiler's record of every allocation, which takes time: do not
    time the same block.
    """
    cost = SimpleNamespace(peak=0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield cost
        torch.cuda.synchronize()
        cost.peak = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield cost
    now = 0
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        cost.peak = max(cost.peak, now)


def held(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a model's frozen parameters and buffers, and of what is trained in it; shared weights count once."""
    frozen, trained = {}, {}
    for each in [*model.parameters(), *model.buffers()]:
        (trained if each.requires_grad else frozen)[id(each)] = each.nbytes
    return sum(frozen.values()), sum(trained.values())


class _Packed(torch.autograd.Function):
    """What a 4-bit layer allocates while it multiplies, forth and back: its weights in the computation's dtype."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.shape = shape
        return torch.nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return gradient @ gradient.new_empty(ctx.shape), None


class _Linear4bit(torch.nn.Linear):
    """As many bytes as a layer of bitsandbytes, and no weights in them; for shapes on the meta device."""

    def __init__(self, like: torch.nn.Linear, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self.dtype = like.in_features, like.out_features, like.bias, dtype
        size = round(like.weight.numel() * NF4_BYTES)
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = _Packed.apply(x.to(self.dtype), torch.Size((self.out_features, self.in_features)))
        return made if self.bias is None else made + self.bias


def adapted(model: PreTrainedModel, approach: str, precision: str, rank: int, recipe: Recipe) -> PeftModel:
    """`model` with LoRA on all linear layers of the blocks that `recipe` names, made ready for a training with it."""
    model.is_loaded_in_4bit = precision == "nf4"  # what PEFT asks
    switch = {"use_reentrant": recipe.reentrant}
    if recipe.kbit_preparation:
        model = prepare_model_for_kbit_training(model, recipe.checkpointing, switch)
    lora = base_models.upper_lora(model, TASK_TYPES[approach], rank, recipe.n_layers)
    model = get_peft_model(model, lora, autocast_adapter_dtype=recipe.float32_adapters)
    if recipe.checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(switch)
    model.config.use_cache = False
    return model.train()


def _fake(model: torch.nn.Module) -> None:
    """Replace what lies on the meta device, in place, by what fake tensors there are for it on a CPU."""
    made = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, each in kept.items():
                if each is not None and id(each) not in made:
                    new = torch.empty(each.shape, dtype=each.dtype)
                    made[id(each)] = torch.nn.Parameter(new, each.requires_grad) if isinstance(each, torch.nn.Parameter) else new
                if each is not None:
                    kept[name] = made[id(each)]


def count_step(
    shape: str,
    approach: str,
    *,
    batch_size: int,
    length: int,
    rank: int = 16,
    precision: str = "nf4",
    recipe: Recipe = Recipe(),
    n_labels: int = 5,
    label_tokens: int = 4,
) -> dict[str, int]:
    """Bytes of one training step with LoRA on all linear layers, counted without weights, memory or GPU.

    The step is run on fake tensors for models of two and of three blocks; every further block costs what the third does, be it
    one with adapters or, below the recipe's `n_layers`, one without. It
    counts what the code asks for: kernels that are fused on a GPU need less, its allocator rounds up, its context comes on top.

    Args:
        shape: what `base_models.shape_of` takes; any architecture.
        approach: `head` or `instruction`.
        batch_size, length: documents, and tokens of each, padding included.
        precision: of the base model's weights: `nf4`, `bfloat16` or `float32`.
        label_tokens: positions at the end whose logits are taken, for instruction tuning. TRL's loss does that on a GPU alone;
            on a CPU it takes all logits, which is not counted.

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
    n_adapted = recipe.n_layers or total

    def step_of(n_blocks: int, n_adapted: int) -> dict[str, int]:
        small = copy.deepcopy(config)
        small.num_hidden_layers = n_blocks
        if getattr(small, "layer_types", None):
            small.layer_types = small.layer_types[:n_blocks]
        made = replace(recipe, n_layers=n_adapted)
        return _count(small, approach, batch_size, length, rank, precision, made, n_labels, label_tokens)

    two, three = step_of(2, 2), step_of(3, 3)
    step = {name: two[name] + (three[name] - two[name]) * (n_adapted - 2) for name in two}
    if n_adapted < total:
        below = step_of(3, 2)
        step = {name: step[name] + (below[name] - two[name]) * (total - n_adapted) for name in two}
    highest = max(step.pop(phase) for phase in ("forward", "backward", "gradients"))
    step["temporary"] = highest - step["activations"]
    return step | {"peak": sum(step.values())}


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
    """Refuse a batch that cannot fit into `memory` bytes, before an out-of-memory error does; `options` of `count_step`.

    Raises:
        BookError: it does not fit; the message says what would.
    """
    needs = count_step(shape, approach, batch_size=batch_size, **options)["peak"]
    if needs <= memory:
        return
    fits = largest_batch(shape, approach, memory, **options)
    advice = f"A batch of {fits} would fit" if fits else "Not even one document fits: take a smaller model or shorter documents"
    recipe = options.get("recipe", Recipe())
    if not recipe.checkpointing:
        advice += ", or switch checkpointing on"
    raise BookError(
        f"{shape} with {batch_size} documents of {options['length']} tokens needs about {needs / 1e9:.1f} GB for {approach}, "
        f"there are {memory / 1e9:.1f} GB. {advice}."
    )


def _count(config, approach, batch_size, length, rank, precision, recipe, n_labels, label_tokens) -> dict[str, int]:
    """One training step of a model with `config`, without its optimizer: see `count_step`."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = base_models.on_meta(config, n_labels if approach == "head" else None).to(dtype)
    if precision == "nf4":
        for module in list(model.base_model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, _Linear4bit(child, dtype))
    model = adapted(model, approach, precision, rank, recipe)
    with FakeTensorMode():
        _fake(model)
        weights, adapters = held(model)
        ids = torch.zeros((batch_size, length), dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with BytesAlive(model) as alive, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if approach == "head":
                loss = model(**batch, labels=torch.zeros(batch_size, dtype=torch.long)).loss
            elif recipe.loss == "all":
                loss = model(**batch, labels=ids).loss
            else:
                gold = ids[:, :label_tokens].flatten()
                logits = model(**batch, logits_to_keep=label_tokens).logits.flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits.float(), gold)
                del logits
            kept = alive.now
            forward, alive.peak = alive.peak, alive.now
        with alive:
            loss.backward()
        trained = [each for each in model.parameters() if each.requires_grad]
        gradients = sum(each.grad.nbytes for each in trained)
    n_trained = sum(each.numel() for each in trained)
    return {
        "weights": weights,
        "adapters": adapters,
        "gradients": gradients,
        "optimizer": n_trained * OPTIMIZER_BYTES[recipe.optim],
        "activations": kept,
        "forward": forward,
        "backward": alive.peak,
    }
