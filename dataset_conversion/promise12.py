"""PROMISE12: the prostate in T2-weighted MRI, as MetaImage.

Litjens et al., Medical Image Analysis 2014, doi 10.1016/j.media.2013.12.002. nnU-Net does not read .mhd: the images are written
as .mha, the same format in one file, so nothing of voxels or geometry is lost.
"""
from __future__ import annotations

import argparse
import re
from pathlib import Path

from nnunet_confkd.dataset_conversion.volumes import Volume
from nnunet_confkd.dataset_conversion.writer import PROCESSES, Case, Dataset, choose_patients, write_dataset
from nnunet_confkd.errors import InputError

DESCRIPTION = "PROMISE12, prostate MRI (CaseNN.mhd/.raw, CaseNN_segmentation.mhd/.raw)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def convert(source: Path, dataset_id: int, *, name: str = "PROMISE12", seed: int = 0, processes: int = PROCESSES,
            link: bool = False) -> Path:
    """Write PROMISE12 as a fully labelled data set of nnU-Net; returns its folder.

    source: the cases, in it or in its folders. A folder in which no case has a segmentation holds test images.
    Raises InputError with all that is wrong with the data.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: there is no such folder")
    headers = sorted(f for f in source.glob("**/*.mhd") if re.fullmatch(r"Case\d+(_segmentation)?\.mhd", f.name))
    if not headers:
        raise InputError(f"{source}: holds no files Case00.mhd, Case00_segmentation.mhd and so on")
    problems = [problem for header in headers for problem in _problems_of(header, source)]
    training, test = [], []
    labels = {f for f in headers if f.stem.endswith("_segmentation")}
    with_labels = {f.parent for f in labels}
    for image in (f for f in headers if f not in labels):
        label = image.with_name(f"{image.stem}_segmentation.mhd")
        if label in labels:
            training.append(Case(image.stem, (Volume(image),), Volume(label)))
        elif image.parent in with_labels:
            problems.append(f"{image}: has no {label.name}")
        else:
            test.append(Case(image.stem, (Volume(image),)))
    problems += [f"{label}: has no image" for label in sorted(labels)
                 if not label.with_name(label.name.replace("_segmentation", "")).is_file()]
    # training and test cases are numbered from 0, both
    names = {case.name for case in training}
    test = [Case(f"Test{case.name}" if case.name in names else case.name, case.images) for case in test]
    roles = choose_patients(names, seed) if training else {}
    return write_dataset(Dataset(
        name=name, channel_names=["T2"], labels={"background": 0, "prostate": 1}, file_ending=".mha", training=training, test=test,
        validation=[case for case, role in roles.items() if role == "validation"],
        licence="see the publisher's terms (PROMISE12 challenge)",
        reference="Litjens et al., Medical Image Analysis 2014, doi 10.1016/j.media.2013.12.002", roots=(source,),
        problems=problems), dataset_id, processes, link)


def _problems_of(header: Path, source: Path) -> list[str]:
    """A header names the file of its voxels, which may be missing or lie anywhere."""
    match = re.search(rb"^\s*ElementDataFile\s*=\s*(.+?)\s*$", header.read_bytes()[:100_000], re.MULTILINE)
    if match is None:
        return [f"{header}: names no ElementDataFile; is it a MetaImage header?"]
    data = header.parent / match[1].decode(errors="replace")
    if data.name in ("LOCAL", "LIST"):
        return [f"{header}: holds its voxels itself, or lists several files ({data.name}); PROMISE12 has one .raw beside each .mhd"]
    if not data.resolve().is_relative_to(source.resolve()):
        return [f"{header}: takes its voxels from {data}, which lies outside of the folder"]
    return [] if data.is_file() else [f"{data}: is missing; {header.name} takes its voxels from it"]
