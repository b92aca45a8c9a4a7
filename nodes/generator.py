"""Generators: applied to other pictures, saved and loaded."""

import os

import comfy.model_management as mm
import torch
from comfy_api.latest import io

from ..splice_engine import Generator, SpliceError, apply_generator
from ..splice_engine.files import check_place
from . import folders, sockets
from .convert import check_image, from_image, image_dtype, to_image
from .memory import RENDER_BYTES, engine_context, on_device
from .progress import Cancellable, with_progress
from .schema import make_schema
from .widgets import filename_widget, generator_name_widget


class ApplyGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceApplyGenerator",
            display_name="Splice Apply Generator",
            group="training",
            description="Gives other pictures the appearance that a generator was trained for, without training.",
            inputs=[
                sockets.Generator.Input("generator", tooltip="From a transfer, or loaded."),
                io.Image.Input(
                    "image",
                    tooltip="Pictures of the same kind as the one it was trained on, such as frames of one video.",
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="At the size of the pictures that came in.")],
        )

    @classmethod
    def execute(cls, generator: Generator, image) -> io.NodeOutput:
        with engine_context(), Cancellable():
            check_image(image, "picture")
            # A clip may fill much of the memory: there is one copy of it, and it is the result.
            result = torch.empty(*image.shape[:-1], 3, device=mm.intermediate_device(), dtype=image_dtype())
            with on_device(generator, RENDER_BYTES * image[0, :, :, 0].numel()) as device:
                for frame, into in with_progress(list(zip(image.split(1), result.split(1), strict=True))):
                    (picture,) = from_image(frame, "picture")
                    into.copy_(to_image([apply_generator(generator, picture.to(device))]))
            return io.NodeOutput(result)


class SaveGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceSaveGenerator",
            display_name="Splice Save Generator",
            group="training",
            description=f"Saves a generator as a file in models/{folders.GENERATORS}.",
            inputs=[sockets.Generator.Input("generator", tooltip="From a transfer."), filename_widget()],
            outputs=[io.String.Output("path", tooltip="Where the file is.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """Checks the name when it is queued, before the training whose generator gets it; None: it is linked."""
        if filename_prefix is None:
            return True
        try:
            check_place(folders.new_generator_path(filename_prefix))
        except SpliceError as error:
            return f"Splice: {error}"
        except Exception:  # ComfyUI raises this class itself
            return f"Splice: filename_prefix leads out of models/{folders.GENERATORS}: name a file or a subfolder in it"
        return True

    @classmethod
    def execute(cls, generator: Generator, filename_prefix: str) -> io.NodeOutput:
        with engine_context():
            path = folders.new_generator_path(filename_prefix)
            generator.save(path)
            return io.NodeOutput(str(path))


class LoadGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceLoadGenerator",
            display_name="Splice Load Generator",
            group="training",
            description=f"Loads a generator that was saved in models/{folders.GENERATORS}.",
            inputs=[generator_name_widget()],
            outputs=[sockets.Generator.Output("generator", tooltip="For Splice Apply Generator.")],
        )

    @classmethod
    def validate_inputs(cls, generator_name: str | None = None) -> bool | str:
        return folders.check_name(folders.generator_path, generator_name)

    @classmethod
    def fingerprint_inputs(cls, generator_name: str) -> tuple[int, int] | None:
        """Changes with the file, which may be replaced under its name."""
        try:
            status = os.stat(folders.generator_path(generator_name))
        except (OSError, SpliceError):  # a missing file is named when the node runs
            return None
        return status.st_mtime_ns, status.st_size

    @classmethod
    def execute(cls, generator_name: str) -> io.NodeOutput:
        with engine_context():
            return io.NodeOutput(Generator.load(folders.generator_path(generator_name)))
