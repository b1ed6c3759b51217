"""The sections of the report that come from predictions and curves: accuracy, cases, calibration, training curves."""
from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd import __version__
from nnunet_confkd.errors import counted
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
from nnunet_confkd.evaluation.tables import number_text, p_value_text, percent_text
from nnunet_confkd.report import page
from nnunet_confkd.report.cases import SURE, Findings, Slice
from nnunet_confkd.report.model import Fold, Model
from nnunet_confkd.report.page import Fact, Html, Section, typeset
from nnunet_confkd.report.page_folder import picture_name
from nnunet_confkd.report.pictures import (
    Cell,
    Chart,
    box_chart,
    classes_seen,
    curve_charts,
    line_chart,
    save_cells,
    save_charts,
)
from nnunet_confkd.report.training import training_section

COVERAGES = np.linspace(0.02, 1, 99)
TOO_FEW = "There are fewer than five patients, too few for box plots, p-values and reliability curves."
FEWEST = 5  # of fewer patients no boxes, p-values and reliability curves are shown
MOST_CLASSES = 20  # how many classes the charts of the accuracy show; more would make pictures as long as a wall


def sections(folder: Path, model: Model, folds: list[Fold], found: Findings | None) -> list[Section]:
    """Return the sections of the page, and write their pictures into the folder. found: None without validation
    data."""
    parts = []
    if found is not None:
        parts = [Section("measures", "Segmentation accuracy", _measures(folder, model, found)),
                 Section("cases", "Validation cases", _cases(folder, model, found)),
                 Section("partial", "Partially annotated training cases", _partial_cases(folder, model, found)),
                 Section("calibration", "Calibration of the probabilities", _calibration(folder, found))]
    parts += [Section("curves", "Training curves", _curves(folder, folds)),
              Section("training", "Training data and settings", training_section(model, folds))]
    return [part for part in parts if part.html]


# ---- the head -------------------------------------------------------------------------------------------------------

def about(model: Model, folds: list[Fold]) -> str:
    """Say in a sentence which model this is."""
    trainers = ", ".join(dict.fromkeys(fold.trainer for fold in folds))
    epochs = " or ".join(str(n) for n in dict.fromkeys(fold.epochs for fold in folds))
    names = ("fold " if len(folds) == 1 else "folds ") + ", ".join(fold.name.removeprefix("fold_") for fold in folds)
    return (f"{trainers} on {model.plans_manager.dataset_name}, configuration {model.configuration}, {names}, after "
            f"{epochs} epochs ({model.checkpoint_name}).")


def headline(model: Model, folds: list[Fold], found: Findings | None) -> tuple[str, list[Fact]]:
    """Return the result in one line, and the figures behind it."""
    if found is None:
        return f"{folds[0].trainer} on {model.plans_manager.dataset_name}: training curves and record", []
    dice = {branch: list(found.dice(branch).values()) for branch in found.names}
    means = {branch: statistics(values, found.patients) for branch, values in dice.items()}
    facts = [Fact(f"{found.names[branch]}, mean Dice", _number(m["mean"]), _interval(m)) for branch, m in means.items()]
    for other in (branch for branch in found.names if branch != "student"):
        difference = paired_statistics(dice["student"], dice[other], found.patients)
        p_value = "" if _too_few(found) else _p_value(difference["p"])
        facts.append(Fact(f"{found.names['student']} minus {found.names[other]}, paired",
                          _number(difference["mean"], signed=True), _interval(difference) + p_value))
    scores = [_number(means[branch]["mean"]) for branch in found.branches]
    if len(scores) > 1:
        scores = [f"{found.names[branch]} {score}" for branch, score in zip(found.branches, scores)]
    trained = all(set(fold.validation or ()) <= fold.trained_on for fold in folds)
    cases = f"{'training' if trained else 'validation'} case{'s' if len(found.cases) != 1 else ''}"
    return f"{', '.join(scores).capitalize()}: mean Dice on {len(found.cases)} {cases}{_of_patients(found)}", facts


def footer() -> str:
    """Return the last line of the page, as HTML."""
    return page.paragraph(f"Written by confkd report (nnunet_confkd {__version__}) on "
                          f"{page.date_text(datetime.now())}. The report describes one model on the cases that it "
                          "names. It is not for clinical use.")


# ---- numbers --------------------------------------------------------------------------------------------------------

def _number(value: float, digits: int = 3, signed: bool = False) -> str:
    return typeset(number_text(value, digits, signed)) if np.isfinite(value) else "none"


def _percent(share: float, digits: int = 1) -> str:
    return typeset(percent_text(share, digits))


def _bounds(described: dict, digits: int = 3) -> str:
    return f"{_number(described['ci_low'], digits)} to {_number(described['ci_high'], digits)}"


def _interval(described: dict) -> str:
    if not np.isfinite(described["ci_low"]):
        return "too few patients for an interval"
    return f"{typeset('95 %')} interval {_bounds(described)}"


def _p_value(p: float) -> str:
    if not np.isfinite(p):
        return ""
    return "; Wilcoxon " + typeset("p " + ("" if p < 0.001 else "= ") + p_value_text(p))


def _too_few(found: Findings) -> bool:
    return len(set(found.patients)) < FEWEST


def _of_patients(found: Findings) -> str:
    """Say of how many patients the cases are, if some patients have several."""
    number = len(set(found.patients))
    return "" if number == len(found.cases) else f" of {number} patient{'s' if number != 1 else ''}"


# ---- accuracy -------------------------------------------------------------------------------------------------------

def _drawn(model: Model, found: Findings) -> list[str]:
    """Return the classes to draw: if there are many, those with the lowest and with the highest mean Dice."""
    if len(model.classes) <= MOST_CLASSES:
        return list(model.classes)
    dice = {name: found.evaluations["student"].values(name, "Dice") for name in model.classes}
    means = {name: np.nanmean(values) for name, values in dice.items() if np.isfinite(values).any()}
    ordered = sorted(means, key=lambda name: means[name])
    half = MOST_CLASSES // 2
    return ordered if len(ordered) <= MOST_CLASSES else [*ordered[:half], *ordered[-half:]]


def _measures(folder: Path, model: Model, found: Findings) -> str:
    drawn = [] if _too_few(found) else _drawn(model, found)

    def boxes(measure: str) -> dict[str, dict[str, list[float]]]:
        return {name: {branch: measures.values(name, measure).tolist()
                       for branch, measures in found.evaluations.items()} for name in drawn}

    charts = ""
    if not _too_few(found):
        boxes_of = [box_chart("Dice", boxes("Dice"), found.names, (0, 1)),
                    box_chart("HD95 [mm]", boxes("HD95_mm"), found.names)]
        save_charts(boxes_of, folder / "measures.png")
        charts = page.charts("measures", boxes_of, wide=True)
    caption = (f"Mean over {counted(len(found.cases), 'case')}{_of_patients(found)}. Below each mean are its "
               f"{typeset('95 %')} interval (bootstrap over the patients) and the number n of cases for which the "
               "measure is defined.")
    note = (f"The measures are those of confkd evaluate. {FOREGROUND.capitalize()}: mean of a case over its classes. "
            f"HD95 and ASSD: distances between the surfaces. NSD: share of the surfaces within {TOLERANCE_MM:g} mm. "
            "Volume: predicted minus true volume. Classes absent from both masks are excluded. If a class is present "
            "in only one mask, Dice, IoU and NSD are 0 and the distances are undefined; the last column counts these "
            "cases. " + (TOO_FEW if _too_few(found) else "The boxes show the quartiles and the median, the whiskers "
                         "reach to 1.5 times the box, and each mark is a case."))
    if not _too_few(found) and len(drawn) < len(model.classes):
        half, student = MOST_CLASSES // 2, found.names["student"]
        chosen = (f"the {half} with the lowest and the {half} with the highest mean Dice of the {student}"
                  if len(drawn) == MOST_CLASSES else "those that occur in a case")
        note = f"The charts show {len(drawn)} of the {len(model.classes)} classes: {chosen}. The table has all. {note}"
    head = ["class", *map(_measure_name, MEASURES), "no distance"]
    return "".join((charts, page.table(head, _mean_rows(model, found), caption),
                    page.paragraph(note, "note"), _dice_of_cases(model, found)))


def _mean_rows(model: Model, found: Findings) -> list[list]:
    """Return a row for each class and branch: the means with their intervals."""
    means = {branch: measures.statistics() for branch, measures in found.evaluations.items()}
    rows = []
    for name in means["student"]:
        for branch, label in found.names.items():
            row: list = [_of_branch(name, branch, label)]
            for measure, digits in MEASURES.items():
                described = means[branch][name][measure]
                bounds = f"{_bounds(described, digits)}, " if np.isfinite(described["ci_low"]) else ""
                row.append((_number(described["mean"], digits), f"{bounds}n {described['n']}"))
            rows.append([*row, found.evaluations[branch].one_empty(name) if name in model.classes else ""])
    return rows


def _of_branch(what: str, branch: str, name: str) -> Html:
    return Html(f"{page.text(what)}<small>{page.branch_key(branch, name)}</small>")


def _measure_name(measure: str) -> str:
    name, _, unit = measure.rpartition("_")
    return f"{name.removesuffix('_difference')} [{unit}]" if name else measure


def _dice_of_cases(model: Model, found: Findings) -> str:
    rows = [[case, *(_number(found.evaluations[branch].cases[case][name]["Dice"])
                     for name in model.classes for branch in found.names)] for case in found.cases]
    head = ["case", *(f"{name}, {label}" for name in model.classes for label in found.names.values())]
    return page.folded(f"Dice of each of the {len(rows)} cases", page.table(head, rows, tall=True))


# ---- cases ----------------------------------------------------------------------------------------------------------

def _cases(folder: Path, model: Model, found: Findings) -> str:
    rows = {f"{role.capitalize()}: {name}": name for role, name in found.examples().items()}
    if not rows:
        return page.paragraph("No validation case has any foreground, in the ground truth or in a prediction.")
    return "".join((
        page.paragraph(f"The best, the median and the worst case by the mean Dice of the {found.names['student']}. The "
                       "pictures show the slice with most foreground in the ground truth and the predictions together, "
                       "on the grid of the preprocessed data."),
        *_case_rows(folder, model, found, rows, weak=False)))


def _partial_cases(folder: Path, model: Model, found: Findings) -> str:
    if not found.partial:
        return ""
    return "".join((
        page.paragraph("Predictions of training images of which the training saw only the partial annotation."),
        *_case_rows(folder, model, found, {name: name for name in found.partial}, weak=True)))


def _case_rows(folder: Path, model: Model, found: Findings, rows: dict[str, str], weak: bool) -> list[str]:
    """Return the legend and the pictures of cases, and write them as PNG. rows: {title: case}."""
    parts: list[str] = []
    seen: set[str] = set()
    for title, name in rows.items():
        content = found.slice(name)
        cells = _cells(model, found, name, content, weak)
        note = f"Slice {content.index + 1} of {content.count}"
        parts.append(page.case_row(title, note, cells))
        number = len(list(folder.glob("case_*"))) + 1
        save_cells(f"{title}, {note.lower()}", cells, folder / picture_name(number, name))
        seen |= classes_seen(cells)
    return [page.class_legend(list(model.classes), seen, weak), *parts]


def _cells(model: Model, found: Findings, name: str, content: Slice, weak: bool) -> list[Cell]:
    """Return the pictures of a case: image, label, each branch's segmentation, entropy."""
    options: dict[str, Any] = {"image": content.image, "aspect": content.aspect}
    where = f"of {name}, slice {content.index + 1}"
    ignore, student = model.label_manager.ignore_label, found.names["student"]

    def masks(labels: np.ndarray) -> dict[str, np.ndarray]:
        return {cls: np.isin(labels, values) for cls, values in model.classes.items()}

    annotated = content.label != ignore if weak and ignore is not None else None
    label = "partial annotation" if weak else "ground truth"
    cells = [Cell("image", f"Image {where}", **options),
             Cell(label, f"{label.capitalize()} {where}", masks=masks(content.label), annotated=annotated, **options)]
    # nothing is given for training cases, so these have one segmentation less
    for (branch, title), segmentation in zip(found.names.items(), content.segmentations):
        score = "" if weak else f", Dice {_number(found.dice(branch)[name])}"
        cells.append(Cell(title + score, f"Segmentation by {title} {where}", masks=masks(segmentation), **options))
    return [*cells, Cell(f"{student}'s entropy", f"Entropy of the {student} {where}", heat=content.entropy, **options)]


# ---- calibration ----------------------------------------------------------------------------------------------------

def _calibration(folder: Path, found: Findings) -> str:
    names = {branch: found.names[branch] for branch in found.branches}
    counts = {branch: found.calibration[branch].in_question for branch in names}
    if not counts["student"].count.any():  # the voxels in question are the same for each branch
        return page.paragraph("No foreground is predicted anywhere, and no voxel is in question.")
    charts, note = "", _charts_in_words(names, not _too_few(found))
    if not _too_few(found):
        curves = _calibration_charts(names, counts)
        save_charts(curves, folder / "calibration.png")
        charts = page.charts("calibration", curves, wide=True)
    rows = [_calibration_row(_of_branch(title, branch, name), counts_of_branch[branch])
            for title, counts_of_branch in (("all voxels", {b: found.calibration[b].all for b in names}),
                                            ("in question", counts)) for branch, name in names.items()]
    number = "number, over the regions" if found.model.label_manager.has_regions else "number"
    head = ["voxels", number, "ECE", "mean confidence", "correct", "overconfidence", "AURC", "E-AURC"]
    caption = ("ECE: expected calibration error, 15 bins. AURC: area under the risk-coverage curve. E-AURC: AURC minus "
               "the smallest one that the same number of errors allows.")
    return "".join((*map(page.paragraph, _calibration_in_words(found, names, counts)),
                    charts, page.paragraph(note, "note"), page.table(head, rows, caption)))


def _charts_in_words(names: dict[str, str], drawn: bool) -> str:
    charts = (f"On the diagonal a network is calibrated: of the voxels with a confidence of {typeset('80 %')}, "
              f"{typeset('80 %')} are correct. Below it, the network is overconfident. The charts count the voxels in "
              "question." if drawn else TOO_FEW)
    return (f"{charts} Voxels are in question if {'a branch' if len(names) > 1 else 'the network'} predicts them as "
            f"foreground, or with a confidence below {_percent(SURE, 0)}. All other voxels are background that hardly "
            "any network gets wrong, so with them every network looks calibrated.")


def _calibration_row(title: Html, counts: Counts) -> list:
    total = counts.count.sum()
    return [title, f"{total:,}", f"{ece(counts):.4f}", _percent(counts.confidence.sum() / total, 2),
            _percent(counts.correct.sum() / total, 2),
            f"{_number(100 * overconfidence(counts), 2, signed=True)} points", f"{aurc(counts):.4f}",
            f"{aurc(counts) - smallest_aurc(counts):.4f}"]


def _calibration_charts(names: dict[str, str], counts: dict[str, Counts]) -> list[Chart]:
    curves = {branch: reliability_curve(c) for branch, c in counts.items()}
    errors = "; ".join(f"{names[branch]}: ECE {ece(c):.3f}" for branch, c in counts.items())
    risks = {branch: _risk_at(COVERAGES, c) for branch, c in counts.items()}
    rates = "; ".join(f"{names[branch]}: {values[-1]:.3f}" for branch, values in risks.items())
    return [
        line_chart("Reliability", {branch: (c["confidence"], c["accuracy"]) for branch, c in curves.items()}, names,
                   "mean confidence", "share of correct voxels",
                   f"Share of correct voxels against mean confidence; {errors}.", diagonal=True),
        line_chart("Risk and coverage", {branch: (COVERAGES, values) for branch, values in risks.items()}, names,
                   "coverage: share of voxels, most confident first", "risk: share of wrong voxels",
                   f"Share of wrong voxels against the share that is kept, most confident first; of all: {rates}.")]


def _risk_at(coverages: np.ndarray, counts: Counts) -> np.ndarray:
    curve = risk_coverage_curve(counts)
    return curve["risk"][np.searchsorted(curve["coverage"], coverages * (1 - 1e-9))]


def _calibration_in_words(found: Findings, names: dict[str, str], counts: dict[str, Counts]) -> list[str]:
    """Say what the figures show, and no more."""
    sentences, parts = [], []
    if len(names) > 1:
        student, teacher = (found.calibration[branch].cases for branch in ("student", "teacher"))
        low, high = ece_difference(student, teacher, found.patients)
        verdict = ("The student is less well calibrated than the teacher" if low > 0 else
                   "The student is better calibrated than the teacher" if high < 0 else
                   "The data do not show which branch is better calibrated")
        bounds = f"{_number(low, signed=True)} to {_number(high, signed=True)}"
        interval = f" ({typeset('95 %')} interval {bounds}, bootstrap over the patients)" if np.isfinite(low) else ""
        difference = _number(ece(counts["student"]) - ece(counts["teacher"]), signed=True)
        sentences = [f"{verdict}: the expected calibration error (ECE) of the student minus that of the teacher is "
                     f"{difference} over the {len(found.cases)} cases{interval}."]
    for branch, name in names.items():
        c = counts[branch]
        sure, right = c.confidence.sum() / c.count.sum(), c.correct.sum() / c.count.sum()
        part = f"the mean confidence of the {name} is {_percent(sure)}, and {_percent(right)} of the voxels are correct"
        if abs(sure - right) >= 0.0005:
            part += f", so it is {'over' if sure > right else 'under'}confident by {100 * abs(sure - right):.1f} points"
        parts.append(f"{part} (ECE {ece(c):.3f})")
    return [*sentences, f"In the voxels in question, {'; '.join(parts)}."]


# ---- curves ---------------------------------------------------------------------------------------------------------

def _curves(folder: Path, folds: list[Fold]) -> str:
    charts = curve_charts({fold.name: fold.curves for fold in folds}, folds[0].curve_names)
    if not charts:
        return page.paragraph("The checkpoint holds no curves.")
    save_charts(charts, folder / "curves.png")
    return page.charts("curves", charts) + page.paragraph(
        "Each value is the mean over an epoch; the terms of the loss are shown without their weights. The pseudo-Dice "
        "is nnU-Net's: it is measured on patches of the validation images during training, and cannot be compared with "
        "the Dice of whole cases.", "note")
