"""Recipes of training side by side: same model, same documents; seconds, bytes and losses of each (chapter 09).

`book/scripts/gpu_session.py` records those of `book/benchmarks/one_gpu.yaml`.
"""

import tempfile
import time

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from helpers import base_models, profiles
from helpers.instruction import LabelTokensTrainer, float32_adapters
from helpers.lab.memory import N_LABELS, Recipe, adapted, allocated, check_fits, count_step, held
from helpers.lab.sweeps import give_back_memory, provenance

LABEL_TOKENS = 3  # of the documents below
ENTRIES = ("shapes", "lengths", "approaches", "precision", "batch_size", "rank", "steps", "seed", "recipes")
# Fields that `Recipe` had when records were made, and what they were: part of a record's key, so that it is known again.
FORMER = {"compile": False, "liger": False}
_TRAINING = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "seed": 0}
_TRAINING |= {"report_to": "none", "disable_tqdm": True}


def sixteen_bits() -> torch.dtype:
    """bfloat16, or float16 on a GPU that has none."""
    return torch.float16 if profiles.current().dtype == torch.float16 else torch.bfloat16


def random_model(shape: str, approach: str, precision: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, which costs the same bytes and seconds as a trained one, and needs no download.

    With `nf4` each linear layer is quantized (twice) as soon as it is made: the whole model is never there in 16 bits.
    """
    device, dtype = profiles.current().device, torch.float32 if precision == "float32" else sixteen_bits()
    config = base_models.shape_of(shape)
    config.num_labels, config.use_cache, config.pad_token_id = N_LABELS, False, config.pad_token_id or 0
    kind = transformers.AutoModelForSequenceClassification if approach == "head" else transformers.AutoModelForCausalLM
    with init_empty_weights():  # weights on the meta device, buffers real
        model = kind.from_config(config, dtype=dtype)
    model.tie_weights()
    for name, layer in list(model.base_model.named_modules()):
        if precision == "nf4" and isinstance(layer, torch.nn.Linear):
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            model.base_model.set_submodule(name, Linear4bit(*sizes, dtype, quant_type="nf4", device="meta"))
    set_seed(seed)
    for name, empty in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        new = torch.empty(empty.shape, dtype=dtype, device=device)
        new = new.normal_(std=config.initializer_range) if new.ndim > 1 else new.fill_(attribute == "weight")  # norms, biases
        if isinstance(empty, Params4bit):
            new = Params4bit(new, requires_grad=False, quant_type="nf4", module=empty.module).to(device)
        else:
            new = torch.nn.Parameter(new)
        setattr(model.get_submodule(module), attribute, new)
    model.tie_weights()
    return model.to(device)


def documents(n: int, longest: int, vocabulary: int, seed: int = 0) -> Dataset:
    """`n` documents of random tokens: `input_ids`, `length`, `label`; half as long as `longest` in the middle, none longer."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(np.log(longest / 2), 0.6, n), LABEL_TOKENS + 2, longest).astype(int)
    lengths[-1] = longest
    ids = [draw.integers(10, vocabulary, length).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "length": lengths, "label": draw.integers(0, N_LABELS, n)})


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.moments = []  # at which steps begin and end

    def on_step_begin(self, *arguments, **options) -> None:
        if profiles.current().device == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    on_step_end = on_step_begin


def train(
    model: PeftModel, approach: str, precision: str, recipe: Recipe, texts: Dataset, *, batch_size: int, learning_rate: float
) -> tuple[list[float], list[float]]:
    """Train on one pass over `texts` with the stock trainers, set as `recipe` says; the losses and the seconds of its steps."""
    clock, tokenizer = _Clock(), base_models.load_tokenizer()  # only its padding is used
    with tempfile.TemporaryDirectory() as folder:
        options = _TRAINING | dict(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            optim=recipe.optim,
            bf16=precision != "float32" and sixteen_bits() == torch.bfloat16,  # not by model.dtype: kbit preparation changes that
            fp16=precision != "float32" and sixteen_bits() == torch.float16,
            train_sampling_strategy=recipe.sampling,
            activation_checkpointing=recipe.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": recipe.reentrant},
            use_cpu=profiles.current().device == "cpu",
        )
        if approach == "head":
            texts, collator = texts.rename_column("label", "labels"), transformers.DataCollatorWithPadding(tokenizer)
        else:
            labels = [[-100] * (len(ids) - LABEL_TOKENS) + ids[-LABEL_TOKENS:] for ids in texts["input_ids"]]
            texts = texts.remove_columns("label").add_column("labels", labels)
            collator = transformers.DataCollatorForSeq2Seq(tokenizer)
        if approach == "head" or recipe.loss == "all":
            trainer = Trainer(model, TrainingArguments(**options), data_collator=collator, train_dataset=texts)
        else:
            kind = SFTTrainer if recipe.loss == "trl" else LabelTokensTrainer
            settings = SFTConfig(**options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
            trainer = kind(model, settings, train_dataset=texts, processing_class=tokenizer)
            if recipe.float32_adapters:
                float32_adapters(trainer.model)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, np.diff(clock.moments)[::2].tolist()


def run(key: dict) -> dict:
    """Measure a recipe, `key` being one of a session's `step_keys`, and return its record.

    The peak is that of two steps on documents as long as the longest; losses and seconds are those of `steps` steps on documents
    of mixed lengths, the first two steps left out of the rate. BookError: the batch cannot fit into a GPU's memory.
    """
    give_back_memory()
    shape, approach, precision, batch_size = (key[name] for name in ("shape", "approach", "precision", "batch_size"))
    recipe = Recipe(**{name: value for name, value in key["recipe"].items() if (name, value) not in FORMER.items()})
    options = {name: key[name] for name in ("batch_size", "length", "rank", "precision")} | {"recipe": recipe}
    counted = count_step(shape, approach, **options, label_tokens=LABEL_TOKENS)
    if profiles.current().device == "cuda":
        check_fits(shape, approach, torch.cuda.get_device_properties(0).total_memory, **options)
    model = random_model(shape, approach, precision, key["seed"])
    vocabulary = min(model.config.vocab_size, len(base_models.load_tokenizer()))
    model = adapted(model, approach, precision, key["rank"], recipe)
    frozen, trained = held(model)
    longest = documents(2 * batch_size, 2, vocabulary).map(lambda row: {"input_ids": [10] * key["length"]})
    with allocated() as cost:
        train(model, approach, precision, recipe, longest, batch_size=batch_size, learning_rate=0.0)
    texts = documents(key["steps"] * batch_size, key["length"], vocabulary, key["seed"])
    losses, seconds = train(model, approach, precision, recipe, texts, batch_size=batch_size, learning_rate=5e-4)
    return {
        "key": key,
        "counted": counted,
        "held": {"frozen": frozen, "trained": trained},
        "peak": frozen + trained + cost.peak,
        "losses": losses,
        "seconds": seconds,
        "documents_per_second": batch_size * len(seconds[2:]) / sum(seconds[2:]),
        "provenance": provenance() | {"dtype": None, "quantization": None},
    }
