"""The class-prior correction of L_w: annotators do not annotate all classes equally densely.

Points and scribbles are drawn class by class, so that a voxel of a small class is annotated far more often than one of
the background. In eroded masks it is the other way round. A network that learns from the annotated voxels alone learns
their class frequencies q instead of those of the whole image, pi. If a voxel's class alone decides how likely it is to
be annotated, the class probabilities among the annotated voxels are proportional to p * q / pi. The loss of partially
annotated images is therefore taken on logits + log(q / pi), and the logits themselves learn p. Images that are not
annotated for all classes are neither counted nor corrected.

Source: logit adjustment (A. K. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314).
"""
from __future__ import annotations

import torch
from torch import Tensor

from nnunet_confkd.training.hints import highest
from nnunet_confkd.training.losses import annotated_voxels

# The logarithms are bounded. The background of masks of the organ alone is never annotated, and log(0) would remove it
# from the loss of these images.
LIMIT = 4.0


class ClassPrior:
    """Counts the classes in batches, and adds the correction to each of them as "prior_shift", `(heads,)`.

    Both frequencies are those of the patches that the network has seen so far, because the sampling of patches changes
    them, too. Each worker of the loader counts its own batches, so that no device has to wait for a count.

    Args:
        num_heads: Number of classes with the background, or number of regions.
        ignore_label: The data set's ignore label.
        regions: Whether targets hold regions. Each head has a frequency of its own then, and its correction is the
            difference of the log-odds.
        strength: Factor of the correction, from 0 to 1.
    """

    def __init__(self, num_heads: int, ignore_label: int, regions: bool = False, strength: float = 1.0):
        self.num_heads, self.ignore_label, self.regions, self.strength = num_heads, ignore_label, regions, strength
        # voxels of each class, and all voxels, of fully and of partially annotated images
        self.counts = torch.zeros(2, num_heads + 1, dtype=torch.float64)

    def __call__(self, batch: dict) -> dict:
        """Count a batch of the stratified loader.

        Args:
            batch: With "target", "num_full" and "inside"; and "listed", bool `(B, heads)`, if some images are not
                annotated for all classes.

        Returns:
            The batch with "prior_shift", float32 `(heads,)`, which is 0 until both kinds of images have been counted.
        """
        target = highest(batch["target"])
        full = torch.arange(len(target)) < batch["num_full"]
        whole = batch["listed"].all(1) if "listed" in batch else torch.ones_like(full)
        for i, images in enumerate((full & whole, ~full & whole)):
            self.counts[i] += self._count(target[images], batch["inside"][images])
        return {**batch, "prior_shift": self.shift()}

    def _count(self, target: Tensor, inside: Tensor) -> Tensor:
        """Voxels of each class and all voxels that are annotated and not padding, `(heads + 1,)`."""
        voxels = annotated_voxels(target, self.ignore_label, self.regions) & inside
        if self.regions:
            of_head = [(target[:, head:head + 1].bool() & voxels).sum() for head in range(self.num_heads)]
            return torch.stack((*of_head, voxels.sum()))
        of_class = torch.bincount(target[voxels].long(), minlength=self.num_heads)
        return torch.cat((of_class, of_class.sum()[None]))

    def shift(self) -> Tensor:
        """Compute the correction of the counts so far, float32 `(heads,)`."""
        if not self.counts[:, -1].all():
            return torch.zeros(self.num_heads)
        # One voxel more of each class: the first batches may lack a class.
        full, annotated = (self.counts[:, :-1] + 1) / (self.counts[:, -1:] + (2 if self.regions else self.num_heads))
        ratio = annotated.logit() - full.logit() if self.regions else annotated.log() - full.log()
        return (self.strength * ratio.clamp(-LIMIT, LIMIT)).float()
