"""Writes clips a frame at a time, videos with their source's times and sound; a clip appears whole or not at all."""

import io
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .clips import RATE, Clip, Frame, NewClip, VideoClip, import_av
from .errors import SpliceError
from .files import atomic_path, check_place, write_error
from .images import save_picture, to_pil

VIDEOS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""Endings of videos that are written, in H.264, and FFmpeg's names of their formats."""

CRF = "17"
"""Constant rate factor of x264: visually lossless."""

BT709 = 1
"""Number of that colour space in H.264; without it players guess by the size."""

Write = Callable[[Tensor, Frame], None]
"""Writes a picture `[1, 3, H, W]` in 0..1 in place of a frame."""


def is_video(path: Path) -> bool:
    """Whether a path names a video, and not a folder of frames.

    Raises:
        SpliceError: It names another kind of file.
    """
    if path.suffix.lower() in VIDEOS:
        return True
    if path.suffix and not path.is_dir():
        kinds = ", ".join(VIDEOS)
        raise SpliceError(f"cannot write {path}: end the name in one of {kinds}, or name a folder for the frames")
    return False


def check_clip_writable(path: Path, source: Clip | NewClip, overwrite: bool = False) -> None:
    """Checks, before the work, that a clip can be written with its source's sound.

    Raises:
        SpliceError: An unknown format, something that is there already, no right to write, a package that is missing,
            or sound that the format cannot hold.
    """
    if not is_video(path):
        if not path.is_dir():
            check_place(path)
        elif any(path.iterdir()) and not overwrite:
            raise SpliceError(f"{path} has files in it: choose an empty folder, or --overwrite those of equal names")
        return
    check_place(path, overwrite)
    av = import_av()
    try:
        with av.open(io.BytesIO(), "w", format=VIDEOS[path.suffix.lower()]) as container, ExitStack() as stack:
            _add_track(container, source)
            stack.enter_context(_copied_sound(container, source))
            container.start_encoding()
    except (av.FFmpegError, ValueError) as error:
        reason = " ".join(str(error).split())
        what = f"the sound of {source.path}" if isinstance(source, VideoClip) else "the frames"
        raise SpliceError(f"{path.suffix} cannot hold {what} ({reason}): end the name in .mkv") from None


@contextmanager
def write_clip(path: Path, source: Clip | NewClip, overwrite: bool = False) -> Iterator[Write]:
    """Yields what writes the frames of a clip, one after the other; at the end of the block they are in their place.

    Args:
        path: A video, by its ending, or a folder.
        source: The clip whose frames are replaced, of which a video gets rate, times and sound; or a new one.
        overwrite: Whether files that are there may be replaced.

    Raises:
        SpliceError: The system or the format refuses.
    """
    if is_video(path):
        with _write_video(path, source) as write:
            yield write
    else:
        with _write_folder(path, overwrite) as write:
            yield write


@contextmanager
def _write_folder(path: Path, overwrite: bool) -> Iterator[Write]:
    """The frames go into a folder beside the place, which then takes it."""
    temporary = path.with_name(f".splice-{secrets.token_hex(6)}")
    try:
        temporary.mkdir()
        yield lambda picture, frame: save_picture(picture, temporary / f"{frame.name}.png")
        if path.is_dir():
            for file in list(temporary.iterdir()):
                file.replace(path / file.name)
        else:
            temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _write_video(path: Path, source: Clip | NewClip) -> Iterator[Write]:
    av = import_av()
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(path))
        try:
            container = stack.enter_context(av.open(str(temporary), "w"))
            video = _add_track(container, source)
            sound = stack.enter_context(_copied_sound(container, source))

            def write(picture: Tensor, frame: Frame) -> None:
                sound(frame.time)
                encoded = av.VideoFrame.from_image(to_pil(_with_even_sides(picture)))
                encoded = encoded.reformat(format=video.pix_fmt, dst_colorspace="ITU709")
                encoded.time_base = video.codec_context.time_base
                encoded.pts = round(frame.time / encoded.time_base)
                container.mux(video.encode(encoded))

            yield write
            container.mux(video.encode())
            sound(None)
        except (av.FFmpegError, OSError) as error:
            raise write_error(path, error) from None


def _add_track(container: Any, source: Clip | NewClip) -> Any:
    """The track of the pictures, with the rate, the clock and the shape of pixels of its source."""
    rate = source.rate if isinstance(source, VideoClip) else RATE
    video = container.add_stream("libx264", rate=rate, options={"crf": CRF})
    video.height, video.width = (side + side % 2 for side in source.size)
    video.pix_fmt = "yuv420p"
    context = video.codec_context
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.time_base = 1 / rate
    if isinstance(source, VideoClip):
        with source.open() as opened:
            track = opened.streams.video[0]
            context.time_base = track.time_base  # frames of a variable rate keep their times
            if track.sample_aspect_ratio:
                context.sample_aspect_ratio = track.sample_aspect_ratio
    return video


@contextmanager
def _copied_sound(container: Any, source: Clip | NewClip) -> Iterator[Callable[[Fraction | None], None]]:
    """Yields what copies a video's sound up to a time, or for None to its end, untouched."""
    if not isinstance(source, VideoClip):
        yield lambda until: None
        return
    with source.open() as opened:
        tracks = {track.index: container.add_stream_from_template(track) for track in opened.streams.audio}
        packets = (packet for packet in opened.demux(list(opened.streams.audio)) if packet.dts is not None)
        waiting = next(packets, None) if tracks else None

        def copy(until: Fraction | None) -> None:
            nonlocal waiting
            while waiting is not None and (until is None or waiting.dts * waiting.time_base <= until):
                waiting.stream = tracks[waiting.stream.index]
                container.mux(waiting)
                waiting = next(packets, None)

        yield copy


def _with_even_sides(picture: Tensor) -> Tensor:
    """A picture whose last row and column are repeated where H.264, which halves the colours, needs it."""
    height, width = picture.shape[-2:]
    return F.pad(picture, (0, width % 2, 0, height % 2), mode="replicate")
