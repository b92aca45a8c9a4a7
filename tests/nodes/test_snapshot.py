"""What is committed of the nodes against what the live host says; `SPLICE_SNAPSHOT=1` writes it anew."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INFO = ROOT / "tests" / "workflows" / "object_info.json"
NAMES = ROOT / "locales" / "en" / "nodeDefs.json"
PLACE = {"python_module", "api_node", "deprecated", "experimental"}


def used():
    nodes = (node for path in (ROOT / "workflows").glob("*.json") for node in json.loads(path.read_text())["nodes"])
    return {node["type"] for node in nodes} - {"MarkdownNote", "Note"}


@pytest.fixture(scope="module")
def live(host):
    """Of our own nodes and of ComfyUI's that the workflows use, as if the host had no files to choose from."""
    everything = host.get("/object_info")
    files = {path.name for folder in ("input", "models") for path in (host.base / folder).rglob("*")}
    kinds = {name for name in everything if name.startswith("Splice")} | used()
    return {
        name: {key: without(files, value) for key, value in everything[name].items() if key not in PLACE}
        for name in sorted(kinds)
    }


def without(files, value):
    """A value of JSON without the choices that are files."""
    if isinstance(value, dict):
        return {key: without(files, inner) for key, inner in value.items() if key != "on_this_machine"}
    if isinstance(value, list):
        return [without(files, inner) for inner in value if not isinstance(inner, str) or Path(inner).name not in files]
    return value


def names(live):
    """Display names and tooltips, as the frontend reads them."""
    ours = {name: info for name, info in live.items() if name.startswith("Splice")}
    return {
        name: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                key: {"name": key.replace("_", " "), "tooltip": options["tooltip"]}
                for group in ("required", "optional")
                for key, (_, options) in info["input"].get(group, {}).items()
            },
            "outputs": {
                str(index): {"name": output.replace("_", " "), "tooltip": tooltip}
                for index, (output, tooltip) in enumerate(
                    zip(info["output_name"], info["output_tooltips"], strict=True)
                )
            },
        }
        for name, info in ours.items()
    }


@pytest.mark.parametrize("what", ["object_info", "names"])
def test_what_is_committed_is_what_the_host_says(what, live):
    path, value = (INFO, live) if what == "object_info" else (NAMES, names(live))
    if os.environ.get("SPLICE_SNAPSHOT"):
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    committed = json.loads(path.read_text(encoding="utf-8"))
    if what == "names":
        assert committed == value
        return
    assert committed.keys() == value.keys()
    for name in committed:
        # ComfyUI's own nodes change from version to version, and newer hosts say more of each of ours.
        if name.startswith("Splice"):
            assert committed[name] == {key: value[name][key] for key in committed[name]}
