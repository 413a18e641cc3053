"""The KL autoencoder of stage 1, over the stack [positive, full, negative] of section RMAS (arXiv 2509.09130, fig. 1).

Vocabulary. The *stack* is ``(batch, 3, views, bins)``. The encoder gives a *posterior*, a mean and a log-variance per
latent element. *Raw* latents are what the encoder gives; *latents* are raw latents with the data set's mean subtracted
and divided by its standard deviation, per channel. Both numbers are measured when stage 1 ends and live in this
module's own file, so whoever loads it needs nothing else.

The constraint holds by construction: the decoder's head emits a non-negative full sinogram f and a mask m in [0, 1],
and the stack is (m f, f, (1 - m) f), so positive + negative == full for every latent, seen in training or not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from allpet.models.layers import moebius_pad
from allpet.scaling import Scaling


class Posterior(NamedTuple):
    """What the encoder believes about a stack.

    Attributes:
        mean: raw latents, ``(batch, latent_channels, rows, columns)``.
        log_variance: the same shape.
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draw raw latents from standard normal noise of the same shape."""
        return self.mean + (0.5 * self.log_variance).exp() * noise


class Decoded(NamedTuple):
    """What the decoder makes of a latent, in network range.

    Attributes:
        full: the sinogram, non-negative, ``(batch, 1, views, bins)``.
        mask: the share of each bin that belongs to the positive channel, in [0, 1], same shape.
    """

    full: Tensor
    mask: Tensor

    @property
    def stack(self) -> Tensor:
        """[positive, full, negative], ``(batch, 3, views, bins)``; positive + negative == full."""
        positive = self.mask * self.full
        return torch.cat([positive, self.full, self.full - positive], dim=1)


class Autoencoder(nn.Module):
    """KL autoencoder over stacks; backbone: diffusers' ``Encoder`` and ``Decoder``.

    Args:
        channels: width of each resolution level; each level but the last halves views and bins.
        latent_channels: channels of the latent.
        layers_per_block: residual blocks per level.
        patch: the stack is folded into ``patch x patch`` blocks before the first convolution and unfolded after the
            last; with ``len(channels)`` levels, views and bins shrink by ``patch * 2 ** (len(channels) - 1)``.
        seam: views of the flipped continuation (p(theta + pi, s) = p(theta, -s)) that are added at both ends before
            encoding and cropped after decoding; a multiple of the shrinking factor.
        stack_channels: 3 encodes the whole stack; 1 looks at its full channel alone (an ablation: no masks).

    Raises:
        ValueError: if ``seam`` does not fit the shrinking factor.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 128, 256),
        latent_channels: int = 4,
        layers_per_block: int = 1,
        patch: int = 1,
        seam: int = 0,
        stack_channels: int = 3,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": tuple(channels),
            "latent_channels": latent_channels,
            "layers_per_block": layers_per_block,
            "patch": patch,
            "seam": seam,
            "stack_channels": stack_channels,
        }
        self.factor = patch * 2 ** (len(channels) - 1)
        if seam % self.factor:
            raise ValueError(f"seam is {seam} views, but must be a multiple of {self.factor}, the shrinking factor.")
        self.patch, self.seam, self.latent_channels, self.stack_channels = patch, seam, latent_channels, stack_channels
        # GroupNorm needs groups that divide every width.
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if all(width % n == 0 for width in channels))
        shared: dict[str, Any] = {
            "block_out_channels": tuple(channels),
            "norm_num_groups": groups,
            # Attention over all positions would tie the network to one size and costs memory at 512 x 512.
            "mid_block_add_attention": False,
        }
        levels = len(channels)
        self.encoder = Encoder(
            stack_channels * patch**2,
            latent_channels,
            ("DownEncoderBlock2D",) * levels,
            layers_per_block=layers_per_block,
            **shared,
        )
        self.decoder = Decoder(
            latent_channels,
            min(stack_channels, 2) * patch**2,
            ("UpDecoderBlock2D",) * levels,
            # diffusers gives the decoder one block more per level than it is asked for
            layers_per_block=layers_per_block - 1,
            **shared,
        )
        self.scaling = Scaling()
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def forward(self, stack: Tensor, noise: Tensor | None = None) -> tuple[Decoded, Posterior]:
        """Encode and decode a stack in network range.

        Args:
            stack: ``(batch, 3, views, bins)``.
            noise: standard normal noise of the posterior's shape; None decodes the posterior's mean.
        """
        posterior = self.encode(stack)
        raw = posterior.mean if noise is None else posterior.sample(noise)
        return self._decode_raw(raw, (stack.shape[-2], stack.shape[-1])), posterior

    def latent_shape(self, views: int, bins: int) -> tuple[int, int, int]:
        """``(channels, rows, columns)`` of the latent of a sinogram of ``(views, bins)``."""
        return (
            self.latent_channels,
            -(-views // self.factor) + 2 * self.seam // self.factor,
            -(-bins // self.factor),
        )

    def encode(self, stack: Tensor) -> Posterior:
        """Encode a stack in network range, ``(batch, 3, views, bins)``.

        Views and bins that are no multiple of the shrinking factor are filled up: views by the sinogram's own
        flipped continuation, bins by zeros (nothing lies outside the field of view).
        """
        stack = self._fill(stack if self.stack_channels == 3 else stack[:, 1:2])
        if self.patch > 1:
            stack = F.pixel_unshuffle(stack, self.patch)
        mean, log_variance = self.encoder(stack).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))

    def encode_mean(self, stack: Tensor) -> Tensor:
        """Latents (standardised) of a stack's posterior mean, ``(batch, latent_channels, rows, columns)``."""
        return (self.encode(stack).mean - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std)

    def decode(self, latent: Tensor, shape: tuple[int, int]) -> Decoded:
        """Decode standardised latents into sinograms of ``shape == (views, bins)``, network range."""
        return self._decode_raw(
            latent * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean), shape
        )

    def pool(self, sinogram: Tensor) -> Tensor:
        """Average something per bin over what each position of the latent stands for.

        Args:
            sinogram: ``(batch, channel, views, bins)``; it continues over the seam as sinograms do.

        Returns:
            ``(batch, channel, rows, columns)`` of the latent.
        """
        return F.avg_pool2d(self._fill(sinogram), self.factor)

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the mean and standard deviation of raw latents per channel, each ``(latent_channels,)``.

        Raises:
            ValueError: if they are not finite or a channel is constant: the training of stage 1 went wrong.
        """
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 1e-6).all()):
            raise ValueError(
                f"Latent statistics are mean {mean.tolist()} and std {std.tolist()}, but must be finite with std > 0: "
                "lower the learning rate or the KL weight of stage 1 and train it again."
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def _fill(self, sinogram: Tensor) -> Tensor:
        views, bins = sinogram.shape[-2:]
        padded = moebius_pad(sinogram, self.seam + self.factor)
        padded = padded[:, :, self.factor : padded.shape[2] - self.factor + -views % self.factor]
        return F.pad(padded, (0, -bins % self.factor))

    def _decode_raw(self, raw: Tensor, shape: tuple[int, int]) -> Decoded:
        output = self.decoder(raw).float()
        if self.patch > 1:
            output = F.pixel_shuffle(output, self.patch)
        output = output[:, :, self.seam : self.seam + shape[0], : shape[1]]
        # Activity cannot be negative; beta makes softplus close to a hinge on the scale of the data (about 0..1).
        full = F.softplus(output[:, :1], beta=10.0)
        mask = torch.sigmoid(output[:, 1:]) if self.stack_channels == 3 else torch.ones_like(full)
        return Decoded(full, mask)

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1)
