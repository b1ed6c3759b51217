"""Weak labels made from full ones, for experiments: what would it have cost to annotate less?

Pure functions on arrays. Everything random comes from a generator that is seeded per case, so the same case, style
and seed give the same label whatever the order or the number of processes. In every style an annotated voxel has
its true class.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.interpolate import BSpline
from skimage.measure import find_contours

from nnunet_confkd.errors import InputError

Mode = Literal["wrap", "clip"]  # of np.take
STYLES = ("erosion", "points", "scribbles", "slices", "box", "none")
DIMENSIONS = ("2d", "3d")
BACKGROUND = 0
SLICES_FRACTION = 0.2  # of `slices`, where no fraction is given; all slices in the other styles
SQUARE = np.ones((3, 3), dtype=bool)
# the odds of a straight piece of outline, as if it turned by so much (rad): a right angle has 17 times the odds
STRAIGHT = 0.1


def case_rng(case: str, style: str, seed: int) -> np.random.Generator:
    """The random generator of one case; it depends on nothing but the three arguments."""
    # not hash(): Python salts it anew in every process
    digest = hashlib.sha256(repr((str(case), str(style), int(seed))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def weaken(label: np.ndarray, style: str, ignore_label: int, rng: np.random.Generator, *, fraction: float | None = None,
           dimension: str = "2d", slice_axis: int | None = None, spacing: Sequence[float] | None = None,
           background: bool = True, radius: int = 1) -> np.ndarray:
    """A weak label made from a full one, in one of the `STYLES`: see the functions below.

    label: integers, (Z, Y, X), or (Y, X), which is one slice; 0 is background.
    rng: see `case_rng`; "erosion", "box" and "none" draw from it only where `fraction` is below 1.
    fraction: share of the slices, in (0, 1], that get any annotation, spread evenly from a random first one, at least
        one slice; None is 0.2 for "slices" and 1 for all else. What is drawn in a slice does not depend on it.
    dimension: "2d" annotates slice by slice. "3d" annotates the volume as a whole: erosion by 3x3x3, one ball for
        each class, one 3-D bounding box. It has no slices, hence no fraction, no "slices" and no "scribbles".
    slice_axis: axis across the slices; None is the axis of the largest `spacing` (mm, in the order of the array's
        axes), the first of those that are equal to 0.1 %, or 0 where no spacing is given.
    background: False annotates no background and leaves the foreground's annotation as it would be otherwise.
    radius: of the discs and balls of "points", in voxels; 0 is a single voxel.

    Returns the label's shape and dtype, `ignore_label` wherever nothing is annotated; the label is left alone.
    Raises InputError, naming all that is wrong, for a label that is not 2-D or 3-D, not integer or not full, for
    settings out of range and for those that exclude each other.
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
        # after all slices were annotated: what is drawn in one then does not depend on how many stay
        weak[~_spread(len(weak), fraction, rng)] = ignore_label
        weak = weak[0] if label.ndim == 2 else np.ascontiguousarray(np.moveaxis(weak, 0, axis))
    if not background:
        weak[weak == BACKGROUND] = ignore_label
    return weak


# ---- the styles, in one slice ---------------------------------------------------------------------------------------

def erosion(label: np.ndarray, ignore_label: int, *, times: int = 10) -> np.ndarray:
    """Each class present, eroded up to `times` times: the strongest erosion that leaves a voxel of it.

    label: integers of any number of dimensions; the element is 3 voxels wide in each (3x3, 3x3x3). What lies outside
    of the array counts as inside the class: the image's border is no border of the class, so background is not
    eroded from it, and a slice of one class stays as it is.
    """
    weak = nothing(label, ignore_label)
    for value in np.unique(label):
        depth = _depth(label == value)
        weak[depth > min(times, depth.max() - 1)] = value
    return weak


def points(label: np.ndarray, ignore_label: int, rng: np.random.Generator, *, radius: int = 1) -> np.ndarray:
    """Per class present, background included: one disc (3-D: ball) round a random voxel of it, clipped to the class.

    label: integers of any number of dimensions. radius: in voxels, whatever their size; 0 is a single voxel.
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
    """Per class present, background included: two strokes, 3 pixels thick, in one connected component of the class.

    The component (pixels that touch at a corner belong together) is drawn with odds proportional to its area; both
    strokes are clipped to it.
    - The interior stroke is the clamped quadratic B-spline of four random pixels of the component as control points:
      it begins at the first and ends at the last, so a class that is there is always annotated.
    - The border stroke follows the outline of the component, eroded by 2 to 5 pixels (3x3 element, fewer times if
      nothing would be left), over 7 to 15 % of the outline's length, less only where the outline is in pieces and the
      one piece is shorter. Its middle is drawn with odds growing with the outline's curvature. The image's border is
      no outline: a component that fills the slice has no such stroke.

    label: integers, (Y, X).
    Source: ScribbleBench, K. Gotkowski, K. Maier-Hein, F. Isensee, MICCAI 2025, arXiv 2403.12834, which draws interior
    strokes by NURBS curves with four control points and border strokes along eroded contours.
    """
    weak = nothing(label, ignore_label)
    for value in np.unique(label):
        components, _ = ndimage.label(label == value, SQUARE)
        # the component of a random pixel: odds proportional to the area
        component = components == rng.choice(components[components > 0])
        stroke = _thick(_interior_line(component, rng), label.shape) | _thick(_border_line(component, rng), label.shape)
        weak[stroke & component] = value
    return weak


def box(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """Background outside of the bounding box of all foreground, nothing inside; all background where is no foreground.

    label: integers of any number of dimensions.
    """
    weak = np.full_like(label, BACKGROUND)
    for inside in ndimage.find_objects((label != BACKGROUND).astype(np.uint8)):
        weak[inside] = ignore_label
    return weak


def nothing(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """No voxel is annotated: the label of an unlabelled image, in the label's shape and dtype."""
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


def _spread(count: int, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which of `count` slices are annotated: a share of them, at least one, at equal distances on a ring, turned by
    chance. Each slice has the same odds, and half as many slices lie within the others."""
    chosen = np.zeros(count, dtype=bool)
    number = max(1, round(fraction * count))
    offset = rng.integers(count) if fraction < 1 else 0
    chosen[(offset + np.arange(number) * count // number) % count] = True
    return chosen


def _depth(mask: np.ndarray) -> np.ndarray:
    """How many erosions of 3 voxels width each voxel of a mask does not survive: 1 at its border, 0 outside of it.

    k erosions keep what is deeper than k: the chessboard distance to the nearest voxel outside, which does not count
    what lies beyond the array. A mask without outside is never eroded: the depth is the largest there is.
    """
    if mask.all():
        return np.full(mask.shape, np.iinfo(np.int32).max)
    return ndimage.distance_transform_cdt(mask, "chessboard")


def _interior_line(component: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) points of a clamped quadratic B-spline with four random pixels of the component as control points."""
    control = rng.choice(np.argwhere(component), 4)
    spline = BSpline([0, 0, 0, 0.5, 1, 1, 1], control.astype(float), 2)
    # the derivative is at most 4 times the longest leg: steps of at most half a pixel leave no gap
    return spline(np.linspace(0, 1, 8 * np.ptp(control, axis=0).max() + 2))


def _border_line(component: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) points of a run of the component's eroded outline; none where the component fills the slice."""
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
    # of all outlines: after many erosions there may be fragments, of which shares would be mere dots
    length = min(len(line), max(1, round(rng.uniform(0.07, 0.15) * len(odds))))
    first = middle - (ends[which] - len(line)) - length // 2
    if mode == "clip":  # at its ends the run moves inwards, not to lose any of its length
        first = np.clip(first, 0, len(line) - length)
    return line.take(np.arange(first, first + length), axis=0, mode=mode)


def _outlines(mask: np.ndarray) -> list[tuple[np.ndarray, Mode]]:
    """Outlines of a mask, each (N, 2) points in order, N of the size of its length in pixels, and how np.take goes
    beyond its ends: "wrap" where it is closed, "clip" where it ends at the border of the array."""
    outlines: list[tuple[np.ndarray, Mode]] = []
    # padded: the smallest array that find_contours takes is 2x2; a level above 1/2 lies nearer to the pixel inside
    for line in find_contours(np.pad(mask, 1, mode="edge").astype(float), 0.75, fully_connected="high"):
        closed = (line[0] == line[-1]).all()
        line = (line - 1).clip(0, np.array(mask.shape) - 1)
        outlines.append((line[:-1], "wrap") if closed else (line, "clip"))
    return outlines


def _turning(line: np.ndarray, mode: Mode) -> np.ndarray:
    """By what angle (rad) an outline turns at each of its points: between the chords to the points five before and
    after, fewer on short ones. 0 at an open end."""
    step = min(5, (len(line) + 3) // 4)
    here = np.arange(len(line))
    before = line - line.take(here - step, axis=0, mode=mode)
    after = line.take(here + step, axis=0, mode=mode) - line
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return np.abs(np.arctan2(cross, (before * after).sum(axis=1)))


def _thick(line: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels of a slice within one pixel, diagonals included, of the (N, 2) points of a line."""
    drawn = np.zeros(shape, dtype=bool)
    drawn[tuple(np.rint(line).astype(int).T)] = True
    return ndimage.binary_dilation(drawn, SQUARE)
