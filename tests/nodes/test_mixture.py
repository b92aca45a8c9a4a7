"""Several appearances as one, in a real ComfyUI."""

import numpy as np
import pytest
import torch
from PIL import Image

from splice_engine import OFFLINE_BACKBONE, save_picture
from splice_engine.images import resize

INSTANT, TRANSFER, INTERPOLATE = "SpliceInstantTransfer", "SpliceAppearanceTransfer", "SpliceInterpolate"


def link(name, slot=0):
    return [name, slot]


@pytest.fixture
def several(pair):
    """A batch of two appearances, IMAGE."""
    first = resize(pair[1], (90, 80))
    return torch.cat([first, 1 - first.flip(-1)]).movedim(1, -1).mul(255).round() / 255


def test_weights_make_one_appearance_of_a_batch_and_none_leave_it_a_batch(
    host, graph, tensor, several, splice, tmp_path
):
    """The mixture is that of the command line."""
    nodes = {"many": tensor(several)}
    given = {"appearance": link("many"), "density": 1}
    mixed = host.run(graph(INSTANT, nodes, weights="3, 1", **given))
    assert mixed.status == "success", mixed.message
    (picture,) = host.pictures(mixed, "save")
    files = [host.base / "input" / "structure.png", tmp_path / "b1.png", tmp_path / "b2.png"]
    for path, appearance in zip(files[1:], several, strict=True):
        save_picture(appearance.movedim(-1, 0), path)
    told = splice(
        *("instant", *files, "--weights", "0.75,0.25", "--density", 1, "-o", tmp_path / "out.png"),
        *("--backbone", OFFLINE_BACKBONE, "--device", "cpu"),
    )
    assert told.status == 0, told.err
    expected = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert np.abs(picture.astype(int) - expected).max() <= 1  # ComfyUI rounds down when it saves
    apart = host.run(graph(INSTANT, nodes, weights="  ", **given))
    assert len(host.pictures(apart, "save")) == 2


def test_a_training_on_a_mixture_gives_one_picture_for_each_structure_picture(host, graph, tensor, several, pair):
    structures = resize(pair[0], (80, 96)).movedim(1, -1).repeat(2, 1, 1, 1)
    masks = torch.stack([torch.ones(9, 9), torch.zeros(9, 9)])
    nodes = {"many": tensor(several), "two": tensor(structures), "masks": tensor(masks, "TestMask")}
    given = {"structure": link("two"), "appearance": link("many"), "structure_mask": link("masks")}
    recipe = {"preset": "standard", "steps": 1, "size": 64, "weights": "0.5,0.5"}
    outcome = host.run(graph(TRANSFER, nodes, **given, **recipe))
    assert outcome.status == "success", outcome.message
    changed, kept = (picture.astype(int) for picture in host.pictures(outcome, "save"))
    original = (structures[0] * 255).round().numpy()
    assert np.abs(changed - original).max() > 20
    assert np.abs(kept - original).max() <= 1


def test_frames_lead_from_one_appearance_to_the_other(host, graph, several, tensor):
    nodes = {"first": tensor(several[:1]), "last": tensor(several[1:])}
    given = {"structure": link("a"), "first": link("first"), "last": link("last"), "backbone": link("vit")}
    numbers = {"frames": 3, "texture": 0.7, "feather": 8.0, "density": 1}
    outcome = host.run(graph(INTERPOLATE, nodes, **given, **numbers))
    assert outcome.status == "success", outcome.message
    frames = host.pictures(outcome, "save")
    assert [frame.shape for frame in frames] == [(96, 122, 3)] * 3  # a video has even sides
    for index, name in ((0, "first"), (2, "last")):
        alone = host.run(graph(INSTANT, nodes, appearance=link(name), density=1))
        assert np.array_equal(host.pictures(alone, "save")[0][:96, :122], frames[index])


BAD = {
    "too few weights": (INSTANT, {"weights": "1"}, "give as many weights as appearance pictures: 2, not 1"),
    "a weight below 0": (TRANSFER, {"weights": "1, -1"}, "weights must be at least 0, and one of them above 0"),
    "no numbers": (TRANSFER, {"weights": "half"}, "weights must be numbers with commas between them"),
    "masks": (INSTANT, {"weights": "1 1", "appearance_mask": link("three")}, "not 3"),
    "an empty mask": (INSTANT, {"weights": "1 1", "appearance_mask": link("one")}, "selects nothing"),
    "a batch": (INTERPOLATE, {"first": link("many")}, "first has 2 pictures, but takes one: Image From Batch"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_mixtures_get_one_sentence(case, host, graph, tensor, several):
    kind, given, sentence = case
    half_empty = torch.stack([torch.ones(9, 9), torch.zeros(9, 9)])
    nodes = {"many": tensor(several), "three": tensor(torch.ones(3, 9, 9), "TestMask")}
    nodes["one"] = tensor(half_empty, "TestMask")
    usual = {"appearance": link("many")}
    if kind == INTERPOLATE:
        usual = {"structure": link("a"), "last": link("b"), "backbone": link("vit"), "frames": 2, "texture": 0.7}
        usual["feather"] = 8.0
    outcome = host.run(graph(kind, nodes, **{**usual, **given}))
    assert outcome.status == "error"
    assert sentence in outcome.message
    assert len(outcome.message.splitlines()) == 1
