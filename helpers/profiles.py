"""`quick` on a laptop, `full` on a GPU: the same cells; the hardware decides, or the environment variable BOOK_PROFILE."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import torch
import transformers
from bitsandbytes import cextension
from transformers import BitsAndBytesConfig

from helpers.errors import BookError, check_name

PROFILE_VARIABLE = "BOOK_PROFILE"
PRECISIONS = ("nf4", "bfloat16", "float32")  # of a base model's weights


@dataclass(frozen=True)
class Profile:
    """What the hardware decides."""

    name: str  # `quick` (any CPU) or `full` (one CUDA GPU)
    device: str  # where the model lies, for `device_map`
    dtype: torch.dtype  # of the weights that are not quantized, and of the computation
    quantization: BitsAndBytesConfig | None = None  # none on a CPU, where it is slower and saves nothing (chapter 02)
    attention: str = "sdpa"  # for `attn_implementation`; on a CPU the plain one is faster for short texts
    float32_products: str = "highest"  # for `fast_products`

    def __str__(self) -> str:
        where = torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        how = "NF4, double quantization" if self.quantization else "no quantization"
        return f"profile {self.name}: {where}, {str(self.dtype).removeprefix('torch.')}, {how}"


def current(precision: str | None = None) -> Profile:
    """The profile for this machine, or the one BOOK_PROFILE names.

    Args:
        precision: one of `PRECISIONS`, instead of what the profile says.

    Raises:
        BookError: an unknown profile or precision, or the full profile where there is no GPU or no bitsandbytes for it.
    """
    name = os.environ.get(PROFILE_VARIABLE) or ("full" if torch.cuda.is_available() else "quick")
    check_name("profile", name, ("quick", "full"))
    check_name("precision", precision or "nf4", PRECISIONS)
    quantized = precision == "nf4" or (precision is None and name == "full")
    if name == "quick":
        device, dtype, attention, products = "cpu", torch.float32, "eager", "medium"
    else:
        check_cuda(quantized)
        # A T4 emulates bfloat16, slowly, so it computes in float16; what is trained is float32 there too, its gradients scaled.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        device, dtype, attention, products = "cuda", torch.bfloat16 if native else torch.float16, "sdpa", "highest"
    quantization = None
    if quantized:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        quantization = BitsAndBytesConfig(load_in_4bit=True, **options)
    elif precision:
        dtype = getattr(torch, precision)
    return Profile(name, device, dtype, quantization, attention, products)


def check_cuda(quantized: bool) -> None:
    """Raise a BookError that says why if CUDA cannot be used here or, for a `quantized` model, bitsandbytes cannot."""
    if not torch.cuda.is_available():
        try:
            reason = torch.cuda.init() or "PyTorch gives no reason"
        except (AssertionError, RuntimeError) as error:  # a build for CPUs, no driver, a driver that is too old
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        needed = f"{PROFILE_VARIABLE}=full needs a CUDA GPU and none is visible ({reason})"
        raise BookError(f"{needed}. Unset it to run the quick profile.")
    if quantized and not cextension.lib.compiled_with_cuda:
        failed = f"bitsandbytes cannot load its library for CUDA {torch.version.cuda}: update the GPU's driver"
        raise BookError(f"{failed} (`python -m bitsandbytes` says more), or set {PROFILE_VARIABLE}=quick.")


@contextmanager
def fast_products() -> Iterator[None]:
    """Within the block PyTorch multiplies float32 matrices on a CPU through oneDNN: about twice as fast, and right to 1e-4.

    On a CPU with AMX oneDNN may compute in bfloat16. Around the approaches' own work only: elsewhere a scattered slice, such as
    `logits_to_keep=1` makes, would be slower.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(current().float32_products)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def start(seed: int = 0) -> Profile:
    """First call of every chapter: seed everything, silence loading bars, print and return the profile."""
    transformers.set_seed(seed)
    quiet()
    profile = current()
    print(profile)
    return profile


def quiet() -> None:
    """Silence loading bars, and warnings that no reader can do anything about."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # PEFT 0.21 still calls transformers' checkpointing by its old names; nothing in this book does.
    old = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)
