"""Nothing drifts: libraries are called as their pinned versions want it; versions and numbers agree wherever they stand."""

import ast
import importlib
import inspect
import json
import re
import textwrap
import warnings
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "sklearn")
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))
SCRIPTS = sorted([*(ROOT / "book" / "scripts").glob("*.py"), *(ROOT / "helpers").glob("*.py")])
PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)

# Names that these libraries once took. Looked for in every call: a function that takes any keyword says nothing about them.
GONE = {
    "torch_dtype": "dtype",
    "load_in_4bit": "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "load_in_8bit": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "use_auth_token": "token",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "num_logits_to_keep": "logits_to_keep",
    "pad_to_max_length": "padding",
}
GONE_METHODS = {
    "gradient_checkpointing_enable": "activation_checkpointing_enable",
    "prepare_model_for_int8_training": "get_peft_model alone",
    "encode_plus": "the tokenizer itself",
    "batch_encode_plus": "the tokenizer itself",
    "as_target_tokenizer": "text_target=",
}


def code_of(path):
    """(where, code) of each program in a file: the cells without magic, or the snippets of a page, one by one."""
    if path.suffix == ".py":
        return [(path.name, path.read_text(encoding="utf-8"))]
    if path.suffix == ".md":
        found = re.findall(r"^( *)```python\n(.*?)^ *```$", path.read_text(encoding="utf-8"), re.M | re.S)
        return [(f"{path.name}, snippet {number}", textwrap.dedent(code)) for number, (_, code) in enumerate(found)]
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    plain = [re.sub(r"^( *)[!%].*$", r"\1pass", source, flags=re.M) for source in cells]
    return [(path.name, "\n\n".join(plain))]


class Names(ast.NodeVisitor):
    """What is imported from the libraries, by the name it has in the program; and every call."""

    def __init__(self, anything=False):
        self.known, self.missing, self.calls, self.anything = {}, [], [], anything

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] in LIBRARIES:
                module = importlib.import_module(alias.name)
                top = importlib.import_module(alias.name.split(".")[0])
                self.known[alias.asname or alias.name.split(".")[0]] = module if alias.asname else top

    def visit_ImportFrom(self, node):
        if node.module and not node.level and node.module.split(".")[0] in LIBRARIES:
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    self.known[alias.asname or alias.name] = getattr(module, alias.name)
                except AttributeError:
                    try:
                        self.known[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        self.missing.append(f"{node.module} has no {alias.name}")

    def visit_Call(self, node):
        self.calls.append(node)
        self.generic_visit(node)

    def resolve(self, node):
        """The function, class or method that an expression names, if it is one of the libraries'; else None."""
        if isinstance(node, ast.Name):
            if node.id in self.known:
                return self.known[node.id]
            if self.anything and node.id[0].isupper():  # a snippet leaves the imports out
                found = (getattr(importlib.import_module(library), node.id, None) for library in LIBRARIES)
                return next((each for each in found if each is not None), None)
            if node.id == "tokenizer":
                from transformers import PreTrainedTokenizerBase

                return PreTrainedTokenizerBase.__call__
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "tokenizer" and "tokenizer" not in self.known:
                from transformers import PreTrainedTokenizerBase

                return getattr(PreTrainedTokenizerBase, node.attr, None)
            if node.attr == "tokenizer":
                return self.resolve(ast.Name("tokenizer"))
            above = self.resolve(node.value)
            if above is not None and (inspect.ismodule(above) or inspect.isclass(above)):
                return getattr(above, node.attr, None)
        return None


def loading_options():
    """What `from_pretrained` of a model takes: arguments, what its source takes out of `kwargs`, and settings of the model."""
    from transformers import LlamaConfig, PreTrainedModel

    function = PreTrainedModel.from_pretrained
    names = set(inspect.signature(function).parameters) | {"attn_implementation", "trust_remote_code", "problem_type"}
    names |= set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', inspect.getsource(function)))
    settings = LlamaConfig(pad_token_id=0)
    return (names | {name for name in dir(settings) if not name.startswith("_")}) - set(GONE)


def generation_options():
    from transformers import GenerationConfig, GenerationMixin

    names = set(inspect.signature(GenerationMixin.generate).parameters) | set(GenerationConfig().to_dict())
    return names | {"input_ids", "attention_mask", "past_key_values"}


def deprecated(cls):
    """Fields of a dataclass of settings that say they are."""
    return {each.name for each in fields(cls) if str(each.metadata.get("help", "")).startswith("Deprecated")}


def literal(node):
    try:
        return True, ast.literal_eval(node)
    except ValueError:
        return False, None


def made_without_a_warning(cls, node):
    """A class of settings is made of those arguments that stand there as they are; what it says to them."""
    pairs = [(keyword.arg, *literal(keyword.value)) for keyword in node.keywords if keyword.arg]
    given = {name: value for name, plain, value in pairs if plain and name not in ("output_dir", "bf16", "use_cpu")}
    if "output_dir" in inspect.signature(cls).parameters:
        given |= {"output_dir": "unused", "use_cpu": True, "bf16": False}
        given |= {"save_strategy": given["eval_strategy"]} if given.get("load_best_model_at_end") else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            cls(**given)
        except TypeError:  # an argument that it does not have, or one that is no literal and is missing here
            return []
        except ValueError as error:
            return [str(error)]
    messages = [str(each.message) for each in said if issubclass(each.category, (FutureWarning, DeprecationWarning))]
    return [each for each in messages if any(name in each for name in given)]  # TRL itself sets an old name


def faults_of_call(node, names):
    called = ast.unparse(node.func)
    target = names.resolve(node.func)
    given = [keyword.arg for keyword in node.keywords if keyword.arg]
    if isinstance(node.func, ast.Attribute) and node.func.attr in GONE_METHODS:
        yield f"{called} is now {GONE_METHODS[node.func.attr]}"
    own = set()
    if target is not None and callable(target):
        parameters = inspect.signature(target).parameters
        own = {name for name, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
        open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        is_settings = inspect.isclass(target) and (is_dataclass(target) or target.__name__.endswith("Config"))
        loads = getattr(target, "__name__", "") == "from_pretrained" and "Model" in called
        allowed = own | loading_options() if loads else own
        if not open_ended or is_settings or loads:
            yield from (f"{called} takes no {name}=" for name in given if name not in allowed)
        places = [each for each in parameters.values() if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        unbound = inspect.isfunction(target) and next(iter(parameters), "") == "self"
        unlimited = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
        unknown = unlimited or (open_ended and not places) or any(isinstance(each, ast.Starred) for each in node.args)
        if not unknown and len(node.args) > len(places) - unbound:
            yield f"{called} takes {len(places) - unbound} arguments by place, not {len(node.args)}"
        if inspect.isclass(target) and is_dataclass(target):
            yield from (f"{called}: {name} is deprecated" for name in given if name in deprecated(target))
            if target.__name__.endswith(("Config", "Arguments")):
                yield from (f"{called}: {said}" for said in made_without_a_warning(target, node))
    elif isinstance(node.func, ast.Attribute) and node.func.attr == "generate" and isinstance(node.func.value, ast.Name):
        yield from (f"{called} takes no {name}=" for name in given if name not in generation_options())
    of_settings = target is not None and getattr(target, "__name__", "") == "BitsAndBytesConfig"
    if target is not None or isinstance(node.func, ast.Attribute):
        for name in given:
            if name in GONE and not (of_settings and name.startswith("load_in_")):
                yield f"{called}: {name}= is now {GONE[name]}"


def faults(code, anything=False):
    """(line, what is wrong) for every import and call of the libraries in a program; and how many calls were checked."""
    tree = ast.parse(code)
    names = Names(anything)
    names.visit(tree)
    found = [f"line {node.lineno}: {fault}" for node in names.calls for fault in faults_of_call(node, names)]
    resolved = sum(callable(names.resolve(node.func)) for node in names.calls)
    return names.missing + found, resolved


@pytest.mark.parametrize("path", [*CHAPTERS, *PAGES, *SCRIPTS], ids=lambda path: path.name)
def test_libraries_are_called_as_the_pinned_versions_want_it(path):
    for where, code in code_of(path):
        assert faults(code, anything=path.suffix == ".md")[0] == [], where


def test_calls_are_found():
    """At least so many, or the tests above look at nothing."""
    checked = {path.name: sum(faults(code, path.suffix == ".md")[1] for _, code in code_of(path)) for path in [*CHAPTERS, *PAGES]}
    assert checked["04_embedding_head.ipynb"] > 30
    assert checked["pitfalls.md"] > 10
    assert sum(checked.values()) > 150


WRONG = {
    "AutoModelForCausalLM.from_pretrained('m', torch_dtype='auto')": "torch_dtype",
    "AutoModelForSequenceClassification.from_pretrained('m', load_in_4bit=True)": "load_in_4bit",
    "AutoModelForSequenceClassification.from_pretrained('m', number_of_labels=3)": "number_of_labels",
    "AutoTokenizer.from_pretrained('m', use_auth_token=True)": "use_auth_token",
    "TrainingArguments('out', evaluation_strategy='epoch')": "evaluation_strategy",
    "TrainingArguments('out', gradient_checkpointing=True)": "gradient_checkpointing",
    "TrainingArguments('out', warmup_ratio=0.1)": "warmup_ratio",
    "Trainer(model, arguments, tokenizer=tokenizer)": "tokenizer",
    "SFTTrainer(model, arguments, tokenizer=tokenizer)": "tokenizer",
    "SFTTrainer(model, arguments, max_seq_length=512)": "max_seq_length",
    "SFTConfig('out', max_seq_length=512)": "max_seq_length",
    "SFTConfig('out', loss_type='chunked_nll')": "chunked_nll",
    "SFTConfig('out', pad_token='<pad>')": "pad_token",
    "LoraConfig(rank=8)": "rank",
    "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quantisation='nf4')": "bnb_4bit_quantisation",
    "get_peft_model(model, lora, dtype=None)": "dtype",
    "model.gradient_checkpointing_enable()": "activation_checkpointing_enable",
    "tokenizer('text', pad_to_max_length=True)": "pad_to_max_length",
    "model.generate(ids, max_tokens=5)": "max_tokens",
    "Dataset.from_dict({}, columns=[])": "columns",
    "LinearSVC(seed=0)": "seed",
}
IMPORTS = """
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.svm import LinearSVC
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
"""


IN_SNIPPETS = [call for call in WRONG if not call.startswith(("LinearSVC", "get_peft_model"))]  # classes at the top of a library


@pytest.mark.parametrize(("call", "anything"), [*((call, False) for call in WRONG), *((call, True) for call in IN_SNIPPETS)])
def test_a_call_as_old_tutorials_have_it_is_found(call, anything):
    found, _ = faults(("" if anything else IMPORTS) + call, anything)
    assert any(WRONG[call] in fault for fault in found), found


def test_an_import_of_what_is_no_longer_there_is_found():
    found, _ = faults("from transformers import AdamW, AutoTokenizer\nfrom trl import DataCollatorForCompletionOnlyLM")
    assert found == ["transformers has no AdamW", "trl has no DataCollatorForCompletionOnlyLM"]


RIGHT = """
model = AutoModelForCausalLM.from_pretrained("m", dtype="auto", device_map="cuda", num_hidden_layers=2, pad_token_id=0)
tokenizer = AutoTokenizer.from_pretrained("m", padding_side="left")
tokenizer(["a"], padding=True, padding_side="left", return_tensors="pt")
BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
SFTTrainer(model, SFTConfig("out", max_length=None, warmup_steps=0.1), processing_class=tokenizer, peft_config=LoraConfig(r=8))
model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
"""


def test_right_calls_are_not_found():
    found, resolved = faults(IMPORTS + RIGHT)
    assert found == [] and resolved == 7


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
    "ray": "ray",
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
    modules = {path.name for path in (ROOT / "helpers").glob("*.py")} - {"__init__.py", "errors.py"}
    assert set(re.findall(r"`(\w+\.py)`", readme)) >= modules
