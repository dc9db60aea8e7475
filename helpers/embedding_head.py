"""Approach 1: a classification head on the final token's embedding, trained together with LoRA.

Chapters 00 and 04 build it in plain cells; this is the same in one call.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from helpers import base_models, profiles, prompts
from helpers.approach import LoraApproach
from helpers.checkpoints import run_training, trainer_options
from helpers.embeddings import embed, fit_probe
from helpers.tasks import Task, texts_of


class Float32Linear(torch.nn.Linear):
    """A linear layer that computes in float32, whatever reaches it, also under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (…, in_features) of any dtype to (…, out_features) in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def float32_head(model: PreTrainedModel) -> None:
    """Replace the head (`score`) by one that holds the same weights and computes in float32, in place."""
    head = Float32Linear(model.score.in_features, model.score.out_features, bias=False, device="meta")
    head.weight = torch.nn.Parameter(model.score.weight.data.float())
    model.score = head


def load_classifier(
    base_model: str, n_labels: int, multi_label: bool = False, precision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The stock `AutoModelForSequenceClassification`, quantized as the profile or `precision` says, its head in float32.

    With `multi_label` its loss is binary cross-entropy, label by label.
    """
    tokenizer = base_models.load_tokenizer(base_model)
    prompts.check_open_end(tokenizer)
    kind = AutoModelForSequenceClassification
    problem = "multi_label_classification" if multi_label else "single_label_classification"
    options = {"num_labels": n_labels, "problem_type": problem, "pad_token_id": tokenizer.pad_token_id}
    model = base_models.load(base_model, kind, precision, **options)
    float32_head(model)
    return model, tokenizer


def train_classifier(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    gold: list,
    *,
    precision: str | None = None,
    trainer: dict | None = None,
    **options,
) -> None:
    """Train what is trainable in `model` in place with the stock `Trainer`: AdamW, a tenth of warm-up, then linear decay.

    Args:
        gold: label numbers; for a multi-label model lists of zeros and ones.
        precision: of the base model, see `profiles.current`; where its dtype has 16 bits, training computes in it (autocast).
        trainer: more arguments of the `Trainer`, such as `callbacks`, or `compute_loss_func` instead of the model's own loss.
        options: of `TrainingArguments`; `output_dir` is needed.
    """
    if isinstance(gold[0], list):
        gold = [[float(one) for one in row] for row in gold]  # what binary cross-entropy takes
    training = Trainer(
        **(trainer or {}),
        model=model,
        args=TrainingArguments(**options, **trainer_options(profiles.current(precision))),
        train_dataset=Dataset.from_dict({**tokenizer(texts), "label": gold}),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    # A classifier's loss is the mean of its own batch: accumulated gradients would be N times too large (transformers #47688).
    training.model_accepts_loss_kwargs = False
    run_training(training)


@dataclass
class EmbeddingHead(LoraApproach):
    """Text + suffix → last token's embedding → linear head; head and LoRA are trained together.

    Takes single- and multi-label tasks. What lies below the adapters is computed once per document (`frozen_layers`).

    Attributes:
        probe_init: start the head from the frozen probe (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054)
            and not from random numbers.
    """

    probe_init: bool = True
    name: str = "embedding head + LoRA"

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_classifier(self.base_model, len(self.labels), self.multi_label, self.precision)

    def _train(self, task: Task, options: dict) -> None:
        texts, gold = self._prompts(texts_of(task.train)), list(task.train["label"])
        prompts.encode(texts, self.tokenizer)  # refuse what is too long before the training
        if self.probe_init:
            probe = fit_probe(embed(texts, self.model, self.tokenizer), np.array(gold))
            self.model.score.weight.data.copy_(torch.as_tensor(probe.coef_))
        lora = base_models.upper_lora(self.model, "SEQ_CLS", self.rank, self.n_layers, **self.lora)
        self.model = get_peft_model(self.model, lora)
        options |= {"precision": self.precision, "trainer": {"callbacks": [*self.callbacks]}}
        train_classifier(self.model, self.tokenizer, texts, gold, **options)

    @torch.inference_mode()
    def _predict_proba(self, texts: list[str], batch_size: int) -> np.ndarray:
        logits = torch.empty(len(texts), len(self.labels))
        for rows, batch in prompts.batches(self._prompts(texts), self.tokenizer, batch_size):
            logits[rows] = self.model(**batch.to(self.model.device), use_cache=False).logits.float().cpu()
        return (logits.sigmoid() if self.multi_label else logits.softmax(-1)).numpy()
