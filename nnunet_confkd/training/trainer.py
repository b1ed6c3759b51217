"""ConfKDTrainer: nnU-Net's trainer with a teacher and a student decoder, trained from mixed supervision.

It joins the network, the losses, the supervision and the settings by nnU-Net's hooks, and computes nothing itself.
"""
from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json, save_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd import __version__
from nnunet_confkd.data.json_files import changed_since_planning, planning_text, read_folds, read_json
from nnunet_confkd.data.patients import patients_of, single_patient_text, split_full_cases
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
from nnunet_confkd.errors import InputError, TrainingError, shown
from nnunet_confkd.files import written_whole
from nnunet_confkd.processes import terminable
from nnunet_confkd.training.batches import StratifiedLoader, TrainingCases, label_padding
from nnunet_confkd.training.curves import CURVES, plot_curves
from nnunet_confkd.training.hints import KEPT, HintSampler, hint_channels
from nnunet_confkd.training.losses import TERMS, ConfKDLoss, PartialSupervision, annotated_voxels, confidence
from nnunet_confkd.training.network import TwoBranchUNet, unwrap
from nnunet_confkd.training.recovery import Divergence
from nnunet_confkd.training.settings import Settings, without_removed
from nnunet_confkd.training.validation import check_first_stage, validate


class ConfKDTrainer(nnUNetTrainer):
    """nnU-Net's trainer for full, partial and missing labels in one run (see :mod:`nnunet_confkd.training.losses`).

    The student (nnU-Net's decoder) predicts after training; the teacher is a second decoder on the same encoder.
    Settings: :class:`nnunet_confkd.training.settings.Settings`, overridden by a `confkd` block in the configuration, and by
    `fixed_settings` of a variant, which always wins: the variant's name is what the results are filed under.

    Raises InputError before any training: unknown or bad settings, an ignore label that is not the
    highest, plans of another data set, no fully labelled case, a network without encoder and decoder.
    """

    fixed_settings: dict = {}

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        # before nnU-Net makes any folder
        configuration_dict = PlansManager(plans).get_configuration(configuration).configuration
        self.settings = Settings.from_blocks(configuration_dict.get("confkd", {}), self.fixed_settings)
        check_labels(dataset_json)
        if "file_ending" not in dataset_json:
            raise InputError('dataset.json: lacks "file_ending"')
        _check_plans_belong(plans, dataset_json)
        changed = _changed_since_planning(plans["dataset_name"], dataset_json)
        if changed and not _has_begun(plans, configuration, fold, type(self).__name__):
            raise InputError(changed)
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.settings.epochs is not None:
            self.num_epochs = self.settings.epochs
        if self.settings.iterations_per_epoch is not None:
            self.num_iterations_per_epoch = self.settings.iterations_per_epoch
            self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // 5)  # nnU-Net's share
        # plans travel with the model: so do the settings that it was trained with
        self.plans_manager.plans["configurations"][configuration]["confkd"] = self.settings.as_dict()
        if changed:
            self.print_to_log_file(f"WARNING: {changed}. This training has begun and goes on with the second.")
        self.kinds: dict[str, str] | None = None  # -> find_supervision
        self.iteration = 0  # training steps done
        self.continued = False  # -> load_checkpoint
        self.divergence = Divergence(self.settings.max_nonfinite_steps)
        self._add_missing_curves()

    # ---- network and loss -------------------------------------------------------------------------------------------

    def initialize(self):
        if self.settings.seed is not None:
            self._seed(self.settings.seed)  # equal on all ranks: they start from equal weights
        super().initialize()

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):
        return TwoBranchUNet(nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision))

    @property
    def two_branches(self) -> bool:
        return isinstance(unwrap(self.network), TwoBranchUNet)

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
        settings, regions = self.settings, self.label_manager.has_regions
        supervised = PartialSupervision(stock, self.label_manager.ignore_label, regions, ddp=self.is_ddp)
        return ConfKDLoss(supervised, {term: getattr(settings, f"weight_{term}") for term in TERMS},
                          resolution_weights=resolution_weights, regions=regions, kl_images=settings.kl_images,
                          extra_resolutions=settings.extra_resolutions)

    # ---- supervision and data ---------------------------------------------------------------------------------------

    def find_supervision(self) -> dict[str, str]:
        """Kind of every preprocessed case; found once, said in the log."""
        if self.kinds is not None:
            return self.kinds
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        cache = join(self.preprocessed_dataset_folder_base,
                     f"confkd_supervision_{self.configuration_manager.data_identifier}.json")
        table = self.dataset_json.get(TABLE_KEY)
        with self._first_rank_first():  # it counts, and keeps the counts for the others
            counts = annotation_counts(self.preprocessed_dataset_folder, cases, self.label_manager, cache)
            kinds = decide_kinds(counts, self.label_manager, table)
            self.print_to_log_file(f"Supervision of the data set: {summary(kinds)}")
            suspects = [case for case, kind in kinds.items() if kind == UNLABELLED != (table or {}).get(case)]
            if self.local_rank == 0 and suspects:
                lost = lost_annotations(suspects, join(self.preprocessed_dataset_folder_base, "gt_segmentations"),
                                        self.dataset_json["file_ending"],
                                        self.plans_manager.image_reader_writer_class(), self.label_manager.ignore_label)
                if lost:
                    self.print_to_log_file(f"WARNING: resampling dropped every annotated voxel of {len(lost)} "
                                           "partially annotated case(s), which count as unlabelled now: "
                                           f"{', '.join(lost)}")
        self.kinds = kinds
        return kinds

    @contextmanager
    def _first_rank_first(self):
        """Let the first rank run a block before the others, however long it takes.

        The wait has its own process group, because nccl gives up every wait after 10 minutes.
        """
        if not self.is_ddp:
            yield
            return
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        if self.local_rank != 0:
            dist.barrier(group)
        yield
        if self.local_rank == 0:
            dist.barrier(group)

    def do_split(self):
        """nnU-Net's, but never a random split, and never by default a validation on partial labels."""
        if self.fold != "all":
            kinds = self.find_supervision()
            splits_file = join(self.preprocessed_dataset_folder_base, "splits_final.json")
            pattern = self.dataset_json.get("patient_pattern")
            ours = pattern is not None or set(kinds.values()) != {FULL}
            if ours and self.local_rank == 0 and not isfile(splits_file):
                require_full(kinds)
                splits = split_full_cases(kinds, patients_of(kinds, pattern))
                self.print_to_log_file(f"Writing {splits_file}: {len(splits)} folds of the fully labelled cases; all "
                                       f"others train in every fold.")
                save_json(splits, splits_file)
            if self.is_ddp:
                dist.barrier()  # no rank reads a file that is half written
            num_splits = len(read_folds(splits_file)) if isfile(splits_file) else 5  # nnU-Net's own
            if self.fold >= num_splits:
                raise InputError(
                    f"fold {self.fold} was asked for, but {splits_file} has {num_splits} fold(s), 0 to {num_splits - 1}. "
                    f"nnU-Net would make a random split here, with partially annotated cases in validation. Use one of "
                    f"these folds, add one to the file, or train on fold 'all'. If the file is deleted, the next training "
                    f"writes up to five folds over the fully annotated cases.")
        return super().do_split()

    def get_tr_and_val_datasets(self):
        kinds = self.find_supervision()
        dataset_tr, dataset_val = super().get_tr_and_val_datasets()
        missing = sorted({*dataset_tr.identifiers, *dataset_val.identifiers} - set(kinds))
        if missing:
            raise InputError(f"splits_final.json names cases that are not preprocessed: {', '.join(missing)}")
        training = {case: kinds[case] for case in dataset_tr.identifiers}
        require_full(training)
        self.print_to_log_file(f"Training cases: {summary(training)}")
        if self.fold != "all":
            patients = patients_of(kinds, self.dataset_json.get("patient_pattern"))
            fold = {"train": list(training), "val": list(dataset_val.identifiers)}
            command = f"confkd train {int(self.plans_manager.dataset_name[7:10])} {self.configuration_name} all"
            if text := single_patient_text({f"fold {self.fold}": fold}, kinds, patients, command):
                self.print_to_log_file(f"WARNING: {text}.")
        if self.is_cascaded:
            check_first_stage(self)
        if set(training.values()) == {FULL}:
            self.print_to_log_file("WARNING: every training case is fully labelled. Nothing is left for the student to "
                                   "learn from partial labels; this is nnU-Net with self-distillation.")
        dataset_tr = self._training_cases(dataset_tr)
        full = [case for case in dataset_val.identifiers if kinds[case] == FULL]
        if len(full) < len(dataset_val.identifiers):
            self.print_to_log_file(f"WARNING: {len(dataset_val.identifiers) - len(full)} validation case(s) are not fully "
                                   f"labelled. " + ("The pseudo-Dice is that of the others." if full else "There is no "
                                                    "other: the pseudo-Dice counts annotated voxels only."))
        dataset_val.identifiers = full or dataset_val.identifiers
        with_hints = self.validation_hints is not None  # asked of all ranks: it reads the split, which they do together
        self._record(training, dataset_val.identifiers, with_hints)
        return dataset_tr, dataset_val

    def _training_cases(self, dataset) -> TrainingCases:
        unlabelled = [case for case in dataset.identifiers if self.kinds[case] == UNLABELLED]
        return TrainingCases(dataset, unlabelled, self.label_manager.ignore_label)

    @property
    def _label_options(self) -> dict:
        """What nnU-Net's transforms are told of the labels."""
        labels = self.label_manager
        return dict(is_cascaded=self.is_cascaded, foreground_labels=labels.foreground_labels, ignore_label=labels.ignore_label,
                    regions=labels.foreground_regions if labels.has_regions else None)

    @property
    def _loader_options(self) -> dict:
        return dict(oversample_foreground_percent=self.oversample_foreground_percent, sampling_probabilities=None,
                    pad_sides=None, probabilistic_oversampling=self.probabilistic_oversampling)

    @property
    def _strata(self) -> dict:
        return dict(kinds=self.kinds, full_share=self.settings.full_share, unlabelled_share=self.settings.unlabelled_share)

    def _with_padding(self, transforms):
        """nnU-Net's transforms; beside an ignore label the loader decides what the padding is."""
        if self.label_manager.has_ignore_label:
            label_padding(transforms, self.label_manager.ignore_label)
        return transforms

    @cached_property
    def validation_hints(self) -> HintSampler | None:
        """Simulates annotations of the validation cases, for the teacher: it has seen partially annotated training cases of this fold.

        None where the teacher does not learn to use hints, or where a validation case is not fully annotated.
        """
        if not self.settings.uses_hints:
            return None
        train, val = self.do_split()
        kinds = self.find_supervision()
        train = [case for case in train if case in kinds]
        if PARTIAL not in (kinds[case] for case in train) or any(kinds.get(case) != FULL for case in val):
            return None
        sampler = HintSampler(self.label_manager.ignore_label, self.label_manager.has_regions, no_hints=0)
        patch_size = self.configuration_manager.patch_size
        cases = self.dataset_class(self.preprocessed_dataset_folder, train,
                                   folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage)
        transforms = self._with_padding(self.get_validation_transforms(None, **self._label_options))
        loader = StratifiedLoader(self._training_cases(cases), self.configuration_manager.batch_size, patch_size, patch_size, self.label_manager,
                                  transforms=transforms, **self._strata, **self._loader_options)
        before = np.random.get_state()
        np.random.seed(12345)  # the same hints in every validation
        for _ in range(4 * KEPT):
            if sampler.images["annotated"] < KEPT:
                sampler(next(loader))
        np.random.set_state(before)
        return sampler

    def get_dataloaders(self):
        """nnU-Net's body, with a stratified loader: there is no hook for the class."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        patch_size = self.configuration_manager.patch_size
        deep_supervision_scales = self._get_deep_supervision_scales()
        (rotation_for_DA, do_dummy_2d_data_aug, initial_patch_size,
         mirror_axes) = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        tr_transforms = self._with_padding(self.get_training_transforms(
            patch_size, rotation_for_DA, deep_supervision_scales, mirror_axes, do_dummy_2d_data_aug,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm, **self._label_options))
        val_transforms = self._with_padding(self.get_validation_transforms(deep_supervision_scales, **self._label_options))
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        hints = None
        if self.settings.uses_hints and any(self.kinds[case] == PARTIAL for case in dataset_tr.identifiers):
            hints = HintSampler(self.label_manager.ignore_label, self.label_manager.has_regions)
        dl_tr = StratifiedLoader(dataset_tr, self.batch_size, initial_patch_size, patch_size, self.label_manager, offset=self.local_rank,
                                 complete=hints, transforms=tr_transforms, **self._strata, **self._loader_options)
        val = dataset_val, self.batch_size, patch_size, patch_size, self.label_manager
        if all(self.kinds[case] == FULL for case in dataset_val.identifiers):
            dl_val = StratifiedLoader(*val, complete=deepcopy(self.validation_hints), transforms=val_transforms, **self._strata,
                                      **self._loader_options)
        else:
            dl_val = nnUNetDataLoader(*val, transforms=val_transforms, **self._loader_options)
        processes = get_allowed_n_proc_DA()
        if self.settings.seed is not None:
            # differs between ranks, and after a restart, which must not see the first batches again
            seed = self.settings.seed + 1009 * self.local_rank + 100003 * self.current_epoch
            self._seed(seed)
        if processes == 0:
            loaders = SingleThreadedAugmenter(dl_tr, None), SingleThreadedAugmenter(dl_val, None)
        else:
            def start(loader, processes, cached, offset):
                seeds = None if self.settings.seed is None else [seed + offset + i for i in range(processes)]
                return NonDetMultiThreadedAugmenter(
                    data_loader=loader, transform=None, num_processes=processes, num_cached=cached, seeds=seeds,
                    pin_memory=self.device.type == 'cuda', wait_time=0.002)
            loaders = (start(dl_tr, processes, max(6, processes // 2), 0),
                       start(dl_val, max(1, processes // 2), max(3, processes // 4), 503))
        for loader in loaders:
            next(loader)
        return loaders

    @staticmethod
    def _seed(seed: int) -> None:
        seed %= 2 ** 32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _record(self, training: dict[str, str], validation: list[str], teacher_with_hints: bool) -> None:
        """Write to `confkd.json` in the fold's folder what is trained on what.

        If a training is continued with other settings, the earlier ones are kept under "history", with the epoch until
        which they were used.
        """
        if self.local_rank != 0:
            return
        file, settings, history = join(self.output_folder, "confkd.json"), self.settings.as_dict(), []
        if self.continued and isfile(file):
            before = read_json(file)
            earlier, history = without_removed(before.get("settings", {})), before.get("history", [])
            changed = [f"{name}: {shown(earlier.get(name))} -> {shown(settings.get(name))}"
                       for name in sorted({*earlier, *settings}) if earlier.get(name) != settings.get(name)]
            if changed:
                self.print_to_log_file(f"WARNING: this training is continued with other settings than before: "
                                       f"{', '.join(changed)}. {file} keeps both.")
                history = [*history, {"until_epoch": self.current_epoch, "nnunet_confkd": before.get("nnunet_confkd"),
                                      "settings": earlier}]
        record = {"trainer": type(self).__name__, "nnunet_confkd": __version__, "settings": settings,
                  "supervision": training, "pseudo_dice_on": list(validation),
                  "teacher_validated_with_hints": teacher_with_hints, "history": history}
        with written_whole(file) as aside, open(aside, "w", encoding="utf-8") as f:
            json.dump(record, f, indent=2)

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self):
        super().on_train_start()
        self.print_to_log_file(f"ConfKD settings: {self.settings}")

    def _forward(self, data: torch.Tensor, num_full: int, **options):
        """The outputs of student and teacher; None for the teacher of a network that has none."""
        if self.two_branches:
            return self.network(data, num_full, **options)
        return self.network(data), None

    def _to_device(self, batch: dict):
        data, target = batch['data'].to(self.device, non_blocking=True), batch['target']
        if isinstance(target, list):
            return data, [t.to(self.device, non_blocking=True) for t in target]
        return data, target.to(self.device, non_blocking=True)

    def _autocast(self):
        return torch.autocast(self.device.type, enabled=True) if self.device.type == 'cuda' else dummy_context()

    def train_step(self, batch: dict) -> dict:
        data, target = self._to_device(batch)
        num_full = batch['num_full']
        highest_target = target[0] if self.enable_deep_supervision else target
        self.iteration += 1
        progress = self.iteration / (self.num_epochs * self.num_iterations_per_epoch)
        kl_ramp = self.settings.kl_ramp(progress)

        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            student, teacher = self._forward(data, num_full, hints=self._hints(batch, highest_target),
                                             teach_all=self.settings.kl_on_non_full and kl_ramp > 0)
            loss, terms = self.loss(student, teacher, target, num_full, kl_ramp)

        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            gradient = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            if torch.isfinite(gradient):  # the scaler looks for itself
                self.optimizer.step()

        regions = self.label_manager.has_regions
        highest = student[0] if self.enable_deep_supervision else student
        labelled = annotated_voxels(highest_target, self.label_manager.ignore_label, regions)
        watched = {"loss": loss.detach(), **{f"loss_{term}": value for term, value in terms.items()}, "gradient": gradient}
        values = {**watched, "student_confidence": confidence(highest.detach(), regions), "annotated_share": labelled.float().mean()}
        # one transfer for all of them
        values = dict(zip(values, torch.stack([v.float() for v in values.values()]).cpu().numpy()))
        warning = self.divergence.look({name: values[name] for name in watched}, self.current_epoch, batch.get("keys", ()),
                                       scaled=self.grad_scaler is not None)
        if warning:
            self.print_to_log_file(warning)
        del values["gradient"]
        return values

    def _hints(self, batch: dict, target: torch.Tensor) -> torch.Tensor | None:
        if "hint_mask" not in batch:
            return None
        return hint_channels(target, batch["hint_mask"].to(self.device, non_blocking=True), self.label_manager.num_segmentation_heads,
                             self.label_manager.has_regions)

    def run_training(self):
        """nnU-Net's; if it does not get to its end, say what is left to continue from.

        SIGTERM ends each of several ranks at once: a rank that waits for the others in C would not notice a Python
        handler.
        """
        try:
            with nullcontext() if self.is_ddp else terminable():
                super().run_training()
        except InputError:
            raise  # nothing had begun
        except BaseException as error:
            left = [name for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
                    if isfile(join(self.output_folder, name))]
            stopped = (f"The training stopped in epoch {self.current_epoch}. " + (
                f"{left[0]} is whole: --c goes on from it." if left else "There is no checkpoint to go on from yet."))
            self.print_to_log_file(stopped)
            if isinstance(error, TrainingError):
                raise TrainingError(f"{error} {stopped}") from error
            if isinstance(error, RuntimeError) and "background workers" in str(error):
                raise TrainingError("a process that loads and augments the data has ended. What it said stands above; if it said nothing, it "
                                    f"was killed, most likely for want of memory (nnUNet_n_proc_DA: fewer processes). {stopped}") from error
            raise

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.iteration = self.current_epoch * self.num_iterations_per_epoch  # after --c, too

    def on_train_epoch_end(self, train_outputs: list[dict]):
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs(train_outputs)
        for key in outputs:
            if key != "loss":
                self.logger.log(key, float(np.mean(self._gather(np.mean(outputs[key])))), self.current_epoch)

    def _gather(self, value) -> list:
        """A value of every rank."""
        if not self.is_ddp:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    # ---- validation -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict) -> dict:
        data, target = self._to_device(batch)
        with self._autocast():
            hints = self._hints(batch, target[0] if self.enable_deep_supervision else target) if self.two_branches else None
            student, teacher = self._forward(data, data.shape[0], hints=hints)
            if not self.enable_deep_supervision:
                student, teacher, target = [student], [teacher], [target]
            loss = sum(w * self.loss.supervised(s, t)
                       for w, s, t in zip(self.loss.resolution_weights, student, target) if w)
        result = {"loss": loss.cpu().numpy(), **self._hard_counts(student[0], target[0])}
        if self.two_branches:
            result |= {f"teacher_{k}": v for k, v in self._hard_counts(teacher[0], target[0]).items()}
        return result

    def _hard_counts(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, np.ndarray]:
        """True positives, false positives and false negatives per foreground class or region, of the annotated voxels,
        as nnU-Net counts them for its pseudo-Dice."""
        regions, ignore_label = self.label_manager.has_regions, self.label_manager.ignore_label
        mask = None
        if ignore_label is not None:
            mask = annotated_voxels(target, ignore_label, regions)
            target = target[:, :-1] if regions else torch.where(mask, target, 0)
        if regions:
            predicted = output > 0  # sigmoid > 0.5
        else:
            predicted = torch.zeros_like(output, dtype=torch.bool).scatter_(1, output.argmax(1, keepdim=True), True)
        axes = [0, *range(2, output.ndim)]
        counts = get_tp_fp_fn_tn(predicted.float(), target, axes, None if mask is None else mask.float())[:3]
        first = 0 if regions else 1  # without the background
        return {key: c.cpu().numpy()[first:] for key, c in zip(("tp_hard", "fp_hard", "fn_hard"), counts)}

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        curves = self.logger.local_logger.my_fantastic_logging
        previous = curves["ema_fg_dice"][-1] if curves["ema_fg_dice"] else 0.0
        with warnings.catch_warnings():
            # a class in no patch of the epoch: 0 / 0, its Dice is NaN
            warnings.simplefilter("ignore", RuntimeWarning)
            super().on_validation_epoch_end(val_outputs)
            teacher = self._teacher_dice(val_outputs)
            self.logger.log("teacher_mean_fg_dice", float(np.nanmean(teacher)), self.current_epoch)
        self.logger.log("teacher_dice_per_class_or_region", teacher, self.current_epoch)
        if np.isnan(curves["ema_fg_dice"][-1]):
            # one epoch without any foreground would make the moving average NaN for good, and no checkpoint the best
            curves["ema_fg_dice"][-1] = previous

    def _teacher_dice(self, val_outputs: list[dict]) -> list[float]:
        outputs = collate_outputs(val_outputs)
        if "teacher_tp_hard" not in outputs:
            return [float("nan")] * len(outputs["tp_hard"][0])
        tp, fp, fn = (sum(self._gather(np.sum(outputs[f"teacher_{key}"], 0))) for key in ("tp_hard", "fp_hard", "fn_hard"))
        return [float(d) for d in 2 * tp / (2 * tp + fp + fn)]

    def on_epoch_end(self):
        value = self.logger.get_value
        self.print_to_log_file("terms", {term: round(value(f"loss_{term}", step=-1), 4) for term in TERMS},
                               "| student's confidence", round(value("student_confidence", step=-1), 4),
                               "| annotated share", round(value("annotated_share", step=-1), 4))
        self.print_to_log_file("Pseudo dice of the teacher" + (" (with simulated hints)" if self.validation_hints else ""),
                               np.round(value("teacher_dice_per_class_or_region", step=-1), 4).tolist())
        super().on_epoch_end()
        if self.local_rank == 0:
            plot_curves(self.logger.local_logger.my_fantastic_logging, join(self.output_folder, "progress_confkd.png"))

    def perform_actual_validation(self, save_probabilities: bool = False):
        """nnU-Net's, of both branches in one pass (see :func:`nnunet_confkd.training.validation.validate`)."""
        validate(self, save_probabilities)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Save atomically: the previous checkpoint is replaced only after the new one has been completely written."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        try:
            with written_whole(filename) as aside:
                super().save_checkpoint(str(aside))
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer
            free = shutil.disk_usage(os.path.dirname(filename) or ".").free / 1e9
            raise TrainingError(f"{filename}: the checkpoint could not be written ({error}). {free:.1f} GB of the disk "
                                f"are free.") from error

    def load_checkpoint(self, filename_or_checkpoint) -> None:
        super().load_checkpoint(filename_or_checkpoint)
        self.continued = True
        self._add_missing_curves()

    def _add_missing_curves(self) -> None:
        """Our curves beside nnU-Net's, as long as those (a checkpoint of another version may lack some)."""
        curves = self.logger.local_logger.my_fantastic_logging
        for key in CURVES:
            curves.setdefault(key, [float("nan")] * len(curves["train_losses"]))


def _check_plans_belong(plans: dict, dataset_json: dict) -> None:
    """nnU-Net takes the data from where the plans say: copied plans would silently train on another data set."""
    if not nnUNet_preprocessed.is_set():
        return
    own = join(nnUNet_preprocessed, plans["dataset_name"], "dataset.json")
    if not isfile(own) or load_json(own) != dataset_json:
        raise InputError(
            f"these plans ('{plans['plans_name']}') are for {plans['dataset_name']}, which is not the data set that was "
            f"asked for: {own} " + ("differs from its dataset.json" if isfile(own) else "does not exist")
            + ". Plan and preprocess the data set itself (nnUNetv2_plan_and_preprocess); to carry plans over from another "
              "one use nnUNetv2_move_plans_between_datasets.")


def _changed_since_planning(dataset: str, dataset_json: dict) -> str | None:
    """What is wrong if the raw dataset.json was edited after planning; None where there is none to compare with."""
    if not (nnUNet_raw.is_set() and nnUNet_preprocessed.is_set()):
        return None
    raw, planned = (join(folder, dataset, "dataset.json") for folder in (nnUNet_raw, nnUNet_preprocessed))
    try:
        keys = changed_since_planning(read_json(raw), dataset_json)
    except InputError:
        return None  # training does not need the raw data
    return planning_text(raw, planned, keys, int(dataset[7:10])) if keys else None


def _has_begun(plans: dict, configuration: str, fold: int | str, trainer: str) -> bool:
    """Whether there is a checkpoint to go on from, or to validate."""
    if not nnUNet_results.is_set():
        return False
    folder = join(nnUNet_results, plans["dataset_name"], f"{trainer}__{plans['plans_name']}__{configuration}", f"fold_{fold}")
    return any(isfile(join(folder, f"checkpoint_{name}.pth")) for name in ("final", "latest", "best"))
