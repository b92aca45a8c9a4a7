"""The layouts of public checkpoints, as data: where a file holds its tensors and what it calls them.

Everything is brought to timm's layout, to which timm itself brings the authors' files of DINO, DINOv2 and DINOv3. A
further layout is a further row here. In a row, `{i}` stands for the index of a block and `*` for weight and bias.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .catalogue import Traits

CONTAINERS = ("state_dict", "model", "teacher")
"""Entries of a checkpoint that hold the table of tensors; they are opened in this order, each where there is one."""

PREFIXES = ("module.", "backbone.")
"""What a training loop puts before the keys; at most one of them is removed."""

PATCH_EMBEDDING = "patch_embed.proj.weight"
"""`[D, 3, p, p]`, in every file of a ViT in the layout of timm or of the authors."""

# Keys that only models with the trait have: first timm's, then the authors'.
POSITIONS = ("pos_embed",)
LAYER_SCALES = ("blocks.0.gamma_1", "blocks.0.ls1.gamma")
REGISTERS = ("reg_token", "register_tokens", "storage_tokens")
GATES = ("blocks.0.mlp.fc1_g.weight", "blocks.0.mlp.w1.weight")
QKV_BIASES = ("blocks.0.attn.q_bias", "blocks.0.attn.qkv.bias")


@dataclass(frozen=True)
class Layout:
    """How one kind of file names the tensors of timm's layout.

    Attributes:
        keys: For each of timm's keys, the file's. Where it has several, they are joined along their first axis.
    """

    keys: Mapping[str, str | tuple[str, ...]]

    def to_timm(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A table of tensors in timm's layout.

        Raises:
            KeyError: A tensor of the layout is missing.
        """
        converted: dict[str, Tensor] = {}
        for new, old in self.keys.items():
            names = (new, *((old,) if isinstance(old, str) else old))
            for target, *sources in _expand(names, tensors):
                parts = [tensors[source] for source in sources]
                converted[target] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return converted


def _expand(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
    """The names of a row of a layout, for weight and bias and for each block that the table has."""
    for kind in ("weight", "bias") if "*" in names[0] else ("",):
        filled = tuple(name.replace("*", kind) for name in names)
        if "{i}" not in names[0]:
            yield filled
            continue
        block = 0
        while filled[1].format(i=block) in tensors:
            yield tuple(name.format(i=block) for name in filled)
            block += 1


TRANSFORMERS_DINOV2 = Layout(
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
        "blocks.{i}.norm1.*": "encoder.layer.{i}.norm1.*",
        "blocks.{i}.attn.qkv.*": (
            "encoder.layer.{i}.attention.attention.query.*",
            "encoder.layer.{i}.attention.attention.key.*",
            "encoder.layer.{i}.attention.attention.value.*",
        ),
        "blocks.{i}.attn.proj.*": "encoder.layer.{i}.attention.output.dense.*",
        "blocks.{i}.ls1.gamma": "encoder.layer.{i}.layer_scale1.lambda1",
        "blocks.{i}.norm2.*": "encoder.layer.{i}.norm2.*",
        "blocks.{i}.mlp.fc1.*": "encoder.layer.{i}.mlp.fc1.*",
        "blocks.{i}.mlp.fc2.*": "encoder.layer.{i}.mlp.fc2.*",
        "blocks.{i}.ls2.gamma": "encoder.layer.{i}.layer_scale2.lambda1",
        "norm.*": "layernorm.*",
    }
)
"""DINOv2 as the package transformers names it."""


def unwrap(checkpoint: object) -> dict[str, Tensor] | None:
    """The table of tensors in a loaded checkpoint, its keys without a training loop's prefix.

    Returns:
        None where the checkpoint holds anything else.
    """
    for container in CONTAINERS:
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(container), dict):
            checkpoint = checkpoint[container]
    if not isinstance(checkpoint, dict):
        return None
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint.items()):
        return None
    return {_strip_prefix(key): value for key, value in checkpoint.items()}


def read_traits(tensors: Mapping[str, Tensor]) -> Traits | None:
    """What the keys and shapes of a table in the layout of timm or of the authors say of its architecture.

    Returns:
        None where there is no patch embedding, so that it is no vision transformer.
    """
    weight = tensors.get(PATCH_EMBEDDING)
    if weight is None or weight.ndim != 4:
        return None
    return Traits(
        patch=weight.shape[-1],
        width=weight.shape[0],
        layer_scale=_has_any(tensors, LAYER_SCALES),
        registers=_has_any(tensors, REGISTERS),
        rotary=not _has_any(tensors, POSITIONS),
        gated_mlp=_has_any(tensors, GATES),
        qkv_bias=_has_any(tensors, QKV_BIASES),
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


def _strip_prefix(key: str) -> str:
    return key.removeprefix(next((prefix for prefix in PREFIXES if key.startswith(prefix)), ""))


def _has_any(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> bool:
    return any(key in tensors for key in keys)
