"""The second stage of a training: the student alone learns, from labels that have been completed.

In the first stage the teacher learns on the fully annotated images to complete annotations, its hints. Then it
completes the label of each partially annotated training case, once. Annotated voxels stay as they are. From then on the
student is trained as nnU-Net trains on fully annotated images. In each stage the learning rate falls to zero, so the
labels are completed at the end of a whole schedule.

If the first stage has a KL, both branches complete the labels together. If all other cases are unlabelled there is no
teacher. The network itself labels these cases, after it has learnt from the fully annotated ones. Labels that the
student has a part in keep the largest component alone of structures that are one piece (components.py).

A student that learns from the labels of a teacher is self-training (D.-H. Lee, "Pseudo-label", ICML workshop 2013). A
teacher that is shown weak labels and completes them is known for points (Kim et al., "The devil is in the points:
weakly semi-supervised instance segmentation via point-guided mask representation", CVPR 2023, arXiv 2303.15062).
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import blosc2
import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_confkd.data.supervision import FULL, OUTSIDE, PARTIAL, UNLABELLED, unreadable
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.training.batches import TrainingCases, real_hints
from nnunet_confkd.training.components import Structure, largest_components, structures_of_one_piece
from nnunet_confkd.training.hints import whole_image_hints
from nnunet_confkd.training.names import COMPLETED_LABELS, TEACHER_CHECKPOINT
from nnunet_confkd.training.ranks import patient_group
from nnunet_confkd.training.settings import Settings
from nnunet_confkd.training.validation import CasePredictor

WORDS = {PARTIAL: "partially annotated", UNLABELLED: "unlabelled"}
FULL_SHARE = 0.25  # at least, of the draws beside cases that the network has labelled itself
PLACES = "_places.npz"  # of each class, from which patches are drawn; the ending of a file beside each label


def begin_of_second_stage(share: float, epochs: int) -> int | None:
    """Compute the epoch in which the second stage begins.

    Args:
        share: Of the epochs that the first stage has.
        epochs: The number of epochs.

    Returns:
        From 1 to the last epoch; None if the share is 0.

    Raises:
        InputError: There is one epoch alone.
    """
    if not share:
        return None
    if epochs < 2:
        raise InputError('confkd: complete_at is above 0, but there is one epoch alone, and each of the two stages '
                         'needs one; set "complete_at": 0')
    return min(max(1, round(share * epochs)), epochs - 1)


class TwoStageLR(PolyLRScheduler):
    """nnU-Net's learning rate, which falls to zero twice.

    Args:
        optimizer: The optimiser.
        initial_lr: The learning rate at the start of each stage.
        max_steps: The number of epochs.
        begin: The epoch in which the second stage begins.
    """

    def __init__(self, optimizer, initial_lr: float, max_steps: int, begin: int):
        self.begin = begin
        super().__init__(optimizer, initial_lr, max_steps)

    def at(self, epoch: int) -> float:
        """Return the learning rate in an epoch."""
        first, last = (0, self.begin) if epoch < self.begin else (self.begin, self.max_steps)
        return self.initial_lr * (1 - (epoch - first) / (last - first)) ** self.exponent

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rate of an epoch."""
        super().step(current_step)
        rate = self.at(self.ctr - 1 if current_step is None or current_step == -1 else current_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._last_lr = [rate] * len(self.optimizer.param_groups)


class CompletedCases(TrainingCases):
    """nnU-Net's data set, in which some cases have completed labels.

    Args:
        dataset: nnU-Net's data set.
        completed: The cases that have been completed.
        folder: The folder of their labels.

    Raises:
        InputError: The label of a case is missing. The text names it.
    """

    def __init__(self, dataset, completed: Iterable[str], folder: str):
        super().__init__(dataset)
        self.completed, self.folder = set(completed), folder
        missing = sorted(case for case in self.completed if not os.path.isfile(os.path.join(folder, f"{case}{PLACES}")))
        if missing:
            raise InputError(f"{folder}: lacks the completed labels of {some(missing)}. To complete them again, make a "
                             f"copy of {TEACHER_CHECKPOINT} with the name checkpoint_latest.pth, move "
                             f"checkpoint_final.pth away if there is one, and go on with --c. To validate alone, "
                             f"give --val")

    def load_case(self, case: str):
        """Load a case as nnU-Net's data set does."""
        if case not in self.completed:
            return super().load_case(case)
        data, _, seg_prev, properties = super().load_case(case)
        file = os.path.join(self.folder, case)
        try:
            label = _open_label(self.dataset, file)
            with np.load(f"{file}{PLACES}") as places:
                classes = properties["class_locations"]  # the same ones in the same order
                properties = {**properties, "class_locations": dict(zip(classes, places.values(), strict=True))}
        except Exception as error:  # whatever the broken bytes lead to
            raise unreadable(self.folder, case, error) from error
        return data, label, seg_prev, properties


def _open_label(dataset, file: str):
    """Open a label as the data set opens those of its cases. `file` has no ending."""
    if isinstance(dataset, nnUNetDatasetBlosc2):
        return blosc2.open(urlpath=f"{file}.b2nd", mode="r", dparams={"nthreads": 1}, **dataset.mmap_kwargs)
    return np.load(f"{file}.npz")["seg"]


def _save_label(dataset, label: np.ndarray, file: str, patch_size: Sequence[int]) -> None:
    """Write a label as the data set opens it, so that patches are read fast."""
    if isinstance(dataset, nnUNetDatasetBlosc2):
        blocks, chunks = comp_blosc2_params(label.shape, tuple(patch_size), label.itemsize)
        dataset.save_seg(label, file, chunks_seg=chunks, blocks_seg=blocks)
    else:
        dataset.save_seg(label, file)


def completed_kind(trainer) -> str:
    """Return the kind of the cases whose labels are completed: a network without a teacher labels unlabelled ones."""
    return PARTIAL if trainer.settings.weight_teacher else UNLABELLED


def completing_branch(settings: Settings) -> str:
    """Return which branch completes the labels: "student", "teacher" or the "mean" of both."""
    if not settings.weight_teacher:
        return "student"
    return "mean" if settings.weight_kl else "teacher"


def draw_probabilities(full: Sequence[str], labelled: Sequence[str], share: float | None = None) -> dict[str, float]:
    """Compute how likely each case is drawn in the second stage, if the network has labelled the unlabelled ones.

    Args:
        full: The fully annotated cases.
        labelled: The cases that the network has labelled.
        share: The least share of the draws that are of fully annotated cases. None: `FULL_SHARE`.

    Returns:
        {case: probability}
    """
    share = max(FULL_SHARE if share is None else share, len(full) / (len(full) + len(labelled)))
    return dict.fromkeys(full, share / len(full)) | dict.fromkeys(labelled, (1 - share) / len(labelled))


def check_second_stage(trainer, kinds: Iterable[str]) -> None:
    """Raise InputError if a training cannot have a second stage.

    Args:
        trainer: The trainer.
        kinds: Those of the training cases.
    """
    kinds, completed = set(kinds), completed_kind(trainer)
    reasons = {"weight_teacher is 0, and nobody else completes partially annotated cases":
                   completed == UNLABELLED and PARTIAL in kinds,
               f"no training case is {WORDS[completed]}": completed not in kinds,
               "some cases are not annotated for all classes": bool(trainer.hidden)}
    other = ""
    if completed == PARTIAL and kinds <= {FULL, UNLABELLED}:
        other = ', or "weight_teacher": 0 and "weight_kl": 0, so that the network labels the unlabelled cases'
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f'confkd: complete_at is above 0, but {reason}; set "complete_at": 0{other}')


def _structures_of_one_piece(trainer) -> list[Structure]:
    """The structures that are one piece in all fully annotated training cases; none of regions, which may overlap."""
    if trainer.label_manager.has_regions or not trainer.settings.largest_components:
        return []
    full = [case for case in trainer.do_split()[0] if trainer.kinds.get(case) == FULL]
    dataset = TrainingCases(trainer.dataset_class(trainer.preprocessed_dataset_folder, full))
    found = structures_of_one_piece((np.asarray(dataset.load_case(case)[1][0]) for case in full),
                                    [int(label) for label in trainer.label_manager.foreground_labels])
    words = ["the whole foreground" if isinstance(structure, tuple) else f"label {structure}" for structure in found]
    trainer.print_to_log_file("One piece in all fully annotated training cases, so that only the largest component is "
                              f"kept: {', '.join(words) or 'nothing'}")
    return found


@torch.no_grad()
def complete_labels(trainer, cases: Iterable[str]) -> None:
    """Complete the labels of preprocessed cases. With DDP each rank takes its share.

    The teacher, or both branches after a KL, complete partially annotated cases. Without a teacher the network labels
    unlabelled ones.

    Args:
        trainer: The trainer.
        cases: Names of cases of the kind :func:`completed_kind`.
    """
    folder, manager = os.path.join(trainer.output_folder, COMPLETED_LABELS), trainer.label_manager
    os.makedirs(folder, exist_ok=True)
    group, cases = patient_group() if trainer.is_ddp else None, sorted(cases)
    branch = completing_branch(trainer.settings)
    who = "Both branches complete" if branch == "mean" else f"The {branch} completes"
    trainer.print_to_log_file(f"{who} the labels of {len(cases)} training cases")
    cases = cases[trainer.local_rank::dist.get_world_size() if trainer.is_ddp else 1]
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    dataset = TrainingCases(trainer.dataset_class(
        trainer.preprocessed_dataset_folder, cases,
        folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage),
        cases if branch == "student" else (), manager.ignore_label)
    predict = CasePredictor(trainer, [branch])
    # what nnU-Net's preprocessing collects: places of each class, and annotated ones, from which patches are drawn
    collected = [*(manager.foreground_regions if manager.has_regions else manager.foreground_labels),
                 [OUTSIDE, *manager.all_labels]]
    structures = () if branch == "teacher" else _structures_of_one_piece(trainer)
    for number, case in enumerate(cases, 1):
        trainer.print_to_log_file(f"completing {case} ({number} of {len(cases)})")
        data, seg, seg_prev, _ = dataset.load_case(case)
        data, seg, seg_prev = (values if values is None else np.asarray(values[:]) for values in (data, seg, seg_prev))
        hints = None
        if branch != "student":
            target, mask = map(torch.from_numpy, real_hints(seg.astype(np.int16), manager.ignore_label))
            hints = whole_image_hints(data, target, mask, seg[0] != OUTSIDE, manager,
                                      trainer.configuration_manager.patch_size, bool(trainer.settings.hint_watershed))
        found = manager.convert_logits_to_segmentation(predict(data, seg_prev, hints)[branch]).numpy()
        missing = seg == manager.ignore_label
        found = largest_components(np.where(missing, found, seg)[0], structures)
        label = np.where(missing, found[None], seg).astype(seg.dtype)
        file = os.path.join(folder, case)
        _save_label(dataset.dataset, label, file, trainer.configuration_manager.patch_size)
        # last: a case is complete if it is there
        np.savez(f"{file}{PLACES}", *DefaultPreprocessor._sample_foreground_locations(label, collected).values())
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    if trainer.is_ddp:
        dist.barrier(group)
