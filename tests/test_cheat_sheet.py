"""The cheat sheet: its code trains and answers, its numbers are those of the records or of the page that a line links to."""

import ast
import importlib.util
import re

import nbformat
import numpy as np
from conftest import BOOK, WORDS

from helpers.records import read

spec = importlib.util.spec_from_file_location("explorer", BOOK / "_ext" / "explorer.py")
explorer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(explorer)
TEXT = (BOOK / "cheat_sheet.md").read_text(encoding="utf-8")
SETUP, HEAD, INSTRUCTION = re.findall(r"```python\n(.*?)```", TEXT, re.S)
NUMBER = r"(?<![\w.])\d+(?:\.\d+)?(?:[BM]\b)?(?![\w.]*\d)"


def values_in(code, name):
    """The values given to a keyword argument of this name."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [ast.literal_eval(each.value) for call in calls for each in call.keywords if each.arg == name]


def trained(approach, given, tiny_model):
    """What the names of the sheet's code stand for after it ran on texts, golds, labels and new_texts."""
    code = SETUP.replace("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_model) + approach
    assert tiny_model in code
    exec(compile(code, "cheat_sheet.md", "exec"), given)
    adapters = [weight for name, weight in given["trainer"].model.named_parameters() if "lora_B" in name]
    assert adapters and all(weight.abs().max() > 0 for weight in adapters)  # they start at zero
    return given


def test_the_heads_code_learns_and_answers(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents = [(f"one {word} and {word}", label) for label, words in WORDS.items() for word in words]
    texts, golds = [text for text, _ in 5 * documents], [label for _, label in 5 * documents]
    made = trained(HEAD, {"texts": texts, "golds": golds, "labels": list(WORDS), "new_texts": texts}, tiny_model)
    assert made["model"].score.weight.dtype == made["torch"].float32
    assert np.mean([said == gold for said, gold in zip(made["said"], golds, strict=True)]) > 1.5 / len(WORDS)


def test_the_code_of_instruction_tuning_answers_as_the_book_does(tiny_model, tmp_path, monkeypatch):
    """It scores all tokens of a label and the end behind it, after the same prompt."""
    from helpers.label_scoring import score_labels

    monkeypatch.chdir(tmp_path)
    labels, texts = ["tech", "tech support", "sports"], ["the striker scored", "a new laptop"]
    made = trained(INSTRUCTION, {"texts": texts, "golds": labels[:2], "labels": labels, "new_texts": texts}, tiny_model)
    tokenizer, model = made["tokenizer"], made["trainer"].model.eval()
    prompts = [tokenizer.apply_chat_template(made["ask"](t), add_generation_prompt=True, tokenize=False) for t in texts]
    ours = score_labels(prompts, labels, model, tokenizer, 2, space="").numpy()
    for text, row, said in zip(texts, ours, made["said"], strict=True):
        theirs = np.array([made["score"](text, label).item() for label in labels])
        more = theirs - row  # of the line break that the template writes behind the end: about the same for every label
        assert np.ptp(more) < 0.5 < np.ptp(row)
        assert labels[row.argmax()] == labels[theirs.argmax()] == said


def test_rates_in_the_code_are_those_that_validation_chose():
    middle = {name: rate for name, rate, *_ in explorer.rates_chosen()}
    for code, name in ((HEAD, "head"), (INSTRUCTION, "instruction tuning")):
        [rate] = values_in(code, "learning_rate")
        assert middle[name] / 2 <= rate <= 2 * middle[name], name


def test_the_table_of_rates_is_that_of_all_runs_that_chose_theirs():
    """Counted once more from the lines of the files."""
    rates = {"EmbeddingHead": [], "InstructionTuned": [], "FineTunedEncoder": []}
    for path in (BOOK / "results").glob("*.jsonl"):
        for record in read(path):
            chosen = record.get("chosen", {}).get("settings", {}) if "tried" in record else {}
            if "learning_rate" in chosen and record["key"]["approach"] in rates:
                rates[record["key"]["approach"]].append(chosen["learning_rate"])
    counted = [(min(each), max(each), len(each)) for each in rates.values()]
    found = explorer.rates_chosen()
    assert [(low, high, n) for _, _, low, high, n in found] == counted
    for (_, middle, *_), every in zip(found, rates.values(), strict=True):
        assert sum(rate <= middle for rate in every) >= len(every) / 2 <= sum(rate >= middle for rate in every)
    assert [explorer.as_code(rate) for rate in (0.001, 0.00025, 5e-05)] == ["1e-3", "2.5e-4", "5e-5"]
    assert "| " not in explorer.rates_table() and all(f"<td>{n}</td>" in explorer.rates_table() for *_, n in counted)


def text_of(page):
    """A page's words with its stored outputs."""
    if (path := BOOK / f"{page}.md").exists():
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(BOOK / f"{page}.ipynb", 4).cells
    outputs = [str(output.get("data", output.get("text", ""))) for cell in cells for output in cell.get("outputs", [])]
    return "\n".join([*(cell.source for cell in cells), *outputs])


def test_every_other_number_stands_on_the_page_that_its_part_links_to():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    found = 0
    for part in re.findall(r"::::\{div\} cheat-part[^\n]*\n(.*?)\n::::\n", prose, re.S):
        pages = {page.partition("#")[0] or "pitfalls" for page in re.findall(r"\]\(([^)]+)\)", part)}
        words = re.sub(r"\[[^\]]*\]\([^)]*\)|^\d+\. ", "", part, flags=re.M)
        linked = "\n".join(map(text_of, sorted(pages)))
        for number in re.findall(NUMBER, words):
            found += 1
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", linked), (number, pages)
    assert found >= 10


def test_the_rule_of_thumb_for_memory_is_that_of_the_table():
    [table] = re.findall(r"^% table batches\n\n((?:\|.*\n)+)", text_of("on_one_gpu"), re.M)
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) \|", table, re.M)
    of_models = {name: (float(fetch) / 2, float(one)) for name, fetch, one in rows}  # two bytes a parameter
    assert len(of_models) == len(rows) >= 10
    for name, (billions, one) in of_models.items():
        if billions >= 3:
            assert 0.75 <= one / billions <= 1.1, name
        else:
            assert billions < one <= billions + 1, name
    starts = dict(re.findall(r"^\| (\d+) GiB [^|]*\| (.*?) \|", text_of("on_one_gpu"), re.M))
    said = re.findall(r"(\d+) GiB: (\S+), (batch \d+)", re.sub(r"\s+", " ", TEXT))
    assert [gib for gib, *_ in said] == ["8", "16", "24"]
    assert [f"{model}, {batch}" for _, model, batch in said] == [starts[gib] for gib, *_ in said]


def test_links_to_traps_lead_to_traps():
    traps = (BOOK / "pitfalls.md").read_text(encoding="utf-8")
    linked = re.findall(r"^\d\. \[([^\]]+)\]\(#([\w-]+)\)", TEXT, re.M)
    assert len(linked) == 5
    for title, anchor in linked:
        assert f"({anchor})=\n### {title}\n" in traps
