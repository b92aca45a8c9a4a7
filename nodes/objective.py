"""The terms of an objective, chained: each node adds one."""

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..splice_engine import Appearance, Features, Identity, SpliceError, Structure, Term
from . import host, sockets
from .features import layer_widget
from .host import CATEGORY


@dataclass(frozen=True)
class Judged:
    """A term, and the backbone that it names as ComfyUI places it."""

    term: Term
    patcher: ModelPatcher | None


def weight_widget(default: float) -> io.Float.Input:
    return io.Float.Input(
        "weight", default=default, min=0.0, max=10_000.0, step=0.1, tooltip="Factor of this term in the sum."
    )


def chain_inputs() -> list[io.Input]:
    return [
        sockets.Objective.Input("objective", optional=True, tooltip="Terms before this one; it is added to them."),
        sockets.Backbone.Input(
            "backbone", optional=True, tooltip="Judges this term alone; not connected: the optimizer's own backbone."
        ),
    ]


def objective_output() -> list[io.Output]:
    return [sockets.Objective.Output("objective", tooltip="For Splice Optimizer, or for another term.")]


def added(objective, kind: type[Term], backbone: ModelPatcher | None, **options) -> io.NodeOutput:
    """The objective with one more term."""
    term = kind(backbone=backbone and backbone.model.backbone, **options)
    return io.NodeOutput((*(objective or ()), Judged(term, backbone)))


class AppearanceTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceAppearanceTerm",
            display_name="Splice Appearance Term",
            category=CATEGORY,
            description="Asks that the output's [CLS] token be that of the appearance picture.",
            inputs=[
                weight_widget(Appearance.weight),
                layer_widget(),
                *chain_inputs(),
                sockets.Features.Input(
                    "target",
                    optional=True,
                    tooltip="A fixed appearance in place of the picture's, such as a blend. Take it from the same "
                    "backbone and layer.",
                ),
            ],
            outputs=objective_output(),
        )

    @classmethod
    def execute(cls, weight: float, layer: int, objective=None, backbone=None, target: Features | None = None):
        with host.working():
            if target is not None and len(target.cls) > 1:
                raise SpliceError("the fixed appearance is a batch of pictures: blend them, or give one picture")
            return added(
                objective,
                Appearance,
                backbone,
                weight=weight,
                layer=layer,
                fixed=None if target is None else target.cls,
            )


class StructureTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceStructureTerm",
            display_name="Splice Structure Term",
            category=CATEGORY,
            description="Asks that the output's parts be as alike to each other as the structure picture's are.",
            inputs=[
                weight_widget(Structure.weight),
                layer_widget(),
                *chain_inputs(),
                sockets.Similarity.Input(
                    "target",
                    optional=True,
                    tooltip="A fixed structure in place of the picture's, from a picture of the same shape. The run "
                    "then looks at whole pictures only, not at crops.",
                ),
            ],
            outputs=objective_output(),
        )

    @classmethod
    def execute(cls, weight: float, layer: int, objective=None, backbone=None, target=None) -> io.NodeOutput:
        return added(objective, Structure, backbone, weight=weight, layer=layer, fixed=target)


class IdentityTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceIdentityTerm",
            display_name="Splice Identity Term",
            category=CATEGORY,
            description="Asks that the generator leave the appearance picture as it is.",
            inputs=[weight_widget(Identity.weight), layer_widget(), *chain_inputs()],
            outputs=objective_output(),
        )

    @classmethod
    def execute(cls, weight: float, layer: int, objective=None, backbone=None) -> io.NodeOutput:
        return added(objective, Identity, backbone, weight=weight, layer=layer)
