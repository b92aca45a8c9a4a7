"""Whole runs: of one pair, in lighter ways where memory does not suffice, and of a batch."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import comfy.model_management as mm
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ..splice_engine import (
    Generator,
    Objective,
    Refinement,
    RefinementSettings,
    Settings,
    SpliceError,
    Term,
    Transfer,
)
from ..splice_engine.batch.best_of import BestOf, count_steps
from ..splice_engine.images import sides
from ..splice_engine.training.losses import recipe_terms
from ..splice_engine.training.result import render_result
from ..splice_engine.training.terms import PictureTerm
from .convert import ImagePair, to_image
from .finish import button
from .memory import (
    NO_MEMORY,
    free_for_rendering,
    is_out_of_memory,
    lighten,
    load_to_device,
    refinement_bytes,
    step_bytes,
)
from .progress import Cancellable, Progress, run_with_progress, show_text

log = logging.getLogger("splice")

Item = TypeVar("Item")


class TrainingNode(io.ComfyNode):
    """A node with the button "Finish now"."""

    @classmethod
    def fingerprint_inputs(cls, **_inputs: object) -> int:
        """Changes when a run was ended early, so that its picture is not served from the cache as the full one's."""
        context = get_executing_context()
        return button.short_runs(context.node_id) if context else 0


@dataclass(frozen=True)
class Outcome:
    """What the runs of a batch left.

    Attributes:
        image: IMAGE, one picture for each pair.
        generator: That of the last run, on the CPU.
        losses: Of each run, of each of its steps.
    """

    image: Tensor
    generator: Generator
    losses: list[list[dict[str, float]]]


def train(
    pair: ImagePair,
    patchers: Sequence[ModelPatcher],
    settings: Settings,
    progress: Progress,
    terms: Sequence[Term] = (),
    start: Generator | None = None,
    best_of: int = 1,
    make_run: Callable[..., Transfer] = Transfer,
) -> tuple[Transfer, list[dict[str, float]]]:
    """A whole run, in lighter ways where memory does not suffice; call it inside `engine_context`.

    Args:
        pair: What it works on.
        patchers: The backbones that take part, that of the run first.
        settings: The recipe.
        progress: The node's.
        terms: Of an objective that replaces the recipe's own feature terms. Its terms between pixels stay.
        start: The generator from a copy of which training starts.
        best_of: Seeds that begin, of which the best goes on.
        make_run: Makes the run, with the arguments of `Transfer`.

    Returns:
        The run, and the losses of its steps: fewer than planned where it was finished early.

    Raises:
        SpliceError: The run's own, or not even the lightest way had enough memory.
    """
    if terms:
        terms = [*terms, *(term for term in recipe_terms(settings) if isinstance(term, PictureTerm))]
    while True:
        backbone, *_ = load_to_device(patchers, step_bytes(pair.structure, patchers, settings))
        objective = (
            Objective(terms, backbone, settings.vit_size, settings.vit_longest, settings.recompute) if terms else None
        )
        try:
            begin = partial(
                make_run, pair.structure, pair.appearance, backbone, objective=objective, generator=start, **pair.masks
            )
            if best_of > 1:
                return train_best(BestOf(begin, settings, best_of), progress)
            return run_with_progress(begin(settings=settings), progress)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here, past the handler whose traceback holds the run, can its memory be freed.
        mm.soft_empty_cache()
        settings = lighten(settings, min(sides(pair.structure)))


def train_best(selection: BestOf, progress: Progress) -> tuple[Transfer, list[dict[str, float]]]:
    """The best of several seeds, trained to its end; their scores are shown on the node, and logged.

    Args:
        selection: The seeds.
        progress: The node's.

    Returns:
        As `train`. Where the button ended the selection, the best so far is the run, with no step more.
    """
    run_with_progress(selection, progress)
    progress.next(selection.steps)
    run, steps = selection.choose(), [step.floats() for step in selection.taken]
    if not selection.steps_left:
        run, rest = run_with_progress(run, progress)
        steps += rest
    scores = [str(score) for score in selection.scores]
    log.info("Splice: %s", "; ".join(scores))
    show_text("\n".join([f"{run.step} steps of seed {run.settings.seed}", *scores]))
    return run, steps


def refine(pair: ImagePair, patcher: ModelPatcher, settings: RefinementSettings, progress: Progress) -> Refinement:
    """A whole refinement, in lighter ways where memory does not suffice; arguments and errors as for `train`."""
    while True:
        (backbone,) = load_to_device([patcher], refinement_bytes(pair.structure, patcher.model.backbone, settings))
        try:
            run = Refinement(pair.structure, pair.appearance, backbone, settings, **pair.masks)
            return run_with_progress(run, progress)[0]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # As in `train`.
        mm.soft_empty_cache()
        settings = lighten(settings, min(sides(pair.structure)))


def render_run(run: Transfer | Refinement) -> Tensor:
    """Ends a run and renders its picture, on the CPU, with the memory that its training and ComfyUI's models held."""
    run.end(run.device)
    free_for_rendering(run.picture[0, 0].numel())
    with Cancellable():
        return render_result(run)


def work_through(items: Sequence[Item], work: Callable[[Item], bool]) -> None:
    """Works on a batch, one item after the other, until the button ends it; see `FinishButton`.

    An error ends it too: it is raised where nothing is finished yet, else only told, so that what is finished stays.

    Args:
        items: Of the batch.
        work: Returns whether there was anything to train.
    """
    finished = 0
    for number, item in enumerate(items, 1):
        try:
            finished += work(item)
        except (SpliceError, RuntimeError, MemoryError) as error:
            if not finished or not (isinstance(error, SpliceError) or is_out_of_memory(error)):
                raise
            reason = str(error) if isinstance(error, SpliceError) else NO_MEMORY
            log.error("Splice: %d of %d failed, what is before it is kept: %s", number, len(items), reason)
            show_text(f"{number} of {len(items)} failed, what is before it is kept: {reason}")
            button.answer()
            return
        if button.ends_batch:
            return
        button.settle()


def paint_batch(
    pairs: Sequence[ImagePair], steps: int, run_pair: Callable[[ImagePair, Progress], Transfer | Refinement]
) -> Tensor:
    """The pictures of a batch, IMAGE; those of the pairs so far where the button or an error ends it.

    Args:
        pairs: What is worked on; those that are left alone are their own pictures.
        steps: Of each pair's run.
        run_pair: Makes that run and takes it to its end.
    """
    results: list[Tensor] = []
    progress = Progress(len(pairs) * steps)

    def paint(pair: ImagePair) -> bool:
        if pair.is_left_alone:
            results.append(pair.structure)
            progress.next(steps, pair.structure)
            return False
        run = run_pair(pair, progress)
        results.append(render_run(run))
        progress.next(run.steps, results[-1])
        return True

    work_through(pairs, paint)
    return to_image(results)


def run_batch(
    pairs: Sequence[ImagePair],
    patchers: Sequence[ModelPatcher],
    settings: Settings,
    terms: Sequence[Term] = (),
    start: Generator | None = None,
    best_of: int = 1,
    make_run: Callable[..., Transfer] = Transfer,
) -> Outcome:
    """One run for each pair that is not left alone, all from the same start; arguments as for `train`."""
    losses: list[list[dict[str, float]]] = []
    generators: list[Generator] = []

    def run_pair(pair: ImagePair, progress: Progress) -> Transfer:
        run, steps = train(pair, patchers, settings, progress, terms, start, best_of, make_run)
        losses.append(steps)
        generators[:] = [run.generator]
        return run

    image = paint_batch(pairs, settings.all_steps + count_steps(settings, best_of), run_pair)
    return Outcome(image, generators[-1].to("cpu"), losses)
