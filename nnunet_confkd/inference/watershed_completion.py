"""The labels of partially annotated cases, completed without a model: a watershed spreads the annotations.

See :mod:`nnunet_confkd.data.watershed`.
"""
from __future__ import annotations

from pathlib import Path

from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.folders import folder_name, new_dataset, raw_folder
from nnunet_confkd.data.supervision import PARTIAL
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.inference.completed_case import PREDICTED, CompletedCase
from nnunet_confkd.inference.completed_dataset import CompletedDataset
from nnunet_confkd.processes import PROCESSES, parallel

NOTE = ("Voxels of these cases that nobody had annotated have the label that a watershed spread to them: do not take "
        "them for truth, in validation least of all.")


def complete_by_watershed(source: int | str, dataset_id: int, *, name: str | None = None, processes: int = PROCESSES,
                          link: bool = False) -> Path:
    """Write a copy of a data set in which a watershed has labelled the ignored voxels.

    Annotated voxels stay as they are, and so do fully annotated and unlabelled cases. Volumes of thick slices are
    flooded slice by slice. There, nothing is spread in slices without annotated background.

    Args:
        source: The id or the name of the data set.
        dataset_id: The id of the new data set.
        name: The name of the new data set. None: that of the source and `_watershed`.
        processes: The number of processes.
        link: Whether images are hard links instead of copies.

    Returns:
        The new raw folder.

    Raises:
        InputError: There is no such data set or nothing to complete; labels are regions, or some cases are not
            annotated for all classes; a case has no annotated background; labels cannot be read or have other values;
            the id is taken. All problems of the cases are listed at once.

    Examples:
        >>> complete_by_watershed(27, 127)  # doctest: +SKIP
        PosixPath('raw/Dataset127_Hearts_watershed')
    """
    completed = CompletedDataset.of(source, name, "watershed")
    folder, dataset = completed.folder, completed.dataset
    _require_labels(folder, completed.described)
    with new_dataset(dataset_id, dataset.name) as (target, preprocessed):
        completed.check(processes)
        incomplete = {case.name: case for case in dataset.training
                      if case.name in completed.known and completed.kinds[case.name] == PARTIAL}
        if not incomplete:
            raise InputError(f"{folder}: no training case is partially annotated; there is nothing to spread")
        if bad := [name for name in incomplete if not completed.counts[name][0]]:
            raise InputError(f"{folder / 'labelsTr'}: {some(bad, 5)}: no annotated background, so that a watershed "
                             f"would fill the image with foreground; complete them by a model: --model")
        completions = [CompletedCase(name, completed.known[name], target, dataset.file_ending,
                                     completed.known[name].ignore, None, fills_all=False) for name in incomplete]
        (target / PREDICTED).mkdir(parents=True)
        counts = parallel(CompletedCase.flood, [(completion, tuple(volume.file for volume in case.images)) for
                                                completion, case in zip(completions, incomplete.values())], processes,
                          "spreading annotations")
        rows = [{"kind_before": PARTIAL, **counted} for counted in counts]
        completed.write(target, preprocessed, completions, rows, {"watershed": True, "note": NOTE}, processes, link)
    return raw_folder() / folder_name(dataset_id, dataset.name)


def _require_labels(folder: Path, described: dict) -> None:
    """Raise InputError unless each voxel has one label."""
    for found, what in ((any(isinstance(value, list) for value in described["labels"].values()), "labels are regions"),
                        (described.get(CLASSES_KEY), "some cases are not annotated for all classes")):
        if found:
            raise InputError(f"{folder / 'dataset.json'}: {what}, and a watershed needs one label for each voxel; "
                             f"complete them by a model: --model")
