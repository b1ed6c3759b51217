"""nnU-Net's fingerprint, planning and preprocessing, corrected for partial labels.

Without an ignore label these are nnU-Net's own steps and results. With one,

- the intensity statistics are those of annotated foreground; nnU-Net takes ignored voxels for foreground;
- resampling keeps annotated voxels;
- the default split validates on fully annotated cases only;
- a report compares the annotations before and after.

Data sets whose cases are annotated for different classes get the split and the report also without an ignore label.

In both cases `confkd` blocks of settings in the plans survive when the data set is planned again.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nnunetv2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
    preprocess_dataset,
)
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_confkd.data.annotated_classes import CLASSES_KEY, annotated_classes
from nnunet_confkd.data.folders import find_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import TIFF, count_voxels, ending_of, quiet, spacing_file
from nnunet_confkd.data.json_files import CONFIGURATIONS, read_description, read_folds, read_json, read_plans
from nnunet_confkd.data.patients import patients_of, split_full_cases, split_text
from nnunet_confkd.data.resampling import KeepAnnotations
from nnunet_confkd.data.supervision import (
    FULL,
    OUTSIDE,
    PARTIAL,
    TABLE_KEY,
    UNLABELLED,
    annotation_counts,
    check_labels,
    decide_kinds,
    kind_of,
    summary,
)
from nnunet_confkd.errors import InputError, did_you_mean
from nnunet_confkd.files import written_whole

BLOCK = "confkd"  # the key of the trainer's settings in the plans
# an entry of our fingerprints; a fingerprint without it counts ignored voxels as foreground
MARKER, MARK = "foreground_intensities_of", "annotated voxels"
LACKING = "lack classes"  # heads the columns of cases that are not annotated for all classes
PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}  # nnU-Net's defaults; 4 for any other
THREADS = 8
CASCADE = "3d_cascade_fullres"  # planned with 3d_lowres, for large images


def plan(datasets: Sequence[int | str], *, configurations: Sequence[str] = CONFIGURATIONS,
         planner: str = "ExperimentPlanner", gpu_memory_target: float | None = None,
         preprocessor_name: str = "DefaultPreprocessor", overwrite_target_spacing: Sequence[float] | None = None,
         overwrite_plans_name: str | None = None, fingerprint_extractor: str = "DatasetFingerprintExtractor",
         fingerprint_processes: int = 8, processes: Sequence[int] | None = None, verify_integrity: bool = False,
         clean: bool = False, no_preprocessing: bool = False, verbose: bool = False,
         no_progress_bar: bool = False) -> str:
    """Do what nnUNetv2_plan_and_preprocess does.

    Args:
        datasets: Ids or names.

    The keywords are nnU-Net's options, with its defaults (see `confkd plan --help`).

    Returns:
        The name of the plans.

    Raises:
        InputError: There is no such data set or class, numbers do not fit, labels cannot be read or hold values that
            dataset.json does not list, its "supervision" contradicts them, or no foreground is annotated. Nothing has
            been written then. There is no such configuration; then the plans have been written.

    Examples:
        >>> plan([27], configurations=["2d"])  # doctest: +SKIP
        'nnUNetPlans'
    """
    names = [_find(dataset) for dataset in datasets]
    processes = list(processes or [PROCESSES.get(c, 4) for c in configurations])
    if len(processes) not in (1, len(configurations)):
        raise InputError(f"-np: {len(processes)} numbers for {len(configurations)} configurations; give one number, or "
                         f"one for each")
    processes = processes * len(configurations) if len(processes) == 1 else processes
    if overwrite_target_spacing is not None and len(overwrite_target_spacing) != 3:
        raise InputError(f"-overwrite_target_spacing: three numbers are needed, not {len(overwrite_target_spacing)}")
    extractor = _find_class("experiment_planning", fingerprint_extractor, "-fpe")
    _find_class("experiment_planning", planner, "-pl")
    _find_class("preprocessing", preprocessor_name, "-preprocessor_name")
    described = {name: _dataset_json(name) for name in names}
    labels = {name: read_raw_labels(name, content) for name, content in described.items()
              if "ignore" in content["labels"] or content.get(CLASSES_KEY)}
    corrected = [name for name, of_name in labels.items() if of_name.manager.has_ignore_label]

    bar = not no_progress_bar
    print("Fingerprint extraction...")
    for name in names:
        if name not in corrected:
            extract_fingerprints([_id(name)], fingerprint_extractor, fingerprint_processes, verify_integrity, clean,
                                 verbose, bar)
            continue
        print(name)
        if verify_integrity:
            verify_dataset_integrity(str(raw_folder() / name), fingerprint_processes)
        extract_annotated_fingerprint(name, labels[name], extractor, fingerprint_processes, clean, verbose, bar)

    print("Experiment planning...")
    for name in names:
        with _blocks_kept(preprocessed_folder() / name), _threads_for_planning():
            plans_name = plan_experiments([_id(name)], planner, gpu_memory_target, preprocessor_name,
                                          overwrite_target_spacing, overwrite_plans_name)

    if not no_preprocessing:
        _require_configurations(names, plans_name, configurations)
        print("Preprocessing...")
        for name in names:
            if name in corrected:
                preprocess_keeping_annotations(name, plans_name, configurations, processes, verbose, bar)
            else:
                preprocess([_id(name)], plans_name, configurations, processes, verbose, bar)
    for name in labels:
        print()
        if not no_preprocessing:
            for configuration, counts in preprocessed_counts(name, plans_name, configurations, labels[name]).items():
                print(report(name, configuration, labels[name], counts))
        write_split(name, labels[name])
    return plans_name


# ---- input ----------------------------------------------------------------------------------------------------------

def _find(dataset: int | str) -> str:
    name = find_dataset(dataset)
    if not (name.startswith("Dataset") and name[7:10].isdigit()):
        raise InputError(f"{raw_folder() / name}: nnU-Net's data sets are called Dataset027_NAME")
    preprocessed_folder()
    try:
        convert_id_to_dataset_name(_id(name))
    except RuntimeError as error:  # another of the same id, among the preprocessed ones or the results
        raise InputError(str(error)) from error
    return name


def _id(name: str) -> int:
    return int(name[7:10])


def _find_class(package: str, name: str, option: str) -> type:
    """Find a class of nnU-Net by its name, as nnU-Net does."""
    found = recursive_find_python_class(os.path.join(nnunetv2.__path__[0], package), name, f"nnunetv2.{package}")
    if found is None:
        raise InputError(f"{option} {name}: nnU-Net has no such class in nnunetv2.{package}")
    return found


def _require_configurations(names: Sequence[str], plans_name: str, configurations: Sequence[str]) -> None:
    """Raise InputError if nnU-Net knows no configuration of a name, and no data set's plans have one."""
    files = [preprocessed_folder() / name / f"{plans_name}.json" for name in names]
    there = list(dict.fromkeys(known for file in files for known in read_plans(file)["configurations"]))
    for name in configurations:
        if name not in (*there, *CONFIGURATIONS, CASCADE):
            raise InputError(f"-c {name}: there is no configuration {name}{did_you_mean(name, there)}; the plans have "
                             f"{', '.join(there)}")


def _replace_json(file: Path, content) -> None:
    """Write a JSON file atomically, in nnU-Net's format. Raises InputError if it cannot be written."""
    try:
        with written_whole(file) as aside:
            save_json(content, str(aside), sort_keys=False)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error


def _dataset_json(name: str) -> dict:
    file = raw_folder() / name / "dataset.json"
    described = read_description(file, ["labels", "file_ending", "numTraining"])
    with _about(file.parent):
        check_labels(described)
    return described


@contextmanager
def _about(folder: Path) -> Iterator[None]:
    """Name the data set in the errors that are raised meanwhile."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


@dataclass
class RawLabels:
    """The training labels of a data set with an ignore label, or with cases that are not annotated for all classes.

    Attributes:
        files: {case: label file}.
        counts: {case: {label: voxels}}.
        kinds: {case: kind of supervision}.
        patients: {case: patient}.
        reader: nnU-Net's reader for the files.
        manager: nnU-Net's label manager of the data set.
        lists: {case: the classes that it is annotated for}, of the cases that are not annotated for all.
    """
    files: dict[str, str]
    counts: dict[str, dict[int, int]]
    kinds: dict[str, str]
    patients: dict[str, str]
    reader: type[BaseReaderWriter]
    manager: LabelManager
    lists: dict[str, list[str]] = field(default_factory=dict)


def read_raw_labels(name: str, described: dict) -> RawLabels:
    """Count the voxels of all labels.

    Args:
        name: Of the data set's folder.
        described: The content of its dataset.json.

    Raises:
        InputError: With all that is wrong with the labels.
    """
    folder = raw_folder() / name
    try:
        manager = LabelManager(described["labels"], described.get("regions_class_order"))
        found = get_filenames_of_train_images_and_targets(str(folder), deepcopy(described))
        cases = {str(case): files for case, files in found.items()}
        if not cases:
            raise InputError(f"{folder / 'imagesTr'}: holds no training image that ends in "
                             f"_0000{described['file_ending']}")
        example = next(iter(cases.values()))["images"][0]
        with quiet():
            reader = determine_reader_writer_from_dataset_json(described, example, verbose=False)
    except (OSError, LookupError, RuntimeError, AssertionError) as error:
        raise InputError(f"{folder}: the training cases cannot be read ({error}); confkd check tells more") from error
    values = [int(value) for value in (*manager.all_labels, manager.ignore_label) if value is not None]

    def count(case: str) -> Any:  # the counts, or what is wrong
        file = cases[case]["label"]
        try:
            seg = reader().read_seg(file)[0]
        except Exception as error:  # each reader has its own
            return f"{file}: the label cannot be read ({' '.join(str(error).split()[-20:]) or type(error).__name__})"
        counts = count_voxels(seg, values)
        if sum(counts.values()) == seg.size:
            return counts
        strange = np.setdiff1d(np.unique(seg), values)
        return (f"{file}: holds the values {', '.join(f'{v:g}' for v in strange[:10])}; dataset.json lists "
                f"{', '.join(map(str, values))}")

    with quiet(), ThreadPoolExecutor(THREADS) as pool:
        counts = dict(zip(cases, pool.map(count, cases)))
    problems = [found for found in counts.values() if isinstance(found, str)]
    if problems:
        raise InputError(f"{folder}: {len(problems)} labels are wrong; correct them:\n  " + "\n  ".join(problems))
    if not any(c[value] for c in counts.values() for value in map(int, manager.all_labels) if value > 0):
        raise InputError(f"{folder}: none of the {len(cases)} labels has an annotated voxel of any foreground class, "
                         f"so there is nothing to learn; annotate some, or correct \"ignore\" in dataset.json")
    with _about(folder):
        hidden = annotated_classes(described, counts)
        kinds = decide_kinds(counts, manager, described.get(TABLE_KEY), hidden)
        patients = patients_of(cases, described.get("patient_pattern"))
    return RawLabels({case: files["label"] for case, files in cases.items()}, counts, kinds, patients, reader, manager,
                     {case: described[CLASSES_KEY][case] for case in hidden if kinds[case] == PARTIAL})


# ---- fingerprint ----------------------------------------------------------------------------------------------------

def extract_annotated_fingerprint(name: str, labels: RawLabels, extractor_class: type, processes: int, clean: bool,
                                  verbose: bool, show_progress_bar: bool) -> None:
    """Extract nnU-Net's fingerprint with the intensity statistics of annotated foreground.

    nnU-Net's extractor takes every label above 0 for foreground, so it gets copies in which ignored voxels are
    background. All else in the fingerprint follows from the images. A fingerprint that nnU-Net has made is made again.
    One of ours stays unless `clean` is true.

    Args:
        name: Of the data set's folder.
        labels: Its training labels.
        extractor_class: nnU-Net's class for the fingerprint.
        processes: How many processes extract it.
        clean: Whether to replace an existing fingerprint.
        verbose: As in nnU-Net.
        show_progress_bar: As in nnU-Net.
    """
    file = preprocessed_folder() / name / "dataset_fingerprint.json"
    if file.is_file() and not clean:
        if read_json(file).get(MARKER) == MARK:
            return
        print("The existing fingerprint takes ignored voxels for foreground: it is made again.")
    extractor = extractor_class(_id(name), processes, verbose=verbose)
    extractor.show_progress_bar = show_progress_bar
    ignoring = [case for case, counts in labels.counts.items() if counts[labels.manager.ignore_label]]
    with TemporaryDirectory(prefix="confkd_") as folder:
        with quiet(), ThreadPoolExecutor(THREADS) as pool:
            copies = pool.map(partial(_without_ignored, labels=labels, folder=Path(folder)), ignoring)
            for case, copy in zip(ignoring, copies):
                extractor.dataset[case]["label"] = copy
        extractor.run(overwrite_existing=True)
    _replace_json(file, read_json(file) | {MARKER: MARK})


def _without_ignored(case: str, labels: RawLabels, folder: Path) -> str:
    """Write a copy of a case's label to the folder, in which ignored voxels are background. Return its path."""
    file, reader = labels.files[case], labels.reader
    seg, properties = reader().read_seg(file)
    seg[seg == labels.manager.ignore_label] = 0
    target = str(folder / f"{case}_{Path(file).name}")
    reader().write_seg(seg[0], target, properties)
    if not np.array_equal(reader().read_seg(target)[0], seg):  # ITK does not report a full disk
        raise InputError(f"{target}: was not written as it should be; is the disk full? TMPDIR names another folder")
    return target


# ---- planning -------------------------------------------------------------------------------------------------------

@contextmanager
def _blocks_kept(folder: Path) -> Iterator[None]:
    """Put `confkd` blocks back into the plans that are written meanwhile, because nnU-Net drops what it does not know.

    nnU-Net itself keeps configurations that it has not planned.
    """
    files = {file: read_json(file, object) for file in folder.glob("*.json")}
    yield
    for file, before in files.items():
        if not isinstance(before, dict) or "configurations" not in before:
            continue
        plans = read_json(file)
        changed = {**plans, "configurations": {
            name: configuration | _block(before["configurations"].get(name, {}))
            for name, configuration in plans["configurations"].items()}, **_block(before)}
        if changed != plans:
            _replace_json(file, changed)


def _block(content: dict) -> dict:
    return {BLOCK: content[BLOCK]} if BLOCK in content else {}


@contextmanager
def _threads_for_planning() -> Iterator[None]:
    """Give nnU-Net's planner one thread if there are no workers for augmentation, the setting for repeatable training.

    It computes with as many threads as there are workers, and would fail with none.
    """
    repeatable = os.environ.get("nnUNet_n_proc_DA") == "0"
    if repeatable:
        os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        yield
    finally:
        if repeatable:
            os.environ["nnUNet_n_proc_DA"] = "0"


# ---- preprocessing --------------------------------------------------------------------------------------------------

def preprocess_keeping_annotations(name: str, plans_name: str, configurations: Sequence[str], processes: Sequence[int],
                                   verbose: bool, show_progress_bar: bool) -> None:
    """Preprocess as nnU-Net does, with :class:`KeepAnnotations` in place of nnU-Net's own preprocessor.

    Args:
        name: Of the data set's folder.
        plans_name: Of the plans.
        configurations: Those to preprocess. Configurations that the plans lack are skipped.
        processes: The number of processes for each configuration.
        verbose: As in nnU-Net.
        show_progress_bar: As in nnU-Net.
    """
    plans = PlansManager(str(preprocessed_folder() / name / f"{plans_name}.json"))
    for configuration, number in zip(configurations, processes):
        planned = configuration in plans.available_configurations
        used = plans.get_configuration(configuration).preprocessor_name if planned else None
        if used == "DefaultPreprocessor":
            print(f"Configuration: {configuration}...")
            preprocessor = KeepAnnotations(verbose)
            preprocessor.show_progress_bar = show_progress_bar
            preprocessor.run(_id(name), configuration, plans_name, number)
            continue
        if planned:
            print(f"{configuration}: its preprocessor, {used}, is used as it is and may lose single annotated voxels.")
        preprocess_dataset(_id(name), plans_name, [configuration], [number], verbose, show_progress_bar)
    # copies the labels to gt_segmentations, but not the files with the spacing of TIFF
    preprocess_dataset(_id(name), plans_name, [], [], verbose, show_progress_bar)
    described = read_json(raw_folder() / name / "dataset.json")
    for files in get_filenames_of_train_images_and_targets(str(raw_folder() / name), described).values():
        label = Path(files["label"])
        if ending_of(label, TIFF) and spacing_file(label).is_file():
            shutil.copy(spacing_file(label), preprocessed_folder() / name / "gt_segmentations")


def preprocessed_counts(name: str, plans_name: str, configurations: Sequence[str], labels: RawLabels,
                        ) -> dict[str, dict[str, dict[int, int]]]:
    """Count the voxels of the preprocessed labels, and fill the cache that the trainer reads.

    Args:
        name: Of the data set's folder.
        plans_name: Of the plans.
        configurations: Those to count. Configurations that the plans lack are skipped.
        labels: The training labels of the data set.

    Returns:
        {configuration: {case: {label: voxels}}}.
    """
    folder = preprocessed_folder() / name
    plans = PlansManager(str(folder / f"{plans_name}.json"))
    counts = {}
    for configuration in configurations:
        if configuration in plans.available_configurations:
            data = plans.get_configuration(configuration).data_identifier
            cache = folder / f"confkd_supervision_{data}.json"
            counts[configuration] = annotation_counts(folder / data, labels.files, labels.manager, cache)
    return counts


# ---- report and split -----------------------------------------------------------------------------------------------

def report(name: str, configuration: str, labels: RawLabels, after: dict[str, dict[int, int]]) -> str:
    """Compare the annotations before and after preprocessing.

    Args:
        name: Of the data set's folder.
        configuration: For the heading.
        labels: The training labels of the data set.
        after: {case: {label: voxels}} of the preprocessed labels.

    Returns:
        A table of voxels per class, and the cases whose kind has changed, as text.
    """
    ignore = labels.manager.ignore_label
    kinds = {case: kind_of(counts, ignore) for case, counts in labels.counts.items()}
    groups = {LACKING: [case for case in kinds if case in labels.lists],
              "not fully annotated": [case for case in kinds if kinds[case] != FULL and case not in labels.lists],
              "fully annotated": [case for case in kinds if kinds[case] == FULL and case not in labels.lists]}
    groups = {title: cases for title, cases in groups.items() if cases}
    heading = [text for title, cases in groups.items() for text in (f"{len(cases)} {title}:", "")]
    rows = [["", *heading], ["", *["before", "after"] * len(groups)]]
    for value in map(int, labels.manager.all_labels):
        holding = [label for label, content in labels.manager.label_dict.items()
                   if value in np.atleast_1d(content) and label != "ignore"]
        numbers = [sum(counts[case].get(value, 0) for case in cases)
                   + (sum(counts[case].get(OUTSIDE, 0) for case in cases if kind_of(counts[case], ignore) == FULL)
                      if value == 0 else 0)
                   for cases in groups.values() for counts in (labels.counts, after)]
        rows.append([f"{value} {', '.join(holding)}", *map(str, numbers)])
    width = max(len(row[0]) for row in rows)
    lines = [f"{name}, {configuration}: annotated voxels per class, before and after preprocessing"]
    lines += [("  " + row[0].ljust(width) + "".join(f"{cell:>24}" for cell in row[1:])).rstrip() for row in rows]

    if LACKING in groups:
        lines.append("  The background of cases that lack classes may be any class that they do not list.")
    left = {case: kind_of(counts, ignore) for case, counts in after.items()}
    lost = [case for case in kinds if kinds[case] != UNLABELLED == left[case]]
    filled = [case for case in kinds if kinds[case] != FULL == left[case]]
    if lost:
        lines.append(f"  WARNING: {len(lost)} case(s) had annotations and have none left: {', '.join(lost)}")
    if filled:
        lines.append(f"  {len(filled)} case(s) hold no ignored voxel any more and count as fully annotated, unless "
                     f"dataset.json's \"supervision\" says otherwise: {', '.join(filled)}")
    return "\n".join(lines) + "\n"


def _warning_of_split(file: Path, labels: RawLabels) -> str:
    """Return what is to be said of a split that is there."""
    try:
        validated = {case for fold in read_folds(file) for case in fold["val"]}
    except InputError as error:
        return f" WARNING: {error}"
    weak = {case for case in validated if labels.kinds.get(case, FULL) != FULL}
    return (f" WARNING: it validates on {len(weak)} cases that are not fully annotated. Delete it, and the next "
            f"training writes one that does not" if weak - set(labels.lists) else "")


def write_split(name: str, labels: RawLabels) -> None:
    """Write splits_final.json as the trainer would write it, unless there is one.

    The kinds of the raw labels count: a case that resampling has filled up is not fully annotated.
    """
    file = preprocessed_folder() / name / "splits_final.json"
    if file.is_file():
        print(f"{file}: is there already, and stays as it is.{_warning_of_split(file, labels)}")
        return
    try:
        complete = [case for case, counts in labels.counts.items() if not counts.get(labels.manager.ignore_label)]
        splits = split_full_cases(labels.kinds, labels.patients, lists=labels.lists, complete=complete)
    except InputError as error:
        print(f"{file}: was not written ({summary(labels.kinds)}): {error}")
        return
    _replace_json(file, splits)
    print(f"{file}: written, {split_text(splits, labels.kinds)} ({summary(labels.kinds)}).")
