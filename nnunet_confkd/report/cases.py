"""What a trained model predicts, one case at a time: measures, calibration and pictures for the report."""
from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from tqdm import tqdm

from nnunet_confkd.data.images import has_spacing, is_flat, read
from nnunet_confkd.data.patients import patients_of
from nnunet_confkd.data.supervision import PARTIAL
from nnunet_confkd.discovery import make_findable
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.calibration import Counts, count
from nnunet_confkd.evaluation.metrics import FOREGROUND, MEASURES, CaseMeasures, measure_case
from nnunet_confkd.inference.prediction import normalised_entropy
from nnunet_confkd.report.model import Fold, Model
from nnunet_confkd.training.prediction_maps import PredictionMaps, StreamingExport, maps_of
from nnunet_confkd.training.validation import CasePredictor

PARTIAL_CASES = 3  # how many partially annotated training cases are shown
AT_A_TIME = 2 ** 20  # how many voxels are counted at once
SURE = 0.99  # a voxel is in question if a branch predicts foreground, or is less confident than this


# ---- predictions ----------------------------------------------------------------------------------------------------

class Predictor:
    """A fold's network, which predicts preprocessed cases, all branches in one pass of the encoder."""

    def __init__(self, model: Model, folder: Path, branches: list[str], device: torch.device):
        """Load the network. Raises InputError if its trainer is not known or the weights do not fit."""
        make_findable()
        self.model = model
        loaded = nnUNetPredictor(perform_everything_on_device=False, device=device, allow_tqdm=False)
        try:
            with redirect_stdout(io.StringIO()):  # nnU-Net prints where it searches for the trainer
                loaded.initialize_from_trained_model_folder(
                    str(model.folder), (folder.name.removeprefix("fold_"),), model.checkpoint_name)
        except RuntimeError as error:
            raise InputError(f"{folder / model.checkpoint_name}: its network cannot be built ({error})") from error
        # The attributes of a trainer that CasePredictor uses. A trainer itself would make folders and a log file.
        self.network, self.device = loaded.network, device
        self.plans_manager, self.configuration_manager = loaded.plans_manager, loaded.configuration_manager
        self.dataset_json, self.label_manager = loaded.dataset_json, loaded.label_manager
        self.inference_allowed_mirroring_axes = loaded.allowed_mirroring_axes
        previous = model.configuration_manager.previous_stage_name
        self.is_cascaded = previous is not None
        self.previous = None
        if self.is_cascaded:
            name = "__".join((loaded.trainer_name, model.plans["plans_name"], previous))
            self.previous = str(model.folder.parent / name / "predicted_next_stage" / model.configuration)
        self.network.eval()
        self.branches = branches
        with redirect_stdout(io.StringIO()):
            self.predict = CasePredictor(self, branches)

    def __call__(self, case: str) -> Prediction:
        """Predict a case. Raises InputError if a file of the case is missing."""
        data_folder = str(self.model.data)
        try:
            dataset = infer_dataset_class(data_folder)(data_folder, [case],
                                                       folder_with_segs_from_previous_stage=self.previous)
            data, seg, seg_prev, properties = dataset.load_case(case)
        except FileNotFoundError as error:
            raise InputError(f"{data_folder}: the preprocessed case '{case}' is not complete ({error}). Preprocess the "
                             "data set again, or correct its split.") from error
        seg = np.asarray(seg[:])[0]
        previous = None if seg_prev is None else seg_prev[:]
        logits = self.predict(data, previous)
        return Prediction(self.model, data, seg, logits, properties)


@dataclass
class Slice:
    """One slice of a case, for its pictures.

    Attributes:
        image: Grey values of the first channel, `(h, w)`.
        label: Labels of the ground truth, or of a partial annotation, `(h, w)`.
        segmentations: The predicted labels of each branch and, last, those that were given, `(branches, h, w)`.
        entropy: Entropy of the student from 0 to 1, `(h, w)`.
        index: Number of the slice, from 0.
        count: How many slices the case has.
        aspect: Height of a pixel divided by its width.
    """
    image: np.ndarray
    label: np.ndarray
    segmentations: np.ndarray
    entropy: np.ndarray
    index: int
    count: int
    aspect: float

    def save(self, file: Path) -> None:
        """Save the slice to an .npz file."""
        np.savez(file, **vars(self))

    @classmethod
    def load(cls, file: Path) -> Slice:
        """Load a slice that `save` has written."""
        with np.load(file) as content:
            return cls(**{name: array if array.ndim else array.item() for name, array in content.items()})


@dataclass
class Original:
    """What a branch predicts on the grid of the image file.

    Attributes:
        segmentation: The labels, `(*spatial)`.
        confidence: The probability of the chosen label, `(1, *spatial)`. With regions the probability of each,
            `(heads, *spatial)`.
    """
    segmentation: np.ndarray
    confidence: np.ndarray


@dataclass
class Prediction:
    """A preprocessed case and its predictions.

    Attributes:
        model: The model that predicts.
        data: The images, `(C, *spatial)`. They may lie in a file.
        seg: The label, `(*spatial)`.
        logits: {branch: logits}, each `(heads, *spatial)`.
        properties: What nnU-Net's preprocessing knows about the case.
        segmentations: {branch: labels `(*spatial)`}; see :meth:`summarise`.
        originals: {branch: the same on the grid of the image file}; see :meth:`summarise`.
    """
    model: Model
    data: np.ndarray
    seg: np.ndarray
    logits: Mapping[str, torch.Tensor]
    properties: dict
    segmentations: dict[str, np.ndarray] = field(default_factory=dict)
    originals: dict[str, Original] = field(default_factory=dict)

    def summarise(self, export: bool = True) -> None:
        """Fill in the segmentations and, if `export` is set, the originals.

        The student is the last: if the case is large, :meth:`slice` finds its logits still there.
        """
        for branch in reversed(list(self.logits)):
            maps = None
            if export:
                self.originals[branch], maps = self._export(branch)
            if maps is None or maps.shape != self.seg.shape:
                maps = maps_of(self.logits[branch], self.model.label_manager, measured=())
            self.segmentations[branch] = maps.segmentation

    def _export(self, branch: str) -> tuple[Original, PredictionMaps]:
        """Do what nnU-Net does to export the logits of a branch, without writing them."""
        model = self.model
        export = StreamingExport(model.plans_manager, model.configuration_manager, model.dataset_json,
                                 measured=("confidence",), heads=True)
        segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
            self.logits[branch], export.plans, export.configuration, export.labels, self.properties,
            num_threads_torch=torch.get_num_threads())
        maps = export.maps
        confidence = (export.uncropped(maps.heads, 0, self.properties) if maps.heads is not None else
                      export.uncropped(maps.confidence, 1, self.properties)[None])
        return Original(segmentation, confidence), maps

    def to_preprocessed(self, segmentation: np.ndarray) -> np.ndarray:
        """Move a segmentation from the grid of the image file to the preprocessed one, by nearest neighbours."""
        moved = segmentation.transpose(self.model.plans_manager.transpose_forward)
        moved = moved[tuple(slice(*bounds) for bounds in self.properties["bbox_used_for_cropping"])]
        indices = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(self.seg.shape, moved.shape)]
        return moved[np.ix_(*indices)].astype(np.int16)

    def slice(self) -> Slice:
        """Return the slice with most foreground in the label and the predictions together."""
        labels = self.model.label_manager
        if not self.segmentations:
            self.summarise(export=False)
        segmentations = [self.segmentations[branch] for branch in self.logits]
        ignore = -2 if labels.ignore_label is None else labels.ignore_label
        foreground = np.sum([[np.count_nonzero((of > 0) & (of != ignore)) for of in seg]
                             for seg in (self.seg, *segmentations)], axis=0)
        index = int(np.argmax(foreground))
        entropy = maps_of(self.logits["student"][:, index:index + 1], labels).entropy[0]
        spacing = self.model.configuration_manager.spacing
        return Slice(np.asarray(self.data[0, index]).astype(np.float32), self.seg[index].astype(np.int16),
                     np.stack([seg[index] for seg in segmentations]).astype(np.int16),
                     normalised_entropy(entropy, labels.num_segmentation_heads, labels.has_regions), index,
                     len(foreground), spacing[-2] / spacing[-1])


# ---- findings -------------------------------------------------------------------------------------------------------

@dataclass
class Calibration:
    """The calibration counts of a branch.

    Attributes:
        all: Counts of all voxels.
        in_question: Counts of the voxels in question (see `Findings`).
        cases: `Counts.coarse` of the voxels in question of each case.
    """
    all: Counts = field(default_factory=Counts.none)
    in_question: Counts = field(default_factory=Counts.none)
    cases: list[np.ndarray] = field(default_factory=list)


class Findings:
    """What the branches predict of the validation cases, and of some partially annotated training cases.

    A case that several folds validate has the fold in its name. Voxels are in question if a branch predicts foreground
    or is not sure there. They are the same for both branches and do not depend on the ground truth: of voxels that are
    chosen by the ground truth, even a calibrated network would look overconfident.

    Attributes:
        names: {branch: what the page calls it}. Segmentations that were given are the last branch, "given".
        evaluations: {branch: measures of the validation cases}.
        calibration: {branch: calibration counts}; there is none for "given".
        partial: The names of the training cases that are shown.
    """

    def __init__(self, model: Model, folds: list[Fold], predictions: Path | None, folder: Path, device: torch.device):
        """Predict and measure all cases.

        Args:
            model: The trained model.
            folds: Its folds.
            predictions: A folder of segmentations of the same validation cases, or None.
            folder: A folder for temporary files.
            device: Where to predict.

        Raises:
            InputError: A case or a segmentation is missing or does not match.
        """
        self.model, self.folder, self.predictions = model, folder, predictions
        # the teacher of a fold that has completed labels no longer predicts, that of another fold may
        self.branches = [branch for branch in folds[0].branches if all(branch in fold.branches for fold in folds)]
        self.names = {branch: name for branch, name in folds[0].names.items() if branch in self.branches}
        validation = {path: fold.validation or [] for path, fold in zip(model.fold_folders, folds)}
        folds_of = Counter(case for cases in validation.values() for case in cases)
        if predictions is not None:
            self.names["given"] = predictions.resolve().name
            _check_predictions(predictions, sorted(folds_of), model.dataset_json["file_ending"])
        patients = self._patients(folds_of, validation)
        self.evaluations = {branch: CaseMeasures(classes=model.classes, patients=patients) for branch in self.names}
        self.calibration = {branch: Calibration() for branch in self.branches}
        self.files: dict[str, Path] = {}
        training = folds[0].training or {}
        self.partial = _spread(sorted(case for case, kind in training.items() if kind == PARTIAL), PARTIAL_CASES)
        with tqdm(total=folds_of.total() + len(self.partial), desc="predicting", unit="case") as progress:
            for path, cases in validation.items():
                predict = Predictor(model, path, self.branches, device)
                for case in cases:
                    self._measure(_name(case, path, folds_of), case, predict(case))
                    progress.update()
                if path == model.fold_folders[0]:
                    for case in self.partial:
                        self._keep(case, predict(case).slice())
                        progress.update()

    def _patients(self, folds_of: Counter, validation: dict[Path, list[str]]) -> dict[str, str]:
        """Return {name: patient} of the validation cases."""
        try:
            patients = patients_of(folds_of, self.model.dataset_json.get("patient_pattern"))
        except InputError as error:
            raise InputError(f"{self.model.folder / 'dataset.json'}: {error}") from error
        return {_name(case, path, folds_of): patients[case] for path, cases in validation.items() for case in cases}

    def _measure(self, name: str, case: str, prediction: Prediction) -> None:
        reader, ending = self.model.plans_manager.image_reader_writer_class(), self.model.dataset_json["file_ending"]
        truth_file = self.model.truths / (case + ending)
        truth, properties = reader.read_seg(str(truth_file))
        truth = _integers(truth)
        prediction.summarise()
        content = prediction.slice()
        prediction.logits = {}  # large volumes need the memory
        prediction.segmentations.clear()
        segmentations = {branch: original.segmentation for branch, original in prediction.originals.items()}
        if self.predictions is not None:
            given = _read_given(self.predictions / (case + ending), truth_file, reader, truth)
            segmentations["given"] = given
            content.segmentations = np.stack([*content.segmentations, prediction.to_preprocessed(given)[content.index]])
        spacing = list(properties["spacing"])
        planar = is_flat(truth.shape[1:], spacing)
        first = 1 if planar else 0
        unlisted = {of: dict.fromkeys(MEASURES, math.nan) for of in self.model.unlisted.get(case, ())}
        for branch, segmentation in segmentations.items():
            true, predicted = (truth[0][0], segmentation[0]) if planar else (truth[0], segmentation)
            self.evaluations[branch].cases[name] = measure_case(
                true, predicted, self.model.classes, spacing[first:] if has_spacing(truth_file) else None,
                self.model.label_manager.ignore_label) | unlisted
        self._count(truth[0], prediction.originals)
        self._keep(name, content)

    def _count(self, truth: np.ndarray, originals: dict[str, Original]) -> None:
        """Add the calibration counts of a case, a few slices at a time."""
        labels = self.model.label_manager
        asked, others = ({branch: Counts.none() for branch in originals} for _ in range(2))
        rows = max(1, AT_A_TIME // math.prod(truth.shape[1:]))
        for part in (slice(start, start + rows) for start in range(0, len(truth), rows)):
            parts = {branch: Original(original.segmentation[part], original.confidence[:, part])
                     for branch, original in originals.items()}
            in_question = np.zeros(truth[part].shape, bool)
            for original in parts.values():
                in_question |= original.segmentation > 0
                for head in original.confidence:
                    in_question |= np.maximum(head, 1 - head) < SURE if labels.has_regions else head < SURE
            ignored = np.zeros(in_question.shape, bool)
            if labels.ignore_label is not None:
                ignored = truth[part] == labels.ignore_label
            for branch, original in parts.items():
                for counts, where in ((asked, in_question & ~ignored), (others, ~in_question & ~ignored)):
                    counts[branch] += self._count_voxels(original, truth[part], where)
        for branch in originals:
            found = self.calibration[branch]
            found.all += asked[branch] + others[branch]
            found.in_question += asked[branch]
            found.cases.append(asked[branch].coarse)

    def _count_voxels(self, original: Original, truth: np.ndarray, where: np.ndarray) -> Counts:
        labels, true = self.model.label_manager, truth[where]
        if not labels.has_regions:
            return count(original.confidence[0][where], original.segmentation[where] == true)
        heads = [head[where] for head in original.confidence]
        return sum((count(np.maximum(p, 1 - p), (p > 0.5) == np.isin(true, region))
                    for p, region in zip(heads, labels.foreground_regions)), Counts.none())

    def _keep(self, name: str, content: Slice) -> None:
        """Save a slice: which cases are shown is known only at the end, and the slices of all would fill the memory."""
        self.files[name] = self.folder / f"{len(self.files)}.npz"
        content.save(self.files[name])

    def slice(self, name: str) -> Slice:
        """Return the slice of a case in `cases` or `partial`."""
        return Slice.load(self.files[name])

    @property
    def cases(self) -> list[str]:
        """The names of the validation cases."""
        return list(self.evaluations["student"].cases)

    @property
    def patients(self) -> list[str]:
        """The patient of each validation case."""
        return self.evaluations["student"].patient_of_each

    def dice(self, branch: str) -> dict[str, float]:
        """Return {case: mean Dice over its classes}; NaN if none of them occurs."""
        return dict(zip(self.cases, self.evaluations[branch].values(FOREGROUND, "Dice").tolist()))

    def examples(self) -> dict[str, str]:
        """Return the {"best", "median", "worst"} cases by the student's mean Dice, as far as they are different
        cases."""
        dice = {case: value for case, value in self.dice("student").items() if np.isfinite(value)}
        ordered = sorted(dice, key=lambda case: (-dice[case], case))
        roles: dict[int, str] = {}
        for role, index in (("best", 0), ("worst", len(ordered) - 1), ("median", len(ordered) // 2)):
            roles.setdefault(index, role)
        return {role: ordered[index] for index, role in sorted(roles.items())} if ordered else {}


def _name(case: str, fold: Path, folds_of: Counter) -> str:
    """Return the name of a case, with its fold if several folds validate it."""
    return case if folds_of[case] == 1 else f"{case} ({fold.name})"


def _spread(items: list[str], count: int) -> list[str]:
    """Return at most `count` of the items, evenly spread."""
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, count)})] if items else []


def _check_predictions(folder: Path, cases: list[str], ending: str) -> None:
    """Raise InputError unless the folder holds a segmentation of every case."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    missing = [case for case in cases if not (folder / (case + ending)).is_file()]
    if missing:
        more = f", and {len(missing) - 1} more of the {len(cases)} validation cases are missing"
        raise InputError(f"{folder}: does not match the model: no "
                         f"{missing[0]}{ending}{more if len(missing) > 1 else ''}. Give a folder with a segmentation "
                         "of every validation case; confkd evaluate measures other predictions.")


def _read_given(path: Path, truth_file: Path, reader, truth: np.ndarray) -> np.ndarray:
    """Read a segmentation that was given. Raises InputError if it does not lie on the grid of the ground truth."""
    own, other = (read(file).geometry for file in (path, truth_file))
    known = has_spacing(path) and has_spacing(truth_file)
    if (known or own.size != other.size) and (differences := own.differences(other)):
        raise InputError(f"{path}: does not lie on the grid of the ground truth, {truth_file}: "
                         f"{'; '.join(differences)}")
    given = reader.read_seg(str(path))[0]
    if given.shape != truth.shape:
        raise InputError(f"{path}: has the shape {given.shape[1:]}, and the ground truth {truth.shape[1:]}")
    return _integers(given[0])


def _integers(labels: np.ndarray) -> np.ndarray:
    """Return labels as integers of few bytes; nnU-Net's readers return floating point numbers."""
    return labels.astype(np.uint8 if labels.min() >= 0 and labels.max() < 256 else np.int32)
