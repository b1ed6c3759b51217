"""A trained model's folder, as the report reads it: plans, curves, and what was trained on what."""
from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.data.annotated_classes import CLASSES_KEY, annotated_classes, unlisted_classes
from nnunet_confkd.data.json_files import read_description, read_json, read_plans, read_record, split_of_fold
from nnunet_confkd.data.supervision import FULL, TABLE_KEY, annotation_counts, decide_kinds
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.checkpoints import fold_folders, load_checkpoint
from nnunet_confkd.training.network import has_teacher, teacher_was_left


@dataclass
class Fold:
    """What is known about a trained fold without its data.

    Attributes:
        name: The name of its folder, such as "fold_0".
        trainer: The name of its trainer's class.
        epochs: The number of epochs that it was trained.
        curves: {name: one value for each epoch}, as the checkpoint keeps them.
        record: The content of confkd.json. None: the model is one of stock nnU-Net.
        branches: "student", and "teacher" if there is one.
        training: {case: kind} of the training cases. None: not known.
        validation: The validation cases. None: not known.
        notes: What the reader must know about the choice of the cases, a sentence each.
    """
    name: str
    trainer: str
    epochs: int
    curves: dict[str, list]
    record: dict | None
    branches: list[str]
    training: dict[str, str] | None = None
    validation: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trained_on(self) -> set[str]:
        """The validation cases that are training cases as well, as in fold "all"."""
        return set(self.training or ()) & set(self.validation or ())

    @property
    def names(self) -> dict[str, str]:
        """{branch: what the page calls it}.

        The report predicts without hints. A teacher that was trained with hints segments less well without them, so its
        name says so. A single branch is the student of nobody, so it is called the network.
        """
        return self._named("without hints")

    @property
    def curve_names(self) -> dict[str, str]:
        """As `names`, for the training curves: the training validates such a teacher with simulated hints."""
        return self._named("with simulated hints")

    def _named(self, how: str) -> dict[str, str]:
        if len(self.branches) < 2:
            return dict.fromkeys(self.branches, "network")
        with_hints = self.record is not None and self.record.get("teacher_validated_with_hints")
        return {"student": "student", "teacher": f"teacher {how}" if with_hints else "teacher"}


class Model:
    """A trained model's folder with its plans and, if they are there, its preprocessed data.

    Attributes:
        fold_folders: The folders of the folds to report on.
        missing_data: Why there are no preprocessed data. None: they are there.
    """

    def __init__(self, folder: str | Path, folds: list[str] | None, checkpoint_name: str):
        """Open a model folder.

        Args:
            folder: TRAINER__PLANS__CONFIGURATION under nnUNet_results.
            folds: The folds to report on, such as ["0", "1"]. None: all that are trained.
            checkpoint_name: The file name of the checkpoints.

        Raises:
            InputError: The folder is no trained model, or has no such fold or checkpoint.
        """
        self.folder, self.checkpoint_name = Path(folder), checkpoint_name
        self.fold_folders = self._choose_folds(folds)
        self.plans = read_plans(self.folder / "plans.json")
        self.dataset_json = read_description(self.folder / "dataset.json")
        self.plans_manager = PlansManager(self.plans)
        self.label_manager = self.plans_manager.get_label_manager(self.dataset_json)
        checkpoint = load_checkpoint(self.fold_folders[0] / checkpoint_name)
        self.configuration = checkpoint["init_args"]["configuration"]
        self.configuration_manager = self.plans_manager.get_configuration(self.configuration)
        self.missing_data = self._find_data()

    def _choose_folds(self, folds: list[str] | None) -> list[Path]:
        chosen = fold_folders(self.folder)
        if folds is not None:
            there = {path.name: path for path in chosen}
            wrong = [fold for fold in folds if f"fold_{fold}" not in there]
            if wrong:
                raise InputError(f"{self.folder}: has no trained fold {', '.join(wrong)}; there is "
                                 f"{', '.join(sorted(there))}")
            chosen = [there[f"fold_{fold}"] for fold in folds]
        without = [path.name for path in chosen if not (path / self.checkpoint_name).is_file()]
        if without:
            raise InputError(f"{self.folder}: no {self.checkpoint_name} in {', '.join(without)}. If the training is "
                             "not finished, name another checkpoint (-chk checkpoint_best.pth or "
                             "checkpoint_latest.pth), or other folds (--fold).")
        return chosen

    def _find_data(self) -> str | None:
        if not nnUNet_preprocessed.is_set():
            return "the environment variable nnUNet_preprocessed is not set"
        self.base = Path(os.fspath(nnUNet_preprocessed)) / self.plans_manager.dataset_name
        self.data = self.base / self.configuration_manager.data_identifier
        self.truths = self.base / "gt_segmentations"
        for path in (self.data, self.truths):
            if not path.is_dir() or not any(path.iterdir()):
                return f"the preprocessed data were expected in {path}, which is missing or empty"
        return None

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """{name: labels} of the foreground classes or regions."""
        def labels(value) -> tuple[int, ...]:
            return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)

        return {str(name): labels(value) for name, value in self.dataset_json["labels"].items()
                if name != "ignore" and labels(value) != (0,)}

    @property
    def unlisted(self) -> dict[str, set[str]]:
        """{case: classes that it is not annotated for}. Raises InputError."""
        return unlisted_classes(self.dataset_json, str(self.folder / "dataset.json"))

    def read_fold(self, folder: Path) -> Fold:
        """Read the record, the curves and the cases of a fold. Raises InputError."""
        checkpoint = load_checkpoint(folder / self.checkpoint_name)
        record = read_record(folder / "confkd.json") if (folder / "confkd.json").is_file() else None
        weights = checkpoint["network_weights"]
        branches = ["student", "teacher"] if has_teacher(weights) and not teacher_was_left(weights) else ["student"]
        fold = Fold(folder.name, checkpoint["trainer_name"], checkpoint["current_epoch"], checkpoint["logging"], record,
                    branches)
        if record is not None:
            fold.training, fold.validation = record["supervision"], sorted(record["pseudo_dice_on"])
        else:
            self._find_cases(folder, fold)
        if fold.trained_on:
            fold.notes.append(f"{folder.name}: {len(fold.trained_on)} of its {len(fold.validation)} validation cases "
                              "are training cases as well, so their figures say nothing about new cases.")
        if lacking := self.unlisted.keys() & set(fold.validation or ()):
            fold.notes.append(f"{folder.name}: {len(lacking)} of its {len(fold.validation)} validation cases are not "
                              "annotated for all classes. They count for their own classes only, but the calibration "
                              "takes the others for absent.")
        return fold

    def _find_cases(self, folder: Path, fold: Fold) -> None:
        """Find the cases of a fold of stock nnU-Net, which keeps no record of them beside the model.

        The split is in the preprocessed data. If it is missing, the summary of the final validation names the
        validation cases.
        """
        name = folder.name.removeprefix("fold_")
        cases, split = None, None
        if self.missing_data is None:
            cases = sorted(infer_dataset_class(str(self.data)).get_identifiers(str(self.data)))
            split = split_of_fold(self.base / "splits_final.json", name)
        training = None
        if name == "all":
            training = fold.validation = cases
        elif split is not None:
            training, fold.validation = split["train"], sorted(split["val"])
        elif (folder / "validation" / "summary.json").is_file():
            entries = read_json(folder / "validation" / "summary.json")["metric_per_case"]
            fold.validation = sorted(Path(entry["prediction_file"]).name.removesuffix(self.dataset_json["file_ending"])
                                     for entry in entries)
        if training is not None:
            self._decide_kinds(fold, cases, training)

    def _decide_kinds(self, fold: Fold, cases: list[str], training: list[str]) -> None:
        """Find the kinds of a stock model's training cases, and exclude partially annotated validation cases."""
        kinds = {case: FULL for case in cases}
        if self.label_manager.has_ignore_label or self.dataset_json.get(CLASSES_KEY):
            counts = annotation_counts(self.data, cases, self.label_manager)
            kinds = decide_kinds(counts, self.label_manager, self.dataset_json.get(TABLE_KEY),
                                 annotated_classes(self.dataset_json, counts))
        fold.training = {case: kinds[case] for case in training if case in kinds}
        full = [case for case in fold.validation if kinds.get(case) == FULL]
        if full and len(full) < len(fold.validation):
            fold.notes.append(f"{fold.name}: {len(fold.validation) - len(full)} validation cases are not fully "
                              "annotated and excluded.")
            fold.validation = full
