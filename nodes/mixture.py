"""Several appearances as one: a batch of them with weights, and the frames between two."""

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..splice_engine import InstantMixture, MixtureTransfer, SpliceError
from ..splice_engine.images import check_mask, sides
from ..splice_engine.mixing import parse_weights, to_shares
from ..splice_engine.settings import InterpolationSettings
from .convert import ImagePair, from_image, from_mask, image_dtype, pair_up, split_pairs, to_image
from .memory import MATCH_BYTES, PAINT_BYTES, engine_context, load_to_device
from .progress import Cancellable, with_progress
from .schema import make_schema
from .widgets import backbone_input, feather_widget, setting_widget


@dataclass(frozen=True)
class Mixture:
    """Appearance pictures `[1, 3, H, W]`, masks `[1, 1, h, w]` or None, and a weight for each."""

    appearances: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    weights: Sequence[float]

    @classmethod
    def of(cls, pair: ImagePair) -> "Mixture":
        """That of the one appearance of a pair."""
        return cls([pair.appearance], [pair.appearance_mask], [1.0])

    def make_run(
        self, structure, _appearance, backbone, settings, objective, generator, structure_mask, appearance_mask
    ) -> MixtureTransfer:
        """The run on it; arguments as for `Transfer`."""
        return MixtureTransfer(
            structure,
            self.appearances,
            backbone,
            self.weights,
            settings,
            objective,
            structure_mask,
            self.masks,
            generator,
        )


def weights_widget() -> io.Input:
    return io.String.Input(
        "weights",
        default="",
        optional=True,
        tooltip="Of a batch of appearances, such as 0.7, 0.3: they are mixed, and the mixture is one appearance for "
        "all structure pictures. Only the ratio counts. Empty: the batch is not mixed.",
    )


def split_mixture(
    structure: Tensor, appearance: Tensor, structure_mask: Tensor | None, appearance_mask: Tensor | None, weights: str
) -> tuple[list[ImagePair], Mixture | None]:
    """The pairs of a batch, and the mixture that takes the place of their appearances, where there are weights.

    Raises:
        SpliceError: Weights that cannot be read or of another number than the appearances, or as `split_pairs` says.
    """
    if not weights.strip():
        return split_pairs(structure, appearance, structure_mask, appearance_mask), None
    pictures, masks = from_image(appearance, "appearance picture"), from_mask(appearance_mask, "appearance mask")
    shares = to_shares(parse_weights(weights), len(pictures))
    given = {"appearance pictures": pictures, "appearance masks": [None] if masks is None else list(masks.split(1))}
    rows = pair_up(given, len(pictures))
    for _, mask in rows:
        if mask is not None:
            check_mask(mask, "appearance mask")
    mixture = Mixture(pictures, [mask for _, mask in rows], shares)
    return split_pairs(structure, appearance[:1], structure_mask), mixture


class Interpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceInterpolate",
            display_name="Splice Interpolate (Style, Color)",
            search_aliases=("style transfer", "morph", "video", "blend"),
            description="Frames from one appearance to another on the same structure picture, by semantic matching "
            "alone, without training.",
            inputs=[
                io.Image.Input("structure", tooltip="The one picture whose structure is kept."),
                io.Image.Input("first", tooltip="The picture whose appearance the first frame has."),
                io.Image.Input("last", tooltip="The picture whose appearance the last frame has."),
                backbone_input("The ViT whose features tell which part of one picture belongs to which of the other."),
                setting_widget("frames", InterpolationSettings),
                setting_widget("texture", InterpolationSettings),
                feather_widget(),
                io.Mask.Input(
                    "structure_mask",
                    optional=True,
                    tooltip="Where the structure picture may change; outside it stays as it is.",
                ),
                io.Mask.Input("first_mask", optional=True, tooltip="The part of the first that is transferred."),
                io.Mask.Input("last_mask", optional=True, tooltip="The part of the last that is transferred."),
                setting_widget("match_passes", InterpolationSettings, optional=True),
                setting_widget("density", InterpolationSettings, optional=True),
            ],
            outputs=[
                io.Image.Output(
                    "frames",
                    tooltip="One batch, as Create Video takes it; of odd sides without the last row or column, which a "
                    "video cannot have.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, structure, first, last, backbone, structure_mask=None, first_mask=None, last_mask=None, **changes: float
    ) -> io.NodeOutput:
        with engine_context(), Cancellable(), torch.no_grad():
            settings = InterpolationSettings(**changes)
            given = {"structure": (structure, structure_mask), "first": (first, first_mask), "last": (last, last_mask)}
            pictures, masks = zip(*(_take_one(name, *parts) for name, parts in given.items()), strict=True)
            (vit,) = load_to_device([backbone], MATCH_BYTES + 2 * PAINT_BYTES * pictures[0][0, 0].numel())
            mixture = InstantMixture.between(
                pictures[0], pictures[1:], vit, settings=settings, structure_mask=masks[0], appearance_masks=masks[1:]
            )
            height, width = (side - side % 2 for side in sides(pictures[0]))
            size = (settings.frames, height, width, 3)
            result = torch.empty(size, device=mm.intermediate_device(), dtype=image_dtype())
            frames = mixture.frames(settings.frames)
            for index in with_progress(range(settings.frames)):
                result[index : index + 1] = to_image([next(frames)])[:, :height, :width]
            return io.NodeOutput(result)


def _take_one(name: str, image: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The one picture of an input, and its mask.

    Raises:
        SpliceError: The input has several pictures or masks, or what cannot be worked with.
    """
    pictures, masks = from_image(image, f"{name} picture"), from_mask(mask, f"{name} mask")
    for what, parts in (("pictures", pictures), ("masks", [] if masks is None else masks)):
        if len(parts) > 1:
            raise SpliceError(f"{name} has {len(parts)} {what}, but takes one: Image From Batch picks one of a batch")
    return pictures[0], masks
