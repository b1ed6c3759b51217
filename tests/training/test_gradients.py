"""Losses whose gradient is computed with their value, against PyTorch's own gradients and finite differences."""
from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_confkd.training import gradients
from nnunet_confkd.training.gradients import sum_term_by_term
from nnunet_confkd.training.losses import (
    TERMS,
    ConfKDLoss,
    PartialSupervision,
    add_kl_and_entropy,
    entropy,
    kl_divergence,
)

SPATIAL = {1: (7,), 2: (7, 5), 3: (7, 3, 4)}
each_dimension = pytest.mark.parametrize("ndim", SPATIAL, ids=("1d", "2d", "3d"))
each_head = pytest.mark.parametrize("regions", (False, True), ids=("softmax", "regions"))
# of 3 images with 4 channels: all at once, image by image, slabs of several sizes, and row by row
each_size = pytest.mark.parametrize("part", (10 ** 6, 4 * 7 * 12, 200, 40, 1))


def random_logits(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_gradients(value: torch.Tensor, *logits: torch.Tensor) -> list[torch.Tensor]:
    return [value.detach(), *torch.autograd.grad(3 * value, logits)]


# Factors of the gradients, also as a rank's factors are given
each_choice = pytest.mark.parametrize("factors", ({"kl": 0.3}, {"entropy": torch.tensor(0.7)},
                                                  {"kl": torch.tensor(0.3), "entropy": 0.7}),
                                      ids=("kl", "entropy", "both"))


def plain(student, teacher, factors, regions=False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The sums and the gradient by the formulas of each voxel and PyTorch's gradients."""
    student = student.detach().clone().requires_grad_()
    sums = {"kl": kl_divergence(teacher, student, regions).sum(), "entropy": entropy(student, regions).sum()}
    gradient, = torch.autograd.grad(sum(factor * sums[term] for term, factor in factors.items()), student)
    return {term: sums[term].detach() for term in factors}, gradient


@each_size
@each_head
@each_dimension
@each_choice
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_kl_and_entropy_in_one_pass_are_those_of_the_formulas(monkeypatch, ndim, regions, part, dtype, factors):
    monkeypatch.setattr(gradients, "PART", part)
    student, teacher = (random_logits(3, 4, *SPATIAL[ndim], seed=s, dtype=dtype) for s in (0, 1))
    gradient = torch.ones_like(student)
    found = add_kl_and_entropy(gradient, student, teacher, factors, regions)
    expected, of_formulas = plain(student, teacher, factors, regions)
    torch.testing.assert_close((found, gradient - 1), (expected, of_formulas),
                               **({"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {}))
    torch.testing.assert_close(add_kl_and_entropy(None, student, teacher, factors, regions), found)


@each_head
def test_the_gradient_of_the_objective_is_that_of_finite_differences(monkeypatch, regions):
    monkeypatch.setattr(gradients, "PART", 20)
    loss = ConfKDLoss(None, {"teacher": 0, "student": 0, "kl": 0.3, "entropy": 0.7}, regions=regions)
    student, teacher = (random_logits(3, 3, 2, 2, seed=s) for s in (0, 1))
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, torch.zeros(3, 1, 2, 2), 2)[0],
                                    (student.requires_grad_(),))


def test_the_kl_and_the_entropy_do_not_update_the_teacher_and_no_gradient_is_computed_where_none_is_needed():
    loss = ConfKDLoss(None, {"teacher": 0, "student": 0, "kl": 0.3, "entropy": 0.7})
    student, teacher = (random_logits(3, 3, 2, 2, seed=s).requires_grad_() for s in (0, 1))
    loss(student, teacher, torch.zeros(3, 1, 2, 2), 2)[0].backward()
    assert teacher.grad is None and student.grad.any()
    with torch.no_grad():
        assert not loss(student, teacher, torch.zeros(3, 1, 2, 2), 2)[0].requires_grad


@pytest.mark.parametrize("teacher", (None, torch.zeros(1, 3, 4)), ids=("missing", "of another shape"))
def test_a_teacher_that_does_not_fit_is_refused(teacher):
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*(None|\(1, 3, 4\))"):
        add_kl_and_entropy(None, torch.zeros(2, 3, 4), teacher, {"kl": 1.0})
    assert set(add_kl_and_entropy(None, torch.zeros(2, 3, 4), teacher, {"entropy": 1.0})) == {"entropy"}


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    """A gradient of 1e-9 is zero in float16: the scale of the loss must reach it before it is rounded."""
    logits = [random_logits(1, 3, 8, 8, seed=s).to(dtype).requires_grad_() for s in (0, 1)]
    single = [x.detach().float().requires_grad_() for x in logits]
    sums = add_kl_and_entropy(None, logits[0].detach(), logits[1].detach(), {"kl": 1, "entropy": 1})
    torch.testing.assert_close(sums, plain(single[0], single[1].detach(), sums)[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = sum_term_by_term(lambda *y: iter([1e-9 * entropy(y[0]).sum(), 1e-9 * y[1].sum()]), *logits)
    expected = 1e-9 * (entropy(single[0]).sum() + single[1].sum())
    torch.testing.assert_close(found, expected)
    exact = torch.autograd.grad(2.0 ** 16 * expected, single)
    for gradient, of_single in zip(torch.autograd.grad(2.0 ** 16 * found, logits), exact):
        assert gradient.dtype == dtype and gradient.any()
        torch.testing.assert_close(gradient, of_single.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@each_head
def test_huge_logits_stay_finite(regions, dtype):
    huge = torch.tensor([1e4, -1e4, -1e4], dtype=dtype).reshape(1, 3, 1, 1)
    for student, teacher in ((huge, -huge), (-huge, huge)):
        gradient = torch.zeros(huge.shape)
        sums = add_kl_and_entropy(gradient, student, teacher, {"kl": 1.0, "entropy": 1.0}, regions)
        assert all(torch.isfinite(x).all() for x in (gradient, *sums.values()))
        assert gradient.abs().max() == 1 and sums["kl"] >= 1e4  # certain, and wrong


def test_a_sum_term_by_term_is_the_sum():
    def terms(a, b):
        yield (a ** 2).sum()
        yield (a * b).mean()
        yield torch.tensor(5.0)  # a constant

    a, b = (random_logits(2, 3, 4, seed=s).requires_grad_() for s in (0, 1))
    torch.testing.assert_close(with_gradients(sum_term_by_term(terms, a, b), a, b),
                               with_gradients(sum(terms(a, b)), a, b))
    assert torch.autograd.gradcheck(lambda *x: sum_term_by_term(terms, *x), (a, b))
    sum_term_by_term(lambda x, y: iter([x.sum()]), a, b).backward()
    assert a.grad.any() and b.grad is None, "what no term depends on has no gradient"


def peak_bytes(call) -> int:
    """The largest memory of all tensors that a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = highest = 0
    for _, change in sorted((event.start_ns(), event.nbytes())
                            for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"):
        now += change
        highest = max(highest, now)
    return highest


def test_the_objective_needs_less_memory_than_nnunets_loss_of_the_student_alone(monkeypatch):
    monkeypatch.setattr(gradients, "PART", 2 ** 14)
    classes, shape = 40, (4, 40, 64, 64)
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    stock = DC_and_CE_loss(dice, {}, ignore_label=classes, dice_class=MemoryEfficientSoftDiceLoss)
    loss = ConfKDLoss(PartialSupervision(stock, classes), dict.fromkeys(TERMS, 1.0))
    student, teacher = (random_logits(*shape, seed=s, dtype=torch.float32).requires_grad_() for s in (0, 1))
    target = torch.randint(0, classes + 1, (4, 1, 64, 64), generator=torch.Generator().manual_seed(2))
    size = student.nbytes
    of_stock = peak_bytes(lambda: stock(student, target).backward()) / size
    of_ours = peak_bytes(lambda: loss(student, teacher, target, 2)[0].backward()) / size
    gradient = torch.zeros_like(student)
    extra = peak_bytes(lambda: add_kl_and_entropy(gradient, student, teacher, {"kl": 1, "entropy": 1})) / size
    assert of_ours < 0.9 * of_stock and extra < 0.2
