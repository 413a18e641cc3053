"""No autoencoder at all: what systems over latents are given to work on sinograms themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from allpet.batches import unmasked_stack
from allpet.models.autoencoder import Decoded
from allpet.power import POINTS
from allpet.scaling import Scaling


class PixelSpace(nn.Module):
    """Has the face of ``Autoencoder``; its latent is the scaled sinogram, one channel.

    The scale is set when a training starts, from the data.
    """

    power_gain: Tensor
    latent_channels, factor = 1, 1

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.scaling = Scaling()
        self.register_buffer("power_gain", torch.ones(POINTS), persistent=False)  # nothing is lost

    def latent_shape(self, views: int, bins: int) -> tuple[int, int, int]:
        """``(channels, rows, columns)``."""
        return (1, views, bins)

    def encode_mean(self, stack: Tensor) -> Tensor:
        """Return the full sinogram of a stack ``(batch, 3, views, bins)``, ``(batch, 1, views, bins)``."""
        return stack[:, 1:2]

    def decode(self, latent: Tensor, shape: tuple[int, int]) -> Decoded:
        """Return the sinogram itself, without negative values, and an empty mask."""
        full = latent[..., : shape[0], : shape[1]].float().clamp_min(0)
        return Decoded(unmasked_stack(full), torch.zeros_like(full))

    def pool(self, sinogram: Tensor) -> Tensor:
        """Return what is given: every bin stands for itself."""
        return sinogram
