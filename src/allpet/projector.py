"""The discrete Radon transform of a batch of images and its transpose, as one differentiable operator.

Two backends give the same numbers to 1e-3. *matrix* multiplies by the system matrix on any device torch has; its
transpose is exact to rounding. *astra* calls ASTRA's CUDA kernels on the tensors in place; its backprojection
approximates the transpose (see ``astra_cuda``), which is good enough for training and OSEM, not for solvers that rely
on an exact adjoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from allpet import astra_cuda
from allpet.geometry import ParallelBeam
from allpet.system_matrix import SplitMatrix, SystemMatrix, system_matrix
from allpet.system_rows import KERNELS

BACKENDS = ("auto", "astra", "matrix")


class Radon:
    """Project images to sinograms and back, batched and differentiable any number of times.

    The operator has no state of its own beyond its arguments: it may be copied, pickled and sent to worker processes,
    and works on the device of its input. Matrices are made on first use (and cached, see ``disk_cache``), and equal
    geometries share one.

    Args:
        geometry: views, bins and image grid.
        kernel: how a ray weighs pixels: "linear" (Joseph's interpolation), "line" (length of intersection) or "strip"
            (area of overlap over the bin's width; keeps the activity of every view to 1e-6).
        backend: "matrix", "astra" (CUDA tensors, linear kernel), or "auto": astra where it can run, else matrix.

    Raises:
        ValueError: if the kernel or backend is unknown, or "astra" is asked for another kernel than "linear".
        RuntimeError: if "astra" is asked for and there is no CUDA in ASTRA or no CUDA device.
    """

    def __init__(self, geometry: ParallelBeam, kernel: str = "linear", backend: str = "auto") -> None:
        for name, value, known in (("kernel", kernel, KERNELS), ("backend", backend, BACKENDS)):
            if value not in known:
                raise ValueError(f"There is no {name} {value!r}; choose one of {', '.join(known)}.")
        if backend == "astra":
            if kernel != "linear":
                raise ValueError(f"ASTRA's CUDA projector has no {kernel} kernel; use 'linear' or backend='matrix'.")
            if reason := astra_cuda.why_unavailable():
                raise RuntimeError(f"backend='astra' needs a CUDA GPU, but {reason}; use 'auto' or 'matrix'.")
        self.geometry, self.kernel, self.backend = geometry, kernel, backend
        self._whole: Radon | None = None
        self._every = (0, 1)
        self._matrices: dict[tuple[torch.device, torch.dtype], SystemMatrix | SplitMatrix] = {}
        self._subsets: dict[tuple[int, int], Radon] = {}

    def __repr__(self) -> str:
        text = f"Radon({self.geometry!r}, kernel={self.kernel!r}, backend={self.backend!r})"
        return text if self._whole is None else f"{text}.subset({self._every[0]}, {self._every[1]})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Radon:
        return self  # nothing about it can change, and torch cannot deep-copy CSR tensors

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": {}, "_subsets": {}}

    @property
    def angles(self) -> Tensor:
        """Angle of each view in radians, ``(views,)``, float64."""
        first, step = self._every
        return self.geometry.angles[first::step]

    @property
    def sinogram_shape(self) -> tuple[int, int]:
        """``(views, bins)`` of the sinograms that this operator makes and takes."""
        return (len(self.angles), self.geometry.n_bins)

    def subset(self, first: int, step: int) -> Radon:
        """Return the operator of the views ``first, first + step, ...`` only.

        It is kept, so asking again costs nothing; all subsets of one step together take as much memory as the whole.

        Args:
            first: the first view.
            step: distance between views, that is the number of such subsets.

        Raises:
            ValueError: unless ``0 <= first < step <= views``.
        """
        if self._whole is not None:
            raise ValueError("A subset of views cannot be split again; call subset on the whole transform.")
        if not 0 <= first < step <= self.geometry.n_views:
            raise ValueError(
                f"subset({first}, {step}) of {self.geometry.n_views} views; expected 0 <= first < step <= views."
            )
        if step == 1:
            return self
        if (first, step) not in self._subsets:
            operator = Radon(self.geometry, self.kernel, self.backend)
            operator._whole, operator._every = self, (first, step)
            self._subsets[first, step] = operator
        return self._subsets[first, step]

    def project(self, image: Tensor) -> Tensor:
        """Integrate images along every ray.

        Args:
            image: activity, ``(batch, channels, rows, columns)``, channels usually 1. Half precision is computed and
                returned in float32.

        Returns:
            ``(batch, channels, views, bins)``, activity x mm.

        Raises:
            ValueError: if the shape, dtype or device does not fit.
            RuntimeError: if ASTRA fails, for example for want of memory.
        """
        return self._operate(image, transpose=False)

    def backproject(self, sinogram: Tensor) -> Tensor:
        """Apply the transpose of ``project``: spread every bin over the pixels its ray sees.

        Args:
            sinogram: ``(batch, channels, views, bins)``.

        Returns:
            ``(batch, channels, rows, columns)``, mm times the sinogram's unit.

        Raises:
            ValueError: if the shape, dtype or device does not fit.
            RuntimeError: if ASTRA fails, for example for want of memory.
        """
        return self._operate(sinogram, transpose=True)

    def _operate(self, x: Tensor, transpose: bool) -> Tensor:
        expected = self.sinogram_shape if transpose else self.geometry.image_shape
        verb, axes = ("backproject", "views, bins") if transpose else ("project", "rows, columns")
        if x.dim() != 4 or tuple(x.shape[-2:]) != expected:
            raise ValueError(
                f"{verb} takes (batch, channels, {axes}) with ({axes}) = {expected}, but got {tuple(x.shape)}."
            )
        if not x.is_floating_point():
            raise ValueError(f"{verb} takes floating-point numbers, but got {x.dtype}; convert with .float().")
        if x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{verb} works on CPU and CUDA tensors, but got one on {x.device}; move it there.")
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        result = _Linear.apply(x.flatten(0, 1), self, transpose)
        return result.view(*x.shape[:2], *result.shape[-2:])

    def _apply(self, x: Tensor, transpose: bool) -> Tensor:
        """``(number, rows, columns)`` to ``(number, views, bins)`` or back, no questions asked."""
        if self._runs_on_astra(x):
            run = astra_cuda.backproject if transpose else astra_cuda.project
            return run(x, self.geometry, self.angles)
        matrix = self._matrix(x.device, x.dtype)
        result = (matrix.backproject if transpose else matrix.project)(x.flatten(1))
        return result.view(-1, *(self.geometry.image_shape if transpose else self.sinogram_shape))

    def _runs_on_astra(self, x: Tensor) -> bool:
        if self.backend == "astra":
            if not x.is_cuda or x.dtype != torch.float32:
                raise ValueError(
                    f"backend='astra' works on float32 CUDA tensors, but got {x.dtype} on {x.device}; use 'auto'."
                )
            return True
        fits = self.backend == "auto" and x.is_cuda and x.dtype == torch.float32 and self.kernel == "linear"
        return fits and astra_cuda.why_unavailable() is None

    def _matrix(self, device: torch.device, dtype: torch.dtype) -> SystemMatrix | SplitMatrix:
        key = (device, dtype)
        if key not in self._matrices:
            if self._whole is None:
                self._matrices[key] = system_matrix(self.geometry, self.kernel, device, dtype)
            else:
                n_views, n_bins = self.geometry.sinogram_shape
                first, step = self._every
                rays = torch.arange(n_views * n_bins).view(n_views, n_bins)[first::step].flatten()
                whole = self._whole._matrix(torch.device("cpu"), torch.float32)
                assert isinstance(whole, SystemMatrix)  # a subset has no subsets
                self._matrices[key] = whole.select(rays).to(device, dtype)
        return self._matrices[key]


class _Linear(torch.autograd.Function):
    """The derivative of a linear operator is its transpose, and so on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, radon: Radon, transpose: bool) -> Tensor:
        ctx.radon, ctx.transpose = radon, transpose
        return radon._apply(x, transpose)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(gradients[0], ctx.radon, not ctx.transpose), None, None
