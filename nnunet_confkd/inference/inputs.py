"""The images of a prediction, under the names that nnU-Net needs."""
from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunet_confkd.data.dicom import is_dicom_file, is_dicom_folder, read_series, series_folders
from nnunet_confkd.data.images import ITK, ending_of, parts, read, spacing_file, write
from nnunet_confkd.errors import InputError, counted, some
from nnunet_confkd.files import write_json
from nnunet_confkd.processes import PROCESSES, parallel

MANY = 20  # images, which several processes read


@contextmanager
def readable_images(source: Path, described: dict, option: str = "-i") -> Iterator[Path]:
    """Yield a folder whose images have the names that nnU-Net needs: CASE_0000, CASE_0001, ... for the channels.

    A folder with such names is yielded as it is. A file may also hold all channels, as a picture with colours does.
    A single image, or images without these numbers, are linked into a temporary folder. The predictions then have the
    names of the images. DICOM series are written there, in the file format of the model's data set; the predictions
    then have the names of their folders.

    Args:
        source: An image, a folder of images, a folder of one DICOM series, or a folder of such folders.
        described: The model's dataset.json.
        option: What the images are given with, for messages.

    Raises:
        InputError: There is no such file or folder, it has no images of the model's file ending and no DICOM series,
            or the names or the series cannot be understood.
    """
    ending = described["file_ending"]
    channels = _channel_names(described)
    if not source.exists():
        raise InputError(f"{option} {source}: there is no such file or folder")
    files = _images_of(source, ending)
    series = {} if files else _series(source, ending, channels, option)
    if series:
        with tempfile.TemporaryDirectory(prefix="confkd_images_") as folder:
            for case, inner in series.items():
                picture = read_series(inner)
                write(Path(folder) / f"{case}_0000{ending}", picture.voxels[0], picture.geometry)
            yield Path(folder)
        return
    inside = [source] if source.is_file() else sorted(source.iterdir())
    images = [file for file in inside if file.name.endswith(ending) and not file.is_dir()]
    if not files:
        raise InputError(f"{option} {source}: has no image that ends with {ending}, as the model's training images do, "
                         "and no DICOM series; it " + _endings(inside))
    _warn_of_others(inside, images, f"{option} {source}", ending)
    cases, plain = _cases_of(files, ending, len(channels))
    expected = ", ".join(f"CASE_{i:04d}{ending} ({name})" for i, name in enumerate(channels))
    if plain and (cases or not all(_are_complete([file], len(channels)) for file in plain)):
        mixed = f", but {next(iter(cases.values()))[0].name} has one" if cases else ""
        raise InputError(f"{option} {source}: {plain[0].name} does not end with the number of a channel{mixed}. Name "
                         f"the files of every case {expected}")
    incomplete = [case for case, of_case in cases.items() if not _are_complete(of_case, len(channels))]
    if incomplete:
        raise InputError(f"{option} {source}: {len(incomplete)} case(s) do not have all {len(channels)} channels: "
                         f"{some(incomplete, 5)}. Name the files of every case {expected}")
    # nnU-Net would take hidden files for images
    if source.is_dir() and not plain and images == files and not any(
            _is_4d(of_case, len(channels)) for of_case in cases.values()):
        yield source
        return
    cases |= {file.name[:-len(ending)]: [file] for file in plain}
    with tempfile.TemporaryDirectory(prefix="confkd_images_") as folder:
        for case, of_case in cases.items():
            _put(of_case, [Path(folder) / f"{case}_{number:04d}{ending}" for number in range(len(channels))])
        yield Path(folder)


def _put(files: list[Path], targets: list[Path]) -> None:
    """Link the files of a case to these names, one for each channel; divide a file that holds all channels."""
    if _is_4d(files, len(targets)):
        picture = read(files[0])
        for target, voxels in zip(targets, picture.voxels):
            write(target, voxels, picture.geometry)
    else:
        for file, target in zip(files, targets):
            _link(file, target)


def _is_4d(files: list[Path], channels: int) -> bool:
    """Whether the file of a case holds all channels, and nnU-Net could not write a segmentation of it."""
    return len(files) < channels and bool(ending_of(files[0], ITK))


def require_readable(images: Path, described: dict, part: slice = slice(None), done: Path | None = None) -> None:
    """Read all images of a prediction, so that broken ones are named before it begins.

    nnU-Net does not notice that a compressed file was cut short, and would segment what is left of it.

    Args:
        images: A folder that :func:`readable_images` has yielded.
        described: The model's dataset.json.
        part: Which of the cases, sorted, are to be predicted.
        done: A folder of predictions, whose cases are not predicted again.

    Raises:
        InputError: Some cannot be read, or the files of the channels hold several channels each. All are listed.
    """
    ending, tasks = described["file_ending"], []
    for case, first in sorted(cases_of(images, ending).items())[part]:
        names = (first.with_name(f"{case}_{number:04d}{ending}") for number in itertools.count())
        files = list(itertools.takewhile(Path.is_file, names))
        if done is None or not (done / f"{case}{ending}").is_file():
            tasks += [(file.resolve(), len(files)) for file in files]
    # other processes take a while to start
    problems = list(filter(None, parallel(_problem, tasks, PROCESSES if len(tasks) > MANY else 1, "reading images")))
    if problems:
        raise InputError(f"{len(problems)} images; nothing was predicted:\n  " + "\n  ".join(problems)
                         if len(problems) > 1 else problems[0])


def _problem(file: Path, channels: int) -> str | None:
    """Say what is wrong with one of the files of a case; None if nothing is."""
    try:
        count = len(read(file).voxels)
    except InputError as error:
        return str(error)
    if count > 1 and (channels > 1 or ending_of(file, ITK)):
        return f"{file}: holds {count} channels; a file of a numbered channel holds one"
    return None


def names_of(source: Path, described: dict) -> list[str]:
    """Return the names of the cases that :func:`readable_images` would yield, of images with right names.

    Args:
        source: As there.
        described: The model's dataset.json.
    """
    ending = described["file_ending"]
    files = _images_of(source, ending)
    if not files:
        return sorted(series_folders(source))
    cases, plain = _cases_of(files, ending, len(_channel_names(described)))
    return [*cases, *(file.name[:-len(ending)] for file in plain)]


def _warn_of_others(inside: list[Path], images: list[Path], where: str, ending: str) -> None:
    """Name the images of a folder that do not have the ending of the model's."""
    left_out = [file.name for file in inside if file not in images and not file.name.startswith(".")
                and (is_dicom_folder(file) if file.is_dir() else ending_of(file))]
    if left_out:
        print(f"WARNING: {where}: {counted(len(left_out), 'image')} left out, because the model's images end with "
              f"{ending}: {some(left_out)}. Convert them, or predict them from a folder of their own")


def _are_complete(files: list[Path], channels: int) -> bool:
    """Whether files have all channels. A picture with colours and a NIfTI file of four dimensions have several."""
    try:
        return len(files) == channels or sum(len(read(file).voxels) for file in files) == channels
    except InputError:
        return False


def cases_of(images: Path, ending: str) -> dict[str, Path]:
    """Return {case: the image of its first channel} of a folder that :func:`readable_images` has yielded."""
    found = ((re.fullmatch(r"(.+)_0000", file.name[:-len(ending)]), file) for file in sorted(images.iterdir())
             if file.name.endswith(ending) and not file.name.startswith("."))
    return {match[1]: file for match, file in found if match}


def require_other_files(source: Path, images: Path, output: Path, ending: str) -> None:
    """Raise InputError if a prediction would be written over an image that was given, or over a file beside it.

    Args:
        source: The image or the folder of images that was given.
        images: The folder that :func:`readable_images` has yielded for it.
        output: The folder of the predictions.
        ending: The file ending of images and predictions.
    """
    given = {file.resolve() for file in (source.parent if source.is_file() else source).iterdir()}
    lost = [target for case in cases_of(images, ending) if (target := output / f"{case}{ending}").resolve() in given]
    if lost:
        what = "a file beside the image" if source.is_file() and source.resolve() != lost[0].resolve() else (
            "the images themselves")
        raise InputError(f"-o {output}: the predictions would be written over {what}: {some(lost)}. "
                         f"Name another folder")


@dataclass(frozen=True)
class Predicted:
    """What `confkd predict` has predicted.

    Attributes:
        images: {case: the image of its first channel}.
        segmentations: {case: its segmentation}, of those that are there.
        output: The folder of the predictions.
        model: The folder of the model.
        described: Its dataset.json.
        entropy: Whether the entropy of these predictions was written. Maps in the folder may be of earlier ones.
    """
    images: dict[str, Path]
    segmentations: dict[str, Path]
    output: Path
    model: Path
    described: dict
    entropy: bool = False

    @classmethod
    def of(cls, images: Path, model: Path, output: Path, described: dict, entropy: bool = False,
           part: slice = slice(None)) -> Predicted:
        """Find the files of a prediction.

        Args:
            images: A folder of images with nnU-Net's names.
            model: The folder of the model.
            output: The folder of the predictions.
            described: The model's dataset.json.
            entropy: Whether their entropy was written.
            part: Which of the cases, sorted, were predicted. Others may be written by other processes.
        """
        cases = dict(sorted(cases_of(images, described["file_ending"]).items())[part])
        files = {case: output / f"{case}{described['file_ending']}" for case in cases}
        return cls(cases, {case: file for case, file in files.items() if file.is_file()}, output, model, described,
                   entropy)

    def warning_of_empty(self) -> str | None:
        """Name the predicted segmentations without any foreground; None if there are none."""
        empty = [case for case, file in self.segmentations.items() if not read(file).voxels.any()]
        if not empty:
            return None
        return (f"WARNING: {len(empty)} of {len(self.segmentations)} predicted segmentations have no foreground: "
                f"{some(empty)}. Was the model trained long enough, and are these images like those of its training?")


def _images_of(source: Path, ending: str) -> list[Path]:
    """Return an image that was given, or those of a folder that are not hidden; none if the ending is another one."""
    files = [source] if source.is_file() else sorted(source.iterdir())
    return [file for file in files if file.name.endswith(ending) and file.name[0] != "." and not file.is_dir()]


def _channel_names(described: dict) -> list[str]:
    return list(described.get("channel_names", described.get("modality", {"0": "image"})).values())


def _series(source: Path, ending: str, channels: list[str], option: str) -> dict[str, Path]:
    """Find DICOM series; {} if there are none."""
    if source.is_file():
        if is_dicom_file(source):
            raise InputError(f"{option} {source}: is one file of DICOM; give the folder of its series: "
                             f"{option} {source.parent}")
        return {}
    series = series_folders(source)
    if series and len(channels) > 1:
        raise InputError(f"{option} {source}: holds DICOM series, and the model needs {len(channels)} channels, "
                         f"{', '.join(channels)}, of which a series is one. Convert them to CASE_0000{ending}, "
                         f"CASE_0001{ending} and so on, on one grid")
    if series and not ending.lower().endswith(ITK):
        raise InputError(f"{option} {source}: holds DICOM series, and the model's images end with {ending}, which does "
                         f"not keep where the voxels lie; convert them to {ending} yourself")
    left_out = [folder.name for folder in sorted(source.iterdir()) if folder.is_dir() and folder.name[0] != "."
                and not any(inner.is_relative_to(folder) for inner in series.values())]
    if series and left_out and source not in series.values():
        print(f"WARNING: {option} {source}: {counted(len(left_out), 'folder')} left out, because no file in "
              f"{'them' if len(left_out) > 1 else 'it'} is an image in DICOM: {some(left_out)}")
    return series


def _endings(files: list[Path]) -> str:
    """Say which file endings there are, for a message."""
    found = sorted({"".join(file.suffixes[-2:] if file.suffix == ".gz" else file.suffixes[-1:]) or file.name
                    for file in files if file.is_file()})
    return f"has {', '.join(found[:5])}" if found else "holds folders only" if files else "is empty"


def _cases_of(files: list[Path], ending: str, channels: int) -> tuple[dict[str, list[Path]], list[Path]]:
    """Group the files that end with the number of a channel by case; also return the files that have no number."""
    cases: dict[str, list[Path]] = {}
    plain = []
    for file in files:
        match = re.fullmatch(r"(.+)_(\d{4})", file.name[:-len(ending)])
        if match and int(match[2]) < channels:
            cases.setdefault(match[1], []).append(file)
        else:
            plain.append(file)
    return cases, plain


def _link(file: Path, target: Path) -> None:
    """Link an image and the files that belong to it: the voxels of a NRRD, the spacing of a TIFF.

    The files are copied where links are not permitted, as on Windows.
    """
    for part in parts(file):
        to = target if part == file else spacing_file(target) if part.suffix == ".json" else target.with_name(part.name)
        if to.exists():
            continue  # all channels share one file with the spacing
        try:
            to.symlink_to(part.resolve())
        except OSError:
            shutil.copyfile(part, to)


def name_source(output: Path, source: Path) -> None:
    """Let nnU-Net's record of a prediction name the images that were given, not the temporary folder.

    Args:
        output: The folder of the predictions.
        source: The image or the folder of images that was given.
    """
    file = output / "predict_from_raw_data_args.json"
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        record["list_of_lists_or_source_folder"] = str(source)
        write_json(file, record)
