"""Read and write data sets in nnU-Net's raw format. A data set is checked and written completely, or not at all."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.case_files import Case, Target, write_case
from nnunet_confkd.data.folders import WRITTEN_BY, folder_name, new_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.json_files import read_description, read_folds
from nnunet_confkd.data.patients import FOLDS, number_range, patients_of, split_full_cases
from nnunet_confkd.data.supervision import FULL, UNLABELLED
from nnunet_confkd.data.supervision import summary as kinds_summary
from nnunet_confkd.errors import InputError, grouped, some
from nnunet_confkd.files import write_json
from nnunet_confkd.processes import PROCESSES, parallel


@dataclass
class Dataset:
    """What a converter hands to :func:`write_dataset`.

    Attributes:
        name: The NAME in `Dataset027_NAME`.
        channel_names: The names of the channels, which choose nnU-Net's normalisation ("CT").
        labels: As in dataset.json, "ignore" included if any case is not fully annotated.
        file_ending: The ending of all files, which is their format.
        training: All cases of imagesTr.
        validation: Names of cases that are held back. They validate and never train. Empty: every fully annotated
            patient validates in one fold and trains in the others.
        folds: At most how many folds splits_final.json gets.
        test: Cases that are written to imagesTs and labelsTs.
        annotated_classes: As in dataset.json: {case: the classes that it is annotated for}, if they are not all.
        complete: The cases without ignored voxels among those in `annotated_classes`.
        regions_class_order: As in dataset.json.
        patient_pattern: A regular expression whose first group in the name of a case is the patient. None: each case is
            a patient of its own.
        patients: {case: patient} for the folds, if the pattern cannot tell that two cases show the same patient.
        licence: The licence of the data.
        reference: What to cite.
        roots: The folders that were given. A file that lies elsewhere (a link) is refused. Empty: there is no such
            check.
        problems: What the converter found to be wrong. Nothing is written then.
        more: Further entries of dataset.json.
    """
    name: str
    channel_names: list[str]
    labels: Mapping[str, int | list[int]]
    file_ending: str
    training: list[Case]
    validation: list[str] = field(default_factory=list)
    folds: int = FOLDS
    test: list[Case] = field(default_factory=list)
    annotated_classes: dict[str, list[str]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    regions_class_order: list[int] | None = None
    patient_pattern: str | None = None
    patients: dict[str, str] | None = None
    licence: str = "unknown"
    reference: str = ""
    roots: tuple[Path, ...] = ()
    problems: list[str] = field(default_factory=list)
    more: dict = field(default_factory=dict)

    @property
    def values(self) -> set[int]:
        """All values that a label file may hold, that of "ignore" included."""
        return label_values(self.labels)

    @property
    def kinds(self) -> dict[str, str]:
        """{case: kind of supervision} of the training cases."""
        return {case.name: case.kind for case in self.training}


# ---- labels ---------------------------------------------------------------------------------------------------------

def label_values(labels: Mapping[str, int | list[int]]) -> set[int]:
    """Return all the integers in dataset.json's labels, those within regions too."""
    return {int(v) for value in labels.values() for v in (value if isinstance(value, (list, tuple)) else [value])}


def with_ignore(labels: Mapping[str, int | list[int]]) -> dict[str, int | list[int]]:
    """Return the labels with "ignore" where nnU-Net needs it: one above the highest label.

    Raises:
        InputError: The labels have an "ignore" of another value, or values that do not fit nnU-Net's 16 bits.
    """
    wanted = max(label_values({name: value for name, value in labels.items() if name != "ignore"})) + 1
    if labels.get("ignore", wanted) != wanted:
        raise InputError(f"the ignore label is {labels['ignore']}, but nnU-Net needs the highest other label plus one, "
                         f"{wanted}")
    if wanted > np.iinfo(np.int16).max:
        raise InputError(f"the labels go up to {wanted - 1}, and nnU-Net keeps them in 16 bits; number them from 0 on")
    return {**labels, "ignore": wanted}


# ---- writing --------------------------------------------------------------------------------------------------------

def write_dataset(dataset: Dataset, dataset_id: int, processes: int = PROCESSES, link: bool = False,
                  overwrite: bool = False) -> Path:
    """Check a data set and write it to nnUNet_raw, and splits_final.json to nnUNet_preprocessed.

    Args:
        dataset: What to write.
        dataset_id: The 27 in `Dataset027_NAME`.
        processes: How many processes write cases.
        link: Whether images that nnU-Net can read become hard links instead of copies. A program that writes to such an
            image writes to the source's too.
        overwrite: Whether to replace a data set of this id and name that :func:`nnunet_confkd.data.mix.mix` wrote.

    Returns:
        The raw folder of the data set.

    Raises:
        InputError: With all that is wrong with the data; or the id is taken, a folder cannot be written to, or the disk
            is full. Nothing stays behind then.
    """
    with new_dataset(dataset_id, dataset.name, overwrite) as (folder, preprocessed):
        write_into(folder, preprocessed, dataset, processes, link)
    return raw_folder() / folder_name(dataset_id, dataset.name)


def write_into(folder: Path, preprocessed: Path, dataset: Dataset, processes: int = PROCESSES,
               link: bool = False) -> None:
    """Do what :func:`write_dataset` does, in the two folders of :func:`new_dataset`."""
    tasks = _tasks(dataset, folder, link)
    for case, target in tasks:
        target.images.mkdir(exist_ok=True)
        if case.label is not None or case.kind != FULL:
            target.labels.mkdir(exist_ok=True)
    _run(tasks, dataset, processes, f"writing {dataset.name}")
    write_json(folder / "dataset.json", _dataset_json(dataset))
    try:
        folds = folds_of(dataset)
    except InputError:
        return  # summary() says what to do without a split
    write_json(preprocessed / "splits_final.json", folds)


def check_dataset(dataset: Dataset, processes: int = PROCESSES) -> None:
    """Read all files of a data set, and check what :func:`write_dataset` checks of them. Nothing is written.

    Raises:
        InputError: With all that is wrong with the data.
    """
    tasks = [(case, replace(target, dry_run=True)) for case, target in _tasks(dataset, Path())]
    _run(tasks, dataset, processes, f"checking {dataset.name}")


def _tasks(dataset: Dataset, folder: Path, link: bool = False) -> list[tuple[Case, Target]]:
    """Return the cases of a data set, and where each of them is written."""
    ignore: Any = dataset.labels.get("ignore")
    tasks: dict[str, tuple[Case, Target]] = {}
    for split, cases in (("Tr", dataset.training), ("Ts", dataset.test)):
        target = Target(folder / f"images{split}", folder / f"labels{split}", dataset.file_ending,
                        tuple(dataset.channel_names), frozenset(dataset.values), ignore, dataset.roots, link)
        for case in cases:
            if name_problem(case.name) is None:
                tasks.setdefault(case.name.lower(), (case, target))  # a name that is there twice is a problem already
    return list(tasks.values())


def _run(tasks: list[tuple[Case, Target]], dataset: Dataset, processes: int, text: str) -> None:
    """Write or check all cases. Raise InputError with all that is wrong with them and with the data set."""
    results = parallel(write_case, tasks, processes, text)
    require_no_problems([*dataset.problems, *_problems_of_the_whole(dataset),
                         *(problem for found in results for problem in found)])


def require_no_problems(problems: list[str]) -> None:
    """Raise InputError with all problems, if there are any. Equal ones of several files become one line."""
    lines = grouped(problems)
    if lines:
        raise InputError(f"{len(lines)} problems; nothing was written:\n  " + "\n  ".join(lines)
                         if len(lines) > 1 else lines[0])


def folds_of(dataset: Dataset) -> list[dict[str, list[str]]]:
    """Return the folds of splits_final.json. Raises InputError if there are too few patients that can validate."""
    patients = dataset.patients or patients_of(dataset.kinds, dataset.patient_pattern)
    held_back = {patients[case] for case in dataset.validation}
    return split_full_cases(dataset.kinds, patients, held_back, dataset.folds, dataset.annotated_classes,
                            dataset.complete)


def _dataset_json(dataset: Dataset) -> dict:
    described = {
        "channel_names": {str(i): name for i, name in enumerate(dataset.channel_names)}, "labels": dataset.labels,
        "numTraining": len(dataset.training), "file_ending": dataset.file_ending, "name": dataset.name,
        "licence": dataset.licence, "reference": dataset.reference,
        "supervision": dict(sorted(dataset.kinds.items()))}
    if dataset.annotated_classes:
        described[CLASSES_KEY] = dict(sorted(dataset.annotated_classes.items()))
    if dataset.regions_class_order is not None:
        described["regions_class_order"] = dataset.regions_class_order
    if dataset.patient_pattern is not None:
        described["patient_pattern"] = dataset.patient_pattern
    return described | dataset.more


def summary(folder: Path) -> str:
    """Return a few lines on a data set that was just written, and on what comes next."""
    described = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    kinds, pattern = described["supervision"], described.get("patient_pattern")
    splits = preprocessed_folder() / folder.name / "splits_final.json"
    number = int(folder.name[7:10])
    if splits.is_file():
        text = _folds_text(json.loads(splits.read_text(encoding="utf-8")), kinds, patients_of(kinds, pattern),
                           "patients" if pattern else "cases")
    elif CLASSES_KEY in described:  # whether the trainer makes folds depends on the voxels of each case
        text = (f"no split was written. The trainer makes one if enough cases are annotated in all of their voxels: "
                f"confkd check -d {number} names its folds")
    else:
        completed = " (completed labels do not count)" if "completed" in described else ""
        text = (f"no split was written{completed}: it takes two fully annotated patients to spare one for "
                f"validation. Train on fold 'all': confkd train {number} CONFIGURATION all")
    return (f"{folder}: {len(kinds)} training cases ({kinds_summary(kinds)})\n{text}\n"
            f"next: confkd check -d {number}, then confkd plan -d {number}")


def _folds_text(folds: list[dict[str, list[str]]], kinds: dict[str, str], patients: dict[str, str], noun: str) -> str:
    """Say what the folds train and validate on. `noun` is "patients", or "cases" if each case is a patient."""
    full = set(patients.values()) - {patients[case] for case, kind in kinds.items() if kind != FULL}
    if not full.issuperset(patients[case] for fold in folds for case in fold["val"]):
        sizes = number_range(len({patients[case] for case in fold["val"]}) for fold in folds)
        return (f"{len(folds)} fold{'s' if len(folds) > 1 else ''}: each validates on {sizes} {noun} that are not "
                f"annotated for all classes, each for its own classes; all other cases train")
    training = [full & {patients[case] for case in fold["train"]} for fold in folds]
    validating = [{patients[case] for case in fold["val"]} for fold in folds]
    held_back = len(full - set().union(*training))
    counts = [number_range(map(len, sets)) for sets in (training, validating)]
    if len(folds) == 1:
        return (f"one fold: fold 0 trains on {counts[0]} fully annotated {noun} and validates on {counts[1]}, which "
                f"are held back. There are no folds 1 to 4: give -f 0 to nnUNetv2_find_best_configuration and "
                f"nnUNetv2_predict")
    if held_back:
        return (f"{len(folds)} folds: each trains on the same {counts[0]} fully annotated {noun} and validates on "
                f"{counts[1]} of {held_back} that are held back from training")
    return (f"{len(folds)} folds over {len(full)} fully annotated {noun}: each trains on {counts[0]} of them and "
            f"validates on {counts[1]}; all other cases train in every fold")


# ---- what is wrong with the whole -----------------------------------------------------------------------------------

def name_problem(name: str) -> str | None:
    """Say why nnU-Net, or some file system, cannot have a case of this name. None: it can."""
    if not name or name != name.strip() or name.startswith("."):
        return "is empty, hidden, or begins or ends with a space"
    if re.search(r'[\x00-\x1f/\\:*?"<>|]', name):
        return 'holds a control character or one of / \\ : * ? " < > |'
    if name.endswith("_seg"):
        return "ends with _seg, by which nnU-Net tells labels from images"
    return None


def _problems_of_the_whole(dataset: Dataset) -> list[str]:
    problems = []
    cases = [*dataset.training, *dataset.test]
    if not dataset.training and not dataset.problems:
        problems.append("there is not one training case")
    first_of: dict[str, Case] = {}
    for case in cases:
        reason = name_problem(case.name)
        if reason is not None:
            problems.append(f"{case.images[0].file}: the name of the case, {case.name!r}, {reason}; rename it")
        first = first_of.setdefault(case.name.lower(), case)  # some file systems do not tell them apart
        if first is not case:
            problems.append(f"{case.images[0].file}: the name of the case, {case.name!r}, is that of "
                            f"{first.images[0].file}, too; rename one")
    problems += [f"{case.images[0].file}: has no label; add it, or leave the image out" for case in dataset.training
                 if case.label is None and case.kind != UNLABELLED]
    needing = [case for case in cases if case.kind != FULL and case.name not in dataset.annotated_classes]
    if needing and "ignore" not in dataset.labels:
        problems.append("there are partial or unlabelled cases, but the labels have no \"ignore\"")
    return problems + _validation_problems(dataset)


def _validation_problems(dataset: Dataset) -> list[str]:
    kinds = dataset.kinds
    try:
        patients = patients_of(kinds, dataset.patient_pattern)
    except InputError as error:
        return [str(error)]
    patients = dataset.patients or patients
    problems = [f"{name}: is to validate, but its label is {kinds.get(name, 'not there')}"
                for name in dataset.validation if kinds.get(name) != FULL and name not in dataset.complete]
    held_back = {patients.get(name) for name in dataset.validation}
    both = {patient for name, patient in patients.items() if patient in held_back and name not in dataset.validation}
    return problems + [f"patient {patient}: has cases for training and for validation" for patient in sorted(both)]


# ---- reading --------------------------------------------------------------------------------------------------------

def raw_dataset(folder: Path, name: str) -> Dataset:
    """Return a data set in nnU-Net's raw format under a new name. Its training cases are taken for fully annotated."""
    described, cases = read_raw(folder)
    known = ("labels", "channel_names", "file_ending", "regions_class_order", "licence", "reference", "dataset", "name",
             "numTraining", "supervision", "patient_pattern", CLASSES_KEY, WRITTEN_BY)
    return Dataset(
        name=name, channel_names=list(described["channel_names"].values()), labels=described["labels"],
        file_ending=described["file_ending"], test=_test_cases(folder, described["file_ending"]),
        training=[Case(case, tuple(Volume(f) for f in images), Volume(label))
                  for case, (images, label) in cases.items()],
        annotated_classes=described.get(CLASSES_KEY) or {}, regions_class_order=described.get("regions_class_order"),
        licence=described.get("licence", "unknown"), reference=described.get("reference", ""),
        more={key: value for key, value in described.items() if key not in known})


def read_raw(folder: Path) -> tuple[dict, dict[str, tuple[list[Path], Path]]]:
    """Return dataset.json and {case: (images, label)} of a data set in nnU-Net's raw format.

    Raises:
        InputError: The folder is no such data set.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    try:
        described = read_description(folder / "dataset.json")
        cases = get_filenames_of_train_images_and_targets(str(folder), described)
        return described, {str(case): ([Path(f) for f in files["images"]], Path(files["label"]))
                           for case, files in cases.items()}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: is no data set in nnU-Net's raw format ({type(error).__name__}: {error}); confkd "
                         f"check tells more") from error


def _test_cases(folder: Path, ending: str) -> list[Case]:
    images, labels = folder / "imagesTs", folder / "labelsTs"
    names = {f.name[:-len(ending) - 5] for f in images.glob(f"*_????{ending}")} if images.is_dir() else set()
    return [Case(name, tuple(Volume(f) for f in sorted(images.glob(f"{escape(name)}_????{ending}"))),
                 Volume(labels / (name + ending)) if (labels / (name + ending)).is_file() else None)
            for name in sorted(names)]


def validation_patients(dataset: str, patients: dict[str, str]) -> set[str] | None:
    """Return the patients that the first fold of a data set validates on; None without a splits_final.json.

    Args:
        dataset: The name of the data set's folder.
        patients: {case: patient} of all its training cases.

    Raises:
        InputError: The fold names a case that the data set does not have.
    """
    file = preprocessed_folder() / dataset / "splits_final.json"
    if not file.is_file():
        return None
    cases = read_folds(file)[0]["val"]
    unknown = [case for case in cases if case not in patients]
    if unknown:
        raise InputError(f"{file}: names cases that {dataset} does not have: {some(unknown)}")
    return {patients[case] for case in cases}
