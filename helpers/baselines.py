"""What any approach has to beat: the majority class, TF-IDF with a linear SVM, a probe on the frozen model, an encoder.

All of them take a Task and give Predictions, like the two approaches (chapter 01).
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit, softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from transformers import AutoModel, AutoModelForSequenceClassification, set_seed

from helpers import base_models, profiles
from helpers.embedding_head import SUFFIX, C, embed, fit_probe, hidden_states, train_classifier
from helpers.evaluation import Predictions, measure
from helpers.tasks import Task, gold_of, texts_of


@dataclass
class Majority:
    """Always the most frequent training label; its probabilities are the training frequencies."""

    name: str = "majority class"

    def fit(self, task: Task) -> "Majority":
        """Count the labels of `task.train`."""
        self.labels = task.labels
        with measure() as self._cost:
            gold = np.array(task.train["label"])
            self._frequencies = (gold if task.multi_label else gold[:, None] == np.arange(len(self.labels))).mean(axis=0)
        return self

    def predict(self, documents: Dataset) -> Predictions:
        """The same answer for every document."""
        with measure() as cost:
            probabilities = np.tile(self._frequencies, (len(documents), 1))
        return _predictions(self, probabilities, documents, cost)


@dataclass
class TfidfSvm:
    """TF-IDF of words and word pairs, then a linear support vector machine: seconds to train, hard to beat.

    An SVM has no probabilities; its margins go through a softmax here (a sigmoid in a multi-label task, which has one SVM a
    label), so their order means something and their size does not.
    """

    C: float = 1.0
    name: str = "TF-IDF + linear SVM"

    def fit(self, task: Task) -> "TfidfSvm":
        """Vocabulary, weights and separating planes from `task.train`."""
        self.labels, self._multi_label = task.labels, task.multi_label
        with measure() as self._cost:
            svm = LinearSVC(C=self.C, random_state=0)
            features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
            self._model = make_pipeline(features, OneVsRestClassifier(svm) if task.multi_label else svm)
            self._model.fit(list(task.train["text"]), np.array(task.train["label"]))
        return self

    def predict(self, documents: Dataset) -> Predictions:
        """Softmax of the margins; multi-label, their sigmoid."""
        with measure() as cost:
            margins = self._model.decision_function(list(documents["text"]))
            if margins.ndim == 1:  # two labels: one margin
                margins = np.stack([-margins, margins], axis=1) / 2
            probabilities = expit(margins) if self._multi_label else softmax(margins, axis=1)
        features, classifier = self._model[0], self._model[-1]
        planes = len(self.labels) if self._multi_label else len(classifier.coef_)
        return _predictions(self, probabilities, documents, cost, planes * len(features.vocabulary_))


@dataclass
class AttentionProbe:
    """Logistic regression on a weighted mean of a text's token states; which tokens weigh how much is learned with it.

    The weights are a softmax over the tokens of state · `query`. A query of zeros is mean pooling, and that is where it starts.

    Attributes:
        query: shape (hidden_size,).
        coef_: shape (n_labels, hidden_size), as of `fit_probe`.
    """

    query: np.ndarray
    coef_: np.ndarray

    @classmethod
    def fit(cls, states: list[np.ndarray], gold: np.ndarray) -> "AttentionProbe":
        """Fit query and coefficients with L-BFGS, both under the penalty of `fit_probe`.

        Args:
            states: one array of shape (n_tokens, hidden_size) for each text.
            gold: shape (n_texts,); multi-label (n_texts, n_labels), zeros and ones.
        """
        padded, mask = _padded(states)
        multi_label = gold.ndim == 2
        n_labels = gold.shape[1] if multi_label else int(gold.max()) + 1
        wanted = torch.as_tensor(gold, dtype=torch.float32 if multi_label else torch.long)
        loss = torch.nn.functional.binary_cross_entropy_with_logits if multi_label else torch.nn.functional.cross_entropy
        query, coef = (torch.zeros(*size, padded.shape[-1], requires_grad=True) for size in ((), (n_labels,)))
        optimizer = torch.optim.LBFGS([query, coef], max_iter=200, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = (query.square().sum() + coef.square().sum()) / 2
            total = C * loss(_pooled(padded, mask, query) @ coef.T, wanted, reduction="sum") + penalty
            total.backward()
            return total

        optimizer.step(step)
        return cls(query.detach().numpy(), coef.detach().numpy())

    def logits(self, states: list[np.ndarray]) -> np.ndarray:
        """Shape (n_texts, n_labels)."""
        return _pooled(*_padded(states), torch.as_tensor(self.query)).numpy() @ self.coef_.T


def _padded(states: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(each) for each in states], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in states])[:, None]


def _pooled(padded: torch.Tensor, mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    weights = (padded @ query).masked_fill(~mask, -torch.inf).softmax(-1)
    return (padded * weights[..., None]).sum(1)


@dataclass
class FrozenProbe:
    """Logistic regression on the embeddings of the base model as it comes.

    Attributes:
        base_model, suffix: as for `EmbeddingHead`; an empty suffix reads the bare last token.
        pooling: `last`, `mean` or `max`, see `embed`; `attention` learns which tokens to read (`AttentionProbe`).
        layer: read the hidden states above so many blocks (and the final norm); None for all of them.
        causal: False takes the causal mask away (`base_models.read_both_ways`).
        quantized: as the profile says; False for a small encoder, which needs no quantization anywhere.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX
    pooling: str = "last"
    layer: int | None = None
    causal: bool = True
    quantized: bool = True
    name: str = "frozen embedding + probe"

    def fit(self, task: Task) -> "FrozenProbe":
        """Embed `task.train` and fit the probe on it; single- and multi-label tasks."""
        self.labels, self._multi_label = task.labels, task.multi_label
        profile = profiles.current()
        with measure() as self._cost:
            self._tokenizer = base_models.load_tokenizer(self.base_model)
            self._model = AutoModel.from_pretrained(
                base_models.fetch(self.base_model),
                dtype=profile.dtype,
                quantization_config=profile.quantization if self.quantized else None,
                device_map=profile.device,
            ).eval()
            if self.layer is not None:
                base_models.check_n_layers(self.layer, len(self._model.layers))
                self._model.layers = self._model.layers[: self.layer]
            if not self.causal:
                base_models.read_both_ways(self._model)
            fit = AttentionProbe.fit if self.pooling == "attention" else fit_probe
            self._probe = fit(self._embed(task.train), np.array(task.train["label"]))
        return self

    def _embed(self, documents: Dataset) -> np.ndarray | list[np.ndarray]:
        texts = base_models.framed(texts_of(documents), self._tokenizer, after=self.suffix)
        if self.pooling != "attention":
            return embed(texts, self._model, self._tokenizer, self.pooling)
        states: list = [None] * len(texts)
        for rows, hidden, mask in hidden_states(texts, self._model, self._tokenizer):
            for row, tokens, n in zip(rows, hidden.float().cpu().numpy(), mask.sum(1).tolist(), strict=True):
                states[row] = tokens[:n]
        return states

    def predict(self, documents: Dataset) -> Predictions:
        """The probe's probabilities."""
        with measure() as cost:
            found = self._embed(documents)
            logits = self._probe.logits(found) if self.pooling == "attention" else found @ self._probe.coef_.T
            probabilities = expit(logits) if self._multi_label else softmax(logits, axis=1)
        learned = self._probe.coef_.size + (self._probe.query.size if self.pooling == "attention" else 0)
        return _predictions(self, probabilities, documents, cost, learned)


@dataclass
class FineTunedEncoder:
    """An encoder of BERT's kind with a fresh head, all of it trained: what the paper compares with.

    Attributes:
        base_model: any model that `AutoModelForSequenceClassification` takes; documents beyond its length are refused.
        learning_rate, epochs, batch_size, seed: of the training. The defaults were chosen on validation documents of BBC
            News, 32 a class.
        n_layers: keep the lowest so many blocks; None for all of them.
    """

    base_model: str = base_models.ENCODER
    n_layers: int | None = None
    learning_rate: float = 2e-4
    epochs: int = 5
    batch_size: int = 16
    seed: int = 0
    name: str = "MiniLM, fine-tuned"

    def fit(self, task: Task) -> "FineTunedEncoder":
        """Train on `task.train`; nothing of validation or test is looked at."""
        self.labels, self._multi_label = task.labels, task.multi_label
        with measure() as self._cost:
            set_seed(self.seed)
            texts, gold = self._lesson(task)
            self._tokenizer = base_models.load_tokenizer(self.base_model)
            texts = base_models.framed(texts, self._tokenizer)
            config = base_models.shape_of(self.base_model)
            base_models.check_n_layers(self.n_layers, config.num_hidden_layers)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                base_models.fetch(self.base_model),
                num_hidden_layers=self.n_layers or config.num_hidden_layers,
                num_labels=len(task.labels),
                problem_type="multi_label_classification" if task.multi_label else "single_label_classification",
                dtype="float32",
                device_map=profiles.current().device,
            )
            options = dict(learning_rate=self.learning_rate, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed)
            train_classifier(self._model, self._tokenizer, texts, gold, loss=self._loss, precision="float32", **options)
        self._model.eval()
        return self

    def _lesson(self, task: Task) -> tuple[list[str], list]:
        """The texts it learns from, and what it is told about them."""
        return list(task.train["text"]), list(task.train["label"])

    _loss = None  # the model's own

    @torch.inference_mode()
    def predict(self, documents: Dataset, batch_size: int = 32) -> Predictions:
        """Softmax of the logits; multi-label, their sigmoid."""
        texts = base_models.framed(list(documents["text"]), self._tokenizer)
        logits = np.empty((len(documents), len(self.labels)))
        with measure() as cost:
            for rows, batch in base_models.batches(texts, self._tokenizer, batch_size):
                logits[rows] = self._model(**batch.to(self._model.device)).logits.float().cpu()
        probabilities = expit(logits) if self._multi_label else softmax(logits, axis=1)
        return _predictions(self, probabilities, documents, cost, self._model.num_parameters(only_trainable=True))


def _predictions(approach, probabilities, documents, cost, trainable_parameters=0) -> Predictions:
    return Predictions(
        approach.name,
        approach.labels,
        probabilities,
        gold_of(documents),
        seconds=cost.seconds,
        training_seconds=approach._cost.seconds,
        trainable_parameters=trainable_parameters,
        peak_memory=cost.peak_memory,
    )
