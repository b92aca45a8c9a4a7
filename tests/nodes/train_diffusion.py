"""Trains the tiny diffusion model of the tests, a UNet of ComfyUI's own, on photographs that Python packages ship.

To be run in ComfyUI's folder, `python train_diffusion.py diffusion.safetensors`: nine minutes on one core. A latent
holds a picture's mean colours, in the four channels that ComfyUI's map from Stable Diffusion's latents takes to them.
"""

import sys
import time

sys.path[0] = "."  # in the place of this folder, where another `comfy` is
path, sys.argv[1:] = sys.argv[1], ["--cpu"]  # what ComfyUI reads

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import json  # noqa: E402

import comfy.ops  # noqa: E402
import skimage.data  # noqa: E402
import sklearn.datasets  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from comfy.latent_formats import SD15  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.model_sampling import ModelSamplingDiscrete  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 1],
    "num_heads": 2,
    "use_spatial_transformer": False,
    "transformer_depth": [0, 0, 0],
    "transformer_depth_output": [0, 0, 0, 0, 0, 0],
    "transformer_depth_middle": -1,
}
SECONDS, BATCH, CROPS, RATE = 540, 16, 4000, 2e-3

torch.manual_seed(0)
unet = UNetModel(**UNET, operations=comfy.ops.disable_weight_init)
for module in unet.modules():  # ComfyUI's layers come with whatever was in memory
    if isinstance(module, torch.nn.Conv2d):
        torch.nn.Conv2d.reset_parameters(module)
    elif isinstance(module, torch.nn.Linear):
        torch.nn.Linear.reset_parameters(module)
    elif isinstance(module, torch.nn.GroupNorm):
        torch.nn.GroupNorm.reset_parameters(module)
for parameter in unet.out[-1].parameters():
    torch.nn.init.zeros_(parameter)

photographs = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
photographs += [skimage.data.stereo_motorcycle()[0], *sklearn.datasets.load_sample_images().images]
photographs = [torch.tensor(photograph).movedim(-1, 0)[None] / 127.5 - 1 for photograph in photographs]
inverse = torch.linalg.pinv(torch.tensor(SD15().latent_rgb_factors))


def draw_latent():
    photograph = photographs[int(torch.randint(len(photographs), ()))]
    height, width = photograph.shape[-2:]
    side = int(min(height, width) * torch.empty(()).uniform_(0.35, 1))
    top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
    colours = F.interpolate(photograph[..., top : top + side, left : left + side], (32, 32), mode="area")
    return torch.einsum("bchw,cd->bdhw", colours.flip(-1) if torch.rand(()) < 0.5 else colours, inverse)


latents = torch.cat([draw_latent() for _ in range(CROPS)])
sigmas = ModelSamplingDiscrete().sigmas
optimizer = torch.optim.AdamW(unet.parameters(), RATE, weight_decay=1e-4)
mean = {name: value.clone() for name, value in unet.state_dict().items()}
unet.train().requires_grad_(True)
start, step = time.monotonic(), 0
while (spent := (time.monotonic() - start) / SECONDS) < 1:
    for group in optimizer.param_groups:
        group["lr"] = RATE * min(1, step / 100) * max(0.02, 1 - spent)
    clean, times = latents[torch.randint(CROPS, (BATCH,))], torch.randint(len(sigmas), (BATCH,))
    sigma, noise = sigmas[times].view(-1, 1, 1, 1), torch.randn_like(clean)
    predicted = unet((clean + sigma * noise) / (sigma**2 + 1).sqrt(), times.float(), context=None)
    loss = F.mse_loss(predicted, noise)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    step += 1
    for name, value in unet.state_dict().items():
        mean[name].lerp_(value, 0.01)
    if step % 100 == 0:
        print(step, f"{loss.item():.3f}", flush=True)
weights = {f"model.diffusion_model.{name}": value.half().contiguous() for name, value in mean.items()}
save_file(weights, path, {"unet": json.dumps(UNET)})
