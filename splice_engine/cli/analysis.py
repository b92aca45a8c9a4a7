"""The commands of analysis: `splice pca`, `similarity`, `attention`, `invert`, `ablate` and `curves`."""

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.figures import heat_picture, loss_curves, mark_point, sheet
from ..analysis.heatmaps import MASS, attention_map, similarity_map
from ..analysis.pca import MAP_SIZE, SELF_SIMILARITY, pca
from ..errors import SpliceError
from ..files import check_place
from ..images import check_picture, check_writable, from_pil, load_picture, save_picture, sides
from ..settings import (
    DEFAULT_INVERSION,
    INVERSION_PRESETS,
    PRESETS,
    InversionSettings,
    Settings,
    inversion_preset,
    preset,
)
from ..training.ablation import ablation, ablation_rows, ablation_settings
from ..training.inversion import INVERTIBLE, Inversion
from ..vit.features import FACETS
from .common import (
    Log,
    add_backbone,
    add_dtype,
    add_output,
    add_pair,
    add_quiet,
    add_settings,
    check_distinct,
    iterate_with_bar,
    load_backbone,
    parse_count,
    read_log,
    recipe_options,
    report_end,
    save_result,
)


def add_pca(commands: Any) -> None:
    """Adds `splice pca`."""
    parser = commands.add_parser("pca", help="principal components as colours: equal colours mean equal parts")
    parser.set_defaults(run=run_pca)
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="fitted together")
    parser.add_argument(
        "--facet",
        default=SELF_SIMILARITY,
        choices=(SELF_SIMILARITY, *FACETS),
        help="of what (default: %(default)s, of the keys)",
    )
    parser.add_argument("--foreground", action="store_true", help="leave the background out")
    smoothness = parser.add_mutually_exclusive_group()
    smoothness.add_argument(
        "--smooth", action="store_true", default=True, help="smooth between the patches (the default)"
    )
    smoothness.add_argument("--blocky", dest="smooth", action="store_false", help="each patch as a block")
    _add_layers(parser)
    _add_map(parser)


def run_pca(options: argparse.Namespace) -> int:
    """Writes the components of some pictures: one map at its picture's size, or a sheet of pictures by layers."""
    check_writable(options.output, options.overwrite)
    pictures = [_load(path) for path in options.pictures]
    backbone = load_backbone(options)
    similar = options.facet == SELF_SIMILARITY
    facet = "key" if similar else options.facet
    rows = [{path.name: picture} for path, picture in zip(options.pictures, pictures, strict=True)]
    for layer in options.layers:
        with torch.no_grad():
            features = [
                backbone.features(picture.to(backbone.device), layer, facet, options.size) for picture in pictures
            ]
        found = pca(features, self_similarity=similar, foreground=options.foreground)
        for row, picture, components in zip(rows, pictures, found, strict=True):
            result = row[f"layer {backbone.resolve(layer)}"] = components.image(sides(picture), options.smooth)
    alone = len(pictures) == len(options.layers) == 1
    save_picture(result if alone else from_pil(sheet(rows)), options.output, overwrite=options.overwrite)
    print(options.output)
    return 0


def add_similarity(commands: Any) -> None:
    """Adds `splice similarity`."""
    parser = commands.add_parser("similarity", help="what is like a place of a picture, on it or on another")
    parser.set_defaults(run=run_similarity)
    parser.add_argument("picture", type=Path, help="picture that the place is in")
    parser.add_argument("other", type=Path, nargs="?", help="picture to search (default: the same one)")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--point", type=float, nargs=2, metavar=("X", "Y"), help="in pixels, or as shares where both are at most 1"
    )
    place.add_argument("--mask", type=Path, metavar="FILE", help="a picture that is white where the place is")
    _add_mask_output(parser)
    add_output(parser)
    add_backbone(parser)
    add_dtype(parser)


def run_similarity(options: argparse.Namespace) -> int:
    """Writes a heat map of what is like a place, and prints the best match."""
    _check_outputs(options)
    picture = _load(options.picture)
    other = _load(options.other) if options.other else picture
    where = _load_place(options, picture)
    found = similarity_map(picture, where, load_backbone(options), other)
    mask = found.mask(sides(other)).cpu()
    best = found.best()[0].tolist()
    save_picture(mark_point(heat_picture(mask, other), best), options.output, overwrite=options.overwrite)
    height, width = sides(other)
    print(f"best match at {best[0] * width:.0f}, {best[1] * height:.0f}: {_save_mask(options, mask)}")
    return 0


def _load_place(options: argparse.Namespace, picture: Tensor) -> Tensor | tuple[float, float]:
    """The mask of the place, or its point as shares of width and height."""
    if options.mask:
        return load_picture(options.mask).mean(dim=1, keepdim=True)
    x, y = options.point
    height, width = sides(picture)
    point = (x, y) if max(x, y) <= 1 else (x / width, y / height)
    if not all(0 <= share <= 1 for share in point):
        raise SpliceError(f"the point {x:g}, {y:g} lies outside of the picture, which is {width}x{height} pixels")
    return point


def add_attention(commands: Any) -> None:
    """Adds `splice attention`."""
    parser = commands.add_parser("attention", help="where the [CLS] token attends")
    parser.set_defaults(run=run_attention)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--head", type=int, metavar="N", help="only this one, from 0 (default: the mean of all)")
    parser.add_argument("--layer", type=int, default=-1, metavar="N", help="block of the ViT (default: the deepest)")
    parser.add_argument(
        "--mass", type=float, default=MASS, metavar="X", help="share that --mask-out keeps (default: %(default)s)"
    )
    _add_mask_output(parser)
    _add_map(parser)


def run_attention(options: argparse.Namespace) -> int:
    """Writes a heat map of the attention of the [CLS] token."""
    _check_outputs(options)
    picture = _load(options.picture)
    found = attention_map(picture, load_backbone(options), options.layer, options.size)
    heat = found.heat(options.head).cpu()
    mask = found.mask(sides(picture), options.mass, options.head).cpu()
    save_picture(heat_picture(heat / heat.amax(), picture), options.output, overwrite=options.overwrite)
    print(_save_mask(options, mask))
    return 0


def add_invert(commands: Any) -> None:
    """Adds `splice invert`."""
    parser = commands.add_parser("invert", help="reconstruct a picture from one of its features, to show what it holds")
    parser.set_defaults(run=run_invert)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--facet", default="cls", choices=INVERTIBLE, help="the feature (default: %(default)s)")
    _add_layers(parser)
    parser.add_argument(
        "--preset", default=DEFAULT_INVERSION, choices=INVERSION_PRESETS, help="the recipe (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="loss of every step, as lines of JSON")
    add_quiet(parser)
    add_output(parser)
    add_backbone(parser)
    add_dtype(parser)
    add_settings(parser, InversionSettings)


def run_invert(options: argparse.Namespace) -> int:
    """Writes the picture that one layer's feature gives, or a sheet of those of several layers."""
    settings = inversion_preset(options.preset, **recipe_options(InversionSettings, options))
    check_writable(options.output, options.overwrite)
    if options.log:
        check_place(options.log, options.overwrite)
    picture = _load(options.picture)
    backbone = load_backbone(options)
    layers = [backbone.resolve(layer) for layer in options.layers]
    row, started, taken = {options.picture.name: picture}, time.monotonic(), 0
    with closing(Log(options.log)) as log:
        for layer in layers:
            run, name = Inversion(picture, backbone, settings, layer, options.facet), f"{options.facet}, layer {layer}"
            for step in iterate_with_bar(run, options.quiet, name):
                log.write({"step": taken + step.index, name: step.total.item()})
            taken += run.step
            result = row[name] = run.image(min(sides(picture)))
            if run.steps_left:
                break
    path = save_result(result if len(layers) == 1 else from_pil(sheet([row])), options.output)
    log.check()
    return report_end(taken, len(layers) * settings.steps, time.monotonic() - started, (path, options.log))


def add_ablate(commands: Any) -> None:
    """Adds `splice ablate`."""
    parser = commands.add_parser("ablate", help="train once with all losses and once without each, side by side")
    parser.set_defaults(run=run_ablate)
    add_pair(parser)
    add_output(parser)
    parser.add_argument("--preset", default="paper", choices=PRESETS, help="the recipe (default: %(default)s)")
    add_quiet(parser)
    add_backbone(parser)
    add_dtype(parser)
    add_settings(parser, Settings)


def run_ablate(options: argparse.Namespace) -> int:
    """Writes a sheet of the pictures of a recipe without each of its losses."""
    settings = preset(options.preset, **recipe_options(Settings, options))
    runs = len(ablation_settings(settings))
    check_writable(options.output, options.overwrite)
    structure = check_picture(load_picture(options.structure), "structure picture")
    appearance = check_picture(load_picture(options.appearance), "appearance picture")
    results: dict[str, Tensor] = {}
    started, taken = time.monotonic(), 0
    for name, run in ablation(structure, appearance, load_backbone(options), settings):
        for _ in iterate_with_bar(run, options.quiet, name):
            pass
        results[name] = run.image()
        taken += run.step
        if run.steps_left:
            break
    path = save_result(from_pil(sheet(ablation_rows(structure, appearance, results))), options.output)
    return report_end(taken, runs * settings.all_steps, time.monotonic() - started, (path,))


def add_curves(commands: Any) -> None:
    """Adds `splice curves`."""
    parser = commands.add_parser("curves", help="draw the losses of a run from its log")
    parser.set_defaults(run=run_curves)
    parser.add_argument("log", type=Path, help="file that --log wrote")
    add_output(parser)


def run_curves(options: argparse.Namespace) -> int:
    """Writes a chart of the losses in a log."""
    check_writable(options.output, options.overwrite)
    save_picture(from_pil(loss_curves(read_log(options.log))), options.output, overwrite=options.overwrite)
    print(options.output)
    return 0


def _load(path: Path) -> Tensor:
    return check_picture(load_picture(path), str(path))


def _check_outputs(options: argparse.Namespace) -> None:
    """Checks that the picture and the mask can be written, and that they are not the same file."""
    check_writable(options.output, options.overwrite)
    if options.mask_out:
        check_writable(options.mask_out, options.overwrite)
        check_distinct([options.output, options.mask_out])


def _save_mask(options: argparse.Namespace, mask: Tensor) -> str:
    """Writes the mask if it is asked for; returns the names of all that has been written."""
    if not options.mask_out:
        return str(options.output)
    save_picture(mask.expand(-1, 3, -1, -1), options.mask_out, overwrite=options.overwrite)
    return f"{options.output}, {options.mask_out}"


def _add_layers(parser: argparse.ArgumentParser) -> None:
    layers = parser.add_mutually_exclusive_group()
    for flag, several, text in (
        ("--layer", 1, "block of the ViT (default: the deepest)"),
        ("--layers", "+", "several, side by side"),
    ):
        layers.add_argument(flag, dest="layers", type=int, nargs=several, default=[-1], metavar="N", help=text)


def _add_map(parser: argparse.ArgumentParser) -> None:
    """Adds what commands that write a map of a picture have in common."""
    parser.add_argument(
        "--size",
        type=parse_count,
        default=MAP_SIZE,
        metavar="N",
        help="short side in pixels of what the ViT gets (default: %(default)s)",
    )
    add_output(parser)
    add_backbone(parser)
    add_dtype(parser)


def _add_mask_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mask-out", type=Path, metavar="FILE", help="also write the mask, white where it selects")
