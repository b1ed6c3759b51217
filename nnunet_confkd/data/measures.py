"""What the files of a folder are: images, complete masks, scribbles, or empty labels."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from nnunet_confkd.data import dicom
from nnunet_confkd.data.images import Geometry, Picture, read
from nnunet_confkd.data.scribbles import FOREGROUND, THIN, shape_of
from nnunet_confkd.data.segments import has_segments, read_segments
from nnunet_confkd.data.survey import value_counts
from nnunet_confkd.errors import InputError

IMAGE, MASK, SCRIBBLES, EMPTY, UNREADABLE = "image", "mask-like", "scribble-like", "empty", "unreadable"
FRACTIONS = "unusable"  # a label with values that are no integers
FEW_VALUES = 8  # a file of so few values is a label in any case
EVEN = 0.95  # of the neighbouring voxels of a label are equal; in images there is noise
CORE = 0.1  # of the core of the largest masks, and
SLIM = 0.6  # of their share of core voxels: below both, a label has scribbles


@dataclass
class Measure:
    """What was found in one file, or in one folder that is an image or a label.

    Attributes:
        kind: One of the constants of this module. Labels are masks until they are compared with each other.
        geometry: The grid; None if it cannot be read.
        channels: How many.
        range: The lowest and the highest value.
        voxels: {value, or name of a segment: voxels} of a label.
        core: {the same, but for the most frequent value: how many of its voxels are surrounded by their own in the
            slice}.
        every_nth: Whether only every n-th slice holds anything.
        named: Whether the label has segments.
        problem: Why it cannot be read, or used.
        fraction: A value that is no integer; None: all are.
        few: Whether there are so few values that it may be a label.
    """
    kind: str
    geometry: Geometry | None = None
    channels: int = 1
    range: tuple[float, float] = (0, 0)
    voxels: dict = field(default_factory=dict)
    core: dict = field(default_factory=dict)
    every_nth: bool = False
    named: bool = False
    problem: str = ""
    fraction: float | None = None
    few: bool = False

    @property
    def rest(self):
        """The most frequent value: background, or what is not annotated. None for segments."""
        return None if self.named else max(self.voxels, key=self.voxels.__getitem__)

    @property
    def drawn(self) -> dict:
        """{value or name: voxels} without the most frequent value."""
        return {value: count for value, count in self.voxels.items()
                if (isinstance(value, str) if self.named else value != self.rest)}


def measured(path: Path) -> Measure:
    """Read a file, or a folder that is an image or a label, and measure it."""
    try:
        if path.is_dir() and dicom.is_dicom_folder(path) and not dicom.is_segmentation(path):
            return _of_picture(dicom.read_series(path))
        if has_segments(path):
            return _of_segments(path)
        return _of_picture(read(path))
    except InputError as error:
        return Measure(UNREADABLE, problem=str(error))


def _of_picture(picture: Picture) -> Measure:
    voxels = picture.voxels
    counts = value_counts(picture)
    low, high = (float(voxels.min()), float(voxels.max())) if voxels.size else (0.0, 0.0)
    measure = Measure(IMAGE, picture.geometry, len(voxels), (low, high), fraction=_fraction(voxels), few=bool(counts))
    if not counts or measure.fraction is not None or len(voxels) > 1 or (
            len(counts) > FEW_VALUES and _evenness(voxels[0]) < EVEN):
        return measure
    measure.kind, measure.voxels = MASK, {int(value): count for value, count in counts.items()}
    names = list(measure.drawn)
    numbered = np.zeros(voxels[0].shape, np.int32)
    for number, value in enumerate(names, 1):
        numbered[voxels[0] == value] = number
    return _with_shape(measure, numbered, names)


def _fraction(voxels: np.ndarray) -> float | None:
    """Return a value that is no integer; None if all are."""
    if voxels.dtype.kind in "iub":
        return None
    broken = voxels[~np.isfinite(voxels) | (voxels != np.round(voxels))]
    return float(broken[0]) if broken.size else None


def _of_segments(path: Path) -> Measure:
    segments = read_segments(path)
    numbered = np.zeros(segments.geometry.size[::-1], np.int32)
    for number, mask in enumerate(segments.masks.values(), 1):
        numbered[mask] = number
    rest = int(np.count_nonzero(numbered == 0))
    measure = Measure(MASK, segments.geometry, voxels={**segments.volumes, 0: rest}, named=True)
    return _with_shape(measure, numbered, list(segments.masks))


def _with_shape(measure: Measure, numbered: np.ndarray, names: list) -> Measure:
    shape = shape_of(numbered, measure.geometry.spacing[::-1])
    measure.core = {names[number - 1]: volume * min(shares[number] for shares in shape.inner.values())
                    for number, volume in shape.volumes.items()}
    measure.every_nth = shape.every_nth is not None
    if not measure.drawn:
        measure.kind = EMPTY
    return measure


def _evenness(voxels: np.ndarray) -> float:
    """The share of voxels that are equal to their neighbour in the row."""
    return float(np.mean(voxels[..., 1:] == voxels[..., :-1])) if voxels.shape[-1] > 1 else 1.0


def tell_unusable_labels(measures: Mapping[Path, Measure]) -> None:
    """Set the kind of labels with values that are no integers, which look like images.

    Such a file lies among labels: they are more than the images, or as many if it holds few values.

    Args:
        measures: {path: what was measured} of the files of one place and naming.
    """
    kinds = Counter(measure.kind for measure in measures.values())
    for path, measure in measures.items():
        labels = kinds[MASK] + kinds[EMPTY] + measure.few
        if measure.kind == IMAGE and measure.fraction is not None and labels > kinds[IMAGE] and measure.channels == 1:
            measure.kind = FRACTIONS
            measure.problem = (f"{path}: is a label with values that are no integers, such as {measure.fraction:g}; "
                               f"save it with integers")


def tell_scribbles_from_masks(measures: Mapping[Path, Measure]) -> None:
    """Set the kind of labels that have scribbles.

    A label has scribbles if only every n-th slice holds anything, or if it holds a value that marks what is not
    annotated: the most frequent one of several labels that hold 0 as well. It also has scribbles if hardly any of its
    voxels are surrounded by their own class, compared with the labels that have most of such voxels. Only the classes
    count that it has in common with these.

    Args:
        measures: {path: what was measured} of all files that belong together. Those of images are left as they are.
    """
    markers = markers_of(measure for measure in measures.values() if measure.kind == MASK)
    labels = [measure for measure in measures.values() if measure.kind == MASK
              and (measure.rest in {0, None, *markers} or 0 not in measure.voxels)]  # others are full of one class
    if not labels:
        return
    ranked = sorted(labels, key=lambda measure: sum(measure.core.values()), reverse=True)
    largest = ranked[:max(1, len(ranked) // 8)]
    solid = _Solid(largest)
    for measure in labels:
        drawn = _classes(measure)
        classes, core, share = solid.compared_with(drawn)
        classes = classes & drawn or drawn  # the same class may have another value here
        marked = not measure.named and bool(markers & set(measure.voxels))
        slim = _core(measure, classes) < CORE * core and _core_share(measure, classes) < SLIM * share
        little = sum(measure.drawn.values()) < FOREGROUND * sum(measure.voxels.values())
        thin = share < THIN and _core_share(measure, classes) < THIN and little
        if marked or measure.every_nth or slim or thin:
            measure.kind = SCRIBBLES


class _Solid:
    """The labels that have most voxels that are surrounded by their own class."""

    def __init__(self, measures: list[Measure]):
        self.measures = measures
        self.classes = frozenset().union(*map(_classes, measures))
        self.compared_with = cache(self._compared_with)

    def _compared_with(self, drawn: frozenset) -> tuple[frozenset, float, float]:
        """Return the classes to compare a label by, and the usual core and share of core voxels of these classes."""
        classes = drawn & self.classes or self.classes
        holding = [measure for measure in self.measures if classes & _classes(measure)] or self.measures
        core, share = (median(number(measure, classes) for measure in holding) for number in (_core, _core_share))
        return classes, core, share


def markers_of(labels: Iterable[Measure]) -> set[int]:
    """Return the values other than 0 that mark what is not annotated: more labels have most of it than a little."""
    most, little = Counter(), Counter()
    for measure in labels:
        if not measure.named and 0 in measure.voxels:
            most.update([measure.rest])
            little.update(measure.drawn.keys())
    return {value for value, number in most.items() if value != 0 and number > little[value]}


def _class(value):
    """A value, or the name of a segment without regard to capitals."""
    return value.casefold() if isinstance(value, str) else value


def _classes(measure: Measure) -> frozenset:
    return frozenset(map(_class, measure.drawn))


def _core(measure: Measure, classes: Set) -> float:
    return sum(core for value, core in measure.core.items() if _class(value) in classes)


def _core_share(measure: Measure, classes: Set) -> float:
    drawn = sum(count for value, count in measure.drawn.items() if _class(value) in classes)
    return _core(measure, classes) / drawn if drawn else 0.0
