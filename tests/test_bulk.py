"""Parquet files in and out: nothing lost, nothing doubled, whatever happens to a worker."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from datasets import Dataset

from helpers import bulk, tasks
from helpers.embedding_head import EmbeddingHead
from helpers.errors import BookError

N_FILES, N_ROWS = 4, 1500


@pytest.fixture(scope="module")
def saved(tiny_model, tiny_task, tmp_path_factory):
    approach = EmbeddingHead(tiny_model, n_layers=1, rank=4, epochs=1).fit(tiny_task)
    return approach.save(tmp_path_factory.mktemp("saved") / "head")


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(N_FILES):
        ids = range(number * N_ROWS, (number + 1) * N_ROWS)
        rows = pd.DataFrame({"id": ids, "text": [f"the coach and {each} goals in the stadium" for each in ids]})
        rows.to_parquet(folder / f"{number}.parquet", index=False)
    return folder


@pytest.fixture
def in_time():
    """A test that waits for Ray ends after three minutes, whatever Ray does."""

    def end(number, frame):
        raise TimeoutError("Ray did not end")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def expected(saved, rows):
    said = EmbeddingHead.load(saved).predict(Dataset.from_dict({"text": rows["text"].tolist(), "label": [0] * len(rows)}))
    return said.probabilities, np.array(said.labels)[said.predicted]


def test_a_file_gets_the_approachs_labels_and_keeps_its_columns(saved, documents, tmp_path):
    rows = pd.read_parquet(documents / "0.parquet")
    rows.loc[[3, 7], "text"] = [None, "  "]  # are kept, without a label
    rows.to_parquet(documents / "0.parquet", index=False)
    (tmp_path / "out").mkdir()
    classifier = bulk.Classifier(saved, tmp_path / "out", "text", batch_size=16, threads=1)
    done = classifier({"path": np.array([str(documents / "0.parquet")])})
    assert done["documents"].tolist() == [N_ROWS] and done["refused"].tolist() == [""]
    got = pd.read_parquet(tmp_path / "out" / "0.parquet")
    assert got[["id", "text"]].equals(rows) and list(got.columns) == ["id", "text", "predicted", "probabilities"]
    for column in bulk.COLUMNS:
        assert got[column].isna().to_numpy().nonzero()[0].tolist() == [3, 7]
    probabilities, labels = expected(saved, rows.drop([3, 7]))
    assert np.allclose(np.stack(got["probabilities"].drop([3, 7])), probabilities, atol=1e-5)
    assert (got["predicted"].drop([3, 7]) == labels).all()
    assert os.listdir(tmp_path / "out") == ["0.parquet"]


def test_documents_are_cut_as_in_training(saved, tmp_path):
    head = EmbeddingHead.load(saved)
    cut = tasks.first_tokens(head.tokenizer, 3)
    rows = pd.DataFrame({"text": ["the goal and the trophy and a robot in a bank", "a stadium of the coach " * 30]})
    of_cut, of_whole = (bulk.Classifier(saved, tmp_path, "text", 8, torch.get_num_threads(), tokens) for tokens in (3, None))
    for classifier, said in ((of_cut, rows["text"].map(cut)), (of_whole, rows["text"])):
        classifier.approach = head
        _, probabilities = classifier._said(rows["text"].tolist())
        assert np.allclose(probabilities, expected(saved, said.to_frame())[0], atol=1e-6)


def test_several_labels_are_a_list(saved, tmp_path):
    (tmp_path / "out").mkdir()
    classifier = bulk.Classifier(saved, tmp_path / "out", "text", batch_size=2, threads=1)
    classifier.approach = EmbeddingHead.load(saved)
    classifier.approach.multi_label = True
    pd.DataFrame({"text": ["the coach", "the bank", "a robot"]}).to_parquet(tmp_path / "in.parquet", index=False)
    classifier({"path": np.array([str(tmp_path / "in.parquet")])})
    got = pd.read_parquet(tmp_path / "out" / "in.parquet")
    for decided, each in zip(got["predicted"], got["probabilities"], strict=True):
        assert list(decided) == [label for label, p in zip(classifier.approach.labels, each, strict=True) if p >= 0.5]


@contextlib.contextmanager
def killing(out, n):
    """Kill `n` workers, each in the middle of a file; gives their process numbers."""
    killed, end = [], threading.Event()

    def look():
        while len(killed) < n and not end.wait(0.005):
            for part in out.glob(".*.part"):
                pid = int(part.suffixes[-2][1:])
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker = psutil.Process(pid)
                    if pid in killed or psutil.Process() not in worker.parents():
                        continue
                    worker.suspend()  # so that it does not complete the file meanwhile
                    if part.exists():
                        worker.kill()  # SIGKILL
                        killed.append(pid)
                        break
                    worker.resume()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        end.set()
        thread.join()


def test_a_killed_worker_loses_nothing_and_doubles_nothing_and_a_refused_file_stops_no_other(saved, documents, tmp_path):
    out, last = tmp_path / "out", documents / f"{N_FILES}.parquet"
    out.mkdir()
    (out / ".9.parquet.0.part").write_text("torn")  # by an earlier run
    rows = pd.DataFrame({"id": range(8), "text": ["a robot " * (30000 if row == 5 else 1) for row in range(8)]})
    rows.to_parquet(last, index=False)
    command = [sys.executable, "-m", "helpers.bulk", documents, "--with", saved, "--out", out, "--workers", "2"]
    with killing(out, 1) as killed:
        root = Path(bulk.__file__).parent.parent
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=180)
    assert len(killed) == 1
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()  # nothing of Ray's
    assert line.startswith(f"{last.name}, from row 0 on: Text 5 has ") and line.endswith("run it again to go on.")
    assert f"(1 of {N_FILES + 1} files)" in line
    assert sorted(os.listdir(out)) == [f"{number}.parquet" for number in range(N_FILES)]
    got = pd.concat([pd.read_parquet(out / f"{number}.parquet") for number in range(N_FILES)], ignore_index=True)
    assert got["id"].tolist() == list(range(N_FILES * N_ROWS))
    probabilities, labels = expected(saved, got)
    assert (got["predicted"] == labels).all() and np.allclose(np.stack(got["probabilities"]), probabilities, atol=1e-5)


def test_a_file_that_kills_all_its_workers_is_given_up_and_the_next_run_goes_on(
    saved, documents, tmp_path, in_time, monkeypatch, capfd
):
    out = tmp_path / "out"
    monkeypatch.setattr(bulk, "RETRIES", 0)
    for number in range(2, N_FILES):
        (documents / f"{number}.parquet").unlink()
    out.mkdir()
    (out / "1.parquet").write_text("done")
    capfd.readouterr()
    with killing(out, 1) as killed, pytest.raises(BookError, match="A file's workers .* run it again to go on"):
        bulk.classify(documents, saved, out, workers=1, batch_size=8)
    assert len(killed) == 1
    assert os.listdir(out) == ["1.parquet"]
    (done,) = bulk.classify(documents, saved, out)
    assert done.pop("seconds") > 0 and done == {"path": "0.parquet", "documents": N_ROWS}
    assert pd.read_parquet(out / "0.parquet")["id"].tolist() == list(range(N_ROWS))
    assert (out / "1.parquet").read_text() == "done"
    assert capfd.readouterr() == ("", "")
    children = psutil.Process().children(recursive=True)
    assert not [each for each in psutil.wait_procs(children, timeout=20)[1] if "ray" in " ".join(each.cmdline())]


def test_the_command_says_how_it_is_called(capsys):
    with pytest.raises(SystemExit, match="0"):
        bulk.main(["--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("documents", "--with", "--out", "--text", "--workers"))


def test_nothing_to_do_needs_no_workers(saved, documents, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for path in documents.glob("*.parquet"):
        (out / path.name).write_text("done")
    assert bulk.classify(documents, saved, out) == []
    bulk.main([str(documents), "--with", str(saved), "--out", str(out)])
    assert capsys.readouterr().out == f"0 files with 0 documents in 0 seconds are in {out}\n"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "bad.parquet has no column 'text', only body. Name the one with the texts."),
        ({"text": [1]}, "bad.parquet: the column 'text' holds int64, no text."),
        ({"text": ["a"], "predicted": ["b"]}, "bad.parquet has a column 'predicted' already."),
    ],
)
def test_files_that_cannot_be_classified_are_named_before_any_work(saved, documents, tmp_path, columns, message):
    pd.DataFrame(columns).to_parquet(documents / "bad.parquet", index=False)
    with pytest.raises(BookError, match=message):
        bulk.classify(documents, saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_parquet_and_what_is_no_approach(saved, documents, tmp_path):
    with pytest.raises(SystemExit, match="There are no .parquet files in"):
        bulk.main([str(tmp_path), "--with", str(saved), "--out", str(tmp_path / "out")])
    with pytest.raises(BookError, match="holds no saved approach"):
        bulk.classify(documents, tmp_path, tmp_path / "out")
    with pytest.raises(BookError, match="workers is 0, but it has to be a whole number, 1 or more"):
        bulk.classify(documents, saved, tmp_path / "out", workers=0)
    (documents / "junk.parquet").write_bytes(b"\x00" * 100)
    with pytest.raises(BookError, match=r"junk.parquet cannot be read as Parquet"):
        bulk.classify(documents, saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
