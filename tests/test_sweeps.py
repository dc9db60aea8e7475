"""Making records: what a sweep names, what a record holds, and that none is lost or doubled."""

import dataclasses
import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import base_models, profiles, records, tasks
from helpers.baselines import TfidfSvm
from helpers.errors import BookError
from helpers.evaluation import compare
from helpers.lab import sweeps
from helpers.lab.approaches import APPROACHES

ROOT = Path(__file__).resolve().parent.parent
SWEEP = """
tasks:
  - bbc: {per_class: 4, n_validation: 20, n_test: 40, words: 16}
seeds: [0, 1]
approaches:
  - TfidfSvm: {C: 0.5}
  - Majority
"""
SMALL = {"tasks": ["bbc"], "seeds": [0], "approaches": ["Majority"]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "small.yaml"
    path.write_text(SWEEP)
    sweeps.main([str(path), "--workers", "1"])
    return path


@pytest.fixture(scope="module")
def made(sweep):
    return records.read(sweep.with_suffix(".jsonl"))


def fake(number):
    return {"key": {"seed": number}, "provenance": {"versions": {}}, "filler": "x" * 20_000}


def test_a_sweep_records_every_approach_on_every_seed_once(sweep, made, capsys):
    before = sweep.with_suffix(".jsonl").read_bytes()
    assert [(each["key"]["approach"], each["key"]["seed"]) for each in made] == [
        ("TfidfSvm", 0),
        ("Majority", 0),
        ("TfidfSvm", 1),
        ("Majority", 1),
    ]
    sweeps.main([str(sweep)])
    assert sweep.with_suffix(".jsonl").read_bytes() == before
    assert "all 4 runs are recorded" in capsys.readouterr().out


def test_two_processes_make_the_same_records(sweep, made, tmp_path):
    sweeps.main([str(sweep), "--out", str(tmp_path / "again.jsonl"), "--workers", "2"])
    again = records.read(tmp_path / "again.jsonl")
    assert sorted(map(seen, again)) == sorted(map(seen, made)) and len(again) == 4


def seen(record):
    return json.dumps([record["key"], record["probabilities"], record["metrics"]])


def test_a_record_gives_back_what_the_approach_predicted(made):
    record = made[2]
    task = tasks.load("bbc", per_class=4, n_validation=20, n_test=40, shorten=tasks.first_words(16), seed=1)
    expected = TfidfSvm(C=0.5).fit(task).predict(task.test)
    found = records.predictions_of(record)
    assert record["content_hash"] == task.content_hash()
    assert found.labels == expected.labels and found.gold.tolist() == expected.gold.tolist()
    assert np.allclose(found.probabilities, expected.probabilities, atol=1e-5)
    assert record["metrics"]["accuracy"] == expected.correct.mean()
    assert set(record["provenance"]["versions"]) == set(sweeps.LIBRARIES)


def test_the_cost_of_an_adapter_is_recorded(tiny_model, monkeypatch, tiny_task):
    monkeypatch.setattr(sweeps, "load_task", lambda key: tiny_task)
    options = {"base_model": tiny_model, "rank": [2, 4], "epochs": 1, "n_layers": 1}
    small, large = sweeps.keys({**SMALL, "approaches": [{"EmbeddingHead": options}]})
    small, large = (sweeps.run(key)["cost"] for key in (small, large))
    assert small["adapter_bytes"] >= 4 * small["trainable_parameters"]
    assert large["adapter_bytes"] > small["adapter_bytes"]


def test_peak_memory_is_that_since_the_last_call():
    sweeps.give_back_memory()  # else the block may get memory that earlier tests have freed and the process has kept
    sweeps.take_peak()
    small = sweeps.take_peak()
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    del block
    large, after = sweeps.take_peak(), sweeps.take_peak()
    if small is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert large - small > 150_000_000 and large - after > 150_000_000


def test_the_profile_says_whose_memory_is_measured(monkeypatch):
    peaks = iter([1000, 500])
    cuda = SimpleNamespace(max_memory_allocated=lambda: next(peaks), reset_peak_memory_stats=lambda: None)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(profiles, "current", lambda: SimpleNamespace(device="cuda"))
    assert [sweeps.take_peak(), sweeps.take_peak()] == [1000, 500]
    monkeypatch.setattr(profiles, "current", lambda: SimpleNamespace(device="cpu"))  # there is a GPU, but it is not used
    assert sweeps.take_peak() is None or sweeps.take_peak() > 1_000_000


def test_a_run_that_is_missing_is_made(made, tmp_path):
    (tmp_path / "small.yaml").write_text(SWEEP)
    kept = [json.dumps(each) + "\n" for each in made if each["key"]["seed"] == 0]
    (tmp_path / "small.jsonl").write_text("".join(kept) + '{"key": {"approach": "Tf')  # killed while it wrote
    sweeps.main([str(tmp_path / "small.yaml")])
    again = records.read(tmp_path / "small.jsonl")  # two workers: the order is theirs
    assert sorted(map(seen, again)) == sorted(map(seen, made)) and len(again) == 4


def test_what_is_missing_is_listed_and_not_run(sweep, tmp_path, capsys):
    sweeps.main([str(sweep), "--out", str(tmp_path / "none.jsonl"), "--list"])
    out = capsys.readouterr().out
    assert "0 of 4 runs" in out and out.count("not yet run: bbc(per_class=4") == 4 and "TfidfSvm(C=0.5) seed 1" in out
    assert not (tmp_path / "none.jsonl").exists()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.yaml").write_text(SWEEP)

    def fit(self, task):
        raise MemoryError("not enough")

    monkeypatch.setattr(TfidfSvm, "fit", fit)
    with pytest.raises(SystemExit, match="2 of 4 runs failed; the others are recorded"):
        sweeps.main([str(tmp_path / "small.yaml"), "--workers", "1"])
    assert [each["key"]["approach"] for each in records.read(tmp_path / "small.jsonl")] == ["Majority", "Majority"]
    assert "TfidfSvm(C=0.5) seed 1: MemoryError: not enough" in capsys.readouterr().err


def test_a_record_of_other_settings_does_not_count(made):
    wanted = sweeps.keys({**SMALL, "approaches": ["TfidfSvm"]})
    assert wanted[0]["settings"]["C"] == 1.0
    assert wanted[0] not in [each["key"] for each in made]


def test_lists_are_grids_and_every_run_is_made_once():
    approaches = [{"EmbeddingHead": {"rank": [2, 8], "learning_rate": [1e-4, 5e-4]}}, {"EmbeddingHead": {"rank": 8}}]
    found = sweeps.keys({**SMALL, "seeds": [0, 1], "approaches": approaches})
    assert len(found) == 8  # the last approach is one of the grid
    assert {(key["settings"]["rank"], key["settings"]["learning_rate"], key["settings"]["seed"]) for key in found} == {
        (rank, rate, seed) for rank in (2, 8) for rate in (1e-4, 5e-4) for seed in (0, 1)
    }


def test_a_base_model_is_for_those_that_share_it():
    approaches = ["EmbeddingHead", "FineTunedEncoder", {"FrozenProbe": {"base_model": "mine"}}, "TfidfSvm"]
    found = sweeps.keys({**SMALL, "approaches": approaches, "base_model": "Qwen/Qwen3-0.6B"})
    assert [key["settings"].get("base_model") for key in found] == ["Qwen/Qwen3-0.6B", "all-MiniLM-L6-v2", "mine", None]
    assert not any("tokenizer" in key["options"] for key in found)  # nothing is cut to tokens


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A base model whose tokenizer has a token for every letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(["<unk>", "<pad>", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path_factory.mktemp("letters")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    LlamaConfig(vocab_size=len(letters)).save_pretrained(folder)
    return str(folder)


def test_documents_are_cut_with_the_tokenizer_of_the_sweeps_base_model_for_every_approach_alike(other_model):
    task = {"bbc": {"per_class": 4, "n_validation": 20, "n_test": 40, "tokens": 24}}
    approaches = ["TfidfSvm", "FrozenProbe", "FineTunedEncoder", {"EmbeddingHead": {"base_model": "mine"}}]
    sweep = {**SMALL, "tasks": [task], "approaches": approaches}
    other = sweeps.keys({**sweep, "base_model": other_model})
    assert [key["options"] for key in other] == [{**task["bbc"], "tokenizer": other_model}] * 4  # the same words for all
    texts = sweeps.load_task(other[0]).test["text"]
    assert 20 < max(map(len, texts)) <= 24

    # the book's own tokenizer is not named, so that old keys stay valid
    books = sweeps.keys(sweep)
    assert books == sweeps.keys({**sweep, "base_model": base_models.DEFAULT}) and "tokenizer" not in books[0]["options"]
    shorten = tasks.first_tokens(base_models.load_tokenizer(), 24)
    expected = tasks.load("bbc", per_class=4, n_validation=20, n_test=40, shorten=shorten)
    assert sweeps.load_task(books[0]).content_hash() == expected.content_hash()


@pytest.mark.parametrize("broken", ["no git", "no repository"])
def test_a_run_without_git_is_recorded(broken, tmp_path, monkeypatch):
    if broken == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    (key,) = sweeps.keys({**SMALL, "tasks": [{"bbc": {"per_class": 4, "n_validation": 20, "n_test": 40}}]})
    assert sweeps.make([key], tmp_path / "made.jsonl", progress=False) == []
    (record,) = records.read(tmp_path / "made.jsonl")
    assert record["key"] == key and record["provenance"]["commit"] is None


def test_provenance_says_how_it_was_computed(monkeypatch):
    profile = profiles.current()
    found = sweeps.provenance()
    assert found["float32_matmul_precision"] == profiles.current().float32_products == "medium"
    assert len(found["commit"]) >= 7 and found["attention"] == profile.attention == "eager"

    other = dataclasses.replace(profile, attention="sdpa", float32_products="highest")
    monkeypatch.setattr(profiles, "current", lambda precision=None: other)
    found = sweeps.provenance()
    assert (found["attention"], found["float32_matmul_precision"]) == ("sdpa", "highest")


def test_a_task_of_ones_own_is_run_like_the_books(tiny_task):
    sweep = {**SMALL, "tasks": [{"mine": {"n_validation": 3, "n_test": 3}}]}
    (key,) = sweeps.keys(sweep, ["mine"])
    record = sweeps.run(key, task=tiny_task)
    assert record["content_hash"] == tiny_task.content_hash() and len(record["gold"]) == len(tiny_task.test)
    with pytest.raises(BookError, match="task 'mine'"):
        sweeps.keys(sweep)


def test_the_full_profile_has_its_own_runs_and_records(monkeypatch):
    sweep = {**SMALL, "full": {"seeds": [0, 1, 2]}}
    quick = sweeps.keys(sweep)
    monkeypatch.setattr(profiles, "current", lambda: profiles.Profile("full", "cuda", None))
    full = sweeps.keys(sweep)
    assert (len(quick), len(full)) == (1, 3)
    assert quick[0]["profile"] == "quick" and quick[0] not in full


@pytest.mark.parametrize(
    "change, words",
    [
        ({"approaches": ["EmbedingHead"]}, "approach 'EmbedingHead'. Did you mean 'EmbeddingHead'?"),
        (
            {"approaches": [{"EmbeddingHead": {"learningrate": 1.0}}]},
            "setting of EmbeddingHead 'learningrate'. Did you mean 'learning_rate'?",
        ),
        ({"approaches": [{"TfidfSvm": 3}]}, "written as `name: value`, not 3"),
        ({"tasks": ["bcc"]}, "task 'bcc'. Did you mean 'bbc'?"),
        ({"tasks": [{"bbc": {"perclass": 4}}]}, "option of a task 'perclass'. Did you mean 'per_class'?"),
        ({"seed": [1]}, "entry of a sweep 'seed'. Did you mean 'seeds'?"),
        ({"full": {"sedes": [1]}}, "entry of `full` 'sedes'. Did you mean 'seeds'?"),
        ({"seeds": 3}, "A sweep needs 'seeds', a list"),
        ({"tasks": []}, "A sweep needs 'tasks', a list"),
        ({"base_model": ["a", "b"]}, "A sweep needs 'base_model', a str that is not empty. It has ['a', 'b']"),
    ],
)
def test_mistakes_in_a_sweep_are_named_before_anything_runs(change, words):
    with pytest.raises(BookError) as caught:
        sweeps.keys({**SMALL, **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, words",
    [("a: [", "cannot be read as YAML"), ("- a", "is written as `name: value`, not 'a'"), (None, "cannot be read")],
)
def test_a_file_that_is_no_sweep_is_refused_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(SystemExit) as caught:
        sweeps.main([str(tmp_path / "sweep.yaml")])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_sweeps_of_the_book_are_in_order():
    files = sorted((ROOT / "book" / "results").glob("*.yaml"))
    assert files
    for path in files:
        wanted = sweeps.keys(sweeps.load_sweep(path))
        recorded = [record["key"] for record in records.read(path.with_suffix(".jsonl"))]
        assert wanted and all(key in wanted for key in recorded), path


def test_a_torn_last_line_is_left_out_and_taken_away(tmp_path, capsys):
    path = tmp_path / "torn.jsonl"
    whole = json.dumps(fake(1))
    path.write_text(f"{whole}\n{whole[:50]}")
    assert records.read(path) == [fake(1)]
    assert "torn.jsonl: the last line is torn" in capsys.readouterr().err
    assert sweeps.append(path, fake(2))
    capsys.readouterr()
    assert records.read(path) == [fake(1), fake(2)]
    assert capsys.readouterr().err == ""


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path):
    (tmp_path / "whole.jsonl").write_text(json.dumps(fake(1)))
    assert sweeps.append(tmp_path / "whole.jsonl", fake(2))
    assert records.read(tmp_path / "whole.jsonl") == [fake(1), fake(2)]


def test_a_run_is_recorded_once(tmp_path):
    path = tmp_path / "once.jsonl"
    assert sweeps.append(path, fake(1))
    before = path.read_bytes()
    assert not sweeps.append(path, fake(1))
    assert path.read_bytes() == before
    path.write_bytes(before + before)  # a merge gone wrong
    with pytest.raises(BookError, match="line 2 records the same run as line 1"):
        records.read(path)


def write(path, written):
    for number in range(25):
        sweeps.append(path, fake(number))
        written.put(number)


def test_two_writers_of_which_one_is_killed_lose_and_double_nothing(tmp_path):
    path = tmp_path / "both.jsonl"
    forks = multiprocessing.get_context("fork")  # which need not import everything again
    queues = [forks.Queue(maxsize=5), forks.Queue()]  # the first writer waits for us: it cannot be through before it is killed
    both = [forks.Process(target=write, args=(path, queue)) for queue in queues]
    for each in both:
        each.start()
    written = [queues[0].get() for _ in range(5)]
    both[0].kill()
    assert {each["key"]["seed"] for each in records.read(path)} >= set(written)  # at once, whatever state it left
    for each in both:
        each.join(timeout=120)
    assert records.read(path) == [fake(number) for number in range(25)]
    assert [each.exitcode for each in both] == [-9, 0]


def test_other_library_versions_are_said(made):
    assert sweeps.other_versions(made) == []
    older = json.loads(json.dumps(made[:2]))
    for record in older:
        record["provenance"]["versions"]["peft"] = "0.1.0"
    (line,) = sweeps.other_versions([*older, *made])
    assert line.startswith("2 records were made with peft 0.1.0; here it is ")


def test_records_of_different_test_sets_are_not_compared(made):
    svm_0, majority_0, svm_1, majority_1 = map(records.predictions_of, made)
    assert compare(svm_0, majority_0, n_resamples=50)["difference"] > 0
    with pytest.raises(BookError, match="different gold: compare them on the same documents"):
        compare(svm_0, majority_1)
    assert svm_0.test_set != svm_1.test_set


def test_validation_and_content_free_texts_are_recorded_where_the_sweep_asks(tiny_model, tiny_task, monkeypatch, made):
    monkeypatch.setattr(sweeps, "load_task", lambda key: tiny_task)
    approach = {"InstructionTuned": {"base_model": tiny_model, "epochs": 0}}
    (key,) = sweeps.keys({**SMALL, "approaches": [approach], "validation": True})
    record = json.loads(json.dumps(sweeps.run(key)))
    expected = APPROACHES["InstructionTuned"](tiny_model, epochs=0).fit(tiny_task).predict(tiny_task.validation)
    found = records.validation_of(record)
    assert found.gold.tolist() == tiny_task.validation["label"]
    assert np.allclose(found.probabilities, expected.probabilities, atol=1e-4)
    assert np.array(record["content_free"]["probabilities"]).shape == (len(sweeps.CONTENT_FREE), 3)
    with pytest.raises(BookError, match="nothing was recorded on validation. Put `validation: true`"):
        records.validation_of(made[0])


def test_groups_of_a_record_are_those_of_its_documents(made):
    task = tasks.load("ipc-sections", per_class=2, n_validation=20, n_test=60, seed=0)
    groups = sweeps.groups_of(task)
    same = np.equal.outer(groups, groups)
    assert np.array_equal(same, np.equal.outer(task.test["group"], task.test["group"])) and len(set(groups)) < 60
    found = [records.predictions_of(record) for record in made[::2]]
    common = set(found[0].groups) & set(found[1].groups)  # the same document in the test set of two seeds
    assert all(len(each.groups) == 40 for each in found)
    texts = [set(sweeps.load_task(record["key"]).test["text"]) for record in made[::2]]
    assert len(common) == len(texts[0] & texts[1])
