"""Which share of fully annotated images in a batch? The measurement behind the default of `full_share`.

The demo's small 2-D network is trained on Hippocampus on the CPU, in batches of 12, with several shares and seeds.
Five cases are fully annotated, and the others have point labels. The share is chosen by the student's mean foreground
Dice on fully annotated validation cases. No test case is used.

    python benchmarks/full_share.py --data .../hippocampus --work FOLDER --output benchmarks/full_share.json
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

LIMITS = {"test": 40, "validation": 30, "full": 5, "unlabelled": 0, "partial": 125}
DATASET = "Dataset901_Demo"


def one_run(work: str, configuration: str, share: float, seed: int) -> dict:
    """Train and validate once; `configuration` is in the plans already."""
    import torch
    from nnunetv2.run.run_training import run_training

    from nnunet_confkd.discovery import make_findable

    make_findable()
    torch.set_num_threads(1)
    start = time.time()
    run_training(DATASET, configuration, 0, "ConfKDTrainer", device=torch.device("cpu"))
    model = Path(work) / "results" / DATASET / f"ConfKDTrainer__nnUNetPlans__{configuration}" / "fold_0"
    dice = {branch: json.loads((model / folder / "summary.json").read_text())["foreground_mean"]["Dice"]
            for branch, folder in (("student", "validation"), ("teacher", "validation_teacher"))}
    return {"full_share": share, "seed": seed, "dice": dice, "seconds": round(time.time() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, help="a new folder for the trainings")
    parser.add_argument("--output", required=True, help="the JSON file to write")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    work = Path(args.work).resolve()
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True)
        os.environ[f"nnUNet_{name}"] = str(work / name)
    # one thread a training, several trainings at once, no loader processes: the seed then fixes the run
    os.environ |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "OMP_NUM_THREADS": "1"}
    import torch

    from nnunet_confkd import __version__
    from nnunet_confkd.data.small_configuration import add_small_configuration
    from nnunet_confkd.demo.data import import_dataset
    from nnunet_confkd.demo.demo import plan_and_preprocess

    cases = import_dataset(Path(args.data), 901, DATASET[11:], seed=0, limits=LIMITS, style="points")
    plan_and_preprocess(901, ["2d"])
    os.environ["nnUNet_n_proc_DA"] = "0"
    split = [{"train": sorted(cases["full"] + cases["partial"]), "val": sorted(cases["validation"])}]
    (work / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(split))
    jobs = []
    for seed in args.seeds:
        for share in args.shares:
            configuration = f"2d_share{round(100 * share)}_seed{seed}"
            settings = {
                "epochs": args.epochs,
                "iterations_per_epoch": args.iterations,
                "seed": seed,
                "full_share": share,
                "weight_kl": 3.0,  # with points the trainer would choose to have no teacher
            }
            add_small_configuration(work / "preprocessed" / DATASET / "nnUNetPlans.json", configuration, "2d", settings,
                                    batch_size=12)
            jobs.append((str(work), configuration, share, seed))
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        runs = [future.result() for future in [pool.submit(one_run, *job) for job in jobs]]
    Path(args.output).write_text(json.dumps({
        "what": __doc__.split("\n")[0], "runs": runs, "cases": {role: len(members) for role, members in cases.items()},
        "epochs": args.epochs, "iterations_per_epoch": args.iterations, "batch_size": 12, "nnunet_confkd": __version__,
        "torch": torch.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU"}, indent=1))
    for run in runs:
        print(run)


if __name__ == "__main__":
    main()
