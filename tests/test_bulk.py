"""Parquet files in and out: nothing lost, nothing doubled, whatever happens to a worker."""

import contextlib
import os
import signal
import threading
import time

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet
import pytest
from datasets import Dataset

from helpers import bulk
from helpers.embedding_head import EmbeddingHead
from helpers.errors import BookError

N_FILES, N_ROWS = 4, 40


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


def read(folder):
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.glob("*.parquet"))], ignore_index=True)


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
    assert done["documents"].tolist() == [N_ROWS]
    got = pd.read_parquet(tmp_path / "out" / "0.parquet")
    assert got[["id", "text"]].equals(rows) and list(got.columns) == ["id", "text", "predicted", "probabilities"]
    assert got["predicted"].isna().to_numpy().nonzero()[0].tolist() == [3, 7]
    probabilities, labels = expected(saved, rows.drop([3, 7]))
    assert np.allclose(np.stack(got["probabilities"].drop([3, 7])), probabilities, atol=1e-5)
    assert (got["predicted"].drop([3, 7]) == labels).all()
    assert os.listdir(tmp_path / "out") == ["0.parquet"]


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
def killing(n):
    """Kill the first `n` workers that are seen at work; gives their process numbers."""
    killed, end = set(), time.monotonic() + 200

    def look():
        while len(killed) < n and time.monotonic() < end:
            for process in psutil.Process().children(recursive=True):
                try:
                    if "MapWorker" in " ".join(process.cmdline()) and process.cpu_times().user > 1 and len(killed) < n:
                        os.kill(process.pid, signal.SIGKILL)
                        killed.add(process.pid)
                except psutil.Error:
                    continue
            time.sleep(0.02)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield killed
    thread.join()


def test_a_killed_worker_loses_nothing_and_doubles_nothing(saved, documents, tmp_path, capsys):
    out = tmp_path / "out"
    with killing(1) as killed:
        bulk.main([str(documents), "--with", str(saved), "--out", str(out), "--workers", "2"])
    assert len(killed) == 1
    assert f"{N_FILES} files with {N_FILES * N_ROWS} documents" in capsys.readouterr().out
    got = read(out)
    assert got["id"].tolist() == list(range(N_FILES * N_ROWS))
    probabilities, labels = expected(saved, got)
    assert (got["predicted"] == labels).all() and np.allclose(np.stack(got["probabilities"]), probabilities, atol=1e-5)

    # a run that was stopped goes on: what is there stays, and nothing is left of a torn file
    before = (out / "0.parquet").stat().st_mtime_ns
    (out / "3.parquet").unlink()
    (out / ".3.parquet.999.part").write_text("torn")
    rows = pd.read_parquet(documents / "3.parquet").assign(text="a robot " * 30000)
    rows.to_parquet(documents / "3.parquet", index=False)
    with pytest.raises(BookError, match="^3.parquet, from row 0 on: Text 0 has .* run it again to go on"):
        bulk.classify(documents, saved, out, workers=1)
    assert sorted(path.name for path in out.glob("*.parquet")) == ["0.parquet", "1.parquet", "2.parquet"]
    assert (out / "0.parquet").stat().st_mtime_ns == before
    assert not (out / ".3.parquet.999.part").exists()


def test_a_file_that_kills_its_workers_is_given_up(saved, documents, tmp_path):
    for number in range(1, N_FILES):
        (documents / f"{number}.parquet").unlink()
    with killing(3) as killed, pytest.raises(BookError, match="A file's workers were killed.* run it again to go on"):
        bulk.classify(documents, saved, tmp_path / "out", workers=1)
    assert len(killed) == 3


def test_nothing_to_do_needs_no_workers(saved, documents, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for path in documents.glob("*.parquet"):
        (out / path.name).write_text("done")
    assert bulk.classify(documents, saved, out) == []


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
    (documents / "junk.parquet").write_bytes(b"\x00" * 100)
    with pytest.raises(BookError, match=r"junk.parquet cannot be read as Parquet"):
        bulk.classify(documents, saved, tmp_path / "out")
    assert pyarrow.parquet.read_schema(documents / "0.parquet").names == ["id", "text"]
