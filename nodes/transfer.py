"""Transfers: the training, in one node and composable, and the instant one."""

import json

import torch
from comfy_api.latest import io

from .. import splice_engine as engine
from ..splice_engine.analysis.figures import loss_curves
from ..splice_engine.images import from_pil
from . import folders, sockets
from .convert import split_pairs, to_image
from .memory import MATCH_BYTES, PAINT_BYTES, engine_context, load_to_device, recall_backbone
from .mixture import Mixture, split_mixture, weights_widget
from .progress import Cancellable, with_progress
from .schema import make_schema
from .training import TrainingNode, paint_batch, refine, run_batch
from .widgets import (
    BATCH,
    backbone_input,
    backbone_name_widget,
    best_of_widget,
    feather_widget,
    mask_inputs,
    override_widget,
    pair_inputs,
    preset_inputs,
    resolve_preset,
    setting_widget,
)


def picture_output() -> io.Output:
    return io.Image.Output("image", tooltip="The structure picture with the appearance of the other, at full size.")


def generator_output() -> io.Output:
    return sockets.Generator.Output("generator", tooltip="The trained network, for other pictures of the same kind.")


class AppearanceTransfer(TrainingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceAppearanceTransfer",
            display_name="Splice Appearance Transfer (Style)",
            search_aliases=("style transfer", "texture transfer", "neural style"),
            description="Paints one picture with the appearance of another, part by part, by training on the pair. "
            f"{BATCH}",
            inputs=[
                *pair_inputs(),
                backbone_name_widget(),
                *preset_inputs(),
                *mask_inputs(),
                best_of_widget(),
                weights_widget(),
                setting_widget("texture", optional=True),
            ],
            outputs=[picture_output(), generator_output()],
        )

    @classmethod
    def validate_inputs(cls, backbone_name: str | None = None) -> bool | str:
        return folders.check_name(folders.backbone_source, backbone_name)

    @classmethod
    def execute(
        cls,
        structure,
        appearance,
        backbone_name: str,
        preset: str,
        structure_mask=None,
        appearance_mask=None,
        best_of: int = 1,
        weights: str = "",
        **changes: float,
    ) -> io.NodeOutput:
        with engine_context():
            pairs, mixture = split_mixture(structure, appearance, structure_mask, appearance_mask, weights)
            if mixture:
                changes["refine_steps"] = 0
            settings = resolve_preset(preset, **changes)
            outcome = run_batch(
                pairs,
                [recall_backbone(backbone_name, "auto")],
                settings,
                best_of=best_of,
                make_run=mixture.make_run if mixture else engine.Transfer,
            )
            return io.NodeOutput(outcome.image, outcome.generator)


class Optimizer(TrainingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceOptimizer",
            display_name="Splice Optimizer",
            group="training",
            search_aliases=("style transfer", "train", "neural style"),
            description=f"The training with every part in your hands: backbone, objective, recipe. {BATCH}",
            inputs=[
                *pair_inputs(),
                backbone_input("The ViT of all terms that have none of their own, and of the matching."),
                *preset_inputs(),
                override_widget("warm_steps"),
                override_widget("learning_rate", round=False),
                override_widget("vit_size"),
                feather_widget(),
                sockets.Objective.Input(
                    "objective",
                    optional=True,
                    tooltip="The terms that compare features; not connected: the preset's own.",
                ),
                *mask_inputs(),
                sockets.Generator.Input(
                    "generator",
                    optional=True,
                    tooltip="Training starts from a copy of this one, in place of the warm start.",
                ),
                override_widget("refine_steps", optional=True),
                setting_widget("texture", optional=True),
            ],
            outputs=[
                picture_output(),
                generator_output(),
                io.Image.Output("loss_curve", tooltip="Each loss over the steps, one picture for each run."),
                io.String.Output("log", tooltip="All losses of every step, one line of JSON each."),
            ],
        )

    @classmethod
    def execute(
        cls,
        structure,
        appearance,
        backbone,
        preset: str,
        objective=(),
        structure_mask=None,
        appearance_mask=None,
        generator=None,
        **changes: float,
    ) -> io.NodeOutput:
        with engine_context():
            if generator is not None:
                changes["refine_steps"] = changes["warm_steps"] = 0
            settings = resolve_preset(preset, **changes)
            patchers = [backbone, *(part.patcher for part in objective if part.patcher is not None)]
            pairs = split_pairs(structure, appearance, structure_mask, appearance_mask)
            outcome = run_batch(pairs, patchers, settings, [part.term for part in objective], generator)
            curves = [from_pil(loss_curves(steps)) for steps in outcome.losses]
            log = [
                json.dumps({"run": run, "step": index, **values})
                for run, steps in enumerate(outcome.losses)
                for index, values in enumerate(steps)
            ]
            return io.NodeOutput(outcome.image, outcome.generator, to_image(curves), "\n".join(log))


class RefinedTransfer(TrainingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceRefinedTransfer",
            display_name="Splice Refined Transfer (Style)",
            search_aliases=("style transfer", "texture transfer", "sharpen style"),
            description="The instant transfer, then its brightness optimised by the ViT until parts and texture are "
            "those of the appearance picture. No generator is trained.",
            inputs=[
                *pair_inputs(batch="A batch gives one picture each."),
                backbone_input("The ViT whose features are matched and compared."),
                setting_widget("steps", engine.RefinementSettings),
                setting_widget("size", engine.RefinementSettings),
                setting_widget("seed", engine.RefinementSettings, control_after_generate=True),
                setting_widget("learning_rate", engine.RefinementSettings, round=False),
                setting_widget("texture", engine.RefinementSettings),
                feather_widget(),
                *mask_inputs(),
                setting_widget("match_passes", engine.RefinementSettings, optional=True),
                setting_widget("density", engine.RefinementSettings, optional=True),
            ],
            outputs=[picture_output()],
        )

    @classmethod
    def execute(
        cls, structure, appearance, backbone, structure_mask=None, appearance_mask=None, **changes: float
    ) -> io.NodeOutput:
        with engine_context():
            settings = engine.RefinementSettings(**changes)
            pairs = split_pairs(structure, appearance, structure_mask, appearance_mask)
            image = paint_batch(
                pairs, settings.steps, lambda pair, progress: refine(pair, backbone, settings, progress)
            )
            return io.NodeOutput(image)


class InstantTransfer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceInstantTransfer",
            display_name="Splice Instant Transfer (Style, Color)",
            search_aliases=("style transfer", "color transfer", "color match"),
            description="Paints one picture with the colours and texture of another by semantic matching alone, "
            "without training.",
            inputs=[
                *pair_inputs(batch="A batch gives one picture each."),
                backbone_input("The ViT whose features tell which part of one picture belongs to which of the other."),
                setting_widget("texture", engine.InstantSettings),
                feather_widget(),
                *mask_inputs(),
                setting_widget("match_passes", engine.InstantSettings, optional=True),
                setting_widget("density", engine.InstantSettings, optional=True),
                weights_widget(),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The structure picture in the colours and texture of the other.")
            ],
        )

    @classmethod
    def execute(
        cls,
        structure,
        appearance,
        backbone,
        structure_mask=None,
        appearance_mask=None,
        weights: str = "",
        **changes: float,
    ) -> io.NodeOutput:
        with engine_context(), Cancellable(), torch.no_grad():
            settings = engine.InstantSettings(**changes)
            pairs, mixture = split_mixture(structure, appearance, structure_mask, appearance_mask, weights)
            pixels = max(pair.structure[0, 0].numel() for pair in pairs)
            (vit,) = load_to_device([backbone], MATCH_BYTES + PAINT_BYTES * pixels)
            results = []
            for pair in with_progress(pairs):
                if pair.is_left_alone:
                    results.append(pair.structure)
                    continue
                mixed = mixture or Mixture.of(pair)
                instant = engine.InstantMixture.between(
                    pair.structure, mixed.appearances, vit, mixed.weights, settings, pair.structure_mask, mixed.masks
                )
                results.append(instant.image().cpu())
            return io.NodeOutput(to_image(results))
