"""Transfers: the training, in one node and composable, and the instant one."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..splice_engine import PRESETS, Generator, Palette, Settings, Term, preset
from ..splice_engine.images import from_pil
from ..splice_engine.masks import FEATHER
from ..splice_engine.palette import TEXTURE
from ..splice_engine.pictures import loss_curves
from ..splice_engine.settings import DEFAULT_PRESET
from . import host, sockets
from .backbone import backbone_widget
from .host import CATEGORY

SAFE_INTEGER = 2**53 - 1
"""The largest that the browser counts exactly."""

BATCH = "A batch is one run for each picture, all with the same seed; the generator is then that of the last."

TRAINING_SIZE = (
    "Short side in pixels at which the pair is trained on; time and memory grow with its square, the result has full "
    "size all the same."
)


def pair_inputs(batch: str = BATCH) -> list[io.Input]:
    return [
        io.Image.Input("structure", tooltip=f"The picture whose shapes are kept. {batch}"),
        io.Image.Input(
            "appearance", tooltip="The picture whose look is given: one for all structure pictures, or as many."
        ),
    ]


def feather_widget() -> io.Float.Input:
    return io.Float.Input(
        "feather",
        default=FEATHER,
        min=0.0,
        max=1024.0,
        step=1.0,
        tooltip="Pixels over which the change fades out beyond the edge of the structure mask.",
    )


def mask_inputs() -> list[io.Input]:
    return [
        io.Mask.Input(
            "structure_mask",
            optional=True,
            tooltip="Where the structure picture may change; outside it stays as it is. An empty mask is none.",
        ),
        io.Mask.Input(
            "appearance_mask",
            optional=True,
            tooltip="Which part of the appearance picture gives the look. An empty mask is none.",
        ),
    ]


def recipe_inputs(
    presets: Iterable[str] = PRESETS, default: str = DEFAULT_PRESET, size: str = TRAINING_SIZE
) -> list[io.Input]:
    return [
        io.Combo.Input(
            "preset",
            options=list(presets),
            default=default,
            tooltip="The recipe; `paper` is the paper's own.",
        ),
        io.Int.Input("steps", default=0, min=0, max=100_000, tooltip="Steps of the recipe; 0: the preset's."),
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=8192,
            step=8,
            tooltip=f"{size} 0: the preset's.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=SAFE_INTEGER,
            control_after_generate=True,
            tooltip="The same seed gives the same picture on one CPU, nearly so on a GPU; another one is another try.",
        ),
    ]


def generator_output() -> io.Output:
    return sockets.Generator.Output("generator", tooltip="What was learnt, for other pictures of the same kind.")


def chosen(name: str, recipe: Callable[..., Any] = preset, **widgets: float) -> Any:
    """The preset with what the widgets change; those at 0 change nothing, save the seed.

    Args:
        name: Of the preset.
        recipe: The engine's `preset` or `inversion_preset`.
        widgets: By the names of the settings.
    """
    seed = widgets.pop("seed")
    return recipe(name, seed=seed, **{key: value for key, value in widgets.items() if value})


@dataclass(frozen=True)
class Outcome:
    """What the runs of a batch left.

    Attributes:
        image: IMAGE, one picture for each run.
        generator: That of the last run.
        losses: Of each run, of each of its steps.
    """

    image: Tensor
    generator: Generator
    losses: list[list[dict[str, float]]]


def transferred(
    pairs: Sequence[host.Pair],
    patchers: Sequence[ModelPatcher],
    settings: Settings,
    terms: Sequence[Term] = (),
    start: Generator | None = None,
) -> Outcome:
    """One run for each pair, all from the same start; call it while `host.working`."""
    results, losses, progress = [], [], host.Progress(len(pairs) * settings.all_steps)
    for pair in pairs:
        run, steps = host.train(pair, patchers, settings, progress, terms, start)
        results.append(run.image().cpu())
        losses.append(steps)
        learnt = run.generator.to("cpu")
        del run
    return Outcome(host.image(results), learnt, losses)


class AppearanceTransfer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceAppearanceTransfer",
            display_name="Splice Appearance Transfer",
            **host.found_by("style transfer", "texture transfer", "neural style"),
            category=CATEGORY,
            description=f"Paints one picture with the look of another, part by part, by training on the pair. {BATCH}",
            inputs=[*pair_inputs(), backbone_widget(), *recipe_inputs(), *mask_inputs()],
            outputs=[
                io.Image.Output("image", tooltip="The structure picture with the look of the other, at full size."),
                generator_output(),
            ],
        )

    @classmethod
    def execute(
        cls,
        structure,
        appearance,
        backbone_name: str,
        preset: str,
        steps: int,
        size: int,
        seed: int,
        structure_mask=None,
        appearance_mask=None,
    ) -> io.NodeOutput:
        with host.working():
            settings = chosen(preset, steps=steps, size=size, seed=seed)
            pairs = host.pairs(structure, appearance, structure_mask, appearance_mask)
            outcome = transferred(pairs, [host.load_backbone(backbone_name, "auto")], settings)
            return io.NodeOutput(outcome.image, outcome.generator)


class Optimizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceOptimizer",
            display_name="Splice Optimizer",
            **host.found_by("style transfer", "train", "neural style"),
            category=CATEGORY,
            description=f"The training with every part in your hands: backbone, objective, recipe. {BATCH}",
            inputs=[
                *pair_inputs(),
                sockets.Backbone.Input("backbone", tooltip="Judges all terms that name none of their own."),
                *recipe_inputs(),
                io.Int.Input(
                    "warm_steps",
                    default=-1,
                    min=-1,
                    max=100_000,
                    tooltip="Steps before the recipe, in which the generator learns the instant transfer's picture; "
                    "0: from noise, -1: the preset's.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="Of Adam; lower is steadier and slower. 0: the preset's.",
                ),
                io.Int.Input(
                    "vit_size",
                    default=0,
                    min=0,
                    max=2048,
                    tooltip="Short side in pixels at which the backbone looks, at least 32. 0: the preset's.",
                ),
                feather_widget(),
                sockets.Objective.Input(
                    "objective", optional=True, tooltip="What to aim at; not connected: the preset's own terms."
                ),
                *mask_inputs(),
                sockets.Generator.Input(
                    "generator",
                    optional=True,
                    tooltip="Training goes on from this one, in the place of the warm start; it stays as it is.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The structure picture with the look of the other, at full size."),
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
        steps: int,
        size: int,
        seed: int,
        warm_steps: int,
        learning_rate: float,
        vit_size: int,
        feather: float,
        objective=None,
        structure_mask=None,
        appearance_mask=None,
        generator=None,
    ) -> io.NodeOutput:
        with host.working():
            settings = chosen(preset, steps=steps, size=size, seed=seed, learning_rate=learning_rate, vit_size=vit_size)
            settings = replace(settings, feather=feather)
            if generator is not None:
                settings = replace(settings, warm_steps=0)
            elif warm_steps >= 0:
                settings = replace(settings, warm_steps=warm_steps)
            judged = objective or ()
            patchers = [backbone, *(part.patcher for part in judged if part.patcher is not None)]
            pairs = host.pairs(structure, appearance, structure_mask, appearance_mask)
            outcome = transferred(pairs, patchers, settings, [part.term for part in judged], generator)
            curves = [from_pil(loss_curves(steps)) for steps in outcome.losses]
            log = [
                json.dumps({"run": run, "step": index, **values})
                for run, steps in enumerate(outcome.losses)
                for index, values in enumerate(steps)
            ]
            return io.NodeOutput(outcome.image, outcome.generator, host.image(curves), "\n".join(log))


class InstantTransfer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceInstantTransfer",
            display_name="Splice Instant Transfer",
            **host.found_by("style transfer", "color transfer", "color match"),
            category=CATEGORY,
            description="Paints one picture with the look of another by semantic matching alone, without training.",
            inputs=[
                *pair_inputs(batch="A batch gives one picture each."),
                sockets.Backbone.Input("backbone", tooltip="Finds which part of one picture belongs to which."),
                io.Float.Input(
                    "texture",
                    default=TEXTURE,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the appearance picture's texture, from 0 for colours alone to 1.",
                ),
                feather_widget(),
                *mask_inputs(),
                io.Int.Input(
                    "looks",
                    optional=True,
                    default=1,
                    min=1,
                    max=4,
                    tooltip="Times that the pair is matched: 2 finds more of the parts in twice the time.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The structure picture in the colours of the other.")],
        )

    @classmethod
    def execute(
        cls,
        structure,
        appearance,
        backbone,
        texture: float,
        feather: float,
        structure_mask=None,
        appearance_mask=None,
        looks: int = 1,
    ) -> io.NodeOutput:
        with host.working(), torch.no_grad():
            pairs = host.pairs(structure, appearance, structure_mask, appearance_mask)
            (vit,) = host.place([backbone])
            palettes = (
                Palette.between(pair.structure, pair.appearance, vit, **pair.masks, looks=looks) for pair in pairs
            )
            return io.NodeOutput(
                host.image([palette.image(texture=texture, feather=feather).cpu() for palette in palettes])
            )
