"""Loading the ViT."""

from comfy_api.latest import io

from . import folders, sockets
from .memory import engine_context, load_backbone
from .schema import make_schema
from .widgets import backbone_name_widget, precision_widget


class LoadBackbone(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceLoadBackbone",
            display_name="Splice Load Backbone (DINO)",
            search_aliases=("dino", "vit", "load model"),
            description="Loads a frozen DINO vision transformer (ViT), whose features tell which part is which.",
            inputs=[backbone_name_widget(), precision_widget()],
            outputs=[sockets.Backbone.Output("backbone", tooltip="For all Splice nodes that compute features.")],
        )

    @classmethod
    def validate_inputs(cls, backbone_name: str | None = None) -> bool | str:
        return folders.check_name(folders.backbone_source, backbone_name)

    @classmethod
    def execute(cls, backbone_name: str, precision: str) -> io.NodeOutput:
        with engine_context():
            return io.NodeOutput(load_backbone(backbone_name, precision))
