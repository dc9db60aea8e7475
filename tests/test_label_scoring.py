import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from helpers import base_models, label_scoring
from helpers.errors import BookError
from helpers.label_scoring import label_tokens, score_labels

PROMPTS = ["a", "some words of no great length", "one two three", "and a much longer text that says little at some length"]
QUESTION = "Which of the many sections of the newspaper does the article that follows here belong to? "
WORDS = [
    "data",
    "file",
    "user",
    "system",
    "remote",
    "access",
    "account",
    "service",
    "process",
    "network",
    "cloud",
    "image",
    "code",
    "key",
]
LABELS = {
    "one token": ("sports", "tech", "money"),
    "several tokens": ("sports", "arts and culture", "unputdownable"),
    "shared beginnings": ("remote access software", "remote access tools", "remote services", "arts"),
    "one begins another": ("tech", "tech support", "tech support line", "sports"),
    "400": tuple(f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:4]),
}
every_set = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return base_models.load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def flat(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def sure(flat):
    """The same model with its logits a hundred times as far apart."""
    model = copy.deepcopy(flat)
    model.lm_head.weight = torch.nn.Parameter(100 * model.lm_head.weight.detach().clone())
    return model


@torch.inference_mode()
def reference(prompts, labels, model, tokenizer):
    """One forward pass for each prompt and label: no batch, no cache, no padding."""
    scores = torch.zeros(len(prompts), len(labels), dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        start = tokenizer(prompt).input_ids
        for column, tail in enumerate(label_tokens(labels, tokenizer)):
            logits = model(torch.tensor([start + tail])).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
            scores[row, column] = logits[range(len(tail)), tail].sum()
    return scores


@every_set
def test_walked_to_the_end_scores_are_those_of_one_pass_a_label(labels, flat, tokenizer):
    prompts = PROMPTS[:2]
    scores = score_labels(prompts, labels, flat, tokenizer, tolerance=0)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), reference(prompts, labels, flat, tokenizer), atol=1e-3, rtol=1e-4)
    assert (scores.exp().sum(1) <= 1 + 1e-5).all()


@every_set
@pytest.mark.parametrize("model", ["flat", "sure"])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-2])
def test_the_distribution_is_right_to_the_tolerance(labels, model, tolerance, tokenizer, request):
    model = request.getfixturevalue(model)
    prompts = PROMPTS[1:3]
    scores = score_labels(prompts, labels, model, tokenizer, tolerance=tolerance)
    expected = reference(prompts, labels, model, tokenizer).softmax(-1)
    assert torch.isfinite(scores).all()
    assert (scores.softmax(-1) - expected).abs().max() <= tolerance + 1e-5


def test_a_sure_model_reads_fewer_branches(sure, tokenizer, monkeypatch):
    read = []
    follow = label_scoring._follow

    def counted(pairs, *rest):
        read.append(len(pairs))
        return follow(pairs, *rest)

    monkeypatch.setattr(label_scoring, "_follow", counted)
    counts = {}
    for tolerance in (0, 1e-4, 1e-1):
        read.clear()
        score_labels(PROMPTS, LABELS["400"], sure, tokenizer, tolerance=tolerance)
        counts[tolerance] = sum(read)
    assert counts[0] > 1.5 * counts[1e-4] > 1.5 * counts[1e-1] > 0


def test_labels_of_one_token_need_no_cache_and_no_second_pass(flat, tokenizer, monkeypatch):
    monkeypatch.setattr(label_scoring, "DynamicCache", None)
    monkeypatch.setattr(label_scoring, "_follow", None)
    assert score_labels(PROMPTS, LABELS["one token"], flat, tokenizer).shape == (4, 3)


@pytest.mark.parametrize(
    "prompts",
    [
        [QUESTION + prompt for prompt in PROMPTS],
        [QUESTION + PROMPTS[1]],
        [QUESTION + PROMPTS[1]] * 3,
        [QUESTION, QUESTION + PROMPTS[1]],
    ],
    ids=["shared", "one prompt", "the same prompts", "one begins another"],
)
@pytest.mark.parametrize("labels", ["one token", "shared beginnings"])
def test_a_shared_beginning_is_read_once_and_changes_nothing(prompts, labels, flat, tokenizer, monkeypatch):
    labels = LABELS[labels]
    cached = score_labels(prompts, labels, flat, tokenizer, tolerance=0)
    monkeypatch.setattr(label_scoring, "SHORTEST_PREFIX", 10_000)
    assert torch.allclose(cached, score_labels(prompts, labels, flat, tokenizer, tolerance=0), atol=1e-4)
    assert torch.allclose(cached.double(), reference(prompts, labels, flat, tokenizer), atol=1e-3, rtol=1e-4)


def test_tokens_of_a_shared_beginning_are_not_read_again(flat, tokenizer):
    seen = []
    handle = flat.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    score_labels([QUESTION + prompt for prompt in PROMPTS], LABELS["one token"], flat, tokenizer)
    handle.remove()
    n_question = len(tokenizer(QUESTION.strip()).input_ids)
    longest = max(len(tokenizer(QUESTION + prompt).input_ids) for prompt in PROMPTS)
    assert seen[0][0] == 1 and seen[0][1] >= n_question - 1
    assert seen[1] == (4, longest - seen[0][1])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_order_do_not_matter(batch_size, flat, tokenizer):
    labels = LABELS["shared beginnings"]
    expected = score_labels(PROMPTS, labels, flat, tokenizer, tolerance=0)
    backwards = score_labels(PROMPTS[::-1], labels[::-1], flat, tokenizer, batch_size, tolerance=0)
    assert torch.allclose(backwards.flip(0, 1), expected, atol=1e-4)
    assert np.ptp(expected.numpy(), axis=0).min() > 1e-2


def test_models_with_absolute_positions(tokenizer):
    torch.manual_seed(0)
    shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).eval()
    prompts = [QUESTION + prompt for prompt in PROMPTS]
    labels = LABELS["one begins another"]
    scores = score_labels(prompts, labels, model, tokenizer, tolerance=0)
    assert torch.allclose(scores.double(), reference(prompts, labels, model, tokenizer), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "labels, words",
    [
        (("sports", ""), "Label number 1 is empty"),
        (("  ", "sports"), "Label number 0 is empty"),
        (("sports", "tech", "sports"), "cannot tell the labels 'sports' and 'sports' apart"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(labels, words, flat, tokenizer):
    with pytest.raises(BookError) as caught:
        score_labels(PROMPTS, labels, flat, tokenizer)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_beyond_the_context_is_refused(flat, tokenizer):
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 8
    with pytest.raises(BookError, match="Text 3 has .* the model takes 8") as caught:
        score_labels(PROMPTS, LABELS["one token"], flat, short)
    assert "\n" not in str(caught.value)


def test_an_empty_prompt_is_refused(flat, tokenizer):
    with pytest.raises(BookError, match="Text 1 is empty"):
        score_labels(["some words", ""], LABELS["several tokens"], flat, tokenizer)


def test_no_prompts(flat, tokenizer):
    assert score_labels([], LABELS["one token"], flat, tokenizer).shape == (0, 3)


def sentencepiece_like():
    """A tokenizer that puts a word mark before every text, as Llama 2's and Mistral's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁", "▁some", "▁words", "▁is", "▁tech", "▁arts", "tech", "arts", *"abcdefghijklmnopqrstuvwxyz:"]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("family", ["byte-level BPE", "word marks", "WordPiece"])
@pytest.mark.parametrize("prompt, space", [("some words", " "), ("some words is", " "), ("some words is:", "")])
def test_a_labels_tokens_are_those_that_training_saw(family, prompt, space, tokenizer):
    if family != "byte-level BPE":
        encoder = base_models.load_tokenizer(base_models.ENCODER)
        encoder.backend_tokenizer.post_processor = None  # an encoder closes its texts
        tokenizer = sentencepiece_like() if family == "word marks" else encoder
    labels = ("tech", "arts")
    before = tokenizer(prompt).input_ids
    expected = [tokenizer(prompt + space + label).input_ids[len(before) :] for label in labels]
    assert label_tokens(labels, tokenizer, space, prompt) == expected and all(expected)


def test_a_label_that_melts_into_the_prompt_is_refused(tokenizer):
    with pytest.raises(BookError, match="joins the end of the prompt .* with the label 'ports'") as caught:
        label_tokens(("ports", "tech"), tokenizer, "", "a prompt about s")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_sliding_window_counts_no_padding(tokenizer, batch_size):
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    config = MistralConfig(**size, vocab_size=len(tokenizer), sliding_window=24, initializer_range=0.2)
    model = MistralForCausalLM(config).eval()
    prompts = [QUESTION + prompt for prompt in PROMPTS]
    assert max(len(tokenizer(prompt).input_ids) for prompt in prompts) > 24
    labels = LABELS["shared beginnings"]
    scores = score_labels(prompts, labels, model, tokenizer, batch_size, tolerance=0)
    assert torch.allclose(scores.double(), reference(prompts, labels, model, tokenizer), atol=1e-3, rtol=1e-4)
