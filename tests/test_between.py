"""Chapter 12: heads that start from the language model's rows, and a score for a document with a label's text."""

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BOOK, glued_in, stored_table
from datasets import Dataset
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from helpers import base_models, tasks
from helpers.base_models import load_tokenizer
from helpers.errors import BookError
from helpers.lab.approaches import CandidateScorer, LabelRowsHead, unseen
from helpers.lab.statistics import of_settings, over_seeds
from helpers.label_scoring import label_tokens, score_labels
from helpers.records import predictions_of, read
from helpers.tasks import SPLITS, Task

SETTINGS = {"n_layers": 1, "rank": 4, "epochs": 1, "learning_rate": 1e-2}
CHAPTER = BOOK / "12_between_head_and_prompt.ipynb"
TEXTS = ["the goal and one coach", "the bank", "one browser for the laptop and the robot again and again", "a"]


@pytest.fixture(scope="module")
def causal_lm(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def scorer(tiny_model, tiny_task):
    return CandidateScorer(tiny_model, **SETTINGS).fit(tiny_task)


def renamed(task, labels):
    return Task(task.name, labels, **{split: getattr(task, split) for split in SPLITS})


# Heads that start from the language model's rows


def test_before_training_the_head_says_what_the_language_model_says(tiny_model, tiny_task, causal_lm):
    """The rows are the language model's: with a rate of 0 the head's probabilities are those of scoring labels of one token."""
    head = LabelRowsHead(tiny_model, **SETTINGS | {"learning_rate": 0}).fit(tiny_task)
    tokenizer = load_tokenizer(tiny_model)
    assert [len(tokens) for tokens in label_tokens(tiny_task.labels, tokenizer)] == [1, 1, 1]
    expected = score_labels(head._prompts(TEXTS), tiny_task.labels, causal_lm, tokenizer).softmax(-1)
    assert np.allclose(head.predict_proba(TEXTS), expected, atol=1e-4)


def test_rows_are_of_the_first_token_or_the_mean_of_all(tiny_model, tiny_task, causal_lm):
    labels = ("stock market", "machine learning", "of a word")
    ids = label_tokens(labels, load_tokenizer(tiny_model))
    assert min(map(len, ids)) > 1
    known = causal_lm.get_output_embeddings().weight.detach()
    for rows, expected in (
        ("first", [known[tokens[0]] for tokens in ids]),
        ("mean", [known[tokens].mean(0) for tokens in ids]),
    ):
        head = LabelRowsHead(tiny_model, rows=rows, **SETTINGS | {"learning_rate": 0}).fit(renamed(tiny_task, labels))
        weight = head.model.get_base_model().score.modules_to_save["default"].weight
        assert torch.allclose(weight, torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("train_rows", [True, False])
def test_rows_are_trained_or_stay_and_survive_a_round_trip(train_rows, tiny_model, tiny_task, causal_lm, tmp_path):
    head = LabelRowsHead(tiny_model, train_rows=train_rows, **SETTINGS).fit(tiny_task)
    first = [tokens[0] for tokens in label_tokens(tiny_task.labels, load_tokenizer(tiny_model))]
    weight = head.model.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(weight, causal_lm.get_output_embeddings().weight[first]) is not train_rows
    lora = sum(each.numel() for name, each in head.model.named_parameters() if "lora" in name)
    assert head.trainable_parameters == lora + (3 * 32 if train_rows else 0)
    again = LabelRowsHead.load(head.save(tmp_path / "saved"))
    assert np.allclose(again.predict_proba(TEXTS), head.predict_proba(TEXTS), atol=1e-6)


def test_with_fixed_rows_the_tuned_blocks_go_back_into_the_language_model(tiny_model, tiny_task, causal_lm):
    """What is served: an ordinary language model whose next token, of the labels' first ones, is the head's answer."""
    head = LabelRowsHead(tiny_model, train_rows=False, **SETTINGS).fit(tiny_task)
    expected, asked = head.predict_proba(TEXTS), head._prompts(TEXTS)
    served = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert not np.allclose(score_labels(asked, tiny_task.labels, served, head.tokenizer).softmax(-1), expected, atol=1e-2)
    served.model = head.model.merge_and_unload().model
    assert np.allclose(score_labels(asked, tiny_task.labels, served, head.tokenizer).softmax(-1), expected, atol=1e-4)


def test_labels_that_begin_alike_have_no_row_of_a_first_token(tiny_model, tiny_task):
    alike = renamed(tiny_task, ("stock market", "money", "stock exchange"))
    with pytest.raises(BookError, match="'stock market' and 'stock exchange' begin with the same token") as caught:
        LabelRowsHead(tiny_model, **SETTINGS).fit(alike)
    assert "\n" not in str(caught.value)
    assert LabelRowsHead(tiny_model, rows="mean", **SETTINGS).fit(alike).predict_proba(TEXTS).shape == (4, 3)
    with pytest.raises(BookError, match="Did you mean 'first'"):
        LabelRowsHead(tiny_model, rows="firsts")


# The candidate scorer


def test_the_scorer_learns_the_training_documents(tiny_model, tiny_task):
    settings = SETTINGS | {"n_layers": None, "epochs": 15}
    assert CandidateScorer(tiny_model, **settings).fit(tiny_task).predict(tiny_task.train).correct.all()


def test_a_score_is_read_from_document_and_label_alone(scorer, tiny_model):
    """The shared cache, padding and batches change nothing: each pair alone, read whole, has the same score."""
    tokenizer, logits = scorer.tokenizer, []
    with torch.inference_mode():
        for text in scorer._prompts(TEXTS):
            pairs = [torch.tensor([tokenizer(f"{text} {label}.").input_ids]) for label in scorer.labels]
            logits.append([float(scorer.model(pair).logits) for pair in pairs])
    expected = torch.tensor(logits).softmax(-1).numpy()
    assert np.ptp(expected, axis=0).min() > 1e-3
    for size in (1, 3, 32):
        assert np.allclose(scorer.predict_proba(TEXTS, batch_size=size), expected, atol=1e-4)
    alone = np.concatenate([scorer.predict_proba([text]) for text in TEXTS])
    assert np.allclose(alone, expected, atol=1e-4)


def test_candidates_in_another_order_and_labels_never_seen(scorer):
    labels, before = scorer.labels, scorer.predict_proba(TEXTS)
    try:
        scorer.labels = labels[::-1]
        assert np.allclose(scorer.predict_proba(TEXTS)[:, ::-1], before, atol=1e-5)
        scorer.labels = (*labels, "weather", "a long name of a label")
        more = scorer.predict_proba(TEXTS)
        assert more.shape == (4, 5) and np.allclose(more.sum(1), 1, atol=1e-5)
        assert np.allclose(more[:, :3] / more[:, :3].sum(1, keepdims=True), before, atol=1e-4)
    finally:
        scorer.labels = labels


def test_the_scorer_survives_a_round_trip(scorer, tmp_path):
    again = CandidateScorer.load(scorer.save(tmp_path / "saved"))
    assert np.allclose(again.predict_proba(TEXTS), scorer.predict_proba(TEXTS), atol=1e-6)


def test_labels_that_are_left_out_teach_nothing_and_are_scored(tiny_model, tiny_task):
    hidden = unseen(tiny_task.labels, 1, 0)
    kept = {split: getattr(tiny_task, split).to_list() for split in SPLITS}
    for rows in kept.values():
        for row in rows:
            if tiny_task.labels[row["label"]] in hidden:
                row["text"] += " changed"
    changed = Task("tiny", tiny_task.labels, **{split: Dataset.from_list(rows) for split, rows in kept.items()})
    said = []
    for task in (tiny_task, changed):
        scorer = CandidateScorer(tiny_model, left_out=1, best_epoch=True, **SETTINGS).fit(task)
        said.append(scorer.predict_proba(TEXTS))
    assert len(hidden) == 1 and scorer.labels == tiny_task.labels and said[0].shape == (4, 3)
    assert np.array_equal(*said)


def test_fewer_candidates_in_training(tiny_model, tiny_task, scorer):
    few = CandidateScorer(tiny_model, candidates=2, **SETTINGS).fit(tiny_task)
    assert few.predict_proba(TEXTS).shape == (4, 3)
    assert not np.allclose(few.predict_proba(TEXTS), scorer.predict_proba(TEXTS), atol=1e-3)


def test_what_cannot_be_scored_is_refused_in_one_line(tiny_model, tiny_task, scorer):
    labels = scorer.labels
    try:
        for wrong, message in (
            (("sports", "sports"), "cannot tell the labels 'sports.' and 'sports.' apart"),
            (("sports", "word " * 9000), r"The label 'word .*' needs \d+ tokens behind a prompt of \d+, and the model takes \d+"),
        ):
            scorer.labels = wrong
            with pytest.raises(BookError, match=message) as caught:
                scorer.predict_proba(TEXTS)
            assert "\n" not in str(caught.value)
    finally:
        scorer.labels = labels
    several = {}
    for split in SPLITS:
        rows = [{**row, "label": np.eye(3, dtype=int)[row["label"]].tolist()} for row in getattr(tiny_task, split)]
        several[split] = Dataset.from_list(rows)
    with pytest.raises(BookError, match="needs one label a document"):
        CandidateScorer(tiny_model, **SETTINGS).fit(Task("several", tiny_task.labels, **several, multi_label=True))


@pytest.mark.parametrize("n", [0, 2, 5])
def test_labels_are_left_out_by_seed_in_their_order(n):
    labels = ("a", "b", "c", "d", "e")
    drawn = [unseen(labels, n, seed) for seed in range(40)]
    assert all(each == sorted(set(each)) and len(each) == n for each in drawn)
    assert drawn[3] == unseen(labels, n, 3)
    assert len({label for each in drawn for label in each}) == (5 if n else 0)


# The chapter

STEPS = ("head, random start", "head, label rows", "head, label rows fixed", "instruction, bare", "candidate scorer")


def f1_by_seed(name):
    """Macro-F1 in percent of the first three seeds, computed once more from the probabilities."""
    found = {}
    for path in ("fair", "between"):
        for record in read(BOOK / "results" / f"{path}.jsonl"):
            key = record["key"]
            if (key["task"], key["options"].get("per_class"), record["name"]) == ("bbc-headlines", 8, name):
                predicted = np.argmax(record["probabilities"], axis=1)
                found[key["seed"]] = 100 * f1_score(record["gold"], predicted, average="macro")
    return {seed: found[seed] for seed in sorted(found) if seed < 3}


def cells_with(tag):
    return [cell.source for cell in nbformat.read(CHAPTER, 4).cells if tag in cell.metadata.get("tags", [])]


def said(glued, name):
    return float("".join(glued[name]["text/plain"]))


def test_the_steps_are_those_of_the_records():
    glued = glued_in(CHAPTER.stem)
    steps = {"start": (STEPS[1], STEPS[0]), "trained": (STEPS[2], STEPS[1]), "loss": (STEPS[3], STEPS[2])}
    for name, (a, b) in steps.items():
        expected = np.mean([f1_by_seed(a)[seed] - f1_by_seed(b)[seed] for seed in (0, 1, 2)])
        assert said(glued, f"{name}_difference") == pytest.approx(expected, abs=0.02)
        assert said(glued, f"{name}_low") < expected < said(glued, f"{name}_high")


@pytest.mark.parametrize(
    "name, short", [("instruction, not trained", "untrained"), (f"{STEPS[4]}, two labels left out", "scorer")]
)
def test_what_is_said_of_labels_never_seen_is_in_the_records(name, short):
    made = [record for record in read(BOOK / "results" / "between.jsonl") if record["name"] == name]
    assert sorted(record["key"]["seed"] for record in made) == [0, 1, 2]
    shares = {"two": [], "five": [], "others": []}
    for record in made:
        left_out = unseen(tuple(record["labels"]), 2, record["key"]["seed"])
        right = {name: [] for name in shares}
        for row, gold in zip(record["probabilities"], record["gold"], strict=True):
            by_label, answer = dict(zip(record["labels"], row, strict=True)), record["labels"][gold]
            said_of_all = max(by_label, key=by_label.get) == answer
            if answer in left_out:
                right["five"].append(said_of_all)
                right["two"].append(max(left_out, key=by_label.get) == answer)
            else:
                right["others"].append(said_of_all)
        for of, values in right.items():
            shares[of].append(100 * np.mean(values))
    for of, values in shares.items():
        assert said(glued_in(CHAPTER.stem), f"{short}_{of}") == pytest.approx(np.mean(values), abs=0.5)


def test_the_claims_fail_when_the_order_changes_or_the_parts_are_no_longer_equal():
    of_steps, of_unseen, _ = cells_with("claim")
    scores = {name: f1_by_seed(name) for name in STEPS}
    recorded = of_settings([record for path in ("fair", "between") for record in read(BOOK / "results" / f"{path}.jsonl")])
    names = {"f1": scores, "STEPS": STEPS, "PLACE": "bbc-headlines, 8", "recorded": recorded, "np": np, "torch": torch}
    names |= {"glue": lambda *_: None, "on_labels": [0.0, 0.0], "predictions_of": predictions_of, "over_seeds": over_seeds}
    names["before"] = pd.Series({"random rows": 0.2, "rows": 0.5, "probe": 0.7})
    names |= dict.fromkeys(("five", "scored", "cut", "served"), torch.ones(1))
    exec(of_steps, dict(names))
    no_loss = recorded | {("bbc-headlines, 8", STEPS[3]): recorded["bbc-headlines, 8", STEPS[2]]}
    for changed in (
        {"recorded": no_loss},
        {"served": torch.zeros(1)},
        {"scored": torch.zeros(1)},
        {"before": names["before"][::-1]},
    ):
        with pytest.raises(AssertionError):
            exec(of_steps, names | changed)
    found = {"MiniLM": [[90.0, 60.0, 60.0]] * 3, "untrained": [[75.0, 30.0, 57.0]] * 3, "scorer": [[60.0, 50.0, 30.0]] * 3}
    exec(of_unseen, names | {"found": found})
    for name, column, value in (
        ("scorer", 0, 80.0),
        ("scorer", 0, 95.0),
        ("scorer", 2, 55.0),
        ("MiniLM", 0, 70.0),
        ("scorer", 1, 20.0),
    ):
        changed = [value if number == column else each for number, each in enumerate(found[name][0])]
        with pytest.raises(AssertionError):
            exec(of_unseen, names | {"found": found | {name: [changed] * 3}})


# How many labels it takes

TUNED = ("MiniLM, fine-tuned", "head, instruction", "instruction, labels named", "instruction, no chat template")


def test_the_frozen_encoder_and_what_is_above_it_are_those_of_the_documents_and_records():
    """Once more with vectors from the model itself, mean over all tokens that are no padding."""
    (cell,) = [cell for cell in nbformat.read(CHAPTER, 4).cells if "AMOUNTS = [" in cell.source]
    shown = stored_table(cell.outputs[0].data)
    folder = base_models.fetch(base_models.ENCODER)
    encoder, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def vectors(texts):
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        states, mask = encoder(**batch).last_hidden_state, batch.attention_mask[..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()

    by_seed = []
    for seed in range(5):
        task = tasks.load("bbc-headlines", per_class=8, n_test=500, seed=seed)
        fitted = LogisticRegression().fit(vectors(task.train["text"]), task.train["label"])
        said_of_test = fitted.predict(vectors(task.test["text"]))
        by_seed.append(100 * f1_score(task.test["label"], said_of_test, average="macro"))
    assert float(shown["8", "frozen"]) == pytest.approx(np.mean(by_seed), abs=0.15)
    glued, made = glued_in(CHAPTER.stem), {"fair": {}, "fair_gpu": {}}
    for file, found in made.items():
        for record in read(BOOK / "results" / f"{file}.jsonl"):
            key = record["key"]
            if key["task"] == "bbc-headlines" and key["options"]["per_class"] == 8:
                found[record["name"], key["seed"]] = 100 * record["metrics"]["macro_f1"]
    for short, name, file in zip(
        ("encoder", "head", "lm", "plain"), TUNED, ("fair", "fair_gpu", "fair_gpu", "fair"), strict=True
    ):
        expected = np.mean([made[file][name, seed] - by_seed[seed] for seed in range(5)])
        assert said(glued, f"above_{short}_8") == pytest.approx(expected, abs=0.2)


def test_the_claims_about_amounts_fail_when_the_frozen_encoder_is_better_or_worse():
    *_, of_amounts = cells_with("claim")
    amounts = [1, 2, 4, 8, 16, 32, 64]
    frozen = dict(zip(amounts, ([f, f + 1, f - 1] for f in (41.0, 56.0, 66.0, 74.0, 79.0, 81.0, 84.0)), strict=True))
    close = {(name, n): np.array(frozen[n]) + np.array([-2.0, 1.0, 0.5]) for name in TUNED for n in (8, 32)}
    close |= {(name, 64): np.array(frozen[64]) + np.array([-2.0, 1.0, 0.5]) for name in TUNED[::2]}
    close |= {(TUNED[0], n): np.array(frozen[n]) + np.array([4.0, 5.0, 4.5]) for n in (8, 32)}
    close |= {(name, 8): np.array(frozen[8]) + np.array([-3.0, 1.0, -1.0]) for name in TUNED[1:3]}
    names = {"np": np, "stats": stats, "glue": lambda *_: None, "TUNED": dict.fromkeys(TUNED), "tuned_f1": close}
    names |= {"frozen": {"frozen": frozen}}
    names["means"] = {"nearest name": [60.0] * 7, "frozen": [np.mean(frozen[n]) for n in amounts]}
    exec(of_amounts, dict(names))
    for key in close:
        others = [np.array(frozen[key[1]]) + shift for shift in ([9.0, 9.1, 9.2], [-9.0, -9.1, -9.2])]
        for other in others if key[0] != TUNED[0] or key[1] == 64 else others[1:]:
            with pytest.raises(AssertionError):
                exec(of_amounts, names | {"tuned_f1": close | {key: other}})
    with pytest.raises(AssertionError):
        exec(of_amounts, names | {"means": names["means"] | {"nearest name": [40.0] * 7}})
