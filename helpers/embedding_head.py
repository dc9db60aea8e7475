"""Approach 1: a classification head on the final token's embedding, trained together with LoRA.

Chapter 00 builds it in plain cells; this is the same in one call.
"""

import tempfile
from dataclasses import dataclass

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
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from helpers import base_models, profiles
from helpers.errors import unknown_name
from helpers.evaluation import Predictions, measure
from helpers.tasks import Task

SUFFIX = "\n\nThe topic of this article is"


def load_classifier(base_model: str, n_labels: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The stock `AutoModelForSequenceClassification`, quantized as the profile says, its head in float32."""
    profile = profiles.current()
    tokenizer = base_models.load_tokenizer(base_model)
    model = AutoModelForSequenceClassification.from_pretrained(
        base_models.fetch(base_model),
        num_labels=n_labels,
        dtype=profile.dtype,
        quantization_config=profile.quantization,
        pad_token_id=tokenizer.pad_token_id,
        device_map=profile.device,
    )
    model.score.float().register_forward_pre_hook(head_in_float32)
    return model.eval(), tokenizer


def head_in_float32(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """A forward pre-hook: what reaches the head is cast to float32, whatever the base model computes in."""
    return (inputs[0].float(),)


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
        pooling: `last`, the last token that is not padding, or `mean`, over all tokens that are not padding.
    """
    if pooling not in ("last", "mean"):
        raise unknown_name("pooling", pooling, ("last", "mean"))
    vectors = np.empty((len(texts), model.config.get_text_config().hidden_size), dtype=np.float32)
    for rows, batch in base_models.batches(texts, tokenizer, batch_size):
        mask = batch.attention_mask.to(model.device)
        hidden = model.base_model(batch.input_ids.to(model.device), attention_mask=mask, use_cache=False).last_hidden_state
        if pooling == "last":
            pooled = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
        else:
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vectors[rows] = pooled.float().cpu().numpy()
    return vectors


def fit_probe(embeddings: np.ndarray, gold: np.ndarray) -> LogisticRegression:
    """Logistic regression without an intercept, so that its coefficients fit the stock head, which has none.

    Args:
        embeddings: shape (n_documents, hidden_size), from `embed`.
        gold: shape (n_documents,).

    Returns:
        The fitted probe; `coef_` has the shape (n_labels, hidden_size), one row a label, also for two labels.
    """
    probe = LogisticRegression(C=0.1, fit_intercept=False, max_iter=5000).fit(embeddings, gold)
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
) -> None:
    """Train what is trainable in `model` in place with the stock `Trainer`: AdamW, linear decay after a tenth of warm-up."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_steps=0.1,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=profiles.current().device == "cpu",
                seed=seed,
            ),
            train_dataset=Dataset.from_dict({**tokenizer(texts), "label": gold}),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@dataclass
class EmbeddingHead:
    """Text + suffix → last token's embedding → linear head; head and LoRA are trained together.

    Attributes:
        base_model: see `base_models.fetch`.
        suffix: appended to every document, so that the last token is one that asks for the topic.
        probe_init: start the head from the frozen probe and not from random numbers.
        n_layers: LoRA on the linear layers of the upper `n_layers` blocks; None for all.
        rank, learning_rate, epochs, batch_size, seed: of the training.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX
    probe_init: bool = True
    n_layers: int | None = 10
    rank: int = 16
    learning_rate: float = 3e-4
    epochs: int = 1
    batch_size: int = 8
    seed: int = 0
    name: str = "embedding head + LoRA"

    def fit(self, task: Task) -> "EmbeddingHead":
        """Train on `task.train`; nothing of validation or test is looked at."""
        self.labels = task.labels
        with measure() as self._cost:
            set_seed(self.seed)
            model, self.tokenizer = load_classifier(self.base_model, len(task.labels))
            texts = [text + self.suffix for text in task.train["text"]]
            if self.probe_init:
                probe = fit_probe(embed(texts, model, self.tokenizer), np.array(task.train["label"]))
                model.score.weight.data.copy_(torch.as_tensor(probe.coef_))
            model = get_peft_model(model, base_models.upper_lora(model, "SEQ_CLS", self.rank, self.n_layers))
            options = dict(learning_rate=self.learning_rate, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed)
            train_classifier(model, self.tokenizer, texts, task.train["label"], **options)
        self.model = model.eval()
        return self

    @torch.inference_mode()
    def predict(self, documents: Dataset, batch_size: int = 32) -> Predictions:
        """Probabilities of every label for `documents`, which has the columns `text` and `label`."""
        texts = [text + self.suffix for text in documents["text"]]
        logits, tokens = torch.empty(len(texts), len(self.labels)), 0
        with measure() as cost:
            for rows, batch in base_models.batches(texts, self.tokenizer, batch_size):
                logits[rows] = self.model(**batch.to(self.model.device), use_cache=False).logits.float().cpu()
                tokens += int(batch.attention_mask.sum())
        return Predictions(
            self.name,
            self.labels,
            logits.softmax(-1).numpy(),
            documents["label"],
            seconds=cost.seconds,
            training_seconds=self._cost.seconds,
            trainable_parameters=self.model.num_parameters(only_trainable=True),
            tokens=tokens,
            peak_memory=cost.peak_memory,
        )
