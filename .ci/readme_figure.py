"""Draw the README's figure from the records of chapter 06: python .ci/readme_figure.py

The picture carries a fingerprint of what it was drawn from, which a test compares with the records.
"""

import hashlib
import json
import sys
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import records  # noqa: E402
from helpers.plots import PALETTE, set_style  # noqa: E402

PICTURE = ROOT / "book" / "_static" / "answer.png"
HEAD, TOLD, INSTRUCTION = "head, random start", "head, instruction", "instruction, labels named"
SHOWN = {
    "TF-IDF + linear SVM": ("s", "0.55", "TF-IDF + SVM"),
    "MiniLM, fine-tuned": ("^", "0.2", "MiniLM, fine-tuned"),
    HEAD: ("o", sns.color_palette(PALETTE)[0], "head, cue"),
    TOLD: ("o", sns.color_palette(PALETTE)[0], "head, instruction"),
    INSTRUCTION: ("D", sns.color_palette(PALETTE)[1], "instruction tuning"),
}  # the head that reads the instruction is hollow
TASKS = {  # those of which all five are recorded
    ("bbc-headlines", 8): "headlines,\n8 per class",
    ("bbc-headlines", 32): "headlines,\n32 per class",
}


def scores() -> pd.DataFrame:
    """Macro-F1 in percent by task, approach and seed (quick profile)."""
    rows = []
    for record in records.read(ROOT / "book" / "results" / "fair.jsonl"):
        key = record["key"]
        task = TASKS.get((key["task"], key["options"]["per_class"]))
        if task and record["name"] in SHOWN and key["profile"] == "quick":
            rows.append((task, record["name"], key["seed"], 100 * record["metrics"]["macro_f1"]))
    table = pd.DataFrame(rows, columns=["task", "approach", "seed", "macro_f1"])
    methods = table.groupby(["task", "seed"])["approach"].transform("nunique")
    return table[methods == len(SHOWN)]  # the seeds that all of them have


def fingerprint(table: pd.DataFrame) -> str:
    """Of what is drawn."""
    rows = table.round(1).sort_values(["task", "approach", "seed"]).to_numpy().tolist()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def main() -> None:
    """Draw and store."""
    set_style()
    table = scores()
    figure, axes = plt.subplots(figsize=(8, 1.5 + 1.3 * len(TASKS)), layout="constrained")
    for row, task in enumerate(TASKS.values()):
        for place, (name, (marker, color, label)) in enumerate(SHOWN.items()):
            found = table.loc[(table["task"] == task) & (table["approach"] == name), "macro_f1"]
            height = row - 0.32 + 0.16 * place
            fill = "white" if name == TOLD else color
            axes.plot([found.min(), found.max()], [height] * 2, color=color, linewidth=2, zorder=1)
            axes.plot(found.mean(), height, marker, color=color, mfc=fill, markersize=9, label=None if row else label)
    axes.set(yticks=range(len(TASKS)), yticklabels=TASKS.values(), ylim=(len(TASKS) - 0.5, -0.5))
    axes.set_xlabel("macro-F1 on test documents, %: mean and range over the seeds")
    axes.grid(axis="y", visible=False)
    figure.legend(ncols=3, loc="outside upper center", frameon=False, columnspacing=1.2, handletextpad=0.2)
    sns.despine(figure, left=True)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": fingerprint(table)})


if __name__ == "__main__":
    main()
