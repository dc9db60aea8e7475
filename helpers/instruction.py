"""Approach 2: the model is tuned to write the label after the document, and asked how likely each label is.

Chapters 00 and 05 build it in plain cells; this is the same in one call.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from helpers import adapters, base_models, profiles
from helpers.embedding_head import SUFFIX
from helpers.errors import BookError, unknown_name
from helpers.evaluation import Predictions, measure
from helpers.frozen_layers import computed_once
from helpers.label_scoring import NO_LABEL, label_tokens, list_items, score_label_lists, score_labels, score_questions
from helpers.tasks import Task, gold_of, texts_of


class LabelTokensTrainer(SFTTrainer):
    """SFTTrainer whose loss touches the label's positions only: the same loss and gradients, about half the time on a CPU.

    On a GPU, TRL 1.16 projects just the positions that have a label onto the vocabulary. On a CPU it projects every
    position, and for SmolLM2 that costs as much as all the rest of a training step.

    Attributes:
        prompt_loss_weight: what a token of the prompt counts in the loss, against 1 for one of the label. More than 0 needs
            the logits of all positions (Huerta-Enochian and Ko 2024, arXiv 2401.13586).
    """

    prompt_loss_weight = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy, summed over the label tokens and divided by their number in the whole (accumulated) batch."""
        if self.prompt_loss_weight:
            return self._over_the_prompt_too(model, inputs, return_outputs)
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

    def _over_the_prompt_too(self, model, inputs, return_outputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        said = inputs["labels"][:, 1:] != -100
        weights = torch.where(said, 1.0, self.prompt_loss_weight) * mask[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        return (loss, {"logits": logits}) if return_outputs else loss


@dataclass
class InstructionTuned(adapters.Adapted):
    """Text + suffix → label as text, trained with SFTTrainer on the label's tokens alone, read by scoring labels.

    In a multi-label task the text is the list of the document's labels, or an answer to a question about each (chapter 07).

    Attributes:
        base_model: see `base_models.fetch`.
        prefix, suffix: what stands before the document, and between the document and its label; `{labels}` in them is
            replaced by the list of all labels.
        chat: put all of it into the tokenizer's chat template, as the user's words.
        shots: so many training documents of each label, with their labels, stand before the prefix; for `epochs=0` only.
        verbalizer: what is written for each label instead of its name.
        ask: multi-label, for the `list` of labels or with a yes/no question (`questions`) about each. In training there are
            questions about a document's own labels and about two others, drawn at random.
        order: of the labels in a list: as in the `task`, `frequent` ones first, `rare` ones first, or `random`.
        prompt_loss_weight: see `LabelTokensTrainer`.
        precision: of the base model's weights, see `profiles.current`.
        n_layers: LoRA on the linear layers of the upper `n_layers` blocks; None for all.
        lora: more options of `LoraConfig`.
        rank, learning_rate, epochs, batch_size, seed: of the training; `epochs=0` scores the model as it comes. The defaults
            were chosen on validation documents of BBC News, 32 a class.
        checkpoints: a folder that gets one after every epoch; a training that was stopped goes on from there.
    """

    base_model: str = base_models.DEFAULT
    prefix: str = ""
    suffix: str = SUFFIX
    chat: bool = False
    shots: int = 0
    verbalizer: dict[str, str] | None = None
    ask: str = "list"
    order: str = "task"
    prompt_loss_weight: float = 0.0
    precision: str | None = None
    n_layers: int | None = 10
    lora: dict = field(default_factory=dict)
    rank: int = 16
    learning_rate: float = 5e-4
    epochs: int = 4
    batch_size: int = 8
    seed: int = 0
    checkpoints: str | None = None
    name: str = "instruction tuning + LoRA"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in {"ask": ("list", "questions"), "order": ("task", "frequent", "rare", "random")}.items():
            if getattr(self, name) not in known:
                raise unknown_name(f"value of `{name}`", getattr(self, name), known)
        if self.shots and self.epochs:
            raise BookError("shots are for a model that is not trained: use epochs=0 with them, or shots=0.")

    def _load_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        profile = profiles.current(self.precision)
        model = AutoModelForCausalLM.from_pretrained(
            base_models.fetch(self.base_model),
            dtype=profile.dtype,
            quantization_config=profile.quantization,
            device_map=profile.device,
        )
        base_models.keep_trainable(model)
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
        words = self._words()
        self._claim_checkpoints(task)
        with measure() as cost:
            set_seed(self.seed)
            self.model, self.tokenizer = self._load_base()
            # refuse labels before the training, not after it
            listed = self.multi_label and self.ask == "list"
            label_tokens(list_items(words, self.tokenizer) if listed else words, self.tokenizer, self._space)
            self._examples = self._shots(task)
            if self.epochs:
                with computed_once(self.model, self.n_layers), adapters.checkpoint_options(self.checkpoints) as options:
                    self._train(task, options)
        self.training_seconds = cost.seconds if self.epochs else 0.0
        self.model.eval()
        return self

    def _words(self) -> tuple[str, ...]:
        """What is written for each label."""
        if self.verbalizer is None:
            return self.labels
        if set(self.verbalizer) != set(self.labels):
            wrong = sorted(set(self.verbalizer) ^ set(self.labels))[0]
            raise BookError(f"The verbalizer needs one entry for each label and no other: {wrong!r} is too many or missing.")
        return tuple(self.verbalizer[label] for label in self.labels)

    @property
    def _space(self) -> str:
        return "" if self.chat else " "  # a chat template ends with a line break

    def _prompts(self, texts: list[str]) -> list[str]:
        """The documents as the model reads them, up to their labels.

        Raises:
            BookError: there is no chat template, or what `base_models.framed` refuses.
        """
        listed = ", ".join(self._words())
        prefix, suffix = (each.replace("{labels}", listed) for each in (self.prefix, self.suffix))
        prefix = getattr(self, "_examples", "") + prefix
        prompts = base_models.framed(texts, self.tokenizer, prefix, suffix)
        if not self.chat:
            return prompts
        if not self.tokenizer.chat_template:
            raise BookError(f"The tokenizer of {self.base_model} has no chat template. Use chat=False, or another base model.")
        said = [[{"role": "user", "content": prompt}] for prompt in (f"{prefix}x{suffix}", *prompts)]
        prompts = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        begins = self.tokenizer.bos_token if self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id else ""
        ordinary, *prompts = (prompt.removeprefix(begins) for prompt in prompts)  # else it would begin twice
        base_models.check_control_tokens(prompts, ordinary, self.tokenizer)
        return prompts

    def _shots(self, task: Task) -> str:
        """Training documents with their labels, as the model reads them before the document."""
        if not self.shots:
            return ""
        gold = np.array(task.train["label"])
        rows = [row for label in range(len(self.labels)) for row in np.flatnonzero(gold == label)[: self.shots]]
        rows = np.random.default_rng(self.seed).permutation(rows)
        documents = task.train.select(rows)
        prompts = base_models.framed(texts_of(documents), self.tokenizer, self.prefix, self.suffix)
        pairs = zip(prompts, documents["label"], strict=True)
        return "".join(f"{prompt} {self._words()[label]}\n\n" for prompt, label in pairs)

    def _train(self, task: Task, options: dict) -> None:
        profile = profiles.current(self.precision)
        examples = self._training_examples(task)
        whole = [prompt + completion for prompt, completion in zip(*examples.values(), strict=True)]
        longest = max(map(len, base_models.encode(whole, self.tokenizer)))
        ours = profile.device == "cpu" or self.prompt_loss_weight
        trainer = (LabelTokensTrainer if ours else SFTTrainer)(
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
            peft_config=base_models.upper_lora(self.model, "CAUSAL_LM", self.rank, self.n_layers, **self.lora),
        )
        adapters.keep_in_float32(trainer)
        trainer.prompt_loss_weight = self.prompt_loss_weight
        if len(trainer.train_dataset) != len(whole):
            raise BookError(
                f"TRL kept {len(trainer.train_dataset)} of {len(whole)} training examples: the others have no "
                "room for their label. Shorten the documents (`tasks.load(…, shorten=…)`)."
            )
        adapters.train(trainer)
        self.model = trainer.model

    def _training_examples(self, task: Task) -> dict[str, list[str]]:
        """Columns `prompt` and `completion`, for SFTTrainer."""
        prompts, words = self._prompts(texts_of(task.train)), self._words()
        gold = task.train["label"]
        if not self.multi_label:
            return {"prompt": prompts, "completion": [self._space + words[label] for label in gold]}
        generator = np.random.default_rng(self.seed)
        if self.ask == "list":
            counts = np.sum(gold, axis=0)
            ranks = {"task": np.arange(len(words)), "frequent": -counts, "rare": counts}.get(self.order)
            said = []
            for row in np.array(gold):
                own = np.flatnonzero(row)
                own = generator.permutation(own) if ranks is None else own[ranks[own].argsort(kind="stable")]
                said.append(self._space + (", ".join(words[label] for label in own) or NO_LABEL))
            return {"prompt": prompts, "completion": said}
        asked, answers = [], []
        for prompt, row in zip(prompts, np.array(gold), strict=True):
            others = np.flatnonzero(row == 0)
            others = generator.choice(others, min(2, len(others)), replace=False)
            for label in [*np.flatnonzero(row), *others]:
                asked.append(f"{prompt}{self._space}{words[label]}?")
                answers.append(" yes" if row[label] else " no")
        return {"prompt": asked, "completion": answers}

    def predict(self, documents: Dataset, batch_size: int = 32) -> Predictions:
        """Probabilities of every label for `documents`, which has the columns `text` and `label`.

        Raises:
            BookError: a column is missing, or a text is empty or longer than the model takes.
        """
        gold, prompts = gold_of(documents), self._prompts(texts_of(documents))
        scorer = score_labels
        if self.multi_label:
            scorer = score_label_lists if self.ask == "list" else score_questions
        with measure() as cost:
            scores = scorer(prompts, self._words(), self.model, self.tokenizer, batch_size, space=self._space)
            probabilities = scores if self.multi_label else scores.softmax(-1)
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
