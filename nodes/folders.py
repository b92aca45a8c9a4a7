"""ComfyUI's model folders: backbones to load, generators to load and to save."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import folder_paths

from ..splice_engine import CATALOGUE
from ..splice_engine.vit.checkpoints import SUFFIXES
from ..splice_engine.vit.weights import find

BACKBONES, GENERATORS = "dino", "splice_generators"
"""Folders in ComfyUI's `models`."""

EXAMPLES = Path(__file__).resolve().parent.parent / "workflows" / "pictures"
"""Pictures of the workflows: portraits of Eileen Collins (NASA) and Grace Hopper (U.S. Navy), in the public domain."""


def register_folders() -> None:
    """Makes ComfyUI know the folders of backbones and of generators."""
    for name, suffixes in ((BACKBONES, set(SUFFIXES)), (GENERATORS, {".safetensors"})):
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        paths, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(known) | suffixes)


def place_example_pictures() -> None:
    """Puts the pictures of the workflows among ComfyUI's input pictures, so that a workflow runs as it is opened."""
    folder = Path(folder_paths.get_input_directory())
    for picture in EXAMPLES.glob("*.jpg"):
        with suppress(OSError):  # a folder that cannot be written costs no more than the examples
            if not (folder / picture.name).exists():
                shutil.copyfile(picture, folder / picture.name)


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
    """What the engine loads for one of `backbone_names`: the catalogue's name itself, or the file's path."""
    return name if name in CATALOGUE else folder_paths.get_full_path_or_raise(BACKBONES, name)


def generator_names() -> list[str]:
    """The files in `models/splice_generators`."""
    return folder_paths.get_filename_list(GENERATORS)


def generator_path(name: str) -> str:
    """The file of one of `generator_names`."""
    return folder_paths.get_full_path_or_raise(GENERATORS, name)


def new_generator_path(prefix: str) -> Path:
    """A file that is not there yet: the prefix, which may name a subfolder, and a number."""
    base = folder_paths.get_folder_paths(GENERATORS)[0]
    folder, name, count, *_ = folder_paths.get_save_image_path(prefix, base)
    return Path(folder) / f"{name}_{count:05}_.safetensors"
