"""Which cases belong to one patient, who stays fully annotated, and the division of patients into folds."""
from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterable, Mapping

from nnunet_confkd.data.supervision import FULL
from nnunet_confkd.errors import InputError, some

VALIDATION_SHARE = 0.2  # of the patients, in experiments without a split
FOLDS = 5  # nnU-Net's number


def patients_of(cases: Iterable[str], pattern: str | None) -> dict[str, str]:
    """Find the patient of each case.

    Args:
        cases: The names of the cases.
        pattern: A regular expression. Its first group in the name of a case is the patient, or all that it matches if
            it has no group. None: each case is a patient of its own.

    Returns:
        {case: patient}.

    Raises:
        InputError: The pattern is not a regular expression, or does not match some cases. The text names them.
    """
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
        raise InputError(f"the patient pattern {pattern!r} does not match these cases; correct it: {some(without)}")
    return patients


def experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that keep N patients full and hold others back to validate."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of patients (and of weak labels)")
    parser.add_argument("--folds", type=int, choices=range(1, FOLDS + 1), default=FOLDS,
                        help="number of folds over which the patients are divided that are held back to validate "
                        f"(default: {FOLDS}; 1: fold 0 validates on all of them)")


def choose_patients(patients: Iterable[str], seed: int, full: list[str],
                    validation: Iterable[str] | None = None, least: int = 1) -> dict[str, str]:
    """Choose at random who validates, who stays fully annotated, and who does not.

    Args:
        patients: The names of the patients, in any order and number.
        seed: Of the choice.
        full: The patients that stay fully annotated: names, or one number. With the same seed, a smaller number chooses
            a part of a larger one's patients.
        validation: The patients that validate. None: about a fifth of all, but not a single patient.
        least: The lowest number of patients that may stay fully annotated.

    Returns:
        {patient: "validation" | "full" | "other"}, in random order.

    Raises:
        InputError: There are not so many patients, or not those, or they would leave too few to validate.
    """
    order = sorted(set(patients))
    random.Random(seed).shuffle(order)
    named = [] if _is_number(full) else list(full)
    unknown = sorted(set(named) - set(order))
    if unknown:
        raise InputError(f"no such patients: {some(unknown)}; there are {some(sorted(order))}")
    if validation is None:
        count = max(1, round(VALIDATION_SHARE * len(order))) if len(order) > 1 else 0
        validation = [patient for patient in order if patient not in named][:count]
        if len(validation) < count:
            raise InputError(f"{len(set(named))} of {len(order)} patients are to be full; name fewer, {count} are "
                             f"needed to validate")
    validation = set(validation)
    if validation & set(named):
        raise InputError(f"these patients validate and cannot be among the full ones: "
                         f"{some(sorted(validation & set(named)))}")
    rest = [patient for patient in order if patient not in validation]
    if _is_number(full):
        if not least <= int(full[0]) <= len(rest):
            raise InputError(f"{full[0]} full patients are asked for; besides the {len(validation)} that validate "
                             f"there are {len(rest)} to choose from")
        named = rest[:int(full[0])]
    return {patient: "validation" if patient in validation else "full" if patient in named else "other"
            for patient in order}


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
        folds: At most how many folds. One fold validates on all patients that are held back; without such patients
            there are at least two.

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
        raise InputError("fewer than two patients are fully annotated in all of their cases, so none can be spared for "
                         "validation. Train on fold 'all' (confkd train ID CONFIGURATION all), or annotate another "
                         "patient completely.")
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
    def named(cases: Iterable[str]) -> set[str]:
        return {patients.get(case, case) for case in cases}

    single = [fold for fold in folds.values() if len(named(fold["val"])) == 1]
    if not single:
        return None
    full = named(kinds) - named(case for case, kind in kinds.items() if kind != FULL)
    lost = [len(full - named(fold["train"])) for fold in single]
    shares = number_range(round(100 * number / len(full)) for number in lost) if full else "0"
    names = some(name for name, fold in folds.items() if fold in single)
    text = (f"{names}: the validation is on a single patient, so the pseudo-Dice and the choice of checkpoint_best are "
            f"mostly noise, and {number_range(lost)} of {len(full)} fully annotated patients ({shares} %) do not "
            f"train. ")
    if any(full - named(fold["train"]) - named(fold["val"]) for fold in single):
        return text + ("Others are held back for other folds: with --folds 1, the command that wrote the data set "
                       "makes one fold of them")
    return text + f"Consider fold 'all', which trains on all of them ({command}); predict with checkpoint_final then"


def number_range(numbers: Iterable[int]) -> str:
    """Return for example "3" or "3 to 5"."""
    numbers = sorted(numbers)
    return f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
