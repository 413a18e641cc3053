"""Scaling between a data set's units and the range the networks see.

One positive number per data set, never per sample, so that totals and SUV ratios survive, and a linear map with
g(0) = 0, so that positive + negative == full holds before and after it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scaling(nn.Module):
    """Divide by one fixed number, kept with the weights.

    Args:
        scale: the data set's units per network unit; 1 until ``set_scale`` is called.
    """

    scale: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.set_scale(scale)

    def set_scale(self, scale: float) -> None:
        """Fix the scale.

        Raises:
            ValueError: if it is not a positive finite number.
        """
        if not 0 < float(scale) < float("inf"):
            raise ValueError(f"The scale of a data set is {scale}, but must be positive: are all sinograms zero?")
        self.scale.fill_(float(scale))

    def forward(self, sinogram: Tensor) -> Tensor:
        """Data units to network range, any shape."""
        return sinogram / self.scale

    def inverse(self, sinogram: Tensor) -> Tensor:
        """Network range to data units, any shape."""
        return sinogram * self.scale
