"""Reading and writing of small images, for the tests that make data sets."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def write_image(file: Path, array: np.ndarray, spacing=None, origin=None, direction=None,
                compress: bool = False) -> Path:
    """Write an image `(Z, Y, X)` whose geometry is given in the order x, y, z; make its folder. Return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    for value, set_value in ((spacing, image.SetSpacing), (origin, image.SetOrigin), (direction, image.SetDirection)):
        if value is not None:
            set_value(value)
    sitk.WriteImage(image, str(file), compress)
    return file


def read_voxels(file: Path) -> np.ndarray:
    """Read the voxels of an image, `(Z, Y, X)`."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def read_json(file: Path):
    """Read a JSON file."""
    return json.loads(file.read_text())


def file_states(folder: Path) -> dict[str, tuple[str, int]]:
    """Return {path of each file: (hash of its content, time of its last change)}."""
    return {file.relative_to(folder).as_posix():
            (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
            for file in folder.rglob("*") if file.is_file()}
