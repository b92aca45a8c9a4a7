"""What a ViT computes, shown: components, similarity and attention as pictures and masks, inversion and ablation."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..splice_engine import (
    INVERSION_PRESETS,
    InstantSettings,
    Inversion,
    InversionSettings,
    Settings,
    SpliceError,
    attention_map,
    dense_features,
    inversion_preset,
    pca,
    similarity_map,
)
from ..splice_engine.analysis.figures import heat_picture, loss_curves, mark_point, sheet
from ..splice_engine.analysis.heatmaps import MAP_DENSITY, MAP_PATCHES
from ..splice_engine.analysis.pca import MAP_SIZE, SELF_SIMILARITY
from ..splice_engine.images import check_mask, from_pil, sides
from ..splice_engine.presets import DEFAULT_INVERSION
from ..splice_engine.training.ablation import ablation_rows, ablation_settings
from ..splice_engine.training.inversion import INVERTIBLE
from ..splice_engine.vit.features import FACETS, join
from .convert import from_image, from_mask, is_empty, pair_up, split_pairs, to_image, to_mask
from .memory import engine_context, load_to_device, pass_bytes, step_bytes
from .progress import Cancellable, Progress, run_with_progress, with_progress
from .schema import make_schema
from .training import TrainingNode, render_run, train, work_through
from .widgets import (
    backbone_input,
    facet_widget,
    foreground_widget,
    head_widget,
    layer_widget,
    mass_widget,
    override_widget,
    point_widget,
    preset_inputs,
    resolve_preset,
    setting_widget,
    smooth_widget,
    vit_size_widget,
)


def density_widget(default: int) -> io.Input:
    tooltip = "Cells of the map per patch and axis, 1, 2 or 4: more is finer; the time grows with its square."
    return setting_widget("density", InstantSettings, default=default, optional=True, tooltip=tooltip)


class PCA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SplicePCA",
            display_name="Splice PCA",
            group="analysis",
            search_aliases=("dino", "features", "principal components"),
            description="The principal components of a ViT's features, as colours: equal colours mean equal parts.",
            inputs=[
                io.Image.Input("image", tooltip="One picture, or a batch, which shares its colours."),
                backbone_input(),
                layer_widget(),
                facet_widget(
                    [SELF_SIMILARITY, *FACETS],
                    SELF_SIMILARITY,
                    "Components of what: of the keys' self-similarity, as in the paper, or of a facet itself.",
                ),
                foreground_widget(),
                smooth_widget(),
                vit_size_widget(MAP_SIZE),
                density_widget(1),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The three strongest components as red, green and blue."),
                io.Mask.Output("mask", tooltip="The foreground; everything where foreground is off."),
            ],
        )

    @classmethod
    def execute(
        cls, image, backbone, layer: int, facet: str, foreground: bool, smooth: bool, size: int, density: int = 1
    ) -> io.NodeOutput:
        with engine_context(), Cancellable(), torch.no_grad():
            pictures = from_image(image, "picture")
            (vit,) = load_to_device([backbone], pass_bytes(backbone, pictures[0], size))
            similar = facet == SELF_SIMILARITY
            facet = "key" if similar else facet
            features = [
                dense_features(picture, vit, layer, facet, size, density) for picture in with_progress(pictures)
            ]
            (components,) = pca([join(features)], self_similarity=similar, foreground=foreground)
            at = sides(pictures[0])
            return io.NodeOutput(to_image([components.image(at, smooth)]), to_mask(components.mask(at, smooth)))


class SimilarityMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceSimilarityMap",
            display_name="Splice Similarity Map",
            group="analysis",
            search_aliases=("dino", "correspondence", "segment", "point to mask"),
            description="Finds what is like a place of one picture, on the same or on another one: name the head, get "
            "the other animal's head.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that the place is in, one for all targets or as many."),
                backbone_input(),
                point_widget("x", "width, from the left"),
                point_widget("y", "height, from the top"),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The place, in place of the point. An empty mask is none; one among others finds nothing.",
                ),
                io.Image.Input(
                    "target", optional=True, tooltip="The pictures to search; not connected: the picture itself."
                ),
                density_widget(MAP_DENSITY),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="White at the best match, black where nothing is alike."),
                io.Image.Output("image", tooltip="The same as heat over the target, a ring around the best match."),
                io.Float.Output("x", tooltip="Of the best match, as a share of the width; of a batch the first found."),
                io.Float.Output(
                    "y", tooltip="Of the best match, as a share of the height; of a batch the first found."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image, backbone, x: float, y: float, mask=None, target=None, density: int = MAP_DENSITY
    ) -> io.NodeOutput:
        with engine_context(), Cancellable(), torch.no_grad():
            source = from_image(image, "picture")
            searched = source if target is None else from_image(target, "target")
            masks = from_mask(mask)
            places = [(x, y)] if masks is None else place_masks(masks)
            rows = pair_up({"pictures": source, "targets": searched, "masks": places})
            largest = MAP_PATCHES * backbone.model.backbone.patch
            (vit,) = load_to_device([backbone], 2 * pass_bytes(backbone, searched[0], largest))
            soft, marked, best = [], [], []
            for picture, wanted, place in with_progress(rows):
                if place is None:
                    soft.append(torch.zeros_like(wanted[:, :1]))
                    marked.append(wanted)
                    continue
                found = similarity_map(picture, place, vit, wanted, density=density)
                (point,) = found.best().tolist()
                soft.append(found.mask(sides(wanted)).cpu())
                marked.append(mark_point(heat_picture(soft[-1], wanted), point))
                best.append(point)
            return io.NodeOutput(to_mask(torch.cat(soft)), to_image(marked), *best[0])


def place_masks(masks: Tensor) -> list[Tensor | None]:
    """Checked masks `[1, 1, h, w]` of a batch, and None for an empty one among others.

    Raises:
        SpliceError: They cannot be worked with, or all of them are empty.
    """
    if is_empty(masks):
        raise SpliceError("the mask selects nothing: paint the place to search for in white")
    return [None if is_empty(mask) else check_mask(mask) for mask in masks.split(1)]


class AttentionMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceAttentionMap",
            display_name="Splice Attention Map",
            group="analysis",
            search_aliases=("dino", "saliency", "heatmap"),
            description="Where the [CLS] token of a ViT attends, for each picture of a batch.",
            inputs=[
                io.Image.Input("image", tooltip="One picture, or a batch."),
                backbone_input(),
                layer_widget(),
                head_widget(),
                mass_widget(),
                vit_size_widget(MAP_SIZE),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="White on the pixels that hold that share, black elsewhere."),
                io.Image.Output("image", tooltip="The attention as heat over the picture."),
            ],
        )

    @classmethod
    def execute(cls, image, backbone, layer: int, head: int, mass: float, size: int) -> io.NodeOutput:
        with engine_context(), Cancellable(), torch.no_grad():
            pictures, one = from_image(image, "picture"), None if head < 0 else head
            (vit,) = load_to_device([backbone], pass_bytes(backbone, pictures[0], size))
            masks, heats = [], []
            for picture in with_progress(pictures):
                found = attention_map(picture, vit, layer, size)
                heat = found.heat(one).cpu()
                masks.append(found.mask(sides(picture), mass, one).cpu())
                heats.append(heat_picture(heat / heat.amax(), picture))
            return io.NodeOutput(to_mask(torch.cat(masks)), to_image(heats))


class InvertFeatures(TrainingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceInvertFeatures",
            display_name="Splice Invert Features",
            group="analysis",
            search_aliases=("dino", "feature visualization"),
            description="Paints a natural picture from one feature of yours alone, which shows what the feature keeps.",
            inputs=[
                io.Image.Input("image", tooltip="One picture, or a batch, which is one run for each picture."),
                backbone_input(),
                facet_widget(INVERTIBLE, "cls", "The feature: the [CLS] token, all tokens, or their keys."),
                layer_widget(),
                *preset_inputs(INVERSION_PRESETS, DEFAULT_INVERSION, InversionSettings),
            ],
            outputs=[
                io.Image.Output("image", tooltip="What the feature has kept, enlarged to the picture's size."),
                io.Image.Output("loss_curve", tooltip="The loss over the steps, one picture for each run."),
            ],
        )

    @classmethod
    def execute(cls, image, backbone, facet: str, layer: int, preset: str, **changes: float) -> io.NodeOutput:
        with engine_context():
            settings = resolve_preset(preset, inversion_preset, **changes)
            pictures = from_image(image, "picture")
            # A step of a transfer at that size needs no less.
            needed = step_bytes(pictures[0], [backbone], Settings(size=settings.size, vit_size=settings.size))
            (vit,) = load_to_device([backbone], needed)
            progress = Progress(len(pictures) * settings.steps)
            results, curves = [], []

            def invert(picture: Tensor) -> bool:
                run, steps = run_with_progress(Inversion(picture, vit, settings, layer, facet), progress)
                results.append(run.image(min(sides(picture))).cpu())
                progress.next(run.steps, results[-1])
                curves.append(from_pil(loss_curves([{"feature": step["feature"]} for step in steps])))
                return True

            work_through(pictures, invert)
            return io.NodeOutput(to_image(results), to_image(curves))


class Ablation(TrainingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceAblation",
            display_name="Splice Ablation",
            group="analysis",
            description="Trains on a pair with all losses, then once without each of them, and lays the results side "
            "by side.",
            inputs=[
                io.Image.Input("structure", tooltip="The picture whose structure is kept, one."),
                io.Image.Input("appearance", tooltip="The picture whose appearance is transferred, one."),
                backbone_input("The ViT of all runs."),
                *preset_inputs(default="paper"),
                override_widget("warm_steps", optional=True),
            ],
            outputs=[io.Image.Output("image", tooltip="A sheet of the pair and of all results, each with its name.")],
        )

    @classmethod
    def execute(cls, structure, appearance, backbone, preset: str, **changes: float) -> io.NodeOutput:
        with engine_context():
            recipes = ablation_settings(resolve_preset(preset, **changes))
            if max(len(structure), len(appearance)) > 1:
                raise SpliceError("one pair is ablated at a time: pick one picture of the batch")
            (pair,) = split_pairs(structure, appearance)
            progress = Progress(sum(settings.all_steps for settings in recipes.values()))
            results = {}
            for name, settings in recipes.items():
                run, _ = train(pair, [backbone], settings, progress)
                results[name] = render_run(run)
                progress.next(run.steps, results[name])
                if run.steps_left:  # of unequal runs there would be nothing to compare
                    break
                del run
            return io.NodeOutput(to_image([from_pil(sheet(ablation_rows(pair.structure, pair.appearance, results)))]))
