"""Record what head, head + LoRA and all weights give on the same articles.

    python book/scripts/full_fine_tuning.py

`FullFineTuning` is the class in chapter `03_lora`: its cells tagged `recorded`
are run here. Recorded runs are not made again.
"""

import os
import sys
from pathlib import Path

import nbformat

BOOK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(BOOK.parent))
os.chdir(BOOK)

from helpers import runs  # noqa: E402

RECORDS = "results/full_fine_tuning.jsonl"
SWEEP = {
    "tasks": [{"bbc": {"per_class": 16, "n_test": 200, "words": 32}}],
    "seeds": [0],
    "approaches": [
        {"FrozenProbe": {"name": "head only"}},
        {
            "EmbeddingHead": {
                "name": "head + LoRA",
                "learning_rate": 3e-4,
                "epochs": 1,
            }
        },
        {"FullFineTuning": {"name": "all weights", "learning_rate": 1e-4}},
    ],
}


def main() -> None:
    """Make the runs that are not recorded yet."""
    names = {"__name__": "chapter"}
    for cell in nbformat.read("03_lora.ipynb", as_version=4).cells:
        if "recorded" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    runs.APPROACHES["FullFineTuning"] = names["FullFineTuning"]
    failed = runs.make(runs.keys(SWEEP), RECORDS)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
