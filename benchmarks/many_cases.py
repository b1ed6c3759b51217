"""The start of a training on very many cases, and what stratified drawing costs a batch, against stock nnU-Net.

    python benchmarks/many_cases.py [--cases 10000]

Generates tiny preprocessed cases, a hundredth of them full; then, in this process: `get_dataloaders` of stock nnU-Net, of ConfKDTrainer for the
first time (which reads every label) and again (which finds its counts), and batches of both loaders by turns, without augmentation
processes. Writes many_cases.json beside this file, and its table into docs/performance.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

from step_time import PLAIN, ROOT, Case, build, by_turns, insert

CASE = Case(PLAIN, (16, 16), 8, (8, 16), 0.5)


def generate(folder: Path, count: int) -> None:
    """Preprocessed cases of 4x16x16 voxels: every hundredth full, the others with a dozen annotated voxels."""
    import numpy as np
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        seg = rng.integers(0, 3, (1, 4, 16, 16)).astype(np.int8)
        if i % 100:
            seg[rng.random(seg.shape) > 0.01] = 3
        where = {label: np.argwhere(seg == label) for label in (1, 2)} | {(-1, 0, 1, 2): np.argwhere(seg != 3)}
        nnUNetDatasetBlosc2.save_case(rng.normal(size=(1, 4, 16, 16)).astype(np.float32), seg, {"class_locations": where, "spacing": [1, 1, 1]},
                                      str(folder / f"case_{i:05d}"))


def start_of(trainer_class, folder: Path):
    """Seconds until the first batch, and the training loader."""
    trainer = build(CASE, trainer_class, folder, "cpu")
    start = time.perf_counter()
    loader, _ = trainer.get_dataloaders()
    return time.perf_counter() - start, loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        os.environ |= {"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1", "nnUNet_compile": "false"}
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        from nnunet_confkd.trainer import ConfKDTrainer
        dataset = folder / "preprocessed" / "Dataset999_Step"
        generate(dataset / "d", args.cases)
        names = [f"case_{i:05d}" for i in range(args.cases)]
        # the first thousand cases hold ten full ones, of which five validate
        held_back = names[:500:100]
        (dataset / "splits_final.json").write_text(json.dumps([{"train": [n for n in names if n not in held_back], "val": held_back}]))
        seconds, loaders = {}, {}
        for name, trainer_class in (("stock", nnUNetTrainer), ("confkd, first", ConfKDTrainer), ("confkd, again", ConfKDTrainer),
                                    ("stock, again", nnUNetTrainer)):
            seconds[name], loaders[name] = start_of(trainer_class, folder)
            print(f"{name}: {seconds[name]:.1f} s", flush=True)
        batches = by_turns({name: lambda of=loaders[name]: next(of) for name in ("stock", "confkd, again")}, "cpu", 200, warm_up=20)
    result = {"cases": args.cases, "start_seconds": {k: round(v, 2) for k, v in seconds.items()}, "batch": batches,
              "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores"}
    (args.output or ROOT / "benchmarks" / "many_cases.json").write_text(json.dumps(result, indent=1))
    stock, ours = (batches[name]["median_ms"] for name in ("stock", "confkd, again"))
    text = (f"{result['machine']}; {args.cases} preprocessed cases.\n\n| | stock | ConfKD, first time | ConfKD, from then on |\n|---|---|---|---|\n"
            f"| start of the loaders, s | {min(seconds['stock'], seconds['stock, again']):.1f} | {seconds['confkd, first']:.1f} | "
            f"{seconds['confkd, again']:.1f} |\n| a batch of {CASE.batch}, ms (median) | {stock:.2f} | | {ours:.2f} |")
    print(text)
    if not args.output:
        insert(ROOT / "docs" / "performance.md", "many cases", text)


if __name__ == "__main__":
    main()
