"""Hints: the annotated voxels of an image, which the teacher sees as a second input.

The papers apply the KL to the fully annotated images, of which the student knows the labels anyway. On every other
image a teacher that sees the image alone knows no more than the student. These images have annotations, however. With
the annotations as a second input the teacher only has to complete them. It learns this on the fully annotated images,
from annotations that are simulated there. The student sees the image alone and follows the teacher (learning with
privileged information: Vapnik, Vashist, Neural Networks 2009; as distillation: Lopez-Paz, Bottou, Schölkopf, Vapnik,
ICLR 2016, arXiv 1511.03643).

Hints help only if simulated annotations look like real ones. `benchmarks/hint_realism.py` compares the two.
"""
from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from torch import Tensor

from nnunet_confkd.training.losses import annotated_voxels, hide_unlisted
from nnunet_confkd.training.network import HintMap

NO_HINTS = 0.2  # share of the fully annotated images without hints: the teacher must also predict without any
KEPT = 16  # number of patterns kept for each class, and of slice profiles
PLACES = 48  # number of random places that are tried for a pattern
SAMPLE = 128  # number of voxels of a pattern that are compared with a place
FITS = 0.95  # share of a pattern that must lie inside its class
MANY = 20_000  # voxels; a larger pattern is not split into its connected components
PARTS = 64  # a pattern of more connected components is split into so many groups of neighbouring ones
LARGE = 200_000  # voxels; in a larger class the innermost voxels are not searched if a pattern fits


# ---- the teacher's input --------------------------------------------------------------------------------------------

def hint_channels(target: Tensor, hint_mask: Tensor, num_heads: int, regions: bool = False,
                  listed: Tensor | None = None) -> Tensor:
    """Make the teacher's second input: a channel for each class (or region), and one for "this voxel is a hint".

    A hint is the set of the classes that the voxel can have. With all classes listed it is one class. Where they are
    not, an annotated voxel of value 0 is background or any class that is not listed: the channels of all of these are
    1. With regions, the channel of a region that is not listed is 0.5, between 0 (outside) and 1 (inside).

    Args:
        target: A label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`.
        hint_mask: Bool, `(B, 1, *spatial)`: which voxels are hints.
        num_heads: Number of classes with the background, or number of regions.
        regions: Whether `target` holds regions.
        listed: Bool, `(B, num_heads)`: for which heads the hints of each image are. The labels of others do not
            matter. None: all.

    Returns:
        `(B, num_heads + 1, *spatial)`, float32, zero outside of the hints.

    Examples:
        >>> target, mask = torch.tensor([[[0, 1]]]), torch.tensor([[[False, True]]])
        >>> hint_channels(target, mask, num_heads=2)[0].tolist()  # background, the class, and "this voxel is a hint"
        [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    if regions:
        labels = target[:, :num_heads] != 0
    else:
        labels = target == torch.arange(num_heads, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
    if listed is None or listed.all():
        return torch.cat((labels & hint_mask, hint_mask), 1).float()
    unlisted = (~listed).to(target.device, non_blocking=True).view(*listed.shape, *[1] * (target.ndim - 2))
    if regions:
        return torch.cat((torch.where(unlisted, 0.5, labels.float()) * hint_mask, hint_mask.float()), 1)
    background = unlisted.clone()
    background[:, 0] = True
    merged = (labels & background).any(1, keepdim=True)
    return torch.cat((torch.where(background, merged, labels) & hint_mask, hint_mask), 1).float()


def hint_map(target: Tensor, hint_mask: Tensor, listed: Tensor | None = None) -> HintMap:
    """Make the teacher's second input of labels: what :func:`hint_channels` makes, in less memory.

    Args:
        target: A label map `(B, 1, *spatial)`.
        hint_mask: Bool, `(B, 1, *spatial)`: which voxels are hints.
        listed: Bool, `(B, num_heads)`, on the CPU: for which heads the hints of each image are. None: all.
    """
    labels = torch.where(hint_mask, hide_unlisted(target, listed) + 1, 0)
    return HintMap(labels, None if listed is None else listed.to(target.device, non_blocking=True))


def image_hints(label: Tensor, hint_mask: Tensor, label_manager: LabelManager, listed: Tensor | None = None) -> Tensor:
    """Make the teacher's hints of a whole image, which follow the channels of the image in predictions.

    Args:
        label: Label map, `(1, *spatial)`.
        hint_mask: Bool, `(1, *spatial)`: which voxels are hints.
        label_manager: nnU-Net's, with the classes or regions.
        listed: Bool, `(1, heads)`: for which heads the hints are, which are sets of classes then. None: for all.

    Returns:
        Of labels one channel, those of a :class:`HintMap`, `(1, *spatial)`: label + 1 where there is a hint, 0
        elsewhere. Of regions, which may overlap, and of sets of classes, the channels of :func:`hint_channels`,
        `(heads + 1, *spatial)`.
    """
    if not label_manager.has_regions and listed is None:
        return torch.where(hint_mask, label.int() + 1, 0)
    target = regions_of(label, label_manager)[None]
    return hint_channels(target, hint_mask[None], label_manager.num_segmentation_heads, label_manager.has_regions,
                         listed)[0]


def regions_of(label: Tensor, label_manager: LabelManager) -> Tensor:
    """Convert a label map `(1, *spatial)` to nnU-Net's regions `(R + 1, *spatial)` if the data set has regions."""
    if not label_manager.has_regions:
        return label
    ignore = [] if label_manager.ignore_label is None else [label_manager.ignore_label]
    convert = ConvertSegmentationToRegionsTransform([*label_manager.foreground_regions, *ignore])
    return convert(segmentation=label)["segmentation"]


def class_map(target: Tensor, regions: bool) -> np.ndarray:
    """Give each voxel one number: its label, or a number for its combination of overlapping regions (0: none).

    Args:
        target: A label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`.
        regions: Whether `target` holds regions.

    Returns:
        `(B, *spatial)`.

    Examples:
        >>> class_map(torch.tensor([[[0, 1]]]), regions=False)
        array([[0, 1]])
    """
    if not regions:
        return target[:, 0].numpy()
    masks = target[:, :-1].numpy() != 0
    number = masks.shape[1]
    # Powers of two would overflow for many regions. Two sums of random weights are practically never equal.
    weights = 2 ** np.arange(number) if number <= 16 else np.random.default_rng(0).integers(2 ** 53, size=number)
    found = np.zeros((len(masks), *masks.shape[2:]), np.int64)
    for region, weight in enumerate(weights):
        found += weight * masks[:, region]
    return found


# ---- what the sampler remembers -------------------------------------------------------------------------------------

class Voxels:
    """Some voxels of an image, as a mask in their bounding box. Lists of the voxels of a large class take much longer.

    Args:
        mask: Bool.
        corner: Where the box begins, `(dimensions,)`.

    Attributes:
        of_mask: Their numbers in the mask, in ascending order.
        size: How many there are.
    """

    def __init__(self, mask: np.ndarray, corner: Sequence[int] | np.ndarray):
        self.mask, self.corner = mask, np.asarray(corner)
        self.of_mask = np.flatnonzero(mask)
        self.size = len(self.of_mask)

    @classmethod
    def of(cls, voxels: np.ndarray) -> Voxels:
        """Put a list of voxels, `(n, dimensions)`, into a box."""
        low = voxels.min(0)
        mask = np.zeros(voxels.max(0) + 1 - low, bool)
        mask[tuple((voxels - low).T)] = True
        return cls(mask, low)

    def voxels(self, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """List some of the voxels by their numbers, `(n, dimensions)`."""
        return np.stack(np.unravel_index(self.of_mask[chosen], self.mask.shape), 1) + self.corner

    def sample(self) -> np.ndarray:
        """List at most `SAMPLE` of the voxels, evenly spread over their order, `(n, dimensions)`."""
        return self.voxels(_spread(self.size))

    def moved(self, shift: np.ndarray) -> Voxels:
        """The same voxels elsewhere."""
        found = copy(self)
        found.corner = self.corner + shift
        return found

    def components(self) -> list[Voxels]:
        """The connected components, diagonal neighbours included; at most `PARTS` groups of neighbouring ones."""
        if self.size > MANY:
            return [self]
        numbered, number = ndimage.label(self.mask, np.ones([3] * self.mask.ndim))
        parts = min(number, PARTS)
        of_voxel = (numbered.ravel()[self.of_mask].astype(int) - 1) * parts // number
        voxels = self.voxels()
        return [Voxels.of(voxels[of_voxel == part]) for part in range(parts)]


class Cloud(NamedTuple):
    """Where voxels lie, roughly."""

    centre: np.ndarray  # their mean place, `(dimensions,)`
    spread: float  # the root of their mean squared distance from it, in voxels; at least 1

    @classmethod
    def of(cls, mask: np.ndarray) -> Cloud | None:
        """Describe the voxels of a mask; None if there are none."""
        if not mask.any():
            return None
        centre, variance = [], 0.0
        for axis in range(mask.ndim):  # a list of the voxels of many organs would take longer
            weights = np.count_nonzero(mask, axis=tuple(i for i in range(mask.ndim) if i != axis))
            places = np.arange(len(weights))
            centre.append(np.average(places, weights=weights))
            variance += np.average((places - centre[-1]) ** 2, weights=weights)
        return cls(np.array(centre), max(1.0, float(np.sqrt(variance))))


class Pattern(NamedTuple):
    """The annotated voxels of one class in one image."""

    corner: np.ndarray  # of their bounding box, `(dimensions,)`
    shape: tuple[int, ...]  # of their bounding box
    bits: np.ndarray  # the voxels in it, packed, because dozens of patterns of large patches are kept
    foreground: Cloud | None  # the image's annotations of other classes, if the background is annotated

    @classmethod
    def of(cls, voxels: Voxels, foreground: Cloud | None = None) -> Pattern:
        """Pack voxels."""
        return cls(voxels.corner, voxels.mask.shape, np.packbits(voxels.mask), foreground)

    def voxels(self) -> Voxels:
        """Unpack the voxels."""
        mask = np.unpackbits(self.bits, count=int(np.prod(self.shape))).view(bool).reshape(self.shape)
        return Voxels(mask, self.corner)


class Depth:
    """Estimates how far the annotations of a class stay inside it: from 0, anywhere, to 1, as far as possible.

    No label of a partially annotated image tells where a class ends, but the image does: edges are strong at borders.
    The mean strength of the edges under real annotations is compared with that at random places of simulated ones and
    with that at their innermost places.
    """

    ENOUGH = 20  # patterns, before the comparison counts

    def __init__(self):
        self.edges = {where: [0.0, 0] for where in ("real", "anywhere", "innermost")}  # sum and number

    def add(self, where: str, edge: float) -> None:
        """Add the mean strength of the edges under one pattern."""
        total, number = self.edges[where]
        self.edges[where] = [total + edge, number + 1]

    def value(self) -> float:
        """The estimate; 0 while there are too few patterns."""
        if any(number < self.ENOUGH for _, number in self.edges.values()):
            return 0.0
        real, anywhere, innermost = (total / number for total, number in self.edges.values())
        if innermost >= anywhere:  # the edges say nothing about depth
            return 0.0
        return min(1.0, max(0.0, (anywhere - real) / (anywhere - innermost)))


class Margin:
    """Estimates how far from the border of a class its annotations stay, in voxels: 1 is next to it.

    No label of a partially annotated image tells where a class ends. But where most of an image is annotated, as in
    eroded masks with background, what is not annotated lies along the borders. Both sides are taken to be as far from
    the border, so that each has half of the gap between the annotations of two classes.
    """

    ENOUGH = KEPT  # images, because to find the gaps takes time

    def __init__(self):
        self.total, self.number = 0, 0

    def add(self, gap: int) -> None:
        """Add the smallest distance, in one image, from an annotated voxel of the class to one of another class."""
        self.total, self.number = self.total + gap, self.number + 1

    def value(self) -> int:
        """The estimate; 1 without images."""
        return max(1, round((self.total / self.number + 1) / 2)) if self.number else 1


# ---- the sampler ----------------------------------------------------------------------------------------------------

class HintSampler:
    """Draws the hint mask of each batch: real annotations if there are any, simulated ones on fully annotated images.

    The sampler keeps the last patterns of each class: what is annotated of it in an image. On a fully annotated image a
    pattern of each class is moved to a place where it fits. It is not cut at the border of the class, because the end
    of a hint would then tell where the class ends, which is false on real annotations. Of the places where it fits,
    the sampler takes the innermost or any, as often as the real annotations suggest (see :class:`Depth`). A pattern
    that fits nowhere is moved component by component. A component that fits nowhere is replaced by as many of the
    innermost voxels of the class. The background is annotated round the foreground, as it was in the image that its
    pattern comes from. Where most of an image is annotated, simulated annotations stay as far from the
    border of a class as real ones (see :class:`Margin`).

    A class is left out as often as it seems to be left out in real annotations: its share of the annotated images,
    divided by its share of the fully annotated ones. Thus the teacher learns how much it means that a class is *not*
    annotated. A share of the fully annotated images gets no hints. Annotation by whole slices is recognised and
    simulated by whole slices.

    Args:
        ignore_label: The data set's ignore label, or None.
        regions: Whether targets are nnU-Net's regions.
        no_hints: Share of the fully annotated images without hints.
        image_channels: Number of channels of the image itself, which come first. In a cascade the prediction of the
            previous stage follows, and its borders are no edges of the image. None: all channels.
    """

    def __init__(self, ignore_label: int | None, regions: bool = False, no_hints: float = NO_HINTS,
                 image_channels: int | None = None):
        self.ignore_label, self.regions, self.no_hints = ignore_label, regions, no_hints
        self.image_channels = image_channels
        self.patterns: dict[int, deque[Pattern]] = {}
        self.depth: dict[int, Depth] = {}
        self.margins: dict[int, Margin] = {}
        self.profiles: deque[tuple[int, np.ndarray]] = deque(maxlen=KEPT)
        self.images: Counter = Counter()  # "full", "annotated", and of these those "by slices" and the "dense" ones
        self.with_class: dict[str, Counter] = {"annotated": Counter(), "full": Counter()}

    def __call__(self, batch: dict) -> dict:
        """Add `hint_mask` (see :meth:`draw`) to a batch of the stratified loader, which holds `inside`."""
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        rng = rng_of_batch()
        return {**batch, "hint_mask": self.draw(batch["data"], target, batch["inside"], batch["num_full"], rng)}

    @property
    def has_seen_enough(self) -> bool:
        """Whether the patterns of enough annotated images are kept."""
        return self.images["annotated"] >= KEPT

    def observe_batches(self, loader: Iterator[dict]) -> None:
        """Draw batches until enough annotated images have been seen, and always the same ones.

        Args:
            loader: Yields batches as :meth:`__call__` takes them, with NumPy's random numbers.
        """
        before = np.random.get_state()
        np.random.seed(12345)
        for _ in range(4 * KEPT):
            if not self.has_seen_enough:
                self(next(loader))
        np.random.set_state(before)

    def draw_volume(self, data: np.ndarray, target: Tensor, inside: np.ndarray, patch_size: Sequence[int],
                    rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """Simulate annotations of a whole, fully annotated image (see :meth:`simulate_volume`).

        Args:
            data: The image, `(channels, *spatial)`.
            target: A label map `(1, 1, *spatial)`, or nnU-Net's regions `(1, R + 1, *spatial)`.
            inside: Bool, `(*spatial)`: where the image is.
            patch_size: That of the network.
            rng: Source of random numbers.

        Returns:
            The hint mask, bool `(1, 1, *spatial)`; and for which heads the hints are, bool `(1, heads)`, None for all.
        """
        labels = class_map(target, self.regions)[0]
        return torch.from_numpy(self.simulate_volume(data, labels, inside, patch_size, rng))[None, None], None

    def draw(self, data: Tensor, target: Tensor, inside: Tensor, num_full: int, rng: np.random.Generator) -> Tensor:
        """Draw the hint mask of a batch whose first `num_full` images are fully annotated.

        Args:
            data: The images, `(B, channels, *spatial)`.
            target: A label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`.
            inside: Bool, `(B, 1, *spatial)`: False in the padding and in the empty surroundings of an image.
            num_full: Number of fully annotated images.
            rng: Source of random numbers.

        Returns:
            Bool, `(B, 1, *spatial)`; never true outside of the image.
        """
        mask = annotated_voxels(target, self.ignore_label, self.regions) & inside
        images, labels = data[:, :self.image_channels].numpy(), class_map(target, self.regions)
        hints, inside = mask[:, 0].numpy(), inside[:, 0].numpy()  # the hints are a view of the mask
        for i in range(num_full, len(labels)):
            self.observe(images[i], labels[i], hints[i], inside[i])
        for i in range(num_full):
            hints[i] = self.simulate(images[i], labels[i], inside[i], rng)
        return mask

    def observe(self, data: np.ndarray, labels: np.ndarray, annotated: np.ndarray, inside: np.ndarray) -> None:
        """Keep the patterns of an image that is not fully annotated.

        Args:
            data: The image, `(channels, *spatial)`.
            labels: Numbers as :func:`class_map` gives them, `(*spatial)`.
            annotated: Bool, `(*spatial)`: which voxels are annotated.
            inside: Bool, `(*spatial)`: where the image is.
        """
        if not annotated.any():
            return
        self.images["annotated"] += 1
        if _is_by_slices(labels, annotated, inside):
            self.images["by slices"] += 1
            if (profile := _slice_profile(annotated, inside)) is not None:
                self.profiles.append(profile)
            return
        present = _boxes(labels, annotated)
        self.with_class["annotated"].update(list(present))
        if 2 * np.count_nonzero(annotated) > np.count_nonzero(inside):
            self.images["dense"] += 1
            if self.images["dense"] <= Margin.ENOUGH:
                for label, gap in _gaps(labels, annotated).items():
                    self.margins.setdefault(label, Margin()).add(gap)
        foreground = Cloud.of(annotated & (labels != 0)) if 0 in present else None
        for label, box in present.items():
            voxels = Voxels((labels[box] == label) & annotated[box], _corner(box))
            self.patterns.setdefault(label, deque(maxlen=KEPT)).append(Pattern.of(voxels, foreground))
            self.depth.setdefault(label, Depth()).add("real", _edge_strength(data, voxels.sample()))

    def simulate(self, data: np.ndarray, labels: np.ndarray, inside: np.ndarray,
                 rng: np.random.Generator) -> np.ndarray:
        """Simulate annotations of a fully annotated image; the arguments are those of :meth:`observe`.

        Returns:
            Bool, `(*spatial)`: which voxels are hints.
        """
        hints = np.zeros(labels.shape, bool)
        if not self.images["annotated"]:
            return hints
        present = _boxes(labels, inside)
        self.images["full"] += 1
        self.with_class["full"].update(list(present))
        if rng.random() < self.no_hints:
            return hints
        if rng.random() < self.images["by slices"] / self.images["annotated"]:
            if not self.profiles:
                return hints
            return _by_profile(self.profiles[rng.integers(len(self.profiles))], inside, rng)
        cut = None if inside.all() else inside
        for label, box in sorted(present.items(), key=lambda item: item[0] == 0):  # the background last
            if label in self.patterns and rng.random() < self._share_annotated(label):
                place = _Class((labels[box] == label) & inside[box], box, labels.shape, cut, data, self.depth[label],
                               self._margin(label, rng))
                patterns = self.patterns[label]
                foreground = Cloud.of(hints) if label == 0 and not place.number_free else None
                around = _around(foreground, patterns, place, rng) if foreground else None
                if around is not None:
                    place.paint(hints, around)
                    continue
                _place(patterns[rng.integers(len(patterns))].voxels(), place, hints, rng)
        return hints

    def _margin(self, label: int, rng: np.random.Generator) -> int:
        """Draw how far from the border of a class the next annotation stays: 1 where annotated images are not dense."""
        if label not in self.margins:
            return 1
        dense = self.images["dense"] / (self.images["annotated"] - self.images["by slices"])
        return self.margins[label].value() if rng.random() < dense else 1

    def simulate_volume(self, data: np.ndarray, labels: np.ndarray, inside: np.ndarray, patch_size: Sequence[int],
                        rng: np.random.Generator) -> np.ndarray:
        """Simulate annotations of a whole, fully annotated image, divided into tiles of the size of a training patch.

        Args:
            data: The image, `(channels, *spatial)`.
            labels: Numbers as :func:`class_map` gives them, `(*spatial)`.
            inside: Bool, `(*spatial)`: where the image is.
            patch_size: That of the network. The tiles of a 2-D network are single slices.
            rng: Source of random numbers.

        Returns:
            Bool, `(*spatial)`: which voxels are hints.
        """
        hints = np.zeros(labels.shape, bool)
        tile = (1,) * (labels.ndim - len(patch_size)) + tuple(patch_size)
        for corner in np.ndindex(*(-(-size // step) for size, step in zip(labels.shape, tile))):
            where = tuple(slice(i * step, (i + 1) * step) for i, step in zip(corner, tile))
            shape = labels[where].shape
            flat = shape[-len(patch_size):]
            hints[where] = self.simulate(data[(slice(None), *where)].reshape(len(data), *flat),
                                         labels[where].reshape(flat), inside[where].reshape(flat), rng).reshape(shape)
        return hints

    def _share_annotated(self, label: int) -> float:
        """Estimate how often a class is annotated in an image that contains it."""
        not_by_slices = self.images["annotated"] - self.images["by slices"]
        share_of_annotated = self.with_class["annotated"][label] / not_by_slices
        return share_of_annotated / (self.with_class["full"][label] / self.images["full"])


def rng_of_batch() -> np.random.Generator:
    """Random numbers for the hints of the next batch.

    They are separate from nnU-Net's, but derived from them: the images equal those of a training without hints.
    """
    _, numbers, position, *_ = np.random.get_state()
    return np.random.default_rng([*numbers[:8], position])


# ---- what is annotated ----------------------------------------------------------------------------------------------

def _boxes(labels: np.ndarray, inside: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """The values that occur `inside` a part of the image, from 0, in their order, and the bounding box of each."""
    values = None
    if labels.size and labels.max() >= 2 ** 15:
        values, labels = np.unique(labels, return_inverse=True)
        labels = labels.reshape(inside.shape)
    numbered = np.where(inside, labels + 1, 0)
    boxes = enumerate(ndimage.find_objects(numbered)) if labels.size else ()
    return {number if values is None else int(values[number]): box for number, box in boxes if box is not None}


def _corner(box: tuple[slice, ...]) -> np.ndarray:
    return np.array([side.start for side in box])


def _spread(number: int) -> np.ndarray | slice:
    """The numbers of at most `SAMPLE` things, evenly spread over their order."""
    return slice(None) if number <= SAMPLE else np.linspace(0, number - 1, SAMPLE).astype(int)


def _edge_strength(data: np.ndarray, voxels: np.ndarray) -> float:
    """Mean absolute central difference of an image `(channels, *spatial)` at voxels `(n, dims)`, summed over axes."""
    last, total = np.array(data.shape[1:]) - 1, 0.0
    for step in np.eye(voxels.shape[-1], dtype=int):
        before, after = (data[(slice(None), *np.clip(voxels + sign * step, 0, last).T)] for sign in (-1, 1))
        total += float(np.abs(after - before).mean())
    return total


def _gaps(labels: np.ndarray, annotated: np.ndarray) -> dict[int, int]:
    """The smallest distance from an annotated voxel of each class to one of another class, {class: voxels}.

    Classes without another one are left out. Diagonal neighbours have the distance 1. Each voxel between the
    annotations belongs to the nearest one, and where voxels of two classes meet, their distances add up.
    """
    distance, nearest = ndimage.distance_transform_cdt(~annotated, "chessboard", return_indices=True)
    owner = labels[tuple(nearest)]
    found: dict[int, int] = {}
    for axis in range(labels.ndim):
        a, b = (tuple(slice(start, stop) if i == axis else slice(None) for i in range(labels.ndim))
                for start, stop in ((None, -1), (1, None)))
        meet = owner[a] != owner[b]
        gap = distance[a][meet] + distance[b][meet] + 1
        for of_side in (owner[a][meet], owner[b][meet]):
            for label in np.unique(of_side).tolist():
                smallest = int(gap[of_side == label].min())
                found[label] = min(found.get(label, smallest), smallest)
    return found


def _is_by_slices(labels: np.ndarray, annotated: np.ndarray, inside: np.ndarray) -> bool:
    """Whether whole slices of an image are annotated, up to the borders between classes.

    Then, along at least two axes, few annotated voxels have a neighbour in the image that is not annotated.
    """
    within = 0
    for axis in range(labels.ndim):
        a, b = (tuple(slice(start, stop) if i == axis else slice(None) for i in range(labels.ndim))
                for start, stop in ((None, -1), (1, None)))
        both = annotated[a] & annotated[b]
        closed = np.count_nonzero(both & (labels[a] != labels[b]))
        opened = np.count_nonzero((annotated[a] ^ annotated[b]) & inside[a] & inside[b])
        within += int(closed >= opened)
    return within >= 2


def _slice_profile(annotated: np.ndarray, inside: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The axis across the annotated slices, and which slices are annotated; None if the slices are tilted."""
    for axis in range(annotated.ndim):
        others = tuple(i for i in range(annotated.ndim) if i != axis)
        known = inside.sum(others)
        share = annotated.sum(others)[known > 0] / known[known > 0]
        if ((share < 0.1) | (share > 0.9)).all():
            return axis, share > 0.5
    return None


def _eroded(mask: np.ndarray, distance: int) -> np.ndarray:
    """The voxels of a mask that are at least so far from what is not in it, diagonal neighbours being 1 away."""
    for axis in range(mask.ndim):
        mask = np.pad(mask, [(distance - 1, distance - 1) if i == axis else (0, 0) for i in range(mask.ndim)],
                      mode="edge")
        length = 1  # a voxel is the minimum of so many
        while length < 2 * distance - 1:
            step = min(length, 2 * distance - 1 - length)
            first, second = ((slice(None),) * axis + (part,) for part in (slice(None, -step), slice(step, None)))
            mask = mask[first] & mask[second]
            length += step
    return mask


# ---- where it is placed ---------------------------------------------------------------------------------------------

def _by_profile(profile: tuple[int, np.ndarray], inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image's slices of a profile, shifted at random."""
    axis, slices = profile
    size = inside.shape[axis]
    annotated = np.resize(np.roll(slices, rng.integers(len(slices))), size)
    return inside & annotated.reshape([size if i == axis else 1 for i in range(inside.ndim)])


class _Class(Voxels):
    """One class in one image, where its hints are to be placed.

    Args:
        mask: Bool, where the class is in its bounding box.
        box: The bounding box.
        shape: That of the patch.
        inside: Bool, `(*spatial)`: where the image is. None: everywhere.
        data: The image, `(channels, *spatial)`.
        depth: How deep real annotations of the class lie.
        margin: How far from the border of the class they stay (see :class:`Margin`).

    Attributes:
        free: Bool, of the shape of `mask`: the voxels of the class that far from its border, or farther. In a class
            that is too thin they are the farthest ones.
        number_free: Their number; 0 if annotations come close to the border.
    """

    def __init__(self, mask: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...], inside: np.ndarray | None,
                 data: np.ndarray, depth: Depth, margin: int = 1):
        super().__init__(mask, _corner(box))
        self.shape, self.inside, self.data, self.depth, self.free = shape, inside, data, depth, mask
        solid = self._solid() if margin > 1 else mask
        for distance in range(margin, 1, -1):
            free = _eroded(solid, distance)[(slice(1, -1),) * mask.ndim] & mask
            if free.any():
                self.free = free
                break
        self.number_free = 0 if self.free is mask else np.count_nonzero(self.free)

    def _solid(self) -> np.ndarray:
        """The class and one voxel around its box, where what is outside of the image counts as the class: nobody knows
        where a class ends that the image cuts."""
        low, high = self.corner - 1, self.corner + self.mask.shape + 1
        around = tuple(slice(max(0, start), min(stop, n)) for start, stop, n in zip(low, high, self.shape))
        solid = (np.zeros([side.stop - side.start for side in around], bool) if self.inside is None
                 else ~self.inside[around])
        inner = tuple(slice(start - side.start, start - side.start + n)
                      for start, side, n in zip(self.corner, around, self.mask.shape))
        solid[inner] |= self.mask
        return np.pad(solid, [(side.start - start, stop - side.stop) for start, stop, side in zip(low, high, around)],
                      mode="edge")

    def paint(self, hints: np.ndarray, voxels: Voxels) -> None:
        """Set those of the voxels in a mask of the patch that are free."""
        low = np.maximum(self.corner, voxels.corner)
        high = np.minimum(self.corner + self.mask.shape, voxels.corner + voxels.mask.shape)
        if (low >= high).any():
            return
        here, there, patch = (tuple(slice(a, b) for a, b in zip(low - corner, high - corner))
                              for corner in (self.corner, voxels.corner, np.zeros_like(low)))
        hints[patch] |= self.free[here] & voxels.mask[there]

    def fitting(self, voxels: np.ndarray) -> np.ndarray:
        """Find the places where a pattern fits, and where the end of the image cuts little of it.

        A pattern that the end of the image cuts says nothing about the class, so only its voxels in the image count.

        Args:
            voxels: Those of the pattern at several places, `(places, n, dimensions)`.

        Returns:
            The numbers of the places.
        """
        kept = (~self._is_outside(voxels)).mean(1)
        fit = _look_up(self.free, voxels - self.corner).mean(1) / np.maximum(kept, 1e-9)
        return np.flatnonzero((fit >= FITS) & (kept >= 0.9 * kept[fit >= FITS].max(initial=0.5)))

    def surrounded(self, voxels: np.ndarray) -> np.ndarray:
        """How much of the surroundings of the voxels `(places, n, dimensions)` belongs to the class, `(places,)`.

        Nobody knows where a class ends that the image cuts: what is outside counts as the class.
        """
        of_class, of_image = _Shifted(self.mask, voxels - self.corner), _Shifted(self.inside, voxels, self.shape)
        shares = [(of_class(axis) | ~of_image(axis)).mean(-1) for axis in range(voxels.shape[-1])]
        return sum(np.stack(shares, 1).reshape(-1, len(voxels)))  # in this order for any number of places

    def _is_outside(self, voxels: np.ndarray) -> np.ndarray:
        """Which of the voxels `(..., dimensions)` do not lie in the image."""
        if self.inside is None:
            return _flat_index(self.shape, voxels) < 0
        return ~_look_up(self.inside, voxels)

    def innermost(self, size: int, rng: np.random.Generator, touching: bool) -> np.ndarray:
        """The innermost voxels of the class, the free ones first; of equally deep ones those next to a random one.

        Args:
            size: Their number, but at most two thirds of the class, or what is free if this is more.
            rng: Source of random numbers.
            touching: Whether voxels that touch another class may be among them. They are among them in any case if
                less than a third would be left.

        Returns:
            `(n, dimensions)`.
        """
        size = max(1, min(size, max(2 * self.size // 3, self.number_free)))
        depth = ndimage.distance_transform_cdt(self._solid(), "taxicab")[(slice(1, -1),) * self.mask.ndim][self.mask]
        if self.number_free:
            depth[self.free[self.mask]] += depth.max()  # what is free comes first
        deepest = np.flatnonzero(depth == depth.max())
        centre = self.voxels(deepest[rng.integers(len(deepest), size=1)])
        candidates = np.flatnonzero(depth >= np.partition(depth, -size)[-size])  # to sort all takes longer
        voxels, depth = self.voxels(candidates), depth[candidates]
        chosen = np.lexsort((((voxels - centre) ** 2).sum(1), -depth))[:size]
        untouched = chosen[depth[chosen] > 1]
        return voxels[untouched if not touching and 3 * len(untouched) >= size else chosen]


class _Shifted:
    """Looks up a mask at voxels that are shifted along one axis by each of `STEPS`; False beyond the mask.

    Args:
        mask: Bool. None: true everywhere.
        voxels: `(..., dimensions)`.
        shape: That of the mask, if it is None.
    """

    STEPS = (-1, -2, -4, 1, 2, 4)

    def __init__(self, mask: np.ndarray | None, voxels: np.ndarray, shape: tuple[int, ...] = ()):
        self.flat, self.shape = None if mask is None else mask.ravel(), shape if mask is None else mask.shape
        self.axes = [np.ascontiguousarray(voxels[..., axis]) for axis in range(voxels.shape[-1])]
        self.strides = [int(np.prod(self.shape[axis + 1:])) for axis in range(len(self.shape))]
        self.place = sum(axis * stride for axis, stride in zip(self.axes, self.strides))
        within = [(axis >= 0) & (axis < size) for axis, size in zip(self.axes, self.shape)]
        self.others = [np.logical_and.reduce(within[:i] + within[i + 1:]) for i in range(len(within))]
        self.steps = np.reshape(self.STEPS, (-1, *[1] * (voxels.ndim - 1)))

    def __call__(self, axis: int) -> np.ndarray:
        """The mask at the voxels, moved along an axis: bool, `(steps, ...)`."""
        moved = self.axes[axis] + self.steps
        found = self.others[axis] & (moved >= 0) & (moved < self.shape[axis])
        if self.flat is not None:
            found &= self.flat[np.where(found, self.place + self.steps * self.strides[axis], 0)]
        return found


def _place(pattern: Voxels, place: _Class, hints: np.ndarray, rng: np.random.Generator, whole: bool = True) -> None:
    """Move a pattern to a place in its class where it fits, and set its voxels there.

    Args:
        pattern: The voxels of the pattern.
        place: The class, to whose depth the edges that are found here are added.
        hints: Bool, of the shape of the patch, which is changed.
        rng: Source of random numbers.
        whole: Whether the components may still be moved one by one.
    """
    def set_innermost(voxels: np.ndarray) -> None:
        hints[tuple(voxels.T)] = True

    if 2 * pattern.size > place.number_free > 0 and place.size <= LARGE:
        # Most of what is free is annotated. The pattern would leave much of it out wherever it is moved.
        set_innermost(place.innermost(pattern.size, rng, touching=False))
        return
    shifts = (place.voxels(rng.integers(place.size, size=PLACES))
              - pattern.voxels(rng.integers(pattern.size, size=PLACES)))
    shifts = np.concatenate((shifts, np.zeros_like(shifts[:1])))
    moved = pattern.sample() + shifts[:, None]
    good = place.fitting(moved)
    if len(good):
        surrounded = place.surrounded(moved[good])
        best = good[surrounded.argmax()]
        innermost, seen = None, moved[best]
        if place.size <= LARGE:
            voxels = place.innermost(pattern.size, rng, touching=False)
            some = voxels[_spread(len(voxels))]
            if place.surrounded(some[None])[0] > surrounded.max():
                innermost, seen = voxels, some
        if not place.number_free:
            place.depth.add("anywhere", _edge_strength(place.data, moved[good[0]]))
            place.depth.add("innermost", _edge_strength(place.data, seen))
        deep = rng.random() < place.depth.value()
        if deep and innermost is not None:
            set_innermost(innermost)
        else:
            place.paint(hints, pattern.moved(shifts[best if deep else good[0]]))
    elif whole:
        for part in pattern.components():
            _place(part, place, hints, rng, whole=False)
    else:
        set_innermost(place.innermost(pattern.size, rng, touching=rng.random() >= place.depth.value()))


def _around(foreground: Cloud, patterns: Sequence[Pattern], place: _Class, rng: np.random.Generator) -> Voxels | None:
    """Move a pattern of the background to where it lay around the annotated foreground of its own image.

    The background is nearly everywhere, so that its extent does not tell where it is annotated. Annotators often mark
    it round the organs.

    Args:
        foreground: The hints of the other classes.
        patterns: Of the background. Those whose image had about as large a foreground are tried first.
        place: The background of the image.
        rng: Source of random numbers.

    Returns:
        The voxels; None if no pattern fits there.
    """
    known = [pattern for pattern in patterns if pattern.foreground]
    known.sort(key=lambda pattern: abs(np.log(pattern.foreground.spread / foreground.spread)) + 0.1 * rng.random())
    for pattern in known:
        voxels, reach = pattern.voxels(), np.array(place.shape) // 16
        shifts = rng.integers(-reach, reach + 1, (PLACES // 2, len(reach)))
        shifts[0] = 0
        shifts += np.rint(foreground.centre - pattern.foreground.centre).astype(int)
        good = place.fitting(voxels.sample() + shifts[:, None])
        if len(good):
            return voxels.moved(shifts[good[0]])
    return None


def _look_up(mask: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """The mask at the voxels `(..., dimensions)`; False beyond it."""
    place = _flat_index(mask.shape, voxels)
    return np.where(place < 0, False, mask.ravel()[place])


def _flat_index(shape: tuple[int, ...], voxels: np.ndarray) -> np.ndarray:
    """The number of each of the voxels `(..., dimensions)` in an array of this shape; -1 beyond it."""
    place, within = 0, True
    for axis, size in enumerate(shape):
        coordinate = voxels[..., axis]
        place = place * size + coordinate
        within &= (coordinate >= 0) & (coordinate < size)
    return np.where(within, place, -1)
