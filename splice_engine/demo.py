"""The demo's pair of pictures, taken from the packages that ship them."""

from pathlib import Path

from torch import Tensor

from .errors import SpliceError
from .images import load_picture


def load_pair() -> tuple[Tensor, Tensor]:
    """scikit-image's astronaut (structure) and matplotlib's Grace Hopper (appearance), both in the public domain.

    Raises:
        SpliceError: The packages of the `demo` extra are not installed.
    """
    try:
        import matplotlib
        import skimage
    except ImportError as error:
        raise SpliceError(
            f'the demo\'s pictures come with {error.name}: `pip install "splice-vit[demo]"` brings it'
        ) from None
    astronaut = Path(skimage.__file__).parent / "data" / "astronaut.png"
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return load_picture(astronaut), load_picture(hopper)
