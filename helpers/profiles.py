"""`quick` on a laptop, `full` on a GPU: the same cells, one switch.

The switch is the hardware; the environment variable BOOK_PROFILE overrides it.
"""

import os
import warnings
from dataclasses import dataclass, replace

import datasets
import torch
import transformers
from transformers import BitsAndBytesConfig

from helpers.errors import BookError, unknown_name

PROFILE_VARIABLE = "BOOK_PROFILE"


@dataclass(frozen=True)
class Profile:
    """What the hardware decides.

    Attributes:
        name: `quick` (any CPU) or `full` (one CUDA GPU).
        device: where the model lies, for `device_map`.
        dtype: of the weights that are not quantized, and of the computation.
        quantization: passed as `quantization_config=`; None on a CPU, where 4-bit training is slower and not smaller
            than the float32 it saves (chapter 02 measures it).
        attention: passed as `attn_implementation=`; on a CPU the plain one is faster for short texts.
    """

    name: str
    device: str
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None = None
    attention: str = "sdpa"

    def __str__(self) -> str:
        where = torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        how = "NF4, double quantization" if self.quantization else "no quantization"
        return f"profile {self.name}: {where}, {str(self.dtype).removeprefix('torch.')}, {how}"


def current(precision: str | None = None) -> Profile:
    """The profile for this machine, or the one BOOK_PROFILE names.

    Args:
        precision: `nf4`, `bfloat16` or `float32` for the base model's weights, instead of what the profile says.

    Raises:
        BookError: BOOK_PROFILE is neither quick nor full, or asks for full where there is no GPU; an unknown precision.
    """
    profile = _of_machine()
    if precision is None:
        return profile
    if precision not in ("nf4", "bfloat16", "float32"):
        raise unknown_name("precision", precision, ("nf4", "bfloat16", "float32"))
    if precision == "nf4":
        return replace(profile, quantization=_nf4(profile.dtype))
    return replace(profile, dtype=getattr(torch, precision), quantization=None)


def _of_machine() -> Profile:
    gpu = torch.cuda.is_available()
    name = os.environ.get(PROFILE_VARIABLE) or ("full" if gpu else "quick")
    if name not in ("quick", "full"):
        raise unknown_name("profile", name, ("quick", "full"))
    if name == "quick":
        torch.set_float32_matmul_precision("medium")  # products through oneDNN, about twice as fast; records say so
        return Profile("quick", "cpu", torch.float32, attention="eager")
    if not gpu:
        raise BookError(f"{PROFILE_VARIABLE}=full needs a CUDA GPU and none is visible. Unset it to run the quick profile.")
    # Without native bfloat16 (a T4, say) float32 is the safe choice: float16 overflows in some models and needs loss scaling.
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return Profile("full", "cuda", dtype, _nf4(dtype))


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def start(seed: int = 0) -> Profile:
    """First call of every chapter: seed everything, silence loading bars, print and return the profile."""
    transformers.set_seed(seed)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # PEFT 0.21 still calls transformers' checkpointing by its old names; nothing in this book does.
    old = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)
    profile = current()
    print(profile)
    return profile
