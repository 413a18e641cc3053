"""What a system of a downstream task starts from: the folder of stage 1 or of stage 2."""

from __future__ import annotations

from pathlib import Path

import torch

from allpet.geometry import ParallelBeam
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.models.pixel_space import PixelSpace
from allpet.pretrained import pretrained_class
from allpet.systems.autoencoder import AutoencoderSystem
from allpet.systems.latent_diffusion import LatentDiffusion


def start_from(denoiser: Denoiser, trained: Denoiser, keep_output: bool = False) -> None:
    """Give a denoiser the weights of a stage 2; what the latter lacks starts at zero.

    Args:
        denoiser: to change.
        trained: of stage 2.
        keep_output: whether the last layer, which spoke of noise, is kept; else it starts at zero, too.

    Raises:
        ValueError: if they differ in more than condition channels and label.
    """
    weights = dict(denoiser.state_dict())
    for name, old in trained.state_dict().items():
        if name.startswith("label."):
            continue
        new = weights.get(name)
        if name == "unet.conv_in.weight" and new is not None and new.shape[0] == old.shape[0]:
            wide = torch.zeros_like(new)  # folding keeps the latent's channels before the condition's
            wide[:, : old.shape[1]] = old
            old = wide
        if new is None or new.shape != old.shape:
            raise ValueError(
                f"The denoiser's {name} is {None if new is None else tuple(new.shape)}, stage 2's {tuple(old.shape)}: "
                "give it stage 2's channels, blocks and patch, or set initialise to false."
            )
        weights[name] = old
    for name in ("label.weight", *(() if keep_output else ("unet.conv_out.weight", "unet.conv_out.bias"))):
        weights[name] = torch.zeros_like(weights[name])
    denoiser.load_state_dict(weights)


def load_stages(folder: Path) -> tuple[Autoencoder | PixelSpace, ParallelBeam | None, Denoiser | None, bool]:
    """Load the autoencoder, and the denoiser if there is one, from the folder of either stage.

    Returns:
        autoencoder, geometry, denoiser or None, and whether the denoiser predicts everything rather than what a linear
        one leaves open.
    """
    if pretrained_class(folder) == "LatentDiffusion":
        stage2 = LatentDiffusion.from_pretrained(folder)
        return stage2.autoencoder, stage2.geometry, stage2.denoiser, stage2.linear is None
    stage1 = AutoencoderSystem.from_pretrained(folder)
    return stage1.autoencoder, stage1.geometry, None, False
