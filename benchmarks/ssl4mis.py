"""ACDC by the split of SSL4MIS, with nnU-Net's own 2-D plan on a GPU, in pieces that resume themselves.

    python benchmarks/ssl4mis.py --data .../shared/data --shrink FOLDER      # once, on any machine: about 50 MB
    python benchmarks/ssl4mis.py --data FOLDER --work WORK --minutes 9       # on the GPU, again until it says "done"
    python benchmarks/ssl4mis.py --report

`--shrink` crops the images to the middle 240 mm, resamples them to 1.5 mm in plane (labels and scribbles by nearest
neighbour) and rounds them to whole numbers. What it writes has the layout of the published data. The second command
prepares what is missing, then trains run after run. When its minutes are over, it stops the training, which goes on
from its last checkpoint the next time. Each finished run writes a JSON file into benchmarks/ssl4mis/, and `--report`
writes the table into benchmarks/README.md. All rows have the same number of iterations, and the final weights count.

The split: X. Luo, SSL4MIS, https://github.com/HiLab-git/SSL4MIS.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from accuracy import Row, Table, environment, predictions, prepare, run, run_name, spec_of, still_to_do
from accuracy_report import read_runs
from step_time import insert

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "ssl4mis"
SPACING_MM, WIDTH_MM = 1.5, 240.0  # of shrunken images, in plane
EPOCH = 250

TEST = (1, 7, 8, 11, 13, 22, 24, 33, 52, 59, 64, 65, 66, 68, 75, 80, 81, 83, 84, 93)
VALIDATION = (2, 19, 28, 30, 39, 45, 78, 82, 85, 87)
LABELLED = (38, 50, 99, 21, 49, 58, 100)  # the first 3, or all 7
OTHERS = tuple(n for n in range(1, 101) if n not in (*TEST, *VALIDATION, *LABELLED))
ROLES = {role: [f"patient{n:03d}" for n in numbers]
         for role, numbers in (("test", TEST), ("validation", VALIDATION), ("train", (*LABELLED, *OTHERS)))}

SCRIBBLES = Table("ACDC 2-D, the split of SSL4MIS, scribbles", "acdc", "scribbles", (20, 10, 70), 100 * EPOCH,
                  small=False, full=(3, 7), epoch=EPOCH)
TABLES = {"scribbles": SCRIBBLES, "unlabelled": replace(SCRIBBLES, style="none")}
# name: the table, and the row; in the order in which they are run
ROWS: dict[str, tuple[str, Row]] = {
    "full_only": ("scribbles", Row("fully annotated patients alone, nnU-Net", "nnUNetTrainer", "full")),
    "confkd": ("scribbles", Row("and scribbles, ConfKD")),
    "ignore_prior": ("scribbles", Row("and scribbles, the ignore label", "ConfKDTrainer_partialOnly")),
    "all": ("scribbles", Row("everything annotated, nnU-Net", "nnUNetTrainer", "all")),
    "unlabelled": ("unlabelled", Row("and unlabelled, ConfKD")),
}


def shrink(data: Path, target: Path) -> None:
    """Write smaller copies of ACDC and of its scribbles; see the head of this file."""
    training = sorted((data / "acdc" / "training").glob("patient*"))
    if not training:
        raise SystemExit(f"{data / 'acdc' / 'training'}: holds no folder patient001 or the like")
    for folder in training:
        copy = target / "acdc" / "training" / folder.name
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "Info.cfg", copy)
        for file in folder.glob(f"{folder.name}_frame*.nii.gz"):
            write_smaller(file, copy / file.name, label=file.name.endswith("_gt.nii.gz"))
    (target / "acdc_scribbles").mkdir(exist_ok=True)
    for file in (data / "acdc_scribbles").glob("*.nii.gz"):
        write_smaller(file, target / "acdc_scribbles" / file.name, label=True, outside=4)


def write_smaller(file: Path, target: Path, label: bool, outside: int = 0) -> None:
    """Crop and resample a volume in plane. outside: the value of what lies outside of the image."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ACDC's headers have two spacings; SimpleITK reads the right one
    image = sitk.ReadImage(str(file))
    size = np.array(image.GetSize())
    spacing = np.array([SPACING_MM, SPACING_MM, image.GetSpacing()[2]])
    voxels = np.array([round(WIDTH_MM / SPACING_MM)] * 2 + [size[2]])
    middle = image.TransformContinuousIndexToPhysicalPoint(((size - 1) / 2).tolist())
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = np.array(middle) - direction @ ((voxels - 1) / 2 * spacing)
    if not label:
        image = sitk.Cast(image, sitk.sitkFloat32)
    smaller = sitk.Resample(image, voxels.tolist(), sitk.Transform(), sitk.sitkNearestNeighbor if label else
                            sitk.sitkLinear, origin.tolist(), spacing.tolist(), image.GetDirection(), float(outside))
    sitk.WriteImage(sitk.Cast(smaller if label else sitk.Round(smaller), sitk.sitkUInt8 if label else sitk.sitkInt16),
                    str(target), useCompression=True)


# ---- runs -----------------------------------------------------------------------------------------------------------

def specs_of(args) -> list[tuple[str, dict]]:
    """(name of the table, run) of all runs, in their order."""
    specs = []
    for seed in args.seeds:
        for full in args.full:
            for name in args.rows:
                setting, row = ROWS[name]
                if row.labels == "all" and full != args.full[0]:
                    continue
                iterations = args.epochs * EPOCH if args.iterations is None else args.iterations
                table = replace(TABLES[setting], epoch=min(EPOCH, iterations), iterations=iterations)
                specs.append((setting, spec_of(table, name, 0 if row.labels == "all" else full, seed, args.device,
                                               iterations, "test", row)))
    return specs


def measured(trainer, roles: dict[str, list[str]], name: str) -> dict:
    """Dice, and HD95 in mm and in voxels, of the test cases: see :func:`accuracy.run`."""
    from nnunet_confkd.evaluation.metrics import measure_masks

    cases = {}
    for case, _, truth, labels, _, spacing in predictions(trainer, roles["test"], teacher=False):
        cases[case] = {"student": {}}
        for c in trainer.label_manager.foreground_labels:
            in_mm = measure_masks(truth == c, labels == c, spacing)
            in_voxels = measure_masks(truth == c, labels == c, (1.0, 1.0, 1.0))
            cases[case]["student"][str(c)] = {
                "dice": round(in_mm["Dice"], 4), "hd95_mm": round(in_mm["HD95_mm"], 3),
                "hd95_voxels": round(in_voxels["HD95_mm"], 3)}
    return {"cases": cases}


def train_until(args, deadline: float) -> bool:
    """Run what is missing until a moment; returns whether everything is done."""
    script = [sys.executable, __file__, "--data", str(args.data), "--output", str(args.output)]
    for setting in dict.fromkeys(ROWS[name][0] for name in args.rows):
        work = args.work / setting
        subprocess.run([*script, "--work", str(work), "--prepare", setting], check=True,
                       env=os.environ | environment(work, args.device))
    for setting, spec in specs_of(args):
        if not still_to_do([spec], args.output):
            continue
        work = args.work / setting
        child = subprocess.Popen([*script, "--work", str(work), "--run", json.dumps(spec)],
                                 env=os.environ | environment(work, args.device))
        try:
            if child.wait(max(1.0, deadline - time.time())):
                raise SystemExit(f"{run_name(spec)} failed; what it printed is above")
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
            print(f"{run_name(spec)}: stopped, goes on with the same command", flush=True)
            return False
    return True


def report(folder: Path) -> str:
    """One line for each row and number of fully annotated patients."""
    runs = read_runs(folder)
    lines = ["| row | fully annotated | Dice | of each class | HD95, mm | HD95, voxels | iterations | seeds | "
             "machine |", "|" + "---|" * 9]
    for name, (_, row) in ROWS.items():
        for full in sorted({key[1] for key in runs if key[0] == name}):
            found = [run for key, run in runs.items() if key[:2] == (name, full)]
            values = {metric: np.array([[[of[metric] for of in case["student"].values()] for case in
                                         run["cases"].values()] for run in found], float)
                      for metric in ("dice", "hd95_mm", "hd95_voxels")}
            of_class = np.nanmean(values["dice"], (0, 1))
            lines.append(
                f"| {row.title} | {full or 'all'} | {of_class.mean():.3f} | "
                + " / ".join(f"{value:.3f}" for value in of_class)
                + "".join(f" | {np.nanmean(np.nanmean(values[metric], (0, 1))):.2f}"
                          for metric in ("hd95_mm", "hd95_voxels"))
                + f" | {found[0]['spec']['iterations']} | {len(found)} | {found[0]['machine']} |")
    return "\n".join(lines) if runs else "Not run yet: no GPU was at hand."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that contains acdc/ and acdc_scribbles/")
    parser.add_argument("--shrink", type=Path, metavar="FOLDER", help="write the small copy there, and nothing else")
    parser.add_argument("--work", type=Path, help="a folder for data and trainings; used again after an interruption")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--full", nargs="+", type=int, choices=SCRIBBLES.full, default=[3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100, help=f"of {EPOCH} iterations")
    parser.add_argument("--iterations", type=int, help="in place of --epochs, for a trial")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this time")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--report", action="store_true", help="only write the table of what is there")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    for name in ("data", "shrink", "work", "output"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    if args.report:
        return insert(HERE / "README.md", "ssl4mis", report(args.output))
    if not args.data or not (args.shrink or args.work):
        parser.error("name --data, and --shrink or --work; or --report")
    if args.shrink:
        return shrink(args.data, args.shrink)
    if args.prepare:
        table = TABLES[args.prepare]
        scribbles = args.data / "acdc_scribbles" if table.style == "scribbles" else None
        return prepare(table, args.data / "acdc", scribbles, args.work, ROLES)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.run:
        return print(run(json.loads(args.run), args.work, args.output, measured=measured))
    if train_until(args, deadline):
        print("done\n" + report(args.output))


if __name__ == "__main__":
    main()
