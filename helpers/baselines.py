"""What any approach has to beat: majority class, TF-IDF + linear SVM, a probe on the frozen model, an encoder (chapter 01)."""

import re
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
from scipy.special import expit, softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from transformers import AutoModel, AutoModelForSequenceClassification, set_seed

from helpers import base_models, prompts
from helpers.approach import SUFFIX, Approach
from helpers.checkpoints import resumable
from helpers.embedding_head import EmbeddingHead, train_classifier
from helpers.embeddings import embed, fit_probe
from helpers.tasks import Task, texts_of


class _OneFile(Approach):
    """What it has learned, `model`, lies in one file."""

    def _save(self, folder: Path) -> None:
        joblib.dump(self.model, folder / "model.joblib")

    def _load(self, folder: Path) -> None:
        self.model = joblib.load(folder / "model.joblib")


@dataclass
class Majority(_OneFile):
    """Always the most frequent training label; its probabilities are the training frequencies."""

    name: str = "majority class"

    def _fit(self, task: Task) -> None:
        gold = np.array(task.train["label"])
        self.model = (gold if task.multi_label else np.eye(len(self.labels))[gold]).mean(axis=0)

    def _predict_proba(self, texts: list[str], batch_size: int) -> np.ndarray:
        return np.tile(self.model, (len(texts), 1))


@dataclass
class TfidfSvm(_OneFile):
    """TF-IDF, then a linear support vector machine: seconds to train, hard to beat.

    `analyzer` is scikit-learn's: `word` for words and word pairs, `char_wb` for 2 to 5 characters within words.
    An SVM has no probabilities; its margins go through a softmax here (a sigmoid where each label has its own SVM), so their
    order means something and their size does not.
    """

    C: float = 1.0
    analyzer: str = "word"
    name: str = "TF-IDF + linear SVM"

    def _fit(self, task: Task) -> None:
        svm = LinearSVC(C=self.C, random_state=0)
        lengths = {"word": (1, 2), "char_wb": (2, 5)}[self.analyzer]
        words = r"(?u)\b\w\w+\b"  # scikit-learn's own, which sees none in texts of emoji
        if self.analyzer == "word" and not any(re.search(words, text) for text in task.train["text"]):
            words = r"\S+"
        features = TfidfVectorizer(analyzer=self.analyzer, ngram_range=lengths, sublinear_tf=True, token_pattern=words)
        self.model = make_pipeline(features, OneVsRestClassifier(svm) if task.multi_label else svm)
        self.model.fit(list(task.train["text"]), np.array(task.train["label"]))
        planes = len(self.labels) if task.multi_label else len(self.model[-1].coef_)
        self.trainable_parameters = planes * len(features.vocabulary_)

    def _predict_proba(self, texts: list[str], batch_size: int) -> np.ndarray:
        margins = self.model.decision_function(texts)
        if margins.ndim == 1:  # two labels: one margin
            margins = np.stack([-margins, margins], axis=1) / 2
        return expit(margins) if self.multi_label else softmax(margins, axis=1)


@dataclass
class FrozenProbe(Approach):
    """Logistic regression on the embeddings of the base model as it comes, pooled as `embeddings.embed` says.

    An empty suffix reads the bare last token. `quantized` is as the profile says; False for a small encoder that needs none.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX
    pooling: str = "last"
    quantized: bool = True
    C: float = 0.1  # of `fit_probe`
    name: str = "frozen embedding + probe"

    def _load_base(self) -> None:
        self.tokenizer = base_models.load_tokenizer(self.base_model)
        self.model = base_models.load(self.base_model, AutoModel, None if self.quantized else "float32")

    def _fit(self, task: Task) -> None:
        self._load_base()
        self.probe = self._fit_probe(self._features(texts_of(task.train)), np.array(task.train["label"]), self.C)
        self.trainable_parameters = self.probe.coef_.size

    _fit_probe = staticmethod(fit_probe)

    def _features(self, texts: list[str]) -> np.ndarray:
        texts = prompts.sanitize_prompts(texts, self.tokenizer, after=self.suffix)
        return embed(texts, self.model, self.tokenizer, self.pooling)

    def _predict_proba(self, texts: list[str], batch_size: int) -> np.ndarray:
        logits = self.probe.decision_function(self._features(texts))
        return expit(logits) if self.multi_label else softmax(logits, axis=1)

    def _save(self, folder: Path) -> None:
        joblib.dump(self.probe, folder / "probe.joblib")

    def _load(self, folder: Path) -> None:
        self._load_base()
        self.probe = joblib.load(folder / "probe.joblib")


@dataclass
class FineTunedEncoder(Approach):
    """An encoder of BERT's kind with a fresh head, all of it trained: what the paper compares with.

    Documents beyond its length are refused. The defaults were chosen on validation documents of BBC News, 32 per class.
    """

    base_model: str = base_models.ENCODER
    learning_rate: float = 2e-4
    epochs: int = 5
    batch_size: int = 16
    seed: int = 0
    name: str = "MiniLM, fine-tuned"

    def _fit(self, task: Task) -> None:
        set_seed(self.seed)
        self.tokenizer = base_models.load_tokenizer(self.base_model)
        texts, targets = self._training_targets(task)
        options = {"num_labels": len(task.labels)} | self._model_options()
        self.model = base_models.load(self.base_model, AutoModelForSequenceClassification, "float32", **options)
        settings = {"learning_rate": self.learning_rate, "num_train_epochs": self.epochs, "seed": self.seed}
        settings |= {"per_device_train_batch_size": self.batch_size, "precision": "float32"}
        settings |= {"trainer": {"compute_loss_func": self._loss, "callbacks": [*self.callbacks]}}
        with resumable(None, {}) as scratch:
            train_classifier(self.model, self.tokenizer, self._prompts(texts), targets, **settings, **scratch)
        self.model.eval()
        self.trainable_parameters = self.model.num_parameters(only_trainable=True)

    _loss = None  # the model's own

    def _training_targets(self, task: Task) -> tuple[list[str], list]:
        return texts_of(task.train), list(task.train["label"])

    def _model_options(self) -> dict:
        return {}

    def _prompts(self, texts: list[str]) -> list[str]:
        return prompts.sanitize_prompts(texts, self.tokenizer)

    _predict_proba = EmbeddingHead._predict_proba

    def _save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _load(self, folder: Path) -> None:
        self.tokenizer = base_models.load_tokenizer(str(folder))
        self.model = base_models.load(str(folder), AutoModelForSequenceClassification, "float32")
