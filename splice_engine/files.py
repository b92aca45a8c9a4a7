"""The cache folder, and writing files: whole or not at all, and over others only where that is allowed."""

import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from .errors import SpliceError

APP = "splice-vit"
"""Name of the engine's folder in the user's cache."""

TEMPORARY = ".splice-"
"""Beginning of the name of a file that is being written."""

RETRIES = (0.1, 0.2, 0.4)
"""Seconds to wait before another attempt at replacing a file that is in use."""


def cache_folder() -> Path:
    """The folder of fetched weights and of notes on the machine's speed; it need not exist yet.

    `$SPLICE_CACHE` where that is set, else the platform's cache folder of the user. Earlier versions used `~/.cache`
    (or `$XDG_CACHE_HOME`) on all platforms: a folder there is kept in use until the platform's own exists.
    """
    if chosen := os.environ.get("SPLICE_CACHE"):
        return Path(chosen).expanduser()
    folder = user_cache_path(APP, appauthor=False)
    earlier = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / APP
    return earlier if earlier.is_dir() and not folder.is_dir() else folder


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`: it becomes `target` if the block succeeds and is deleted if it fails."""
    temporary = target.with_name(f"{_beginning(target)}{secrets.token_hex(4)}{target.suffix}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes
    try:
        yield temporary
        _replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(target: Path) -> None:
    """Removes what killed processes have left of writing a file; none may be writing it now."""
    for path in target.parent.glob(f"{_beginning(target)}*"):
        path.unlink(missing_ok=True)


def _beginning(target: Path) -> str:
    """How the names of a file's temporary paths begin: short, since long names have no room."""
    return f"{TEMPORARY}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}-"


def _replace(temporary: Path, target: Path) -> None:
    """Moves a file. Windows refuses while a viewer, virus scanner or cloud drive reads the target, mostly briefly."""
    for seconds in RETRIES:
        try:
            temporary.replace(target)
            return
        except PermissionError:
            time.sleep(seconds)
    temporary.replace(target)


def check_place(path: Path, overwrite: bool = False) -> None:
    """Checks, before the work that makes it, that a file can be written.

    Args:
        path: The file.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        SpliceError: It is there already, its name is too long, or its folder is missing or read-only.
    """
    try:
        path.stat()
        exists = True
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as error:
        raise write_error(path, error) from None
    if path.is_dir():
        raise SpliceError(f"cannot write {path}: it is a folder; name a file in it")
    if exists and not overwrite:
        raise SpliceError(
            f"{path} is there already: choose another name, or overwrite it (--overwrite, in Python overwrite=True)"
        )
    if not path.parent.is_dir():
        raise SpliceError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise SpliceError(f"cannot write {path}: no permission to write in {path.parent}; choose another folder")


def write_error(path: Path, error: Exception) -> SpliceError:
    """The message for a file that the system refused to write."""
    code = getattr(error, "errno", None)
    detail, advice = " ".join(str(getattr(error, "strerror", None) or error).split()), "choose another place"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        detail, advice = "the disk is full", "make room or choose another place"
    elif code == errno.ENAMETOOLONG:
        detail, advice = "the name is too long", "choose a shorter one"
    return SpliceError(f"cannot write {path}: {detail}; {advice}")
