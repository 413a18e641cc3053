"""The KL autoencoder of stage 1, over the stack [positive, full, negative] of section RMAS (arXiv 2509.09130, fig. 1).

Vocabulary. The *stack* is ``(batch, 3, views, bins)``. The encoder gives a *posterior*, a mean and a log-variance per
latent element. *Raw* latents are what the encoder gives; *latents* are raw latents with the data set's mean subtracted
and divided by its standard deviation, per channel. Both numbers are measured when stage 1 ends and live in this
module's own file, so whoever loads it needs nothing else.

The *constraint* positive + negative == full holds by construction: the decoder's head emits a non-negative full
sinogram f and a mask m in [0, 1], and the stack is (m f, f, (1 - m) f), for every latent, seen in training or not.
Three other forms, for comparison, let the decoder emit three channels (p, f, n) >= 0, with r = p + n - f:

* ``free``: they are the stack; only the loss knows of the constraint, as figure 1 of the paper draws it;
* ``projected``: the nearest stack that fulfils it, (p - r/3, f + r/3, n - r/3);
* ``weighted``: f and p + n are two measurements of the same sinogram, and the full one is w f + (1 - w) (p + n), with
  the w of smallest variance, measured on the training set when stage 1 ends (2/3, as in ``projected``, until then).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from allpet.consistency import helgason_ludwig_correction
from allpet.models.layers import Padding, adapt, close_seam, close_views, moebius_pad
from allpet.power import POINTS
from allpet.scaling import Scaling

Constraint = Literal["head", "free", "projected", "weighted"]


_SHARPNESS = 10.0
"""Of the softplus: activity cannot be negative, and this is close to a hinge on the scale of the data (about 0..1)."""


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
        stack: [positive, full, negative], non-negative, ``(batch, 3, views, bins)``; positive + negative == full,
            unless the constraint is ``free``.
        mask: the share of each bin that belongs to the positive channel, in [0, 1], ``(batch, 1, views, bins)``.
    """

    stack: Tensor
    mask: Tensor

    @property
    def full(self) -> Tensor:
        """The sinogram, ``(batch, 1, views, bins)``."""
        return self.stack[:, 1:2]


class Autoencoder(nn.Module):
    """KL autoencoder over stacks; backbone: diffusers' ``Encoder`` and ``Decoder``.

    Args:
        channels: width of each resolution level; each level but the last halves views and bins.
        latent_channels: channels of the latent.
        layers_per_block: residual blocks per level.
        patch: the stack is folded into ``patch x patch`` blocks before the first convolution and unfolded after the
            last; with ``len(channels)`` levels, views and bins shrink by ``patch * 2 ** (len(channels) - 1)``.
        seam: views of the flipped continuation (p(theta + pi, s) = p(theta, -s)) that are added at both ends before
            encoding; after decoding the ends of the half turn are faded into them (``layers.close_seam``), so that it
            closes on itself. A multiple of the shrinking factor.
        stack_channels: 3 encodes the whole stack; 1 looks at its full channel alone (an ablation: no masks) and gives
            it the stack of an empty mask.
        range_order: the decoder's last layer removes from f what no image could have caused in its first
            ``range_order`` + 1 radial moments (``consistency.helgason_ludwig_correction``), or as many as a quarter of
            the bins; None leaves f as it is, as attenuated sinograms, which do not fulfil these conditions, need.
        constraint: how positive + negative == full comes about, see the module.
        padding: what convolutions see beyond the edges of the half turn, see ``layers.close_views``: "zero",
            "moebius" or "symmetric"; both need ``patch=1``.
        checkpointing: less memory in training, more time; see ``layers.adapt``. Like the two that follow it changes how
            the network computes, not what, and is not part of an exported model.
        channels_last: order of the channels in memory, see there.
        compiled: whether to compile, see there.

    Raises:
        ValueError: if ``seam`` does not fit the shrinking factor, a choice is unknown or two exclude each other.
    """

    latent_mean: Tensor
    latent_std: Tensor
    full_weight: Tensor
    power_gain: Tensor

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 128, 256),
        latent_channels: int = 4,
        layers_per_block: int = 1,
        patch: int = 1,
        seam: int = 0,
        stack_channels: int = 3,
        range_order: int | None = None,
        constraint: Constraint = "head",
        padding: Padding = "zero",
        checkpointing: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": tuple(channels),
            "latent_channels": latent_channels,
            "layers_per_block": layers_per_block,
            "patch": patch,
            "seam": seam,
            "stack_channels": stack_channels,
            "range_order": range_order,
            "constraint": constraint,
            "padding": padding,
        }
        if constraint not in get_args(Constraint) or (constraint != "head" and stack_channels != 3):
            raise ValueError(
                f"constraint is {constraint!r} with {stack_channels} stack channels, but must be one of "
                f"{', '.join(get_args(Constraint))}; all but 'head' need three channels."
            )
        if padding in ("moebius", "symmetric") and patch > 1:
            raise ValueError(
                f"padding is {padding!r} and patch {patch}: folding tells left from right, so use patch=1."
            )
        self.factor = patch * 2 ** (len(channels) - 1)
        if seam % self.factor:
            raise ValueError(f"seam is {seam} views, but must be a multiple of {self.factor}, the shrinking factor.")
        self.patch, self.seam, self.latent_channels, self.stack_channels = patch, seam, latent_channels, stack_channels
        self.range_order, self.constraint, self.closed = range_order, constraint, padding != "zero"
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
            (min(stack_channels, 2) if constraint == "head" else 3) * patch**2,
            ("UpDecoderBlock2D",) * levels,
            # diffusers gives the decoder one block more per level than it is asked for
            layers_per_block=layers_per_block - 1,
            **shared,
        )
        close_views(self, padding)
        adapt((self.encoder, self.decoder), checkpointing, channels_last, compiled)
        self.scaling = Scaling()
        # not in the file unless it is used, so that folders of earlier versions load
        self.register_buffer("full_weight", torch.tensor(2 / 3), persistent=constraint == "weighted")
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        self.register_buffer("power_gain", torch.ones(POINTS))
        self.register_load_state_dict_pre_hook(_without_gain)

    def forward(self, stack: Tensor, noise: Tensor | None = None, strip: bool = False) -> tuple[Decoded, Posterior]:
        """Encode and decode a stack in network range.

        Args:
            stack: ``(batch, 3, views, bins)``.
            noise: standard normal noise of the posterior's shape; None decodes the posterior's mean.
            strip: whether the stack is a part of the half turn, with ``seam`` more views at both ends, which are the
                sinogram's own and are not decoded.
        """
        posterior = self.encode(stack, strip)
        raw = posterior.mean if noise is None else posterior.sample(noise)
        views = stack.shape[-2] - (2 * self.seam if strip else 0)
        return self._decode_raw(raw, (views, stack.shape[-1]), strip), posterior

    def latent_shape(self, views: int, bins: int) -> tuple[int, int, int]:
        """``(channels, rows, columns)`` of the latent of a sinogram of ``(views, bins)``."""
        return (
            self.latent_channels,
            -(-views // self.factor) + 2 * self.seam // self.factor,
            -(-bins // self.factor),
        )

    def encode(self, stack: Tensor, strip: bool = False) -> Posterior:
        """Encode a stack in network range, ``(batch, 3, views, bins)``.

        Views and bins that are no multiple of the shrinking factor are filled up: views by the sinogram's own
        flipped continuation, bins by zeros (nothing lies outside the field of view). For ``strip`` see ``forward``.

        Raises:
            ValueError: if the layers continue the views themselves and their number is no multiple.
        """
        stack = self._fill(stack if self.stack_channels == 3 else stack[:, 1:2], strip)
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
        return F.avg_pool2d(self._fill(sinogram, False), self.factor)

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

    def decode_free(self, raw: Tensor, shape: tuple[int, int], strip: bool = False) -> Tensor:
        """The decoder's three channels (p, f, n) before any constraint, from raw latents, ``(batch, 3, views, bins)``.

        For ``strip`` see ``forward``.

        Raises:
            ValueError: if the constraint is ``head``, whose decoder has no such channels.
        """
        if self.constraint == "head":
            raise ValueError("A decoder with constraint 'head' emits f and m; there is nothing to be combined.")
        return F.softplus(self._output(raw, shape, strip), beta=_SHARPNESS)

    def set_full_weight(self, weight: float) -> None:
        """Store the w of the ``weighted`` constraint, 0..1.

        Raises:
            ValueError: if it is not.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"The weight of the full channel is {weight}, but must lie between 0 and 1.")
        self.full_weight.fill_(weight)

    def set_power_gain(self, gain: Tensor) -> None:
        """Store what ``power.measure_gain`` found; ``LatentDiffusion.sample`` applies it, ``decode`` does not."""
        self.power_gain.copy_(gain)

    def _fill(self, sinogram: Tensor, strip: bool = False) -> Tensor:
        views, bins = sinogram.shape[-2:]
        if self.closed and (strip or views % self.factor):
            raise ValueError(
                f"There are {views} views{' of a strip' if strip else ''}, but an autoencoder whose layers continue "
                f"them needs the half turn and a multiple of {self.factor}: use padding 'zero' with a seam."
            )
        if strip:
            if views % self.factor:
                raise ValueError(f"A strip has {views} views, but must have a multiple of {self.factor}.")
            return F.pad(sinogram, (0, -bins % self.factor))
        padded = moebius_pad(sinogram, self.seam + self.factor)
        padded = padded[:, :, self.factor : padded.shape[2] - self.factor + -views % self.factor]
        return F.pad(padded, (0, -bins % self.factor))

    def _output(self, raw: Tensor, shape: tuple[int, int], strip: bool) -> Tensor:
        output = self.decoder(raw).float()
        if self.patch > 1:
            output = F.pixel_shuffle(output, self.patch)
        last = self.seam + shape[0]
        output = output[:, :, : last + self.seam, : shape[1]]
        inside = output[:, :, self.seam : last]
        # what lies beyond the ends of a strip is the sinogram's own, but no other end of it
        return inside if strip else close_seam(inside, output[:, :, : self.seam], output[:, :, last:])

    def _decode_raw(self, raw: Tensor, shape: tuple[int, int], strip: bool = False) -> Decoded:
        if self.constraint == "head":
            output = self._output(raw, shape, strip)
            full = self._in_range(F.softplus(output[:, :1], beta=_SHARPNESS), strip)
            mask = torch.sigmoid(output[:, 1:]) if self.stack_channels == 3 else torch.zeros_like(full)
            positive = mask * full
            return Decoded(torch.cat([positive, full, full - positive], dim=1), mask)
        positive, full, negative = self.decode_free(raw, shape, strip).split(1, dim=1)
        if self.constraint != "free":
            weight = self.full_weight if self.constraint == "weighted" else 2 / 3
            half = 0.5 * weight * (positive + negative - full)
            positive, negative = (positive - half).clamp(min=0), (negative - half).clamp(min=0)
            full = positive + negative
        mask = positive / (positive + negative).clamp(min=1e-6)
        full = self._in_range(full, strip)
        if self.constraint != "free":
            positive = mask * full
            negative = full - positive
        return Decoded(torch.cat([positive, full, negative], dim=1), mask)

    def _in_range(self, full: Tensor, strip: bool) -> Tensor:
        # moments relate all views, of which a strip has a part
        if self.range_order is None or strip:
            return full
        order = min(self.range_order, full.shape[-1] // 4, full.shape[-2] - 1)  # what so few bins can tell
        return helgason_ludwig_correction(full, order).clamp(min=0)

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1)


def _without_gain(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    # folders of earlier versions do not speak of it
    weights.setdefault(f"{prefix}power_gain", torch.ones(POINTS))
