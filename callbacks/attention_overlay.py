"""Where a model looks, drawn over the image and over the sinogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from allpet.attention import Areas, TransparentMedicalAttention
from callbacks.figures import Tile, draw_grid, top

COLOURS = {"hot": (0.84, 0.15, 0.16), "cold": (0.12, 0.47, 0.71), "roi": (0.17, 0.63, 0.17)}
"""Red, blue and green of an area's tint."""
_TINT = 0.45


def attention_overlay(
    attention: TransparentMedicalAttention,
    sinograms: Tensor,
    roi: Tensor | None = None,
    strength: float = 1.0,
    titles: Sequence[str] | None = None,
    results: Tensor | None = None,
    fitted: Areas | None = None,
) -> Any:
    """Draw for each slice: the quick image, the areas on it, the sinogram, the attention on it, and the attention.

    Where results were fitted to the input, the areas that the fit attended to come last, on the result: those of what
    the network drew before, or the ROI.

    Args:
        attention: the model's.
        sinograms: inputs, ``(batch, 1, views, bins)``.
        roi: see ``TransparentMedicalAttention``.
        strength: see there.
        titles: of the slices.
        results: ``(batch, 1, views, bins)``; needed with ``fitted``.
        fitted: areas that the fit attended to (``Restored.areas``); None where nothing was fitted.

    Returns:
        a matplotlib figure.
    """
    areas = attention.areas(sinograms, roi)
    attended = attention.attend(areas, strength).cpu()
    images, sinograms = attention.quick_image(sinograms).cpu(), sinograms.cpu()
    if fitted is not None:
        assert results is not None
        ends = attention.quick_image(results).cpu()
    highest = max(float(attended.max()), 1 + 1e-6)
    rows = []
    for i in range(len(sinograms)):
        image, sinogram = images[i, 0], sinograms[i, 0]
        rows.append(
            [
                Tile(image, (0, top(image)), "quick image"),
                Tile(tinted_areas(image, areas, i), (0, 1), "red hot, blue cold,\ngreen ROI"),
                Tile(sinogram, (0, top(sinogram)), "input"),
                Tile(tinted_sinogram(sinogram, attended[i, 0]), (0, 1), "attended rays"),
                Tile(attended[i, 0], (1, highest), f"attention, 1 to {highest:.2f}"),
            ]
        )
        if fitted is not None:
            rows[-1].append(Tile(tinted_areas(ends[i, 0], fitted, i), (0, 1), "result, what the\nfit attended to"))
    labels = [""] * len(rows) if titles is None else list(titles)
    return draw_grid(rows, labels, "what is attended to")


def tinted_areas(image: Tensor, areas: Areas, index: int) -> Tensor:
    """Return an image with the areas of one slice tinted, ``(rows, columns, 3)``."""
    picture = _grey(image)
    for name, colour in COLOURS.items():
        inside = getattr(areas, name)[index, 0].cpu().float()
        picture = _tint(picture, _TINT * inside, colour)
    return picture


def tinted_sinogram(sinogram: Tensor, attention: Tensor) -> Tensor:
    """Return a sinogram, redder where more is attended to, ``(views, bins, 3)``."""
    extra = attention - 1
    return _tint(_grey(sinogram), _TINT * extra / extra.max().clamp_min(1e-6), COLOURS["hot"])


def _grey(values: Tensor) -> Tensor:
    """Dark on light, as everywhere."""
    return (1 - (values / top(values)).clamp(0, 1))[..., None].expand(*values.shape, 3)


def _tint(picture: Tensor, share: Tensor, colour: tuple[float, float, float]) -> Tensor:
    return picture * (1 - share[..., None]) + torch.tensor(colour) * share[..., None]
