"""The terms and their sum."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from splice_engine import (
    Appearance,
    Colour,
    Contrast,
    Identity,
    Objective,
    Pictures,
    Request,
    SelfSimilarity,
    SpliceError,
    Structure,
    Transfer,
    blend,
    preset,
    self_similarity,
)
from splice_engine.images import resize

TERMS = (Appearance, Structure, Identity)
NAMES = ("output", "reconstruction", "structure", "appearance")


@pytest.fixture(scope="module")
def mixed():
    """Four pictures of three sizes."""
    sizes = {"output": (70, 70), "reconstruction": (75, 111), "structure": (70, 70), "appearance": (90, 64)}
    rng = torch.Generator().manual_seed(0)
    return Pictures(**{name: torch.rand(1, 3, *sizes[name], generator=rng) for name in NAMES})


@pytest.fixture(scope="module")
def square():
    """Four pictures of one size, as in a step of a run."""
    rng = torch.Generator().manual_seed(1)
    return Pictures(**{name: torch.rand(1, 3, 70, 70, generator=rng) for name in NAMES})


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("kind", ["dino", "dinov2_reg", "dinov3"])
def test_equal_pictures_are_no_distance_apart(term, kind, tiny, mixed):
    backbone, picture = tiny(kind), mixed["reconstruction"]
    assert term().loss(backbone, picture, picture.clone()).item() < 1e-12
    assert term().loss(backbone, picture, 1 - picture).item() > 1e-6


def test_what_each_term_compares(tiny, square):
    backbone = tiny()

    def extract(layer, facet):
        request = Request(layer, facet)
        return {name: backbone(resize(square[name], (56, 56)), [request])[request] for name in NAMES}

    cls, keys = extract(3, "cls"), extract(1, "key")

    def similarity(x):
        return F.cosine_similarity(x[:, :, None], x[:, None], dim=-1)

    losses = Objective([Appearance(), Structure(layer=1), Identity(layer=1)], backbone, size=56).losses(square)
    expected = {
        "appearance": (cls["output"] - cls["appearance"]).square().mean(),
        "structure": (similarity(keys["output"]) - similarity(keys["structure"])).square().mean(),
        "identity": (keys["reconstruction"] - keys["appearance"]).square().mean(),
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, rel=1e-5
    )


def test_two_terms_of_one_kind_have_names_of_their_own(tiny, square):
    terms = [Structure(), Appearance(), Structure(layer=0), Structure(layer=1), Appearance(layer=0)]
    objective = Objective(terms, tiny(), size=56)
    assert list(objective.terms) == ["structure", "appearance", "structure_2", "structure_3", "appearance_2"]
    losses = objective.losses(square)
    assert losses.keys() == objective.terms.keys()
    assert len({loss.item() for loss in losses.values()}) == 5
    for name, loss in losses.items():
        alone = Objective([objective.terms[name]], objective.backbone, size=56).losses(square)
        assert loss.item() == pytest.approx(alone[objective.terms[name].name].item(), rel=1e-5)


def test_total_is_the_weighted_sum(tiny, square):
    objective = Objective([Appearance(weight=3), Structure(weight=0.5), Identity()], tiny(), size=56)
    losses = objective.losses(square)
    expected = 3 * losses["appearance"] + 0.5 * losses["structure"] + losses["identity"]
    assert objective.total(losses).item() == pytest.approx(expected.item(), rel=1e-6)
    rest = expected - 3 * losses.pop("appearance")
    assert objective.total(losses).item() == pytest.approx(rest.item(), rel=1e-5)


def test_default_weights_are_the_papers():
    assert (Appearance().weight, Structure().weight, Identity().weight) == (10, 1, 1)


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        (NAMES, None, {"appearance", "structure", "identity"}),
        (("output", "structure", "appearance"), None, {"appearance", "structure"}),
        (("output", "appearance"), None, {"appearance"}),
        (("reconstruction", "appearance"), None, {"identity"}),
        (NAMES, ["appearance"], {"appearance"}),
        (("output", "structure"), ["appearance"], set()),
        ((), None, set()),
    ],
)
def test_terms_whose_pictures_are_missing_are_left_out(given, names, expected, tiny, square):
    objective = Objective([Appearance(), Structure(), Identity()], tiny(), size=56)
    losses = objective.losses(Pictures(**{name: square[name] for name in given}), names)
    assert losses.keys() == expected
    whole = objective.losses(square)
    assert all(loss.item() == pytest.approx(whole[name].item(), rel=1e-5) for name, loss in losses.items())


def test_a_term_with_a_backbone_of_its_own(tiny, square):
    """Of another patch size, depth of tokens and family."""
    first, second = tiny("dinov2"), tiny("dinov3", seed=1)
    objective = Objective([Structure(), Structure(backbone=second), Appearance(backbone=second)], first, size=64)
    output = square["output"].clone().requires_grad_()
    losses = objective.losses(replace(square, output=output))
    for name, backbone, term in (
        ("structure", first, Structure()),
        ("structure_2", second, Structure()),
        ("appearance", second, Appearance()),
    ):
        expected = term.loss(backbone, square["output"], square[term.target], size=64)
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(losses["structure_2"], output)
    assert gradient.abs().max() > 0


def test_pictures_of_different_sizes(tiny, mixed):
    """The ViT gets each at its own aspect; the terms that compare token by token need one grid."""
    objective = Objective([Appearance(), Structure()], tiny(), size=56)
    losses = objective.losses(mixed)
    assert losses.keys() == {"appearance", "structure"}
    for name, loss in losses.items():
        term = objective.terms[name]
        expected = term.loss(objective.backbone, mixed[term.output], mixed[term.target], size=56)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["dinov2_reg", "dinov3"])
def test_structure_ignores_registers(kind, tiny):
    backbone = tiny(kind)
    keys = torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(0))
    other = keys.clone()
    other[:, 1:5] = 0.5
    assert Structure().distance(other, keys, backbone).item() == 0
    other[:, 0] = 0.5
    assert Structure().distance(other, keys, backbone).item() > 0
    features = backbone.features(torch.rand(1, 3, 64, 80), layer=1)
    assert self_similarity(features).shape[-1] == features.tokens.shape[1] + 1


@pytest.mark.parametrize("term", TERMS)
def test_gradients_reach_the_output_and_not_the_target(term, tiny, square):
    objective = Objective([term()], tiny(), size=56)
    given = Pictures(**{name: square[name].clone().requires_grad_() for name in NAMES})
    objective.total(objective.losses(given)).backward()
    gradients = {name: given[name].grad for name in NAMES}
    assert {name for name, gradient in gradients.items() if gradient is not None and gradient.any()} == {term.output}
    output, target = square[term.output].clone().requires_grad_(), square[term.target].clone().requires_grad_()
    term().loss(objective.backbone, output, target, size=56).backward()
    assert target.grad is None
    assert (output.grad - gradients[term.output] / term().weight).abs().max() < 1e-6


@pytest.mark.parametrize(("size", "expected"), [(None, (70, 70)), (56, (56, 56)), (112, (112, 112))])
def test_the_size_at_which_the_vit_gets_a_picture(size, expected, tiny, square):
    backbone = tiny()
    request = Request(-1, "cls")
    answers = [backbone(resize(square[name], expected), [request])[request] for name in ("output", "appearance")]
    loss = Appearance().loss(backbone, square["output"], square["appearance"], size=size)
    assert loss.item() == pytest.approx(F.mse_loss(*answers).item(), rel=1e-5)


def test_a_fixed_target_replaces_the_picture(tiny, square):
    backbone, other = tiny(), square["structure"]
    features = backbone.features(other, size=56)
    terms = [Appearance(fixed=features), Structure(fixed=SelfSimilarity.of(features))]
    fixed = Objective(terms, backbone, size=56).losses(square)
    free = Objective([Appearance(), Structure()], backbone, size=56).losses(replace(square, appearance=other))
    assert {name: loss.item() for name, loss in fixed.items()} == pytest.approx(
        {name: loss.item() for name, loss in free.items()}, rel=1e-5
    )


def test_a_fixed_structure_of_another_grid_is_refused_before_the_work(tiny, pair):
    backbone, settings = tiny(), preset("paper", steps=1, size=64, vit_size=56)
    similarity = SelfSimilarity.of(backbone.features(pair[0], size=42))
    objective = Objective([Structure(fixed=similarity)], backbone, size=56)
    with pytest.raises(SpliceError, match=r"structure term has 4x3 patches, but the output has 5x4: .* at the size 56"):
        Transfer(*pair, backbone, settings, objective)


WRONG_TARGETS = {
    "another backbone": (lambda vit: Appearance(fixed=vit("dino").features(PICTURE)), "of backbone tiny_dino, but"),
    "another layer": (lambda vit: Appearance(fixed=vit().features(PICTURE, 0)), "of layer 0, but the term compares 3"),
    "a batch": (lambda vit: Appearance(fixed=vit().features(PICTURE.expand(2, -1, -1, -1))), "of 2 pictures"),
    "similarity for appearance": (lambda vit: Appearance(fixed=SelfSimilarity.of(vit().features(PICTURE))), "Features"),
    "backbone of a structure": (
        lambda vit: Structure(fixed=SelfSimilarity.of(vit("dino").features(PICTURE))),
        "structure term is of backbone tiny_dino, but the term compares tiny_dinov2",
    ),
    "layer of a structure": (lambda vit: Structure(fixed=SelfSimilarity.of(vit().features(PICTURE, 1))), "of layer 1"),
    "facet of a structure": (
        lambda vit: Structure(fixed=SelfSimilarity.of(vit().features(PICTURE, facet="token"))),
        "of facet token, but the term compares key",
    ),
    "features for structure": (lambda vit: Structure(fixed=vit().features(PICTURE)), "SelfSimilarity"),
    "identity": (lambda vit: Identity(fixed=vit().features(PICTURE)), "random crops"),
}
PICTURE = torch.rand(1, 3, 70, 70, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", WRONG_TARGETS)
def test_a_fixed_target_that_does_not_fit_its_term_is_refused_by_name(kind, tiny):
    make, message = WRONG_TARGETS[kind]
    with pytest.raises(SpliceError, match=message):
        Objective([make(tiny)], tiny())


def test_a_fixed_target_of_the_terms_own_backbone_and_facet(tiny, square):
    """[CLS] is the same beside any facet; -1 and the last block's number are one layer."""
    own = tiny("dino", seed=1)
    features = own.features(square["appearance"], layer=3, facet="value", size=56)
    term = Appearance(backbone=own, fixed=features)
    loss = Objective([term], tiny(), size=56).losses(square)["appearance"]
    expected = Objective([Appearance(backbone=own)], tiny(), size=56).losses(square)["appearance"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_fixed_structure_within_a_mask(tiny, square):
    """Of the target, too, only the patches that the mask covers take part."""
    backbone, mask = tiny(), torch.zeros(1, 1, 70, 70)
    mask[..., 10:50, 20:70] = 1
    masked = replace(square, structure_mask=mask)
    target = SelfSimilarity.of(backbone.features(square["structure"], size=56))
    losses = [
        Objective([Structure(fixed=fixed)], backbone, size=56).losses(given)["structure"].item()
        for fixed, given in ((target, masked), (target, square))
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    same = replace(masked, output=square["structure"])
    assert Objective([Structure(fixed=target)], backbone, size=56).losses(same)["structure"].item() < 0.1 * losses[0]


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("term", TERMS)
def test_a_weight_that_is_none_is_refused(term, weight):
    with pytest.raises(SpliceError, match=f"weight of the {term.name} term must be at least 0"):
        term(weight=weight)


def test_a_run_with_a_fixed_structure_trains_on_the_whole_picture(tiny, pair):
    """A crop or a mirrored picture has another shape here, or places that the target does not mean."""
    backbone, (structure, appearance) = tiny(), pair
    settings = preset("paper", steps=4, size=64, vit_size=56, jitter=0, blur=0)
    terms = [Structure(fixed=SelfSimilarity.of(backbone.features(structure, size=56)))]
    objective = Objective(terms, backbone, size=56)
    run = Transfer(structure, appearance, backbone, settings, objective)
    assert [set(step.losses) for step in run] == [{"structure", "whole_structure"}, *3 * [{"structure"}]]
    assert (run.settings.whole, run.settings.flip) == (1, 0)


def test_an_objective_without_terms_is_refused(tiny):
    with pytest.raises(SpliceError, match="no term"):
        Objective([], tiny())


def test_blend_is_the_weighted_mean(tiny, square, gap):
    backbone = tiny()
    a, b = (backbone.features(square[name], size=56) for name in ("structure", "appearance"))
    blended = blend([a, b], [3, 1])
    for field in ("cls", "tokens", "prefix"):
        assert gap(getattr(blended, field), 0.75 * getattr(a, field) + 0.25 * getattr(b, field)) < 1e-6
    assert (blended.grid, blended.layer, blended.facet) == (a.grid, a.layer, a.facet)


def test_blend_of_different_grids_has_no_patches(tiny, mixed):
    backbone = tiny()
    a, b = (backbone.features(mixed[name], size=56) for name in ("structure", "reconstruction"))
    blended = blend([a, b], [1, 1])
    assert blended.tokens.shape == (1, 0, backbone.width)
    assert blended.grid == (0, 0)
    with pytest.raises(SpliceError, match="hold no patches"):
        self_similarity(blended)


@pytest.mark.parametrize("weights", [(0, 0), (1, -1)])
def test_blend_refuses_weights_without_a_mean(weights, tiny, square):
    features = tiny().features(square["output"])
    with pytest.raises(SpliceError, match="weights must be at least 0"):
        blend([features, features], weights)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("dino", {}), "of backbone tiny_dinov2 and tiny_dino cannot be blended"),
        (("dinov2", {"layer": 0}), "of layer 3 and 0 cannot be blended"),
        (("dinov2", {"facet": "token"}), "of facet key and token cannot be blended"),
    ],
)
def test_blend_refuses_features_of_two_kinds_by_name(other, message, tiny, square):
    kind, options = other
    with pytest.raises(SpliceError, match=message):
        blend([tiny().features(square["output"]), tiny(kind).features(square["output"], **options)], [1, 1])


def test_blend_refuses_other_numbers_of_pictures(tiny, square):
    one, two = square["output"], torch.cat([square["output"], square["structure"]])
    with pytest.raises(SpliceError, match="of 1 and 2 pictures cannot be blended"):
        blend([tiny().features(one), tiny().features(two)], [1, 1])


@pytest.mark.parametrize("term", [Colour, Contrast])
def test_the_last_incomplete_squares_count_by_their_area(term):
    """At 40x50 pixels, squares of 16 leave strips at the right and at the bottom."""
    rng = torch.Generator().manual_seed(3)
    output, target = torch.rand(2, 1, 3, 40, 50, generator=rng)
    output = output.requires_grad_()
    term().loss(output, target).backward()
    assert (output.grad.abs().amax(dim=(0, 1)) > 0).all()
    constant = torch.zeros(1, 3, 40, 50)
    constant[..., 48:] = 1  # a sixteenth of a square's width: 2 of 50 columns
    if term is Colour:
        assert term().loss(constant, torch.zeros_like(constant)).item() == pytest.approx(2 / 50, rel=1e-5)


def test_contrast_is_that_of_squares_whatever_their_colour(pair):
    picture = resize(pair[0], (64, 80))
    assert Contrast().loss(picture, picture).item() == 0
    assert Contrast().loss(0.5 * picture + 0.3, 0.5 * picture + 0.1).item() == pytest.approx(0, abs=1e-10)
    moved = picture.unflatten(-1, (5, 16)).flip(-1).flatten(-2)  # every square's pixels change places
    assert Contrast().loss(moved, picture).item() == pytest.approx(0, abs=1e-10)
    deviation = F.avg_pool2d(picture**2, 16) - F.avg_pool2d(picture, 16) ** 2
    faded = Contrast().loss(0.5 * picture, picture).item()
    assert faded == pytest.approx(0.25 * deviation.mean().item(), rel=1e-2)


def test_targets_extracted_before_give_the_same_losses(pair, tiny):
    backbone = tiny()
    a, b = (resize(picture, (56, 70)) for picture in pair)
    pictures = Pictures(output=b, reconstruction=a, structure=a, appearance=b)
    objective = Objective([Appearance(), Structure(), Identity()], backbone, size=56)
    targets = objective.targets(Pictures(structure=a, appearance=b))
    assert len(targets) == 3
    expected = objective.losses(pictures)
    found = objective.losses(pictures, targets=targets)
    assert {name: loss.item() for name, loss in found.items()} == {name: loss.item() for name, loss in expected.items()}
