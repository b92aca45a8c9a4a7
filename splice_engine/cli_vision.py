"""The commands that show what a ViT sees: `splice pca`, `similarity`, `attention`, `invert`, `ablate` and `curves`."""

import argparse
import json
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ablation import ablated, ablation, ablation_rows
from .components import SELF_SIMILARITY, VIEW, pca
from .console import (
    INTERRUPTED,
    Log,
    add_backbone,
    add_dtype,
    add_output,
    add_pair,
    add_settings,
    count,
    given,
    load_backbone,
    save_result,
    watched,
)
from .errors import SpliceError
from .features import FACETS
from .files import check_place, write_error
from .heatmaps import MASS, attention_map, similarity_map
from .images import check_picture, check_writable, from_pil, load_picture, save_picture, sides
from .inversion import INVERTIBLE, Inversion
from .pictures import heat_picture, loss_curves, mark_point, sheet
from .settings import (
    DEFAULT_INVERSION,
    INVERSION_PRESETS,
    PRESETS,
    InversionSettings,
    Settings,
    inversion_preset,
    preset,
)


def add_vision_commands(commands: Any) -> None:
    """Adds these commands to the parser's."""
    components = commands.add_parser("pca", help="principal components as colours: equal colours mean equal parts")
    components.set_defaults(run=_pca)
    components.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="fitted together")
    components.add_argument(
        "--facet",
        default=SELF_SIMILARITY,
        choices=(SELF_SIMILARITY, *FACETS),
        help="of what (default: %(default)s, of the keys)",
    )
    components.add_argument("--foreground", action="store_true", help="leave the ground out")
    smoothness = components.add_mutually_exclusive_group()
    smoothness.add_argument(
        "--smooth", action="store_true", default=True, help="smooth between the patches (the default)"
    )
    smoothness.add_argument("--blocky", dest="smooth", action="store_false", help="each patch as a block")
    _add_layers(components)
    _add_view(components)

    similarity = commands.add_parser("similarity", help="what is like a place of a picture, on it or on another")
    similarity.set_defaults(run=_similarity)
    similarity.add_argument("picture", type=Path, help="picture that the place is in")
    similarity.add_argument("other", type=Path, nargs="?", help="picture to search (default: the same one)")
    place = similarity.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--point", type=float, nargs=2, metavar=("X", "Y"), help="in pixels, or as shares where both are at most 1"
    )
    place.add_argument("--mask", type=Path, metavar="FILE", help="a picture that is white where the place is")
    _add_mask_output(similarity)
    add_output(similarity)
    add_backbone(similarity)
    add_dtype(similarity)

    attention = commands.add_parser("attention", help="where the [CLS] token attends")
    attention.set_defaults(run=_attention)
    attention.add_argument("picture", type=Path)
    attention.add_argument("--head", type=int, metavar="N", help="only this one, from 0 (default: the mean of all)")
    attention.add_argument("--layer", type=int, default=-1, metavar="N", help="block of the ViT (default: the deepest)")
    attention.add_argument(
        "--mass", type=float, default=MASS, metavar="X", help="share that --mask-out keeps (default: %(default)s)"
    )
    _add_mask_output(attention)
    _add_view(attention)

    invert = commands.add_parser("invert", help="paint what one feature of a picture has kept of it")
    invert.set_defaults(run=_invert)
    invert.add_argument("picture", type=Path)
    invert.add_argument("--facet", default="cls", choices=INVERTIBLE, help="the feature (default: %(default)s)")
    _add_layers(invert)
    invert.add_argument(
        "--preset", default=DEFAULT_INVERSION, choices=INVERSION_PRESETS, help="the recipe (default: %(default)s)"
    )
    invert.add_argument("--log", type=Path, metavar="FILE", help="loss of every step, as lines of JSON")
    invert.add_argument("--quiet", action="store_true", help="no progress bar")
    add_output(invert)
    add_backbone(invert)
    add_dtype(invert)
    add_settings(invert, InversionSettings)

    ablate = commands.add_parser("ablate", help="train once with all losses and once without each, side by side")
    ablate.set_defaults(run=_ablate)
    add_pair(ablate, alpha=False)
    ablate.add_argument("--preset", default="paper", choices=PRESETS, help="the recipe (default: %(default)s)")
    ablate.add_argument("--quiet", action="store_true", help="no progress bar")
    add_backbone(ablate)
    add_dtype(ablate)
    add_settings(ablate, Settings)

    curves = commands.add_parser("curves", help="draw the losses of a run from its log")
    curves.set_defaults(run=_curves)
    curves.add_argument("log", type=Path, help="file that --log wrote")
    add_output(curves)


def _pca(options: argparse.Namespace) -> int:
    check_writable(options.output, options.overwrite)
    pictures = [check_picture(load_picture(path), str(path)) for path in options.pictures]
    backbone = load_backbone(options)
    similar = options.facet == SELF_SIMILARITY
    rows = [{path.name: picture} for path, picture in zip(options.pictures, pictures, strict=True)]
    for layer in options.layers:
        with torch.no_grad():
            features = [
                backbone.features(p.to(backbone.device), layer, "key" if similar else options.facet, options.view)
                for p in pictures
            ]
        found = pca(features, self_similarity=similar, foreground=options.foreground)
        for row, picture, components in zip(rows, pictures, found, strict=True):
            row[f"layer {backbone.resolve(layer)}"] = components.image(sides(picture), options.smooth)
    alone = len(pictures) == len(options.layers) == 1
    result = list(rows[0].values())[1] if alone else from_pil(sheet(rows))
    save_picture(result, options.output, overwrite=options.overwrite)
    print(options.output)
    return 0


def _similarity(options: argparse.Namespace) -> int:
    _check_pictures(options)
    picture = check_picture(load_picture(options.picture), str(options.picture))
    other = check_picture(load_picture(options.other), str(options.other)) if options.other else picture
    if options.mask:
        where: Tensor | tuple[float, float] = load_picture(options.mask).mean(dim=1, keepdim=True)
    else:
        x, y = options.point
        height, width = sides(picture)
        where = (x, y) if max(x, y) <= 1 else (x / width, y / height)
        if not all(0 <= share <= 1 for share in where):
            raise SpliceError(f"the point {x:g}, {y:g} lies outside of the picture, which is {width}x{height} pixels")
    found = similarity_map(picture, where, load_backbone(options), other)
    mask = found.mask(sides(other)).cpu()
    best = found.best()[0].tolist()
    save_picture(mark_point(heat_picture(mask, other), best), options.output, overwrite=options.overwrite)
    height, width = sides(other)
    print(f"best match at {best[0] * width:.0f}, {best[1] * height:.0f}: {_saved(options, mask)}")
    return 0


def _attention(options: argparse.Namespace) -> int:
    _check_pictures(options)
    picture = check_picture(load_picture(options.picture), str(options.picture))
    found = attention_map(picture, load_backbone(options), options.layer, options.view)
    heat, mask = found.heat(options.head).cpu(), found.mask(sides(picture), options.mass, options.head).cpu()
    save_picture(heat_picture(heat / heat.amax(), picture), options.output, overwrite=options.overwrite)
    print(_saved(options, mask))
    return 0


def _invert(options: argparse.Namespace) -> int:
    settings = inversion_preset(options.preset, **given(InversionSettings, options))
    check_writable(options.output, options.overwrite)
    if options.log:
        check_place(options.log, options.overwrite)
    picture = check_picture(load_picture(options.picture), str(options.picture))
    backbone = load_backbone(options)
    layers = [backbone.resolve(layer) for layer in options.layers]
    results: dict[str, Tensor] = {options.picture.name: picture}
    started, done = time.monotonic(), True
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(options.log))) if options.log else None
        for index, layer in enumerate(layers):
            run = Inversion(picture, backbone, settings, layer, options.facet)
            name = f"{options.facet}, layer {layer}"
            for step in watched(run, options.quiet, name):
                if log:
                    log.write({"step": index * run.steps + step.index, name: step.total.item()})
            results[name] = run.image(min(sides(picture)))
            done = run.step == run.steps
            if not done:
                break
    alone = len(layers) == 1
    path = save_result(results[name] if alone else from_pil(sheet([results])), options.output)
    if log and log.error:
        raise write_error(log.path, log.error)
    return _told(done, started, ", ".join(map(str, filter(None, (path, options.log)))))


def _ablate(options: argparse.Namespace) -> int:
    settings = preset(options.preset, **given(Settings, options))
    ablated(settings)
    check_writable(options.output, options.overwrite)
    structure = check_picture(load_picture(options.structure), "structure picture")
    appearance = check_picture(load_picture(options.appearance), "appearance picture")
    started, done = time.monotonic(), True
    results: dict[str, Tensor] = {}
    for name, run in ablation(structure, appearance, load_backbone(options), settings):
        for _ in watched(run, options.quiet, name):
            pass
        results[name] = run.image()
        done = run.step == run.steps
        if not done:
            break
    path = save_result(from_pil(sheet(ablation_rows(structure, appearance, results))), options.output)
    return _told(done, started, str(path))


def _curves(options: argparse.Namespace) -> int:
    check_writable(options.output, options.overwrite)
    try:
        text = options.log.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SpliceError(f"cannot read {options.log} ({reason}): name a file that --log wrote") from None
    steps = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            step = {name: float(value) for name, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError):
            raise SpliceError(f"line {number} of {options.log} is no step: name a file that --log wrote") from None
        steps.append(step)
    save_picture(from_pil(loss_curves(steps)), options.output, overwrite=options.overwrite)
    print(options.output)
    return 0


def _check_pictures(options: argparse.Namespace) -> None:
    check_writable(options.output, options.overwrite)
    if options.mask_out:
        check_writable(options.mask_out, options.overwrite)
        if options.mask_out.absolute() == options.output.absolute():
            raise SpliceError(f"{options.output} is named for two outputs: give each a name of its own")


def _saved(options: argparse.Namespace, mask: Tensor) -> str:
    """Writes the mask if it is wanted; the names of what has been written."""
    if not options.mask_out:
        return str(options.output)
    save_picture(mask.expand(-1, 3, -1, -1), options.mask_out, overwrite=options.overwrite)
    return f"{options.output}, {options.mask_out}"


def _told(done: bool, started: float, written: str) -> int:
    """Says how a run ended; its exit status."""
    if done:
        print(f"done in {time.monotonic() - started:.0f} s: {written}")
        return 0
    print(f"interrupted; the picture so far: {written}")
    return INTERRUPTED


def _add_layers(parser: argparse.ArgumentParser) -> None:
    layers = parser.add_mutually_exclusive_group()
    for flag, several, text in (
        ("--layer", 1, "block of the ViT (default: the deepest)"),
        ("--layers", "+", "several, side by side"),
    ):
        layers.add_argument(flag, dest="layers", type=int, nargs=several, default=[-1], metavar="N", help=text)


def _add_view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        dest="view",
        type=count,
        default=VIEW,
        metavar="N",
        help="short side at which the ViT looks (default: %(default)s)",
    )
    add_output(parser)
    add_backbone(parser)
    add_dtype(parser)


def _add_mask_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mask-out", type=Path, metavar="FILE", help="also write the mask, white where it selects")
