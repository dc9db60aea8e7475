import json

import numpy as np
import pytest

from helpers import runs, tasks
from helpers.baselines import TfidfSvm
from helpers.errors import BookError

SWEEP = """
task: bbc
options: {per_class: 4, n_validation: 20, n_test: 40, words: 16}
seeds: [0, 1]
approaches:
  - TfidfSvm: {C: 0.5}
  - Majority: {}
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "small.yaml"
    path.write_text(SWEEP)
    runs.main([str(path)])
    return path


def test_a_sweep_records_every_approach_on_every_seed_once(sweep, capsys):
    records = sweep.with_suffix(".jsonl")
    before = records.read_bytes()
    assert [(each["key"]["approach"], each["key"]["seed"]) for each in runs.read(records)] == [
        ("TfidfSvm", 0),
        ("Majority", 0),
        ("TfidfSvm", 1),
        ("Majority", 1),
    ]
    runs.main([str(sweep)])
    assert records.read_bytes() == before
    assert "all 4 runs are recorded" in capsys.readouterr().out


def test_a_record_gives_back_what_the_approach_predicted(sweep):
    record = runs.read(sweep.with_suffix(".jsonl"))[2]
    task = tasks.load("bbc", per_class=4, n_validation=20, n_test=40, shorten=tasks.first_words(16), seed=1)
    expected = TfidfSvm(C=0.5).fit(task).predict(task.test)
    said = runs.predictions_of(record)
    assert record["content_hash"] == task.content_hash()
    assert said.labels == expected.labels and said.gold.tolist() == expected.gold.tolist()
    assert np.allclose(said.probabilities, expected.probabilities, atol=1e-5)
    assert record["metrics"]["accuracy"] == expected.correct.mean()
    assert set(record["provenance"]["versions"]) == set(runs.LIBRARIES)


def test_a_run_that_is_missing_is_made(sweep, tmp_path):
    records = runs.read(sweep.with_suffix(".jsonl"))
    (tmp_path / "small.yaml").write_text(SWEEP)
    kept = [json.dumps(each) + "\n" for each in records if each["key"]["seed"] == 0]
    (tmp_path / "small.jsonl").write_text("".join(kept))
    runs.main([str(tmp_path / "small.yaml")])
    assert [each["key"] for each in runs.read(tmp_path / "small.jsonl")] == [each["key"] for each in records]


def test_a_record_of_other_settings_does_not_count(sweep):
    wanted = runs.keys({"task": "bbc", "options": {}, "seeds": [0], "approaches": [{"TfidfSvm": {}}]})
    assert wanted[0]["settings"]["C"] == 1.0
    assert wanted[0] not in [each["key"] for each in runs.read(sweep.with_suffix(".jsonl"))]


@pytest.mark.parametrize(
    "approaches, words",
    [
        ([{"EmbedingHead": {}}], "approach 'EmbedingHead'. Did you mean 'EmbeddingHead'?"),
        ([{"EmbeddingHead": {"learningrate": 1.0}}], "setting of EmbeddingHead 'learningrate'. Did you mean 'learning_rate'?"),
    ],
)
def test_unknown_names_suggest_the_nearest(approaches, words):
    with pytest.raises(BookError) as caught:
        runs.keys({"task": "bbc", "options": {}, "seeds": [0], "approaches": approaches})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_torn_line_is_named(tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"key": 1}\n{"key": ')
    with pytest.raises(BookError, match="torn.jsonl, line 2 is no record"):
        runs.read(tmp_path / "torn.jsonl")


def test_no_file_is_no_records(tmp_path):
    assert runs.read(tmp_path / "none.jsonl") == []
