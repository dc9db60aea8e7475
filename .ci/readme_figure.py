"""Draw the README's figure from the records: python .ci/readme_figure.py

The picture carries a fingerprint of what it was drawn from, which a test compares with the records.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from sklearn.metrics import f1_score

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import records  # noqa: E402
from helpers.embedding_head import EmbeddingHead  # noqa: E402
from helpers.instruction import InstructionTuned  # noqa: E402
from helpers.lab import compare  # noqa: E402
from helpers.plots import PALETTE, set_style  # noqa: E402

PICTURE = ROOT / "book" / "_static" / "answer.png"
LIST = "instruction, list"
HIGHER = 2e-3  # the learning rate of the open markers; four times the default
HEAD, INSTRUCTION = EmbeddingHead.name, InstructionTuned.name
TASKS = {  # in the records, and as a reader would say it
    "bbc, 64 tokens": "news articles, 5 labels",
    "bbc-headlines": "news headlines, 5 labels",
    "ipc-sections": "patent titles, 8 labels",
    "attack-techniques": "attack reports, 66 labels",
    "attack-tactics": "attack reports, 14 tactics,\nseveral a sentence",
}


def recorded(sweep: str) -> list[dict]:
    """A sweep's records under the quick profile."""
    return [
        record for record in records.read(ROOT / "book" / "results" / f"{sweep}.jsonl") if record["key"]["profile"] == "quick"
    ]


def scores() -> pd.DataFrame:
    """Macro-F1 in percent by task, approach and seed (quick profile); of several settings that best on validation."""
    rows, documents = [], []
    for sweep in ("side_by_side", "multi_label"):
        best: dict[tuple, tuple] = {}
        for record in recorded(sweep):
            task = records.frame([record])["task"][0]
            if task not in TASKS:
                continue
            documents.append((record["key"]["task"], record["key"]["options"]))
            order, (said,) = 0.0, compare.results([record]).values()
            if said.multi_label:
                validation = records.validation_of(record)
                order = f1_score(validation.gold, validation.probabilities >= said.thresholds, average="micro")
            labels = np.flatnonzero(np.eye(len(said.labels))[said.gold].any(0) if said.gold.ndim == 1 else said.gold.any(0))
            score = 100 * f1_score(said.gold, said.predicted, labels=labels, average="macro", zero_division=0)
            known = (task, record["name"], record["key"]["seed"])
            best[known] = max(best.get(known, (-1.0, 0.0)), (float(order), float(score)))
        rows += [(*known, score) for known, (_, score) in best.items()]
    for sweep in ("learning_rate", "higher_rate"):
        for record in recorded(sweep):
            key = record["key"]
            if key["settings"]["learning_rate"] == HIGHER and (key["task"], key["options"]) in documents:
                known = (records.frame([record])["task"][0], f"{record['name']}, higher rate", key["seed"])
                rows.append((*known, 100 * record["metrics"]["macro_f1"]))
    table = pd.DataFrame(rows, columns=["task", "approach", "seed", "macro_f1"])
    return table.replace({"approach": {LIST: INSTRUCTION}})


def fingerprint(table: pd.DataFrame) -> str:
    """Of what is drawn."""
    rows = table.round(1).sort_values(["task", "approach", "seed"]).to_numpy().tolist()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def main() -> None:
    """Draw and store."""
    set_style()
    table = scores()
    colors = sns.color_palette(PALETTE)
    shown = {
        "TF-IDF + linear SVM": ("s", "0.55", "TF-IDF + SVM"),
        "MiniLM, fine-tuned": ("^", "0.2", "MiniLM, fine-tuned"),
        HEAD: ("o", colors[0], "classification head"),
        INSTRUCTION: ("D", colors[1], "instruction tuning"),
    }
    offsets = dict(zip(shown, (0.3, 0.1, -0.1, -0.3), strict=True))
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    for row, task in enumerate(TASKS):
        for name, (marker, color, label) in shown.items():
            for which, down in ((name, 0.0), (f"{name}, higher rate", 0.07)):
                found = table.loc[(table["task"] == task) & (table["approach"] == which), "macro_f1"]
                height = len(TASKS) - 1 - row + offsets[name] - down
                face = {"markerfacecolor": "white", "markeredgewidth": 2} if down else {"label": None if row else label}
                if len(found):
                    axes.plot([found.min(), found.max()], [height] * 2, color=color, linewidth=1.2 if down else 2, zorder=1)
                    axes.plot(found.mean(), height, marker, color=color, markersize=9, **face)
    axes.set_yticks(range(len(TASKS)), list(TASKS.values())[::-1])
    words = "macro-F1 on test documents, %: mean and range of three splits\n"
    words += "open markers: four times the learning rate, where it was run"
    axes.set(xlabel=words, xlim=(None, 100))
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, columnspacing=1.2, handletextpad=0.2)
    sns.despine(figure, left=True)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110, metadata={"Description": fingerprint(table)})


if __name__ == "__main__":
    main()
