"""How far a result is from its two sources."""

from comfy_api.latest import io

from ..splice_engine import SpliceError, measure
from ..splice_engine.objective import VIT_SIZE
from . import host, sockets
from .features import layer_widget
from .host import CATEGORY


class Measure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceMeasure",
            display_name="Splice Measure",
            **host.found_by("compare", "metric", "distance"),
            category=CATEGORY,
            description="Measures how much structure a result has kept and how near its look is, for one picture each.",
            inputs=[
                io.Image.Input("structure", tooltip="The picture whose shapes were to be kept."),
                io.Image.Input("appearance", tooltip="The picture whose look was to be given."),
                io.Image.Input("output", tooltip="The result."),
                sockets.Backbone.Input("backbone", tooltip="Judges; only figures of one backbone can be compared."),
                layer_widget(),
                io.Int.Input(
                    "size",
                    default=VIT_SIZE,
                    min=32,
                    max=2048,
                    tooltip="Short side in pixels at which it looks; only figures of one size can be compared.",
                ),
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
        with host.working():
            whats = {"structure picture": structure, "appearance picture": appearance, "output": output}
            batches = [host.pictures(image, what) for what, image in whats.items()]
            if any(len(batch) > 1 for batch in batches):
                raise SpliceError("one result is measured at a time: pick one picture of the batch")
            (vit,) = host.place([backbone])
            m = measure(*(batch[0] for batch in batches), vit, layer, size)
            report = (
                f"structure distance {m.structure_distance:.4g}, appearance distance {m.appearance_distance:.4g}, "
                f"appearance cosine {m.appearance_cosine:.4g} ({m.backbone}, layer {m.layer}, {m.size} px, {m.dtype})"
            )
            return io.NodeOutput(m.structure_distance, m.appearance_distance, m.appearance_cosine, report)
