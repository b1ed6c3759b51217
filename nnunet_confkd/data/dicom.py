"""Read DICOM: series of images by SimpleITK, segmentations (DICOM SEG) by highdicom, which is an optional extra."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from nnunet_confkd.data.images import Geometry, Picture, quiet, readable
from nnunet_confkd.errors import InputError, some

GAP = 0.02  # of the distance of slices: series that differ by more lack slices
MODALITY, DESCRIPTION, POSITION, NORMAL = "0008|0060", "0008|103e", "0020|0032", "0020|0037"
SPACING, INTERCEPT, SLOPE = "0028|0030", "0028|1052", "0028|1053"
SAME_AXES = 1e-3  # of a unit vector, or of a pixel: series whose slices differ by more are no box of voxels


def is_dicom_file(file: Path) -> bool:
    """Whether a file is DICOM: the four letters after its preamble say so."""
    try:
        with open(file, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_dicom_folder(folder: Path) -> bool:
    """Whether a folder holds a file of DICOM that is not hidden. A DICOMDIR only lists other files."""
    return any(is_dicom_file(file) for file in sorted(folder.iterdir())
               if not file.name.startswith(".") and file.name != "DICOMDIR" and file.is_file())


def series_folders(folder: Path) -> dict[str, Path]:
    """Find the series of images in a folder, however deep they lie.

    Returns:
        {name: folder of a series}, empty if there are none. The name is that of the folder, if it is a series itself;
        that of the folder in it, such as one for each patient, where this holds one series; else it has all names
        between, joined by "_".

    Raises:
        InputError: Two series would have the same name.
    """
    if is_dicom_folder(folder):
        return {folder.resolve().name: folder}
    found = [inner for inner in sorted(folder.rglob("*"))
             if inner.is_dir() and is_dicom_folder(inner) and not is_segmentation(inner)]
    tops = Counter(inner.relative_to(folder).parts[0] for inner in found)
    parts = {inner: inner.relative_to(folder).parts for inner in found}
    named: dict[str, Path] = {}
    for inner, names in parts.items():
        name = names[0] if tops[names[0]] == 1 else "_".join(names)
        if name in named:
            raise InputError(f"{named[name]} and {inner} would both be called {name}; rename one of these folders")
        named[name] = inner
    return named


def read_series(folder: Path) -> Picture:
    """Read the one series of images that a folder holds.

    Raises:
        InputError: It holds no series of images or several of them, or its slices are no box of voxels: some are
            missing, tilted, of different spacing, or at one place.
    """
    import SimpleITK as sitk

    with readable(folder), quiet():
        series = {}
        for name in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name)
            tags = _tags(files[0])
            if tags.get(MODALITY) not in ("SEG", "RTSTRUCT", "SR", "PR", "KO"):
                series[f"{tags.get(DESCRIPTION) or name} ({len(files)} files)"] = files
        if len(series) != 1:
            raise InputError(f"{folder}: holds " + (f"several DICOM series: {some(series)}; put each into a folder of "
                                                    f"its own" if series else "no DICOM series of images"))
        files, = series.values()
        tags = [_tags(file) for file in files]
        _require_even_slices(folder, tags)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        if len({str([*_numbers(of, SLOPE), *_numbers(of, INTERCEPT)]) for of in tags}) > 1:
            # else all voxels get the type of the first
            reader.SetOutputPixelType(sitk.sitkFloat32)
        image = reader.Execute()
        if image.GetNumberOfComponentsPerPixel() != 1:
            raise InputError(f"{folder}: holds colours; nnU-Net needs a file for each channel")
        return Picture(sitk.GetArrayFromImage(image)[None], Geometry.of(image))


def _tags(file: str) -> dict[str, str]:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _numbers(tags: dict[str, str], tag: str) -> list[float]:
    """Return the numbers of a tag; NaN where they are missing, or are not as many as there should be."""
    count = {POSITION: 3, NORMAL: 6, SPACING: 2}.get(tag, 1)
    try:
        found = [float(text) for text in tags.get(tag, "").split("\\")]
    except ValueError:
        found = []
    return found if len(found) == count else [float("nan")] * count


def _require_even_slices(folder: Path, tags: list[dict[str, str]]) -> None:
    """Raise InputError if the slices are no box of voxels. ITK would only warn, and place them wrongly.

    Args:
        folder: That of the series.
        tags: Those of each slice, in their order.
    """
    places, axes, pixels = (np.array([_numbers(of, tag) for of in tags]) for tag in (POSITION, NORMAL, SPACING))
    if len(tags) < 2 or np.isnan(places).any() or np.isnan(axes).any():
        return  # a single file of many frames, or one without a place
    pixels = np.nan_to_num(pixels, nan=1.0)  # as ITK, without a spacing it is 1
    turned, scaled = np.ptp(axes, 0).max() > SAME_AXES, np.ptp(pixels, 0).max() > SAME_AXES * pixels.min()
    if turned or scaled:
        raise InputError(f"{folder}: its slices differ in {'their pixel spacing' if scaled else 'direction'}; are "
                         f"there several series in one?")
    normal = np.cross(axes[0, :3], axes[0, 3:])
    steps = np.diff(places, axis=0)
    distances = steps @ normal
    typical = abs(float(np.median(distances)))
    if typical == 0:
        raise InputError(f"{folder}: its slices lie at one place, as in a series over time; put each volume into a "
                         f"folder of its own")
    if np.ptp(distances) > GAP * typical:
        raise InputError(f"{folder}: its slices are {np.abs(distances).min():.4g} to {np.abs(distances).max():.4g} mm "
                         f"apart; are some missing, or are there several series in one?")
    path = places - places[0]
    shift = float(np.linalg.norm(path - np.outer(path @ normal, normal), axis=1).max())
    if shift > pixels.min() / 2:
        raise InputError(f"{folder}: its slices are shifted against each other, by up to {shift:.4g} mm (the gantry "
                         f"was tilted?). An image of nnU-Net cannot say this: resample the series, for example by "
                         f"dcm2niix")


def is_segmentation(folder: Path) -> bool:
    """Whether a folder holds one DICOM file, which is a segmentation."""
    files = [file for file in sorted(folder.iterdir()) if is_dicom_file(file)]
    return len(files) == 1 and _tags(str(files[0])).get(MODALITY) == "SEG"


def segmentation_file(path: Path) -> Path | None:
    """Return the DICOM SEG file that a path is, or that a folder of nothing else holds; None if it is no such path."""
    if not path.is_dir():
        return path if is_dicom_file(path) else None
    files = [file for file in sorted(path.iterdir()) if is_dicom_file(file)]
    if len(files) > 1:
        raise InputError(f"{path}: holds {len(files)} DICOM files; a label is one DICOM SEG file")
    return files[0] if files else None


def read_segments(path: Path) -> tuple[dict[str, np.ndarray], Geometry]:
    """Read a DICOM SEG file.

    Returns:
        {name of the segment: its voxels, (Z, Y, X)}, and the grid, which reaches from the first annotated slice to the
        last.

    Raises:
        InputError: highdicom is not installed, the file is no DICOM SEG, or it is a fractional one.
    """
    try:
        import highdicom
    except ImportError as error:
        raise InputError(f"{path}: DICOM segmentations need highdicom: pip install 'nnunet_confkd[dicom]'") from error
    with readable(path):
        import pydicom

        described = pydicom.dcmread(path, stop_before_pixels=True)
        if described.get("Modality") != "SEG":
            raise InputError(f"{path}: is DICOM of the kind {described.get('Modality', 'unknown')}; a label is a DICOM "
                             f"SEG")
        segmentation = highdicom.seg.segread(path)
        if segmentation.segmentation_type == highdicom.seg.SegmentationTypeValues.FRACTIONAL:
            raise InputError(f"{path}: is a fractional segmentation (probabilities); write a binary one")
        numbers = list(segmentation.segment_numbers)
        names = [str(segmentation.get_segment_description(number).segment_label) for number in numbers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InputError(f"{path}: has several segments of the name {some(repeated)}; rename them")
        volume = segmentation.get_volume(segment_numbers=numbers)  # (Z, Y, X, segments)
    array, affine = volume.array, np.array(volume.affine)  # of indices in the order z, y, x
    if np.linalg.det(affine[:3, 2::-1]) < 0:  # series, as ITK reads them, go along the normal of their slices
        affine[:3, 3] += affine[:3, 0] * (len(array) - 1)
        array, affine[:3, 0] = array[::-1], -affine[:3, 0]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    geometry = Geometry(tuple(array.shape[2::-1]), tuple(spacing[::-1].tolist()), tuple(affine[:3, 3].tolist()),
                        tuple((affine[:3, :3] / spacing)[:, ::-1].ravel().tolist()))
    return {name: array[..., i] > 0 for i, name in enumerate(names)}, geometry
