"""What a backbone sees: features, their self-similarity and their blends."""

import torch
from comfy_api.latest import io

from ..splice_engine import Features, blend, self_similarity
from ..splice_engine.features import FACETS
from ..splice_engine.objective import VIT_SIZE
from . import host, sockets
from .host import CATEGORY


def layer_widget() -> io.Int.Input:
    """The choice of a block."""
    return io.Int.Input(
        "layer",
        default=-1,
        min=-64,
        max=63,
        tooltip="Block of the transformer: 0 is the first, -1 the last. Shallow blocks see edges, deep ones meaning.",
    )


def backbone_input() -> io.Input:
    return sockets.Backbone.Input("backbone", tooltip="From Splice Load Backbone.")


def view_widget(default: int = VIT_SIZE) -> io.Int.Input:
    """The choice of how finely the backbone looks."""
    return io.Int.Input(
        "size",
        default=default,
        min=32,
        max=2048,
        tooltip="Short side in pixels at which the backbone looks; more is finer and slower.",
    )


class ExtractFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceExtractFeatures",
            display_name="Splice Extract Features",
            **host.found_by("dino", "vit", "embedding"),
            category=CATEGORY,
            description="What one block of a backbone sees in pictures.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures to look at, a batch or one."),
                backbone_input(),
                layer_widget(),
                io.Combo.Input(
                    "facet",
                    options=list(FACETS),
                    default="key",
                    tooltip="What to read of each patch: the keys tell structure best, the tokens meaning.",
                ),
                view_widget(),
            ],
            outputs=[sockets.Features.Output("features", tooltip="One [CLS] token for each picture, and its patches.")],
        )

    @classmethod
    def execute(cls, image, backbone, layer: int, facet: str, size: int) -> io.NodeOutput:
        with host.working(), torch.no_grad():
            pictures = torch.cat(host.pictures(image, "picture"))
            (vit,) = host.place([backbone])
            seen = vit.features(pictures.to(vit.device), layer, facet, size)
            return io.NodeOutput(host.kept(seen))


class SelfSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceSelfSimilarity",
            display_name="Splice Self-Similarity",
            category=CATEGORY,
            description="How alike each place of a picture is to each other one: the paper's descriptor of structure.",
            inputs=[sockets.Features.Input("features", tooltip="Of the facet key for the paper's descriptor.")],
            outputs=[
                sockets.Similarity.Output("similarity", tooltip="For a structure term."),
                io.Image.Output("image", tooltip="The matrix as a picture: white is alike; [CLS] is the first row."),
            ],
        )

    @classmethod
    def execute(cls, features: Features) -> io.NodeOutput:
        with host.working():
            similarity = self_similarity(features)
            return io.NodeOutput(similarity, host.image([similarity[:, None].clamp(0, 1).expand(-1, 3, -1, -1)]))


class BlendFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def weight(number: int) -> io.Float.Input:
            return io.Float.Input(
                f"weight_{number}",
                default=1.0,
                min=0.0,
                max=100.0,
                step=0.05,
                tooltip=f"Share of features_{number}; only the ratio of the weights counts.",
            )

        def features(number: int) -> io.Input:
            return sockets.Features.Input(
                f"features_{number}",
                optional=number > 2,
                tooltip="Of the same backbone, layer and facet as the others.",
            )

        return io.Schema(
            node_id="SpliceBlendFeatures",
            display_name="Splice Blend Features",
            category=CATEGORY,
            description="The weighted mean of several pictures' features, so that an appearance can be a mixture.",
            inputs=[make(number) for number in range(1, 5) for make in (features, weight)],
            outputs=[
                sockets.Features.Output(
                    "features", tooltip="Patches are blended only where all pictures have one shape; [CLS] always."
                )
            ],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        given = [number for number in range(1, 5) if inputs.get(f"features_{number}") is not None]
        with host.working():
            return io.NodeOutput(
                blend([inputs[f"features_{n}"] for n in given], [inputs[f"weight_{n}"] for n in given])
            )
