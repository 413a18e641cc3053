"""Augmentations of sinograms: Radon masks (RMAS with DMM), as modules that draw and apply separately."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from allpet.masks import CellTable, cells_in_view, draw_cells, image_mask
from allpet.projector import Radon


class MaskedStack(NamedTuple):
    """A sinogram seen through a mask, through no mask and through the mask's complement.

    Attributes:
        stack: positive, full and negative sinogram, ``(batch, 3, views, bins)``, float32, in the sinogram's units;
            positive + negative == full.
        mask: projection of the mask in [0, 1], ``(batch, 1, views, bins)``, float32.
        cells: the drawn cells, ``(batch, cells)``, int64, padded with -1.
    """

    stack: Tensor
    mask: Tensor
    cells: Tensor


class RadonMaskAugmentation(nn.Module):
    """Radon mask augmentation (RMAS) with a dynamic number of cells (DMM), section "RMAS" of arXiv 2509.09130.

    A few cells of a grid over the image are projected to a sinogram mask M, and a sinogram y becomes the stack
    [positive, full, negative] = [M y, y, (1 - M) y]. M y is in general not the sinogram of any image;
    ``domain="image"`` masks the image instead and projects: positive = R(m FBP(y)), negative = y - positive, which are
    sinograms of images as far as y itself is.

    Cells are drawn from those whose centre lies in the field of view; the image's corners are never measured.

    Args:
        radon: the projector; its geometry is that of the sinograms.
        grid: cells per side.
        n_cells: fewest and most cells of a mask.
        mask: ``soft`` (share of each ray's path that lies in the mask) or ``binary`` (1 where a ray meets the mask).
        domain: where the mask is applied.

    Raises:
        ValueError: if an argument is not one of the choices, or asks for more cells than there are.
    """

    def __init__(
        self,
        radon: Radon,
        grid: int = 8,
        n_cells: tuple[int, int] = (1, 4),
        mask: Literal["soft", "binary"] = "soft",
        domain: Literal["sinogram", "image"] = "sinogram",
    ) -> None:
        super().__init__()
        if domain not in ("sinogram", "image"):
            raise ValueError(f"domain is {domain!r}, but must be 'sinogram' or 'image'.")
        self.radon, self.grid, self.domain = radon, grid, domain
        self.n_cells = (int(n_cells[0]), int(n_cells[1]))
        self.table = CellTable(radon.geometry, grid, mask)
        self._allowed = cells_in_view(radon.geometry, grid)
        draw_cells(0, grid, self.n_cells, torch.Generator(), self._allowed)  # raises on a range that does not fit

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw cells for a batch, ``(batch, n_cells[1])`` int64 padded with -1, on the generator's device."""
        return draw_cells(batch_size, self.grid, self.n_cells, generator, self._allowed)

    def apply(self, sinogram: Any, cells: Tensor | None = None) -> Any:
        """Mask sinograms with the drawn cells, on the sinogram's device.

        With a function alone it does what ``nn.Module.apply`` does, so that models can hold augmentations.

        Args:
            sinogram: ``(batch, 1, views, bins)``.
            cells: ``(batch, cells)`` from ``draw``.

        Returns:
            The stack. In the sinogram domain positive + negative == full holds to the last bit; in the image domain,
            where positive may exceed full, to float32 rounding of the larger of the two.

        Raises:
            ValueError: if the shapes do not fit the geometry or each other.
        """
        if cells is None:
            return super().apply(sinogram)
        geometry = self.radon.geometry
        if sinogram.shape != (len(cells), 1, *geometry.sinogram_shape):
            raise ValueError(
                f"The sinogram's shape is {tuple(sinogram.shape)}, but {len(cells)} masks of {geometry} need "
                f"{(len(cells), 1, *geometry.sinogram_shape)}."
            )
        cells = cells.to(sinogram.device, non_blocking=True)
        mask = self.table.masks(cells)
        if self.domain == "sinogram":
            # Sterbenz: for positive in [0, y] this difference is either exact or at least y/2, and then the next is
            # exact; so the two add up to y to the last bit.
            negative = sinogram - mask * sinogram
            positive = sinogram - negative
        else:
            from allpet.reconstruction import fbp

            positive = self.radon.project(image_mask(cells, geometry, self.grid) * fbp(self.radon, sinogram))
            negative = sinogram - positive
        return MaskedStack(torch.cat([positive, sinogram, negative], dim=1), mask, cells)

    def forward(self, sinogram: Tensor, generator: torch.Generator) -> MaskedStack:
        """Draw and apply: ``(batch, 1, views, bins)`` to a ``MaskedStack``."""
        return self.apply(sinogram, self.draw(len(sinogram), generator))
