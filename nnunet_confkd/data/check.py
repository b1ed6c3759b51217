"""What is wrong with a data set in nnU-Net's raw format, before training, and which case is what.

torch is imported by the main process alone, once the files have been read: this module is imported by every worker.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from textwrap import fill
from types import SimpleNamespace

import numpy as np

from nnunet_confkd.data.folders import find_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.images import TIFF, Geometry, count_voxels, ending_of, read, spacing_file
from nnunet_confkd.data.json_files import NEEDED, changed_since_planning, is_whole, malformed, planning_text, read_folds, read_json
from nnunet_confkd.data.patients import patients_of, single_patient_text, split_full_cases
from nnunet_confkd.data.raw_format import label_values, name_problem, with_ignore
from nnunet_confkd.data.strokes import Shape, shape_of, suspects
from nnunet_confkd.data.supervision import FULL, PARTIAL, TABLE_KEY, UNLABELLED, decide_kinds, kind_of, require_full
from nnunet_confkd.errors import InputError, shown
from nnunet_confkd.processes import PROCESSES, parallel

KINDS = (FULL, PARTIAL, UNLABELLED)
WIDTH = 100  # of the text, in characters
ROWS = 40  # more cases than these are summarised


@dataclass
class Report:
    """What :func:`check_dataset` found. `confkd check --json` prints `as_dict()`: these fields, and "ok": no errors.

    dataset, folder: its name and its raw folder. labels, channels: as in dataset.json.
    errors: training would be wrong, or fail; empty: it would be right. warnings: what one should know.
    cases: {case: {"kind": "full" | "partial" | "unlabelled" | null where its label cannot be used, "declared": its kind in
        dataset.json's "supervision" or null, "patient": null without a pattern, "size": voxels of the image, "annotated" and
        "voxels": annotated voxels, all and {class: voxels}, "annotated_share" and "share": the same over "size", "hidden":
        annotated voxels in the label file that training does not see, since the case is declared unlabelled}}. Numbers
        are null where the kind is. Where the labels are regions, the classes are these (they overlap), under their names.
    totals: {kind, or "all": {"cases": number of cases, and "size", "annotated", "voxels", "annotated_share", "share" as
        above, of all of them together; a share of no voxels is null}}.
    split: {"file": splits_final.json or null, "folds": [{"train": {kind: cases}, "val": {kind: cases}}], "unused": cases
        that no fold trains or validates on}.
    test: {"cases": in imagesTs, "labelled": of them those in labelsTs}.
    """
    dataset: str
    folder: str
    labels: dict = field(default_factory=dict)
    channels: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    cases: dict[str, dict] = field(default_factory=dict)
    totals: dict[str, dict] = field(default_factory=dict)
    split: dict = field(default_factory=lambda: {"file": None, "folds": [], "unused": []})
    test: dict[str, int] = field(default_factory=lambda: {"cases": 0, "labelled": 0})

    def as_dict(self) -> dict:
        return asdict(self) | {"ok": not self.errors}

    def text(self, all_cases: bool = False) -> str:
        """For people: the totals, a row a case (of more than `ROWS` only on demand), then what is wrong.

        Files are named as within `folder`, which stands on top.
        """
        blocks = ["\n".join(_wrapped(line) for line in self._head())]
        if self.cases:
            summarised = len(self.cases) > ROWS and not all_cases
            blocks.append(_aligned(self._total_rows(summarised)))
            blocks.append(f"{len(self.cases)} cases: --all has a row for each" if summarised else self._case_tables())
        for title, texts in (("WARNINGS", self.warnings), ("ERRORS", self.errors)):
            if texts:
                blocks.append("\n".join([title, *(_wrapped(t.replace(f"{self.folder}/", ""), "- ", "  ") for t in texts)]))
        counts = f"{_number(len(self.errors), 'error')}, {_number(len(self.warnings), 'warning')}"
        if not self.errors:
            blocks.append(f"{counts}: ready; next: confkd plan -d {int(self.dataset[7:10])}")
        else:
            blocks.append(f"{counts}: correct the errors before training" + (
                "" if self.cases else "; the images and labels were not examined"))
        return "\n\n".join(blocks)

    def _head(self) -> list[str]:
        test = f", {_number(self.test['cases'], 'test case')} ({self.test['labelled']} labelled)"
        lines = [f"{self.dataset}: {_number(len(self.cases), 'training case')}{test if self.test['cases'] else ''}",
                 f"folder: {self.folder}"]
        if self.labels:
            lines += ["channels: " + ", ".join(self.channels),
                      "labels: " + ", ".join(f"{name} {value}" for name, value in self.labels.items())]
        total = self.totals.get("all", {"cases": 0})
        if "ignore" in self.labels and total["cases"] and total["annotated"] == total["size"]:
            lines.append("no case uses the ignore label: every voxel is annotated")
        hidden = sum(case["hidden"] > 0 for case in self.cases.values())
        if hidden:
            lines.append(f"{_number(hidden, 'case')} declared unlabelled: training does not see the annotated voxels")
        lines += [f"fold {k}: trains on {_kinds_text(fold['train'])}; validates on {_kinds_text(fold['val'])}"
                  for k, fold in enumerate(self.split["folds"])]
        return lines

    def _total_rows(self, summarised: bool) -> list[list[str]]:
        def cell(count: int, share: float | None) -> str:
            return f"{count:,}{_percent(share):>9}"

        kinds = [kind for kind in (*KINDS, "all") if self.totals[kind]["cases"]]
        totals = [self.totals[kind] for kind in kinds]
        rows = [["annotated voxels and their share", *kinds],
                ["cases", *(f"{total['cases']}" for total in totals)],
                ["annotated", *(cell(total["annotated"], total["annotated_share"]) for total in totals)],
                *([name, *(cell(total["voxels"][name], total["share"][name]) for total in totals)]
                  for name in self.totals["all"]["voxels"])]
        if summarised:
            shares = [[case["annotated_share"] for case in _of_kind(self.cases, kind)] for kind in kinds]
            rows += [[f"{word} annotated case", *(_percent(function(of_kind)) for of_kind in shares)]
                     for word, function in (("least", min), ("median", median), ("most", max))]
        return rows

    def _case_tables(self) -> str:
        """Side by side what fits into the width; further classes below, as often as it takes."""
        cases = self.cases.values()
        names = ["case", *self.cases]
        block = [names, ["kind", *(case["kind"] or "?" for case in cases)],
                 ["annotated", *(_percent(case["annotated_share"]) for case in cases)]]
        tables = []
        for name in self.totals["all"]["voxels"]:
            column = [name, *(f"{case['voxels'][name]:,}" if case["kind"] else "-" for case in cases)]
            if sum(2 + max(map(len, c)) for c in [*block, column]) - 2 > WIDTH and len(block) > 1:
                tables.append(block)
                block = [names]
            block.append(column)
        return "\n\n".join(_aligned(list(zip(*block))) for block in [*tables, block])


# ---- the files of a case, examined in processes ----------------------------------------------------------------------

@dataclass(frozen=True)
class Files:
    """Those of one case. numbers: the channels' numbers in the names of the images."""
    images: tuple[Path, ...]
    numbers: tuple[int, ...]
    label: Path | None


@dataclass
class Found:
    """What one case's files hold.

    counts: {value: voxels}; None for no label, or one that cannot be used. size: voxels of the image. channels: how many;
    None where an image cannot be read. digest: of all the voxels, equal for equal images; None for constant ones.
    shape: of a label that has no ignored voxel, which may be strokes all the same.
    """
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[int, int] | None = None
    size: int = 0
    channels: int | None = 0
    digest: str | None = None
    shape: Shape | None = None


def _examine(files: Files, values: list[int], ignore: int | None) -> Found:
    found, grid, constant, digest = Found(), None, True, hashlib.blake2b(digest_size=16)
    for file in files.images:
        try:
            picture = read(file)
        except InputError as error:
            found.errors.append(str(error))
            found.channels = None
            continue
        with np.errstate(over="ignore"):
            voxels = np.ascontiguousarray(picture.voxels, dtype=np.float32)  # nnU-Net's type
        bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        if bad:
            found.errors.append(f"{file}: {_number(bad, 'voxel')} not finite (NaN, infinite, or beyond single precision); "
                                f"replace by numbers")
        flat = [channel.min() for channel in voxels if channel.min() == channel.max()]
        found.warnings += [f"{file}: is empty, {value:g} everywhere" for value in flat]
        constant &= len(flat) == len(voxels)
        grid = grid or picture.geometry
        found.errors += [f"{file}: is on another grid than {files.images[0]}: {difference}"
                         for difference in picture.geometry.differences(grid)]
        found.size = found.size or int(np.prod(voxels.shape[1:]))
        if found.channels is not None:
            found.channels += len(voxels)
        digest.update(f"{voxels.shape}".encode())
        digest.update(voxels.data)
    if found.channels and not constant:
        found.digest = digest.hexdigest()
    if files.label is not None:
        _examine_label(files, grid, values, ignore, found)
    return found


def _examine_label(files: Files, grid: Geometry | None, values: list[int], ignore: int | None, found: Found) -> None:
    try:
        picture = read(files.label)
    except InputError as error:
        found.errors.append(str(error))
        return
    label, before = picture.voxels[0], len(found.errors)
    found.size = found.size or label.size
    if len(picture.voxels) > 1:
        found.errors.append(f"{files.label}: holds {len(picture.voxels)} channels; a label has one")
    if grid is not None:
        found.errors += [f"{files.label}: is on another grid than {files.images[0]}: {difference}; bring it to the image's"
                         for difference in picture.geometry.differences(grid)]
    counts = count_voxels(label, values)
    if sum(counts.values()) != label.size:
        held = np.unique(label)
        whole = np.isfinite(held) & (held == np.rint(held))
        strange = [int(value) for value in held[whole] if int(value) not in counts]
        if not whole.all():
            found.errors.append(f"{files.label}: holds values that are no whole numbers: {_some(held[~whole])}; was it "
                                f"resampled with interpolation? Make it anew")
        if strange:
            found.errors.append(f"{files.label}: holds the values {_some(strange)}, which dataset.json does not list; "
                                f"correct the label, or add them there")
    if len(found.errors) == before:
        found.counts = counts
        if not counts.get(ignore):
            found.shape = shape_of(label, picture.geometry.spacing[::-1])


# ---- the data set ---------------------------------------------------------------------------------------------------

def check_dataset(dataset: int | str, processes: int = PROCESSES, patient_pattern: str | None = None) -> Report:
    """Examine a raw data set, given as 27 or "Dataset027_ACDC", and its splits_final.json; nothing is changed.

    patient_pattern: a regular expression whose first group in the name of a case is the patient; default: dataset.json's
    "patient_pattern", or a case a patient.
    What concerns test cases alone is never more than a warning: training does not read them.
    Raises InputError where nothing can be examined: no such data set, no readable dataset.json, nnU-Net's variables unset.
    """
    name = find_dataset(dataset)
    if not re.fullmatch(r"Dataset\d{3}_.+", name):
        raise InputError(f"{raw_folder() / name}: nnU-Net's data sets are named like Dataset027_NAME; rename the folder")
    folder, splits_file = raw_folder() / name, preprocessed_folder() / name / "splits_final.json"
    described = read_json(folder / "dataset.json")
    report = Report(name, str(folder))
    if _check_description(described, report):
        return report
    report.labels, report.channels = described["labels"], list(described["channel_names"].values())

    training = _files_of_training(folder, described, report)
    test, notes = {}, Report(name, str(folder), channels=report.channels)
    if (folder / "imagesTs").is_dir():
        test = _files_of(folder, "Ts", described["file_ending"], notes)
    report.test = {"cases": len(test), "labelled": sum(files.label is not None for files in test.values())}
    if 0 < report.test["labelled"] < len(test):
        notes.warnings.append(f"{folder / 'labelsTs'}: has no label for " + _some(
            [case for case, files in test.items() if files.label is None]))
    values = sorted(label_values(report.labels))
    tasks = [(files, values, report.labels.get("ignore")) for files in (*training.values(), *test.values())]
    results = parallel(_examine, tasks, processes, f"checking {name}")
    found, tested = dict(zip(training, results)), dict(zip(test, results[len(training):]))
    _collect(training, found, report)
    _collect(test, tested, notes)
    if described.get("numTraining") != len(training) and is_whole(described.get("numTraining")):
        report.errors.append(f"{folder / 'dataset.json'}: \"numTraining\" is {described['numTraining']}, but there are "
                             f"{_number(len(training), 'training case')}; correct it")

    kinds = _decide_kinds(found, described, report)
    patients = _find_patients(training, patient_pattern or described.get("patient_pattern"), report)
    _describe_cases(found, kinds, described.get("supervision"), patients, report)
    written = splits_file.is_file()
    if written:
        folds = future = _check_split(splits_file, training, kinds, patients, report)
    else:
        folds, future = [], []
        if FULL in kinds.values():
            text, future = _default_split(kinds, patients, described.get("patient_pattern"))
            report.warnings.append(f"{splits_file}: there is no split. {text}")
    single = single_patient_text({f"fold {k}": fold for k, fold in enumerate(future)}, kinds, patients,
                                 f"confkd train {int(name[7:10])} CONFIGURATION all")
    if single:
        report.warnings.append(single)
    _check_strokes(found, kinds, report)
    _check_classes(future, written, report)
    _check_copies(found, tested, folds, report)
    _check_planned(described, report)
    report.warnings += [f"test: {text}" for text in (*notes.errors, *notes.warnings)]
    return report


def _check_description(described: dict, report: Report) -> bool:
    """Report what is wrong in dataset.json; returns whether it is too much to examine the files."""
    file = f"{report.folder}/dataset.json"
    wrong = malformed(described)
    for key, meaning in wrong.items():
        if key not in described:
            old = ' ("modality" is its name in the old format)' if key == "channel_names" and "modality" in described else ""
            report.errors.append(f"{file}: lacks \"{key}\"{old}; add {meaning}")
        elif key == "dataset":
            report.errors.append(f"{file}: \"dataset\" must be {meaning}; correct it, or remove it and use imagesTr and labelsTr")
        elif key in (*NEEDED, "patient_pattern"):
            report.errors.append(f"{file}: \"{key}\" must be {meaning}; got {shown(described[key])}")
    if "patient_pattern" in wrong:
        del described["patient_pattern"]
    if "labels" not in wrong:
        _check_labels(described, file, report)
    return bool(wrong.keys() & {"channel_names", "labels", "file_ending", "dataset"})


def _check_labels(described: dict, file: str, report: Report) -> None:
    labels = described["labels"]
    classes = {name: value for name, value in labels.items() if name != "ignore"}
    values = sorted(label_values(classes))
    if labels.get("background") != 0:
        report.errors.append(f"{file}: \"labels\" needs \"background\": 0")
    if values != list(range(len(values))):
        report.errors.append(f"{file}: the labels must be 0, 1, 2 and so on without a gap, not {_some(values)}; renumber "
                             f"them there and in the label files")
    try:
        with_ignore(labels)
    except InputError as error:
        report.errors.append(f"{file}: {error}; change it there and in the label files")
    same = [name for name, value in classes.items() if is_whole(value) and list(classes.values()).count(value) > 1]
    if same:
        report.warnings.append(f"{file}: some of the labels {_some(same)} have the same value; nnU-Net sees one class")
    regions = [value for value in classes.values() if value != 0 and value != [0]]
    order = described.get("regions_class_order")
    if any(isinstance(value, list) and len(value) > 1 for value in regions) and not (
            isinstance(order, list) and len(order) == len(regions) and all(is_whole(v) and v in values for v in order)):
        report.errors.append(f"{file}: some labels are regions (lists), so \"regions_class_order\" must hold one of the "
                             f"values {_some(values)} for each of the {len(regions)} that are not background, in the order "
                             f"in which they are painted; got {shown(order)}")


# ---- pairs of files ---------------------------------------------------------------------------------------------------

def _files_of_training(folder: Path, described: dict, report: Report) -> dict[str, Files]:
    if "dataset" in described:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        listed = get_filenames_of_train_images_and_targets(str(folder), described)
        files = {case: Files(tuple(map(Path, entry["images"])), tuple(range(len(entry["images"]))), Path(entry["label"]))
                 for case, entry in sorted(listed.items())}
    else:
        files = _files_of(folder, "Tr", described["file_ending"], report)
        for case in [case for case, entry in files.items() if entry.label is None]:
            label = folder / "labelsTr" / f"{case}{described['file_ending']}"
            report.errors.append(f"{files[case].images[0]}: has no label {label}; an unlabelled case needs one that is "
                                 f"\"ignore\" everywhere")
    if not files:
        report.errors.append(f"{folder}: has no training case")
    return files


def _files_of(folder: Path, split: str, ending: str, report: Report) -> dict[str, Files]:
    """Images and labels paired by nnU-Net's names: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz."""
    images: dict[str, dict[int, Path]] = {}
    for file in _listed(folder / f"images{split}", ending, report):
        match = re.fullmatch(r"(.+)_(\d{4})", file.name[:-len(ending)], re.DOTALL)
        if match is None:
            report.errors.append(f"{file}: has no number of a channel at the end of its name; rename it to "
                                 f"{file.name[:-len(ending)]}_0000{ending}")
        else:
            images.setdefault(match[1], {})[int(match[2])] = file
    # labels of tests are optional
    labels = {file.name[:-len(ending)]: file for file in _listed(folder / f"labels{split}", ending, report)
              } if split == "Tr" or (folder / f"labels{split}").is_dir() else {}
    report.errors += [f"{file}: is a label without an image; add images{split}/{case}_0000{ending}, or remove the label"
                      for case, file in labels.items() if case not in images]
    return {case: Files(tuple(of_case[n] for n in sorted(of_case)), tuple(sorted(of_case)), labels.get(case))
            for case, of_case in sorted(images.items())}


def _listed(folder: Path, ending: str, report: Report) -> list[Path]:
    if not folder.is_dir():
        report.errors.append(f"{folder}: there is no such folder; make it, or list the files in dataset.json (\"dataset\")")
        return []
    files = sorted(file for file in folder.iterdir() if not file.is_dir())
    spacings = {spacing_file(file) for file in files if ending_of(file, TIFF)}
    others = [file.name for file in files if not file.name.endswith(ending) and not file.name.startswith(".")
              and file not in spacings]
    if others:
        report.warnings.append(f"{folder}: nnU-Net passes over the files that do not end with {ending}: {_some(others)}")
    return [file for file in files if file.name.endswith(ending)]


def _collect(files: dict[str, Files], found: dict[str, Found], report: Report) -> None:
    """Add what was found in the files of the cases, what is wrong with their names and channels."""
    for case, result in found.items():
        reason, entry = name_problem(case), files[case]
        if reason is not None:
            report.errors.append(f"{entry.images[0]}: the name of the case, {case!r}, {reason}; rename it")
        report.errors += result.errors
        report.warnings += result.warnings
        wanted = len(report.channels)
        gaps = [n for n in range(max(entry.numbers) + 1) if n not in entry.numbers]
        if gaps or result.channels not in (None, wanted):
            report.errors.append(
                f"{entry.images[0]}: the case has {_number(result.channels or len(entry.images), 'channel')}, in files "
                f"numbered {_some(entry.numbers)}; dataset.json names {wanted}, {', '.join(report.channels)}, from 0 on: "
                f"add what is missing, remove what is too much, or correct \"channel_names\"")


# ---- kinds, patients, classes -----------------------------------------------------------------------------------------

def _decide_kinds(found: dict[str, Found], described: dict, report: Report) -> dict[str, str]:
    """By the trainer's own rules; {case: kind} of the cases whose labels can be used."""
    ignore, table = described["labels"].get("ignore"), described.get(TABLE_KEY, {})
    labels = SimpleNamespace(ignore_label=ignore, has_ignore_label=ignore is not None)  # what the rules ask of nnU-Net's
    kinds = {}
    if not isinstance(table, dict):
        report.errors.append(f"{report.folder}/dataset.json: \"{TABLE_KEY}\" must be an object {{case: kind}}; got "
                             f"{shown(table)}")
        table = {}
    report.errors += [f"{report.folder}/dataset.json, \"{TABLE_KEY}\": there is no case {case}; remove it from the table"
                      for case in sorted(set(table) - set(found))]
    for case, result in found.items():
        if result.counts is None:
            continue
        try:
            kinds |= decide_kinds({case: result.counts}, labels, {case: table[case]} if case in table else {})
        except InputError as error:
            report.errors.append(f"{report.folder}/{error}".replace("\n  ", " "))
            kinds[case] = kind_of(result.counts, ignore)
    if found and len(kinds) == len(found):  # of an unusable label it is not known what it was meant to be
        _report_error(report, "", require_full, kinds)
    return kinds


def _find_patients(cases: Iterable[str], pattern: str | None, report: Report) -> dict[str, str]:
    """{case: patient}; empty without a pattern, or where it is wrong."""
    if pattern is None:
        return {}
    return _report_error(report, "", patients_of, cases, pattern) or {}


def _report_error(report: Report, where: str, function, *arguments):
    """What the function returns; None, and the error reported, where it raises InputError."""
    try:
        return function(*arguments)
    except InputError as error:
        report.errors.append(f"{where}{error}")
        return None


def _describe_cases(found: dict[str, Found], kinds: dict[str, str], table, patients: dict[str, str], report: Report) -> None:
    """Fill in `cases` and `totals`."""
    table = table if isinstance(table, dict) else {}
    classes = {name: label_values({name: value}) for name, value in report.labels.items() if name != "ignore"}
    for case, result in found.items():
        kind = kinds.get(case)
        annotated, hidden, voxels = None, 0, dict.fromkeys(classes)
        if kind is not None:
            annotated = sum(result.counts.values()) - result.counts.get(report.labels.get("ignore"), 0)
            voxels = {name: sum(result.counts.get(v, 0) for v in values) for name, values in classes.items()}
        if kind == UNLABELLED:
            annotated, hidden, voxels = 0, annotated, dict.fromkeys(classes, 0)
        report.cases[case] = {"kind": kind, "declared": table.get(case) if table.get(case) in KINDS else None,
                              "patient": patients.get(case), "hidden": hidden,
                              **_with_shares(result.size, annotated, voxels)}
    for kind in (*KINDS, "all"):
        of_kind = _of_kind(report.cases, kind)
        report.totals[kind] = {"cases": len(of_kind), **_with_shares(
            sum(case["size"] for case in of_kind), sum(case["annotated"] for case in of_kind),
            {name: sum(case["voxels"][name] for case in of_kind) for name in classes})}


def _of_kind(cases: dict[str, dict], kind: str) -> list[dict]:
    """The cases of a kind; of "all", those whose kind is known."""
    return [case for case in cases.values() if case["kind"] == kind or kind == "all" and case["kind"]]


def _with_shares(size: int, annotated: int | None, voxels: dict[str, int | None]) -> dict:
    def share(count: int | None) -> float | None:
        return None if count is None or not size else count / size

    return {"size": size, "annotated": annotated, "annotated_share": share(annotated),
            "voxels": voxels, "share": {name: share(count) for name, count in voxels.items()}}


def _check_strokes(found: dict[str, Found], kinds: dict[str, str], report: Report) -> None:
    """Warn of cases that are taken for fully annotated though their labels look like strokes."""
    shapes = {case: result.shape for case, result in found.items() if kinds.get(case) == FULL and result.shape is not None}
    strokes = suspects(shapes)
    if strokes:
        listed = _some((f"{case} ({reason})" for case, reason in strokes.items()), 5)
        report.warnings.append(
            f"{len(strokes)} of {len(shapes)} fully annotated cases look like strokes and not like complete masks: {listed}. Look at "
            f"them. Where 0 means \"not annotated\", training would take it for background: give such cases to confkd mix as --partial, "
            f"with --ignore-value 0 and the --background-value of the strokes in the background")


def _check_classes(folds: list[dict[str, list[str]]], written: bool, report: Report) -> None:
    """Warn of classes that neither the teacher nor, of the partial labels, the student can learn from.

    folds: of splits_final.json, or, where it is not written yet, those that the trainer would write.
    """
    cases, totals = report.cases, report.totals
    parts = {str(k): fold["train"] for k, fold in enumerate(folds)}
    for name in totals["all"]["voxels"]:
        if name != "background":
            parts_without = [part for part, of_part in [("", list(cases)), *parts.items()] if _any_full(of_part, cases) and not any(
                cases[case]["voxels"][name] for case in of_part if cases[case]["kind"] == FULL)]
            if parts_without:
                of_folds = f" of fold {_some(parts_without)}" + ("" if written else " that the trainer will write")
                report.warnings.append(
                    f"class {name}: annotated in no fully annotated training case{'' if parts_without[0] == '' else of_folds}; the "
                    f"teacher cannot learn it, and what it teaches speaks against the class. Annotate it completely in one of them")
        if totals[PARTIAL]["cases"] and not totals[PARTIAL]["voxels"][name]:
            report.warnings.append(f"class {name}: annotated nowhere among the partial cases" + (
                "; the student learns what is background from the full ones alone" if name == "background" else
                "; the student learns it from the full ones alone"))


def _any_full(names: Iterable[str], cases: dict[str, dict]) -> bool:
    return any(cases[case]["kind"] == FULL for case in names)


# ---- the split --------------------------------------------------------------------------------------------------------

def _check_planned(described: dict, report: Report) -> None:
    """An error where dataset.json was edited after planning: training reads the copy that planning made."""
    raw, planned = Path(report.folder) / "dataset.json", preprocessed_folder() / report.dataset / "dataset.json"
    if planned.is_file():
        try:
            keys = changed_since_planning(described, read_json(planned))
        except InputError as error:
            report.errors.append(str(error))
            return
        if keys:
            report.errors.append(planning_text(raw, planned, keys, int(report.dataset[7:10])))


def _check_split(file: Path, cases: Iterable[str], kinds: dict[str, str], patients: dict[str, str], report: Report,
                 ) -> list[dict[str, list[str]]]:
    """Report what is wrong with it; returns the folds, with the cases that exist."""
    try:
        folds = read_folds(file)
    except InputError as error:
        report.errors.append(str(error))
        return []
    known, cases, weak = [], dict.fromkeys(cases), {}
    report.split["file"] = str(file)
    for k, fold in enumerate(folds):
        where, train, val = f"{file}, fold {k}: ", fold["train"], fold["val"]
        unknown = sorted({*train, *val} - cases.keys())
        both = sorted({*train} & {*val})
        weak |= {case: k for case in val if kinds.get(case, FULL) != FULL}
        shared = _on_both_sides(patients, sorted({*train} - {*both}), sorted({*val} - {*both}))
        known.append({side: [case for case in fold[side] if case in cases] for side in ("train", "val")})
        if unknown:
            report.errors.append(f"{where}there are no cases {_some(unknown)}; correct the names")
        if both:
            report.errors.append(f"{where}trains and validates on {_some(both)}; each case can be on one side only")
        report.errors += [f"{where}patient {patient} has cases to train ({_some(of_train)}) and to validate "
                          f"({_some(of_val)}); keep them on one side" for patient, (of_train, of_val) in shared.items()]
        if not val:
            report.errors.append(f"{where}validates on no case; move fully labelled ones to \"val\"")
        training = {case: kinds[case] for case in known[-1]["train"] if case in kinds}
        if FULL in kinds.values() and len(training) == len(known[-1]["train"]):
            _report_error(report, where, require_full, training)
    if weak:
        report.errors.append(
            f"{file}, fold {_some(sorted(set(weak.values())))}: validates on cases that are not fully annotated, where only annotated "
            f"voxels would count: {_some(f'{case} ({kinds[case]})' for case in weak)}. Did nnU-Net write this file? Then delete it: "
            f"confkd plan, or the next training, writes folds that validate on fully annotated cases only. Or move these cases to "
            f"\"train\"")
    report.split["folds"] = [{side: {kind: sum(kinds.get(case) == kind for case in fold[side]) for kind in KINDS}
                              for side in ("train", "val")} for fold in known]
    used = {case for fold in known for side in fold.values() for case in side}
    report.split["unused"] = [case for case in cases if case not in used]
    if report.split["unused"]:
        report.warnings.append(f"{file}: no fold trains or validates on {_some(report.split['unused'])}")
    return known


def _default_split(kinds: dict[str, str], patients: dict[str, str], pattern: str | None,
                   ) -> tuple[str, list[dict[str, list[str]]]]:
    """What the trainer does without a splits_final.json, in words, and the folds. pattern: dataset.json's, the only one that
    it knows."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    if pattern is None and set(kinds.values()) == {FULL}:
        if len(kinds) < 5:
            return (f"nnU-Net would make five folds, and fail: there are only {len(kinds)} cases. Write a split, or train "
                    f"on fold 'all'"), []
        folds, text = generate_crossval_split(sorted(kinds)), "nnU-Net will make five random folds of all cases"
    else:
        try:
            folds = split_full_cases(kinds, patients_of(kinds, pattern))
        except InputError as error:
            return str(error), []
        text = f"The trainer will write {len(folds)} folds of the fully labelled cases; all others train in every fold"
    shared = {patient for fold in folds for patient in _on_both_sides(patients, fold["train"], fold["val"])}
    if shared:
        text += (f". It does not know the patients: {_some(sorted(shared))} would be on both sides of a fold. Write the "
                 f"pattern to dataset.json as \"patient_pattern\"")
    return text, folds


def _on_both_sides(patients: dict[str, str], train: Iterable[str], val: Iterable[str],
                   ) -> dict[str, tuple[list[str], list[str]]]:
    """{patient: (its cases to train, its cases to validate)} of those that have both."""
    sides: dict[str, tuple[list[str], list[str]]] = {}
    for side, cases in enumerate((train, val)):
        for case in cases:
            if case in patients:
                sides.setdefault(patients[case], ([], []))[side].append(case)
    return {patient: both for patient, both in sorted(sides.items()) if all(both)}


def _check_copies(found: dict[str, Found], tested: dict[str, Found], folds: list[dict[str, list[str]]], report: Report,
                  ) -> None:
    """Equal images: an error where a fold trains on one and validates on the other."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for of_test, results in enumerate((found, tested)):
        for case, result in results.items():
            if result.digest is not None:
                groups.setdefault(result.digest, ([], []))[of_test].append(case)
    for training, test in groups.values():
        apart = [k for k, fold in enumerate(folds) if all(set(training) & set(fold[side]) for side in ("train", "val"))]
        if len(training) > 1 and apart:
            report.errors.append(f"the images of {', '.join(training)} are identical, and fold {_some(apart)} trains and "
                                 f"validates on them; keep them on one side, or remove all but one")
        elif len(training) > 1:
            report.warnings.append(f"the images of {', '.join(training)} are identical; is one a copy by mistake?")
        if len(test) > 1 or test and training:
            report.warnings.append(f"test: the images of {', '.join(test)} (test)" + (
                f" and {', '.join(training)} (training)" if training else "") + " are identical")


# ---- text -----------------------------------------------------------------------------------------------------------

def _some(values: Iterable, limit: int = 10) -> str:
    """The first of the values, and how many more there are."""
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _percent(share: float | None) -> str:
    """Three digits, and never 0 or 100 for what is not."""
    if share is None:
        return "-"
    if share == 0:
        return "0 %"
    if share < 1e-5:
        return "<0.001 %"
    text = f"{100 * share:#.3g}".rstrip(".")
    return f"{'>99.9' if text == '100' and share < 1 else text} %"


def _kinds_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"


def _wrapped(text: str, first: str = "", rest: str = "    ") -> str:
    return fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def _aligned(rows: list) -> str:
    """A table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="confkd check", description=(
        "Examine a data set in nnU-Net's raw format before training: files, geometry, values, supervision, split. The exit "
        "status is 0 where training would be right, warnings or not, and 1 where it would be wrong."))
    parser.add_argument("-d", "--dataset", required=True, metavar="ID", help="the data set, id or name")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON, and nothing else")
    parser.add_argument("--all", action="store_true", help=f"a row for each case, for more than {ROWS} too")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="its first group in the name of a case is the patient; "
                        "default: dataset.json's \"patient_pattern\", or a case a patient")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    args = parser.parse_args(argv)
    report = check_dataset(args.dataset, args.processes, args.patient_pattern)
    print(json.dumps(report.as_dict(), indent=2, allow_nan=False) if args.json else report.text(args.all))
    return 1 if report.errors else 0
