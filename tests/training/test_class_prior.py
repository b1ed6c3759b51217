"""The class-prior correction: what is counted, its closed form, its bound, and its place in the loss."""
from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_confkd.training.class_prior import LIMIT, ClassPrior
from nnunet_confkd.training.losses import ConfKDLoss, PartialSupervision

IGNORE = 3
MANY = 10 ** 6  # batches: the voxel that each count has in addition is then below the tolerance


def batch_of(full: list[int], partial: list[int], inside=None) -> dict:
    """A batch of one fully and one partially annotated image, both a row of voxels."""
    target = torch.tensor([full, partial], dtype=torch.int16).reshape(2, 1, 1, -1)
    inside = torch.ones_like(target, dtype=torch.bool) if inside is None else torch.tensor(inside).reshape(target.shape)
    return {"target": target, "num_full": 1, "inside": inside}


def settled(prior: ClassPrior) -> list[float]:
    prior.counts *= MANY
    return prior.shift().tolist()


def test_the_correction_is_the_log_ratio_of_the_class_frequencies():
    prior = ClassPrior(3, IGNORE)
    # fully annotated: 5/8, 2/8, 1/8; annotated voxels of the partially annotated image: 1/4, 1/4, 2/4
    batch = prior(batch_of([0, 0, 0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 3, 3, 3, 3]))
    assert batch["prior_shift"].dtype == torch.float32 and batch["prior_shift"].shape == (3,)
    np.testing.assert_allclose(settled(prior), [log(2 / 5), 0, log(4)], atol=1e-4)


def test_the_highest_resolution_of_deep_supervision_is_counted():
    alone, deep = ClassPrior(3, IGNORE), ClassPrior(3, IGNORE)
    batch = batch_of([0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 3, 3])
    expected = alone(batch)["prior_shift"]
    lower = torch.full((2, 1, 1, 3), 1, dtype=torch.int16)
    assert torch.equal(deep({**batch, "target": [batch["target"], lower]})["prior_shift"], expected)


def test_padding_is_not_counted():
    """Nobody annotates the padding, but nnU-Net labels it as background in fully annotated images."""
    prior = ClassPrior(3, IGNORE)
    inside = [[True] * 4 + [False] * 4, [True] * 8]
    prior(batch_of([0, 1, 1, 2, 0, 0, 0, 0], [0, 1, 1, 2, 3, 3, 3, 3], inside))
    assert settled(prior) == [0, 0, 0]


def test_counts_are_those_of_all_batches():
    prior = ClassPrior(3, IGNORE)
    prior(batch_of([0, 0, 0, 0], [0, 3, 3, 3]))
    prior(batch_of([1, 1, 2, 2], [1, 2, 1, 2]))
    np.testing.assert_allclose(settled(prior), [log(0.2 / 0.5), log(0.4 / 0.25), log(0.4 / 0.25)], atol=1e-4)


@pytest.mark.parametrize("full, partial", [([0, 1, 2], [3, 3, 3]), ([], [0, 1, 2])])
def test_there_is_no_correction_before_both_kinds_have_been_seen(full, partial):
    prior = ClassPrior(3, IGNORE)
    target = torch.tensor(full + partial, dtype=torch.int16).reshape(-1, 1, 1, 3)
    batch = prior({"target": target, "num_full": int(bool(full)), "inside": torch.ones_like(target, dtype=torch.bool)})
    assert batch["prior_shift"].tolist() == [0, 0, 0]


def test_the_correction_is_bounded_for_a_class_that_is_never_annotated():
    prior = ClassPrior(3, IGNORE)
    prior(batch_of([0] * 8 + [1, 2], [1, 2] + [3] * 8))
    shift = settled(prior)
    assert shift[0] == -LIMIT and shift[1] == pytest.approx(log(5), abs=1e-4)


def test_strength_scales_the_correction():
    shifts = []
    for strength in (1.0, 0.25, 0.0):
        prior = ClassPrior(3, IGNORE, strength=strength)
        prior(batch_of([0, 0, 0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 3, 3, 3, 3]))
        shifts.append(prior.shift())
    assert torch.allclose(shifts[1], shifts[0] / 4) and not shifts[2].any() and shifts[0].any()


def test_the_correction_of_regions_is_the_difference_of_the_log_odds():
    prior = ClassPrior(2, IGNORE, regions=True)
    target = torch.zeros(2, 3, 1, 10)  # two regions and the ignore mask
    target[0, 0, 0, :5] = 1  # whole: 5/10
    target[0, 1, 0, :1] = 1  # core: 1/10
    target[1, 2, 0, 4:] = 1  # four annotated voxels
    target[1, 0, 0, :3] = 1  # 3/4
    target[1, 1, 0, :2] = 1  # 2/4
    prior({"target": target, "num_full": 1, "inside": torch.ones(2, 1, 1, 10, dtype=torch.bool)})
    np.testing.assert_allclose(settled(prior), [log(3), log(9)], atol=1e-4)


def test_the_corrected_loss_has_its_minimum_at_the_class_probabilities_of_all_voxels():
    """Not at those of the annotated voxels: with class probabilities p and annotation rates r of the classes the
    annotated voxels have frequencies q = p r / sum(p r). The softmax of log p + log(q / p) is q, so that the gradient
    of the cross-entropy is zero at log p with the correction, and at log q without."""
    p, rate = torch.tensor([0.9, 0.07, 0.03], dtype=torch.float64), torch.tensor([0.01, 0.2, 0.4], dtype=torch.float64)
    q = p * rate / (p * rate).sum()
    prior = ClassPrior(3, IGNORE)
    prior.counts = torch.stack((torch.cat((p, torch.ones(1))), torch.cat((q, torch.ones(1))))) * 1e12
    shift = prior.shift().double()

    def gradient(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone().requires_grad_()
        (-(q * (logits + shift).log_softmax(0)).sum()).backward()
        return logits.grad

    assert gradient(p.log()).abs().max() < 1e-6 < 0.1 < gradient(q.log()).abs().max()


# ---- in the loss ----------------------------------------------------------------------------------------------------

def joint_loss(**weights) -> ConfKDLoss:
    stock = DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, ignore_label=IGNORE,
                           dice_class=MemoryEfficientSoftDiceLoss)
    return ConfKDLoss(PartialSupervision(stock, IGNORE),
                      {"teacher": 0.0, "student": 0.0, "kl": 0.0, "entropy": 0.0} | weights)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 3, 6, 5, generator=generator) for _ in range(2))
    target = torch.randint(0, 3, (3, 1, 6, 5), generator=generator)
    target[1, :, 2:] = IGNORE
    target[2] = IGNORE
    return student, teacher, target


SHIFT = torch.tensor([-1.0, 0.5, 2.0])


def test_logits_of_images_that_are_not_fully_annotated_are_shifted_in_the_students_supervised_loss(images):
    student, teacher, target = images
    loss = joint_loss(student=1.0)
    shifted = student.clone()
    shifted[1:] += SHIFT.view(3, 1, 1)
    value, _ = loss(student, None, target, 1, prior_shift=SHIFT)
    assert torch.equal(value, loss(shifted, None, target, 1)[0])
    assert not torch.equal(value, loss(student, None, target, 1)[0])


@pytest.mark.parametrize("term", ["teacher", "kl", "entropy"])
def test_no_other_term_is_corrected(images, term):
    student, teacher, target = images
    loss = joint_loss(**{term: 1.0})
    values = [loss(student, teacher, target, 1, prior_shift=shift)[0] for shift in (SHIFT, None)]
    assert torch.equal(*values) and values[0] > 0


def test_a_batch_of_fully_annotated_images_has_no_correction(images):
    student, _, _ = images
    target = torch.zeros(3, 1, 6, 5)
    loss = joint_loss(student=1.0)
    assert torch.equal(loss(student, None, target, 3, prior_shift=SHIFT)[0], loss(student, None, target, 3)[0])


def test_a_corrected_loss_of_an_image_with_one_annotated_voxel_is_that_of_the_formula():
    """One annotated voxel of class 1 with equal logits: -log of exp(shift_1) / sum exp(shift), and no Dice."""
    stock = DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, weight_dice=0,
                           ignore_label=IGNORE, dice_class=MemoryEfficientSoftDiceLoss)
    loss = ConfKDLoss(PartialSupervision(stock, IGNORE), {"teacher": 0.0, "student": 1.0, "kl": 0.0, "entropy": 0.0})
    target = torch.full((1, 1, 2, 2), IGNORE)
    target[0, 0, 0, 0] = 1
    value, _ = loss(torch.zeros(1, 3, 2, 2), None, target, 0, prior_shift=SHIFT)
    assert value.item() == pytest.approx(-log(exp(0.5) / (exp(-1) + exp(0.5) + exp(2))))
