"""Inversions and ablations: what they repeat, where they stop, and that they learn."""

import pytest
import torch

from splice_engine import Backbone, Inversion, SpliceError, ablation, inversion_preset, preset
from splice_engine.images import resize, sides
from splice_engine.training.inversion import INVERTIBLE
from splice_engine.training.transfer import Transfer


@pytest.fixture(scope="module")
def vit(tiny):
    return tiny()


@pytest.fixture
def begin(pair, vit):
    def start(layer=-1, facet="cls", name="paper", **changes):
        return Inversion(pair[0], vit, inversion_preset(name, **{"size": 72, "steps": 4, **changes}), layer, facet)

    return start


def losses(steps):
    return [step.floats() for step in steps]


@pytest.mark.parametrize("facet", ["cls", "key"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(facet, begin):
    first, again, other = (begin(facet=facet, seed=seed) for seed in (3, 3, 4))
    a, b, c = (losses(run) for run in (first, again, other))
    assert a == b
    assert a != c
    assert torch.equal(first.image(), again.image())
    assert not torch.equal(first.image(), other.image())


def test_leaving_the_loop_loses_nothing(begin):
    expected = losses(through := begin())
    run, steps = begin(), []
    for step in run:
        steps.append(step)
        if step.index == 1:
            break
    assert (run.step, run.steps_left) == (2, 2)
    assert torch.equal(run.image(), run.image())
    steps += list(run)
    assert losses(steps) == expected
    assert torch.equal(run.image(), through.image())
    assert (run.steps_left, list(run)) == (0, [])


def test_sizes_of_the_picture(begin):
    run = begin(steps=1)
    assert run.image().shape[-2:] == run.size == (70, 98)
    assert run.image(97).shape[-2:] == (97, 123)
    assert sides(run.picture) == (97, 123)


@pytest.mark.parametrize("shape", [(64, 512), (512, 64), (100, 700), (64, 64), (97, 770), (400, 401)], ids=str)
@pytest.mark.parametrize("size", [72, 224])
@pytest.mark.parametrize("patch", [8, 14, 16])
def test_pictures_of_every_aspect_are_inverted(shape, size, patch, tiny_model):
    """The network halves six times: short sides are larger than asked for where it needs that."""
    backbone = Backbone(tiny_model())
    backbone.patch = patch  # what the sizes depend on
    run = Inversion(torch.rand(1, 3, *shape), backbone, inversion_preset("fast", size=size, steps=1))
    assert all(side % patch == 0 for side in run.size)
    assert min(run.size) >= 65
    assert min(run.size) <= max(size, 65) + patch
    aspect = max(shape) / min(shape)
    assert max(run.size) / min(run.size) == pytest.approx(aspect, rel=0.5 * patch / min(run.size) + 0.01)
    assert run.image().shape[-2:] == run.size
    assert run.image().isfinite().all()


@pytest.mark.parametrize("facet", INVERTIBLE)
@pytest.mark.parametrize("layer", [0, -1])
def test_every_facet_of_any_layer_can_be_inverted(facet, layer, begin):
    steps = losses(run := begin(layer, facet, "fast", steps=15))
    assert steps[-1]["feature"] < 0.9 * steps[0]["feature"]
    assert run.image().isfinite().all()


def test_only_cls_gets_new_noise(begin):
    """And as much of it as the recipe says."""
    still = {"noise_first": 0.0, "noise_second": 0.0, "noise_third": 0.0}
    assert losses(begin(facet="key")) == losses(begin(facet="key", **still))
    with_noise, without = losses(begin()), losses(begin(**still))
    assert with_noise != without
    late = losses(begin(steps=6, noise_first=0.0, noise_second=0.0, noise_third=5.0))
    early = losses(begin(steps=6, **still))
    assert late[:4] == early[:4]
    assert late[4:] != early[4:]


def test_keys_bring_the_picture_back_in_its_place(backbone, demo_pair):
    """After few steps a middle layer already tells it from the mirror image."""
    picture = resize(demo_pair[0], (84, 84))
    run = Inversion(picture, backbone, inversion_preset("fast", size=84, steps=60), facet="key")
    steps = losses(run)
    assert steps[-1]["feature"] < 0.3 * steps[0]["feature"]
    with torch.no_grad():
        similar = [
            torch.nn.functional.cosine_similarity(
                *(backbone.features(x, layer=-3).tokens for x in (run.image(), other)), dim=-1
            ).mean()
            for other in (picture, picture.flip(-1))
        ]
    assert similar[0] > similar[1] + 0.04


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, b: Inversion(p, b, facet="query"), "cannot invert 'query'"),
        (lambda p, b: Inversion(p, b, layer=4), "4 blocks"),
        (lambda p, b: Inversion(p * float("nan"), b), "not numbers"),
        (lambda p, b: inversion_preset("slow"), "unknown preset 'slow'"),
        (lambda p, b: inversion_preset("fast", size=64), "size must be at least 72"),
    ],
)
def test_what_cannot_be_inverted_is_refused(make, message, pair, vit):
    with pytest.raises(SpliceError, match=message):
        make(pair[0], vit)


def test_an_ablation_leaves_out_one_loss_at_a_time(pair, vit):
    settings = preset("paper", size=64, vit_size=56, steps=2, whole_every=0)
    runs = ablation(*pair, vit, settings)
    left_out = {}
    for name, run in runs:
        assert isinstance(run, Transfer)
        assert run.objective.backbone is vit
        left_out[name] = {"appearance", "structure", "identity"} - set(list(run)[-1].losses)
    assert left_out == {
        "all losses": set(),
        "no appearance": {"appearance"},
        "no structure": {"structure"},
        "no identity": {"identity"},
    }


def test_one_loss_alone_has_no_ablation(pair, vit):
    settings = preset("paper", appearance_weight=0.0, identity_weight=0.0)
    with pytest.raises(SpliceError, match="at least two losses"):
        next(ablation(*pair, vit, settings))
