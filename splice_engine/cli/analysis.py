"""The commands that map what a ViT computes: `splice pca`, `similarity` and `attention`."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.figures import heat_picture, mark_point, sheet
from ..analysis.heatmaps import MAP_DENSITY, MASS, attention_map, similarity_map
from ..analysis.pca import MAP_SIZE, SELF_SIMILARITY, pca
from ..errors import SpliceError
from ..images import check_format, check_mask, check_writable, from_pil, load_mask, save_picture, sides
from ..settings import DENSITIES
from ..vit.dense import dense_features
from ..vit.features import FACETS
from .common import OPAQUE, add_backbone, add_dtype, add_layers, add_output, load_backbone, load_one, parse_count
from .outputs import Outputs, check_distinct


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
    add_layers(parser)
    _add_density(parser, 1)
    _add_map(parser)


def run_pca(options: argparse.Namespace) -> int:
    """Writes the components of some pictures: one map at its picture's size, or a sheet of pictures by layers."""
    check_writable(options.output, options.overwrite)
    pictures = [load_one(path) for path in options.pictures]
    alone = len(pictures) == len(options.layers) == 1
    if alone:
        check_format(options.output, sides(pictures[0]))
    backbone = load_backbone(options)
    similar = options.facet == SELF_SIMILARITY
    facet = "key" if similar else options.facet
    rows = [{path.name: picture} for path, picture in zip(options.pictures, pictures, strict=True)]
    for layer in options.layers:
        with torch.no_grad():
            features = [
                dense_features(picture, backbone, layer, facet, options.size, options.density) for picture in pictures
            ]
        found = pca(features, self_similarity=similar, foreground=options.foreground)
        for row, picture, components in zip(rows, pictures, found, strict=True):
            result = row[f"layer {backbone.resolve(layer)}"] = components.image(sides(picture), options.smooth)
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
    place.add_argument("--mask", type=Path, metavar="FILE", help=f"white where the place is; {OPAQUE}")
    _add_density(parser, MAP_DENSITY)
    _add_mask_output(parser)
    add_output(parser)
    add_backbone(parser)
    add_dtype(parser)


def run_similarity(options: argparse.Namespace) -> int:
    """Writes a heat map of what is like a place, and prints the best match."""
    _check_outputs(options)
    picture = load_one(options.picture)
    other = load_one(options.other) if options.other else picture
    _check_formats(options, other)
    where = _load_place(options, picture)
    found = similarity_map(picture, where, load_backbone(options), other, density=options.density)
    mask = found.mask(sides(other)).cpu()
    best = found.best()[0].tolist()
    written = _save_with_mask(options, mark_point(heat_picture(mask, other), best), mask)
    height, width = sides(other)
    print(f"best match at {best[0] * width:.0f}, {best[1] * height:.0f}: {written}")
    return 0


def _load_place(options: argparse.Namespace, picture: Tensor) -> Tensor | tuple[float, float]:
    """The mask of the place, or its point as shares of width and height."""
    if options.mask:
        return check_mask(load_mask(options.mask), f"mask {options.mask}")
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
    picture = load_one(options.picture)
    _check_formats(options, picture)
    found = attention_map(picture, load_backbone(options), options.layer, options.size)
    heat = found.heat(options.head).cpu()
    mask = found.mask(sides(picture), options.mass, options.head).cpu()
    print(_save_with_mask(options, heat_picture(heat / heat.amax(), picture), mask))
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    """Checks that the picture and the mask can be written, and that they are not the same file."""
    check_writable(options.output, options.overwrite)
    if options.mask_out:
        check_writable(options.mask_out, options.overwrite)
        check_distinct([options.output, options.mask_out])


def _check_formats(options: argparse.Namespace, picture: Tensor) -> None:
    """Checks that the files' formats hold pictures of that size."""
    for path in filter(None, (options.output, options.mask_out)):
        check_format(path, sides(picture))


def _save_with_mask(options: argparse.Namespace, picture: Tensor, mask: Tensor) -> str:
    """Writes the picture, and the mask if it is asked for; returns their names."""
    outputs = Outputs()
    for path, image in ((options.output, picture), (options.mask_out, mask.expand(-1, 3, -1, -1))):
        outputs.write(path, partial(save_picture, image, overwrite=options.overwrite))
    outputs.check()
    return ", ".join(map(str, outputs.written))


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


def _add_density(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--density",
        type=int,
        choices=DENSITIES,
        default=default,
        help="cells of the map per patch and axis; the time grows with its square (default: %(default)s)",
    )


def _add_mask_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mask-out", type=Path, metavar="FILE", help="also write the mask, white where it selects")
