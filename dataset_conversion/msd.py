"""Medical Segmentation Decathlon, any task: imagesTr, labelsTr, imagesTs, dataset.json; channels in one 4-D file.

Antonelli et al., Nature Communications 2022, doi 10.1038/s41467-022-30695-9. nnU-Net's own convert_msd_dataset is not
called: it needs imagesTs and checks nothing, and if it is interrupted it leaves half a data set. On a proper task both
write the same images and labels.
"""
from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from nnunet_confkd.dataset_conversion.common import find_files

from nnunet_confkd.data.images import Volume, read
from nnunet_confkd.data.raw_format import Case, Dataset, write_dataset
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import PROCESSES

DESCRIPTION = "Medical Segmentation Decathlon, any task (imagesTr, labelsTr, dataset.json)"
ENDING = ".nii.gz"
FILES = r"[^._].*\.nii\.gz"
REFERENCE = "Antonelli et al., Nature Communications 2022, doi 10.1038/s41467-022-30695-9"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this converter."""
    parser.add_argument("--labels", nargs="+", metavar="NAME",
                        help="names of the values 0, 1, ..., if there is no dataset.json")
    parser.add_argument("--channels", nargs="+", metavar="NAME", help="names of the channels, if there is no "
                        "dataset.json; \"CT\" chooses nnU-Net's CT normalisation")


def convert(source: Path, dataset_id: int, *, labels: list[str] | None = None, channels: list[str] | None = None,
            name: str | None = None, processes: int = PROCESSES, link: bool = False) -> Path:
    """Write a task as a fully annotated data set of nnU-Net.

    Args:
        source: The folder of the task.
        dataset_id: The 4 in Dataset004_NAME.
        labels: Names of the values 0, 1, ..., if the task has no dataset.json.
        channels: Names of the channels, if the task has no dataset.json.
        name: The NAME in Dataset004_NAME; default: the task's, without its number.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the data.
    """
    return write_dataset(task(source, labels, channels, name), dataset_id, processes, link)


def task(source: Path, labels: list[str] | None = None, channels: list[str] | None = None,
         name: str | None = None) -> Dataset:
    """Return what :func:`convert` writes, with the same arguments."""
    source = Path(source)
    missing = [sub for sub in ("imagesTr", "labelsTr") if not (source / sub).is_dir()]
    if missing:
        raise InputError(f"{source}: has no folder {' and no folder '.join(missing)}; give the folder of one task, "
                         f"e.g. Task04_Hippocampus")
    described = _described(source, labels, channels)
    problems: list[str] = []
    channel_names = [described["modality"][key] for key in sorted(described["modality"], key=int)]
    training = [Case(_name(image), _channels(image, channel_names), Volume(label))
                for image, label in _pairs(source, described, problems)]
    test = [Case(_name(image), _channels(image, channel_names)) for image in find_files(source / "imagesTs", FILES)]
    if not training and not problems:
        raise InputError(f"{source / 'imagesTr'}: holds no images ({ENDING})")
    return Dataset(
        name=name or _task_name(source, described), channel_names=channel_names, labels=described["labels"],
        file_ending=ENDING, training=training, test=test, roots=(source,), problems=problems,
        licence=described.get("licence", "CC BY-SA 4.0"), reference=described.get("reference") or REFERENCE)


def _described(source: Path, labels: list[str] | None, channels: list[str] | None) -> dict:
    """Return dataset.json, or what the options say, with labels as {name: value}."""
    file = source / "dataset.json"
    where = str(file)  # for messages
    if not file.is_file():
        if labels is None or channels is None:
            raise InputError(f"{file}: is missing; name the labels and the channels: --labels background NAME ... "
                             f"--channels MRI")
        described = {"labels": dict(enumerate(labels)), "modality": dict(enumerate(channels))}
        where = "--labels"
    elif labels is not None or channels is not None:
        raise InputError(f"{file}: names the labels and the channels; leave out --labels and --channels, or correct "
                         f"the file")
    else:
        described = _read_json(file)
    try:
        named = {str(label): int(value) for value, label in described["labels"].items()}
        modality = {str(int(key)): str(channel) for key, channel in described["modality"].items()}
        list(described.get("training", []))  # raises, too
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{where}: is no description of a task: \"labels\" and \"modality\" must be objects like "
                         f'{{"0": "background", "1": "liver"}}, "training" a list ({type(error).__name__}: '
                         f"{error})") from error
    values = list(range(len(described["labels"])))
    if sorted(named.values()) != values or len(named) < 2 or named.get("background") != 0:
        raise InputError(f"{where}: the labels must be 0, 1, 2, ..., each with a name of its own, \"background\" the "
                         f"first, not {described['labels']}")
    if sorted(map(int, modality)) != list(range(len(described["modality"]))) or not modality:
        raise InputError(f"{where}: the modalities must be numbered 0, 1, ..., not {described['modality']}")
    return {**described, "labels": named, "modality": modality}


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: is no JSON file; fetch it anew ({error})") from error


def _pairs(source: Path, described: dict, problems: list[str]) -> list[tuple[Path, Path]]:
    """Return (image, label) of every training case that dataset.json lists; without a list, of those in the folders."""
    images = {_name(file): file for file in find_files(source / "imagesTr", FILES)}
    labels = {_name(file): file for file in find_files(source / "labelsTr", FILES)}
    if "training" not in described:
        problems += [f"{images[name]}: has no label in labelsTr" for name in sorted(set(images) - set(labels))]
        problems += [f"{labels[name]}: has no image in imagesTr" for name in sorted(set(labels) - set(images))]
        return [(images[name], labels[name]) for name in sorted(set(images) & set(labels))]
    pairs, listed = [], set()
    for entry in described["training"]:
        try:
            image, label = source / entry["image"], source / entry["label"]
            outside = [path for path in (image, label) if not path.resolve().is_relative_to(source.resolve())]
        except (TypeError, KeyError, ValueError):  # no object, or not of text, or no path
            problems.append(f"{source / 'dataset.json'}: the entry {entry!r} of \"training\" has no image and label")
            continue
        absent = [path for path in (image, label) if path not in outside and not path.is_file()]
        problems += [f"{source / 'dataset.json'}: lists {path}, which lies outside of the folder" for path in outside]
        problems += [f"{path}: is listed in dataset.json, but is missing" for path in absent]
        listed |= {image.resolve(), label.resolve()}
        if not outside and not absent:
            pairs.append((image, label))
    problems += [f"{file}: is not listed in dataset.json" for file in sorted([*images.values(), *labels.values()])
                 if file.resolve() not in listed]
    return pairs


def _name(file: Path) -> str:
    return file.name.removesuffix(ENDING)


def _channels(image: Path, names: list[str]) -> tuple[Volume, ...]:
    # one volume for the whole file, not for each channel: otherwise a channel too many would go unnoticed
    return (Volume(image) if len(names) == 1 else Volume(image, reader=read),)


def _task_name(source: Path, described: dict) -> str:
    published = re.fullmatch(r"Task\d+_(.+)", source.resolve().name)
    name = published[1] if published else str(described.get("name", source.resolve().name))
    return re.sub(r"[^A-Za-z0-9_-]", "", name) or "MSD"
