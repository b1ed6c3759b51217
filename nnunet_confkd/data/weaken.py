"""A mixed-supervision data set out of a fully labelled one, for experiments: what would it have cost to annotate less?"""
from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_confkd.data.folders import find_dataset, raw_folder
from nnunet_confkd.data.images import Picture, Volume, read
from nnunet_confkd.data.patients import FOLDS, choose_patients, experiment_arguments, patients_of
from nnunet_confkd.data.raw_format import Case, Dataset, label_values, raw_dataset, read_raw, summary, validation_patients, with_ignore, write_dataset
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.data.weak_labels import STYLES, case_rng, weaken
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES


def weaken_dataset(source: int | str, dataset_id: int, *, full: list[str], style: str, unlabelled: int = 0, seed: int = 0,
                   folds: int = FOLDS, name: str | None = None, patient_pattern: str | None = None,
                   processes: int = PROCESSES, link: bool = False, **options) -> Path:
    """Write a mixed copy of a fully labelled data set of nnU-Net; returns its folder.

    source: id or name of the data set. full: the training patients that stay full, names or one number (of the same seed,
    fewer lie within more). The source's validation cases (fold 0) stay full and are held back; without a split about a
    fifth of the patients are chosen. folds: they are divided over so many folds, each of which trains on the same `full`
    patients and on none that is held back. unlabelled: number of further patients that lose all labels; the rest is turned to `style`.
    patient_pattern: regular expression whose first group in the name of a case is the patient; default: the source's.
    options: those of :func:`nnunet_confkd.data.weak_labels.weaken`. Each case is seeded by its name, the style and `seed`.

    Raises InputError with all that is wrong: no such data set, patients or validation cases, labels that are not full.
    """
    found = find_dataset(source)
    folder = raw_folder() / found
    described, cases = read_raw(folder)
    pattern = patient_pattern or described.get("patient_pattern")
    patients = patients_of(cases, pattern)
    validation = validation_patients(found, patients)
    roles = choose_patients(patients.values(), seed, full, validation)
    others = [patient for patient, role in roles.items() if role == "other"]  # in seeded order
    if not 0 <= unlabelled <= len(others):
        raise InputError(f"{unlabelled} unlabelled patients are asked for; {len(others)} are neither full nor for validation")
    nothing = set(others if style == "none" else others[len(others) - unlabelled:])
    kinds = {case: UNLABELLED if patients[case] in nothing else PARTIAL if roles[patients[case]] == "other" else FULL
             for case in cases}
    dataset = weak_dataset(folder, name or f"{found[11:]}_{style}", kinds, style, seed, **options)
    dataset.validation = [case for case in cases if roles[patients[case]] == "validation"]
    dataset.folds, dataset.patient_pattern = folds, pattern
    dataset.more["weakened"] = {"source": found, "style": style, "seed": seed, **options}
    return write_dataset(dataset, dataset_id, processes, link)


def weak_dataset(folder: Path, name: str, kinds: dict[str, str], style: str, seed: int, **options) -> Dataset:
    """What is to be written: of a raw folder's cases those in `kinds`, as they are, weakened, or without any label."""
    dataset = raw_dataset(folder, name)
    dataset.labels = with_ignore(dataset.labels)
    weaken(np.zeros((4, 4, 4), np.uint8), style, 1, case_rng("", style, seed), **options)  # wrong options: said once, and now
    full = {case.name: case for case in dataset.training}
    dataset.training = [weakened(full[case], kind, dataset.labels, style, seed, **options) for case, kind in kinds.items()]
    return dataset


def weakened(case: Case, kind: str, labels: dict, style: str, seed: int, **options) -> Case:
    """A full case as it is, weakened, or without its label. labels: of dataset.json, "ignore" among them."""
    allowed = frozenset(label_values(labels) - {labels["ignore"]})
    reader = partial(_read_weak, case=case.name, style=style, ignore_label=labels["ignore"], allowed=allowed, seed=seed,
                     options=options)
    label = {FULL: case.label, PARTIAL: Volume(case.label.file, reader=reader), UNLABELLED: None}[kind]
    return Case(case.name, case.images, label, kind)












def _read_weak(file: Path, *, case: str, style: str, ignore_label: int, allowed: frozenset[int], seed: int,
               options: dict) -> Picture:
    """Module level, because it is sent to other processes."""
    full = read(file)
    values = np.unique(full.voxels)
    strange = [value for value in values.tolist() if value not in allowed]
    if strange:
        raise InputError(f"{file}: holds the values {', '.join(map(str, strange[:10]))}; a full label may hold "
                         f"{', '.join(map(str, sorted(allowed)))}")
    label = full.voxels[0].astype(np.uint8 if ignore_label < 256 else np.uint16)
    weak = weaken(label, style, ignore_label, case_rng(case, style, seed), spacing=full.geometry.spacing[::-1], **options)
    return Picture(weak[None], full.geometry)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd weaken", description=__doc__)
    parser.add_argument("--source", required=True, metavar="ID", help="the fully labelled data set, id or name")
    parser.add_argument("--id", required=True, type=int, help="id of the data set to write")
    parser.add_argument("--name", help="its name; default: that of the source and the style")
    parser.add_argument("--full", required=True, nargs="+", metavar="N|PATIENT", help="training patients that stay full: a number, "
                        "or names (with one seed, fewer lie within more)")
    parser.add_argument("--style", required=True, choices=STYLES)
    parser.add_argument("--fraction", type=float, help="share of the slices that are annotated (default: all; slices: 0.2)")
    parser.add_argument("--dimension", choices=("2d", "3d"), default="2d", help="strokes per slice, or in the volume")
    parser.add_argument("--slice-axis", type=int, choices=(0, 1, 2), help="axis of the array (z, y, x) along which slices lie; "
                        "default: that of the largest spacing")
    parser.add_argument("--radius", type=int, default=1, help="of the points, in voxels")
    parser.add_argument("--no-background", action="store_true", help="annotate no background")
    parser.add_argument("--unlabelled", type=int, default=0, metavar="N", help="patients that lose all labels")
    experiment_arguments(parser)
    parser.add_argument("--patient-pattern", metavar="REGEX", help="its first group in the name of a case is the patient; default: "
                        "that of the source, or a case a patient")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies of images: no space, but what "
                        "writes to one writes to the other")
    args = parser.parse_args(argv)
    folder = weaken_dataset(
        args.source, args.id, full=args.full, style=args.style, unlabelled=args.unlabelled, seed=args.seed, folds=args.folds, name=args.name,
        patient_pattern=args.patient_pattern, processes=args.processes, link=args.link, fraction=args.fraction,
        dimension=args.dimension, slice_axis=args.slice_axis, radius=args.radius, background=not args.no_background)
    print(summary(folder))
