"""The best of several seeds: all begin, and measures decide which go on (successive halving)."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor

from ..analysis.metrics import measure
from ..images import sides
from ..settings import SEEDS, Settings
from ..training.run import Run, Step
from ..training.transfer import Transfer

MOST = 16
"""Most seeds: more would be left after too few steps to tell them apart."""

EXTRA_COST = 0.77
"""What all seeds but the best may cost together, measures included, as a share of one run."""

MATCH_COST, REFINE_COST, WARM_COST, COARSE_COST, MEASURE_COST = 2.5, 1.5, 0.4, 0.1, 1.0
"""Costs in steps of the recipe: at least of a match at density 1, of a step of refinement, of the warm start, and of
the warm start at half the size; at most of measuring a picture. With a ViT-S/14 at 256 pixels on a CPU."""

FURTHER_ROUNDS, FURTHER_SHARE = 3, 1 / 6
"""Most rounds in which the best seed trains on, where all were measured at their end, and the steps of each, as a share
of the recipe's."""

LEAST_DISTANCE = 1e-9
"""What a distance is compared with at least."""


@dataclass(frozen=True)
class Score:
    """What a seed had reached when it was measured.

    Attributes:
        step: Steps that it had taken.
        seed: Its number.
        structure_distance: Of its picture then, see `Measurement`.
        appearance_distance: Likewise.
        goes_on: Whether it was in the better half; in the last round, whether it was the best; after that, whether it
            was better than before.
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

    They share refinement and warm start, which have no seeds. After each round the better half goes on. Better is whose
    worse distance, of structure and appearance, is the lower one, each as a share of the median: so the best is no
    worse than most in either, if any is. Iterate, then let the best one go on; its result is the one that its seed
    gives alone.

    Where the cost allows all seeds to reach their end, that is the only round. With what is left of it, the best one
    trains on past its recipe, a few steps at a time: that lowers one distance and often raises the other. Its result is
    what it had reached where the worse distance was lowest, be it at the recipe's end or later.

        for step in (selection := BestOf(begin, settings, 4)):
            print(step.index)
        for step in (run := selection.choose()):
            print(step.index)

    Args:
        begin: Makes a run with given settings; the other arguments of all runs are equal.
        settings: The recipe. The seeds are its own and those after it.
        count: Seeds, at most `MOST`.

    Attributes:
        runs: That are still in it.
        scores: Of all measures taken.
        step: Steps taken so far, of all runs.
    """

    def __init__(self, begin: Callable[[Settings], Transfer], settings: Settings, count: int) -> None:
        seeds = [(settings.seed + index) % SEEDS for index in range(count)]
        self.runs = [begin(replace(settings, seed=seed)) for seed in seeds]
        settings = self.runs[0].settings
        self.rounds, self.further = plan_rounds(settings, count), plan_further(settings, count)
        self.scores: list[Score] = []
        self.step, self._steps = 0, count_steps(settings, count)
        self._round, self._further, self._is_shared = 0, 0, False
        self._typical: list[float] = []
        self._kept: tuple[float, int, dict[str, Tensor]] | None = None
        self._before: list[Step] = []
        self._own: dict[int, list[Step]] = {seed: [] for seed in seeds}

    @property
    def best(self) -> Transfer:
        """The best run so far, as it is."""
        return self.runs[0]

    def choose(self) -> Transfer:
        """Ends the selection, wherever it is; the best run, as it was where it was measured best."""
        if self._kept is not None:
            _, step, weights = self._kept
            del self._own[self.best.settings.seed][step - self.best.settings.steps_before :]
            self.best.end_at(step, weights)
        self._round, self._further = len(self.rounds), len(self.further)
        return self.best

    @property
    def taken(self) -> list[Step]:
        """The steps that the best run has taken so far."""
        return self._before + self._own[self.best.settings.seed]

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
        return self._steps

    def __iter__(self) -> Iterator[Step]:
        shared = self.best.settings.steps_before if self.rounds else 0
        yield from self._take(self.best, shared, self._before)
        if not self._is_shared:
            for run in self.runs[1:]:  # only the seeds differ, which take part from here on
                run.begin_like(self.best)
            self._is_shared = True
        while self._round < len(self.rounds):
            for run in self.runs:
                yield from self._take(run, self.rounds[self._round], self._own[run.settings.seed])
            self._halve()
            self._round += 1
        while self._further < len(self.further):
            until = self.further[self._further]
            self.best.extend(until)
            yield from self._take(self.best, until, self._own[self.best.settings.seed])
            self._further += 1
            self._keep_better()

    def _take(self, run: Transfer, until: int, log: list[Step]) -> Iterator[Step]:
        """The steps of a run until it has taken so many."""
        steps = iter(run)
        while run.step < until:
            step = next(steps)
            log.append(step)
            self.step += 1
            yield step

    def _halve(self) -> None:
        """Measures the runs and leaves the worse half; in the last round all but the best."""
        found = [_measure(run) for run in self.runs]
        self._typical = [max(median(distances), LEAST_DISTANCE) for distances in zip(*found, strict=True)]
        shares = [self._worse_share(pair) for pair in found]
        order = sorted(range(len(self.runs)), key=shares.__getitem__)
        is_last = self._round == len(self.rounds) - 1
        going_on = order[: 1 if is_last else _half(len(order))]
        for index in order:
            run = self.runs[index]
            self.scores.append(Score(run.step, run.settings.seed, *found[index], index in going_on))
        self.runs = [self.runs[index] for index in going_on]
        if self.further:
            self._keep(shares[order[0]])

    def _keep_better(self) -> None:
        """Measures the best run, which has trained on."""
        found = _measure(self.best)
        share = self._worse_share(found)
        is_better = self._kept is None or share < self._kept[0]
        self.scores.append(Score(self.best.step, self.best.settings.seed, *found, is_better))
        if is_better:
            self._keep(share)

    def _keep(self, share: float) -> None:
        """Keeps what makes the best run's picture."""
        self._kept = share, self.best.step, copy.deepcopy(self.best.generator.state_dict())

    def _worse_share(self, distances: tuple[float, float]) -> float:
        """The worse of structure and appearance distance, each as a share of the median over the seeds."""
        return max(distance / of for distance, of in zip(distances, self._typical, strict=True))


def _measure(run: Transfer) -> tuple[float, float]:
    """Structure and appearance distance of a run; the latter of a mixture is the weighted mean over its appearances."""
    size = min(run.settings.size or min(sides(run.picture)), *sides(run.picture))
    picture = run.image(size)
    found = [measure(run.picture, appearance, picture, run.backbone) for appearance in run.appearances]
    distances = [share * figures.appearance_distance for share, figures in zip(run.shares, found, strict=True)]
    return found[0].structure_distance, sum(distances)


def plan_rounds(settings: Settings, count: int) -> list[int]:
    """Steps after which the worse half of the seeds is left, round by round, each round at the same extra cost.

    Args:
        settings: The recipe.
        count: Seeds.
    """
    budget = _budget(settings)
    if count == 1:
        return []
    if _until_the_end(settings, count) <= budget:
        return [settings.all_steps]
    counts = [count]
    while counts[-1] > 2:
        counts.append(_half(counts[-1]))
    budget -= MEASURE_COST * sum(counts)
    rounds: list[int] = []
    at = 0.0
    for count in counts:
        at += max(0.0, budget) / len(counts) / (count - 1)
        rounds.append(settings.steps_before + min(settings.steps, max(1, int(at))))
    return rounds


def plan_further(settings: Settings, count: int) -> list[int]:
    """Steps after which the best of seeds is measured again, where all of them were measured at their end.

    Args:
        settings: The recipe.
        count: Seeds.
    """
    left = _budget(settings) - _until_the_end(settings, count)
    steps = max(1, round(FURTHER_SHARE * settings.steps))
    rounds = 0 if count == 1 else min(FURTHER_ROUNDS, int(max(0.0, left) / (steps + MEASURE_COST)))
    return [settings.all_steps + steps * (index + 1) for index in range(rounds)]


def _budget(settings: Settings) -> float:
    """What all seeds but the best may cost together, in steps of the recipe."""
    coarse = round(settings.warm_coarse * settings.warm_steps)
    before = COARSE_COST * coarse + WARM_COST * (settings.warm_steps - coarse) + REFINE_COST * settings.refine_steps
    if settings.warm_steps:
        before += MATCH_COST * settings.match_passes * settings.density
    return EXTRA_COST * (before + settings.steps)


def _until_the_end(settings: Settings, count: int) -> float:
    """What all seeds but one cost where all are measured at their end, likewise."""
    return (count - 1) * settings.steps + count * MEASURE_COST


def count_steps(settings: Settings, count: int) -> int:
    """Steps of a selection, those of all of its seeds together; none where there is one seed.

    Args:
        settings: The recipe.
        count: Seeds.
    """
    rounds, further = plan_rounds(settings, count), plan_further(settings, count)
    before = total = settings.steps_before if rounds else 0
    if further:
        total += further[-1] - settings.all_steps
    for step in rounds:
        total += count * (step - before)
        before, count = step, _half(count)
    return total


def _half(count: int) -> int:
    """The better half of so many, the one in the middle included."""
    return (count + 1) // 2
