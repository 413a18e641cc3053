"""The Radon transform as a sparse matrix, applied by torch on any device.

An entry is the weight of one pixel in one ray, in mm. The matrix and its transpose are both kept as CSR with int32
indices: multiplying by a CSR matrix's transpose in place is an order of magnitude slower.

Four things make it fast on a CPU:

- *sums of embeddings*: torch's ``embedding_bag`` adds up weighted rows of a table, which is what a CSR matrix does to
  dense columns; from a dozen columns on it is two to three times faster than MKL (one thread, AVX2);
- *panels*: a batch is multiplied a few columns at a time, so that the dense operands stay in the cache;
- *tiles*: rays and pixels are numbered in tiles of 8 x 8, so that neighbouring rows of the matrix touch neighbouring
  memory (1.6 times faster at 128, 2.7 times at 256 than row by row);
- *symmetries*: a square grid centred on the axis of rotation looks the same from eight sides. Large geometries keep
  only the rays of the first 45 degrees on the positive side of the axis and show them eight images: the image turned
  and reflected. That takes an eighth of the memory and of the time to build.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from allpet import disk_cache
from allpet.geometry import ParallelBeam
from allpet.system_rows import TILE, build, is_symmetric, pixel_table, ray_table, weights_source

PANEL_COLUMNS = {"cpu": 32, "cuda": 256}
CPU = torch.device("cpu")
FEW_COLUMNS = 3  # up to which MKL is faster one by one
MANY_COLUMNS = 12  # from which sums of embeddings are faster than MKL
FORMAT = 2  # of the cached file; count up when its content changes


class SystemMatrix:
    """A Radon transform (or some views of one) and its exact transpose, on one device.

    Args:
        forward: stored rays x pixels, CSR, mm.
        make_transpose: returns pixels x stored rays, CSR, mm; called when it is first needed.
        pixels: where each pixel of the matrix stands in each image shown to it, ``(pixels, images)``, int64, as
            ``row * columns + column``.
        rays: where each ray of the sinogram stands in the product, ``(views * bins,)``, int64, as
            ``stored ray * images + image``.
    """

    def __init__(self, forward: Tensor, make_transpose: Callable[[], Tensor], pixels: Tensor, rays: Tensor) -> None:
        self.forward, self._make_transpose, self.pixels, self.rays = forward, make_transpose, pixels, rays
        self.images = pixels.shape[1]
        # The other way round: where each pixel of the image stands in the transpose's product, as pixel * images +
        # image, and which ray each row and image belongs to; rows that serve no ray in some image get a ray of zeros.
        numbers = torch.arange(pixels.numel(), device=pixels.device).view_as(pixels)
        self._places = torch.empty_like(pixels).scatter_(0, pixels, numbers)
        self._slots = rays.new_full((forward.shape[0] * self.images,), len(rays))
        self._slots[rays] = torch.arange(len(rays), device=rays.device)

    @functools.cached_property
    def transpose(self) -> Tensor:
        """The transpose, pixels x stored rays, CSR, mm."""
        with _lock, torch.inference_mode(False), torch.no_grad():
            return self._make_transpose()

    def project(self, image: Tensor) -> Tensor:
        """``(batch, rows * columns) -> (batch, views * bins)``."""
        sinogram = image.new_empty(len(image), len(self.rays))
        pixels = self.pixels.flatten()
        buffer = image.new_empty(0)  # fresh memory for every panel would cost as much as filling it
        for panel in self._panels(image):
            columns = torch.index_select(image[panel].t().contiguous(), 0, pixels, out=buffer.resize_(0))
            products = _multiply(self.forward, columns.view(len(self.pixels), -1))
            sinogram[panel] = products.view(-1, columns.shape[1]).index_select(0, self.rays).t()
        return sinogram

    def backproject(self, sinogram: Tensor) -> Tensor:
        """``(batch, views * bins) -> (batch, rows * columns)``."""
        image = sinogram.new_empty(len(sinogram), len(self.pixels))
        for panel in self._panels(sinogram):
            bins = F.pad(sinogram[panel].t(), (0, 0, 0, 1))
            columns = bins.index_select(0, self._slots)
            products = _multiply(self.transpose, columns.view(len(self.forward), -1)).view(-1, bins.shape[1])
            if self.images == 1:
                image[panel] = products.index_select(0, self._places.flatten()).t()
            else:
                image[panel] = F.embedding_bag(self._places, products, mode="sum").t()
        return image

    def _panels(self, batch: Tensor) -> Iterator[slice]:
        step = max(1, PANEL_COLUMNS[batch.device.type] // self.images)
        return (slice(start, start + step) for start in range(0, len(batch), step))

    def to(self, device: torch.device, dtype: torch.dtype) -> SystemMatrix:
        """Return a copy on another device or in another precision."""
        forward, transpose = (matrix.to(device=device, dtype=dtype) for matrix in (self.forward, self.transpose))
        return SystemMatrix(forward, lambda: transpose, self.pixels.to(device), self.rays.to(device))

    def select(self, rays: Tensor) -> SystemMatrix | SplitMatrix:
        """Return the matrix of some rays of the sinogram, on the CPU.

        With symmetries, the stored rays that interleaved views need of turned images are not those that they need of
        mirrored ones, so these become two parts.

        Args:
            rays: indices ``view * bins + bin``, ``(number,)``, int64, each at most once.
        """
        places = self.rays[rays]
        if self.images == 1:
            return self._part(places, self.pixels, torch.zeros_like(places))
        image = places % self.images
        mirrored = image // 2 % 2  # of the quadrants, the second and the fourth
        parts = []
        for kind in mirrored.unique().tolist():
            own = torch.nonzero(mirrored == kind).flatten()
            columns = [column for column in range(self.images) if column // 2 % 2 == kind]
            parts.append((own, self._part(places[own], self.pixels[:, columns], image[own] // 4 * 2 + image[own] % 2)))
        return SplitMatrix(parts)

    def _part(self, places: Tensor, pixels: Tensor, image: Tensor) -> SystemMatrix:
        """Keep the stored rays of these places; each now belongs to this one of these images."""
        stored, row = torch.unique(places // self.images, return_inverse=True)
        part = _csr(_scipy(self.forward)[stored.numpy()])
        return SystemMatrix(part, lambda: _transpose(part), pixels, row * pixels.shape[1] + image)


class SplitMatrix:
    """A matrix in parts.

    Args:
        parts: for each part the rays that it serves, ``(number,)`` int64, and their matrix.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, SystemMatrix]]) -> None:
        self.parts = parts

    def project(self, image: Tensor) -> Tensor:
        """``(batch, rows * columns) -> (batch, views * bins)``."""
        sinogram = image.new_empty(len(image), sum(len(rays) for rays, _ in self.parts))
        for rays, matrix in self.parts:
            sinogram[:, rays] = matrix.project(image)
        return sinogram

    def backproject(self, sinogram: Tensor) -> Tensor:
        """``(batch, views * bins) -> (batch, rows * columns)``."""
        images = [matrix.backproject(sinogram[:, rays]) for rays, matrix in self.parts]
        return torch.stack(images).sum(0)

    def to(self, device: torch.device, dtype: torch.dtype) -> SplitMatrix:
        """Return a copy on another device or in another precision."""
        return SplitMatrix([(rays.to(device), matrix.to(device, dtype)) for rays, matrix in self.parts])


_shared: WeakValueDictionary[tuple[object, ...], SystemMatrix] = WeakValueDictionary()
_lock = threading.RLock()


def system_matrix(
    geometry: ParallelBeam,
    kernel: str,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> SystemMatrix:
    """Return the matrix of a geometry: from this process's memory, else from the disk cache, else built.

    Equal geometries share one matrix, which lives as long as anyone uses it.

    Args:
        geometry: what to project.
        kernel: "line", "linear" or "strip".
        device: where the matrix shall lie.
        dtype: float32 or float64; the weights themselves have single precision.
    """
    key = (geometry, kernel, device, dtype)
    # What is made in inference mode could not take part in training later.
    with _lock, torch.inference_mode(False), torch.no_grad():
        matrix = _shared.get(key)
        if matrix is None:
            if (device.type, dtype) == ("cpu", torch.float32):
                matrix = _load_or_build(geometry, kernel)
            else:
                matrix = system_matrix(geometry, kernel).to(device, dtype)
            _shared[key] = matrix
    return matrix


def _load_or_build(geometry: ParallelBeam, kernel: str) -> SystemMatrix:
    pixels = torch.from_numpy(pixel_table(geometry, kernel))
    rays = torch.from_numpy(ray_table(geometry, kernel))
    forward = _cached(geometry, kernel, "forward", lambda: _csr(build(geometry, kernel)))

    def make_transpose() -> Tensor:
        return _cached(geometry, kernel, "transpose", lambda: _transpose(forward))

    return SystemMatrix(forward, make_transpose, pixels, rays)


def _cached(geometry: ParallelBeam, kernel: str, part: str, make: Callable[[], Tensor]) -> Tensor:
    """Read a CSR tensor from the disk cache, or make it and leave it there."""
    key = {
        "format": FORMAT,
        "geometry": geometry.to_dict(),
        "kernel": kernel,
        "weights": weights_source(kernel),
        "symmetric": is_symmetric(geometry, kernel),
        "tile": TILE,
        "part": part,
    }
    name = f"radon-{kernel}-{geometry.n_views}x{geometry.n_bins}-{geometry.image_size}-{part}"
    arrays = disk_cache.load(name, key)
    if arrays is not None:
        *numbers, shape = arrays
        return _csr(sparse.csr_matrix(tuple(numbers), shape=tuple(shape)))
    tensor = make()
    matrix = _scipy(tensor)
    disk_cache.store(name, key, [matrix.data, matrix.indices, matrix.indptr, np.array(matrix.shape)])
    return tensor


def _csr(matrix: sparse.csr_matrix) -> Tensor:
    starts, columns = (torch.from_numpy(array.astype("int32", copy=False)) for array in (matrix.indptr, matrix.indices))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            starts, columns, torch.from_numpy(matrix.data), matrix.shape, check_invariants=False
        )


def _scipy(matrix: Tensor) -> sparse.csr_matrix:
    arrays = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    return sparse.csr_matrix(tuple(array.numpy() for array in arrays), shape=tuple(matrix.shape))


def _transpose(matrix: Tensor) -> Tensor:
    return _csr(_scipy(matrix).T.tocsr())


def _multiply(matrix: Tensor, columns: Tensor) -> Tensor:
    """Multiply by dense columns."""
    # Under autocast torch would ask for bfloat16, which CSR does not have.
    with torch.autocast(columns.device.type, enabled=False):
        if columns.shape[1] <= FEW_COLUMNS:
            return torch.stack([torch.mv(matrix, column) for column in columns.t().contiguous()], dim=1)
        if columns.is_cuda or columns.shape[1] < MANY_COLUMNS:
            return torch.mm(matrix, columns)
        return F.embedding_bag(
            matrix.col_indices(),
            columns,
            matrix.crow_indices(),
            mode="sum",
            per_sample_weights=matrix.values(),
            include_last_offset=True,
        )
