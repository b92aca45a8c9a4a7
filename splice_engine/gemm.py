"""Picks the faster fp32 matrix product on CPUs, where it is as exact as torch's own.

Torch sends fp32 products on the CPU to the BLAS it was built with. On many processors oneDNN's kernels are faster, and
torch uses them once told that bf16 products would do; on a processor without bf16 matrix tiles oneDNN then still
computes in full fp32, on one with such tiles it really drops to bf16. So the choice is measured, both ways, and kept in
the engine's cache: one seed gives the same bits in every process of a machine, however busy it is.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .files import atomic_path, cache_folder

TOLERANCE = 5e-6
"""Largest error allowed, relative to the largest entry of the product; torch's own fp32 product is near 1e-6."""

DECISIVE = 0.85
"""Share of the time that another way must stay under to be taken: oneDNN makes torch's fused attention slower."""

SHAPE = (512, 1536, 384)
"""Tokens, inputs and outputs of the product that is timed: a ViT-S MLP on two pictures at 224 px."""

ROUNDS = 40
"""Turns in which the ways are timed: a few tenths of a second, for a choice that is kept."""


@contextmanager
def fast_fp32() -> Iterator[None]:
    """Within the block, fp32 matrix products on the CPU take oneDNN's kernels if they are faster and as exact."""
    if not _onednn_pays():
        yield
        return
    with _onednn():
        yield


@contextmanager
def _onednn() -> Iterator[None]:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def bf16_pays() -> bool:
    """Whether this CPU computes bf16 matrix products clearly faster than fp32 ones."""
    return _remembered("bf16", _bf16_wins)


def _bf16_wins() -> bool:
    x, weight = _operands()
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    with fast_fp32():
        plain, low = _race(lambda: F.linear(x, weight), lambda: F.linear(low_x, low_weight))
    return low < DECISIVE * plain


@cache
def _onednn_pays() -> bool:
    return _remembered("onednn", _onednn_wins)


def _onednn_wins() -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")):
        return False
    x, weight = _operands()
    exact = F.linear(x.double(), weight.double())

    def onednn() -> Tensor:
        with _onednn():
            return F.linear(x, weight)

    error = (onednn().double() - exact).abs().max() / exact.abs().max()
    if error > TOLERANCE:
        return False
    plain, fast = _race(lambda: F.linear(x, weight), onednn)
    return fast < DECISIVE * plain


def _remembered(name: str, measure: Callable[[], bool]) -> bool:
    """What was measured on this machine before, else what is measured now."""
    machine = (platform.node(), torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads())
    path = cache_folder() / f"{name}.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    key = " ".join(map(str, machine))
    if not isinstance(known.get(key), bool):
        known[key] = measure()
        with suppress(OSError):  # a cache that cannot be written costs repeatability, not the run
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return bool(known[key])


def _operands() -> tuple[Tensor, Tensor]:
    tokens, inputs, outputs = SHAPE
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)


def _race(*contenders: Callable[[], object]) -> list[float]:
    """Best time of each in seconds, in turns, so that a moment in which the machine is busy does not decide."""
    best = [float("inf")] * len(contenders)
    for _ in range(ROUNDS):
        for index, contender in enumerate(contenders):
            start = time.perf_counter()
            contender()
            best[index] = min(best[index], time.perf_counter() - start)
    return best
