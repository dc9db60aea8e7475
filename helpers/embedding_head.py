"""Approach 1: a classification head on the final token's embedding, trained together with LoRA.

Chapters 00 and 04 build it in plain cells; this is the same in one call.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from helpers import adapters, base_models, profiles
from helpers.errors import unknown_name
from helpers.evaluation import Predictions, measure
from helpers.frozen_layers import computed_once
from helpers.tasks import Task, gold_of, texts_of

SUFFIX = "\n\nThe topic of this article is"
C = 0.1  # of the probes: inverse strength of their penalty, as scikit-learn has it


def load_classifier(
    base_model: str, n_labels: int, multi_label: bool = False, precision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The stock `AutoModelForSequenceClassification`, quantized as the profile or `precision` says, its head in float32.

    With `multi_label` its loss is binary cross-entropy, label by label.
    """
    profile = profiles.current(precision)
    tokenizer = base_models.load_tokenizer(base_model)
    model = AutoModelForSequenceClassification.from_pretrained(
        base_models.fetch(base_model),
        num_labels=n_labels,
        problem_type="multi_label_classification" if multi_label else "single_label_classification",
        dtype=profile.dtype,
        quantization_config=profile.quantization,
        pad_token_id=tokenizer.pad_token_id,
        device_map=profile.device,
    )
    base_models.keep_trainable(model)
    head = Float32Linear(model.score.in_features, model.score.out_features, bias=False, device="meta")
    head.weight = torch.nn.Parameter(model.score.weight.data.float())
    model.score = head
    return model.eval(), tokenizer


class Float32Linear(torch.nn.Linear):
    """A linear layer that computes in float32, whatever reaches it, also under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def head_in_float32(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """A forward pre-hook: what reaches the head is cast to float32, whatever the base model computes in."""
    return (inputs[0].float(),)


@torch.inference_mode()
def hidden_states(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Final-layer hidden states, batch by batch of texts of like length.

    Yields:
        `(rows, hidden, mask)`: indices into `texts`, states of shape (len(rows), n_tokens, hidden_size), and the attention mask,
        (len(rows), n_tokens), with the padding on the right.
    """
    for rows, batch in base_models.batches(texts, tokenizer, batch_size):
        mask = batch.attention_mask.to(model.device)
        yield (
            rows,
            model.base_model(batch.input_ids.to(model.device), attention_mask=mask, use_cache=False).last_hidden_state,
            mask,
        )


@torch.inference_mode()
def embed(
    texts: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pooling: str = "last",
    batch_size: int = 32,
) -> np.ndarray:
    """Final-layer hidden states pooled to one vector a text, shape (n_texts, hidden_size), float32.

    Args:
        model: any model with a `base_model`; nothing in it is changed.
        pooling: `last`, the last token that is not padding; `mean` or `max`, over all tokens that are not padding.
    """
    if pooling not in ("last", "mean", "max"):
        raise unknown_name("pooling", pooling, ("last", "mean", "max"))
    vectors = np.empty((len(texts), model.config.get_text_config().hidden_size), dtype=np.float32)
    for rows, hidden, mask in hidden_states(texts, model, tokenizer, batch_size):
        if pooling == "last":
            pooled = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
        elif pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
        vectors[rows] = pooled.float().cpu().numpy()
    return vectors


def fit_probe(embeddings: np.ndarray, gold: np.ndarray) -> LogisticRegression:
    """Logistic regression without an intercept, so that its coefficients fit the stock head, which has none.

    Args:
        embeddings: shape (n_documents, hidden_size), from `embed`.
        gold: shape (n_documents,); multi-label (n_documents, n_labels), zeros and ones: one regression a label.

    Returns:
        The fitted probe; `coef_` has the shape (n_labels, hidden_size), one row a label, also for two labels.
    """
    if gold.ndim == 2:
        probes = [fit_probe(embeddings, column) if np.ptp(column) else None for column in gold.T]
        probe = LogisticRegression(C=C, fit_intercept=False)
        # the two rows of a label's own probe are halves of the same plane; a label that all documents have starts at zero
        probe.coef_ = np.array([np.zeros(embeddings.shape[1]) if one is None else one.coef_[1] - one.coef_[0] for one in probes])
        probe.intercept_ = np.zeros(len(probe.coef_))
        return probe
    probe = LogisticRegression(C=C, fit_intercept=False, max_iter=5000).fit(embeddings, gold)
    if len(probe.coef_) == 1:  # scikit-learn keeps one row for two labels: w for the second, 0 for the first
        probe.coef_ = np.concatenate([-probe.coef_ / 2, probe.coef_ / 2])
        probe.intercept_ = np.zeros(2)
    return probe


def train_classifier(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    gold: list[int],
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
    checkpoints: str | None = None,
    loss: Callable | None = None,
    precision: str | None = None,
) -> None:
    """Train what is trainable in `model` in place with the stock `Trainer`: AdamW, linear decay after a tenth of warm-up.

    Args:
        gold: label numbers; for a multi-label model lists of zeros and ones.
        checkpoints: a folder that gets one after every epoch and from which a stopped training goes on.
        loss: instead of the model's own, `compute_loss_func` of the Trainer.
        precision: of the base model's weights, see `profiles.current`; where its dtype is bfloat16, training computes in it
            (autocast), as instruction tuning does.
    """
    if isinstance(gold[0], list):
        gold = [[float(one) for one in row] for row in gold]  # what binary cross-entropy takes
    profile = profiles.current(precision)
    with adapters.checkpoint_options(checkpoints) as options:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                **options,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_steps=0.1,
                logging_strategy="no",
                disable_tqdm=True,
                bf16=profile.dtype == torch.bfloat16,
                use_cpu=profile.device == "cpu",
                seed=seed,
            ),
            train_dataset=Dataset.from_dict({**tokenizer(texts), "label": gold}),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_loss_func=loss,
        )
        # A classifier takes the mean over its own batch; the Trainer believes that it divides by what is accumulated.
        trainer.model_accepts_loss_kwargs = False
        adapters.train(trainer)


@dataclass
class EmbeddingHead(adapters.Adapted):
    """Text + suffix → last token's embedding → linear head; head and LoRA are trained together.

    Takes single- and multi-label tasks. What lies below the adapters is computed once a document (`frozen_layers`).

    Attributes:
        base_model: see `base_models.fetch`.
        suffix: appended to every document, so that the last token is one that asks for the topic.
        probe_init: start the head from the frozen probe and not from random numbers.
        causal: False takes the causal mask away (`base_models.read_both_ways`).
        precision: of the base model's weights, see `profiles.current`.
        n_layers: LoRA on the linear layers of the upper `n_layers` blocks; None for all.
        lora: more options of `LoraConfig`.
        rank, learning_rate, epochs, batch_size, seed: of the training. The defaults were chosen on validation documents of
            BBC News, 32 a class.
        checkpoints: a folder that gets one after every epoch; a training that was stopped goes on from there.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX
    probe_init: bool = True
    causal: bool = True
    precision: str | None = None
    n_layers: int | None = 10
    lora: dict = field(default_factory=dict)
    rank: int = 16
    learning_rate: float = 5e-4
    epochs: int = 2
    batch_size: int = 8
    seed: int = 0
    checkpoints: str | None = None
    name: str = "embedding head + LoRA"

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_classifier(self.base_model, len(self.labels), self.multi_label, self.precision)
        if not self.causal:
            base_models.read_both_ways(model)
        return model, tokenizer

    def fit(self, task: Task) -> "EmbeddingHead":
        """Train on `task.train`; nothing of validation or test is looked at.

        Raises:
            BookError: a document is longer than the model takes, or `checkpoints` holds those of another training.
        """
        self.labels, self.multi_label = task.labels, task.multi_label
        self._claim_checkpoints(task)
        with measure() as cost:
            set_seed(self.seed)
            model, self.tokenizer = self._load_base()
            texts = base_models.framed(texts_of(task.train), self.tokenizer, after=self.suffix)
            base_models.encode(texts, self.tokenizer)  # refuse what is too long before the training
            lora = base_models.upper_lora(model, "SEQ_CLS", self.rank, self.n_layers, **self.lora)
            with computed_once(model, self.n_layers):
                if self.probe_init:
                    probe = fit_probe(embed(texts, model, self.tokenizer), np.array(task.train["label"]))
                    model.score.weight.data.copy_(torch.as_tensor(probe.coef_))
                model = get_peft_model(model, lora)
                train_classifier(
                    model,
                    self.tokenizer,
                    texts,
                    list(task.train["label"]),
                    learning_rate=self.learning_rate,
                    epochs=self.epochs,
                    batch_size=self.batch_size,
                    seed=self.seed,
                    checkpoints=self.checkpoints,
                    precision=self.precision,
                )
        self.training_seconds = cost.seconds
        self.model = model.eval()
        return self

    @torch.inference_mode()
    def predict(self, documents: Dataset, batch_size: int = 32) -> Predictions:
        """Probabilities of every label for `documents`, which has the columns `text` and `label`.

        Raises:
            BookError: a column is missing, or a text is empty or longer than the model takes.
        """
        gold, texts = gold_of(documents), base_models.framed(texts_of(documents), self.tokenizer, after=self.suffix)
        logits, tokens = torch.empty(len(texts), len(self.labels)), 0
        with measure() as cost:
            for rows, batch in base_models.batches(texts, self.tokenizer, batch_size):
                logits[rows] = self.model(**batch.to(self.model.device), use_cache=False).logits.float().cpu()
                tokens += int(batch.attention_mask.sum())
        return Predictions(
            self.name,
            self.labels,
            (logits.sigmoid() if self.multi_label else logits.softmax(-1)).numpy(),
            gold,
            seconds=cost.seconds,
            training_seconds=self.training_seconds,
            trainable_parameters=self.model.num_parameters(only_trainable=True),
            tokens=tokens,
            peak_memory=cost.peak_memory,
        )
