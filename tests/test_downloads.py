import errno
import hashlib
import http.server
import random
import re
import shutil
import subprocess
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest

from helpers import downloads, sources
from helpers.downloads import Package, fetch
from helpers.errors import BookError

CONTENT = random.Random(0).randbytes(100_000)
HALF = 40_000
PACKAGE = Package("little", "1.0", "little-1.0-py3-none-any.whl", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        state = self.server.state
        asked = self.headers.get("Range")
        state.requests.append(asked)
        if state.mode == "closed" and len(state.requests) > 1:
            self.close_connection = True
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked else 0
        body = state.content[start:]
        if state.mode == "short":
            body = body[:HALF]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(state.content)}")
        self.end_headers()
        self.wfile.write(body[:HALF] if state.mode == "closed" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packages"


@pytest.fixture
def server(cache, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", HALF // 4)  # what is lost at most when it stops
    huggingface_hub.close_session()
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    web.state = SimpleNamespace(content=CONTENT, mode="good", requests=[])
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(downloads, "_find", lambda package, target: f"http://127.0.0.1:{web.server_port}/{package.filename}")
    yield web.state
    web.shutdown()
    thread.join()
    web.server_close()
    huggingface_hub.close_session()


def refusal(package=PACKAGE):
    with pytest.raises(BookError) as caught:
        fetch(package)
    message = str(caught.value)
    assert "\n" not in message
    return message


def left_in(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_is_fetched_once(server, cache):
    path = fetch(PACKAGE)
    assert path == cache / PACKAGE.filename
    assert path.read_bytes() == CONTENT
    assert server.requests == [None]
    assert fetch(PACKAGE) == path
    assert len(server.requests) == 1
    assert left_in(cache) == [PACKAGE.filename]


def test_wrong_content_is_deleted(server, cache):
    server.content = bytes(len(CONTENT))
    message = refusal()
    assert PACKAGE.sha256[:12] in message and hashlib.sha256(server.content).hexdigest()[:12] in message
    assert left_in(cache) == []


@pytest.mark.parametrize("mode", ["short", "closed"])
def test_stopped_download_goes_on_where_it_was_left(server, cache, mode):
    server.mode = mode
    message = refusal()
    assert f"stopped at {HALF:,} of {len(CONTENT):,} bytes" in message
    assert (cache / f"{PACKAGE.filename}.part").read_bytes() == CONTENT[:HALF]
    server.mode = "good"
    server.requests.clear()
    assert fetch(PACKAGE).read_bytes() == CONTENT
    assert server.requests == [f"bytes={HALF}-"]
    assert left_in(cache) == [PACKAGE.filename]


def test_part_longer_than_the_file_is_thrown_away(server, cache):
    cache.mkdir(parents=True)
    (cache / f"{PACKAGE.filename}.part").write_bytes(CONTENT + b"more")
    assert fetch(PACKAGE).read_bytes() == CONTENT
    assert server.requests == [None]


def test_server_that_answers_an_error(server, cache, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    assert f"stopped at 0 of {len(CONTENT):,} bytes" in refusal()


def test_disk_too_small_is_said_before_anything_is_written(server, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(CONTENT) - 1))
    message = refusal()
    assert message.startswith("The disk is full") and "BOOK_CACHE" in message and PACKAGE.filename in message
    assert server.requests == []
    assert left_in(cache) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_midway_leaves_nothing(server, cache, monkeypatch, code):
    def fill(url, file, **_):
        file.write(CONTENT[:HALF])
        raise OSError(code, "no space")

    monkeypatch.setattr(downloads, "http_get", fill)
    message = refusal()
    assert message.startswith("The disk is full") and "BOOK_CACHE" in message
    assert left_in(cache) == []


def test_no_network_and_nothing_cached_says_where_to_put_the_file(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    message = refusal(sources.BBC)
    assert str(cache / sources.BBC.filename) in message and "Go online" in message
    assert left_in(cache) == []


def test_pip_finds_the_archive_without_installing_it(monkeypatch):
    stored = fetch(sources.BBC)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(stored.parent))
    assert downloads._find(sources.BBC, stored) == stored.resolve().as_uri()


def test_missing_pip_is_named(cache, monkeypatch):
    answer = SimpleNamespace(stdout="", stderr="/usr/bin/python: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    assert "pip is missing" in refusal()


def test_damaged_file_is_fetched_anew(server, cache):
    cache.mkdir(parents=True)
    (cache / PACKAGE.filename).write_bytes(CONTENT[:-1] + b"\0")
    assert fetch(PACKAGE).read_bytes() == CONTENT
    assert server.requests == [None]


def test_whole_file_put_there_by_hand_needs_no_network(cache, monkeypatch):
    monkeypatch.setattr(downloads, "_find", lambda *_: pytest.fail("looked for an address"))
    cache.mkdir(parents=True)
    (cache / PACKAGE.filename).write_bytes(CONTENT)
    assert fetch(PACKAGE) == cache / PACKAGE.filename


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path / "file" / "cache"))
    message = refusal()
    assert "Cannot make the cache folder" in message and "BOOK_CACHE" in message


def test_colours_that_a_notebook_asks_for_do_not_reach_the_report_of_pip(monkeypatch, tmp_path):
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE"):  # as Jupyter's kernels set them
        monkeypatch.setenv(name, "1")
    seen = {}

    def pip(command, env, **_):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, '{"install": [{"download_info": {"url": "https://x/y.whl"}}]}', "")

    monkeypatch.setattr(downloads.subprocess, "run", pip)
    package = downloads.Package(name="y", version="1", filename="y.whl", size=1, sha256="0")
    assert downloads._find(package, tmp_path / "y.whl") == "https://x/y.whl"
    assert seen and not any("COLOR" in name for name in seen)
