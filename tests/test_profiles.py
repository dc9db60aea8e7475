import os
import subprocess
import sys

import pytest
import torch
from conftest import BOOK

from helpers import profiles
from helpers.errors import BookError


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("value", ["quick", "", None])
def test_without_a_gpu_it_is_quick_in_float32_on_the_cpu(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("BOOK_PROFILE", raising=False)
    else:
        monkeypatch.setenv("BOOK_PROFILE", value)
    assert profiles.current() == profiles.Profile("quick", "cpu", torch.float32, None, "eager", "medium")


def test_quick_can_be_asked_for_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("BOOK_PROFILE", "quick")
    assert profiles.current().device == "cpu"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profiles.cextension.lib, "compiled_with_cuda", True, raising=False)


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_full_is_four_bit_and_computes_in_16_bits(monkeypatch, gpu, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    monkeypatch.delenv("BOOK_PROFILE", raising=False)
    profile = profiles.current()
    assert (profile.name, profile.device, profile.dtype) == ("full", "cuda", dtype)
    assert profile.quantization.load_in_4bit and profile.quantization.bnb_4bit_use_double_quant
    assert profile.quantization.bnb_4bit_quant_type == "nf4"
    assert profile.quantization.bnb_4bit_compute_dtype == dtype


def test_fast_products_are_those_of_the_profile_and_end_with_the_block(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "quick")
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), profiles.fast_products():
        assert torch.get_float32_matmul_precision() == "medium"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_unknown_profile_suggests_the_nearest(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "Quik")
    with pytest.raises(BookError) as caught:
        profiles.current()
    assert str(caught.value) == "There is no profile 'Quik'. Did you mean 'quick'?"


def test_full_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "full")
    with pytest.raises(BookError, match="BOOK_PROFILE=full needs a CUDA GPU") as caught:
        profiles.current()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (
            RuntimeError(
                "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
                "downloading\nand installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
            ),
            "The NVIDIA driver on your system is too old (found version 11040)",
        ),
    ],
)
def test_why_there_is_no_gpu_is_said_in_one_line(monkeypatch, said, shown):
    def init():
        raise said

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("BOOK_PROFILE", "full")
    with pytest.raises(BookError) as caught:
        profiles.current()
    wanted = f"BOOK_PROFILE=full needs a CUDA GPU and none is visible ({shown}). Unset it to run the quick profile."
    assert str(caught.value) == wanted


def test_a_driver_that_is_too_old_for_bitsandbytes_is_named_where_something_is_quantized(monkeypatch, gpu):
    monkeypatch.setattr(profiles.cextension.lib, "compiled_with_cuda", False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.delenv("BOOK_PROFILE", raising=False)
    with pytest.raises(BookError, match="^bitsandbytes cannot load its library for CUDA .*: update the GPU's driver .*quick.$"):
        profiles.current()
    assert profiles.current("bfloat16").quantization is None


@pytest.mark.parametrize(
    ("variables", "visible"),
    [
        ({}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        ({"LOCAL_RANK": "1"}, None),  # a launcher of several processes
    ],
)
def test_of_two_gpus_one_is_used_unless_somebody_chose(variables, visible):
    code = "import os, helpers; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    rest = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")}
    said = subprocess.run([sys.executable, "-c", code], env=rest | variables, cwd=BOOK.parent, capture_output=True, text=True)
    assert said.stdout.strip() == str(visible)


def test_start_prints_the_profile_and_seeds(monkeypatch, capsys):
    monkeypatch.setenv("BOOK_PROFILE", "quick")
    profile = profiles.start(seed=7)
    printed = capsys.readouterr().out
    assert printed == f"{profile}\n"
    assert printed.startswith("profile quick: CPU, ") and printed.endswith(" threads, float32, no quantization\n")
    first = torch.rand(3)
    profiles.start(seed=7)
    assert torch.equal(torch.rand(3), first)
    profiles.start(seed=8)
    assert not torch.equal(torch.rand(3), first)
