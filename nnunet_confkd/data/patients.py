"""Which cases belong to one patient, who stays fully annotated, and the division of patients into folds."""
from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from nnunet_confkd.data.supervision import FULL, UNLABELLED
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


def notes_on_names(cases: Collection[str]) -> list[str]:
    """Say that names begin alike, if they all have the form PATIENT_REST and some share PATIENT."""
    beginnings = Counter(case.partition("_")[0] for case in cases if "_" in case)
    if sum(beginnings.values()) < len(cases) or not 1 < len(beginnings) < len(cases):
        return []
    return [f"note: {len(cases)} cases have {len(beginnings)} beginnings, such as {next(iter(beginnings))}_. If these "
            f"are patients, add --patient-pattern '([^_]+)_', so that none is on both sides of a fold"]


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
    named = [] if is_number(full, order) else list(full)
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
    if is_number(full, order):
        if not least <= int(full[0]) <= len(rest):
            raise InputError(f"{full[0]} full patients are asked for; besides the {len(validation)} that validate "
                             f"there are {len(rest)} to choose from")
        named = rest[:int(full[0])]
    return {patient: "validation" if patient in validation else "full" if patient in named else "other"
            for patient in order}


def is_number(texts: Sequence[str], patients: Iterable[str]) -> bool:
    """Whether an option of patients is their number. A text such as 003 is the name of a patient if there is one.

    Args:
        texts: The words of the option.
        patients: The names of all patients.
    """
    text = str(texts[0]) if len(texts) == 1 else ""
    return text.isdecimal() and not (text != str(int(text)) and text in set(patients))


def split_full_cases(kinds: Mapping[str, str], patients: Mapping[str, str] | None = None,
                     held_back: Iterable[str] | None = None, folds: int = FOLDS,
                     lists: Mapping[str, Sequence[str]] | None = None,
                     complete: Iterable[str] = ()) -> list[dict[str, list[str]]]:
    """Make the folds of splits_final.json, which validate on fully annotated patients if there are enough of them.

    They are nnU-Net's seeded cross-validation over the patients all of whose cases are fully annotated. All other cases
    train in every fold. A validation on partial labels would measure the annotated voxels only, and a patient on both
    sides nothing at all.

    If fewer than `FOLDS` patients are fully annotated, and the voxels of others are all annotated, though not for all
    classes, these others validate, each for its own classes. The fully annotated ones train in every fold then.

    Args:
        kinds: {case: kind} of all training cases.
        patients: {case: patient}; None: each case is a patient of its own.
        held_back: Patients that validate and never train. Each fold validates on a part of them, and trains on all
            patients that are not held back. None: all that can validate take their turn.
        folds: At most how many folds. One fold validates on all patients that are held back; without such patients
            there are at least two.
        lists: {case: the classes that it is annotated for}, of the cases that are not annotated for all.
        complete: Cases without ignored voxels.

    Returns:
        The folds, at most one for each patient to validate.

    Raises:
        InputError: Fewer than two patients can validate, and none is held back.
    """
    patients, lists = patients or {case: case for case in kinds}, lists or {}
    full = {patients[case] for case in kinds} - {patients[case] for case, kind in kinds.items() if kind != FULL}
    dense_cases = set(lists).intersection(complete)
    dense = {patients[case] for case in dense_cases} - {patients[case] for case in kinds if case not in dense_cases}
    held_back = set(held_back or ())
    if held_back:
        validating = sorted((full | dense) & held_back)
    elif len(full) < FOLDS and (parts := _parts_by_class(kinds, patients, lists, dense, folds)):
        return _folds(kinds, patients, parts)
    else:
        validating = sorted(full)
    if len(full | dense if held_back else full) < 2 or not validating:
        raise InputError("fewer than two patients are fully annotated in all of their cases, so none can be spared for "
                         "validation. Train on fold 'all' (confkd train ID CONFIGURATION all), or annotate another "
                         "patient completely.")
    number = min(folds if held_back else max(folds, 2), len(validating))
    if number == 1:
        parts = [set(validating)]
    else:
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        parts = [set(fold["val"]) for fold in generate_crossval_split(validating, seed=12345, n_splits=number)]
    return _folds(kinds, patients, parts, held_back)


def _folds(kinds: Mapping[str, str], patients: Mapping[str, str], parts: Iterable[set[str]],
           held_back: Iterable[str] = ()) -> list[dict[str, list[str]]]:
    """Return folds that validate on these parts of the patients."""
    return [{"train": sorted(case for case in kinds if patients[case] not in {*part, *held_back}),
             "val": sorted(case for case in kinds if patients[case] in part)} for part in parts]


def _parts_by_class(kinds: Mapping[str, str], patients: Mapping[str, str], lists: Mapping[str, Sequence[str]],
                    dense: set[str], folds: int) -> list[set[str]]:
    """Divide `dense` patients, whose voxels are all annotated for some classes, into parts that validate in turn.

    The patients with the same classes follow each other, shuffled, and are dealt to the parts one by one, so that each
    part has about equally many of them. There are at most as many parts as patients of the most frequent class. A
    patient without whom no training case would be annotated for one of its classes does not validate.

    Returns:
        The parts; none if fewer than two parts have patients.
    """
    classes_of = {patient: frozenset(name for case, names in lists.items() if patients[case] == patient
                                     for name in names) for patient in sorted(dense)}
    count = Counter(name for classes in classes_of.values() for name in classes)
    number = min(max(folds, 2), max(count.values(), default=0))
    chance, order = random.Random(12345), []
    for classes in dict.fromkeys(classes_of.values()):
        members = [patient for patient in classes_of if classes_of[patient] == classes]
        order += chance.sample(members, len(members))
    parts = [set(order[k::number]) for k in range(number)]
    for part in parts:
        for name in sorted(count):
            if not any(patients[case] not in part and kind != UNLABELLED and name in lists.get(case, count)
                       for case, kind in kinds.items()):
                part.discard(min(patient for patient in part if name in classes_of[patient]))
    parts = [part for part in parts if part]
    return parts if len(parts) > 1 else []


def split_text(folds: Sequence[Mapping[str, Iterable[str]]], kinds: Mapping[str, str]) -> str:
    """Say which cases the folds of :func:`split_full_cases` validate on."""
    by_class = any(kinds[case] != FULL for fold in folds for case in fold["val"])
    validating = "cases that are not annotated for all classes, each for its own" if by_class else \
        "the fully annotated cases"
    return f"{len(folds)} folds of {validating}; all others train in every fold"


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
    validating = set().union(*(named(fold["val"]) for fold in folds.values()))
    by_class = not validating <= full
    if by_class:
        full = validating
    lost = [len(full - named(fold["train"])) for fold in single]
    shares = number_range(round(100 * number / len(full)) for number in lost) if full else "0"
    names = some(name for name, fold in folds.items() if fold in single)
    text = (f"{names}: the validation is on a single patient, so the pseudo-Dice and the choice of checkpoint_best are "
            f"mostly noise, and {number_range(lost)} of {len(full)} {'validating' if by_class else 'fully annotated'} "
            f"patients ({shares} %) do not train. ")
    if any(full - named(fold["train"]) - named(fold["val"]) for fold in single):
        return text + ("Others are held back for other folds: with --folds 1, the command that wrote the data set "
                       "makes one fold of them")
    return text + f"Consider fold 'all', which trains on all of them ({command}); predict with checkpoint_final then"


def number_range(numbers: Iterable[int]) -> str:
    """Return for example "3" or "3 to 5"."""
    numbers = sorted(numbers)
    return f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"
