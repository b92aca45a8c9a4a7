"""Generators: applied to other pictures, saved and loaded."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..splice_engine import Generator
from . import host, sockets
from .host import CATEGORY


class ApplyGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceApplyGenerator",
            display_name="Splice Apply Generator",
            category=CATEGORY,
            description="Gives other pictures the look that a generator has learnt, without training.",
            inputs=[
                sockets.Generator.Input("generator", tooltip="From a transfer, or loaded."),
                io.Image.Input(
                    "image", tooltip="Pictures of the same kind as the one it learnt on, such as frames of one video."
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="At the size of the pictures that came in.")],
        )

    @classmethod
    def execute(cls, generator: Generator, image) -> io.NodeOutput:
        with host.working():
            return io.NodeOutput(host.image(host.apply(generator, host.pictures(image, "picture"))))


class SaveGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceSaveGenerator",
            display_name="Splice Save Generator",
            category=CATEGORY,
            description=f"Keeps a generator as a file in models/{host.GENERATORS}.",
            inputs=[
                sockets.Generator.Input("generator", tooltip="From a transfer."),
                io.String.Input(
                    "filename_prefix",
                    default="generator",
                    tooltip="Beginning of the file's name; a number follows, so that nothing is replaced.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="Where the file is.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, generator: Generator, filename_prefix: str) -> io.NodeOutput:
        base = folder_paths.get_folder_paths(host.GENERATORS)[0]
        with host.working():
            folder, name, count, *_ = folder_paths.get_save_image_path(filename_prefix, base)
            path = Path(folder) / f"{name}_{count:05}_.safetensors"
            generator.save(path)
            return io.NodeOutput(str(path))


class LoadGenerator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpliceLoadGenerator",
            display_name="Splice Load Generator",
            category=CATEGORY,
            description=f"Reads a generator that was saved in models/{host.GENERATORS}.",
            inputs=[
                io.Combo.Input(
                    "generator_name",
                    options=folder_paths.get_filename_list(host.GENERATORS),
                    tooltip="The file; press R after a new one was saved.",
                )
            ],
            outputs=[sockets.Generator.Output("generator", tooltip="For Splice Apply Generator.")],
        )

    @classmethod
    def execute(cls, generator_name: str) -> io.NodeOutput:
        with host.working():
            return io.NodeOutput(Generator.load(folder_paths.get_full_path_or_raise(host.GENERATORS, generator_name)))
