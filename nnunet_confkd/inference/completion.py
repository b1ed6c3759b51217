"""The labels of partly labelled training cases, completed by a trained model, as a data set of its own.

Both ignored voxels and classes that a case is not annotated for ("annotated_classes") are completed.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.data.annotated_classes import Listed
from nnunet_confkd.data.folders import folder_name, new_dataset, raw_folder
from nnunet_confkd.data.json_files import read_description, read_json, read_plans
from nnunet_confkd.data.raw_format import Case, with_ignore
from nnunet_confkd.data.resampling import KeepAnnotations
from nnunet_confkd.data.supervision import (
    OUTSIDE,
    PARTIAL,
)
from nnunet_confkd.device import choose_device
from nnunet_confkd.discovery import make_findable
from nnunet_confkd.errors import InputError
from nnunet_confkd.files import write_json
from nnunet_confkd.inference.checkpoints import fold_folders, has_own_teacher, load_checkpoint, require_teacher
from nnunet_confkd.inference.completed_case import CONFIDENCE, PREDICTED, ROWS, CompletedCase
from nnunet_confkd.inference.completed_dataset import CompletedDataset
from nnunet_confkd.inference.expected_time import prediction_text
from nnunet_confkd.inference.known_labels import export_as_known
from nnunet_confkd.inference.prediction import ExportingPredictor, normalised_entropy
from nnunet_confkd.inference.review import map_ending, write_review_list
from nnunet_confkd.inference.uncertainty import write_map
from nnunet_confkd.processes import PROCESSES
from nnunet_confkd.training.batches import real_hints
from nnunet_confkd.training.hints import whole_image_hints
from nnunet_confkd.training.names import CHECKPOINT, TEACHER_CHECKPOINT
from nnunet_confkd.training.network import has_teacher, predicting, unwrap

EXPORT_PROCESSES = 3  # nnU-Net's default, because each process holds the logits of a whole image
NOTE = ("Voxels of these cases that nobody had annotated have labels predicted by the model: do not take them for "
        "truth, in validation least of all.")


@dataclass(frozen=True)
class TrainedModel:
    """The model that completes labels, and how it predicts.

    Attributes:
        folder: TRAINER__PLANS__CONFIGURATION. A stock nnU-Net model of the same labels and channels will do.
        branch: "student", "teacher" or "mean" (of the logits). A teacher that was trained with hints
            (:mod:`nnunet_confkd.training.hints`) gets the annotations of the case as its hints.
        folds: The folds whose logits are averaged. None: all that have the checkpoint.
        checkpoint: The name of the checkpoint. None: the final one; for the teacher that of its own, if it has one.
        device: "cuda", "cpu" or "mps". None: cuda where there is one.

    Examples:
        >>> TrainedModel(Path("MODEL"), branch="teacher").branch
        'teacher'
    """
    folder: Path
    branch: str = "student"
    folds: list[str] | None = None
    checkpoint: str | None = None
    device: str | None = None

    @property
    def checkpoint_name(self) -> str:
        """The name of the checkpoint that predicts."""
        if self.checkpoint is not None:
            return self.checkpoint
        folds = [self.folder / f"fold_{fold}" for fold in self.folds] if self.folds else [
            fold for fold in fold_folders(self.folder)
            if any((fold / name).is_file() for name in (CHECKPOINT, TEACHER_CHECKPOINT))]
        return TEACHER_CHECKPOINT if has_own_teacher(self.branch, folds) else CHECKPOINT


def complete(source: int | str, model: TrainedModel, dataset_id: int, *, confidence: float | None = None,
             name: str | None = None, processes: int = PROCESSES, link: bool = False) -> Path:
    """Write a copy of a data set in which a model has labelled the ignored voxels and the classes that cases lack.

    Annotated voxels stay as they are, and so do complete cases. A voxel of value 0 in a case that is not annotated for
    all classes becomes background or one of the other classes. With regions, a voxel gets a value that belongs to the
    same annotated regions as its own. Beside the labels, the new data set has a
    folder `confidence` (the largest probability of each voxel), `review_first.csv` and `review_first.json`. Its
    `dataset.json` says under "completed" what was predicted and by which model.

    Args:
        source: The id or the name of the data set.
        model: The model.
        dataset_id: The id of the new data set.
        confidence: Only voxels whose largest probability exceeds it are labelled; the others stay ignored. None: all.
        name: The name of the new data set. None: that of the source and `_completed`.
        processes: The number of processes.
        link: Whether images are hard links instead of copies.

    Returns:
        The new raw folder.

    Raises:
        InputError: There is no such data set or nothing to complete; labels cannot be read or have other values; the
            model has no checkpoint, no teacher, or other labels or channels; the id is taken. All problems of the
            cases are listed at once.

    Examples:
        >>> complete(27, TrainedModel(Path("MODEL"), branch="teacher"), 127)  # doctest: +SKIP
        PosixPath('raw/Dataset127_Hearts_completed')
    """
    if confidence is not None and not 0 <= confidence < 1:
        raise InputError(f"--confidence: a probability from 0 to below 1, not {confidence}")
    completed = CompletedDataset.of(source, name, "completed")
    predictor, folds = _load_predictor(model)
    _require_same_data(completed.folder, completed.described, model.folder, predictor)
    two_branches = has_teacher(predictor.list_of_parameters[0])
    hints = two_branches and model.branch != "student" and _uses_hints(model.folder, folds)
    about = {"model": model.folder.resolve().name,
             "model_dataset": predictor.plans_manager.dataset_name, "branch": model.branch if two_branches else None,
             "hints": hints, "folds": folds, "checkpoint": model.checkpoint_name, "confidence": confidence,
             "note": NOTE}
    dataset = completed.dataset
    with new_dataset(dataset_id, dataset.name) as (target, preprocessed):
        completed.check(processes)
        incomplete = [case for case in dataset.training if case.name in completed.known]
        if confidence is not None:
            dataset.labels = with_ignore(dataset.labels)  # for voxels of which the model is not that sure
        ignore: Any = dataset.labels.get("ignore")
        completions = [CompletedCase(case.name, completed.known[case.name], target, dataset.file_ending, ignore,
                                     confidence) for case in incomplete]
        predictor.completions = {completion.case: completion for completion in completions}
        _predict(predictor, incomplete, target / PREDICTED, processes, completed.hidden, hints)
        rows = [read_json(target / ROWS / f"{case.name}.json") | {"kind_before": completed.kinds[case.name]}
                for case in incomplete]
        about = completed.write(target, preprocessed, completions, rows, about, processes, link)
        write_review_list(target, rows, about)
    return raw_folder() / folder_name(dataset_id, dataset.name)


# ---- the model ------------------------------------------------------------------------------------------------------

class _CompletingPredictor(ExportingPredictor):
    """nnU-Net's predictor that writes the confidence and the row of the review list beside the segmentation.

    Attributes:
        completions: {case: how it is completed}.
    """

    completions: dict[str, CompletedCase]

    def exporter(self):
        return partial(_export, self.completions)


def _export(completions, logits, properties, configuration_manager, plans_manager, dataset_json, output, *args,
            **kwargs) -> None:
    """Write the segmentation, the confidence and the row of the review list; `output` is `TARGET/.predicted/CASE`."""
    completion, writer = completions[Path(output).name], plans_manager.image_reader_writer_class()
    label = writer.read_seg(str(completion.known.file))[0][0]
    segmentation, maps = export_as_known(completion.known, label, logits, properties, configuration_manager,
                                         plans_manager, dataset_json, output, *args, **kwargs)
    del logits
    labels = plans_manager.get_label_manager(dataset_json)
    normalised = normalised_entropy(maps.pop("entropy"), labels.num_segmentation_heads, labels.has_regions)
    row = completion.review(label, segmentation, maps["confidence"], normalised)
    del normalised, label, segmentation
    name = f"{completion.case}{map_ending(dataset_json['file_ending'])}"
    write_map(completion.target / CONFIDENCE / name, maps.pop("confidence"), properties, writer)
    write_json(completion.target / ROWS / f"{completion.case}.json", row)


def _load_predictor(model: TrainedModel) -> tuple[_CompletingPredictor, list[str]]:
    """Load the model; return the predictor and the folds. Raise InputError if the model cannot be used."""
    folds = _choose_folds(model)
    make_findable()
    for fold in folds:
        file = model.folder / f"fold_{fold}" / model.checkpoint_name
        checkpoint = load_checkpoint(file)
        if model.branch != "student":
            require_teacher(file, checkpoint, f"--branch {model.branch}")
        try:
            recursive_find_trainer_class_by_name(checkpoint["trainer_name"])
        except RuntimeError as error:
            raise InputError(f"{file}: was written by the trainer {checkpoint['trainer_name']}, which is not found; "
                             f"set nnUNet_extTrainer to its folder") from error
    read_description(model.folder / "dataset.json")
    plans = PlansManager(read_plans(model.folder / "plans.json"))
    if plans.get_configuration(checkpoint["init_args"]["configuration"]).previous_stage_name is not None:
        raise InputError(f"{model.folder}: is the second stage of a cascade, which needs the predictions of the first; "
                         f"give a model of another configuration")
    device = choose_device(model.device, lambda: prediction_text(model.folder, len(folds)))
    predictor = _CompletingPredictor(device=torch.device(device))
    predictor.completions = {}
    try:
        with predicting(model.branch):
            predictor.initialize_from_trained_model_folder(str(model.folder), folds, model.checkpoint_name)
    except RuntimeError as error:
        raise InputError(f"{model.folder}: the weights of {model.checkpoint_name} do not fit the network of "
                         f"plans.json: {error}") from error
    return predictor, folds


def _choose_folds(model: TrainedModel) -> list[str]:
    """Return the folds that were asked for, or all that have the checkpoint; "all" only if there is no other."""
    name = model.checkpoint_name
    trained = [fold.name[len("fold_"):] for fold in fold_folders(model.folder) if (fold / name).is_file()]
    folds = [str(fold) for fold in model.folds or [fold for fold in trained if fold != "all"] or trained]
    missing = sorted(set(folds) - set(trained))
    if missing or not folds:
        raise InputError(f"{model.folder}: has no {name} of "
                         + (f"fold {', '.join(missing)}" if folds else "any fold")
                         + "; train first, or choose other --folds or another --checkpoint")
    return folds


def _require_same_data(folder: Path, described: dict, model: Path, predictor: _CompletingPredictor) -> None:
    """Raise InputError if the model was trained on other labels, channels or files."""
    ours, theirs = _meaning(described), _meaning(predictor.dataset_json)
    problems = [f"{what}: {ours[what]} in {folder / 'dataset.json'}, {theirs[what]} in {model / 'dataset.json'}"
                for what in ours if ours[what] != theirs[what]]
    if problems:
        raise InputError(f"{model}: is a model of another kind of data; give one trained on the same labels and "
                         "channels:\n  " + "\n  ".join(problems))


def _meaning(described: dict) -> dict:
    """Return what has to be equal in the two dataset.json. "ignore" may differ."""
    labels = {label: sorted(np.atleast_1d(value).tolist()) for label, value in described["labels"].items()
              if label != "ignore"}
    regions = [label for label, values in labels.items() if values != [0]]
    order = described.get("regions_class_order") if any(len(values) > 1 for values in labels.values()) else None
    return {"labels": labels, "order of the regions": order and dict(zip(regions, order)),
            "channels": list(described.get("channel_names", described.get("modality", {})).values()),
            "file ending": described["file_ending"]}


def _uses_hints(model: Path, folds: list[str]) -> bool:
    """Read from the records of the training whether the teacher has learnt to use hints, in all folds."""
    found = []
    for file in (model / f"fold_{fold}" / "confkd.json" for fold in folds):
        if not file.is_file():
            return False
        record = read_json(file)
        try:
            settings = record["settings"]  # may be of another version of this package
            uses = settings["weight_kl"] != 0 and settings["kl_images"] != "full" or settings.get("complete_at")
            found.append(bool(settings["teacher_hints"] and uses and PARTIAL in record["supervision"].values()))
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{file}: is not the record of a ConfKD training; train again, or use --branch "
                             "student") from error
    return all(found)


def _predict(predictor: _CompletingPredictor, cases: list[Case], folder: Path, processes: int,
             hidden: dict[str, Listed], hints: bool) -> None:
    """Predict the cases into the folder.

    Args:
        predictor: Knows how the cases are completed.
        cases: Those that are to be completed.
        folder: It must not exist.
        processes: The number of processes.
        hidden: {case: for each head whether the case is annotated for it}, of cases that lack some.
        hints: Whether the teacher gets the annotations as its hints.
    """
    sources = [[str(volume.file) for volume in case.images] for case in cases]
    outputs = [str(folder / case.name) for case in cases]
    number = max(1, min(processes, EXPORT_PROCESSES, len(cases)))
    (folder.parent / ROWS).mkdir(parents=True)
    if hints:
        network: Any = unwrap(predictor.network)
        manager = predictor.label_manager
        sets = manager.has_regions or hidden  # otherwise hints are labels, in one channel
        watershed = network.teacher_decoder.spread_hints is not None
        if watershed and sets:
            print("note: the teacher was trained with annotations that a watershed spreads. Here they are not spread, "
                  "because some cases are not annotated for all classes")
        network.hints_in_input = manager.num_segmentation_heads + 1 if sets else 1 + watershed
        labels = [str(case.label.file) for case in cases]
        predictor.predict_from_data_iterator(_with_hints(predictor, sources, labels, outputs, hidden,
                                                         watershed and not sets),
                                             num_processes_segmentation_export=number)
    elif processes <= 1:
        predictor.predict_from_files_sequential(sources, outputs)
    else:
        predictor.predict_from_files(sources, outputs, num_processes_preprocessing=number,
                                     num_processes_segmentation_export=number)


def _with_hints(predictor: _CompletingPredictor, sources: list[list[str]], labels: list[str],
                outputs: list[str], hidden: dict[str, Listed], watershed: bool = False) -> Iterator[dict]:
    """Yield the preprocessed cases for nnU-Net's predictor; the hints are further channels of the data."""
    plans, configuration, described = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    manager = plans.get_label_manager(described)
    for images, label, output in zip(sources, labels, outputs):
        # as `confkd plan` preprocesses the training cases, so that no annotation is lost
        data, seg, properties = KeepAnnotations(verbose=False).run_case(images, label, plans, configuration, described)
        properties.pop("class_locations", None)
        target, mask = map(torch.from_numpy, real_hints(seg, manager.ignore_label))
        listed = None
        if hidden:  # all cases then have sets of classes as hints, and the same number of channels
            of_case = hidden.get(Path(output).name, (True,) * manager.num_segmentation_heads)
            listed = torch.tensor(of_case)[None]
        hints = whole_image_hints(data, target, mask, seg[0] != OUTSIDE, manager,
                                  configuration.patch_size, watershed, listed)
        yield {"data": torch.cat((torch.from_numpy(data).float(), hints.float())), "data_properties": properties,
               "ofile": output}
