"""The labels of partly labelled training cases, completed by a trained model, as a data set of its own."""
from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd import __version__
from nnunet_confkd.data.folders import find_dataset, folder_name, new_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import Picture, Volume, count_voxels, read
from nnunet_confkd.data.json_files import read_description, read_folds, read_json, read_plans
from nnunet_confkd.data.patients import patients_of, split_full_cases
from nnunet_confkd.data.raw_format import Case, Dataset, raw_dataset, summary, write_into
from nnunet_confkd.data.resampling import KeepAnnotations
from nnunet_confkd.data.supervision import FULL, PARTIAL, TABLE_KEY, UNLABELLED, check_labels, decide_kinds
from nnunet_confkd.device import choose_device
from nnunet_confkd.discovery import make_findable
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.checkpoints import fold_folders, load_checkpoint
from nnunet_confkd.inference.prediction import ExportingPredictor, export_and_measure, max_entropy
from nnunet_confkd.inference.uncertainty import case_score, map_ending, write_map, write_review_list
from nnunet_confkd.processes import PROCESSES, parallel
from nnunet_confkd.training.batches import real_hints
from nnunet_confkd.training.hints import volume_hints
from nnunet_confkd.training.network import BRANCHES, has_teacher, predicting, unwrap

KEY = "completed"  # in dataset.json: a list, an entry a run, because a completed data set can be completed further
CONFIDENCE, PREDICTED, ENTROPY = "confidence", ".predicted", "entropy"
CHECKPOINT = "checkpoint_final.pth"
EXPORT_PROCESSES = 3  # nnU-Net's number: each holds the logits of a whole image


def complete(source: int | str, model: str | Path, dataset_id: int, *, branch: str = "student", confidence: float | None = None,
             folds: list[str] | None = None, checkpoint: str = CHECKPOINT, device: str | None = None, name: str | None = None,
             processes: int = PROCESSES, link: bool = False) -> Path:
    """Write a copy of a data set of nnU-Net whose ignored voxels a model has labelled; returns its folder.

    source: id or name of the data set. model: TRAINER__PLANS__CONFIGURATION; a stock nnU-Net one will do if its labels and
    channels are the same. branch: "student", "teacher" or "mean" (of the logits); a teacher that learnt to use them
    (:mod:`nnunet_confkd.training.hints`) is shown the case's annotations. confidence: only voxels whose winning
    probability is above it are labelled, the others stay ignored; None: all. folds: their logits are averaged; None: all
    that have the checkpoint. device: "cuda", "cpu" or "mps"; None: cuda where there is one.

    Annotated voxels stay as they are, and so do cases without ignored voxels. Beside the labels lie `confidence/` (the
    winning probability) and `review_first.csv` and `.json`; `dataset.json` tells under "completed" what was predicted.

    Raises InputError with all that is wrong: no such data set, nothing to complete, labels that cannot be read or hold
    other values, a model without checkpoint, teacher, or of other labels or channels, an id that is taken.
    """
    if confidence is not None and not 0 <= confidence < 1:
        raise InputError(f"--confidence: a probability from 0 to below 1, not {confidence}")
    found = find_dataset(source)
    folder = raw_folder() / found
    dataset = raw_dataset(folder, name or f"{found[11:]}_completed")
    described = read_description(folder / "dataset.json")
    dataset.patient_pattern = described.get("patient_pattern")
    predictor, folds = _load_model(Path(model), folds, checkpoint, branch, device)
    _require_same_data(folder, described, Path(model), predictor)
    hints = _has_teacher(predictor) and branch != "student" and _uses_hints(Path(model), folds)
    with new_dataset(dataset_id, dataset.name) as (target, preprocessed):
        counts, kinds = _look_at_all(folder, described, dataset, processes)
        ignore = described["labels"]["ignore"]
        todo = [case for case in dataset.training if counts[case.name][ignore]]
        splits = _splits(found, kinds, dataset.patient_pattern)
        _predict(predictor, todo, target / PREDICTED, processes, hints)

        files = {case.name: _Files(case, target, dataset.file_ending) for case in todo}
        options = {"ignore": ignore, "threshold": confidence}
        rows = {row["case"]: {**row, "kind_before": kinds[row["case"]]} for row in parallel(
            partial(_judge, **options), [(files[case.name],) for case in todo], processes, "judging predictions")}
        labels = {name: Volume(f.label, reader=partial(_completed, files=f, **options)) for name, f in files.items()}
        dataset.training = [replace(case, kind=kinds[case.name]) if case.name not in files else
                            replace(case, kind=rows[case.name]["kind"], label=labels[case.name]) for case in dataset.training]
        dataset.test = [replace(case, values={v: v for v in dataset.values}) for case in dataset.test]
        about = {"source": found, "model": Path(model).resolve().name, "model_dataset": predictor.plans_manager.dataset_name,
                 "branch": branch if _has_teacher(predictor) else None, "hints": hints, "folds": folds, "checkpoint": checkpoint,
                 "confidence": confidence, "nnunet_confkd": __version__,
                 "note": "Voxels of these cases that nobody had annotated have labels predicted by the model: do not take them "
                         "for truth, in validation least of all."}
        completed = {name: {key: row[key] for key in ("kind_before", "annotated_voxels", "filled_voxels", "ignored_voxels")}
                     for name, row in rows.items()}
        dataset.more[KEY] = [*dataset.more.get(KEY, []), {**about, "cases": completed}]
        write_into(target, preprocessed, dataset, processes, link)
        _require_annotations(target, files, ignore, confidence, processes)
        if splits is not None:
            (preprocessed / "splits_final.json").write_text(json.dumps(splits, indent=2) + "\n", encoding="utf-8")
        write_review_list(target, list(rows.values()), about)
        shutil.rmtree(target / PREDICTED)
    return raw_folder() / folder_name(dataset_id, dataset.name)


# ---- the model ------------------------------------------------------------------------------------------------------

class _CompletingPredictor(ExportingPredictor):
    """nnU-Net's predictor that leaves the confidence and the entropy beside the segmentation."""

    def exporter(self):
        return _export


def _export(logits, properties, configuration_manager, plans_manager, dataset_json, output, *args, **kwargs) -> None:
    """Module level, because it is sent to other processes. output: `TARGET/.predicted/CASE`."""
    _, maps = export_and_measure(logits, properties, configuration_manager, plans_manager, dataset_json, output, *args, **kwargs)
    labels, output = plans_manager.get_label_manager(dataset_json), Path(output)
    normalised = maps["entropy"] / np.float32(max_entropy(labels.num_segmentation_heads, labels.has_regions))
    name = f"{output.name}{map_ending(dataset_json['file_ending'])}"
    for folder, voxels in ((output.parent / ENTROPY, normalised), (output.parent.parent / CONFIDENCE, maps["confidence"])):
        write_map(folder / name, voxels, properties, plans_manager.image_reader_writer_class())


def _load_model(model: Path, folds: list[str] | None, checkpoint: str, branch: str,
                device: str | None) -> tuple[_CompletingPredictor, list[str]]:
    there = [fold.name[len("fold_"):] for fold in fold_folders(model) if (fold / checkpoint).is_file()]
    folds = [str(fold) for fold in folds or [fold for fold in there if fold != "all"] or there]
    missing = sorted(set(folds) - set(there))
    if missing or not folds:
        raise InputError(f"{model}: has no {checkpoint} of " + (f"fold {', '.join(missing)}" if folds else "any fold")
                         + "; train first, or choose other --folds or another --checkpoint")
    make_findable()
    for fold in folds:
        file = model / f"fold_{fold}" / checkpoint
        loaded = load_checkpoint(file)
        if branch != "student" and not has_teacher(loaded["network_weights"]):
            raise InputError(f"{file}: holds no teacher, so --branch {branch} has nothing to choose from")
        try:
            recursive_find_trainer_class_by_name(loaded["trainer_name"])
        except RuntimeError as error:
            raise InputError(f"{file}: was written by the trainer {loaded['trainer_name']}, which is not found; set "
                             f"nnUNet_extTrainer to its folder") from error
    read_description(model / "dataset.json")
    plans, configuration = PlansManager(read_plans(model / "plans.json")), loaded["init_args"]["configuration"]
    if plans.get_configuration(configuration).previous_stage_name is not None:
        raise InputError(f"{model}: is the second stage of a cascade, which needs the predictions of the first; give a model of "
                         f"another configuration")
    predictor = _CompletingPredictor(device=torch.device(choose_device(device)))
    try:
        with predicting(branch):
            predictor.initialize_from_trained_model_folder(str(model), folds, checkpoint)
    except RuntimeError as error:
        raise InputError(f"{model}: the weights of {checkpoint} do not fit the network of plans.json: {error}") from error
    return predictor, folds


def _has_teacher(predictor: _CompletingPredictor) -> bool:
    return has_teacher(predictor.list_of_parameters[0])


def _require_same_data(folder: Path, described: dict, model: Path, predictor: _CompletingPredictor) -> None:
    """Raise InputError where the model was trained on other labels, channels or files."""
    problems = [f"{what}: {ours} in {folder / 'dataset.json'}, {theirs} in {model / 'dataset.json'}"
                for (what, ours), theirs in zip(_meaning(described).items(), _meaning(predictor.dataset_json).values())
                if ours != theirs]
    if problems:
        raise InputError(f"{model}: is a model of another kind of data; give one trained on the same labels and channels:\n  "
                         + "\n  ".join(problems))


def _meaning(described: dict) -> dict:
    """What must be equal of two dataset.json, "ignore" apart."""
    labels = {label: sorted(np.atleast_1d(value).tolist()) for label, value in described["labels"].items() if label != "ignore"}
    regions = [label for label, values in labels.items() if values != [0]]
    order = described.get("regions_class_order") if any(len(values) > 1 for values in labels.values()) else None
    return {"labels": labels, "order of the regions": order and dict(zip(regions, order)),
            "channels": list(described.get("channel_names", described.get("modality", {})).values()),
            "file ending": described["file_ending"]}


def _uses_hints(model: Path, folds: list[str]) -> bool:
    """Whether the model's teacher learnt to use annotations that it is shown, as the record of its training tells."""
    found = []
    for file in (model / f"fold_{fold}" / "confkd.json" for fold in folds):
        if not file.is_file():
            return False
        record = read_json(file)
        try:
            settings = record["settings"]  # of any version of this package
            found.append(settings["teacher_hints"] and settings["weight_kl"] > 0 and settings["kl_images"] != "full"
                         and PARTIAL in record["supervision"].values())
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{file}: is not the record of a ConfKD training; train again, or use --branch student") from error
    return all(found)


def _predict(predictor: _CompletingPredictor, cases: list[Case], folder: Path, processes: int, hints: bool) -> None:
    sources = [[str(volume.file) for volume in case.images] for case in cases]
    outputs = [str(folder / case.name) for case in cases]
    number = max(1, min(processes, EXPORT_PROCESSES, len(cases)))
    folder.mkdir()
    if hints:
        network: Any = unwrap(predictor.network)
        network.hints_in_input = True
        labels = [str(case.label.file) for case in cases]
        predictor.predict_from_data_iterator(_with_hints(predictor, sources, labels, outputs),
                                             num_processes_segmentation_export=number)
    elif processes <= 1:
        predictor.predict_from_files_sequential(sources, outputs)
    else:
        predictor.predict_from_files(sources, outputs, num_processes_preprocessing=number,
                                     num_processes_segmentation_export=number)


def _with_hints(predictor: _CompletingPredictor, sources: list[list[str]], labels: list[str], outputs: list[str]) -> Iterator[dict]:
    """What nnU-Net's predictor takes of a preprocessed case, the hints behind the channels."""
    plans, configuration, described = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    manager = plans.get_label_manager(described)
    for images, label, output in zip(sources, labels, outputs):
        # as `confkd plan` preprocesses the training cases: no annotation is lost
        data, seg, properties = KeepAnnotations(verbose=False).run_case(images, label, plans, configuration, described)
        properties.pop("class_locations", None)
        hints = volume_hints(*real_hints(seg[0], manager.ignore_label), manager)
        yield {"data": torch.cat((torch.from_numpy(data).float(), hints)), "data_properties": properties, "ofile": output}


# ---- the data -------------------------------------------------------------------------------------------------------

def _look_at_all(folder: Path, described: dict, dataset: Dataset,
                 processes: int) -> tuple[dict[str, dict[int, int]], dict[str, str]]:
    """Voxels per label and kind of each training case. All that could go wrong after the prediction is found before it."""
    check_labels(described)
    if "ignore" not in described["labels"]:
        raise InputError(f"{folder / 'dataset.json'}: the labels have no \"ignore\", so every voxel has a label already; "
                         f"there is nothing to complete")
    allowed = sorted(dataset.values)
    looked = parallel(_look, [(case, allowed, len(dataset.channel_names)) for case in dataset.training], processes,
                             "reading cases")
    problems = [problem for found, _ in looked for problem in found]
    names = {case.name for case in dataset.training}
    if "dataset" not in described and (folder / "labelsTr").is_dir():
        ending = described["file_ending"]
        problems += [f"{file}: has no image in {folder / 'imagesTr'}" for file in sorted((folder / "labelsTr").glob(f"*{ending}"))
                     if file.name[:-len(ending)] not in names and not file.name.startswith(".")]
    if problems:
        raise InputError(f"{folder}: {len(problems)} problems; nothing was written:\n  " + "\n  ".join(problems))
    counts = {case.name: count for case, (_, count) in zip(dataset.training, looked)}
    labels = LabelManager(described["labels"], described.get("regions_class_order"))
    kinds = decide_kinds(counts, labels, described.get(TABLE_KEY))
    if not any(count[described["labels"]["ignore"]] for count in counts.values()):
        raise InputError(f"{folder}: no training case has an ignored voxel; there is nothing to complete")
    return counts, kinds


def _look(case: Case, allowed: list[int], channels: int) -> tuple[list[str], dict[int, int]]:
    """What is wrong with one case, and the voxels of each label."""
    problems, counts = [], dict.fromkeys(allowed, 0)
    try:
        pictures = [volume.read() for volume in case.images]
        label = case.label.read()
    except InputError as error:
        return [str(error)], counts
    found = sum(len(picture.voxels) for picture in pictures)
    if found != channels:
        problems.append(f"{case.images[0].file}: the case '{case.name}' has {found} of {channels} channels")
    for picture in pictures:
        problems += [f"{case.label.file}: is on another grid than {case.images[0].file}: {difference}"
                     for difference in label.geometry.differences(picture.geometry)]
    counts = count_voxels(label.voxels, allowed)
    if sum(counts.values()) != label.voxels.size:
        strange = [value for value in np.unique(label.voxels).tolist() if value not in allowed]
        problems.append(f"{case.label.file}: holds the values {strange[:10]}, which dataset.json does not list")
    return problems, counts


def _splits(found: str, kinds: dict[str, str], pattern: str | None) -> list[dict] | None:
    """The source's folds; else folds that validate on cases that were full before; None where there are too few of them."""
    file = preprocessed_folder() / found / "splits_final.json"
    if not file.is_file():
        try:
            return split_full_cases(kinds, patients_of(kinds, pattern))
        except InputError:
            return None
    splits = read_folds(file)
    unknown = sorted({case for fold in splits for case in [*fold["train"], *fold["val"]]} - set(kinds))
    if unknown:
        raise InputError(f"{file}: names cases that {found} does not have: {', '.join(unknown[:10])}")
    return splits


# ---- one case -------------------------------------------------------------------------------------------------------

class _Files:
    """Where the parts of one case lie."""

    def __init__(self, case: Case, target: Path, file_ending: str):
        self.case, self.label = case.name, case.label.file
        self.written = target / "labelsTr" / f"{case.name}{file_ending}"
        self.predicted = target / PREDICTED / f"{case.name}{file_ending}"
        self.entropy = target / PREDICTED / ENTROPY / f"{case.name}{map_ending(file_ending)}"
        self.confidence = target / CONFIDENCE / self.entropy.name


def _completed(file: Path, *, files: _Files, ignore: int, threshold: float | None) -> Picture:
    """The label, its ignored voxels filled; `file` is `files.label`."""
    picture = read(file)
    label = picture.voxels[0].astype(np.uint8 if ignore < 256 else np.uint16)
    predicted = read(files.predicted).voxels[0].reshape(label.shape).astype(label.dtype)
    fill = label == ignore
    if threshold is not None:
        fill &= read(files.confidence).voxels[0].reshape(label.shape) > threshold
    return Picture(np.where(fill, predicted, label)[None], picture.geometry)


def _judge(files: _Files, *, ignore: int, threshold: float | None) -> dict:
    """A row of the list of what to review first."""
    label = read(files.label).voxels[0]
    predicted, entropy, confidence = (read(file).voxels[0].reshape(label.shape)
                                      for file in (files.predicted, files.entropy, files.confidence))
    unknown = label == ignore
    left = int((unknown & (confidence <= threshold)).sum()) if threshold is not None else 0
    annotated, unknown_voxels = int((~unknown).sum()), int(unknown.sum())
    return {"case": files.case, **case_score(entropy, predicted, unknown),
            "kind": FULL if not left else PARTIAL if annotated or left < unknown_voxels else UNLABELLED,
            "annotated_voxels": annotated, "filled_voxels": unknown_voxels - left, "ignored_voxels": left,
            "mean_confidence": float(confidence[unknown].mean(dtype=np.float64)),
            "agreement_with_annotations": float((predicted == label)[~unknown].mean()) if annotated else None}


def _require_annotations(target: Path, files: dict[str, _Files], ignore: int, threshold: float | None, processes: int) -> None:
    """Raise RuntimeError unless every annotated voxel that was written is what it was, and nothing is left to ignore."""
    wrong = parallel(partial(_changed, ignore=ignore, threshold=threshold), [(f,) for f in files.values()], processes,
                            "reading back")
    if any(wrong):
        raise RuntimeError("labels were not written as they should be: " + ", ".join(filter(None, wrong)))


def _changed(files: _Files, *, ignore: int, threshold: float | None) -> str | None:
    before, after = read(files.label).voxels[0], read(files.written).voxels[0]
    annotated = before != ignore
    kept = np.array_equal(before[annotated], after[annotated])
    return None if kept and (threshold is not None or not (after == ignore).any()) else files.case


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd complete", description=__doc__)
    parser.add_argument("-d", required=True, metavar="ID", help="the data set whose labels are to be completed, id or name")
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER",
                        help="the trained model: TRAINER__PLANS__CONFIGURATION under nnUNet_results, or a stock one of the same "
                             "labels")
    parser.add_argument("--id", required=True, type=int, help="id of the data set to write")
    parser.add_argument("--name", help="its name; default: that of the source and _completed")
    parser.add_argument("--branch", choices=BRANCHES, default="student", help="the teacher is shown the annotations, where it was "
                        "trained with hints (the default of ConfKDTrainer)")
    parser.add_argument("--confidence", type=float, metavar="P", help="label only voxels whose winning probability is "
                        "above P; the others stay ignored. Default: all")
    parser.add_argument("--folds", nargs="+", metavar="F", help="folds whose mean predicts; default: all that are trained")
    parser.add_argument("--checkpoint", default=CHECKPOINT, metavar="NAME")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies of images: no space, but what "
                        "writes to one writes to the other")
    args = parser.parse_args(argv)
    folder = complete(args.d, args.model, args.id, branch=args.branch, confidence=args.confidence, folds=args.folds,
                      checkpoint=args.checkpoint, device=args.device, name=args.name, processes=args.processes, link=args.link)
    described = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    cases = described[KEY][-1]["cases"]
    filled, left = (sum(case[key] for case in cases.values()) for key in ("filled_voxels", "ignored_voxels"))
    print(f"{len(cases)} labels completed: {filled} voxels labelled by the model, {left} still ignored\n"
          f"review first: {folder / 'review_first.csv'}\n{summary(folder)}")
