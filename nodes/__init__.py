"""ComfyUI nodes: thin faces of `splice_engine`."""
