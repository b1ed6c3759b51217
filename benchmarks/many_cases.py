"""Measure the start of a training on very many cases and the cost of stratified batches, against stock nnU-Net.

    python benchmarks/many_cases.py [--cases 10000]

The script generates tiny preprocessed cases, of which one in a hundred is fully annotated. It then measures
`get_dataloaders` of stock nnU-Net, of ConfKDTrainer for the first time (which reads every label), and of
ConfKDTrainer again (which finds its saved counts). Batches of both loaders are drawn by turns and augmented in this
process. Batches of a few cases of real size are measured, too.

What every label costs is measured once more by turns, with cases of 117 classes and their real properties: nnU-Net
reads the case and all voxels of the label; the label alone is read; the voxels of each class are counted. These cases
are links to a few different ones, so that all files are in memory.

The script writes many_cases.json beside this file, and the table into docs/explanation/data_performance.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from step_time import PLAIN, ROOT, Case, build, by_turns, insert

TINY = Case(PLAIN, (16, 16), 8, (8, 16), 0.5)
REAL = Case(PLAIN, (64, 128, 128), 2, (8, 16), 0.5)
WARM_UP = 5
CLASSES, LABEL_SHAPE, DIFFERENT = 117, (128, 160, 160), 4


def generate(folder: Path, shape: tuple[int, ...], count: int, full_every: int) -> None:
    """Write preprocessed cases, one in `full_every` of them fully annotated.

    The other cases have a hundredth of their voxels annotated. Fully annotated cases among the first 500, at most
    half of all fully annotated ones, are for validation.
    """
    import numpy as np
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    rng = np.random.default_rng(0)
    (folder / "d").mkdir(parents=True)
    names = [f"case_{i:05d}" for i in range(count)]
    for i, name in enumerate(names):
        blocks = rng.integers(0, 3, [-(-n // 4) for n in shape])  # of 4x4x4 voxels of a class
        seg = np.kron(blocks, np.ones([4] * 3))[None, :shape[0], :shape[1], :shape[2]].astype(np.int8)
        if i % full_every:
            seg[rng.random(seg.shape) > 0.01] = 3
        where = {label: np.argwhere(seg == label)[:10000] for label in (1, 2)} | {
            (-1, 0, 1, 2): np.argwhere(seg != 3)[:10000]
        }
        nnUNetDatasetBlosc2.save_case(
            rng.normal(size=seg.shape).astype(np.float32),
            seg,
            {"class_locations": where, "spacing": [1, 1, 1]},
            str(folder / "d" / name),
        )
    held_back = names[:500:full_every][:-(-count // full_every) // 2]
    (folder / "splits_final.json").write_text(
        json.dumps([{"train": [n for n in names if n not in held_back], "val": held_back}])
    )


def measure(
    case: Case, shape: tuple[int, ...], count: int, full_every: int, turns: int, folder: Path
) -> tuple[dict, dict]:
    """Measure the seconds that each start of the loaders takes, and the times of batches drawn by turns.

    The data set is generated first and removed afterwards.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_confkd.training.trainer import ConfKDTrainer
    dataset = folder / "preprocessed" / "Dataset999_Step"
    generate(dataset, shape, count, full_every)
    seconds, loaders = {}, {}
    for name, trainer_class in (
        ("stock", nnUNetTrainer),
        ("confkd, first", ConfKDTrainer),
        ("confkd, again", ConfKDTrainer),
        ("stock, again", nnUNetTrainer),
    ):
        trainer = build(case, trainer_class, folder, "cpu")
        start = time.perf_counter()
        loaders[name], _ = trainer.get_dataloaders()
        seconds[name] = round(time.perf_counter() - start, 2)
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    ours, spent = loaders["confkd, again"].data_loader, []

    def timed(call):
        def wrapped(*args):
            start = time.perf_counter()
            value = call(*args)
            spent.append(time.perf_counter() - start)
            return value
        return wrapped

    ours.get_indices, ours.complete = timed(ours.get_indices), list(map(timed, ours.complete))
    batches = by_turns(
        {name: lambda of=loaders[name]: next(of) for name in ("stock", "confkd, again")}, "cpu", turns, warm_up=WARM_UP
    )
    batches["confkd, again"]["own_ms"] = round(1000 * sum(spent[2 * WARM_UP:]) / turns, 3)  # mean
    shutil.rmtree(dataset)
    return seconds, batches


def measure_counts(folder: Path, count: int, turns: int) -> dict[str, float]:
    """Measure the seconds to read so many cases of many classes, to read their labels alone, and to count the voxels.

    All of them use eight threads, as the start of a training does.
    """
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    import numpy as np
    import volumes
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    from nnunet_confkd.data.supervision import _read_label, annotation_counts
    names = [f"case_{i:05d}" for i in range(count)]
    for i, name in enumerate(names):
        if i >= DIFFERENT:
            for ending in (".b2nd", "_seg.b2nd", ".pkl"):
                os.link(folder / (names[i % DIFFERENT] + ending), folder / (name + ending))
            continue
        seg = volumes.organs(LABEL_SHAPE, CLASSES, i)[0].astype(np.int8)[None]
        where = DefaultPreprocessor._sample_foreground_locations(seg, list(range(1, CLASSES + 1)))
        nnUNetDatasetBlosc2.save_case(seg.astype(np.float32), seg, {"class_locations": where, "spacing": [1, 1, 1]},
                                      str(folder / name))
    dataset = nnUNetDatasetBlosc2(str(folder), names)
    labels = SimpleNamespace(all_labels=list(range(CLASSES + 1)), has_ignore_label=False)

    def in_threads(call) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: call(name) and None, names))

    ways = {"nnU-Net's read": lambda: in_threads(lambda name: np.asarray(dataset.load_case(name)[1][:]).size),
            "the label alone": lambda: in_threads(lambda name: _read_label(dataset, folder, name).size),
            "counts": lambda: annotation_counts(folder, names, labels)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - start)
    return {way: round(statistics.median(of), 2) for way, of in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--counts", action="store_true", help="only measure the counts, and keep the other rows")
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args()
    file = args.output or ROOT / "benchmarks" / "many_cases.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        os.environ |= {"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1", "nnUNet_compile": "false"}
        if args.counts:
            result = json.loads(file.read_text())
        else:
            seconds, tiny = measure(TINY, (4, 16, 16), args.cases, 100, 200, folder)
            _, real = measure(REAL, (80, 160, 160), 8, 2, 60, folder)
            batches = {f"{case.batch} of {'x'.join(map(str, case.patch))}": found
                       for case, found in ((TINY, tiny), (REAL, real))}
            result = {"cases": args.cases, "start_seconds": seconds, "batches": batches}
        (folder / "many classes").mkdir()
        result |= {"counts": measure_counts(folder / "many classes", args.cases, 3),
                   "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores"}
    file.write_text(json.dumps(result, indent=1))
    text = table_of(result)
    print(text)
    if not args.output:
        insert(ROOT / "docs" / "explanation" / "data_performance.md", "many cases", text)


def table_of(result: dict) -> str:
    seconds, batches, counts = result["start_seconds"], result["batches"], result["counts"]
    text = (
        f"{result['machine']}; {result['cases']} preprocessed cases.\n\n"
        f"| | stock | ConfKD, first time | ConfKD, from then on |\n|---|---|---|---|\n"
        f"| start of the loaders, s | {min(seconds['stock'], seconds['stock, again']):.1f} | "
        f"{seconds['confkd, first']:.1f} | {seconds['confkd, again']:.1f} |\n"
    )
    for name, of in batches.items():
        stock, ours = of["stock"], of["confkd, again"]
        text += f"| a batch of {name}, ms (median) | {stock['median_ms']:.1f} | | {ours['median_ms']:.1f} |\n"
        text += "| of which drawing cases, and what is shown to the teacher, ms (mean) | | | "
        text += f"{ours['own_ms']:.2f} |\n"
    text += (f"\n| {result['cases']} cases of {'x'.join(map(str, LABEL_SHAPE))} voxels and {CLASSES} classes | s | "
             f"times nnU-Net's read |\n|---|---|---|\n")
    for way, took in counts.items():
        text += f"| {way} | {took:.1f} | {took / next(iter(counts.values())):.2f} |\n"
    return text.rstrip()


if __name__ == "__main__":
    main()
