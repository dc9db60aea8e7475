"""Approach 2: the model is tuned to write the label after the document, and asked how likely each label is.

Chapter 00 builds it in plain cells; this is the same in one call.
"""

import tempfile
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from helpers import base_models, profiles
from helpers.embedding_head import SUFFIX
from helpers.errors import BookError
from helpers.evaluation import Predictions, measure
from helpers.tasks import Task


def label_tokens(labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each label as it stands after the prompt: with a leading space, and ended where that is needed.

    When one label's tokens begin another's (`tech`, `tech support`), the shorter would win whatever the model thinks of
    its end, so the end-of-sequence token is appended to every label.

    Raises:
        BookError: two labels with the same tokens.
    """
    ids = [tokenizer(" " + label, add_special_tokens=False).input_ids for label in labels]
    for i, first in enumerate(ids):
        for j, second in enumerate(ids):
            if i != j and first == second:
                raise BookError(f"The tokenizer cannot tell the labels {labels[i]!r} and {labels[j]!r} apart. Rename one.")
    if any(i != j and second[: len(first)] == first for i, first in enumerate(ids) for j, second in enumerate(ids)):
        ids = [label + [tokenizer.eos_token_id] for label in ids]
    return ids


@torch.inference_mode()
def score_labels(
    prompts: list[str],
    labels: tuple[str, ...],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> torch.Tensor:
    """Log-probability of every label as the continuation of every prompt.

    One forward pass over the prompt gives the first token of all labels at once; only labels of several tokens need
    another, of the prompt with the label behind it. Nothing is generated, so every answer is a label.

    Returns:
        float32 tensor of shape (n_prompts, n_labels). The rows are not normalised: what is missing to 1 is the
        probability of saying something that is no label.
    """
    ids = label_tokens(labels, tokenizer)
    scores = torch.empty(len(prompts), len(labels))
    for rows, batch in base_models.batches(prompts, tokenizer, batch_size, side="left"):
        batch = batch.to(model.device)
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)  # left padding does not count, also in GPT-2
        logits = model(**batch, position_ids=positions, logits_to_keep=1, use_cache=False).logits[:, -1].float()
        scores[rows] = logits.log_softmax(-1)[:, [label[0] for label in ids]].cpu()
        for column, label in enumerate(ids):
            if len(label) > 1:
                tail = torch.tensor(label, device=model.device).repeat(len(rows), 1)
                mask = torch.cat([batch.attention_mask, torch.ones_like(tail[:, :-1])], dim=1)
                logits = model(
                    input_ids=torch.cat([batch.input_ids, tail[:, :-1]], dim=1),
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    logits_to_keep=len(label) - 1,
                    use_cache=False,
                ).logits.float()
                later = logits.log_softmax(-1).gather(-1, tail[:, 1:, None]).sum((1, 2))
                scores[rows, column] += later.cpu()
    return scores


class LabelTokensTrainer(SFTTrainer):
    """SFTTrainer whose loss touches the label's positions only: the same loss and gradients, about half the time on a CPU.

    On a GPU, TRL 1.16 projects just the positions that have a label onto the vocabulary. On a CPU it projects every
    position, and for SmolLM2 that costs as much as all the rest of a training step.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy, summed over the label tokens and divided by their number in the whole (accumulated) batch."""
        kept = inputs["labels"][:, 1:] != -100
        columns = kept.any(0).nonzero().squeeze(1)  # positions at which some row has a label to predict
        kept = kept[:, columns]
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=columns, use_cache=False
        ).logits[kept]
        labels = inputs["labels"][:, 1:][:, columns][kept]
        total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"logits": logits}) if return_outputs else loss


@dataclass
class InstructionTuned:
    """Text + suffix → label as text, trained with SFTTrainer on the label's tokens alone, read by scoring labels.

    Attributes:
        base_model: see `base_models.fetch`.
        suffix: what stands between the document and its label.
        n_layers: LoRA on the linear layers of the upper `n_layers` blocks; None for all.
        rank, learning_rate, epochs, batch_size, seed: of the training; `epochs=0` scores the model as it comes.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX
    n_layers: int | None = 10
    rank: int = 16
    learning_rate: float = 1e-3
    epochs: int = 2
    batch_size: int = 8
    seed: int = 0
    name: str = "instruction tuning + LoRA"

    def fit(self, task: Task) -> "InstructionTuned":
        """Train on `task.train`; nothing of validation or test is looked at.

        Raises:
            BookError: TRL dropped documents whose prompt left no room for the label.
        """
        self.labels = task.labels
        profile = profiles.current()
        with measure() as self._cost:
            set_seed(self.seed)
            self.tokenizer = base_models.load_tokenizer(self.base_model)
            self.model = AutoModelForCausalLM.from_pretrained(
                base_models.fetch(self.base_model),
                dtype=profile.dtype,
                quantization_config=profile.quantization,
                device_map=profile.device,
            )
            if self.epochs:
                self._train(task, profile)
        self.model.eval()
        return self

    def _train(self, task: Task, profile: profiles.Profile) -> None:
        examples = {
            "prompt": [text + self.suffix for text in task.train["text"]],
            "completion": [" " + task.labels[label] for label in task.train["label"]],
        }
        longest = max(map(len, self.tokenizer([p + c for p, c in zip(*examples.values(), strict=True)]).input_ids))
        with tempfile.TemporaryDirectory() as scratch:
            trainer_class = SFTTrainer if profile.device == "cuda" else LabelTokensTrainer
            trainer = trainer_class(
                model=self.model,
                args=SFTConfig(
                    output_dir=scratch,
                    max_length=longest + 1,  # and the end of sequence, which TRL appends
                    num_train_epochs=self.epochs,
                    per_device_train_batch_size=self.batch_size,
                    learning_rate=self.learning_rate,
                    warmup_steps=0.1,
                    activation_checkpointing=False,
                    bf16=profile.dtype == torch.bfloat16,
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                    use_cpu=profile.device == "cpu",
                    seed=self.seed,
                ),
                train_dataset=Dataset.from_dict(examples),
                processing_class=self.tokenizer,
                peft_config=base_models.upper_lora(self.model, "CAUSAL_LM", self.rank, self.n_layers),
            )
            if len(trainer.train_dataset) != len(task.train):
                raise BookError(
                    f"TRL kept {len(trainer.train_dataset)} of {len(task.train)} training documents: the others have no "
                    "room for their label. Shorten the documents (`tasks.load(…, shorten=…)`)."
                )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            self.model = trainer.model

    def predict(self, documents: Dataset, batch_size: int = 32) -> Predictions:
        """Probabilities of every label for `documents`, which has the columns `text` and `label`."""
        prompts = [text + self.suffix for text in documents["text"]]
        with measure() as cost:
            scores = score_labels(prompts, self.labels, self.model, self.tokenizer, batch_size)
        return Predictions(
            self.name,
            self.labels,
            scores.softmax(-1).numpy(),
            documents["label"],
            seconds=cost.seconds,
            training_seconds=self._cost.seconds if self.epochs else 0.0,
            trainable_parameters=self.model.num_parameters(only_trainable=True) if self.epochs else 0,
            tokens=sum(map(len, self.tokenizer(prompts).input_ids)),
            peak_memory=cost.peak_memory,
        )
