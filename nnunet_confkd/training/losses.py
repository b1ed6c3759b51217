"""The ConfKD objective: partial supervision, distillation and confidence, on one encoder with two decoders.

    L = w_teacher * L_s + w_student * L_w + w_kl * L_kd + w_entropy * L_ent

| term  | branch  | images                     | formula                                                        |
|-------|---------|----------------------------|----------------------------------------------------------------|
| L_s   | teacher | fully labelled             | supervised loss over all voxels                                |
| L_w   | student | all (or the partial ones)  | supervised loss over the annotated voxels                      |
| L_kd  | student | all (or fully labelled)    | mean over voxels of KL(p_teacher || p_student)                 |
| L_ent | student | partial and unlabelled     | mean over voxels of the Shannon entropy of p_student           |

Source: B. Liu, C. Desrosiers, I. Ben Ayed, J. Dolz, "Segmentation with mixed supervision: Confidence maximization
helps knowledge distillation", Medical Image Analysis 2023, arXiv 2109.10902; and J. Dolz, C. Desrosiers,
I. Ben Ayed, "Teach me to segment with mixed supervision", IPMI 2021, arXiv 2012.08051 ("the conference paper").

Layout: logits are `(B, C, *spatial)`, a label map is `(B, 1, *spatial)`. With *regions* (overlapping targets) every
channel is a sigmoid head of its own, and entropy and KL are sums over heads of their two-outcome (Bernoulli) forms.
Entropy and KL are in nats and are computed in float32, inside autocast too.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

TERMS = ("teacher", "student", "kl", "entropy")


def _zero_with_graph(tensor: Tensor) -> Tensor:
    """A float32 zero that depends on `tensor`; an empty sum, so that no inf or NaN in it can reach the zero."""
    return tensor.flatten()[:0].float().sum()


def _check_logits(logits: Tensor, name: str = "logits") -> None:
    if logits.ndim < 3:
        raise ValueError(f"{name} must be (B, C, *spatial), got shape {tuple(logits.shape)}")


def _full_precision(logits: Tensor) -> Tensor:
    """Half precision (autocast) becomes float32; float32 and float64 stay."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _mean(values: Tensor) -> Tensor:
    """Mean over all voxels, `(B, *spatial)` -> scalar; zero, with a graph, where there is no image."""
    return values.mean() if values.numel() else _zero_with_graph(values)


def entropy(logits: Tensor, regions: bool = False) -> Tensor:
    """Shannon entropy of the prediction at each voxel, in nats.

    Softmax labels: `H(p) = -sum_c p_c log p_c`, between 0 and log C. Regions: the sum over heads of
    `-p log p - (1 - p) log(1 - p)`, between 0 and C log 2.

    logits: `(B, C, *spatial)`. Returns `(B, *spatial)`.
    The conference paper's code divides by C as well; this does not (the term is the papers' formula).
    """
    _check_logits(logits)
    logits = _full_precision(logits)
    if regions:
        return -(torch.sigmoid(logits) * F.logsigmoid(logits) + torch.sigmoid(-logits) * F.logsigmoid(-logits)).sum(1)
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, regions: bool = False) -> Tensor:
    """`KL(p || q)` at each voxel, in nats: how much is lost where q stands in for p.

    Softmax labels: `sum_c p_c (log p_c - log q_c)`. Regions: the sum over heads of the Bernoulli KL.
    Nothing is detached here.

    p_logits, q_logits: `(B, C, *spatial)`, same shape. Returns `(B, *spatial)`.
    Raises ValueError where the shapes differ.
    """
    _check_logits(p_logits, "p_logits")
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"p_logits {tuple(p_logits.shape)} and q_logits {tuple(q_logits.shape)} differ in shape")
    p_logits, q_logits = _full_precision(p_logits), _full_precision(q_logits)
    if regions:
        inside = torch.sigmoid(p_logits) * (F.logsigmoid(p_logits) - F.logsigmoid(q_logits))
        outside = torch.sigmoid(-p_logits) * (F.logsigmoid(-p_logits) - F.logsigmoid(-q_logits))
        return (inside + outside).sum(1)
    log_p, log_q = F.log_softmax(p_logits, 1), F.log_softmax(q_logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def distillation(teacher: Tensor, student: Tensor, *, regions: bool = False, reference: str = "teacher",
                 detach_teacher: bool = True, temperature: float = 1.0, softmax_twice: bool = False) -> Tensor:
    """The distillation term at each voxel, in nats: `T^2 KL(reference || other)` of logits divided by T.

    teacher, student: logits, `(B, C, *spatial)`.
    reference: the branch whose distribution is the first argument of the KL. "teacher" is the journal paper's
        direction; the conference paper's code takes the student.
    detach_teacher: the gradient stops at the teacher's logits (journal paper); False lets it flow (conference paper).
    temperature: T. The factor T^2 keeps the size of the gradient (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).
    softmax_twice: the conference paper's form, `T^2 / (2 C)` times the KL of a softmax over the *softmax outputs*
        divided by T; the C because its code averages over the channels, too. For softmax labels only.
    Returns `(B, *spatial)`. Raises ValueError for an unknown reference, or softmax_twice with regions.
    """
    if reference not in ("teacher", "student"):
        raise ValueError(f"reference must be 'teacher' or 'student', got {reference!r}")
    if detach_teacher:
        teacher = teacher.detach()
    teacher, student = _full_precision(teacher), _full_precision(student)
    scale = temperature ** 2
    if softmax_twice:
        if regions:
            raise ValueError("the softmax over the softmax is defined for softmax labels, not for regions")
        teacher, student = teacher.softmax(1), student.softmax(1)
        scale /= 2 * teacher.shape[1]
    p, q = (teacher, student) if reference == "teacher" else (student, teacher)
    return scale * kl_divergence(p / temperature, q / temperature, regions)


def annotated_voxels(target: Tensor, ignore_label: int | None, regions: bool = False) -> Tensor:
    """Where a voxel carries a label: bool, `(B, 1, *spatial)`.

    target: a label map `(B, 1, *spatial)`; for regions nnU-Net's one-hot `(B, R + 1, *spatial)`, whose last channel
    is the ignore mask. `ignore_label=None`: everything is annotated.
    """
    if ignore_label is None:
        return torch.ones_like(target[:, :1], dtype=torch.bool)
    return ~target[:, -1:].bool() if regions else target != ignore_label


@torch.no_grad()
def confidence(logits: Tensor, regions: bool = False) -> Tensor:
    """Mean over voxels of the winning probability: 1/C (regions: 1/2) where unsure, 1 where certain. A scalar."""
    if regions:
        return torch.sigmoid(logits.float().abs()).mean()
    return logits.float().softmax(1).amax(1).mean()


def rank_factors(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For this rank's counts n_r: `W n_r / sum_r n_r`, and the sums. DDP averages the gradients of its W ranks; with this factor
    on a rank's mean over its n_r values, the average is the mean over all of them. Every rank must call it at once."""
    totals = counts.clone()
    dist.all_reduce(totals)
    return dist.get_world_size() * counts / totals.clamp_min(1), totals


class PartialSupervision(nn.Module):
    """nnU-Net's supervised loss over the annotated voxels of some images of a batch.

    Images without any annotated voxel do not enter it.

    Args:
        loss: nnU-Net's compound loss of Dice and (binary) cross-entropy, which masks the ignore label itself. Its value is returned to
            the bit wherever every image has annotated voxels.
        ignore_label: the data set's ignore label; None where it has none.
        regions: sigmoid heads instead of softmax labels.
        ddp: the images are those of one rank of several. The average over the ranks is the loss of all ranks' images together. Every
            rank must call it. Ranks may hold different numbers of images and of annotated voxels, none included. (nnU-Net's own
            cross-entropy is each rank's mean, whose voxels weigh more where few are annotated.)

    Returns:
        A scalar; zero, with a graph, where no voxel is annotated.

    Raises:
        ValueError: logits and target differ in the number of images or in their spatial shape.
    """

    def __init__(self, loss: Any, ignore_label: int | None, regions: bool = False, ddp: bool = False):
        super().__init__()
        self.loss, self.ignore_label, self.regions, self.ddp = loss, ignore_label, regions, ddp

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[0] != target.shape[0] or logits.shape[2:] != target.shape[2:]:
            raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} do not match")
        annotated = annotated_voxels(target, self.ignore_label, self.regions)
        if not getattr(getattr(self.loss, "dc", None), "batch_dice", True):
            # In a Dice of each image, one without any annotated voxel would count as perfect and weaken the gradient of the others.
            images = annotated.flatten(1).any(1)
            if not images.all():
                logits, target, annotated = logits[images], target[images], annotated[images]
        if self.ddp:
            value = self._over_ranks(logits, target, annotated.sum())
        else:
            value = self.loss(logits, target) if annotated.any() else 0
        # nnU-Net's losses, too, return a plain 0 where they find nothing to learn from
        return value if torch.is_tensor(value) else _zero_with_graph(logits)

    def _over_ranks(self, logits: Tensor, target: Tensor, annotated: Tensor) -> Tensor | int:
        factors, (total, _) = rank_factors(torch.stack((annotated, annotated.new_tensor(logits.shape[0]))))
        if total == 0:
            return 0
        of_voxels, of_images = factors.tolist()
        loss = self.loss
        weights = loss.weight_ce, loss.weight_dice
        loss.weight_ce = weights[0] * of_voxels
        try:
            if loss.dc.batch_dice:
                # Its sums are gathered over the ranks, which wants equal shapes: the batch axis is folded into space,
                # (1, C, B, *spatial), and the sums are the same. The Dice is then that of all ranks already.
                return loss(logits.transpose(0, 1)[None], target.transpose(0, 1)[None])
            loss.weight_dice = weights[1] * of_images
            return loss(logits, target) if logits.shape[0] else 0
        finally:
            loss.weight_ce, loss.weight_dice = weights


class _Kinds(NamedTuple):
    """What is full and what is not in a batch; over all ranks, where there are several."""

    num_full: int  # of this rank; they come first
    factors: dict[str, float | Tensor]  # of means over the images "full", "partial", "all"
    present: int  # of the two kinds of images

    def images(self, name: str) -> slice:
        return {"full": slice(self.num_full), "partial": slice(self.num_full, None), "all": slice(None)}[name]


class ConfKDLoss(nn.Module):
    """The joint objective over a batch whose first `num_full` images are fully labelled.

    supervised: the loss of L_s and L_w, e.g. :class:`PartialSupervision`; called with the logits and the target of the
        images concerned.
    weights: of the terms, keys as in `TERMS`. A term of weight 0 is not computed, and neither is one whose ramp is 0.
    resolution_weights: of the deep supervision outputs, highest resolution first (nnU-Net's); resolutions of weight 0
        are not computed. One entry where there is no deep supervision.
    regions: sigmoid heads instead of softmax labels.
    student_images: "all", or "partial": the fully labelled images enter L_w only through the KL.
    student_average: "joint": L_w is one loss over the annotated voxels of the whole batch, as nnU-Net's; "separate": the mean
        of the losses of the two kinds of images, in which a handful of points weighs as much as whole masks.
    kl_images: "full", "partial" (all others) or "all". But for "full", the teacher must be given for the whole batch.
    entropy_images: "partial" (all but the fully labelled ones), "full" or "all".
    kl_options: keyword arguments of :func:`distillation`.
    extra_resolutions: "all" supervised resolutions for KL and entropy, or only the "highest".

    Call with the student's logits, the teacher's (both a tensor, or a list over resolutions), the target (likewise),
    `num_full`, and the ramps: factors of the KL's and the entropy's weight at this point of the training.
    Returns the scalar to minimise and the unweighted terms, detached scalars by name.

    Every mean is over the voxels of all images concerned, together; with DDP (`supervised.ddp`) those of all ranks: a rank's
    terms are scaled such that their average over the ranks is the mean over all images.
    """

    def __init__(self, supervised: nn.Module, weights: dict[str, float], *, resolution_weights: Sequence[float] = (1.0,),
                 regions: bool = False, student_images: str = "all", student_average: str = "joint",
                 kl_images: str = "full", entropy_images: str = "partial", kl_options: dict | None = None,
                 extra_resolutions: str = "all"):
        super().__init__()
        if set(weights) != set(TERMS):
            raise ValueError(f"weights must name the terms {TERMS}, got {sorted(weights)}")
        self.supervised = supervised
        self.weights = dict(weights)
        self.resolution_weights = tuple(float(w) for w in resolution_weights)
        self.regions = regions
        self.student_images, self.student_average = student_images, student_average
        self.kl_images, self.entropy_images = kl_images, entropy_images
        self.kl_options = dict(kl_options or {})
        self.extra_resolutions = extra_resolutions

    def _kinds(self, num_images: int, num_full: int, device: torch.device) -> _Kinds:
        counts = {"full": num_full, "partial": num_images - num_full, "all": num_images}
        if not getattr(self.supervised, "ddp", False):
            return _Kinds(num_full, dict.fromkeys(counts, 1.0), (num_full > 0) + (num_full < num_images))
        factors, totals = rank_factors(torch.tensor(list(counts.values()), device=device))
        return _Kinds(num_full, dict(zip(counts, factors)), int((totals[:2] > 0).sum()))

    def _student_term(self, student: Tensor, target: Tensor, kinds: _Kinds) -> Tensor:
        """L_w at one resolution."""
        full, partial = kinds.images("full"), kinds.images("partial")
        if self.student_images == "partial":
            return self.supervised(student[partial], target[partial])
        if self.student_average == "joint":
            return self.supervised(student, target)
        return (self.supervised(student[full], target[full]) + self.supervised(student[partial], target[partial])) / kinds.present

    def _terms(self, student: Tensor, teacher: Tensor | None, target: Tensor, kinds: _Kinds, weights: dict[str, float],
               extra: bool) -> dict[str, Tensor]:
        """The unweighted terms of a weight above 0 at one resolution; the extra ones (KL, entropy) only on request."""
        terms = {}
        if weights["teacher"]:
            full = kinds.images("full")
            terms["teacher"] = self.supervised(teacher[full], target[full])
        if weights["student"]:
            terms["student"] = self._student_term(student, target, kinds)
        if weights["kl"] and extra:
            images = kinds.images(self.kl_images)
            terms["kl"] = kinds.factors[self.kl_images] * _mean(distillation(
                teacher[images], student[images], regions=self.regions, **self.kl_options))
        if weights["entropy"] and extra:
            images = kinds.images(self.entropy_images)
            terms["entropy"] = kinds.factors[self.entropy_images] * _mean(entropy(student[images], self.regions))
        return terms

    def forward(self, student, teacher, target, num_full: int, *, kl_ramp: float = 1.0,
                entropy_ramp: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        student, teacher, target = ([x] if torch.is_tensor(x) else x for x in (student, teacher, target))
        if teacher is None:
            if self.weights["teacher"] or self.weights["kl"]:
                raise ValueError("the weights of 'teacher' and 'kl' are above 0, but no teacher's logits were given")
            teacher = [None] * len(student)
        if not len(student) == len(teacher) == len(target) == len(self.resolution_weights):
            raise ValueError(f"{len(student)} student outputs, {len(teacher)} teacher outputs and {len(target)} targets "
                             f"for {len(self.resolution_weights)} resolution weights")
        weights = self.weights | {"kl": self.weights["kl"] * kl_ramp, "entropy": self.weights["entropy"] * entropy_ramp}
        kinds = self._kinds(student[0].shape[0], num_full, student[0].device)
        total: Any = 0.0
        sums = {term: _zero_with_graph(student[0]) for term in TERMS}
        for i, resolution_weight in enumerate(self.resolution_weights):
            if resolution_weight == 0:
                continue
            at_all = self.extra_resolutions == "all"
            terms = self._terms(student[i], teacher[i], target[i], kinds, weights, at_all or i == 0)
            for term, value in terms.items():
                share = resolution_weight if at_all or term in ("teacher", "student") else 1.0
                total = total + share * weights[term] * value
                sums[term] = sums[term] + share * value.detach()
        if getattr(self.supervised, "ddp", False) and not (weights["student"] and weights["teacher"]):
            # DDP fails on parameters without gradient, e.g. of a decoder that no term of a weight above 0 uses
            total = total + sum(_zero_with_graph(output) for output in (*student, *teacher) if output is not None)
        return total, {term: value.detach() for term, value in sums.items()}
