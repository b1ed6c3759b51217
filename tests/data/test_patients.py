"""Which cases belong to one patient, who trains and who validates."""
from __future__ import annotations

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_confkd.data.patients import choose_patients, patients_of, split_full_cases
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError

PATIENTS = [f"patient{i:03d}" for i in range(1, 101)]


def test_the_patient_is_the_first_group_of_the_pattern_or_all_that_it_matches():
    cases = ["p01_x", "p01_y", "p02_x"]
    assert patients_of(cases, None) == {case: case for case in cases}
    assert (
        patients_of(cases, r"(p\d+)_")
        == patients_of(cases, r"p\d+")
        == {"p01_x": "p01", "p01_y": "p01", "p02_x": "p02"}
    )


def test_cases_that_the_pattern_does_not_match_are_named():
    for pattern in (r"(p\d+)_", r"(p\d+)?.*", r"(p?)"):  # no match, a group without one, a group of nothing
        with pytest.raises(InputError) as error:
            patients_of(["p1_x", "q1_x", "r1_x"], pattern)
        assert str(error.value) == f"the patient pattern {pattern!r} does not match these cases; correct it: q1_x, r1_x"
    with pytest.raises(InputError) as error:
        patients_of([f"c{i}" for i in range(12)], "x")
    assert str(error.value).endswith("correct it: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 2 more")
    with pytest.raises(InputError) as error:
        patients_of(["p1"], "(p")
    assert str(error.value).startswith("the patient pattern '(p' is no regular expression: ")


def _of_role(roles, role):
    return {patient for patient, found in roles.items() if found == role}


def test_a_fifth_of_the_patients_validates_and_more_full_ones_hold_fewer():
    previous = set()
    for number in (1, 3, 5, 10, 80):
        roles = choose_patients(PATIENTS, 0, [str(number)])
        full = _of_role(roles, "full")
        assert len(full) == number and previous < full
        assert len(_of_role(roles, "validation")) == 20 and len(_of_role(roles, "other")) == 80 - number
        assert _of_role(roles, "validation") == _of_role(choose_patients(PATIENTS[::-1] * 2, 0, ["7"]), "validation")
        previous = full
    assert _of_role(choose_patients(PATIENTS, 1, ["3"]), "full") != _of_role(
        choose_patients(PATIENTS, 0, ["3"]), "full"
    )


def test_of_few_patients_one_validates_and_of_one_none():
    assert sorted(choose_patients(["a", "b"], 0, ["1"]).values()) == ["full", "validation"]
    assert choose_patients(["a"], 0, ["1"]) == {"a": "full"}


def test_patients_can_be_named_and_then_do_not_validate():
    default = choose_patients(PATIENTS, 0, ["1"])
    named = sorted(_of_role(default, "validation"))[:2]
    roles = choose_patients(PATIENTS, 0, named)
    assert _of_role(roles, "full") == set(named) and len(_of_role(roles, "validation")) == 20
    roles = choose_patients(PATIENTS, 0, ["3"], validation=["patient001"])
    assert _of_role(roles, "validation") == {"patient001"} and len(_of_role(roles, "full")) == 3


@pytest.mark.parametrize("full, validation, message", [
    (["patient001", "nobody", "x"], None, f"no such patients: nobody, x; there are {', '.join(PATIENTS[:10])} and 90 "
                                          f"more"),
    (["81"], None, "81 full patients are asked for; besides the 20 that validate there are 80 to choose from"),
    (["0"], None, "0 full patients are asked for; besides the 20 that validate there are 80 to choose from"),
    (PATIENTS[:81], None, "81 of 100 patients are to be full; name fewer, 20 are needed to validate"),
    (["patient002", "patient001"], ["patient001"], "these patients validate and cannot be among the full ones: "
                                                   "patient001")])
def test_patients_that_cannot_be_full_are_refused(full, validation, message):
    with pytest.raises(InputError) as error:
        choose_patients(PATIENTS, 0, full, validation)
    assert str(error.value) == message


# ---- folds ----------------------------------------------------------------------------------------------------------

def test_default_folds_validate_each_full_case_once_and_train_the_others_always():
    kinds = {f"f{i}": FULL for i in range(7)} | {"p": PARTIAL, "u": UNLABELLED}
    splits = split_full_cases(kinds)
    nnunets = generate_crossval_split(
        sorted(f"f{i}" for i in range(7)), seed=12345, n_splits=5
    )  # its own seed: the same in every run
    assert [split["val"] for split in splits] == [sorted(split["val"]) for split in nnunets]
    assert len(splits) == 5
    assert sorted(case for split in splits for case in split["val"]) == sorted(f"f{i}" for i in range(7))
    for split in splits:
        assert {"p", "u"} <= set(split["train"]) and not set(split["train"]) & set(split["val"])
    assert len(split_full_cases({"a": FULL, "b": FULL, "p": PARTIAL})) == 2
    with pytest.raises(InputError, match="^fewer than two patients .* Train on fold 'all' .confkd train ID "
                                         "CONFIGURATION all., or annotate another"):
        split_full_cases({"a": FULL, "p": PARTIAL})


def test_patients_are_never_split_and_those_with_partial_cases_only_train():
    kinds = {"p1_a": FULL, "p1_b": FULL, "p2_a": FULL, "p3_a": FULL, "p3_b": PARTIAL, "p4_a": UNLABELLED}
    splits = split_full_cases(kinds, {case: case[:2] for case in kinds})
    assert sorted(split["val"] for split in splits) == [["p1_a", "p1_b"], ["p2_a"]]
    for split in splits:
        assert sorted(split["train"] + split["val"]) == sorted(kinds)
    with pytest.raises(InputError, match="fewer than two patients"):
        split_full_cases({"p1_a": FULL, "p1_b": FULL}, {"p1_a": "p1", "p1_b": "p1"})


# ---- classes that some cases lack ------------------------------------------------------------------------------------

def hidden_set(**numbers):
    """{case: list} of so many cases for each list of classes, whose names are joined by "_"."""
    return {f"{classes}{k}": classes.split("_") for classes, number in numbers.items() for k in range(number)}


def by_class(lists, kinds=None, **options):
    kinds = {**dict.fromkeys(lists, PARTIAL), **(kinds or {})}
    return split_full_cases(kinds, lists=lists, complete=options.pop("complete", lists), **options), set(kinds)


def test_without_full_cases_each_fold_validates_on_each_list_of_classes():
    lists = hidden_set(liver=11, kidney_spleen=5)
    folds, cases = by_class(lists)
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(cases) and len(folds) == 5
    for fold in folds:
        assert set(fold["train"]) == cases - set(fold["val"])
        livers = sum(case.startswith("liver") for case in fold["val"])
        assert livers in (2, 3) and len(fold["val"]) - livers == 1
    assert by_class(lists) == by_class(dict(reversed(lists.items()))), "the order of the cases does not matter"


def test_no_fold_trains_without_a_class():
    lists = hidden_set(liver=9, kidney=1, liver_spleen=1, spleen=1)
    folds, cases = by_class(lists)
    validating = {case for fold in folds for case in fold["val"]}
    assert "kidney0" not in validating, "it is the only one"
    assert {"liver_spleen0", "spleen0"} & validating
    for fold in folds:
        assert {name for case in fold["train"] for name in lists[case]} == {"liver", "kidney", "spleen"}
    scribbles = hidden_set(liver=9, kidney=1) | {"scribbles": ["kidney"]}
    folds, _ = by_class(scribbles, complete=set(scribbles) - {"scribbles"})
    assert "kidney0" in {case for fold in folds for case in fold["val"]}, "there are scribbles to learn it from"
    assert all("scribbles" in fold["train"] for fold in folds)


def test_there_are_no_more_folds_than_patients_of_the_most_frequent_class():
    folds, _ = by_class(hidden_set(liver=2, kidney=2))
    assert len(folds) == 2 and all({case[:-1] for case in fold["val"]} == {"liver", "kidney"} for fold in folds)
    assert len(by_class(hidden_set(liver=20, kidney=2), folds=3)[0]) == 3
    with pytest.raises(InputError, match="fewer than two patients"):
        by_class(hidden_set(liver=1, kidney=1))


def test_few_full_cases_always_train_and_five_alone_validate():
    lists = hidden_set(liver=6)
    folds, _ = by_class(lists, {f"full{k}": FULL for k in range(4)})
    assert all({f"full{k}" for k in range(4)} <= set(fold["train"]) for fold in folds) and len(folds) == 5
    folds, _ = by_class(lists, {f"full{k}": FULL for k in range(5)})
    assert {case for fold in folds for case in fold["val"]} == {f"full{k}" for k in range(5)}
    folds, _ = by_class(lists, {f"full{k}": FULL for k in range(2)}, complete=())
    assert {case for fold in folds for case in fold["val"]} == {"full0", "full1"}, "the others have ignored voxels"


def test_a_patient_of_several_sources_stays_on_one_side():
    lists = {f"{source}_{k}": [source] for source in ("liver", "kidney") for k in range(6)}
    patients = {case: case[-1] for case in lists}
    folds, _ = by_class(lists, patients=patients)
    assert all({patients[case] for case in fold["val"]}.isdisjoint(patients[case] for case in fold["train"])
               for fold in folds)
    folds, _ = by_class(lists, {"x_0": UNLABELLED}, patients=patients | {"x_0": "0"})
    assert not any("x_0" in fold["val"] or "liver_0" in fold["val"] for fold in folds)


def test_patients_that_are_held_back_may_lack_classes():
    lists = hidden_set(liver=4, kidney=4)
    folds, _ = by_class(lists, held_back={"liver0", "kidney0"}, folds=1)
    assert [fold["val"] for fold in folds] == [["kidney0", "liver0"]] and len(folds[0]["train"]) == 6
