"""Measure what converting and weakening ACDC cost beyond reading and writing the files.

Each command is compared with a bare loop over the same files: SimpleITK reads every image and label, images and
unchanged labels are copied, and weak labels are written. Command and loop alternate in one process with a warm file
cache. The table shows medians of the repetitions. Images are copied, not linked.

    python benchmarks/conversion_speed.py --acdc .../acdc --scribbles .../acdc_scribbles
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

import SimpleITK as sitk

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- speed: written by benchmarks/conversion_speed.py -->"


def bare_loop(images: list[Path], labels: list[Path], target: Path, rewrite_labels: bool) -> None:
    """The least that such a conversion could do."""
    target.mkdir()
    for file in images:
        sitk.ReadImage(str(file))
        shutil.copyfile(file, target / file.name)
    for file in labels:
        label = sitk.ReadImage(str(file))
        if rewrite_labels:
            sitk.WriteImage(label, str(target / file.name), True)
        else:
            shutil.copyfile(file, target / file.name)


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--acdc", type=Path, required=True)
    parser.add_argument("--scribbles", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()

    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # printing them would be most of the bare loop
    with tempfile.TemporaryDirectory() as work:
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(Path(work) / name)
        from nnunet_confkd.dataset_conversion import acdc

        from nnunet_confkd import __version__
        from nnunet_confkd.data.weaken import weaken_dataset

        source = acdc.convert(args.acdc, 1, name="Full", processes=1)
        images, labels = sorted((source / "imagesTr").iterdir()), sorted((source / "labelsTr").iterdir())
        times: dict[str, list[float]] = {}

        def measure(name: str, function) -> None:
            times.setdefault(name, []).append(seconds(function))
            shutil.rmtree(Path(work) / "bare", ignore_errors=True)
            for folder in ("raw", "preprocessed"):
                shutil.rmtree(next((Path(work) / folder).glob("Dataset002_*"), Path(work) / "none"), ignore_errors=True)

        weak = {"erosion": 3, "scribbles": 3, "points": 3}
        for _ in range(args.repetitions):
            measure("convert, bare loop", lambda: bare_loop(images, labels, Path(work) / "bare", rewrite_labels=False))
            measure("convert", lambda: acdc.convert(args.acdc, 2, scribbles=args.scribbles, full=["3"], processes=1))
            measure("weaken, bare loop", lambda: bare_loop(images, labels, Path(work) / "bare", rewrite_labels=True))
            for style in weak:
                measure(f"weaken {style}", lambda: weaken_dataset(1, 2, full=["3"], style=style, processes=1))

    median = {name: round(statistics.median(values), 3) for name, values in times.items()}
    ours = {name: round(1 - median[f"{name.split()[0]}, bare loop"] / value, 3)
            for name, value in median.items() if "bare" not in name}
    result = {
        "cases": len(images),
        "repetitions": args.repetitions,
        "median_seconds": median,
        "our_share": ours,
        "seconds": {name: [round(v, 3) for v in values] for name, values in times.items()},
        "versions": {
            "nnunet_confkd": __version__,
            "SimpleITK": sitk.Version_VersionString(),
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
    }
    (ROOT / "benchmarks" / "conversion_speed.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = ["| 200 ACDC volumes, one process | seconds | of that not reading and writing |", "|---|---|---|"]
    lines += [
        f"| {name} | {value:.1f} | {f'{ours[name]:.0%}' if name in ours else ''} |" for name, value in median.items()
    ]
    page = ROOT / "docs" / "explanation" / "data_performance.md"
    before, _, after = page.read_text().partition(MARK)
    page.write_text(before + MARK + "\n" + "\n".join(lines) + "\n" + "".join(after.split("\n\n", 1)[1:]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
