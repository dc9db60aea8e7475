"""Small students that learn from what a large teacher says about text without labels (chapter 10).

The teacher's probabilities are read from its recorded run (`book/results/teachers.yaml`), so that it is trained once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from helpers import baselines
from helpers.errors import BookError
from helpers.evaluation import Predictions, measure
from helpers.tasks import Task

RESULTS = Path(__file__).parent.parent / "book" / "results"
KEPT = 200  # validation documents, the last ones, that no student sees


def soften(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities as they would be had the logits been divided by `temperature`; shape (n_documents, n_labels).

    Raises:
        BookError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise BookError(f"The temperature is {temperature!r}, but it has to be above 0. 1 leaves the probabilities as they are.")
    return softmax(np.log(np.clip(probabilities, 1e-12, None)) / temperature, axis=1)


def distillation_loss(logits: torch.Tensor, soft: torch.Tensor, temperature: float) -> torch.Tensor:
    """temperature² · KL(teacher, student), the mean over documents (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits: of the student, shape (n_documents, n_labels).
        soft: the teacher's probabilities, softened with `temperature` already; same shape.
    """
    said = torch.nn.functional.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * torch.nn.functional.kl_div(said, soft.float(), reduction="batchmean")


def lesson(task: Task, teacher: str, of: str, seed: int) -> tuple[list[str], np.ndarray]:
    """What a student learns from: the training documents with their labels, and others with the teacher's probabilities.

    The others are the validation documents but for the last `KEPT`. Their labels are not read.

    Args:
        teacher: a file of records in `book/results`, without its ending, or a path to one.
        of: the class that was trained, such as `EmbeddingHead`.
        seed: of the teacher's run; the student's task has to have the same documents.

    Returns:
        Texts, and probabilities of shape (n_texts, n_labels): one-hot for training documents.

    Raises:
        BookError: there is no such record, it says nothing about validation, it is of other documents, or the task is
            multi-label or has too few validation documents.
    """
    path = Path(teacher) if teacher.endswith(".jsonl") else RESULTS / f"{teacher}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [each for each in map(json.loads, lines) if each["key"]["approach"] == of and each["key"]["seed"] == seed]
    found = [each for each in found if each["content_hash"] == task.content_hash()]
    if task.multi_label or len(task.validation) <= KEPT:
        raise BookError(f"{task.name}: students need one label a document and more than {KEPT} validation documents.")
    if not found or "validation" not in found[0]:
        raise BookError(
            f"{path.name} has no record of {of} with seed {seed} on these documents that says something about validation. "
            "Make it first: python -m helpers.runs, with `validation: true` in the sweep."
        )
    said = np.array(found[0]["validation"]["probabilities"])[:-KEPT]
    known = np.eye(len(task.labels))[task.train["label"]]
    return [*task.train["text"], *task.validation["text"][:-KEPT]], np.concatenate([known, said])


@dataclass
class DistilledEncoder(baselines.FineTunedEncoder):
    """An encoder trained on a teacher's softened probabilities.

    Attributes:
        teacher, of: see `lesson`.
        temperature: of teacher and student alike while learning.
    """

    epochs: int = 4
    teacher: str = "teachers"
    of: str = "EmbeddingHead"
    temperature: float = 2.0
    name: str = "MiniLM, distilled"

    def _lesson(self, task: Task) -> tuple[list[str], list]:
        texts, probabilities = lesson(task, self.teacher, self.of, self.seed)
        return texts, soften(probabilities, self.temperature).tolist()

    def _loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        return distillation_loss(outputs.logits, labels, self.temperature)


@dataclass
class DistilledTfidf:
    """TF-IDF and logistic regression on a teacher's probabilities: every document counts for each label as much as is said.

    Attributes:
        C: inverse weight of the penalty.
        teacher, of: see `lesson`.
        seed: of the teacher's run.
    """

    C: float = 10.0
    teacher: str = "teachers"
    of: str = "EmbeddingHead"
    seed: int = 0
    name: str = "TF-IDF, distilled"

    def fit(self, task: Task) -> "DistilledTfidf":
        """Vocabulary and weights from `lesson`."""
        self.labels = task.labels
        with measure() as self._cost:
            texts, probabilities = lesson(task, self.teacher, self.of, self.seed)
            row, label = np.nonzero(probabilities > 1e-3)
            features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
            vectors = features.fit_transform(texts)
            classifier = LogisticRegression(C=self.C, max_iter=2000)
            classifier.fit(vectors[row], label, sample_weight=probabilities[row, label])
            self._model = make_pipeline(features, classifier)
        return self

    def predict(self, documents: Dataset) -> Predictions:
        """Probabilities of the logistic regression."""
        with measure() as cost:
            probabilities = self._model.predict_proba(list(documents["text"]))
        return baselines._predictions(self, probabilities, documents, cost, self._model[-1].coef_.size)
