"""The best of several seeds: all begin, and early measures decide which go on (successive halving)."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from ..analysis.metrics import measure
from ..images import resize, short_side_size, sides
from ..settings import SEEDS, Settings
from ..training.rendering import render
from ..training.run import Run, Step
from ..training.transfer import Transfer

MOST = 16
"""Most seeds: more would be left after too few steps to tell them apart."""

EXTRA_COST = 0.77
"""What all seeds but the best may cost together, measures included, as a share of one run."""

WARM_COST, COARSE_COST, MEASURE_COST = 0.6, 0.2, 1.0
"""Costs in steps of the recipe: of a step of the warm start, of one at half the size, and of measuring a picture; with
a ViT-S/14 at 256 pixels on a CPU. With larger ViTs the first two are less."""


@dataclass(frozen=True)
class Score:
    """What a seed had reached when it was measured.

    Attributes:
        step: Steps that it had taken.
        seed: Its number.
        structure_distance: Of its picture then, see `Measurement`.
        appearance_distance: Likewise.
        goes_on: Whether it was in the better half.
    """

    step: int
    seed: int
    structure_distance: float
    appearance_distance: float
    goes_on: bool

    def __str__(self) -> str:
        distances = f"structure {self.structure_distance:.4g}, appearance {self.appearance_distance:.4g}"
        return f"seed {self.seed} after {self.step} steps: {distances}, {'goes on' if self.goes_on else 'is left'}"


class BestOf(Run):
    """Runs of one transfer with different seeds, of which the best is found in less than the cost of a second run.

    After each round the better half goes on, by the sum of both distances in the recipe's own weights. Iterate, then
    let the best one go on: its result is the one that its seed gives alone.

        for step in (selection := BestOf(begin, settings, 4)):
            print(step.index)
        for step in (run := selection.best):
            print(step.index)

    Args:
        begin: Makes a run with given settings; the other arguments of all runs are equal.
        settings: The recipe. The seeds are its own and those after it.
        count: Seeds, at most `MOST`.

    Attributes:
        runs: That are still in it.
        scores: Of all measures taken.
        step: Steps taken so far, of all runs.
        seed: Of the last of them.
    """

    def __init__(self, begin: Callable[[Settings], Transfer], settings: Settings, count: int) -> None:
        self._count = count
        seeds = [(settings.seed + index) % SEEDS for index in range(count)]
        self.runs = [begin(replace(settings, seed=seed)) for seed in seeds]
        self.rounds = plan_rounds(self.runs[0].settings, count)
        self.scores: list[Score] = []
        self.step, self.seed = 0, settings.seed
        self._round = 0

    @property
    def best(self) -> Transfer:
        """The best run so far."""
        return self.runs[0]

    def image(self, size: int | None = None) -> Tensor:
        """The best run's picture so far; arguments as for `Transfer.image`."""
        return self.best.image(size)

    @property
    def picture(self) -> Tensor:
        """The structure picture, `[1, 3, H, W]`."""
        return self.best.picture

    @property
    def steps(self) -> int:
        """Steps of the whole selection."""
        return count_steps(self.best.settings, self._count)

    def __iter__(self) -> Iterator[Step]:
        shared = self.best.settings.refine_steps if self.rounds else 0
        steps = iter(self.best)
        while self.best.step < shared:
            self.step, step = self.step + 1, next(steps)
            yield step
        for run in self.runs[1:]:  # only the seeds differ, which take part from here on
            run.pair, run.refinement, run.step = self.best.pair, self.best.refinement, max(run.step, shared)
        while self._round < len(self.rounds):
            for run in self.runs:
                steps = iter(run)
                while run.step < self.rounds[self._round]:
                    step = next(steps)
                    self.step, self.seed = self.step + 1, run.settings.seed
                    yield step
            self._halve()
            self._round += 1

    def _halve(self) -> None:
        """Measures the runs and leaves the worse half."""
        settings = self.best.settings
        size = min(settings.size or min(sides(self.picture)), *sides(self.picture))
        found = [_measure(run, _picture(run, size)) for run in self.runs]
        totals = [
            settings.structure_weight * structure + settings.appearance_weight * appearance
            for structure, appearance in found
        ]
        order = sorted(range(len(self.runs)), key=totals.__getitem__)
        going_on = order[: _half(len(order))]
        for index in order:
            run = self.runs[index]
            self.scores.append(Score(run.step, run.settings.seed, *found[index], index in going_on))
        self.runs = [self.runs[index] for index in going_on]


def _measure(run: Transfer, picture: Tensor) -> tuple[float, float]:
    """Structure and appearance distance of a picture; that of a mixture is the weighted mean over its appearances."""
    found = [measure(run.picture, appearance, picture, run.backbone) for appearance in run.appearances]
    distances = [share * figures.appearance_distance for share, figures in zip(run.shares, found, strict=True)]
    return found[0].structure_distance, sum(distances)


def _picture(run: Transfer, size: int) -> Tensor:
    """What a run is measured by: the generator's own picture while the residual would make all runs' equal."""
    if run.step > run.settings.steps_before:
        return run.image(size)
    picture = resize(run.picture, short_side_size(*sides(run.picture), size)).to(run.device)
    return render(run.generator, picture, size=run.settings.size)


def plan_rounds(settings: Settings, count: int) -> list[int]:
    """Steps after which the worse half of the seeds is left, round by round, each round at the same extra cost.

    Args:
        settings: The recipe.
        count: Seeds.
    """
    coarse = round(settings.warm_coarse * settings.warm_steps)
    prices = [COARSE_COST] * coarse + [WARM_COST] * (settings.warm_steps - coarse) + [1.0] * settings.steps
    prices = [0.0] * settings.refine_steps + prices  # all seeds share it
    spent = list(accumulate(prices))
    counts = [count]
    while counts[-1] > 1:
        counts.append(_half(counts[-1]))
    counts.pop()  # the best one needs no measure
    budget = EXTRA_COST * spent[-1] - MEASURE_COST * sum(counts)
    rounds: list[int] = []
    at = 0.0
    for count in counts:
        at += max(0.0, budget) / len(counts) / (count - 1)
        rounds.append(max(1, bisect_right(spent, at)))
    return rounds


def count_steps(settings: Settings, count: int) -> int:
    """Steps of a selection, those of all of its seeds together; none where there is one seed.

    Args:
        settings: The recipe.
        count: Seeds.
    """
    rounds = plan_rounds(settings, count)
    before = total = settings.refine_steps if rounds else 0
    for step in rounds:
        total += count * (step - before)
        before, count = step, _half(count)
    return total


def _half(count: int) -> int:
    """The better half of so many, the one in the middle included."""
    return (count + 1) // 2
