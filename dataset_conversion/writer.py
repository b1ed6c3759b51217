"""The one writer of nnU-Net's raw format: what a converter found goes in, a checked data set comes out, or none at all."""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from nnunet_confkd.dataset_conversion.volumes import (
    Geometry,
    Volume,
    carry_over,
    ending_of,
    parts,
    stands_alone,
    write,
)
from tqdm import tqdm

from nnunet_confkd.errors import InputError
from nnunet_confkd.faults import terminable

FULL, PARTIAL, UNLABELLED = "full", "partial", "unlabelled"
VALIDATION_SHARE = 0.2
FOLDS = 5  # nnU-Net's number
PROCESSES = min(8, os.cpu_count() or 1)


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


# ---- patients -------------------------------------------------------------------------------------------------------

def patients_of(cases: Iterable[str], pattern: str | None) -> dict[str, str]:
    """{case: patient}. Raises InputError with all the cases that the pattern does not match."""
    cases = list(cases)
    if pattern is None:
        return {case: case for case in cases}
    try:
        matches = {case: re.match(pattern, case) for case in cases}
    except re.error as error:
        raise InputError(f"the patient pattern {pattern!r} is no regular expression: {error}") from error
    patients = {case: (match[1] if match.re.groups else match[0]) if match else None for case, match in matches.items()}
    without = [case for case, patient in patients.items() if not patient]
    if without:
        raise InputError(f"the patient pattern {pattern!r} does not match these cases; correct it: {_some(without)}")
    return patients


def experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that keep N patients full and hold others back to validate."""
    parser.add_argument("--seed", type=int, default=0, help="of the choice of patients (and of weak labels)")
    parser.add_argument("--folds", type=int, choices=range(1, FOLDS + 1), default=FOLDS, help="folds over which the patients "
                        f"are divided that are held back to validate (default: {FOLDS}; 1: fold 0 validates on all of them)")


def choose_patients(patients: Iterable[str], seed: int, full: list[str], validation: Iterable[str] | None = None,
                    ) -> dict[str, str]:
    """{patient: "validation" | "full" | "other"}, seeded: about a fifth to validate, and of the others those to stay full.

    full: names, or one number (of the same seed, fewer lie within more).
    validation: the patients that validate, where that is settled already. A single patient does not validate.
    Raises InputError where that many or those are not there, or where they would leave too few to validate.
    """
    order = sorted(set(patients))
    random.Random(seed).shuffle(order)
    named = [] if _is_number(full) else list(full)
    unknown = sorted(set(named) - set(order))
    if unknown:
        raise InputError(f"no such patients: {_some(unknown)}; there are {_some(sorted(order))}")
    if validation is None:
        count = max(1, round(VALIDATION_SHARE * len(order))) if len(order) > 1 else 0
        validation = [patient for patient in order if patient not in named][:count]
        if len(validation) < count:
            raise InputError(f"{len(set(named))} of {len(order)} patients are to be full; name fewer, {count} are needed to "
                             f"validate")
    validation = set(validation)
    if validation & set(named):
        raise InputError(f"these patients validate and cannot be among the full ones: "
                         f"{_some(sorted(validation & set(named)))}")
    rest = [patient for patient in order if patient not in validation]
    if _is_number(full):
        if not 1 <= int(full[0]) <= len(rest):
            raise InputError(f"{full[0]} full patients are asked for; besides the {len(validation)} that validate there are "
                             f"{len(rest)} to choose from")
        named = rest[:int(full[0])]
    return {patient: "validation" if patient in validation else "full" if patient in named else "other" for patient in order}


def _is_number(full: list[str]) -> bool:
    return len(full) == 1 and str(full[0]).isdecimal()


def split_full_cases(kinds: Mapping[str, str], patients: Mapping[str, str] | None = None,
                     held_back: Iterable[str] | None = None, folds: int = FOLDS) -> list[dict[str, list[str]]]:
    """Make the folds of splits_final.json, which validate on fully annotated patients only.

    They are nnU-Net's seeded cross-validation over the patients all of whose cases are fully annotated. All other cases
    train in every fold. A validation on partial labels would measure the annotated voxels only, and a patient on both
    sides nothing at all.

    Args:
        kinds: {case: kind} of all training cases.
        patients: {case: patient}; None: each case is a patient of its own.
        held_back: Patients that validate and never train. Each fold validates on a part of them, and trains on all
            patients that are not held back. None: all fully annotated patients take their turn.
        folds: At most how many folds. One fold validates on all patients that are held back; without such patients there
            are at least two.

    Returns:
        The folds, at most one for each patient to validate.

    Raises:
        InputError: Fewer than two patients are fully annotated, and none is held back.
    """
    patients = patients or {case: case for case in kinds}
    full = {patients[case] for case in kinds} - {patients[case] for case, kind in kinds.items() if kind != FULL}
    held_back = set(held_back or ())
    validating = sorted(full & held_back if held_back else full)
    if len(full) < 2 or not validating:
        raise InputError("fewer than two patients are fully annotated in all of their cases, so none can be spared for validation. "
                         "Train on fold 'all' (confkd train ID CONFIGURATION all), or annotate another patient completely.")
    number = min(folds if held_back else max(folds, 2), len(validating))
    if number == 1:
        parts = [validating]
    else:
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        parts = [fold["val"] for fold in generate_crossval_split(validating, seed=12345, n_splits=number)]
    return [{"train": sorted(case for case in kinds if patients[case] not in {*part, *held_back}),
             "val": sorted(case for case in kinds if patients[case] in part)} for part in map(set, parts)]


def single_patient_text(folds: Mapping[str, Mapping[str, Iterable[str]]], kinds: Mapping[str, str],
                        patients: Mapping[str, str], command: str) -> str | None:
    """Say what it costs that folds validate on a single patient.

    Args:
        folds: {name: fold} of some or all folds of splits_final.json.
        kinds: {case: kind} of all training cases.
        patients: {case: patient}; a case that is not in it is a patient of its own.
        command: What to type to train on fold 'all'.

    Returns:
        The text, with numbers; None if every fold validates on more than one patient.
    """
    def of(cases: Iterable[str]) -> set[str]:
        return {patients.get(case, case) for case in cases}

    single = [fold for fold in folds.values() if len(of(fold["val"])) == 1]
    if not single:
        return None
    full = of(kinds) - of(case for case, kind in kinds.items() if kind != FULL)
    lost = [len(full - of(fold["train"])) for fold in single]
    shares = _range(round(100 * number / len(full)) for number in lost) if full else "0"
    names = _some(name for name, fold in folds.items() if fold in single)
    text = (f"{names}: the validation is on a single patient, so the pseudo-Dice and the choice of checkpoint_best are mostly noise, and "
            f"{_range(lost)} of {len(full)} fully annotated patients ({shares} %) do not train. ")
    if any(full - of(fold["train"]) - of(fold["val"]) for fold in single):
        return text + "Others are held back for other folds: with --folds 1, the command that wrote the data set makes one fold of them"
    return text + f"Consider fold 'all', which trains on all of them ({command}); predict with checkpoint_final then"


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
    _write_json(folder / "dataset.json", _dataset_json(dataset))
    try:
        folds = folds_of(dataset)
    except InputError:
        return  # summary() says what to do without a split
    _write_json(preprocessed / "splits_final.json", folds)


def folds_of(dataset: Dataset) -> list[dict[str, list[str]]]:
    """The folds of splits_final.json. Raises InputError where there are too few fully annotated patients."""
    kinds = {case.name: case.kind for case in dataset.training}
    patients = dataset.patients or patients_of(kinds, dataset.patient_pattern)
    return split_full_cases(kinds, patients, {patients[case] for case in dataset.validation}, dataset.folds)


def parallel(function: Callable, tasks: list[tuple], processes: int, text: str) -> list:
    """[function(*task) for task in tasks], in processes, with a progress bar; in this process for one."""
    bar = tqdm(total=len(tasks), desc=text, disable=None)
    with bar:
        if processes <= 1 or len(tasks) <= 1:
            results = []
            for task in tasks:
                results.append(function(*task))
                bar.update()
            return results
        with _signals_between_steps() as look:
            pool = ProcessPoolExecutor(min(processes, len(tasks)), get_context("spawn"), _start_worker)
            futures, finished = [], SimpleQueue()
            try:
                for task in tasks:
                    futures.append(pool.submit(function, *task))
                    futures[-1].add_done_callback(finished.put)
                    look()
                for _ in futures:
                    _next(finished, look).result()
                    bar.update()
                return [future.result() for future in futures]
            except BrokenProcessPool as error:
                look()  # SIGTERM to the whole group, as SLURM sends it, ends the workers first
                raise InputError(f"{text}: a process was killed; did the memory run out? Try --processes 1") from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)  # an error or Ctrl-C does not wait for the rest


def _next(queue: SimpleQueue, look: Callable[[], None]):
    """The queue's next item; `look` is called before, and while there is none."""
    while True:
        look()
        try:
            return queue.get(timeout=0.1)
        except Empty:
            pass


@contextmanager
def _signals_between_steps() -> Iterator[Callable[[], None]]:
    """Yields a function; only when it is called, and at the end, what Ctrl-C and SIGTERM would raise is raised. At any other moment it could
    leave a pool's locks held, and the pool would wait for itself forever."""
    if threading.current_thread() is not threading.main_thread():  # it alone handles signals
        yield lambda: None
        return
    handlers = {number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))}
    arrived: list[tuple] = []

    def look() -> None:
        if arrived:
            number, frame = arrived.pop(0)
            arrived.clear()  # pressed twice is pressed once
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, lambda *signal_and_frame: arrived.append(signal_and_frame))
    try:
        yield look
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    look()


def _start_worker() -> None:
    """Ctrl-C reaches the whole group of processes: the main one ends the others, without their tracebacks. Where it was
    killed and cannot, they would wait for it forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


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
        problems.append(f"{file}: holds values that are no integers: {_some(fractions)}; correct the label")
    if strange:
        problems.append(f"{file}: holds the values {_some(strange)}; a {case.kind} label may hold {_some(sorted(allowed))}; "
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
    counts = [_range(map(len, sets)) for sets in (training, validating)]
    if len(folds) == 1:
        return (f"one fold: fold 0 trains on {counts[0]} fully annotated {noun} and validates on {counts[1]}, which are held "
                f"back. There are no folds 1 to 4: give -f 0 to nnUNetv2_find_best_configuration and nnUNetv2_predict")
    if held_back:
        return (f"{len(folds)} folds: each trains on the same {counts[0]} fully annotated {noun} and validates on {counts[1]} of "
                f"{held_back} that are held back from training")
    return (f"{len(folds)} folds over {len(full)} fully annotated {noun}: each trains on {counts[0]} of them and validates on "
            f"{counts[1]}; all other cases train in every fold")


def _range(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"


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


# ---- folders --------------------------------------------------------------------------------------------------------

def raw_folder() -> Path:
    return _nnunet_folder("nnUNet_raw")


def preprocessed_folder() -> Path:
    return _nnunet_folder("nnUNet_preprocessed")


def _nnunet_folder(variable: str) -> Path:
    if not os.environ.get(variable):
        raise InputError(f"the environment variable {variable} is not set; nnU-Net's data sets lie in the folder that it "
                         f"names: export {variable}=/path/to/{variable}")
    return Path(os.environ[variable])


def folder_name(dataset_id: int, name: str) -> str:
    """nnU-Net's name of a data set. Raises InputError where it cannot be one."""
    if not 1 <= dataset_id <= 999:
        raise InputError(f"the id of a data set is a number from 1 to 999, not {dataset_id}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(f"the name of a data set has letters, digits, _ and - only, not {name!r}")
    return f"Dataset{dataset_id:03d}_{name}"


def find_dataset(dataset: int | str) -> str:
    """The folder name of a data set in nnUNet_raw, given as 27, "27" or "Dataset027_ACDC". Raises InputError."""
    raw, text = raw_folder(), str(dataset)
    if text.isdigit():
        found = sorted(f.name for f in raw.glob(f"Dataset{int(text):03d}_*") if f.is_dir())
    else:
        found = [text] if (raw / text).is_dir() else []
    if len(found) != 1:
        raise InputError(f"{raw}: has " + (f"several data sets of the id {text}: {', '.join(found)}" if found else
                                           f"no data set {text}; set nnUNet_raw to the folder that holds it"))
    return found[0]


def require_free_id(dataset_id: int) -> None:
    """Raise InputError where any of nnU-Net's folders holds a data set of this id: nnU-Net would not know which to take."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = Path(os.environ.get(variable) or os.devnull)
        taken = sorted(folder.glob(f"Dataset{dataset_id:03d}_*")) if folder.is_dir() else []
        if taken:
            raise InputError(f"the id {dataset_id} is taken by {taken[0]}; choose another --id, or remove that folder")


@contextmanager
def new_dataset(dataset_id: int, name: str) -> Iterator[tuple[Path, Path]]:
    """Two hidden folders to write to, which become the raw and the preprocessed folder of a new data set at the end, or
    vanish on an error. An empty preprocessed one is not kept.

    Raises InputError where the id is taken, another process is writing it, the folders cannot be written to, or an OSError
    ends it.
    """
    finished = [folder / folder_name(dataset_id, name) for folder in (raw_folder(), preprocessed_folder())]
    unfinished = [target.with_name(f".Dataset{dataset_id:03d}.unfinished") for target in finished]
    # of its own name: what a process that was killed still writes, it does not write here
    content = unfinished[0] / f"by-{os.getpid()}"
    try:
        with terminable():
            require_free_id(dataset_id)
            _claim(unfinished[0])
            try:
                content.mkdir()
                shutil.rmtree(unfinished[1], ignore_errors=True)  # of a run that was killed
                unfinished[1].mkdir(parents=True)
                yield content, unfinished[1]
                require_free_id(dataset_id)
                if any(unfinished[1].iterdir()):
                    unfinished[1].rename(finished[1])
                try:
                    content.rename(finished[0])
                except BaseException:
                    if not finished[0].exists():  # else it was interrupted just afterwards
                        shutil.rmtree(finished[1], ignore_errors=True)
                    raise
            finally:
                shutil.rmtree(unfinished[1], ignore_errors=True)
                shutil.rmtree(content, ignore_errors=True)
                if not content.exists():  # else the next run needs to know whose it was
                    shutil.rmtree(unfinished[0], ignore_errors=True)
    except OSError as error:
        raise InputError(f"{finished[0]}: cannot be written, nothing was kept; check the permissions and the space of "
                         f"{finished[0].parent} and {finished[1].parent} ({error})") from error


def _claim(folder: Path) -> None:
    """Make the folder, or take over one that a killed process of this machine left behind."""
    me = {"host": socket.gethostname(), "process": os.getpid()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        owner = _owner_of(folder)
        if owner["host"] != me["host"] or _is_running(owner["process"]):
            raise _claimed(folder, owner) from None
        try:  # of several that find it, one makes this folder, and knows then that nobody was faster
            (folder / f"left-by-{owner['process']}").mkdir()
        except FileExistsError:
            raise _claimed(folder, owner) from None
        if _owner_of(folder) != owner:
            raise _claimed(folder, _owner_of(folder)) from None
        for left in folder.glob("by-*"):
            shutil.rmtree(left, ignore_errors=True)
    try:
        (folder / "owner.json").write_text(json.dumps(me))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _owner_of(folder: Path) -> dict:
    try:
        owner = json.loads((folder / "owner.json").read_text())
        return {"host": owner["host"], "process": int(owner["process"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"host": "an unknown machine", "process": "unknown"}


def _claimed(folder: Path, owner: dict) -> InputError:
    return InputError(f"{folder}: another process (number {owner['process']} on {owner['host']}) is writing a data set of "
                      f"this id. Wait for it; if there is none any more, remove the folder")


def _is_running(process: int) -> bool:
    if os.name == "nt":  # there os.kill ends it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write_json(file: Path, content) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _some(values: Iterable, limit: int = 10) -> str:
    """The first of the values, and how many more there are."""
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")
