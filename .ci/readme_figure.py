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
ENCODER = "MiniLM, fine-tuned"
LINES = {  # with the cue and with the instruction, of which a task has one kind
    "head": (("head, random start", "head, instruction"), "o-", 0),
    "tuned language model": (("instruction, bare", "instruction, labels named", "instruction, labels not named"), "D-", 1),
}
TASKS = {
    ("bbc-headlines", 8): "headlines, 8 per class",
    ("bbc-headlines", 32): "headlines, 32 per class",
    ("bbc-headlines", 64): "headlines, 64 per class",
    ("ipc-sections", 32): "patent titles, 32 per class",
    ("attack-techniques", 4): "techniques, 4 per class",
    ("bbc", 32): "articles, 32 per class",
}


def scores() -> pd.DataFrame:
    """Macro-F1 in percent by task, approach and seed: both approaches on a GPU, the small encoder on a CPU."""
    rows, approaches = [], {name for names, *_ in LINES.values() for name in names}
    for file, names in (("fair_gpu", approaches), ("fair", {ENCODER})):
        for record in records.read(ROOT / "book" / "results" / f"{file}.jsonl"):
            key = record["key"]
            if record["name"] in names:
                task = TASKS[key["task"], key["options"]["per_class"]]
                rows.append((task, record["name"], key["seed"], 100 * record["metrics"]["macro_f1"]))
    table = pd.DataFrame(rows, columns=["task", "approach", "seed", "macro_f1"])
    return table.groupby(["task", "approach"]).filter(lambda runs: len(runs) >= 3)


def fingerprint(table: pd.DataFrame) -> str:
    """Of what is drawn."""
    rows = table.round(1).sort_values(["task", "approach", "seed"]).to_numpy().tolist()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def main() -> None:
    """Draw and store."""
    set_style()
    table = scores()
    figure, panels = plt.subplots(2, 3, figsize=(8.4, 5), layout="constrained")
    for panel, task in zip(panels.flat, TASKS.values(), strict=True):
        means = table[table["task"] == task].groupby("approach")["macro_f1"].mean()
        for label, (names, look, color) in LINES.items():
            had = [means[name] for name in names if name in means]
            panel.plot(range(len(had)), had, look, color=sns.color_palette(PALETTE)[color], markersize=7, label=label)
        if ENCODER in means:
            panel.axhline(means[ENCODER], color="0.5", linestyle="--", zorder=1, label="small encoder")
        lowest = min(means[names[0]] for names, *_ in LINES.values()) - 4
        lowest = min(lowest, 78)  # 23 points in every panel, and none above 101
        panel.set(xlim=(-0.4, 1.4), ylim=(lowest, lowest + 23), xticks=(0, 1), xticklabels=("cue", "instruction"))
        panel.set_title(task, fontsize="medium")
    for panel in panels[:, 0]:
        panel.set_ylabel("macro-F1 on test, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), ncols=3, loc="outside upper center", frameon=False)
    sns.despine(figure)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": fingerprint(table)})


if __name__ == "__main__":
    main()
