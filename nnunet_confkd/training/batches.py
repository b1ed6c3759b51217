"""Training batches with a fixed share of fully annotated images.

nnU-Net's loader draws the cases, and nnU-Net's transforms augment them. This module decides which kinds of cases are
drawn, where a patch of a partially annotated image lies, and which label the padding gets.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import ThreadpoolController

from nnunet_confkd.data.supervision import FULL, KINDS, OUTSIDE, PARTIAL, UNLABELLED, unreadable
from nnunet_confkd.errors import InputError

# ---- labels of a case -----------------------------------------------------------------------------------------------


class TrainingCases:
    """nnU-Net's data set, in which the labels of some cases are hidden.

    Args:
        dataset: nnU-Net's data set.
        hidden: Cases that are declared unlabelled. They may carry annotations, which training must not see.
        ignore_label: The data set's ignore label.
    """

    def __init__(self, dataset, hidden: Iterable[str] = (), ignore_label: int | None = None):
        self.dataset, self.hidden, self.ignore_label = dataset, set(hidden), ignore_label
        self.identifiers = dataset.identifiers

    def load_case(self, case: str):
        """Load a case as nnU-Net's data set does.

        Raises:
            InputError: The preprocessed files of the case cannot be read. The text names the case.
        """
        try:
            data, seg, seg_prev, properties = self.dataset.load_case(case)
        except Exception as error:  # whatever the broken bytes lead to
            raise unreadable(self.dataset.source_folder, case, error) from error
        if case in self.hidden:
            # -1 stays: nnU-Net keeps these voxels of the image at 0
            seg = np.where(np.asarray(seg) == OUTSIDE, OUTSIDE, self.ignore_label).astype(np.int16)
            properties = {**properties, "class_locations": {c: [] for c in properties["class_locations"]}}
        return data, seg, seg_prev, properties


class ListedClasses:
    """Adds "listed" to batches: bool, `(B, heads)`, for which heads each image is annotated.

    Args:
        hidden: {case: for each head whether it is listed}, of the cases that are not annotated for all classes.
        num_heads: Number of classes with the background, or number of regions.
    """

    def __init__(self, hidden: Mapping[str, Sequence[bool]], num_heads: int):
        self.hidden, self.all = hidden, (True,) * num_heads

    def __call__(self, batch: dict) -> dict:
        """Add it to a batch of nnU-Net's loader, which holds the names of the cases."""
        return {**batch, "listed": torch.tensor([self.hidden.get(str(case), self.all) for case in batch["keys"]])}


def label_outside(label: torch.Tensor, ignore_label: int | None, full: bool) -> torch.Tensor:
    """Give a label to nnU-Net's -1, which marks the padding and the empty surroundings of an image.

    In an image that is not fully annotated nobody annotated these voxels, and they become `ignore_label`. In a fully
    annotated image they become background, as in nnU-Net. Training and completion both use this rule.

    Args:
        label: Label map of any shape.
        ignore_label: The data set's ignore label, or None.
        full: Whether the image is fully annotated.

    Returns:
        A new label map without -1.

    Examples:
        >>> label_outside(torch.tensor([-1, 0, 1]), ignore_label=2, full=False)
        tensor([2, 0, 1])
    """
    return torch.where(label == OUTSIDE, 0 if full or ignore_label is None else ignore_label, label)


def real_hints(label: np.ndarray, ignore_label: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Find the hints of an image that is not fully annotated: its annotated voxels.

    The training loader does the same with patches.

    Args:
        label: Preprocessed label map of any shape.
        ignore_label: The data set's ignore label; None: all voxels of the image are annotated.

    Returns:
        The label map without -1, and the mask of the hints.
    """
    if ignore_label is None:
        return np.maximum(label, 0), label >= 0
    known = label_outside(torch.from_numpy(label), ignore_label, full=False).numpy()
    return known, known != ignore_label


class LabelPadding(SegOnlyTransform):
    """Replaces nnU-Net's transform that turns the padding, -1 so far, into background.

    Nobody annotated the padding of an image that is not fully annotated. As background it would be most of what the
    loss of a few points averages over (for points in Hippocampus' slices, 99 % of the "annotated" voxels). The same
    holds for the empty surroundings of an image, which are -1, too. See :func:`label_outside`.

    Attributes:
        full: Whether the next image is fully annotated; set by the loader.
        inside: Bool, `(1, *spatial)`: where the last image was not -1.
    """

    def __init__(self, ignore_label: int | None):
        super().__init__()
        self.ignore_label = ignore_label
        self.full = True
        self.inside: torch.Tensor

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params) -> torch.Tensor:
        labels, previous = segmentation[:1], segmentation[1:]  # previous: a cascade's first-stage prediction
        self.inside = labels != OUTSIDE
        return torch.cat((label_outside(labels, self.ignore_label, self.full), label_outside(previous, None, True)))


def label_padding(transforms: BasicTransform, ignore_label: int | None) -> LabelPadding:
    """Put a :class:`LabelPadding` into nnU-Net's transforms, in which padding becomes background.

    Args:
        transforms: nnU-Net's transforms, which are changed.
        ignore_label: The data set's ignore label, or None.

    Returns:
        The new transform.

    Raises:
        RuntimeError: The transforms are not as expected.
    """
    steps = transforms.transforms
    at = [i for i, step in enumerate(steps)
          if isinstance(step, RemoveLabelTransform) and step.label_value == OUTSIDE]
    if len(at) != 1:
        raise RuntimeError("nnU-Net's training transforms do not label the padding as expected: another version of "
                           "nnU-Net?")
    steps[at[0]] = LabelPadding(ignore_label)
    return steps[at[0]]


# ---- batches --------------------------------------------------------------------------------------------------------


def rounding_text(batch_size: int, share: float, cutmix: float, gpus: bool) -> str:
    """Say what becomes of shares in small batches.

    Args:
        batch_size: Number of images on each GPU.
        share: Wanted share of fully annotated images.
        cutmix: Share of the iterations that are to be mixed.
        gpus: Whether there are several GPUs.

    Returns:
        Sentences, empty if the shares are those that are asked for.
    """
    images, texts = f"{batch_size} images of each batch" + (" on each GPU" if gpus else ""), []
    number = full_images_per_batch(batch_size, share, share < 1)
    if batch_size > 1 and abs(number / batch_size - share) > 0.05:
        texts.append(f"{number} of {images} {'is' if number == 1 else 'are'} fully annotated (full_share {share:.3g}, "
                     f"rounded).")
    if batch_size == 1 and cutmix:
        texts.append("There is no CutMix, because a batch" + (" on each GPU" if gpus else "") + " has one image.")
    return " ".join(texts)


def full_images_per_batch(batch_size: int, share: float, others: bool) -> int:
    """Compute the number of fully annotated images in a batch of two or more.

    Args:
        batch_size: Number of images.
        share: Wanted share of fully annotated images; 0 if there are none.
        others: Whether there are other images.

    Returns:
        The rounded share, but at least one if there are any, and fewer than all if there are others.

    Examples:
        >>> full_images_per_batch(8, 0.5, others=True), full_images_per_batch(2, 0.1, others=True)
        (4, 1)
    """
    if not others or not share:
        return batch_size if share else 0
    return min(max(floor(share * batch_size + 0.5), 1), batch_size - 1)  # halves are rounded up


def class_probabilities(kinds: Mapping[str, str], hidden: Mapping[str, Sequence[bool]], share: float,
                        regions: bool = False) -> dict[str, float]:
    """Compute how likely each case is drawn, if the cases of its stratum are annotated for different classes.

    In a share of the draws a class is drawn first, each class equally often, and then one of the cases that are
    annotated for it. In all other draws each case is as likely. With 95 cases of the liver, 5 of the kidney and a share
    of a half, 28 % of the draws are thus of the kidney, and not 5 %.

    Args:
        kinds: {case: stratum} of the cases to draw from.
        hidden: {case: for each head whether it is listed}, of the cases that are not annotated for all classes.
        share: From 0, all cases are as likely, to 1, all classes are.
        regions: Whether the heads are those of regions, which have no background.

    Returns:
        {case: probability within its stratum}, of the strata with such cases.

    Examples:
        >>> kinds = {"liver_1": "partial", "liver_2": "partial", "liver_3": "partial", "kidney_1": "partial"}
        >>> hidden = {case: (True, case.startswith("liver"), case.startswith("kidney")) for case in kinds}
        >>> float(class_probabilities(kinds, hidden, share=1.0)["kidney_1"])  # each class is drawn equally often
        0.5
    """
    found: dict[str, float] = {}
    for kind in (PARTIAL, FULL):  # where nothing is annotated, nothing is listed
        cases = [case for case in kinds if kinds[case] == kind]
        if not any(case in hidden for case in cases):
            continue
        number = len(next(iter(hidden.values())))
        lists = np.array([hidden.get(case, (True,) * number) for case in cases], float)[:, 0 if regions else 1:]
        lists = lists[:, lists.any(0)]
        by_class = (lists / lists.sum(0)).mean(1)
        found |= dict(zip(cases, share * by_class + (1 - share) / len(cases)))
    return found


class StratifiedLoader(nnUNetDataLoader):
    """nnU-Net's loader with three strata per batch: fully annotated, partially annotated and unlabelled images.

    They come in this order. A batch has two more entries than nnU-Net's: `num_full`, the number of fully annotated
    images, and `inside`, bool `(B, 1, *spatial)`, False in the padding and in the empty surroundings of an image. In
    each stratum the share of patches that are forced to contain foreground is nnU-Net's for the whole batch, averaged
    over many batches.

    A patch of a partially annotated image holds a random annotated voxel in its middle half, at a random place there.
    nnU-Net centres it on this voxel. An annotation would then tell the teacher by its place whether it is real.

    Args:
        data: The cases.
        args: Further arguments of nnU-Net's loader.
        kinds: Kind of each case of the data set.
        full_share: Share of fully annotated images. In batches of one it is the share of the batches.
        unlabelled_share: Share of unlabelled images among the others, but at most their share of the cases. If all
            others are unlabelled it is 1, and with 0 none is drawn.
        offset: The rank. It shifts the turns of the strata, so that ranks and workers do not all have the same one at
            the same time.
        complete: Each of these gets a batch in turn and returns it, for example with more entries.
        transforms: nnU-Net's transforms.
        probabilities: {case: how likely it is drawn within its stratum}, see :func:`class_probabilities`. In strata
            without, all cases are as likely.
        kwargs: Further arguments of nnU-Net's loader.

    Raises:
        InputError: No case is fully annotated, and `full_share` is above 0.
    """

    def __init__(self, data, *args, kinds: dict[str, str], full_share: float, unlabelled_share: float = 1.0,
                 offset: int = 0, complete: Sequence[Callable[[dict], dict]] = (), transforms=None,
                 probabilities: Mapping[str, float] | None = None, **kwargs):
        # nnU-Net's loader does not tell the transforms the stratum, which they need: they are applied here.
        super().__init__(data, *args, transforms=None, **kwargs)
        self.strata = {kind: [case for case in data.identifiers if kinds[case] == kind] for kind in KINDS}
        if full_share and not self.strata[FULL]:
            raise InputError("no fully annotated case to draw from")
        if not unlabelled_share:
            self.strata[UNLABELLED] = []
        unlabelled = len(self.strata[UNLABELLED])
        others = len(self.strata[PARTIAL]) + unlabelled
        self.unlabelled_share = min(unlabelled_share, unlabelled / others) if self.strata[PARTIAL] else 1.0
        self.full_share = full_share if others else 1.0
        self.probabilities = {kind: [probabilities[case] for case in cases]
                              for kind, cases in self.strata.items() if cases and cases[0] in (probabilities or {})}
        self.offset, self.complete, self.sample_transforms = offset, complete, transforms
        steps = getattr(transforms, "transforms", ())
        self.padding = next((step for step in steps if isinstance(step, LabelPadding)), None)
        self.threads: ThreadpoolController | None = None
        self.batches, self.sample = 0, 0
        stock = [self._oversample_last_XX_percent(i) for i in range(self.batch_size)]
        self.forced_share = sum(stock) / self.batch_size
        self.forced: list[bool] = []
        self.probabilistic = self.get_do_oversample == self._probabilistic_oversampling
        self.get_do_oversample = self._oversample

    def _oversample(self, sample_idx: int) -> bool:
        """Whether a sample must contain foreground. nnU-Net asks before it loads the sample's case."""
        self.sample = sample_idx
        return self._probabilistic_oversampling(sample_idx) if self.probabilistic else self.forced[sample_idx]

    def _draw_forced(self, size: int) -> list[bool]:
        """Which patches of a stratum must contain foreground: the last, and one more as often as needed."""
        wanted = size * self.forced_share
        number = int(wanted) + (np.random.uniform() < wanted - int(wanted))
        return [i >= size - number for i in range(size)]

    def _draw_numbers(self) -> dict[str, int]:
        """Number of images of each stratum in the next batch."""
        per_batch = full_images_per_batch(self.batch_size, self.full_share, self.full_share < 1)

        def full_until(batch: int) -> int:  # batches of one take turns
            return batch * per_batch if self.batch_size > 1 else int(batch * self.full_share)

        batch = self.batches + self.offset + self.thread_id
        full = full_until(batch + 1) - full_until(batch)
        others = [number * self.batch_size - full_until(number) for number in (batch, batch + 1)]
        unlabelled = int(others[1] * self.unlabelled_share) - int(others[0] * self.unlabelled_share)
        return {FULL: full, PARTIAL: self.batch_size - full - unlabelled, UNLABELLED: unlabelled}

    def get_indices(self):
        """Draw the cases of a batch."""
        self.numbers = self._draw_numbers()
        self.batches += 1
        self.forced = [forced for number in self.numbers.values() for forced in self._draw_forced(number)]
        return [case for kind, number in self.numbers.items() if number
                for case in np.random.choice(self.strata[kind], number, p=self.probabilities.get(kind))]

    def get_bbox(self, data_shape, force_fg, class_locations, *args, **kwargs):
        """Draw the place of a patch: its lower corner and its upper corner."""
        if not self.has_ignore or self.sample < self.numbers[FULL]:
            return super().get_bbox(data_shape, force_fg, class_locations, *args, **kwargs)
        places = {key: voxels for key, voxels in class_locations.items() if len(voxels)}
        annotated = places.pop(self.annotated_classes_key, ())
        if not len(annotated):
            # With no classes to choose from nnU-Net crops anywhere and does not warn.
            return super().get_bbox(data_shape, True, {}, *args, **kwargs)
        if force_fg and places:
            annotated = list(places.values())[np.random.choice(len(places))]
        voxel = annotated[np.random.choice(len(annotated))][1:]
        corner = []
        for place, image, patch, final, pad in zip(voxel, data_shape, self.patch_size, self.final_patch_size,
                                                   self.need_to_pad):
            pad = max(pad, patch - image)
            low, high = -pad // 2, image + pad // 2 + pad % 2 - patch  # nnU-Net's bounds of a random crop
            # The patch that the network gets lies in the middle of the one that is augmented. Its middle half contains
            # the voxel: anywhere in it, patches would show less of what is annotated.
            wanted = place - np.random.randint(final // 4, final - final // 4) - (patch - final) // 2
            corner.append(int(min(max(wanted, low), high)))
        return corner, [start + size for start, size in zip(corner, self.patch_size)]

    def generate_train_batch(self):
        """Draw a batch."""
        raw = super().generate_train_batch()
        batch = {**raw, "num_full": self.numbers[FULL]}
        if self.sample_transforms is not None:
            batch |= self._transformed(raw["data"], raw["target"])
        for complete in self.complete:
            batch = complete(batch)
        return batch

    def _transformed(self, data: torch.Tensor, target: torch.Tensor) -> dict:
        """Apply the transforms to each sample, with the rule of its stratum for the padding."""
        samples = []
        if self.threads is None:  # not earlier, because a worker finds other libraries than the main process
            self.threads = ThreadpoolController()
        with torch.no_grad(), self.threads.limit(limits=1):  # as nnU-Net
            for i, (image, segmentation) in enumerate(zip(data, target)):
                if self.padding:
                    self.padding.full = i < self.numbers[FULL]
                sample = self.sample_transforms(image=image, segmentation=segmentation)
                if self.padding:
                    sample["inside"] = self.padding.inside
                samples.append(sample)
        targets = [sample["segmentation"] for sample in samples]
        deep = isinstance(targets[0], list)
        batch = {"data": torch.stack([sample["image"] for sample in samples]).float(),
                 "target": list(map(torch.stack, zip(*targets))) if deep else torch.stack(targets)}
        if self.padding:
            batch["inside"] = torch.stack([sample["inside"] for sample in samples])
        return batch


def start_augmenter(loader: nnUNetDataLoader, processes: int, cached: int, pin_memory: bool, seed: int | None):
    """Start drawing batches as nnU-Net does.

    Args:
        loader: The loader with its transforms.
        processes: Number of processes that load and augment. 0: this process does so when a batch is asked for.
        cached: Number of batches that wait.
        pin_memory: Whether batches lie in pinned memory.
        seed: Seed of the first process, and one more for each further process. None: a new one.

    Returns:
        An iterator over batches.
    """
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    seeds = None if seed is None else [seed + i for i in range(processes)]
    return NonDetMultiThreadedAugmenter(data_loader=loader, transform=None, num_processes=processes,
                                        num_cached=cached, seeds=seeds, pin_memory=pin_memory, wait_time=0.002)


def finish_augmenters(*augmenters) -> None:
    """End the processes of :func:`start_augmenter`."""
    for augmenter in augmenters:
        if isinstance(augmenter, NonDetMultiThreadedAugmenter):
            augmenter._finish()


def set_seed(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch."""
    seed %= 2 ** 32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
