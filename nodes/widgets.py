"""Every widget, and the inputs that nodes share.

The numbers of a recipe have default, limits, step and help of their field in the engine's settings. A widget that
overrides a preset holds a value of `UNSET` where the preset's number is to stay.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..splice_engine import DEFAULT_BACKBONE, PRESETS, InstantSettings, InversionSettings, Settings, preset
from ..splice_engine.analysis.heatmaps import MASS
from ..splice_engine.batch.best_of import MOST
from ..splice_engine.presets import DEFAULT_PRESET
from ..splice_engine.recipe import Recipe
from ..splice_engine.settings import VIT_SIZE
from ..splice_engine.training.terms import FeatureTerm
from ..splice_engine.vit.devices import DTYPES
from . import folders, sockets
from .decoders import DECODERS

LARGEST = 100_000
"""Limit of numbers that have none of their own, which ComfyUI asks for."""

SAFE_INTEGER = 2**53 - 1
"""The largest that the browser counts exactly."""

UNSET = {"steps": 0, "size": 0, "refine_steps": -1, "warm_steps": -1, "learning_rate": 0.0, "vit_size": 0}
"""By the names of the settings: -1 where 0 means something else."""

HALF = (
    "An empty mask is none; one among others leaves its picture alone. Load Image's MASK is what was painted in "
    "MaskEditor or is transparent: InvertMask selects a cut-out object."
)
"""What a mask selects; the same picture as a file selects the opposite half on the command line."""

PRESET_TIPS: dict[type[Recipe], str] = {
    Settings: "The recipe; `paper` is the paper's own. On 2 CPU cores with a ViT-S/14: draft 1 minute, standard 2, "
    "paper 20; dino_vitb8 takes six times as long. On a GPU with a ViT-S/14: draft 8 s.",
    InversionSettings: "The recipe; `paper` is the paper's own. On 2 CPU cores with a ViT-S/14: fast 1 minute, paper "
    "hours.",
}
"""By the kind of recipe; see docs/presets.md for the times."""

BATCH = "A batch is one run for each picture, all with the same seed; the generator is then that of the last."


def setting_widget(
    setting: str, recipe: type[Recipe] = Settings, name: str | None = None, more: str = "", **options
) -> io.Input:
    """The widget of a number of a recipe.

    Args:
        setting: Name of its field.
        recipe: The class that has the field.
        name: Of the widget, where that is another.
        more: Sentence after the help.
        options: Of the ComfyUI input, in place of what the field says.
    """
    field = next(field for field in fields(recipe) if field.name == setting)
    kind, widget = (float, io.Float) if isinstance(field.default, float) else (int, io.Int)
    low, high, step, help = (field.metadata[key] for key in ("low", "high", "step", "help"))
    limits = {
        "default": field.default,
        "min": kind(0 if low is None else low),
        "max": kind(min(LARGEST if high is None else high, SAFE_INTEGER)),
    }
    if step is not None:
        limits["step"] = kind(step)
    tooltip = f"{help[0].upper()}{help[1:]}. {more}".strip()
    return widget.Input(name or setting, **{**limits, "tooltip": tooltip, **options})


def override_widget(setting: str, recipe: type[Recipe] = Settings, **options) -> io.Input:
    """The widget of a number that overrides the preset's, or leaves it; arguments as for `setting_widget`."""
    field = next(field for field in fields(recipe) if field.name == setting)
    unset, low = UNSET[setting], field.metadata["low"]
    least = f"at least {low:g}; " if low > unset + 1 else ""
    more = f"{least}{unset:g}: the preset's."
    return setting_widget(setting, recipe, more=more[0].upper() + more[1:], default=unset, min=unset, **options)


def resolve_preset(name: str, recipe: Callable[..., Any] = preset, **widgets: float) -> Any:
    """The preset with what the widgets change.

    Args:
        name: Of the preset.
        recipe: The engine's `preset` or `inversion_preset`.
        widgets: By the names of the settings.

    Raises:
        SpliceError: A number out of its range.
    """
    return recipe(name, **{key: value for key, value in widgets.items() if value != UNSET.get(key)})


def preset_inputs(
    presets: Iterable[str] = PRESETS, default: str = DEFAULT_PRESET, recipe: type[Recipe] = Settings
) -> list[io.Input]:
    """The choice of a recipe, and the numbers of it that everyone may want to change."""
    return [
        io.Combo.Input("preset", options=list(presets), default=default, tooltip=PRESET_TIPS[recipe]),
        override_widget("steps", recipe),
        override_widget("size", recipe),
        setting_widget("seed", recipe, control_after_generate=True),
    ]


def best_of_widget() -> io.Input:
    return io.Int.Input(
        "best_of",
        default=1,
        min=1,
        max=MOST,
        optional=True,
        tooltip="Try so many seeds, from the given one on, and keep the best by structure and appearance distance; "
        "where time is short the worse half is left early, where some is left the best trains on while that helps. "
        "Four take at most 1.8 times as long as one.",
    )


def pair_inputs(batch: str = BATCH) -> list[io.Input]:
    return [
        io.Image.Input("structure", tooltip=f"The picture whose structure is kept. {batch}"),
        io.Image.Input(
            "appearance",
            tooltip="The picture whose appearance is transferred: one for all structure pictures, or as many. Several "
            "with one structure picture give as many results.",
        ),
    ]


def mask_inputs() -> list[io.Input]:
    return [
        io.Mask.Input(
            "structure_mask",
            optional=True,
            tooltip=f"Where the structure picture may change; outside it stays as it is. {HALF}",
        ),
        io.Mask.Input(
            "appearance_mask",
            optional=True,
            tooltip=f"The part of the appearance picture that is transferred. {HALF}",
        ),
    ]


def feather_widget() -> io.Input:
    return setting_widget("feather", InstantSettings)


def backbone_input(tooltip: str = "From Splice Load Backbone.") -> io.Input:
    return sockets.Backbone.Input("backbone", tooltip=tooltip)


def backbone_name_widget() -> io.Input:
    return io.Combo.Input(
        "backbone_name",
        options=folders.backbone_names(),
        default=DEFAULT_BACKBONE,
        tooltip="The DINO vision transformer (ViT). One that is not marked as here is downloaded when it is first run; "
        f"your own files go into models/{folders.BACKBONES}.",
        extra_dict={"on_this_machine": folders.backbones_here()},  # for web/backbones.js
    )


def precision_widget() -> io.Input:
    return io.Combo.Input(
        "precision",
        options=["auto", *DTYPES],
        default="auto",
        tooltip="Of the ViT's matrix products; auto is bf16 where the device is made for it.",
    )


def decoder_widget() -> io.Input:
    return io.Combo.Input(
        "decoder",
        options=list(DECODERS),
        default=DECODERS[0],
        tooltip="What makes a picture of the latent for the ViT. Latent colours are small and cost nothing; a TAESD "
        "(its file in models/vae_approx) and the VAE see more and cost more. auto: the VAE if connected, else the "
        "TAESD if there, else colours.",
    )


def layer_widget(default: int = Settings.layer) -> io.Input:
    return setting_widget(
        "layer",
        default=default,
        min=-64,
        max=63,
        tooltip="Block of the ViT: 0 is the first, -1 the last. Shallow blocks hold edges, deep ones meaning.",
    )


def facet_widget(options: Iterable[str], default: str, tooltip: str) -> io.Input:
    return io.Combo.Input("facet", options=list(options), default=default, tooltip=tooltip)


def vit_size_widget(default: int = VIT_SIZE, more: str = "More is finer and slower.") -> io.Input:
    return setting_widget("vit_size", name="size", default=default, more=more)


def term_inputs(term: type[FeatureTerm]) -> list[io.Input]:
    """What all terms of an objective take: weight, layer, the terms before it and a backbone of its own."""
    return [
        io.Float.Input(
            "weight",
            default=float(term.weight),
            min=0.0,
            max=float(LARGEST),
            step=0.1,
            tooltip="Factor of this term in the sum.",
        ),
        layer_widget(term.layer),
        sockets.Objective.Input("objective", optional=True, tooltip="Terms before this one; it is added to them."),
        sockets.Backbone.Input(
            "backbone", optional=True, tooltip="ViT of this term alone; not connected: the optimizer's."
        ),
    ]


def blend_inputs(number: int) -> list[io.Input]:
    """One of the features of a blend, and its weight; two are needed."""
    return [
        sockets.Features.Input(
            f"features_{number}",
            optional=number > 2,
            tooltip="Of the same backbone, layer and facet as the others.",
        ),
        io.Float.Input(
            f"weight_{number}",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.05,
            tooltip=f"Share of features_{number}; only the ratio of the weights counts.",
        ),
    ]


def point_widget(name: str, side: str) -> io.Input:
    """One coordinate of a point, as a share of the picture's width or height."""
    return io.Float.Input(
        name,
        default=0.5,
        min=0.0,
        max=1.0,
        step=0.01,
        round=False,
        tooltip=f"Of the point, as a share of the picture's {side}.",
    )


def head_widget() -> io.Input:
    return io.Int.Input(
        "head", default=-1, min=-1, max=63, tooltip="One head of the attention, from 0; -1: the mean of all."
    )


def mass_widget() -> io.Input:
    return io.Float.Input(
        "mass",
        default=MASS,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="Share of the attention that the mask keeps, in the fewest pixels.",
    )


def foreground_widget() -> io.Input:
    return io.Boolean.Input(
        "foreground", default=False, tooltip="Leave the background out: it is black, the foreground has all colours."
    )


def smooth_widget() -> io.Input:
    return io.Boolean.Input("smooth", default=True, tooltip="Smooth between the patches; off: each patch is a block.")


def generator_name_widget() -> io.Input:
    return io.Combo.Input(
        "generator_name",
        options=folders.generator_names(),
        tooltip="The file; press R after a new one was saved.",
    )


def filename_widget() -> io.Input:
    return io.String.Input(
        "filename_prefix",
        default="generator",
        tooltip="Beginning of the file's name; a number follows, so that nothing is replaced.",
    )
