from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnunet_confkd.data import weak_labels
from nnunet_confkd.data.weak_labels import STYLES, box, case_rng, erosion, nothing, points, scribbles, weaken
from nnunet_confkd.errors import InputError

IGNORE = 9
WAYS = [(style, "2d") for style in STYLES] + [(style, "3d") for style in ("erosion", "points", "box", "none")]
# what annotates each class that is there, in each slice or in the volume
COMPLETE = [("erosion", "2d"), ("points", "2d"), ("scribbles", "2d"), ("erosion", "3d"), ("points", "3d")]
every_way = pytest.mark.parametrize("style, dimension", WAYS)
SQUARE = np.ones((3, 3))


@pytest.fixture(scope="module")
def label():
    """(6, 40, 44): three classes in blobs of all sizes, specks of one pixel among them; the last slice is background.

    The blobs meet each other and three of the borders.
    """
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(6, 40, 44)), (0.5, 4, 4))
    label = np.digitize(smooth, np.quantile(smooth, [0.6, 0.8, 0.93])).astype(np.uint8)
    label[rng.random(label.shape) < 0.002] = 3
    label[5], label[:, :, 38:] = 0, 0
    return label


def _weaken(label, style, dimension="2d", seed=0, **options):
    return weaken(label, style, IGNORE, case_rng("a", style, seed), dimension=dimension, **options)


def _square(side, size, start=8):
    label = np.zeros((size, size), dtype=np.uint8)
    label[start:start + side, start:start + side] = 1
    return label


def _assert_true(weak, full):
    assert weak.shape == full.shape and weak.dtype == full.dtype
    annotated = weak != IGNORE
    assert np.array_equal(weak[annotated], full[annotated])


def _assert_complete(weak, full, dimension):
    for weak_part, full_part in ([(weak, full)] if dimension == "3d" else zip(weak, full)):
        assert set(np.unique(weak_part)) - {IGNORE} == set(np.unique(full_part))


# ---- the generator --------------------------------------------------------------------------------------------------

def test_the_generator_repeats_itself_and_differs_by_case_style_and_seed():
    def draw(*arguments):
        return tuple(case_rng(*arguments).integers(0, 2 ** 32, 4))

    assert draw("a", "points", 0) == draw("a", "points", 0)
    assert len({draw("a", "points", 0), draw("b", "points", 0), draw("a", "scribbles", 0),
                draw("a", "points", 1), draw("a", "points", -1), draw("apoints", "", 0)}) == 6


def test_the_generator_is_the_same_in_every_process():
    # recorded once; a salted hash would give other numbers in each process
    raw = case_rng("case_001", "points", 0).bit_generator.random_raw(2)
    assert raw.tolist() == [3670423718224762555, 3050491565544352342]


# ---- laws of every style --------------------------------------------------------------------------------------------

@every_way
def test_what_is_annotated_is_true_and_the_full_label_is_left_alone(label, style, dimension):
    before = label.copy()
    weak = _weaken(label, style, dimension)
    _assert_true(weak, label)
    assert np.array_equal(label, before) and not np.shares_memory(weak, label)
    # less than everything is annotated, and more than nothing unless that was asked for
    assert (weak == IGNORE).any() and (weak != IGNORE).any() == (style != "none")


@pytest.mark.parametrize("style, dimension", COMPLETE)
def test_each_class_is_annotated_wherever_it_is(label, style, dimension):
    for seed in range(3):
        _assert_complete(_weaken(label, style, dimension, seed), label, dimension)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (2, 2), (3, 3), (9, 8)])
@pytest.mark.parametrize("style", ["erosion", "points", "scribbles"])
def test_components_and_slices_of_a_few_pixels_are_annotated_too(style, shape):
    # noise: nearly all components have one to three pixels
    label = np.random.default_rng(1).integers(0, 6, (40, *shape)).astype(np.uint8)
    weak = _weaken(label, style)
    _assert_true(weak, label)
    _assert_complete(weak, label, "2d")


@every_way
def test_the_same_label_of_another_type_or_memory_order_is_weakened_alike(label, style, dimension):
    weak = _weaken(label, style, dimension)
    for dtype in (np.int8, np.int16, np.int64):
        other = _weaken(label.astype(dtype), style, dimension)
        assert other.dtype == dtype and np.array_equal(other, weak)
    assert np.array_equal(_weaken(np.asfortranarray(label), style, dimension), weak)


@every_way
def test_a_seed_repeats_itself_and_another_gives_another_label_where_chance_matters(label, style, dimension):
    first, again, other = (_weaken(label, style, dimension, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (style in ("erosion", "box", "none"))


@pytest.mark.parametrize("style, dimension, fraction",
                         [(*way, None) for way in WAYS if way[0] != "box"] + [("scribbles", "2d", 0.5)])
def test_without_background_the_foreground_stays_the_same(label, style, dimension, fraction):
    weak = _weaken(label, style, dimension, fraction=fraction)
    without = _weaken(label, style, dimension, fraction=fraction, background=False)
    assert 0 not in without
    assert np.array_equal(without, np.where(weak == 0, IGNORE, weak))


# ---- slices ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("axis", [1, 2])
def test_along_another_axis_it_is_the_same_as_with_the_axes_exchanged(label, style, axis):
    moved = _weaken(np.moveaxis(label, axis, 0), style)
    weak = _weaken(label, style, slice_axis=axis)
    assert np.array_equal(weak, np.moveaxis(moved, 0, axis)) and weak.flags.c_contiguous


@pytest.mark.parametrize("spacing, axis", [
    (None, 0), ((5, 1, 1), 0), ((1, 5, 1), 1), ((0.7, 0.7, 0.8), 2),
    ((1, 1, 1), 0), ((1, 1.0001, 1.0002), 0),  # isotropic, but for the rounding in files
    ((5, 5, 1), 0), ((1, 5, 5), 1)])
def test_the_slices_lie_across_the_largest_spacing(label, spacing, axis):
    assert np.array_equal(_weaken(label, "slices", spacing=spacing), _weaken(label, "slices", slice_axis=axis))


def test_the_axis_that_is_asked_for_goes_before_the_spacing(label):
    told = _weaken(label, "slices", slice_axis=2, spacing=(5, 1, 1))
    assert np.array_equal(told, _weaken(label, "slices", slice_axis=2))
    assert not np.array_equal(told, _weaken(label, "slices"))


@pytest.mark.parametrize("style", STYLES)
def test_a_2d_label_is_one_slice_and_always_annotated(label, style):
    flat = _weaken(label[0], style, fraction=0.1)
    assert np.array_equal(flat, _weaken(label[:1], style)[0])


def test_slices_keep_their_label_and_the_others_lose_it(label):
    weak = _weaken(label, "slices", fraction=0.5)
    kept = (weak == label).all((1, 2))
    assert kept.sum() == 3  # of 6
    assert (weak[~kept] == IGNORE).all()
    assert np.array_equal(_weaken(label, "slices", fraction=1), label)


@pytest.mark.parametrize("style", ["erosion", "points", "scribbles", "box"])
def test_in_the_slices_that_stay_the_annotation_does_not_depend_on_the_fraction(label, style):
    every, half = _weaken(label, style), _weaken(label, style, fraction=0.5)
    kept = (half != IGNORE).any((1, 2))
    assert kept.sum() == 3
    assert np.array_equal(half[kept], every[kept])


def _annotated_slices(count, fraction, seed=0):
    return (_weaken(np.zeros((count, 2, 2), dtype=np.uint8), "slices", seed=seed, fraction=fraction) == 0)[:, 0, 0]


@pytest.mark.parametrize("count, fraction, expected", [
    (10, None, 2), (10, 0.2, 2), (10, 0.34, 3), (10, 0.36, 4), (10, 0.01, 1), (1, 0.5, 1), (7, 1.0, 7),
    (101, 0.5, 50)])
def test_the_fraction_is_that_of_the_slices_evenly_spread(count, fraction, expected):
    for seed in range(5):
        chosen = np.flatnonzero(_annotated_slices(count, fraction, seed))
        assert len(chosen) == expected
        # the last is followed by the first: the gaps are the count's even division, rounded down or up
        gaps = np.diff(np.append(chosen, chosen[0] + count))
        assert gaps.min() >= count // expected and gaps.max() <= -(-count // expected)


def test_half_as_many_slices_lie_within_the_others():
    fourth, half = (_annotated_slices(16, fraction) for fraction in (0.25, 0.5))
    assert fourth.sum() == 4 and (half[fourth]).all()


def test_each_slice_is_chosen_equally_often():
    # 500 seeds, 3 of 10 slices: 150 expected, a standard deviation of sqrt(500 * 0.3 * 0.7) = 10.2; 5 of them are 51
    chosen = sum(_annotated_slices(10, 0.3, seed).astype(int) for seed in range(500))
    assert chosen.sum() == 1500 and chosen.min() > 99 and chosen.max() < 201


# ---- erosion --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side, left", [
    (1, 1), (2, 2), (3, 1), (10, 2), (11, 1),  # k erosions leave side - 2 k: as many as leave 1 or 2
    (22, 2), (23, 3), (30, 10)])  # at most 10 of them
@pytest.mark.parametrize("ndim", [2, 3])
def test_an_eroded_square_loses_two_pixels_of_its_side_each_time(side, left, ndim):
    label = np.zeros((35, ) * ndim, dtype=np.uint8)
    label[(slice(2, 2 + side), ) * ndim] = 1
    cut = (side - left) // 2
    expected = np.zeros_like(label)
    expected[(slice(2 + cut, 2 + side - cut), ) * ndim] = 1
    assert np.array_equal(_weaken(label, "erosion", f"{ndim}d") == 1, expected == 1)


def test_fewer_erosions_can_be_asked_for():
    assert (erosion(_square(10, 30), IGNORE, times=1) == 1).sum() == 8 * 8


@pytest.mark.parametrize("dimension", ["2d", "3d"])
def test_erosion_is_binary_erosion_repeated_as_long_as_something_is_left(label, dimension):
    def reference(part):
        weak = np.full_like(part, IGNORE)
        for value in np.unique(part):
            eroded = [part == value]
            for _ in range(10):
                eroded.append(ndimage.binary_erosion(eroded[-1], np.ones((3, ) * part.ndim), border_value=1))
            weak[next(mask for mask in reversed(eroded) if mask.any())] = value
        return weak

    expected = reference(label) if dimension == "3d" else np.stack([reference(part) for part in label])
    assert np.array_equal(_weaken(label, "erosion", dimension), expected)


def test_classes_are_not_eroded_from_the_border_of_the_image():
    assert np.array_equal(erosion(np.zeros((5, 6), dtype=np.uint8), IGNORE), np.zeros((5, 6)))
    halves = np.zeros((30, 20), dtype=np.uint8)
    halves[:, 8:] = 1
    # from where the two meet: 7 of the 8 columns of background, which leaves one, and 10 of the 12 of the class
    expected = np.full_like(halves, IGNORE)
    expected[:, 0], expected[:, 18:] = 0, 1
    assert np.array_equal(erosion(halves, IGNORE), expected)


# ---- points ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("radius", [0, 1, 3])
@pytest.mark.parametrize("dimension", ["2d", "3d"])
def test_points_are_one_disc_or_ball_inside_each_class(label, radius, dimension):
    weak = _weaken(label, "points", dimension, radius=radius)
    for weak_part, full_part in ([(weak, label)] if dimension == "3d" else zip(weak, label)):
        for value in np.unique(full_part):
            annotated, of_class = np.argwhere(weak_part == value), np.argwhere(full_part == value)
            # some annotated voxel is the centre: all of the class within the radius of it, and nothing else
            discs = ({tuple(v) for v in of_class if ((v - centre) ** 2).sum() <= radius ** 2} for centre in annotated)
            assert {tuple(v) for v in annotated} in discs


def test_points_may_fall_on_any_voxel_of_a_class():
    label = np.zeros((4, 3), dtype=np.uint8)
    rng = case_rng("a", "points", 0)
    hit = sum((points(label, IGNORE, rng, radius=0) == 0).astype(int) for _ in range(200))
    # 200 draws over 12 voxels: a given voxel is missed with a probability of 3e-8
    assert hit.min() > 0 and hit.sum() == 200


def test_points_stay_where_they_were():
    # recorded once: data sets of a seed can be made again
    label = np.zeros((2, 6, 7), dtype=np.uint8)
    label[:, 1:4, 2:6], label[0, 4, 4] = 1, 2
    weak = weaken(label, "points", IGNORE, case_rng("case_001", "points", 0), radius=0)
    assert np.argwhere(weak != IGNORE).tolist() == [[0, 1, 4], [0, 4, 4], [0, 5, 1], [1, 1, 3], [1, 4, 3]]


# ---- scribbles ------------------------------------------------------------------------------------------------------

def test_scribbles_lie_in_one_component_and_large_ones_have_the_larger_odds():
    label = np.zeros((40, 60), dtype=np.uint8)
    label[5:20, 5:25] = 1  # 300 pixels
    label[25:35, 40:50] = 1  # 100 pixels
    in_large = 0
    for seed in range(400):
        columns = np.nonzero(scribbles(label, IGNORE, case_rng("a", "scribbles", seed)) == 1)[1]
        assert (columns < 30).all() or (columns > 30).all()
        in_large += columns[0] < 30
    # 3/4 of 400 = 300 expected, a standard deviation of sqrt(400 * 3/4 * 1/4) = 8.7; 5 of them are 44
    assert 256 < in_large < 344


def test_strokes_do_not_run_on_in_another_component_of_the_class():
    rows, columns = np.ogrid[:60, :60]
    distance = np.hypot(rows - 30, columns - 30)
    label = ((distance < 10) | (distance > 14) & (distance < 25)).astype(np.uint8)
    inside = []  # the disc is 19 % of the class: missed in all 60 with odds of 4e-6
    for seed in range(60):
        in_disc = distance[scribbles(label, IGNORE, case_rng("a", "scribbles", seed)) == 1] < 12
        assert in_disc.all() or not in_disc.any()
        inside.append(in_disc.all())
    assert set(inside) == {True, False}


def test_pixels_that_touch_at_a_corner_are_of_one_component():
    label = np.eye(12, dtype=np.uint8)
    # 12 components of one pixel, were they not
    lengths = [(scribbles(label, IGNORE, case_rng("a", "scribbles", seed)) == 1).sum() for seed in range(10)]
    assert max(lengths) > 6


@pytest.mark.parametrize("line, rows, columns", [
    ([[5, c] for c in np.linspace(3, 10, 30)], (4, 7), (2, 12)), ([[r, 4] for r in range(3, 9)], (2, 10), (3, 6)),
    ([[0, 0]], (0, 2), (0, 2)), ([[7.4, 6.6]], (6, 9), (6, 9))])
def test_strokes_are_three_pixels_thick(line, rows, columns):
    expected = np.zeros((12, 14), dtype=bool)
    expected[slice(*rows), slice(*columns)] = True
    assert np.array_equal(weak_labels._thick(np.array(line, dtype=float), (12, 14)), expected)


def test_an_interior_stroke_is_two_parabolas_that_meet_between_the_middle_points():
    component = np.zeros((50, 70), dtype=bool)
    component[10:45, 5:60] = True
    for seed in range(20):
        line = weak_labels._interior_line(component, case_rng("a", "scribbles", seed))
        a, b, c, d = case_rng("a", "scribbles", seed).choice(np.argwhere(component), 4)
        # a clamped quadratic B-spline with one inner knot is two Bezier curves, joined halfway between b and c
        t = np.linspace(0, 1, len(line))[:, None]
        first, second = (((1 - s) ** 2 * p + 2 * s * (1 - s) * q + s ** 2 * r)
                         for s, p, q, r in ((2 * t, a, b, (b + c) / 2), (2 * t - 1, (b + c) / 2, c, d)))
        np.testing.assert_allclose(line, np.where(t < 0.5, first, second), atol=1e-9)
        # without gaps, at whatever speed the curve is run through
        assert np.abs(np.diff(line, axis=0)).max() <= 0.5


@pytest.mark.parametrize("width", [25, 60])
def test_a_scribble_is_both_strokes_and_in_a_slice_of_one_class_the_interior_one(width):
    label = np.ones((60, 60), dtype=np.uint8)
    label[:, :width] = 0
    rng, again = case_rng("a", "scribbles", 0), case_rng("a", "scribbles", 0)
    weak = scribbles(label, IGNORE, rng)
    component = label == 0
    again.choice(np.flatnonzero(component))  # the draw of the component
    interior, border = (weak_labels._thick(line(component, again), label.shape)
                        for line in (weak_labels._interior_line, weak_labels._border_line))
    assert np.array_equal(weak == 0, (interior | border) & component)
    assert (border & ~interior).any() == (width < 60)
    # neither stroke is interrupted
    assert ndimage.label(interior, SQUARE)[1] == 1 and ndimage.label(border, SQUARE)[1] == (width < 60)


def _border_lines(component, seeds):
    return [weak_labels._border_line(component, case_rng("a", "scribbles", seed)) for seed in range(seeds)]


def test_a_border_stroke_keeps_a_run_of_the_outline_after_two_to_five_erosions():
    component = _square(46, 62).astype(bool)
    found = set()
    for line in _border_lines(component, 60):
        # the first and last pixels of a square eroded k times are those 8 + k and 8 + 45 - k
        pixels = np.rint(line).astype(int)
        distances = np.minimum(pixels - 8, 53 - pixels).min(axis=1)
        erosions = distances[0]
        assert (distances == erosions).all()
        found.add(erosions)
        assert np.abs(np.diff(pixels, axis=0)).max() <= 1
        # the outline has a point for each pixel on each of the four sides
        outline = 4 * (46 - 2 * erosions)
        assert 0.07 * outline - 0.5 <= len(line) <= 0.15 * outline + 0.5
    assert found == {2, 3, 4, 5}


def test_the_length_of_a_border_stroke_varies_over_the_whole_range():
    outline = 4 * (200 - 2 * np.arange(2, 6).mean())
    shares = np.array([len(line) for line in _border_lines(_square(200, 216).astype(bool), 60)]) / outline
    # 60 uniform draws: with odds of 0.9^60 = 0.2 % none lies in the lowest tenth, the same for the highest; the
    # outline's length is known to 1 %
    assert 0.069 < shares.min() < 0.079 and 0.141 < shares.max() < 0.152


def test_border_strokes_prefer_where_the_outline_turns():
    # a frame: its outlines are two squares round one centre, of sides 84 - 2 k and 40 + 2 k after k erosions. Each
    # corner turns by pi/2, seen from 5 points on either side: odds of 5 pi/2 + 10 * 0.1 near a corner, and of 0.1
    # for each of the other points. The share of 8 corners is 8 * 8.85 / (8 * 5 pi/2 + 0.1 * 4 * 124) = 0.63, where
    # evenly spread strokes would have 80 / 496 = 0.16. 400 draws: a standard deviation of 0.024; 5 of them are 0.12
    frame = _square(84, 100).astype(bool)
    frame[30:70, 30:70] = False
    middles = np.array([line[len(line) // 2] for line in _border_lines(frame, 400)])
    along, across = np.sort(np.abs(middles - 49.5), axis=1).T
    near = across - along < 4.8  # of the 5th point: 4.25 on the outer square, 4.75 on the inner one
    for square in (across < 30, across > 30):
        assert square.sum() > 100
    assert 0.51 < near.mean() < 0.75


@pytest.mark.parametrize("count, step", [(200, 5), (20, 5), (12, 3), (4, 1)])
def test_an_outline_turns_by_the_angle_between_chords_of_five_points_or_a_quarter(count, step):
    angles = 2 * np.pi * np.arange(count) / count
    circle = 30 * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(weak_labels._turning(circle, "wrap"), 2 * np.pi * step / count)
    # where the two ends are not joined, nothing is known at them
    assert weak_labels._turning(circle, "clip")[[0, -1]].tolist() == [0, 0]


def test_an_outline_ends_at_the_border_of_the_image():
    component = np.zeros((50, 40), dtype=bool)
    component[:, :20] = True
    starts = []
    for line in _border_lines(component, 100):
        rows, columns = np.rint(line).astype(int).T
        # no stroke along the border of the image: the outline is a column, 3 to 6 pixels inside
        assert len(set(columns)) == 1 and 19 - 5 <= columns[0] <= 19 - 2
        assert set(np.abs(np.diff(rows))) <= {0, 1}
        # of 50 pixels, and one beyond each end of the column
        assert 0.07 * 52 - 0.5 <= len(line) <= 0.15 * 52 + 0.5
        # and at the ends no shorter than elsewhere
        assert len(set(rows)) >= len(line) - 1
        starts.append(rows.min())
    assert min(starts) < 5 and max(starts) > 40


def test_thin_components_are_eroded_less_for_the_border_stroke():
    bar = np.zeros((20, 50), dtype=bool)
    bar[8:12, 10:40] = True  # one erosion leaves rows 9 and 10, two leave none
    for line in _border_lines(bar, 20):
        assert len(line) and set(np.rint(line[:, 0])) <= {9, 10}
    speck = np.zeros((20, 50), dtype=bool)
    speck[3, 4] = True
    for line in _border_lines(speck, 20):
        assert len(line) and (np.rint(line) == (3, 4)).all()


def test_the_outline_goes_on_where_pixels_touch_at_a_corner():
    lines = _border_lines(np.eye(30, dtype=bool), 10)
    assert all(len(np.unique(np.rint(line), axis=0)) > 2 for line in lines)


def test_both_outlines_of_a_ring_get_border_strokes():
    rows, columns = np.ogrid[:80, :80]
    distance = np.hypot(rows - 40, columns - 40)
    ring = (distance > 15) & (distance < 35)
    radii = [np.hypot(*(line - 40).T).mean() for line in _border_lines(ring, 30)]
    assert min(radii) < 24 and max(radii) > 26


def test_strokes_in_a_fragment_are_no_longer_than_its_outline():
    # two large squares and a bridge of 2 pixels, which every erosion cuts: the outline is in two pieces of
    # unequal length, 4 * (12 - 2 k) and 4 * (40 - 2 k) with k erosions
    dumbbell = np.zeros((50, 80), dtype=bool)
    dumbbell[5:45, 5:45], dumbbell[20:32, 55:67], dumbbell[25:27, 45:55] = True, True, True
    lengths = {"small": [], "large": []}
    for line in _border_lines(dumbbell, 200):
        large = line[0, 1] < 50
        assert (line[:, 1] < 50).all() == large
        left, top, side = (5, 5, 40) if large else (55, 20, 12)
        pixels = np.rint(line).astype(int) - (top, left)
        erosions = np.minimum(pixels, side - 1 - pixels).min()
        pieces = {"small": 4 * (12 - 2 * erosions), "large": 4 * (40 - 2 * erosions)}
        piece = "large" if large else "small"
        whole = sum(pieces.values())
        assert min(pieces[piece], 0.07 * whole - 0.5) <= len(line) <= min(pieces[piece], 0.15 * whole + 0.5)
        lengths[piece].append(len(line) == pieces[piece])
    # after 5 erosions the small one's outline is 8 long, of 128: within 7 to 15 % of them, always whole
    assert any(lengths["small"]) and not any(lengths["large"])


# ---- box and none ---------------------------------------------------------------------------------------------------

def test_outside_of_the_box_is_background_and_inside_is_nothing():
    label = np.zeros((3, 10, 12), dtype=np.uint8)
    label[0, 2, 3], label[0, 5, 8] = 1, 2  # one box for all foreground
    label[2, 7:9, 1] = 1
    per_slice = np.zeros_like(label)
    per_slice[0, 2:6, 3:9], per_slice[2, 7:9, 1] = IGNORE, IGNORE
    assert np.array_equal(_weaken(label, "box"), per_slice)
    volume = np.zeros_like(label)
    volume[:, 2:9, 1:9] = IGNORE
    assert np.array_equal(_weaken(label, "box", "3d"), volume)
    assert np.array_equal(box(label[1], IGNORE), label[1])


def test_nothing_is_annotated_by_nothing(label):
    assert np.array_equal(nothing(label, IGNORE), np.full((6, 40, 44), IGNORE))
    assert np.array_equal(_weaken(label, "none", "3d"), nothing(label, IGNORE))


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"style": "dots"}, "no style 'dots': choose one of erosion, points, scribbles, slices, box, none"),
    ({"dimension": "3D"}, "dimension must be one of 2d, 3d, got '3D'"),
    ({"fraction": 0}, "fraction must be above 0 and at most 1, got 0"),
    ({"fraction": 1.01}, "fraction must be above 0 and at most 1, got 1.01"),
    ({"fraction": float("nan")}, "fraction must be above 0 and at most 1, got nan"),
    ({"slice_axis": 3}, "slice_axis must be 0, 1 or 2, got 3"),
    ({"slice_axis": -1}, "slice_axis must be 0, 1 or 2, got -1"),
    ({"spacing": (1, 1)}, "spacing must be 3 numbers above 0"),
    ({"spacing": (1, 0, 1)}, "spacing must be 3 numbers above 0"),
    ({"radius": -1}, "radius must be at least 0, got -1"),
    ({"dimension": "3d", "fraction": 0.5}, "a fraction is a share of the slices: use it with dimension 2d"),
    ({"dimension": "3d", "style": "scribbles"}, "scribbles are made slice by slice: use dimension 2d"),
    ({"dimension": "3d", "style": "slices"}, "slices are made slice by slice: use dimension 2d"),
    ({"style": "box", "background": False}, "box annotates background alone"),
    ({"ignore_label": 3}, "already holds the ignore label 3"),
    ({"ignore_label": 256}, "256 does not fit the label's type uint8"),
    ({"ignore_label": -1}, "-1 does not fit the label's type uint8")])
def test_settings_out_of_range_or_against_each_other_are_refused(label, options, message):
    options = {"style": "points", "ignore_label": IGNORE} | options
    with pytest.raises(InputError, match=message):
        weaken(label, rng=case_rng("a", "points", 0), **options)


@pytest.mark.parametrize("shape, dtype, dimension, message", [
    ((5, ), np.uint8, "2d", r"got shape \(5,\)"), ((2, 2, 2, 2), np.uint8, "2d", r"got shape \(2, 2, 2, 2\)"),
    ((4, 4), np.float32, "2d", "must hold integers, got float32"), ((4, 4), bool, "2d", "must hold integers, got bool"),
    ((4, 4), np.uint8, "3d", "a 2-D label has no volume: use dimension 2d")])
def test_labels_of_other_dimensions_or_types_are_refused(shape, dtype, dimension, message):
    with pytest.raises(InputError, match=message):
        _weaken(np.zeros(shape, dtype=dtype), "points", dimension)


def test_all_that_is_wrong_is_told_at_once(label):
    with pytest.raises(InputError) as error:
        weaken(label, "dots", 3, case_rng("a", "dots", 0), fraction=2, radius=-1)
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["no", "the", "there", "fraction", "radius"]


# ---- real data ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real_labels(test_data):
    files = [*sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:2],
             *sorted((test_data / "acdc" / "training").glob("patient00[12]/*_gt.nii.gz"))[::2]]
    assert len(files) == 4
    images = [sitk.ReadImage(str(file)) for file in files]
    return [(sitk.GetArrayFromImage(image).astype(np.uint8), image.GetSpacing()[::-1]) for image in images]


@every_way
def test_real_labels_become_weak_ones(real_labels, style, dimension):
    for label, spacing in real_labels:
        weak = _weaken(label, style, dimension, spacing=spacing)
        _assert_true(weak, label)
        if (style, dimension) in COMPLETE:
            _assert_complete(weak, label, dimension)


def test_real_scribbles_are_scarce(real_labels):
    for label, spacing in real_labels:
        # strokes of 3 pixels across slices of some 40 (Hippocampus) and some 230 (ACDC) pixels width
        share = (_weaken(label, "scribbles", spacing=spacing) != IGNORE).mean()
        assert 0.005 < share < (0.2 if label.shape[2] < 100 else 0.04)
