"""The variants of ConfKDTrainer: the baseline, the ablations, the published objective and other numbers of epochs."""
from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_confkd.training.trainer import ConfKDTrainer


class ConfKDTrainer_noEntropy(ConfKDTrainer):
    fixed_settings = {"weight_entropy": 0.0}


class ConfKDTrainer_noKL(ConfKDTrainer):
    fixed_settings = {"weight_kl": 0.0}


class ConfKDTrainer_partialOnly(ConfKDTrainer):
    """One branch, nnU-Net's own network and loss (the ignore label), on the same stratified batches: the fair baseline."""

    fixed_settings = {"weight_teacher": 0.0, "weight_student": 1.0, "weight_kl": 0.0, "weight_entropy": 0.0,
                      "student_images": "all", "student_average": "joint"}
    build_network_architecture = staticmethod(nnUNetTrainer.build_network_architecture)


class ConfKDTrainer_IPMI2021(ConfKDTrainer):
    """The conference paper's objective: its weights, cross-entropy alone, the softmax over the softmax with the student
    as reference and no stop of the gradient, entropy on all images, one full image to five others.

    nnU-Net's remain: network, optimiser, augmentation, normalisation, deep supervision. Not reproduced: the entropy's
    division by C and its triple count of the full images; full images enter L_w with their whole mask, not with a
    weakened copy.
    """

    fixed_settings = {"weight_teacher": 1.0, "weight_student": 0.1, "weight_kl": 50.0, "weight_entropy": 1.0,
                      "supervised_loss": "ce", "kl_reference": "student", "kl_detach_teacher": False,
                      "kl_temperature": 2.0, "kl_softmax_twice": True, "kl_images": "full", "kl_ramp_start": 0.0,
                      "kl_ramp_end": 0.0, "extra_resolutions": "all", "entropy_images": "all", "full_share": 1 / 6}


class ConfKDTrainer_MedIA2023(ConfKDTrainer):
    """The journal paper's objective, with plain KL and weights of order 1: the KL on the fully labelled images alone, no hints."""

    fixed_settings = {"weight_kl": 1.0, "kl_images": "full", "kl_ramp_start": 0.0, "kl_ramp_end": 0.0, "extra_resolutions": "all"}


class ConfKDTrainer_1epoch(ConfKDTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1


class ConfKDTrainer_5epochs(ConfKDTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 5


class ConfKDTrainer_50epochs(ConfKDTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 50


class ConfKDTrainer_100epochs(ConfKDTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 100


class ConfKDTrainer_250epochs(ConfKDTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 250
