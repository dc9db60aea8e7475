"""Parquet files in and out: nothing lost, nothing doubled, whatever happens to a worker."""

import contextlib
import os
import signal
import sys
import threading

import numpy as np
import pandas as pd
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from conftest import BOOK
from datasets import Dataset

from helpers import tasks
from helpers.embedding_head import EmbeddingHead
from helpers.errors import BookError

sys.path.insert(0, str(BOOK / "scripts"))
import classify_folder

N_FILES, N_ROWS = 3, 1000


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


def expected(saved, rows):
    said = EmbeddingHead.load(saved).predict(Dataset.from_dict({"text": rows["text"].tolist(), "label": [0] * len(rows)}))
    return said.probabilities, np.array(said.labels)[said.predicted]


def loaded(saved, out, tokens=None):
    """A worker as it is when it has loaded the approach."""
    classifier = classify_folder.Classifier(saved, out, "text", threads=1, tokens=tokens)
    classifier.approach, classifier.predict_proba = classify_folder.load(saved)
    return classifier


def test_a_file_gets_the_approachs_labels_and_keeps_its_columns(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(classify_folder, "BATCH", 16)
    rows = pd.DataFrame({"id": range(100), "text": [f"the coach and {each} goals" for each in range(100)]})
    rows.loc[[3, 7], "text"] = [None, "  "]  # are kept, without a label
    rows.loc[range(32, 48), "text"] = None  # a whole batch
    rows.to_parquet(tmp_path / "0.parquet", index=False)
    (tmp_path / "out").mkdir()
    classifier = classify_folder.Classifier(saved, tmp_path / "out", "text", threads=1)
    done = classifier({"path": np.array([str(tmp_path / "0.parquet")])})
    assert done["documents"].tolist() == [100] and done["refused"].tolist() == [""]
    got = pd.read_parquet(tmp_path / "out" / "0.parquet")
    assert got[["id", "text"]].equals(rows) and list(got.columns) == ["id", "text", "predicted", "probabilities"]
    empty = [3, 7, *range(32, 48)]
    for column in classify_folder.ADDED:
        assert got[column].isna().to_numpy().nonzero()[0].tolist() == empty
    probabilities, labels = expected(saved, rows.drop(empty))
    assert np.allclose(np.stack(got["probabilities"].drop(empty)), probabilities, atol=1e-5)
    assert (got["predicted"].drop(empty) == labels).all()
    assert os.listdir(tmp_path / "out") == ["0.parquet"]


def test_documents_are_cut_as_in_training(saved, tmp_path):
    classifier = loaded(saved, tmp_path, tokens=3)
    cut = tasks.first_tokens(classifier.approach.tokenizer, 3)
    rows = pd.DataFrame({"text": ["the goal and the trophy and a robot in a bank", "a stadium of the coach " * 30]})
    for tokens, said in ((3, rows["text"].map(cut)), (None, rows["text"])):
        classifier.tokens = tokens
        _, probabilities = classifier.answers(rows["text"].tolist())
        assert np.allclose(probabilities, expected(saved, said.to_frame())[0], atol=1e-6)


def test_several_labels_are_a_list(saved, tmp_path):
    (tmp_path / "out").mkdir()
    classifier = loaded(saved, tmp_path / "out")
    classifier.approach.multi_label = True
    said = np.array([[0.5, 0.4, 0.9], [0.1, 0.2, 0.3], [1.0, 0.0, 0.0]])
    classifier.predict_proba = lambda texts: said
    pd.DataFrame({"text": ["the coach", "the bank", "a robot"]}).to_parquet(tmp_path / "in.parquet", index=False)
    assert classifier.classify(tmp_path / "in.parquet") == 3
    got = pd.read_parquet(tmp_path / "out" / "in.parquet")
    first, second, third = classifier.approach.labels
    assert [list(each) for each in got["predicted"]] == [[first, third], [], [first]]
    assert np.allclose(np.stack(got["probabilities"]), said)


def test_probabilities_are_those_of_the_saved_approach_with_several_labels_too(tiny_model, tiny_task, tmp_path):
    several = [[int(n == label) for n in range(3)] for label in tiny_task.train["label"]]
    texts = tiny_task.train["text"]
    splits = {split: Dataset.from_dict({"text": texts, "label": several}) for split in ("train", "validation", "test")}
    splits["validation"], splits["test"] = (splits[name].select(range(3)) for name in ("validation", "test"))
    splits["train"] = splits["train"].select(range(3, len(texts)))
    splits["test"] = splits["test"].map(lambda row: {"text": row["text"] + " and more"})
    task = tasks.Task("tiny, several", tiny_task.labels, **splits, multi_label=True)
    head = EmbeddingHead(tiny_model, n_layers=1, rank=4, epochs=1).fit(task)
    approach, predict_proba = classify_folder.load(head.save(tmp_path / "head"))
    assert approach.multi_label
    assert np.allclose(predict_proba(task.test["text"]), head.predict(task.test).probabilities, atol=1e-6)


# With Ray, of which all tests here use one session


def of_ray():
    return [each for each in psutil.Process().children(recursive=True) if "ray" in " ".join(each.cmdline())]


@pytest.fixture(scope="module")
def ray_session():
    """As the command starts it; nothing of Ray is left when it ends."""
    with contextlib.ExitStack() as stack:
        with classify_folder.silence():
            stack.enter_context(classify_folder.session(2))
        assert of_ray()
        yield
        with classify_folder.silence():
            stack.close()
    psutil.wait_procs(of_ray(), timeout=20)
    assert not of_ray()


@pytest.fixture
def in_time():
    """A test that waits for Ray ends after some minutes, whatever Ray does."""

    def end(number, frame):
        raise TimeoutError("Ray did not end")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(400)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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


def test_a_killed_worker_loses_nothing_and_doubles_nothing_and_a_refused_file_stops_no_other(
    ray_session, saved, documents, tmp_path, in_time, capfd
):
    out, last = tmp_path / "out", documents / f"{N_FILES}.parquet"
    out.mkdir()
    (out / ".9.parquet.0.part").write_text("torn")  # by an earlier run
    rows = pd.DataFrame({"id": range(8), "text": ["a robot " * (30000 if row == 5 else 1) for row in range(8)]})
    rows.to_parquet(last, index=False)
    capfd.readouterr()
    with killing(out, 1) as killed, pytest.raises(SystemExit) as refused:
        classify_folder.main([str(documents), "--with", str(saved), "--out", str(out), "--workers", "2"])
    assert len(killed) == 1
    said = str(refused.value)
    assert said.startswith(f"{last.name}, from row 0 on: Text 5 has ") and said.endswith("run it again to go on.")
    assert f"(1 of {N_FILES + 1} files)" in said
    assert capfd.readouterr() == ("", "")  # nothing of Ray's
    assert sorted(os.listdir(out)) == [f"{number}.parquet" for number in range(N_FILES)]
    got = pd.concat([pd.read_parquet(out / f"{number}.parquet") for number in range(N_FILES)], ignore_index=True)
    assert got["id"].tolist() == list(range(N_FILES * N_ROWS))
    probabilities, labels = expected(saved, got)
    assert (got["predicted"] == labels).all() and np.allclose(np.stack(got["probabilities"]), probabilities, atol=1e-5)


def test_a_file_that_kills_all_its_workers_is_given_up_and_the_next_run_goes_on(
    ray_session, saved, documents, tmp_path, in_time, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(classify_folder, "RETRIES", 0)
    for number in range(2, N_FILES):
        (documents / f"{number}.parquet").unlink()
    out.mkdir()
    (out / "1.parquet").write_text("done")
    with killing(out, 1) as killed, pytest.raises(BookError, match="A file's workers .* run it again to go on"):
        classify_folder.classify(documents, saved, out, workers=1)
    assert len(killed) == 1
    assert os.listdir(out) == ["1.parquet"]
    (done,) = classify_folder.classify(documents, saved, out)
    assert done["seconds"] > 0 and (done["path"], done["documents"]) == ("0.parquet", N_ROWS)
    assert pd.read_parquet(out / "0.parquet")["id"].tolist() == list(range(N_ROWS))
    assert (out / "1.parquet").read_text() == "done"


# Without Ray


def test_the_command_says_how_it_is_called(capsys):
    with pytest.raises(SystemExit, match="0"):
        classify_folder.main(["--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("documents", "--with", "--out", "--text", "--tokens", "--workers"))


def test_nothing_to_do_needs_no_workers(saved, documents, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for path in documents.glob("*.parquet"):
        (out / path.name).write_text("done")
    assert classify_folder.classify(documents, saved, out) == []
    classify_folder.main([str(documents), "--with", str(saved), "--out", str(out)])
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
        classify_folder.classify(documents, saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_column_of_categories_or_views_is_text_and_the_parts_of_another_run_stay(saved, tmp_path):
    texts = pyarrow.array(["the coach", "a bank", None])
    for name, each in {"category": texts.dictionary_encode(), "view": texts.cast(pyarrow.string_view())}.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": each}), tmp_path / f"{name}.parquet")
        classify_folder.check(tmp_path / f"{name}.parquet", "text")
        (tmp_path / "out").mkdir(exist_ok=True)
        assert loaded(saved, tmp_path / "out").classify(tmp_path / f"{name}.parquet") == 3
    parts = {pid: tmp_path / f".a.parquet.{pid}.7.part" for pid in (os.getpid(), os.getppid(), 2**22 + 1)}
    assert [classify_folder.of_another_run(part) for part in parts.values()] == [False, True, False]
    assert not classify_folder.of_another_run(tmp_path / ".9.parquet.0.part")


def test_what_is_no_parquet_and_what_is_no_approach(saved, documents, tmp_path):
    with pytest.raises(SystemExit, match="There are no .parquet files in"):
        classify_folder.main([str(tmp_path), "--with", str(saved), "--out", str(tmp_path / "out")])
    with pytest.raises(BookError, match="holds no saved approach"):
        classify_folder.classify(documents, tmp_path, tmp_path / "out")
    with pytest.raises(BookError, match="workers is 0, but it has to be 1 or more"):
        classify_folder.classify(documents, saved, tmp_path / "out", workers=0)
    (documents / "junk.parquet").write_bytes(b"\x00" * 100)
    with pytest.raises(BookError, match=r"junk.parquet cannot be read as Parquet"):
        classify_folder.classify(documents, saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
