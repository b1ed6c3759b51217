"""PROMISE12: the prostate in T2-weighted MRI, as MetaImage.

Litjens et al., Medical Image Analysis 2014, doi 10.1016/j.media.2013.12.002. nnU-Net does not read .mhd, so the images
are written as .mha, the same format in one file. Neither voxels nor geometry change.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_confkd.dataset_conversion.common import find_files, require_folder

from nnunet_confkd.data.images import Volume, parts
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "PROMISE12, prostate MRI (CaseNN.mhd/.raw, CaseNN_segmentation.mhd/.raw)"
TEST_FOLDERS = ("test", "livechallenge")  # beginnings of names; both have Case00, as the training folder has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options: this converter has none of its own."""


def convert(source: Path, dataset_id: int, *, name: str = "PROMISE12", processes: int = PROCESSES,
            link: bool = False) -> Path:
    """Write PROMISE12 as a fully annotated data set of nnU-Net.

    Args:
        source: The folder of the cases, or of folders of cases (training_data, or TrainingData_Part1 and so on). Cases
            in folders whose names begin with "test" or "livechallenge" are test cases, named TestData_Case00 and so on.
            Their labels may be missing.
        dataset_id: The 41 in Dataset041_NAME.
        name: The NAME in it.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies. Here none can, because all are converted.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the data.
    """
    source = require_folder(source)
    headers = find_files(source, r"Case\d+(_segmentation)?\.mhd", (1, 2, 3))
    if not headers:
        raise InputError(f"{source}: holds no files Case00.mhd, Case00_segmentation.mhd and so on")
    labels = {file for file in headers if file.stem.endswith("_segmentation")}
    problems = [f"{label}: has no {label.name.replace('_segmentation', '')} beside it" for label in sorted(labels)
                if label.with_name(label.name.replace("_segmentation", "")) not in headers]
    training, test = [], []
    for image in (file for file in headers if file not in labels):
        label: Path | None = image.with_name(f"{image.stem}_segmentation.mhd")
        testing = any(part.lower().startswith(TEST_FOLDERS) for part in image.parent.relative_to(source).parts)
        if label not in labels:
            if not testing:
                problems.append(f"{image}: has no {label.name} beside it; test cases lie in a folder TestData")
                continue
            label = None
        missing = [problem for header in (image, label) if header is not None for problem in _missing_voxels(header)]
        problems += missing
        if not missing:
            case = f"{image.parent.name}_{image.stem}" if testing else image.stem
            (test if testing else training).append(Case(case, (Volume(image),), Volume(label) if label else None))
    if not training and not problems:
        raise InputError(f"{source}: holds no training case (Case00.mhd and Case00_segmentation.mhd)")
    return write_dataset(Dataset(
        name=name, channel_names=["T2"], labels={"background": 0, "prostate": 1}, file_ending=".mha",
        training=training, test=test, licence="see the publisher's terms (PROMISE12 challenge)",
        reference="Litjens et al., Medical Image Analysis 2014, doi 10.1016/j.media.2013.12.002",
        roots=(source,), problems=problems), dataset_id, processes, link)


def _missing_voxels(header: Path) -> list[str]:
    """Say which voxel file is missing: ITK only says that the header cannot be read."""
    try:
        return [f"{file}: is missing; {header.name} takes its voxels from it" for file in parts(header)
                if not file.is_file()]
    except InputError:
        return []  # the writer reports voxels that lie elsewhere
