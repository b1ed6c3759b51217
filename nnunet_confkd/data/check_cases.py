"""Find the files of each case of a raw data set, and what is wrong with them.

This module does not import torch: `confkd check` imports it in every worker.
"""
from __future__ import annotations

import hashlib
import re
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnunet_confkd.data.check_report import Report
from nnunet_confkd.data.images import ITK, TIFF, Geometry, count_voxels, ending_of, read, spacing_file
from nnunet_confkd.data.raw_format import name_problem
from nnunet_confkd.data.scribbles import Shape, leaves_a_margin, shape_of
from nnunet_confkd.errors import InputError, counted, some

SLAB = 2 ** 20  # how many voxels are looked at at once
FEW_IGNORED = 0.1  # of the voxels; with fewer, scribbles have perhaps been taken for complete masks


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case.

    Attributes:
        images: One file for each channel, or files of several channels.
        numbers: The numbers of the channels in the names of the images.
        label: None if there is no label.
    """
    images: tuple[Path, ...]
    numbers: tuple[int, ...]
    label: Path | None


@dataclass
class CaseContent:
    """What the files of one case hold.

    Attributes:
        errors: What is wrong with the files.
        warnings: What is unusual in them.
        counts: {value: voxels} of the label; None if there is no label, or if it cannot be used.
        size: Voxels of the image.
        channels: The number of channels; None if an image cannot be read.
        digest: Of all the voxels, equal for equal images; None if the images are constant.
        shape: Of a label of which nearly all voxels are annotated, and whose classes border on its background. It may
            be scribbles all the same.
        grid: Of the first image that can be read.
    """
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[int, int] | None = None
    size: int = 0
    channels: int | None = 0
    digest: str | None = None
    shape: Shape | None = None
    grid: Geometry | None = None


# ---- finding --------------------------------------------------------------------------------------------------------

def training_files(folder: Path, described: dict, report: Report) -> dict[str, CaseFiles]:
    """Find the files of the training cases, as nnU-Net does, and report what is wrong.

    Args:
        folder: The raw folder.
        described: The content of dataset.json.
        report: It gets the errors.

    Returns:
        {case: its files}, sorted by name.
    """
    if "dataset" in described:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        listed = get_filenames_of_train_images_and_targets(str(folder), deepcopy(described))  # it changes its argument
        files = {case: CaseFiles(tuple(map(Path, entry["images"])), tuple(range(len(entry["images"]))),
                                 Path(entry["label"])) for case, entry in sorted(listed.items())}
    else:
        files = find_files(folder, "Tr", described["file_ending"], report)
        for case in [case for case, entry in files.items() if entry.label is None]:
            label = folder / "labelsTr" / f"{case}{described['file_ending']}"
            report.errors.append(f"{files[case].images[0]}: has no label {label}; an unlabelled case needs one that is "
                                 f"\"ignore\" everywhere")
    if not files:
        report.errors.append(f"{folder}: has no training case")
    return files


def find_files(folder: Path, split: str, ending: str, report: Report) -> dict[str, CaseFiles]:
    """Pair images and labels by nnU-Net's names: imagesTr/CASE_0000.nii.gz and labelsTr/CASE.nii.gz.

    Args:
        folder: The raw folder.
        split: "Tr", or "Ts", for which labels are optional.
        ending: The ending of all files.
        report: It gets the errors and warnings.

    Returns:
        {case: its files}, sorted by name.
    """
    images: dict[str, dict[int, Path]] = {}
    for file in _list_files(folder / f"images{split}", ending, report):
        stem = file.name[:-len(ending)]
        match = re.fullmatch(r"(.+)_(\d{4})", stem, re.DOTALL)
        if match is None:
            report.errors.append(f"{file}: has no number of a channel at the end of its name; rename it to "
                                 f"{stem}_0000{ending}")
        else:
            images.setdefault(match[1], {})[int(match[2])] = file
    labels = {}
    if split == "Tr" or (folder / f"labels{split}").is_dir():
        labels = {file.name[:-len(ending)]: file for file in _list_files(folder / f"labels{split}", ending, report)}
    report.errors += [f"{file}: is a label without an image; add images{split}/{case}_0000{ending}, or remove the label"
                      for case, file in labels.items() if case not in images]
    return {case: CaseFiles(tuple(channels[n] for n in sorted(channels)), tuple(sorted(channels)), labels.get(case))
            for case, channels in sorted(images.items())}


def _list_files(folder: Path, ending: str, report: Report) -> list[Path]:
    if not folder.is_dir():
        report.errors.append(f"{folder}: there is no such folder; make it, or list the files in dataset.json "
                             f"(\"dataset\")")
        return []
    files = sorted(file for file in folder.iterdir() if not file.is_dir())
    spacings = {spacing_file(file) for file in files if ending_of(file, TIFF)}
    ignored = [file.name for file in files if not file.name.endswith(ending) and not file.name.startswith(".")
               and file not in spacings]
    if ignored:
        report.warnings.append(f"{folder}: nnU-Net does not read files that do not end with {ending}: {some(ignored)}")
    return [file for file in files if file.name.endswith(ending)]


# ---- examining, in processes ----------------------------------------------------------------------------------------

def examine_case(files: CaseFiles, values: list[int], ignore: int | None) -> CaseContent:
    """Read the images and the label of a case.

    Args:
        files: The files of the case.
        values: All values that the label may hold.
        ignore: The value of "ignore"; None if the data set has no such label.
    """
    content = CaseContent()
    _examine_images(files, content)
    if files.label is not None:
        _examine_label(files, values, ignore, content)
    return content


def _examine_images(files: CaseFiles, content: CaseContent) -> None:
    constant = True
    digest = hashlib.sha256(usedforsecurity=False)  # the quickest where the processor has instructions for it
    for file in files.images:
        try:
            picture = read(file)
        except InputError as error:
            content.errors.append(str(error))
            content.channels = None
            continue
        voxels = picture.voxels
        if len(voxels) > 1 and ending_of(file, ITK):
            content.errors.append(f"{file}: holds {len(voxels)} channels. nnU-Net would train on it, and then could "
                                  f"not write predictions: split it into a file for each channel (CASE_0000, "
                                  f"CASE_0001, ...)")
        digest.update(f"{voxels.shape}".encode())
        bad, ranges = _scan(voxels, digest)
        if bad:
            content.errors.append(f"{file}: {counted(bad, 'voxel')} not finite (NaN, infinite, or beyond single "
                                  f"precision); replace by numbers")
        flat = [lowest for lowest, highest in ranges if lowest == highest]
        content.warnings += [f"{file}: is empty, {value:g} everywhere" for value in flat]
        constant &= len(flat) == len(voxels)
        content.grid = content.grid or picture.geometry
        content.errors += [f"{file}: is on another grid than {files.images[0]}: {difference}"
                           for difference in picture.geometry.differences(content.grid)]
        content.size = content.size or int(np.prod(voxels.shape[1:]))
        if content.channels is not None:
            content.channels += len(voxels)
        del picture, voxels  # before the next file is read
    if content.channels and not constant:
        content.digest = digest.hexdigest()


def _scan(voxels: np.ndarray, digest) -> tuple[int, list[tuple[float, float]]]:
    """Read voxels a part at a time, as nnU-Net's type, and add them to the digest.

    Returns:
        The number of voxels that are not finite, and the smallest and the largest value of each channel.
    """
    bad, ranges = 0, []
    for channel in voxels:
        rows = max(1, SLAB // int(np.prod(channel.shape[1:])))
        lowest, highest = np.inf, -np.inf
        for start in range(0, len(channel), rows):
            with np.errstate(over="ignore"):
                part = np.ascontiguousarray(channel[start:start + rows], dtype=np.float32)
            bad += part.size - int(np.count_nonzero(np.isfinite(part)))
            lowest, highest = float(np.minimum(lowest, part.min())), float(np.maximum(highest, part.max()))
            digest.update(part.data)
        ranges.append((lowest, highest))
    return bad, ranges


def _examine_label(files: CaseFiles, values: list[int], ignore: int | None, content: CaseContent) -> None:
    try:
        picture = read(files.label)
    except InputError as error:
        content.errors.append(str(error))
        return
    label, problems = picture.voxels[0], []
    content.size = content.size or label.size
    if len(picture.voxels) > 1:
        problems.append(f"{files.label}: holds {len(picture.voxels)} channels; a label has one")
    if content.grid is not None:
        problems += [f"{files.label}: is on another grid than {files.images[0]}: {difference}; bring it to the image's"
                     for difference in picture.geometry.differences(content.grid)]
    counts = count_voxels(label, values)
    if sum(counts.values()) != label.size:
        problems += _value_problems(files.label, label, values)
    content.errors += problems
    if not problems:
        content.counts = counts
        ignored = counts.get(ignore, 0)
        if not ignored:
            content.shape = shape_of(label, picture.geometry.spacing[::-1])
        elif ignored < FEW_IGNORED * label.size and not leaves_a_margin(label, ignore):
            content.shape = shape_of(np.where(label == ignore, 0, label), picture.geometry.spacing[::-1])


def _value_problems(file: Path, label: np.ndarray, values: list[int]) -> list[str]:
    found = np.unique(label)
    whole = np.isfinite(found) & (found == np.rint(found))
    strange = [int(value) for value in found[whole] if int(value) not in values]
    problems = []
    if not whole.all():
        problems.append(f"{file}: holds values that are no whole numbers: {some(found[~whole])}; was it resampled with "
                        f"interpolation? Make it anew")
    if strange:
        problems.append(f"{file}: holds the values {some(strange)}, which dataset.json does not list; correct the "
                        f"label, or add them there")
    return problems


def report_cases(files: dict[str, CaseFiles], contents: dict[str, CaseContent], report: Report) -> None:
    """Report what is wrong with the files of the cases, with their names and with the number of their channels."""
    wanted = len(report.channels)
    for case, content in contents.items():
        reason, entry = name_problem(case), files[case]
        if reason is not None:
            report.errors.append(f"{entry.images[0]}: the name of the case, {case!r}, {reason}; rename it")
        report.errors += content.errors
        report.warnings += content.warnings
        gaps = [n for n in range(max(entry.numbers) + 1) if n not in entry.numbers]
        if gaps or content.channels not in (None, wanted):
            report.errors.append(
                f"{entry.images[0]}: the case has {counted(content.channels or len(entry.images), 'channel')}, in "
                f"files numbered {some(entry.numbers)}; dataset.json names {wanted}, {', '.join(report.channels)}, "
                f"from 0 on: add what is missing, remove what is too much, or correct \"channel_names\"")
