"""Semantic appearance transfer with a frozen DINO ViT, as a library.

A small generator is trained on one pair of pictures until it shows the structure of one with the appearance of the
other, each region with that of its semantic counterpart (Tumanyan et al., "Splicing ViT Features for Semantic
Appearance Transfer", CVPR 2022). Pictures are `[B, 3, H, W]` float tensors in 0..1.
"""

from .analysis.flicker import Flicker, measure_flicker
from .analysis.heatmaps import AttentionMap, SimilarityMap, attention_map, similarity_map
from .analysis.metrics import Measurement, measure
from .analysis.pca import Components, pca
from .batch.best_of import BestOf
from .clips import open_clip
from .errors import SpliceError
from .images import load_mask, load_picture, save_picture
from .matching.carried import InstantClip
from .matching.correspondence import Correspondence
from .matching.instant import InstantTransfer
from .matching.mixture import InstantMixture
from .presets import INVERSION_PRESETS, PRESETS, inversion_preset, preset
from .settings import GuidanceSettings, InstantSettings, InversionSettings, RefinementSettings, Settings
from .training.ablation import ablation
from .training.checkpoint import Checkpoint
from .training.clip import ClipTransfer
from .training.generator import Generator
from .training.guidance import Decoder, Guidance, Guide
from .training.inversion import Inversion
from .training.key_frames import choose_key_frames
from .training.losses import (
    Appearance,
    Colour,
    Contrast,
    Identity,
    MatchedL1,
    Reconstruction,
    Structure,
    TokenDistance,
)
from .training.mixture import MixtureTransfer
from .training.objective import Objective, Pictures
from .training.refinement import Refinement
from .training.rendering import render
from .training.result import apply_generator
from .training.run import Step
from .training.terms import Term
from .training.transfer import Transfer
from .vit.backbone import Backbone, Request
from .vit.catalogue import CATALOGUE, DEFAULT_BACKBONE, OFFLINE_BACKBONE
from .vit.dense import dense_features
from .vit.features import Features, SelfSimilarity, blend, self_similarity

__all__ = [
    "CATALOGUE",
    "DEFAULT_BACKBONE",
    "INVERSION_PRESETS",
    "OFFLINE_BACKBONE",
    "PRESETS",
    "Appearance",
    "AttentionMap",
    "Backbone",
    "BestOf",
    "Checkpoint",
    "ClipTransfer",
    "Colour",
    "Components",
    "Contrast",
    "Correspondence",
    "Decoder",
    "Features",
    "Flicker",
    "Generator",
    "Guidance",
    "GuidanceSettings",
    "Guide",
    "Identity",
    "InstantClip",
    "InstantMixture",
    "InstantSettings",
    "InstantTransfer",
    "Inversion",
    "InversionSettings",
    "MatchedL1",
    "Measurement",
    "MixtureTransfer",
    "Objective",
    "Pictures",
    "Reconstruction",
    "Refinement",
    "RefinementSettings",
    "Request",
    "SelfSimilarity",
    "Settings",
    "SimilarityMap",
    "SpliceError",
    "Step",
    "Structure",
    "Term",
    "TokenDistance",
    "Transfer",
    "ablation",
    "apply_generator",
    "attention_map",
    "blend",
    "choose_key_frames",
    "dense_features",
    "inversion_preset",
    "load_mask",
    "load_picture",
    "measure",
    "measure_flicker",
    "open_clip",
    "pca",
    "preset",
    "render",
    "save_picture",
    "self_similarity",
    "similarity_map",
]
