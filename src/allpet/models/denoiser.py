"""The denoiser of stage 2: a U-Net over latents, steered by a prompt.

A point of the image is a sinusoid in its sinogram: what is local for the anatomy is spread over all views. With
``domain="image"`` the U-Net therefore works where things are local. The latent, which has the layout of a small
sinogram, passes a convolution, is backprojected (half of the features filtered, half not), passes the U-Net over the
image grid, is projected again, and meets what the convolution has seen in a last block over views and bins. Projection
and backprojection are fixed matrices without parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from allpet.geometry import ParallelBeam
from allpet.models.layers import DeviceAttention, adapt, moebius_pad
from allpet.projector import Radon
from allpet.prompts import REGIONS, TRACERS, Prompt
from allpet.reconstruction import fbp


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
        domain: where the U-Net works, see the module: "sinogram" or "image".
        seam_rows: rows of the flipped continuation that latents carry at either end, ``seam`` of the autoencoder over
            its shrinking factor; only the image domain needs to know.
        radon_channels: features that are backprojected and projected, even.
        checkpointing: less memory in training, more time; see ``layers.adapt``. Like the two that follow it changes how
            the network computes, not what, and is not part of an exported model.
        channels_last: order of the channels in memory, see there.
        compiled: whether to compile, see there.

    Raises:
        ValueError: if ``attention`` and ``channels`` differ in length or a choice is unknown.
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
        domain: Literal["sinogram", "image"] = "sinogram",
        seam_rows: int = 0,
        radon_channels: int = 32,
        checkpointing: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if len(attention) != len(channels):
            raise ValueError(f"attention has {len(attention)} levels and channels {len(channels)}: give one for each.")
        attending = [n for n, wanted in zip(channels, attention, strict=True) if wanted]
        if any(n % head_channels for n in attending):
            raise ValueError(
                f"head_channels is {head_channels}, but must divide the channels of every level with attention, "
                f"{', '.join(map(str, attending))}: choose another, or other channels."
            )
        if domain not in ("sinogram", "image") or radon_channels % 2:
            raise ValueError(
                f"domain is {domain!r} with {radon_channels} radon_channels, but must be 'sinogram' or 'image' with an "
                "even number."
            )
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
            "domain": domain,
            "seam_rows": seam_rows,
            "radon_channels": radon_channels,
        }
        self.latent_channels, self.condition_channels = latent_channels, condition_channels
        self.patch, self.multiple = patch, patch * 2 ** (len(channels) - 1)
        self.domain = domain
        given, wanted = latent_channels + condition_channels, latent_channels
        if domain == "image":
            self.sandwich = RadonSandwich(given, latent_channels, radon_channels, channels[0] * 4, seam_rows)
            given = wanted = radon_channels
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if all(width % n == 0 for width in channels))
        self.unet = UNet2DModel(
            in_channels=given * patch**2,
            out_channels=wanted * patch**2,
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
        last = self.unet.conv_out if domain == "sinogram" else self.sandwich.last
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
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
        embedding = self.tracer(prompt.tracer) + self.region(prompt.region)
        if self.label is not None and label is not None:
            embedding = embedding + self.label(label.to(embedding.dtype))
        if self.domain == "sinogram":
            return self._over_grid(latent, time, embedding)
        features = self.sandwich.enter(latent)
        image = self._over_grid(self.sandwich.backproject(features), time, embedding)
        # the U-Net's own embedding of the time, for the layers around it
        steps = self.unet.time_proj(time.expand(len(latent))).to(latent.dtype)
        return self.sandwich.leave(features, image, self.unet.time_embedding(steps) + embedding)

    def _over_grid(self, values: Tensor, time: Tensor, embedding: Tensor) -> Tensor:
        """Fill ``(batch, channels, rows, columns)`` up to what folding and levels need, apply the U-Net, crop."""
        rows, columns = values.shape[-2:]
        values = F.pad(values, (0, -columns % self.multiple, 0, -rows % self.multiple), mode="replicate")
        folded = F.pixel_unshuffle(values, self.patch)
        result = F.pixel_shuffle(self.unet(folded, time, class_labels=embedding).sample, self.patch)
        return result[..., :rows, :columns]


class RadonSandwich(nn.Module):
    """What surrounds a U-Net in the image domain, see the module.

    Args:
        in_channels: of the latent and its conditions.
        out_channels: of the prediction.
        channels: features that are backprojected and projected.
        embedding_size: length of the embedding of time and prompt.
        seam_rows: rows of the flipped continuation at either end of a latent.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int, embedding_size: int, seam_rows: int) -> None:
        super().__init__()
        self.seam_rows = seam_rows
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.scale = nn.Linear(embedding_size, 2 * channels)
        self.middle = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.last = nn.Conv2d(2 * channels, out_channels, 3, padding=1)
        self._matrices: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_matrices": {}}

    def enter(self, latent: Tensor) -> Tensor:
        """Features over views and bins, ``(batch, channels, rows, columns)``."""
        return self.first(latent)

    def backproject(self, features: Tensor) -> Tensor:
        """Features over the image, ``(batch, channels, columns, columns)``: filtered ones, then unfiltered ones."""
        rows, columns = features.shape[-2:]
        filtered, plain, _ = self._geometry(rows, columns, features.device)
        core = features[:, :, self.seam_rows : rows - self.seam_rows].flatten(2)
        halves = core.chunk(2, dim=1)
        image = torch.cat(
            [half @ matrix.to(half.dtype).T for half, matrix in zip(halves, (filtered, plain), strict=True)], dim=1
        )
        return image.unflatten(2, (columns, columns))

    def leave(self, features: Tensor, image: Tensor, embedding: Tensor) -> Tensor:
        """Prediction, ``(batch, out_channels, rows, columns)``, from both domains' features."""
        rows, columns = features.shape[-2:]
        projection = self._geometry(rows, columns, features.device)[2].to(image.dtype)
        projected = (image.flatten(2) @ projection.T).unflatten(2, (rows - 2 * self.seam_rows, columns))
        both = torch.cat([features, moebius_pad(projected, self.seam_rows)], dim=1)
        both = both * (1 + self.scale(F.silu(embedding)).to(both.dtype)[:, :, None, None])
        return self.last(F.silu(self.middle(F.silu(both))))

    def _geometry(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Filtered and plain backprojection ``(pixels, rays)`` and projection ``(rays, pixels)``.

        They are scaled so that white noise of variance 1 keeps it on average.
        """
        key = (rows, columns, device)
        if key not in self._matrices:
            views = rows - 2 * self.seam_rows
            radon = Radon(ParallelBeam(views, columns, 1.0, columns, 1.0))
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                pixels = torch.eye(columns**2, device=device).view(-1, 1, columns, columns)
                rays = torch.eye(views * columns, device=device).view(-1, 1, views, columns)
                projection = radon.project(pixels).flatten(1).T
                filtered = fbp(radon, rays).flatten(1).T
                triple = (filtered, projection.T, projection)
                scaled = [m * (len(m) ** 0.5 / m.norm()) for m in triple]
            self._matrices[key] = (scaled[0].contiguous(), scaled[1].contiguous(), scaled[2].contiguous())
        return self._matrices[key]
