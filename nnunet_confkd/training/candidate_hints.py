"""Hints where classes are annotated in some cases and not in others: sets of candidate classes.

An image that is annotated for some classes shows the teacher which of its voxels can be what
(:func:`nnunet_confkd.training.hints.hint_channels`). Such hints are simulated on fully annotated images, by hiding the
classes that an image of the training set lacks. The teacher learns to complete the missing classes, and the student
follows it.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnunet_confkd.training.hint_patterns import KEPT
from nnunet_confkd.training.hints import HintSampler, class_map, highest, rng_of_batch
from nnunet_confkd.training.losses import annotated_voxels, hide_unlisted

Lists = tuple[bool, ...]  # for each head, whether an image is annotated for it


class CandidateHints(HintSampler):
    """Draws the hint mask of each batch, and for which classes the hints of each image are.

    The sampler remembers what each annotated image has: the classes that it is annotated for, and whether all of its
    voxels are annotated. For a fully annotated image it draws one of them, hides the classes that this one lacks, and
    shows either all voxels or simulated annotations. These are simulated from the patterns of images with the same
    classes (see :class:`HintSampler`), because the background of each list of classes is another one.

    The images that come first in a batch may themselves lack classes, if no case is fully annotated. Lists with classes
    that an image lacks are then not drawn for it.

    The arguments are those of :class:`HintSampler`.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.samplers: dict[Lists, HintSampler] = {}
        self.seen: Counter[tuple[Lists, bool]] = Counter()  # lists of images, and whether all voxels are annotated

    def _with_mask(self, batch: dict) -> dict:
        """Add `hint_mask` and `hint_listed` to a batch of the stratified loader, which holds `inside` and `listed`."""
        target = highest(batch["target"])
        mask = (annotated_voxels(target, self.ignore_label, self.regions) & batch["inside"]).clone()
        images, hinted = batch["data"][:, :self.image_channels].numpy(), batch["listed"].clone()
        rng, num_full = rng_of_batch(), batch["num_full"]
        for i in (*range(num_full, len(images)), *range(num_full)):
            image, inside = (images[i], target[i:i + 1]), batch["inside"][i, 0].numpy()
            if i < num_full:
                drawn, lists = self._draw(*image, inside, hinted[i], rng)
                mask[i, 0], hinted[i] = torch.from_numpy(drawn), torch.tensor(lists)
            else:
                self._remember(*image, mask[i, 0].numpy(), inside, hinted[i])
        return {**batch, "hint_mask": mask, "hint_listed": hinted}

    @property
    def has_seen_enough(self) -> bool:
        """Whether enough images of each list of classes that has been met have been seen."""
        return sum(self.seen.values()) >= KEPT * max(1, len(self.seen))

    def draw_volume(self, data: np.ndarray, target: Tensor, inside: np.ndarray, patch_size: Sequence[int],
                    rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """Simulate annotations of a whole, fully annotated image; see :meth:`HintSampler.draw_volume`."""
        if not self.seen:
            return torch.zeros(1, 1, *inside.shape, dtype=torch.bool), None
        everything = torch.ones(len(next(iter(self.seen))[0]), dtype=torch.bool)
        mask, lists = self._draw(data, target, inside, everything, rng, patch_size)
        return torch.from_numpy(mask)[None, None], torch.tensor([lists])

    def _labels(self, target: Tensor, lists: Lists) -> np.ndarray:
        """One number for each voxel as :func:`class_map` gives it, with the classes hidden that are not listed."""
        return class_map(hide_unlisted(target, torch.tensor([lists]), self.regions), self.regions)[0]

    def _remember(self, data: np.ndarray, target: Tensor, annotated: np.ndarray, inside: np.ndarray,
                  listed: Tensor) -> None:
        """Remember what an image that is not fully annotated has."""
        if not annotated.any():
            return
        lists = tuple(listed.tolist())
        complete = not all(lists) and bool((annotated == inside).all())
        self.seen[lists, complete] += 1
        if not complete:
            sampler = self.samplers.setdefault(lists, HintSampler(self.ignore_label, self.regions, self.no_hints))
            sampler.observe(data, self._labels(target, lists), annotated, inside)

    def _draw(self, data: np.ndarray, target: Tensor, inside: np.ndarray, listed: Tensor, rng: np.random.Generator,
              patch_size: Sequence[int] | None = None) -> tuple[np.ndarray, Lists]:
        """Draw an image that has been seen, and simulate what it has.

        Args:
            data: The image, `(channels, *spatial)`.
            target: That of the image, `(1, channels, *spatial)`.
            inside: Bool, `(*spatial)`: where the image is.
            listed: Bool, `(heads,)`: the classes that the image itself is annotated for.
            rng: Source of random numbers.
            patch_size: That of the network, if the image is a whole one.

        Returns:
            Which voxels are hints, bool `(*spatial)`, and for which heads the hints are.
        """
        own = tuple(listed.tolist())
        known = {what: number for what, number in self.seen.items()
                 if all(mine or not theirs for mine, theirs in zip(own, what[0]))}
        if not known:
            return np.zeros(inside.shape, bool), own
        shares = np.array(list(known.values()), float)
        lists, complete = list(known)[rng.choice(len(known), p=shares / shares.sum())]
        if complete:
            return inside & (rng.random() >= self.no_hints), lists
        labels, sampler = self._labels(target, lists), self.samplers[lists]
        if patch_size is None:
            return sampler.simulate(data, labels, inside, rng), lists
        return sampler.simulate_volume(data, labels, inside, patch_size, rng), lists
