from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import tempfile
from bisect import bisect_right
from fractions import Fraction
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from image_files import read_json, read_voxels, write_image
from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.commands.plan import main, next_step
from nnunet_confkd.data import planning
from nnunet_confkd.data.planning import plan, preprocess_keeping_annotations
from nnunet_confkd.data.resampling import KeepAnnotations, _KeepingConfiguration, keep_annotations
from nnunet_confkd.data.supervision import decide_kinds
from nnunet_confkd.errors import InputError
from nnunet_confkd.training.batches import StratifiedLoader, label_padding
from nnunet_confkd.training.hints import HintSampler, hint_channels

X = 9  # the ignore label of the hand-made examples


# ---- keep_annotations -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("old, new, places", [
    # floor((i + 0.5) * new / old)
    (4, 4, [0, 1, 2, 3]),
    (8, 4, [0, 0, 1, 1, 2, 2, 3, 3]),  # 0.25, 0.75, 1.25, ...
    (5, 4, [0, 1, 2, 2, 3]),  # 0.4, 1.2, 2.0, 2.8, 3.6
    (10, 9, [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]),  # 0.45, 1.35, 2.25, 3.15, 4.05, 4.95, 5.85, 6.75, 7.65, 8.55
    (3, 6, [1, 3, 5]),  # 1, 3, 5: on the edge of two, the upper one
    (2, 3, [0, 2]),  # 0.75, 2.25
    (3, 1, [0, 0, 0])])
def test_a_single_point_keeps_its_class_in_its_place_and_nothing_else_changes(old, new, places):
    for index, place in enumerate(places):
        seg = np.full(old, X)
        seg[index] = 2
        expected = np.full(new, X)
        expected[place] = 2
        assert keep_annotations(seg, np.full(new, X), X).tolist() == expected.tolist()


def test_axes_have_scales_of_their_own():
    # (1, 2, 4) to (1, 2, 2) with a channel axis before: columns 0, 1 to 0 and 2, 3 to 1, rows as they are
    seg = np.array([[[[1, X, X, X], [X, X, X, 2]]]])
    assert keep_annotations(seg, np.full((1, 1, 2, 2), X), X).tolist() == [[[[1, X], [X, 2]]]]


@pytest.mark.parametrize(
    "seg, resampled, expected",
    [
        # three voxels to a place
        ([1, 1, 2, X, X, X], [2, X], [2, X]),  # 2 is one of the classes there: it stays, though 1 is more frequent
        (
            [1, 1, 2, 2, X, X, 1, X, X],
            [X, X, X],
            [1, 2, 1],
        ),  # ignored: the most frequent there, though 2 is rarer in the case
        ([1, 1, 2, 2, X, X, 1, X, X], [3, 3, 3], [1, 2, 1]),  # a class that nobody annotated there: likewise
        ([1, 2, X, 1, 1, X, 2, X, X], [X, X, X], [2, 1, 2]),  # a tie: 1 has three voxels in the case, 2 has two
        ([2, 1, X, X, X, X], [X, X], [1, X]),  # a tie, equally rare: the lowest; 2 cannot take the last voxel of 1
        ([X, X, X, 2, X, X], [0, X], [0, 2]),  # where nothing is annotated the resampled class stays
        ([-1, X, X, 0, X, X], [X, 0], [-1, 0]),  # outside of the non-zero region is a class like any other
        ([-1, -1, 0, 0, X, X], [X, X], [-1, 0]),
        ([0, 0, -1, -1, X, X], [X, X], [0, -1]),
        # what would vanish
        ([1, 1, 2, 1, 1, X], [X, X], [2, 1]),  # 2 is outnumbered in its only place
        ([1, 1, 2, 1, 1, X], [1, 1], [2, 1]),  # or the resampled class stays there
        ([1, 1, 2, 1, 1, 2, X, 1, 1], [1, 1, 1], [2, 2, 1]),  # all of its places
        ([1, 1, 2, 1, 1, 2, X, X, X], [1, 1, X], [1, 2, X]),  # all but the last of the other class
        ([1, 1, 2, X, X, X, 2, X, X], [1, 2, X], [1, 2, 2]),  # it has another place: nothing to save
        ([1, 2, 3, 1, X, X], [1, 1], [2, 1]),  # two would vanish from one place: only one can be saved
        ([1, 1, 3, 3, 3, 2, X, X, X], [1, 3, X], [1, 3, X]),
    ],
)  # 2 could only take the last place of 3
def test_conflicts_are_settled_by_the_rules(seg, resampled, expected):
    assert keep_annotations(np.array(seg), np.array(resampled), X).tolist() == expected


def test_labels_without_ignored_voxels_and_without_annotations_stay_as_resampled():
    assert keep_annotations(np.array([1, 1, 2, 2]), np.array([2, 1]), X).tolist() == [2, 1]
    assert keep_annotations(np.full(4, X), np.array([X, 1]), X).tolist() == [X, 1]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32])
def test_the_type_is_that_of_the_resampled_label_and_the_inputs_are_left_alone(dtype):
    seg, resampled = np.array([[-1, X], [X, 2]], dtype=np.float32), np.full((3, 3), X, dtype=dtype)[::-1]
    kept = keep_annotations(seg, resampled, X)
    assert kept.dtype == dtype and kept.shape == (3, 3)
    # 2 to 3: indices 0 and 1 to 0 and 2
    assert kept.tolist() == [[-1, X, X], [X, X, X], [X, X, 2]]
    assert (resampled == X).all() and seg.tolist() == [[-1, X], [X, 2]]


@pytest.mark.parametrize("old, new", [(10, 9), (10, 8), (50, 37), (9, 3), (10, 4), (7, 1), (4, 12), (11, 33)])
def test_places_follow_the_grid_of_nnunets_resampling(old, new):
    ramp = np.arange(old, dtype=float).reshape(1, old, 1, 1)
    nearest = resample_data_or_seg_to_shape(ramp, (new, 1, 1), [1, 1, 1], [1, 1, 1], order=0)
    nearest = nearest.ravel().round().astype(int)
    for index in range(old):
        seg = np.full((1, old, 1, 1), X)
        seg[0, index] = 1
        place = keep_annotations(seg, np.full((1, new, 1, 1), X), X).ravel().tolist().index(1)
        taken = np.flatnonzero(nearest == index)  # of this voxel nnU-Net's nearest neighbour makes these
        if taken.size:  # an odd enlargement: the middle one; a reduction: the only one
            assert place == taken[len(taken) // 2]


@pytest.mark.parametrize("seed", range(8))
def test_isolated_points_survive_at_every_scale(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(12, 30, 3)
    new = np.maximum(1, (shape * rng.uniform(0.4, 2.2, 3)).round().astype(int))
    seg = np.full((1, *shape), 3, dtype=np.float32)
    points = rng.integers(0, shape, (40, 3))
    seg[0][tuple(points.T)] = rng.integers(-1, 3, 40)
    stock = resample_data_or_seg_to_shape(seg, new, [1, 1, 1], shape / new, is_seg=True, order=1)
    kept = keep_annotations(seg, stock, 3)

    def place(index, old, number):  # the voxel between whose edges the centre lies, in exact fractions of the extent
        return bisect_right([Fraction(edge, number) for edge in range(number)], Fraction(2 * index + 1, 2 * old)) - 1

    annotated = {}
    for point in np.argwhere(seg[0] != 3).tolist():
        there = tuple(place(i, old, number) for i, old, number in zip(point, shape.tolist(), new.tolist()))
        annotated.setdefault(there, set()).add(seg[(0, *point)])
    assert all(kept[(0, *there)] in classes for there, classes in annotated.items())
    assert sum(len(classes) == 1 for classes in annotated.values()) > 25
    elsewhere = np.ones(new, dtype=bool)
    elsewhere[tuple(np.array(list(annotated)).T)] = False
    assert np.array_equal(kept[0][elsewhere], stock[0][elsewhere])


def test_points_in_real_labels_survive_where_nnunet_loses_most(test_data):
    survived = {"stock": 0, "kept": 0}
    total = 0
    for number, file in enumerate(sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:5]):
        full = sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32)
        # one point a slice and class
        rng, seg = np.random.default_rng(number), np.full((1, *full.shape), 3, dtype=np.float32)
        for z in range(len(full)):
            for value in np.unique(full[z]):
                y, x = rng.choice(np.argwhere(full[z] == value))
                seg[0, z, y, x] = value
        new = [round(0.8 * n) for n in full.shape]
        stock = resample_data_or_seg_to_shape(seg, new, [1, 1, 1], [1.25] * 3, is_seg=True, order=1)
        kept = keep_annotations(seg, stock, 3)
        points = np.argwhere(seg[0] != 3)
        places = tuple(np.floor((points + 0.5) * new / full.shape).astype(int).T)
        for name, label in (("stock", stock), ("kept", kept)):
            survived[name] += np.count_nonzero(label[0][places] == seg[0][tuple(points.T)])
        total += len(points)
    # measured over 200 labels: 14 % and 99.97 %; the rest shares its place with a point of another class
    assert survived["kept"] > 0.99 * total
    assert survived["stock"] < 0.25 * total


def test_the_preprocessor_and_its_configuration_can_be_sent_to_other_processes():
    configuration = _KeepingConfiguration({"resampling_fn_seg": "resample_data_or_seg_to_shape", "architecture": {},
                                           "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1}}, 3)
    assert configuration.resampling_fn_seg(np.full((1, 2, 2, 2), 3), (1, 1, 1), [1] * 3, [2] * 3).tolist() == [[[[3]]]]
    sent = pickle.loads(pickle.dumps(configuration))
    seg = np.full((1, 2, 2, 2), 3)
    seg[0, 1, 1, 1] = 1
    assert sent.resampling_fn_seg(seg, (1, 1, 1), [1] * 3, [2] * 3).tolist() == [[[[1]]]]
    assert type(pickle.loads(pickle.dumps(KeepAnnotations(verbose=False).run_case_save)).__self__) is KeepAnnotations


# ---- data sets ------------------------------------------------------------------------------------------------------

SHAPE, IGNORE = (12, 16, 20), 3
OUTSIDE = (slice(2, 4), slice(0, 4), slice(0, 4))  # in a corner of what is left after cropping the image is 0
MIXED = "Dataset611_Mixed"


def _full_label():
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[4:10, 4:14, 4:16] = 1
    label[6:8, 6:12, 6:14] = 2
    return label


def _image(label, number):
    rng = np.random.default_rng(number)
    image = rng.normal(np.array([-500, 50, 120])[label] + 10 * number, 20).astype(np.float32)
    image[:2] = 0  # cropped by nnU-Net
    image[OUTSIDE] = 0
    return image


def _points(label, number):
    """One point in each block of 4 x 4 x 4 voxels: no two share a voxel at half the resolution."""
    rng = np.random.default_rng(100 + number)
    corners = 4 * np.array(list(np.ndindex(3, 4, 5))) + [2, 0, 0]
    weak = np.full(SHAPE, IGNORE, dtype=np.uint8)
    points = tuple((corners + rng.integers(0, 2, corners.shape)).T)
    weak[points] = label[points]
    return weak


def make_dataset(raw, kinds, labels=None, **more):
    """Cases c00, c01, ... of these kinds; returns {case: (image, label)}."""
    cases = {}
    for number, kind in enumerate(kinds):
        label = _full_label()
        image = _image(label, number)
        if kind == "partial":
            label = _points(label, number)
        elif kind in ("unlabelled", "cropped"):
            label = np.full(SHAPE, IGNORE, dtype=np.uint8)
            label[0] = 0 if kind == "cropped" else IGNORE
        elif kind == "empty":
            label = np.zeros(SHAPE, dtype=np.uint8)
        cases[f"c{number:02d}"] = image, label
        write_image(raw / "imagesTr" / f"c{number:02d}_0000.nii.gz", image)
        write_image(raw / "labelsTr" / f"c{number:02d}.nii.gz", label)
    labels = labels or {"background": 0, "a": 1, "b": 2, "ignore": IGNORE}
    (raw / "dataset.json").write_text(
        json.dumps(
            {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz"} | more
        )
    )
    return cases


@contextlib.contextmanager
def threads():
    """nnU-Net's pools as threads: a new process takes seconds to import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))
        yield


def run(*words):
    """confkd plan with one process each; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([*map(str, words), "-npfp", "1", "-np", "1", "--no_pbar"])
    return out.getvalue()


KINDS = ["full"] * 3 + ["partial"] * 2 + ["cropped", "unlabelled"]


@pytest.fixture(scope="module", autouse=True)
def faster():
    """Fewer samples of intensities for the fingerprint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetFingerprintExtractor, "num_foreground_voxels_for_intensitystats",
                      property(lambda self: 5e6, lambda self, value: None), raising=False)
        yield


@pytest.fixture(scope="module")
def mixed(nnunet):
    """A CT data set with partial labels, planned with a target spacing that halves the resolution.

    Stock nnU-Net has made its fingerprint before.
    """
    raw, preprocessed = nnunet.raw(MIXED), nnunet.preprocessed(MIXED)
    cases = make_dataset(raw, KINDS, supervision={"c02": "partial"})
    with threads():
        extract_fingerprints([611], num_processes=1, show_progress_bar=False)
        stock = read_json(preprocessed / "dataset_fingerprint.json")
        printed = run("-d", MIXED, "-c", "2d", "3d_fullres", "-overwrite_target_spacing", 2, 2, 2)
    return SimpleNamespace(raw=raw, preprocessed=preprocessed, cases=cases, stock_fingerprint=stock, printed=printed,
                           kinds=dict(zip(cases, KINDS)))


@pytest.fixture
def planned(mixed, tmp_path, monkeypatch):
    """The preprocessed folder of a copy of it, with nnU-Net's pools as threads."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    shutil.copytree(mixed.preprocessed, tmp_path / "preprocessed" / MIXED)
    with threads():
        yield tmp_path / "preprocessed" / MIXED


# ---- fingerprint ----------------------------------------------------------------------------------------------------

def _weighted_quantile(values, share):
    """Of a mixture in which every case has the same weight; values: one array a case."""
    order = np.argsort(np.concatenate(values))
    weights = np.concatenate([np.full(len(v), 1 / len(v) / len(values)) for v in values])[order]
    index = np.searchsorted(np.cumsum(weights), np.clip(share, 0, 1 - 1e-9))
    return np.concatenate(values)[order][index]


def test_intensity_statistics_are_those_of_annotated_foreground(mixed):
    values = [image[(label > 0) & (label != IGNORE)].astype(float) for image, label in mixed.cases.values()]
    values = [v for v in values if len(v)]
    assert len(values) == 5
    fingerprint = read_json(mixed.preprocessed / "dataset_fingerprint.json")
    found = fingerprint["foreground_intensity_properties_per_channel"]["0"]
    # nnU-Net draws the same number of voxels of each case with replacement, here 700 000
    mean = np.mean([v.mean() for v in values])
    variance = np.mean([(v ** 2).mean() for v in values]) - mean ** 2
    assert found["mean"] == pytest.approx(mean, abs=0.1)
    assert found["std"] == pytest.approx(variance ** 0.5, abs=0.1)
    assert found["min"] == min(v.min() for v in values)
    assert found["max"] == max(v.max() for v in values)
    for key, share in (("percentile_00_5", 0.005), ("median", 0.5), ("percentile_99_5", 0.995)):
        assert _weighted_quantile(values, share - 1e-3) <= found[key] <= _weighted_quantile(values, share + 1e-3)
    # stock nnU-Net's: most of what it takes for foreground is ignored background around -500
    assert mixed.stock_fingerprint["foreground_intensity_properties_per_channel"]["0"]["mean"] < mean - 200
    plans = read_json(mixed.preprocessed / "nnUNetPlans.json")
    assert plans["foreground_intensity_properties_per_channel"]["0"] == found


def test_intensity_statistics_of_a_case_that_lacks_a_class_are_those_of_the_classes_it_lists(empty_workspace):
    """Such a case has the missing class inside its background, which does not count."""
    raw = empty_workspace / MIXED
    cases = make_dataset(raw, ["full", "full"], {"background": 0, "a": 1, "b": 2}, annotated_classes={"c01": ["b"]})
    image, label = cases["c01"]
    write_image(raw / "labelsTr" / "c01.nii.gz", np.where(label == 1, 0, label).astype(np.uint8))
    with threads():
        run("-d", MIXED, "-c", "2d", "--no_pp")
    fingerprint = read_json(empty_workspace.parent / "preprocessed" / MIXED / "dataset_fingerprint.json")
    found = fingerprint["foreground_intensity_properties_per_channel"]["0"]
    full, listed = cases["c00"][0][cases["c00"][1] > 0], image[label == 2]
    assert found["mean"] == pytest.approx((full.mean() + listed.mean()) / 2, abs=0.1)
    assert abs(listed.mean() - image[label > 0].mean()) > 10, "class a would have changed it"
    assert found["max"] == max(full.max(), listed.max())


def test_nothing_else_in_the_fingerprint_differs_from_nnunets(mixed):
    ours = read_json(mixed.preprocessed / "dataset_fingerprint.json")
    assert ours.pop("foreground_intensities_of") == "annotated voxels"
    key = "foreground_intensity_properties_per_channel"
    assert {**ours, key: None} == {**mixed.stock_fingerprint, key: None}
    assert ours["shapes_after_crop"] == [[10, 16, 20]] * len(KINDS)


def test_a_fingerprint_of_stock_nnunet_is_made_again_and_ours_is_not(mixed, planned):
    assert "existing fingerprint takes ignored voxels for foreground" in mixed.printed
    file = planned / "dataset_fingerprint.json"
    file.write_text(json.dumps(read_json(file) | {"ours": "untouched"}))
    assert "takes ignored voxels" not in run("-d", 611, "--no_pp")
    assert read_json(file)["ours"] == "untouched"
    run("-d", 611, "--no_pp", "--clean")
    assert read_json(file) == read_json(mixed.preprocessed / "dataset_fingerprint.json")


class Failing(DatasetFingerprintExtractor):
    seen: list = []

    def run(self, overwrite_existing=False):
        for files in self.dataset.values():
            label = sitk.GetArrayFromImage(sitk.ReadImage(files["label"]))
            self.seen.append((files["label"], int(label.max()), label.shape))
        raise RuntimeError("no luck")


def test_the_copies_of_labels_are_removed_when_the_extractor_fails(planned, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_and_preprocess_entrypoints, "Failing", Failing, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(Failing, "seen", [])
    before = {f: f.read_bytes() for f in mixed.raw.rglob("*.nii.gz")}
    with pytest.raises(RuntimeError, match="no luck"):
        run("-d", 611, "--no_pp", "--clean", "-fpe", "Failing")
    # only labels that hold the ignore label were copied, and no copy holds it
    assert [str(tmp_path / "tmp") in label for label, _, _ in Failing.seen] == [kind != "full" for kind in KINDS]
    assert {(highest, shape) for _, highest, shape in Failing.seen} == {(2, SHAPE), (0, SHAPE)}
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {f: f.read_bytes() for f in mixed.raw.rglob("*.nii.gz")} == before
    assert read_json(planned / "dataset_fingerprint.json")["foreground_intensities_of"] == "annotated voxels"


def test_a_copy_that_was_not_written_whole_is_noticed(planned, monkeypatch):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    stock = SimpleITKIO.write_seg
    monkeypatch.setattr(
        SimpleITKIO, "write_seg", lambda self, seg, file, properties: stock(self, 0 * seg, file, properties)
    )
    with pytest.raises(InputError, match=r"confkd_.*c0[34].*was not written as it should be"):
        run("-d", 611, "--no_pp", "--clean")


# ---- planning -------------------------------------------------------------------------------------------------------

def test_confkd_blocks_and_configurations_of_ones_own_survive_planning_anew(planned):
    file = planned / "nnUNetPlans.json"
    stock = read_json(file)
    edited = json.loads(json.dumps(stock))
    edited["confkd"] = {"note": 1}
    edited["configurations"]["2d"]["confkd"] = {"epochs": 7}
    edited["configurations"]["2d"]["batch_size"] = 999
    edited["configurations"]["2d_mine"] = {"inherits_from": "2d", "confkd": {"seed": 3}}
    file.write_text(json.dumps(edited))
    other = planned / "otherPlans.json"
    other.write_text(json.dumps(edited))

    run("-d", 611, "--no_pp", "-overwrite_target_spacing", 2, 2, 2)
    expected = json.loads(json.dumps(stock))
    expected["confkd"] = {"note": 1}
    expected["configurations"]["2d"]["confkd"] = {"epochs": 7}
    expected["configurations"]["2d_mine"] = {"inherits_from": "2d", "confkd": {"seed": 3}}
    assert read_json(file) == expected  # the batch size is planned anew
    assert other.read_text() == json.dumps(edited)
    assert PlansManager(str(file)).get_configuration("2d_mine").configuration["confkd"] == {"seed": 3}
    assert [f.name for f in planned.iterdir() if f.name.startswith(".")] == []


def test_plans_without_blocks_are_the_file_that_nnunet_writes(planned):
    file = planned / "nnUNetPlans.json"
    run("-d", 611, "--no_pp", "-overwrite_target_spacing", 2, 2, 2)
    ours = file.read_bytes()
    file.unlink()
    os.environ["nnUNet_n_proc_DA"] = "1"
    try:
        plan_experiments([611], overwrite_target_spacing=[2, 2, 2])
    finally:
        os.environ["nnUNet_n_proc_DA"] = "0"
    assert file.read_bytes() == ours


def test_presets_and_names_of_plans_are_handed_through(planned):
    assert plan([611], planner="nnUNetPlannerResEncM", no_preprocessing=True) == "nnUNetResEncUNetMPlans"
    plans = read_json(planned / "nnUNetResEncUNetMPlans.json")
    assert plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"].endswith("ResidualEncoderUNet")
    assert plan([MIXED, 611], overwrite_plans_name="mine", gpu_memory_target=2, no_preprocessing=True) == "mine"
    assert read_json(planned / "mine.json")["plans_name"] == "mine"
    # nnU-Net's planner fails on this setting, which is put back
    assert os.environ["nnUNet_n_proc_DA"] == "0"


def test_a_file_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch):
    def half(content, file, **_):
        with open(file, "w") as f:
            f.write("{")
        raise OSError(28, "No space left on device")

    file = tmp_path / "plans.json"
    file.write_text("{}")
    monkeypatch.setattr(planning, "save_json", half)
    with pytest.raises(InputError, match="plans.json: cannot be written: No space left"):
        planning._replace_json(file, {"new": 1})
    assert [f.name for f in tmp_path.iterdir()] == ["plans.json"] and file.read_text() == "{}"


# ---- preprocessing --------------------------------------------------------------------------------------------------

def _load(folder, configuration, case):
    data, seg, _, properties = nnUNetDatasetBlosc2(str(folder / f"nnUNetPlans_{configuration}"), [case]).load_case(case)
    return np.asarray(data[:]), np.asarray(seg[:]), properties


def _expected_points(label, configuration):
    """{place: class}; two slices are cropped, and each axis that is resampled has half as many voxels.

    Points where the image is empty are none: training ignores what nnU-Net calls -1.
    """
    corner = np.zeros(SHAPE, dtype=bool)
    corner[OUTSIDE] = True
    z_scale = 2 if configuration == "3d_fullres" else 1
    return {((z - 2) // z_scale, y // 2, x // 2): int(label[z, y, x])
            for z, y, x in np.argwhere((label != IGNORE) & ~corner).tolist()}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_every_point_survives_preprocessing_and_is_found_by_patch_sampling(mixed, configuration):
    for case in ("c03", "c04"):
        data, seg, properties = _load(mixed.preprocessed, configuration, case)
        expected = _expected_points(mixed.cases[case][1], configuration)
        assert len(expected) == 59 and set(expected.values()) == {0, 1, 2}
        annotated = np.argwhere((seg != IGNORE) & (seg != -1)).tolist()
        assert {tuple(p[1:]): int(seg[tuple(p)]) for p in annotated} == expected
        locations = properties["class_locations"]
        for key, classes in ((1, [1]), (2, [2]), ((-1, 0, 1, 2), [0, 1, 2])):
            assert {tuple(p[1:]) for p in np.asarray(locations[key]).tolist()} == {
                place for place, value in expected.items() if value in classes}


def test_completion_shows_the_teacher_what_training_would_show_it(mixed):
    """With another spacing, points, and empty surroundings in which points of background lie."""
    from nnunet_confkd.inference.completion import _with_hints
    plans = PlansManager(str(mixed.preprocessed / "nnUNetPlans.json"))
    described, configuration = read_json(mixed.raw / "dataset.json"), plans.get_configuration("3d_fullres")
    folder = mixed.preprocessed / configuration.data_identifier
    for case in (case for case, kind in mixed.kinds.items() if kind == "partial"):
        image, label = mixed.raw / "imagesTr" / f"{case}_0000.nii.gz", mixed.raw / "labelsTr" / f"{case}.nii.gz"
        predictor = SimpleNamespace(plans_manager=plans, configuration_manager=configuration, dataset_json=described)
        item, = _with_hints(predictor, [[str(image)]], [str(label)], ["out"], {})
        hints = item["data"][None, 1:]
        shown = hint_channels(hints - 1, hints > 0, 3)[0]  # as the network gets them, patch by patch
        seg = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)[1][:]
        assert shown.shape[1:] == seg.shape[1:]
        # the whole case, and some of its surroundings, as a patch of a training batch
        margin = 2
        patch = [n + 2 * margin for n in seg.shape[1:]]
        transforms = ComposeTransforms([RemoveLabelTransform(-1, 0)])
        label_padding(transforms, IGNORE)
        kinds = {case: "partial", "c00": "full"}
        loader = StratifiedLoader(
            nnUNetDatasetBlosc2(str(folder), list(kinds)),
            2,
            patch,
            patch,
            LabelManager(described["labels"], None),
            kinds=kinds,
            full_share=0.5,
            transforms=transforms,
            complete=[HintSampler(IGNORE)],
        )
        batch = next(loader)
        assert list(batch["keys"]) == ["c00", case]
        trained = hint_channels(batch["target"], batch["hint_mask"], 3)[1]
        inner = (slice(None), *[slice(margin, -margin)] * 3)
        assert torch.equal(trained[inner], shown) and trained.sum() == shown.sum()
        annotated = int(shown[-1].sum())
        assert annotated == int(((seg != IGNORE) & (seg != -1)).sum()) > 30
        # nnU-Net's own resampling keeps few of these points
        stock = DefaultPreprocessor(verbose=False).run_case([str(image)], str(label), plans, configuration, described)[
            1
        ]
        assert ((stock != IGNORE) & (stock != -1)).sum() < annotated / 2
        assert (read_voxels(label) != IGNORE)[OUTSIDE].any(), "a point of background lies where the image is empty"


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_images_and_full_labels_are_preprocessed_as_by_nnunet(mixed, configuration):
    plans = PlansManager(str(mixed.preprocessed / "nnUNetPlans.json"))
    manager = plans.get_configuration(configuration)
    assert manager.preprocessor_name == "DefaultPreprocessor"
    for case in ("c00", "c03"):
        files = [str(mixed.raw / "imagesTr" / f"{case}_0000.nii.gz")], str(mixed.raw / "labelsTr" / f"{case}.nii.gz")
        described = read_json(mixed.raw / "dataset.json")
        stock = DefaultPreprocessor(verbose=False).run_case(*files, plans, manager, described)
        data, seg, properties = _load(mixed.preprocessed, configuration, case)
        assert np.array_equal(data, stock[0])
        assert np.array_equal(seg, stock[1]) == (mixed.kinds[case] == "full")
        assert properties["spacing"] == stock[2]["spacing"]


def test_the_original_labels_are_copied_for_the_validation(mixed):
    for case in mixed.cases:
        assert (mixed.preprocessed / "gt_segmentations" / f"{case}.nii.gz").read_bytes() == \
               (mixed.raw / "labelsTr" / f"{case}.nii.gz").read_bytes()


def test_labels_may_lie_anywhere_if_dataset_json_lists_them(planned, mixed, tmp_path, monkeypatch):
    raw, elsewhere = tmp_path / "raw" / MIXED, tmp_path / "elsewhere"
    shutil.copytree(mixed.raw, raw)
    (raw / "labelsTr").rename(elsewhere)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    described = read_json(raw / "dataset.json")
    listed = {case: {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": str(elsewhere / f"{case}.nii.gz")}
              for case in mixed.cases}
    (raw / "dataset.json").write_text(json.dumps(described | {"dataset": listed}))
    shutil.rmtree(planned / "gt_segmentations")
    preprocess_keeping_annotations(MIXED, "nnUNetPlans", [], [], verbose=False, show_progress_bar=False)
    copied = {file.name for file in (planned / "gt_segmentations").iterdir()}
    assert copied == {f"{case}.nii.gz" for case in mixed.cases}


class OtherPreprocessor(DefaultPreprocessor):
    pass


def test_another_preprocessor_is_used_as_it_is_and_missing_configurations_are_skipped(planned, mixed, monkeypatch):
    monkeypatch.setattr(default_preprocessor, "OtherPreprocessor", OtherPreprocessor, raising=False)
    printed = run(
        "-d",
        611,
        "-c",
        "3d_lowres",
        "2d",
        "-preprocessor_name",
        "OtherPreprocessor",
        "-overwrite_target_spacing",
        2,
        2,
        2,
    )
    assert "Configuration 3d_lowres not found" in printed
    assert "2d: its preprocessor, OtherPreprocessor, is used as it is and may lose" in printed
    # as stock nnU-Net does: at half the resolution no single point is left
    assert (_load(planned, "2d", "c03")[1] == IGNORE).all()
    assert "WARNING: 3 case(s) had annotations and have none left: c03, c04, c05" in printed
    assert read_json(planned / "nnUNetPlans.json")["configurations"]["2d"]["preprocessor_name"] == "OtherPreprocessor"


def test_without_an_ignore_label_all_files_equal_nnunets(nnunet, tmp_path, monkeypatch):
    name = "Dataset612_Full"
    make_dataset(nnunet.raw(name), ["full"] * 2 + ["empty"], labels={"background": 0, "a": 1, "b": 2})
    with threads():
        monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "stock"))
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        extract_fingerprints([612], num_processes=1, show_progress_bar=False)
        plan_experiments([612], overwrite_target_spacing=[2, 2, 2])
        preprocess([612], configurations=["2d", "3d_fullres"], num_processes=[1], show_progress_bar=False)
        monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "ours"))
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        printed = run("-d", 612, "-c", "2d", "3d_fullres", "-overwrite_target_spacing", 2, 2, 2,
                      "--verify_dataset_integrity")
    assert "verify_dataset_integrity Done" in printed
    ours, stock = ({f.relative_to(tmp_path / which).as_posix(): f for f in (tmp_path / which).rglob("*") if f.is_file()}
                   for which in ("ours", "stock"))
    assert ours.keys() == stock.keys() and len(ours) == 2 * 9 + 3 + 3
    for file in ours:
        if file.endswith(".pkl"):
            assert repr(pickle.loads(ours[file].read_bytes())) == repr(pickle.loads(stock[file].read_bytes())), file
        else:
            assert ours[file].read_bytes() == stock[file].read_bytes(), file


# ---- report and split -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_report_counts_annotated_voxels_before_and_after(mixed, configuration):
    table = mixed.printed.split(f"{MIXED}, {configuration}: ")[1].split("\n\n")[0]
    assert "4 not fully annotated:" in table and "3 fully annotated:" in table
    partial = [mixed.cases[case][1] for case in ("c03", "c04")]
    after = [value for label in partial for value in _expected_points(label, configuration).values()]
    full = [_load(mixed.preprocessed, configuration, case)[1] for case in ("c00", "c01", "c02")]
    for value, name in enumerate(("background", "a", "b")):
        values = [value, -1] if value == 0 else [value]  # in full labels, outside of the non-zero region is background
        before = sum(np.count_nonzero(label == value) for label in partial)
        if value == 0:
            before += 16 * 20  # the plane of the cropped case
        expected = (before, sum(v in values for v in after), 3 * np.count_nonzero(_full_label() == value),
                    sum(np.isin(seg, values).sum() for seg in full))
        row = re.search(rf"^  {value} {name} +(\d+) +(\d+) +(\d+) +(\d+)$", table, re.M)
        assert tuple(map(int, row.groups())) == expected
    assert "WARNING: 1 case(s) had annotations and have none left: c05" in table
    assert "no ignored voxel any more" not in table


def _raw_labels(counts, table=None, labels=None):
    manager = LabelManager(labels or {"background": 0, "a": 1, "b": 2, "ignore": 3}, [1, 2] if labels else None)
    kinds = decide_kinds(counts, manager, table)
    return planning.RawLabels({}, counts, kinds, {case: case[0] for case in counts}, None, manager)


def test_the_report_names_cases_that_become_full_and_the_regions_of_a_label():
    raw = {"p": {0: 5, 1: 2, 2: 0, 3: 4}, "f": {0: 7, 1: 1, 2: 3, 3: 0}, "u": {0: 0, 1: 0, 2: 0, 3: 9}}
    after = {"p": {-1: 1, 0: 3, 1: 1, 2: 0, 3: 0}, "f": {-1: 2, 0: 5, 1: 1, 2: 3, 3: 0},
             "u": {-1: 0, 0: 0, 1: 0, 2: 0, 3: 9}}
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    text = planning.report("D", "2d", _raw_labels(raw, labels=labels), after).splitlines()
    assert [" ".join(line.split()) for line in text[3:6]] == ["0 background 5 4 7 7", "1 whole 2 1 1 1",
                                                              "2 whole, core 0 0 3 3"]
    assert text[6:] == ["  1 case(s) hold no ignored voxel any more and count as fully annotated, unless "
                        "dataset.json's \"supervision\" says otherwise: p"]


def test_cases_that_lack_classes_have_columns_of_their_own():
    raw = {"l": {0: 5, 1: 2, 2: 0}, "f": {0: 7, 1: 1, 2: 3}}
    labels = _raw_labels(raw, labels={"background": 0, "a": 1, "b": 2})
    labels.lists = {"l": ["a"]}
    text = planning.report("D", "2d", labels, raw).splitlines()
    assert text[1].split() == ["1", "lack", "classes:", "1", "fully", "annotated:"]
    numbers = [" ".join(line.split()[-4:]) for line in text[3:6]]
    assert numbers == ["5 5 7 7", "2 2 1 1", "0 0 3 3"]
    assert text[6:] == ["  The background of cases that lack classes may be any class that they do not list."]


def test_the_trainer_finds_its_counts_and_would_write_the_same_split(nnunet, planned, monkeypatch):
    def load_case(*_):
        raise AssertionError("the label is read again")

    trainer = nnunet.trainer(MIXED, "3d_fullres")
    with monkeypatch.context() as patch:
        patch.setattr(nnUNetDatasetBlosc2, "load_case", load_case)
        kinds = trainer.find_supervision()
    # what is annotated in c05 alone is cropped
    assert list(kinds.values()) == ["full"] * 2 + ["partial"] * 3 + ["unlabelled"] * 2
    ours = read_json(planned / "splits_final.json")
    (planned / "splits_final.json").unlink()
    trainer.do_split()
    assert read_json(planned / "splits_final.json") == ours


def test_the_split_validates_on_full_cases_and_each_fold_trains_on_all_others(mixed):
    splits = read_json(mixed.preprocessed / "splits_final.json")
    assert sorted(split["val"] for split in splits) == [["c00"], ["c01"]]  # c02 is declared partial
    for split in splits:
        assert sorted(split["train"] + split["val"]) == sorted(mixed.cases)
    assert "splits_final.json: written, 2 folds" in mixed.printed


def test_a_split_that_is_there_stays_and_a_missing_one_is_written_without_preprocessing(planned):
    file = planned / "splits_final.json"
    written = file.read_text()
    file.write_text("[]")
    assert "splits_final.json: is there already" in run("-d", 611, "--no_pp")
    assert file.read_text() == "[]"
    file.unlink()
    run("-d", 611, "--no_pp")
    assert file.read_text() == written


COUNTS = {"f1": {0: 5, 1: 2, 2: 1, 3: 0}, "f2": {0: 5, 1: 2, 2: 1, 3: 0}, "g1": {0: 5, 1: 2, 2: 1, 3: 0},
          "p1": {0: 5, 1: 2, 2: 1, 3: 1}}


def test_no_patient_is_on_both_sides_of_the_split(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (tmp_path / MIXED).mkdir()
    planning.write_split(MIXED, _raw_labels(COUNTS))
    splits = read_json(tmp_path / MIXED / "splits_final.json")
    assert sorted(split["val"] for split in splits) == [["f1", "f2"], ["g1"]]
    assert sorted(split["train"] for split in splits) == [["f1", "f2", "p1"], ["g1", "p1"]]


def test_a_split_that_validates_on_partial_cases_stays_and_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (tmp_path / MIXED).mkdir()
    file = tmp_path / MIXED / "splits_final.json"
    for validated, told in (("g1", False), ("p1", True)):
        file.write_text(json.dumps([{"train": sorted(set(COUNTS) - {validated}), "val": [validated]}]))
        planning.write_split(MIXED, _raw_labels(COUNTS))
        assert ("WARNING: it validates on 1 cases that are not fully annotated" in capsys.readouterr().out) == told
        assert read_json(file)[0]["val"] == [validated]


@pytest.mark.parametrize("table, kinds", [({"g1": "partial"}, "2 full, 2 partial, 0 unlabelled"),
                                          ({"f1": "unlabelled"}, "2 full, 1 partial, 1 unlabelled"),
                                          (dict.fromkeys(COUNTS, "partial"), "0 full, 4 partial, 0 unlabelled")])
def test_with_fewer_than_two_full_patients_no_split_is_written(tmp_path, monkeypatch, capsys, table, kinds):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (tmp_path / MIXED).mkdir()
    planning.write_split(MIXED, _raw_labels(COUNTS, table))
    printed = capsys.readouterr().out
    assert f"splits_final.json: was not written ({kinds}): fewer than two patients are fully annotated" in printed
    assert list((tmp_path / MIXED).iterdir()) == []


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.fixture
def empty_workspace(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw"


def _refuses(match, *words):
    with pytest.raises(InputError, match=match) as error:
        run("-d", 1, *words)
    assert list((planning.preprocessed_folder()).glob("*/*")) == []
    return str(error.value)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_missing_environment_variables_are_told(empty_workspace, monkeypatch, variable):
    make_dataset(empty_workspace / "Dataset001_A", ["full"])
    monkeypatch.delenv(variable)
    with pytest.raises(InputError, match=f"{variable} is not set"):
        run("-d", 1)


def test_data_sets_that_cannot_be_are_told(empty_workspace):
    _refuses("has no data set 1")
    (empty_workspace / "Dataset001_A").mkdir()
    _refuses("dataset.json: cannot be read as JSON")
    (empty_workspace / "Dataset001_A" / "dataset.json").write_text('{"labels": {}}')
    _refuses("dataset.json: lacks file_ending, numTraining")
    (empty_workspace.parent / "results" / "Dataset001_B").mkdir()
    _refuses("More than one dataset name found for dataset id 1")
    (empty_workspace / "Other").mkdir()
    with pytest.raises(InputError, match="Other: nnU-Net's data sets are called Dataset027_NAME"):
        run("-d", "Other")


@pytest.mark.parametrize("words, match", [
    (["-np", 1, 2], "-np: 2 numbers for 3 configurations"),
    (["-overwrite_target_spacing", 1, 1], "-overwrite_target_spacing: three numbers are needed, not 2"),
    (["-pl", "Wizard"], "-pl Wizard: nnU-Net has no such class"),
    (["-fpe", "Wizard"], "-fpe Wizard: nnU-Net has no such class"),
    (["-preprocessor_name", "Wizard"], "-preprocessor_name Wizard: nnU-Net has no such class")])
def test_options_that_cannot_be_are_told(empty_workspace, words, match):
    make_dataset(empty_workspace / "Dataset001_A", ["full"])
    with pytest.raises(InputError, match=match):
        main(["-d", "1", *map(str, words)])


def test_all_labels_that_are_wrong_are_told_at_once(empty_workspace):
    raw = empty_workspace / "Dataset001_A"
    make_dataset(raw, ["full", "partial", "partial", "full"])
    (raw / "labelsTr" / "c00.nii.gz").unlink()
    write_image(raw / "labelsTr" / "c01.nii.gz", np.full(SHAPE, 7, dtype=np.uint8))
    (raw / "labelsTr" / "c02.nii.gz").write_text("no image")
    text = _refuses("3 labels are wrong")
    assert "c00.nii.gz: the label cannot be read" in text and "c02.nii.gz: the label cannot be read" in text
    assert "c01.nii.gz: holds the values 7; dataset.json lists 0, 1, 2, 3" in text
    assert "c03" not in text


def test_a_data_set_without_annotated_foreground_is_refused(empty_workspace):
    make_dataset(empty_workspace / "Dataset001_A", ["cropped", "unlabelled", "empty"])
    _refuses("none of the 3 labels has an annotated voxel of any foreground class")


def test_a_table_that_the_labels_contradict_is_refused_before_all_work(empty_workspace):
    make_dataset(empty_workspace / "Dataset001_A", ["full", "partial"], supervision={"c01": "full", "c02": "full"})
    text = _refuses("Dataset001_A: dataset.json, \"supervision\"")
    assert "c01: declared full" in text and "c02: there is no such case" in text


def test_a_pattern_of_patients_that_does_not_match_is_refused_before_all_work(empty_workspace):
    make_dataset(empty_workspace / "Dataset001_A", ["full", "partial"], patient_pattern="(d)")
    assert "c00, c01" in _refuses("Dataset001_A: the patient pattern '\\(d\\)' does not match")


def test_an_ignore_label_in_the_wrong_place_and_missing_images_are_refused(empty_workspace):
    raw = empty_workspace / "Dataset001_A"
    make_dataset(raw, ["full", "partial"], labels={"background": 0, "a": 1, "b": 2, "ignore": 5})
    _refuses("Dataset001_A: dataset.json: the ignore label is 5")
    make_dataset(raw, ["full", "partial"])
    for file in (raw / "imagesTr").iterdir():
        file.unlink()
    _refuses("imagesTr: holds no training image")
    (raw / "imagesTr").rmdir()
    _refuses("the training cases cannot be read")


# ---- command line ---------------------------------------------------------------------------------------------------

def _options(function, monkeypatch):
    """{flag: (default, number of values)} of the parser that a function makes."""
    class Stop(Exception):
        pass

    def capture(parser, *_):
        raise Stop(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", capture)
    with pytest.raises(Stop) as stop:
        function()
    return {action.option_strings[0]: (action.default, action.nargs) for action in stop.value.args[0]._actions}


def test_the_options_are_nnunets_with_its_defaults(monkeypatch):
    stock = _options(plan_and_preprocess_entrypoints.plan_and_preprocess_entry, monkeypatch)
    assert _options(lambda: main([]), monkeypatch) == stock
    assert len(stock) == 16


def test_the_default_numbers_of_processes_are_nnunets(planned, monkeypatch):
    calls = []
    monkeypatch.setattr(planning, "preprocess_keeping_annotations", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(planning, "preprocessed_counts", lambda *arguments: {})
    names = ["2d", "3d_fullres", "3d_cascade_fullres", "3d_lowres"]
    main(["-d", "611", "-c", *names, "--no_pbar"])
    assert calls == [(MIXED, "nnUNetPlans", names, [8, 4, 4, 8], False, False)]


def test_a_configuration_that_nobody_knows_is_an_error_before_preprocessing(planned, monkeypatch):
    monkeypatch.setattr(planning, "preprocess_keeping_annotations", lambda *arguments: pytest.fail("too late"))
    with pytest.raises(InputError, match="-c 3d: there is no configuration 3d; the plans have 2d, 3d_fullres"):
        main(["-d", "611", "-c", "2d", "3d", "--no_pbar"])
    with pytest.raises(InputError, match=r"no configuration 3d_fulres \(did you mean '3d_fullres'\?\)"):
        main(["-d", "611", "-c", "3d_fulres", "--no_pbar"])


@pytest.mark.parametrize("configurations, name, labels, split, expected", [
    (["2d", "3d_fullres"], "nnUNetPlans", {"a": 1, "ignore": 2}, True, "next: confkd train 7 3d_fullres 0   (with"),
    (["2d"], "Mine", {"a": 1, "ignore": 2}, False, "next: confkd train 7 2d all -p Mine   (with --quick"),
    (["3d_lowres"], "nnUNetPlans", {"a": 1}, False, "none of 3d_lowres is planned"),
    (["2d"], "nnUNetPlans", {"a": 1}, False, "next: confkd train 7 2d 0   ("),
    (["2d"], "nnUNetPlans", {"a": 1, "b": 2}, True, "next: confkd train 7 2d 0 -tr ConfKDTrainer_partialOnly   ("),
    (["2d"], "nnUNetPlans", {"a": 1, "b": 2}, False, "next: confkd train 7 2d all -tr ConfKDTrainer_partialOnly   (")])
def test_the_next_command_is_told(empty_workspace, configurations, name, labels, split, expected):
    folder = Path(os.environ["nnUNet_preprocessed"]) / "Dataset007_A"
    folder.mkdir(parents=True)
    lists = {"annotated_classes": {"c0": ["a"]}} if "b" in labels else {}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **lists}))
    (folder / f"{name}.json").write_text(json.dumps({"plans_name": name, "dataset_name": folder.name,
                                                     "configurations": {"2d": {}, "3d_fullres": {}}}))
    if split:
        (folder / "splits_final.json").touch()
    assert expected in next_step(folder.name, name, configurations, False)
    assert next_step(folder.name, name, configurations, True) == "next: confkd plan -d 7, without --no_pp"
