"""MSCMR with scribbles: late gadolinium enhancement MRI of the heart; training images scribbled, the others full.

Images: Zhuang, IEEE TPAMI 2019, doi 10.1109/TPAMI.2018.2869576. Scribbles: Zhang and Zhuang, CycleMix, CVPR 2022, arXiv
2203.01475: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle, 4 not annotated. The challenge's own masks are coded
600, 200 and 500: both are read.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_confkd.dataset_conversion.volumes import Volume
from nnunet_confkd.dataset_conversion.writer import (
    FULL,
    PARTIAL,
    PROCESSES,
    Case,
    Dataset,
    choose_patients,
    with_ignore,
    write_dataset,
)
from nnunet_confkd.errors import InputError

DESCRIPTION = "MSCMR, cardiac LGE MRI with scribbles (train, val, TestSet, each with images and labels)"
LABELS = {"background": 0, "RV": 1, "myocardium": 2, "LV": 3}
VALUES = {0: 0, 1: 1, 2: 2, 3: 3, 600: 1, 200: 2, 500: 3}
ENDING = ".nii.gz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", nargs="+", metavar="N|SUBJECT", help="subjects of val that train, with their full masks: a number, "
                        "or names; ConfKD needs at least one fully labelled training case, and train has none")


def convert(source: Path, dataset_id: int, *, full: list[str] | None = None, name: str = "MSCMR", seed: int = 0,
            processes: int = PROCESSES, link: bool = False) -> Path:
    """Write MSCMR as a mixed data set of nnU-Net; returns its folder.

    source: holds train, val and TestSet. full: subjects of val to train on, names or one number; the others validate. With
    None no training case is full, and ConfKDTrainer will refuse the data set.
    Raises InputError with all that is wrong with the data.
    """
    source = Path(source)
    for part in ("train", "val"):
        if not (source / part / "images").is_dir() or not (source / part / "labels").is_dir():
            raise InputError(f"{source}: needs the folders {part}/images and {part}/labels")
    problems: list[str] = []
    scribbled = _cases(source / "train", PARTIAL, {**VALUES, 4: 4}, problems)
    val = _cases(source / "val", FULL, VALUES, problems)
    test = _cases(source / "TestSet", FULL, VALUES, problems) if (source / "TestSet" / "images").is_dir() else []
    training = set()
    if full is not None and val:
        # at least one validates: the first of those that are not asked for
        roles = choose_patients([case.name for case in val], seed, full)
        training = {subject for subject, role in roles.items() if role == "full"}
    elif not problems:
        print("note: no training case is fully labelled, and ConfKDTrainer needs one: --full moves subjects of val to training")
    return write_dataset(Dataset(
        name=name, channel_names=["LGE"], labels=with_ignore(LABELS), file_ending=ENDING, training=[*scribbled, *val], test=test,
        validation=[case.name for case in val if case.name not in training],
        licence="see the publisher's terms (MSCMRseg 2019 challenge)",
        reference="Zhuang, IEEE TPAMI 2019, doi 10.1109/TPAMI.2018.2869576; scribbles: Zhang and Zhuang, CVPR 2022, arXiv 2203.01475",
        roots=(source,), problems=problems), dataset_id, processes, link)


def _cases(folder: Path, kind: str, values: dict[int, int], problems: list[str]) -> list[Case]:
    """Images, and the label whose name begins with the image's: subject2_DE, subject2_DE_scribble or subject2_DE_manual."""
    images, labels = _files(folder / "images"), _files(folder / "labels")
    if not images:
        problems.append(f"{folder / 'images'}: holds no images ({ENDING})")
    cases, used = [], set()
    for image in images:
        stem = image.name.removesuffix(ENDING)
        fitting = [f for f in labels if f.name.removesuffix(ENDING) == stem or f.name.startswith(f"{stem}_")]
        used.update(fitting)
        if len(fitting) != 1:
            problems.append(f"{image}: has " + (f"several labels: {', '.join(f.name for f in fitting)}" if fitting else
                                                f"no label in {folder / 'labels'}"))
            continue
        cases.append(Case(stem, (Volume(image),), Volume(fitting[0]), kind, values))
    problems += [f"{label}: has no image in {folder / 'images'}" for label in labels if label not in used]
    return cases


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.name.endswith(ENDING) and not f.name.startswith("."))
