"""`confkd predict --save-entropy`, the scores, and maps in every format."""
from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
import tracemalloc

import nibabel
import numpy as np
import pytest
import scipy.stats
import SimpleITK as sitk
import torch

from nnunet_confkd import cli
from nnunet_confkd.inference.review import IN_DOUBT, case_score, map_ending, write_review_list
from nnunet_confkd.inference.uncertainty import EntropyPredictor, list_cases, outdated, write_map

HIPPOCAMPUS = "Dataset004_Hippocampus"
BRANCHES = ("student", "teacher", "mean")


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def review_rows(folder):
    return json.loads((folder / "uncertainty" / "review_first.json").read_text())["cases"]


def predict(images, output, *more, configuration="2d_export", dataset="4", folds=("0",), processes="0", status=0):
    """Run the command, in this process if `processes` is 0."""
    assert cli.main(["predict", "-i", str(images), "-o", str(output), "-d", dataset, "-c", configuration, "-f", *folds,
                     "-device", "cpu", "-npp", processes, "-nps", processes, "--disable_progress_bar", "--disable_tta",
                     *more]) == status


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
    """Predictions with probabilities and entropy; "plain_": without entropy; "light": without probabilities."""
    folder = tmp_path_factory.mktemp("predictions")
    for branch in BRANCHES:
        predict(images, folder / branch, "--save-entropy", "--save_probabilities", "--branch", branch)
    for branch in ("student", "mean"):
        predict(images, folder / f"plain_{branch}", "--save_probabilities", "--branch", branch)
    predict(images, folder / "plain_light")
    predict(images, folder / "light", "--save-entropy")
    return folder


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["student", "mean", "light"])
def test_the_segmentation_is_the_same_to_the_bit(predictions, name):
    files = sorted(f.name for f in (predictions / f"plain_{name}").iterdir())
    assert sum(name.endswith(".nii.gz") for name in files) == 2
    assert sorted(f.name for f in (predictions / name).iterdir()) == sorted([*files, "uncertainty"])
    for file in files:
        a, b = predictions / name / file, predictions / f"plain_{name}" / file
        if file.endswith(".npz"):
            np.testing.assert_array_equal(*(np.load(f)["probabilities"] for f in (a, b)))
        elif file.endswith(".nii.gz"):
            assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_entropy_is_that_of_the_branchs_probabilities_in_the_geometry_of_the_segmentation(predictions, branch):
    files = sorted((predictions / branch).glob("*.npz"))
    assert len(files) == 2
    for npz in files:
        folder, name = predictions / branch, npz.name.replace(".npz", ".nii.gz")
        expected = scipy.stats.entropy(np.load(npz)["probabilities"].astype(np.float64))  # natural logarithm
        segmentation = sitk.ReadImage(str(folder / name))
        for kind, scale in (("entropy_nats", 1), ("entropy_normalised", math.log(3))):
            image = sitk.ReadImage(str(folder / "uncertainty" / kind / name))
            assert image.GetPixelID() == sitk.sitkFloat32
            for getter in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(image, getter)() == getattr(segmentation, getter)()
            np.testing.assert_allclose(sitk.GetArrayFromImage(image), expected / scale, atol=2e-6)
        assert expected.max() > 0.5


def test_with_probabilities_the_entropy_is_the_same(predictions):
    files = sorted((predictions / "student" / "uncertainty" / "entropy_nats").iterdir())
    assert len(files) == 2
    for file in files:
        light = predictions / "light" / "uncertainty" / "entropy_nats" / file.name
        np.testing.assert_array_equal(read(file), read(light))


def test_what_nnunet_crops_away_has_no_entropy(predictions, images, hippocampus):
    name = f"{hippocampus['test'][0]}.nii.gz"
    image = read(images / name.replace(".nii.gz", "_0000.nii.gz"))
    entropy = read(predictions / "student" / "uncertainty" / "entropy_nats" / name)
    assert (entropy[:4] == 0).all() and (entropy[-7:] == 0).all() and (entropy[:, :3] == 0).all()
    assert (entropy[4:-7, 3:-6, 2:-5] > 0).mean() > 0.99 and image[4:-7, 3:-6, 2:-5].all()


def test_the_cases_are_listed_in_the_order_of_their_scores(predictions):
    for branch in BRANCHES:
        folder, rows = predictions / branch, review_rows(predictions / branch)
        assert [row["rank"] for row in rows] == [1, 2] and rows[0]["score"] > rows[1]["score"]
        assert {row["branch"] for row in rows} == {branch}
        for row in rows:
            normalised = read(folder / "uncertainty" / "entropy_normalised" / f"{row['case']}.nii.gz")
            segmentation = read(folder / f"{row['case']}.nii.gz")
            judged = (segmentation > 0) | (normalised >= IN_DOUBT)
            assert row["score"] == pytest.approx(normalised[judged].mean(), rel=1e-5)
        with open(folder / "uncertainty" / "review_first.csv", newline="") as stream:
            table = list(csv.DictReader(stream))
        assert [row["case"] for row in table] == [row["case"] for row in rows]
        assert [float(row["score"]) for row in table] == [row["score"] for row in rows]


@pytest.mark.parametrize("workers", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_model_folder_and_workers_give_the_same_files(hippocampus_model, predictions, images, tmp_path, request,
                                                        workers):
    if workers == "threads":
        request.getfixturevalue("threads")
    code = cli.main(["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-m", str(hippocampus_model), "-f", "0",
                     "-device", "cpu", "-npp", "1", "-nps", "2", "--disable_tta", "--save-entropy", "--branch",
                     "teacher"])
    assert code == 0 and review_rows(tmp_path / "out") == review_rows(predictions / "teacher")
    for file in (predictions / "teacher").rglob("*.nii.gz"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(predictions / "teacher")).read_bytes()


def test_parts_fill_one_list(predictions, images, tmp_path, threads):
    predict(images, tmp_path, "--save-entropy", "-num_parts", "2", "-part_id", "1", processes="1")
    (mine,) = review_rows(tmp_path)
    scores = predictions / "student" / "uncertainty" / "scores"
    for row in review_rows(predictions / "student"):  # what the other part leaves
        if row["case"] != mine["case"]:
            shutil.copy(scores / f"{row['case']}.json", tmp_path / "uncertainty" / "scores")
    list_cases(tmp_path)
    assert review_rows(tmp_path) == review_rows(predictions / "student")


def test_a_continued_prediction_predicts_what_lacks_a_segmentation_or_an_entropy(predictions, images, tmp_path):
    shutil.copytree(predictions / "student", tmp_path / "out")
    first, second = (row["case"] for row in review_rows(tmp_path / "out"))
    kept = tmp_path / "out" / "uncertainty" / "entropy_nats" / f"{first}.nii.gz"
    kept.write_bytes(b"not predicted again")
    (tmp_path / "out" / "uncertainty" / "scores" / f"{second}.json").unlink()
    predict(images, tmp_path / "out", "--save-entropy", "--continue_prediction")
    assert kept.read_bytes() == b"not predicted again"
    assert review_rows(tmp_path / "out") == review_rows(predictions / "student")
    (tmp_path / "out" / f"{first}.nii.gz").unlink()
    predict(images, tmp_path / "out", "--save-entropy", "--continue_prediction")
    assert (tmp_path / "out" / f"{first}.nii.gz").is_file() and kept.read_bytes() != b"not predicted again"
    assert review_rows(tmp_path / "out") == review_rows(predictions / "student")


def test_an_entropy_of_an_earlier_prediction_does_not_count(predictions, images, tmp_path):
    """A prediction without the entropy has replaced a segmentation since."""
    out = shutil.copytree(predictions / "student", tmp_path / "out")
    first, second = (row["case"] for row in review_rows(out))
    later = time.time() + 5
    os.utime(out / f"{first}.nii.gz", (later, later))
    assert [file.stem for file in outdated(out)] == [first]
    list_cases(out)
    assert [row["case"] for row in review_rows(out)] == [second]
    (out / f"{first}.nii.gz").unlink()
    predict(images, out, "--save-entropy", "--continue_prediction")
    assert not outdated(out) and review_rows(out) == review_rows(predictions / "student")


def test_a_corrected_segmentation_is_not_predicted_again(predictions, images, tmp_path, capsys):
    out = shutil.copytree(predictions / "student", tmp_path / "out")
    first, second = (row["case"] for row in review_rows(out))
    corrected, later = out / f"{first}.nii.gz", time.time() + 5
    corrected.write_bytes(b"corrected")
    os.utime(corrected, (later, later))
    (out / f"{second}.nii.gz").unlink()
    lists = EntropyPredictor.__new__(EntropyPredictor)
    lists.dataset_json = {"file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}
    _, to_predict, _ = lists._manage_input_and_output_lists(str(images), str(out), None, overwrite=False)
    assert to_predict == [str(out / second)]
    list_cases(out)
    assert f"corrected or predicted anew since: {first}" in capsys.readouterr().out


def test_an_ensemble_of_folds_has_the_entropy_of_the_mean_logits(hippocampus_model, images, tmp_path, predictions):
    """nnU-Net saves the softmax of these logits as probabilities."""
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
        entropy = read(tmp_path / "uncertainty" / "entropy_nats" / name)
        p = np.load(file)["probabilities"].astype(np.float64)
        np.testing.assert_allclose(entropy, scipy.stats.entropy(p), atol=2e-6)
        assert np.abs(entropy - read(predictions / "student" / "uncertainty" / "entropy_nats" / name)).max() > 0.05


def test_regions_have_the_sum_of_their_heads_entropies(region_model, images, tmp_path):
    options = {"configuration": "3d_untrained", "dataset": "8"}
    predict(images, tmp_path, "--save-entropy", "--save_probabilities", **options)
    predict(images, tmp_path / "plain", **options)
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 2
    for file in files:
        p = np.load(file)["probabilities"].astype(np.float64)
        expected = sum(scipy.stats.entropy([head, 1 - head]) for head in p)
        name = file.name.replace(".npz", ".nii.gz")
        np.testing.assert_allclose(read(tmp_path / "uncertainty" / "entropy_nats" / name), expected, atol=3e-6)
        np.testing.assert_allclose(read(tmp_path / "uncertainty" / "entropy_normalised" / name),
                                   expected / (2 * math.log(2)), atol=3e-6)
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_nnunets_tools_do_not_take_the_maps_for_segmentations(predictions, tmp_path, threads):
    from nnunetv2.ensembling.ensemble import ensemble_folders
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
    folder = predictions / "student"
    ensemble_folders([str(folder), str(predictions / "teacher")], str(tmp_path / "ensemble"), num_processes=1)
    assert len(list((tmp_path / "ensemble").glob("*.nii.gz"))) == 2
    truth = tmp_path / "truth"
    truth.mkdir()
    for row in review_rows(folder):  # the padded image has no ground truth of its size, and only the files count here
        shutil.copyfile(folder / f"{row['case']}.nii.gz", truth / f"{row['case']}.nii.gz")
    compute_metrics_on_folder2(str(truth), str(folder), str(folder / "dataset.json"), str(folder / "plans.json"),
                               str(tmp_path / "summary.json"), num_processes=1)
    assert len(json.loads((tmp_path / "summary.json").read_text())["metric_per_case"]) == 2


def test_the_help_tells_of_the_flag(capsys):
    assert cli.main(["predict", "--help"]) == 0
    assert "--save-entropy" in capsys.readouterr().out


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
    assert case_score(np.zeros(3), np.zeros(3))["score"] == 0
    assert case_score(normalised, segmentation, np.zeros(6, bool))["score"] == 0


def test_the_score_of_a_volume_is_made_slice_by_slice():
    rng = np.random.default_rng(0)
    normalised, segmentation = rng.random((40, 60, 60)).astype(np.float32) ** 3, rng.integers(0, 2, (40, 60, 60))
    where = rng.random(normalised.shape) < 0.5
    judged = normalised[where & ((segmentation != 0) | (normalised >= IN_DOUBT))]
    tracemalloc.start()
    try:
        row = case_score(normalised, segmentation, where)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert row["score"] == pytest.approx(judged.mean(dtype=np.float64), rel=1e-9)
    assert row["mean_normalised_entropy"] == pytest.approx(normalised[where].mean(dtype=np.float64), rel=1e-9)
    assert (row["voxels"], row["judged_voxels"]) == (where.sum(), judged.size)
    assert row["foreground_voxels"] == (segmentation[where] != 0).sum()
    assert peak < normalised.nbytes / 4


def test_cases_of_the_same_score_are_in_the_order_of_their_names(tmp_path):
    rows = write_review_list(tmp_path, [{"case": name, "score": score} for name, score in
                                        (("b", 0.5), ("c,\"d\"\n", 0.9), ("a", 0.5))], {})
    assert [row["case"] for row in rows] == ["c,\"d\"\n", "a", "b"]
    with open(tmp_path / "review_first.csv", newline="") as stream:
        assert [row["case"] for row in csv.DictReader(stream)] == ["c,\"d\"\n", "a", "b"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["review_first.csv", "review_first.json"]


def test_no_case_at_all_is_an_empty_list(tmp_path):
    assert list_cases(tmp_path).read_text().startswith("rank,case") and review_rows(tmp_path) == []


# ---- formats --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending, name", [
    (".nii.gz", "SimpleITKIO"), (".nrrd", "SimpleITKIO"), (".mha", "SimpleITKIO"), (".gipl", "SimpleITKIO"),
    (".nii.gz", "NibabelIO"), (".nii.gz", "NibabelIOWithReorient"), (".tif", "Tiff3DIO"), (".png", "NaturalImage2DIO"),
    (".bmp", "NaturalImage2DIO")])
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
        open_file = nibabel.load if ending == ".nii.gz" else sitk.ReadImage
        found, expected = open_file(str(file)), open_file(str(segmentation))
        if ending == ".nii.gz":
            np.testing.assert_array_equal(found.affine, expected.affine)
            found, expected = np.asarray(found.dataobj), np.asarray(expected.dataobj)
        else:
            for getter in ("GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(found, getter)() == getattr(expected, getter)()
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


def test_nothing_is_left_of_a_map_whose_compression_fails(tmp_path, monkeypatch):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    def full(_, target):
        target.write_bytes(b"half")
        raise OSError("no space left")

    properties = {"sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}}
    monkeypatch.setattr("nnunet_confkd.inference.uncertainty._compress", full)
    with pytest.raises(OSError, match="no space left"):
        write_map(tmp_path / "a.nii.gz", np.full((2, 3, 4), 0.5), properties, SimpleITKIO())
    assert not list(tmp_path.iterdir())


def test_a_score_is_kept_only_of_what_is_complete(predictions, images, tmp_path, monkeypatch, capsys):
    """A case of an earlier run that fails in the second run loses its score, so that it is predicted again."""
    shutil.copytree(predictions / "student", tmp_path / "out")

    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr("nnunet_confkd.inference.uncertainty.write_map", fail)
    predict(images, tmp_path / "out", "--save-entropy", status=1)
    assert "OSError: disk full" in capsys.readouterr().err
    assert len(os.listdir(tmp_path / "out" / "uncertainty" / "scores")) == 1
