"""Features of pictures, their self-similarity and their blends."""

import torch
from comfy_api.latest import io

from .. import splice_engine as engine
from ..splice_engine import Features, blend
from ..splice_engine.vit.features import FACETS, join
from . import sockets
from .convert import from_image, to_image, to_intermediate
from .memory import engine_context, load_to_device, pass_bytes
from .progress import Cancellable, with_progress
from .schema import make_schema
from .widgets import backbone_input, blend_inputs, facet_widget, layer_widget, vit_size_widget

BLENDED = range(1, 5)
"""Numbers of the features that a blend takes."""


class ExtractFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceExtractFeatures",
            display_name="Splice Extract Features",
            group="features",
            search_aliases=("dino", "vit", "embedding"),
            description="Extracts the features of pictures from one block of a ViT.",
            inputs=[
                io.Image.Input("image", tooltip="One picture, or a batch."),
                backbone_input(),
                layer_widget(),
                facet_widget(
                    FACETS, "key", "What is read for each patch: the keys tell structure best, the tokens meaning."
                ),
                vit_size_widget(),
            ],
            outputs=[sockets.Features.Output("features", tooltip="One [CLS] token for each picture, and its patches.")],
        )

    @classmethod
    def execute(cls, image, backbone, layer: int, facet: str, size: int) -> io.NodeOutput:
        with engine_context(), Cancellable(), torch.no_grad():
            pictures = from_image(image, "picture")
            (vit,) = load_to_device([backbone], pass_bytes(backbone, pictures[0], size))
            return io.NodeOutput(
                join(
                    [
                        to_intermediate(vit.features(picture.to(vit.device), layer, facet, size))
                        for picture in with_progress(pictures)
                    ]
                )
            )


class SelfSimilarity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceSelfSimilarity",
            display_name="Splice Self-Similarity",
            group="features",
            description="How alike each place of a picture is to each other one: the paper's descriptor of structure.",
            inputs=[sockets.Features.Input("features", tooltip="Of the facet key for the paper's descriptor.")],
            outputs=[
                sockets.Similarity.Output("similarity", tooltip="For a structure term."),
                io.Image.Output("image", tooltip="The matrix as a picture: white is alike; [CLS] is the first row."),
            ],
        )

    @classmethod
    def execute(cls, features: Features) -> io.NodeOutput:
        with engine_context():
            similarity = engine.SelfSimilarity.of(features)
            return io.NodeOutput(similarity, to_image([similarity.matrix[:, None].clamp(0, 1).expand(-1, 3, -1, -1)]))


class BlendFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceBlendFeatures",
            display_name="Splice Blend Features",
            group="features",
            description="The weighted mean of several pictures' features, so that an appearance can be a mixture.",
            inputs=[input for number in BLENDED for input in blend_inputs(number)],
            outputs=[
                sockets.Features.Output(
                    "features", tooltip="Patches are blended only where all pictures have one shape; [CLS] always."
                )
            ],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        given = [number for number in BLENDED if inputs.get(f"features_{number}") is not None]
        with engine_context():
            return io.NodeOutput(
                blend([inputs[f"features_{n}"] for n in given], [inputs[f"weight_{n}"] for n in given])
            )
