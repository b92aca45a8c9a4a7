"""Semantic appearance transfer with a frozen DINO ViT, as a library.

A small generator is trained on one pair of pictures until it shows the structure of one with the look of the other,
each region with that of its semantic counterpart (Tumanyan et al., "Splicing ViT Features for Semantic Appearance
Transfer", CVPR 2022). Pictures are `[B, 3, H, W]` float tensors in 0..1.
"""

from .backbone import Backbone, Request
from .catalogue import CATALOGUE, DEFAULT_BACKBONE, OFFLINE_BACKBONE
from .correspondence import Correspondence
from .errors import SpliceError
from .features import Features, self_similarity
from .generator import Generator
from .images import load_mask, load_picture, save_picture
from .metrics import Measurement, measure
from .objective import Appearance, Colour, Identity, Objective, Painting, Reconstruction, Structure, Term
from .palette import Palette
from .rendering import render
from .settings import PRESETS, Settings, preset
from .transfer import Step, Transfer

__all__ = [
    "CATALOGUE",
    "DEFAULT_BACKBONE",
    "OFFLINE_BACKBONE",
    "PRESETS",
    "Appearance",
    "Backbone",
    "Colour",
    "Correspondence",
    "Features",
    "Generator",
    "Identity",
    "Measurement",
    "Objective",
    "Painting",
    "Palette",
    "Reconstruction",
    "Request",
    "Settings",
    "SpliceError",
    "Step",
    "Structure",
    "Term",
    "Transfer",
    "load_mask",
    "load_picture",
    "measure",
    "preset",
    "render",
    "save_picture",
    "self_similarity",
]
