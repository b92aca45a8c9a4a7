"""Parts that two pictures have in common, and the background."""

import pytest
import skimage.data
import torch
import torch.nn.functional as F

from splice_engine import Correspondence, InstantSettings, InstantTransfer
from splice_engine.images import resize
from splice_engine.matching.parts import divide_into_parts

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
    _, background = divide_into_parts(Correspondence.between(*objects, backbone, short_patches=16))
    background = resize(background, (224, 224))
    assert background[..., OBJECT, OBJECT].mean() < 0.15
    assert background[..., :MARGIN, :].mean() > 0.85
    assert background[..., :, -MARGIN:].mean() > 0.85


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
    match, background = divide_into_parts(Correspondence.between(flat, flat, tiny(), short_patches=8))
    assert torch.isfinite(match.source).all()
    assert torch.isfinite(background).all()
