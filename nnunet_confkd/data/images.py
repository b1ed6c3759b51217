"""Single image files: read them with their geometry, compare, copy, and write them and check that they were written."""
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_confkd.errors import InputError

if TYPE_CHECKING:  # this room imports SimpleITK where it is used: it takes longer than the rest of a --help
    import SimpleITK as sitk

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
    """Where the voxels lie, in ITK's order x, y, z.

    Attributes:
        size: Voxels along each axis.
        spacing: In mm.
        origin: In mm.
        direction: Rows of cosines.
    """
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image | sitk.ImageFileReader) -> Geometry:
        """Return the geometry of the first three axes of an image, or of a file whose header has been read."""
        n = min(len(image.GetSize()), 3)
        direction = np.reshape(image.GetDirection(), (len(image.GetSize()),) * 2)[:n, :n]
        return cls(tuple(image.GetSize()[:n]), tuple(image.GetSpacing()[:n]), tuple(image.GetOrigin()[:n]),
                   tuple(direction.ravel().tolist()))

    @classmethod
    def plain(cls, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Geometry:
        """Return the geometry of an array of which only the spacing is known.

        Args:
            shape: (Z, Y, X) or (Y, X).
            spacing: In mm, in the same order.
        """
        n = len(shape)
        return cls(tuple(shape[::-1]), tuple(float(s) for s in spacing[::-1]), (0.0,) * n,
                   tuple(np.eye(n).ravel().tolist()))

    def differences(self, other: Geometry) -> list[str]:
        """Say what differs by more than the tolerances. The list is empty for the same grid."""
        if self.size != other.size:
            return [f"size {self.size} and {other.size}"]
        axes = np.reshape(self.direction, (len(self.size),) * 2)  # each column is an axis of the voxels
        shift = axes.T @ np.subtract(other.origin, self.origin)
        apart = {"spacing": not np.allclose(self.spacing, other.spacing, rtol=SPACING_TOLERANCE, atol=0),
                 "origin": bool((np.abs(shift) > ORIGIN_TOLERANCE * np.asarray(self.spacing)).any()),
                 "direction": not np.allclose(self.direction, other.direction, rtol=0, atol=DIRECTION_TOLERANCE)}
        return [f"{name} {_rounded(getattr(self, name))} and {_rounded(getattr(other, name))}"
                for name, differs in apart.items() if differs]

    def equals_for_nnunet(self, other: Geometry) -> bool:
        """Whether nnU-Net's verify_dataset_integrity takes the two for the same grid."""
        return self.size == other.size and all(np.allclose(getattr(self, name), getattr(other, name))
                                               for name in ("spacing", "origin", "direction"))


@dataclass(frozen=True)
class Picture:
    """The content of an image file.

    Attributes:
        voxels: (channels, Z, Y, X), or (channels, Y, X).
        geometry: Of each channel.
    """
    voxels: np.ndarray
    geometry: Geometry

    def channel(self, number: int) -> Picture:
        """Return the picture with this channel only; with no channel if there are fewer."""
        return replace(self, voxels=self.voxels[number:number + 1])


@dataclass(frozen=True)
class Volume:
    """What is to become one image file: a file, one channel of a 4-D file, or what `reader` makes of a file.

    Attributes:
        file: The file.
        channel: The number of the channel; None: all channels.
        reader: file -> Picture, for formats that nnU-Net does not read, or to change what was read. It must pickle.
    """
    file: Path
    channel: int | None = None
    reader: Callable[[Path], Picture] | None = None

    def read(self) -> Picture:
        """Read the file. Raises InputError as :func:`read` does."""
        picture = (self.reader or read)(self.file)
        return picture if self.channel is None else picture.channel(self.channel)


def ending_of(name: str | Path, endings: tuple[str, ...] = ENDINGS) -> str | None:
    """Return the ending of a file name as it is written there; None if it is not one of `endings`."""
    name = str(name)
    return next((name[len(name) - len(e):] for e in endings if name.lower().endswith(e)), None)


# ---- reading --------------------------------------------------------------------------------------------------------

def read(file: Path) -> Picture:
    """Read an image or label of any format that nnU-Net reads, or .mhd, as nnU-Net sees it.

    The last axis of 4-D files is the channels.

    Raises:
        InputError: The file is missing, no image, cut short or damaged, or its header names voxels in another folder.
            The text names the file.
    """
    file = Path(file)
    ending = (ending_of(file) or file.suffix).lower()
    with readable(file):
        if file.is_dir():
            raise InputError(f"{file}: there is no such file")
        if ending in NIFTI:
            return _read_nifti(file)
        return _read_itk(file) if ending in ITK or ending in META else _read_with_nnunet(file)


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Make an InputError that names the file of any error of the libraries that read it."""
    try:
        if not file.exists():
            raise InputError(f"{file}: there is no such file")
        if not _is_text(str(file)):  # SimpleITK ends the whole program
            raise InputError(f"{str(file)!a}: the name is no proper text (UTF-8); rename the file or its folder")
        yield
    except InputError:
        raise
    except Exception as error:  # each library has its own, and they all mean the same to users
        # without the lines in which ITK names its own source files
        reason = [line.strip() for line in str(error).splitlines() if not re.search(r"\.cxx:\d+|^\s*$", line)]
        raise InputError(f"{file}: cannot be read as an image; is it cut short, damaged, or of another format? Fetch "
                         f"or write it anew ({' '.join(reason) or type(error).__name__})") from error


def read_layers(file: Path) -> tuple[Picture, dict[str, str]]:
    """Read a file whose voxels hold several values, such as the layers of a .seg.nrrd file.

    Returns:
        The picture, whose channels are the values of a voxel, and the fields of the header.

    Raises:
        InputError: As :func:`read`.
    """
    import SimpleITK as sitk

    with readable(file), quiet():
        _check_stream(file)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(file))
        reader.ReadImageInformation()
        fields = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
        voxels = sitk.GetArrayFromImage(reader.Execute())
        if reader.GetNumberOfComponents() > 1:
            voxels = np.moveaxis(voxels, -1, 0)
        return _picture(voxels, Geometry.of(reader)), fields


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
    counts, flat = np.zeros(highest - lowest + 1), np.asarray(label).reshape(-1)
    for start in range(0, flat.size, 2 ** 20):
        part = flat[start:start + 2 ** 20]
        # the ends of runs of equal voxels: label maps have few, which is several times as fast as to count each voxel
        ends = np.append(np.flatnonzero(part[1:] != part[:-1]), len(part) - 1)
        value, length = part[ends], np.diff(ends, prepend=-1)
        counted = (value >= lowest) & (value <= highest) & (value == np.floor(value))
        counts += np.bincount(value[counted].astype(np.int64) - lowest, length[counted], len(counts))
    return {value: int(counts[value - lowest]) for value in values}


def values_in(voxels: np.ndarray) -> np.ndarray:
    """Return the sorted values that occur, as `np.unique`, which sorts all voxels and takes a copy of them."""
    if voxels.dtype not in (np.uint8, np.int8, np.uint16, np.int16):
        return np.unique(voxels)
    found, flat = np.zeros(2 ** (8 * voxels.dtype.itemsize), bool), voxels.reshape(-1)
    lowest = int(np.iinfo(voxels.dtype).min)
    for start in range(0, flat.size, 2 ** 20):
        part = flat[start:start + 2 ** 20]
        if part.any():
            found[part.astype(np.int64) - lowest] = True
        elif len(part):
            found[-lowest] = True
    return (np.flatnonzero(found) + lowest).astype(voxels.dtype)


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _read_itk(file: Path) -> Picture:
    import SimpleITK as sitk

    _check_stream(file)
    with quiet():
        reader = _header(file)
        voxels = sitk.GetArrayFromImage(reader.Execute())
    if ending_of(file, (".gipl",)) and file.stat().st_size < 256 + voxels.nbytes:  # the header has 256 bytes
        raise ValueError("shorter than its header says")
    return _picture(voxels, Geometry.of(reader))


def _header(file: Path) -> sitk.ImageFileReader:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise InputError(f"{file}: holds {reader.GetNumberOfComponents()} values a voxel (colours?); nnU-Net needs a "
                         f"file for each channel")
    if reader.GetDimension() not in (2, 3, 4):
        raise InputError(f"{file}: is {reader.GetDimension()}-dimensional; images have 2 or 3 dimensions, or 4 with "
                         f"the channels last")
    return reader


def _picture(voxels: np.ndarray, geometry: Geometry) -> Picture:
    return Picture(voxels.reshape(-1, *geometry.size[::-1]), geometry)


def _read_nifti(file: Path) -> Picture:
    """Read the voxels by nibabel: ITK does not notice that a gzip stream was cut short, and reads NaN as 0."""
    import nibabel
    from nibabel.volumeutils import apply_read_scaling

    content = _gunzipped(file) if file.name.lower().endswith(".gz") else _whole(file)
    second = _is_nifti2(content)
    kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    header = kind(bytes(content[:kind.sizeof_hdr]))
    if second:
        geometry = _geometry_of_nifti2(header)
    else:
        with quiet():
            geometry = Geometry.of(_header(file))
    # not by nibabel, which would copy the voxels
    voxels = np.ndarray(header.get_data_shape(), header.get_data_dtype(), content, header.get_data_offset(), order="F")
    slope, intercept = header.get_slope_inter()
    voxels = apply_read_scaling(voxels, slope, intercept).T
    if voxels.dtype.kind not in "iuf":
        raise InputError(f"{file}: holds {voxels.dtype} (colours?); nnU-Net needs a file for each channel")
    if voxels.dtype != header.get_data_dtype() and voxels.dtype.kind == "f":
        # scaled, which ITK, and so nnU-Net, does in single precision
        voxels = voxels.astype(np.float32)
    return _picture(voxels.astype(voxels.dtype.newbyteorder("="), copy=False), geometry)


def _whole(file: Path) -> bytearray:
    content = bytearray(file.stat().st_size)
    with open(file, "rb") as stream:
        stream.readinto(content)
    return content


def _gunzipped(file: Path) -> bytearray:
    """Decompress a file piece by piece, and check the checksums. Its compressed form is never in memory as a whole."""
    content, stream = bytearray(), zlib.decompressobj(31)
    with open(file, "rb") as compressed:
        while piece := compressed.read(2 ** 16):
            while piece:
                content += stream.decompress(piece)
                piece = stream.unused_data.lstrip(b"\0")  # zeros may fill a block
                if stream.eof and piece:  # one of several streams
                    stream = zlib.decompressobj(31)
    if not stream.eof:
        raise EOFError("the compressed data end too early")
    return content


def _is_nifti2(start: bytes | bytearray) -> bool:
    return 540 in (int.from_bytes(start[:4], order) for order in ("little", "big"))


def _geometry_of_nifti2(header) -> Geometry:
    """Return the geometry, which ITK cannot read. The affine's axes point right, front, up; ITK's left, back, up."""
    n = min(len(header.get_data_shape()), 3)
    mm = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)  # as ITK, without a unit it is mm
    affine = np.diag((-mm, -mm, mm, 1)) @ header.get_best_affine()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = (affine[:3, :3] / spacing)[:n, :n]
    return Geometry(tuple(header.get_data_shape()[:n]), tuple(spacing[:n].tolist()), tuple(affine[:n, 3].tolist()),
                    tuple(direction.ravel().tolist()))


def _read_with_nnunet(file: Path) -> Picture:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

    complaints: list[str] = []  # if pages are missing, tifffile logs it and returns the others

    def keep(record: logging.LogRecord) -> None:
        complaints.append(record.getMessage())

    logging.getLogger("tifffile").addFilter(keep)
    # nnU-Net prints which reader it takes, and the tracebacks of those that failed
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
    if reader is Tiff3DIO:  # this reader expects that the name of every file ends with a channel
        aside = spacing_file(file)
        spacing = json.loads(aside.read_text(encoding="utf-8"))["spacing"] if aside.is_file() else (1, 1, 1)
    return Picture(voxels, Geometry.plain(voxels.shape[1:], spacing))


class quiet:
    """Silence ITK's warnings. It warns of the sform of every ACDC image, although it reads the spacing right."""

    def __enter__(self):
        import SimpleITK as sitk

        self.itk = sitk.ProcessObject
        self.before = self.itk.GetGlobalWarningDisplay()
        self.itk.SetGlobalWarningDisplay(False)

    def __exit__(self, *_):
        self.itk.SetGlobalWarningDisplay(self.before)


# ---- headers that name other files -----------------------------------------------------------------------------------

def parts(file: Path) -> list[Path]:
    """Return the files that make up an image: itself, and the one that holds the voxels (.mhd) or the spacing (TIFF).

    Those of a folder are the parts of all its files.

    Raises:
        InputError: The header names voxels in another folder or in several files.
    """
    if file.is_dir():
        return [part for inner in sorted(file.iterdir()) if inner.is_file() for part in parts(inner)]
    found = [file, _voxel_file(file)]
    if ending_of(file, TIFF) and spacing_file(file).is_file():
        found.append(spacing_file(file))
    return [part for part in found if part is not None]


def stands_alone(file: Path) -> bool:
    """Whether nnU-Net can read a copy of this file alone. It cannot read NIfTI-2, or a copy without its voxel file."""
    if ending_of(file, NIFTI):
        with (gzip.open if file.name.lower().endswith(".gz") else open)(file, "rb") as stream:
            return not _is_nifti2(stream.read(4))
    return _voxel_file(file) is None


def _fields(file: Path) -> tuple[dict[str, str], int]:
    """Return the fields of a MetaImage or NRRD header, with names in lower case, and its length in bytes."""
    if not ending_of(file, (*META, ".nrrd")):
        return {}, 0
    try:
        with open(file, "rb") as stream:
            content = stream.read(2 ** 20)
    except OSError:
        return {}, 0  # whoever reads it reports the error
    last = rb"^ElementDataFile[^\n]*\n?" if ending_of(file, META) else rb"\n\r?\n"
    match = re.search(rb"\A.*?" + last, content, re.DOTALL | re.MULTILINE)
    header = match[0] if match else content if content.startswith(b"NRRD") else b""
    fields = re.findall(r"^(\w[\w ]*?)\s*[:=]\s*(.*?)\s*$", os.fsdecode(header), re.M)
    return {name.lower().replace(" ", ""): value for name, value in fields}, len(header)


def _voxel_file(file: Path) -> Path | None:
    """Return the file that a header names for its voxels; None if they follow the header."""
    fields, _ = _fields(file)
    name = fields.get("elementdatafile", fields.get("datafile"))
    if name is None or name.lower() == "local":
        return None
    if name in ("", ".", "..") or re.search(r"[/\\%]|^LIST", name):
        raise InputError(f"{file}: names {name!r} for its voxels, which is not one file beside it; write the image "
                         f"anew, to one file")
    return file.with_name(name)


def _check_stream(file: Path) -> None:
    """Raise an error if compressed voxels are damaged. ITK would return what it could read of them."""
    fields, end = _fields(file)
    voxel_file = _voxel_file(file)
    if fields.get("compresseddata", "").lower() == "true" or fields.get("encoding", "").lower() in ("gzip", "gz"):
        content = voxel_file.read_bytes() if voxel_file else file.read_bytes()[end:]
        zlib.decompress(content, wbits=47)  # takes zlib's and gzip's format


# ---- carrying over and writing ---------------------------------------------------------------------------------------

def carry_over(file: Path, target: Path, link: bool = False) -> None:
    """Copy a file byte for byte, with the JSON file of a TIFF image's spacing.

    Args:
        file: The image or label.
        target: The copy. It must not exist, because it could be a link to somebody's image.
        link: Whether to make a hard link, which takes no space, if the file system has them.

    Raises:
        OSError: `target` exists, or the disk is full.
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
    """Return the JSON file of a TIFF image's spacing. It has the name of the image, or that without the channel."""
    stem = file.name[:-len(ending_of(file))]
    own = file.with_name(f"{stem}.json")
    return own if own.is_file() else file.with_name(re.sub(r"_\d{4}$", "", stem) + ".json")


def is_flat(shape: Sequence[int], spacing: Sequence[float]) -> bool:
    """Whether an image is one without a third axis, which nnU-Net has given one.

    Its spacing there is 999 mm, or 999 times the larger of the two others, and means nothing.

    Args:
        shape: `(Z, Y, X)`, or `(Y, X)`.
        spacing: In the same order.
    """
    return len(shape) == 3 and shape[0] == 1 and any(np.isclose(spacing[0], 999 * unit)
                                                     for unit in (1, max(spacing[1:])))


def has_spacing(file: Path) -> bool:
    """Return whether the spacing of an image is known: from its format, or from nnU-Net's file beside it.

    nnU-Net does not read such a file beside a two-dimensional TIFF image, so it does not count there.
    """
    if ending_of(file, TIFF) and spacing_file(file).is_file():
        from tifffile import TiffFile

        with TiffFile(file) as content:
            return len(content.pages) > 1
    return bool(ending_of(file, ITK))


def write(file: Path, voxels: np.ndarray, geometry: Geometry) -> None:
    """Write an image, compressed, and read it again, because ITK does not report that the disk is full.

    Args:
        file: The image. It must not exist. Its ending chooses the format.
        voxels: (Z, Y, X) or (Y, X).
        geometry: Where the voxels lie.

    Raises:
        OSError: The file exists, or does not hold what was to be written.
    """
    import SimpleITK as sitk

    # ITK has no bool and no half precision
    wider = {"?": np.uint8, "e": np.float32}.get(voxels.dtype.char, voxels.dtype)
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
        raise OSError(f"{file}: could not be written; is the disk full? "
                      f"({str(error).strip().splitlines()[-1]})") from error
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
