"""Building the Radon transform's matrix: which rays are stored, in which order, and their weights.

Weights are ASTRA's own 2D projectors' ("line": length of intersection; "linear": Joseph's interpolation; "strip":
exact area of overlap over the bin's width). Where astra-toolbox is not installed, Joseph's weights are computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from allpet.geometry import ParallelBeam

KERNELS = ("line", "linear", "strip")
SYMMETRIC_FROM = 400  # pixels or bins from which a whole matrix would take gigabytes
TILE = 8  # rays and pixels are numbered in tiles of TILE x TILE
BLOCK_WEIGHTS = 8_000_000  # fetched from ASTRA at a time; at 12 bytes each they would double the peak memory

Indices = NDArray[np.int64]


def is_symmetric(geometry: ParallelBeam, kernel: str) -> bool:
    """Whether only an eighth of the geometry's rays is stored.

    The line kernel gives a ray along the edge of two pixels to one of them, so its matrix is not symmetric.
    """
    large = max(geometry.image_size, geometry.n_bins) >= SYMMETRIC_FROM
    return large and kernel != "line" and geometry.n_views % 4 == 0 and geometry.n_bins % 2 == 0


def pixel_table(geometry: ParallelBeam, kernel: str) -> Indices:
    """Where each pixel of the matrix stands in each image shown to it.

    Returns:
        ``row * columns + column``, ``(pixels, images)``; pixels in tiles; one image, or with symmetries eight: the four
        *quadrants* (as it is; x and y swapped; turned by a quarter; mirrored in the y axis), each followed by itself
        turned by half.
    """
    grid = np.arange(geometry.image_size**2).reshape(geometry.image_shape)
    order = _tiles(*geometry.image_shape)
    if not is_symmetric(geometry, kernel):
        return order[:, None]
    # Row 0 is the top and y points up, so swapping x and y is the transpose in the other diagonal.
    quadrants = (grid, grid[::-1, ::-1].T, np.rot90(grid, -1), grid[:, ::-1])
    return np.stack([image.ravel()[order] for q in quadrants for image in (q, q[::-1, ::-1])], axis=1)


def ray_table(geometry: ParallelBeam, kernel: str) -> Indices:
    """Where each ray of the sinogram stands in the product of the matrix with the images of ``pixel_table``.

    Returns:
        ``stored ray * images + image``, ``(views * bins,)``.
    """
    views, bins = _stored_views_bins(geometry, kernel)
    place = np.empty(views * len(bins), dtype=np.int64)
    place[_tiles(views, len(bins))] = np.arange(place.size)
    if not is_symmetric(geometry, kernel):
        return place
    places = place.reshape(views, len(bins))
    view = np.arange(geometry.n_views)
    eighth = geometry.n_views // 4
    quadrant = np.select([view <= eighth, view <= 2 * eighth, view <= 3 * eighth], [0, 1, 2], 3)
    # theta, pi/2 - theta, theta - pi/2 and pi - theta all lie in the first 45 degrees.
    stored = np.select(
        [quadrant == 0, quadrant == 1, quadrant == 2], [view, 2 * eighth - view, view - 2 * eighth], 4 * eighth - view
    )
    positive = places[stored] * 8 + 2 * quadrant[:, None]
    negative = positive[:, ::-1] + 1
    return np.concatenate([negative, positive], axis=1).ravel()


def weights_source(kernel: str) -> str:
    """Name what computes the weights, with its version.

    Raises:
        RuntimeError: if ASTRA is not installed and the kernel needs it.
    """
    try:
        return f"astra {version('astra-toolbox')}"
    except PackageNotFoundError:
        if kernel == "linear":
            return "joseph 1"
        raise RuntimeError(
            f"The {kernel} kernel's weights come from astra-toolbox, which is not installed; install it or use "
            "kernel='linear'."
        ) from None


def build(geometry: ParallelBeam, kernel: str) -> sparse.csr_matrix:
    """Build the matrix of the stored rays, mm, float32 with int32 indices.

    Returns:
        Stored rays x pixels, both numbered as ``ray_table`` and ``pixel_table`` say.

    Raises:
        ValueError: if the matrix has more weights than int32 indices can count.
    """
    weights: Callable[[ParallelBeam, str, Indices, Indices], sparse.csr_matrix]
    weights = _astra_weights if weights_source(kernel).startswith("astra") else _joseph_weights
    n_views, bins = _stored_views_bins(geometry, kernel)
    pixels = pixel_table(geometry, kernel)[:, 0]
    place = np.empty(pixels.size, dtype=np.int32)
    place[pixels] = np.arange(pixels.size)

    # A block holds whole tiles, so that ordering its rows orders the matrix.
    step = max(1, BLOCK_WEIGHTS // (2 * TILE * len(bins) * geometry.image_size)) * TILE
    blocks, total = [], 0
    for start in range(0, n_views, step):
        views = np.arange(start, min(start + step, n_views))
        block = weights(geometry, kernel, views, bins)[_tiles(len(views), len(bins))]
        block.indices = place[block.indices]
        blocks.append(block)
        total += block.nnz
        if total >= 2**31:
            raise ValueError(f"{geometry} needs more weights than int32 can count; use fewer views, bins or pixels.")
    # What scipy's vstack does, at half its time and memory.
    starts = np.cumsum([0, *(block.nnz for block in blocks[:-1])])
    parts = [block.indptr[1:] + start for block, start in zip(blocks, starts.tolist(), strict=True)]
    arrays = ([b.data for b in blocks], [b.indices for b in blocks], [np.zeros(1, dtype=np.int32), *parts])
    data, indices, row_starts = (np.concatenate(pieces) for pieces in arrays)
    return sparse.csr_matrix((data, indices, row_starts), shape=(len(row_starts) - 1, pixels.size))


def _stored_views_bins(geometry: ParallelBeam, kernel: str) -> tuple[int, Indices]:
    """Number of stored views, from view 0 on, and the stored bins."""
    if is_symmetric(geometry, kernel):
        return geometry.n_views // 4 + 1, np.arange(geometry.n_bins // 2, geometry.n_bins)
    return geometry.n_views, np.arange(geometry.n_bins)


def _tiles(rows: int, columns: int) -> Indices:
    """Order in which a row-major grid is walked tile by tile (the last tile of each axis may be smaller)."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.lexsort((column, row, column // TILE, row // TILE))


def _astra_weights(geometry: ParallelBeam, kernel: str, views: Indices, bins: Indices) -> sparse.csr_matrix:
    """ASTRA's weights of some views and of consecutive bins, rows ``view * bins + bin``."""
    import astra  # takes half a second: only whoever builds waits for it

    spacing = geometry.bin_mm / geometry.pixel_mm
    angles = geometry.angles.numpy()[views]
    if len(bins) == geometry.n_bins:
        beam = astra.create_proj_geom("parallel", spacing, geometry.n_bins, angles)
    else:
        cos, sin = np.cos(angles), np.sin(angles)
        centre = geometry.bin_centers.numpy()[bins].mean() / geometry.pixel_mm
        vectors = np.stack([sin, -cos, centre * cos, centre * sin, spacing * cos, spacing * sin], axis=1)
        beam = astra.create_proj_geom("parallel_vec", len(bins), vectors)
    grid = astra.create_vol_geom(geometry.image_size, geometry.image_size)
    projector = astra.create_projector(kernel, beam, grid)
    handle = astra.projector.matrix(projector)
    try:
        matrix = astra.matrix.get(handle).tocsr()
    finally:
        astra.matrix.delete(handle)
        astra.projector.delete(projector)
    matrix.data *= geometry.pixel_mm
    return _single(matrix)


def _joseph_weights(geometry: ParallelBeam, kernel: str, views: Indices, bins: Indices) -> sparse.csr_matrix:
    """Joseph's weights (IEEE TMI 1982) of some views and bins, rows ``view * bins + bin``; equals ASTRA's "linear".

    A ray steps along the axis it is closer to, pixel by pixel, and interpolates between two pixels across it.
    """
    size, pixel = geometry.image_size, geometry.pixel_mm
    angles = geometry.angles.numpy()[views][:, None, None]
    s = geometry.bin_centers.numpy()[bins][None, :, None]
    centre = (size - 1) / 2
    step = np.arange(size)
    along = (step - centre) * pixel
    cos, sin = np.cos(angles), np.sin(angles)
    upright = np.abs(sin) < np.abs(cos)
    across = np.where(upright, (s + along * sin) / cos, (s - along * cos) / np.where(upright, 1, sin))
    # Upright rays step down the rows (y = -along) and find x; the others step along the columns and find y.
    position = np.where(upright, across, -across) / pixel + centre
    first = np.floor(position)
    second_share = position - first
    length = pixel / np.maximum(np.abs(cos), np.abs(sin))
    neighbour = np.stack([first, first + 1], axis=-1).astype(np.int64)
    weight = np.stack([1 - second_share, second_share], axis=-1) * length[..., None]
    column = np.where(upright[..., None], step[:, None] * size + neighbour, neighbour * size + step[:, None])
    inside = (neighbour >= 0) & (neighbour < size)
    row_starts = np.concatenate([[0], inside.sum(axis=(-2, -1)).ravel().cumsum()])
    return _single(
        sparse.csr_matrix((weight[inside], column[inside], row_starts), shape=(row_starts.size - 1, size**2))
    )


def _single(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """In single precision, with int32 indices, without explicit zeros (nearly a third of "strip")."""
    integers = (array.astype(np.int32, copy=False) for array in (matrix.indices, matrix.indptr))
    arrays = (matrix.data.astype(np.float32), *integers)
    matrix = sparse.csr_matrix(arrays, shape=matrix.shape)
    matrix.eliminate_zeros()
    return matrix
