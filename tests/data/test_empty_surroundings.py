"""Images with empty surroundings, such as skull-stripped heads: all kinds of labels get the same intensities."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.data.resampling import KeepAnnotations, outside_marked
from nnunet_confkd.data.supervision import count_voxels, kind_of
from nnunet_confkd.data.weak_labels import case_rng, weaken
from nnunet_confkd.training.batches import TrainingCases, label_padding
from nnunet_confkd.training.trainer import ConfKDTrainer

IGNORE = 2
SIZE = 32
KINDS = {"scribbles": "partial", "erosion": "partial", "none": "unlabelled"}


def _resampling(order: int, is_seg: bool) -> dict:
    return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}


def preprocessed(label: np.ndarray | None, image: np.ndarray, use_mask: bool = True):
    """The image and the label as `confkd plan` preprocesses them, and nnU-Net's properties; None: no label."""
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "x", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2, "architecture": {},
        "patch_size": [16] * 3, "spacing": [1.0] * 3, "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [use_mask], "resampling_fn_data": function, "resampling_fn_seg": function,
        "resampling_fn_data_kwargs": _resampling(3, False), "resampling_fn_seg_kwargs": _resampling(1, True)}
    plans = PlansManager({
        "dataset_name": "Dataset001_Heads", "plans_name": "nnUNetPlans", "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2], "configurations": {"3d_fullres": configuration},
        "label_manager": "LabelManager",
        "image_reader_writer": "SimpleITKIO", "foreground_intensity_properties_per_channel": {"0": {}}})
    described = {"labels": {"background": 0, "tumour": 1, "ignore": IGNORE}, "channel_names": {"0": "T1"},
                 "file_ending": ".nii.gz"}
    return KeepAnnotations(verbose=False).run_case_npy(
        image[None].copy(), None if label is None else label[None].copy(), {"spacing": [1.0] * 3}, plans,
        plans.get_configuration("3d_fullres"), described)


@pytest.fixture(scope="module")
def head():
    """An image that is 0 around a ball, and its full label."""
    rng, grid = np.random.default_rng(0), np.indices((SIZE,) * 3) - (SIZE - 1) / 2
    full = (np.sqrt(((grid - 3) ** 2).sum(0)) < 5).astype(np.int16)
    inside = np.sqrt((grid ** 2).sum(0)) < 13
    return np.where(inside, 500 + 100 * rng.normal(size=inside.shape) + 150 * full, 0).astype(np.float32), full


@pytest.mark.parametrize("style", KINDS)
def test_intensities_and_surroundings_are_those_of_a_full_label(head, style):
    image, full = head
    label = weaken(full, style, IGNORE, case_rng("case", style, 0), slice_axis=0)
    data, seg, properties = preprocessed(label, image)
    expected, of_full, _ = preprocessed(full, image)
    assert np.array_equal(data, expected) and np.array_equal(data, preprocessed(None, image)[0])
    assert np.array_equal(seg == -1, of_full == -1) and 0.3 < (seg == -1).mean() < 0.9
    assert kind_of(count_voxels(seg, [-1, 0, 1, IGNORE]), IGNORE) == KINDS[style]
    # patches are placed on annotated voxels of the head
    places = np.asarray(properties["class_locations"][(-1, 0, 1)], int).reshape(-1, 4)
    assert len(places) == (0 if style == "none" else ((seg == 0) | (seg == 1)).sum())
    assert np.isin(seg[tuple(places.T)], (0, 1)).all()


def test_without_masks_the_labels_stay_as_they_are(head):
    image, full = head
    label = weaken(full, "none", IGNORE, case_rng("case", "none", 0), slice_axis=0)
    assert (preprocessed(label, image, use_mask=False)[1] == IGNORE).all()
    assert outside_marked(full[None], image[None], IGNORE).base is full  # nothing is ignored


def test_the_surroundings_stay_empty_in_training_also_where_annotations_are_hidden(head):
    """nnU-Net sets them to 0 again after the augmentation. Nobody has annotated them."""
    image, full = head
    data, seg, properties = preprocessed(full, image)
    stock = SimpleNamespace(identifiers=["a"], source_folder=".", load_case=lambda case: (data, seg, None, properties))
    transforms = ConfKDTrainer.get_training_transforms(
        (16, 16, 16), (-0.5, 0.5), None, (0, 1, 2), False, use_mask_for_norm=[True], foreground_labels=[1],
        ignore_label=IGNORE)
    label_padding(transforms, IGNORE).full = False
    shown, hidden, *_ = TrainingCases(stock, ["a"], IGNORE).load_case("a")
    assert set(np.unique(hidden)) == {-1, IGNORE}
    torch.manual_seed(0)
    for _ in range(8):
        sample = transforms(image=torch.from_numpy(shown[:, :16, :16, :16]),
                            segmentation=torch.from_numpy(hidden[:, :16, :16, :16]))
        assert (sample["image"] == 0).float().mean() > 0.05 and (sample["segmentation"] == IGNORE).all()
