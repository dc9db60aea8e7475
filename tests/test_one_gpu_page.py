"""The page "On one GPU": its tables are those that are counted and recorded, and its lines work."""

import importlib.util
import re

import pytest
import torch
from conftest import BOOK
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from helpers import base_models
from helpers.embedding_head import EmbeddingHead
from helpers.instruction import InstructionTuned
from helpers.lab.memory import CARDS, REACHED, Recipe, count_step
from helpers.records import read

spec = importlib.util.spec_from_file_location("one_gpu_page", BOOK.parent / ".ci" / "one_gpu_page.py")
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)
TEXT = page.PAGE.read_text(encoding="utf-8")


def rows_of(name):
    """A table of the page, by the words in its first column."""
    lines = re.search(rf"^% table {name}\n\n((?:\|.*\n)+)", TEXT, re.M)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("model", page.MODELS)
def test_what_fits_and_how_fast_is_what_is_counted(model):
    for name, made in page.counted(model).items():
        assert [row for row in rows_of(name) if row[0] == model] == [made]


def test_every_model_of_the_page_is_in_its_tables_and_known_offline():
    assert [row[0] for row in rows_of("batches")] == [row[0] for row in rows_of("speeds")] == page.MODELS
    assert set(page.MODELS) == base_models.SHAPES.keys() | base_models.MORE_SHAPES.keys()


def test_what_was_measured_is_what_is_recorded():
    assert rows_of("measured") == page.measured()


def test_a_good_start_fits_in_the_books_settings():
    column = {gib: number for number, gib in enumerate(page.GIB, 3)}
    batches = {row[0]: row for row in rows_of("batches")}
    said = re.findall(r"^\| (\d+) GiB \([^|]*\| ([\w.-]+-[\d.]+B)[^|]*?batch (\d+) \|", TEXT, re.M)
    assert [int(gib) for gib, *_ in said] == [8, 12, 16, 24]
    for gib, model, batch in said:
        assert int(batches[model][column[int(gib)]].split(" / ")[0].replace("–", "0")) >= int(batch), (gib, model)


def test_counted_bytes_hold_on_the_gpu_that_measured_them():
    for record in read(BOOK / "benchmarks" / "h200.jsonl"):
        assert 0.96 < record["counted"]["peak"] / record["peak"] < 1.25
        if not record["key"]["recipe"]["kbit_preparation"]:
            assert record["counted"]["peak"] > record["peak"]


def test_no_step_was_faster_than_is_predicted():
    fastest = min(min(record["seconds"]) for record in read(BOOK / "benchmarks" / "h200.jsonl"))
    assert 0.95 * page.LEAST < fastest < 1.05 * page.LEAST


@pytest.mark.parametrize("name", ["upper ten blocks", "as tutorials have it"])
def test_the_gpu_that_was_measured_reached_at_most_what_is_predicted(name):
    for record in read(BOOK / "benchmarks" / "h200.jsonl"):
        key = record["key"]
        if key["name"] == name and key["shape"] in ("Qwen3-0.6B", "Llama-3.1-8B"):
            known = {field: value for field, value in key["recipe"].items() if field not in ("compile", "liger")}
            options = {each: key[each] for each in ("batch_size", "length", "rank", "precision")}
            step = count_step(key["shape"], key["approach"], recipe=Recipe(**known), label_tokens=3, **options)
            share = step["operations"] / sorted(record["seconds"])[4] / (1e12 * CARDS["H200"]["tera"])
            assert share < 1.05 * REACHED
            assert share > 0.2 or key["shape"] == "Qwen3-0.6B"


FAMILIES = {"Llama": LlamaConfig, "Qwen3": Qwen3Config, "Mistral": MistralConfig, "Gemma 3": Gemma3TextConfig}


@pytest.fixture(scope="module", params=FAMILIES)
def small(request, tmp_path_factory):
    """A folder with a model of that family: two blocks and random weights."""
    tokenizer = base_models.load_tokenizer("Gemma-3-270M" if request.param == "Gemma 3" else base_models.DEFAULT)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    ids = {each: getattr(tokenizer, each) for each in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = FAMILIES[request.param](num_key_value_heads=2, vocab_size=len(tokenizer), **sizes, **ids)
    folder = tmp_path_factory.mktemp("family") / "small"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_models_of_every_family_go_through_both_classes(small, kind, tiny_task):
    approach = kind(base_model=small, n_layers=1, epochs=1).fit(tiny_task)
    assert approach.trainable_parameters > 0
    assert approach.predict_proba(tiny_task.test["text"]).shape == (6, 3)


def test_the_text_part_of_a_model_that_sees_is_taken_out_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = base_models.load_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 0}
    config = Gemma3Config(text_config=text, vision_config=sizes | {"image_size": 56, "patch_size": 14}, mm_tokens_per_image=4)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    whole.save_pretrained("seeing")
    tokenizer.save_pretrained("seeing")
    code = re.search(r"```python\n(import torch.*?)```", TEXT, re.S)[1]
    exec(code.replace("google/gemma-3-4b-it", "seeing"), {})
    ids = torch.tensor([[5, 6, 7, 8]])
    for kind, missing in ((AutoModelForCausalLM, set()), (AutoModelForSequenceClassification, {"score.weight"})):
        model, said = kind.from_pretrained("gemma-3-4b-text", dtype=torch.bfloat16, output_loading_info=True)
        assert set(said["missing_keys"]) == missing and not said["unexpected_keys"]
    model = AutoModelForCausalLM.from_pretrained("gemma-3-4b-text", dtype=torch.bfloat16).eval()
    assert torch.equal(model(ids).logits, whole.eval()(input_ids=ids).logits)
