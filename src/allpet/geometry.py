"""Parallel-beam geometry: where every pixel, view and bin lies.

Vocabulary. A *view* is one projection angle, a *bin* one radial sample of it. *Shape* counts samples, *size* is
a length; lengths are in mm and angles in radians. An image is ``(rows, columns)`` with row 0 at the top and y up;
a sinogram is ``(views, bins)``. The line of response of view theta and bin s is ``x cos(theta) + y sin(theta) = s``.
Views cover half a turn with the end excluded, so a sinogram closes on itself with a flip:
``p(theta + pi, s) = p(theta, -s)``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParallelBeam:
    """A two-dimensional parallel-beam acquisition and the square image grid that belongs to it.

    Args:
        n_views: number of views, at ``k * pi / n_views``.
        n_bins: number of bins per view; their centres lie symmetrically about the axis of rotation.
        bin_mm: distance between bins, mm.
        image_size: number of rows and of columns of the image grid.
        pixel_mm: pixel width, mm.

    Raises:
        ValueError: if a count is not a positive whole number or a length not a positive number.
    """

    n_views: int
    n_bins: int
    bin_mm: float
    image_size: int
    pixel_mm: float

    def __post_init__(self) -> None:
        for name in ("n_views", "n_bins", "image_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be a positive whole number.")
        for name in ("bin_mm", "pixel_mm"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} is {value!r}, but must be a positive length in mm.")
            object.__setattr__(self, name, float(value))

    @classmethod
    def preset(cls, name: str) -> ParallelBeam:
        """Return a named geometry.

        Scanner presets hold the radial bins and stored views of STIR's scanner list (arc-corrected where the
        vendor's data are); images are given the same number of pixels as bins.

        Args:
            name: one of ``ParallelBeam.presets()``.

        Raises:
            ValueError: if there is no such preset.
        """
        if name not in _PRESETS:
            raise ValueError(f"There is no geometry preset {name!r}; choose one of {', '.join(_PRESETS)}.")
        return _PRESETS[name]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Return the names that ``preset`` knows."""
        return tuple(_PRESETS)

    @property
    def angles(self) -> Tensor:
        """Angle of each view in radians, ``(views,)``, float64."""
        return torch.arange(self.n_views, dtype=torch.float64) * (math.pi / self.n_views)

    @property
    def bin_centers(self) -> Tensor:
        """Signed distance of each bin from the axis of rotation in mm, ``(bins,)``, float64."""
        return (torch.arange(self.n_bins, dtype=torch.float64) - (self.n_bins - 1) / 2) * self.bin_mm

    @property
    def pixel_centers(self) -> tuple[Tensor, Tensor]:
        """X of each pixel and y of each pixel in mm, two ``(rows, columns)`` float64 tensors."""
        axis = (torch.arange(self.image_size, dtype=torch.float64) - (self.image_size - 1) / 2) * self.pixel_mm
        y, x = torch.meshgrid(-axis, axis, indexing="ij")
        return x, y

    @property
    def field_of_view_mm(self) -> float:
        """Radius in mm of the disc that both the bins and the image grid cover in every view."""
        return min(self.n_bins * self.bin_mm, self.image_size * self.pixel_mm) / 2

    @property
    def sinogram_shape(self) -> tuple[int, int]:
        """``(views, bins)``."""
        return (self.n_views, self.n_bins)

    @property
    def image_shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return (self.image_size, self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments, for JSON and YAML."""
        return asdict(self)


_PRESETS = {
    # Fits a laptop: every number divides by 16, so two autoencoder and two denoiser levels need no padding.
    "laptop": ParallelBeam(n_views=64, n_bins=80, bin_mm=5.4, image_size=80, pixel_mm=5.4),
    "desk": ParallelBeam(n_views=128, n_bins=128, bin_mm=4.0, image_size=128, pixel_mm=4.0),
    "research": ParallelBeam(n_views=256, n_bins=256, bin_mm=2.4, image_size=256, pixel_mm=2.4),
    "gpu24": ParallelBeam(n_views=512, n_bins=512, bin_mm=1.4, image_size=512, pixel_mm=1.4),
    "mct": ParallelBeam(n_views=168, n_bins=400, bin_mm=2.005, image_size=400, pixel_mm=2.005),
    "mmr": ParallelBeam(n_views=252, n_bins=344, bin_mm=2.086, image_size=344, pixel_mm=2.086),
    "vision": ParallelBeam(n_views=50, n_bins=520, bin_mm=1.6, image_size=520, pixel_mm=1.6),
    "discovery690": ParallelBeam(n_views=288, n_bins=381, bin_mm=2.1306, image_size=381, pixel_mm=2.1306),
    "discovery_mi": ParallelBeam(n_views=272, n_bins=415, bin_mm=2.206, image_size=415, pixel_mm=2.206),
    "signa": ParallelBeam(n_views=224, n_bins=357, bin_mm=2.01565, image_size=357, pixel_mm=2.01565),
    "hr_plus": ParallelBeam(n_views=144, n_bins=288, bin_mm=2.25, image_size=288, pixel_mm=2.25),
    "hrrt": ParallelBeam(n_views=288, n_bins=288, bin_mm=1.21875, image_size=288, pixel_mm=1.21875),
    "gemini_tf": ParallelBeam(n_views=322, n_bins=322, bin_mm=4.0, image_size=322, pixel_mm=4.0),
}
