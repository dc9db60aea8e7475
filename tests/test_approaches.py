import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from helpers import base_models, instruction, profiles
from helpers.approach import SUFFIX
from helpers.baselines import FineTunedEncoder, FrozenProbe, Majority, TfidfSvm
from helpers.embedding_head import EmbeddingHead, float32_head, load_classifier, train_classifier
from helpers.embeddings import embed, fit_probe
from helpers.errors import BookError
from helpers.evaluation import Predictions
from helpers.frozen_layers import cached_lower_layers
from helpers.instruction import InstructionTuned, LabelTokensTrainer
from helpers.lab.approaches import SharedPrefixTrainer
from helpers.label_scoring import label_tokens, score_labels
from helpers.tasks import SPLITS, Task

APPROACHES = {
    "majority": lambda model: Majority(),
    "svm": lambda model: TfidfSvm(),
    "probe, last token": lambda model: FrozenProbe(model),
    "probe, mean": lambda model: FrozenProbe(model, pooling="mean"),
    "encoder": lambda model: FineTunedEncoder(model, epochs=1),
    "embedding head": lambda model: EmbeddingHead(model, n_layers=1, epochs=1),
    "embedding head, random start": lambda model: EmbeddingHead(model, n_layers=1, epochs=1, probe_init=False),
    "instruction tuning": lambda model: InstructionTuned(model, n_layers=1, epochs=1),
    "instruction, as it comes": lambda model: InstructionTuned(model, epochs=0),
}
every_approach = pytest.mark.parametrize("make", APPROACHES.values(), ids=APPROACHES.keys())
LORA_OF_ONE_LAYER = 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + (32 + 64) + (32 + 64) + (64 + 32))  # rank 4
TEXTS = ["a", "some words of no great length", "one two three", "and a much longer text that says little at some length"]


@pytest.fixture(scope="module")
def head(tiny_model, tiny_task):
    return EmbeddingHead(tiny_model, n_layers=1, rank=4, epochs=1, learning_rate=1e-2).fit(tiny_task)


@pytest.fixture(scope="module")
def tuned(tiny_model, tiny_task):
    return InstructionTuned(tiny_model, n_layers=1, rank=4, epochs=1).fit(tiny_task)


@pytest.fixture(scope="module")
def causal_lm(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return base_models.load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def two_labels(tiny_task):
    kept = {split: getattr(tiny_task, split).filter(lambda document: document["label"] < 2) for split in SPLITS}
    return Task("two", tiny_task.labels[:2], **kept)


@every_approach
def test_every_approach_takes_a_task_and_gives_the_same_predictions_twice(make, tiny_model, tiny_task):
    first, second = (make(tiny_model).fit(tiny_task).predict(tiny_task.test) for _ in range(2))
    assert isinstance(first, Predictions)
    assert first.labels == tiny_task.labels
    assert first.gold.tolist() == tiny_task.test["label"]
    assert first.probabilities.shape == (6, 3)
    assert first.seconds > 0
    tolerance = 0
    assert np.allclose(first.probabilities, second.probabilities, rtol=0, atol=tolerance)


@every_approach
def test_every_approach_takes_two_labels(make, tiny_model, two_labels):
    approach = make(tiny_model).fit(two_labels)
    predictions = approach.predict(two_labels.test)
    assert predictions.probabilities.shape == (4, 2)
    assert predictions.gold.tolist() == two_labels.test["label"]


@pytest.mark.parametrize("make", [lambda model: TfidfSvm(), FrozenProbe], ids=["svm", "probe"])
def test_two_labels_are_not_swapped(make, tiny_model, two_labels):
    approach = make(tiny_model).fit(two_labels)
    assert approach.predict(two_labels.train).correct.mean() > 0.8


def test_encoder_is_trained_whole(tiny_model, tiny_task):
    approach = FineTunedEncoder(tiny_model, epochs=12, learning_rate=1e-2).fit(tiny_task)
    predictions = approach.predict(tiny_task.train)
    assert predictions.correct.all()
    before = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).state_dict()
    after = approach.model.state_dict()
    assert predictions.trainable_parameters == sum(value.numel() for value in after.values())
    assert all((before[name] != after[name]).any() for name in after)


@pytest.mark.parametrize("make", [EmbeddingHead, InstructionTuned])
def test_training_learns_the_training_documents(make, tiny_model, tiny_task):
    options = {"probe_init": False} if make is EmbeddingHead else {}
    approach = make(tiny_model, n_layers=None, epochs=12, learning_rate=1e-2, **options).fit(tiny_task)
    assert approach.predict(tiny_task.train).correct.all()


@pytest.mark.parametrize("name", ["embedding head, random start", "instruction tuning"])
def test_another_seed_gives_another_model(name, tiny_model, tiny_task, head, tuned):
    approaches = [APPROACHES[name](tiny_model) for _ in range(2)]
    approaches[1].seed = 1
    first, second = (approach.fit(tiny_task).predict(tiny_task.test).probabilities for approach in approaches)
    assert not np.array_equal(first, second)


def test_majority_gives_the_training_frequencies(tiny_task):
    parts = {split: getattr(tiny_task, split) for split in SPLITS}
    parts["train"] = tiny_task.train.select([0, 1, 2, 4, 7, 10])
    predictions = Majority().fit(Task("x", tiny_task.labels, **parts)).predict(tiny_task.test)
    assert predictions.probabilities[0] == pytest.approx([1 / 6, 4 / 6, 1 / 6])


def test_svm_learns_separable_documents(tiny_task):
    predictions = TfidfSvm().fit(tiny_task).predict(tiny_task.train)
    assert predictions.correct.all()
    assert predictions.trainable_parameters % 3 == 0 and predictions.trainable_parameters > 0


def test_groups_of_documents_reach_the_predictions(tiny_task):
    svm = TfidfSvm().fit(tiny_task)
    assert svm.predict(tiny_task.test).groups is None
    names = [f"source {row // 2}" for row in range(len(tiny_task.test))]
    assert svm.predict(tiny_task.test.add_column("group", names)).groups.tolist() == names


def test_probe_learns_the_training_documents(tiny_model, tiny_task):
    predictions = FrozenProbe(tiny_model).fit(tiny_task).predict(tiny_task.train)
    assert predictions.correct.all()
    assert predictions.trainable_parameters == 3 * 32


@pytest.mark.parametrize("labels", [2, 3])
def test_untrained_head_started_from_the_probe_is_the_probe(tiny_model, tiny_task, two_labels, labels):
    task = tiny_task if labels == 3 else two_labels
    head = EmbeddingHead(tiny_model, learning_rate=0.0, n_layers=1).fit(task).predict(task.test)
    probe = FrozenProbe(tiny_model).fit(task).predict(task.test)
    assert np.allclose(head.probabilities, probe.probabilities, atol=1e-5)
    assert np.ptp(probe.probabilities, axis=0).min() > 0.01


def test_training_moves_head_and_lora(head, tiny_model, tiny_task):
    probe = FrozenProbe(tiny_model).fit(tiny_task).predict(tiny_task.test)
    assert np.abs(head.predict(tiny_task.test).probabilities - probe.probabilities).max() > 1e-3
    moved = {name for name, value in head.model.named_parameters() if value.requires_grad and "lora_B" in name and value.any()}
    assert len(moved) == 7 and all(".layers.1." in name for name in moved)


@pytest.mark.parametrize("approach", ["head", "tuned"])
def test_batch_size_does_not_matter(approach, tiny_task, request):
    approach = request.getfixturevalue(approach)
    one, many = (approach.predict(tiny_task.test, batch_size=n) for n in (1, 32))
    assert np.allclose(one.probabilities, many.probabilities, atol=1e-4)
    assert np.ptp(one.probabilities, axis=0).max() > 1e-2
    assert approach.count_tokens(["a text"]) == len(approach.tokenizer("a text" + SUFFIX).input_ids)


@pytest.mark.parametrize("approach", ["head", "tuned"])
def test_order_of_documents_does_not_matter(approach, tiny_task, request):
    approach = request.getfixturevalue(approach)
    order = [4, 0, 5, 2, 1, 3]
    straight = approach.predict(tiny_task.test, batch_size=4)
    shuffled = approach.predict(tiny_task.test.select(order), batch_size=4)
    assert np.allclose(straight.probabilities[order], shuffled.probabilities, atol=1e-4)
    assert straight.gold[order].tolist() == shuffled.gold.tolist()


def test_trained_numbers_are_the_adapters_and_the_head(head, tuned, tiny_task):
    assert head.predict(tiny_task.test).trainable_parameters == LORA_OF_ONE_LAYER + 3 * 32
    assert tuned.predict(tiny_task.test).trainable_parameters == LORA_OF_ONE_LAYER


def test_model_as_it_comes_trained_nothing(tiny_model, tiny_task, causal_lm, tokenizer):
    predictions = InstructionTuned(tiny_model, epochs=0).fit(tiny_task).predict(tiny_task.test)
    assert (predictions.trainable_parameters, predictions.training_seconds) == (0, 0)
    scores = score_labels([text + SUFFIX for text in tiny_task.test["text"]], tiny_task.labels, causal_lm, tokenizer)
    assert np.allclose(predictions.probabilities, scores.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_embedding_is_that_of_the_text_alone(causal_lm, tokenizer, pooling, batch_size, padding_side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    vectors = embed(TEXTS, causal_lm, tokenizer, pooling, batch_size)
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            ids = tokenizer(text, return_tensors="pt").input_ids
            hidden = causal_lm.base_model(ids).last_hidden_state[0]
        assert np.allclose(vector, hidden[-1] if pooling == "last" else hidden.mean(0), atol=1e-4)


def test_unknown_pooling_suggests_the_nearest(causal_lm, tokenizer):
    with pytest.raises(BookError, match="no pooling 'men'. Did you mean 'mean'"):
        embed(TEXTS, causal_lm, tokenizer, "men")


@pytest.mark.parametrize("n_labels", [2, 3])
def test_probe_has_a_row_for_each_label_and_its_softmax_is_that_of_scikit_learn(n_labels):
    generator = np.random.default_rng(0)
    embeddings, gold = generator.normal(size=(60, 8)).astype(np.float32), np.arange(60) % n_labels
    embeddings[:, 0] += gold
    probe = fit_probe(embeddings, gold)
    assert probe.coef_.shape == (n_labels, 8)
    softmax = torch.tensor(embeddings @ probe.coef_.T).softmax(-1).numpy()
    stock = LogisticRegression(C=0.1, fit_intercept=False, max_iter=5000).fit(embeddings, gold)
    assert np.allclose(softmax, stock.predict_proba(embeddings), atol=1e-5)
    assert (softmax.argmax(1) == gold).mean() > 1 / n_labels + 0.1


def test_head_stays_in_float32_on_a_bfloat16_base(tiny_model, monkeypatch):
    monkeypatch.setattr(profiles, "current", lambda *_: profiles.Profile("quick", "cpu", torch.bfloat16))
    model, tokenizer = load_classifier(tiny_model, 3)
    assert model.base_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32 and not model.training
    with torch.inference_mode():
        batch = tokenizer(TEXTS[:1], return_tensors="pt")
        logits = model(**batch).logits
        hidden = model.base_model(**batch).last_hidden_state[:, -1]
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, hidden.float() @ model.score.weight.T, atol=1e-5)
    assert embed(TEXTS, model, tokenizer).dtype == np.float32


def test_a_bfloat16_base_needs_a_float32_head_also_under_autocast(tiny_model, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, dtype=torch.bfloat16, num_labels=2).eval()
    model.score.float()
    batch = tokenizer(TEXTS[:1], return_tensors="pt")
    with pytest.raises(RuntimeError, match="dtype"):
        model(**batch)
    before = model.score.weight.clone()
    float32_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
    hidden = model.base_model(**batch).last_hidden_state[:, -1]
    assert torch.equal(model.score.weight, before) and "score.weight" in model.state_dict()
    assert logits.dtype == torch.float32 and torch.allclose(logits, hidden.float() @ before.T, atol=1e-3)


def test_classifier_pads_with_the_token_of_its_tokenizer(tiny_model):
    model, tokenizer = load_classifier(tiny_model, 3)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.score.weight.shape == (3, 32)


LABELS = {
    "one token": ("sports", "tech"),
    "several tokens": ("sports", "arts and culture", "unputdownable"),
    "one begins another": ("tech", "tech support", "sports"),
}


def test_label_sets_are_what_the_tests_below_say(tokenizer):
    n_tokens = {name: [len(tokenizer(" " + label).input_ids) for label in labels] for name, labels in LABELS.items()}
    assert n_tokens == {"one token": [1, 1], "several tokens": [1, 3, 4], "one begins another": [1, 2, 1]}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_one_forward_pass_for_each_label(causal_lm, tokenizer, labels, batch_size):
    prompts = [text + SUFFIX for text in TEXTS]
    scores = score_labels(prompts, labels, causal_lm, tokenizer, batch_size, tolerance=0)
    assert scores.shape == (4, len(labels)) and scores.dtype == torch.float32
    ended = labels == LABELS["one begins another"]
    for prompt, row in zip(prompts, scores, strict=True):
        for label, score in zip(labels, row, strict=True):
            start = tokenizer(prompt).input_ids
            tail = tokenizer(" " + label).input_ids + [tokenizer.eos_token_id] * ended
            with torch.inference_mode():
                logits = causal_lm(torch.tensor([start + tail])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(tail))
            assert float(score) == pytest.approx(expected, abs=1e-4)


def test_label_tokens_are_ended_only_where_one_begins_another(tokenizer):
    assert all(tokenizer.eos_token_id not in ids for ids in label_tokens(LABELS["several tokens"], tokenizer))
    assert all(ids[-1] == tokenizer.eos_token_id for ids in label_tokens(LABELS["one begins another"], tokenizer))
    assert label_tokens(("tech", "sports"), tokenizer) == [tokenizer(" tech").input_ids, tokenizer(" sports").input_ids]


def test_labels_with_the_same_tokens_are_refused(tokenizer):
    with pytest.raises(BookError, match="'tech' and 'tech' apart") as caught:
        label_tokens(("sports", "tech", "tech"), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.fixture
def trainer_of(monkeypatch, tiny_model, tiny_task):
    """The trainer that `InstructionTuned` builds, not trained."""

    def build(task=tiny_task, **options):
        built = []
        with monkeypatch.context() as patch:
            patch.setattr(LabelTokensTrainer, "train", lambda self, **_: built.append(self))
            InstructionTuned(tiny_model, n_layers=1, rank=4, **options).fit(task)
        return built[0]

    return build


def test_instruction_tuning_keeps_every_document_and_learns_label_and_end_only(trainer_of, tiny_task, tokenizer):
    trainer = trainer_of()
    assert len(trainer.train_dataset) == len(tiny_task.train)
    for document, row in zip(tiny_task.train, trainer.train_dataset, strict=True):
        batch = trainer.data_collator([row])
        prompt = tokenizer(document["text"] + SUFFIX).input_ids
        label = tokenizer(" " + tiny_task.labels[document["label"]]).input_ids + [tokenizer.eos_token_id]
        assert batch["input_ids"][0].tolist() == prompt + label
        assert batch["labels"][0].tolist() == [-100] * len(prompt) + label


def test_longest_document_keeps_its_label(trainer_of, tiny_task, tokenizer):
    rows = tiny_task.train.to_list()
    rows[5]["text"] = "word " * 300
    parts = {split: getattr(tiny_task, split) for split in SPLITS}
    trainer = trainer_of(Task("x", tiny_task.labels, **{**parts, "train": Dataset.from_list(rows)}))
    longest = max((trainer.data_collator([row]) for row in trainer.train_dataset), key=lambda batch: batch["labels"].shape[1])
    assert longest["labels"].shape[1] > 300
    assert longest["labels"][0, -1] == tokenizer.eos_token_id
    assert (longest["labels"][0] != -100).sum() == 2


def test_padding_is_not_learned(trainer_of):
    trainer = trainer_of()
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["attention_mask"] == 0).any()


INSTRUCTION = "Say what this is about, sports or money or tech. The text is: "


@pytest.mark.parametrize(
    "faster, before, cached, counted",
    [
        (LabelTokensTrainer, "", False, None),
        (LabelTokensTrainer, "", False, 100),
        (SharedPrefixTrainer, "", False, None),
        (SharedPrefixTrainer, INSTRUCTION, False, 100),
        (SharedPrefixTrainer, INSTRUCTION, True, None),
    ],
)
def test_faster_trainers_have_the_loss_and_the_gradients_of_the_stock_one(
    tiny_model, tiny_task, tokenizer, tmp_path, faster, before, cached, counted
):
    examples = {
        "prompt": [before + text + SUFFIX for text in tiny_task.train["text"]],
        "completion": [" " + tiny_task.labels[label] for label in tiny_task.train["label"]],
    }
    losses, gradients = [], []
    for trainer_class in (SFTTrainer, faster):
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        trainer = trainer_class(
            model=model,
            args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none"),
            train_dataset=Dataset.from_dict(examples),
            processing_class=tokenizer,
            peft_config=base_models.upper_lora(model, "CAUSAL_LM", 4, 1),
        )
        generator = torch.Generator().manual_seed(1)
        learned = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
        for name, value in learned.items():
            if "lora_B" in name:  # zero at the start, which would leave lora_A without a gradient
                value.data.normal_(0, 0.1, generator=generator)
        trainer.model.train()
        batch = trainer.data_collator(list(trainer.train_dataset)[:8])
        n_items = None if counted is None else torch.tensor(counted)
        with cached_lower_layers(trainer.model, 1 if cached and trainer_class is faster else None):
            loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=n_items)
            loss.backward()
        losses.append(loss.item())
        gradients.append({name: value.grad for name, value in learned.items()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] > 0.1
    assert len(gradients[0]) == 14 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-4
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5)


def test_both_approaches_read_the_same_words(tiny_model):
    assert EmbeddingHead(tiny_model).suffix == InstructionTuned(tiny_model).suffix == FrozenProbe(tiny_model).suffix


def test_faster_trainer_keeps_what_a_model_does_to_its_logits(tokenizer, tmp_path, tiny_task):
    from transformers import GraniteConfig, GraniteForCausalLM

    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    examples = {"prompt": [text + SUFFIX for text in tiny_task.train["text"]], "completion": [" sports"] * len(tiny_task.train)}
    losses = []
    for trainer_class in (SFTTrainer, LabelTokensTrainer):
        set_seed(0)
        model = GraniteForCausalLM(GraniteConfig(**size, **ids, logits_scaling=8.0, initializer_range=0.2))
        trainer = trainer_class(
            model=model,
            args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none"),
            train_dataset=Dataset.from_dict(examples),
            processing_class=tokenizer,
            peft_config=base_models.upper_lora(model, "CAUSAL_LM", 4, 1),
        )
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
        losses.append(trainer.compute_loss(trainer.model, dict(batch)).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_label_scores_do_not_depend_on_padding_with_absolute_positions(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), initializer_range=0.2)).eval()
    prompts = ["short", "a much longer prompt than the first one"]
    labels = ("sports", "information technology")
    together = score_labels(prompts, labels, model, tokenizer)
    alone = torch.cat([score_labels([prompt], labels, model, tokenizer) for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_head_and_instruction_train_float32_adapters_under_the_same_autocast(kind, tiny_model, tiny_task, monkeypatch):
    profile = profiles.Profile("quick", "cpu", torch.bfloat16, attention="eager")
    monkeypatch.setattr(profiles, "current", lambda *_: profile)
    found = []

    def note(trainer, **_):
        trained = {each.dtype for each in trainer.model.parameters() if each.requires_grad}
        frozen = {each.dtype for name, each in trainer.model.named_parameters() if "proj.base_layer" in name}
        found.append((trainer.args.bf16, trained, frozen))

    monkeypatch.setattr(Trainer, "train", note)
    kind(tiny_model, n_layers=1).fit(tiny_task)
    assert found == [(True, {torch.float32}, {torch.bfloat16})]


def test_adapters_that_trl_casts_on_a_4_bit_model_are_float32_again(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).bfloat16()
    model.lm_head.requires_grad_(False)
    instruction.float32_adapters(model)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}


def test_accumulated_gradients_of_the_head_are_those_of_one_batch(tiny_model, tiny_task, tmp_path):
    moved = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        set_seed(0)
        model, tokenizer = load_classifier(tiny_model, 3)
        model.base_model.requires_grad_(False)
        before = model.score.weight.clone()
        options = dict(optim="sgd", learning_rate=1.0, max_steps=1, lr_scheduler_type="constant", output_dir=str(tmp_path))
        texts, gold = list(tiny_task.train["text"])[:8], list(tiny_task.train["label"])[:8]
        accumulation = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated)
        train_classifier(model, tokenizer, texts, gold, save_strategy="no", max_grad_norm=0, **accumulation, **options)
        moved.append((model.score.weight - before).detach())
    assert moved[0].abs().max() > 1e-2 and torch.allclose(*moved, atol=1e-4)


def test_a_base_that_closes_every_text_is_refused(tiny_model, tiny_task, tmp_path):
    tokenizer = base_models.load_tokenizer(tiny_model)
    closing = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = closing
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for kind in (EmbeddingHead, InstructionTuned):
        with pytest.raises(BookError, match="appends '<|im_end|>' to every text") as caught:
            kind(str(tmp_path), n_layers=1).fit(tiny_task)
        assert "\n" not in str(caught.value)
