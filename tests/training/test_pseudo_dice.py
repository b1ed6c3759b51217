"""The counts behind the pseudo-Dice: of the annotated voxels alone, class by class. The reference is NumPy."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_confkd.training.pseudo_dice import COUNTS, dice, hard_counts

CLASSES, IGNORE = 3, 3


@pytest.mark.parametrize("ndim", (2, 3))
@pytest.mark.parametrize("ignore_label", (None, IGNORE))
@pytest.mark.parametrize("regions", (False, True), ids=("labels", "regions"))
def test_counts_are_those_of_the_annotated_voxels_of_each_class(ndim, ignore_label, regions):
    random = torch.Generator().manual_seed(ndim)
    logits = torch.randn(2, CLASSES, *ndim * [6], generator=random)
    labels = torch.randint(0, CLASSES, (2, 1, *ndim * [6]), generator=random, dtype=torch.int16)
    annotated = torch.rand(labels.shape, generator=random) < 0.5
    truth = torch.cat([labels == c for c in range(CLASSES)], 1)
    if regions:
        predicted, target = logits > 0, truth
        target = target if ignore_label is None else torch.cat((target, ~annotated), 1)
    else:
        winner = logits.argmax(1, keepdim=True)
        predicted = torch.cat([winner == c for c in range(CLASSES)], 1)
        target = labels if ignore_label is None else torch.where(annotated, labels, IGNORE)
    counted = np.ones(labels.shape, bool) if ignore_label is None else annotated.numpy()
    p, t = ([x[:, [c]].numpy()[counted] for c in range(0 if regions else 1, CLASSES)] for x in (predicted, truth))
    expected = {"tp_hard": [(a & b).sum() for a, b in zip(p, t)], "fp_hard": [(a & ~b).sum() for a, b in zip(p, t)],
                "fn_hard": [(~a & b).sum() for a, b in zip(p, t)]}
    found = hard_counts(logits, target, ignore_label, regions)
    assert {name: values.tolist() for name, values in found.items()} == expected
    assert dice(*(found[name] for name in COUNTS)) == pytest.approx(
        [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(p, t)])


def test_a_class_in_no_voxel_has_no_dice():
    with np.errstate(invalid="ignore"):
        found = dice(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 0.0]))
    assert np.isnan(found[0]) and found[1] == pytest.approx(2 / 3)
