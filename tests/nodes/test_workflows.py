"""Each shipped workflow, run to its end in a real ComfyUI on small sizes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from splice_engine import OFFLINE_BACKBONE

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SOCKETS_WITH_WIDGET = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SMALL = {
    "backbone_name": OFFLINE_BACKBONE,
    "ckpt_name": "tiny.safetensors",
    "steps": 2,
    "warm_steps": 8,
    "size": 72,
    "width": 128,
    "height": 96,
}


def prompt(workflow, info):
    """The API graph of a workflow, as the frontend makes it, with small sizes and the demo pair."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph, pictures = {}, 0
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values, inputs = iter(node["widgets_values"]), {}
        for group in ("required", "optional"):
            for name, (kind, *rest) in info[node["type"]]["input"].get(group, {}).items():
                options = rest[0] if rest else {}
                if isinstance(kind, list) or kind in SOCKETS_WITH_WIDGET:
                    inputs[name] = SMALL.get(name, next(values))
                    if any(map(options.get, ("control_after_generate", "image_upload", "video_upload"))):
                        next(values)
        if node["type"] == "LoadImage":
            inputs["image"] = ("structure.png", "appearance.png")[pictures % 2]
            pictures += 1
        for socket in node["inputs"]:
            if socket["link"] is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


@pytest.fixture(scope="module")
def checkpoint(host):
    """A checkpoint of random weights among the host's."""
    folder = host.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("checkpoint.py")
    made = subprocess.run(
        [sys.executable, script, folder / SMALL["ckpt_name"]], cwd=host.source, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_to_its_end(path, host, checkpoint):
    graph = prompt(json.loads(path.read_text(encoding="utf-8")), host.get("/object_info"))
    outcome = host.run(graph)
    assert outcome.status == "success", outcome.message
    saved = [name for name, node in graph.items() if node["class_type"] in ("SaveImage", "SaveVideo")]
    assert saved
    for name in saved:
        for picture in host.pictures(outcome, name):
            assert np.ptp(picture) > 5  # two steps from noise are faint, but not flat
