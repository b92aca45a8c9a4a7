"""Every number of a recipe, in one place: the command line's options and the nodes' widgets come from here."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from .errors import SpliceError
from .masks import FEATHER


def _setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Recipe:
    """Numbers that are checked against their limits."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            low, high = item.metadata["low"], item.metadata["high"]
            if value is None or isinstance(value, bool):
                continue
            if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
                limits = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
                raise SpliceError(f"{item.name} must be {limits}, not {value}")


Chosen = TypeVar("Chosen", bound=Recipe)


@dataclass(frozen=True)
class Settings(Recipe):
    """A recipe of training. The defaults are the paper's (section 4 and supplement)."""

    steps: int = _setting(2000, "training steps", low=1)
    size: int | None = _setting(
        512, "short side in pixels at which the pair is trained on; the result is rendered at full size", low=64
    )
    seed: int = _setting(0, "the same seed on the same CPU gives the same bits", low=0, high=2**63 - 1)
    warm_steps: int = _setting(
        0, "steps before those, in which the generator learns the instant picture without the ViT", low=0
    )
    warm_learning_rate: float = _setting(1e-2, "highest learning rate of these, in one cycle", low=0)
    warm_coarse: float = _setting(
        0.0, "share of these, the first ones, that take place at half the size", low=0, high=1
    )
    looks: int = _setting(
        2, "times that the pair is matched for the instant picture; from the second on what was painted helps", low=1
    )
    learning_rate: float = _setting(2e-3, "learning rate of Adam", low=0)
    learning_rate_end: float = _setting(
        1.0, "share of that rate that is left in the last step, towards which it falls evenly", low=0, high=1
    )
    beta1: float = _setting(0.0, "Adam's decay of the gradient's mean", low=0, high=0.9999)
    beta2: float = _setting(0.99, "Adam's decay of the gradient's square", low=0, high=0.9999)
    appearance_weight: float = _setting(10.0, "weight of the appearance term ([CLS] of the output against B's)", low=0)
    structure_weight: float = _setting(
        1.0, "weight of the structure term (self-similarity of the output against A's)", low=0
    )
    identity_weight: float = _setting(1.0, "weight of the identity term (keys of the generator's B against B's)", low=0)
    colour_weight: float = _setting(
        0.0, "weight of the colour term (low-pass colours against the instant picture)", low=0
    )
    colour_end: float = _setting(1.0, "share of that weight that is left in the last step", low=0, high=1)
    contrast_weight: float = _setting(
        0.0, "weight of the contrast term (local deviations against the instant picture)", low=0
    )
    painting_weight: float = _setting(
        0.0, "weight of the painting term (every pixel against the instant picture)", low=0
    )
    residual: float = _setting(
        0.0,
        "share of what the generator misses of the instant picture as the recipe begins, laid over its output",
        low=0,
        high=1,
    )
    reconstruction_weight: float = _setting(
        0.0, "weight of the reconstruction term (the generator's B against B)", low=0
    )
    layer: int = _setting(-1, "block of the ViT that the terms look at, -1 the deepest")
    crop: float = _setting(0.95, "smallest square crop, as a share of the picture's height", low=0.1, high=1)
    whole: float = _setting(0.0, "probability that a view of A is not a crop but the whole picture", low=0, high=1)
    flip: float = _setting(0.5, "probability of mirroring a crop", low=0, high=1)
    jitter: float = _setting(0.5, "probability of changing the colours of a crop of A", low=0, high=1)
    blur: float = _setting(0.5, "probability of blurring a crop of A (3x3 pixels)", low=0, high=1)
    whole_every: int = _setting(75, "every so many steps the whole of A is judged too; 0 never", low=0)
    views: int = _setting(
        0, "views of each picture that recur, at which the ViT looks once; 0: new ones in every step", low=0
    )
    anchor_every: int = _setting(
        1, "every so many steps the generator's B is judged too (identity and reconstruction terms)", low=1
    )
    vit_size: int = _setting(224, "short side in pixels at which the ViT looks at pictures", low=32)
    vit_longest: int = _setting(480, "most pixels of the long side at which the ViT looks", low=32)
    ema: float = _setting(
        0.0, "decay of a running average of the generator, which then makes the picture; 0 is off", low=0, high=1
    )
    feather: float = _setting(
        FEATHER, "pixels of the full-size picture over which the change fades out beyond the structure mask", low=0
    )
    compile: bool = _setting(False, "compile the generator (GPU; slower on CPUs)")
    recompute: bool = _setting(False, "compute layers twice instead of keeping them: less memory, more time")

    @property
    def all_steps(self) -> int:
        """Steps of the whole run, those of the warm start included."""
        return self.warm_steps + self.steps


_DRAFT = Settings(
    steps=60,
    size=256,
    warm_steps=70,
    warm_coarse=0.65,
    learning_rate_end=0.1,
    appearance_weight=6.0,
    structure_weight=300.0,
    colour_weight=600.0,
    contrast_weight=100.0,
    painting_weight=3.0,
    reconstruction_weight=10.0,
    residual=1.0,
    jitter=0.0,
    blur=0.0,
    whole=0.5,
    whole_every=0,
    views=8,
    anchor_every=3,
    ema=0.9,
)

PRESETS: dict[str, Settings] = {
    "draft": _DRAFT,
    "standard": replace(_DRAFT, steps=300),
    "paper": Settings(),
    "paper-10k": Settings(steps=10_000, blur=0.2),
}
"""`draft` learns the instant picture, then sets out from it for a little of the recipe; `standard` takes more of it.

The self-similarity weighs far more than in the paper, since it is what a painted picture lacks. Colours and contrasts
are held to the instant picture's over squares of pixels, without which the [CLS] token would leave casts and fade the
texture in so few steps; a lighter painting term keeps the texture in its place without tying the picture down. A few
views recur, half of them the whole picture, and all in its own colours: in so few steps the generator need not serve
others. The rate falls to a tenth and the last steps are averaged, since single steps at the full rate differ much in
appearance. `paper` is the paper's text, `paper-10k` the configuration that the authors published."""

DEFAULT_PRESET = "standard"


def preset(name: str, **changes: Any) -> Settings:
    """A named recipe, with some of its numbers changed.

    Raises:
        SpliceError: Unknown preset, or a number out of its range.
    """
    return _changed(PRESETS, name, changes)


@dataclass(frozen=True)
class InversionSettings(Recipe):
    """A recipe of feature inversion. The defaults are the paper's (supplement)."""

    steps: int = _setting(20_000, "training steps", low=1)
    size: int = _setting(224, "short side in pixels of the picture that is made and of what the ViT sees", low=72)
    seed: int = _setting(0, "the same seed on the same CPU gives the same bits", low=0, high=2**63 - 1)
    learning_rate: float = _setting(0.01, "learning rate of Adam", low=0)
    beta2: float = _setting(0.999, "Adam's decay of the gradient's square", low=0, high=0.9999)
    noise_first: float = _setting(
        10.0, "for [CLS]: deviation of what is added to the fixed noise in the first third of the steps", low=0
    )
    noise_second: float = _setting(2.0, "the same in the second third", low=0)
    noise_third: float = _setting(0.5, "the same in the last third", low=0)


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
    return _changed(INVERSION_PRESETS, name, changes)


def _changed(presets: dict[str, Chosen], name: str, changes: dict[str, Any]) -> Chosen:
    if name not in presets:
        raise SpliceError(f"unknown preset '{name}': choose one of {', '.join(presets)}")
    return replace(presets[name], **changes)
