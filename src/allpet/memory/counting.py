"""Counting what lives: a dispatch mode that sees every tensor, and CUDA's rules for tensors that are on no GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operations make under it, as they come and go.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive so far.
        gradients: bytes of gradients alive now; whoever makes and drops them says so.
        peak_gradients: what ``gradients`` was at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.peak_gradients = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # any number serves where one is asked for, such as an optimiser's count of steps
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def forget_peak(self) -> None:
        """Begin anew from what is alive."""
        self.peak, self.peak_gradients = self.live, self.gradients

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        n_bytes = storage.nbytes()
        self.live += n_bytes
        if self.live > self.peak:
            self.forget_peak()
        weakref.finalize(storage, self._free, key, n_bytes)

    def _free(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.live -= n_bytes


class CudaAutocast(TorchFunctionMode):
    """Let the CPU's autocast keep in float32 what CUDA's does (ATen/autocast_mode.h, AT_FORALL_FP32)."""

    FLOAT32 = frozenset(
        {
            *(F.group_norm, torch.group_norm, F.layer_norm, torch.layer_norm, F.softplus, F.l1_loss, F.mse_loss),
            *(F.softmax, torch.softmax, Tensor.softmax, torch.exp, Tensor.exp, torch.pow, Tensor.pow),
        }
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.FLOAT32 or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            wide = [_float32(value) for value in args]
            return func(*wide, **{name: _float32(value) for name, value in kwargs.items()})


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
