"""Brings the ViT in a table of tensors to timm's layout, and reads from it which architecture it is."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .catalogue import Traits
from .layouts import LAYOUTS, PATCH_EMBEDDING, TRANSFORMERS_DINOV2, Layout

CHUNKED_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.(\d+\.)")
"""DINOv2's training may keep blocks in chunks: `blocks.{chunk}.{i}`, the index counting over all chunks."""


def find_vit(tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
    """The ViT in a table of tensors, whatever a training loop, a head or a second model put before and beside it.

    Args:
        tensors: By the file's keys; what wraps the ViT stands before them, such as `teacher.module.backbone.`.

    Returns:
        Its layout, and its tensors under keys without what is before; the teacher's where there are several. None where
        there is no patch embedding.
    """
    flat = {CHUNKED_BLOCK.sub(r"\1blocks.\2", key): value for key, value in tensors.items()}
    found = [
        (_rank(root), layout, root)
        for layout in LAYOUTS
        for root in _roots(flat, layout.patch_embedding)
        if root + layout.mark in flat and flat[root + layout.patch_embedding].ndim == 4
    ]
    if not found:
        return None
    _, layout, root = min(found, key=lambda candidate: candidate[0])
    return layout, {key.removeprefix(root): value for key, value in flat.items() if key.startswith(root)}


def _roots(keys: Iterable[str], end: str) -> Iterator[str]:
    """What stands before a key, at the places where it is a whole key of a module."""
    return (key.removesuffix(end) for key in keys if key == end or key.endswith(f".{end}"))


def _rank(root: str) -> int:
    """0 for a teacher, whose weights are the averaged ones that DINO is used with, 2 for its student, 1 for others."""
    words = set(re.split(r"[._]", root))
    return 0 if words & {"teacher", "ema"} else 2 if "student" in words else 1


def to_timm(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT in timm's layout.

    Args:
        layout: As `find_vit` returns it.
        tensors: Likewise.

    Raises:
        KeyError: A tensor that belongs to others is missing.
        ValueError: It has tensors that no DINO has.
    """
    if unknown := layout.unknown_keys(tensors):
        raise ValueError(f"no DINO has {unknown[0]}")
    return _finish(layout.to_timm(tensors))


def _finish(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What renaming alone does not bring to timm's layout.

    The authors of DINOv2 with registers add a position to [CLS], which timm adds to the token itself; those of DINOv3
    keep the attention's biases in one tensor, whose middle third, the keys', is masked.
    """
    tensors = dict(tensors)
    positions = tensors.get("pos_embed")
    if positions is not None and "reg_token" in tensors and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
    if positions is None:
        for key in [key for key in tensors if key.endswith(".attn.qkv.bias")]:
            queries, _, values = tensors.pop(key).chunk(3)
            tensors[key.replace("qkv.bias", "q_bias")] = queries
            tensors[key.replace("qkv.bias", "v_bias")] = values
    return tensors


def read_traits(tensors: Mapping[str, Tensor]) -> Traits:
    """What the keys and shapes of a ViT in timm's layout say of its architecture."""
    weight = tensors[PATCH_EMBEDDING]
    return Traits(
        patch=weight.shape[-1],
        width=weight.shape[0],
        layer_scale="blocks.0.gamma_1" in tensors or "blocks.0.ls1.gamma" in tensors,
        registers="reg_token" in tensors,
        rotary="pos_embed" not in tensors,
        gated_mlp="blocks.0.mlp.fc1_g.weight" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors or "blocks.0.attn.q_bias" in tensors,
    )


def dinov2_from_onnx(graph: Any) -> dict[str, Tensor]:
    """A DINOv2 backbone in timm's layout from the ONNX graph that transformers' model was exported to.

    The exporter folded the linear weights into anonymous, transposed MatMul operands, and query, key and value have
    one shape: only the names of the nodes that use them tell which is which. The position embedding is in two parts,
    [CLS] and the 37x37 patches.
    """
    from onnx import numpy_helper

    constants = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    named = {key.removeprefix("backbone."): value for key, value in constants.items() if key.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = constants[node.input[1]].T.contiguous()
    width = named["embeddings.cls_token"].shape[-1]
    anonymous = [value for key, value in constants.items() if not key.startswith("backbone.")]
    positions = [value for tokens in (1, 37 * 37) for value in anonymous if value.shape == (1, tokens, width)]
    named["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return TRANSFORMERS_DINOV2.to_timm(named)
