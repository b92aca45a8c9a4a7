"""What the schemas of all nodes share."""

from collections.abc import Sequence
from dataclasses import fields

from comfy_api.latest import io

CATEGORY = "Splice"
"""Where all nodes are in ComfyUI's menu."""


def make_schema(group: str = "", search_aliases: Sequence[str] = (), **options) -> io.Schema:
    """A node's schema in the pack's category.

    Args:
        group: Part of the category that the node is in; "" is the pack's first page.
        search_aliases: Other words by which the node is found, where ComfyUI searches for them (0.8 does not).
        options: What `io.Schema` takes.
    """
    if search_aliases and any(field.name == "search_aliases" for field in fields(io.Schema)):
        options["search_aliases"] = list(search_aliases)
    return io.Schema(category=f"{CATEGORY}/{group}" if group else CATEGORY, **options)


def check_limits(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Has a node refuse numbers out of its widgets' limits.

    ComfyUI itself checks what is typed into a widget, and not what another node gives it.

    Raises:
        ValueError: When the node is executed with such a number.
    """
    inputs = node.define_schema().inputs
    numbers = {input.id: input for input in inputs if isinstance(input, io.Int.Input | io.Float.Input)}
    execute = node.execute.__func__

    def execute_within_limits(cls: type[io.ComfyNode], **given: object) -> io.NodeOutput:
        for name, limits in numbers.items():
            value = given.get(name)
            if isinstance(value, int | float) and not limits.min <= value <= limits.max:
                raise ValueError(f"Splice: {name} must be from {limits.min:g} to {limits.max:g}, not {value:g}")
        return execute(cls, **given)

    node.execute = classmethod(execute_within_limits)
    return node
