"""The traps of chapters 04 and 05: that they are still there in the pinned libraries, and that `helpers` avoids them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from helpers import base_models
from helpers.embedding_head import EmbeddingHead, load_classifier
from helpers.instruction import InstructionTuned

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
    assert type(model.score) is torch.nn.Linear and model.score.weight.dtype == torch.float32
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
