"""LA 2018: the left atrium in late gadolinium enhancement MRI, as published (NRRD), or in the HDF5 form of later papers.

Xiong et al., Medical Image Analysis 2021, doi 10.1016/j.media.2020.101832. The HDF5 form (mri_norm2.h5, "image" and "label" in
the order x, y, z, cropped and normalised; Yu et al., UA-MT, MICCAI 2019) stores no spacing: it must be given.
"""
from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_confkd.dataset_conversion.volumes import Geometry, Picture, Volume
from nnunet_confkd.dataset_conversion.writer import PROCESSES, Case, Dataset, choose_patients, write_dataset
from nnunet_confkd.errors import InputError

DESCRIPTION = "LA 2018, left atrium in LGE MRI (a folder a case: lgemri.nrrd and laendo.nrrd, or mri_norm2.h5)"
VALUES = {0: 0, 1: 1, 255: 1}
H5 = "mri_norm2.h5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help=f"mm; needed for {H5}, which stores none")


def convert(source: Path, dataset_id: int, *, spacing: list[float] | None = None, name: str = "LA2018", seed: int = 0,
            processes: int = PROCESSES, link: bool = False) -> Path:
    """Write LA 2018 as a fully labelled data set of nnU-Net; returns its folder.

    source: folders of cases, in it or in its folders; those below a folder whose name begins with "Test" are test cases.
    spacing: x, y, z in mm, of the HDF5 form only.
    Raises InputError with all that is wrong with the data.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: there is no such folder")
    images, packed = (sorted(source.glob(f"**/{file}")) for file in ("lgemri.nrrd", H5))
    if images and packed:
        raise InputError(f"{source}: holds both lgemri.nrrd and {H5}; give a folder with one of the two forms")
    if not images and not packed:
        raise InputError(f"{source}: holds no folders with lgemri.nrrd and laendo.nrrd, or with {H5}")
    if packed and (spacing is None or min(spacing) <= 0):
        raise InputError(f"{packed[0]}: stores no spacing. Give it as --spacing X Y Z in mm, of the files that you have (the "
                         f"challenge's images are said to have 0.625 mm; resampled copies differ)")
    if images and spacing is not None:
        raise InputError(f"{images[0]}: has a spacing of its own; leave --spacing out")
    problems: list[str] = []
    training, test = [], []
    for file in images or packed:
        folder, label = file.parent, file.with_name("laendo.nrrd")
        testing = any(part.lower().startswith("test") for part in folder.relative_to(source).parts)
        if packed:
            read = {key: partial(read_h5, key=key, spacing=tuple(spacing)) for key in ("image", "label")}
            case = Case(folder.name, (Volume(file, reader=read["image"]),), Volume(file, reader=read["label"]), values=VALUES)
        else:
            if not label.is_file() and not testing:
                problems.append(f"{label}: is missing")
                continue
            case = Case(folder.name, (Volume(file),), Volume(label) if label.is_file() else None, values=VALUES)
        (test if testing else training).append(case)
    problems += [f"{label.with_name('lgemri.nrrd')}: is missing" for label in sorted(source.glob("**/laendo.nrrd"))
                 if not label.with_name("lgemri.nrrd").is_file()]
    roles = choose_patients([case.name for case in training], seed) if training else {}
    return write_dataset(Dataset(
        name=name, channel_names=["LGE"], labels={"background": 0, "left_atrium": 1}, file_ending=".nrrd", training=training,
        test=test, validation=[case for case, role in roles.items() if role == "validation"],
        licence="see the publisher's terms (2018 Left Atrium Segmentation Challenge)",
        reference="Xiong et al., Medical Image Analysis 2021, doi 10.1016/j.media.2020.101832", roots=(source,),
        problems=problems), dataset_id, processes, link)


def read_h5(file: Path, *, key: str, spacing: tuple[float, float, float]) -> Picture:
    """An array (X, Y, Z) of an HDF5 file as a picture. Raises InputError where it is not there, or h5py is not."""
    try:
        import h5py
    except ImportError as error:
        raise InputError("the HDF5 form of LA 2018 needs the package h5py: pip install h5py") from error
    try:
        with h5py.File(file) as content:
            voxels = np.asarray(content[key])
    except (OSError, KeyError) as error:
        raise InputError(f"{file}: cannot be read, or has no array \"{key}\" ({error})") from error
    if voxels.ndim != 3:
        raise InputError(f"{file}: the array \"{key}\" has the shape {voxels.shape}; three dimensions are expected")
    voxels = np.ascontiguousarray(voxels.T)
    return Picture(voxels[None], Geometry.plain(voxels.shape, spacing[::-1]))
