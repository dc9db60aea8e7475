"""A trained classifier as ONNX, in float32 or int8, for machines without PyTorch (chapter 10).

`book/scripts/score.py` runs what is written here.
"""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.errors import BookError


class _Logits(torch.nn.Module):
    """A classifier that returns its logits alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def to_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    folder: str | Path,
    suffix: str = "",
    tokens: int | None = None,
) -> Path:
    """Write `model.onnx`, `tokenizer.json` and `labels.json` into a new folder.

    Any number of documents and tokens can be read by what is written; padding goes where the tokenizer puts it.

    Args:
        model: of `AutoModelForSequenceClassification`, in float32, adapters merged.
        suffix: what was put behind each text in training.
        tokens: of each text that are read, as in training; the suffix comes behind them. None for all.

    Raises:
        BookError: the folder holds something, adapters are not merged, or the weights are not float32.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise BookError(f"{folder} holds something already. Give a new folder; nothing was overwritten.")
    if isinstance(model, PeftModel):
        raise BookError("The adapters lie beside the weights. Merge them first: model.merge_and_unload().")
    if model.dtype != torch.float32:
        raise BookError(f"The weights are {model.dtype}, and ONNX on a CPU wants float32. Load the base model so, then merge.")
    folder.mkdir(parents=True, exist_ok=True)
    batch = tokenizer(["one text", "and one that is longer"], padding=True, return_tensors="pt")
    batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    free = torch.export.Dim.DYNAMIC
    with _quiet(), torch.inference_mode(False):
        torch.onnx.export(
            _Logits(model.eval()),
            kwargs=batch,
            f=str(folder / "model.onnx"),
            dynamic_shapes={name: {0: free, 1: free} for name in batch},
            input_names=list(batch),
            output_names=["logits"],
            dynamo=True,
            external_data=False,
            optimize=False,
        )
    tokenizer.save_pretrained(folder)
    described = {"labels": labels, "suffix": suffix, "tokens": tokens}
    described |= {"pad_id": tokenizer.pad_token_id, "max_length": tokenizer.model_max_length}
    (folder / "labels.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    return folder


def to_int8(folder: str | Path, out: str | Path) -> Path:
    """The exported classifier of `folder` with the weights of its matrix products in 8 bits; activations as they come.

    Raises:
        BookError: `folder` holds no exported classifier, or `out` holds something.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder, out = Path(folder), Path(out)
    if not (folder / "model.onnx").exists():
        raise BookError(f"{folder} holds no model.onnx. Give the folder that to_onnx wrote.")
    if out.exists() and any(out.iterdir()):
        raise BookError(f"{out} holds something already. Give a new folder; nothing was overwritten.")
    out.mkdir(parents=True, exist_ok=True)
    with _quiet():
        quantize_dynamic(folder / "model.onnx", out / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    for name in ("tokenizer.json", "labels.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    return out


@contextlib.contextmanager
def _quiet():
    """Without the exporter's remarks about libraries that are not there."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
