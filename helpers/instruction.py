"""Approach 2: the model is tuned to write the label after the document, and asked how likely each label is.

Chapters 00 and 05 build it in plain cells; this is the same in one call.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from helpers import base_models, profiles, prompts
from helpers.approach import LoraApproach
from helpers.checkpoints import run_training, trainer_options
from helpers.errors import BookError
from helpers.label_scoring import NO_LABEL, label_tokens, list_items, score_label_lists, score_labels
from helpers.tasks import Task, texts_of


class LabelTokensTrainer(SFTTrainer):
    """SFTTrainer whose loss touches the label's positions only: the same loss and gradients, about half the time on a CPU.

    On a GPU, TRL 1.16 projects just the positions that have a label onto the vocabulary. On a CPU it projects every
    position, and for SmolLM2 that costs as much as all the rest of a training step.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy, summed over the label tokens and divided by their number in the whole (accumulated) batch."""
        is_label = inputs["labels"][:, 1:] != -100
        columns = is_label.any(0).nonzero().squeeze(1)  # positions at which some row has a label to predict
        is_label = is_label[:, columns]
        logits = self.logits_at(columns, model, inputs["input_ids"], inputs["attention_mask"])[is_label]
        labels = inputs["labels"][:, 1:][:, columns][is_label]
        total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"logits": logits}) if return_outputs else loss

    def logits_at(self, columns: torch.Tensor, model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Shape (n_texts, len(columns), n_tokens_known): what follows these positions."""
        return model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=columns, use_cache=False).logits


def float32_adapters(model: torch.nn.Module) -> None:
    """Make what is trained float32 again, in place: SFTTrainer of TRL 1.16 casts adapters on a 4-bit model to bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@dataclass
class InstructionTuned(LoraApproach):
    """Text + suffix → label as text, trained with SFTTrainer on label and end of sequence alone, read by scoring labels.

    In a multi-label task the text is the list of the document's labels (chapter 07). `epochs=0` scores the model as it comes.

    Attributes:
        chat: put all of it into the tokenizer's chat template, as the user's words.
    """

    chat: bool = False
    epochs: int = 4
    name: str = "instruction tuning + LoRA"

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = base_models.load_tokenizer(self.base_model)
        prompts.check_open_end(tokenizer)
        model = base_models.load(self.base_model, precision=self.precision)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    @property
    def _space(self) -> str:
        return "" if self.chat else " "  # a chat template ends with a line break

    def _prompts(self, texts: list[str]) -> list[str]:
        """As `LoraApproach` makes them, with `chat` in the chat template, as a user's words. BookError: there is no template."""
        plain = super()._prompts(texts)
        if not self.chat:
            return plain
        if not self.tokenizer.chat_template:
            raise BookError(f"The tokenizer of {self.base_model} has no chat template. Use chat=False, or another base model.")
        before, after = self._frame()
        messages = [[{"role": "user", "content": each}] for each in (f"{before}x{after}", *plain)]
        chats = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # a tokenizer that begins every text with a token of its own would read the template's as a second one
        bos = self.tokenizer.bos_token if self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id else ""
        of_no_document, *chats = (chat.removeprefix(bos) for chat in chats)
        prompts.check_control_tokens(chats, of_no_document, self.tokenizer)
        return chats

    def _examples(self, task: Task) -> dict[str, list[str]]:
        """Columns `prompt` and `completion`, for SFTTrainer."""
        words, answers = self._words(), task.train["label"]
        if self.multi_label:
            answers = [", ".join(words[label] for label in np.flatnonzero(gold)) or NO_LABEL for gold in answers]
        else:
            answers = [words[label] for label in answers]
        return {"prompt": self._prompts(texts_of(task.train)), "completion": [self._space + answer for answer in answers]}

    def _trainer_class(self) -> type[SFTTrainer]:
        return LabelTokensTrainer if profiles.current().device == "cpu" else SFTTrainer

    def _train(self, task: Task, options: dict) -> None:
        words = list_items(self._words(), self.tokenizer) if self.multi_label else self._words()
        label_tokens(words, self.tokenizer, self._space, self._prompts(["x"])[0])  # refuse what could not be scored afterwards
        if not self.epochs:
            return
        profile, examples = profiles.current(self.precision), self._examples(task)
        whole = [prompt + completion for prompt, completion in zip(*examples.values(), strict=True)]
        prompts.encode(whole, self.tokenizer)  # refuse what is too long before the training
        trainer = self._trainer_class()(
            model=self.model,
            args=SFTConfig(**options, max_length=None, activation_checkpointing=False, **trainer_options(profile)),
            train_dataset=Dataset.from_dict(examples),
            processing_class=self.tokenizer,
            callbacks=[*self.callbacks],
            peft_config=base_models.upper_lora(self.model, "CAUSAL_LM", self.rank, self.n_layers, **self.lora),
        )
        float32_adapters(trainer.model)
        self.model = trainer.model
        run_training(trainer)

    def _predict_proba(self, texts: list[str], batch_size: int) -> np.ndarray:
        score = score_label_lists if self.multi_label else score_labels
        scores = score(self._prompts(texts), self._words(), self.model, self.tokenizer, batch_size, space=self._space)
        return (scores if self.multi_label else scores.softmax(-1)).numpy()
