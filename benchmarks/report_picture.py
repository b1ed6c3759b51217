"""The screenshot of the report in docs/how-to/report.md.

A model is trained on MSD Hippocampus. The screenshot has two views of its report.

The demo's small 2-D network is trained on the CPU for 40 epochs of 120 iterations. It has 5 fully annotated, 30
point-labelled and 10 unlabelled training cases, and 20 validation cases. A model or report that is already in the work
folder is used again. Install the browser with `npm install puppeteer-core @sparticuz/chromium` in its folder.

    python benchmarks/report_picture.py --data .../hippocampus --work FOLDER --browser FOLDER --output docs/report.png
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

DATASET = "Dataset901_Hippocampus"
LIMITS = {"test": 2, "validation": 20, "full": 5, "unlabelled": 10, "partial": 30}
# The KL is asked for, because with points the trainer would choose to have no teacher.
CONFKD = {"epochs": 40, "iterations_per_epoch": 120, "seed": 0, "weight_kl": 3.0}
HEIGHT = 2055  # of both views, in pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="imagesTr and labelsTr of MSD Task04")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--browser", type=Path, required=True, help="the folder that holds node_modules")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    work = args.work.resolve()
    os.environ.update({f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")})
    os.environ["nnUNet_n_proc_DA"] = "1"
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
    model = work / "results" / DATASET / "ConfKDTrainer__nnUNetPlans__2d_small"
    if not (model / "fold_0" / "validation" / "summary.json").is_file():
        train(args.data.resolve(), work)

    from nnunet_confkd.report.report import report
    page = work / "report" / "report.html"
    if not page.is_file():
        report(model, output=page.parent)
    take(args.browser, page, work, args.output)


def train(data: Path, work: Path) -> None:
    import torch
    from nnunetv2.run.run_training import run_training

    from nnunet_confkd.data.small_configuration import add_small_configuration
    from nnunet_confkd.demo.data import import_dataset
    from nnunet_confkd.demo.demo import plan_and_preprocess
    from nnunet_confkd.discovery import make_findable

    source = work / "source"  # with the classes' names
    for name in ("imagesTr", "labelsTr"):
        shutil.copytree(data / name, source / name)
    (source / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "labels": {
        "0": "background", "1": "anterior", "2": "posterior"}}))
    cases = import_dataset(source, int(DATASET[7:10]), DATASET[11:], seed=0, limits=LIMITS, style="points")
    plan_and_preprocess(int(DATASET[7:10]), ["2d"])
    preprocessed = work / "preprocessed" / DATASET
    training = sorted([*cases["full"], *cases["partial"], *cases["unlabelled"]])
    split = {"train": training, "val": sorted(cases["validation"])}
    (preprocessed / "splits_final.json").write_text(json.dumps([split]))
    add_small_configuration(preprocessed / "nnUNetPlans.json", "2d_small", "2d", CONFKD)
    make_findable()
    torch.set_num_threads(1)
    run_training(DATASET, "2d_small", 0, "ConfKDTrainer", device=torch.device("cpu"))


def take(browser: Path, page: Path, work: Path, output: Path) -> None:
    """Desktop in light and phone in dark, side by side."""
    from PIL import Image

    views = []
    for name, width, scale, scheme in (("desktop", 1180, 1, "light"), ("phone", 375, 1.2, "dark")):
        file, script = work / f"{name}.png", Path(__file__).with_suffix(".mjs").with_stem("report_screenshot").resolve()
        subprocess.run(["node", script, page.resolve(), file, *map(str, (width, int(HEIGHT / scale), scale)), scheme],
                       cwd=browser, check=True, timeout=120)
        views.append(Image.open(file).convert("RGB").crop((0, 0, round(width * scale), HEIGHT)))
    picture = Image.new("RGB", (sum(view.width for view in views), HEIGHT))
    left = 0
    for view in views:
        picture.paste(view, (left, 0))
        left += view.width
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":  # nnU-Net starts processes
    main()
