"""Key frames: the few frames of a clip in which all that the others show can be found."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize
from ..vit.backbone import Backbone, Request

CANDIDATES = 32
"""Frames of a clip that are compared, evenly spread."""

SIZE = 224
"""Short side in pixels of what the ViT gets of them."""

NOVEL = 0.02
"""Distance up to which a frame shows nothing that another one does not."""


def candidate_frames(count: int) -> list[int]:
    """Indices of the frames of a clip that are compared, in order."""
    if count <= CANDIDATES:
        return list(range(count))
    return [round((count - 1) * index / (CANDIDATES - 1)) for index in range(CANDIDATES)]


@torch.no_grad()
def choose_key_frames(frames: Iterable[Tensor], backbone: Backbone, most: int) -> list[int]:
    """Chooses frames in whose patches the patches of all frames find counterparts, as far as a few frames can.

    The first is the frame that has the most in common with all; each further one is that of which the frames so far
    lack most. A frame lacks of another the mean, over the other's patches, of the cosine distance to its most similar
    patch.

    Args:
        frames: `[1, 3, H, W]` in 0..1, all of one size; of each only its features are kept.
        backbone: The ViT whose deepest tokens are compared.
        most: How many to choose at most: fewer where they would show nothing new.

    Returns:
        Their places among the frames, in order.
    """
    tokens = [_extract(frame, backbone) for frame in frames]
    lacks = torch.stack([torch.stack([_lack(here, there) for there in tokens]) for here in tokens])
    chosen = [int(lacks.sum(dim=1).argmin())]
    while len(chosen) < most:
        farthest = lacks[chosen].amin(dim=0)
        if farthest.max() < NOVEL:
            break
        chosen.append(int(farthest.argmax()))
    return sorted(chosen)


def _extract(frame: Tensor, backbone: Backbone) -> Tensor:
    """Unit vectors of a frame's patches, `[N, D]`."""
    request = Request(-1, "token")
    size = backbone.grid_size(frame.shape[-2], frame.shape[-1], short=SIZE)
    tokens = backbone(resize(frame.to(backbone.device), size), [request])[request]
    return F.normalize(tokens.flatten(0, -2), dim=-1)


def _lack(here: Tensor, there: Tensor) -> Tensor:
    return 1 - (there @ here.T).amax(dim=1).mean()
