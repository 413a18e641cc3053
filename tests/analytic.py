"""Closed-form sinograms for tests, averaged over each bin, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allpet import ParallelBeam

CENTRES = torch.tensor([[40.0, 60.0], [-80.0, 20.0], [10.0, -90.0]], dtype=torch.float64)
SIGMAS = torch.tensor([12.0, 20.0, 9.0], dtype=torch.float64)
HEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
# Off-centre x, y, semi-axes, angle, height; in units of the radius of the field of view.
ELLIPSES = (
    (0.05, -0.02, 0.70, 0.55, 0.2, 1.0),
    (0.23, 0.16, 0.19, 0.11, 1.0, 0.8),
    (-0.31, -0.08, 0.12, 0.25, 0.4, -0.5),
    (0.08, -0.28, 0.10, 0.08, 0.0, 1.5),
)


def gaussian_sinogram(
    geometry: ParallelBeam, centres: Tensor = CENTRES, sigmas: Tensor = SIGMAS, heights: Tensor = HEIGHTS
) -> Tensor:
    """Sinogram of round Gaussians at (x, y) mm, ``(1, 1, views, bins)``."""
    angles = geometry.angles[:, None, None]
    distance = geometry.bin_centers[:, None] - (centres[:, 0] * angles.cos() + centres[:, 1] * angles.sin())
    mass = heights * 2 * math.pi * sigmas**2
    edges = [torch.erf((distance + side * geometry.bin_mm / 2) / (sigmas * math.sqrt(2))) for side in (1, -1)]
    return (mass * (edges[0] - edges[1]) / (2 * geometry.bin_mm)).sum(-1)[None, None]


def ellipse_sinogram(geometry: ParallelBeam) -> Tensor:
    """Sinogram of ``ELLIPSES``, ``(1, 1, views, bins)``."""
    angles = geometry.angles[:, None]
    edges = (torch.arange(geometry.n_bins + 1, dtype=torch.float64) - geometry.n_bins / 2) * geometry.bin_mm
    total = torch.zeros(geometry.sinogram_shape, dtype=torch.float64)
    for ellipse in ELLIPSES:
        x, y, a, b = (length * geometry.field_of_view_mm for length in ellipse[:4])
        turn, height = ellipse[4:]
        radius = ((a * (angles - turn).cos()) ** 2 + (b * (angles - turn).sin()) ** 2).sqrt()
        t = ((edges - x * angles.cos() - y * angles.sin()) / radius).clamp(-1, 1)
        total += (a * b * height * (t * (1 - t**2).sqrt() + t.asin())).diff(dim=1) / geometry.bin_mm
    return total[None, None]


def smooth_image(geometry: ParallelBeam, edge_mm: float = 8.0) -> Tensor:
    """``ELLIPSES`` with soft edges on the geometry's image grid, ``(1, 1, rows, columns)`` float32."""
    x, y = (axis.double() / geometry.field_of_view_mm for axis in geometry.pixel_centers)
    total = torch.zeros(geometry.image_shape, dtype=torch.float64)
    for cx, cy, a, b, turn, height in ELLIPSES:
        u = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
        v = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
        depth = (1 - ((u / a) ** 2 + (v / b) ** 2).sqrt()) * min(a, b) * geometry.field_of_view_mm
        total += height * torch.sigmoid(depth / edge_mm)
    return total.float()[None, None]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|."""
    return float((value - reference).norm() / reference.norm())
