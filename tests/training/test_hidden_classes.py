"""Images that are not annotated for all classes, in the losses: the marginal cross-entropy and Dice.

What is computed by hand is derived beside it. `listed` tells for each image which heads are annotated; head 0 of labels
is the background.
"""
from __future__ import annotations

from math import log

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss, SoftDiceLoss

from nnunet_confkd.training.class_prior import ClassPrior
from nnunet_confkd.training.losses import ConfKDLoss, PartialSupervision, hide_unlisted, merge_unlisted
from nnunet_confkd.training.pseudo_dice import hard_counts

HEADS = 4
IGNORE = HEADS
SMOOTH = 1e-5
# of three images: the first lists classes 1 and 3, the second all, the third class 2
LISTED = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)
LISTED_REGIONS = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
ALL = torch.ones(3, HEADS, dtype=torch.bool)

each_dimension = pytest.mark.parametrize("ndim", (2, 3), ids=("2d", "3d"))
each_head = pytest.mark.parametrize("regions", (False, True), ids=("softmax", "regions"))


def random_logits(ndim: int = 2, seed: int = 0, dtype=torch.float64, images: int = 3) -> torch.Tensor:
    return 2 * torch.randn(images, HEADS, *ndim * [5], generator=torch.Generator().manual_seed(seed), dtype=dtype)


def listed_target(ndim: int = 2, regions: bool = False, ignored: float = 0.0, listed=LISTED) -> torch.Tensor:
    """A random target in which nothing lies that is not listed; a share of it is ignored."""
    generator = torch.Generator().manual_seed(1)
    ignore = torch.rand(3, 1, *ndim * [5], generator=generator) < ignored
    if regions:
        heads = torch.rand(3, HEADS, *ndim * [5], generator=generator) < 0.4
        return torch.cat((hide_unlisted(heads, LISTED_REGIONS, regions=True), ignore), 1)
    labels = torch.randint(0, HEADS, ignore.shape, generator=generator)
    return torch.where(ignore, IGNORE, hide_unlisted(labels, listed))


def stock(ndim: int = 2, regions: bool = False, ignore: bool = True, ce: float = 1.0, dice: float = 1.0,
          dice_class=MemoryEfficientSoftDiceLoss):
    """nnU-Net's loss; as in its plans, the Dice is that of the batch in 2-D, and of each image in 3-D."""
    options = {"batch_dice": ndim == 2, "smooth": SMOOTH, "do_bg": regions, "ddp": False}
    weights = {"weight_ce": ce, "weight_dice": dice, "dice_class": dice_class}
    if regions:
        return DC_and_BCE_loss({}, options, use_ignore_label=ignore, **weights)
    return DC_and_CE_loss(options, {}, ignore_label=IGNORE if ignore else None, **weights)


def supervised(ndim: int = 2, regions: bool = False, **options) -> PartialSupervision:
    return PartialSupervision(stock(ndim, regions, **options), IGNORE, regions)


# ---- merging --------------------------------------------------------------------------------------------------------

@each_dimension
def test_the_background_gets_the_probabilities_of_the_classes_that_are_not_listed(ndim):
    logits = random_logits(ndim)
    before, after = logits.softmax(1), merge_unlisted(logits, LISTED).softmax(1)
    torch.testing.assert_close(after[0, 0], before[0, 0] + before[0, 2])
    torch.testing.assert_close(after[2, 0], before[2, [0, 1, 3]].sum(0))
    torch.testing.assert_close(after[0, [1, 3]], before[0, [1, 3]])
    torch.testing.assert_close(after[2, 2], before[2, 2])
    assert (after[0, 2] == 0).all() and (after[2, [1, 3]] == 0).all()


@each_head
def test_images_that_list_all_classes_stay_as_they_are(regions):
    logits = random_logits()
    assert torch.equal(merge_unlisted(logits, LISTED, regions)[1], logits[1])
    assert merge_unlisted(logits, ALL, regions) is logits and merge_unlisted(logits, None, regions) is logits


def test_the_marginal_cross_entropy_of_two_classes_of_which_one_is_hidden_is_the_binary_one():
    """p_1 = e^z1 / (e^z0 + e^z1 + e^z2) = 1 / (1 + e^-d) with d = z1 - log(e^z0 + e^z2): a sigmoid of d. The merged
    background has 1 - p_1. The mean of -log p of the label therefore is the binary cross-entropy of the logit d."""
    logits = random_logits()[:, :3]
    target = torch.randint(0, 2, (3, 1, 5, 5), generator=torch.Generator().manual_seed(0))
    d = logits[:, 1] - torch.logsumexp(logits[:, [0, 2]], 1)
    expected = F.binary_cross_entropy_with_logits(d, target[:, 0].double())
    listed = torch.tensor([[True, True, False]] * 3)
    loss = PartialSupervision(stock(dice=0.0), IGNORE)
    torch.testing.assert_close(loss(logits, target, listed), expected)


def test_one_undecided_voxel_costs_what_the_formula_says():
    # four equal logits: the merged background of three has 3/4, the listed class 1/4
    loss, logits = supervised(dice=0.0), torch.zeros(1, HEADS, 1, 1)
    listed = torch.tensor([[True, False, True, False]])
    assert loss(logits, torch.tensor([[[[0]]]]), listed).item() == pytest.approx(log(4 / 3))
    assert loss(logits, torch.tensor([[[[2]]]]), listed).item() == pytest.approx(log(4))


@each_dimension
def test_how_the_probability_is_split_among_merged_classes_does_not_matter(ndim):
    logits = random_logits(ndim)
    other = logits.clone()
    for image, merged in ((0, [0, 2]), (2, [0, 1, 3])):
        total = torch.logsumexp(logits[image, merged], 0)
        other[image, merged] = total + random_logits(ndim, seed=7)[image, merged].log_softmax(0)
    assert (other - logits).abs().max() > 1
    target, loss = listed_target(ndim), supervised(ndim)
    torch.testing.assert_close(loss(other, target, LISTED), loss(logits, target, LISTED))
    assert abs(loss(other, target, ALL) - loss(logits, target, ALL)) > 0.01


@each_head
@each_dimension
def test_gradients_are_those_of_finite_differences(ndim, regions):
    """Of the cross-entropy: nnU-Net's Dice sums in float32."""
    logits = random_logits(ndim)[..., :2].requires_grad_()
    target = listed_target(ndim, regions, ignored=0.2)[..., :2]
    loss = supervised(ndim, regions, dice=0.0)
    listed = LISTED_REGIONS if regions else LISTED
    if regions:  # nnU-Net computes it even with weight 0
        def value(x):
            merged = merge_unlisted(x, listed, True)
            return F.binary_cross_entropy_with_logits(merged, target[:, :HEADS].double())
    else:
        def value(x):
            return loss(x, target, listed)
    assert torch.autograd.gradcheck(value, logits)


# ---- the Dice -------------------------------------------------------------------------------------------------------

def dice_by_hand(logits: torch.Tensor, target: torch.Tensor, batch_dice: bool) -> float:
    """Minus the mean of the Dice over the listed foreground classes, in float64."""
    pairs = {}
    for i in range(3):
        p, labels = scipy.special.softmax(logits[i].numpy(), 0), target[i, 0].numpy()
        known = labels != IGNORE
        for label in range(1, HEADS):
            if LISTED[i, label]:
                truth = (labels == label) & known
                pairs[i, label] = np.array([(p[label] * truth).sum(), (p[label] * known).sum(), truth.sum()])
    if batch_dice:
        keys = sorted({label for _, label in pairs})
        sums = [sum(v for (_, label), v in pairs.items() if label == key) for key in keys]
    else:
        sums = list(pairs.values())
    return -np.mean([(2 * both + SMOOTH) / (predicted + true + SMOOTH) for both, predicted, true in sums])


@each_dimension
@pytest.mark.parametrize("ignored", (0.0, 0.6))
@pytest.mark.parametrize("dice_class", (MemoryEfficientSoftDiceLoss, SoftDiceLoss))
def test_the_dice_is_the_mean_over_the_listed_classes(ndim, ignored, dice_class):
    logits, target = random_logits(ndim), listed_target(ndim, ignored=ignored)
    loss = supervised(ndim, ce=0.0, dice_class=dice_class)
    assert loss(logits, target, LISTED).item() == pytest.approx(dice_by_hand(logits, target, ndim == 2), rel=1e-5)


def test_a_class_that_no_image_of_the_batch_lists_leaves_the_gradient_of_the_others():
    """Class 3 is listed nowhere: the mean is over classes 1 and 2, not over three."""
    listed = ALL.clone()
    listed[:, 3] = False
    logits, target = random_logits(), listed_target(listed=listed)
    merged = torch.cat((torch.logsumexp(logits[:, [0, 3]], 1, keepdim=True), logits[:, 1:3]), 1)
    three = PartialSupervision(DC_and_CE_loss({"batch_dice": True, "smooth": SMOOTH, "do_bg": False, "ddp": False}, {},
                                              ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss), 3)
    found, expected = logits.clone().requires_grad_(), merged.clone().requires_grad_()
    value = supervised()(found, target, listed)
    reference = three(expected, target)
    torch.testing.assert_close(value, reference)
    value.backward(), reference.backward()
    torch.testing.assert_close(found.grad[:, 1:3], expected.grad[:, 1:3])
    torch.testing.assert_close(found.grad[:, [0, 3]].sum(1), expected.grad[:, 0])


@each_head
def test_an_unlabelled_image_lists_nothing(regions):
    """It has no entry, so that it counts as annotated for all classes, but its voxels are ignored. Class 3 is listed by
    no other image."""
    loss, logits = supervised(2, regions), random_logits()
    listed = (LISTED_REGIONS if regions else LISTED).clone()
    listed[0, 3] = False
    target = hide_unlisted(listed_target(regions=regions), listed, regions)
    target[1] = IGNORE
    if regions:
        target[1, :HEADS], target[1, HEADS] = 0, 1
    expected = loss(logits, target, listed)
    listed[1] = torch.tensor([not regions, False, True, False])
    torch.testing.assert_close(loss(logits, target, listed), expected)


# ---- regions --------------------------------------------------------------------------------------------------------

@each_dimension
@pytest.mark.parametrize("ignored", (0.0, 0.6))
def test_heads_that_are_not_listed_change_neither_value_nor_gradient(ndim, ignored):
    loss, logits = supervised(ndim, True), random_logits(ndim).requires_grad_()
    target = listed_target(ndim, True, ignored)
    value = loss(logits, target, LISTED_REGIONS)
    value.backward()
    hidden = ~LISTED_REGIONS.view(3, HEADS, *ndim * [1]).expand_as(logits)
    assert (logits.grad[hidden] == 0).all() and (logits.grad[~hidden] != 0).any()
    strange = torch.where(hidden, random_logits(ndim, seed=9), logits.detach())
    other = target.clone()
    other[:, :HEADS] |= hidden & (random_logits(ndim, seed=8) > 0)
    assert torch.equal(loss(strange, other, LISTED_REGIONS), value)
    assert not torch.equal(loss(strange, other, ALL), loss(logits, target, ALL))


def test_the_loss_of_regions_without_an_ignore_label_has_a_closed_form():
    """Zero logits: each listed head costs log 2 in each voxel, of the 12 pairs of head and image 8 are listed."""
    loss = PartialSupervision(stock(regions=True, ignore=False, dice=0.0), None, True)
    value = loss(torch.zeros(3, HEADS, 2, 2), torch.zeros(3, HEADS, 2, 2, dtype=torch.bool), LISTED_REGIONS)
    assert value.item() == pytest.approx(log(2) * 8 / 12)


# ---- as today -------------------------------------------------------------------------------------------------------

@each_head
@each_dimension
@pytest.mark.parametrize("ignored", (0.0, 0.6))
def test_where_all_classes_are_listed_the_loss_is_that_without_lists_to_the_bit(ndim, regions, ignored):
    loss, target = supervised(ndim, regions), listed_target(ndim, regions, ignored)
    values, gradients = [], []
    for listed in (None, ALL):
        logits = random_logits(ndim, dtype=torch.float32).requires_grad_()
        values.append(loss(logits, target, listed))
        values[-1].backward()
        gradients.append(logits.grad)
    assert torch.equal(*values) and torch.equal(*gradients)


@each_head
def test_ignored_voxels_change_neither_value_nor_gradient(regions):
    loss, logits = supervised(2, regions), random_logits().requires_grad_()
    target, listed = listed_target(2, regions, 0.6), LISTED_REGIONS if regions else LISTED
    value = loss(logits, target, listed)
    value.backward()
    ignored = (target[:, -1:] if regions else target == IGNORE).bool().expand_as(logits)
    assert (logits.grad[ignored] == 0).all() and logits.grad.any()
    assert torch.equal(loss(torch.where(ignored, 9.0, logits), target, listed), value)


@each_head
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_large_logits_and_half_precision_stay_finite(regions, dtype):
    logits = (1e4 * random_logits().sign()).to(dtype).requires_grad_()
    listed = LISTED_REGIONS if regions else LISTED
    value = supervised(2, regions)(logits, listed_target(2, regions, 0.3), listed)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(logits.grad).all()


@each_head
def test_a_compiled_dice_gives_the_same(regions):
    """nnU-Net compiles it on GPUs."""
    loss, logits = supervised(3, regions), random_logits(3, dtype=torch.float32)
    target, listed = listed_target(3, regions, 0.3), LISTED_REGIONS if regions else LISTED
    expected = loss(logits, target, listed)
    loss.loss.dc = torch.compile(loss.loss.dc, backend="eager")
    torch.testing.assert_close(loss(logits, target, listed), expected)
    torch.compiler.reset()


def test_lists_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"listed \(3, 4\) does not match \(2, 4, 5, 5\)"):
        merge_unlisted(random_logits(images=2), LISTED)


def test_labels_that_are_not_listed_become_background():
    target = torch.tensor([[0, 1, 2, 3, 4]] * 3, dtype=torch.int16).view(3, 1, 1, 5)
    hidden = hide_unlisted(target, LISTED)
    assert hidden.dtype == torch.int16
    assert hidden[:, 0, 0].tolist() == [[0, 1, 0, 3, 4], [0, 1, 2, 3, 4], [0, 0, 2, 0, 4]]
    assert hide_unlisted(target, ALL) is target


# ---- the joint objective and what else sees batches -----------------------------------------------------------------

def joint(**weights) -> ConfKDLoss:
    return ConfKDLoss(supervised(), {"teacher": 0.0, "student": 0.0, "kl": 0.0, "entropy": 0.0} | weights)


def test_both_supervised_terms_merge_and_the_others_do_not():
    student, teacher, target = random_logits(), random_logits(seed=5), listed_target()
    loss = supervised()
    for term, expected in (("student", loss(student, target, LISTED)),
                           ("teacher", loss(teacher[:2], target[:2], LISTED[:2]))):
        assert torch.equal(joint(**{term: 1.0})(student, teacher, target, 2, listed=LISTED)[0], expected)
    for term in ("kl", "entropy"):
        value = joint(**{term: 1.0})(student, teacher, target, 2, listed=LISTED)[0]
        assert torch.equal(value, joint(**{term: 1.0})(student, teacher, target, 2)[0]) and value > 0


def test_deep_supervision_merges_at_every_resolution():
    student, target = [random_logits(), random_logits(seed=2)], [listed_target(), listed_target()]
    loss = ConfKDLoss(supervised(), {"teacher": 0.0, "student": 1.0, "kl": 0.0, "entropy": 0.0},
                      resolution_weights=(0.75, 0.25))
    expected = sum(w * supervised()(s, t, LISTED) for w, s, t in zip((0.75, 0.25), student, target))
    torch.testing.assert_close(loss(student, None, target, 1, listed=LISTED)[0], expected, check_dtype=False)


def test_images_with_hidden_classes_are_not_corrected_for_the_class_prior():
    student, target = random_logits(), listed_target(ignored=0.5)
    shift = torch.tensor([-1.0, 0.5, 2.0, 0.0])
    shifted = student.clone()
    shifted[1] += shift.view(HEADS, 1, 1)  # of the images that are not full it alone lists all classes
    value = joint(student=1.0)(student, None, target, 0, prior_shift=shift, listed=LISTED)[0]
    assert torch.equal(value, supervised()(shifted, target, LISTED))


def test_images_with_hidden_classes_are_not_counted_for_the_class_prior():
    target = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 2, 2]]).view(4, 1, 1, 4)
    batch = {"target": target, "num_full": 2, "inside": torch.ones_like(target, dtype=torch.bool)}
    listed = torch.ones(4, 3, dtype=torch.bool)
    listed[1, 2] = listed[3, 1] = False
    prior, alone = ClassPrior(3, 3), ClassPrior(3, 3)
    prior({**batch, "listed": listed})
    alone({"target": target[[0, 2]], "num_full": 1, "inside": batch["inside"][[0, 2]]})
    assert torch.equal(prior.counts, alone.counts) and prior.counts[0].tolist() == [1, 2, 1, 4]


@each_head
def test_the_pseudo_dice_counts_the_listed_classes_alone(regions):
    """Image 0 does not list class 2: predicting it there is neither right nor wrong."""
    logits = torch.full((1, HEADS, 1, 4), -5.0)
    logits[0, [1, 2, 2, 3], 0, [0, 1, 2, 3]] = 5
    target = torch.tensor([[[[1, 0, 1, 0]]]])
    if regions:
        target = torch.cat([*(target == c for c in range(HEADS)), target == IGNORE], 1)
    counts = {name: values[-3:].tolist() for name, values in hard_counts(logits, target, IGNORE, regions,
                                                                         LISTED[:1]).items()}
    assert counts == {"tp_hard": [1, 0, 0], "fp_hard": [0, 0, 1], "fn_hard": [1, 0, 0]}
