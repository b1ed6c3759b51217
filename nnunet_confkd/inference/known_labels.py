"""What is known of the voxels of a case whose label a model completes, and predictions that respect it."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nnunet_confkd.inference.prediction import export_and_measure

IMPOSSIBLE = -1e4  # the logit of a class that a voxel cannot have; its probability is 0 in any floating point type


@dataclass(frozen=True)
class KnownLabel:
    """A label in which some voxels are to be completed. It is sent to other processes.

    A voxel of the ignore label can have any class. In a case that is not annotated for all classes, a voxel of value 0
    is background or has one of the other classes.

    Attributes:
        file: The label file.
        ignore: The ignore label; None if the data set has none.
        listed: The values of the classes that the case is annotated for; None: it is for all.
    """
    file: Path
    ignore: int | None
    listed: tuple[int, ...] | None = None

    def open_to_others(self, label: np.ndarray) -> np.ndarray:
        """Return which voxels are background or have a class that the case is not annotated for."""
        return (label == 0) & (self.listed is not None)

    def missing(self, label: np.ndarray) -> np.ndarray:
        """Return which voxels are to be completed."""
        return self.open_to_others(label) | (label == (-1 if self.ignore is None else self.ignore))


def export_as_known(known: KnownLabel, logits, properties: dict, configuration_manager, plans_manager,
                    dataset_json: dict, output: str, *args,
                    **kwargs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Write a prediction as `export_and_measure` does, in which no voxel has a class that it is known not to have.

    Where the label says "background or one of the other classes", only these compete, so that their probabilities sum
    to 1. Elsewhere all classes do.

    Returns:
        The segmentation that was written, and the maps "entropy" and "confidence".
    """
    def export(logits):
        return export_and_measure(logits, properties, configuration_manager, plans_manager, dataset_json, output,
                                  *args, **kwargs)

    if known.listed is None:
        return export(logits)
    others = logits.clone() if isinstance(logits, torch.Tensor) else logits.copy()
    others[list(known.listed)] = IMPOSSIBLE
    of_others, maps_of_others = export(others)
    del others
    segmentation, maps = export(logits)
    writer = plans_manager.image_reader_writer_class()
    where = known.open_to_others(writer.read_seg(str(known.file))[0][0])
    segmentation = np.where(where, of_others, segmentation)
    writer.write_seg(segmentation, output + dataset_json["file_ending"], properties)
    return segmentation, {name: np.where(where, maps_of_others[name], found) for name, found in maps.items()}
