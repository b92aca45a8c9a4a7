"""What a step trains on: crops, their probabilities, and crops under a mask."""

import pytest
import torch

from splice_engine.images import sides
from splice_engine.settings import Settings
from splice_engine.training.crops import CropSampler
from splice_engine.training.pair import Pair


@pytest.fixture(scope="module")
def noise():
    def make(height, width, channels=3):
        return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(height + width))

    return make


def sampler(seed=0, **changes):
    return CropSampler(Settings(**changes), torch.Generator().manual_seed(seed))


def box(size, top, bottom, left, right):
    mask = torch.zeros(1, 1, *size)
    mask[..., top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize("crop", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("size", [(70, 91), (91, 70), (80, 80)], ids=str)
def test_crops_are_squares_within_the_range(size, crop, noise):
    picture = noise(*size)
    draw = sampler(crop=crop, flip=0.0)
    places = set()
    for _ in range(20):
        cropped = draw.crop(size)(picture)
        side = cropped.shape[-1]
        assert cropped.shape == (1, 3, side, side)
        assert min(*size, max(48, round(crop * size[0]))) <= side <= min(size)  # the generator needs some 48 pixels
        windows = picture.unfold(2, side, 1).unfold(3, side, 1)
        found = (windows == cropped[:, :, None, None]).all(dim=(-1, -2)).all(dim=1)[0].nonzero().tolist()
        assert len(found) == 1
        places.add((side, *found[0]))
    assert (len(places) == 1) == (size == (80, 80) and crop == 1)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["flip", "jitter", "blur"])
def test_probabilities_are_as_set(name, probability, noise):
    draw = sampler(**{"crop": 1.0, "flip": 0.0, "jitter": 0.0, "blur": 0.0, name: probability})
    picture = noise(64, 64)
    changed = 0
    for _ in range(200):
        sample = draw.augment(draw.crop((64, 64))(picture))
        assert sample.shape == picture.shape
        assert torch.equal(sample, picture) or name != "flip" or torch.equal(sample, picture.flip(-1))
        changed += not torch.equal(sample, picture)
    assert changed == pytest.approx(200 * probability, abs=0 if probability == 0 else 25)  # some are too weak to see


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_some_samples_are_the_whole_picture(share, noise):
    draw, picture = sampler(whole=share, flip=0.0), noise(64, 90)
    whole = sum(torch.equal(draw.crop_or_whole((64, 90))(picture), picture) for _ in range(100))
    assert whole == pytest.approx(100 * share, abs=0 if share in (0, 1) else 20)


@pytest.mark.parametrize(("count", "drawn"), [(0, 30), (1, 1), (3, 3)])
def test_cached_crops_are_drawn_once(count, drawn, noise):
    pair, draw = Pair(noise(70, 91), noise(80, 66)), sampler(cached_crops=count)
    for sample in (draw.structure, draw.appearance):
        samples = [sample(pair) for _ in range(30)]
        assert len({id(sample) for sample in samples}) == drawn


def test_what_belongs_to_a_picture_is_cropped_like_it(noise):
    """Matched image, residual and mask, in crops and in the whole, mirrored or not."""
    structure = noise(70, 91)
    pair = Pair(structure, noise(80, 66), structure + 1, box((70, 91), 0, 70, 0, 91), box((80, 66), 0, 80, 0, 66))
    draw = sampler(crop=0.5, whole=0.3, jitter=0.0, blur=0.0)
    shapes = set()
    for _ in range(20):
        sample = draw.structure(pair, structure + 2)
        assert torch.equal(sample.target, sample.picture + 1)
        assert torch.equal(sample.residual, sample.picture + 2)
        assert sides(sample.mask) == sides(sample.picture)
        b = draw.appearance(pair)
        assert sides(b.mask) == sides(b.picture)
        assert (b.target, b.residual) == (None, None)
        shapes.add(sides(sample.picture))
    assert (70, 91) in shapes
    assert len(shapes) > 1


@pytest.mark.parametrize("size", [(70, 140), (140, 70), (64, 500)], ids=str)
@pytest.mark.parametrize("crop", [0.5, 0.95])
def test_crops_hold_what_is_covered(size, crop):
    mask = box(size, size[0] - 20, size[0] - 2, size[1] - 22, size[1] - 3)
    draw = sampler(crop=crop)
    for _ in range(20):
        assert draw.crop(size, mask)(mask).sum() == mask.sum()


def test_crops_of_a_region_with_a_hole_are_never_empty():
    mask = box((70, 400), 0, 70, 0, 4) + box((70, 400), 0, 70, 396, 400)
    draw = sampler()
    crops = [draw.crop((70, 400), mask)(mask) for _ in range(40)]
    assert (70, 400) in {sides(crop) for crop in crops}
    assert all(crop.sum() > 0 for crop in crops)


def test_a_mask_over_everything_leaves_crops_as_they_are(noise):
    picture = noise(70, 90)
    first, second = (sampler(3, crop=0.7) for _ in range(2))
    for _ in range(5):
        assert torch.equal(first.crop((70, 90))(picture), second.crop((70, 90), torch.ones(1, 1, 70, 90))(picture))
