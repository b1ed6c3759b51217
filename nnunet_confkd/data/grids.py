"""Bring a label onto the grid of its image: pad it, or resample it."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nnunet_confkd.data.images import ORIGIN_TOLERANCE, Geometry
from nnunet_confkd.errors import InputError

PART = 2 ** 20  # voxels that are looked at together


@dataclass(frozen=True)
class Fitting:
    """How a label that is on another grid than its image is brought onto it.

    Attributes:
        outside: The value to write where the label has no voxel.
        padded: Whether the label may be a part of the image's grid.
        resampled: Whether it may be on any other grid.
        kept: Whether no annotated voxel may get lost then, as in partial labels.
    """
    outside: int
    padded: bool = False
    resampled: bool = False
    kept: bool = False


def fitted(label: np.ndarray, own: Geometry, grid: Geometry, fitting: Fitting) -> np.ndarray:
    """Bring a label onto another grid.

    Args:
        label: (Z, Y, X) or (Y, X), with the values to write.
        own: Its grid.
        grid: That of the image.
        fitting: What may be done.

    Returns:
        The label on the image's grid.

    Raises:
        InputError: It may not be done, or something is drawn outside of the image. The text says how the grids differ.
    """
    offset = _whole_offset(own, grid) if fitting.padded else None
    if offset is not None:
        return _padded(label, offset, grid, fitting.outside)
    if not fitting.resampled:
        difference = "; ".join(own.differences(grid))
        raise InputError(f"{difference}; the label has {_text(own)}, the image {_text(grid)}; if both show the same "
                         f"place, --resample-labels brings the label onto the image's grid (nearest neighbour)")
    if len(own.size) != len(grid.size):
        raise InputError(f"it has {len(own.size)} dimensions, and the image {len(grid.size)}")
    return _resampled(label, own, grid, fitting)


def covered(own: Geometry, grid: Geometry) -> float:
    """Estimate which share of the voxels of one grid another grid covers, from a regular sample of them.

    Args:
        own: The grid that may cover the other one, e.g. a label's.
        grid: The other one, e.g. the image's. Of as many dimensions.

    Examples:
        >>> image = Geometry((10, 10), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))
        >>> label = Geometry((10, 8), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))
        >>> covered(label, image)
        0.8
    """
    dimensions = len(grid.size)
    sample = np.stack(np.meshgrid(*(np.unique(np.linspace(0, size - 1, 40).round()) for size in grid.size),
                                  indexing="ij")).reshape(dimensions, -1)
    index = _indices_in(own, sample, grid)
    # half a voxel on each side belongs to the grid; the rest is for rounding
    inside = (index > -0.501) & (index < np.reshape(own.size, (-1, 1)) - 0.499)
    return float(inside.all(0).mean())


def _indices_in(grid: Geometry, index: np.ndarray, own: Geometry) -> np.ndarray:
    """Return where voxels lie in a grid. `index`, their numbers in their `own` grid, is (x, y, z) by voxels, as is the
    result."""
    axes, own_axes = (np.reshape(geometry.direction, (len(geometry.size),) * 2) for geometry in (grid, own))
    places = own_axes @ (index * np.reshape(own.spacing, (-1, 1))) + np.reshape(own.origin, (-1, 1))
    return (axes.T @ (places - np.reshape(grid.origin, (-1, 1)))) / np.reshape(grid.spacing, (-1, 1))


def _text(geometry: Geometry) -> str:
    size, spacing, origin = ("x".join(f"{number:.4g}" for number in numbers)
                             for numbers in (geometry.size, geometry.spacing, geometry.origin))
    return f"{size} voxels of {spacing} mm at {origin.replace('x', ', ')}"


def _whole_offset(own: Geometry, grid: Geometry) -> np.ndarray | None:
    """Return where the first voxel lies in the other grid, in voxels (x, y, z); None if no voxel lies on one of it."""
    if len(own.size) != len(grid.size):
        return None
    same = Geometry(grid.size, own.spacing, grid.origin, own.direction)
    axes = np.reshape(grid.direction, (len(grid.size),) * 2)
    offset = (axes.T @ np.subtract(own.origin, grid.origin)) / grid.spacing
    whole = np.rint(offset)
    if same.differences(grid) or (np.abs(offset - whole) > ORIGIN_TOLERANCE).any():
        return None
    return whole.astype(int)


def _padded(label: np.ndarray, offset: np.ndarray, grid: Geometry, outside: int) -> np.ndarray:
    padded = np.full(grid.size[::-1], outside, label.dtype)
    start, shape = offset[::-1], np.array(label.shape)
    first, last = np.maximum(start, 0), np.minimum(start + shape, padded.shape)
    inside = tuple(slice(a - s, max(a, b) - s) for a, b, s in zip(first, last, start))
    lost = np.count_nonzero(label != outside) - np.count_nonzero(label[inside] != outside)
    if lost:
        raise InputError(f"{lost} voxels are drawn outside of the image; is it the label of another image?")
    padded[tuple(slice(a, max(a, b)) for a, b in zip(first, last))] = label[inside]
    return padded


def _resampled(label: np.ndarray, own: Geometry, grid: Geometry, fitting: Fitting) -> np.ndarray:
    import SimpleITK as sitk

    _require_inside(label, own, grid, fitting.outside)
    image = sitk.GetImageFromArray(label)
    image.SetSpacing(own.spacing)
    image.SetOrigin(own.origin)
    image.SetDirection(own.direction)
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.size)
    resampler.SetOutputSpacing(grid.spacing)
    resampler.SetOutputOrigin(grid.origin)
    resampler.SetOutputDirection(grid.direction)
    resampler.SetInterpolator(sitk.sitkNearestNeighbor)
    resampler.SetDefaultPixelValue(fitting.outside)
    resampled = sitk.GetArrayFromImage(resampler.Execute(image))
    if fitting.kept:
        _keep_annotations(resampled, label, own, grid, fitting.outside)
    return resampled


def _require_inside(label: np.ndarray, own: Geometry, grid: Geometry, outside: int) -> None:
    """Raise InputError if more than a hundredth of the drawn voxels lies outside of the grid, or all of them do."""
    drawn = np.flatnonzero(label.reshape(-1) != outside)
    # half a voxel of the image belongs to it, and half of a voxel of the label may stand out; the rest is for rounding
    margin = 0.501 + 0.5 * max(own.spacing) / np.reshape(grid.spacing, (-1, 1))
    lost = 0
    for index in _indices_of(drawn, label.shape):
        found = _indices_in(grid, index, own)
        lost += np.count_nonzero(((found < -margin) | (found > np.reshape(grid.size, (-1, 1)) - 1 + margin)).any(0))
    if len(drawn) and lost == len(drawn):
        raise InputError("nothing of it lies in the image; is it the label of another image?")
    if 100 * lost > len(drawn):
        raise InputError(f"{100 * lost / len(drawn):.0f} % of what is drawn in it lies outside of the image. Is it the "
                         f"label of another image, or was its header lost? If it is right, cut it to the image "
                         f"yourself, with SimpleITK in Python: sitk.Resample(label, image, sitk.Transform(), "
                         f"sitk.sitkNearestNeighbor)")


def lost_header(label: Geometry, image: Geometry) -> bool:
    """Whether a label is as large as its image, and has the place and the spacing of a file without any.

    Args:
        label: The grid of the label, which differs from that of the image.
        image: That of its image.
    """
    return label.size == image.size and not any(label.origin) and all(edge == 1 for edge in label.spacing)


def _indices_of(voxels: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the places of voxels, given by their numbers, as (x, y, z) by voxels, in parts."""
    for start in range(0, len(voxels), PART):
        yield np.stack(np.unravel_index(voxels[start:start + PART], shape)[::-1])


def _keep_annotations(resampled: np.ndarray, label: np.ndarray, own: Geometry, grid: Geometry, outside: int) -> None:
    """Annotate the voxels in which an annotated voxel lies that nearest neighbours have passed over, in place."""
    flat = label.reshape(-1)
    drawn = np.flatnonzero(flat != outside)
    for start, index in zip(range(0, len(drawn), PART), _indices_of(drawn, label.shape)):
        part = drawn[start:start + PART]
        found = np.rint(_indices_in(grid, index, own)).astype(int)
        inside = ((found >= 0) & (found < np.reshape(grid.size, (-1, 1)))).all(0)
        where = tuple(found[::-1, inside])
        free = resampled[where] == outside
        resampled[tuple(axis[free] for axis in where)] = flat[part[inside][free]]
