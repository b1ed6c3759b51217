"""The teacher's hints of a whole image as one channel; one for each class could take more memory than the logits."""
from __future__ import annotations

import torch
from torch import nn

from nnunet_confkd.training.hints import hint_channels, regions_of
from nnunet_confkd.training.network import unwrap


def image_hints(label: torch.Tensor, hint_mask: torch.Tensor, label_manager,
                listed: torch.Tensor | None = None) -> torch.Tensor:
    """Make the teacher's hints of a whole image.

    Args:
        label: Label map, `(1, *spatial)`.
        hint_mask: Bool, `(1, *spatial)`: which voxels are hints.
        label_manager: nnU-Net's, with the classes or regions.
        listed: Bool, `(1, heads)`: for which heads the hints are. None: for all.

    Returns:
        Of labels one channel for :class:`LabelHints`, `(1, *spatial)`: label + 1 where there is a hint, 0 elsewhere. Of
        regions, which may overlap, and of hints for some heads alone, which are sets of classes, the channels of
        `hint_channels`, `(heads + 1, *spatial)`.
    """
    if not label_manager.has_regions and (listed is None or listed.all()):
        return torch.where(hint_mask, label.int() + 1, 0)
    target = regions_of(label, label_manager)[None]
    return hint_channels(target, hint_mask[None], label_manager.num_segmentation_heads, label_manager.has_regions,
                         listed)[0]


class LabelHints(nn.Module):
    """A two-branch network whose input ends with the one channel of :func:`image_hints`.

    Each patch gets its channels only when it is predicted. The state dict is that of the network.

    Args:
        network: A `TwoBranchUNet` with `hints_in_input`, or what wraps it.
        num_heads: Number of classes with the background.
    """

    def __init__(self, network: nn.Module, num_heads: int):
        super().__init__()
        self.network, self.num_heads = network, num_heads
        self.train(network.training)

    def forward(self, x: torch.Tensor):
        """Compute the logits of patches, `(B, channels + 1, *spatial)`."""
        hints = x[:, -1:]
        return self.network(torch.cat((x[:, :-1], hint_channels(hints - 1, hints > 0, self.num_heads)), 1))

    def load_state_dict(self, *args, **kwargs):
        """Load the weights of the network."""
        return unwrap(self.network).load_state_dict(*args, **kwargs)
