"""How long does it take to draw the teacher's hints of a batch of large patches?

    python benchmarks/hint_drawing.py

A batch has one fully annotated patch, whose hints are simulated, and one partially annotated one, which is observed.
The organs are those of volumes.py. The annotations are scribbles through each organ, or its eroded mask, or points. The
sampler has seen some batches before. The watershed then spreads the hints of both patches. Times are processor times,
medians of the batches, because another process that takes the processor then does no harm. The table goes into
docs/explanation/performance.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import volumes
from scipy import ndimage
from step_time import ROOT, insert

from nnunet_confkd.data.watershed import spread
from nnunet_confkd.training.hint_patterns import KEPT
from nnunet_confkd.training.hints import HintSampler

ORGANS = (3, 25, 117)


def annotate(labels: np.ndarray, kind: str, ignore: int, rng: np.random.Generator) -> np.ndarray:
    """What an annotator leaves of full labels: everything else gets the label `ignore`."""
    result = np.full_like(labels, ignore)
    for label in np.unique(labels):
        mask = labels == label
        if kind == "eroded masks":
            mask = ndimage.binary_erosion(mask, iterations=3)
        voxels = np.argwhere(mask)
        if not len(voxels):
            continue
        if kind == "points":
            voxels = voxels[rng.integers(len(voxels), size=3)]
        elif kind == "scribbles":  # a thin line in one slice
            z, y, _ = voxels[rng.integers(len(voxels))]
            voxels = voxels[(voxels[:, 0] == z) & (abs(voxels[:, 1] - y) <= 1)]
        result[tuple(voxels.T)] = label
    return result


def measure(organs: int, kind: str, side: int, batches: int) -> dict:
    """Milliseconds of a batch, of the watershed, and of the check where voxels are annotated, which no sampler can do
    without."""
    rng, ignore = np.random.default_rng(0), organs + 1
    patches = [volumes.organs((side,) * 3, organs, seed)[0].astype(np.int16) for seed in range(4)]
    sampler, spent, bare, flooded = HintSampler(ignore), [], [], []
    inside = torch.ones(2, 1, side, side, side, dtype=torch.bool)
    annotated = [annotate(patch, kind, ignore, rng) for patch in patches[2:]]
    images = [torch.from_numpy(volumes.ct(patch.astype(np.uint8)).astype(np.float32)) for patch in patches]
    for turn in range(KEPT + batches):
        chosen = turn % 2, 2 + turn % 2
        data = torch.stack([images[i] for i in chosen])[:, None]
        target = torch.from_numpy(np.stack([patches[chosen[0]], annotated[chosen[1] - 2]]))[:, None]
        start = time.process_time()
        ((target != ignore) & inside).clone()
        between = time.process_time()
        mask = sampler.draw(data, target, inside, 1, rng)
        if turn >= KEPT:
            spent.append(time.process_time() - between)
            bare.append(between - start)
            start = time.process_time()
            for image, labels, hints in zip(data.numpy(), target[:, 0].numpy(), mask[:, 0].numpy()):
                spread(image, labels, hints)
            flooded.append(time.process_time() - start)
    return {"organs": organs, "kind": kind, "side": side, "batches": batches,
            **{name: round(1000 * statistics.median(times), 2)
               for name, times in (("ms", spent), ("watershed_ms", flooded), ("mask_ms", bare))}}


def table_of(runs: list[dict]) -> str:
    lines = ["| organs | annotations | hints of a batch of two patches | spreading them by a watershed | "
             "finding the annotated voxels |", "|" + "---|" * 5]
    return "\n".join(lines + [f"| {run['organs']} | {run['kind']} | {run['ms']:.1f} ms | "
                              f"{run['watershed_ms']:.1f} ms | {run['mask_ms']:.1f} ms |" for run in runs])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128, help="of a patch, voxels")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = [measure(organs, kind, args.side, args.batches) for kind in ("points", "scribbles", "eroded masks")
            for organs in ORGANS]
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    (args.output or ROOT / "benchmarks" / "hint_drawing.json").write_text(
        json.dumps({"machine": machine, "runs": runs}, indent=1))
    if not args.output:
        insert(ROOT / "docs" / "explanation" / "performance.md", "hint drawing",
               f"{machine}; patches of {args.side} x {args.side} x {args.side} voxels.\n\n{table_of(runs)}")
    print(table_of(runs))


if __name__ == "__main__":
    main()
