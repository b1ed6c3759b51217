"""One image file at a time: read it with its geometry, compare, carry it over, write it and see that it was written."""
from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_confkd.errors import InputError

NIFTI = (".nii.gz", ".nii")
ITK = (*NIFTI, ".nrrd", ".mha", ".gipl")  # of nnU-Net's formats, those that carry spacing, origin and direction
TIFF = (".tif", ".tiff")
ENDINGS = (*ITK, *TIFF, ".png", ".bmp")  # all that nnU-Net reads
META = (".mha", ".mhd")
# NIfTI stores single precision, annotation tools round: closer than this is the same grid
SPACING_TOLERANCE, DIRECTION_TOLERANCE = 1e-3, 1e-3  # relative; cosines
ORIGIN_TOLERANCE = 0.1  # of the voxel's edge


@dataclass(frozen=True)
class Geometry:
    """Where the voxels lie, as ITK tells it: in x, y, z; spacing and origin in mm, direction as rows of cosines."""
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image | sitk.ImageFileReader) -> Geometry:
        """The first three axes of an image, or of a file whose header has been read."""
        n = min(len(image.GetSize()), 3)
        direction = np.reshape(image.GetDirection(), (len(image.GetSize()),) * 2)[:n, :n]
        return cls(tuple(image.GetSize()[:n]), tuple(image.GetSpacing()[:n]), tuple(image.GetOrigin()[:n]),
                   tuple(direction.ravel().tolist()))

    @classmethod
    def plain(cls, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Geometry:
        """Of an array (Z, Y, X) of which the spacing alone is known, in mm and in that order."""
        n = len(shape)
        return cls(tuple(shape[::-1]), tuple(float(s) for s in spacing[::-1]), (0.0,) * n, tuple(np.eye(n).ravel().tolist()))

    def differences(self, other: Geometry) -> list[str]:
        """In words, what differs by more than the tolerances; empty for the same grid."""
        if self.size != other.size:
            return [f"size {self.size} and {other.size}"]
        axes = np.reshape(self.direction, (len(self.size),) * 2)  # a column an axis of the voxels
        shift = axes.T @ np.subtract(other.origin, self.origin)
        apart = {"spacing": not np.allclose(self.spacing, other.spacing, rtol=SPACING_TOLERANCE, atol=0),
                 "origin": bool((np.abs(shift) > ORIGIN_TOLERANCE * np.asarray(self.spacing)).any()),
                 "direction": not np.allclose(self.direction, other.direction, rtol=0, atol=DIRECTION_TOLERANCE)}
        return [f"{name} {_rounded(getattr(self, name))} and {_rounded(getattr(other, name))}"
                for name, differs in apart.items() if differs]

    def equals_for_nnunet(self, other: Geometry) -> bool:
        """Whether nnU-Net's verify_dataset_integrity is silent on the two."""
        return self.size == other.size and all(np.allclose(getattr(self, name), getattr(other, name))
                                               for name in ("spacing", "origin", "direction"))


@dataclass(frozen=True)
class Picture:
    """voxels: (channels, Z, Y, X), or (channels, Y, X)."""
    voxels: np.ndarray
    geometry: Geometry

    def channel(self, number: int) -> Picture:
        return replace(self, voxels=self.voxels[number:number + 1])


@dataclass(frozen=True)
class Volume:
    """What is to become one image file: a file, one channel of a 4-D file, or whatever `reader` makes of a file.

    reader: file -> Picture, for formats that nnU-Net does not read, or to change what was read. It must pickle.
    """
    file: Path
    channel: int | None = None
    reader: Callable[[Path], Picture] | None = None

    def read(self) -> Picture:
        picture = (self.reader or read)(self.file)
        return picture if self.channel is None else picture.channel(self.channel)


def ending_of(name: str | Path, endings: tuple[str, ...] = ENDINGS) -> str | None:
    """The ending of a file name, as it is written there; None if it is no image's."""
    name = str(name)
    return next((name[len(name) - len(e):] for e in endings if name.lower().endswith(e)), None)


# ---- reading --------------------------------------------------------------------------------------------------------

def read(file: Path) -> Picture:
    """An image or label of any format that nnU-Net reads, or .mhd, as nnU-Net sees it; 4-D: the last axis is channels.

    Raises InputError, naming the file, where it is missing, no image, cut short or damaged, or a header that names voxels in
    another folder.
    """
    file = Path(file)
    ending = (ending_of(file) or file.suffix).lower()
    try:
        if not file.is_file():
            raise InputError(f"{file}: there is no such file")
        if not _is_text(str(file)):  # SimpleITK ends the whole program
            raise InputError(f"{str(file)!a}: the name is no proper text (UTF-8); rename the file or its folder")
        if ending in NIFTI:
            return _read_nifti(file)
        return _read_itk(file) if ending in ITK or ending in META else _read_with_nnunet(file)
    except InputError:
        raise
    except Exception as error:  # each library has its own; to the user they all say the same
        # not the lines in which ITK tells where in its source it noticed
        reason = [line.strip() for line in str(error).splitlines() if not re.search(r"\.cxx:\d+|^\s*$", line)]
        raise InputError(f"{file}: cannot be read as an image; is it cut short, damaged, or of another format? Fetch or "
                         f"write it anew ({' '.join(reason) or type(error).__name__})") from error


def count_voxels(label: np.ndarray, values: Iterable[int]) -> dict[int, int]:
    """Count the voxels of each value in one pass, however many values there are.

    Args:
        label: A label map of any shape and of any type of numbers.
        values: Whole numbers, negative ones too.

    Returns:
        {value: voxels}. Voxels that hold any other number are not counted.
    """
    values = [int(value) for value in values]
    if not values:
        return {}
    lowest, highest = min(values), max(values)
    if highest - lowest >= 2 ** 20:  # a histogram of so many bins would cost more than a pass for each value
        return {value: int(np.count_nonzero(label == value)) for value in values}
    counts, flat = np.zeros(highest - lowest + 1, np.int64), np.asarray(label).reshape(-1)
    for start in range(0, flat.size, 2 ** 20):  # a part at a time: np.bincount makes 8 bytes of every voxel
        part = flat[start:start + 2 ** 20]
        inside = part[(part >= lowest) & (part <= highest)]
        whole = inside.astype(np.int64)
        counts += np.bincount(whole[whole == inside] - lowest, minlength=len(counts))
    return {value: int(counts[value - lowest]) for value in values}


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _read_itk(file: Path) -> Picture:
    _check_stream(file)
    with quiet():
        reader = _header(file)
        voxels = sitk.GetArrayFromImage(reader.Execute())
    if ending_of(file, (".gipl",)) and file.stat().st_size < 256 + voxels.nbytes:  # the header's; ITK does not notice
        raise ValueError("shorter than its header says")
    return _picture(voxels, Geometry.of(reader))


def _header(file: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise InputError(f"{file}: holds {reader.GetNumberOfComponents()} values a voxel (colours?); nnU-Net needs a file a "
                         f"channel")
    if reader.GetDimension() not in (2, 3, 4):
        raise InputError(f"{file}: is {reader.GetDimension()}-dimensional; images have 2 or 3 dimensions, or 4 with the "
                         f"channels last")
    return reader


def _picture(voxels: np.ndarray, geometry: Geometry) -> Picture:
    return Picture(voxels.reshape(-1, *geometry.size[::-1]), geometry)


def _read_nifti(file: Path) -> Picture:
    """Not the voxels by ITK: it takes a gzip stream that was cut short for a whole one, and NaN for 0."""
    import nibabel

    content = file.read_bytes()
    if file.name.lower().endswith(".gz"):
        content = gzip.decompress(content)  # checks the sum at the end
    second = _is_nifti2(content)
    image = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_bytes(content)
    if second:
        geometry = _geometry_of_nifti2(image)
    else:
        with quiet():
            geometry = Geometry.of(_header(file))
    voxels = np.asanyarray(image.dataobj).T
    if voxels.dtype.kind not in "iuf":
        raise InputError(f"{file}: holds {voxels.dtype} (colours?); nnU-Net needs a file a channel")
    if voxels.dtype != image.get_data_dtype() and voxels.dtype.kind == "f":  # scaled: as ITK, and so nnU-Net, does it
        voxels = voxels.astype(np.float32)
    return _picture(voxels.astype(voxels.dtype.newbyteorder("="), copy=False), geometry)


def _is_nifti2(start: bytes) -> bool:
    return 540 in (int.from_bytes(start[:4], order) for order in ("little", "big"))


def _geometry_of_nifti2(image) -> Geometry:
    """ITK does not read NIfTI-2. The affine's axes point right, front, up; those of ITK left, back, up."""
    n = min(len(image.shape), 3)
    affine = np.diag((-1, -1, 1, 1)) @ image.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = (affine[:3, :3] / spacing)[:n, :n]
    return Geometry(tuple(image.shape[:n]), tuple(spacing[:n].tolist()), tuple(affine[:n, 3].tolist()),
                    tuple(direction.ravel().tolist()))


def _read_with_nnunet(file: Path) -> Picture:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    complaints: list[str] = []  # tifffile logs that pages are missing, and returns the others

    def keep(record: logging.LogRecord) -> None:
        complaints.append(record.getMessage())

    logging.getLogger("tifffile").addFilter(keep)
    # it prints the class that it takes, and the tracebacks of those that failed
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            reader = determine_reader_writer_from_file_ending(file.suffix, str(file))
            voxels, properties = reader().read_images([str(file)])
        except RuntimeError:
            raise ValueError("none of nnU-Net's readers takes it") from None
        finally:
            logging.getLogger("tifffile").removeFilter(keep)
    if any("page offset" in complaint for complaint in complaints):
        raise ValueError("pages are missing")
    spacing = properties["spacing"]
    if reader is Tiff3DIO:  # it takes the name of every file to end with a channel
        aside = spacing_file(file)
        spacing = json.loads(aside.read_text(encoding="utf-8"))["spacing"] if aside.is_file() else (1, 1, 1)
    return Picture(voxels, Geometry.plain(voxels.shape[1:], spacing))


class quiet:
    """ITK warns on every read of ACDC that the sform has no scales, and reads the spacing right."""

    def __enter__(self):
        self.before = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(False)

    def __exit__(self, *_):
        sitk.ProcessObject.SetGlobalWarningDisplay(self.before)


# ---- headers that name other files -----------------------------------------------------------------------------------

def parts(file: Path) -> list[Path]:
    """The files that make up an image: itself, and the one that holds the voxels (.mhd) or the spacing (TIFF).

    Raises InputError for a header that names voxels in other folders or in several files.
    """
    found = [file, _voxel_file(file)]
    if ending_of(file, TIFF) and spacing_file(file).is_file():
        found.append(spacing_file(file))
    return [part for part in found if part is not None]


def stands_alone(file: Path) -> bool:
    """Whether nnU-Net reads a copy of this file alone, TIFF's spacing apart; not so NIfTI-2 and voxels in another file."""
    if ending_of(file, NIFTI):
        with (gzip.open if file.name.lower().endswith(".gz") else open)(file, "rb") as stream:
            return not _is_nifti2(stream.read(4))
    return _voxel_file(file) is None


def _fields(file: Path) -> tuple[dict[str, str], int]:
    """Of the header of a MetaImage or NRRD file, names in lower case; and where it ends. Nothing for other formats."""
    if not ending_of(file, (*META, ".nrrd")):
        return {}, 0
    try:
        with open(file, "rb") as stream:
            content = stream.read(2 ** 20)
    except OSError:
        return {}, 0  # who reads it tells
    last = rb"^ElementDataFile[^\n]*\n?" if ending_of(file, META) else rb"\n\r?\n"
    match = re.search(rb"\A.*?" + last, content, re.DOTALL | re.MULTILINE)
    header = match[0] if match else content if content.startswith(b"NRRD") else b""
    fields = re.findall(r"^(\w[\w ]*?)\s*[:=]\s*(.*?)\s*$", os.fsdecode(header), re.M)
    return {name.lower().replace(" ", ""): value for name, value in fields}, len(header)


def _voxel_file(file: Path) -> Path | None:
    """The file that a header names for its voxels; None if they follow the header."""
    fields, _ = _fields(file)
    name = fields.get("elementdatafile", fields.get("datafile"))
    if name is None or name.lower() == "local":
        return None
    if name in ("", ".", "..") or re.search(r"[/\\%]|^LIST", name):
        raise InputError(f"{file}: names {name!r} for its voxels, which is not one file beside it; write the image anew, "
                         f"to one file")
    return file.with_name(name)


def _check_stream(file: Path) -> None:
    """Raise an error for damaged voxels: ITK returns what it could make of them."""
    fields, end = _fields(file)
    apart = _voxel_file(file)
    if fields.get("compresseddata", "").lower() == "true" or fields.get("encoding", "").lower() in ("gzip", "gz"):
        zlib.decompress(apart.read_bytes() if apart else file.read_bytes()[end:], wbits=47)  # zlib's or gzip's, by its start


# ---- carrying over and writing ---------------------------------------------------------------------------------------

def carry_over(file: Path, target: Path, link: bool = False) -> None:
    """A copy, byte for byte; with `link` a hard link, which costs no space, where the file system has them.

    Never over an existing file: that could be a link to somebody's image. The JSON file of a TIFF image's spacing comes
    along: nnU-Net reads the one that has the name of `target` without the channel.
    """
    if ending_of(file, TIFF) and spacing_file(file).is_file():
        shutil.copyfile(spacing_file(file), spacing_file(target))
    if link:
        try:
            os.link(file.resolve(), target)
            return
        except FileExistsError:
            raise
        except OSError:
            pass
    with open(file, "rb") as original, open(target, "xb") as new:
        shutil.copyfileobj(original, new, 2 ** 20)


def spacing_file(file: Path) -> Path:
    """The JSON file of a TIFF image's spacing: that of its own name, or else of its name without the channel."""
    stem = file.name[:-len(ending_of(file))]
    own = file.with_name(f"{stem}.json")
    return own if own.is_file() else file.with_name(re.sub(r"_\d{4}$", "", stem) + ".json")


def write(file: Path, voxels: np.ndarray, geometry: Geometry) -> None:
    """voxels: (Z, Y, X) or (Y, X); compressed, and read again, because ITK does not tell of a disk that is full.

    Raises OSError where what was written is not what was to be written.
    """
    wider = {"?": np.uint8, "e": np.float32}.get(voxels.dtype.char, voxels.dtype)  # ITK has no bool and no half precision
    voxels = voxels.astype(np.dtype(wider).newbyteorder("="), copy=False)
    try:
        if file.exists():
            raise FileExistsError(f"{file}: exists already")
        if ending_of(file, ITK):
            image = sitk.GetImageFromArray(voxels)
            image.SetSpacing(geometry.spacing)
            image.SetOrigin(geometry.origin)
            image.SetDirection(geometry.direction)
            sitk.WriteImage(image, str(file), True)
        else:
            _write_with_nnunet(file, voxels, geometry)
        written = read(file)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"{file}: could not be written; is the disk full? ({str(error).strip().splitlines()[-1]})") from error
    changed = written.geometry.differences(geometry)
    if changed:
        raise OSError(f"{file}: this format does not keep where the voxels lie: {', '.join(changed)}; choose another")
    if not np.array_equal(written.voxels.reshape(voxels.shape), voxels, equal_nan=voxels.dtype.kind == "f"):
        raise OSError(f"{file}: was not written as it should be; is the disk full?")


def _write_with_nnunet(file: Path, voxels: np.ndarray, geometry: Geometry) -> None:
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    flat = file.suffix.lower() in NaturalImage2DIO.supported_file_endings and voxels.shape[0] == 1
    (NaturalImage2DIO if flat else Tiff3DIO)().write_seg(voxels, str(file), {"spacing": geometry.spacing[::-1]})


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(float(v), 5) for v in values)
