"""CutMix: each image of a batch gets a box of another one, with the labels of this box.

The student sees the mixed images. The teacher sees the images as they are, and its probabilities are mixed like the
labels. So the few fully annotated images appear beside many others, and the student must tell what is where without
knowing the surroundings.

Sources: S. Yun et al., "CutMix", ICCV 2019, arXiv 1905.04899; for segmentation from few labels G. French et al., BMVC
2020, arXiv 1906.01916; between labelled and unlabelled medical images Y. Bai et al., "Bidirectional copy-paste", CVPR
2023, arXiv 2305.00673.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHARES = 0.25, 0.75  # of an image that the box takes


@dataclass(frozen=True)
class Mix:
    """A box, and which image of the batch it is taken from.

    Attributes:
        shift: The box of image i is taken from image `(i - shift) % B`.
        low: The lower corner of the box, as a share of each axis.
        high: The upper corner.
    """
    shift: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __call__(self, batch: Tensor) -> Tensor:
        """Mix images, labels or logits.

        Args:
            batch: `(B, C, *spatial)`, at any resolution.

        Returns:
            A new tensor of the same shape.
        """
        mixed = batch.clone()
        box = (slice(None), slice(None), *(slice(round(low * size), round(high * size))
                                           for low, high, size in zip(self.low, self.high, batch.shape[2:])))
        mixed[box] = batch.roll(self.shift, 0)[box]
        return mixed


class CutMix:
    """Draws a :class:`Mix` for some of the batches, and adds it to them as "mix".

    Args:
        probability: Of a batch to be mixed.
    """

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, batch: dict) -> dict:
        """Draw with NumPy's random numbers, as nnU-Net's loader does.

        Args:
            batch: With "target", a label map or several, highest resolution first.

        Returns:
            The batch, with "mix" if it is to be mixed.
        """
        target = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        images = len(target[0])
        if images == 1 or np.random.uniform() >= self.probability:
            return batch
        # The corners lie between voxels of the lowest resolution, so that the box is the same at all of them.
        low, high = [], []
        side = np.random.uniform(*SHARES) ** (1 / (target[0].ndim - 2))
        for size in target[-1].shape[2:]:
            width = max(1, round(side * size))
            start = np.random.randint(size - width + 1)
            low.append(start / size)
            high.append((start + width) / size)
        return {**batch, "mix": Mix(int(np.random.randint(1, images)), tuple(low), tuple(high))}


class FullCutMix(CutMix):
    """Exchanges boxes among the fully annotated images of some of the batches, for both branches: an augmentation.

    It comes before hints are simulated, which are then those of the mixed labels.
    """

    def __call__(self, batch: dict) -> dict:
        """Draw with NumPy's random numbers.

        Args:
            batch: With "data", "target", "num_full" and, if the loader knows the padding, "inside".

        Returns:
            The batch with mixed images, labels and padding.
        """
        number = batch["num_full"]
        if number < 2:
            return batch
        target = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        mix = super().__call__({"target": [tensor[:number] for tensor in target]}).get("mix")
        if mix is None:
            return batch

        def exchanged(tensor: Tensor) -> Tensor:
            return torch.cat((mix(tensor[:number]), tensor[number:]))

        return batch | {key: mixed(batch[key], exchanged) for key in ("data", "target", "inside") if key in batch}


def mixed(batch: Tensor | list[Tensor], mix: Callable[[Tensor], Tensor] | None):
    """Mix a tensor, or each of a list. None leaves it as it is."""
    if mix is None:
        return batch
    return mix(batch) if torch.is_tensor(batch) else [mix(tensor) for tensor in batch]
