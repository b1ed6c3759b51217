"""A generated data set that looks like short-axis cardiac MRI, for demonstrations and tests.

The left ventricle (LV) lies in a ring of myocardium (MYO). The right ventricle (RV) is a crescent that touches the ring
from one side. All three shrink towards the apex. Vessels and tissues of the same brightness surround them, so that
brightness alone does not distinguish the classes. The data set needs no download and no patients.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_confkd.data.weak_labels import case_rng, nothing, weaken
from nnunet_confkd.files import new_folder, write_json

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3, "ignore": 4}


def generate_dataset(folder: Path, *, num_full: int = 4, num_partial: int = 12, num_unlabelled: int = 6,
                     num_validation: int = 4, num_test: int = 6, dimensions: int = 3, style: str = "scribbles",
                     seed: int = 0) -> dict[str, list[str]]:
    """Write a mixed-supervision data set in nnU-Net's raw format.

    The cases are numbered in the order of the arguments. Case k has the same image whatever the counts are.

    Args:
        folder: The folder of the data set, which must not exist.
        num_full: The number of fully annotated training cases.
        num_partial: The number of partially annotated training cases.
        num_unlabelled: The number of unlabelled training cases.
        num_validation: The number of validation cases, which are fully annotated.
        num_test: The number of test cases, which are fully annotated and lie in `imagesTs` and `labelsTs`.
        dimensions: 3 for volumes of about 8 x 64 x 64 voxels, 2 for a single slice per case.
        style: Of the partial annotations, one of :data:`nnunet_confkd.data.weak_labels.STYLES`.
        seed: Other seeds give other hearts.

    Returns:
        The names of the cases of "full", "partial", "unlabelled", "validation" and "test".

    Raises:
        FileExistsError: The folder exists.
        ValueError: dimensions is neither 2 nor 3, or there is no such style.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     cases = generate_dataset(Path(folder, "Dataset027_Hearts"), num_full=1, num_partial=1, num_unlabelled=0,
        ...                              num_validation=0, num_test=1, dimensions=2)
        >>> cases["full"], cases["test"]
        (['heart_000'], ['heart_002'])
    """
    if dimensions not in (2, 3):
        raise ValueError(f"dimensions must be 2 or 3, got {dimensions}")
    counts = {"full": num_full, "partial": num_partial, "unlabelled": num_unlabelled,
              "validation": num_validation, "test": num_test}
    names = (f"heart_{k:03d}" for k in range(sum(counts.values())))
    cases = {role: [next(names) for _ in range(count)] for role, count in counts.items()}
    supervision = {}

    with new_folder(folder) as unfinished:
        for subfolder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (unfinished / subfolder).mkdir()
        for role, members in cases.items():
            for case in members:
                image, label, spacing = generate_case(case, dimensions=dimensions, seed=seed)
                if role == "partial":
                    label = weaken(label, style, LABELS["ignore"], case_rng(case, style, seed))
                elif role == "unlabelled":
                    label = nothing(label, LABELS["ignore"])
                split = "Ts" if role == "test" else "Tr"
                _write(unfinished / f"images{split}" / f"{case}_0000.nii.gz", image, spacing)
                _write(unfinished / f"labels{split}" / f"{case}.nii.gz", label, spacing)
                if role != "test":
                    supervision[case] = "full" if role == "validation" else role
        dataset = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": len(supervision),
                   "file_ending": ".nii.gz", "supervision": supervision}
        write_json(unfinished / "dataset.json", dataset, indent=4)
    return cases


def generate_case(case: str, *, dimensions: int = 3, seed: int = 0
                  ) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Generate one heart.

    Args:
        case: The name of the case. Each name gives another heart.
        dimensions: 3, or 2 for a single slice.
        seed: The seed of the data set.

    Returns:
        The image `(Z, Y, X)`, int16; the full label `(Z, Y, X)`, uint8; the spacing (Z, Y, X) in mm.

    Examples:
        >>> image, label, spacing = generate_case("heart_000", dimensions=2)
        >>> image.shape == label.shape, len(spacing), np.unique(label).tolist()
        (True, 3, [0, 1, 2, 3])
    """
    rng = case_rng(case, f"synthetic {dimensions}d", seed)
    in_plane = rng.uniform(1.3, 1.5)
    size = rng.integers(62, 67, 2)
    if dimensions == 3:
        spacing = (rng.uniform(5.5, 6.5), in_plane, in_plane)
        shape = (int(rng.integers(7, 10)), *size)
        depth = np.linspace(0, 1, shape[0])
    else:
        # nnU-Net's convention: a slice axis of one voxel, with a spacing far above the others
        spacing = (999.0, in_plane, in_plane)
        shape = (1, *size)
        depth = rng.uniform(0, 0.75, 1)
    label, intensity = _draw(rng, depth, shape, spacing)
    return _acquire(rng, intensity, spacing), label, spacing


def _draw(rng: np.random.Generator, depth: np.ndarray, shape: tuple[int, ...],
          spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the label and the noiseless intensity, both of the given shape `(Z, Y, X)`.

    `depth` `(Z,)` goes from 0 at the base of the heart to 1 at its apex. Lengths are in mm; blood has intensity 1.
    """
    # all arrays below broadcast to (Z, Y, X)
    depth = depth[:, None, None]
    y = ((np.arange(shape[1]) - (shape[1] - 1) / 2) * spacing[1])[None, :, None]
    x = ((np.arange(shape[2]) - (shape[2] - 1) / 2) * spacing[2])[None, None, :]

    blood = rng.uniform(0.8, 1.0)
    muscle = blood * rng.uniform(0.35, 0.6)
    lung, liver, fat = rng.uniform(0.08, 0.2), rng.uniform(0.9, 1.3) * muscle, rng.uniform(0.8, 1.2) * blood

    # the body: four tissues, which are the level sets of a smooth field
    field = _smooth_noise(rng, shape, spacing, rng.uniform(7, 10))
    tissues = np.array([lung, liver, muscle, fat])
    intensity = tissues[np.digitize(field, np.array([-0.5, 0.2, 0.9]) + rng.uniform(-0.25, 0.25, 3))]

    # the heart's axis is oblique, and breathing moves each slice a little
    centre_y, centre_x = (
        rng.uniform(-9, 9) + rng.uniform(-6, 6) * (depth - 0.5) + rng.normal(0, 0.5, depth.shape)
        for _ in range(2))
    centre_x = centre_x + 6  # room for the right ventricle
    dy, dx = y - centre_y, x - centre_x
    distance, angle = np.hypot(dy, dx), np.arctan2(dy, dx)

    taper = np.sqrt(1 - (rng.uniform(0.8, 0.95) * depth) ** 2)
    cavity = rng.uniform(10, 15) * taper
    wall = rng.uniform(5, 8.5) * (0.8 + 0.2 * taper)
    inner = cavity * _wobble(rng, angle, 0.15)
    # at least two voxels of wall, so that the ring is always closed
    outer = inner + np.maximum(wall * _wobble(rng, angle, 0.25), 2 * spacing[1])
    lv, heart = distance < inner, distance < outer

    # the right ventricle is an ellipse beside the ring, without the part inside the ring; it is shorter than the left
    side = np.pi + rng.uniform(-0.9, 0.9)
    along, across = dx * np.cos(side) + dy * np.sin(side), dy * np.cos(side) - dx * np.sin(side)
    ring = cavity + wall
    rv_taper = np.sqrt(np.maximum(1 - (depth / rng.uniform(0.85, 1.1)) ** 2, 0.01))
    rv_along, rv_across = rng.uniform(0.7, 1.0) * ring * rv_taper, rng.uniform(0.9, 1.15) * ring * rv_taper
    offset_along = along - rng.uniform(0.7, 0.85) * ring
    elliptic = np.hypot(offset_along / rv_along, across / rv_across)
    rv_edge = _wobble(rng, np.arctan2(across, offset_along), 0.12)
    rv = (elliptic < rv_edge) & ~heart

    # three vessels as bright as the ventricles; the first has a wall, so that it looks like a small left ventricle
    for number in range(3):
        radius = rng.uniform(5, 8)
        direction = side + np.pi + (rng.uniform(-1.3, 1.3) if number == 0 else rng.uniform(-np.pi, np.pi))
        reach = ring.max() + radius + rng.uniform(1, 10)
        drift = rng.uniform(-5, 5, 2)
        # inside the image, so that the network sees it
        vessel_y = np.clip(centre_y.mean() + reach * np.sin(direction), y.min() + 4, y.max() - 4)
        vessel_x = np.clip(centre_x.mean() + reach * np.cos(direction), x.min() + 4, x.max() - 4)
        ey, ex = y - vessel_y - drift[0] * depth, x - vessel_x - drift[1] * depth
        from_vessel = np.hypot(ey, ex) / _wobble(rng, np.arctan2(ey, ex), 0.15)
        if number == 0:
            intensity[from_vessel < radius + 2.5] = muscle
        intensity[from_vessel < radius] = blood

    # the thin wall of the right ventricle counts as background, as in the usual cardiac labels
    intensity[(elliptic < rv_edge + 2 / np.minimum(rv_along, rv_across)) & (rv_taper > 0.1) & ~heart] = muscle
    intensity[heart] = muscle
    intensity[rv | lv] = blood
    # papillary muscles count as cavity
    for direction in rng.uniform(-0.5, 0.5, 2) + side + np.array([2.2, 4.1]):
        papillary = np.hypot(dx - 0.6 * cavity * np.cos(direction), dy - 0.6 * cavity * np.sin(direction))
        intensity[(papillary < 0.2 * cavity) & lv] = muscle

    label = np.zeros(shape, dtype=np.uint8)
    label[heart], label[lv], label[rv] = LABELS["MYO"], LABELS["LV"], LABELS["RV"]
    return label, intensity


def _acquire(rng: np.random.Generator, intensity: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Simulate the scanner: texture, blur, coil sensitivity, noise and an arbitrary unit. Returns int16 above 0."""
    intensity = intensity * (1 + 0.08 * _smooth_noise(rng, intensity.shape, spacing, 3))
    intensity = gaussian_filter(intensity, (0, *2 * [rng.uniform(0.8, 1.2) / spacing[1]]))
    intensity = intensity * np.exp(rng.uniform(0.1, 0.25) * _smooth_noise(rng, intensity.shape, spacing, 35))
    # the magnitude of a complex signal: Rician noise
    real, imaginary = rng.normal(0, rng.uniform(0.04, 0.08), (2, *intensity.shape))
    intensity = np.hypot(intensity + real, imaginary)
    # above 0, because nnU-Net crops margins of zeros
    return np.clip(np.rint(rng.uniform(200, 1000) * intensity), 1, None).astype(np.int16)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...],
                  scale_mm: float) -> np.ndarray:
    """Draw a Gaussian random field with mean 0 and standard deviation 1, smooth over scale_mm."""
    field = gaussian_filter(rng.standard_normal(shape), [scale_mm / s for s in spacing])
    return (field - field.mean()) / field.std()


def _wobble(rng: np.random.Generator, angle: np.ndarray, amplitude: float) -> np.ndarray:
    """Draw the contour of an irregular disc: a factor within 1 +- 1.1 amplitude, periodic in the angle."""
    return 1 + amplitude * np.sum([rng.uniform(0.3, 1) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
                                   for k in (2, 3, 4)], axis=0)


def _write(file: Path, array: np.ndarray, spacing: tuple[float, ...]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing[::-1]])  # SimpleITK counts (x, y, z)
    sitk.WriteImage(image, str(file), True)
