"""What can be wrong before a training begins: plans of another data set, an edited dataset.json, a bad split."""
from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results

from nnunet_confkd.data.json_files import changed_since_planning, number_of_folds, planning_text, read_json
from nnunet_confkd.data.patients import patients_of, single_patient_text
from nnunet_confkd.data.supervision import FULL, OUTSIDE
from nnunet_confkd.errors import InputError


def check_plans(plans: dict, dataset_json: dict) -> None:
    """Check that the plans belong to the data set.

    nnU-Net reads the data from the folder that the plans name. Copied plans would train on another data set without a
    word.

    Raises:
        InputError: The data set of the plans is another one, or its preprocessed folder is missing.
    """
    if not nnUNet_preprocessed.is_set():
        return
    own = join(nnUNet_preprocessed, plans["dataset_name"], "dataset.json")
    if not isfile(own) or load_json(own) != dataset_json:
        raise InputError(
            f"these plans ('{plans['plans_name']}') are for {plans['dataset_name']}, which is not the data set that "
            f"was asked for: {own} " + ("differs from its dataset.json" if isfile(own) else "does not exist")
            + ". Plan and preprocess the data set itself (nnUNetv2_plan_and_preprocess); to carry plans over from "
              "another one use nnUNetv2_move_plans_between_datasets.")


def edited_after_planning(dataset: str, dataset_json: dict) -> str | None:
    """Compare the raw dataset.json with the preprocessed one, from which training reads.

    Args:
        dataset: Name of the data set, e.g. Dataset004_Hippocampus.
        dataset_json: The preprocessed dataset.json.

    Returns:
        What differs and what to do; None if nothing does, or if there is no raw data set.
    """
    if not (nnUNet_raw.is_set() and nnUNet_preprocessed.is_set()):
        return None
    raw, planned = (join(folder, dataset, "dataset.json") for folder in (nnUNet_raw, nnUNet_preprocessed))
    try:
        keys = changed_since_planning(read_json(raw), dataset_json)
    except InputError:
        return None  # training does not need the raw data
    return planning_text(raw, planned, keys, int(dataset[7:10])) if keys else None


def has_begun(plans: dict, configuration: str, fold: int | str, trainer: str) -> bool:
    """Whether there is a checkpoint to continue from, or to validate."""
    if not nnUNet_results.is_set():
        return False
    model = Path(nnUNet_results) / plans["dataset_name"] / f"{trainer}__{plans['plans_name']}__{configuration}"
    return any((model / f"fold_{fold}" / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest", "best"))


def check_fold(fold: int, splits_file: str) -> None:
    """Check that the split has the fold.

    Raises:
        InputError: There is no such fold. nnU-Net would make a random split.
    """
    num_splits = number_of_folds(splits_file)
    if fold >= num_splits:
        raise InputError(
            f"fold {fold} was asked for, but {splits_file} has {num_splits} fold(s), 0 to {num_splits - 1}. nnU-Net "
            f"would make a random split here, with partially annotated cases in validation. Use one of these folds, "
            f"add one to the file, or train on fold 'all'. If the file is deleted, the next training writes up to five "
            f"folds over the fully annotated cases.")


def warnings_of_split(fold: int | str, train: Iterable[str], val: Iterable[str], kinds: dict[str, str],
                      pattern: str | None, command: str, hidden: Container[str] = ()) -> list[str]:
    """Describe what is unusual about the cases of a fold.

    Args:
        fold: Number of the fold, or "all".
        train: Its training cases.
        val: Its validation cases.
        kinds: Kind of each case of the data set.
        pattern: The data set's pattern of patients, or None.
        command: The command that trains on fold "all".
        hidden: Cases that are not annotated for all classes.

    Returns:
        Texts for the log.
    """
    train, val = list(train), list(val)
    found = []
    if fold != "all":
        folds = {f"fold {fold}": {"train": train, "val": val}}
        single = single_patient_text(folds, kinds, patients_of(kinds, pattern), command)
        found += [f"{single}."] if single else []
    if all(kinds[case] == FULL for case in train):
        found.append("every training case is fully annotated. Nothing is left to learn from partial annotations.")
    full = [case for case in val if kinds[case] == FULL]
    lacking = [case for case in val if case in hidden]
    if len(full) < len(val) and (full or len(lacking) < len(val)):
        found.append(f"{len(val) - len(full)} validation case(s) are not fully annotated. "
                     + ("The pseudo-Dice is that of the others" if full else
                        "There is no other: the pseudo-Dice counts annotated voxels only")
                     + ", and in the final validation what nobody annotated does not count."
                     + ("" if fold == "all" else " Delete splits_final.json in nnUNet_preprocessed, and the next "
                        "training writes one without such cases."))
    if lacking:
        found.append(f"{len(lacking)} validation case(s) are not annotated for all classes. In the pseudo-Dice and in "
                     f"validation/summary.json they count for their own classes only. "
                     f"nnUNetv2_find_best_configuration measures anew and takes the others for absent; choose by "
                     f"confkd compare instead.")
    return found


def warning_of_spinning_threads(device: str) -> str | None:
    """Describe threads that keep the cores busy while they wait, which `confkd train` prevents; None if they do not.

    Args:
        device: The type of the network's device.
    """
    if device != "cpu" or torch.get_num_threads() == 1 or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return None
    return ("threads that wait for each other keep the cores busy, which can slow a training on a CPU down several "
            "times. Stop it, type export OMP_WAIT_POLICY=PASSIVE, and start it again; or use confkd train, which sets "
            "this.")


def warning_of_intensities(counts: Mapping[str, Mapping[int, int]], ignore_label: int | None, dataset: str,
                           configuration: str) -> str | None:
    """Warn of data with intensities that depend on the kind of a case (see :mod:`nnunet_confkd.data.resampling`).

    Args:
        counts: {case: {label: voxels}} of the preprocessed labels.
        ignore_label: The data set's; None: no voxel is ignored.
        dataset: The name of the data set.
        configuration: The name of a configuration whose normalisation leaves out the surroundings of an image.

    Returns:
        The warning; None if the surroundings of an image are marked in labels with ignored voxels, too.
    """
    shares: dict[bool, list[float]] = {True: [], False: []}  # of voxels in the surroundings; True: some are ignored
    for count in counts.values():
        shares[bool(count.get(ignore_label, 0))].append(count.get(OUTSIDE, 0) / max(1, sum(count.values())))
    few, usual = (sum(of) / len(of) if of else 0.0 for of in (shares[True], shares[False]))
    if not shares[True] or few >= usual / 2:
        return None
    return (f"nnU-Net's own preprocessing has normalised {len(shares[True])} case(s) with ignored voxels together with "
            f"the empty surroundings of their images, so their intensities are not those of the fully annotated ones. "
            f"Preprocess them again: confkd plan -d {int(dataset[7:10])} -c {configuration}, with the options of the "
            f"first time")
