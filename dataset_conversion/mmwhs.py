"""MM-WHS 2017: the whole heart in CT and MRI, seven structures.

Zhuang and Shen, Medical Image Analysis 2016, doi 10.1016/j.media.2016.02.006; Zhuang et al., Medical Image Analysis
2019, doi 10.1016/j.media.2019.101537. Stray values such as 421 are reported in published MR labels. They are an error
unless they are mapped.
"""
from __future__ import annotations

import argparse
import re
from pathlib import Path

from nnunet_confkd.dataset_conversion.common import find_files, require_folder

from nnunet_confkd.data.images import Volume
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "MM-WHS, whole heart in CT or MRI (ct_train_10NN_image.nii.gz, ct_train_10NN_label.nii.gz, mr_train_...)"
LABELS = {"background": 0, "left_ventricle": 1, "right_ventricle": 2, "left_atrium": 3, "right_atrium": 4,
          "myocardium": 5, "aorta": 6, "pulmonary_artery": 7}
VALUES = {0: 0, 500: 1, 600: 2, 420: 3, 550: 4, 205: 5, 820: 6, 850: 7}  # {published value: value to write}
CHANNELS = {"ct": "CT", "mr": "MRI"}


def _mapping(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)=(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: give it as STRAY=PUBLISHED, e.g. 421=420")
    return int(match[1]), int(match[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--modality", choices=sorted(CHANNELS), help="needed if the folder holds both")
    parser.add_argument("--map", type=_mapping, action="append", dest="mapped", metavar="STRAY=PUBLISHED",
                        help="take a stray label value for a published one, e.g. 421=420, or 421=0 (may be repeated)")


def convert(source: Path, dataset_id: int, *, modality: str | None = None, mapped: list[tuple[int, int]] | None = None,
            name: str | None = None, processes: int = PROCESSES, link: bool = False) -> Path:
    """Write the CT or the MR part as a fully annotated data set of nnU-Net.

    Args:
        source: The folder of the images and labels, or of folders such as ct_train that hold them.
        dataset_id: The 17 in Dataset017_NAME.
        modality: "ct" or "mr"; None if the folder holds one of them.
        mapped: (stray value, published value) of labels.
        name: The NAME in Dataset017_NAME; default: MMWHSCT or MMWHSMR.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the data, stray label values included.
    """
    source = require_folder(source)
    files = find_files(source, r"(ct|mr)_(train|test)_\d+_(image|label)\.nii\.gz", (1, 2))
    modality = _find_modality(source, files, modality)
    values, problems = _label_values(mapped or []), []
    cases: dict[str, dict[str, Path]] = {}
    for file in (file for file in files if file.name.startswith(modality)):
        stem, part = file.name.removesuffix(".nii.gz").rsplit("_", 1)
        if part in cases.setdefault(stem, {}):
            problems.append(f"{file}: is there twice, also as {cases[stem][part]}")
        cases[stem][part] = file
    for parts in cases.values():
        for part, other in (("image", "label"), ("label", "image")):
            if part in parts and other not in parts and not (part == "image" and "_test_" in parts[part].name):
                problems.append(f"{parts[part]}: has no {other}")
    training = [Case(stem, (Volume(parts["image"]),), Volume(parts["label"]), values=values)
                for stem, parts in cases.items() if "_train_" in stem and len(parts) == 2]
    test = [Case(stem, (Volume(parts["image"]),), Volume(parts["label"]) if "label" in parts else None, values=values)
            for stem, parts in cases.items() if "_test_" in stem and "image" in parts]
    if not training and not problems:
        raise InputError(f"{source}: holds no training case ({modality}_train_10NN_image.nii.gz)")
    return write_dataset(Dataset(
        name=name or f"MMWHS{modality.upper()}", channel_names=[CHANNELS[modality]], labels=LABELS,
        file_ending=".nii.gz", training=training, test=test,
        licence="see the publisher's terms (MM-WHS 2017 challenge)",
        reference="Zhuang and Shen, Medical Image Analysis 2016, doi 10.1016/j.media.2016.02.006", roots=(source,),
        problems=problems), dataset_id, processes, link)


def _find_modality(source: Path, files: list[Path], wanted: str | None) -> str:
    found = sorted({file.name[:2] for file in files})
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted not in found:
        raise InputError(f"{source}: holds " + (f"both {' and '.join(found)}; choose one "
                                                f"--modality" if len(found) > 1 else
                                                f"no files {wanted or 'ct'}_train_10NN_image.nii.gz"))
    return wanted


def _label_values(mapped: list[tuple[int, int]]) -> dict[int, int]:
    """Return {value in the files: value to write}, with the stray values that are mapped to published ones."""
    values = dict(VALUES)
    for stray, published in mapped:
        if published not in VALUES:
            raise InputError(f"--map {stray}={published}: {published} is none of the published values {sorted(VALUES)}")
        if stray in VALUES:
            raise InputError(f"--map {stray}={published}: {stray} is a published value itself; map stray ones only")
        values[stray] = VALUES[published]
    return values
