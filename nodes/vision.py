"""What a backbone sees: components, similarity and attention as pictures and masks, inversion and ablation."""

import torch
from comfy_api.latest import io

from ..splice_engine import (
    INVERSION_PRESETS,
    Inversion,
    Settings,
    SpliceError,
    attention_map,
    inversion_preset,
    pca,
    similarity_map,
)
from ..splice_engine.ablation import ablated, ablation_rows
from ..splice_engine.components import SELF_SIMILARITY, VIEW
from ..splice_engine.features import FACETS
from ..splice_engine.heatmaps import MASS
from ..splice_engine.images import from_pil, sides
from ..splice_engine.inversion import INVERTIBLE
from ..splice_engine.pictures import heat_picture, loss_curves, mark_point, sheet
from ..splice_engine.settings import DEFAULT_INVERSION
from . import host, sockets
from .features import backbone_input, layer_widget, view_widget
from .host import CATEGORY
from .transfer import chosen, recipe_inputs


class PCA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SplicePCA",
            display_name="Splice PCA",
            **host.found_by("dino", "features", "principal components"),
            category=CATEGORY,
            description="The principal components of what a backbone sees, as colours: equal colours mean equal parts.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures to look at; a batch shares its colours."),
                backbone_input(),
                layer_widget(),
                io.Combo.Input(
                    "facet",
                    options=[SELF_SIMILARITY, *FACETS],
                    default=SELF_SIMILARITY,
                    tooltip="Components of what: of the keys' self-similarity, as in the paper, or of a facet itself.",
                ),
                io.Boolean.Input(
                    "foreground",
                    default=False,
                    tooltip="Leave the ground out: it is black, the object has all colours.",
                ),
                io.Boolean.Input(
                    "smooth", default=True, tooltip="Smooth between the patches; off: each patch is a block."
                ),
                view_widget(VIEW),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The three strongest components as red, green and blue."),
                io.Mask.Output("mask", tooltip="The object; everything where foreground is off."),
            ],
        )

    @classmethod
    def execute(
        cls, image, backbone, layer: int, facet: str, foreground: bool, smooth: bool, size: int
    ) -> io.NodeOutput:
        with host.working(), torch.no_grad():
            pictures = torch.cat(host.pictures(image, "picture"))
            (vit,) = host.place([backbone])
            similar = facet == SELF_SIMILARITY
            seen = vit.features(pictures.to(vit.device), layer, "key" if similar else facet, size)
            (found,) = pca([seen], self_similarity=similar, foreground=foreground)
            at = sides(pictures)
            return io.NodeOutput(host.image([found.image(at, smooth)]), host.mask(found.mask(at, smooth)))


class SimilarityMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def share(name: str, of: str) -> io.Float.Input:
            return io.Float.Input(
                name,
                default=0.5,
                min=0.0,
                max=1.0,
                step=0.01,
                round=False,
                tooltip=f"Of the point, as a share of the picture's {of}.",
            )

        return io.Schema(
            node_id="SpliceSimilarityMap",
            display_name="Splice Similarity Map",
            **host.found_by("dino", "correspondence", "segment", "point to mask"),
            category=CATEGORY,
            description="Finds what is like a place of one picture, on the same or on another one: name the head, get "
            "the other animal's head.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that the place is in, one for all targets or as many."),
                backbone_input(),
                share("x", "width, from the left"),
                share("y", "height, from the top"),
                io.Mask.Input(
                    "mask", optional=True, tooltip="The place, in place of the point. An empty mask is none."
                ),
                io.Image.Input(
                    "target", optional=True, tooltip="The pictures to search; not connected: the picture itself."
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="White at the best match, black where nothing is alike."),
                io.Image.Output("image", tooltip="The same as heat over the target, a ring around the best match."),
                io.Float.Output("x", tooltip="Of the best match, as a share of the width; of a batch the first's."),
                io.Float.Output("y", tooltip="Of the best match, as a share of the height; of a batch the first's."),
            ],
        )

    @classmethod
    def execute(cls, image, backbone, x: float, y: float, mask=None, target=None) -> io.NodeOutput:
        with host.working(), torch.no_grad():
            source = torch.cat(host.pictures(image, "picture"))
            searched = source if target is None else torch.cat(host.pictures(target, "target"))
            painted = host.selection(mask)
            (vit,) = host.place([backbone])
            found = similarity_map(source, (x, y) if painted is None else painted, vit, searched)
            soft, best = found.mask(sides(searched)).cpu(), found.best().tolist()
            heat = heat_picture(soft, searched.expand(len(soft), -1, -1, -1))
            marked = [mark_point(picture, point) for picture, point in zip(heat.split(1), best, strict=True)]
            return io.NodeOutput(host.mask(soft), host.image(marked), *best[0])


class AttentionMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceAttentionMap",
            display_name="Splice Attention Map",
            **host.found_by("dino", "saliency", "heatmap"),
            category=CATEGORY,
            description="Where the [CLS] token of a backbone attends, for each picture of a batch.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures to look at, a batch or one."),
                backbone_input(),
                layer_widget(),
                io.Int.Input(
                    "head",
                    default=-1,
                    min=-1,
                    max=63,
                    tooltip="One head of the attention, from 0; -1: the mean of all.",
                ),
                io.Float.Input(
                    "mass",
                    default=MASS,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the attention that the mask keeps, in the fewest pixels.",
                ),
                view_widget(VIEW),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="White on the pixels that hold that share, black elsewhere."),
                io.Image.Output("image", tooltip="The attention as heat over the picture."),
            ],
        )

    @classmethod
    def execute(cls, image, backbone, layer: int, head: int, mass: float, size: int) -> io.NodeOutput:
        with host.working(), torch.no_grad():
            pictures = torch.cat(host.pictures(image, "picture"))
            (vit,) = host.place([backbone])
            found, one = attention_map(pictures, vit, layer, size), None if head < 0 else head
            heat = found.heat(one).cpu()
            heat = heat / heat.amax(dim=(2, 3), keepdim=True)
            return io.NodeOutput(
                host.mask(found.mask(sides(pictures), mass, one)), host.image([heat_picture(heat, pictures)])
            )


class InvertFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceInvertFeatures",
            display_name="Splice Invert Features",
            **host.found_by("dino", "feature visualization"),
            category=CATEGORY,
            description="Paints a picture in which a backbone sees the same as in yours, so that you see what one "
            "feature keeps of it.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to look at. A batch is one run for each picture."),
                backbone_input(),
                io.Combo.Input(
                    "facet",
                    options=list(INVERTIBLE),
                    default="cls",
                    tooltip="The feature: the [CLS] token, all tokens, or their keys.",
                ),
                layer_widget(),
                *recipe_inputs(
                    INVERSION_PRESETS,
                    DEFAULT_INVERSION,
                    "Short side in pixels of what is painted and of what the backbone sees, at least 72; the result is "
                    "enlarged to the picture's size.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="What the feature has kept, at the picture's size."),
                io.Image.Output("loss_curve", tooltip="The loss over the steps, one picture for each run."),
            ],
        )

    @classmethod
    def execute(
        cls, image, backbone, facet: str, layer: int, preset: str, steps: int, size: int, seed: int
    ) -> io.NodeOutput:
        with host.working():
            settings = chosen(preset, inversion_preset, steps=steps, size=size, seed=seed)
            pictures = host.pictures(image, "picture")
            # A step of a transfer at that size needs no less.
            needed = host.step_bytes(pictures[0], [backbone], Settings(size=settings.size, vit_size=settings.size))
            (vit,) = host.place([backbone], needed)
            progress = host.Progress(len(pictures) * settings.steps)
            results, curves = [], []
            for picture in pictures:
                run, steps_taken = host.watched(Inversion(picture, vit, settings, layer, facet), progress)
                results.append(run.image(min(sides(picture))).cpu())
                curves.append(from_pil(loss_curves([{"feature": step["feature"]} for step in steps_taken])))
                del run
            return io.NodeOutput(host.image(results), host.image(curves))


class Ablation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceAblation",
            display_name="Splice Ablation",
            category=CATEGORY,
            description="Trains on a pair with all losses, then once without each of them, and lays the results side "
            "by side.",
            inputs=[
                io.Image.Input("structure", tooltip="The picture whose shapes are kept, one."),
                io.Image.Input("appearance", tooltip="The picture whose look is given, one."),
                sockets.Backbone.Input("backbone", tooltip="Judges all runs."),
                *recipe_inputs(default="paper"),
            ],
            outputs=[io.Image.Output("image", tooltip="A sheet of the pair and of all results, each with its name.")],
        )

    @classmethod
    def execute(cls, structure, appearance, backbone, preset: str, steps: int, size: int, seed: int) -> io.NodeOutput:
        with host.working():
            recipes = ablated(chosen(preset, steps=steps, size=size, seed=seed))
            if max(len(structure), len(appearance)) > 1:
                raise SpliceError("one pair is ablated at a time: pick one picture of the batch")
            (pair,) = host.pairs(structure, appearance)
            progress = host.Progress(sum(settings.all_steps for settings in recipes.values()))
            results = {}
            for name, settings in recipes.items():
                run, _ = host.train(pair, [backbone], settings, progress)
                results[name] = run.image().cpu()
                if run.step < run.steps:  # of unequal runs there would be nothing to compare
                    break
                del run
            return io.NodeOutput(host.image([from_pil(sheet(ablation_rows(pair.structure, pair.appearance, results)))]))
