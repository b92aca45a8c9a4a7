"""Every number of a recipe, in one place: the command line's options and the nodes' widgets come from here."""

from dataclasses import dataclass
from typing import Any

from .errors import SpliceError
from .masks import FEATHER
from .recipe import Recipe, setting

SEEDS = 2**63
"""How many there are."""

VIT_SIZE = 224
"""Short side in pixels at which the ViT gets a picture (paper, section 4)."""

VIT_LONGEST = 480
"""Most pixels of its long side."""

DENSITIES = (1, 2, 4)
"""Features per patch and axis of a dense grid: a stride of a whole, half or quarter patch."""


def _seed() -> Any:
    text = "seed of all random draws; on one CPU the same seed gives the same bits"
    return setting(0, text, low=0, high=SEEDS - 1)


def _match_passes(default: int) -> Any:
    text = "times the pair is matched: from the second pass on, the painted picture is matched too"
    return setting(default, text, low=1, high=8)


def _recompute() -> Any:
    return setting(False, "compute activations twice instead of keeping them: less memory, more time")


@dataclass(frozen=True)
class InstantSettings(Recipe):
    """Numbers of the instant transfer, which also makes the matched image that training is drawn to."""

    match_passes: int = _match_passes(1)
    texture: float = setting(
        0.7,
        "share of the appearance picture's texture, from 0 for colours alone to 1; the background gets more of it: 0.3 "
        "keeps a face's own features, 1 gives bold stripes",
        low=0,
        high=1,
        step=0.05,
    )
    feather: float = setting(
        FEATHER,
        "pixels of the full-size picture over which the change fades out beyond the structure mask",
        low=0,
        step=1.0,
    )
    density: int = setting(
        2,
        "descriptors per patch and axis in matching: 2 finds smaller parts, 1 takes 0.6 of the time",
        low=1,
        high=max(DENSITIES),
        choices=DENSITIES,
    )


@dataclass(frozen=True)
class RefinementSettings(InstantSettings):
    """A recipe of refinement, which begins at the instant transfer."""

    match_passes: int = _match_passes(3)
    steps: int = setting(60, "steps of refinement", low=0)
    size: int = setting(336, "short side in pixels at which tokens and patches are compared", low=56, step=8)
    seed: int = _seed()
    learning_rate: float = setting(
        4e-3, "learning rate of RMSprop in the first step; it falls to 0", low=0, high=1, step=0.0001
    )
    recompute: bool = _recompute()


@dataclass(frozen=True)
class Settings(InstantSettings):
    """A recipe of training. The defaults are the paper's (section 4 and supplement)."""

    steps: int = setting(2000, "training steps", low=1)
    size: int | None = setting(
        512,
        "short side in pixels at which the pair is trained on; time and memory grow with its square, the result is "
        "rendered at full size",
        low=64,
        step=8,
    )
    seed: int = _seed()
    refine_steps: int = setting(
        0, "steps of refinement before the generator's, which sharpen the matched image by the ViT's tokens", low=0
    )
    warm_steps: int = setting(
        0,
        "steps of a warm start, in which the generator learns the matched image without the ViT; 0: starts from noise",
        low=0,
    )
    warm_learning_rate: float = setting(1e-2, "highest learning rate of the warm start, in one cycle", low=0)
    warm_coarse: float = setting(0.0, "share of the warm start, its beginning, at half the size", low=0, high=1)
    learning_rate: float = setting(2e-3, "learning rate of Adam", low=0, high=1, step=0.0001)
    learning_rate_end: float = setting(
        1.0, "share of that rate left in the last step; it falls linearly", low=0, high=1
    )
    beta1: float = setting(0.0, "Adam's decay of the gradient's mean", low=0, high=0.9999)
    beta2: float = setting(0.99, "Adam's decay of the gradient's square", low=0, high=0.9999)
    appearance_weight: float = setting(10.0, "weight of the appearance term ([CLS] of the output against B's)", low=0)
    structure_weight: float = setting(
        1.0, "weight of the structure term (self-similarity of the output against A's)", low=0
    )
    identity_weight: float = setting(1.0, "weight of the identity term (keys of the generator's B against B's)", low=0)
    colour_weight: float = setting(0.0, "weight of the colour term (low-pass colours against the matched image)", low=0)
    colour_end: float = setting(1.0, "share of the colour weight left in the last step", low=0, high=1)
    contrast_weight: float = setting(
        0.0, "weight of the contrast term (local deviations against the matched image)", low=0
    )
    matched_l1_weight: float = setting(
        0.0, "weight of the matched L1 term (every pixel against the matched image)", low=0
    )
    reconstruction_weight: float = setting(
        0.0, "weight of the reconstruction term (the generator's B against B)", low=0
    )
    residual: float = setting(
        0.0,
        "share of what the generator lacks of the matched image after the warm start, added to its output",
        low=0,
        high=1,
    )
    layer: int = setting(-1, "block of the ViT that the terms read, -1 the last")
    crop: float = setting(0.95, "smallest square crop, as a share of the picture's height", low=0.1, high=1)
    whole: float = setting(0.0, "probability that a sample of A is the whole picture, not a crop", low=0, high=1)
    flip: float = setting(0.5, "probability of mirroring a crop", low=0, high=1)
    jitter: float = setting(0.5, "probability of jittering the colours of a crop of A", low=0, high=1)
    blur: float = setting(0.5, "probability of blurring a crop of A (3x3 pixels)", low=0, high=1)
    whole_every: int = setting(75, "every so many steps the terms compare the whole of A too; 0: never", low=0)
    cached_crops: int = setting(
        0,
        "crops of each picture that are drawn once and reused, with their ViT features; 0: new ones in every step",
        low=0,
    )
    identity_every: int = setting(
        1, "every so many steps the generator's B takes part (identity and reconstruction terms)", low=1
    )
    vit_size: int = setting(VIT_SIZE, "short side in pixels of what the ViT gets", low=32, high=2048)
    vit_longest: int = setting(VIT_LONGEST, "most pixels of the long side of what the ViT gets", low=32)
    ema: float = setting(
        0.0, "decay of a moving average of the generator, which then makes the picture; 0: off", low=0, high=0.9999
    )
    compile: bool = setting(False, "compile the generator (GPU; slower on CPUs)")
    recompute: bool = _recompute()

    @property
    def all_steps(self) -> int:
        """Steps of the whole run, those of refinement and warm start included."""
        return self.steps_before + self.steps

    @property
    def steps_before(self) -> int:
        """Steps of refinement and warm start."""
        return self.refine_steps + self.warm_steps


@dataclass(frozen=True)
class ClipSettings(Recipe):
    """What the transfer of a clip needs beside a recipe."""

    key_frames: int = setting(
        4,
        "most frames that are trained on, of which each past the fourth adds a warm start; fewer are taken where DINO "
        "finds nothing new in more",
        low=1,
        high=32,
    )


@dataclass(frozen=True)
class InterpolationSettings(InstantSettings):
    """What the frames from one appearance to another need."""

    frames: int = setting(24, "frames from the first appearance to the second, both of them included", low=2, high=4096)


@dataclass(frozen=True)
class InversionSettings(Recipe):
    """A recipe of feature inversion. The defaults are the paper's (supplement)."""

    steps: int = setting(20_000, "training steps", low=1)
    size: int = setting(
        VIT_SIZE, "short side in pixels of the picture that is made, which is what the ViT gets", low=72, step=8
    )
    seed: int = _seed()
    learning_rate: float = setting(0.01, "learning rate of Adam", low=0)
    beta2: float = setting(0.999, "Adam's decay of the gradient's square", low=0, high=0.9999)
    noise_first: float = setting(
        10.0, "for [CLS]: deviation of what is added to the fixed noise in the first third of the steps", low=0
    )
    noise_second: float = setting(2.0, "the same in the second third", low=0)
    noise_third: float = setting(0.5, "the same in the last third", low=0)


GUIDANCE_GROUPS = ("structure", "appearance")
"""Groups of terms, by the picture that they compare with; each has a strength and a window."""


@dataclass(frozen=True)
class GuidanceSettings(Recipe):
    """How an objective guides a sampler: structure from the start, where it forms, and appearance later.

    Raises:
        SpliceError: A value out of its limits, or a window that ends before it starts.
    """

    structure_strength: float = setting(
        0.2,
        "how far a guided step moves what the sampler predicts towards the structure, as a share of the latent's own "
        "spread; 0: not at all",
        low=0,
        high=10,
        step=0.01,
    )
    structure_start: float = setting(
        0.0, "where in the sampling the structure begins to guide: 0 is noise, 1 the end", low=0, high=1, step=0.01
    )
    structure_end: float = setting(1.0, "where in the sampling the structure ceases to guide", low=0, high=1, step=0.01)
    appearance_strength: float = setting(
        0.4,
        "how far a guided step moves what the sampler predicts towards the appearance, likewise; 0: not at all",
        low=0,
        high=10,
        step=0.01,
    )
    appearance_start: float = setting(
        0.3, "where in the sampling the appearance begins to guide", low=0, high=1, step=0.01
    )
    appearance_end: float = setting(
        1.0, "where in the sampling the appearance ceases to guide", low=0, high=1, step=0.01
    )
    every: int = setting(1, "every so many steps of the sampler are guided; the others cost nothing", low=1, high=100)
    inner_steps: int = setting(
        8, "gradients that a guided step is made of; together they move as far as one", low=1, high=100
    )
    decode_size: int = setting(
        256,
        "short side in pixels at which the decoder works: a larger latent is shrunk before; time and memory grow with "
        "its square",
        low=32,
        high=2048,
        step=8,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for group in GUIDANCE_GROUPS:
            start, end = self.window(group)
            if start >= end:
                raise SpliceError(f"{group}_start must be below {group}_end, which is {end:g}, not {start:g}")

    def strength(self, group: str) -> float:
        """That of one of `GUIDANCE_GROUPS`."""
        strength: float = getattr(self, f"{group}_strength")
        return strength

    def window(self, group: str) -> tuple[float, float]:
        """Start and end of one of `GUIDANCE_GROUPS`, as shares of the sampling."""
        return getattr(self, f"{group}_start"), getattr(self, f"{group}_end")
