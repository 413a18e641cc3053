"""Layers that know what a sinogram is."""

from __future__ import annotations

import torch
from torch import Tensor


def moebius_pad(sinogram: Tensor, views: int) -> Tensor:
    """Continue a sinogram past both ends of its half turn: p(theta + pi, s) = p(theta, -s).

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        views: number of views to add at each end.

    Returns:
        ``(batch, channel, views + 2 * views added, bins)``.
    """
    if views == 0:
        return sinogram
    before, after = sinogram[:, :, -views:].flip(-1), sinogram[:, :, :views].flip(-1)
    return torch.cat([before, sinogram, after], dim=2)
