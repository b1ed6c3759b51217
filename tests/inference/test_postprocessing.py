"""nnU-Net's post-processing: found beside a model, described, and applied as nnU-Net's own command does."""
from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
from image_files import read_voxels, write_image
from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing_to_folder, determine_postprocessing

from nnunet_confkd.data.images import read
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference import postprocessing
from nnunet_confkd.inference.inputs import Predicted

LABELS = {"background": 0, "anterior": 1, "posterior": 2, "ignore": 3}
WHOLE = {"labels_or_regions": [1, 2]}


def blobs(seed):
    """A true mask of two classes, and a prediction with a false positive of the first one."""
    truth = np.zeros((8, 12, 12), np.uint8)
    truth[2:6, 2:6, 2:8], truth[2:6, 6:9, 2:8] = 1, 2
    predicted = truth.copy()
    predicted[0, 10, 9 + seed % 2] = 1
    return truth, predicted


@pytest.fixture
def model(hippocampus_model, tmp_path):
    """A folder with the plans of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("plans.json", "dataset.json"):
        shutil.copyfile(hippocampus_model / name, folder / name)
    return folder


@pytest.fixture
def validated(model, tmp_path, threads):
    """The folder of validation cases in which nnU-Net has determined the post-processing."""
    folder = model / "fold_0" / "validation"
    for seed in range(3):
        truth, predicted = blobs(seed)
        write_image(tmp_path / "truth" / f"c{seed}.nii.gz", truth)
        write_image(folder / f"c{seed}.nii.gz", predicted)
    determine_postprocessing(str(folder), str(tmp_path / "truth"), str(model / "plans.json"),
                             str(model / "dataset.json"), 1, keep_postprocessed_files=False)
    return folder


def write(folder, functions, options, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "postprocessing.json").write_text(
        json.dumps({"postprocessing_fns": functions, "postprocessing_kwargs": options, **more}))


def test_what_nnunet_has_determined_is_applied_as_nnunet_does(validated, model, tmp_path, monkeypatch):
    monkeypatch.setattr(postprocessing, "PROCESSES", 1)
    found = postprocessing.find(model, ["0"])
    assert found.file == validated / "postprocessing.json" and found.steps
    output = tmp_path / "out"
    write_image(output / "a.nii.gz", blobs(1)[1])
    (output / "notes.nii.gz").write_text("not of this prediction")
    folder = output / postprocessing.FOLDER
    postprocessing.apply(found, model, folder, [output / "a.nii.gz"])

    functions, options = pickle.loads((validated / "postprocessing.pkl").read_bytes())
    (output / "notes.nii.gz").unlink()
    apply_postprocessing_to_folder(str(output), str(tmp_path / "theirs"), functions, options,
                                   str(model / "plans.json"), str(model / "dataset.json"), 1)
    assert sorted(file.name for file in folder.iterdir()) == ["a.nii.gz"]
    assert np.array_equal(read_voxels(folder / "a.nii.gz"), read_voxels(tmp_path / "theirs" / "a.nii.gz"))
    assert np.array_equal(read_voxels(folder / "a.nii.gz"), blobs(1)[0])
    assert np.array_equal(read_voxels(output / "a.nii.gz"), blobs(1)[1]), "the raw prediction stays"


def test_what_it_does_is_said_with_its_gain(validated, model):
    text = postprocessing.find(model, [0]).text(LABELS)
    assert text.startswith("post-processing keeps the largest component of ")
    before, after = (json.loads((validated / "postprocessing.json").read_text())[key]["foreground_mean"]["Dice"]
                     for key in ("input_folder", "postprocessed"))
    assert before < after
    assert text.endswith(f"(mean Dice of the validation cases {before:.3f}, and {after:.3f} with it)")


@pytest.mark.parametrize("options, expected", [
    ([WHOLE], "of the whole foreground alone"), ([{"labels_or_regions": 2}], "of posterior alone"),
    ([WHOLE, {"labels_or_regions": 1}], "of the whole foreground, of anterior alone"),
    ([], "does not help on the validation cases, so none is applied")])
def test_steps_are_said_with_the_names_of_the_classes(tmp_path, options, expected):
    write(tmp_path, [postprocessing.FUNCTION.__name__] * len(options), options)
    assert expected in postprocessing.read(tmp_path).text(LABELS)


def test_a_region_is_one_component(model, tmp_path, monkeypatch):
    monkeypatch.setattr(postprocessing, "PROCESSES", 1)
    write(model, [postprocessing.FUNCTION.__name__], [{"labels_or_regions": [1, 2]}])
    voxels = blobs(0)[1]
    voxels[0, 0, 0] = 2
    write_image(tmp_path / "a.nii.gz", voxels)
    found = postprocessing.find(model, ["all"])
    assert "of both alone" in found.text({"background": 0, "both": [1, 2], "one": 1, "other": 3})
    folder = tmp_path / postprocessing.FOLDER
    postprocessing.apply(found, model, folder, [tmp_path / "a.nii.gz"])
    assert np.array_equal(read_voxels(folder / "a.nii.gz"), blobs(0)[0])


def test_tiff_keeps_its_file_with_the_spacing(tmp_path):
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
    kept, voxels = blobs(1)
    (tmp_path / "raw").mkdir()
    Tiff3DIO().write_seg(voxels.astype(np.uint8), str(tmp_path / "raw" / "a.tif"), {"spacing": (3.0, 2.0, 1.0)})
    folder = tmp_path / "postprocessed"
    folder.mkdir()
    postprocessing._apply_to_file(tmp_path / "raw" / "a.tif", folder / "a.tif", Tiff3DIO, ((1, 2),))
    assert sorted(file.name for file in folder.iterdir()) == ["a.json", "a.tif"]
    picture = read(folder / "a.tif")
    assert picture.geometry.spacing == (1.0, 2.0, 3.0) and np.array_equal(picture.voxels[0], kept)


def test_the_folds_that_predict_decide(model):
    assert postprocessing.find(model, ["0"]) is None
    for place, label in (("crossval_results_folds_0_1_2_3_4", 1), ("fold_0/validation", 2)):
        write(model / place, [postprocessing.FUNCTION.__name__], [{"labels_or_regions": label}])
    assert postprocessing.find(model, [0, 1, 2, 3, 4]).steps == ((1,),)
    assert postprocessing.find(model, ["0"]).steps == ((2,),)
    assert postprocessing.find(model, ["1", "2"]).steps == ((1,),)
    for folds, label in (("0_1", 3), ("0", 4), ("0_1_2", 5)):
        write(model / f"crossval_results_folds_{folds}", [postprocessing.FUNCTION.__name__],
              [{"labels_or_regions": label}])
    assert postprocessing.find(model, ["1", "0"]).steps == ((3,),), "the order of the folds does not matter"
    assert postprocessing.find(model, ["1", "2"]).steps == ((5,),), "as few others as possible"
    labels = {"background": 0, "organ": 1, "tumour": 4}
    assert "determined" not in postprocessing.find(model, ["3", "4"]).text(labels)
    other = postprocessing.find(model, ["all"])
    assert "it was determined on the validation of folds 0, and others predict" in other.text(labels)


@pytest.mark.parametrize("functions, options", [
    (["system"], [{"labels_or_regions": 1}]), ([postprocessing.FUNCTION.__name__], []), (None, None),
    ([postprocessing.FUNCTION.__name__], [{"labels_or_regions": "1"}]),
    ([postprocessing.FUNCTION.__name__], [{"labels_or_regions": 1, "background_label": 2}])])
def test_other_functions_are_refused(tmp_path, functions, options):
    write(tmp_path, functions, options)
    with pytest.raises(InputError, match="postprocessing.json: must hold calls of remove_all_but_largest_component"):
        postprocessing.read(tmp_path)


def test_a_pickle_alone_is_not_opened(model, capsys):
    (model / "postprocessing.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(InputError, match="postprocessing.json: is not there; .* which is not opened"):
        postprocessing.required(model, ["0"], "")
    assert postprocessing.required(model, ["0"], None) is None  # nobody asked for it


def test_without_one_the_user_is_told_how_to_get_one(model, tmp_path, capsys):
    predicted = Predicted({}, {}, tmp_path, model, {"labels": LABELS})
    assert postprocessing.applied(None, predicted, False) is predicted
    said = capsys.readouterr().out
    assert "these predictions are raw" in said and f"nnUNetv2_determine_postprocessing -i {model}/fold_0" in said
    assert f'-ref "$nnUNet_raw"/{model.parent.name}/labelsTr' in said
    with pytest.raises(InputError, match="--postprocessing: there is none for .*nnUNetv2_find_best_configuration"):
        postprocessing.required(model, ["0"], "")


def test_post_processed_predictions_of_an_earlier_model_are_named(model, tmp_path, capsys):
    file = write_image(tmp_path / "a.nii.gz", blobs(0)[1])
    predicted = Predicted({"a": file}, {"a": file}, tmp_path, model, {"labels": LABELS})
    postprocessing.applied(None, predicted, False)
    assert "WARNING" not in capsys.readouterr().out
    write_image(tmp_path / postprocessing.FOLDER / "a.nii.gz", blobs(0)[0])
    postprocessing.applied(None, predicted, False)
    said = capsys.readouterr().out
    assert f"WARNING: {tmp_path / 'postprocessed'}: is of earlier predictions of a; remove it" in said


def test_none_is_proposed_if_cases_lack_classes_which_nnunet_takes_for_absent(model, tmp_path, capsys):
    predicted = Predicted({}, {}, tmp_path, model, {"labels": LABELS, "annotated_classes": {"a": ["RV"]}})
    assert postprocessing.applied(None, predicted, False) is predicted
    said = capsys.readouterr().out
    assert "these predictions are raw" in said and "nnUNetv2_" not in said


def test_one_that_is_there_is_mentioned_and_applied_only_if_asked_for(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(postprocessing, "PROCESSES", 1)
    write(model, [postprocessing.FUNCTION.__name__], [WHOLE])
    file = write_image(tmp_path / "out" / "a.nii.gz", blobs(0)[1])
    predicted = Predicted({"a": file}, {"a": file}, tmp_path / "out", model, {"labels": LABELS})
    found = postprocessing.required(model, ["0"], None)
    assert postprocessing.applied(found, predicted, False) is predicted
    assert "raw. Post-processing keeps the largest component of the whole foreground" in capsys.readouterr().out
    assert not (tmp_path / "out" / "postprocessed").exists()
    text = postprocessing.required(model, ["0"], "", "teacher").text(LABELS)
    assert text.endswith("; the student's predictions were looked at for this, not the teacher's")
    new = postprocessing.applied(postprocessing.required(model, ["0"], str(model)), predicted, True)
    assert new.segmentations == {"a": tmp_path / "out" / "postprocessed" / "a.nii.gz"}
    assert "post-processed predictions: " in capsys.readouterr().out
