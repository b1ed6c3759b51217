"""nnU-Net's preprocessing for labels with ignored voxels.

nnU-Net's own resampling erases isolated annotated voxels. Its normalisation takes ignored voxels in the empty
surroundings of an image for a part of it.
"""
from __future__ import annotations

import numpy as np
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_confkd.data.supervision import OUTSIDE


def keep_annotations(seg: np.ndarray, resampled: np.ndarray, ignore_label: int) -> np.ndarray:
    """Correct a resampled partial label so that the place of every annotated voxel is annotated by a class that fits.

    Several annotated voxels may share a place. If `resampled` has one of their classes there, it stays. Otherwise the
    place gets the most frequent of their classes; of equally frequent ones the rarest in `seg`, then the lowest. A
    class that would vanish altogether takes its places, but never the last one of another class. A label without
    ignored voxels stays as it was resampled. nnU-Net's -1 (background outside of the non-zero region) is a class like
    any other.

    Args:
        seg: The label before resampling, with any number of axes.
        resampled: The same on another grid over the same extent, with as many axes. As in nnU-Net, the edges of the
            pixels are aligned: index i of n lies in floor((i + 0.5) m / n) of m.
        ignore_label: The value of voxels that are not annotated.

    Returns:
        A new array of the shape and type of `resampled`.

    Examples:
        >>> seg = np.array([9, 9, 1, 9, 9, 9])  # 9 is not annotated
        >>> keep_annotations(seg, np.array([9, 9, 9]), 9)  # half as many pixels, among which the annotated one was lost
        array([9, 1, 9])
    """
    kept = resampled.copy()
    annotated = seg != ignore_label
    if annotated.all():
        return kept
    flat = kept.reshape(-1)  # a view
    place = np.zeros((), dtype=np.int64)
    for old, new in zip(seg.shape, resampled.shape):
        # in integers: floats would put a centre that lies on an edge to either side of it
        place = np.add.outer(place * new, (2 * np.arange(old) + 1) * new // (2 * old))
    place, label = place[annotated], seg[annotated].astype(np.int64)
    lowest = label.min(initial=0)
    frequency = np.bincount(label - lowest)

    settled = np.zeros(flat.size, dtype=bool)
    settled[place[flat[place] == label]] = True
    left = ~settled[place]
    key, count = np.unique(place[left] * frequency.size + (label[left] - lowest), return_counts=True)
    where, code = np.divmod(key, frequency.size)
    order = np.lexsort((code, frequency[code], -count, where))
    where, first = np.unique(where[order], return_index=True)
    flat[where] = code[order][first] + lowest

    vanished = [code for code in np.flatnonzero(frequency) if not (flat == code + lowest).any()]
    for code in sorted(vanished, key=lambda code: frequency[code]):
        own = np.unique(place[label == code + lowest])
        for other in np.unique(flat[own]):
            taken = own[flat[own] == other]
            if taken.size == np.count_nonzero(flat == other):
                taken = taken[1:]
            flat[taken] = code + lowest
    return kept


def outside_marked(seg: np.ndarray, data: np.ndarray, ignore_label: int) -> np.ndarray:
    """Mark ignored voxels in the empty surroundings of an image as nnU-Net marks the others there, by -1.

    nnU-Net does so with voxels of value 0 alone. Where it normalises the part of an image that is not -1, as with the
    brain in BraTS, the intensities of a scribbled or unlabelled image would then be others than those of a fully
    annotated one, and of an image to predict.

    Args:
        seg: Label map, `(1, *spatial)`.
        data: The image before any change, `(C, *spatial)`.
        ignore_label: The value of voxels that are not annotated.

    Returns:
        A new label map, or `seg` itself if it has no ignored voxel.
    """
    ignored = seg == ignore_label
    if not ignored.any():
        return seg
    return np.where(ignored & ~create_nonzero_mask(data), seg.dtype.type(OUTSIDE), seg)


class KeepAnnotations(DefaultPreprocessor):
    """nnU-Net's preprocessor for labels with ignored voxels: with :func:`keep_annotations`, :func:`outside_marked`,
    and patches that are placed on annotated voxels of the image, not on its empty surroundings.

    The plans do not name it. They keep naming nnU-Net's, which gives the same predictions.
    """

    ignore_label: int | None = None

    def run_case_npy(self, data, seg, properties, plans_manager, configuration_manager, dataset_json):
        self.ignore_label = plans_manager.get_label_manager(dataset_json).ignore_label
        if self.ignore_label is not None:
            if seg is not None and any(configuration_manager.use_mask_for_norm):
                seg = outside_marked(seg, data, self.ignore_label)
            configuration_manager = _KeepingConfiguration(configuration_manager.configuration, self.ignore_label)
        return super().run_case_npy(data, seg, properties, plans_manager, configuration_manager, dataset_json)

    def _sample_foreground_locations(self, seg, classes_or_regions, *args, **kwargs):
        """nnU-Net's method. In its list of all labels it has -1, which training ignores in such a label."""
        locations = super()._sample_foreground_locations
        if self.ignore_label is None or not (seg == self.ignore_label).any():
            return locations(seg, classes_or_regions, *args, **kwargs)
        names = [tuple(of) if isinstance(of, (tuple, list)) else of for of in classes_or_regions]
        inside = {name: tuple(label for label in name if label != OUTSIDE) if isinstance(name, tuple) else name
                  for name in names}
        found = locations(seg, list(inside.values()), *args, **kwargs)
        return {name: found[of] for name, of in inside.items()}


class _KeepingConfiguration(ConfigurationManager):
    """A configuration of the plans whose label resampling is followed by :func:`keep_annotations`."""

    def __init__(self, configuration_dict: dict, ignore_label: int):
        super().__init__(configuration_dict)
        self.ignore_label = ignore_label

    @property
    def resampling_fn_seg(self):
        stock = super().resampling_fn_seg

        def resample(seg, *grid):
            resampled = stock(seg, *grid)
            if not (seg == self.ignore_label).any():
                return resampled
            # nobody annotated -1, so it must not spread
            return keep_annotations(np.where(seg == OUTSIDE, self.ignore_label, seg), resampled, self.ignore_label)
        return resample
