"""Times one step of our feature inversion against a plain rendering of it, in turns in one run.

    python benchmarks/inversion.py --size 224 --json

The plain step runs the whole ViT with a hook and weights that require gradients, and a painting network of plain layers
with the same weights; both read their target once, before the first step. Prints how many times faster we are in fp32
(`ratio_fp32`) and, on processors that gain by it, with bf16 products in the ViT (`ratio_bf16`); times are medians. It
fails unless the first losses are equal.
"""

import argparse
import json
import statistics
from dataclasses import replace

import torch
import torch.nn.functional as F
from plain import PlainGenerator, PlainViT
from step import TOLERANCE, plain_model, timed
from torch import Tensor

from splice_engine import OFFLINE_BACKBONE, Backbone, Inversion, inversion_preset
from splice_engine.cli.demo import load_pair
from splice_engine.images import resize
from splice_engine.training.inversion import INVERSION_CHANNELS, NOISE_CHANNELS
from splice_engine.vit.devices import pick_dtype

DTYPES = {"fp32": torch.float32}
if pick_dtype("auto", torch.device("cpu")) == torch.bfloat16:
    DTYPES["bf16"] = torch.bfloat16


class PlainInversion:
    """The same inversion with a plain ViT and a plain network of the same first weights."""

    def __init__(self, run: Inversion) -> None:
        self.vit = PlainViT(plain_model(), run.size[0], run.request.layer)
        self.read = self.vit.cls if run.request.facet == "cls" else self.vit.keys
        self.generator, self.noise = PlainGenerator(INVERSION_CHANNELS, NOISE_CHANNELS), run.noise
        self.generator.copy_weights(run.generator)
        with torch.no_grad():
            self.target = self.read(run.picture)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), run.settings.learning_rate)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.read(self.generator(self.noise)), self.target)
        loss.backward()
        self.optimizer.step()
        self.vit.model.zero_grad()
        return loss.detach()


def compare(size: int, pairs: int, facet: str, layer: int) -> dict[str, float]:
    settings = replace(inversion_preset("fast"), size=size, steps=10**9)
    picture = resize(load_pair()[0], (size, size))

    def begin(dtype: torch.dtype) -> Inversion:
        return Inversion(picture, Backbone.load(OFFLINE_BACKBONE, dtype=dtype), settings, layer, facet)

    plain = PlainInversion(begin(torch.float32))
    ours = {name: iter(begin(dtype)) for name, dtype in DTYPES.items()}
    times: dict[str, list[float]] = {name: [] for name in ("plain", *ours)}
    for index in range(pairs + 2):
        expected, took = timed(plain)
        taken = {"plain": took}
        for name, steps in ours.items():
            step, taken[name] = timed(lambda steps=steps: next(steps))
            if index == 0 and abs(step.total.item() / expected.item() - 1) > TOLERANCE[DTYPES[name]]:
                raise SystemExit(f"losses differ in {name}: {step.total.item():g} is not {expected.item():g}")
        if index >= 2:  # the first steps warm caches up
            for name, seconds in taken.items():
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        **{f"ratio_{name}": medians["plain"] / medians[name] for name in ours},
        **{f"{name}_steps_per_second": 1 / seconds for name, seconds in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="side of the picture in pixels")
    parser.add_argument("--pairs", type=int, default=9, help="timed steps of each kind")
    parser.add_argument("--facet", default="key", choices=("cls", "key"), help="the feature")
    parser.add_argument("--layer", type=int, default=-1, help="the block that it is read from, -1 the last")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    result = {"size": options.size, **compare(options.size, options.pairs, options.facet, options.layer)}
    result = {name: float(f"{value:.4g}") for name, value in result.items()}
    print(json.dumps(result) if options.json else "\n".join(f"{name:24} {value:g}" for name, value in result.items()))


if __name__ == "__main__":
    main()
