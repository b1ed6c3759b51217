"""How many annotated voxels survive nnU-Net's resampling of labels, and that of `confkd plan`?

The full masks of MSD Hippocampus (1 mm) are turned into weak labels and resampled to grids of scale 0.9, 0.8, 0.5 and
2 in all three axes. An annotated voxel survives if the voxel of the new grid that contains its centre has its class.
The script writes the table in docs/explanation/data_performance.md.

    python benchmarks/resampling.py --hippocampus .../hippocampus
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

from nnunet_confkd.data.images import read
from nnunet_confkd.data.resampling import keep_annotations
from nnunet_confkd.data.weak_labels import case_rng, weaken

ROOT = Path(__file__).resolve().parent.parent
IGNORE, SEED, SCALES = 3, 0, (0.9, 0.8, 0.5, 2.0)
STYLES = {
    "single points": ("points", {"radius": 0}),
    "points (radius 1)": ("points", {"radius": 1}),
    "scribbles": ("scribbles", {}),
    "erosion": ("erosion", {}),
    "slices": ("slices", {}),
}
MARK = "<!-- resampling: written by benchmarks/resampling.py -->"


def survive(files: list[Path], style: str, options: dict, scale: float) -> dict[str, float]:
    annotated, kept, lost = 0, {"stock": 0, "ours": 0}, {"stock": 0, "ours": 0}
    for file in files:
        label = read(file).voxels[0].astype(np.uint8)
        weak = weaken(label, style, IGNORE, case_rng(file.name, style, SEED), **options).astype(np.float32)[None]
        spacing, target = [1.0] * 3, [1 / scale] * 3
        shape = compute_new_shape(weak.shape[1:], spacing, target)
        stock = resample_data_or_seg_to_shape(weak, shape, spacing, target, is_seg=True, order=1, order_z=0)
        voxels = np.argwhere(weak[0] != IGNORE)
        values = weak[0][tuple(voxels.T)]
        places = tuple(((2 * voxels + 1) * shape // (2 * np.array(label.shape))).T)
        annotated += len(values)
        for name, result in (("stock", stock), ("ours", keep_annotations(weak, stock, IGNORE))):
            kept[name] += int((result[0][places] == values).sum())
            lost[name] += sum(bool((values == c).any() and not (result == c).any()) for c in range(IGNORE))
    return {"annotated": annotated, **{name: kept[name] / annotated for name in kept},
            **{f"classes_lost_{name}": lost[name] for name in lost}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hippocampus", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=60)
    args = parser.parse_args()

    files = sorted((args.hippocampus / "labelsTr").glob("*.nii.gz"))[:args.cases]
    result = {name: {str(scale): survive(files, *style, scale) for scale in SCALES} for name, style in STYLES.items()}
    (ROOT / "benchmarks" / "resampling.json").write_text(
        json.dumps({"seed": SEED, "cases": len(files), "result": result}, indent=1) + "\n"
    )

    lines = ["| survive, % (nnU-Net / `confkd plan`) | " + " | ".join(f"scale {scale:g}" for scale in SCALES) + " |",
             "|" + "---|" * (1 + len(SCALES))]
    lines += [
        f"| {name} | " + " | ".join(f"{100 * r['stock']:.3g} / {100 * r['ours']:.4g}" for r in of_style.values()) + " |"
        for name, of_style in result.items()
    ]
    page = ROOT / "docs" / "explanation" / "data_performance.md"
    before, _, after = page.read_text().partition(MARK)
    page.write_text(before + MARK + "\n" + "\n".join(lines) + "\n\n" + after.split("\n\n", 1)[-1])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
