"""Counted bytes against the allocator's, and recipes of training against one another."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BOOK
from transformers import LlamaConfig

from helpers import base_models
from helpers.errors import BookError
from helpers.lab import benchmark, memory
from helpers.lab.memory import UPPER, BytesAlive, Recipe, allocated, check_fits, count_step, held, largest_batches
from helpers.lab.sweeps import load_sweep
from helpers.records import read

sys.path.insert(0, str(BOOK / "scripts"))
import gpu_session as session

# The recipe that tutorials copy.
STOCK = Recipe(kbit_preparation=True, reentrant=True, sampling="random", loss="trl")
KEY = {"length": 48, "precision": "float32", "batch_size": 4, "rank": 4, "steps": 4, "seed": 0, "profile": "quick"}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A folder with the configuration of a model of four blocks, and no weights."""
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8000,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return str(folder)


def measured(shape, approach, recipe, **changed):
    return benchmark.run(KEY | {"shape": shape, "approach": approach, "name": "", "recipe": vars(recipe)} | changed)


def test_bytes_are_counted_until_they_are_freed():
    layer = torch.nn.Linear(100, 100, bias=False)
    x = torch.ones(10, 100)
    with BytesAlive(layer) as alive:
        y = layer(x)  # 4,000 bytes; the layer's own are not counted
        view = y[:5].view(-1)  # none
        z = y + 1
        del y
        assert alive.now == 8000
        del view
        assert alive.now == 4000
        del z
        assert (alive.now, alive.peak) == (0, 8000)


def test_the_allocators_peak_is_above_what_was_held_before():
    before = torch.ones(1_000_000)
    with allocated() as cost:
        more = before + 1
        del more
        less = before[:10] + 1
    assert cost.peak == pytest.approx(4_000_000, rel=0.01)
    assert len(less) == 10


@pytest.mark.parametrize(
    ("approach", "recipe", "precision"),
    [
        ("head", Recipe(), "bfloat16"),
        ("head", STOCK, "float32"),
        ("head", Recipe(checkpointing=False, n_layers=2), "float32"),
        ("instruction", Recipe(), "nf4"),
        ("instruction", Recipe(checkpointing=False), "float32"),
        ("instruction", Recipe(loss="all"), "float32"),
    ],
)
def test_what_is_counted_is_what_the_allocator_gives(shape, approach, recipe, precision):
    record = measured(shape, approach, recipe, steps=3, batch_size=8, precision=precision)
    assert record["counted"]["peak"] == pytest.approx(record["peak"], rel=0.1)
    assert record["counted"]["weights"] == pytest.approx(record["held"]["frozen"], rel=0.01)
    assert record["counted"]["adapters"] == record["held"]["trained"]


@pytest.mark.parametrize("float32_adapters", [True, False])
def test_four_bit_weights_and_what_is_trained_are_counted_as_they_are_made(shape, float32_adapters):
    recipe = Recipe(float32_adapters=float32_adapters)
    model = memory.adapted(benchmark.random_model(shape, "head", "nf4"), "head", "nf4", 4, recipe)
    packed = sum(
        each.nbytes + each.quant_state.absmax.nbytes + each.quant_state.state2.absmax.nbytes
        for each in model.parameters()
        if hasattr(each, "quant_state")
    )
    rest = sum(each.nbytes for each in model.parameters() if not each.requires_grad and not hasattr(each, "quant_state"))
    rest += sum(each.nbytes for each in model.buffers())
    counted = count_step(shape, "head", batch_size=2, length=16, rank=4, recipe=recipe)
    assert counted["weights"] == pytest.approx(packed + rest, rel=0.001)
    assert counted["adapters"] == held(model)[1]
    found = {("score" in name, each.dtype) for name, each in model.named_parameters() if each.requires_grad}
    assert found == {(True, torch.float32), (False, torch.float32 if float32_adapters else torch.bfloat16)}


def test_a_four_bit_model_is_never_there_in_sixteen_bits(shape):
    with allocated() as cost:
        model = benchmark.random_model(shape, "instruction", "nf4")
    assert cost.peak < 0.9 * 2 * base_models.on_meta(shape).num_parameters()
    assert sum(held(model)) < cost.peak
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[3].mlp.up_proj.weight.quant_state is not None


def test_further_blocks_cost_what_the_third_does(shape, tmp_path, monkeypatch):
    config = base_models.shape_of(shape)
    config.num_hidden_layers = 6
    config.save_pretrained(tmp_path)
    for recipe in (Recipe(), Recipe(checkpointing=False, n_layers=4)):
        options = {"batch_size": 3, "length": 40, "rank": 8, "recipe": recipe}
        step = count_step(str(tmp_path), "head", **options)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "BLOCKS", 4)
            assert count_step(str(tmp_path), "head", **options) == step
        assert step["peak"] == sum(step[name] for name in ("weights", "adapters", "optimizer", "activations", "temporary"))


def test_what_each_step_of_a_recipe_saves():
    options = {"batch_size": 4, "length": 128}
    name = "Qwen3-0.6B"
    stock = count_step(name, "instruction", **options, recipe=STOCK)
    ours = count_step(name, "instruction", **options)
    shape = base_models.on_meta(name)
    not_quantized = shape.num_parameters() - sum(
        layer.weight.numel() for layer in shape.base_model.modules() if isinstance(layer, torch.nn.Linear)
    )
    assert stock["weights"] - ours["weights"] == 2 * not_quantized  # 4 bytes instead of 2
    every = count_step(name, "instruction", **options, recipe=Recipe(loss="all"))
    logits = 4 * 128 * shape.config.vocab_size
    assert every["peak"] - ours["peak"] > 4 * logits  # at least once in float32
    kept = count_step(name, "head", **options, recipe=Recipe(checkpointing=False))
    assert kept["activations"] > 10 * count_step(name, "head", **options)["activations"]
    upper = count_step(name, "head", **options, recipe=UPPER)
    assert upper["weights"] == kept["weights"]
    assert upper["activations"] / kept["activations"] == pytest.approx(
        10 / base_models.shape_of(name).num_hidden_layers, rel=0.05
    )
    small = count_step(name, "head", **options, recipe=Recipe(optim="adamw_8bit"))
    assert small["optimizer"] * 4 == count_step(name, "head", **options)["optimizer"]


def test_operations_are_those_of_the_matrix_products():
    layer = torch.nn.Linear(100, 50, bias=False)
    with BytesAlive(layer) as alive:
        layer(torch.ones(10, 100, requires_grad=True)).sum().backward()
    assert alive.operations == 3 * 2 * 10 * 100 * 50  # forward, and the gradients of the input and of the weights
    head = [count_step("Qwen3-0.6B", "head", batch_size=n, length=128, recipe=UPPER)["operations"] for n in (1, 2)]
    shape = base_models.on_meta("Qwen3-0.6B")
    linear = sum(each.weight.numel() for each in shape.model.layers.modules() if isinstance(each, torch.nn.Linear))
    assert head[1] == pytest.approx(2 * head[0], rel=0.01)
    assert head[0] == pytest.approx(2 * 128 * linear * (1 + 10 / 28), rel=0.1)  # one pass, and one more through ten blocks


def test_the_largest_batch_fits_and_one_more_is_refused(shape):
    options = {"length": 64, "recipe": Recipe(checkpointing=False)}
    with pytest.raises(BookError, match="there are 0.1 GB. A batch of [0-9]+ would fit, or switch checkpointing on.$") as refused:
        check_fits(shape, "head", 100e6, batch_size=1000, **options)
    n = int(re.search("batch of ([0-9]+)", str(refused.value))[1])
    check_fits(shape, "head", 100e6, batch_size=n, **options)
    with pytest.raises(BookError, match=rf"{2 * n} documents of 64 tokens needs about .* GB for head.*A batch of {n} would fit"):
        check_fits(shape, "head", 100e6, batch_size=2 * n, **options)
    some = [100e6, 1e6, 1e9]
    assert largest_batches(shape, "head", some, **options) == [n, 0, 64]
    with pytest.raises(BookError, match="Not even one document fits: take a smaller model or shorter documents.$"):
        check_fits(shape, "head", 1e6, batch_size=1, length=64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"approach": "haed"}, "Did you mean 'head'"),
        ({"precision": "fp4"}, "There is no precision 'fp4'"),
        ({"shape": "Qwen3-06B"}, "There is no base model"),
        ({"length": 100_000}, "takes 32768 tokens, so a length of 100000 does not fit"),
    ],
)
def test_what_cannot_be_counted_is_refused(given, message):
    options = {"shape": "Qwen3-0.6B", "approach": "head", "batch_size": 1, "length": 8} | given
    with pytest.raises(BookError, match=message):
        count_step(options.pop("shape"), options.pop("approach"), **options)


@pytest.mark.parametrize("name", ["sampling", "loss", "optim"])
def test_a_recipe_has_no_unknown_parts(name):
    with pytest.raises(BookError, match=f"There is no value of `{name}` 'labls'"):
        Recipe(**{name: "labls"})


def trained(shape, approach, recipe, precision="float32", watch=lambda *arguments: None):
    """The model after four steps, and the loss of each; `watch` is a hook of the first adapter."""
    model = memory.adapted(benchmark.random_model(shape, approach, precision), approach, precision, 4, recipe)
    next(each for name, each in model.named_modules() if name.endswith("lora_A.default")).register_forward_hook(watch)
    texts = benchmark.documents(8, 32, 1000)
    return model, benchmark.train(model, approach, precision, recipe, texts, batch_size=2, learning_rate=1e-3)[0]


def test_recipes_learn_the_same_from_the_same_batches(shape):
    _, losses = trained(shape, "instruction", Recipe(sampling="random", loss="all"))
    assert len(losses) == 4 and losses[0] != losses[-1]
    for changed in ({"loss": "trl"}, {"reentrant": True, "kbit_preparation": True}, {"checkpointing": False}):
        assert trained(shape, "instruction", Recipe(**{"sampling": "random"} | changed))[1] == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("approach", ["head", "instruction"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_autocast_follows_the_precision_also_where_the_model_was_cast_to_float32(shape, approach, precision):
    seen = set()
    model, _ = trained(shape, approach, STOCK, precision, lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    assert model.dtype == torch.float32  # which says nothing
    assert seen == {precision == "bfloat16"}


@pytest.mark.parametrize("loss", ["trl", "labels"])
@pytest.mark.parametrize("float32_adapters", [True, False])
def test_adapters_on_four_bits_are_trained_in_the_dtype_asked_for(shape, loss, float32_adapters):
    model, _ = trained(shape, "instruction", Recipe(loss=loss, float32_adapters=float32_adapters), "nf4")
    dtypes = {each.dtype for each in model.parameters() if each.requires_grad}
    assert dtypes == {torch.float32 if float32_adapters else torch.bfloat16}


def test_documents_are_the_same_again_and_none_is_too_long():
    texts = benchmark.documents(50, 100, 1000, seed=3)
    assert texts["input_ids"][:] == benchmark.documents(50, 100, 1000, seed=3)["input_ids"][:]
    assert max(texts["length"]) == 100 and texts["length"][:] == [len(ids) for ids in texts["input_ids"]]
    assert len(set(texts["length"])) > 20


def test_the_records_of_the_book_are_those_that_its_benchmark_asks_for():
    wanted = session.step_keys(load_sweep(BOOK / "benchmarks" / "one_gpu.yaml"))
    assert [record["key"] for record in read(BOOK / "benchmarks" / "one_gpu.jsonl")] == wanted


def test_a_recipe_with_a_part_that_is_gone_is_not_measured_as_another(shape):
    with pytest.raises(TypeError, match="compile"):
        benchmark.run(KEY | {"shape": shape, "approach": "head", "recipe": vars(Recipe()) | {"compile": True, "liger": False}})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lenghts": [16]}, "There is no entry of a benchmark 'lenghts'. Did you mean 'lengths'"),
        ({"recipes": [{"a": {"optimizer": "sgd"}}]}, "There is no field of a recipe 'optimizer'"),
        ({"steps": None}, "lacks the entry 'steps'"),
        ({"steps": 2}, "the first two are left out of the seconds"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(changed, message):
    sweep = {"shapes": ["Qwen3-0.6B"], "lengths": [16], "approaches": ["head"], "recipes": [{"a": {}}]}
    sweep |= {name: KEY[name] for name in ("precision", "batch_size", "rank", "steps", "seed")} | changed
    with pytest.raises(BookError, match=re.escape(message)):
        session.step_keys({name: value for name, value in sweep.items() if value is not None})


def test_one_command_says_what_fits_and_how_fast(capsys):
    memory.main(["--model", "Qwen/Qwen3-0.6B-Base", "--gpu", "T4", "--length", "64"])
    said = capsys.readouterr().out
    assert "Qwen3-0.6B: 0.60 billion parameters, 1.2 GB to download; T4 of 16 GiB, 14.6 GB are counted on." in said
    rows = re.findall(r"^(head|instruction), (\D+?) +([\d.]+) +(\d+) +([\d.]+)$", said, re.M)
    assert [row[:2] for row in rows] == [(kind, way) for kind in memory.TASK_TYPES for way in memory.WAYS]
    for kind, way, gigabytes, _, _ in rows:
        step = count_step("Qwen3-0.6B", kind, batch_size=1, length=64, recipe=memory.WAYS[way])
        assert f"{step['peak'] / 1e9:.1f}" == gigabytes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "Qwen3-5B", "--gpu", "8"], "There is no base model 'Qwen3-5B'. Did you mean 'Qwen3-8B'?"),
        (["--model", "Qwen3-8B", "--gpu", "T44"], "There is no card 'T44'. Did you mean 'T4'?"),
        (
            ["--model", "Qwen3-8B"],
            "No CUDA GPU is visible here. Say which card to count for: --gpu T4, or --gpu 16 for one of 16 GiB.",
        ),
        (["--model", "org/unknown", "--gpu", "8"], "org/unknown is gated: accept"),
        (["--model", "Qwen3-0.6B", "--gpu", "8", "--length", "99999"], "takes 32768 tokens"),
    ],
)
def test_the_command_refuses_in_one_line(monkeypatch, given, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(base_models, "fetch", refuse_as_gated)
    with pytest.raises(SystemExit) as left:
        memory.main(given)
    assert message in str(left.value) and "\n" not in str(left.value)


def refuse_as_gated(name, files):
    raise BookError(f"{name} is gated: accept its licence")


def test_a_card_that_is_too_small_is_told_what_fits_before_any_download(monkeypatch, shape):
    monkeypatch.setattr(base_models, "SHAPES", {"Llama-3.1-8B": base_models.shape_of("Llama-3.1-8B")})
    monkeypatch.setattr(base_models, "MORE_SHAPES", {"small": base_models.shape_of(shape)})
    monkeypatch.setattr(memory, "WAYS", {"all blocks": Recipe(n_layers=3)})
    with pytest.raises(SystemExit) as left:
        memory.main(["--model", "meta-llama/Llama-3.1-8B", "--gpu", "4", "--length", "64"])
    assert re.fullmatch(
        r"Llama-3.1-8B does not fit on a card of 4 GiB: a document of 64 tokens needs [4-6]\.\d GB, 3\.7 GB are counted on\. "
        r"Models that do: small\.",
        str(left.value),
    )


def test_the_card_that_is_here_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=45 * 2**30))
    monkeypatch.setattr(memory.profiles, "check_cuda", lambda quantized: None)
    assert memory.card(None) == ("NVIDIA L40S of 45 GiB", 0.85 * 45 * 2**30, 362e12)


def test_models_for_a_gpu_need_one(monkeypatch, shape):
    monkeypatch.setenv("BOOK_PROFILE", "full")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BookError, match="needs a CUDA GPU and none is visible"):
        benchmark.random_model(shape, "head", "float32")
