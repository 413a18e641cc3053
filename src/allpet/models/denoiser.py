"""The denoiser of stage 2: a U-Net over latents, steered by a prompt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from allpet.models.layers import DeviceAttention, adapt
from allpet.prompts import REGIONS, TRACERS, Prompt


class Denoiser(nn.Module):
    """U-Net (diffusers' ``UNet2DModel``) with tracer and region embeddings added to the time embedding.

    Two embeddings with a null entry each (index 0, "left open") leave either half of a prompt free and allow
    guidance over each. They are added to the time embedding rather than attended to: a prompt here is two words.

    Args:
        latent_channels: channels of the latent that is denoised.
        condition_channels: channels concatenated to it (a mask, an encoded input sinogram, ...).
        channels: width of each level; each level but the last halves rows and columns.
        layers_per_block: residual blocks per level.
        patch: latents are folded into ``patch x patch`` blocks before the first level and unfolded after the last: on
            two CPU cores, two wide levels learn as much per step as three narrow ones, in two thirds of the time.
        attention: for each level, whether it attends over all positions.
        head_channels: channels per attention head.
        dropout: dropout inside residual blocks.
        label_size: length of an extra vector of conditions, such as the label of drawn symmetries; zeros mean none.
        checkpointing: less memory in training, more time; see ``layers.adapt``. Like the two that follow it changes how
            the network computes, not what, and is not part of an exported model.
        channels_last: order of the channels in memory, see there.
        compiled: whether to compile, see there.

    Raises:
        ValueError: if ``attention`` and ``channels`` differ in length.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        condition_channels: int = 0,
        channels: tuple[int, ...] = (128, 256, 384),
        layers_per_block: int = 2,
        patch: int = 1,
        attention: tuple[bool, ...] = (False, True, True),
        head_channels: int = 32,
        dropout: float = 0.0,
        label_size: int = 0,
        checkpointing: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if len(attention) != len(channels):
            raise ValueError(f"attention has {len(attention)} levels and channels {len(channels)}: give one for each.")
        self.config: dict[str, Any] = {
            "latent_channels": latent_channels,
            "condition_channels": condition_channels,
            "channels": tuple(channels),
            "layers_per_block": layers_per_block,
            "patch": patch,
            "attention": tuple(attention),
            "head_channels": head_channels,
            "dropout": dropout,
            "label_size": label_size,
        }
        self.latent_channels, self.condition_channels = latent_channels, condition_channels
        self.patch, self.multiple = patch, patch * 2 ** (len(channels) - 1)
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if all(width % n == 0 for width in channels))
        self.unet = UNet2DModel(
            in_channels=(latent_channels + condition_channels) * patch**2,
            out_channels=latent_channels * patch**2,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            attention_head_dim=head_channels,
            norm_num_groups=groups,
            dropout=dropout,
            add_attention=attention[-1],
            class_embed_type="identity",
        )
        for layer in self.unet.modules():
            if isinstance(layer, Attention):
                layer.set_processor(DeviceAttention())  # type: ignore[arg-type]
        # Start from "predict zero", as the diffusion literature does and diffusers does not.
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)
        adapt([self.unet], checkpointing, channels_last, compiled)
        width = channels[0] * 4
        self.tracer = nn.Embedding(len(TRACERS), width)
        self.region = nn.Embedding(len(REGIONS), width)
        self.label = nn.Linear(label_size, width, bias=False) if label_size else None

    def forward(
        self,
        latent: Tensor,
        time: Tensor,
        prompt: Prompt,
        condition: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Predict the training target (noise, velocity, ...) of noisy latents.

        Args:
            latent: ``(batch, latent_channels, rows, columns)``.
            time: diffusion time of each, ``(batch,)``, 0..1000.
            prompt: tracer and region of each.
            condition: ``(batch, condition_channels, rows, columns)``; None means zeros.
            label: ``(batch, label_size)``; None means zeros.

        Returns:
            ``(batch, latent_channels, rows, columns)``.
        """
        rows, columns = latent.shape[-2:]
        if self.condition_channels:
            if condition is None:
                condition = latent.new_zeros(len(latent), self.condition_channels, rows, columns)
            latent = torch.cat([latent, condition.to(latent.dtype)], dim=1)
        latent = F.pad(latent, (0, -columns % self.multiple, 0, -rows % self.multiple), mode="replicate")
        embedding = self.tracer(prompt.tracer) + self.region(prompt.region)
        if self.label is not None and label is not None:
            embedding = embedding + self.label(label.to(embedding.dtype))
        folded = F.pixel_unshuffle(latent, self.patch)
        prediction = F.pixel_shuffle(self.unet(folded, time, class_labels=embedding).sample, self.patch)
        return prediction[..., :rows, :columns]
