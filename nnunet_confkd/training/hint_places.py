"""Where simulated annotations lie: a pattern of another image is moved to a place in its class where it fits."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from nnunet_confkd.training.hint_patterns import Cloud, Depth, Pattern, Voxels, corner_of, edge_strength, evenly

PLACES = 48  # number of random places that are tried for a pattern
FITS = 0.95  # share of a pattern that must lie inside its class
LARGE = 200_000  # voxels; in a larger class the innermost voxels are not searched if a pattern fits


def slices_of(profile: tuple[int, np.ndarray], inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image's slices of a profile, shifted at random."""
    axis, slices = profile
    size = inside.shape[axis]
    annotated = np.resize(np.roll(slices, rng.integers(len(slices))), size)
    return inside & annotated.reshape([size if i == axis else 1 for i in range(inside.ndim)])


class Place(Voxels):
    """One class in one image, where its hints are to be placed.

    Args:
        mask: Bool, where the class is in its bounding box.
        box: The bounding box.
        shape: That of the patch.
        inside: Bool, `(*spatial)`: where the image is. None: everywhere.
        data: The image, `(channels, *spatial)`.
        depth: How deep real annotations of the class lie.
        margin: How far from the border of the class they stay (see :class:`Margin`).

    Attributes:
        free: Bool, of the shape of `mask`: the voxels of the class that far from its border, or farther. In a class
            that is too thin they are the farthest ones.
        number_free: Their number; 0 if annotations come close to the border.
    """

    def __init__(self, mask: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...], inside: np.ndarray | None,
                 data: np.ndarray, depth: Depth, margin: int = 1):
        super().__init__(mask, corner_of(box))
        self.shape, self.inside, self.data, self.depth, self.free = shape, inside, data, depth, mask
        solid = self._solid() if margin > 1 else mask
        for distance in range(margin, 1, -1):
            free = eroded(solid, distance)[(slice(1, -1),) * mask.ndim] & mask
            if free.any():
                self.free = free
                break
        self.number_free = 0 if self.free is mask else np.count_nonzero(self.free)

    def _solid(self) -> np.ndarray:
        """The class and one voxel around its box, where what is outside of the image counts as the class: nobody knows
        where a class ends that the image cuts."""
        low, high = self.corner - 1, self.corner + self.mask.shape + 1
        around = tuple(slice(max(0, start), min(stop, n)) for start, stop, n in zip(low, high, self.shape))
        solid = (np.zeros([side.stop - side.start for side in around], bool) if self.inside is None
                 else ~self.inside[around])
        inner = tuple(slice(start - side.start, start - side.start + n)
                      for start, side, n in zip(self.corner, around, self.mask.shape))
        solid[inner] |= self.mask
        return np.pad(solid, [(side.start - start, stop - side.stop) for start, stop, side in zip(low, high, around)],
                      mode="edge")

    def paint(self, hints: np.ndarray, voxels: Voxels) -> None:
        """Set those of the voxels in a mask of the patch that are free."""
        low = np.maximum(self.corner, voxels.corner)
        high = np.minimum(self.corner + self.mask.shape, voxels.corner + voxels.mask.shape)
        if (low >= high).any():
            return
        here, there, patch = (tuple(slice(a, b) for a, b in zip(low - corner, high - corner))
                              for corner in (self.corner, voxels.corner, np.zeros_like(low)))
        hints[patch] |= self.free[here] & voxels.mask[there]

    def set(self, hints: np.ndarray, numbers: np.ndarray) -> None:
        """Set some voxels of the class, by their numbers, in a mask of the patch."""
        chosen = np.zeros(self.mask.size, bool)
        chosen[self.of_mask[numbers]] = True
        hints[tuple(map(slice, self.corner, self.corner + self.mask.shape))] |= chosen.reshape(self.mask.shape)

    def fitting(self, voxels: np.ndarray) -> np.ndarray:
        """Find the places where a pattern fits, and where the end of the image cuts little of it.

        A pattern that the end of the image cuts says nothing about the class, so only its voxels in the image count.

        Args:
            voxels: Those of the pattern at several places, `(places, n, dimensions)`.

        Returns:
            The numbers of the places.
        """
        kept = (~self._is_outside(voxels)).mean(1)
        fit = _look_up(self.free, voxels - self.corner).mean(1) / np.maximum(kept, 1e-9)
        return np.flatnonzero((fit >= FITS) & (kept >= 0.9 * kept[fit >= FITS].max(initial=0.5)))

    def surrounded(self, voxels: np.ndarray) -> np.ndarray:
        """How much of the surroundings of the voxels `(places, n, dimensions)` belongs to the class, `(places,)`.

        Nobody knows where a class ends that the image cuts: what is outside counts as the class.
        """
        of_class, of_image = _Shifted(self.mask, voxels - self.corner), _Shifted(self.inside, voxels, self.shape)
        shares = [(of_class(axis) | ~of_image(axis)).mean(-1) for axis in range(voxels.shape[-1])]
        return sum(np.stack(shares, 1).reshape(-1, len(voxels)))  # in this order for any number of places

    def _is_outside(self, voxels: np.ndarray) -> np.ndarray:
        """Which of the voxels `(..., dimensions)` do not lie in the image."""
        if self.inside is None:
            return _flat_index(self.shape, voxels) < 0
        return ~_look_up(self.inside, voxels)

    def innermost(self, size: int, rng: np.random.Generator, touching: bool) -> np.ndarray:
        """The innermost voxels of the class, the free ones first; of equally deep ones those next to a random one.

        Args:
            size: Their number, but at most two thirds of the class, or what is free if this is more.
            rng: Source of random numbers.
            touching: Whether voxels that touch another class may be among them. They are among them in any case if
                less than a third would be left.

        Returns:
            Their numbers in the class, in ascending order, `(n,)`.
        """
        size = max(1, min(size, max(2 * self.size // 3, self.number_free)))
        depth = ndimage.distance_transform_cdt(self._solid(), "taxicab")[(slice(1, -1),) * self.mask.ndim][self.mask]
        if self.number_free:
            depth[self.free[self.mask]] += depth.max()  # what is free comes first
        deepest = np.flatnonzero(depth == depth.max())
        centre = self.voxels(deepest[rng.integers(len(deepest), size=1)])
        least = np.partition(depth, -size)[-size]  # to sort all takes longer
        chosen, equal = depth > least, np.flatnonzero(depth == least)
        nearest = np.argsort(((self.voxels(equal) - centre) ** 2).sum(1), kind="stable")
        chosen[equal[nearest[:size - np.count_nonzero(chosen)]]] = True
        untouched = chosen & (depth > 1)
        return np.flatnonzero(untouched if not touching and 3 * np.count_nonzero(untouched) >= size else chosen)


class _Shifted:
    """Looks up a mask at voxels that are shifted along one axis by each of `STEPS`; False beyond the mask.

    Args:
        mask: Bool. None: true everywhere.
        voxels: `(..., dimensions)`.
        shape: That of the mask, if it is None.
    """

    STEPS = (-1, -2, -4, 1, 2, 4)

    def __init__(self, mask: np.ndarray | None, voxels: np.ndarray, shape: tuple[int, ...] = ()):
        self.flat, self.shape = None if mask is None else mask.ravel(), shape if mask is None else mask.shape
        self.axes = [np.ascontiguousarray(voxels[..., axis]) for axis in range(voxels.shape[-1])]
        self.strides = [int(np.prod(self.shape[axis + 1:])) for axis in range(len(self.shape))]
        self.place = sum(axis * stride for axis, stride in zip(self.axes, self.strides))
        within = [(axis >= 0) & (axis < size) for axis, size in zip(self.axes, self.shape)]
        self.others = [np.logical_and.reduce(within[:i] + within[i + 1:]) for i in range(len(within))]
        self.steps = np.reshape(self.STEPS, (-1, *[1] * (voxels.ndim - 1)))

    def __call__(self, axis: int) -> np.ndarray:
        """The mask at the voxels, moved along an axis: bool, `(steps, ...)`."""
        moved = self.axes[axis] + self.steps
        found = self.others[axis] & (moved >= 0) & (moved < self.shape[axis])
        if self.flat is not None:
            found &= self.flat[np.where(found, self.place + self.steps * self.strides[axis], 0)]
        return found


def place_pattern(pattern: Voxels, place: Place, hints: np.ndarray, rng: np.random.Generator,
                  whole: bool = True) -> None:
    """Move a pattern to a place in its class where it fits, and set its voxels there.

    Args:
        pattern: The voxels of the pattern.
        place: The class, to whose depth the edges that are found here are added.
        hints: Bool, of the shape of the patch, which is changed.
        rng: Source of random numbers.
        whole: Whether the components may still be moved one by one.
    """
    if 2 * pattern.size > place.number_free > 0 and place.size <= LARGE:
        # Most of what is free is annotated. The pattern would leave much of it out wherever it is moved.
        place.set(hints, place.innermost(pattern.size, rng, touching=False))
        return
    shifts = (place.voxels(rng.integers(place.size, size=PLACES))
              - pattern.voxels(rng.integers(pattern.size, size=PLACES)))
    shifts = np.concatenate((shifts, np.zeros_like(shifts[:1])))
    moved = pattern.sample() + shifts[:, None]
    good = place.fitting(moved)
    if len(good):
        surrounded = place.surrounded(moved[good])
        best = good[surrounded.argmax()]
        innermost, seen = None, moved[best]
        if place.size <= LARGE:
            numbers = place.innermost(pattern.size, rng, touching=False)
            some = place.voxels(numbers[evenly(len(numbers))])
            if place.surrounded(some[None])[0] > surrounded.max():
                innermost, seen = numbers, some
        if not place.number_free:
            place.depth.add("anywhere", edge_strength(place.data, moved[good[0]]))
            place.depth.add("innermost", edge_strength(place.data, seen))
        deep = rng.random() < place.depth.value()
        if deep and innermost is not None:
            place.set(hints, innermost)
        else:
            place.paint(hints, pattern.moved(shifts[best if deep else good[0]]))
    elif whole:
        for part in pattern.components():
            place_pattern(part, place, hints, rng, whole=False)
    else:
        place.set(hints, place.innermost(pattern.size, rng, touching=rng.random() >= place.depth.value()))


def background_around(foreground: Cloud, patterns: Sequence[Pattern], place: Place,
                      rng: np.random.Generator) -> Voxels | None:
    """Move a pattern of the background to where it lay around the annotated foreground of its own image.

    The background is nearly everywhere, so that its extent does not tell where it is annotated. Annotators often mark
    it round the organs.

    Args:
        foreground: The hints of the other classes.
        patterns: Of the background. Those whose image had about as large a foreground are tried first.
        place: The background of the image.
        rng: Source of random numbers.

    Returns:
        The voxels; None if no pattern fits there.
    """
    known = [pattern for pattern in patterns if pattern.foreground]
    known.sort(key=lambda pattern: abs(np.log(pattern.foreground.spread / foreground.spread)) + 0.1 * rng.random())
    for pattern in known:
        voxels, reach = pattern.voxels(), np.array(place.shape) // 16
        shifts = rng.integers(-reach, reach + 1, (PLACES // 2, len(reach)))
        shifts[0] = 0
        shifts += np.rint(foreground.centre - pattern.foreground.centre).astype(int)
        good = place.fitting(voxels.sample() + shifts[:, None])
        if len(good):
            return voxels.moved(shifts[good[0]])
    return None


def _look_up(mask: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """The mask at the voxels `(..., dimensions)`; False beyond it."""
    place = _flat_index(mask.shape, voxels)
    return np.where(place < 0, False, mask.ravel()[place])


def _flat_index(shape: tuple[int, ...], voxels: np.ndarray) -> np.ndarray:
    """The number of each of the voxels `(..., dimensions)` in an array of this shape; -1 beyond it."""
    place, within = 0, True
    for axis, size in enumerate(shape):
        coordinate = voxels[..., axis]
        place = place * size + coordinate
        within &= (coordinate >= 0) & (coordinate < size)
    return np.where(within, place, -1)


def eroded(mask: np.ndarray, distance: int) -> np.ndarray:
    """The voxels of a mask that are at least so far from what is not in it, diagonal neighbours being 1 away."""
    for axis in range(mask.ndim):
        mask = np.pad(mask, [(distance - 1, distance - 1) if i == axis else (0, 0) for i in range(mask.ndim)],
                      mode="edge")
        length = 1  # a voxel is the minimum of so many
        while length < 2 * distance - 1:
            step = min(length, 2 * distance - 1 - length)
            first, second = ((slice(None),) * axis + (part,) for part in (slice(None, -step), slice(step, None)))
            mask = mask[first] & mask[second]
            length += step
    return mask
