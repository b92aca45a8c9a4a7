"""The layouts of public checkpoints, as data: what each kind of file calls the tensors of a ViT.

Everything is brought to timm's layout. A further layout is a further row of `LAYOUTS`. In its keys, `{i}` stands for
the index of a block and `*` for weight and bias.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PATCH_EMBEDDING = "patch_embed.proj.weight"
"""timm's key of the patch embedding, `[D, 3, p, p]`, which every ViT has."""

Rows = tuple[tuple[str, str | tuple[str, ...]], ...]


@dataclass(frozen=True)
class Layout:
    """How one kind of file names the tensors of timm's layout.

    Attributes:
        name: What the file is, in messages.
        mark: A key by which the layout is known among those with the same patch embedding.
        rows: Pairs of timm's key and the file's. Where the file has several for one, they are joined along their first
            axis. A row of which the file has nothing is left out; of two rows for one of timm's keys, the file has one.
        dropped: Ends of keys within a block that are no weights.
    """

    name: str
    mark: str
    rows: Rows
    dropped: tuple[str, ...] = ()

    @property
    def patch_embedding(self) -> str:
        """The file's key of the patch embedding."""
        (key,) = (old for new, old in self.rows if new.replace("*", "weight") == PATCH_EMBEDDING)
        assert isinstance(key, str)
        return key.replace("*", "weight")

    @property
    def blocks(self) -> str:
        """What the file's keys of blocks begin with."""
        return next(old for _, old in self.rows if isinstance(old, str) and "{i}" in old).partition("{i}")[0]

    def to_timm(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the rows under timm's keys.

        Raises:
            KeyError: Of tensors that are to be joined, one is missing.
        """
        converted: dict[str, Tensor] = {}
        for target, sources in self._expand(tensors):
            parts = [tensors[source] for source in sources]
            converted[target] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return converted

    def unknown_keys(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Keys within blocks that no row has, by which another architecture is told; what is outside is a head."""
        known = {source for _, sources in self._expand(tensors) for source in sources}
        inside = (key for key in tensors if key.startswith(self.blocks) and not key.endswith(self.dropped))
        return sorted(key for key in inside if key not in known)

    def _expand(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
        """timm's key and the file's, for each row, for weight and bias, and for each block that the table has."""
        indices = {key.removeprefix(self.blocks).partition(".")[0] for key in tensors if key.startswith(self.blocks)}
        depth = 1 + max((int(index) for index in indices if index.isdecimal()), default=-1)
        for new, old in self.rows:
            olds = (old,) if isinstance(old, str) else old
            for kind in ("weight", "bias") if "*" in new else ("",):
                target, *sources = (name.replace("*", kind) for name in (new, *olds))
                for index in range(depth if "{i}" in target else 1):
                    filled = [source.format(i=index) for source in sources]
                    if any(source in tensors for source in filled):
                        yield target.format(i=index), filled


def _same(*keys: str) -> Rows:
    return tuple((key, key) for key in keys)


def _in_blocks(prefix: str, rows: Mapping[str, str | tuple[str, ...]]) -> Rows:
    return tuple(
        (f"blocks.{{i}}.{new}", prefix + old if isinstance(old, str) else tuple(prefix + name for name in old))
        for new, old in rows.items()
    )


_FRAME = _same("cls_token", "pos_embed", "patch_embed.proj.*", "norm.*")
_BLOCK = _same(*(f"blocks.{{i}}.{key}" for key in ("norm1.*", "attn.qkv.*", "attn.proj.*", "norm2.*")))
_MLP = _same("blocks.{i}.mlp.fc1.*", "blocks.{i}.mlp.fc2.*")

TIMM = Layout(
    "a ViT in the layout of timm or of the authors of DINO",
    mark=PATCH_EMBEDDING,
    rows=(
        *_FRAME,
        *_BLOCK,
        *_MLP,
        *_same("reg_token", "blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma", "blocks.{i}.gamma_1", "blocks.{i}.gamma_2"),
        *_same("blocks.{i}.attn.q_bias", "blocks.{i}.attn.v_bias", "blocks.{i}.mlp.fc1_g.*", "blocks.{i}.mlp.fc1_x.*"),
        ("reg_token", "register_tokens"),  # from here on DINOv2's authors
        *_in_blocks("blocks.{i}.", {"mlp.fc1.*": "mlp.w12.*", "mlp.fc2.*": "mlp.w3.*"}),
    ),
)
"""timm's own layout of all, and the authors' of DINO and of DINOv2 with or without registers, giant included."""

AUTHORS_DINOV3 = Layout(
    "a DINOv3 in the layout of its authors",
    mark="storage_tokens",
    rows=(
        *_FRAME,
        *_BLOCK,
        *_MLP,
        ("reg_token", "storage_tokens"),
        *_in_blocks("blocks.{i}.", {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}),
        *_in_blocks("blocks.{i}.", {"mlp.fc1_g.*": "mlp.w1.*", "mlp.fc1_x.*": "mlp.w2.*", "mlp.fc2.*": "mlp.w3.*"}),
    ),
    dropped=("attn.qkv.bias_mask",),
)

_TRANSFORMERS_FRAME = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("reg_token", "embeddings.register_tokens"),
)
_TRANSFORMERS_ATTENTION: dict[str, str | tuple[str, ...]] = {
    "attn.qkv.*": tuple(f"attention.attention.{part}.*" for part in ("query", "key", "value")),
    "attn.proj.*": "attention.output.dense.*",
}

TRANSFORMERS_DINO = Layout(
    "a ViT as transformers saves it",
    mark="encoder.layer.0.layernorm_before.weight",
    rows=(
        *_TRANSFORMERS_FRAME,
        ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
        *_in_blocks(
            "encoder.layer.{i}.",
            {
                "norm1.*": "layernorm_before.*",
                **_TRANSFORMERS_ATTENTION,
                "norm2.*": "layernorm_after.*",
                "mlp.fc1.*": "intermediate.dense.*",
                "mlp.fc2.*": "output.dense.*",
            },
        ),
        ("norm.*", "layernorm.*"),
    ),
)

TRANSFORMERS_DINOV2 = Layout(
    "a DINOv2 as transformers saves it",
    mark="encoder.layer.0.layer_scale1.lambda1",
    rows=(
        *_TRANSFORMERS_FRAME,
        ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
        *_in_blocks(
            "encoder.layer.{i}.",
            {
                "norm1.*": "norm1.*",
                **_TRANSFORMERS_ATTENTION,
                "ls1.gamma": "layer_scale1.lambda1",
                "norm2.*": "norm2.*",
                "mlp.fc1.*": "mlp.fc1.*",
                "mlp.fc2.*": "mlp.fc2.*",
                "ls2.gamma": "layer_scale2.lambda1",
            },
        ),
        *_in_blocks("encoder.layer.{i}.", {"mlp.fc1.*": "mlp.weights_in.*", "mlp.fc2.*": "mlp.weights_out.*"}),
        ("norm.*", "layernorm.*"),
    ),
)
"""ComfyUI's `models/clip_vision` has DINOv2 in this layout, and DINOv3 in the next."""

TRANSFORMERS_DINOV3 = Layout(
    "a DINOv3 as transformers saves it",
    mark="layer.0.attention.q_proj.weight",
    rows=(
        *_TRANSFORMERS_FRAME,
        ("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
        *_in_blocks(
            "layer.{i}.",
            {
                "norm1.*": "norm1.*",
                "attn.qkv.weight": tuple(f"attention.{part}_proj.weight" for part in "qkv"),
                "attn.q_bias": "attention.q_proj.bias",
                "attn.v_bias": "attention.v_proj.bias",
                "attn.proj.*": "attention.o_proj.*",
                "gamma_1": "layer_scale1.lambda1",
                "norm2.*": "norm2.*",
                "mlp.fc1.*": "mlp.up_proj.*",
                "mlp.fc2.*": "mlp.down_proj.*",
                "gamma_2": "layer_scale2.lambda1",
            },
        ),
        *_same("norm.*"),
    ),
)

TRANSFORMERS_DINOV3_GATED = replace(
    TRANSFORMERS_DINOV3,
    mark="layer.0.mlp.gate_proj.weight",
    rows=(
        *(row for row in TRANSFORMERS_DINOV3.rows if row[0] != "blocks.{i}.mlp.fc1.*"),
        *_in_blocks("layer.{i}.", {"mlp.fc1_g.*": "mlp.gate_proj.*", "mlp.fc1_x.*": "mlp.up_proj.*"}),
    ),
)

LAYOUTS = (
    AUTHORS_DINOV3,
    TIMM,
    TRANSFORMERS_DINO,
    TRANSFORMERS_DINOV2,
    TRANSFORMERS_DINOV3_GATED,
    TRANSFORMERS_DINOV3,
)
"""The first whose mark is there is the file's."""
