"""The one writer of nnU-Net's raw format: what a converter found goes in, a checked data set comes out, or none at all."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nnunet_confkd.data.folders import folder_name, new_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import Geometry, Volume, carry_over, ending_of, parts, stands_alone, write
from nnunet_confkd.data.json_files import read_description, read_folds
from nnunet_confkd.data.patients import FOLDS, number_range, patients_of, split_full_cases
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.files import write_json
from nnunet_confkd.processes import PROCESSES, parallel


@dataclass(frozen=True)
class Case:
    """One image with its label.

    images: one volume a channel, or volumes of several (4-D, colours).
    label: None for an unlabelled training case, or a test case without a label.
    values: {value in the label file: value to write}; any other value is an error. None: those of the data set.
    """
    name: str
    images: tuple[Volume, ...]
    label: Volume | None = None
    kind: str = FULL
    values: dict[int, int] | None = None


@dataclass
class Dataset:
    """What a converter hands to :func:`write_dataset`.

    name: `Dataset027_NAME`. labels: as in dataset.json, "ignore" included where any case is not full.
    training: all cases of imagesTr. test: written to imagesTs and labelsTs.
    validation: cases that are held back. They validate and never train. Empty: every fully annotated patient validates in
        one fold and trains in the others.
    folds: at most how many folds splits_final.json gets.
    patient_pattern: a regular expression whose first group in the name of a case is the patient; None: a case a patient.
    patients: {case: patient} for the folds, where the pattern cannot tell that two cases show the same patient.
    roots: the folders that were given; a file that lies elsewhere (a link) is refused. Empty: no such check.
    problems: what the converter found to be wrong; nothing is written then.
    more: further entries of dataset.json.
    """
    name: str
    channel_names: list[str]
    labels: Mapping[str, int | list[int]]
    file_ending: str
    training: list[Case]
    validation: list[str] = field(default_factory=list)
    folds: int = FOLDS
    test: list[Case] = field(default_factory=list)
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


# ---- labels ---------------------------------------------------------------------------------------------------------

def label_values(labels: Mapping[str, int | list[int]]) -> set[int]:
    """All the integers in dataset.json's labels, regions taken apart."""
    return {int(v) for value in labels.values() for v in (value if isinstance(value, (list, tuple)) else [value])}


def with_ignore(labels: Mapping[str, int | list[int]]) -> dict[str, int | list[int]]:
    """The labels with "ignore", where nnU-Net wants it: one above the highest. Raises InputError where it is elsewhere."""
    wanted = max(label_values({name: value for name, value in labels.items() if name != "ignore"})) + 1
    if labels.get("ignore", wanted) != wanted:
        raise InputError(f"the ignore label is {labels['ignore']}, but nnU-Net needs the highest other label plus one, "
                         f"{wanted}")
    if wanted > np.iinfo(np.int16).max:
        raise InputError(f"the labels go up to {wanted - 1}, and nnU-Net keeps them in 16 bits; number them from 0 on")
    return {**labels, "ignore": wanted}


# ---- writing --------------------------------------------------------------------------------------------------------

def write_dataset(dataset: Dataset, dataset_id: int, processes: int = PROCESSES, link: bool = False) -> Path:
    """Check all of it and write it to nnUNet_raw, and splits_final.json to nnUNet_preprocessed.

    Images that nnU-Net can read are copied byte for byte, or with `link` become hard links (then a program that writes to
    nnU-Net's image writes to the source's); what it cannot read is converted without loss. A label is copied where its
    values and its grid need no change. Nothing stays behind where anything is wrong.
    Returns the folder. Raises InputError with all that is wrong with the data, or for an id that is taken, a folder that
    cannot be written to, or a full disk.
    """
    with new_dataset(dataset_id, dataset.name) as (folder, preprocessed):
        write_into(folder, preprocessed, dataset, processes, link)
    return raw_folder() / folder_name(dataset_id, dataset.name)


def write_into(folder: Path, preprocessed: Path, dataset: Dataset, processes: int = PROCESSES, link: bool = False) -> None:
    """:func:`write_dataset` into the two folders of :func:`new_dataset`, for those that write more than that."""
    problems = [*dataset.problems, *_problems_of_the_whole(dataset)]
    ignore = dataset.labels.get("ignore")
    lean = replace(dataset, training=[], test=[])  # goes to a process with every case
    tasks = [(case, folder / f"images{split}", folder / f"labels{split}", lean, ignore, link)
             for split, cases in (("Tr", dataset.training), ("Ts", dataset.test)) for case in cases
             if name_problem(case.name) is None]
    # of a name that is there twice (see above) the first
    tasks = list({task[0].name.lower(): task for task in reversed(tasks)}.values())[::-1]
    for case, images, labels, *_ in tasks:
        images.mkdir(exist_ok=True)
        if case.label is not None or case.kind != FULL:
            labels.mkdir(exist_ok=True)
    problems += [problem for found in parallel(_write_case, tasks, processes, f"writing {dataset.name}")
                 for problem in found]
    if problems:
        raise InputError(f"{len(problems)} problems; nothing was written:\n  " + "\n  ".join(problems)
                         if len(problems) > 1 else problems[0])
    write_json(folder / "dataset.json", _dataset_json(dataset))
    try:
        folds = folds_of(dataset)
    except InputError:
        return  # summary() says what to do without a split
    write_json(preprocessed / "splits_final.json", folds)


def folds_of(dataset: Dataset) -> list[dict[str, list[str]]]:
    """The folds of splits_final.json. Raises InputError where there are too few fully annotated patients."""
    kinds = {case.name: case.kind for case in dataset.training}
    patients = dataset.patients or patients_of(kinds, dataset.patient_pattern)
    return split_full_cases(kinds, patients, {patients[case] for case in dataset.validation}, dataset.folds)












def _write_case(case: Case, images: Path, labels: Path, dataset: Dataset, ignore: int | None, link: bool) -> list[str]:
    """Write one case; returns what is wrong with it, and then may have written a part. Raises OSError for a full disk."""
    problems, grid, channels, written, whole = [], None, 0, 0, {}
    for volume in case.images:
        source = (volume.file, volume.reader)
        try:
            if source not in whole:  # the channels of a 4-D file follow each other: read it once
                _require_inside(volume.file, dataset.roots)
                whole = {source: replace(volume, channel=None).read()}
        except InputError as error:
            problems.append(str(error))
            continue
        picture = whole[source] if volume.channel is None else whole[source].channel(volume.channel)
        channels += len(picture.voxels)
        if picture.voxels.dtype.kind == "f" and not np.isfinite(picture.voxels).all():
            problems.append(f"{volume.file}: {int((~np.isfinite(picture.voxels)).sum())} voxels are not finite (NaN or "
                            f"infinite); replace them")
        grid = grid or picture.geometry
        if dataset.file_ending.lower() == ".nii" and len(picture.geometry.size) < 3:
            problems.append(f"{volume.file}: is two-dimensional, which nnU-Net does not read from .nii; compress all files "
                            f"to .nii.gz")
        problems += _grid_problems(volume.file, picture.geometry, case, grid)
        if problems:
            continue  # nothing will be kept
        # to nnU-Net spacings that differ a little between channels are an error, and so is a .nii of several channels
        as_it_is = _as_it_is(volume, dataset) and np.allclose(picture.geometry.spacing, grid.spacing) and (
            len(picture.voxels) == 1 or dataset.file_ending.lower() != ".nii")
        for voxels in [None] if as_it_is else picture.voxels:
            target = images / f"{case.name}_{written:04d}{dataset.file_ending}"
            written += 1
            if as_it_is:
                carry_over(volume.file, target, link)
            else:
                write(target, voxels, grid)
    if not problems and channels != len(dataset.channel_names):
        problems.append(f"{case.images[0].file}: the case has {channels} channels; {len(dataset.channel_names)} are "
                        f"expected ({', '.join(dataset.channel_names)})")
    return problems + _write_label(case, labels / f"{case.name}{dataset.file_ending}", grid, dataset, ignore)


def _as_it_is(volume: Volume, dataset: Dataset) -> bool:
    """Whether a copy of the file will do."""
    return (volume.reader is None and volume.channel is None
            and (ending_of(volume.file) or "").lower() == dataset.file_ending.lower() and stands_alone(volume.file))


def _grid_problems(file: Path, geometry: Geometry, case: Case, grid: Geometry) -> list[str]:
    return [f"{file}: is on another grid than {case.images[0].file}: {difference}; resample it, or correct its header"
            for difference in geometry.differences(grid)]


def _write_label(case: Case, target: Path, grid: Geometry | None, dataset: Dataset, ignore: int | None) -> list[str]:
    """grid: of the image; None where it could not be read. Returns and raises as `_write_case`."""
    dtype = np.uint8 if max(dataset.values) < 256 else np.uint16
    if case.label is None:
        if case.kind == FULL or grid is None:
            return []  # a test case, or nothing to write
        write(target, np.full(grid.size[::-1], ignore, dtype), grid)
        return []
    file = case.label.file
    try:
        _require_inside(file, dataset.roots)
        picture = case.label.read()
    except InputError as error:
        return [str(error)]
    if len(picture.voxels) != 1:
        return [f"{file}: holds {len(picture.voxels)} channels; a label has one"]
    label, grid = picture.voxels[0], grid or picture.geometry
    allowed = case.values or {value: value for value in dataset.values - ({ignore} if case.kind == FULL else set())}
    problems = _grid_problems(file, picture.geometry, case, grid)
    found = np.unique(label)
    whole = np.isfinite(found) & (found == np.rint(found))
    fractions, values = found[~whole], [int(value) for value in found[whole]]
    strange = [value for value in values if value not in allowed]
    if len(fractions):
        problems.append(f"{file}: holds values that are no integers: {some(fractions)}; correct the label")
    if strange:
        problems.append(f"{file}: holds the values {some(strange)}; a {case.kind} label may hold {some(sorted(allowed))}; "
                        f"correct the label, or name and map these values")
    if problems:
        return problems
    # (nnU-Net's reader of TIFF and PNG makes floats of all, so that those labels are written anew)
    unchanged = label.dtype.kind in "iu" and all(allowed[value] == value for value in found)
    if unchanged and _as_it_is(case.label, dataset) and picture.geometry.equals_for_nnunet(grid):
        carry_over(file, target)  # never a link: labels are what people edit
        return []
    written = np.zeros(label.shape, dtype)
    for value in found:
        written[label == value] = allowed[value]
    write(target, written, grid)
    return []


def _dataset_json(dataset: Dataset) -> dict:
    described = {
        "channel_names": {str(i): name for i, name in enumerate(dataset.channel_names)}, "labels": dataset.labels,
        "numTraining": len(dataset.training), "file_ending": dataset.file_ending, "name": dataset.name,
        "licence": dataset.licence, "reference": dataset.reference,
        "supervision": {case.name: case.kind for case in sorted(dataset.training, key=lambda case: case.name)}}
    if dataset.regions_class_order is not None:
        described["regions_class_order"] = dataset.regions_class_order
    if dataset.patient_pattern is not None:
        described["patient_pattern"] = dataset.patient_pattern
    return described | dataset.more


def summary(folder: Path) -> str:
    """A few lines on a data set that was just written, and what comes next."""
    described = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    kinds = described["supervision"]
    splits = preprocessed_folder() / folder.name / "splits_final.json"
    number = int(folder.name[7:10])
    counts = ", ".join(f"{list(kinds.values()).count(kind)} {kind}" for kind in (FULL, PARTIAL, UNLABELLED))
    if splits.is_file():
        pattern = described.get("patient_pattern")
        text = _folds_text(json.loads(splits.read_text(encoding="utf-8")), kinds, patients_of(kinds, pattern),
                           "patients" if pattern else "cases")
    else:
        text = (f"no split was written: it takes two fully annotated patients to spare one for validation. Train on fold "
                f"'all': confkd train {number} CONFIGURATION all")
    return (f"{folder}: {len(kinds)} training cases ({counts})\n{text}\n"
            f"next: confkd check -d {number}, then confkd plan -d {number}")


def _folds_text(folds: list[dict[str, list[str]]], kinds: dict[str, str], patients: dict[str, str], noun: str) -> str:
    """What the folds train and validate on, and what a single fold means. noun: "patients", or "cases" where each is one."""
    full = set(patients.values()) - {patients[case] for case, kind in kinds.items() if kind != FULL}
    training = [full & {patients[case] for case in fold["train"]} for fold in folds]
    validating = [{patients[case] for case in fold["val"]} for fold in folds]
    held_back = len(full - set().union(*training))
    counts = [number_range(map(len, sets)) for sets in (training, validating)]
    if len(folds) == 1:
        return (f"one fold: fold 0 trains on {counts[0]} fully annotated {noun} and validates on {counts[1]}, which are held "
                f"back. There are no folds 1 to 4: give -f 0 to nnUNetv2_find_best_configuration and nnUNetv2_predict")
    if held_back:
        return (f"{len(folds)} folds: each trains on the same {counts[0]} fully annotated {noun} and validates on {counts[1]} of "
                f"{held_back} that are held back from training")
    return (f"{len(folds)} folds over {len(full)} fully annotated {noun}: each trains on {counts[0]} of them and validates on "
            f"{counts[1]}; all other cases train in every fold")




# ---- what is wrong with the whole -----------------------------------------------------------------------------------

def name_problem(name: str) -> str | None:
    """Why nnU-Net, or some file system, cannot have a case of this name; None if it can."""
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
    if any(case.kind != FULL for case in cases) and "ignore" not in dataset.labels:
        problems.append("there are partial or unlabelled cases, but the labels have no \"ignore\"")
    try:
        patients = patients_of([case.name for case in dataset.training], dataset.patient_pattern)
    except InputError as error:
        return [*problems, str(error)]
    patients = dataset.patients or patients
    kinds = {case.name: case.kind for case in dataset.training}
    problems += [f"{name}: is to validate, but its label is {kinds.get(name, 'not there')}"
                 for name in dataset.validation if kinds.get(name) != FULL]
    held_back = {patients.get(name) for name in dataset.validation}
    both = {patient for name, patient in patients.items() if patient in held_back and name not in dataset.validation}
    return problems + [f"patient {patient}: has cases for training and for validation" for patient in sorted(both)]


def _require_inside(file: Path, roots: tuple[Path, ...]) -> None:
    """A link, a path with .., or a header that names another file could bring in anything."""
    for part in parts(file) if roots else ():
        if not any(part.resolve().is_relative_to(root.resolve()) for root in roots):
            raise InputError(f"{part}: leads out of the source folder, to {part.resolve()}; copy it there, or give the "
                             f"folder that holds it")


# ---- reading ----------------------------------------------------------------------------------------------------------

def raw_dataset(folder: Path, name: str) -> Dataset:
    """A data set in nnU-Net's raw format, its training cases taken for full."""
    described, cases = read_raw(folder)
    known = ("labels", "channel_names", "file_ending", "regions_class_order", "licence", "reference", "dataset", "name",
             "numTraining", "supervision", "patient_pattern")
    return Dataset(
        name=name, channel_names=list(described["channel_names"].values()), labels=described["labels"],
        file_ending=described["file_ending"], test=_test_cases(folder, described),
        training=[Case(case, tuple(Volume(f) for f in images), Volume(label)) for case, (images, label) in cases.items()],
        regions_class_order=described.get("regions_class_order"), licence=described.get("licence", "unknown"),
        reference=described.get("reference", ""), more={key: value for key, value in described.items() if key not in known})


def read_raw(folder: Path) -> tuple[dict, dict[str, tuple[list[Path], Path]]]:
    """dataset.json and {case: (images, label)} of a data set in nnU-Net's raw format."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    try:
        described = read_description(folder / "dataset.json")
        cases = get_filenames_of_train_images_and_targets(str(folder), described)
        return described, {str(case): ([Path(f) for f in files["images"]], Path(files["label"])) for case, files in cases.items()}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: is no data set in nnU-Net's raw format ({type(error).__name__}: {error}); confkd check tells "
                         f"more") from error


def _test_cases(folder: Path, described: dict) -> list[Case]:
    ending, cases = described["file_ending"], []
    images = folder / "imagesTs"
    names = {f.name[:-len(ending) - 5] for f in images.glob(f"*_????{ending}")} if images.is_dir() else set()
    for name in sorted(names):
        label = folder / "labelsTs" / (name + ending)
        cases.append(Case(name, tuple(Volume(f) for f in sorted(images.glob(f"{_escaped(name)}_????{ending}"))),
                          Volume(label) if label.is_file() else None))
    return cases


def _escaped(name: str) -> str:
    from glob import escape
    return escape(name)


def validation_patients(dataset: str, patients: dict[str, str]) -> set[str] | None:
    """The patients that the source's first fold validates on; None without a split."""
    file = preprocessed_folder() / dataset / "splits_final.json"
    if not file.is_file():
        return None
    cases = read_folds(file)[0]["val"]
    unknown = [case for case in cases if case not in patients]
    if unknown:
        raise InputError(f"{file}: names cases that {dataset} does not have: {', '.join(unknown[:10])}")
    return {patients[case] for case in cases}
