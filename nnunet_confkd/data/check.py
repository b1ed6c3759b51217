"""Check a data set in nnU-Net's raw format before training: what is wrong with it, and which kind each case is.

torch is imported only after the files have been read, and only by the main process.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from nnunet_confkd.arguments import Parser
from nnunet_confkd.data.annotated_classes import (
    CLASSES_KEY,
    Listed,
    annotated_classes,
    heads_of,
    require_annotated,
    teaching_cases,
)
from nnunet_confkd.data.check_cases import (
    CaseContent,
    CaseFiles,
    examine_case,
    find_files,
    report_cases,
    training_files,
)
from nnunet_confkd.data.check_report import ROWS, Report
from nnunet_confkd.data.folders import find_dataset, preprocessed_folder, raw_folder
from nnunet_confkd.data.json_files import (
    NEEDED,
    changed_since_planning,
    is_whole,
    malformed,
    planning_text,
    read_folds,
    read_json,
)
from nnunet_confkd.data.patients import FOLDS, patients_of, single_patient_text, split_full_cases, split_text
from nnunet_confkd.data.raw_format import label_values, with_ignore
from nnunet_confkd.data.sanity import Folds, check_copies, warn_of_cases, warn_of_classes
from nnunet_confkd.data.supervision import (
    FULL,
    KINDS,
    PARTIAL,
    TABLE_KEY,
    UNLABELLED,
    decide_kinds,
    kind_of,
    require_full,
)
from nnunet_confkd.errors import InputError, counted, shown, some
from nnunet_confkd.processes import PROCESSES, parallel

FEW = FOLDS  # a class that fewer cases are annotated for does not validate in every fold


def check_dataset(dataset: int | str, processes: int = PROCESSES, patient_pattern: str | None = None) -> Report:
    """Check a raw data set and its splits_final.json. Nothing is changed.

    What concerns test cases alone is never more than a warning, because training does not read them.

    Args:
        dataset: For example 27 or "Dataset027_ACDC".
        processes: How many processes read the cases.
        patient_pattern: Regular expression whose first group in a case's name is the patient. None: dataset.json's.

    Returns:
        What is wrong, and a description of each case.

    Raises:
        InputError: There is no such data set, dataset.json cannot be read, or nnU-Net's variables are not set.

    Examples:
        >>> check_dataset(27).errors  # doctest: +SKIP
        []
    """
    name = find_dataset(dataset)
    if not re.fullmatch(r"Dataset\d{3}_.+", name):
        raise InputError(f"{raw_folder() / name}: nnU-Net's data sets are named like Dataset027_NAME; rename the "
                         f"folder")
    folder, splits_file = raw_folder() / name, preprocessed_folder() / name / "splits_final.json"
    described = read_json(folder / "dataset.json")
    report = Report(name, str(folder))
    if _check_description(described, report):
        return report
    report.labels, report.channels = described["labels"], list(described["channel_names"].values())

    training = training_files(folder, described, report)
    test_report = Report(name, str(folder), channels=report.channels)
    test = _test_files(folder, described["file_ending"], report, test_report)
    tasks = [(files, sorted(label_values(report.labels)), report.labels.get("ignore"))
             for files in (*training.values(), *test.values())]
    results = parallel(examine_case, tasks, processes, f"checking {name}")
    contents, test_contents = dict(zip(training, results)), dict(zip(test, results[len(training):]))
    report_cases(training, contents, report)
    report_cases(test, test_contents, test_report)
    _check_number(described.get("numTraining"), len(training), report)
    kinds, hidden = _decide_kinds(contents, described, report)
    patients = _find_patients(training, patient_pattern or described.get("patient_pattern"), report)
    _describe_cases(contents, kinds, described.get("supervision"), patients, report)
    _describe_classes(hidden, report)
    if splits_file.is_file():
        written = folds = _check_split(splits_file, training, kinds, patients, report)
    else:
        written = []
        folds = _default_split(splits_file, kinds, patients, described.get("patient_pattern"), report)
    single = single_patient_text({f"fold {k}": fold for k, fold in enumerate(folds)}, kinds, patients,
                                 f"confkd train {int(name[7:10])} CONFIGURATION all")
    if single:
        report.warnings.append(single)
    warn_of_cases(training, contents, kinds, report, _predicted_cases(described))
    warn_of_classes(training, folds, splits_file.is_file(), report)
    check_copies(training, contents, test_contents, patients, written, report)
    _check_planned(described, report)
    report.warnings += [f"test: {text}" for text in (*test_report.errors, *test_report.warnings)]
    return report


def _predicted_cases(described: dict) -> set[str]:
    """The cases whose labels `confkd complete` has completed."""
    return {case for run in described.get("completed", ()) for case in run["cases"]}


# ---- dataset.json ---------------------------------------------------------------------------------------------------

def _check_number(told, found: int, report: Report) -> None:
    if told != found and is_whole(told):
        report.errors.append(f"{report.folder}/dataset.json: \"numTraining\" is {told}, but there are "
                             f"{counted(found, 'training case')}; correct it")


def _check_description(described: dict, report: Report) -> bool:
    """Report what is wrong in dataset.json. Return whether it is too much to examine the files."""
    file = f"{report.folder}/dataset.json"
    wrong = malformed(described)
    for key, meaning in wrong.items():
        if key not in described:
            old = key == "channel_names" and "modality" in described
            report.errors.append(f"{file}: lacks \"{key}\"" + (
                ' ("modality" is its name in the old format)' if old else "") + f"; add {meaning}")
        elif key == "dataset":
            report.errors.append(f"{file}: \"dataset\" must be {meaning}; correct it, or remove it and use imagesTr "
                                 f"and labelsTr")
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
        report.errors.append(f"{file}: the labels must be 0, 1, 2 and so on without a gap, not {some(values)}; "
                             f"renumber them there and in the label files")
    try:
        with_ignore(labels)
    except InputError as error:
        report.errors.append(f"{file}: {error}; change it there and in the label files")
    same = [name for name, value in classes.items() if is_whole(value) and list(classes.values()).count(value) > 1]
    if same:
        report.warnings.append(f"{file}: some of the labels {some(same)} have the same value; nnU-Net sees one class")
    regions = [value for value in classes.values() if value != 0 and value != [0]]
    order = described.get("regions_class_order")
    if any(isinstance(value, list) and len(value) > 1 for value in regions) and not (
            isinstance(order, list) and len(order) == len(regions) and all(is_whole(v) and v in values for v in order)):
        report.errors.append(f"{file}: some labels are regions (lists), so \"regions_class_order\" must hold one of "
                             f"the values {some(values)} for each of the {len(regions)} that are not background, in "
                             f"the order in which they are painted; got {shown(order)}")


def _check_planned(described: dict, report: Report) -> None:
    """Report that dataset.json was edited after planning: training reads the copy that planning made."""
    raw, planned = Path(report.folder) / "dataset.json", preprocessed_folder() / report.dataset / "dataset.json"
    if planned.is_file():
        copy = _report_error(report, "", read_json, planned)
        keys = changed_since_planning(described, copy) if copy is not None else []
        if keys:
            report.errors.append(planning_text(raw, planned, keys, int(report.dataset[7:10])))


def _report_error(report: Report, where: str, function, *arguments):
    """Return what the function returns. If it raises InputError, report the error and return None."""
    try:
        return function(*arguments)
    except InputError as error:
        report.errors.append(f"{where}{error}")
        return None


# ---- cases ----------------------------------------------------------------------------------------------------------

def _test_files(folder: Path, ending: str, report: Report, test_report: Report) -> dict[str, CaseFiles]:
    """Find the files of the test cases. Count them in `report`; what is wrong goes to `test_report`."""
    test = find_files(folder, "Ts", ending, test_report) if (folder / "imagesTs").is_dir() else {}
    without = [case for case, files in test.items() if files.label is None]
    report.test = {"cases": len(test), "labelled": len(test) - len(without)}
    if 0 < len(without) < len(test):
        test_report.warnings.append(f"{folder / 'labelsTs'}: has no label for {some(without)}")
    return test


def _decide_kinds(contents: dict[str, CaseContent], described: dict,
                  report: Report) -> tuple[dict[str, str], dict[str, Listed]]:
    """Return {case: kind} of the cases whose labels can be used, by the trainer's own rules.

    Also return {case: for each head whether it is listed} of the cases that are not annotated for all classes.
    """
    ignore, table = described["labels"].get("ignore"), described.get(TABLE_KEY, {})
    labels = SimpleNamespace(ignore_label=ignore, has_ignore_label=ignore is not None)  # what the rules ask nnU-Net for
    kinds = {}
    if not isinstance(table, dict):
        report.errors.append(f"{report.folder}/dataset.json: \"{TABLE_KEY}\" must be an object {{case: kind}}; got "
                             f"{shown(table)}")
        table = {}
    report.errors += [f"{report.folder}/dataset.json, \"{TABLE_KEY}\": there is no case {case}; remove it from the "
                      f"table"
                      for case in sorted(set(table) - set(contents))]
    counts = {case: content.counts for case, content in contents.items() if content.counts is not None}
    hidden = _report_error(report, f"{report.folder}/", annotated_classes, described, counts) or {}
    for case in counts:
        try:
            kinds |= decide_kinds({case: counts[case]}, labels, {case: table[case]} if case in table else {}, hidden)
        except InputError as error:
            report.errors.append(f"{report.folder}/{error}".replace("\n  ", " "))
            kinds[case] = kind_of(counts[case], ignore)
    if contents and len(kinds) == len(contents):  # what a label that cannot be used was meant to be is not known
        if hidden:
            _report_error(report, "", require_annotated, kinds, hidden, described["labels"], True)
            if not teaching_cases(kinds, hidden, [case for case in counts if not counts[case].get(ignore, 0)]):
                report.warnings.append("no case can teach the others: none is annotated for all classes, and those "
                                       "with more classes than others do not cover all. ConfKDTrainer would stop; "
                                       "train without a teacher: -tr ConfKDTrainer_partialOnly")
        else:
            _report_error(report, "", require_full, kinds)
    return kinds, {case: listed for case, listed in hidden.items() if kinds[case] == PARTIAL}


def _find_patients(cases: Iterable[str], pattern: str | None, report: Report) -> dict[str, str]:
    """Return {case: patient}; empty without a pattern, or if it is wrong."""
    return {} if pattern is None else _report_error(report, "", patients_of, cases, pattern) or {}


def _describe_cases(contents: dict[str, CaseContent], kinds: dict[str, str], table, patients: dict[str, str],
                    report: Report) -> None:
    """Fill in the report's `cases` and `totals`."""
    table = table if isinstance(table, dict) else {}
    classes = {name: label_values({name: value}) for name, value in report.labels.items() if name != "ignore"}
    for case, content in contents.items():
        kind = kinds.get(case)
        annotated, hidden, voxels = None, 0, dict.fromkeys(classes)
        if kind is not None:
            annotated = sum(content.counts.values()) - content.counts.get(report.labels.get("ignore"), 0)
            voxels = {name: sum(content.counts.get(v, 0) for v in values) for name, values in classes.items()}
        if kind == UNLABELLED:
            annotated, hidden, voxels = 0, annotated, dict.fromkeys(classes, 0)
        report.cases[case] = {"kind": kind, "declared": table.get(case) if table.get(case) in KINDS else None,
                              "patient": patients.get(case), "hidden": hidden, "classes": None,
                              **_with_shares(content.size, annotated, voxels)}
    for kind in (*KINDS, "all"):
        cases = report.of_kind(kind)
        report.totals[kind] = {"cases": len(cases), **_with_shares(
            sum(case["size"] for case in cases), sum(case["annotated"] for case in cases),
            {name: sum(case["voxels"][name] for case in cases) for name in classes})}


def _with_shares(size: int, annotated: int | None, voxels: dict[str, int | None]) -> dict:
    def share(count: int | None) -> float | None:
        return None if count is None or not size else count / size

    return {"size": size, "annotated": annotated, "annotated_share": share(annotated),
            "voxels": voxels, "share": {name: share(count) for name, count in voxels.items()}}


def _describe_classes(hidden: dict[str, Listed], report: Report) -> None:
    """Fill in the report's `classes` and the lists of the cases, and warn of classes that are rare or never occur.

    `hidden` are the cases that are not annotated for all classes.
    """
    heads = heads_of(report.labels)
    for case, listed in hidden.items():
        report.cases[case]["classes"] = [name for name, (head, _) in heads.items() if listed[head]]
    lists = {case: tuple(found["classes"] or heads) for case, found in report.cases.items()
             if found["kind"] not in (None, UNLABELLED)}
    for name in heads:
        annotated = [case for case, names in lists.items() if name in names]
        present = [case for case in annotated if report.cases[case]["voxels"][name]]
        report.classes[name] = {"annotated": len(annotated), "present": len(present)}
        if len(annotated) < min(FEW, len(lists)):
            report.warnings.append(f"class {name}: only {counted(len(annotated), 'case')} of {len(lists)} "
                                   f"{'is' if len(annotated) == 1 else 'are'} annotated for it; annotate it in more")
        for names in dict.fromkeys(lists[case] for case in annotated if case in hidden):
            same = [case for case in annotated if lists[case] == names]
            if len(same) > 1 and not set(same) & set(present):
                report.warnings.append(f"class {name}: {len(same)} cases list it in \"{CLASSES_KEY}\", and none of "
                                       f"them holds it: {some(same, 5)}. If it is not annotated there, take it out of "
                                       f"their lists: training takes it for absent")


# ---- the split ------------------------------------------------------------------------------------------------------

def _check_split(file: Path, cases: Iterable[str], kinds: dict[str, str], patients: dict[str, str],
                 report: Report) -> Folds:
    """Report what is wrong with splits_final.json. Return its folds with the cases that exist."""
    folds = _report_error(report, "", read_folds, file)
    if folds is None:
        return []
    cases = dict.fromkeys(cases)
    known = [{side: [case for case in fold[side] if case in cases] for side in ("train", "val")} for fold in folds]
    for k, (fold, known_fold) in enumerate(zip(folds, known)):
        where = f"{file}, fold {k}: "
        _check_sides(where, fold, cases.keys(), patients, report)
        training = {case: kinds[case] for case in known_fold["train"] if case in kinds}
        if FULL in kinds.values() and len(training) == len(known_fold["train"]):
            _report_error(report, where, require_full, training)
    complete = report.complete_cases()
    weak = {case: k for k, fold in enumerate(folds) for case in fold["val"]
            if kinds.get(case, FULL) != FULL and case not in complete}
    if weak:
        report.errors.append(
            f"{file}, fold {some(sorted(set(weak.values())))}: validates on cases that are not fully annotated, where "
            f"only annotated voxels would count: {some(f'{case} ({kinds[case]})' for case in weak)}. Did nnU-Net write "
            f"this file? Then delete it: confkd plan, or the next training, writes folds that validate on fully "
            f"annotated cases only. Or move these cases to \"train\"")
    counts = [{side: {kind: sum(kinds.get(case) == kind for case in fold[side]) for kind in KINDS}
               for side in ("train", "val")} for fold in known]
    used = {case for fold in known for side in fold.values() for case in side}
    report.split = {"file": str(file), "folds": counts, "unused": [case for case in cases if case not in used]}
    if report.split["unused"]:
        report.warnings.append(f"{file}: no fold trains or validates on {some(report.split['unused'])}")
    return known


def _check_sides(where: str, fold: dict[str, list[str]], cases: Iterable[str], patients: dict[str, str],
                 report: Report) -> None:
    """Report cases of one fold that do not exist, and cases and patients that are on both sides."""
    train, val = set(fold["train"]), set(fold["val"])
    unknown, both = sorted((train | val) - set(cases)), sorted(train & val)
    if unknown:
        report.errors.append(f"{where}there are no cases {some(unknown)}; correct the names")
    if both:
        report.errors.append(f"{where}trains and validates on {some(both)}; each case can be on one side only")
    shared = _on_both_sides(patients, sorted(train - val), sorted(val - train))
    report.errors += [f"{where}patient {patient} has cases to train ({some(to_train)}) and to validate "
                      f"({some(to_validate)}); keep them on one side"
                      for patient, (to_train, to_validate) in shared.items()]
    if not val:
        report.errors.append(f"{where}validates on no case; move fully annotated ones to \"val\"")


def _default_split(file: Path, kinds: dict[str, str], patients: dict[str, str], pattern: str | None,
                   report: Report) -> Folds:
    """Warn that there is no splits_final.json, and return the folds that the trainer will write.

    `pattern` is dataset.json's, because the trainer knows no other.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    folds: Folds = []
    if FULL not in kinds.values() and not any(case["classes"] for case in report.cases.values()):
        return folds
    if pattern is None and set(kinds.values()) == {FULL} and len(kinds) < 5:
        text = (f"nnU-Net would make five folds, and fail: there are only {len(kinds)} cases. Write a split, or train "
                f"on fold 'all'")
    elif pattern is None and set(kinds.values()) == {FULL}:
        folds, text = generate_crossval_split(sorted(kinds)), "nnU-Net will make five random folds of all cases"
    else:
        try:
            lists = {name: case["classes"] for name, case in report.cases.items() if case["classes"]}
            folds = split_full_cases(kinds, patients_of(kinds, pattern), lists=lists,
                                     complete=report.complete_cases())
            text = f"The trainer will write {split_text(folds, kinds)}"
        except InputError as error:
            text = str(error).replace("confkd train ID ", f"confkd train {int(report.dataset[7:10])} ")
    shared = {patient for fold in folds for patient in _on_both_sides(patients, fold["train"], fold["val"])}
    if shared:
        text += (f". It does not know the patients: {some(sorted(shared))} would be on both sides of a fold. Write the "
                 f"pattern to dataset.json as \"patient_pattern\"")
    report.warnings.append(f"{file}: there is no split. {text}")
    return folds


def _on_both_sides(patients: dict[str, str], train: Iterable[str],
                   val: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Return {patient: (its cases to train, its cases to validate)} of those that have both."""
    sides: dict[str, tuple[list[str], list[str]]] = {}
    for side, cases in enumerate((train, val)):
        for case in cases:
            if case in patients:
                sides.setdefault(patients[case], ([], []))[side].append(case)
    return {patient: both for patient, both in sorted(sides.items()) if all(both)}


# ---- command line ---------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    """Run `confkd check`. Return the exit status."""
    parser = Parser(prog="confkd check", description=(
        "Check a data set in nnU-Net's raw format before training: files, geometry, values, supervision, split. The "
        "exit status is 0 if training would be right, with warnings or without, and 1 if it would be wrong."))
    parser.add_argument("-d", "--dataset", required=True, metavar="ID", help="the data set, id or name")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON, and nothing else")
    parser.add_argument("--all", action="store_true", help=f"print a row for each case, also for more than {ROWS}")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="a regular expression whose first group in the name "
                        "of a case is the patient; default: dataset.json's \"patient_pattern\"; without one, each case "
                        "is a patient")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    args = parser.parse_args(argv)
    report = check_dataset(args.dataset, args.processes, args.patient_pattern)
    print(json.dumps(report.as_dict(), indent=2, allow_nan=False) if args.json else report.text(args.all))
    return 1 if report.errors else 0
