"""Runs: what they repeat, where they stop, and that they learn."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from splice_engine import (
    Appearance,
    Identity,
    InstantTransfer,
    Objective,
    Pictures,
    SpliceError,
    Structure,
    Transfer,
    preset,
    render,
)
from splice_engine.images import resize, short_side_size, sides
from splice_engine.matching.filters import to_grey, with_coarse_chroma
from splice_engine.training.crops import CropSampler

pytestmark = pytest.mark.usefixtures("coarse_matching")

SMALL = {"size": 64, "vit_size": 56, "steps": 5, "match_passes": 1}


@pytest.fixture(scope="module")
def vit(tiny):
    return tiny()


@pytest.fixture
def begin(pair, vit):
    """Starts a small run on the demo pair with a tiny ViT."""

    def start(objective=None, **changes):
        return Transfer(*pair, vit, preset("paper", **{**SMALL, **changes}), objective)

    return start


def finish(run):
    return run, list(run)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(begin):
    (first, a), (second, b), (other, c) = (finish(begin(seed=seed)) for seed in (3, 3, 4))
    assert [step.floats() for step in a] == [step.floats() for step in b]
    assert torch.equal(first.image(), second.image())
    assert [step.floats() for step in a] != [step.floats() for step in c]
    assert not torch.equal(first.image(), other.image())


def test_leaving_the_loop_loses_nothing(begin):
    through, expected = finish(begin())
    run = begin()
    steps = []
    for step in run:
        steps.append(step)
        if step.index == 1:
            break
    assert (run.step, run.steps_left) == (2, 3)
    before = run.image()
    assert torch.equal(before, run.image())  # rendering changes nothing
    steps += itertools.islice(run, 1)
    steps += list(run)
    assert [step.floats() for step in steps] == [step.floats() for step in expected]
    assert torch.equal(run.image(), through.image())
    assert not torch.equal(before, run.image())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_steps_are_counted(count, begin):
    run = begin(steps=count)
    assert (run.steps, run.steps_left, run.step) == (count, count, 0)
    steps = list(run)
    assert [step.index for step in steps] == list(range(count))
    assert (run.steps_left, run.step, list(run)) == (0, count, [])
    assert bool(run) is True  # a finished run is not an empty one


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_which_terms_each_step_has(every, begin):
    """The first has the appearance term only; every so often the ViT gets the whole structure picture too."""
    for step in begin(whole_every=every):
        names = {"appearance", "structure", "identity"} if step.index else {"appearance"}
        if every and step.index % every == 0:
            names |= {"whole_appearance", "whole_structure"} if step.index else {"whole_appearance"}
        assert step.losses.keys() == names
        assert step.floats().keys() == names | {"total"}
        assert not step.total.requires_grad
        weights = {"appearance": 10, "structure": 1, "identity": 1}
        total = sum(weights[name.removeprefix("whole_")] * loss.item() for name, loss in step.losses.items())
        assert step.total.item() == pytest.approx(total, rel=1e-5)


TERMS = ("appearance", "structure", "identity", "colour", "contrast", "reconstruction")


@pytest.mark.parametrize("kept", TERMS)
def test_each_term_works_alone(kept, begin):
    weights = {f"{name}_weight": float(name == kept) for name in TERMS}
    run, steps = finish(begin(steps=3, whole_every=2, **weights))
    assert all(set(step.losses) <= {kept, f"whole_{kept}"} for step in steps)
    assert all(kept in step.losses for step in steps[1:])
    assert run.image().isfinite().all()


def test_a_warm_start_comes_before_the_recipe(begin):
    weights = {f"{name}_weight": 1.0 for name in ("colour", "contrast", "reconstruction")}
    run = begin(warm_steps=4, steps=2, colour_end=0.5, **weights)
    assert run.steps_left == 6
    steps = list(run)
    assert [step.index for step in steps] == list(range(6))
    for step in steps[:4]:  # no ViT takes part
        assert set(step.losses) in ({"matched_l1"}, {"matched_l1", "reconstruction"})
    for step in steps[4:]:
        assert {name for name in step.losses if not name.startswith("whole_")} == set(TERMS)
    weights = {"appearance": 10, "structure": 1, "identity": 1, "reconstruction": 1, "contrast": 1, "colour": 0.5}
    total = sum(weight * steps[-1].losses[name].item() for name, weight in weights.items())
    assert steps[-1].total.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("share", "halves"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_warm_start_begins_at_half_the_size(share, halves, begin, count_passes):
    run = begin(size=97, crop=1.0, warm_steps=4, steps=1, warm_coarse=share)
    passes = count_passes(run.generator)
    steps = iter(run)
    for index in range(4):
        next(steps)
        assert {min(size) for size in passes} == {48 if index < halves else 97}
        passes.clear()


def test_a_picture_too_small_to_be_halved_is_learnt_as_it_is(begin):
    whole, half = (list(begin(warm_steps=2, steps=1, warm_coarse=share)) for share in (0.0, 1.0))
    assert [step.floats() for step in whole] == [step.floats() for step in half]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_generator_gets_b_every_so_many_steps(every, begin):
    steps = list(begin(steps=5, warm_steps=2, identity_every=every, reconstruction_weight=1.0))
    with_b = ["reconstruction" in step.losses for step in steps]
    assert with_b == [index % every == 0 for index in (0, 1, *range(5))]
    assert all(("identity" in step.losses) == there for step, there in zip(steps[2:], with_b[2:], strict=True))


def test_an_objective_of_the_identity_term_alone_has_it_in_every_step(begin):
    run = begin(identity_every=3, appearance_weight=0.0, structure_weight=0.0)
    assert all(set(step.losses) == {"identity"} for step in run)


class CountedExtractions(Objective):
    """Counts how often targets are extracted."""

    extractions = 0

    def targets(self, pictures, names=None):
        found = super().targets(pictures, names)
        self.extractions += bool(found)
        return found


class FreshTargets(Objective):
    """Extracts targets anew, whatever it is given."""

    def losses(self, pictures, names=None, targets=None):
        return super().losses(pictures, names)


def test_targets_of_cached_crops_are_extracted_once(begin, vit):
    """Their steps have the losses that targets extracted anew would give."""
    terms, changes = [Appearance(), Structure(), Identity()], {"steps": 12, "whole_every": 0, "learning_rate": 0.0}
    counted, fresh = (kind(terms, vit, size=56) for kind in (CountedExtractions, FreshTargets))
    cached = list(begin(counted, cached_crops=2, **changes))
    assert 0 < counted.extractions <= 4  # two crops of each picture
    for step, expected in zip(cached, begin(fresh, cached_crops=2, **changes), strict=True):
        assert step.floats() == pytest.approx(expected.floats(), rel=1e-4)


@pytest.mark.parametrize("name", ["draft", "paper"])
def test_the_constructor_does_not_run_the_vit(name, pair, vit, count_passes):
    passes = count_passes(vit)
    masks = {"structure_mask": torch.ones(1, 1, 9, 9), "appearance_mask": torch.ones(1, 1, 9, 9)}
    run = Transfer(*pair, vit, preset(name, **SMALL), **masks)
    assert passes == []
    next(iter(run))
    assert len(passes) > 0


def test_a_run_starts_from_a_generator(pair, vit):
    settings = preset("paper", **{**SMALL, "warm_steps": 4})
    trained, _ = finish(Transfer(*pair, vit, settings))
    settings = replace(settings, residual=1.0)  # the run starts from the generator's picture, not the matched image
    before = copy.deepcopy(trained.generator.state_dict())
    run = Transfer(*pair, vit, settings, generator=trained.generator)
    assert run.steps_left == SMALL["steps"]  # no warm start
    assert torch.equal(run.image(), trained.image())
    first = next(iter(run))
    assert set(first.losses) > {"appearance", "structure", "identity"}  # not the first step of a recipe from noise
    assert not torch.equal(run.image(), trained.image())
    assert all(torch.equal(before[name], value) for name, value in trained.generator.state_dict().items())


@pytest.mark.parametrize("size", [None, 80])
def test_the_recipe_starts_from_the_matched_image(size, begin, pair, vit):
    """With the whole residual and a recipe that changes nothing, the result is the matched image itself."""
    run, _ = finish(begin(residual=1.0, warm_steps=2, steps=1, learning_rate=0.0))
    expected = InstantTransfer.between(*pair, vit, run.settings).image(size)
    torch.testing.assert_close(run.image(size), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [None, 80])
def test_the_residual_lies_over_the_output(size, begin, pair, vit):
    run = begin(residual=0.5, warm_steps=2, steps=3)
    picture = pair[0] if size is None else resize(pair[0], (80, 101))
    steps = iter(run)
    for _ in range(2):
        next(steps)
    learnt = render(run.generator, picture, size=64)
    matched = InstantTransfer.between(*pair, vit, run.settings).image(size)
    residual = 0.5 * (matched - learnt)
    # In the warm start it is what the generator lacks so far: whoever ends the run here has a whole picture.
    torch.testing.assert_close(run.image(size), with_coarse_chroma(learnt + residual, matched).clamp(0, 1))
    list(steps)
    added = render(run.generator, picture, size=64) + residual
    result = run.image(size)
    torch.testing.assert_close(result, with_coarse_chroma(added.clone(), matched).clamp(0, 1))
    assert residual.abs().max() > 0.01
    # Brightness is that of the sum, coarse chroma that of the matched image.
    inside = ((added > 0.1) & (added < 0.9)).all(dim=1, keepdim=True)
    assert (to_grey(result) - to_grey(added))[inside].abs().max() < 1e-3
    chroma, wanted, before = (resize(x - to_grey(x), (4, 4)) for x in (result, matched, added))
    assert (chroma - wanted).abs().mean() < 0.5 * (before - wanted).abs().mean()


def test_over_a_refined_picture_lies_the_coarse_part_of_what_the_recipe_changes(begin, pair):
    run = begin(residual=1.0, refine_steps=1, warm_steps=2, steps=3, size=128, learning_rate=0.01)
    steps = iter(run)
    for _ in range(3):
        next(steps)
    learnt = render(run.generator, pair[0], size=128)
    list(steps)
    change = render(run.generator, pair[0], size=128) - learnt
    refined = run.refinement.painted()
    whole, coarse = (
        with_coarse_chroma(refined + part, refined).clamp(0, 1)
        for part in (change, resize(resize(change, short_side_size(*sides(change), 64)), sides(change)))
    )
    assert (whole - coarse).abs().max() > 1e-3  # a hundred times what the comparison allows
    torch.testing.assert_close(run.image(), coarse)


def test_the_losses_are_those_of_the_picture_with_its_residual(begin):
    """So the first loss of a recipe depends on it."""
    losses = [next(iter(begin(residual=residual))).floats()["appearance"] for residual in (0.0, 1.0)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_recomputing_saves_memory_and_changes_nothing(begin):
    def train(recompute):
        run = begin(warm_steps=1, steps=2, recompute=recompute)
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            steps = [step.floats() for step in run]
        return steps, run.image(), kept

    (steps, image, kept), (again, image_again, kept_again) = train(False), train(True)
    assert again == steps
    assert torch.equal(image_again, image)
    assert kept_again < kept


def test_no_term_at_all_is_refused(begin):
    with pytest.raises(SpliceError, match="no term"):
        begin(appearance_weight=0.0, structure_weight=0.0, identity_weight=0.0)


def test_an_objective_of_ones_own(pair, vit):
    objective = Objective([Structure(weight=2, layer=0), Structure(layer=1)], vit, size=56)
    run = Transfer(*pair, vit, preset("paper", **SMALL), objective)
    for step in run:
        names = {"structure", "structure_2"} | ({"whole_structure", "whole_structure_2"} if step.index == 0 else set())
        assert step.losses.keys() == names


def test_the_running_average_makes_the_picture(begin):
    """Of the weights that the same run has without it: averaging does not touch the training."""
    decay = 0.7
    raw, averaged = begin(learning_rate=0.01), begin(learning_rate=0.01, ema=decay)
    average = {name: value.clone() for name, value in raw.generator.state_dict().items()}
    for expected, step in zip(raw, averaged, strict=True):
        assert step.floats() == expected.floats()
        for name, value in raw.generator.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    unaveraged = raw.image()
    raw.generator.load_state_dict(average)
    assert (averaged.image() - raw.image()).abs().max() < 1e-5
    assert (averaged.image() - unaveraged).abs().max() > 1e-3


def test_the_learning_rate_falls_to_its_end(begin):
    """Both runs take the same first step; a rate that has fallen to nothing leaves the last one without effect."""
    even, falling = begin(steps=2, warm_steps=3), begin(steps=2, warm_steps=3, learning_rate_end=0.0)
    seen = {}
    for name, run in (("even", even), ("falling", falling)):
        seen[name] = [run.image() for step in run if step.index >= 3]
    assert torch.equal(seen["even"][0], seen["falling"][0])
    assert torch.equal(seen["falling"][0], seen["falling"][1])
    assert (seen["even"][0] - seen["even"][1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("size", "expected"), [(None, (97, 123)), (97, (97, 123)), (64, (64, 81)), (194, (194, 246)), (150, (150, 190))]
)
def test_sizes_of_the_picture(size, expected, begin):
    run = begin(steps=1)
    list(run)
    image = run.image(size)
    assert image.shape == (1, 3, *expected)
    assert not image.requires_grad
    assert image.min() >= 0
    assert image.max() <= 1


@pytest.mark.parametrize("size", [64, 90, 400, None])
def test_size_is_that_of_training_only(size, begin):
    run = begin(size=size, steps=1)
    short = {64: 64, 90: 90}.get(size, 97)  # never enlarged
    assert min(run.pair.structure.shape[-2:]) == short
    assert min(run.pair.appearance.shape[-2:]) == {64: 64, 90: 90}.get(size, 99)
    list(run)
    assert run.image().shape[-2:] == (97, 123)


@pytest.mark.parametrize(("size", "expected"), [(64, 64), (512, 97), (None, 97)])
def test_a_generator_keeps_the_size_that_it_was_trained_at(size, expected, pair, vit):
    """Not the size asked for: the picture may be smaller, or no size asked for."""
    run = Transfer(*pair, vit, preset("paper", steps=1, size=size, vit_size=56))
    assert run.generator.metadata["size"] == expected == min(run.pair.structure.shape[-2:])


@pytest.mark.parametrize("warm_steps", [0, 2])
def test_a_run_and_the_global_rng_leave_each_other_alone(warm_steps, begin, pair):
    kept = [picture.clone() for picture in pair]
    images = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        run, _ = finish(begin(warm_steps=warm_steps, steps=2))
        images.append(run.image())
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*images)
    assert all(torch.equal(now, then) for now, then in zip(pair, kept, strict=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("layer", [4, -5])
def test_a_block_that_the_vit_does_not_have_is_refused(layer, begin):
    """Known before the first step: nobody waits to learn of a slip."""
    with pytest.raises(SpliceError, match="layer must be from -4 to 3"):
        begin(layer=layer)


@pytest.mark.parametrize("crop", [0.1, 0.5, 1.0])
def test_every_crop_that_is_let_in_can_be_trained_on(crop, begin):
    run, steps = finish(begin(crop=crop, steps=3))
    assert len(steps) == 3
    assert run.image().isfinite().all()


@pytest.mark.parametrize(
    ("which", "picture", "message"),
    [
        (0, torch.full((1, 3, 96, 96), float("nan")), "structure picture.*not numbers"),
        (1, torch.full((1, 3, 96, 96), float("nan")), "appearance picture.*not numbers"),
        (0, torch.full((1, 3, 96, 96), 200.0), "structure picture.*divide by 255"),
        (1, torch.zeros(1, 3, 1, 1), "appearance picture is 1x1 pixels"),
        (0, torch.zeros(1, 3, 64, 1000), "structure picture is 1000x64 pixels"),
        (1, torch.zeros(2, 3, 96, 96), "appearance picture must be one"),
    ],
)
def test_pictures_that_cannot_be_worked_with(which, picture, message, pair, vit):
    pictures = [picture if index == which else other for index, other in enumerate(pair)]
    with pytest.raises(SpliceError, match=message):
        Transfer(*pictures, vit, preset("paper", **SMALL))


@pytest.mark.parametrize("sizes", [((64, 64), (64, 64)), ((64, 512), (65, 97)), ((512, 64), (100, 70))], ids=str)
def test_pictures_at_the_edge_of_what_is_let_in(sizes, vit):
    structure, appearance = (torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) for size in sizes)
    run, steps = finish(Transfer(structure, appearance, vit, preset("paper", **{**SMALL, "steps": 2})))
    assert all(value == value for step in steps for value in step.floats().values())
    assert run.image().shape == structure.shape


def test_a_structure_of_one_colour_is_trained_on(pair, vit):
    """Unlike others it would make gradients grow from layer to layer, beyond what Adam can square."""
    flat = torch.full((1, 3, 96, 96), 0.5)
    run = Transfer(flat, pair[1], vit, preset("paper", **{**SMALL, "size": None, "steps": 1, "warm_steps": 10}))
    for step in run:
        assert torch.isfinite(step.total)
        assert max(weight.grad.abs().max() for weight in run.generator.parameters()) < 1e6
    assert run.image().std() > 0.01


def test_a_step_is_the_plain_step(backbone, plain_model, plain, pair):
    """Losses and gradients against a rendering of the paper's step that takes one full pass for each feature."""
    settings = preset("paper", size=96, vit_size=112, whole_every=0, steps=10)
    run = Transfer(*pair, backbone, settings)
    sampler = CropSampler(settings, torch.Generator().manual_seed(settings.seed))
    reference = plain.PlainStep(copy.deepcopy(plain_model))
    reference.vit.size = 112
    steps = iter(run)
    for index in range(3):
        a, b = sampler.structure(run.pair), sampler.appearance(run.pair)
        reference.generator.copy_weights(run.generator)
        step = next(steps)
        if index == 0:  # the appearance term only
            continue
        expected = reference(a.picture, b.picture)
        for name, loss in expected.items():
            assert step.losses[name].item() == pytest.approx(loss.item(), rel=1e-4), name
        assert step.losses.keys() == expected.keys()
        ours = torch.cat([level.up.conv.weight.grad.flatten() for level in run.generator.levels])
        theirs = torch.cat([level.up[1].weight.grad.flatten() for level in plain_levels(reference.generator)])
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.05


def plain_levels(generator):
    level = generator[0]
    while isinstance(level, type(generator[0])):
        yield level
        level = level.below


def test_training_lowers_the_losses(backbone, demo_pair):
    """Compared afterwards on the whole pictures, not on the crops that were trained on."""
    structure, appearance = (resize(picture, (64, 64)) for picture in demo_pair)
    run = Transfer(structure, appearance, backbone, preset("paper", steps=20, size=64, vit_size=56))
    objective = Objective([Appearance(), Structure(), Identity()], backbone, size=112)

    @torch.no_grad()
    def total():
        pictures = Pictures(
            output=run.image(),
            structure=structure,
            appearance=appearance,
            reconstruction=render(run.generator, appearance),
        )
        return objective.total(objective.losses(pictures)).item()

    before = total()
    list(run)
    assert total() < 0.5 * before
