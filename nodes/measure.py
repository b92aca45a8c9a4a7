"""How far a result is from its two sources."""

from comfy_api.latest import io

from ..splice_engine import SpliceError, measure
from .convert import from_image
from .memory import engine_context, load_to_device
from .progress import Cancellable
from .schema import make_schema
from .widgets import backbone_input, layer_widget, vit_size_widget


class Measure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceMeasure",
            display_name="Splice Measure",
            group="analysis",
            search_aliases=("compare", "metric", "distance"),
            description="Measures how far a result is from the structure of one picture and from the appearance of the "
            "other, for one picture each.",
            inputs=[
                io.Image.Input("structure", tooltip="The picture whose structure was to be kept."),
                io.Image.Input("appearance", tooltip="The picture whose appearance was to be transferred."),
                io.Image.Input("output", tooltip="The result."),
                backbone_input("The ViT that compares; only figures of one backbone can be compared."),
                layer_widget(),
                vit_size_widget(more="Only figures of one size can be compared."),
            ],
            outputs=[
                io.Float.Output("structure_distance", tooltip="Between the self-similarities; 0 is the same."),
                io.Float.Output("appearance_distance", tooltip="Between the [CLS] tokens; 0 is the same."),
                io.Float.Output("appearance_cosine", tooltip="Of the [CLS] tokens; 1 is the same."),
                io.String.Output("report", tooltip="All of it in words."),
            ],
        )

    @classmethod
    def execute(cls, structure, appearance, output, backbone, layer: int, size: int) -> io.NodeOutput:
        with engine_context(), Cancellable():
            named = {"structure picture": structure, "appearance picture": appearance, "output": output}
            batches = [from_image(image, name) for name, image in named.items()]
            if any(len(batch) > 1 for batch in batches):
                raise SpliceError("one result is measured at a time: Image From Batch picks one of a batch")
            (vit,) = load_to_device([backbone])
            m = measure(*(batch[0] for batch in batches), vit, layer, size)
            report = (
                f"structure distance {m.structure_distance:.4g}, appearance distance {m.appearance_distance:.4g}, "
                f"appearance cosine {m.appearance_cosine:.4g} ({m.backbone}, layer {m.layer}, {m.size} px, {m.dtype})"
            )
            return io.NodeOutput(m.structure_distance, m.appearance_distance, m.appearance_cosine, report)
