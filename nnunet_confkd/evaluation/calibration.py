"""Is the confidence of a prediction worth anything? Reliability, ECE and risk-coverage, voxel by voxel, case after case.

Each case becomes :class:`Counts`, a few histograms of a fixed size; counts add up, and all figures are computed from their
sum, so that memory does not grow with the cases. A prediction has in each voxel a *confidence* (the winning probability) and
is *correct* or not. With regions every head is a prediction of its own, of confidence `max(p, 1 - p)`.

Sources: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599 (reliability
diagram, ECE); Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv 1705.08500 (risk and
coverage); Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019,
arXiv 1805.08206 (the area, and its smallest value).

Mind what is counted: most voxels of a medical image are background that nobody would get wrong, and make any network look
calibrated. `where` restricts the voxels, e.g. to the predicted foreground and a margin around it. It must not be chosen by the
truth: among voxels picked for what they are, a calibrated network looks overconfident, too.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma

BINS = 15  # Guo et al.'s
# Of the risk-coverage curve: of equal width in log(c / (1 - c)), because most voxels lie close to 1. Float32's last step
# before 1 is at 16.6; with 1000 classes the least confident voxel is at -6.9.
FINE_BINS, LOWEST, HIGHEST = 4096, -8.0, 17.0
CHUNK = 2 ** 22  # voxels that are counted at once: of a large volume, all would take many times its memory


@dataclass(frozen=True)
class Counts:
    """Histograms of confidence; they add up: `sum(counts_of_cases, Counts.none())`.

    count, correct, confidence: (BINS,), predictions, correct ones, and the sum of their confidence, in equal bins from 0
    to 1, each without its lower end (Guo et al.); fine_count, fine_correct: (FINE_BINS,), the same in finer bins.
    """
    count: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray
    fine_count: np.ndarray
    fine_correct: np.ndarray

    @classmethod
    def none(cls) -> Counts:
        return cls(*(np.zeros(BINS, kind) for kind in (np.int64, np.int64, np.float64)),
                   *(np.zeros(FINE_BINS, np.int64) for _ in range(2)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


# ---- counting -------------------------------------------------------------------------------------------------------

def count_case(probabilities: np.ndarray, truth: np.ndarray, *, ignore_label: int | None = None,
               regions: Sequence[int | Sequence[int]] | None = None, where: np.ndarray | None = None) -> Counts:
    """Counts of one case.

    probabilities: `(C, *spatial)`, as nnU-Net saves them. truth: `(*spatial)`, integers. ignore_label: voxels of the truth
    that do not count. regions: the labels of each head, in the heads' order (`LabelManager.foreground_regions`); None:
    softmax of the labels 0 to C - 1. where: boolean `(*spatial)`, the voxels that count besides; None: all.
    Raises ValueError where shapes do not fit, or the truth holds another value.
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
                raise ValueError(f"the truth holds values from {true.min()} to {true.max()}, but there are {heads} classes")
            counts += count(p.max(0), p.argmax(0) == true)
    return counts


def count(confidence: np.ndarray, correct: np.ndarray) -> Counts:
    """Counts of predictions of any shape. confidence: 0 to 1, of the class that was chosen; correct: boolean.

    Raises ValueError for a confidence that is not from 0 to 1 (NaN included).
    """
    confidence, correct = np.asarray(confidence, np.float64).ravel(), np.asarray(correct, bool).ravel()
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence is not from 0 to 1")
    coarse = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    with np.errstate(divide="ignore"):
        log_odds = np.log(confidence) - np.log1p(-confidence)
    fine = np.clip((log_odds - LOWEST) / (HIGHEST - LOWEST) * FINE_BINS, 0, FINE_BINS - 1).astype(int)

    def per_bin(bins: np.ndarray, size: int, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(bins, weights, size)
    return Counts(per_bin(coarse, BINS), per_bin(coarse[correct], BINS), per_bin(coarse, BINS, confidence),
                  per_bin(fine, FINE_BINS), per_bin(fine[correct], FINE_BINS))


# ---- calibration ----------------------------------------------------------------------------------------------------

def reliability_curve(counts: Counts) -> dict[str, np.ndarray]:
    """"confidence" (mean), "accuracy" (both NaN where a bin is empty) and "count" of each bin, and its "edges", (BINS + 1,).

    Calibrated: confidence equals accuracy. Confidence above accuracy: overconfident.
    """
    with np.errstate(invalid="ignore"):
        return {"edges": np.linspace(0, 1, BINS + 1), "count": counts.count,
                "confidence": counts.confidence / counts.count, "accuracy": counts.correct / counts.count}


def ece(counts: Counts) -> float:
    """Expected calibration error: the mean over predictions of |accuracy - confidence| of their bin; NaN without any."""
    total = counts.count.sum()
    return float(np.abs(counts.correct - counts.confidence).sum() / total) if total else float("nan")


def overconfidence(counts: Counts) -> float:
    """Mean confidence less accuracy: what of the ECE has a direction; above 0: overconfident. NaN without any."""
    total = counts.count.sum()
    return float((counts.confidence.sum() - counts.correct.sum()) / total) if total else float("nan")


# ---- risk and coverage ----------------------------------------------------------------------------------------------

def risk_coverage_curve(counts: Counts) -> dict[str, np.ndarray]:
    """"coverage" (share of the predictions that is kept, the most confident first) and "risk" (share of errors among
    them), at each confidence that occurs; the last coverage is 1, its risk the error rate."""
    count, errors = _from_the_most_confident(counts)
    kept = count.cumsum()
    return {"coverage": kept / counts.fine_count.sum(), "risk": errors.cumsum() / kept}


def aurc(counts: Counts) -> float:
    """Area under the risk-coverage curve: the mean over k = 1..n of the risk of the k most confident predictions.

    Predictions of one fine bin tie; the mean over all their orders is returned, in closed form: with N predictions and E
    errors before the bin, and e errors among its m, the k-th has the expected risk (E + k e / m) / (N + k).
    NaN without any.
    """
    count, errors = _from_the_most_confident(counts)
    if not len(count):
        return float("nan")
    before, wrong = count.cumsum() - count, errors.cumsum() - errors
    rate = errors / count
    harmonic = digamma(before + count + 1.0) - digamma(before + 1.0)  # sum of 1 / (N + k)
    return float((errors + (wrong - rate * before) * harmonic).sum() / count.sum())


def smallest_aurc(counts: Counts) -> float:
    """The AURC of the same errors, all of them less confident than every correct prediction. The AURC less this one
    (E-AURC) compares networks of different error rates. NaN without any."""
    total, errors = int(counts.fine_count.sum()), int((counts.fine_count - counts.fine_correct).sum())
    right = total - errors
    if not total:
        return float("nan")
    return float((errors - right * (digamma(total + 1.0) - digamma(right + 1.0))) / total)


def _from_the_most_confident(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and errors of the fine bins that hold any."""
    filled = counts.fine_count > 0
    count = counts.fine_count[filled][::-1]
    return count, count - counts.fine_correct[filled][::-1]
