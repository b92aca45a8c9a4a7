"""Times one training step of ours against a plain rendering of the paper's, interleaved in one run, at equal losses.

    python benchmarks/step.py --size 224 --json
    python benchmarks/step.py --size 224 --device cuda --backbone dino_vitb8

Prints how many times faster we are in fp32 (`ratio_fp32`) and with bf16 products in the ViT (`ratio_bf16`), our peak
memory of a step over the plain one's (`memory_ratio`), the largest relative difference of a loss, and which share of
our fp32 step the ViT and the generator take. Times are medians; `--pairs` sets how many steps of each are timed. On
CUDA convolutions are in full fp32, too, lest TF32 hide a difference, and memory is what torch's allocator hands out.
"""

import argparse
import json
import mmap
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from plain import PlainStep
from torch import Tensor

from splice_engine import OFFLINE_BACKBONE, Backbone, Pictures, Transfer, preset
from splice_engine.cli.demo import load_pair
from splice_engine.images import resize
from splice_engine.settings import Settings
from splice_engine.training.crops import CropSampler
from splice_engine.vit.catalogue import lookup
from splice_engine.vit.checkpoints import read
from splice_engine.vit.devices import pick_device
from splice_engine.vit.weights import get

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference allowed between our losses and the plain step's."""


def plain_model(name: str = OFFLINE_BACKBONE, device: torch.device | str = "cpu") -> torch.nn.Module:
    """A backbone as timm makes it."""
    entry = lookup(name)
    overlay = {"state_dict": read(get(entry))}
    return timm.create_model(
        entry.timm_id, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, dynamic_img_size=True
    ).to(device)


class Ours:
    """Our training step, as users run it, and what of it the ViT and the generator take."""

    def __init__(self, settings: Settings, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.run = Transfer(*load_pair(), Backbone.load(name, device, dtype), settings)
        self.steps = iter(self.run)
        next(self.steps)  # the first step has the appearance term only

    def __call__(self) -> dict[str, Tensor]:
        return next(self.steps).losses

    def generator_only(self, a: Tensor, b: Tensor) -> None:
        generator = self.run.generator
        for picture in (a, b):
            output = generator(picture)
            output.backward(torch.ones_like(output))

    def vit_only(self, a: Tensor, b: Tensor) -> None:
        pictures = Pictures(
            output=a.clone().requires_grad_(), structure=a, appearance=b, reconstruction=b.clone().requires_grad_()
        )
        self.run.objective.total(self.run.objective.losses(pictures)).backward()


def draw_pair(sampler: CropSampler, run: Transfer) -> tuple[Tensor, Tensor]:
    """The samples of structure and appearance picture that a run draws for its next step."""
    return sampler.structure(run.pair).picture, sampler.appearance(run.pair).picture


def settled() -> float:
    """The time in seconds, once all work on a device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[..., Any], *arguments: Tensor) -> tuple[Any, float]:
    """What some work returns, and its time in seconds."""
    start = settled()
    result = work(*arguments)
    return result, settled() - start


def recipe(size: int) -> Settings:
    """The paper's step, the same in every step."""
    return preset("paper", size=size, whole_every=0, steps=10**9)


def compare(size: int, pairs: int, name: str, device: torch.device) -> dict[str, float]:
    settings = recipe(size)
    plain = PlainStep(plain_model(name, device))
    times: dict[str, list[float]] = {name: [] for name in ("plain", "fp32", "bf16", "vit", "generator")}
    ours = {kind: Ours(settings, name, device, dtype) for kind, dtype in DTYPES.items()}
    samplers = {kind: CropSampler(settings, torch.Generator().manual_seed(settings.seed)) for kind in ours}
    for kind, sampler in samplers.items():
        draw_pair(sampler, ours[kind].run)
    worst = dict.fromkeys(ours, 0.0)
    for index in range(pairs + 2):
        for kind, mine in ours.items():
            plain.generator.copy_weights(mine.run.generator)
            samples = draw_pair(samplers[kind], mine.run)
            expected, took_plain = timed(plain, *samples)
            got, took_ours = timed(mine)
            took = {"plain": took_plain, kind: took_ours}
            if kind == "fp32":
                took["generator"] = timed(mine.generator_only, *samples)[1]
                took["vit"] = timed(mine.vit_only, *samples)[1]
            for key, value in expected.items():
                worst[kind] = max(worst[kind], abs(got[key].item() / value.item() - 1))
            if index >= 2:  # the first steps warm caches up
                for key, seconds in took.items():
                    times[key].append(seconds)
    for kind, dtype in DTYPES.items():
        if worst[kind] > TOLERANCE[dtype]:
            raise SystemExit(f"losses differ by {worst[kind]:.1e} in {kind}: the steps do not compute the same")
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "ratio_fp32": medians["plain"] / medians["fp32"],
        "ratio_bf16": medians["plain"] / medians["bf16"],
        "vit_share": medians["vit"] / medians["fp32"],
        "generator_share": medians["generator"] / medians["fp32"],
        "loss_difference_fp32": worst["fp32"],
        "loss_difference_bf16": worst["bf16"],
        "plain_seconds": medians["plain"],
        "fp32_seconds": medians["fp32"],
        "bf16_seconds": medians["bf16"],
    }


def step_memory(which: str, size: int, name: str, device: torch.device) -> float:
    """Peak memory in MB of three steps beyond what was in use before them; needs a process of its own."""
    step: Callable[[], object]
    if which == "plain":
        plain = PlainStep(plain_model(name, device))
        structure, appearance = (resize(p, (size, size)).to(device) for p in load_pair())

        def step() -> object:
            return plain(structure, appearance)
    else:
        step = Ours(recipe(size), name, device, torch.float32)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return measure_peak(step)


def measure_peak(step: Callable[[], object]) -> float:
    """Peak memory in MB of three steps beyond what the process had before them."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(3):
        step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (int(peak.split()[1]) * 1024 - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="short side of the pictures in pixels")
    parser.add_argument("--pairs", type=int, default=9, help="timed steps of each kind")
    parser.add_argument("--backbone", default=OFFLINE_BACKBONE, help="a name from `splice weights list`")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--memory-of", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    device = pick_device(options.device)
    if options.memory_of:
        print(step_memory(options.memory_of, options.size, options.backbone, device))
        return
    memory = {
        which: float(
            subprocess.run(
                [sys.executable, *sys.argv, "--memory-of", which], check=True, capture_output=True, text=True
            ).stdout
        )
        for which in ("plain", "ours")
    }
    result: dict[str, float] = {
        "size": options.size,
        "threads": torch.get_num_threads(),
        **compare(options.size, options.pairs, options.backbone, device),
    }
    result["memory_ratio"] = memory["ours"] / memory["plain"]
    result["plain_megabytes"], result["ours_megabytes"] = memory["plain"], memory["ours"]
    result = {name: float(f"{value:.4g}") for name, value in result.items()}
    print(json.dumps(result) if options.json else "\n".join(f"{name:22} {value:g}" for name, value in result.items()))


if __name__ == "__main__":
    main()
