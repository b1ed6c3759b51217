"""LA 2018: the left atrium in late gadolinium enhancement MRI, as published (NRRD), or in a later HDF5 form.

Xiong et al., Medical Image Analysis 2021, doi 10.1016/j.media.2020.101832. The HDF5 form is that of Yu et al., UA-MT,
MICCAI 2019: mri_norm2.h5 with "image" and "label", cropped and normalised, in the order x, y, z in which NRRD stores
them. It has no spacing, which must be given. Two training cases were published with the same mask. They stay on one
side of the split; in the HDF5 form, which is cropped at random, this cannot be seen.
"""
from __future__ import annotations

import argparse
import hashlib
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
from nnunet_confkd.dataset_conversion.common import find_files, require_folder

from nnunet_confkd.data.images import Geometry, Picture, Volume
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "LA 2018, left atrium in LGE MRI (a folder a case: lgemri.nrrd and laendo.nrrd, or mri_norm2.h5)"
IMAGE, LABEL, H5 = "lgemri.nrrd", "laendo.nrrd", "mri_norm2.h5"
VALUES = {0: 0, 1: 1, 255: 1}  # {value in the files: value to write}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"),
                        help=f"mm; reads {H5}, which stores none")


def convert(source: Path, dataset_id: int, *, spacing: list[float] | None = None, name: str = "LA2018",
            processes: int = PROCESSES, link: bool = False) -> Path:
    """Write LA 2018 as a fully annotated data set of nnU-Net.

    Args:
        source: The folder of the folders of cases. Those in a folder whose name begins with "Test" are test cases.
        dataset_id: The 51 in Dataset051_NAME.
        spacing: x, y, z in mm. If it is given, the HDF5 form is read, otherwise the NRRD form.
        name: The NAME in Dataset051_NAME.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies (NRRD only).

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the data.
    """
    source = require_folder(source)
    images, labels, packed = (find_files(source, re.escape(file), (2, 3, 4)) for file in (IMAGE, LABEL, H5))
    _check_form(source, images + labels, packed, spacing)
    problems: list[str] = []
    training, test = [], []
    for file in images if spacing is None else packed:
        # the name of a case may begin so, too
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
        raise InputError(f"{source}: holds no training case, only test cases (in folders whose names begin with "
                         f"\"Test\")")
    return write_dataset(Dataset(
        name=name, channel_names=["LGE"], labels={"background": 0, "left_atrium": 1}, file_ending=".nrrd",
        training=training, test=test, patients=None if spacing is not None else _patients(training),
        licence="see the publisher's terms (2018 Left Atrium Segmentation Challenge)",
        reference="Xiong et al., Medical Image Analysis 2021, doi 10.1016/j.media.2020.101832", roots=(source,),
        problems=problems), dataset_id, processes, link)


def _check_form(source: Path, published: list[Path], packed: list[Path], spacing: list[float] | None) -> None:
    """Raise InputError if there are no files of the form that is asked for, or h5py is missing."""
    if not published and not packed:
        raise InputError(f"{source}: holds no folders of cases, with {IMAGE} and {LABEL}, or with {H5}")
    if spacing is None:
        if not published:
            raise InputError(f"{packed[0]}: stores no spacing; give that of your files as --spacing X Y Z in mm (the "
                             f"challenge tells 0.625 mm of its images, but copies may be resampled)")
        return
    if not packed:
        raise InputError(f"{source}: holds no {H5}, and {IMAGE} has a spacing of its own; leave out --spacing")
    if not all(0 < edge < math.inf for edge in spacing):
        raise InputError(f"--spacing {' '.join(map(str, spacing))}: these are the edges of a voxel in mm, above 0")
    _h5py()  # once, not for each case


def _patients(cases: list[Case]) -> dict[str, str]:
    """Return {case: the first case whose label is the same file}."""
    first: dict[bytes, str] = {}
    patients = {}
    for case in cases:
        try:
            content = hashlib.sha256(case.label.file.read_bytes()).digest()
        except OSError:
            content = case.name.encode()  # the writer reports it
        patients[case.name] = first.setdefault(content, case.name)
    return patients


def read_h5(file: Path, *, key: str, spacing: tuple[float, float, float]) -> Picture:
    """Read an array (X, Y, Z) of an HDF5 file.

    Args:
        file: The HDF5 file.
        key: The name of the array.
        spacing: x, y, z in mm.

    Raises:
        InputError: The array is missing or lies in another file, or h5py is not installed.
    """
    h5py = _h5py()
    try:
        with h5py.File(file) as content:
            # links and external or virtual arrays would make HDF5 read other files
            here = isinstance(content.get(key, getlink=True), h5py.HardLink) and isinstance(content[key], h5py.Dataset)
            if not here or content[key].external or content[key].is_virtual:
                raise ValueError("this file holds none of that name")
            voxels = content[key][()]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{file}: cannot be read, or has no array \"{key}\" ({error})") from error
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf":
        raise InputError(f"{file}: the array \"{key}\" has the shape {voxels.shape}, of {voxels.dtype}; numbers in "
                         f"three dimensions are expected")
    voxels = np.ascontiguousarray(voxels.T)
    return Picture(voxels[None], Geometry.plain(voxels.shape, spacing[::-1]))


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise InputError("the HDF5 form of LA 2018 needs the package h5py: pip install h5py") from error
    return h5py
