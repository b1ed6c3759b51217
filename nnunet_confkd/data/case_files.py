"""Write the images and the label of one case for nnU-Net, and find what is wrong with them."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_confkd.data.grids import Fitting, fitted, lost_header
from nnunet_confkd.data.images import (
    ITK,
    TIFF,
    Geometry,
    Picture,
    Volume,
    carry_over,
    ending_of,
    parts,
    spacing_file,
    stands_alone,
    write,
)
from nnunet_confkd.data.supervision import FULL
from nnunet_confkd.data.survey import MOST_STRANGE
from nnunet_confkd.errors import InputError, some


@dataclass(frozen=True)
class Case:
    """One image with its label.

    Attributes:
        name: The name in nnU-Net's files.
        images: One volume for each channel, or volumes of several channels (4-D, colours).
        label: None for an unlabelled training case, or a test case without a label.
        kind: "full", "partial" or "unlabelled".
        values: {value in the label file: value to write}. Any other value is an error. None: those of the data set.
        fitting: What may be done to the grid of the label; None: it must be the image's, and there is no option for it.
    """
    name: str
    images: tuple[Volume, ...]
    label: Volume | None = None
    kind: str = FULL
    values: dict[int, int] | None = None
    fitting: Fitting | None = None


@dataclass(frozen=True)
class Target:
    """Where the files of a case are written, and what is asked of them.

    Attributes:
        images: The folder of images. It exists.
        labels: The folder of labels. It exists if the case gets a label.
        file_ending: The ending, and so the format, of all files.
        channel_names: The names of the channels in nnU-Net's order.
        values: All values that a label may hold, that of "ignore" included.
        ignore: The value of "ignore"; None if the data set has no such label.
        roots: The folders that were given. A file that lies elsewhere (a link) is refused. Empty: there is no such
            check.
        link: Whether images become hard links instead of copies.
        dry_run: Whether everything is checked and nothing is written.
    """
    images: Path
    labels: Path
    file_ending: str
    channel_names: tuple[str, ...]
    values: frozenset[int]
    ignore: int | None
    roots: tuple[Path, ...] = ()
    link: bool = False
    dry_run: bool = False


def write_case(case: Case, target: Target) -> list[str]:
    """Write the images and the label of a case.

    Images that nnU-Net can read are carried over byte for byte; others are converted without loss. A label is copied if
    its values and its grid need no change. An unlabelled training case gets a label that is "ignore" everywhere.

    Returns:
        What is wrong with the case. If anything is, a part of the files may have been written.

    Raises:
        OSError: The disk is full, or a file cannot be written for another reason.
    """
    problems, grid = _write_images(case, target)
    return problems + _write_label(case, target, grid)


def _write_images(case: Case, target: Target) -> tuple[list[str], Geometry | None]:
    """Write the images. Return what is wrong, and the grid of the first image; None if no image can be read."""
    problems: list[str] = []
    grid, channels, files, last = None, 0, 0, {}
    for volume in case.images:
        source = (volume.file, volume.reader)
        try:
            if source not in last:  # the channels of a 4-D file follow each other: it is read once
                _require_inside(volume.file, target.roots)
                last = {source: replace(volume, channel=None).read()}
        except InputError as error:
            problems.append(str(error))
            continue
        picture = last[source] if volume.channel is None else last[source].channel(volume.channel)
        grid = grid or picture.geometry
        problems += _image_problems(volume.file, picture, target)
        problems += _grid_problems(volume.file, picture.geometry, case, grid)
        if not problems and not target.dry_run:  # with problems, nothing will be kept
            files += _write_image(volume, picture, grid, (case.name, files), target)
        channels += len(picture.voxels)
    if not problems and channels != len(target.channel_names):
        problems.append(f"{case.images[0].file}: the case has {channels} channels; {len(target.channel_names)} are "
                        f"expected ({', '.join(target.channel_names)})"
                        + (". Numbers such as _0000 at the end of names are those of channels; if these are images of "
                           "their own, rename them" if len(case.images) > len(target.channel_names) else ""))
    return problems, grid


def _image_problems(file: Path, picture: Picture, target: Target) -> list[str]:
    problems = []
    if picture.voxels.dtype.kind == "f" and not np.isfinite(picture.voxels).all():
        problems.append(f"{file}: {int((~np.isfinite(picture.voxels)).sum())} voxels are not finite (NaN or infinite); "
                        f"replace them")
    if target.file_ending.lower() == ".nii" and len(picture.geometry.size) < 3:
        problems.append(f"{file}: is two-dimensional, which nnU-Net does not read from .nii; compress all files to "
                        f".nii.gz")
    return problems


def _grid_problems(file: Path, geometry: Geometry, case: Case, grid: Geometry) -> list[str]:
    return [f"{file}: is on another grid than {case.images[0].file}: {difference}; resample it, or correct its header"
            for difference in geometry.differences(grid)]


def _write_image(volume: Volume, picture: Picture, grid: Geometry, name: tuple[str, int], target: Target) -> int:
    """Write one volume as one file if nnU-Net can read a copy of it, otherwise a file for each channel.

    `name` is the name of the case and the number of the first file. Return how many files were written.
    """
    case, first = name
    # nnU-Net refuses spacings that differ a little between channels. With 4-D files it cannot write predictions.
    as_it_is = (_can_be_copied(volume, target) and np.allclose(picture.geometry.spacing, grid.spacing)
                and (len(picture.voxels) == 1 or target.file_ending.lower() not in ITK))
    if as_it_is:
        carry_over(volume.file, target.images / f"{case}_{first:04d}{target.file_ending}", target.link)
        return 1
    for number, voxels in enumerate(picture.voxels, first):
        write(target.images / f"{case}_{number:04d}{target.file_ending}", voxels, grid)
    return len(picture.voxels)


def _can_be_copied(volume: Volume, target: Target) -> bool:
    return (volume.reader is None and volume.channel is None
            and (ending_of(volume.file) or "").lower() == target.file_ending.lower() and stands_alone(volume.file))


def _write_label(case: Case, target: Target, grid: Geometry | None) -> list[str]:
    """Write the label on the grid of the image. `grid` is None if no image can be read. Return what is wrong."""
    file = target.labels / f"{case.name}{target.file_ending}"
    dtype = np.uint8 if max(target.values) < 256 else np.uint16
    if case.label is None:
        # a fully annotated case without a label is a test case
        if case.kind != FULL and grid is not None and not target.dry_run:
            write(file, np.full(grid.size[::-1], target.ignore, dtype), grid)
        return []
    try:
        _require_inside(case.label.file, target.roots)
        picture = case.label.read()
    except InputError as error:
        return [str(error)]
    grid = grid or picture.geometry
    if is_placed_by_image(case, picture.geometry, grid):
        picture = replace(picture, geometry=grid)
    values = np.unique(picture.voxels)
    of_full = target.values - {target.ignore} if case.kind == FULL else target.values
    allowed = case.values or {value: value for value in of_full}
    problems = _label_problems(case, picture, values, allowed)
    same_grid = not picture.geometry.differences(grid)
    if case.fitting is None:
        problems += _grid_problems(case.label.file, picture.geometry, case, grid)
    if problems:
        return problems
    label = picture.voxels[0]
    # nnU-Net's reader of TIFF and PNG returns floats, so such labels are always written anew
    unchanged = label.dtype.kind in "iu" and all(allowed[value] == value for value in values)
    if unchanged and _can_be_copied(case.label, target) and picture.geometry.equals_for_nnunet(grid):
        if not target.dry_run:
            carry_over(case.label.file, file)  # never a link: people edit labels
        return []
    mapped = np.zeros(label.shape, dtype)
    for value in values:
        mapped[label == value] = allowed[value]
    if not same_grid:
        if lost_header(picture.geometry, grid):
            return [f"{case.label.file}: is as large as its image, but without a place. Its header was probably lost "
                    f"when it was saved. If its voxels lie on those of the image, copy the header, with SimpleITK in "
                    f"Python: label.CopyInformation(image)"]
        try:
            mapped = fitted(mapped, picture.geometry, grid, case.fitting)
        except InputError as error:
            return [f"{case.label.file}: is on another grid than {case.images[0].file}: {error}"]
    if not target.dry_run:
        write(file, mapped, grid)
    return []


def is_placed_by_image(case: Case, own: Geometry, grid: Geometry) -> bool:
    """Whether a label has no place, and voxels for those of its image: TIFF files without nnU-Net's JSON file.

    Args:
        case: The case, which has a label.
        own: The grid that the label was read with.
        grid: That of the image.
    """
    return bool(own.size == grid.size and ending_of(case.label.file, TIFF) and ending_of(case.images[0].file, TIFF)
                and not spacing_file(case.label.file).is_file())


def _label_problems(case: Case, picture: Picture, values: np.ndarray, allowed: dict[int, int]) -> list[str]:
    file = case.label.file
    if len(picture.voxels) != 1:
        return [f"{file}: holds {len(picture.voxels)} channels; a label has one"]
    problems = []
    whole = np.isfinite(values) & (values == np.rint(values))
    strange = [int(value) for value in values[whole] if int(value) not in allowed]
    if not whole.all():
        problems.append(f"{file}: holds values that are no integers: {some(values[~whole])}; correct the label")
    if strange:
        problems.append(f"{file}: holds the values {some(strange)}; a {case.kind} label may hold "
                        f"{some(sorted(allowed))}; " + (
                            "correct the label, or name and map these values" if len(strange) <= MOST_STRANGE else
                            "it looks like an image: are the images and the labels exchanged?"))
    return problems


def _require_inside(file: Path, roots: tuple[Path, ...]) -> None:
    """Raise InputError if a file, or one that its header names, is not in the given folders (a link leads anywhere)."""
    for part in parts(file) if roots else ():
        if not any(part.resolve().is_relative_to(root.resolve()) for root in roots):
            raise InputError(f"{part}: leads out of the source folder, to {part.resolve()}; give the folder that holds "
                             f"it, or copy what links lead to: cp -rL FOLDER COPY")
