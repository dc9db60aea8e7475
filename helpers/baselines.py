"""What any approach has to beat: the majority class, TF-IDF with a linear SVM, a probe on the frozen model.

All of them take a Task and give Predictions, like the two approaches (chapter 01).
"""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from helpers import base_models
from helpers.embedding_head import SUFFIX, embed, fit_probe, load_classifier
from helpers.evaluation import Predictions, measure
from helpers.tasks import Task


@dataclass
class Majority:
    """Always the most frequent training label; its probabilities are the training frequencies."""

    name: str = "majority class"

    def fit(self, task: Task) -> "Majority":
        """Count the labels of `task.train`."""
        self.labels = task.labels
        with measure() as self._cost:
            self._model = DummyClassifier(strategy="prior").fit(task.train["text"], task.train["label"])
        return self

    def predict(self, documents: Dataset) -> Predictions:
        """The same answer for every document."""
        with measure() as cost:
            probabilities = self._model.predict_proba(documents["text"])
        return _predictions(self, probabilities, documents, cost)


@dataclass
class TfidfSvm:
    """TF-IDF of words and word pairs, then a linear support vector machine: seconds to train, hard to beat.

    An SVM has no probabilities; its margins go through a softmax here, so their order means something and their size
    does not.
    """

    C: float = 1.0
    name: str = "TF-IDF + linear SVM"

    def fit(self, task: Task) -> "TfidfSvm":
        """Vocabulary, weights and separating planes from `task.train`."""
        self.labels = task.labels
        with measure() as self._cost:
            self._model = make_pipeline(
                TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC(C=self.C, random_state=0)
            )
            self._model.fit(task.train["text"], task.train["label"])
        return self

    def predict(self, documents: Dataset) -> Predictions:
        """Softmax of the margins."""
        with measure() as cost:
            margins = self._model.decision_function(documents["text"])
            if margins.ndim == 1:  # two labels: one margin
                margins = np.stack([-margins, margins], axis=1) / 2
        return _predictions(self, softmax(margins, axis=1), documents, cost, self._model[-1].coef_.size)


@dataclass
class FrozenProbe:
    """Logistic regression on the embeddings of the base model as it comes.

    Attributes:
        base_model, suffix: as for `EmbeddingHead`; an empty suffix reads the bare last token.
        pooling: `last` or `mean`, see `embed`.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX
    pooling: str = "last"
    name: str = "frozen embedding + probe"

    def fit(self, task: Task) -> "FrozenProbe":
        """Embed `task.train` and fit the probe on it."""
        self.labels = task.labels
        with measure() as self._cost:
            self._model, self._tokenizer = load_classifier(self.base_model, len(task.labels))
            self._probe = fit_probe(self._embed(task.train), np.array(task.train["label"]))
        return self

    def _embed(self, documents: Dataset) -> np.ndarray:
        return embed([text + self.suffix for text in documents["text"]], self._model, self._tokenizer, self.pooling)

    def predict(self, documents: Dataset) -> Predictions:
        """The probe's probabilities."""
        with measure() as cost:
            probabilities = softmax(self._embed(documents) @ self._probe.coef_.T, axis=1)
        return _predictions(self, probabilities, documents, cost, self._probe.coef_.size)


def _predictions(approach, probabilities, documents, cost, trainable_parameters=0) -> Predictions:
    return Predictions(
        approach.name,
        approach.labels,
        probabilities,
        documents["label"],
        seconds=cost.seconds,
        training_seconds=approach._cost.seconds,
        trainable_parameters=trainable_parameters,
        peak_memory=cost.peak_memory,
    )
