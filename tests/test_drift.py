"""Nothing drifts: libraries are called as their pinned versions want it; versions and numbers agree wherever they stand.

What runs is checked by running it: in chapters a FutureWarning of a library is an error (`book/conftest.py`), in the tests of
`helpers` too (`pytest.ini`). What does not run is checked by name here.
"""

import ast
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))
SCRIPTS = sorted([*(ROOT / "book" / "scripts").glob("*.py"), *(ROOT / "helpers").rglob("*.py")])
PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)

# What the pages' snippets use of the libraries, and the keywords that they give.
SNIPPETS = {
    "bitsandbytes.nn:Linear4bit": "",
    "datasets:Dataset.from_dict": "",
    "peft:LoraConfig": "task_type target_modules r lora_alpha",
    "peft:PeftModel.from_pretrained": "",
    "peft:get_peft_model": "",
    "transformers:AutoModelForSequenceClassification.from_pretrained": "num_labels pad_token_id dtype",
    "transformers:AutoModelForCausalLM.from_pretrained": "dtype",
    "transformers:AutoTokenizer.from_pretrained": "",
    "transformers:Gemma3ForCausalLM": "",
    "transformers:BitsAndBytesConfig": "load_in_4bit llm_int8_skip_modules",
    "transformers:DataCollatorWithPadding": "",
    "transformers:Trainer": "train_dataset eval_dataset data_collator",
    "transformers:TrainingArguments": "activation_checkpointing activation_checkpointing_kwargs eval_strategy save_strategy "
    "load_best_model_at_end average_tokens_across_devices learning_rate num_train_epochs bf16",
    "trl:SFTConfig": "max_length eval_strategy activation_checkpointing learning_rate num_train_epochs bf16 save_strategy",
    "trl:SFTTrainer": "train_dataset eval_dataset processing_class compute_metrics preprocess_logits_for_metrics peft_config",
    "helpers.lab.approaches:InstructionTuned": "epochs verbalizer",
}
GIVEN_ON = {"num_labels", "pad_token_id", "dtype"}  # `from_pretrained` takes any keyword and hands it on
# Names of older versions that raise no warning, or not everywhere. They stand in no program of this book.
GONE = (
    r"torch_dtype|use_auth_token|evaluation_strategy|max_seq_length|no_cuda|warmup_ratio|gradient_checkpointing(?:_kwargs)?"
    r"|num_logits_to_keep|pad_to_max_length"
)
GONE_METHODS = r"gradient_checkpointing_enable|prepare_model_for_int8_training|(?:batch_)?encode_plus|as_target_tokenizer"


def snippets(path):
    found = re.findall(r"^( *)```python\n(.*?)^ *```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return [textwrap.dedent(code) for _, code in found]


def programs(path):
    """The code in a file: all of it, the cells of a chapter, or the snippets of a page."""
    if path.suffix == ".ipynb":
        return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    return "\n".join(snippets(path)) if path.suffix == ".md" else path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SNIPPETS)
def test_what_snippets_name_is_there(name):
    module, _, path = name.partition(":")
    found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    assert set(SNIPPETS[name].split()) - set(inspect.signature(found).parameters) <= GIVEN_ON


@pytest.mark.parametrize("path", [path for path in PAGES if snippets(path)], ids=lambda path: path.name)
def test_the_list_has_what_snippets_call(path):
    """Every class with its keywords; functions of the reader's own begin with a small letter."""
    known = {name.partition(":")[2]: set(words.split()) for name, words in SNIPPETS.items()}
    calls = [node for code in snippets(path) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    for node in calls:
        called = ast.unparse(node.func)
        if re.fullmatch(r"[A-Z]\w+(\.\w+)?", called):
            assert {keyword.arg for keyword in node.keywords} <= known[called], called


@pytest.mark.parametrize("path", [*CHAPTERS, *PAGES, *SCRIPTS], ids=lambda path: path.name)
def test_no_name_of_an_older_version_is_used(path):
    assert re.findall(rf"\b(?:{GONE})=[^=].*|\.(?:{GONE_METHODS})\(.*", programs(path)) == []


def test_a_chapter_fails_where_a_library_warns_of_the_future(tmp_path):
    """The filters of `book/conftest.py` arrive in the kernel."""
    (tmp_path / "conftest.py").write_text((ROOT / "book" / "conftest.py").read_text())
    warns = "import warnings\nwarnings.warn('{}', {})"
    known = "`is_gradient_checkpointing` is deprecated, as PEFT says"
    cells = [
        warns.format(known, "FutureWarning"),
        warns.format("old", "FutureWarning"),
        warns.format("old", "DeprecationWarning"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells))), tmp_path / "chapter.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "-p", "no:cacheprovider", "-rA", "chapter.ipynb"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert [said.count(f"{word} chapter.ipynb::Cell") for word in ("PASSED", "FAILED")] == [1, 2], said


# Versions and numbers


def texts():
    """(where, text) of what readers read: README, pages, and the Markdown and code of chapters."""
    for path in [ROOT / "README.md", *PAGES]:
        yield path.name, path.read_text(encoding="utf-8")
    for path in CHAPTERS:
        yield path.name, "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    for path in SCRIPTS:
        yield path.name, path.read_text(encoding="utf-8")


PROJECTS = {
    "transformers": "transformers",
    "trl": "trl",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "scikit-learn": "scikit-learn",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "pytorch": "torch",
    "onnxruntime": "onnxruntime",
}
NAMED = re.compile(rf"\b({'|'.join(PROJECTS)})`? v?(\d+(?:\.\d+)*)\b(?! ?(?:%|MB|GB|kB|x|times|s\b|to\b))", re.I)


def test_versions_in_the_text_are_the_pinned_ones():
    wrong, n_found = [], 0
    for where, text in texts():
        for project, named in NAMED.findall(text):
            pinned = PINS[PROJECTS[project.lower()]]
            n_found += 1
            if not f"{pinned}.".startswith(f"{named}."):
                wrong.append(f"{where}: {project} {named}, pinned is {pinned}")
    assert wrong == []
    assert n_found >= 3


def test_python_is_the_same_everywhere():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job.get("steps", [])]
    tested = {step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")}
    [python] = tested
    assert re.findall(r"Python (\d+\.\d+)", (ROOT / "README.md").read_text()) == [python]
    assert f'target-version = "py{python.replace(".", "")}"' in (ROOT / "ruff.toml").read_text()
    for path in CHAPTERS:
        stored = json.loads(path.read_text(encoding="utf-8"))["metadata"]["language_info"]["version"]
        assert stored.rsplit(".", 1)[0] == python, path.name


def test_every_pin_is_what_is_installed():
    assert {name: version(name).split("+")[0] for name in PINS} == PINS


def test_licence_and_title_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    readme = (ROOT / "README.md").read_text()
    assert citation["title"] == config["title"] == readme.splitlines()[0].removeprefix("# ")
    assert citation["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    assert "Apache-2.0" in config["copyright"] and "Apache-2.0 (`LICENSE`)" in readme
    paper = citation["references"][0]["url"].rsplit("/", 1)[1]
    assert paper in readme


def test_readme_lists_every_chapter_and_module():
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^\| \[`(\w+)`\]\(book/\1\.ipynb\)", readme, re.M) == [path.stem for path in CHAPTERS]
    rooms = readme.split("| room |")[1].split("##")[0]
    modules = {path.stem for path in (ROOT / "helpers").rglob("*.py")} - {"__init__"}
    assert set(re.findall(r"`(?:python -m helpers\.)?(\w+)`", rooms)) >= modules
    assert len(re.findall(r"^\| `", rooms, re.M)) <= 12
