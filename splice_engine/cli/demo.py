"""`splice demo`, and its pair of pictures, taken from the packages that ship them."""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import SpliceError, pip_command
from ..files import write_error
from ..images import load_picture
from ..presets import preset
from ..settings import Settings
from ..vit.catalogue import OFFLINE_BACKBONE
from .common import add_overwrite, recipe_options
from .inputs import Inputs
from .transfer import add_training, prepare_outputs, train

TEXTURE = 0.3
"""Of the recipe: with all of the texture, the wrinkles and glasses of the one face lie on the cheeks of the other."""


def add_demo(commands: Any) -> None:
    """Adds `splice demo`."""
    parser = commands.add_parser(
        "demo", help="an astronaut in the appearance of a rear admiral, in a few minutes without a GPU"
    )
    parser.set_defaults(run=run_demo)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("splice-demo"),
        metavar="FOLDER",
        help="where the pictures go (default: %(default)s)",
    )
    add_overwrite(parser)
    add_training(parser, OFFLINE_BACKBONE, "draft")


def run_demo(options: argparse.Namespace) -> int:
    """Trains on two pictures that come with Python packages."""
    folder = options.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from None
    options.output, options.strip = folder / "demo.png", folder / "demo-strip.png"
    settings = preset(options.preset, **{"texture": TEXTURE, **recipe_options(Settings, options)})
    prepare_outputs(options, settings)
    structure, appearance = load_pair()
    return train(Inputs(structure, [appearance]), settings, options)


def load_pair() -> tuple[Tensor, Tensor]:
    """scikit-image's astronaut (structure) and matplotlib's Grace Hopper (appearance), both in the public domain.

    Returns:
        Two pictures `[1, 3, H, W]` in 0..1.

    Raises:
        SpliceError: The packages of the `demo` extra are not installed.
    """
    try:
        import matplotlib
        import skimage
    except ImportError as error:
        raise SpliceError(
            f"the demo's pictures come with {error.name}: {pip_command('scikit-image', 'matplotlib')}"
        ) from None
    astronaut = Path(skimage.__file__).parent / "data" / "astronaut.png"
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return load_picture(astronaut), load_picture(hopper)
