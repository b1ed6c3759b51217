"""Show what each style of weak label looks like, and how many voxels it annotates.

The script writes docs/weak_labels.png and the table in docs/how-to/weaken.md. The pictures show MSD Hippocampus
(CC BY-SA 4.0).
ACDC's licence does not allow us to distribute pictures freely, so ACDC appears in the table only.

    python benchmarks/weak_labels.py --hippocampus .../hippocampus --acdc .../acdc --scribbles .../acdc_scribbles
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from nnunet_confkd.data.images import read  # noqa: E402
from nnunet_confkd.data.weak_labels import (
    STYLES,  # noqa: E402
    case_rng,  # noqa: E402
    weaken,  # noqa: E402
)

ROOT = Path(__file__).resolve().parent.parent
IGNORE, SEED = 9, 0
COLOURS = ("#3b6fb6", "#e08214", "#7fbf7b")  # background, anterior, posterior: told apart without red and green
MARK = "<!-- shares: written by benchmarks/weak_labels.py -->"
SETTINGS = {style: {} for style in STYLES} | {"points, 3-D": {"dimension": "3d"}, "erosion, 3-D": {"dimension": "3d"},
                                              "scribbles, half of the slices": {"fraction": 0.5}}


def weak(label: np.ndarray, case: str, name: str, spacing: tuple) -> np.ndarray:
    style = name.split(",")[0]
    return weaken(label, style, IGNORE, case_rng(case, style, SEED), spacing=spacing, **SETTINGS[name])


def shares(labels: dict[str, Path], classes: int) -> dict[str, dict]:
    """Of all voxels, and of the voxels of each class, the share that a style annotates."""
    full, kept = np.zeros(classes), {name: np.zeros(classes) for name in SETTINGS}
    for case, file in labels.items():
        picture = read(file)
        label = picture.voxels[0].astype(np.uint8)
        full += np.bincount(label.ravel(), minlength=classes)[:classes]
        for name in SETTINGS:
            weakened = weak(label, case, name, picture.geometry.spacing[::-1])
            kept[name] += np.bincount(weakened.ravel(), minlength=IGNORE + 1)[:classes]
    return {name: {"all": kept[name].sum() / full.sum(), "classes": (kept[name] / full).tolist()} for name in SETTINGS}


def expert_shares(scribbles: Path, acdc: Path, classes: int) -> dict:
    full, kept = np.zeros(classes), np.zeros(classes)
    for file in sorted(scribbles.glob("*_scribble.nii.gz")):
        case = file.name.removesuffix("_scribble.nii.gz")
        kept += np.bincount(read(file).voxels.astype(np.uint8).ravel(), minlength=classes)[:classes]
        mask = acdc / "training" / case.split("_")[0] / f"{case}_gt.nii.gz"
        full += np.bincount(read(mask).voxels.astype(np.uint8).ravel(), minlength=classes)[:classes]
    return {"all": kept.sum() / full.sum(), "classes": (kept / full).tolist()}


def draw(image_file: Path, label_file: Path, file: Path) -> None:
    picture, image = read(label_file), read(image_file).voxels[0]
    label = picture.voxels[0].astype(np.uint8)
    case = label_file.name.removesuffix(".nii.gz")
    middle = int(np.argmax((label == 1).sum((1, 2)).clip(max=60) + (label == 2).sum((1, 2)).clip(max=60)))
    figure, axes = plt.subplots(2, 4, figsize=(10, 7.6), layout="constrained")
    panels = {"full mask": label, **{name: weak(label, case, name, picture.geometry.spacing[::-1])
                                     for name in ("erosion", "points", "scribbles", "slices", "box", "none")}}
    panels["erosion, 3-D"] = weak(label, case, "erosion, 3-D", picture.geometry.spacing[::-1])
    for axis, (name, shown) in zip(axes.flat, panels.items()):
        axis.imshow(image[middle], cmap="gray")
        axis.imshow(np.ma.masked_equal(shown[middle], IGNORE), cmap=ListedColormap(COLOURS), vmin=0, vmax=2, alpha=0.6,
                    interpolation="nearest")
        elsewhere = ", not here" if name == "slices" and (shown[middle] == IGNORE).all() else ""
        axis.set_title(f"{name} ({(shown != IGNORE).mean():.1%}{elsewhere})", fontsize=11)
        axis.axis("off")
    figure.legend(
        handles=[Patch(color=c, label=n, alpha=0.6) for c, n in zip(COLOURS, ("background", "anterior", "posterior"))],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.suptitle(
        f"One slice of {case} in every style; in brackets the annotated share of the whole volume", fontsize=12
    )
    figure.savefig(file, dpi=90)
    plt.close(figure)


def table(result: dict) -> str:
    """Markdown; shares of all voxels and of those of each class, in percent."""
    lines = [
        "| annotated voxels, % of all (of each class) | Hippocampus: all | background | anterior | posterior | "
        "ACDC: all | background | RV | myocardium | LV |",
        "|" + "---|" * 10,
    ]
    for name in [*SETTINGS, "experts' scribbles"]:
        cells = []
        for dataset, classes in (("hippocampus", 3), ("acdc", 4)):
            share = result[dataset].get(name)
            cells += [f"{100 * v:.2g}" for v in (share["all"], *share["classes"])] if share else ["–"] * (classes + 1)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("hippocampus", "acdc", "scribbles"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=40, help="of each data set, the first by name")
    args = parser.parse_args()

    hippocampus = {f.name[:-7]: f for f in sorted((args.hippocampus / "labelsTr").glob("*.nii.gz"))[:args.cases]}
    acdc = {f.name[:-10]: f for f in sorted((args.acdc / "training").glob("patient*/*_gt.nii.gz"))[:args.cases]}
    result = {"seed": SEED, "cases": args.cases, "hippocampus": shares(hippocampus, 3), "acdc": shares(acdc, 4)}
    result["acdc"]["experts' scribbles"] = expert_shares(args.scribbles, args.acdc, 4)
    (ROOT / "benchmarks" / "weak_labels.json").write_text(json.dumps(result, indent=1) + "\n")

    case = list(hippocampus)[0]
    draw(args.hippocampus / "imagesTr" / f"{case}.nii.gz", hippocampus[case], ROOT / "docs" / "weak_labels.png")
    page = ROOT / "docs" / "how-to" / "weaken.md"
    before, _, after = page.read_text().partition(MARK)
    rest = after.split("\n\n", 2)[-1] if after.lstrip().startswith("|") else after.lstrip("\n")
    page.write_text(f"{before}{MARK}\n{table(result)}\n\n{rest}")
    print(table(result))


if __name__ == "__main__":
    main()
