"""MSCMR with scribbles: late gadolinium enhancement MRI of the heart, with scribbles to train and masks to validate.

Images: Zhuang, IEEE TPAMI 2019, doi 10.1109/TPAMI.2018.2869576. Scribbles, and the division into train, val and
TestSet: Zhang and Zhuang, CycleMix, CVPR 2022, arXiv 2203.01475. There 0 is background, 1 right ventricle, 2
myocardium, 3 left ventricle, 4 not annotated. Masks in the challenge's own values, 600, 200 and 500 in that order, are
read too.
"""
from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from nnunet_confkd.dataset_conversion.common import choose_roles, find_files

from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.patients import FOLDS, experiment_arguments
from nnunet_confkd.data.raw_format import Case, Dataset, with_ignore, write_dataset
from nnunet_confkd.data.supervision import FULL, PARTIAL
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "MSCMR, cardiac LGE MRI with scribbles (train, val, TestSet, each with images and labels)"
LABELS = {"background": 0, "RV": 1, "myocardium": 2, "LV": 3}
SCRIBBLES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}
MASKS, CHALLENGE_MASKS = {0: 0, 1: 1, 2: 2, 3: 3}, {0: 0, 600: 1, 200: 2, 500: 3}
ENDING = ".nii.gz"
FILES = r"[^.].*\.nii\.gz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--full", nargs="+", metavar="N|SUBJECT", help="subjects of val that train instead, with their "
                        "full masks: a number, or names such as subject1_DE; ConfKD needs at least one, since train "
                        "has none")
    experiment_arguments(parser)


def convert(source: Path, dataset_id: int, *, full: list[str] | None = None, folds: int = FOLDS, name: str = "MSCMR",
            seed: int = 0, processes: int = PROCESSES, link: bool = False) -> Path:
    """Write MSCMR as a mixed data set of nnU-Net.

    Args:
        source: The folder that holds train and val, and perhaps TestSet, as published.
        dataset_id: The 31 in Dataset031_NAME.
        full: Subjects of val that train, with their masks: names, or one number. The others are held back and validate.
            None: no training case is fully annotated, and ConfKDTrainer refuses to train. A printed note says so.
        folds: Over how many folds the subjects that validate are divided.
        name: The NAME in Dataset031_NAME.
        seed: Of the choice of subjects.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the data.
    """
    source = Path(source)
    missing = [f"{part}/{sub}" for part in ("train", "val") for sub in ("images", "labels")
               if not (source / part / sub).is_dir()]
    if missing:
        raise InputError(f"{source}: has no folder {', '.join(missing)}; give the folder that holds train, val and "
                         f"TestSet, each with images and labels")
    problems: list[str] = []
    scribbled = _cases(source / "train", PARTIAL, problems)
    val = _cases(source / "val", FULL, problems)
    test = _cases(source / "TestSet", FULL, problems) if (source / "TestSet").is_dir() else []
    roles = choose_roles([case.name for case in val], seed, full, problems)
    validation = [case.name for case in val if roles.get(case.name) != "full"]
    if val and not validation:
        problems.append(f"{source / 'val'}: has one subject, which is needed to validate; leave out --full")
    folder = write_dataset(Dataset(
        name=name, channel_names=["LGE"], labels=with_ignore(LABELS), file_ending=ENDING, training=[*scribbled, *val],
        test=test, validation=validation, folds=folds,
        licence="see the publisher's terms (MS-CMRSeg 2019 challenge)",
        reference="Zhuang, IEEE TPAMI 2019, doi 10.1109/TPAMI.2018.2869576; scribbles: Zhang and Zhuang, CVPR 2022, "
                  "arXiv 2203.01475", roots=(source,), problems=problems), dataset_id, processes, link)
    if full is None:
        print("note: no training case is fully annotated, and ConfKDTrainer needs one; --full N adds N subjects of val")
    return folder


def _cases(folder: Path, kind: str, problems: list[str]) -> list[Case]:
    """Pair images with labels whose name begins with the image's: subject2_DE and subject2_DE_scribble (or _manual)."""
    images, labels = find_files(folder / "images", FILES), find_files(folder / "labels", FILES)
    if not images:
        problems.append(f"{folder / 'images'}: holds no images ({ENDING})")
    fitting = {label: [image for image in images if f"{_stem(label)}_".startswith(f"{_stem(image)}_")]
               for label in labels}
    problems += [f"{label}: has {_listed(found, 'image')} in {folder / 'images'}; it needs one"
                 for label, found in fitting.items() if len(found) != 1]
    cases = []
    for image in images:
        own = [label for label, found in fitting.items() if image in found]
        if len(own) == 1:
            cases.append(Case(_stem(image), (Volume(image),), Volume(own[0]), kind))
        else:
            problems.append(f"{image}: has {_listed(own, 'label')} in {folder / 'labels'}; it needs one")
    values = SCRIBBLES if kind == PARTIAL else _values(cases)
    return [replace(case, values=values) for case in cases]


def _values(cases: list[Case]) -> dict[int, int]:
    """Return the values of the first mask that is not empty. The writer refuses masks that have others."""
    for case in cases:
        try:
            highest = case.label.read().voxels.max()
        except InputError:
            continue  # the writer reports it
        if highest > 0:
            return CHALLENGE_MASKS if highest > max(SCRIBBLES) else MASKS
    return MASKS


def _listed(files: list[Path], what: str) -> str:
    return f"several {what}s ({', '.join(file.name for file in files)})" if files else f"no {what}"


def _stem(file: Path) -> str:
    return file.name.removesuffix(ENDING)
