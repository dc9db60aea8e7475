"""What chapters 07 and 08 vary: prompts, verbalizers, losses, masks, layers, adapters, precision."""

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import save_tiny
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from helpers import profiles
from helpers.base_models import load_tokenizer, upper_lora
from helpers.embeddings import embed, fit_probe
from helpers.errors import BookError
from helpers.lab.approaches import AttentionProbe, EmbeddingHead, FrozenProbe, InstructionTuned, PromptLossTrainer, bidirectional

TEXTS = ["the goal and one coach", "the bank", "one browser for the laptop and the robot", "a"]


@pytest.fixture(scope="module")
def scorer(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), load_tokenizer(tiny_model)


def first_token_moves(model, **padding):
    """How far the first token's hidden state moves when the last token changes."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.inference_mode():
        hidden = model.base_model(ids, use_cache=False, **padding).last_hidden_state
    return float((hidden[0, 0] - hidden[1, 0]).abs().max())


def test_a_head_reads_the_instruction_that_names_its_labels(tiny_model, tiny_task):
    options = {"base_model": tiny_model, "n_layers": 1, "epochs": 1}
    head = EmbeddingHead(**options, prefix="One of {labels}: ", suffix="\nlabel:").fit(tiny_task)
    assert head._prompts(["the goal"]) == [f"One of {', '.join(tiny_task.labels)}: the goal\nlabel:"]
    plain = EmbeddingHead(**options, suffix="\nlabel:").fit(tiny_task)
    assert plain._prompts(["the goal"]) == ["the goal\nlabel:"]
    assert np.abs(head.predict_proba(["the goal"]) - plain.predict_proba(["the goal"])).max() > 1e-4


@pytest.mark.parametrize("padding", [{}, {"attention_mask": torch.tensor([[1, 1, 1, 1]] * 2)}])
def test_without_the_causal_mask_early_tokens_see_late_ones(tiny_model, padding):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert first_token_moves(model, **padding) == 0
    bidirectional(model)
    assert first_token_moves(model, **padding) > 1e-3


def test_read_both_ways_padding_changes_nothing(scorer, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    bidirectional(model)
    alone = np.concatenate([embed([text], model, scorer[1], "mean") for text in TEXTS])
    assert np.allclose(embed(TEXTS, model, scorer[1], "mean"), alone, atol=1e-5)


def test_a_head_on_both_directions_is_not_the_causal_one_and_reloads(tiny_model, tiny_task, tmp_path):
    settings = dict(n_layers=1, learning_rate=1e-2)
    both = EmbeddingHead(tiny_model, causal=False, **settings).fit(tiny_task)
    said = both.predict(tiny_task.test).probabilities
    assert not np.allclose(said, EmbeddingHead(tiny_model, **settings).fit(tiny_task).predict(tiny_task.test).probabilities)
    again = EmbeddingHead.load(both.save(tmp_path / "saved"))
    assert np.allclose(again.predict(tiny_task.test).probabilities, said, atol=1e-6)


def test_max_pooling_is_the_maximum_of_each_text_alone(scorer):
    model, tokenizer = scorer
    found = embed(TEXTS, model, tokenizer, "max")
    for row, text in zip(found, TEXTS, strict=True):
        hidden = model.base_model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        assert np.allclose(row, hidden.amax(0).detach(), atol=1e-5)


def test_a_probe_reads_the_layer_it_is_told(tiny_model, tiny_task, scorer):
    model, tokenizer = scorer
    probe = FrozenProbe(tiny_model, suffix="", layer=1).fit(tiny_task)
    ids = torch.tensor([tokenizer(tiny_task.test["text"][0]).input_ids])
    state = model.model(ids, output_hidden_states=True).hidden_states[1]
    expected = model.model.norm(state)[0, -1].detach()
    assert np.allclose(probe._features(list(tiny_task.test["text"]))[0], expected, atol=1e-5)
    all_layers = [FrozenProbe(tiny_model, layer=layer).fit(tiny_task).predict(tiny_task.test) for layer in (None, 2)]
    assert np.array_equal(all_layers[0].probabilities, all_layers[1].probabilities)
    with pytest.raises(BookError, match="The model has 2 layers, so n_layers=3"):
        FrozenProbe(tiny_model, layer=3).fit(tiny_task)


def test_lora_options_reach_peft_and_unknown_ones_are_refused(tiny_model, scorer, tiny_task):
    chosen = upper_lora(scorer[0], "SEQ_CLS", 4, 1, target_modules=["q_proj"], use_rslora=True, lora_alpha=3)
    assert (chosen.r, chosen.lora_alpha, chosen.target_modules, chosen.use_rslora) == (4, 3, {"q_proj"}, True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'use_dorra'"):
        EmbeddingHead(tiny_model, lora={"use_dorra": True}, n_layers=1).fit(tiny_task)
    head = EmbeddingHead(tiny_model, lora={"use_dora": True}, n_layers=1).fit(tiny_task)
    assert any("lora_magnitude" in name for name, _ in head.model.named_parameters())


@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_nf4_is_trained_where_it_is_asked_for(kind, tmp_path, tiny_task):
    # bitsandbytes' kernel for CPUs with AVX512-BF16 wants rows of whole blocks of 64 weights
    approach = kind(save_tiny(tmp_path / "tiny", hidden_size=64), precision="nf4", n_layers=1, epochs=1).fit(tiny_task)
    assert any(isinstance(module, Linear4bit) for module in approach.model.modules())
    assert approach.predict(tiny_task.test).probabilities.shape == (6, 3)


def test_precisions_are_those_of_the_profile_or_as_asked(monkeypatch):
    monkeypatch.setenv(profiles.PROFILE_VARIABLE, "quick")
    assert profiles.current("bfloat16").dtype == torch.bfloat16 and profiles.current("bfloat16").quantization is None
    assert profiles.current("nf4").quantization.bnb_4bit_quant_type == "nf4"
    with pytest.raises(BookError, match="no precision 'nf5'. Did you mean 'nf4'"):
        profiles.current("nf5")


class Weighted(PromptLossTrainer):
    def __init__(self, weight):
        self.prompt_loss_weight = weight


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_the_prompt_counts_as_much_as_it_is_told(scorer, weight):
    model, tokenizer = scorer
    batch = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    labels[:, :2] = -100
    loss = Weighted(weight).compute_loss(model, {**batch, "labels": labels})
    total, weights = 0.0, 0.0
    for ids, wanted, mask in zip(batch.input_ids, labels, batch.attention_mask, strict=True):
        logits = model(ids[mask.bool()][None]).logits[0]
        for place in range(1, int(mask.sum())):
            counts = 1.0 if wanted[place] != -100 else weight
            total += counts * float(cross_entropy(logits[place - 1], ids[place]))
            weights += counts
    assert float(loss) == pytest.approx(total / weights, abs=1e-5)


def test_a_weight_of_one_is_trls_loss_on_everything(scorer):
    model, tokenizer = scorer
    batch = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    expected = float(model(**batch, labels=labels).loss)
    assert float(Weighted(1.0).compute_loss(model, {**batch, "labels": labels})) == pytest.approx(expected, abs=1e-5)
    assert "completion_only_loss" in SFTConfig.__dataclass_fields__  # what TRL itself offers: 0 or 1


def prompts_of(tiny_model, task, **settings):
    tuned = InstructionTuned(tiny_model, epochs=0, **settings).fit(task)
    return tuned, tuned._prompts(["some text"])


def test_prefix_suffix_and_list_of_labels(tiny_model, tiny_task):
    _, prompts = prompts_of(tiny_model, tiny_task, prefix="One of {labels}.\n", suffix=" => {labels}")
    assert prompts == ["One of sports, money, tech.\nsome text => sports, money, tech"]


def test_chat_is_the_tokenizers_template_with_nothing_before_the_label(tiny_model, tiny_task):
    words = dict(zip(tiny_task.labels, "ABC", strict=True))
    tuned, (prompt,) = prompts_of(tiny_model, tiny_task, chat=True, suffix="?", verbalizer=words)
    said = [{"role": "user", "content": "some text?"}]
    assert prompt == tuned.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert tuned._examples(tiny_task)["completion"][:3] == ["A", "B", "C"]
    logits = tuned.model(torch.tensor([tuned.tokenizer(prompt).input_ids])).logits[0, -1]
    expected = logits[[tuned.tokenizer(letter).input_ids[0] for letter in "ABC"]].softmax(-1)
    said = tuned.predict(Dataset.from_dict({"text": ["some text"], "label": [0]})).probabilities[0]
    assert np.allclose(said, expected.detach(), atol=1e-5)
    tuned.tokenizer.chat_template = None
    with pytest.raises(BookError, match="has no chat template. Use chat=False"):
        tuned._prompts(["some text"])


def test_a_template_that_begins_the_sequence_does_not_begin_it_twice(tiny_model, tiny_task):
    tuned, _ = prompts_of(tiny_model, tiny_task, chat=True)

    tuned.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tuned.tokenizer.bos_token_id)]
    )
    tuned.tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"  # as Llama 3 has it
    (prompt,) = tuned._prompts(["x"])
    assert prompt.startswith("x")
    assert tuned.tokenizer(prompt).input_ids.count(tuned.tokenizer.bos_token_id) == 1


def test_shots_stand_before_the_document_and_need_no_training(tiny_model, tiny_task):
    _, (prompt,) = prompts_of(tiny_model, tiny_task, shots=1, suffix=" =>")
    *shots, last = prompt.split("\n\n")
    assert last == "some text =>" and sorted(shot.split(" => ")[1] for shot in shots) == sorted(tiny_task.labels)
    assert all(shot.split(" => ")[0] in tiny_task.train["text"] for shot in shots)
    with pytest.raises(BookError, match="use epochs=0 with them"):
        InstructionTuned(tiny_model, shots=1)


def test_a_verbalizer_writes_other_words_for_the_same_labels(tiny_model, tiny_task):
    words = dict(zip(tiny_task.labels, "ABC", strict=True))
    tuned, _ = prompts_of(tiny_model, tiny_task, verbalizer=words)
    assert tuned._examples(tiny_task)["completion"][:3] == [" A", " B", " C"]
    said = tuned.predict(tiny_task.test)
    assert said.labels == tiny_task.labels
    plain = InstructionTuned(tiny_model, epochs=0).fit(tiny_task).predict(tiny_task.test)
    assert not np.allclose(said.probabilities, plain.probabilities)
    for wrong in ({"sports": "A", "money": "B"}, {**words, "travel": "D"}):
        with pytest.raises(BookError, match="The verbalizer needs one entry for each label") as caught:
            InstructionTuned(tiny_model, verbalizer=wrong, n_layers=1).fit(tiny_task)
        assert "\n" not in str(caught.value)
    with pytest.raises(BookError, match="cannot tell"):
        InstructionTuned(tiny_model, verbalizer=dict.fromkeys(tiny_task.labels, "A"), epochs=0).fit(tiny_task)


@pytest.mark.parametrize("setting", [{"ask": "question"}, {"order": "rarest"}])
def test_unknown_ways_to_ask_are_refused(setting):
    with pytest.raises(BookError, match="Did you mean"):
        InstructionTuned(**setting)


def test_the_settings_of_a_verbalizer_survive_a_round_trip(tiny_model, tiny_task, tmp_path):
    words = dict(zip(tiny_task.labels, "ABC", strict=True))
    tuned = InstructionTuned(tiny_model, verbalizer=words, prefix="Read. ", chat=True, epochs=1, n_layers=1).fit(tiny_task)
    again = InstructionTuned.load(tuned.save(tmp_path / "saved"))
    assert np.array_equal(again.predict(tiny_task.test).probabilities, tuned.predict(tiny_task.test).probabilities)


def test_weighted_training_learns_too(tiny_model, tiny_task):
    settings = dict(n_layers=None, epochs=20, learning_rate=1e-2, prompt_loss_weight=0.1)
    tuned = InstructionTuned(tiny_model, **settings).fit(tiny_task)
    assert tuned.predict(tiny_task.train).correct.mean() > 0.9


def test_an_attention_probe_finds_the_token_that_tells():
    generator = np.random.default_rng(0)

    def texts(n):
        gold, states = generator.integers(0, 2, n), []
        for label in gold:
            tokens = generator.normal(size=(int(generator.integers(5, 40)), 16)).astype(np.float32)
            tokens[:, 0] = 0
            tokens[generator.integers(len(tokens))] = np.eye(16)[0] * 6 + np.eye(16)[1] * (3 if label else -3)
            states.append(tokens)
        return states, gold

    (train, gold), (test, expected) = texts(200), texts(200)
    probe = AttentionProbe.fit(train, gold)
    right = (probe.decision_function(test).argmax(1) == expected).mean()
    mean = fit_probe(np.array([each.mean(0) for each in train]), gold)
    assert right > 0.95 > 0.9 > (mean.predict(np.array([each.mean(0) for each in test])) == expected).mean()
    alone = np.concatenate([probe.decision_function([each]) for each in test[:5]])
    assert np.allclose(probe.decision_function(test)[:5], alone, atol=1e-4)


def test_a_query_of_zeros_is_mean_pooling():
    states = [np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((1, 2), dtype=np.float32)]
    probe = AttentionProbe(np.zeros(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    assert np.allclose(probe.decision_function(states), [[2, 3], [1, 1]])


def test_a_probe_with_learned_attention_learns_one_and_several_labels(tiny_model, tiny_task):
    one = FrozenProbe(tiny_model, suffix="", pooling="attention").fit(tiny_task)
    said = one.predict(tiny_task.train)
    assert said.correct.mean() > 0.5 and said.trainable_parameters == one.probe.coef_.size + one.probe.query.size
    rows = [{"text": row["text"], "label": np.eye(3, dtype=int)[row["label"]].tolist()} for row in tiny_task.train]
    probe = AttentionProbe.fit(one._features(list(tiny_task.train["text"])), np.array([row["label"] for row in rows]))
    assert (probe.decision_function(one._features(list(tiny_task.train["text"]))) > 0).shape == (len(rows), 3)
