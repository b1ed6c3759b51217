"""A watershed spreads annotations over the whole image: a first guess of a whole label, which needs no training.

The annotations flood the image, in the order of the strength of its edges, and meet along strong edges. So the guess
tells the teacher which edges lie between the annotations of two classes. It is only a guess: the teacher learns from
simulated annotations of fully annotated images how far to trust it.

Source: L. Vincent, P. Soille, "Watersheds in digital spaces: an efficient algorithm based on immersion simulations",
IEEE Transactions on Pattern Analysis and Machine Intelligence 13(6), 1991. Maps that grow from annotations along the
image are common inputs of interactive segmentation: G. Wang et al., "DeepIGeoS: a deep interactive geodesic framework
for medical image segmentation", the same journal 41(7), 2019, arXiv 1707.00652.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy  # its modules are loaded when they are used, and so are skimage's
import skimage

SMOOTH = 1.0  # voxels: standard deviation of the Gaussian derivatives that find edges
MOST = 300_000  # voxels; a larger patch is flooded on a coarser grid


def spread(image: np.ndarray, labels: np.ndarray, hints: np.ndarray, inside: np.ndarray | None = None,
           steps: Sequence[int] | None = None) -> np.ndarray:
    """Spread annotations over an image.

    Args:
        image: `(channels, *spatial)`.
        labels: Integers from 0, `(*spatial)`. Only those of annotated voxels count.
        hints: Bool, `(*spatial)`: which voxels are annotated.
        inside: Bool, `(*spatial)`: where the image is. None: everywhere.
        steps: As of :func:`coarse_steps`. None: those of a patch of this size.

    Returns:
        int16, `(*spatial)`: label + 1; 0 outside of the image, and everywhere if no background is annotated: the
        foreground would fill the image.

    Examples:
        >>> image = np.array([[[0., 0., 0., 0., 9., 9.]]])  # one channel, with an edge
        >>> labels, hints = np.array([[0, 0, 0, 0, 0, 2]]), np.array([[True, False, False, False, False, True]])
        >>> spread(image, labels, hints).tolist()
        [[1, 1, 1, 1, 3, 3]]
    """
    if not (hints & (labels == 0)).any():
        return np.zeros(labels.shape, np.int16)
    steps = coarse_steps(labels.shape) if steps is None else steps
    seeds = np.where(hints, labels + 1, 0).astype(np.int16)
    edges: np.ndarray = sum(scipy.ndimage.gaussian_gradient_magnitude(_blocks(channel, steps, np.mean), SMOOTH)
                            for channel in np.asarray(image, np.float32))
    where = None if inside is None or inside.all() else _blocks(inside, steps, np.max)
    # of several labels in a block the highest one
    found = skimage.segmentation.watershed(edges, _blocks(seeds, steps, np.max).astype(np.int32), mask=where)
    for axis, step in enumerate(steps):
        found = found.repeat(step, axis) if step > 1 else found
    found = np.where(hints, seeds, found[tuple(map(slice, labels.shape))].astype(np.int16))
    return found if where is None else np.where(inside, found, 0)


def spread_volume(image: np.ndarray, labels: np.ndarray, hints: np.ndarray, inside: np.ndarray,
                  patch_size: Sequence[int], most: int | None = None) -> np.ndarray:
    """Spread the annotations of a whole image: slice by slice for a 2-D network, else on the grid of its patches.

    Args:
        image: `(channels, z, y, x)`.
        labels: As of :func:`spread`, `(z, y, x)`.
        hints: As of :func:`spread`.
        inside: As of :func:`spread`.
        patch_size: That of the network.
        most: As of :func:`coarse_steps`.

    Returns:
        As of :func:`spread`.
    """
    steps = coarse_steps(patch_size, most)
    if len(patch_size) == labels.ndim:
        return spread(image, labels, hints, inside, steps)
    return np.stack([spread(image[:, z], labels[z], hints[z], inside[z], steps) for z in range(len(labels))])


def coarse_steps(patch_size: Sequence[int], most: int | None = None) -> list[int]:
    """Choose the grid that is flooded: how many voxels one of its voxels covers along each axis.

    Large patches are flooded on a coarser grid, because that would take a second. Their longest axes are halved.

    Args:
        patch_size: That of the network.
        most: The number of voxels that are flooded at most. None: `MOST`.

    Examples:
        >>> coarse_steps((128, 128, 128)), coarse_steps((16, 256, 256)), coarse_steps((512, 512))
        ([2, 2, 2], [1, 2, 2], [1, 1])
    """
    steps, most = [1] * len(patch_size), MOST if most is None else most
    while np.prod(sizes := [-(-size // step) for size, step in zip(patch_size, steps)]) > most:
        steps[int(np.argmax(sizes))] *= 2
    return steps


def _blocks(values: np.ndarray, steps: Sequence[int], of_block: Callable[..., np.ndarray]) -> np.ndarray:
    """Reduce each block of an array to one value. The last blocks may be smaller."""
    if max(steps) == 1:
        return values
    padding = [(0, -size % step) for size, step in zip(values.shape, steps)]
    if np.any(padding):
        values = np.pad(values, padding, mode="edge")
    pairs = [number for size, step in zip(values.shape, steps) for number in (size // step, step)]
    return of_block(values.reshape(pairs), tuple(range(1, len(pairs), 2)))
