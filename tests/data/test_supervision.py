from __future__ import annotations

import json
import os

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_confkd.data.images import count_voxels
from nnunet_confkd.data.supervision import (
    FULL,
    OUTSIDE,
    PARTIAL,
    UNLABELLED,
    annotation_counts,
    check_labels,
    decide_kinds,
    kind_of,
    lost_annotations,
    require_full,
    summary,
)
from nnunet_confkd.errors import InputError
from nnunet_confkd.training.batches import (
    TrainingCases,
)

IGNORE = 3
WITH_IGNORE = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": IGNORE}, None)
WITHOUT_IGNORE = LabelManager({"background": 0, "a": 1, "b": 2}, None)


# ---- kinds ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("label, kind", [
    ([0, 1, 2, 0], FULL),
    ([OUTSIDE, 0, 1, 1], FULL),  # background outside of the non-zero part is annotated
    ([IGNORE, IGNORE, 1, IGNORE], PARTIAL),
    ([IGNORE, IGNORE, OUTSIDE, IGNORE], UNLABELLED),  # where some voxels are ignored, training ignores -1, too
    ([IGNORE, IGNORE, IGNORE, IGNORE], UNLABELLED)])
def test_kind_follows_from_the_ignored_voxels(label, kind):
    assert kind_of(count_voxels(np.array(label), [OUTSIDE, 0, 1, 2, IGNORE]), IGNORE) == kind


COUNTS = {"f": {0: 5, 1: 2, IGNORE: 0}, "p": {0: 1, 1: 1, IGNORE: 5}, "u": {0: 0, 1: 0, IGNORE: 7}}


def test_table_may_lower_a_kind_and_leaves_the_others():
    assert decide_kinds(COUNTS, WITH_IGNORE) == {"f": FULL, "p": PARTIAL, "u": UNLABELLED}
    assert decide_kinds(COUNTS, WITH_IGNORE, {"f": PARTIAL}) == {"f": PARTIAL, "p": PARTIAL, "u": UNLABELLED}
    assert decide_kinds(COUNTS, WITH_IGNORE, {"p": UNLABELLED})["p"] == UNLABELLED


def test_the_summary_counts_the_kinds():
    assert summary({"a": FULL, "b": PARTIAL, "c": FULL}) == "2 full, 1 partial, 0 unlabelled"


def test_a_table_that_is_none_is_shown():
    with pytest.raises(InputError, match=r'"supervision" must be an object \{case: kind\}, got \[\]'):
        decide_kinds(COUNTS, WITH_IGNORE, [])


def test_a_case_declared_partial_that_has_no_annotated_voxel_is_unlabelled():
    assert decide_kinds(COUNTS, WITH_IGNORE, {"u": PARTIAL})["u"] == UNLABELLED


def test_all_that_is_wrong_with_the_table_is_told_at_once():
    with pytest.raises(InputError) as error:
        decide_kinds(COUNTS, WITH_IGNORE, {"p": FULL, "u": "weak", "stranger": FULL})
    assert str(error.value).split("\n  ") == [
        'dataset.json, "supervision":', "stranger: there is no such case among the preprocessed ones",
        "p: declared full, but 5 of its voxels are ignored; declare it partial or leave it out of the table",
        "u: 'weak' is no kind of supervision; use one of full, partial, unlabelled"]


def test_without_an_ignore_label_only_a_declaration_is_an_error():
    counts = {"f": {0: 5, 1: 2}}
    assert decide_kinds(counts, WITHOUT_IGNORE) == {"f": FULL}
    for kind in (PARTIAL, UNLABELLED):
        with pytest.raises(InputError, match='no "ignore"'):
            decide_kinds(counts, WITHOUT_IGNORE, {"f": kind})


def test_no_full_case_names_the_ignore_label_as_the_thing_to_use():
    with pytest.raises(InputError, match="ignore label alone"):
        require_full({"p": PARTIAL})
    require_full({"p": PARTIAL, "f": FULL})


@pytest.mark.parametrize("labels", [{"background": 0, "ignore": 1, "a": 2}, {"background": 0, "a": 2, "ignore": 4},
                                    {"background": 0, "whole": [1, 2], "core": [2], "ignore": 2}])
def test_an_ignore_label_that_is_not_the_highest_plus_one_is_refused(labels):
    with pytest.raises(InputError, match="highest other label plus one, 3"):
        check_labels({"labels": labels})


@pytest.mark.parametrize("described, text", [
    ({}, '"labels" must be .* \\(KeyError: '
         '\'labels\'\\)'), ({"labels": {"background": 0, "a": "x"}}, "ValueError: invalid literal"),
    ({"labels": {"a": 1, "b": 2}}, "dataset.json: Background label not declared")])
def test_labels_that_nnunet_cannot_use_are_refused_with_the_reason(described, text):
    with pytest.raises(InputError, match=text):
        check_labels(described)


def test_good_ignore_labels_pass():
    check_labels({"labels": {"background": 0, "a": 1}})
    check_labels(
        {"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, "regions_class_order": [1, 2]}
    )


# ---- counting on real preprocessed data -----------------------------------------------------------------------------

@pytest.fixture
def preprocessed(nnunet, hippocampus):
    return nnunet.preprocessed("Dataset004_Hippocampus") / "nnUNetPlans_2d"


def test_real_kinds_are_those_that_were_made(preprocessed, hippocampus):
    cases = [case for role in ("full", "partial", "unlabelled", "validation") for case in hippocampus[role]]
    kinds = decide_kinds(annotation_counts(preprocessed, cases, WITH_IGNORE), WITH_IGNORE)
    for role, kind in (("full", FULL), ("partial", PARTIAL), ("unlabelled", UNLABELLED), ("validation", FULL)):
        assert {kinds[case] for case in hippocampus[role]} == {kind}


def test_counts_are_kept_and_counted_again_when_a_label_changes(preprocessed, hippocampus, tmp_path, monkeypatch):
    import nnunet_confkd.data.supervision as module
    counted, bars = [], []
    monkeypatch.setattr(
        module, "tqdm", lambda values, *arguments, **options: bars.append((*arguments, options)) or values
    )
    monkeypatch.setattr(module, "count_voxels", lambda seg, labels: counted.append(1) or count_voxels(seg, labels))
    folder, cases = tmp_path / "data", sorted(hippocampus["partial"])[:3]
    folder.mkdir()
    for case in cases:
        for name in (f"{case}.b2nd", f"{case}_seg.b2nd", f"{case}.pkl"):
            (folder / name).write_bytes((preprocessed / name).read_bytes())
    cache = tmp_path / "cache.json"
    first = annotation_counts(folder, cases, WITH_IGNORE, cache)
    assert len(counted) == 3 and cache.is_file() and list(tmp_path.iterdir()) != []
    written = cache.stat().st_mtime_ns
    assert annotation_counts(folder, cases, WITH_IGNORE, cache) == first and len(counted) == 3
    assert cache.stat().st_mtime_ns == written
    # None: a bar where there is a terminal
    assert bars == [("count annotations", 3, {"disable": None}), ("count annotations", 3, {"disable": True})]
    replacement = preprocessed / f"{hippocampus['full'][0]}_seg.b2nd"
    (folder / f"{cases[0]}_seg.b2nd").write_bytes(replacement.read_bytes())
    changed = annotation_counts(folder, cases, WITH_IGNORE, cache)
    assert len(counted) == 4
    assert kind_of(changed[cases[0]], IGNORE) == FULL and changed[cases[1]] == first[cases[1]]
    cache.write_text("{ half a file")
    assert annotation_counts(folder, cases, WITH_IGNORE, cache) == changed and len(counted) == 7
    # another ignore label: the old counts do not answer the question
    more = LabelManager({"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}, None)
    assert annotation_counts(folder, cases, more, cache)[cases[1]] == first[cases[1]] | {4: 0} and len(counted) == 10


def test_a_label_value_that_dataset_json_does_not_list_is_an_error_naming_the_case(preprocessed, hippocampus):
    case = hippocampus["partial"][0]
    with pytest.raises(InputError, match=rf"{case}.*\[3\]"):
        annotation_counts(preprocessed, [case], WITHOUT_IGNORE)


def test_a_case_that_cannot_be_read_is_an_error_naming_it_and_the_reason(preprocessed, hippocampus, tmp_path):
    case = hippocampus["partial"][0]
    for name in (f"{case}.b2nd", f"{case}_seg.b2nd", f"{case}.pkl"):
        content = (preprocessed / name).read_bytes()
        (tmp_path / name).write_bytes(content[:len(content) // 2] if "_seg" in name else content)
    dataset = nnUNetDatasetBlosc2(str(tmp_path))
    for read in (
        lambda: annotation_counts(tmp_path, [case], WITH_IGNORE),
        lambda: TrainingCases(dataset).load_case(case),
    ):
        with pytest.raises(InputError) as error:
            read()
        reason = error.value.__cause__
        assert str(error.value).startswith(f"{tmp_path / case}: the preprocessed case cannot be read "
                                           f"({type(reason).__name__}: {reason}).")


def test_a_case_that_is_not_preprocessed_is_an_error_naming_it(preprocessed):
    with pytest.raises(InputError, match="nobody"):
        annotation_counts(preprocessed, ["nobody"], WITH_IGNORE)


def test_a_read_only_cache_is_no_reason_not_to_train(preprocessed, hippocampus, tmp_path):
    with pytest.warns(UserWarning, match="could not keep"):
        counts = annotation_counts(preprocessed, hippocampus["full"], WITH_IGNORE, tmp_path / "missing" / "cache.json")
    assert set(counts) == set(hippocampus["full"])


def test_annotations_that_resampling_lost_are_found_by_name(nnunet, hippocampus):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    labels = nnunet.preprocessed("Dataset004_Hippocampus") / "gt_segmentations"
    cases = [hippocampus["partial"][0], hippocampus["unlabelled"][0], "nobody"]
    assert lost_annotations(cases, labels, ".nii.gz", SimpleITKIO(), IGNORE) == cases[:1]


def test_cache_is_not_written_into_a_configurations_folder(nnunet, hippocampus):
    """A JSON file there makes nnU-Net fail to tell the data set's class."""
    trainer = nnunet.trainer("Dataset004_Hippocampus", "2d")
    trainer.find_supervision()
    assert os.path.isfile(nnunet.preprocessed("Dataset004_Hippocampus") / "confkd_supervision_nnUNetPlans_2d.json")
    assert not list((nnunet.preprocessed("Dataset004_Hippocampus") / "nnUNetPlans_2d").glob("*.json"))
    content = json.loads((nnunet.preprocessed("Dataset004_Hippocampus") /
                          "confkd_supervision_nnUNetPlans_2d.json").read_text())
    assert set(content["cases"]) == {c for role in hippocampus if role != "test" for c in hippocampus[role]}
