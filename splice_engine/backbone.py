"""A frozen DINO vision transformer that computes just what it is asked for.

Notation: B batch, T tokens = P prefix tokens ([CLS], registers) + N patches, D width, h heads, d = D / h.
"""

import sys
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import weights
from .attention import attend
from .catalogue import CATALOGUE, DEFAULT_BACKBONE, Entry, lookup
from .errors import SpliceError
from .features import FACETS, Features
from .gemm import fast_fp32
from .images import resize, short_side_size, sides

PROJECTIONS = ("query", "key", "value")
"""In the order in which timm fuses them."""

READABLE = ("cls", *FACETS, "attention")
"""What a request may ask for."""


class Request(NamedTuple):
    """One thing to read from the transformer.

    Attributes:
        layer: Index of the block, 0 the first and -1 the last.
        facet: "cls" `[B, D]` and "token" `[B, T, D]`, the block's outputs before the final norm; "key", "query" and
            "value" `[B, T, D]`, heads concatenated, before any rotary embedding; "attention" `[B, h, T, T]`, after the
            softmax.
    """

    layer: int
    facet: str


class Backbone(nn.Module):
    """A frozen DINO ViT.

    Args:
        model: A timm `VisionTransformer` or `Eva`, with weights.
        name: What to call it in messages and measurements.
        mean: Per-channel mean that pictures are normalised with.
        std: Per-channel standard deviation, likewise.
        dtype: `torch.float32`, or `torch.bfloat16` for matrix products in bf16 with residual stream and norms in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "custom",
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        vit: Any = model.eval()
        _simplify(vit)
        self.model = vit.requires_grad_(False)
        self.name = name
        self.patch: int = vit.patch_embed.patch_size[0]
        self.depth = len(vit.blocks)
        self.width: int = vit.embed_dim
        self.prefix: int = vit.num_prefix_tokens
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.dtype = dtype
        if dtype == torch.bfloat16:
            # Autocast would cast frozen weights anew at every product, so they are stored as bf16.
            for module in vit.blocks.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)
        elif dtype != torch.float32:
            raise SpliceError(f"a backbone computes in float32 or bfloat16, not {dtype}")

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = DEFAULT_BACKBONE,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        folders: Iterable[str | Path] = (),
    ) -> "Backbone":
        """Loads a backbone by its catalogue name or from a file of weights.

        Args:
            name_or_path: A name from `splice weights list`, or a `.safetensors` / `.pth` file in the layout of timm or
                of the authors.
            device: Where it shall compute.
            dtype: `torch.float32` or `torch.bfloat16`.
            folders: Model folders to look into before the engine's cache, such as ComfyUI's `models/dino`.

        Raises:
            SpliceError: Unknown name, weights not to be had, or a file that does not fit.
        """
        text = str(name_or_path)
        if text not in CATALOGUE and (Path(text).suffix in weights.SUFFIXES or Path(text).is_file()):
            path = Path(text)
            tensors = weights.read(path)
            entry = weights.identify(path, tensors)
        else:
            entry = lookup(text)
            path = weights.get(entry, [Path(folder) for folder in folders])
            tensors = weights.read(path)
        return _build(entry, path, tensors, dtype).to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def resolve(self, layer: int) -> int:
        """The index of a block counted from the front, for one counted from either end.

        Raises:
            SpliceError: The model has no such block.
        """
        if not -self.depth <= layer < self.depth:
            limits = f"from {-self.depth} to {self.depth - 1}"
            raise SpliceError(f"{self.name} has {self.depth} blocks: layer must be {limits}, not {layer}")
        return layer % self.depth

    def grid_size(
        self, height: int, width: int, short: int | None = None, longest: int | None = None
    ) -> tuple[int, int]:
        """The nearest (height, width) on the patch grid, with a short side of about `short` pixels if given."""
        return short_side_size(height, width, short or min(height, width), longest, self.patch)

    def features(self, picture: Tensor, layer: int = -1, facet: str = "key", size: int | None = None) -> Features:
        """Features of a batch of pictures from one block, in a single truncated pass.

        Args:
            picture: `[B, 3, H, W]` in 0..1. Sides that are no multiple of the patch are resized to the nearest one.
            layer: Index of the block, 0 the first, -1 the last.
            facet: "token", "key", "query" or "value".
            size: Short side in pixels to resize to; None keeps the picture's own size.

        Raises:
            SpliceError: Unknown layer or facet.
        """
        if facet not in FACETS:
            raise SpliceError(f"unknown facet '{facet}': choose one of {', '.join(FACETS)}")
        height, width = self.grid_size(*sides(picture), short=size)
        answer = self(resize(picture, (height, width)), [Request(layer, "cls"), Request(layer, facet)])
        tokens = answer[Request(layer, facet)]
        return Features(
            cls=answer[Request(layer, "cls")],
            tokens=tokens[:, self.prefix :],
            prefix=tokens[:, : self.prefix],
            grid=(height // self.patch, width // self.patch),
            layer=self.resolve(layer),
            facet=facet,
        )

    def attention(self, picture: Tensor, layer: int = -1, size: int | None = None) -> Tensor:
        """Attention of every token to every token in one block, `[B, h, T, T]`; arguments as for `features`."""
        size_on_grid = self.grid_size(*sides(picture), short=size)
        return self(resize(picture, size_on_grid), [Request(layer, "attention")])[Request(layer, "attention")]

    def forward(
        self,
        picture: Tensor,
        requests: Collection[Request],
        tokens: Tensor | None = None,
        recompute: bool = False,
    ) -> dict[Request, Tensor]:
        """Everything that is asked of a batch of pictures, in one pass that ends with the last thing needed.

        Args:
            picture: `[B, 3, H, W]` in 0..1, sides divisible by the patch size.
            requests: What to read; see `Request` for the shapes.
            tokens: `[N]` booleans, row by row over the grid: the patches that take part, in all pictures. The others
                are dropped before the first block, as in masked autoencoders (He et al., 2022), so that nothing of them
                is seen; T is then the prefix and the patches that are left, each with its own place.
            recompute: Compute each block once more in the backward pass instead of keeping what it computed.

        Returns:
            One float32 tensor for each request.

        Raises:
            SpliceError: Unknown layer or facet.
        """
        if unknown := {request.facet for request in requests} - set(READABLE):
            raise SpliceError(f"unknown facet '{min(unknown)}': choose among {', '.join(READABLE)}")
        if not requests:
            return {}
        wanted: dict[int, dict[str, list[Request]]] = {}
        for request in requests:
            wanted.setdefault(self.resolve(request.layer), {}).setdefault(request.facet, []).append(request)
        answer: dict[Request, Tensor] = {}
        last = max(wanted)
        autocast = self.dtype == torch.bfloat16
        with fast_fp32() if picture.device.type == "cpu" else nullcontext():
            x, rope = self._embed(picture, tokens)
            with torch.autocast(picture.device.type, torch.bfloat16, enabled=autocast):
                for index in range(last + 1):
                    facets = wanted.get(index, {})
                    arguments = (self.model.blocks[index], x, rope, set(facets), index == last)
                    if recompute and x.requires_grad:
                        x, seen = checkpoint(_run_block, *arguments, use_reentrant=False, preserve_rng_state=False)
                    else:
                        x, seen = _run_block(*arguments)
                    for facet, asked in facets.items():
                        answer.update(dict.fromkeys(asked, seen[facet].float()))
        return answer

    def _embed(self, picture: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patch and position embedding: tokens `[B, T, D]` and the rotary embedding of models that have one."""
        model = self.model
        embedded = model._pos_embed(model.patch_embed((picture - self.mean) / self.std))
        x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        if tokens is not None:
            x = torch.cat([x[:, : self.prefix], x[:, self.prefix :][:, tokens]], dim=1)
            rope = rope if rope is None else rope[tokens]
        return model.norm_pre(x), rope


def _run_block(
    block: Any, x: Tensor, rope: Tensor | None, facets: set[str], final: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """One transformer block: its output, and the facets that are asked of it.

    A final block, after which nothing is needed, computes only what its facets take: the keys' projection for "key",
    one query row for "cls". Its output then holds as many tokens as were needed.
    """
    attn = block.attn
    attends = not final or bool(facets & {"cls", "token"})
    whole = not final or bool(facets & {"token", "query", "attention"})
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
            if attends or name in facets or ("attention" in facets and name != "value"):
                source = normed[:, : x.shape[1]] if name == "query" else normed
                projected[name] = F.linear(
                    source, *(w.chunk(3)[part] for w in (attn.qkv.weight, attn.qkv.bias) if w is not None)
                )
    seen = {facet: projected[facet] for facet in facets & projected.keys()}
    if attends or "attention" in facets:
        q, k = (
            _rotate(attn, norm(_heads(attn, projected[name])), rope)
            for name, norm in (("query", attn.q_norm), ("key", attn.k_norm))
        )
    if "attention" in facets:
        seen["attention"] = (q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    if attends:
        mixed = attend(q, k, _heads(attn, projected["value"]))
        x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        seen.update(cls=x[:, 0], token=x)
    return x, seen


def _heads(attn: Any, x: Tensor) -> Tensor:
    """`[B, T, D]` to `[B, h, T, d]`."""
    return x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _rotate(attn: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Rotary position embedding of the patches in `[B, h, T, d]`; prefix tokens have no place and stay as they are."""
    if rope is None or x.shape[2] <= attn.num_prefix_tokens:
        return x
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    prefix = attn.num_prefix_tokens
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=attn.rotate_half)
    return torch.cat([x[:, :, :prefix], rotated.to(x.dtype)], dim=2)


def _build(entry: Entry, path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> Backbone:
    patch_weight = tensors.get("patch_embed.proj.weight")
    if patch_weight is not None and patch_weight.shape[-1] != entry.patch:  # timm would resample it without a word
        reason = f"its patches are of {patch_weight.shape[-1]} pixels, not of {entry.patch}"
        raise SpliceError(
            f"{path} does not fit {entry.name} ({reason}): fetch the right file, or name it after its model"
        )
    try:
        import timm  # two seconds to import, so only for those who load a model
    except ImportError:
        command = f'"{sys.executable}" -m pip install "timm>=1.0.20"'
        raise SpliceError(f"loading a backbone needs the package timm, which is not installed: {command}") from None
    try:
        model: Any = timm.create_model(
            entry.timm_id,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": tensors},
            num_classes=0,
            dynamic_img_size=True,
        )
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise SpliceError(
            f"{path} does not fit {entry.name} ({reason}): fetch the right file, or name it after its model"
        ) from None
    return Backbone(model, entry.name, model.pretrained_cfg["mean"], model.pretrained_cfg["std"], dtype)


def _simplify(model: Any) -> None:
    """Gives every block one exact shape: a fused qkv projection with its bias, and layer scale folded into weights."""
    for block in model.blocks:
        attn = block.attn
        if attn.qkv is None:
            attn.qkv = _fused([attn.q_proj, attn.k_proj, attn.v_proj])
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


def _fused(projections: list[nn.Linear]) -> nn.Linear:
    width = projections[0].in_features
    fused = nn.Linear(width, 3 * projections[0].out_features)
    # The key has no bias of its own in such models; zero is the same.
    bias: list[Tensor] = [p.bias if p.bias is not None else torch.zeros(p.out_features) for p in projections]
    fused.weight = nn.Parameter(torch.cat([p.weight for p in projections]))
    fused.bias = nn.Parameter(torch.cat(bias))
    return fused
