"""Painting a picture with the patches of another."""

import pytest
import torch
import torch.nn.functional as F

from splice_engine.images import sides
from splice_engine.matching.painting import paint, paint_in_bands
from splice_engine.matching.patchmatch import find_offsets


def synthesise(exemplar, guide, *rest):
    """The picture that is painted with the patches that are found, at the size of the guide."""
    return paint(exemplar, find_offsets(exemplar, guide, *rest), sides(guide))


@pytest.fixture
def exemplar():
    """Smooth in some places and busy in others, and not square; of so little colour that nothing is an accent."""
    rng = torch.Generator().manual_seed(0)
    picture = 0.3 * torch.rand(1, 3, 40, 56, generator=rng) + 0.7 * torch.rand(1, 1, 40, 56, generator=rng)
    picture[..., :28] = torch.linspace(0, 1, 28)
    return picture


def position(size):
    """Descriptors by which each place is most like the same place."""
    axes = torch.meshgrid(*(torch.linspace(0, 4, n) for n in size), indexing="ij")
    return torch.stack(axes)[None]


def test_a_picture_is_its_own_best_exemplar(exemplar):
    guide = position(sides(exemplar))
    painted = synthesise(exemplar, guide, guide, torch.zeros(2, 5, 7))
    assert (painted - exemplar).abs().mean() < 0.02


def test_places_are_found_from_afar(exemplar):
    """The guide is mirrored, the start is not."""
    guide = position(sides(exemplar))
    painted = synthesise(exemplar, guide.flip(-1), guide, torch.zeros(2, 5, 7))
    near, mirrored, plain = (
        F.avg_pool2d(x, 8) for x in (painted, exemplar.flip(-1), exemplar)
    )  # noise has no mirror image
    assert (near - mirrored).abs().mean() < 0.3 * (plain - mirrored).abs().mean()


def test_size_is_that_of_the_guide(exemplar):
    painted = synthesise(exemplar, position((33, 47)), position(sides(exemplar)), torch.zeros(2, 3, 4))
    assert painted.shape == (1, 3, 33, 47)
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_costly_places_are_left_out():
    """Of two halves, one red and one blue, the guide asks for both alike."""
    exemplar = torch.zeros(1, 3, 40, 40)
    exemplar[:, 0, :, :20], exemplar[:, 2, :, 20:] = 1, 1
    flat = torch.zeros(1, 1, 40, 40)
    cost = torch.zeros_like(flat)
    cost[..., :20] = 4
    start = torch.zeros(2, 4, 4)
    free = synthesise(exemplar, flat, flat, start)
    bound = synthesise(exemplar, flat, flat, start, cost)
    assert free[:, 0].mean() > 0.3
    assert bound[:, 0].mean() < 0.1


def test_no_patch_is_spread_over_everything(exemplar):
    """Nothing speaks for any place, and all begin at one: without a price on use the smooth part would win."""
    flat = torch.zeros(1, 1, *sides(exemplar))
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(56), indexing="ij")
    painted = synthesise(exemplar, flat, flat, torch.stack([-rows, -columns]))
    assert painted.std() > 0.5 * exemplar.std()


@pytest.mark.parametrize("price", [1, 40])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_rim_of_an_exemplar_is_not_painted(mirrored, price, exemplar):
    """Also where a picture begins at it, nothing speaks for any place, and use costs much, as in a background."""
    beside = torch.cat([exemplar, exemplar.flip(-1)], dim=-1) if mirrored else exemplar
    flat = torch.zeros(1, 1, *sides(beside))
    factor = torch.full_like(flat, price)
    offsets = find_offsets(beside, flat, flat, torch.zeros(2, 5, 7), mirrored=mirrored, usage_factor=factor)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in sides(beside)), indexing="ij")
    row, column = rows + offsets[0], columns + offsets[1]
    column = torch.minimum(column, 111 - column)
    rim = (row == 0) | (row == 39) | (column == 0) | (column == 55)
    assert rim.float().mean() < 0.02


def test_where_use_costs_more_more_patches_are_used(exemplar):
    """In the left half of the picture, though the guide asks for one place everywhere."""
    guide, wanted = position(sides(exemplar)), torch.full((1, 2, 40, 56), 3.0)
    factor = torch.ones(1, 1, 40, 56)
    factor[..., :28] = 8
    offsets = find_offsets(exemplar, wanted, guide, torch.zeros(2, 5, 7), usage_factor=factor)
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(56), indexing="ij")
    places = ((rows + offsets[0]) * 56 + columns + offsets[1]).long()
    assert len(places[:, :28].unique()) > 1.5 * len(places[:, 28:].unique())


def test_an_ear_does_not_become_all_tag():
    """The guide asks for one small square in four times as many places: not one of another colour than all around."""

    def count(colour):
        exemplar = 0.4 + 0.2 * torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).repeat(1, 3, 1, 1)
        exemplar[..., 28:34, 40:46] = torch.tensor(colour).view(3, 1, 1)
        guide = 2 * position((64, 64))
        wanted = guide.clone()
        wanted[..., 25:37, 37:49] = guide[..., 31:32, 43:44]
        offsets = find_offsets(exemplar, wanted, guide, torch.zeros(2, 8, 8))
        rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        return int(((rows + offsets[0] - 30.5).abs() < 3).logical_and((columns + offsets[1] - 42.5).abs() < 3).sum())

    assert count((0.5, 0.5, 0.5)) > 120
    assert 36 <= count((0.8, 0.4, 0.3)) < 100


def test_each_place_keeps_to_the_half_in_which_it_starts(exemplar):
    """The left of the picture starts in the exemplar, the right in its mirror image."""
    beside, flat = torch.cat([exemplar, exemplar.flip(-1)], dim=-1), torch.zeros(1, 1, 40, 56)
    start = torch.zeros(2, 5, 8)
    start[1, :, 4:] = 56
    offsets = find_offsets(beside, flat, flat.repeat(1, 1, 1, 2), start, mirrored=True)
    in_mirror_image = torch.arange(56) + offsets[1] >= 56
    assert torch.equal(in_mirror_image, (torch.arange(56) >= 28).expand(40, -1))


def test_the_rng_is_its_own(exemplar):
    """The same picture each time, and the caller's random numbers are left alone."""
    guide = position(sides(exemplar))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = synthesise(exemplar, guide.flip(-1), guide, torch.zeros(2, 5, 7))
    assert torch.rand(1) == expected
    torch.manual_seed(4)
    assert torch.equal(synthesise(exemplar, guide.flip(-1), guide, torch.zeros(2, 5, 7)), first)


def test_a_larger_picture_is_as_sharp_as_a_larger_exemplar(exemplar):
    """Offsets that were found on small pictures paint large ones with the pixels of a large exemplar."""
    guide = position(sides(exemplar))
    offsets = find_offsets(exemplar, guide, guide, torch.zeros(2, 5, 7))
    large = torch.rand(1, 3, 120, 168, generator=torch.Generator().manual_seed(1))
    painted = paint(large, offsets, (120, 168))
    assert (painted - large).abs().mean() < 0.05
    assert set(painted[0, 0].flatten().tolist()) & set(large[0, 0].flatten().tolist())


@pytest.mark.parametrize("size", [(24, 30), (97, 45), (160, 224)], ids=str)
def test_a_mirror_image_need_not_be_there(size, exemplar):
    """Offsets that were found in an exemplar beside its mirror image, and some that lead out of it."""
    offsets = torch.randint(-60, 120, (2, 24, 30), generator=torch.Generator().manual_seed(0)).float()
    beside = torch.cat([exemplar, exemplar.flip(-1)], dim=-1)
    assert torch.equal(paint(exemplar, offsets, size, mirrored=True), paint(beside, offsets, size))


@pytest.mark.parametrize("size", [(64, 96), (150, 211), (512, 768)])
def test_in_bands_patches_meet_without_a_seam(size):
    """The left half is painted with one part of a slope, the right half with a brighter one."""
    slope = torch.linspace(0, 1, 3 * size[1])
    grain = 0.02 * torch.randn(size[0], 3 * size[1], generator=torch.Generator().manual_seed(0))
    exemplar = (slope + grain).expand(1, 3, -1, -1)
    offsets = torch.zeros(2, 64, 96)
    offsets[1, :, 48:] = 60
    plain, banded = (how(exemplar, offsets, size)[0, 0] for how in (paint, paint_in_bands))
    middle = size[1] // 2
    assert (banded[:, middle] - banded[:, middle - 1]).mean() < 0.3 * 60 / 288
    far = abs(torch.arange(size[1]) - middle) > size[1] // 6
    assert (plain - banded)[:, far].abs().mean() < 0.01  # there both are the exemplar
