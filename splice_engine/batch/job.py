"""One row's transfer, in whichever process does it: pictures in as arrays, files out as bytes.

A process needs the engine and the backbone's weights, and shares no folder with the one that reads and writes files.
"""

import io
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..analysis.figures import comparison_strip
from ..analysis.metrics import measure
from ..errors import SpliceError
from ..images import save_picture
from ..settings import Settings
from ..training.result import render_result
from ..training.transfer import Transfer
from ..vit.backbone import Backbone
from ..vit.devices import is_out_of_memory, pick_device, pick_dtype
from .best_of import BestOf

STRIP_HEIGHT = 240
"""Of the pictures in a strip, in pixels."""


@dataclass(frozen=True)
class ViT:
    """The backbone of a batch, as options name it: name or file, device and precision."""

    name: str
    device: str
    dtype: str


@dataclass(frozen=True)
class Job:
    """A row's transfer.

    Attributes:
        number: Of the row.
        key: Stands for all that the result is made of.
        output: Name of the result; its suffix is the format.
        pictures: `[1, 3, H, W]` in 0..1 of "structure" and "appearance", `[1, 1, h, w]` of their masks.
        settings: The recipe.
        best_of: Seeds that begin.
        vit: The backbone.
    """

    number: int
    key: str
    output: str
    pictures: Mapping[str, np.ndarray]
    settings: Settings
    best_of: int
    vit: ViT


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        picture: The result's file.
        strip: A JPEG of both pictures and the result.
        figures: The measures of the result, its seed, and the seconds that it took.
        error: Why there is none of that, and how to mend it.
        ends_batch: Whether that concerns all rows.
    """

    picture: bytes = b""
    strip: bytes = b""
    figures: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    ends_batch: bool = False


def run_job(job: Job) -> Outcome:
    """Trains on a job's pair. Nothing is raised: what goes wrong with one row is its outcome."""
    try:
        backbone = _load_backbone(job.vit)
    except SpliceError as error:
        return Outcome(error=str(error), ends_batch=True)
    try:
        return _transfer(job, backbone)
    except SpliceError as error:
        return Outcome(error=str(error))
    except Exception as error:  # one row, whatever it does, must not end the others
        if is_out_of_memory(error):
            return Outcome(error="out of memory: give the row a smaller size, or shrink its structure picture")
        return Outcome(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])


@lru_cache(maxsize=1)
def _load_backbone(vit: ViT) -> Backbone:
    """The backbone, which a process loads once."""
    device = pick_device(vit.device)
    return Backbone.load(vit.name, device, pick_dtype(vit.dtype, device))


def _transfer(job: Job, backbone: Backbone) -> Outcome:
    started = time.monotonic()
    given = {name: torch.tensor(array) for name, array in job.pictures.items()}
    structure, appearance = given["structure"], given["appearance"]
    begin = partial(
        Transfer,
        structure,
        appearance,
        backbone,
        structure_mask=given.get("structure_mask"),
        appearance_mask=given.get("appearance_mask"),
    )
    selection = BestOf(begin, job.settings, job.best_of)
    for _ in selection:
        pass
    run = selection.choose()
    for _ in run:
        pass
    result = render_result(run)
    figures = asdict(measure(structure, appearance, result, backbone))
    return Outcome(
        _encode(result, job.output),
        _draw_strip({"structure": structure, "appearance": appearance, "result": result}),
        {**figures, "seed": run.settings.seed, "seconds": round(time.monotonic() - started, 2)},
    )


def _encode(picture: Tensor, name: str) -> bytes:
    """A picture as the file that `save_picture` makes of it."""
    with tempfile.TemporaryDirectory(prefix="splice-") as folder:
        path = Path(folder) / f"result{Path(name).suffix}"
        save_picture(picture, path)
        return path.read_bytes()


def _draw_strip(pictures: Mapping[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    comparison_strip(pictures, STRIP_HEIGHT).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
