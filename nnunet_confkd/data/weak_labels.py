"""Make weak labels from complete ones, for experiments on annotating less.

These are pure functions on arrays. Everything random comes from a generator that is seeded for each case, so the same
case, style and seed give the same label, whatever the order or the number of processes. In every style, annotated
voxels have their true class.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import scipy  # its modules are loaded when they are used, and so are skimage's
import skimage

from nnunet_confkd.errors import InputError

Mode = Literal["wrap", "clip"]  # of np.take
STYLES = ("erosion", "points", "scribbles", "slices", "box", "none")
DIMENSIONS = ("2d", "3d")
BACKGROUND = 0
SLICES_FRACTION = 0.2  # default of the style "slices"; the other styles annotate all slices
SQUARE = np.ones((3, 3), dtype=bool)
# a straight piece of outline has the odds of one that turns by so much (rad); a right angle has 17 times these odds
STRAIGHT = 0.1


def case_rng(case: str, style: str, seed: int) -> np.random.Generator:
    """Return the random generator of one case. It depends on nothing but the three arguments.

    Examples:
        >>> int(case_rng("case_1", "points", 0).integers(9)) == int(case_rng("case_1", "points", 0).integers(9))
        True
    """
    # not hash(), which differs between processes
    digest = hashlib.sha256(repr((str(case), str(style), int(seed))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def weaken(label: np.ndarray, style: str, ignore_label: int, rng: np.random.Generator, *, fraction: float | None = None,
           dimension: str = "2d", slice_axis: int | None = None, spacing: Sequence[float] | None = None,
           background: bool = True, radius: int = 1) -> np.ndarray:
    """Make a weak label from a complete one.

    Args:
        label: Integers, (Z, Y, X), or (Y, X) for a single slice; 0 is background. It is not changed.
        style: One of `STYLES`, as the functions below describe them.
        ignore_label: The value of voxels that are not annotated.
        rng: See :func:`case_rng`. "erosion", "box" and "none" draw from it only if `fraction` is below 1.
        fraction: Share of the slices, in (0, 1], that are annotated: at least one, spread evenly from a random first
            one. None: 0.2 for "slices" and 1 for all other styles. What is drawn in a slice does not depend on it.
        dimension: "2d" annotates slice by slice. "3d" annotates the volume as a whole: erosion by 3x3x3, one ball for
            each class, one 3-D bounding box. "3d" has no fraction, no "slices" and no "scribbles".
        slice_axis: Axis across the slices. None: the axis of the largest `spacing`, the first of those that are equal
            to 0.1 %, or 0 without a spacing.
        spacing: Of the array's axes, in mm.
        background: Whether background is annotated. The annotation of the foreground does not depend on it.
        radius: Of the discs and balls of "points", in voxels; 0 is a single voxel.

    Returns:
        An array of the label's shape and type.

    Raises:
        InputError: The label is not 2-D or 3-D, not integer or not complete, or options are out of range or exclude
            each other. The text has all of it.

    Examples:
        >>> label = np.zeros((7, 7), dtype=np.uint8)
        >>> label[1:6, 1:6] = 1
        >>> weak = weaken(label, "points", 2, case_rng("case_1", "points", 0), radius=0)
        >>> [int((weak == value).sum()) for value in (0, 1, 2)]  # one of background, one of the class
        [1, 1, 47]
    """
    _check(label, style, ignore_label, fraction, dimension, slice_axis, spacing, background, radius)
    styles: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "erosion": lambda part: erosion(part, ignore_label),
        "points": lambda part: points(part, ignore_label, rng, radius=radius),
        "scribbles": lambda part: scribbles(part, ignore_label, rng),
        "slices": np.copy,
        "box": lambda part: box(part, ignore_label),
        "none": lambda part: nothing(part, ignore_label)}
    annotate = styles[style]
    if dimension == "3d":
        weak = annotate(label)
    else:
        axis = _slice_axis(slice_axis, spacing)
        slices = label[None] if label.ndim == 2 else np.moveaxis(label, axis, 0)
        weak = np.stack([annotate(part) for part in slices])
        if fraction is None:
            fraction = SLICES_FRACTION if style == "slices" else 1
        # after all slices were annotated, so that what is drawn in one does not depend on how many stay
        weak[~spread_slices(len(weak), fraction, rng)] = ignore_label
        weak = weak[0] if label.ndim == 2 else np.ascontiguousarray(np.moveaxis(weak, 0, axis))
    if not background:
        weak[weak == BACKGROUND] = ignore_label
    return weak


# ---- the styles, in one slice ---------------------------------------------------------------------------------------

def erosion(label: np.ndarray, ignore_label: int, *, times: int = 10) -> np.ndarray:
    """Erode each class up to `times` times, but never so often that no voxel of it would be left.

    What lies outside of the array counts as inside the class. So no class is eroded from the border of the image, and a
    slice of a single class stays as it is.

    Args:
        label: Integers of any number of dimensions. The structuring element is 3 voxels wide in each (3x3, 3x3x3).
        ignore_label: The value of voxels that are not annotated.
        times: At most how many erosions.

    Examples:
        >>> label = np.zeros((7, 7), dtype=np.uint8)
        >>> label[1:6, 1:6] = 1
        >>> weak = erosion(label, 2, times=1)
        >>> int((weak == 1).sum())  # 3 x 3 of the 5 x 5 voxels are left
        9
    """
    weak = nothing(label, ignore_label)
    for value in np.unique(label):
        depth = _depth(label == value)
        weak[depth > min(times, depth.max() - 1)] = value
    return weak


def points(label: np.ndarray, ignore_label: int, rng: np.random.Generator, *, radius: int = 1) -> np.ndarray:
    """Annotate one disc (3-D: ball) round a random voxel of each class, background included, clipped to the class.

    Args:
        label: Integers of any number of dimensions.
        ignore_label: The value of voxels that are not annotated.
        rng: See :func:`case_rng`.
        radius: In voxels, whatever their size; 0 is a single voxel.

    Examples:
        >>> label = np.zeros((7, 7), dtype=np.uint8)
        >>> label[1:6, 1:6] = 1
        >>> weak = points(label, 2, case_rng("case_1", "points", 0), radius=0)
        >>> int((weak == 1).sum()), int((weak == 0).sum())
        (1, 1)
    """
    weak = nothing(label, ignore_label)
    for value in np.unique(label):
        of_class = label == value
        centre = np.unravel_index(rng.choice(np.flatnonzero(of_class)), label.shape)
        window = tuple(slice(max(0, c - int(radius)), min(c + int(radius) + 1, n)) for c, n in zip(centre, label.shape))
        disc = sum((axis - c) ** 2 for axis, c in zip(np.ogrid[window], centre)) <= radius ** 2
        weak[window][disc & of_class[window]] = value
    return weak


def scribbles(label: np.ndarray, ignore_label: int, rng: np.random.Generator) -> np.ndarray:
    """Annotate each class, background included, by two strokes, 3 pixels thick, in one connected component.

    The component (pixels that touch at a corner belong together) is drawn with odds proportional to its area. Both
    strokes are clipped to it.

    - The interior stroke is the clamped quadratic B-spline of four random pixels of the component as control points. It
      begins at the first and ends at the last, so every class in the slice is annotated.
    - The border stroke follows the outline of the component, eroded by 2 to 5 pixels (3x3 element, fewer times if
      nothing would be left), over 7 to 15 % of the outline's length. It is shorter only if the outline is in pieces and
      its piece is shorter. The odds of its middle grow with the outline's curvature. The border of the image is no
      outline, so a component that fills the slice has no such stroke.

    Source: ScribbleBench, K. Gotkowski, K. Maier-Hein, F. Isensee, MICCAI 2025, arXiv 2403.12834, which draws interior
    strokes by NURBS curves with four control points and border strokes along eroded contours.

    Args:
        label: Integers, (Y, X).
        ignore_label: The value of voxels that are not annotated.
        rng: See :func:`case_rng`.

    Examples:
        >>> label = np.zeros((7, 7), dtype=np.uint8)
        >>> label[1:6, 1:6] = 1
        >>> weak = scribbles(label, 2, case_rng("case_1", "scribbles", 0))
        >>> bool((weak[weak != 2] == label[weak != 2]).all())  # every annotated voxel has its true class
        True
    """
    weak = nothing(label, ignore_label)
    for value in np.unique(label):
        components, _ = scipy.ndimage.label(label == value, SQUARE)
        # the component of a random pixel: odds proportional to the area
        component = components == rng.choice(components[components > 0])
        stroke = _thick(_interior_line(component, rng), label.shape) | _thick(_border_line(component, rng), label.shape)
        weak[stroke & component] = value
    return weak


def box(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """Annotate background outside of the bounding box of all foreground, and nothing inside.

    Without foreground, all voxels are annotated as background.

    Args:
        label: Integers of any number of dimensions.
        ignore_label: The value of voxels that are not annotated.

    Examples:
        >>> label = np.zeros((7, 7), dtype=np.uint8)
        >>> label[1:6, 1:6] = 1
        >>> weak = box(label, 2)
        >>> int((weak == 0).sum()), int((weak == 2).sum())
        (24, 25)
    """
    weak = np.full_like(label, BACKGROUND)
    for inside in scipy.ndimage.find_objects((label != BACKGROUND).astype(np.uint8)):
        weak[inside] = ignore_label
    return weak


def nothing(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """Annotate no voxel: return the label of an unlabelled image, of the label's shape and type.

    Examples:
        >>> nothing(np.zeros((1, 3), dtype=np.uint8), 2)
        array([[2, 2, 2]], dtype=uint8)
    """
    return np.full_like(label, ignore_label)


# ---- their parts ----------------------------------------------------------------------------------------------------

def _check(label, style, ignore_label, fraction, dimension, slice_axis, spacing, background, radius) -> None:
    problems = []
    if label.ndim not in (2, 3):
        problems.append(f"a label must be (Z, Y, X) or (Y, X), got shape {label.shape}")
    if not np.issubdtype(label.dtype, np.integer):
        problems.append(f"a label must hold integers, got {label.dtype}")
    elif np.asarray(ignore_label).astype(label.dtype) != ignore_label:
        problems.append(f"the ignore label {ignore_label} does not fit the label's type {label.dtype}")
    elif (label == ignore_label).any():
        problems.append(f"the label already holds the ignore label {ignore_label}: weak labels are made from full ones")
    if style not in STYLES:
        problems.append(f"there is no style {style!r}: choose one of {', '.join(STYLES)}")
    if dimension not in DIMENSIONS:
        problems.append(f"dimension must be one of {', '.join(DIMENSIONS)}, got {dimension!r}")
    if fraction is not None and not 0 < fraction <= 1:
        problems.append(f"fraction must be above 0 and at most 1, got {fraction}")
    if slice_axis not in (None, 0, 1, 2):
        problems.append(f"slice_axis must be 0, 1 or 2, got {slice_axis}")
    if spacing is not None and (len(spacing) != label.ndim or not all(s > 0 for s in spacing)):
        problems.append(f"spacing must be {label.ndim} numbers above 0, one for each axis, got {tuple(spacing)}")
    if radius < 0:
        problems.append(f"radius must be at least 0, got {radius}")
    if dimension == "3d":
        if style in ("scribbles", "slices"):
            problems.append(f"{style} are made slice by slice: use dimension 2d")
        if fraction is not None:
            problems.append("a fraction is a share of the slices: use it with dimension 2d")
        if label.ndim == 2:
            problems.append("a 2-D label has no volume: use dimension 2d")
    if style == "box" and not background:
        problems.append("box annotates background alone: without it nothing is left, which is the style none")
    if problems:
        raise InputError("\n  ".join(["no weak label can be made:", *problems]))


def _slice_axis(slice_axis: int | None, spacing: Sequence[float] | None) -> int:
    if slice_axis is not None:
        return slice_axis
    # files round their spacing: what differs by less is isotropic; argmax takes the first, as nnU-Net's 2-D plans do
    return 0 if spacing is None else int(np.argmax(np.asarray(spacing) > 0.999 * max(spacing)))


def spread_slices(count: int, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose a share of slices, at least one, at equal distances on a ring that is turned at random.

    Each slice has the same odds, and the slices of half the share are among those of the whole share.

    Args:
        count: The number of slices.
        fraction: The share that is chosen, above 0 and at most 1.
        rng: Turns the ring.

    Returns:
        True for each chosen slice, `(count,)`.
    """
    chosen = np.zeros(count, dtype=bool)
    number = max(1, round(fraction * count))
    offset = rng.integers(count) if fraction < 1 else 0
    chosen[(offset + np.arange(number) * count // number) % count] = True
    return chosen


def _depth(mask: np.ndarray) -> np.ndarray:
    """Return which erosion, with an element 3 voxels wide, removes each voxel: 1 at the mask's border, 0 outside of it.

    k erosions keep the voxels that are deeper than k. The depth is the chessboard distance to the nearest voxel
    outside, where what lies beyond the array does not count. A mask that fills the array is never eroded; its depth is
    infinite.
    """
    if mask.all():
        return np.full(mask.shape, np.iinfo(np.int32).max)
    return scipy.ndimage.distance_transform_cdt(mask, "chessboard")


def _interior_line(component: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (N, 2) points of a clamped quadratic B-spline whose control points are four random pixels."""
    control = rng.choice(np.argwhere(component), 4)
    spline = scipy.interpolate.BSpline([0, 0, 0, 0.5, 1, 1, 1], control.astype(float), 2)
    # the derivative is at most 4 times the longest leg: steps of at most half a pixel leave no gap
    return spline(np.linspace(0, 1, 8 * np.ptp(control, axis=0).max() + 2))


def _border_line(component: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (N, 2) points of a part of the component's eroded outline; none if the component fills the slice."""
    depth = _depth(component)
    eroded = depth > min(rng.integers(2, 6), depth.max() - 1)
    outlines = _outlines(eroded)
    if not outlines:
        return np.empty((0, 2))
    odds = np.concatenate([STRAIGHT + _turning(*outline) for outline in outlines])
    middle = rng.choice(len(odds), p=odds / odds.sum())
    ends = np.cumsum([len(line) for line, _ in outlines])
    which = np.searchsorted(ends, middle, side="right")
    line, mode = outlines[which]
    # a share of all outlines: after many erosions there may be fragments, a share of which would be a dot
    length = min(len(line), max(1, round(rng.uniform(0.07, 0.15) * len(odds))))
    first = middle - (ends[which] - len(line)) - length // 2
    if mode == "clip":  # at the ends of the outline the stroke moves inwards, to keep its length
        first = np.clip(first, 0, len(line) - length)
    return line.take(np.arange(first, first + length), axis=0, mode=mode)


def _outlines(mask: np.ndarray) -> list[tuple[np.ndarray, Mode]]:
    """Return the outlines of a mask, each as (N, 2) points in order, about one for each pixel, and a mode of np.take.

    The mode is "wrap" for closed outlines, and "clip" for those that end at the border of the array.
    """
    outlines: list[tuple[np.ndarray, Mode]] = []
    # padded: the smallest array that find_contours takes is 2x2; a level above 1/2 lies nearer to the pixel inside
    for line in skimage.measure.find_contours(np.pad(mask, 1, mode="edge").astype(float), 0.75, fully_connected="high"):
        closed = (line[0] == line[-1]).all()
        line = (line - 1).clip(0, np.array(mask.shape) - 1)
        outlines.append((line[:-1], "wrap") if closed else (line, "clip"))
    return outlines


def _turning(line: np.ndarray, mode: Mode) -> np.ndarray:
    """Return the angle (rad) by which an outline turns at each of its points; 0 at an open end.

    It is the angle between the chords from the point five before and to the point five after, or fewer on short
    outlines.
    """
    step = min(5, (len(line) + 3) // 4)
    here = np.arange(len(line))
    before = line - line.take(here - step, axis=0, mode=mode)
    after = line.take(here + step, axis=0, mode=mode) - line
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return np.abs(np.arctan2(cross, (before * after).sum(axis=1)))


def _thick(line: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the pixels of a slice that are at most one pixel, diagonally too, from the (N, 2) points of a line."""
    drawn = np.zeros(shape, dtype=bool)
    drawn[tuple(np.rint(line).astype(int).T)] = True
    return scipy.ndimage.binary_dilation(drawn, SQUARE)
