"""The blocks of a frozen ViT, computed only as far as their results are requested.

Notation: B batch, T tokens = P prefix tokens ([CLS], registers) + N patches, D width, h heads, d = D / h.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend

PROJECTIONS = ("query", "key", "value")
"""In the order of their rows in timm's fused qkv weight."""


def simplify(model: Any) -> None:
    """Brings all blocks of a timm ViT to one form, in place and without changing what they compute.

    Query, key and value become one projection with its bias, and layer scale is multiplied into the weights before it.
    """
    for block in model.blocks:
        attn = block.attn
        if attn.qkv is None:
            attn.qkv = _fuse([attn.q_proj, attn.k_proj, attn.v_proj])
            attn.q_proj = attn.k_proj = attn.v_proj = None
        elif getattr(attn, "q_bias", None) is not None:
            attn.qkv.bias = nn.Parameter(torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
            attn.q_bias = attn.k_bias = attn.v_bias = None
        for index, last in (("1", attn.proj), ("2", block.mlp.fc2)):
            scale = getattr(block, f"gamma_{index}", None)
            if scale is None:
                scale = getattr(getattr(block, f"ls{index}", None), "gamma", None)
            if scale is None:
                continue
            last.weight = nn.Parameter(scale[:, None] * last.weight)
            if last.bias is not None:
                last.bias = nn.Parameter(scale * last.bias)
            if hasattr(block, f"ls{index}"):
                setattr(block, f"ls{index}", nn.Identity())
            else:
                setattr(block, f"gamma_{index}", None)


def _fuse(projections: list[nn.Linear]) -> nn.Linear:
    width = projections[0].in_features
    fused = nn.Linear(width, 3 * projections[0].out_features)
    # Keys have no bias in such models; one of zeros is the same.
    bias: list[Tensor] = [p.bias if p.bias is not None else torch.zeros(p.out_features) for p in projections]
    fused.weight = nn.Parameter(torch.cat([p.weight for p in projections]))
    fused.bias = nn.Parameter(torch.cat(bias))
    return fused


def run_block(
    block: Any, x: Tensor, rope: Tensor | None, facets: set[str], final: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes one block and extracts facets of it.

    Args:
        block: A block of a timm ViT after `simplify`.
        x: `[B, T, D]`, its input.
        rope: Rotary embedding of the patches; None for models without one.
        facets: What to extract; see `Request`.
        final: Whether nothing after this block is needed. Then only what the facets take is computed: the projection
            of the keys for "key", the query of [CLS] alone for "cls" and "cls_attention".

    Returns:
        The output, `[B, T, D]` (after a final block only the tokens that were needed), and the facets by name.
    """
    attn = block.attn
    attends = not final or bool(facets & {"cls", "token"})
    whole = not final or bool(facets & {"token", "query"})
    normed = block.norm1(x)
    if not whole:
        x = x[:, :1]
    projected: dict[str, Tensor] = {}
    if whole and attends:
        projected.update(
            zip(PROJECTIONS, F.linear(normed, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1), strict=True)
        )
    else:
        for part, name in enumerate(PROJECTIONS):
            if attends or name in facets or ("cls_attention" in facets and name != "value"):
                source = normed[:, : x.shape[1]] if name == "query" else normed
                projected[name] = F.linear(
                    source, *(w.chunk(3)[part] for w in (attn.qkv.weight, attn.qkv.bias) if w is not None)
                )
    extracted = {facet: projected[facet] for facet in facets & projected.keys()}
    if attends or "cls_attention" in facets:
        q, k = (
            _rotate(attn, norm(_heads(attn, projected[name])), rope)
            for name, norm in (("query", attn.q_norm), ("key", attn.k_norm))
        )
    if "cls_attention" in facets:
        extracted["cls_attention"] = (q[:, :, :1] * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]
    if attends:
        mixed = attend(q, k, _heads(attn, projected["value"]))
        x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        extracted.update(cls=x[:, 0], token=x)
    return x, extracted


def _heads(attn: Any, x: Tensor) -> Tensor:
    """`[B, T, D]` to `[B, h, T, d]`."""
    return x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _rotate(attn: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Rotary position embedding of the patches in `[B, h, T, d]`; prefix tokens have no position and are unchanged."""
    if rope is None or x.shape[2] <= attn.num_prefix_tokens:
        return x
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=attn.rotate_half)
    return torch.cat([x[:, :, :prefix], rotated.to(x.dtype)], dim=2)
