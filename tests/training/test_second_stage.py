"""The second stage of a training, in which the student learns from labels that the teacher has completed."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_confkd import cli
from nnunet_confkd.data.supervision import FULL, OUTSIDE, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.checkpoints import require_teacher
from nnunet_confkd.inference.completion import TrainedModel, _load_predictor, _uses_hints
from nnunet_confkd.training.automatic import COMPLETE_AT
from nnunet_confkd.training.names import COMPLETED_LABELS
from nnunet_confkd.training.network import LEFT_IN_EPOCH, TEACHER_PREFIX, teacher_was_left, unwrap
from nnunet_confkd.training.second_stage import (
    PLACES,
    TwoStageLR,
    _structures_of_one_piece,
    begin_of_second_stage,
    complete_labels,
    draw_probabilities,
)
from nnunet_confkd.training.settings import Settings

HIPPOCAMPUS = "Dataset004_Hippocampus"
TWO_STAGES = {"complete_at": 0.5, "weight_kl": None, "epochs": 4, "iterations_per_epoch": 2, "seed": 0,
              "hint_watershed": True}
BASE = {"stages_2d": "2d", "stages_3d": "3d_fullres"}
SMALL = {"max_patch": 56, "batch_size": 2, "features": (2, 4, 4)}


@pytest.fixture(scope="module", params=("2d", "3d_fullres"))
def trained(request, nnunet, hippocampus):
    """A whole training: the folder of the fold, and of each iteration the epoch, the rate and what the batch holds."""
    from nnunet_confkd.training.trainer import ConfKDTrainer
    steps, train_step = [], ConfKDTrainer.train_step

    def recorded(trainer, batch):
        ignored = (batch["target"][0] == trainer.label_manager.ignore_label).flatten(1).any(1)
        result = train_step(trainer, batch)
        steps.append((trainer.current_epoch, trainer.optimizer.param_groups[0]["lr"], batch["num_full"],
                      ignored.tolist(), "hint_mask" in batch, {k: float(v) for k, v in result.items()},
                      list(map(str, batch["keys"]))))
        return result

    name = nnunet.configure(HIPPOCAMPUS, next(name for name, base in BASE.items() if base == request.param),
                            request.param, TWO_STAGES, **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfKDTrainer, "train_step", recorded)
        fold = nnunet.train(HIPPOCAMPUS, name)
    return name, fold, steps


def cases_in(fold) -> list[str]:
    return sorted(file.name.removesuffix(PLACES) for file in (fold / COMPLETED_LABELS).glob(f"*{PLACES}"))


@pytest.mark.parametrize("share, epochs, begin", [(0.25, 1000, 250), (0.1, 2, 1), (0.95, 3, 2), (0.0, 1000, None)])
def test_each_stage_has_an_epoch(share, epochs, begin):
    assert begin_of_second_stage(share, epochs) == begin
    if begin:
        rates = TwoStageLR(torch.optim.SGD([torch.zeros(1)], 0.1), 0.1, epochs, begin)
        assert [rates.at(epoch) == 0.1 for epoch in (0, begin, epochs - 1)] == [True, True, begin == epochs - 1]


def test_the_student_alone_learns_from_whole_labels_in_the_second_stage(trained, hippocampus):
    _, _, steps = trained
    first, second = ([step for step in steps if (step[0] >= 2) == late] for late in (False, True))
    assert len(first) == len(second) == 4
    for _, _, num_full, ignored, hinted, losses, _ in first:
        assert (num_full, ignored, hinted) == (1, [False, True], True)
        assert losses["loss_teacher"] > 0 and losses["loss_kl"] == 0
    for _, _, num_full, ignored, hinted, losses, _ in second:
        assert (num_full, ignored, hinted) == (2, [False, False], False)
        assert losses["loss_teacher"] == losses["loss_kl"] == losses["loss_entropy"] == 0
        assert losses["loss"] == losses["loss_student"] and losses["annotated_share"] == 1
    drawn = {case for *_, keys in second for case in keys}
    assert drawn & set(hippocampus["partial"]) and not drawn & set(hippocampus["unlabelled"])


def test_the_learning_rate_falls_to_zero_in_each_stage(trained):
    rates = dict(step[:2] for step in trained[2])
    assert rates[0] == rates[2] == 0.01 and rates[1] == rates[3] == pytest.approx(0.01 * 0.5 ** 0.9)


def test_the_labels_of_all_partially_annotated_cases_are_completed_once(trained, nnunet, hippocampus):
    name, fold, _ = trained
    trainer = nnunet.trainer(HIPPOCAMPUS, name, continue_training=True)
    kinds, ignore = trainer.find_supervision(), trainer.label_manager.ignore_label
    train, _ = trainer.do_split()
    partial = sorted(case for case in train if kinds[case] == PARTIAL)
    assert len(partial) == 30 and cases_in(fold) == partial
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, partial, str(fold / COMPLETED_LABELS))
    classes = 0
    for case in partial:
        _, seg, label, _ = dataset.load_case(case)
        seg, label = np.asarray(seg[:]), np.asarray(label[:])
        known = seg != ignore
        assert label.dtype == seg.dtype and np.array_equal(label[known], seg[known]) and known.mean() < 0.9
        assert not (label == ignore).any() and ((label == OUTSIDE) == (seg == OUTSIDE)).all()
        classes = max(classes, len(np.unique(label[~known])))
    assert classes > 1, "the teacher has predicted different classes"


def test_the_student_alone_is_validated_and_the_teacher_is_kept_beside_it(trained):
    _, fold, _ = trained
    before, after = (torch.load(fold / f"checkpoint_{name}.pth", map_location="cpu", weights_only=False)
                     for name in ("teacher", "final"))
    assert (before["current_epoch"], after["current_epoch"]) == (2, 4)
    weights = before["network_weights"], after["network_weights"]
    assert [teacher_was_left(of) for of in weights] == [False, True]
    assert weights[0].keys() == weights[1].keys() and any(name.startswith(TEACHER_PREFIX) for name in weights[0])
    assert not torch.equal(*(of["encoder.stages.0.0.convs.0.conv.weight"] for of in weights))
    assert (fold / "validation" / "summary.json").is_file() and not (fold / "validation_teacher").exists()


def test_the_teacher_predicts_from_its_own_checkpoint_alone(trained, nnunet, hippocampus, tmp_path, capsys):
    name, fold, _ = trained
    images = tmp_path / "images"
    images.mkdir()
    case = hippocampus["validation"][0]
    shutil.copy(nnunet.raw(HIPPOCAMPUS) / "imagesTr" / f"{case}_0000.nii.gz", images)
    command = ["predict", "-d", "4", "-i", str(images), "-o", str(tmp_path / "out"), "-c", name, "-f", "0", "-device",
               "cpu", "-npp", "1", "-nps", "1", "--branch"]
    for options in (["mean"], ["teacher", "-chk", "checkpoint_final.pth"]):
        assert cli.main([*command, *options]) == 1
        assert "so --branch has no use. The teacher as it was is in checkpoint_teacher.pth" in capsys.readouterr().err
    assert cli.main([*command, "teacher"]) == 0
    assert (tmp_path / "out" / f"{case}.nii.gz").is_file()
    model = TrainedModel(fold.parent, "teacher")
    assert (model.checkpoint_name, TrainedModel(fold.parent).checkpoint_name) == (
        "checkpoint_teacher.pth", "checkpoint_final.pth")
    with pytest.raises(InputError, match="so --branch teacher has no use"):
        _load_predictor(TrainedModel(fold.parent, "teacher", checkpoint="checkpoint_final.pth", device="cpu"))
    assert _load_predictor(replace(model, device="cpu"))[1] == ["0"] and _uses_hints(fold.parent, ["0"])


def test_a_training_goes_on_in_either_stage(trained, nnunet, tmp_path):
    name, fold, _ = trained

    def continued(checkpoint: str):
        trainer = nnunet.trainer(HIPPOCAMPUS, name, continue_training=True)
        trainer.initialize()
        trainer.load_checkpoint(str(fold / checkpoint))
        return trainer

    early, late = continued("checkpoint_teacher.pth"), continued("checkpoint_final.pth")
    assert (early.current_epoch, early.student_alone) == (2, False)
    assert (late.current_epoch, late.student_alone) == (4, True)
    early.output_folder = str(tmp_path / "fold_0")
    (tmp_path / "fold_0").mkdir()
    early.on_train_start()
    assert next(early.dataloader_train)["num_full"] == 1
    early.on_epoch_start()  # completes the labels again, with the same teacher
    assert early.student_alone and next(early.dataloader_train)["num_full"] == 2
    first, again = (sorted((folder / COMPLETED_LABELS).glob("*.b2nd")) for folder in (fold, tmp_path / "fold_0"))
    assert len(first) == len(again) > 0
    for files in zip(first, again):
        import blosc2
        assert np.array_equal(*(blosc2.open(str(file))[:] for file in files))
    longer = nnunet.configure(HIPPOCAMPUS, f"{name}_longer", BASE[name], TWO_STAGES | {"epochs": 20}, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, longer, continue_training=True)
    trainer.load_checkpoint(str(fold / "checkpoint_final.pth"))
    assert trainer.student_alone and trainer.second_stage == trainer.lr_scheduler.begin == 2, "as it has begun"
    late.output_folder = str(tmp_path / "empty")
    with pytest.raises(InputError, match="empty/completed_labels: lacks the completed labels of .*checkpoint_teacher"):
        late.get_dataloaders()


def test_a_first_stage_that_is_made_shorter_ends_at_once(trained, nnunet, tmp_path, monkeypatch):
    name, fold, _ = trained
    options = TWO_STAGES | {"epochs": 3, "complete_at": 0.3}
    shorter = nnunet.configure(HIPPOCAMPUS, f"{name}_shorter", BASE[name], options, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, shorter, continue_training=True)
    trainer.load_checkpoint(str(fold / "checkpoint_teacher.pth"))
    assert (trainer.current_epoch, trainer.second_stage) == (2, 1), "it should have begun before"
    trainer.output_folder = str(tmp_path)
    shutil.copytree(fold / COMPLETED_LABELS, tmp_path / COMPLETED_LABELS)
    monkeypatch.setattr("nnunet_confkd.training.trainer.complete_labels", lambda *args: None)
    trainer.on_train_start()
    trainer.on_epoch_start()
    assert trainer.student_alone and trainer.second_stage == trainer.lr_scheduler.begin == 2
    assert trainer.lr_scheduler.at(2) == 0.01 and next(trainer.dataloader_train)["num_full"] == 2
    assert teacher_was_left(unwrap(trainer.network).state_dict())


def test_weights_of_any_training_start_one_whose_teacher_completes_labels(trained, nnunet, tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    name, fold, _ = trained
    one_stage = nnunet.trainer(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, f"{name}_kl", BASE[name], TWO_STAGES | {
        "complete_at": 0.0, "weight_kl": 3.0, "hint_watershed": False}, **SMALL))
    one_stage.initialize()
    torch.save({"network_weights": one_stage.network.state_dict()}, tmp_path / "kl.pth")
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    trainer.initialize()
    for file in (tmp_path / "kl.pth", fold / "checkpoint_final.pth", fold / "checkpoint_teacher.pth"):
        load_pretrained_weights(trainer.network, str(file))
        weights = torch.load(file, weights_only=False)["network_weights"]
        found = trainer.network.state_dict()
        key = "encoder.stages.0.0.convs.0.conv.weight"
        assert torch.equal(found[key], weights[key]) and not teacher_was_left(found)


def test_each_branch_of_two_stages_is_exported_from_its_own_checkpoint(trained, nnunet, tmp_path):
    from nnunet_confkd.inference.export import _checkpoints, export
    _, fold, _ = trained
    student = export(fold.parent, tmp_path / "student")
    assert sorted(file.name for file in (student / fold.name).glob("*.pth")) == [
        "checkpoint_best.pth", "checkpoint_final.pth"]
    assert _checkpoints(fold, "teacher") == {fold / "checkpoint_teacher.pth": "checkpoint_final.pth"}
    with pytest.raises(InputError, match="checkpoint_teacher.pth: its teacher is narrower"):
        export(fold.parent, tmp_path / "teacher", branch="teacher")


def test_without_the_teacher_the_students_gradient_is_that_of_a_plain_network(nnunet, hippocampus):
    name = nnunet.configure(HIPPOCAMPUS, "stages_step", "2d", TWO_STAGES, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    trainer.initialize()
    network, images = unwrap(trainer.network), torch.randn(2, 1, 56, 56)
    student, teacher = network(images, 2, with_teacher=False)
    assert teacher is None
    sum(logits.square().sum() for logits in student).backward()
    found = {key: p.grad.clone() for key, p in network.named_parameters()}  # DDP needs a gradient of each
    network.zero_grad()
    sum(logits.square().sum() for logits in network.decoder(network.encoder(images))).backward()
    for key, p in network.named_parameters():
        expected = torch.zeros_like(p) if key.startswith(TEACHER_PREFIX) else p.grad
        assert torch.equal(found[key], expected), key


def test_what_cannot_be_completed_is_told_before_the_training(nnunet, hippocampus):
    name = nnunet.configure(HIPPOCAMPUS, "stages_none", "2d", TWO_STAGES, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    trainer.initialize()
    kinds, split = trainer.find_supervision(), trainer.do_split()
    trainer.do_split = lambda: ([case for case in split[0] if kinds[case] != PARTIAL], split[1])
    with pytest.raises(InputError, match='but no training case is partially annotated; set "complete_at": 0'):
        trainer.get_dataloaders()
    name = nnunet.configure(HIPPOCAMPUS, "stages_short", "2d", TWO_STAGES | {"epochs": 1}, **SMALL)
    with pytest.raises(InputError, match="there is one epoch alone"):
        nnunet.trainer(HIPPOCAMPUS, name).initialize()


@pytest.mark.parametrize("density, epochs, begin", [(10, 8, 2), (10, 1, None), (1, 8, None)])
def test_by_default_eroded_masks_are_completed(nnunet, hippocampus, density, epochs, begin):
    name = nnunet.configure(HIPPOCAMPUS, f"stages_of_{density}_{epochs}", "2d", TWO_STAGES | {
        "complete_at": None, "epochs": epochs}, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    kinds = trainer.find_supervision()
    full = next(case for case in kinds if kinds[case] == FULL)
    background = trainer.background[full] / trainer.foreground[full]
    for case in kinds:  # a fifth of the foreground of a fully annotated case, and of the background more
        if kinds[case] != FULL:
            trainer.foreground[case] = trainer.foreground[full] // 5
            trainer.background[case] = int(density * background * trainer.foreground[case])
        else:
            trainer.foreground[case], trainer.background[case] = trainer.foreground[full], trainer.background[full]
    trainer.initialize()
    block = trainer.plans_manager.plans["configurations"][name]["confkd"]
    assert trainer._may_have_two_stages() == (epochs > 1)
    assert trainer.second_stage == begin and bool(begin) == (LEFT_IN_EPOCH in trainer.network.state_dict())
    assert (block["complete_at"], block["weight_kl"]) == ((COMPLETE_AT, 0) if begin else (0, 3))


@pytest.mark.parametrize("epochs, begin", [(9000, 4500), (8999, None)])
def test_by_default_long_trainings_complete_masks_without_background(nnunet, hippocampus, epochs, begin):
    name = nnunet.configure(HIPPOCAMPUS, f"stages_together_{epochs}", "2d", TWO_STAGES | {
        "complete_at": None, "hint_watershed": None, "epochs": epochs}, **SMALL)  # two iterations each
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    kinds = trainer.find_supervision()
    trainer.foreground = dict.fromkeys(kinds, 100) | {case: 20 for case in kinds if kinds[case] == PARTIAL}
    trainer.background |= {case: 0 for case in kinds if kinds[case] == PARTIAL}
    trainer.initialize()
    block = trainer.plans_manager.plans["configurations"][name]["confkd"]
    assert (trainer.second_stage, block["complete_at"]) == (begin, 0.5 if begin else 0)
    assert (block["weight_kl"], block["hint_watershed"]) == (3, False)


@pytest.mark.parametrize("weight_kl, branch", [(None, "teacher"), (3.0, "mean")])
def test_labels_that_both_branches_complete_keep_the_largest_component(nnunet, hippocampus, monkeypatch, tmp_path,
                                                                       weight_kl, branch):
    name = nnunet.configure(HIPPOCAMPUS, f"stages_by_{branch}", "2d", TWO_STAGES | {"weight_kl": weight_kl}, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    trainer.initialize()
    trainer.find_supervision()
    trainer.output_folder = str(tmp_path)
    calls = []

    def predictor(trainer, branches):
        def predict(data, seg_prev, hints):
            logits = torch.zeros(trainer.label_manager.num_segmentation_heads, *data.shape[1:])
            logits[0] = 0.5
            logits[1, :, :9, :9] = logits[1, :, -3:, -3:] = 1  # two pieces, in opposite corners
            calls.append((branches, hints is not None))
            return {branches[0]: logits}
        return predict

    monkeypatch.setattr("nnunet_confkd.training.second_stage.CasePredictor", predictor)
    case = hippocampus["partial"][0]
    complete_labels(trainer, [case])
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case], str(tmp_path / COMPLETED_LABELS))
    _, seg, label, _ = dataset.load_case(case)
    seg, label = np.asarray(seg[0]), np.asarray(label[0])
    known = seg != trainer.label_manager.ignore_label
    assert calls == [([branch], True)] and np.array_equal(label[known], seg[known])
    large, small = (label[corner][~known[corner]] for corner in (np.s_[:, :9, :9], np.s_[:, -3:, -3:]))
    assert len(large) > len(small) > 0 and (large == 1).all() and (small == (branch == "teacher")).all()


def test_all_folds_complete_labels_or_none(nnunet, hippocampus, split):
    trainer = nnunet.trainer(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "stages_folds", "2d", TWO_STAGES | {
        "complete_at": None}, **SMALL))
    kinds = trainer.find_supervision()
    full, partial = ([case for case in kinds if kinds[case] == kind] for kind in (FULL, PARTIAL))
    split([{"train": full[1:] + partial, "val": full[:1]}, {"train": [full[0], partial[0]], "val": full[1:]}])
    assert trainer._may_have_two_stages()
    split([{"train": full[1:] + partial, "val": full[:1]}, {"train": full[:1], "val": full[1:]}])
    assert not trainer._may_have_two_stages()


@pytest.mark.parametrize("name, value", [("teacher_hints", False), ("weight_student", 0.0)])
def test_a_setting_that_leaves_nobody_to_complete_or_to_learn_is_refused(name, value):
    with pytest.raises(InputError, match=rf'complete_at is above 0, but {name} is .*set "complete_at": 0'):
        Settings(complete_at=0.25, **{name: value})


def test_labels_that_are_regions_are_completed_with_values_of_the_data_set(nnunet, regions):
    name = nnunet.configure(regions, "stages", "3d_fullres", TWO_STAGES | {
        "epochs": 2, "iterations_per_epoch": 1, "hint_watershed": False}, **SMALL)
    fold = nnunet.train(regions, name)
    trainer = nnunet.trainer(regions, name)
    ignore, folder = trainer.label_manager.ignore_label, fold / COMPLETED_LABELS
    cases = cases_in(fold)
    trainer.find_supervision()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases, str(folder))
    for case in cases:
        _, seg, label, _ = dataset.load_case(case)
        seg, label = np.asarray(seg[:]), np.asarray(label[:])
        assert np.array_equal(label[seg != ignore], seg[seg != ignore])
        assert set(np.unique(label)) <= {OUTSIDE, *trainer.label_manager.all_labels}
    assert cases and (fold / "validation" / "summary.json").is_file()


def test_the_teachers_own_checkpoint_is_looked_for_in_the_folds_that_are_asked_for(tmp_path):
    for file in ("fold_0/checkpoint_teacher.pth", "fold_0/checkpoint_final.pth", "fold_1/checkpoint_final.pth"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    names = [TrainedModel(tmp_path, "teacher", folds).checkpoint_name for folds in (["0"], ["0", "1"])]
    assert names == ["checkpoint_teacher.pth", "checkpoint_final.pth"]


# ---- unlabelled cases, which a network without a teacher labels -----------------------------------------------------

LABELS_ITSELF = {"weight_kl": None, "epochs": 5, "iterations_per_epoch": 4, "seed": 0, "complete_at": 0.4}


@pytest.mark.parametrize("full, others, share", [(3, 57, 0.25), (30, 30, 0.5)])
def test_a_quarter_of_the_draws_at_least_is_fully_annotated(full, others, share):
    found = draw_probabilities([f"f{i}" for i in range(full)], [f"u{i}" for i in range(others)])
    assert sum(found.values()) == pytest.approx(1) and len(set(found.values())) == (2 if share == 0.25 else 1)
    assert sum(value for case, value in found.items() if case[0] == "f") == pytest.approx(share)


def declare_unlabelled(workspace, cases) -> None:
    for folder in (workspace.raw(HIPPOCAMPUS), workspace.preprocessed(HIPPOCAMPUS)):
        file = folder / "dataset.json"
        described = json.loads(file.read_text())
        file.write_text(json.dumps(described | {"supervision": dict.fromkeys(cases, UNLABELLED)}))


def test_without_a_teacher_the_network_labels_the_unlabelled_cases(own_hippocampus, hippocampus, monkeypatch):
    from nnunet_confkd.training.trainer import ConfKDTrainer
    declare_unlabelled(own_hippocampus, hippocampus["partial"])
    name = own_hippocampus.configure(HIPPOCAMPUS, "itself", "2d", LABELS_ITSELF, **SMALL)
    batches, train_step = [], ConfKDTrainer.train_step

    def recorded(trainer, batch):
        ignored = bool((batch["target"][0] == trainer.label_manager.ignore_label).any())
        batches.append((trainer.current_epoch, set(map(str, batch["keys"])), ignored, "mix" in batch,
                        trainer.optimizer.param_groups[0]["lr"]))
        return train_step(trainer, batch)

    monkeypatch.setattr(ConfKDTrainer, "train_step", recorded)
    fold = own_hippocampus.train(HIPPOCAMPUS, name)
    trainer = own_hippocampus.trainer(HIPPOCAMPUS, name, continue_training=True)
    unlabelled = set(hippocampus["partial"] + hippocampus["unlabelled"])
    stages = [[batch for batch in batches if (batch[0] >= 2) == late] for late in (False, True)]
    drawn = [set().union(*(keys for _, keys, *_ in stage)) for stage in stages]
    assert (len(stages[0]), len(stages[1])) == (8, 12) and not any(batch[2] for batch in batches)
    assert not drawn[0] & unlabelled and drawn[1] & unlabelled and drawn[1] & set(hippocampus["full"])
    assert all(any(mix for *_, mix, _ in stage) for stage in stages)
    rates = {epoch: rate for epoch, *_, rate in batches}
    assert rates[0] == rates[2] == 0.01 > rates[1] and rates[3] > rates[4]
    assert cases_in(fold) == sorted(unlabelled & set(trainer.do_split()[0]))

    # what was annotated in a case that is declared unlabelled does not reach its label
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, hippocampus["partial"],
                                    str(fold / COMPLETED_LABELS))
    kept = []
    for case in set(hippocampus["partial"]) & set(cases_in(fold)):
        _, seg, label, _ = dataset.load_case(case)
        seg, label = np.asarray(seg[:]), np.asarray(label[:])
        annotated = (seg > 0) & (seg != trainer.label_manager.ignore_label)
        kept.append((label[annotated] == seg[annotated]).mean())
        assert not (label == trainer.label_manager.ignore_label).any()
    assert np.mean(kept) < 0.9

    longer = own_hippocampus.configure(HIPPOCAMPUS, "itself_longer", "2d", LABELS_ITSELF | {"epochs": 8}, **SMALL)
    trainer = own_hippocampus.trainer(HIPPOCAMPUS, longer, continue_training=True)
    trainer.initialize()
    trainer.output_folder = str(fold)
    trainer.load_checkpoint(str(fold / "checkpoint_final.pth"))
    trainer.on_train_start()  # as --c does
    assert (trainer.current_epoch, trainer.second_stage) == (5, 2), "as it has begun"
    assert set().union(*(map(str, next(trainer.dataloader_train)["keys"]) for _ in range(8))) & unlabelled
    for checkpoint, began in (("checkpoint_teacher.pth", None), ("checkpoint_final.pth", 2)):
        trainer = own_hippocampus.trainer(HIPPOCAMPUS, name, continue_training=True)
        trainer.initialize()
        trainer.load_checkpoint(str(fold / checkpoint))
        assert not trainer.two_branches and trainer.student_alone == bool(began)
        assert trainer.second_stage == 2 and trainer.current_epoch == (5 if began else 2)
    log = "".join(file.read_text() for file in fold.glob("training_log_*.txt"))
    assert "component is kept: the whole foreground, label 1, label 2" in log and "complete_at 0.4" in log
    assert f"The student completes the labels of {len(cases_in(fold))} training" in log


def test_what_is_labelled_depends_on_the_cases_that_train_and_on_the_length(own_hippocampus, hippocampus, monkeypatch):
    declare_unlabelled(own_hippocampus, hippocampus["partial"][1:])  # one is partially annotated
    for name, partial, least, expected in (("held_back", [], 20, 2), ("short", [], 21, None),
                                           ("partial", hippocampus["partial"][:1], 20, None)):
        monkeypatch.setattr("nnunet_confkd.training.trainer.LONG", least)
        own_hippocampus.configure(HIPPOCAMPUS, name, "2d", LABELS_ITSELF | {"complete_at": None}, **SMALL)
        split = [{"train": [*hippocampus["full"], *hippocampus["unlabelled"], *partial],
                  "val": hippocampus["validation"]}]
        (own_hippocampus.preprocessed(HIPPOCAMPUS) / "splits_final.json").write_text(json.dumps(split))
        trainer = own_hippocampus.trainer(HIPPOCAMPUS, name)
        trainer.initialize()
        assert not trainer.two_branches and trainer.second_stage == expected, name
        with open(trainer.log_file) as log:
            text = log.read()
        assert ("The network labels them" in text) == (name == "held_back")
        assert (f"in trainings of at least {least} iterations" in text) == (name == "short")
        assert ("partially annotated cases have so few" in text) == (name == "partial")
    own_hippocampus.configure(HIPPOCAMPUS, "entropy", "2d", LABELS_ITSELF | {
        "complete_at": None, "weight_entropy": 0.1}, **SMALL)
    split = [{"train": [*hippocampus["full"], *hippocampus["unlabelled"]], "val": hippocampus["validation"]}]
    (own_hippocampus.preprocessed(HIPPOCAMPUS) / "splits_final.json").write_text(json.dumps(split))
    trainer = own_hippocampus.trainer(HIPPOCAMPUS, "entropy")
    trainer.initialize()
    with open(trainer.log_file) as log:
        text = log.read()
    assert "They teach by their entropy alone" in text and "They are left out" not in text


def test_the_labels_of_regions_keep_all_components(regions, nnunet):
    trainer = nnunet.trainer(regions, nnunet.configure(regions, "pieces", "3d_fullres", LABELS_ITSELF, **SMALL))
    assert trainer.find_supervision() and _structures_of_one_piece(trainer) == []


def test_components_stay_if_the_setting_says_so(nnunet, hippocampus):
    kept = []
    for largest in (True, False):
        name = nnunet.configure(HIPPOCAMPUS, f"pieces_{largest}", "2d", LABELS_ITSELF | {
            "largest_components": largest}, **SMALL)
        trainer = nnunet.trainer(HIPPOCAMPUS, name)
        trainer.find_supervision()
        kept.append(_structures_of_one_piece(trainer))
    assert kept == [[(1, 2), 1, 2], []]


def test_the_full_share_that_is_set_is_that_of_the_second_stage(nnunet, hippocampus, monkeypatch):
    name = nnunet.configure(HIPPOCAMPUS, "share_of_second", "2d", LABELS_ITSELF | {
        "weight_teacher": 0.0, "weight_kl": 0.0, "weight_entropy": 0.0, "full_share": 0.6, "cutmix": 0.0}, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    trainer.find_supervision()
    monkeypatch.setattr("nnunet_confkd.training.trainer.CompletedCases", lambda dataset, *args: dataset)
    train = trainer.dataset_class(trainer.preprocessed_dataset_folder,
                                  [*hippocampus["full"], *hippocampus["unlabelled"]])
    _, options = trainer._completed_cases(train, 0.0)
    assert sum(options["probabilities"][case] for case in hippocampus["full"]) == pytest.approx(0.6)
    assert options["complete"] == []


def test_a_network_that_labels_cases_has_no_teacher_to_predict_with(tmp_path):
    for file, words in (("checkpoint_teacher.pth", "it is the network that labelled"),
                        ("checkpoint_final.pth", "no teacher, so")):
        with pytest.raises(InputError, match=f"{file}: holds no teacher.*--branch has nothing") as error:
            require_teacher(tmp_path / file, {"network_weights": {"encoder.weight": torch.zeros(1)}}, "--branch")
        assert words in str(error.value)


def test_partially_annotated_cases_are_not_completed_without_a_teacher(nnunet, hippocampus):
    name = nnunet.configure(HIPPOCAMPUS, "stages_alone", "2d", LABELS_ITSELF | {
        "complete_at": 0.4, "weight_teacher": 0.0, "weight_kl": 0.0}, **SMALL)
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    trainer.initialize()
    with pytest.raises(InputError, match='complete_at is above 0, but weight_teacher is 0.*set "complete_at": 0'):
        trainer.get_dataloaders()
