"""Nodes of the tests for ComfyUI: a tiny diffusion model, its VAE, and what only a test asks of a guided model.

The model is a UNet of ComfyUI's own, of 356,000 weights, on latents whose colours are those that ComfyUI knows for
Stable Diffusion. `train_diffusion.py` has trained it on photographs. Its TAESD is made, not trained: it enlarges those
colours smoothly, so that latent colours, TAESD and VAE show one picture.
"""

import copy
import json
import os
import sys
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.taesd.taesd import TAESD
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS = Path(os.path.realpath(__file__)).with_name("diffusion.safetensors")

STEP = 0.005
"""Of the finite differences: what the backbone extracts is float32, so that much smaller ones drown."""


def make_taesd():
    """Its weights: colours are positive and negative parts, which ReLUs leave as they are, and every kernel smooths."""
    factors = torch.tensor(comfy.latent_formats.SD15().latent_rgb_factors)
    inverse = torch.linalg.pinv(factors)
    kernel = torch.tensor([1.0, 2, 1])
    smooth = torch.outer(kernel, kernel) / 16
    taesd = TAESD()
    for parameter in taesd.parameters():
        parameter.data.zero_()
    taesd.vae_scale.data.fill_(0.18215)
    decoder, encoder = taesd.taesd_decoder, taesd.taesd_encoder
    for layer in (*decoder, *encoder):
        if isinstance(layer, torch.nn.Conv2d) and layer.in_channels == layer.out_channels:
            for channel in range(6):
                layer.weight.data[channel, channel] = smooth
    decoder[1].weight.data[:6, :, 1, 1] = torch.cat([factors.T, -factors.T])
    decoder[-1].weight.data[:, :6, 1, 1] = torch.cat([torch.eye(3), -torch.eye(3)], dim=1) / 2
    decoder[-1].bias.data.fill_(0.5)
    encoder[0].weight.data[:6, :, 1, 1] = 2 * torch.cat([torch.eye(3), -torch.eye(3)])
    encoder[0].bias.data[:6] = torch.tensor([-1.0, -1, -1, 1, 1, 1])
    encoder[-1].weight.data[:, :6, 1, 1] = torch.cat([inverse.T, -inverse.T], dim=1)
    return taesd


def write_taesd():
    """Puts the decoder where ComfyUI finds a TAESD."""
    folder = Path(folder_paths.models_dir) / "vae_approx"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(make_taesd().taesd_decoder.state_dict(), folder / "taesd_decoder.safetensors")


class TestDiffusion:
    """The model, an empty conditioning and the VAE; a bare model has latents of which ComfyUI knows no colours."""

    CATEGORY = FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "VAE")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"bare": ("BOOLEAN", {})}}

    def load(self, bare=False):
        with safe_open(WEIGHTS, "pt") as file:
            unet = {**json.loads(file.metadata()["unet"]), "dtype": torch.float32}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = comfy.supported_models.SD15(unet)
        config.unet_config = unet  # without what Stable Diffusion's has besides
        model = comfy.model_base.BaseModel(config, device="cpu")
        model.load_model_weights(weights, "model.diffusion_model.")
        if bare:
            model.latent_format = comfy.latent_formats.LatentFormat()
        patcher = comfy.model_patcher.ModelPatcher(
            model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
        )
        vae = comfy.sd.VAE(sd=make_taesd().state_dict())
        return patcher, [[torch.zeros(1, 1, 1), {}]], vae


class TestVAE:
    """A VAE in the architecture of Stable Diffusion's, of random weights; a wide one is a TAESD for 16 channels."""

    CATEGORY = FUNCTION = "load"
    RETURN_TYPES = ("VAE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"wide": ("BOOLEAN", {})}}

    def load(self, wide):
        if wide:
            return (comfy.sd.VAE(sd=TAESD(latent_channels=16).state_dict()),)
        levels = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "resolution": 256}
        kind = {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
        vae = AutoencoderKL(ddconfig={**levels, **kind}, embed_dim=4)
        generator = torch.Generator().manual_seed(0)
        for name, weight in vae.named_parameters():
            if weight.ndim > 1:
                weight.normal_(generator=generator).mul_(weight[0].numel() ** -0.5)
            else:
                weight.fill_(float("norm" in name and name.endswith("weight")))
        return (comfy.sd.VAE(sd=vae.state_dict()),)


def find_module(name):
    """A module of the pack, as ComfyUI has loaded it."""
    return next(module for key, module in sys.modules.items() if key.endswith(f"ComfyUI-Splice.{name}"))


class TestPrediction:
    """Calls what guides a model with a prediction that a test wrote, twice, and tells what came back."""

    CATEGORY = FUNCTION = "call"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL", {}), "latent": ("IMAGE", {})}}

    def call(self, model, latent):
        (hook,) = model.model_options["sampler_post_cfg_function"]
        sigma = model.model.model_sampling.percent_to_sigma(0.5)
        given = {"denoised": latent, "sigma": torch.full((len(latent),), sigma), "model": model.model}
        results = [hook({**given, "model_options": model.model_options}) for _ in range(2)]
        same = [torch.equal(result, latent) for result in results]
        return (json.dumps({"same": same, "shape": list(results[0].shape), "dtype": str(results[0].dtype)}),)


class TestGradient:
    """The slope of a guided objective along its gradient, by that gradient and by finite differences, in float64."""

    CATEGORY = FUNCTION = "compare"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {"model": "MODEL", "backbone": "SPLICE_BACKBONE", "vae": "VAE", "image": "IMAGE", "decoder": "STRING"}
        return {"required": {name: (kind, {}) for name, kind in kinds.items()}}

    def compare(self, model, backbone, vae, image, decoder):
        engine, decoders = find_module("splice_engine"), find_module("nodes.decoders")
        slopes = {}
        with torch.inference_mode(False):
            picture = image.movedim(-1, 1).clone().double()
            build, *_ = decoders.list_decoders(decoder, model.model.latent_format, vae)
            through = build().model.double()
            vit = copy.deepcopy(backbone.model.backbone).double()
            objective = engine.Objective([engine.Structure(), engine.Appearance()], vit, size=56)
            guidance = engine.Guidance(objective, engine.Guide(picture, picture))
            x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            through = engine.Decoder(through, through.scale)
            for group, gradient in guidance.gradients(x0, through).items():
                step = STEP * gradient / gradient.norm()
                up, down = (guidance.losses(x0 + sign * step, through)[group] for sign in (1, -1))
                slopes[group] = [gradient.norm().item(), ((up - down) / (2 * STEP)).item()]
        return (json.dumps(slopes),)


class TestElsewhere:
    """A backbone as a pack gives it back that spreads models over devices; its own is one without memory."""

    CATEGORY = FUNCTION = "put"
    RETURN_TYPES = ("SPLICE_BACKBONE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"backbone": ("SPLICE_BACKBONE", {})}}

    def put(self, backbone):
        elsewhere = backbone.clone()
        elsewhere.load_device = torch.device("meta")
        return (elsewhere,)


write_taesd()
NODES = (TestDiffusion, TestVAE, TestPrediction, TestGradient, TestElsewhere)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
