"""The main job from beginning to end, on generated data or on a given folder, small enough for two CPU cores.

The steps: data, nnU-Net's planning and preprocessing, three trainings of equal cost with a small plan, prediction of
held-back images with nnU-Net's predictor, evaluation, a picture. The trainings are ConfKDTrainer, the ignore label on
the same batches, and the fully annotated cases alone. Everything is written into one new folder.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nnunet_confkd.errors import TrainingError
from nnunet_confkd.files import write_json

DATASET_ID = 901
# The generated data. The weak labels are the papers' own kind: blobs inside the foreground, and no background.
DATA: dict[str, Any] = dict(num_full=3, num_partial=24, num_unlabelled=0, num_test=12, style="erosion",
                            background=False)
PLANS, CONFIGURATION = "nnUNetPlans", "2d_small"
# Iterations of the other two trainings for each one of ConfKDTrainer, so that they take as long on this small network.
# On plans of real size it would be 1.17 (docs/explanation/performance.md).
COST = 1.45
# name: trainer, configuration, fold. Fold 1 trains on the fully annotated cases alone.
TRAININGS = {"ConfKD": ("ConfKDTrainer", CONFIGURATION, "0"),
             "ignore": ("ConfKDTrainer_partialOnly", f"{CONFIGURATION}_longer", "0"),
             "full": ("ConfKDTrainer_partialOnly", f"{CONFIGURATION}_longer", "1")}


def main(argv: list[str]) -> None:
    """Run `confkd demo`."""
    parser = argparse.ArgumentParser(prog="confkd demo", description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="FOLDER",
                        help="a folder in the layout of an MSD task or of nnU-Net's raw format; default: a generated "
                             "cardiac-like data set")
    parser.add_argument("--output", metavar="FOLDER", default="demo_output", help="each run makes a new folder in it")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=500, help="iterations per epoch of ConfKDTrainer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    folder = _new_run_folder(Path(args.output).resolve())
    # set for this process and its children only, before nnU-Net is imported and reads them
    os.environ.update({f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")})
    # threads sleep while they wait: on a busy machine, spinning threads slow a training down many times
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # three trainings run at once
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("nnUNet_n_proc_DA", str(max(0, (os.cpu_count() or 1) // 3 - 1)))
    os.environ.setdefault("nnUNet_def_n_proc", str(min(4, os.cpu_count() or 1)))
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir()
    run(folder, None if args.data is None else Path(args.data), args.epochs, args.iterations, args.seed)


def _new_run_folder(output: Path) -> Path:
    """Make the next free folder `run_NNN`, so that no run overwrites another."""
    for number in range(1, 10 ** 6):
        folder = output / f"run_{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(output)


def run(folder: Path, data: Path | None, epochs: int, iterations: int, seed: int) -> dict[str, float]:
    """Run all steps. nnU-Net's variables must name the folders raw, preprocessed and results in `folder`.

    Args:
        folder: Where everything is written.
        data: A folder in the layout of an MSD task or of nnU-Net's raw format. None: generated data.
        epochs: The number of epochs.
        iterations: The number of iterations per epoch of ConfKDTrainer.
        seed: The seed of the data and of the trainings.

    Returns:
        The mean Dice of "full" (the fully annotated cases alone), "ignore" (the ignore label), "student" and "teacher".
    """
    start = time.time()

    def say(step: int, text: str) -> None:
        print(f"\n=== [{step}/5] {text}   ({time.time() - start:.0f} s)", flush=True)

    say(1, "data: " + ("generated, cardiac-like" if data is None else str(data)))
    name = f"Dataset{DATASET_ID}_Demo"
    raw = folder / "raw" / name
    cases = _write_data(raw, data, seed)
    print(", ".join(f"{len(members)} {role}" for role, members in cases.items()))

    say(2, "planning and preprocessing (nnU-Net's, as confkd plan does)")
    plan_and_preprocess(DATASET_ID, ["2d"])
    _configure(folder / "preprocessed" / name, cases, epochs, iterations, seed)

    say(3, f"three trainings at once: ConfKDTrainer, {epochs} epochs of {iterations} iterations; and, as long in time, "
           "the ignore label and the fully annotated cases alone")
    _run_together({training: _commands(folder, training) for training in TRAININGS}, folder)

    say(4, "evaluation of the predictions of held-back images")
    dice = {branch: evaluate(raw / "labelsTs", folder / branch) for branch in ("full", "ignore", "student", "teacher")}
    write_json(folder / "results.json",
               {"dice": dice, "cases": cases, "epochs": epochs, "iterations_per_epoch": iterations, "seed": seed,
                "seconds": round(time.time() - start)})

    say(5, "picture")
    from nnunet_confkd.demo.picture import draw
    partial = (cases["partial"] or cases["unlabelled"] or cases["full"])[0]
    draw(raw, {"full cases alone": folder / "full", "ignore label": folder / "ignore", "ConfKD": folder / "student"},
         sorted(cases["test"]), partial, folder / "picture.png")

    print(f"\nfull cases alone Dice {dice['full']:.3f}\nignore label Dice {dice['ignore']:.3f}")
    for branch in ("student", "teacher"):
        print(f"{branch} Dice {dice[branch]:.3f}")
    model = folder / "results" / name / f"ConfKDTrainer__{PLANS}__{CONFIGURATION}"
    for path in (folder / "results.json", model, folder / "student", folder / "picture.png"):
        print(path)
    return dice


def _configure(preprocessed: Path, cases: dict[str, list[str]], epochs: int, iterations: int, seed: int) -> None:
    """Write the small configurations and two folds: one trains on all cases, the other on the full ones alone."""
    from nnunet_confkd.data.small_configuration import SIZES, add_small_configuration

    training = sorted([*cases["full"], *cases["partial"], *cases["unlabelled"]])
    write_json(preprocessed / "splits_final.json", [{"train": train, "val": sorted(cases["validation"])}
                                                    for train in (training, sorted(cases["full"]))])
    for configuration, number in ((CONFIGURATION, iterations), (f"{CONFIGURATION}_longer", round(COST * iterations))):
        add_small_configuration(preprocessed / f"{PLANS}.json", configuration, "2d",
                                {"epochs": epochs, "iterations_per_epoch": number, "seed": seed}, **SIZES[2])


def _commands(folder: Path, training: str) -> list[list[str]]:
    """The commands of a training and of its predictions."""
    trainer, configuration, fold = TRAININGS[training]
    commands = [["train", str(DATASET_ID), configuration, fold, "-tr", trainer]]
    for branch in ("student", "teacher") if training == "ConfKD" else (training,):
        # -npp 0 -nps 0: in the same process, because starting two pools takes longer than a few small images
        commands.append(["predict", "-i", str(folder / "raw" / f"Dataset{DATASET_ID}_Demo" / "imagesTs"), "-o",
                         str(folder / branch), "-d", str(DATASET_ID), "-tr", trainer, "-c", configuration, "-f", fold,
                         "-npp", "0", "-nps", "0", "--disable_progress_bar",
                         *(["--branch", branch] if training == "ConfKD" else [])])
    return commands


def _run_together(commands: dict[str, list[list[str]]], folder: Path) -> None:
    """Run several series of `confkd` commands at the same time, each in processes of its own.

    The output of the first series is shown. That of the others goes into `NAME.txt`.

    Args:
        commands: The arguments of each command, by the name of the series.
        folder: The folder of the text files.

    Raises:
        TrainingError: A command failed. The text names the file with its output.
    """
    with ExitStack() as stack:
        outputs = {name: stack.enter_context(open(folder / f"{name}.txt", "w")) if i else None
                   for i, name in enumerate(commands)}
        waiting = {name: iter(series) for name, series in commands.items()}
        running: dict[str, subprocess.Popen] = {}
        arguments: dict[str, list[str]] = {}  # of the running ones
        try:
            while waiting:
                for name in list(waiting):
                    if name in running:
                        if running[name].poll() is None:
                            continue
                        if running[name].returncode:
                            raise TrainingError(f"{name}: confkd {' '.join(arguments[name])} failed, see "
                                                + (f"{folder / name}.txt" if outputs[name] else "above"))
                    arguments[name] = next(waiting[name], [])
                    if not arguments[name]:
                        del waiting[name]
                    else:
                        command = [sys.executable, "-m", "nnunet_confkd.cli", *arguments[name]]
                        running[name] = subprocess.Popen(command, stdout=outputs[name], stderr=outputs[name])
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _write_data(raw: Path, data: Path | None, seed: int) -> dict[str, list[str]]:
    """Generate the data set `raw`, or import it from the folder `data`; return the names of its cases by role."""
    if data is None:
        from nnunet_confkd.demo.synthetic import generate_dataset
        return generate_dataset(raw, **DATA, seed=seed)
    from nnunet_confkd.demo.data import import_dataset
    return import_dataset(data, DATASET_ID, raw.name[11:], seed=seed)


def plan_and_preprocess(dataset_id: int, configurations: list[str]) -> None:
    """Plan and preprocess as `confkd plan` does, with nnU-Net's default number of processes."""
    from nnunetv2.configuration import default_num_processes

    from nnunet_confkd.data.planning import plan

    plan([dataset_id], configurations=configurations, verify_integrity=True,
         fingerprint_processes=default_num_processes, processes=[default_num_processes])


def evaluate(truth: Path, prediction: Path) -> float:
    """Evaluate with nnU-Net's own evaluation, which writes summary.json beside the predictions.

    Args:
        truth: The folder of the ground truth.
        prediction: The folder of the predictions, with nnU-Net's dataset.json and plans.json.

    Returns:
        The mean Dice of the foreground.
    """
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2

    compute_metrics_on_folder2(str(truth), str(prediction), str(prediction / "dataset.json"),
                               str(prediction / "plans.json"), chill=True)
    return float(json.loads((prediction / "summary.json").read_text())["foreground_mean"]["Dice"])
