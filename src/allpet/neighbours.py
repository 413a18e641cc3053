"""Means over neighbours that look alike: what the few counts of single pixels do not say, those of many do.

The kernel method of PET reconstruction (Wang and Qi, IEEE Trans. Med. Imaging 34, 2015) with the image that a network
has drawn where theirs has an anatomical or a composite one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TAPS = 64
"""Points that stand for the neighbourhood, so that large images cost no more per pixel than small ones."""
ALIKE = 0.2
"""Standard deviation of the difference in the logarithm of what is compared: 20 % more uptake is as far as that."""
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_MOST_KEPT = 2**26  # weights, a quarter of a gibibyte
_FAINT = 1e-3  # of the largest value; what is less is alike


class AlikeNeighbours:
    """Mean over the neighbours of each pixel, weighed by nearness and likeness (a bilateral filter), and its adjoint.

    The neighbourhood is a Gaussian, by points of equal weight on a spiral and the pixel itself. Weights are kept where
    they are not many, else computed whenever they are used: those of an image of 512 x 512 would need 64 MiB.

    Args:
        looks: by which pixels are compared, ``(batch, looks, rows, columns)``, not negative, as uptake; by logarithm.
        fwhm_mm: of the neighbourhood.
        pixel_mm: of the images.
    """

    def __init__(self, looks: Tensor, fwhm_mm: float, pixel_mm: float) -> None:
        top = looks.amax((2, 3), keepdim=True)
        self.looks = (looks.clamp(min=0) + _FAINT * top + torch.finfo(looks.dtype).tiny).log() / ALIKE
        self._shifts = _spiral(fwhm_mm / pixel_mm, tuple(looks.shape[2:]))
        few = len(self._shifts) * looks[:, 0].numel() <= _MOST_KEPT
        self._kept = list(self._weights()) if few else None
        self._total = torch.zeros_like(looks[:, :1])
        for here, _, weight in self._kept or self._weights():
            self._total[here] += weight

    def mean(self, image: Tensor) -> Tensor:
        """Return the means, ``(batch, 1, rows, columns)`` as *image*; an even image stays."""
        found = torch.zeros_like(image)
        for here, there, weight in self._kept or self._weights():
            found[here] += weight * image[there]
        return found / self._total

    def spread(self, image: Tensor) -> Tensor:
        """Return what is adjoint to ``mean``: each pixel's value shared out among those that it is the mean of."""
        found, share = torch.zeros_like(image), image / self._total
        for here, there, weight in self._kept or self._weights():
            found[there] += weight * share[here]
        return found

    def _weights(self) -> Iterator[tuple[Any, Any, Tensor]]:
        """Yield for each shift where it starts and ends and the weights of these pairs of pixels."""
        for (down, right), count in self._shifts.items():
            rows, columns = _pair(down), _pair(right)
            here, there = ((..., rows[end], columns[end]) for end in (0, 1))
            apart = (self.looks[here] - self.looks[there]).square().sum(1, keepdim=True)
            yield here, there, count * torch.exp(-apart / 2)


def _pair(shift: int) -> tuple[slice, slice]:
    """Return the pixels of one axis that have a neighbour so far on, and those neighbours."""
    first, last = slice(0, -abs(shift) or None), slice(abs(shift), None)
    return (first, last) if shift >= 0 else (last, first)


def _spiral(fwhm: float, shape: tuple[int, ...]) -> Counter[tuple[int, int]]:
    """Return whole shifts, and how often each, of as much Gaussian weight each: Vogel's spiral with Gaussian radii.

    Args:
        fwhm: in pixels.
        shape: rows and columns, which no shift reaches beyond.
    """
    sigma = fwhm / math.sqrt(8 * math.log(2))
    found: Counter[tuple[int, int]] = Counter({(0, 0): 1})
    for point in range(TAPS):
        radius, angle = sigma * math.sqrt(-2 * math.log(1 - (point + 0.5) / TAPS)), _GOLDEN_ANGLE * point
        shift = (round(radius * math.sin(angle)), round(radius * math.cos(angle)))
        if all(abs(one) < size for one, size in zip(shift, shape, strict=True)):
            found[shift] += 1
    return found
