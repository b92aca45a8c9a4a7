"""Finds the weights of a backbone, on this machine or elsewhere, and identifies files of weights."""

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SpliceError, pip_command
from ..files import atomic_path, cache_folder, write_error
from .catalogue import CATALOGUE, OFFLINE_BACKBONE, Entry, lookup
from .conversion import dinov2_from_onnx, read_traits
from .download import FILENAME, HubError, Progress, download, hub_address


class MissingWeightsError(SpliceError):
    """Weights that are not on this machine and cannot be fetched; a host may give other advice than the text.

    Attributes:
        entry: Row of the catalogue.
        reason: What the hub answers, as the rest of "the model hub …".
        folders: Where the weights were searched, and where a file of them is found.
    """

    def __init__(self, entry: Entry, reason: str, folders: Iterable[Path]) -> None:
        self.entry, self.reason, self.folders = entry, reason, [*folders]
        places = ", ".join(str(folder) for folder in self.folders)
        super().__init__(
            f"no weights for {entry.name}: {entry.filenames[0]} is not in {places}, and the model hub {reason}. "
            f"Three ways: (1) `splice weights get {entry.name}` once that is mended; "
            f"(2) download {hub_address(entry)} elsewhere and put it there as {entry.filenames[0]}, or pass its path; "
            f"(3) without a hub, {offline_command()} and use {OFFLINE_BACKBONE}"
        )


def offline_command() -> str:
    """The command that installs the package with the offline backbone."""
    package = lookup(OFFLINE_BACKBONE).package
    assert package is not None
    return pip_command(*package.requirements)


def find(entry: Entry, folders: Iterable[str | Path] = ()) -> Path | None:
    """The file of weights if it is on this machine already, without use of the network.

    Args:
        entry: Row of the catalogue.
        folders: Folders to search first, such as a host's model folders; then come the engine's cache and the hub's.

    Returns:
        None where there is no such file.
    """
    for folder in dict.fromkeys((*map(Path, folders), cache_folder())):
        for filename in entry.filenames:
            if (path := folder / filename).is_file():
                return path
    if entry.package:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(entry.hub_id, FILENAME)
    return Path(cached) if isinstance(cached, str) else None


def get(entry: Entry, folders: Iterable[str | Path] = (), progress: Progress | None = None) -> Path:
    """The file of weights, downloaded or converted where it is not on this machine yet.

    Args:
        entry: Row of the catalogue.
        folders: As for `find`. A new file goes into the first that can be written, else into the engine's cache.
        progress: Follows a download.

    Raises:
        MissingWeightsError: The weights cannot be had from the hub.
        SpliceError: They cannot be converted or written.
    """
    places = [*map(Path, folders), cache_folder()]
    if path := find(entry, places):
        return path
    folder = next((place for place in places if _is_writable(place)), places[-1])
    target = folder / f"{entry.name}.safetensors"
    try:
        if entry.package:
            _convert_package(entry, target)
        else:
            download(entry, target, progress)
    except HubError as error:
        raise MissingWeightsError(entry, str(error), places) from None
    except (OSError, SafetensorError) as error:
        raise SpliceError(f"{write_error(target, error)} with SPLICE_CACHE") from None
    return target


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def identify(path: Path, tensors: dict[str, Tensor]) -> Entry:
    """The catalogue row that a file of weights belongs to: by its name, else by its keys and shapes.

    Args:
        path: The file.
        tensors: The ViT in it, as `checkpoints.read` returns it.

    Raises:
        SpliceError: It is no DINO backbone that the catalogue knows.
    """
    for entry in CATALOGUE.values():
        if path.name in entry.filenames:
            return entry
    traits = read_traits(tensors)
    rows = [entry for entry in CATALOGUE.values() if entry.traits == traits]
    if not rows:
        raise SpliceError(
            f"{path} is no backbone that the catalogue knows (width {traits.width}, patch {traits.patch})"
        )
    return next((entry for entry in rows if entry.dataset in path.name), rows[0])


def _convert_package(entry: Entry, target: Path) -> None:
    package = entry.package
    assert package is not None
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise SpliceError(
            f"no weights for {entry.name}: they come with a package that is not installed: {offline_command()}"
        )
    source = Path(spec.submodule_search_locations[0]) / package.path
    if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != package.sha256:
        command = pip_command("--force-reinstall", package.requirements[0])
        raise SpliceError(f"no weights for {entry.name}: {source} is missing or not the known file: {command}")
    try:
        import onnx
    except ImportError:
        raise SpliceError(
            f"reading the weights of {entry.name} needs a package that is not installed: {offline_command()}"
        ) from None
    tensors = dinov2_from_onnx(onnx.load(str(source)).graph)
    with atomic_path(target) as temporary:
        save_file(tensors, temporary)
