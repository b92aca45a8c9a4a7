"""Reads the ViT of a file of weights, or says what the file is instead. Pickled code is never executed."""

import argparse
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import SpliceError
from .conversion import find_vit, to_timm

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Of the files that can be read as weights."""

# Which files are no weights, by how they begin, and what to do about each.
_BEGINNINGS = (
    (rb"\s*<", "a web page, not weights: the page may ask for a licence or a log-in before it hands out the file"),
    (rb"version \S+\s+oid sha256:", "a Git LFS pointer, not the weights that it stands for: download the file itself"),
    (rb"GGUF", "a GGUF file: take the .safetensors file of the model"),
    (rb"[\t\r\n\x20-\x7e]{64}", "text, not weights: download the file again"),
)

# Which models are no DINO ViT, by a key that they have.
_OTHERS = (
    (r"(^|\.)embedder\.embedder\.convolution\.weight", "a transformers ResNet"),
    (r"(^|\.)layer1\.0\.conv1\.weight", "a ResNet"),
    (r"(^|\.)(downsample_layers|stages)\.0\..*(norm|dwconv|depthwise_conv|downsample)", "a ConvNeXt"),
    (r"(^|\.)cls_attn_blocks\.", "an XCiT"),
    (r"(^|\.)(vision_model\.embeddings\.|visual\.)(class_embedding|patch_embedding\.weight)", "a CLIP vision model"),
    (r"(^|\.)relative_position_bias_table$", "a Swin or BEiT transformer"),
    (r"\.lora_|(^|\.)lora_", "a LoRA"),
    (r"(^|\.)(diffusion_model\.|double_blocks\.|down_blocks\.)", "a diffusion model"),
    (r"(^|\.)(decoder\.conv_in|first_stage_model)\.", "a VAE"),
    (r"^levels\.0\.", "a generator of Splice"),
    (r"^((linear|classifier|(dino_|ibot_)?head|mlp\.\d|last_layer)\.)*(weight|bias)$", "a head without its backbone"),
)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of the ViT in a file.

    Args:
        path: A `.safetensors` file, or a `.pth`, `.pt` or `.bin` file of plain data: a model's tensors in one of the
            layouts of `layouts.py`, alone or within a checkpoint of a training.

    Returns:
        Tensors by timm's keys; heads, optimizers and whatever else is in the file are left out.

    Raises:
        SpliceError: The file is missing, broken, would have to execute code to load, or holds no DINO ViT.
    """
    if not path.is_file():
        raise SpliceError(f"no weights file at {path}: check the path, or name a backbone of the catalogue")
    tensors = dict(_flatten(_load(path)))
    if not tensors:
        raise SpliceError(f"{path} holds no table of tensors: it is not a model's weights")
    found = find_vit(tensors)
    if found is None:
        raise SpliceError(f"{path} is {_describe(tensors)}, not the weights of a DINO vision transformer")
    layout, vit = found
    try:
        return to_timm(layout, vit)
    except KeyError as error:
        raise SpliceError(f"{path} is {layout.name}, but incomplete: it lacks {error.args[0]}") from None
    except ValueError as error:
        raise SpliceError(f"{path} is no DINO vision transformer, though it is laid out as one: {error}") from None


def _load(path: Path) -> object:
    """What is in a file, of which nothing has been executed."""
    with path.open("rb") as file:
        beginning = file.read(512)
    for pattern, kind in _BEGINNINGS:
        if re.match(pattern, beginning):
            raise SpliceError(f"{path} is {kind}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), _plain_classes():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SpliceError(
            f"{path} is not a plain checkpoint of tensors (it is damaged, or holds pickled code, which is never run): "
            "convert it to .safetensors"
        ) from None
    except Exception as error:  # a damaged checkpoint makes the readers raise almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SpliceError(f"{path} cannot be read as weights ({reason}): fetch it again") from None


def _plain_classes() -> AbstractContextManager[Any]:
    """Lets torch's safe unpickling make the plain data that a training keeps beside its tensors.

    Those are its options, an `argparse.Namespace` with paths, and numpy's numbers. None of these classes runs anything.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    numbers = [np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_]
    names = [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")]
    allowed: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(number)) for number in numbers)]
    allowed += (_alias(pathlib.PurePosixPath, name) for name in names)  # the real ones exist on their own system only
    allowed += (_alias(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))
    return torch.serialization.safe_globals(allowed)


def _alias(target: Callable[..., Any], name: str) -> Any:
    """What is called in place of what a checkpoint names so; torch 2.5 goes by these attributes alone."""
    alias: Any = partial(target)
    alias.__module__, alias.__name__ = name.rsplit(".", 1)
    alias.__qualname__ = alias.__name__  # what later ones go by
    return alias


def _flatten(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dictionaries, by their keys joined with dots."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str):
                name = f"{prefix}{key}"
                if isinstance(value, Tensor):
                    yield name, value
                else:
                    yield from _flatten(value, f"{name}.")


def _describe(tensors: Mapping[str, Tensor]) -> str:
    """What a file holds, by the names of its tensors."""
    for pattern, kind in _OTHERS:
        if any(re.search(pattern, key) for key in tensors):
            return kind
    return f"something else (its first tensor is {next(iter(tensors))})"
