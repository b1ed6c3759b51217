from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from nnunet_confkd.evaluation.calibration import (
    BINS,
    Counts,
    aurc,
    count,
    count_case,
    ece,
    ece_difference,
    overconfidence,
    reliability_curve,
    risk_coverage_curve,
    smallest_aurc,
)


def brute_force_aurc(confidence, correct, orders=1, seed=0):
    """The mean risk over all prefixes, by sorting; ties in random order."""
    rng, areas = np.random.default_rng(seed), []
    for _ in range(orders):
        order = np.lexsort((rng.random(len(correct)), -np.asarray(confidence)))
        wrong = ~np.asarray(correct)[order]
        areas.append((wrong.cumsum() / np.arange(1, len(wrong) + 1)).mean())
    return np.mean(areas)


# ---- calibration ----------------------------------------------------------------------------------------------------

def test_reliability_and_ece_of_a_case_computed_by_hand():
    # Bins of 1/15: 0.95 and 0.99 lie in (14/15, 1], 0.6 in (8/15, 9/15] with its upper end, 0.61 in the next.
    # (14/15, 1]: mean confidence 0.97, accuracy 1/2; (8/15, 9/15]: 0.6 and 1; (9/15, 10/15]: 0.61 and 0.
    # ECE = 2/4 * 0.47 + 1/4 * 0.4 + 1/4 * 0.61 = 0.4875
    counts = count(np.array([0.95, 0.99, 0.6, 0.61]), np.array([True, False, True, False]))
    curve = reliability_curve(counts)
    assert curve["count"].tolist() == [0] * 8 + [1, 1] + [0] * 4 + [2]
    np.testing.assert_allclose(curve["confidence"][[8, 9, 14]], [0.6, 0.61, 0.97])
    np.testing.assert_allclose(curve["accuracy"][[8, 9, 14]], [1, 0, 0.5])
    assert np.isnan(curve["accuracy"][:8]).all() and np.isnan(curve["confidence"][:8]).all()
    np.testing.assert_allclose(curve["edges"], np.arange(BINS + 1) / BINS)
    assert ece(counts) == pytest.approx(0.4875)
    assert overconfidence(counts) == pytest.approx((0.95 + 0.99 + 0.6 + 0.61) / 4 - 0.5)


def test_a_calibrated_predictor_has_no_ece_and_an_overconfident_one_its_gap():
    # accuracy 0.9 at a confidence of 0.9; then the same answers said with 0.99: 0.09 too sure
    correct = np.arange(1000) % 10 != 0
    assert ece(count(np.full(1000, 0.9), correct)) == pytest.approx(0, abs=1e-12)
    assert ece(count(np.full(1000, 0.99), correct)) == pytest.approx(0.09)
    assert overconfidence(count(np.full(1000, 0.99), correct)) == pytest.approx(0.09)
    assert overconfidence(count(np.full(1000, 0.8), correct)) == pytest.approx(-0.1)


def test_confidences_of_0_and_1_are_counted():
    counts = count(np.array([0.0, 1.0]), np.array([False, True]))
    assert counts.count[0] == counts.count[-1] == 1 and counts.fine_count[0] == counts.fine_count[-1] == 1


@pytest.mark.parametrize("confidence", [1.1, -0.1, np.nan])
def test_what_is_no_confidence_is_refused(confidence):
    with pytest.raises(ValueError, match="not from 0 to 1"):
        count(np.array([0.5, confidence]), np.array([True, True]))


def coarse(share_right):
    """`Counts.coarse` of 10 voxels with confidence 0.75, in the 12th of 15 bins."""
    bins = np.zeros((3, BINS))
    bins[:, 11] = 10, 10 * share_right, 7.5
    return bins


def test_the_interval_of_a_difference_of_ece():
    # |1 - 0.75| - |0.5 - 0.75| = 0 in each case; 0.25 - |0.7 - 0.75| = 0.2 in each, whichever cases are drawn
    assert ece_difference([coarse(1)] * 4, [coarse(0.5)] * 4) == (0, 0)
    np.testing.assert_allclose(ece_difference([coarse(1)] * 4, [coarse(0.7)] * 4), (0.2, 0.2))
    # two cases, right in all and in none: either drawn twice is 0.25 or 0.75, both drawn once |0.5 - 0.75| = 0.25
    np.testing.assert_allclose(ece_difference([coarse(1), coarse(0)], [coarse(0.75)] * 2), (0.25, 0.75))
    assert np.isnan(ece_difference([coarse(1)], [coarse(0.5)])).all()


def test_the_interval_of_a_difference_of_ece_is_by_patient():
    """A second case of each patient that repeats the first narrows nothing."""
    ours, theirs, patients = [coarse(1), coarse(0), coarse(0.5), coarse(0.25)], [coarse(0.75)] * 4, ["a", "b", "c", "d"]
    once = ece_difference(ours, theirs)
    assert ece_difference(ours * 2, theirs * 2, patients * 2) == once
    assert np.ptp(ece_difference(ours * 2, theirs * 2)) < np.ptp(once)
    assert np.isnan(ece_difference(ours, theirs, ["a"] * 4)).all()


# ---- risk and coverage ----------------------------------------------------------------------------------------------

def test_risk_and_coverage_of_a_case_computed_by_hand():
    # from the most confident: right, wrong, right, wrong -> risks 0, 1/2, 1/3, 1/2; AURC = (0 + 1/2 + 1/3 + 1/2) / 4
    counts = count(np.array([0.6, 0.99, 0.9, 0.7]), np.array([False, True, False, True]))
    curve = risk_coverage_curve(counts)
    np.testing.assert_allclose(curve["coverage"], [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve["risk"], [0, 1 / 2, 1 / 3, 1 / 2])
    assert aurc(counts) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    # best order of two right and two wrong: risks 0, 0, 1/3, 2/4
    assert smallest_aurc(counts) == pytest.approx((1 / 3 + 1 / 2) / 4)


def test_the_area_equals_that_by_sorting():
    rng = np.random.default_rng(0)
    confidence = np.sort(rng.choice(np.linspace(-4, 12, 400), 300, replace=False))  # log odds, a fine bin each
    confidence = 1 / (1 + np.exp(-confidence))
    correct = rng.random(300) < confidence
    counts = count(confidence, correct)
    assert (counts.fine_count <= 1).all() and 0 < correct.sum() < 300
    assert aurc(counts) == pytest.approx(brute_force_aurc(confidence, correct), rel=1e-12)
    wrong_last = np.arange(300) >= correct.sum()
    assert smallest_aurc(counts) == pytest.approx((wrong_last.cumsum() / np.arange(1, 301)).mean(), rel=1e-12)


def test_ties_count_with_the_mean_over_their_orders():
    confidence, correct = np.repeat([0.9, 0.6], [6, 4]), np.array([True] * 4 + [False] * 2 + [True] + [False] * 3)
    expected = brute_force_aurc(confidence, correct, orders=20000)
    assert aurc(count(confidence, correct)) == pytest.approx(expected, rel=5e-3)
    # and not with the worst or the best of them
    assert abs(expected - brute_force_aurc(confidence + 1e-6 * correct, correct)) > 0.02 * expected


def test_a_useless_confidence_has_the_error_rate_as_its_area():
    # all tie: the expected risk is e / n at every coverage
    assert aurc(count(np.full(50, 0.8), np.arange(50) < 40)) == pytest.approx(0.2)


def test_confidences_close_to_1_are_told_apart():
    # 1 - 1e-5 right and 1 - 1e-3 wrong: risks 0 and 1/2 in this order, 1 and 1/2 in the other
    confidence = np.array([1 - 1e-5, 1 - 1e-3])
    assert aurc(count(confidence, np.array([True, False]))) == pytest.approx(0.25)
    assert aurc(count(confidence, np.array([False, True]))) == pytest.approx(0.75)


# ---- cases ----------------------------------------------------------------------------------------------------------

def test_the_counts_of_cases_add_up_to_those_of_all_their_voxels():
    rng = np.random.default_rng(1)
    cases = [(rng.dirichlet(np.ones(3), shape).transpose(2, 0, 1), rng.integers(0, 3, shape))
             for shape in ((4, 5), (7, 3))]
    together = sum((count_case(p, t) for p, t in cases), Counts.none())
    confidence = np.concatenate([p.max(0).ravel() for p, _ in cases])
    correct = np.concatenate([(p.argmax(0) == t).ravel() for p, t in cases])
    whole = count(confidence, correct)
    for name in Counts.__dataclass_fields__:
        np.testing.assert_allclose(getattr(together, name), getattr(whole, name))
    assert together.count.sum() == 41


def test_ignored_voxels_and_those_elsewhere_do_not_count():
    probabilities = np.array([[[0.9, 0.8, 0.3, 0.6]], [[0.1, 0.2, 0.7, 0.4]]])
    truth = np.array([[0, 2, 1, 1]])
    counts = count_case(probabilities, truth, ignore_label=2)
    assert counts.count.sum() == 3 and counts.correct.sum() == 2
    assert counts.confidence.sum() == pytest.approx(0.9 + 0.7 + 0.6)
    where = np.array([[True, True, False, True]])
    counts = count_case(probabilities, truth, ignore_label=2, where=where)
    assert counts.count.sum() == 2 and counts.correct.sum() == 1
    assert where.tolist() == [[True, True, False, True]]
    nothing = count_case(probabilities, np.full((1, 4), 2), ignore_label=2)
    assert nothing.count.sum() == 0
    assert np.isnan([figure(nothing) for figure in (ece, overconfidence, aurc, smallest_aurc)]).all()


def test_each_region_is_a_prediction_of_its_own():
    # heads "whole" (labels 1, 2) and "core" (2); truth 2, 1, 0, ignored
    probabilities = np.array([[0.9, 0.2, 0.4, 0.9], [0.7, 0.6, 0.1, 0.9]])
    truth = np.array([2, 1, 0, 3])
    counts = count_case(probabilities, truth, ignore_label=3, regions=[(1, 2), 2])
    # whole: 0.9 right; 0.2 -> confidence 0.8, wrong; 0.4 -> 0.6, right. core: 0.7 right; 0.6 wrong; 0.1 -> 0.9 right
    assert counts.count.sum() == 6 and counts.correct.sum() == 4
    assert counts.confidence.sum() == pytest.approx(0.9 + 0.8 + 0.6 + 0.7 + 0.6 + 0.9)


@pytest.mark.parametrize("regions", (None, [(1, 2), 2, 1]), ids=("softmax", "regions"))
def test_a_large_volume_is_counted_in_parts(regions, monkeypatch):
    rng = np.random.default_rng(5)
    p, truth = rng.dirichlet(np.ones(3), (4, 5, 6)).transpose(3, 0, 1, 2), rng.integers(0, 4, (4, 5, 6))
    options = {"ignore_label": 3, "regions": regions, "where": rng.random(truth.shape) < 0.7}
    whole, seen = count_case(p, truth, **options), []
    monkeypatch.setattr("nnunet_confkd.evaluation.calibration.CHUNK", 7)
    monkeypatch.setattr("nnunet_confkd.evaluation.calibration.count",
                        lambda confidence, correct: seen.append(len(confidence)) or count(confidence, correct))
    parts = count_case(p, truth, **options)
    assert whole.count.sum() > 50 and max(seen) <= 7
    for name in Counts.__dataclass_fields__:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name))


def test_what_does_not_fit_is_refused():
    p = np.full((2, 3, 3), 0.5)
    with pytest.raises(ValueError, match="do not fit"):
        count_case(p, np.zeros((3, 4), int))
    with pytest.raises(ValueError, match="do not fit"):
        count_case(p, np.zeros((3, 3), int), where=np.ones(3, bool))
    with pytest.raises(ValueError, match="from 0 to 2, but there are 2 classes"):
        count_case(p, np.arange(9).reshape(3, 3) % 3)
    with pytest.raises(ValueError, match="3 regions, but probabilities of 2 heads"):
        count_case(p, np.zeros((3, 3), int), regions=[1, 2, 3])


def test_memory_does_not_grow_with_the_cases():
    rng = np.random.default_rng(0)
    total, sizes = Counts.none(), []
    tracemalloc.start()
    try:
        for _ in range(30):
            p = rng.dirichlet(np.ones(2), (40, 40)).transpose(2, 0, 1)
            total += count_case(p, p.argmax(0))
            del p
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # a case's confidences alone take 12 kB; the counts 67 kB, however many the cases
    assert max(sizes[5:]) - sizes[4] < 12_000
