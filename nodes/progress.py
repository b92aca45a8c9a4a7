"""What a user follows of a node: progress bar, text, live preview, interruption."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import comfy.model_management as mm
from comfy.utils import ProgressBar
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..splice_engine import Inversion, Refinement, Transfer
from ..splice_engine.batch.best_of import BestOf
from ..splice_engine.images import resize, short_side_size, sides, to_pil
from .finish import button

log = logging.getLogger("splice")

PREVIEW_SIZE = 256
"""Short side in pixels of a live preview, at most."""

PREVIEW_SECONDS = 0.5
"""Least time between two previews."""

PREVIEW_SHARE = 0.02
"""Share of a run's time that its previews may take."""

PROGRESS_SECONDS = 0.1
"""Least time between two messages of progress."""

Run = TypeVar("Run", Transfer, Refinement, Inversion, BestOf)
Item = TypeVar("Item")


def show_text(text: str) -> None:
    """Shows a line of text on the node that is executed."""
    context, server = get_executing_context(), PromptServer.instance
    if context is not None:
        server.send_progress_text(text, context.node_id, server.client_id)


class Cancellable(TorchFunctionMode):
    """A context in which ComfyUI's Cancel is heard between any two operations of torch.

    It is for what takes seconds and has no steps: a pass through the ViT, the matching, the rendering. Each operation
    takes microseconds more, so that the steps of a training do without; there it is heard between the steps.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mm.throw_exception_if_processing_interrupted()
        return func(*args, **(kwargs or {}))


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

    def next(self, steps: int, result: Tensor | None = None) -> None:
        """Counts a run of so many steps as done; its result `[1, 3, H, W]` is the preview that stays on the node."""
        self._before += steps
        self.show(0, None if result is None else _shrink(result))


def _shrink(picture: Tensor) -> Tensor:
    """A picture at the size of a preview."""
    return resize(picture, short_side_size(*sides(picture), min(PREVIEW_SIZE, *sides(picture))))


def with_progress(items: Sequence[Item]) -> Iterator[Item]:
    """The items one after the other, with the node's progress bar and interruption between them."""
    progress = Progress(len(items))
    progress.show(0)
    for item in items:
        mm.throw_exception_if_processing_interrupted()
        yield item
        progress.next(1)


def run_with_progress(run: Run, progress: Progress) -> tuple[Run, list[dict[str, float]]]:
    """Takes a run to its end with progress, live preview and interruption; `Progress.next` then counts it as done.

    Returns:
        The run, and the losses of its steps: fewer than planned where the button ended it.
    """
    steps = []
    preview = min(PREVIEW_SIZE, *sides(run.picture))
    started = last_preview = last_message = time.monotonic()
    spent = 0.0
    show_text("Extracting the feature" if isinstance(run, Inversion) else "Matching the pictures")
    try:
        for step in _cancellable_from_the_start(run):
            mm.throw_exception_if_processing_interrupted()
            if not steps:
                show_text(f"Training {len(run.runs)} seeds" if isinstance(run, BestOf) else "Training")
            steps.append(step)
            now = time.monotonic()
            if now - last_preview >= PREVIEW_SECONDS and spent <= PREVIEW_SHARE * (now - started):
                progress.show(run.step, run.image(preview))
                last_message = last_preview = time.monotonic()
                spent += last_preview - now
            elif now - last_message >= PROGRESS_SECONDS:
                progress.show(run.step)
                last_message = now
            if button.ends_run:
                button.answer()
                log.info("Splice: finished early, after %d of %d steps", run.step, run.steps)
                break
        progress.show(run.step)
        show_text(f"{run.step} steps")
        return run, [step.floats() for step in steps]
    finally:
        del run  # an exception on its way keeps this frame, which must not keep the run's memory


def _cancellable_from_the_start(run: Run) -> Iterator[Any]:
    """The steps of a run, of which the first one matches the pictures before."""
    steps = iter(run)
    with Cancellable():
        first = next(steps, None)
    if first is not None:
        yield first
    yield from steps
