"""The approaches with the options that only ablations use, under the class names and setting names that records know.

A setting that is added here or in `helpers` also goes, with its default, into `records.DEFAULTS`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import (
    DataCollatorForMultipleChoice,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import SFTTrainer

from helpers import base_models, baselines, embedding_head, instruction, profiles, prompts, records
from helpers.approach import LoraApproach
from helpers.checkpoints import run_training, trainer_options
from helpers.corpora import excerpt
from helpers.embeddings import C, hidden_states
from helpers.errors import BookError, check_name
from helpers.frozen_layers import whole_model
from helpers.lab.search import BestEpochOption
from helpers.label_scoring import SHORTEST_PREFIX, label_tokens, score_labels
from helpers.tasks import SPLITS, Task, texts_of

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
class LoraOptions(BestEpochOption):
    """Options of both approaches: the `precision` of the base model (`profiles.current`), and more for `LoraConfig` (`lora`)."""

    precision: str | None = None
    lora: dict = field(default_factory=dict)


@dataclass
class EmbeddingHead(LoraOptions, embedding_head.EmbeddingHead):
    """The embedding head, with `causal=False` without the causal mask (`bidirectional`)."""

    causal: bool = True

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = super()._load_base()
        if not self.causal:
            bidirectional(model)
        return model, tokenizer


@dataclass
class LabelRowsHead(EmbeddingHead):
    """A head whose rows start as those of the language-model head: a label's `first` token's, or the `mean` of all its tokens'.

    With `train_rows=False` they stay as they are: the language-model head, cut to the labels (chapter 12).
    """

    probe_init: bool = False
    rows: str = "first"
    train_rows: bool = True
    name: str = "head, label rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("value of `rows`", self.rows, ("first", "mean"))

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = super()._load_base()
        ids = label_tokens(self.labels, tokenizer, prompt=f"x{self._frame()[1]}")
        first = [tokens[0] for tokens in ids]
        for row in (row for row, token in enumerate(first) if self.rows == "first" and token in first[:row]):
            pair = f"{self.labels[first.index(first[row])]!r} and {self.labels[row]!r}"
            raise BookError(f"The labels {pair} begin with the same token, so they would have the same row. Use rows='mean'.")
        known = base_models.load(self.base_model, precision=self.precision).get_output_embeddings().weight.detach().float()
        rows = known[first] if self.rows == "first" else torch.stack([known[tokens].mean(0) for tokens in ids])
        model.score.weight.data.copy_(rows)
        if not self.train_rows:  # as a buffer neither PEFT nor an optimizer touches them
            del model.score.weight
            model.score.register_buffer("weight", rows.clone())
        return model, tokenizer


class CandidateTrainer(Trainer):
    """Trainer for a model with one score, on `input_ids` of shape (n_documents, n_candidates, n_tokens)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy of a softmax over each document's candidates, the mean of a batch."""
        tokens = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        logits = model(**tokens, use_cache=False).logits.view(len(inputs["labels"]), -1).float()
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def unseen(labels: tuple[str, ...], n: int, seed: int) -> list[str]:
    """The `n` labels that a `CandidateScorer` with this seed is not trained on, in their order."""
    return [labels[row] for row in sorted(np.random.default_rng(seed).permutation(len(labels))[:n])]


@dataclass
class CandidateScorer(LoraOptions, LoraApproach):
    """Document + suffix + label → one number, read at the label's last token; softmax over the labels (chapter 12).

    Once it is fitted, `labels` may be set to others: they are scored as those of the training are. With `left_out` no training
    or validation document has one of so many labels (`unseen`), but all labels are predicted.
    """

    candidates: int | None = None  # labels that a training document is compared with, its own and others at random; None for all
    left_out: int = 0
    name: str = "candidate scorer"

    def fit(self, task: Task) -> Self:
        """As `Approach.fit`. BookError: documents have several labels."""
        if task.multi_label:
            raise BookError(f"{task.name}: a softmax over candidates needs one label a document. Use another approach.")
        hidden, splits = unseen(task.labels, self.left_out, self.seed), {}
        kept = [label for label in task.labels if label not in hidden]
        for split in SPLITS:
            rows = [(row, task.labels[row["label"]]) for row in getattr(task, split)]
            splits[split] = Dataset.from_list([{**row, "label": kept.index(label)} for row, label in rows if label in kept])
        super().fit(Task(task.name, tuple(kept), **splits))
        self.labels = task.labels
        return self

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return embedding_head.load_classifier(self.base_model, 1, precision=self.precision)

    def _label_ids(self, asked: list[str]) -> list[list[int]]:
        """Tokens of each label with a full stop, so that none begins another. BookError: no room behind the longest prompt."""
        ids = label_tokens(tuple(f"{label}." for label in self.labels), self.tokenizer, prompt=asked[0])
        longest, room = max(map(len, prompts.encode(asked, self.tokenizer))), self.tokenizer.model_max_length
        for label, tokens in zip(self.labels, ids, strict=True):
            if longest + len(tokens) > room:
                needs = f"{len(tokens)} tokens behind a prompt of {longest}, and the model takes {room}"
                raise BookError(f"The label {excerpt(label)} needs {needs}. Shorten it, or the documents.")
        return ids

    def _train(self, task: Task, options: dict) -> None:
        asked, generator = self._prompts(texts_of(task.train)), np.random.default_rng(self.seed)
        ids, pairs = self._label_ids(asked), []
        for tokens, gold in zip(self.tokenizer(asked).input_ids, task.train["label"], strict=True):
            others = generator.permutation(np.delete(np.arange(len(ids)), gold))[: (self.candidates or len(ids)) - 1]
            pairs.append([tokens + ids[label] for label in (gold, *others)])  # the right one first
        lora = base_models.upper_lora(self.model, "SEQ_CLS", self.rank, self.n_layers, **self.lora)
        self.model = get_peft_model(self.model, lora)
        training = CandidateTrainer(
            model=self.model,
            args=TrainingArguments(**options, **trainer_options(profiles.current(self.precision))),
            train_dataset=Dataset.from_dict({"input_ids": pairs, "label": [0] * len(pairs)}),
            data_collator=DataCollatorForMultipleChoice(self.tokenizer),
            callbacks=[*self.callbacks],
        )
        training.model_accepts_loss_kwargs = False  # as in `train_classifier`
        run_training(training)

    @torch.inference_mode()
    def _predict_proba(self, texts: list[str], batch_size: int) -> np.ndarray:
        asked, model = self._prompts(texts), self.model.get_base_model()
        ids, scores = self._label_ids(asked), torch.empty(len(texts), len(self.labels))

        def read(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            where = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # as `label_scoring` counts
            known = {"attention_mask": mask, "position_ids": where, "past_key_values": cache, "use_cache": True}
            return model.base_model(tokens, **known).last_hidden_state[:, -1]

        with whole_model(self.model):
            for rows, batch in prompts.batches(asked, self.tokenizer, batch_size, side="left"):
                batch, cache = batch.to(model.device), DynamicCache(config=model.config)
                read(batch.input_ids, batch.attention_mask)
                for label, tokens in enumerate(ids):
                    mask = torch.nn.functional.pad(batch.attention_mask, (0, len(tokens)), value=1)
                    scores[rows, label] = model.score(read(mask.new_tensor([tokens] * len(rows)), mask)).squeeze(-1).cpu()
                    cache.crop(-len(tokens))  # the document stays for the next label
        return scores.softmax(-1).numpy()


class PromptLossTrainer(instruction.LabelTokensTrainer):
    """SFTTrainer in whose loss the prompt's tokens count too (Huerta-Enochian and Ko 2024, arXiv 2401.13586)."""

    prompt_loss_weight = 0.0  # of a token of the prompt, against 1 for one of the label

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted mean of the tokens' cross-entropies over a batch."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        weights = torch.where(inputs["labels"][:, 1:] != -100, 1.0, self.prompt_loss_weight) * mask[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        return (loss, {"logits": logits}) if return_outputs else loss


class SharedPrefixTrainer(instruction.LabelTokensTrainer):
    """SFTTrainer that reads what all prompts of a batch begin with, an instruction, once: the same loss and gradients."""

    def logits_at(self, columns: torch.Tensor, model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """As `LabelTokensTrainer.logits_at`."""
        alike = (input_ids == input_ids[0]).all(0)[: columns[0]]
        n = int(alike.long().cumprod(0).sum())
        if n < SHORTEST_PREFIX:
            return super().logits_at(columns, model, input_ids, attention_mask)
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids[:1, :n], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(input_ids))
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": columns - n}
        return model(input_ids=input_ids[:, n:], attention_mask=attention_mask, **options).logits


@dataclass
class InstructionTuned(LoraOptions, instruction.InstructionTuned):
    """Instruction tuning with more options. Questions in training are about a document's own labels and two others at random."""

    shots: int = 0  # so many training documents of each label, with their labels, stand before the prefix; for `epochs=0` only
    verbalizer: dict[str, str] | None = None  # what is written for each label instead of its name
    ask: str = "list"  # multi-label, for the `list` of labels or with a yes/no question (`questions`) about each
    order: str = "task"  # of the labels in a list: as in the `task`, `frequent` ones first, `rare` ones first, or `random`
    prompt_loss_weight: float = 0.0  # see `PromptLossTrainer`
    _shown = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("value of `ask`", self.ask, ("list", "questions"))
        check_name("value of `order`", self.order, ("task", "frequent", "rare", "random"))
        if self.shots and self.epochs:
            raise BookError("shots are for a model that is not trained: use epochs=0 with them, or shots=0.")

    def _fit(self, task: Task) -> None:
        self._shown = self._shots(task) if self.shots else ""
        super()._fit(task)

    def _words(self) -> tuple[str, ...]:
        verbalizer = self.verbalizer or {label: label for label in self.labels}
        if wrong := sorted(set(verbalizer) ^ set(self.labels)):
            raise BookError(f"The verbalizer needs one entry for each label and no other: {wrong[0]!r} is too many or missing.")
        return tuple(verbalizer[label] for label in self.labels)

    def _frame(self) -> tuple[str, str]:
        before, after = super()._frame()
        return self._shown + before, after

    def _shots(self, task: Task) -> str:
        """Training documents with their labels, as the model reads them before the document."""
        gold = np.array(task.train["label"])
        rows = [row for label in range(len(self.labels)) for row in np.flatnonzero(gold == label)[: self.shots]]
        documents = task.train.select(np.random.default_rng(self.seed).permutation(rows))
        shown = prompts.sanitize_prompts(texts_of(documents), base_models.load_tokenizer(self.base_model), *super()._frame())
        return "".join(f"{each} {self._words()[label]}\n\n" for each, label in zip(shown, documents["label"], strict=True))

    def _examples(self, task: Task) -> dict[str, list[str]]:
        if not self.multi_label:
            return super()._examples(task)
        asked, words, gold = self._prompts(texts_of(task.train)), self._words(), np.array(task.train["label"])
        generator, counts, examples = np.random.default_rng(self.seed), gold.sum(axis=0), []
        ranks = {"task": 0 * counts, "frequent": -counts, "rare": counts}.get(self.order)
        for prompt, row in zip(asked, gold, strict=True):
            own, others = np.flatnonzero(row), np.flatnonzero(row == 0)
            if self.ask == "questions":
                asked = [*own, *generator.choice(others, min(2, len(others)), replace=False)]
                examples += [(f"{prompt}{self._space}{words[label]}?", " yes" if row[label] else " no") for label in asked]
            else:
                own = generator.permutation(own) if ranks is None else own[ranks[own].argsort(kind="stable")]
                examples.append((prompt, self._space + (", ".join(words[label] for label in own) or instruction.NO_LABEL)))
        return {"prompt": [prompt for prompt, _ in examples], "completion": [answer for _, answer in examples]}

    def _trainer_class(self) -> type[SFTTrainer]:
        if self.prompt_loss_weight:
            return type("WeightedTrainer", (PromptLossTrainer,), {"prompt_loss_weight": self.prompt_loss_weight})
        usual = super()._trainer_class()
        return SharedPrefixTrainer if usual is instruction.LabelTokensTrainer else usual

    def _predict_proba(self, texts: list[str], batch_size: int) -> np.ndarray:
        with whole_model(self.model):  # labels are read over a cache of all layers
            if not (self.multi_label and self.ask == "questions"):
                return super()._predict_proba(texts, batch_size)
            options = {"batch_size": batch_size, "space": self._space}
            return score_questions(self._prompts(texts), self._words(), self.model, self.tokenizer, **options).numpy()


def score_questions(
    texts: list[str], labels: tuple[str, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options
) -> torch.Tensor:
    """How likely `label? yes` is against `label? no` behind every prompt, (n_prompts, n_labels); options of `score_labels`."""
    answers = tuple(f"{label}? {answer}" for label in labels for answer in ("yes", "no"))
    scores = score_labels(texts, answers, model, tokenizer, tolerance=0, **options)
    return scores.view(len(texts), len(labels), 2).softmax(-1)[..., 0]


@dataclass
class FrozenProbe(baselines.FrozenProbe):
    """The frozen probe with more options: `pooling="attention"` learns which tokens to read (`AttentionProbe`)."""

    layer: int | None = None  # read the hidden states above so many blocks (and the final norm); None for all of them
    causal: bool = True  # as for `EmbeddingHead`
    lower_states: ClassVar[dict | None] = None  # embeddings by text, if trainings share them (`search`)

    def _load_base(self) -> None:
        super()._load_base()
        base_models.check_n_layers(self.layer, len(self.model.layers))
        self.model.layers = self.model.layers[: self.layer]
        if not self.causal:
            bidirectional(self.model)

    def _fit(self, task: Task) -> None:
        super()._fit(task)
        if self.pooling == "attention":
            self.trainable_parameters += self.probe.query.size

    def _fit_probe(self, features, gold: np.ndarray, C: float):
        return AttentionProbe.fit(features, gold, C) if self.pooling == "attention" else super()._fit_probe(features, gold, C)

    def _features(self, texts: list[str]) -> np.ndarray | list[np.ndarray]:
        if self.pooling != "attention":
            known = {} if self.lower_states is None else self.lower_states
            if new := [text for text in texts if text not in known]:
                known |= zip(new, super()._features(new), strict=True)
            return np.stack([known[text] for text in texts])
        texts = prompts.sanitize_prompts(texts, self.tokenizer, after=self.suffix)
        states: list = [None] * len(texts)
        for rows, hidden, mask in hidden_states(texts, self.model, self.tokenizer):
            for row, tokens, n in zip(rows, hidden.float().cpu().numpy(), mask.sum(1).tolist(), strict=True):
                states[row] = tokens[:n]
        return states


@dataclass
class AttentionProbe:
    """Logistic regression on a mean of a text's token states; their weights, a softmax of state · `query`, are learned too."""

    query: np.ndarray  # (hidden_size,); zeros, where the fit starts, are mean pooling
    coef_: np.ndarray  # (n_labels, hidden_size), as of `fit_probe`

    @classmethod
    def fit(cls, states: list[np.ndarray], gold: np.ndarray, C: float = C) -> "AttentionProbe":
        """Fit both with L-BFGS under the penalty of `fit_probe`; `states` has a (n_tokens, hidden_size) for each text."""
        multi_label, functional = gold.ndim == 2, torch.nn.functional
        targets = torch.as_tensor(gold if multi_label else np.eye(gold.max() + 1)[gold], dtype=torch.float32)
        loss = functional.binary_cross_entropy_with_logits if multi_label else functional.cross_entropy
        query, coef = (torch.zeros(*size, states[0].shape[-1], requires_grad=True) for size in ((), targets.shape[1:]))
        optimizer = torch.optim.LBFGS([query, coef], max_iter=200, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = (query.square().sum() + coef.square().sum()) / 2
            total = C * loss(_pooled(states, query) @ coef.T, targets, reduction="sum") + penalty
            total.backward()
            return total

        optimizer.step(step)
        return cls(query.detach().numpy(), coef.detach().numpy())

    def decision_function(self, states: list[np.ndarray]) -> np.ndarray:
        """Logits, shape (n_texts, n_labels), as scikit-learn calls them."""
        return _pooled(states, torch.as_tensor(self.query)).numpy() @ self.coef_.T


def _pooled(states: list[np.ndarray], query: torch.Tensor) -> torch.Tensor:
    return torch.stack([(text @ query).softmax(0) @ text for text in map(torch.as_tensor, states)])


@dataclass
class FineTunedEncoder(BestEpochOption, baselines.FineTunedEncoder):
    """The encoder with its lowest `n_layers` blocks; None for all of them."""

    n_layers: int | None = None

    def _model_options(self) -> dict:
        total = base_models.shape_of(self.base_model).num_hidden_layers
        base_models.check_n_layers(self.n_layers, total)
        return {"num_hidden_layers": self.n_layers or total}


def soften(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities, (n_documents, n_labels), as they would be had the logits been divided by `temperature` (above 0)."""
    if not temperature > 0:
        raise BookError(f"The temperature is {temperature!r}, but it has to be above 0. 1 leaves the probabilities as they are.")
    return softmax(np.log(np.clip(probabilities, 1e-12, None)) / temperature, axis=1)


def distillation_loss(logits: torch.Tensor, soft: torch.Tensor, temperature: float) -> torch.Tensor:
    """temperature² · KL(teacher, student), of logits and probabilities that are soft already (Hinton 2015, arXiv 1503.02531)."""
    log_probabilities = torch.nn.functional.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * torch.nn.functional.kl_div(log_probabilities, soft.float(), reduction="batchmean")


def training_targets(task: Task, teacher: str, of: str, seed: int) -> tuple[list[str], np.ndarray]:
    """What a student learns from: the training documents with their labels, and others with the teacher's probabilities.

    The others are the validation documents but for the last `KEPT`; their labels are not read. The teacher was trained once and
    recorded: `teacher` is a file of `book/results` without its ending, or a path to one, `of` the class, with its `seed`.

    Returns:
        Texts, and probabilities of shape (n_texts, n_labels): one-hot for training documents.
    """
    path = (RESULTS / teacher).with_suffix(".jsonl")
    if task.multi_label or len(task.validation) <= KEPT:
        raise BookError(f"{task.name}: students need one label a document and more than {KEPT} validation documents.")
    wanted = (of, seed, task.content_hash())
    for record in records.read(path):
        if "validation" in record and (record["key"]["approach"], record["key"]["seed"], record["content_hash"]) == wanted:
            known, predicted = np.eye(len(task.labels))[task.train["label"]], record["validation"]["probabilities"][:-KEPT]
            return [*task.train["text"], *task.validation["text"][:-KEPT]], np.concatenate([known, predicted])
    raise BookError(
        f"{path.name} has no record of {of} with seed {seed} on these documents that has predictions on validation. "
        "Make it first: python -m helpers.lab.sweeps, with `validation: true` in the sweep."
    )


@dataclass
class DistilledEncoder(FineTunedEncoder):
    """An encoder trained on the probabilities of `training_targets`, teacher and student softened by `temperature`."""

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
    """TF-IDF and logistic regression on `training_targets`: every document counts for each label as much as they say."""

    C: float = 10.0
    teacher: str = "teachers"
    of: str = "EmbeddingHead"
    seed: int = 0
    name: str = "TF-IDF, distilled"

    def _fit(self, task: Task) -> None:
        texts, probabilities = training_targets(task, self.teacher, self.of, self.seed)
        row, label = np.nonzero(probabilities > 1e-3)
        features, classifier = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=self.C, max_iter=2000)
        vectors = features.fit_transform(texts)
        classifier.fit(vectors[row], label, sample_weight=probabilities[row, label])
        self.model = make_pipeline(features, classifier)
        self.trainable_parameters = classifier.coef_.size


_OURS = (FrozenProbe, FineTunedEncoder, DistilledEncoder, DistilledTfidf)
_OURS += (EmbeddingHead, InstructionTuned, LabelRowsHead, CandidateScorer)
APPROACHES = {each.__name__: each for each in (baselines.Majority, baselines.TfidfSvm, *_OURS)}  # what a sweep may name
