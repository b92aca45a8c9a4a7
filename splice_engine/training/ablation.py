"""Ablation: the same recipe without one of its losses at a time (paper, figure of the ablation)."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from ..errors import SpliceError
from ..settings import Settings
from ..vit.backbone import Backbone
from .transfer import Transfer

WEIGHT_SUFFIX = "_weight"
"""End of the names of the losses' weights in the settings."""


def ablation(
    structure: Tensor, appearance: Tensor, backbone: Backbone, settings: Settings
) -> Iterator[tuple[str, Transfer]]:
    """One run with all losses of a recipe, then one without each of them.

        for name, run in ablation(structure, appearance, backbone, preset("paper")):
            for step in run:
                ...
            pictures[name] = run.image()

    Args:
        structure: `[1, 3, H, W]` in 0..1.
        appearance: Likewise, of any size.
        backbone: The frozen ViT of the losses and of the matching, the same for all runs.
        settings: The recipe; losses of weight 0 are not in it.

    Yields:
        A name, "all losses" or "no structure", …, and a run that has not begun. A run is made when its turn comes.

    Raises:
        SpliceError: There are fewer than two losses, or a picture that `check_picture` refuses.
    """
    for name, changed in ablation_settings(settings).items():
        yield name, Transfer(structure, appearance, backbone, changed)


def ablation_settings(settings: Settings) -> dict[str, Settings]:
    """The recipes of an ablation.

    Args:
        settings: The recipe; losses of weight 0 are not in it.

    Returns:
        By their names: "all losses" the recipe itself, "no structure", … without one of its losses.

    Raises:
        SpliceError: It has fewer than two losses, so that none can be left out.
    """
    weights = [
        item.name for item in fields(settings) if item.name.endswith(WEIGHT_SUFFIX) and getattr(settings, item.name) > 0
    ]
    if len(weights) < 2:
        raise SpliceError("an ablation needs at least two losses: give two of the weights a value above 0")
    changes: dict[str, dict[str, Any]] = {name.removesuffix(WEIGHT_SUFFIX): {name: 0.0} for name in weights}
    without = {f"no {loss}": replace(settings, **change) for loss, change in changes.items()}
    return {"all losses": settings, **without}


def ablation_rows(structure: Tensor, appearance: Tensor, results: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of an ablation's sheet: the pair and the first result, and below them the others if there are any.

    Args:
        structure: `[1, 3, H, W]` in 0..1.
        appearance: Likewise.
        results: The runs' pictures by their names, in the order of `ablation`.

    Returns:
        For each row, pictures by their captions.
    """
    first, *others = results.items()
    rows = [{"structure": structure, "appearance": appearance, **dict([first])}]
    return [*rows, dict(others)] if others else rows
