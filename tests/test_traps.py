"""The traps of chapters 04 and 05 and of the page about pitfalls: that they are in the pinned libraries, or gone from them, and
that `helpers` avoids them."""

import numpy as np
import pytest
import torch
from conftest import save_tiny
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from sklearn.model_selection import train_test_split
from tokenizers.processors import TemplateProcessing
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from helpers import base_models, label_scoring, profiles, tasks
from helpers.corpora import Document
from helpers.embedding_head import Float32Linear, load_classifier, train_classifier
from helpers.embeddings import embed
from helpers.evaluation import Predictions, best_thresholds, evaluate
from helpers.lab.approaches import EmbeddingHead, InstructionTuned
from helpers.label_scoring import label_tokens, score_labels
from helpers.tasks import Task

SHORT, LONG = "shares rose", "the striker scored twice in the second half of the final"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return base_models.load_tokenizer(tiny_model)


@pytest.fixture
def classifier(tiny_model, tokenizer):
    def build(**options):
        torch.manual_seed(0)
        settings = dict(num_labels=3, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id)
        return AutoModelForSequenceClassification.from_pretrained(tiny_model, **{**settings, **options}).eval()

    return build


@torch.inference_mode()
def logits(model, texts, tokenizer, **options):
    return model(**tokenizer(texts, padding=True, return_tensors="pt", **options)).logits


def test_end_of_sequence_is_pooled_only_with_another_padding_token(classifier, tokenizer):
    ended = SHORT + tokenizer.eos_token
    usual, ours = classifier(pad_token_id=tokenizer.eos_token_id), classifier()
    assert torch.allclose(logits(usual, [SHORT], tokenizer), logits(usual, [ended], tokenizer), atol=1e-5)
    assert (logits(ours, [SHORT], tokenizer) - logits(ours, [ended], tokenizer)).abs().max() > 0.1
    assert tokenizer.pad_token != tokenizer.eos_token


def test_accumulated_means_of_a_classifier_are_added_up(classifier, tokenizer, tmp_path):
    rows = Dataset.from_dict({**tokenizer([SHORT, LONG] * 4), "label": [0, 1] * 4})

    def first_loss(batch_size, accumulate, accepts=True):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate, "logging_steps": 1}
        arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
        trainer = Trainer(classifier(), arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
        trainer.model_accepts_loss_kwargs = accepts
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first_loss(2, 4) == pytest.approx(4 * first_loss(8, 1), rel=1e-3)
    assert first_loss(2, 4, accepts=False) == pytest.approx(first_loss(8, 1), rel=1e-3)


def test_truncation_cuts_the_suffix_and_ours_the_document(tokenizer):
    suffix = "\n\nThe topic is"
    assert tokenizer.decode(tokenizer(SHORT + suffix, truncation=True, max_length=14).input_ids).endswith(suffix)
    assert suffix not in tokenizer.decode(tokenizer(LONG + suffix, truncation=True, max_length=14).input_ids)
    cut = tasks.first_tokens(tokenizer, 8)(LONG)
    assert LONG.startswith(cut) and len(tokenizer(cut).input_ids) == 8


def test_padding_side_does_not_change_the_stock_classifier(classifier, tokenizer):
    left, right = (logits(classifier(), [SHORT, LONG], tokenizer, padding_side=side) for side in ("left", "right"))
    assert torch.allclose(left, right, atol=1e-5)


def test_minus_one_pools_padding(classifier, tokenizer):
    def pooled(texts):
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return classifier().base_model(**batch).last_hidden_state[0, -1]

    assert not torch.allclose(pooled([SHORT]), pooled([SHORT, LONG]), atol=0.1)


def test_two_documents_without_a_padding_token_are_an_error(classifier, tokenizer):
    model = classifier(pad_token_id=None)
    model.config.pad_token_id = None
    assert logits(model, [SHORT], tokenizer).shape == (1, 3)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        logits(model, [SHORT, LONG], tokenizer)


@pytest.mark.parametrize("skip, kind", [(None, "Linear"), (["lm_head"], "Linear4bit"), (["score"], "Linear")])
def test_naming_modules_to_skip_decides_whether_the_head_is_quantized(classifier, skip, kind):
    options = {} if skip is None else {"llm_int8_skip_modules": skip}
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    model = classifier(quantization_config=quantization)
    assert type(model.score).__name__ == kind
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


def test_a_checkpoint_quantized_as_a_language_model_keeps_its_new_head_whole(tiny_model, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(model.score) is torch.nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_head_is_trained_and_saved_only_if_peft_knows_that_it_is_one(classifier, tokenizer, tmp_path, task_type):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type=task_type)
    trained = get_peft_model(classifier(), lora).eval()
    assert any(p.requires_grad for name, p in trained.named_parameters() if "score" in name) == (task_type is not None)
    trained.save_pretrained(tmp_path)
    fresh = classifier()
    torch.nn.init.normal_(fresh.score.weight)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    same = torch.equal(logits(trained, [SHORT], tokenizer), logits(again, [SHORT], tokenizer))
    assert same == (task_type is not None)


def test_small_steps_are_lost_on_a_head_in_bfloat16(classifier, tokenizer):
    def share_moved(dtype):
        model = classifier(dtype=dtype)
        before = model.score.weight.detach().clone()
        batch = tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
        model(**batch, labels=torch.tensor([0, 2])).loss.backward()
        torch.optim.AdamW(model.score.parameters(), lr=2e-5, weight_decay=0).step()
        return (model.score.weight != before).float().mean()

    assert share_moved(torch.float32) > 0.9
    assert share_moved(torch.bfloat16) < 0.5


def test_our_classifier_has_a_whole_head_in_float32_and_its_own_padding(tiny_model, tokenizer):
    model, _ = load_classifier(tiny_model, 3)
    assert type(model.score) is Float32Linear and model.score.weight.dtype == torch.float32
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_reentrant_checkpointing_by_hand_stops_the_gradient(recwarn):
    layer, hidden = torch.nn.Linear(4, 4), torch.randn(1, 4)
    assert not checkpoint(layer, hidden, use_reentrant=True).requires_grad
    assert checkpoint(layer, hidden, use_reentrant=False).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_adapter_gets_a_gradient_under_the_checkpointing_of_transformers(classifier, tokenizer, reentrant):
    model = get_peft_model(classifier(), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")).train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    batch = tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
    model(**batch, labels=torch.tensor([0, 2]), use_cache=False).loss.backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(adapters) == 14
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())


def test_rows_without_room_for_their_label_are_dropped_silently(tiny_model, tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": [SHORT, "word " * 40], "completion": [" money", " sports"]})
    options = dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = SFTTrainer(model, SFTConfig(max_length=20, **options), train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == 1


@pytest.mark.parametrize("epochs", [0, 12])
def test_end_of_sequence_is_learned(tiny_model, tiny_task, epochs):
    tuned = InstructionTuned(tiny_model, n_layers=None, epochs=epochs, learning_rate=1e-2).fit(tiny_task)
    answers = [tiny_task.labels[label] for label in tiny_task.train["label"]]
    stops = []
    for text, answer in zip(tiny_task.train["text"], answers, strict=True):
        batch = tuned.tokenizer(f"{text}{tuned.suffix} {answer}", return_tensors="pt")
        with torch.inference_mode():
            stops.append(tuned.model(**batch).logits[0, -1].argmax() == tuned.tokenizer.eos_token_id)
    assert all(stops) if epochs else not any(stops)


def test_the_start_of_a_head_is_not_random(tiny_model, tiny_task):
    heads = [EmbeddingHead(tiny_model, n_layers=1, learning_rate=0.0, seed=seed).fit(tiny_task) for seed in (0, 1)]
    first, second = (head.predict(tiny_task.test).probabilities for head in heads)
    assert abs(first - second).max() < 1e-5


def test_a_plain_mean_takes_in_the_padding_and_ours_does_not(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()

    @torch.inference_mode()
    def plain(texts):
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return model.base_model(**batch).last_hidden_state.mean(1)[0].numpy()

    assert np.abs(plain([SHORT, LONG]) - plain([SHORT])).max() > 0.1
    alone = embed([SHORT], model, tokenizer, "mean")[0]
    assert np.allclose(embed([SHORT, LONG], model, tokenizer, "mean")[0], alone, atol=1e-5)
    assert np.allclose(alone, plain([SHORT]), atol=1e-5)


def test_an_adapters_folder_gives_back_its_head_to_transformers_and_to_peft(classifier, tokenizer, tmp_path):
    """Before transformers #48595 the first of the two had a random head. If this fails, that is back."""
    trained = get_peft_model(classifier(), LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")).eval()
    torch.nn.init.normal_(trained.base_model.model.score.modules_to_save["default"].weight)
    trained.save_pretrained(tmp_path)
    options = dict(num_labels=3, pad_token_id=tokenizer.pad_token_id)
    expected = logits(trained, [SHORT], tokenizer)
    for again in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **options).eval(),
        PeftModel.from_pretrained(classifier(), tmp_path).eval(),
    ):
        assert torch.allclose(logits(again, [SHORT], tokenizer), expected, atol=1e-5)
    assert not torch.allclose(logits(classifier(), [SHORT], tokenizer), expected, atol=0.1)


def test_several_labels_are_learned_from_floats_and_ours_takes_integers(classifier, tokenizer, tmp_path):
    several = classifier(problem_type="multi_label_classification")
    batch = tokenizer([SHORT, LONG], padding=True, return_tensors="pt")
    gold = [[1, 0, 1], [0, 1, 0]]
    with pytest.raises(RuntimeError, match="result type Float can't be cast"):
        several(**batch, labels=torch.tensor(gold))
    before = several.score.weight.detach().clone()
    train_classifier(several, tokenizer, [SHORT, LONG], gold, learning_rate=1e-2, output_dir=str(tmp_path), save_strategy="no")
    assert not torch.equal(several.score.weight, before)


def test_at_one_half_rare_labels_are_never_said():
    generator = np.random.default_rng(0)

    def said(n):
        gold = (generator.random((n, 3)) < (0.2, 0.1, 0.05)).astype(int)
        return Predictions("x", ("a", "b", "c"), np.clip(0.2 * gold + generator.normal(0.1, 0.05, gold.shape), 0, 1), gold)

    validation, test = said(400), said(400)
    assert evaluate(test, n_resamples=9)["micro_f1"] < 0.05
    tuned = Predictions(test.approach, test.labels, test.probabilities, test.gold, thresholds=best_thresholds(validation))
    assert evaluate(tuned, n_resamples=9)["micro_f1"] > 0.8


def sft(model, data, tokenizer, folder, **options):
    settings = dict(output_dir=str(folder), use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none")
    model = AutoModelForCausalLM.from_pretrained(model)
    return SFTTrainer(model, SFTConfig(**settings, **options), train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("pad, learned", [("<|im_end|>", False), ("<|endoftext|>", True)])
def test_the_collator_of_transformers_masks_the_end_if_padding_is_the_end(tiny_model, pad, learned):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token=pad)
    ids = tokenizer(SHORT + tokenizer.eos_token).input_ids
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": ids}])["labels"][0]
    assert tokenizer.eos_token_id == ids[-1]
    assert (labels[-1] == tokenizer.eos_token_id) == learned


def test_the_collator_of_trl_learns_the_end_whatever_padding_is(tiny_model, tmp_path):
    """TRL's former collators masked it (trl #976). If this fails, that is back."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="<|im_end|>")
    data = Dataset.from_dict({"prompt": [SHORT, LONG], "completion": [" money", " sports"]})
    trainer = sft(tiny_model, data, tokenizer, tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert trainer.processing_class.pad_token == tokenizer.eos_token
    for labels in batch["labels"]:
        assert labels[labels != -100][-1] == tokenizer.eos_token_id
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(
    "columns, learned",
    [({"text": [LONG + " sports"]}, "everything"), ({"prompt": [LONG], "completion": [" sports"]}, "the label and its end")],
)
def test_a_text_column_learns_the_document_and_a_prompt_column_does_not(tiny_model, tokenizer, tmp_path, columns, learned):
    trainer = sft(tiny_model, Dataset.from_dict(columns), tokenizer, tmp_path)
    labels = trainer.data_collator(list(trainer.train_dataset))["labels"][0]
    everything = tokenizer(LONG + " sports").input_ids + [tokenizer.eos_token_id]
    assert labels[labels != -100].tolist() == (everything if learned == "everything" else everything[-2:])


@torch.inference_mode()
def written(model, tokenizer, prompts, side="left", n=4):
    batch = tokenizer(prompts, padding=True, padding_side=side, return_tensors="pt")
    said = model.generate(**batch, max_new_tokens=n, do_sample=False)
    return said[:, batch.input_ids.shape[1] :]


def test_generation_goes_wrong_behind_padding_and_scoring_does_not(tiny_model, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), base_models.load_tokenizer(tiny_model)
    alone = written(model, tokenizer, [SHORT])[0]
    assert torch.equal(written(model, tokenizer, [SHORT, LONG], "left")[0], alone)
    assert not torch.equal(written(model, tokenizer, [SHORT, LONG], "right")[0], alone)
    monkeypatch.setattr(tokenizer, "padding_side", "right")
    together, single = (score_labels(texts, ("sports", "money"), model, tokenizer)[0] for texts in ([SHORT, LONG], [SHORT]))
    assert torch.allclose(together, single, atol=1e-4)


def test_the_space_before_a_label_belongs_to_its_first_token(tokenizer):
    whole = tokenizer("The topic is sports").input_ids
    assert tokenizer("The topic is").input_ids + tokenizer(" sports").input_ids == whole
    assert tokenizer("The topic is ").input_ids + tokenizer("sports").input_ids != whole
    assert label_tokens(("sports",), tokenizer) == [whole[-1:]]


def test_first_tokens_do_not_tell_labels_apart_and_whole_labels_do(tiny_model, tokenizer):
    labels = ("remote access software", "remote services", "sports")
    first = [ids[0] for ids in label_tokens(labels, tokenizer)]
    assert first[0] == first[1] != first[2]
    scores = score_labels([SHORT, LONG], labels, AutoModelForCausalLM.from_pretrained(tiny_model).eval(), tokenizer)
    assert (scores[:, 0] - scores[:, 1]).abs().min() > 0.1


def spelled(task, words):
    return dict(zip(task.labels, words, strict=True))


def test_an_untrained_model_prefers_the_short_label_and_a_trained_one_does_not(tiny_model, tiny_task, tokenizer):
    words = ("remote access", "sports", "tech support")
    assert [len(ids) for ids in label_tokens(words, tokenizer)] == [2, 1, 2]
    options = dict(verbalizer=spelled(tiny_task, words), n_layers=None, learning_rate=1e-2)
    untrained = InstructionTuned(tiny_model, epochs=0, **options).fit(tiny_task).predict(tiny_task.train)
    assert (untrained.predicted == 1).all()
    assert InstructionTuned(tiny_model, epochs=20, **options).fit(tiny_task).predict(tiny_task.train).correct.all()


def test_a_label_inside_another_is_found_by_a_parser_and_not_scored(tiny_model, tiny_task):
    words = ("sports", "tech", "tech support")
    settings = dict(verbalizer=spelled(tiny_task, words), n_layers=None, learning_rate=1e-2, epochs=20)
    tuned = InstructionTuned(tiny_model, **settings).fit(tiny_task)
    prompts = tuned._prompts(list(tiny_task.train["text"]))
    said = tuned.tokenizer.batch_decode(written(tuned.model, tuned.tokenizer, prompts), skip_special_tokens=True)
    gold = np.array(tiny_task.train["label"])
    assert [answer.strip() for answer in said] == [words[label] for label in gold]  # the model knows them all
    parsed = np.array([next(n for n, word in enumerate(words) if word in answer) for answer in said])
    assert (parsed[gold == 2] == 1).all()
    assert tuned.predict(tiny_task.train).correct.all()


def test_a_template_and_a_tokenizer_begin_the_sequence_once_each(tiny_model, tiny_task):
    tuned = InstructionTuned(tiny_model, epochs=0, chat=True).fit(tiny_task)
    begin, number = tuned.tokenizer.bos_token, tuned.tokenizer.bos_token_id
    backend = tuned.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, number)])
    said = [{"role": "user", "content": SHORT}]
    twice = tuned.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert tuned.tokenizer(twice).input_ids[:2] == [number, number]
    ours = tuned.tokenizer(tuned._prompts([SHORT])[0]).input_ids
    assert ours[0] == number != ours[1]


@torch.inference_mode()
def test_reading_on_changes_a_cache_and_ours_is_a_copy(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prompt, label = (tokenizer(text, return_tensors="pt").input_ids for text in (LONG, " money"))
    cache = model(prompt, use_cache=True).past_key_values
    kept = label_scoring._select(cache, [0])
    n, first = cache.get_seq_length(), model(label, past_key_values=cache).logits
    assert cache.get_seq_length() == n + 1
    assert (model(label, past_key_values=cache).logits - first).abs().max() > 0.1
    for _ in range(2):
        again = model(label, past_key_values=label_scoring._select(kept, [0])).logits
        assert torch.allclose(again, first, atol=1e-5) and kept.get_seq_length() == n


@pytest.mark.parametrize("kind, settings", [(Trainer, TrainingArguments), (SFTTrainer, SFTConfig)])
def test_trainers_take_a_processing_class_and_no_tokenizer(tiny_model, tokenizer, tmp_path, kind, settings):
    data = Dataset.from_dict({"text": [SHORT]})
    options = dict(args=settings(str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False), train_dataset=data)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'"):
        kind(model, tokenizer=tokenizer, **options)
    assert kind(model, processing_class=tokenizer, **options).processing_class is tokenizer


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """With rows of whole blocks of 64 weights, for NF4."""
    return save_tiny(tmp_path_factory.mktemp("wide") / "tiny", hidden_size=64)


def nf4(dtype):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def test_preparation_for_kbit_training_doubles_the_embeddings_and_ours_leaves_them(wide_model, tiny_task, monkeypatch):
    def bytes_of(model):
        return model.get_memory_footprint()

    options = dict(dtype=torch.bfloat16, quantization_config=nf4(torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(wide_model, **options)
    before = bytes_of(model)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    prepare_model_for_kbit_training(model)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert bytes_of(model) > 1.8 * before

    profile = profiles.Profile("quick", "cpu", torch.bfloat16, nf4(torch.bfloat16))
    monkeypatch.setattr(profiles, "current", lambda *_: profile)
    for kind in (EmbeddingHead, InstructionTuned):
        ours = kind(wide_model, n_layers=1, rank=2, epochs=1).fit(tiny_task).model
        assert ours.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("n_layers, adapters", [(1, 7), (None, 14)])
@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_every_adapter_on_4_bit_weights_is_trained_also_behind_an_evaluation(kind, n_layers, adapters, wide_model, tiny_task):
    model = kind(wide_model, precision="nf4", n_layers=n_layers, epochs=1).fit(tiny_task).model
    assert sum(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name) == adapters


@pytest.mark.parametrize("quantized", [True, False])
def test_a_merge_into_4_bits_moves_the_logits_and_one_into_full_weights_does_not(wide_model, tokenizer, quantized, recwarn):
    torch.manual_seed(0)
    options = dict(num_labels=3, dtype=torch.float32, quantization_config=nf4(torch.float32) if quantized else None)
    base = AutoModelForSequenceClassification.from_pretrained(wide_model, pad_token_id=tokenizer.pad_token_id, **options)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as if trained
            torch.nn.init.normal_(parameter, std=0.05)
    model.train()  # nothing drops out; in eval mode bitsandbytes repacks the weights on some CPUs
    trained = logits(model, [SHORT, LONG], tokenizer)
    with model.disable_adapter():
        by_adapters = (logits(model, [SHORT, LONG], tokenizer) - trained).abs().max()
    by_merging = (logits(model.merge_and_unload().train(), [SHORT, LONG], tokenizer) - trained).abs().max()
    assert by_merging > 0.1 * by_adapters if quantized else by_merging < 1e-4
    assert quantized == any("Merge lora module to 4-bit" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("reduced", [False, True])
def test_an_evaluation_keeps_the_whole_vocabulary_unless_it_is_reduced(tiny_model, tokenizer, tmp_path, reduced):
    ids, seen = tokenizer(LONG).input_ids, []
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True),
        eval_dataset=Dataset.from_dict({"input_ids": [ids] * 2, "labels": [ids] * 2}),
        compute_metrics=lambda evaluated: seen.append(evaluated.predictions.shape) or {},
        preprocess_logits_for_metrics=(lambda logits, labels: logits.argmax(-1)) if reduced else None,
    )
    trainer.evaluate()
    assert seen == [(2, len(ids)) if reduced else (2, len(ids), len(tokenizer))]


def test_scoring_multiplies_one_position_of_a_prompt_with_the_vocabulary(tiny_model, tokenizer):
    model, seen = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    assert score_labels([SHORT, LONG], ("sports", "money"), model, tokenizer).shape == (2, 2)
    assert seen == [(2, 1, len(tokenizer))]


def test_tokens_behind_the_right_beginning_are_right_where_the_label_is_wrong(tiny_model, tiny_task):
    words = ("remote access", "local access", "public access")
    settings = dict(verbalizer=spelled(tiny_task, words), n_layers=None, learning_rate=1e-2, epochs=12)
    tuned = InstructionTuned(tiny_model, **settings).fit(tiny_task)
    said = tuned.predict(tiny_task.test)
    wrong = np.flatnonzero(~said.correct)
    assert len(wrong)
    for row in wrong:
        prompt = tuned.tokenizer(tuned._prompts([tiny_task.test["text"][row]])[0]).input_ids
        label = tuned.tokenizer(" " + words[said.gold[row]] + tuned.tokenizer.eos_token).input_ids
        with torch.inference_mode():  # what an evaluation of a trainer sees: the right answer is in the input
            guessed = tuned.model(torch.tensor([prompt + label])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert guessed[0] != label[0] and guessed[1:] == label[1:]


def test_duplicates_reach_both_sides_of_a_random_split_and_of_ours_they_do_not():
    documents = [Document(f"{kind} report {n % 30}", kind) for n in range(60) for kind in ("good", "bad")]
    train, test = train_test_split([document.text for document in documents], test_size=0.2, random_state=0)
    assert set(train) & set(test)
    task = tasks.split("x", documents, n_validation=10, n_test=10)
    splits = [set(getattr(task, split)["text"]) for split in tasks.SPLITS]
    assert sum(map(len, splits)) == len(set().union(*splits)) == 60


def test_the_best_of_many_on_the_test_set_is_not_as_good_as_it_looks():
    generator = np.random.default_rng(0)
    coins = generator.integers(0, 2, (500, 100))  # checkpoints that have learned nothing
    test, fresh = generator.integers(0, 2, (2, 100))
    best = (coins == test).mean(1).argmax()
    assert (coins[best] == test).mean() > 0.6 > (coins[best] == fresh).mean()


@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_training_looks_at_no_validation_and_no_test_documents(kind, tiny_model, tiny_task):
    swapped = Task("other", tiny_task.labels, tiny_task.train, validation=tiny_task.test, test=tiny_task.validation)
    first, second = (
        kind(tiny_model, n_layers=1, epochs=2, learning_rate=1e-2).fit(task).predict(tiny_task.test).probabilities
        for task in (tiny_task, swapped)
    )
    assert np.array_equal(first, second)


def test_the_rate_of_a_training_that_stops_early_counts_what_was_trained(classifier, tokenizer, tmp_path):
    """Older versions divide the documents of all planned epochs by the time. If this fails, that is back."""

    class StopAfterOneEpoch(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    settings = dict(num_train_epochs=10, per_device_train_batch_size=4, save_strategy="no", use_cpu=True, report_to="none")
    trainer = Trainer(
        classifier(),
        TrainingArguments(str(tmp_path), disable_tqdm=True, **settings),
        train_dataset=Dataset.from_dict({**tokenizer([LONG] * 16), "labels": [0, 1] * 8}),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[StopAfterOneEpoch()],
    )
    metrics = trainer.train().metrics
    assert trainer.state.global_step == 4
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(16, rel=0.05)
