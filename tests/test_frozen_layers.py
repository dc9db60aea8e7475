import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from helpers import base_models, frozen_layers
from helpers.errors import BookError
from helpers.frozen_layers import cached_lower_layers

SHAPE = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    initializer_range=0.2,
)
CONFIGS = {kind.__name__: kind for kind in (LlamaConfig, MistralConfig, Qwen3Config)}
TEXTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [20, 0, 21, 22]]  # the last has the padding token inside


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(request.param(**SHAPE, num_labels=3))


def padded(texts, side="right"):
    length = max(map(len, texts))
    fill = [[0] * (length - len(text)) for text in texts]
    rows = [text + more if side == "right" else more + text for text, more in zip(texts, fill, strict=True)]
    kept = [[1] * len(text) + more if side == "right" else more + [1] * len(text) for text, more in zip(texts, fill, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(kept)}


def adapted(model, n_layers=2, task_type="SEQ_CLS"):
    torch.manual_seed(1)
    return get_peft_model(model, base_models.upper_lora(model, task_type, 4, n_layers))


def train(model, epochs=3, side="right"):
    """Losses of every step, and what was trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(epoch)).tolist()
        for rows in (order[:3], order[3:]):
            optimizer.zero_grad()
            loss = model(**padded([TEXTS[row] for row in rows], side), labels=torch.tensor(rows) % 3, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trained.items()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_losses_and_trained_weights_are_those_of_the_whole_model(model, side):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected, weights = train(adapted(model), side=side)
    fresh = AutoModelForSequenceClassification.from_config(model.config)
    fresh.load_state_dict(state)
    again = adapted(fresh)
    with cached_lower_layers(again, 2):
        losses, ours = train(again, side=side)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert max(losses) - min(losses) > 0.01
    assert ours.keys() == weights.keys()
    assert all(torch.allclose(ours[name], weights[name], atol=1e-5) for name in weights)
    batch = padded(TEXTS)
    model = again.eval()
    with torch.inference_mode():  # whole again
        assert torch.allclose(model(**batch).logits, model.merge_and_unload()(**batch).logits, atol=1e-4)


def test_causal_models_too():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    batch = padded(TEXTS)
    with torch.inference_mode():
        expected = model(**batch).logits
        with cached_lower_layers(model, 2):
            first, second = model(**batch).logits, model(**batch).logits
    kept = batch["attention_mask"].bool()
    assert torch.allclose(first[kept], expected[kept], atol=1e-5)
    assert torch.equal(first, second)


def test_the_lower_layers_see_each_text_once(model):
    model = adapted(model)
    calls = {index: [] for index in range(4)}
    for index, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda _, args, out, index=index: calls[index].append(len(args[0])))
    with cached_lower_layers(model, 2):
        for seen in calls.values():  # entering looks at the model
            seen.clear()
        train(model, epochs=3)
    assert [sum(calls[index]) for index in range(4)] == [4, 4, 12, 12]


def test_adapters_may_come_within_the_block(model):
    with cached_lower_layers(model, 2):
        wrapped = adapted(model)
        losses, _ = train(wrapped)
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in name or "score" in name for name in trainable)
    assert all(".layers.2." in name or ".layers.3." in name for name in trainable if "lora" in name)
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_whole_also_after_an_error(model, fails):
    model.eval()
    names = list(model.state_dict())
    with torch.inference_mode():
        expected = model(**padded(TEXTS)).logits
    try:
        with cached_lower_layers(model, 1):
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert list(model.state_dict()) == names
    with torch.inference_mode():
        assert torch.equal(model(**padded(TEXTS)).logits, expected)


def test_none_changes_nothing(model):
    layers = list(model.model.layers)
    with cached_lower_layers(model, None):
        assert list(model.model.layers) == layers
        assert not isinstance(model.model.embed_tokens, frozen_layers.CachedLayers)


def test_what_cannot_be_computed_once_is_refused(model):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100))
    with pytest.raises(BookError, match="not built like Llama") as first, cached_lower_layers(gpt2, 1):
        pass
    with pytest.raises(BookError, match="adapters below the upper 1 layers") as second, cached_lower_layers(adapted(model), 1):
        pass
    with pytest.raises(BookError, match="n_layers=5 does not fit") as third, cached_lower_layers(model, 5):
        pass
    assert not any("\n" in str(caught.value) for caught in (first, second, third))


def test_a_model_that_scales_its_embeddings_is_refused_and_left_whole():
    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    model = AutoModelForCausalLM.from_config(GraniteConfig(**shape, embedding_multiplier=12.0)).eval()
    batch = padded(TEXTS)
    with torch.inference_mode():
        expected = model(**batch).logits
    with pytest.raises(BookError, match="GraniteModel is not built like Llama"), cached_lower_layers(model, 2):
        pass
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("text", [[0, 5, 6], [5, 6, 0], [0, 0]])
def test_padding_tokens_that_the_mask_calls_text_are_text(model, text):
    batch = {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text), dtype=torch.long)}
    with torch.inference_mode():
        expected = model.base_model(**batch).last_hidden_state
        with cached_lower_layers(model, 2):
            assert torch.allclose(model.base_model(**batch).last_hidden_state, expected, atol=1e-5)
