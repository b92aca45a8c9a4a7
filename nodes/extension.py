"""The list of nodes, as ComfyUI asks for it."""

from comfy_api.latest import ComfyExtension, io

from . import backbone, features, generator, host, measure, objective, transfer, vision


class SpliceExtension(ComfyExtension):
    def __init__(self) -> None:  # ComfyUI 0.8 does not call `on_load` yet
        host.register_folders()
        host.register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            transfer.AppearanceTransfer,
            transfer.InstantTransfer,
            backbone.LoadBackbone,
            features.ExtractFeatures,
            features.SelfSimilarity,
            features.BlendFeatures,
            objective.AppearanceTerm,
            objective.StructureTerm,
            objective.IdentityTerm,
            transfer.Optimizer,
            generator.ApplyGenerator,
            generator.SaveGenerator,
            generator.LoadGenerator,
            measure.Measure,
            vision.PCA,
            vision.SimilarityMap,
            vision.AttentionMap,
            vision.InvertFeatures,
            vision.Ablation,
        ]
