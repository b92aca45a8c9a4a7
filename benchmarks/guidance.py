"""Times a guided step of a diffusion sampler against an unguided one, in turns in one run, and measures its memory.

    python benchmarks/guidance.py --comfyui ~/ComfyUI --latent 64 --json

The model is Stable Diffusion 1.5's UNet, its VAE's decoder and its TAESD as ComfyUI builds them, with random weights,
since only their cost is measured; a step calls the UNet on two conditions, as any CFG above 1 does. For each decoder it
prints how long a guided step takes relative to an unguided one (`ratio_*`), the same on average where every second and
every fourth step is guided (`ratio_*_every_2`, `ratio_*_every_4`), and the peak memory of a guided step relative to an
unguided one (`memory_ratio_*`). Times are medians; `--pairs` sets how many steps of each are timed.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step import measure_peak, timed
from torch import Tensor

from splice_engine import (
    OFFLINE_BACKBONE,
    Appearance,
    Backbone,
    Decoder,
    Guidance,
    GuidanceSettings,
    Guide,
    Objective,
    Structure,
)
from splice_engine.cli.demo import load_pair

ROOT = Path(__file__).resolve().parents[1]
DECODERS = {"colours": "latent colours", "taesd": "TAESD", "vae": "VAE"}
EVERY = (2, 4)
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4),
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": 768,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
VAE = {
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "resolution": 256,
    "double_z": True,
    "z_channels": 4,
    "in_channels": 3,
    "out_ch": 3,
    "dropout": 0.0,
}


def load_decoders() -> Any:
    """Our nodes' module of decoders, in a package of another name, since ComfyUI has a `nodes` of its own."""
    name, folders = "splice_nodes", [str(ROOT)]
    location = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=folders)
    sys.modules[name] = importlib.util.module_from_spec(location)
    return importlib.import_module(f"{name}.nodes.decoders")


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Gives a network of ComfyUI's, which comes with whatever was in memory, weights that keep their scale."""
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.0
        parameter.data.normal_().mul_(scale)
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
    return module


class Steps:
    """An unguided step, and what each decoder adds to it."""

    def __init__(self, side: int, changes: dict[str, int]) -> None:
        import comfy.model_base
        import comfy.sd
        import comfy.supported_models
        from comfy.ldm.models.autoencoder import AutoencoderKL
        from comfy.taesd.taesd import TAESD

        torch.manual_seed(0)
        unet = {**UNET, "dtype": torch.float32}
        with torch.inference_mode():  # as the host has it
            config = comfy.supported_models.SD15(unet)
            config.unet_config = unet
            self.model = comfy.model_base.BaseModel(config, device="cpu")
            randomise(self.model.diffusion_model)
            vae = comfy.sd.VAE(sd=randomise(AutoencoderKL(ddconfig=VAE, embed_dim=4)).state_dict())
            self.x, self.context = torch.randn(2, 4, side, side), torch.randn(2, 77, 768)
            self.sigma = self.model.model_sampling.percent_to_sigma(0.5)
        backbone, settings = Backbone.load(OFFLINE_BACKBONE), replace(GuidanceSettings(), **changes)
        self.guidance = Guidance(Objective([Structure(), Appearance()], backbone), Guide(*load_pair()), settings)
        taesd = randomise(TAESD())
        ours, self.decoders = load_decoders(), {}
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            torch.save(taesd.taesd_decoder.state_dict(), file.name)
            ours.find_taesd = lambda _: file.name
            for key, name in DECODERS.items():
                build, *_ = ours.list_decoders(name, self.model.latent_format, vae)
                module = build().model
                self.decoders[key] = Decoder(module, module.scale)

    def unguided(self) -> Tensor:
        with torch.inference_mode():
            return self.model.apply_model(self.x, torch.full((2,), self.sigma), c_crossattn=self.context)

    def guide(self, key: str) -> Tensor:
        return self.guidance(self.x[:1].clone(), self.decoders[key], done=0.5)


def compare(steps: Steps, pairs: int) -> dict[str, float]:
    times: dict[str, list[float]] = {key: [] for key in ("unguided", *DECODERS)}
    works = {
        "unguided": steps.unguided,
        **{key: (lambda key=key: steps.guide(key)) for key in DECODERS},
    }
    for index in range(pairs + 1):
        for key, work in works.items():
            _, seconds = timed(work)
            if index:  # the first steps warm caches up
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    result = {"unguided_seconds": medians["unguided"]}
    for key in DECODERS:
        result[f"ratio_{key}"] = 1 + medians[key] / medians["unguided"]
        for every in EVERY:
            result[f"ratio_{key}_every_{every}"] = 1 + medians[key] / every / medians["unguided"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--latent", type=int, default=64, help="side of the latent, an eighth of the picture's")
    parser.add_argument("--inner-steps", type=int, help="gradients of a guided step")
    parser.add_argument("--pairs", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--memory-of", choices=("unguided", *DECODERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    command = [sys.executable, *sys.argv]
    sys.path.insert(0, str(options.comfyui.expanduser()))
    sys.argv[1:] = ["--cpu"]  # what ComfyUI reads
    import comfy.options

    comfy.options.enable_args_parsing()

    steps = Steps(options.latent, {} if options.inner_steps is None else {"inner_steps": options.inner_steps})
    if options.memory_of:
        kind = options.memory_of
        print(measure_peak(steps.unguided if kind == "unguided" else lambda: steps.guide(kind)))
        return
    peaks = {
        kind: float(subprocess.run([*command, "--memory-of", kind], check=True, stdout=subprocess.PIPE).stdout)
        for kind in ("unguided", *DECODERS)
    }
    result = {"latent": options.latent, "threads": torch.get_num_threads(), **compare(steps, options.pairs)}
    for key in DECODERS:  # the UNet's own memory is free again when the gradients begin
        result[f"memory_ratio_{key}"] = max(peaks["unguided"], peaks[key]) / peaks["unguided"]
    result.update({f"{kind}_megabytes": peak for kind, peak in peaks.items()})
    result = {name: float(f"{value:.4g}") for name, value in result.items()}
    print(json.dumps(result) if options.json else "\n".join(f"{name:24} {value:g}" for name, value in result.items()))


if __name__ == "__main__":
    main()
