"""Compare trained models, or seeds of one, by their validation cases: `confkd compare`."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.colours import BRANCH_COLOURS
from nnunet_confkd.data.annotated_classes import unlisted_classes
from nnunet_confkd.data.folders import preprocessed_folder
from nnunet_confkd.data.images import read
from nnunet_confkd.data.json_files import read_description, read_record, split_of_fold
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.evaluation.evaluate import (
    DISTANCES,
    INTERVALS,
    Evaluation,
    evaluate_folders,
    patients_by,
)
from nnunet_confkd.evaluation.metrics import (
    FOREGROUND,
    MEASURES,
    TOLERANCE_MM,
    CaseMeasures,
    defined_mean,
    holm,
    paired_statistics,
)
from nnunet_confkd.evaluation.output import write_results
from nnunet_confkd.evaluation.tables import aligned, cases_text, mean_text, p_value_text, without_nan
from nnunet_confkd.inference.checkpoints import fold_folders
from nnunet_confkd.processes import PROCESSES
from nnunet_confkd.training.names import VALIDATION_FOLDERS

TABLE_MEASURES = ("Dice", "HD95_mm", "ASSD_mm", "NSD")
MADE_BY = "confkd compare"


# ---- the validation of a model --------------------------------------------------------------------------------------

@dataclass
class Validation:
    """The measures of a trained model's validation cases.

    Attributes:
        classes: The names of the classes or regions.
        cases: {branch: {case: {class: {measure: value}}}}.
        notes: What the reader must know about the choice of the cases, a sentence each.
        unlisted: {case: classes that it is not annotated for}. Their measures are NaN.
        truth: The folder of the ground truth.
        file_ending: That of its files.
    """
    classes: list[str]
    cases: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unlisted: dict[str, set[str]] = field(default_factory=dict)
    truth: Path = Path()
    file_ending: str = ""

    def leave_out(self, unlisted: dict[str, set[str]]) -> None:
        """Take cases out of the measures of classes that they are not annotated for, `unlisted`."""
        for cases in self.cases.values():
            for case in cases.keys() & unlisted.keys():
                cases[case] |= {name: dict.fromkeys(MEASURES, math.nan) for name in unlisted[case]}


def validation_of(model: str | Path, tolerance_mm: float = TOLERANCE_MM, processes: int = PROCESSES) -> Validation:
    """Measure the validation cases of a trained model, of all its folds together.

    Only cases count that the training validated and that are fully annotated. `confkd.json` in the fold's folder names
    them; for a stock model, `splits_final.json` in nnUNet_preprocessed does. If neither is there, every prediction in
    the validation folder counts. If no case of a model is fully annotated, all of them count. A case that several folds
    validate counts with the mean of its measures. A class counts only in cases that are annotated for it
    (dataset.json's "annotated_classes").

    Args:
        model: The folder TRAINER__PLANS__CONFIGURATION. The ground truth is in `gt_segmentations` of the preprocessed
            data.
        tolerance_mm: Tolerance of the NSD.
        processes: Number of processes.

    Raises:
        InputError: There is no validation, no ground truth, or no prediction of a validation case.
    """
    model = Path(model)
    folds = fold_folders(model)
    preprocessed = preprocessed_folder() / model.resolve().parent.name
    truth = preprocessed / "gt_segmentations"
    if not truth.is_dir():
        raise InputError(f"{truth}: there is no such folder. The ground truth of {model} was expected there "
                         "(nnUNet_preprocessed)")
    described = read_description(model / "dataset.json", ["labels", "file_ending"])
    texts = {name: ",".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)
             for name, values in described["labels"].items() if name != "ignore" and values != 0}
    found = Validation(list(texts), unlisted=unlisted_classes(described, str(model / "dataset.json")), truth=truth,
                       file_ending=described["file_ending"])
    if len(folds) > 1 and (everything := [fold for fold in folds if fold.name == "fold_all"]):
        folds = [fold for fold in folds if fold not in everything]
        found.notes.append("fold_all is left out, because it was trained on the cases that the other folds validate")
    several: dict[str, dict[str, list[dict]]] = {}  # {branch: {case: measures of each fold}}
    partly: set[str] = set()
    for fold in folds:
        training, validation = _cases_of_fold(fold, preprocessed / "splits_final.json", found.notes)
        for branch, name in VALIDATION_FOLDERS.items():
            folder = fold / name
            if branch != "student" and not folder.is_dir():
                continue  # a model with one branch
            cases = _cases_to_measure(folder, described["file_ending"], training, validation, found.notes)
            evaluation = _evaluated(
                truth, folder, labels=list(texts.values()), ignore_label=described["labels"].get("ignore"),
                tolerance_mm=tolerance_mm, cases=cases or None, processes=processes)
            partly.update(evaluation.partly_annotated)
            for case, measures in evaluation.cases.items():
                of_case = several.setdefault(branch, {}).setdefault(case, [])
                of_case.append({name: measures[text] for name, text in texts.items()})
    excluded = _partly_annotated({case for of_branch in several.values() for case in of_branch}, partly, found.notes)
    found.cases = {branch: {case: _mean(measures) for case, measures in of_branch.items() if case not in excluded}
                   for branch, of_branch in several.items()}
    found.leave_out(found.unlisted)
    return found


def _cases_of_fold(fold: Path, splits_file: Path, notes: list[str]) -> tuple[list[str] | None, list[str] | None]:
    """Return the training and validation cases of a fold. If they are not known, return None twice and add a note."""
    if (fold / "confkd.json").is_file():
        record = read_record(fold / "confkd.json")
        return list(record["supervision"]), record["pseudo_dice_on"]
    split = split_of_fold(splits_file, fold.name.removeprefix("fold_"))
    if split is not None:
        return split["train"], split["val"]
    notes.append(f"{fold.name}: " + (
        "stock nnU-Net validates its training cases in fold 'all'" if fold.name == "fold_all" else
        "neither confkd.json nor splits_final.json names its validation cases, so all predictions in its validation "
        "folder count"))
    return None, None


def _cases_to_measure(folder: Path, ending: str, training: list[str] | None, validation: list[str] | None,
                      notes: list[str]) -> set[str]:
    """Return the predicted validation cases of a folder, and add notes on the others. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder: the training has not ended. Run it to its end, or its "
                         "validation (nnUNetv2_train ... --val)")
    predicted = {file.name.removesuffix(ending) for file in folder.glob(f"*{ending}")}
    wanted = predicted if validation is None else predicted & set(validation)
    if predicted and not wanted:
        raise InputError(f"{folder}: none of its {len(predicted)} cases is a validation case of this fold. Run the "
                         "validation again (nnUNetv2_train ... --val)")
    others = "predictions of other cases than the fully annotated ones that this fold validates are excluded"
    for text, cases in ((others, predicted - wanted),
                        ("validation cases have no prediction", set(validation or ()) - predicted),
                        ("counted cases are training cases as well", wanted & set(training or ()))):
        if cases:
            notes.append(f"{folder.parent.name}/{folder.name}: {len(cases)} {text}: {', '.join(sorted(cases))}")
    return wanted


def _evaluated(truth: Path, folder: Path, **options) -> Evaluation:
    """Measure a folder of predictions. Raises InputError, which names the folder."""
    try:
        return evaluate_folders(truth, folder, subset=True, **options)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _partly_annotated(cases: set[str], partly: set[str], notes: list[str]) -> set[str]:
    """Return the partially annotated cases, unless all cases are, and add a note."""
    if partly and partly < cases:
        notes.append(f"{len(partly)} validation cases are only partially annotated and excluded: "
                     f"{', '.join(sorted(partly))}")
        return partly
    if partly:
        notes.append("no validation case is fully annotated, so only the annotated voxels are measured")
    return set()


def _mean(several: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean of a case's measures over the folds that validate it."""
    return {name: {measure: float(defined_mean(np.array([measures[name][measure] for measures in several])))
                   for measure in MEASURES} for name in several[0]}


# ---- several models -------------------------------------------------------------------------------------------------

def compare_models(models: list[str | Path], tolerance_mm: float = TOLERANCE_MM, patient_pattern: str | None = None,
                   processes: int = PROCESSES) -> dict:
    """Compare models over the validation cases that all of them and all their branches share.

    Args:
        models: Folders TRAINER__PLANS__CONFIGURATION.
        tolerance_mm: Tolerance of the NSD.
        patient_pattern: Regular expression whose first group in the name of a case is the patient. None: that of the
            models' dataset.json; without one, every case is a patient.
        processes: Number of processes.

    Returns:
        `rows`, one for each model and branch: statistics of each class and of the foreground (a case's mean over its
        classes) over the common cases, and the paired difference of the Dice to the first row; `patients` of the common
        cases; `not_annotated`, the classes that a common case is not annotated for; `notes`.

    Raises:
        InputError: A model cannot be read. Two models do not segment the same classes, have no case in common, or name
            patients differently.

    Examples:
        >>> print(comparison_text(compare_models(["MODEL", "OTHER_MODEL"])))  # doctest: +SKIP
    """
    rows: list[dict[str, Any]] = []
    notes, patterns = [], set()
    validations = [validation_of(model, tolerance_mm, processes) for model in models]
    unlisted: dict[str, set[str]] = {}
    for validation in validations:
        unlisted |= {case: names | unlisted.get(case, set()) for case, names in validation.unlisted.items()}
    for name, model, validation in zip(_short_names([Path(model) for model in models]), models, validations):
        validation.leave_out(unlisted)  # a class counts in a case only if it does in all rows
        notes += [f"{name}, {note}" for note in validation.notes]
        patterns.add(read_description(Path(model) / "dataset.json", ["labels"]).get("patient_pattern"))
        if rows and validation.classes != rows[0]["classes"]:
            raise InputError(f"{model} segments {', '.join(validation.classes)}, and {models[0]} "
                             f"{', '.join(rows[0]['classes'])}; only models of the same classes can be compared")
        for branch, cases in validation.cases.items():
            rows.append({"name": name, "model": str(model), "branch": branch, "classes": validation.classes,
                         "n": len(cases), "cases": cases, "foreground": _foreground(validation.classes, cases)})
    common = [case for case in rows[0]["cases"] if all(case in row["cases"] for row in rows)]
    if not common:
        raise InputError("no validation case is common to all of them, so there is nothing to compare: " + "; ".join(
            f"{row['name']}, {row['branch']}: {', '.join(sorted(row['cases']))}" for row in rows))
    if any(row["n"] > len(common) for row in rows):
        notes.insert(0, "the rows do not have the same cases; every figure is over the "
                        f"{len(common)} that all of them have")
    notes[:0] = _missed(rows, common)
    notes += _notes_on_truths({of.truth: of.file_ending for of in validations}, common)
    patients = patients_by(patient_pattern or _common_pattern(patterns - {None}), common)
    _add_statistics(rows, common, patients)
    return {"made_by": MADE_BY, "tolerance_mm": tolerance_mm, "notes": notes, "patients": patients, "rows": rows,
            "not_annotated": {case: sorted(unlisted[case]) for case in common if case in unlisted}}


def _notes_on_truths(folders: dict[Path, str], cases: list[str]) -> list[str]:
    """Say in how many cases the ground truths of several data sets differ: names such as case_001 are common."""
    first, *others = sorted(folders)
    notes = []
    for other in others:
        different = [case for case in cases if not _same_truth(*(folder / f"{case}{folders[folder]}"
                                                                 for folder in (first, other)))]
        if different:
            notes.append(f"the ground truths of {len(different)} of the {len(cases)} common cases differ between "
                         f"{first} and {other}: {some(different, 3)}. If they are other patients, nothing here can be "
                         f"compared")
    return notes


def _same_truth(first: Path, other: Path) -> bool:
    """Whether two files hold the same ground truth."""
    if first.read_bytes() == other.read_bytes():
        return True
    one, two = (read(file).voxels for file in (first, other))
    return one.shape == two.shape and bool(np.array_equal(one, two))


def _foreground(classes: list[str], cases: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Return {case: {measure: mean over its classes}}."""
    measured = CaseMeasures(classes=dict.fromkeys(classes, ()), cases=cases)
    values = {measure: measured.values(FOREGROUND, measure).tolist() for measure in MEASURES}
    return {case: {measure: values[measure][i] for measure in MEASURES} for i, case in enumerate(cases)}


def _common_pattern(patterns: set[str]) -> str | None:
    if len(patterns) > 1:
        raise InputError(f"the models' dataset.json name patients differently ({', '.join(sorted(patterns))}); give "
                         "the right pattern with --patient-pattern")
    return next(iter(patterns), None)


def _add_statistics(rows: list[dict[str, Any]], common: list[str], patients: dict[str, str]) -> None:
    """Add to each row its statistics over the common cases, and the paired difference of its Dice to the first row."""
    measured = [CaseMeasures(classes=dict.fromkeys(row["classes"], ()), patients=patients,
                             cases={case: _comparable(row, rows, case) for case in common}) for row in rows]
    for row, measures in zip(rows, measured):
        row["statistics"] = {name: {measure: measures.describe(name, measure) for measure in MEASURES}
                             for name in (*row["classes"], FOREGROUND)}
    reference = measured[0].values(FOREGROUND, "Dice")
    for row, measures in zip(rows[1:], measured[1:]):
        row["difference"] = paired_statistics(measures.values(FOREGROUND, "Dice"), reference, measures.patient_of_each)
    for row, p in zip(rows[1:], holm([row["difference"]["p"] for row in rows[1:]])):
        row["difference"]["p_holm"] = p


def _comparable(row: dict[str, Any], rows: list[dict[str, Any]], case: str) -> dict[str, dict[str, float]]:
    """Return a row's measures of a case, without the distances that some row lacks: it must not gain by a miss."""
    measures = {name: dict(of_class) for name, of_class in row["cases"][case].items()}
    for name, of_class in measures.items():
        of_class |= {distance: math.nan for distance in DISTANCES
                     if any(math.isnan(other["cases"][case][name][distance]) for other in rows)}
    return measures


def _missed(rows: list[dict[str, Any]], common: list[str]) -> list[str]:
    """Say of how many classes of the common cases the distances are left out."""
    missed = {(case, name) for row in rows for case in common for name, of_class in row["cases"][case].items()
              if of_class["NSD"] == 0 and math.isnan(of_class["HD95_mm"])}
    cases = sorted({case for case, _ in missed})
    return [f"HD95 and ASSD leave out {len(missed)} class(es) of {some(cases, 3)} in all rows, because the ground "
            f"truth or a prediction has none of it"] if missed else []


def _short_names(models: list[Path]) -> list[str]:
    """Name each model by what distinguishes it: the parts of its path and of its folder's name that not all of them
    share."""
    models = [model.resolve() for model in models]
    if len(set(models)) < len(models):
        raise InputError("a model was named twice")
    if len(models) == 1:
        return [models[0].name]
    parts = [[*model.parts[:-1], *model.name.split("__")] for model in models]
    shared = set.intersection(*map(set, parts))
    names = ["/".join(part for part in of_model if part not in shared) for of_model in parts]
    return names if all(names) and len(set(names)) == len(names) else [str(model) for model in models]


# ---- output ---------------------------------------------------------------------------------------------------------

def comparison_text(found: dict) -> str:
    """Return the table of :func:`compare_models` for the terminal, with notes."""
    patients = found["patients"]
    head = ["model", "branch", "n", "n in common", *(measure.replace("_", " ") for measure in TABLE_MEASURES),
            "Dice - first row's", "p (Holm)"]
    rows = [head]
    for row in found["rows"]:
        statistics, difference = row["statistics"][FOREGROUND], row.get("difference")
        rows.append([row["name"], row["branch"], str(row["n"]), str(len(patients)),
                     *(mean_text(statistics[measure], MEASURES[measure]) for measure in TABLE_MEASURES),
                     mean_text(difference, signed=True) if difference else "",
                     p_value_text(difference["p_holm"]) if difference else ""])
    title = ("Validation cases, each with the mean over its classes. Means over the "
             f"{cases_text(len(patients), len(set(patients.values())))}, that all rows have in common, {INTERVALS}. "
             "Differences are paired by case and tested by patient (Wilcoxon).")
    return "\n".join([title, "", *aligned(rows), *_classes_text(found),
                      *(f"WARNING: {note}." for note in found["notes"])])


def _classes_text(found: dict) -> list[str]:
    """Return a table of the Dice of each class, with n, if some of the cases are not annotated for all classes."""
    rows, lacking = found["rows"], found["not_annotated"]
    classes = rows[0]["classes"]
    if not lacking:
        return []
    table = [["model", "branch", *(text for name in classes for text in (name, "n"))]]
    for row in rows:
        dice = [row["statistics"][name]["Dice"] for name in classes]
        table.append([row["name"], row["branch"], *(text for of in dice for text in (mean_text(of), str(of["n"])))])
    return ["", f"Dice of each class. {len(lacking)} of the {len(found['patients'])} cases are not annotated for all "
            f"classes, and count for their own only; n is the number of cases that count.", "", *aligned(table)]


def plot(found: dict, file: Path) -> None:
    """Draw the Dice of every case with its mean and interval, one line for each model and branch, to a PNG file."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = found["rows"]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.45 * len(rows)), layout="constrained")
    rng = np.random.default_rng(0)
    for y, row in enumerate(rows):
        statistics = row["statistics"][FOREGROUND]["Dice"]
        color = BRANCH_COLOURS[row["branch"]]
        dice = [row["foreground"][case]["Dice"] for case in found["patients"]]
        axis.plot(dice, y + rng.uniform(-0.16, 0.16, len(dice)), ".", color=color, alpha=0.35, markersize=4)
        if not math.isnan(statistics["ci_low"]):
            axis.plot([statistics["ci_low"], statistics["ci_high"]], [y, y], color="black", linewidth=2)
        marker = "o" if row["branch"] == "student" else "s"
        axis.plot(statistics["mean"], y, marker, color="black", markerfacecolor=color, markersize=8)
    labels = [f"{row['name']}, {row['branch']}".replace("$", r"\$") for row in rows]  # "$" would start a formula
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("Dice of the common validation cases, with mean and 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def write(found: dict, output: str | Path) -> list[Path]:
    """Write comparison.json, comparison.txt and comparison.png.

    Args:
        found: What :func:`compare_models` returns.
        output: The folder. It is made if it is missing.

    Returns:
        The files.

    Raises:
        InputError: The folder holds files of these names that are not of an earlier comparison, or cannot be written
            to.
    """
    return write_results(output, MADE_BY, {
        "comparison.json": json.dumps(without_nan(found), indent=1, allow_nan=False) + "\n",
        "comparison.txt": comparison_text(found) + "\n",
        "comparison.png": lambda file: plot(found, file)})
