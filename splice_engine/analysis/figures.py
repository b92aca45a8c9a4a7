"""Figures: strips and sheets of pictures, heat maps, and loss curves."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, cycle
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import SpliceError
from ..images import from_pil, resize, sides, to_pil

INK, PAPER, RULE = (32, 32, 32), (255, 255, 255), (224, 224, 224)

HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours of a heat map from 0 to 1, at equal distances: five of matplotlib's "inferno" (CC0)."""

OPACITY = 0.7
"""Opacity of the heat map over its picture, which is grey."""

HUES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (32, 32, 32))
"""Colours of curves, distinct with any colour vision (Okabe and Ito, "Color Universal Design", 2008)."""

WINDOW = 0.02
"""Steps over which a loss curve is smoothed, as a share of its own: random crops make losses jump."""


def comparison_strip(pictures: Mapping[str, Tensor], height: int = 320, gap: int = 12) -> Image.Image:
    """Pictures side by side at one height, each under its label.

    Args:
        pictures: Label to `[1, 3, H, W]` in 0..1, in the order from left to right.
        height: Of each picture, in pixels.
        gap: Between them, in pixels.
    """
    font = ImageFont.load_default(size=max(12, height // 18))
    label = round(font.getbbox("Ag")[3] * 1.6)
    tiles = []
    for picture in pictures.values():
        image = to_pil(picture)
        tiles.append(
            image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
        )
    texts = list(pictures)
    draw = ImageDraw.Draw(tiles[0])
    widths = [max(tile.width, round(draw.textlength(text, font=font))) for tile, text in zip(tiles, texts, strict=True)]
    strip = Image.new("RGB", (sum(widths) + gap * (len(tiles) + 1), height + label + gap), PAPER)
    draw = ImageDraw.Draw(strip)
    left = gap
    for tile, text, width in zip(tiles, texts, widths, strict=True):
        draw.text((left, label // 6), text, fill=INK, font=font)
        strip.paste(tile, (left, label))
        left += width + gap
    return strip


def sheet(rows: Sequence[Mapping[str, Tensor]], height: int = 320, gap: int = 12) -> Image.Image:
    """Comparison strips one below the other; arguments as for `comparison_strip`."""
    strips = [comparison_strip(row, height, gap) for row in rows]
    page = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), PAPER)
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def heat_picture(heat: Tensor, picture: Tensor) -> Tensor:
    """Lays a heat map over a picture.

    Args:
        heat: `[B, 1, h, w]`, 0 the coldest, 1 the hottest; enlarged to the picture's size.
        picture: `[B, 3, H, W]` in 0..1, which shows through in grey.

    Returns:
        `[B, 3, H, W]` in 0..1.
    """
    place = resize(heat, sides(picture)).clamp(0, 1) * (len(HEAT) - 1)
    colours = picture.new_tensor(HEAT).div(255)
    below = place.long().clamp(max=len(HEAT) - 2)[:, 0]
    cooler, hotter = (colours[index].permute(0, 3, 1, 2) for index in (below, below + 1))
    mixed = torch.lerp(cooler, hotter, place - below[:, None])
    return torch.lerp(picture.mean(dim=1, keepdim=True).expand_as(picture), mixed, OPACITY)


def mark_point(picture: Tensor, point: Sequence[float]) -> Tensor:
    """Draws a ring around a point.

    Args:
        picture: `[1, 3, H, W]` in 0..1.
        point: x and y as shares of width and height.
    """
    image = to_pil(picture)
    x, y = point[0] * image.width, point[1] * image.height
    radius = max(5.0, min(image.size) / 40)
    draw = ImageDraw.Draw(image)
    for colour, width in ((INK, radius * 0.7), (PAPER, radius * 0.3)):  # visible on dark and on light pictures
        reach = radius + width / 2
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=max(1, round(width)))
    return from_pil(image).to(picture.device)


def loss_curves(steps: Sequence[Mapping[str, float]], size: tuple[int, int] = (960, 540)) -> Image.Image:
    """Draws the running medians of a run's losses over its steps, on a logarithmic axis.

    Args:
        steps: Losses by name, as `Step.floats()` gives and `--log` writes them; a loss may be missing from some steps.
        size: (width, height) in pixels.

    Raises:
        SpliceError: There is no loss above 0 to draw.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for index, name, loss in ((step.get("step", i), *item) for i, step in enumerate(steps) for item in step.items()):
        if name not in ("step", "seconds") and 0 < loss < math.inf:
            curves.setdefault(name, []).append((index, math.log10(loss)))
    if not curves:
        raise SpliceError("there is no loss above 0 to draw: give the log of a run that has taken a step")
    indices, powers = zip(*chain(*curves.values()), strict=True)
    low, high = math.floor(min(powers)), math.floor(max(powers)) + 1
    font_size = max(12, size[1] // 36)
    font, line = ImageFont.load_default(size=font_size), 1.4 * font_size
    draw = ImageDraw.Draw(image := Image.new("RGB", size, PAPER))
    left, right, bottom = 4 * line, size[0] - 2 * line - max(map(font.getlength, curves)), size[1] - 2 * line
    to_x: Callable[..., Any] = partial(np.interp, xp=(min(indices), max(indices)), fp=(left, right))
    to_y: Callable[..., Any] = partial(np.interp, xp=(low, high), fp=(bottom, line))
    for power in range(low, high + 1, max(1, (high - low) // 8)):
        draw.line((left, to_y(power), right, to_y(power)), RULE)
        draw.text((left - line / 2, to_y(power)), f"{10.0**power:g}", INK, font, "rm")
    for tick in np.unique(np.linspace(min(indices), max(indices), 3).round()):
        draw.text((to_x(tick), bottom + line / 2), f"step {tick:.0f}", INK, font, "mt")
    paths = []
    for (name, curve), colour in zip(curves.items(), cycle(HUES), strict=False):
        index, powers = np.transpose(curve)
        reach = int(len(curve) * WINDOW / 2)
        medians = [np.median(powers[max(0, i - reach) : i + reach + 1]) for i in range(len(curve))]
        paths.append((to_x(index), to_y(medians), name, colour))
    label = 0.0
    for rank, (x, y, name, colour) in enumerate(sorted(paths, key=lambda path: path[1][-1]), -len(paths)):
        draw.line([*zip(x, y, strict=True), (x[-1] + line / 4, y[-1])], colour, max(2, size[1] // 270), "curve")
        label = min(max(y[-1], label + line), size[1] + rank * line)
        draw.line((right + line / 2, label, right + line, label), colour, max(3, size[1] // 180))
        draw.text((right + 1.4 * line, label), name, INK, font, "lm")
    return image
