"""Splice for ComfyUI: semantic appearance transfer with DINO vision transformers."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]
    """What ComfyUI calls to learn of the nodes."""
    from .nodes.extension import SpliceExtension

    return SpliceExtension()
