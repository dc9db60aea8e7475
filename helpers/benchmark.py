"""Recipes of training side by side: same model, same documents; seconds, bytes and losses of each are recorded (chapter 09).

python -m helpers.benchmark book/benchmarks/one_gpu.yaml
"""

import argparse
import itertools
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from helpers import adapters, base_models, profiles, runs
from helpers.errors import BookError
from helpers.instruction import LabelTokensTrainer
from helpers.measuring import Recipe, adapted, allocated, check_fits, count_step, held

N_LABELS, LABEL_TOKENS = 5, 3  # of the documents below; a label takes so many tokens
_ENTRIES = ("shapes", "lengths", "approaches", "precision", "batch_size", "rank", "steps", "seed", "recipes")


def random_model(shape: str, approach: str, precision: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, which costs the same bytes and seconds as a trained one, and needs no download.

    Args:
        shape: what `base_models.shape_of` takes.
        approach: `head` or `instruction`.
        precision: `nf4` (the linear layers of the blocks, double quantization), `bfloat16` or `float32`.
    """
    device, dtype = profiles.current().device, torch.float32 if precision == "float32" else torch.bfloat16
    config = base_models.shape_of(shape)
    config.num_labels, config.use_cache = N_LABELS, False
    config.pad_token_id = config.pad_token_id or 0
    kind = AutoModelForSequenceClassification if approach == "head" else AutoModelForCausalLM
    set_seed(seed)
    with torch.device(device):
        model = kind.from_config(config, dtype=dtype)
    if precision == "nf4":
        for module in list(model.base_model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, _quantized(child, dtype))
    return model


def _quantized(layer: torch.nn.Linear, dtype: torch.dtype) -> bitsandbytes.nn.Linear4bit:
    options = {"compress_statistics": True, "quant_type": "nf4"}
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, **options, device="meta"
    )
    made.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, **options, module=made).to(
        layer.weight.device
    )
    made.bias = layer.bias
    return made


def documents(n: int, longest: int, vocabulary: int, seed: int = 0) -> Dataset:
    """`n` documents of random tokens: `input_ids`, `length`, `label`; half as long as `longest` in the middle, none longer."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(np.log(longest / 2), 0.6, n), LABEL_TOKENS + 2, longest).astype(int)
    lengths[-1] = longest
    ids = [draw.integers(10, vocabulary, length).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "length": lengths, "label": draw.integers(0, N_LABELS, n)})


class _Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *arguments, **options) -> None:
        self.start = self._now()

    def on_step_end(self, *arguments, **options) -> None:
        self.seconds.append(self._now() - self.start)


def train(
    model: PeftModel,
    approach: str,
    precision: str,
    recipe: Recipe,
    texts: Dataset,
    *,
    batch_size: int,
    learning_rate: float,
    steps: int = -1,
) -> tuple[list[float], list[float]]:
    """Train with the stock trainers, set as `recipe` says, on one pass over `texts` or on `steps` batches.

    Returns:
        The loss of every step, and its seconds.
    """
    profile, clock = profiles.current(), _Clock()
    tokenizer = base_models.load_tokenizer()  # only its padding is used
    with tempfile.TemporaryDirectory() as folder:
        options = dict(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            optim=recipe.optim,
            bf16=precision != "float32",  # not model.dtype: kbit preparation makes that float32
            train_sampling_strategy=recipe.sampling,
            activation_checkpointing=recipe.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": recipe.reentrant},
            torch_compile=recipe.compile,
            use_liger_kernel=recipe.liger,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=profile.device == "cpu",
            seed=0,
        )
        if approach == "head":
            data = texts.rename_column("label", "labels")
            collator = DataCollatorWithPadding(tokenizer)
            trainer = Trainer(model, TrainingArguments(**options), data_collator=collator, train_dataset=data, callbacks=[clock])
        else:
            data = texts.remove_columns("label").map(lambda row: {"labels": _only_the_label(row["input_ids"])})
            if recipe.loss == "all":
                collator = DataCollatorForSeq2Seq(tokenizer)
                arguments = TrainingArguments(**options)
                trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[clock])
            else:
                kind = SFTTrainer if recipe.loss == "trl" else LabelTokensTrainer
                settings = SFTConfig(**options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
                trainer = kind(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
                if recipe.float32_adapters:
                    adapters.keep_in_float32(trainer)
        trainer.remove_callback(trainer.callback_handler.callbacks[-1])
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], clock.seconds


def _only_the_label(ids: list[int]) -> list[int]:
    return [-100] * (len(ids) - LABEL_TOKENS) + ids[-LABEL_TOKENS:]


def run(key: dict) -> dict:
    """Measure one recipe and return its record.

    The peak is that of two steps on documents that are all as long as the longest; losses and seconds are those of `steps`
    steps on documents of mixed lengths, the first two steps left out of the seconds.

    Args:
        key: `shape`, `approach`, `precision`, `length` (of the longest document), `batch_size`, `rank`, `steps`, `recipe` (its
            fields), `seed`, `profile`.

    Raises:
        BookError: the batch cannot fit into the memory of the GPU, or as `random_model`.
    """
    runs.give_back_memory()
    shape, approach, recipe = key["shape"], key["approach"], Recipe(**key["recipe"])
    options = {name: key[name] for name in ("batch_size", "length", "rank", "precision")}
    counted = count_step(shape, approach, **options, recipe=recipe, n_labels=N_LABELS, label_tokens=LABEL_TOKENS)
    if torch.cuda.is_available():
        check_fits(shape, approach, torch.cuda.get_device_properties(0).total_memory, **options, recipe=recipe)
    model = random_model(shape, approach, key["precision"], key["seed"])
    vocabulary = min(model.config.vocab_size, len(base_models.load_tokenizer()))
    model = adapted(model, approach, key["precision"], key["rank"], recipe)
    frozen, trained = held(model)
    longest = documents(2 * key["batch_size"], 2, vocabulary).map(lambda row: {"input_ids": [10] * key["length"]})
    with allocated() as cost:
        train(model, approach, key["precision"], recipe, longest, batch_size=key["batch_size"], learning_rate=0.0)
    texts = documents(key["steps"] * key["batch_size"], key["length"], vocabulary, key["seed"])
    options = dict(batch_size=key["batch_size"], learning_rate=5e-4)
    losses, seconds = train(model, approach, key["precision"], recipe, texts, **options)
    return {
        "key": key,
        "counted": counted,
        "held": {"frozen": frozen, "trained": trained},
        "peak": frozen + trained + cost.peak,
        "losses": losses,
        "seconds": seconds,
        "documents_per_second": key["batch_size"] * len(seconds[2:]) / sum(seconds[2:]),
        "provenance": runs.provenance() | {"dtype": None, "quantization": None},
    }


def keys(sweep: dict) -> list[dict]:
    """Every run of a benchmark file: all shapes, lengths and approaches, recipe by recipe.

    Args:
        sweep: `shapes`, `lengths`, `approaches`, `precision`, `batch_size`, `rank`, `steps`, `seed`, and `recipes`, a list of
            `name: {field of Recipe: value}`, each on top of the one before; `full`, what is different under the full profile.

    Raises:
        BookError: an unknown or a missing entry, or an unknown field of a recipe.
    """
    known, profile = (*_ENTRIES, "full"), profiles.current().name
    sweep = runs.checked(sweep, "entry of a benchmark", known)
    different = runs.checked(sweep.pop("full", None), "entry of `full`", _ENTRIES)
    sweep |= different if profile == "full" else {}
    if lacking := [name for name in _ENTRIES if name not in sweep]:
        raise BookError(f"The benchmark lacks the entry {lacking[0]!r}.")
    if sweep["steps"] < 3:
        raise BookError(f"steps is {sweep['steps']}, but the first two are left out of the seconds: give 3 or more.")
    recipes, fields = {}, asdict(Recipe())
    for entry in sweep["recipes"]:
        for name, changed in entry.items():
            fields = fields | runs.checked(changed, "field of a recipe", fields)
            recipes[name] = asdict(Recipe(**fields))
    same = {name: sweep[name] for name in ("precision", "batch_size", "rank", "steps", "seed")}
    found = []
    for shape, length, approach in itertools.product(sweep["shapes"], sweep["lengths"], sweep["approaches"]):
        made = []
        for name, recipe in recipes.items():
            if approach == "head":
                recipe = recipe | {"loss": Recipe().loss}  # which is a matter of instruction tuning
            if recipe not in made:
                made.append(recipe)
                what = {"shape": shape, "length": length, "approach": approach, "name": name, "recipe": recipe}
                found.append(what | same | {"profile": profile})
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not recorded yet. Stop it whenever you like: it goes on where it was."""
    parser = argparse.ArgumentParser(prog="python -m helpers.benchmark", description=main.__doc__)
    parser.add_argument("benchmark", type=Path, help="a YAML file; the records go beside it, as .jsonl")
    parser.add_argument("--out", type=Path, help="the records' file, if it is another one")
    given = parser.parse_args(arguments)
    path, failed = given.out or given.benchmark.with_suffix(".jsonl"), 0
    try:
        wanted = keys(runs.load_sweep(given.benchmark))
        done = [record["key"] for record in runs.read(path)]
        for key in tqdm([key for key in wanted if key not in done], unit="run"):
            try:
                runs.append(path, run(key))
            except (BookError, torch.OutOfMemoryError) as error:
                failed += 1
                title = f"{key['shape']}, {key['length']} tokens, {key['approach']}, {key['name']}"
                tqdm.write(f"{title}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
    except BookError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{failed} of {len(wanted)} runs failed; the others are recorded.")
    print(f"{path}: all {len(wanted)} runs are recorded")


if __name__ == "__main__":
    main()
