"""BraTS 2015 to 2023: brain tumours in MRI of two to four channels, as nnU-Net's overlapping regions.

Menze et al., IEEE TMI 2015, doi 10.1109/TMI.2014.2377694; Baid et al., arXiv 2107.02314. Conventions of the label
values:

- 2015: 1 necrosis, 2 oedema, 3 non-enhancing core, 4 enhancing tumour (files Flair_..., T1c_..., OTMultiClass; NIfTI);
- 2017 to 2021: 1 necrosis and non-enhancing core, 2 oedema, 4 enhancing tumour (files CASE_flair, ..., CASE_seg);
- 2023: as 2017, with 3 for the enhancing tumour (files CASE-t2f, ..., CASE-seg).

The values that are written are 1 oedema, 2 necrosis (and non-enhancing core), then the rest of the core. The enhancing
tumour has the last one.
"""
from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nnunet_confkd.dataset_conversion.common import NIFTI, find_files, require_folder

from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "BraTS 2015-2023, brain tumours (one folder a case, two to four channels), as regions"


@dataclass(frozen=True)
class Convention:
    """How the files of some years are named, and what their labels mean.

    Attributes:
        channels: {name: regular expression of the end of a file's name}, in nnU-Net's order.
        seg: The same for the label.
        values: {value in the file: value to write}.
        regions: dataset.json's labels, of the values that are written.
        order: nnU-Net's order of the regions.
        patients: The pattern of the patient, if some were scanned several times.
    """
    channels: dict[str, str]
    seg: str
    values: dict[int, int]
    regions: dict[str, int | list[int]]
    order: list[int]
    patients: str | None = None


def _regions(core: list[int], enhancing: int) -> dict[str, int | list[int]]:
    return {"background": 0, "whole_tumour": [1, *core, enhancing], "tumour_core": [*core, enhancing],
            "enhancing_tumour": [enhancing]}


CONVENTIONS = {
    "2015": Convention({"T1": r"^T1(_.*)?", "T1c": r"^T1c(_.*)?", "T2": r"^T2(_.*)?", "FLAIR": r"^Flair(_.*)?"},
                       r"^OTMultiClass", {0: 0, 2: 1, 1: 2, 3: 3, 4: 4}, _regions([2, 3], 4), [1, 2, 4],
                       r"(brats_.+_pat\d+(?=_\d+$)|.+)"),
    # BraTS20_Training_355 was published with its label as W39_1998.09.19_Segm
    "2017": Convention({"T1": r"_t1", "T1c": r"_t1ce", "T2": r"_t2", "FLAIR": r"_flair"}, r"_(seg|Segm)",
                       {0: 0, 2: 1, 1: 2, 4: 3}, _regions([2], 3), [1, 2, 3]),
    "2023": Convention({"T1": r"-t1n", "T1c": r"-t1c", "T2": r"-t2w", "FLAIR": r"-t2f"}, r"-seg",
                       {0: 0, 2: 1, 1: 2, 3: 3}, _regions([2], 3), [1, 2, 3], r"(BraTS-.+-\d+(?=-\d+$)|.+)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--convention", choices=sorted(CONVENTIONS), help="of label values and file names (2017: to "
                        "2021); default: the one that fits the file names")
    parser.add_argument("--test", type=Path, metavar="DIR", help="cases for imagesTs, with labels or without")


def convert(source: Path, dataset_id: int, *, convention: str | None = None, test: Path | None = None,
            name: str = "BraTS", processes: int = PROCESSES, link: bool = False) -> Path:
    """Write BraTS as a fully annotated data set of nnU-Net with regions.

    Args:
        source: The folder of the folders of cases, or of folders such as HGG and LGG that hold them.
        dataset_id: The 21 in Dataset021_NAME.
        convention: One of `CONVENTIONS`; None: the one that fits the file names.
        test: As `source`, for test cases, whose labels may be missing.
        name: The NAME in Dataset021_NAME.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the data.
    """
    source, test = require_folder(source), None if test is None else require_folder(test)
    convention = convention or _find_convention(source)
    rules = CONVENTIONS[convention]
    problems: list[str] = []
    training = _cases(source, rules, problems, labelled=True)
    tests = _cases(test, rules, problems, labelled=False) if test is not None else []
    channels = [channel for channel in rules.channels if any(channel in found for _, found, _ in training)]
    if training and len(channels) < 2:
        problems.append(f"{source}: two to four channels are expected; found: {', '.join(channels) or 'none'}")

    def complete(entries: list[tuple[Path, dict[str, Path], Path | None]]) -> Iterator[Case]:
        for folder, found, seg in entries:
            absent = [channel for channel in channels if channel not in found]
            if absent:
                problems.append(f"{folder}: has no {', '.join(absent)}, which other cases have")
            elif channels:
                yield Case(folder.name, tuple(Volume(found[channel]) for channel in channels),
                           Volume(seg) if seg else None, values=rules.values)

    cases, test_cases = list(complete(training)), list(complete(tests))
    return write_dataset(Dataset(
        name=name, channel_names=channels, labels=rules.regions, regions_class_order=rules.order, file_ending=".nii.gz",
        training=cases, test=test_cases, patient_pattern=rules.patients,
        licence="CC BY-NC-SA 3.0" if convention == "2015" else "see the publisher's terms (synapse.org)",
        reference="Menze et al., IEEE TMI 2015, doi 10.1109/TMI.2014.2377694; Baid et al., arXiv 2107.02314",
        roots=(source,) if test is None else (source, test), problems=problems, more={"convention": convention},
    ), dataset_id, processes, link)


def _find_convention(source: Path) -> str:
    """Return the convention that fits the names of the labels."""
    names = [_stem(file) for file in find_files(source, NIFTI, (2, 3))]
    fitting = [key for key, rules in CONVENTIONS.items() if any(re.search(f"{rules.seg}$", name) for name in names)]
    if len(fitting) != 1:
        raise InputError(f"{source}: holds " + (f"labels named as in {' and '.join(fitting)}; give one --convention"
                         if fitting else "no labels (OTMultiClass, CASE_seg or CASE-seg, .nii.gz) in folders of cases"))
    return fitting[0]


def _cases(source: Path, rules: Convention, problems: list[str],
           labelled: bool) -> list[tuple[Path, dict[str, Path], Path | None]]:
    """Return folder, {channel: file} and label of every case."""
    cases = []
    folders = sorted({file.parent for file in find_files(source, NIFTI, (2, 3))})
    if not folders:
        problems.append(f"{source}: holds no folders of cases, with images (.nii.gz)")
    for folder in folders:
        files = find_files(folder, NIFTI)
        found = {channel: [f for f in files if re.search(f"{end}$", _stem(f))]
                 for channel, end in rules.channels.items()}
        segs = [f for f in files if re.search(f"{rules.seg}$", _stem(f))]
        problems += [f"{folder}: has {len(fs)} files for {channel}: {', '.join(f.name for f in fs)}"
                     for channel, fs in (*found.items(), ("the label", segs)) if len(fs) > 1]
        if labelled and not segs:
            problems.append(f"{folder}: has no label; give the folder of unlabelled cases as --test")
            continue
        cases.append((folder, {channel: fs[0] for channel, fs in found.items() if fs}, segs[0] if segs else None))
    return cases


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")
