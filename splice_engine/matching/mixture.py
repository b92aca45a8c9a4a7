"""The instant transfer of several appearances at once: a weighted mixture, and the frames from one to another."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import SpliceError
from ..mixing import to_shares
from ..settings import InstantSettings
from ..vit.backbone import Backbone
from .descriptors import MATCH_PATCHES
from .instant import InstantTransfer

Mask = TypeVar("Mask")


@dataclass(frozen=True)
class InstantMixture:
    """The structure picture A in a mixture of several appearances.

    Each of them is matched with A for itself. Colours are the weighted mean of theirs, place by place. So are the
    textures laid over them, but divided by the root of the sum of the squared weights: a plain mean of textures that
    have nothing to do with each other would be weaker than each of them, and flat (Heitz and Neyret, "High-Performance
    By-Example Noise using a Histogram-Preserving Blending Operator", 2018).

    Attributes:
        parts: The instant transfer of each appearance alone.
        shares: How much each counts, at least 0, with a sum of 1.
    """

    parts: tuple[InstantTransfer, ...]
    shares: tuple[float, ...]

    @classmethod
    def between(
        cls,
        structure: Tensor,
        appearances: Sequence[Tensor],
        backbone: Backbone,
        weights: Sequence[float] | None = None,
        settings: InstantSettings = InstantSettings(),  # noqa: B008 (frozen)
        structure_mask: Tensor | None = None,
        appearance_masks: Sequence[Tensor | None] | None = None,
        short_patches: int = MATCH_PATCHES,
    ) -> "InstantMixture":
        """Matches the structure picture with each of the others.

        Args:
            structure: A, `[1, 3, H, W]` in 0..1.
            appearances: Likewise, of any sizes.
            backbone: The ViT whose features are matched.
            weights: One for each appearance, at least 0; only their ratio counts. None is equal weights.
            settings: As for `InstantTransfer.between`, likewise what is not named here.
            structure_mask: Where A is to change.
            appearance_masks: One or None for each appearance; None is none at all.
            short_patches: Fineness of the matching.

        Raises:
            SpliceError: No appearance, weights or masks of another number, or what an `InstantTransfer` cannot work
                with.
        """
        shares = to_shares(weights, len(appearances))
        masks = pair_masks(appearance_masks, len(appearances))
        parts = [
            InstantTransfer.between(
                structure, appearance, backbone, settings, structure_mask, mask, short_patches=short_patches
            )
            for appearance, mask in zip(appearances, masks, strict=True)
        ]
        return cls(tuple(parts), shares)

    def image(self, size: int | None = None) -> Tensor:
        """The picture, painted where the mask allows it; arguments and result as for `InstantTransfer.image`."""
        return self.parts[0].composite(self.painted(size))

    @torch.no_grad()
    def painted(self, size: int | None = None) -> Tensor:
        """The picture painted everywhere, also where the mask does not allow it."""
        return self._mix((part.layers(size) for part in self.parts), self.shares)

    @torch.no_grad()
    def frames(self, count: int, size: int | None = None) -> Iterator[Tensor]:
        """Pictures on the way from the first of two appearances to the second, as `image` gives them.

        Args:
            count: How many, at least 2: the first has the first appearance alone, the last the second alone.
            size: As for `image`.

        Raises:
            SpliceError: Fewer than two frames, or not two appearances.
        """
        if len(self.parts) != 2:
            raise SpliceError(f"frames lead from one appearance to another: give two, not {len(self.parts)}")
        if count < 2:
            raise SpliceError(f"frames must be at least 2, not {count}")
        layers = [part.layers(size) for part in self.parts]
        for index in range(count):
            share = index / (count - 1)
            yield self.parts[0].composite(self._mix(layers, (1 - share, share)))

    def _mix(self, layers: Iterable[tuple[Tensor, Tensor]], shares: Sequence[float]) -> Tensor:
        """The picture of the colours and textures of all parts."""
        # What is background depends on the appearance too.
        regions = torch.stack([share * part.regions for share, part in zip(shares, self.parts, strict=True)]).sum(dim=0)
        colours = texture = torch.zeros(())
        for share, (own_colours, own_texture) in zip(shares, layers, strict=True):
            colours, texture = share * own_colours + colours, share * own_texture + texture
            del own_colours, own_texture  # before those of the next part, or the joining, take as much
        whole = replace(self.parts[0], regions=regions)
        return whole.join(colours, texture.div_(sum(share**2 for share in shares) ** 0.5))


def pair_masks(masks: Sequence[Mask | None] | None, count: int) -> list[Mask | None]:
    """The masks of so many appearances, of whatever kind they are; None is none at all.

    Raises:
        SpliceError: They are of another number.
    """
    given: list[Mask | None] = [None] * count if masks is None else list(masks)
    if len(given) != count:
        raise SpliceError(f"give as many appearance masks as appearance pictures: {count}, not {len(given)}")
    return given
