"""Splice for ComfyUI: semantic appearance transfer with DINO vision transformers."""

WEB_DIRECTORY = "./web"
