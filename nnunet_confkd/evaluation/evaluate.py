"""Measure a folder of segmentations against the ground truth: `confkd evaluate`. Two such folders are compared in
pairs."""
from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.arguments import Parser
from nnunet_confkd.data.annotated_classes import unlisted_classes
from nnunet_confkd.data.folders import find_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.grids import Fitting, fitted
from nnunet_confkd.data.images import Geometry, Picture, ending_of, has_spacing, is_flat, read, values_in
from nnunet_confkd.data.json_files import read_description
from nnunet_confkd.data.names import without_affixes
from nnunet_confkd.data.patients import patients_of
from nnunet_confkd.data.segments import has_segments, read_as_label
from nnunet_confkd.data.survey import MOST_STRANGE, MOST_VALUES
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.evaluation.label_pair import LabelPair
from nnunet_confkd.evaluation.metrics import (
    HIGHER_IS_BETTER,
    MEASURES,
    TOLERANCE_MM,
    CaseMeasures,
    defined_mean,
    holm,
    measure_pair,
    paired_statistics,
)
from nnunet_confkd.evaluation.output import write_results
from nnunet_confkd.evaluation.tables import aligned, cases_text, mean_text, p_value_text, without_nan
from nnunet_confkd.processes import PROCESSES, parallel

MADE_BY = "confkd evaluate"
IS_IMAGE = "It looks like an image: give the folder of the labels"
WROTE_SUMMARY = "wrote_summary_json"  # the key in metrics.json
INTERVALS = "with 95 % intervals (bootstrap over the patients)"
TOLERANCE_HELP = f"tolerance of the NSD (default: {TOLERANCE_MM:g})"
DISTANCES = ("HD95_mm", "ASSD_mm")
PATTERN_HELP = ("regular expression whose first group in the name of a case is the patient; intervals and tests are by "
                "patient. Default: \"patient_pattern\" in the dataset.json of {}; without one, every case is a patient")


@dataclass(kw_only=True)
class Evaluation(CaseMeasures):
    """The measures of a folder of predictions.

    Attributes:
        truth: The folder of the ground truth.
        prediction: The folder of the predictions.
        tolerance_mm: Tolerance of the NSD.
        ignore_label: Label of the voxels of the ground truth that are not annotated, or None.
        counts: {case: {class: numbers of voxels}}, for nnU-Net's summary.
        files: {case: (ground truth, prediction)}.
        no_spacing: Cases whose files store no voxel spacing.
        partly_annotated: Cases whose ground truth contains the ignore label.
        occurring: The labels that occur in any of the files.
        meetings: {(class of the ground truth, other class of the prediction): voxels that have both}, of all cases.
    """
    truth: Path
    prediction: Path
    tolerance_mm: float
    ignore_label: int | None
    counts: dict[str, dict[str, dict[str, int]]]
    files: dict[str, tuple[Path, Path]]
    no_spacing: list[str]
    partly_annotated: list[str]
    occurring: set[int]
    meetings: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def cases_text(self) -> str:
        """Write how many cases there are of how many patients."""
        return cases_text(len(self.cases), len(set(self.patient_of_each)))

    def one_empty(self, name: str) -> int:
        """Count the cases in which only one of the two masks of a class is empty, also where no spacing is known."""
        return sum((of[name]["n_ref"] == 0) != (of[name]["n_pred"] == 0) for of in self.counts.values())

    def as_dict(self) -> dict:
        """Return what metrics.json holds: None stands for what is undefined, since JSON has no NaN."""
        found = self.statistics()
        return without_nan({
            "made_by": MADE_BY, "truth": str(self.truth), "prediction": str(self.prediction),
            "tolerance_mm": self.tolerance_mm, "ignore_label": self.ignore_label,
            "labels": {name: list(labels) for name, labels in self.classes.items()},
            "patients": dict(zip(self.cases, self.patient_of_each)), "partly_annotated": self.partly_annotated,
            "cases": self.cases,
            "mean": {name: {m: s["mean"] for m, s in measures.items()} for name, measures in found.items()},
            "statistics": found, "one_empty": {name: self.one_empty(name) for name in self.classes}})

    def table(self) -> str:
        """Return what metrics.csv holds: a line for each case and class. What is undefined is empty."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["case", "class", *MEASURES])
        for case, classes in self.cases.items():
            for name, measures in classes.items():
                values = (measures[measure] for measure in MEASURES)
                lines.writerow([case, name, *("" if math.isnan(value) else repr(float(value)) for value in values)])
        return text.getvalue()

    def summary(self) -> dict:
        """Return the content of nnU-Net's summary.json.

        nnU-Net's own function, `save_summary_json`, would import PyTorch. The tests compare the two.
        """
        keys = {name: str(labels[0] if len(labels) == 1 else tuple(labels)) for name, labels in self.classes.items()}
        metrics = {case: {key: self.counts[case][name] | {m: measures[name][m] for m in ("Dice", "IoU")}
                          for name, key in keys.items()} for case, measures in self.cases.items()}
        names = list(next(iter(next(iter(metrics.values())).values())))
        means = {key: {name: float(defined_mean(np.array([of_case[key][name] for of_case in metrics.values()], float)))
                       for name in names} for key in keys.values()}
        foreground = {name: float(np.mean([mean[name] for mean in means.values()])) for name in names}
        per_case = [{"reference_file": str(truth), "prediction_file": str(prediction), "metrics": metrics[case]}
                    for case, (truth, prediction) in self.files.items()]
        return {"metric_per_case": per_case, "mean": means, "foreground_mean": foreground}

    def text(self) -> str:
        """Return the table for the terminal, with notes and warnings."""
        rows = [["class", "n", *(measure.replace("_", " ") for measure in MEASURES), "no distance"]]
        for name, found in self.statistics().items():
            means = (mean_text(found[measure], digits) for measure, digits in MEASURES.items())
            without_distance = str(self.one_empty(name)) if name in self.classes else ""
            rows.append([name, str(found["Dice"]["n"]), *means, without_distance])
        lines = [
            f"{self.prediction}: {self.cases_text()}. Means over the cases, {INTERVALS}.", "", *aligned(rows), "",
            f"NSD at a tolerance of {self.tolerance_mm:g} mm; volume difference: prediction minus ground truth. Classes"
            " absent from both masks are excluded. If a class is present in only one mask, Dice, IoU and NSD are 0 and "
            "the distances are undefined."]
        if self.no_spacing:
            lines.append(f"WARNING: {len(self.no_spacing)} images have no spacing, because their format does not store "
                         "it: distances and volumes are undefined.")
        if self.partly_annotated:
            lines.append(f"WARNING: {len(self.partly_annotated)} of the {len(self.cases)} cases are only partially "
                         f"annotated, and only their annotated voxels count: {', '.join(self.partly_annotated)}")
        return "\n".join([*lines, *self._warnings_of_values()])

    def _warnings_of_values(self) -> list[str]:
        """Warn of classes that only one of the folders has, and of classes that seem to have another one's label."""
        question, lines = "do both folders use the same values?", []
        voxels = {name: [sum(of_case[name][key] for of_case in self.counts.values()) for key in ("n_ref", "n_pred")]
                  for name in self.classes}
        for name, (true, predicted) in voxels.items():
            if bool(true) != bool(predicted):
                without = "prediction" if true else "ground truth"
                lines.append(f"WARNING: no {without} has a voxel of the class '{name}'; {question}")
        for (one, other), both in self.meetings.items():
            share_labels = set(self.classes[one]) & set(self.classes[other])  # regions
            if not share_labels and 4 * both > voxels[one][0] + voxels[other][1]:
                lines.append(f"WARNING: the class '{one}' of the ground truths mostly is the class '{other}' of the "
                             f"predictions; {question} `confkd mix` may have given your classes other ones: see "
                             f"\"labels\" in dataset.json")
        return lines


# ---- one case -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure in one case.

    Attributes:
        truth: File of the ground truth.
        prediction: File of the prediction.
        classes: {name: labels}. None: each label that occurs in the case, but 0.
        ignore_label: Label of the voxels of the ground truth that are not annotated, or None.
        tolerance_mm: Tolerance of the NSD.
        known: The labels that may occur. None: any may.
        segments: {class in lower case: its label}, of files whose segments have names. None: the names are not known.
    """
    truth: Path
    prediction: Path
    classes: Mapping[str, Sequence[int]] | None
    ignore_label: int | None
    tolerance_mm: float
    known: frozenset[int] | None
    segments: Mapping[str, int] | None


_Labels = tuple[np.ndarray, Geometry]


@dataclass
class Result:
    """What was found in one case. With `problems`, nothing was measured.

    `annotated` is the number of voxels of the ground truth that do not have the ignore label.
    """
    problems: list[str] = field(default_factory=list)
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    occurring: set[int] = field(default_factory=set)
    meetings: dict[tuple[str, str], int] = field(default_factory=dict)
    has_spacing: bool = True
    annotated: int = 0
    partly_annotated: bool = False


def evaluate_case(task: Task) -> Result:
    """Measure one case. Bad input is returned as `problems`, so that those of all cases can be named at once."""
    result, labels = Result(), []
    for file, allowed in ((task.truth, {task.ignore_label}), (task.prediction, set())):
        try:
            voxels, geometry, occurring = _read_labels(file, None if task.known is None else task.known | allowed,
                                                       task.segments)
        except InputError as error:
            result.problems.append(str(error))
        else:
            labels.append((voxels, geometry))
            result.occurring |= occurring - allowed
    if result.problems:
        return result
    (truth, geometry), (prediction, other) = _on_one_grid(task, *labels)
    known = [grid for file, grid in ((task.truth, geometry), (task.prediction, other)) if has_spacing(file)]
    # One of two TIFF files may lack its spacing, because nnU-Net does not copy the file that holds it.
    comparable = len(known) == 2 or geometry.size != other.size
    if comparable and (differences := geometry.differences(other)):
        remedy = ("export the segments in 3D Slicer on the grid of the image (its reference volume)"
                  if has_segments(task.truth) or has_segments(task.prediction) else
                  "write the truth on the prediction's grid: SimpleITK.Resample(truth, prediction, "
                  "SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)")
        result.problems.append(f"{task.prediction}: does not lie on the grid of {task.truth}: "
                               f"{'; '.join(differences)}. If both show the same place, {remedy}")
        return result
    classes = task.classes
    if classes is None:
        classes = {str(label): (label,) for label in sorted(result.occurring - {0})}
    result.has_spacing = bool(known)
    spacing = known[0].spacing[::-1][-truth.ndim:] if known else None
    if spacing and is_flat(truth.shape, spacing):
        truth, prediction, spacing = truth[0], prediction[0], spacing[1:]
    pair = LabelPair(truth, prediction, classes, task.ignore_label)
    del labels, truth, prediction  # the surfaces are all that is needed from here on
    result.measures = measure_pair(pair, spacing, task.tolerance_mm)
    result.annotated, result.partly_annotated = pair.annotated, pair.annotated < pair.size
    result.counts = {name: _confusion(*pair.counts(name), pair.annotated) for name in classes}
    result.meetings = pair.meetings()
    return result


def _on_one_grid(task: Task, truth: _Labels, prediction: _Labels) -> tuple[_Labels, _Labels]:
    """Pad segments, which may cover a part of the image alone, to the grid of the other segmentation."""
    labels = [truth, prediction]
    for own, file in enumerate((task.truth, task.prediction)):
        (voxels, geometry), grid = labels[own], labels[1 - own][1]
        if geometry.differences(grid) and has_segments(file):
            with suppress(InputError):  # the grids still differ, which is told
                labels[own] = fitted(voxels, geometry, grid, Fitting(0, padded=True)), grid
    return labels[0], labels[1]


def _read_labels(file: Path, known: frozenset[int] | None,
                 segments: Mapping[str, int] | None) -> tuple[np.ndarray, Geometry, set[int]]:
    """Read a segmentation: its voxels, its geometry, and the labels that occur. Raises InputError."""
    picture = _read_segments(file, segments) if has_segments(file) else read(file)
    if len(picture.voxels) != 1:
        raise InputError(f"{file}: has {len(picture.voxels)} channels; a segmentation has one")
    values = values_in(picture.voxels)
    wrong = values[~np.isfinite(values) | (values != np.round(values))]
    if len(wrong):
        raise InputError(f"{file}: holds values that are no labels, e.g. {wrong[0]:g}")
    occurring = set(values.astype(int).tolist())
    if known is None and len(occurring) > MOST_VALUES:
        raise InputError(f"{file}: holds {len(occurring)} values. {IS_IMAGE}")
    if known is not None and (unknown := sorted(occurring - known)):
        raise InputError(f"{file}: holds labels that the data set does not have: {some(unknown, 5)}"
                         + (f". {IS_IMAGE}" if len(unknown) > MOST_STRANGE else ""))
    return picture.voxels[0], picture.geometry, occurring


def _read_segments(file: Path, segments: Mapping[str, int] | None) -> Picture:
    """Read segments by their names: their values and order say nothing."""
    if segments is None:
        raise InputError(f"{file}: its segments have names, and their values do not say which classes they are; give "
                         f"the data set of these classes with -d")
    return read_as_label(file, values=segments, outside=0,
                         unknown_text=f"which the data set does not have; it has {some(segments)}")


def _confusion(both: int, true: int, predicted: int, annotated: int) -> dict[str, int]:
    """Return the numbers of voxels as nnU-Net names them, of the annotated voxels."""
    return {"TP": both, "FP": predicted - both, "FN": true - both, "TN": annotated - predicted - true + both,
            "n_ref": true, "n_pred": predicted}


# ---- folders --------------------------------------------------------------------------------------------------------

def evaluate_folders(truth: str | Path, prediction: str | Path, *, dataset: int | str | None = None,
                     labels: Sequence[str | int] | None = None, tolerance_mm: float = TOLERANCE_MM,
                     ignore_label: int | None = None, subset: bool = False, cases: Collection[str] | None = None,
                     patient_pattern: str | None = None, processes: int = PROCESSES) -> Evaluation:
    """Measure every segmentation of a folder against the file of the same name in another one.

    The name of the ground truth may have a prefix or a suffix of annotation tools, such as _gt.

    Args:
        truth: The folder of the ground truth.
        prediction: The folder of the predictions.
        dataset: Id or name of a data set, whose dataset.json names the classes (or regions) and the ignore label.
            Labels that it does not name are an error. None: every label is allowed.
        labels: The labels to measure, such as 1, or "1,2" for the union of two. None: the classes of the data set;
            without a data set, all labels that occur, except 0.
        tolerance_mm: Tolerance of the NSD.
        ignore_label: Label of the voxels of the ground truth that are not annotated. A data set names its own.
        subset: Whether the ground truth may hold cases that are not predicted.
        cases: The cases to measure. None: all.
        patient_pattern: Regular expression whose first group in the name of a case is the patient. None: the data set's
            "patient_pattern"; without one, every case is a patient.
        processes: Number of processes.

    Returns:
        The measures.

    Raises:
        InputError: Folders or files are missing, cannot be read, lie on other grids or hold unknown labels, or the
            pattern does not match. All such problems are listed.

    Examples:
        >>> evaluation = evaluate_folders("labelsTs", "predictions", dataset=27)  # doctest: +SKIP
        >>> print(evaluation.text())  # doctest: +SKIP
    """
    truth, prediction = Path(truth), Path(prediction)
    if not (isinstance(tolerance_mm, (int, float)) and 0 <= tolerance_mm < math.inf):
        raise InputError(f"the tolerance must be a number of mm from 0, not {tolerance_mm!r}")
    files = _pairs(truth, prediction, subset, cases)
    known = classes = segments = None
    lists: dict[str, list[str]] = {}
    if dataset is not None:
        classes, ignore_of_dataset, pattern_of_dataset, lists = _described(dataset)
        if None not in (ignore_label, ignore_of_dataset) and ignore_label != ignore_of_dataset:
            raise InputError(f"--ignore {ignore_label}: the ignore label of data set {dataset} is {ignore_of_dataset}; "
                             f"leave out --ignore")
        ignore_label = ignore_label if ignore_of_dataset is None else ignore_of_dataset
        of_dataset = classes
        patient_pattern = patient_pattern or pattern_of_dataset
        known = frozenset({0, *(label for values in classes.values() for label in values)})
        segments = {"background": 0} | {name.casefold(): values[0] for name, values in classes.items()
                                        if len(values) == 1}
        if ignore_label is not None:
            segments["ignore"] = ignore_label
    patients = patients_by(patient_pattern, files)
    if labels:
        classes = _given_classes(labels)
        if known and (unknown := {label for values in classes.values() for label in values} - known):
            raise InputError(f"--labels: data set {dataset} has no {', '.join(map(str, sorted(unknown)))}; it has "
                             f"{', '.join(map(str, sorted(known - {0})))}")
    results = _evaluate(files, processes=processes, classes=classes, ignore_label=ignore_label,
                        tolerance_mm=tolerance_mm, known=known, segments=segments)
    if classes is None:
        classes = _add_absent(results)
        if not classes:
            raise InputError(f"{truth}: no file holds a label other than 0; nothing to measure")
    for case in set(lists) & set(results):
        _leave_out_unlisted(results[case], classes, {name: of_dataset[name] for name in lists[case]}, known,
                            by_name=not labels)
    return Evaluation(
        truth=truth, prediction=prediction, classes=classes, ignore_label=ignore_label,
        tolerance_mm=float(tolerance_mm),
        cases={case: result.measures for case, result in results.items()},
        counts={case: result.counts for case, result in results.items()}, files=files, patients=patients,
        no_spacing=[case for case, result in results.items() if not result.has_spacing],
        partly_annotated=[case for case, result in results.items() if result.partly_annotated],
        occurring=set().union(*(result.occurring for result in results.values())),
        meetings=sum((Counter(result.meetings) for result in results.values()), Counter()))


def patients_by(pattern: str | None, cases: Iterable[str]) -> dict[str, str]:
    """Return {case: patient}. Raises InputError, which names the option, if the pattern does not match."""
    try:
        return patients_of(cases, pattern)
    except InputError as error:
        raise InputError(f"{error}. Give the right one with --patient-pattern; '.+' takes every case as one "
                         "patient.") from error


def _evaluate(files: dict[str, tuple[Path, Path]], *, processes: int, **options) -> dict[str, Result]:
    """Measure all cases. Raises InputError with the problems of all of them."""
    tasks = [(Task(truth=truth, prediction=prediction, **options),) for truth, prediction in files.values()]
    results = dict(zip(files, parallel(evaluate_case, tasks, processes, "evaluate")))
    if problems := [problem for result in results.values() for problem in result.problems]:
        raise InputError("nothing was evaluated:\n  " + "\n  ".join(problems))
    return results


def _absent(result: Result) -> tuple[dict[str, float], dict[str, int]]:
    """Return the measures and the counts of a class that a case does not have."""
    return dict.fromkeys(MEASURES, math.nan), _confusion(0, 0, 0, result.annotated)


def _leave_out_unlisted(result: Result, classes: dict[str, tuple[int, ...]], listed: dict[str, tuple[int, ...]],
                        known: Iterable[int], by_name: bool) -> None:
    """Take a case out of the measures of classes that its ground truth is not annotated for.

    Args:
        result: Of the case.
        classes: {class: labels}.
        listed: The same of the classes that the case is annotated for.
        known: All labels of the data set.
        by_name: Whether `classes` have the names of the data set. Otherwise the labels decide: those that belong to
            the same listed classes cannot be told apart.
    """
    groups: dict[tuple[bool, ...], set[int]] = {}
    for label in known:
        groups.setdefault(tuple(label in labels for labels in listed.values()), set()).add(label)
    for name, labels in classes.items():
        if not (name in listed if by_name else all(group.issubset(labels) or group.isdisjoint(labels)
                                                   for group in groups.values())):
            result.measures[name], result.counts[name] = _absent(result)


def _add_absent(results: dict[str, Result]) -> dict[str, tuple[int, ...]]:
    """Return a class for each label that occurs in any case, and complete the results of cases that lack some."""
    occurring = set().union(*(result.occurring for result in results.values()))
    classes: dict[str, tuple[int, ...]] = {str(label): (label,) for label in sorted(occurring - {0})}
    for result in results.values():
        absent = _absent(result)
        result.measures = {name: result.measures.get(name, absent[0]) for name in classes}
        result.counts = {name: result.counts.get(name, absent[1]) for name in classes}
    return classes


def _images(folder: Path) -> dict[str, Path]:
    """Return {case: file} of a folder. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    images: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        ending = ending_of(file)
        if not ending or not file.is_file() or file.name.startswith("."):
            continue
        case = file.name[:-len(ending)]
        if any(ord(character) < 32 for character in case):  # metrics.csv has one line for each case
            raise InputError(f"{folder}: the name {file.name!a} holds a control character; rename the file")
        if case in images:
            raise InputError(f"{folder}: holds {case} twice: {images[case].name} and {file.name}; keep one of them")
        images[case] = file
    if not images:
        raise InputError(f"{folder}: holds no image")
    return images


def _pairs(truth: Path, prediction: Path, subset: bool, cases: Collection[str] | None) -> dict[str, tuple[Path, Path]]:
    """Return {case: (ground truth, prediction)}. Raises InputError."""
    truths, predictions = ({case: file for case, file in _images(folder).items() if cases is None or case in cases}
                           for folder in (truth, prediction))
    found, ambiguous = _with_affixes(truths, predictions)
    pairs = found | {case: file for case, file in truths.items() if case in predictions}
    alone = [] if subset else [(case, file) for case, file in truths.items() if file not in pairs.values()]
    problems = ambiguous + [f"{file}: {truth} holds no {case}" for case, file in predictions.items()
                            if case not in pairs]
    remedy = (". A prediction needs the name of its ground truth, which may have a suffix such as _gt, _seg or _mask"
              if problems else " (--subset measures only what is predicted)")
    problems += [f"{file}: {prediction} holds no {case}" for case, file in alone]
    if problems:
        raise InputError(f"the folders do not match{remedy}:\n  " + "\n  ".join(problems))
    return {case: (pairs[case], file) for case, file in predictions.items()}


def _with_affixes(truths: dict[str, Path], predictions: dict[str, Path]) -> tuple[dict[str, Path], list[str]]:
    """Find ground truths whose names have more than the prediction's: the prefixes and suffixes of annotation tools.

    Returns:
        {case: ground truth} of predictions without a ground truth of the same name, and what is ambiguous.
    """
    fits: dict[str, list[Path]] = {}
    for name, file in truths.items():
        case = next((shorter for shorter in without_affixes(name) if shorter in predictions), name)
        if case != name and case not in truths:
            fits.setdefault(case, []).append(file)
    return {case: files[0] for case, files in fits.items()}, [
        f"{predictions[case]}: two ground truths fit it, {files[0]} and {files[1]}; take one out of the folder"
        for case, files in fits.items() if len(files) > 1]


def _described(dataset: int | str) -> tuple[dict[str, tuple[int, ...]], int | None, str | None, dict[str, list[str]]]:
    """Return {name: labels}, the ignore label, the patient pattern and the "annotated_classes" of a data set."""
    try:
        file = raw_folder() / find_dataset(dataset) / "dataset.json"
    except InputError as error:  # the raw data may be gone, and the preprocessed ones still there
        if not os.environ.get("nnUNet_preprocessed"):
            raise error
        text = f"{int(dataset):03d}_*" if str(dataset).isdigit() else str(dataset).removeprefix("Dataset")
        found = sorted(preprocessed_folder().glob(f"Dataset{text}/dataset.json"))
        if len(found) != 1:
            raise error
        file = found[0]
    described = read_description(file, ["labels"])
    labels = {name: tuple(values) if isinstance(values, list) else (values,)
              for name, values in described["labels"].items()}
    ignore = labels.pop("ignore", (None,))[0]
    classes = {name: values for name, values in labels.items() if values != (0,)}
    lists = {case: [name for name in classes if name not in lacking]
             for case, lacking in unlisted_classes(described, str(file)).items()}
    return classes, ignore, described.get("patient_pattern"), lists


def _given_classes(labels: Sequence[str | int]) -> dict[str, tuple[int, ...]]:
    """Return {text: labels} of --labels. Raises InputError."""
    classes = {}
    for text in map(str, labels):
        parts = text.split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise InputError(f"--labels {text}: give whole numbers from 1, and regions as 1,2")
        classes[text] = tuple(int(part) for part in parts)
    return classes


# ---- two folders ----------------------------------------------------------------------------------------------------

def compare(ours: Evaluation, theirs: Evaluation) -> dict[str, dict[str, dict[str, float]]]:
    """Compare two sets of predictions of the same cases, in pairs.

    Of the volume differences, the absolute values of each class are compared. The distances of the foreground are means
    over the classes that have a distance in both sets.

    Args:
        ours: The measures of the first set.
        theirs: The measures of the second set.

    Returns:
        {class: {measure: statistics}} of the differences ours - theirs (see `metrics.paired_statistics`), with
        `p_holm`, which is p corrected for all classes and measures.

    Raises:
        InputError: The cases or the classes are not the same.

    Examples:
        >>> ours, theirs = (evaluate_folders("labelsTs", folder) for folder in ("ours", "theirs"))  # doctest: +SKIP
        >>> found = compare(ours, theirs)  # doctest: +SKIP
        >>> found["liver"]["Dice"]["p_holm"]  # doctest: +SKIP
        0.03125
    """
    if set(ours.cases) != set(theirs.cases):
        differing = sorted(set(ours.cases) ^ set(theirs.cases))
        raise InputError(f"{ours.prediction} and {theirs.prediction} do not hold the same cases: "
                         f"{', '.join(differing)}")
    if set(ours.classes) != set(theirs.classes):
        differing = sorted(set(ours.classes) ^ set(theirs.classes))
        raise InputError(f"{ours.prediction} and {theirs.prediction} are not measured for the same classes: "
                         f"{', '.join(differing)}")

    def compared(name: str, measure: str) -> dict[str, float | int]:
        classes = [name] if name in ours.classes else list(ours.classes)
        values = np.array([[[evaluation.cases[case][of][measure] for of in classes] for case in ours.cases]
                           for evaluation in (ours, theirs)], float)
        if measure in DISTANCES:  # a set that misses a difficult class must not gain by it
            values = np.where(np.isnan(values).any(0), np.nan, values)
        means = defined_mean(values if measure in HIGHER_IS_BETTER else np.abs(values))
        return paired_statistics(means[0], means[1], ours.patient_of_each)

    found = {name: {measure: compared(name, measure) for measure in MEASURES} for name in ours.names}
    tests = [described for measures in found.values() for described in measures.values()]
    for described, p in zip(tests, holm([described["p"] for described in tests])):
        described["p_holm"] = p
    return found


def comparison_text(found: dict, ours: Evaluation, theirs: Evaluation) -> str:
    """Return the table of :func:`compare` for the terminal."""
    rows = [["class", "measure", "difference", "n", "p", "p (Holm)"]]
    for name, measures in found.items():
        for measure, described in measures.items():
            title = measure.replace("_", " ") if measure in HIGHER_IS_BETTER else "|volume difference| ml"
            rows.append([name, title, mean_text(described, MEASURES[measure], signed=True), str(described["n"]),
                         p_value_text(described["p"]), p_value_text(described["p_holm"])])
    title = (f"{ours.prediction} - {theirs.prediction}, paired, {ours.cases_text()}. Mean differences, {INTERVALS}. p: "
             "Wilcoxon's signed-rank test of the patients' mean differences; Holm: corrected for all rows.")
    return "\n".join([title, "", *aligned(rows)])


# ---- command --------------------------------------------------------------------------------------------------------

def write(evaluation: Evaluation, output: str | Path, comparison: dict | None = None) -> list[Path]:
    """Write metrics.json, metrics.csv and, unless there is one of another program, nnU-Net's summary.json.

    Args:
        evaluation: The measures.
        output: The folder. It is made if it is missing.
        comparison: What :func:`compare` returns, for metrics.json.

    Returns:
        The files that were written, metrics.json first.

    Raises:
        InputError: The folder holds files of these names that are not of an earlier evaluation, or cannot be written
            to.

    Examples:
        >>> write(evaluate_folders("labelsTs", "predictions", dataset=27), "predictions")  # doctest: +SKIP
    """
    with_summary = not (Path(output) / "summary.json").exists() or _wrote_summary(Path(output))
    summary = json.dumps(evaluation.summary(), indent=4, sort_keys=True)
    content = evaluation.as_dict() | {WROTE_SUMMARY: _digest(summary) if with_summary else None} | (
        {} if comparison is None else {"comparison": without_nan(comparison)})
    files: dict[str, Any] = {"metrics.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
                             "metrics.csv": evaluation.table()}
    if with_summary:
        files["summary.json"] = summary
    return write_results(output, MADE_BY, files)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(), usedforsecurity=False).hexdigest()


def _wrote_summary(folder: Path) -> bool:
    """Whether the evaluation that wrote the metrics.json of a folder wrote the summary.json that is there now, too."""
    try:
        digest = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))[WROTE_SUMMARY]
        return digest is True or digest == _digest((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(argv: list[str]) -> None:
    """Run `confkd evaluate`."""
    parser = Parser(prog="confkd evaluate", description=(
        "Measure segmentations against the ground truth, for each case and class: Dice, IoU, HD95 and ASSD in mm, NSD, "
        "volume difference in ml. Writes metrics.json, metrics.csv and, if there is no other, nnU-Net's summary.json."))
    parser.add_argument("--truth", required=True, metavar="DIR", help="folder of the ground truth")
    parser.add_argument("--prediction", required=True, metavar="DIR", help="folder of the predictions")
    parser.add_argument("--against", metavar="DIR",
                        help="a second folder of predictions of the same cases, to compare in pairs")
    parser.add_argument("-d", "--dataset", metavar="ID",
                        help="data set that names the classes or regions and the ignore label")
    parser.add_argument("--labels", nargs="+", metavar="L",
                        help="labels to measure; 1,2 is the union of two (default: all that occur in the files)")
    parser.add_argument("--ignore", type=int, metavar="L",
                        help="label of the voxels of the ground truth that are not annotated; with -d it is known")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE_MM, metavar="MM", help=TOLERANCE_HELP)
    parser.add_argument("--subset", action="store_true", help="the ground truth may hold cases that are not predicted")
    parser.add_argument("--patient-pattern", metavar="REGEX", help=PATTERN_HELP.format("the data set (-d)"))
    parser.add_argument("--output", metavar="FOLDER", help="default: the folder of the predictions")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--json", action="store_true", help="print only the content of metrics.json")
    args = parser.parse_args(argv)
    options = dict(dataset=args.dataset, labels=args.labels, tolerance_mm=args.tolerance, ignore_label=args.ignore,
                   subset=args.subset, patient_pattern=args.patient_pattern, processes=args.processes)
    evaluation = evaluate_folders(args.truth, args.prediction, **options)
    if args.labels:
        wanted = {label for values in evaluation.classes.values() for label in values}
        if absent := sorted(wanted - evaluation.occurring):
            raise InputError(f"--labels: no file in {args.truth} or {args.prediction} holds "
                             f"{', '.join(map(str, absent))}; they hold "
                             f"{', '.join(map(str, sorted(evaluation.occurring)))}")
    comparison = other = None
    if args.against:
        other = evaluate_folders(args.truth, args.against, **options)
        if set(evaluation.classes) != set(other.classes):  # neither -d nor --labels: what occurs differs
            options["labels"] = sorted((evaluation.occurring | other.occurring) - {0, args.ignore})
            evaluation, other = (evaluate_folders(args.truth, folder, **options)
                                 for folder in (args.prediction, args.against))
        comparison = compare(evaluation, other)
    output = Path(args.output or args.prediction)
    files = write(evaluation, output, comparison)
    if args.json:
        print(files[0].read_text(encoding="utf-8"), end="")
        return
    print(evaluation.text())
    if other:
        print("\n" + comparison_text(comparison, evaluation, other))
    print("\nwritten: " + ", ".join(map(str, files)))
    if (summary := output / "summary.json") not in files:
        print(f"kept: {summary}, which confkd evaluate has not written")
    print("next: confkd report --model MODEL shows cases and curves of a trained model"
          + ("" if other else "; confkd evaluate ... --against DIR compares with other predictions of these cases"))
