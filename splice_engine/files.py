"""Files that appear whole or not at all, and never in the place of another unless asked."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SpliceError


def cache_folder() -> Path:
    """For fetched weights and notes on the machine's speed: `$SPLICE_CACHE`, else `splice-vit` in the user's cache."""
    if chosen := os.environ.get("SPLICE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "splice-vit"


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well and vanishes when it does not."""
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
    """Finds out before the work, not after it, that a file cannot be written.

    Raises:
        SpliceError: It is there already, or its folder is missing or closed.
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
