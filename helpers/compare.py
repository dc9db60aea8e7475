"""Which approach for your data? A table of labelled text in, a verdict out (chapter 11).

python -m helpers.compare tickets.csv --text message --label team --out tickets-compared
"""

import argparse
import hashlib
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import EvalResult, ModelCardData

from helpers import base_models, evaluation, own_data, profiles, runs, sources
from helpers.baselines import FineTunedEncoder, FrozenProbe, Majority, TfidfSvm
from helpers.embedding_head import EmbeddingHead
from helpers.errors import BookError
from helpers.evaluation import Predictions
from helpers.instruction import InstructionTuned
from helpers.own_data import Labelled

TRAINED = {EmbeddingHead.name: "head", InstructionTuned.name: "instruction"}  # and the folder that each is saved in
BASELINES = (TfidfSvm.name, FrozenProbe.name, FineTunedEncoder.name)
SIZES = {  # documents at most, and the tokens of each that are read
    "quick": {"n_train": 200, "n_validation": 100, "n_test": 300, "tokens": 64},
    "full": {"n_train": 5000, "n_validation": 1000, "n_test": 2000, "tokens": 256},
}
FASTER = 1.5  # times the documents a second: less is the machine's other work
_EXAMPLES = """
examples:
  look at the file first, without training:
    python -m helpers.compare tickets.csv --text message --label team --check
  compare, on three splits, and keep the tickets of a customer together:
    python -m helpers.compare tickets.csv --text message --label team --group customer --seeds 3
  several labels a document, in one column (a;b) or one column of zeros and ones for each:
    python -m helpers.compare papers.jsonl --text abstract --label topics
    python -m helpers.compare papers.parquet --text abstract --label physics biology history
  another base model, more documents, longer texts (a GPU is used if there is one):
    python -m helpers.compare tickets.csv --text message --label team --base-model Qwen/Qwen3-0.6B --n-train 2000 --tokens 256
"""


def plan(
    data: Labelled,
    *,
    of: str = "topic",
    base_model: str = base_models.DEFAULT,
    seeds: int = 1,
    tokens: int | None = None,
    n_train: int | None = None,
    n_validation: int | None = None,
    n_test: int | None = None,
    epochs: int | None = None,
) -> tuple[Labelled, list[dict]]:
    """What is to be run, as `runs.run` takes it, and the documents it is run on.

    Args:
        of: what the labels are, for the words behind each document: "The topic of this text is".
        seeds: so many splits and trainings.
        tokens: of each document that are read.
        n_train, n_validation, n_test: documents at most; all of these by the profile (`SIZES`) if None. Of a small file a
            third is kept for test and a sixth for validation.
        epochs: of both approaches; None for their own.

    Raises:
        BookError: sizes that do not fit, labels too rare to be tested, or anything that `Task` refuses.
    """
    profile = profiles.current().name
    given = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test, "tokens": tokens, "seeds": seeds}
    for name, number in given.items():
        if number is not None and number < 1:
            raise BookError(f"{name} is {number}, but it has to be 1 or more.")
    size = {name: given[name] or most for name, most in SIZES[profile].items()}
    data = own_data.cut(data, size["n_train"] + size["n_validation"] + size["n_test"])
    grouped = bool(data.documents[0].group)
    n, least = len(data.documents), 2 if data.multi_label else len(data.labels)
    # groups cannot be halved: of the fifth and the tenth of them that `tasks.split` sets aside, not all is asked for
    shares = {"n_test": 1 / 8 if grouped else 1 / 3, "n_validation": 1 / 16 if grouped else 1 / 6}
    parts = {name: given[name] or min(size[name], max(least, int(n * share))) for name, share in shares.items()}
    options = {**parts, "tokens": size["tokens"]}
    options |= {"n_train": size["n_train"]} if grouped and n - sum(parts.values()) > 2 * size["n_train"] else {}

    fingerprint = hashlib.sha256(json.dumps(data.documents, ensure_ascii=False).encode()).hexdigest()
    name = f"{data.name} {fingerprint[:8]}"
    sources.TASKS[name] = sources.Source(lambda: data.documents, conflicting="unite" if data.multi_label else "drop")
    words = {"suffix": f"\n\nThe {of} of this text is", "base_model": base_model}
    blocks = base_models.shape_of(base_model).get_text_config().num_hidden_layers
    deep = min(EmbeddingHead.n_layers, blocks) if profile == "quick" else None
    several = {"learning_rate": 1e-3, "epochs": 8} if data.multi_label else {}
    trained = words | {"n_layers": deep} | several | ({"epochs": epochs} if epochs else {})
    faster = {} if data.multi_label else {"learning_rate": 2e-3}  # chapter 08: what suits instruction tuning, not the head
    keys = runs.keys(
        {
            "tasks": [{name: options}],
            "seeds": list(range(seeds)),
            "validation": True,
            "approaches": [
                Majority.__name__,
                TfidfSvm.__name__,
                {FrozenProbe.__name__: words},
                {FineTunedEncoder.__name__: {"epochs": 15} if data.multi_label else None},
                {EmbeddingHead.__name__: trained},
                {InstructionTuned.__name__: trained | faster},
            ],
        }
    )
    for seed in range(seeds):
        runs.load_task(keys[0] | {"seed": seed})  # what is wrong with a split is said before anything is trained
    return data, keys


def run(data: Labelled, keys: list[dict], out: str | Path, progress: bool = True) -> list[dict]:
    """Make the runs that `out` does not hold yet; the adapters of the first seed are saved there, each with a model card.

    Args:
        data, keys: of `plan`.
        progress: show a bar.

    Returns:
        The records, one for each key that could be run; why another one failed is printed.

    Raises:
        BookError: `out` holds something else, or nothing could be run.
    """
    out = Path(out).expanduser()
    path, note = out / "records.jsonl", out / "compared.json"
    described = {"task": keys[0]["task"], "options": keys[0]["options"]}
    described |= {"settings": [key["settings"] for key in keys if not key["seed"]]}
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not note.exists())):
        raise BookError(f"{out} exists and holds something else. Give a new folder; nothing was overwritten.")
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != described:
        raise BookError(
            f"{out} holds a comparison of other documents or with other settings. Give a new folder; nothing was overwritten."
        )
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")

    def save(key: dict) -> Path | None:
        folder = TRAINED.get(key["settings"]["name"])
        if folder is None or key["seed"]:
            return None
        shutil.rmtree(out / folder, ignore_errors=True)  # of a run that was stopped before it was recorded
        return out / folder

    done = [record["key"] for record in runs.read(path)]
    runs.make([key for key in keys if key not in done], path, save, progress)
    records = [record for record in runs.read(path) if record["key"] in keys]
    if not records:
        raise BookError(f"{data.name}: nothing could be run. The lines above say why.")
    for record in records:
        if record["name"] in TRAINED and not record["key"]["seed"]:
            (out / TRAINED[record["name"]] / "README.md").write_text(model_card(data, record), encoding="utf-8")
    return records


def results(records: Iterable[dict]) -> dict[str, Predictions]:
    """Every approach's predictions on all test sets, multi-label with the threshold that is best on validation."""
    found: dict[str, list[Predictions]] = {}
    for record in records:
        said = runs.predictions_of(record)
        if said.multi_label:
            said = replace(said, thresholds=evaluation.best_thresholds(runs.validation_of(record)))
        found.setdefault(said.approach, []).append(said)
    return {name: evaluation.pool(each) if len(each) > 1 else each[0] for name, each in found.items()}


def verdict(records: list[dict]) -> tuple[str, str]:
    """Which approach to take, and why, with the intervals behind it.

    The best of the baselines and the better of the two approaches are chosen on validation documents; what is said of them comes
    from the test documents. One of two is called better where the interval of the difference in macro-F1 leaves zero out; both
    intervals together hold with 95 %. Of two that cannot be told apart the cheaper one is recommended: the baseline; of the two
    approaches one that is `FASTER`, else the one that is ahead on validation.

    Returns:
        The recommended approach's name, and Markdown.
    """
    tested, validated = results(records), _validation_f1(records)
    baseline = max((name for name in BASELINES if name in tested), key=validated.get, default=None)
    trained = sorted((name for name in TRAINED if name in tested), key=lambda name: -validated[name])
    missing = [name for name in (*BASELINES, *TRAINED) if name not in tested]
    lines = [f"- **{name}** could not be run." for name in missing]
    if not trained or baseline is None:
        return trained[0] if trained else baseline or next(iter(tested)), "\n".join(lines)
    chosen, confidence = trained[0], 1 - 0.05 / len(trained)
    if len(trained) > 1:
        sign, line = _told_apart(tested[EmbeddingHead.name], tested[InstructionTuned.name], confidence)
        lines.append(line)
        other = trained[1]
        cheaper = tested[other].documents_per_second > FASTER * tested[chosen].documents_per_second
        chosen = {1: EmbeddingHead.name, -1: InstructionTuned.name, 0: other if cheaper else chosen}[sign]
    sign, line = _told_apart(tested[chosen], tested[baseline], confidence)
    lines.append(line)
    if sign > 0:
        advice = f"Take **{chosen}**: it is better than the best baseline here, {baseline}."
    elif sign < 0:
        chosen, advice = baseline, f"Take **{baseline}**: it is better than {chosen}, and cheaper."
    else:
        n = len(tested[chosen].gold)
        advice = (
            f"Take **{baseline}**: {n:,} test documents do not show that {chosen} is better, and it costs more. "
            "Label more documents to see smaller differences."
        )
        chosen = baseline
    return chosen, "\n".join([advice, "", *lines])


def _told_apart(a: Predictions, b: Predictions, confidence: float) -> tuple[int, str]:
    """1 if `a` is better, -1 if `b` is, 0 if that cannot be told; and the line that says so."""
    found = {name: 100 * value for name, value in evaluation.compare(a, b, confidence=confidence).items()}
    difference, low, high = (found[f"macro_f1_{name}"] for name in ("difference", "low", "high"))
    sign = int(low > 0) - int(high < 0)
    what = {1: f"{a.approach} is better", -1: f"{b.approach} is better", 0: "no difference is shown"}[sign]
    return sign, (
        f"- {a.approach} against {b.approach}: macro-F1 {difference:+.1f} points, {low:+.1f} to {high:+.1f} at "
        f"{100 * confidence:.1f} %: {what}."
    )


def _validation_f1(records: Iterable[dict]) -> dict[str, float]:
    """Mean macro-F1 of each approach on validation documents, in 0..1."""
    found: dict[str, list[float]] = {}
    for record in records:
        said = runs.validation_of(record)
        if said.multi_label:
            said = replace(said, thresholds=evaluation.best_thresholds(said))
        found.setdefault(record["name"], []).append(evaluation.evaluate(said)["macro_f1"])
    return {name: float(np.mean(each)) for name, each in found.items()}


def model_card(data: Labelled, record: dict) -> str:
    """What a trained adapter is, for the README.md beside it, with the metadata that the hub reads."""
    key, metrics, settings = record["key"], record["metrics"], record["key"]["settings"]
    base, kind = settings["base_model"], key["approach"]
    labels = ", ".join(f"`{label}`" for label in record["labels"][:50])
    card = ModelCardData(
        base_model=f"HuggingFaceTB/{base}" if base == base_models.DEFAULT else base,
        library_name="peft",
        pipeline_tag="text-classification",
        tags=["lora"],
        model_name=f"{data.name}, {record['name']}",
        eval_results=[
            EvalResult("text-classification", data.name, data.name, metric, metrics[name])
            for metric, name in (("accuracy", "accuracy"), ("f1", "macro_f1"))
        ],
    )
    warnings = "\n".join(f"- {line}" for line in data.warnings) or "- Nothing was found wrong with the file."
    return textwrap.dedent(
        """\
        ---
        {metadata}
        ---
        # {name} on {file}

        A LoRA adapter of {base}, trained by `python -m helpers.compare`. It knows {n_labels} labels, {several}: {labels}.

        | on {n_test:,} test documents | % | 95 % interval |
        |---|---|---|
        | accuracy | {accuracy:.1f} | {accuracy_low:.1f} to {accuracy_high:.1f} |
        | macro-F1 | {macro_f1:.1f} | {macro_f1_low:.1f} to {macro_f1_high:.1f} |

        ## Use

        ```python
        from datasets import Dataset

        from helpers.{module} import {kind}

        classifier = {kind}.load("{folder}")
        documents = Dataset.from_dict({{"text": ["…"], "label": [{label}]}})  # the label is not looked at
        said = classifier.predict(documents)
        {print}
        ```

        Texts have to be cut to their first {tokens} tokens, as in training (`helpers.tasks.first_tokens`).

        ## Trained on

        {in_words} Trained on {date} with seed {seed}, {settings}.

        {warnings}

        ## Limits

        The figures hold for documents like those of the file. On other sources, other years or other languages it was not tested.
        """
    ).format(
        metadata=card.to_yaml(),
        name=record["name"],
        file=data.name,
        base=base,
        n_labels=len(record["labels"]),
        several="of which a text can have several" if data.multi_label else "of which a text has one",
        labels=labels + (", …" if len(record["labels"]) > 50 else ""),
        n_test=len(record["gold"]),
        **{name: 100 * value for name, value in metrics.items()},
        module=runs.APPROACHES[kind].__module__.rpartition(".")[2],
        kind=kind,
        folder=TRAINED[record["name"]],
        label=[0] * len(record["labels"]) if data.multi_label else 0,
        tokens=key["options"]["tokens"],
        print="print(said.probabilities, classifier.labels)"
        if data.multi_label
        else "print([classifier.labels[each] for each in said.predicted])",
        in_words=data.in_words,
        date=record["provenance"]["date"],
        seed=key["seed"],
        settings=", ".join(f"{name} {settings[name]}" for name in ("rank", "learning_rate", "epochs", "n_layers")),
        warnings=warnings,
    )


def report(data: Labelled, looked_at: pd.DataFrame, records: list[dict], scores: pd.DataFrame, advice: str) -> str:
    """All of it on one page of Markdown: what `own_data.report`, `run`, `evaluation.table` and `verdict` gave."""
    parts = [f"# {data.name}: which approach?", data.in_words, looked_at.to_markdown(disable_numparse=True)]
    parts += ["\n".join(f"- {line}" for line in data.warnings)] if data.warnings else []
    seeds = len({record["key"]["seed"] for record in records})
    options = records[0]["key"]["options"]
    how = f"{seeds} split(s), {options['n_test']:,} test documents each, the first {options['tokens']} tokens of every document."
    return (
        "\n\n".join(
            [*parts, "## Side by side", how, evaluation.show(scores).to_markdown(disable_numparse=True), "## Verdict", advice]
        )
        + "\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Compare a classification head and instruction tuning, with baselines, on a table of labelled text.

    Stop it whenever you like: it goes on where it was.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.compare",
        description=main.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = SIZES["quick"], SIZES["full"]
    most = {name: f"(default: {size[0][name]} on a CPU, {size[1][name]} on a GPU)" for name in size[0]}
    parser.add_argument("file", type=Path, help="a .csv, .tsv, .jsonl or .parquet file with a row for each document")
    parser.add_argument("--text", required=True, nargs="+", help="the column with the texts, or several to be joined")
    parser.add_argument("--label", required=True, nargs="+", help="the column with the labels, or a column for each label")
    parser.add_argument("--group", help="a column; what has the same in it is never split between training and test")
    parser.add_argument("--out", type=Path, help="a folder for records, adapters and report (default: FILE-compared)")
    parser.add_argument("--check", action="store_true", help="only read the file and report on it")
    parser.add_argument(
        "--multi-label", action=argparse.BooleanOptionalAction, help="several labels a document (default: found out)"
    )
    parser.add_argument("--of", help="what the labels are, such as topic (default: the name of the label column)")
    parser.add_argument("--base-model", default=base_models.DEFAULT, help="a causal LM: hub id or folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="so many splits and trainings (default: 1)")
    parser.add_argument("--tokens", type=int, help=f"of each document that are read {most['tokens']}")
    for name in ("n_train", "n_validation", "n_test"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"documents at most {most[name]}")
    parser.add_argument("--epochs", type=int, help="of both approaches (default: the book's)")
    given = parser.parse_args(arguments)
    file = given.file.expanduser()
    out = (given.out or file.parent / f"{file.stem}-compared").expanduser()
    label = given.label if len(given.label) > 1 else given.label[0]
    try:
        profiles.start()
        data = own_data.read(file, given.text, label, group=given.group, multi_label=given.multi_label)
        print(data.in_words)
        options = ("base_model", "seeds", "tokens", "n_train", "n_validation", "n_test", "epochs")
        of = given.of or (given.label[0] if len(given.label) == 1 else "topic")
        data, keys = plan(data, of=of, **{name: getattr(given, name) for name in options})
        print(*(f"warning: {line}" for line in data.warnings), sep="\n")
        looked_at = own_data.report(data, base_models.load_tokenizer(given.base_model), keys[0]["options"]["tokens"])
        print(looked_at.to_string(header=False))
        if given.check:
            return
        records = run(data, keys, out)
    except BookError as error:
        sys.exit(str(error))
    scores, (chosen, advice) = evaluation.table(results(records).values()), verdict(records)
    page = report(data, looked_at, records, scores, advice)
    (out / "report.md").write_text(page, encoding="utf-8")
    scores.to_csv(out / "table.csv")
    print(page.partition("## Side by side")[2].strip(), f"\nAll of it is in {out}.")
    if chosen not in TRAINED:
        print("A baseline is not saved: train it with its class in helpers.baselines.")


if __name__ == "__main__":
    main()
