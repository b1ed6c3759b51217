"""The variants of ConfKDTrainer: a baseline, ablations, the published objective and other numbers of epochs."""
from __future__ import annotations

from nnunet_confkd.training.trainer import ConfKDTrainer


class ConfKDTrainer_noEntropy(ConfKDTrainer):
    """Ablation without L_ent.

    Examples:
        >>> ConfKDTrainer_noEntropy.settings_of({}).weight_entropy
        0.0
    """

    fixed_settings = {"weight_entropy": 0.0}


class ConfKDTrainer_noKL(ConfKDTrainer):
    """Ablation without L_kd.

    Examples:
        >>> ConfKDTrainer_noKL.settings_of({}).weight_kl
        0.0
    """

    fixed_settings = {"weight_kl": 0.0, "complete_at": 0.0}


class ConfKDTrainer_partialOnly(ConfKDTrainer):
    """Fair baseline: nnU-Net's network of one branch and its loss with the ignore label, on the same batches.

    Unlabelled images are left out.

    Examples:
        >>> ConfKDTrainer_partialOnly.settings_of({}).weight_teacher
        0.0
    """

    fixed_settings = {"weight_teacher": 0.0, "weight_student": 1.0, "weight_kl": 0.0, "weight_entropy": 0.0,
                      "complete_at": 0.0}


class ConfKDTrainer_MedIA2023(ConfKDTrainer):
    """The journal paper's objective with weights of order 1: the KL acts on fully annotated images alone; no hints, no
    class-prior correction, no CutMix, no equal weights of both kinds of images, and a teacher of the student's width
    that updates the encoder and completes no labels.

    Examples:
        >>> ConfKDTrainer_MedIA2023.settings_of({}).kl_images
        'full'
    """

    fixed_settings = {"weight_kl": 1.0, "kl_images": "full", "kl_ramp_start": 0.0, "kl_ramp_end": 0.0,
                      "extra_resolutions": "all", "prior_correction": 0.0, "teacher_width": 1.0, "cutmix": 0.0,
                      "cutmix_full": 0.0, "equal_kinds": False, "teacher_trains_encoder": True, "complete_at": 0.0}


class ConfKDTrainer_1epoch(ConfKDTrainer):
    fixed_settings = {"epochs": 1}


class ConfKDTrainer_5epochs(ConfKDTrainer):
    fixed_settings = {"epochs": 5}


class ConfKDTrainer_50epochs(ConfKDTrainer):
    fixed_settings = {"epochs": 50}


class ConfKDTrainer_100epochs(ConfKDTrainer):
    fixed_settings = {"epochs": 100}


class ConfKDTrainer_250epochs(ConfKDTrainer):
    fixed_settings = {"epochs": 250}
