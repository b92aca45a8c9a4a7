"""Masks: where the picture may change, which part of B is the appearance, and what the terms compare."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from splice_engine import (
    OFFLINE_BACKBONE,
    Appearance,
    Colour,
    Contrast,
    Correspondence,
    Identity,
    InstantSettings,
    InstantTransfer,
    MatchedL1,
    Objective,
    Pictures,
    Reconstruction,
    Request,
    SpliceError,
    Structure,
    Transfer,
    load_mask,
    load_picture,
    preset,
    save_picture,
)
from splice_engine.images import check_mask, resize
from splice_engine.masks import composite, covered_patches

SMALL = {"size": 64, "vit_size": 56, "steps": 3, "match_passes": 1}
FACETS = ("cls", "token", "key", "query", "value", "cls_attention")


def box(size, top, bottom, left, right):
    mask = torch.zeros(1, 1, *size)
    mask[..., top:bottom, left:right] = 1
    return mask


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def distance_to(mask):
    """Of each pixel to the nearest one that is selected, the obvious way: `[H, W]`."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in mask.shape[-2:]), indexing="ij"), dim=-1).float()
    return torch.cdist(places.flatten(0, 1), places[mask[0, 0] == 1]).amin(dim=1).view(mask.shape[-2:])


# Tokens


def test_a_patch_is_covered_from_half_of_its_area_on():
    mask = box((28, 42), 0, 14, 0, 21)
    mask[..., 14:, :6] = 1  # less than half of the fourth patch
    assert covered_patches(mask, (28, 42), 14).tolist() == [True, True, False, False, False, False]
    assert covered_patches(0.5 * mask, (28, 42), 14).tolist() == [True, False, False, False, False, False]
    assert covered_patches(resize(mask, (280, 420)), (28, 42), 14).tolist()[::2] == [True, False, False]


def test_something_is_always_covered():
    """The patches with the most, where none has half."""
    mask = 0.4 * box((28, 42), 0, 14, 0, 14) + box((28, 42), 14, 16, 28, 42)
    assert covered_patches(mask, (28, 42), 14).tolist() == [True, False, False, False, False, False]
    assert covered_patches(box((2000, 2000), 7, 8, 7, 8), (56, 56), 14).sum() == 1


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_reg", "dinov3", "dinov3_qkvb"])
def test_keeping_all_patches_changes_nothing(kind, tiny, gap):
    backbone = tiny(kind)
    picture = noise(2, 3, 4 * backbone.patch, 3 * backbone.patch)
    asked = [Request(layer, facet) for layer in (0, 3) for facet in FACETS]
    expected, got = backbone(picture, asked), backbone(picture, asked, torch.ones(12, dtype=torch.bool))
    assert max(gap(got[request], expected[request]) for request in asked) < 1e-6


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_reg", "dinov3", "dinov3_qkvb"])
def test_dropped_patches_are_as_those_that_nobody_attends_to(kind, tiny, tiny_model, gap):
    """Each kept patch keeps its own place: against timm's blocks on all tokens, with attention masked."""
    backbone, model = tiny(kind), tiny_model(kind)
    picture = noise(1, 3, 4 * backbone.patch, 5 * backbone.patch)
    kept = torch.arange(20) % 3 == 1
    every = torch.cat([torch.ones(backbone.prefix, dtype=torch.bool), kept])
    asked = [Request(0, "token"), Request(1, "token"), Request(2, "token"), Request(3, "cls")]
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed((picture - backbone.mean) / backbone.std))
        x, place = (x[0], {"rope": x[1]}) if isinstance(x, tuple) else (x, {})
        bias = torch.zeros(len(every), len(every)).masked_fill(~every, -torch.inf)
        got = backbone(picture, asked, kept)
        for layer, block in enumerate(model.blocks):
            x = block(x, attn_mask=bias, **place)
            expected = x[:, 0] if layer == 3 else x[:, every]
            assert gap(got[asked[layer]], expected) < 1e-5


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_reg", "dinov3", "dinov3_qkvb"])
def test_dropped_patches_change_nothing(kind, tiny):
    backbone = tiny(kind)
    height, width = 4 * backbone.patch, 4 * backbone.patch
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[1:3, 2:] = True
    picture, other = noise(1, 3, height, width).requires_grad_(), noise(1, 3, height, width).flip(-1)
    inside = kept.repeat_interleave(backbone.patch, 0).repeat_interleave(backbone.patch, 1)
    asked = [Request(-1, "cls"), Request(-1, "key"), Request(1, "token")]
    answer = backbone(picture, asked, kept.flatten())
    again = backbone(torch.where(inside, picture, other), asked, kept.flatten())
    assert all(torch.equal(answer[request], again[request]) for request in asked)
    assert answer[Request(1, "token")].shape[1] == backbone.prefix + 4
    answer[Request(-1, "cls")].square().sum().backward()
    changed = picture.grad[0].abs().amax(dim=0) > 0
    assert torch.equal(changed, inside)


# Terms


SIZE = (56, 70)
MASKS = {"structure_mask": box(SIZE, 14, 42, 14, 56), "appearance_mask": box(SIZE, 0, 28, 28, 70)}
TERMS = (Appearance, Structure, Identity, Colour, Contrast, MatchedL1, Reconstruction)


@pytest.fixture(scope="module")
def pictures():
    rng = torch.Generator().manual_seed(1)
    names = ("output", "structure", "matched", "reconstruction", "appearance")
    return Pictures(**{name: torch.rand(1, 3, *SIZE, generator=rng) for name in names})


def test_feature_terms_compare_the_covered_patches(pictures, tiny):
    backbone = tiny("dinov2_reg")
    objective = Objective([Appearance(), Structure(), Identity()], backbone, size=56)
    losses = objective.losses(replace(pictures, **MASKS))
    of_a, of_b = (covered_patches(mask, SIZE, 14) for mask in MASKS.values())

    def extract(name, covered, facet):
        request = Request(-1, facet)
        return backbone(pictures[name], [request], covered)[request]

    compared = {
        "appearance": (extract("output", of_a, "cls"), extract("appearance", of_b, "cls")),
        "structure": (extract("output", of_a, "key"), extract("structure", of_a, "key")),
        "identity": (extract("reconstruction", of_b, "key"), extract("appearance", of_b, "key")),
    }
    assert compared["structure"][0].shape[1] == backbone.prefix + 6
    for name, both in compared.items():
        assert losses[name].item() == pytest.approx(objective.terms[name].distance(*both, backbone).item(), rel=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_gradients_stay_within_the_mask(term, pictures, tiny):
    objective = Objective([term()], tiny(), size=56)
    output = pictures[term.output].clone().requires_grad_()
    losses = objective.losses(replace(pictures, **{term.output: output}, **MASKS))
    objective.total(losses).backward()
    inside = MASKS["appearance_mask" if term.output == "reconstruction" else "structure_mask"][0, 0] == 1
    reached = output.grad[0].abs().amax(dim=0) > 0
    assert not reached[~inside].any()
    assert reached[inside].float().mean() > 0.9


@pytest.mark.parametrize("term", TERMS)
def test_a_mask_over_everything_is_no_mask(term, pictures, tiny):
    objective = Objective([term(cell=14) if term in (Colour, Contrast) else term()], tiny(), size=56)
    whole = dict.fromkeys(MASKS, torch.ones(1, 1, *SIZE))
    (masked,), (plain,) = (objective.losses(replace(pictures, **masks)).values() for masks in (whole, {}))
    assert masked.item() == pytest.approx(plain.item(), rel=1e-5)


def test_pixels_count_as_much_as_they_are_covered(pictures):
    output, target = pictures["output"], pictures["matched"]
    mask = 0.25 * box(SIZE, 0, 56, 0, 35) + 0.75 * box(SIZE, 0, 56, 35, 70)
    halves = [MatchedL1().loss(output[..., part], target[..., part]) for part in (slice(35), slice(35, None))]
    expected = 0.25 * halves[0] + 0.75 * halves[1]
    assert MatchedL1().loss(output, target, mask).item() == pytest.approx(expected.item(), rel=1e-5)
    corner = box(SIZE, 50, 56, 66, 70)  # beyond the last whole cell
    assert Colour().loss(output, target, corner).item() > 0


# The result


@pytest.mark.parametrize("feather", [0.0, 1.0, 5.5, 12.0])
def test_the_feather_is_round_and_ends(feather):
    mask = box((60, 70), 20, 30, 25, 50)
    mask[..., 45, 10] = 1
    share = composite(torch.zeros(1, 3, 60, 70), torch.ones(1, 3, 60, 70), mask, feather)[0, 0]
    away = distance_to(mask)
    assert (share[away == 0] == 1).all()
    assert (share[away >= feather][away[away >= feather] > 0] == 0).all()
    fading = (away > 0) & (away < feather)
    torch.testing.assert_close(share[fading], 1 - (away[fading] / max(feather, 1)) ** 2, atol=1e-5, rtol=0)


def test_soft_masks_stay_soft():
    mask = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    share = composite(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), mask, 0.0)
    assert torch.equal(share, mask.expand(1, 3, 64, 64))
    half = composite(torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), torch.full((1, 1, 8, 8), 0.5), 8.0)
    assert torch.equal(half, torch.full_like(half, 0.5))


def changed_where(before, after, mask, feather):
    """Whether a picture is the same past the feather, bit for bit, and another within the mask."""
    away = distance_to(mask)
    same = (before == after)[0].all(dim=0)
    assert same[away >= feather].all()
    assert not same[away == 0].float().mean() > 0.1


@pytest.mark.parametrize("feather", [0.0, 6.0])
@pytest.mark.parametrize("recipe", ["paper", "draft"])
def test_a_run_changes_nothing_outside_the_mask(recipe, feather, pair, tiny):
    mask = box((97, 123), 30, 70, 40, 90)
    settings = preset(recipe, **{**SMALL, "warm_steps": 2 if recipe == "draft" else 0, "feather": feather})
    run = Transfer(*pair, tiny(), settings, structure_mask=mask, appearance_mask=box((59, 50), 0, 30, 10, 40))
    assert all(value == value for step in run for value in step.floats().values())
    changed_where(pair[0], run.image(), mask, max(feather, 1))
    small = run.image(64)
    assert torch.equal(small[..., :8, :], resize(pair[0], (64, 81))[..., :8, :])


def test_the_whole_picture_is_masked_too(pair, tiny):
    """In the steps on the whole picture too; a mask over everything leaves the crops as they are."""
    settings = preset("paper", **SMALL, whole_every=1, seed=2)
    masks = [None, torch.ones(1, 1, 9, 9), box((97, 123), 0, 97, 0, 60)]
    runs = [[step.floats() for step in Transfer(*pair, tiny(), settings, structure_mask=mask)] for mask in masks]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert runs[2][1]["whole_structure"] != pytest.approx(runs[0][1]["whole_structure"], rel=1e-3)


class Recorder(Objective):
    """Keeps the pictures that it is given."""

    given = ()

    def losses(self, pictures, names=None, targets=None):
        self.given = (*self.given, pictures)
        return super().losses(pictures, names, targets)


def test_masks_are_cropped_with_their_pictures(tiny):
    """On pictures that are white just where they are selected, in crops and in the whole."""
    masks = {"structure": box((70, 90), 10, 50, 20, 60), "appearance": box((80, 70), 30, 70, 0, 40)}
    whites = [mask.expand(-1, 3, -1, -1) for mask in masks.values()]
    objective = Recorder([Appearance(), Structure(), Identity()], tiny(), size=56)
    settings = preset("paper", steps=3, size=None, crop=0.8, jitter=0.0, blur=0.0, whole_every=1)
    given = {f"{name}_mask": mask for name, mask in masks.items()}
    assert len(list(Transfer(*whites, objective.backbone, settings, objective, **given))) == 3
    assert {pictures.structure.shape[-2:] == (70, 90) for pictures in objective.given} == {True, False}
    for pictures in objective.given:
        assert torch.equal(pictures.structure_mask, pictures.structure[:, :1])
        assert torch.equal(pictures.appearance_mask, pictures.appearance[:, :1])


@pytest.mark.usefixtures("coarse_matching")
def test_the_matched_image_is_that_of_the_masks(pair, tiny):
    masks = {"structure_mask": box((97, 123), 30, 70, 40, 90), "appearance_mask": box((118, 99), 0, 60, 0, 99)}
    run = Transfer(*pair, tiny(), preset("draft", **SMALL), **masks)
    expected, without = (InstantTransfer.between(*pair, tiny(), run.settings, **given) for given in (masks, {}))
    assert torch.equal(run.pair.matched, expected.painted(64))
    assert not torch.equal(run.pair.matched, without.painted(64))


def test_the_feather_is_in_pixels_of_the_full_size(pair, tiny):
    structure = resize(pair[0], (192, 192))
    run = Transfer(
        structure, pair[1], tiny(), preset("paper", **SMALL), structure_mask=box((192, 192), 60, 120, 60, 120)
    )
    before, after = resize(structure, (96, 96)), run.image(96)
    same = (before == after)[0].all(dim=0)
    away = distance_to(box((96, 96), 30, 60, 30, 60))
    assert same[away >= 6].all()
    assert not same[(away > 0) & (away < 3)].any()


# The instant transfer


def halves(size):
    """Red noise on the left, green on the right."""
    picture = torch.zeros(1, 3, *size)
    middle = size[1] // 2
    picture[:, 0, :, :middle] = 0.5 + 0.4 * noise(size[0], middle)
    picture[:, 1, :, middle:] = 0.5 + 0.4 * noise(size[0], middle)
    return picture


@pytest.mark.parametrize(("side", "channel"), [(0, 0), (1, 1)], ids=["left", "right"])
def test_only_the_selected_part_gives_its_colours(side, channel, backbone, pair):
    mask = box((96, 128), 0, 96, 70 * side, 70 * side + 58)  # to a little before the middle
    appearance = halves((96, 128))
    quick = {"settings": InstantSettings(match_passes=1), "short_patches": 12}
    instant = InstantTransfer.between(pair[0], appearance, backbone, **quick, appearance_mask=mask)
    for taken in (instant.colours.gain, instant.colours.offset, instant.exemplar):
        assert taken[:, 1 - channel].abs().max() < 1e-4
    means = instant.image().mean(dim=(0, 2, 3))
    assert means[channel] > 0.4
    whole = InstantTransfer.between(pair[0], appearance, backbone, **quick).image().mean(dim=(0, 2, 3))
    assert means[channel] > 1.2 * whole[channel]


def test_the_instant_transfer_changes_nothing_outside_the_mask(backbone, pair):
    mask = box((97, 123), 30, 70, 40, 90)
    settings = InstantSettings(match_passes=1, feather=5)
    instant = InstantTransfer.between(*pair, backbone, settings, short_patches=8, structure_mask=mask)
    changed_where(pair[0], instant.image(), mask, 5)
    assert (instant.painted() - pair[0])[..., :20, :].abs().mean() > 0.01


def test_matches_stay_within_the_target_mask(backbone, pair):
    mask = box((118, 99), 0, 59, 0, 99)
    for source_mask in (None, box((97, 123), 0, 50, 20, 100)):
        masks = {"source_mask": source_mask, "target_mask": mask}
        match = Correspondence.between(*pair, backbone, short_patches=12, **masks)
        inside = covered_patches(mask, tuple(14 * n for n in match.target_grid), 14).view(match.target_grid)
        assert 0 < inside.sum() < inside.numel()
        for radius in (0, 2):
            assert inside[tuple(match.matches(radius))].all()
        assert match.warp(inside.float()[None, None]).min() > 1 - 1e-5


def test_with_both_masks_an_object_matches_itself_on_another_background(backbone, pair):
    """The astronaut's middle on her own background and on noise."""
    structure = resize(pair[0], (168, 168))
    mask = box((168, 168), 42, 168, 42, 126)
    other = torch.where(mask == 1, structure, noise(1, 3, 168, 168))
    match = Correspondence.between(structure, other, backbone, short_patches=12, source_mask=mask, target_mask=mask)
    inside = covered_patches(mask, (168, 168), 14).view(12, 12)
    here = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"))
    steps = (match.matches(2) - here).abs().amax(dim=0)[inside]
    assert (steps <= 1).float().mean() > 0.9


def test_with_both_masks_descriptors_tell_an_objects_parts_apart(backbone, pair):
    """They are differences from the object's mean; with one mask only, from the picture's, as without any."""
    masks = {"source_mask": box((97, 123), 30, 97, 30, 90), "target_mask": box((118, 99), 40, 118, 0, 99)}
    both, one, none = (
        Correspondence.between(*pair, backbone, short_patches=12, **given)
        for given in (masks, {"target_mask": masks["target_mask"]}, {})
    )
    assert torch.equal(one.source, none.source)
    assert torch.equal(one.target, none.target)
    for side, grid in (("source", both.source_grid), ("target", both.target_grid)):
        inside = covered_patches(masks[f"{side}_mask"], (14 * grid[0], 14 * grid[1]), 14)
        assert getattr(both, side)[inside].mean(dim=0).norm() < 0.5 * getattr(none, side)[inside].mean(dim=0).norm()


# What is let in


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 1, 9, 9), "selects nothing"),
        (torch.full((1, 1, 9, 9), 1 / 255), "selects nothing"),
        (torch.full((1, 1, 9, 9), torch.nan), "not numbers"),
        (torch.full((1, 1, 9, 9), torch.inf), "not numbers"),
        (torch.full((1, 1, 9, 9), 255.0), "divide by 255"),
        (torch.ones(2, 1, 9, 9), r"one mask \[1, 1, H, W\], not \[2, 1, 9, 9\]"),
        (torch.ones(1, 3, 9, 9), "one mask"),
        (torch.ones(9), "one mask"),
        (torch.ones(1, 1, 0, 9), "one mask"),
    ],
    ids=str,
)
def test_bad_masks_are_refused(mask, message, pair, tiny):
    backbone = tiny()
    for which in ("structure", "appearance"):
        named = {f"{which}_mask": mask}
        with pytest.raises(SpliceError, match=f"the {which} mask .*{message}"):
            Transfer(*pair, backbone, preset("paper", **SMALL), **named)
        with pytest.raises(SpliceError, match=f"the {which} mask .*{message}"):
            InstantTransfer.between(*pair, backbone, **named)
    with pytest.raises(SpliceError, match=f"the target mask .*{message}"):
        Correspondence.between(*pair, backbone, target_mask=mask)


def test_masks_of_other_kinds_are_let_in():
    assert torch.equal(check_mask(torch.ones(1, 4, 5, dtype=torch.bool)), torch.ones(1, 1, 4, 5))
    assert torch.equal(check_mask(torch.ones(4, 5)), torch.ones(1, 1, 4, 5))
    assert check_mask(torch.tensor([[[[0.0, 1.001]]]])).max() == 1


def test_mask_files(tmp_path):
    grey = Image.linear_gradient("L").resize((40, 30))
    expected = torch.tensor(list(grey.tobytes())).view(1, 1, 30, 40) / 255
    opaque = Image.new("RGBA", (40, 30), "red")
    transparent = opaque.copy()
    transparent.putalpha(grey)
    for name, image, wanted in (
        ("grey", grey, expected),
        ("rgb", grey.convert("RGB"), expected),
        ("opaque", grey.convert("RGBA"), expected),
        ("alpha", transparent, expected),
        ("red", opaque, torch.ones(1, 1, 30, 40)),
        ("bits", grey.point(lambda value: 255 * (value > 99)).convert("1"), (expected > 99.5 / 255).float()),
    ):
        image.save(tmp_path / f"{name}.png")
        torch.testing.assert_close(load_mask(tmp_path / f"{name}.png"), wanted, msg=name)


# The command line


VIT = ("--backbone", OFFLINE_BACKBONE, "--device", "cpu", "--dtype", "fp32")
QUICK = (*VIT, "--preset", "paper", "--steps", 2, "--size", 64, "--vit-size", 56, "--quiet")


@pytest.fixture
def files(tmp_path, pair):
    save_picture(pair[0], tmp_path / "a.png")
    save_picture(pair[1], tmp_path / "b.png")
    Image.fromarray(box((97, 123), 30, 70, 40, 90)[0, 0].mul(255).byte().numpy()).save(tmp_path / "a-mask.png")
    Image.linear_gradient("L").resize((20, 20)).save(tmp_path / "b-mask.png")
    return tmp_path


@pytest.mark.usefixtures("coarse_matching")
@pytest.mark.parametrize(("command", "options"), [("transfer", QUICK), ("instant", VIT)])
def test_masks_on_the_command_line(command, options, splice, files):
    masks = ("--structure-mask", files / "a-mask.png", "--appearance-mask", files / "b-mask.png", "--feather", 4)
    result = splice(command, files / "a.png", files / "b.png", "-o", files / "out.png", *options, *masks)
    assert (result.status, result.err) == (0, "")
    changed_where(load_picture(files / "a.png"), load_picture(files / "out.png"), load_mask(files / "a-mask.png"), 4)


@pytest.mark.parametrize(("command", "options"), [("transfer", QUICK), ("instant", VIT)])
@pytest.mark.parametrize("option", ["--structure-mask", "--appearance-mask"])
def test_a_bad_mask_file_is_one_line(option, command, options, splice, files):
    black, damaged = files / "black.png", files / "damaged.png"
    Image.new("L", (30, 30)).save(black)
    damaged.write_bytes((files / "a.png").read_bytes()[:900])
    for path, word in ((black, "selects nothing"), (damaged, "damaged"), (files / "gone.png", "no picture")):
        result = splice(command, files / "a.png", files / "b.png", "-o", files / "out.png", *options, option, path)
        assert (result.status, result.out, len(result.complaint)) == (2, "", 1)
        assert word in result.complaint[0]
        assert str(path) in result.complaint[0]
        assert not (files / "out.png").exists()


@pytest.mark.parametrize("feather", ["-1", "nan", "inf", "wide"])
@pytest.mark.parametrize("command", ["transfer", "instant"])
def test_a_bad_feather_is_one_line(command, feather, splice, files):
    result = splice(command, files / "a.png", files / "b.png", "-o", files / "out.png", *VIT, f"--feather={feather}")
    assert (result.status, result.out, len(result.complaint)) == (2, "", 1)
    assert "feather" in result.complaint[0]
