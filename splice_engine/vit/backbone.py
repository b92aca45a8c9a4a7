"""A frozen DINO vision transformer that computes only what is requested of it.

Notation: B batch, T tokens = P prefix tokens ([CLS], registers) + N patches, D width, h heads, d = D / h.
"""

import copy
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import SpliceError
from ..images import resize, short_side_size, sides
from ..resampling import lacks_antialiasing
from . import weights
from .blocks import run_block, simplify
from .catalogue import CATALOGUE, DEFAULT_BACKBONE, lookup
from .checkpoints import SUFFIXES, read
from .download import Progress
from .features import FACETS, Features
from .loading import build
from .precision import fast_fp32

READABLE = ("cls", *FACETS, "cls_attention")
"""The facets that a request may name."""


class Request(NamedTuple):
    """One tensor to extract from the transformer.

    Attributes:
        layer: Index of the block, 0 the first and -1 the last.
        facet: "cls" `[B, D]` and "token" `[B, T, D]`, the block's outputs before the final norm; "key", "query" and
            "value" `[B, T, D]`, heads concatenated, before any rotary embedding; "cls_attention" `[B, h, T]`,
            that of the [CLS] token to all tokens, after the softmax.
    """

    layer: int
    facet: str


class Backbone(nn.Module):
    """A frozen DINO ViT.

    Args:
        model: A timm `VisionTransformer` or `Eva`, with weights.
        name: Its name in messages and measurements.
        mean: Per-channel mean that pictures are normalised with.
        std: Per-channel standard deviation, likewise.
        dtype: `torch.float32`, or `torch.bfloat16` for matrix products in bf16 with residual stream and norms in fp32.

    Attributes:
        patch: Side of a patch in pixels.
        depth: Number of blocks.
        width: D.
        prefix: P.

    Raises:
        SpliceError: Another dtype.
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
        simplify(vit)
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
        progress: Progress | None = None,
    ) -> "Backbone":
        """Loads a backbone by its catalogue name or from a file of weights.

        Args:
            name_or_path: A name of the catalogue, or a `.safetensors`, `.pth`, `.pt` or `.bin` file in the layout of
                timm, of the authors or of transformers.
            device: Where it computes.
            dtype: `torch.float32` or `torch.bfloat16`.
            folders: Model folders that are searched before the engine's cache, such as ComfyUI's `models/dino`.
                Weights that are fetched go into the first of them, or into the cache where there is none.
            progress: Follows a download, see `download.Progress`.

        Raises:
            SpliceError: Unknown name, weights that cannot be had, or a file that does not fit.
        """
        text = str(name_or_path)
        if text not in CATALOGUE and (Path(text).suffix in SUFFIXES or Path(text).is_file()):
            path = Path(text)
            tensors = read(path)
            entry = weights.identify(path, tensors)
        else:
            entry = lookup(text)
            path = weights.get(entry, folders, progress)
            tensors = read(path)
        entry, model = build(entry, path, tensors)
        mean, std = (model.pretrained_cfg[name] for name in ("mean", "std"))
        return cls(model, entry.name, mean, std, dtype).to(device)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.mean.device

    def resolve(self, layer: int) -> int:
        """The index of a block, 0 the first, from one that may be negative (-1 the last).

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
        """The nearest (height, width) in pixels on the patch grid.

        Args:
            height: Of the picture, in pixels.
            width: Likewise.
            short: Short side in pixels to resize to; None keeps the picture's own.
            longest: Upper limit of the long side; where it binds, the whole picture gets smaller.
        """
        return short_side_size(height, width, short or min(height, width), longest, self.patch)

    def features(self, picture: Tensor, layer: int = -1, facet: str = "key", size: int | None = None) -> Features:
        """Features of a batch of pictures from one block, in a single truncated pass.

        Args:
            picture: `[B, 3, H, W]` in 0..1. Sides are resized to the nearest multiple of the patch.
            layer: Index of the block, 0 the first, -1 the last.
            facet: "token", "key", "query" or "value".
            size: Short side in pixels to resize to; None keeps the picture's own size.

        Raises:
            SpliceError: Unknown layer or facet.
        """
        if facet not in FACETS:
            raise SpliceError(f"unknown facet '{facet}': choose one of {', '.join(FACETS)}")
        height, width = self.grid_size(*sides(picture), short=size)
        extracted = self(resize(picture, (height, width)), [Request(layer, "cls"), Request(layer, facet)])
        tokens = extracted[Request(layer, facet)]
        return Features(
            cls=extracted[Request(layer, "cls")],
            tokens=tokens[:, self.prefix :],
            prefix=tokens[:, : self.prefix],
            grid=(height // self.patch, width // self.patch),
            layer=self.resolve(layer),
            facet=facet,
            backbone=self.name,
        )

    def cls_attention(self, picture: Tensor, layer: int = -1, size: int | None = None) -> Tensor:
        """Attention of the [CLS] token to every token in one block, `[B, h, T]`; arguments as for `features`."""
        request = Request(layer, "cls_attention")
        return self(resize(picture, self.grid_size(*sides(picture), short=size)), [request])[request]

    def forward(
        self,
        picture: Tensor,
        requests: Collection[Request],
        tokens: Tensor | None = None,
        recompute: bool = False,
    ) -> dict[Request, Tensor]:
        """All that is requested of a batch of pictures, in one pass that ends with the last block needed.

        Args:
            picture: `[B, 3, H, W]` in 0..1, sides divisible by the patch size.
            requests: What to extract; see `Request` for the shapes.
            tokens: `[N]` booleans, row by row over the grid: the patches that take part, in all pictures. The others
                are dropped before the first block, as in masked autoencoders (He et al., 2022), and have no effect; T
                is then the prefix and the patches that are left, each with its own position.
            recompute: Compute each block a second time in the backward pass instead of keeping its activations.

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
        extracted: dict[Request, Tensor] = {}
        last = max(wanted)
        autocast = self.dtype == torch.bfloat16
        with fast_fp32() if picture.device.type == "cpu" else nullcontext():
            x, rope = self._embed(picture, tokens)
            with torch.autocast(picture.device.type, torch.bfloat16, enabled=autocast):
                for index in range(last + 1):
                    facets = wanted.get(index, {})
                    arguments = (self.model.blocks[index], x, rope, set(facets), index == last)
                    if recompute and x.requires_grad:
                        x, by_facet = checkpoint(run_block, *arguments, use_reentrant=False, preserve_rng_state=False)
                    else:
                        x, by_facet = run_block(*arguments)
                    for facet, same in facets.items():
                        extracted.update(dict.fromkeys(same, by_facet[facet].float()))
        return extracted

    def _embed(self, picture: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Input of the first block, `[B, T, D]`, and the rotary embedding of models that have one."""
        model = self.model
        patches = model.patch_embed((picture - self.mean) / self.std)
        if lacks_antialiasing(picture.device) and model.pos_embed is not None:
            embedded = _on_cpu(model)._pos_embed(patches.cpu()).to(patches)  # timm resamples its table with it
        else:
            embedded = model._pos_embed(patches)
        x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        if tokens is not None:
            x = torch.cat([x[:, : self.prefix], x[:, self.prefix :][:, tokens]], dim=1)
            rope = rope if rope is None else rope[tokens]
        return model.norm_pre(x), rope


def _on_cpu(model: Any) -> Any:
    """A model whose own parameters, the tokens and position table before the blocks, are on the CPU."""
    copied = copy.copy(model)
    copied._parameters = {name: None if value is None else value.cpu() for name, value in model._parameters.items()}
    return copied
