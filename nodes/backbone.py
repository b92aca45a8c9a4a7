"""Loading the ViT that judges."""

from comfy_api.latest import io

from ..splice_engine.catalogue import DEFAULT_BACKBONE
from ..splice_engine.devices import DTYPES
from . import host, sockets
from .host import CATEGORY


def backbone_widget() -> io.Combo.Input:
    """The choice of a backbone."""
    return io.Combo.Input(
        "backbone_name",
        options=host.backbone_names(),
        default=DEFAULT_BACKBONE,
        tooltip="The DINO vision transformer that judges. A name is fetched once, when it is run; "
        "your own files go into models/dino.",
    )


class LoadBackbone(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceLoadBackbone",
            display_name="Splice Load Backbone",
            **host.found_by("dino", "vit", "load model"),
            category=CATEGORY,
            description="Loads a frozen DINO vision transformer, which tells what is where in a picture.",
            inputs=[
                backbone_widget(),
                io.Combo.Input(
                    "precision",
                    options=["auto", *DTYPES],
                    default="auto",
                    tooltip="Of its matrix products: auto takes bf16 where the device is made for it.",
                ),
            ],
            outputs=[sockets.Backbone.Output("backbone", tooltip="For all Splice nodes that look at pictures.")],
        )

    @classmethod
    def execute(cls, backbone_name: str, precision: str) -> io.NodeOutput:
        with host.working():
            return io.NodeOutput(host.load_backbone(backbone_name, precision))
