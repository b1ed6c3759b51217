"""Measure time and peak memory of the commands against the number of cases. large_volumes.py measures large ones.

    python benchmarks/sizes.py [--cases 100 1000] [--work FOLDER]

The script generates data sets of small volumes. Half of their cases have point labels, and most of the others are
fully annotated validation cases. On each data set the script plans, trains a tiny 2-D network for one epoch of five
iterations, and measures the commands that read every case. Memory is the proportional set size of a command and all of
its processes, sampled up to ten times a second. With --work, finished measurements are kept, and an interrupted run
continues. The script writes sizes.json beside this file, and the table into docs/explanation/data_performance.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ID, DATASET, CONFIGURATION = 997, "Dataset997_Sizes", "tiny"
COMMANDS = ("check", "loader", "evaluate", "report", "complete")
NUM_FULL = 4

PREPARE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import sizes
sizes.prepare({cases!r})
"""
LOADER = """
import json, os
from pathlib import Path
import torch
from nnunet_confkd.training.trainer import ConfKDTrainer
folder = Path(os.environ["nnUNet_preprocessed"]) / {dataset!r}
plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {{"continue_training": False}}
dataset = json.loads((folder / "dataset.json").read_text())
trainer = ConfKDTrainer(plans, {configuration!r}, 0, dataset, torch.device("cpu"))
trainer.initialize()
loader, validation = trainer.get_dataloaders()
for _ in range(200):
    next(loader)
for each in (loader, validation):
    each._finish()  # else its threads end with the interpreter, which now and then aborts it
"""


def prepare(cases: int) -> None:
    """Write the raw data set of many small cases."""
    from nnunet_confkd.demo.synthetic import generate_dataset
    generate_dataset(Path(os.environ["nnUNet_raw"]) / DATASET, num_full=NUM_FULL, num_partial=cases // 2,
                     num_unlabelled=0, num_test=0, num_validation=cases - cases // 2 - NUM_FULL, style="points")


# ---- measuring ------------------------------------------------------------------------------------------------------

def tree_memory(root: int) -> float:
    """MiB of a process and its descendants; memory that they share is counted once."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
    tree, found = [root], 0
    for process in tree:
        tree.extend(child for child, parent in parents.items() if parent == process)
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text()
            found += int(lines.split("\nPss:")[1].split()[0])
        except (OSError, IndexError):
            continue
    return found / 1024


def run(command: list[str], log: Path) -> dict[str, float]:
    """Run a command, and return its seconds, those of all its processors, and its peak MiB.

    If it fails, exit with the end of its log.
    """
    start, peak, used = time.perf_counter(), 0.0, processor_seconds()
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            before = time.perf_counter()
            peak = max(peak, tree_memory(process.pid))
            # looking takes a while where there is much of it, during which the process can have no more
            time.sleep(max(0.1, 20 * (time.perf_counter() - before)))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed:\n{log.read_text()[-3000:]}")
    return {"seconds": round(time.perf_counter() - start, 2), "peak_mib": round(peak, 1),
            "cpu_seconds": round(processor_seconds() - used, 2)}


def processor_seconds() -> float:
    """The time that all processes which have ended have had on a processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, cases: int, folder: Path) -> dict[str, dict]:
    done_file = folder / f"{name}.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    for variable in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{variable}"] = str(folder / name / variable)
    preprocessed, results = folder / name / "preprocessed" / DATASET, folder / name / "results" / DATASET
    model = results / f"ConfKDTrainer__nnUNetPlans__{CONFIGURATION}"
    python, confkd = [sys.executable, "-c"], [sys.executable, "-m", "nnunet_confkd.cli"]

    def step(key: str, command: list[str]) -> None:
        if key in done:
            return
        print(f"{name}: {key}", flush=True)
        done[key] = run(command, folder / f"{name}_{key}.log")
        done_file.write_text(json.dumps(done, indent=1))

    step("prepare", [*python, PREPARE.format(benchmarks=str(ROOT / "benchmarks"), cases=cases)])
    step("check", [*confkd, "check", "-d", str(ID), "--processes", "2"])
    step("plan", [*confkd, "plan", "-d", str(ID), "-c", "2d", "-np", "2", "-npfp", "2"])
    if CONFIGURATION not in json.loads((preprocessed / "nnUNetPlans.json").read_text())["configurations"]:
        from nnunet_confkd.data.small_configuration import add_small_configuration

        add_small_configuration(
            preprocessed / "nnUNetPlans.json",
            CONFIGURATION,
            "2d",
            {"epochs": 1, "iterations_per_epoch": 5, "seed": 0},
            features=(4, 8, 8),
            batch_size=4,
            max_patch=256,
            convolutions=1,
        )
        table = json.loads((preprocessed / "dataset.json").read_text())["supervision"]
        full = sorted(case for case, kind in table.items() if kind == "full")  # the first of which train
        (preprocessed / "splits_final.json").write_text(json.dumps([
            {"train": [*full[:NUM_FULL], *sorted(set(table) - set(full))], "val": full[NUM_FULL:]}]))
    step("loader", [*python, LOADER.format(dataset=DATASET, configuration=CONFIGURATION)])
    step("train", [*confkd, "train", str(ID), CONFIGURATION, "0", "-device", "cpu"])
    step(
        "evaluate",
        [*confkd, "evaluate", "--truth", str(Path(os.environ["nnUNet_raw"]) / DATASET / "labelsTr"),
         "--prediction", str(model / "fold_0" / "validation"), "-d", str(ID), "--subset", "--processes", "2"],
    )
    step("report", [*confkd, "report", "--model", str(model), "-device", "cpu"])
    step(
        "complete",
        [*confkd, "complete", "-d", str(ID), "--model", str(model), "--id", str(ID + 1),
         "-device", "cpu", "--processes", "2"],
    )
    return done


# ---- the table ------------------------------------------------------------------------------------------------------

def table_of(result: dict) -> str:
    sizes, counts = list(result["runs"]), result["cases"]
    lines = [
        "| command | " + " | ".join(sizes) + f" | slope of memory, {counts[0]} to {counts[-1]} cases |",
        "|" + "---|" * (len(sizes) + 2),
    ]
    for command in COMMANDS:
        runs = [result["runs"][size][command] for size in sizes]
        few, many = (result["runs"][f"{n} cases"][command]["peak_mib"] for n in (counts[0], counts[-1]))
        slope = round(1024 * (many - few) / (counts[-1] - counts[0]))
        lines.append(
            f"| {command} | "
            + " | ".join(f"{r['seconds']:.0f} s, {r['peak_mib']:.0f} MiB" for r in runs)
            + f" | {slope} KiB a case |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs=2, default=(100, 1000))
    parser.add_argument("--work", type=Path, help="folder to keep what is finished in; default: a temporary one")
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "2", "nnUNet_compile": "false"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = {f"{n} cases": measure(f"cases_{n}", n, folder) for n in args.cases}
    result = {
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "cases": list(args.cases),
        "runs": runs,
    }
    (args.output or ROOT / "benchmarks" / "sizes.json").write_text(json.dumps(result, indent=1))
    text = f"{result['machine']}; commands with two processes.\n\n{table_of(result)}"
    print(text)
    if not args.output:
        from step_time import insert
        insert(ROOT / "docs" / "explanation" / "data_performance.md", "sizes", text)


if __name__ == "__main__":
    main()
