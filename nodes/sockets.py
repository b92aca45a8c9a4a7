"""The sockets of our own, each named once: ComfyUI matches them by name."""

from comfy_api.latest import io

Backbone = io.Custom("SPLICE_BACKBONE")
"""A `ModelPatcher`, see `memory.load_backbone`."""

Features = io.Custom("SPLICE_FEATURES")
"""The engine's `Features`."""

Similarity = io.Custom("SPLICE_SIMILARITY")
"""The engine's `SelfSimilarity`."""

Objective = io.Custom("SPLICE_OBJECTIVE")
"""A tuple of `objective.TermInput`: terms, and the backbones that they name."""

Generator = io.Custom("SPLICE_GENERATOR")
"""The engine's `Generator`, on the CPU."""
