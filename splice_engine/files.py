"""The cache folder, and writing files: whole or not at all, and over others only where that is allowed."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from .errors import SpliceError

APP = "splice-vit"
"""Name of the engine's folder in the user's cache."""


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
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; pictures and weights are to be shared
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: Path, overwrite: bool = False) -> None:
    """Checks, before the work that makes it, that a file can be written.

    Args:
        path: The file.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        SpliceError: It is there already, or its folder is missing or read-only.
    """
    if path.is_dir():
        raise SpliceError(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise SpliceError(f"{path} is there already: choose another name, or replace it with --overwrite")
    if not path.parent.is_dir():
        raise SpliceError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise SpliceError(f"cannot write {path}: no permission to write in {path.parent}")


def write_error(path: Path, error: Exception) -> SpliceError:
    """The message for a file that the system refused to write."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    detail = "the disk is full" if full else " ".join(str(getattr(error, "strerror", None) or error).split())
    return SpliceError(f"cannot write {path}: {detail}; make room or choose another place")
