"""Labels whose parts have names: 3D Slicer's .seg.nrrd, folders with one file for each class, and DICOM SEG.

The values in such files mean nothing: they differ from case to case. What counts is the name.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_confkd.data import dicom
from nnunet_confkd.data.images import Geometry, Picture, ending_of, read, read_layers, readable, values_in
from nnunet_confkd.errors import InputError, some


@dataclass
class Segments:
    """The named parts of one label.

    Attributes:
        masks: {name: voxels that belong to it, (Z, Y, X)}.
        geometry: The grid, which may be a part of the image's.
    """
    masks: dict[str, np.ndarray]
    geometry: Geometry

    @property
    def volumes(self) -> dict[str, int]:
        """{name: voxels} of the segments that are not empty."""
        counts = {name: int(np.count_nonzero(mask)) for name, mask in self.masks.items()}
        return {name: count for name, count in counts.items() if count}


def has_segments(path: Path) -> bool:
    """Whether the parts of a label have names."""
    if path.is_dir() or ending_of(path, (".seg.nrrd", ".dcm")):
        return True
    return _names_segments(path) if ending_of(path, (".nrrd",)) else not ending_of(path) and dicom.is_dicom_file(path)


def _names_segments(file: Path) -> bool:
    with readable(file), open(file, "rb") as stream:
        return re.search(rb"^Segment\d+_Name\s*:?=", stream.read(2 ** 16), re.MULTILINE) is not None


def segment_names(path: Path) -> list[str] | None:
    """Return the names of the classes in a folder with one file for each; None if the path is no such folder."""
    if not path.is_dir() or dicom.is_dicom_folder(path):
        return None
    return [name for name, _ in _files_of_classes(path)]


def _files_of_classes(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.iterdir()):
        ending = ending_of(file)
        if ending and not file.name.startswith(".") and not file.is_dir():
            yield file.name[:-len(ending)], file


def read_segments(path: Path, wanted: Iterable[str] | None = None) -> Segments:
    """Read the segments of a label.

    Args:
        path: A .seg.nrrd file, a DICOM SEG file, a folder that holds one, or a folder with one file for each class.
        wanted: The names of the classes to read from such a folder; None: all.

    Raises:
        InputError: The label cannot be read, two segments have the same name, or the files of a folder are on
            different grids.
    """
    if path.is_dir() and not dicom.is_dicom_folder(path):
        return _read_folder(path, wanted)
    seg = dicom.segmentation_file(path)
    return Segments(*dicom.read_segments(seg)) if seg else _read_slicer(path)


def _read_slicer(file: Path) -> Segments:
    picture, fields = read_layers(file)
    masks: dict[str, np.ndarray] = {}
    values: list[set[int]] = [{0} for _ in picture.voxels]
    for key in sorted(fields, key=lambda key: (len(key), key)):
        match = re.fullmatch(r"(Segment\d+)_Name", key)
        if match is None:
            continue
        name, value = fields[key], fields.get(f"{match[1]}_LabelValue")
        layer = int(fields.get(f"{match[1]}_Layer", 0))
        if value is None or layer >= len(picture.voxels):
            raise InputError(f"{file}: its header does not say which voxels belong to the segment {name!r}; save it "
                             f"again in a recent version of 3D Slicer")
        if name in masks:
            raise InputError(f"{file}: has two segments of the name {name!r}; rename one")
        masks[name] = picture.voxels[layer] == int(value)
        values[layer].add(int(value))
    for layer, voxels in enumerate(picture.voxels):
        if nameless := sorted(set(values_in(voxels).tolist()) - values[layer]):
            raise InputError(f"{file}: holds the values {some(nameless)}, but its header names no segment for them; "
                             f"programs other than 3D Slicer drop these names. Export it anew in 3D Slicer; or, if its "
                             f"values are those of your labels, call it {_stem(file)}.nrrd")
    return Segments(masks, picture.geometry)


def _stem(file: Path) -> str:
    return file.name[:-len(ending_of(file, (".seg.nrrd", ".nrrd")) or "")]


def _read_folder(folder: Path, wanted: Iterable[str] | None) -> Segments:
    known = None if wanted is None else {name.casefold() for name in wanted}
    masks: dict[str, np.ndarray] = {}
    first: tuple[Path, Geometry] | None = None
    for name, file in _files_of_classes(folder):
        if known is not None and name.casefold() not in known:
            continue
        picture = read(file)
        first = first or (file, picture.geometry)
        different = picture.geometry.differences(first[1])
        if different:
            raise InputError(f"{file}: is on another grid than {first[0]}: {'; '.join(different)}")
        values = np.unique(picture.voxels)
        if len(values) > 2 or len(values) == 2 and 0 not in values or len(picture.voxels) > 1:
            raise InputError(f"{file}: holds the values {some(values)}; in a folder with one file for each class, a "
                             f"file holds 0 and one more value")
        masks[name] = picture.voxels[0] != 0
    if first is None:
        raise InputError(f"{folder}: holds none of the classes {some(wanted or [])}; it holds "
                         f"{some(segment_names(folder)) or 'no files'}")
    return Segments(masks, first[1])


def read_as_label(path: Path, *, values: Mapping[str, int], outside: int,
                  unknown_text: str = "which --labels does not name") -> Picture:
    """Read segments as a label map. This function is at module level because it is sent to other processes.

    Args:
        path: As in :func:`read_segments`.
        values: {name of a segment, in lower case: value to write}.
        outside: The value of voxels in no segment.
        unknown_text: What an error says of segments that are not in `values`.

    Raises:
        InputError: As :func:`read_segments`, or a segment that is not empty is not in `values`, or segments of
            different values overlap. The text names them.
    """
    segments = read_segments(path, values)
    unknown = sorted(name for name in segments.volumes if name.casefold() not in values)
    if unknown:
        raise InputError(f"{path}: holds the segments {some(unknown)}, {unknown_text}")
    size = segments.geometry.size[::-1]
    label = np.full(size, outside, np.uint8 if max(*values.values(), outside) < 256 else np.uint16)
    taken = np.zeros(size, bool)
    problems = []
    for name, mask in segments.masks.items():
        value = values.get(name.casefold())
        if value is None:
            continue
        overlap = mask & taken & (label != value)
        if overlap.any():
            others = [other for other, voxels in segments.masks.items() if other != name and (voxels & overlap).any()
                      and values.get(other.casefold(), value) != value]
            problems.append(f"{name!r} and {some(map(repr, others))} overlap in {np.count_nonzero(overlap)} voxels")
        label[mask] = value
        taken |= mask
    if problems:
        raise InputError(f"{path}: the segments {'; '.join(problems)}; a voxel has one label: take the overlap out of "
                         f"one of them")
    return Picture(label[None], segments.geometry)
