"""nnU-Net's post-processing of a trained model: find it, say what it does, and apply it to predictions.

nnU-Net writes it twice, as postprocessing.pkl and as postprocessing.json. The latter is read here, because a pickle can
execute anything.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.accumulate_cv_results import accumulate_cv_results
from nnunetv2.postprocessing.remove_connected_components import (
    determine_postprocessing,
    load_postprocess_save,
    remove_all_but_largest_component_from_segmentation,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.folders import raw_folder
from nnunet_confkd.data.json_files import read_json, read_plans
from nnunet_confkd.errors import InputError, shown, some
from nnunet_confkd.files import new_folder
from nnunet_confkd.inference.inputs import Predicted
from nnunet_confkd.processes import PROCESSES, parallel

FILE, FOLDER = "postprocessing.json", "postprocessed"
FUNCTION = remove_all_but_largest_component_from_segmentation

HOW_TO = (
    "nnUNetv2_find_best_configuration determines one on the validation cases of all folds; of one fold: "
    'nnUNetv2_determine_postprocessing -i {model}/fold_0/validation -ref "$nnUNet_raw"/{model.parent.name}/labelsTr '
    "-plans_json {model}/plans.json -dataset_json {model}/dataset.json --remove_postprocessed")


@dataclass(frozen=True)
class PostProcessing:
    """What nnU-Net has determined.

    Attributes:
        file: Its postprocessing.json.
        steps: For each step the labels whose union is reduced to its largest component.
        dice: The mean Dice of the validation cases without and with it; None if the file does not tell.
        branch: The branch that predicts, if it is not the student, whose validation nnU-Net has looked at.
        folds: The folds on which it was determined, if not all of those that predict are among them.

    Examples:
        >>> PostProcessing(Path("postprocessing.json"), ((1, 2, 3), (1,)), None).steps[0]  # first all of the foreground
        (1, 2, 3)
    """
    file: Path
    steps: tuple[tuple[int, ...], ...]
    dice: tuple[float, float] | None
    branch: str = ""
    folds: str = ""

    def text(self, labels: dict) -> str:
        """Say what it does. labels: as in dataset.json."""
        if not self.steps:
            return "post-processing does not help on the validation cases, so none is applied"
        names = {(value,) if isinstance(value, int) else tuple(value): name for name, value in labels.items()}
        whole = tuple(sorted({label for values in names for label in values} - {0, labels.get("ignore")}))
        parts = [f"of {names.get(step) or ('the whole foreground' if step == whole else f'the labels {step}')}"
                 for step in self.steps]
        gain = f" (mean Dice of the validation cases {self.dice[0]:.3f}, and {self.dice[1]:.3f} with it)" \
            if self.dice else ""
        branch = f"; the student's predictions were looked at for this, not the {self.branch}'s" if self.branch else ""
        folds = f"; it was determined on the validation of folds {self.folds}, and others predict" if self.folds else ""
        return f"post-processing keeps the largest component {', '.join(parts)} alone{gain}{branch}{folds}"


def find(model: Path, folds: Iterable[int | str]) -> PostProcessing | None:
    """Find what nnUNetv2_find_best_configuration or nnUNetv2_determine_postprocessing has written for a model.

    Args:
        model: TRAINER__PLANS__CONFIGURATION.
        folds: The folds that predict. The post-processing of these folds is preferred.

    Returns:
        The post-processing, or None if there is none. See :func:`read` for the errors.

    Examples:
        >>> find(Path("MODEL"), folds=[0]) is None  # doctest: +SKIP
        True
    """
    predict = {str(fold) for fold in folds}
    # the same folds first, then more folds, and others last
    crossvals = [(place, set(place.name.removeprefix("crossval_results_folds_").split("_")))
                 for place in sorted(model.glob("crossval_results_folds_*"))]
    crossvals.sort(key=lambda found: (found[1] != predict, not found[1] >= predict, len(found[1])))
    places = [(place, found) for place, found in crossvals if found == predict] + [(model, predict)]
    if len(predict) == 1:
        places.append((model / f"fold_{next(iter(predict))}" / "validation", predict))
    for place, found in (*places, *crossvals):
        if (place / FILE).is_file() or (place / "postprocessing.pkl").is_file():
            return replace(read(place), folds="" if found >= predict else ", ".join(sorted(found)))
    return None


def read(folder: Path) -> PostProcessing:
    """Read the post-processing in a folder.

    Raises:
        InputError: There is no such file, or it holds another function than nnU-Net's.
    """
    file = folder / FILE
    if not file.is_file():
        raise InputError(f"{file}: is not there; nnU-Net writes it beside postprocessing.pkl, which is not opened, "
                         f"because it can execute anything. Copy it, too, or determine the post-processing anew")
    content = read_json(file)
    functions, options = content.get("postprocessing_fns"), content.get("postprocessing_kwargs")
    try:
        steps = tuple(_labels(**one) for one in options)
        right = len(steps) == len(functions) and all(name == FUNCTION.__name__ for name in functions)
    except (TypeError, ValueError):
        right = False
    if not right:
        raise InputError(f"{file}: must hold calls of {FUNCTION.__name__} with labels, as nnU-Net writes it; got "
                         f"{shown(functions)} with {shown(options)}")
    try:
        before, after = (float(content[key]["foreground_mean"]["Dice"]) for key in ("input_folder", "postprocessed"))
    except (KeyError, TypeError, ValueError):
        return PostProcessing(file, steps, None)
    return PostProcessing(file, steps, (before, after))


def _labels(labels_or_regions) -> tuple[int, ...]:
    """Return the labels of a step. The list of all labels, a label, and the labels of a region mean the same here."""
    labels = labels_or_regions if isinstance(labels_or_regions, list) else [labels_or_regions]
    if not all(isinstance(label, int) for label in labels):
        raise ValueError(labels)
    return tuple(labels)


def determine(model: Path, folds: list[str], output: Path) -> PostProcessing:
    """Determine the post-processing of a model, as nnUNetv2_determine_postprocessing does.

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
    return read(output)


def apply(found: PostProcessing, model: Path, target: Path, files: Iterable[Path]) -> None:
    """Write post-processed segmentations. The raw ones stay.

    Args:
        found: The post-processing.
        model: The model, whose plans name the reader and writer.
        target: The folder to write to, which may exist.
        files: The raw segmentations.
    """
    target.mkdir(exist_ok=True)
    reader = PlansManager(read_plans(model / "plans.json")).image_reader_writer_class
    parallel(_apply_to_file, [(file, target / file.name, reader, found.steps) for file in files], PROCESSES,
             "post-processing")


def _apply_to_file(file: Path, target: Path, reader: type, steps: tuple[tuple[int, ...], ...]) -> None:
    with TemporaryDirectory(prefix=".", dir=target.parent) as aside:  # the writer may add a file with the spacing
        load_postprocess_save(str(file), str(Path(aside) / target.name), reader(), [FUNCTION] * len(steps),
                              [{"labels_or_regions": list(step)} for step in steps])
        for written in Path(aside).iterdir():
            os.replace(written, target.parent / written.name)


def required(model: Path, folds: Iterable[int | str], asked: str | None,
             branch: str = "student") -> PostProcessing | None:
    """Find the post-processing of a model, before it predicts.

    Args:
        model: Its folder.
        folds: Those that predict.
        asked: The value of --postprocessing: a folder, "" for that of the model, or None if it is not to be applied.
        branch: The branch that predicts.

    Returns:
        The post-processing, or None if there is none.

    Raises:
        InputError: One is asked for, and there is none, or it cannot be read.
    """
    if asked:
        return read(Path(asked))
    try:
        found = find(model, folds)
    except InputError:
        if asked is None:
            return None
        raise
    if found is None and asked is not None:
        raise InputError(f"--postprocessing: there is none for {model}. {HOW_TO.format(model=model)}")
    return replace(found, branch=branch) if found and branch != "student" else found


def applied(found: PostProcessing | None, predicted: Predicted, asked: bool) -> Predicted:
    """Apply the post-processing if it is asked for, else mention it.

    Args:
        found: The post-processing of the model; None if there is none.
        predicted: The raw predictions.
        asked: Whether to apply it.

    Returns:
        The predictions, with the post-processed segmentations where there are any.
    """
    if not asked and (earlier := [case for case, file in predicted.segmentations.items()
                                  if (predicted.output / FOLDER / file.name).is_file()]):
        print(f"WARNING: {predicted.output / FOLDER}: is of earlier predictions of {some(earlier, 3)}; remove it, or "
              f"predict with --postprocessing")
    if found is None and predicted.described.get(CLASSES_KEY):
        print("these predictions are raw. nnU-Net cannot determine a post-processing here, because it takes "
              "classes that a case is not annotated for as absent")
        return predicted
    if found is None:
        print("these predictions are raw, and the model has no post-processing, which often removes false positives. "
              f"{HOW_TO.format(model=predicted.model)}. Then add --postprocessing here")
        return predicted
    text = f"{found.text(predicted.described['labels'])} ({found.file})"
    if not asked:
        print(f"these predictions are raw. {text[0].upper()}{text[1:]}"
              + (": add --postprocessing to apply it" if found.steps else ""))
        return predicted
    folder = predicted.output / FOLDER
    apply(found, predicted.model, folder, predicted.segmentations.values())
    print(f"post-processed predictions: {folder}; {text}")
    return replace(predicted, segmentations={case: folder / file.name for case, file in
                                             predicted.segmentations.items()})
