"""Measure time and peak memory on one large volume, in turns with a bare read of the same files.

    python benchmarks/large_volumes.py [--volume 600 512 512] [--organs 3 25 117] [--work FOLDER] [--only STEP ...]

The volumes are generated (volumes.py). The steps are:

- evaluate: `confkd evaluate` of one predicted label map, for each number of organs.
- check: `confkd check` of a data set of one case, for the smallest and the largest number of organs.
- report, entropy, complete: of a tiny 2-D network without mirroring, for 3 organs. The network is trained until it
  knows the organs, so that surfaces are not those of noise. The same predictions alone are measured as well, because
  the targets are for what comes on top of them.
- validation: the final validation of one case by nnU-Net's trainer and by ours, with the largest number of organs, on a
  smaller volume (--validated), because nnU-Net needs some 600 bytes a voxel.

A bare read is a process that reads the files with SimpleITK, and nothing else. Times are those on a processor, because
others may use the machine; the seconds that passed are in brackets. Memory is the proportional set size of a
command and all of its processes (sizes.py). With --work, finished measurements are kept, and an interrupted run
continues. The script writes large_volumes.json beside this file, and the table into
docs/explanation/data_performance.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import sizes
import volumes

ROOT = Path(__file__).resolve().parent.parent
ID, DATASET, CONFIGURATION = 996, "Dataset996_Large", "tiny"
STEPS = ("evaluate", "check", "report", "entropy", "complete", "validation")
NUM_FULL, SLICES, IGNORE = 4, 16, 4  # the small cases, with three organs and the label "ignore"
# The KL is asked for, because with labels as sparse as these the trainer would choose to have no teacher.
KL = {"weight_kl": 3.0}
TRAINING, PATCH = {"epochs": 4, "iterations_per_epoch": 250, "seed": 0} | KL, 96
CONFKD = [sys.executable, "-m", "nnunet_confkd.cli"]

READ = """
import sys
import SimpleITK as sitk
for file in sys.argv[1:]:
    sitk.GetArrayFromImage(sitk.ReadImage(file))
"""
PREDICT = """
from pathlib import Path
import torch
from nnunet_confkd.report.cases import Predictor
from nnunet_confkd.report.model import Model
model = Model(Path({model!r}), None, "checkpoint_final.pth")
found = Predictor(model, model.fold_folders[0], ["student", "teacher"], torch.device("cpu"))({case!r})
for branch in found.logits:
    found.logits[branch]
"""
VALIDATE = """
import json, os
from pathlib import Path
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunet_confkd.training.trainer import ConfKDTrainer
folder = Path(os.environ["nnUNet_preprocessed"]) / {dataset!r}
plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {{"continue_training": False}}
dataset = json.loads((folder / "dataset.json").read_text())
if __name__ == "__main__":
    trainer = {trainer}(plans, {configuration!r}, 0, dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.inference_allowed_mirroring_axes = None
    trainer.perform_actual_validation()
"""


class Work:
    """A folder of finished measurements; those that were interrupted are made again."""

    def __init__(self, folder: Path, turns: int):
        self.folder, self.file, self.turns = folder, folder / "done.json", turns
        folder.mkdir(parents=True, exist_ok=True)
        self.done = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def measure(self, name: str, command: list[str]) -> dict[str, float]:
        """Return the time and the memory of a command; run it if this has not been done before."""
        if name not in self.done:
            print(f"{name} (load {os.getloadavg()[0]:.1f})", flush=True)
            self.done[name] = sizes.run(command, self.folder / "log.txt") | {"load": round(os.getloadavg()[0], 1)}
            self.file.write_text(json.dumps(self.done, indent=1))
        return self.done[name]

    def in_turns(self, name: str, command: list[str], files: list[Path]) -> dict[str, dict[str, float]]:
        """Run a command and a bare read of its files in turns, and return the medians."""
        turns: dict[str, list] = {"command": [], "read": []}
        for turn in range(self.turns):
            turns["read"].append(self.measure(f"{name}, read {turn}", [sys.executable, "-c", READ, *map(str, files)]))
            turns["command"].append(self.measure(f"{name} {turn}", command))
        return {kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for kind, runs in turns.items()}


def set_folders(folder: Path) -> dict[str, Path]:
    """Set nnU-Net's three folders to ones in this folder."""
    found = {name: folder / name for name in ("raw", "preprocessed", "results")}
    os.environ |= {f"nnUNet_{name}": str(path) for name, path in found.items()}
    return found


def describe(raw: Path, organs: int, cases: int) -> None:
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": cases,
        "labels": {"background": 0, **{f"organ{k}": k for k in range(1, organs + 1)}, "ignore": organs + 1}}))


# ---- evaluate and check ---------------------------------------------------------------------------------------------

def labelled_case(folder: Path, shape: tuple[int, ...], organs: int, with_image: bool) -> dict[str, Path]:
    """Write a raw data set of one case, and a prediction of it. Return its files."""
    raw = set_folders(folder)["raw"] / DATASET
    files = {"image": raw / "imagesTr" / "case_0000.nii.gz", "label": raw / "labelsTr" / "case.nii.gz",
             "prediction": folder / "prediction" / "case.nii.gz"}
    if not (raw / "dataset.json").is_file():
        truth, prediction = volumes.organs(shape, organs)
        volumes.write(files["label"], truth)
        volumes.write(files["prediction"], prediction)
        describe(raw, organs, 1)
    if with_image and not files["image"].is_file():
        volumes.write(files["image"], volumes.ct(volumes.organs(shape, organs)[0]))
    return files


def measure_labels(work: Work, shape: tuple[int, ...], organs: int, steps: list[str]) -> dict[str, dict]:
    """Measure `confkd evaluate` and `confkd check` of a case with so many organs."""
    files, found = labelled_case(work.folder / f"labels_{organs}", shape, organs, "check" in steps), {}
    if "evaluate" in steps:
        command = [*CONFKD, "evaluate", "--truth", str(files["label"].parent), "--prediction",
                   str(files["prediction"].parent), "-d", str(ID), "--processes", "2"]
        found["evaluate"] = work.in_turns(f"evaluate, {organs}", command, [files["label"], files["prediction"]])
    if "check" in steps:
        # the data set has no split, and check says so: the exit status is that of a data set that can be trained
        found["check"] = work.in_turns(f"check, {organs}", [*CONFKD, "check", "-d", str(ID), "--processes", "2"],
                                       [files["image"], files["label"]])
    return found


# ---- report, entropy, completion ------------------------------------------------------------------------------------

def train_network(work: Work, shape: tuple[int, ...]) -> tuple[Path, dict[str, Path]]:
    """Train a tiny network on small cases, and let it know of a large validation case and a large partial one.

    Returns:
        The folder of the model, and the images of the large cases by their kind.
    """
    import numpy as np

    from nnunet_confkd.data.small_configuration import add_small_configuration
    folders = set_folders(work.folder / "network")
    raw, preprocessed = folders["raw"] / DATASET, folders["preprocessed"] / DATASET
    small = [f"small_{k}" for k in range(NUM_FULL)]
    partial, validation = "partial", "validation"
    if not (raw / "dataset.json").is_file():
        for number, case in enumerate((*small, partial, validation)):
            label, _ = volumes.organs(shape, 3, number)
            if case in small:
                label = label[::max(1, len(label) // SLICES)]
            volumes.write(raw / "imagesTr" / f"{case}_0000.nii.gz", volumes.ct(label))
            if case == partial:  # in each slice the same places are annotated
                few = np.random.default_rng(0).random(shape[1:]) < 1e-3
                label = np.where(few, label, np.uint8(IGNORE))
            volumes.write(raw / "labelsTr" / f"{case}.nii.gz", label)
        describe(raw, 3, NUM_FULL + 2)
    model = folders["results"] / DATASET / f"ConfKDTrainer__nnUNetPlans__{CONFIGURATION}"
    work.measure("plan", [*CONFKD, "plan", "-d", str(ID), "-c", "2d", "-np", "2", "-npfp", "2"])
    plans = preprocessed / "nnUNetPlans.json"
    if CONFIGURATION not in json.loads(plans.read_text())["configurations"]:
        add_small_configuration(plans, CONFIGURATION, "2d", TRAINING, features=(4, 8, 8), batch_size=4, max_patch=PATCH,
                                convolutions=1)
        (preprocessed / "splits_final.json").write_text(json.dumps(
            [{"train": [*small[1:], partial], "val": small[:1]}]))
    work.measure("train", [*CONFKD, "train", str(ID), CONFIGURATION, "0", "-device", "cpu"])
    finish_training(model / "fold_0", validation, shape[1:])
    return model, {kind: raw / "imagesTr" / f"{case}_0000.nii.gz"
                   for kind, case in (("partial", partial), ("validation", validation))}


def finish_training(fold: Path, validation: str, patch_size: tuple[int, ...]) -> None:
    """Let the report find the large case as the only one, predict a slice at once, and switch mirroring off."""
    import torch
    plans = json.loads((fold.parent / "plans.json").read_text())
    plans["configurations"][CONFIGURATION]["patch_size"] = list(patch_size)
    (fold.parent / "plans.json").write_text(json.dumps(plans, indent=4))
    record = json.loads((fold / "confkd.json").read_text())
    record |= {"pseudo_dice_on": [validation],
               "supervision": {case: kind for case, kind in record["supervision"].items() if kind != "partial"}}
    (fold / "confkd.json").write_text(json.dumps(record))
    for file in fold.glob("checkpoint_final.pth"):
        checkpoint = torch.load(file, weights_only=False)
        checkpoint["inference_allowed_mirroring_axes"] = None
        torch.save(checkpoint, file)


def measure_predictions(work: Work, shape: tuple[int, ...], steps: list[str]) -> dict[str, dict]:
    """Measure the report, the entropy and the completion, each beside the same predictions alone."""
    model, images = train_network(work, shape)
    case, found = images["validation"].name.removesuffix("_0000.nii.gz"), {}
    if "report" in steps:
        found["report"] = {
            "alone": work.measure("predict both", [sys.executable, "-c", PREDICT.format(model=str(model), case=case)]),
            "command": work.measure("report", [*CONFKD, "report", "--model", str(model), "-device", "cpu"])}
    source = work.folder / "network" / "one"
    source.mkdir(exist_ok=True)
    if not (source / images["partial"].name).exists():
        os.link(images["partial"], source / images["partial"].name)
    if {"entropy", "complete"} & set(steps):
        command = [*CONFKD, "predict", "-i", str(source), "-d", str(ID), "-tr", "ConfKDTrainer", "-c", CONFIGURATION,
                   "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
        alone = work.measure("predict", [*command, "-o", str(source / "plain")])
    if "entropy" in steps:
        found["entropy"] = {"alone": alone, "command": work.measure(
            "entropy", [*command, "-o", str(source / "entropy"), "--save-entropy"])}
    if "complete" in steps:
        found["complete"] = {"alone": alone, "command": work.measure("complete", [
            *CONFKD, "complete", "-d", str(ID), "--model", str(model), "--id", str(ID + 1), "-device", "cpu",
            "--processes", "2"])}
    return found


# ---- validation -----------------------------------------------------------------------------------------------------

def measure_validation(work: Work, shape: tuple[int, ...], organs: int) -> dict[str, dict]:
    """Measure the final validation of a case by stock nnU-Net and by ConfKDTrainer, with random weights."""
    import numpy as np

    from nnunet_confkd.data.small_configuration import add_small_configuration
    folders = set_folders(work.folder / "validation")
    raw, preprocessed = folders["raw"] / DATASET, folders["preprocessed"] / DATASET
    if not (raw / "dataset.json").is_file():
        for number, case in enumerate(("full", "partial", "validated")):
            label, _ = volumes.organs(shape, organs, number)
            volumes.write(raw / "imagesTr" / f"{case}_0000.nii.gz", volumes.ct(label, number))
            few = np.random.default_rng(number).random(shape) < 1e-3
            volumes.write(raw / "labelsTr" / f"{case}.nii.gz",
                          np.where(few, label, np.uint8(organs + 1)) if case == "partial" else label)
        describe(raw, organs, 3)
    work.measure("plan for the validation", [*CONFKD, "plan", "-d", str(ID), "-c", "2d", "-np", "2", "-npfp", "2"])
    plans = preprocessed / "nnUNetPlans.json"
    if CONFIGURATION not in json.loads(plans.read_text())["configurations"]:
        add_small_configuration(plans, CONFIGURATION, "2d", {"seed": 0} | KL, features=(4, 8, 8), batch_size=2,
                                max_patch=max(shape), convolutions=1)
        (preprocessed / "splits_final.json").write_text(json.dumps(
            [{"train": ["full", "partial"], "val": ["validated"]}]))
    found = {}
    for name, trainer in (("alone", "nnUNetTrainer"), ("command", "ConfKDTrainer")):
        # as a file, because the processes that write segmentations import it
        file = work.folder / f"validate_{trainer}.py"
        file.write_text(VALIDATE.format(dataset=DATASET, trainer=trainer, configuration=CONFIGURATION))
        found[name] = work.measure(f"validation by {trainer}", [sys.executable, str(file)])
    return found


# ---- the tables -----------------------------------------------------------------------------------------------------

def cell(run: dict[str, float]) -> str:
    return f"{run['cpu_seconds']:.1f} s ({run['seconds']:.0f} s), {run['peak_mib']:.0f} MiB"


def table_of(result: dict) -> str:
    lines = ["| command | organs | a bare read of its files | the command | times the read |", "|---|---|---|---|---|"]
    for organs, steps in result["labels"].items():
        for step, run in steps.items():
            ratio = run["command"]["cpu_seconds"] / run["read"]["cpu_seconds"]
            lines.append(f"| {step} | {organs} | {cell(run['read'])} | {cell(run['command'])} | {ratio:.1f} |")
    if result["predictions"]:
        lines += ["", f"| command, 3 organs, {'x'.join(map(str, result['predicted']))} voxels | its predictions alone "
                      "| the command | on top of them |", "|---|---|---|---|"]
    for step, run in result["predictions"].items():
        more = run["command"]["cpu_seconds"] - run["alone"]["cpu_seconds"]
        lines.append(f"| {step} | {cell(run['alone'])} | {cell(run['command'])} | {more:.0f} s |")
    if result["validation"]:
        stock, ours = result["validation"]["alone"], result["validation"]["command"]
        lines += ["", "| final validation | stock, one branch | ConfKD, both branches | times the memory |",
                  "|---|---|---|---|",
                  f"| {result['organs'][-1]} organs, {'x'.join(map(str, result['validated']))} voxels | {cell(stock)} "
                  f"| {cell(ours)} | {ours['peak_mib'] / stock['peak_mib']:.2f} |"]
    return "\n".join(lines)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    work, shape = Work(folder, args.turns), tuple(args.volume)
    labels = {}
    for organs in args.organs:
        few = [step for step in args.only if step != "check" or organs in (args.organs[0], args.organs[-1])]
        labels[str(organs)] = measure_labels(work, shape, organs, few) if {"evaluate", "check"} & set(few) else {}
    predictions = validation = {}
    if {"report", "entropy", "complete"} & set(args.only):
        predictions = measure_predictions(work, tuple(args.predicted or shape), args.only)
    if "validation" in args.only:
        validation = measure_validation(work, tuple(args.validated), args.organs[-1])
    return {"machine": f"{platform.machine()} CPU, {os.cpu_count()} cores", "threads": os.environ["OMP_NUM_THREADS"],
            "load": [min(run["load"] for run in work.done.values()), max(run["load"] for run in work.done.values())],
            "volume": list(shape), "predicted": list(args.predicted or shape),
            "organs": list(args.organs), "validated": list(args.validated), "labels": labels,
            "predictions": predictions, "validation": validation}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", type=int, nargs=3, default=(600, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--organs", type=int, nargs="+", default=(3, 25, 117))
    parser.add_argument("--predicted", type=int, nargs=3, metavar=("Z", "Y", "X"),
                        help="another volume for report, entropy and complete")
    parser.add_argument("--validated", type=int, nargs=3, default=(128, 192, 192), metavar=("Z", "Y", "X"))
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--turns", type=int, default=3, help="how often evaluate and check are measured")
    parser.add_argument("--work", type=Path, help="folder to keep what is finished in; default: a temporary one")
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args(argv)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "2", "nnUNet_compile": "false"}
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args, args.work or Path(temporary))
    (args.output or ROOT / "benchmarks" / "large_volumes.json").write_text(json.dumps(result, indent=1) + "\n")
    low, high = result["load"]
    text = (f"{result['machine']}, {result['threads']} thread(s); a volume of {'x'.join(map(str, result['volume']))} "
            f"voxels. Processor time, and in brackets the time that passed: the load of the machine, these commands "
            f"included, was {low} to {high}.\n\n{table_of(result)}")
    print(text)
    if not args.output:
        from step_time import insert
        insert(ROOT / "docs" / "explanation" / "data_performance.md", "large volumes", text)


if __name__ == "__main__":
    main()
