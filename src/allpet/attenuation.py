"""Fit to a scan that was not corrected for attenuation: what attenuates is found from the scan and from a guess.

A network that corrects for attenuation draws small things too faint, as networks do, though the scan shows them. To fit
its result to the scan takes the attenuation and the scatter that lie between the two, which are found here by what has
long been done without networks. With the corrected sinogram ``p = R x``, ``a = exp(-R mu)`` and the scatter ``s``,

    uncorrected = a p + s,   s = k B(a p).

*Attenuation and activity*: maximum likelihood of both in turn (MLAA, Nuyts et al., IEEE Trans. Med. Imaging 18, 1999).
Without time of flight the scan alone cannot tell them apart; here the activity starts at what the network has drawn,
the attenuation at a body of water, in smooth steps, and both stop after some tens. Steps outside the body are smaller:
a bed, a head holder or faint fat may attenuate there, but most of what attenuates is the body. *Scatter*: trues blurred
widely, ``B``, and scaled to what is counted beside the body (convolution and subtraction, Bailey and Meikle, Phys. Med.
Biol. 39, 1994), none where nothing lies beside it; the simulator's own is of that shape, that of a scanner is not
quite.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allpet.attention import TransparentMedicalAttention
from allpet.consistency import MeasuredFit, quick_image
from allpet.projector import Radon
from allpet.simulation.acquisition import gaussian_blur, scatter_shape

WATER, BONE = 0.0096, 0.0172
"""Attenuation at 511 keV, 1/mm: where the updates start, and of cortical bone, the most that they find."""
BEFORE, SMOOTH_MM = 20, 24.0
"""Updates of the attenuation before the activity follows, and full width at half maximum of the Gaussian that each is
averaged with (a sharp one explains small lesions away): chosen on validation patients (experiments/README.md)."""
USUAL = (0.6, 1.3)
"""Mean attenuation of bodies over water's that is not doubted; chests have lungs."""
NEIGHBOURHOOD_MM = 0.0
"""Of the activity: whole scans have so many counts that every pixel stands alone best, as was found there, too."""
_BODY_SHARE, _BODY_SMOOTH_MM = 0.1, 8.0  # skin and fat are faint, and the body's edge matters
_OUTSIDE = 0.2  # of a step, outside the body
_BESIDE_MM = 10.0  # so far from the body nothing but scatter is counted
_ROUNDS = 8  # in which the scatter settles
_EMPTY = 1e-3  # of the largest value; less is taken for as much


class Explained(NamedTuple):
    """What lies between a corrected sinogram and an uncorrected one.

    Attributes:
        attenuation: linear attenuation coefficient at 511 keV, 1/mm, ``(batch, 1, rows, columns)``.
        factor: exp(-R attenuation), the share of photon pairs that leaves the body, ``(batch, 1, views, bins)``.
        scatter: in the unit of the sinograms, ``(batch, 1, views, bins)``.
        body: what is taken for the body, ``(batch, 1, rows, columns)``, bool.
        weight: share of a step that each pixel takes, in the shape of ``body``.
        way: of each ray through the weights, mm, ``(batch, 1, views, bins)``.
    """

    attenuation: Tensor
    factor: Tensor
    scatter: Tensor
    body: Tensor
    weight: Tensor
    way: Tensor


@torch.no_grad()
def explain_uncorrected(
    corrected: Tensor, uncorrected: Tensor, radon: Radon, updates: int = BEFORE, smooth_mm: float = SMOOTH_MM
) -> Explained:
    """Find attenuation and scatter by which an uncorrected sinogram is that of a corrected one.

    Args:
        corrected: what a network makes of it, ``(batch, 1, views, bins)``, activity x mm; negative values count as 0.
        uncorrected: with noise and scatter, without randoms, in the same shape and unit: where nothing attenuates or
            scatters the two are equal.
        radon: the projector of their geometry.
        updates: of the attenuation, see ``update_attenuation``.
        smooth_mm: see there.

    Raises:
        ValueError: if the shapes do not fit or there are no updates.
    """
    shape = (len(corrected), 1, *radon.sinogram_shape)
    if updates < 1 or corrected.shape != shape or uncorrected.shape != shape:
        raise ValueError(
            f"updates is {updates} and the shapes are {tuple(corrected.shape)} and {tuple(uncorrected.shape)}; "
            f"expected at least 1 and twice {shape}."
        )
    trues = corrected.clamp(min=0)
    segment = TransparentMedicalAttention(radon, body_share=_BODY_SHARE, smooth_mm=_BODY_SMOOTH_MM)
    body = segment.areas(quick_image(trues, radon), domain="image").body
    start = WATER * body.to(trues)
    scatter = _scatter_beside(uncorrected, radon.project(body.to(trues)), radon)
    geometry = radon.geometry
    x, y = geometry.pixel_centers
    field = (x**2 + y**2 <= (geometry.n_bins * geometry.bin_mm / 2) ** 2).to(trues)
    weight = torch.where(body, 1.0, _OUTSIDE * field)
    found = Explained(start, torch.exp(-radon.project(start)), scatter, body, weight, radon.project(weight))
    for _ in range(updates):
        found = update_attenuation(found, trues, uncorrected, radon, smooth_mm)
    return found


def update_attenuation(
    found: Explained, corrected: Tensor, uncorrected: Tensor, radon: Radon, smooth_mm: float = SMOOTH_MM
) -> Explained:
    """Bring attenuation nearer to what lies between two sinograms, of which the first is not negative.

    ``mu <- mu + w G R' (y (1 - n / (y + s))) / G R' (R(w) y^2 / (y + s))`` between 0 and that of bone (MLTR, Nuyts et
    al., Phys. Med. Biol. 43, 1998), where n was measured, ``y = a p``, w is 1 in the body and .2 around it, and G is a
    Gaussian.

    Args:
        found: what lies between them so far.
        corrected: ``(batch, 1, views, bins)``, activity x mm.
        uncorrected: in the same shape and unit.
        radon: the projector of their geometry.
        smooth_mm: full width at half maximum of the Gaussian.
    """
    blur = gaussian_blur(radon.geometry.image_size, smooth_mm / radon.geometry.pixel_mm).to(corrected)
    least = _EMPTY * corrected.amax((2, 3), keepdim=True).clamp_min(torch.finfo(corrected.dtype).tiny)
    passed = found.factor * corrected
    expected = (passed + found.scatter).clamp(min=least)
    rise = blur @ radon.backproject(passed * (1 - uncorrected / expected)) @ blur
    curvature = blur @ radon.backproject(found.way * passed.square() / expected) @ blur
    step = torch.where(curvature > 0, rise / torch.where(curvature > 0, curvature, 1), 0)
    attenuation = (found.attenuation + found.weight * step).clamp(0, BONE)
    return found._replace(attenuation=attenuation, factor=torch.exp(-radon.project(attenuation)))


@torch.no_grad()
def fit_uncorrected(
    result: Tensor,
    measured: Tensor,
    radon: Radon,
    updates: int,
    attention: Tensor | None = None,
    neighbourhood_mm: float = NEIGHBOURHOOD_MM,
    start: Explained | None = None,
    smooth_mm: float = SMOOTH_MM,
) -> tuple[Tensor, Explained]:
    """Bring corrected sinograms nearer to what was measured before the correction, as ``fit_measured`` does otherwise.

    Args:
        result: corrected, ``(batch, 1, views, bins)``; negative values count as zero.
        measured: with noise and scatter, without randoms, in the same shape and unit.
        radon: the projector of their geometry.
        updates: how many, each of the activity (``MeasuredFit``), then of the attenuation.
        attention: see ``MeasuredFit``.
        neighbourhood_mm: see there.
        start: of attenuation and scatter; None for what ``explain_uncorrected`` finds.
        smooth_mm: see ``update_attenuation``.

    Returns:
        the projections of the images, same shape and units as *result*, never negative, and what lies between them and
        what was measured.

    Raises:
        ValueError: if the shapes do not fit, ``updates`` is less than 1 or the neighbourhood negative.
    """
    if updates < 1:
        raise ValueError(f"updates is {updates}, but must be at least 1.")
    found = explain_uncorrected(result, measured, radon, BEFORE, smooth_mm) if start is None else start
    fit = MeasuredFit(result, measured, radon, attention, neighbourhood_mm)
    for _ in range(updates):
        fit.update(found.factor, found.scatter)
        found = update_attenuation(found, fit.sinogram, measured, radon, smooth_mm)
    return fit.sinogram, found


def warn_of_attenuation(found: Tensor) -> None:
    """Warn where the attenuation of bodies, 1/mm, any shape, is not that of bodies in the mean."""
    share = float(found.mean()) / WATER if found.numel() else 1.0
    if not USUAL[0] <= share <= USUAL[1]:
        warnings.warn(
            f"The attenuation that was found in the body is {share:.2f} of water's in the mean, where {USUAL[0]} to "
            f"{USUAL[1]} is usual: the scan may be in another unit than the model's results, or corrected already; "
            "bring them to one unit, or fit nothing (UPDATES=0, data_consistency).",
            stacklevel=2,
        )


def _scatter_beside(uncorrected: Tensor, way: Tensor, radon: Radon) -> Tensor:
    """Return scatter of the shape of widely blurred trues and the size of what is counted beside the body.

    Args:
        uncorrected: ``(batch, 1, views, bins)``.
        way: of each ray through the body, mm, in the same shape.
        radon: the projector.
    """
    geometry = radon.geometry
    reach = 2 * round(_BESIDE_MM / geometry.bin_mm) + 1
    beside = (F.max_pool2d(way, (1, reach), stride=1, padding=(0, reach // 2)) < geometry.pixel_mm / 2).to(way)
    scatter = torch.zeros_like(uncorrected)
    for _ in range(_ROUNDS):  # its shape is that of the trues, which are what is left without it
        shape = scatter_shape(geometry, uncorrected - scatter)
        size = (shape.square() * beside).sum((2, 3), keepdim=True)
        scale = (uncorrected * shape * beside).sum((2, 3), keepdim=True) / torch.where(size > 0, size, 1)
        scatter = scale.clamp(min=0) * shape.clamp(min=0)
    return scatter
