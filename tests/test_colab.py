"""The set-up cell on Colab, against what Colab has (`colab_packages.txt`: googlecolab/backend-info of 2026-08-19).

Python 3.13 and torch 2.11 are there, and a kernel that has imported numpy before the first cell: what hangs on it must not be
replaced. What is replaced may be loaded only if the reader has run another cell before (pandas loads pyarrow): that is said.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import BOOK
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHON = {"python_version": "3.13", "python_full_version": "3.13.15", "sys_platform": "linux", "platform_system": "Linux"}
# What diffusers 0.39, gradio 6.24 and sentence-transformers 5.7, which are there, ask of what is replaced.
ASKED = ["huggingface-hub<2.0,>=1.16.0", "transformers<6.0.0,>=4.41.0", "tokenizers>=0.19"]
HELD = {"numpy", "pandas", "torch", "matplotlib", "ipykernel", "ipython", "scipy", "scikit-learn", "pillow", "requests"}


def versions(lines):
    return {canonicalize_name(name): version for name, _, version in (line.strip().partition("==") for line in lines) if version}


COLAB = versions((BOOK.parent / "tests" / "colab_packages.txt").read_text().splitlines()) | {"torch": "2.11.0"}


def installed(chapter):
    """What a chapter's cell installs, by its own commands: name and version."""
    cell = nbformat.read(BOOK / f"{chapter}.ipynb", 4).cells[1].source
    commands = [
        line.strip().removeprefix("!").replace("colab.txt", "/dev/stdout") for line in cell.splitlines() if "> colab" in line
    ]
    assert commands and "--requirement colab.txt" in cell
    said = subprocess.run("; ".join(commands), shell=True, cwd=BOOK, capture_output=True, text=True, check=True).stdout
    return versions(line for line in said.splitlines() if not line.startswith("#"))


def settled(pins):
    """All that pip installs for these pins on Colab: themselves, and what is not there or too old."""
    new, todo = dict(pins), list(pins)
    while todo:
        for needed in map(Requirement, importlib.metadata.requires(todo.pop()) or []):
            name = canonicalize_name(needed.name)
            if needed.marker and not needed.marker.evaluate(PYTHON | {"extra": ""}):
                continue
            there = new.get(name) or COLAB.get(name)
            if there is None or not needed.specifier.contains(there, prereleases=True):
                assert name not in pins, f"{name}: {needed} does not agree with the pin"
                new[name] = importlib.metadata.version(name)
                todo.append(name)
    return new


@pytest.mark.parametrize("chapter", [path.stem for path in sorted(BOOK.glob("*.ipynb"))])
def test_what_the_kernel_holds_is_not_replaced_and_the_rest_agrees(chapter):
    new = settled(installed(chapter))
    assert {"transformers", "peft", "trl", "bitsandbytes", "datasets", "gguf", "tokenizers"} <= new.keys()
    assert not HELD & new.keys()
    asked = [Requirement(each) for each in ASKED]
    assert [str(each) for each in asked if not each.specifier.contains(new[each.name])] == []  # else pip says so in red
    assert ("onnx" in new) == (chapter == "10_distil_and_serve")


@pytest.mark.parametrize("loaded, now, said", [("18.1.0", "26.0.1", True), ("26.0.1", "26.0.1", False)])
def test_what_was_loaded_before_it_was_replaced_is_named_and_what_to_do(tmp_path, loaded, now, said):
    for name, version in (("pyarrow", loaded), ("datasets", "5.2.0")):
        (tmp_path / f"{name}.py").write_text(f"__version__ = '{version}'\n")
    for name, version in (("pyarrow", now), ("datasets", "5.2.0")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    variables = {"PYTHONPATH": str(tmp_path), "COLAB_RELEASE_TAG": "x"}
    code = "import pyarrow, datasets, helpers"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=BOOK.parent, env=os.environ | variables, capture_output=True, text=True
    )
    last = made.stderr.strip().splitlines()[-1:]
    assert (made.returncode == 1 and "older pyarrow before" in last[0] and "Restart session" in last[0]) if said else last == []


def test_all_that_may_be_loaded_before_it_is_replaced_is_looked_at():
    replaced = {name for name in settled(installed("00_quickstart")) if name in COLAB}
    seen = re.search(r"replaced = (\{.*?\})", (BOOK.parent / "helpers" / "__init__.py").read_text()).group(1)
    assert {canonicalize_name(name) for name in ast.literal_eval(seen)} == replaced


def test_a_session_that_was_restarted_goes_on_in_the_folder_that_is_there(tmp_path):
    """The set-up cell's lines as IPython runs them, with git and pip that only say what they were asked."""
    for name in ("git", "pip"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} $1 >> {tmp_path}/asked\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "book-repo").symlink_to(BOOK.parent)
    cell = nbformat.read(BOOK / "00_quickstart.ipynb", 4).cells[1].source.replace("> colab.txt", f"> {tmp_path}/colab.txt")
    (tmp_path / "cell.ipy").write_text(cell)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COLAB_RELEASE_TAG": "x", "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-m", "IPython", str(tmp_path / "cell.ipy")]
    options = dict(cwd=tmp_path / "content", env=os.environ | variables, capture_output=True, text=True)
    made = subprocess.run(command, **options)
    assert made.returncode == 0 and "Wall time" in made.stdout, made.stderr + made.stdout
    assert (tmp_path / "asked").read_text().split("\n")[:-1] == ["pip install"]
    (tmp_path / "content" / "book-repo").unlink()
    subprocess.run(command, **options)  # nothing is there, and this git brings nothing either
    assert (tmp_path / "asked").read_text().startswith("pip install\ngit clone\n")


def test_every_module_that_helpers_import_is_on_colab_afterwards():
    there = COLAB.keys() | settled(installed("00_quickstart")).keys()
    roots = importlib.metadata.packages_distributions()
    for path in (BOOK.parent / "helpers").rglob("*.py"):
        for module in re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M):
            if module not in ("helpers", *sys.stdlib_module_names):
                assert {canonicalize_name(each) for each in roots[module]} & there, (path.name, module)


@pytest.mark.parametrize("on_colab", [True, False])
def test_an_old_torchao_stops_adapters_on_colab_no_more(tmp_path, on_colab):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("")
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    (tmp_path / "torchao-0.10.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    code = "import helpers, torch, peft; model = torch.nn.Sequential(torch.nn.Linear(4, 4)); "
    code += "print(type(peft.get_peft_model(model, peft.LoraConfig(target_modules=['0']))).__name__)"
    variables = {"PYTHONPATH": str(tmp_path)} | ({"COLAB_RELEASE_TAG": "x"} if on_colab else {})
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=BOOK.parent, env=os.environ | variables, capture_output=True, text=True
    )
    assert made.stdout.strip() == ("PeftModel" if on_colab else ""), made.stderr[-500:]
    assert on_colab or "incompatible version of torchao" in made.stderr  # else this file is not needed any more
