"""Several trained models, or seeds of one, in one table and one plot: measures of their validation cases."""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.data.folders import preprocessed_folder
from nnunet_confkd.data.json_files import read_description, read_record, split_of_fold
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.evaluate import FOREGROUND, PATTERN_HELP, Evaluation, evaluate_folders, patients_by
from nnunet_confkd.evaluation.metrics import MEASURES, TOLERANCE_MM, count_of, holm, paired_statistics, statistics
from nnunet_confkd.evaluation.tables import aligned, cell, p_text, without_nan
from nnunet_confkd.files import write_text, written_whole
from nnunet_confkd.inference.checkpoints import fold_folders
from nnunet_confkd.processes import PROCESSES
from nnunet_confkd.training.validation import VALIDATION_FOLDERS

SHOWN = ("Dice", "HD95_mm", "ASSD_mm", "NSD")
MADE_BY = "confkd compare"


def validation_of(model: str | Path, tolerance_mm: float = TOLERANCE_MM, processes: int = PROCESSES) -> tuple[dict[str, dict], list[str]]:
    """Measure the validation cases of a trained model, of all its folds together.

    Only cases that the training validated, and that are fully annotated, count: `confkd.json` in the fold's folder names them, of a
    stock model `splits_final.json` in nnUNet_preprocessed. Where neither does, every prediction in the validation folder counts.
    Where no case of a model is fully annotated, all of them count. A case that several folds validate counts with the mean
    of its measures.

    Args:
        model: The folder TRAINER__PLANS__CONFIGURATION. The truth is in `gt_segmentations` of the preprocessed data.
        tolerance_mm: Tolerance of the NSD.
        processes: Number of processes.

    Returns:
        {branch: {case: {class: measures}}}, and what the reader must know about the choice of the cases, a sentence each.

    Raises:
        InputError: There is no validation, no truth, or no prediction of a validation case.
    """
    model = Path(model)
    folds = fold_folders(model)
    preprocessed = preprocessed_folder() / model.resolve().parent.name
    truth = preprocessed / "gt_segmentations"
    if not truth.is_dir():
        raise InputError(f"{truth}: there is no such folder; the true labels of {model} were expected there (nnUNet_preprocessed)")
    described = read_description(model / "dataset.json", ["labels", "file_ending"])
    labels = {name: of for name, of in described["labels"].items() if name != "ignore" and of != 0}
    texts = {name: ",".join(map(str, of)) if isinstance(of, (list, tuple)) else str(of) for name, of in labels.items()}
    found: dict[str, dict] = {}
    notes: list[str] = []
    partly: set[str] = set()
    for fold in folds:
        training, validation = _cases_of_fold(fold, preprocessed / "splits_final.json")
        if training is None:
            notes.append(f"{fold.name}: " + ("stock nnU-Net validates its training cases in fold 'all'" if fold.name == "fold_all" else
                         "neither confkd.json nor splits_final.json tells its validation cases; all predictions in its validation folder "
                         "count"))
        for branch, name in VALIDATION_FOLDERS.items():
            folder = fold / name
            if branch != "student" and not folder.is_dir():
                continue  # one branch only
            if not folder.is_dir():
                raise InputError(f"{folder}: there is no such folder: the training did not end. Run it to its end, or its validation "
                                 f"(nnUNetv2_train ... --val)")
            there = {file.name.removesuffix(described["file_ending"]) for file in folder.glob(f"*{described['file_ending']}")}
            wanted = there if validation is None else there & set(validation)
            if there and not wanted:
                raise InputError(f"{folder}: none of its {len(there)} cases is a validation case of this fold. Run the validation again "
                                 f"(nnUNetv2_train ... --val)")
            for text, cases in (("predictions of other cases than this fold validates are left out", there - wanted),
                                ("validation cases have no prediction", set(validation or ()) - there),
                                ("counted cases are training cases as well", wanted & set(training or ()))):
                if cases:
                    notes.append(f"{fold.name}/{name}: {len(cases)} {text}: {', '.join(sorted(cases))}")
            evaluation = _evaluated(truth, folder, list(texts.values()), described["labels"].get("ignore"), tolerance_mm, wanted, processes)
            partly.update(evaluation.partly_annotated)
            for case, of in evaluation.cases.items():
                named = {name: of[text] for name, text in texts.items()}
                found.setdefault(branch, {}).setdefault(case, []).append(named)
    cases = {case for of in found.values() for case in of}
    if partly and partly < cases:
        notes.append(f"{len(partly)} validation cases are only partly annotated and left out: {', '.join(sorted(partly))}")
        found = {branch: {case: several for case, several in of.items() if case not in partly} for branch, of in found.items()}
    elif partly:
        notes.append("no validation case is fully annotated; the measures count the annotated voxels alone")
    return {branch: {case: _mean_of(several) for case, several in cases.items()} for branch, cases in found.items()}, notes


def _cases_of_fold(fold: Path, splits_file: Path) -> tuple[list[str] | None, list[str] | None]:
    """Its training and validation cases; None where nobody knows."""
    if (fold / "confkd.json").is_file():
        record = read_record(fold / "confkd.json")
        return list(record["supervision"]), record["pseudo_dice_on"]
    name = fold.name.removeprefix("fold_")
    split = split_of_fold(splits_file, name)
    return (None, None) if split is None else (split["train"], split["val"])


def _evaluated(truth: Path, folder: Path, labels: list[str], ignore_label: int | None, tolerance_mm: float, cases: set[str],
               processes: int) -> Evaluation:
    try:
        return evaluate_folders(truth, folder, labels=labels, ignore_label=ignore_label, tolerance_mm=tolerance_mm, subset=True,
                                cases=cases or None, processes=processes)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _mean_of(several: list[dict]) -> dict:
    if len(several) == 1:
        return several[0]
    return {name: {m: statistics([of[name][m] for of in several])["mean"] for m in MEASURES} for name in several[0]}


def compare_models(models: list[str | Path], tolerance_mm: float = TOLERANCE_MM, patient_pattern: str | None = None,
                   processes: int = PROCESSES) -> dict:
    """Put models side by side, over the validation cases that all of them and all their branches share.

    Args:
        models: Folders TRAINER__PLANS__CONFIGURATION.
        tolerance_mm: Tolerance of the NSD.
        patient_pattern: A regular expression whose first group in the name of a case is the patient. None: that of the models'
            dataset.json, and without one every case is a patient.
        processes: Number of processes.

    Returns:
        `rows`, one for each model and branch: statistics of each class and of the foreground (a case's mean over its classes) over
        the common cases, and the paired difference of the Dice to the first row; `patients` of the common cases; `notes`.

    Raises:
        InputError: A model cannot be read, two do not segment the same classes, have no case in common, or name patients differently.
    """
    names = _short_names([Path(model) for model in models])
    rows: list[dict[str, Any]] = []
    notes, patterns = [], set()
    for name, model in zip(names, models):
        branches, of_model = validation_of(model, tolerance_mm, processes)
        notes += [f"{name}, {note}" for note in of_model]
        patterns.add(read_description(Path(model) / "dataset.json", ["labels"]).get("patient_pattern"))
        for branch, cases in branches.items():
            classes = list(next(iter(cases.values())))
            if rows and classes != rows[0]["classes"]:
                raise InputError(f"{model} segments {', '.join(classes)}, and {models[0]} {', '.join(rows[0]['classes'])}; models of the same "
                                 f"classes can be compared")
            foreground = {case: {m: statistics([of[c][m] for c in classes])["mean"] for m in MEASURES} for case, of in cases.items()}
            rows.append({"name": name, "model": str(model), "branch": branch, "classes": classes, "n": len(cases), "cases": cases,
                         "foreground": foreground})
    common = [case for case in rows[0]["cases"] if all(case in row["cases"] for row in rows)]
    if not common:
        raise InputError("no validation case is common to all of them, so there is nothing to compare: " + "; ".join(
            f"{row['name']}, {row['branch']}: {', '.join(sorted(row['cases']))}" for row in rows))
    if any(row["n"] > len(common) for row in rows):
        notes.insert(0, f"the rows do not have the same cases; every figure is over the {len(common)} that all of them have")
    if patient_pattern is None and len(patterns - {None}) > 1:
        raise InputError(f"the models' dataset.json name patients differently ({', '.join(sorted(patterns - {None}))}); give the right "
                         f"pattern with --patient-pattern")
    of_case = patients_by(patient_pattern or next(iter(patterns - {None}), None), common)
    patients = list(of_case.values())

    def values(row: dict, name: str, measure: str) -> list[float]:
        return [row["foreground"][case][measure] if name == FOREGROUND else row["cases"][case][name][measure] for case in common]

    for row in rows:
        row["statistics"] = {name: {m: statistics(values(row, name, m), patients) for m in MEASURES} for name in (*row["classes"], FOREGROUND)}
    for row in rows[1:]:
        row["difference"] = paired_statistics(values(row, FOREGROUND, "Dice"), values(rows[0], FOREGROUND, "Dice"), patients)
    for row, p in zip(rows[1:], holm([row["difference"]["p"] for row in rows[1:]])):
        row["difference"]["p_holm"] = p
    return {"made_by": MADE_BY, "tolerance_mm": tolerance_mm, "notes": notes, "patients": of_case, "rows": rows}


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
    lines = [["model", "branch", "n", "n in common", *(m.replace("_", " ") for m in SHOWN), "Dice - first row's", "p (Holm)"]]
    common = found["patients"]
    for row in found["rows"]:
        of, difference = row["statistics"][FOREGROUND], row.get("difference")
        lines.append([row["name"], row["branch"], str(row["n"]), str(len(common)), *(cell(of[m], MEASURES[m]) for m in SHOWN),
                      cell(difference, 3, sign=True) if difference else "", p_text(difference["p_holm"]) if difference else ""])
    return "\n".join([f"Validation cases, a case's mean over its classes. Means over the {count_of(len(common), len(set(common.values())))}, "
                      f"that all rows have in common; 95 % intervals (bootstrap over the patients); differences paired by case, tested by "
                      f"patient (Wilcoxon).", "", *aligned(lines), *(f"WARNING: {note}." for note in found["notes"])])


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
        dice = [row["foreground"][case]["Dice"] for case in found["patients"]]
        axis.plot(dice, at + rng.uniform(-0.16, 0.16, len(dice)), ".", color=color, alpha=0.35, markersize=4)
        if not math.isnan(of["ci_low"]):
            axis.plot([of["ci_low"], of["ci_high"]], [at, at], color="black", linewidth=2)
        axis.plot(of["mean"], at, "o" if student else "s", color="black", markerfacecolor=color, markersize=8)
    # names are the user's: no mathematics
    axis.set_yticks(range(len(rows)), [f"{row['name']}, {row['branch']}".replace("$", r"\$") for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("Dice of the validation cases that all have, with mean and 95 % interval")
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
        with written_whole(files[2]) as aside:
            plot(found, aside)
        write_text(files[1], text_of(found) + "\n")
        write_text(files[0], json.dumps(without_nan(found), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"{output}: cannot be written to ({error.strerror}); give another --output") from error
    return files


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd compare", description=(
        "Put trained models, or seeds of one, into one table and one plot: measures of the validation cases of all folds, of the student and, where "
        "there is one, of the teacher, over the cases that all of them have; differences to the first, paired by case."))
    parser.add_argument("models", nargs="+", metavar="MODEL", help="TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE_MM, metavar="MM", help=f"of the NSD; default {TOLERANCE_MM:g}")
    parser.add_argument("--patient-pattern", metavar="REGEX", help=PATTERN_HELP.format("the models'"))
    parser.add_argument("--output", metavar="FOLDER", help="write comparison.json, .txt and .png there")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    args = parser.parse_args(argv)
    found = compare_models(args.models, args.tolerance, args.patient_pattern, args.processes)
    print(text_of(found))
    if args.output:
        print("\nwritten: " + ", ".join(map(str, write(found, args.output))))
