"""The host: a real ComfyUI, or the reason why there is none."""

import importlib.util
import sys
import uuid
from pathlib import Path

import pytest
import torch

from splice_engine import OFFLINE_BACKBONE, save_picture


def load_module(name, path):
    location = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


comfy = load_module("comfy_process", Path(__file__).with_name("comfy.py"))
hubs = load_module("hub_process", Path(__file__).parents[1] / "engine" / "hub.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and comfy.find() is None:
            item.add_marker(pytest.mark.skip("set COMFYUI_DIR to the folder of a ComfyUI"))


@pytest.fixture(scope="session")
def hub():
    """The model hub of this session, which has nothing until a test gives it a file."""
    server = hubs.Hub(status=404)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def host(tmp_path_factory, weights_file, pair, hub):
    """The server of this session, with the demo pair among its input pictures."""
    try:
        server = comfy.Comfy(comfy.find(), tmp_path_factory.mktemp("comfyui"), hub.address)
    except RuntimeError as error:
        pytest.skip(f"{error} (install ComfyUI's requirements into {sys.executable}'s environment)")
    try:
        for name, picture in zip(("structure.png", "appearance.png"), pair, strict=True):
            save_picture(picture, server.base / "input" / name)
        server.install_timm()
        yield server
    finally:
        server.stop()


@pytest.fixture
def tensor(host):
    """Makes a node that gives a tensor."""

    def make(value, kind="TestImage"):
        name = f"{uuid.uuid4().hex}.pt"  # never one that the host has in its cache
        torch.save(value, host.base / "custom_nodes" / "test_nodes" / name)
        return {"class_type": kind, "inputs": {"name": name}}

    return make


@pytest.fixture
def graph():
    """A graph with one node of the given kind under the id "it", fed with the demo pair; its image is saved."""

    def make(kind, nodes=None, save=0, **inputs):
        given = {
            "SpliceAppearanceTransfer": {
                "structure": ["a", 0],
                "appearance": ["b", 0],
                "backbone_name": OFFLINE_BACKBONE,
                "preset": "paper",
                "steps": 2,
                "size": 64,
                "seed": 0,
            },
            "SpliceOptimizer": {
                "structure": ["a", 0],
                "appearance": ["b", 0],
                "backbone": ["vit", 0],
                "preset": "paper",
                "steps": 2,
                "size": 64,
                "seed": 0,
                "warm_steps": -1,
                "learning_rate": 0.0,
                "vit_size": 56,
                "feather": 8.0,
            },
            "SpliceInstantTransfer": {
                "structure": ["a", 0],
                "appearance": ["b", 0],
                "backbone": ["vit", 0],
                "texture": 0.7,
                "feather": 8.0,
            },
            "SpliceRefinedTransfer": {
                "structure": ["a", 0],
                "appearance": ["b", 0],
                "backbone": ["vit", 0],
                "steps": 2,
                "size": 64,
                "seed": 0,
                "learning_rate": 0.004,
                "texture": 0.7,
                "feather": 8.0,
                "density": 1,
            },
        }.get(kind, {})
        return {
            "a": {"class_type": "LoadImage", "inputs": {"image": "structure.png"}},
            "b": {"class_type": "LoadImage", "inputs": {"image": "appearance.png"}},
            "vit": {
                "class_type": "SpliceLoadBackbone",
                "inputs": {"backbone_name": OFFLINE_BACKBONE, "precision": "auto"},
            },
            "it": {"class_type": kind, "inputs": {**given, **inputs}},
            "save": {"class_type": "SaveImage", "inputs": {"images": ["it", save], "filename_prefix": "out"}},
            **(nodes or {}),
        }

    return make
