"""The ConfKD objective: partial supervision, distillation and confidence, on one encoder with two decoders.

    L = w_teacher * L_s + w_student * L_w + w_kl * L_kd + w_entropy * L_ent

| term  | branch  | images                                  | formula                                           |
|-------|---------|-----------------------------------------|---------------------------------------------------|
| L_s   | teacher | fully annotated                         | supervised loss over all voxels                   |
| L_w   | student | all                                     | supervised loss over the annotated voxels, or the |
|       |         |                                         | mean of that of the fully annotated images and    |
|       |         |                                         | that of the others; with the class-prior          |
|       |         |                                         | correction (class_prior.py), and hidden classes   |
|       |         |                                         | merged with the background                        |
| L_kd  | student | all (or the fully annotated, or others) | mean over voxels of KL(p_teacher || p_student)    |
| L_ent | student | partially annotated and unlabelled      | mean over voxels of the entropy H(p_student)      |

Source: B. Liu, C. Desrosiers, I. Ben Ayed, J. Dolz, "Segmentation with mixed supervision: Confidence maximization
helps knowledge distillation", Medical Image Analysis 2023, arXiv 2109.10902. The deviations are listed in
docs/explanation/method.md.
Classes that an image is not annotated for: G. Shi, L. Xiao, Y. Chen, S. K. Zhou, "Marginal loss and exclusion loss for
partially supervised multi-organ segmentation", Medical Image Analysis 2021, arXiv 2007.03868 (the marginal loss).

Layout: logits are `(B, C, *spatial)`, a label map is `(B, 1, *spatial)`. With *regions* (overlapping targets) each
channel is a sigmoid head, the target is nnU-Net's `(B, C + 1, *spatial)`, whose last channel is the ignore mask, and
entropy and KL are sums over heads of their two-outcome (Bernoulli) forms. Entropy and KL are in nats and are computed
in float32, also inside autocast.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import log
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_confkd.training.cutmix import Mix, mixed
from nnunet_confkd.training.gradients import full_precision, parts_of, sum_term_by_term
from nnunet_confkd.training.ranks import rank_factors

Outputs = Tensor | Sequence[Tensor]  # at one resolution, or at several, highest first
TERMS = ("teacher", "student", "kl", "entropy")
LOG2_E = 1 / log(2)
NEVER = -1e30  # a float32 logit of probability 0, with a gradient of 0; an infinite one would give NaN


# ---- one quantity per voxel -----------------------------------------------------------------------------------------

def entropy(logits: Tensor, regions: bool = False) -> Tensor:
    """Shannon entropy of the prediction at each voxel, in nats.

    Labels: `H(p) = -sum_c p_c log p_c`, from 0 to log C. Regions: the sum over heads of
    `-p log p - (1 - p) log(1 - p)`, from 0 to C log 2. The logarithms are those of `log_softmax` and `logsigmoid`, so
    that no epsilon is needed.

    Args:
        logits: `(B, C, *spatial)`.
        regions: Whether the channels are sigmoid heads.

    Returns:
        `(B, *spatial)`.

    Raises:
        ValueError: There are no spatial axes.

    Examples:
        >>> undecided = torch.zeros(1, 4, 1, 1)  # four classes, equally likely: log 4
        >>> round(entropy(undecided).item(), 4)
        1.3863
    """
    _check_logits(logits, "logits")
    log_p = _log_probabilities(logits, regions)
    return _over_heads(-(log_p.exp() * log_p).sum(1), regions)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, regions: bool = False) -> Tensor:
    """Kullback-Leibler divergence `KL(p || q)` at each voxel, in nats: what is lost if q stands in for p.

    Labels: `sum_c p_c (log p_c - log q_c)`. Regions: the sum over heads of the KL of two Bernoulli distributions.
    Gradients flow to both arguments.

    Args:
        p_logits: `(B, C, *spatial)`.
        q_logits: Of the same shape.
        regions: Whether the channels are sigmoid heads.

    Returns:
        `(B, *spatial)`.

    Raises:
        ValueError: The shapes differ, or there are no spatial axes.

    Examples:
        >>> p, q = torch.tensor([0.75, 0.25]).log().view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
        >>> round(kl_divergence(p, q).item(), 4)  # 0.75 log(0.75 / 0.5) + 0.25 log(0.25 / 0.5)
        0.1308
    """
    _check_logits(p_logits, "p_logits")
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"p_logits {tuple(p_logits.shape)} and q_logits {tuple(q_logits.shape)} differ in shape")
    log_p, log_q = _log_probabilities(p_logits, regions), _log_probabilities(q_logits, regions)
    return _over_heads((log_p.exp() * (log_p - log_q)).sum(1), regions)


def _log_probabilities(logits: Tensor, regions: bool) -> Tensor:
    """The logarithms of the probabilities of all outcomes, which are on axis 1.

    Labels: `(B, C, *spatial)`. Regions: inside and outside of each, `(B, 2, C, *spatial)`.
    """
    logits = full_precision(logits)
    if regions:
        return torch.stack((F.logsigmoid(logits), F.logsigmoid(-logits)), 1)
    return F.log_softmax(logits, 1)


def _exp(values: Tensor) -> Tensor:
    """`exp`, as quick on all processors: PyTorch's takes nearly three times as long as `exp2` on those of AMD."""
    return (values * LOG2_E).exp2_()


def _over_heads(values: Tensor, regions: bool) -> Tensor:
    """Sum values of each head, `(B, C, *spatial)`, over the heads. Labels have one value for each voxel already."""
    return values.sum(1) if regions else values


@torch.no_grad()
def add_kl_and_entropy(gradient: Tensor | None, student: Tensor, teacher: Tensor | None,
                       factors: dict[str, float | Tensor], regions: bool = False) -> dict[str, Tensor]:
    """Sum `KL(p || q)` and `H(q)` over voxels, and add their gradient to another one, in one pass over the logits.

    p is the teacher's and q the student's prediction. The KL updates the student alone, as in the journal paper
    (arXiv 2109.10902). The derivatives to the student's logits z are, in each voxel,

        d KL(p || q) / dz = q - p
        d H(q) / dz = -q (log q + H(q))

    With regions these are the derivatives of the KL and the entropy of each head, with the probabilities of its inside.

    Args:
        gradient: The derivatives times their factors are added to it. Of the shape of `student`. None: values alone.
        student: Logits, `(B, C, *spatial)`.
        teacher: Logits of the same shape. They are not needed without the KL.
        factors: Of the gradients of "kl" and "entropy". What is not named is not computed.
        regions: Whether the channels are sigmoid heads.

    Returns:
        The sums of what is named over all voxels of all images, without the factors.

    Raises:
        ValueError: The KL is asked for, and the shapes differ.

    Examples:
        >>> teacher, student = torch.tensor([0.75, 0.25]).log().view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
        >>> gradient = torch.zeros_like(student)
        >>> sums = add_kl_and_entropy(gradient, student, teacher, {"kl": 1.0, "entropy": 1.0})
        >>> {term: round(value.item(), 4) for term, value in sums.items()}
        {'kl': 0.1308, 'entropy': 0.6931}
        >>> [round(slope, 4) for slope in gradient.flatten().tolist()]  # q - p, and 0 where the entropy is greatest
        [-0.25, 0.25]
    """
    if "kl" in factors and (teacher is None or teacher.shape != student.shape):
        raise ValueError(f"the KL needs a teacher's logits of the student's shape {tuple(student.shape)}, got "
                         f"{None if teacher is None else tuple(teacher.shape)}")
    sums = {term: full_precision(student[:0]).sum() for term in factors}
    for part in parts_of(student):
        log_q = _log_probabilities(student[part], regions)
        q = _exp(log_q)
        slopes = []  # computed in place of what is not needed any more
        if "kl" in factors:
            log_p = _log_probabilities(teacher[part], regions)
            p = _exp(log_p)
            sums["kl"] += log_p.sub_(log_q).mul_(p).sum()
            slopes.append(torch.sub(q, p, out=p).mul_(factors["kl"]))
        if "entropy" in factors:
            h = -(q * log_q).sum(1, keepdim=True)
            sums["entropy"] += h.sum()
            slopes.append(log_q.add_(h).mul_(q).mul_(-factors["entropy"]))
        for slope in slopes if gradient is not None else ():
            gradient[part] += slope[:, 0] if regions else slope
    return sums


def annotated_voxels(target: Tensor, ignore_label: int | None, regions: bool = False) -> Tensor:
    """Find the voxels that carry a label.

    Args:
        target: A label map `(B, 1, *spatial)`, or regions `(B, C + 1, *spatial)`.
        ignore_label: The data set's ignore label. None: every voxel is annotated.
        regions: Whether `target` holds regions.

    Returns:
        Bool, `(B, 1, *spatial)`.

    Examples:
        >>> annotated_voxels(torch.tensor([[[0, 1, 2]]]), ignore_label=2)
        tensor([[[ True,  True, False]]])
    """
    if ignore_label is None:
        return torch.ones_like(target[:, :1], dtype=torch.bool)
    return ~target[:, -1:].bool() if regions else target != ignore_label


def merge_unlisted(logits: Tensor, listed: Tensor | None, regions: bool = False) -> Tensor:
    """Turn logits into those of the classes that each image is annotated for.

    In an image that is not annotated for all classes, a voxel of value 0 is background or any class that is not listed.
    The probability of this merged class is the sum over them: its logit is `logsumexp` over the logits of the
    background and the classes that are not listed, and takes the place of the background's. The logits of the classes
    that are not listed become `NEVER`. The normaliser of the softmax stays, so that the probabilities of the listed
    classes do, too. With regions the logits of the heads that are not listed become `NEVER`.

    Args:
        logits: `(B, C, *spatial)`.
        listed: Bool, `(B, C)`: for which heads each image is annotated, among them the background. None: all. On the
            CPU, so that no device is waited for.
        regions: Whether the channels are sigmoid heads.

    Returns:
        `(B, C, *spatial)`, in float32 if they were in half precision; `logits` itself if no image has hidden classes.

    Raises:
        ValueError: The shapes do not match.

    Examples:
        >>> logits = torch.zeros(1, 3, 1, 1)  # background and two classes, of which the first one is listed
        >>> merged = merge_unlisted(logits, torch.tensor([[True, True, False]])).softmax(1)
        >>> [round(p, 3) for p in merged.flatten().tolist()]
        [0.667, 0.333, 0.0]
    """
    if listed is None or not len(images := _with_hidden(logits, listed)):
        return logits
    # Numbers of the images with hidden classes, and their heads that are not listed
    hidden = [(int(image), (~listed[image]).nonzero()[:, 0].to(logits.device, non_blocking=True)) for image in images]
    return _MergeUnlisted.apply(full_precision(logits), hidden, regions)


class _MergeUnlisted(torch.autograd.Function):
    """:func:`merge_unlisted`, image by image; beside the result it keeps one logit of each voxel."""

    @staticmethod
    def forward(ctx, logits: Tensor, hidden: list[tuple[int, Tensor]], regions: bool) -> Tensor:
        merged = logits.clone()
        for image, unlisted in hidden:
            merged[image, unlisted] = NEVER
            if not regions:
                merged[image, 0] = torch.logsumexp(logits[image, _with_background(unlisted)], 0)
        ctx.hidden, ctx.regions = hidden, regions
        ctx.save_for_backward(logits, merged[:, :1].clone())
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, arriving: Tensor):
        logits, merged = ctx.saved_tensors
        gradient = arriving.clone()
        for image, unlisted in ctx.hidden:
            if ctx.regions:
                gradient[image, unlisted] = 0
            else:  # the derivative of logsumexp is the softmax
                heads = _with_background(unlisted)
                gradient[image, heads] = (logits[image, heads] - merged[image]).exp_().mul_(arriving[image, :1])
        return gradient, None, None


def _with_background(unlisted: Tensor) -> Tensor:
    """The heads that are merged: the background, number 0, and those that are not listed."""
    return F.pad(unlisted, (1, 0))


def hide_unlisted(target: Tensor, listed: Tensor | None, regions: bool = False) -> Tensor:
    """Turn a target into what an annotator of the listed classes alone would have annotated.

    Args:
        target: A label map `(B, 1, *spatial)`, or regions `(B, C, *spatial)` or `(B, C + 1, *spatial)`, whose last
            channel is then the ignore mask.
        listed: Bool, `(B, C)` as in :func:`merge_unlisted`.
        regions: Whether `target` holds regions.

    Returns:
        A target of the same shape: labels that are not listed are 0, and regions that are not listed are empty.
        `target` itself if no image has hidden classes.

    Examples:
        >>> hide_unlisted(torch.tensor([[[0, 1, 2]]]), torch.tensor([[True, True, False]]))
        tensor([[[0, 1, 0]]])
    """
    images = _with_hidden(target, listed)
    if listed is None or not len(images):
        return target
    images, heads = images.to(target.device), listed.shape[1]
    rows = target[images]
    unlisted = _unlisted(listed, rows)[images]
    if regions:
        hidden = torch.cat((rows[:, :heads].masked_fill(unlisted, 0), rows[:, heads:]), 1)
    else:
        stays = (~unlisted).flatten(1)
        stays[:, 0] = True
        of_class = rows.long().clamp(0, heads - 1).flatten(1)
        hidden = torch.where(stays.gather(1, of_class).view_as(rows) | (rows >= heads) | (rows < 0), rows, 0)
    return target.index_copy(0, images, hidden)


def _with_hidden(tensor: Tensor, listed: Tensor | None) -> Tensor:
    """The numbers of the images that are not annotated for all classes."""
    if listed is None:
        return torch.empty(0, dtype=torch.long)
    if len(listed) != len(tensor):
        raise ValueError(f"listed {tuple(listed.shape)} does not match {tuple(tensor.shape)}")
    return (~listed.all(1)).nonzero()[:, 0]


def _unlisted(listed: Tensor, like: Tensor) -> Tensor:
    """Which heads are not listed, `(B, C, 1, ...)`, on the device of `like`."""
    return (~listed).to(like.device, non_blocking=True).view(*listed.shape, *[1] * (like.ndim - 2))


@torch.no_grad()
def confidence(logits: Tensor, regions: bool = False) -> Tensor:
    """Mean over voxels of the largest probability: 1/C (regions: 1/2) if the prediction is undecided, 1 if certain.

    Args:
        logits: `(B, C, *spatial)`.
        regions: Whether the channels are sigmoid heads; the mean is then over heads, too.

    Returns:
        A scalar without gradient.

    Examples:
        >>> confidence(torch.zeros(1, 4, 1, 1)).item()
        0.25
    """
    if regions:
        return torch.sigmoid(logits.float().abs()).mean()
    return logits.float().softmax(1).amax(1).mean()


def _check_logits(logits: Tensor, name: str) -> None:
    if logits.ndim < 3:
        raise ValueError(f"{name} must be (B, C, *spatial), got shape {tuple(logits.shape)}")


def _zero_with_graph(tensor: Tensor) -> Tensor:
    """A float32 zero that depends on `tensor`: the sum of nothing, so that no inf or NaN in it can reach the zero."""
    return tensor.flatten()[:0].float().sum()


def _shifted(logits: Tensor, num_full: int, shift: Tensor | None, mix: Mix | None, listed: Tensor | None) -> Tensor:
    """Add a constant for each class, `(C,)`, to the logits of the voxels that are not of fully annotated images.

    Images with hidden classes are left out: annotated background is no fair sample of the merged background.
    """
    if shift is None or num_full == len(logits):
        return logits
    shift = shift.view(1, -1, *[1] * (logits.ndim - 2))
    if mix is not None:
        of_full = torch.zeros_like(logits[:, :1])
        of_full[:num_full] = 1
        return logits + (1 - mix(of_full)) * shift
    if listed is not None and len(_with_hidden(logits, listed)):
        whole = listed[num_full:].all(1).to(shift.device, non_blocking=True)
        shift = shift * whole.view(-1, *[1] * (logits.ndim - 1))
    return torch.cat((logits[:num_full], logits[num_full:] + shift))


# ---- supervised loss ------------------------------------------------------------------------------------------------

class PartialSupervision(nn.Module):
    """nnU-Net's supervised loss over the annotated voxels of a batch: L_s on the teacher, L_w on the student.

    Images without any annotated voxel do not enter it. On one process the value equals nnU-Net's to the bit if every
    image has annotated voxels and is annotated for all classes.

    Classes that an image is not annotated for are merged with its background (:func:`merge_unlisted`): nnU-Net's
    cross-entropy then is the marginal one. The Dice is the mean over the listed classes. In nnU-Net's mean a class that
    no image of the batch lists (with a Dice of each image: that this image does not list) has a Dice of exactly 1, and
    would weaken the gradient of the others.

    Args:
        loss: nnU-Net's compound loss of Dice and (binary) cross-entropy, which masks the ignore label itself.
        ignore_label: The data set's ignore label, or None.
        regions: Whether the channels are sigmoid heads.
        ddp: Whether the images are those of one rank of several. The average over the ranks is then the loss of all
            ranks' images together, and every rank must call it. Ranks may have different numbers of images and of
            annotated voxels, also none. (nnU-Net's own cross-entropy is the mean of each rank, in which voxels weigh
            more if few are annotated.)

    Examples:
        >>> from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        >>> loss = PartialSupervision(DC_and_CE_loss({}, {}, ignore_label=2), ignore_label=2)
        >>> target = torch.full((1, 1, 4, 4), 2)  # nothing is annotated
        >>> loss(torch.zeros(1, 2, 4, 4), target).item()
        0.0
    """

    def __init__(self, loss: Any, ignore_label: int | None, regions: bool = False, ddp: bool = False):
        super().__init__()
        self.loss, self.ignore_label, self.regions, self.ddp = loss, ignore_label, regions, ddp

    def forward(self, logits: Tensor, target: Tensor, listed: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            logits: `(B, C, *spatial)`.
            target: A label map `(B, 1, *spatial)`, or regions `(B, C + 1, *spatial)`.
            listed: Bool, `(B, C)`, on the CPU: for which heads each image is annotated. None: all images for all heads.
                On several ranks it must be None on all of them or on none.

        Returns:
            A scalar; zero, with a graph, if no voxel is annotated.

        Raises:
            ValueError: The logits and the target differ in the number of images or in their spatial shape.
        """
        return torch.stack(list(self.parts(logits, target, listed))).sum()

    def parts(self, logits: Tensor, target: Tensor, listed: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the Dice, then the cross-entropy, of which :meth:`forward` is the sum.

        One after the other they need less memory. With regions, whose loss computes both in any case, there is one
        part. The arguments are those of :meth:`forward`.
        """
        if logits.shape[0] != target.shape[0] or logits.shape[2:] != target.shape[2:]:
            raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} do not match")
        if self.regions:  # labels that are not listed do not occur
            target = hide_unlisted(target, listed, regions=True)
        annotated, of_images, images = annotated_voxels(target, self.ignore_label, self.regions), listed, None
        known = annotated.flatten(1).any(1).tolist()  # of each image; the only time that the device is waited for
        if not getattr(getattr(self.loss, "dc", None), "batch_dice", True) and not all(known):
            # In the mean of the images' Dice an image without annotation counts as perfect, which weakens the gradient
            # of the others.
            images = torch.tensor(known, device=annotated.device)
            target, annotated = target[images], annotated[images]
            of_images = None if listed is None else listed[torch.tensor(known)]
        lists = None if listed is None or not hasattr(self.loss, "dc") else self._lists(annotated, of_images)
        factors, excess = self._factors(annotated, not any(known), lists)
        if factors is None:
            yield _zero_with_graph(logits)
            return
        for chosen in ((0, 1), (1, 0)) if isinstance(self.loss, DC_and_CE_loss) else ((1, 1),):
            # Each part has a graph of its own.
            merged = merge_unlisted(logits, listed, self.regions)
            value = self._weighted(merged if images is None else merged[images], target,
                                   *(factor * share for factor, share in zip(factors, chosen)))
            # nnU-Net's losses return a plain 0 if there is nothing to learn from
            yield value if torch.is_tensor(value) else _zero_with_graph(logits)
        if excess:
            yield torch.full((), excess, device=logits.device)

    def _factors(self, annotated: Tensor, nothing: bool,
                 lists: Tensor | None) -> tuple[tuple[float, float] | None, float]:
        """Factors of cross-entropy and Dice, None if no voxel is annotated; and what the loss is too small by.

        `nothing` says whether no voxel of this rank is annotated.

        With several ranks the mean of their losses, with these factors, is the loss of all images. nnU-Net's mean
        counts a Dice of 1 for classes that are not listed.
        """
        if not self.ddp:
            voxel_factor, image_factor, dice_factor = 1.0, 1.0, self._dice_factor(lists)
        else:
            number = annotated.sum()
            counts = torch.stack((number, number.new_tensor(len(annotated))))
            found, totals = rank_factors(counts if lists is None else torch.cat((counts, lists)))
            nothing, (voxel_factor, image_factor) = bool(totals[0] == 0), found[:2].tolist()
            dice_factor = self._dice_factor(None if lists is None else totals[2:])
            if self.loss.dc.batch_dice:
                image_factor = 1.0  # the Dice is that of all ranks already
        if nothing:
            return None, 0.0
        excess = self.loss.weight_dice * (dice_factor - 1) if dice_factor != 1 else 0.0
        return (voxel_factor, image_factor * dice_factor), excess

    def _lists(self, annotated: Tensor, listed: Tensor) -> Tensor:
        """How many images list each class of the Dice, and how many there are in all: `(classes + 1,)`."""
        counted = torch.cat((listed if self.loss.dc.do_bg else listed[:, 1:], torch.ones_like(listed[:, :1])), 1)
        return (annotated.flatten(1).any(1, keepdim=True) & counted.to(annotated.device)).sum(0)

    def _dice_factor(self, lists: Tensor | None) -> float:
        """What the mean over all classes must be multiplied by, to be that over the listed ones; 1 if all are listed.

        Args:
            lists: That of :meth:`_lists`, of all ranks together; None if no image has hidden classes.
        """
        if lists is None:
            return 1.0
        *numbers, images = lists.tolist()
        if self.loss.dc.batch_dice:
            return len(numbers) / max(1, sum(map(bool, numbers)))
        return len(numbers) * images / max(1, sum(numbers))

    def _weighted(self, logits: Tensor, target: Tensor, ce_factor: float, dice_factor: float) -> Tensor | int:
        """nnU-Net's loss with factors of its two weights."""
        if self.ddp and self.loss.dc.batch_dice:
            # nnU-Net gathers the sums of the Dice over the ranks, and equal shapes are needed for that. Folding the
            # batch axis into space, (1, C, B, *spatial), keeps the sums.
            logits, target = logits.transpose(0, 1)[None], target.transpose(0, 1)[None]
            if not target.numel() and self.regions and self.ignore_label is None:
                # the cross-entropy of no voxels is not a number, and nnU-Net leaves it out only with an ignore label
                return self.loss.weight_dice * dice_factor * self.loss.dc(logits, target)
        elif not len(logits):
            return 0
        if ce_factor == dice_factor == 1:
            return self.loss(logits, target)
        weights = self.loss.weight_ce, self.loss.weight_dice
        self.loss.weight_ce, self.loss.weight_dice = weights[0] * ce_factor, weights[1] * dice_factor
        try:
            return self.loss(logits, target)
        finally:
            self.loss.weight_ce, self.loss.weight_dice = weights

# ---- the joint objective --------------------------------------------------------------------------------------------

class _Batch(NamedTuple):
    """What the terms of a batch need at each resolution; see :meth:`ConfKDLoss.forward`."""

    num_full: int
    weights: dict[str, float]  # of the terms, with the ramp
    rank_factors: dict[str, float | Tensor]
    prior_shift: Tensor | None
    mix: Mix | None
    listed: Tensor | None


class ConfKDLoss(nn.Module):
    """The joint objective over a batch whose first images are fully annotated.

    Each mean is over the voxels of all images of a term together. With DDP (`supervised.ddp`) these are the images of
    all ranks: the terms of a rank are scaled such that their average over the ranks is the mean over all images.

    Args:
        supervised: The loss of L_s and L_w, e.g. :class:`PartialSupervision`.
        weights: Weight of each of the `TERMS`. A term of weight 0 is not computed.
        resolution_weights: Weight of each output of the deep supervision, highest resolution first, as nnU-Net's.
            Resolutions of weight 0 are not computed. One entry if there is no deep supervision.
        regions: Whether the channels are sigmoid heads.
        kl_images: Images on which the KL acts: "full" (fully annotated), "partial" (all others) or "all".
        extra_resolutions: Resolutions of KL and entropy: the "highest", or "all" with the weights of the deep
            supervision.
        equal_kinds: Whether L_w is the mean of the loss over the fully annotated images and that over the others, of
            which one without any annotated voxel counts as 0. Else it is one loss over all annotated voxels.

    Raises:
        ValueError: The weights are not those of the terms.

    Examples:
        >>> from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        >>> supervised = PartialSupervision(DC_and_CE_loss({}, {}, ignore_label=2), ignore_label=2)
        >>> loss = ConfKDLoss(supervised, {"teacher": 1.0, "student": 1.0, "kl": 3.0, "entropy": 0.01})
        >>> student, teacher = torch.randn(2, 2, 2, 8, 8)
        >>> target = torch.randint(0, 2, (2, 1, 8, 8))
        >>> target[1] = 2  # the first image is fully annotated, the second is not
        >>> total, terms = loss(student, teacher, target, num_full=1)
        >>> sorted(terms)
        ['entropy', 'kl', 'student', 'teacher']
    """

    def __init__(self, supervised: nn.Module, weights: dict[str, float], *,
                 resolution_weights: Sequence[float] = (1.0,), regions: bool = False, kl_images: str = "all",
                 extra_resolutions: str = "highest", equal_kinds: bool = False):
        super().__init__()
        if set(weights) != set(TERMS):
            raise ValueError(f"weights must name the terms {TERMS}, got {sorted(weights)}")
        self.supervised = supervised
        self.weights = dict(weights)
        self.resolution_weights = tuple(float(w) for w in resolution_weights)
        self.regions, self.kl_images, self.extra_resolutions = regions, kl_images, extra_resolutions
        self.equal_kinds = equal_kinds

    @property
    def teaches_all(self) -> bool:
        """Whether the KL acts on images that are not fully annotated."""
        return self.weights["kl"] > 0 and self.kl_images != "full"

    @property
    def ddp(self) -> bool:
        """Whether the batch is that of one rank of several."""
        return getattr(self.supervised, "ddp", False)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Outputs, num_full: int,
                kl_ramp: float = 1.0, prior_shift: Tensor | None = None, mix: Mix | None = None,
                listed: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            student: The student's logits `(B, C, *spatial)`, or a list of them, highest resolution first.
            teacher: The teacher's logits, likewise; of the fully annotated images alone if `kl_images` is "full".
                None if the weights of its terms are 0.
            target: Label maps `(B, 1, *spatial)` or regions `(B, C + 1, *spatial)`, likewise.
            num_full: Number of fully annotated images.
            kl_ramp: Factor of the KL's weight at this time of the training. With 0 the KL is not computed.
            prior_shift: The class-prior correction `(C,)`, which L_w adds to the student's logits of images that are
                not fully annotated (see :mod:`nnunet_confkd.training.class_prior`). None: no correction.
            mix: How the student's images were mixed (see :mod:`nnunet_confkd.training.cutmix`). The teacher's logits
                and the target are those of the images as they were. None: not at all.
            listed: Bool, `(B, C)`, on the CPU: for which heads each image is annotated, for L_s and L_w. None: all. It
                cannot be combined with `mix`, whose images have several lists.

        Returns:
            The scalar to minimise, and the unweighted terms by name, detached scalars.

        Raises:
            ValueError: A teacher is needed but missing, the numbers of resolutions differ, or `mix` is given together
                with `listed` or `equal_kinds`.
        """
        if mix is not None and listed is not None:
            raise ValueError("mixed images have several lists of classes: give either mix or listed")
        if mix is not None and self.equal_kinds:
            raise ValueError("mixed images are of both kinds, which cannot have equal weights")
        student, teacher, target = ([x] if torch.is_tensor(x) else x for x in (student, teacher, target))
        if teacher is None:
            if self.weights["teacher"] or self.weights["kl"]:
                raise ValueError("the weights of 'teacher' and 'kl' are above 0, but no teacher's logits were given")
            teacher = [None] * len(student)
        if not len(student) == len(teacher) == len(target) == len(self.resolution_weights):
            raise ValueError(f"{len(student)} student outputs, {len(teacher)} teacher outputs and {len(target)} "
                             f"targets for {len(self.resolution_weights)} resolution weights")
        batch = _Batch(num_full, self.weights | {"kl": self.weights["kl"] * kl_ramp},
                       self._rank_factors(student[0], num_full), prior_shift, mix, listed)
        total: Any = 0.0
        sums = {term: torch.zeros((), device=student[0].device) for term in TERMS}

        def weighted(i: int, *logits: Tensor) -> Iterator[Tensor]:
            for values, loss in self._terms(i, logits, teacher[i], target[i], batch):
                for term, value in values.items():
                    sums[term] = sums[term] + value
                yield loss

        for i, resolution_weight in enumerate(self.resolution_weights):
            if resolution_weight:
                taught = () if teacher[i] is None else (teacher[i][:num_full],)
                total = total + sum_term_by_term(partial(weighted, i), student[i], *taught)
        if self.ddp and not (batch.weights["student"] and batch.weights["teacher"]):
            # DDP fails on parameters without gradient, such as those of a decoder whose terms all have weight 0.
            total = total + sum(_zero_with_graph(output) for output in (*student, *teacher) if output is not None)
        return total, sums

    def _terms(self, i: int, logits: tuple[Tensor, ...], teacher: Tensor | None, target: Tensor,
               batch: _Batch) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the terms at the resolution i: the unweighted values by name, and their weighted sum.

        L_w, which needs most memory, comes first.

        Args:
            i: Number of the resolution.
            logits: The student's, and the teacher's of the fully annotated images.
            teacher: The teacher's of all images.
            target: That of the resolution.
            batch: What is the same at all resolutions.
        """
        student, weights, full = logits[0], batch.weights, slice(batch.num_full)
        lists = () if batch.listed is None else (batch.listed,)
        if weights["student"]:
            shifted = _shifted(student, batch.num_full, batch.prior_shift, batch.mix, batch.listed)
            of_student = shifted, mixed(target, batch.mix), *lists
            kinds = (full, slice(batch.num_full, None)) if self.equal_kinds else (slice(None),)
            for kind in kinds:  # also one without images: with DDP another rank may have some
                yield from self._supervised("student", i, 1 / len(kinds), *(values[kind] for values in of_student))
        if weights["teacher"]:
            yield from self._supervised("teacher", i, 1.0, logits[1], *(values[full] for values in (target, *lists)))
        if (weights["kl"] or weights["entropy"]) and (i == 0 or self.extra_resolutions == "all"):
            share = 1.0 if self.extra_resolutions == "highest" else self.resolution_weights[i]
            yield self._unsupervised(student, teacher, share, batch)

    def _supervised(self, term: str, i: int, share: float, *args: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """A share of L_s or L_w at the resolution i, in parts if the supervised loss has some; see :meth:`_terms`."""
        supervised: Any = self.supervised
        for value in supervised.parts(*args) if hasattr(supervised, "parts") else (supervised(*args),):
            value = share * self.resolution_weights[i] * value
            yield {term: value.detach()}, self.weights[term] * value

    def _unsupervised(self, student: Tensor, teacher: Tensor | None, share: float, batch: _Batch
                      ) -> tuple[dict[str, Tensor], Tensor]:
        """L_kd and L_ent, times the share of a resolution; see :meth:`_terms`.

        The gradient is added to that of the student's logits, and the values have no graph.
        """
        number = {"full": batch.num_full, "partial": len(student) - batch.num_full, "all": len(student)}
        images = {"kl": self.kl_images, "entropy": "partial"}
        of_voxel = {term: share * batch.rank_factors[which] / max(1, number[which] * student.shape[2:].numel())
                    for term, which in images.items() if batch.weights[term]}
        if student.requires_grad and student.grad is None:
            student.grad = torch.zeros_like(student)
        teacher = mixed(teacher.detach(), batch.mix) if teacher is not None and "kl" in of_voxel else None
        values = {term: torch.zeros((), device=student.device) for term in of_voxel}
        for stratum, chosen in (("full", slice(batch.num_full)), ("partial", slice(batch.num_full, None))):
            here = {term: factor for term, factor in of_voxel.items() if images[term] in (stratum, "all")}
            if here and number[stratum]:
                gradient, of_teacher = (None if x is None else x[chosen] for x in (student.grad, teacher))
                sums = add_kl_and_entropy(gradient, student[chosen], of_teacher,
                                          {term: batch.weights[term] * factor for term, factor in here.items()},
                                          self.regions)
                for term, total in sums.items():
                    values[term] = values[term] + here[term] * total
        return values, torch.stack([batch.weights[term] * value for term, value in values.items()]).sum()

    def _rank_factors(self, logits: Tensor, num_full: int) -> dict[str, float | Tensor]:
        """Factors of this rank's means over the "full", "partial" and "all" images; 1 without DDP."""
        counts = {"full": num_full, "partial": len(logits) - num_full, "all": len(logits)}
        if not self.ddp:
            return dict.fromkeys(counts, 1.0)
        factors, _ = rank_factors(torch.tensor(list(counts.values()), device=logits.device))
        return dict(zip(counts, factors))
