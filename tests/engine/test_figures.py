"""Figures: that they show what they are given."""

import math

import numpy as np
import pytest
import torch

from splice_engine import SpliceError
from splice_engine.analysis.figures import HUES, comparison_strip, heat_picture, loss_curves, mark_point, sheet


def colours(image):
    return {colour for _, colour in image.getcolors(image.width * image.height)}


def test_each_loss_has_a_curve_of_its_own_colour():
    steps = [{"step": i, "total": 2.0 / (i + 1), "structure": 0.1, "seconds": 3.0} for i in range(50)]
    image = loss_curves(steps, (640, 360))
    assert image.size == (640, 360)
    assert {HUES[0], HUES[1]} <= colours(image)
    assert HUES[2] not in colours(image)  # seconds are no loss


def test_losses_fall_on_a_logarithmic_axis():
    """A loss that falls by the same factor each step is a straight line down."""
    image = np.asarray(loss_curves([{"total": 10 ** (-i / 25)} for i in range(101)], (900, 500)))
    ours = (image == HUES[0]).all(axis=-1)
    columns = np.flatnonzero(ours.any(axis=0))[5:-40]
    heights = np.array([np.flatnonzero(ours[:, column]).mean() for column in columns])
    straight = np.polyval(np.polyfit(columns, heights, 1), columns)
    assert heights[-1] > heights[0] + 200
    assert np.abs(heights - straight)[: int(0.8 * len(columns))].max() < 12


def test_a_loss_that_comes_now_and_then_is_drawn_too():
    steps = [{"total": 1.0, **({"whole": 0.5} if i % 10 == 0 else {})} for i in range(40)]
    assert HUES[1] in colours(loss_curves(steps))


@pytest.mark.parametrize("steps", [[], [{}], [{"total": 0.0}], [{"total": math.nan}], [{"step": 3, "seconds": 1.0}]])
def test_nothing_to_draw_is_refused(steps):
    with pytest.raises(SpliceError, match="no loss above 0"):
        loss_curves(steps)


@pytest.mark.parametrize(
    "steps", [[{"total": 1.0}], [{"total": math.inf}, {"total": 3.0}], [{"step": 7, "total": 1e-9}]]
)
def test_one_step_is_enough(steps):
    assert HUES[0] in colours(loss_curves(steps))


def test_heat_grows_lighter():
    heat = torch.linspace(0, 1, 50).view(1, 1, 1, 50).expand(2, 1, 40, 50)
    shown = heat_picture(heat, torch.full((2, 3, 40, 50), 0.5))
    assert shown.shape == (2, 3, 40, 50)
    assert (shown.mean(dim=1)[:, 20].diff(dim=-1) > 0).all()


def test_a_ring_lies_around_the_point():
    picture = torch.full((1, 3, 100, 200), 0.5)
    changed = (mark_point(picture, (0.25, 0.6)) - picture).abs().sum(dim=1)[0] > 0.1
    rows, columns = changed.nonzero(as_tuple=True)
    assert (rows.float().mean(), columns.float().mean()) == (pytest.approx(60, abs=1), pytest.approx(50, abs=1))
    assert not changed[60, 50]


def test_a_sheet_has_a_strip_for_each_row():
    tile = torch.rand(1, 3, 40, 60)
    row = {"one": tile, "two": tile}
    strip, page = comparison_strip(row, 80), sheet([row, {"three": tile}], 80)
    assert page.size == (strip.width, 2 * strip.height)
