"""What a user follows of a run: progress bar, live preview, interruption, and the button "Finish now"."""

import logging
import threading
import time
from typing import TypeVar

import comfy.model_management as mm
from aiohttp import web
from comfy.utils import ProgressBar
from server import PromptServer
from torch import Tensor

from ..splice_engine import Inversion, Transfer
from ..splice_engine.images import sides, to_pil

log = logging.getLogger("splice")

PREVIEW_SIZE = 256
"""Short side in pixels of a live preview, at most."""

PREVIEW_SECONDS = 0.5
"""Least time between two previews."""

PREVIEW_SHARE = 0.02
"""Share of a run's time that its previews may take."""

PROGRESS_SECONDS = 0.1
"""Least time between two messages of progress."""

finish_early = threading.Event()
"""Set to end the run under way after its current step and to keep its picture."""

Run = TypeVar("Run", Transfer, Inversion)


def register_routes() -> None:
    """What the button "Finish now" calls."""

    @PromptServer.instance.routes.post("/splice/finish")
    async def finish(_request: web.Request) -> web.Response:
        finish_early.set()
        return web.Response()


class Progress:
    """A node's progress bar over the steps of all its runs, which take place one after the other.

    Args:
        steps: Of all runs together.
    """

    def __init__(self, steps: int) -> None:
        self._bar, self._steps, self._before = ProgressBar(steps), steps, 0

    def show(self, step: int, preview: Tensor | None = None) -> None:
        """Tells how many steps of the run under way are done, and its picture so far `[1, 3, H, W]`."""
        picture = None if preview is None else to_pil(preview)
        self._bar.update_absolute(self._before + step, self._steps, picture and ("JPEG", picture, max(picture.size)))

    def next(self, steps: int) -> None:
        """Counts a run of so many steps as done."""
        self._before += steps
        self.show(0)


def run_with_progress(run: Run, progress: Progress) -> tuple[Run, list[dict[str, float]]]:
    """Takes a run to its end with progress, live preview and interruption.

    Returns:
        The run, and the losses of its steps: fewer than planned where `finish_early` was set.
    """
    steps = []
    preview = min(PREVIEW_SIZE, *sides(run.picture))
    started = last_preview = last_message = time.monotonic()
    spent = 0.0
    finish_early.clear()
    try:
        for step in run:
            mm.throw_exception_if_processing_interrupted()
            steps.append(step)
            now = time.monotonic()
            if now - last_preview >= PREVIEW_SECONDS and spent <= PREVIEW_SHARE * (now - started):
                progress.show(run.step, run.image(preview))
                last_message = last_preview = time.monotonic()
                spent += last_preview - now
            elif now - last_message >= PROGRESS_SECONDS:
                progress.show(run.step)
                last_message = now
            if finish_early.is_set():
                log.info("Splice: finished early, after %d of %d steps", run.step, run.steps)
                break
        progress.next(run.steps)
        return run, [step.floats() for step in steps]
    finally:
        del run  # an exception on its way keeps this frame, which must not keep the run's memory
