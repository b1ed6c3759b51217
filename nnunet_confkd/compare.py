"""Several trained models, or seeds of one, in one table and one plot: measures of their validation cases."""
from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.dataset_conversion.writer import PROCESSES, preprocessed_folder
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluate import FOREGROUND, Evaluation, _aligned, _cell, _p, _replace, _without_nan, evaluate_folders
from nnunet_confkd.json_files import read_description
from nnunet_confkd.loading import fold_folders
from nnunet_confkd.metrics import MEASURES, TOLERANCE_MM, holm, paired_statistics, statistics
from nnunet_confkd.validation import VALIDATION_FOLDERS

SHOWN = ("Dice", "HD95_mm", "ASSD_mm", "NSD")
MADE_BY = "confkd compare"


def validation_of(model: str | Path, tolerance_mm: float = TOLERANCE_MM, processes: int = PROCESSES) -> dict[str, dict]:
    """{branch: {case: {class: measures}}} of a trained model's validation cases, of all its folds together.

    model: a folder TRAINER__PLANS__CONFIGURATION. The truth is what nnU-Net keeps in `gt_segmentations` of the preprocessed data.
    A case validated in several folds (of separate splits) counts with the mean of its measures.
    Raises InputError where there is no validation, or no truth.
    """
    model = Path(model)
    folds = fold_folders(model)
    truth = preprocessed_folder() / model.resolve().parent.name / "gt_segmentations"
    if not truth.is_dir():
        raise InputError(f"{truth}: there is no such folder; the true labels of {model} were expected there (nnUNet_preprocessed)")
    described = read_description(model / "dataset.json", ["labels"])
    labels = {name: of for name, of in described["labels"].items() if name != "ignore" and of != 0}
    texts = {name: ",".join(map(str, of)) if isinstance(of, (list, tuple)) else str(of) for name, of in labels.items()}
    found: dict[str, dict] = {}
    for fold in folds:
        for branch, name in VALIDATION_FOLDERS.items():
            folder = fold / name
            if branch != "student" and not folder.is_dir():
                continue  # one branch only
            if not folder.is_dir():
                raise InputError(f"{folder}: there is no such folder: the training did not end. Run it to its end, or its validation "
                                 f"(nnUNetv2_train ... --val)")
            evaluation = _evaluated(truth, folder, list(texts.values()), described["labels"].get("ignore"), tolerance_mm, processes)
            for case, of in evaluation.cases.items():
                named = {name: of[text] for name, text in texts.items()}
                found.setdefault(branch, {}).setdefault(case, []).append(named)
    return {branch: {case: _mean_of(several) for case, several in cases.items()} for branch, cases in found.items()}


def _evaluated(truth: Path, folder: Path, labels: list[str], ignore_label: int | None, tolerance_mm: float, processes: int) -> Evaluation:
    try:
        return evaluate_folders(truth, folder, labels=labels, ignore_label=ignore_label, tolerance_mm=tolerance_mm, subset=True,
                                processes=processes)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _mean_of(several: list[dict]) -> dict:
    if len(several) == 1:
        return several[0]
    return {name: {m: statistics([of[name][m] for of in several])["mean"] for m in MEASURES} for name in several[0]}


def compare_models(models: list[str | Path], tolerance_mm: float = TOLERANCE_MM, processes: int = PROCESSES) -> dict:
    """A row a model and branch: statistics per class and of the foreground (a case's mean over its classes), and the paired difference
    of the Dice to the first row, over the cases that both have.

    Raises InputError where a model cannot be read, or two do not segment the same classes.
    """
    names = _short_names([Path(model) for model in models])
    rows: list[dict[str, Any]] = []
    for name, model in zip(names, models):
        for branch, cases in validation_of(model, tolerance_mm, processes).items():
            classes = list(next(iter(cases.values())))
            if rows and classes != rows[0]["classes"]:
                raise InputError(f"{model} segments {', '.join(classes)}, and {models[0]} {', '.join(rows[0]['classes'])}; models of the same "
                                 f"classes can be compared")
            foreground = {case: {m: statistics([of[c][m] for c in classes])["mean"] for m in MEASURES} for case, of in cases.items()}
            rows.append({"name": name, "model": str(model), "branch": branch, "classes": classes, "cases": cases, "foreground": foreground,
                         "statistics": {c: {m: statistics([of[c][m] for of in cases.values()]) for m in MEASURES} for c in classes}
                         | {FOREGROUND: {m: statistics([of[m] for of in foreground.values()]) for m in MEASURES}}})
    first = rows[0]["foreground"]
    for row in rows[1:]:
        common = [case for case in first if case in row["foreground"]]
        row["difference"] = paired_statistics([row["foreground"][case]["Dice"] for case in common],
                                              [first[case]["Dice"] for case in common]) if common else None
    corrected = holm([row["difference"]["p"] for row in rows[1:] if row["difference"]])
    for row, p in zip((row for row in rows[1:] if row["difference"]), corrected):
        row["difference"]["p_holm"] = p
    return {"made_by": MADE_BY, "tolerance_mm": tolerance_mm, "rows": rows}


def _short_names(models: list[Path]) -> list[str]:
    """Of each folder what tells it from the others: the folders on its way, and the parts of its name, that not all of them share."""
    models = [model.resolve() for model in models]
    if len(set(models)) < len(models):
        raise InputError("a model was named twice")
    if len(models) == 1:
        return [models[0].name]
    parts = [[*model.parts[:-1], *model.name.split("__")] for model in models]
    shared = set.intersection(*map(set, parts))
    names = ["/".join(part for part in of if part not in shared) for of in parts]
    return names if all(names) and len(set(names)) == len(names) else [str(model) for model in models]


def text_of(found: dict) -> str:
    lines = [["model", "branch", "n", *(m.replace("_", " ") for m in SHOWN), "Dice - first row's", "p (Holm)"]]
    for row in found["rows"]:
        of, difference = row["statistics"][FOREGROUND], row.get("difference")
        lines.append([row["name"], row["branch"], str(of["Dice"]["n"]), *(_cell(of[m], MEASURES[m]) for m in SHOWN),
                      _cell(difference, 3, sign=True) if difference else "", _p(difference["p_holm"]) if difference else ""])
    return "\n".join(["Validation cases, a case's mean over its classes; means with 95 % intervals (bootstrap over cases); differences paired "
                      "by case (Wilcoxon)", "", *_aligned(lines)])


def plot(found: dict, file: Path) -> None:
    """Dice of every case, its mean and interval, a line a model and branch."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = found["rows"]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.45 * len(rows)), layout="constrained")
    rng = np.random.default_rng(0)
    for at, row in enumerate(rows):
        of = row["statistics"][FOREGROUND]["Dice"]
        student = row["branch"] == "student"
        color = "#0072B2" if student else "#D55E00"
        dice = [case["Dice"] for case in row["foreground"].values()]
        axis.plot(dice, at + rng.uniform(-0.16, 0.16, len(dice)), ".", color=color, alpha=0.35, markersize=4)
        if not math.isnan(of["ci_low"]):
            axis.plot([of["ci_low"], of["ci_high"]], [at, at], color="black", linewidth=2)
        axis.plot(of["mean"], at, "o" if student else "s", color="black", markerfacecolor=color, markersize=8)
    # names are the user's: no mathematics
    axis.set_yticks(range(len(rows)), [f"{row['name']}, {row['branch']}".replace("$", r"\$") for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("Dice of the validation cases, with mean and 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def write(found: dict, output: str | Path) -> list[Path]:
    """comparison.json, comparison.txt and comparison.png. Raises InputError where files of that name are something else's."""
    output = Path(output)
    files = [output / f"comparison.{ending}" for ending in ("json", "txt", "png")]
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(file.exists() for file in files):
            try:
                ours = json.loads(files[0].read_text(encoding="utf-8"))["made_by"] == MADE_BY
            except (OSError, ValueError, KeyError, TypeError):
                ours = False
            if not ours:
                raise InputError(f"{output}: holds a comparison.* of something else; give another --output")
        aside = output / f".comparison.{os.getpid()}.png"
        plot(found, aside)
        os.replace(aside, files[2])
        _replace(files[1], text_of(found) + "\n")
        _replace(files[0], json.dumps(_without_nan(found), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{output}: cannot be written to ({error.strerror}); give another --output") from error
    return files


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd compare", description=(
        "Put trained models, or seeds of one, into one table and one plot: measures of the validation cases of all folds, of the student and, where "
        "there is one, of the teacher; differences to the first, paired by case."))
    parser.add_argument("models", nargs="+", metavar="MODEL", help="TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE_MM, metavar="MM", help=f"of the NSD; default {TOLERANCE_MM:g}")
    parser.add_argument("--output", metavar="FOLDER", help="write comparison.json, .txt and .png there")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    args = parser.parse_args(argv)
    found = compare_models(args.models, args.tolerance, args.processes)
    print(text_of(found))
    if args.output:
        print("\nwritten: " + ", ".join(map(str, write(found, args.output))))
