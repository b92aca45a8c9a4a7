"""Refinement of the instant transfer: tiny random ViTs for what has shapes, real weights for what it shows."""

from dataclasses import replace

import pytest
import torch

from splice_engine import Refinement, RefinementSettings, SpliceError, TokenDistance, Transfer, measure, preset
from splice_engine.images import resize, sides

pytestmark = pytest.mark.usefixtures("coarse_matching")

SMALL = RefinementSettings(match_passes=1, steps=3, size=64, density=1)


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(0)
    small = torch.rand(2, 1, 3, 12, 15, generator=rng)
    return tuple(torch.nn.functional.interpolate(picture, (96, 120), mode="bilinear") for picture in small)


def finish(run):
    return run, [step.floats() for step in run]


def test_a_run_is_an_iterator_of_steps(pair, tiny):
    run, losses = finish(Refinement(*pair, tiny(), SMALL))
    assert run.step == run.steps == len(losses) == 3
    assert run.steps_left == 0
    assert set(losses[0]) == {"total", "tokens", "moments", "structure", "patches", "edges", "tie", "range"}
    assert sides(run.image()) == (96, 120)
    assert sides(run.image(48)) == (48, 60)


def test_it_begins_at_the_instant_transfer_and_changes_its_brightness_alone(pair, tiny):
    run = Refinement(*pair, tiny(), SMALL)
    start = run.image()
    assert torch.equal(start, run.instant.image())
    finish(run)
    change = run.image() - start
    free = ((run.image() > 0) & (run.image() < 1)).all(dim=1, keepdim=True).expand_as(change)
    assert change.abs().max() > 1e-3
    assert (change - change[:, :1])[free].abs().max() < 1e-5


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_left_and_entered_again_a_run_ends_as_an_undisturbed_one(stop, pair, tiny):
    whole, _ = finish(Refinement(*pair, tiny(), SMALL))
    run = Refinement(*pair, tiny(), SMALL)
    for step in run:
        if step.index == stop:
            break
    finish(run)
    assert torch.equal(run.image(), whole.image())


def test_activations_computed_twice_give_the_same(pair, tiny):
    kept, twice = (finish(Refinement(*pair, tiny(), replace(SMALL, recompute=again)))[0] for again in (False, True))
    assert torch.equal(kept.image(), twice.image())


def test_ended_it_has_its_picture(pair, tiny):
    run, _ = finish(Refinement(*pair, tiny(), SMALL))
    picture = run.image()
    run.end("cpu")
    assert torch.equal(run.image(), picture)


@pytest.mark.parametrize("size", [(64, 480), (67, 71), (150, 64)])
def test_any_size(size, pair, tiny):
    run, losses = finish(Refinement(resize(pair[0], size), pair[1], tiny(), SMALL))
    assert sides(run.image()) == size
    assert all(value == value for step in losses for value in step.values())


def test_past_the_mask_the_picture_is_the_structure_picture(pair, tiny):
    masks = torch.zeros(2, 1, 1, 96, 120)
    masks[..., 20:70, 30:90] = 1
    run, _ = finish(Refinement(*pair, tiny(), SMALL, *masks))
    assert torch.equal(run.image()[..., :8, :], pair[0][..., :8, :])
    assert not torch.equal(run.image()[..., 30:60, 40:80], pair[0][..., 30:60, 40:80])


def test_a_mask_of_nothing_is_refused(pair, tiny):
    with pytest.raises(SpliceError, match="selects nothing"):
        finish(Refinement(*pair, tiny(), SMALL, torch.zeros(1, 1, 96, 120)))


def test_a_transfer_refines_before_its_generator_learns(pair, tiny):
    settings = preset("standard", size=64, vit_size=56, refine_steps=2, warm_steps=2, steps=1, density=1)
    run = Transfer(*pair, tiny(), settings)
    assert run.steps == 5
    names = []
    for step in run:
        names.append(set(step.losses))
        if step.index <= 3:  # the generator has learnt little, but its picture lacks nothing
            assert torch.allclose(run.image(), run.refinement.image(), atol=1e-5)
    assert ["patches" in losses for losses in names] == [True, True, False, False, False]
    assert ["matched_l1" in losses for losses in names] == [False, False, True, True, True]


def test_the_token_distance_is_none_to_the_picture_itself(demo_pair, backbone):
    a, b = (resize(picture, (112, 112)) for picture in demo_pair)
    term = TokenDistance()
    assert term.loss(backbone, b, b).item() == pytest.approx(0, abs=1e-5)
    assert term.loss(backbone, b.flip(-1), b).item() < 0.6 * term.loss(backbone, a, b).item()
    output = a.clone().requires_grad_()
    term.loss(backbone, output, b).backward()
    assert output.grad.abs().max() > 0


def test_structure_comes_nearer_and_so_do_patches(demo_pair, backbone):
    settings = RefinementSettings(match_passes=1, steps=10, size=224, density=1)
    run = Refinement(*(resize(picture, (224, 224)) for picture in demo_pair), backbone, settings)
    before = measure(run.picture, run.appearance, run.image(), backbone).structure_distance
    _, losses = finish(run)
    assert measure(run.picture, run.appearance, run.image(), backbone).structure_distance < 0.8 * before
    assert losses[-1]["tokens"] < losses[0]["tokens"]
    assert losses[-1]["patches"] < losses[0]["patches"]


def test_edges_of_the_structure_stay_when_all_around_them_is_drawn_to_one_thing(backbone):
    """Two halves of a disc with a seam between them, drawn to a disc that has none."""
    rows, columns = torch.meshgrid(torch.arange(112) - 56, torch.arange(112) - 56, indexing="ij")
    noise = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 0.03
    disc = torch.where(rows**2 + columns**2 < 42**2, 0.7, 0.3)
    seam = ((rows + columns / 2).abs() < 1.5) & (disc > 0.5)
    a, b = (torch.where(seam, 0.5, disc) + noise[0])[None], (disc + noise[1])[None]
    run = Refinement(a, b, backbone, RefinementSettings(match_passes=1, steps=12, size=112, density=1))
    finish(run)
    near = ((rows + columns / 2).abs() < 4) & (rows**2 + columns**2 < 35**2)
    values = torch.stack([picture.mean(dim=(0, 1))[near] for picture in (run.image(), a)])
    assert torch.corrcoef(values)[0, 1] > 0.9
