"""The named recipes."""

from dataclasses import replace
from typing import Any, TypeVar

from .errors import SpliceError
from .recipe import Recipe
from .settings import InversionSettings, Settings

RecipeType = TypeVar("RecipeType", bound=Recipe)

_DRAFT = Settings(
    steps=60,
    size=256,
    warm_steps=70,
    warm_coarse=0.65,
    learning_rate=1e-4,
    learning_rate_end=0.1,
    appearance_weight=6.0,
    structure_weight=300.0,
    colour_weight=600.0,
    contrast_weight=100.0,
    matched_l1_weight=3.0,
    reconstruction_weight=10.0,
    residual=1.0,
    jitter=0.0,
    blur=0.0,
    whole=0.5,
    whole_every=0,
    cached_crops=8,
    identity_every=3,
    ema=0.9,
)

PRESETS: dict[str, Settings] = {
    "draft": _DRAFT,
    "standard": replace(_DRAFT, match_passes=3, refine_steps=60, steps=30),
    "paper": Settings(),
    "paper-10k": Settings(steps=10_000, blur=0.2),
}
"""`draft` learns the matched image in a warm start, then takes a few steps of the recipe. They are small: at the
paper's rate the [CLS] token leaves patches of other colours on a face in so few steps. `standard` refines that image
first, and matches three times: objects come out whole and stripes unbroken in the second and third pass.

The structure term weighs far more than in the paper, since self-similarity is what the matched image lacks. Colour and
contrast terms hold the output to the matched image over squares of pixels, without which the [CLS] token would leave
casts and fade the texture in so few steps; a lighter L1 term keeps texture in its place. A few cached crops are reused,
half of them the whole picture, all without augmentation: in so few steps the generator need not serve other pictures.
The learning rate falls to a tenth and the last steps are averaged, since single steps at the full rate differ much in
appearance. `paper` is the paper's text, `paper-10k` the configuration that the authors published."""

DEFAULT_PRESET = "standard"


def preset(name: str, **changes: Any) -> Settings:
    """A named recipe, with some of its numbers changed.

    Raises:
        SpliceError: Unknown preset, or a number out of its range.
    """
    return _resolve(PRESETS, name, changes)


INVERSION_PRESETS: dict[str, InversionSettings] = {
    "fast": InversionSettings(
        steps=300, size=112, learning_rate=0.02, beta2=0.99, noise_first=0.0, noise_second=0.0, noise_third=0.0
    ),
    "paper": InversionSettings(),
}
"""`fast` makes a picture that can be recognised in about a minute on two CPU cores; `paper` is the paper's text. Which
share of the steps each noise gets is not published: here they are thirds."""

DEFAULT_INVERSION = "fast"


def inversion_preset(name: str, **changes: Any) -> InversionSettings:
    """A named recipe of inversion, with some of its numbers changed.

    Raises:
        SpliceError: Unknown preset, or a number out of its range.
    """
    return _resolve(INVERSION_PRESETS, name, changes)


def _resolve(presets: dict[str, RecipeType], name: str, changes: dict[str, Any]) -> RecipeType:
    if name not in presets:
        raise SpliceError(f"unknown preset '{name}': choose one of {', '.join(presets)}")
    return replace(presets[name], **changes)
