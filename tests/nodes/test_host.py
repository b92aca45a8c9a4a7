"""The nodes in a real ComfyUI, as its frontend uses them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from splice_engine import OFFLINE_BACKBONE, load_picture

ROOT = Path(__file__).resolve().parents[2]
TRANSFER, OPTIMIZER = "SpliceAppearanceTransfer", "SpliceOptimizer"
INSTANT, REFINED = "SpliceInstantTransfer", "SpliceRefinedTransfer"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def link(name, output=0):
    return [name, output]


def test_loading_the_pack_is_light(host):
    """Both copies of it, which stand side by side."""
    seconds = re.findall(r"([\d.]+) seconds: .*splice", host.log(), re.I)
    assert len(seconds) == 2
    assert max(map(float, seconds)) < 1
    assert [line for line in host.log().splitlines() if "IMPORT FAILED" in line and "splice" in line.lower()] == []


def test_the_pictures_of_the_workflows_can_be_chosen(host):
    names, _options = host.get("/object_info/LoadImage")["LoadImage"]["input"]["required"]["image"]
    workflows = [path.read_text(encoding="utf-8") for path in (ROOT / "workflows").glob("*.json")]
    used = {name for text in workflows for name in re.findall(r'"(splice_\w+\.(?:jpg|webp))"', text)}
    assert used
    assert used <= set(names)


def test_every_node_and_input_says_what_it_is(host):
    nodes = {name: info for name, info in host.get("/object_info").items() if name.startswith("Splice")}
    assert len(nodes) >= 14
    for info in nodes.values():
        assert info["description"]
        assert info["category"].partition("/")[0] == "Splice"
        assert all(info["output_tooltips"])
        for group in ("required", "optional"):
            assert all(options.get("tooltip") for _, options in info["input"].get(group, {}).values())


def test_other_words_find_a_node_where_comfyui_searches_for_them(host):
    nodes = host.get("/object_info")
    found = nodes["SpliceAppearanceTransfer"].get("search_aliases") or []
    assert ("style transfer" in found) == ("search_aliases" in nodes["KSampler"])


def test_the_picture_is_that_of_the_command_line(host, graph, splice, tmp_path):
    saving = {"keep": node("SpliceSaveGenerator", generator=link("it", 1), filename_prefix="pair")}
    precise = node("SpliceLoadBackbone", backbone_name=OFFLINE_BACKBONE, precision="fp32")
    outcome = host.run(graph(OPTIMIZER, {**saving, "vit": precise}, seed=7, steps=3))
    assert outcome.status == "success", outcome.message
    kept = load_file(host.base / "models" / "splice_generators" / "pair_00001_.safetensors")
    pictures = [host.base / "input" / name for name in ("structure.png", "appearance.png")]
    recipe = "--preset paper --steps 3 --size 64 --vit-size 56 --seed 7 --dtype fp32 --quiet --overwrite --backbone"
    files = ["-o", tmp_path / "out.png", "--save-generator", tmp_path / "pair.safetensors"]
    told = splice("transfer", *pictures, *recipe.split(), OFFLINE_BACKBONE, *files)
    assert told.status == 0, told.err
    expected = load_file(tmp_path / "pair.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    (picture,) = host.pictures(outcome, "save")
    result = load_picture(tmp_path / "out.png")[0].permute(1, 2, 0).mul(255).round().numpy()
    assert np.abs(picture - result).max() <= 1  # ComfyUI rounds down when it saves


def test_the_same_inputs_are_served_from_the_cache_and_another_seed_trains(host, graph):
    first = host.run(graph(TRANSFER, seed=20))
    assert "it" in first.ran
    again = host.run(graph(TRANSFER, seed=20))
    assert (again.status, "it" in again.ran) == ("success", False)
    other = host.run(graph(TRANSFER, seed=21))
    assert "it" in other.ran
    assert not np.array_equal(host.pictures(first, "save")[0], host.pictures(other, "save")[0])


def test_the_best_of_several_seeds_is_the_picture_of_its_seed(host, graph):
    """The scores are shown on the node; Finish now keeps the best so far."""
    best = host.run(graph(TRANSFER, seed=30, steps=6, best_of=2))
    assert best.status == "success", best.message
    assert "Training 2 seeds" in best.texts
    first, *scores = best.texts[-1].splitlines()
    seed = int(re.fullmatch(r"6 steps of seed (\d+)", first)[1])
    assert re.match(rf"seed {seed} after \d+ steps: structure .+, goes on", scores[0])
    assert scores[1].endswith("is left")
    alone = host.run(graph(TRANSFER, seed=seed, steps=6))
    assert np.array_equal(host.pictures(best, "save")[0], host.pictures(alone, "save")[0])
    cut = host.run(graph(TRANSFER, seed=31, steps=5000, best_of=2), lambda _: host.finish("it"))
    assert cut.status == "success"
    assert host.pictures(cut, "save")[0].shape == (97, 123, 3)


def test_previews_arrive_and_an_interruption_ends_the_run(host, graph):
    values = []

    def interrupt(value):
        if len(values) == 12:
            host.post("/interrupt")
        values.append(value)

    outcome = host.run(graph(OPTIMIZER, steps=5000), interrupt)
    assert outcome.status == "interrupted"
    assert outcome.previews[0].size == (123, 97)
    assert len(outcome.progress) <= 14  # at most one more than the one during which it was asked for
    assert host.run(graph(OPTIMIZER, seed=1)).status == "success"


def test_instant_transfers_of_a_batch_show_progress_and_can_be_cancelled_between_its_pictures(host, graph):
    nodes = {"many": node("RepeatImageBatch", image=link("a"), amount=60)}
    outcome = host.run(graph(INSTANT, nodes, structure=link("many"), density=1), lambda _: host.post("/interrupt"))
    assert outcome.status == "interrupted", outcome.message
    assert 1 <= len(outcome.progress) < 60


def test_cancel_is_heard_while_pictures_are_matched(host, graph):
    """At the finest density one picture takes seconds, in which nothing else of the node would hear it."""
    outcome = host.run(graph(INSTANT, density=4), lambda _: host.post("/interrupt"))
    assert outcome.status == "interrupted", outcome.message
    assert outcome.progress == [0]


def test_finishing_early_keeps_the_picture(host, graph):
    show = {"log": node("PreviewAny", source=link("it", 3))}
    outcome = host.run(graph(OPTIMIZER, show, steps=5000, seed=2), lambda _: host.finish("it"))
    assert outcome.status == "success"
    assert 1 <= len(outcome.outputs["log"]["text"][0].splitlines()) < 5000
    assert host.pictures(outcome, "save")[0].shape == (97, 123, 3)
    full = host.run(graph(OPTIMIZER, show, seed=3))
    assert len(full.outputs["log"]["text"][0].splitlines()) == 2


def test_the_button_ends_its_own_node_and_no_other(host, graph):
    show = {"log": node("PreviewAny", source=link("it", 3))}
    assert not host.finish("it", "a window")  # nothing runs
    answers = []

    def press(_):
        answers.extend([host.finish("another"), host.finish("it", "another window")])

    outcome = host.run(graph(OPTIMIZER, show, seed=40), press)
    assert answers
    assert not any(answers)
    assert len(outcome.outputs["log"]["text"][0].splitlines()) == 2


def test_the_button_counts_while_the_node_prepares(host, graph):
    show = {"log": node("PreviewAny", source=link("it", 3))}
    outcome = host.run(
        graph(OPTIMIZER, show, preset="draft", steps=300, seed=44),
        on_text=lambda text: text == "Matching the pictures" and host.finish("it"),
    )
    assert outcome.status == "success", outcome.message
    assert outcome.texts == ["Matching the pictures", "Training", "1 steps"]
    assert len(outcome.outputs["log"]["text"][0].splitlines()) == 1


def test_the_picture_of_a_run_that_was_ended_is_not_taken_for_the_full_one(host, graph):
    long = graph(OPTIMIZER, steps=300, seed=41)
    short = host.run(long, lambda _: host.finish("it"))
    assert short.status == "success"
    again = host.run(long)
    assert "it" in again.ran
    assert max(again.progress) > max(short.progress[:-1], default=0)
    assert "it" not in host.run(long).ran


def test_a_second_press_ends_the_batch(host, graph):
    nodes = {"three": node("RepeatImageBatch", image=link("a"), amount=3)}
    once = host.run(graph(OPTIMIZER, nodes, structure=link("three"), steps=8, seed=42), press_times(host, 1))
    assert len(host.pictures(once, "save")) == 3
    twice = host.run(graph(OPTIMIZER, nodes, structure=link("three"), steps=5000, seed=43), press_times(host, 2))
    assert len(host.pictures(twice, "save")) == 1


def press_times(host, count):
    """What presses the button that often, at the first message of progress."""
    presses = iter(range(count))
    return lambda _: [host.finish("it") for _ in presses]


def test_finishing_early_keeps_the_refined_picture(host, graph):
    short = host.run(graph(REFINED, seed=60, steps=4000), lambda _: host.finish("it"))
    assert short.status == "success", short.message
    assert int(short.texts[-1].removesuffix(" steps")) < 4000
    assert host.pictures(short, "save")[0].shape == (97, 123, 3)


def test_a_refined_picture_is_that_of_the_command_line(host, graph, splice, tmp_path):
    nodes = {"vit": node("SpliceLoadBackbone", backbone_name=OFFLINE_BACKBONE, precision="fp32")}
    outcome = host.run(graph(REFINED, nodes, steps=4, seed=7))
    assert outcome.status == "success", outcome.message
    pictures = [host.base / "input" / name for name in ("structure.png", "appearance.png")]
    recipe = "--steps 4 --size 64 --seed 7 --density 1 --dtype fp32 --quiet --backbone"
    told = splice("refine", *pictures, *recipe.split(), OFFLINE_BACKBONE, "-o", tmp_path / "out.png")
    assert told.status == 0, told.err
    result = load_picture(tmp_path / "out.png")[0].permute(1, 2, 0).mul(255).round().numpy()
    assert np.abs(host.pictures(outcome, "save")[0] - result).max() <= 1  # ComfyUI rounds down when it saves


def test_an_objective_of_chained_terms(host, graph):
    """Two appearances blended, a structure that is fixed, a term with a backbone of its own."""
    nodes = {
        "other": node("SpliceLoadBackbone", backbone_name=OFFLINE_BACKBONE, precision="fp32"),
        "of a": node("SpliceExtractFeatures", image=link("a"), backbone=link("vit"), layer=-1, facet="key", size=56),
        "of b": node("SpliceExtractFeatures", image=link("b"), backbone=link("vit"), layer=-1, facet="key", size=56),
        "mix": node(
            "SpliceBlendFeatures",
            features_1=link("of a"),
            features_2=link("of b"),
            **{f"weight_{number}": 1.0 for number in range(1, 5)},
        ),
        "similar": node("SpliceSelfSimilarity", features=link("of a")),
        "one": node("SpliceAppearanceTerm", weight=10.0, layer=-1, target=link("mix")),
        "two": node("SpliceStructureTerm", weight=1.0, layer=-1, objective=link("one"), target=link("similar")),
        "three": node("SpliceIdentityTerm", weight=1.0, layer=-2, objective=link("two"), backbone=link("other")),
        "four": node("SpliceTokenDistanceTerm", weight=1.0, layer=-7, objective=link("three")),
        "log": node("PreviewAny", source=link("it", 3)),
        "curve": node("SaveImage", images=link("it", 2), filename_prefix="curve"),
        "matrix": node("SaveImage", images=link("similar", 1), filename_prefix="matrix"),
    }
    outcome = host.run(graph(OPTIMIZER, nodes, objective=link("four"), steps=3))
    assert outcome.status == "success", outcome.message
    steps = [json.loads(line) for line in outcome.outputs["log"]["text"][0].splitlines()]
    assert {"run", "step", "total", "appearance", "structure", "identity", "token_distance"} <= steps[2].keys()
    (matrix,) = host.pictures(outcome, "matrix")
    assert matrix.shape == (1 + 4 * 5, 1 + 4 * 5, 3)
    assert (matrix.diagonal(axis1=0, axis2=1) >= 254).all()
    assert len(np.unique(host.pictures(outcome, "curve")[0].reshape(-1, 3), axis=0)) > 5


def test_the_composable_way_gives_the_picture_of_the_one_node(host, graph):
    """With the preset's own weights: what it asks of colours stays, and so does the share of the texture."""
    recipe = {"preset": "draft", "steps": 2, "seed": 50, "texture": 0.3}
    one, full = (host.run(graph(TRANSFER, **{**recipe, **more})) for more in ({}, {"texture": 1.0}))
    assert one.status == full.status == "success", one.message or full.message
    assert not np.array_equal(host.pictures(one, "save")[0], host.pictures(full, "save")[0])
    nodes = {
        "one": node("SpliceAppearanceTerm", weight=6.0, layer=-1),
        "two": node("SpliceStructureTerm", weight=300.0, layer=-1, objective=link("one")),
        "three": node("SpliceIdentityTerm", weight=1.0, layer=-1, objective=link("two")),
        "log": node("PreviewAny", source=link("it", 3)),
    }
    chained = host.run(graph(OPTIMIZER, nodes, objective=link("three"), vit_size=0, **recipe))
    assert chained.status == "success", chained.message
    assert np.array_equal(host.pictures(chained, "save")[0], host.pictures(one, "save")[0])
    last = json.loads(chained.outputs["log"]["text"][0].splitlines()[-1])
    assert {"colour", "contrast", "matched_l1"} <= last.keys()


def test_masks_of_another_size_limit_the_change(host, graph, tensor):
    mask = torch.zeros(1, 50, 60)
    mask[:, :, 30:] = 1
    masks = {"mask": tensor(mask, "TestMask")}
    for kind in (OPTIMIZER, INSTANT, REFINED):
        inputs = {"structure_mask": link("mask"), "appearance_mask": link("mask"), "feather": 2.0}
        outcome = host.run(graph(kind, masks, **inputs))
        assert outcome.status == "success", outcome.message
        (picture,) = host.pictures(outcome, "save")
        original = load_picture(host.base / "input" / "structure.png")[0].permute(1, 2, 0).mul(255).round().numpy()
        assert np.abs(picture[:, :55] - original[:, :55]).max() <= 1
        assert np.abs(picture[:, 75:] - original[:, 75:]).max() > 10


def test_a_generator_is_saved_loaded_and_applied(host, graph):
    saving = {"keep": node("SpliceSaveGenerator", generator=link("it", 1), filename_prefix="kept")}
    trained = host.run(graph(TRANSFER, saving, seed=40))
    assert trained.status == "success", trained.message
    loading = {"kept": node("SpliceLoadGenerator", generator_name="kept_00001_.safetensors")}
    applied = host.run(graph("SpliceApplyGenerator", loading, generator=link("kept"), image=link("a")))
    assert applied.status == "success", applied.message
    assert np.array_equal(host.pictures(applied, "save")[0], host.pictures(trained, "save")[0])
    going_on = {**loading, "keep": node("SpliceSaveGenerator", generator=link("it", 1), filename_prefix="further")}
    further = host.run(graph(OPTIMIZER, going_on, generator=link("kept"), steps=1, learning_rate=1e-9, seed=40))
    assert further.status == "success", further.message
    old, new = (
        load_file(host.base / "models" / "splice_generators" / f"{name}_00001_.safetensors")
        for name in ("kept", "further")
    )
    learnt = [name for name in old if name.endswith((".weight", ".bias"))]
    assert learnt
    assert all(torch.allclose(old[name], new[name]) for name in learnt)  # at this rate, next to nothing


def test_a_generator_gives_its_own_structure_picture_the_finished_one(host, graph):
    """With all that `draft` lays over its output."""
    nodes = {
        "again": node("SpliceApplyGenerator", image=link("a"), generator=link("it", 1)),
        "save again": node("SaveImage", images=link("again"), filename_prefix="again"),
    }
    outcome = host.run(graph(TRANSFER, nodes, preset="draft", steps=2, seed=70))
    assert outcome.status == "success", outcome.message
    (finished,), (again,) = host.pictures(outcome, "save"), host.pictures(outcome, "save again")
    assert np.abs(finished.astype(int) - again).max() <= 1


def test_measure(host, graph):
    nodes = {
        "it": node(
            "SpliceMeasure",
            structure=link("a"),
            appearance=link("b"),
            output=link("a"),
            backbone=link("vit"),
            layer=-1,
            size=112,
        ),
        "distance": node("PreviewAny", source=link("it", 0)),
        "save": node("PreviewAny", source=link("it", 3)),
    }
    outcome = host.run(graph("SpliceMeasure", nodes))
    assert outcome.status == "success", outcome.message
    assert float(outcome.outputs["distance"]["text"][0]) < 1e-6
    assert OFFLINE_BACKBONE in outcome.outputs["save"]["text"][0]


PICTURE = torch.rand(1, 97, 123, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "given",
    [
        {"structure": torch.cat([PICTURE, torch.ones(1, 97, 123, 1)], dim=-1)},
        {"structure": PICTURE[..., :1]},
        {"structure": PICTURE.repeat(2, 1, 1, 1)},
        {"structure": PICTURE * 1.2 - 0.1},
        {"structure": PICTURE.half(), "appearance": PICTURE.bfloat16(), "structure_mask": torch.ones(1, 9, 9).half()},
        {"structure_mask": torch.zeros(1, 64, 64), "appearance_mask": torch.zeros(1, 64, 64)},
        {"structure_mask": torch.ones(1, 30, 40)},
        {"structure_mask": torch.ones(30, 40), "appearance_mask": torch.ones(1, 1, 30, 40)},
        {"structure_mask": torch.ones(1, 30, 40, 1)},
        {"appearance": PICTURE.repeat(3, 1, 1, 1)},
    ],
    ids=[
        *("alpha", "grey", "batch", "slightly out of range", "half precision", "empty masks", "full mask"),
        *("masks without batch and with channel", "mask with channel at the end", "batch of appearances"),
    ],
)
def test_unusual_inputs_work(given, host, graph, tensor):
    nodes = {name: tensor(value, "TestMask" if "mask" in name else "TestImage") for name, value in given.items()}
    outcome = host.run(graph(OPTIMIZER, nodes, **{name: link(name) for name in given}))
    assert outcome.status == "success", outcome.message
    pictures = host.pictures(outcome, "save")
    assert len(pictures) == max(len(given.get(name, PICTURE)) for name in ("structure", "appearance"))
    assert pictures[0].shape == (97, 123, 3)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"structure": PICTURE[:0]}, "the structure picture is an empty batch"),
        ({"appearance": PICTURE[:, :16, :16]}, "the appearance picture is 16x16 pixels"),
        (
            {"structure": torch.full((1, 97, 123, 3), float("nan"))},
            "the structure picture has pixels that are not numbers",
        ),
        ({"structure": PICTURE * 255}, "the structure picture has values from"),
        ({"structure": PICTURE * 2 - 1}, "not in 0..1: of a range of -1..1, add 1 and divide by 2"),
        ({"structure": PICTURE[0]}, "the structure picture must be an IMAGE [B, H, W, C], not [97, 123, 3]"),
        (
            {"structure": PICTURE.repeat(2, 1, 1, 1), "appearance": PICTURE.repeat(3, 1, 1, 1)},
            "3 pairs need 1 or 3 structure pictures, not 2: Image From Batch picks",
        ),
        ({"structure_mask": torch.ones(2, 9, 9)}, "1 pairs need 1 or 1 structure masks, not 2"),
        ({"structure_mask": torch.ones(1, 3, 9, 9)}, "the structure mask must be a MASK [B, H, W], not [1, 3, 9, 9]"),
        ({"appearance_mask": torch.full((1, 9, 9), 1 / 255)}, "one of the masks selects nothing"),
        ({"structure_mask": torch.full((1, 9, 9), float("nan"))}, "the structure mask has values that are not numbers"),
    ],
    ids=[
        *("empty batch", "16x16", "NaN", "0..255", "-1..1", "no batch", "2 and 3", "two masks", "mask of 3 channels"),
        *("faint mask", "NaN mask"),
    ],
)
@pytest.mark.parametrize("kind", [TRANSFER, OPTIMIZER])
def test_bad_inputs_get_one_sentence(kind, given, sentence, host, graph, tensor):
    nodes = {name: tensor(value, "TestMask" if "mask" in name else "TestImage") for name, value in given.items()}
    outcome = host.run(graph(kind, nodes, **{name: link(name) for name in given}))
    assert outcome.status == "error"
    assert sentence in outcome.message
    assert len(outcome.message.splitlines()) == 1
    assert host.get("/queue") == {"queue_running": [], "queue_pending": []}


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"backbone_name": "renamed.safetensors"}, "renamed.safetensors is not in models/dino: choose another"),
        ({"backbone_name": "../../secret.pth"}, "../../secret.pth is not in models/dino"),
        ({"preset": "papre"}, "'papre' not in"),
        ({"steps": -1}, "steps"),
        ({"seed": "many"}, "seed"),
        ({"size": 32}, "size must be at least 64"),
        ({"backbone_name": "dino_vits16"}, "no weights for dino_vits16"),
    ],
)
def test_bad_values_get_one_sentence(inputs, sentence, host, graph):
    outcome = host.run(graph(TRANSFER, **inputs))
    assert outcome.status == "error"
    assert sentence in outcome.message


@pytest.mark.parametrize("kind", [OPTIMIZER, INSTANT, REFINED])
def test_an_empty_mask_among_others_leaves_its_picture_alone(kind, host, graph, tensor):
    """As in a clip whose object is not in the second frame, nor the appearance's in the last."""
    structure_mask, appearance_mask = torch.zeros(4, 97, 123), torch.ones(4, 9, 9)
    structure_mask[[0, 2, 3], 30:70, 40:90] = 1
    appearance_mask[3] = 0
    frames = torch.rand(4, 97, 123, 3, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    nodes = {
        "frames": tensor(frames),
        "masks": tensor(structure_mask, "TestMask"),
        "others": tensor(appearance_mask, "TestMask"),
    }
    inputs = {"structure": link("frames"), "structure_mask": link("masks"), "appearance_mask": link("others")}
    outcome = host.run(graph(kind, nodes, **inputs))
    assert outcome.status == "success", outcome.message
    changed = [
        np.abs(picture.astype(int) - frame).max() > 2
        for picture, frame in zip(host.pictures(outcome, "save"), frames.mul(255).numpy(), strict=True)
    ]
    assert changed == [True, False, True, False]


PAST = {
    "weight": ("SpliceAppearanceTerm", {"weight": -1.0, "layer": -1}),
    "texture": (INSTANT, {"texture": 5.0}),
    "learning_rate": (REFINED, {"learning_rate": 2.0}),
    "warm_steps": (OPTIMIZER, {"warm_steps": -7}),
    "size": ("SpliceExtractFeatures", {"size": -8, "layer": -1, "facet": "key"}),
    "mass": ("SpliceAttentionMap", {"mass": -1.0, "layer": -1, "head": -1, "size": 112}),
}


@pytest.mark.parametrize("name", PAST)
def test_a_number_linked_past_its_limits_is_refused(name, host, graph, tensor):
    kind, inputs = PAST[name]
    value = inputs[name]
    given = {"backbone": link("vit"), **inputs, name: link("number")}
    if kind not in (OPTIMIZER, INSTANT, REFINED, "SpliceAppearanceTerm"):
        given["image"] = link("a")
    number = node("PrimitiveFloat" if isinstance(value, float) else "PrimitiveInt", value=value)
    shown = node("PreviewAny", source=link("it", 0))
    outcome = host.run(graph(kind, {"number": number, "save": shown}, **given))
    assert outcome.status == "error"
    assert outcome.message.startswith(f"Splice: {name} must be from ")
    assert outcome.message.endswith(f"not {value:g}")


def test_targets_of_another_kind_are_refused_by_name(host, graph):
    """Before the first step."""
    other = {"image": link("a"), "backbone": link("vit"), "layer": 5, "facet": "key", "size": 56}
    nodes = {
        "features": node("SpliceExtractFeatures", **other),
        "term": node("SpliceAppearanceTerm", weight=1.0, layer=-1, target=link("features")),
    }
    outcome = host.run(graph(OPTIMIZER, nodes, objective=link("term")))
    assert outcome.status == "error"
    assert "the appearance term is of layer 5, but the term compares 11" in outcome.message


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("../../x", "Splice: filename_prefix leads out of models/splice_generators"),
        ("n" * 300, "the name is too long; choose a shorter one"),
    ],
)
def test_a_name_that_cannot_be_saved_is_refused_before_the_training(prefix, sentence, host, graph):
    saving = {"keep": node("SpliceSaveGenerator", generator=link("it", 1), filename_prefix=prefix)}
    only = {key: value for key, value in graph(TRANSFER, saving, steps=100_000).items() if key != "save"}
    outcome = host.run(only)
    assert (outcome.status, outcome.ran) == ("error", [])
    assert sentence in outcome.message


def test_a_generator_that_was_replaced_under_its_name_is_loaded_anew(host, graph):
    from splice_engine import Generator

    path = host.base / "models" / "splice_generators" / "again.safetensors"
    path.parent.mkdir(exist_ok=True)
    loading = {
        "it": node("SpliceLoadGenerator", generator_name="again.safetensors"),
        "applied": node("SpliceApplyGenerator", generator=link("it"), image=link("a")),
        "save": node("SaveImage", images=link("applied"), filename_prefix="again"),
    }
    pictures = []
    for seed in (1, 2):
        Generator(seed=seed).save(path)
        host.get("/object_info")
        outcome = host.run(graph("SpliceLoadGenerator", loading))
        assert outcome.status == "success", outcome.message
        pictures += host.pictures(outcome, "save")
    assert not np.array_equal(*pictures)
    again = host.run(graph("SpliceLoadGenerator", loading))
    assert "it" not in again.ran


def test_a_file_of_ones_own_and_a_damaged_one(host, graph, weights_file):
    """Both are listed as soon as they are there."""
    folder = host.base / "models" / "dino"
    (folder / "mine.safetensors").write_bytes(weights_file.read_bytes())
    (folder / "damaged.safetensors").write_bytes(b"nothing")
    assert host.run(graph(TRANSFER, backbone_name="mine.safetensors", steps=1)).status == "success"
    outcome = host.run(graph(TRANSFER, backbone_name="damaged.safetensors"))
    assert outcome.status == "error"
    assert "damaged.safetensors cannot be read as weights" in outcome.message
    (folder / "mine.safetensors").unlink()
    gone = host.run(graph(TRANSFER, backbone_name="mine.safetensors", steps=1, seed=3))
    assert gone.status == "error"
    assert "mine.safetensors" in gone.message


SPELLINGS = {
    "a file that the list has by its name in the catalogue": f"{OFFLINE_BACKBONE}.safetensors",
    "the same, which is not there any more": f"{OFFLINE_BACKBONE}.pth",
    "a file in a subfolder": "mine/kept.safetensors",
    "the same, of a workflow from Windows": "mine\\kept.safetensors",
}


@pytest.mark.parametrize("name", SPELLINGS.values(), ids=SPELLINGS)
def test_names_of_files_in_older_workflows_are_understood(name, host, graph, weights_file):
    from splice_engine import Generator

    models = host.base / "models"
    (models / "dino" / "mine").mkdir(exist_ok=True)
    for path in (f"{OFFLINE_BACKBONE}.safetensors", "mine/kept.safetensors"):
        (models / "dino" / path).write_bytes(weights_file.read_bytes())
    loading = node("SpliceLoadBackbone", backbone_name=name, precision="auto")
    assert host.run(graph(TRANSFER, backbone_name=name, steps=1)).status == "success"
    kept = {"vit": loading}
    if "mine" in name:
        (models / "splice_generators" / "mine").mkdir(parents=True, exist_ok=True)
        Generator().save(models / "splice_generators" / "mine" / "kept.safetensors")
        kept |= {"start": node("SpliceLoadGenerator", generator_name=name)}
        inputs = {"generator": link("start")}
    else:
        inputs = {}
    outcome = host.run(graph(OPTIMIZER, kept, steps=1, **inputs))
    assert outcome.status == "success", outcome.message


def test_a_file_that_is_gone_is_named_before_anything_runs(host, graph):
    """By every node that takes the name of one."""
    choosing = set()
    for kind, info in host.get("/object_info").items():
        required = info["input"].get("required", {})
        names = {"backbone_name", "generator_name"} & required.keys() if kind.startswith("Splice") else set()
        for name in names:
            given = {
                key: link("a") if type_ == "IMAGE" else options[0].get("default", 0)
                for key, (type_, *options) in required.items()
            }
            shown = node("PreviewAny", source=link("it", 0))
            outcome = host.run(graph(kind, {"save": shown}, **{**given, name: "gone.safetensors"}))
            assert (outcome.status, outcome.ran) == ("error", []), kind
            assert "Splice: gone.safetensors is not in models/" in outcome.message
            choosing.add(kind)
    assert {"SpliceLoadBackbone", "SpliceLoadGenerator", "SpliceAppearanceTransfer", "SpliceClip"} <= choosing


def test_a_mask_is_checked_before_the_first_training(host, graph, tensor):
    masks = torch.ones(2, 9, 9)
    masks[1] = float("nan")
    nodes = {"masks": tensor(masks, "TestMask"), "two": tensor(PICTURE.repeat(2, 1, 1, 1))}
    outcome = host.run(graph(OPTIMIZER, nodes, structure=link("two"), structure_mask=link("masks")))
    assert "the structure mask has values that are not numbers" in outcome.message
    assert outcome.texts == []


@pytest.mark.parametrize("masked", [False, True])
def test_a_training_is_not_lost_where_its_result_is_too_large(masked, host, graph, tensor):
    """It is rendered at half the size and enlarged; outside the mask the picture stays as it was."""
    picture, mask = torch.rand(1, 300, 350, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 300, 350)
    mask[:, :, :150] = 1
    nodes = {
        "picture": tensor(picture),
        "mask": tensor(mask, "TestMask"),
        "device": node("TestMemory", image=link("picture"), megabytes=1e9, pixels=80_000),
        "keep": node("SpliceSaveGenerator", generator=link("it", 1), filename_prefix="kept"),
    }
    inputs = {"structure_mask": link("mask"), "feather": 4.0} if masked else {}
    before = len(host.log())
    try:
        outcome = host.run(graph(OPTIMIZER, nodes, structure=link("device"), **inputs))
    finally:
        host.free_memory()
    assert outcome.status == "success", outcome.message
    (result,) = host.pictures(outcome, "save")
    assert result.shape == (300, 350, 3)
    assert "out of memory for the result at full size on cpu: trying with less" in host.log()[before:]
    kept = np.abs(result[:, 160:] - picture[0, :, 160:].mul(255).numpy()).max() <= 1
    assert kept == masked


@pytest.mark.parametrize("kind", [OPTIMIZER, "SpliceInvertFeatures"])
def test_what_a_batch_has_finished_stays_where_the_next_one_fails(kind, host, graph):
    nodes = {"three": node("RepeatImageBatch", image=link("a"), amount=3)}
    inputs = {"structure": link("three"), "seed": 45}
    if kind != OPTIMIZER:
        recipe = {"preset": "fast", "steps": 2, "size": 72, "seed": 45}
        inputs = {"image": link("three"), "backbone": link("vit"), "facet": "cls", "layer": -1, **recipe}

    def take_memory(text):
        if text == "2 steps":
            host.post("/test/megabytes", 0.01)

    try:
        outcome = host.run(graph(kind, nodes, **inputs), on_text=take_memory)
    finally:
        host.free_memory()
    assert outcome.status == "success", outcome.message
    assert len(host.pictures(outcome, "save")) == 1
    assert outcome.texts[-1].startswith("2 of 3 failed, what is before it is kept: out of memory")
    again = host.run(graph(kind, nodes, **inputs))
    assert len(host.pictures(again, "save")) == 3


@pytest.mark.parametrize(("kind", "megabytes"), [(OPTIMIZER, 50.0), (REFINED, 6.0)])
def test_out_of_memory_starts_over_in_lighter_ways(kind, megabytes, host, graph, tensor):
    """Until it fits; and where nothing fits, one sentence, after which the server goes on."""
    picture = torch.rand(1, 300, 350, 3, generator=torch.Generator().manual_seed(0))

    def run(megabytes):
        nodes = {
            "picture": tensor(picture),
            "device": node("TestMemory", image=link("picture"), megabytes=megabytes, pixels=2**30),
        }
        return host.run(graph(kind, nodes, structure=link("device"), appearance=link("device"), steps=1, size=300))

    before = len(host.log())
    fitted = run(megabytes)
    assert fitted.status == "success", fitted.message
    assert host.pictures(fitted, "save")[0].shape == (300, 350, 3)
    told = [line for line in host.log()[before:].splitlines() if "Splice: out of memory" in line]
    assert "computed twice" in told[0]
    assert "short side of 225 pixels" in told[1]
    refused = run(megabytes / 10)
    assert refused.status == "error"
    assert "out of memory even in the lightest way" in refused.message
    before = len(host.log())
    assert run(1e9).status == "success"
    assert "Splice: out of memory" not in host.log()[before:]


def test_without_timm_one_sentence_names_the_command(host, graph):
    """The server of all tests starts without timm, so that the pack needs it only to load a backbone."""
    host.install_timm(False)
    try:
        outcome = host.run(graph(OPTIMIZER))
    finally:
        host.install_timm()
    assert outcome.status == "error"
    assert re.search(r'-m pip install "timm>=[\d.]+"', outcome.message)
    assert host.run(graph(OPTIMIZER, steps=1)).status == "success"
