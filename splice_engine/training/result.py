"""The picture of a run that has ended, with as much memory as there is, and what its generator makes of pictures."""

import logging

from torch import Tensor

from ..images import resize, sides
from ..masks import composite
from ..vit.devices import is_out_of_memory
from .generator import Finished, Generator, digest
from .refinement import Refinement
from .rendering import render_anywhere
from .transfer import Transfer

log = logging.getLogger(__name__)

SHARES = (1, 2, 3, 4)
"""What the short side is divided by, one after the other, until there is memory enough."""


def apply_generator(generator: Generator, picture: Tensor) -> Tensor:
    """A picture in the appearance that a generator was trained for.

    Args:
        generator: On the picture's device.
        picture: `[1, 3, H, W]` in 0..1.

    Returns:
        `[1, 3, H, W]` in 0..1: the finished picture for the structure picture that the generator was trained on, where
        it has one, its output for any other.
    """
    finished = generator.finished
    if finished is not None and finished.structure == digest(picture):
        return finished.picture.to(picture) / 255
    return render_anywhere(generator, picture, size=generator.metadata.get("size"))


def render_result(run: Transfer | Refinement) -> Tensor:
    """Ends a run and renders its picture at full size; where memory does not suffice, on the CPU, then smaller.

    A smaller picture is enlarged; past the mask and its feather it is the structure picture all the same. Where more
    than the generator makes the picture, the generator keeps it, see `apply_generator`.

    Args:
        run: No further step of it can be taken.

    Returns:
        `[1, 3, H, W]` in 0..1, on the CPU.

    Raises:
        SpliceError: The run has diverged.
        RuntimeError: Not even the smallest picture had enough memory, see `is_out_of_memory`.
        MemoryError: Likewise.
    """
    result = _render_somewhere(run)
    if isinstance(run, Transfer) and (run.settings.residual or run.mask is not None):
        run.generator.finished = Finished.of(run.picture, result)
    return result


def _render_somewhere(run: Transfer | Refinement) -> Tensor:
    attempts = [("cpu", share) for share in SHARES]
    if run.device.type != "cpu":
        attempts.insert(0, (str(run.device), 1))
    for device, share in attempts[:-1]:
        try:
            return _render(run, device, share)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Past the handler, whose traceback holds what the attempt took.
        size = "full size" if share == 1 else f"1/{share} of its size"
        log.warning("out of memory for the result at %s on %s: trying with less", size, device)
    return _render(run, *attempts[-1])


def _render(run: Transfer | Refinement, device: str, share: int) -> Tensor:
    run.end(device)
    if share == 1:
        return run.image().cpu()
    result = resize(run.image(min(sides(run.picture)) // share), sides(run.picture))
    return result if run.mask is None else composite(run.picture, result, run.mask, run.settings.feather)
