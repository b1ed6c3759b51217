"""The trainer on real data: steps, settings and variants, bad input, and whole runs."""
from __future__ import annotations

import json
import shutil
import sys
import types
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.checks import warning_of_intensities, warning_of_spinning_threads, warnings_of_split
from nnunet_confkd.training.hints import HintSampler
from nnunet_confkd.training.losses import TERMS
from nnunet_confkd.training.network import TwoBranchUNet
from nnunet_confkd.training.recovery import explain_stop

HIPPOCAMPUS = "Dataset004_Hippocampus"
# A patch contains a whole image: one step of the sliding window. Few features, because the CPU mirrors it eight times.
WHOLE = {"max_patch": 56, "batch_size": 2, "features": (2, 4, 4)}
SHORT = {"epochs": 1, "iterations_per_epoch": 3, "seed": 0, "full_share": 0.5}


@pytest.fixture
def started(nnunet, hippocampus):
    """Starts a trainer up to its first batch."""
    def start(dataset, configuration, trainer="ConfKDTrainer"):
        made = nnunet.trainer(dataset, configuration, trainer)
        made.on_train_start()
        made.on_train_epoch_start()
        return made

    return start


def plans_of(nnunet, dataset: str = HIPPOCAMPUS):
    """The plans, and a function that writes them back."""
    file = nnunet.preprocessed(dataset) / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    return plans, lambda: file.write_text(json.dumps(plans))


# ---- choices --------------------------------------------------------------------------------------------------------

def test_masks_that_are_held_back_decide_nothing(nnunet, hippocampus, split):
    trainer = nnunet.trainer(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "held_back", "2d", SHORT))
    kinds = trainer.find_supervision()
    held_back, *full = (case for case in kinds if kinds[case] == "full")
    others = [case for case in kinds if kinds[case] != "full"]

    def parts():  # the mask of the case counts little, or much
        for trainer.foreground[held_back] in (1, 10 ** 6):
            yield trainer._annotations(kinds).part

    split([{"train": [*full, *others], "val": [held_back]}])
    assert len(set(parts())) == 1
    split([{"train": [*full, *others], "val": [held_back]}, {"train": [held_back, *others], "val": full}])
    assert len(set(parts())) == 2, "in another fold it trains"


def test_fold_all_is_not_told_to_delete_a_split(nnunet):
    kinds = {"a": "full", "b": "partial", "c": "unlabelled"}
    told = [warnings_of_split(fold, ["a", "b"], ["b", "c"], kinds, None, "", ()) for fold in (0, "all")]
    assert ["Delete splits_final.json" in "".join(texts) for texts in told] == [True, False]
    assert all("2 validation case(s) are not fully annotated" in "".join(texts) for texts in told)


# ---- steps ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", ["2d", "3d_fullres"])
def test_a_step_moves_every_part_and_reports_every_term(nnunet, started, base):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, f"step_{base}", base, SHORT))
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    for _ in range(2):
        result = trainer.train_step(next(trainer.dataloader_train))
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    for part in ("encoder.", "decoder.", "teacher_decoder."):
        assert any(name.startswith(part) for name in moved)
    assert all(np.isfinite(value) for value in result.values())
    assert all(result[f"loss_{term}"] != 0 for term in TERMS)
    assert 1 / 3 < result["student_confidence"] < 1
    # half of the batch is fully annotated, the other half has points
    assert 0.5 < result["annotated_share"] < 0.53


def test_the_padding_of_partially_annotated_images_is_not_annotated(nnunet, started):
    """The padding of a fully annotated image is background."""
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "padding", "2d", SHORT))
    padding, points = 0, []
    for _ in range(6):
        batch = next(trainer.dataloader_train)
        assert not any((target == -1).any() for target in batch["target"])
        num_full, target, inside = batch["num_full"], batch["target"][0], batch["inside"]
        assert (target[:num_full] != 3).all() and (target[:num_full][~inside[:num_full]] == 0).all()
        assert (target[num_full:][~inside[num_full:]] == 3).all()
        assert not (batch["hint_mask"] & ~inside).any()
        padding += int((~inside).sum())
        points.append((target[num_full:] != 3).float().mean())
    assert padding > 0 and 0 < np.mean(points) < 0.03


def test_regions_train_and_validate(nnunet, regions, started):
    trainer = started(regions, nnunet.configure(regions, "tiny", "3d_fullres", SHORT))
    assert trainer.network.decoder.seg_layers[-1].out_channels == 2
    result = trainer.train_step(next(trainer.dataloader_train))
    assert all(np.isfinite(value) for value in result.values())
    assert result["loss_kl"] > 0 and result["loss_entropy"] > 0
    with torch.no_grad():
        counts = trainer.validation_step(next(trainer.dataloader_val))
    assert counts["tp_hard"].shape == counts["teacher_fn_hard"].shape == (2,)


def test_a_batch_of_one_trains_with_and_without_a_fully_annotated_image(nnunet, started):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "one", "2d", SHORT, batch_size=1))
    found = {}
    for _ in range(4):
        batch = next(trainer.dataloader_train)
        found[batch["num_full"]] = trainer.train_step(batch)
    assert set(found) == {0, 1}
    # on an image that is not fully annotated the teacher sees the annotations, and teaches
    assert found[0]["loss_teacher"] == 0 < found[0]["loss_kl"] and found[0]["loss_entropy"] > 0
    assert found[1]["loss_entropy"] == 0 != found[1]["loss_teacher"]


def test_the_teacher_sees_the_annotations_of_all_images_and_teaches_on_them(nnunet, started):
    options = SHORT | {"kl_images": "all"}
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "hints", "2d", options, batch_size=8))
    seen = []
    trainer.network.teacher_decoder.hints.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    full_hinted = 0
    for _ in range(4):
        batch = next(trainer.dataloader_train)
        seen.clear()
        trainer.train_step(batch)
        hints = torch.cat([hints.labels for hints in seen])  # of the fully annotated images, then of the others
        target, num_full, hint_mask = batch["target"][0], batch["num_full"], hints > 0
        assert torch.equal(hint_mask[num_full:], target[num_full:] != 3)
        assert 0 < hint_mask[:num_full].float().mean() < 0.05
        assert not (hint_mask & ~batch["inside"]).any()
        assert torch.equal(hints[hint_mask] - 1, target[hint_mask])
        full_hinted += int(hint_mask[:num_full].flatten(1).any(1).sum())
    assert full_hinted > 8


@pytest.mark.parametrize("variant", ["", "_partialOnly"])
def test_the_student_sees_mixed_images_and_the_teacher_the_images_as_they_are(nnunet, started, variant):
    options = SHORT | {"cutmix": 1, "kl_ramp_start": 0, "kl_ramp_end": 0}
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "mixed", "2d", options, batch_size=4),
                      f"ConfKDTrainer{variant}")
    seen = []
    trainer.network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = next(trainer.dataloader_train)
    values = trainer.train_step(batch)
    student, *teacher = seen
    assert torch.equal(student, batch["mix"](batch["data"])) and not torch.equal(student, batch["data"])
    assert [torch.equal(images, batch["data"]) for images in teacher] == ([] if variant else [True])
    assert np.isfinite(list(values.values())).all()
    off = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "unmixed", "2d", SHORT | {"cutmix": 0}),
                  f"ConfKDTrainer{variant}")
    assert "mix" not in next(off.dataloader_train)


def test_hints_are_simulated_on_full_images_that_have_exchanged_boxes(nnunet, started):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "exchange", "2d", {**SHORT, "cutmix_full": 1.0}))
    kinds = [type(step).__name__ for step in trainer.dataloader_train.data_loader.complete]
    assert kinds.index("FullCutMix") < kinds.index("HintSampler")
    batch = next(trainer.dataloader_train)
    target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
    assert "mix" not in batch and (target[:batch["num_full"]] != 3).all(), "only whole labels were exchanged"
    assert np.isfinite(trainer.train_step(batch)["loss"])


def test_hints_leave_the_batches_as_they_are(nnunet, started):
    def batches(name, block):
        loader = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, name, "2d", SHORT | block)).dataloader_train
        drawn = [next(loader) for _ in range(2)]
        return [(list(b["keys"]), float(b["data"].sum())) for b in drawn], ["hint_mask" in b for b in drawn]

    with_hints, without = (batches(f"hints_{on}", {"teacher_hints": on}) for on in (True, False))
    assert with_hints[0] == without[0] and all(with_hints[1]) and not any(without[1])


def test_the_teacher_of_a_kl_on_fully_annotated_images_runs_on_these_alone(nnunet, hippocampus, started):
    options = SHORT | {"full_share": 0.25, "kl_images": "full", "cutmix": 0}
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "seen_full", "2d", options, batch_size=8))
    seen = []
    trainer.network.teacher_decoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0][0])))
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    assert seen == [2] and "hint_mask" not in batch
    assert [case in hippocampus["full"] for case in batch["keys"]] == [True] * 2 + [False] * 6


def test_fully_annotated_images_and_others_have_equal_weights_if_enough_is_annotated(nnunet, started):
    """These cases have points, which are too few."""
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "weigh", "2d", SHORT, batch_size=4))
    log = Path(trainer.log_file)
    assert "full_share 0.5, equal_kinds false, teacher_trains_encoder true, hint_reach 4" in log.read_text()
    assert trainer.network.teacher_decoder.hints.reach == 4, "the points of the background are hints, too"
    batch = next(trainer.dataloader_train)
    joint = trainer.train_step(batch)["loss_student"]
    trainer.foreground = dict.fromkeys(trainer.foreground, 100)  # as much in each case
    trainer.get_dataloaders()
    assert trainer.loss.equal_kinds and not trainer.network.teacher_trains_encoder
    assert "equal_kinds true, teacher_trains_encoder false" in log.read_text()
    assert abs(trainer.train_step(batch)["loss_student"] - joint) > 1e-3


def test_with_few_annotations_there_is_no_teacher(nnunet, started):
    """The training is that of the trainer without a teacher, to the bit."""
    configuration = nnunet.configure(HIPPOCAMPUS, "few", "2d", SHORT | {"weight_kl": None}, batch_size=4)
    losses = []
    for variant in ("", "_partialOnly"):
        trainer = started(HIPPOCAMPUS, configuration, f"ConfKDTrainer{variant}")
        assert not isinstance(trainer.network, TwoBranchUNet)
        losses.append([trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(2)])
        told = "so few annotations that there is no teacher" in Path(trainer.log_file).read_text()
        assert told is (variant == "") and trainer.settings.weight_teacher == 0
        written = trainer.plans_manager.plans["configurations"][configuration]["confkd"]
        assert written["weight_teacher"] == written["weight_kl"] == written["weight_entropy"] == 0
    assert losses[0] == losses[1]
    asked = nnunet.configure(HIPPOCAMPUS, "few_asked", "2d", SHORT | {"weight_kl": 1.0}, batch_size=4)
    assert isinstance(started(HIPPOCAMPUS, asked).network, TwoBranchUNet)


def test_unlabelled_cases_alone_are_left_out_if_they_are_not_labelled(nnunet, hippocampus, monkeypatch, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "alone", "2d", SHORT | {"weight_kl": None, "full_share": None,
                                                                          "complete_at": 0.0})
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    trainer.find_supervision()
    monkeypatch.setattr(trainer, "kinds", {case: "unlabelled" if kind == "partial" else kind
                                           for case, kind in trainer.kinds.items()})
    trainer.initialize()
    trainer.on_train_start()
    assert "They are left out" in Path(trainer.log_file).read_text()
    assert not isinstance(trainer.network, TwoBranchUNet)
    batch = next(trainer.dataloader_train)
    assert batch["num_full"] == len(batch["keys"]) and set(batch["keys"]) <= set(hippocampus["full"])


def test_the_share_of_fully_annotated_images_follows_from_the_annotations(nnunet, hippocampus, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "share", "2d", {"seed": 0, "epochs": 1}, batch_size=10)
    trainer = started(HIPPOCAMPUS, configuration)
    voxels = dict.fromkeys(("full", "partial", "unlabelled"), 0)
    train = trainer.do_split()[0]
    for case in train:
        label = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)[1][:]
        voxels[trainer.kinds[case]] += int(((label == 1) | (label == 2)).sum())
    assert voxels["full"] and voxels["partial"] and not voxels["unlabelled"]
    share = voxels["full"] / sum(voxels.values())
    for name, low in (("ConfKDTrainer", 0.5), ("ConfKDTrainer_partialOnly", 0.25)):
        trainer, expected = started(HIPPOCAMPUS, configuration, name), min(max(share, low), 0.75)
        assert next(trainer.dataloader_train)["num_full"] == round(10 * expected)
        assert f"full_share {expected:.3g}, " in Path(trainer.log_file).read_text()
        recorded = json.loads(Path(trainer.output_folder, "confkd.json").read_text())["chosen"]
        assert recorded["full_share"] == pytest.approx(expected) and None not in recorded.values()
    chosen = nnunet.configure(HIPPOCAMPUS, "share_set", "2d", SHORT | {"full_share": 0.4}, batch_size=10)
    assert next(started(HIPPOCAMPUS, chosen).dataloader_train)["num_full"] == 4


def test_validation_batches_are_fully_annotated_and_count_as_nnunet_does(nnunet, hippocampus, started):
    """nnU-Net's own validation_step, on a network that gives our student's output."""
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "val", "2d", SHORT))
    batch = next(trainer.dataloader_val)
    assert set(batch["keys"]) <= set(hippocampus["validation"])
    stock = nnunet.trainer(HIPPOCAMPUS, "val", "nnUNetTrainer")
    stock.initialize()
    weights = {k: v for k, v in trainer.network.state_dict().items() if not k.startswith("teacher_decoder.")}
    stock.network.load_state_dict(weights)
    seen = []
    trainer.network.teacher_decoder.hints.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        ours = trainer.validation_step({**batch, "target": [t.clone() for t in batch["target"]]})
        theirs = stock.validation_step(batch)
    for key in ("loss", "tp_hard", "fp_hard", "fn_hard"):
        np.testing.assert_array_equal(ours[key], theirs[key])
    # the teacher is validated as it is trained: with hints
    assert len(seen) == 1 and torch.equal(seen[0].labels > 0, batch["hint_mask"]) and batch["hint_mask"].any()


def test_partial_only_has_one_branch_and_nnunets_loss_to_the_bit(nnunet, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "fair", "2d", SHORT | {"prior_correction": 0, "cutmix": 0})
    trainer = started(HIPPOCAMPUS, configuration, "ConfKDTrainer_partialOnly")
    assert not isinstance(trainer.network, TwoBranchUNet)
    batch = next(trainer.dataloader_train)
    stock = nnunet.trainer(HIPPOCAMPUS, "fair", "nnUNetTrainer")
    stock.initialize()
    stock.network.load_state_dict(trainer.network.state_dict())
    ours = trainer.train_step({**batch, "target": [t.clone() for t in batch["target"]]})
    theirs = stock.train_step(batch)
    assert ours["loss"] == theirs["loss"] == ours["loss_student"]
    for ours, theirs in zip(trainer.network.parameters(), stock.network.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", ["", "_partialOnly"])
def test_the_class_prior_correction_enters_the_loss_of_both_trainers(nnunet, started, variant):
    configuration = nnunet.configure(HIPPOCAMPUS, "corrected", "2d", SHORT | {"prior_correction": 1})
    trainer = started(HIPPOCAMPUS, configuration, f"ConfKDTrainer{variant}")
    batch = next(trainer.dataloader_train)
    assert batch["prior_shift"].shape == (3,) and batch["prior_shift"].abs().min() > 0
    weights = deepcopy(trainer.network.state_dict())
    corrected = trainer.train_step({**batch, "target": [t.clone() for t in batch["target"]]})["loss_student"]
    trainer.network.load_state_dict(weights)
    del batch["prior_shift"]
    assert trainer.train_step(batch)["loss_student"] != corrected
    off = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "uncorrected", "2d", SHORT | {"prior_correction": 0}),
                  f"ConfKDTrainer{variant}")
    assert "prior_shift" not in next(off.dataloader_train)


def test_by_default_the_class_prior_is_corrected_if_the_foreground_is_annotated_less_densely(nnunet, started):
    """Points annotate it more densely, and eroded masks less."""
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "by_default", "2d", SHORT))
    assert "prior_shift" not in next(trainer.dataloader_train)
    assert "prior_correction 0, " in Path(trainer.log_file).read_text()
    trainer.background = dict.fromkeys(trainer.background, 10 ** 9)
    assert "prior_shift" in next(trainer.get_dataloaders()[0])


def test_the_same_seed_gives_the_same_steps(nnunet, started):
    def losses(seed: int):
        trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "seeded", "2d", SHORT | {"seed": seed}))
        return [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(2)]

    assert losses(0) == losses(0) != losses(1)


# ---- settings and variants ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trainer, terms", [("ConfKDTrainer_noEntropy", {"teacher", "student", "kl"}),
                                            ("ConfKDTrainer_noKL", {"teacher", "student", "entropy"})])
def test_ablations_lack_one_term_whatever_the_plans_say(nnunet, hippocampus, trainer, terms):
    block = {"weight_kl": 7.0, "weight_entropy": 7.0, "seed": 5}
    made = nnunet.trainer(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "variant", "2d", block), trainer)
    made.initialize()
    assert {term for term, weight in made.loss.weights.items() if weight} == terms and made.settings.seed == 5


def test_the_published_objective_is_that_of_the_fully_annotated_images_without_hints(nnunet, hippocampus):
    configuration = nnunet.configure(HIPPOCAMPUS, "variant", "2d", {"weight_kl": 7.0, "kl_images": "partial"})
    made = nnunet.trainer(HIPPOCAMPUS, configuration, "ConfKDTrainer_MedIA2023")
    made.initialize()
    assert (made.loss.weights["kl"], made.loss.kl_images, made.loss.extra_resolutions) == (1.0, "full", "all")
    assert not made.settings.uses_hints and made.settings.kl_ramp(0.0) == 1.0
    assert nnunet.trainer(HIPPOCAMPUS, configuration).settings.weight_kl == 7.0


def test_variants_of_other_lengths_train_that_long_whatever_the_plans_say(nnunet, hippocampus):
    configuration = nnunet.configure(HIPPOCAMPUS, "length", "2d", {"epochs": 7})
    assert nnunet.trainer(HIPPOCAMPUS, configuration).num_epochs == 7
    for name, epochs in (("1epoch", 1), ("5epochs", 5), ("50epochs", 50), ("100epochs", 100), ("250epochs", 250)):
        assert nnunet.trainer(HIPPOCAMPUS, configuration, f"ConfKDTrainer_{name}").num_epochs == epochs


def test_a_block_in_a_configuration_that_inherits_works(nnunet, hippocampus):
    nnunet.configure(HIPPOCAMPUS, "parent", "2d", {"weight_kl": 3.0})
    plans, write = plans_of(nnunet)
    plans["configurations"]["child"] = {"inherits_from": "parent", "batch_size": 2}
    plans["configurations"]["other_child"] = {"inherits_from": "parent", "confkd": {"weight_kl": 0.5}}
    write()
    assert nnunet.trainer(HIPPOCAMPUS, "child").settings.weight_kl == 3.0
    assert nnunet.trainer(HIPPOCAMPUS, "other_child").settings.weight_kl == 0.5


def test_settings_are_recorded_with_the_model(hippocampus_model):
    plans = json.loads((hippocampus_model / "plans.json").read_text())
    block = plans["configurations"]["2d_export"]["confkd"]
    assert block["seed"] == 3 and block["weight_teacher"] == 1.0 and block["full_share"] is None
    record = json.loads((hippocampus_model / "fold_0" / "confkd.json").read_text())
    asked = dict.fromkeys(("weight_teacher", "weight_entropy", "hint_reach", "hint_watershed", "complete_at"))
    assert record["settings"] == block | asked, "the plans say what follows from the data"
    assert (block["weight_entropy"], block["hint_reach"], block["hint_watershed"]) == (0.01, 4, True)
    assert set(record["supervision"].values()) == {"full", "partial", "unlabelled"}


def test_the_ramp_follows_the_epochs(nnunet, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "ramp", "2d", {"seed": 0, "kl_ramp_start": 0.5, "kl_ramp_end": 0.5})
    trainer = started(HIPPOCAMPUS, configuration, "ConfKDTrainer_5epochs")
    found = []
    for epoch in (0, 4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        found.append(trainer.train_step(next(trainer.dataloader_train))["loss_kl"] > 0)
    assert found == [False, True]


def test_the_ramp_rises_with_every_iteration_of_a_single_epoch(nnunet, started):
    """By epochs, a training of one epoch would distil from an untrained teacher from its first iteration."""
    options = {"seed": 0, "epochs": 1, "iterations_per_epoch": 6, "kl_ramp_start": 0.4, "kl_ramp_end": 0.9}
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "ramp_1", "2d", options))
    losses, images = [], []
    trainer.network.teacher_decoder.register_forward_hook(lambda _, inputs, __: images.append(len(inputs[0][0])))
    for _ in range(6):
        images.clear()
        batch = next(trainer.dataloader_train)
        losses.append(trainer.train_step(batch)["loss_kl"])
        # while the KL has no weight, the teacher runs on nothing but the fully annotated images, from which it learns
        assert sum(images) == (len(batch["data"]) if losses[-1] else batch["num_full"])
    assert [bool(loss) for loss in losses] == [False, False, True, True, True, True]


# ---- bad input: one clear error, before any training or writing -----------------------------------------------------

@pytest.mark.parametrize("block, text", [({"weight_klo": 1}, "weight_klo.*did you mean 'weight_kl'"),
                                         ({"full_share": 1.5}, "full_share"), (["weight_kl"], "must be an object"),
                                         ({"kl_temperature": 2.0}, "'kl_temperature' has been removed")])
def test_bad_settings_stop_before_anything_is_written(nnunet, hippocampus, block, text):
    configuration = nnunet.configure(HIPPOCAMPUS, "bad", "2d", block)
    with pytest.raises(InputError, match=text):
        nnunet.trainer(HIPPOCAMPUS, configuration)
    assert not nnunet.model(HIPPOCAMPUS, configuration).exists()


def test_plans_of_another_data_set_are_refused(nnunet, hippocampus, regions):
    from nnunetv2.run.run_training import get_trainer_from_args
    source = nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json"
    shutil.copyfile(source, nnunet.preprocessed(regions) / "copied.json")
    with pytest.raises(InputError, match=f"are for {HIPPOCAMPUS}, which is not the data set"):
        get_trainer_from_args(regions, "2d", 0, "ConfKDTrainer", "copied", device=torch.device("cpu"))


@pytest.mark.parametrize("change, text", [(lambda described: described["labels"].update(ignore=9), "ignore label is 9"),
                                          (lambda described: described.pop("file_ending"), "file_ending")])
def test_a_description_that_lacks_something_is_refused(nnunet, hippocampus, change, text):
    from nnunet_confkd.training.trainer import ConfKDTrainer
    plans, _ = plans_of(nnunet)
    described = json.loads((nnunet.preprocessed(HIPPOCAMPUS) / "dataset.json").read_text())
    change(described)
    with pytest.raises(InputError, match=text):
        ConfKDTrainer(plans | {"continue_training": False}, "2d", 0, described, torch.device("cpu"))


def test_a_network_without_encoder_and_decoder_is_refused_by_name(nnunet, hippocampus, monkeypatch):
    class OneConvolution(torch.nn.Module):
        def __init__(self, input_channels, num_classes, deep_supervision):
            super().__init__()
            self.head = torch.nn.Conv2d(input_channels, num_classes, 1)

    monkeypatch.setitem(sys.modules, "strange_networks", types.ModuleType("strange_networks"))
    sys.modules["strange_networks"].OneConvolution = OneConvolution
    configuration = nnunet.configure(HIPPOCAMPUS, "strange", "2d")
    plans, write = plans_of(nnunet)
    plans["configurations"][configuration]["architecture"] = {
        "network_class_name": "strange_networks.OneConvolution", "_kw_requires_import": [], "arch_kwargs": {}}
    write()
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    trainer.enable_deep_supervision = False  # nnU-Net reads its depth from a U-Net's strides
    with pytest.raises(InputError, match="OneConvolution.*ConfKDTrainer needs PlainConvUNet"):
        trainer.initialize()


def test_no_fully_annotated_training_case_is_refused(hippocampus, split, started):
    split([{"train": hippocampus["partial"], "val": hippocampus["validation"]}])
    with pytest.raises(InputError, match="none of the 30 training cases"):
        started(HIPPOCAMPUS, "2d")


def test_a_fold_beyond_the_file_is_refused(nnunet, hippocampus):
    with pytest.raises(InputError, match="fold 3 was asked for.*1 fold"):
        nnunet.trainer(HIPPOCAMPUS, "2d", fold=3).do_split()


def test_without_a_split_file_only_fully_annotated_cases_are_validated(nnunet, hippocampus, split):
    split(None)
    train, val = nnunet.trainer(HIPPOCAMPUS, "2d", fold=1).do_split()
    full = set(hippocampus["full"] + hippocampus["validation"])
    assert set(val) <= full and len(val) == 2 and not set(train) & set(val)
    assert set(hippocampus["partial"] + hippocampus["unlabelled"]) <= set(train)
    assert len(json.loads((nnunet.preprocessed(HIPPOCAMPUS) / "splits_final.json").read_text())) == 5


def test_partially_annotated_validation_cases_are_left_out_of_the_pseudo_dice(nnunet, hippocampus, split):
    val = [hippocampus["validation"][0], hippocampus["partial"][0]]
    split([{"train": hippocampus["full"] + hippocampus["partial"][1:], "val": val}])
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d")
    _, dataset = trainer.get_tr_and_val_datasets()
    assert dataset.identifiers == val[:1]
    with open(trainer.log_file) as log:
        text = log.read()
    assert "1 validation case(s) are not fully annotated" in text and "Delete splits_final.json" in text


def test_the_surroundings_of_partially_annotated_validation_cases_do_not_count(nnunet, hippocampus, split, monkeypatch):
    """If a fold validates on no other cases, the pseudo-Dice is that of their annotated voxels alone."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    val = hippocampus["partial"][:2]
    split([{"train": hippocampus["full"] + hippocampus["partial"][2:], "val": val}])
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d")
    trainer.initialize()
    _, loader = trainer.get_dataloaders()
    cases = trainer.dataset_class(trainer.preprocessed_dataset_folder, val)
    annotated = max((~np.isin(np.asarray(cases.load_case(case)[1][:]), (-1, 3))).sum((0, 2, 3)).max() for case in val)
    for _ in range(4):
        batch = next(loader)
        assert set(batch["keys"]) <= set(val)
        labels = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        assert (labels != 3).flatten(1).sum(1).max() <= annotated


def test_intensities_that_depend_on_the_kind_of_a_case_are_told():
    head, full = {-1: 60, 0: 30, 1: 10, 3: 0}, {"f": {-1: 60, 0: 30, 1: 10, 3: 0}}
    stock = {"u": {-1: 0, 0: 0, 1: 0, 3: 100}, "p": {-1: 4, 0: 2, 1: 1, 3: 93}}
    text = warning_of_intensities(full | stock, 3, "Dataset027_Heads", "3d_fullres")
    assert "2 case(s)" in text and "confkd plan -d 27 -c 3d_fullres" in text
    ours = {"u": {-1: 60, 0: 0, 1: 0, 3: 40}, "p": {-1: 60, 0: 2, 1: 1, 3: 37}}
    assert warning_of_intensities(full | ours, 3, "Dataset027_Heads", "3d_fullres") is None
    assert warning_of_intensities({"f": head}, None, "Dataset027_Heads", "2d") is None
    whole = {"f": {-1: 0, 0: 90, 3: 0}, "u": {-1: 0, 0: 0, 3: 90}}  # no image has empty surroundings
    assert warning_of_intensities(whole, 3, "Dataset027_Heads", "2d") is None


def test_a_case_declared_unlabelled_is_trained_without_its_annotations(nnunet, hippocampus):
    files = [folder / "dataset.json" for folder in (nnunet.raw(HIPPOCAMPUS), nnunet.preprocessed(HIPPOCAMPUS))]
    before = [file.read_text() for file in files]
    lowered = hippocampus["full"][0]
    for file in files:
        file.write_text(json.dumps(json.loads(before[0]) | {"supervision": {lowered: "unlabelled"}}))
    try:
        trainer = nnunet.trainer(HIPPOCAMPUS, "2d")
        data, _ = trainer.get_tr_and_val_datasets()
        assert trainer.kinds[lowered] == "unlabelled"
        assert np.isin(data.load_case(lowered)[1], (-1, 3)).all()  # -1: the surroundings, which become 3 in training
        assert not (np.asarray(data.load_case(hippocampus["full"][1])[1][:]) == 3).any()
    finally:
        for file, text in zip(files, before):
            file.write_text(text)


def test_a_dataset_json_that_was_edited_after_planning_stops_before_anything_is_written(nnunet, hippocampus):
    raw = nnunet.raw(HIPPOCAMPUS) / "dataset.json"
    before = raw.read_text()
    configuration = nnunet.configure(HIPPOCAMPUS, "edited", "2d", SHORT)
    raw.write_text(json.dumps(json.loads(before) | {"supervision": {hippocampus["full"][0]: "unlabelled"}}))
    try:
        with pytest.raises(InputError, match=rf"{raw} differs from .*preprocessed.*in supervision: .*Copy the first"):
            nnunet.trainer(HIPPOCAMPUS, configuration)
        fold = nnunet.model(HIPPOCAMPUS, configuration) / "fold_0"
        assert not fold.parent.exists()

        fold.mkdir(parents=True)  # a training that had begun may go on, and a trained model be validated
        (fold / "checkpoint_latest.pth").touch()
        nnunet.trainer(HIPPOCAMPUS, configuration)
        (log,) = fold.glob("training_log_*.txt")
        assert "This training has begun and goes on with the second." in log.read_text()

        raw.rename(raw.with_suffix(".away"))  # the raw data need not be where training is
        (fold / "checkpoint_latest.pth").unlink()
        nnunet.trainer(HIPPOCAMPUS, configuration)
    finally:
        raw.with_suffix(".away").unlink(missing_ok=True)
        raw.write_text(before)


# ---- whole runs -----------------------------------------------------------------------------------------------------

class Remembers:
    """A logger as nnU-Net's for Weights & Biases: one call for each curve and epoch, lists as one value per class."""

    def __init__(self):
        self.seen = {}

    def update_config(self, config):
        pass

    def log(self, key, value, step):
        self.seen[key] = float(value)

    def log_summary(self, key, value):
        self.seen[key] = float(value)


def test_a_run_without_checkpoints_from_pretrained_weights_logs_every_curve(nnunet, hippocampus_model):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    options = SHORT | {"iterations_per_epoch": 1, "teacher_width": 1}  # the model's
    configuration = nnunet.configure(HIPPOCAMPUS, "unsaved", "2d", options, max_patch=56)
    trainer, remembers = nnunet.trainer(HIPPOCAMPUS, configuration), Remembers()
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(hippocampus_model / "fold_0" / "checkpoint_final.pth"))
    trainer.disable_checkpointing = True
    trainer.logger.loggers.append(remembers)
    trainer.run_training()
    trainer.perform_actual_validation()
    fold = nnunet.model(HIPPOCAMPUS, configuration) / "fold_0"
    assert not list(fold.glob("*.pth*")) and (fold / "validation_teacher" / "summary.json").is_file()
    assert {f"loss_{term}" for term in TERMS} <= set(remembers.seen)
    assert {"student_confidence", "annotated_share", "teacher_mean_fg_dice", "mean_fg_dice",
            "teacher_dice_per_class_or_region/class_2", "final_val_teacher/foreground_dice"} <= set(remembers.seen)


def test_a_training_of_another_network_is_not_continued_and_the_setting_is_named(nnunet, hippocampus,
                                                                                  hippocampus_model):
    nnunet.configure(HIPPOCAMPUS, "2d_narrow", "2d", {"epochs": 1, "iterations_per_epoch": 5})
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d_narrow", continue_training=True)
    checkpoint = str(hippocampus_model / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(InputError, match='another network.*"teacher_width": 1 and "hint_watershed": '
                       'false to the confkd block of 2d_narrow in nnU'):
        trainer.load_checkpoint(checkpoint)


def test_a_training_that_begins_anew_keeps_the_earlier_one(nnunet, hippocampus, monkeypatch):
    options = {**SHORT, "iterations_per_epoch": 1, "epochs": 2}
    configuration = nnunet.configure(HIPPOCAMPUS, "anew", "2d", options, **WHOLE)
    fold = nnunet.train(HIPPOCAMPUS, configuration)
    before = {file.name: file.read_bytes() for file in (*fold.glob("checkpoint_*.pth"), fold / "confkd.json")}
    validation = (fold / "validation" / "summary.json").read_text()
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_loader", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.run_training()
    assert {name: (fold / name).read_bytes() for name in before} == before, "a start that fails leaves all as it was"
    log = Path(trainer.log_file).read_text()
    assert "before its first step. checkpoint_final.pth is that of an earlier training" in log and "--c" not in log
    rules = fold.parent / "crossval_results_folds_0" / "postprocessing.json"  # of nnUNetv2_find_best_configuration
    rules.parent.mkdir()
    rules.write_text("{}")
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    trainer.on_train_start()
    kept, = fold.glob("earlier_*")
    assert not rules.exists() and (kept / "crossval_results_folds_0" / "postprocessing.json").is_file()
    assert (kept / "validation" / "summary.json").read_text() == validation
    assert not list(fold.glob("validation*")) and (fold / "confkd.json").is_file()
    assert "checkpoint_final.pth" in before and not list(fold.glob("checkpoint_*"))
    assert {file.name: file.read_bytes() for file in kept.iterdir() if file.is_file()} == before
    log = Path(trainer.log_file).read_text()
    assert "holds an earlier training" in log and f"are now in {kept}" in log
    stopped, _ = explain_stop(KeyboardInterrupt(), fold, 1)
    assert "There is no checkpoint to go on from yet" in stopped
    trainer.save_checkpoint(str(fold / "checkpoint_latest.pth"))
    again = nnunet.trainer(HIPPOCAMPUS, configuration)
    again.initialize()
    again.load_checkpoint(str(fold / "checkpoint_latest.pth"))
    again.on_train_start()
    assert (fold / "checkpoint_latest.pth").is_file() and list(fold.glob("earlier_*")) == [kept]


def test_a_killed_run_resumes_and_keeps_its_curves(nnunet, hippocampus):
    options = {"epochs": 3, "iterations_per_epoch": 2, "seed": 0}
    configuration = nnunet.configure(HIPPOCAMPUS, "resume", "2d", options)
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    trainer.save_every = 1
    end = trainer.on_epoch_end

    def killed():
        end()
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt

    trainer.on_epoch_end = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    fold = nnunet.model(HIPPOCAMPUS, configuration) / "fold_0"
    assert sorted(file.name for file in fold.glob("*.pth")) == ["checkpoint_best.pth", "checkpoint_latest.pth"]

    resumed = nnunet.trainer(HIPPOCAMPUS, configuration, continue_training=True)
    resumed.load_checkpoint(str(fold / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 2
    resumed.run_training()
    curves = resumed.logger.local_logger.my_fantastic_logging
    assert {len(values) for values in curves.values()} == {3}
    assert curves["loss_kl"][:2] == trainer.logger.local_logger.my_fantastic_logging["loss_kl"][:2]
    assert (fold / "checkpoint_final.pth").is_file() and (fold / "progress_confkd.png").stat().st_size > 1000


def test_an_epoch_without_foreground_does_not_stop_the_search_for_the_best(nnunet, hippocampus):
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d")
    counts = {key: np.zeros(2, np.float32) for key in ("tp_hard", "fp_hard", "fn_hard")}
    nothing = {"loss": np.float32(0), **counts, **{f"teacher_{k}": v for k, v in counts.items()}}
    good = nothing | {"tp_hard": np.ones(2, np.float32)}
    averages = []
    for outputs in (nothing, good, nothing, good):
        trainer.on_validation_epoch_end([outputs])
        averages.append(trainer.logger.get_value("ema_fg_dice", -1))
        trainer.current_epoch += 1
    assert np.isfinite(averages).all() and averages[3] > averages[2] == averages[1] > averages[0]
    assert np.isnan(trainer.logger.get_value("mean_fg_dice", 2))


def test_fold_all_and_validation_only(nnunet, regions):
    configuration = nnunet.configure(regions, "all", "3d_fullres", SHORT | {"iterations_per_epoch": 1}, **WHOLE)
    fold = nnunet.train(regions, configuration, fold="all")
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 6
    shutil.rmtree(fold / "validation")
    nnunet.train(regions, configuration, fold="all", only_run_validation=True, val_with_best=True)
    assert (fold / "validation" / "summary.json").is_file()


def test_a_cascade_gets_its_input_for_training_cases_that_no_fold_validates(nnunet, regions):
    """nnU-Net writes it for validation cases only: the second stage would lack it for partially annotated cases."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    options = SHORT | {"iterations_per_epoch": 1}
    nnunet.configure(regions, "3d_cascade_fullres", "3d_fullres", options, **WHOLE)
    nnunet.configure(regions, "3d_lowres", "3d_fullres", options, **WHOLE)
    plans, write = plans_of(nnunet, regions)
    plans["configurations"]["3d_lowres"] |= {"spacing": [1.5, 1.5, 1.5], "data_identifier": "nnUNetPlans_3d_lowres",
                                             "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    write()
    preprocess([int(regions[7:10])], configurations=["3d_lowres"], num_processes=[1])
    nnunet.train(regions, "3d_lowres")
    split = json.loads((nnunet.preprocessed(regions) / "splits_final.json").read_text())[0]
    written = nnunet.model(regions, "3d_lowres") / "predicted_next_stage" / "3d_cascade_fullres"
    assert {f.name for f in written.iterdir()} == {f"{case}.b2nd" for case in split["train"] + split["val"]}
    trainer = nnunet.trainer(regions, "3d_cascade_fullres")
    trainer.run_training()
    # the strength of the edges is that of the image: the borders of the previous stage's prediction are none
    samplers = [c for c in trainer.dataloader_train.data_loader.complete if isinstance(c, HintSampler)]
    assert [sampler.image_channels for sampler in samplers] == [1]
    trainer.perform_actual_validation()
    assert (nnunet.model(regions, "3d_cascade_fullres") / "fold_0" / "validation" / "summary.json").is_file()


def test_anisotropic_patches_with_dummy_2d_augmentation_train(nnunet, hippocampus, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "flat", "3d_fullres", SHORT)
    plans, write = plans_of(nnunet)
    plans["configurations"][configuration]["patch_size"] = [8, 32, 32]
    write()
    trainer = started(HIPPOCAMPUS, configuration)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[1]
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


# ---- threads --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, threads, policy, told", [
    ("cpu", 2, None, True), ("cpu", 2, "active", True), ("cpu", 2, "passive", False), ("cpu", 1, None, False),
    ("cuda", 2, None, False)])
def test_threads_that_wait_busily_are_told(monkeypatch, device, threads, policy, told):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert ("export OMP_WAIT_POLICY=PASSIVE" in (warning_of_spinning_threads(device) or "")) == told
