"""Which approach for your data? A table of labelled text in, a verdict out (chapter 11; `compare_examples.txt`)."""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jinja2
import pandas as pd

from helpers import base_models, corpora, evaluation, profiles, records
from helpers.errors import BookError
from helpers.evaluation import Predictions
from helpers.lab import own_data, sweeps
from helpers.lab.approaches import APPROACHES
from helpers.lab.own_data import Labelled

HEAD, INSTRUCTION = (APPROACHES[each].name for each in ("EmbeddingHead", "InstructionTuned"))
TRAINED = {HEAD: "head", INSTRUCTION: "instruction"}  # and the folder that each is saved in
BASELINES = tuple(APPROACHES[each].name for each in ("TfidfSvm", "FrozenProbe", "FineTunedEncoder"))
SIZES = {  # documents at most, and the tokens of each that are read
    "quick": {"n_train": 200, "n_validation": 100, "n_test": 300, "tokens": 64},
    "full": {"n_train": 5000, "n_validation": 1000, "n_test": 2000, "tokens": 256},
}
FASTER = 1.5  # times the documents a second: less is the machine's other work


def sources_of(data: Labelled) -> dict[str, corpora.Source]:
    """Where `sweeps` reads the documents, by the task's name: that of the file and a fingerprint of them."""
    fingerprint = hashlib.sha256(json.dumps(data.documents, ensure_ascii=False).encode()).hexdigest()
    source = corpora.Source(lambda: data.documents, conflicting="unite" if data.multi_label else "drop")
    return {f"{data.name} {fingerprint[:8]}": source}


def plan(
    data: Labelled, of: str = "topic", base_model: str = base_models.DEFAULT, seeds: int = 1, epochs: int | None = None, **sizes
) -> tuple[Labelled, list[dict]]:
    """The documents, cut to `sizes`, and the runs as `sweeps.run` takes them, so many `seeds` of each.

    Args:
        of: what the labels are, for the words behind each document: "The topic of this text is".
        epochs: of both approaches; None for their own.
        sizes: those of `SIZES`, by the profile where None. Of a small file a third is kept for test and a sixth for validation.
    """
    profile = profiles.current().name
    for name, number in {**sweeps.checked(sizes, "size", SIZES[profile]), "seeds": seeds}.items():
        if number is not None and number < 1:
            raise BookError(f"{name} is {number}, but it has to be 1 or more.")
    size = {name: sizes.get(name) or most for name, most in SIZES[profile].items()}
    data = own_data.cut(data, size["n_train"] + size["n_validation"] + size["n_test"])
    grouped = bool(data.documents[0].group)
    n, least = len(data.documents), 2 if data.multi_label else len(data.labels)
    # groups cannot be halved: of the fifth and the tenth of them that `tasks.split` sets aside, not all is asked for
    shares = {"n_test": 1 / 8 if grouped else 1 / 3, "n_validation": 1 / 16 if grouped else 1 / 6}
    parts = {name: sizes.get(name) or min(size[name], max(least, int(n * share))) for name, share in shares.items()}
    options = {**parts, "tokens": size["tokens"]}
    options |= {"n_train": size["n_train"]} if grouped and n - sum(parts.values()) > 2 * size["n_train"] else {}

    words = {"suffix": f"\n\nThe {of} of this text is"}
    blocks = base_models.shape_of(base_model).get_text_config().num_hidden_layers
    deep = min(APPROACHES["EmbeddingHead"].n_layers, blocks) if profile == "quick" else None
    trained = words | {"n_layers": deep} | ({"learning_rate": 1e-3, "epochs": 8} if data.multi_label else {})
    trained |= {"epochs": epochs} if epochs else {}
    faster = {} if data.multi_label else {"learning_rate": 2e-3}  # chapter 08: what suits instruction tuning, not the head
    sources = sources_of(data)
    approaches = {"Majority": None, "TfidfSvm": None, "FrozenProbe": words}
    approaches |= {"FineTunedEncoder": {"epochs": 15} if data.multi_label else None}
    approaches |= {"EmbeddingHead": trained, "InstructionTuned": trained | faster}
    sweep = {"tasks": [{name: options} for name in sources], "seeds": list(range(seeds)), "approaches": [approaches]}
    keys = sweeps.keys(sweep | {"validation": True, "base_model": base_model}, sources)
    for seed in range(seeds):
        sweeps.load_task(keys[0] | {"seed": seed}, sources)  # what is wrong with a split is raised before anything is trained
    return data, keys


def run(data: Labelled, keys: list[dict], out: str | Path, progress: bool = True) -> list[dict]:
    """Make the runs of `plan` that the folder `out` does not hold yet, and return the records of all that could be made.

    The adapters of the first seed are saved there, each with a model card; why a run failed is printed. BookError: `out` holds
    something else, or nothing could be run.
    """
    out = Path(out).expanduser()
    path, note = out / "records.jsonl", out / "compared.json"
    described = {"task": keys[0]["task"], "options": keys[0]["options"]}
    described |= {"settings": [key["settings"] for key in keys if not key["seed"]]}
    held = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if held != described and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BookError(
            f"{out} holds something else, or a comparison of other documents or with other settings. "
            "Give a new folder; nothing was overwritten."
        )
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")

    def save(key: dict) -> Path | None:
        folder = TRAINED.get(key["settings"]["name"])
        if folder is None or key["seed"]:
            return None
        shutil.rmtree(out / folder, ignore_errors=True)  # of a run that was stopped before it was recorded
        return out / folder

    sweeps.make(keys, path, save, progress, sources_of(data))
    made = [record for record in records.read(path) if record["key"] in keys]
    if not made:
        raise BookError(f"{data.name}: nothing could be run. The lines above say why.")
    for record in made:
        if record["name"] in TRAINED and not record["key"]["seed"]:
            (out / TRAINED[record["name"]] / "README.md").write_text(model_card(data, record), encoding="utf-8")
    return made


def results(made: Iterable[dict], validation: bool = False) -> dict[str, Predictions]:
    """Every approach's predictions on all test sets, or validation sets; multi-label with the best threshold on validation."""
    found: dict[str, list[Predictions]] = {}
    for record in made:
        predictions = (records.validation_of if validation else records.predictions_of)(record)
        if predictions.multi_label:
            predictions = replace(predictions, thresholds=evaluation.best_thresholds(records.validation_of(record)))
        found.setdefault(predictions.approach, []).append(predictions)
    return {name: evaluation.pool(each) if len(each) > 1 else each[0] for name, each in found.items()}


def verdict(made: list[dict]) -> tuple[str, str]:
    """The name of the approach to take, and why in Markdown, with the intervals behind it.

    The best baseline and the better of the two approaches are chosen on validation documents and judged on test documents. One of
    two is called better where the interval of the difference in macro-F1 leaves zero out; both intervals together hold with 95 %.
    Of two that cannot be told apart the cheaper one is recommended: the baseline; of the two approaches one that is `FASTER`, or
    else ahead on validation.
    """
    tested = results(made)
    validated = {name: evaluation.evaluate(each)["macro_f1"] for name, each in results(made, validation=True).items()}
    baseline = max((name for name in BASELINES if name in tested), key=validated.get, default=None)
    trained = sorted((name for name in TRAINED if name in tested), key=lambda name: -validated[name])
    lines = [f"- **{name}** could not be run." for name in (*BASELINES, *TRAINED) if name not in tested]
    if not trained or baseline is None:
        return trained[0] if trained else baseline or next(iter(tested)), "\n".join(lines)
    chosen, confidence = trained[0], 1 - 0.05 / len(trained)
    if len(trained) > 1:
        sign, line = _difference(tested[HEAD], tested[INSTRUCTION], confidence)
        lines.append(line)
        ahead, other = (tested[name].documents_per_second for name in trained)
        chosen = {1: HEAD, -1: INSTRUCTION, 0: trained[other > FASTER * ahead]}[sign]
    sign, line = _difference(tested[chosen], tested[baseline], confidence)
    lines.append(line)
    advice = {
        1: f"Take **{chosen}**: it is better than the best baseline here, {baseline}.",
        -1: f"Take **{baseline}**: it is better than {chosen}, and cheaper.",
        0: f"Take **{baseline}**: {len(tested[chosen].gold):,} test documents do not show that {chosen} is better, and it costs "
        "more. Label more documents to see smaller differences.",
    }[sign]
    return chosen if sign > 0 else baseline, "\n".join([advice, "", *lines])


def _difference(a: Predictions, b: Predictions, confidence: float) -> tuple[int, str]:
    """1 if `a` is better, -1 if `b` is, 0 if that cannot be told; and the line that says so."""
    found = {name: 100 * value for name, value in evaluation.compare(a, b, confidence=confidence).items()}
    difference, low, high = (found[f"macro_f1_{name}"] for name in ("difference", "low", "high"))
    sign = int(low > 0) - int(high < 0)
    what = {1: f"{a.approach} is better", -1: f"{b.approach} is better", 0: "no difference is shown"}[sign]
    interval = f"{low:+.1f} to {high:+.1f} at {100 * confidence:.1f} %"
    return sign, f"- {a.approach} against {b.approach}: macro-F1 {difference:+.1f} points, {interval}: {what}."


def model_card(data: Labelled, record: dict) -> str:
    """What a trained adapter is, for the README.md beside it, with the metadata that the hub reads."""
    base, metrics = record["key"]["settings"]["base_model"], record["metrics"]
    base = f"HuggingFaceTB/{base}" if base == base_models.DEFAULT else base
    words = {"data": data, "record": record, "base": base, "folder": TRAINED[record["name"]], **record["key"]}
    template = jinja2.Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    return template.render(**words, percent=lambda name: f"{100 * metrics[name]:.1f}")


def report(data: Labelled, looked_at: pd.DataFrame, made: list[dict], scores: pd.DataFrame, advice: str) -> str:
    """All of it on one page of Markdown: what `own_data.report`, `run`, `evaluation.table` and `verdict` gave."""
    seeds, options = len({record["key"]["seed"] for record in made}), made[0]["key"]["options"]
    how = f"{seeds} split(s), {options['n_test']:,} test documents each, the first {options['tokens']} tokens of every document."
    parts = [f"# {data.name}: which approach?", data.in_words, looked_at.to_markdown(disable_numparse=True)]
    parts += ["\n".join(f"- {line}" for line in data.warnings)] if data.warnings else []
    parts += ["## Side by side", how, evaluation.show(scores).to_markdown(disable_numparse=True), "## Verdict", advice]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Compare a classification head and instruction tuning, with baselines, on a table of labelled text.

    Stop it whenever you like: it goes on where it was.
    """
    examples = Path(__file__).with_name("compare_examples.txt").read_text(encoding="utf-8")
    options = {"epilog": examples, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m helpers.compare", description=main.__doc__, **options)
    add = parser.add_argument
    add("file", type=Path, help="a .csv, .tsv, .jsonl or .parquet file with a row for each document")
    add("--text", required=True, nargs="+", help="the column with the texts, or several to be joined")
    add("--label", required=True, nargs="+", help="the column with the labels, or a column for each label")
    add("--group", help="a column; what has the same in it is never split between training and test")
    add("--out", type=Path, help="a folder for records, adapters and report (default: FILE-compared)")
    add("--check", action="store_true", help="only read the file and report on it")
    add("--multi-label", action=argparse.BooleanOptionalAction, help="several labels a document (default: found out)")
    add("--of", help="what the labels are, such as topic (default: the name of the label column)")
    add("--base-model", default=base_models.DEFAULT, help="a causal LM: hub id or folder (default: %(default)s)")
    add("--seeds", type=int, default=1, help="so many splits and trainings (default: 1)")
    add("--epochs", type=int, help="of both approaches (default: the book's)")
    for name, size in SIZES["quick"].items():
        what = "of each document that are read" if name == "tokens" else "documents at most"
        what += f" (default: {size} on a CPU, {SIZES['full'][name]} on a GPU)"
        add(f"--{name.replace('_', '-')}", type=int, help=what)
    given = parser.parse_args(arguments)
    out = (given.out or given.file.with_name(f"{given.file.stem}-compared")).expanduser()
    try:
        profiles.start()
        data = own_data.read(given.file, given.text, given.label, group=given.group, multi_label=given.multi_label)
        print(data.in_words)
        of = given.of or (given.label[0] if len(given.label) == 1 else "topic")
        data, keys = plan(data, of, **{name: getattr(given, name) for name in ("base_model", "seeds", "epochs", *SIZES["quick"])})
        print(*(f"warning: {line}" for line in data.warnings), sep="\n")
        looked_at = own_data.report(data, base_models.load_tokenizer(given.base_model), keys[0]["options"]["tokens"])
        print(looked_at.to_string(header=False))
        if given.check:
            return
        made = run(data, keys, out)
    except BookError as error:
        sys.exit(str(error))
    scores, (chosen, advice) = evaluation.table(results(made).values()), verdict(made)
    page = report(data, looked_at, made, scores, advice)
    (out / "report.md").write_text(page, encoding="utf-8")
    scores.to_csv(out / "table.csv")
    print(page.partition("## Side by side")[2].strip(), f"\nAll of it is in {out}.")
    if chosen not in TRAINED:
        print("A baseline is not saved: train it with its class in helpers.baselines.")


if __name__ == "__main__":
    main()
