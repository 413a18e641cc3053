"""Transparent medical attention (TMA, arXiv 2509.09130, fig. 1): where to look, said in the image, seen by every ray.

A quick reconstruction of the *input* is coarsely segmented into *hot* and *cold* areas, or a clinician draws a region
of interest (*ROI*). Areas are projected like activity, so that a ray is attended to by how much of it passes through::

    attention = 1 + strength (hot share(S_hot) + cold share(S_cold) + roi share(ROI)),  share(S) = R(S) / max R(S)

or, with ``normalise="path"``, share(S) = R(S) / R(body), the part of the ray's way through the body. Nothing is
learned, nothing but what is given is looked at, and every number can be drawn beside the image. (Given is the input,
as long as the network draws; where results are then fitted to the counts without a ROI, it is what the network has
drawn, in which there is less noise to take for areas.)

How coarse it is. The *background* of a pixel is the mean over some centimetres of body around it, so that what is
larger than that, such as a liver, is its own background, and what is smaller than the smoothing is lost. Noise of very
low doses passes for hot and cold. Without attenuation correction the interior is too weak; that changes slowly, as the
background does, but the rim of the body and the lungs come out hotter than they are: a ROI is the better guide there.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from allpet.projector import Radon
from allpet.reconstruction import fbp, osem
from allpet.simulation.acquisition import gaussian_blur

_OSEM_ITERATIONS, _OSEM_SUBSETS = 2, 8
_ROUNDS = 3  # in which the level of the body settles


class Areas(NamedTuple):
    """What is attended to, each ``(batch, 1, rows, columns)``, bool.

    Attributes:
        hot: more active than the background.
        cold: less active.
        roi: as drawn; all False where none was.
        body: what the background is averaged over.
    """

    hot: Tensor
    cold: Tensor
    roi: Tensor
    body: Tensor


class TransparentMedicalAttention(nn.Module):
    """Maps a sinogram or an image to the attention of every ray; it has no parameters and no buffers.

    Args:
        radon: the projector.
        hot: weight of hot areas; 0 leaves them out.
        cold: weight of cold areas.
        roi: weight of a region of interest.
        with_roi: whether a ROI takes the place of hot and cold areas ("replace") or comes on top of them ("add").
        hot_ratio: activity over that of the background from which on a pixel is hot, more than 1.
        cold_ratio: the same below which it is cold, less than 1.
        background_mm: full width at half maximum of the Gaussian that the background is averaged with.
        smooth_mm: of the Gaussian that smooths the reconstruction.
        body_share: activity over the body's usual one from which on a pixel is of the body.
        reconstruction: "osem", 2 iterations of at most 8 subsets, or "fbp", five times as fast: with the noise of low
            doses it finds no body.
        normalise: "max": share of the longest ray through an area; "path": share of a ray's way through the body.

    Raises:
        ValueError: if a number or a name is impossible.
    """

    def __init__(
        self,
        radon: Radon,
        hot: float = 1.0,
        cold: float = 1.0,
        roi: float = 1.0,
        with_roi: Literal["replace", "add"] = "replace",
        hot_ratio: float = 1.6,
        cold_ratio: float = 0.5,
        background_mm: float = 100.0,
        smooth_mm: float = 14.0,
        body_share: float = 0.2,
        reconstruction: Literal["osem", "fbp"] = "osem",
        normalise: Literal["max", "path"] = "max",
    ) -> None:
        super().__init__()
        weights = {"hot": hot, "cold": cold, "roi": roi}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, but is a weight: finite and not negative.")
        if not 0 <= cold_ratio < 1 < hot_ratio:
            raise ValueError(
                f"cold_ratio is {cold_ratio} and hot_ratio {hot_ratio}, but they are ratios to the background, "
                "below and above 1."
            )
        if not 0 < smooth_mm < background_mm:
            raise ValueError(
                f"smooth_mm is {smooth_mm} and background_mm {background_mm}, but must be positive, the second larger."
            )
        if not 0 < body_share < 1:
            raise ValueError(f"body_share is {body_share}, but must lie between 0 and 1.")
        names = {
            "with_roi": (with_roi, ("replace", "add")),
            "reconstruction": (reconstruction, ("fbp", "osem")),
            "normalise": (normalise, ("max", "path")),
        }
        for name, (given, known) in names.items():
            if given not in known:
                raise ValueError(f"{name} is {given!r}; choose {' or '.join(known)}.")
        self.config: dict[str, Any] = {
            **weights,
            "with_roi": with_roi,
            "hot_ratio": hot_ratio,
            "cold_ratio": cold_ratio,
            "background_mm": background_mm,
            "smooth_mm": smooth_mm,
            "body_share": body_share,
            "reconstruction": reconstruction,
            "normalise": normalise,
        }
        self.radon = radon
        self.weights, self.with_roi, self.normalise = (hot, cold, roi), with_roi, normalise
        self.hot_ratio, self.cold_ratio, self.body_share = hot_ratio, cold_ratio, body_share
        self.background_mm, self.smooth_mm, self.reconstruction = background_mm, smooth_mm, reconstruction

    def forward(
        self,
        given: Tensor,
        roi: Tensor | None = None,
        strength: Tensor | float = 1.0,
        domain: Literal["auto", "sinogram", "image"] = "auto",
    ) -> Tensor:
        """Return the attention of every ray.

        Args:
            given: the input, ``(batch, 1, views, bins)`` or ``(batch, 1, rows, columns)``, in any unit.
            roi: ``(batch or 1, 1, rows, columns)``, bool.
            strength: not negative, a number or ``(batch,)``; attention - 1 is proportional to it.
            domain: what is given; "auto" goes by the shape, and takes it for a sinogram where the two are alike.

        Returns:
            ``(batch, 1, views, bins)``, 1 on rays that meet no area.

        Raises:
            ValueError: if a shape does not fit or a strength is negative.
        """
        return self.attend(self.areas(given, roi, domain), strength)

    @torch.no_grad()
    def areas(
        self, given: Tensor, roi: Tensor | None = None, domain: Literal["auto", "sinogram", "image"] = "auto"
    ) -> Areas:
        """Return the areas attended to; arguments as of ``forward``."""
        with torch.autocast(given.device.type, enabled=False):
            image = self.quick_image(given, domain)
            body = self._body(image)
            nothing = torch.zeros_like(body)
            if roi is not None:
                roi = self._check_roi(roi, len(image)).to(image.device).expand_as(body)
                if self.with_roi == "replace":
                    return Areas(nothing, nothing, roi, body)
            inside = body.to(image)
            around = self._blur(inside, self.background_mm)
            background = self._blur(image * inside, self.background_mm) / around.clamp_min(1e-6)
            known = body & (background > 0)
            # At the rim smoothing has mixed in what lies outside, which would always be cold.
            deep = known & (self._blur(inside, 2 * self.smooth_mm) > 0.95)
            hot, cold = known & (image > self.hot_ratio * background), deep & (image < self.cold_ratio * background)
            return Areas(hot, cold, nothing if roi is None else roi, body)

    @torch.no_grad()
    def attend(self, areas: Areas, strength: Tensor | float = 1.0) -> Tensor:
        """Project areas: 1 + strength sum of weight times share, ``(batch, 1, views, bins)``."""
        amount = torch.as_tensor(strength, dtype=torch.float32, device=areas.body.device)
        if amount.ndim and amount.shape != (len(areas.body),):
            raise ValueError(f"strength has shape {tuple(amount.shape)}; expected a number or one per slice.")
        if not bool((amount >= 0).all()):
            raise ValueError(f"strength is {strength}, but must not be negative; 0 attends to nothing.")
        with torch.autocast(areas.body.device.type, enabled=False):
            extra = torch.zeros(len(areas.body), 1, *self.radon.sinogram_shape, device=areas.body.device)
            for weight, area in zip(self.weights, areas, strict=False):
                if weight and bool(area.any()):
                    extra = extra + weight * self._share(area, areas.body)
            return 1 + amount.reshape(-1, 1, 1, 1) * extra

    def emphasise(self, areas: Areas, strength: float = 1.0) -> Tensor:
        """Return the attention of every pixel, which ``fit_measured`` takes: 1 + strength times its areas' weights.

        Returns:
            ``(batch, 1, rows, columns)``.

        Raises:
            ValueError: if the strength is negative.
        """
        if not strength >= 0:
            raise ValueError(f"strength is {strength}, but must not be negative; 0 attends to nothing.")
        parts = [weight * area.float() for weight, area in zip(self.weights, areas, strict=False)]
        return 1 + strength * torch.stack(parts).sum(0)

    def quick_image(self, given: Tensor, domain: Literal["auto", "sinogram", "image"] = "auto") -> Tensor:
        """Return the smoothed reconstruction that is segmented, ``(batch, 1, rows, columns)``, not negative.

        Raises:
            ValueError: if the shape is neither that of sinograms nor that of images.
        """
        geometry, shape = self.radon.geometry, tuple(given.shape[-2:])
        if domain == "auto":
            domain = "image" if shape == geometry.image_shape != geometry.sinogram_shape else "sinogram"
        wanted = geometry.sinogram_shape if domain == "sinogram" else geometry.image_shape
        if given.dim() != 4 or given.shape[1] != 1 or shape != wanted:
            raise ValueError(
                f"What is attended to has shape {tuple(given.shape)}; expected (batch, 1, views, bins) of "
                f"{geometry.sinogram_shape} or (batch, 1, rows, columns) of {geometry.image_shape}."
            )
        given = given.float()
        if domain == "image":
            image = given
        elif self.reconstruction == "fbp":
            image = fbp(self.radon, given)
        else:
            subsets = next(n for n in range(_OSEM_SUBSETS, 0, -1) if geometry.n_views % n == 0)
            image = osem(self.radon, given.clamp_min(0), _OSEM_ITERATIONS, subsets)
        return self._blur(image, self.smooth_mm).clamp_min(0)

    def _body(self, image: Tensor) -> Tensor:
        """Return the pixels all of whose rays meet the body: hollows, such as lungs, belong to it."""
        flat = image.flatten(1)
        top = torch.full_like(flat[:, :1], float("inf"))
        for _ in range(_ROUNDS):
            # Of a uniform body in nothing this is the body's level, however small it is. What is twice as active counts
            # as twice as active, so that a bladder does not set the level.
            capped = flat.minimum(top)
            level = (capped.sum(1, keepdim=True) / capped.sqrt().sum(1, keepdim=True).clamp_min(1e-20)).square()
            top = 2 * level
        threshold = (self.body_share * level)[:, :, None, None]
        active = (image > threshold) & (threshold > 0)
        # Half a pixel's width of ray is rounding.
        missed = self.radon.project(active.to(image)) < self.radon.geometry.pixel_mm / 2
        passed, every = (self.radon.backproject(rays.to(image)) for rays in (missed, torch.ones_like(missed[:1])))
        return (every > 0) & (passed < 1e-3 * every) & active.flatten(1).any(1)[:, None, None, None]

    def _share(self, area: Tensor, body: Tensor) -> Tensor:
        length = self.radon.project(area.float())
        if self.normalise == "max":
            return length / length.flatten(1).amax(1).clamp_min(1e-6)[:, None, None, None]
        way = self.radon.project((body | area).float())
        return torch.where(way > 0, length / way.clamp_min(1e-6), 0.0)

    def _blur(self, image: Tensor, fwhm_mm: float) -> Tensor:
        geometry = self.radon.geometry
        matrix = gaussian_blur(geometry.image_size, fwhm_mm / geometry.pixel_mm).to(image)
        return matrix @ image @ matrix

    def _check_roi(self, roi: Tensor, batch: int) -> Tensor:
        wanted = self.radon.geometry.image_shape
        if roi.dim() != 4 or roi.shape[1] != 1 or tuple(roi.shape[2:]) != wanted or len(roi) not in (1, batch):
            raise ValueError(
                f"roi has shape {tuple(roi.shape)}; expected ({batch} or 1, 1, {wanted[0]}, {wanted[1]}), "
                "the geometry's image grid."
            )
        if roi.dtype != torch.bool:
            raise ValueError(f"roi is of type {roi.dtype}, but must be bool: compare it with a threshold first.")
        return roi
