"""Entropy, KL, distillation, partial supervision and the joint objective.

References come from scipy in float64 and from nnU-Net's own losses; what is computed by hand is derived beside it.
"""
from __future__ import annotations

import pickle
from copy import deepcopy
from math import log

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_confkd.training.losses import (
    TERMS,
    ConfKDLoss,
    PartialSupervision,
    annotated_voxels,
    confidence,
    entropy,
    kl_divergence,
)

CHANNELS = 3
IGNORE = CHANNELS  # nnU-Net: the highest label plus one
SPATIAL = {2: (6, 5), 3: (3, 4, 5)}
HALF = (torch.float16, torch.bfloat16)

each_dimension = pytest.mark.parametrize("ndim", (2, 3), ids=("2d", "3d"))
each_head = pytest.mark.parametrize("regions", (False, True), ids=("softmax", "regions"))


def random_logits(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits_of(*probabilities: float) -> torch.Tensor:
    """Logits of one voxel with these class probabilities, (1, C, 1, 1)."""
    return torch.tensor(probabilities, dtype=torch.float64).log().reshape(1, -1, 1, 1)


def outcomes(logits: torch.Tensor, regions: bool) -> np.ndarray:
    """Probabilities by scipy, outcomes first: (C, B, *spatial), for regions (2, heads, B, *spatial)."""
    logits = np.moveaxis(logits.detach().numpy(), 1, 0)
    if regions:
        return np.stack((scipy.special.expit(logits), scipy.special.expit(-logits)))
    return scipy.special.softmax(logits, 0)


# ---- entropy and KL -------------------------------------------------------------------------------------------------

@each_dimension
@each_head
def test_entropy_agrees_with_scipy(ndim, regions):
    logits = random_logits(2, CHANNELS, *SPATIAL[ndim])
    expected = scipy.stats.entropy(outcomes(logits, regions), axis=0)
    expected = expected.sum(0) if regions else expected
    result = entropy(logits, regions)
    assert result.shape == (2, *SPATIAL[ndim])
    np.testing.assert_allclose(result, expected, rtol=1e-10)


@each_dimension
@each_head
def test_kl_agrees_with_scipy(ndim, regions):
    p, q = (random_logits(2, CHANNELS, *SPATIAL[ndim], seed=s) for s in (0, 1))
    expected = scipy.stats.entropy(outcomes(p, regions), outcomes(q, regions), axis=0)
    expected = expected.sum(0) if regions else expected
    result = kl_divergence(p, q, regions)
    assert result.shape == (2, *SPATIAL[ndim])
    np.testing.assert_allclose(result, expected, rtol=1e-9)


@pytest.mark.parametrize("channels", (2, 3, 7))
def test_entropy_of_the_uniform_prediction_is_log_c(channels):
    # -sum_c 1/C log 1/C = log C; equal logits of any size are the uniform prediction
    result = entropy(torch.full((1, channels, 2, 2), 3.0, dtype=torch.float64))
    torch.testing.assert_close(result, torch.full((1, 2, 2), log(channels), dtype=torch.float64))


@pytest.mark.parametrize("heads", (1, 3))
def test_entropy_of_undecided_regions_is_log_2_a_head(heads):
    # a head at 1/2 has -1/2 log 1/2 - 1/2 log 1/2 = log 2
    result = entropy(torch.zeros(1, heads, 2, 2, dtype=torch.float64), regions=True)
    torch.testing.assert_close(result, torch.full((1, 2, 2), heads * log(2), dtype=torch.float64))


@each_head
def test_entropy_of_a_certain_prediction_is_zero(regions):
    logits = torch.tensor([1e3, -1e3, -1e3]).reshape(1, 3, 1, 1)
    assert entropy(logits, regions).item() == 0


def test_kl_of_two_known_distributions():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) = 3/4 log(3/2) + 1/4 log(1/2) = 3/4 log 3 - log 2
    #                                  KL(q||p) = 1/2 log(2/3) + 1/2 log 2     = log 2 - 1/2 log 3
    p, q = logits_of(3 / 4, 1 / 4), logits_of(1 / 2, 1 / 2)
    assert kl_divergence(p, q).item() == pytest.approx(0.75 * log(3) - log(2), rel=1e-12)
    assert kl_divergence(q, p).item() == pytest.approx(log(2) - 0.5 * log(3), rel=1e-12)


def test_kl_of_two_regions_is_the_sum_of_the_heads():
    # the logit of a head at 3/4 is log 3, at 1/2 it is 0: each head is the two-class case above
    p = torch.full((1, 2, 1, 1), log(3), dtype=torch.float64)
    assert kl_divergence(p, torch.zeros_like(p), regions=True).item() == pytest.approx(2 * (0.75 * log(3) - log(2)))


@each_head
def test_kl_is_never_negative_and_zero_only_for_equal_distributions(regions):
    p, q = (random_logits(4, CHANNELS, 8, 8, seed=s) for s in (0, 1))
    assert (kl_divergence(p, q, regions) > 0).all()
    assert (kl_divergence(p, p.clone(), regions) == 0).all()


@each_head
def test_kl_is_not_symmetric(regions):
    p, q = (random_logits(1, CHANNELS, 4, 4, seed=s) for s in (0, 1))
    assert not torch.allclose(kl_divergence(p, q, regions), kl_divergence(q, p, regions), rtol=1e-2)


def test_a_shift_of_all_logits_of_a_voxel_changes_nothing():
    p, q = (random_logits(2, CHANNELS, 4, 4, seed=s) for s in (0, 1))
    shift = random_logits(2, 1, 4, 4, seed=2)
    torch.testing.assert_close(entropy(p + shift), entropy(p))
    torch.testing.assert_close(kl_divergence(p + shift, q - shift), kl_divergence(p, q))


@each_head
def test_the_order_of_the_classes_does_not_matter(regions):
    p, q = (random_logits(2, CHANNELS, 4, 4, seed=s) for s in (0, 1))
    order = [2, 0, 1]
    torch.testing.assert_close(entropy(p[:, order], regions), entropy(p, regions))
    torch.testing.assert_close(kl_divergence(p[:, order], q[:, order], regions), kl_divergence(p, q, regions))


def test_two_classes_are_one_region_with_the_difference_of_their_logits():
    # softmax(a, b)_0 = sigmoid(a - b)
    p, q = (random_logits(2, 2, 4, 4, seed=s) for s in (0, 1))
    heads = [x[:, :1] - x[:, 1:] for x in (p, q)]
    torch.testing.assert_close(entropy(p), entropy(heads[0], regions=True))
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(*heads, regions=True))


@each_head
def test_entropy_and_kl_have_the_gradient_that_finite_differences_give(regions):
    p, q = (random_logits(1, CHANNELS, 2, 2, seed=s).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda x: entropy(x, regions), (p,))
    assert torch.autograd.gradcheck(lambda x, y: kl_divergence(x, y, regions), (p, q))


@each_head
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
def test_huge_logits_give_finite_values_and_gradients(regions, dtype):
    def leaf(*values):
        return torch.tensor(values, dtype=dtype).reshape(1, 3, 1, 1).requires_grad_()
    p, q = leaf(1e4, -1e4, -1e4), leaf(-1e4, 1e4, 1e4)
    assert entropy(p, regions).item() == 0
    # softmax: log q_0 = -2e4 - log 2 at the one class that p knows; regions: -1e4 in each of three heads
    largest = torch.tensor(1e4, dtype=dtype).item()
    assert kl_divergence(p, q, regions).item() == pytest.approx((3 if regions else 2) * largest, rel=1e-4)
    (entropy(p, regions) + kl_divergence(p, q, regions)).sum().backward()
    assert torch.isfinite(p.grad).all() and torch.isfinite(q.grad).all()


@each_head
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_logits_are_computed_in_float32(regions, dtype):
    p, q = (random_logits(2, CHANNELS, 4, 4, seed=s).to(dtype) for s in (0, 1))
    for half, single in ((entropy(p, regions), entropy(p.float(), regions)),
                         (kl_divergence(p, q, regions), kl_divergence(p.float(), q.float(), regions))):
        assert half.dtype == torch.float32
        assert torch.equal(half, single)


@each_head
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast_gives_the_float32_result(regions, dtype):
    p, q = (random_logits(2, CHANNELS, 4, 4, seed=s).to(dtype) for s in (0, 1))
    expected = entropy(p.float(), regions), kl_divergence(p.float(), q.float(), regions)
    with torch.autocast("cpu", torch.bfloat16):
        results = entropy(p, regions), kl_divergence(p, q, regions)
    assert all(torch.equal(r, e) for r, e in zip(results, expected))


def test_logits_without_spatial_axes_are_refused_with_their_shape():
    for call, name in ((entropy, "logits"), (lambda x: kl_divergence(x, x), "p_logits")):
        with pytest.raises(ValueError, match=rf"^{name} must be .*\(2, 3\)$"):
            call(torch.zeros(2, 3))


def test_kl_of_different_shapes_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(1, 3, 4, 4\)"):
        kl_divergence(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


# ---- a batch as nnU-Net makes it, and nnU-Net's own loss ------------------------------------------------------------

def make_target(ndim: int, regions: bool, num_full: int, num_partial: int, seed: int = 0, shrink: int = 0):
    """Label map, or one-hot regions and the ignore mask: the first images full, a fifth of the others annotated."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_full + num_partial, 1, *(n - shrink for n in SPATIAL[ndim]))
    annotated = torch.rand(shape, generator=generator) < 0.2
    annotated[:num_full] = True
    if regions:
        heads = torch.rand(shape[0], CHANNELS, *shape[2:], generator=generator) < 0.5
        return torch.cat((heads & annotated, ~annotated), 1)
    labels = torch.randint(0, CHANNELS, shape, generator=generator, dtype=torch.int16)
    return torch.where(annotated, labels, torch.tensor(IGNORE, dtype=torch.int16))


def stock_loss(ndim: int, regions: bool, ddp: bool = False, weight_ce: float = 1, ignore: bool = True):
    """As in nnUNetTrainer._build_loss; batch Dice in 2-D, as nnU-Net plans it."""
    dice = {"batch_dice": ndim == 2, "smooth": 1e-5, "do_bg": regions, "ddp": ddp}
    if regions:
        return DC_and_BCE_loss({}, dice, weight_ce=weight_ce, use_ignore_label=ignore,
                               dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(dice, {}, weight_ce=weight_ce, weight_dice=1, ignore_label=IGNORE if ignore else None,
                          dice_class=MemoryEfficientSoftDiceLoss)


class CrossEntropy(torch.nn.Module):
    """Cross-entropy over the annotated voxels, without a Dice."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, target[:, 0], ignore_index=IGNORE)


def supervised(ndim: int = 2, regions: bool = False) -> PartialSupervision:
    return PartialSupervision(stock_loss(ndim, regions), IGNORE, regions)


def objective(ndim: int = 2, regions: bool = False, resolution_weights=(1.0,), kl_images: str = "all",
              extra_resolutions: str = "highest", equal_kinds: bool = False, **weights: float) -> ConfKDLoss:
    """The joint objective with these weights of the terms; the others are 0."""
    return ConfKDLoss(supervised(ndim, regions), {term: weights.get(term, 0.0) for term in TERMS}, regions=regions,
                      resolution_weights=resolution_weights, kl_images=kl_images, extra_resolutions=extra_resolutions,
                      equal_kinds=equal_kinds)


ALL_TERMS = dict.fromkeys(TERMS, 1.0)
NUM_FULL, NUM_IMAGES = 2, 5
RESOLUTIONS = tuple(np.array([1, 1 / 2, 0]) / 1.5)  # nnU-Net's for three outputs: halved, the lowest off


class Batch:
    """Logits of both branches and the target, at three resolutions."""

    def __init__(self, ndim: int = 2, regions: bool = False, num_full: int = NUM_FULL, num_images: int = NUM_IMAGES):
        self.num_full = num_full
        self.target = [make_target(ndim, regions, num_full, num_images - num_full, seed=i, shrink=i) for i in range(3)]
        self.student, self.teacher = (
            [random_logits(num_images, CHANNELS, *target.shape[2:], seed=seed + i, dtype=torch.float32).requires_grad_()
             for i, target in enumerate(self.target)] for seed in (10, 20))

    def evaluate(self, loss: ConfKDLoss, kl_ramp: float = 1.0):
        """The loss, on as many resolutions as it has weights for."""
        n = len(loss.resolution_weights)
        return loss(self.student[:n], self.teacher[:n], self.target[:n], self.num_full, kl_ramp)

    def gradients(self, loss: ConfKDLoss) -> list[torch.Tensor | None]:
        """Of the student's and the teacher's logits at full resolution; None where there is no way to them."""
        return torch.autograd.grad(self.evaluate(loss)[0], (self.student[0], self.teacher[0]), allow_unused=True)


# ---- partial supervision --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("regions", (False, True))
@pytest.mark.parametrize("ndim", (2, 3))
def test_images_without_any_annotated_voxel_do_not_enter_the_loss(ndim, regions):
    """With a Dice of each image (3-D) one would count as perfect, and halve the gradient of the image beside it."""
    target = make_target(ndim, regions, 1, 1, seed=0)
    target[1, -1] = 1 if regions else IGNORE
    target[1, :-1] = 0
    logits = random_logits(2, CHANNELS, *target.shape[2:], seed=1, dtype=torch.float32).requires_grad_()
    loss = supervised(ndim, regions)
    value, alone = loss(logits, target), loss(logits[:1], target[:1])
    assert value.item() == pytest.approx(alone.item(), abs=1e-6)
    gradients = [torch.autograd.grad(of, logits)[0] for of in (value, alone)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][0].any() and not gradients[0][1].any()


def test_annotated_voxels_are_those_that_do_not_carry_the_ignore_label():
    labels = torch.tensor([0, 2, IGNORE, 1]).reshape(1, 1, 2, 2)
    assert annotated_voxels(labels, IGNORE).flatten().tolist() == [True, True, False, True]
    everything = annotated_voxels(labels, None)
    assert everything.all() and everything.dtype is torch.bool and everything.shape == labels.shape
    assert annotated_voxels(torch.zeros(2, 3, 4, 5), None, regions=True).shape == (2, 1, 4, 5)
    one_hot = torch.tensor([[1, 0], [0, 0], [0, 1]]).reshape(1, 3, 1, 2)  # two regions, then the ignore mask
    for target in (one_hot.bool(), one_hot.float()):
        mask = annotated_voxels(target, IGNORE, regions=True)
        assert mask.dtype == torch.bool and mask.shape == (1, 1, 1, 2)
        assert mask.flatten().tolist() == [True, False]


@each_dimension
@each_head
def test_partial_supervision_is_nnunets_loss_to_the_bit(ndim, regions):
    logits = random_logits(3, CHANNELS, *SPATIAL[ndim], dtype=torch.float32)
    target = make_target(ndim, regions, 1, 2)
    assert torch.equal(supervised(ndim, regions)(logits, target), stock_loss(ndim, regions)(logits, target))


def test_labels_are_softmax_labels_unless_said_otherwise():
    logits = random_logits(1, CHANNELS, 4, 4, dtype=torch.float32)
    target = torch.ones(1, 1, 4, 4)  # as regions, everything would be ignored
    result = PartialSupervision(stock_loss(2, False), IGNORE)(logits, target)
    assert torch.equal(result, stock_loss(2, False)(logits, target))


@each_dimension
@each_head
def test_voxels_without_annotation_change_neither_value_nor_gradient(ndim, regions):
    target = make_target(ndim, regions, 0, 3)
    inside = annotated_voxels(target, IGNORE, regions)
    first = random_logits(3, CHANNELS, *SPATIAL[ndim], dtype=torch.float32)
    second = torch.where(inside, first, random_logits(*first.shape, seed=1, dtype=torch.float32))
    assert not torch.equal(first, second)
    values, gradients = [], []
    for logits in (first.requires_grad_(), second.requires_grad_()):
        values.append(supervised(ndim, regions)(logits, target))
        gradients.append(torch.autograd.grad(values[-1], logits)[0])
    assert torch.equal(*values) and torch.equal(*gradients)
    assert (gradients[0] * ~inside == 0).all()
    assert (gradients[0] * inside).abs().sum() > 0


@each_dimension
@each_head
@pytest.mark.parametrize("fill", (1.0, float("inf"), float("nan")))
def test_without_any_annotation_the_loss_is_zero_and_so_is_its_gradient(ndim, regions, fill):
    # nnU-Net's own gives -1 here: an empty Dice counts as perfect
    target = torch.full((2, 1, *SPATIAL[ndim]), IGNORE)
    if regions:
        target = torch.cat((torch.zeros(2, CHANNELS, *SPATIAL[ndim]), torch.ones(2, 1, *SPATIAL[ndim])), 1).bool()
    logits = torch.full((2, CHANNELS, *SPATIAL[ndim]), fill).requires_grad_()
    value = supervised(ndim, regions)(logits, target)
    value.backward()
    assert value.item() == 0 and value.ndim == 0
    assert (logits.grad == 0).all()


@each_head
def test_no_image_gives_a_zero_with_a_graph(regions):
    logits = torch.zeros(0, CHANNELS, 4, 4, requires_grad=True)
    for ignore_label in (IGNORE, None):
        loss = PartialSupervision(stock_loss(2, regions, ignore=ignore_label is not None), ignore_label, regions)
        value = loss(logits, torch.zeros(0, CHANNELS + 1 if regions else 1, 4, 4))
        value.backward()
        assert value.item() == 0
    assert logits.grad.shape == logits.shape


def test_a_rank_without_images_of_regions_without_ignore_label_has_a_finite_loss(monkeypatch):
    """It takes part in the Dice of all ranks, but the cross-entropy of no voxels is not a number."""
    monkeypatch.setattr("nnunet_confkd.training.losses.rank_factors",
                        lambda counts: (torch.ones(2), counts + 1))  # another rank has an annotated voxel
    dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}
    loss = DC_and_BCE_loss({}, dice, use_ignore_label=False, dice_class=MemoryEfficientSoftDiceLoss)
    logits = random_logits(0, CHANNELS, 6, 5).requires_grad_()
    found = PartialSupervision(loss, None, regions=True, ddp=True)(logits, torch.zeros(0, CHANNELS, 6, 5))
    found.backward()
    assert torch.isfinite(found) and logits.grad is not None


def test_a_plain_zero_of_the_loss_becomes_one_with_a_graph():
    logits = torch.zeros(1, CHANNELS, 4, 4, requires_grad=True)
    value = PartialSupervision(lambda x, y: 0, None)(logits, torch.zeros(1, 1, 4, 4))
    value.backward()
    assert value.item() == 0 and (logits.grad == 0).all()


def test_a_loss_without_dice_gets_all_images():
    target = make_target(2, False, 1, 1)
    target[1] = IGNORE
    logits = torch.zeros(2, CHANNELS, *target.shape[2:])
    assert PartialSupervision(lambda x, y: torch.tensor(len(x)), IGNORE)(logits, target) == 2


def test_a_target_of_another_shape_is_refused_with_both_shapes():
    logits = torch.zeros(2, 3, 4, 4)
    for shape in ((1, 1, 4, 4), (2, 1, 4, 5)):
        with pytest.raises(ValueError) as error:
            supervised()(logits, torch.zeros(shape))
        assert "(2, 3, 4, 4)" in str(error.value) and str(shape) in str(error.value)


# ---- the joint objective: equal to nnU-Net's where it should be -----------------------------------------------------

@each_dimension
@each_head
def test_with_the_teacher_alone_it_is_nnunets_loss_on_the_full_images_to_the_bit(ndim, regions):
    batch = Batch(ndim, regions)
    loss = objective(ndim, regions, RESOLUTIONS, teacher=1.0)
    stock = DeepSupervisionWrapper(stock_loss(ndim, regions), np.array(RESOLUTIONS))
    expected = stock([x[:NUM_FULL] for x in batch.teacher], [x[:NUM_FULL] for x in batch.target])
    assert torch.equal(batch.evaluate(loss)[0], expected)
    assert torch.equal(batch.gradients(loss)[1], torch.autograd.grad(expected, batch.teacher[0])[0])


@each_head
@pytest.mark.parametrize("term", [term for term in TERMS if term != "teacher"])
def test_any_other_weight_makes_it_differ_from_nnunets_loss(regions, term):
    batch = Batch(regions=regions)
    alone, with_term = (batch.evaluate(objective(2, regions, RESOLUTIONS, **weights))[0]
                        for weights in ({"teacher": 1.0}, {"teacher": 1.0, term: 0.01}))
    assert not torch.equal(alone, with_term)


@each_dimension
@each_head
def test_with_the_student_alone_it_is_nnunets_loss_on_the_whole_batch_to_the_bit(ndim, regions):
    batch = Batch(ndim, regions)
    stock = DeepSupervisionWrapper(stock_loss(ndim, regions), np.array(RESOLUTIONS))
    loss = objective(ndim, regions, RESOLUTIONS, student=1.0)
    assert torch.equal(batch.evaluate(loss)[0], stock(batch.student, batch.target))


def test_any_supervised_loss_will_do():
    batch, nnunets = Batch(), stock_loss(2, False)
    loss = ConfKDLoss(nnunets, {**dict.fromkeys(TERMS, 0.0), "student": 1.0})
    assert torch.equal(batch.evaluate(loss)[0], nnunets(batch.student[0], batch.target[0]))


@each_dimension
@each_head
def test_the_mean_of_kinds_is_the_mean_of_nnunets_loss_on_each_kind(ndim, regions):
    batch, stock = Batch(ndim, regions), stock_loss(ndim, regions)
    loss = objective(ndim, regions, equal_kinds=True, student=0.5)
    total, terms = batch.evaluate(loss)
    alone = [stock(batch.student[0][kind], batch.target[0][kind]) for kind in (slice(NUM_FULL), slice(NUM_FULL, None))]
    assert terms["student"].item() == pytest.approx(sum(alone).item() / 2, abs=1e-6)
    assert total.item() == pytest.approx(0.5 * terms["student"].item())
    found, = torch.autograd.grad(total, batch.student[0])
    wanted, = torch.autograd.grad(sum(alone) / 4, batch.student[0])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("num_full", (0, NUM_IMAGES))
def test_in_the_mean_of_kinds_a_missing_kind_counts_as_0(num_full):
    batch, stock = Batch(num_full=num_full), stock_loss(2, False)
    total, _ = batch.evaluate(objective(equal_kinds=True, student=1.0))
    assert total.item() == pytest.approx(stock(batch.student[0], batch.target[0]).item() / 2)


def test_in_the_mean_of_kinds_a_few_annotated_voxels_weigh_as_much_as_a_whole_image():
    """One annotated voxel beside a whole image: a hundredth of the gradient in the usual mean, or a half."""
    target = torch.zeros(2, 1, 10, 10, dtype=torch.long)
    target[1] = IGNORE
    target[1, 0, 0, 0] = 1
    for equal, share in ((False, 1 / 101), (True, 0.5)):
        logits = torch.zeros(2, CHANNELS, 10, 10, requires_grad=True)
        loss = ConfKDLoss(CrossEntropy(), {**dict.fromkeys(TERMS, 0.0), "student": 1.0}, equal_kinds=equal)
        gradient, = torch.autograd.grad(loss(logits, None, target, 1)[0], logits)
        of_image = gradient.abs().sum((1, 2, 3))
        assert (of_image[1] / of_image.sum()).item() == pytest.approx(share)


# ---- the joint objective: its terms ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kl_images, images", [("all", slice(None)), ("full", slice(NUM_FULL)),
                                               ("partial", slice(NUM_FULL, None))])
def test_the_terms_are_the_formulas_and_the_total_their_weighted_sum(kl_images, images):
    batch = Batch()
    student, teacher, target = batch.student[0].detach(), batch.teacher[0].detach(), batch.target[0]
    weights = {"teacher": 2.0, "student": 0.5, "kl": 3.0, "entropy": 0.25}
    total, terms = batch.evaluate(objective(kl_images=kl_images, **weights))
    nnunets = stock_loss(2, False)
    expected = {
        "teacher": nnunets(teacher[:NUM_FULL], target[:NUM_FULL]),
        "student": nnunets(student, target),
        "kl": scipy.stats.entropy(outcomes(teacher[images], False), outcomes(student[images], False)).mean(),
        "entropy": scipy.stats.entropy(outcomes(student[NUM_FULL:], False)).mean()}
    assert list(terms) == list(TERMS)
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(float(value), rel=1e-5), term
        assert not terms[term].requires_grad
    assert total.item() == pytest.approx(sum(weights[t] * float(v) for t, v in expected.items()), rel=1e-5)


FULL_ONES, OTHERS = set(range(NUM_FULL)), set(range(NUM_FULL, NUM_IMAGES))


@each_head
@pytest.mark.parametrize("term, options, of_student, of_teacher", (
    ("teacher", {}, set(), FULL_ONES),
    ("student", {}, FULL_ONES | OTHERS, set()),
    ("kl", {"kl_images": "full"}, FULL_ONES, FULL_ONES),
    ("kl", {"kl_images": "all"}, FULL_ONES | OTHERS, FULL_ONES | OTHERS),
    ("kl", {"kl_images": "partial"}, OTHERS, OTHERS),
    ("entropy", {}, OTHERS, set()),
), ids=str)
def test_each_term_acts_on_its_own_images_only(regions, term, options, of_student, of_teacher):
    batch = Batch(regions=regions)
    loss = objective(2, regions, **options, **{term: 1.0})

    def images_that_matter(logits: torch.Tensor) -> set[int]:
        before, matter = batch.evaluate(loss)[0], set()
        for image in range(NUM_IMAGES):
            with torch.no_grad():
                kept = logits[image].clone()
                logits[image] += random_logits(*kept.shape, seed=99, dtype=torch.float32)
                if not torch.equal(batch.evaluate(loss)[0], before):
                    matter.add(image)
                logits[image] = kept
        return matter

    assert images_that_matter(batch.student[0]) == of_student
    assert images_that_matter(batch.teacher[0]) == of_teacher


def test_the_teacher_may_be_given_for_the_full_images_only():
    batch = Batch()
    loss = objective(kl_images="full", **ALL_TERMS)
    whole = batch.evaluate(loss)[0]
    batch.teacher = [x[:NUM_FULL] for x in batch.teacher]
    assert torch.equal(batch.evaluate(loss)[0], whole)


@pytest.mark.parametrize("num_full", (0, NUM_IMAGES))
def test_an_empty_stratum_counts_nothing_and_keeps_the_graph(num_full):
    batch = Batch(num_full=num_full)
    batch.teacher = [x.detach()[:num_full].requires_grad_() for x in batch.teacher]
    total, terms = batch.evaluate(objective(kl_images="full", **ALL_TERMS))
    for term in ("teacher", "kl") if num_full == 0 else ("entropy",):
        assert terms[term] == 0
    assert terms["student"].item() == pytest.approx(stock_loss(2, False)(batch.student[0], batch.target[0]).item())
    total.backward()
    assert torch.isfinite(batch.student[0].grad).all() and batch.student[0].grad.abs().sum() > 0
    assert batch.teacher[0].grad.shape == batch.teacher[0].shape and torch.isfinite(batch.teacher[0].grad).all()


def test_a_term_of_weight_zero_is_not_computed():
    batch = Batch()
    total, terms = objective(student=1.0)(batch.student[0], None, batch.target[0], NUM_FULL)
    assert torch.isfinite(total)
    assert {term for term in TERMS if terms[term] != 0} == {"student"}


def test_the_ramp_multiplies_the_weight_of_the_kl_and_at_zero_the_kl_is_not_computed():
    batch = Batch()
    loss = objective(teacher=1.0, student=1.0, kl=2.0, entropy=3.0)
    total, terms = batch.evaluate(loss, kl_ramp=0.25)
    assert total.item() == pytest.approx((terms["teacher"] + terms["student"] + 0.25 * 2 * terms["kl"]
                                          + 3 * terms["entropy"]).item(), rel=1e-6)
    assert torch.equal(terms["kl"], batch.evaluate(loss)[1]["kl"])  # the terms are reported without weight and ramp
    assert loss.weights["kl"] == 2.0
    batch.teacher = [x[:NUM_FULL] for x in batch.teacher]  # too few for a KL on all images
    assert batch.evaluate(loss, kl_ramp=0.0)[1]["kl"] == 0


def test_resolutions_are_weighted_as_nnunets_deep_supervision_does():
    batch = Batch()
    _, terms = batch.evaluate(objective(resolution_weights=RESOLUTIONS, extra_resolutions="all", **ALL_TERMS))
    single = [objective(**ALL_TERMS)(batch.student[i], batch.teacher[i], batch.target[i], NUM_FULL)[1]
              for i in range(2)]
    for term in TERMS:
        expected = (2 * single[0][term] + single[1][term]) / 3  # 1 and 1/2, normalised
        assert terms[term].item() == pytest.approx(expected.item(), rel=1e-5), term


def test_resolutions_of_weight_zero_are_not_evaluated():
    batch = Batch()
    batch.student[2] = batch.teacher[2] = batch.target[2] = None  # anything done with it raises
    total, _ = batch.evaluate(objective(resolution_weights=RESOLUTIONS, extra_resolutions="all", **ALL_TERMS))
    assert torch.isfinite(total)


def test_a_resolution_of_weight_zero_does_not_end_the_others():
    batch = Batch()
    _, terms = batch.evaluate(objective(resolution_weights=(0.0, 1.0), student=1.0))
    _, expected = objective(student=1.0)(batch.student[1], batch.teacher[1], batch.target[1], NUM_FULL)
    assert torch.equal(terms["student"], expected["student"])


def test_kl_and_entropy_can_act_on_the_highest_resolution_alone():
    batch = Batch()
    total, terms = batch.evaluate(objective(resolution_weights=RESOLUTIONS, **ALL_TERMS))
    _, everywhere = batch.evaluate(objective(resolution_weights=RESOLUTIONS, extra_resolutions="all", **ALL_TERMS))
    _, highest = objective(**ALL_TERMS)(batch.student[0], batch.teacher[0], batch.target[0], NUM_FULL)
    for term, expected in (("teacher", everywhere), ("student", everywhere), ("kl", highest), ("entropy", highest)):
        assert torch.equal(terms[term], expected[term]), term
    assert total.item() == pytest.approx(sum(terms.values()).item(), rel=1e-6)


def test_neither_branch_gets_a_gradient_from_the_terms_of_the_other():
    batch = Batch()
    student, teacher = batch.gradients(objective(kl_images="full", **ALL_TERMS))
    of_student, none = batch.gradients(objective(kl_images="full", **ALL_TERMS | {"teacher": 0.0}))
    assert none is None and torch.equal(student, of_student)
    assert (teacher[NUM_FULL:] == 0).all()
    assert torch.equal(teacher, batch.gradients(objective(teacher=1.0))[1])
    student_given = batch.gradients(objective(kl_images="full", teacher=1.0, kl=1.0))[0]
    assert (student_given[NUM_FULL:] == 0).all() and student_given[:NUM_FULL].abs().sum() > 0


@each_head
def test_kl_and_entropy_are_those_of_the_heads(regions):
    batch = Batch(regions=regions)
    _, terms = batch.evaluate(objective(2, regions, kl=1.0, entropy=1.0))
    student, teacher = batch.student[0], batch.teacher[0]
    assert terms["kl"].item() == pytest.approx(kl_divergence(teacher, student, regions).mean().item())
    assert terms["entropy"].item() == pytest.approx(entropy(student[NUM_FULL:], regions).mean().item())


def test_one_spatial_axis_is_enough():
    logits = random_logits(2, 3, 7)
    p = logits.softmax(1)
    assert torch.allclose(entropy(logits), -(p * p.log()).sum(1))
    assert torch.allclose(kl_divergence(logits, logits.flip(1)), (p * (p.log() - p.flip(1).log())).sum(1))


@pytest.mark.parametrize("term", ("teacher", "kl"))
def test_each_of_the_terms_that_need_a_teacher_asks_for_one(term):
    batch = Batch()
    with pytest.raises(ValueError, match="no teacher"):
        objective(**{term: 1.0})(batch.student[0], None, batch.target[0], NUM_FULL)


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="'kl'"):
        ConfKDLoss(supervised(), {"teacher": 1.0, "student": 1.0, "kl": 1.0})


@pytest.mark.parametrize("student, teacher, target", ((2, 3, 3), (3, 2, 3), (3, 3, 2), (2, 2, 2)))
def test_another_number_of_resolutions_than_of_weights_is_refused(student, teacher, target):
    batch, loss = Batch(), objective(resolution_weights=RESOLUTIONS, student=1.0)
    with pytest.raises(ValueError, match=f"{student} student .* {teacher} teacher .* {target} targets for 3 "):
        loss(batch.student[:student], batch.teacher[:teacher], batch.target[:target], NUM_FULL)


def test_a_teacher_of_the_full_images_alone_is_refused_if_the_kl_acts_on_all():
    batch = Batch()
    with pytest.raises(ValueError, match=r"\(3, 3, 6, 5\), got \(0, 3, 6, 5\)"):
        objective(kl=1.0)(batch.student[0], batch.teacher[0][:NUM_FULL], batch.target[0], NUM_FULL)


@each_head
def test_copies_and_pickles_of_the_objective_compute_the_same(regions):
    batch = Batch(regions=regions)
    loss = objective(2, regions, RESOLUTIONS, **ALL_TERMS)
    for copy in (deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(batch.evaluate(copy)[0], batch.evaluate(loss)[0])


@each_head
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_objective_of_half_precision_logits_is_finite_with_finite_gradients(regions, dtype):
    batch = Batch(regions=regions)
    batch.student, batch.teacher = ([(x.detach() * 1e3).to(dtype).requires_grad_() for x in branch]
                                    for branch in (batch.student, batch.teacher))
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = batch.evaluate(objective(2, regions, **ALL_TERMS))
    total.backward()
    assert all(torch.isfinite(value) for value in (total, *terms.values()))
    assert torch.isfinite(batch.student[0].grad).all() and torch.isfinite(batch.teacher[0].grad).all()


def test_confidence_is_the_mean_of_the_winning_probability():
    # logits (log 3, 0): winner 3/4; equal logits: 1/2. As heads: sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2 each
    logits = torch.tensor([[log(3), 0.0], [0.0, 0.0]]).T.reshape(1, 2, 1, 2)
    assert confidence(logits).item() == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert confidence(logits, regions=True).item() == pytest.approx((3 / 4 + 3 * 1 / 2) / 4)
    assert confidence(-logits, regions=True).item() == pytest.approx((3 / 4 + 3 * 1 / 2) / 4)  # certain of "outside"
