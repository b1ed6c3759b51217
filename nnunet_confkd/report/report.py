"""Write the report of a trained model: one HTML page that loads nothing from elsewhere, with its pictures as PNG files.

The page shows how well the branches segment the validation cases, pictures of cases, the calibration of the
probabilities, the training curves, and what was trained on what. All figures and pictures come from one prediction of
each case by both branches, with the checkpoint that the report names.
"""
from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from nnunet_confkd.errors import InputError
from nnunet_confkd.files import new_folder
from nnunet_confkd.report import page
from nnunet_confkd.report.cases import Findings
from nnunet_confkd.report.model import Fold, Model
from nnunet_confkd.report.page_folder import require_replaceable, write_page
from nnunet_confkd.report.sections import about, footer, headline, sections

PAGE = "report.html"


def report(model: str | Path, folds: list[str] | None = None, predictions: Path | None = None,
           output: Path | None = None, checkpoint: str = "checkpoint_final.pth",
           device: torch.device = torch.device("cpu")) -> Path:
    """Write the report of a trained model.

    Without the preprocessed data, or if the validation cases are not known, the sections that need them are left out,
    and the page says so.

    Args:
        model: TRAINER__PLANS__CONFIGURATION under nnUNet_results.
        folds: The folds to report on, such as ["0", "1"]. None: all that are trained.
        predictions: A folder of segmentations of the same validation cases, to show as well.
        output: The folder to write. An earlier report in it is replaced. None: `report` in the model's folder.
        checkpoint: The file name of the checkpoints.
        device: Where to predict.

    Returns:
        The path of the page.

    Raises:
        InputError: There is no such model, fold or checkpoint; the predictions do not match; or the output folder
            cannot be written or holds other files.

    Examples:
        >>> report("MODEL", folds=["0"])  # doctest: +SKIP
        PosixPath('MODEL/report/report.html')
    """
    trained_model = Model(model, folds, checkpoint)
    output = trained_model.folder / "report" if output is None else Path(output)
    require_replaceable(output, PAGE, "report", "Choose another folder (--output)")
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(new_folder(output, replace=True))
        except OSError as error:
            raise InputError(f"{output}: cannot be written ({error}). Choose another folder (--output).") from error
        slices = stack.enter_context(tempfile.TemporaryDirectory(prefix="confkd_report_"))
        trained = [trained_model.read_fold(path) for path in trained_model.fold_folders]
        found = None
        if trained_model.missing_data is None and any(fold.validation for fold in trained):
            found = Findings(trained_model, trained, predictions, Path(slices), device)
        elif predictions is not None:
            raise InputError(f"{predictions}: cannot be compared with anything, because the validation data are "
                             f"missing ({_why_missing(trained_model)})")
        write(folder, trained_model, trained, found)
    return output / PAGE


def _why_missing(model: Model) -> str:
    return model.missing_data or "it is not known which cases they are"


def write(folder: Path, model: Model, folds: list[Fold], found: Findings | None) -> None:
    """Write the page and its pictures into an empty folder."""
    notes = [note for fold in folds for note in fold.notes]
    if found is None:
        notes.append(f"Validation cases are not shown: {_why_missing(model)}.")
    title, facts = headline(model, folds, found)
    lead = page.paragraph(about(model, folds), "about") + "".join(page.paragraph(note, "notice") for note in notes)
    html = page.page(title, lead, facts, sections(folder, model, folds, found), footer())
    write_page(folder, PAGE, "report", html)
