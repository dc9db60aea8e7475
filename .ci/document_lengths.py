"""Measure how long the documents of every recorded task are, in words as a model reads them: python .ci/document_lengths.py

Records hold no texts: `book/results/document_lengths.json` keeps the lengths, so that the site can be built without the data.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import base_models, corpora, profiles, records, tasks  # noqa: E402
from helpers.lab import as_it_comes, sweeps  # noqa: E402

RESULTS = ROOT / "book" / "results"
TABLE = RESULTS / "document_lengths.json"
CUTS = ("words", "tokens", "tokenizer", "part")  # the options of a task that change what is read of a text


def recorded() -> dict[str, dict]:
    """The task and its cuts by the name that `records.frame` gives them: of all records, and of all sweeps still to be run."""
    files = [records.read(path) for path in sorted(RESULTS.glob("*.jsonl"))]
    wanted = [record["key"] for made in files for record in made]
    wanted += [key for path in sorted(RESULTS.glob("*.yaml")) for key in sweeps.keys(sweeps.load_sweep(path))]
    names = records.frame({"key": key, "name": "", "metrics": {}, "cost": {}} for key in wanted)["task"]
    found = {}
    for name, key in zip(names, wanted, strict=True):
        cut = {option: key["options"][option] for option in CUTS if option in key["options"]}
        found[name] = {"task": key["task"], **cut}
    return dict(sorted(found.items()))


def lengths(
    task: str,
    words: int | None = None,
    tokens: int | None = None,
    tokenizer: str = base_models.DEFAULT,
    part: str = "first",
) -> dict:
    """Words of a task's documents, each text once: the median, and between which numbers eight of ten lie."""
    shorten = str
    if words is not None:
        shorten = tasks.first_words(words)
    if tokens is not None:
        shorten = as_it_comes.part_of(base_models.load_tokenizer(tokenizer), tokens, part)
    texts = {shorten(document.text) for document in corpora.TASKS[task].read()}
    low, median, high = np.quantile([len(text.split()) for text in texts], [0.1, 0.5, 0.9])
    return {"words": int(median), "low": int(low), "high": int(high)}


def main() -> None:
    """Write the table anew."""
    profiles.quiet()
    measured = {name: lengths(**how) for name, how in recorded().items()}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in measured.items())
    TABLE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
