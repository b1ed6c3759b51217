"""The trainers that nnU-Net finds through nnUNet_extTrainer. The classes live in the installed package."""
from nnunet_confkd.training.trainer import ConfKDTrainer  # noqa: F401
from nnunet_confkd.training.variants import (  # noqa: F401
    ConfKDTrainer_1epoch,
    ConfKDTrainer_5epochs,
    ConfKDTrainer_50epochs,
    ConfKDTrainer_100epochs,
    ConfKDTrainer_250epochs,
    ConfKDTrainer_MedIA2023,
    ConfKDTrainer_noEntropy,
    ConfKDTrainer_noKL,
    ConfKDTrainer_partialOnly,
)
