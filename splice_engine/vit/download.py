"""Downloads weights from the model hub: it can be followed and cancelled, and goes on where it stopped."""

import errno
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .catalogue import Entry

FILENAME = "model.safetensors"
"""Of the weights, in every repository of timm."""

POLL_SECONDS = 0.1
"""Between two calls of a `Progress`."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
"""By which the target's errors are told from the network's, which are OSErrors too."""

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, its bytes that are here, and those of the whole, None where that is not known.

It runs in the caller's thread, also while nothing arrives. What it raises ends the download at once.
"""


class HubError(Exception):
    """Why the hub gave no file, as the rest of a sentence that begins with "the model hub"."""


def hub_address(entry: Entry) -> str:
    """Where the hub, or the mirror that `HF_ENDPOINT` names, has the weights."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(entry.hub_id, FILENAME)


def download(entry: Entry, target: Path, progress: Progress | None = None) -> None:
    """Downloads the weights of a backbone.

    What has arrived is kept beside the target as a `.part` file, from which the next attempt goes on if the hub still
    has the same file. The file appears under its name when it is whole and, where the hub tells its digest, right.

    Args:
        entry: Row of the catalogue.
        target: The file to make.
        progress: Follows the download.

    Raises:
        HubError: The hub cannot be reached or has no such file.
        OSError: The file cannot be written.
    """
    from huggingface_hub import constants

    transfer = _Transfer(entry, target)
    transfer.start()
    started = time.monotonic()
    try:
        while transfer.is_alive():
            transfer.join(POLL_SECONDS)
            if progress:
                progress(target.name, transfer.done, transfer.size)
            # Of a connection, the timeout counts anew for each of the hub's addresses.
            if not transfer.answered and time.monotonic() - started > constants.HF_HUB_ETAG_TIMEOUT + 1:
                raise HubError(f"is not reachable (no answer within {constants.HF_HUB_ETAG_TIMEOUT} s)")
    finally:
        transfer.cancelled = True
    if transfer.error is not None:
        raise _explain(transfer.error, entry)


class _Transfer(threading.Thread):
    """A download in a thread of its own, so that waiting for a silent network can be cancelled too.

    Attributes:
        done: Bytes that are here.
        size: Bytes of the file, as the hub tells.
        answered: Whether the hub has answered.
        cancelled: Set from outside to end the transfer.
        error: Why it failed, when it has ended.
    """

    def __init__(self, entry: Entry, target: Path) -> None:
        super().__init__(daemon=True)  # a process that ends does not wait for the network
        self.entry, self.target = entry, target
        self.done = 0
        self.size: int | None = None
        self.answered = self.cancelled = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._fetch()
        except Exception as error:
            self.error = error

    def _fetch(self) -> None:
        from filelock import FileLock
        from huggingface_hub import constants, get_hf_file_metadata

        address = hub_address(self.entry)
        metadata = get_hf_file_metadata(address, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        self.size, self.answered = metadata.size, True
        lock = FileLock(self.target.with_name(f".{self.target.name}.lock"))
        with lock:  # another process may be fetching the same file
            if not self.target.is_file() and not self.cancelled:
                self._fetch_part(address, metadata.etag)
        with suppress(OSError):
            Path(lock.lock_file).unlink()

    def _fetch_part(self, address: str, etag: str | None) -> None:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        version = re.sub(r"\W", "", etag or "")[:16]
        part = self.target.with_name(f"{self.target.name}.{version}.part")
        for other in self.target.parent.glob(f"{self.target.name}.*.part"):
            if other != part or not version or self.size is None:
                other.unlink()  # of a file that the hub does not have any more, or of which nothing tells
        with _Part(part, self) as file:
            self.done = file.seek(0, 2)
            if self.size is not None and self.done > self.size:
                file.truncate(0)
                self.done = file.seek(0)
            finished = False
            while not finished:
                before = self.done
                try:
                    with _no_hub_bar():
                        http_get(
                            address,
                            file,  # type: ignore[arg-type]
                            resume_size=before,
                            headers=build_hf_headers(),
                            expected_size=self.size,
                            displayed_filename=self.target.name,
                        )
                    finished = True
                except Exception as error:
                    # A line that broke is taken up as long as each attempt brings something.
                    if self.size is None or self.done == before or self.cancelled or _is_on_disk(error):
                        raise
        if re.fullmatch(r"[0-9a-f]{64}", etag or "") and _digest(part) != etag:
            part.unlink()
            raise HubError("sent a damaged file, which has been deleted: try again")
        part.replace(self.target)


class _Part:
    """The file that a download is written to, which counts its bytes and refuses them after a cancellation.

    Args:
        path: The file, which is kept if it is there.
        transfer: Whose bytes they are.
    """

    def __init__(self, path: Path, transfer: _Transfer) -> None:
        path.touch()
        self._file, self._transfer = path.open("r+b"), transfer
        self.seek, self.tell, self.truncate = self._file.seek, self._file.tell, self._file.truncate

    def write(self, data: bytes) -> int:
        if self._transfer.cancelled:
            raise HubError("cancelled")
        written = self._file.write(data)
        self._transfer.done = self._file.tell()
        return written

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()


@contextmanager
def _no_hub_bar() -> Iterator[None]:
    """A block in which the hub's library shows no progress bar of its own."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    name = "huggingface_hub.http_get"
    if are_progress_bars_disabled(name):
        yield
        return
    disable_progress_bars(name)
    try:
        yield
    finally:
        enable_progress_bars(name)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _is_on_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _explain(error: Any, entry: Entry) -> Exception:
    """What the error of a transfer means to the user, if it is the hub's."""
    from huggingface_hub.utils import GatedRepoError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    if isinstance(error, HubError) or _is_on_disk(error):
        return error
    if isinstance(error, GatedRepoError):
        remedy = f"accept the licence on its page of {entry.hub_id} and log in (`hf auth login`)"
        return HubError(f"says that they are gated: {remedy}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("is switched off by HF_HUB_OFFLINE")
    status = getattr(getattr(error, "response", None), "status_code", None)
    meanings = {
        401: "asks for a log-in (`hf auth login`), or refuses the token that it was given",
        403: "refuses access: a token without this permission, or a proxy",
        404: f"has no {entry.hub_id}/{FILENAME}",
    }
    if status in meanings:
        return HubError(f"{meanings[status]} (status {status})")
    return HubError(f"is not reachable ({' '.join(str(error).split())[:200] or type(error).__name__})")
