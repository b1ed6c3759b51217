"""ACDC by the split of SSL4MIS, with nnU-Net's own 2-D network on a GPU, in pieces that resume themselves.

    python benchmarks/ssl4mis.py --data .../shared/data --shrink FOLDER      # once, on any machine: about 50 MB
    python benchmarks/ssl4mis.py --data FOLDER --work WORK --minutes 9       # on the GPU, again until it says "done"
    python benchmarks/ssl4mis.py --report

`--shrink` crops the images to the middle 240 mm, resamples them to 1.5 mm in plane (labels and scribbles by nearest
neighbour) and rounds them to whole numbers. What it writes has the layout of the published data. The second command
prepares what is missing, then trains `--processes` runs at a time. When its minutes are over, it stops the trainings,
which go on from their last checkpoints the next time. Each finished run writes a JSON file into benchmarks/ssl4mis/,
and `--report` writes the table into benchmarks/README.md. The final weights count. Post-processing is chosen on the
validation patients. A row "at equal cost" has as many iterations fewer as its step takes longer (`--cost`).

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from accuracy import Row, Table, environment, predictions, prepare, run, run_name, spec_of, still_to_do
from accuracy_report import gain_text, paired_gain, read_runs
from five_folds import choose_post_processing, measure_both
from step_time import insert

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "ssl4mis"
SPACING_MM, WIDTH_MM = 1.5, 240.0  # of shrunken images, in plane
EPOCH = 250

TEST = (1, 7, 8, 11, 13, 22, 24, 33, 52, 59, 64, 65, 66, 68, 75, 80, 81, 83, 84, 93)
VALIDATION = (2, 19, 28, 30, 39, 45, 78, 82, 85, 87)
LEAST = 3  # fully annotated patients
LABELLED = (38, 50, 99, 21, 49, 58, 100)  # the first 3, or all 7
OTHERS = tuple(n for n in range(1, 101) if n not in (*TEST, *VALIDATION, *LABELLED))
ROLES = {role: [f"patient{n:03d}" for n in numbers]
         for role, numbers in (("test", TEST), ("validation", VALIDATION), ("train", (*LABELLED, *OTHERS)))}

# nnU-Net's own plan has batches of 126; the papers on this split have 24
SCRIBBLES = Table("ACDC 2-D, the split of SSL4MIS, scribbles", "acdc", "scribbles", (20, 10, 70), 100 * EPOCH, 24,
                  small=False, full=(3, 7), epoch=EPOCH)
TABLES = {"scribbles": SCRIBBLES, "unlabelled": replace(SCRIBBLES, style="none")}
BASELINE = "ConfKDTrainer_partialOnly"
# name: the table, the row, and the row that it is compared with; in the order in which they are run
ROWS: dict[str, tuple[str, Row, str | None]] = {
    "full_only": ("scribbles", Row("fully annotated patients alone, nnU-Net", "nnUNetTrainer", "full"), None),
    "ignore": ("scribbles", Row("and scribbles, the ignore label", BASELINE), "full_only"),
    "confkd_cost": ("scribbles", Row("and scribbles, ConfKD, at equal cost"), "ignore"),
    "all": ("scribbles", Row("everything annotated, nnU-Net", "nnUNetTrainer", "all"), "ignore"),
    "full_cutmix": ("scribbles", Row("fully annotated patients alone, with CutMix", BASELINE, "full",
                                     settings={"cutmix": 0.5}), "full_only"),
    "labels_itself": ("unlabelled", Row("and unlabelled, ConfKD, which labels them itself",
                                        settings={"complete_at": 0.4}), "full_cutmix"),
    "ignore_prior": ("scribbles", Row("and scribbles, the ignore label with the class-prior correction", BASELINE,
                                      settings={"prior_correction": 1.0}), "ignore"),
    "confkd": ("scribbles", Row("and scribbles, ConfKD"), "ignore"),
}
USUAL = ("full_only", "ignore", "confkd_cost", "all", "full_cutmix", "labels_itself")


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
                setting, row, _ = ROWS[name]
                if row.labels == "all" and full != args.full[0]:
                    continue
                row = replace(row, steps=1 / args.cost if name.endswith("_cost") else 1.0)
                epoch = min(EPOCH, args.iterations)
                table = replace(TABLES[setting], epoch=epoch, iterations=args.iterations, full=tuple(args.full))
                iterations = round(args.iterations * row.steps / epoch) * epoch
                specs.append((setting, spec_of(table, name, 0 if row.labels == "all" else full, seed, args.device,
                                               iterations, "test", row)))
    return specs


def measured(trainer, roles: dict[str, list[str]], name: str) -> dict:
    """Measure the test cases before and after post-processing: see :func:`five_folds.measured`. HD95 also in voxels."""
    from nnunet_confkd.evaluation.metrics import measure_masks

    classes = trainer.label_manager.foreground_labels
    chosen = choose_post_processing(predictions(trainer, roles["validation"], teacher=False), classes)
    cases = {}
    for case, _, truth, labels, _, spacing in predictions(trainer, roles["test"], teacher=False):
        found = measure_both(truth, labels, spacing, classes, *chosen)
        for c in classes:
            in_voxels = measure_masks(truth == c, labels == c, (1.0, 1.0, 1.0))
            found[str(c)]["hd95_voxels"] = round(in_voxels["HD95_mm"], 3)
        cases[case] = {"student": found}
    kept = [int(c) for c, keep in zip(classes, chosen[1]) if keep]
    return {"post_processing": {"foreground": chosen[0], "classes": kept}, "cases": cases,
            "batch_size": trainer.configuration_manager.batch_size,
            "patch_size": list(trainer.configuration_manager.patch_size)}


def train_until(args, deadline: float) -> bool:
    """Run what is missing until a moment, some runs at a time; returns whether everything is done."""
    script = [sys.executable, __file__, "--data", str(args.data), "--output", str(args.output)]
    variables = os.environ | ({} if args.device == "cpu" else {"nnUNet_n_proc_DA": str(args.workers)})

    def train(job: tuple[str, dict]) -> bool:
        setting, spec = job
        if time.time() > deadline:
            return False
        work = args.work / setting
        (args.work / "logs").mkdir(exist_ok=True)
        with open(args.work / "logs" / f"{run_name(spec)}.txt", "a") as log:
            child = subprocess.Popen([*script, "--work", str(work), "--run", json.dumps(spec)], stdout=log,
                                     stderr=log, env=variables | environment(work, args.device))
            try:
                if child.wait(max(1.0, deadline - time.time())):
                    print(f"FAILED: {run_name(spec)}; see {log.name}", flush=True)
                    return False
            except subprocess.TimeoutExpired:
                child.terminate()
                child.wait()
                print(f"{run_name(spec)}: stopped, goes on with the same command", flush=True)
                return False
        print(f"{run_name(spec)}: done", flush=True)
        return True

    def prepared(setting: str) -> None:
        work = args.work / setting
        subprocess.run([*script, "--work", str(work), "--full", *map(str, args.full), "--prepare", setting],
                       check=True, env=variables | environment(work, args.device)
                       | {"nnUNet_def_n_proc": str(os.cpu_count())})

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(prepared, dict.fromkeys(ROWS[name][0] for name in args.rows)))
        return all(list(pool.map(train, [job for job in specs_of(args) if still_to_do([job[1]], args.output)])))


def report(folder: Path) -> str:
    """One line for each row and number of fully annotated patients, and gains in the same seeds."""
    runs = read_runs(folder)

    def of_row(name: str, full: int) -> dict[int, dict]:
        full = 0 if ROWS[name][1].labels == "all" else full
        return {seed: run for (row, number, seed), run in runs.items() if (row, number) == (name, full)}

    def values(run: dict, metric: str) -> np.ndarray:
        return np.array([[of[metric] for of in case["student"].values()] for case in run["cases"].values()], float)

    lines = ["| row | fully annotated | Dice raw | Dice after | of each class, after | HD95 raw, mm | HD95 after, mm | "
             "HD95 raw, voxels | gain raw | gain after | over | iterations | runs |", "|" + "---|" * 13]
    for name, (_, row, rival) in ROWS.items():
        for full in sorted({key[1] for key in runs if key[0] == name}):
            found = of_row(name, full)
            means = {metric: np.mean([np.nanmean(np.nanmean(values(run, metric), 0)) for run in found.values()])
                     for metric in ("dice", "dice_pp", "hd95_mm", "hd95_mm_pp", "hd95_voxels")}
            of_class = np.nanmean([values(run, "dice_pp") for run in found.values()], (0, 1))
            other = of_row(rival, full or LEAST) if rival else {}
            iterations = next(iter(found.values()))["spec"]["iterations"]
            patients = [case.split("_frame")[0] for case in next(iter(found.values()))["cases"]]
            gains = [gain_text(paired_gain(*({seed: values(run, metric) for seed, run in of.items()}
                                             for of in (found, other)), patients)) if other.keys() & found.keys()
                     else "" for metric in ("dice", "dice_pp")]
            lines.append(
                f"| {row.title} (`{name}`) | {full or 'all'} | {means['dice']:.3f} | {means['dice_pp']:.3f} | "
                + " / ".join(f"{value:.3f}" for value in of_class)
                + f" | {means['hd95_mm']:.1f} | {means['hd95_mm_pp']:.1f} | {means['hd95_voxels']:.1f} | {gains[0]} | "
                f"{gains[1]} | {f'`{rival}`' if any(gains) else ''} | {iterations} | {len(found)} |")
    if not runs:
        return "Not run yet: no GPU was at hand."
    first = next(iter(runs.values()))
    return (f"{first['machine']}; batches of {first['batch_size']} patches of "
            f"{' x '.join(map(str, first['patch_size']))} pixels.\n\n" + "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that contains acdc/ and acdc_scribbles/")
    parser.add_argument("--shrink", type=Path, metavar="FOLDER", help="write the small copy there, and nothing else")
    parser.add_argument("--work", type=Path, help="a folder for data and trainings; used again after an interruption")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(USUAL))
    parser.add_argument("--full", nargs="+", type=int, choices=SCRIBBLES.full, default=[LEAST])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=SCRIBBLES.iterations, help=f"in epochs of {EPOCH}")
    parser.add_argument("--cost", type=float, default=1.17,
                        help="a step of ConfKD, in steps of nnU-Net, as step_time.py --device cuda measures it on this "
                             "GPU (default: that of a CPU)")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this time")
    parser.add_argument("--processes", type=int, default=1, help="trainings at once")
    parser.add_argument("--workers", type=int, default=12, help="processes that load data, for each training on a GPU")
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
        table = replace(TABLES[args.prepare], full=tuple(args.full))
        scribbles = args.data / "acdc_scribbles" if table.style == "scribbles" else None
        return prepare(table, args.data / "acdc", scribbles, args.work, ROLES)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.run:
        return print(run(json.loads(args.run), args.work, args.output, measured=measured))
    if train_until(args, deadline):
        print("done\n" + report(args.output))


if __name__ == "__main__":
    main()
