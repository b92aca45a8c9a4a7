"""What the schemas of all nodes share."""

from collections.abc import Sequence
from dataclasses import fields

from comfy_api.latest import io

CATEGORY = "Splice"
"""Where all nodes are in ComfyUI's menu."""


def make_schema(search_aliases: Sequence[str] = (), **options) -> io.Schema:
    """A node's schema in the pack's category.

    Args:
        search_aliases: Other words by which the node is found, where ComfyUI searches for them (0.8 does not).
        options: What `io.Schema` takes.
    """
    if search_aliases and any(field.name == "search_aliases" for field in fields(io.Schema)):
        options["search_aliases"] = list(search_aliases)
    return io.Schema(category=CATEGORY, **options)
