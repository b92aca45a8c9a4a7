"""Clips: videos and folders of pictures, read and written a frame at a time, so that any length will do."""

import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import SpliceError, import_extra
from .images import check_picture, load_mask, load_picture, sides

RATE = Fraction(24)
"""Frames a second of a folder, which does not tell."""

MISSING_SHARE = 0.02
"""Share of its length that the end of a whole video may lack: containers round, and count sound that goes on."""

SKIPPED = re.compile(r"^\.|^thumbs\.db$|^desktop\.ini$", re.IGNORECASE)
"""Files that systems put into folders by themselves."""


class Frame(NamedTuple):
    """One frame of a clip.

    Attributes:
        picture: `[1, 3, H, W]` in 0..1.
        time: When it is shown, in seconds.
        name: Of its file; frames of videos are numbered.
    """

    picture: Tensor
    time: Fraction
    name: str


class FolderClip:
    """The pictures of a folder in the order of their names; numbers in them count as numbers.

    Args:
        path: The folder.

    Attributes:
        size: (height, width) of every frame.

    Raises:
        SpliceError: The folder has no pictures, or pictures of several sizes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = [file for file in path.iterdir() if file.is_file() and not SKIPPED.match(file.name)]
        self.files = sorted(found, key=lambda file: [int(t) if t.isdecimal() else t for t in _split(file.name)])
        if not self.files:
            raise SpliceError(f"there are no pictures in {path}: name a folder of frames, or a video")
        self.size = _read_size(self.files[0])
        for file in self.files:
            _check_size(_read_size(file), self.size, str(file), self.files[0].name)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Frame]:
        for index, file in enumerate(self.files):
            picture = check_picture(load_picture(file), str(file))
            _check_size(sides(picture), self.size, str(file), self.files[0].name)
            yield Frame(picture, index / RATE, file.stem)

    def masks(self) -> Iterator[Tensor]:
        """The pictures as masks, `[1, 1, H, W]` in 0..1."""
        return map(load_mask, self.files)


class VideoClip:
    """The frames of a video file, upright.

    Args:
        path: Any format that PyAV reads.

    Attributes:
        size: (height, width) of every frame.
        rate: Mean number of frames a second.

    Raises:
        SpliceError: PyAV is not installed, the file is missing or no video, or it ends in the middle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise SpliceError(f"no video or folder of frames at {path}: check the path")
        self._count, self.rate = self._scan()
        self.size = sides(next(iter(self)).picture)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Frame]:
        av = import_av()
        size: tuple[int, int] | None = None
        with self.open() as container:
            # Never with threads for frames: they decode ahead and log in Python, and closing the file waits for them
            # while it keeps Python waiting.
            frames = enumerate(container.decode(container.streams.video[0]))
            while True:
                try:
                    index, frame = next(frames)
                except StopIteration:
                    return
                except av.FFmpegError as error:
                    raise self._damaged(f"{error.strerror}") from None
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                picture = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float() / 255
                size = size or sides(picture)
                _check_size(sides(picture), size, f"frame {index + 1} of {self.path}", "the first")
                time = index / self.rate if frame.pts is None else frame.pts * Fraction(frame.time_base)
                yield Frame(check_picture(picture, f"video {self.path}"), time, f"frame_{index + 1:05d}")

    def masks(self) -> Iterator[Tensor]:
        """The frames' brightness as masks, `[1, 1, H, W]` in 0..1."""
        return (frame.picture.amax(dim=1, keepdim=True) for frame in self)

    def open(self) -> Any:
        """The file as PyAV's container."""
        av = import_av()
        try:
            container = av.open(str(self.path))
        except (av.FFmpegError, OSError) as error:
            reason = "it is not, or it is not whole" if isinstance(error, av.InvalidDataError) else error.strerror
            raise SpliceError(f"{self.path} cannot be read as a video ({reason}): name a video that plays") from None
        if not container.streams.video:
            container.close()
            raise SpliceError(f"{self.path} holds no pictures, only sound: name a video")
        return container

    def _scan(self) -> tuple[int, Fraction]:
        """Counts the frames without decoding them; their number and rate."""
        av = import_av()
        with self.open() as container:
            stream = container.streams.video[0]
            count, last = 0, 0.0
            try:
                for packet in container.demux(stream):
                    if packet.size:
                        count += 1
                        last = max(last, float((packet.pts or 0) * packet.time_base))
            except av.FFmpegError as error:
                raise self._damaged(error.strerror) from None
            if not count:
                raise SpliceError(f"{self.path} ends before its first frame: name a video that plays")
            rate = Fraction(stream.average_rate or stream.guessed_rate or RATE)
            start = float((stream.start_time or 0) * stream.time_base)
            told = _told_seconds(stream)
            short = told is not None and last + 1 / rate - start < told * (1 - MISSING_SHARE) - 2 / rate
            if count < stream.frames * (1 - MISSING_SHARE) - 1 or short:
                of = f" of {stream.frames}" if stream.frames else ""
                raise self._damaged(f"after {count}{of} frames")
            return count, rate

    def _damaged(self, where: str) -> SpliceError:
        return SpliceError(f"{self.path} ends in the middle ({where}): fetch it again, or save what is whole of it")


Clip = FolderClip | VideoClip


class NewClip(NamedTuple):
    """A clip that is made of no other: it has a size (height, width), the rate of a folder, and no sound."""

    size: tuple[int, int]


def open_clip(path: Path) -> Clip:
    """A video file, or a folder of frames.

    Raises:
        SpliceError: It is neither, or it is damaged.
    """
    return FolderClip(path) if path.is_dir() else VideoClip(path)


def open_masks(path: Path, clip: Clip) -> Iterator[Tensor]:
    """The masks of a clip's frames: of a folder or video as many as there are frames, or one picture for all.

    Raises:
        SpliceError: They cannot be read, or are of another number than the frames.
    """
    if path.is_file():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                Image.open(path).close()
            except OSError:
                pass  # no picture: a video
            else:
                mask = load_mask(path)
                return (mask for _ in range(len(clip)))
    masks = open_clip(path)
    if len(masks) != len(clip):
        raise SpliceError(f"{path} has {len(masks)} masks for {len(clip)} frames: give one for each, or one picture")
    return masks.masks()


def import_av() -> ModuleType:
    """PyAV, which is imported only where it is needed.

    Raises:
        SpliceError: It is not installed.
    """
    return import_extra("av", "av", "videos need", "; or give a folder of frames")


def _told_seconds(stream: Any) -> float | None:
    """How long a video track says it is."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    found = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))  # Matroska's way
    return None if found is None else int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])


def _split(name: str) -> list[str]:
    """The digits and the rest of a name in turn, the rest first."""
    return re.split(r"(\d+)", name.lower())


def _read_size(file: Path) -> tuple[int, int]:
    """(height, width) of a picture file as it is shown, from its first bytes where that suffices."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as opened:
                turned = opened.getexif().get(0x0112, 1) >= 5  # EXIF's orientation
                return opened.size if turned else opened.size[::-1]
    except Exception:  # what it is instead, or what is wrong with it, is told by the loader
        return sides(load_picture(file))


def _check_size(size: tuple[int, int], first: tuple[int, int], what: str, of: str) -> None:
    if size != first:
        raise SpliceError(
            f"{what} is {size[1]}x{size[0]} pixels and {of} is {first[1]}x{first[0]}: bring all frames to one size"
        )
