"""Kinds of supervision: which case is fully annotated, partially annotated or unlabelled.

The kind of a case follows from its *preprocessed* label, because that is what training sees: resampling may drop
single annotated voxels.
"""
from __future__ import annotations

import json
import warnings
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from nnunet_confkd.data.images import count_voxels
from nnunet_confkd.data.json_files import NEEDED
from nnunet_confkd.errors import InputError
from nnunet_confkd.files import write_json

if TYPE_CHECKING:  # worker processes that only convert files need no torch
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

FULL, PARTIAL, UNLABELLED = "full", "partial", "unlabelled"
KINDS = (FULL, PARTIAL, UNLABELLED)  # from the most to the least annotation
TABLE_KEY = "supervision"  # the table's key in dataset.json: {case: kind}
OUTSIDE = -1  # nnU-Net's label of padding and of the empty surroundings of an image


# ---- counting -------------------------------------------------------------------------------------------------------

def kind_of(counts: dict[int, int], ignore_label: int | None) -> str:
    """Return the kind of a case. Where some voxels are ignored, training also ignores those of `OUTSIDE`.

    Args:
        counts: {label: voxels}, those of `ignore_label` and of `OUTSIDE` included.
        ignore_label: None if the data set has none.

    Examples:
        >>> kind_of({0: 90, 1: 10}, 2), kind_of({0: 5, 1: 5, 2: 90}, 2), kind_of({2: 100}, 2)
        ('full', 'partial', 'unlabelled')
    """
    if not counts.get(ignore_label, 0):
        return FULL
    annotated = sum(number for label, number in counts.items() if label not in (ignore_label, OUTSIDE))
    return PARTIAL if annotated else UNLABELLED


def annotation_counts(folder: str | Path, cases: Iterable[str], label_manager: LabelManager,
                      cache: str | Path | None = None, processes: int = 8) -> dict[str, dict[int, int]]:
    """Count the voxels of each label in the cases of a preprocessed configuration.

    Args:
        folder: The configuration's preprocessed folder.
        cases: The names of the cases.
        label_manager: nnU-Net's, of the data set.
        cache: A JSON file that keeps the counts, with the size and the time of each label file. Labels that have
            changed are counted again. It must not lie inside `folder`, where nnU-Net would take it for a case.
        processes: How many threads read labels.

    Returns:
        {case: {label: voxels}}. The labels are those of the data set, `OUTSIDE` and the ignore label.

    Raises:
        InputError: A label file is missing, or holds any other value. The text names the case.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    folder, cases = Path(folder), sorted(cases)
    labels = [OUTSIDE, *(int(label) for label in label_manager.all_labels)]
    if label_manager.has_ignore_label:
        labels.append(int(label_manager.ignore_label))
    known = _read_cache(cache, labels)
    dataset = infer_dataset_class(str(folder))(str(folder), list(cases))

    def count(case: str) -> dict:
        stamp = _stamp(folder, case)
        if case in known and known[case]["stamp"] == stamp:
            return known[case]
        try:
            seg = _read_label(dataset, folder, case)
        except Exception as error:  # broken bytes can lead to any
            raise unreadable(folder, case, error) from error
        counts = count_voxels(seg, labels)
        if sum(counts.values()) != seg.size:
            strange = sorted(set(np.unique(seg).tolist()) - set(labels))
            raise InputError(f"{folder / case}: the label holds the values {strange}, which dataset.json does not "
                             f"list. Correct the label or dataset.json and preprocess again.")
        return {"stamp": stamp, "counts": [counts[label] for label in labels]}

    with ThreadPoolExecutor(processes) as pool:
        # a bar for the first time only: later all counts are known, and it takes no time
        bar = tqdm(pool.map(count, cases), "count annotations", len(cases), disable=True if known else None)
        entries = dict(zip(cases, bar))
    if cache is not None and any(known.get(case) != entry for case, entry in entries.items()):
        _write_cache(cache, labels, known | entries)
    return {case: dict(zip(labels, entry["counts"])) for case, entry in entries.items()}


def _read_label(dataset, folder: Path, case: str) -> np.ndarray:
    """Read a preprocessed label alone. nnU-Net reads the properties, too, which for many classes are far larger."""
    file = folder / f"{case}_seg.b2nd"
    if file.is_file():
        import blosc2
        return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, **dataset.mmap_kwargs)[:]
    return np.load(folder / f"{case}.npz")["seg"]


def _stamp(folder: Path, case: str) -> list[int]:
    """Return size and modification time of the file that holds a case's preprocessed label."""
    for name in (f"{case}_seg.b2nd", f"{case}.npz"):
        if (folder / name).is_file():
            status = (folder / name).stat()
            return [status.st_size, status.st_mtime_ns]
    raise InputError(f"{folder}: no preprocessed label of the case '{case}'. Run nnUNetv2_preprocess again, or correct "
                     f"splits_final.json if there is no such case.")


def _read_cache(cache: str | Path | None, labels: list[int]) -> dict:
    try:
        content = json.loads(Path(cache).read_text(encoding="utf-8"))
        return content["cases"] if content["labels"] == labels else {}
    except (TypeError, OSError, ValueError, KeyError):  # none asked for, none there, or not ours
        return {}


def _write_cache(cache: str | Path, labels: list[int], cases: dict) -> None:
    try:
        write_json(cache, {"labels": labels, "cases": cases}, indent=None)
    except OSError as error:  # read-only data is no reason not to train
        warnings.warn(f"could not keep the annotation counts in {cache}: {error}", stacklevel=2)


# ---- deciding -------------------------------------------------------------------------------------------------------

def decide_kinds(counts: dict[str, dict[int, int]], label_manager: LabelManager,
                 table: dict | None = None, hidden: Container[str] = ()) -> dict[str, str]:
    """Decide the kind of each case. It is that of its label, unless the table declares less annotation.

    A case that is not annotated for all classes is partially annotated, also if each of its voxels has a label.

    Args:
        counts: {case: {label: voxels}} of all cases.
        label_manager: nnU-Net's, of the data set.
        table: dataset.json's "supervision", {case: kind}.
        hidden: Cases that are not annotated for all classes
            (:func:`nnunet_confkd.data.annotated_classes.annotated_classes`).

    Returns:
        {case: kind}.

    Raises:
        InputError: The table names a case or a kind that does not exist, declares a case full whose label has ignored
            voxels or lacks classes, or declares a case partial or unlabelled in a data set without an ignore label. The
            text has all of it.
    """
    table = {} if table is None else table
    if not isinstance(table, dict):
        raise InputError(f"dataset.json: \"{TABLE_KEY}\" must be an object {{case: kind}}, got {table!r}")
    kinds = {}
    problems = [f"{case}: there is no such case among the preprocessed "
                f"ones" for case in sorted(set(table) - set(counts))]
    for case, count in counts.items():
        found = kind_of(count, label_manager.ignore_label)
        if found == FULL and case in hidden:
            found = PARTIAL
        declared = table.get(case, found)
        if declared not in KINDS:
            problems.append(f"{case}: '{declared}' is no kind of supervision; use one of {', '.join(KINDS)}")
        elif declared == FULL != found:
            ignored = count.get(label_manager.ignore_label, 0)
            reason = (f"{ignored} of its voxels are ignored" if ignored else
                      '"annotated_classes" lacks some of its classes')
            problems.append(f"{case}: declared full, but {reason}; declare it {found} or leave it out of the table")
        elif declared not in (FULL, found) and not label_manager.has_ignore_label:
            problems.append(f"{case}: declared {declared}, but the labels in dataset.json have no \"ignore\" (the "
                            f"highest label plus one), without which no voxel can be without a label")
        else:
            kinds[case] = max(declared, found, key=KINDS.index)
    if problems:
        raise InputError("dataset.json, \"supervision\":\n  " + "\n  ".join(problems))
    return kinds


def require_full(kinds: dict[str, str]) -> None:
    """Raise InputError if no case is fully annotated: the teacher would have nothing to learn from."""
    if FULL not in kinds.values():
        raise InputError(
            f"none of the {len(kinds)} training cases is fully annotated ({summary(kinds)}), so there is no teacher. "
            f"Annotate at least one case completely, or train nnU-Net with its ignore label alone (-tr nnUNetTrainer).")


def summary(kinds: dict[str, str]) -> str:
    """Return for example "3 full, 57 partial, 0 unlabelled".

    Examples:
        >>> summary({"case_1": "full", "case_2": "partial"})
        '1 full, 1 partial, 0 unlabelled'
    """
    return ", ".join(f"{sum(k == kind for k in kinds.values())} {kind}" for kind in KINDS)


def lost_annotations(cases: Iterable[str], label_folder: str | Path, file_ending: str, reader_writer,
                     ignore_label: int, processes: int = 8) -> list[str]:
    """Find the cases that have lost all annotated voxels in resampling.

    Args:
        cases: Cases whose preprocessed label has no annotated voxel.
        label_folder: The folder of the original labels (nnU-Net's `gt_segmentations`). Cases without a file there are
            left out.
        file_ending: The ending of these files.
        reader_writer: An instance of nnU-Net's reader for these files.
        ignore_label: The value of "ignore".
        processes: How many threads read labels.

    Returns:
        Those of `cases` whose original label has annotated voxels.
    """
    files = {case: Path(label_folder) / (case + file_ending) for case in cases}

    def annotated(case: str) -> bool:
        return bool((reader_writer.read_seg(str(files[case]))[0] != ignore_label).any())

    present = [case for case in files if files[case].is_file()]
    with ThreadPoolExecutor(processes) as pool:
        return [case for case, lost in zip(present, pool.map(annotated, present)) if lost]


def check_labels(dataset_json: dict) -> None:
    """Raise InputError if nnU-Net cannot use the labels, or the ignore label is not the highest label plus one."""
    try:
        labels = dict(dataset_json["labels"])
        ignore = labels.pop("ignore", None)
        highest = max(int(v) for value in labels.values()
                      for v in (value if isinstance(value, (list, tuple)) else [value]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f'dataset.json: "labels" must be {NEEDED["labels"]} ({type(error).__name__}: '
                         f"{error})") from error
    if ignore is not None and ignore != highest + 1:
        raise InputError(
            f"dataset.json: the ignore label is {ignore!r}, but nnU-Net needs the highest other label plus one, "
            f"{highest + 1}. Change it there and in the label files, then plan and preprocess again.")
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    try:
        LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    except Exception as error:  # what else nnU-Net asks of them
        raise InputError(f"dataset.json: {error}") from error


def unreadable(folder: str | Path, case: str, error: Exception) -> InputError:
    """Return the error for a preprocessed case that cannot be read."""
    return InputError(f"{Path(folder) / case}: the preprocessed case cannot be read ({type(error).__name__}: {error}). "
                      f"Its files are damaged or missing: preprocess again (confkd plan or nnUNetv2_preprocess).")
