# ruff: noqa: D102  (what overrides a method of Peer is documented there)
"""What else projects: the same operator by other means, to compare speeds with.

Every peer has the interface of ``allpet.Radon`` that reconstruction needs, so that ``allpet.osem`` runs on it, and
works on images of the geometry's own pixels with as many bins as columns and bins as wide as pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from allpet import ParallelBeam, fbp


class Peer(ABC):
    """A projector of some views, one image at a time unless it can do better.

    Args:
        geometry: as many bins as columns, bins as wide as pixels.
        views: which of its views.
    """

    def __init__(self, geometry: ParallelBeam, views: slice = slice(None)) -> None:
        self.geometry, self.views = geometry, views
        self.angles = geometry.angles[views]
        self.sinogram_shape = (len(self.angles), geometry.n_bins)

    def subset(self, first: int, step: int) -> Peer:
        """Views first, first + step, ... of all."""
        return type(self)(self.geometry, slice(first, None, step))

    @abstractmethod
    def project(self, image: Tensor) -> Tensor:
        """``(batch, 1, rows, columns) -> (batch, 1, views, bins)``."""

    @abstractmethod
    def backproject(self, sinogram: Tensor) -> Tensor:
        """``(batch, 1, views, bins) -> (batch, 1, rows, columns)``."""

    def fbp(self, sinogram: Tensor) -> Tensor:
        """Filtered backprojection with a Hann window, ``(batch, 1, views, bins) -> (batch, 1, rows, columns)``."""
        return fbp(self, sinogram)  # type: ignore[arg-type]


class Loop(Peer):
    """A peer that takes one image at a time."""

    def project(self, image: Tensor) -> Tensor:
        """``(batch, 1, rows, columns) -> (batch, 1, views, bins)``."""
        return torch.stack([self.project_one(one) for one in image[:, 0]])[:, None]

    def backproject(self, sinogram: Tensor) -> Tensor:
        """``(batch, 1, views, bins) -> (batch, 1, rows, columns)``."""
        return torch.stack([self.backproject_one(one) for one in sinogram[:, 0]])[:, None]

    @abstractmethod
    def project_one(self, image: Tensor) -> Tensor:
        """``(rows, columns) -> (views, bins)``."""

    @abstractmethod
    def backproject_one(self, sinogram: Tensor) -> Tensor:
        """``(views, bins) -> (rows, columns)``."""


class AstraLoop(Loop):
    """A loop over ASTRA's 2D calls: Joseph's kernel on the CPU, or its CUDA projector."""

    def __init__(self, geometry: ParallelBeam, views: slice = slice(None), kernel: str = "linear") -> None:
        import astra

        super().__init__(geometry, views)
        self.astra, self.kernel = astra, kernel
        self.grid = astra.create_vol_geom(*geometry.image_shape)
        self.beam = astra.create_proj_geom("parallel", 1.0, geometry.n_bins, self.angles.numpy())
        self.projector = astra.create_projector(kernel, self.beam, self.grid)

    def project_one(self, image: Tensor) -> Tensor:
        handle, sinogram = self.astra.create_sino(image.cpu().numpy(), self.projector)
        self.astra.data2d.delete(handle)
        return torch.from_numpy(sinogram).to(image) * self.geometry.pixel_mm

    def backproject_one(self, sinogram: Tensor) -> Tensor:
        handle, image = self.astra.create_backprojection(sinogram.cpu().numpy(), self.projector)
        self.astra.data2d.delete(handle)
        return torch.from_numpy(image).to(sinogram) * self.geometry.pixel_mm

    def fbp(self, sinogram: Tensor) -> Tensor:
        return torch.stack([self._fbp_one(one) for one in sinogram[:, 0]])[:, None]

    def _fbp_one(self, sinogram: Tensor) -> Tensor:
        data2d, algorithm = self.astra.data2d, self.astra.algorithm
        source = data2d.create("-sino", self.beam, sinogram.cpu().numpy())
        target = data2d.create("-vol", self.grid)
        options = self.astra.astra_dict("FBP" if self.kernel != "cuda" else "FBP_CUDA")
        options |= {"ProjectorId": self.projector, "ProjectionDataId": source, "ReconstructionDataId": target}
        options["option"] = {"FilterType": "hann"}
        run = algorithm.create(options)
        algorithm.run(run)
        image = data2d.get(target)
        algorithm.delete(run)
        data2d.delete([source, target])
        return torch.from_numpy(image).to(sinogram) / self.geometry.pixel_mm


class AstraCudaLoop(AstraLoop):
    """A loop over ASTRA's 2D CUDA calls."""

    def __init__(self, geometry: ParallelBeam, views: slice = slice(None)) -> None:
        super().__init__(geometry, views, "cuda")


class ScipyCSR(Peer):
    """ASTRA's matrix as SciPy has it, multiplied by the whole batch."""

    def __init__(self, geometry: ParallelBeam, views: slice = slice(None)) -> None:
        super().__init__(geometry, views)
        loop = AstraLoop(geometry, views)
        handle = loop.astra.projector.matrix(loop.projector)
        matrix = sparse.csr_matrix(loop.astra.matrix.get(handle) * geometry.pixel_mm, dtype=np.float32)
        loop.astra.matrix.delete(handle)
        matrix.sort_indices()
        self.matrix, self.transpose = matrix, matrix.T.tocsr()

    def project(self, image: Tensor) -> Tensor:
        columns = np.ascontiguousarray(image.flatten(1).numpy().T)
        return torch.from_numpy((self.matrix @ columns).T.copy()).view(len(image), 1, *self.sinogram_shape)

    def backproject(self, sinogram: Tensor) -> Tensor:
        columns = np.ascontiguousarray(sinogram.flatten(1).numpy().T)
        return torch.from_numpy((self.transpose @ columns).T.copy()).view(len(sinogram), 1, *self.geometry.image_shape)


class ScikitImage(Loop):
    """``skimage.transform.radon``, and ``iradon`` without filter."""

    def project_one(self, image: Tensor) -> Tensor:
        from skimage.transform import radon

        sinogram = radon(image.numpy(), np.rad2deg(self.angles.numpy()), circle=True)
        return torch.from_numpy(sinogram.T.astype(np.float32)) * self.geometry.pixel_mm

    def backproject_one(self, sinogram: Tensor) -> Tensor:
        from skimage.transform import iradon

        # Without a filter it still scales as filtered backprojection does.
        image = iradon(sinogram.numpy().T, np.rad2deg(self.angles.numpy()), filter_name=None, circle=True)
        return torch.from_numpy(image.astype(np.float32)) * (2 * len(self.angles) / math.pi * self.geometry.pixel_mm)

    def fbp(self, sinogram: Tensor) -> Tensor:
        from skimage.transform import iradon

        angles = np.rad2deg(self.angles.numpy())
        images = [iradon(one.numpy().T, angles, filter_name="hann", circle=True) for one in sinogram[:, 0]]
        return torch.from_numpy(np.stack(images).astype(np.float32))[:, None] / self.geometry.pixel_mm


class GridSample(Peer):
    """Turn the image by ``grid_sample`` and add up its rows, view by view; its transpose is autograd's."""

    def project(self, image: Tensor) -> Tensor:
        return torch.stack([self._view(image, angle) for angle in self.angles.tolist()], dim=2)

    def backproject(self, sinogram: Tensor) -> Tensor:
        total = sinogram.new_zeros(len(sinogram), 1, *self.geometry.image_shape)
        for k, angle in enumerate(self.angles.tolist()):
            image = torch.zeros_like(total, requires_grad=True)
            total += torch.autograd.grad(self._view(image, angle), image, sinogram[:, :, k])[0]
        return total

    def _view(self, image: Tensor, angle: float) -> Tensor:
        # Column j of the turned image is the ray s_j; in it, y counts downwards.
        cos, sin = math.cos(angle), math.sin(angle)
        turn = image.new_tensor([[cos, sin, 0.0], [-sin, cos, 0.0]]).expand(len(image), -1, -1)
        grid = F.affine_grid(turn, list(image.shape), align_corners=False)
        return F.grid_sample(image, grid, align_corners=False).sum(dim=2) * self.geometry.pixel_mm
