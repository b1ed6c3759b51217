"""A copy of a data set in which labels are completed, by a model or by a watershed."""
from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_confkd import __version__
from nnunet_confkd.data.annotated_classes import CLASSES_KEY, Listed, annotated_classes, possible_values
from nnunet_confkd.data.folders import find_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.json_files import read_description, read_folds
from nnunet_confkd.data.patients import patients_of, split_full_cases
from nnunet_confkd.data.raw_format import Dataset, raw_dataset, write_into
from nnunet_confkd.data.supervision import TABLE_KEY, UNLABELLED, check_labels, decide_kinds, kind_of
from nnunet_confkd.errors import InputError, counted, some
from nnunet_confkd.files import write_json
from nnunet_confkd.inference.completed_case import PREDICTED, CompletedCase, KnownLabel, check_case
from nnunet_confkd.inference.known_labels import require_possible
from nnunet_confkd.processes import parallel

KEY = "completed"  # in dataset.json: a list with one entry per run, because a completed data set can be completed again
REPORTED = ("kind_before", "annotated_voxels", "filled_voxels", "ignored_voxels")


@dataclass
class CompletedDataset:
    """A data set while its labels are completed.

    Attributes:
        source: The name of the data set whose labels are completed.
        folder: Its raw folder.
        described: Its dataset.json.
        dataset: What will be written.
        known: What is known of each case that is to be completed. This and what follows are found by :meth:`check`.
        counts: The voxels of each label in each case.
        kinds: The kind of each case.
        hidden: {case: for each head whether the case is annotated for it}, of cases that lack some.
        splits: The folds that will be written. None: none.
    """
    source: str
    folder: Path
    described: dict
    dataset: Dataset
    known: dict[str, KnownLabel] = field(default_factory=dict)
    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, Listed] = field(default_factory=dict)
    splits: list[dict] | None = None

    @classmethod
    def of(cls, source: int | str, name: str | None, suffix: str) -> CompletedDataset:
        """Read what there is of a data set.

        Args:
            source: The id or the name of the data set.
            name: The name of the new data set. None: that of the source, `_` and the suffix.
            suffix: Says what completes the labels.

        Raises:
            InputError: There is no such data set, or its files cannot be read.
        """
        source = find_dataset(source)
        folder = raw_folder() / source
        dataset = raw_dataset(folder, name or f"{source[11:]}_{suffix}")
        described = read_description(folder / "dataset.json")
        dataset.patient_pattern = described.get("patient_pattern")
        return cls(source, folder, described, dataset)

    def check(self, processes: int) -> None:
        """Read all training cases, so that all problems are found before any label is completed.

        Raises:
            InputError: There is nothing to complete, or labels cannot be read or have other values. All problems of
                the cases are listed at once.
        """
        self.known, self.counts, self.kinds, self.hidden = check_cases(self.folder, self.described, self.dataset,
                                                                       processes)
        self.splits = _splits_of(self.source, self.kinds, self.dataset.patient_pattern, self.known)

    def write(self, target: Path, preprocessed: Path, completions: list[CompletedCase], rows: list[dict], about: dict,
              processes: int, link: bool) -> dict:
        """Write the new data set, read it back, and remove the predictions.

        Args:
            target: The raw folder that is being written, with the predictions.
            preprocessed: The folder of preprocessed data that is being written.
            completions: How each case is completed.
            rows: For each of them what the case becomes ("kind"), and what `REPORTED` names.
            about: How the labels were completed.
            processes: The number of processes.
            link: Whether images are hard links instead of copies.

        Returns:
            `about` as it stands in dataset.json.

        Raises:
            RuntimeError: Annotated voxels have changed, or voxels were not filled.
        """
        self._replace_labels(completions, rows)
        about = {"source": self.source, **about, "nnunet_confkd": __version__}
        cases = {completion.case: {key: row[key] for key in REPORTED} for completion, row in zip(completions, rows)}
        self.dataset.more[KEY] = [*self.dataset.more.get(KEY, []), {**about, "cases": cases}]
        write_into(target, preprocessed, self.dataset, processes, link)
        _require_annotations(completions, processes)
        if self.splits is None:
            (preprocessed / "splits_final.json").unlink(missing_ok=True)  # no fold may validate on completed labels
        else:
            write_json(preprocessed / "splits_final.json", self.splits)
        shutil.rmtree(target / PREDICTED)
        return about

    def _replace_labels(self, completions: list[CompletedCase], rows: list[dict]) -> None:
        """Give each training case its kind, and the incomplete ones their completed label."""
        dataset, completed = self.dataset, {of.case: (of, row) for of, row in zip(completions, rows)}
        training = []
        for case in dataset.training:
            if case.name in completed:
                completion, row = completed[case.name]
                training.append(replace(case, kind=row["kind"], label=Volume(case.label.file, reader=completion.fill)))
            else:
                training.append(replace(case, kind=self.kinds[case.name]))
        dataset.training, dataset.annotated_classes = training, {}
        dataset.test = [replace(case, values={value: value for value in dataset.values}) for case in dataset.test]


def check_cases(folder: Path, described: dict, dataset: Dataset,
                 processes: int) -> tuple[dict[str, KnownLabel], dict[str, dict[int, int]], dict[str, str],
                                          dict[str, Listed]]:
    """Read all training cases, so that all problems are found before the prediction.

    Returns:
        What is known of each case that is to be completed; the voxels of each label in each case; the kind of each
        case; and for each head whether a case is annotated for it, of cases that lack some.
    """
    check_labels(described)
    labels = LabelManager(described["labels"], described.get("regions_class_order"))
    if not labels.has_ignore_label and not described.get(CLASSES_KEY):
        raise InputError(f"{folder / 'dataset.json'}: the labels have no \"ignore\", so every voxel has a label "
                         f"already; there is nothing to complete")
    allowed = sorted(dataset.values)
    checked = parallel(check_case, [(case, allowed, len(dataset.channel_names)) for case in dataset.training],
                       processes, "reading cases")
    problems = [problem for found, _ in checked for problem in found]
    names = {case.name for case in dataset.training}
    if "dataset" not in described and (folder / "labelsTr").is_dir():
        ending = described["file_ending"]
        problems += [f"{file}: has no image in {folder / 'imagesTr'}"
                     for file in sorted((folder / "labelsTr").glob(f"*{ending}"))
                     if file.name[:-len(ending)] not in names and not file.name.startswith(".")]
    if problems:
        raise InputError(f"{folder}: {len(problems)} problems; nothing was written:\n  " + "\n  ".join(problems))
    counts = {case.name: count for case, (_, count) in zip(dataset.training, checked)}
    hidden = annotated_classes(described, counts)
    kinds = decide_kinds(counts, labels, described.get(TABLE_KEY), hidden)
    possible = {case: possible_values(described["labels"], listed) for case, listed in hidden.items()}
    for of_case in possible.values():
        require_possible(labels, of_case)
    ignore = labels.ignore_label
    known = {case.name: KnownLabel(case.label.file, ignore, possible.get(case.name, {}))
             for case in dataset.training if possible.get(case.name) or counts[case.name].get(ignore)}
    unused = [case for case in known if kinds[case] == UNLABELLED and kind_of(counts[case], ignore) != UNLABELLED]
    if unused:  # their annotations may be wrong, and stay in a completed label
        print(f"left as they are: {counted(len(unused), 'case')} that \"{TABLE_KEY}\" in dataset.json declares "
              f"unlabelled, though annotated: {some(unused, 5)}. To complete them, fill their labels with the ignore "
              f"label, or take them out of \"{TABLE_KEY}\"")
    known = {case: label for case, label in known.items() if case not in unused}
    if not known:
        raise InputError(f"{folder}: no training case has an ignored voxel or lacks classes; there is nothing to "
                         f"complete")
    return known, counts, kinds, hidden


def _splits_of(source: str, kinds: dict[str, str], pattern: str | None,
               known: dict[str, KnownLabel]) -> list[dict] | None:
    """Return the folds of the source if they validate on none of the completed cases, which are `known`.

    Otherwise, return folds that validate on the cases that were fully annotated before, or None if they are too few.
    """
    file = preprocessed_folder() / source / "splits_final.json"
    splits = read_folds(file) if file.is_file() else []
    unknown = sorted({case for fold in splits for case in [*fold["train"], *fold["val"]]} - set(kinds))
    if unknown:
        raise InputError(f"{file}: names cases that {source} does not have: {', '.join(unknown[:10])}")
    if splits and not any(case in known for fold in splits for case in fold["val"]):
        return splits
    try:
        return split_full_cases(kinds, patients_of(kinds, pattern))
    except InputError:
        return None


def _require_annotations(completions: list[CompletedCase], processes: int) -> None:
    """Raise RuntimeError unless all annotated voxels are unchanged and all others are filled that had to be."""
    wrong = parallel(CompletedCase.is_wrong, [(completion,) for completion in completions], processes, "reading back")
    if any(wrong):
        raise RuntimeError("labels were not written as they should be: "
                           + ", ".join(completion.case for completion, is_wrong in zip(completions, wrong) if is_wrong))
