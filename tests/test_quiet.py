"""What bitsandbytes says of an optional package stands in no terminal and on no page. (Recipes: `test_recipes.run`.)"""

import subprocess
import sys

import nbformat
import pytest
from conftest import BOOK

SILENCED = 'logging.getLogger("bitsandbytes").setLevel(logging.ERROR)'
# On CPUs with AVX512-BF16 bitsandbytes speaks when it is imported, on others never: there this passes by itself.
FORWARD = """
import helpers
import peft
import torch
from bitsandbytes.nn import Linear4bit

layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
assert layer.to("cpu")(torch.ones(2, 64)).shape == (2, 64)
"""


def cells(chapter):
    return [cell for cell in nbformat.read(BOOK / f"{chapter}.ipynb", 4).cells if cell.cell_type == "code"]


def test_a_forward_pass_in_4_bits_says_nothing():
    result = subprocess.run([sys.executable, "-c", FORWARD], cwd=BOOK.parent, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("path", sorted(BOOK.glob("*.ipynb")), ids=lambda path: path.stem)
def test_helpers_come_first_in_every_chapter(path):
    first, *others = cells(path.stem)
    assert first.source.splitlines()[-1].startswith("import helpers ")
    assert "peft" not in first.source
    for cell in others:  # a recipe goes without helpers
        if "recipe" in cell.metadata.get("tags", []) and "from peft" in cell.source:
            assert SILENCED in cell.source.partition("from peft")[0]


def test_the_script_for_training_silences_it_first():
    source = (BOOK / "scripts" / "train.py").read_text(encoding="utf-8")
    assert SILENCED in source.partition("import torch")[0]
