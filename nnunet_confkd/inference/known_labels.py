"""Predictions that respect what is known of the voxels of a case."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_confkd.errors import InputError, some
from nnunet_confkd.inference.completed_case import KnownLabel
from nnunet_confkd.inference.prediction import export_and_measure

CERTAIN = 1e4  # a logit whose probability is 1 in any floating point type, and that of its negative 0


def require_possible(labels: LabelManager, possible: Mapping[int, tuple[int, ...]]) -> None:
    """Check that nnU-Net's export of regions can write what agrees with the annotations.

    nnU-Net writes for each voxel the value of the last region, in the order of the regions, that it belongs to.

    Args:
        labels: nnU-Net's label manager.
        possible: As in :class:`KnownLabel`.

    Raises:
        InputError: A region that is predicted would get a value that contradicts the annotated ones.
    """
    if not labels.has_regions:
        return
    for values in set(possible.values()):
        heads = _heads(labels, values)
        order = labels.regions_class_order
        certain = max((head for head, known in enumerate(heads) if known), default=-1)
        written = [0 if certain < 0 else order[certain],
                   *(order[head] for head in range(certain + 1, len(heads)) if heads[head] is None)]
        if wrong := sorted(set(written) - set(values)):
            raise InputError(f"a voxel that is known to have one of the values {some(values)} could get {some(wrong)} "
                             f"by \"regions_class_order\". Regions that are not annotated can be completed only if any "
                             f"two of them either do not overlap, or lie one in the other, the larger one first. "
                             f"Predict these images instead: confkd predict")


def _heads(labels: LabelManager, values: tuple[int, ...]) -> list[bool | None]:
    """Return for each head whether all these values belong to it, none does (False), or only some do (None)."""
    if not labels.has_regions:
        return [None if head in values else False for head in range(labels.num_segmentation_heads)]
    held = [{value in np.atleast_1d(region) for value in values} for region in labels.foreground_regions]
    return [None if len(found) > 1 else found.pop() for found in held]


def export_as_known(known: KnownLabel, label: np.ndarray, logits, properties: dict, configuration_manager,
                    plans_manager, dataset_json: dict, output: str, *args,
                    **kwargs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Write a prediction as `export_and_measure` does, in which no voxel has a class that it is known not to have.

    Where the label says "background or one of the other classes", only these compete, so that their probabilities sum
    to 1. With regions, those that the voxel is known to belong to, or not to, are certain. Elsewhere all classes
    compete.

    Args:
        known: What is known.
        label: That of the case, `(*spatial)`, as nnU-Net reads it.
        logits: This and all else are the arguments of `export_and_measure`.

    Returns:
        The segmentation that was written, and the maps "entropy" and "confidence".
    """
    def export(logits):
        return export_and_measure(logits, properties, configuration_manager, plans_manager, dataset_json, output,
                                  *args, **kwargs)

    if not known.possible:
        return export(logits)
    writer, labels = plans_manager.image_reader_writer_class(), plans_manager.get_label_manager(dataset_json)
    parts = []
    for values in sorted(set(known.possible.values())):
        constrained = logits.clone() if isinstance(logits, torch.Tensor) else logits.copy()
        for head, certain in enumerate(_heads(labels, values)):
            if certain is not None:
                constrained[head] = CERTAIN if certain else -CERTAIN
        parts.append((values, *export(constrained)))
        del constrained
    segmentation, maps = export(logits)
    for values, of_part, maps_of_part in parts:
        where = np.isin(label, [value for value, others in known.possible.items() if others == values])
        # what nnU-Net crops away is background, which may contradict the label
        of_part = np.where(np.isin(of_part, values), of_part, label)
        segmentation = np.where(where, of_part, segmentation)
        maps = {name: np.where(where, maps_of_part[name], found) for name, found in maps.items()}
    writer.write_seg(segmentation, output + dataset_json["file_ending"], properties)
    return segmentation, maps
