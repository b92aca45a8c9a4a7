"""Pictures about pictures."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .images import to_pil

INK, PAPER = (32, 32, 32), (255, 255, 255)


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
