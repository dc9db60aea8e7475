"""A T4 computes in float16: what a CPU can show of that (dtypes, loss scaling, scores), on a stand-in for its profile."""

import accelerate
import numpy as np
import pytest
import torch
import transformers.trainer
from transformers import Gemma3TextConfig

from helpers import base_models, checkpoints, profiles
from helpers.embedding_head import EmbeddingHead
from helpers.errors import BookError
from helpers.instruction import InstructionTuned

SETTINGS = {"n_layers": 1, "epochs": 6, "learning_rate": 5e-3, "batch_size": 4}
both_approaches = pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])


@pytest.fixture
def t4(monkeypatch):
    """The full profile as on a T4, with the CPU in the GPU's place; trainers use loss scaling, as they do on a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        patch.setattr(profiles.cextension.lib, "compiled_with_cuda", True, raising=False)
        patch.setenv("BOOK_PROFILE", "full")
        asked = {precision: profiles.current(precision) for precision in (None, "float32")}
    assert (asked[None].device, asked[None].dtype) == ("cuda", torch.float16)
    stand_in = {name: profiles.Profile("full", "cpu", each.dtype, each.quantization) for name, each in asked.items()}
    monkeypatch.setattr(profiles, "current", lambda precision=None: stand_in[precision])
    scalers = []

    def with_scaling(**options):
        made = accelerate.Accelerator(**options)
        if made.mixed_precision == "fp16":
            made.native_amp, made.scaler = True, torch.amp.GradScaler("cpu")
            scalers.append(made.scaler)
        return made

    monkeypatch.setattr(transformers.trainer, "Accelerator", with_scaling)
    return scalers


@both_approaches
def test_the_base_is_float16_and_what_is_trained_float32_with_scaled_gradients(t4, kind, tiny_model, tiny_task, tmp_path):
    seen = set()
    torch.manual_seed(0)
    approach = kind(base_model=tiny_model, **SETTINGS)
    approach.fit(tiny_task)
    assert len(t4) == 1 and t4[0].get_scale() > 1
    parameters = approach.model.named_parameters()  # PEFT keeps the head as it was beside the one that is trained
    by_kind = {(each.requires_grad, each.dtype) for name, each in parameters if "original_module" not in name}
    assert by_kind == {(True, torch.float32), (False, torch.float16), (False, torch.uint8)}
    layer = approach.model.get_base_model().model.layers[-1].mlp.up_proj.base_layer
    layer.register_forward_hook(lambda _, given, made: seen.update((given[0].dtype, made.dtype)))
    probabilities = approach.predict_proba(tiny_task.test["text"])
    assert seen == {torch.float16} and layer.compute_dtype == torch.float16
    assert np.isfinite(probabilities).all() and np.allclose(probabilities.sum(1), 1, atol=1e-5)
    again = kind.load(approach.save(tmp_path / "saved")).predict_proba(tiny_task.test["text"])
    assert np.allclose(again, probabilities, atol=5e-3)


@both_approaches
@pytest.mark.parametrize("scaled", [True, False])  # as the classes do; as a cell that sets `bf16=` alone
def test_float16_learns(t4, kind, scaled, tiny_model, tiny_task, monkeypatch):
    if not scaled:
        monkeypatch.setattr(accelerate.Accelerator, "mixed_precision", "no")
    probabilities = kind(base_model=tiny_model, **SETTINGS).fit(tiny_task).predict_proba(tiny_task.train["text"])
    gold = np.array(tiny_task.train["label"])
    assert -np.log(probabilities[range(len(gold)), gold]).mean() < 0.8 * np.log(3)  # three labels, equally many of each


def test_options_of_trainers_follow_the_dtype(t4):
    assert checkpoints.trainer_options(profiles.current())["fp16"] and not checkpoints.trainer_options(profiles.current())["bf16"]
    assert not checkpoints.trainer_options(profiles.current("float32"))["fp16"]


def test_gemma_is_refused_in_float16_before_its_weights_are_read(t4, tmp_path):
    Gemma3TextConfig(hidden_size=16, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(BookError, match="overflows in float16, in which this GPU computes: use precision='float32'"):
        base_models.load(str(tmp_path))
