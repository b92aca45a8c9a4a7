"""Builds timm's model for a row of the catalogue and gives it the weights of a file."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SpliceError, pip_command
from .catalogue import CATALOGUE, Entry, Traits
from .conversion import read_traits

TIMM = "1.0.20"
"""The least version of timm that knows all models of the catalogue."""


def build(entry: Entry, path: Path, tensors: Mapping[str, Tensor]) -> tuple[Entry, Any]:
    """timm's model with weights.

    Args:
        entry: Row of the catalogue.
        path: The file, for messages.
        tensors: What it holds, in timm's layout.

    Returns:
        The row, or its sibling whose attention has biases where those of the file are not zero, and the model.

    Raises:
        SpliceError: The weights are not those of that row, or timm is missing or too old.
    """
    entry, tensors = _fit_biases(entry, dict(tensors))
    traits = read_traits(tensors)
    if traits != entry.traits:
        raise _misfit(path, entry, _difference(traits, entry.traits))
    model = _create(entry, _picture_size(tensors, traits))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise _misfit(path, entry, " ".join(str(error).split())[:160]) from None
    return entry, model


def _misfit(path: Path, entry: Entry, reason: str) -> SpliceError:
    return SpliceError(f"{path} does not fit {entry.name} ({reason}): fetch the right file, or name it after its model")


def _difference(got: Traits, wanted: Traits) -> str:
    """What a file has that its model has not, by the first trait that differs."""
    name = next(item.name for item in fields(Traits) if getattr(got, item.name) != getattr(wanted, item.name))
    has, words = getattr(got, name), name.replace("_", " ")
    if isinstance(has, bool):
        return f"it has {'' if has else 'no '}{words}"
    return f"its {words} is {has}, not {getattr(wanted, name)}"


def _fit_biases(entry: Entry, tensors: dict[str, Tensor]) -> tuple[Entry, dict[str, Tensor]]:
    """Biases of DINOv3's attention, which the released weights have and timm's first conversions left out as zero."""
    biases = {key for key in tensors if key.endswith((".attn.q_bias", ".attn.v_bias"))}
    wanted = entry.traits
    if not wanted.rotary or bool(biases) == wanted.qkv_bias:
        return entry, tensors
    if wanted.qkv_bias:
        blocks = [key.removesuffix(".attn.qkv.weight") for key in tensors if key.endswith(".attn.qkv.weight")]
        zeros = {f"{block}.attn.{part}_bias": torch.zeros(wanted.width) for block in blocks for part in "qv"}
        return entry, {**tensors, **zeros}
    if not any(tensors[key].any() for key in biases):
        return entry, {key: value for key, value in tensors.items() if key not in biases}
    sibling = replace(wanted, qkv_bias=True)
    return next(row for row in CATALOGUE.values() if (row.traits, row.dataset) == (sibling, entry.dataset)), tensors


def _picture_size(tensors: Mapping[str, Tensor], traits: Traits) -> dict[str, Any]:
    """What tells timm which grid the position embedding was trained on, so that it stays as it is."""
    if traits.rotary:
        return {}
    patches = tensors["pos_embed"].shape[1] - (0 if traits.registers else 1)
    return {"img_size": math.isqrt(patches) * traits.patch}


def _create(entry: Entry, options: Mapping[str, Any]) -> Any:
    """timm's model with random weights."""
    command = pip_command(f"timm>={TIMM}")
    try:
        import timm  # takes two seconds to import
    except ImportError as error:
        if error.name == "timm":
            raise SpliceError(f"loading a backbone needs the package timm, which is not installed: {command}") from None
        reason = f"the timm that is installed does not work here ({error})"
        raise SpliceError(f"{reason}; take version {TIMM} or newer: {command}") from None
    try:
        return timm.create_model(entry.timm_id, num_classes=0, dynamic_img_size=True, **options)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"timm {timm.__version__} cannot build {entry.name} ({' '.join(str(error).split())[:100]})"
        raise SpliceError(f"{reason}; take version {TIMM} or newer: {command}") from None
