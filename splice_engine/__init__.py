"""Semantic appearance transfer with a frozen DINO ViT, as a library.

A small generator is trained on one pair of pictures until it shows the structure of one with the look of the other,
each region with that of its semantic counterpart (Tumanyan et al., "Splicing ViT Features for Semantic Appearance
Transfer", CVPR 2022). Pictures are `[B, 3, H, W]` float tensors in 0..1.
"""

from .ablation import ablation
from .backbone import Backbone, Request
from .catalogue import CATALOGUE, DEFAULT_BACKBONE, OFFLINE_BACKBONE
from .components import Components, pca
from .correspondence import Correspondence
from .errors import SpliceError
from .features import Features, blend, self_similarity
from .generator import Generator
from .heatmaps import AttentionMap, SimilarityMap, attention_map, similarity_map
from .images import load_mask, load_picture, save_picture
from .inversion import Inversion
from .metrics import Measurement, measure
from .objective import Appearance, Colour, Contrast, Identity, Objective, Painting, Reconstruction, Structure, Term
from .palette import Palette
from .rendering import render
from .settings import INVERSION_PRESETS, PRESETS, InversionSettings, Settings, inversion_preset, preset
from .transfer import Step, Transfer

__all__ = [
    "CATALOGUE",
    "DEFAULT_BACKBONE",
    "INVERSION_PRESETS",
    "OFFLINE_BACKBONE",
    "PRESETS",
    "Appearance",
    "AttentionMap",
    "Backbone",
    "Colour",
    "Components",
    "Contrast",
    "Correspondence",
    "Features",
    "Generator",
    "Identity",
    "Inversion",
    "InversionSettings",
    "Measurement",
    "Objective",
    "Painting",
    "Palette",
    "Reconstruction",
    "Request",
    "Settings",
    "SimilarityMap",
    "SpliceError",
    "Step",
    "Structure",
    "Term",
    "Transfer",
    "ablation",
    "attention_map",
    "blend",
    "inversion_preset",
    "load_mask",
    "load_picture",
    "measure",
    "pca",
    "preset",
    "render",
    "save_picture",
    "self_similarity",
    "similarity_map",
]
