"""Each approach at its own best: grids that grow, the best epoch, searches that were stopped, and what they leave behind."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helpers import records
from helpers.approach import Approach
from helpers.errors import BookError
from helpers.lab import search, sweeps
from helpers.lab.approaches import EmbeddingHead, InstructionTuned

RATES = [0.1, 0.2]


def row(score, loss=1.0, **settings):
    return {"settings": settings, "macro_f1": score, "log_loss": loss}


@pytest.mark.parametrize(
    "scores, beyond",
    [
        ({1.0: 0.5, 2.0: 0.7, 4.0: 0.6}, None),  # inside
        ({1.0: 0.5, 2.0: 0.6, 4.0: 0.7}, 8.0),
        ({1.0: 0.8, 2.0: 0.7, 4.0: 0.6}, 0.5),
        ({1.0: 0.5, 3.0: 0.7}, 9.0),  # in steps of the grid's last
    ],
)
def test_a_grid_grows_where_its_best_value_lies_at_an_edge(scores, beyond):
    tried = [row(score, rate=rate) for rate, score in scores.items()]
    assert search.beyond_edge({"rate": list(scores)}, tried) == (beyond and {"rate": beyond})


def test_a_grid_grows_for_the_best_of_the_other_settings_only():
    tried = [
        row(score, C=C, kind=kind) for C, kind, score in [(1.0, "a", 0.5), (2.0, "a", 0.6), (1.0, "b", 0.4), (2.0, "b", 0.3)]
    ]
    assert search.beyond_edge({"C": [1.0, 2.0], "kind": ["a", "b"]}, tried) == {"C": 4.0, "kind": "a"}


def test_a_grid_does_not_grow_for_ever_and_one_value_is_no_grid():
    tried = [row(rate, rate=rate) for rate in (1.0, 2.0, 4.0, 8.0, 16.0)]
    assert search.beyond_edge({"rate": [1.0, 2.0]}, tried) is None
    assert search.beyond_edge({"rate": [1.0]}, [row(0.5, rate=1.0)]) is None


def test_of_equal_scores_the_less_surprised_one_is_chosen():
    assert max([row(0.5, 0.9, n=1), row(0.5, 0.8, n=2), row(0.4, 0.1, n=3)], key=search.rank)["settings"] == {"n": 2}


@dataclass
class Peak(Approach):
    """Better the nearer its rate is to 0.4; writes down what was fitted."""

    rate: float = 0.1
    name: str = "peak"
    fitted = []

    def _fit(self, task):
        self.fitted.append(self.rate)

    def _predict_proba(self, texts, batch_size):
        right = np.exp(-abs(np.log(self.rate / 0.4)))
        return np.full((len(texts), len(self.labels)), 1 / len(self.labels)) * (1 - right) + right * self.answers

    def _save(self, folder):
        (folder / "rate").write_text(str(self.rate))

    def _load(self, folder):
        assert (folder / "rate").read_text() == str(self.rate)


@pytest.fixture
def peak(tiny_task, monkeypatch):
    monkeypatch.setattr(Peak, "answers", np.eye(len(tiny_task.labels))[tiny_task.validation["label"]], raising=False)
    monkeypatch.setattr(Peak, "fitted", [])
    return Peak


def test_the_best_configuration_is_found_and_given_back(peak, tiny_task, tmp_path):
    found, tried = search.search(peak, {"rate": RATES, "name": "x"}, tiny_task, tmp_path)
    assert peak.fitted == [0.1, 0.2, 0.4, 0.8] and found.rate == 0.4 and found.name == "x"
    assert [each["settings"]["rate"] for each in tried] == peak.fitted
    assert search.beyond_edge({"rate": RATES}, tried) is None


def test_a_search_that_was_stopped_goes_on(peak, tiny_task, tmp_path, monkeypatch):
    fit = peak._fit

    def stop(self, task):
        if self.rate == 0.4:
            raise KeyboardInterrupt
        fit(self, task)

    monkeypatch.setattr(peak, "_fit", stop)
    with pytest.raises(KeyboardInterrupt):
        search.search(peak, {"rate": RATES}, tiny_task, tmp_path)
    monkeypatch.setattr(peak, "_fit", fit)
    found, tried = search.search(peak, {"rate": RATES}, tiny_task, tmp_path)
    assert peak.fitted == [0.1, 0.2, 0.4, 0.8] and found.rate == 0.4 and len(tried) == 4


def options(kind, tiny_model, **more):
    return kind(base_model=tiny_model, n_layers=1, epochs=3, learning_rate=5e-3, **more)


def trained_weights(approach):
    return {name: each.detach().clone() for name, each in approach.model.named_parameters() if each.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_the_weights_of_the_best_epoch_are_kept(kind, tiny_model, tiny_task, monkeypatch):
    seen, scores = [], iter([0.2, 0.9, 0.5])

    def on_validation(approach, documents):
        seen.append(trained_weights(approach))
        return {"macro_f1": next(scores), "log_loss": 1.0, "seconds": 0.0}

    monkeypatch.setattr(search, "on_validation", on_validation)
    approach = options(kind, tiny_model, best_epoch=True).fit(tiny_task)
    after = trained_weights(approach)
    assert len(seen) == 3 and same(after, seen[1]) and not same(after, seen[2])


@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_validation_within_training_sees_what_a_user_will_and_changes_nothing(kind, tiny_model, tiny_task, monkeypatch):
    monkeypatch.setattr(search, "rank", lambda tried: tried["epoch"])  # the last epoch is the best
    chosen = options(kind, tiny_model, best_epoch=True).fit(tiny_task)
    (watch,) = chosen.callbacks
    again = search.on_validation(chosen, tiny_task.validation)
    assert [each["epoch"] for each in watch.epochs] == [1, 2, 3]
    assert watch.epochs[-1]["log_loss"] == pytest.approx(again["log_loss"], abs=1e-3)
    assert same(trained_weights(chosen), trained_weights(options(kind, tiny_model).fit(tiny_task)))


@pytest.mark.parametrize("epochs, asked", [(1, [1]), (4, [1, 2, 3, 4]), (6, [2, 4, 6]), (13, [4, 8, 12, 13])])
def test_long_trainings_are_not_validated_after_every_epoch(epochs, asked, tiny_task, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(search, "on_validation", lambda *_: {"macro_f1": 0.0, "log_loss": 0.0})
    watch, model = search.BestEpoch(None, None), torch.nn.Linear(1, 1)
    for epoch in range(1, epochs + 1):
        watch.on_epoch_end(SimpleNamespace(num_train_epochs=epochs), SimpleNamespace(epoch=epoch), None, model)
    assert [each["epoch"] for each in watch.epochs] == asked


@pytest.mark.parametrize("kind", [EmbeddingHead, InstructionTuned])
def test_lower_layers_are_computed_once_for_several_trainings(kind, tiny_model, tiny_task):
    states = {}
    first, second = options(kind, tiny_model), options(kind, tiny_model)
    first.lower_states = second.lower_states = states
    first.fit(tiny_task)
    computed = dict(states)
    second.fit(tiny_task)
    assert computed and states.keys() == computed.keys() and all(states[text] is computed[text] for text in computed)
    assert same(trained_weights(first), trained_weights(second))


CHOOSE = "{choose: {C: [0.1, 1.0], analyzer: [word, char_wb]}}"
SWEEP = f"""
- tasks:
    - bbc: {{per_class: 4, n_validation: 20, n_test: 40, words: 16}}
  seeds: [0]
  validation: true
  approaches:
    - TfidfSvm: {CHOOSE}
    - Majority
"""


def test_a_sweep_records_what_was_tried_and_what_was_chosen(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text(SWEEP)
    sweeps.main([str(path), "--workers", "1"])
    tuned, majority = records.read(path.with_suffix(".jsonl"))
    assert tuned["key"]["settings"]["C"] == [0.1, 1.0] and len(tuned["tried"]) >= 4 and "tried" not in majority
    assert tuned["chosen"] == max(tuned["tried"], key=search.rank)
    assert records.validation_of(tuned).probabilities.shape == (20, 5)
    again = {**tuned["key"], "settings": tuned["key"]["settings"] | tuned["chosen"]["settings"]}
    again = sweeps.run(again)
    assert again["probabilities"] == tuned["probabilities"] and again["metrics"] == tuned["metrics"]


@pytest.mark.parametrize("choose", [{"C": 1.0}, {"C": []}, {"C": [1.0, 2.0], "analyzer": "word"}])
def test_what_is_chosen_from_is_a_list(choose):
    sweep = {"tasks": ["bbc"], "seeds": [0], "approaches": [{"TfidfSvm": {"choose": choose}}]}
    with pytest.raises(BookError, match="list of values to try"):
        sweeps.keys(sweep)


def test_a_setting_is_given_or_chosen_and_not_both():
    sweep = {"tasks": ["bbc"], "seeds": [0], "approaches": [{"TfidfSvm": {"C": 1.0, "choose": {"C": [1.0, 2.0]}}}]}
    with pytest.raises(BookError, match="no value beside it"):
        sweeps.keys(sweep)


def test_two_grids_at_their_edges_and_whole_numbers():
    rows = [row(score, C=C, rate=rate) for C, rate, score in ((1.0, 0.1, 0.1), (2.0, 0.1, 0.2), (1.0, 0.2, 0.3), (2.0, 0.2, 0.4))]
    rows.append(row(0.5, C=2.0, rate=0.4))  # only one C was tried at this rate
    assert search.beyond_edge({"C": [1.0, 2.0], "rate": [0.1, 0.2]}, rows) == {"C": 2.0, "rate": 0.8}
    beyond = search.beyond_edge({"rank": [8, 16]}, [row(0.1, rank=8), row(0.2, rank=16)])
    assert beyond == {"rank": 32} and type(beyond["rank"]) is int
    assert search.beyond_edge({"epochs": [1, 4]}, [row(0.2, epochs=1), row(0.1, epochs=4)]) is None  # no epochs below one


@pytest.mark.parametrize("values", [[True, False], [0.0, 1.0], [None, 10]])
def test_what_has_no_steps_has_no_edges(values):
    assert search.beyond_edge({"x": values}, [row(score, x=value) for score, value in enumerate(values)]) is None


def test_a_training_that_went_astray_loses_and_stops_nothing(tiny_model, tiny_task, tmp_path):
    settings = {"base_model": tiny_model, "n_layers": 1, "epochs": 1, "learning_rate": [1e-3, 1e30], "best_epoch": True}
    found, tried = search.search(EmbeddingHead, settings, tiny_task, tmp_path)
    assert {each["settings"]["learning_rate"]: each["macro_f1"] for each in tried}[1e30] == 0
    assert found.learning_rate < 1 and np.isfinite(found.predict(tiny_task.test).probabilities).all()


def test_a_search_that_was_stopped_while_it_saved_goes_on(peak, tiny_task, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "rate").write_text("half")
    found, _ = search.search(peak, {"rate": RATES}, tiny_task, tmp_path)
    assert found.rate == 0.4


def test_the_best_epoch_needs_a_training_in_one_piece(tiny_model, tiny_task, tmp_path):
    with pytest.raises(BookError, match="in one piece"):
        options(EmbeddingHead, tiny_model, best_epoch=True, checkpoints=str(tmp_path)).fit(tiny_task)


def test_a_run_with_the_best_epoch_records_the_epochs(tiny_model, tiny_task, monkeypatch):
    monkeypatch.setattr(sweeps, "load_task", lambda key: tiny_task)
    approach = {"EmbeddingHead": {"base_model": tiny_model, "n_layers": 1, "best_epoch": True, "precision": "bfloat16"}}
    (key,) = sweeps.keys({"tasks": ["bbc"], "seeds": [0], "approaches": [approach]})
    record = sweeps.run(key)
    assert len(record["epochs"]) == 2 and record["chosen"] in record["epochs"]
    assert record["provenance"]["dtype"] == "bfloat16"
