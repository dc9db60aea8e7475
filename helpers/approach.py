"""What all approaches have in common: they are fitted on a task, give every label a probability, and lie on disk as a folder.

The way of a document: a prompt is made of its text, between prefix and suffix (`_prompts`), and read in batches of tokens
(`prompts.batches`). The head reads the last token's state; instruction tuning scores every label behind the prompt
(`label_scoring`). Out comes a row of probabilities, and with gold labels and cost a `Predictions`, which `evaluation` judges.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from helpers import base_models, profiles, prompts
from helpers.checkpoints import resumable, write_whole
from helpers.errors import BookError, check_texts
from helpers.evaluation import Predictions, measure
from helpers.frozen_layers import cached_lower_layers
from helpers.records import DEFAULTS
from helpers.tasks import Task, column, first_tokens, texts_of

SUFFIX = "\n\nThe topic of this article is"
MODULES = dict.fromkeys(("Majority", "TfidfSvm", "FrozenProbe", "FineTunedEncoder"), "helpers.baselines")
MODULES |= {"EmbeddingHead": "helpers.embedding_head", "InstructionTuned": "helpers.instruction"}  # where `load` finds a class
_NOTE = "approach.json"  # what was saved


class Approach:
    """A classifier of text, with scikit-learn's manners.

    `fit` or `load` give it `labels`, in the order of the columns of probabilities, and `multi_label` (several a document).
    Subclasses are dataclasses of settings with `_fit(task)`, `_predict_proba(texts, batch_size)`, `_save(folder)`, `_load(…)`.
    """

    name: str
    labels: tuple[str, ...]
    multi_label: bool
    training_seconds: float = 0.0
    trainable_parameters: int = 0
    callbacks: ClassVar[Sequence[TrainerCallback]] = ()  # for the Trainer of those that have one
    use: dict = {}  # what `helpers.compare` saves with it: how many `tokens` of a text are read, how labels are decided
    shorten: Callable[[str], str] = str  # what `predict_proba` reads of a text: all of it, or the first `use["tokens"]`

    def fit(self, task: Task) -> Self:
        """Train on `task.train`; nothing is learned from validation or test.

        BookError: what the approach cannot learn from, such as a document that is longer than its model takes.
        """
        self.labels, self.multi_label = task.labels, task.multi_label
        with measure() as cost, profiles.fast_products():
            self._fit(task)
        self.training_seconds = cost.seconds if self.trainable_parameters else 0.0  # a model as it comes is only loaded
        return self

    def predict_proba(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        """Probability of every label for every text, shape (n_texts, n_labels); rows sum to 1, except in a multi-label task.

        BookError: a text is empty, or longer than the model takes.
        """
        check_texts(texts, "texts")
        with profiles.fast_products():
            return self._predict_proba([self.shorten(text) for text in texts], batch_size)

    def predict(self, documents: Dataset, batch_size: int = 32) -> Predictions:
        """`predict_proba` for `documents` (columns `text`, `label` and, if they have groups, `group`), with gold labels and cost.

        BookError: a column is missing, or as `predict_proba`.
        """
        texts, gold = texts_of(documents), column(documents, "label")
        with measure() as cost:
            probabilities = self.predict_proba(texts, batch_size)
        return Predictions(
            self.name,
            self.labels,
            probabilities,
            gold,
            seconds=cost.seconds,
            training_seconds=self.training_seconds,
            trainable_parameters=self.trainable_parameters,
            groups=np.array(documents["group"]) if "group" in documents.column_names else None,
        )

    def save(self, folder: str | Path) -> Path:
        """Store what was trained, labels and settings in `folder`; a base model is not copied.

        BookError: nothing was trained yet, or `folder` holds something else.
        """
        folder = Path(folder).expanduser()
        if not hasattr(self, "labels"):
            raise BookError("Nothing was trained, so there is nothing to save. Call fit first.")
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / _NOTE).exists())):
            raise BookError(f"{folder} exists and holds something else. Give a new folder; nothing was overwritten.")
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)
        known = ("labels", "multi_label", "training_seconds", "trainable_parameters", "use")
        note = {"approach": type(self).__name__, **{name: getattr(self, name) for name in known}, "settings": asdict(self)}
        if hasattr(self, "_load_base"):
            note["settings"]["base_model"], note["base"] = base_models.identity(self.base_model)
        write_whole(folder / _NOTE, json.dumps(note, indent=2, ensure_ascii=False))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` stored, ready to predict; `Approach.load` takes the folder of any approach.

        BookError: `folder` holds nothing that `save` wrote, another approach, or one with the options of an ablation.
        """
        folder = Path(folder).expanduser()
        if not (folder / _NOTE).exists():
            raise BookError(f"{folder} holds no saved approach: there is no {_NOTE} in it. Give the folder that `save` wrote.")
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        name, settings = note["approach"], note["settings"]
        if cls is Approach:
            if name not in MODULES:
                raise BookError(f"{folder} holds {name}: use helpers.lab.approaches.{name}.load.")
            cls = getattr(importlib.import_module(MODULES[name]), name)
        if name != cls.__name__:
            raise BookError(f"{folder} holds {name}, not {cls.__name__}. Use {name}.load.")
        known = {each.name for each in fields(cls)}
        for other in settings.keys() - known - {"best_epoch"}:  # which only training knows
            if settings[other] != DEFAULTS[name][other]:
                raise BookError(f"{folder} was trained with {other}={settings[other]!r}: use helpers.lab.approaches.{name}.load.")
        approach = cls(**{setting: value for setting, value in settings.items() if setting in known})
        approach.labels, approach.multi_label, approach.use = tuple(note["labels"]), note["multi_label"], note.get("use", {})
        approach.training_seconds, approach.trainable_parameters = note["training_seconds"], note.get("trainable_parameters", 0)
        if "base" in note and base_models.identity(approach.base_model)[1] != note["base"]:
            raise BookError(f"{folder} was trained on other weights than {approach.base_model} holds now. Put those back.")
        approach._load(folder)
        if "tokens" in approach.use:
            approach.shorten = first_tokens(AutoTokenizer.from_pretrained(folder / "tokenizer"), approach.use["tokens"])
        return approach

    def count_tokens(self, texts: list[str]) -> int:
        """Tokens that the model reads of these texts, padding left out; 0 for approaches without a tokenizer."""
        return 0


@dataclass
class LoraApproach(Approach):
    """An approach that trains an adapter on a causal base model: `EmbeddingHead` or `InstructionTuned`.

    Subclasses have `_load_base() -> (model, tokenizer)` and `_train(task, options)`, which puts an adapter on `model` and trains
    it. Rank and learning rate were chosen on validation documents of BBC News, 32 per class.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX  # between the document and its label, so that the last token asks for the topic
    prefix: str = ""  # before the document, such as an instruction; `{labels}` here or in the suffix is replaced by all labels
    n_layers: int | None = 10  # LoRA on the linear layers of so many upper blocks; None for all
    rank: int = 16
    learning_rate: float = 5e-4
    epochs: int = 2
    batch_size: int = 8
    seed: int = 0
    checkpoints: str | None = None  # a folder that gets one after every epoch, from which a stopped training goes on

    model: ClassVar[PeftModel | PreTrainedModel]  # `ClassVar`, so that it is no setting
    tokenizer: ClassVar[PreTrainedTokenizerBase]
    precision: ClassVar[str | None] = None  # of the base model (`profiles.current`); a setting in the lab, as the next one
    lora: ClassVar[dict] = {}  # more options of `LoraConfig`
    lower_states: ClassVar[dict | None] = None  # `states` of `cached_lower_layers`, if trainings share them

    def __post_init__(self) -> None:
        """Refuse settings that no training can have, with a BookError."""
        for name, least in {"rank": 1, "batch_size": 1, "epochs": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise BookError(f"{name} is {value!r}, but it has to be a whole number, {least} or more.")
        if not isinstance(self.learning_rate, (int, float)) or not self.learning_rate >= 0:
            hint = " YAML reads 5e-4 as text: write 5.0e-4." if isinstance(self.learning_rate, str) else ""
            raise BookError(f"learning_rate is {self.learning_rate!r}, but it has to be 0 or more, such as 5e-4.{hint}")

    def _fit(self, task: Task) -> None:
        with self._training_options(task) as options:
            set_seed(self.seed)
            self.model, self.tokenizer = self._load_base()
            with cached_lower_layers(self.model, self.n_layers if self.epochs else None, self.lower_states):
                self._train(task, options)
        self.model.eval()
        if isinstance(self.model, PeftModel):
            self.trainable_parameters = self.model.num_parameters(only_trainable=True)

    def _words(self) -> tuple[str, ...]:
        """What is written for each label."""
        return self.labels

    def _frame(self) -> tuple[str, str]:
        """What stands before and behind each document."""
        listed = ", ".join(self._words())
        return self.prefix.replace("{labels}", listed), self.suffix.replace("{labels}", listed)

    def _prompts(self, texts: list[str]) -> list[str]:
        """The documents as the model reads them, up to their labels. BookError: as `prompts.sanitize_prompts`."""
        return prompts.sanitize_prompts(texts, self.tokenizer, *self._frame())

    def _save(self, folder: Path) -> None:
        if not isinstance(self.model, PeftModel):
            raise BookError("Nothing was trained, so there is nothing to save. Call fit with epochs=1 or more.")
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _load(self, folder: Path) -> None:
        base, _ = self._load_base()  # the model that the adapter is put on
        self.model = PeftModel.from_pretrained(base, folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @contextmanager
    def _training_options(self, task: Task) -> Iterator[dict]:
        """The options of `TrainingArguments` that both approaches share, with those for checkpoints (`checkpoints.resumable`)."""
        options = {"num_train_epochs": self.epochs, "per_device_train_batch_size": self.batch_size}
        options |= {"learning_rate": self.learning_rate, "seed": self.seed}
        settings = {name: value for name, value in asdict(self).items() if name not in ("checkpoints", "name")}
        settings |= {"approach": type(self).__name__, "documents": task.content_hash()}
        with resumable(self.checkpoints, settings) as checkpoints:
            yield options | checkpoints

    def count_tokens(self, texts: list[str]) -> int:
        """Tokens of the texts as the model reads them: with what stands around them."""
        return sum(map(len, self.tokenizer(self._prompts(texts)).input_ids))
