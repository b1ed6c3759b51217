"""The generated hearts: their files, and the anatomy that the demo and other tests rely on."""
from __future__ import annotations

import json
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import read_voxels
from nnunetv2.experiment_planning import verify_dataset_integrity
from scipy.ndimage import binary_dilation

from nnunet_confkd.demo.synthetic import generate_case, generate_dataset

COUNTS = {"num_full": 2, "num_partial": 2, "num_unlabelled": 1, "num_validation": 1, "num_test": 2}
RV, MYO, LV, IGNORE = 1, 2, 3, 4
CASES = [f"heart_{k:03d}" for k in range(40)]


@pytest.fixture(scope="module", params=[3, 2], ids=["3d", "2d"])
def dataset(request, tmp_path_factory):
    """A small generated data set: its folder, its cases and its number of dimensions."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset001_Heart"
    return folder, generate_dataset(folder, dimensions=request.param, seed=1, **COUNTS), request.param


@pytest.fixture(scope="module", params=[3, 2], ids=["3d", "2d"])
def hearts(request):
    """Many generated cases, each (image, label, spacing)."""
    return [generate_case(case, dimensions=request.param) for case in CASES]


def _grown(mask):
    """Add the neighbours in the plane to a mask (Z, Y, X), also the diagonal ones."""
    return binary_dilation(mask, np.ones((1, 3, 3), dtype=bool))


def _files(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_dataset_passes_nnunets_own_check(dataset, monkeypatch):
    # a process takes seconds to start
    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(verify_dataset_integrity, "multiprocessing", threads)
    verify_dataset_integrity.verify_dataset_integrity(str(dataset[0]), num_processes=1)


def test_the_dataset_says_what_each_training_case_is(dataset):
    folder, cases, _ = dataset
    assert {f"num_{role}": len(names) for role, names in cases.items()} == COUNTS
    assert json.loads((folder / "dataset.json").read_text()) == {
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "RV": 1, "MYO": 2, "LV": 3, "ignore": 4},
        "numTraining": 6, "file_ending": ".nii.gz", "supervision": {
            "heart_000": "full", "heart_001": "full", "heart_002": "partial", "heart_003": "partial",
            "heart_004": "unlabelled", "heart_005": "full"}}
    training = [name for role, names in cases.items() if role != "test" for name in names]
    for split, names in (("Tr", training), ("Ts", cases["test"])):
        images, labels = (
            {f.name for f in (folder / f"{kind}{split}").iterdir()} for kind in ("images", "labels"))
        assert images == {f"{name}_0000.nii.gz" for name in names}
        assert labels == {f"{name}.nii.gz" for name in names}


def test_the_labels_are_what_the_table_says(dataset):
    folder, cases, dimensions = dataset
    for role, names in cases.items():
        for name in names:
            label = read_voxels(folder / ("labelsTs" if role == "test" else "labelsTr") / f"{name}.nii.gz")
            full = generate_case(name, dimensions=dimensions, seed=1)[1]
            if role == "unlabelled":
                assert (label == IGNORE).all()
            elif role == "partial":
                annotated = label != IGNORE
                assert np.array_equal(label[annotated], full[annotated])
                assert set(np.unique(label)) == {0, RV, MYO, LV, IGNORE}
                assert annotated.mean() < 0.2
            else:
                assert np.array_equal(label, full)


def test_a_2d_case_is_one_slice_with_a_huge_slice_spacing(dataset):
    folder, cases, dimensions = dataset
    image = sitk.ReadImage(str(folder / "imagesTr" / f"{cases['full'][0]}_0000.nii.gz"))
    *in_plane, between = image.GetSpacing()
    assert in_plane == pytest.approx([1.4, 1.4], abs=0.11)
    if dimensions == 2:
        assert image.GetSize()[2] == 1 and between == 999
    else:
        assert 7 <= image.GetSize()[2] <= 9 and between == pytest.approx(6, abs=0.51)


def test_the_same_seed_gives_the_same_files_and_another_does_not(tmp_path):
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        generate_dataset(tmp_path / name, dimensions=2, seed=seed, **COUNTS)
    first, again, other = (_files(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[file] != other[file] for file in first if "images" in file)


def test_a_case_has_the_same_image_whatever_the_counts(tmp_path):
    generate_dataset(tmp_path / "few", dimensions=2, **COUNTS)
    generate_dataset(tmp_path / "many", dimensions=2, **COUNTS | {"num_full": 6, "num_test": 0})
    few, many = (_files(tmp_path / name / "imagesTr") for name in ("few", "many"))
    assert few.keys() < many.keys()
    assert all(few[file] == many[file] for file in few)


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        generate_dataset(tmp_path, **COUNTS)
    assert list(tmp_path.iterdir()) == []


def test_other_dimensions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dimensions must be 2 or 3, got 4"):
        generate_dataset(tmp_path / "new", dimensions=4)
    assert list(tmp_path.iterdir()) == []


def test_the_left_ventricle_touches_nothing_but_myocardium(hearts):
    for _, label, _ in hearts:
        assert set(np.unique(label[_grown(label == LV)])) == {MYO, LV}


def test_the_right_ventricle_touches_the_myocardium_and_not_the_left_ventricle(hearts):
    for _, label, _ in hearts:
        for one in label[:len(label) // 2 + 1, None]:
            assert (_grown(one == RV) & (one == MYO)).sum() >= 5
            assert not (_grown(one == RV) & (one == LV)).any()


def test_every_class_is_in_every_basal_slice_and_shrinks_towards_the_apex():
    for case in CASES:
        label = generate_case(case)[1]
        area = np.array([np.bincount(s.ravel(), minlength=4) for s in label])
        assert (area[:len(area) // 2] >= 20).all()
        assert (area[-1, 1:] < area[0, 1:]).all()


def test_images_have_no_zero_and_differ_in_brightness(hearts):
    assert min(image.min() for image, _, _ in hearts) > 0
    means = [image.mean() for image, _, _ in hearts]
    assert max(means) > 2 * min(means)


def test_no_threshold_tells_blood_or_myocardium(hearts):
    """More background than class lies between the class's 10th and 90th percentile of intensity."""
    for image, label, _ in hearts:
        for of_class in (label == LV, label == MYO):
            low, high = np.percentile(image[of_class], [10, 90])
            alike = (image >= low) & (image <= high)
            assert (alike & (label == 0)).sum() > (alike & of_class).sum()
