"""ComfyUI's model folders: backbones to load, generators to load and to save."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import folder_paths

from ..splice_engine import CATALOGUE, SpliceError
from ..splice_engine.vit.checkpoints import SUFFIXES
from ..splice_engine.vit.weights import find

BACKBONES, GENERATORS = "dino", "splice_generators"
"""Folders in ComfyUI's `models`."""

EXAMPLES = Path(__file__).resolve().parent.parent / "workflows" / "pictures"
"""What the workflows open with: portraits of Eileen Collins (NASA) and Grace Hopper (U.S. Navy), in the public domain;
a clip that moves over the first, with its masks; scikit-image's cup of coffee (CC0 by Rachel Michetti). A mask is what
is transparent, as MaskEditor saves it."""


def register_folders() -> None:
    """Makes ComfyUI know the folders of backbones and of generators."""
    for name, suffixes in ((BACKBONES, set(SUFFIXES)), (GENERATORS, {".safetensors"})):
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        paths, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(known) | suffixes)


def place_examples() -> None:
    """Puts what the workflows open with into ComfyUI's input folder, so that a workflow runs as it is opened."""
    folder = Path(folder_paths.get_input_directory())
    for file in EXAMPLES.iterdir():
        with suppress(OSError):  # a folder that cannot be written costs no more than the examples
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def backbone_names() -> list[str]:
    """The catalogue, then the files in `models/dino` that are not found by a name of the catalogue anyhow."""
    known = {filename for entry in CATALOGUE.values() for filename in entry.filenames}
    return [*CATALOGUE, *(name for name in folder_paths.get_filename_list(BACKBONES) if name not in known)]


def backbones_here() -> list[str]:
    """The names of the catalogue whose weights are on this machine."""
    return [name for name, entry in CATALOGUE.items() if find(entry, backbone_folders())]


def backbone_folders() -> list[str]:
    """Where weights are searched before they are downloaded."""
    return folder_paths.get_folder_paths(BACKBONES)


def backbone_source(name: str) -> str:
    """What the engine loads for a backbone: a name of the catalogue, or the path of a file in `models/dino`.

    Args:
        name: One of `backbone_names`, or as an older workflow has it: a file that the list now shows by its name in the
            catalogue, there or not.

    Raises:
        SpliceError: There is no such file any more.
    """
    if name in CATALOGUE:
        return name
    if path := _find_file(BACKBONES, name):
        return path
    entries = [entry.name for entry in CATALOGUE.values() if name in entry.filenames]
    return entries[0] if entries else _refuse(BACKBONES, name)


def generator_names() -> list[str]:
    """The files in `models/splice_generators`."""
    return folder_paths.get_filename_list(GENERATORS)


def generator_path(name: str) -> str:
    """The file of one of `generator_names`.

    Raises:
        SpliceError: It is not there any more.
    """
    return _find_file(GENERATORS, name) or _refuse(GENERATORS, name)


def check_name(resolve: Callable[[str], str], name: str | None) -> bool | str:
    """What `validate_inputs` returns for the name of a file: ComfyUI's own check refuses all that its list lacks.

    Args:
        resolve: `backbone_source` or `generator_path`.
        name: None where it is linked.
    """
    try:
        return name is None or bool(resolve(name))
    except SpliceError as error:
        return f"Splice: {error}"


def _find_file(folder: str, name: str) -> str | None:
    """The path of a file that the list of a model folder has; a workflow of another system may separate by `\\`."""
    names = {listed.replace("\\", "/"): listed for listed in folder_paths.get_filename_list(folder)}
    listed = names.get(name.replace("\\", "/"))
    return folder_paths.get_full_path(folder, listed) if listed else None


def _refuse(folder: str, name: str) -> NoReturn:
    raise SpliceError(f"{name} is not in models/{folder}: choose another, or put it back and press R")


def new_generator_path(prefix: str) -> Path:
    """A file that is not there yet: the prefix, which may name a subfolder, and a number."""
    base = folder_paths.get_folder_paths(GENERATORS)[0]
    folder, name, count, *_ = folder_paths.get_save_image_path(prefix, base)
    return Path(folder) / f"{name}_{count:05}_.safetensors"
