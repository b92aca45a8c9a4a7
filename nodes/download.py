"""Weights that a node fetches: progress in bytes, cancelling, and advice that fits ComfyUI."""

import time
from pathlib import Path

import comfy.model_management as mm
import torch
from comfy.utils import ProgressBar

from ..splice_engine import OFFLINE_BACKBONE, Backbone, SpliceError
from ..splice_engine.vit.download import hub_address
from ..splice_engine.vit.weights import MissingWeightsError, offline_command
from . import folders
from .progress import show_text

TEXT_SECONDS = 0.5
"""Least time between two texts on a node."""


class DownloadProgress:
    """Shows a download on the node that runs, as a bar and as a text, and ends it when the user cancels."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._shown = 0.0

    def __call__(self, name: str, done: int, size: int | None) -> None:
        """What `Backbone.load` calls; see the engine's `download.Progress`."""
        mm.throw_exception_if_processing_interrupted()
        if size:
            self._bar = self._bar or ProgressBar(size)
            self._bar.update_absolute(done, size)
        if time.monotonic() - self._shown >= TEXT_SECONDS or done == size:
            self._shown = time.monotonic()
            show_text(f"{name}: {done / 1e6:.0f}" + (f" of {size / 1e6:.0f} MB" if size else " MB"))


def load(name: str, dtype: torch.dtype) -> Backbone:
    """Loads a backbone, fetching its weights where they are not on this machine; call it inside `engine_context`.

    Args:
        name: One of `folders.backbone_names`.
        dtype: `torch.float32` or `torch.bfloat16`.

    Raises:
        SpliceError: The weights cannot be had; the message is for users of ComfyUI.
    """
    progress = DownloadProgress()
    try:
        return Backbone.load(
            folders.backbone_source(name), dtype=dtype, folders=folders.backbone_folders(), progress=progress
        )
    except MissingWeightsError as error:
        place = Path(folders.backbone_folders()[0])
        raise SpliceError(
            f"no weights for {name}: the model hub {error.reason}. Run again once that is mended; or download "
            f"{hub_address(error.entry)} and put it into {place} as {error.entry.filenames[0]}; or choose "
            f"{OFFLINE_BACKBONE}, whose weights come with {offline_command()}"
        ) from None
