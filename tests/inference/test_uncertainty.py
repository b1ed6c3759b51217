from __future__ import annotations

import csv
import json
import math
import os
import shutil

import nibabel
import numpy as np
import pytest
import scipy.stats
import SimpleITK as sitk
import torch

from nnunet_confkd import cli
from nnunet_confkd.inference.prediction import export_and_measure, max_entropy, measure, with_names
from nnunet_confkd.inference.uncertainty import IN_DOUBT, EntropyPredictor, case_score, list_cases, map_ending, write_map, write_review_list

HIPPOCAMPUS = "Dataset004_Hippocampus"
BRANCHES = ("student", "teacher", "mean")


def _read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _rows(folder):
    return json.loads((folder / "uncertainty" / "review_first.json").read_text())["cases"]


def predict(images, output, *more, configuration="2d_export", dataset="4", folds=("0",), processes="0", status=0):
    """The command, in this process, unless told otherwise."""
    assert cli.main(["predict", "-i", str(images), "-o", str(output), "-d", dataset, "-c", configuration, "-f", *folds, "-device",
                     "cpu", "-npp", processes, "-nps", processes, "--disable_progress_bar", *more]) == status


@pytest.fixture(scope="module")
def images(nnunet, hippocampus, tmp_path_factory):
    """Two held-back images; around the first a margin of zeros, which nnU-Net crops away."""
    folder = tmp_path_factory.mktemp("images")
    for i, case in enumerate(hippocampus["test"][:2]):
        source = nnunet.raw(HIPPOCAMPUS) / "imagesTs" / f"{case}_0000.nii.gz"
        if i:
            shutil.copyfile(source, folder / f"{case}_0000.nii.gz")
        else:
            padded = sitk.ConstantPad(sitk.ReadImage(str(source)) + 1, (2, 3, 4), (5, 6, 7), 0)
            sitk.WriteImage(padded, str(folder / f"{case}_0000.nii.gz"))
    return folder


@pytest.fixture(scope="module")
def predictions(hippocampus_model, images, tmp_path_factory):
    """Of each branch, without ("plain") and with entropy, and with both entropy and probabilities."""
    folder = tmp_path_factory.mktemp("predictions")
    for branch in BRANCHES:
        predict(images, folder / f"{branch}_plain", "--branch", branch)
        predict(images, folder / branch, "--branch", branch, "--save-entropy")
    predict(images, folder / "student_both", "--save-entropy", "--save_probabilities")
    predict(images, folder / "student_npz", "--save_probabilities")
    predict(images, folder / "teacher_npz", "--save_probabilities", "--branch", "teacher")
    predict(images, folder / "mean_npz", "--save_probabilities", "--branch", "mean")
    return folder


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("with_entropy, without", [*((b, f"{b}_plain") for b in BRANCHES), ("student_both", "student_npz")])
def test_the_segmentation_is_the_same_to_the_bit(predictions, with_entropy, without):
    files = sorted(f.name for f in (predictions / without).iterdir())
    assert sum(name.endswith(".nii.gz") for name in files) == 2
    assert sorted(f.name for f in (predictions / with_entropy).iterdir()) == sorted([*files, "uncertainty"])
    for name in files:
        a, b = predictions / with_entropy / name, predictions / without / name
        if name.endswith(".npz"):
            np.testing.assert_array_equal(*(np.load(f)["probabilities"] for f in (a, b)))
        elif name.endswith(".nii.gz"):
            assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_entropy_is_that_of_the_branchs_probabilities_in_the_geometry_of_the_segmentation(predictions, branch):
    for npz in (predictions / f"{branch}_npz").glob("*.npz"):
        folder, name = predictions / branch, npz.name.replace(".npz", ".nii.gz")
        expected = scipy.stats.entropy(np.load(npz)["probabilities"].astype(np.float64))  # natural logarithm
        segmentation = sitk.ReadImage(str(folder / name))
        for kind, scale in (("entropy_nats", 1), ("entropy_normalised", math.log(3))):
            image = sitk.ReadImage(str(folder / "uncertainty" / kind / name))
            assert image.GetPixelID() == sitk.sitkFloat32
            for of in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(image, of)() == getattr(segmentation, of)()
            np.testing.assert_allclose(sitk.GetArrayFromImage(image), expected / scale, atol=2e-6)
        assert expected.max() > 0.5


def test_with_probabilities_the_entropy_is_the_same(predictions):
    for file in (predictions / "student" / "uncertainty" / "entropy_nats").iterdir():
        other = predictions / "student_both" / "uncertainty" / "entropy_nats" / file.name
        np.testing.assert_array_equal(_read(file), _read(other))


def test_what_nnunet_crops_away_has_no_entropy(predictions, images, hippocampus):
    name = f"{hippocampus['test'][0]}.nii.gz"
    image = _read(images / name.replace(".nii.gz", "_0000.nii.gz"))
    entropy = _read(predictions / "student" / "uncertainty" / "entropy_nats" / name)
    assert (entropy[:4] == 0).all() and (entropy[-7:] == 0).all() and (entropy[:, :3] == 0).all()
    assert (entropy[4:-7, 3:-6, 2:-5] > 0).mean() > 0.99 and image[4:-7, 3:-6, 2:-5].all()


def test_the_cases_are_listed_in_the_order_of_their_scores(predictions):
    for branch in BRANCHES:
        folder, rows = predictions / branch, _rows(predictions / branch)
        assert [row["rank"] for row in rows] == [1, 2] and rows[0]["score"] > rows[1]["score"]
        assert {row["branch"] for row in rows} == {branch}
        for row in rows:
            normalised = _read(folder / "uncertainty" / "entropy_normalised" / f"{row['case']}.nii.gz")
            segmentation = _read(folder / f"{row['case']}.nii.gz")
            assert row["score"] == pytest.approx(normalised[(segmentation > 0) | (normalised >= IN_DOUBT)].mean(), rel=1e-5)
        with open(folder / "uncertainty" / "review_first.csv", newline="") as stream:
            table = list(csv.DictReader(stream))
        assert [row["case"] for row in table] == [row["case"] for row in rows]
        assert [float(row["score"]) for row in table] == [row["score"] for row in rows]


def test_other_processes_and_a_model_folder_give_the_same_files(hippocampus_model, predictions, images, tmp_path):
    code = cli.main(["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-m", str(hippocampus_model), "-f", "0", "-device",
                     "cpu", "-npp", "1", "-nps", "2", "--save-entropy", "--branch", "teacher"])
    assert code == 0 and _rows(tmp_path / "out") == _rows(predictions / "teacher")
    for file in (predictions / "teacher").rglob("*.nii.gz"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(predictions / "teacher")).read_bytes()


def test_parts_fill_one_list(predictions, images, tmp_path):
    predict(images, tmp_path, "--save-entropy", "-num_parts", "2", "-part_id", "1", processes="1")  # for other processes only
    (mine,) = _rows(tmp_path)
    for row in _rows(predictions / "student"):  # what the other part leaves
        if row["case"] != mine["case"]:
            name = f"{row['case']}.json"
            shutil.copyfile(predictions / "student" / "uncertainty" / "scores" / name, tmp_path / "uncertainty" / "scores" / name)
    list_cases(tmp_path)
    assert _rows(tmp_path) == _rows(predictions / "student")


def test_a_continued_prediction_predicts_what_lacks_a_segmentation_or_an_entropy(predictions, images, tmp_path):
    shutil.copytree(predictions / "student", tmp_path / "out")
    first, second = (row["case"] for row in _rows(tmp_path / "out"))
    kept = tmp_path / "out" / "uncertainty" / "entropy_nats" / f"{first}.nii.gz"
    kept.write_bytes(b"not predicted again")
    (tmp_path / "out" / "uncertainty" / "scores" / f"{second}.json").unlink()
    predict(images, tmp_path / "out", "--save-entropy", "--continue_prediction")
    assert kept.read_bytes() == b"not predicted again" and _rows(tmp_path / "out") == _rows(predictions / "student")
    (tmp_path / "out" / f"{first}.nii.gz").unlink()
    predict(images, tmp_path / "out", "--save-entropy", "--continue_prediction")
    assert (tmp_path / "out" / f"{first}.nii.gz").is_file() and kept.read_bytes() != b"not predicted again"
    assert _rows(tmp_path / "out") == _rows(predictions / "student")


def test_an_ensemble_of_folds_has_the_entropy_of_the_mean_logits(nnunet, hippocampus_model, images, tmp_path, predictions):
    """What nnU-Net saves as probabilities."""
    other = hippocampus_model / "fold_1"
    shutil.copytree(hippocampus_model / "fold_0", other)
    try:
        checkpoint = torch.load(other / "checkpoint_final.pth", weights_only=False)
        for name, weights in checkpoint["network_weights"].items():
            if "seg_layers" in name:
                weights.mul_(-2)
        torch.save(checkpoint, other / "checkpoint_final.pth")
        predict(images, tmp_path, "--save-entropy", "--save_probabilities", folds=("0", "1"))
    finally:
        shutil.rmtree(other)
    for file in tmp_path.glob("*.npz"):
        name = file.name.replace(".npz", ".nii.gz")
        entropy = _read(tmp_path / "uncertainty" / "entropy_nats" / name)
        np.testing.assert_allclose(entropy, scipy.stats.entropy(np.load(file)["probabilities"].astype(np.float64)), atol=2e-6)
        assert np.abs(entropy - _read(predictions / "student" / "uncertainty" / "entropy_nats" / name)).max() > 0.05


def test_regions_have_the_sum_of_their_heads_entropies(region_model, regions, nnunet, images, tmp_path):
    predict(images, tmp_path, "--save-entropy", "--save_probabilities", "--disable_tta", configuration="3d_unsure", dataset="5")
    predict(images, tmp_path / "plain", "--disable_tta", configuration="3d_unsure", dataset="5")
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 2
    for file in files:
        p = np.load(file)["probabilities"].astype(np.float64)
        expected = sum(scipy.stats.entropy([head, 1 - head]) for head in p)
        name = file.name.replace(".npz", ".nii.gz")
        np.testing.assert_allclose(_read(tmp_path / "uncertainty" / "entropy_nats" / name), expected, atol=3e-6)
        np.testing.assert_allclose(_read(tmp_path / "uncertainty" / "entropy_normalised" / name),
                                   expected / (2 * math.log(2)), atol=3e-6)
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.fixture(scope="module")
def region_model(nnunet, regions):
    """Of a network that has not learnt anything, which is enough to predict."""
    nnunet.configure(regions, "3d_unsure", "3d_fullres", {"seed": 3}, features=(4, 8, 8))
    trainer = nnunet.trainer(regions, "3d_unsure")
    trainer.initialize()
    trainer.on_train_start()
    trainer.save_checkpoint(str(nnunet.model(regions, "3d_unsure") / "fold_0" / "checkpoint_final.pth"))


def test_nnunets_tools_do_not_take_the_maps_for_segmentations(predictions, nnunet, hippocampus, tmp_path):
    from nnunetv2.ensembling.ensemble import ensemble_folders
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
    folder = predictions / "student_both"
    ensemble_folders([str(folder), str(predictions / "teacher_npz")], str(tmp_path / "ensemble"), num_processes=1)
    assert len(list((tmp_path / "ensemble").glob("*.nii.gz"))) == 2
    truth = tmp_path / "truth"
    truth.mkdir()
    for row in _rows(folder):  # the padded image has no truth of its size; what counts is that the files are found
        shutil.copyfile(folder / f"{row['case']}.nii.gz", truth / f"{row['case']}.nii.gz")
    compute_metrics_on_folder2(str(truth), str(folder), str(folder / "dataset.json"), str(folder / "plans.json"),
                               str(tmp_path / "summary.json"), num_processes=1)
    assert len(json.loads((tmp_path / "summary.json").read_text())["metric_per_case"]) == 2


def test_the_help_tells_of_the_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    assert "--save-entropy" in capsys.readouterr().out


# ---- measuring ------------------------------------------------------------------------------------------------------

def test_the_entropy_of_equal_logits_is_log_C_and_of_certainty_0():
    assert max_entropy(4, False) == math.log(4) and max_entropy(4, True) == 4 * math.log(2)
    logits = np.zeros((4, 2, 1, 3), np.float32)
    logits[1, 1] = 1e4  # certain of class 1 in the second slice
    maps = measure(logits, False)
    np.testing.assert_allclose(maps["entropy"], np.repeat([[[math.log(4)]], [[0]]], 3, axis=2), atol=1e-6)
    np.testing.assert_allclose(maps["confidence"], np.repeat([[[0.25]], [[1]]], 3, axis=2), atol=1e-6)
    # regions: 4 heads of log 2 at logits 0; three of them where one is certain
    maps = measure(logits, True)
    np.testing.assert_allclose(maps["entropy"][:, 0, 0], [4 * math.log(2), 3 * math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(maps["confidence"][:, 0, 0], [0.5, 0.5])


def test_the_confidence_of_regions_is_that_of_the_least_sure_head():
    # sigmoid(log 9) = 0.9; sigmoid(-log 4) = 0.2, of which the head is 0.8 sure
    logits = np.log(np.array([[[[9.0]]], [[[1 / 4]]]]))
    np.testing.assert_allclose(measure(logits, True)["confidence"], [[[0.8]]], rtol=1e-6)


def test_half_precision_is_measured_in_full_and_the_logits_are_left_alone():
    logits = np.random.default_rng(0).normal(0, 3, (3, 4, 5, 6)).astype(np.float16)
    before = logits.copy()
    maps = measure(logits, False)
    p = scipy.special.softmax(logits.astype(np.float64), 0)
    np.testing.assert_allclose(maps["entropy"], scipy.stats.entropy(p), atol=1e-6)
    np.testing.assert_allclose(maps["confidence"], p.max(0), atol=1e-6)
    np.testing.assert_array_equal(logits, before)


def test_the_maps_are_cropped_and_transposed_back_as_the_segmentation_is(hippocampus_model, tmp_path):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    plans = json.loads((hippocampus_model / "plans.json").read_text()) | {"transpose_forward": [2, 0, 1],
                                                                          "transpose_backward": [1, 2, 0]}
    manager = PlansManager(plans)
    configuration = manager.get_configuration("2d_export")
    logits = np.random.default_rng(0).normal(0, 2, (3, 4, 6, 5)).astype(np.float32)
    # transposed: (X, Z, Y) = (7, 6, 9), of which (4, 6, 5) from (2, 0, 3) on is left after cropping
    properties = {"spacing": [1.0, 1.0, 1.0], "shape_before_cropping": (7, 6, 9),
                  "bbox_used_for_cropping": [[2, 6], [0, 6], [3, 8]],
                  "shape_after_cropping_and_before_resampling": (4, 6, 5),
                  "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}}
    dataset_json = json.loads((hippocampus_model / "dataset.json").read_text())
    segmentation, maps = export_and_measure(logits, properties, configuration, manager, dataset_json, str(tmp_path / "c"), True)
    p = np.load(tmp_path / "c.npz")["probabilities"].astype(np.float64)
    assert p.shape == (3, 6, 9, 7) and segmentation.shape == (6, 9, 7)
    np.testing.assert_array_equal(segmentation, _read(tmp_path / "c.nii.gz"))
    np.testing.assert_allclose(maps["entropy"], scipy.stats.entropy(p), atol=1e-6)
    np.testing.assert_allclose(maps["confidence"], p.max(0), atol=1e-6)


def test_a_name_that_nnunet_no_longer_uses_is_not_replaced_in_silence():
    def nnunets():
        return math.pi
    assert with_names(nnunets, math=type("m", (), {"pi": 3}))() == 3 and nnunets() == math.pi
    with pytest.raises(RuntimeError, match="does not use"):
        with_names(nnunets, maths=None)
    for method in ("predict_from_data_iterator", "predict_from_files_sequential"):
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        with_names(getattr(nnUNetPredictor, method), export_prediction_from_logits=None)
        assert getattr(EntropyPredictor, method) is not getattr(nnUNetPredictor, method)


# ---- scores ---------------------------------------------------------------------------------------------------------

def test_the_score_is_the_mean_over_foreground_and_doubt():
    normalised = np.array([0.0, IN_DOUBT / 2, IN_DOUBT, 0.8, 0.01, 0.5])
    segmentation = np.array([0, 0, 0, 0, 1, 2])
    row = case_score(normalised, segmentation)
    assert row["score"] == pytest.approx((IN_DOUBT + 0.8 + 0.01 + 0.5) / 4)
    assert (row["voxels"], row["foreground_voxels"], row["judged_voxels"]) == (6, 2, 4)
    assert row["mean_normalised_entropy"] == pytest.approx((IN_DOUBT * 1.5 + 0.8 + 0.01 + 0.5) / 6)
    # an empty surrounding does not change it
    wide = case_score(np.pad(normalised, (0, 1000)), np.pad(segmentation, (0, 1000)))
    assert wide["score"] == pytest.approx(row["score"])
    where = np.array([True, True, True, True, True, False])
    assert case_score(normalised, segmentation, where)["score"] == pytest.approx((IN_DOUBT + 0.8 + 0.01) / 3)
    assert case_score(np.zeros(3), np.zeros(3))["score"] == case_score(normalised, segmentation, np.zeros(6, bool))["score"] == 0


def test_cases_of_the_same_score_are_in_the_order_of_their_names(tmp_path):
    rows = write_review_list(tmp_path, [{"case": name, "score": score} for name, score in
                                        (("b", 0.5), ("c,\"d\"\n", 0.9), ("a", 0.5))], {})
    assert [row["case"] for row in rows] == ["c,\"d\"\n", "a", "b"]
    with open(tmp_path / "review_first.csv", newline="") as stream:
        assert [row["case"] for row in csv.DictReader(stream)] == ["c,\"d\"\n", "a", "b"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["review_first.csv", "review_first.json"]


def test_no_case_at_all_is_an_empty_list(tmp_path):
    assert list_cases(tmp_path).read_text().startswith("rank,case") and _rows(tmp_path) == []


# ---- formats --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending, name", [(".nii.gz", "SimpleITKIO"), (".nrrd", "SimpleITKIO"), (".mha", "SimpleITKIO"),
                                          (".gipl", "SimpleITKIO"), (".nii.gz", "NibabelIO"), (".nii.gz", "NibabelIOWithReorient"),
                                          (".tif", "Tiff3DIO"), (".png", "NaturalImage2DIO"), (".bmp", "NaturalImage2DIO")])
def test_a_map_lies_where_the_segmentation_lies_in_every_format(tmp_path, ending, name):
    """The same values, written by nnU-Net as a segmentation and here as a map, read by other libraries."""
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
    rw = recursive_find_reader_writer_by_name(name)()
    rng = np.random.default_rng(0)
    flat = name == "NaturalImage2DIO"
    image = tmp_path / f"case_0000{ending}"
    if flat or name == "Tiff3DIO":
        import skimage.io
        import tifffile
        array = rng.integers(1, 200, (7, 5) if flat else (4, 7, 5)).astype(np.uint8)
        skimage.io.imsave(image, array, check_contrast=False) if flat else tifffile.imwrite(image, array)
        (tmp_path / "case.json").write_text(json.dumps({"spacing": [3.0, 0.5, 0.7]}))
    else:
        array = sitk.GetImageFromArray(rng.normal(size=(4, 7, 5)).astype(np.float32))
        array.SetSpacing((0.5, 0.75, 3))
        array.SetOrigin((-3.5, 11.25, 2))
        array.SetDirection((0, -1, 0, 0, 0, 1, -1, 0, 0))  # axes permuted and flipped
        sitk.WriteImage(array, str(image))
    _, properties = rw.read_images([str(image)])
    shape = rw.read_images([str(image)])[0].shape[1:]
    values = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    segmentation, file = tmp_path / f"case{ending}", tmp_path / "maps" / f"case{map_ending(ending)}"
    rw.write_seg(values, str(segmentation), properties)
    for values_of_map in (values + 0.25, values / 256):  # the second over the first
        write_map(file, values_of_map, properties, rw)
    if flat or name == "Tiff3DIO":
        found = tifffile.imread(file)
        expected = skimage.io.imread(segmentation) if flat else tifffile.imread(segmentation)
    else:
        found, expected = (nibabel.load(f) if ending == ".nii.gz" else sitk.ReadImage(str(f)) for f in (file, segmentation))
        if ending == ".nii.gz":
            np.testing.assert_array_equal(found.affine, expected.affine)
            found, expected = np.asarray(found.dataobj), np.asarray(expected.dataobj)
        else:
            for of in ("GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(found, of)() == getattr(expected, of)()
            found, expected = sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(expected)
    assert found.dtype == np.float32 and len(np.unique(expected)) > 30
    np.testing.assert_array_equal(found, expected.astype(np.float32) / 256)


def test_a_map_that_was_not_written_whole_is_an_error(tmp_path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    class Forgetful(SimpleITKIO):
        def write_seg(self, seg, output_fname, properties):
            super().write_seg(np.zeros_like(seg), output_fname, properties)

    properties = {"sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}}
    with pytest.raises(OSError, match="disk full"):
        write_map(tmp_path / "a.nii.gz", np.full((2, 3, 4), 0.5), properties, Forgetful())


def test_a_score_is_kept_only_of_what_is_complete(hippocampus_model, predictions, images, tmp_path, monkeypatch, capsys):
    """A case of an earlier run that fails in the second has no score any more, so that it is predicted again."""
    shutil.copytree(predictions / "student", tmp_path / "out")

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr("nnunet_confkd.inference.uncertainty.write_map", fail)
    predict(images, tmp_path / "out", "--save-entropy", status=1)
    assert "OSError: disk full" in capsys.readouterr().err
    assert len(os.listdir(tmp_path / "out" / "uncertainty" / "scores")) == 1
