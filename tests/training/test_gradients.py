"""Losses whose gradient is computed with their value, against PyTorch's own gradients and finite differences."""
from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_confkd.training import gradients
from nnunet_confkd.training.gradients import mean_in_parts, sum_term_by_term
from nnunet_confkd.training.losses import TERMS, ConfKDLoss, PartialSupervision, entropy, kl_divergence

SPATIAL = {1: (7,), 2: (7, 5), 3: (7, 3, 4)}
each_dimension = pytest.mark.parametrize("ndim", SPATIAL, ids=("1d", "2d", "3d"))
each_head = pytest.mark.parametrize("regions", (False, True), ids=("softmax", "regions"))
# of 3 images with 4 channels: all at once, image by image, slabs of several sizes, and row by row
each_size = pytest.mark.parametrize("part", (10 ** 6, 4 * 7 * 12, 200, 40, 1))


def random_logits(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_gradients(value: torch.Tensor, *logits: torch.Tensor) -> list[torch.Tensor]:
    return [value.detach(), *torch.autograd.grad(3 * value, logits)]


@each_size
@each_head
@each_dimension
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_the_mean_in_parts_is_the_mean(monkeypatch, ndim, regions, part, dtype):
    monkeypatch.setattr(gradients, "PART", part)
    p, q = (random_logits(3, 4, *SPATIAL[ndim], seed=s, dtype=dtype).requires_grad_() for s in (0, 1))
    for quantity, logits in ((entropy, (p,)), (kl_divergence, (p, q))):
        found = mean_in_parts(lambda *of_part: quantity(*of_part, regions), *logits)
        expected = quantity(*logits, regions).mean()
        torch.testing.assert_close(with_gradients(found, *logits), with_gradients(expected, *logits))


@each_size
@each_head
def test_the_gradient_of_the_mean_is_that_of_finite_differences(monkeypatch, regions, part):
    monkeypatch.setattr(gradients, "PART", part)
    p, q = (random_logits(2, 3, 2, 2, seed=s).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda *x: mean_in_parts(lambda *y: kl_divergence(*y, regions), *x), (p, q))
    assert torch.autograd.gradcheck(lambda x: mean_in_parts(lambda y: entropy(y, regions), x), (p,))


def test_logits_that_need_no_gradient_get_none():
    p, q = (random_logits(2, 3, 4, 4, seed=s).requires_grad_(s == 1) for s in (0, 1))
    mean_in_parts(kl_divergence, p, q).backward()
    assert p.grad is None and q.grad.any()
    with torch.no_grad():
        assert not mean_in_parts(kl_divergence, p, q).requires_grad
    # one that the quantity does not depend on has a gradient of zero
    p.requires_grad_()
    mean_in_parts(lambda x, y: kl_divergence(x.detach(), y), p, q).backward()
    assert not p.grad.any()


def test_no_image_has_a_mean_of_zero_with_a_graph():
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    value = mean_in_parts(entropy, empty)
    value.backward()
    assert value.item() == 0 and empty.grad.shape == empty.shape


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(1, 3, 4\)"):
        mean_in_parts(kl_divergence, torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    """A gradient of 1e-9 is zero in float16: the scale of the loss must reach it before it is rounded."""
    logits = [random_logits(1, 3, 8, 8, seed=s).to(dtype).requires_grad_() for s in (0, 1)]
    single = [x.detach().float().requires_grad_() for x in logits]
    for function, expected in (
            (lambda *x: mean_in_parts(kl_divergence, *x), kl_divergence(*single).mean()),
            (lambda *x: sum_term_by_term(lambda *y: iter([1e-9 * entropy(y[0]).sum(), 1e-9 * y[1].sum()]), *x),
             1e-9 * (entropy(single[0]).sum() + single[1].sum()))):
        with torch.autocast("cpu", torch.bfloat16):
            found = function(*logits)
        torch.testing.assert_close(found, expected)
        exact = torch.autograd.grad(2.0 ** 16 * expected, single)
        for gradient, of_single in zip(torch.autograd.grad(2.0 ** 16 * found, logits), exact):
            assert gradient.dtype == dtype and gradient.any()
            torch.testing.assert_close(gradient, of_single.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@each_head
def test_huge_logits_stay_finite(regions, dtype):
    huge = torch.tensor([1e4, -1e4, -1e4], dtype=dtype).reshape(1, 3, 1, 1)
    p, q = huge.clone().requires_grad_(), (-huge).requires_grad_()
    value = mean_in_parts(lambda *x: kl_divergence(*x, regions) + entropy(x[0], regions), p, q)
    assert all(torch.isfinite(x).all() for x in with_gradients(value, p, q))


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
    extra = peak_bytes(lambda: mean_in_parts(kl_divergence, teacher.detach(), student).backward()) / size
    assert of_ours < 0.9 * of_stock and extra < 2.5
