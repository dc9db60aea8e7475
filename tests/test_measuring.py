"""Counted bytes against the allocator's, and recipes of training against one another."""

import json
import re

import pytest
import torch
import yaml
from transformers import LlamaConfig

from helpers import base_models, benchmark, measuring, runs
from helpers.errors import BookError
from helpers.measuring import STOCK, UPPER, BytesAlive, Recipe, allocated, check_fits, count_step, held, largest_batch

KEY = {"length": 48, "precision": "float32", "batch_size": 4, "rank": 4, "steps": 4, "seed": 0, "profile": "quick"}
PLAIN = Recipe(sampling="random", loss="all")


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
        vocab_size=len(base_models.load_tokenizer()),
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
    ("approach", "recipe"),
    [
        ("head", Recipe()),
        ("head", Recipe(checkpointing=False)),
        ("head", STOCK),
        ("head", Recipe(checkpointing=False, n_layers=2)),
        ("instruction", Recipe(checkpointing=False, n_layers=1)),
        ("instruction", Recipe()),
        ("instruction", Recipe(checkpointing=False)),
        ("instruction", Recipe(loss="all")),
    ],
)
def test_what_is_counted_is_what_the_allocator_gives(shape, approach, recipe):
    record = measured(shape, approach, recipe, steps=3, batch_size=8)
    assert record["counted"]["peak"] == pytest.approx(record["peak"], rel=0.1)
    assert record["counted"]["weights"] == record["held"]["frozen"]
    assert record["counted"]["adapters"] == record["held"]["trained"]


def test_four_bit_weights_are_counted_as_bitsandbytes_makes_them(shape):
    recipe, options = Recipe(), {"batch_size": 2, "length": 16, "rank": 4}
    model = measuring.adapted(benchmark.random_model(shape, "head", "nf4"), "head", "nf4", 4, recipe)
    packed = sum(
        each.nbytes + each.quant_state.absmax.nbytes + each.quant_state.state2.absmax.nbytes
        for each in model.parameters()
        if hasattr(each, "quant_state")
    )
    rest = sum(each.nbytes for each in model.parameters() if not each.requires_grad and not hasattr(each, "quant_state"))
    rest += sum(each.nbytes for each in model.buffers())
    assert count_step(shape, "head", **options)["weights"] == pytest.approx(packed + rest, rel=0.001)
    assert held(model)[1] == count_step(shape, "head", **options)["adapters"]


def test_further_blocks_cost_what_the_third_does(shape, tmp_path):
    config = base_models.shape_of(shape)
    for n_blocks in (3, 6):
        config.num_hidden_layers = n_blocks
        config.save_pretrained(tmp_path / str(n_blocks))
    options = {"batch_size": 3, "length": 40, "rank": 8, "precision": "nf4"}
    for recipe in (Recipe(), Recipe(checkpointing=False)):
        whole = measuring._count(config, "head", 3, 40, 8, "nf4", recipe, 5, 4)
        step = count_step(str(tmp_path / "6"), "head", **options, recipe=recipe)
        assert step["weights"] == whole["weights"] and step["activations"] == whole["activations"]
        assert step["activations"] + step["temporary"] == max(whole[name] for name in ("forward", "backward", "gradients"))
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
    small = count_step(name, "head", **options, recipe=Recipe(optim="paged_adamw_8bit"))
    assert small["optimizer"] * 4 == count_step(name, "head", **options)["optimizer"]


@pytest.mark.parametrize("approach", ["head", "instruction"])
def test_the_largest_batch_fits_and_one_more_does_not(shape, approach):
    memory, options = 200e6, {"length": 64, "precision": "float32"}
    n = largest_batch(shape, approach, memory, **options)
    assert n > 1
    check_fits(shape, approach, memory, batch_size=n, **options)
    with pytest.raises(BookError, match=f"needs about 0.2 GB for {approach}, there are 0.2 GB. A batch of {n} would fit"):
        check_fits(shape, approach, memory, batch_size=n + 1, **options)


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_loaded():
    options = {"batch_size": 64, "length": 1024, "recipe": Recipe(checkpointing=False)}
    with pytest.raises(
        BookError, match=r"64 documents of 1024 tokens needs .* there are 24.0 GB. A batch of \d+ would .* switch"
    ):
        check_fits("Llama-3.1-8B", "head", 24e9, **options)
    with pytest.raises(BookError, match="Not even one document fits: take a smaller model"):
        check_fits("Llama-3.1-8B", "head", 4e9, **options)


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


def test_recipes_learn_the_same_from_the_same_batches(shape):
    losses = [
        measured(shape, "instruction", recipe)["losses"]
        for recipe in (
            PLAIN,
            Recipe(sampling="random", loss="trl"),
            Recipe(sampling="random", loss="labels"),
            Recipe(sampling="random", reentrant=True, kbit_preparation=True),
            Recipe(sampling="random", checkpointing=False),
        )
    ]
    assert len(losses[0]) == KEY["steps"] and losses[0][0] != losses[0][-1]
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=1e-3)


def test_documents_are_the_same_again_and_none_is_too_long():
    texts = benchmark.documents(50, 100, 1000, seed=3)
    assert texts["input_ids"][:] == benchmark.documents(50, 100, 1000, seed=3)["input_ids"][:]
    assert max(texts["length"]) == 100 and texts["length"][:] == [len(ids) for ids in texts["input_ids"]]
    assert len(set(texts["length"])) > 20


def test_one_command_measures_what_is_missing_and_goes_on(shape, tmp_path, capsys):
    file = tmp_path / "small.yaml"
    recipes = [{"first": {"checkpointing": False, "sampling": "random"}}, {"second": {"sampling": "group_by_length"}}]
    entries = {"shapes": [shape], "lengths": [16], "approaches": ["head"], "recipes": recipes}
    sweep = entries | {name: KEY[name] for name in ("precision", "batch_size", "rank", "steps", "seed")}
    file.write_text(yaml.safe_dump(sweep))
    benchmark.main([str(file)])
    assert "all 2 runs are recorded" in capsys.readouterr().out
    lines = file.with_suffix(".jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["key"]["name"], second["key"]["name"]) == ("first", "second")
    assert second["key"]["recipe"]["checkpointing"] is False  # each recipe stands on the one before
    assert len(first["losses"]) == len(first["seconds"]) == 4 and first["documents_per_second"] > 0
    file.with_suffix(".jsonl").write_text(lines[0] + "\n")
    benchmark.main([str(file)])
    again = [record["key"] for record in runs.read(file.with_suffix(".jsonl"))]
    assert again == [first["key"], second["key"]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lenghts": [16]}, "There is no entry of a benchmark 'lenghts'. Did you mean 'lengths'"),
        ({"recipes": [{"a": {"optimizer": "sgd"}}]}, "There is no field of a recipe 'optimizer'"),
        ({"steps": None}, "lacks the entry 'steps'"),
        ({"steps": 2}, "the first two are left out of the seconds"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(tmp_path, changed, message):
    sweep = {"shapes": ["Qwen3-0.6B"], "lengths": [16], "approaches": ["head"], "recipes": [{"a": {}}]}
    sweep |= {name: KEY[name] for name in ("precision", "batch_size", "rank", "steps", "seed")} | changed
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({name: value for name, value in sweep.items() if value is not None}))
    with pytest.raises(SystemExit, match=re.escape(message)):
        benchmark.main([str(tmp_path / "bad.yaml")])


def test_models_for_a_gpu_need_one(monkeypatch, shape):
    monkeypatch.setenv("BOOK_PROFILE", "full")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BookError, match="needs a CUDA GPU and none is visible"):
        benchmark.random_model(shape, "head", "float32")
