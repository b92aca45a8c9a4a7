"""Optimises the brightness of a painted picture, as a Laplacian pyramid added to it.

A relaxed earth mover's distance between tokens of middle blocks, as Kolkin et al. have it ("Style Transfer by Relaxed
Optimal Transport and Self-Similarity", 2019), moves what a place shows towards what its counterparts in B show, and the
paper's structure term holds the layout. A sliced Wasserstein distance between small patches of A and of their matches
in B, in which no ViT takes part, keeps contrasts and detail to B's. The correlation with A around its edges, where B's
texture gives way to its detail, keeps apart what lies side by side and has one counterpart in B, such as the slices of
a fruit. Colours are left alone: pushed by tokens, they run away into noise and casts.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, short_side_size, sides
from ..matching.correspondence import TEMPERATURE, Correspondence
from ..matching.filters import expand, laplacian_pyramid, to_grey
from ..settings import VIT_SIZE, RefinementSettings
from ..vit.backbone import Backbone, Request
from ..vit.dense import extract_dense, shift
from .distances import edge_distance, patch_distance, relaxed_transport
from .losses import Structure

STRUCTURE = Structure()
"""The paper's term, whose self-similarity is compared."""

DEPTHS = (0.2, 0.45, 0.7)
"""Blocks whose tokens are compared, as shares of all of them: texture, parts, objects."""

TOKENS = 1536
"""Tokens of B that a step compares with, drawn by how often A matches them."""

SEMANTIC_COST = 0.5
"""Weight of the distance between descriptors beside that of the tokens: parts find their counterparts."""

WEIGHTS = {"tokens": 1.0, "moments": 0.3, "structure": 100.0, "patches": 2.0, "edges": 1.0, "tie": 60.0, "range": 1.0}
"""Of the losses. `moments` are the means of tokens; `tie` holds means over patches to the instant transfer's, without
which tokens leave grey smudges on what is white; `range` holds pixels in 0..1."""

LEVEL_RATES, LOW_PASS_RATE = (0.25, 0.5, 1.0, 1.0, 0.6), 0.2
"""Shares of the learning rate, from the finest level on, and that of what the levels leave: B's grain is in the fine
ones already, and slow changes over the whole picture would be casts."""

LEAST_LEVEL = 8
"""Pixels of the coarsest level's short side at least."""


class BrightnessOptimizer:
    """The steps of a refinement.

    Args:
        a: The structure picture, `[1, 3, h, w]`, on the ViT's grid of patches.
        b: The appearance picture, likewise.
        start: The instant transfer, of A's size.
        match: Which cells of the pictures belong to which.
        backbone: The ViT.
        mask: `[1, 1, H, W]`, the part of A whose patches are compared; None is all of it.
        kept: `[1, 1, H, W]` in 0..1, of any size: how firmly A's own edges are kept.
        settings: The recipe, of which the seed and `recompute` count here.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        start: Tensor,
        match: Correspondence,
        backbone: Backbone,
        mask: Tensor | None,
        kept: Tensor,
        settings: RefinementSettings,
    ) -> None:
        self.edges_of_a = (to_grey(a), resize(kept, sides(a)) * (1 if mask is None else resize(mask, sides(a))))
        self.start, self.match, self.backbone, self.recompute = start, match, backbone, settings.recompute
        self.rng = torch.Generator().manual_seed(settings.seed)
        count = max(1, min(len(LEVEL_RATES), int(math.log2(max(2, min(sides(a)) / LEAST_LEVEL)))))
        self.levels = [level.requires_grad_() for level in laplacian_pyramid(torch.zeros_like(start[:, :1]), count)]
        self.shares = (*LEVEL_RATES[:count], LOW_PASS_RATE)
        self.optimizer = torch.optim.RMSprop([{"params": [level]} for level in self.levels])
        self._prepare_patches(b, mask)
        self._prepare_tokens(b)
        self.small = short_side_size(*sides(a), min(VIT_SIZE, *sides(a)), None, backbone.patch)
        with torch.no_grad():
            self.similarity = self._self_similarity(a)

    def change(self) -> Tensor:
        """The change of brightness, `[1, 1, h, w]`."""
        change = self.levels[-1]
        for level in self.levels[-2::-1]:
            change = expand(change, sides(level)) + level
        return change

    def take_step(self, rate: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One step with a learning rate: its total, and the unweighted losses by name."""
        picture = self.start + self.change()
        losses = {
            **self._token_losses(picture),
            "structure": F.mse_loss(self._self_similarity(picture), self.similarity),
            "patches": patch_distance(list(laplacian_pyramid(picture))[:-1], *self.patches_of_b, self.rng),
            "edges": edge_distance(to_grey(picture), *self.edges_of_a),
            "tie": F.avg_pool2d(picture - self.start, self.backbone.patch).square().mean(),
            "range": (picture - picture.clamp(0, 1)).abs().mean(),
        }
        total = torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = rate * share
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        return total.detach(), {name: loss.detach() for name, loss in losses.items()}

    def state(self) -> dict[str, Any]:
        """All that steps change, as tensors and plain values."""
        return {
            "levels": [level.detach() for level in self.levels],
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Brings the steps to where `state` was taken."""
        with torch.no_grad():
            for level, saved in zip(self.levels, state["levels"], strict=True):
                level.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])

    def _prepare_patches(self, b: Tensor, mask: Tensor | None) -> None:
        """B's pyramid, the cells of A and their matches, and both grids."""
        match = self.match
        cells = torch.arange(len(match.source), device=b.device)
        if mask is not None:
            covered = resize(mask, match.source_grid).flatten() > 0.5
            cells = cells[covered] if covered.any() else cells
        row, column = match.matches().flatten(1)[:, cells]
        matches = row * match.target_grid[1] + column
        self.patches_of_b = (list(laplacian_pyramid(b))[:-1], (cells, matches), (match.source_grid, match.target_grid))

    @torch.no_grad()
    def _prepare_tokens(self, b: Tensor) -> None:
        """Tokens of B and of its mirror image, their descriptors, and how much A matches each."""
        match, last = self.match, self.backbone.depth - 1
        self.requests = list(dict.fromkeys(Request(round(share * last), "token") for share in DEPTHS))
        both = extract_dense(torch.cat([b, b.flip(-1)]), self.backbone, self.requests, 2)
        grid = both[self.requests[0]].shape[1:3]

        def to_grid(values: Tensor) -> Tensor:
            values = F.interpolate(
                values.T.reshape(1, -1, *match.target_grid), grid, mode="bilinear", align_corners=False
            )
            return torch.cat([values, values.flip(-1)]).movedim(1, -1).flatten(0, 2)

        usage = to_grid(match.usage(TEMPERATURE * 5 / 3)[:, None]).flatten()
        self.usage = usage / usage.sum()
        self.tokens_of_b = [both[request].flatten(0, 2) for request in self.requests]
        self.means = [(tokens * self.usage[:, None]).sum(dim=0) for tokens in self.tokens_of_b]
        self.joined = self._join(self.tokens_of_b)
        self.descriptors = F.normalize(to_grid(match.target), dim=-1)

    def _join(self, tokens: list[Tensor]) -> Tensor:
        """Tokens of several blocks as unit vectors `[N, D]`, each block's centred on B's mean."""
        parts = [F.normalize(part - mean, dim=-1) for part, mean in zip(tokens, self.means, strict=True)]
        return torch.cat(parts, dim=-1) / len(parts) ** 0.5

    def _self_similarity(self, picture: Tensor) -> Tensor:
        request = STRUCTURE.request
        keys = self.backbone(resize(picture, self.small), [request], recompute=self.recompute)[request]
        return STRUCTURE.descriptor(keys, self.backbone)

    def _token_losses(self, picture: Tensor) -> dict[str, Tensor]:
        """Losses of the picture, shifted within a patch and mirrored at random, so that the grid leaves no trace."""
        patch, match = self.backbone.patch, self.match
        reach = max(0, patch // 2 - 1)
        down, right = torch.randint(-reach, reach + 1, (2,), generator=self.rng).tolist()
        descriptors = match.source.T.reshape(1, -1, *match.source_grid)
        cells = [side / count for side, count in zip(sides(picture), match.source_grid, strict=True)]
        descriptors = shift(descriptors, round(down / cells[0]), round(right / cells[1]))
        picture = shift(picture, down, right)
        grid = (sides(picture)[0] // patch, sides(picture)[1] // patch)
        descriptors = F.interpolate(descriptors, grid, mode="bilinear", align_corners=False)
        if torch.rand((), generator=self.rng) < 0.5:
            picture, descriptors = picture.flip(-1), descriptors.flip(-1)
        extracted = self.backbone(picture, self.requests, recompute=self.recompute)
        tokens = [extracted[request][0, self.backbone.prefix :] for request in self.requests]
        drawn = torch.multinomial(self.usage.cpu(), TOKENS, replacement=True, generator=self.rng).to(picture.device)
        semantic = 1 - F.normalize(descriptors[0].flatten(1).T, dim=-1) @ self.descriptors[drawn].T
        moments = [
            (own.mean(dim=0) - wanted[drawn].mean(dim=0)).abs().mean() / wanted[drawn].std()
            for own, wanted in zip(tokens, self.tokens_of_b, strict=True)
        ]
        return {
            "tokens": relaxed_transport(1 - self._join(tokens) @ self.joined[drawn].T + SEMANTIC_COST * semantic),
            "moments": torch.stack(moments).sum(),
        }
