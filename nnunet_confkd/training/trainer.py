"""ConfKDTrainer: nnU-Net's trainer with a teacher and a student decoder, trained from mixed supervision.

It joins network, losses, hints, batches and settings through nnU-Net's hooks; what is computed stands in their modules.
"""
from __future__ import annotations

import os
import shutil
import warnings
from contextlib import nullcontext
from copy import deepcopy
from functools import cached_property
from time import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import isfile, join
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.data.annotated_classes import (
    CLASSES_KEY,
    Listed,
    annotated_classes,
    require_annotated,
    teaching_cases,
)
from nnunet_confkd.data.json_files import read_folds
from nnunet_confkd.data.patients import patients_of, split_full_cases, split_text
from nnunet_confkd.data.supervision import (
    FULL,
    PARTIAL,
    TABLE_KEY,
    UNLABELLED,
    annotation_counts,
    check_labels,
    decide_kinds,
    lost_annotations,
    require_full,
    summary,
)
from nnunet_confkd.errors import InputError, TrainingError, counted
from nnunet_confkd.files import write_json, written_whole
from nnunet_confkd.output import duration
from nnunet_confkd.processes import terminable
from nnunet_confkd.training.automatic import AUTOMATIC, LONG, OF_NETWORK, Annotations, choose, choose_network
from nnunet_confkd.training.batches import (
    ListedClasses,
    StratifiedLoader,
    TrainingCases,
    class_probabilities,
    finish_augmenters,
    label_padding,
    rounding_text,
    set_seed,
    start_augmenter,
)
from nnunet_confkd.training.candidate_hints import CandidateHints
from nnunet_confkd.training.checks import (
    check_fold,
    check_plans,
    edited_after_planning,
    has_begun,
    warning_of_intensities,
    warning_of_spinning_threads,
    warnings_of_split,
)
from nnunet_confkd.training.class_prior import ClassPrior
from nnunet_confkd.training.curves import CURVES, plot_curves
from nnunet_confkd.training.cutmix import CutMix, FullCutMix, Mix, mixed
from nnunet_confkd.training.hints import HintSampler, hint_channels, hint_map
from nnunet_confkd.training.losses import TERMS, ConfKDLoss, PartialSupervision, annotated_voxels, confidence
from nnunet_confkd.training.names import COMPLETED_LABELS, TEACHER_CHECKPOINT
from nnunet_confkd.training.network import HintMap, TwoBranchUNet, check_unet, narrower, unwrap
from nnunet_confkd.training.pseudo_dice import COUNTS, dice, hard_counts
from nnunet_confkd.training.ranks import first_rank_first, gather
from nnunet_confkd.training.record import write_record
from nnunet_confkd.training.recovery import Divergence, explain_stop, set_aside_earlier
from nnunet_confkd.training.second_stage import (
    CompletedCases,
    TwoStageLR,
    begin_of_second_stage,
    check_second_stage,
    complete_labels,
    completed_kind,
    draw_probabilities,
)
from nnunet_confkd.training.settings import Settings
from nnunet_confkd.training.validation import check_first_stage, validate


class ConfKDTrainer(nnUNetTrainer):
    """nnU-Net's trainer for full, partial and missing labels in one run (see :mod:`nnunet_confkd.training.losses`).

    The student (nnU-Net's decoder) predicts after training. The teacher is a second decoder on the same encoder.

    The settings (:class:`nnunet_confkd.training.settings.Settings`) are overridden by a `confkd` block in the
    configuration, and by `fixed_settings` of a variant. The latter always win, because results are filed under the
    name of the variant.

    Raises:
        InputError: Before any training: settings are unknown or not allowed, the ignore label is not the highest, the
            plans are those of another data set, no case is fully annotated (but see "annotated_classes" in
            docs/reference/annotated_classes.md), or the network is no U-Net.

    Examples:
        >>> ConfKDTrainer.settings_of({"weight_kl": 1.0}).weight_kl
        1.0
    """

    fixed_settings: dict = {}

    @classmethod
    def settings_of(cls, block: dict) -> Settings:
        """Return the settings with a `confkd` block of the plans; raise InputError if a setting is not allowed."""
        return Settings.from_blocks(block, cls.fixed_settings)

    # nnU-Net inspects the signature: it cannot grow
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        # These checks come first, because nnU-Net's constructor makes folders.
        block = PlansManager(plans).get_configuration(configuration).configuration.get("confkd", {})
        self.settings = self.settings_of(block)
        check_labels(dataset_json)
        if "file_ending" not in dataset_json:
            raise InputError('dataset.json: lacks "file_ending"')
        check_plans(plans, dataset_json)
        edited = edited_after_planning(plans["dataset_name"], dataset_json)
        if edited and not has_begun(plans, configuration, fold, type(self).__name__):
            raise InputError(edited)
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.settings.epochs is not None:
            self.num_epochs = self.settings.epochs
        if self.settings.iterations_per_epoch is not None:
            self.num_iterations_per_epoch = self.settings.iterations_per_epoch
            self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)  # nnU-Net's share
        self._put_settings_into_plans()
        if edited:
            self.print_to_log_file(f"WARNING: {edited}. This training has begun and goes on with the second.")
        self.kinds: dict[str, str] | None = None  # -> find_supervision
        self.hidden: dict[str, Listed] = {}  # the cases that are not annotated for all classes; likewise
        self.complete: list[str] = []  # the cases without ignored voxels; likewise
        self.foreground: dict[str, int] = {}  # annotated voxels of the foreground in each case; likewise
        self.background: dict[str, int] = {}  # annotated voxels of the background; likewise
        self.asked = self.settings  # before any is chosen from the data
        self.iteration = 0  # training iterations done
        self.continued = False  # -> load_checkpoint
        self.record: dict = {}  # -> get_tr_and_val_datasets
        self.first_epoch = 0  # of this process; -> on_train_start
        self.second_stage: int | None = None  # the epoch in which it begins; -> initialize
        self.student_alone = False  # in the second stage
        self.divergence = Divergence(self.settings.max_nonfinite_steps)
        self._add_missing_curves()

    # ---- network and loss -------------------------------------------------------------------------------------------

    def initialize(self):
        if not self.was_initialized:
            self.choose_network()
            self.second_stage = begin_of_second_stage(self.settings.complete_at or 0, self.num_epochs)
        if self.settings.seed is not None:
            set_seed(self.settings.seed)  # equal on all ranks, which start from equal weights
        super().initialize()
        if self.two_branches:
            unwrap(self.network).find_batch_norms()

    def choose_network(self) -> None:
        """Choose what the network depends on and is null, such as whether there is a teacher, for all folds alike."""
        if None not in (getattr(self.settings, name) for name in OF_NETWORK):
            return
        self.find_supervision()
        self.settings = choose_network(self.settings, self._annotations(self._cases_that_train()),
                                       self.label_manager.has_regions, self._may_have_two_stages(),
                                       self.num_epochs * self.num_iterations_per_epoch >= LONG)
        self._put_settings_into_plans()
        if self.settings.weight_teacher or self.asked.weight_teacher == 0:
            return
        if PARTIAL in (self.kinds[case] for case in self._cases_that_train()):
            self.print_to_log_file("The partially annotated cases have so few annotations that there is no teacher: the"
                                   " student learns from the labels alone. For a teacher, set \"weight_kl\": 3 in the "
                                   "confkd block of the plans")
        else:
            how = ("They are left out (complete_at is 0). By default the network labels them in trainings of at least "
                   f"{LONG} iterations")
            if self.settings.complete_at:
                how = ("The network labels them after a part of the epochs (complete_at), and then learns from these "
                       "labels, too. To leave them out, set \"complete_at\": 0 in the confkd block of the plans")
            elif self.settings.weight_entropy:
                how = "They teach by their entropy alone (weight_entropy)"
            self.print_to_log_file(f"All cases that are not fully annotated are unlabelled, so there is no teacher. "
                                   f"{how}")

    def _put_settings_into_plans(self) -> None:
        """The plans travel with the model, and the settings that it is trained with travel in them."""
        for configuration in (self.plans_manager.plans["configurations"][self.configuration_name],
                              self.configuration_manager.configuration):
            configuration["confkd"] = self.settings.as_dict()

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):
        def build(configuration):
            return nnUNetTrainer.build_network_architecture(
                plans_manager, configuration, num_input_channels, num_output_channels, enable_deep_supervision)

        # nnU-Net hands over the plans, and not the trainer: __init__ has put the settings into them.
        settings = Settings.from_blocks(configuration_manager.configuration.get("confkd", {}))
        if settings.weight_teacher == 0:
            return build(configuration_manager)
        unet, width = check_unet(build(configuration_manager)), settings.teacher_width
        network = TwoBranchUNet(unet, build(narrower(configuration_manager, width)) if width < 1 else None,
                                bool(settings.hint_watershed), bool(settings.complete_at))
        network.teach_resolutions = settings.extra_resolutions
        network.teacher_decoder.hints.reach = settings.hint_reach or 0
        return network

    def configure_optimizers(self):
        optimizer, learning_rate = super().configure_optimizers()
        if self.second_stage is not None:
            learning_rate = TwoStageLR(optimizer, self.initial_lr, self.num_epochs, self.second_stage)
        return optimizer, learning_rate

    @property
    def two_branches(self) -> bool:
        """Whether the network has a teacher."""
        return isinstance(unwrap(self.network), TwoBranchUNet)

    def _left_in_epoch(self) -> torch.Tensor:  # no property: nnU-Net reads all of them for its debug information
        network: Any = unwrap(self.network)
        return network.teacher_decoder.left.seg_layers.in_epoch

    def _begin_of_loaded_stage(self) -> int:
        """The epoch in which the second stage of a loaded checkpoint began; 0 if it had not begun."""
        if self.two_branches:
            return int(self._left_in_epoch())
        alone = self.logger.local_logger.my_fantastic_logging["second_stage"]
        return alone.index(1.0) if 1.0 in alone else 0

    def set_deep_supervision_enabled(self, enabled: bool):
        super().set_deep_supervision_enabled(enabled)
        if isinstance(network := unwrap(self.network), TwoBranchUNet):
            network.set_deep_supervision(enabled)

    def _build_loss(self):
        stock, resolution_weights = super()._build_loss(), (1.0,)
        if isinstance(stock, DeepSupervisionWrapper):
            stock, resolution_weights = stock.loss, stock.weight_factors
        if len(resolution_weights) == 1:
            resolution_weights = (1.0,)  # nnU-Net gives the lowest resolution weight 0, and would divide by it here
        settings, labels = self.settings, self.label_manager
        supervised = PartialSupervision(stock, labels.ignore_label, labels.has_regions, ddp=self.is_ddp)
        weights = {term: getattr(settings, f"weight_{term}") for term in TERMS}
        return ConfKDLoss(supervised, weights, resolution_weights=resolution_weights, regions=labels.has_regions,
                          kl_images=settings.kl_images, extra_resolutions=settings.extra_resolutions)

    # ---- supervision and split --------------------------------------------------------------------------------------

    def find_supervision(self) -> dict[str, str]:
        """Determine the kind of every preprocessed case, and log a summary; once."""
        if self.kinds is not None:
            return self.kinds
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        cache = join(self.preprocessed_dataset_folder_base,
                     f"confkd_supervision_{self.configuration_manager.data_identifier}.json")
        table = self.dataset_json.get(TABLE_KEY)
        with first_rank_first():  # it counts the voxels, and the others read its counts
            counts = annotation_counts(self.preprocessed_dataset_folder, cases, self.label_manager, cache)
            hidden = annotated_classes(self.dataset_json, counts)
            kinds = decide_kinds(counts, self.label_manager, table, hidden)
            self.print_to_log_file(f"Supervision of the data set: {summary(kinds)}"
                                   + (f"; {len(hidden)} not annotated for all classes" if hidden else ""))
            if self.local_rank == 0:
                self._warn_of_lost_annotations(kinds, table or {})
                if any(self.configuration_manager.use_mask_for_norm) and (
                        warning := warning_of_intensities(counts, self.label_manager.ignore_label,
                                                          self.plans_manager.dataset_name, self.configuration_name)):
                    self.print_to_log_file(f"WARNING: {warning}")
        self.hidden = {case: listed for case, listed in hidden.items() if kinds[case] == PARTIAL}
        self.complete = [case for case, count in counts.items() if not count.get(self.label_manager.ignore_label, 0)]
        classes = [label for label in self.label_manager.all_labels if label]
        self.foreground = {case: sum(count[label] for label in classes) for case, count in counts.items()}
        self.background = {case: count[0] for case, count in counts.items()}
        self.kinds = kinds
        return kinds

    def _warn_of_lost_annotations(self, kinds: dict[str, str], table: dict[str, str]) -> None:
        suspects = [case for case, kind in kinds.items() if kind == UNLABELLED != table.get(case)]
        lost = suspects and lost_annotations(
            suspects, join(self.preprocessed_dataset_folder_base, "gt_segmentations"),
            self.dataset_json["file_ending"], self.plans_manager.image_reader_writer_class(),
            self.label_manager.ignore_label)
        if lost:
            self.print_to_log_file(f"WARNING: {len(lost)} partially annotated case(s) count as unlabelled now: "
                                   f"resampling dropped all of their annotated voxels, or these lie in the empty "
                                   f"surroundings of the image: {', '.join(lost)}")

    def do_split(self):
        """nnU-Net's split, which is never random, and by default never validates on partial annotations."""
        if self.fold != "all":
            splits_file = join(self.preprocessed_dataset_folder_base, "splits_final.json")
            self._write_split(splits_file)
            if self.is_ddp:
                dist.barrier()  # no rank reads a file that is half written
            check_fold(self.fold, splits_file)
        return super().do_split()

    def _write_split(self, file: str) -> None:
        """Write a split of the fully annotated cases, unless there is a split or nnU-Net's own does."""
        kinds, pattern = self.find_supervision(), self.dataset_json.get("patient_pattern")
        if self.local_rank != 0 or isfile(file) or (pattern is None and set(kinds.values()) == {FULL}):
            return
        if not self.hidden:
            require_full(kinds)
        lists = {case: self.dataset_json[CLASSES_KEY][case] for case in self.hidden}
        splits = split_full_cases(kinds, patients_of(kinds, pattern), lists=lists, complete=self.complete)
        self.print_to_log_file(f"Writing {file}: {split_text(splits, kinds)}.")
        write_json(file, splits)  # at once: another fold may be reading it

    def get_tr_and_val_datasets(self):
        kinds = self.find_supervision()
        dataset_tr, dataset_val = super().get_tr_and_val_datasets()
        train, val = dataset_tr.identifiers, dataset_val.identifiers
        if missing := sorted({*train, *val} - set(kinds)):
            raise InputError(f"splits_final.json names cases that are not preprocessed: {', '.join(missing)}")
        training = {case: kinds[case] for case in train}
        self._require_supervision(training)
        if self.second_stage is not None:
            check_second_stage(self, training.values())
        self.print_to_log_file(f"Training cases: {summary(training)}")
        command = f"confkd train {int(self.plans_manager.dataset_name[7:10])} {self.configuration_name} all"
        pattern = self.dataset_json.get("patient_pattern")
        for text in warnings_of_split(self.fold, train, val, kinds, pattern, command, self.hidden):
            self.print_to_log_file(f"WARNING: {text}")
        if self.is_cascaded:
            check_first_stage(self)
        dataset_val.identifiers = [case for case in val if kinds[case] == FULL] or val
        with_hints = self.validation_hints is not None  # on all ranks, because they read the split together
        self.record = {
            "trainer": type(self).__name__, "settings": self.asked.as_dict(), "chosen": self._log_choices(train),
            "supervision": training,
            "pseudo_dice_on": list(dataset_val.identifiers), "teacher_validated_with_hints": with_hints,
            **({CLASSES_KEY: {case: self.dataset_json[CLASSES_KEY][case] for case in train if case in self.hidden}}
               if self.hidden else {})}
        return self._training_cases(dataset_tr), dataset_val

    def _log_choices(self, cases: list[str]) -> dict:
        """Log the settings that are chosen from the annotations of the training cases, and return them."""
        settings = self._choose(cases)
        chosen = {name: getattr(settings, name) for name in AUTOMATIC
                  if settings.weight_teacher or not name.startswith(("teacher", "hint"))}
        if self.student_alone:  # these settings were those of the first stage
            return chosen
        if part := self._annotations(cases).part:
            self.print_to_log_file("A partially annotated case has on average about "
                                   f"{part:.2g} of the annotated foreground of a fully annotated one")
        self.print_to_log_file("Settings that follow from the annotations, unless they are set: " + ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {str(value).lower()}"
            for name, value in chosen.items()))
        return chosen

    def _require_supervision(self, training: dict[str, str]) -> None:
        """Raise InputError if the training cases do not suffice for this trainer."""
        if self.hidden:
            strata = self._strata(training)
            require_annotated(training, self.hidden, self.dataset_json["labels"],
                              teachers=FULL in strata.values() or not self.settings.weight_teacher)
            if FULL in strata.values() and FULL not in training.values():
                self.print_to_log_file(
                    "No training case is fully annotated. The teacher learns from those that list more classes than "
                    f"others: {', '.join(case for case, kind in strata.items() if kind == FULL)}")
        else:
            require_full(training)

    def _strata(self, cases) -> dict[str, str]:
        """The stratum of each case: its kind, and `FULL` if the teacher learns from it."""
        kinds = {case: self.kinds[case] for case in cases}
        if not self.hidden or self.settings.weight_teacher == 0:
            return kinds
        return kinds | dict.fromkeys(teaching_cases(kinds, self.hidden, self.complete), FULL)

    def _annotations(self, cases) -> Annotations:
        return Annotations(self._strata(cases), self.foreground, self.background, self.hidden,
                           self._strata(self._cases_that_train()))

    def _training_cases_of_folds(self) -> list[list[str]]:
        file = join(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.fold == "all" or not isfile(file):  # in a split that this class writes, each case trains in some fold
            return [list(self.kinds)]
        return [fold["train"] for fold in read_folds(file)]

    def _cases_that_train(self) -> list[str]:
        """The cases that train in some fold. The masks of those that are held back must not decide anything."""
        training = {case for fold in self._training_cases_of_folds() for case in fold}
        return [case for case in self.kinds if case in training] or list(self.kinds)

    def _may_have_two_stages(self) -> bool:
        """Whether each stage has an epoch, and each fold has labels to complete."""
        folds = [{self.kinds.get(case) for case in fold} for fold in self._training_cases_of_folds()]
        kind = PARTIAL if any(PARTIAL in kinds for kinds in folds) else UNLABELLED
        return self.num_epochs > 1 and all(kind in kinds for kinds in folds)

    def _choose(self, cases) -> Settings:
        """The settings with what is chosen from the annotations of some cases."""
        return choose(self.settings, self._annotations(cases), self.configuration_manager.batch_size,
                      self.label_manager.has_ignore_label, self.label_manager.has_regions)

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _training_cases(self, dataset) -> TrainingCases:
        unlabelled = [case for case in dataset.identifiers if self.kinds[case] == UNLABELLED]
        return TrainingCases(dataset, unlabelled, self.label_manager.ignore_label)

    @property
    def _label_options(self) -> dict:
        """What nnU-Net's transforms need to know of the labels."""
        labels = self.label_manager
        return dict(is_cascaded=self.is_cascaded, foreground_labels=labels.foreground_labels,
                    ignore_label=labels.ignore_label,
                    regions=labels.foreground_regions if labels.has_regions else None)

    def _loader(self, cases, batch_size: int, initial_patch_size, transforms, loader_class=StratifiedLoader, **options):
        """A loader of batches with nnU-Net's options."""
        if loader_class is StratifiedLoader:
            strata = self._strata(cases.identifiers)
            chosen = self._choose(cases.identifiers)
            options = dict(kinds=strata, full_share=chosen.full_share if FULL in strata.values() else 0,
                           unlabelled_share=chosen.unlabelled_share) | options
            if self.hidden:
                options["probabilities"] = class_probabilities(strata, self.hidden, self.settings.class_share,
                                                               self.label_manager.has_regions)
                options["complete"] = [self._listed_classes, *options.get("complete", ())]
        return loader_class(cases, batch_size, initial_patch_size, self.configuration_manager.patch_size,
                            self.label_manager, transforms=transforms, sampling_probabilities=None, pad_sides=None,
                            oversample_foreground_percent=self.oversample_foreground_percent,
                            probabilistic_oversampling=self.probabilistic_oversampling, **options)

    def _with_padding(self, transforms, full: bool = True):
        """nnU-Net's transforms; in data sets with other than full labels the padding is that of full labels or not,
        which the stratified loader decides for each image."""
        if self.label_manager.has_ignore_label or self.hidden:
            label_padding(transforms, self.label_manager.ignore_label).full = full
        return transforms

    def _hint_sampler(self, **options) -> HintSampler:
        """A sampler that has not seen any batch."""
        channels = self.dataset_json["modality" if "modality" in self.dataset_json else "channel_names"]
        sampler_class = CandidateHints if self.hidden else HintSampler
        options["watershed"] = bool(self.settings.hint_watershed)
        return sampler_class(self.label_manager.ignore_label, self.label_manager.has_regions,
                             image_channels=len(channels), **options)

    @property
    def _listed_classes(self) -> ListedClasses:
        return ListedClasses(self.hidden, self.label_manager.num_segmentation_heads)

    def _class_prior(self, strength: float) -> ClassPrior:
        labels = self.label_manager
        return ClassPrior(labels.num_segmentation_heads, labels.ignore_label, labels.has_regions, strength)

    @cached_property
    def validation_hints(self) -> HintSampler | None:
        """A sampler that has seen partially annotated training cases of this fold; it simulates annotations of the
        validation cases for the teacher.

        None if the teacher does not learn to use hints, or if a validation case is not fully annotated.
        """
        if not self.settings.uses_hints:
            return None
        train, val = self.do_split()
        kinds = self.find_supervision()
        train = [case for case in train if case in kinds]
        if PARTIAL not in (kinds[case] for case in train) or any(kinds.get(case) != FULL for case in val):
            return None
        cases = self.dataset_class(self.preprocessed_dataset_folder, train,
                                   folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage)
        transforms = self._with_padding(self.get_validation_transforms(None, **self._label_options))
        loader = self._loader(self._training_cases(cases), self.configuration_manager.batch_size,
                              self.configuration_manager.patch_size, transforms)
        sampler = self._hint_sampler(no_hints=0)
        sampler.observe_batches(loader)
        return sampler

    def get_dataloaders(self):
        """nnU-Net's method with a stratified loader: nnU-Net has no hook for the class of the loader."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        patch_size = self.configuration_manager.patch_size
        deep_supervision_scales = self._get_deep_supervision_scales()
        (rotation_for_DA, do_dummy_2d_data_aug, initial_patch_size,
         mirror_axes) = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        tr_transforms = self._with_padding(self.get_training_transforms(
            patch_size, rotation_for_DA, deep_supervision_scales, mirror_axes, do_dummy_2d_data_aug,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm, **self._label_options))
        validates_full = all(self.kinds[case] == FULL for case in dataset_val.identifiers)
        val_transforms = self._with_padding(
            self.get_validation_transforms(deep_supervision_scales, **self._label_options), validates_full)
        chosen = self._choose(dataset_tr.identifiers)
        text = rounding_text(self.batch_size, chosen.full_share, chosen.cutmix, self.is_ddp)
        if text and not self.student_alone:
            self.print_to_log_file(text)
        self.loss.equal_kinds = chosen.equal_kinds and not self.student_alone
        if self.two_branches:
            unwrap(self.network).teacher_trains_encoder = chosen.teacher_trains_encoder
        if self.student_alone:
            dataset_tr, options = self._completed_cases(dataset_tr, chosen.cutmix)
        else:
            options = {"complete": self._batch_steps(dataset_tr.identifiers, chosen)}
        dl_tr = self._loader(dataset_tr, self.batch_size, initial_patch_size, tr_transforms, offset=self.local_rank,
                             **options)
        if validates_full:
            hints = [] if self.student_alone or not self.validation_hints else [deepcopy(self.validation_hints)]
            dl_val = self._loader(dataset_val, self.batch_size, patch_size, val_transforms, complete=hints)
        else:
            dl_val = self._loader(dataset_val, self.batch_size, patch_size, val_transforms, nnUNetDataLoader)

        seed = self.settings.seed
        if seed is not None:
            # It differs between ranks, and after a restart, which must not see the first batches again.
            seed += 1009 * self.local_rank + 100003 * self.current_epoch
            set_seed(seed)
        processes, pin_memory = get_allowed_n_proc_DA(), self.device.type == 'cuda'
        loaders = (start_augmenter(dl_tr, processes, max(6, processes // 2), pin_memory, seed),
                   start_augmenter(dl_val, max(1, processes // 2) if processes else 0, max(3, processes // 4),
                                   pin_memory, None if seed is None else seed + 503))
        for loader in loaders:
            next(loader)
        return loaders

    def _batch_steps(self, cases, chosen: Settings) -> list:
        """What each training batch gets in turn; in this order, because hints are simulated on exchanged images."""
        complete: list = []
        for name, share, mixer in (("cutmix_full", chosen.cutmix_full, FullCutMix),
                                   ("cutmix", chosen.cutmix, CutMix)):
            if not share:
                continue
            if self.hidden:
                raise InputError(f'confkd: {name} is above 0, but some cases are not annotated for all classes '
                                 f'(dataset.json, "annotated_classes"), and cannot be mixed; set "{name}": 0')
            complete.append(mixer(share))
        if self.settings.uses_hints and any(self.kinds[case] == PARTIAL for case in cases):
            complete.append(self._hint_sampler())
        if chosen.prior_correction:
            complete.append(self._class_prior(chosen.prior_correction))
        return complete

    # ---- the second stage -------------------------------------------------------------------------------------------

    def _to_complete(self, cases) -> list[str]:
        """The cases whose labels are completed between the stages."""
        kind = completed_kind(self)
        return [case for case in cases if self.kinds.get(case) == kind]

    def _completed_cases(self, cases: TrainingCases, cutmix: float) -> tuple[CompletedCases, dict]:
        """The training cases with whole labels, also those that have been completed; and the options of their
        loader."""
        completed = self._to_complete(cases.identifiers)
        full = [case for case in cases.identifiers if self.kinds[case] == FULL]
        dataset = self.dataset_class(self.preprocessed_dataset_folder, full + completed,
                                     folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage)
        options: dict[str, Any] = {"kinds": dict.fromkeys(full + completed, FULL), "full_share": 1.0}
        if not self.settings.weight_teacher:
            options["probabilities"] = draw_probabilities(full, completed, self.settings.full_share)
            options["complete"] = [CutMix(cutmix)] if cutmix else []
        return CompletedCases(dataset, completed, join(self.output_folder, COMPLETED_LABELS)), options

    def on_epoch_start(self):
        if self.second_stage is not None and self.current_epoch >= self.second_stage and not self.student_alone:
            self._begin_second_stage()
        super().on_epoch_start()

    def _begin_second_stage(self) -> None:
        """Keep the network, let it complete the labels, and go on with the student alone."""
        finish_augmenters(self.dataloader_train, self.dataloader_val)  # the memory is needed for whole images
        self.current_epoch -= 1  # --c goes on from the last epoch
        for name in (TEACHER_CHECKPOINT, "checkpoint_latest.pth"):
            self.save_checkpoint(join(self.output_folder, name))
        self.current_epoch += 1
        train, _ = self.do_split()
        complete_labels(self, self._to_complete(train))
        left_out = sum(self.kinds.get(case) == UNLABELLED != completed_kind(self) for case in train)
        self.print_to_log_file(f"From epoch {self.current_epoch} on the student alone is trained, on these labels"
                               + (f"; {counted(left_out, 'unlabelled case')} left out" if left_out else ""))
        if self.two_branches:
            self._left_in_epoch().fill_(self.current_epoch)
        self._leave_teacher_out(self.current_epoch)
        self.optimizer.state.clear()  # the momentum of the first stage
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()

    def _leave_teacher_out(self, epoch: int) -> None:
        # not always the epoch that was planned: the number of epochs may have changed meanwhile
        self.second_stage = self.lr_scheduler.begin = epoch
        self.student_alone = True
        self.loss.weights |= dict.fromkeys(("teacher", "kl", "entropy"), 0.0)

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self):
        super().on_train_start()
        if self.second_stage is not None and self.two_branches and not self.continued:
            self._left_in_epoch().zero_()  # of pretrained weights
        if self.local_rank == 0:  # not before all is ready: a start that fails must leave an earlier training alone
            if not self.continued and (warning := set_aside_earlier(self.output_folder)):
                self.print_to_log_file(warning)
            done = self.current_epoch if self.continued else None
            if self.record and (changed := write_record(self.output_folder, self.record, done)):
                self.print_to_log_file(f"WARNING: {changed}")
        self.first_epoch = self.current_epoch
        self.print_to_log_file(f"ConfKD settings: {self.settings}")
        if warning := warning_of_spinning_threads(self.device.type):
            self.print_to_log_file(f"WARNING: {warning}")

    def train_step(self, batch: dict) -> dict:
        data, target = self._to_device(batch)
        num_full = batch['num_full']
        highest_target = target[0] if self.enable_deep_supervision else target
        self.iteration += 1
        kl_ramp = self.settings.kl_ramp(self.iteration / (self.num_epochs * self.num_iterations_per_epoch))

        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            student, teacher = self._forward(data, num_full, batch.get("mix"),
                                             hints=self._hints(batch, highest_target),
                                             teach_all=self.loss.teaches_all and kl_ramp > 0,
                                             with_teacher=not self.student_alone)
            shift = batch.get("prior_shift")
            loss, terms = self.loss(student, teacher, target, num_full, kl_ramp,
                                    None if shift is None else shift.to(self.device, non_blocking=True),
                                    batch.get("mix"), batch.get("listed"))
        gradient = self._update_weights(loss)

        highest = student[0] if self.enable_deep_supervision else student
        regions = self.label_manager.has_regions
        annotated = annotated_voxels(highest_target, self.label_manager.ignore_label, regions)
        finite = {"loss": loss.detach(), **{f"loss_{term}": value for term, value in terms.items()},
                  "gradient": gradient}
        values = {**finite, "student_confidence": confidence(highest.detach(), regions),
                  "annotated_share": annotated.float().mean()}
        # one transfer from the device for all values
        values = dict(zip(values, torch.stack([v.float() for v in values.values()]).cpu().numpy()))
        warning = self.divergence.check({name: values[name] for name in finite}, self.current_epoch,
                                        batch.get("keys", ()), scaled=self.grad_scaler is not None)
        if warning:
            self.print_to_log_file(warning)
        del values["gradient"]
        return values

    def _to_device(self, batch: dict):
        data, target = batch['data'].to(self.device, non_blocking=True), batch['target']
        if isinstance(target, list):
            return data, [t.to(self.device, non_blocking=True) for t in target]
        return data, target.to(self.device, non_blocking=True)

    def _autocast(self):
        return torch.autocast(self.device.type, enabled=True) if self.device.type == 'cuda' else dummy_context()

    def _hints(self, batch: dict, target: torch.Tensor) -> torch.Tensor | HintMap | None:
        """The teacher's hints, as the network takes them, or None; target: at the highest resolution."""
        if "hint_mask" not in batch:
            return None
        mask, listed = batch["hint_mask"].to(self.device, non_blocking=True), batch.get("hint_listed")
        if self.label_manager.has_regions:
            return hint_channels(target, mask, self.label_manager.num_segmentation_heads, True, listed)
        spread = batch.get("hint_spread")
        return hint_map(target, mask, listed, None if spread is None else spread.to(self.device, non_blocking=True))

    def _forward(self, data: torch.Tensor, num_full: int, mix: Mix | None = None, **options):
        """The outputs of student and teacher; None for the teacher if the network has none."""
        if self.two_branches:
            return self.network(data, num_full, mixed=None if mix is None else mix(data), **options)
        return self.network(mixed(data, mix)), None

    def _update_weights(self, loss: torch.Tensor) -> torch.Tensor:
        """Take an optimiser step as nnU-Net does, unless the gradient is not finite; returns the gradient's norm."""
        if self.grad_scaler is None:
            loss.backward()
            gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            if torch.isfinite(gradient):  # the scaler checks this itself
                self.optimizer.step()
            return gradient
        self.grad_scaler.scale(loss).backward()
        self.grad_scaler.unscale_(self.optimizer)
        gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        return gradient

    def run_training(self):
        """nnU-Net's training; if it ends early, the log says what it can be continued from."""
        try:
            # SIGTERM ends each of several ranks at once: a rank that waits for the others in C would not notice a
            # Python handler.
            with nullcontext() if self.is_ddp else terminable():
                super().run_training()
        except BaseException as error:
            if isinstance(error, InputError) and not self.iteration:
                raise  # nothing had begun
            stopped, reason = explain_stop(error, self.output_folder, self.current_epoch,
                                           begun=self.iteration > 0 or self.continued)
            self.print_to_log_file(stopped)
            if reason:
                raise TrainingError(f"{reason} {stopped}") from error
            raise

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.iteration = self.current_epoch * self.num_iterations_per_epoch  # also after --c

    def on_train_epoch_end(self, train_outputs: list[dict]):
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs(train_outputs)
        for key in outputs:
            if key != "loss":
                self.logger.log(key, float(np.mean(gather(np.mean(outputs[key])))), self.current_epoch)
        self.logger.log("second_stage", float(self.student_alone), self.current_epoch)

    # ---- validation -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict) -> dict:
        data, target = self._to_device(batch)
        # nnU-Net's loader, which draws validation cases that are not fully annotated, does not tell their classes
        listed = self._listed_classes(batch)["listed"] if self.hidden else None
        with self._autocast():
            highest_target = target[0] if self.enable_deep_supervision else target
            hints = self._hints(batch, highest_target) if self.two_branches else None
            student, teacher = self._forward(data, data.shape[0], hints=hints, with_teacher=not self.student_alone)
            if not self.enable_deep_supervision:
                student, teacher, target = [student], [teacher], [target]
            teacher = [None] if teacher is None else teacher
            loss = sum(weight * self.loss.supervised(s, t, listed)
                       for weight, s, t in zip(self.loss.resolution_weights, student, target) if weight)
        labels = self.label_manager.ignore_label, self.label_manager.has_regions, listed
        result = {"loss": loss.cpu().numpy(), **hard_counts(student[0], highest_target, *labels)}
        if teacher[0] is not None:
            result |= {f"teacher_{k}": v for k, v in hard_counts(teacher[0], highest_target, *labels).items()}
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        curves = self.logger.local_logger.my_fantastic_logging
        previous = curves["ema_fg_dice"][-1] if curves["ema_fg_dice"] else 0.0
        with warnings.catch_warnings():
            # the Dice of a class in no patch of the epoch is 0 / 0, NaN
            warnings.simplefilter("ignore", RuntimeWarning)
            super().on_validation_epoch_end(val_outputs)
            teacher = self._teacher_dice(val_outputs)
            self.logger.log("teacher_mean_fg_dice", float(np.nanmean(teacher)), self.current_epoch)
        self.logger.log("teacher_dice_per_class_or_region", teacher, self.current_epoch)
        if np.isnan(curves["ema_fg_dice"][-1]):
            # An epoch without any foreground would make the moving average NaN for good, and no checkpoint the best.
            curves["ema_fg_dice"][-1] = previous

    def _teacher_dice(self, val_outputs: list[dict]) -> list[float]:
        outputs = collate_outputs(val_outputs)
        if "teacher_tp_hard" not in outputs:
            return [float("nan")] * len(outputs["tp_hard"][0])
        return dice(*(sum(gather(np.sum(outputs[f"teacher_{count}"], 0))) for count in COUNTS))

    def on_epoch_end(self):
        def last(key: str):
            return np.round(self.logger.get_value(key, step=-1), 4).tolist()

        self.print_to_log_file("terms", {term: last(f"loss_{term}") for term in TERMS}, "| student's confidence",
                               last("student_confidence"), "| annotated share", last("annotated_share"))
        with_hints = " (with simulated hints)" if self.validation_hints else ""
        if not self.student_alone:
            self.print_to_log_file(f"Pseudo dice of the teacher{with_hints}", last("teacher_dice_per_class_or_region"))
        super().on_epoch_end()
        curves = self.logger.local_logger.my_fantastic_logging
        if self.local_rank == 0:
            plot_curves(curves, join(self.output_folder, "progress_confkd.png"))
        left = self.num_epochs - self.current_epoch
        if left:
            started = curves["epoch_start_timestamps"][self.first_epoch:][-5:]
            took = np.median(np.diff([*started, time()]))  # nnU-Net's epoch time leaves out checkpoints and pictures
            to_complete = self.second_stage is not None and not self.student_alone
            self.print_to_log_file(f"Time left: {duration(left * took)} for {left} of "
                                   f"{counted(self.num_epochs, 'epoch')}, "
                                   f"{'the completion of the labels ' if to_complete else ''}and then the validation")

    def print_to_log_file(self, *args, **options):
        """nnU-Net's method, with lists of numbers as Python prints them: 0.7, and not np.float32(0.7)."""
        super().print_to_log_file(*(
            [round(float(number), 4) if isinstance(number, np.floating) else number for number in value]
            if isinstance(value, list) else value for value in args), **options)

    def plot_network_architecture(self):
        """Nothing: nnU-Net's drawing no longer works with any version of PyTorch that it takes, and only complains."""

    def perform_actual_validation(self, save_probabilities: bool = False):
        """nnU-Net's validation, of both branches (see :func:`nnunet_confkd.training.validation.validate`)."""
        validate(self, save_probabilities)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Save atomically: the previous checkpoint is replaced only after the new one has been completely written."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        try:
            with written_whole(filename, sole_writer=True) as aside:
                super().save_checkpoint(str(aside))
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer
            free = shutil.disk_usage(os.path.dirname(filename) or ".").free / 1e9
            raise TrainingError(f"{filename}: the checkpoint could not be written ({error}). {free:.1f} GB of the disk "
                                f"are free.") from error

    def load_checkpoint(self, filename_or_checkpoint) -> None:
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except RuntimeError as error:  # of load_state_dict
            if "state_dict" not in str(error):
                raise
            raise InputError(
                f"{filename_or_checkpoint}: holds another network than the plans ask for. If the training is of "
                f"version 0.1, add \"weight_teacher\": 1, \"complete_at\": 0, \"teacher_width\": 1 and "
                f"\"hint_watershed\": false to the confkd block of {self.configuration_name} in "
                f"{self.plans_manager.plans_name}.json of the preprocessed data set. Else undo what you changed in the "
                f"plans or in the data set.") from error
        self.continued = True
        self._add_missing_curves()
        if self.second_stage is not None and (began := self._begin_of_loaded_stage()):
            self._leave_teacher_out(began)

    def _add_missing_curves(self) -> None:
        """Add our curves, as long as nnU-Net's (a checkpoint of another version may lack some)."""
        curves = self.logger.local_logger.my_fantastic_logging
        for key in CURVES:
            curves.setdefault(key, [float("nan")] * len(curves["train_losses"]))
