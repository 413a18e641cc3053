"""Layers that know what a sinogram is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
