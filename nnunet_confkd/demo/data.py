"""A small mixed-supervision data set for the demo, from an MSD task or a data set in nnU-Net's raw format."""
from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from nnunet_confkd.data.images import read
from nnunet_confkd.data.raw_format import Case, Dataset, raw_dataset, with_ignore, write_dataset
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.data.weaken import weakened
from nnunet_confkd.dataset_conversion import msd
from nnunet_confkd.errors import InputError

# enough to see the effect of the method within minutes on two CPU cores
LIMITS = {"test": 8, "validation": 5, "full": 5, "unlabelled": 10, "partial": 30}


def import_dataset(source: Path, dataset_id: int, name: str, seed: int = 0, limits: dict[str, int] | None = None,
                   style: str = "scribbles") -> dict[str, list[str]]:
    """Write some of the cases of `source` as a mixed data set, in the folders of nnU-Net's variables.

    Fully annotated data are weakened: some cases stay as they are, some keep scribbles only, and some keep nothing.
    Data with an "ignore" label are mixed already and stay as they are.

    Args:
        source: A folder with `imagesTr` and `labelsTr`. Without a `dataset.json`, the labels are found in the files.
        dataset_id: The id of the data set to write.
        name: Its name, without `Dataset027_`.
        seed: The seed for the choice of the cases and for the scribbles.
        limits: The largest number of cases of each role. None: `LIMITS`.
        style: Of the partial annotations, one of :data:`nnunet_confkd.data.weak_labels.STYLES`.

    Returns:
        The cases of "full", "partial", "unlabelled", "validation" and "test".

    Raises:
        InputError: The folder has another layout, or too few fully annotated cases.
    """
    limits = LIMITS if limits is None else limits
    dataset = _read(Path(source), name)
    cases = {case.name: case for case in sorted(dataset.training, key=lambda case: case.name)}
    shuffled = list(cases)
    random.Random(seed).shuffle(shuffled)
    mixed = "ignore" in dataset.labels
    kinds = {case: _kind(cases[case], dataset.labels.get("ignore")) if mixed else FULL for case in shuffled}
    full = [case for case in shuffled if kinds[case] == FULL]
    if len(full) < 3:
        raise InputError(f"{source}: has {len(full)} fully annotated cases; the demo needs at least 3, one each to "
                         f"train, to validate and to test on")
    # in a small data set, a fifth each is used for test and validation
    held_back = {role: min(limits[role], max(1, len(full) // 5)) for role in ("test", "validation")}
    rest = iter(full)
    roles = {role: [next(rest) for _ in range(count)] for role, count in held_back.items()}
    roles[FULL] = [case for _, case in zip(range(limits[FULL]), rest)]
    others = [case for case in shuffled if kinds[case] != FULL] if mixed else list(rest)
    if mixed:
        roles |= {kind: [case for case in others if kinds[case] == kind][:limits[kind]]
                  for kind in (UNLABELLED, PARTIAL)}
    else:
        others = others[:limits[PARTIAL] + limits[UNLABELLED]]
        cut = len(others) * limits[UNLABELLED] // (limits[PARTIAL] + limits[UNLABELLED])
        roles |= {UNLABELLED: others[:cut], PARTIAL: others[cut:]}

    dataset.labels = with_ignore(dataset.labels)
    dataset.training = [cases[case] for role in (FULL, "validation") for case in roles[role]]
    for kind in (PARTIAL, UNLABELLED):
        dataset.training += [replace(cases[case], kind=kind) if mixed else
                             weakened(cases[case], kind, dataset.labels, style, seed) for case in roles[kind]]
    dataset.test, dataset.validation, dataset.folds = [cases[case] for case in roles["test"]], roles["validation"], 1
    write_dataset(dataset, dataset_id, processes=1)
    return roles


def _read(source: Path, name: str) -> Dataset:
    """Read a folder in either layout."""
    file = source / "dataset.json"
    if file.is_file() and "channel_names" in json.loads(file.read_text(encoding="utf-8")):
        return raw_dataset(source, name)
    labels = channels = None
    if not file.is_file() and (source / "labelsTr").is_dir():
        highest = max((int(read(f).voxels.max()) for f in sorted((source / "labelsTr").glob("*.nii.gz"))), default=1)
        print(f"no dataset.json in {source}: labels 0 to {highest}, as in the label files; one channel")
        labels, channels = ["background", *(f"label_{i}" for i in range(1, highest + 1))], ["channel_0"]
    return msd.task(source, labels, channels, name)


def _kind(case: Case, ignore_label) -> str:
    ignored = np.asarray(case.label.read().voxels == ignore_label)
    return UNLABELLED if ignored.all() else PARTIAL if ignored.any() else FULL
