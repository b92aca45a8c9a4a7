"""Similarity to a place, and attention: against known answers."""

import pytest
import skimage.data
import torch
from PIL import Image

from splice_engine import Request, SpliceError, attention_map, similarity_map
from splice_engine.analysis.heatmaps import MAP_DENSITY, AttentionMap
from splice_engine.images import from_pil, resize, sides

FACE = (0.42, 0.24)
"""Between the astronaut's eyes and mouth, as shares of width and height."""


@pytest.fixture(scope="module")
def astronaut(demo_pair):
    return resize(demo_pair[0], (280, 280))


@pytest.fixture(scope="module")
def admiral(demo_pair):
    return resize(demo_pair[1], (336, 280))


PHOTOGRAPHS = {
    "astronaut": (0.2, 0.15, 0.7, 0.88),
    "coffee": (0.3, 0.2, 0.75, 0.75),
}
"""What scikit-image brings, and where the object is: left, top, right and bottom as shares."""


def photograph(name):
    return resize(from_pil(Image.fromarray(getattr(skimage.data, name)())), (336, 336 if name == "astronaut" else 448))


def object_points(box, count):
    """Points on an object, x and y as shares."""
    left, top, right, bottom = box
    shares = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    return shares * torch.tensor([right - left, bottom - top]) + torch.tensor([left, top])


def around(points, size, width):
    """A mask for each point: a square of so many pixels around it, at least in part within the picture."""
    masks = torch.zeros(len(points), 1, *size)
    for mask, (x, y) in zip(masks, (points * torch.tensor([*size[::-1]])).round().int().tolist(), strict=True):
        mask[:, max(0, y - width // 2) : y + width // 2, max(0, x - width // 2) : x + width // 2] = 1
    return masks


NIGHT_GAMMA, NIGHT = 2.5, (0.25, 0.2, 0.12)
"""Of a picture in the light of a lamp at night."""


@pytest.mark.parametrize(
    ("change", "name"),
    [("mirror", "astronaut"), ("mirror", "coffee"), ("crop", "astronaut"), ("crop", "coffee"), ("night", "coffee")],
)
def test_points_are_found_again(change, name, backbone):
    """24 of 25 within a patch, 22 within half of one: in the mirrored picture, at night too, and in a part of it."""
    picture = photograph(name)
    height, width = sides(picture)
    points = object_points(PHOTOGRAPHS[name], 25)
    if change in ("mirror", "night"):
        other, expected = picture.flip(-1), torch.tensor([1.0, 0.0]) + points * torch.tensor([-1.0, 1.0])
    else:
        left, top, wide, high = round(0.15 * width), round(0.1 * height), round(0.75 * width), round(0.8 * height)
        other = picture[..., top : top + high, left : left + wide]
        expected = (points * torch.tensor([width, height]) - torch.tensor([left, top])) / torch.tensor([wide, high])
        assert ((expected > 0) & (expected < 1)).all()
    if change == "night":
        other = (other**NIGHT_GAMMA * torch.tensor(NIGHT).view(1, 3, 1, 1)).mul(255).round() / 255
    found = similarity_map(picture, around(points, (height, width), 14), backbone, other)
    patches = torch.tensor([*sides(found.heat)[::-1]]) / MAP_DENSITY
    errors = ((found.best() - expected) * patches).abs().amax(dim=1)
    assert (errors <= 1).sum() >= 24
    assert (errors <= 0.5).sum() >= 22


def test_a_face_finds_the_other_face(backbone, astronaut, admiral):
    found = similarity_map(astronaut, FACE, backbone, admiral)
    x, y = found.best()[0]
    assert 0.35 < x < 0.65
    assert 0.12 < y < 0.45
    mask = found.mask(sides(admiral))
    assert mask.shape == (1, 1, 336, 280)
    assert mask[..., 70:130, 110:170].mean() > 3 * mask[..., 200:, :].mean()


def test_a_mask_selects_too(backbone, astronaut, admiral):
    mask = torch.zeros(1, 1, 100, 100)
    mask[..., 12:34, 36:50] = 1
    x, y = similarity_map(astronaut, mask, backbone, admiral).best()[0]
    assert 0.35 < x < 0.65
    assert 0.12 < y < 0.45


def test_a_place_is_most_similar_to_itself(backbone, astronaut):
    centre = 6.5 / 16, 4.5 / 16
    found = similarity_map(astronaut, centre, backbone, short_patches=16, radius=0, density=1)
    torch.testing.assert_close(found.best()[0], torch.tensor(centre), atol=0.5 / 16, rtol=0)
    assert found.heat.max() == pytest.approx(1, abs=1e-5)
    assert found.mask((70, 90)).max() == pytest.approx(1, abs=0.05)


def test_one_source_serves_a_batch_of_targets(backbone, astronaut):
    targets = torch.cat([resize(astronaut, (84, 112)), resize(astronaut, (84, 112)).flip(-1)])
    found = similarity_map(astronaut, (0.3, 0.7), backbone, targets, short_patches=6)
    assert found.heat.shape == (2, 1, 6 * MAP_DENSITY, 8 * MAP_DENSITY)
    for index in (0, 1):
        alone = similarity_map(astronaut, (0.3, 0.7), backbone, targets[index : index + 1], short_patches=6)
        torch.testing.assert_close(found.heat[index : index + 1], alone.heat)
    torch.testing.assert_close(found.heat[0], found.heat[1].flip(-1))


def test_bad_places_are_refused(backbone, astronaut):
    for where, message in (
        ((1.2, 0.5), "outside"),
        ((0.5, float("nan")), "outside"),
        (torch.zeros(1, 1, 9, 9), "nothing"),
    ):
        with pytest.raises(SpliceError, match=message):
            similarity_map(astronaut, where, backbone, short_patches=4)
    with pytest.raises(SpliceError, match="batches of 2 and 3"):
        similarity_map(astronaut.repeat(2, 1, 1, 1), (0.5, 0.5), backbone, astronaut.repeat(3, 1, 1, 1))


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", ["dino", "dinov2_reg", "dinov3_qkvb"])
def test_attention_is_the_softmax_of_the_products(kind, layer, tiny, astronaut):
    """By hand from queries and keys; a model with a rotary embedding turns them first, with timm's own function."""
    from timm.layers import apply_rot_embed_cat

    vit = tiny(kind)
    picture = resize(astronaut, vit.grid_size(84, 112)).repeat(2, 1, 1, 1)
    found = attention_map(picture, vit, layer)
    with torch.no_grad():
        answer = vit(picture, [Request(layer, "query"), Request(layer, "key")])
        heads = [answer[Request(layer, name)].unflatten(-1, (3, 16)).transpose(1, 2) for name in ("query", "key")]
        if kind.startswith("dinov3"):
            rope = vit.model._pos_embed(vit.model.patch_embed((picture - vit.mean) / vit.std))[1]
            turned = [apply_rot_embed_cat(x[:, :, vit.prefix :], rope, half=True) for x in heads]
            heads = [torch.cat([x[:, :, : vit.prefix], y], dim=2) for x, y in zip(heads, turned, strict=True)]
        expected = (heads[0] @ heads[1].mT / 16**0.5).softmax(dim=-1)[:, :, 0, vit.prefix :]
    assert found.heads.shape[0] == 2
    assert (found.heads.flatten(2) - expected).abs().max() < 1e-5
    assert (found.heat() - found.heads.mean(dim=1, keepdim=True)).abs().max() < 1e-6
    assert torch.equal(found.heat(1), found.heads[:, 1:2])


def test_the_mask_keeps_the_mass_with_the_fewest_pixels():
    heads = torch.tensor([[0.5, 0.05, 0.25], [0.1, 0.04, 0.06]]).view(1, 1, 2, 3)
    attention = AttentionMap(heads)
    kept = {mass: attention.mask((2, 3), mass) for mass in (0.5, 0.6, 0.75, 0.76, 1.0)}
    assert [int(mask.sum()) for mask in kept.values()] == [1, 2, 2, 3, 6]
    assert kept[0.6].flatten().tolist() == [1, 0, 1, 0, 0, 0]
    large = attention.mask((50, 70), 0.6)
    assert large.unique().tolist() == [0, 1]
    assert large.shape == (1, 1, 50, 70)


def test_a_batch_keeps_each_pictures_own_mass():
    heads = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = AttentionMap(heads).mask((8, 10), 0.5, head=1)
    for index in range(3):
        assert torch.equal(mask[index : index + 1], AttentionMap(heads[index : index + 1]).mask((8, 10), 0.5, head=1))


@pytest.mark.parametrize(
    ("options", "message"), [({"head": 2}, "2 heads"), ({"mass": 0.0}, "mass"), ({"mass": 2.0}, "mass")]
)
def test_no_such_attention(options, message):
    with pytest.raises(SpliceError, match=message):
        AttentionMap(torch.rand(1, 2, 4, 5)).mask((8, 10), **options)
