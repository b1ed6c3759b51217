"""How good are the labels that `confkd complete` writes? By the student, and by the teacher, which is shown the annotations.

    python benchmarks/accuracy.py acdc_small --data .../acdc --scribbles .../acdc_scribbles --work FOLDER --prepare
    python benchmarks/completion.py acdc_small --work FOLDER --full 3

Trains ConfKD as accuracy.py does for its table, completes the training cases that are not fully labelled with each branch, and
compares all their voxels, the annotated ones included, with the whole masks. Writes completion.json beside this file, an entry a table, and its
table into docs/complete.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path

import numpy as np
from accuracy import FULL_ID, TABLES, build_trainer, run_name, spec_of
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
    from nnunet_confkd.dataset_conversion.volumes import read

    from nnunet_confkd.metrics import measure_case
    truth, labels = (read(file).voxels[0] for file in (truth, labels))
    return [round(of["Dice"], 5) for of in measure_case(truth, labels, classes, (1.0,) * truth.ndim).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--work", type=Path, required=True, help="accuracy.py's folder, prepared")
    parser.add_argument("--full", type=int, required=True, metavar="M", help="number of full patients")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    work = args.work.resolve()
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ |= {"nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"}
    from importlib.metadata import version

    import torch
    torch.set_num_threads(1)
    from nnunet_confkd.dataset_conversion.writer import find_dataset

    from nnunet_confkd.complete import complete

    table = TABLES[args.table]
    start = time.time()
    spec = spec_of(table, "confkd", args.full, args.seed, "cpu", table.iterations)
    model = trained(table, spec)
    source = find_dataset(FULL_ID + args.full)
    truth = work / "raw" / find_dataset(FULL_ID) / "labelsTr"
    found: dict[str, dict[str, list[float]]] = {}
    for branch in BRANCHES:
        folder = complete(source, model, ID, branch=branch, device="cpu", processes=1, name="Completed")
        described = json.loads((folder / "dataset.json").read_text())
        classes = {label: np.atleast_1d(value).tolist() for label, value in described["labels"].items()
                   if label not in ("background", "ignore")}
        files = {case: f"{case}{described['file_ending']}" for case in described["completed"][-1]["cases"]}
        found[branch] = {case: dice_of(truth / file, folder / "labelsTr" / file, classes) for case, file in files.items()}
        shutil.rmtree(folder)
        shutil.rmtree(work / "preprocessed" / folder.name)
        print(branch, np.nanmean(list(found[branch].values())), flush=True)
    shutil.rmtree(model)
    results = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    results[f"{args.table}_{run_name(spec)}"] = {
        "title": table.title, "spec": spec, "cases": found, "seconds": round(time.time() - start),
        "versions": {p: version(p) for p in ("nnunetv2", "torch", "numpy")}, "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores"}
    OUTPUT.write_text(json.dumps(results))
    insert(ROOT / "docs" / "complete.md", "completion", report(results))


def report(results: dict) -> str:
    machines = sorted({run["machine"] for run in results.values()})
    lines = [f"{', '.join(machines)}.", "", "| labels completed by | " + " | ".join(
        f"{run['title']}, {run['spec']['full']} full patients: Dice of {len(run['cases']['student'])} cases" for run in results.values()) + " |",
        "|---|" + "---|" * len(results)]
    for branch, title in BRANCHES.items():
        cells = [np.array(list(run["cases"][branch].values())) for run in results.values()]
        lines.append(f"| {title} | " + " | ".join(f"{np.nanmean(np.nanmean(c, 0)):.3f} ({' / '.join(f'{d:.3f}' for d in np.nanmean(c, 0))})"
                                                for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
