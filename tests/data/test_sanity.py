"""`confkd check` warns of cases that are not like the others, and of no case of real data sets."""
from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd.data import sanity
from nnunet_confkd.data.check import check_dataset
from nnunet_confkd.data.check_cases import CaseFiles, examine_case
from nnunet_confkd.data.images import Geometry, write

LABELS = {"background": 0, "left": 1, "right": 2, "spine": 3}
LPS, RPS = np.eye(3), np.diag((-1.0, 1.0, 1.0))


def anatomy(seed):
    """Two organs beside a spine, in the order z, y, x; x grows to the patient's left."""
    rng = np.random.default_rng(seed)
    label = np.zeros((6, 14, 24), np.uint8)
    for value, middle in ((1, 19), (2, 5), (3, 12)):
        x = middle + int(rng.integers(-1, 2))
        label[1:5, 4:9 + int(rng.integers(0, 3)), x - 2:x + 2] = value
    return label


class Cases:
    """Data set 7, of fully annotated cases with one channel."""

    def __init__(self, folder, number=12):
        self.folder, self.names = folder / "raw" / "Dataset007_Toy", [f"c{k:02d}" for k in range(number)]
        for part in ("imagesTr", "labelsTr"):
            (self.folder / part).mkdir(parents=True)
        (folder / "preprocessed").mkdir()
        for k, name in enumerate(self.names):
            self.write(name, anatomy(k))
        self.describe(LABELS)

    def describe(self, labels):
        (self.folder / "dataset.json").write_text(json.dumps({
            "channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(self.names), "file_ending": ".nii.gz"}))

    def write(self, name, label, direction=LPS):
        grid = Geometry(label.shape[::-1], (1.0, 2.0, 3.0), (5.0, 6.0, 7.0), tuple(direction.ravel().tolist()))
        noise = np.random.default_rng(int(name[1:])).normal(size=label.shape).astype(np.float32)
        for file, voxels in ((self.image(name), noise), (self.label(name), label)):
            file.unlink(missing_ok=True)
            write(file, voxels, grid)

    def image(self, name):
        return self.folder / "imagesTr" / f"{name}_0000.nii.gz"

    def label(self, name):
        return self.folder / "labelsTr" / f"{name}.nii.gz"

    def warnings(self):
        """All but that there is no split."""
        report = check_dataset(7, processes=1)
        assert not report.errors
        return [text for text in report.warnings if "there is no split" not in text]


@pytest.fixture
def cases(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return Cases(tmp_path)


def test_of_cases_that_are_alike_nothing_is_said(cases):
    assert cases.warnings() == []


def test_an_empty_label_is_named_with_what_to_do(cases):
    cases.write("c03", np.zeros((6, 14, 24), np.uint8))
    (text,) = cases.warnings()
    assert text.startswith("1 of 12 fully annotated cases have an empty label, background everywhere: "
                           f"{cases.label('c03')}. ") and "give them to confkd mix without a label" in text
    cases.describe({**LABELS, "ignore": 4})
    assert "if they are not annotated, write the ignore label, 4, into all of their voxels" in cases.warnings()[0]


def test_a_class_in_partial_cases_alone_and_background_in_none_are_named_with_the_files(cases):
    cases.describe({**LABELS, "other": 4, "ignore": 5})
    for name in ("c00", "c01"):
        label = anatomy(0)
        label[0, 0, 0] = 4
        cases.write(name, np.where(label == 0, 5, label).astype(np.uint8))
    background, other = cases.warnings()
    assert other.startswith("class other: annotated in no fully annotated training case, but in 2 partial cases "
                            f"({cases.label('c00')}, {cases.label('c01')}); ") and "--background-value" in other
    assert background.startswith("class background: annotated nowhere among the partial cases; ")
    assert background.endswith("draw some scribbles in the background, too: "
                               f"{cases.label('c00')}, {cases.label('c01')}")


def test_exchanged_sides_are_named(cases):
    label = anatomy(4)
    cases.write("c04", np.choose(label, [0, 2, 1, 3]).astype(np.uint8))
    (text,) = cases.warnings()
    assert text.startswith("1 of 12 fully annotated cases have classes on the other side than the others: "
                           f"{cases.label('c04')} (left and right: left, right). ")


def test_an_image_in_another_orientation_is_named_but_not_its_sides(cases):
    cases.write("c05", np.ascontiguousarray(anatomy(5)[:, :, ::-1]), RPS)
    (text,) = cases.warnings()
    assert text.startswith("1 of 12 training images are stored in another orientation than the others (axes to L, P, "
                           f"S): {cases.image('c05')} (axes to R, P, S). ") and 'DICOMOrient(image, "LPS")' in text


def test_a_wrong_direction_in_a_header_is_named_twice(cases):
    cases.write("c05", anatomy(5), RPS)
    assert ["orientation" in text for text in cases.warnings()] == [True, False]
    assert "(left and right: left, right)" in cases.warnings()[1]


def turned(degrees):
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


@pytest.mark.parametrize("number, others, expected", [
    (20, [RPS], ["o0"]), (4, [RPS], ["o0"]), (3, [RPS], []), (20, [RPS] * 3, []), (27, [RPS] * 3, ["o0", "o1", "o2"]),
    (20, [turned(40)], []), (20, [turned(50)], ["o0"]), (20, [LPS[:, [1, 0, 2]]], ["o0"])])
def test_orientations_differ_from_nearly_all_others(number, others, expected):
    """The directions of the others are oblique by up to 10 degrees."""
    rng = np.random.default_rng(0)
    cases = {f"c{k}": turned(rng.uniform(-1, 1) * (k > 0)) for k in range(number)}
    cases |= {f"o{k}": direction for k, direction in enumerate(others)}
    assert sanity.orientation_outliers(cases)[1] == expected


@pytest.mark.parametrize("places, number, found", [
    ([-0.3], 20, 1), ([-0.28, -0.31], 20, 2), ([-0.3] * 4, 20, 0), ([-0.3], 8, 0), ([-0.05], 20, 0),
    ([-0.3, 0.02], 20, 0), ([-0.9], 20, 0)])
def test_a_mirrored_class_is_about_as_far_on_the_other_side_and_nothing_is_between(places, number, found):
    rng = np.random.default_rng(1)
    usual = [*rng.normal(0.3, 0.02, number), *places]
    result = sanity.mirrored({str(k): np.array([[x, 0.0], [0.0, 0.0]]) for k, x in enumerate(usual)})
    assert result == {str(number + k): 0 for k in range(found)}


@pytest.mark.parametrize("middle, spread", [(0.3, 0.2), (0.08, 0.005)])
def test_a_class_that_is_not_always_on_one_side_is_never_mirrored(middle, spread):
    values = [*np.random.default_rng(2).normal(middle, spread, 30).clip(0.05), -middle]
    assert sanity.mirrored({str(k): np.array([[x], [0.0]]) for k, x in enumerate(values)}) == {}


def test_the_middle_of_a_class_is_told_in_the_patient_s_axes(tmp_path):
    label = np.zeros((4, 6, 10), np.uint8)
    label[1, 2, 7:9], label[3, 5, 0] = 1, 2
    grid = Geometry((10, 6, 4), (2.0, 1.0, 5.0), (3.0, 4.0, 5.0), tuple(RPS.ravel().tolist()))
    for name, voxels in (("i", np.arange(240, dtype=np.float32).reshape(4, 6, 10)), ("l", label)):
        write(tmp_path / f"{name}.nii.gz", voxels, grid)
    content = examine_case(CaseFiles((tmp_path / "i.nii.gz",), (0,), tmp_path / "l.nii.gz"), [0, 1, 2], None)
    assert content.shape.centers == {1: (1.0, 2.0, 7.5), 2: (3.0, 5.0, 0.0)}
    # x, y, z: 7.5, 2, 1 of a middle at 4.5, 2.5, 1.5; the foreground's is 5, 3, 5/3; three voxels of 10 cubic mm
    of_image, of_foreground = sanity.middles(content, 1)
    assert of_image == pytest.approx([-3 / 10, -0.5 / 6, -0.5 / 4])
    assert of_foreground * 30 ** (1 / 3) == pytest.approx([-2.5 * 2, -1, -2 / 3 * 5])


@pytest.fixture(scope="module", params=["acdc", "hippocampus"])
def real(request, test_data):
    """{case: its content} of 100 real cases."""
    if request.param == "acdc":
        labels = sorted((test_data / "acdc" / "training").glob("*/*_gt.nii.gz"))
        files = {label: label.with_name(label.name.replace("_gt", "")) for label in labels}
    else:
        labels = sorted((test_data / "hippocampus" / "labelsTr").glob("[!.]*.nii.gz"))
        files = {label: test_data / "hippocampus" / "imagesTr" / label.name for label in labels}
    assert len(files) == 200
    return {label.name: examine_case(CaseFiles((image,), (0,), label), [0, 1, 2, 3], None)
            for label, image in list(files.items())[::2]}


def test_no_real_case_is_an_outlier_and_a_mirrored_one_is(real):
    places = {value: {case: sanity.middles(content, value) for case, content in real.items()
                      if value in content.shape.volumes} for value in (1, 2, 3)}
    places = {value: of_class for value, of_class in places.items() if of_class}
    directions = {case: np.reshape(content.grid.direction, (3, 3)) for case, content in real.items()}
    assert sanity.orientation_outliers(directions)[1] == []
    assert [sanity.mirrored(of_class) for of_class in places.values()] == [{}] * len(places)

    case = "hippocampus_001.nii.gz"
    if case in real:  # of hearts, the ventricles' sides differ too much
        places[1][case] = -places[1][case]
        assert sanity.mirrored(places[1]) == {case: 1}
    last = list(real)[-1]
    directions[last] = directions[last] @ RPS
    assert sanity.orientation_outliers(directions)[1] == [last]


def test_the_orientation_s_name_is_simpleitk_s():
    image = sitk.DICOMOrient(sitk.Image(2, 3, 4, sitk.sitkUInt8), "RAS")
    assert sanity.axes_text(np.reshape(image.GetDirection(), (3, 3))) == "axes to R, A, S"
