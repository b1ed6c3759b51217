"""The measures of a segmentation, and what many cases say together.

Distances are in mm, between the surfaces of the two masks: a mask's voxels that erosion by the face neighbours takes away
(MONAI's `get_mask_edges`), as points at the voxels' centres, with the true spacing of every axis (`get_surface_distance`).
Sources: L. Maier-Hein et al., "Metrics reloaded", Nature Methods 2024; S. Nikolov et al. 2018, arXiv 1809.04430 (NSD).
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

MEASURES = {"Dice": 3, "IoU": 3, "HD95_mm": 2, "ASSD_mm": 2, "NSD": 3, "volume_difference_ml": 3}  # digits in a table
HIGHER_IS_BETTER = {"Dice": True, "IoU": True, "HD95_mm": False, "ASSD_mm": False, "NSD": True}
TOLERANCE_MM = 1.0  # of the NSD, where none is given
DRAWS = 10000  # of a bootstrap


def measure_masks(truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float],
                  tolerance_mm: float = TOLERANCE_MM) -> dict[str, float]:
    """The `MEASURES` of two masks, bool, (Z, Y, X) or (Y, X); spacing: mm, in the order of the axes.

    - HD95_mm: the larger of the two directions' 95th percentiles of surface distances. ASSD_mm: mean of both directions'
      distances together. NSD: share of both surfaces that is within `tolerance_mm` of the other.
    - volume_difference_ml: prediction minus truth.
    - Both empty: all NaN. One empty: Dice, IoU and NSD 0, distances NaN.

    An image of one slice has no third axis: its surface is the outline.
    """
    if not (truth.any() or prediction.any()):
        return dict.fromkeys(MEASURES, math.nan)
    both, total = int((truth & prediction).sum()), int(truth.sum()) + int(prediction.sum())
    found = {"Dice": 2 * both / total, "IoU": both / (total - both), "HD95_mm": math.nan, "ASSD_mm": math.nan, "NSD": 0.0,
             "volume_difference_ml": float(int(prediction.sum()) - int(truth.sum())) * math.prod(spacing) / 1000}
    if truth.any() and prediction.any():
        there, back = surface_distances(truth, prediction, spacing)
        found["HD95_mm"] = float(max(np.percentile(there, 95), np.percentile(back, 95)))
        together = np.concatenate((there, back))
        found["ASSD_mm"] = float(together.mean())
        found["NSD"] = float((together <= tolerance_mm + 1e-6).mean())  # single precision of the distances
    return found


def surface_distances(truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """mm, from each voxel of the prediction's surface to the truth's, and the other way round; neither mask is empty."""
    from monai.metrics import get_mask_edges, get_surface_distance  # seconds, for PyTorch comes with it
    thick = [axis for axis, size in enumerate(truth.shape) if size > 1] or [0]
    thin = tuple(axis for axis in range(truth.ndim) if axis not in thick)
    truth, prediction = truth.squeeze(thin), prediction.squeeze(thin)
    spacing = [float(spacing[axis]) for axis in thick]
    box = tuple(slice(min(where), max(where) + 1) for where in np.nonzero(truth | prediction))
    # a rim of background: what touches the image's border has its surface there
    edges = get_mask_edges(*(np.pad(mask[box], 1) for mask in (prediction, truth)), crop=False)
    there, back = (np.asarray(get_surface_distance(a, b, spacing=spacing), np.float64) for a, b in (edges, edges[::-1]))
    return there, back


def measure_case(truth: np.ndarray, prediction: np.ndarray, classes: Mapping[str, Sequence[int]], spacing: Sequence[float],
                 ignore_label: int | None = None, tolerance_mm: float = TOLERANCE_MM) -> dict[str, dict[str, float]]:
    """{class: measures} of two label maps, (Z, Y, X) or (Y, X).

    classes: {name: labels}; of several labels (a region), their union. spacing: mm, in the order of the axes.
    Voxels that the truth ignores belong to neither mask; where an object reaches into them, both have a surface there.
    """
    known = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    return {name: measure_masks(np.isin(truth, labels) & known, np.isin(prediction, labels) & known, spacing, tolerance_mm)
            for name, labels in classes.items()}


def statistics(values: Iterable[float], patients: Sequence[str] | None = None) -> dict[str, float | int]:
    """Describe the values of many cases.

    Args:
        values: One for each case. NaN is left out.
        patients: The patient of each case. None: every case is a patient.

    Returns:
        mean and sd (of a sample) over the cases; n, the number of cases, and patients, that of their patients; ci_low and ci_high,
        the 95 % interval of the mean, which is NaN for fewer than two patients (see `bootstrap_interval`).
    """
    values = np.fromiter(values, float)
    keep = ~np.isnan(values)
    patients = None if patients is None else [patient for patient, kept in zip(patients, keep) if kept]
    values = values[keep]
    n, groups = len(values), len(values) if patients is None else len(set(patients))
    low, high = bootstrap_interval(values, patients) if groups > 1 else (math.nan, math.nan)
    return {"mean": float(values.mean()) if n else math.nan, "sd": float(values.std(ddof=1)) if n > 1 else math.nan, "n": n,
            "patients": groups, "ci_low": low, "ci_high": high}


def sums_by_patient(values: np.ndarray, patients: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each patient's values that are not NaN, each `(rows, patients)`; values: `(rows, cases)`."""
    defined = ~np.isnan(values)
    if patients is None:
        return np.where(defined, values, 0), defined.astype(float)
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    of_case = np.array([number[patient] for patient in patients], int)
    sums, counts = (np.stack([np.bincount(of_case, row, len(number)) for row in table]) for table in (np.where(defined, values, 0), defined))
    return sums, counts


def bootstrap_interval(values: np.ndarray, patients: Sequence[str] | None = None, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean over cases: a percentile bootstrap that draws patients, each with all of its cases.

    The cases of one patient are alike, so they must not count as independent. The mean itself stays that over the cases.

    Args:
        values: `(cases,)`, or `(seeds, cases)`, of which seeds are drawn as well. NaN is left out.
        patients: The patient of each case. None: every case is a patient.
    """
    sums, counts = sums_by_patient(np.atleast_2d(values), patients)
    number = sums.shape[1]
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, draws, 1000):  # all at once would be large for many cases
        columns = rng.integers(number, size=(1000, 1, number))
        rows = rng.integers(len(values), size=(1000, len(values), 1)) if np.ndim(values) > 1 else 0
        with np.errstate(invalid="ignore"):  # a draw without any value
            means.append(sums[rows, columns].sum((1, 2)) / counts[rows, columns].sum((1, 2)))
    low, high = np.nanpercentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def paired_statistics(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray,
                      patients: Sequence[str] | None = None) -> dict[str, float | int]:
    """Describe the differences ours - theirs of the same cases.

    Args:
        ours: One value for each case.
        theirs: The same. A case in which either is NaN is left out.
        patients: The patient of each case. None: every case is a patient.

    Returns:
        What `statistics` returns, and p: Wilcoxon's two-sided p of the signed ranks of the patients' mean differences. It is 1 where
        all of them are zero, and NaN without a case.
    """
    from scipy.stats import wilcoxon
    differences = np.subtract(ours, theirs)
    found = statistics(differences, patients)
    sums, counts = sums_by_patient(differences[None], patients)
    means = sums[counts > 0] / counts[counts > 0]
    found["p"] = math.nan if not len(means) else 1.0 if not means.any() else float(wilcoxon(means).pvalue)
    return found


def count_of(cases: int, patients: int) -> str:
    """In words: "4 cases of 2 patients"."""
    if cases == patients:
        return f"{cases} cases, each taken as one patient" if cases != 1 else "1 case"
    return f"{cases} cases of {patients} patient{'s' if patients != 1 else ''}"


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979); NaN stays and does not count."""
    order = [i for i in np.argsort(p_values) if not math.isnan(p_values[i])]  # NaN sorts last
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
