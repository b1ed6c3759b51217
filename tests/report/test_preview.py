"""Pictures of predictions, and the page of them."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from image_files import write_image
from skimage.io import imread

from nnunet_confkd import cli, nnunet_commands
from nnunet_confkd.inference.inputs import Predicted
from nnunet_confkd.report import preview

LABELS = {"background": 0, "left": 1, "<b>right</b>": 2, "ignore": 3}
SHAPE, SPACING = (6, 20, 16), (1.0, 1.5, 5.0)


@pytest.fixture
def predicted(tmp_path):
    """Three cases, of which the last has no foreground, and one that is not predicted."""
    output = tmp_path / "out"
    images, segmentations = {}, {}
    for k, case in enumerate(("a", "b & c", "empty")):
        rng = np.random.default_rng(k)
        images[case] = write_image(tmp_path / "in" / f"{case}_0000.nii.gz", rng.normal(size=SHAPE), SPACING)
        label = np.zeros(SHAPE, np.uint8)
        if case != "empty":
            label[1:5, 4:12, 3:6 + k], label[2, 4:12, 8:11] = 1, 2
        segmentations[case] = write_image(output / f"{case}.nii.gz", label, SPACING)
    images["missing"] = images["a"]
    return Predicted(images, segmentations, output, tmp_path / "Trainer__plans__2d",
                     {"labels": LABELS, "file_ending": ".nii.gz"}, entropy=True)


def add_entropy(predicted, scores):
    folder = predicted.output / "uncertainty"
    (folder / "scores").mkdir(parents=True)
    for case, score in scores.items():
        (folder / "scores" / f"{case}.json").write_text(json.dumps({"case": case, "score": score}))
        write_image(folder / "entropy_normalised" / f"{case}.nii.gz", np.full(SHAPE, score, np.float32), SPACING)



def test_each_case_has_a_picture_and_a_place_on_the_page(predicted, read_page):
    page = read_page(preview.write(predicted))
    folder = predicted.output / "preview"
    pictures = sorted(file.name for file in folder.glob("*.png"))
    assert pictures == ["case_01_a.png", "case_02_b_c.png", "case_03_empty.png"]
    assert all(imread(folder / name).std() > 10 for name in pictures)
    text = page.by_section["cases"]
    assert text.index("a") < text.index("b & c") < text.index("empty") and "<b>right</b>" in text
    assert "No foreground is predicted" in text and "With --save-entropy, the most uncertain" in page.text
    assert len(page.all("img")) == 4 + 4 + 2 and all(image["src"].startswith("data:") for image in page.all("img"))
    assert "entropy, from 0" not in text


def test_the_most_uncertain_cases_come_first_with_their_entropy(predicted, read_page):
    add_entropy(predicted, {"a": 0.1, "b & c": 0.4, "empty": 0.2})
    page = read_page(preview.write(predicted))
    text = page.by_section["cases"]
    order = [text.index(title) for title in ("1. b & c", "2. empty", "3. a")]
    assert order == sorted(order) and "uncertainty 0.400" in text and "entropy, from 0" in text
    assert len(page.all("img")) == 7 + 7 + 3
    assert (predicted.output / "preview" / "case_01_b_c.png").is_file()


def test_the_entropy_of_an_earlier_prediction_is_not_shown(predicted, read_page):
    add_entropy(predicted, {"a": 0.1, "b & c": 0.4})
    page = read_page(preview.write(replace(predicted, entropy=False)))
    text = page.by_section["cases"]
    assert "uncertainty" not in text and "entropy" not in text and text.index("a") < text.index("b & c")


def test_slices_with_most_foreground_are_shown():
    assert preview.slices_to_show(np.array([0, 1, 5, 2, 9, 3, 4, 0])) == [4, 2, 6]
    assert preview.slices_to_show(np.array([0, 3, 0])) == [1]
    assert preview.slices_to_show(np.zeros(9)) == [4]


def test_the_slices_are_those_of_the_acquisition_and_upright(tmp_path):
    """A volume of thick sagittal slices, whose head (the last z) is white."""
    voxels, label = np.zeros((10, 8, 5), np.float32), np.zeros((10, 8, 5), np.uint8)
    voxels[7:], label[2:4, 1:3, 3] = 100, 1
    image = write_image(tmp_path / "a_0000.nii.gz", voxels, (6.0, 1.0, 2.0))
    file = write_image(tmp_path / "a.nii.gz", label, (6.0, 1.0, 2.0))
    described = {"labels": LABELS, "file_ending": ".nii.gz"}
    predicted = Predicted({"a": image}, {"a": file}, tmp_path, tmp_path, described)
    cells, note = preview._cells(predicted, "a", {"left": {1}})
    assert note == "5 slices" and [cell.title for cell in cells] == ["slice 4, image", "slice 4"]
    assert cells[0].image.shape == (10, 8) and (cells[0].image[:3] == 100).all() and cells[0].aspect == 2
    assert np.argwhere(cells[1].masks["left"]).tolist() == [[6, 1], [6, 2], [7, 1], [7, 2]]


def test_flat_images_have_one_slice(tmp_path):
    image = write_image(tmp_path / "a_0000.nii.gz", np.eye(9, dtype=np.float32))
    file = write_image(tmp_path / "a.nii.gz", np.eye(9, dtype=np.uint8))
    described = {"labels": LABELS, "file_ending": ".nii.gz"}
    cells, _ = preview._cells(Predicted({"a": image}, {"a": file}, tmp_path, tmp_path, described), "a", {"left": {1}})
    assert len(cells) == 2 and np.array_equal(cells[1].masks["left"], np.eye(9, dtype=bool))


def test_the_page_has_the_first_cases_and_the_folder_all(predicted, read_page, monkeypatch):
    monkeypatch.setattr(preview, "MOST_CASES", 1)
    page = read_page(preview.write(predicted))
    assert "The page has the first 1 cases" in page.text and len(page.all("img")) == 4
    assert len(list((predicted.output / "preview").glob("*.png"))) == 3


def test_an_earlier_preview_is_replaced_and_nothing_else(predicted, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(nnunet_commands, "predict", lambda argv, then=None: called.append(then) or then(predicted))
    argv = ["predict", "--preview", "-i", "x", "-o", str(predicted.output)]
    assert cli.main(argv) == 0 and cli.main(argv) == 0
    assert capsys.readouterr().out.count("preview: ") == 2
    (predicted.output / "preview" / "mine.txt").write_text("mine")
    assert cli.main(argv) == 1 and len(called) == 2
    assert "holds files that are not of a preview (mine.txt)" in capsys.readouterr().err


@pytest.mark.parametrize("typed, meant", [("--previw", "--preview"), ("--save-entrop", "--save-entropy"),
                                          ("--disable_ta", "--disable_tta")])
def test_a_mistyped_option_gets_a_suggestion(typed, meant, tmp_path, capsys):
    """Whether it is nnU-Net's option, that of `nnunet_commands.predict`, or that of this module."""
    assert cli.main(["predict", typed, "-i", "x", "-o", str(tmp_path), "-d", "4", "-c", "2d"]) == 1
    assert f"unknown argument '{typed}' (did you mean '{meant}'?)" in capsys.readouterr().err


def test_pictures_of_parts_would_replace_each_other(capsys):
    assert cli.main(["predict", "-i", "images", "-o", "out", "-d", "27", "-c", "2d", "-num_parts", "2",
                     "--preview"]) == 1
    assert "--preview: each part would replace the pictures of the others" in capsys.readouterr().err
