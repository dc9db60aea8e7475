"""Write the counted and the measured tables of book/on_one_gpu.md anew: python .ci/one_gpu_page.py

A table stands behind a comment, `% table NAME`; `tests/test_one_gpu_page.py` compares every cell with what is counted.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import base_models, profiles  # noqa: E402
from helpers.lab.memory import CARDS, COUNTED_ON, REACHED, UPPER, WAYS, count_step, largest_batches  # noqa: E402
from helpers.records import read  # noqa: E402

PAGE = ROOT / "book" / "on_one_gpu.md"
MODELS = ["Qwen3-0.6B", "Gemma-3-1B", "Llama-3.2-1B", "Qwen3-1.7B", "Llama-3.2-3B", "Gemma-3-4B", "Qwen3-4B"]
MODELS += ["Mistral-7B", "Llama-3.1-8B", "Qwen3-8B"]
GIB = (8, 12, 16, 24, 48, 80)
TIMED = ("T4", "RTX 3090", "RTX 4090", "A100", "H100")
LEAST = 0.13  # seconds of the fastest step that the H200 made, of eight documents: on small models kernels wait to be launched
MEASURED = "upper ten blocks"  # all recipes are in chapter 09


def counted(model: str) -> dict[str, list[str]]:
    """A model's row in each counted table: instruction tuning in NF4 on documents of 512 tokens."""
    options = {"approach": "instruction", "length": 512}
    memory = [COUNTED_ON * gib * 2**30 for gib in GIB]
    fits = [largest_batches(model, memory=memory, recipe=recipe, **options) for recipe in WAYS.values()]
    one = count_step(model, batch_size=1, recipe=UPPER, **options)
    download = 2 * base_models.on_meta(model).num_parameters() / 1e9
    both = [f"{a or '–'} / {b or '–'}" for a, b in zip(*fits, strict=True)]
    rates = [REACHED * 1e12 * CARDS[card]["tera"] / one["operations"] for card in TIMED]
    speeds = [f"{min(rate, 8 / LEAST):.0f}" for rate in rates]
    return {"batches": [model, f"{download:.1f}", f"{one['peak'] / 1e9:.1f}", *both], "speeds": [model, *speeds]}


def measured() -> list[list[str]]:
    """Rows of the table of what an H200 said: bytes and documents per second in the settings of the book's classes."""
    rows = []
    for record in read(ROOT / "book" / "benchmarks" / "h200.jsonl"):
        key, peak = record["key"], record["peak"]
        if key["shape"] in ("Qwen3-0.6B", "Llama-3.1-8B") and key["name"] == MEASURED:
            ratio = record["counted"]["peak"] / peak
            figures = [f"{peak / 1e9:.1f}", f"{ratio:.2f}", f"{record['documents_per_second']:.0f}"]
            rows.append([key["shape"], key["approach"], *figures])
    return sorted(rows)


def table(heading: list[str], rows: list[list[str]], words: int = 1) -> str:
    """In Markdown; as many columns at the left as `words` says are of words, the others are of numbers."""
    lines = [heading, ["---"] * words + ["---:"] * (len(heading) - words), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def tables() -> dict[str, str]:
    """All of them, by name."""
    rows = {model: counted(model) for model in MODELS}
    sizes = [*map(str, GIB)]
    return {
        "batches": table(["model", "fetch", "one", *sizes], [rows[model]["batches"] for model in MODELS]),
        "speeds": table(["model", *TIMED], [rows[model]["speeds"] for model in MODELS]),
        "measured": table(["model", "approach", "GB", "counted", "docs / s"], measured(), words=2),
    }


def main() -> None:
    """Put them into the page."""
    profiles.quiet()
    found = tables()
    page = PAGE.read_text(encoding="utf-8")
    for name, made in found.items():
        page, n = re.subn(rf"(?<=^% table {name}\n\n)(\|.*\n)+", lambda _, made=made: made, page, flags=re.M)
        assert n == 1, name
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
