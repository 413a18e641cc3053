"""The public face that all generators of sinograms share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from allpet.batches import PromptBatch, unmasked_stack
from allpet.geometry import ParallelBeam
from allpet.prompts import Prompt
from allpet.scaling import Scaling
from allpet.systems.base import CosineSystem, check_label
from allpet.systems.sampling import Samples


class SinogramGenerator(ABC):
    """Something that makes sinograms from prompts and seeds.

    Attributes:
        geometry: of the sinograms; None before it is known.
        batch_size: samples that are made at once.
    """

    geometry: ParallelBeam | None = None
    batch_size: int = 64

    @abstractmethod
    def generate(self, prompt: Prompt, seeds: Sequence[int]) -> Tensor:
        """Make one batch.

        Args:
            prompt: one prompt per seed.
            seeds: one per sample; nothing else may decide what a sample is.

        Returns:
            sinograms ``(batch, 1, views, bins)`` in data units, or stacks ``(batch, 3, views, bins)``.
        """

    @torch.no_grad()
    def sample(self, prompt: Prompt, seeds: Sequence[int], progress: bool = False) -> Samples:
        """Generate sinograms.

        Args:
            prompt: one prompt per seed; index 0 leaves a half open.
            seeds: one per sample; equal seeds and prompts give equal samples whatever the batch.
            progress: whether to show a progress bar.

        Returns:
            the samples; where the generator knows no masks, their stack is that of an empty one.

        Raises:
            ValueError: if prompts and seeds differ in number, or there are none.
            RuntimeError: if the geometry is not known.
        """
        if len(prompt.tracer) != len(seeds) or not len(seeds):
            raise ValueError(
                f"There are {len(prompt.tracer)} prompts and {len(seeds)} seeds: give one seed per prompt, and at "
                "least one."
            )
        if self.geometry is None:
            raise RuntimeError("The geometry of the sinograms is unknown: load the model with from_pretrained.")
        pieces = []
        for start in tqdm(range(0, len(seeds), self.batch_size), desc="Sampling", disable=not progress, leave=False):
            stop = start + self.batch_size
            pieces.append(self.generate(Prompt(*(index[start:stop] for index in prompt)), seeds[start:stop]))
        made = torch.cat(pieces)
        stack = made if made.shape[1] == 3 else unmasked_stack(made)
        return Samples(stack[:, 1:2], stack, prompt, torch.tensor(list(seeds)), self.geometry)


class SinogramSystem(CosineSystem, SinogramGenerator):
    """A trained generator; scale and geometry of the sinograms come from the data module.

    Attributes:
        scaling: between data units and network range.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scaling = Scaling()

    def setup(self, stage: str) -> None:
        """Take geometry and scale from the data module; a scale that came with weights stays.

        Raises:
            ValueError: if the data module draws symmetries or mixes slices, and the network is not told.
        """
        if stage == "fit":
            check_label(self, self.label_size)
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "geometry", None) is None:
            return
        self.geometry = data.geometry  # type: ignore[union-attr]
        if stage == "fit" and float(self.scaling.scale) == 1.0:
            self.scaling.set_scale(data.scale)  # type: ignore[union-attr]

    @property
    def label_size(self) -> int:
        """Length of the label of what was done to the slices that the network is told; 0: none."""
        return 0

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> Samples:
        """Generate one sinogram for each prompt and seed."""
        return self.sample(batch.prompt, batch.seed.tolist())

    def on_device(self, prompt: Prompt) -> Prompt:
        """Return the prompt on this module's device."""
        return Prompt(*(index.to(self.device) for index in prompt))
