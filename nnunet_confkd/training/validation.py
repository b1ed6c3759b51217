"""The final validation of both branches, in one pass over the encoder; and the cascade's input for training cases."""
from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import isfile, join, maybe_mkdir_p
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import (
    compute_metrics_on_folder,
    label_or_region_to_key,
    save_summary_json,
)
from nnunetv2.inference.export_prediction import export_prediction_from_logits, resample_and_save
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetNumpy
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnunet_confkd.data.json_files import read_folds, read_json
from nnunet_confkd.data.supervision import FULL, OUTSIDE
from nnunet_confkd.errors import InputError, TrainingError, some
from nnunet_confkd.files import written_whole
from nnunet_confkd.training.batches import label_outside
from nnunet_confkd.training.hints import regions_of, whole_image_hints
from nnunet_confkd.training.names import VALIDATION_FOLDERS
from nnunet_confkd.training.network import TwoBranchUNet, unwrap, without_ddp
from nnunet_confkd.training.prediction_maps import StreamingExport
from nnunet_confkd.training.record import RECORD

SEGMENTATION_ENDINGS = (".b2nd", ".npz")  # of nnU-Net's preprocessed segmentations
LOGIT_BYTES, AT_ONCE = 2, 2 ** 31  # nnU-Net's logits; from so many bytes on, the branches are predicted one by one


# ---- predicting a case ----------------------------------------------------------------------------------------------

class _Heads:
    """What nnUNetPredictor needs of a label manager while it slides its window: the number of output channels."""

    def __init__(self, num_segmentation_heads: int):
        self.num_segmentation_heads = num_segmentation_heads


class OneByOne(Mapping):
    """The logits of each branch of a large case, predicted when they are asked for. Only the last ones are kept."""

    def __init__(self, predictions: dict[str, Callable[[], torch.Tensor]]):
        self.predictions = predictions
        self.last: tuple[str, torch.Tensor | None] = ("", None)

    def __getitem__(self, branch: str) -> torch.Tensor:
        if self.last[0] != branch:
            self.last = ("", None)
            self.last = (branch, self.predictions[branch]())
        return self.last[1]

    def __iter__(self):
        return iter(self.predictions)

    def __len__(self) -> int:
        return len(self.predictions)


class CasePredictor:
    """Predicts preprocessed cases with nnU-Net's sliding window, for one branch or for both in one pass.

    The network's outputs of all branches are treated as channels of one output, so that the encoder runs once.

    Args:
        trainer: A trainer, or an object with the attributes that are read here.
        branches: "student", "teacher" or both.
    """

    def __init__(self, trainer, branches: list[str]):
        self.trainer, self.branches = trainer, branches
        self.predictor = nnUNetPredictor(tile_step_size=0.5, use_gaussian=True, use_mirroring=True,
                                         perform_everything_on_device=True, device=trainer.device, verbose=False,
                                         verbose_preprocessing=False, allow_tqdm=False)
        # a rank without a case does not predict
        self.predictor.manual_initialization(without_ddp(trainer.network), trainer.plans_manager,
                                             trainer.configuration_manager, None, trainer.dataset_json,
                                             type(trainer).__name__, trainer.inference_allowed_mirroring_axes)
        self.heads = trainer.label_manager.num_segmentation_heads

    @contextmanager
    def _output_of(self, branches: list[str], hint_channels: int):
        self.predictor.label_manager = _Heads(self.heads * len(branches))
        module: Any = unwrap(self.trainer.network)
        if not isinstance(module, TwoBranchUNet):
            yield
            return
        before, module.hints_in_input = module.branch, hint_channels
        module.branch = "both" if len(branches) > 1 else branches[0]
        try:
            yield
        finally:
            module.branch, module.hints_in_input = before, 0

    def __call__(self, data, seg_prev: np.ndarray | None, hints: torch.Tensor | None = None
                 ) -> Mapping[str, torch.Tensor]:
        """Predict a preprocessed case.

        Args:
            data: The image, `(C, *spatial)`. It may lie in a file.
            seg_prev: The labels of the previous stage `(*spatial)`, for a cascade.
            hints: Those of the teacher, as :func:`simulated_hints` returns them.

        Returns:
            The logits of each branch, `(heads, *spatial)`: views of one tensor on the CPU. Two branches that need
            more than `AT_ONCE` bytes together are a :class:`OneByOne`.
        """
        size = LOGIT_BYTES * self.heads * len(self.branches) * int(np.prod(data.shape[1:]))
        if len(self.branches) > 1 and size > AT_ONCE:
            return OneByOne({branch: partial(self._alone, branch, data, seg_prev, hints) for branch in self.branches})
        return self._predict(self.branches, data, seg_prev, hints)

    def _alone(self, branch: str, *case) -> torch.Tensor:
        return self._predict([branch], *case)[branch]

    def _predict(self, branches: list[str], data, seg_prev: np.ndarray | None,
                 hints: torch.Tensor | None) -> dict[str, torch.Tensor]:
        data = np.asarray(data[:])
        if self.trainer.is_cascaded:
            data = np.vstack((data, convert_labelmap_to_one_hot(
                seg_prev, self.trainer.label_manager.foreground_labels, output_dtype=data.dtype)))
        image = torch.from_numpy(np.require(data, requirements="W"))
        if hints is not None:
            image = torch.cat((image, hints.to(image.dtype)))
        with self._output_of(branches, 0 if hints is None else len(hints)):
            logits = self.predictor.predict_sliding_window_return_logits(image).cpu()
        return dict(zip(branches, logits.split(self.heads)))


def simulated_hints(trainer, case: str, data: np.ndarray, seg: np.ndarray) -> torch.Tensor | None:
    """Simulate the teacher's hints on a fully annotated case.

    They are the same in every validation of this case with the same partially annotated training cases.

    Args:
        trainer: The trainer, with its `validation_hints`.
        case: Name of the case.
        data: The image, `(C, *spatial)`.
        seg: The ground truth, `(1, *spatial)`.

    Returns:
        Those of `image_hints`; None if the teacher is validated without hints.
    """
    if trainer.validation_hints is None:
        return None
    sampler = deepcopy(trainer.validation_hints)  # it learns from what it sees, and every case must come first
    labels = trainer.label_manager
    label = label_outside(torch.from_numpy(seg[0].astype(np.int16)), labels.ignore_label, full=True)[None]
    mask, listed = sampler.draw_volume(data, regions_of(label, labels)[None], seg[0] != OUTSIDE,
                                       trainer.configuration_manager.patch_size,
                                       np.random.default_rng(crc32(case.encode())))
    return whole_image_hints(data[:sampler.image_channels], label, mask[0], seg[0] != OUTSIDE, labels,
                             trainer.configuration_manager.patch_size, bool(trainer.settings.hint_watershed),
                             None if listed is None or listed.all() else listed)


# ---- writing in other processes -------------------------------------------------------------------------------------

class ExportPool:
    """Hands cases to processes; never more of them wait than there are processes, or two."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self.executor = executor
        self.waiting: set[Future] = set()

    def submit(self, function, *args) -> None:
        """Run `function(*args)` in a process."""
        self.waiting.add(self.executor.submit(function, *args))

    def wait_for_room(self) -> None:
        """Wait until one more case may be submitted. Raises what the function of an earlier one has raised."""
        self._collect(wait(self.waiting, timeout=0).done)
        while len(self.waiting) >= max(2, default_num_processes):  # nnU-Net's two more would need too much memory
            self._collect(wait(self.waiting, return_when=FIRST_COMPLETED).done)

    def wait_for_all(self) -> None:
        """Wait until everything is done. Raises what a function has raised."""
        self._collect(wait(self.waiting).done)

    def _collect(self, done: set[Future]) -> None:
        self.waiting -= done
        for result in done:
            result.result()


@contextmanager
def export_pool() -> Iterator[ExportPool]:
    """Start processes that write segmentations; all work is done at the end.

    nnU-Net's `multiprocessing.Pool` waits for ever if the process that holds its queue is killed.

    Raises:
        TrainingError: One of the processes was killed.
    """
    executor = ProcessPoolExecutor(default_num_processes, multiprocessing.get_context("spawn"))
    try:
        pool = ExportPool(executor)
        yield pool
        pool.wait_for_all()
    except BrokenProcessPool as error:
        raise TrainingError("A process that writes the validation's segmentations was killed; is the memory exhausted? "
                            "The trained network is saved. Repeat the validation alone: the same command with --val, "
                            "and with fewer such processes, e.g. nnUNet_def_n_proc=2, if there is little memory."
                            ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _export_case(logits: dict[str, torch.Tensor], files: dict[str, str], next_stages: list[tuple], properties: dict,
                 plans_manager, configuration_manager, dataset_json: dict, save_probabilities: bool) -> None:
    """Write everything of one case: each branch's segmentation, and the next stages' input from the student.

    This is one task, so that the logits are handed to a process once. They are tensors, which PyTorch moves to shared
    memory; NumPy arrays would be copied through a pipe.
    """
    for branch, file in files.items():
        export = StreamingExport(plans_manager, configuration_manager, dataset_json, measured=())
        export_prediction_from_logits(logits[branch], properties, export.configuration, export.plans, dataset_json,
                                      file, save_probabilities)
    for shape, file, dataset_class in next_stages:
        # Written atomically, because folds that train at the same time may write the same case.
        ending = SEGMENTATION_ENDINGS[issubclass(dataset_class, nnUNetDatasetNumpy)]
        with written_whole(file + ending) as aside:
            resample_and_save(logits["student"], shape, str(aside).removesuffix(ending), plans_manager,
                              configuration_manager, properties, dataset_json, default_num_processes, dataset_class)


def _next_stages(trainer, case: str) -> Iterator[tuple]:
    """The shape, the file without its ending and the dataset class of a case in each next stage of a cascade."""
    for stage in trainer.configuration_manager.next_stage_names or []:
        configuration = trainer.plans_manager.get_configuration(stage)
        folder = join(nnUNet_preprocessed, trainer.plans_manager.dataset_name, configuration.data_identifier)
        dataset_class = infer_dataset_class(folder)
        try:
            data, _, _, _ = dataset_class(folder, [case]).load_case(case)
        except FileNotFoundError:
            trainer.print_to_log_file(f"Predicting the next stage {stage} failed for {case}: its preprocessed file is "
                                      f"missing. Run the preprocessing of {stage} first.")
            continue
        output_folder = join(trainer.output_folder_base, "predicted_next_stage", stage)
        maybe_mkdir_p(output_folder)
        yield data.shape[1:], join(output_folder, case), dataset_class


# ---- the validation -------------------------------------------------------------------------------------------------

def validate(trainer, save_probabilities: bool) -> None:
    """Validate both branches.

    Writes `validation/` (the student, as nnU-Net does) and `validation_teacher/`, each with its `summary.json`. Before
    the next stage of a cascade it also writes `predicted_next_stage`, for validation cases and for training cases
    that no fold validates.

    Args:
        trainer: The trainer, after the training.
        save_probabilities: Whether probabilities are written, too.
    """
    trainer.find_supervision()  # with --val nothing has done so yet
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    has_teacher = isinstance(unwrap(trainer.network), TwoBranchUNet) and not trainer.student_alone
    branches = ["student", "teacher"] if has_teacher else ["student"]
    folders = {branch: join(trainer.output_folder, VALIDATION_FOLDERS[branch]) for branch in branches}
    for folder in folders.values():
        maybe_mkdir_p(folder)
    _, val_cases = trainer.do_split()
    if len(branches) > 1:
        how = ("with simulated annotations as hints, which is what it is trained for" if trainer.validation_hints else
               "without hints")
        trainer.print_to_log_file(f"The teacher is validated {how}.")
    if trainer.local_rank == 0:
        _warn_of_training_cases(trainer, val_cases)
        for folder in folders.values():
            _move_other_cases(trainer, folder, val_cases)

    with export_pool() as pool:
        predict_cases(trainer, val_cases, pool, folders, save_probabilities)
        if trainer.configuration_manager.next_stage_names:
            predict_cases(trainer, _cases_without_validation(trainer), pool, {}, False)

    if trainer.is_ddp:
        dist.barrier()
    if trainer.local_rank == 0:
        for branch, folder in folders.items():
            _evaluate(trainer, branch, folder)
    trainer.set_deep_supervision_enabled(True)
    compute_gaussian.cache_clear()


def predict_cases(trainer, cases: Iterable[str], pool: ExportPool, folders: dict[str, str],
                  save_probabilities: bool) -> None:
    """Predict cases and hand the results to processes that write them. With DDP each rank takes its share.

    Args:
        trainer: The trainer.
        cases: Names of preprocessed cases.
        pool: The processes.
        folders: Where the segmentations of each branch go. If it is empty, the student predicts the input of the next
            stage of a cascade alone.
        save_probabilities: Whether probabilities are written, too.
    """
    branches = list(folders) or ["student"]
    cases = sorted(cases)
    ranks = dist.get_world_size() if trainer.is_ddp else 1
    common = len(cases) // ranks  # what every rank has: there must not be more barriers than that
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases[trainer.local_rank::ranks],
                                    folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage)
    predict = CasePredictor(trainer, branches)
    for i, case in enumerate(dataset.identifiers):
        pool.wait_for_room()
        data, seg, seg_prev, properties = dataset.load_case(case)
        trainer.print_to_log_file(f"predicting {case}, shape {data.shape}, rank {trainer.local_rank}")
        hints = simulated_hints(trainer, case, data[:], seg[:]) if "teacher" in branches else None
        predicted = predict(data, None if seg_prev is None else seg_prev[:], hints)
        one_by_one = isinstance(predicted, OneByOne)
        for part in ([branch] for branch in branches) if one_by_one else (branches,):
            if one_by_one:
                pool.wait_for_all()  # the memory holds the logits of one branch alone
            logits = {branch: predicted[branch] for branch in part}
            pool.submit(_export_case, logits, {branch: join(folders[branch], case) for branch in part if folders},
                        list(_next_stages(trainer, case)) if "student" in part else [], properties,
                        trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json, save_probabilities)
            del logits
        # as nnU-Net does: without a barrier from time to time nccl times out on large data sets
        if trainer.is_ddp and i < common - 1 and (i + 1) % 20 == 0:
            dist.barrier()


def _warn_of_training_cases(trainer, cases: list[str]) -> None:
    """The split may have changed between the training and a validation alone (--val)."""
    file = Path(trainer.output_folder, RECORD)
    if trainer.fold == "all" or not file.is_file():
        return
    trained = sorted(set(cases) & set(read_json(file).get("supervision", ())))
    if trained:
        trainer.print_to_log_file(f"WARNING: {len(trained)} of the {len(cases)} validation cases were training cases "
                                  f"of this network (see {file}): {', '.join(trained)}. Their Dice says nothing about "
                                  f"new cases. If the split was changed after the training, train again.")


def _move_other_cases(trainer, folder: str, cases: list[str]) -> None:
    """Move the files of cases that an earlier validation, with another split, has left into a folder beside this one.

    nnU-Net's evaluation and `nnUNetv2_find_best_configuration` count every segmentation that they find here.
    """
    endings = (trainer.dataset_json["file_ending"], ".npz", ".pkl")
    found = {file.name.removesuffix(ending) for file in Path(folder).iterdir() for ending in endings[:2]
             if file.name.endswith(ending)}
    others = sorted(found - set(cases))
    if not others:
        return
    target = Path(f"{folder}_old_{datetime.now():%Y%m%d_%H%M%S}")
    target.mkdir(exist_ok=True)
    for file in (Path(folder, case + ending) for case in others for ending in endings):
        if file.is_file():
            file.rename(target / file.name)
    trainer.print_to_log_file(f"{folder}: moved the files of {len(others)} cases that this fold does not validate to "
                              f"{target}: {', '.join(others)}")


def _evaluate(trainer, branch: str, folder: str) -> None:
    """Write the summary.json of a branch, and log its Dice."""
    labels = trainer.label_manager
    metrics = compute_metrics_on_folder(
        join(trainer.preprocessed_dataset_folder_base, "gt_segmentations"), folder, join(folder, "summary.json"),
        trainer.plans_manager.image_reader_writer_class(), trainer.dataset_json["file_ending"],
        labels.foreground_regions if labels.has_regions else labels.foreground_labels, labels.ignore_label, chill=True,
        num_processes=default_num_processes)
    if trainer.hidden:
        leave_out_unlisted(metrics, unlisted_labels(trainer), trainer.dataset_json["file_ending"])
        save_summary_json(metrics, join(folder, "summary.json"))
    prefix = "final_val" if branch == "student" else "final_val_teacher"
    for label, values in metrics["mean"].items():
        trainer.logger.log_summary(f"{prefix}/class_{label}_dice", values["Dice"])
    dice = metrics["foreground_mean"]["Dice"]
    trainer.logger.log_summary(f"{prefix}/foreground_dice", dice)
    if branch == "student":
        trainer.print_to_log_file("Validation complete")
    trainer.print_to_log_file(
        "Mean Validation Dice: " if branch == "student" else "Mean Validation Dice of the teacher: ", dice)


def unlisted_labels(trainer) -> dict[str, list]:
    """Return {case: labels or regions that it is not annotated for, as nnU-Net's metrics name them}."""
    labels = trainer.label_manager
    heads = dict(enumerate(labels.foreground_regions)) if labels.has_regions else {
        label: label for label in labels.foreground_labels}
    return {case: [name for head, name in heads.items() if not listed[head]]
            for case, listed in trainer.hidden.items()}


def leave_out_unlisted(metrics: dict, unlisted: Mapping[str, Sequence], file_ending: str) -> None:
    """Take cases out of the metrics of classes that they are not annotated for.

    nnU-Net takes these classes for absent. Their values become NaN, and the means are those of the other cases. The
    entry "confkd_not_annotated" names them.

    Args:
        metrics: What nnU-Net's `compute_metrics_on_folder` returns. It is changed.
        unlisted: Those of :func:`unlisted_labels`.
        file_ending: Of the predictions.
    """
    found = {}
    for entry in metrics["metric_per_case"]:
        case = os.path.basename(entry["prediction_file"]).removesuffix(file_ending)
        for label in unlisted.get(case, ()):
            entry["metrics"][label] = dict.fromkeys(entry["metrics"][label], float("nan"))
            found.setdefault(case, []).append(label)
    if not found:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a class that no case is annotated for has no mean
        for label, means in metrics["mean"].items():
            for name in means:
                means[name] = float(np.nanmean([entry["metrics"][label][name] for entry in metrics["metric_per_case"]]))
        for name in metrics["foreground_mean"]:
            metrics["foreground_mean"][name] = float(np.nanmean([means[name] for means in metrics["mean"].values()]))
    metrics["confkd_not_annotated"] = {case: list(map(label_or_region_to_key, labels))
                                       for case, labels in found.items()}


# ---- cascades -------------------------------------------------------------------------------------------------------

def _cases_without_validation(trainer) -> list[str]:
    """Training cases that no fold validates: no fold would predict them for the next stage of a cascade."""
    train, val = trainer.do_split()
    if trainer.fold == "all":
        return []
    folds = read_folds(join(trainer.preprocessed_dataset_folder_base, "splits_final.json"))
    return sorted(set(train) - set(val) - {case for fold in folds for case in fold["val"]})


def check_first_stage(trainer) -> None:
    """Check the predictions of the first stage of a cascade, before its second stage trains on them.

    The second stage should see what the first stage predicts for images that it was not trained on. A fold of the first
    stage predicts its validation cases for that. Training cases that no trained fold validates were predicted by a
    network that was trained on them, and their predictions are better than those of new images: a warning says so.

    Raises:
        InputError: Predictions are missing.
    """
    folder, stage = trainer.folder_with_segs_from_previous_stage, trainer.configuration_manager.previous_stage_name
    model = os.path.dirname(os.path.dirname(folder))
    train, val = trainer.do_split()
    splits_file = join(trainer.preprocessed_dataset_folder_base, "splits_final.json")
    folds = dict(enumerate(read_folds(splits_file))) if isfile(splits_file) else {}
    trained = [k for k in folds if isfile(join(model, f"fold_{k}", "validation", "summary.json"))]
    lacking = [k for k in folds if k not in trained]

    missing = [case for case in sorted({*train, *val})
               if not any(isfile(join(folder, case + ending)) for ending in SEGMENTATION_ENDINGS)]
    if missing:
        remedy = (_commands(trainer, stage, lacking) or _commands(trainer, stage, trained, " --val")
                  or _commands(trainer, stage, ["all"]))
        raise InputError(f"{folder}: {len(missing)} case(s) lack the prediction of the first stage, {stage}, which the "
                         f"second stage needs: {some(missing)}. Run first: {remedy}")
    validated = {case for k in trained for case in folds[k]["val"]}
    seen = [case for case in train if case not in validated]
    full = [case for case in seen if trainer.find_supervision()[case] == FULL]
    if full:
        remedy = (f"The first stage lacks {len(lacking)} of {len(folds)} folds; train them first: "
                  f"{_commands(trainer, stage, lacking)}" if lacking else
                  f"No fold of {splits_file} validates these cases. If the split is your own, let a fold do so, and "
                  f"train the folds of both stages again.")
        trainer.print_to_log_file(
            f"WARNING: the first stage, {stage}, predicted {len(full)} fully annotated training case(s) with a network "
            f"that was trained on these very cases. Its predictions of new images are worse, so that the second stage "
            f"learns to trust them too much. {remedy}")
    if len(seen) > len(full):
        trainer.print_to_log_file(
            f"WARNING: {len(seen) - len(full)} partially annotated or unlabelled training case(s) validate in no fold, "
            f"so that the first stage, {stage}, predicted them with a network that was trained on them, without their "
            f"missing annotations.")


def _commands(trainer, stage: str, folds: Iterable[int | str], more: str = "") -> str:
    """The commands that train these folds of a stage with the same trainer and plans."""
    plans, name = trainer.plans_manager.plans_name, type(trainer).__name__
    options = (f" -tr {name}" if name != "ConfKDTrainer" else "") + (f" -p {plans}" if plans != "nnUNetPlans" else "")
    number = int(trainer.plans_manager.dataset_name[7:10])
    return "; ".join(f"confkd train {number} {stage} {fold}{options}{more}" for fold in folds)
