"""What the report says: a section each, of the record of a model and of what its branches predict."""
from __future__ import annotations

import json
import platform
import re
import subprocess
from collections import Counter
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_confkd import __version__
from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.data.supervision import FULL, KINDS, PARTIAL, UNLABELLED
from nnunet_confkd.evaluation.calibration import (
    Counts,
    aurc,
    ece,
    ece_difference,
    overconfidence,
    reliability_curve,
    risk_coverage_curve,
    smallest_aurc,
)
from nnunet_confkd.evaluation.metrics import FOREGROUND, MEASURES, TOLERANCE_MM, paired_statistics, statistics
from nnunet_confkd.report import page
from nnunet_confkd.report.cases import SURE, VOXELS, Findings, Fold, Model
from nnunet_confkd.report.pictures import Cell, Chart, box_chart, curve_charts, line_chart, save_cells, save_charts
from nnunet_confkd.training.settings import Settings

COVERAGES = np.linspace(0.02, 1, 99)
VOXEL_NAMES = {"all": "all voxels", "in question": "in question"}
LABELS = {FULL: "full label", PARTIAL: "partial label", UNLABELLED: "no label"}


def sections(folder: Path, model: Model, folds: list[Fold], found: Findings | None) -> list[tuple[str, str, str]]:
    """(identifier, title, HTML) of each; their pictures are written into the folder. found: None without validation data."""
    parts = []
    if found is not None:
        parts = [("measures", "How well do they segment?" if len(found.names) > 1 else "How well does it segment?",
                  _measures(folder, model, found)),
                 ("cases", "Validation cases", _cases(folder, model, found)),
                 ("partial", "Partially labelled training cases", _partial_cases(folder, model, found)),
                 ("calibration", "Can the probabilities be believed?", _calibration(folder, found))]
    parts += [("curves", "Training curves", _curves(folder, folds)),
              ("training", "What was trained on what", _training(model, folds))]
    return [part for part in parts if part[2]]


# ---- the head -------------------------------------------------------------------------------------------------------

def about(model: Model, folds: list[Fold]) -> str:
    """Which model this is, in a sentence."""
    trainers = ", ".join(dict.fromkeys(fold.trainer for fold in folds))
    epochs = " or ".join(str(n) for n in dict.fromkeys(fold.epochs for fold in folds))
    names = ("fold " if len(folds) == 1 else "folds ") + ", ".join(fold.name.removeprefix("fold_") for fold in folds)
    return (f"{trainers} on {model.plans_manager.dataset_name}, configuration {model.configuration}, {names}, after "
            f"{epochs} epochs ({model.checkpoint_name}).")


def headline(model: Model, folds: list[Fold], found: Findings | None) -> tuple[str, list[tuple[str, str, str]]]:
    """The result in a line, and the figures behind it: (name, value, more)."""
    if found is None:
        return f"{folds[0].trainer} on {model.plans_manager.dataset_name}: training curves and record", []
    dice = {branch: list(found.dice(branch).values()) for branch in found.names}
    patients = found.patients
    means = {branch: statistics(values, patients) for branch, values in dice.items()}
    trained = all(set(fold.validation or ()) <= fold.trained_on for fold in folds)
    cases = f"{len(found.cases)} {'training' if trained else 'validation'} case{'s' if len(found.cases) != 1 else ''}{_of_patients(found)}"
    scores = [_number(means[branch]["mean"]) for branch in found.branches]
    if len(scores) > 1:
        scores = [f"{found.names[branch]} {score}" for branch, score in zip(found.branches, scores)]
    facts = [(f"{found.names[branch]}, mean Dice", _number(m["mean"]), _interval(m)) for branch, m in means.items()]
    for other in (branch for branch in found.names if branch != "student"):
        m = paired_statistics(dice["student"], dice[other], patients)
        p = "<\u00a00.001" if m["p"] < 0.001 else f"=\u00a0{m['p']:.3f}"
        facts.append((f"{found.names['student']} less {found.names[other]}, paired", _signed(m["mean"]),
                      _interval(m) + (f"; Wilcoxon p\u00a0{p}" if np.isfinite(m["p"]) else "")))
    return f"{', '.join(scores).capitalize()}: mean Dice on {cases}", facts


def footer() -> str:
    return page.paragraph(f"Written by confkd report (nnunet_confkd {__version__}) on {_date(datetime.now())}. "
                          "A description of one model on the cases that are named here; not for use on patients.")


def _of_patients(found: Findings) -> str:
    """What follows the number of cases where some are of one patient."""
    number = len(set(found.patients))
    return "" if number == len(found.cases) else f" of {number} patient{'s' if number != 1 else ''}"


# ---- numbers --------------------------------------------------------------------------------------------------------

def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if np.isfinite(value) else "none"


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−") if np.isfinite(value) else "none"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"  # a space that does not break


def _interval(m: dict, digits: int = 3) -> str:
    if not np.isfinite(m["ci_low"]):
        return "too few patients for an interval"
    return f"95\u00a0% interval {_number(m['ci_low'], digits)} to {_number(m['ci_high'], digits)}"


def _date(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M %Z}"


# ---- figures --------------------------------------------------------------------------------------------------------

def _measures(folder: Path, model: Model, found: Findings) -> str:
    def boxes(measure: str) -> dict[str, dict[str, list[float]]]:
        return {cls: {branch: of.values(cls, measure).tolist() for branch, of in found.evaluations.items()}
                for cls in model.classes}

    charts = [box_chart("Dice", boxes("Dice"), found.names, (0, 1)), box_chart("HD95 [mm]", boxes("HD95_mm"), found.names)]
    save_charts(charts, folder / "measures.png")
    means = {branch: of.statistics() for branch, of in found.evaluations.items()}
    rows = []
    for cls in means["student"]:
        for branch, name in found.names.items():
            row: list = [_of_branch(cls, branch, name)]
            for measure, digits in MEASURES.items():
                m = means[branch][cls][measure]
                bounds = f"{_number(m['ci_low'], digits)} to {_number(m['ci_high'], digits)}, "
                row.append((_number(m["mean"], digits), f"{bounds if np.isfinite(m['ci_low']) else ''}n {m['n']}"))
            rows.append([*row, found.evaluations[branch].one_empty(cls) if cls in model.classes else ""])
    note = (f"As confkd evaluate measures. {FOREGROUND}: a case's mean over its classes. HD95 and ASSD: distances between "
            f"surfaces; NSD: share of the surfaces within {TOLERANCE_MM:g} mm; volume: predicted less true. A class that is "
            "in neither mask has no measure and is not in n; one that is in one of them alone has Dice, IoU and NSD 0, and "
            "no distance. Boxes: quartiles and median; whiskers: to 1.5 times the box; each mark is a case.")
    return "".join((
        page.charts("measures", charts, wide=True),
        page.table(["class", *map(_measure_name, MEASURES), "no distance"], rows,
                   f"Means over the {len(found.cases)} cases{_of_patients(found)}, and under each its 95\u00a0% interval (bootstrap over "
                   "the patients) and the number n of cases for which it is defined"),
        page.paragraph(note, "note"), _dice_of_cases(model, found)))


def _of_branch(what: str, branch: str, name: str) -> page.Html:
    return page.Html(f"{page.text(what)}<small>{page.branch_key(branch, name)}</small>")


def _measure_name(measure: str) -> str:
    name, _, unit = measure.rpartition("_")
    return f"{name.removesuffix('_difference')} [{unit}]" if name else measure


def _dice_of_cases(model: Model, found: Findings) -> str:
    rows = [[case, *(_number(found.evaluations[branch].cases[case][cls]["Dice"])
                     for cls in model.classes for branch in found.names)] for case in found.cases]
    head = ["case", *(f"{cls}, {name}" for cls in model.classes for name in found.names.values())]
    return page.folded(f"Dice of each of the {len(rows)} cases", page.table(head, rows, tall=True))


# ---- cases ----------------------------------------------------------------------------------------------------------

def _cases(folder: Path, model: Model, found: Findings) -> str:
    rows = {f"{what.capitalize()}: {name}": name for what, name in found.shown().items()}
    if not rows:
        return page.paragraph("No validation case has any foreground, true or predicted.")
    return "".join((
        page.paragraph(f"Best, median and worst by the {found.names['student']}'s mean Dice, in the slice with most "
                       "foreground (label and predictions together), on the grid of the preprocessed data."),
        page.class_legend(list(model.classes), weak=False), _case_rows(folder, model, found, rows, weak=False)))


def _partial_cases(folder: Path, model: Model, found: Findings) -> str:
    if not found.partial:
        return ""
    return "".join((
        page.paragraph("Predictions of images of which the training saw a weak label only."),
        page.class_legend(list(model.classes), weak=True),
        _case_rows(folder, model, found, {name: name for name in found.partial}, weak=True)))


def _case_rows(folder: Path, model: Model, found: Findings, rows: dict[str, str], weak: bool) -> str:
    """rows: {title: case}."""
    parts = []
    for title, name in rows.items():
        content = found.slice(name)
        cells = _cells(model, found, name, content, weak)
        note = f"Slice {int(content['index']) + 1} of {int(content['count'])}"
        parts.append(page.case_row(title, note, cells))
        number = len(list(folder.glob("case_*"))) + 1
        save_cells(f"{title}, {note.lower()}", cells, folder / _file_name(number, name))
    return "".join(parts)


def _cells(model: Model, found: Findings, name: str, content: dict[str, np.ndarray], weak: bool) -> list[Cell]:
    options: dict[str, Any] = {"image": content["image"], "aspect": float(content["aspect"])}
    where = f"of {name}, slice {int(content['index']) + 1}"
    ignore, student = model.label_manager.ignore_label, found.names["student"]

    def masks(labels: np.ndarray) -> dict[str, np.ndarray]:
        return {cls: np.isin(labels, values) for cls, values in model.classes.items()}

    annotated = content["label"] != ignore if weak and ignore is not None else None
    cells = [Cell("image", f"Image {where}", **options),
             Cell("weak label" if weak else "truth", f"{'Weak' if weak else 'True'} label {where}",
                  masks=masks(content["label"]), annotated=annotated, **options)]
    for branch, label in found.names.items():
        if branch in content:
            score = "" if weak else f", Dice {_number(found.dice(branch)[name])}"
            cells.append(Cell(label + score, f"Segmentation by {label} {where}", masks=masks(content[branch]), **options))
    return [*cells, Cell(f"{student}'s entropy", f"Entropy of the {student} {where}", heat=content["entropy"], **options)]


def _file_name(number: int, case: str) -> str:
    """A PNG's name for a case of any name: safe everywhere, and no other's."""
    return f"case_{number:02d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', case)[:60].strip('._')}.png"


# ---- calibration ----------------------------------------------------------------------------------------------------

def _calibration(folder: Path, found: Findings) -> str:
    names = {branch: found.names[branch] for branch in found.branches}
    counts = {branch: found.counts[branch]["in question"] for branch in names}
    if not counts["student"].count.sum():  # the same voxels in each branch
        return page.paragraph("No foreground is predicted anywhere, and nothing is in doubt.")
    charts = _calibration_charts(names, counts)
    save_charts(charts, folder / "calibration.png")
    rows = []
    for voxels in VOXELS:
        for branch, name in names.items():
            c = found.counts[branch][voxels]
            total = c.count.sum()
            rows.append([_of_branch(VOXEL_NAMES[voxels], branch, name), f"{total:,}", f"{ece(c):.4f}",
                         _percent(c.confidence.sum() / total, 2), _percent(c.correct.sum() / total, 2),
                         f"{_signed(100 * overconfidence(c), 2)} points", f"{aurc(c):.4f}",
                         f"{aurc(c) - smallest_aurc(c):.4f}"])
    note = ("Marks on the line: of the voxels of which a network is 80\u00a0% sure, 80\u00a0% are right; below the line it "
            "is overconfident. The charts count the voxels in question: those that "
            f"{'a branch' if len(names) > 1 else 'the network'} predicts as foreground or of which it is less than "
            f"{_percent(SURE, 0)} sure. The rest is background that hardly any network gets wrong, and flatters "
            "all of them.")
    number = "number, over the regions" if found.model.label_manager.has_regions else "number"
    return "".join((
        *map(page.paragraph, _calibration_in_words(found, names, counts)), page.charts("calibration", charts, wide=True),
        page.paragraph(note, "note"),
        page.table(["voxels", number, "ECE", "mean confidence", "right", "overconfidence", "AURC", "E-AURC"], rows,
                   "ECE: expected calibration error, 15 bins. AURC: area under the risk-coverage curve; E-AURC: less the "
                   "smallest that as many errors allow")))


def _calibration_charts(names: dict[str, str], counts: dict[str, Counts]) -> list[Chart]:
    curves = {branch: reliability_curve(c) for branch, c in counts.items()}
    errors = "; ".join(f"{names[branch]}: ECE {ece(c):.3f}" for branch, c in counts.items())
    risks = {branch: _risk_at(COVERAGES, c) for branch, c in counts.items()}
    rates = "; ".join(f"{names[branch]}: {values[-1]:.3f}" for branch, values in risks.items())
    return [
        line_chart("Reliability", {branch: (c["confidence"], c["accuracy"]) for branch, c in curves.items()}, names,
                   "mean confidence", "share that is right", f"Share of right voxels against mean confidence; {errors}.",
                   diagonal=True),
        line_chart("Risk and coverage", {branch: (COVERAGES, values) for branch, values in risks.items()}, names,
                   "coverage: share of voxels, the surest first", "risk: share that is wrong",
                   f"Share of wrong voxels among those kept, the surest first, against the share kept; of all: {rates}.")]


def _risk_at(coverages: np.ndarray, counts: Counts) -> np.ndarray:
    curve = risk_coverage_curve(counts)
    return curve["risk"][np.searchsorted(curve["coverage"], coverages * (1 - 1e-9))]


def _calibration_in_words(found: Findings, names: dict[str, str], counts: dict[str, Counts]) -> list[str]:
    """What the figures say, and no more."""
    sentences, parts = [], []
    if len(names) > 1:
        low, high = ece_difference(found.case_counts["student"]["in question"], found.case_counts["teacher"]["in question"], found.patients)
        verdict = ("The student is less well calibrated than its teacher" if low > 0 else
                   "The student is better calibrated than its teacher" if high < 0 else
                   "The figures do not tell which branch is better calibrated")
        interval = f" (95\u00a0% interval {_signed(low)} to {_signed(high)}, bootstrap over the patients)"
        difference = _signed(ece(counts["student"]) - ece(counts["teacher"]))
        sentences = [f"{verdict}: in the {len(found.cases)} cases the student's expected calibration error (ECE) less the "
                     f"teacher's is {difference}{interval if np.isfinite(low) else ''}."]
    for branch, name in names.items():
        c = counts[branch]
        sure, right = c.confidence.sum() / c.count.sum(), c.correct.sum() / c.count.sum()
        part = f"the {name} is {_percent(sure)} sure on average and right in {_percent(right)}"
        if abs(sure - right) >= 0.0005:
            part += f", {'over' if sure > right else 'under'}confident by {100 * abs(sure - right):.1f} points"
        parts.append(f"{part} (ECE {ece(c):.3f})")
    return [*sentences, f"In the voxels in question {'; '.join(parts)}."]


# ---- training -------------------------------------------------------------------------------------------------------

def _curves(folder: Path, folds: list[Fold]) -> str:
    charts = curve_charts({fold.name: fold.curves for fold in folds}, folds[0].curve_names)
    if not charts:
        return page.paragraph("The checkpoint holds no curves.")
    save_charts(charts, folder / "curves.png")
    return page.charts("curves", charts) + page.paragraph(
        "Means over each epoch; terms without their weights. The pseudo-Dice is nnU-Net's, of patches of the validation "
        "images during training, and not to be compared with the Dice of whole cases.", "note")


def _training(model: Model, folds: list[Fold]) -> str:
    parts = {"Supervision": _supervision(folds), "Settings": _settings(folds), "Plans": _plans(model, folds),
             "Versions": _versions(model, folds)}
    return "".join(page.title(name) + part for name, part in parts.items())


def _supervision(folds: list[Fold]) -> str:
    rows, lists = [], ""
    for fold in folds:
        name, counts = fold.name.replace("_", " "), Counter((fold.training or {}).values())
        numbers = [counts[kind] for kind in KINDS] if fold.training is not None else ["not known"] * len(KINDS)
        rows.append([name, *numbers, "not known" if fold.validation is None else len(fold.validation)])
        for kind in (kind for kind in KINDS if counts[kind]):
            cases = sorted(case for case, k in fold.training.items() if k == kind)
            lists += page.folded(f"{name}: the {len(cases)} training cases with {LABELS[kind]}", page.names(cases))
        if fold.validation:
            lists += page.folded(f"{name}: the {len(fold.validation)} validation cases", page.names(fold.validation))
    head = ["", *(LABELS[kind] for kind in KINDS), "validation cases"]
    return page.table(head, rows, "Training cases by their label") + lists


def _settings(folds: list[Fold]) -> str:
    recorded = [fold.record["settings"] for fold in folds if fold.record is not None]
    if not recorded:
        return page.paragraph("Stock nnU-Net's trainer: it has none of this plugin's settings.")
    note = "" if all(settings == recorded[0] for settings in recorded) else page.paragraph(
        "The folds were trained with different settings; these are the first fold's.", "notice")
    defaults, meanings = Settings().as_dict(), {f.name: f.metadata["doc"] for f in fields(Settings)}
    changed, others = [], []
    for name, value in recorded[0].items():
        known = name in defaults
        row = [name, _value(value), _value(defaults[name]) if known else "none", meanings.get(name, "of another version")]
        (others if known and value == defaults[name] else changed).append(row)
    head, body = ["setting", "value", "default", "meaning"], page.paragraph("Every setting is the default.")
    if changed:
        body = page.table(head, changed, f"{len(changed)} of {len(recorded[0])} settings differ from the default", wrap=3,
                          marked=range(len(changed)))
    if others:
        body += page.folded(f"The {len(others)} settings that are the default", page.table(head, others, wrap=3))
    return note + body


def _value(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _plans(model: Model, folds: list[Fold]) -> str:
    manager, labels = model.configuration_manager, model.label_manager
    configuration, described = manager.configuration, model.dataset_json
    features = manager.network_arch_init_kwargs.get("features_per_stage")
    classes = ", ".join(f"{name} ({' '.join(map(str, values))})" for name, values in model.classes.items())
    decoders = "2 decoders" if len(folds[0].branches) > 1 else "1 decoder"
    channels = described.get("channel_names") or described["modality"]
    rows = [["data set", model.plans_manager.dataset_name],
            ["configuration", f"{model.configuration} of {model.plans['plans_name']}"],
            ["channels", ", ".join(map(str, channels.values()))],
            ["regions" if labels.has_regions else "classes", f"{classes}; ignore: {labels.ignore_label}"],
            ["network", f"{manager.network_arch_class_name.rpartition('.')[2]}, features {_value(features)}, {decoders}"],
            ["patch size, batch size", f"{_value(configuration['patch_size'])}, {configuration['batch_size']}"],
            ["spacing [mm]", _value([round(s, 4) for s in configuration["spacing"]])],
            ["normalisation", ", ".join(configuration["normalization_schemes"])]]
    rows += [[key, str(described[key])] for key in ("licence", "reference") if key in described]
    return page.table(["what", "value"], rows, wrap=1)


def _versions(model: Model, folds: list[Fold]) -> str:
    trained = sorted({fold.record["nnunet_confkd"] for fold in folds if fold.record is not None})
    ends = [fold.curves["epoch_end_timestamps"][-1] for fold in folds if fold.curves.get("epoch_end_timestamps")]
    debug = [read_json(folder / "debug.json") for folder in model.fold_folders if (folder / "debug.json").is_file()]
    torches = sorted({str(content["torch_version"]) for content in debug if "torch_version" in content})
    unknown = "not recorded"
    return page.table(["what", "training", "this report"], [
        ["nnunet_confkd", ", ".join(trained) or unknown, __version__],
        ["commit of nnunet_confkd", unknown, _commit() or "not known"],
        ["nnunetv2", unknown, version("nnunetv2")],
        ["torch", ", ".join(torches) or unknown, torch.__version__],
        ["Python", unknown, platform.python_version()],
        ["date", _date(datetime.fromtimestamp(max(ends))) if ends else unknown, _date(datetime.now())]], words=3)


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with "-dirty" where files were changed, or None."""
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a repository around an installed package
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None
