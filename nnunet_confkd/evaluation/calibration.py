"""Calibration of probabilities: reliability, ECE and risk-coverage over the voxels of many cases.

Each case becomes :class:`Counts`, a few histograms of a fixed size. Counts add up, and all figures are computed from
their sum, so the memory does not grow with the cases. In each voxel a prediction has a *confidence* (the winning
probability) and is *correct* or not. With regions, every head is a prediction of its own, with confidence
`max(p, 1 - p)`.

Sources: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599
(reliability diagram, ECE); Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv
1705.08500 (risk and coverage); Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural
Classifiers", ICLR 2019, arXiv 1805.08206 (the area, and its smallest value).

Most voxels of a medical image are background that any network gets right, so over all voxels any network looks
calibrated. `where` restricts the voxels, for example to the predicted foreground and a margin around it. It must not
depend on the ground truth: among voxels that are chosen by the ground truth, a calibrated network looks overconfident.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

from nnunet_confkd.evaluation.metrics import membership, percentile_bootstrap

BINS = 15  # as Guo et al.
# The bins of the risk-coverage curve have equal width in log(c / (1 - c)), because most voxels lie close to 1. The last
# float32 before 1 is at 16.6; with 1000 classes, the least confident voxel is at -6.9.
FINE_BINS, LOWEST, HIGHEST = 4096, -8.0, 17.0
CHUNK = 2 ** 22  # how many voxels are counted at once; a large volume as a whole would take many times its memory


@dataclass(frozen=True)
class Counts:
    """Histograms of confidence. They add up: `sum(counts_of_cases, Counts.none())`.

    Attributes:
        count: Number of predictions, `(BINS,)`. The bins divide [0, 1] equally, and each excludes its lower end, as in
            Guo et al.
        correct: Number of correct predictions, `(BINS,)`.
        confidence: Sum of the confidences, `(BINS,)`.
        fine_count: As `count`, in finer bins, `(FINE_BINS,)`.
        fine_correct: As `correct`, in finer bins, `(FINE_BINS,)`.

    Examples:
        >>> one = count(np.array([0.9, 0.6]), np.array([True, False]))
        >>> int((one + one + Counts.none()).count.sum())
        4
    """
    count: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray
    fine_count: np.ndarray
    fine_correct: np.ndarray

    @property
    def coarse(self) -> np.ndarray:
        """The count, the number of correct predictions and the sum of the confidences, `(3, BINS)`."""
        return np.stack((self.count, self.correct, self.confidence))

    @classmethod
    def none(cls) -> Counts:
        """Return the counts of no voxel."""
        return cls(*(np.zeros(BINS, kind) for kind in (np.int64, np.int64, np.float64)),
                   *(np.zeros(FINE_BINS, np.int64) for _ in range(2)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


# ---- counting -------------------------------------------------------------------------------------------------------

def count_case(probabilities: np.ndarray, truth: np.ndarray, *, ignore_label: int | None = None,
               regions: Sequence[int | Sequence[int]] | None = None, where: np.ndarray | None = None) -> Counts:
    """Count the predictions of one case.

    Args:
        probabilities: `(C, *spatial)`, as nnU-Net saves them.
        truth: Integer labels, `(*spatial)`.
        ignore_label: Label of the voxels that do not count.
        regions: The labels of each head, in the order of the heads (`LabelManager.foreground_regions`). None: the heads
            are the softmax of the labels 0 to C - 1.
        where: Boolean mask of the voxels that count, `(*spatial)`. None: all of them.

    Returns:
        The counts.

    Raises:
        ValueError: The shapes do not match, or the ground truth holds other values.

    Examples:
        >>> probabilities = np.array([[0.9, 0.4], [0.1, 0.6]])  # two classes, two voxels
        >>> counts = count_case(probabilities, np.array([0, 0]))
        >>> int(counts.count.sum()), int(counts.correct.sum())
        (2, 1)
    """
    probabilities, truth = np.asarray(probabilities), np.asarray(truth)
    heads = len(probabilities)
    if probabilities.shape[1:] != truth.shape or where is not None and where.shape != truth.shape:
        raise ValueError(f"probabilities {probabilities.shape} do not fit the truth {truth.shape}, or `where` does not")
    if regions is not None and len(regions) != heads:
        raise ValueError(f"{len(regions)} regions, but probabilities of {heads} heads")
    probabilities, truth = probabilities.reshape(heads, -1), truth.ravel()
    where = np.ones(truth.shape, bool) if where is None else where.ravel()
    counts = Counts.none()
    for start in range(0, truth.size, CHUNK):
        part = slice(start, start + CHUNK)
        valid = where[part] & (truth[part] != ignore_label) if ignore_label is not None else where[part]
        true, p = truth[part][valid], probabilities[:, part][:, valid]
        if regions is not None:
            counts = sum((count(np.maximum(head, 1 - head), (head > 0.5) == np.isin(true, region))
                          for head, region in zip(p, regions)), counts)
        elif true.size:
            if not 0 <= true.min() <= true.max() < heads:
                raise ValueError(f"the truth holds values from {true.min()} to {true.max()}, but there are {heads} "
                                 "classes")
            counts += count(p.max(0), p.argmax(0) == true)
    return counts


def count(confidence: np.ndarray, correct: np.ndarray) -> Counts:
    """Count predictions.

    Args:
        confidence: The probability of the chosen class, from 0 to 1, of any shape.
        correct: Whether the chosen class is right, boolean, of the same shape.

    Returns:
        The counts.

    Raises:
        ValueError: A confidence is NaN or not from 0 to 1.

    Examples:
        >>> int(count(np.array([0.9, 0.6]), np.array([True, False])).correct.sum())
        1
    """
    confidence, correct = np.asarray(confidence, np.float64).ravel(), np.asarray(correct, bool).ravel()
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence is not from 0 to 1")
    coarse = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    with np.errstate(divide="ignore"):
        log_odds = np.log(confidence) - np.log1p(-confidence)
    fine = np.clip((log_odds - LOWEST) / (HIGHEST - LOWEST) * FINE_BINS, 0, FINE_BINS - 1).astype(int)
    return Counts(np.bincount(coarse, minlength=BINS), np.bincount(coarse[correct], minlength=BINS),
                  np.bincount(coarse, confidence, BINS), np.bincount(fine, minlength=FINE_BINS),
                  np.bincount(fine[correct], minlength=FINE_BINS))


# ---- calibration ----------------------------------------------------------------------------------------------------

def reliability_curve(counts: Counts) -> dict[str, np.ndarray]:
    """Compute the points of a reliability diagram.

    A network is calibrated if the confidence equals the accuracy, and overconfident if it is higher.

    Returns:
        `confidence` (mean) and `accuracy` of each bin, `(BINS,)`, NaN if the bin is empty; its `count`, and the `edges`
        of the bins, `(BINS + 1,)`.

    Examples:
        >>> curve = reliability_curve(count(np.full(10, 0.9), np.arange(10) < 8))  # 80 % right, 90 % sure
        >>> round(float(np.nanmean(curve["accuracy"])), 3), round(float(np.nanmean(curve["confidence"])), 3)
        (0.8, 0.9)
    """
    with np.errstate(invalid="ignore"):
        return {"edges": np.linspace(0, 1, BINS + 1), "count": counts.count,
                "confidence": counts.confidence / counts.count, "accuracy": counts.correct / counts.count}


def ece(counts: Counts) -> float:
    """Compute the expected calibration error: the mean over all predictions of |accuracy - confidence| of their bin.

    It is NaN if there is no prediction.

    Examples:
        >>> round(float(ece(count(np.full(10, 0.9), np.arange(10) < 8))), 3)  # 80 % right, 90 % sure
        0.1
    """
    return float(_ece(counts.coarse)) if counts.count.any() else math.nan


def _ece(coarse: np.ndarray) -> np.ndarray:
    """Compute the ECE of (count, correct, confidence), `(..., 3, BINS)` -> `(...)`."""
    count, correct, confidence = np.moveaxis(coarse, -2, 0)
    return np.abs(correct - confidence).sum(-1) / np.maximum(count.sum(-1), 1)


def ece_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], patients: Sequence[str] | None = None,
                   draws: int = 2000) -> tuple[float, float]:
    """Compute the 95 % interval of the difference of two ECEs, by a bootstrap that draws patients with all of their
    cases.

    Args:
        ours: `Counts.coarse` of each case, `(cases, 3, BINS)`.
        theirs: `Counts.coarse` of the other network's predictions of the same cases.
        patients: The patient of each case. None: every case is a patient.
        draws: The number of draws.

    Returns:
        The lower and the upper bound; NaN for fewer than two patients.

    Examples:
        >>> ours, theirs = (count(np.full(10, sure), np.arange(10) < 8).coarse for sure in (0.8, 0.9))
        >>> low, high = ece_difference([ours] * 3, [theirs] * 3)
        >>> round(low, 3), round(high, 3)
        (-0.1, -0.1)
    """
    members = membership(range(len(ours)) if patients is None else patients)
    number = members.shape[1]
    if number < 2:
        return math.nan, math.nan
    sums = [np.einsum("cp,ckb->pkb", members, np.stack(cases)) for cases in (ours, theirs)]  # (patients, 3, BINS)

    def difference(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        return _ece(sums[0][drawn].sum(-3)) - _ece(sums[1][drawn].sum(-3))

    return percentile_bootstrap(difference, (number,), draws)


def overconfidence(counts: Counts) -> float:
    """Compute the mean confidence minus the accuracy, which is positive for an overconfident network.

    It is NaN if there is no prediction.

    Examples:
        >>> round(float(overconfidence(count(np.full(10, 0.9), np.arange(10) < 8))), 3)
        0.1
    """
    total = counts.count.sum()
    return float((counts.confidence.sum() - counts.correct.sum()) / total) if total else math.nan


# ---- risk and coverage ----------------------------------------------------------------------------------------------

def risk_coverage_curve(counts: Counts) -> dict[str, np.ndarray]:
    """Compute the risk-coverage curve, at each confidence that occurs.

    Returns:
        `coverage`, the share of the predictions that are kept, the most confident ones first, and `risk`, the share of
        errors among them. The last coverage is 1, and its risk is the error rate.

    Examples:
        >>> curve = risk_coverage_curve(count(np.array([0.9, 0.6]), np.array([True, False])))
        >>> curve["coverage"].tolist(), curve["risk"].tolist()
        ([0.5, 1.0], [0.0, 0.5])
    """
    count, errors = _from_the_most_confident(counts)
    kept = count.cumsum()
    return {"coverage": kept / counts.fine_count.sum(), "risk": errors.cumsum() / kept}


def aurc(counts: Counts) -> float:
    """Compute the area under the risk-coverage curve: the mean over k = 1..n of the risk of the k most confident ones.

    Predictions in the same fine bin tie. Their contribution is the mean over all their orders, in closed form: with N
    predictions and E errors before the bin, and e errors among its m predictions, the k-th of them has the expected
    risk (E + k e / m) / (N + k). The area is NaN if there is no prediction.

    Examples:
        >>> float(aurc(count(np.array([0.9, 0.6]), np.array([True, False]))))  # the mean of the risks 0 and 1/2
        0.25
    """
    count, errors = _from_the_most_confident(counts)
    if not len(count):
        return math.nan
    before, wrong = count.cumsum() - count, errors.cumsum() - errors
    rate = errors / count
    harmonic = digamma(before + count + 1.0) - digamma(before + 1.0)  # sum of 1 / (N + k)
    return float((errors + (wrong - rate * before) * harmonic).sum() / count.sum())


def smallest_aurc(counts: Counts) -> float:
    """Compute the smallest AURC that the same number of errors allows: every error is less confident than every
    success.

    The AURC minus this one (E-AURC) compares networks with different error rates. It is NaN if there is no prediction.

    Examples:
        >>> float(smallest_aurc(count(np.array([0.6, 0.9]), np.array([True, False]))))  # as if the error were less sure
        0.25
    """
    total, errors = int(counts.fine_count.sum()), int((counts.fine_count - counts.fine_correct).sum())
    right = total - errors
    if not total:
        return math.nan
    return float((errors - right * (digamma(total + 1.0) - digamma(right + 1.0))) / total)


def _from_the_most_confident(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of predictions and of errors in the fine bins that hold any."""
    filled = counts.fine_count > 0
    count = counts.fine_count[filled][::-1]
    return count, count - counts.fine_correct[filled][::-1]
