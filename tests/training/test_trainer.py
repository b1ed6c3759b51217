from __future__ import annotations

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.losses import TERMS
from nnunet_confkd.training.network import TwoBranchUNet

HIPPOCAMPUS = "Dataset004_Hippocampus"
WHOLE = {"max_patch": 56, "batch_size": 2}  # a patch holds a whole image: one step of the sliding window
SHORT = {"epochs": 1, "iterations_per_epoch": 3, "seed": 0}


@pytest.fixture
def started(nnunet, hippocampus):
    """Starts a trainer up to its first batch, and ends its loaders."""
    trainers = []

    def start(dataset, configuration, trainer="ConfKDTrainer", **options):
        trainers.append(nnunet.trainer(dataset, configuration, trainer, **options))
        trainers[-1].on_train_start()
        return trainers[-1]

    yield start


def parameters(network, prefix):
    return {name: p for name, p in network.named_parameters() if name.startswith(prefix)}


# ---- steps ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", ["2d", "3d_fullres"])
def test_a_step_moves_every_part_and_reports_every_term(nnunet, hippocampus, started, base):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, f"step_{base}", base, SHORT))
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.on_train_epoch_start()
    for _ in range(2):
        result = trainer.train_step(next(trainer.dataloader_train))
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    for part in ("encoder.", "decoder.", "teacher_decoder."):
        assert any(name.startswith(part) for name in moved)
    assert all(np.isfinite(value) for value in result.values())
    assert all(result[f"loss_{term}"] != 0 for term in TERMS)
    assert 1 / 3 < result["student_confidence"] < 1 and 0 < result["annotated_share"] < 1
    # half of the batch is full, the other half has points
    assert 0.5 < result["annotated_share"] < 0.53


def test_the_padding_of_partial_images_is_not_annotated(nnunet, hippocampus, started):
    """Of a partial image, its points carry a label and its padding does not; of a full one the padding is background."""
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
    trainer.on_train_epoch_start()
    result = trainer.train_step(next(trainer.dataloader_train))
    assert all(np.isfinite(value) for value in result.values()) and result["loss_kl"] > 0 and result["loss_entropy"] > 0
    with torch.no_grad():
        counts = trainer.validation_step(next(trainer.dataloader_val))
    assert counts["tp_hard"].shape == counts["teacher_fn_hard"].shape == (2,)


def test_a_batch_of_one_trains_with_and_without_a_full_image(nnunet, hippocampus, started):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "one", "2d", SHORT, batch_size=1))
    trainer.on_train_epoch_start()
    found = {}
    for _ in range(4):
        batch = next(trainer.dataloader_train)
        found[batch["num_full"]] = trainer.train_step(batch)
    assert set(found) == {0, 1}
    assert found[0]["loss_teacher"] == 0 < found[0]["loss_kl"] and found[0]["loss_entropy"] > 0  # shown the annotations, it still teaches
    assert found[1]["loss_entropy"] == 0 != found[1]["loss_teacher"]


def test_the_teacher_is_shown_the_annotations(nnunet, hippocampus, started):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "hints", "2d", SHORT | {"kl_images": "all"}, batch_size=8))
    seen = []
    trainer.network.teacher_decoder.hints.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    full_hinted = 0
    for _ in range(4):
        batch = next(trainer.dataloader_train)
        seen.clear()
        trainer.train_step(batch)
        hints = torch.cat(seen)  # of the full images, then of the others
        target, num_full, shown = batch["target"][0], batch["num_full"], hints[:, -1:].bool()
        assert torch.equal(shown[num_full:], target[num_full:] != 3)
        assert 0 < shown[:num_full].float().mean() < 0.05
        assert not (shown & ~batch["inside"]).any()
        labels = hints[:, :-1].argmax(1, keepdim=True)
        assert torch.equal(labels[shown], target[shown].long())
        full_hinted += int(shown[:num_full].flatten(1).any(1).sum())
    assert full_hinted > 8


def test_hints_leave_the_batches_as_they_are(nnunet, hippocampus, started):
    def batches(name, block):
        trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, name, "2d", SHORT | block))
        return [(list(b["keys"]), float(b["data"].sum()), "hint_mask" in b) for b in (next(trainer.dataloader_train) for _ in range(3))]

    with_hints, without = (batches(f"hints_{on}", {"teacher_hints": on}) for on in (True, False))
    assert [b[:2] for b in with_hints] == [b[:2] for b in without]
    assert all(b[2] for b in with_hints) and not any(b[2] for b in without)


@pytest.mark.parametrize("images, teacher_sees", [("full", 2), ("all", 8), ("partial", 8)])
def test_the_teacher_is_run_on_the_images_that_it_is_followed_on(nnunet, hippocampus, started, images, teacher_sees):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, f"seen_{images}", "2d", SHORT | {"full_share": 0.25, "kl_images": images},
                                                    batch_size=8))
    seen = []
    trainer.network.teacher_decoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0].shape[0]))
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    assert sum(seen) == teacher_sees and all(case in hippocampus["full"] for case in batch["keys"][:2])
    assert not any(case in hippocampus["full"] for case in batch["keys"][2:])


def test_validation_batches_are_full_and_count_as_nnunet_does(nnunet, hippocampus, started):
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
    # the teacher is measured at its work: with hints
    assert len(seen) == 1 and torch.equal(seen[0][:, -1:].bool(), batch["hint_mask"]) and batch["hint_mask"].any()


def test_partial_only_has_one_branch_and_nnunets_loss_to_the_bit(nnunet, hippocampus, started):
    trainer = started(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "fair", "2d", SHORT), "ConfKDTrainer_partialOnly")
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


def test_the_same_seed_gives_the_same_steps(nnunet, hippocampus, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "seeded", "2d", SHORT)

    def losses():
        trainer = started(HIPPOCAMPUS, configuration)
        trainer.on_train_epoch_start()
        return [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(2)]

    first = losses()
    assert losses() == first
    nnunet.configure(HIPPOCAMPUS, "seeded", "2d", SHORT | {"seed": 1})
    assert losses() != first


# ---- settings and variants ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trainer, expected", [
    ("ConfKDTrainer_noEntropy", {"weight_entropy": 0.0}), ("ConfKDTrainer_noKL", {"weight_kl": 0.0}),
    ("ConfKDTrainer_MedIA2023", {"weight_kl": 1.0, "kl_images": "full"})])
def test_variants_fix_their_settings_over_the_plans(nnunet, hippocampus, trainer, expected):
    configuration = nnunet.configure(HIPPOCAMPUS, "variant", "2d", {"weight_kl": 7.0, "weight_entropy": 7.0, "seed": 5, "kl_images": "partial"})
    settings = nnunet.trainer(HIPPOCAMPUS, configuration, trainer).settings.as_dict()
    assert {key: settings[key] for key in expected} == expected and settings["seed"] == 5
    assert nnunet.trainer(HIPPOCAMPUS, configuration).settings.weight_kl == 7.0


@pytest.mark.parametrize("epochs", [1, 5, 50, 100, 250])
def test_lengths_are_subclasses_as_nnunets(nnunet, hippocampus, epochs):
    name = f"ConfKDTrainer_{epochs}epoch" + ("s" if epochs > 1 else "")
    assert nnunet.trainer(HIPPOCAMPUS, "2d", name).num_epochs == epochs


def test_a_block_in_a_configuration_that_inherits_works(nnunet, hippocampus):
    nnunet.configure(HIPPOCAMPUS, "parent", "2d", {"weight_kl": 3.0})
    plans_file = nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["child"] = {"inherits_from": "parent", "batch_size": 2}
    plans["configurations"]["other_child"] = {"inherits_from": "parent", "confkd": {"weight_kl": 0.5}}
    plans_file.write_text(json.dumps(plans))
    assert nnunet.trainer(HIPPOCAMPUS, "child").settings.weight_kl == 3.0
    assert nnunet.trainer(HIPPOCAMPUS, "other_child").settings.weight_kl == 0.5


def test_settings_are_recorded_with_the_model(hippocampus_model):
    plans = json.loads((hippocampus_model / "plans.json").read_text())
    block = plans["configurations"]["2d_export"]["confkd"]
    assert block["seed"] == 3 and block["weight_teacher"] == 1.0 and block["full_share"] == 0.5
    record = json.loads((hippocampus_model / "fold_0" / "confkd.json").read_text())
    assert record["settings"] == block and set(record["supervision"].values()) == {"full", "partial", "unlabelled"}


def test_the_ramp_is_read_as_the_run_goes(nnunet, hippocampus, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "ramp", "2d", {"seed": 0, "kl_ramp_start": 0.5, "kl_ramp_end": 0.5})
    trainer = started(HIPPOCAMPUS, configuration, "ConfKDTrainer_5epochs")
    found = []
    for epoch in (0, 4):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        found.append(trainer.train_step(next(trainer.dataloader_train))["loss_kl"] > 0)
    assert found == [False, True]


def test_ramps_rise_with_every_iteration_of_a_single_epoch(nnunet, hippocampus, started):
    """By epochs, a training of one epoch would distil from an untrained teacher from its first step."""
    configuration = nnunet.configure(HIPPOCAMPUS, "ramp_1", "2d", {"seed": 0, "epochs": 1, "iterations_per_epoch": 6, "kl_ramp_start": 0.4,
                                                                  "kl_ramp_end": 0.9})
    trainer = started(HIPPOCAMPUS, configuration)
    trainer.on_train_epoch_start()
    losses, images = [], []
    trainer.network.teacher_decoder.register_forward_hook(lambda _, inputs, __: images.append(len(inputs[0][0])))
    for _ in range(6):
        images.clear()
        batch = next(trainer.dataloader_train)
        losses.append(trainer.train_step(batch)["loss_kl"])
        # while the KL has no weight, the teacher is run on nothing but the full images, which it learns from
        assert sum(images) == (len(batch["data"]) if losses[-1] else batch["num_full"])
    assert [bool(loss) for loss in losses] == [False, False, True, True, True, True]


# ---- bad input: one clear error, before any training or writing -----------------------------------------------------

@pytest.mark.parametrize("block, text", [({"weight_klo": 1}, "weight_klo.*did you mean 'weight_kl'"),
                                         ({"full_share": 1.5}, "full_share"), ({"kl_images": "none"}, "kl_images"),
                                         (["weight_kl"], "must be an object")])
def test_bad_settings_stop_before_anything_is_written(nnunet, hippocampus, block, text):
    configuration = nnunet.configure(HIPPOCAMPUS, "bad", "2d", block)
    with pytest.raises(InputError, match=text):
        nnunet.trainer(HIPPOCAMPUS, configuration)
    assert not nnunet.model(HIPPOCAMPUS, configuration).exists()


def test_plans_of_another_data_set_are_refused(nnunet, hippocampus, regions):
    source = nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json"
    shutil.copyfile(source, nnunet.preprocessed(regions) / "copied.json")
    with pytest.raises(InputError, match=f"are for {HIPPOCAMPUS}, which is not the data set"):
        from nnunetv2.run.run_training import get_trainer_from_args
        get_trainer_from_args(regions, "2d", 0, "ConfKDTrainer", "copied", device=torch.device("cpu"))


def test_an_ignore_label_that_is_not_the_highest_is_refused(nnunet, hippocampus):
    from nnunet_confkd.training.trainer import ConfKDTrainer
    plans = json.loads((nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((nnunet.preprocessed(HIPPOCAMPUS) / "dataset.json").read_text())
    dataset_json["labels"]["ignore"] = 9
    with pytest.raises(InputError, match="the ignore label is 9"):
        ConfKDTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))


def test_a_description_without_its_needed_entries_is_refused(nnunet, hippocampus):
    from nnunet_confkd.training.trainer import ConfKDTrainer
    plans = json.loads((nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((nnunet.preprocessed(HIPPOCAMPUS) / "dataset.json").read_text())
    del dataset_json["file_ending"]
    with pytest.raises(InputError, match="file_ending"):
        ConfKDTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))


def test_a_network_without_encoder_and_decoder_is_refused_by_name(nnunet, hippocampus, monkeypatch):
    configuration = nnunet.configure(HIPPOCAMPUS, "strange", "2d")
    plans_file = nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    class OneConvolution(torch.nn.Module):
        def __init__(self, input_channels, num_classes, deep_supervision):
            super().__init__()
            self.head = torch.nn.Conv2d(input_channels, num_classes, 1)

    monkeypatch.setitem(sys.modules, "strange_networks", types.ModuleType("strange_networks"))
    sys.modules["strange_networks"].OneConvolution = OneConvolution
    plans["configurations"][configuration]["architecture"] = {
        "network_class_name": "strange_networks.OneConvolution", "_kw_requires_import": [], "arch_kwargs": {}}
    plans_file.write_text(json.dumps(plans))
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    trainer.enable_deep_supervision = False  # whose depth nnU-Net reads from a U-Net's strides
    with pytest.raises(InputError, match="OneConvolution.*ConfKDTrainer needs PlainConvUNet"):
        trainer.initialize()


def with_split(nnunet, split):
    """Replace the split; returns a function that restores it."""
    file = nnunet.preprocessed(HIPPOCAMPUS) / "splits_final.json"
    before = file.read_text()
    file.write_text(json.dumps(split)) if split is not None else file.unlink()
    return lambda: file.write_text(before)


def test_no_full_training_case_is_refused(nnunet, hippocampus, started):
    restore = with_split(nnunet, [{"train": hippocampus["partial"], "val": hippocampus["validation"]}])
    try:
        with pytest.raises(InputError, match="none of the 30 training cases is fully annotated"):
            started(HIPPOCAMPUS, "2d")
    finally:
        restore()


def test_a_fold_beyond_the_file_is_refused(nnunet, hippocampus):
    with pytest.raises(InputError, match="fold 3 was asked for.*1 fold"):
        nnunet.trainer(HIPPOCAMPUS, "2d", fold=3).do_split()


def test_without_a_split_file_only_full_cases_are_validated(nnunet, hippocampus):
    restore = with_split(nnunet, None)
    try:
        train, val = nnunet.trainer(HIPPOCAMPUS, "2d", fold=1).do_split()
        full = set(hippocampus["full"] + hippocampus["validation"])
        assert set(val) <= full and len(val) == 2 and not set(train) & set(val)
        assert set(hippocampus["partial"] + hippocampus["unlabelled"]) <= set(train)
        assert len(json.loads((nnunet.preprocessed(HIPPOCAMPUS) / "splits_final.json").read_text())) == 5
    finally:
        restore()


def test_partial_validation_cases_are_left_out_of_the_pseudo_dice(nnunet, hippocampus):
    val = [hippocampus["validation"][0], hippocampus["partial"][0]]
    restore = with_split(nnunet, [{"train": hippocampus["full"] + hippocampus["partial"][1:], "val": val}])
    try:
        _, dataset = nnunet.trainer(HIPPOCAMPUS, "2d").get_tr_and_val_datasets()
        assert dataset.identifiers == val[:1]
    finally:
        restore()


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
        assert (data.load_case(lowered)[1] == 3).all()
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
        with pytest.raises(InputError, match=rf"{raw} differs from .*preprocessed.*, which training reads, in supervision: .*Copy the first"):
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

def test_every_curve_reaches_the_other_loggers_too(nnunet, hippocampus):
    """As Weights & Biases gets them: one call a curve and epoch, lists as one value a class."""
    class Remembers:
        def __init__(self):
            self.seen = {}

        def update_config(self, config):
            pass

        def log(self, key, value, step):
            self.seen[key] = float(value)

    trainer = nnunet.trainer(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "logged", "2d", SHORT | {"iterations_per_epoch": 1}))
    remembers = Remembers()
    trainer.logger.loggers.append(remembers)
    trainer.run_training()
    assert {f"loss_{term}" for term in TERMS} <= set(remembers.seen)
    assert {"student_confidence", "annotated_share", "teacher_mean_fg_dice", "mean_fg_dice",
            "teacher_dice_per_class_or_region/class_2"} <= set(remembers.seen)


def test_a_killed_run_resumes_and_keeps_its_curves(nnunet, hippocampus, monkeypatch):
    configuration = nnunet.configure(HIPPOCAMPUS, "resume", "2d", {"epochs": 3, "iterations_per_epoch": 2, "seed": 0})
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
    assert (fold / "checkpoint_latest.pth").is_file() and not list(fold.glob("*.part"))

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


def test_final_validation_reports_both_branches(hippocampus_model, hippocampus):
    """And the student's files are what nnU-Net writes: one a case, with probabilities, and a summary."""
    dice = {}
    for folder in ("validation", "validation_teacher"):
        summary = json.loads((hippocampus_model / "fold_0" / folder / "summary.json").read_text())
        assert len(summary["metric_per_case"]) == len(hippocampus["validation"])
        assert len(list((hippocampus_model / "fold_0" / folder).glob("*.npz"))) == len(hippocampus["validation"])
        dice[folder] = summary["foreground_mean"]
    assert dice["validation"] != dice["validation_teacher"]


def test_one_pass_for_both_branches_equals_one_pass_each(nnunet, hippocampus, hippocampus_model):
    from nnunet_confkd.training.validation import CasePredictor
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d_export", continue_training=True)
    trainer.load_checkpoint(str(hippocampus_model / "fold_0" / "checkpoint_final.pth"))
    trainer.set_deep_supervision_enabled(False)
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder).load_case(hippocampus["validation"][0])[0][:]
    calls = []
    trainer.network.encoder.register_forward_hook(lambda *_: calls.append(1))
    both = CasePredictor(trainer, ["student", "teacher"])(data, None)
    once = len(calls)
    for branch in ("student", "teacher"):
        trainer.network.branch = branch
        calls.clear()
        alone = CasePredictor(trainer, [branch])(data, None)[branch]
        np.testing.assert_array_equal(both[branch], alone)
        assert len(calls) == once


def test_fold_all_and_validation_only(nnunet, regions):
    configuration = nnunet.configure(regions, "all", "3d_fullres", SHORT, **WHOLE)
    fold = nnunet.train(regions, configuration, fold="all")
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 6
    shutil.rmtree(fold / "validation")
    nnunet.train(regions, configuration, fold="all", only_run_validation=True, val_with_best=True)
    assert (fold / "validation" / "summary.json").is_file()


def test_cascade_gets_its_input_for_training_cases_that_no_fold_validates(nnunet, regions):
    """nnU-Net writes it for validation cases only: the second stage would find no file for the partial ones."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    plans_file = nnunet.preprocessed(regions) / "nnUNetPlans.json"
    nnunet.configure(regions, "3d_cascade_fullres", "3d_fullres", SHORT, **WHOLE)
    nnunet.configure(regions, "3d_lowres", "3d_fullres", SHORT, **WHOLE)
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_lowres"] |= {"spacing": [1.5, 1.5, 1.5], "data_identifier": "nnUNetPlans_3d_lowres",
                                             "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    plans_file.write_text(json.dumps(plans))
    preprocess([int(regions[7:10])], configurations=["3d_lowres"], num_processes=[1])
    nnunet.train(regions, "3d_lowres")
    split = json.loads((nnunet.preprocessed(regions) / "splits_final.json").read_text())[0]
    written = nnunet.model(regions, "3d_lowres") / "predicted_next_stage" / "3d_cascade_fullres"
    assert {f.name for f in written.iterdir()} == {f"{case}.b2nd" for case in split["train"] + split["val"]}
    fold = nnunet.train(regions, "3d_cascade_fullres")
    assert (fold / "validation" / "summary.json").is_file()


def test_anisotropic_patches_with_dummy_2d_augmentation_train(nnunet, hippocampus, started):
    configuration = nnunet.configure(HIPPOCAMPUS, "flat", "3d_fullres", SHORT)
    plans_file = nnunet.preprocessed(HIPPOCAMPUS) / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"][configuration]["patch_size"] = [8, 32, 32]
    plans_file.write_text(json.dumps(plans))
    trainer = started(HIPPOCAMPUS, configuration)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[1]
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])


def test_disabled_checkpoints_and_own_pretrained_weights(nnunet, hippocampus, hippocampus_model):
    configuration = nnunet.configure(HIPPOCAMPUS, "unsaved", "2d", SHORT)
    source = str(hippocampus_model / "fold_0" / "checkpoint_final.pth")
    fold = nnunet.train(HIPPOCAMPUS, configuration, disable_checkpointing=True, pretrained_weights=source)
    assert not list(fold.glob("*.pth*")) and (fold / "validation_teacher" / "summary.json").is_file()
