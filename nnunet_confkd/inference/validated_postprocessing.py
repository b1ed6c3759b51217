"""nnU-Net's post-processing: it is determined on the validation cases of a model, and applied to predictions."""
from __future__ import annotations

from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.accumulate_cv_results import accumulate_cv_results
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing_to_folder,
    determine_postprocessing,
)

from nnunet_confkd.data.folders import raw_folder
from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.files import new_folder

RULES = "postprocessing.pkl"


def determine(model: Path, folds: list[str], output: Path) -> None:
    """Determine which components are removed, as nnUNetv2_determine_postprocessing does.

    Args:
        model: The folder of the trained model.
        folds: The folds whose validation cases count.
        output: A folder to write. It gets these cases, `postprocessing.pkl` and `postprocessing.json`, completely or
            not at all.
    """
    with new_folder(output, replace=True) as folder:
        accumulate_cv_results(str(model), str(folder), folds, default_num_processes)  # type: ignore[arg-type]
        truth = raw_folder() / model.parent.name / "labelsTr"
        determine_postprocessing(str(folder), str(truth), str(model / "plans.json"), str(model / "dataset.json"),
                                 default_num_processes, keep_postprocessed_files=False)


def apply(rules: Path, predictions: Path, output: Path) -> None:
    """Write post-processed predictions, all of them or none.

    Args:
        rules: The folder that :func:`determine` has written.
        predictions: The folder of the predictions, with nnU-Net's dataset.json and plans.json. It stays as it is.
        output: The folder to write.
    """
    functions, options = load_pickle(str(rules / RULES))
    with new_folder(output, replace=True) as folder:
        apply_postprocessing_to_folder(str(predictions), str(folder), functions, options,
                                       num_processes=default_num_processes)
        for name in ("dataset.json", "plans.json"):
            (folder / name).write_bytes((predictions / name).read_bytes())


def described(rules: Path) -> str:
    """Say in a sentence what the post-processing does, and what it gained.

    Args:
        rules: The folder that :func:`determine` has written.
    """
    found = read_json(rules / "postprocessing.json")
    removed = ["the largest component of the foreground" if isinstance(label, list) and len(label) > 1 else
               f"the largest component of {label}" for label in
               (options["labels_or_regions"] for options in found["postprocessing_kwargs"])]
    before, after = (found[key]["foreground_mean"]["Dice"] for key in ("input_folder", "postprocessed"))
    cases = len(read_json(rules / "summary.json")["metric_per_case"])
    if not removed:
        return f"post-processing: none, because on the {cases} validation cases it does not help (Dice {before:.3f})"
    return (f"post-processing: only {' and '.join(removed)} is kept; on the {cases} validation cases the mean Dice "
            f"goes from {before:.3f} to {after:.3f}")
