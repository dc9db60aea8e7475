"""What both approaches share: a training that can be stopped and goes on, and what was trained on disk."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer

from helpers.errors import BookError
from helpers.tasks import Task

_COMPLETE = "trainer_state.json"  # what the Trainer writes last


class Adapted:
    """An approach that trains an adapter on `base_model`: `EmbeddingHead` or `InstructionTuned`."""

    labels: tuple[str, ...]
    multi_label: bool
    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training_seconds: float

    def __post_init__(self) -> None:
        """Refuse settings that no training can have.

        Raises:
            BookError: rank, batch size, learning rate or epochs too small.
        """
        for name, least in {"rank": 1, "batch_size": 1, "epochs": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise BookError(f"{name} is {value!r}, but it has to be a whole number, {least} or more.")
        if not isinstance(self.learning_rate, (int, float)) or not self.learning_rate >= 0:
            hint = " YAML reads 5e-4 as text: write 5.0e-4." if isinstance(self.learning_rate, str) else ""
            raise BookError(f"learning_rate is {self.learning_rate!r}, but it has to be 0 or more, such as 5e-4.{hint}")

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model that the adapter is put on, and its tokenizer."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """Store adapter, head, tokenizer, labels and settings in `folder`: megabytes, the base model is not copied.

        Raises:
            BookError: nothing was trained yet, or `folder` holds something else.
        """
        folder = Path(folder).expanduser()
        if not isinstance(getattr(self, "model", None), PeftModel):
            raise BookError("Nothing was trained, so there is nothing to save. Call fit first, with epochs=1 or more.")
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "approach.json").exists())):
            raise BookError(f"{folder} exists and holds something else. Give a new folder; nothing was overwritten.")
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        known = {"approach": type(self).__name__, "labels": self.labels, "multi_label": self.multi_label}
        described = {**known, "training_seconds": self.training_seconds, "settings": asdict(self)}
        (folder / "approach.json").write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Adapted":
        """What `save` stored, ready to predict, on the base model quantized as the profile says.

        Raises:
            BookError: `folder` holds nothing that `save` wrote, or another approach.
        """
        folder = Path(folder).expanduser()
        if not (folder / "approach.json").exists():
            raise BookError(
                f"{folder} holds no saved approach: there is no approach.json in it. Give the folder that `save` wrote."
            )
        described = json.loads((folder / "approach.json").read_text(encoding="utf-8"))
        if described["approach"] != cls.__name__:
            raise BookError(f"{folder} holds {described['approach']}, not {cls.__name__}. Use {described['approach']}.load.")
        approach = cls(**described["settings"])
        approach.labels, approach.multi_label = tuple(described["labels"]), described["multi_label"]
        approach.training_seconds = described["training_seconds"]
        base, _ = approach._load_base()
        approach.model = PeftModel.from_pretrained(base, folder).eval()
        approach.tokenizer = AutoTokenizer.from_pretrained(folder)
        return approach

    def _claim_checkpoints(self, task: Task) -> None:
        """Note in the checkpoint folder what is trained there.

        Raises:
            BookError: the folder holds a training with other settings or on other documents.
        """
        if self.checkpoints is None:
            return
        settings = {name: value for name, value in asdict(self).items() if name not in ("checkpoints", "name")}
        settings |= {"approach": type(self).__name__, "documents": task.content_hash()}
        note = Path(self.checkpoints).expanduser() / "training.json"
        if note.exists():
            try:
                before = json.loads(note.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise BookError(
                    f"{note} is damaged ({error.msg}). Delete its folder to train anew, or give another one."
                ) from error
            for name, value in settings.items():
                if before.get(name) != value:
                    raise BookError(
                        f"{note.parent} holds checkpoints of another training: {name} was {before.get(name)!r}, now it is "
                        f"{value!r}. Give an empty folder, or the same settings and documents."
                    )
        note.parent.mkdir(parents=True, exist_ok=True)
        written = note.with_suffix(".tmp")  # renamed when complete: a process may be killed at any time
        written.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        written.replace(note)


@contextlib.contextmanager
def checkpoint_options(checkpoints: str | None) -> Iterator[dict]:
    """`output_dir` and `save_…` of `TrainingArguments`: a checkpoint after every epoch, or none and a scratch folder."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield dict(output_dir=scratch, save_strategy="no")
    else:  # two are kept, so that one is complete whenever the process ends
        yield dict(output_dir=str(Path(checkpoints).expanduser()), save_strategy="epoch", save_total_limit=2)


def keep_in_float32(trainer: Trainer) -> None:
    """Make what is trained float32 again, in place: SFTTrainer of TRL 1.16 casts adapters on a 4-bit model to bfloat16."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train(trainer: Trainer) -> None:
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
