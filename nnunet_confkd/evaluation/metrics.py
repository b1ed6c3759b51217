"""The measures of a segmentation, and statistics over many cases.

Sources: L. Maier-Hein et al., "Metrics reloaded", Nature Methods 2024; S. Nikolov et al., arXiv 1809.04430 (NSD).
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunet_confkd.evaluation.label_pair import LabelPair

# the measures, and how many digits tables show
MEASURES = {"Dice": 3, "IoU": 3, "HD95_mm": 2, "ASSD_mm": 2, "NSD": 3, "volume_difference_ml": 3}
HIGHER_IS_BETTER = {"Dice": True, "IoU": True, "HD95_mm": False, "ASSD_mm": False, "NSD": True}
PHYSICAL = ("HD95_mm", "ASSD_mm", "NSD", "volume_difference_ml")  # undefined for an image without a voxel spacing
TOLERANCE_MM = 1.0  # the default tolerance of the NSD
DRAWS = 10000  # the number of bootstrap draws
FOREGROUND = "foreground"  # stands for the mean of a case over its classes


# ---- one case -------------------------------------------------------------------------------------------------------

def measure_masks(truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float],
                  tolerance_mm: float = TOLERANCE_MM) -> dict[str, float]:
    """Compute all `MEASURES` of a predicted mask against the ground truth.

    - `Dice`, `IoU`: overlap of the voxels.
    - `HD95_mm`: for each direction the 95th percentile of the surface distances (with linear interpolation, as
      `numpy.percentile`), and of the two percentiles the larger one.
    - `ASSD_mm`: mean of the surface distances of both directions taken together.
    - `NSD`: share of the surface voxels of both masks that lie within `tolerance_mm` of the other surface. Surface
      voxels are counted; they are not weighted by their area.
    - `volume_difference_ml`: volume of the prediction minus volume of the ground truth.

    If both masks are empty, all measures are NaN. If one of them is empty, Dice, IoU and NSD are 0 and the distances
    are NaN.

    Args:
        truth: Boolean mask, `(Z, Y, X)` or `(Y, X)`.
        prediction: Boolean mask of the same shape.
        spacing: Size of a voxel in mm, in the order of the axes.
        tolerance_mm: Tolerance of the NSD in mm.

    Returns:
        {measure: value}.

    Examples:
        >>> truth, prediction = np.zeros((2, 10, 10), dtype=bool)
        >>> truth[2:8, 2:8] = True
        >>> prediction[2:8, 3:9] = True  # the same square, moved by one pixel
        >>> measured = measure_masks(truth, prediction, spacing=(1.5, 2.0))
        >>> round(measured["Dice"], 3), float(measured["HD95_mm"])  # 2 * 30 / (36 + 36); a pixel is 2 mm wide
        (0.833, 2.0)
    """
    return measure_case(truth, prediction, {"": (1,)}, spacing, tolerance_mm=tolerance_mm)[""]


def surface_distances(truth: np.ndarray, prediction: np.ndarray,
                      spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Measure the distances between the surfaces of two masks, as :meth:`LabelPair.surface_distances`.

    Args:
        truth: Boolean mask, `(Z, Y, X)` or `(Y, X)`, not empty.
        prediction: Boolean mask of the same shape, not empty.
        spacing: Size of a voxel in mm, in the order of the axes.

    Returns:
        Distances in mm from each surface voxel of the prediction to the nearest one of the ground truth, and the other
        way round.

    Examples:
        >>> truth, prediction = np.zeros((2, 10, 10), dtype=bool)
        >>> truth[2:8, 2:8] = True
        >>> prediction[2:8, 3:9] = True  # the same square, moved by one pixel
        >>> to_truth, to_prediction = surface_distances(truth, prediction, spacing=(1.5, 2.0))
        >>> float(to_truth.max()), len(to_truth)  # the outline of 6 x 6 pixels has 20
        (2.0, 20)
    """
    return LabelPair(truth, prediction, {"": (1,)}).surface_distances("", spacing)


def measure_case(truth: np.ndarray, prediction: np.ndarray, classes: Mapping[str, Sequence[int]],
                 spacing: Sequence[float] | None, ignore_label: int | None = None,
                 tolerance_mm: float = TOLERANCE_MM) -> dict[str, dict[str, float]]:
    """Measure each class of a predicted label map against the ground truth.

    Voxels with the ignore label in the ground truth belong to neither mask. If an object reaches into them, both masks
    have a surface there.

    Args:
        truth: Label map, `(Z, Y, X)` or `(Y, X)`.
        prediction: Label map of the same shape.
        classes: {name: labels}. Several labels (a region) mean their union.
        spacing: Size of a voxel in mm, in the order of the axes. None: it is not known, and the `PHYSICAL` measures are
            NaN.
        ignore_label: Label of the voxels of the ground truth that are not annotated.
        tolerance_mm: Tolerance of the NSD in mm.

    Returns:
        {class: {measure: value}}, see :func:`measure_masks`.

    Examples:
        >>> truth, prediction = np.array([[0, 1, 1, 2]]), np.array([[0, 1, 2, 2]])
        >>> measured = measure_case(truth, prediction, {"liver": [1], "both": [1, 2]}, spacing=(1.0, 1.0))
        >>> round(measured["liver"]["Dice"], 3), measured["both"]["Dice"]
        (0.667, 1.0)
    """
    return measure_pair(LabelPair(truth, prediction, classes, ignore_label), spacing, tolerance_mm)


def measure_pair(pair: LabelPair, spacing: Sequence[float] | None,
                 tolerance_mm: float = TOLERANCE_MM) -> dict[str, dict[str, float]]:
    """Measure each class of two label maps that have been read, as :func:`measure_case`."""
    found = {name: _measure_class(pair, name, spacing, tolerance_mm) for name in pair.codes}
    if spacing is None:
        for measures in found.values():
            measures |= dict.fromkeys(PHYSICAL, math.nan)
    return found


def _measure_class(pair: LabelPair, name: str, spacing: Sequence[float] | None,
                   tolerance_mm: float) -> dict[str, float]:
    both, true_voxels, predicted_voxels = pair.counts(name)
    total = true_voxels + predicted_voxels
    if not total:
        return dict.fromkeys(MEASURES, math.nan)
    found = {"Dice": 2 * both / total, "IoU": both / (total - both), "HD95_mm": math.nan, "ASSD_mm": math.nan,
             "NSD": 0.0, "volume_difference_ml": math.nan}
    if spacing is None:
        return found
    found["volume_difference_ml"] = float(predicted_voxels - true_voxels) * math.prod(spacing) / 1000
    if true_voxels and predicted_voxels:
        directions = pair.surface_distances(name, spacing)
        found["HD95_mm"] = float(max(np.percentile(distances, 95) for distances in directions))
        together = np.concatenate(directions)
        found["ASSD_mm"] = float(together.mean())
        found["NSD"] = float((together <= tolerance_mm + 1e-6).mean())  # 3 * 0.1 is not 0.3 exactly
    return found


# ---- many cases -----------------------------------------------------------------------------------------------------

@dataclass(kw_only=True)
class CaseMeasures:
    """The measures of many cases.

    Attributes:
        classes: {name: labels} of each class or region.
        cases: {case: {class: {measure: value}}}.
        patients: {case: patient}. A case that is not in it is a patient of its own.
    """
    classes: Mapping[str, Sequence[int]]
    cases: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The classes and, if there are several and none has this name, `FOREGROUND`."""
        return [*self.classes, *([FOREGROUND] if len(self.classes) > 1 and FOREGROUND not in self.classes else [])]

    @property
    def patient_of_each(self) -> list[str]:
        """The patient of every case, in the order of the cases."""
        return [self.patients.get(case, case) for case in self.cases]

    def values(self, name: str, measure: str) -> np.ndarray:
        """Return a measure of a class, or of `FOREGROUND`, for every case, `(cases,)`; NaN where it is undefined."""
        names = [name] if name in self.classes else list(self.classes)
        return defined_mean(np.array([[case[n][measure] for n in names] for case in self.cases.values()], float))

    def describe(self, name: str, measure: str) -> dict[str, float | int]:
        """Return the :func:`statistics` of a measure of a class, or of `FOREGROUND`; the interval is by patient."""
        return statistics(self.values(name, measure), self.patient_of_each)

    def statistics(self) -> dict[str, dict[str, dict[str, float | int]]]:
        """Return {class or `FOREGROUND`: {measure: statistics}}."""
        return {name: {measure: self.describe(name, measure) for measure in MEASURES} for name in self.names}

    def one_empty(self, name: str) -> int:
        """Count the cases in which only one of the two masks of a class is empty, so that there is no distance."""
        return sum(math.isnan(case[name]["HD95_mm"]) and case[name]["NSD"] == 0 for case in self.cases.values())


def defined_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN, `(rows, columns)` -> `(rows,)`; NaN for a row of NaN."""
    defined = ~np.isnan(values)
    return np.where(defined.any(-1), np.where(defined, values, 0).sum(-1) / np.maximum(defined.sum(-1), 1), np.nan)


def statistics(values: Iterable[float], patients: Sequence[str] | None = None) -> dict[str, float | int]:
    """Describe the values of many cases.

    Args:
        values: One value for each case. NaN is left out.
        patients: The patient of each case. None: every case is a patient.

    Returns:
        `mean` and `sd` (of a sample) over the cases; `n`, the number of cases; `patients`, the number of their
        patients; `ci_low` and `ci_high`, the 95 % interval of the mean (see :func:`bootstrap_interval`).

    Examples:
        >>> described = statistics([0.7, 0.8, 0.9, float("nan")])
        >>> round(described["mean"], 3), described["n"]
        (0.8, 3)
    """
    values = np.fromiter(values, float)
    defined = ~np.isnan(values)
    patients = None if patients is None else [patient for patient, keep in zip(patients, defined) if keep]
    values = values[defined]
    n = len(values)
    low, high = bootstrap_interval(values, patients)
    return {"mean": float(values.mean()) if n else math.nan, "sd": float(values.std(ddof=1)) if n > 1 else math.nan,
            "n": n, "patients": n if patients is None else len(set(patients)), "ci_low": low, "ci_high": high}


def membership(patients: Sequence) -> np.ndarray:
    """Return which case belongs to which patient, `(cases, patients)` of 0 and 1. patients: the patient of each
    case."""
    number = {patient: i for i, patient in enumerate(dict.fromkeys(patients))}
    members = np.zeros((len(patients), len(number)))
    members[np.arange(len(patients)), [number[patient] for patient in patients]] = 1
    return members


def sums_by_patient(values: np.ndarray, patients: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Add up the values of each patient that are not NaN.

    Args:
        values: `(rows, cases)`.
        patients: The patient of each case. None: every case is a patient.

    Returns:
        The sums, and the numbers of values, each `(rows, patients)`.
    """
    defined = ~np.isnan(values)
    values = np.where(defined, values, 0)
    if patients is None:
        return values, defined.astype(float)
    return values @ membership(patients), defined @ membership(patients)


def percentile_bootstrap(statistic: Callable[..., np.ndarray], sizes: Sequence[int], draws: int = DRAWS,
                         seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % interval of a statistic by a percentile bootstrap, `scipy.stats.bootstrap`.

    Args:
        statistic: Function of one array of drawn indices for each entry of `sizes`, `(draws, size)`, and of `axis`,
            which is -1. It returns `(draws,)` floats. Draws for which it returns NaN are left out.
        sizes: From how many things (patients, seeds) each array of indices is drawn, with replacement; 2 at least.
        draws: The number of draws.
        seed: Seed of the random numbers.

    Returns:
        The lower and the upper bound.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap  # slow to import, and useless to processes that measure
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of draws that are NaN
        found = bootstrap([np.arange(size) for size in sizes], statistic, n_resamples=draws, method="percentile",
                          rng=seed, vectorized=True, batch=1000)  # all draws at once would be large for many cases
    low, high = np.nanpercentile(found.bootstrap_distribution, (2.5, 97.5))
    return float(low), float(high)


def bootstrap_interval(values: np.ndarray, patients: Sequence[str] | None = None, draws: int = DRAWS,
                       seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % interval of the mean over cases, by a bootstrap that draws patients with all of their cases.

    The cases of one patient are alike, so they must not count as independent. The mean itself is that over the cases.

    Args:
        values: `(cases,)`, or `(seeds, cases)`. Of several seeds, seeds are drawn as well. NaN is left out.
        patients: The patient of each case. None: every case is a patient.
        draws: The number of draws.
        seed: Seed of the random numbers.

    Returns:
        The lower and the upper bound; NaN for fewer than two patients.

    Examples:
        >>> low, high = bootstrap_interval(np.array([0.7, 0.8, 0.9, 0.6]), patients=["a", "a", "b", "b"])
        >>> bool(low <= 0.75 <= high)
        True
    """
    sums, counts = sums_by_patient(np.atleast_2d(values), patients)
    seeds, number = sums.shape
    if number < 2:
        return math.nan, math.nan

    def mean(patients: np.ndarray, seeds: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
        drawn = 0 if seeds is None else seeds[..., :, None], patients[..., None, :]
        with np.errstate(invalid="ignore"):  # a draw may hold no value at all
            return sums[drawn].sum((-2, -1)) / counts[drawn].sum((-2, -1))

    return percentile_bootstrap(mean, (number, seeds) if seeds > 1 else (number,), draws, seed)


def paired_statistics(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray,
                      patients: Sequence[str] | None = None) -> dict[str, float | int]:
    """Describe the differences `ours - theirs` of the same cases.

    Args:
        ours: One value for each case.
        theirs: One value for each case. A case in which either value is NaN is left out.
        patients: The patient of each case. None: every case is a patient.

    Returns:
        What :func:`statistics` returns, and `p`, the two-sided p value of Wilcoxon's signed-rank test of the patients'
        mean differences. It is 1 if all of them are zero, and NaN if there is no case.

    Examples:
        >>> described = paired_statistics([0.8, 0.9, 0.7], [0.7, 0.8, 0.6])
        >>> round(described["mean"], 3), described["p"]  # the smallest p that three patients allow: 2 / 2 ** 3
        (0.1, 0.25)
    """
    from scipy.stats import wilcoxon
    differences = np.subtract(ours, theirs)
    found = statistics(differences, patients)
    sums, counts = sums_by_patient(differences[None], patients)
    means = sums[counts > 0] / counts[counts > 0]
    found["p"] = math.nan if not len(means) else 1.0 if not means.any() else float(wilcoxon(means).pvalue)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for the number of tests (Holm 1979). A NaN stays NaN and does not count as a test.

    Examples:
        >>> holm([0.01, 0.5, float("nan")])  # 2 tests: 2 * 0.01, then 1 * 0.5
        [0.02, 0.5, nan]
    """
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)[:np.isfinite(p_values).sum()]  # NaN is sorted to the end
    corrected = np.full(len(p_values), math.nan)
    corrected[order] = np.minimum(np.maximum.accumulate((len(order) - np.arange(len(order))) * p_values[order]), 1)
    return corrected.tolist()
