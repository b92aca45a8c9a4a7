"""How near, how soon: presets side by side on pairs of pictures, against the paper's recipe at equal pictures.

    python benchmarks/presets.py PAIRS -o OUT --seeds 0 1 --run plain draft standard

PAIRS holds a folder for each pair with `structure.*` and `appearance.*` (a `paper.*` beside them is shown too). Each
run leaves its picture and its distances at every few steps in OUT/<preset>/; runs whose file is there are not repeated,
so that a long table can be made in several sittings. The table and a contact sheet per preset come from what is there.

`plain` is the paper's recipe for 1,000 steps. The distances, all at the training size and 0 for "the same":
structure and appearance as `splice measure` gives them; colour, the mean CIE76 difference between a patch's colour and
the mean colour of its matches in B. Those matches come from the deepest keys at 16 patches, neither from [CLS] nor from
the finer mixture that the instant transfer uses.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from skimage.color import rgb2lab

from splice_engine import (
    OFFLINE_BACKBONE,
    Backbone,
    Correspondence,
    InstantTransfer,
    Request,
    Transfer,
    load_picture,
    measure,
    preset,
    save_picture,
)
from splice_engine.analysis.figures import sheet
from splice_engine.images import from_pil, resize, short_side_size, sides
from splice_engine.vit.devices import pick_device, pick_dtype

DISTANCES = ("structure", "appearance", "colour")
PLAIN_STEPS = 1000


class Distances:
    """Measures outputs for one pair, in fp32 whatever the run's own precision."""

    def __init__(self, structure, appearance, backbone):
        self.structure, self.appearance, self.backbone = structure, appearance, backbone
        match = Correspondence.between(structure, appearance, backbone, 16, [Request(-1, "key")])
        self.grid = match.source_grid
        self.colours = match.warp(lab(resize(appearance, match.target_grid)).to(backbone.device), temperature=0.05)

    def __call__(self, output):
        measured = measure(self.structure, self.appearance, output, self.backbone)
        colours = lab(resize(output, self.grid)).to(self.colours)
        return {
            "structure": measured.structure_distance,
            "appearance": measured.appearance_distance,
            "colour": F.pairwise_distance(colours[0].flatten(1).T, self.colours[0].flatten(1).T).mean().item(),
        }


def lab(picture):
    """CIE L*a*b* of `[1, 3, H, W]` in 0..1 sRGB."""
    return torch.from_numpy(rgb2lab(picture[0].permute(1, 2, 0).cpu().numpy())).permute(2, 0, 1)[None].float()


def run(name, pair, seed, options, backbone, measuring):
    """Trains once; returns the full-size picture and a list of distances, one for every few steps."""
    structure, appearance = pair
    distances = Distances(structure, appearance, measuring)
    at_size = short_side_size(*sides(structure), options.size)
    started = time.perf_counter()
    if name == "instant":
        instant = InstantTransfer.between(structure, appearance, backbone)
        seconds = time.perf_counter() - started
        return instant.image(), [{"step": 0, "seconds": seconds, **distances(resize(instant.image(), at_size))}]
    plain = {"steps": PLAIN_STEPS} if name == "plain" else {}
    settings = preset("paper" if name == "plain" else name, size=options.size, seed=seed, **plain)
    transfer = Transfer(structure, appearance, backbone, settings)
    every = 100 if name == "plain" else 20
    curve, seconds = [], time.perf_counter() - started
    steps = iter(transfer)
    while len(transfer):
        started = time.perf_counter()
        next(steps)
        seconds += time.perf_counter() - started
        if transfer.step % every == 0 or not len(transfer):
            curve.append({"step": transfer.step, "seconds": seconds, **distances(transfer.image(options.size))})
    return transfer.image(), curve


def table(rows, names, pairs, seeds):
    """Lines of the last distances, and of the first step at which a run had reached plain's on all three."""
    yield f"{'pair':10} seed {'preset':10} steps seconds  structure appearance colour  at plain's"
    for pair in pairs:
        for seed in seeds:
            goal = rows.get(("plain", pair, seed))
            for name in names:
                curve = rows.get((name, pair, seed))
                if not curve:
                    continue
                last = curve[-1]
                reached = "-"
                if goal and name != "plain":
                    there = [row for row in curve if all(row[d] <= goal[-1][d] for d in DISTANCES)]
                    each = [next((str(r["step"]) for r in curve if r[d] <= goal[-1][d]), "-") for d in DISTANCES]
                    reached = f"{there[0]['step'] if there else '-'} ({' '.join(each)})"
                yield (
                    f"{pair:10} {seed:4} {name:10} {last['step']:5} {last['seconds']:7.1f} {last['structure']:10.5f}"
                    f" {last['appearance']:10.4f} {last['colour']:6.2f}  {reached}"
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--run", nargs="*", default=["plain", "instant", "draft", "standard"], metavar="PRESET")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="*", help="pairs by name (default: all)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--backbone", default=OFFLINE_BACKBONE)
    options = parser.parse_args()

    device = pick_device("auto")
    backbone = Backbone.load(options.backbone, device, pick_dtype("auto", device))
    measuring = Backbone.load(options.backbone, device)
    pairs = [folder for folder in sorted(options.pairs.iterdir()) if next(folder.glob("structure.*"), None)]
    pairs = [folder for folder in pairs if not options.only or folder.name in options.only]
    rows = {}
    for seed in options.seeds:
        for name in options.run:
            for folder in pairs:
                if name == "instant" and seed != options.seeds[0]:
                    continue  # it has no seed
                stem = options.output / name / f"{folder.name}-{seed}"
                record, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
                if not record.exists():
                    stem.parent.mkdir(parents=True, exist_ok=True)
                    pair = [load_picture(next(folder.glob(f"{kind}.*"))) for kind in ("structure", "appearance")]
                    output, curve = run(name, pair, seed, options, backbone, measuring)
                    save_picture(output, picture, overwrite=True)
                    record.write_text(json.dumps(curve))
                rows[name, folder.name, seed] = json.loads(record.read_text())
    text = "\n".join(table(rows, options.run, [folder.name for folder in pairs], options.seeds))
    print(text)
    for name in options.run:
        strips = []
        for folder in pairs:
            shown = {kind: next(folder.glob(f"{kind}.*"), None) for kind in ("structure", "appearance")}
            shown.update(
                {f"{name}, seed {seed}": options.output / name / f"{folder.name}-{seed}.png" for seed in options.seeds}
            )
            shown["the paper's"] = next(folder.glob("paper.*"), None)
            strips.append({label: load_picture(path) for label, path in shown.items() if path and path.exists()})
        save_picture(from_pil(sheet(strips)), options.output / f"{name}.png", overwrite=True)


if __name__ == "__main__":
    main()
