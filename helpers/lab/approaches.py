"""The approaches with the options that only ablations use, under the same class names: records know them by these.

`APPROACHES` is what a sweep may name. A setting that is added here or in `helpers` also goes, with its default, into
`records.DEFAULTS`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from helpers import base_models, baselines, embedding_head, instruction, prompts, records
from helpers.approach import Approach
from helpers.embeddings import C, hidden_states
from helpers.errors import BookError, unknown_name
from helpers.instruction import LabelTokensTrainer
from helpers.label_scoring import label_tokens, score_labels
from helpers.tasks import Task, texts_of

RESULTS = Path(__file__).parents[2] / "book" / "results"
KEPT = 200  # validation documents, the last ones, that no student sees


def bidirectional(model: PreTrainedModel) -> None:
    """Take the causal mask away, in place: every token attends to the whole text, as in an encoder.

    The configuration's switch builds the mask, the attention layers' is asked where a batch has no padding and so no mask.
    """
    model.config.get_text_config().is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


@dataclass
class EmbeddingHead(embedding_head.EmbeddingHead):
    """The embedding head with more options.

    Attributes:
        causal: False takes the causal mask away (`bidirectional`).
        precision: of the base model's weights, see `profiles.current`.
        lora: more options of `LoraConfig`.
    """

    causal: bool = True
    precision: str | None = None
    lora: dict = field(default_factory=dict)

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = super()._load_base()
        if not self.causal:
            bidirectional(model)
        return model, tokenizer

    def _lora_options(self) -> dict:
        return self.lora


class PromptLossTrainer(LabelTokensTrainer):
    """SFTTrainer in whose loss the prompt's tokens count too (Huerta-Enochian and Ko 2024, arXiv 2401.13586).

    Attributes:
        prompt_loss_weight: what a token of the prompt counts, against 1 for one of the label. It needs all logits.
    """

    prompt_loss_weight = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted mean of the tokens' cross-entropies over a batch."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        is_label = inputs["labels"][:, 1:] != -100
        weights = torch.where(is_label, 1.0, self.prompt_loss_weight) * mask[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        return (loss, {"logits": logits}) if return_outputs else loss


@dataclass
class InstructionTuned(instruction.InstructionTuned):
    """Instruction tuning with more options.

    Attributes:
        shots: so many training documents of each label, with their labels, stand before the prefix; for `epochs=0` only.
        verbalizer: what is written for each label instead of its name.
        ask: multi-label, for the `list` of labels or with a yes/no question (`questions`) about each. In training there are
            questions about a document's own labels and about two others, drawn at random.
        order: of the labels in a list: as in the `task`, `frequent` ones first, `rare` ones first, or `random`.
        prompt_loss_weight: see `PromptLossTrainer`.
        precision, lora: as for `EmbeddingHead`.
    """

    shots: int = 0
    verbalizer: dict[str, str] | None = None
    ask: str = "list"
    order: str = "task"
    prompt_loss_weight: float = 0.0
    precision: str | None = None
    lora: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in {"ask": ("list", "questions"), "order": ("task", "frequent", "rare", "random")}.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"value of `{name}`", getattr(self, name), known)
        if self.shots and self.epochs:
            raise BookError("shots are for a model that is not trained: use epochs=0 with them, or shots=0.")

    def _fit(self, task: Task) -> None:
        self._examples_shown = self._shots(task) if self.shots else ""
        super()._fit(task)

    def _lora_options(self) -> dict:
        return self.lora

    def _words(self) -> tuple[str, ...]:
        if self.verbalizer is None:
            return self.labels
        if set(self.verbalizer) != set(self.labels):
            wrong = sorted(set(self.verbalizer) ^ set(self.labels))[0]
            raise BookError(f"The verbalizer needs one entry for each label and no other: {wrong!r} is too many or missing.")
        return tuple(self.verbalizer[label] for label in self.labels)

    def _check_labels(self) -> None:
        if self.multi_label and self.ask == "questions":
            label_tokens(self._words(), self.tokenizer, self._space, self._prompts(["x"])[0])
        else:
            super()._check_labels()

    def _frame(self) -> tuple[str, str]:
        before, after = super()._frame()
        return getattr(self, "_examples_shown", "") + before, after

    def _shots(self, task: Task) -> str:
        """Training documents with their labels, as the model reads them before the document."""
        if task.multi_label:
            raise BookError("shots show one label a document. Use shots=0 in a multi-label task.")
        gold = np.array(task.train["label"])
        rows = [row for label in range(len(self.labels)) for row in np.flatnonzero(gold == label)[: self.shots]]
        rows = np.random.default_rng(self.seed).permutation(rows)
        documents = task.train.select(rows)
        framed = prompts.sanitize_prompts(texts_of(documents), base_models.load_tokenizer(self.base_model), *super()._frame())
        return "".join(f"{each} {self._words()[label]}\n\n" for each, label in zip(framed, documents["label"], strict=True))

    def _examples(self, task: Task) -> dict[str, list[str]]:
        if not self.multi_label or (self.ask == "list" and self.order == "task"):
            return super()._examples(task)
        framed, words, gold = self._prompts(texts_of(task.train)), self._words(), np.array(task.train["label"])
        generator = np.random.default_rng(self.seed)
        if self.ask == "list":
            counts = gold.sum(axis=0)
            ranks = {"frequent": -counts, "rare": counts}.get(self.order)
            completions = []
            for row in gold:
                own = np.flatnonzero(row)
                own = generator.permutation(own) if ranks is None else own[ranks[own].argsort(kind="stable")]
                completions.append(self._space + (", ".join(words[label] for label in own) or instruction.NO_LABEL))
            return {"prompt": framed, "completion": completions}
        questions, answers = [], []
        for prompt, row in zip(framed, gold, strict=True):
            others = np.flatnonzero(row == 0)
            others = generator.choice(others, min(2, len(others)), replace=False)
            for label in [*np.flatnonzero(row), *others]:
                questions.append(f"{prompt}{self._space}{words[label]}?")
                answers.append(" yes" if row[label] else " no")
        return {"prompt": questions, "completion": answers}

    def _trainer_class(self) -> type[SFTTrainer]:
        if not self.prompt_loss_weight:
            return super()._trainer_class()
        return type("WeightedTrainer", (PromptLossTrainer,), {"prompt_loss_weight": self.prompt_loss_weight})

    def predict_proba(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        """As `InstructionTuned`, or the answers to the questions."""
        if not (self.multi_label and self.ask == "questions"):
            return super().predict_proba(texts, batch_size)
        framed, words = self._prompts(texts), self._words()
        return score_questions(framed, words, self.model, self.tokenizer, batch_size, self._space).numpy()


def score_questions(
    framed: list[str],
    labels: tuple[str, ...],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    space: str = " ",
) -> torch.Tensor:
    """Probability of "yes" against "no" behind every prompt and every label: one question a label, the prompt read once.

    The questions are the branches of the trie of `score_labels`, so it is its cache that they all stand on.

    Args:
        framed: prompts; with batch_size and space as for `score_labels`.
        labels: asked about as `label? yes` and `label? no`.

    Returns:
        float32 tensor of shape (n_prompts, n_labels), each in 0..1.
    """
    answers = tuple(f"{label}? {answer}" for label in labels for answer in ("yes", "no"))
    scores = score_labels(framed, answers, model, tokenizer, batch_size, tolerance=0, space=space)
    return scores.view(len(framed), len(labels), 2).softmax(-1)[..., 0]


@dataclass
class FrozenProbe(baselines.FrozenProbe):
    """The frozen probe with more options.

    Attributes:
        pooling: also `attention`, which learns which tokens to read (`AttentionProbe`).
        layer: read the hidden states above so many blocks (and the final norm); None for all of them.
        causal: False takes the causal mask away (`bidirectional`).
    """

    layer: int | None = None
    causal: bool = True

    def _load_base(self) -> None:
        super()._load_base()
        if self.layer is not None:
            base_models.check_n_layers(self.layer, len(self.model.layers))
            self.model.layers = self.model.layers[: self.layer]
        if not self.causal:
            bidirectional(self.model)

    def _fit(self, task: Task) -> None:
        super()._fit(task)
        if self.pooling == "attention":
            self.trainable_parameters += self.probe.query.size

    def _fit_probe(self, features, gold: np.ndarray):
        if self.pooling != "attention":
            return super()._fit_probe(features, gold)
        return AttentionProbe.fit(features, gold)

    def _features(self, texts: list[str]) -> np.ndarray | list[np.ndarray]:
        if self.pooling != "attention":
            return super()._features(texts)
        texts = prompts.sanitize_prompts(texts, self.tokenizer, after=self.suffix)
        states: list = [None] * len(texts)
        for rows, hidden, mask in hidden_states(texts, self.model, self.tokenizer):
            for row, tokens, n in zip(rows, hidden.float().cpu().numpy(), mask.sum(1).tolist(), strict=True):
                states[row] = tokens[:n]
        return states

    def _logits(self, features) -> np.ndarray:
        return self.probe.logits(features) if self.pooling == "attention" else super()._logits(features)


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
        targets = torch.as_tensor(gold, dtype=torch.float32 if multi_label else torch.long)
        loss = torch.nn.functional.binary_cross_entropy_with_logits if multi_label else torch.nn.functional.cross_entropy
        query, coef = (torch.zeros(*size, padded.shape[-1], requires_grad=True) for size in ((), (n_labels,)))
        optimizer = torch.optim.LBFGS([query, coef], max_iter=200, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = (query.square().sum() + coef.square().sum()) / 2
            total = C * loss(_pooled(padded, mask, query) @ coef.T, targets, reduction="sum") + penalty
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
class FineTunedEncoder(baselines.FineTunedEncoder):
    """The encoder with fewer blocks.

    Attributes:
        n_layers: keep the lowest so many blocks; None for all of them.
    """

    n_layers: int | None = None

    def _model_options(self) -> dict:
        total = base_models.shape_of(self.base_model).num_hidden_layers
        base_models.check_n_layers(self.n_layers, total)
        return {"num_hidden_layers": self.n_layers or total}


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
    log_probabilities = torch.nn.functional.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * torch.nn.functional.kl_div(log_probabilities, soft.float(), reduction="batchmean")


def training_targets(task: Task, teacher: str, of: str, seed: int) -> tuple[list[str], np.ndarray]:
    """What a student learns from: the training documents with their labels, and others with the teacher's probabilities.

    The others are the validation documents but for the last `KEPT`. Their labels are not read. The teacher's probabilities come
    from its recorded run (`book/results/teachers.yaml`), so that it is trained once.

    Args:
        teacher: a file of records in `book/results`, without its ending, or a path to one.
        of: the class that was trained, such as `EmbeddingHead`.
        seed: of the teacher's run; the student's task has to have the same documents.

    Returns:
        Texts, and probabilities of shape (n_texts, n_labels): one-hot for training documents.

    Raises:
        BookError: there is no such record, it has no predictions on validation, it is of other documents, or the task is
            multi-label or has too few validation documents.
    """
    path = Path(teacher) if teacher.endswith(".jsonl") else RESULTS / f"{teacher}.jsonl"
    found = [each for each in records.read(path) if each["key"]["approach"] == of and each["key"]["seed"] == seed]
    found = [each for each in found if each["content_hash"] == task.content_hash()]
    if task.multi_label or len(task.validation) <= KEPT:
        raise BookError(f"{task.name}: students need one label a document and more than {KEPT} validation documents.")
    if not found or "validation" not in found[0]:
        raise BookError(
            f"{path.name} has no record of {of} with seed {seed} on these documents that has predictions on validation. "
            "Make it first: python -m helpers.lab.sweeps, with `validation: true` in the sweep."
        )
    predicted = np.array(found[0]["validation"]["probabilities"])[:-KEPT]
    known = np.eye(len(task.labels))[task.train["label"]]
    return [*task.train["text"], *task.validation["text"][:-KEPT]], np.concatenate([known, predicted])


@dataclass
class DistilledEncoder(FineTunedEncoder):
    """An encoder trained on a teacher's softened probabilities.

    Attributes:
        teacher, of: see `training_targets`.
        temperature: of teacher and student alike while learning.
    """

    epochs: int = 4
    teacher: str = "teachers"
    of: str = "EmbeddingHead"
    temperature: float = 2.0
    name: str = "MiniLM, distilled"

    def _training_targets(self, task: Task) -> tuple[list[str], list]:
        texts, probabilities = training_targets(task, self.teacher, self.of, self.seed)
        return texts, soften(probabilities, self.temperature).tolist()

    def _loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        return distillation_loss(outputs.logits, labels, self.temperature)


@dataclass
class DistilledTfidf(baselines.TfidfSvm):
    """TF-IDF and logistic regression on a teacher's probabilities: every document counts for each label as much as is said.

    Attributes:
        C: inverse weight of the penalty.
        teacher, of: see `training_targets`.
        seed: of the teacher's run.
    """

    C: float = 10.0
    teacher: str = "teachers"
    of: str = "EmbeddingHead"
    seed: int = 0
    name: str = "TF-IDF, distilled"

    def _fit(self, task: Task) -> None:
        texts, probabilities = training_targets(task, self.teacher, self.of, self.seed)
        row, label = np.nonzero(probabilities > 1e-3)
        features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        vectors = features.fit_transform(texts)
        classifier = LogisticRegression(C=self.C, max_iter=2000)
        classifier.fit(vectors[row], label, sample_weight=probabilities[row, label])
        self.model = make_pipeline(features, classifier)
        self.trainable_parameters = classifier.coef_.size

    def predict_proba(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        """Probabilities of the logistic regression."""
        return self.model.predict_proba(texts)


APPROACHES: dict[str, type[Approach]] = {
    each.__name__: each
    for each in (
        baselines.Majority,
        baselines.TfidfSvm,
        FrozenProbe,
        FineTunedEncoder,
        DistilledEncoder,
        DistilledTfidf,
        EmbeddingHead,
        InstructionTuned,
    )
}
