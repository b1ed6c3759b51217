from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd.weaken import case_rng, nothing, points, weaken_dataset

IGNORE = 9


@pytest.fixture
def label():
    """Three classes beside the background, (Z, Y, X), of which one is absent from the last slice."""
    label = np.zeros((3, 20, 24), dtype=np.uint8)
    label[:, 2:9, 3:12] = 1
    label[:, 9:15, 3:12] = 2
    label[:2, 4, 5] = 3
    return label


@pytest.fixture
def source(tmp_path):
    """Four labelled cases with two channels and an oblique geometry; one label file is float typed."""
    folder = tmp_path / "source"
    rng = np.random.default_rng(0)
    for k, case in enumerate("abcd"):
        label = rng.integers(0, 3, (3, 8, 7)).astype(np.float32 if case == "d" else np.uint8)
        for channel in range(2):
            _write(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz", rng.normal(size=label.shape), k)
        _write(folder / "labelsTr" / f"{case}.nii.gz", label, k)
    _write(folder / "imagesTs" / "t_0000.nii.gz", rng.normal(size=(3, 8, 7)), 0)
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "one": 1, "two": 2},
        "numTraining": 4, "file_ending": ".nii.gz", "licence": "none"}))
    return folder


def _write(file, array, k):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.7 + k, 0.9, 5.1))
    image.SetOrigin((-3.5, 11.25, k))
    image.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    sitk.WriteImage(image, str(file))


def _read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _files(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _edit_dataset_json(folder, **entries):
    file = folder / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def _assert_points(weak, label, ignore_label, radius):
    """weak and label, slice by slice: right where annotated, and one disc for each class that is there."""
    assert weak.shape == label.shape
    for weak_slice, full_slice in zip(weak, label):
        assert set(np.unique(weak_slice)) - {ignore_label} == set(np.unique(full_slice))
        for value in np.unique(full_slice):
            annotated = np.argwhere(weak_slice == value)
            assert (full_slice[tuple(annotated.T)] == value).all()
            # some annotated voxel is the centre: all of the class within the radius of it, and nothing else
            of_class = np.argwhere(full_slice == value)
            discs = ({tuple(v) for v in of_class if ((v - centre) ** 2).sum() <= radius ** 2}
                     for centre in annotated)
            assert {tuple(v) for v in annotated} in discs


# the generator

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


# points

@pytest.mark.parametrize("radius", [0, 1, 3])
def test_points_are_one_disc_inside_each_class_of_each_slice(label, radius):
    _assert_points(points(label, IGNORE, case_rng("a", "points", 0), radius=radius), label, IGNORE, radius)


def test_points_fall_on_other_voxels_with_another_generator(label):
    first, again, other = (points(label, IGNORE, case_rng("a", "points", seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_points_may_fall_on_any_voxel_of_a_class():
    label = np.zeros((4, 3), dtype=np.uint8)
    rng = case_rng("a", "points", 0)
    hit = sum((points(label, IGNORE, rng, radius=0) == 0).astype(int) for _ in range(200))
    # 200 draws over 12 voxels: a given voxel is missed with a probability of 3e-8
    assert hit.min() > 0 and hit.sum() == 200


def test_points_skip_the_slices_between_every_nth(label):
    label = np.concatenate([label, label])
    weak = points(label, IGNORE, case_rng("a", "points", 0), every=2)
    _assert_points(weak[::2], label[::2], IGNORE, 1)
    assert (weak[1::2] == IGNORE).all()


@pytest.mark.parametrize("axis", [1, 2])
def test_points_along_another_axis_lie_in_the_slices_of_that_axis(label, axis):
    weak = points(label, IGNORE, case_rng("a", "points", 0), radius=2, slice_axis=axis)
    _assert_points(np.moveaxis(weak, axis, 0), np.moveaxis(label, axis, 0), IGNORE, 2)


def test_a_2d_label_is_one_slice(label):
    weak_2d = points(label[0], IGNORE, case_rng("a", "points", 0))
    weak_3d = points(label[:1], IGNORE, case_rng("a", "points", 0))
    assert np.array_equal(weak_2d, weak_3d[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_weak_labels_keep_the_type_and_leave_the_full_label_alone(label, dtype):
    full = label.astype(dtype)
    assert points(full, IGNORE, case_rng("a", "points", 0)).dtype == dtype
    assert nothing(full, IGNORE).dtype == dtype
    assert np.array_equal(full, label)


def test_nothing_is_annotated_by_nothing(label):
    assert np.array_equal(nothing(label, IGNORE), np.full((3, 20, 24), IGNORE))


def test_points_refuse_a_label_that_is_not_full(label):
    with pytest.raises(ValueError, match="already holds the ignore label 3"):
        points(label, 3, case_rng("a", "points", 0))


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 2)])
def test_points_refuse_other_dimensions(shape):
    with pytest.raises(ValueError, match=str(shape[0])):
        points(np.zeros(shape, dtype=np.uint8), IGNORE, case_rng("a", "points", 0))


@pytest.mark.parametrize("setting", [{"radius": -1}, {"every": 0}])
def test_points_refuse_settings_out_of_range(label, setting):
    with pytest.raises(ValueError, match="radius must be at least 0 and every at least 1"):
        points(label, IGNORE, case_rng("a", "points", 0), **setting)


# whole datasets

def test_a_weakened_dataset_has_each_kind_of_label(source, tmp_path):
    target = tmp_path / "new" / "target"
    supervision = weaken_dataset(source, target, full=["a"], unlabelled=["b"], keep=["c"], seed=3, radius=2)

    assert supervision == {"a": "full", "b": "unlabelled", "c": "full", "d": "partial"}
    before, after = _files(source), _files(target)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {
        "dataset.json", "labelsTr/b.nii.gz", "labelsTr/d.nii.gz"}
    assert (_read(target / "labelsTr" / "b.nii.gz") == 3).all()
    weak, full = (_read(folder / "labelsTr" / "d.nii.gz") for folder in (target, source))
    assert np.array_equal(weak, points(full.astype(np.uint8), 3, case_rng("d", "points", 3), radius=2))
    assert json.loads(after["dataset.json"]) == json.loads(before["dataset.json"]) | {
        "labels": {"background": 0, "one": 1, "two": 2, "ignore": 3}, "supervision": supervision}


def test_weak_labels_keep_the_geometry(source, tmp_path):
    weaken_dataset(source, tmp_path / "target", full=["a"], unlabelled=["b"])
    for case in "bcd":
        full, weak = (sitk.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz"))
                      for folder in (source, tmp_path / "target"))
        assert weak.GetSize() == full.GetSize()
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(weak, geometry)() == pytest.approx(getattr(full, geometry)(), abs=1e-6)


def test_the_source_is_untouched(source, tmp_path):
    before = _files(source)
    weaken_dataset(source, tmp_path / "target", full=["a"], unlabelled=["b"])
    assert _files(source) == before
    # a label is what people edit: it must not be the same file on disk
    (tmp_path / "target" / "labelsTr" / "a.nii.gz").write_bytes(b"edited")
    assert _files(source) == before


def test_a_case_gets_the_same_points_whatever_the_other_cases_are(source, tmp_path):
    weaken_dataset(source, tmp_path / "few", full=["a", "b", "c"])
    weaken_dataset(source, tmp_path / "many", full=[])
    weaken_dataset(source, tmp_path / "other", full=[], seed=1)
    few, many, other = (_read(tmp_path / name / "labelsTr" / "d.nii.gz") for name in ("few", "many", "other"))
    assert np.array_equal(few, many)
    assert not np.array_equal(few, other)


def test_images_are_copied_where_they_cannot_be_linked(source, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", no_links)
    weaken_dataset(source, tmp_path / "target", full=["a"])
    for file in (source / "imagesTr").iterdir():
        assert (tmp_path / "target" / "imagesTr" / file.name).read_bytes() == file.read_bytes()


def test_an_ignore_label_that_no_voxel_uses_is_kept(source, tmp_path):
    _edit_dataset_json(source, labels={"background": 0, "one": 1, "two": 2, "ignore": 3})
    weaken_dataset(source, tmp_path / "target", full=["a"])
    assert json.loads((tmp_path / "target" / "dataset.json").read_text())["labels"]["ignore"] == 3


def test_an_existing_target_is_refused_and_stays(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="target exists already"):
        weaken_dataset(source, target, full=["a"])
    assert _files(target) == {"mine.txt": b"mine"}


def test_nothing_half_written_remains_after_an_error(source, tmp_path):
    (source / "imagesTr" / "d_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="d_0001.nii.gz"):
        weaken_dataset(source, tmp_path / "target", full=["a"])
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_unknown_cases_are_listed(source, tmp_path):
    with pytest.raises(ValueError, match="no such cases in labelsTr: x, y, z"):
        weaken_dataset(source, tmp_path / "target", full=["a", "y"], unlabelled=["x"], keep=["z"])


@pytest.mark.parametrize("labelled", ["full", "keep"])
def test_a_case_cannot_be_labelled_and_unlabelled(source, tmp_path, labelled):
    with pytest.raises(ValueError, match="both labelled and unlabelled: b"):
        weaken_dataset(source, tmp_path / "target", **{"full": [], labelled: ["a", "b"]}, unlabelled=["b"])


def test_regions_are_refused(source, tmp_path):
    _edit_dataset_json(source, labels={"background": 0, "whole": [1, 2], "two": 2})
    with pytest.raises(ValueError, match="not regions: whole"):
        weaken_dataset(source, tmp_path / "target", full=["a"])


def test_a_dataset_that_lists_its_files_is_refused(source, tmp_path):
    _edit_dataset_json(source, dataset={})
    with pytest.raises(ValueError, match='lists its files under "dataset"'):
        weaken_dataset(source, tmp_path / "target", full=["a"])


@pytest.mark.parametrize("value, message", [(0.5, "no integers"), (3, r"the values \[3\]"),
                                            (-1, r"the values \[-1\]")])
@pytest.mark.parametrize("full", ["a", "d"])
def test_a_label_with_other_values_is_refused_by_name(source, tmp_path, value, message, full):
    label = np.zeros((3, 8, 7), dtype=np.float32)
    label[1, 2, 3] = value
    _write(source / "labelsTr" / "d.nii.gz", label, 0)
    with pytest.raises(ValueError, match=rf"d\.nii\.gz holds .*{message}"):
        weaken_dataset(source, tmp_path / "target", full=[full])


def test_other_file_formats_are_weakened_and_not_a_number_is_refused(source, tmp_path):
    # the NIfTI reader turns NaN to 0, others do not
    for file in list(source.rglob("*.nii.gz")):
        sitk.WriteImage(sitk.ReadImage(str(file)), str(file).replace(".nii.gz", ".nrrd"))
        file.unlink()
    _edit_dataset_json(source, file_ending=".nrrd")
    weaken_dataset(source, tmp_path / "target", full=["a"])
    assert _files(source).keys() == _files(tmp_path / "target").keys()
    assert 3 in _read(tmp_path / "target" / "labelsTr" / "d.nrrd")

    _write(source / "labelsTr" / "d.nrrd", np.full((3, 8, 7), np.nan, dtype=np.float32), 0)
    with pytest.raises(ValueError, match=r"d\.nrrd holds values that are no integers"):
        weaken_dataset(source, tmp_path / "other", full=["a"])


def test_a_real_dataset_is_weakened_along_any_axis(test_data, tmp_path):
    source = tmp_path / "hippocampus"
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:3]
    for file in files:
        image = file.name.replace(".nii.gz", "_0000.nii.gz")
        for folder, name, original in (("labelsTr", file.name, file), ("imagesTr", image, _image_of(file))):
            (source / folder).mkdir(parents=True, exist_ok=True)
            (source / folder / name).write_bytes(original.read_bytes())
    (source / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": 3, "file_ending": ".nii.gz"}))
    case = files[1].name.removesuffix(".nii.gz")
    weaken_dataset(source, tmp_path / "target", full=[files[0].name.removesuffix(".nii.gz")], slice_axis=2)

    weak, full = (_read(folder / "labelsTr" / f"{case}.nii.gz") for folder in (tmp_path / "target", source))
    assert set(np.unique(full)) == {0, 1, 2}
    _assert_points(np.moveaxis(weak, 2, 0), np.moveaxis(full, 2, 0), 3, 1)


def _image_of(label_file):
    return label_file.parent.parent / "imagesTr" / label_file.name
