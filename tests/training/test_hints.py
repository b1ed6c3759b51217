"""Hints: real annotations, and on fully annotated images simulated ones that are true and look like real ones."""
from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage

from nnunet_confkd.data.watershed import spread
from nnunet_confkd.training.hint_patterns import KEPT, PARTS, SAMPLE, Cloud, Depth, Pattern, Voxels, boxes_of, gaps_of
from nnunet_confkd.training.hint_places import Place, background_around, eroded
from nnunet_confkd.training.hints import NO_HINTS, HintSampler, class_map, hint_channels, image_hints

IGNORE = 3


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def batch(ndim: int = 2) -> torch.Tensor:
    """Five images: two fully annotated ones, halved between 0 and 1 and with a cube of 2; two with a bar of each of 0
    and 1 annotated, 5 voxels long; one unlabelled."""
    target = torch.full((5, 1, *ndim * [20]), IGNORE, dtype=torch.int16)
    target[:2] = 0
    target[:2, :, 10:] = 1
    target[(slice(0, 2), 0, *ndim * [slice(13, 17)])] = 2
    target[(slice(2, 4), 0, 2, slice(5, 10), *(ndim - 2) * [3])] = 0
    target[(slice(2, 4), 0, 15, slice(5, 10), *(ndim - 2) * [3])] = 1
    return target


def draw(target: torch.Tensor, num_full: int, draws: np.random.Generator, sampler: HintSampler | None = None,
         inside: torch.Tensor | None = None, data: torch.Tensor | None = None) -> torch.Tensor:
    """The hint mask of a batch; without a sampler, of the first one of a training."""
    sampler = HintSampler(IGNORE) if sampler is None else sampler
    inside = torch.ones_like(target[:, :1], dtype=torch.bool) if inside is None else inside
    return sampler.draw(torch.zeros(target[:, :1].shape) if data is None else data, target, inside, num_full, draws)


# ---- which voxels ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ndim", (2, 3))
def test_images_that_are_not_full_show_their_annotated_voxels(ndim):
    target = batch(ndim)
    mask = draw(target, 2, rng())
    assert mask.dtype == torch.bool and mask.shape == target.shape
    assert torch.equal(mask[2:], target[2:] != IGNORE)


@pytest.mark.parametrize("ndim", (2, 3))
def test_full_images_show_whole_patterns_inside_each_class(ndim):
    target = batch(ndim)
    whole = {0: 0, 1: 0}
    for seed in range(60):
        mask = draw(target, 2, rng(seed))
        for image, labels in zip(mask[:2, 0], target[:2, 0]):
            for label in (0, 1):
                found = torch.nonzero(image & (labels == label))
                extent = (found.amax(0) - found.amin(0)).tolist() if len(found) else [0]
                assert len(found) in (0, 5) and max(extent) <= 4 and sum(x > 0 for x in extent) <= 1
                whole[label] += len(found) == 5
            assert not (image & (labels == 2)).any()  # annotated in no other image
    assert all(120 * (1 - NO_HINTS) - 20 < count < 120 * (1 - NO_HINTS) + 20 for count in whole.values())


def test_a_pattern_may_lie_anywhere_where_it_fits():
    target = torch.full((2, 1, 12, 12), IGNORE, dtype=torch.int16)
    target[0] = 0
    target[0, 0, 4:7, 4:8] = 1
    target[1, 0, 0, 0:2] = 1  # a bar of 2
    sampler, draws = HintSampler(IGNORE, no_hints=0), rng()
    seen = np.mean([draw(target, 1, draws, sampler)[0, 0].numpy() for _ in range(900)], 0)
    assert seen.sum() == pytest.approx(2) == pytest.approx(seen[4:7, 4:8].sum())  # never cut
    # There are nine places for the bar, and fewer draws lead to those at the ends of a row.
    assert seen[4:7, 4:8] == pytest.approx(np.array([[1, 2, 2, 1]] * 3) / 9, abs=0.07)


@pytest.mark.parametrize("size", (3, 14), ids=("compared whole", "compared by a sample"))
def test_a_pattern_is_not_cut_at_the_border_of_its_class(size):
    """The end of a hint would tell where the class ends, which is false on real annotations."""
    assert 14 ** 2 > SAMPLE > 3 ** 2
    target = torch.full((2, 1, 64, 64), IGNORE, dtype=torch.int16)
    target[0] = 0
    target[0, 0, 10:10 + 3 * size, 10:10 + 3 * size] = 1
    target[1, 0, :size, :size] = 1
    draws = rng()
    counts = [int(draw(target, 1, draws)[0, 0].sum()) for _ in range(100)]
    assert set(counts) <= {0, *range(int(0.93 * size ** 2), size ** 2 + 1)}
    assert np.mean([count == size ** 2 for count in counts if count]) > 0.9


@pytest.mark.parametrize("step", ((0, 1), (1, 1)), ids=("horizontal", "diagonal"))
def test_a_pattern_that_fits_nowhere_is_moved_component_by_component(step):
    target = torch.full((2, 1, 60, 40), IGNORE, dtype=torch.int16)
    target[0] = 0
    target[0, 0, 26:32, :] = 1  # a band, 6 wide
    scribble = np.arange(4)[:, None] * step
    for start in ((5, 5), (25, 5)):  # two scribbles, 20 apart
        target[(1, 0, *(scribble + start).T)] = 1
    draws, numbers, widths = rng(), set(), []
    for _ in range(60):
        mask = draw(target, 1, draws)[0, 0].numpy()
        assert not (mask & (target[0, 0].numpy() != 1)).any()
        neighbour = np.roll(mask, step, (0, 1)) | np.roll(mask, (-step[0], -step[1]), (0, 1))
        assert not (mask & ~neighbour).any()  # no component is cut into pieces
        numbers.add(int(mask.sum()))
        widths.append(np.ptp(np.nonzero(mask)[1]) if mask.any() else 0)
    assert max(numbers) == 8 and numbers <= {0, *range(4, 9)}  # the scribbles may overlap
    assert max(widths) > 10  # they lie apart


@pytest.mark.parametrize("deep", (False, True))
def test_where_nothing_fits_the_innermost_voxels_of_the_class_are_shown(deep):
    target = torch.full((2, 1, 40, 40), IGNORE, dtype=torch.int16)
    target[0] = 0
    target[0, 0, 10:20, 10:20] = 1
    target[1, 0, 5:7, :] = 1  # a band that is longer than the class
    sampler, draws = HintSampler(IGNORE, no_hints=0), rng()
    draw(target[1:], 0, draws, sampler)
    sampler.depth[1].value = lambda: float(deep)  # how far real annotations stay inside
    for _ in range(20):
        mask = draw(target, 1, draws, sampler)[0, 0]
        assert mask[11:19, 11:19].all()  # 64 that touch no other class
        # of 80 voxels two thirds of the class, 100 voxels; without those that touch another class if it is deep
        assert int(mask.sum()) == (64 if deep else 66)


@pytest.mark.parametrize("ndim", (2, 3))
@pytest.mark.parametrize("distance", (1, 2, 3, 5))
def test_eroded_voxels_are_those_that_far_from_the_border(ndim, distance):
    mask = ndimage.binary_dilation(rng(distance).random([24, 17, 13][:ndim]) < 0.03, iterations=4)
    around = np.pad(mask, 8, mode="edge")  # beyond the end of the array it goes on
    expected = ndimage.distance_transform_cdt(around, "chessboard")[(slice(8, -8),) * ndim] >= distance
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(eroded(mask, distance), expected)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 1, 5), (3, 4, 5)])
@pytest.mark.parametrize("factor", [1, 2 ** 40 + 1])
def test_the_box_of_each_value_is_that_of_its_voxels(shape, factor):
    rng = np.random.default_rng(len(shape))
    for share in (0.0, 0.3, 1.0):
        labels, inside = rng.integers(4, size=shape) * factor, rng.random(shape) < share
        found = boxes_of(labels, inside)
        assert list(found) == np.unique(labels[inside]).tolist()
        for value, box in found.items():
            voxels = np.argwhere((labels == value) & inside)
            assert box == tuple(map(slice, voxels.min(0), voxels.max(0) + 1))
    assert boxes_of(np.zeros((0, 3), int), np.zeros((0, 3), bool)) == {}


@pytest.mark.parametrize("ndim", (2, 3))
def test_gaps_are_the_smallest_distances_between_annotations_of_two_classes(ndim):
    labels, annotated = np.zeros([30] * ndim, int), np.zeros([30] * ndim, bool)
    middle = [15] * (ndim - 1)
    for at, label in ((2, 0), (3, 0), (9, 4), (20, 2)):
        labels[(at, *middle)], annotated[(at, *middle)] = label, True
    assert gaps_of(labels, annotated) == {0: 6, 4: 6, 2: 11}
    assert gaps_of(labels, annotated & (labels == 0)) == {}


def diamond_and_annotations(dense: bool) -> torch.Tensor:
    """A full image of a diamond, and eight others. Both classes are annotated at least 5 voxels from the border between
    them: everywhere there, or in a square of 3 x 3."""
    y, x = np.mgrid[:72, :72]
    distance = np.abs(y - 36) + np.abs(x - 36) - 20.5
    target = np.full((9, 1, 72, 72), IGNORE, np.int16)
    target[0] = distance < 0
    deep = eroded(distance < 0, 5), eroded(distance > 0, 5)
    for label, mask in zip((1, 0), deep):
        target[1:, 0][:, mask] = label
    if not dense:
        square = np.zeros((72, 72), bool)
        square[35:38, 35:38] = square[2:5, 2:5] = True
        target[1:, 0][:, ~square] = IGNORE
    return torch.from_numpy(target)


def test_where_most_is_annotated_hints_keep_the_margin_of_real_annotations():
    """As in eroded masks with background: the border lies in the middle of the gap, and all around it."""
    target = diamond_and_annotations(dense=True)
    sampler, draws = HintSampler(IGNORE, no_hints=0), rng()
    draw(target[1:], 0, draws, sampler)
    assert {label: margin.value() for label, margin in sampler.margins.items()} == {0: 5, 1: 5}
    full = target[0, 0].numpy()
    for _ in range(20):
        mask = draw(target, 1, draws, sampler)[0, 0].numpy()
        for label in (0, 1):
            of_class = np.pad(full == label, 8, mode="edge")
            distance = ndimage.distance_transform_cdt(of_class, "chessboard")[8:-8, 8:-8]
            assert (distance[mask & (full == label)] >= 5).all()
            assert mask[distance >= 5].mean() > 0.9


def test_where_little_is_annotated_a_wide_gap_tells_nothing():
    """Two clicks may lie far apart because there are only two."""
    target = diamond_and_annotations(dense=False)
    sampler, draws = HintSampler(IGNORE, no_hints=0), rng()
    draw(target[1:], 0, draws, sampler)
    assert not sampler.margins
    full, nearest = target[0, 0].numpy(), []
    inside = ndimage.distance_transform_cdt(full == 1, "chessboard")
    for _ in range(60):
        mask = draw(target, 1, draws, sampler)[0, 0].numpy() & (full == 1)
        nearest.append(inside[mask].min())
    assert min(nearest) <= 2


@pytest.mark.parametrize("ndim", (2, 3))
def test_nothing_is_shown_outside_of_the_image(ndim):
    target = batch(ndim)
    inside = torch.ones_like(target, dtype=torch.bool)
    inside[:, :, :2] = inside[..., 14:] = False  # padding: background on full images
    target[(2, 0, *ndim * [0])] = 1  # an annotation in the padding is no hint either
    sampler, draws, total = HintSampler(IGNORE), rng(), 0
    for _ in range(60):
        mask = draw(target, 2, draws, sampler, inside)
        assert not (mask & ~inside).any()
        total += int((mask[:2] & (target[:2] == 0)).sum())
    assert total > 0.6 * 60 * 2 * 5  # the bar of background is shown, too


def test_the_end_of_the_image_cuts_a_pattern_and_says_nothing_about_its_class():
    target = torch.full((2, 1, 20, 20), IGNORE, dtype=torch.int16)
    target[0] = 0
    target[1, 0, 4, 5:10] = 0  # a bar of 5
    inside = torch.ones_like(target, dtype=torch.bool)
    inside[0, ..., 3:] = False  # the image is 3 wide
    sampler, draws = HintSampler(IGNORE, no_hints=0), rng()
    for _ in range(20):
        mask = draw(target, 1, draws, sampler, inside)[0, 0]
        assert not (mask & ~inside[0, 0]).any()
        assert mask.sum() == 3 and mask.any(1).sum() == 1  # still a bar


def test_the_end_of_the_image_counts_as_the_inside_of_a_class():
    truth = torch.zeros(2, 1, 30, 40, dtype=torch.int16)
    truth[:, :, :16] = 1
    data, target = edges_of(truth), truth.clone()
    target[1] = IGNORE
    target[1, 0, 10:12, 18:20] = 1  # far from the edge between rows 15 and 16
    inside = torch.ones_like(target, dtype=torch.bool)
    inside[:, :, :10] = False  # padding
    sampler, draws, rows = HintSampler(IGNORE, no_hints=0), rng(), []
    for i in range(80):
        mask = draw(target, 1, draws, sampler, inside, data)[0, 0]
        if i > 50:
            rows.append(np.nonzero(mask.numpy())[0].mean())
    assert np.mean(rows) == pytest.approx(10.5, abs=0.3)


def edges_of(target: torch.Tensor) -> torch.Tensor:
    """Images with strong edges at the borders of class 1 of a full image."""
    return (target == 1).float()


@pytest.mark.parametrize("deep", (True, False))
def test_hints_keep_the_distance_to_the_border_that_the_edges_of_real_annotations_tell(deep):
    truth = torch.zeros(2, 1, 40, 40, dtype=torch.int16)
    truth[:, :, 10:30, 10:30] = 1
    data, target = edges_of(truth), truth.clone()
    target[1] = IGNORE
    sampler, draws, touching = HintSampler(2, no_hints=0), rng(), []
    target[1] = 2
    for i in range(300):
        target[1] = 2
        y, x = (19, 19) if deep else draws.integers(10, 29, 2)
        target[1, 0, y:y + 2, x:x + 2] = 1
        mask = draw(target, 1, draws, sampler, data=data)[0, 0]
        assert int(mask.sum()) == 4 and (truth[0, 0][mask] == 1).all()
        if i > 50:
            touching.append(not mask[11:29, 11:29].sum() == 4)
    # of the 19 x 19 places 72 touch the border
    assert np.mean(touching) < 0.02 if deep else np.mean(touching) == pytest.approx(72 / 361, abs=0.1)


def test_the_previous_stage_of_a_cascade_is_no_part_of_the_image():
    """Its prediction follows the image's channels, and its borders would look like edges of the image."""
    target = batch()
    image, previous = edges_of(target), torch.rand(5, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    alone, cascade, all_channels = HintSampler(IGNORE), HintSampler(IGNORE, image_channels=1), HintSampler(IGNORE)
    for seed in range(5):
        expected = draw(target, 2, rng(seed), alone, data=image)
        assert torch.equal(draw(target, 2, rng(seed), cascade, data=torch.cat((image, previous), 1)), expected)
        draw(target, 2, rng(seed), all_channels, data=torch.cat((image, previous), 1))
    assert cascade.depth[1].edges == alone.depth[1].edges != all_channels.depth[1].edges


def test_observing_batches_ends_when_enough_is_seen_and_leaves_numpys_numbers_alone():
    target, inside = batch(), torch.ones(5, 1, 20, 20, dtype=torch.bool)

    def loader():
        while True:
            drawn.append(np.random.random())
            yield {"data": torch.zeros(5, 1, 20, 20), "num_full": 2, "inside": inside, "target": target}

    np.random.seed(3)
    expected, found = np.random.random(), []
    for seed in (3, 4):
        drawn: list[float] = []
        np.random.seed(seed)
        sampler = HintSampler(IGNORE)
        sampler.observe_batches(loader())
        assert sampler.images["annotated"] == KEPT  # two in each batch
        found.append((drawn, np.random.random()))
    assert found[0][0] == found[1][0] and len(found[0][0]) == KEPT // 2
    assert found[0][1] == expected != found[1][1]


@pytest.mark.parametrize("ndim, axis", ((2, 0), (3, 0), (3, 2)))
def test_annotation_by_slices_is_simulated_by_slices(ndim, axis):
    target = torch.zeros(2, 1, *ndim * [20], dtype=torch.int16)
    target[(slice(None), 0, *ndim * [slice(5, 12)])] = 1
    annotated = torch.zeros(ndim * [20], dtype=torch.bool)
    annotated.select(axis, 0)[:] = False
    if ndim == 2:
        annotated[:] = True  # the slice itself
    else:
        annotated.movedim(axis, 0)[[2, 7, 12, 17]] = True
    target[1, 0][~annotated] = IGNORE
    inside = torch.ones_like(target, dtype=torch.bool)
    inside[0, ..., 18:] = False
    sampler, draws, seen = HintSampler(IGNORE, no_hints=0), rng(), set()
    for _ in range(30):
        mask = draw(target, 1, draws, sampler, inside)[0, 0].movedim(axis, 0)
        shown = inside[0, 0].movedim(axis, 0)
        whole = [bool(of_slice.any()) for of_slice in mask]
        assert all(torch.equal(of_slice, known if there else torch.zeros_like(known))
                   for of_slice, known, there in zip(mask, shown, whole))
        seen.add(tuple(whole))
    if ndim == 2:
        assert torch.equal(mask, shown)
    else:
        assert len(seen) > 2 and all(sum(whole) in (3, 4) for whole in seen)


def test_a_slice_of_a_single_class_is_a_slice():
    target = torch.zeros(2, 1, 12, 12, dtype=torch.int16)
    inside = torch.ones_like(target, dtype=torch.bool)
    inside[1, ..., 9:] = False
    target[1][~inside[1]] = IGNORE
    assert draw(target, 1, rng(), HintSampler(IGNORE, no_hints=0), inside)[0].all()


# ---- how often ------------------------------------------------------------------------------------------------------

def test_a_class_is_left_out_as_often_as_annotated_images_lack_it():
    sparse, everywhere = torch.full((2, 1, 8, 8), IGNORE, dtype=torch.int16), torch.zeros(1, 1, 8, 8, dtype=torch.int16)
    sparse[0, 0, 1, 1], sparse[1, 0, 1, 1] = 0, 0
    sparse[1, 0, 6, 6] = 1  # every second annotated image has class 1, every full one
    everywhere[..., 4:, :] = 1
    nothing = torch.full_like(everywhere, IGNORE)
    sampler, draws = HintSampler(IGNORE), rng()
    seen = [draw(torch.cat((everywhere, sparse, nothing)), 1, draws, sampler)[0, 0] for _ in range(500)]
    assert np.mean([bool(mask[:4].any()) for mask in seen]) == pytest.approx(1 - NO_HINTS, abs=0.05)
    assert np.mean([bool(mask[4:].any()) for mask in seen]) == pytest.approx((1 - NO_HINTS) / 2, abs=0.06)
    # where the full images lack it as often, it is shown in all that have it
    sampler = HintSampler(IGNORE)
    target = torch.cat((torch.zeros_like(everywhere), everywhere, sparse))
    seen = [draw(target, 2, draws, sampler)[1, 0] for _ in range(300)]
    assert np.mean([bool(mask[4:].any()) for mask in seen]) == pytest.approx(1 - NO_HINTS, abs=0.06)


@pytest.mark.parametrize("share", (NO_HINTS, 0.0))
def test_a_share_of_the_full_images_gets_no_hints(share):
    target, draws, sampler = batch()[:4], rng(), HintSampler(IGNORE, no_hints=share)
    nothing = [not image.any() for _ in range(200) for image in draw(target, 2, draws, sampler)[:2]]
    assert np.mean(nothing) == pytest.approx(share, abs=0.05)


def test_patterns_are_kept_for_batches_without_any():
    """A batch of one image holds no other to learn from."""
    target, sampler, draws = batch(), HintSampler(IGNORE), rng()
    assert not draw(target[:1], 1, draws, sampler).any()
    for image in target[2:]:
        assert torch.equal(draw(image[None], 0, draws, sampler)[0], image != IGNORE)
    seen = torch.cat([draw(target[:1], 1, draws, sampler) for _ in range(50)])
    assert seen[:, :, :10].any() and seen[:, :, 10:].any()


def test_a_pattern_keeps_its_voxels_and_their_place():
    voxels = np.array([[3, 70], [4, 2], [9, 5]])
    pattern = Pattern.of(Voxels.of(voxels))
    np.testing.assert_array_equal(pattern.voxels().voxels(), voxels)
    np.testing.assert_array_equal(pattern.voxels().moved(np.array([-2, 5])).voxels(), voxels + [-2, 5])
    assert pattern.bits.nbytes == -(-7 * 69 // 8)


@pytest.mark.parametrize("corner", [(2, 3), (-1, 5), (5, 0), (9, 9)])
def test_of_a_pattern_only_what_lies_in_the_class_is_shown(corner):
    """Wherever it is moved to: beyond the class, and beyond the image."""
    draws = rng(3)
    mask, pattern = draws.random((5, 6)) < 0.7, Voxels(draws.random((4, 5)) < 0.7, corner)
    place = Place(mask, (slice(2, 7), slice(3, 9)), (9, 10), None, np.zeros((1, 9, 10)), Depth())
    shown = np.zeros((9, 10), bool)
    place.paint(shown, pattern)
    of_class = {tuple(voxel) for voxel in place.voxels().tolist()}
    expected = of_class & {tuple(voxel) for voxel in pattern.voxels().tolist()}
    assert set(map(tuple, np.argwhere(shown).tolist())) == expected and (expected or corner == (9, 9))


def test_the_last_patterns_of_each_class_are_kept():
    sampler, draws = HintSampler(IGNORE), rng()
    for length in range(1, 2 * KEPT + 1):
        target = torch.full((1, 1, 2, 64), IGNORE, dtype=torch.int16)
        target[..., 0, 5:5 + length] = 0
        draw(target, 0, draws, sampler)
    full = torch.zeros(1, 1, 200, 64, dtype=torch.int16)
    lengths = {int(draw(full, 1, draws, sampler).sum()) for _ in range(600)}
    # at the end of the image up to half of a pattern may be cut off
    assert 2 * KEPT in lengths and lengths - {0} <= set(range((KEPT + 1) // 2, 2 * KEPT + 1))


def with_ring(place: tuple[int, ...], radius: int, annotated: bool, ring: bool = True) -> torch.Tensor:
    """An image of 64 x 64 with a disc of class 1. If it is annotated: a smaller disc, and the background round it."""
    distance = np.hypot(*(np.indices((64, 64)) - np.reshape(place, (2, 1, 1))))
    label = (distance <= radius).astype(np.int16)
    if annotated:
        shown = distance < radius / 2
        if ring:
            shown |= np.abs(distance - radius - 3) < 0.7
        label[~shown] = IGNORE
    return torch.from_numpy(label)[None, None]


@pytest.mark.parametrize("place", ((20, 40), (44, 22)))
def test_the_background_is_annotated_round_the_foreground_as_in_real_images(place):
    """A ring has also room elsewhere in the background, and lay there before."""
    target, sampler, draws, found = with_ring(place, 6, False), HintSampler(IGNORE, no_hints=0), rng(), []
    for other in ((30, 30), (32, 25), (25, 36)):
        draw(with_ring(other, 6, True), 0, draws, sampler)
    background = target[0, 0].numpy() == 0
    away = ndimage.distance_transform_edt(background)
    for _ in range(60):
        shown = draw(target, 1, draws, sampler)[0, 0].numpy() & background
        found += [float(away[shown].mean())] if shown.any() else []
    assert len(found) > 50 and np.mean(found) < 5 and np.percentile(found, 90) < 7


@pytest.mark.parametrize("radius", (5, 12))
def test_the_background_comes_from_an_image_whose_foreground_is_about_as_large(radius):
    sampler = HintSampler(IGNORE)
    for other in 4 * (5, 12):
        draw(with_ring((30, 30), other, True), 0, rng(), sampler)
    background = with_ring((32, 34), radius, False)[0, 0].numpy() == 0
    box = (slice(0, 64), slice(0, 64))
    place = Place(background, box, (64, 64), None, np.zeros((1, 64, 64)), Depth())
    foreground = Cloud.of(with_ring((32, 34), radius, True, False)[0, 0].numpy() == 1)
    for seed in range(20):
        found = background_around(foreground, sampler.patterns[0], place, rng(seed)).voxels()
        assert np.hypot(*(found - [32, 34]).T).mean() == pytest.approx(radius + 3, abs=2)


def test_where_no_foreground_is_annotated_the_background_may_be_anywhere():
    sampler, draws = HintSampler(IGNORE, no_hints=0), rng()
    alone = torch.full((1, 1, 64, 64), IGNORE, dtype=torch.int16)
    alone[..., 10:14, 10] = 0
    draw(alone, 0, draws, sampler)
    target = with_ring((32, 32), 6, False)
    places = [np.argwhere(draw(target, 1, draws, sampler)[0, 0].numpy()).mean(0) for _ in range(60)]
    assert np.std(places, 0).min() > 8


@pytest.mark.parametrize("ignore", (None, IGNORE))
def test_where_every_image_is_full_nothing_is_shown(ignore):
    assert not draw(batch()[:2], 2, rng(), HintSampler(ignore)).any()


def test_without_full_images_there_is_nothing_to_simulate():
    target = batch()[2:]
    assert torch.equal(draw(target, 0, rng()), target != IGNORE)


def test_unlabelled_images_show_nothing_and_give_no_pattern():
    assert not draw(batch()[[0, 1, 4]], 2, rng()).any()


def test_a_sampler_with_patterns_can_be_sent_to_another_process():
    sampler, target = HintSampler(IGNORE), batch()
    draw(target, 2, rng(), sampler)
    copy = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(draw(target, 2, rng(1), copy), draw(target, 2, rng(1), sampler))


# ---- regions, batches, whole images ---------------------------------------------------------------------------------

def regions_of(target: torch.Tensor, first: tuple[int, ...] = (1, 2)) -> torch.Tensor:
    """Region 0: the labels `first`; region 1: label 2; last the ignore mask, as nnU-Net has them."""
    return torch.cat((torch.isin(target, torch.tensor(first)), target == 2, target == IGNORE), 1)


@pytest.mark.parametrize("first", ((1, 2), (1,)), ids=("overlapping", "disjoint"))
def test_regions_are_shown_as_labels_are(first):
    target, some = batch(), 0
    target[3, 0, 12, 5:10] = 2
    for seed in range(5):
        labels = draw(target, 2, rng(seed))
        regions = draw(regions_of(target, first), 2, rng(seed), HintSampler(IGNORE, regions=True))
        some += int(labels[:2].any())
        # background is no region, and its number comes first as well: the draws are the same
        assert torch.equal(labels, regions) or first == (1,)
        assert not (regions[:2] & (target[:2] == IGNORE)).any()
    assert some > 2


@pytest.mark.parametrize("number", (2, 16, 24, 70))
def test_regions_of_any_number_have_one_number_for_each_combination(number):
    target = torch.zeros(1, number + 1, 2, 3, dtype=torch.int16)
    target[:, 0, 0, 0] = target[:, -2, 0, 1] = 1
    target[:, [0, -2], 0, 2] = target[:, [0, -2], 1, 0] = 1
    found = class_map(target, regions=True)[0]
    assert len(set(found.ravel().tolist())) == 4 and found[0, 2] == found[1, 0] and found[1, 1] == found[1, 2] == 0


def test_many_regions_cost_no_table_of_their_combinations():
    """A count of 2^24 combinations is 128 MiB, and of 2^63 impossible."""
    import tracemalloc
    target = torch.zeros(2, 64, 16, 16, dtype=torch.int16)
    target[0, -2, 4:12, 4:12] = 1
    target[1, -1] = 1
    target[1, -2, 5, 5:8], target[1, -1, 5, 5:8] = 1, 0
    sampler = HintSampler(63, regions=True, no_hints=0)
    tracemalloc.start()
    mask = draw(target, 1, rng(), sampler)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask[0].sum() == 3 and (target[0, -2][mask[0, 0]] == 1).all() and peak < 8 * 2 ** 20


@pytest.mark.parametrize("regions", (False, True))
def test_the_mask_is_of_the_highest_resolution(regions):
    target = regions_of(batch()) if regions else batch()
    whole = {"data": torch.zeros(5, 1, 20, 20), "num_full": 2, "inside": torch.ones(5, 1, 20, 20, dtype=torch.bool)}
    mask = HintSampler(IGNORE, regions)({**whole, "target": [target, target[..., ::2, ::2]]})["hint_mask"]
    assert torch.equal(mask[2:], batch()[2:] != IGNORE)
    without_deep_supervision = HintSampler(IGNORE, regions)({**whole, "target": target})["hint_mask"]
    assert torch.equal(without_deep_supervision, mask)


def test_hints_are_spread_over_each_image_within_its_borders():
    target, inside = batch(), torch.ones(5, 1, 20, 20, dtype=torch.bool)
    inside[..., 17:] = False
    data = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 2, 20, 20)))
    whole = {"data": data, "num_full": 2, "inside": inside, "target": [target, target[..., ::2, ::2]]}
    drawn = HintSampler(IGNORE, image_channels=1, watershed=True, no_hints=0)(whole)
    mask, found = drawn["hint_mask"], drawn["hint_spread"]
    assert found.dtype == torch.int16 and mask.flatten(1).any(1).tolist() == [True] * 4 + [False]
    assert torch.equal(found[mask], (target[mask] + 1).to(torch.int16))
    assert torch.equal(found[:4] > 0, inside[:4]) and not found[4].any(), "wherever the image is, if it has hints"
    for image, labels, hints, spread_map in zip(data, target, mask, found):
        expected = spread(image[:1].numpy(), labels[0].numpy(), hints[0].numpy(), inside[0, 0].numpy())
        assert np.array_equal(spread_map[0], expected), "of the image's own channels"
    assert "hint_spread" not in HintSampler(IGNORE)(whole)


def test_channels_tell_class_and_place_of_what_is_shown():
    target = torch.tensor([[[[0, 1, 2, IGNORE]]]])
    mask = torch.tensor([[[[True, False, True, False]]]])
    expected = torch.tensor([[[[1, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 1, 0]], [[1, 0, 1, 0]]]]).float()
    assert torch.equal(hint_channels(target, mask, 3), expected)
    labels = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
    assert torch.equal(image_hints(target[0], mask[0], labels), torch.tensor([[[1, 0, 3, 0]]]).int())
    expected = torch.tensor([[[[0, 0, 1, 0]], [[0, 0, 1, 0]], [[1, 0, 1, 0]]]]).float()
    assert torch.equal(hint_channels(regions_of(target), mask, 2, regions=True), expected)
    labels = LabelManager({"background": 0, "a": (1, 2), "b": 2, "ignore": 3}, [1, 2])
    assert torch.equal(image_hints(target[0], mask[0], labels), expected[0])


@pytest.mark.parametrize("patch", ((8, 8), (8, 8, 8)), ids=("2-D network", "3-D network"))
def test_a_whole_image_is_simulated_tile_by_tile(patch):
    sampler, draws = HintSampler(IGNORE, no_hints=0), rng()
    partial = torch.full((1, 1, *patch), IGNORE, dtype=torch.int16)
    partial[(0, 0, *(len(patch) - 1) * [4], slice(2, 5))] = 1
    draw(partial, 0, draws, sampler)
    label = np.zeros((9, 12, 20), np.int16)
    label[:, :, 3:] = 1
    inside = np.ones(label.shape, bool)
    inside[:, 10:] = False
    mask = sampler.simulate_volume(np.zeros((1, *label.shape)), label, inside, patch, draws)
    assert (label[mask] == 1).all() and inside[mask].all()
    tiles = 9 * 2 * 3 if len(patch) == 2 else 2 * 2 * 3
    assert tiles <= mask.sum() <= 3 * tiles  # a bar of 3 in each; less where the image ends


def test_hints_follow_nnunets_random_numbers_and_leave_them_alone():
    target = batch()
    inside = torch.ones(5, 1, 20, 20, dtype=torch.bool)
    whole = {"data": torch.zeros(5, 1, 20, 20), "num_full": 2, "inside": inside, "target": target}
    drawn = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        before = np.random.get_state()
        drawn.append(HintSampler(IGNORE, no_hints=0)(whole)["hint_mask"])
        after = np.random.get_state()
        assert before[2] == after[2] and (before[1] == after[1]).all()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    np.random.uniform()
    assert not torch.equal(drawn[2], HintSampler(IGNORE, no_hints=0)(whole)["hint_mask"])


def test_a_pattern_of_very_many_components_is_split_into_few_groups_of_neighbours():
    """Each one is placed on its own, which would take seconds for a patch of scattered voxels."""
    voxels = np.argwhere(np.random.default_rng(0).random((40, 60, 60)) < 0.02)
    parts = [part.voxels() for part in Voxels.of(voxels).components()]
    assert len(parts) == PARTS and min(map(len, parts)) > 0
    np.testing.assert_array_equal(np.concatenate(parts)[np.lexsort(np.concatenate(parts).T[::-1])], voxels)
    # neighbours: along the first axis the groups follow each other
    assert all(np.ptp(part[:, 0]) < 8 for part in parts)
    assert len(Voxels.of(voxels[:5]).components()) == 5
