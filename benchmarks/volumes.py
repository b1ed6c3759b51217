"""Generated volumes of the size of a CT of the trunk, with as many organs as are asked for."""
from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

SPACING = (1.0, 0.8, 0.8)  # mm, (z, y, x)
LARGEST_ML, SMALLEST_ML = 1500, 5  # a liver, and a rib or a gland
FULL_SIZE = 600 * 512 * 512  # voxels, for which these are the volumes; smaller images hold smaller organs


def organs(shape: tuple[int, ...], number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make a label map and a prediction of it.

    The organs are ellipsoids with waves in their surfaces. Their volumes fall evenly on a logarithmic scale. The
    surfaces of the prediction are a few voxels off.

    Args:
        shape: `(Z, Y, X)`.
        number: The number of organs, 1 to 255.
        seed: Other seeds give other organs.

    Returns:
        Two maps of uint8.
    """
    rng = np.random.default_rng(seed)
    maps = np.zeros((2, *shape), np.uint8)
    for label, ml in enumerate(np.geomspace(LARGEST_ML, SMALLEST_ML, number), 1):
        mm3 = ml * 1000 * np.prod(shape) / FULL_SIZE
        radii = (3 * mm3 / 4 / np.pi) ** (1 / 3) * 3 * rng.dirichlet((8, 8, 8)) / SPACING
        radii = np.minimum(radii, np.array(shape) / 2.6)
        centre = rng.uniform(1.2 * radii, shape - 1.2 * radii)
        box = tuple(slice(max(0, int(c - 1.25 * r) - 3), int(c + 1.25 * r) + 4) for c, r in zip(centre, radii))
        z, y, x = np.ogrid[tuple(slice(side.start, min(side.stop, n)) for side, n in zip(box, shape))]
        z, y, x = (((axis - c) / r).astype(np.float32) for axis, c, r in zip((z, y, x), centre, radii))
        phase = rng.uniform(0, 2 * np.pi, 4)
        surface = z * z + y * y + x * x + 0.12 * np.sin(5 * z + 3 * y + phase[0]) * np.sin(4 * x - 2 * z + phase[1])
        off = 2.5 / radii.mean() * np.sin(13 * x + phase[2]) * np.sin(11 * y + phase[3])
        maps[0][box][surface < 1] = label
        maps[1][box][surface + off < 1] = label
    return maps[0], maps[1]


def ct(label: np.ndarray, seed: int = 0) -> np.ndarray:
    """Make an image of int16 in which each organ has a grey value and the scanner has noise."""
    rng = np.random.default_rng(seed)
    greys = np.concatenate(([-60], rng.integers(20, 180, 255))).astype(np.int16)
    noise = rng.integers(-20, 20, label[0].size * 3, dtype=np.int16)  # a slice's, taken from a random place
    image = greys[label]
    for part in image:
        start = rng.integers(0, 2 * part.size)
        part += noise[start:start + part.size].reshape(part.shape)
    return image


def write(file: Path, voxels: np.ndarray) -> None:
    """Write a volume to .nii.gz, compressed many times as quickly as by ITK. Noise is as large with both."""
    import SimpleITK as sitk
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING[::-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = file.with_name(f"plain_{file.name[:-3]}")
    sitk.WriteImage(image, str(plain))
    stream = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_RLE)
    with open(plain, "rb") as content, open(file, "wb") as compressed:
        while piece := content.read(2 ** 20):
            compressed.write(stream.compress(piece))
        compressed.write(stream.flush())
    plain.unlink()
