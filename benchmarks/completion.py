"""How good are the labels that `confkd complete` writes with the student, and with the teacher and its hints?

    python benchmarks/accuracy.py acdc_small --data .../acdc --scribbles .../acdc_scribbles --work FOLDER --prepare
    python benchmarks/completion.py acdc_small --work FOLDER --full 3 --retrain

The script trains ConfKD as accuracy.py does for its table. Each branch then completes the training cases that are not
fully annotated. All voxels of these cases, including the annotated ones, are compared with the full ground truth.
With --retrain, stock nnU-Net is trained on the labels that the teacher completed, for as many iterations, and
measured on the test patients. Each run adds an entry to completion.json beside this file, and the tables go into
docs/how-to/complete.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
from accuracy import FULL_ID, ROWS, TABLES, build_trainer, planned, predict_and_measure, run_name, spec_of
from accuracy import OUTPUT as RUNS
from accuracy_report import RIVAL, UPPER, mean_of, read_runs, values_of
from step_time import ROOT, insert

ID = 990  # of the completed data set, which is removed
OUTPUT = Path(__file__).with_suffix(".json")
BRANCHES = {"student": "the student", "teacher": "the teacher, shown the annotations", "mean": "the mean of both"}


def trained(table, spec: dict) -> Path:
    """The folder of a trained model."""
    trainer = build_trainer(table, spec)
    if not (Path(trainer.output_folder) / "checkpoint_final.pth").is_file():
        trainer.run_training()
    return Path(trainer.output_folder).parent


def dice_of(truth: Path, labels: Path, classes: dict[str, list[int]]) -> list[float]:
    from nnunet_confkd.data.images import read
    from nnunet_confkd.evaluation.metrics import measure_case
    truth, labels = (read(file).voxels[0] for file in (truth, labels))
    return [round(of["Dice"], 5) for of in measure_case(truth, labels, classes, (1.0,) * truth.ndim).values()]


def retrained(table, spec: dict, cases: list[str]) -> dict:
    """Stock nnU-Net, trained on the completed data set: its metrics of `cases`, as accuracy.py measures them."""
    planned(table, [ID])
    trainer = build_trainer(table, spec_of(table, UPPER, 0, spec["seed"], "cpu", table.iterations), ID)
    trainer.run_training()
    measured = predict_and_measure(trainer, cases)
    shutil.rmtree(Path(trainer.output_folder).parent.parent)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--work", type=Path, required=True, help="accuracy.py's folder, prepared")
    parser.add_argument("--full", type=int, required=True, metavar="M", help="number of full patients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--retrain", action="store_true", help="train stock nnU-Net on the labels that the teacher completed"
    )
    args = parser.parse_args()
    work = args.work.resolve()
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ |= {"nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"}
    from importlib.metadata import version

    import torch
    torch.set_num_threads(1)
    from nnunet_confkd.data.folders import find_dataset
    from nnunet_confkd.inference.completion import TrainedModel, complete

    table = TABLES[args.table]
    start = time.time()
    spec = spec_of(table, "confkd", args.full, args.seed, "cpu", table.iterations)
    model = trained(table, spec)
    source = find_dataset(FULL_ID + args.full)
    truth = work / "raw" / find_dataset(FULL_ID) / "labelsTr"
    found: dict[str, dict[str, list[float]]] = {}
    measured = None
    for branch in BRANCHES:
        folder = complete(source, TrainedModel(model, branch, device="cpu"), ID, processes=1, name="Completed")
        described = json.loads((folder / "dataset.json").read_text())
        classes = {label: np.atleast_1d(value).tolist() for label, value in described["labels"].items()
                   if label not in ("background", "ignore")}
        files = {case: f"{case}{described['file_ending']}" for case in described["completed"][-1]["cases"]}
        found[branch] = {
            case: dice_of(truth / file, folder / "labelsTr" / file, classes) for case, file in files.items()
        }
        if branch == "teacher" and args.retrain:
            measured = retrained(table, spec, json.loads((work / "roles.json").read_text())["test"])
        shutil.rmtree(folder)
        shutil.rmtree(work / "preprocessed" / folder.name)
        print(branch, np.nanmean(list(found[branch].values())), flush=True)
    shutil.rmtree(model)
    retraining = {"retrained": {"on": "test", "cases": measured}} if measured else {}
    results = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    results[f"{args.table}_{run_name(spec)}"] = {
        "title": table.title,
        "spec": spec,
        "cases": found,
        **retraining,
        "seconds": round(time.time() - start),
        "versions": {p: version(p) for p in ("nnunetv2", "torch", "numpy")},
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
    }
    OUTPUT.write_text(json.dumps(results))
    insert(ROOT / "docs" / "how-to" / "complete.md", "completion", report(results))


def report(results: dict) -> str:
    """The quality of the labels, and of networks trained on them, means over seeds."""
    tables: dict[tuple[str, int], list[dict]] = {}
    for run in results.values():
        tables.setdefault((run["title"], run["spec"]["full"]), []).append(run)

    def head(what: str, runs: list[dict], cases: int) -> str:
        return (f"{runs[0]['title']}, {runs[0]['spec']['full']} full patients: {what} of {cases} cases, "
                f"{len(runs)} seed{'s' * (len(runs) > 1)}")

    lines = [
        ", ".join(sorted({run["machine"] for run in results.values()})) + ".",
        "",
        "| labels completed by | "
        + " | ".join(head("Dice", runs, len(runs[0]["cases"]["student"])) for runs in tables.values())
        + " |",
        "|---|" + "---|" * len(tables),
    ]
    for branch, title in BRANCHES.items():
        cells = [np.array([dice for run in runs for dice in run["cases"][branch].values()]) for runs in tables.values()]
        lines.append(f"| {title} | " + " | ".join(map(_mean_and_classes, cells)) + " |")
    trained_on = {key: again for key, runs in tables.items() if (again := [run for run in runs if "retrained" in run])}
    if trained_on:
        lines += [
            "",
            "| trained | "
            + " | ".join(head("test Dice", runs, len(runs[0]["retrained"]["cases"])) for runs in trained_on.values())
            + " |",
            "|---|" + "---|" * len(trained_on),
        ]
        lines += [
            f"| {title} | "
            + " | ".join(_mean_and_classes(np.concatenate([of(run) for run in runs])) for runs in trained_on.values())
            + " |"
            for title, of in (
                *((ROWS[row].title, partial(_from_table, row=row)) for row in (RIVAL, "confkd", UPPER)),
                ("stock nnU-Net, on the labels that ConfKD's teacher completed", _of_retrained),
            )
        ]
    return "\n".join(lines)


def _from_table(run: dict, row: str) -> np.ndarray:
    """Dice of accuracy.py's run of the same seed, `(cases, classes)`."""
    spec = run["spec"]
    runs = read_runs(RUNS / next(name for name, table in TABLES.items() if table.title == run["title"]))
    return values_of(runs, row, 0 if row == UPPER else spec["full"], "student", "dice")[spec["seed"]]


def _of_retrained(run: dict) -> np.ndarray:
    return values_of({("", 0, 0): {"cases": run["retrained"]["cases"]}}, "", 0, "student", "dice")[0]


def _mean_and_classes(dice: np.ndarray) -> str:
    return f"{mean_of({0: dice}):.3f} ({' / '.join(f'{d:.3f}' for d in np.nanmean(dice, 0))})"


if __name__ == "__main__":
    main()
