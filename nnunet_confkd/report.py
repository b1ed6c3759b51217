"""The report of a trained model: one HTML page that loads nothing from elsewhere, and its pictures as PNG beside it.

It tells what the branches reach on the validation cases, shows cases, whether the probabilities can be believed, the training
curves, and what was trained on what. Figures and pictures come from one prediction of each case by both branches, with the
checkpoint that the report names.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nnunet_confkd import __version__
from nnunet_confkd import report_page as page
from nnunet_confkd.calibration import Counts, aurc, ece, overconfidence, reliability_curve, risk_coverage_curve, smallest_aurc
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluate import FOREGROUND
from nnunet_confkd.metrics import MEASURES, TOLERANCE_MM, paired_statistics, statistics
from nnunet_confkd.report_cases import SURE, VOXELS, Findings, Fold, Model, read_json
from nnunet_confkd.report_pictures import Cell, box_chart, curve_charts, line_chart, save_cells, save_charts
from nnunet_confkd.settings import Settings
from nnunet_confkd.supervision import FULL, KINDS, PARTIAL, UNLABELLED

PAGE = "report.html"
COVERAGES = np.linspace(0.02, 1, 99)
VOXEL_NAMES = {"all": "all voxels", "in question": "in question"}
CAPTION = "Means over the cases, and under each its 95 % bootstrap interval and the number n of cases for which it is defined."
LABELS = {FULL: "full label", PARTIAL: "partial label", UNLABELLED: "no label"}
FILES_LINE = re.compile(r"<!-- confkd report, files: (\[.*?\]) -->")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd report", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER",
                        help="the trained model: TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    parser.add_argument("--fold", nargs="+", metavar="F", help="default: all that are trained")
    parser.add_argument("--predictions", type=Path, metavar="DIR", help="segmentations of the same validation cases by something "
                        "else (another model, an ensemble, after postprocessing), to be shown beside the branches")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: 'report' in the model's folder; an earlier report in "
                                                                      "it is replaced")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="default: checkpoint_final.pth")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    print("written:", report(args.model, args.fold, args.predictions, args.output, args.chk, torch.device(args.device)))


# ---- writing --------------------------------------------------------------------------------------------------------

@contextmanager
def replaced_folder(output: Path):
    """Yields a new folder that takes `output`'s place at the end; an exception leaves `output` as it was.

    Raises InputError where `output` cannot be written, or holds anything but an earlier report.
    """
    foreign = sorted(entry.name for entry in output.iterdir() if entry.name not in _own_files(output)) if output.is_dir() else []
    if foreign:
        raise InputError(f"{output}: holds files that are no report's ({', '.join(foreign[:5])}{', ...' if len(foreign) > 5 else ''}). "
                         f"Choose another folder; nothing was written.")
    aside, old = (output.with_name(f"{output.name}.{what}{os.getpid()}") for what in ("part", "old"))
    try:
        if output.exists() and not output.is_dir():
            raise NotADirectoryError("a file has this name")
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error}). Choose another folder (--output).") from error
    try:
        yield aside
        if output.is_dir():
            output.rename(old)
        aside.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _own_files(folder: Path) -> set[str]:
    """The files of an earlier report, which its page lists."""
    try:
        found = FILES_LINE.search((folder / PAGE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return set()
    return {PAGE, *json.loads(found.group(1))} if found else set()


def _file_name(number: int, case: str) -> str:
    """A PNG's name for a case of any name: safe everywhere, and no other's."""
    return f"case_{number:02d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', case)[:60].strip('._')}.png"


# ---- gathering ------------------------------------------------------------------------------------------------------

def report(model: str | Path, folds: list[str] | None = None, predictions: Path | None = None, output: Path | None = None,
           checkpoint: str = "checkpoint_final.pth", device: torch.device = torch.device("cpu")) -> Path:
    """Write the report of a trained model. Returns the page's path.

    model: TRAINER__PLANS__CONFIGURATION under nnUNet_results. folds: None: all. predictions: a folder of segmentations of the same
        validation cases. output: default `model`/report.
    Without the preprocessed data, or where a fold's validation cases are not known, the sections that need them are left out and the
    page says so.
    Raises InputError: no such model, fold or checkpoint; predictions that do not match; an output folder that cannot be written or
        holds other files.
    """
    model = Model(model, folds, checkpoint)
    output = model.folder / "report" if output is None else Path(output)
    with replaced_folder(output) as folder, tempfile.TemporaryDirectory(prefix="confkd_report_") as slices:
        trained = [model.read_fold(path) for path in model.fold_folders]
        found = None
        if model.missing_data is None and any(fold.validation for fold in trained):
            found = Findings(model, trained, predictions, Path(slices), device)
        elif predictions is not None:
            raise InputError(f"{predictions}: cannot be compared with anything, since the validation data of the model are missing: "
                             f"{model.missing_data}")
        _write(folder, model, trained, found)
    return output / PAGE


def _write(folder: Path, model: Model, folds: list[Fold], found: Findings | None) -> None:
    """Page and pictures into an empty folder."""
    sections = []
    if found is not None:
        sections += [("measures", "How well do they segment?", _measures(folder, model, found)),
                     ("cases", "Validation cases", _cases(folder, model, found)),
                     *([("partial", "Partially labelled training cases", _partial_cases(folder, model, found))] if found.partial else []),
                     ("calibration", "Can the probabilities be believed?", _calibration(folder, found))]
    sections += [("curves", "Training curves", _curves(folder, folds)),
                 ("training", "What was trained on what", _training(model, folds))]
    title, facts = _headline(model, folds, found)
    notes = [note for fold in folds for note in fold.notes]
    if found is None:
        notes.append("Validation cases are not shown: " + (
            f"the preprocessed data were {model.missing_data}." if model.missing_data else "nobody knows which cases they are."))
    lead = page.paragraph(_about(model, folds), "about") + "".join(page.paragraph(note, "notice") for note in notes)
    html = page.page(title, lead, facts, sections, _footer())
    files = sorted(file.name for file in folder.iterdir())
    # the next report into the same folder may replace these, and nothing else
    (folder / PAGE).write_text(f"{html}<!-- confkd report, files: {json.dumps(files)} -->\n", encoding="utf-8")


# ---- sections -------------------------------------------------------------------------------------------------------

def _fold_names(folds: list[Fold]) -> str:
    return ("fold " if len(folds) == 1 else "folds ") + ", ".join(fold.name.removeprefix("fold_") for fold in folds)


def _about(model: Model, folds: list[Fold]) -> str:
    trainers = ", ".join(dict.fromkeys(fold.trainer for fold in folds))
    epochs = " or ".join(str(n) for n in dict.fromkeys(fold.epochs for fold in folds))
    return (f"{trainers} on {model.plans_manager.dataset_name}, configuration {model.configuration}, {_fold_names(folds)}, after "
            f"{epochs} epochs ({model.checkpoint_name}).")


def _headline(model: Model, folds: list[Fold], found: Findings | None) -> tuple[str, list[tuple[str, str, str]]]:
    if found is None:
        return f"{folds[0].trainer} on {model.plans_manager.dataset_name}: training curves and record", []
    dice = {branch: list(found.dice(branch).values()) for branch in found.names}
    means = {branch: statistics(values) for branch, values in dice.items()}
    cases = f"{len(found.cases)} {_kind_of_cases(folds)} case{'s' if len(found.cases) != 1 else ''}"
    scores = [f"{found.names[branch] if len(found.branches) > 1 else ''} {_number(means[branch]['mean'])}".strip() for branch in found.branches]
    title = f"{', '.join(scores).capitalize()}: mean Dice on {cases}"
    facts = [(f"{found.names[branch]}, mean Dice", _number(m["mean"]), _interval(m)) for branch, m in means.items()]
    for other in ("teacher", "given"):
        if other in found.names:
            m = paired_statistics(dice["student"], dice[other])
            p = "<\u00a00.001" if m["p"] < 0.001 else f"=\u00a0{m['p']:.3f}"
            facts.append((f"{found.names['student']} less {found.names[other]}, by case", _signed(m["mean"]) if m["n"] else "none",
                          _interval(m) + (f"; Wilcoxon p\u00a0{p}" if np.isfinite(m["p"]) else "")))
    return title, facts


def _kind_of_cases(folds: list[Fold]) -> str:
    return "training" if all(set(fold.validation or ()) <= fold.trained_on for fold in folds) else "validation"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if np.isfinite(value) else "none"


def _interval(m: dict, digits: int = 3) -> str:
    return (f"95\u00a0% interval {_number(m['ci_low'], digits)} to {_number(m['ci_high'], digits)}" if np.isfinite(m["ci_low"]) else
            "too few cases for an interval")


def _measures(folder: Path, model: Model, found: Findings) -> str:
    def boxes(measure: str) -> dict[str, dict[str, list[float]]]:
        return {cls: {branch: of.values(cls, measure).tolist() for branch, of in found.evaluations.items()} for cls in model.classes}

    charts = [box_chart("Dice", boxes("Dice"), found.names, (0, 1)), box_chart("HD95 [mm]", boxes("HD95_mm"), found.names)]
    save_charts(charts, folder / "measures.png")
    all_means = {branch: of.statistics() for branch, of in found.evaluations.items()}
    rows = []
    for cls in all_means["student"]:
        for branch, name in found.names.items():
            row = [page.Html(f"{page.text(cls)}<small>{page.branch_key(branch, name)}</small>")]
            for measure, digits in MEASURES.items():
                m = all_means[branch][cls][measure]
                bounds = f"{_number(m['ci_low'], digits)} to {_number(m['ci_high'], digits)}, " if np.isfinite(m["ci_low"]) else ""
                row.append((_number(m["mean"], digits), f"{bounds}n {m['n']}"))
            rows.append([*row, found.evaluations[branch].one_empty(cls) if cls in model.classes else ""])
    cases = [[case, *(_number(found.evaluations[branch].cases[case][cls]["Dice"]) for cls in model.classes for branch in found.names)]
             for case in found.cases]
    heads = [f"{cls}, {name}" for cls in model.classes for name in found.names.values()]
    about = (f"As confkd evaluate measures. {FOREGROUND}: a case's mean over its classes. HD95 and ASSD: distances between surfaces; NSD: share of "
             f"the surfaces within {TOLERANCE_MM:g} mm; volume: predicted less true. A class that is in neither mask has no measure "
             "and is not in n; one that is in one of them alone has Dice, IoU and NSD 0, and no distance. Boxes: quartiles and median; "
             "whiskers: to 1.5 times the box; each mark is a case.")
    return (page.charts("measures", charts, wide=True) + page.table(["class", *map(_measure_name, MEASURES), "no distance"], rows, CAPTION)
            + page.paragraph(about, "note")
            + page.folded(f"Dice of each of the {len(cases)} cases", page.table(["case", *heads], cases, tall=True)))


def _measure_name(measure: str) -> str:
    name, _, unit = measure.rpartition("_")
    return f"{name.removesuffix('_difference')} [{unit}]" if name else measure


def _cells(model: Model, found: Findings, name: str, weak: bool) -> list[Cell]:
    content = found.slice(name)
    options = {"image": content["image"], "aspect": float(content["aspect"])}
    ignore = model.label_manager.ignore_label

    def masks(labels: np.ndarray) -> dict[str, np.ndarray]:
        return {cls: np.isin(labels, values) for cls, values in model.classes.items()}

    def alt(what: str) -> str:
        return f"{what} of {name}, slice {int(content['index']) + 1}"

    cells = [Cell("image", alt("Image"), **options),
             Cell("weak label" if weak else "truth", alt("Weak label" if weak else "True label"), masks=masks(content["label"]),
                  annotated=content["label"] != ignore if weak and ignore is not None else None, **options)]
    for branch, label in found.names.items():
        if branch in content:
            title = label
            if not weak:
                title += f", Dice {found.dice(branch)[name]:.3f}"
            cells.append(Cell(title, alt(f"Segmentation by {label}"), masks=masks(content[branch]), **options))
    cells.append(Cell(f"{found.names['student']}'s entropy", alt(f"Entropy of the {found.names['student']}"), heat=content["entropy"],
                      **options))
    return cells


def _case_rows(folder: Path, model: Model, found: Findings, rows: dict[str, str], weak: bool) -> str:
    parts = []
    for title, name in rows.items():
        cells = _cells(model, found, name, weak)
        content = found.slice(name)
        note = f"Slice {int(content['index']) + 1} of {int(content['count'])}"
        parts.append(page.case_row(title, note, cells))
        save_cells(f"{title}, {note}", cells, folder / _file_name(len(list(folder.glob("case_*"))) + 1, name))
    return "".join(parts)


def _cases(folder: Path, model: Model, found: Findings) -> str:
    rows = {f"{what.capitalize()}: {name}": name for what, name in found.shown().items()}
    if not rows:
        return page.paragraph("No validation case has any foreground, true or predicted.")
    return page.paragraph(f"Best, median and worst by the {found.names['student']}'s mean Dice, in the slice with most foreground (label and "
                          "predictions together), on the grid of the preprocessed data.") + page.class_legend(
        list(model.classes), False, True) + _case_rows(folder, model, found, rows, False)


def _partial_cases(folder: Path, model: Model, found: Findings) -> str:
    return page.paragraph("Both branches on images that the training saw with a weak label only.") + page.class_legend(
        list(model.classes), True, True) + _case_rows(folder, model, found, {name: name for name in found.partial}, True)


def _calibration(folder: Path, found: Findings) -> str:
    names = {branch: found.names[branch] for branch in found.branches}
    counts = {branch: found.counts[branch]["in question"] for branch in names}
    if not all(c.count.sum() for c in counts.values()):
        return page.paragraph("No branch predicts any foreground, and none is in doubt anywhere.")
    reliability = {branch: reliability_curve(c) for branch, c in counts.items()}
    risk = {branch: _risk_at_coverage(c) for branch, c in counts.items()}
    charts = [
        line_chart("Reliability", {branch: (r["confidence"], r["accuracy"]) for branch, r in reliability.items()}, names,
                   "mean confidence", "share that is right", "Share of right voxels against mean confidence; " + "; ".join(
                       f"{names[branch]}: ECE {ece(c):.3f}" for branch, c in counts.items()) + ".", diagonal=True),
        line_chart("Risk and coverage", {branch: (COVERAGES, values) for branch, values in risk.items()}, names,
                   "coverage: share of voxels, the surest first", "risk: share that is wrong",
                   "Share of wrong voxels against the share of voxels that are kept, the most confident first; over all of them " + "; ".join(
                       f"{names[branch]}: {values[-1]:.3f}" for branch, values in risk.items()) + ".")]
    save_charts(charts, folder / "calibration.png")
    rows = []
    for voxels in VOXELS:
        for branch, name in names.items():
            c = found.counts[branch][voxels]
            total = c.count.sum()
            rows.append([page.Html(f"{page.text(VOXEL_NAMES[voxels])}<small>{page.branch_key(branch, name)}</small>"), f"{total:,}",
                         f"{ece(c):.4f}", _percent(c.confidence.sum() / total, 2), _percent(c.correct.sum() / total, 2),
                         f"{_signed(100 * overconfidence(c), 2)} points",
                         f"{aurc(c):.4f}", f"{aurc(c) - smallest_aurc(c):.4f}"])
    about = ("Dots on the line: of the voxels of which a network is 80\u00a0% sure, 80\u00a0% are right; below the line it is overconfident. "
             f"The charts count the voxels in question: those that {'a branch' if len(names) > 1 else 'the network'} predicts as foreground or "
             f"of which it is less than {_percent(SURE, 0)} sure. The rest is background that hardly any network gets wrong, and flatters all of them.")
    return ("".join(map(page.paragraph, _calibration_sentences(found, names))) + page.charts("calibration", charts, wide=True) + page.paragraph(about, "note")
            + page.table(["voxels", "number" if not found.model.label_manager.has_regions else "number, over the regions", "ECE",
                          "mean confidence", "right", "overconfidence", "AURC", "E-AURC"], rows,
                         "ECE: expected calibration error, 15 bins. AURC: area under the risk-coverage curve; E-AURC: less the smallest "
                         "that as many errors allow"))


def _risk_at_coverage(counts: Counts) -> np.ndarray:
    curve = risk_coverage_curve(counts)
    return curve["risk"][np.searchsorted(curve["coverage"], COVERAGES * (1 - 1e-9))]


def _calibration_sentences(found: Findings, names: dict[str, str]) -> list[str]:
    """What the figures say, and no more."""
    counts, sentences = {branch: found.counts[branch]["in question"] for branch in names}, []
    if len(names) > 1:
        low, high = ece_difference(*(found.case_counts[branch]["in question"] for branch in ("student", "teacher")))
        verdict = ("The student is less well calibrated than its teacher" if low > 0 else
                   "The student is better calibrated than its teacher" if high < 0 else
                   "The figures do not tell which branch is better calibrated")
        interval = f" (95 % interval {_signed(low)} to {_signed(high)}, bootstrap over the cases)" if np.isfinite(low) else ""
        sentences.append(f"{verdict}: on the {len(found.cases)} cases the student's expected calibration error "
                         f"(ECE) less the teacher's is {_signed(ece(counts['student']) - ece(counts['teacher']))}{interval}.")
    parts = []
    for branch, name in names.items():
        c = counts[branch]
        sure, right = c.confidence.sum() / c.count.sum(), c.correct.sum() / c.count.sum()
        parts.append(f"the {name} is {_percent(sure)} sure on average and right in "
                     f"{_percent(right)}" + (f", {'over' if sure > right else 'under'}confident by {100 * abs(sure - right):.1f} points"
                                             if abs(sure - right) >= 0.0005 else "") + f" (ECE {ece(c):.3f})")
    return [*sentences, f"In the voxels in question {'; '.join(parts)}."]


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"  # a space that does not break


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def ece_difference(first: list[tuple], second: list[tuple], samples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval over cases of the difference of two ECEs. first, second: of each case its (count, correct, confidence)
    per bin. NaN with fewer than two cases."""
    if len(first) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).multinomial(len(first), np.full(len(first), 1 / len(first)), samples)  # how often each case is drawn

    def eces(cases: list[tuple]) -> np.ndarray:
        count, correct, confidence = (drawn @ np.stack(values).astype(float) for values in zip(*cases))
        return np.abs(correct - confidence).sum(1) / count.sum(1)

    low, high = np.nanpercentile(eces(first) - eces(second), (2.5, 97.5))
    return float(low), float(high)


def _curves(folder: Path, folds: list[Fold]) -> str:
    charts = curve_charts({fold.name: fold.curves for fold in folds}, folds[0].names)
    if not charts:
        return page.paragraph("The checkpoint holds no curves.")
    save_charts(charts, folder / "curves.png")
    return page.charts("curves", charts) + page.paragraph(
        "Means over each epoch; terms without their weights. The pseudo-Dice is nnU-Net's, of patches of the validation images during "
        "training, and not to be compared with the Dice of whole cases.", "note")


def _training(model: Model, folds: list[Fold]) -> str:
    return "".join((page.title("Supervision"), _supervision(folds), page.title("Settings"), _settings(folds), page.title("Plans"),
                    _plans(model, folds), page.title("Versions"), _versions(model, folds)))


def _supervision(folds: list[Fold]) -> str:
    rows, lists = [], ""
    for fold in folds:
        name = fold.name.replace("_", " ")
        if fold.training is None:
            rows.append([name, *["not known"] * len(KINDS), "not known" if fold.validation is None else len(fold.validation)])
            continue
        counts = Counter(fold.training.values())
        rows.append([name, *(counts[kind] for kind in KINDS), "not known" if fold.validation is None else len(fold.validation)])
        for kind in (kind for kind in KINDS if counts[kind]):
            cases = sorted(case for case, k in fold.training.items() if k == kind)
            lists += page.folded(f"{name}: the {len(cases)} training cases with {LABELS[kind]}", page.names(cases))
        if fold.validation:
            lists += page.folded(f"{name}: the {len(fold.validation)} validation cases", page.names(fold.validation))
    return page.table(["", *(LABELS[kind] for kind in KINDS), "validation cases"], rows, "Training cases by their label") + lists


def _settings(folds: list[Fold]) -> str:
    recorded = [fold.record["settings"] for fold in folds if fold.record is not None]
    if not recorded:
        return page.paragraph("Stock nnU-Net's trainer: it has none of this plugin's settings.")
    note = "" if all(settings == recorded[0] for settings in recorded) else page.paragraph(
        f"The folds were trained with different settings; these are those of {folds[0].name.replace('_', ' ')}.", "notice")
    defaults, known = Settings().as_dict(), {f.name: f.metadata["doc"] for f in fields(Settings)}
    changed, others = [], []
    for name, value in recorded[0].items():
        row = [name, _value(value), _value(defaults[name]) if name in defaults else "none", known.get(name, "not known to this version")]
        (changed if name not in defaults or value != defaults[name] else others).append(row)
    head = ["setting", "value", "default", "meaning"]
    body = page.table(head, changed, f"{len(changed)} of {len(recorded[0])} settings differ from the default", wrap=3,
                      marked=range(len(changed))) if changed else page.paragraph("Every setting is the default.")
    return note + body + (page.folded(f"The {len(others)} settings that are the default", page.table(head, others, wrap=3)) if others else "")


def _value(value) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _plans(model: Model, folds: list[Fold]) -> str:
    configuration, architecture = model.configuration_manager.configuration, model.configuration_manager.network_arch_class_name
    features = model.configuration_manager.network_arch_init_kwargs.get("features_per_stage")
    labels = ", ".join(f"{name} ({' '.join(map(str, values))})" for name, values in model.classes.items())
    rows = [["data set", model.plans_manager.dataset_name], ["configuration", f"{model.configuration} of {model.plans['plans_name']}"],
            ["channels", ", ".join(map(str, (model.dataset_json.get("channel_names") or model.dataset_json["modality"]).values()))],
            ["regions" if model.label_manager.has_regions else "classes", f"{labels}; ignore: {model.label_manager.ignore_label}"],
            ["network", f"{architecture.rpartition('.')[2]}, features {_value(features)}, {len(folds[0].branches)} "
                        f"decoder{'s' if len(folds[0].branches) > 1 else ''}"],
            ["patch size, batch size", f"{_value(configuration['patch_size'])}, {configuration['batch_size']}"],
            ["spacing [mm]", _value([round(s, 4) for s in configuration["spacing"]])],
            ["normalisation", ", ".join(configuration["normalization_schemes"])]]
    rows += [[key, str(model.dataset_json[key])] for key in ("licence", "reference") if key in model.dataset_json]
    return page.table(["what", "value"], rows, wrap=1)


def _versions(model: Model, folds: list[Fold]) -> str:
    trained = sorted({fold.record["nnunet_confkd"] for fold in folds if fold.record is not None})
    times = [fold.curves["epoch_end_timestamps"][-1] for fold in folds if fold.curves.get("epoch_end_timestamps")]
    debug = [read_json(path) for path in (folder / "debug.json" for folder in model.fold_folders) if path.is_file()]
    torches = sorted({str(content["torch_version"]) for content in debug if "torch_version" in content})
    return page.table(["what", "training", "this report"], [
        ["nnunet_confkd", ", ".join(trained) or "not used", __version__], ["commit of nnunet_confkd", "not recorded", _commit() or "not known"],
        ["nnunetv2", "not recorded", version("nnunetv2")], ["torch", ", ".join(torches) or "not recorded", torch.__version__],
        ["Python", "not recorded", platform.python_version()],
        ["date", _date(datetime.fromtimestamp(max(times))) if times else "not recorded", _date(datetime.now())]], words=3)


def _date(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M %Z}"


def _commit() -> str | None:
    """The commit of the checkout that the package is run from, "-dirty" where files of it were changed; None: from no checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True,
                              timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a repository around an installed package
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def _footer() -> str:
    return page.paragraph(f"Written by confkd report (nnunet_confkd {__version__}) on {_date(datetime.now())}. A description of one model "
                          f"on the cases that are named here; not for use on patients.")
