"""The discrete Radon transform and its transpose."""

from __future__ import annotations

import astra
import numpy as np
import torch
from torch import Tensor

from allpet.geometry import ParallelBeam


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward_matrix, transpose_matrix):  # type: ignore[no-untyped-def]
        ctx.pair = (forward_matrix, transpose_matrix)
        return (forward_matrix @ x.t()).t()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        forward_matrix, transpose_matrix = ctx.pair
        return _Project.apply(grad, transpose_matrix, forward_matrix), None, None


class Radon:
    """Project images to sinograms and back."""

    def __init__(self, geometry: ParallelBeam, kernel: str = "linear", backend: str = "auto") -> None:
        self.geometry, self.kernel, self.backend = geometry, kernel, backend
        self._pair = None

    def _matrices(self):  # type: ignore[no-untyped-def]
        if self._pair is None:
            g = self.geometry
            vol = astra.create_vol_geom(g.image_size, g.image_size)
            proj = astra.create_proj_geom("parallel", g.bin_mm / g.pixel_mm, g.n_bins, g.angles.numpy())
            pid = astra.create_projector(self.kernel, proj, vol)
            mid = astra.projector.matrix(pid)
            matrix = astra.matrix.get(mid).tocsr().astype(np.float32) * np.float32(g.pixel_mm)
            astra.matrix.delete(mid)
            astra.projector.delete(pid)
            pair = []
            for m in (matrix, matrix.T.tocsr()):
                m.sort_indices()
                pair.append(torch.sparse_csr_tensor(torch.from_numpy(m.indptr.astype(np.int32)),
                            torch.from_numpy(m.indices.astype(np.int32)), torch.from_numpy(m.data), m.shape))
            self._pair = tuple(pair)
        return self._pair

    def __getstate__(self):  # type: ignore[no-untyped-def]
        return {"geometry": self.geometry, "kernel": self.kernel, "backend": self.backend, "_pair": None}

    def project(self, image: Tensor) -> Tensor:
        """``(batch, 1, rows, columns) -> (batch, 1, views, bins)``, activity x mm."""
        a, at = self._matrices()
        return _Project.apply(image.flatten(1).float(), a, at).view(-1, 1, *self.geometry.sinogram_shape)

    def backproject(self, sinogram: Tensor) -> Tensor:
        """``(batch, 1, views, bins) -> (batch, 1, rows, columns)``."""
        a, at = self._matrices()
        return _Project.apply(sinogram.flatten(1).float(), at, a).view(-1, 1, *self.geometry.image_shape)

    def subset(self, k, n):  # type: ignore[no-untyped-def]
        """Views k, k + n, ... as an operator of their own."""
        return _Subset(self, k, n)


class _Subset:
    def __init__(self, radon, k, n):  # type: ignore[no-untyped-def]
        self.radon, self.k, self.n = radon, k, n

    def project(self, image: Tensor) -> Tensor:
        """Project to the subset's views."""
        return self.radon.project(image)[..., self.k :: self.n, :]

    def backproject(self, sinogram: Tensor) -> Tensor:
        """Backproject the subset's views."""
        full = sinogram.new_zeros(*sinogram.shape[:-2], *self.radon.geometry.sinogram_shape)
        full[..., self.k :: self.n, :] = sinogram
        return self.radon.backproject(full)
