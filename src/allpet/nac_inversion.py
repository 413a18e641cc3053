"""Semi-real attenuation pairs from a PET image without attenuation correction (NAC) and a CT of the same slice.

The projection of a NAC image is no NAC sinogram: its reconstruction has already mapped the attenuated data to what the
Radon transform R can reach, and multiplying that by attenuation-correction factors makes streaks. Instead, the activity
is sought that explains the image,

    FBP(a * R(activity)) = NAC,   a = exp(-R mu),   activity >= 0 inside the body,

by Chang's correction (IEEE Trans. Nucl. Sci. 25, 1978, p. 638), iterated: Chang's factor is the inverse of the mean of
a over the views at each pixel. Then ``a * R(activity)`` is a sinogram before, ``R(activity)`` one after correction:
real anatomy and attenuation, re-simulated physics. What the activity cannot explain is reported as residual.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allpet.projector import Radon
from allpet.reconstruction import fbp

FWHM = 2.3548  # of a Gaussian with standard deviation 1
BODY_MU = 0.003
"""Attenuation, 1/mm, above which a pixel belongs to the body: a third of water's, a little more than lung's."""


class Inversion(NamedTuple):
    """What the inversion finds.

    Attributes:
        activity: in the image's units, ``(batch, 1, rows, columns)``.
        before: attenuated sinogram ``a * R(activity)``, ``(batch, 1, views, bins)``.
        factors: attenuation factors ``a`` in (0, 1], the shape of ``before``.
        residual: relative L2 difference of ``FBP(before)`` to the image, in the body and wherever the image shows more
            than a fifth of its maximum, ``(batch,)``.
    """

    activity: Tensor
    before: Tensor
    factors: Tensor
    residual: Tensor


def hounsfield(values: Tensor, units: Literal["auto", "hu", "stored", "scaled"] = "auto") -> Tensor:
    """Return CT values in Hounsfield units.

    Args:
        values: one slice or several, any shape.
        units: what they are: ``hu``; ``stored`` integers, HU + 1024; ``scaled`` slices, stored integers divided by
            something, so that values differ by whole steps; ``auto`` tells them apart by their range.

    Raises:
        ValueError: if the units cannot be told.
    """
    low, high = float(values.min()), float(values.max())
    if units == "auto":
        if low < -200:
            units = "hu"
        elif low >= 0 and high > 500:
            units = "stored"
        elif low >= 0 and 0 < high <= 1:
            units = "scaled"
        else:
            raise ValueError(
                f"CT values from {low:g} to {high:g} are no known units; say which, or convert them to HU."
            )
    if units == "hu":
        return values.float()
    if units == "scaled":
        levels = values.double().unique()
        step = float(levels.diff().min()) if len(levels) > 1 else 0.0
        if step <= 0 or high / step > 2**16:
            raise ValueError(f"CT values up to {high:g} are no multiples of a step; convert them to HU.")
        values = torch.round(values.double() / step)
    return (values - 1024).float()


def attenuation_of(hu: Tensor) -> Tensor:
    """Linear attenuation at 511 keV in 1/mm from Hounsfield units at 120 kVp (Carney et al., Med. Phys. 33, 2006).

    Two lines that meet near 47 HU: water and air mix below, water and bone above.
    """
    above_air = (hu + 1000).clamp_min(0)
    per_cm = torch.where(above_air < 1047, 9.6e-5 * above_air, 5.10e-5 * above_air + 4.71e-2)
    return per_cm / 10


def resample_image(image: Tensor, pixel_mm: float, size: int, new_pixel_mm: float, blur_mm: float = 0.0) -> Tensor:
    """Blur images and sample them on another grid with the same centre; zero beyond their edges.

    Args:
        image: ``(batch, 1, rows, columns)``.
        pixel_mm: its pixel width.
        size: rows and columns of the result.
        new_pixel_mm: its pixel width.
        blur_mm: full width at half maximum of a Gaussian, such as the resolution of PET.
    """
    rows, columns = image.shape[-2:]
    for axis in (-1, -2):
        image = _blur(image, blur_mm / pixel_mm / FWHM, axis)
    centres = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * new_pixel_mm / pixel_mm
    y, x = (2 * centres / n for n in (rows, columns))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(image)
    return F.grid_sample(image, grid.expand(len(image), -1, -1, -1), align_corners=False)


def invert_attenuation(
    radon: Radon,
    image: Tensor,
    attenuation: Tensor,
    iterations: int = 25,
    margin_mm: float = 8.0,
    resolution_mm: float = 5.0,
) -> Inversion:
    """Find the activity whose attenuated sinogram reconstructs to a NAC image.

    Args:
        radon: projector of the image's grid.
        image: PET without attenuation correction, ``(batch, 1, rows, columns)``, any units.
        attenuation: of the same slices, 1/mm, the shape of ``image``.
        iterations: of Chang's correction; 25 change the residual by less than a tenth of it afterwards.
        margin_mm: how far activity may lie outside of what attenuates: PET and CT are rarely aligned to the pixel.
        resolution_mm: of the image, full width at half maximum; no finer detail is sought.

    Raises:
        ValueError: if shapes differ, attenuation is negative, or a slice shows no body.
    """
    shape = radon.geometry.image_shape
    if image.shape != attenuation.shape or image.shape[1:] != (1, *shape):
        raise ValueError(
            f"image and attenuation have the shapes {tuple(image.shape)} and {tuple(attenuation.shape)}; both must be "
            f"(batch, 1, {shape[0]}, {shape[1]})."
        )
    if (attenuation < 0).any():
        raise ValueError("attenuation must not be negative: give it in 1/mm, not in Hounsfield units.")
    body = attenuation > BODY_MU
    if not body.flatten(1).any(1).all():
        raise ValueError("A slice has no attenuation above air: PET and CT must show the same body.")
    reach = 2 * round(margin_mm / radon.geometry.pixel_mm) + 1
    support = F.max_pool2d(body.float(), reach, stride=1, padding=reach // 2)
    image = image.float()
    factors = torch.exp(-radon.project(attenuation.float()))
    seen = radon.backproject(torch.ones_like(factors[:1])).clamp_min(1e-6)
    chang = support / (radon.backproject(factors) / seen).clamp_min(1e-3)
    activity = image * chang
    for _ in range(iterations):
        missing = image - fbp(radon, factors * radon.project(activity))
        for axis in (-1, -2):  # FBP damps fine detail; making up for that would grow a checkerboard
            missing = _blur(missing, resolution_mm / radon.geometry.pixel_mm / FWHM, axis)
        activity = (activity + chang * missing).clamp_min(0)
    before = factors * radon.project(activity)
    region = body | (image > 0.2 * image.amax((1, 2, 3), keepdim=True))
    error = ((fbp(radon, before) - image) * region).square().sum((1, 2, 3))
    residual = (error / (image * region).square().sum((1, 2, 3)).clamp_min(1e-30)).sqrt()
    return Inversion(activity, before, factors, residual)


def _blur(image: Tensor, sigma: float, axis: int) -> Tensor:
    if sigma <= 0:
        return image
    half = max(1, round(4 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=image.dtype) / sigma) ** 2)
    weights = (weights / weights.sum()).to(image)
    shape = (1, 1, 1, -1) if axis == -1 else (1, 1, -1, 1)
    padding = (half, half, 0, 0) if axis == -1 else (0, 0, half, half)
    return F.conv2d(F.pad(image, padding, mode="replicate"), weights.view(shape))
