"""Measures of a folder of segmentations against the truth: Dice, IoU, HD95, ASSD, NSD, volumes; and of two such folders, paired."""
from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.data.folders import find_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import ITK, ending_of, read, spacing_file
from nnunet_confkd.data.json_files import read_description
from nnunet_confkd.data.patients import patients_of
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.metrics import HIGHER_IS_BETTER, MEASURES, TOLERANCE_MM, count_of, holm, measure_case, paired_statistics, statistics
from nnunet_confkd.evaluation.tables import aligned, cell, p_text, without_nan
from nnunet_confkd.files import write_text, written_whole
from nnunet_confkd.processes import PROCESSES, parallel

FOREGROUND = "foreground"  # a case's mean over its classes
MADE_BY = "confkd evaluate"
FILES = ("metrics.json", "metrics.csv")
PATTERN_HELP = ("intervals and tests are by patient: a regular expression whose first group in the name of a case is the patient; default: "
                "{} \"patient_pattern\" in dataset.json, or every case is a patient")


@dataclass
class Evaluation:
    """cases: {case: {class: measures}}. counts: of voxels, the same, for nnU-Net's summary. classes: {name: labels}.
    patients: {case: patient}; a case that is not in it is a patient of its own."""
    truth: Path
    prediction: Path
    classes: dict[str, tuple[int, ...]]
    tolerance_mm: float
    ignore_label: int | None
    cases: dict[str, dict[str, dict[str, float]]]
    counts: dict[str, dict[str, dict[str, int]]]
    files: dict[str, tuple[Path, Path]]
    no_spacing: list[str] = field(default_factory=list)
    occurring: set[int] = field(default_factory=set)  # labels in any of the files
    patients: dict[str, str] = field(default_factory=dict)
    partly_annotated: list[str] = field(default_factory=list)  # cases whose truth holds the ignore label

    @property
    def patient_of_each(self) -> list[str]:
        """The patient of every case, in the order of the cases."""
        return [self.patients.get(case, case) for case in self.cases]

    def count(self) -> str:
        """In words: "4 cases of 2 patients"."""
        return count_of(len(self.cases), len(set(self.patient_of_each)))

    def values(self, name: str, measure: str) -> np.ndarray:
        """Of every case, of a class or of FOREGROUND; NaN where undefined."""
        names = list(self.classes) if name == FOREGROUND else [name]
        table = np.array([[case[n][measure] for n in names] for case in self.cases.values()], float)
        defined = ~np.isnan(table)
        return np.where(defined.any(1), np.where(defined, table, 0).sum(1) / np.maximum(defined.sum(1), 1), np.nan)

    def statistics(self) -> dict[str, dict[str, dict[str, float]]]:
        """{class or FOREGROUND: {measure: mean, sd, n, patients, ci_low, ci_high}}; the intervals are by patient."""
        patients = self.patient_of_each
        return {name: {measure: statistics(self.values(name, measure), patients) for measure in MEASURES}
                for name in self._rows()}

    def _rows(self) -> list[str]:
        return [*self.classes, *([FOREGROUND] if len(self.classes) > 1 else [])]

    def one_empty(self, name: str) -> int:
        """Cases in which the class is in the truth or in the prediction alone, so that there is no distance."""
        return sum(math.isnan(case[name]["HD95_mm"]) and case[name]["NSD"] == 0 for case in self.cases.values())

    def as_dict(self) -> dict:
        """JSON without NaN: null stands for what is undefined."""
        found = self.statistics()
        return without_nan({
            "made_by": MADE_BY, "truth": str(self.truth), "prediction": str(self.prediction), "tolerance_mm": self.tolerance_mm,
            "ignore_label": self.ignore_label, "labels": {name: list(labels) for name, labels in self.classes.items()},
            "patients": dict(zip(self.cases, self.patient_of_each)), "partly_annotated": self.partly_annotated,
            "cases": self.cases, "mean": {name: {m: s["mean"] for m, s in of.items()} for name, of in found.items()},
            "statistics": found, "one_empty": {name: self.one_empty(name) for name in self.classes}})

    def summary(self) -> dict:
        """As nnU-Net's evaluation writes it: `nnunetv2.evaluation.evaluate_predictions.save_summary_json`."""
        def keyed(of: dict) -> dict:
            return {labels[0] if len(labels) == 1 else tuple(labels): of[name] for name, labels in self.classes.items()}
        per_case: list[dict[str, Any]] = [{"reference_file": str(truth), "prediction_file": str(prediction), "metrics": keyed(
            {name: {**self.counts[case][name], "Dice": m["Dice"], "IoU": m["IoU"]} for name, m in self.cases[case].items()})}
            for case, (truth, prediction) in self.files.items()]
        keys = list(per_case[0]["metrics"])
        means = {key: {m: float(np.nanmean([case["metrics"][key][m] for case in per_case]))
                       if any(not math.isnan(case["metrics"][key][m]) for case in per_case) else math.nan
                       for m in per_case[0]["metrics"][key]} for key in keys}
        foreground = {m: float(np.mean([means[key][m] for key in keys])) for m in means[keys[0]]}
        return {"metric_per_case": per_case, "mean": means, "foreground_mean": foreground}

    def text(self) -> str:
        rows = [["class", "n", *(m.replace("_", " ") for m in MEASURES), "without distance"]]
        found = self.statistics()
        for name in self._rows():
            rows.append([name, str(found[name]["Dice"]["n"]), *(cell(found[name][m], digits) for m, digits in MEASURES.items()),
                         str(self.one_empty(name)) if name in self.classes else ""])
        lines = [f"{self.prediction}: {self.count()}; means over the cases with 95 % intervals (bootstrap over the patients)", "",
                 *aligned(rows), "",
                 f"NSD at {self.tolerance_mm:g} mm; volume difference: prediction - truth. A class that is in neither has no measure and "
                 f"is not in n; one that is in one of them alone has Dice, IoU and NSD 0 and no distance."]
        if self.no_spacing:
            lines.append(f"WARNING: {len(self.no_spacing)} images have no spacing (their format holds none): no distances, no volumes.")
        if self.partly_annotated:
            lines.append(f"WARNING: the truth of {len(self.partly_annotated)} of the {len(self.cases)} cases is only partly annotated; their "
                         f"measures count the annotated voxels alone: {', '.join(self.partly_annotated)}")
        return "\n".join(lines)


# ---- one case ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """known: the values that may occur; None: any. classes None: find the values alone."""
    truth: Path
    prediction: Path
    classes: dict[str, tuple[int, ...]] | None
    ignore_label: int | None
    tolerance_mm: float
    known: frozenset[int] | None


@dataclass
class Found:
    problems: list[str]
    measures: dict | None = None
    counts: dict | None = None
    values: set[int] = field(default_factory=set)
    has_spacing: bool = True
    partly_annotated: bool = False


def _evaluate(task: Task) -> Found:
    found = Found([])
    labels = []
    for file, others in ((task.truth, {task.ignore_label}), (task.prediction, set())):
        try:
            picture = read(file)
        except InputError as error:
            found.problems.append(str(error))
            continue
        voxels = picture.voxels
        if len(voxels) != 1:
            found.problems.append(f"{file}: has {len(voxels)} channels; a segmentation has one")
            continue
        values = np.unique(voxels)
        strange = values[~np.isfinite(values) | (values != np.round(values))]
        if len(strange):
            found.problems.append(f"{file}: holds values that are no labels, e.g. {strange[0]:g}")
            continue
        unknown = [] if task.known is None else sorted(set(values.astype(int).tolist()) - task.known - others)
        if unknown:
            found.problems.append(f"{file}: holds labels that the data set does not have: {', '.join(map(str, unknown))}")
            continue
        found.values |= set(values.astype(int).tolist()) - others
        labels.append((voxels[0], picture.geometry))
    if len(labels) < 2:
        return found
    (truth, geometry), (prediction, other) = labels
    if differences := geometry.differences(other):
        found.problems.append(f"{task.prediction}: does not lie on the grid of {task.truth}: {'; '.join(differences)}")
    elif task.classes is not None:
        found.has_spacing = ending_of(task.truth) in ITK or ending_of(task.truth).lower() in ITK or spacing_file(task.truth).is_file()
        found.measures = measure_case(truth, prediction, task.classes, geometry.spacing[::-1][-truth.ndim:], task.ignore_label,
                                      task.tolerance_mm)
        if not found.has_spacing:
            for measured in found.measures.values():
                measured |= dict.fromkeys(("HD95_mm", "ASSD_mm", "NSD", "volume_difference_ml"), math.nan)
        known = np.ones(truth.shape, bool) if task.ignore_label is None else truth != task.ignore_label
        found.partly_annotated = not known.all()
        found.counts = {}
        for name, of in task.classes.items():
            a, b = np.isin(truth, of) & known, np.isin(prediction, of) & known
            tp, n_ref, n_pred = int((a & b).sum()), int(a.sum()), int(b.sum())
            found.counts[name] = {"TP": tp, "FP": n_pred - tp, "FN": n_ref - tp, "TN": int(known.sum()) - n_pred - n_ref + tp,
                                  "n_ref": n_ref, "n_pred": n_pred}
    return found


# ---- folders ------------------------------------------------------------------------------------------------------------

def evaluate_folders(truth: str | Path, prediction: str | Path, *, dataset: int | str | None = None,
                     labels: Sequence[str | int] | None = None, tolerance_mm: float = TOLERANCE_MM, ignore_label: int | None = None,
                     subset: bool = False, cases: Collection[str] | None = None, patient_pattern: str | None = None,
                     processes: int = PROCESSES) -> Evaluation:
    """Measure every segmentation of `prediction` against the file of the same name in `truth`.

    dataset: id or name; its dataset.json names classes (or regions) and the ignore label, and other values are an error. labels: those to
    measure: 1, or "1,2" for the union of two; without a data set, other values are background. Neither: all that occur in the truth but 0.
    subset: the truth may hold more cases than are predicted. cases: those to measure; None: all that are predicted.
    patient_pattern: a regular expression whose first group in the name of a case is the patient; None: dataset.json's
    "patient_pattern", and without that every case is a patient.

    Raises InputError, listing all that is wrong: folders or files missing, other grids, no images, unknown labels, a pattern that does
    not match.
    """
    truth, prediction = Path(truth), Path(prediction)
    if not (isinstance(tolerance_mm, (int, float)) and 0 <= tolerance_mm < math.inf):
        raise InputError(f"the tolerance must be a number of mm from 0, not {tolerance_mm!r}")
    files = _pairs(truth, prediction, subset, cases)
    known = None
    classes: dict[str, tuple[int, ...]]
    if dataset is not None:
        classes, ignore_label, pattern_of_dataset = _described(dataset)
        patient_pattern = patient_pattern or pattern_of_dataset
        known = frozenset({0, *(label for of in classes.values() for label in of)})
    patients = patients_by(patient_pattern, files)
    if labels:
        classes = _given_classes(labels)
        if known and (unknown := {label for of in classes.values() for label in of} - known):
            raise InputError(f"--labels: data set {dataset} has no {', '.join(map(str, sorted(unknown)))}; it has "
                             f"{', '.join(map(str, sorted(known - {0})))}")
    elif dataset is None:
        found = _run(files, None, ignore_label, tolerance_mm, None, processes, "labels")
        values = sorted(set().union(*(of.values for of in found.values())) - {0})
        classes = {str(value): (value,) for value in values}
        if not classes:
            raise InputError(f"{truth}: no file holds a label other than 0; nothing to measure")
    found = _run(files, classes, ignore_label, tolerance_mm, known, processes, "evaluate")
    return Evaluation(truth, prediction, classes, float(tolerance_mm), ignore_label, {case: of.measures for case, of in found.items()},
                      {case: of.counts for case, of in found.items()}, files,
                      [case for case, of in found.items() if not of.has_spacing], set().union(*(of.values for of in found.values())),
                      patients, [case for case, of in found.items() if of.partly_annotated])


def patients_by(pattern: str | None, cases: Iterable[str]) -> dict[str, str]:
    """{case: patient}. Raises InputError, which names the option, where the pattern does not match."""
    try:
        return patients_of(cases, pattern)
    except InputError as error:
        raise InputError(f"{error}. Give the right one with --patient-pattern; '.+' takes every case as one patient.") from error


def _run(files: dict, classes, ignore_label, tolerance_mm, known, processes: int, text: str) -> dict[str, Found]:
    tasks = [(Task(truth, prediction, classes, ignore_label, tolerance_mm, known),) for truth, prediction in files.values()]
    found = dict(zip(files, parallel(_evaluate, tasks, processes, text)))
    if problems := [problem for of in found.values() for problem in of.problems]:
        raise InputError("nothing was evaluated:\n  " + "\n  ".join(problems))
    return found


def _pairs(truth: Path, prediction: Path, subset: bool, cases: Collection[str] | None) -> dict[str, tuple[Path, Path]]:
    """{case: (truth, prediction)}."""
    found = []
    for folder in (truth, prediction):
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
        images = {}
        for file in sorted(folder.iterdir()):
            ending = ending_of(file)
            if ending and file.is_file() and not file.name.startswith("."):
                case = file.name[:-len(ending)]
                if any(ord(character) < 32 for character in case):  # metrics.csv has a line a case
                    raise InputError(f"{folder}: the name {file.name!a} holds a control character; rename the file")
                if case in images:
                    raise InputError(f"{folder}: holds {case} twice: {images[case].name} and {file.name}; keep one of them")
                images[case] = file
        if not images:
            raise InputError(f"{folder}: holds no image")
        found.append(images)
    truths, predictions = found if cases is None else ({case: images[case] for case in images if case in cases} for images in found)
    problems = [f"{file}: {truth} holds no {case}" for case, file in predictions.items() if case not in truths]
    if not subset:
        problems += [f"{file}: {prediction} holds no {case}" for case, file in truths.items() if case not in predictions]
    if problems:
        raise InputError("the folders do not match" + ("" if subset else " (--subset: only what is predicted)") + ":\n  " + "\n  ".join(problems))
    return {case: (truths[case], file) for case, file in predictions.items()}


def _described(dataset: int | str) -> tuple[dict[str, tuple[int, ...]], int | None, str | None]:
    """{name: labels}, the ignore label and the patient pattern of a raw or preprocessed data set."""
    try:
        file = raw_folder() / find_dataset(dataset) / "dataset.json"
    except InputError as error:  # predictions are evaluated where the raw data are gone, too
        text = f"{int(dataset):03d}_*" if str(dataset).isdigit() else str(dataset).removeprefix("Dataset")
        found = sorted(preprocessed_folder().glob(f"Dataset{text}/dataset.json")) if os.environ.get("nnUNet_preprocessed") else []
        if len(found) != 1:
            raise error
        file = found[0]
    described = read_description(file, ["labels"])
    labels = {name: tuple(of) if isinstance(of, list) else (of,) for name, of in described["labels"].items()}
    ignore = labels.pop("ignore", (None,))[0]
    return {name: of for name, of in labels.items() if of != (0,)}, ignore, described.get("patient_pattern")


def _given_classes(labels: Sequence[str | int]) -> dict[str, tuple[int, ...]]:
    classes = {}
    for text in map(str, labels):
        parts = text.split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise InputError(f"--labels {text}: give whole numbers from 1, and regions as 1,2")
        classes[text] = tuple(int(part) for part in parts)
    return classes


# ---- two folders ----------------------------------------------------------------------------------------------------------

def compare(ours: Evaluation, theirs: Evaluation) -> dict[str, dict[str, dict[str, float]]]:
    """{class: {measure: mean of ours - theirs, interval, n, patients, p, p_holm}}. Interval and p are by patient, p_holm is corrected for
    all classes and measures.

    Raises InputError where the cases are not the same. Volumes are compared by the size of their difference to the truth.
    """
    if set(ours.cases) != set(theirs.cases):
        differing = sorted(set(ours.cases) ^ set(theirs.cases))
        raise InputError(f"{ours.prediction} and {theirs.prediction} do not hold the same cases: {', '.join(differing)}")
    found: dict[str, dict[str, Any]] = {}
    for name in ours._rows():
        found[name] = {}
        for measure in MEASURES:
            pair = [dict(zip(of.cases, of.values(name, measure))) for of in (ours, theirs)]
            a, b = (np.array([of[case] for case in ours.cases]) for of in pair)
            if measure not in HIGHER_IS_BETTER:
                a, b = np.abs(a), np.abs(b)
            found[name][measure] = paired_statistics(a, b, ours.patient_of_each)
    flat = [of for measures in found.values() for of in measures.values()]
    for of, p in zip(flat, holm([of["p"] for of in flat])):
        of["p_holm"] = p
    return found


def comparison_text(found: dict, ours: Evaluation, theirs: Evaluation) -> str:
    rows = [["class", "measure", "difference", "n", "p", "p (Holm)"]]
    for name, measures in found.items():
        for measure, of in measures.items():
            shown = measure.replace("_", " ") if measure in HIGHER_IS_BETTER else "|volume difference| ml"
            rows.append([name, shown, cell(of, MEASURES[measure], sign=True), str(of["n"]), p_text(of["p"]), p_text(of["p_holm"])])
    return "\n".join([f"{ours.prediction} - {theirs.prediction}, paired, {ours.count()}; 95 % intervals (bootstrap over the patients), "
                      f"Wilcoxon's signed-rank test of the patients' mean differences, corrected for all rows (Holm)", "", *aligned(rows)])


# ---- output ---------------------------------------------------------------------------------------------------------------









def write(evaluation: Evaluation, output: str | Path, comparison: dict | None = None) -> list[Path]:
    """metrics.json, metrics.csv, and nnU-Net's summary.json unless there is one. Returns the files written.

    Raises InputError where a file of these names is there that is not of an earlier evaluation, or nothing can be written.
    """
    output = Path(output)
    texts = {"metrics.json": json.dumps(evaluation.as_dict() | (
        {} if comparison is None else {"comparison": without_nan(comparison)}), indent=1, allow_nan=False) + "\n"}
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["case", "class", *MEASURES])
    for case, classes in evaluation.cases.items():
        for name, of in classes.items():
            lines.writerow([case, name, *("" if math.isnan(of[m]) else repr(float(of[m])) for m in MEASURES)])
    texts["metrics.csv"] = table.getvalue()
    try:
        output.mkdir(parents=True, exist_ok=True)
        ours = not any((output / name).exists() for name in FILES) or _is_ours(output / "metrics.json")
        if not ours:
            raise InputError(f"{output}: holds {' or '.join(FILES)} of something else; give another --output")
        written = []
        for name, text in texts.items():
            write_text(output / name, text)
            written.append(output / name)
        if not (output / "summary.json").exists():
            from nnunetv2.evaluation.evaluate_predictions import save_summary_json
            with written_whole(output / "summary.json") as aside:
                save_summary_json(evaluation.summary(), str(aside))
            written.append(output / "summary.json")
    except OSError as error:
        raise InputError(f"{output}: cannot be written to ({error.strerror}); give another --output") from error
    return written


def _is_ours(file: Path) -> bool:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False




def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd evaluate", description=(
        "Measure segmentations against the truth, per case and class: Dice, IoU, HD95 and ASSD in mm, NSD, volume difference in ml. Writes "
        "metrics.json and metrics.csv, and a summary.json as nnU-Net's where there is none yet."))
    parser.add_argument("--truth", required=True, metavar="DIR")
    parser.add_argument("--prediction", required=True, metavar="DIR")
    parser.add_argument("--against", metavar="DIR", help="a second folder of predictions of the same cases: paired comparison")
    parser.add_argument("-d", "--dataset", metavar="ID", help="names the classes or regions, and the ignore label")
    parser.add_argument("--labels", nargs="+", metavar="L", help="labels to measure; 1,2 is the union of two. Default: all in the files")
    parser.add_argument("--ignore", type=int, metavar="L", help="label of the truth that is not evaluated; -d knows it")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE_MM, metavar="MM", help=f"of the NSD; default {TOLERANCE_MM:g}")
    parser.add_argument("--subset", action="store_true", help="the truth may hold cases that are not predicted")
    parser.add_argument("--patient-pattern", metavar="REGEX", help=PATTERN_HELP.format("-d's"))
    parser.add_argument("--output", metavar="FOLDER", help="default: the folder of the predictions")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--json", action="store_true", help="print metrics.json's content, and nothing else")
    args = parser.parse_args(argv)
    options = dict(dataset=args.dataset, labels=args.labels, tolerance_mm=args.tolerance, ignore_label=args.ignore, subset=args.subset,
                   patient_pattern=args.patient_pattern, processes=args.processes)
    evaluation = evaluate_folders(args.truth, args.prediction, **options)
    if args.labels and (absent := [label for of in evaluation.classes.values() for label in of if label not in evaluation.occurring]):
        raise InputError(f"--labels: no file in {args.truth} or {args.prediction} holds {', '.join(map(str, absent))}; they hold "
                         f"{', '.join(map(str, sorted(evaluation.occurring)))}")
    comparison = other = None
    if args.against:
        other = evaluate_folders(args.truth, args.against, **options)
        comparison = compare(evaluation, other)
    files = write(evaluation, args.output or args.prediction, comparison)
    if args.json:
        print((files[0]).read_text(encoding="utf-8"), end="")
        return
    print(evaluation.text())
    if other:
        print("\n" + comparison_text(comparison, evaluation, other))
    print("\nwritten: " + ", ".join(map(str, files)))
