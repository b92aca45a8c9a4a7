"""The best of several seeds: what it costs, which goes on, and that it is the run of its seed."""

from dataclasses import replace
from functools import partial
from operator import truediv
from statistics import median

import pytest
import torch

from splice_engine import PRESETS, Transfer, load_picture, measure, preset, save_picture
from splice_engine.batch.best_of import (
    COARSE_COST,
    MATCH_COST,
    MEASURE_COST,
    MOST,
    REFINE_COST,
    WARM_COST,
    BestOf,
    plan_further,
    plan_rounds,
)
from splice_engine.images import resize
from splice_engine.presets import DEFAULT_PRESET

pytestmark = pytest.mark.usefixtures("coarse_matching")

SMALL = preset("draft", size=64, vit_size=56, steps=9, warm_steps=6, density=1, cached_crops=3)

LONG_BEFORE = replace(SMALL, steps=6, refine_steps=12)
"""All of a few seeds can be trained to their end, since they share most of the work."""


def distances_of(score):
    return score.structure_distance, score.appearance_distance


def price(settings, first, last):
    """Cost of the steps from one to another, in steps of the recipe."""
    coarse = round(settings.warm_coarse * settings.warm_steps)
    prices = [REFINE_COST] * settings.refine_steps
    prices += [COARSE_COST if step < coarse else WARM_COST for step in range(settings.warm_steps)]
    return sum([*prices, *[1.0] * settings.steps][first:last])


@pytest.mark.parametrize("settings", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("count", range(2, MOST + 1))
def test_the_cost_is_below_1_8_runs(settings, count):
    """Measures included."""
    rounds = plan_rounds(settings, count)
    assert rounds == sorted(rounds)
    match = MATCH_COST * settings.match_passes * settings.density if settings.warm_steps else 0
    cost = single = match + price(settings, 0, settings.all_steps)
    before, left = settings.steps_before, count
    for step in rounds:
        cost += (left - 1) * price(settings, before, step) + left * MEASURE_COST
        before, left = step, (left + 1) // 2
    assert left == 1 or rounds == [settings.all_steps]
    further = [settings.all_steps, *plan_further(settings, count)]
    cost += further[-1] - further[0] + (len(further) - 1) * MEASURE_COST
    assert len(further) == 1 or rounds == [settings.all_steps]
    assert cost <= 1.8 * single


def test_four_seeds_of_the_default_recipe_are_measured_at_their_end():
    settings = PRESETS[DEFAULT_PRESET]
    assert plan_rounds(settings, 4) == [settings.all_steps]
    assert plan_further(settings, 4) == [settings.all_steps + steps for steps in (5, 10, 15)]


@pytest.mark.parametrize("refine_steps", [0, 2])
def test_the_best_goes_on_as_its_seed_alone(refine_steps, pair, tiny):
    pictures = [resize(picture, (72, 88)) for picture in pair]
    backbone = tiny()
    settings = replace(SMALL, seed=2**63 - 2, refine_steps=refine_steps)
    selection = BestOf(partial(Transfer, *pictures, backbone), settings, 4)
    planned, taken = selection.steps, 0
    for taken, _ in enumerate(selection, 1):
        assert selection.step == taken
    assert (taken, selection.steps_left) == (planned, 0)
    first, second = selection.scores[:4], selection.scores[4:]
    assert {score.seed for score in first} == {2**63 - 2, 2**63 - 1, 0, 1}
    assert [score.goes_on for score in first] == [True, True, False, False]
    assert [score.goes_on for score in second] == [True, False]
    assert {score.seed for score in second} == {score.seed for score in first if score.goes_on}
    distances = [distances_of(score) for score in first]
    typical = [median(values) for values in zip(*distances, strict=True)]
    worse = [max(structure / typical[0], appearance / typical[1]) for structure, appearance in distances]
    assert worse == sorted(worse)
    for score in (first[0], first[-1]):
        run = Transfer(*pictures, backbone, replace(settings, seed=score.seed))
        for _ in run:
            if run.step == score.step:
                break
        alone = measure(*pictures, run.image(64), backbone)
        assert alone.structure_distance == score.structure_distance
        assert alone.appearance_distance == score.appearance_distance
    best = selection.choose()
    assert best.settings.seed == second[0].seed
    alone = Transfer(*pictures, backbone, best.settings)
    assert [step.total.item() for step in alone][best.step :] == [step.total.item() for step in best]
    assert torch.equal(best.image(), alone.image())


@pytest.mark.parametrize("end", [1.0, 0.1])  # more steps help, by 5 %; do not help, by 0.3 %
def test_the_best_trains_on_while_that_makes_it_better(end, pair, tiny):
    """Its result is what it was after the steps with the lowest worse share, be they the recipe's or more."""
    pictures = [resize(picture, (72, 88)) for picture in pair]
    backbone = tiny()
    settings = replace(LONG_BEFORE, learning_rate_end=end)
    selection = BestOf(partial(Transfer, *pictures, backbone), settings, 2)
    assert (len(list(selection)), selection.steps_left) == (selection.steps, 0)
    first, further = selection.scores[:2], selection.scores[2:]
    best, seed = selection.choose(), first[0].seed
    assert [score.step for score in further] == [settings.all_steps + step for step in (1, 2, 3)]
    assert {score.seed for score in further} == {best.settings.seed} == {seed}
    typical = [median(values) for values in zip(*map(distances_of, first), strict=True)]
    shares = [max(map(truediv, distances_of(score), typical)) for score in selection.scores]
    assert [score.goes_on for score in further] == [shares[i] < min(shares[0:1] + shares[2:i]) for i in (2, 3, 4)]
    chosen = [score for score in selection.scores if score.goes_on][-1]
    assert chosen.step > settings.all_steps or end < 1
    assert (best.step, best.steps_left, len(selection.taken)) == (chosen.step, 0, chosen.step)
    alone = Transfer(*pictures, backbone, replace(settings, seed=seed))
    for score in [first[0], *further]:
        alone.extend(score.step)
        list(alone)
        measured = measure(*pictures, alone.image(64), backbone)
        assert (measured.structure_distance, measured.appearance_distance) == distances_of(score)
        if score is chosen:
            assert torch.equal(best.image(), alone.image())


def test_a_selection_that_is_ended_early_gives_the_best_so_far(pair, tiny):
    """Further steps that were not measured do not count."""
    begin = partial(Transfer, *(resize(picture, (72, 88)) for picture in pair), tiny())
    selection = BestOf(begin, replace(LONG_BEFORE, learning_rate_end=1.0), 2)
    for _ in selection:
        if selection.best.step == LONG_BEFORE.all_steps + 2:
            break
    first, _, further = selection.scores
    assert further.step == LONG_BEFORE.all_steps + 1
    best = selection.choose()
    chosen = further if further.goes_on else first
    assert (best.step, best.steps_left, len(selection.taken)) == (chosen.step, 0, chosen.step)
    alone = Transfer(
        best.picture,
        best.appearance,
        best.backbone,
        replace(LONG_BEFORE, seed=best.settings.seed, learning_rate_end=1.0),
    )
    alone.extend(chosen.step)
    list(alone)
    assert torch.equal(best.image(), alone.image())
    assert list(selection) == []


@pytest.mark.parametrize("settings", [SMALL, LONG_BEFORE], ids=["halved", "to the end"])
def test_leaving_the_loop_loses_nothing(settings, pair, tiny):
    begin = partial(Transfer, *(resize(picture, (72, 88)) for picture in pair), tiny())
    whole, broken = (BestOf(begin, settings, 3) for _ in range(2))
    totals = [step.total.item() for step in whole]
    got = []
    while broken.steps_left:
        for step in broken:
            got.append(step.total.item())
            if len(got) % 2:
                break
    list(broken)
    assert got == totals
    assert broken.scores == whole.scores
    assert torch.equal(broken.image(), whole.image())


@pytest.fixture
def command(splice, pair, tmp_path):
    for name, picture in zip(("a.png", "b.png"), pair, strict=True):
        save_picture(resize(picture, (72, 88)), tmp_path / name)

    def run(name, *options):
        vit = ("--backbone", "dinov2_vits14_saliency", "--device", "cpu", "--dtype", "fp32")
        recipe = ("--preset", "paper", "--size", 64, "--vit-size", 56, "--steps", 6, "--quiet")
        return splice(
            "transfer", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / name, *vit, *recipe, *options
        )

    return run


def test_the_option_prints_the_scores(command, tmp_path):
    """The result is that of the seed that went on, and the log is that of all of its steps."""
    result = command("best.png", "--best-of", 2, "--log", tmp_path / "best.jsonl")
    assert (result.status, result.err) == (0, "")
    first, second, _ = result.out.splitlines()
    assert first.startswith("seed ")
    assert first.endswith(", goes on")
    assert second.endswith(", is left")
    seed = first.split()[1]
    command("alone.png", "--seed", seed, "--log", tmp_path / "alone.jsonl")
    assert torch.equal(load_picture(tmp_path / "best.png"), load_picture(tmp_path / "alone.png"))
    best, alone = ((tmp_path / name).read_text().count('"step"') for name in ("best.jsonl", "alone.jsonl"))
    assert best == alone == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--best-of", 0), "must be a whole number of at least 1"),
        (("--best-of", 17), "must be at most 16"),
        (("--best-of", 2, "--resume"), "--best-of keeps no checkpoints"),
        (("--best-of", 2, "--checkpoint-every", 5), "--best-of keeps no checkpoints"),
    ],
)
def test_what_does_not_go_together_is_told(command, options, words):
    result = command("out.png", *options)
    assert (result.status, len(result.complaint)) == (2, 1)
    assert words in result.err
