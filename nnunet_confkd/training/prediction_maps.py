"""The segmentation, the confidence and the entropy of each voxel, from logits and without a second array of their size.

nnU-Net's export resamples all classes at once, in double precision, and `numpy.argmax` copies the result. Here one
class is resampled at a time, and a few voxels are compared at a time, so that an export needs no more memory for many
classes than for two. The segmentation is nnU-Net's to the bit.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)

MEASURED = ("confidence", "entropy")
SLAB = 2 ** 18  # how many voxels are looked at at once: what fits a processor's cache
THICK = (2, 1, 1)  # a spacing whose first axis nnU-Net takes for the one of thick slices


def max_entropy(heads: int, regions: bool) -> float:
    """Compute the largest possible entropy of a voxel, in nats: log C for labels, C log 2 for regions."""
    return heads * math.log(2) if regions else math.log(heads)


class PredictionMaps:
    """Maps of a prediction, made of the logits of one head after the other.

    Args:
        shape: Of the maps, `(*spatial)`.
        labels: nnU-Net's label manager.
        measured: Which maps to make beside the segmentation.
        heads: Whether to keep the probability of each region.
        whole: Whether a head comes as a whole before the next. Otherwise all heads of a part come before the next part,
            which takes less memory.

    Attributes:
        segmentation: Labels, `(*spatial)`, of the type that nnU-Net writes.
        confidence: The largest probability, or with regions the confidence of the least confident head,
            `min_c max(p_c, 1 - p_c)`; float32. None if it is not measured.
        entropy: In nats: that of the softmax, or with regions the sum of the heads' Bernoulli entropies; float32. None
            if it is not measured.
        heads: Probabilities of the regions, `(C, *spatial)`, float32; None if they are not kept.
    """

    def __init__(self, shape: Sequence[int], labels, measured: Sequence[str] = MEASURED, heads: bool = False,
                 whole: bool = True):
        self.shape, self.labels, self.number = tuple(shape), labels, labels.num_segmentation_heads
        self.segmentation = np.zeros(self.shape, np.uint8 if len(labels.foreground_labels) < 255 else np.uint16)
        self.confidence = np.zeros(self.shape, np.float32) if measured else None
        self.entropy = np.zeros(self.shape, np.float32) if "entropy" in measured else None
        self.heads = np.empty((self.number, *self.shape), np.float32) if heads and labels.has_regions else None
        self.largest = np.empty(self.shape, np.float32) if whole and not labels.has_regions else None
        self.largest_of_part = torch.empty(0)

    @torch.inference_mode()
    def add(self, head: int, logits: np.ndarray | torch.Tensor, part: slice) -> None:
        """Add the logits of one head, those of a part of the first axis. The heads come in their order."""
        logits = torch.as_tensor(logits).float()
        (self._add_region if self.labels.has_regions else self._add_label)(head, logits, part)

    def _add_label(self, head: int, logits: torch.Tensor, part: slice) -> None:
        """Go on with the largest logit, the sum of exp(logit - largest), and that of (logit - largest) times this."""
        if self.largest is not None:
            self.largest_of_part = torch.from_numpy(self.largest[part])
        elif not head:
            self.largest_of_part = torch.empty_like(logits)
        largest = self.largest_of_part
        if not head:
            largest.fill_(-math.inf)
        else:
            self.segmentation[part][(logits > largest).numpy()] = head
        if self.confidence is None:
            torch.maximum(largest, logits, out=largest)
            return
        total = torch.from_numpy(self.confidence[part])
        weighted = None if self.entropy is None else torch.from_numpy(self.entropy[part])
        after = torch.maximum(largest, logits)
        if head:
            step = largest - after
            shrink = step.exp()
            if weighted is not None:
                weighted.addcmul_(step, total).mul_(shrink)
            total.mul_(shrink)
        logits = logits - after
        share = logits.exp()
        total.add_(share)
        if weighted is not None:
            weighted.addcmul_(logits, share)
        largest.copy_(after)
        if head == self.number - 1:
            if weighted is not None:
                weighted.div_(total).neg_().add_(total.log()).clamp_(0, max_entropy(self.number, False))
            total.reciprocal_().clamp_(0, 1)

    def _add_region(self, head: int, logits: torch.Tensor, part: slice) -> None:
        p = torch.sigmoid(logits)
        self.segmentation[part][(p > 0.5).numpy()] = self.labels.regions_class_order[head]
        if self.heads is not None:
            self.heads[head][part] = p
        if self.confidence is not None:
            least, confidence = torch.from_numpy(self.confidence[part]), torch.sigmoid(logits.abs()).clamp_(0, 1)
            least.copy_(torch.minimum(least, confidence) if head else confidence)
        if self.entropy is not None:
            total, log = torch.from_numpy(self.entropy[part]), torch.nn.functional.logsigmoid
            total.sub_(p * log(logits) + torch.sigmoid(-logits) * log(-logits))
            if head == self.number - 1:
                total.clamp_(0, max_entropy(self.number, True))


def _parts(shape: Sequence[int]) -> Iterator[slice]:
    rows = max(1, SLAB // math.prod(shape[1:]))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def maps_of(logits: np.ndarray | torch.Tensor, labels, resample: Callable | None = None,
            shape: Sequence[int] | None = None, by_slices: bool = False, **options) -> PredictionMaps:
    """Make the maps of logits.

    Args:
        logits: `(C, *spatial)`, of any floating point type, on the CPU.
        labels: nnU-Net's label manager.
        resample: Function that brings the logits of some heads `(heads, *spatial)` to another grid. None: they stay.
        shape: Of the other grid.
        by_slices: Whether the function resamples each slice of the first axis on its own, so that a few are enough.
        **options: Those of :class:`PredictionMaps`, `measured` and `heads`.
    """
    unchanged = resample is None or tuple(shape) == tuple(logits.shape[1:])
    if unchanged or by_slices:
        maps = PredictionMaps(logits.shape[1:] if unchanged else shape, labels, whole=False, **options)
        for part in _parts(maps.shape):
            for head in range(len(logits)):
                voxels = logits[head:head + 1, part]
                maps.add(head, (voxels if unchanged else resample(voxels))[0], part)
        return maps
    maps = PredictionMaps(shape, labels, **options)
    for head in range(len(logits)):
        resampled = resample(logits[head:head + 1])[0]
        for part in _parts(maps.shape):
            maps.add(head, resampled[part], part)
    return maps


class StreamingExport:
    """Stands in for nnU-Net's plans, configuration and label manager in its export, so that nothing is copied there.

    nnU-Net's export resamples the logits with the configuration's function, and hands the result to the label manager.
    Here the function returns the logits as they are, and the label manager resamples head by head.

    Args:
        plans_manager: nnU-Net's.
        configuration_manager: nnU-Net's.
        dataset_json: The content of dataset.json.
        **options: Those of :class:`PredictionMaps`.

    Attributes:
        plans: To be given to nnU-Net's export in place of `plans_manager`.
        configuration: In place of `configuration_manager`.
        labels: In place of a label manager.
        maps: What was found in the export, on the grid of the image after cropping.
    """

    def __init__(self, plans_manager, configuration_manager, dataset_json: dict, **options):
        self.plans_manager, self.options = plans_manager, options
        self.maps: PredictionMaps | None = None
        self.labels = _Labels(plans_manager.get_label_manager(dataset_json), self)
        self.configuration = _Configuration(configuration_manager)
        self.plans = copy(plans_manager)
        self.plans.get_label_manager = lambda _: self.labels

    def segment(self, logits) -> np.ndarray:
        """Return the segmentation on the grid of the image after cropping."""
        self.maps = maps_of(logits, self.labels.labels, self.configuration.resample, self.configuration.shape,
                            self.configuration.by_slices, **self.options)
        return self.maps.segmentation

    def resampled(self, logits) -> np.ndarray:
        """Return all logits on the grid of the image after cropping."""
        if tuple(self.configuration.shape) == tuple(logits.shape[1:]):
            return logits
        first = np.asarray(self.configuration.resample(logits[:1]))
        found = np.empty((len(logits), *first.shape[1:]), first.dtype)
        found[0] = first[0]
        for head in range(1, len(logits)):
            found[head] = self.configuration.resample(logits[head:head + 1])[0]
        return found

    def uncropped(self, voxels: np.ndarray, margin: int, properties: dict) -> np.ndarray:
        """Return a map on the grid of the image file. `margin` is its value where nnU-Net has cropped.

        Args:
            voxels: `(*spatial)`, or `(heads, *spatial)`.
            margin: The value.
            properties: nnU-Net's properties of the image.
        """
        whole = tuple(properties["shape_before_cropping"])
        more = voxels.ndim - len(whole)
        if voxels.shape[more:] != whole:
            cropped, voxels = voxels, np.full((*voxels.shape[:more], *whole), margin, voxels.dtype)
            inside: tuple = (..., *(slice(*bounds) for bounds in properties["bbox_used_for_cropping"]))
            voxels[inside] = cropped
        return voxels.transpose([*range(more), *(axis + more for axis in self.plans_manager.transpose_backward)])


class _Configuration:
    """A configuration manager whose resampling of probabilities is put off."""

    def __init__(self, configuration_manager):
        self.configuration_manager = configuration_manager

    def __getattr__(self, name: str):
        return getattr(self.configuration_manager, name)

    def resampling_fn_probabilities(self, logits, shape, *spacings):
        function = self.configuration_manager.resampling_fn_probabilities
        self.shape, self.by_slices = tuple(shape), _keeps_slices(function, logits.shape[1:], shape, *spacings)
        if self.by_slices:
            # as nnU-Net does with thick slices: half the time of all axes at once
            self.resample = lambda heads: function(heads, (heads.shape[1], *shape[1:]), THICK, THICK,
                                                   force_separate_z=True)
        else:
            self.resample = lambda heads: function(heads, shape, *spacings)
        return logits


def _keeps_slices(function: Callable, old: Sequence[int], new: Sequence[int], old_spacing: Sequence[float],
                  new_spacing: Sequence[float]) -> bool:
    """Return whether resampling is linear within the slices of the first axis, whose number stays, as in 2-D plans."""
    if not isinstance(function, partial) or function.func is not resample_data_or_seg_to_shape or len(old) != 3:
        return False
    options = {"order": 3, "is_seg": False, "force_separate_z": False} | function.keywords
    thick, axis = determine_do_sep_z_and_axis(options["force_separate_z"], old_spacing, new_spacing)
    return old[0] == new[0] and options["order"] <= 1 and not options["is_seg"] and not (thick and axis)


class _Labels:
    """A label manager that streams the logits."""

    def __init__(self, labels, export: StreamingExport):
        self.labels, self.export = labels, export

    def __getattr__(self, name: str):
        return getattr(self.labels, name)

    def convert_logits_to_segmentation(self, logits):
        return self.export.segment(logits)

    def apply_inference_nonlin(self, logits):
        logits = self.export.resampled(logits)
        self.export.maps = maps_of(logits, self.labels, **self.export.options)
        return self.labels.apply_inference_nonlin(logits)

    def convert_probabilities_to_segmentation(self, probabilities):
        # not from the logits: where two probabilities are equal, two logits may differ
        segmentation = np.asarray(self.labels.convert_probabilities_to_segmentation(probabilities))
        self.export.maps.segmentation = segmentation.astype(self.export.maps.segmentation.dtype)
        return segmentation
