"""Layers that know what a sinogram is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Padding = Literal["zero", "moebius", "symmetric"]


def moebius_pad(sinogram: Tensor, views: int) -> Tensor:
    """Continue a sinogram past both ends of its half turn: p(theta + pi, s) = p(theta, -s).

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        views: number of views to add at each end.

    Returns:
        ``(batch, channel, views + 2 * views added, bins)``.
    """
    if views == 0:
        return sinogram
    before, after = sinogram[:, :, -views:].flip(-1), sinogram[:, :, :views].flip(-1)
    return torch.cat([before, sinogram, after], dim=2)


def close_seam(sinogram: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Fade the ends of a half turn into what was computed of the same views beyond its other end.

    The view before the first is the last one, flipped; a network that computes both makes two of it. At the seam both
    count half, so that the half turn closes on itself; as many views away from it as were computed beyond, nothing.

    Args:
        sinogram: ``(batch, channel, views, bins)``.
        before: the views before the first, ``(batch, channel, n, bins)``; at most half the views are used.
        after: as many views after the last.

    Returns:
        the shape of *sinogram*.
    """
    views, n = sinogram.shape[2], before.shape[2]
    n = min(n, views // 2)
    if n == 0:
        return sinogram
    share = ((torch.arange(n, device=sinogram.device) + 0.5) / (2 * n)).to(sinogram)[:, None]  # up to 1/2 at the seam
    first = sinogram[:, :, :n].lerp(after[:, :, :n].flip(-1), share.flip(0))
    last = sinogram[:, :, views - n :].lerp(before[:, :, before.shape[2] - n :].flip(-1), share)
    return torch.cat([first, sinogram[:, :, n : views - n], last], dim=2)


class MoebiusConv2d(nn.Conv2d):
    """A convolution that sees the flipped continuation beyond the first and the last view, and zeros beyond the bins.

    Behind the first layer that is approximate, since features of the flipped continuation are those of the mirrored
    kernel. With kernels that are symmetric along the bins it is exact.
    """

    symmetric = False

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(batch, channel, views, bins)``; the shape is kept."""
        weight = 0.5 * (self.weight + self.weight.flip(-1)) if self.symmetric else self.weight
        views, bins = (size // 2 for size in self.weight.shape[-2:])
        return F.conv2d(F.pad(moebius_pad(input, views), (bins, bins)), weight, self.bias)


class SymmetricConv2d(MoebiusConv2d):
    """The same with kernels symmetric along the bins: it commutes with rotations by whole views and half turns."""

    symmetric = True


class MoebiusDownsample(Downsample2D):
    """Halves views and bins by averaging, then convolves: the mean of two neighbours tells neither from the other."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Map ``(batch, channel, views, bins)``, both even, to half of each."""
        return self.conv(F.avg_pool2d(hidden_states, 2))


def close_views(network: nn.Module, padding: Padding) -> None:
    """Make the convolutions of a diffusers network, in place, treat views as the closed Moebius strip that they are.

    With "symmetric", a network without other operations that tell left from right (folding does) commutes with
    rotations by as many views as it shrinks views by, and with half turns, to rounding: a sinogram has no first view.

    Args:
        network: whose convolutions have stride 1, but for downsampling layers, and odd kernels.
        padding: "zero" leaves everything as it is; "moebius" continues the views; "symmetric" has kernels that are
            symmetric along the bins in addition.

    Raises:
        ValueError: if the padding is unknown.
    """
    if padding not in get_args(Padding):
        raise ValueError(f"padding is {padding!r}, but must be one of {', '.join(get_args(Padding))}.")
    if padding == "zero":
        return
    for layer in list(network.modules()):
        if isinstance(layer, Downsample2D):
            layer.__class__ = MoebiusDownsample
            layer.conv.stride = (1, 1)
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = SymmetricConv2d if padding == "symmetric" else MoebiusConv2d


class DeviceAttention:
    """diffusers' fused attention on a GPU, its plain one on a CPU, where the fused backward pass is slow.

    With 16 to 320 positions, torch's fused CPU kernel took a quarter of a whole training step.
    """

    def __init__(self) -> None:
        self.plain, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend; arguments and result are those of diffusers' processors, which it looks up by name."""
        processor = self.plain if hidden_states.device.type == "cpu" else self.fused
        return processor(attention, hidden_states, encoder_hidden_states, attention_mask, temb)


def adapt(parts: Iterable[nn.Module], checkpointing: bool, channels_last: bool, compiled: bool) -> None:
    """Change how networks of diffusers compute, but not what.

    Args:
        parts: the networks.
        checkpointing: compute what lies inside a block anew in the backward pass instead of keeping it (Chen et al.,
            arXiv 1604.06174): less memory, about a third more time.
        channels_last: keep the channels of a pixel together.
        compiled: compile at the first call. Parameters keep their names, unlike with ``torch.compile(network)``.
    """
    for part in parts:
        if checkpointing:
            for layer in part.modules():
                if hasattr(layer, "gradient_checkpointing"):
                    layer.gradient_checkpointing = True  # type: ignore[assignment]
                    layer._gradient_checkpointing_func = _recompute  # type: ignore[assignment]
        if channels_last:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            part.compile()


def _recompute(layer: nn.Module, *arguments: Any) -> Any:
    return checkpoint(layer, *arguments, use_reentrant=False)
