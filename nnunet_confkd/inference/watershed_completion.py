"""The labels of partially annotated cases, completed without a model: a watershed spreads the annotations.

See :mod:`nnunet_confkd.data.watershed`.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_confkd import __version__
from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.folders import find_dataset, folder_name, new_dataset, raw_folder
from nnunet_confkd.data.images import Picture, Volume, read
from nnunet_confkd.data.json_files import read_description
from nnunet_confkd.data.raw_format import Case, raw_dataset, write_into
from nnunet_confkd.data.supervision import FULL, PARTIAL
from nnunet_confkd.data.watershed import spread_volume
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.files import write_json
from nnunet_confkd.inference.completion import KEY, check_cases, splits_of
from nnunet_confkd.processes import PROCESSES, parallel

THICK = 3  # slices are flooded one by one if they are so many times thicker than wide, as nnU-Net resamples them
MOST = 20_000_000  # voxels: a larger volume is flooded on a coarser grid, because a voxel needs 100 bytes or more
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
    source = find_dataset(source)
    folder = raw_folder() / source
    dataset = raw_dataset(folder, name or f"{source[11:]}_watershed")
    described = read_description(folder / "dataset.json")
    dataset.patient_pattern = described.get("patient_pattern")
    _require_labels(folder, described)
    with new_dataset(dataset_id, dataset.name) as (target, preprocessed):
        known, kinds, _ = check_cases(folder, described, dataset, processes)
        incomplete = {case.name: case for case in dataset.training
                      if case.name in known and kinds[case.name] == PARTIAL}
        if not incomplete:
            raise InputError(f"{folder}: no training case is partially annotated; there is nothing to spread")
        splits = splits_of(source, kinds, dataset.patient_pattern, known)
        floods = [_Flood(tuple(volume.file for volume in case.images), known[name].ignore)
                  for name, case in incomplete.items()]
        counts = parallel(_Flood.count, list(zip(floods, [case.label.file for case in incomplete.values()])), processes,
                          "spreading annotations")
        if bad := [name for name, count in zip(incomplete, counts) if count is None]:
            raise InputError(f"{folder / 'labelsTr'}: {some(bad, 5)}: no annotated background, so that a watershed "
                             f"would fill the image with foreground; complete them by a model: --model")
        spread = dict(zip(incomplete, zip(floods, counts)))
        dataset.training = [_completed(case, kinds[case.name], *spread.get(case.name, (None, None)))
                            for case in dataset.training]
        dataset.test = [replace(case, values={value: value for value in dataset.values}) for case in dataset.test]
        dataset.more[KEY] = [*dataset.more.get(KEY, []), {
            "source": source, "watershed": True, "nnunet_confkd": __version__, "note": NOTE,
            "cases": {name: {"kind_before": PARTIAL, **counted} for name, (_, counted) in spread.items()}}]
        write_into(target, preprocessed, dataset, processes, link)
        if splits is None:
            (preprocessed / "splits_final.json").unlink(missing_ok=True)  # no fold may validate on spread labels
        else:
            write_json(preprocessed / "splits_final.json", splits)
    return raw_folder() / folder_name(dataset_id, dataset.name)


def _require_labels(folder: Path, described: dict) -> None:
    """Raise InputError unless each voxel has one label."""
    for found, what in ((any(isinstance(value, list) for value in described["labels"].values()), "labels are regions"),
                        (described.get(CLASSES_KEY), "some cases are not annotated for all classes")):
        if found:
            raise InputError(f"{folder / 'dataset.json'}: {what}, and a watershed needs one label for each voxel; "
                             f"complete them by a model: --model")


def _completed(case: Case, kind: str, flood: _Flood | None, counted: dict | None) -> Case:
    """Give a training case its kind, and its new label if it has one."""
    if flood is None:
        return replace(case, kind=kind)
    return replace(case, kind=PARTIAL if counted["ignored_voxels"] else FULL,
                   label=Volume(case.label.file, reader=flood.fill))


@dataclass(frozen=True)
class _Flood:
    """How the label of a case is completed. It is sent to other processes.

    Attributes:
        images: The files of the channels.
        ignore: The ignore label.
    """

    images: tuple[Path, ...]
    ignore: int

    def fill(self, file: Path) -> Picture:
        """Read the label `file`, and spread its annotations."""
        picture = read(file)
        label = picture.voxels[0].astype(np.int16)
        hints = label != self.ignore
        image = np.concatenate([read(of_channel).voxels for of_channel in self.images]).astype(np.float32)
        # else the channel of the largest numbers would decide alone
        image /= np.maximum(image.std(tuple(range(1, image.ndim)), keepdims=True), 1e-8)
        spacing = picture.geometry.spacing[::-1]
        across = int(np.argmax(spacing)) if label.ndim == 3 else 0
        thick = label.ndim == 3 and spacing[across] >= THICK * max(np.delete(spacing, across))
        # the slices of the thickest axis come first
        label, hints, image = (np.moveaxis(array, across + array.ndim - label.ndim, array.ndim - label.ndim)
                               for array in (label, hints, image))
        patch_size = label.shape[1:] if thick else label.shape
        found = spread_volume(image, label, hints, np.ones(label.shape, bool), patch_size, MOST)
        label = np.moveaxis(np.where(found > 0, found - 1, label), 0, across)
        return Picture(label.astype(np.uint16 if label.max() > 255 else np.uint8)[None], picture.geometry)

    def count(self, file: Path) -> dict[str, int] | None:
        """Count the voxels that are annotated, filled and still ignored; None if no background is annotated."""
        before = read(file).voxels[0]
        if not (before == 0).any():
            return None
        missing, left = (int(np.count_nonzero(label == self.ignore)) for label in (before, self.fill(file).voxels))
        return {"annotated_voxels": before.size - missing, "filled_voxels": missing - left, "ignored_voxels": left}
