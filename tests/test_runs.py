import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import profiles, runs, tasks
from helpers.baselines import TfidfSvm
from helpers.errors import BookError
from helpers.evaluation import compare

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
    runs.main([str(path)])
    return path


@pytest.fixture(scope="module")
def records(sweep):
    return runs.read(sweep.with_suffix(".jsonl"))


def fake(number):
    return {"key": {"seed": number}, "provenance": {"versions": {}}, "filler": "x" * 20_000}


def test_a_sweep_records_every_approach_on_every_seed_once(sweep, records, capsys):
    before = sweep.with_suffix(".jsonl").read_bytes()
    assert [(each["key"]["approach"], each["key"]["seed"]) for each in records] == [
        ("TfidfSvm", 0),
        ("Majority", 0),
        ("TfidfSvm", 1),
        ("Majority", 1),
    ]
    runs.main([str(sweep)])
    assert sweep.with_suffix(".jsonl").read_bytes() == before
    assert "all 4 runs are recorded" in capsys.readouterr().out


def test_a_record_gives_back_what_the_approach_predicted(records):
    record = records[2]
    task = tasks.load("bbc", per_class=4, n_validation=20, n_test=40, shorten=tasks.first_words(16), seed=1)
    expected = TfidfSvm(C=0.5).fit(task).predict(task.test)
    said = runs.predictions_of(record)
    assert record["content_hash"] == task.content_hash()
    assert said.labels == expected.labels and said.gold.tolist() == expected.gold.tolist()
    assert np.allclose(said.probabilities, expected.probabilities, atol=1e-5)
    assert record["metrics"]["accuracy"] == expected.correct.mean()
    assert set(record["provenance"]["versions"]) == set(runs.LIBRARIES)


def test_the_cost_of_an_adapter_is_recorded(tiny_model, monkeypatch, tiny_task):
    monkeypatch.setattr(runs, "load_task", lambda key: tiny_task)
    options = {"base_model": tiny_model, "rank": [2, 4], "epochs": 1, "n_layers": 1}
    small, large = runs.keys({**SMALL, "approaches": [{"EmbeddingHead": options}]})
    small, large = (runs.run(key)["cost"] for key in (small, large))
    assert small["adapter_bytes"] >= 4 * small["trainable_parameters"]
    assert large["adapter_bytes"] > small["adapter_bytes"]
    assert small["tokens_per_second"] == pytest.approx(small["tokens"] / small["seconds"])


def test_a_run_that_is_missing_is_made(records, tmp_path):
    (tmp_path / "small.yaml").write_text(SWEEP)
    kept = [json.dumps(each) + "\n" for each in records if each["key"]["seed"] == 0]
    (tmp_path / "small.jsonl").write_text("".join(kept) + '{"key": {"approach": "Tf')  # killed while it wrote
    runs.main([str(tmp_path / "small.yaml")])
    assert [each["key"] for each in runs.read(tmp_path / "small.jsonl")] == [each["key"] for each in records]


def test_what_is_missing_is_listed_and_not_run(sweep, tmp_path, capsys):
    runs.main([str(sweep), "--out", str(tmp_path / "none.jsonl"), "--list"])
    out = capsys.readouterr().out
    assert "0 of 4 runs" in out and out.count("not yet run: bbc(per_class=4") == 4 and "TfidfSvm(C=0.5) seed 1" in out
    assert not (tmp_path / "none.jsonl").exists()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "small.yaml").write_text(SWEEP)

    def fit(self, task):
        raise MemoryError("not enough")

    monkeypatch.setattr(TfidfSvm, "fit", fit)
    with pytest.raises(SystemExit, match="2 of 4 runs failed; the others are recorded"):
        runs.main([str(tmp_path / "small.yaml")])
    assert [each["key"]["approach"] for each in runs.read(tmp_path / "small.jsonl")] == ["Majority", "Majority"]
    assert "TfidfSvm(C=0.5) seed 1: MemoryError: not enough" in capsys.readouterr().err


def test_a_record_of_other_settings_does_not_count(records):
    wanted = runs.keys({**SMALL, "approaches": ["TfidfSvm"]})
    assert wanted[0]["settings"]["C"] == 1.0
    assert wanted[0] not in [each["key"] for each in records]


def test_lists_are_grids_and_every_run_is_made_once():
    approaches = [{"EmbeddingHead": {"rank": [2, 8], "learning_rate": [1e-4, 5e-4]}}, {"EmbeddingHead": {"rank": 8}}]
    found = runs.keys({**SMALL, "seeds": [0, 1], "approaches": approaches})
    assert len(found) == 8  # the last approach is one of the grid
    assert {(key["settings"]["rank"], key["settings"]["learning_rate"], key["settings"]["seed"]) for key in found} == {
        (rank, rate, seed) for rank in (2, 8) for rate in (1e-4, 5e-4) for seed in (0, 1)
    }


def test_a_base_model_is_for_those_that_share_it():
    approaches = ["EmbeddingHead", "FineTunedEncoder", {"FrozenProbe": {"base_model": "mine"}}, "TfidfSvm"]
    found = runs.keys({**SMALL, "approaches": approaches, "base_model": "Qwen/Qwen3-0.6B"})
    assert [key["settings"].get("base_model") for key in found] == ["Qwen/Qwen3-0.6B", "all-MiniLM-L6-v2", "mine", None]


def test_the_full_profile_has_its_own_runs_and_records(monkeypatch):
    sweep = {**SMALL, "full": {"seeds": [0, 1, 2]}}
    quick = runs.keys(sweep)
    monkeypatch.setattr(profiles, "current", lambda: profiles.Profile("full", "cuda", None))
    full = runs.keys(sweep)
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
        ({"approaches": [{"Majority": {}, "TfidfSvm": {}}]}, "is written as `- name: {option: value}`"),
        ({"approaches": [{"TfidfSvm": 3}]}, "written as `name: value`, not 3"),
        ({"tasks": ["bcc"]}, "task 'bcc'. Did you mean 'bbc'?"),
        ({"tasks": [{"bbc": {"perclass": 4}}]}, "option of a task 'perclass'. Did you mean 'per_class'?"),
        ({"seed": [1]}, "entry of a sweep 'seed'. Did you mean 'seeds'?"),
        ({"full": {"sedes": [1]}}, "entry of `full` 'sedes'. Did you mean 'seeds'?"),
        ({"seeds": 3}, "A sweep needs 'seeds', a list"),
        ({"tasks": []}, "A sweep needs 'tasks', a list"),
    ],
)
def test_mistakes_in_a_sweep_are_named_before_anything_runs(change, words):
    with pytest.raises(BookError) as caught:
        runs.keys({**SMALL, **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [("a: [", "cannot be read as YAML"), ("- a", "is no sweep"), (None, "cannot be read")])
def test_a_file_that_is_no_sweep_is_refused_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(SystemExit) as caught:
        runs.main([str(tmp_path / "sweep.yaml")])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_sweeps_of_the_book_are_in_order():
    sweeps = sorted((ROOT / "book" / "results").glob("*.yaml"))
    assert sweeps
    for path in sweeps:
        wanted = runs.keys(runs.load_sweep(path))
        recorded = [record["key"] for record in runs.read(path.with_suffix(".jsonl"))]
        assert wanted and all(key in wanted for key in recorded), path


def test_a_torn_last_line_is_left_out_and_taken_away(tmp_path, capsys):
    path = tmp_path / "torn.jsonl"
    whole = json.dumps(fake(1))
    path.write_text(f"{whole}\n{whole[:50]}")
    assert runs.read(path) == [fake(1)]
    assert "torn.jsonl: the last line is torn" in capsys.readouterr().err
    assert runs.append(path, fake(2))
    capsys.readouterr()
    assert runs.read(path) == [fake(1), fake(2)]
    assert capsys.readouterr().err == ""


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path):
    (tmp_path / "whole.jsonl").write_text(json.dumps(fake(1)))
    assert runs.append(tmp_path / "whole.jsonl", fake(2))
    assert runs.read(tmp_path / "whole.jsonl") == [fake(1), fake(2)]


@pytest.mark.parametrize("line", ['{"key": ', "3", "[]", "{}", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    whole = json.dumps(fake(1))
    (tmp_path / "torn.jsonl").write_text(f"{line}\n{whole}\n")
    with pytest.raises(BookError, match="torn.jsonl, line 1 is no record"):
        runs.read(tmp_path / "torn.jsonl")


def test_a_run_is_recorded_once(tmp_path):
    path = tmp_path / "once.jsonl"
    assert runs.append(path, fake(1))
    before = path.read_bytes()
    assert not runs.append(path, fake(1))
    assert path.read_bytes() == before
    path.write_bytes(before + before)  # a merge gone wrong
    with pytest.raises(BookError, match="line 2 records the same run as line 1"):
        runs.read(path)


def test_no_file_is_no_records(tmp_path):
    assert runs.read(tmp_path / "none.jsonl") == []


WRITER = """
import sys
from helpers import runs
for number in range(25):
    record = {"key": {"seed": number}, "provenance": {"versions": {}}, "filler": "x" * 20_000}
    runs.append(sys.argv[1], record)
    print(number, flush=True)
"""


def test_two_writers_of_which_one_is_killed_lose_and_double_nothing(tmp_path):
    path = tmp_path / "both.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [int(both[0].stdout.readline()) for _ in range(5)]
    both[0].kill()
    assert {each["key"]["seed"] for each in runs.read(path)} >= set(said)  # at once, whatever state it left
    assert both[1].wait(timeout=120) == 0
    both[0].wait()
    assert runs.read(path) == [fake(number) for number in range(25)]
    assert both[0].returncode == -9


def test_other_library_versions_are_said(records):
    assert runs.other_versions(records) == []
    older = json.loads(json.dumps(records[:2]))
    for record in older:
        record["provenance"]["versions"]["peft"] = "0.1.0"
    (line,) = runs.other_versions([*older, *records])
    assert line.startswith("2 records were made with peft 0.1.0; here it is ")


def test_records_of_different_test_sets_are_not_compared(records):
    svm_0, majority_0, svm_1, majority_1 = map(runs.predictions_of, records)
    assert compare(svm_0, majority_0, n_resamples=50)["difference"] > 0
    with pytest.raises(BookError, match="not tested on the same documents"):
        compare(svm_0, majority_1)
    assert svm_0.test_set != svm_1.test_set


def test_rounded_probabilities_of_many_labels_are_probabilities(records):
    record = json.loads(json.dumps(records[0]))
    n = 20_000
    record |= {
        "labels": [f"label {i}" for i in range(n)],
        "gold": [0],
        "groups": None,
        "probabilities": [[0.5] + [0.00004] * (n - 1)],
    }
    assert runs.predictions_of(record).probabilities.sum() == pytest.approx(1)


def test_records_as_a_table(records):
    table = runs.frame(records)
    assert table["task"].unique().tolist() == ["bbc, 16 words"]
    assert table["approach"].tolist() == ["TF-IDF + linear SVM", "majority class"] * 2
    assert table["rank"].isna().all()
    assert table["accuracy"].tolist() == [record["metrics"]["accuracy"] for record in records]


def test_validation_and_content_free_texts_are_recorded_where_the_sweep_asks(tiny_model, tiny_task, monkeypatch, records):
    monkeypatch.setattr(runs, "load_task", lambda key: tiny_task)
    approach = {"InstructionTuned": {"base_model": tiny_model, "epochs": 0}}
    (key,) = runs.keys({**SMALL, "approaches": [approach], "validation": True})
    record = json.loads(json.dumps(runs.run(key)))
    expected = runs.APPROACHES["InstructionTuned"](tiny_model, epochs=0).fit(tiny_task).predict(tiny_task.validation)
    said = runs.validation_of(record)
    assert said.gold.tolist() == tiny_task.validation["label"] and np.allclose(
        said.probabilities, expected.probabilities, atol=1e-4
    )
    assert np.array(record["content_free"]["probabilities"]).shape == (len(runs.CONTENT_FREE), 3)
    with pytest.raises(BookError, match="nothing was recorded on validation. Put `validation: true`"):
        runs.validation_of(records[0])


def test_a_record_from_before_a_setting_counts_with_its_default(sweep, records, tmp_path):
    older = [json.loads(json.dumps(record)) for record in records]
    for record in older:
        record["key"]["settings"].pop("C", None)
    path = tmp_path / "older.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in older))
    settings = [each["key"]["settings"] for each in runs.read(path)]
    assert [each.get("C") for each in settings] == [1.0, None, 1.0, None]


def test_groups_of_a_record_are_those_of_its_documents(records):
    task = tasks.load("ipc-sections", per_class=2, n_validation=20, n_test=60, seed=0)
    groups = runs.groups_of(task)
    same = np.equal.outer(groups, groups)
    assert np.array_equal(same, np.equal.outer(task.test["group"], task.test["group"])) and len(set(groups)) < 60
    said = [runs.predictions_of(record) for record in records[::2]]
    common = set(said[0].groups) & set(said[1].groups)  # the same document in the test set of two seeds
    assert all(len(each.groups) == 40 for each in said)
    texts = [set(runs.load_task(record["key"]).test["text"]) for record in records[::2]]
    assert len(common) == len(texts[0] & texts[1])
