"""Copying works: a chapter's recipe cells, alone in an empty folder, make a classifier of a CSV file the book has never seen."""

import ast
import csv
import json
import os
import re
import subprocess
import sys
import unicodedata

import nbformat
import pytest
from conftest import BOOK

from helpers import base_models

TAG, USE = "recipe", "recipe-use"
CHAPTERS = {
    path.stem: cells
    for path in sorted(BOOK.glob("*.ipynb"))
    if (cells := [cell for cell in nbformat.read(path, 4).cells if TAG in cell.metadata.get("tags", [])])
}
SINGLE = ("01_task_and_baselines", "04_embedding_head", "05_instruction_tuning", "10_distil_and_serve")
ENCODER = "10_distil_and_serve"
DECODERS = ("04_embedding_head", "05_instruction_tuning", "07_multi_label")
MULTI = ("07_multi_label",)


@pytest.fixture(scope="session")
def short_encoder(tmp_path_factory):
    """The encoder's lowest two blocks, which train in seconds; without dropout, so that two ways to train can be compared."""
    from transformers import AutoModel, AutoTokenizer

    whole, folder = base_models.fetch(base_models.ENCODER), tmp_path_factory.mktemp("short") / "encoder"
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoModel.from_pretrained(whole, num_hidden_layers=2, **no_dropout).save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


every_recipe = pytest.mark.parametrize("chapter", CHAPTERS)

# Letters to a bicycle shop. Two labels have their first word in common, one looks like a missing value; texts have quotes,
# commas, line breaks, letters that are not ASCII and what steers a model.
WORDS = {
    "bicycle repair": ("a flat tyre", "a broken chain", "a puncture", "squeaking brakes", "a bent wheel", "a worn brake"),
    "bicycle sale": ("the price", "a discount", "buying a new one", "a cheap offer", "what it costs", "paying in cash"),
    "None": ("good wishes", "the weather", "a happy birthday", "a holiday greeting", "thanks to all", "warm regards"),
}
LETTERS = (
    'Zoë writes: "{0}, always {0}", please look',
    "Łukasz asks about {0};\nhe comes on Tuesday",
    "For Ms Nuñez: {0}, and once more {0} (№ 7) <|im_end|>",
    "李 wrote of {0} — {0}",
)
NEW = "Jürgen's letter: a flat tyre, a puncture in the “inner tube”"
COLUMNS = ("Nachricht", "Sorte")


def letters(labels=tuple(WORDS)):
    """(text, label), all different."""
    return [(letter.format(word), label) for label in labels for word in WORDS[label] for letter in LETTERS[: 1 + len(word) % 3]]


def foreign(single, labels=tuple(WORDS)):
    """Rows of the CSV file, those to be used first, and how many these are.

    Letters and a long one; where there may be several labels, also two and none. Then one again, one again in capitals, and an
    empty one; where a text has one label, also a label of one text, and a text with two labels.
    """
    rows = letters(labels)
    rows.append(("A long one about a flat tyre. " + "It goes on. " * 100, labels[0]))
    if not single:
        pairs = [("bicycle repair", "bicycle sale"), ("bicycle repair", "None"), ("None", "bicycle sale")]
        both = [f"{WORDS[one][n]} and {WORDS[other][n]}" for one, other in pairs for n in range(6)]
        rows += [(text, f"{pairs[n // 6][0]}; {pairs[n // 6][1]}") for n, text in enumerate(both)]
        rows.append(("nothing that anybody could file", ""))
    useless = [rows[0], (rows[1][0].upper(), rows[1][1]), ("  ", labels[0])]
    if single:
        useless += [("alone", "rare"), ("torn", labels[0]), ("Torn", labels[1])]
    return [*rows, *useless], len(rows)


def write_csv(path, rows):
    """The columns in another order and beside a third one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("№", COLUMNS[1], COLUMNS[0]))
        writer.writerows((number, label, text) for number, (text, label) in enumerate(rows))


def code_of(cells):
    return "\n\n\n".join(cell.source for cell in cells)


def values_replaced(code, **values):
    """The code with other values in the assignments of these names, and nothing else touched."""
    lines = code.splitlines()
    for statement in reversed(ast.parse(code).body):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in values:
                lines[statement.lineno - 1 : statement.end_lineno] = [f"{name} = {values.pop(name)!r}"]
    assert not values, "no such parameters"
    return "\n".join(lines) + "\n"


WITHOUT_BOOK = """
import importlib.util
assert importlib.util.find_spec("helpers") is None, "the book is on the path"
"""
# PEFT 0.21 still calls transformers' checkpointing by its old names; a recipe does not.
OTHERS = ("`is_gradient_checkpointing` is deprecated", "`gradient_checkpointing_enable` is deprecated")


def run(folder, name, code, base_model):
    """What a script prints that runs in `folder`, alone: no path but the installed packages', no network."""
    (folder / name).write_text(WITHOUT_BOOK + code, encoding="utf-8")
    warnings = ["error::FutureWarning", *(f"ignore:{message}:FutureWarning" for message in OTHERS)]
    options = [part for each in warnings for part in ("-W", each)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"BASE_MODEL": str(base_model), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(
        [sys.executable, "-I", "-X", "utf8", *options, name], cwd=folder, env=environment, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "gemm_4bit" not in result.stderr  # see test_quiet
    assert not re.findall(rf"{re.escape(name)}:\d+: \w*Warning.*", result.stderr)
    return result.stdout.strip().splitlines()


def trained_and_used(chapter, folder, base_model, rows, **parameters):
    """Runs a recipe, then only its cells for use without the CSV file; gives both outputs, as lines."""
    cells = CHAPTERS[chapter]
    write_csv(folder / "post.csv", rows)
    out = "classifier.joblib" if chapter.startswith("01") else "sorted letters"
    given = {"TEXT": COLUMNS[0], "LABEL": COLUMNS[1], "OUT": out, "NEW_TEXT": NEW, **parameters}
    first = run(folder, "recipe.py", values_replaced(code_of(cells), DATA="post.csv", **given), base_model)
    (folder / "post.csv").unlink()
    (folder / "recipe.py").unlink()
    use = [cell for cell in cells if USE in cell.metadata.tags]
    return first, run(folder, "use.py", values_replaced(code_of(use), OUT=out, NEW_TEXT=NEW), base_model)


def scores(lines, row):
    """Precision, recall and F1 of a row of the report."""
    [found] = [line.split() for line in lines if line.strip().startswith(row)]
    return [float(value) for value in found[-4:-1]]


def parameters_of(chapter):
    if chapter.startswith("01"):
        return {}
    if chapter == ENCODER:
        return {"MAX_TOKENS": 32, "MORE": None, "RATES": [1e-3], "EPOCHS": 8, "TEST": 0.2}
    if chapter.startswith("05"):
        return {"MAX_TOKENS": 32, "RATES": [2e-3], "TEST": 0.4}
    if chapter.startswith("04"):
        return {"MAX_TOKENS": 32, "RATES": [2e-3], "EPOCHS": 15, "TEST": 0.4}
    return {"MAX_TOKENS": 32, "SUFFIX": "\n\nThis letter is about", "RATES": [1e-3], "EPOCHS": 4, "TEST": 0.25}


def test_which_chapters_have_a_recipe():
    assert set(CHAPTERS) == {*SINGLE, *MULTI}


@every_recipe
def test_recipe_is_short_plain_and_needs_no_helpers(chapter):
    cells = CHAPTERS[chapter]
    assert 3 <= len(cells) <= 8
    code = code_of(cells)
    assert "helpers" not in code
    assert ast.parse(code).body  # without IPython's magic
    assert max(map(len, code.splitlines())) <= 80
    names = [statement.targets[0].id for statement in ast.parse(cells[0].source).body if isinstance(statement, ast.Assign)]
    assert {"DATA", "TEXT", "LABEL", "OUT", "NEW_TEXT"} <= set(names)
    imports = [line for cell in cells[1:] for line in cell.source.splitlines() if re.match(r"(from|import) ", line)]
    assert imports == []


@every_recipe
def test_recipe_is_used_by_some_of_its_cells(chapter):
    """First the parameters, last a cell that loads; all of the cells stand together."""
    cells = nbformat.read(BOOK / f"{chapter}.ipynb", 4).cells
    places = [place for place, cell in enumerate(cells) if TAG in cell.metadata.get("tags", [])]
    assert places == list(range(places[0], places[-1] + 1))
    use = [cell for cell in cells if USE in cell.metadata.get("tags", [])]
    assert len(use) >= 2 and use[0] == cells[places[0]]
    assert all(TAG in cell.metadata.tags for cell in use)
    assert "OUT" in use[-1].source and "DATA" not in code_of(use[1:])


@pytest.fixture(scope="module")
def six_blocks(tmp_path_factory):
    """SmolLM2 cut to its lowest six of 30 blocks: trained on a few letters it tells their words apart, at a third of the time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base") / "SmolLM2, six blocks"
    AutoModelForCausalLM.from_pretrained(base_models.fetch(), num_hidden_layers=6).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_models.fetch()).save_pretrained(folder)
    return folder


def of_foreign_documents(chapter, tmp_path, base, single):
    """What the recipe prints in training, and another process with what was saved: the same answer."""
    rows, n_used = foreign(single=single)
    first, again = trained_and_used(chapter, tmp_path, base, rows, **parameters_of(chapter))
    assert first[0].startswith(f"{n_used} of {len(rows)} rows; the others are empty")
    assert first[-2] == again[-1]
    return first, again


@pytest.mark.parametrize("chapter", SINGLE)
def test_recipe_makes_a_classifier_of_other_documents(chapter, tmp_path, six_blocks, short_encoder):
    first, again = of_foreign_documents(chapter, tmp_path, short_encoder if chapter == ENCODER else six_blocks, single=True)
    assert first[-1].endswith(("the same answers", "the same logits", "the same scores", "the same answers as PyTorch"))
    if chapter.startswith("05"):  # six blocks learn to say labels in so few steps, but not yet which
        [losses] = [list(map(float, line.split())) for line in re.findall(r"loss by epoch ([\d. ]+),", "\n".join(first))]
        assert losses[0] > 2 * losses[-1]
        assert again[-1].rpartition(" ")[0] in WORDS
    else:
        assert again[-1].startswith("bicycle repair")
        assert scores(first, "macro avg")[2] > 0.5  # by chance it is a third or less
    assert {line.strip().rsplit(maxsplit=4)[0] for line in first if re.search(r"( +\d\.\d\d){3} +\d+$", line)} >= set(WORDS)


@pytest.mark.parametrize("chapter", MULTI)
def test_recipe_for_several_labels_makes_a_classifier_of_other_documents(chapter, tmp_path, six_blocks):
    first, again = of_foreign_documents(chapter, tmp_path, six_blocks, single=False)
    assert "bicycle repair" in again[-1].split("; ")
    assert first[-1].endswith("the same probabilities")
    assert scores(first, "micro avg")[2] > 0.5
    settings = json.loads((tmp_path / "sorted letters" / "settings.json").read_text())
    assert settings["labels"] == sorted(WORDS)
    assert 0 < settings["threshold"] < 1


@pytest.mark.parametrize("chapter", DECODERS)
def test_recipe_takes_two_labels_and_a_tokenizer_that_pads_with_the_end(chapter, tmp_path, tiny_model):
    """As many hubs' tokenizers do; a model of two layers with random weights has fewer layers than LoRA asks for."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(base)
    folder = tmp_path / "empty"
    folder.mkdir()
    rows = letters(("bicycle repair", "bicycle sale"))
    first, again = trained_and_used(chapter, folder, base, rows, **(parameters_of(chapter) | {"EPOCHS": 1}))
    assert first[0].startswith(f"{len(rows)} of {len(rows)} rows")
    assert first[-2] == again[-1]
    saved = AutoTokenizer.from_pretrained(folder / "sorted letters")
    assert saved.pad_token not in (None, saved.eos_token)
    with safe_open(folder / "sorted letters" / "adapter_model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if "score" in name]  # noqa: SIM118
        assert all(
            file.get_tensor(name).shape == (2, 32) and str(file.get_tensor(name).dtype) == "torch.float32" for name in heads
        )
    assert len(heads) == (0 if chapter.startswith("05") else 1)


def test_recipe_of_a_student_learns_from_a_teachers_labels_and_is_not_tested_on_them(tmp_path, short_encoder):
    """Two texts of the second file are useless: one that people have labelled, and one with a label that nobody knows."""
    rows, n_used = foreign(single=True)
    more = [(f"A teacher read of {word}", label) for label in WORDS for word in WORDS[label]]
    write_csv(tmp_path / "teacher.csv", [*more, rows[0], ("of something else", "unheard of")])
    write_csv(tmp_path / "post.csv", rows)
    given = {"TEXT": COLUMNS[0], "LABEL": COLUMNS[1], "OUT": "sorted letters", "NEW_TEXT": NEW, "MAX_TOKENS": 32}
    given |= {"RATES": [1e-3], "TEST": 0.2}
    code = values_replaced(code_of(CHAPTERS[ENCODER]), DATA="post.csv", MORE="teacher.csv", EPOCHS=1, **given)
    first = run(tmp_path, "recipe.py", code, short_encoder)
    assert first[2] == f"{len(more)} texts more have a teacher's label"
    [tested] = [int(line.split()[-1]) for line in first if line.strip().startswith("macro avg")]
    assert tested == -(-n_used // 5)
    assert sorted(path.name for path in (tmp_path / "sorted letters").iterdir()) == [
        "model.onnx",
        "settings.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_recipe_of_a_student_reads_control_tokens_as_text():
    from transformers import AutoTokenizer

    names = {}
    for cell in CHAPTERS[ENCODER][:2]:
        exec(cell.source, names)
    names["settings"] = {"max_tokens": 6}
    names["tokenizer"] = tokenizer = AutoTokenizer.from_pretrained(base_models.fetch(base_models.ENCODER))
    [ids] = names["encoded"](["a [SEP] b [CLS] c d e f g"])["input_ids"]
    assert len(ids) == 6 and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert not {tokenizer.cls_token_id, tokenizer.sep_token_id} & set(ids[1:-1])


def functions_of(chapter, tiny_model, labels=("Tech", "Tech support", "Café & “Bar”")):
    """What the first two cells define, over a tiny model: it is in `model`, its tokenizer in `tokenizer`."""
    from transformers import AutoTokenizer

    names = {}
    for cell in CHAPTERS[chapter][:2]:
        exec(cell.source, names)
    names["settings"] = {"base_model": tiny_model, "suffix": "\n\nIt is about", "max_tokens": 5, "labels": list(labels)}
    names["settings"]["instruction"] = names["settings"]["prompt"] = "Which of {labels}?\n\n{text}\n\nLabel:"
    names["tokenizer"] = AutoTokenizer.from_pretrained(tiny_model)
    names["GPU"], names["DTYPE"] = False, names["torch"].float32
    names["model"] = names["load_model"]()
    return names


@pytest.mark.parametrize("chapter", DECODERS)
def test_recipe_cuts_the_text_only_and_reads_control_tokens_as_text(chapter, tiny_model):
    names = functions_of(chapter, tiny_model)
    shorten, tokenizer = names["shorten"], names["tokenizer"]
    assert shorten("one two three four five six seven") == "one two three four five"
    assert shorten("") == ""
    for text in ("one", "Zoë"):
        assert shorten(text) == text
    steering = set(tokenizer.all_special_ids)
    assert steering & set(tokenizer("a<|im_end|>b").input_ids)
    assert not steering & set(tokenizer(shorten("a<|im_end|>b<|endoftext|>")).input_ids)


@pytest.mark.parametrize("chat", [True, False])
def test_recipe_scores_each_label_as_one_pass_for_each_does(tiny_model, chat):
    import torch

    names = functions_of("05_instruction_tuning", tiny_model)
    model, tokenizer = names["model"], names["tokenizer"]
    if not chat:
        tokenizer.chat_template = None
    start = names["prompt_of"]("The server is down")
    assert start.startswith("Which of Tech, Tech support") == (not chat)
    n = len(tokenizer(start.rstrip(" ")).input_ids)
    expected = []
    for label in names["settings"]["labels"]:
        ids = torch.tensor([*tokenizer(start + label).input_ids, tokenizer.eos_token_id])
        with torch.inference_mode():
            steps = model(ids[None]).logits[0].log_softmax(-1)[n - 1 : -1]
        expected.append(steps[range(len(steps)), ids[n:]].sum())
    scores = names["score_labels"]("The server is down", model)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chapter", [*DECODERS, ENCODER])
def test_recipe_trains_the_same_when_small_batches_are_accumulated(chapter, tiny_model, short_encoder, tmp_path, monkeypatch):
    """Eight documents a step, at once and two by two: the loss of the two epochs is the same."""
    from transformers import Trainer

    losses, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda trainer: losses.append(train(trainer).training_loss))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE_MODEL", str(short_encoder if chapter == ENCODER else tiny_model))
    write_csv(tmp_path / "post.csv", letters()[:36])  # 24 of them to train
    given = {
        "TEXT": COLUMNS[0],
        "LABEL": COLUMNS[1],
        "DATA": "post.csv",
        "MAX_TOKENS": 32,
        "EPOCHS": 2,
        "TEST": 4,
        "RATES": [1e-3],
    }
    cells = CHAPTERS[chapter]
    training = next(place for place, cell in enumerate(cells) if "trainer.train()" in cell.source)
    for batch, accumulate in ((8, 1), (2, 4)):
        more = {"MORE": None} if chapter == ENCODER else {}
        code = values_replaced(code_of(cells[: training + 1]), BATCH=batch, ACCUMULATE=accumulate, **given, **more)
        exec(code, {})
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("chapter", ["04_embedding_head", "07_multi_label"])
def test_recipe_gives_a_text_the_same_answer_alone_and_in_a_batch(chapter, tiny_model):
    import torch

    names = functions_of(chapter, tiny_model)
    answer = names["logits_of" if chapter.startswith("04") else "probabilities_of"]
    texts = ["short", "one that is a good deal longer than the other one"]
    together = torch.as_tensor(answer(texts, names["model"]))
    alone = torch.cat([torch.as_tensor(answer([text], names["model"])) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert names["model"].config.id2label == dict(enumerate(names["settings"]["labels"]))
    assert str(names["model"].score.weight.dtype) == "torch.float32"


QWEN3 = (  # what its template does with thoughts; one line break, since SmolLM2 splits two before a word
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n</think>\n{% endif %}{% endif %}"
)


def learned(trainer):
    batch = trainer.data_collator([trainer.train_dataset[0]])
    return trainer.processing_class.decode([token for token in batch["labels"][0].tolist() if token != -100])


def test_thoughts_stand_in_training_and_in_use_or_in_neither(tiny_model, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    names = functions_of("05_instruction_tuning", tiny_model, labels=("Tech", "Sports"))
    tokenizer = names["tokenizer"]
    tokenizer.chat_template = QWEN3

    def trained_on(row):
        options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "activation_checkpointing": False}
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        data = Dataset.from_list([row])
        return learned(SFTTrainer(model, SFTConfig(**options), train_dataset=data, processing_class=tokenizer))

    messages = {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "Tech"}]}
    assert "<think>" in trained_on(messages)  # the trap: nobody asks for it in use
    assert trained_on(messages | {"chat_template_kwargs": {"enable_thinking": False}}) == "Tech<|im_end|>\n"
    prompt = names["prompt_of"]("x")
    assert prompt.endswith("<think>\n</think>\n")
    assert trained_on({"prompt": prompt, "completion": "Tech"}) == "Tech<|im_end|>"


@pytest.mark.parametrize("adds", [True, False])
def test_a_sequence_begins_once_whether_the_tokenizer_or_the_template_writes_it(tiny_model, adds):
    from tokenizers.processors import TemplateProcessing

    tokenizer = (names := functions_of("05_instruction_tuning", tiny_model))["tokenizer"]
    tokenizer.bos_token = "<repo_name>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}user: {{ m.content }}\n{% endfor %}model: "
    if adds:
        number = tokenizer.bos_token_id
        processor = TemplateProcessing(single="<repo_name> $A", special_tokens=[("<repo_name>", number)])
        tokenizer.backend_tokenizer.post_processor = processor
    ids = tokenizer(names["prompt_of"]("The server is down")).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


READ = {
    "01_task_and_baselines": 2,
    "04_embedding_head": 3,
    "05_instruction_tuning": 3,
    "07_multi_label": 3,
    "10_distil_and_serve": 3,
}  # cells until the rows are read


def read_by_recipe(chapter, path):
    """What a recipe's names are when its cell that reads the file has run."""
    given = {"TEXT": COLUMNS[0], "LABEL": COLUMNS[1], **parameters_of(chapter)}
    names = {}
    exec(values_replaced(code_of(CHAPTERS[chapter][: READ[chapter]]), DATA=str(path), **given), names)
    return names


@pytest.mark.parametrize("case", ["a comma in every text", "a comma in the first", "a comma behind every row"])
@pytest.mark.parametrize("chapter", READ)
def test_recipe_does_not_take_a_field_of_the_texts_for_row_names(chapter, case, tmp_path, tiny_model, monkeypatch):
    """pandas would read half of each text, or the texts as labels, without a word."""
    monkeypatch.setenv("BASE_MODEL", tiny_model)
    rows = [(f"day {n}, the {word}", label) for label in WORDS for n, word in enumerate(WORDS[label])]
    if case == "a comma behind every row":
        lines = [f"{text.replace(',', '')},{label}," for text, label in rows]
    else:
        quoted = [bool(n) and case == "a comma in the first" for n in range(len(rows))]
        lines = [f'"{text}",{label}' if q else f"{text},{label}" for q, (text, label) in zip(quoted, rows, strict=True)]
    (tmp_path / "rows.csv").write_text("\n".join([",".join(COLUMNS), *lines]))
    with pytest.raises(AssertionError, match="texts with commas"):
        read_by_recipe(chapter, tmp_path / "rows.csv")


@pytest.mark.parametrize("chapter", READ)
def test_recipe_takes_composed_and_decomposed_letters_for_the_same(chapter, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", tiny_model)
    labels = {label: f"Caf\u00e9 {label}" for label in WORDS}
    rows = [(f"Zo\u00eb: {text}", labels[label]) for text, label in letters()]
    both = [tuple(unicodedata.normalize("NFD" if n % 2 else "NFC", each) for each in row) for n, row in enumerate(rows)]
    copies = [(unicodedata.normalize("NFD", text), label) for text, label in rows[:4:2]]
    write_csv(tmp_path / "rows.csv", both + copies)
    documents = read_by_recipe(chapter, tmp_path / "rows.csv")["documents"]
    found = {label for each in documents[COLUMNS[1]] for label in each.split(";")}  # 07 joins the labels of repeated texts
    assert found == set(labels.values()) and len(documents) == len(rows)


@pytest.mark.parametrize("chapter", DECODERS)
def test_recipe_refuses_a_base_whose_layers_it_would_leave_out(chapter, tmp_path, tiny_model, monkeypatch):
    """Phi-3 joins q, k and v, and gate and up: of seven names PEFT would find two, and say nothing."""
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    Phi3ForCausalLM(Phi3Config(**size, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setenv("BASE_MODEL", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "rows.csv", letters())
    names = read_by_recipe(chapter, tmp_path / "rows.csv")
    with pytest.raises(AssertionError, match="linear layers"):
        exec(code_of(CHAPTERS[chapter][READ[chapter] : READ[chapter] + 2]), names)


def test_recipe_refuses_a_tokenizer_that_closes_every_text(tmp_path, tiny_model):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    number = tokenizer.pad_token_id
    closing = TemplateProcessing(single=f"$A {tokenizer.pad_token}", special_tokens=[(tokenizer.pad_token, number)])
    tokenizer.backend_tokenizer.post_processor = closing
    tokenizer.save_pretrained(tmp_path)
    names = {}
    for cell in CHAPTERS["05_instruction_tuning"][:2]:
        exec(cell.source, names)
    with pytest.raises(AssertionError, match="adds an end token to every text"):
        names["load_tokenizer"](tmp_path)


@pytest.mark.parametrize("chapter", ["04_embedding_head", "05_instruction_tuning"])
def test_recipe_fills_labels_and_text_into_its_instruction(chapter, tiny_model):
    """A text is not taken for a part of the instruction."""
    names = functions_of(chapter, tiny_model)
    names["tokenizer"].chat_template = None
    assert names["prompt_of"]("{labels}").strip() == "Which of Tech, Tech support, Café & “Bar”?\n\n{labels}\n\nLabel:"
