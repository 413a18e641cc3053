"""What systems over the latents of a frozen stage-1 autoencoder share."""

from __future__ import annotations

from typing import Any

from torch import nn

from allpet.geometry import ParallelBeam
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.models.pixel_space import PixelSpace
from allpet.systems.base import CosineSystem


class Aside:
    """What lies outside the module tree: not trained, not checkpointed, not copied by weight averaging.

    Attributes:
        autoencoder: the frozen stage-1 network.
    """

    def __init__(self, autoencoder: Autoencoder | PixelSpace) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Aside:
        return self


class LatentSystem(CosineSystem):
    """A system that trains a denoiser over a frozen autoencoder's latents.

    Attributes:
        denoiser: the network to train.
        geometry: of the sinograms that stage 1 was trained on; None where it is not known.
    """

    denoiser: Denoiser
    geometry: ParallelBeam | None
    _aside: Aside

    @property
    def autoencoder(self) -> Autoencoder | PixelSpace:
        """The frozen stage-1 network, on this module's device."""
        network = self._aside.autoencoder
        return network if network.scaling.scale.device == self.device else network.to(self.device)

    @property
    def backbone(self) -> nn.Module:
        """The denoiser."""
        return self.denoiser

    def setup(self, stage: str) -> None:
        """Take the geometry from the data module.

        Raises:
            ValueError: if stage 1 was trained on another geometry.
        """
        data = getattr(self.trainer, "datamodule", None)
        geometry = getattr(data, "geometry", None)
        if geometry is None:
            return
        if self.geometry is not None and self.geometry != geometry:
            raise ValueError(
                f"Stage 1 was trained on {self.geometry}, the data are {geometry}: train stage 1 on these data first."
            )
        self.geometry = geometry
