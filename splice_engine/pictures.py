"""Pictures about pictures."""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import SpliceError
from .images import from_pil, resize, sides, to_pil

INK, PAPER, RULE = (32, 32, 32), (255, 255, 255), (224, 224, 224)

HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours from cold to hot, evenly apart and ever lighter: five of matplotlib's "inferno" (CC0)."""

SHARE = 0.7
"""Of the heat's colours over a picture; the rest is the picture in grey."""

HUES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (32, 32, 32))
"""Colours that everybody can tell apart (Okabe and Ito, "Color Universal Design", 2008)."""

WINDOW = 0.02
"""Steps over which a loss curve is smoothed, as a share of all: random views make losses jump."""


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
    return torch.lerp(picture.mean(dim=1, keepdim=True).expand_as(picture), mixed, SHARE)


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
    for colour, width in ((INK, radius * 0.7), (PAPER, radius * 0.3)):  # shows on dark and on light ground
        reach = radius + width / 2
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=max(1, round(width)))
    return from_pil(image).to(picture.device)


def loss_curves(steps: Sequence[Mapping[str, float]], size: tuple[int, int] = (960, 540)) -> Image.Image:
    """Draws the losses of a run over its steps, on a logarithmic axis, each curve with its name at its end.

    Args:
        steps: One mapping of names to losses a step, as `Step.floats()` gives them and `--log` writes them; "step" is
            the index, else they are counted; "seconds" is left out. A loss may be missing from some of the steps.
        size: Width and height of the picture in pixels.

    Raises:
        SpliceError: There is no loss above 0 to be drawn.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for index, step in enumerate(steps):
        for name, value in step.items():
            if name not in ("step", "seconds") and math.isfinite(value) and value > 0:
                curves.setdefault(name, []).append((step.get("step", index), value))
    if not curves:
        raise SpliceError("there is no loss above 0 to draw: give the log of a run that has taken a step")
    width, height = size
    font = ImageFont.load_default(size=max(12, height // 36))
    line = font.getbbox("Ag")[3] * 1.25
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    names = max(draw.textlength(name, font=font) for name in curves)
    left, right, top, bottom = 5 * line, width - names - 2 * line, line, height - 2.5 * line
    places = [step for curve in curves.values() for step, _ in curve]
    values = [value for curve in curves.values() for _, value in curve]
    start, end = min(places), max(max(places), min(places) + 1)
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step - start) / (end - start)
        return x, bottom - (bottom - top) * (math.log10(value) - low) / (high - low)

    for power in range(low, high + 1, max(1, round((high - low) / 8))):
        y = at(start, 10.0**power)[1]
        draw.line((left, y, right, y), fill=RULE)
        draw.text((left - line / 2, y), f"{10.0**power:g}", fill=INK, font=font, anchor="rm")
    for share in (0.0, 0.5, 1.0):
        tick = round(start + share * (end - start))
        draw.text((at(tick, 1)[0], bottom + line / 2), f"{tick}", fill=INK, font=font, anchor="mt")
    draw.text(((left + right) / 2, height - line / 4), "step", fill=INK, font=font, anchor="mb")
    ends = []
    for index, (name, curve) in enumerate(curves.items()):
        colour = HUES[index % len(HUES)]
        reach = int(len(curve) * WINDOW / 2)
        smooth = [
            (step, statistics.median(value for _, value in curve[max(0, place - reach) : place + reach + 1]))
            for place, (step, _) in enumerate(curve)
        ]
        points = [at(*point) for point in smooth]
        draw.line([*points, points[-1]], fill=colour, width=max(2, height // 270), joint="curve")
        dot = height / 180
        x, y = points[-1]
        draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=colour)
        ends.append((y, name, colour))
    for y, (_, name, colour) in zip(
        _apart([y for y, *_ in sorted(ends)], line, height - line), sorted(ends), strict=True
    ):
        draw.line((right + line / 2, y, right + line, y), fill=colour, width=max(3, height // 180))
        draw.text((right + 1.5 * line, y), name, fill=INK, font=font, anchor="lm")
    return image


def _apart(places: list[float], distance: float, limit: float) -> list[float]:
    """Ascending places moved as little as need be for a distance between neighbours, none beyond the limit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + distance) if moved else place)
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - distance
    return moved
