"""ACDC: cine MRI of the heart, two phases of each patient, with expert scribbles or without.

Images and masks: Bernard et al., IEEE TMI 2018, doi 10.1109/TMI.2018.2837502. Scribbles: Valvano, Leo, Tsaftaris, IEEE
TMI 2021, doi 10.1109/TMI.2021.3069634. The spacing is that of `pixdim`, as SimpleITK and nnU-Net read it. The affine
that nibabel shows has unit scale.
"""
from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from nnunet_confkd.dataset_conversion.common import choose_roles

from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.patients import FOLDS, experiment_arguments
from nnunet_confkd.data.raw_format import Case, Dataset, with_ignore, write_dataset
from nnunet_confkd.data.supervision import PARTIAL
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "ACDC, cardiac cine MRI (training/patientXXX/..., testing/...), with expert scribbles or without"
LABELS = {"background": 0, "RV": 1, "myocardium": 2, "LV": 3}
LICENCE = "CC BY-NC-SA 4.0"
REFERENCE = "Bernard et al., IEEE TMI 2018, doi 10.1109/TMI.2018.2837502"
SCRIBBLE_REFERENCE = "scribbles: Valvano et al., IEEE TMI 2021, doi 10.1109/TMI.2021.3069634"
TWINS = ("patient074", "patient076")  # the same images under two names, as published
PATIENT_PATTERN = r"(patient07(?=[46]_)|patient\d+)[46]?_frame\d+"  # the twins are one patient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--scribbles", type=Path, metavar="DIR",
                        help="folder of patientXXX_frameYY_scribble.nii.gz (4: not annotated)")
    parser.add_argument("--full", nargs="+", metavar="N|PATIENT", help="training patients that keep their full masks, "
                        "a number or names; the others get their scribbles (needs --scribbles)")
    experiment_arguments(parser)


def convert(source: Path, dataset_id: int, *, scribbles: Path | None = None, full: list[str] | None = None,
            folds: int = FOLDS, name: str = "ACDC", seed: int = 0, processes: int = PROCESSES,
            link: bool = False) -> Path:
    """Write ACDC as a data set of nnU-Net.

    With `scribbles` and `full`, about a fifth of the patients keep their masks and are held back: they validate and
    never train. The patients in `full` train with their masks, all others with their scribbles. Without them, all cases
    keep their masks.

    Args:
        source: The folder that holds `training/patientXXX/` and perhaps `testing/patientXXX/`, as published.
        dataset_id: The 27 in Dataset027_NAME.
        scribbles: The folder of the scribbles.
        full: The training patients that keep their masks: names, or one number.
        folds: Over how many folds the patients that validate are divided.
        name: The NAME in Dataset027_NAME.
        seed: Of the choice of patients.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the data, or only one of `scribbles` and `full` is given.
    """
    source = Path(source)
    _check_options(source, scribbles, full)
    problems: list[str] = []
    training = _cases(source / "training", problems)
    testing = source / "testing"  # was published without masks at first
    test = _cases(testing, problems, any(testing.glob("patient*/*_gt.nii.gz"))) if testing.is_dir() else []
    if not training and not problems:
        raise InputError(f"{source / 'training'}: holds no folders patient001, patient002 and so on")
    patients = {case.name: case.name.split("_")[0] for case in training}
    roles = choose_roles(patients.values(), seed, full, problems)
    validating = {twin for twin in TWINS if roles.get(twin) == "validation"}
    if len(validating) == 1 and set(TWINS) <= set(roles):
        roles[validating.pop()] = "other"  # or one would train on what it validates on
    labels: Mapping[str, int | list[int]] = LABELS
    if scribbles is not None:
        labels = with_ignore(LABELS)
        training = [case if roles[patients[case.name]] != "other" else _scribbled(case, Path(scribbles), problems)
                    for case in training]
    return write_dataset(Dataset(
        name=name, channel_names=["cineMRI"], labels=labels, file_ending=".nii.gz", training=training, test=test,
        validation=[case for case, patient in patients.items() if roles.get(patient) == "validation"], folds=folds,
        patient_pattern=PATIENT_PATTERN,
        licence=LICENCE, reference=REFERENCE + (f"; {SCRIBBLE_REFERENCE}" if scribbles is not None else ""),
        roots=(source,) if scribbles is None else (source, Path(scribbles)), problems=problems,
    ), dataset_id, processes, link)


def _check_options(source: Path, scribbles: Path | None, full: list[str] | None) -> None:
    if (scribbles is None) != (full is None):
        raise InputError("--scribbles and --full belong together: which training patients keep their masks, and where "
                         "are the scribbles of the others? To make weak labels from full ones, see confkd weaken")
    if not (source / "training").is_dir():
        raise InputError(f"{source}: has no folder \"training\"; give the folder that holds ACDC's training/patient001 "
                         f"and so on")
    if scribbles is not None and not Path(scribbles).is_dir():
        raise InputError(f"{scribbles}: there is no such folder; give the one that holds "
                         f"patient001_frame01_scribble.nii.gz and so on")


def _cases(folder: Path, problems: list[str], labelled: bool = True) -> list[Case]:
    """Return end-diastole and end-systole of every patient, as Info.cfg names them."""
    cases = []
    for patient in sorted(f for f in folder.iterdir() if f.is_dir() and re.fullmatch(r"patient\d+", f.name)):
        info = patient / "Info.cfg"
        if not info.is_file():
            problems.append(f"{info}: is missing; it tells which frames are end-diastole and end-systole")
            continue
        entries = dict(re.findall(r"^\s*(\w+)[ \t]*:[ \t]*(.*?)\s*$", info.read_text("utf-8", "replace"), re.MULTILINE))
        if entries.get("ED") == entries.get("ES") and "ED" in entries:
            problems.append(f"{info}: names one frame, {entries['ED']}, for both end-diastole and end-systole; correct "
                            f"it")
            continue
        for phase in ("ED", "ES"):
            if not entries.get(phase, "").isdecimal():
                problems.append(f"{info}: has no line \"{phase}: NUMBER\", the number of the frame; add it")
                continue
            name = f"{patient.name}_frame{int(entries[phase]):02d}"
            image, label = patient / f"{name}.nii.gz", patient / f"{name}_gt.nii.gz"
            missing = [f"{file}: is missing; Info.cfg names this frame" for file in (image, label)[:1 + labelled]
                       if not file.is_file()]
            problems += missing
            if not missing:
                cases.append(Case(name, (Volume(image),), Volume(label) if labelled else None))
    return cases


def _scribbled(case: Case, scribbles: Path, problems: list[str]) -> Case:
    file = scribbles / f"{case.name}_scribble.nii.gz"
    if not file.is_file():
        problems.append(f"{file}: is missing; add it, or name {case.name.split('_')[0]} as --full")
        return case
    return Case(case.name, case.images, Volume(file), PARTIAL)
