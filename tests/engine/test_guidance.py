"""Guidance of a sampler: what moves a prediction, how far, where and when; gradients against finite differences."""

import pytest
import torch
from torch import nn

from splice_engine import (
    Appearance,
    Decoder,
    Guidance,
    GuidanceSettings,
    Guide,
    Identity,
    Objective,
    SelfSimilarity,
    SpliceError,
    Structure,
)
from splice_engine.images import resize

FACTORS = torch.randn(3, 4, 1, 1, generator=torch.Generator().manual_seed(1))


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def colours(latent):
    return torch.nn.functional.conv2d(latent, FACTORS) / 6 + 0.5


def network():
    """A decoder of convolutions that enlarges four times, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Upsample(scale_factor=4), nn.Conv2d(8, 3, 3, padding=1)]
        return nn.Sequential(*layers, nn.Sigmoid()).requires_grad_(False)


DECODERS = {"linear": Decoder(colours), "network": Decoder(network(), scale=4)}

STRUCTURE, APPEARANCE = draw(1, 3, 90, 120), draw(1, 3, 80, 70, seed=1)
MASK = torch.zeros(1, 1, 45, 60)
MASK[..., 20:] = 1


@pytest.fixture
def make(tiny):
    """Makes a guidance by the paper's terms, on a tiny ViT at 56 pixels."""
    vit = tiny("dinov2_reg")

    def build(terms=None, structure=STRUCTURE, appearance=APPEARANCE, masks=None, **settings):
        settings = {"structure_end": 0.7, "inner_steps": 1, **settings}
        terms = [Appearance(), Structure()] if terms is None else terms
        guide = Guide(structure, appearance, **(masks or {}))
        return Guidance(Objective(terms, vit, size=56), guide, GuidanceSettings(**settings))

    build.vit = vit
    return build


@pytest.mark.parametrize("masks", [None, {"structure_mask": MASK, "appearance_mask": MASK}], ids=["whole", "masked"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_gradient_is_that_of_finite_differences(name, masks, make):
    guidance, decoder, x0 = make(masks=masks), DECODERS[name], normal(1, 4, 14, 18)
    gradients = guidance.gradients(x0, decoder)
    assert gradients.keys() == {"structure", "appearance"}
    for group, gradient in gradients.items():
        direction = gradient / gradient.norm()
        step = 0.02
        up, down = (guidance.losses(x0 + sign * step * direction, decoder)[group] for sign in (1, -1))
        slope = (up - down).double() / (2 * step)
        assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_guided_predictions_come_near_to_the_pictures(name, make):
    for group, other in (("structure", "appearance"), ("appearance", "structure")):
        guidance, decoder = make(**{f"{other}_strength": 0.0}), DECODERS[name]
        x0 = start = normal(1, 4, 14, 18)
        for step in range(30):
            x0 = guidance(x0, decoder, done=0.5, step=step)
        assert guidance.losses(x0, decoder)[group] < 0.5 * guidance.losses(start, decoder)[group]


def test_a_step_moves_as_far_as_the_strength_says(make):
    x0 = 3 * normal(1, 4, 14, 18)
    for steps in (1, 4):
        guidance = make(structure_strength=0.2, appearance_strength=0.0, inner_steps=steps)
        change = guidance(x0, DECODERS["linear"], done=0.2) - x0
        moved = change.square().mean().sqrt() / x0.std()
        assert moved == pytest.approx(0.2, rel=1e-4) if steps == 1 else 0.1 < moved <= 0.2


@pytest.mark.parametrize(
    ("settings", "done", "step", "groups"),
    [
        ({}, 0.0, 0, ["structure"]),
        ({}, 0.5, 3, ["structure", "appearance"]),
        ({}, 0.7, 0, ["appearance"]),
        ({}, 1.0, 0, ["appearance"]),
        ({"appearance_end": 0.9}, 0.9, 0, []),
        ({"structure_start": 0.2}, 0.1, 0, []),
        ({"structure_strength": 0.0}, 0.1, 0, []),
        ({"every": 3}, 0.5, 3, ["structure", "appearance"]),
        ({"every": 3}, 0.5, 4, []),
    ],
)
def test_each_group_has_its_window(settings, done, step, groups, make):
    guidance, x0 = make(**settings), normal(1, 4, 14, 18)
    assert guidance.active(done, step) == groups
    assert (guidance(x0, DECODERS["linear"], done, step) is x0) == (not groups)


def test_outside_of_the_mask_a_latent_stays(make):
    x0 = normal(1, 4, 14, 18)
    guided = make(masks={"structure_mask": MASK})(x0, DECODERS["linear"], done=0.5)
    still = (guided == x0).all(dim=1)[0]
    assert still[:, :5].all()
    assert not still[:, 7:].any()


def test_features_of_the_pictures_are_extracted_once(make, count_passes):
    guidance = make()
    sizes = count_passes(make.vit.model.patch_embed)
    for step in range(3):
        guidance(normal(1, 4, 14, 18), DECODERS["linear"], done=0.5, step=step)
    assert len(sizes) == 2 + 3


def test_the_middle_of_the_structure_picture_guides_a_latent_of_another_shape(make):
    wide = torch.cat([draw(1, 3, 90, 30, seed=5), STRUCTURE, draw(1, 3, 90, 30, seed=6)], dim=-1)
    x0 = normal(1, 4, 18, 24)
    kept, cut = (make(structure=picture)(x0, DECODERS["linear"], done=0.1) for picture in (STRUCTURE, wide))
    assert torch.allclose(kept, cut, atol=1e-5)


@pytest.mark.parametrize(("scale", "largest"), [(1, 64), (4, 16)])
def test_large_latents_are_decoded_small(scale, largest, make):
    seen = []

    def decode(latent):
        seen.append(latent.shape[-2:])
        return resize(colours(latent), (scale * latent.shape[-2], scale * latent.shape[-1]))

    guided = make(decode_size=64)(normal(1, 4, 80, 100), Decoder(decode, scale), done=0.5)
    assert guided.shape == (1, 4, 80, 100)
    assert seen == [(largest, largest * 100 // 80)]


def test_precision_and_device_are_the_latents(make):
    x0 = normal(1, 4, 14, 18).half()
    guided = make()(x0, DECODERS["linear"], done=0.5)
    assert guided.dtype == torch.half
    assert not torch.equal(guided, x0)


def test_fixed_targets_guide_without_pictures(make):
    picture = resize(STRUCTURE, (56, 70))
    features = make.vit.features(picture)
    terms = [Structure(fixed=SelfSimilarity.of(features)), Appearance(fixed=features)]
    guidance, x0 = make(terms, structure=None, appearance=None), normal(1, 4, 16, 20)
    assert guidance.active(0.5) == ["structure", "appearance"]
    assert not torch.equal(guidance(x0, DECODERS["linear"], done=0.5), x0)
    with pytest.raises(SpliceError, match="the fixed target of the structure term has 5x4 patches"):
        guidance(normal(1, 4, 14, 28), DECODERS["linear"], done=0.5)


def test_inference_mode_of_the_caller_does_not_hinder(make):
    """As where ComfyUI calls: its tensors cannot take part in a graph, and copies of them can."""
    guidance = make()
    with torch.inference_mode():
        x0 = normal(1, 4, 14, 18)
        with torch.inference_mode(False):
            guided = guidance(x0, DECODERS["network"], done=0.5)
        assert x0.is_inference()
    assert not torch.equal(guided, x0)
    assert not guided.requires_grad


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda make: make([Identity()]), "nothing guides the sampler"),
        (lambda make: make([Structure()], structure=None), "nothing guides the sampler"),
        (lambda make: make(structure=None, appearance=None), "nothing guides the sampler"),
        (lambda make: make(structure=STRUCTURE[..., :20]), "the structure picture is 20x90 pixels"),
        (lambda make: make(appearance=APPEARANCE * float("nan")), "the appearance picture has pixels that are not num"),
        (lambda make: make(masks={"structure_mask": 0 * MASK}), "the structure mask selects nothing"),
        (lambda make: make(structure_start=0.8), "structure_start must be below structure_end, which is 0.7, not 0.8"),
        (lambda make: make(every=0), "every must be from 1 to 100, not 0"),
        (
            lambda make: make()(normal(1, 4, 14, 18) * float("inf"), DECODERS["linear"], done=0.5),
            "the latent has values that are not numbers",
        ),
        (
            lambda make: make()(normal(1, 4, 14, 18), Decoder(lambda x: (colours(x) * 1e30).square()), done=0.5),
            "the gradient through the decoder is not a number",
        ),
    ],
)
def test_mistakes_get_one_sentence(wrong, sentence, make):
    with pytest.raises(SpliceError, match=sentence):
        wrong(make)
