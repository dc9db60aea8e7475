"""Record what both approaches say about hostile documents.

    python book/scripts/hostile.py

Documents, attacks, defences and settings are those of the chapter
`hostile_documents`: its cells tagged `recorded` are run here, then what they
describe is trained and asked. Recorded runs are not made again.
"""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import nbformat
import numpy as np

BOOK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(BOOK.parent))
os.chdir(BOOK)

from helpers import profiles, records  # noqa: E402
from helpers.evaluation import Predictions, evaluate, measure  # noqa: E402
from helpers.instruction import InstructionTuned  # noqa: E402
from helpers.lab import sweeps  # noqa: E402

CHAPTER, RECORDS = "hostile_documents.ipynb", Path("results/hostile.jsonl")
KEPT = (
    "seconds",
    "training_seconds",
    "trainable_parameters",
)


def recorded_cells(path: str | Path = CHAPTER) -> dict:
    """The names that the chapter's cells tagged `recorded` define."""
    names = {"__name__": "chapter"}
    for cell in nbformat.read(path, as_version=4).cells:
        if "recorded" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names


def ask(approach, defences: str, documents, chapter: dict) -> Predictions:
    """What a trained approach says, about texts as they come or sanitized."""
    if defences != "none":
        return approach.predict(documents)
    with measure() as cost:
        said = chapter["read_as_it_comes"](approach, documents)
    return Predictions(
        approach.name,
        approach.labels,
        said,
        np.array(documents["label"]),
        seconds=cost.seconds,
        training_seconds=approach.training_seconds,
        trainable_parameters=approach.model.num_parameters(only_trainable=True),
    )


def main() -> None:
    """Train each approach, without and with defences; record its answers."""
    chapter = recorded_cells()
    task = chapter["task"]
    options = {
        name: value
        for name, value in chapter["sizes"].items()
        if name != "seed"
    }
    for defences, approaches in chapter["approaches"].items():
        for approach in approaches.values():
            key = {
                "approach": type(approach).__name__,
                "settings": asdict(approach),
                "task": task.name,
                "options": {**options, "tokens": 16},
                "seed": chapter["sizes"]["seed"],
                "profile": profiles.current().name,
                "defences": defences,
            }
            done = [record["key"] for record in records.read(RECORDS)]
            keys = {
                name: {**key, "documents": name}
                for name in chapter["sets"][defences]
            }
            to_do = [name for name in keys if keys[name] not in done]
            if not to_do:
                continue
            assert (
                sweeps.load_task(key).content_hash() == task.content_hash()
            ), "the options above are not those of the chapter"
            approach.fit(chapter["trained_on"][defences])
            for name in to_do:
                documents = chapter["sets"][defences][name]
                said = ask(approach, defences, documents, chapter)
                more = {}
                if name == "attacked" and isinstance(
                    approach, InstructionTuned
                ):
                    more["written"] = chapter["written"](
                        approach.model, chapter["prompts"][defences]
                    )
                record = {
                    "key": keys[name],
                    "name": said.approach,
                    "content_hash": task.content_hash(),
                    "trained_on": chapter["trained_on"][
                        defences
                    ].content_hash(),
                    "test_set": sweeps.test_set(replace(task, test=documents)),
                    "labels": said.labels,
                    "metrics": None,
                    "cost": {each: getattr(said, each) for each in KEPT},
                    "provenance": sweeps.provenance(),
                    "groups": None,
                    "gold": said.gold.tolist(),
                    "probabilities": said.probabilities.round(5).tolist(),
                    **more,
                }
                sweeps.append(
                    RECORDS,
                    record
                    | {"metrics": evaluate(records.predictions_of(record))},
                )
                print(
                    f"{defences}, {said.approach}, {name}: recorded", flush=True
                )
            del approach.model  # four of them do not fit into every machine


if __name__ == "__main__":
    main()
