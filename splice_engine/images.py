"""Reading, writing, checking and resizing pictures and masks.

An engine picture is a `[B, 3, H, W]` float32 tensor in 0..1, sRGB; a mask is `[1, 1, H, W]`, likewise, with 1 selected.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .decoding import FLOAT_WHITE, OVERSHOOT, has_alpha, open_picture
from .errors import SpliceError
from .files import atomic_path, check_place, write_error
from .resampling import lacks_antialiasing, resize_bilinear

MIN_SIDE = 64
"""Shortest side in pixels: below it the generator's deepest level has too few places to normalise over."""

MAX_ASPECT = 8
"""Largest ratio of the sides: beyond it the short side has too few patches for the ViT."""

LEAST_MASK = 0.01
"""A mask that is below it everywhere selects nothing: the change would hardly be visible."""

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
WRITABLE = (".png", *JPEG, ".webp", ".tif", ".tiff", ".bmp")

MOST_PIXELS = {**dict.fromkeys(JPEG, 65_500), ".webp": 16_383}
"""Most pixels of a side, for formats with a limit that pictures meet."""


def load_picture(path: str | Path, background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """Reads a picture file.

    EXIF rotation is applied and an embedded colour profile converted; 16-bit, float, grey, palette and CMYK pictures
    become RGB; transparency is blended with `background`.

    Args:
        path: Any format Pillow reads.
        background: sRGB colour, 0..255, behind transparent pixels.

    Returns:
        `[1, 3, H, W]`, float32, 0..1.

    Raises:
        SpliceError: The file is missing, broken or not a picture.
    """
    image = open_picture(Path(path))
    if image.mode == "F":
        return torch.from_numpy(np.array(image))[None, None].repeat(1, 3, 1, 1)
    if has_alpha(image):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba)
    return from_pil(image)


def load_alpha(path: str | Path) -> Tensor | None:
    """Reads the transparency of a picture file.

    Returns:
        `[1, 1, H, W]` in 0..1 with 1 opaque, or None where it has none.

    Raises:
        SpliceError: The file is missing, broken or not a picture.
    """
    image = open_picture(Path(path))
    return _to_tensor(image.convert("RGBA").getchannel("A")) if has_alpha(image) else None


def load_mask(path: str | Path) -> Tensor:
    """Reads a mask file: its transparency where it has some (opaque is selected), else its brightness.

    Args:
        path: Any format Pillow reads. White is selected and black is not; of a colour the largest channel counts.

    Returns:
        `[1, 1, H, W]`, float32, 0..1.

    Raises:
        SpliceError: The file is missing, broken or not a picture.
    """
    alpha = load_alpha(path)
    return alpha if alpha is not None and alpha.min() < 1 else load_picture(path).amax(dim=1, keepdim=True)


def save_picture(picture: Tensor, path: str | Path, alpha: Tensor | None = None, overwrite: bool = False) -> None:
    """Writes one picture; the file appears whole or not at all.

    Args:
        picture: `[1, 3, H, W]`, 0..1.
        path: Its suffix names the format.
        alpha: Optional `[1, 1, H, W]` transparency, for formats that have it.
        overwrite: Whether an existing file may be replaced.

    Raises:
        SpliceError: The file exists, the format is unknown, or the system refuses to write it.
    """
    path = Path(path)
    check_writable(path, overwrite)
    image = to_pil(picture)
    if alpha is not None:
        image.putalpha(Image.fromarray(_to_bytes(alpha)[..., 0]))
    if path.suffix.lower() in JPEG:
        image = image.convert("RGB")
    try:
        with atomic_path(path) as temporary:
            image.save(temporary, quality=95)
    except (OSError, ValueError) as error:
        raise write_error(path, error) from None


def check_writable(path: Path, overwrite: bool = False) -> None:
    """Checks that a picture can be written, so that an error comes before the work and not after it.

    Args:
        path: Its suffix names the format.
        overwrite: Whether an existing file may be replaced.

    Raises:
        SpliceError: Unknown format, missing folder, no right to write, or a file that exists.
    """
    if path.suffix.lower() not in WRITABLE:
        raise SpliceError(f"cannot write {path}: '{path.suffix}' is no picture format; end the name in .png or .jpg")
    check_place(path, overwrite)


def check_format(path: Path, size: tuple[int, int], alpha: bool = False) -> None:
    """Checks that a file's format holds a picture, likewise before the work.

    Args:
        path: Its suffix names the format.
        size: (height, width) of the picture.
        alpha: Whether its transparency is to be kept.

    Raises:
        SpliceError: The picture is too large for the format, or the format has no transparency.
    """
    suffix = path.suffix.lower()
    most = MOST_PIXELS.get(suffix)
    if most is not None and max(size) > most:
        raise SpliceError(f"cannot write {path}: {suffix} holds at most {most} pixels a side; end the name in .png")
    if alpha and suffix in JPEG:
        raise SpliceError(f"cannot keep the transparency in {path}: {suffix} has none; end the name in .png")


def check_picture(picture: Tensor, what: str = "picture") -> Tensor:
    """Checks a single picture and brings it to `[1, 3, H, W]` float32, clamped to 0..1.

    Args:
        picture: `[1, 3, H, W]` or `[3, H, W]`, 0..1.
        what: Its name in error messages.

    Raises:
        SpliceError: Wrong shape, too small, too narrow, or values that are not finite or far outside 0..1.
    """
    if picture.ndim == 3:
        picture = picture[None]
    if picture.ndim != 4 or picture.shape[0] != 1 or picture.shape[1] != 3:
        raise SpliceError(f"the {what} must be one RGB picture [1, 3, H, W], not {list(picture.shape)}")
    height, width = sides(picture)
    if min(height, width) < MIN_SIDE:
        raise SpliceError(f"the {what} is {width}x{height} pixels: each side needs at least {MIN_SIDE}; enlarge it")
    if max(height, width) > MAX_ASPECT * min(height, width):
        limit = f"the long side may be at most {MAX_ASPECT} times the short one"
        raise SpliceError(f"the {what} is {width}x{height} pixels: {limit}; crop it")
    picture = picture.detach().float()
    low, high = picture.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise SpliceError(f"the {what} has pixels that are not numbers (NaN or infinite): fix the step that made it")
    _check_range(low.item(), high.item(), what)
    return picture.clamp(0, 1)


def check_mask(mask: Tensor, what: str = "mask") -> Tensor:
    """Checks a mask and brings it to `[1, 1, H, W]` float32, clamped to 0..1.

    Args:
        mask: `[1, 1, H, W]`, `[1, H, W]` or `[H, W]`, 0..1 with 1 selected, of any size.
        what: Its name in error messages.

    Raises:
        SpliceError: Wrong shape, values that are not finite or far outside 0..1, or a mask that selects nothing.
    """
    if mask.ndim in (2, 3):
        mask = mask[(None,) * (4 - mask.ndim)]
    if mask.ndim != 4 or mask.shape[:2] != (1, 1) or not mask.numel():
        raise SpliceError(f"the {what} must be one mask [1, 1, H, W], not {list(mask.shape)}")
    mask = mask.detach().float()
    low, high = mask.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise SpliceError(f"the {what} has values that are not numbers (NaN or infinite): fix the step that made it")
    _check_range(low.item(), high.item(), what)
    if high < LEAST_MASK:
        raise SpliceError(f"the {what} selects nothing: make what it should select white (1) and the rest black (0)")
    return mask.clamp(0, 1)


def _check_range(low: float, high: float, what: str) -> None:
    """Raises a SpliceError, which says what to do, where values are far outside 0..1."""
    if low >= -0.5 and high <= OVERSHOOT:
        return
    if low < -0.5:
        signed = low >= -1.5 and 0.5 < high <= 1.5
        advice = "of a range of -1..1, add 1 and divide by 2" if signed else "fix the step that made the negative ones"
    elif high <= FLOAT_WHITE:
        advice = "brighter than white, so tone-map or clamp them"
    else:
        advice = f"divide by {255 if high <= OVERSHOOT * 255 else 65_535}"
    raise SpliceError(f"the {what} has values from {low + 0.0:.3g} to {high + 0.0:.3g}, not in 0..1: {advice}")


def sides(picture: Tensor) -> tuple[int, int]:
    """(height, width) of `[..., H, W]`."""
    return picture.shape[-2], picture.shape[-1]


def resize(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes `[B, C, H, W]` to `size` = (height, width): bilinear, antialiased where it shrinks; differentiable."""
    return picture if sides(picture) == size else resize_bilinear(picture, size)


def enlarge(grid: Tensor, size: tuple[int, int], smooth: bool = True) -> Tensor:
    """Resizes a patch grid `[B, C, h, w]` to `size` = (height, width) in pixels.

    Args:
        grid: Values of the patches.
        size: (height, width).
        smooth: Bicubic between the patches' centres, antialiased where it shrinks; otherwise each patch is a block.
    """
    if not smooth:
        return F.interpolate(grid, size, mode="nearest-exact")
    shrinks = size[0] < sides(grid)[0] or size[1] < sides(grid)[1]
    if shrinks and lacks_antialiasing(grid.device):
        return enlarge(grid.cpu(), size).to(grid.device)
    return F.interpolate(grid, size, mode="bicubic", align_corners=False, antialias=shrinks)


def short_side_size(
    height: int, width: int, short: int, longest: int | None = None, multiple: int = 1
) -> tuple[int, int]:
    """The (height, width) of a picture that is resized to a short side of `short` pixels.

    Args:
        height: Pixels.
        width: Pixels.
        short: Short side to resize to, in pixels.
        longest: Upper limit of the long side; where it binds, the whole picture gets smaller.
        multiple: Both sides are rounded to the nearest multiple of this, as a patch grid needs.
    """
    scale = short / min(height, width)
    if longest is not None:
        scale = min(scale, longest / max(height, width))

    most = longest // multiple if longest is not None else None

    def to_multiple(side: int) -> int:
        count = max(1, round(side * scale / multiple))
        return (count if most is None else min(count, most)) * multiple

    return to_multiple(height), to_multiple(width)


def to_pil(picture: Tensor) -> Image.Image:
    """Converts one picture `[1, 3, H, W]` (or `[3, H, W]`) in 0..1 to an 8-bit Pillow image."""
    return Image.fromarray(_to_bytes(picture))


def from_pil(image: Image.Image) -> Tensor:
    """Converts a Pillow image to an engine picture `[1, 3, H, W]`."""
    return _to_tensor(image.convert("RGB"))


def _to_tensor(image: Image.Image) -> Tensor:
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(np.atleast_3d(array).transpose(2, 0, 1)[None].copy())


def _to_bytes(picture: Tensor) -> np.ndarray:
    if picture.ndim == 4:
        picture = picture[0]
    bytes_ = picture.detach().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return bytes_.permute(1, 2, 0).contiguous().numpy()
