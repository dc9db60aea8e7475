"""Approach 2: the model is tuned to write the label after the document, and asked how likely each label is.

Chapters 00 and 05 build it in plain cells; this is the same in one call.
"""

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from helpers import adapters, base_models, profiles
from helpers.embedding_head import SUFFIX
from helpers.errors import BookError
from helpers.evaluation import Predictions, measure
from helpers.frozen_layers import computed_once
from helpers.label_scoring import NO_LABEL, label_tokens, list_items, score_label_lists, score_labels
from helpers.tasks import Task, gold_of, texts_of


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
class InstructionTuned(adapters.Adapted):
    """Text + suffix → label as text, trained with SFTTrainer on the label's tokens alone, read by scoring labels.

    In a multi-label task the text is the list of the document's labels, in the order of the task's labels (chapter 07).

    Attributes:
        base_model: see `base_models.fetch`.
        suffix: what stands between the document and its label.
        n_layers: LoRA on the linear layers of the upper `n_layers` blocks; None for all.
        rank, learning_rate, epochs, batch_size, seed: of the training; `epochs=0` scores the model as it comes. The defaults
            were chosen on validation documents of BBC News, 32 a class.
        checkpoints: a folder that gets one after every epoch; a training that was stopped goes on from there.
    """

    base_model: str = base_models.DEFAULT
    suffix: str = SUFFIX
    n_layers: int | None = 10
    rank: int = 16
    learning_rate: float = 5e-4
    epochs: int = 4
    batch_size: int = 8
    seed: int = 0
    checkpoints: str | None = None
    name: str = "instruction tuning + LoRA"

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        profile = profiles.current()
        model = AutoModelForCausalLM.from_pretrained(
            base_models.fetch(self.base_model),
            dtype=profile.dtype,
            quantization_config=profile.quantization,
            device_map=profile.device,
        )
        tokenizer = base_models.load_tokenizer(self.base_model)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def fit(self, task: Task) -> "InstructionTuned":
        """Train on `task.train`; nothing of validation or test is looked at.

        Raises:
            BookError: labels that the tokenizer cannot tell apart or that cannot stand in a list, a document that is longer
                than the model takes, documents that TRL dropped, or `checkpoints` holds those of another training.
        """
        self.labels, self.multi_label = task.labels, task.multi_label
        self._claim_checkpoints(task)
        with measure() as cost:
            set_seed(self.seed)
            self.model, self.tokenizer = self._load_base()
            # refuse labels before the training, not after it
            label_tokens(list_items(self.labels, self.tokenizer) if self.multi_label else self.labels, self.tokenizer)
            if self.epochs:
                with computed_once(self.model, self.n_layers), adapters.checkpoint_options(self.checkpoints) as options:
                    self._train(task, options)
        self.training_seconds = cost.seconds if self.epochs else 0.0
        self.model.eval()
        return self

    def _train(self, task: Task, options: dict) -> None:
        profile = profiles.current()
        examples = {
            "prompt": texts_of(task.train, self.suffix),
            "completion": [" " + self._said(label) for label in task.train["label"]],
        }
        whole = [prompt + completion for prompt, completion in zip(*examples.values(), strict=True)]
        longest = max(map(len, base_models.encode(whole, self.tokenizer)))
        trainer_class = SFTTrainer if profile.device == "cuda" else LabelTokensTrainer
        trainer = trainer_class(
            model=self.model,
            args=SFTConfig(
                **options,
                max_length=longest + 1,  # and the end of sequence, which TRL appends
                num_train_epochs=self.epochs,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                warmup_steps=0.1,
                activation_checkpointing=False,
                bf16=profile.dtype == torch.bfloat16,
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
        adapters.train(trainer)
        self.model = trainer.model

    def _said(self, label: int | list[int]) -> str:
        """The label, or the labels, as the model writes them."""
        if not self.multi_label:
            return self.labels[label]
        return ", ".join(name for name, there in zip(self.labels, label, strict=True) if there) or NO_LABEL

    def predict(self, documents: Dataset, batch_size: int = 32) -> Predictions:
        """Probabilities of every label for `documents`, which has the columns `text` and `label`.

        Raises:
            BookError: a column is missing, or a text is empty or longer than the model takes.
        """
        gold, prompts = gold_of(documents), texts_of(documents, self.suffix)
        with measure() as cost:
            if self.multi_label:
                probabilities = score_label_lists(prompts, self.labels, self.model, self.tokenizer, batch_size)
            else:
                probabilities = score_labels(prompts, self.labels, self.model, self.tokenizer, batch_size).softmax(-1)
        return Predictions(
            self.name,
            self.labels,
            probabilities.numpy(),
            gold,
            seconds=cost.seconds,
            training_seconds=self.training_seconds,
            trainable_parameters=self.model.num_parameters(only_trainable=True) if self.epochs else 0,
            tokens=sum(map(len, self.tokenizer(prompts).input_ids)),
            peak_memory=cost.peak_memory,
        )
