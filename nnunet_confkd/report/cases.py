"""What the report takes from a trained model: its record and curves, and its predictions of cases, one case at a time."""
from __future__ import annotations

import io
import os
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_confkd.data.json_files import read_description, read_json, read_plans, read_record, split_of_fold
from nnunet_confkd.data.patients import patients_of
from nnunet_confkd.data.supervision import FULL, PARTIAL, TABLE_KEY, annotation_counts, decide_kinds
from nnunet_confkd.discovery import make_findable
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.calibration import Counts, count_case
from nnunet_confkd.evaluation.evaluate import has_spacing
from nnunet_confkd.evaluation.metrics import FOREGROUND, CaseMeasures, measure_case
from nnunet_confkd.inference.checkpoints import fold_folders, load_checkpoint
from nnunet_confkd.inference.prediction import max_entropy, measure
from nnunet_confkd.training.network import has_teacher
from nnunet_confkd.training.validation import CasePredictor

PARTIAL_CASES = 3  # of the training's, that are shown
VOXELS = ("all", "in question")
SURE = 0.99  # a voxel is in question where a branch predicts foreground or is less sure than this


@dataclass
class Fold:
    """What is known of a fold without its data. training: {case: kind}, validation: cases; None where nobody knows."""

    name: str
    trainer: str
    epochs: int
    curves: dict[str, list]
    record: dict | None  # confkd.json
    branches: list[str]
    training: dict[str, str] | None = None
    validation: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trained_on(self) -> set[str]:
        """Validation cases that are training cases, too (fold "all")."""
        return set(self.training or ()) & set(self.validation or ())

    @property
    def names(self) -> dict[str, str]:
        """{branch: what it is called}: where there is no teacher, nobody is its student.

        The report predicts without hints. A teacher that was trained with hints does less well without them, so its name tells.
        """
        return self._named("without hints")

    @property
    def curve_names(self) -> dict[str, str]:
        """The same for the curves of the training, which validates such a teacher with simulated hints."""
        return self._named("with simulated hints")

    def _named(self, how: str) -> dict[str, str]:
        if len(self.branches) < 2:
            return dict.fromkeys(self.branches, "network")
        with_hints = self.record is not None and self.record.get("teacher_validated_with_hints")
        return {"student": "student", "teacher": f"teacher {how}" if with_hints else "teacher"}


class Model:
    """A trained model's folder, with its plans and, if they are there, its preprocessed data.

    missing_data: why there are no preprocessed data, or None. Raises InputError where it is no trained model, or has no such
    fold.
    """

    def __init__(self, folder: str | Path, folds: list[str] | None, checkpoint_name: str):
        self.folder, self.checkpoint_name = Path(folder), checkpoint_name
        self.fold_folders = fold_folders(self.folder)
        if folds is not None:
            there = {path.name: path for path in self.fold_folders}
            wrong = [fold for fold in folds if f"fold_{fold}" not in there]
            if wrong:
                raise InputError(f"{self.folder}: has no trained fold {', '.join(wrong)}; "
                                 f"there is {', '.join(sorted(there))}")
            self.fold_folders = [there[f"fold_{fold}"] for fold in folds]
        without = [path.name for path in self.fold_folders if not (path / checkpoint_name).is_file()]
        if without:
            raise InputError(f"{self.folder}: no {checkpoint_name} in {', '.join(without)}. If the training is not "
                             "finished, name another checkpoint (-chk checkpoint_best.pth or checkpoint_latest.pth), or other "
                             "folds (--fold).")
        self.plans = read_plans(self.folder / "plans.json")
        self.dataset_json = read_description(self.folder / "dataset.json")
        self.plans_manager = PlansManager(self.plans)
        self.label_manager = self.plans_manager.get_label_manager(self.dataset_json)
        self.configuration = load_checkpoint(self.fold_folders[0] / checkpoint_name)["init_args"]["configuration"]
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration)
        self.missing_data = self._find_data()

    def _find_data(self) -> str | None:
        if not nnUNet_preprocessed.is_set():
            return "the environment variable nnUNet_preprocessed is not set"
        self.base = Path(os.fspath(nnUNet_preprocessed)) / self.plans_manager.dataset_name
        self.data = self.base / self.configuration_manager.data_identifier
        self.truths = self.base / "gt_segmentations"
        for path in (self.data, self.truths):
            if not path.is_dir() or not any(path.iterdir()):
                return f"expected in {path}, where nothing is"
        return None

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """Labels of each foreground class or region, by name."""
        def labels(value) -> tuple[int, ...]:
            return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)

        return {str(name): labels(value) for name, value in self.dataset_json["labels"].items()
                if name != "ignore" and labels(value) != (0,)}

    def read_fold(self, folder: Path) -> Fold:
        """The fold's record, curves and cases."""
        checkpoint = load_checkpoint(folder / self.checkpoint_name)
        record = read_record(folder / "confkd.json") if (folder / "confkd.json").is_file() else None
        fold = Fold(folder.name, checkpoint["trainer_name"], checkpoint["current_epoch"], checkpoint["logging"], record,
                    ["student", "teacher"] if has_teacher(checkpoint["network_weights"]) else ["student"])
        if record is not None:
            fold.training, fold.validation = record["supervision"], sorted(record["pseudo_dice_on"])
        else:
            self._cases_of_stock_fold(folder, fold)
        if fold.trained_on:
            fold.notes.append(f"{folder.name}: {len(fold.trained_on)} of its {len(fold.validation)} validation cases are "
                              "training cases, too, so their figures do not tell how it does on new cases.")
        return fold

    def _cases_of_stock_fold(self, folder: Path, fold: Fold) -> None:
        """nnU-Net keeps no record of its own beside the model: the split, and what the final validation measured."""
        name = folder.name.removeprefix("fold_")
        cases, split = None, None
        if self.missing_data is None:
            cases = sorted(infer_dataset_class(str(self.data)).get_identifiers(str(self.data)))
            split = split_of_fold(self.base / "splits_final.json", name)
        if name == "all":
            training = validation = cases
        elif split is not None:
            training, validation = split["train"], sorted(split["val"])
        else:
            training, validation = None, None
            summary = folder / "validation" / "summary.json"
            if summary.is_file():
                ending = self.dataset_json["file_ending"]
                validation = sorted(Path(entry["prediction_file"]).name.removesuffix(ending)
                                    for entry in read_json(summary)["metric_per_case"])
        fold.validation = validation
        if training is not None:
            kinds = {case: FULL for case in cases}
            if self.label_manager.has_ignore_label:
                kinds = decide_kinds(annotation_counts(self.data, cases, self.label_manager), self.label_manager,
                                     self.dataset_json.get(TABLE_KEY))
            fold.training = {case: kinds[case] for case in training if case in kinds}
            full = [case for case in validation if kinds.get(case) == FULL]
            if full and len(full) < len(validation):
                fold.notes.append(f"{folder.name}: {len(validation) - len(full)} validation cases are not fully labelled "
                                  "and left out.")
                fold.validation = full


class Predictor:
    """A fold's network, and what it predicts of preprocessed cases: every branch in one pass of the encoder."""

    def __init__(self, model: Model, folder: Path, branches: list[str], device: torch.device):
        make_findable()
        self.model = model
        loaded = nnUNetPredictor(perform_everything_on_device=False, device=device, allow_tqdm=False)
        try:
            with redirect_stdout(io.StringIO()):  # it tells at length where it looks for the trainer
                loaded.initialize_from_trained_model_folder(str(model.folder), (folder.name.removeprefix("fold_"),),
                                                            model.checkpoint_name)
        except RuntimeError as error:  # no such trainer, or weights that do not fit the network
            raise InputError(f"{folder / model.checkpoint_name}: its network cannot be built ({error})") from error
        # what CasePredictor asks of a trainer; a trainer itself would make folders and a log file in the model
        self.network, self.device = loaded.network, device
        self.plans_manager, self.configuration_manager = loaded.plans_manager, loaded.configuration_manager
        self.dataset_json, self.label_manager = loaded.dataset_json, loaded.label_manager
        self.inference_allowed_mirroring_axes = loaded.allowed_mirroring_axes
        previous = model.configuration_manager.previous_stage_name
        self.is_cascaded = previous is not None
        self.previous = None
        if self.is_cascaded:
            name = "__".join((loaded.trainer_name, model.plans["plans_name"], previous))
            self.previous = model.folder.parent / name / "predicted_next_stage" / model.configuration
        self.network.eval()
        with redirect_stdout(io.StringIO()):
            self.predict = CasePredictor(self, branches)

    def __call__(self, case: str) -> Prediction:
        """Raises InputError where a file of the case is missing."""
        dataset_class = infer_dataset_class(str(self.model.data))
        previous = None if self.previous is None else str(self.previous)
        try:
            dataset = dataset_class(str(self.model.data), [case], folder_with_segs_from_previous_stage=previous)
            data, seg, seg_prev, properties = dataset.load_case(case)
        except FileNotFoundError as error:
            raise InputError(f"{self.model.data}: the preprocessed case '{case}' is not complete ({error}). Preprocess the "
                             "data set again, or correct its split.") from error
        data, seg = np.asarray(data[:]), np.asarray(seg[:])[0]
        return Prediction(self.model, data, seg, self.predict(data, None if seg_prev is None else seg_prev[:]), properties)


@dataclass
class Prediction:
    """A preprocessed case, `(C, *spatial)`, its label `(*spatial)`, and each branch's logits `(heads, *spatial)`."""

    model: Model
    data: np.ndarray
    seg: np.ndarray
    logits: dict[str, torch.Tensor]
    properties: dict

    def original(self, branch: str) -> tuple[np.ndarray, np.ndarray]:
        """Segmentation and probabilities of a branch on the grid of the image file, as nnU-Net exports them."""
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            self.logits[branch], self.model.plans_manager, self.model.configuration_manager, self.model.label_manager,
            self.properties, return_probabilities=True, num_threads_torch=torch.get_num_threads())

    def to_preprocessed(self, segmentation: np.ndarray) -> np.ndarray:
        """A segmentation on the grid of the image file, on that of the preprocessed data: nearest neighbours, to look at."""
        moved = segmentation.transpose(self.model.plans_manager.transpose_forward)
        moved = moved[tuple(slice(*bounds) for bounds in self.properties["bbox_used_for_cropping"])]
        places = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(self.seg.shape, moved.shape)]
        return moved[np.ix_(*places)].astype(np.int16)

    def slice(self) -> dict[str, np.ndarray]:
        """The slice with most foreground, in label and predictions together: image, label, each branch's labels, the
        student's entropy (0 to 1), each `(h, w)`; `index` and `count` of slices; `aspect`, height over width of a pixel."""
        labels = self.model.label_manager
        segmentations = {branch: np.asarray(labels.convert_logits_to_segmentation(logits))
                         for branch, logits in self.logits.items()}
        foreground = sum((seg > 0) & (seg != (-2 if labels.ignore_label is None else labels.ignore_label))
                         for seg in (self.seg, *segmentations.values()))
        index = int(np.argmax(foreground.sum((1, 2))))
        spacing = self.model.configuration_manager.spacing
        return {"image": self.data[0, index].astype(np.float32), "label": self.seg[index].astype(np.int16),
                **{branch: seg[index].astype(np.int16) for branch, seg in segmentations.items()},
                "entropy": _normalised_entropy(self.logits["student"][:, index], labels).astype(np.float32),
                "index": index, "count": foreground.shape[0], "aspect": spacing[-2] / spacing[-1]}


def _normalised_entropy(logits: torch.Tensor, labels) -> np.ndarray:
    """`(heads, h, w)` -> `(h, w)`, 0 to 1."""
    return measure(logits[:, None], labels.has_regions)["entropy"][0] / max_entropy(len(logits), labels.has_regions)


# ---- findings -------------------------------------------------------------------------------------------------------

class Findings:
    """What the branches predict of the validation cases, and of some partially labelled training cases.

    names: {branch: what it is called}; predictions made elsewhere are the branch "given". evaluations: {branch: Evaluation},
    without voxel counts and files; a case that several folds validate has the fold in its name.
    counts: {branch: {"all" or "in question" voxels: Counts}}, none of "given"; case_counts: of each case its (count,
    correct, confidence) in coarse bins.
    partial: names of the training cases that are shown.
    """

    def __init__(self, model: Model, folds: list[Fold], predictions: Path | None, folder: Path, device: torch.device):
        """predictions: a folder of segmentations, or None. folder: for temporary files."""
        self.model, self.folder, self.predictions = model, folder, predictions
        self.branches = folds[0].branches
        self.names = dict(folds[0].names)
        wanted = {path: fold.validation or [] for path, fold in zip(model.fold_folders, folds)}
        counts = Counter(case for cases in wanted.values() for case in cases)
        if predictions is not None:
            self.names["given"] = predictions.resolve().name
            _check_predictions(predictions, sorted(counts), model.dataset_json["file_ending"])
        try:
            patients = patients_of(counts, model.dataset_json.get("patient_pattern"))
        except InputError as error:
            raise InputError(f"{model.folder / 'dataset.json'}: {error}") from error
        named = {_name(case, path, counts): patients[case] for path, cases in wanted.items() for case in cases}
        self.evaluations = {branch: CaseMeasures(classes=model.classes, patients=named) for branch in self.names}
        self.counts = {branch: {voxels: Counts.none() for voxels in VOXELS} for branch in self.branches}
        self.case_counts = {branch: {voxels: [] for voxels in VOXELS} for branch in self.branches}
        self.files: dict[str, Path] = {}
        partial = sorted(case for case, kind in (folds[0].training or {}).items() if kind == PARTIAL)
        self.partial = _spread(partial, PARTIAL_CASES)
        with tqdm(total=counts.total() + len(self.partial), desc="predicting", unit="case") as progress:
            for path, cases in wanted.items():
                predict = Predictor(model, path, self.branches, device)
                for case in cases:
                    self._measure(_name(case, path, counts), case, predict(case))
                    progress.update()
                if path == model.fold_folders[0]:
                    for case in self.partial:
                        self._keep(case, predict(case).slice())
                        progress.update()

    def _measure(self, name: str, case: str, prediction: Prediction) -> None:
        reader, ending = self.model.plans_manager.image_reader_writer_class(), self.model.dataset_json["file_ending"]
        truth, properties = reader.read_seg(str(self.model.truths / (case + ending)))
        content = prediction.slice()
        originals = {branch: prediction.original(branch) for branch in self.branches}
        prediction.logits.clear()  # large volumes need the room
        segmentations = {branch: segmentation for branch, (segmentation, _) in originals.items()}
        if "given" in self.names:
            segmentations["given"] = _read_given(self.predictions / (case + ending), reader, truth, properties)
            content["given"] = prediction.to_preprocessed(segmentations["given"])[content["index"]]
        spacing = properties["spacing"] if has_spacing(self.model.truths / (case + ending)) else None
        flat = properties["spacing"][0] == 999  # what nnU-Net's readers say of an image without a third axis
        for branch, segmentation in segmentations.items():
            true, predicted = (truth[0][0], segmentation[0]) if flat else (truth[0], segmentation)
            self.evaluations[branch].cases[name] = measure_case(
                true, predicted, self.model.classes, spacing[1:] if flat and spacing else spacing,
                self.model.label_manager.ignore_label)
        self._count(truth[0].astype(np.int32), originals)
        self._keep(name, content)

    def _count(self, truth: np.ndarray, originals: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """originals: {branch: (segmentation, probabilities)}.

        The voxels in question are the same for both branches, and do not depend on the truth: of voxels that are chosen
        by the truth even a calibrated network would look overconfident.
        """
        labels = self.model.label_manager
        in_question = np.zeros(truth.shape, bool)
        for segmentation, p in originals.values():
            in_question |= segmentation > 0
            for confidence in (np.maximum(head, 1 - head) for head in p) if labels.has_regions else (p.max(0),):
                in_question |= confidence < SURE
        options = {"ignore_label": labels.ignore_label, "regions": labels.foreground_regions if labels.has_regions else None}
        for branch, (_, p) in originals.items():
            for voxels, where in (("all", None), ("in question", in_question)):
                counts = count_case(p, truth, where=where, **options)
                self.counts[branch][voxels] += counts
                self.case_counts[branch][voxels].append(counts.coarse)

    def _keep(self, name: str, content: dict) -> None:
        """On disk: which cases are shown is known at the end only, and slices of all would fill the memory."""
        self.files[name] = self.folder / f"{len(self.files)}.npz"
        np.savez(self.files[name], **content)

    def slice(self, name: str) -> dict[str, np.ndarray]:
        """As Prediction.slice gives it, of a case in `cases` or `partial`."""
        with np.load(self.files[name]) as content:
            return dict(content)

    @property
    def cases(self) -> list[str]:
        return list(self.evaluations["student"].cases)

    @property
    def patients(self) -> list[str]:
        """The patient of each of the cases."""
        return self.evaluations["student"].patient_of_each

    def dice(self, branch: str) -> dict[str, float]:
        """Mean Dice over the classes of each case; NaN where none of them is there."""
        return dict(zip(self.cases, self.evaluations[branch].values(FOREGROUND, "Dice").tolist()))

    def shown(self) -> dict[str, str]:
        """{"best": case, ...}: best, median and worst by the student's mean Dice, as far as these are different cases."""
        dice = {case: value for case, value in self.dice("student").items() if np.isfinite(value)}
        ordered = sorted(dice, key=lambda case: (-dice[case], case))
        places = {"best": 0, "median": len(ordered) // 2, "worst": len(ordered) - 1}
        return {} if not ordered else {what: ordered[i] for what, i in places.items() if what in _distinct(places)}


def _name(case: str, fold: Path, counts: Counter) -> str:
    """A case that several folds validate is called by its fold as well."""
    return case if counts[case] == 1 else f"{case} ({fold.name})"


def _distinct(places: dict[str, int]) -> set[str]:
    """Of several roles of one case the best, then the worst."""
    return set({places[what]: what for what in ("median", "worst", "best")}.values())


def _spread(items: list[str], count: int) -> list[str]:
    """At most `count` of them, evenly spread."""
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, count)})] if items else []


def _check_predictions(folder: Path, cases: list[str], ending: str) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    missing = [case for case in cases if not (folder / (case + ending)).is_file()]
    if missing:
        raise InputError(f"{folder}: does not match the model: no {missing[0]}{ending}" + (
            f", and {len(missing) - 1} more of the {len(cases)} validation cases are missing" if len(missing) > 1 else "")
            + ". Give a folder with a segmentation of every validation case; confkd evaluate measures other predictions.")


def _read_given(path: Path, reader, truth: np.ndarray, properties: dict) -> np.ndarray:
    try:
        given, other = reader.read_seg(str(path))
    except Exception as error:  # the readers raise whatever the broken bytes lead to
        raise InputError(f"{path}: cannot be read ({error})") from error
    if given.shape != truth.shape or not np.allclose(other["spacing"], properties["spacing"], rtol=1e-3):
        raise InputError(f"{path}: shape {given.shape[1:]} and spacing {tuple(other['spacing'])} are not those of the true "
                         f"label, {truth.shape[1:]} and {tuple(properties['spacing'])}")
    return given[0]
