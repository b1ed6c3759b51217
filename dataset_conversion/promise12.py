"""PROMISE12: the prostate in T2-weighted MRI, as MetaImage.

Litjens et al., Medical Image Analysis 2014, doi 10.1016/j.media.2013.12.002. nnU-Net does not read .mhd: the images are
written as .mha, the same format in one file, so nothing of voxels or geometry is lost.
"""
from __future__ import annotations

import argparse
import re
from pathlib import Path

from nnunet_confkd.data.images import Volume, parts
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "PROMISE12, prostate MRI (CaseNN.mhd/.raw, CaseNN_segmentation.mhd/.raw)"
FOLDERS = ("*", "*/*", "*/*/*")  # not "**", which passes over folders that are links, without a word
TEST_FOLDERS = ("test", "livechallenge")  # their names begin so; both have Case00, as the training folder has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def convert(source: Path, dataset_id: int, *, name: str = "PROMISE12", processes: int = PROCESSES,
            link: bool = False) -> Path:
    """Write PROMISE12 as a fully labelled data set of nnU-Net; returns its folder.

    source: the cases, in it or in its folders (training_data, or TrainingData_Part1 and so on). Those in folders whose
    names begin with "test" or "livechallenge" are test cases, TestData_Case00 and so on; their labels may be missing.
    Raises InputError with all that is wrong with the data.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: there is no such folder")
    headers = sorted(f for pattern in FOLDERS for f in source.glob(pattern)
                     if re.fullmatch(r"Case\d+(_segmentation)?\.mhd", f.name))
    if not headers:
        raise InputError(f"{source}: holds no files Case00.mhd, Case00_segmentation.mhd and so on")
    problems: list[str] = []
    training, test = [], []
    labels = {f for f in headers if f.stem.endswith("_segmentation")}
    problems += [f"{label}: has no {label.name.replace('_segmentation', '')} beside it" for label in sorted(labels)
                 if label.with_name(label.name.replace("_segmentation", "")) not in headers]
    for image in (f for f in headers if f not in labels):
        label: Path | None = image.with_name(f"{image.stem}_segmentation.mhd")
        testing = any(part.lower().startswith(TEST_FOLDERS) for part in image.parent.relative_to(source).parts)
        if label not in labels:
            if not testing:
                problems.append(f"{image}: has no {label.name} beside it; test cases lie in a folder TestData")
                continue
            label = None
        absent = [problem for header in (image, label) if header is not None for problem in _absent(header)]
        problems += absent
        if not absent:
            case = f"{image.parent.name}_{image.stem}" if testing else image.stem
            (test if testing else training).append(Case(case, (Volume(image),), Volume(label) if label else None))
    if not training and not problems:
        raise InputError(f"{source}: holds no training case (Case00.mhd and Case00_segmentation.mhd)")
    return write_dataset(Dataset(
        name=name, channel_names=["T2"], labels={"background": 0, "prostate": 1}, file_ending=".mha", training=training,
        test=test,
        licence="see the publisher's terms (PROMISE12 challenge)",
        reference="Litjens et al., Medical Image Analysis 2014, doi 10.1016/j.media.2013.12.002", roots=(source,),
        problems=problems), dataset_id, processes, link)


def _absent(header: Path) -> list[str]:
    """ITK would only say that the header cannot be read."""
    try:
        return [f"{file}: is missing; {header.name} takes its voxels from it" for file in parts(header)
                if not file.is_file()]
    except InputError:
        return []  # of voxels elsewhere the writer tells
