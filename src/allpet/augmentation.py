"""Augmentations of sinograms, as modules: Radon masks (RMAS with DMM) and exact symmetries.

Each has ``draw`` (a pure function of a generator), ``apply`` (a pure function of what was drawn) and ``forward``, which
does both. Drawing sample by sample and concatenating gives the same augmentation as drawing a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from allpet import symmetry
from allpet.geometry import ParallelBeam
from allpet.masks import PADDING, CellTable, cells_in_view, draw_sizes, image_mask
from allpet.projector import Radon
from allpet.reconstruction import fbp


class MaskedStack(NamedTuple):
    """A sinogram seen through a mask, through no mask and through the mask's complement.

    Attributes:
        stack: positive, full and negative sinogram, ``(batch, 3, views, bins)``, float32, in the sinogram's units;
            positive + negative == full.
        mask: projection of the mask in [0, 1], ``(batch, 1, views, bins)``, float32.
        cells: the drawn cells, ``(batch, cells)``, int64, padded with -1; several grids are numbered on and on.
    """

    stack: Tensor
    mask: Tensor
    cells: Tensor


class RadonMaskAugmentation(nn.Module):
    """Radon mask augmentation (RMAS) with a dynamic number of cells (DMM), section "RMAS" of arXiv 2509.09130.

    A few cells of a grid over the image are projected to a sinogram mask M, and a sinogram y becomes the stack
    [positive, full, negative] = [M y, y, (1 - M) y]. M y is in general not the sinogram of any image;
    ``domain="image"`` masks the image instead and projects: positive = R(m FBP(y)), negative = y - positive, which are
    sinograms of images as far as y itself is; M then only says which rays met the mask, and positive is not M y.

    Cells are drawn from those whose centre lies in the field of view; the image's corners are never measured.

    Args:
        radon: the projector; its geometry is that of the sinograms.
        grid: cells per side; several, such as [4, 8, 16], for masks of several sizes: each mask draws its grid.
        n_cells: fewest and most cells of a mask; every number is equally likely.
        curriculum_epochs: training begins with the fewest cells, and the most that may be drawn grows evenly until
            it is reached in this epoch (0: from the beginning). Evaluation always draws from the whole range.
        mask: ``soft`` (share of each ray's path that lies in the mask) or ``binary`` (1 where a ray meets the mask).
        domain: where the mask is applied.

    Raises:
        ValueError: if an argument is not one of the choices, or asks for more cells than there are.
    """

    def __init__(
        self,
        radon: Radon,
        grid: int | Sequence[int] = 8,
        n_cells: tuple[int, int] = (1, 4),
        mask: Literal["soft", "binary"] = "soft",
        domain: Literal["sinogram", "image"] = "sinogram",
        curriculum_epochs: int = 0,
    ) -> None:
        super().__init__()
        if domain not in ("sinogram", "image"):
            raise ValueError(f"domain is {domain!r}, but must be 'sinogram' or 'image'.")
        if curriculum_epochs < 0:
            raise ValueError(f"curriculum_epochs is {curriculum_epochs}, but must not be negative.")
        self.grids = (grid,) if isinstance(grid, int) else tuple(grid)
        if not self.grids:
            raise ValueError("grid is empty, but must name at least one number of cells per side.")
        self.radon, self.domain, self.curriculum_epochs = radon, domain, curriculum_epochs
        self.n_cells = (int(n_cells[0]), int(n_cells[1]))
        self.table = CellTable(radon.geometry, self.grids, mask)
        self._allowed = [cells_in_view(radon.geometry, one) for one in self.grids]
        self.draw(0, torch.Generator())  # raises on a range that does not fit

    def draw(self, batch_size: int, generator: torch.Generator, epoch: int | None = None) -> Tensor:
        """Draw cells for a batch.

        Args:
            batch_size: number of masks.
            generator: source of the draw.
            epoch: of the training, which the curriculum follows; None in evaluation.

        Returns:
            ``(batch, n_cells[1])`` int64 padded with -1, on the generator's device.
        """
        low, high = self.n_cells
        if epoch is not None and epoch < self.curriculum_epochs:
            high = low + (high - low) * epoch // self.curriculum_epochs
        cells = draw_sizes(batch_size, self.grids, (low, high), generator, self._allowed)
        return nn.functional.pad(cells, (0, self.n_cells[1] - high), value=PADDING)

    def apply(self, sinogram: Tensor, cells: Tensor | None = None) -> MaskedStack:  # type: ignore[override]
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
            return super().apply(sinogram)  # type: ignore[arg-type, return-value]
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
            image = fbp(self.radon, sinogram, window="ramp")  # a window would leave edges to the negative
            positive = self.radon.project(image_mask(cells, geometry, self.grids) * image)
            negative = sinogram - positive
        return MaskedStack(torch.cat([positive, sinogram, negative], dim=1), mask, cells)

    def forward(self, sinogram: Tensor, generator: torch.Generator) -> MaskedStack:
        """Draw and apply: ``(batch, 1, views, bins)`` to a ``MaskedStack``."""
        return self.apply(sinogram, self.draw(len(sinogram), generator))


SYMMETRY_LABEL_SIZE = 8
"""Length of ``SymmetryParameters.label()``: the ``label_size`` of a ``Denoiser`` that is trained with symmetries."""


class SymmetryParameters(NamedTuple):
    """What was done to the images of a batch, in this order.

    Attributes:
        gain: factor of the activity, ``(batch,)``.
        dilation: factor of every length, ``(batch,)``.
        mirrored: whether left and right were exchanged, ``(batch,)``, bool.
        angle_rad: counter-clockwise rotation, ``(batch,)``.
        translation_mm: movement to the right and upwards, ``(batch, 2)``.
        blur_mm: full width at half maximum of a round Gaussian, ``(batch,)``; 0 is none.
    """

    gain: Tensor
    dilation: Tensor
    mirrored: Tensor
    angle_rad: Tensor
    translation_mm: Tensor
    blur_mm: Tensor

    def label(self) -> Tensor:
        """Return what a network is told, ``(batch, SYMMETRY_LABEL_SIZE)`` float32; all zero for the identity.

        Columns: cos(angle) - 1, sin(angle), mirrored, movement right and up in units of 100 mm, log dilation, log gain,
        blur in units of 10 mm (augment-conditioning of arXiv 2206.00364, section 5: zeros at sampling, so that nothing
        leaks).
        """
        return torch.stack(
            [
                self.angle_rad.cos() - 1,
                self.angle_rad.sin(),
                self.mirrored.float(),
                *(self.translation_mm / 100).unbind(1),
                self.dilation.log(),
                self.gain.log(),
                self.blur_mm / 10,
            ],
            dim=1,
        )


class SymmetryAugmentation(nn.Module):
    """Exact symmetries of sinograms: rotation, reflection, translation, dilation, gain and blur of the image.

    By default only what permutes bins, so that Poisson noise stays Poisson noise and nothing turns negative: do not
    ask for more of noisy sinograms without a reason. Rotation by any angle and translation interpolate; they keep the
    variance of noise, but not its distribution, and let values near zero turn negative. Dilation by c multiplies the
    variance by c^2 (below 1: by c^3; counts would have c), a gain by its square, a blur as wide as a bin by 0.6. A
    network that is told of these (``label``) learns them apart; a noise-free sinogram has nothing to lose.

    Args:
        geometry: of the sinograms.
        rotation: ``views`` (or True): by a random whole number of views; ``any``: by any angle; False: none.
        reflection: whether left and right are exchanged in half of the samples.
        translation_mm: largest movement in x and in y, mm.
        dilation: smallest and largest factor.
        gain: smallest and largest factor.
        probability: of each operation, drawn independently for each sample.
        blur_mm: largest full width at half maximum, mm.
        largest_rotation_deg: to either side; 180 is all the way round. Where organs tell what is wanted, as without
            attenuation correction, a network does better that has seen patients nearly as they lie.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        geometry: ParallelBeam,
        rotation: bool | Literal["views", "any"] = True,
        reflection: bool = True,
        translation_mm: float = 0.0,
        dilation: tuple[float, float] = (1.0, 1.0),
        gain: tuple[float, float] = (1.0, 1.0),
        probability: float = 1.0,
        blur_mm: float = 0.0,
        largest_rotation_deg: float = 180.0,
    ) -> None:
        super().__init__()
        if rotation not in (True, False, "views", "any"):
            raise ValueError(f"rotation is {rotation!r}, but must be 'views', 'any', true or false.")
        for name, (low, high) in {"dilation": dilation, "gain": gain}.items():
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} is {(low, high)}, but must be (smallest, largest) with 0 < smallest <= largest."
                )
        if not 0 <= largest_rotation_deg <= 180:
            raise ValueError(f"largest_rotation_deg is {largest_rotation_deg}, but must lie in [0, 180].")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}, but must lie in [0, 1].")
        if not 0 <= translation_mm < geometry.field_of_view_mm:
            raise ValueError(
                f"translation_mm is {translation_mm}, but must lie between 0 and the radius of the field of view, "
                f"{geometry.field_of_view_mm:g} mm."
            )
        if not blur_mm >= 0:
            raise ValueError(f"blur_mm is {blur_mm}, but must be 0 (none) or the largest width in mm.")
        self.geometry, self.probability, self.translation_mm = geometry, probability, translation_mm
        self.blur_mm = blur_mm
        self.largest_rotation_deg = largest_rotation_deg
        self.rotation = "views" if rotation is True else rotation
        self.reflection = reflection
        self._log_factors = [(math.log(low), math.log(high)) for low, high in (gain, dilation)]

    def draw(self, batch_size: int, generator: torch.Generator) -> SymmetryParameters:
        """Draw parameters for a batch, on the generator's device."""
        u = torch.rand(batch_size, 13 if self.blur_mm else 11, generator=generator, device=generator.device)
        done = (u[:, 6:11] < self.probability).float()
        blurred = u[:, 11] * (u[:, 12] < self.probability) if self.blur_mm else torch.zeros_like(u[:, 0])
        gain, dilation = (
            (low + (high - low) * u[:, i]) * done[:, i] for i, (low, high) in enumerate(self._log_factors)
        )
        # In multiples of the angle between views, so that whole views stay whole.
        if self.largest_rotation_deg == 180:
            angle = u[:, 3] * (2 * self.geometry.n_views)
        else:
            largest = self.largest_rotation_deg / 180 * self.geometry.n_views
            if self.rotation != "any":
                largest = math.floor(largest + 1e-6) + 0.5  # the outermost views are as likely as the others
            angle = (2 * u[:, 3] - 1) * largest + 0.5 * (self.rotation != "any")
        if self.rotation != "any":
            angle = angle.floor()
        return SymmetryParameters(
            gain=gain.exp(),
            dilation=dilation.exp(),
            mirrored=u[:, 2] < 0.5 * done[:, 2] * self.reflection,
            angle_rad=angle * done[:, 3] * (math.pi / self.geometry.n_views * bool(self.rotation)),
            translation_mm=(2 * u[:, 4:6] - 1) * (done[:, 4:] * self.translation_mm),
            blur_mm=blurred * self.blur_mm,
        )

    def apply(  # type: ignore[override]
        self, sinogram: Tensor, parameters: SymmetryParameters | None = None
    ) -> Tensor:
        """Apply drawn parameters.

        With a function alone it does what ``nn.Module.apply`` does, so that models can hold augmentations.

        Args:
            sinogram: ``(batch, channel, views, bins)``; all channels are treated alike.
            parameters: from ``draw``.

        Returns:
            The sinogram of the changed image, same shape and units.
        """
        if parameters is None:
            return super().apply(sinogram)  # type: ignore[arg-type, return-value]
        n_views = self.geometry.n_views
        gain, dilation, mirrored, angle, translation, blur = parameters
        if bool((gain != 1).any()):
            sinogram = sinogram * gain.to(sinogram)[:, None, None, None]
        if bool((dilation != 1).any()):
            sinogram = symmetry.dilate(sinogram, self.geometry, dilation)
        if bool(mirrored.any()):
            flags = mirrored.to(sinogram.device)[:, None, None, None]
            sinogram = torch.where(flags, symmetry.reflect_x(sinogram), sinogram)
        views = angle * (n_views / math.pi)
        if bool(((views - views.round()).abs() < 1e-3).all()):
            sinogram = symmetry.roll_views(sinogram, views.round().long())
        else:
            sinogram = symmetry.rotate(sinogram, angle)
        if bool((translation != 0).any()):
            sinogram = symmetry.translate(sinogram, self.geometry, *translation.unbind(1))
        if bool((blur != 0).any()):
            sinogram = symmetry.blur(sinogram, self.geometry, blur)
        return sinogram

    def forward(self, sinogram: Tensor, generator: torch.Generator) -> tuple[Tensor, SymmetryParameters]:
        """Draw and apply: the sinograms of the changed images, and what was changed."""
        parameters = self.draw(len(sinogram), generator)
        return self.apply(sinogram, parameters), parameters
