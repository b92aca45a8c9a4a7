"""Several appearances as one: the instant mixture, the training on it, and the frames between two."""

from dataclasses import replace
from functools import partial

import pytest
import skimage.data
import torch

from splice_engine import (
    OFFLINE_BACKBONE,
    Appearance,
    Identity,
    InstantMixture,
    InstantTransfer,
    MixtureTransfer,
    Objective,
    SpliceError,
    Transfer,
    load_picture,
    open_clip,
    preset,
    save_picture,
)
from splice_engine.batch.best_of import BestOf
from splice_engine.clip_writer import check_clip_writable, write_clip
from splice_engine.clips import RATE, Frame, NewClip
from splice_engine.images import resize, sides
from splice_engine.matching.filters import box_mean
from splice_engine.training.checkpoint import Checkpoint
from splice_engine.training.result import render_result

pytestmark = pytest.mark.usefixtures("coarse_matching")

VIT = ("--backbone", OFFLINE_BACKBONE, "--device", "cpu", "--dtype", "fp32", "--density", 1)
TINY = preset("draft", steps=4, warm_steps=3, size=64, vit_size=56, density=1, cached_crops=2)
SIZE = (80, 96)


@pytest.fixture(scope="module")
def pictures(demo_pair):
    """A structure picture and two appearances of other shapes."""
    cat = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None] / 255
    return resize(demo_pair[0], SIZE), [resize(demo_pair[1], (110, 90)), resize(cat, (72, 100))]


@pytest.fixture(scope="module")
def mixture(pictures, backbone):
    return InstantMixture.between(*pictures, backbone, [3, 1], short_patches=10)


def box(size, top, bottom, left, right):
    mask = torch.zeros(1, 1, *size)
    mask[..., top:bottom, left:right] = 1
    return mask


def test_one_appearance_is_its_instant_transfer(pictures, backbone):
    structure, (appearance, _) = pictures
    alone = InstantTransfer.between(structure, appearance, backbone, short_patches=10)
    mixed = InstantMixture.between(structure, [appearance], backbone, [0.2], short_patches=10)
    for size in (None, 200):
        assert torch.equal(mixed.image(size), alone.image(size))


def test_a_weight_of_0_leaves_an_appearance_out(mixture):
    for shares, index in (((1.0, 0.0), 0), ((0.0, 1.0), 1)):
        assert torch.equal(replace(mixture, shares=shares).image(), mixture.parts[index].image())


def test_only_the_ratio_of_the_weights_counts_and_none_are_equal_ones(pictures, backbone, mixture):
    assert mixture.shares == (0.75, 0.25)
    assert InstantMixture.between(*pictures, backbone, short_patches=6).shares == (0.5, 0.5)


def coarse(picture):
    return resize(picture, (picture.shape[-2] // 16, picture.shape[-1] // 16))


def test_colours_are_the_weighted_mean(mixture):
    first, second = (coarse(part.image()) for part in mixture.parts)
    expected = 0.75 * first + 0.25 * second
    assert (first - second).abs().mean() > 0.1
    assert (coarse(mixture.image()) - expected).abs().mean() < 0.02


def test_texture_is_as_strong_as_that_of_the_appearances(tiny):
    """Of two noises that have nothing to do with each other, a mean has 0.7 of the contrast."""
    rng = torch.Generator().manual_seed(3)
    structure = torch.full((1, 3, 96, 96), 0.5)
    noises = [resize(0.5 + 0.12 * torch.randn(1, 3, 48, 48, generator=rng), (96, 96)).clamp(0, 1) for _ in range(2)]
    mixture = InstantMixture.between(structure, noises, tiny(), short_patches=6)

    def contrast(picture):
        return (picture - box_mean(picture, 5)).std()

    alone = sum(contrast(part.image()) for part in mixture.parts) / 2
    assert 0.9 * alone < contrast(mixture.image()) < 1.1 * alone


def test_masks_belong_to_their_pictures(pictures, tiny):
    structure, appearances = pictures
    here, there = box(SIZE, 20, 60, 30, 70), box((72, 100), 10, 50, 0, 60)
    given = {"structure_mask": here, "short_patches": 6}
    mixture = InstantMixture.between(*pictures, tiny(), appearance_masks=[None, there], **given)
    alone = [
        InstantTransfer.between(structure, appearance, tiny(), appearance_mask=mask, **given)
        for appearance, mask in zip(appearances, [None, there], strict=True)
    ]
    assert all(torch.equal(*(part.image() for part in pair)) for pair in zip(mixture.parts, alone, strict=True))
    far = resize(here, SIZE)[0, 0] == 0
    far[10:70, 20:80] = False  # the feather
    assert torch.equal(mixture.image()[0, :, far], structure[0, :, far])
    assert (mixture.image() - structure).abs().max() > 0.1


def test_frames_lead_from_one_appearance_to_the_other(mixture):
    first, *between, last = mixture.frames(5)
    assert torch.equal(first, mixture.parts[0].image())
    assert torch.equal(last, mixture.parts[1].image())
    assert torch.equal(between[1], replace(mixture, shares=(0.5, 0.5)).image())
    steps = [
        (here - there).abs().mean().item() for here, there in zip([first, *between], [*between, last], strict=True)
    ]
    assert max(steps) < 2.5 * min(steps)  # none of them stands still or jumps
    assert [sides(frame) for frame in mixture.frames(2, size=40)] == [(40, 48)] * 2


BAD = {
    "too few weights": ({"weights": [1]}, "give as many weights as appearance pictures: 2, not 1"),
    "too many weights": ({"weights": [1, 1, 1]}, "give as many weights as appearance pictures: 2, not 3"),
    "a weight below 0": ({"weights": [1, -0.5]}, "weights must be at least 0, and one of them above 0"),
    "no weight": ({"weights": [0, 0]}, "weights must be at least 0, and one of them above 0"),
    "no number": ({"weights": [1, float("nan")]}, "weights must be at least 0, and one of them above 0"),
    "no end": ({"weights": [1, float("inf")]}, "weights must be at least 0, and one of them above 0"),
    "masks": ({"appearance_masks": [None]}, "give as many appearance masks as appearance pictures: 2, not 1"),
}


@pytest.mark.parametrize("kind", [InstantMixture.between, MixtureTransfer])
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_mixtures(case, kind, pictures, tiny):
    given, sentence = case
    with pytest.raises(SpliceError, match=sentence):
        kind(*pictures, tiny(), **given)


def test_bad_frames(mixture):
    with pytest.raises(SpliceError, match="frames must be at least 2, not 1"):
        next(mixture.frames(1))
    with pytest.raises(SpliceError, match="give two, not 1"):
        next(replace(mixture, parts=mixture.parts[:1], shares=(1.0,)).frames(2))


def test_a_training_with_all_of_the_weight_is_that_on_the_pair(pictures, tiny):
    structure, appearances = pictures
    backbone = tiny()
    plain, mixed = (
        Transfer(structure, appearances[1], backbone, TINY),
        MixtureTransfer(structure, appearances, backbone, [0, 1], replace(TINY, refine_steps=5)),
    )
    totals = [[step.total.item() for step in run] for run in (plain, mixed)]
    assert totals[0] == totals[1]
    assert torch.equal(plain.image(), mixed.image())


class Recorder(Objective):
    """Keeps what the terms compare with."""

    given = ()

    def losses(self, pictures, names=None, targets=None):
        self.given = (*self.given, pictures)
        return super().losses(pictures, names, targets)


@pytest.mark.parametrize("cached", [0, 2])
def test_the_terms_compare_with_each_appearance_as_often_as_its_weight_says(cached, tiny):
    """Also where only every third step has the term of the generator's B."""
    structure, bright, dark = (level + 0.2 * torch.rand(1, 3, 70, 80) for level in (0.4, 0.8, 0.0))
    objective = Recorder([Appearance(), Identity()], tiny(), size=56)
    settings = replace(TINY, steps=30, warm_steps=0, residual=0.0, cached_crops=cached, identity_every=3)
    list(MixtureTransfer(structure, [bright, dark], objective.backbone, [2, 1], settings, objective))
    turns = [int(pictures.appearance.mean() < 0.4) for pictures in objective.given]
    assert 9 <= sum(turns) <= 11
    assert 2 <= sum(turns[::3]) <= 5
    assert turns[::3] == [
        int(pictures.reconstruction is not None and pictures.appearance.mean() < 0.4)
        for pictures in objective.given[::3]
    ]


def test_training_is_drawn_to_the_mixture_and_ends_at_its_picture(pictures, tiny):
    masks = [None, box((72, 100), 10, 50, 0, 60)]
    run = MixtureTransfer(*pictures, tiny(), [1, 3], TINY, appearance_masks=masks)
    mixture = InstantMixture.between(*pictures, tiny(), [1, 3], run.settings, appearance_masks=masks)
    assert torch.equal(run.refinement.painted(), mixture.painted())
    assert len(list(run)) == TINY.all_steps
    expected = run.image()
    assert torch.equal(render_result(run), expected)


def test_a_run_that_goes_on_gives_the_same_bits_and_belongs_to_its_mixture(pictures, tiny, tmp_path):
    structure, appearances = pictures

    def begin(appearances=appearances, weights=(2, 1), **options):
        return MixtureTransfer(structure, appearances, tiny(), weights, TINY, **options)

    whole = begin()
    totals = [step.total.item() for step in whole]
    for stop in (2, TINY.all_steps - 1):
        broken, path = begin(), tmp_path / f"{stop}.checkpoint"
        checkpoint = Checkpoint(broken, path)
        for _ in range(stop):
            next(iter(broken))
        checkpoint.save()
        run = begin()
        Checkpoint(run, path).restore()
        assert [step.total.item() for step in run] == totals[stop:]
        assert torch.equal(run.image(), whole.image())
    for other, words in (
        (begin(weights=(1, 2)), "other weights"),
        (begin([appearances[0], structure]), "other appearance picture"),
        (begin(appearance_masks=[None, torch.ones(1, 1, 9, 9)]), "other appearance mask"),
        (Transfer(structure, appearances[0], tiny(), TINY), "other appearance picture"),
    ):
        with pytest.raises(SpliceError, match=words):
            Checkpoint(other, path).restore()


def test_the_best_of_several_seeds_is_measured_by_all_appearances(pictures, tiny):
    structure, appearances = pictures
    backbone = tiny()
    scores = []
    for given, weights in ((appearances, [3, 1]), (appearances[:1], [1]), (appearances[1:], [1])):
        begin = partial(_begin_measured, structure, given, backbone, weights)
        selection = BestOf(begin, replace(TINY, steps=9, warm_steps=6), 2)
        list(selection)
        scores.append({score.seed: score for score in selection.scores})
    mixed, *alone = ({seed: score.appearance_distance for seed, score in of.items()} for of in scores)
    for seed, distance in mixed.items():
        assert distance == pytest.approx(0.75 * alone[0][seed] + 0.25 * alone[1][seed], rel=1e-5)


def _begin_measured(structure, appearances, backbone, weights, settings):
    """A run of noise alone: its pictures differ by the seed, whatever the appearances."""
    settings = replace(settings, warm_steps=0, residual=0.0, learning_rate=0.0)
    return MixtureTransfer(structure, appearances, backbone, weights, settings)


@pytest.fixture
def files(tmp_path, pictures):
    structure, appearances = pictures
    paths = [tmp_path / f"{name}.png" for name in ("a", "b1", "b2")]
    for path, picture in zip(paths, (structure, *appearances), strict=True):
        save_picture(picture, path)
    return paths


def test_the_command_line_mixes(files, splice, backbone, tmp_path):
    result = tmp_path / "out.png"
    told = splice("instant", *files, "--weights", "0.75,0.25", "-o", result, *VIT)
    assert (told.status, told.err) == (0, "")
    loaded = [load_picture(path) for path in files]
    settings = preset("draft", density=1)
    expected = InstantMixture.between(loaded[0], loaded[1:], backbone, [3, 1], settings).image()
    assert (load_picture(result) - expected).abs().max() < 0.003  # 8 bits
    recipe = ("--preset", "draft", "--steps", 1, "--warm-steps", 1, "--size", 64, "--vit-size", 56, "--quiet")
    strip = tmp_path / "strip.png"
    told = splice("transfer", *files, "-o", result, "--overwrite", "--strip", strip, *VIT, *recipe)
    assert (told.status, told.err) == (0, "")
    assert sides(load_picture(result)) == SIZE
    width = sides(load_picture(strip))[1]
    assert width > 320 * (2 * SIZE[1] / SIZE[0] + 90 / 110 + 100 / 72)


def test_the_command_line_interpolates(files, splice, backbone, tmp_path):
    folder = tmp_path / "frames"
    told = splice("interpolate", *files, "-o", folder, "--frames", 3, "--quiet", *VIT)
    assert (told.status, told.err) == (0, "")
    first, between, last = (frame.picture for frame in open_clip(folder))
    structure, appearance, _ = (load_picture(path) for path in files)
    alone = InstantTransfer.between(structure, appearance, backbone, preset("draft", density=1)).image()
    assert (first - alone).abs().max() < 0.003  # 8 bits
    assert min((between - end).abs().mean() for end in (first, last)) > 0.02


def test_frames_of_no_other_clip_make_a_video(tmp_path):
    av = pytest.importorskip("av")
    video, clip = tmp_path / "out.mp4", NewClip(SIZE)
    levels = [torch.full((1, 3, *SIZE), level) for level in (0.2, 0.5, 0.8)]
    check_clip_writable(video, clip)
    with write_clip(video, clip) as write:
        for index, picture in enumerate(levels):
            write(picture, Frame(picture, index / RATE, ""))
    shown = list(open_clip(video))
    assert [float(frame.time * RATE) for frame in shown] == [0, 1, 2]
    assert all((frame.picture - level).abs().mean() < 0.02 for frame, level in zip(shown, levels, strict=True))
    with av.open(str(video)) as container:
        assert len(container.streams.audio) == 0


MISTAKES = {
    "weights of another number": (("instant", "a b1 b2 --weights 1"), "as many weights as appearance pictures: 2, not"),
    "weights of one picture": (("transfer", "a b1 --weights 1,2"), "as many weights as appearance pictures: 1, not 2"),
    "no numbers": (("transfer", "a b1 b2 --weights half,half"), "such as 0.7,0.3, not 'half,half'"),
    "a weight below 0": (("instant", "a b1 b2 --weights=-1,2"), "weights must be at least 0"),
    "no weight": (("instant", "a b1 b2 --weights 0,0"), "weights must be at least 0"),
    "masks": (("instant", "a b1 b2 --appearance-mask b1"), "as many appearance masks as appearance pictures: 2, not 1"),
    "frames": (("interpolate", "a b1 b2 --frames 1"), "frames must be from 2 to 4096, not 1"),
    "one appearance": (("interpolate", "a b1"), "the following arguments are required: last"),
    "a missing picture": (("instant", "a b1 nothing"), "nothing.png"),
    "a kind of file": (("interpolate", "a b1 b2 -o out.gif"), "end the name in one of .mp4"),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES)
def test_bad_command_lines(case, files, splice, tmp_path, monkeypatch):
    (command, words), sentence = case
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    words = [f"{word}.png" if word.isalnum() and not word.isdigit() else word for word in words.split()]
    words = words if "-o" in words else [*words, "-o", "out.png" if command != "interpolate" else "out"]
    told = splice(command, *words, *VIT)
    assert told.status == 2
    (line,) = told.complaint
    assert sentence in line
    assert sorted(tmp_path.iterdir()) == before
