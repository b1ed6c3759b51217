"""The layouts that people have, from their files to the data set that is written."""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from image_files import file_states, read_json, read_voxels, write_image

from nnunet_confkd import cli
from nnunet_confkd.data.mix import mix, mixture
from nnunet_confkd.errors import InputError

SHAPE = (4, 6, 5)
FULL, SCRIBBLES, NOTHING = ("m1", "m2"), ("s1", "s2", "s3"), ("u1",)


def _image(file: Path, seed: int = 0) -> Path:
    return write_image(file, np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32))


def _label(file: Path, kind: str = "full") -> Path:
    """A mask of 0 and 1, or scribbles: 0 is not annotated, 1 the organ, 2 background."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:3, 1:4, 1:4] = 1
    if kind != "full":
        label[...] = 0
        label[1, 1, 1:4], label[1, 5, 1:4] = 1, 2
    return write_image(file, label)


WRITTEN = {0: 2, 1: 1, 2: 0}  # of scribbles: not annotated becomes ignore, 2 becomes background


@pytest.fixture
def folders(tmp_path):
    """One folder of images, one of masks, one of scribbles."""
    for seed, case in enumerate((*FULL, *SCRIBBLES, *NOTHING)):
        _image(tmp_path / "images" / f"{case}.nii.gz", seed)
    for case in FULL:
        _label(tmp_path / "masks" / f"{case}_seg.nii.gz")
    for case in SCRIBBLES:
        _label(tmp_path / "scribbles" / f"{case}-scribble.nii.gz", "partial")
    return tmp_path


def _options(folder, **more):
    return {"images": [folder / "images"], "full_labels": [folder / "masks"], "partial_labels": [folder / "scribbles"],
            "labels": ["background", "organ"], "ignore_value": 0, "background_value": 2, "processes": 1} | more


def _require_written(target: Path, scribbles: dict[str, Path]) -> None:
    assert read_json(target / "dataset.json")["supervision"] == {
        **dict.fromkeys(FULL, "full"), **dict.fromkeys(SCRIBBLES, "partial"), **dict.fromkeys(NOTHING, "unlabelled")}
    for case, file in scribbles.items():
        given, written = read_voxels(file), read_voxels(target / "labelsTr" / f"{case}.nii.gz")
        assert np.array_equal(written, np.vectorize(WRITTEN.get)(given))
    assert (read_voxels(target / "labelsTr" / "u1.nii.gz") == 2).all()
    full = read_voxels(target / "labelsTr" / "m1.nii.gz")
    assert np.array_equal(np.unique(full), [0, 1]) and full.sum() == 18


def _refused(nnunet_folders, expected, folder, **options):
    before = file_states(folder)
    with pytest.raises(InputError, match=expected) as caught:
        mix(None, 7, **_options(folder, **options))
    assert not list((nnunet_folders / "raw").iterdir()) and file_states(folder) == before
    return str(caught.value)


# ---- one folder of images --------------------------------------------------------------------------------------------

def test_images_masks_and_scribbles_in_folders_of_their_own(folders, nnunet_folders):
    target = mix(None, 7, **_options(folders))
    _require_written(target, {case: folders / "scribbles" / f"{case}-scribble.nii.gz" for case in SCRIBBLES})


def test_everything_in_one_folder(folders, nnunet_folders):
    everything = folders / "all"
    everything.mkdir()
    for file in [f for name in ("images", "masks", "scribbles") for f in (folders / name).iterdir()]:
        shutil.copy(file, everything / file.name)
    options = {"images": [everything], "full_labels": [f"{everything}/*_seg.nii.gz"],
               "partial_labels": sorted(everything.glob("*-scribble.nii.gz"))}  # as a shell hands them over
    target = mix(None, 7, **_options(folders, **options))
    _require_written(target, {case: everything / f"{case}-scribble.nii.gz" for case in SCRIBBLES})


def test_capital_endings_are_those_of_the_format(folders, nnunet_folders):
    file = folders / "images" / "m1.nii.gz"
    file.rename(file.with_name("m1.NII.GZ"))
    target = mix(None, 7, **_options(folders))
    assert read_json(target / "dataset.json")["file_ending"] == ".nii.gz"
    _require_written(target, {})
    for file in (folders / "images").glob("*.nii.gz"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
    target = mix(None, 8, **_options(folders))
    assert read_json(target / "dataset.json")["file_ending"] == ".nii.gz"
    _require_written(target, {})


def test_a_case_without_a_channel_that_others_have_is_refused(folders, nnunet_folders):
    for case in (*FULL, *SCRIBBLES, *NOTHING):
        for channel in ("T1", "T2"):
            (folders / "p" / case).mkdir(parents=True, exist_ok=True)
            shutil.copy(folders / "images" / f"{case}.nii.gz", folders / "p" / case / f"{channel}.nii.gz")
    (folders / "p" / "s2" / "T1.nii.gz").unlink()
    options = {"images": [folders / "p"], "pattern": ["{case}/T1.nii.gz", "{case}/T2.nii.gz"]}
    _refused(nnunet_folders, r"the case 's2' has no image s2/T1\.nii\.gz", folders, **options)
    both = [f"{folders}/p/{{case}}/{channel}.nii.gz" for channel in ("T1", "T2")]
    _refused(nnunet_folders, r"the case 's2' has no image .*/p/s2/T1\.nii\.gz", folders, images=both)
    (folders / "p" / "s2" / "T2.nii.gz").rename(folders / "p" / "s2" / "T1.nii.gz")
    options["pattern"] = ["{case}/T*.nii.gz"]
    _refused(nnunet_folders, "the case 'm1' has several files of one channel", folders, **options)


def test_numbers_of_unlabelled_images_are_cases_if_labelled_cases_have_one_channel(folders, nnunet_folders):
    for kind, cases in (("full", FULL), ("unlabelled", ("scan_0000", "scan_0001", "scan_0002"))):
        for number, case in enumerate(cases):
            _image(folders / kind / "images" / f"{case}.nii.gz", number)
            if kind == "full":
                _label(folders / kind / "labels" / f"{case}.nii.gz")
    target = mix(folders / "full", 7, unlabelled=folders / "unlabelled", labels=["background", "organ"], processes=1)
    assert {"scan_0000", "scan_0001", "scan_0002"} < set(read_json(target / "dataset.json")["supervision"])


def test_names_with_accents_of_macos_and_patterns_of_a_shell(folders, nnunet_folders):
    for place, name in (("images", "m1"), ("masks", "m1_seg")):
        file = folders / place / f"{name}.nii.gz"
        file.rename(file.with_name(("M\u00fcller" if place == "images" else "Mu\u0308ller") + ".nii.gz"))
    target = mix(None, 7, **_options(folders))
    assert read_json(target / "dataset.json")["supervision"]["M\u00fcller"] == "full"
    file = folders / "masks" / "m2_seg.nii.gz"
    file.rename(file.with_name("m2_JD_v2.nii.gz"))
    (folders / "masks" / "Mu\u0308ller.nii.gz").unlink()
    with pytest.raises(InputError, match=r"--full-labels '.*/masks/\{case\}_JD_v2\.nii\.gz'") as caught:
        mix(None, 8, **_options(folders, full_labels=[f"{folders}/masks/*v2.nii.gz"], partial_labels=[]))
    assert "--label-pattern" not in str(caught.value)


def test_leftover_labels_in_a_shared_folder_are_told(folders, nnunet_folders):
    shutil.copy(folders / "masks" / "m1_seg.nii.gz", folders / "images" / "m1_pred.nii.gz")
    shutil.copy(folders / "masks" / "m2_seg.nii.gz", folders / "images" / "u1_label_old.nii.gz")
    _image(folders / "images" / "m1_2.nii.gz")
    (warning,) = [note for note in mixture(**_options(folders), name="X").notes if "WARNING" in note]
    assert "2 images without a label" in warning and "m1_pred" in warning and "u1_label_old" in warning


def test_cases_of_one_patient_and_a_missing_file_of_a_class_are_noted(folders, nnunet_folders):
    for number, case in enumerate(("p1_a", "p1_b", "p2_a", "p2_b")):
        _image(folders / "scans" / f"{case}.nii.gz", number)
        for organ in ("liver", "spleen")[:1 + (case != "p2_b")]:
            label = np.zeros(SHAPE, np.uint8)
            label[1, 1 + (organ == "spleen"), 1:4] = 1
            write_image(folders / "organs" / case / f"{organ}.nii.gz", label)
    options = {"images": [folders / "scans"], "full_labels": [f"{folders}/organs/{{case}}"], "processes": 1,
               "labels": ["background", "liver", "spleen"], "name": "Notes"}
    notes = mixture(**options).notes
    assert any("4 cases have 2 beginnings, such as p1_" in note for note in notes)
    assert any("1 full label without a file of 'spleen'" in note and "organs/p2_b" in note for note in notes)
    assert not any("beginnings" in note for note in mixture(**options, patient_pattern="(p.)_").notes)


def test_masks_beside_their_images_need_no_pattern(folders, nnunet_folders):
    for file in (folders / "masks").iterdir():
        shutil.copy(file, folders / "images")
    target = mix(None, 7, **_options(folders, full_labels=[folders / "images"]))
    _require_written(target, {})


def test_a_folder_for_each_patient(folders, nnunet_folders):
    for case in (*FULL, *SCRIBBLES, *NOTHING):
        (folders / "patients" / case).mkdir(parents=True)
        shutil.copy(folders / "images" / f"{case}.nii.gz", folders / "patients" / case / "T1.nii.gz")
        for name, label in (("masks", f"{case}_seg"), ("scribbles", f"{case}-scribble")):
            if (folders / name / f"{label}.nii.gz").is_file():
                shutil.copy(folders / name / f"{label}.nii.gz", folders / "patients" / case / f"{name}.nii.gz")
    root = folders / "patients"
    target = mix(None, 7, **_options(
        folders, images=[root], pattern=["{case}/T1.nii.gz"], full_labels=[f"{root}/{{case}}/masks.nii.gz"],
        partial_labels=[f"{root}/{{case}}/scribbles.nii.gz"]))
    _require_written(target, {case: root / case / "scribbles.nii.gz" for case in SCRIBBLES})


def test_patterns_within_the_folder_of_each_kind(folders, nnunet_folders):
    for kind, cases, label in (("full", FULL, "masks/{}_seg"), ("partial", SCRIBBLES, "scribbles/{}-scribble"),
                               ("unlabelled", NOTHING, None)):
        for case in cases:
            for channel in ("T1", "T2"):
                (folders / kind / case).mkdir(parents=True, exist_ok=True)
                shutil.copy(folders / "images" / f"{case}.nii.gz", folders / kind / case / f"{channel}.nii.gz")
            if label:
                shutil.copy(folders / f"{label.format(case)}.nii.gz", folders / kind / case / "seg.nii.gz")
    target = mix(folders / "full", 7, partial=folders / "partial", unlabelled=folders / "unlabelled",
                 pattern=["{case}/T1.nii.gz", "{case}/T2.nii.gz"], label_pattern="{case}/seg.nii.gz",
                 labels=["background", "organ"], ignore_value=0, background_value=2, processes=1)
    _require_written(target, {case: folders / "partial" / case / "seg.nii.gz" for case in SCRIBBLES})
    assert len(list((target / "imagesTr").iterdir())) == 12


def test_without_partial_labels_the_others_are_unlabelled(folders, nnunet_folders):
    target = mix(None, 7, **_options(folders, partial_labels=[], ignore_value=None, background_value=None))
    kinds = read_json(target / "dataset.json")["supervision"]
    assert {case for case, kind in kinds.items() if kind == "unlabelled"} == {*SCRIBBLES, *NOTHING}


def test_a_dataset_json_beside_the_masks_names_the_labels(folders, nnunet_folders):
    (folders / "masks" / "dataset.json").write_text('{"labels": {"background": 0, "spleen": 1}}')
    target = mix(None, 7, **_options(folders, labels=None))
    assert read_json(target / "dataset.json")["labels"] == {"background": 0, "spleen": 1, "ignore": 2}


# ---- what was matched ------------------------------------------------------------------------------------------------

def _command(folder, *more):
    return ["mix", "--images", f"{folder}/images", "--full-labels", f"{folder}/masks", "--partial-labels",
            f"{folder}/scribbles", "--labels", "background", "organ", "--ignore-value", "0", "--background-value", "2",
            "--id", "7", "--processes", "1", *more]


def test_a_dry_run_shows_the_table_and_writes_nothing(folders, nnunet_folders, capsys):
    assert cli.main(_command(folders, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == [
        f"in {folders}:", "case  kind        images            label",
        "m1    full        images/m1.nii.gz  masks/m1_seg.nii.gz",
        "m2    full        images/m2.nii.gz  masks/m2_seg.nii.gz"]
    assert "s3    partial     images/s3.nii.gz  scribbles/s3-scribble.nii.gz\n" in out
    assert "u1    unlabelled  images/u1.nii.gz  -\n" in out
    assert out.endswith("nothing was written: this was a dry run\n")
    assert not list((nnunet_folders / "raw").iterdir())


def test_a_dry_run_finds_what_writing_finds(folders, nnunet_folders, capsys):
    file = folders / "masks" / "m1_seg.nii.gz"
    write_image(file, read_voxels(file)[:-1])
    errors = []
    for more in (["--dry-run"], []):
        assert cli.main(_command(folders, *more)) == 1
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1] and f"{file}: is on another grid than" in errors[0]
    assert not list((nnunet_folders / "raw").iterdir())


def test_a_file_that_fits_two_patterns_belongs_to_the_narrower_one(folders, nnunet_folders):
    together = folders / "together"
    (folders / "masks").rename(together)
    for case in SCRIBBLES:
        (folders / "scribbles" / f"{case}-scribble.nii.gz").rename(together / f"{case}_x_seg.nii.gz")
    target = mix(None, 7, **_options(folders, full_labels=[f"{together}/{{case}}_seg.nii.gz"],
                                     partial_labels=[f"{together}/{{case}}_x_seg.nii.gz"]))
    kinds = read_json(target / "dataset.json")["supervision"]
    assert {case for case, kind in kinds.items() if kind == "partial"} == {*SCRIBBLES}


def test_a_resampled_mask_that_does_not_cover_its_image_is_told(folders, nnunet_folders):
    file = folders / "masks" / "m1_seg.nii.gz"
    label = read_voxels(file)
    write_image(file, label[:, :-1])
    wide = folders / "masks" / "m2_seg.nii.gz"
    write_image(wide, np.pad(read_voxels(wide), 1), origin=(-1, -1, -1))
    notes = mixture(**_options(folders), resample_labels=True).notes
    share = 1 - 1 / label.shape[1]
    assert notes[-1].startswith(f"note: labels that do not cover their image: 1 (m1_seg.nii.gz {share:.1%})")


def test_no_stroke_is_lost_on_a_coarser_grid(folders, nnunet_folders):
    """A partial label of half the spacing, in which single voxels are drawn that nearest neighbours pass over."""
    file = folders / "scribbles" / f"{SCRIBBLES[0]}-scribble.nii.gz"
    label = read_voxels(file)
    fine = np.zeros([2 * size for size in label.shape], label.dtype)
    drawn = np.argwhere(label == 1)[::3]
    fine[tuple((2 * drawn + [1, 0, 1]).T)] = 1
    write_image(file, fine, spacing=(0.5, 0.5, 0.5), origin=(-0.25, -0.25, -0.25))
    target = mix(None, 7, **_options(folders), resample_labels=True)
    written = read_voxels(target / "labelsTr" / f"{SCRIBBLES[0]}.nii.gz")
    assert sorted(map(tuple, np.argwhere(written == 1))) == sorted(map(tuple, drawn))


def test_a_dry_run_ends_with_what_is_wrong(folders, nnunet_folders, capsys):
    _label(folders / "masks" / "nobody_seg.nii.gz")
    assert cli.main(_command(folders, "--dry-run")) == 1
    out, err = capsys.readouterr()
    assert "m1    full" in out and "nobody_seg.nii.gz: has no image in" in err


def test_a_long_table_is_cut_unless_it_is_a_dry_run(folders, nnunet_folders, capsys):
    for number in range(12):
        _image(folders / "images" / f"more{number:02d}.nii.gz", number)
    assert cli.main(_command(folders)) == 0
    out = capsys.readouterr().out
    assert "... and 8 more  unlabelled" in out and "more05" not in out and "next: confkd check -d 7" in out
    assert cli.main(_command(folders, "--dry-run")) == 0
    assert "more11" in capsys.readouterr().out


# ---- what is wrong ---------------------------------------------------------------------------------------------------

def test_a_label_without_an_image_is_no_reason_for_an_unlabelled_case(folders, nnunet_folders):
    (folders / "scribbles" / "s1-scribble.nii.gz").rename(folders / "scribbles" / "s1_JD.nii.gz")
    text = _refused(nnunet_folders, "has no image in", folders)
    assert f"is: --partial-labels '{folders / 'scribbles'}/{{case}}_JD.nii.gz'" in text
    found = mixture(**_options(folders, partial_labels=[f"{folders / 'scribbles'}/{{case}}_JD.nii.gz"])).sources
    assert [case.name for source in found if source.kind == "partial" for case in source.cases] == ["s1"]


def test_exchanged_folders_are_asked_about(folders, nnunet_folders):
    question = "masks: the names are like those of labels; are --images and --full-labels exchanged?"
    exchanged = {"images": [folders / "masks"], "full_labels": [folders / "images"]}
    assert question in _refused(nnunet_folders, "has no image in", folders, **exchanged)
    exchanged = {"full_labels": [folders / "scribbles"], "partial_labels": [folders / "masks"]}
    _refused(nnunet_folders, "Are the full and the partial labels exchanged", folders, **exchanged)
    _label(folders / "masks" / "m1_seg.nii.gz", "partial")  # the value of scribbles in a mask is no such sign
    assert "exchanged?" not in _refused(nnunet_folders, "a full label may hold 0, 1", folders)
    (folders / "masks" / "m1_seg.nii.gz").rename(folders / "masks" / "m1_JD.nii.gz")  # nor is a name
    (folders / "masks" / "m2_seg.nii.gz").unlink()
    assert "exchanged?" not in _refused(nnunet_folders, "has no image in", folders)


@pytest.mark.parametrize("shape", [SHAPE, (8, 8, 8)], ids=["few values", "many values"])
def test_an_image_in_the_place_of_a_label_is_told(folders, nnunet_folders, shape):
    write_image(folders / "images" / "m1.nii.gz", np.zeros(shape, np.float32))
    write_image(folders / "masks" / "m1_seg.nii.gz", np.arange(np.prod(shape), dtype=np.int16).reshape(shape))
    _refused(nnunet_folders, "(?i)m1_seg.nii.gz: .*it looks like an image: are the images and the labels exchanged",
             folders)


def test_two_labels_of_one_image(folders, nnunet_folders):
    _label(folders / "masks" / "m1-label.nii.gz")
    text = _refused(nnunet_folders, "two labels belong to it", folders)
    assert "m1_seg.nii.gz" in text and "m1-label.nii.gz" in text and "images/m1.nii.gz" in text


def test_an_image_with_a_mask_and_scribbles(folders, nnunet_folders):
    _label(folders / "scribbles" / "m1.nii.gz", "partial")
    _refused(nnunet_folders, r"m1\.nii\.gz: has a full label, .*masks/m1_seg\.nii\.gz, and a partial one, "
                             r".*scribbles/m1\.nii\.gz", folders)


def test_the_same_files_as_full_and_partial_labels(folders, nnunet_folders):
    text = _refused(nnunet_folders, "is given as a full label and as a partial one", folders,
                    partial_labels=[folders / "masks"])
    assert "give patterns" in text


@pytest.mark.parametrize("options, pattern", [
    ({"full_labels": []}, "--full-labels is missing"), ({"images": []}, "no images are given: --images"),
    ({"full_labels": ["nowhere"]}, "nowhere: there is no such folder or file"),
    ({"full": Path("x")}, "x: there is no such folder"),
    ({"label_pattern": "seg.nii.gz"}, "a pattern needs {case}")])
def test_options_that_do_not_fit(folders, nnunet_folders, options, pattern):
    full = options.pop("full", None)
    with pytest.raises(InputError, match=pattern):
        mix(full, 7, **_options(folders, **options))


def test_both_layouts_at_once(folders, nnunet_folders):
    with pytest.raises(InputError, match="give either --full"):
        mix(folders, 7, **_options(folders))


def test_a_folder_without_labels(folders, nnunet_folders):
    (folders / "empty").mkdir()
    _refused(nnunet_folders, "empty: holds no labels", folders, partial_labels=[folders / "empty"])


def test_unlabelled_images_that_are_labelled_elsewhere_are_left_out(folders, nnunet_folders, capsys):
    for case in FULL:
        for sub, file in (("images", f"images/{case}.nii.gz"), ("labels", f"masks/{case}_seg.nii.gz")):
            (folders / "full" / sub).mkdir(parents=True, exist_ok=True)
            shutil.copy(folders / file, folders / "full" / sub / f"{case}.nii.gz")
    code = cli.main(["mix", "--full", f"{folders}/full", "--unlabelled", f"{folders}/images", "--labels", "background",
                     "organ", "--id", "7", "--processes", "1"])
    out = capsys.readouterr().out
    assert code == 0 and "note: 2 unlabelled images are left out, because they are the images of labelled cases: m1, m2"
    kinds = read_json(nnunet_folders / "raw" / "Dataset007_Mixed" / "dataset.json")["supervision"]
    assert sorted(kinds.values()) == ["full"] * 2 + ["unlabelled"] * 4 and "note: 2 unlabelled images" in out


# ---- values ----------------------------------------------------------------------------------------------------------

def test_equal_values_are_one_message_with_the_option(folders, nnunet_folders):
    text = _refused(nnunet_folders, "^3 labels", folders, background_value=None)
    assert "3 labels hold the value 2; a partial label may hold 0, 1. If 2 marks scribbles in the background: " \
           "--background-value 2." in text
    assert "All that is held: 0: 95.0 %, 1: 2.5 %, 2: 2.5 %" in text and text.count("--background-value") == 1
    assert text.count("scribble.nii.gz") == 3


def test_scribbles_given_as_masks_are_told_what_they_hold(folders, nnunet_folders):
    text = _refused(nnunet_folders, "^3 labels", folders, full_labels=[folders / "scribbles"], partial_labels=[])
    assert "0: 95.0 %, 1: 2.5 %, 2: 2.5 %" in text
    assert "If 0 is *not annotated*, these are partial labels: --ignore-value 0 --background-value 2." in text


def test_a_missing_ignore_value_is_told_with_what_is_held(folders, nnunet_folders):
    text = _refused(nnunet_folders, "--ignore-value is missing", folders, ignore_value=None)
    assert "The labels hold 0: 95.0 %, 1: 2.5 %, 2: 2.5 %; " in text
    assert "if 0 is *not annotated*: --ignore-value 0 --background-value 2" in text


def test_a_class_that_only_scribbles_have_is_noted(folders, nnunet_folders, capsys):
    command = _command(folders)
    at = command.index("--background-value")
    assert cli.main([*command[:at], *command[at + 2:], "--labels", "background", "organ", "tumour"]) == 0
    assert "note: tumour (value 2) is in partial labels only" in capsys.readouterr().out


def test_equal_problems_of_many_files_are_one_line(folders, nnunet_folders):
    for case in SCRIBBLES + FULL:
        _image(folders / "images" / f"{case}.nii.gz").unlink()
        write_image(folders / "images" / f"{case}.nii.gz", np.full(SHAPE, np.nan, np.float32))
    text = _refused(nnunet_folders, "5 files: 120 voxels are not finite", folders)
    assert text.count("not finite") == 1 and "m2.nii.gz" in text


# ---- grids -----------------------------------------------------------------------------------------------------------

def test_a_label_on_another_grid_is_refused_with_both_grids_and_the_option(folders, nnunet_folders):
    label = read_voxels(folders / "masks" / "m1_seg.nii.gz").repeat(2, axis=2)
    write_image(folders / "masks" / "m1_seg.nii.gz", label, spacing=(0.5, 1, 1), origin=(-0.25, 0, 0))
    text = _refused(nnunet_folders, "m1_seg.nii.gz: is on another grid than .*images/m1.nii.gz", folders)
    assert "the label has 10x6x4 voxels of 0.5x1x1 mm at -0.25, 0, 0, the image 5x6x4 voxels of 1x1x1 mm" in text
    assert "--resample-labels" in text
    target = mix(None, 7, **_options(folders, resample_labels=True))
    assert np.array_equal(read_voxels(target / "labelsTr" / "m1.nii.gz"), label[..., ::2])


def test_where_a_resampled_label_ends_nothing_is_annotated(folders, nnunet_folders):
    scribbles = folders / "scribbles" / "s1-scribble.nii.gz"
    given = read_voxels(scribbles)
    write_image(scribbles, given[:2].copy())
    target = mix(None, 7, **_options(folders, resample_labels=True))
    written = read_voxels(target / "labelsTr" / "s1.nii.gz")
    assert (written[2:] == 2).all() and np.array_equal(written[:2], np.vectorize(WRITTEN.get)(given[:2]))


def test_a_label_of_another_place_is_refused_even_if_it_may_be_resampled(folders, nnunet_folders):
    write_image(folders / "masks" / "m1_seg.nii.gz", read_voxels(folders / "masks" / "m1_seg.nii.gz"),
                origin=(500, 0, 0))
    _refused(nnunet_folders, "nothing of it lies in the image", folders, resample_labels=True)


@pytest.mark.parametrize("place", ["masks", "scribbles"])
def test_what_would_be_cut_off_is_told_before_a_label_is_resampled(folders, nnunet_folders, place):
    """Drawn at half the size, and saved with twice the spacing: only a part of it would lie in the image."""
    file = next((folders / place).glob("*1*"))
    write_image(file, read_voxels(file), spacing=(2, 2, 2))
    _refused(nnunet_folders, f"{file.name}: is on another grid .* % of what is drawn in it lies outside of the image",
             folders, resample_labels=True)


def test_a_label_that_has_lost_its_header_is_not_resampled(folders, nnunet_folders):
    for file in (folders / "images").iterdir():
        write_image(file, read_voxels(file), spacing=(0.5, 0.5, 1))
    for folder in ("masks", "scribbles"):
        for file in (folders / folder).iterdir():
            write_image(file, read_voxels(file), spacing=(0.5, 0.5, 1))
    file = folders / "masks" / "m1_seg.nii.gz"
    write_image(file, read_voxels(file))
    _refused(nnunet_folders, r"m1_seg\.nii\.gz: is as large as its image, but without a place.*CopyInformation",
             folders, resample_labels=True)


def test_a_pattern_with_brackets_is_inside_of_its_folder(folders, nnunet_folders):
    target = mix(None, 7, **_options(folders, images=[f"{folders}/image[s]/*.nii.gz"]))
    _require_written(target, {case: folders / "scribbles" / f"{case}-scribble.nii.gz" for case in SCRIBBLES})


def test_a_partial_label_of_very_many_values_is_not_said_to_lack_the_ignore_value(folders, nnunet_folders):
    names = ["background", *(f"part_{i}" for i in range(1, 301))]
    label = np.zeros((10, 6, 5), np.uint16)
    for case in (*FULL, *SCRIBBLES, *NOTHING):
        write_image(folders / "images" / f"{case}.nii.gz", np.random.default_rng(0).normal(size=label.shape))
    label.reshape(-1)[:] = np.arange(300)
    for case in FULL:
        write_image(folders / "masks" / f"{case}_seg.nii.gz", label)
    label.reshape(-1)[270:] = 999
    for case in SCRIBBLES:
        write_image(folders / "scribbles" / f"{case}-scribble.nii.gz", label)
    target = mix(None, 7, **_options(folders, labels=names, ignore_value=999, background_value=None))
    assert (read_voxels(target / "labelsTr" / "s1.nii.gz") == 301).sum() == 30
