"""Which approach for your data? A table of labelled text in, a verdict and saved classifiers out (chapter 11)."""

import argparse
import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from sklearn.metrics import f1_score
from tqdm.auto import tqdm

from helpers import base_models, evaluation, profiles, prompts, records, tasks
from helpers.checkpoints import write_whole
from helpers.corpora import remove_duplicates
from helpers.errors import BookError
from helpers.evaluation import Predictions
from helpers.lab import own_data, statistics, sweeps, tables
from helpers.lab.approaches import APPROACHES
from helpers.lab.own_data import Labelled

# In their order: the folder of each, what is tried on validation documents, and the share of the time that is over when it is
# done. All values are tried on some training documents; those that are chosen then train on as many as there is time for.
METHODS = {
    "TfidfSvm": ("tfidf", {"C": [0.1, 1.0, 10.0], "analyzer": ["word", "char_wb"]}, 0.03),
    "FineTunedEncoder": ("encoder", {"learning_rate": [1e-4, 2e-4, 4e-4]}, 0.3),
    "FrozenProbe": ("probe", {"C": [0.01, 0.1, 1.0]}, 0.45),
    "EmbeddingHead": ("head", {"learning_rate": [5e-4, 1e-3, 2e-3]}, 0.7),
    "InstructionTuned": ("instruction", {"learning_rate": [5e-4, 1e-3, 2e-3]}, 1.0),
}
FOLDERS = {APPROACHES[kind].name: folder for kind, (folder, _, _) in METHODS.items()}
*BASELINES, HEAD, INSTRUCTION = FOLDERS
TRAINED = (HEAD, INSTRUCTION)
SEARCHED = {"TfidfSvm": 5000, "FineTunedEncoder": 150, "FrozenProbe": 200}  # documents on which values are tried
LEAST = 60  # of them for an approach, however little time there is
NAMED = 20  # labels at most that the prompt of both approaches names
SIZES = {  # documents for validation and test at most, and the tokens of each that are read
    "quick": {"n_validation": 200, "n_test": 400, "tokens": 64},
    "full": {"n_validation": 1000, "n_test": 2000, "tokens": 256},
}


@dataclass(frozen=True)
class Plan:
    """What is compared: the documents that can be used, a task of them for each seed, and how approaches are trained."""

    data: Labelled
    splits: list[tasks.Task] = field(repr=False)
    settings: dict[str, dict]  # by the class of the approach
    base_model: str
    tokens: int  # of each document that are read
    minutes: float  # for all of it, about
    longer: float  # how many times as many tokens the prompt of an approach has as that of the probe

    def key(self, kind: str, seed: int, n: int, epochs: int, chosen: dict | None) -> dict:
        """A run of `sweeps` on `n` training documents, with the settings that were chosen or with those to try."""
        task, settings = self.splits[seed], dict(self.settings[kind])
        name = f"{self.data.name} {task.content_hash()[:8]}"
        sizes = {"n_validation": len(task.validation), "n_test": len(task.test), "n_train": n}
        settings |= ({"epochs": epochs} if "best_epoch" in settings else {}) | (chosen or {"choose": METHODS[kind][1]})
        sweep = {"tasks": [{name: sizes}], "seeds": [seed], "approaches": [{kind: settings}], "base_model": self.base_model}
        (key,) = sweeps.keys(sweep | {"validation": True}, [name])
        return key


def with_fewer(task: tasks.Task, n: int) -> tasks.Task:
    """A task with `n` of its training documents (or all of them) at random, all labels among them."""
    gold = np.array(task.train["label"])
    order = np.random.default_rng(0).permutation(len(gold))
    first = (gold if task.multi_label else np.eye(len(task.labels))[gold])[order].argmax(axis=0)
    rows = [*order[np.unique(first)], *np.delete(order, first)][:n]
    return replace(task, train=task.train.select(rows))


def plan(
    data: Labelled, of: str = "topic", base_model: str = base_models.DEFAULT, seeds: int = 1, minutes: float = 10.0,
    epochs: int | None = None, **sizes,
) -> Plan:  # fmt: skip
    """Cut the documents, split them so many times as there are `seeds`, and say how each approach is trained.

    Args:
        of: what the labels are. Both approaches read "Classify the text by its topic into …", with all labels (chapter 06).
            Of more than `NAMED` labels, or several for a document, they read "The topic of this text is", as the probe does.
        minutes: for all trainings together, about.
        epochs: of what is trained with the Trainer; None: 3 to 8, more for few documents. The best one is kept.
        sizes: those of `SIZES`, by the profile where None. Of a small file a third is kept for test, of a large one a fifth, and
            half as many for validation.
    """
    profile = profiles.current().name
    for name, number in {**sweeps.checked(sizes, "size", SIZES[profile]), "seeds": seeds, "minutes": minutes}.items():
        if number is not None and number <= 0:
            raise BookError(f"{name} is {number}, but it has to be more than 0.")
    size, data = {name: sizes.get(name) or most for name, most in SIZES[profile].items()}, own_data.cut(data)
    tokenizer, suffix = base_models.load_tokenizer(base_model), f"\n\nThe {of} of this text is"
    prompts.check_open_end(tokenizer)
    prompt = {"suffix": suffix}
    if not data.multi_label and len(data.labels) <= NAMED:
        prompt = {"prefix": f"Classify the text by its {of} into {{labels}}.\n\ntext: ", "suffix": "\n\nlabel:"}
    frame = "".join(prompt.values()).replace("{labels}", ", ".join(data.labels))
    room = tokenizer.model_max_length - max(len(tokenizer(f"{frame} {label}").input_ids) for label in data.labels) - 8
    if size["tokens"] > room:
        raise BookError(f"--tokens {size['tokens']} do not fit: {base_model} has room for {room} beside the question.")
    shorten, conflicting = tasks.first_tokens(tokenizer, size["tokens"]), "unite" if data.multi_label else "drop"
    documents = remove_duplicates([each._replace(text=shorten(each.text)) for each in data.documents], conflicting)
    n, least = len(documents), 2 if data.multi_label else len(data.labels)
    # groups cannot be halved: of the fifth and the tenth of them that `tasks.split` sets aside, not all is asked for
    n_test = n // 8 if data.documents[0].group else max(n // 5, min(n // 3, 300))
    parts = {"n_test": n_test, "n_validation": n_test // 2}
    parts = {name: sizes.get(name) or max(least, min(size[name], n)) for name, n in parts.items()}
    splits = [tasks.split(data.name, documents, **parts, seed=seed) for seed in range(seeds)]
    unseen = sorted({label for task in splits for label, count in task.counts()["test"].items() if not count})
    lines = [f"{label!r} has no test document in one of the splits: macro-F1 there is that of the others." for label in unseen]

    decoder = base_models.on_meta(base_model).base_model
    like_llama = all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm"))
    upper = min(APPROACHES["EmbeddingHead"].n_layers, len(decoder.layers)) if profile == "quick" and like_llama else None
    trained = {"best_epoch": True} | ({"epochs": epochs} if epochs else {})
    settings = {"TfidfSvm": {}, "FineTunedEncoder": trained, "FrozenProbe": {"suffix": suffix}}
    settings["EmbeddingHead"] = settings["InstructionTuned"] = prompt | {"n_layers": upper} | trained
    n_read = np.mean([len(ids) for ids in tokenizer([each.text for each in documents[:200]]).input_ids])
    n_frame, n_suffix = (len(tokenizer(each).input_ids) for each in (frame, suffix))
    data, longer = replace(data, warnings=(*data.warnings, *lines)), (n_read + n_frame) / (n_read + n_suffix)
    return Plan(data, splits, settings, base_model, size["tokens"], minutes, float(longer))


def run(plan: Plan, out: str | Path, progress: bool = True) -> list[dict]:
    """Train what the folder `out` does not hold yet, and return the record of each approach that could be trained, for each seed.

    All of the first split are saved, with a model card each; why a training failed is printed. A record also has `n_train`, the
    values that were `tried`, and the `minutes` with which all documents would be used. BookError: `out` holds something else, or
    nothing could be trained.
    """
    out, made = Path(out).expanduser(), []
    asked = {**asdict(replace(plan, data=None, splits=[])), "documents": [task.content_hash() for task in plan.splits]}
    note, asked = out / "compared.json", json.dumps(asked | {"profile": profiles.current().name}, indent=2)
    held = note.read_text(encoding="utf-8") if note.exists() else None
    if held != asked and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BookError(
            f"{out} holds something else, or a comparison of other documents or with other settings. "
            "Give a new folder; nothing was overwritten."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(note, asked)
    base_models.fetch(base_models.ENCODER)  # which says so if that takes time
    total = len(METHODS) * len(plan.splits)
    with tqdm(total=total, bar_format="{bar:20} {elapsed} {desc}", disable=None if progress else True) as bar:
        for seed in range(len(plan.splits)):
            made += _of_split(plan, seed, out, bar)
    if not made:
        raise BookError(f"{plan.data.name}: nothing could be run. The lines above say why.")
    for name, predictions in results(each for each in made if not each["key"]["seed"]).items():
        [record] = [each for each in made if each["name"] == name and not each["key"]["seed"]]
        _describe(plan, record, predictions, out / FOLDERS[name])
    return made


def _of_split(plan: Plan, seed: int, out: Path, bar: tqdm) -> Iterator[dict]:
    """The records of one split: values are tried on some training documents, then the chosen ones on as many as time allows."""
    passes = 1200 if plan.data.multi_label else 600  # documents that a training reads in all its epochs, at least
    to_read = 0.1  # seconds for a document, until the frozen probe tells
    budget, n_all, spent, share_before = 60 * plan.minutes / len(plan.splits), len(plan.splits[seed].train), 0.0, 0.0
    for kind, (folder, values, share) in METHODS.items():
        left = max(share * budget - spent, (share - share_before) * budget / 2)  # seconds
        share_before, given = share, plan.settings[kind].get("epochs")
        n_rates = len(values.get("learning_rate", ()))

        can_read = left / 2 / to_read / (n_rates + 1)  # documents in all epochs of a trial, in half of the time
        n = SEARCHED.get(kind) or int(can_read / (3 if can_read > passes else 6))
        n = min(n_all, max(n, LEAST, len(plan.data.labels)))
        n = n if n < 0.8 * n_all else n_all
        epochs = given or _epochs(passes if kind in SEARCHED else min(can_read, passes), n)
        record = _made(plan, (kind, seed, n, epochs, None), out / folder, left, bar)
        bar.update()
        if record is None:
            continue
        seconds, n, tried = _seconds(record), record["key"]["options"]["n_train"], record["tried"]
        if kind == "FrozenProbe":
            to_read = plan.longer * tried[0]["training_seconds"] / n

        n_trials, epochs_on_all = len(tried) if n_rates else 1, given or _epochs(passes, n_all)
        for_each = 1.2 * seconds / n / n_trials * epochs_on_all / epochs  # seconds a document of the training that follows
        cheap = kind == "TfidfSvm" or (kind in SEARCHED and for_each * n_all < budget)  # baselines read all, if that can be
        fits = n_all if cheap else min(n_all, int((left - seconds) / for_each))
        if fits > 1.25 * n:
            run = (kind, seed, fits, given or _epochs(passes, fits), record["chosen"]["settings"])
            if more := _made(plan, run, out / folder, left - seconds, bar):
                record, seconds = more, seconds + _seconds(more)
        spent += seconds
        on_all = record["key"]["options"]["n_train"] == n_all
        needed = 0 if on_all else (_seconds_of(tried) + for_each * n_all) / left  # times the minutes there were
        yield {**record, "tried": tried, "n_tried": n, "minutes": plan.minutes * max(1, needed)}


def _epochs(passes: float, n: int) -> int:
    return min(8, max(3, round(passes / n)))


def _made(plan: Plan, run: tuple, folder: Path, seconds: float, bar: tqdm) -> dict | None:
    key, (kind, seed, n, _, chosen), path = plan.key(*run), run, folder.with_name("records.jsonl")
    what = "training" if chosen else "trying settings"
    bar.set_description_str(f"{APPROACHES[kind].name}: {what} on {n:,} documents, about {seconds / 60:.1f} minutes left for it")
    if folder.exists() and not (folder / "approach.json").exists():
        shutil.rmtree(folder)  # a run was stopped while it saved
    with contextlib.redirect_stderr(io.StringIO()):  # what is said of a search stands in the report
        failed = sweeps.make([key], path, lambda key: None if seed else folder, False, with_fewer(plan.splits[seed], n))
    tqdm.write("\n".join(failed), file=sys.stderr, end="\n" * len(failed))
    return next((record for record in records.read(path) if record["key"] == key), None)


def _seconds(record: dict) -> float:
    """What a run took, but for loading."""
    n_test, cost = len(record["gold"]), record["cost"]
    tried = record.get("tried") or [{"training_seconds": cost["training_seconds"], "epochs": record.get("epochs", [])}]
    return _seconds_of(tried) + cost["seconds"] * (1 + len(record["validation"]["gold"]) / n_test)


def _seconds_of(tried: list[dict]) -> float:
    return sum(row["training_seconds"] + sum(each["seconds"] for each in row.get("epochs", [row])) for row in tried)


def results(made: Iterable[dict], validation: bool = False) -> dict[str, Predictions]:
    """Every approach's predictions on all test sets, or validation sets; several labels are decided as is best on validation."""
    found: dict[str, list[Predictions]] = {}
    for record in made:
        predictions = (records.validation_of if validation else records.predictions_of)(record)
        if predictions.multi_label:
            predictions = statistics.decide(predictions, records.validation_of(record), "macro_f1")
        found.setdefault(predictions.approach, []).append(predictions)
    return {name: evaluation.pool(each) if len(each) > 1 else each[0] for name, each in found.items()}


def of_labels(tested: dict[str, Predictions]) -> pd.DataFrame:
    """The F1 of each label in percent, a column for each approach, and how many test documents have it, the rarest first."""
    first = next(iter(tested.values()))
    counts = first.gold.sum(axis=0) if first.multi_label else np.bincount(first.gold, minlength=len(first.labels))
    options = {"average": None, "labels": range(len(first.labels)), "zero_division": 0}
    columns = {name: 100 * f1_score(each.gold, each.predicted, **options) for name, each in tested.items()}
    return pd.DataFrame({"test documents": counts} | columns, first.labels).sort_values("test documents", kind="stable")


def verdict(made: list[dict]) -> tuple[str, str]:
    """The name of the approach to take, and why in Markdown, with the intervals behind it.

    The best baseline and the better of the two approaches are chosen on validation documents and judged on test documents. One of
    two is called better where the interval of the difference in macro-F1 leaves zero out; all intervals together hold with 95 %.
    Of two that cannot be told apart the baseline is recommended, which is cheaper, and of the two approaches the one that is
    ahead on validation.
    """
    tested = results(made)
    known = {name: evaluation.evaluate(each)["macro_f1"] for name, each in results(made, validation=True).items()}
    baseline, trained = (max((one for one in of if one in tested), key=known.get, default=None) for of in (BASELINES, TRAINED))
    lines = [f"- **{name}** could not be trained." for name in FOLDERS if name not in tested]
    if not trained or not baseline:
        return trained or baseline, "\n".join([f"Take **{trained or baseline}**.", "", *lines])
    both = set(TRAINED) <= set(tested)
    if both:
        sign, line = _difference(tested[HEAD], tested[INSTRUCTION], 0.975)
        lines, trained = [*lines, line], {1: HEAD, -1: INSTRUCTION, 0: trained}[sign]
    sign, line = _difference(tested[trained], tested[baseline], 0.975 if both else 0.95)
    why = {1: f"better than the best baseline here, {baseline}.", -1: f"better than {trained}, and cheaper."}.get(
        sign, f"{len(tested[trained].gold):,} test documents do not show that {trained} is better, and it costs more."
    )
    chosen = trained if sign > 0 else baseline
    return chosen, "\n".join([f"Take **{chosen}**: {'it is ' * bool(sign)}{why}", "", *lines, line])


def _difference(a: Predictions, b: Predictions, confidence: float) -> tuple[int, str]:
    """1 if `a` is better, -1 if `b` is, 0 if that cannot be told; and the line that says so."""
    found = {name: 100 * value for name, value in evaluation.compare(a, b, confidence=confidence).items()}
    sign = int(found["macro_f1_low"] > 0) - int(found["macro_f1_high"] < 0)
    what = {1: f"{a.approach} is better", -1: f"{b.approach} is better", 0: "no difference is shown"}[sign]
    metrics = [
        f"{metric} {found[f'{of}difference']:+.1f} points ({found[f'{of}low']:+.1f} to {found[f'{of}high']:+.1f})"
        for metric, of in (("macro-F1", "macro_f1_"), ("accuracy", ""))
    ]
    return sign, f"- {a.approach} against {b.approach}: {', '.join(metrics)}, at {100 * confidence:.1f} %: {what}."


def _describe(plan: Plan, record: dict, predictions: Predictions, folder: Path) -> None:
    """Say beside a saved approach how it is used, and in a model card for whom and how well."""
    use = {"tokens": plan.tokens, "text": list(plan.data.columns)}
    if predictions.multi_label:
        use["decision"] = statistics.best_decision(records.validation_of(record), "macro_f1")
    note = json.loads((folder / "approach.json").read_text(encoding="utf-8"))
    write_whole(folder / "approach.json", json.dumps(note | {"use": use}, indent=2, ensure_ascii=False))
    base_models.load_tokenizer(plan.base_model).save_pretrained(folder / "tokenizer")
    base = f"HuggingFaceTB/{plan.base_model}" if plan.base_model == base_models.DEFAULT else plan.base_model
    scores, labels = evaluation.evaluate(predictions), of_labels({"F1 %": predictions}).round(1).to_markdown()
    words = {"data": plan.data, "record": record, "base": base, "folder": folder, "use": use, "scores": scores, "labels": labels}
    words["n_splits"] = len(plan.splits)
    write_whole(folder / "README.md", _page("model_card.md", **words, **record["key"]))


def _page(template: str, **words) -> str:
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return jinja2.Template(text, keep_trailing_newline=True).render(**words)


def main(arguments: list[str] | None = None) -> None:
    """Compare a classification head and instruction tuning, with baselines, on a table of labelled text, and save all of them.

    Learning rates are chosen on validation documents. Stop it whenever you like: it goes on where it was.
    """
    examples = Path(__file__).with_name("compare_examples.txt").read_text(encoding="utf-8")
    options = {"epilog": examples, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m helpers.compare", description=main.__doc__, **options)
    add = parser.add_argument
    add("file", type=Path, help="a .csv, .tsv, .jsonl or .parquet file with a row for each document")
    add("--text", required=True, nargs="+", help="the column with the texts, or several to be joined")
    add("--label", required=True, nargs="+", help="the column with the labels, or a column for each label")
    add("--group", help="a column; what has the same in it is never split between training and test")
    add("--out", type=Path, help="a folder for records, classifiers and report (default: FILE-compared)")
    add("--check", action="store_true", help="only read the file and report on it")
    add("--minutes", type=float, default=10, help="for all trainings, about; the more, the more rows are used (default: 10)")
    add("--encoding", help="of a text file, such as cp1252 (default: found out)")
    add("--multi-label", action=argparse.BooleanOptionalAction, help="several labels a document (default: found out)")
    add("--of", help="what the labels are, such as topic (default: the name of the label column)")
    add("--base-model", default=base_models.DEFAULT, help="a causal LM: hub id or folder (default: %(default)s)")
    add("--seeds", type=int, default=1, help="so many splits, which share the minutes (default: 1)")
    add("--epochs", type=int, help="at most; the best one is kept (default: 3 to 8, more for few documents)")
    for name, what in {"n_test": "test documents at most, and no fewer if given", "n_validation": "the same for validation",
                       "tokens": "of each document that are read"}.items():  # fmt: skip
        what += f" (default: {SIZES['quick'][name]} on a CPU, {SIZES['full'][name]} on a GPU)"
        add(f"--{name.replace('_', '-')}", type=int, help=what)
    given = parser.parse_args(arguments)
    out = (given.out or given.file.with_name(f"{given.file.stem}-compared")).expanduser()
    try:
        tables.utf8_streams()
        profiles.start()
        more = {"group": given.group, "multi_label": given.multi_label, "encoding": given.encoding}
        data = own_data.read(given.file, given.text, given.label, **more)
        print(data.in_words)
        names = ("base_model", "seeds", "minutes", "epochs", *SIZES["quick"])
        of = given.of or (given.label[0] if len(given.label) == 1 else "topic")
        planned = plan(data, of, **{name: getattr(given, name) for name in names})
        print(*(f"warning: {line}" for line in planned.data.warnings), sep="\n")
        looked_at = own_data.report(planned.data, base_models.load_tokenizer(given.base_model), planned.tokens)
        print(looked_at.to_string(header=False))
        if given.check:
            return
        made = run(planned, out)
    except BookError as error:
        sys.exit(str(error))
    page = report(planned, looked_at, made, out)
    print(page.partition("## Side by side")[2].strip(), f"\nAll of it is in {out}.")


def report(plan: Plan, looked_at: pd.DataFrame, made: list[dict], out: Path) -> str:
    """All of it on one page of Markdown, which is also written to `out`, with its tables as CSV."""
    tested, (chosen, advice) = results(made), verdict(made)
    scores, labels = evaluation.table(tested.values()), of_labels(tested)
    used = {each["name"]: each["key"]["options"]["n_train"] for each in made}
    scores.insert(0, "n_train", [used[name] for name in tested])
    scores.to_csv(out / "table.csv")
    labels.to_csv(out / "labels.csv")
    shown = evaluation.show(scores)
    shown.insert(0, "trained on", scores["n_train"].map("{:,}".format))
    tables = {"looked_at": looked_at, "scores": shown, "labels": labels.round(1).astype(object)}
    tables = {name: table.to_markdown(disable_numparse=True) for name, table in tables.items()}
    words = {"plan": plan, "made": made, "advice": advice, "folder": out / FOLDERS[chosen], "n_all": len(plan.splits[0].train)}
    words["suffix"] = Path(plan.data.name).suffix
    page = _page("report.md", **words, **tables, minutes=max(each["minutes"] for each in made))
    write_whole(out / "report.md", page)
    return page


if __name__ == "__main__":
    main()
