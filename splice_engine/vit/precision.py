"""The fastest matrix products of a CPU: oneDNN's fp32 kernels where they are as exact as torch's, and bf16.

Torch computes fp32 products on the CPU with the BLAS it was built with. On many processors oneDNN's kernels are faster,
and torch uses them once bf16 is allowed as internal precision. On a processor without bf16 matrix tiles (AMX) oneDNN
then still computes in full fp32; on one with such tiles it computes in bf16. So both speed and error are measured. The
choice is kept in the engine's cache, so that one seed gives the same bits in every process of a machine, however busy
it is.
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

from ..files import atomic_path, cache_folder

TOLERANCE = 5e-6
"""Largest error allowed, relative to the largest entry of the product; torch's own fp32 product has about 1e-6."""

TIME_RATIO = 0.85
"""Time relative to plain fp32 below which a kernel is used; not 1, since oneDNN slows torch's fused attention."""

TIMED_SHAPE = (512, 1536, 384)
"""Tokens, inputs and outputs of the product that is timed: a ViT-S MLP on two pictures at 224 px."""

TIMED_ROUNDS = 40
"""Runs of each kernel, in turns: a few tenths of a second, once per machine."""


@contextmanager
def fast_fp32() -> Iterator[None]:
    """Context in which fp32 matrix products on the CPU use oneDNN's kernels where those are faster and as exact."""
    if not _onednn_is_faster():
        yield
        return
    with _use_onednn():
        yield


@contextmanager
def _use_onednn() -> Iterator[None]:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def bf16_is_faster() -> bool:
    """Whether this CPU computes bf16 matrix products clearly faster than fp32 ones."""
    return _recall_or_measure("bf16", _measure_bf16)


def _measure_bf16() -> bool:
    x, weight = _draw_operands()
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    with fast_fp32():
        fp32, bf16 = _best_times(lambda: F.linear(x, weight), lambda: F.linear(low_x, low_weight))
    return bf16 < TIME_RATIO * fp32


@cache
def _onednn_is_faster() -> bool:
    return _recall_or_measure("onednn", _measure_onednn)


def _measure_onednn() -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")):
        return False
    x, weight = _draw_operands()
    exact = F.linear(x.double(), weight.double())

    def onednn() -> Tensor:
        with _use_onednn():
            return F.linear(x, weight)

    error = (onednn().double() - exact).abs().max() / exact.abs().max()
    if error > TOLERANCE:
        return False
    plain, fast = _best_times(lambda: F.linear(x, weight), onednn)
    return fast < TIME_RATIO * plain


def _recall_or_measure(name: str, measure: Callable[[], bool]) -> bool:
    """The cached answer of a measurement on this machine, else a new one, which is cached."""
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
        with suppress(OSError):  # without a cache another process may choose otherwise, but the run goes on
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return bool(known[key])


def _draw_operands() -> tuple[Tensor, Tensor]:
    tokens, inputs, outputs = TIMED_SHAPE
    rng = torch.Generator().manual_seed(0)
    return torch.randn(tokens, inputs, generator=rng), torch.randn(outputs, inputs, generator=rng)


def _best_times(*kernels: Callable[[], object]) -> list[float]:
    """Shortest time of each in seconds, run in turns: a moment in which the machine is busy does not decide."""
    best = [float("inf")] * len(kernels)
    for _ in range(TIMED_ROUNDS):
        for index, kernel in enumerate(kernels):
            start = time.perf_counter()
            kernel()
            best[index] = min(best[index], time.perf_counter() - start)
    return best
