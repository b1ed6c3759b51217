"""The main job from beginning to end, on generated data or on a given folder, small enough for two CPU cores.

The steps: data, nnU-Net's planning and preprocessing, ConfKDTrainer with a small plan, prediction of held-back images
with nnU-Net's predictor, evaluation, a picture. Everything is written into one new folder.
"""
from __future__ import annotations

import json
import os
import time
from pathlib import Path

from nnunet_confkd.arguments import Parser
from nnunet_confkd.files import write_json

DATASET_ID = 901
PLANS, CONFIGURATION = "nnUNetPlans", "2d_small"


def main(argv: list[str]) -> None:
    """Run `confkd demo`."""
    parser = Parser(prog="confkd demo", description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="FOLDER",
                        help="a folder in the layout of an MSD task or of nnU-Net's raw format; default: a generated "
                             "cardiac-like data set")
    parser.add_argument("--output", metavar="FOLDER", default="demo_output", help="each run makes a new folder in it")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=200, help="iterations per epoch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    folder = _new_run_folder(Path(args.output).resolve())
    # set for this process and its children only, before nnU-Net is imported and reads them
    os.environ.update({f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")})
    # threads sleep while they wait: on a busy machine, spinning threads slow a training down many times
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        iterations: The number of iterations per epoch.
        seed: The seed of the data and of the training.

    Returns:
        The mean Dice of "student" and "teacher".
    """
    from nnunet_confkd.data.small_configuration import SIZES, add_small_configuration
    from nnunet_confkd.device import choose_device
    from nnunet_confkd.discovery import make_findable
    from nnunet_confkd.nnunet_commands import predict

    start = time.time()

    def say(step: int, text: str) -> None:
        print(f"\n=== [{step}/6] {text}   ({time.time() - start:.0f} s)", flush=True)

    say(1, "data: " + ("generated, cardiac-like" if data is None else str(data)))
    name = f"Dataset{DATASET_ID}_Demo"
    raw = folder / "raw" / name
    cases = _write_data(raw, data, seed)
    print(", ".join(f"{len(members)} {role}" for role, members in cases.items()))

    say(2, "planning and preprocessing (nnU-Net's, as confkd plan does)")
    plan_and_preprocess(DATASET_ID, ["2d"])
    preprocessed = folder / "preprocessed" / name
    training = sorted([*cases["full"], *cases["partial"], *cases["unlabelled"]])
    write_json(preprocessed / "splits_final.json", [{"train": training, "val": sorted(cases["validation"])}])
    add_small_configuration(preprocessed / f"{PLANS}.json", CONFIGURATION, "2d",
                            {"epochs": epochs, "iterations_per_epoch": iterations, "seed": seed}, **SIZES[2])

    say(3, f"training: ConfKDTrainer, {epochs} epochs of {iterations} iterations")
    import torch
    from nnunetv2.run.run_training import run_training
    make_findable()
    device = choose_device()
    # nnU-Net's command would use all cores for the network, but the augmentation needs one of them
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    run_training(name, CONFIGURATION, 0, "ConfKDTrainer", device=torch.device(device))

    say(4, "prediction of held-back images (nnU-Net's predictor), student and teacher")
    model = folder / "results" / name / f"ConfKDTrainer__{PLANS}__{CONFIGURATION}"
    images = folder / "raw" / name / "imagesTs"
    for branch in ("student", "teacher"):
        # -npp 0 -nps 0: in this process, because starting two pools takes longer than a few small images
        predict(["-i", str(images), "-o", str(folder / branch), "-d", str(DATASET_ID), "-c", CONFIGURATION, "-f", "0",
                 "-device", device, "-npp", "0", "-nps", "0", "--disable_progress_bar", "--branch", branch])

    say(5, "evaluation")
    dice = {branch: evaluate(raw / "labelsTs", folder / branch) for branch in ("student", "teacher")}
    write_json(folder / "results.json",
               {"dice": dice, "cases": cases, "epochs": epochs, "iterations_per_epoch": iterations, "seed": seed,
                "seconds": round(time.time() - start)})

    say(6, "picture")
    from nnunet_confkd.demo.picture import STORED, STORED_TITLE, draw
    partial = (cases["partial"] or cases["unlabelled"] or cases["full"])[0]
    draw(raw, folder / "student", sorted(cases["test"]), partial, folder / "picture.png")

    print(f"\n{STORED_TITLE}; each training takes as long")
    for title, value in STORED.items():
        print(f"  {title} Dice {value:.3f} (stored)")
    print("This training:")
    for branch, value in dice.items():
        print(f"{branch} Dice {value:.3f}")
    for path in (folder / "results.json", model, folder / "student", folder / "picture.png"):
        print(path)
    return dice


def _write_data(raw: Path, data: Path | None, seed: int) -> dict[str, list[str]]:
    """Generate the data set `raw`, or import it from the folder `data`; return the names of its cases by role."""
    if data is None:
        from nnunet_confkd.demo.synthetic import generate_dataset
        return generate_dataset(raw, seed=seed)
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
