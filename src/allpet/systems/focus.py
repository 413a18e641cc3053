"""Where a system of a downstream task looks: what it makes of transparent medical attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from allpet.attention import TransparentMedicalAttention
from allpet.projector import Radon

_USES = ("gain", "loss", "channel")


@dataclass(frozen=True)
class AttentionUse:
    """What a system makes of transparent medical attention (``allpet.attention``).

    Args:
        uses: any of "gain": the sinogram that the network is conditioned on is multiplied by the attention (where a
            bridge starts is not); "channel": the network is given attention - 1, averaged over the positions of the
            latent, as one more condition channel; "loss": the attention, averaged so and divided by its mean over the
            slice, weights the training loss.
        strengths: range that the strength of each training slice is drawn from, so that the network knows those that
            it may be asked for.
        areas: makes the attention from the projector.

    Raises:
        ValueError: if a use is unknown or the range impossible.
    """

    uses: tuple[Literal["gain", "loss", "channel"], ...] = ("channel",)
    strengths: tuple[float, float] = (1.0, 1.0)
    areas: Callable[[Radon], TransparentMedicalAttention] = TransparentMedicalAttention

    def __post_init__(self) -> None:
        if not self.uses or not set(self.uses) <= set(_USES):
            raise ValueError(f"uses are {list(self.uses)}; choose one or more of {', '.join(_USES)}.")
        low, high = self.strengths
        if not 0 <= low <= high < float("inf"):
            raise ValueError(f"strengths are {(low, high)}, but must be (smallest, largest), not negative.")

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionUse:
        # Frozen, and what the command line makes ``areas`` of holds locks, which weight averaging could not copy.
        return self


class Focus(NamedTuple):
    """What the network is conditioned on, and where the loss looks.

    Attributes:
        source: latent of the input, emphasised or not, ``(batch, channels, rows, columns)``.
        further: condition channels besides the source, ``(batch, channels, rows, columns)``; None for none.
        weight: of the loss, mean 1 in each slice, ``(batch, 1, rows, columns)``; None where it does not weight.
        weight_of_bins: the same in the sinogram, ``(batch, 1, views, bins)``.
    """

    source: Tensor
    further: Tensor | None = None
    weight: Tensor | None = None
    weight_of_bins: Tensor | None = None

    def repeat(self, n_targets: int) -> Focus:
        """Return the same for each target of an input."""
        return Focus(*(None if part is None else part.repeat_interleave(n_targets, 0) for part in self))  # type: ignore[arg-type]

    def part(self, rows: slice) -> Focus:
        """Return some of the slices."""
        return Focus(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]
