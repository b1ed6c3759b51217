"""Make a data set of mixed supervision from a fully annotated one, for experiments on annotating less."""
from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.arguments import Parser
from nnunet_confkd.data.annotated_classes import CLASSES_KEY, heads_of
from nnunet_confkd.data.folders import find_dataset, raw_folder
from nnunet_confkd.data.images import Picture, Volume, read
from nnunet_confkd.data.patients import FOLDS, choose_patients, experiment_arguments, patients_of
from nnunet_confkd.data.raw_format import (
    Case,
    Dataset,
    label_values,
    raw_dataset,
    read_raw,
    summary,
    validation_patients,
    with_ignore,
    write_dataset,
)
from nnunet_confkd.data.supervision import FULL, PARTIAL, TABLE_KEY, UNLABELLED
from nnunet_confkd.data.weak_labels import STYLES, case_rng, weaken
from nnunet_confkd.errors import InputError, counted, some
from nnunet_confkd.processes import PROCESSES


def weaken_dataset(source: int | str, dataset_id: int, *, full: list[str], style: str | None = None,
                   hide_classes: int = 0, unlabelled: int = 0, seed: int = 0, folds: int = FOLDS,
                   name: str | None = None, patient_pattern: str | None = None, processes: int = PROCESSES,
                   link: bool = False, **options: Any) -> Path:
    """Write a copy of a fully annotated data set of nnU-Net in which most training cases have weak labels.

    The patients that validate in the source's fold 0 keep their labels and are held back. Without a split, about a
    fifth of all patients are chosen. Of the others, those in `full` keep their labels, `unlabelled` lose theirs, and
    the rest get weak labels. Each case is seeded by its name, the style and `seed`.

    Args:
        source: Id or name of the data set.
        dataset_id: The 27 in Dataset027_NAME.
        full: The training patients that keep their labels: names, or one number. With the same seed, a smaller number
            chooses a part of a larger one's patients. 0 is allowed if classes are hidden.
        style: One of :data:`nnunet_confkd.data.weak_labels.STYLES`. None: all voxels stay annotated, and classes are
            hidden.
        hide_classes: How many classes are hidden in each case with a weak label: the case lists the other classes in
            dataset.json's "annotated_classes", and what is hidden becomes background before the label is weakened.
            The cases take turns, so that each class is hidden about equally often.
        unlabelled: How many patients lose their labels.
        seed: Of the choice of patients, and of the weak labels.
        folds: Over how many folds the patients that are held back are divided. Each fold trains on the same patients.
        name: The NAME in Dataset027_NAME; default: that of the source and the style.
        patient_pattern: A regular expression whose first group in the name of a case is the patient; default: the
            source's.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies.
        **options: Those of :func:`nnunet_confkd.data.weak_labels.weaken`.

    Returns:
        The raw folder.

    Raises:
        InputError: There is no such data set, there are no such patients or validation cases, or some labels are not
            complete. The text has all of it.

    Examples:
        >>> weaken_dataset(4, 104, full=["5"], style="scribbles")  # doctest: +SKIP
        PosixPath('raw/Dataset104_Hippocampus_scribbles')
    """
    found = find_dataset(source)
    folder = raw_folder() / found
    described, cases = read_raw(folder)
    weak = sorted(case for case, kind in described.get(TABLE_KEY, {}).items() if kind != FULL)
    if weak:
        raise InputError(f"{folder / 'dataset.json'}: {counted(len(weak), 'case')} of {len(cases)} not fully annotated "
                         f"({some(weak, 3)}); give a data set of full masks alone")
    pattern = patient_pattern or described.get("patient_pattern")
    patients = patients_of(cases, pattern)
    validation = validation_patients(found, patients)
    if style is None and not hide_classes:
        raise InputError("nothing is to be weakened: give a style (--style), or a number of classes to hide "
                         "(--hide-classes)")
    if style == "none" and hide_classes:
        raise InputError("with the style none nothing is annotated, so there are no classes to hide")
    roles = choose_patients(patients.values(), seed, full, validation, least=0 if hide_classes else 1)
    others = [patient for patient, role in roles.items() if role == "other"]  # in seeded order
    if not 0 <= unlabelled <= len(others):
        raise InputError(f"{unlabelled} unlabelled patients are asked for; {len(others)} are neither full nor for "
                         f"validation")
    without = set(others if style == "none" else others[len(others) - unlabelled:])
    kinds = {case: UNLABELLED if patients[case] in without else PARTIAL if roles[patients[case]] == "other" else FULL
             for case in cases}
    lists = {}
    if hide_classes:
        lists = class_lists([patient for patient, role in roles.items() if role != "validation"], described["labels"],
                            hide_classes, seed)
    name = name or "_".join((found[11:], *([style] if style else []), *(["hidden"] if hide_classes else [])))
    dataset = weak_dataset(folder, name, kinds, style, seed, lists={
        case: lists[patients[case]] for case, kind in kinds.items() if kind == PARTIAL and lists}, **options)
    dataset.validation = [case for case in cases if roles[patients[case]] == "validation"]
    dataset.folds, dataset.patient_pattern = folds, pattern
    dataset.more["weakened"] = {"source": found, "style": style, "seed": seed, **options,
                                **({"hide_classes": hide_classes} if hide_classes else {})}
    return write_dataset(dataset, dataset_id, processes, link)


def class_lists(patients: Iterable[str], labels: Mapping, number: int, seed: int) -> dict[str, list[str]]:
    """Choose the classes that each patient lists, if some are hidden.

    Args:
        patients: Their names; patients that follow each other hide other classes.
        labels: Those of dataset.json.
        number: How many classes are hidden in each patient.
        seed: Of the order of the classes.

    Returns:
        {patient: [class, ...]}.

    Raises:
        InputError: There are not more classes than are to be hidden.
    """
    names = list(heads_of(labels))
    if not 1 <= number < len(names):
        raise InputError(f"{number} classes are to be hidden in each case; there are {len(names)} "
                         f"({some(names)}), of which at least one must stay")
    order = random.Random(seed).sample(names, len(names))
    hidden = {patient: {order[(turn + i) % len(order)] for i in range(number)}
              for turn, patient in enumerate(patients)}
    return {patient: [name for name in names if name not in without] for patient, without in hidden.items()}


def weak_dataset(folder: Path, name: str, kinds: dict[str, str], style: str | None, seed: int,
                 lists: Mapping[str, list[str]] | None = None, **options) -> Dataset:
    """Return the cases of a raw folder as they are, with weak labels, or without labels.

    Args:
        folder: The raw folder of a fully annotated data set.
        name: Of the new data set.
        kinds: {case: kind that it gets}. Other cases are left out.
        style: One of :data:`nnunet_confkd.data.weak_labels.STYLES`; None: all voxels stay annotated.
        seed: Of the weak labels.
        lists: {case: the classes that it is annotated for}, of cases in which others are hidden.
        **options: Those of :func:`nnunet_confkd.data.weak_labels.weaken`.

    Raises:
        InputError: The data set is itself not annotated for all classes, or the options are wrong.
    """
    dataset, lists = raw_dataset(folder, name), lists or {}
    if dataset.annotated_classes:
        raise InputError(f"{folder / 'dataset.json'}: has \"{CLASSES_KEY}\", so its cases are not fully annotated, and "
                         f"what is hidden in them cannot be weakened. Choose a fully annotated data set")
    dataset.labels = with_ignore(dataset.labels)
    # refuses wrong options at once, and not for each case
    if style is not None:
        weaken(np.zeros((4, 4, 4), np.uint8), style, 1, case_rng("", style, seed), **options)
    full = {case.name: case for case in dataset.training}
    dataset.training = [weakened(full[case], kind, dataset.labels, style, seed, lists.get(case), **options)
                        for case, kind in kinds.items()]
    dataset.annotated_classes = dict(lists)
    dataset.complete = set() if style else set(lists)
    return dataset


def weakened(case: Case, kind: str, labels: dict, style: str | None, seed: int, listed: list[str] | None = None,
             **options) -> Case:
    """Return a fully annotated case as it is, with a weak label, or without a label, as `kind` says.

    Args:
        case: The case.
        kind: The kind that it gets.
        labels: Those of dataset.json, "ignore" included.
        style: One of :data:`nnunet_confkd.data.weak_labels.STYLES`; None: all voxels stay annotated.
        seed: Of the weak label.
        listed: The classes that it is annotated for; None: all. A voxel of none of them becomes background.
        **options: Those of :func:`nnunet_confkd.data.weak_labels.weaken`.
    """
    allowed = frozenset(label_values(labels) - {labels["ignore"]})
    heads = heads_of(labels)
    kept = allowed if listed is None else frozenset({0}).union(*(heads[name][1] for name in listed))
    reader = partial(_read_weak, case=case.name, style=style, ignore_label=labels["ignore"],
                     hidden={value: value not in kept for value in allowed}, seed=seed, options=options)
    label = {FULL: case.label, PARTIAL: Volume(case.label.file, reader=reader), UNLABELLED: None}[kind]
    return Case(case.name, case.images, label, kind)


def _read_weak(file: Path, *, case: str, style: str | None, ignore_label: int, hidden: dict[int, bool], seed: int,
               options: dict) -> Picture:
    """Read a label and weaken it. This function is at module level because it is sent to other processes.

    `hidden` tells for each value that a full label may hold whether it becomes background.
    """
    full, allowed = read(file), set(hidden)
    values = np.unique(full.voxels)
    strange = [value for value in values.tolist() if value not in allowed]
    if strange:
        raise InputError(f"{file}: holds the values {some(strange)}; a full label may hold {some(sorted(allowed))}")
    label = full.voxels[0].astype(np.uint8 if ignore_label < 256 else np.uint16)
    label[np.isin(label, [value for value, hide in hidden.items() if hide])] = 0
    if style is None:
        return Picture(label[None], full.geometry)
    weak = weaken(label, style, ignore_label, case_rng(case, style, seed), spacing=full.geometry.spacing[::-1],
                  **options)
    return Picture(weak[None], full.geometry)


def main(argv: list[str]) -> None:
    """Run `confkd weaken`."""
    parser = Parser(prog="confkd weaken", description=__doc__)
    parser.add_argument("--source", required=True, metavar="ID", help="the fully annotated data set, id or name")
    parser.add_argument("--id", required=True, type=int, help="id of the data set to write")
    parser.add_argument("--name", help="its name; default: that of the source and the style")
    parser.add_argument("--full", required=True, nargs="+", metavar="N|PATIENT", help="training patients that keep "
                        "their labels: a number, or names (with the same seed, a larger number includes a smaller "
                        "one's)")
    parser.add_argument("--style", choices=STYLES, help="what is annotated; it may be left out with --hide-classes")
    parser.add_argument("--hide-classes", type=int, default=0, metavar="N", help="number of classes that each of the "
                        "others is not annotated for, in turns; what is hidden becomes background, and the classes "
                        "that are left are listed in dataset.json (--full may be 0 then)")
    parser.add_argument("--fraction", type=float, help="share of the slices that are annotated (default: all; slices: "
                                                       "0.2)")
    parser.add_argument("--dimension", choices=("2d", "3d"), default="2d",
                        help="annotate slice by slice, or the volume as a whole")
    parser.add_argument("--slice-axis", type=int, choices=(0, 1, 2), help="axis of the array (z, y, x) across the "
                        "slices; default: that of the largest spacing")
    parser.add_argument("--radius", type=int, default=1, help="radius of the points, in voxels")
    parser.add_argument("--no-background", dest="background", action="store_false", help="annotate no background")
    parser.add_argument("--unlabelled", type=int, default=0, metavar="N", help="number of patients that lose all "
                                                                               "labels")
    experiment_arguments(parser)
    parser.add_argument("--patient-pattern", metavar="REGEX", help="a regular expression whose first group in the name "
                        "of a case is the patient; default: that of the source; without one, each case is a patient")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies of images: they take no "
                        "space, but a program that writes to one writes to the other")
    args = vars(parser.parse_args(argv))
    print(summary(weaken_dataset(args.pop("source"), args.pop("id"), **args)))
