import pytest
import torch

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


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_full_is_four_bit_and_computes_in_bfloat16_where_the_gpu_does(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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
