"""Gives a page the recorded runs as JSON: every run, and what was recorded in
settings whose runs chose their own settings on validation documents.

    ```{explorer} setting
    ```
    ```{explorer} runs
    ```
    ```{explorer} rates
    ```

`book/_static/explorer.js` draws the first two; the third is a table of the
rates that were chosen. Nothing here knows which records there are: it reads
whatever lies in `book/results`.
"""

import functools
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"
LENGTHS = "document_lengths.json"  # python .ci/document_lengths.py

FAMILIES = {
    "EmbeddingHead": "head",
    "InstructionTuned": "instruction tuning",
    "FineTunedEncoder": "encoder",
    "DistilledEncoder": "encoder",
    "TfidfSvm": "word counts",
    "DistilledTfidf": "word counts",
}  # by an approach's class; what is not here is "other"
# In every run's key; what else a key has is a condition, such as an attack.
USUAL = {"approach", "settings", "task", "options", "seed", "profile"}
USUAL |= {"validation"}

RESAMPLES = 1000


def percent(value: float) -> float:
    """A score of 0..1 in percent, as exact as anybody reads it."""
    return round(100 * value, 2)


def documents_of(record: dict) -> tuple[int | None, int | None]:
    """Training documents for each label, and all of them; None: not said."""
    options, n_labels = record["key"]["options"], len(record["labels"])
    each, total = options.get("per_class"), options.get("n_train")
    if each is not None and not several(record):
        return each, each * n_labels
    if total is not None and not several(record):
        return round(total / n_labels), total
    return None, total


def rate_of(record: dict) -> float | None:
    """The learning rate that the run was trained at; None: at none."""
    settings = record["key"]["settings"]
    chosen = record.get("chosen", {}).get("settings", {})
    rate = chosen.get("learning_rate", settings.get("learning_rate"))
    if settings.get("epochs") == 0 or isinstance(rate, list):
        return None
    return rate


def how_chosen(record: dict) -> str:
    """What was chosen on validation documents: settings, epoch or nothing."""
    if "tried" in record:
        return "validation"
    return "epoch" if "epochs" in record else "fixed"


def several(record: dict) -> bool:
    """Whether a document can have several labels."""
    return isinstance(record["gold"][0], list)


def condition(key: dict) -> str:
    """What a key says beyond the usual, such as attacked documents."""
    return ", ".join(f"{name} {key[name]}" for name in key if name not in USUAL)


def named(settings: dict) -> str:
    """Settings as text."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def row_of(file: str, record: dict, frame_row: dict, words: int | None) -> dict:
    """A run as the page shows it."""
    key, chosen = record["key"], record.get("chosen", {})
    settings, made = key["settings"], record["provenance"]
    metrics, cost = record["metrics"], record["cost"]
    per_class, train = documents_of(record)
    memory = cost.get("training_peak_memory")
    left_out = {"name", "seed", *chosen.get("settings", {})}
    shown = {k: v for k, v in settings.items() if k not in left_out}
    speed = cost.get("documents_per_second")
    return {
        "file": file,
        "task": frame_row["task"],
        "labels": len(record["labels"]),
        "per_class": per_class,
        "train": train,
        "words": words,
        "several": several(record),
        "method": record["name"],
        "family": FAMILIES.get(key["approach"], "other"),
        "base_model": settings.get("base_model"),
        "seed": key["seed"],
        "rate": rate_of(record),
        "epochs": chosen.get("epoch", settings.get("epochs")),
        "how": how_chosen(record),
        "tried": len(record.get("tried", [])) or None,
        "chosen": named(chosen.get("settings", {})),
        "macro_f1": percent(metrics["macro_f1"]),
        "low": percent(metrics["macro_f1_low"]),
        "high": percent(metrics["macro_f1_high"]),
        "accuracy": percent(metrics["accuracy"]),
        "micro_f1": percent(metrics["micro_f1"]),
        "test": len(record["gold"]),
        "validation": len(record.get("validation", {}).get("gold", [])) or None,
        "condition": condition(key),
        "settings": named(shown),
        "profile": key["profile"],
        "device": made["device"],
        "dtype": made["dtype"],
        "quantization": made["quantization"],
        "threads": made["threads"],
        "training_seconds": round(cost["training_seconds"], 1),
        "documents_per_second": speed and float(f"{speed:.3g}"),
        "memory": memory and round(memory / 1e9, 2),
        "trained": cost.get("trainable_parameters"),
        "commit": made["commit"],
        "date": made["date"],
    }


def packed(rows: list[dict]) -> dict:
    """Rows as lists; a text stands once in `strings`, rows have its place."""
    columns = list(rows[0]) if rows else []
    places: dict[str, int] = {}
    texts = {
        name for name in columns if any(isinstance(r[name], str) for r in rows)
    }

    def cell(row: dict, name: str):
        value = row[name]
        if name in texts and value is not None:
            return places.setdefault(str(value), len(places))
        return value

    lists = [[cell(row, name) for name in columns] for row in rows]
    return {
        "columns": columns,
        "texts": sorted(texts),
        "strings": list(places),
        "rows": lists,
    }


def mean_and_interval(made: list[dict]) -> tuple[float, float, float]:
    """Macro-F1 in percent, mean over seeds, with a 95 % interval.

    A bootstrap draws seeds and then, within each, groups of documents, as
    `helpers.lab.statistics.over_seeds` does for a difference.
    """
    import numpy as np
    from helpers import bootstrap, records

    drawn, scores = [], []
    for record in made:
        predictions = records.predictions_of(record)
        weights = bootstrap.resamples(predictions, RESAMPLES, 0)
        drawn.append(bootstrap.scores(predictions, weights)[1])
        scores.append(float(bootstrap.scores(predictions)[1]))
    generator = np.random.default_rng(0)
    size = (RESAMPLES, len(made))
    seeds, columns = (
        generator.integers(0, n, size) for n in (len(made), RESAMPLES)
    )
    low, high = np.quantile(
        np.array(drawn)[seeds, columns].mean(axis=1), [0.025, 0.975]
    )
    mean = float(np.mean(scores))
    return percent(mean), percent(float(low)), percent(float(high))


def same_but_seed(record: dict) -> str:
    """What runs of one method in one setting have in common."""
    key = record["key"]
    settings = {k: v for k, v in key["settings"].items() if k != "seed"}
    alike = [key["approach"], settings, key["profile"]]
    return json.dumps(alike, sort_keys=True)


def told_apart(methods: list[dict]) -> None:
    """Give methods of one name what differs between them, in `variant`."""
    by_name = defaultdict(list)
    for method in methods:
        by_name[method["method"]].append(method)
    for alike in by_name.values():
        every = [
            method["key"]["settings"] | method["key"]["about"]
            for method in alike
        ]
        names = dict.fromkeys(name for one in every for name in one)
        for method, one in zip(alike, every, strict=True):
            differ = [
                n for n in names if any(e.get(n) != one.get(n) for e in every)
            ]
            values = [f"{n.replace('_', ' ')} {one.get(n)}" for n in differ]
            method["variant"] = ", ".join(values)
    for method in methods:
        del method["key"]


def settings_of(found: list[tuple[dict, dict]]) -> list[dict]:
    """Settings with the methods whose runs chose on validation; `found` has
    records with their rows."""
    settings: dict = defaultdict(lambda: defaultdict(dict))
    for record, row in found:
        if row["how"] != "validation" or row["several"] or row["condition"]:
            continue
        options = record["key"]["options"]
        setting = json.dumps([row["task"], options], sort_keys=True)
        runs = settings[setting][same_but_seed(record)]
        runs.setdefault(row["seed"], (record, row))  # once, in whatever file
    out = []
    for methods in settings.values():
        shown = []
        for by_seed in methods.values():
            made = [record for record, _ in by_seed.values()]
            rows = [row for _, row in sorted(by_seed.values(), key=seed_of)]
            mean, low, high = mean_and_interval(made)
            settings_then = made[0]["key"]["settings"]
            about = {"profile": rows[0]["profile"]}
            if "precision" in settings_then:  # what it was says more
                about = {
                    "precision": rows[0]["quantization"] or rows[0]["dtype"]
                }
            shown.append(
                {
                    "key": {"settings": settings_then, "about": about},
                    **{
                        n: rows[0][n]
                        for n in ("method", "family", "base_model")
                    },
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "seeds": [row["seed"] for row in rows],
                    "scores": [row["macro_f1"] for row in rows],
                    "rates": [row["rate"] for row in rows],
                    "chosen": [row["chosen"] for row in rows],
                    "tried": [row["tried"] for row in rows],
                }
            )
        told_apart(shown)
        same = ("task", "labels", "per_class", "words", "test", "validation")
        out.append({n: rows[0][n] for n in same} | {"methods": shown})
    return out


def seed_of(found: tuple[dict, dict]) -> int:
    """By which runs of a method are ordered."""
    return found[1]["seed"]


@functools.cache
def recorded() -> list[tuple[dict, dict]]:
    """Every record with its row."""
    sys.path.insert(0, str(ROOT))
    from helpers import records

    lengths = json.loads((RESULTS / LENGTHS).read_text(encoding="utf-8"))
    found = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        made = records.read(path)
        rows = records.frame(made).to_dict("records")
        for record, shown in zip(made, rows, strict=True):
            words = lengths.get(shown["task"], {}).get("words")
            found.append((record, row_of(path.stem, record, shown, words)))
    return found


def data() -> dict:
    """All that the page of the records shows."""
    found = recorded()
    return {
        "runs": packed([row for _, row in found]),
        "settings": settings_of(found),
    }


def rates_chosen() -> list[tuple[str, float, float, float, int]]:
    """For head, instruction tuning and encoder: the median of the rates that
    validation chose, the smallest, the largest, and how many runs chose."""
    chosen = defaultdict(list)
    for _, row in recorded():
        if row["how"] == "validation" and row["rate"] is not None:
            chosen[row["family"]].append(row["rate"])
    order = [
        name for name in dict.fromkeys(FAMILIES.values()) if name in chosen
    ]
    middle = statistics.median_low  # one that was chosen
    every = [(name, sorted(chosen[name])) for name in order]
    return [(n, middle(r), r[0], r[-1], len(r)) for n, r in every]


def as_code(rate: float) -> str:
    """0.0005 as 5e-4."""
    digits, power = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def rates_table() -> str:
    """The same as HTML."""
    heads = ("", "middle", "from", "to", "runs")
    lines = ["".join(f'<th scope="col">{head}</th>' for head in heads)]
    for name, *rates, n in rates_chosen():
        cells = "".join(
            f"<td>{each}</td>" for each in [*map(as_code, rates), n]
        )
        lines.append(f'<th scope="row">{name}</th>{cells}')
    head, *body = (f"<tr>{line}</tr>" for line in lines)
    table = f"<thead>{head}</thead><tbody>{''.join(body)}</tbody>"
    return f'<table class="dataframe">{table}</table>'


PARTS = ("setting", "runs", "rates")
WITHOUT = (
    "This part of the page is drawn by JavaScript, on the site. The records "
    "are lines of JSON in the folder book/results of the repository."
)


class Explorer(SphinxDirective):
    """`setting` with the JSON of the page, `runs`, or a table of `rates`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table, or an empty place that the script fills."""
        part = directives.choice(self.arguments[0], PARTS)
        for path in [*RESULTS.glob("*.jsonl"), RESULTS / LENGTHS]:
            self.env.note_dependency(str(path))
        if part == "rates":
            return [nodes.raw("", rates_table(), format="html")]
        html = (
            f'<div class="explorer" data-part="{part}">'
            f"<noscript>{WITHOUT}</noscript></div>"
        )
        if part == "setting":
            text = json.dumps(data(), separators=(",", ":"), ensure_ascii=False)
            text = text.replace("<", "\\u003c")  # nothing in it ends the script
            html += (
                f'<script type="application/json" id="records">{text}</script>'
            )
        return [nodes.raw("", html, format="html")]


def add_script(app, pagename, templatename, context, doctree) -> None:
    """The script, on pages that have something for it to draw."""
    if doctree is not None and any(
        'class="explorer"' in raw.rawsource + raw.astext()
        for raw in doctree.findall(nodes.raw)
    ):
        app.add_js_file("explorer.js", loading_method="defer")
        app.add_css_file("explorer.css")


def setup(app) -> dict:
    """Called by Sphinx."""
    app.add_directive("explorer", Explorer)
    app.connect("html-page-context", add_script)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
