"""Parts that two pictures have in common, and the background."""

import pytest
import skimage.data
import torch
import torch.nn.functional as F

from splice_engine import Correspondence, InstantSettings, InstantTransfer
from splice_engine.images import resize
from splice_engine.matching.guide import find_patches
from splice_engine.matching.parts import divide_into_parts, find_thin_parts

OBJECT, MARGIN = slice(56, 168), 40
"""Rows and columns of the object that is laid on a background, and what is background around it in any case."""


def lay_on(background, picture):
    """A picture in the middle of a background, `[1, 3, 224, 224]`."""
    canvas = resize(torch.from_numpy(background)[None, None].expand(1, 3, -1, -1) / 255, (224, 224)).clone()
    canvas[..., OBJECT, OBJECT] = resize(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, (112, 112))
    return canvas


@pytest.fixture(scope="module")
def objects():
    return (
        lay_on(skimage.data.grass(), skimage.data.chelsea()[:, 75:375]),
        lay_on(skimage.data.gravel(), skimage.data.chelsea()[:, 75:375][:, ::-1].copy()),
    )


def test_what_surrounds_an_object_is_background(backbone, objects):
    _, *backgrounds = divide_into_parts(Correspondence.between(*objects, backbone, short_patches=16))
    for background in (resize(each, (224, 224)) for each in backgrounds):
        assert background[..., OBJECT, OBJECT].mean() < 0.15
        assert background[..., :MARGIN, :].mean() > 0.85
        assert background[..., :, -MARGIN:].mean() > 0.85


def test_a_background_is_painted_with_background():
    """However small it is in B, and though an object there is hardly different: a black ear before a dark wood."""
    rng = torch.Generator().manual_seed(0)
    wood, other = torch.eye(32)[:2]
    ear = F.normalize(0.95 * wood + 0.3 * other, dim=0)

    def cells(count):
        """12 rows of 12 cells, of which so many rows are background; and where that is."""
        is_wood = (torch.arange(12) < count).repeat_interleave(12)
        descriptors = torch.where(is_wood[:, None], wood, ear) + 0.02 * torch.randn(144, 32, generator=rng)
        return F.normalize(descriptors, dim=-1), is_wood.float().view(1, 1, 12, 12)

    (source, around), (target, little) = cells(9), cells(2)
    noise = (0.4 + 0.2 * torch.rand(1, 1, 192, 192, generator=rng).expand(1, 3, -1, -1) for _ in range(2))
    match = Correspondence(source, target, (12, 12), (12, 12))
    offsets, _ = find_patches(match, *noise, None, (around, little), is_last=True)
    rows = torch.arange(96)[:, None] + offsets[0]
    assert (rows[:66] > 18).float().mean() < 0.02  # 9 % without


@pytest.mark.parametrize("density", [1, 2])
def test_legs_are_thin_and_bodies_are_not(density):
    background = torch.ones(1, 1, 20, 24)
    background[..., 3:11, 4:20] = 0
    background[..., 11:, 5:8] = background[..., 11:, 15:18] = 0
    wide = background.repeat_interleave(density, 2).repeat_interleave(density, 3)
    thin = F.avg_pool2d(find_thin_parts(wide, density), density)
    assert torch.equal(thin[..., 11:, :], 1 - background[..., 11:, :])
    assert thin[..., :11, :].sum() == 0


def test_the_background_gets_more_texture(backbone, objects):
    """Of half of it, where A has no detail of its own to which it would give way."""
    smooth = resize(resize(objects[0], (28, 28)), (224, 224))
    none, half, whole = (
        InstantTransfer.between(
            smooth, objects[1], backbone, InstantSettings(texture=texture), short_patches=16
        ).image()
        for texture in (0.0, 0.5, 1.0)
    )
    places = torch.zeros(1, 1, 224, 224), torch.ones(1, 1, 224, 224)
    places[0][..., OBJECT, OBJECT] = 1
    places[1][..., MARGIN:-MARGIN, MARGIN:-MARGIN] = 0
    inside, around = (((half - none).abs() * where).sum() / ((whole - none).abs() * where).sum() for where in places)
    assert around > 1.4 * inside


def test_a_cell_in_the_shade_is_matched_with_its_own_part():
    """The shaded side of a fruit is nearer to the shade on a table than to the fruit in the light."""
    rng = torch.Generator().manual_seed(0)
    fruit, table, shade, *others = torch.linalg.qr(torch.randn(32, 7, generator=rng)).Q.T
    sky, ground, cloud, grass = others
    kinds = torch.stack(
        [fruit, table, sky + 0.8 * cloud, sky - 0.8 * cloud, ground + 0.8 * grass, ground - 0.8 * grass]
    )

    def cells(shaded):
        """Rows of 20 cells of each kind, in one of which a few are in the shade."""
        rows = kinds[:, None] + 0.05 * torch.randn(6, 20, 32, generator=rng)
        rows[shaded, :4] += 1.2 * shade
        return F.normalize(rows.flatten(0, 1), dim=-1)

    match = Correspondence(cells(0), cells(1), (6, 20), (6, 20))
    shaded_fruit = (slice(0, 1), slice(0, 4))
    assert (match.matches()[0][shaded_fruit] == 1).all()
    assert (divide_into_parts(match)[0].matches()[0][shaded_fruit] == 0).all()


def test_the_same_pictures_have_the_same_parts(backbone, objects):
    match = Correspondence.between(*objects, backbone, short_patches=8)
    torch.manual_seed(3)
    first, second = (divide_into_parts(match)[0].source for _ in range(2))
    assert torch.equal(first, second)


def test_a_picture_of_one_colour_has_parts(tiny):
    flat = torch.full((1, 3, 112, 112), 0.5)
    match, background, _ = divide_into_parts(Correspondence.between(flat, flat, tiny(), short_patches=8))
    assert torch.isfinite(match.source).all()
    assert torch.isfinite(background).all()
