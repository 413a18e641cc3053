"""Typed batches: what a data module gives and a system takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from allpet.augmentation import MaskedStack
from allpet.prompts import Prompt


class SinogramBatch(NamedTuple):
    """Unpaired sinograms for stages 1 and 2.

    Attributes:
        sinogram: what is trained on, ``(batch, 1, views, bins)``, float32, in the data set's own units (the simulator:
            SUV x mm). By default it carries realistic noise, as a user's data do.
        noise_free: the attenuation-corrected sinogram without noise, in the same units and shape; None where it is not
            known (real data). Read ``expected``.
        prompt: tracer and region of each slice.
        sample_id: identity of each slice in its data set, ``(batch,)``, int64; keys random draws.
        patient_id: index of each slice's patient, ``(batch,)``, int64.
        stack: masks and stack drawn for ``sinogram`` on the batch's device; None before ``on_after_batch_transfer``.
        symmetry: label of what was done to the slices, ``(batch, labels)``, all zero where nothing was: that of the
            exact symmetries (``SymmetryParameters.label()``), then that of mix-up (``MixupParameters.label()``), of
            those that are drawn at all; None where none is. Augment-conditioning reads it.
    """

    sinogram: Tensor
    noise_free: Tensor | None
    prompt: Prompt
    sample_id: Tensor
    patient_id: Tensor
    stack: MaskedStack | None = None
    symmetry: Tensor | None = None

    @property
    def expected(self) -> Tensor:
        """What a result is compared with: the noise-free sinogram; where it is not known, ``sinogram`` itself."""
        return self.sinogram if self.noise_free is None else self.noise_free

    def as_stack(self) -> Tensor:
        """[positive, full, negative], ``(batch, 3, views, bins)``; without masks everything is negative."""
        return unmasked_stack(self.sinogram) if self.stack is None else self.stack.stack


class PromptBatch(NamedTuple):
    """What to generate.

    Attributes:
        prompt: tracer and region of each sample.
        seed: seed of each sample, ``(batch,)``, int64; a sample depends on its seed and prompt alone.
    """

    prompt: Prompt
    seed: Tensor


def unmasked_stack(sinogram: Tensor) -> Tensor:
    """Return the stack of an empty mask, [0, y, y], ``(batch, 1, views, bins) -> (batch, 3, views, bins)``.

    Drawn masks cover a small part, so that an encoder that has learned them knows stacks that are nearly all negative;
    one that is all positive is far from those, and comes back with an error ten times as large.
    """
    return torch.cat([torch.zeros_like(sinogram), sinogram, sinogram], dim=1)
