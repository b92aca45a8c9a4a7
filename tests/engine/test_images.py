"""Pictures in and out: every mode that files come in, sizes, and the check of what the method can work with."""

import io
import itertools
import math
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from splice_engine import SpliceError, decoding, load_picture, save_picture
from splice_engine.images import check_format, check_picture, check_writable, load_alpha, resize, short_side_size

HEIGHT, WIDTH = 70, 80
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
BYTES = (COLOURS * 255).round().astype(np.uint8)
RGB = Image.fromarray(BYTES)
DEEP = (RAMP * 65535).round().astype(np.uint16)


NEWER_PILLOW = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 12, reason="older ones write it broken")


def colours(picture):
    """`[1, 3, H, W]` as an array `[H, W, 3]`."""
    return picture[0].permute(1, 2, 0).numpy()


def grey(array):
    return np.repeat(np.asarray(array, dtype=np.float64)[..., None], 3, axis=-1)


def over(colour, alpha, background):
    alpha = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return np.asarray(colour, dtype=np.float64) / 255 * alpha + np.asarray(background) / 255 * (1 - alpha)


@pytest.fixture
def written(tmp_path):
    """Saves a Pillow image and loads it through the engine."""

    def write(image, suffix=".png", background=None, **options):
        path = tmp_path / f"picture{suffix}"
        image.save(path, **options)
        return load_picture(path) if background is None else load_picture(path, background)

    return write


@pytest.mark.parametrize(
    ("image", "suffix", "expected", "tolerance"),
    [
        (RGB, ".png", COLOURS, 0.5 / 255),
        (RGB, ".bmp", COLOURS, 0.5 / 255),
        (RGB, ".tif", COLOURS, 0.5 / 255),
        (RGB.convert("L"), ".png", grey(np.asarray(RGB.convert("L")) / 255), 1e-6),
        (RGB.convert("1"), ".png", grey(np.asarray(RGB.convert("1"), dtype=np.float64)), 1e-6),
        (RGB.quantize(8), ".png", np.asarray(RGB.quantize(8).convert("RGB")) / 255, 1e-6),
        (RGB.convert("CMYK"), ".tif", COLOURS, 1 / 255),
        pytest.param(RGB.convert("YCbCr"), ".tif", COLOURS, 4 / 255, marks=NEWER_PILLOW),
        (Image.fromarray(DEEP), ".png", grey(RAMP), 1e-5),
        (Image.fromarray(DEEP), ".tif", grey(RAMP), 1e-5),
        (Image.fromarray(DEEP // 1000), ".png", grey(DEEP // 1000 / 65535), 1e-6),
        (Image.fromarray(DEEP.astype(np.int32)), ".tif", grey(RAMP), 1e-5),
        (Image.fromarray(RAMP.astype(np.float32)), ".tif", grey(RAMP), 1e-6),
        (Image.fromarray((RAMP * 255).astype(np.float32)), ".tif", grey(RAMP), 1e-6),
        (Image.fromarray((RAMP * 382).astype(np.float32)), ".tif", grey(np.minimum(RAMP * 382 / 255, 1)), 1e-6),
        (Image.fromarray((RAMP * 65535).astype(np.float32)), ".tif", grey(RAMP), 1e-6),
        (Image.fromarray((RAMP * 1.5 - 0.5).astype(np.float32)), ".tif", grey(np.maximum(RAMP * 1.5 - 0.5, 0)), 1e-6),
        (Image.fromarray((RAMP * 1.02).astype(np.float32)), ".tif", grey(np.minimum(RAMP * 1.02, 1)), 1e-6),
        (Image.fromarray((RAMP * 12).astype(np.float32)), ".tif", grey(np.minimum(RAMP * 12, 1)), 1e-6),
        (Image.fromarray(BYTES[..., 0].astype(np.int32)), ".tif", grey(BYTES[..., 0] / 255), 1e-6),
        (Image.fromarray((DEEP // 1000).astype(np.int32)), ".pgm", grey(DEEP // 1000 / 65535), 1e-6),
    ],
    ids=[
        *("RGB PNG", "RGB BMP", "RGB TIFF", "L", "1", "P", "CMYK", "YCbCr", "I;16 PNG", "I;16 TIFF", "dark I;16"),
        *("I", "F in 0..1", "F in 0..255", "F above 255", "F in 0..65535", "F below 0", "F above 1"),
        *("F with highlights", "I of 8 bits", "dark PGM"),
    ],
)
def test_modes(image, suffix, expected, tolerance, written):
    picture = written(image, suffix)
    assert picture.shape == (1, 3, HEIGHT, WIDTH)
    assert picture.dtype == torch.float32
    assert picture.is_contiguous()
    assert np.abs(colours(picture) - expected).max() <= tolerance + 1e-6


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.fromarray((RAMP * 240).astype(np.float32)), ["up to 240", "255 is taken"]),
        (Image.fromarray(DEEP.astype(np.int32)), ["up to 65535", "65535 is taken"]),
        (Image.fromarray((RAMP * 1.02).astype(np.float32)), []),
        (Image.fromarray(DEEP), []),
    ],
    ids=["F in 0..255", "I", "F above 1", "I;16"],
)
def test_a_guess_of_white_is_said(image, said, written, caplog):
    written(image, ".tif")
    assert len(caplog.messages) == bool(said)
    assert all(part in caplog.messages[0] for part in said)


def srgb_curve(value):
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def profile(colorants, curve=srgb_curve):
    """An ICC profile of version 2: the XYZ of red, green and blue under D50, or grey, and the curve of all channels."""
    curved = (curve(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2").tobytes()
    tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)}
    for letter, xyz in zip("rgb", colorants, strict=False):
        tags[f"{letter}XYZ".encode()] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in xyz))
    for letter in "rgb" if colorants else "k":
        tags[f"{letter}TRC".encode()] = b"curv\0\0\0\0" + struct.pack(">I", 1024) + curved
    place, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">2I", place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"RGB " if colorants else b"GRAY"
    header = struct.pack(">I4sI4s4s4s", place + len(body), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + table + body


P3 = profile([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)])
SRGB = profile([(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)])
LINEAR_GREY = profile([], lambda value: value)
REDDISH = Image.new("RGB", (80, 70), (220, 40, 40))
MANAGED = (240, 0, 21)
"""What another colour management makes of `REDDISH` in P3."""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_a_profile_becomes_srgb(suffix, written):
    options = {"lossless": True} if suffix == ".webp" else {"quality": 100} if suffix == ".jpg" else {}
    found = colours(written(REDDISH, suffix, icc_profile=P3, **options))[5, 5] * 255
    assert np.abs(found - MANAGED).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "P", "P with transparency"])
def test_a_profile_and_transparency(mode, tmp_path):
    image, options = REDDISH.convert("RGBA") if mode == "RGBA" else REDDISH.quantize(8), {}
    if mode == "RGBA":
        image.putalpha(Image.new("L", image.size, 51))
    elif mode != "P":
        options = {"transparency": 255}  # of the palette, and nowhere in the picture
    path = tmp_path / "a.png"
    image.save(path, icc_profile=P3, **options)
    expected = over(MANAGED, 51, (255, 255, 255)) if mode == "RGBA" else np.array(MANAGED) / 255
    assert np.abs(colours(load_picture(path))[5, 5] - expected).max() <= 4 / 255
    alpha = load_alpha(path)
    assert (alpha is None) if mode == "P" else (alpha == (0.2 if mode == "RGBA" else 1)).all()


@pytest.mark.parametrize(
    ("image", "expected"), [(Image.fromarray(BYTES[..., 0]), BYTES[..., 0] / 255), (Image.fromarray(DEEP), RAMP)]
)
def test_a_profile_of_grey(image, expected, written):
    """Linear light becomes what sRGB encodes it as."""
    found = srgb_curve(colours(written(image, ".tif", icc_profile=LINEAR_GREY)))
    assert np.abs(found - grey(expected)).max() <= 2 / 255


@pytest.mark.parametrize(("embedded", "said"), [(SRGB, False), (P3[:300], True), (b"no profile", True)])
def test_other_profiles_leave_the_picture_as_it_is(embedded, said, written, caplog):
    """sRGB itself bit for bit, and a broken one with a line."""
    assert np.abs(colours(written(RGB, icc_profile=embedded)) - BYTES / 255).max() < 1e-6
    assert len(caplog.messages) == said
    assert not said or "broken colour profile, which is ignored" in caplog.messages[0]


HEIF = b"\0\0\0\x18ftyp"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("phone.heic", HEIF + b"heic\0\0\0\0mif1heic", ["HEIC", "pip install pillow-heif"]),
        ("renamed.jpg", HEIF + b"mif1\0\0\0\0mif1heic", ["HEIC", "pip install pillow-heif"]),
        ("a.jxl", b"\xff\x0a" + bytes(40), ["JPEG XL", "pip install pillow-jxl-plugin"]),
        ("boxed.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), ["JPEG XL"]),
        ("camera.NEF", b"MM\0\x2a", ["camera's raw file", "develop"]),
        ("light.exr", b"\x76\x2f\x31\x01", ["linear light", "tone-map"]),
        ("drawing.svg", b"<svg/>", ["drawing", "export"]),
        ("clip.mp4", HEIF + b"isom\0\0\0\0", ["video", "frames"]),
    ],
)
def test_a_format_that_pillow_cannot_read_is_named(name, content, parts, tmp_path, monkeypatch):
    for plugin in decoding.PLUGINS.values():
        monkeypatch.setitem(sys.modules, plugin.module, None)  # as if it were not installed
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpliceError) as refusal:
        load_picture(tmp_path / name)
    assert all(part in str(refusal.value) for part in [name, *parts])
    assert "\n" not in str(refusal.value)


def test_an_installed_package_reads_its_format(tmp_path):
    """It is imported only where a file needs it."""
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    heif.from_pillow(RGB).save(path, quality=95)
    code = f"from splice_engine import load_picture; print(load_picture({str(path)!r}).mean().item())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(child.stdout) == pytest.approx(COLOURS.mean(), abs=0.02)


def test_cmyk_jpeg(written):
    assert np.abs(colours(written(RGB.convert("CMYK"), ".jpg", quality=100)) - COLOURS).mean() < 0.02


@pytest.mark.parametrize("background", [None, (255, 0, 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_lies_over_the_background(mode, background, written):
    alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    if mode == "P":  # one palette entry is transparent
        image = RGB.quantize(8)
        options, alpha = {"transparency": 3}, np.where(np.asarray(image) == 3, 0, 255)
        base = image.convert("RGB")
    else:
        base = RGB.convert("L").convert("RGB") if mode == "LA" else RGB
        image, options = base.convert("RGBA"), {}
        image.putalpha(Image.fromarray(alpha))
        image = image.convert("LA") if mode == "LA" else image
        if mode == "PA":
            base = RGB.quantize(8).convert("RGB")
            image = RGB.quantize(8)
            image.putalpha(Image.fromarray(alpha))
    suffix = ".tif" if mode == "PA" else ".png"
    picture = written(image, suffix, background, **options)
    assert np.abs(colours(picture) - over(base, alpha, background or (255, 255, 255))).max() <= 1.01 / 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_exif_rotation(orientation, suffix, written):
    """The orientation tag tells how to turn what is stored; these turn the upright picture into what is stored."""
    stored = {
        1: BYTES,
        2: BYTES[:, ::-1],
        3: BYTES[::-1, ::-1],
        4: BYTES[::-1],
        5: BYTES.transpose(1, 0, 2),
        6: np.rot90(BYTES, 1),
        7: BYTES[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(BYTES, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = written(Image.fromarray(np.ascontiguousarray(stored)), suffix, exif=exif)
    assert picture.shape == (1, 3, HEIGHT, WIDTH)
    assert np.abs(colours(picture) - BYTES / 255).mean() < (0.02 if suffix == ".jpg" else 1e-6)


def test_deep_grey_is_rotated_too(written):
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = written(Image.fromarray(DEEP[::-1, ::-1].copy()), ".tif", exif=exif)
    assert np.abs(colours(picture) - grey(RAMP)).max() < 1e-4


def test_alpha_is_read_as_it_was_written(tmp_path):
    alpha = torch.linspace(0, 1, WIDTH).mul(255).round().div(255).expand(1, 1, HEIGHT, WIDTH)
    path = tmp_path / "picture.png"
    save_picture(torch.full((1, 3, HEIGHT, WIDTH), 0.2), path, alpha)
    assert torch.equal(load_alpha(path), alpha)
    save_picture(torch.full((1, 3, HEIGHT, WIDTH), 0.2), path, overwrite=True)
    assert load_alpha(path) is None


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".PNG"])
def test_round_trip_is_exact(suffix, tmp_path):
    picture = torch.randint(256, (1, 3, 65, 91), generator=torch.Generator().manual_seed(0)).float() / 255
    save_picture(picture, tmp_path / f"a{suffix}")
    assert torch.equal(load_picture(tmp_path / f"a{suffix}"), picture)


def test_values_are_rounded_and_clamped(tmp_path):
    values = torch.tensor([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.7]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    save_picture(values, tmp_path / "a.png")
    assert (load_picture(tmp_path / "a.png")[0, 0, 0] * 255).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".jfif"])
def test_jpeg_drops_transparency(suffix, tmp_path):
    save_picture(torch.full((1, 3, 64, 64), 0.5), tmp_path / f"a{suffix}", torch.zeros(1, 1, 64, 64))
    assert load_picture(tmp_path / f"a{suffix}").mean().item() == pytest.approx(0.5, abs=0.01)


def test_overwriting_is_refused_unless_asked_for(tmp_path):
    path = tmp_path / "a.png"
    save_picture(torch.zeros(1, 3, 64, 64), path)
    before = path.read_bytes()
    with pytest.raises(SpliceError, match=r"there already.*--overwrite"):
        save_picture(torch.ones(1, 3, 64, 64), path)
    assert path.read_bytes() == before
    save_picture(torch.ones(1, 3, 64, 64), path, overwrite=True)
    assert load_picture(path).min() == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    save_picture(torch.zeros(1, 3, 64, 64), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("suffix", sorted(Image.registered_extensions()))
def test_a_format_that_is_let_through_before_the_work_can_be_written_after_it(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    refused = None
    try:
        check_writable(path)
    except SpliceError as error:
        refused = str(error)
    if refused is None:
        save_picture(torch.rand(1, 3, 64, 64), path)
        assert path.stat().st_size > 0
    else:
        assert "no picture format" in refused


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jfif", ".webp", ".tif", ".bmp"])
def test_what_a_format_cannot_hold_is_said_before_the_work(suffix, tmp_path):
    """A picture just within the limit of a side can be written."""
    path = tmp_path / f"a{suffix}"
    longest = {".jpg": 65_500, ".jfif": 65_500, ".webp": 16_383}.get(suffix)
    if longest is not None:
        with pytest.raises(SpliceError, match=rf"at most {longest} pixels.*\.png"):
            check_format(path, (1, longest + 1))
    check_format(path, (longest or 70_000, 1))
    save_picture(torch.rand(1, 3, longest or 70_000, 1), path)
    if suffix in (".jpg", ".jfif"):
        with pytest.raises(SpliceError, match=r"transparency.*\.png"):
            check_format(path, (1, 1), alpha=True)
    else:
        check_format(path, (1, 1), alpha=True)


def encoded(format):
    stream = io.BytesIO()
    RGB.save(stream, format)
    return stream.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.2, 0.5, 0.9])
def test_truncated_files(format, share, tmp_path):
    if format == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    whole = encoded(format)
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SpliceError, match=r"damaged|not a picture") as refusal:
        load_picture(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "AVIF"])
def test_files_with_a_hole(format, tmp_path):
    if format == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    damaged = bytearray(encoded(format))
    start, length = int(len(damaged) * 0.9), len(damaged) // 10
    damaged[start : start + length] = bytes(length)
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(damaged)
    with pytest.raises(SpliceError, match="damaged") as refusal:
        load_picture(path)
    assert "\n" not in str(refusal.value)


def not_numbers(path):
    grid = RAMP.astype(np.float32)
    grid[3, 4] = np.nan
    Image.fromarray(grid).save(path)


def bomb(path):
    """The beginning of a PNG of 900 megapixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", bytes(100)))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("missing.png", lambda path: None, "no picture at"),
        ("folder.png", lambda path: path.mkdir(), "no picture at"),
        ("text.png", lambda path: path.write_text("not a picture\n"), "not a picture"),
        ("empty.png", lambda path: path.write_bytes(b""), "not a picture"),
        ("bomb.png", bomb, "megapixels"),
        ("nan.tif", not_numbers, "not numbers"),
    ],
)
def test_files_that_are_no_pictures(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(SpliceError, match=message):
        check_picture(load_picture(tmp_path / name))


@pytest.mark.parametrize("size", [(64, 64), (100, 799), (512, 512), (1080, 1920), (3000, 401), (223, 225)], ids=str)
def test_short_side_size(size):
    for short, longest, multiple in itertools.product((56, 224, 400), (None, 480, 300), (1, 8, 14, 16)):
        height, width = short_side_size(*size, short, longest, multiple)
        scale = short / min(size)
        if longest is not None:
            scale = min(scale, longest / max(size))
            assert max(height, width) <= longest, (short, longest, multiple)
        for got, side in ((height, size[0]), (width, size[1])):
            assert got % multiple == 0, (short, longest, multiple)
            assert got >= multiple, (short, longest, multiple)
            # Within half a multiple of the exact aspect, but where `longest` or the smallest multiple is in the way.
            room = multiple / 2 if longest is None or side * scale <= longest - longest % multiple else multiple
            assert abs(got - side * scale) <= max(room, multiple - side * scale) + 1e-6, (short, longest, multiple)


@pytest.mark.parametrize("size", [(64, 80), (35, 97), (200, 50)], ids=str)
def test_resize_keeps_flat_colour_and_mean(size):
    flat = torch.full((1, 3, 70, 83), 0.3)
    assert (resize(flat, size) - 0.3).abs().max() < 1e-6
    waves = torch.rand(1, 3, 70, 83, generator=torch.Generator().manual_seed(0))
    assert resize(waves, size).shape == (1, 3, *size)
    assert resize(waves, size).mean().item() == pytest.approx(waves.mean().item(), abs=0.01)


def test_shrinking_is_antialiased():
    """Each pixel is a mean over all that it stands for; over the four nearest alone, the noise would be twice that."""
    noise = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert 0.03 < resize(noise, (64, 64)).std() < 0.08


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.zeros(1, 3, 63, 300), "300x63 pixels.*at least 64.*enlarge"),
        (torch.zeros(1, 3, 1, 1), "1x1 pixels.*at least 64"),
        (torch.zeros(1, 3, 0, 0), "0x0 pixels"),
        (torch.zeros(1, 3, 64, 513), "513x64 pixels.*8 times.*crop"),
        (torch.zeros(2, 3, 64, 64), r"one RGB picture.*\[2, 3, 64, 64\]"),
        (torch.zeros(1, 4, 64, 64), r"one RGB picture.*\[1, 4, 64, 64\]"),
        (torch.zeros(64, 64, 3), "one RGB picture"),
        (torch.zeros(64, 64), "one RGB picture"),
        (torch.full((1, 3, 64, 64), math.nan), "not numbers"),
        (torch.zeros(1, 3, 64, 64).index_fill(3, torch.tensor(7), math.nan), "not numbers"),
        (torch.zeros(1, 3, 64, 64).index_fill(2, torch.tensor(7), math.inf), "not numbers"),
        (torch.zeros(1, 3, 64, 64).index_fill(2, torch.tensor(7), -math.inf), "not numbers"),
        (torch.randint(256, (1, 3, 64, 64)).float(), r"0 to 2.*0\.\.1.*divide by 255$"),
        (torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8), "divide by 255$"),
        (torch.linspace(0, 65535, 64).expand(1, 3, 64, 64), "divide by 65535$"),
        (torch.linspace(0, 5, 64).expand(1, 3, 64, 64), "brighter than white"),
        (torch.linspace(-1, 1, 64).expand(1, 3, 64, 64), r"from -1 to 1, .* add 1 and divide by 2"),
        (torch.full((1, 3, 64, 64), -1.0), "values from -1 to -1.*negative"),
        (-torch.linspace(0, 1, 64).expand(1, 3, 64, 64), "values from -1 to 0, .*negative"),
    ],
)
def test_check_picture_says_what_is_wrong(picture, message):
    with pytest.raises(SpliceError, match=message) as refusal:
        check_picture(picture, "structure picture")
    assert str(refusal.value).startswith("the structure picture ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("picture", "shape"),
    [
        (torch.full((3, 64, 512), 0.5), (1, 3, 64, 512)),
        (torch.full((1, 3, 64, 64), 1.4, dtype=torch.float64), (1, 3, 64, 64)),
        (torch.full((1, 3, 99, 64), -0.4, dtype=torch.bfloat16), (1, 3, 99, 64)),
        (torch.full((1, 3, 64, 64), 0.5, requires_grad=True), (1, 3, 64, 64)),
    ],
)
def test_check_picture_passes_on_what_is_right(picture, shape):
    checked = check_picture(picture)
    assert checked.shape == shape
    assert checked.dtype == torch.float32
    assert not checked.requires_grad
    assert torch.equal(checked, picture.detach().float().clamp(0, 1).view(shape))
