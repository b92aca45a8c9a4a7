"""Parts that two pictures have in common, such as fruit, slices and table: clusters of the descriptors of both."""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .correspondence import Correspondence
from .descriptors import principal_directions

LEAST_PARTS, MOST_PARTS = 4, 6
"""Clusters of the coarsest and of the finest division that count; there is one for each number between them too."""

PART_WEIGHT = 0.2
"""Weight of a common part beside the cosine of the descriptors: enough to keep the shaded side of a fruit from being
matched with the table."""

THIN_PATCHES = 2
"""A part is thin where no square fits in that has this many patches to each side of its middle."""

MEMBERSHIP_TEMPERATURE = 0.1
"""Of the softmax over the cosines with the centres of the clusters."""

DIRECTIONS = 32
"""Principal directions of the descriptors in which clusters are found."""

ROUNDS = 10
"""Rounds of k-means for each number of clusters."""

LEAST_MEMBERSHIP = 1e-4
"""Below which a membership is none: products of tiny numbers would take a processor ten times as long."""


@torch.no_grad()
def divide_into_parts(match: Correspondence) -> tuple[Correspondence, Tensor, Tensor]:
    """The correspondence by descriptors and by parts, and where the source and the target are background.

    Clusters of the features of a ViT in several pictures together are their common parts (Amir et al., "Deep ViT
    Features as Dense Visual Descriptors", 2021). How many there should be depends on the pictures, so the memberships
    in several divisions are averaged.

    Returns:
        The correspondence whose similarities are the cosines and, with their weight, the agreement of the parts; and
        the background of both, `[1, 1, h, w]` and `[1, 1, h', w']` in 0..1: of two clusters the one that has more of
        the source's border.
    """
    halves, *divisions = _divide(torch.cat([match.source, match.target]))
    divisions = divisions[LEAST_PARTS - 3 :]  # the first of them is that of three
    memberships = torch.cat(divisions, dim=1) * (PART_WEIGHT / len(divisions)) ** 0.5
    lengths = [len(match.source), len(match.target)]
    source, target = memberships.split(lengths)
    source_halves, target_halves = (
        of_one.T.reshape(1, 2, *grid)
        for of_one, grid in zip(halves.split(lengths), (match.source_grid, match.target_grid), strict=True)
    )
    rims = (source_halves[..., 0, :], source_halves[..., -1, :], source_halves[..., :, 0], source_halves[..., :, -1])
    border = torch.cat(rims, dim=-1)
    background = int((border.mean(dim=-1) - source_halves.mean(dim=(2, 3))).argmax())
    divided = replace(
        match, source=torch.cat([match.source, source], dim=1), target=torch.cat([match.target, target], dim=1)
    )
    return divided, *(x[:, background : background + 1] for x in (source_halves, target_halves))


def find_thin_parts(background: Tensor, density: int) -> Tensor:
    """Where what is not background is thin, as legs and necks are: they are all outline, and would get no texture.

    Args:
        background: `[1, 1, h, w]` in 0..1.
        density: Cells per patch and axis.

    Returns:
        `[1, 1, h, w]`, 0 or 1: what an opening of the foreground takes away, without the slivers at round outlines.
    """
    foreground = (background < 0.5).to(background)
    return _open(foreground - _open(foreground, THIN_PATCHES * density), max(1, density // 2))


def _open(x: Tensor, reach: int) -> Tensor:
    """`[1, 1, h, w]` of 0 and 1 without what no square of so many cells around its middle fits in."""
    wide = F.pad(x, [reach] * 4, mode="replicate")
    eroded = -F.max_pool2d(-wide, 2 * reach + 1, 1, reach)
    return F.max_pool2d(eroded, 2 * reach + 1, 1, reach)[..., reach:-reach, reach:-reach]


def _divide(descriptors: Tensor) -> Iterator[Tensor]:
    """Memberships `[N, k]` of descriptors `[N, D]` in each of k clusters, for every k from two on.

    Each division begins with the last one, of which the cluster that is spread most is cut in two along its principal
    direction: so the same pictures give the same parts, without a random start.
    """
    x = F.normalize(descriptors @ principal_directions(descriptors, DIRECTIONS), dim=-1)
    centres = F.normalize(x.mean(dim=0, keepdim=True), dim=-1)
    for _ in range(MOST_PARTS - 1):
        similarity, cluster = (x @ centres.T).max(dim=1)
        spread = x.new_zeros(len(centres)).index_add_(0, cluster, 1 - similarity)
        widest = int(spread.argmax())
        members = x[cluster == widest]
        along = members @ principal_directions(members - members.mean(dim=0), 1)
        above = along[:, 0] > along.mean()
        halves = [members[above].sum(dim=0), members[~above].sum(dim=0)]
        kept = [centre for index, centre in enumerate(centres) if index != widest]
        centres = F.normalize(torch.stack([*halves, *kept]), dim=-1)
        for _ in range(ROUNDS):
            cluster = F.one_hot((x @ centres.T).argmax(dim=1), len(centres)).to(x)
            # An empty cluster keeps its centre.
            centres = F.normalize(cluster.T @ x + 1e-6 * centres, dim=-1)
        membership = (x @ centres.T / MEMBERSHIP_TEMPERATURE).softmax(dim=1)
        yield membership.where(membership >= LEAST_MEMBERSHIP, 0.0)
