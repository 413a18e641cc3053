"""Counting what lives: a dispatch mode that sees every tensor, and CUDA's rules for tensors that are on no GPU."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from allpet.models.layers import DeviceAttention


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


def follow_cuda(network: nn.Module) -> None:
    """Let a network on the CPU compute as on a GPU, as far as memory is concerned.

    CUDA's autocast keeps norms in float32 (ATen/autocast_mode.h, AT_FORALL_FP32), which the CPU's does not, and
    attention is fused.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            layer.forward = functools.partial(_in_float32, layer.forward)  # type: ignore[method-assign]
        processor = getattr(layer, "processor", None)
        if isinstance(processor, DeviceAttention):
            processor.plain = processor.fused  # type: ignore[assignment]


def _in_float32(forward: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return forward(values)
    with torch.autocast("cpu", enabled=False):
        return forward(values.float())
