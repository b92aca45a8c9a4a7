"""Runs: what they repeat, where they stop, and that they learn."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from splice_engine import Appearance, Identity, Objective, Palette, SpliceError, Structure, Transfer, preset, render
from splice_engine.images import resize
from splice_engine.settings import Settings
from splice_engine.views import Views

SMALL = {"size": 64, "vit_size": 56, "steps": 5}


@pytest.fixture(scope="module")
def judge(tiny):
    return tiny()


@pytest.fixture
def begin(pair, judge):
    """Starts a small run on the demo pair with a tiny ViT."""

    def start(**changes):
        return Transfer(*pair, judge, preset("paper", **{**SMALL, **changes}))

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
    assert (run.step, len(run)) == (2, 3)
    before = run.image()
    assert torch.equal(before, run.image())  # looking changes nothing
    steps += itertools.islice(run, 1)
    steps += list(run)
    assert [step.floats() for step in steps] == [step.floats() for step in expected]
    assert torch.equal(run.image(), through.image())
    assert not torch.equal(before, run.image())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_steps_are_counted(count, begin):
    run = begin(steps=count)
    assert (len(run), run.step) == (count, 0)
    steps = list(run)
    assert [step.index for step in steps] == list(range(count))
    assert (len(run), run.step, list(run)) == (0, count, [])


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_which_terms_each_step_has(every, begin):
    """The first has the appearance term only; every so often the whole structure picture is judged too."""
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
    assert len(run) == 6
    steps = list(run)
    assert [step.index for step in steps] == list(range(6))
    for step in steps[:4]:  # no ViT takes part
        assert set(step.losses) in ({"painting"}, {"painting", "reconstruction"})
    for step in steps[4:]:
        assert {name for name in step.losses if not name.startswith("whole_")} == set(TERMS)
    weights = {"appearance": 10, "structure": 1, "identity": 1, "reconstruction": 1, "contrast": 1, "colour": 0.5}
    total = sum(weight * steps[-1].losses[name].item() for name, weight in weights.items())
    assert steps[-1].total.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("share", "halves"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_warm_start_begins_at_half_the_size(share, halves, begin, monkeypatch):
    run = begin(size=97, crop=1.0, warm_steps=4, steps=1, warm_coarse=share)
    seen = []
    monkeypatch.setattr(run, "_forward", lambda picture: seen.append(min(picture.shape[-2:])) or run._trained(picture))
    steps = iter(run)
    for index in range(4):
        next(steps)
        assert set(seen) == {48 if index < halves else 97}
        seen.clear()


def test_a_picture_too_small_to_be_halved_is_learnt_as_it_is(begin):
    whole, half = (list(begin(warm_steps=2, steps=1, warm_coarse=share)) for share in (0.0, 1.0))
    assert [step.floats() for step in whole] == [step.floats() for step in half]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_generator_is_anchored_every_so_many_steps(every, begin):
    steps = list(begin(steps=5, warm_steps=2, anchor_every=every, reconstruction_weight=1.0))
    anchored = ["reconstruction" in step.losses for step in steps]
    assert anchored == [index % every == 0 for index in (0, 1, *range(5))]
    assert all(("identity" in step.losses) == there for step, there in zip(steps[2:], anchored[2:], strict=True))


def test_an_objective_of_anchors_alone_has_them_in_every_step(begin):
    run = begin(anchor_every=3, appearance_weight=0.0, structure_weight=0.0)
    assert all(set(step.losses) == {"identity"} for step in run)


def test_views_that_recur_are_looked_at_once(begin, judge, monkeypatch):
    """Their steps have the losses that a ViT looking anew would find."""
    looks = 0

    class Counted(Objective):
        def targets(self, *arguments):
            nonlocal looks
            found = super().targets(*arguments)
            looks += bool(found)
            return found

    terms = [Appearance(), Structure(), Identity()]
    run = begin(steps=12, views=2, whole_every=0, learning_rate=0.0)
    run.objective = Counted(terms, judge, size=56)
    counted = [step.floats() for step in run]
    assert looks <= 4  # two views of each picture

    anew = begin(steps=12, views=2, whole_every=0, learning_rate=0.0)
    anew.objective = Objective(terms, judge, size=56)
    read = anew._read_targets

    def forget(views, names):
        for view in views:
            view.targets.clear()
        read(views, names)

    monkeypatch.setattr(anew, "_read_targets", forget)
    for seen, expected in zip(counted, anew, strict=True):
        assert seen == pytest.approx(expected.floats(), rel=1e-4)


def test_a_run_sets_out_from_a_generator(pair, judge):
    settings = preset("paper", **{**SMALL, "warm_steps": 4})
    taught, _ = finish(Transfer(*pair, judge, settings))
    settings = replace(settings, residual=1.0)  # the generator's picture is where the run begins, not the instant one
    before = copy.deepcopy(taught.generator.state_dict())
    run = Transfer(*pair, judge, settings, generator=taught.generator)
    assert len(run) == SMALL["steps"]  # no warm start
    assert torch.equal(run.image(), taught.image())
    first = next(iter(run))
    assert set(first.losses) > {"appearance", "structure", "identity"}  # not the first step of a recipe from noise
    assert not torch.equal(run.image(), taught.image())
    assert all(torch.equal(before[name], value) for name, value in taught.generator.state_dict().items())


@pytest.mark.parametrize("size", [None, 80])
def test_the_recipe_sets_out_from_the_instant_picture(size, begin, pair, judge):
    """With the whole residual and a recipe that changes nothing, the result is the instant picture itself."""
    run, _ = finish(begin(residual=1.0, warm_steps=2, steps=1, learning_rate=0.0))
    torch.testing.assert_close(run.image(size), Palette.between(*pair, judge, looks=2).image(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [None, 80])
def test_the_residual_lies_over_the_output(size, begin, pair, judge):
    run = begin(residual=0.5, warm_steps=2, steps=3)
    picture = pair[0] if size is None else resize(pair[0], (80, 101))
    steps = iter(run)
    for _ in range(2):
        next(steps)
    learnt = render(run.generator, picture, size=64)
    torch.testing.assert_close(run.image(size), learnt)  # none yet
    list(steps)
    residual = 0.5 * (Palette.between(*pair, judge, looks=2).image(size) - learnt)
    expected = (render(run.generator, picture, size=64) + residual).clamp(0, 1)
    torch.testing.assert_close(run.image(size), expected)
    assert residual.abs().max() > 0.01


def test_the_residual_is_judged_too(begin):
    """The first loss of the recipe is that of the picture under its residual."""
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


def test_an_objective_of_ones_own(pair, judge):
    objective = Objective([Structure(weight=2, layer=0), Structure(layer=1)], judge, size=56)
    run = Transfer(*pair, judge, preset("paper", **SMALL), objective)
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
    assert min(run.structure.shape[-2:]) == short
    assert min(run.appearance.shape[-2:]) == {64: 64, 90: 90}.get(size, 99)
    list(run)
    assert run.image().shape[-2:] == (97, 123)


@pytest.mark.parametrize("warm_steps", [0, 2])
def test_a_run_and_the_global_chance_leave_each_other_alone(warm_steps, begin, pair):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": -3}, "steps must be at least 1, not -3"),
        ({"size": 63}, "size must be at least 64"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 1.0}, "beta2"),
        ({"beta2": 1.01}, "beta2"),
        ({"warm_steps": -1}, "warm_steps"),
        ({"colour_end": 1.1}, "colour_end"),
        ({"appearance_weight": -1.0}, "appearance_weight"),
        ({"structure_weight": float("inf")}, "structure_weight"),
        ({"identity_weight": float("nan")}, "identity_weight"),
        ({"crop": 0.05}, "crop"),
        ({"crop": 1.2}, "crop"),
        ({"flip": -0.1}, "flip"),
        ({"jitter": 1.1}, "jitter"),
        ({"blur": 2.0}, "blur"),
        ({"whole_every": -1}, "whole_every"),
        ({"vit_size": 31}, "vit_size"),
        ({"vit_longest": 31}, "vit_longest"),
        ({"ema": 1.5}, "ema"),
        ({"layer": 3}, "layer must be from -3 to 2"),
        ({"layer": -4}, "layer must be from -3 to 2"),
    ],
    ids=str,
)
def test_settings_out_of_range(changes, message, begin):
    """Known before the first step: nobody waits to learn of a slip."""
    with pytest.raises(SpliceError, match=message):
        begin(**changes)


def test_unknown_preset():
    with pytest.raises(SpliceError, match=r"unknown preset 'papre'.*paper"):
        preset("papre")


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
def test_pictures_that_cannot_be_worked_with(which, picture, message, pair, judge):
    pictures = [picture if index == which else other for index, other in enumerate(pair)]
    with pytest.raises(SpliceError, match=message):
        Transfer(*pictures, judge, preset("paper", **SMALL))


@pytest.mark.parametrize("sizes", [((64, 64), (64, 64)), ((64, 512), (65, 97)), ((512, 64), (100, 70))], ids=str)
def test_pictures_at_the_edge_of_what_is_let_in(sizes, judge):
    structure, appearance = (torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) for size in sizes)
    run, steps = finish(Transfer(structure, appearance, judge, preset("paper", **{**SMALL, "steps": 2})))
    assert all(value == value for step in steps for value in step.floats().values())
    assert run.image().shape == structure.shape


def test_a_structure_of_one_colour_is_trained_on(backbone, pair):
    """Unlike others it would make gradients grow from layer to layer until none is a number."""
    flat = torch.full((1, 3, 96, 96), 0.5)
    settings = preset("paper", **{**SMALL, "size": None, "steps": 1, "warm_steps": 70})
    run, steps = finish(Transfer(flat, pair[1], backbone, settings))
    assert all(torch.isfinite(step.total) for step in steps)
    assert run.image().std() > 0.01


@pytest.mark.parametrize("crop", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("size", [(70, 91), (91, 70), (80, 80)], ids=str)
def test_views_are_square_crops_within_the_range(size, crop):
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    views = Views(Settings(crop=crop, flip=0.0), torch.Generator().manual_seed(0))
    places = set()
    for _ in range(20):
        view = views.crop(picture)
        side = view.shape[-1]
        assert view.shape == (1, 3, side, side)
        assert min(*size, max(48, round(crop * size[0]))) <= side <= min(size)  # the generator needs some 48 pixels
        windows = picture.unfold(2, side, 1).unfold(3, side, 1)
        found = (windows == view[:, :, None, None]).all(dim=(-1, -2)).all(dim=1)[0].nonzero().tolist()
        assert len(found) == 1
        places.add((side, *found[0]))
    assert (len(places) == 1) == (size == (80, 80) and crop == 1)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["flip", "jitter", "blur"])
def test_chances_are_as_set(name, probability):
    chances = {"crop": 1.0, "flip": 0.0, "jitter": 0.0, "blur": 0.0, name: probability}
    views = Views(Settings(**chances), torch.Generator().manual_seed(0))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    changed = 0
    for _ in range(200):
        view = views.disturb(views.crop(picture))
        assert view.shape == picture.shape
        assert torch.equal(view, picture) or name != "flip" or torch.equal(view, picture.flip(-1))
        changed += not torch.equal(view, picture)
    assert changed == pytest.approx(200 * probability, abs=0 if probability == 0 else 25)  # some are too weak to see


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_some_views_are_the_whole_picture(share):
    views = Views(Settings(whole=share, flip=0.0), torch.Generator().manual_seed(0))
    picture = torch.rand(1, 3, 64, 90, generator=torch.Generator().manual_seed(0))
    whole = sum(torch.equal(views.crop_or_whole(picture), picture) for _ in range(100))
    assert whole == pytest.approx(100 * share, abs=0 if share in (0, 1) else 20)


@pytest.mark.parametrize("vit_size", [112, 224])
def test_a_step_is_the_plain_step(vit_size, backbone, plain_model, plain, pair):
    """Losses and gradients against a rendering of the paper's step that takes one full pass for each feature."""
    settings = preset("paper", size=96, vit_size=vit_size, whole_every=0, steps=10)
    run = Transfer(*pair, backbone, settings)
    views = Views(settings, torch.Generator().manual_seed(settings.seed))
    reference = plain.PlainStep(copy.deepcopy(plain_model))
    reference.vit.size = vit_size
    steps = iter(run)
    for index in range(3):
        a, b = views.disturb(views.crop(run.structure)), views.crop(run.appearance)
        reference.generator.copy_weights(run.generator)
        step = next(steps)
        if index == 0:  # the appearance term only
            continue
        expected = reference(a, b)
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
    """Judged afterwards on the whole pictures, not on the views that were trained on."""
    structure, appearance = (resize(picture, (96, 96)) for picture in demo_pair)
    run = Transfer(structure, appearance, backbone, preset("paper", steps=30, size=96, vit_size=112))
    objective = Objective([Appearance(), Structure(), Identity()], backbone, size=112)

    @torch.no_grad()
    def total():
        streams = {"output": run.image(), "reconstruction": render(run.generator, appearance)}
        return objective.total(objective.losses({**streams, "structure": structure, "appearance": appearance})).item()

    before = total()
    list(run)
    assert total() < 0.5 * before
