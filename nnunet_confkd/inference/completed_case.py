"""One case whose label is completed: what is known of its voxels, and what becomes of its prediction.

This module does not import PyTorch, so that the processes which check and write cases start quickly.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nnunet_confkd.data.images import Picture, count_voxels, read, write
from nnunet_confkd.data.raw_format import Case
from nnunet_confkd.data.supervision import kind_of
from nnunet_confkd.data.watershed import spread_volume
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.review import case_score, map_ending

THICK = 3  # slices are flooded one by one if they are so many times thicker than wide, as nnU-Net resamples them
MOST = 20_000_000  # voxels: a larger image is flooded on a coarser grid, because that takes 20 to 35 bytes a voxel
# Folders in the raw folder of the new data set
CONFIDENCE, PREDICTED, ROWS = "confidence", ".predicted", ".predicted/rows"


@dataclass(frozen=True)
class KnownLabel:
    """A label in which some voxels are to be completed. It is sent to other processes.

    A voxel of the ignore label can have any class. In a case that is not annotated for all classes, other voxels can
    have some: those that agree with what is annotated.

    Attributes:
        file: The label file.
        ignore: The ignore label; None if the data set has none.
        possible: {value: values that its voxels can have}; see
            :func:`nnunet_confkd.data.annotated_classes.possible_values`. Voxels of other values keep theirs.
    """
    file: Path
    ignore: int | None
    possible: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def missing(self, label: np.ndarray) -> np.ndarray:
        """Return which voxels are to be completed."""
        found = np.zeros(label.shape, bool)
        for value in (*self.possible, *(() if self.ignore is None else (self.ignore,))):
            found |= label == value  # np.isin sorts all voxels where a value does not fit their type
        return found

    def agrees(self, before: np.ndarray, after: np.ndarray) -> bool:
        """Return whether the voxels that can have some values have one of these in a completed label."""
        return all(np.isin(after[before == value], others).all() for value, others in self.possible.items())


def check_case(case: Case, allowed: list[int], channels: int) -> tuple[list[str], dict[int, int]]:
    """Return the problems of one case, and the voxels per label."""
    problems, counts = [], dict.fromkeys(allowed, 0)
    try:
        pictures = [volume.read() for volume in case.images]
        label = case.label.read()
    except InputError as error:
        return [str(error)], counts
    found = sum(len(picture.voxels) for picture in pictures)
    if found != channels:
        problems.append(f"{case.images[0].file}: the case '{case.name}' has {found} of {channels} channels")
    for picture in pictures:
        problems += [f"{case.label.file}: is on another grid than {case.images[0].file}: {difference}"
                     for difference in label.geometry.differences(picture.geometry)]
    counts = count_voxels(label.voxels, allowed)
    if sum(counts.values()) != label.voxels.size:
        strange = [value for value in np.unique(label.voxels).tolist() if value not in allowed]
        problems.append(f"{case.label.file}: holds the values {strange[:10]}, which dataset.json does not list")
    return problems, counts


@dataclass(frozen=True)
class CompletedCase:
    """An incomplete case and how to complete it. It is sent to other processes.

    Attributes:
        case: The name of the case.
        known: The label of the source.
        target: The raw folder that is being written.
        file_ending: That of the data set.
        ignore: The value of ignored voxels; None: all voxels are filled.
        threshold: Only voxels with a confidence above it are filled. None: all.
        fills_all: Whether all are filled if there is no threshold. If not, those that are predicted to be ignored stay
            ignored.
    """
    case: str
    known: KnownLabel
    target: Path
    file_ending: str
    ignore: int | None
    threshold: float | None
    fills_all: bool = True

    def fill(self, file: Path) -> Picture:
        """Read the label `file` and fill what is missing; what the model is not sure of becomes ignored."""
        picture = read(file)
        label = picture.voxels[0]
        filled = self._predicted(PREDICTED, self.file_ending, label.shape)
        if self.threshold is not None:
            confidence = self._predicted(CONFIDENCE, map_ending(self.file_ending), label.shape)
            filled = np.where(confidence > self.threshold, filled, self.ignore)
        filled = np.where(self.known.missing(label), filled, label)
        return Picture(filled.astype(np.uint16 if (self.ignore or filled.max()) > 255 else np.uint8)[None],
                       picture.geometry)

    def review(self, label: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, entropy: np.ndarray) -> dict:
        """Compute the row of the case in the review list.

        Args:
            label: That of the source, `(Z, Y, X)`, as are the others.
            predicted: The segmentation.
            confidence: Of each voxel.
            entropy: Normalised.

        Returns:
            The score of :func:`nnunet_confkd.inference.review.case_score`, what the case becomes ("kind"), how many
            voxels are annotated, filled and left, and how well the prediction agrees with the annotated ones.
        """
        missing = self.known.missing(label)
        left = 0 if self.threshold is None else int(np.count_nonzero(missing & (confidence <= self.threshold)))
        annotated = missing.size - int(np.count_nonzero(missing))
        agreement = np.count_nonzero((predicted == label) & ~missing) / annotated if annotated else None
        ignore = -2 if self.ignore is None else self.ignore
        return {"case": self.case, **case_score(entropy, predicted, missing),
                "kind": kind_of({ignore: left, 0: label.size - left}, ignore),
                "annotated_voxels": annotated, "filled_voxels": label.size - annotated - left, "ignored_voxels": left,
                "mean_confidence": float(confidence.mean(dtype=np.float64, where=missing)) if missing.any() else None,
                "agreement_with_annotations": agreement}

    def flood(self, images: Sequence[Path]) -> dict:
        """Spread the annotations by a watershed, and write what it finds where the prediction of a model would be.

        Voxels that it does not reach are predicted to be ignored. A volume of thick slices is flooded slice by slice.

        Args:
            images: The files of the channels.

        Returns:
            The "kind" that the case becomes, and how many voxels are annotated, filled and left.
        """
        picture = read(self.known.file)
        label = picture.voxels[0].astype(np.int16)
        hints = label != self.known.ignore
        image = np.concatenate([read(of_channel).voxels for of_channel in images]).astype(np.float32)
        # else the channel of the largest numbers would decide alone
        image /= np.maximum(image.std(tuple(range(1, image.ndim)), keepdims=True), 1e-8)
        spacing = picture.geometry.spacing[::-1]
        across = int(np.argmax(spacing)) if label.ndim == 3 else 0
        thick = label.ndim == 3 and spacing[across] >= THICK * max(np.delete(spacing, across))
        # the slices of the thickest axis come first
        image, label, hints = (np.moveaxis(array, across - label.ndim, -label.ndim) for array in (image, label, hints))
        patch_size = label.shape[1:] if thick else label.shape
        found = spread_volume(image, label, hints, np.ones(label.shape, bool), patch_size, MOST)
        found = np.moveaxis(np.where(found > 0, found - 1, self.known.ignore), 0, across).astype(np.int16)
        write(self.target / PREDICTED / f"{self.case}{self.file_ending}", found, picture.geometry)
        annotated, left = int(np.count_nonzero(hints)), int(np.count_nonzero(found == self.known.ignore))
        return {"kind": kind_of({self.known.ignore: left, 0: found.size - left}, self.known.ignore),
                "annotated_voxels": annotated, "filled_voxels": found.size - annotated - left, "ignored_voxels": left}

    def is_wrong(self) -> bool:
        """Read back what was written: whether an annotation has changed, or a voxel that had to be filled was not."""
        before = read(self.known.file).voxels[0]
        after = read(self.target / "labelsTr" / f"{self.case}{self.file_ending}").voxels[0]
        annotated = ~self.known.missing(before)
        kept = np.array_equal(before[annotated], after[annotated])
        unsure = (after == self.ignore) if self.threshold is not None else np.zeros(after.shape, bool)
        must_fill = self.fills_all and self.threshold is None and self.ignore is not None
        left = must_fill and bool((after == self.ignore).any())
        return not kept or left or not self.known.agrees(before[~unsure], after[~unsure])

    def _predicted(self, folder: str, ending: str, shape: tuple[int, ...]) -> np.ndarray:
        return read(self.target / folder / f"{self.case}{ending}").voxels[0].reshape(shape)
