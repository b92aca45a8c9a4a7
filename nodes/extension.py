"""The list of nodes, as ComfyUI asks for it."""

from comfy_api.latest import ComfyExtension, io

from . import analysis, backbone, clip, features, generator, measure, mixture, objective, sampling, transfer
from .finish import register_routes
from .folders import place_examples, register_folders
from .schema import check_limits


class SpliceExtension(ComfyExtension):
    def __init__(self) -> None:  # ComfyUI 0.8 does not call `on_load` yet
        register_folders()
        place_examples()
        register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes: list[type[io.ComfyNode]] = [
            transfer.AppearanceTransfer,
            transfer.InstantTransfer,
            transfer.RefinedTransfer,
            mixture.Interpolate,
            clip.Clip,
            clip.InstantClip,
            backbone.LoadBackbone,
            features.ExtractFeatures,
            features.SelfSimilarity,
            features.BlendFeatures,
            objective.AppearanceTerm,
            objective.StructureTerm,
            objective.IdentityTerm,
            objective.TokenDistanceTerm,
            transfer.Optimizer,
            generator.ApplyGenerator,
            generator.SaveGenerator,
            generator.LoadGenerator,
            sampling.SamplerGuidance,
            measure.Measure,
            clip.Flicker,
            analysis.PCA,
            analysis.SimilarityMap,
            analysis.AttentionMap,
            analysis.InvertFeatures,
            analysis.Ablation,
        ]
        return [check_limits(node) for node in nodes]
