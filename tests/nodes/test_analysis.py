"""The nodes that show what a ViT computes, in a real ComfyUI."""

import numpy as np
import pytest
import torch
from PIL import Image

from splice_engine import load_picture

RECIPE = {"preset": "fast", "steps": 3, "size": 72, "seed": 0}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def link(name, output=0):
    return [name, output]


def save_mask(mask, name="mask"):
    """Nodes that save a MASK as a picture, under the id "mask"."""
    return {
        "grey": node("MaskToImage", mask=mask),
        name: node("SaveImage", images=link("grey"), filename_prefix=name),
    }


@pytest.fixture
def run_node(host, graph):
    """Runs one of the nodes on the demo pair at a small size."""
    defaults = {
        "SplicePCA": {"layer": -1, "facet": "self-similarity", "foreground": False, "smooth": True, "size": 112},
        "SpliceSimilarityMap": {"x": 0.5, "y": 0.3},
        "SpliceAttentionMap": {"layer": -1, "head": -1, "mass": 0.6, "size": 112},
        "SpliceInvertFeatures": {"facet": "key", "layer": -1, **RECIPE},
        "SpliceAblation": {"structure": link("a"), "appearance": link("b"), **RECIPE, "preset": "paper"},
    }

    def run(kind, nodes=None, save=0, on_progress=None, **inputs):
        picture = {} if kind == "SpliceAblation" else {"image": link("a")}
        given = {**picture, "backbone": link("vit"), **defaults[kind], **inputs}
        return host.run(graph(kind, nodes, save, **given), on_progress)

    return run


@pytest.fixture
def original(host):
    return load_picture(host.base / "input" / "structure.png")[0].permute(1, 2, 0).mul(255).round().numpy()


def test_pca_gives_a_batch_one_set_of_colours_and_a_foreground(host, run_node, original):
    nodes = {
        "both": node("BatchImagesNode", **{"images.image0": link("a"), "images.image1": link("b")}),
        **save_mask(link("it", 1)),
    }
    outcome = run_node("SplicePCA", nodes, image=link("both"), foreground=True, density=2)
    assert outcome.status == "success", outcome.message
    pictures, masks = host.pictures(outcome, "save"), host.pictures(outcome, "mask")
    assert [picture.shape for picture in pictures] == [original.shape] * 2
    for picture, mask in zip(pictures, masks, strict=True):
        assert 0.05 < (mask > 127).mean() < 0.95
        assert picture[mask == 0].mean() < 0.2 * picture[mask == 255].mean()  # the background is black


@pytest.mark.parametrize("facet", ["token", "key"])
def test_pca_of_a_facet_in_blocks(facet, host, run_node, original):
    outcome = run_node("SplicePCA", save_mask(link("it", 1)), facet=facet, smooth=False, layer=5)
    assert outcome.status == "success", outcome.message
    (picture,), (mask,) = host.pictures(outcome, "save"), host.pictures(outcome, "mask")
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) <= 8 * 10  # patches of 112 pixels' short side
    assert mask.min() == 255


def test_similarity_finds_the_place_itself(host, run_node, original):
    nodes = {
        "x": node("PreviewAny", source=link("it", 2)),
        "y": node("PreviewAny", source=link("it", 3)),
        **save_mask(link("it", 0)),
    }
    outcome = run_node("SpliceSimilarityMap", nodes, save=1)
    assert outcome.status == "success", outcome.message
    found = [float(outcome.outputs[name]["text"][0]) for name in "xy"]
    assert np.abs(np.subtract(found, (0.5, 0.3))).max() <= 1.5 / 24
    (mask,) = host.pictures(outcome, "mask")
    assert mask[int(0.3 * mask.shape[0]), int(0.5 * mask.shape[1]), 0] > 200
    assert mask.mean() < 128
    assert host.pictures(outcome, "save")[0].shape == original.shape


def test_a_similarity_mask_of_another_picture_drives_a_compositing_node(host, run_node, tensor, original):
    place = torch.zeros(1, 50, 60)
    place[:, 10:20, 25:35] = 1
    nodes = {
        "place": tensor(place, "TestMask"),
        "black": node("EmptyImage", width=original.shape[1], height=original.shape[0], batch_size=1, color=0),
        "cut": node(
            "ImageCompositeMasked",
            destination=link("black"),
            source=link("b"),
            mask=link("it", 0),
            x=0,
            y=0,
            resize_source=False,
        ),
        "save": node("SaveImage", images=link("cut"), filename_prefix="cut"),
    }
    outcome = run_node("SpliceSimilarityMap", nodes, mask=link("place"), target=link("b"), density=1)
    assert outcome.status == "success", outcome.message
    (picture,) = host.pictures(outcome, "save")
    assert picture.max() > 50
    assert (picture.max(axis=2) < 10).mean() > 0.1


def test_an_empty_mask_leaves_the_point(run_node, host, tensor):
    place = {"place": tensor(torch.zeros(1, 64, 64), "TestMask")}
    with_it = run_node("SpliceSimilarityMap", place, save=1, mask=link("place"))
    assert with_it.status == "success", with_it.message
    without = run_node("SpliceSimilarityMap", save=1)
    assert np.array_equal(host.pictures(with_it, "save")[0], host.pictures(without, "save")[0])


def test_an_empty_mask_among_others_finds_nothing_in_its_picture(run_node, host, tensor, original):
    places = torch.zeros(3, 50, 60)
    places[1, 10:20, 25:35] = 1
    nodes = {
        "places": tensor(places, "TestMask"),
        "many": node("RepeatImageBatch", image=link("a"), amount=3),
        "x": node("PreviewAny", source=link("it", 2)),
        **save_mask(link("it", 0)),
    }
    outcome = run_node("SpliceSimilarityMap", nodes, save=1, image=link("many"), mask=link("places"))
    assert outcome.status == "success", outcome.message
    changed = [np.abs(picture.astype(int) - original).max() > 2 for picture in host.pictures(outcome, "save")]
    assert changed == [False, True, False]
    assert [mask.max() > 200 for mask in host.pictures(outcome, "mask")] == changed
    assert abs(float(outcome.outputs["x"]["text"][0]) - 0.5) < 0.1


def test_masks_that_select_next_to_nothing_are_refused(run_node, tensor):
    faint = {"places": tensor(torch.full((2, 50, 60), 1 / 255), "TestMask")}
    outcome = run_node("SpliceSimilarityMap", faint, save=1, mask=link("places"))
    assert outcome.status == "error"
    assert "the mask selects nothing" in outcome.message


def test_attention_keeps_more_with_more_mass_and_differs_by_head(host, run_node):
    areas, heats = [], []
    for mass, head in ((0.3, -1), (0.9, -1), (0.9, 2)):
        outcome = run_node("SpliceAttentionMap", save_mask(link("it", 0)), save=1, mass=mass, head=head)
        assert outcome.status == "success", outcome.message
        (mask,) = host.pictures(outcome, "mask")
        assert set(np.unique(mask)) == {0, 255}
        areas.append((mask > 0).mean())
        heats.append(host.pictures(outcome, "save")[0])
    assert areas[0] < areas[1] < 1
    assert np.array_equal(heats[0], heats[1])
    assert not np.array_equal(heats[1], heats[2])


def test_a_head_that_is_not_there_gets_one_sentence(run_node):
    outcome = run_node("SpliceAttentionMap", save=1, head=40)
    assert outcome.status == "error"
    assert outcome.message == "Splice: there are 6 heads: head must be from 0 to 5, not 40"


def test_inversion_of_a_batch_has_one_progress_and_each_its_picture(host, run_node, original):
    nodes = {
        "both": node("BatchImagesNode", **{"images.image0": link("a"), "images.image1": link("b")}),
        "curve": node("SaveImage", images=link("it", 1), filename_prefix="curve"),
    }
    outcome = run_node("SpliceInvertFeatures", nodes, image=link("both"))
    assert outcome.status == "success", outcome.message
    assert [picture.shape for picture in host.pictures(outcome, "save")] == [original.shape] * 2
    assert len(host.pictures(outcome, "curve")) == 2
    assert outcome.progress == sorted(outcome.progress)
    assert outcome.progress[-1] == 2 * RECIPE["steps"]


def test_inversion_has_previews_and_can_be_ended(host, run_node):
    early = run_node(
        "SpliceInvertFeatures",
        steps=5000,
        seed=1,
        facet="cls",
        on_progress=lambda _: host.finish("it"),
    )
    assert early.status == "success", early.message
    values = []

    def interrupt(value):
        values.append(value)
        if len(values) == 12:
            host.post("/interrupt")

    outcome = run_node("SpliceInvertFeatures", steps=5000, seed=2, on_progress=interrupt)
    assert outcome.status == "interrupted"
    assert isinstance(outcome.previews[0], Image.Image)
    assert len(outcome.progress) <= 14


def test_ablation_runs_through_all_losses(host, run_node):
    outcome = run_node("SpliceAblation")
    assert outcome.status == "success", outcome.message
    assert outcome.progress == sorted(outcome.progress)
    assert outcome.progress[-1] == 4 * RECIPE["steps"]  # all losses, and without each of three
    (sheet,) = host.pictures(outcome, "save")
    warm = run_node("SpliceAblation", warm_steps=1)
    assert warm.status == "success", warm.message
    assert warm.progress[-1] == 4 * (1 + RECIPE["steps"])
    early = run_node("SpliceAblation", steps=5000, seed=1, on_progress=lambda _: host.finish("it"))
    assert early.status == "success", early.message
    (one_row,) = host.pictures(early, "save")
    assert 2 * one_row.shape[0] == sheet.shape[0]


def test_a_batch_is_not_ablated(run_node, tensor):
    two = {"two": tensor(torch.rand(2, 64, 64, 3))}
    outcome = run_node("SpliceAblation", two, structure=link("two"))
    assert outcome.status == "error"
    assert outcome.message == "Splice: one pair is ablated at a time: pick one picture of the batch"


@pytest.mark.parametrize(("kind", "save"), [("SplicePCA", 0), ("SpliceSimilarityMap", 1), ("SpliceAttentionMap", 1)])
def test_a_batch_shows_progress_and_can_be_cancelled_between_its_pictures(kind, save, host, run_node):
    nodes = {"many": node("RepeatImageBatch", image=link("a"), amount=60)}
    large = {} if kind == "SpliceSimilarityMap" else {"size": 448}
    outcome = run_node(kind, nodes, save, image=link("many"), on_progress=lambda _: host.post("/interrupt"), **large)
    assert outcome.status == "interrupted", outcome.message
    assert 1 <= len(outcome.progress) < 60
