"""DINO in the sampler: an objective guides any diffusion model while ComfyUI samples with it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..splice_engine import Appearance, Decoder, Guidance, GuidanceSettings, Guide, Objective, SpliceError, Structure
from . import sockets
from .convert import from_image, from_mask, is_empty, pair_up
from .decoders import list_decoders
from .memory import engine_context, is_out_of_memory, load_beside_sampling, vit_bytes
from .schema import make_schema
from .widgets import HALF, backbone_input, decoder_widget, setting_widget

log = logging.getLogger("splice")

BATCH = "One for all pictures of the batch, or as many."

NO_MEMORY = (
    "out of memory even with the lightest decoder: use a smaller picture, a lower `decode_size`, or a smaller backbone"
)


class SamplerGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceSamplerGuidance",
            display_name="Splice Sampler Guidance",
            group="sampling",
            search_aliases=("dino", "structure guidance", "style guidance", "loss guidance", "controlnet", "ipadapter"),
            description="Has a diffusion model sample pictures with the structure of one picture and the appearance of "
            "another, without training: for any sampler, in place of its model.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any model of pictures. It is not changed: other samplers use it as is."
                ),
                backbone_input("The ViT that compares; a small one is enough and much faster."),
                decoder_widget(),
                *(
                    setting_widget(f"{group}_{part}", GuidanceSettings, round=False)
                    for group in ("structure", "appearance")
                    for part in ("strength", "start", "end")
                ),
                io.Image.Input(
                    "structure",
                    optional=True,
                    tooltip="The picture whose structure guides: the middle of it, at the aspect of the latent. "
                    f"{BATCH} Not connected: only the appearance guides.",
                ),
                io.Image.Input(
                    "appearance",
                    optional=True,
                    tooltip=f"The picture whose appearance guides. {BATCH} Not connected: only the structure guides.",
                ),
                io.Mask.Input(
                    "structure_mask",
                    optional=True,
                    tooltip=f"Where the latent is guided, drawn on the structure picture. {HALF}",
                ),
                io.Mask.Input(
                    "appearance_mask",
                    optional=True,
                    tooltip=f"The part of the appearance picture that guides. {HALF}",
                ),
                sockets.Objective.Input(
                    "objective",
                    optional=True,
                    tooltip="The terms that compare features; not connected: the paper's structure and appearance.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The model's own, for the decoder VAE."),
                *(setting_widget(name, GuidanceSettings, optional=True) for name in ("every", "inner_steps")),
                setting_widget("decode_size", GuidanceSettings, optional=True),
            ],
            outputs=[io.Model.Output("model", tooltip="For KSampler, or any other sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        backbone,
        decoder: str,
        structure=None,
        appearance=None,
        structure_mask=None,
        appearance_mask=None,
        objective=(),
        vae=None,
        **changes: float,
    ) -> io.NodeOutput:
        with engine_context():
            settings = GuidanceSettings(**changes)
            decoders = list_decoders(decoder, model.model.latent_format, vae)
            guides = make_guides(structure, appearance, structure_mask, appearance_mask)
            terms = [part.term for part in objective] or [Structure(), Appearance()]
            patchers = [backbone, *(part.patcher for part in objective if part.patcher is not None)]
            hook = make_hook(Objective(terms, backbone.model.backbone), guides, settings, patchers, decoders)
        guided = model.clone()
        guided.set_model_sampler_post_cfg_function(hook)
        return io.NodeOutput(guided)


def make_guides(
    structure: Tensor | None, appearance: Tensor | None, structure_mask: Tensor | None, appearance_mask: Tensor | None
) -> list[Guide | None]:
    """What guides each picture of a batch; None where one of its masks, among others, is empty.

    Raises:
        SpliceError: The batches do not fit each other, all masks are empty, or a picture cannot be worked with.
    """
    given: dict[str, Sequence[Tensor | None]] = {}
    for what, image, mask in (
        ("structure", structure, structure_mask),
        ("appearance", appearance, appearance_mask),
    ):
        given[f"{what} pictures"] = [None] if image is None else from_image(image, f"{what} picture")
        masks = from_mask(mask, f"{what} mask")
        given[f"{what} masks"] = [None] if masks is None else list(masks.split(1))
    guides: list[Guide | None] = []
    for picture, its_mask, other, other_mask in pair_up(given):
        guides.append(
            None if is_empty(its_mask) or is_empty(other_mask) else Guide(picture, other, its_mask, other_mask)
        )
    if not any(guides):
        raise SpliceError("of each guide one of the masks selects nothing: paint what they should select in white")
    return guides


def make_hook(
    objective: Objective,
    guides: Sequence[Guide | None],
    settings: GuidanceSettings,
    patchers: Sequence[ModelPatcher],
    decoders: Sequence[Callable[[], ModelPatcher]],
) -> Callable[[Mapping[str, Any]], Tensor]:
    """What ComfyUI calls after each prediction of the model; it gives the prediction back, guided.

    It is a plain function, since ComfyUI copies what belongs to a model deeply, functions excepted.

    Args:
        objective: The terms.
        guides: One for all pictures of a batch or one for each.
        settings: How they guide.
        patchers: The backbones of the terms.
        decoders: What builds the decoder, and the lighter ones after it; call it inside `engine_context`.

    Raises:
        SpliceError: Another pack has put a backbone on a device of its own, where no decoder is.
    """
    guidances = [None if guide is None else Guidance(objective, guide, settings) for guide in guides]
    ways = list(decoders)
    decoder = ways.pop(0)()
    for patcher in patchers:
        if patcher.load_device != decoder.load_device:
            raise SpliceError(
                f"the backbone computes on {patcher.load_device}, but decoders on {decoder.load_device}: take one from "
                "Splice Load Backbone (DINO) as it is"
            )
    passed_through = False

    def guide_batch(x0: Tensor, done: float, step: int) -> Tensor:
        rows = guidances * len(x0) if len(guidances) == 1 else guidances
        if len(rows) != len(x0):
            raise SpliceError(
                f"a batch of {len(x0)} latents needs 1 or {len(x0)} structure and appearance pictures, not {len(rows)}"
            )
        if not any(row.active(done, step) for row in rows if row is not None):
            return x0
        memory = sum(vit_bytes(patcher, x0, objective.size, objective.longest) for patcher in patchers)
        load_beside_sampling([*patchers, decoder], memory + decoder.model.saved_bytes(x0, settings.decode_size))
        through = Decoder(decoder.model, decoder.model.scale)
        parts = x0.split(1)
        return torch.cat(
            [part if row is None else row(part, through, done, step) for row, part in zip(rows, parts, strict=True)]
        )

    def guide(arguments: Mapping[str, Any]) -> Tensor:
        nonlocal decoder, passed_through
        x0 = arguments["denoised"]
        frames = x0.ndim == 5 and x0.shape[2] == 1
        if getattr(x0, "is_nested", False) or not (x0.ndim == 4 or frames):
            if not passed_through:
                log.warning("Splice: latents of clips or sound are not guided: they are sampled as without guidance")
                passed_through = True
            return x0
        sigma = float(arguments["sigma"].max())
        done = measure_progress(arguments["model"].model_sampling, sigma)
        step = count_steps(arguments["model_options"], sigma)
        with engine_context():
            while True:
                try:
                    guided = guide_batch(x0[:, :, 0] if frames else x0, done, step)
                    return guided[:, :, None] if frames else guided
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                # Only here, past the handler whose traceback holds the gradients, can their memory be freed.
                if not ways:
                    raise SpliceError(NO_MEMORY)
                heavy, decoder = decoder.model.name, ways.pop(0)()
                mm.soft_empty_cache()
                log.warning("Splice: out of memory; guiding through %s instead of %s", decoder.model.name, heavy)

    return guide


def measure_progress(model_sampling: Any, sigma: float) -> float:
    """The share of a model's whole sampling that is done at a noise level, as the percents of ComfyUI's nodes count."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return low


def count_steps(model_options: Mapping[str, Any], sigma: float) -> int:
    """The index of a sampler's step by its noise level; a call between two steps counts as the next one."""
    sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
    return 0 if sigmas is None else int((sigmas > sigma * (1 + 1e-4)).sum())
