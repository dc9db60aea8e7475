"""The house stays small, and its rooms keep to their doors."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READER, LAB = sorted((ROOT / "helpers").glob("*.py")), sorted((ROOT / "helpers" / "lab").glob("*.py"))
FIRST_SITTING = [ROOT / "helpers" / f"{name}.py" for name in ("tasks", "approach", "embedding_head", "instruction", "evaluation")]
DOORS = {"compare", "predict"}  # commands that readers know by these names
every_module = pytest.mark.parametrize("path", READER + LAB, ids=lambda path: f"{path.parent.name}/{path.stem}")


# Where they stand. The goal is 2,100 for what readers read and 1,400 for the lab: lower them when a room gets smaller.
BUDGETS = {"first sitting": (FIRST_SITTING, 836), "reader": (READER, 2724), "lab": (LAB, 2713)}


@pytest.mark.parametrize("paths, most", BUDGETS.values(), ids=BUDGETS.keys())
def test_line_budgets(paths, most):
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= most


def code_of(path):
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


CHAPTERS = sorted((ROOT / "book").glob("0[0-5]_*.ipynb"))


@pytest.mark.parametrize("path", [path for path in READER if path.stem not in DOORS] + CHAPTERS, ids=lambda path: path.stem)
def test_what_readers_read_does_not_need_the_lab(path):
    code = code_of(path).replace("use helpers.lab.approaches", "")
    assert not re.search(r"helpers\.lab\b|from helpers import .*\blab\b", re.sub(r"`[^`]*`", "", code))


def private(name):
    return name.startswith("_") and not name.startswith("__")


def defined_in(tree):
    """Names of functions, classes, methods and attributes of self that a module makes."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            made.add(node.id if isinstance(node, ast.Name) else node.attr)
    return made


@every_module
def test_nobody_uses_the_private_names_of_another_module(path):
    tree = ast.parse(code_of(path))
    made_here = defined_in(tree)
    made_elsewhere = set().union(*(defined_in(ast.parse(code_of(other))) for other in READER + LAB if other != path))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
            assert not [each.name for each in node.names if private(each.name)]
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr in made_elsewhere - made_here:
            its_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "approach")
            inherited = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            assert its_own or inherited, f"line {node.lineno}: {ast.unparse(node)}"


@every_module
def test_public_functions_and_classes_have_docstrings(path):
    tree = ast.parse(code_of(path))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not private(node.name):
            assert ast.get_docstring(node), node.name
