"""README, docs and help pages against the code: tables, commands, examples and links."""

import re
import runpy
import shlex
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("web/docs/*.md")),
]
EXAMPLES = [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")]
README_LINES = 120

TINY = {"steps": 2, "warm_steps": 2, "refine_steps": 1, "size": 72, "vit_size": 56, "match_passes": 1}
"""What examples train with, in place of the presets' numbers."""


def name(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rendered():
    return runpy.run_path(str(ROOT / "docs" / "make_tables.py"))["render_pages"]()


def test_tables_are_those_of_the_code(rendered):
    stale = [name(path) for path, text in rendered.items() if text != read(path)]
    assert stale == [], "run `python docs/make_tables.py`"


def test_every_marked_table_is_made(rendered):
    marked = {path for path in PAGES if path.name != "CONTRIBUTING.md" and "<!-- table: " in read(path)}
    assert marked == rendered.keys()
    assert set(ROOT.glob("web/docs/*.md")) <= marked


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES


def anchors(path):
    """The fragments by which a page's headings are linked."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", read(path), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", read(page))
    targets = [((page.parent / path).resolve() if path else page, fragment) for path, fragment in links]
    assert [name(path) for path, _ in targets if not path.exists()] == []
    assert [fragment for path, fragment in targets if fragment and fragment not in anchors(path)] == []


def commands(page):
    """The `splice` commands of a page's code blocks, as lists of words."""
    for line in re.findall(r"^    (?:.*&& )?(splice .+)$", read(page), re.M):
        yield shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_commands_are_understood(page):
    from splice_engine.cli.main import build_parser

    for words in commands(page):
        build_parser().parse_args(words)


def test_options_in_tables_are_understood(capsys):
    from splice_engine.cli.main import main

    page = ROOT / "docs" / "command-line.md"
    sections = re.findall(r"^## (splice \w+)\n(.*?)(?=^## |\Z)", read(page), re.M | re.S)
    assert len(sections) >= 6
    for command, text in sections:
        with pytest.raises(SystemExit):
            main([command.split()[1], "--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `--")]
        assert set(re.findall(r"--[\w-]+", " ".join(rows))) <= known, command


@pytest.fixture(scope="module")
def tiny_backbone():
    """A ViT as deep as the real ones, and of random weights."""
    from timm.models.vision_transformer import VisionTransformer

    from splice_engine import Backbone

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"embed_dim": 24, "depth": 12, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}
        return Backbone(VisionTransformer(img_size=56, patch_size=14, init_values=0.5, **size).eval(), "tiny")


@pytest.fixture
def small_world(tiny_backbone, coarse_matching, tmp_path, monkeypatch):
    """A folder with the pictures that examples read; presets and backbones are tiny ones."""
    import splice_engine

    def shrink(make):
        def made(*names, **changes):
            settings = make(*names, **changes)
            known = {field.name for field in fields(settings)} & TINY.keys()
            return replace(settings, **{name: min(TINY[name], getattr(settings, name)) for name in known})

        return made

    rng = torch.Generator().manual_seed(0)
    for filename, height, width in (("A.jpg", 72, 90), ("B.jpg", 96, 80), ("C.jpg", 80, 80)):
        splice_engine.save_picture(torch.rand(1, 3, height, width, generator=rng), tmp_path / filename)
    for filename in ("a.png", "b.png"):
        mask = torch.zeros(1, 3, 40, 40)
        mask[..., 8:32, 8:32] = 1
        splice_engine.save_picture(mask, tmp_path / filename)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splice_engine.Backbone, "load", lambda *_: tiny_backbone)
    few_steps = splice_engine.RefinementSettings(steps=2, size=72, match_passes=1)
    monkeypatch.setattr(splice_engine, "Refinement", partial(splice_engine.Refinement, settings=few_steps))
    monkeypatch.setattr(splice_engine, "preset", shrink(splice_engine.preset))
    monkeypatch.setattr(splice_engine, "inversion_preset", shrink(splice_engine.inversion_preset))


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
def test_examples_run(page, small_world, tmp_path):
    """All of a page's blocks one after the other, as a reader would type them."""
    names, script = {}, tmp_path / "block.py"
    for block in re.findall(r"^```python\n(.*?)^```", read(page), re.M | re.S):
        script.write_text(block, encoding="utf-8")
        names = runpy.run_path(str(script), names)
