"""What label files hold: values or segments, how many voxels each, and on which grid."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_confkd.data.images import Geometry, Picture, count_voxels, read
from nnunet_confkd.data.segments import has_segments, read_segments
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import parallel

MOST_VALUES = 256  # a file that holds more is an image
MOST_STRANGE = 20  # values without a meaning that a label may hold; with more of them it looks like an image


@dataclass
class Content:
    """What one label holds.

    Attributes:
        voxels: {value, or name of a segment: voxels}. Voxels in no segment are counted under the value 0.
        named: Whether these are names of segments.
        geometry: The grid; None if the file cannot be read.
        problem: Why it cannot be read; None if it can.
    """
    voxels: dict
    named: bool = False
    geometry: Geometry | None = None
    problem: str | None = None


def survey(labels: Iterable[Path], processes: int) -> dict[Path, Content]:
    """Look into label files, in several processes.

    Args:
        labels: Files, or folders with one file for each class.
        processes: How many processes read them.
    """
    labels = list(labels)
    return dict(zip(labels, parallel(content, [(label,) for label in labels], processes, "reading labels")))


def content(label: Path) -> Content:
    """Look into one label."""
    try:
        if has_segments(label):
            segments = read_segments(label)
            counts = segments.volumes
            rest = int(np.prod(segments.geometry.size)) - sum(counts.values())
            return Content({**counts, 0: max(0, rest)}, True, segments.geometry)
        picture = read(label)
    except InputError as error:
        return Content({}, problem=str(error))
    return Content(value_counts(picture), False, picture.geometry)


def value_counts(picture: Picture) -> dict:
    """Return {value: voxels}; {} if there are so many values that this can be no label."""
    voxels = picture.voxels
    if voxels.dtype.kind in "iu" and voxels.size:
        low, high = int(voxels.min()), int(voxels.max())
        if high - low < 2 ** 16:  # sorting, as np.unique does, would take ten times as long
            counts = count_voxels(voxels, range(low, high + 1))
            found = {value: count for value, count in counts.items() if count}
            return found if len(found) <= MOST_VALUES else {}
    values, numbers = np.unique(voxels, return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist())) if len(values) <= MOST_VALUES else {}


def together(contents: Iterable[Content]) -> Counter:
    """Return {value or name: voxels} of several labels."""
    total: Counter = Counter()
    for one in contents:
        total.update(one.voxels)
    return total


def shares_text(voxels: Mapping, most: int = 20) -> str:
    """Return for example "0: 99.4 %, 1: 0.07 %, 2: 0.5 %"; the names of segments after the values."""
    total = sum(voxels.values())
    ordered = sorted(voxels.items(), key=lambda item: (isinstance(item[0], str), item[0]))
    texts = [f"{_text(value)}: {_percent(count / total)}" for value, count in ordered[:most]]
    return ", ".join(texts) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def _text(value) -> str:
    return repr(value) if isinstance(value, str) else f"{value:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.1 else f"{100 * share:.2g} %"
