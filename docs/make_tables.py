"""Writes every table of the documentation that repeats what the code says.

    python docs/make_tables.py            # renews the pages whose tables have changed
    python docs/make_tables.py --check    # changes nothing; exit status 1 where a page is out of date

Inputs and outputs of the nodes' help pages come from the snapshot of the schemas (tests/workflows/object_info.json),
options and presets from the fields of the settings, the backbones from the catalogue. A table stands between two
comments, `<!-- table: NAME -->` and `<!-- end of table -->`; what is outside of them is written by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from splice_engine import (
    CATALOGUE,
    INVERSION_PRESETS,
    PRESETS,
    InstantSettings,
    InversionSettings,
    RefinementSettings,
    Settings,
)
from splice_engine.recipe import Recipe
from splice_engine.settings import ClipSettings, InterpolationSettings

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = ROOT / "tests" / "workflows" / "object_info.json"

TABLE = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
MOST_CHOICES = 6
"""A choice among more than this many is not written out: the node itself lists them."""


def render_pages() -> dict[Path, str]:
    """The text of every page that has tables, with the tables as the code has them now."""
    schemas = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    pages = {ROOT / "web" / "docs" / f"{name}.md": _node_tables(schemas[name]) for name in schemas if _is_ours(name)}
    docs = ROOT / "docs"
    pages[docs / "command-line.md"] = {
        "splice refine": make_table(("option", "meaning", "default"), _option_rows(RefinementSettings, defaults=True)),
        "splice instant": make_table(("option", "meaning", "default"), _option_rows(InstantSettings, defaults=True)),
        "splice interpolate": make_table(
            ("option", "meaning", "default"), _option_rows(InterpolationSettings, defaults=True)
        ),
        "splice transfer": make_table(("option", "meaning"), _option_rows(Settings)),
        "splice clip": make_table(("option", "meaning", "default"), _option_rows(ClipSettings, defaults=True)),
        "splice invert": make_table(("option", "meaning"), _option_rows(InversionSettings)),
    }
    pages[docs / "presets.md"] = {"presets": _preset_table(PRESETS)}
    pages[docs / "analysis.md"] = {"presets": _preset_table(INVERSION_PRESETS)}
    pages[docs / "backbones.md"] = {"backbones": _backbone_table()}
    return {path: fill_tables(path, tables) for path, tables in pages.items()}


def fill_tables(path: Path, tables: Mapping[str, str]) -> str:
    """A page's text with all of its tables replaced.

    Raises:
        ValueError: The page's comments name other tables than the given ones.
    """
    text = path.read_text(encoding="utf-8")
    names = [found["name"] for found in TABLE.finditer(text)]
    if sorted(names) != sorted(tables):
        raise ValueError(f"{path} must have the tables {sorted(tables)}, but has {sorted(names)}")
    return TABLE.sub(lambda found: f"{found[1]}\n{tables[found['name']]}\n\n{found[3]}", text)


def make_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _is_ours(node: str) -> bool:
    return node.startswith("Splice")


def _node_tables(schema: dict[str, Any]) -> dict[str, str]:
    inputs = [
        (name, *_describe_input(kind, options, group == "optional"), options["tooltip"])
        for group in ("required", "optional")
        for name, (kind, options) in schema["input"].get(group, {}).items()
    ]
    outputs = zip(schema["output_name"], schema["output"], schema["output_tooltips"], strict=True)
    return {
        "inputs": make_table(("input", "type", "default and limits", "meaning"), inputs),
        "outputs": make_table(("output", "type", "meaning"), outputs),
    }


def _describe_input(kind: str, options: dict[str, Any], optional: bool) -> tuple[str, str]:
    """Type and default of a node's input, with the limits or the choices."""
    if kind not in WIDGETS:
        return kind, "optional" if optional else "required"
    default = options.get("default")
    if kind == "BOOLEAN":
        return kind, _format(default)
    if kind == "COMBO":
        choices = options["options"]
        if default is None or len(choices) > MOST_CHOICES:
            return kind, "" if default is None else f"`{default}`"
        return kind, " ".join([f"`{default}`;", ", ".join(f"`{choice}`" for choice in choices if choice != default)])
    limits = _format_limits(options.get("min"), options.get("max"))
    return kind, f"{_format(default)}; {limits}" if limits else _format(default)


def _option_rows(recipe: type[Recipe], defaults: bool = False) -> Iterator[tuple[str, ...]]:
    """The command line's options for the numbers of a recipe."""
    hints = get_type_hints(recipe)
    for item in fields(recipe):
        allowed = get_args(hints[item.name]) or (hints[item.name],)
        flag = f"--{item.name.replace('_', '-')}"
        if bool in allowed:
            flag = f"`{flag}`, `--no-{flag.removeprefix('--')}`"
        else:
            value = "X" if float in allowed else "N"
            flag = f"`{flag} {value}`" + (f", `{flag} full`" if type(None) in allowed else "")
        yield (flag, item.metadata["help"], *([_format(item.default)] if defaults else []))


def _preset_table(presets: Mapping[str, Recipe]) -> str:
    (recipe,) = {type(preset) for preset in presets.values()}
    rows = (
        (
            f"`{item.name}`",
            item.metadata["help"],
            _format_limits(item.metadata["low"], item.metadata["high"]),
            *(_format(getattr(preset, item.name)) for preset in presets.values()),
        )
        for item in fields(recipe)
    )
    return make_table(("setting", "meaning", "limits", *(f"`{name}`" for name in presets)), rows)


def _backbone_table() -> str:
    def place(package: Any) -> str:
        return f"package {package.requirements[0]}" if package else "hub"

    rows = ((f"`{entry.name}`", str(entry.patch), place(entry.package), entry.licence) for entry in CATALOGUE.values())
    return make_table(("name", "patch", "weights from", "licence of the weights"), rows)


def _format(value: bool | float | str | None) -> str:
    if value is None:
        return "full"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int) and (value + 1).bit_count() == 1 and value > 2**32:
        return f"2^{value.bit_length()} - 1"
    return value if isinstance(value, str) else f"{value:.12g}"


def _format_limits(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "" if low is None else f"at least {_format(low)}"
    return f"{_format(low)} to {_format(high)}"


def main() -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes the tables of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail where a page is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in render_pages().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{'out of date' if check else 'renewed'}: {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
