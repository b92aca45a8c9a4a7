"""Opens picture files: rotation and colour profile applied, deep and float values scaled, unreadable formats named."""

import importlib
import logging
import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .errors import SpliceError, pip_command

log = logging.getLogger(__name__)

OVERSHOOT = 1.5
"""Values up to so many times white may come of resampling, and are clamped."""

FLOAT_WHITE = 16
"""Floats up to this one are of a picture whose white is 1, with highlights that are brighter."""


class Plugin(NamedTuple):
    """A format that Pillow reads with a package of its own: its suffix, the package, the module that registers it."""

    suffix: str
    package: str
    module: str


PLUGINS = {
    "HEIC": Plugin(".heic", "pillow-heif", "pillow_heif.HeifImagePlugin"),
    "AVIF": Plugin(".avif", "pillow-avif-plugin", "pillow_avif"),  # newer builds of Pillow have it
    "JPEG XL": Plugin(".jxl", "pillow-jxl-plugin", "pillow_jxl"),
}

OTHERS = {
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"): "a camera's raw file: develop it to PNG or TIFF",
    (".exr", ".hdr"): "a picture of linear light: tone-map it and save it as PNG or TIFF",
    (".svg", ".pdf", ".ai"): "a drawing, not a picture of pixels: export it as PNG",
    (".mp4", ".mov", ".mkv", ".webm", ".avi"): "a video: export its frames as PNG",
}
"""Files that people take for pictures, by their suffixes."""


def open_picture(path: Path) -> Image.Image:
    """Opens a picture file, upright and in sRGB.

    Args:
        path: Any format Pillow reads, also with the packages of `PLUGINS` where they are installed.

    Returns:
        A Pillow image of any mode; grey of more than 8 bits, which Pillow would clip, has mode "F" and values in 0..1.

    Raises:
        SpliceError: The file is missing, broken, too large or not a picture.
    """
    if not path.is_file():
        raise SpliceError(f"no picture at {path}: check the path")
    try:
        image = _read(path)
    except UnidentifiedImageError:
        image = _read_with_plugin(path)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_srgb(_scale_deep_grey(image, path), path)
    return _to_srgb(image, path)


def _read(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; what cannot be read raises below
            with Image.open(path) as opened:
                opened.load()
                image = ImageOps.exif_transpose(opened)
                image.format = opened.format
                return image
    except UnidentifiedImageError:
        raise
    except Image.DecompressionBombError:
        raise SpliceError(
            f"{path} is larger than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels: shrink it first"
        ) from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise SpliceError(f"{path} is damaged ({' '.join(str(error).split())}): save or fetch it again") from None


def _read_with_plugin(path: Path) -> Image.Image:
    """Reads what Pillow alone does not know, or says what it is and what reads it."""
    name = _identify(path)
    if name is None:
        reason = next((text for suffixes, text in OTHERS.items() if path.suffix.lower() in suffixes), None)
        reason = reason or "not a picture that Pillow can read: convert it to PNG or JPEG"
        raise SpliceError(f"{path} is {reason}")
    plugin = PLUGINS[name]
    if plugin.suffix in Image.registered_extensions():
        raise SpliceError(f"{path} is damaged (a file in {name} that cannot be read): save or fetch it again")
    try:
        importlib.import_module(plugin.module)
    except ImportError:
        raise SpliceError(
            f"{path} is a picture in {name}, which is read with the package {plugin.package}: "
            f"{pip_command(plugin.package)}, or convert it to PNG or JPEG"
        ) from None
    try:
        return _read(path)
    except UnidentifiedImageError:
        raise SpliceError(f"{path} cannot be read with the package {plugin.package}: convert it to PNG") from None


def _identify(path: Path) -> str | None:
    """The name in `PLUGINS` of a file's format, by its first bytes: phones and browsers give wrong suffixes."""
    with path.open("rb") as file:
        head = file.read(32)
    if head.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return "JPEG XL"
    if head[4:8] != b"ftyp":
        return None
    brands = head[8:]
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    return "HEIC" if any(brand in brands for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")) else None


def _scale_deep_grey(image: Image.Image, path: Path) -> Image.Image:
    """Grey of 16 or 32 bits as floats in 0..1. Where the file does not tell what is white, it is guessed and said."""
    grey = np.asarray(image, dtype=np.float32)
    peak = float(grey.max())
    if image.mode != "F" and (image.mode != "I" or image.format != "TIFF"):
        white = 65535.0
    elif image.mode == "F" and not peak > FLOAT_WHITE:
        white = 1.0
    else:
        white = next((limit for limit in (255.0, 65535.0) if peak <= OVERSHOOT * limit), peak)
        log.warning("%s has values up to %g and does not tell which is white: %g is taken", path, peak, white)
    scaled = Image.fromarray((grey / white).clip(0, 1))
    scaled.info = image.info
    return scaled


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    """Converts the colours of an embedded profile, by relative colorimetry with black point compensation.

    A profile that changes no value by more than rounding is that of sRGB itself: the picture then stays as it is, bit
    for bit.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if image.mode == "F":  # through the profile's curve at 256 places
            ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
            curve = np.asarray(_convert(ramp, source), dtype=np.float32)[0].mean(axis=-1) / 255
            return Image.fromarray(np.interp(np.asarray(image), np.linspace(0, 1, 256), curve).astype(np.float32))
        rgba = image.convert("RGBA") if has_alpha(image) else None
        mode = {"LA": "L", "1": "L"}.get(image.mode, image.mode)
        direct = mode in ("L", "RGB", "CMYK", "LAB")
        plain = image.convert(mode) if direct else (rgba or image).convert("RGB")
        converted = _convert(plain, source)
        change = np.abs(np.asarray(converted, dtype=np.int16) - np.asarray(plain.convert("RGB"), dtype=np.int16))
        if change.max() <= 1:
            return image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        log.warning("%s has a broken colour profile, which is ignored (%s)", path, " ".join(str(error).split()))
        return image
    if rgba is not None:
        converted.putalpha(rgba.getchannel("A"))
    return converted


def _convert(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        source,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None
    return converted


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture has transparency of any kind."""
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
