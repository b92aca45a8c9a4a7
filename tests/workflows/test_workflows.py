"""The shipped workflows, against what ComfyUI said of the nodes in them (`object_info.json`)."""

import itertools
import json
import math
import re
import uuid
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from splice_engine import InstantSettings, InversionSettings, RefinementSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
INFO = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))
NOTES = {"MarkdownNote", "Note"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def inputs(kind):
    """Name, type and options of each input of a node, in the order of its widgets."""
    for group in ("required", "optional"):
        for name, (type_, *rest) in INFO[kind]["input"].get(group, {}).items():
            options = dict(rest[0]) if rest else {}
            if isinstance(type_, list):
                type_, options = "COMBO", {"options": type_, **options}
            if type_ == "COMFY_AUTOGROW_V3":
                yield from grown(name, **options["template"])
            else:
                yield name, type_, options, group


def grown(name, input, prefix, min, max):
    """The sockets of an input that grows as they are connected."""
    ((type_, options),) = input["required"].values()
    for index in range(max):
        yield f"{name}.{prefix}{index}", type_, options, "required" if index < min else "optional"


def uploads(options):
    """Whether a widget has the frontend's button for files, which is a further widget."""
    return options.get("image_upload") or options.get("video_upload")


def check_widget(value, type_, options, where):
    if type_ == "COMBO":
        # Which pictures and checkpoints there are is the user's affair.
        assert value in options["options"] or uploads(options) or str(value).endswith(".safetensors"), where
    elif type_ in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value), where
    else:
        assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[type_]), where


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_there_are_workflows():
    assert len(WORKFLOWS) >= 7
    assert len({json.loads(path.read_text(encoding="utf-8"))["id"] for path in WORKFLOWS}) == len(WORKFLOWS)


def test_names_and_the_readme_have_the_order_of_the_lessons():
    """Each name begins with its number, and has a square card and a row."""
    names = [path.stem for path in WORKFLOWS]
    assert [name[:3] for name in names] == [f"{number:02} " for number in range(1, len(names) + 1)]
    assert {Image.open(path.with_suffix(".jpg")).size for path in WORKFLOWS} == {(512, 512)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d\d .+?) \|", readme, re.M) == names


def test_format(workflow):
    assert workflow["version"] == 0.4
    assert uuid.UUID(workflow["id"])


def test_widgets_hold_what_the_nodes_take(workflow):
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        values = iter(node["widgets_values"])
        for name, type_, options, _ in inputs(node["type"]):
            if type_ not in WIDGETS:
                continue
            check_widget(next(values), type_, options, f"{node['type']}.{name}")
            if options.get("control_after_generate"):
                assert next(values) == "fixed"
            if uploads(options):
                assert next(values) == "image"
        assert list(values) == []


def test_links_join_sockets_of_one_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, type_ in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        socket = nodes[target]["inputs"][slot]
        assert socket["link"] == link
        assert INFO[nodes[source]["type"]]["output"][output] == type_
        wanted = {name: expected for name, expected, *_ in inputs(nodes[target]["type"])}[socket["name"]]
        assert wanted in (type_, "*")


def test_required_sockets_are_connected(workflow):
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        linked = {socket["name"] for socket in node["inputs"] if socket["link"] is not None}
        needed = {
            name for name, type_, _, group in inputs(node["type"]) if group == "required" and type_ not in WIDGETS
        }
        assert needed <= linked, node["type"]
        assert [output["name"] for output in node["outputs"]] == INFO[node["type"]]["output_name"]


LOAD_IMAGE_HEIGHT = 314
"""Pixels to which the frontend makes every Load Image at least."""


def test_nodes_do_not_overlap(workflow):
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    assert all(node["size"][1] >= LOAD_IMAGE_HEIGHT for node in workflow["nodes"] if node["type"] == "LoadImage")
    for index, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:index]:
            apart_x = x >= other_x + other_width or other_x >= x + width
            apart_y = y - 30 >= other_y + other_height or other_y - 30 >= y + height  # a title is 30 high
            assert apart_x or apart_y


TITLE, SLOT, FIRST_SLOT = 30, 20, 14
"""Heights in pixels as the frontend draws nodes: their title above `pos`, and their sockets' places."""


def socket_height(node, sockets, index):
    """Where a socket is; those of widgets have no place of their own."""
    before = sum("widget" not in socket for socket in sockets[:index])
    return node["pos"][1] + FIRST_SLOT + SLOT * before


def curve(start, end, points=200):
    """Points of a link, which is a Bezier curve with handles of a quarter of its length."""
    reach = math.dist(start, end) / 4
    for share in (index / points for index in range(points + 1)):
        weights = [math.comb(3, k) * (1 - share) ** (3 - k) * share**k for k in range(4)]
        xs, ys = (start[0], start[0] + reach, end[0] - reach, end[0]), (start[1], start[1], end[1], end[1])
        yield tuple(sum(weight * value for weight, value in zip(weights, side, strict=True)) for side in (xs, ys))


def reroutes(workflow, link):
    """The points that a link is led through, from its source on."""
    points = {point["id"]: point for point in workflow["extra"].get("reroutes", [])}
    last = {extension["id"]: extension["parentId"] for extension in workflow["extra"].get("linkExtensions", [])}
    way, point = [], points.get(last.get(link))
    while point:
        assert link in point["linkIds"]
        way.insert(0, tuple(point["pos"]))
        point = points.get(point.get("parentId"))
    return way


def test_no_link_runs_behind_a_node(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, _ in workflow["links"]:
        a, b = nodes[source], nodes[target]
        start = a["pos"][0] + a["size"][0], socket_height(a, a["outputs"], output)
        end = b["pos"][0], socket_height(b, b["inputs"], slot)
        way = [start, *reroutes(workflow, link), end]
        assert way == sorted(way, key=lambda point: point[0])
        drawn = [point for pair in itertools.pairwise(way) for point in curve(*pair) if start[0] < point[0] < end[0]]
        for node in workflow["nodes"]:
            (left, top), (width, height) = node["pos"], node["size"]
            behind = [(x, y) for x, y in drawn if left < x < left + width and top - TITLE < y < top + height]
            assert behind == [], f"from {a['type']} to {b['type']}, behind {node['type']}"


def test_pictures_are_there_and_have_the_masks_of_a_transfer(workflow):
    sockets = [socket for node in workflow["nodes"] for socket in node["inputs"]]
    masks = {socket["link"] for socket in sockets if socket["name"].endswith("_mask")} - {None}
    for node in workflow["nodes"]:
        if node["type"] == "LoadImage":
            picture = Image.open(ROOT / "workflows" / "pictures" / node["widgets_values"][0])
            masked = "A" in picture.getbands() and picture.getchannel("A").getextrema() == (0, 255)
            assert masked == bool(masks & set(node["outputs"][1]["links"] or []))


def test_the_frontend_fits_the_view(workflow):
    assert "ds" not in workflow["extra"]


SCREEN, MINIMAP = (1366, 768), (1109, 510)
"""Pixels of a small screen, and the left upper corner of the map that the frontend lays over its lower right."""

FILL, PADDING, SMALLEST_SCALE = 0.75, 10, 8 / 14
"""What a fitted workflow fills of the screen, what is added to its sides, and below which scale no text is drawn."""


def test_all_is_readable_on_a_small_screen(workflow):
    boxes = [(x, y - TITLE, x + w, y + h) for (x, y), (w, h) in ((n["pos"], n["size"]) for n in workflow["nodes"])]
    low = [min(box[axis] for box in boxes) - PADDING for axis in (0, 1)]
    high = [max(box[axis + 2] for box in boxes) + PADDING for axis in (0, 1)]
    scale = FILL * min(SCREEN[axis] / (high[axis] - low[axis]) for axis in (0, 1))
    assert scale > SMALLEST_SCALE
    for box in boxes:
        ends = [SCREEN[axis] / 2 + scale * (box[axis + 2] - (low[axis] + high[axis]) / 2) for axis in (0, 1)]
        assert any(end <= edge for end, edge in zip(ends, MINIMAP, strict=True))


def test_a_checkpoint_says_where_it_is(workflow):
    """So that ComfyUI offers to download it."""
    for node in workflow["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert model["directory"] == "checkpoints"
            assert model["url"].startswith("https://")
            assert model["name"] in model["url"]


def test_every_node_of_ours_has_a_place_a_page_and_a_translation():
    ours = {name for name in INFO if name.startswith("Splice")}
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    assert ours - used == {"SpliceLoadGenerator"}  # it needs a file that only the user's own runs leave
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == ours
    names = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert names.keys() == ours


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("SpliceAppearanceTransfer", Settings),
        ("SpliceOptimizer", Settings),
        ("SpliceAblation", Settings),
        ("SpliceInstantTransfer", InstantSettings),
        ("SpliceRefinedTransfer", RefinementSettings),
        ("SpliceInvertFeatures", InversionSettings),
    ],
)
def test_numbers_of_a_recipe_say_and_take_what_the_engine_does(kind, recipe):
    known = {field.name: field for field in fields(recipe)}
    widgets = {name: options for name, type_, options, _ in inputs(kind) if type_ in ("INT", "FLOAT") and name in known}
    assert len(widgets) >= 3
    for name, options in widgets.items():
        assert options["tooltip"].lower().startswith(known[name].metadata["help"].lower())
        overrides = f"{options['default']:g}: the preset's" in options["tooltip"]
        assert overrides or options["default"] == known[name].default
        for value in (options["max"], *(() if overrides else (options["min"], options["default"]))):
            recipe(**{name: value})  # what the engine refuses is an error here
