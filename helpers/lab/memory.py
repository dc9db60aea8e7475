"""Bytes of a training step: counted before anything is loaded, and what the allocator says (chapter 09).

python -m helpers.lab.memory --model Llama-3.1-8B --gpu T4
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, PreTrainedModel

from helpers import base_models, profiles
from helpers.embedding_head import float32_head
from helpers.errors import BookError, check_name

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler announces itself on standard error otherwise

TASK_TYPES = {"head": "SEQ_CLS", "instruction": "CAUSAL_LM"}
N_LABELS = 5  # of a head that is counted
BLOCKS = 2  # a step is made with so many blocks and with one more; each further one costs what that one does
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # half a byte a weight, an 8-bit scale for 64, a 32-bit one for 256 scales
OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2}  # a trained weight

# GiB of well-known cards, and their 10¹² operations a second: 16-bit products on tensor cores with float32 sums, not sparse, as
# the makers give them.
CARDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
COUNTED_ON = 0.85  # of a card's nominal memory: cards report less, and the CUDA context and the allocator's gaps come on top
REACHED = 0.35  # of those: what 8 billion parameters reached at most on an H200, eight documents of 512 tokens a step


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
            check_name(f"value of `{name}`", getattr(self, name), values)


# How `EmbeddingHead` and `InstructionTuned` train: fewer blocks instead of checkpointing.
UPPER = Recipe(checkpointing=False, n_layers=10)
WAYS = {"upper ten blocks": UPPER, "all blocks, checkpointing": Recipe()}


class BytesAlive(TorchDispatchMode):
    """Counts the bytes that operations make, until they are freed: `now`, and at most `peak`; what `model` holds does not count.

    And `operations`, those of matrix products. Fake tensors (`FakeTensorMode`: a shape and no memory) count like real ones.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._storages = {each.untyped_storage()._cdata: 0 for each in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.operations += count(*arguments, **(options or {}), out_val=made)
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
        one = torch.ones(8, 8, device="cuda", requires_grad=True)
        (one @ one).sum().backward()  # cuBLAS takes its workspaces now, forward and backward, and keeps them
        del one
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
        `temporary`, what there is beyond that at the worst moment, gradients among it; `peak`, the sum. And `operations`: the
        multiplications and additions of its matrix products, attention left out.
    """
    check_name("approach", approach, TASK_TYPES)
    check_name("precision", precision, profiles.PRECISIONS)
    config = base_models.shape_of(shape)
    if length > config.max_position_embeddings:
        raise BookError(f"{shape} takes {config.max_position_embeddings} tokens, so a length of {length} does not fit it.")
    total = config.num_hidden_layers
    base_models.check_n_layers(recipe.n_layers, total)
    upper = recipe.n_layers or total
    n_logits = length if recipe.loss == "all" else label_tokens

    def step_of(n_blocks: int, n_adapted: int) -> np.ndarray:
        """Frozen and trained bytes, trained weights, what the forward pass keeps, operations; the most bytes of either pass."""
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
            n_trained = model.get_nb_trainable_parameters()[0]
            return np.array([*held(model), n_trained, kept, alive.operations, forward, alive.peak])

    fewer, more = step_of(BLOCKS, BLOCKS), step_of(BLOCKS + 1, BLOCKS + 1)
    step = fewer + (upper - BLOCKS) * (more - fewer)
    if upper < total:
        step += (total - upper) * (step_of(BLOCKS + 1, BLOCKS) - fewer)
    weights, adapters, n_trained, activations, operations, *phases = step.tolist()
    counted = {"weights": weights, "adapters": adapters, "optimizer": n_trained * OPTIMIZER_BYTES[recipe.optim]}
    counted |= {"activations": activations, "temporary": max(*phases, adapters) - activations}  # gradients
    return counted | {"peak": sum(counted.values()), "operations": operations}


def largest_batches(shape: str, approach: str, memory: list[float], **options) -> list[int]:
    """The most documents whose step needs at most so many bytes, of the powers of two up to 64; 0 if not even one fits.

    Bytes are counted for 1 and for 64 documents, and in between lie below a straight line, by 1 %; `options` of `count_step`.
    """
    one, most = (count_step(shape, approach, batch_size=n, **options)["peak"] for n in (1, 64))
    peaks = {n: one + (most - one) * (n - 1) / 63 for n in (1, 2, 4, 8, 16, 32, 64)}
    return [max((n for n, peak in peaks.items() if peak <= each), default=0) for each in memory]


def check_fits(shape: str, approach: str, memory: float, *, batch_size: int, **options) -> None:
    """Raise a BookError that says what would fit if a step needs more than `memory` bytes; `options` of `count_step`."""
    needed = count_step(shape, approach, batch_size=batch_size, **options)["peak"]
    if needed <= memory:
        return
    fits = min(*largest_batches(shape, approach, [memory], **options), batch_size - 1)
    advice = f"A batch of {fits} would fit" if fits else "Not even one document fits: take a smaller model or shorter documents"
    if not options.get("recipe", Recipe()).checkpointing:
        advice += ", or switch checkpointing on"
    raise BookError(
        f"{shape} with {batch_size} documents of {options['length']} tokens needs about {needed / 1e9:.1f} GB for {approach}, "
        f"there are {memory / 1e9:.1f} GB. {advice}."
    )


def card(gpu: str | None) -> tuple[str, float, float]:
    """Name, bytes to count on, operations a second (nan: not known) of a card of `CARDS`, of so many GiB, or (None) of this one.

    BookError: there is no such card; or it is this one, and CUDA or bitsandbytes does not work here.
    """
    if gpu is None:
        if not torch.cuda.is_available():
            raise BookError("No CUDA GPU is visible here. Say which card to count for: --gpu T4, or --gpu 16 for one of 16 GiB.")
        profiles.check_cuda(quantized=True)
        gpu, gib = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
        tera = next((CARDS[name]["tera"] for name in CARDS if name in gpu), np.nan)
    elif gpu.isdigit():
        gpu, gib, tera = "a card", int(gpu), np.nan
    else:
        check_name("card", gpu, CARDS)
        gib, tera = CARDS[gpu].values()
    return f"{gpu} of {gib:.0f} GiB", COUNTED_ON * gib * 2**30, 1e12 * tera


def main(arguments: list[str] | None = None) -> None:
    """Count what it takes to train a model on a card, before anything is downloaded."""
    parser = argparse.ArgumentParser(prog="python -m helpers.lab.memory", description=main.__doc__)
    parser.add_argument("--model", required=True, help="such as Qwen3-0.6B; or a hub id, or a folder")
    parser.add_argument("--gpu", help=f"GiB, or one of: {', '.join(CARDS)} (default: the one that is here)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a document (default: %(default)s)")
    given, shapes, rows = parser.parse_args(arguments), base_models.SHAPES | base_models.MORE_SHAPES, {}
    profiles.quiet()
    try:
        where, memory, speed = card(given.gpu)
        name = next((each for each in shapes if each.lower() in given.model.lower()), given.model)
        if "/" not in name and not Path(name).is_dir():
            check_name("base model", name, shapes | base_models.EMBEDDED)
        for approach, (way, recipe) in itertools.product(TASK_TYPES, WAYS.items()):
            options = {"length": given.length, "recipe": recipe}
            one = count_step(name, approach, batch_size=1, **options)
            (fit,) = largest_batches(name, approach, [memory], **options)
            row = {"GB for 1 document": one["peak"] / 1e9, "documents that fit": fit}
            rows[f"{approach}, {way}"] = row | {"documents a second, at most": REACHED * speed / one["operations"]}
    except BookError as error:
        sys.exit(str(error))
    table = pd.DataFrame(rows).T
    if not table["documents that fit"].any():
        smaller = [each for each in shapes if count_step(each, "head", batch_size=1, length=given.length)["peak"] <= memory]
        needs = f"a document of {given.length} tokens needs {table.iloc[:, 0].min():.1f} GB, {memory / 1e9:.1f} GB are counted on"
        sys.exit(f"{name} does not fit on {where}: {needs}. Models that do: {', '.join(smaller) or 'none that is known here'}.")
    n = base_models.on_meta(name).num_parameters() / 1e9
    print(f"{name}: {n:.2f} billion parameters, {2 * n:.1f} GB to download; {where}, {memory / 1e9:.1f} GB are counted on.")
    print(f"NF4, rank 16, documents of {given.length} tokens. Counted and predicted, not measured:\n")
    print(table.to_string(na_rep="not known", float_format="{:.1f}".format, formatters={"documents that fit": "{:.0f}".format}))


if __name__ == "__main__":
    main()
