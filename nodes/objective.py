"""The terms of an objective, chained: each node adds one."""

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..splice_engine import Appearance, Features, Identity, SelfSimilarity, Structure, Term, TokenDistance
from . import sockets
from .memory import engine_context
from .schema import make_schema
from .widgets import term_inputs


@dataclass(frozen=True)
class TermInput:
    """A term, and the backbone that it names as ComfyUI moves it."""

    term: Term
    patcher: ModelPatcher | None


def append_term(objective, kind: type[Term], backbone: ModelPatcher | None, **options) -> io.NodeOutput:
    """The objective with one more term."""
    term = kind(backbone=backbone and backbone.model.backbone, **options)
    return io.NodeOutput((*(objective or ()), TermInput(term, backbone)))


def objective_output() -> io.Output:
    return sockets.Objective.Output("objective", tooltip="For Splice Optimizer, or for another term.")


class AppearanceTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceAppearanceTerm",
            display_name="Splice Appearance Term",
            group="training",
            description="Compares the [CLS] tokens of the output and of the appearance picture.",
            inputs=[
                *term_inputs(Appearance),
                sockets.Features.Input(
                    "target",
                    optional=True,
                    tooltip="A fixed appearance in place of the picture's, such as a blend. Take it from the same "
                    "backbone and layer.",
                ),
            ],
            outputs=[objective_output()],
        )

    @classmethod
    def execute(cls, weight: float, layer: int, objective=None, backbone=None, target: Features | None = None):
        with engine_context():
            return append_term(objective, Appearance, backbone, weight=weight, layer=layer, fixed=target)


class StructureTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceStructureTerm",
            display_name="Splice Structure Term",
            group="training",
            description="Compares the self-similarities of the output and of the structure picture: how alike each of "
            "its places is to each other one.",
            inputs=[
                *term_inputs(Structure),
                sockets.Similarity.Input(
                    "target",
                    optional=True,
                    tooltip="A fixed structure in place of the picture's, from a picture of the same shape. The run "
                    "then trains on whole pictures only, not on crops.",
                ),
            ],
            outputs=[objective_output()],
        )

    @classmethod
    def execute(cls, weight: float, layer: int, objective=None, backbone=None, target: SelfSimilarity | None = None):
        with engine_context():
            return append_term(objective, Structure, backbone, weight=weight, layer=layer, fixed=target)


class IdentityTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceIdentityTerm",
            display_name="Splice Identity Term",
            group="training",
            description="Compares the keys of the appearance picture before and after the generator, which is to leave "
            "it as it is.",
            inputs=term_inputs(Identity),
            outputs=[objective_output()],
        )

    @classmethod
    def execute(cls, weight: float, layer: int, objective=None, backbone=None) -> io.NodeOutput:
        with engine_context():
            return append_term(objective, Identity, backbone, weight=weight, layer=layer)


class TokenDistanceTerm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceTokenDistanceTerm",
            display_name="Splice Token Distance Term",
            group="training",
            description="Compares all tokens of the output with all of the appearance picture: each part of the output "
            "is drawn to the part most like it. Middle layers hold texture, deep ones meaning.",
            inputs=term_inputs(TokenDistance),
            outputs=[objective_output()],
        )

    @classmethod
    def execute(cls, weight: float, layer: int, objective=None, backbone=None) -> io.NodeOutput:
        with engine_context():
            return append_term(objective, TokenDistance, backbone, weight=weight, layer=layer)
