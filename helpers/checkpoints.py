"""A training that can be stopped at any time and goes on where it was: its options, its checkpoints, its run."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer

from helpers.errors import BookError
from helpers.profiles import Profile
from helpers.records import DEFAULTS

_COMPLETE = "trainer_state.json"  # what the Trainer writes last of a checkpoint


@contextmanager
def resumable(folder: str | None, settings: dict) -> Iterator[dict]:
    """`output_dir` and `save_…` of `TrainingArguments`: a checkpoint after every epoch, or none and a scratch folder.

    Args:
        folder: for the checkpoints; None for none.
        settings: what is trained there, with the name of the approach as `approach`; noted in the folder.

    BookError: the folder holds a training with other settings or on other documents.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield {"output_dir": scratch, "save_strategy": "no"}
        return
    note = Path(folder).expanduser() / "training.json"
    settings = json.loads(json.dumps(settings))  # as it will be read: a tuple becomes a list
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        before, now = ({**DEFAULTS.get(settings["approach"], {}), **each} for each in (before, settings))
        for name, value in now.items():
            if before.get(name) != value:
                raise BookError(
                    f"{note.parent} holds checkpoints of another training: {name} was {before.get(name)!r}, now it is "
                    f"{value!r}. Give an empty folder, or the same settings and documents."
                )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(settings, indent=2))
    # two are kept, so that one is complete whenever the process ends
    yield {"output_dir": str(note.parent), "save_strategy": "epoch", "save_total_limit": 2}


def write_whole(path: Path, content: str) -> None:
    """Write a text file that is complete or as it was before, whenever the process is killed."""
    written = path.with_name(f"{path.name}.tmp")
    written.write_text(content, encoding="utf-8")
    written.replace(path)


def trainer_options(profile: Profile) -> dict:
    """What every training has in common: a tenth of warm-up, autocast where the base computes in 16 bits, no printing."""
    return {
        "warmup_steps": 0.1,
        "bf16": profile.dtype == torch.bfloat16,
        "fp16": profile.dtype == torch.float16,
        "use_cpu": profile.device == "cpu",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def run_training(trainer: Trainer) -> None:
    """Run `trainer` without printing, from the last complete checkpoint in its folder if there is one."""
    complete = [state.parent for state in Path(trainer.args.output_dir).glob(f"checkpoint-*/{_COMPLETE}") if _whole(state)]
    last = max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    # Under bf16 the forward pass stays wrapped in autocast; without that, a model predicts what it will when it is loaded.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _whole(state: Path) -> bool:
    """Whether the Trainer was alive until the end of this file."""
    try:
        return bool(json.loads(state.read_text(encoding="utf-8")))
    except json.JSONDecodeError:
        return False
