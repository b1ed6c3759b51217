"""LA 2018: the left atrium in late gadolinium enhancement MRI, as published (NRRD), or in the HDF5 form of later papers.

Xiong et al., Medical Image Analysis 2021, doi 10.1016/j.media.2020.101832. The HDF5 form is that of Yu et al., UA-MT, MICCAI
2019: mri_norm2.h5 with "image" and "label", cropped and normalised, in the order x, y, z in which NRRD stores them. It has
no spacing: that must be given. Two training cases were published with the same mask; they stay on one side of the split,
but in the HDF5 form, cropped at random, this cannot be seen.
"""
from __future__ import annotations

import argparse
import hashlib
import math
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_confkd.data.images import Geometry, Picture, Volume
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "LA 2018, left atrium in LGE MRI (a folder a case: lgemri.nrrd and laendo.nrrd, or mri_norm2.h5)"
IMAGE, LABEL, H5 = "lgemri.nrrd", "laendo.nrrd", "mri_norm2.h5"
VALUES = {0: 0, 1: 1, 255: 1}
CASES = ("*", "*/*", "*/*/*")  # not "**", which passes over folders that are links, without a word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help=f"mm; reads {H5}, which stores none")


def convert(source: Path, dataset_id: int, *, spacing: list[float] | None = None, name: str = "LA2018",
            processes: int = PROCESSES, link: bool = False) -> Path:
    """Write LA 2018 as a fully labelled data set of nnU-Net; returns its folder.

    source: folders of cases, in it or in its folders; those in a folder whose name begins with "Test" are test cases.
    spacing: x, y, z in mm; the HDF5 form is read then, otherwise the NRRD form.
    Raises InputError with all that is wrong with the data.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: there is no such folder")
    images, labels, packed = (sorted(f for folder in CASES for f in source.glob(f"{folder}/{file}") if f.is_file())
                              for file in (IMAGE, LABEL, H5))
    if not images and not labels and not packed:
        raise InputError(f"{source}: holds no folders of cases, with {IMAGE} and {LABEL}, or with {H5}")
    if spacing is None and not images and not labels:
        raise InputError(f"{packed[0]}: stores no spacing; give that of your files as --spacing X Y Z in mm (the challenge "
                         f"tells 0.625 mm of its images, but copies may be resampled)")
    if spacing is not None and not packed:
        raise InputError(f"{source}: holds no {H5}, and {IMAGE} has a spacing of its own; leave out --spacing")
    if spacing is not None and not all(0 < edge < math.inf for edge in spacing):
        raise InputError(f"--spacing {' '.join(map(str, spacing))}: these are the edges of a voxel in mm, above 0")
    if spacing is not None:
        _h5py()  # say once that it is missing
    problems: list[str] = []
    training, test = [], []
    for file in images if spacing is None else packed:
        # a case's own name may begin so, too
        testing = any(part.lower().startswith("test") for part in file.parent.parent.relative_to(source).parts)
        label = Volume(file.with_name(LABEL)) if file.with_name(LABEL) in labels else None
        if spacing is not None:
            image, label = (Volume(file, reader=partial(read_h5, key=key, spacing=(spacing[0], spacing[1], spacing[2])))
                            for key in ("image", "label"))
        else:
            image = Volume(file)
            if label is None and not testing:
                problems.append(f"{file}: has no {LABEL} beside it")
                continue
        (test if testing else training).append(Case(file.parent.name, (image,), label, values=VALUES))
    if spacing is None:
        problems += [f"{label}: has no {IMAGE} beside it" for label in labels if label.with_name(IMAGE) not in images]
    if not training and not problems:
        raise InputError(f"{source}: holds no training case, only test cases (in folders whose names begin with \"Test\")")
    patients = None if spacing is not None else _patients(training)
    return write_dataset(Dataset(
        name=name, channel_names=["LGE"], labels={"background": 0, "left_atrium": 1}, file_ending=".nrrd",
        training=training, test=test, patients=patients,
        licence="see the publisher's terms (2018 Left Atrium Segmentation Challenge)",
        reference="Xiong et al., Medical Image Analysis 2021, doi 10.1016/j.media.2020.101832", roots=(source,),
        problems=problems), dataset_id, processes, link)


def _patients(cases: list[Case]) -> dict[str, str]:
    """{case: the first case whose label is the same file}."""
    first: dict[bytes, str] = {}
    patient = {}
    for case in cases:
        try:
            content = hashlib.sha256(case.label.file.read_bytes()).digest()
        except OSError:
            content = case.name.encode()  # the writer tells
        patient[case.name] = first.setdefault(content, case.name)
    return patient


def read_h5(file: Path, *, key: str, spacing: tuple[float, float, float]) -> Picture:
    """An array (X, Y, Z) of an HDF5 file. Raises InputError where it is not there or in another file, or h5py is not."""
    h5py = _h5py()
    try:
        with h5py.File(file) as content:
            # None where there is none; HDF5 can keep in a file what makes it read another
            here = isinstance(content.get(key, getlink=True), h5py.HardLink) and isinstance(content[key], h5py.Dataset)
            if not here or content[key].external or content[key].is_virtual:
                raise ValueError("this file holds none of that name")
            voxels = content[key][()]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{file}: cannot be read, or has no array \"{key}\" ({error})") from error
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf":
        raise InputError(f"{file}: the array \"{key}\" has the shape {voxels.shape}, of {voxels.dtype}; numbers in three "
                         f"dimensions are expected")
    voxels = np.ascontiguousarray(voxels.T)
    return Picture(voxels[None], Geometry.plain(voxels.shape, spacing[::-1]))


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise InputError("the HDF5 form of LA 2018 needs the package h5py: pip install h5py") from error
    return h5py
