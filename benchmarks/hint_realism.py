"""Do simulated hints look like real annotations?

    python benchmarks/hint_realism.py --data .../shared/data

For each kind of weak label, on real data in 2-D and 3-D, the training loader draws batches in which half of the
images are fully annotated and half partially. The hints of both halves are compared, class by class: how often a
class has hints, how many voxels they have, how far the nearest of them and how far all of them lie from the border of
the class, how far they lie from the centre of the patch, and how many lie in the padding. The distances from the border
need the ground truth of the partially annotated images. The training never sees it.

Writes hint_realism.json beside this file, and the table into docs/explanation/hints.md.
"""
from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage

from nnunet_confkd.data.images import quiet, read
from nnunet_confkd.data.resampling import keep_annotations
from nnunet_confkd.data.supervision import FULL, PARTIAL
from nnunet_confkd.data.weak_labels import case_rng, weaken
from nnunet_confkd.training.batches import StratifiedLoader, label_padding
from nnunet_confkd.training.hints import HintSampler

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path(__file__).with_suffix(".json")
STYLES = {
    "erosion": {"style": "erosion"}, "erosion, no background": {"style": "erosion", "background": False},
    "points": {"style": "points"}, "scribbles": {"style": "scribbles"}, "slices": {"style": "slices"}}
EXPERT = "expert scribbles"
SEEDS, WARM_UP = (0, 1, 2), 4


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        spacing: Voxel spacing in mm that the slices are resampled to; None keeps the published one.
        patch: Patch size of the 3-D network; the 2-D network uses its last two axes.
    """
    classes: tuple[str, ...]
    spacing: tuple[float, float, float] | None
    patch: tuple[int, int, int]
    anisotropic: bool


SOURCES = {"ACDC": Source(("background", "RV", "myocardium", "LV"), (10.0, 3.0, 3.0), (10, 64, 64), True),
           "Hippocampus": Source(("background", "anterior", "posterior"), None, (40, 56, 40), False)}


# ---- data -----------------------------------------------------------------------------------------------------------

def load(name: str, data: Path, patients: int) -> dict[str, tuple]:
    """Read one case of each patient.

    Returns:
        {case: (image, ground truth, spacing in mm, expert scribble or None)}; the arrays are `(z, y, x)`.
    """
    found = {}
    if name == "ACDC":
        files = [
            sorted(folder.glob("*_gt.nii.gz"))[0]
            for folder in sorted((data / "acdc" / "training").glob("patient*"))[:patients]
        ]
    else:
        files = sorted((data / "hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[:patients]
    with quiet():
        for file in files:
            case = file.name.removesuffix(".nii.gz").removesuffix("_gt")
            picture = read(file)
            scribble = data / "acdc_scribbles" / f"{case}_scribble.nii.gz"
            strokes = read(scribble).voxels[0].astype(np.int16) if name == "ACDC" and scribble.is_file() else None
            image = read(
                file.with_name(f"{case}.nii.gz") if name == "ACDC" else data / "hippocampus" / "imagesTr" / file.name
            ).voxels[0]
            image = (image - image.mean()) / image.std()  # as nnU-Net's ZScoreNormalization
            found[case] = (
                image.astype(np.float32),
                picture.voxels[0].astype(np.int16),
                picture.geometry.spacing[::-1],
                strokes,
            )
    return found


def resampled(label: np.ndarray, spacing, target) -> np.ndarray:
    """Nearest neighbour, voxel edges aligned. The slices stay."""
    shape = [label.shape[0], *(max(1, round(n * s / t)) for n, s, t in zip(label.shape[1:], spacing[1:], target[1:]))]
    index = [np.floor((np.arange(m) + 0.5) * n / m).astype(int) for n, m in zip(label.shape, shape)]
    return label[np.ix_(*index)]


class Cases:
    """A data set in memory as nnU-Net's loader wants it. The ground truth travels as a cascade's previous stage."""

    def __init__(
        self, volumes: dict, kinds: dict[str, str], ignore_label: int, style: str, dimension: str, target_spacing
    ):
        self.identifiers, self.cases = sorted(volumes), {}
        for case, (image, truth, spacing, strokes) in volumes.items():
            label = truth
            if kinds[case] == PARTIAL and style == EXPERT:
                label = strokes
            elif kinds[case] == PARTIAL:
                options = STYLES[style]
                options = (
                    options
                    if style == "slices"
                    else {**options, "dimension": dimension if options["style"] != "scribbles" else "2d"}
                )
                label = weaken(
                    truth, rng=case_rng(case, style, 0), ignore_label=ignore_label, spacing=spacing, **options
                )
            if target_spacing is not None:
                image, truth, before = (
                    resampled(image, spacing, target_spacing),
                    resampled(truth, spacing, target_spacing),
                    label,
                )
                label = keep_annotations(before, resampled(before, spacing, target_spacing), ignore_label)
            where = {c: _sampled(np.argwhere(label[None] == c)) for c in range(1, ignore_label)}
            where[(-1, *range(ignore_label))] = _sampled(np.argwhere(label[None] != ignore_label))
            self.cases[case] = image[None], label[None], truth, {"class_locations": where}

    def load_case(self, case):
        return self.cases[case]


def _sampled(voxels: np.ndarray, number: int = 10_000) -> np.ndarray:
    return (
        voxels if len(voxels) <= number else voxels[np.random.default_rng(0).choice(len(voxels), number, replace=False)]
    )


def loader_of(name: str, style: str, dimension: str, volumes: dict, batch_size: int = 8) -> StratifiedLoader:
    source = SOURCES[name]
    ignore = len(source.classes)
    cases = sorted(volumes)
    kinds = {case: FULL if i % 2 else PARTIAL for i, case in enumerate(cases)}
    labels = LabelManager({name: i for i, name in enumerate((*source.classes, "ignore"))}, None)
    patch = source.patch if dimension == "3d" else source.patch[1:]
    # nnU-Net rotates 2-D and anisotropic 3-D patches in the plane, and all others by small angles about all axes
    flat = dimension == "2d" or source.anisotropic
    angle = np.pi if flat else np.pi / 6
    margin = 1.45 if flat else 1.25
    initial = [size if dimension == "3d" and flat and i == 0 else round(size * margin) for i, size in enumerate(patch)]
    transforms = nnUNetTrainer.get_training_transforms(
        np.array(patch), (-angle, angle), None, tuple(range(len(patch))), dimension == "3d" and flat, is_cascaded=False,
        foreground_labels=labels.foreground_labels, ignore_label=ignore)
    label_padding(transforms, ignore)
    return StratifiedLoader(
        Cases(volumes, kinds, ignore, style, dimension, source.spacing),
        batch_size,
        initial,
        patch,
        labels,
        kinds=kinds,
        full_share=0.5,
        oversample_foreground_percent=0.33,
        transforms=transforms,
    )


# ---- measures -------------------------------------------------------------------------------------------------------

def measure(hints: np.ndarray, truth: np.ndarray, inside: np.ndarray, label: int) -> dict[str, float] | None:
    """What is compared, of one class in one image `(*spatial)`; None where the image does not hold the class."""
    of_class = (truth == label) & inside
    if not of_class.any():
        return None
    shown = hints & (truth == label)
    number = int(shown.sum())
    if not number:
        return {"shown": 0.0}
    # Where the patch ends the class may go on. A class without a border has no distances.
    from_border = ndimage.distance_transform_cdt(np.pad(of_class, 1, mode="edge"), "chessboard")
    from_border = from_border[(slice(1, -1),) * truth.ndim][shown]
    distances = {} if of_class.all() else {"nearest": float(from_border.min()), "depth": float(from_border.mean())}
    half = (np.array(truth.shape) - 1) / 2
    distance = np.abs((np.argwhere(shown) - half) / half).mean()
    return {
        "shown": 1.0,
        "voxels": float(number),
        **distances,
        "off centre": float(distance),
        "in padding": float((shown & ~inside).sum() / number),
    }


def compare(name: str, style: str, dimension: str, volumes: dict, batches: int) -> dict:
    """Compare real and simulated hints over many batches, a third of them with each of three seeds.

    The sampler keeps the first annotations that it sees for a while, so that one seed says little.

    Returns:
        {class: {"real" | "simulated": {measure: mean over images}}}. "voxels" is a geometric mean, and "images" is
        the number of images that contain the class.
    """
    classes = SOURCES[name].classes
    found: dict = {c: {"real": [], "simulated": []} for c in classes}
    for seed in SEEDS:
        _compare(loader_of(name, style, dimension, volumes), classes, WARM_UP + batches // len(SEEDS), seed, found)
    return {c: {which: _means(rows) for which, rows in of.items()} for c, of in found.items()}


def _compare(loader: StratifiedLoader, classes, batches: int, seed: int, found: dict) -> None:
    """Measure the hints of a seed's batches, and add the measures to `found`."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    sampler, rng = HintSampler(len(classes), no_hints=0), np.random.default_rng(seed)
    for number in range(batches):
        batch = next(loader)
        target, truth = batch["target"][:, :1], batch["target"][:, 1].numpy()
        mask = sampler.draw(batch["data"], target, batch["inside"], batch["num_full"], rng)[:, 0].numpy()
        inside = batch["inside"][:, 0].numpy()
        if number < WARM_UP:
            continue  # the sampler needs to have seen something
        for i in range(len(mask)):
            for label, of_class in enumerate(classes):
                if (measured := measure(mask[i], truth[i], inside[i], label)) is not None:
                    found[of_class]["simulated" if i < batch["num_full"] else "real"].append(measured)


def geometric_mean(values: list[float]) -> float:
    """Numbers of voxels range from one to thousands: the mean tells of the largest alone, and the median jumps."""
    return float(np.exp(np.mean(np.log(values))))


def _means(rows: list[dict]) -> dict[str, float]:
    keys = ("shown", "voxels", "nearest", "depth", "off centre", "in padding")
    means = {key: [row[key] for row in rows if key in row] for key in keys}
    return {"images": len(rows)} | {
        key: round(float((geometric_mean if key == "voxels" else np.mean)(values)), 4) if values else None
        for key, values in means.items()
    }


def cells(found: dict) -> list[list[str]]:
    """A row for each class: real / simulated."""
    rows = []
    for of_class, of in found.items():
        row = [of_class]
        for key, form in (
            ("shown", "{:.0%}"),
            ("voxels", "{:.0f}"),
            ("nearest", "{:.1f}"),
            ("depth", "{:.1f}"),
            ("off centre", "{:.2f}"),
            ("in padding", "{:.0%}"),
        ):
            row.append(
                " / ".join(
                    "-" if of[which][key] is None else form.format(of[which][key]) for which in ("real", "simulated")
                )
            )
        rows.append(row)
    return rows


def write_table(results: dict) -> None:
    from step_time import insert

    rows = [
        "| data, network, annotation | class | has hints | voxels | nearest | depth | off centre | in padding |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        rows += ["| " + " | ".join([name if i == 0 else "", *row]) + " |" for i, row in enumerate(cells(found))]
    insert(ROOT / "docs" / "explanation" / "hints.md", "hint realism", "\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that contains acdc/, acdc_scribbles/ and hippocampus/"
    )
    parser.add_argument("--batches", type=int, default=120, help="batches of 8 images, 2-D; a fourth of them in 3-D")
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--only", nargs="+", help="styles")
    parser.add_argument("--dimension", nargs="+", default=["2d", "3d"])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in SOURCES:
        volumes = load(name, args.data, args.patients)
        for dimension in args.dimension:
            for style in [*STYLES, *([EXPERT] if name == "ACDC" else [])]:
                if args.only and style not in args.only:
                    continue
                batches = args.batches if dimension == "2d" else max(8, args.batches // 4)
                found = compare(name, style, dimension, volumes, batches)
                results[f"{name}, {dimension}, {style}"] = found
                print(
                    f"\n{name}, {dimension}, {style}: shown, voxels, nearest, depth, off centre, in padding "
                    "(real / simulated)",
                    flush=True,
                )
                for row in cells(found):
                    print("  " + row[0].ljust(12) + "".join(cell.rjust(16) for cell in row[1:]), flush=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    if args.output == OUTPUT:
        write_table(results)


if __name__ == "__main__":
    main()
