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

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_confkd.data.watershed import spread, spread_volume
from nnunet_confkd.training.hint_patterns import (
    KEPT,
    Cloud,
    Depth,
    Margin,
    Pattern,
    Voxels,
    boxes_of,
    corner_of,
    edge_strength,
    gaps_of,
    is_by_slices,
    slice_profile,
)
from nnunet_confkd.training.hint_places import Place, background_around, place_pattern, slices_of
from nnunet_confkd.training.losses import annotated_voxels, hide_unlisted
from nnunet_confkd.training.network import HintMap

NO_HINTS = 0.2  # share of the fully annotated images without hints: the teacher must also predict without any


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


def hint_map(target: Tensor, hint_mask: Tensor, listed: Tensor | None = None, spread: Tensor | None = None) -> HintMap:
    """Make the teacher's second input of labels: what :func:`hint_channels` makes, in less memory.

    Args:
        target: A label map `(B, 1, *spatial)`.
        hint_mask: Bool, `(B, 1, *spatial)`: which voxels are hints.
        listed: Bool, `(B, num_heads)`, on the CPU: for which heads the hints of each image are. None: all.
        spread: As of :class:`HintMap`.
    """
    labels = torch.where(hint_mask, hide_unlisted(target, listed) + 1, 0)
    return HintMap(labels, None if listed is None else listed.to(target.device, non_blocking=True), spread)


def image_hints(label: Tensor, hint_mask: Tensor, label_manager: LabelManager, listed: Tensor | None = None,
                spread: np.ndarray | None = None) -> Tensor:
    """Make the teacher's hints of a whole image, which follow the channels of the image in predictions.

    Args:
        label: Label map, `(1, *spatial)`.
        hint_mask: Bool, `(1, *spatial)`: which voxels are hints.
        label_manager: nnU-Net's, with the classes or regions.
        listed: Bool, `(1, heads)`: for which heads the hints are, which are sets of classes then. None: for all.
        spread: Of labels: what :func:`nnunet_confkd.data.watershed.spread_volume` makes of the hints, if the
            teacher sees it.

    Returns:
        Of labels one channel, those of a :class:`HintMap`, `(1, *spatial)`: label + 1 where there is a hint, 0
        elsewhere. `spread` is a second one. Of regions, which may overlap, and of sets of classes, the channels of
        :func:`hint_channels`, `(heads + 1, *spatial)`.
    """
    if not label_manager.has_regions and listed is None:
        labels = torch.where(hint_mask, label.int() + 1, 0)
        return labels if spread is None else torch.cat((labels, torch.from_numpy(spread).to(labels)[None]))
    target = regions_of(label, label_manager)[None]
    return hint_channels(target, hint_mask[None], label_manager.num_segmentation_heads, label_manager.has_regions,
                         listed)[0]


def whole_image_hints(data: np.ndarray, label: Tensor, hint_mask: Tensor, inside: np.ndarray,
                      label_manager: LabelManager, patch_size: Sequence[int], watershed: bool = False,
                      listed: Tensor | None = None) -> Tensor:
    """Make the channels that give the hints to the network, of a whole image.

    Args:
        data: The image without a prediction of a previous stage, `(channels, *spatial)`.
        label: As of :func:`image_hints`.
        hint_mask: As of :func:`image_hints`.
        inside: Bool, `(*spatial)`: where the image is.
        label_manager: As of :func:`image_hints`.
        patch_size: That of the network.
        watershed: Whether the teacher also sees what a watershed makes of the hints.
        listed: As of :func:`image_hints`.

    Returns:
        As of :func:`image_hints`.
    """
    spread = None
    if watershed:
        spread = spread_volume(data, label[0].numpy(), hint_mask[0].numpy(), inside, patch_size)
    return image_hints(label, hint_mask, label_manager, listed, spread)


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
        watershed: Whether the annotations are also spread over the image.
    """

    def __init__(self, ignore_label: int | None, regions: bool = False, no_hints: float = NO_HINTS,
                 image_channels: int | None = None, watershed: bool = False):
        self.ignore_label, self.regions, self.no_hints = ignore_label, regions, no_hints
        self.image_channels, self.watershed = image_channels, watershed
        self.patterns: dict[int, deque[Pattern]] = {}
        self.depth: dict[int, Depth] = {}
        self.margins: dict[int, Margin] = {}
        self.profiles: deque[tuple[int, np.ndarray]] = deque(maxlen=KEPT)
        self.images: Counter = Counter()  # "full", "annotated", and of these those "by slices" and the "dense" ones
        self.with_class: dict[str, Counter] = {"annotated": Counter(), "full": Counter()}

    def __call__(self, batch: dict) -> dict:
        """Add `hint_mask` (see :meth:`draw`) to a batch of the stratified loader, which holds `inside`.

        With `watershed` also add `hint_spread`, the spread annotations, int16 `(B, 1, *spatial)`.
        """
        batch = self._with_mask(batch)
        if self.watershed:
            images, masks = batch["data"][:, :self.image_channels].numpy(), (batch["hint_mask"], batch["inside"])
            labels = class_map(highest(batch["target"]), self.regions)
            batch["hint_spread"] = torch.from_numpy(np.stack([spread(*of_image) for of_image in zip(
                images, labels, *(mask[:, 0].numpy() for mask in masks))]))[:, None]
        return batch

    def _with_mask(self, batch: dict) -> dict:
        """Add `hint_mask` to a batch, and learn from it."""
        mask = self.draw(batch["data"], highest(batch["target"]), batch["inside"], batch["num_full"], rng_of_batch())
        return {**batch, "hint_mask": mask}

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
                self._with_mask(next(loader))
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
        if is_by_slices(labels, annotated, inside):
            self.images["by slices"] += 1
            if (profile := slice_profile(annotated, inside)) is not None:
                self.profiles.append(profile)
            return
        present = boxes_of(labels, annotated)
        self.with_class["annotated"].update(list(present))
        if 2 * np.count_nonzero(annotated) > np.count_nonzero(inside):
            self.images["dense"] += 1
            if self.images["dense"] <= Margin.ENOUGH:
                for label, gap in gaps_of(labels, annotated).items():
                    self.margins.setdefault(label, Margin()).add(gap)
        foreground = Cloud.of(annotated & (labels != 0)) if 0 in present else None
        for label, box in present.items():
            voxels = Voxels((labels[box] == label) & annotated[box], corner_of(box))
            self.patterns.setdefault(label, deque(maxlen=KEPT)).append(Pattern.of(voxels, foreground))
            self.depth.setdefault(label, Depth()).add("real", edge_strength(data, voxels.sample()))

    def simulate(self, data: np.ndarray, labels: np.ndarray, inside: np.ndarray,
                 rng: np.random.Generator) -> np.ndarray:
        """Simulate annotations of a fully annotated image; the arguments are those of :meth:`observe`.

        Returns:
            Bool, `(*spatial)`: which voxels are hints.
        """
        hints = np.zeros(labels.shape, bool)
        if not self.images["annotated"]:
            return hints
        present = boxes_of(labels, inside)
        self.images["full"] += 1
        self.with_class["full"].update(list(present))
        if rng.random() < self.no_hints:
            return hints
        if rng.random() < self.images["by slices"] / self.images["annotated"]:
            if not self.profiles:
                return hints
            return slices_of(self.profiles[rng.integers(len(self.profiles))], inside, rng)
        cut = None if inside.all() else inside
        for label, box in sorted(present.items(), key=lambda item: item[0] == 0):  # the background last
            if label in self.patterns and rng.random() < self._share_annotated(label):
                place = Place((labels[box] == label) & inside[box], box, labels.shape, cut, data, self.depth[label],
                               self._margin(label, rng))
                patterns = self.patterns[label]
                foreground = Cloud.of(hints) if label == 0 and not place.number_free else None
                around = background_around(foreground, patterns, place, rng) if foreground else None
                if around is not None:
                    place.paint(hints, around)
                    continue
                place_pattern(patterns[rng.integers(len(patterns))].voxels(), place, hints, rng)
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


def highest(target: Tensor | list[Tensor]) -> Tensor:
    """The target of the highest resolution, with deep supervision or without."""
    return target[0] if isinstance(target, list) else target


def rng_of_batch() -> np.random.Generator:
    """Random numbers for the hints of the next batch.

    They are separate from nnU-Net's, but derived from them: the images equal those of a training without hints.
    """
    _, numbers, position, *_ = np.random.get_state()
    return np.random.default_rng([*numbers[:8], position])
