"""The training slices themselves as samples, as they are or under exact symmetries: the ceiling that copying sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from allpet.augmentation import SymmetryAugmentation
from allpet.batches import SinogramBatch
from allpet.geometry import ParallelBeam
from allpet.prompts import Prompt, answers
from allpet.randomness import keyed_generator
from allpet.systems.baselines.base import SinogramGenerator


class ResampledSlices(SinogramGenerator, nn.Module):
    """Draw training slices of the prompt, with replacement.

    It is not exported: its weights would be the patients' slices.

    Args:
        slices: all that is trained on, such as ``data.train_set[list(range(len(data.train_set)))]``.
        geometry: of the slices.
        symmetry: drawn anew for each sample; None gives slices as they are.
    """

    sinogram: Tensor

    def __init__(
        self, slices: SinogramBatch, geometry: ParallelBeam, symmetry: SymmetryAugmentation | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("sinogram", slices.sinogram, persistent=False)
        self.known, self.geometry, self.symmetry = Prompt(*(index.cpu() for index in slices.prompt)), geometry, symmetry

    def generate(self, prompt: Prompt, seeds: Sequence[int]) -> Tensor:
        """Draw slices in data units, ``(batch, 1, views, bins)``.

        Raises:
            ValueError: if no slice answers a prompt.
        """
        drawn = []
        for tracer, region, seed in zip(prompt.tracer.tolist(), prompt.region.tolist(), seeds, strict=True):
            generator = keyed_generator(seed, "resampling")
            candidates = answers((tracer, region), self.known).nonzero()[:, 0]
            row = candidates[torch.randint(len(candidates), (1,), generator=generator)]
            chosen = self.sinogram[row.to(self.sinogram.device)]
            drawn.append(chosen if self.symmetry is None else self.symmetry(chosen, generator)[0])
        return torch.cat(drawn)
