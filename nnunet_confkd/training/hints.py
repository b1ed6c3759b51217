"""Hints: the annotated voxels of an image, shown to the teacher.

The papers apply the KL to the fully annotated images, where the student has the labels themselves. On every other image a teacher
that sees the image alone knows no more than the student. These images have annotations, however. With the annotations as a
second input the teacher only has to complete them. It learns this on the fully annotated images, from annotations that are simulated
there. The student sees the image alone and follows the teacher (learning with privileged information: Vapnik, Vashist, Neural
Networks 2009; as distillation: Lopez-Paz, Bottou, Schölkopf, Vapnik, ICLR 2016, arXiv 1511.03643).

A hint is useful only if simulated annotations look like real ones. `benchmarks/hint_realism.py` compares the two.
"""
from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from torch import Tensor

from nnunet_confkd.training.losses import annotated_voxels

NO_HINTS = 0.2  # share of the fully annotated images without hints: the teacher must also predict without any
KEPT = 16  # patterns kept for each class, and slice profiles
PLACES = 48  # tried for a pattern
SAMPLE = 128  # voxels of a pattern that are compared
FITS = 0.95  # share of a pattern that must lie inside its class
MANY = 20_000  # voxels; a larger pattern is not split into its connected components
LARGE = 200_000  # voxels; of a larger class the innermost voxels are not looked for where a pattern fits


def hint_channels(target: Tensor, hint_mask: Tensor, num_heads: int, regions: bool = False) -> Tensor:
    """The network's input for hints: one channel for each class (or region), and one for "this voxel is a hint".

    Args:
        target: a label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`.
        hint_mask: bool, `(B, 1, *spatial)`: which voxels are shown.
        num_heads: number of classes with the background, or number of regions.
        regions: whether `target` holds regions.

    Returns:
        `(B, num_heads + 1, *spatial)`, float32, zero wherever no voxel is shown.
    """
    if regions:
        labels = target[:, :num_heads] != 0
    else:
        labels = target == torch.arange(num_heads, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
    return torch.cat((labels & hint_mask, hint_mask), 1).float()


def volume_hints(label: np.ndarray, hint_mask: np.ndarray, label_manager: LabelManager) -> Tensor:
    """The network's input for hints of a whole image, as :func:`hint_channels` makes it for batches.

    Args:
        label: label map `(*spatial)`.
        hint_mask: bool, `(*spatial)`: which voxels are shown.
        label_manager: nnU-Net's; it tells classes and regions.

    Returns:
        `(heads + 1, *spatial)`, float32.
    """
    target = regions_of(torch.from_numpy(label)[None], label_manager)
    return hint_channels(target[None], torch.from_numpy(hint_mask)[None, None], label_manager.num_segmentation_heads,
                         label_manager.has_regions)[0]


def regions_of(label: Tensor, label_manager: LabelManager) -> Tensor:
    """A label map `(1, *spatial)` as nnU-Net's regions `(R + 1, *spatial)` where the data set has regions; else as it is."""
    if not label_manager.has_regions:
        return label
    ignore = [] if label_manager.ignore_label is None else [label_manager.ignore_label]
    return ConvertSegmentationToRegionsTransform([*label_manager.foreground_regions, *ignore])(segmentation=label)["segmentation"]


class Pattern(NamedTuple):
    """The annotated voxels of one class in one image."""

    corner: np.ndarray  # of their bounding box
    shape: tuple[int, ...]
    bits: np.ndarray  # the voxels in it, packed: patterns of large patches are kept by the dozen

    @classmethod
    def of(cls, voxels: np.ndarray) -> Pattern:
        low = voxels.min(0)
        box = np.zeros(voxels.max(0) + 1 - low, bool)
        box[tuple((voxels - low).T)] = True
        return cls(low, box.shape, np.packbits(box))

    def voxels(self) -> np.ndarray:
        """`(n, dimensions)`."""
        return _voxels(np.unpackbits(self.bits, count=int(np.prod(self.shape))).view(bool).reshape(self.shape)) + self.corner


class Depth:
    """How far the annotations of a class stay inside it: from 0, anywhere, to 1, as far as possible.

    No label of a partially annotated image tells where a class ends, but the image does: edges are strong at borders. The mean strength of
    the edges under real annotations is compared with that at random and at the innermost places of simulated ones.
    """

    ENOUGH = 20  # patterns, before the comparison says anything

    def __init__(self):
        self.edges = {where: [0.0, 0] for where in ("real", "anywhere", "innermost")}  # sum and number

    def add(self, where: str, edge: float) -> None:
        total, number = self.edges[where]
        self.edges[where] = [total + edge, number + 1]

    def value(self) -> float:
        if any(number < self.ENOUGH for _, number in self.edges.values()):
            return 0.0
        real, anywhere, innermost = (total / number for total, number in self.edges.values())
        if innermost >= anywhere:  # the edges tell nothing
            return 0.0
        return min(1.0, max(0.0, (anywhere - real) / (anywhere - innermost)))


class HintSampler:
    """Draws the hint mask of each training batch: real annotations where there are any, simulated ones on fully annotated images.

    The sampler keeps the last patterns of each class: what is annotated of it in an image. On a fully annotated image a pattern of each
    class is moved to a place where it fits. It is not cut at the border of the class: the end of a hint would then tell where the class
    ends, which is false on real annotations. Of the places where it fits, the sampler takes the innermost
    or any, as often as the real annotations ask for (see :class:`Depth`). A pattern that fits nowhere is moved component by component.
    A component that fits nowhere is replaced by as many of the innermost voxels of the class.

    A class is left out as often as it seems to be left out in real annotations: its share of the annotated images, divided by
    its share of the fully annotated ones. Thus the teacher learns how much it means that a class is *not* annotated. A share `no_hints`
    of the fully annotated images gets no hints. Annotation by whole slices is recognised and simulated by whole slices.

    Args:
        ignore_label: the data set's ignore label.
        regions: whether targets are nnU-Net's regions.
        no_hints: share of the fully annotated images without hints.
    """

    def __init__(self, ignore_label: int | None, regions: bool = False, no_hints: float = NO_HINTS):
        self.ignore_label, self.regions, self.no_hints = ignore_label, regions, no_hints
        self.patterns: dict[int, deque[Pattern]] = {}
        self.depth: dict[int, Depth] = {}
        self.profiles: deque[tuple[int, np.ndarray]] = deque(maxlen=KEPT)
        self.images: Counter = Counter()  # "full", "annotated", and of the annotated ones those "by slices"
        self.with_class: dict[str, Counter] = {"annotated": Counter(), "full": Counter()}

    def __call__(self, batch: dict) -> dict:
        """Add `hint_mask` (see :meth:`draw`) to a batch of the stratified loader, which holds `inside`."""
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        # The numbers are separate from nnU-Net's, but derived from them: the images equal those of a training without hints.
        _, numbers, position, *_ = np.random.get_state()
        rng = np.random.default_rng([*numbers[:8], position])
        return {**batch, "hint_mask": self.draw(batch["data"], target, batch["inside"], batch["num_full"], rng)}

    def draw(self, data: Tensor, target: Tensor, inside: Tensor, num_full: int, rng: np.random.Generator) -> Tensor:
        """The hint mask of a batch whose first `num_full` images are fully annotated.

        Args:
            data: the images, `(B, channels, *spatial)`.
            target: a label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`.
            inside: bool, `(B, 1, *spatial)`: False in the padding and in the empty surroundings of an image.
            num_full: number of fully annotated images.
            rng: source of random numbers.

        Returns:
            bool, `(B, 1, *spatial)`; never true outside of the image.
        """
        mask = annotated_voxels(target, self.ignore_label, self.regions) & inside
        mask[:num_full] = False
        labels, inside = class_map(target, self.regions), inside[:, 0].numpy()
        hints = mask[:, 0].numpy()  # a view
        for image in range(num_full, len(labels)):
            self.observe(data[image].numpy(), labels[image], hints[image], inside[image])
        for image in range(num_full):
            hints[image] = self.simulate(data[image].numpy(), labels[image], inside[image], rng)
        return mask

    def observe(self, data: np.ndarray, labels: np.ndarray, annotated: np.ndarray, inside: np.ndarray) -> None:
        """Keep the patterns of an image that is not fully annotated: `(channels, *spatial)`, its label, what is annotated and where the
        image is, `(*spatial)`."""
        found = _values(labels[annotated])
        if not len(found):
            return
        self.images["annotated"] += 1
        if _is_by_slices(labels, annotated, inside):
            self.images["by slices"] += 1
            if (profile := _slice_profile(annotated, inside)) is not None:
                self.profiles.append(profile)
            return
        self.with_class["annotated"].update(found)
        for label in found:
            voxels = _voxels(annotated & (labels == label))
            self.patterns.setdefault(label, deque(maxlen=KEPT)).append(Pattern.of(voxels))
            self.depth.setdefault(label, Depth()).add("real", _edge(data, _thinned(voxels)))

    def simulate(self, data: np.ndarray, labels: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Simulated annotations of a fully annotated image: bool, `(*spatial)`. Arguments as those of :meth:`observe`."""
        hints = np.zeros(labels.shape, bool)
        if not self.images["annotated"]:
            return hints
        present = _values(labels[inside])
        self.images["full"] += 1
        self.with_class["full"].update(present)
        if rng.random() < self.no_hints:
            return hints
        if rng.random() < self.images["by slices"] / self.images["annotated"]:
            return _by_profile(self.profiles[rng.integers(len(self.profiles))], inside, rng) if self.profiles else hints
        for label in present:
            if label in self.patterns and rng.random() < self._share_annotated(label):
                pattern = self.patterns[label][rng.integers(len(self.patterns[label]))]
                of_class = (labels == label) & inside
                voxels = _placed(pattern.voxels(), of_class, inside, data, self.depth[label], rng)
                hints[_index(voxels, of_class)] = True
        return hints

    def simulate_volume(self, data: np.ndarray, label: np.ndarray, inside: np.ndarray, patch_size: Sequence[int],
                        rng: np.random.Generator) -> np.ndarray:
        """Simulated annotations of a whole, fully annotated image: bool, `(*spatial)`.

        The image is divided into tiles of the size of a training patch, single slices for a 2-D network.

        Args:
            data: the image, `(channels, *spatial)`.
            label: label map `(*spatial)`; of regions the number of :func:`class_map`.
            inside: bool, `(*spatial)`.
            patch_size: of the network.
            rng: source of random numbers.
        """
        hints = np.zeros(label.shape, bool)
        tile = (1,) * (label.ndim - len(patch_size)) + tuple(patch_size)
        for corner in np.ndindex(*(-(-size // step) for size, step in zip(label.shape, tile))):
            where = tuple(slice(i * step, (i + 1) * step) for i, step in zip(corner, tile))
            flat = (label[where].shape[-len(patch_size):])
            hints[where] = self.simulate(data[(slice(None), *where)].reshape(len(data), *flat), label[where].reshape(flat),
                                         inside[where].reshape(flat), rng).reshape(label[where].shape)
        return hints

    def _share_annotated(self, label: int) -> float:
        """How often a class seems to be annotated in an image that holds it."""
        marked = self.images["annotated"] - self.images["by slices"]
        return (self.with_class["annotated"][label] / marked) / (self.with_class["full"][label] / self.images["full"])


def class_map(target: Tensor, regions: bool) -> np.ndarray:
    """Labels `(B, *spatial)`; of overlapping regions a number for each combination, 0 for none.

    Args:
        target: a label map `(B, 1, *spatial)`, or nnU-Net's regions `(B, R + 1, *spatial)`.
    """
    if not regions:
        return target[:, 0].numpy()
    masks = target[:, :-1].numpy() != 0
    number = masks.shape[1]
    # beyond 16 regions random weights: powers of two would overflow, and two equal sums are as good as impossible
    weights = 2 ** np.arange(number) if number <= 16 else np.random.default_rng(0).integers(2 ** 53, size=number)
    found = np.zeros((len(masks), *masks.shape[2:]), np.int64)
    for region, weight in enumerate(weights):
        found += weight * masks[:, region]
    return found


# ---- what is annotated ----------------------------------------------------------------------------------------------

def _values(labels: np.ndarray) -> list[int]:
    """The values that occur, all of them from 0."""
    if not labels.size:
        return []
    return (np.flatnonzero(np.bincount(labels)) if labels.max() < 2 ** 16 else np.unique(labels)).tolist()


def _voxels(mask: np.ndarray) -> np.ndarray:
    """`np.argwhere`, `(n, dimensions)`, several times as fast."""
    return np.stack(np.unravel_index(np.flatnonzero(mask), mask.shape), 1)


def _thinned(voxels: np.ndarray) -> np.ndarray:
    return voxels if len(voxels) <= SAMPLE else voxels[np.linspace(0, len(voxels) - 1, SAMPLE).astype(int)]


def _edge(data: np.ndarray, voxels: np.ndarray) -> float:
    """Mean size of the central differences of an image `(channels, *spatial)` at some voxels `(n, dimensions)`."""
    last, total = np.array(data.shape[1:]) - 1, 0.0
    for step in np.eye(voxels.shape[-1], dtype=int):
        before, after = (data[(slice(None), *np.clip(voxels + sign * step, 0, last).T)] for sign in (-1, 1))
        total += float(np.abs(after - before).mean())
    return total


def _is_by_slices(labels: np.ndarray, annotated: np.ndarray, inside: np.ndarray) -> bool:
    """Whether whole slices of an image are annotated, up to the borders between classes.

    Along two axes at least, few annotated voxels have then a neighbour in the image that is not annotated.
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
    """The axis across the annotated slices and which of them are annotated; None where the slices are tilted."""
    for axis in range(annotated.ndim):
        others = tuple(i for i in range(annotated.ndim) if i != axis)
        known = inside.sum(others)
        share = annotated.sum(others)[known > 0] / known[known > 0]
        if ((share < 0.1) | (share > 0.9)).all():
            return axis, share > 0.5
    return None


# ---- where it is placed ---------------------------------------------------------------------------------------------

def _by_profile(profile: tuple[int, np.ndarray], inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image's slices of a profile, shifted at random."""
    axis, slices = profile
    size = inside.shape[axis]
    annotated = np.resize(np.roll(slices, rng.integers(len(slices))), size)
    return inside & annotated.reshape([size if i == axis else 1 for i in range(inside.ndim)])


def _placed(voxels: np.ndarray, of_class: np.ndarray, inside: np.ndarray, data: np.ndarray, depth: Depth,
            rng: np.random.Generator, whole: bool = True) -> np.ndarray:
    """A pattern moved to a place where it fits, `(n, dimensions)`.

    Args:
        voxels: of the pattern, `(n, dimensions)`.
        of_class: where the class is, `(*spatial)`.
        inside: where the image is, `(*spatial)`.
        data: the image, `(channels, *spatial)`.
        depth: of the class; what is found here is added to it.
        rng: source of random numbers.
        whole: whether the components may still be moved one by one.
    """
    places = _voxels(of_class)
    shifts = places[rng.integers(len(places), size=PLACES)] - voxels[rng.integers(len(voxels), size=PLACES)]
    shifts = np.concatenate((shifts, np.zeros_like(shifts[:1])))
    moved = _thinned(voxels) + shifts[:, None]
    fit, kept = _fit(moved, of_class, inside)
    good = np.flatnonzero((fit >= FITS) & (kept >= 0.9 * kept[fit >= FITS].max(initial=0.5)))
    if len(good):
        deepest = voxels + shifts[good[_margin(moved[good], of_class, inside).argmax()]]
        if len(places) <= LARGE:
            inner = _innermost(of_class, inside, len(voxels), rng, touching=False)
            deepest = max(deepest, inner, key=lambda found: _margin(_thinned(found)[None], of_class, inside)[0])
        depth.add("anywhere", _edge(data, moved[good[0]]))
        depth.add("innermost", _edge(data, _thinned(deepest)))
        return deepest if rng.random() < depth.value() else voxels + shifts[good[0]]
    if whole:
        return np.concatenate([_placed(part, of_class, inside, data, depth, rng, whole=False) for part in _components(voxels)])
    return _innermost(of_class, inside, len(voxels), rng, touching=rng.random() >= depth.value())


def _components(voxels: np.ndarray) -> list[np.ndarray]:
    if len(voxels) > MANY:
        return [voxels]
    low = voxels.min(0)
    box = np.zeros(voxels.max(0) - low + 1, bool)
    box[tuple((voxels - low).T)] = True
    numbered, number = ndimage.label(box, np.ones([3] * box.ndim))
    of_voxel = numbered[tuple((voxels - low).T)]
    return [voxels[of_voxel == component] for component in range(1, number + 1)]


def _looked_up(mask: np.ndarray, voxels: np.ndarray, beyond: bool) -> np.ndarray:
    """`mask` at the voxels `(..., dimensions)`; `beyond` for those that lie outside of the patch."""
    in_patch = np.all((voxels >= 0) & (voxels < mask.shape), axis=-1)
    return np.where(in_patch, mask[tuple(np.moveaxis(np.where(in_patch[..., None], voxels, 0), -1, 0))], beyond)


def _fit(voxels: np.ndarray, of_class: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the voxels `(places, n, dimensions)`: the share in the class, of those in the image; and the share in the image. `(places,)` each.

    The end of the image may cut a pattern: that tells nothing about the class.
    """
    kept = _looked_up(inside, voxels, False).mean(1)
    return _looked_up(of_class, voxels, False).mean(1) / np.maximum(kept, 1e-9), kept


def _margin(voxels: np.ndarray, of_class: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How much of the surroundings of the voxels `(places, n, dimensions)` belongs to their class, `(places,)`."""
    own = of_class | ~inside  # nobody knows where a class ends that the image cuts
    steps = np.concatenate([sign * distance * np.eye(voxels.shape[-1], dtype=int) for sign in (-1, 1) for distance in (1, 2, 4)])
    return sum(_looked_up(own, voxels + step, True).mean(1) for step in steps)


def _index(voxels: np.ndarray, of_class: np.ndarray) -> tuple[np.ndarray, ...]:
    """Those of the voxels that lie in the class, as an index."""
    voxels = voxels[((voxels >= 0) & (voxels < of_class.shape)).all(-1)]
    return tuple(voxels[of_class[tuple(voxels.T)]].T)


def _innermost(of_class: np.ndarray, inside: np.ndarray, size: int, rng: np.random.Generator,
               touching: bool) -> np.ndarray:
    """The innermost voxels of a class, `(n, dimensions)`; of equally deep ones those next to a random one.

    `size` of them, but at most two thirds of the class. Unless `touching`, without those that touch another class, if a third is left.
    """
    places = _voxels(of_class)
    size = max(1, min(size, 2 * len(places) // 3))
    own = np.pad(of_class | ~inside, 1, mode="edge")  # nobody knows where a class ends that the image cuts
    low, high = places.min(0), places.max(0) + 3
    depth = ndimage.distance_transform_cdt(own[tuple(map(slice, low, high))], "taxicab")
    depth = depth[tuple((places - places.min(0) + 1).T)]
    deepest = np.flatnonzero(depth == depth.max())
    distance = ((places - places[deepest[rng.integers(len(deepest))]]) ** 2).sum(1)
    chosen = np.lexsort((distance, -depth))[:size]
    untouched = chosen[depth[chosen] > 1]
    return places[untouched if not touching and 3 * len(untouched) >= size else chosen]
