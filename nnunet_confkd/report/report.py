"""The report of a trained model: one HTML page that loads nothing from elsewhere, and its pictures as PNG beside it.

It tells what the branches reach on the validation cases, shows cases, whether the probabilities can be believed, the
training curves, and what was trained on what. Figures and pictures come from one prediction of each case by both branches,
with the checkpoint that the report names.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from nnunet_confkd.device import choose_device
from nnunet_confkd.errors import InputError
from nnunet_confkd.report import page
from nnunet_confkd.report.cases import Findings, Fold, Model
from nnunet_confkd.report.sections import about, footer, headline, sections

PAGE = "report.html"
FILES_LINE = re.compile(r"<!-- confkd report, files: (\[.*?\]) -->")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd report", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER",
                        help="the trained model: TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    parser.add_argument("--fold", nargs="+", metavar="F", help="default: all that are trained")
    parser.add_argument("--predictions", type=Path, metavar="DIR",
                        help="segmentations of the same validation cases by something else (another model, an ensemble, "
                             "after postprocessing), to be shown beside the branches")
    parser.add_argument("--output", type=Path, metavar="FOLDER",
                        help="default: 'report' in the model's folder; an earlier report in it is replaced")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="default: checkpoint_final.pth")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    device = torch.device(choose_device(args.device))
    print("written:", report(args.model, args.fold, args.predictions, args.output, args.chk, device))


def report(model: str | Path, folds: list[str] | None = None, predictions: Path | None = None, output: Path | None = None,
           checkpoint: str = "checkpoint_final.pth", device: torch.device = torch.device("cpu")) -> Path:
    """Write the report of a trained model. Returns the page's path.

    model: TRAINER__PLANS__CONFIGURATION under nnUNet_results. folds: None: all. output: default `model`/report.
    predictions: a folder of segmentations of the same validation cases.
    Without the preprocessed data, or where nobody knows the validation cases, the sections that need them are left out, and
    the page says so.
    Raises InputError: no such model, fold or checkpoint; predictions that do not match; an output folder that cannot be
        written or holds other files.
    """
    trained_model = Model(model, folds, checkpoint)
    output = trained_model.folder / "report" if output is None else Path(output)
    with replaced_folder(output) as folder, tempfile.TemporaryDirectory(prefix="confkd_report_") as slices:
        trained = [trained_model.read_fold(path) for path in trained_model.fold_folders]
        found = None
        if trained_model.missing_data is None and any(fold.validation for fold in trained):
            found = Findings(trained_model, trained, predictions, Path(slices), device)
        elif predictions is not None:
            raise InputError(f"{predictions}: cannot be compared with anything: the model's validation data are missing "
                             f"({trained_model.missing_data or 'nobody knows which cases they are'})")
        write(folder, trained_model, trained, found)
    return output / PAGE


@contextmanager
def replaced_folder(output: Path):
    """Yields a new folder that takes `output`'s place at the end; an exception leaves `output` as it was.

    Raises InputError where `output` cannot be written, or holds anything but an earlier report.
    """
    foreign = []
    if output.is_dir():
        own = _own_files(output)
        foreign = sorted(entry.name for entry in output.iterdir() if entry.name not in own)
    if foreign:
        raise InputError(f"{output}: holds files that are no report's ({', '.join(foreign[:5])}"
                         f"{', ...' if len(foreign) > 5 else ''}). Choose another folder; nothing was written.")
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


def write(folder: Path, model: Model, folds: list[Fold], found: Findings | None) -> None:
    """Page and pictures into an empty folder."""
    notes = [note for fold in folds for note in fold.notes]
    if found is None:
        why = "nobody knows which cases they are"
        if model.missing_data:
            why = f"the preprocessed data were {model.missing_data}"
        notes.append(f"Validation cases are not shown: {why}.")
    title, facts = headline(model, folds, found)
    lead = page.paragraph(about(model, folds), "about") + "".join(page.paragraph(note, "notice") for note in notes)
    html = page.page(title, lead, facts, sections(folder, model, folds, found), footer())
    files = sorted(file.name for file in folder.iterdir())
    # the next report into the same folder may replace these, and nothing else
    (folder / PAGE).write_text(f"{html}<!-- confkd report, files: {json.dumps(files)} -->\n", encoding="utf-8")
