"""Which case is fully, partially or not labelled; batches that hold a set share of fully labelled images.

The kind of a case follows from its *preprocessed* label, because that is what training sees: resampling may drop
single annotated voxels.
"""
from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from nnunet_confkd.dataset_conversion.volumes import count_voxels
from nnunet_confkd.dataset_conversion.writer import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.dataset_conversion.writer import split_full_cases as split_full_cases
from nnunet_confkd.errors import InputError
from nnunet_confkd.json_files import NEEDED

KINDS = (FULL, PARTIAL, UNLABELLED)  # from the most to the least annotation
TABLE_KEY = "supervision"  # the table's key in dataset.json: {case: kind}
OUTSIDE = -1  # nnU-Net's label of padding and of the empty surroundings of an image


# ---- counting -------------------------------------------------------------------------------------------------------

def kind_of(counts: dict[int, int], ignore_label: int | None) -> str:
    """Kind of a case with these voxel counts per label (`ignore_label` and `OUTSIDE` included)."""
    ignored = counts.get(ignore_label, 0)
    if not ignored:
        return FULL
    return PARTIAL if sum(counts.values()) > ignored else UNLABELLED


def annotation_counts(folder: str | Path, cases: Iterable[str], label_manager: LabelManager,
                      cache: str | Path | None = None, processes: int = 8) -> dict[str, dict[int, int]]:
    """Voxels per label of each case of a preprocessed configuration, counted in parallel.

    folder: the configuration's preprocessed folder.
    cache: a JSON file that keeps the counts, each with the size and the time of the label file it was counted in: what
        changed is counted again. It must not lie inside `folder`, where nnU-Net would take it for a case.
    Returns {case: {label: voxels}}, labels being those of the data set, `OUTSIDE` and the ignore label.
    Raises InputError, naming the case, for a label file that is missing or holds any other value.
    """
    folder, cases = Path(folder), sorted(cases)
    labels = [OUTSIDE, *(int(label) for label in label_manager.all_labels)]
    if label_manager.has_ignore_label:
        labels.append(int(label_manager.ignore_label))
    known = _read_cache(cache, labels)
    dataset = infer_dataset_class(str(folder))(str(folder), list(cases))

    def count(case: str) -> dict:
        stamp = _stamp(folder, case)
        if case in known and known[case]["stamp"] == stamp:
            return known[case]
        try:
            seg = np.asarray(dataset.load_case(case)[1][:])
        except Exception as error:  # whatever the broken bytes lead to
            raise unreadable(folder, case, error) from error
        counts = count_voxels(seg, labels)
        if sum(counts.values()) != seg.size:
            strange = sorted(set(np.unique(seg).tolist()) - set(labels))
            raise InputError(f"{folder / case}: the label holds the values {strange}, which dataset.json does not "
                                   f"list. Correct the label or dataset.json and preprocess again.")
        return {"stamp": stamp, "counts": [counts[label] for label in labels]}

    with ThreadPoolExecutor(processes) as pool:
        # a bar for the first time alone: later all are known, and it takes no time
        entries = dict(zip(cases, tqdm(pool.map(count, cases), "count annotations", len(cases), disable=True if known else None)))
    if cache is not None and any(known.get(case) != entry for case, entry in entries.items()):
        _write_cache(cache, labels, known | entries)
    return {case: dict(zip(labels, entry["counts"])) for case, entry in entries.items()}


def _stamp(folder: Path, case: str) -> list[int]:
    """Size and modification time of the file that holds a case's preprocessed label."""
    for name in (f"{case}_seg.b2nd", f"{case}.npz"):
        if (folder / name).is_file():
            status = (folder / name).stat()
            return [status.st_size, status.st_mtime_ns]
    raise InputError(f"{folder}: no preprocessed label of the case '{case}'. Run nnUNetv2_preprocess again, or "
                           f"correct splits_final.json if there is no such case.")


def _read_cache(cache: str | Path | None, labels: list[int]) -> dict:
    try:
        content = json.loads(Path(cache).read_text())
        return content["cases"] if content["labels"] == labels else {}
    except (TypeError, OSError, ValueError, KeyError):  # none asked for, none there, or not ours
        return {}


def _write_cache(cache: str | Path, labels: list[int], cases: dict) -> None:
    aside = Path(f"{cache}.{os.getpid()}")
    try:
        aside.write_text(json.dumps({"labels": labels, "cases": cases}))
        os.replace(aside, cache)
    except OSError as error:  # read-only data is no reason not to train
        warnings.warn(f"could not keep the annotation counts in {cache}: {error}", stacklevel=2)


# ---- deciding -------------------------------------------------------------------------------------------------------

def decide_kinds(counts: dict[str, dict[int, int]], label_manager: LabelManager, table: dict | None = None,
                 ) -> dict[str, str]:
    """Kind of each case: that of its label, lowered where `table` (dataset.json's "supervision") says so.

    Raises InputError, with all that is wrong in one text: a case or a kind that does not exist, a case declared
    full whose label has ignored voxels, a case declared partial or unlabelled in a data set without an ignore label.
    """
    table = {} if table is None else table
    if not isinstance(table, dict):
        raise InputError(f"dataset.json: \"{TABLE_KEY}\" must be an object {{case: kind}}, got {table!r}")
    kinds = {}
    problems = [f"{case}: there is no such case among the preprocessed ones" for case in sorted(set(table) - set(counts))]
    for case, found in ((case, kind_of(c, label_manager.ignore_label)) for case, c in counts.items()):
        declared = table.get(case, found)
        if declared not in KINDS:
            problems.append(f"{case}: '{declared}' is no kind of supervision; use one of {', '.join(KINDS)}")
        elif declared == FULL != found:
            problems.append(f"{case}: declared full, but {counts[case][label_manager.ignore_label]} of its voxels are "
                            f"ignored; declare it {found} or leave it out of the table")
        elif declared != FULL and not label_manager.has_ignore_label:
            problems.append(f"{case}: declared {declared}, but the labels in dataset.json have no \"ignore\" (the "
                            f"highest label plus one), without which no voxel can be without a label")
        else:
            kinds[case] = max(declared, found, key=KINDS.index)
    if problems:
        raise InputError("dataset.json, \"supervision\":\n  " + "\n  ".join(problems))
    return kinds


def require_full(kinds: dict[str, str]) -> None:
    """Raise InputError where no case is fully labelled: there would be nothing to teach the teacher."""
    if FULL not in kinds.values():
        raise InputError(
            f"none of the {len(kinds)} training cases is fully labelled ({summary(kinds)}), so there is no teacher. Label "
            f"at least one case completely, or train nnU-Net with its ignore label alone (-tr nnUNetTrainer).")


def summary(kinds: dict[str, str]) -> str:
    """E.g. "3 full, 57 partial, 0 unlabelled"."""
    return ", ".join(f"{sum(k == kind for k in kinds.values())} {kind}" for kind in KINDS)


def lost_annotations(cases: Iterable[str], label_folder: str | Path, file_ending: str, reader_writer,
                     ignore_label: int, processes: int = 8) -> list[str]:
    """Those of `cases` whose original label has annotated voxels: resampling has dropped every one of them.

    cases: whose preprocessed label has none. label_folder: of the original labels (nnU-Net's `gt_segmentations`); a
    case that has no file there is passed over. reader_writer: an instance of nnU-Net's reader for these files.
    """
    files = {case: Path(label_folder) / (case + file_ending) for case in cases}

    def annotated(case: str) -> bool:
        return bool((reader_writer.read_seg(str(files[case]))[0] != ignore_label).any())

    present = [case for case in files if files[case].is_file()]
    with ThreadPoolExecutor(processes) as pool:
        return [case for case, lost in zip(present, pool.map(annotated, present)) if lost]


def check_labels(dataset_json: dict) -> None:
    """Raise InputError where nnU-Net cannot use the labels, or the ignore label is not the highest label plus one."""
    try:
        labels = dict(dataset_json["labels"])
        ignore = labels.pop("ignore", None)
        highest = max(int(v) for value in labels.values() for v in (value if isinstance(value, (list, tuple)) else [value]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f'dataset.json: "labels" must be {NEEDED["labels"]} ({type(error).__name__}: {error})') from error
    if ignore is not None and ignore != highest + 1:
        raise InputError(
            f"dataset.json: the ignore label is {ignore!r}, but nnU-Net needs the highest other label plus one, "
            f"{highest + 1}. Change it there and in the label files, then plan and preprocess again.")
    try:
        LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    except Exception as error:  # what else nnU-Net demands of them
        raise InputError(f"dataset.json: {error}") from error


def unreadable(folder: str | Path, case: str, error: Exception) -> InputError:
    return InputError(f"{Path(folder) / case}: the preprocessed case cannot be read ({type(error).__name__}: {error}). Its files are "
                      f"damaged or missing: preprocess again (confkd plan or nnUNetv2_preprocess).")


# ---- loading --------------------------------------------------------------------------------------------------------

class TrainingCases:
    """nnU-Net's data set, with the labels hidden that are not to be seen (cases declared unlabelled that carry annotations).

    Raises InputError, naming the case, where its preprocessed files cannot be read.
    """

    def __init__(self, dataset, hidden: Iterable[str] = (), ignore_label: int | None = None):
        self.dataset, self.hidden, self.ignore_label = dataset, set(hidden), ignore_label
        self.identifiers = dataset.identifiers

    def load_case(self, case: str):
        try:
            data, seg, seg_prev, properties = self.dataset.load_case(case)
        except Exception as error:  # whatever the broken bytes lead to
            raise unreadable(self.dataset.source_folder, case, error) from error
        if case in self.hidden:
            seg = np.full(seg.shape, self.ignore_label, np.int16)
            properties = {**properties, "class_locations": {c: [] for c in properties["class_locations"]}}
        return data, seg, seg_prev, properties


def label_outside(label: torch.Tensor, ignore_label: int | None, full: bool) -> torch.Tensor:
    """Give nnU-Net's -1, the padding and the empty surroundings of an image, a label.

    In an image that is not fully annotated nobody annotated these voxels: they become `ignore_label`. In a fully annotated
    image they become background, as in nnU-Net. Training and completion both use this rule.

    Args:
        label: label map of any shape.
        ignore_label: the data set's ignore label; None where it has none.
        full: whether the image is fully annotated.

    Returns:
        A new label map without -1.
    """
    return torch.where(label == OUTSIDE, 0 if full or ignore_label is None else ignore_label, label)


def real_hints(label: np.ndarray, ignore_label: int) -> tuple[np.ndarray, np.ndarray]:
    """The label of an image that is not fully annotated, without -1, and the mask of its hints: its annotated voxels.

    The training loader does the same with patches.

    Args:
        label: preprocessed label map of any shape.
        ignore_label: the data set's ignore label.
    """
    known = label_outside(torch.from_numpy(label), ignore_label, full=False).numpy()
    return known, known != ignore_label


class LabelPadding(SegOnlyTransform):
    """Takes the place of nnU-Net's transform that turns the padding, -1 so far, into background.

    Nobody annotated the padding of an image that is not fully annotated. As background it would be most of what the loss of a few
    points averages over (for points in Hippocampus' slices, 99 % of the "annotated" voxels). The same holds for the empty
    surroundings of an image, which are -1, too. See :func:`label_outside`.

    Attributes:
        full: whether the next image is fully annotated; set by the loader.
        inside: bool, `(1, *spatial)`: where the last image was not -1.
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
    """Put a :class:`LabelPadding` into nnU-Net's training transforms, where padding becomes background, and return it.

    Raises:
        RuntimeError: the transforms are not as expected.
    """
    steps = transforms.transforms
    at = [i for i, step in enumerate(steps) if isinstance(step, RemoveLabelTransform) and step.label_value == OUTSIDE]
    if len(at) != 1:
        raise RuntimeError("nnU-Net's training transforms do not label the padding as expected: another version of nnU-Net?")
    steps[at[0]] = LabelPadding(ignore_label)
    return steps[at[0]]


def full_images_per_batch(batch_size: int, share: float, others: bool) -> int:
    """Fully annotated images in a batch of two or more: the rounded share, but at least one, and fewer than all where there are
    `others`."""
    if not others:
        return batch_size
    return min(max(round(share * batch_size), 1), batch_size - 1)


class StratifiedLoader(nnUNetDataLoader):
    """nnU-Net's loader, with three strata in each batch: fully annotated, partially annotated, unlabelled images, in this order.

    A batch has two more entries than nnU-Net's: `num_full`, the number of fully annotated images, and `inside`, bool
    `(B, 1, *spatial)`, False in the padding and in the empty surroundings of an image. In each stratum the share of patches that are
    forced to hold foreground is nnU-Net's for the whole batch, over many batches.

    A patch of a partially annotated image lies at a random place that holds a random annotated voxel. (nnU-Net centres it on this voxel.
    An annotation would then tell the teacher by its place whether it is real.)

    Args:
        kinds: {case: kind} of all the cases of the data set.
        full_share: share of fully annotated images. In batches of one it is the share of the batches.
        unlabelled_share: share of unlabelled images among the others, but at most their share of the cases.
        offset: the rank. It shifts the turns of the strata, so that ranks and workers do not all hold the same one at once.
        complete: is given each batch and returns it, e.g. with more entries.

    Raises:
        InputError: no case is fully annotated.
    """

    def __init__(self, data, *args, kinds: dict[str, str], full_share: float, unlabelled_share: float = 1.0, offset: int = 0,
                 complete: Callable[[dict], dict] | None = None, transforms=None, **kwargs):
        super().__init__(data, *args, transforms=None, **kwargs)  # the transforms need the stratum, which nnU-Net does not tell them
        self.strata = {kind: [case for case in data.identifiers if kinds[case] == kind] for kind in KINDS}
        if not self.strata[FULL]:
            raise InputError("no fully annotated case to draw from")
        others = len(self.strata[PARTIAL]) + len(self.strata[UNLABELLED])
        self.unlabelled_share = min(unlabelled_share, len(self.strata[UNLABELLED]) / others) if self.strata[PARTIAL] else 1.0
        self.full_share = full_share if others else 1.0
        self.offset, self.complete, self.sample_transforms = offset, complete, transforms
        self.padding = next((step for step in getattr(transforms, "transforms", ()) if isinstance(step, LabelPadding)), None)
        self.threads: ThreadpoolController | None = None
        self.batches, self.sample = 0, 0
        stock = [self._oversample_last_XX_percent(i) for i in range(self.batch_size)]
        self.forced_share = sum(stock) / self.batch_size
        self.forced: list[bool] = []
        self.probabilistic = self.get_do_oversample == self._probabilistic_oversampling
        self.get_do_oversample = self._oversample

    def _oversample(self, sample_idx: int) -> bool:
        """Whether a sample is forced to hold foreground. nnU-Net asks before it loads the sample's case."""
        self.sample = sample_idx
        return self._probabilistic_oversampling(sample_idx) if self.probabilistic else self.forced[sample_idx]

    def _draw_forced(self, size: int) -> list[bool]:
        """Which patches of a stratum are forced to hold foreground: the last, and one more as often as needed."""
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
        self.numbers = self._draw_numbers()
        self.batches += 1
        self.forced = [forced for number in self.numbers.values() for forced in self._draw_forced(number)]
        return [case for kind, number in self.numbers.items() if number for case in np.random.choice(self.strata[kind], number)]

    def get_bbox(self, data_shape, force_fg, class_locations, *args, **kwargs):
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
        for place, image, patch, final, pad in zip(voxel, data_shape, self.patch_size, self.final_patch_size, self.need_to_pad):
            pad = max(pad, patch - image)
            low, high = -pad // 2, image + pad // 2 + pad % 2 - patch  # nnU-Net's bounds of a random crop
            # the patch that the network gets, in the middle of the one that is augmented, holds the voxel
            wanted = place - np.random.randint(final) - (patch - final) // 2
            corner.append(int(min(max(wanted, low), high)))
        return corner, [start + size for start, size in zip(corner, self.patch_size)]

    def generate_train_batch(self):
        raw = super().generate_train_batch()
        batch = {**raw, "num_full": self.numbers[FULL]}
        if self.sample_transforms is not None:
            batch |= self._transformed(raw["data"], raw["target"])
        return self.complete(batch) if self.complete else batch

    def _transformed(self, data: torch.Tensor, target: torch.Tensor) -> dict:
        samples = []
        if self.threads is None:  # not before: a worker finds other libraries than the main process
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
        batch = {"data": torch.stack([sample["image"] for sample in samples]).float(),
                 "target": list(map(torch.stack, zip(*targets))) if isinstance(targets[0], list) else torch.stack(targets)}
        if self.padding:
            batch["inside"] = torch.stack([sample["inside"] for sample in samples])
        return batch
