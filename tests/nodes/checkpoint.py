"""Makes a checkpoint that ComfyUI takes for Stable Diffusion 1.5: its keys, few blocks and random weights.

To be run in ComfyUI's folder, by whose own classes it is built: `python checkpoint.py OUT.safetensors`.
"""

import sys

sys.path[0] = "."  # in the place of this folder, where another `comfy` is
path, sys.argv[1:] = sys.argv[1], ["--cpu"]  # what ComfyUI reads

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.sd1_clip import SD1ClipModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

torch.manual_seed(0)
unet = UNetModel(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,  # by this number and the next ComfyUI knows the family
    context_dim=768,
    num_res_blocks=[1, 1],
    channel_mult=(1, 1),
    num_heads=8,
    use_spatial_transformer=True,
    transformer_depth=[1, 0],
    transformer_depth_output=[1, 1, 0, 0],
    transformer_depth_middle=0,
)
parts = {
    "model.diffusion_model.": unet,
    "cond_stage_model.transformer.": SD1ClipModel().clip_l.transformer,
    "first_stage_model.": TAESD(),
}
weights = {}
for prefix, part in parts.items():
    for name, value in part.state_dict().items():
        if value.dim() > 1:  # ComfyUI's layers come with whatever was in memory
            value = torch.randn(value.shape).mul_(value[0].numel() ** -0.5)
        else:
            value = torch.ones(value.shape) if name.endswith(("weight", "scale")) else torch.zeros(value.shape)
        weights[prefix + name] = value.half().contiguous()
save_file(weights, path)
