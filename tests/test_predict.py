"""Files in and out by any saved approach: nothing lost, nothing doubled, nothing computed twice."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from filelock import FileLock

from helpers.approach import Approach
from helpers.baselines import FineTunedEncoder, FrozenProbe, Majority, TfidfSvm
from helpers.embedding_head import EmbeddingHead
from helpers.instruction import InstructionTuned
from helpers.lab import predict
from helpers.tasks import Task, first_tokens

ROOT = Path(__file__).resolve().parent.parent
MAKE = {
    "majority": lambda tiny: Majority(),
    "tfidf": lambda tiny: TfidfSvm(),
    "probe": lambda tiny: FrozenProbe(tiny),
    "encoder": lambda tiny: FineTunedEncoder(epochs=1),
    "head": lambda tiny: EmbeddingHead(tiny, n_layers=1, rank=4, epochs=1),
    "instruction": lambda tiny: InstructionTuned(tiny, n_layers=1, rank=4, epochs=1),
}


@pytest.fixture(scope="module")
def saved(tiny_model, tiny_task, tmp_path_factory):
    made, folder = {}, tmp_path_factory.mktemp("saved")

    def get(name):
        if name not in made:
            made[name] = MAKE[name](tiny_model).fit(tiny_task).save(folder / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def several(tiny_task, tmp_path_factory):
    """A saved approach for several labels a text."""
    splits = {}
    for split in ("train", "validation", "test"):
        rows = getattr(tiny_task, split)
        gold = [[int(n == label or (n == 0 and row % 2)) for n in range(3)] for row, label in enumerate(rows["label"])]
        splits[split] = Dataset.from_dict({"text": rows["text"], "label": gold})
    task = Task("tiny, several", tiny_task.labels, **splits, multi_label=True)
    return TfidfSvm().fit(task).save(tmp_path_factory.mktemp("several") / "tfidf")


TABLE = pd.DataFrame(
    {
        "id": ["007", "NA", "", "x,y", "5"],
        "text": ["the goal and one trophy", "a bank; the market", "", 'the "robot" and\none chip', "Zoë's \r laptop"],
        "more": ["1.0", "null", "é", "", "[1]"],
    }
)


def write(table, path):
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in table.to_dict("records")), encoding="utf-8")
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",", quoting=1, lineterminator="\n")
    return path


def read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".jsonl":
        return pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    options = {"dtype": str, "keep_default_na": False, "index_col": False, "lineterminator": "\n"}
    return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", **options)


def command(*arguments):
    predict.main([*map(str, arguments)])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_rows_columns_and_cells_stay_and_two_columns_are_added(suffix, saved, tmp_path, capsys):
    path, out = write(TABLE, tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}"
    command(saved("tfidf"), path, "--out", out)
    got, approach = read(out), Approach.load(saved("tfidf"))
    assert list(got.columns) == ["id", "text", "more", "predicted", "probability"]
    assert got[["id", "text", "more"]].to_dict("list") == TABLE.to_dict("list")
    filled = [0, 1, 3, 4]
    want = approach.predict_proba([" ".join(TABLE["text"][row].split()) for row in filled])
    assert got["predicted"][filled].tolist() == [approach.labels[row.argmax()] for row in want]
    assert got["probability"][filled].astype(float).tolist() == pytest.approx(want.max(axis=1), abs=1e-5)
    assert got["predicted"][2] in ("", None) or got["predicted"].isna()[2]
    assert "5 rows are in" in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == sorted([path.name, out.name])


@pytest.mark.parametrize("name", MAKE)
def test_every_saved_approach_does(name, saved, tmp_path):
    path = write(TABLE, tmp_path / "in.jsonl")
    command(saved(name), path, "--out", tmp_path / "out.jsonl")
    want = Approach.load(saved(name)).predict_proba([" ".join(text.split()) for text in TABLE["text"] if text])
    got = read(tmp_path / "out.jsonl")["probability"].dropna()
    assert got.tolist() == pytest.approx(want.max(axis=1), abs=1e-5)


@pytest.mark.parametrize("decision", [None, {"threshold": 0.4, "at_least_one": True}, {"threshold": 2.0, "at_least_one": True}])
def test_several_labels_are_joined_and_have_a_column_each_and_are_decided_as_was_chosen(decision, several, tmp_path):
    note = json.loads((several / "approach.json").read_text())
    (several / "approach.json").write_text(json.dumps(note | {"use": {"decision": decision} if decision else {}}))
    command(several, write(TABLE, tmp_path / "in.csv"), "--out", tmp_path / "out.csv")
    got, approach = read(tmp_path / "out.csv").drop(2), Approach.load(several)
    want = approach.predict_proba([" ".join(text.split()) for text in TABLE["text"] if text])
    columns = [f"probability of {label}" for label in approach.labels]
    assert np.allclose(got[columns].astype(float), want, atol=1e-5)
    threshold = decision["threshold"] if decision else 0.5
    for row, said in zip(want, got["predicted"], strict=True):
        reached = [label for label, one in zip(approach.labels, row, strict=True) if one >= threshold]
        assert said == ";".join(reached or ([approach.labels[row.argmax()]] if decision else []))


def test_texts_are_cut_as_in_training_wherever_it_is_loaded(saved, tmp_path):
    head = Approach.load(saved("head"))
    note = json.loads((saved("head") / "approach.json").read_text())
    head.save(tmp_path / "head")
    (tmp_path / "head" / "approach.json").write_text(json.dumps(note | {"use": {"tokens": 3}}))
    head.tokenizer.save_pretrained(tmp_path / "head" / "tokenizer")
    long = "the goal and the trophy and a robot in a bank " * 500
    cut = first_tokens(head.tokenizer, 3)(long)
    assert np.allclose(Approach.load(tmp_path / "head").predict_proba([long]), head.predict_proba([cut]), atol=1e-6)


def test_parquet_keeps_its_types_and_takes_every_kind_of_text(saved, tmp_path):
    texts = pyarrow.array([text or None for text in TABLE["text"]])
    others = {"n": pyarrow.array([1, 2, 3, 4, 5]), "when": pyarrow.array([0] * 5, pyarrow.timestamp("us"))}
    table = pyarrow.table({"text": texts.dictionary_encode()} | others)
    view = table.set_column(0, "text", texts.cast(pyarrow.string_view()))
    for name, each in {"category": table, "view": view}.items():
        pyarrow.parquet.write_table(each, tmp_path / f"{name}.parquet")
        command(saved("tfidf"), tmp_path / f"{name}.parquet", "--out", tmp_path / f"{name}-out.parquet")
        got = pyarrow.parquet.read_table(tmp_path / f"{name}-out.parquet")
        assert got.schema.field("n").type == pyarrow.int64() and pyarrow.types.is_timestamp(got.schema.field("when").type)
        assert got.column("text").to_pylist() == [text or None for text in TABLE["text"]]
        assert got.column("predicted").to_pylist()[2] is None and got.column("predicted").null_count == 1


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_old_encodings_come_out_as_utf_8(encoding, saved, tmp_path):
    rows = [("Grüße aus Zürich: a goal", "ä"), ("the bank – “market”", "ö"), ("a robot", "ü")]
    pd.DataFrame(rows, columns=["text", "größe"]).to_csv(tmp_path / "in.csv", index=False, encoding=encoding)
    command(saved("tfidf"), tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    got = read(tmp_path / "out.csv")
    assert list(zip(got["text"], got["größe"], strict=True)) == rows


def test_semicolons_and_a_repeated_heading_stay(saved, tmp_path):
    (tmp_path / "in.csv").write_text("x;text;x\n1;the goal;2\n3;a bank, too;4\n")
    command(saved("tfidf"), tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "x;text;x;predicted;probability" and lines[2].startswith("3;a bank, too;4;")


def test_half_a_character_comes_out_as_it_came(saved, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "the goal \\ud83d"}\n{"text": "a bank"}\n')
    command(saved("tfidf"), tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert [row["text"] for row in map(json.loads, (tmp_path / "out.jsonl").open())] == ["the goal \ud83d", "a bank"]


def test_standard_input_to_standard_output(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "the goal", "n": 1}\n{"text": "", "n": 2}\n'))
    command(saved("tfidf"), "-")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (
        first["n"] == 1
        and first["predicted"] == "sports"
        and second == {"text": "", "n": 2, "predicted": None, "probability": None}
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("text,n\nthe goal,1\n"))
    command(saved("tfidf"), "-", "--format", "csv")
    assert capsys.readouterr().out.startswith("text,n,predicted,probability\nthe goal,1,sports,")


def test_streams_are_utf_8_whatever_the_locale_says(saved):
    line = json.dumps({"text": "Grüße: die Fähre wartet 🚢"}, ensure_ascii=False)
    said = subprocess.run(
        [sys.executable, "-m", "helpers.predict", str(saved("tfidf")), "-"],
        input=line.encode(),
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        check=True,
    ).stdout
    assert json.loads(said)["text"] == json.loads(line)["text"]


# Stopped runs


def many(n=400):
    return pd.DataFrame({"id": range(n), "text": [f"the coach and {each} goals in the stadium" for each in range(n)]}).astype(str)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_stopped_run_goes_on_without_computing_anything_twice(suffix, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "ROWS", 64)
    path, out = write(many(), tmp_path / f"in{suffix}"), tmp_path / f"out{suffix}"
    read_so_far, usual = [], TfidfSvm.predict_proba

    def until(most):
        def predict_proba(self, texts):
            if len(read_so_far) + len(texts) > most:
                raise KeyboardInterrupt
            read_so_far.extend(texts)
            return usual(self, texts)

        return predict_proba

    monkeypatch.setattr(TfidfSvm, "predict_proba", until(200))
    with pytest.raises(KeyboardInterrupt):
        command(saved("tfidf"), path, "--out", out)
    assert not out.exists() and len(read_so_far) == 192
    (part,) = tmp_path.glob(f"out{suffix}.*.part")
    part.write_bytes(part.read_bytes() + b"torn")  # by a kill in the middle of a write
    monkeypatch.setattr(TfidfSvm, "predict_proba", until(10**9))
    command(saved("tfidf"), path, "--out", out)
    assert sorted(read_so_far) == sorted(many()["text"]) and read(out)["id"].tolist() == many()["id"].tolist()
    monkeypatch.setattr(TfidfSvm, "predict_proba", usual)
    command(saved("tfidf"), path, "--out", tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == out.read_bytes()


def test_a_killed_process_loses_nothing(saved, tmp_path):
    path, out = write(many(6000), tmp_path / "in.csv"), tmp_path / "out.csv"
    begun = [sys.executable, "-m", "helpers.predict", str(saved("head")), str(path), "--out", str(out)]
    process, deadline = subprocess.Popen(begun, cwd=ROOT, stderr=subprocess.DEVNULL), time.time() + 240

    def kept():
        return sum(part.stat().st_size for part in tmp_path.glob("out.csv.*.part"))

    while time.time() < deadline and kept() < 10_000 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert kept() >= 10_000 and not out.exists()
    command(saved("head"), path, "--out", out)
    got = read(out)
    assert got["id"].tolist() == many(6000)["id"].tolist()
    want = Approach.load(saved("head")).predict_proba(got["text"].tolist())
    assert np.allclose(got["probability"].astype(float), want.max(axis=1), atol=1e-4)
    assert sorted(os.listdir(tmp_path)) == ["in.csv", "out.csv"]


def test_what_was_kept_of_another_file_is_not_taken(saved, tmp_path, monkeypatch):
    path, out, usual = write(many(), tmp_path / "in.csv"), tmp_path / "out.csv", predict.write
    monkeypatch.setattr(predict, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command(saved("tfidf"), path, "--out", out)
    assert len(list(tmp_path.glob("out.csv.*.part"))) == 1
    monkeypatch.setattr(predict, "write", usual)
    write(many(300), path)
    command(saved("tfidf"), path, "--out", out)
    want = Approach.load(saved("tfidf")).predict_proba(read(path)["text"].tolist())
    assert read(out)["probability"].astype(float).tolist() == pytest.approx(want.max(axis=1), abs=1e-5)


def test_nothing_is_overwritten_or_written_twice_at_a_time(saved, tmp_path):
    path, out = write(many(), tmp_path / "in.csv"), tmp_path / "out.csv"
    out.write_text("years of work")
    with pytest.raises(SystemExit, match="out.csv exists already; nothing was overwritten. Give another --out"):
        command(saved("tfidf"), path, "--out", out)
    assert out.read_text() == "years of work"
    with FileLock(tmp_path / "other.csv.lock"), pytest.raises(SystemExit, match="is being written by another process"):
        command(saved("tfidf"), path, "--out", tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        ("text,label\na,b,c\n", (), "in.csv, line 2: 3 fields between ','"),
        ("body,label\na,b\n", (), "in.csv: There is no column 'text'. Choose one of: body, label"),
        ("text,predicted\na,b\n", (), "in.csv has a column 'predicted' already. Rename it, or it would be lost"),
        ("text\n", (), "in.csv has no rows"),
        ("text\na\n", ("--out", "out.jsonl"), "out.jsonl has another ending than in.csv"),
        ("text\nGr\xfc\xdfe\n".encode("latin-1"), ("--encoding", "utf-8"), "cannot be read as utf-8 .* --encoding latin-1"),
        ("text\na\n", ("--encoding", "klingon"), "cannot be read as klingon"),
    ],
)
def test_refused_in_one_line_before_anything_is_computed(content, more, said, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    more = more if "--out" in more else (*more, "--out", "out.csv")
    with pytest.raises(SystemExit, match=said) as caught:
        command(saved("tfidf"), "in.csv", *more)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))


def test_no_approach_and_no_file_and_parquet_to_a_terminal(saved, tmp_path):
    with pytest.raises(SystemExit, match="holds no saved approach"):
        command(tmp_path, tmp_path / "in.csv")
    with pytest.raises(SystemExit, match="There is no file"):
        command(saved("tfidf"), tmp_path / "in.csv")
    with pytest.raises(SystemExit, match="Parquet needs an --out"):
        command(saved("tfidf"), write(TABLE, tmp_path / "in.parquet"))
    with pytest.raises(SystemExit, match="leave out --out"):
        command(saved("tfidf"), "-", "--out", tmp_path / "out.jsonl")


# Folders


def begun(model, folder, out):
    """Another process that does so."""
    command = [sys.executable, "-m", "helpers.predict", str(model), str(folder), "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def folder(tmp_path):
    """Three files, of which each has 1,000 rows."""
    (tmp_path / "documents").mkdir()
    for number, suffix in enumerate((".csv", ".parquet", ".parquet")):
        write(many(3000)[1000 * number : 1000 * number + 1000], tmp_path / "documents" / f"{number}{suffix}")
    return tmp_path / "documents"


def of_folder(folder):
    return pd.concat([read(path) for path in sorted(folder.iterdir())], ignore_index=True)


def test_all_files_of_a_folder_but_those_that_are_done_and_a_refused_file_stops_no_other(folder, saved, tmp_path, capsys):
    out = tmp_path / "labelled"
    (folder / "notes.txt").write_text("no table")
    out.mkdir()
    (out / "0.csv").write_text("done")
    command(saved("tfidf"), folder, "--out", out)
    assert capsys.readouterr().out == f"2 files with 2,000 rows were labelled. They are in {out}.\n"
    assert (out / "0.csv").read_text() == "done" and sorted(os.listdir(out)) == ["0.csv", "1.parquet", "2.parquet"]
    (out / "0.csv").unlink()
    (out / "2.parquet").unlink()
    (folder / "0.csv").write_text("body\nx\n")
    with pytest.raises(SystemExit, match=r"0.csv: There is no column 'text'.* \(1 of 3 files; the others are in") as caught:
        command(saved("tfidf"), folder, "--out", out)
    assert "\n" not in str(caught.value) and sorted(os.listdir(out)) == ["1.parquet", "2.parquet"]
    (folder / "1.parquet").write_bytes(b"\0" * 100)
    (folder / "0.csv").unlink()
    command(saved("tfidf"), folder, "--out", out)  # done is done
    assert capsys.readouterr().out.startswith("0 files with 0 rows")


def test_processes_share_a_folder_and_one_that_is_killed_loses_and_doubles_nothing(folder, saved, tmp_path):
    out = tmp_path / "labelled"
    first, deadline = begun(saved("head"), folder, out), time.time() + 300
    while not list(out.glob("0.csv.*.part")) and first.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # in the middle of a file, which it has locked
    second = begun(saved("head"), folder, out)
    while not (out / "1.parquet").exists() and second.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert not (out / "0.csv").exists()
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and second.wait() == 0
    assert sorted(os.listdir(out)) == ["0.csv", "1.parquet", "2.parquet"]
    got = of_folder(out)
    assert got["id"].tolist() == many(3000)["id"].tolist()
    want = Approach.load(saved("head")).predict_proba(got["text"].tolist())
    assert np.allclose(got["probability"].astype(float), want.max(axis=1), atol=1e-4)


def test_a_file_that_another_process_writes_is_left_to_it(folder, saved, tmp_path):
    out = tmp_path / "labelled"
    out.mkdir()
    with FileLock(f"{out / '1.parquet'}.lock"):
        command(saved("tfidf"), folder, "--out", out)
        assert sorted(path.name for path in out.glob("*[a-z]") if path.suffix != ".lock") == ["0.csv", "2.parquet"]
    command(saved("tfidf"), folder, "--out", out)
    assert sorted(os.listdir(out)) == ["0.csv", "1.parquet", "2.parquet"]


def test_folders_that_cannot_be_labelled_in_one_line(folder, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ((tmp_path / "empty", "--out", tmp_path / "out"), "There are no files in .* that end in .csv, .tsv"),
        ((folder,), "is a folder: give another one as --out"),
        ((folder, "--out", folder / "0.csv"), "is a folder: give another one as --out"),
    ):
        with pytest.raises(SystemExit, match=said) as caught:
            command(saved("tfidf"), *arguments)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_text_that_is_too_long_is_named_with_its_file(folder, saved, tmp_path):
    write(pd.DataFrame({"text": ["a robot " * (30_000 if row == 5 else 1) for row in range(8)]}), folder / "3.parquet")
    with pytest.raises(SystemExit, match=r"^3.parquet: Text 5 has .* \(1 of 4 files; the others are in"):
        command(saved("head"), folder, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("[0-2].*[a-z]"))) == 3


def test_the_command_has_a_door_and_examples(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["predict", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("helpers.predict", run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("python -m helpers.predict ") >= 4 and "standard input" in said


# What a saved approach stands on


def test_a_base_model_in_a_folder_is_found_from_anywhere_and_other_weights_are_refused(tiny_task, tmp_path, monkeypatch):
    import torch
    from conftest import save_tiny
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    head = EmbeddingHead("models/tiny", n_layers=1, rank=4, epochs=1).fit(tiny_task)
    want = head.predict_proba(["the goal"])
    head.save("saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert np.allclose(Approach.load("../saved").predict_proba(["the goal"]), want, atol=1e-5)
    weights = tmp_path / "models" / "tiny" / "model.safetensors"
    other = {name: torch.randn_like(each) for name, each in load_file(weights).items()}
    save_file(other, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="was trained on other weights than .*tiny holds now"):
        Approach.load("../saved")
