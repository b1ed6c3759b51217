"""Weak labels made from full ones, for experiments: what would it have cost to annotate less?

Everything random is seeded per case, so the same case, style and seed give the same label whatever the order
or the number of processes.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_confkd.errors import InputError


def case_rng(case: str, style: str, seed: int) -> np.random.Generator:
    """The random generator of one case; it depends on nothing but the three arguments."""
    # not hash(): Python salts it anew in every process
    digest = hashlib.sha256(repr((str(case), str(style), int(seed))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def points(label: np.ndarray, ignore_label: int, rng: np.random.Generator, *, radius: int = 1, every: int = 1,
           slice_axis: int = 0) -> np.ndarray:
    """Per slice and class present, background included: one disc round a random voxel, clipped to the class.

    label: integers, (Z, Y, X), or (Y, X), which is one slice.
    radius: of the disc, in voxels of the slice's plane; 0 is a single voxel.
    every: annotate the slices 0, every, 2 * every, ... along `slice_axis`, which a 2-D label does not use.

    Returns the label's shape and dtype, `ignore_label` wherever nothing is annotated.
    Raises InputError where label is not 2-D or 3-D or already holds `ignore_label`, or a setting is out of
    range.
    """
    if label.ndim not in (2, 3):
        raise InputError(f"a label must be (Z, Y, X) or (Y, X), got shape {label.shape}")
    if radius < 0 or every < 1:
        raise InputError(f"radius must be at least 0 and every at least 1, got radius={radius}, "
                         f"every={every}")
    if (label == ignore_label).any():
        raise InputError(f"the label already holds the ignore label {ignore_label}: points are made from "
                         f"full labels")
    weak = nothing(label, ignore_label)
    # both are views: what is written to a slice of weak_slices lands in weak
    slices, weak_slices = (
        (label[None], weak[None]) if label.ndim == 2 else
        (np.moveaxis(label, slice_axis, 0), np.moveaxis(weak, slice_axis, 0)))
    for full_slice, weak_slice in zip(slices[::every], weak_slices[::every]):
        rows, columns = np.ogrid[:full_slice.shape[0], :full_slice.shape[1]]
        for value in np.unique(full_slice):
            of_class = full_slice == value
            row, column = rng.choice(np.argwhere(of_class))
            disc = (rows - row) ** 2 + (columns - column) ** 2 <= radius ** 2
            weak_slice[disc & of_class] = value
    return weak


def nothing(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """No voxel is annotated: the label of an unlabelled image, in the label's shape and dtype."""
    return np.full_like(label, ignore_label)


def weaken_dataset(source: Path, target: Path, *, full: Collection[str], unlabelled: Collection[str] = (),
                   keep: Collection[str] = (), seed: int = 0, radius: int = 1, every: int = 1,
                   slice_axis: int = 0) -> dict[str, str]:
    """Write a mixed copy of a fully labelled dataset in nnU-Net's raw format.

    source: a folder with `imagesTr`, `labelsTr` and `dataset.json`; `imagesTs` and `labelsTs` come along.
    target: the folder to write; it appears when all of it is written.
    full: the cases that keep their label, for training. keep: the same, for validation.
    unlabelled: the cases of which nothing stays annotated. All cases named nowhere are turned to `points`.
    radius, every, slice_axis: see `points`.

    Images are hard links, or copies where the file system has none; labels that stay are copied as they are.
    dataset.json gains the label "ignore", one above the highest, unless it has it already, and the table
    `"supervision"`: {case: "full" | "partial" | "unlabelled"}, which is also what this returns.

    Raises FileExistsError if target exists; InputError for case names that the source does not have or that
    are both labelled and unlabelled, for region-based labels, for a dataset.json that lists its files, and
    for a label file that holds anything but the integers named in dataset.json.
    """
    source, target = Path(source), Path(target)
    dataset = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    if "dataset" in dataset:
        # the list would go on pointing to the full labels of the source
        raise InputError(f"{source / 'dataset.json'} lists its files under \"dataset\"; only the folders "
                         f"imagesTr and labelsTr are supported")
    ending = dataset["file_ending"]
    cases = sorted(f.name[:-len(ending)] for f in (source / "labelsTr").iterdir() if f.name.endswith(ending))
    supervision = _supervision(cases, full=set(full) | set(keep), unlabelled=set(unlabelled))
    labels, ignore_label = _with_ignore(dataset["labels"])

    with new_folder(target) as folder:
        for subfolder in ("imagesTr", "labelsTr"):
            (folder / subfolder).mkdir()
        for case in cases:
            for channel in range(len(dataset["channel_names"])):
                name = f"{case}_{channel:04d}{ending}"
                _link_or_copy(source / "imagesTr" / name, folder / "imagesTr" / name)

            file, weak_file = (parent / "labelsTr" / f"{case}{ending}" for parent in (source, folder))
            image = sitk.ReadImage(str(file))
            label = _integers(image, set(labels.values()) - {ignore_label}, file)
            if supervision[case] == "full":
                shutil.copyfile(file, weak_file)
                continue
            # wide enough for the ignore label, whatever the type of the file was
            label = label.astype(np.uint8 if ignore_label < 256 else np.uint16)
            weak = nothing(label, ignore_label) if supervision[case] == "unlabelled" else points(
                label, ignore_label, case_rng(case, "points", seed), radius=radius, every=every,
                slice_axis=slice_axis)
            weak_image = sitk.GetImageFromArray(weak)
            weak_image.CopyInformation(image)
            sitk.WriteImage(weak_image, str(weak_file), True)

        for subfolder, carry in (("imagesTs", _link_or_copy), ("labelsTs", shutil.copyfile)):
            if (source / subfolder).is_dir():
                (folder / subfolder).mkdir()
                for file in (source / subfolder).glob(f"*{ending}"):
                    carry(file, folder / subfolder / file.name)
        dataset |= {"labels": labels, "numTraining": len(cases), "supervision": supervision}
        (folder / "dataset.json").write_text(json.dumps(dataset, indent=4) + "\n", encoding="utf-8")
    return supervision


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside target to write to; it becomes target at the end, or vanishes on an error.

    Raises FileExistsError if target exists.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it or choose another name")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def _supervision(cases: list[str], full: set[str], unlabelled: set[str]) -> dict[str, str]:
    unknown = sorted((full | unlabelled) - set(cases))
    if unknown:
        raise InputError(f"no such cases in labelsTr: {', '.join(unknown)}")
    both = sorted(full & unlabelled)
    if both:
        raise InputError(f"cases cannot be both labelled and unlabelled: {', '.join(both)}")
    return {case: "full" if case in full else "unlabelled" if case in unlabelled else "partial"
            for case in cases}


def _with_ignore(labels: dict[str, int]) -> tuple[dict[str, int], int]:
    """A copy of the labels of dataset.json with "ignore" among them, and its value."""
    regions = sorted(name for name, value in labels.items() if not isinstance(value, int))
    if regions:
        raise InputError(f"only labels that are plain integers are supported here, not regions: "
                         f"{', '.join(regions)}")
    ignore_label = labels.get("ignore", max(labels.values()) + 1)
    return {**labels, "ignore": ignore_label}, ignore_label


def _integers(image: sitk.Image, allowed: set[int], file: Path) -> np.ndarray:
    """The voxels of a label file; some files in the wild are float typed, with integral values."""
    label = sitk.GetArrayFromImage(image)
    values = np.unique(label)
    if not np.array_equal(values, np.rint(values)):
        raise InputError(f"{file} holds values that are no integers: {values[values != np.rint(values)][:5]}")
    unexpected = sorted({int(v) for v in values} - allowed)
    if unexpected:
        raise InputError(f"{file} holds the values {unexpected[:5]}; a full label has only {sorted(allowed)}")
    return label.astype(np.int64)


def _link_or_copy(file: Path, copy: Path) -> None:
    try:
        os.link(file.resolve(), copy)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, copy)
