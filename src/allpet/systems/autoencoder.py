"""Stage 1: the KL autoencoder over stacks [positive, full, negative]."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from allpet.batches import SinogramBatch, unmasked_stack
from allpet.geometry import ParallelBeam
from allpet.losses import hinge_discriminator_loss, kl_divergence, stack_loss, weight_by_frequency
from allpet.metrics import relative_l2
from allpet.models.autoencoder import Autoencoder
from allpet.models.discriminator import PatchDiscriminator
from allpet.power import measure_gain, radial_power
from allpet.pretrained import building, load_pretrained, save_pretrained
from allpet.randomness import keyed_generator
from allpet.symmetry import strip
from allpet.systems.base import CosineSystem, OptimizerName, log_mean


class AutoencoderSystem(CosineSystem):
    """Train an autoencoder on stacks: L1 + frequency-weighted L1 + KL, and a patch discriminator if one is given.

    Where the network's constraint is ``free``, the loss asks for it: |p + n - f| + |p - M f| + |n - (1 - M) f|, the two
    arrows of the paper's figure 1.

    The data module supplies the scale of the data set and, in ``batch.stack``, the masks drawn by RMAS.

    Args:
        autoencoder: the network.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        optimizer: "adamw" or "muon", see ``CosineSystem``.
        others_factor: see ``CosineSystem``.
        kl_weight: weight of the KL divergence per latent element.
        image_weight: weight of the error after ``losses.weight_by_frequency``, which counts as it would in the image.
        mask_weight: weight of the absolute error of the mask where there is activity.
        constraint_weight: weight of the constraint's violation, where it can be violated.
        discriminator: optional patch discriminator, trained in the same step.
        adversarial_weight: weight of its verdict on reconstructions.
        adversarial_start: first step at which the autoencoder listens to it.
        seed: keys the posterior's noise and the strips.
        strip_views: train on strips of so many neighbouring views of each slice, drawn anew in every epoch; it saves
            memory in proportion, and all losses are those of single views or of patches. None for the half turn.

    Raises:
        ValueError: if strips do not fit the network.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        others_factor: float = 1.0,
        kl_weight: float = 1e-4,
        image_weight: float = 1.0,
        mask_weight: float = 0.1,
        constraint_weight: float = 0.1,
        discriminator: PatchDiscriminator | None = None,
        adversarial_weight: float = 0.1,
        adversarial_start: int = 0,
        seed: int = 0,
        strip_views: int | None = None,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, optimizer, others_factor)
        if strip_views is not None and (strip_views < 1 or strip_views % autoencoder.factor):
            raise ValueError(
                f"strip_views is {strip_views}, but must be a multiple of {autoencoder.factor}, the shrinking factor."
            )
        self.strip_views = strip_views
        self.autoencoder = autoencoder
        self.discriminator = discriminator
        self.kl_weight, self.image_weight, self.mask_weight = kl_weight, image_weight, mask_weight
        self.constraint_weight = constraint_weight
        self.adversarial_weight, self.adversarial_start, self.seed = adversarial_weight, adversarial_start, seed
        self.geometry: ParallelBeam | None = None

    def forward(self, stack: Tensor) -> Tensor:
        """Reconstruct stacks in data units, ``(batch, 3, views, bins)``, from the posterior's mean."""
        scaling = self.autoencoder.scaling
        decoded, _ = self.autoencoder(scaling(stack))
        return scaling.inverse(decoded.stack)

    @property
    def backbone(self) -> nn.Module:
        """The autoencoder."""
        return self.autoencoder

    def setup(self, stage: str) -> None:
        """Take geometry and scale from the data module; a scale that came with weights stays."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.geometry = data.geometry
            if stage == "fit" and float(self.autoencoder.scaling.scale) == 1.0:
                self.autoencoder.scaling.set_scale(data.scale)
            if self.strip_views is not None and self.strip_views > self.geometry.n_views:
                raise ValueError(
                    f"strip_views is {self.strip_views}, but the sinograms have {self.geometry.n_views} views: choose "
                    "fewer, or null for the whole half turn."
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the weights with the networks; checkpoints of earlier versions know no gain, which is then 1."""
        checkpoint["state_dict"].setdefault("autoencoder.power_gain", torch.ones_like(self.autoencoder.power_gain))
        super().on_load_checkpoint(checkpoint)

    def training_step(self, batch: SinogramBatch, batch_idx: int) -> Tensor:
        """One step: loss of the autoencoder plus, on detached stacks, of the discriminator."""
        given = target = self.autoencoder.scaling(batch.as_stack())
        if self.autoencoder.stack_channels == 1:  # a discriminator would know its stacks by their empty masks
            given = target = unmasked_stack(target[:, 1:2])
        if self.strip_views is not None:
            batch, given, target = self._cut(batch, target, self.strip_views)
        shape = self.autoencoder.latent_shape(*target.shape[-2:])
        noise = torch.stack(
            [
                torch.randn(shape, generator=keyed_generator(self.seed, self.current_epoch, sample, "posterior"))
                for sample in batch.sample_id.tolist()
            ]
        )
        decoded, posterior = self.autoencoder(given, noise.to(target.device), strip=self.strip_views is not None)
        losses = self._losses(decoded.stack, decoded.mask, target, batch)
        losses["kl"] = kl_divergence(posterior.mean.float(), posterior.log_variance.float())
        loss = self._total(losses)
        if self.discriminator is not None:
            fake = decoded.stack
            listen = self.adversarial_weight * (self.global_step >= self.adversarial_start)
            # The verdict on the reconstruction must move the autoencoder only, so it is asked of detached weights:
            # one backward pass serves both players and automatic optimisation keeps accumulation, clipping and EMA.
            weights = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            losses["adversarial"] = -torch.func.functional_call(self.discriminator, weights, (fake,)).mean()
            losses["discriminator"] = hinge_discriminator_loss(
                self.discriminator(target), self.discriminator(fake.detach())
            )
            loss = loss + listen * losses["adversarial"] + losses["discriminator"]
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in losses.items()})
        return loss

    def validation_step(self, batch: SinogramBatch, batch_idx: int) -> None:
        """Log the losses and the relative L2 error against the expected sinogram."""
        target = self.autoencoder.scaling(batch.as_stack())
        decoded, posterior = self.autoencoder(target)
        losses = self._losses(decoded.stack, decoded.mask, target, batch)
        losses["kl"] = kl_divergence(posterior.mean.float(), posterior.log_variance.float())
        full = self.autoencoder.scaling.inverse(decoded.full)
        size = len(batch.sinogram)
        log_mean(self, {"val/loss": self._total(losses)}, size, prog_bar=True)
        self._log_error("val/relative_l2", full, batch)
        log_mean(self, {f"val/{name}": value for name, value in losses.items()}, size)

    def test_step(self, batch: SinogramBatch, batch_idx: int) -> None:
        """Log the relative L2 error of reconstruction and of the noisy input against the expected sinogram."""
        self._log_error("test/relative_l2", self.reconstruct(batch), batch)
        self._log_error("test/relative_l2_input", batch.sinogram, batch)

    def predict_step(self, batch: SinogramBatch, batch_idx: int) -> Tensor:
        """Reconstruct the full sinograms of a batch."""
        return self.reconstruct(batch)

    @torch.no_grad()
    def reconstruct(self, batch: SinogramBatch) -> Tensor:
        """Return the reconstructed full sinograms in data units, ``(batch, 1, views, bins)``."""
        scaling = self.autoencoder.scaling
        decoded, _ = self.autoencoder(scaling(batch.as_stack()))
        return scaling.inverse(decoded.full)

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[SinogramBatch]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw latents per channel over a whole pass, each ``(latent_channels,)``."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in tqdm(batches, desc="Measuring latents", leave=False):
            stack = self.autoencoder.scaling(batch.as_stack())
            raw = self.autoencoder.encode(stack).mean.double().cpu()
            count += raw.numel() // raw.shape[1]
            total = total + raw.sum(dim=(0, 2, 3))
            squares = squares + raw.square().sum(dim=(0, 2, 3))
        if count == 0:
            raise ValueError("There are no batches to measure latents on: give at least one.")
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()

    @torch.no_grad()
    def measure_full_weight(self, batches: Iterable[SinogramBatch]) -> float:
        """Weight of f beside p + n that makes their mean's error smallest: the best linear unbiased estimate.

        With C the second moments of the errors of f and p + n it is (C22 - C12) / (C11 + C22 - 2 C12); noise that the
        data share with both cancels.
        """
        moments = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            stack = self.autoencoder.scaling(batch.as_stack())
            raw, target = self.autoencoder.encode(stack).mean, stack[:, 1:2]
            p, f, n = self.autoencoder.decode_free(raw, (stack.shape[-2], stack.shape[-1])).split(1, dim=1)
            first, second = (f - target).double(), (p + n - target).double()
            moments += torch.stack([first.square().sum(), second.square().sum(), (first * second).sum()]).cpu()
        c11, c22, c12 = moments.tolist()
        spread = c11 + c22 - 2 * c12
        return min(max((c22 - c12) / spread, 0.0), 1.0) if spread > 0 else 2 / 3

    @torch.no_grad()
    def measure_power_gain(self, batches: Iterable[SinogramBatch]) -> Tensor:
        """Gain per radial frequency that gives reconstructions the power of expected sinograms (``allpet.power``)."""
        noisy, decoded = [], []
        for batch in batches:
            active = batch.sinogram.flatten(1).any(dim=1)
            noisy.append(radial_power(batch.sinogram[active]))
            decoded.append(radial_power(self.reconstruct(batch)[active]))
        return measure_gain(noisy, decoded)

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors and README.md, the folder to share."""
        config = {
            "class": "AutoencoderSystem",
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "autoencoder": self.autoencoder.config,
        }
        save_pretrained(folder, config, self.autoencoder.state_dict(), card)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AutoencoderSystem:
        """Load a folder written by ``save_pretrained``.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the folder holds another kind of model or damaged weights.
        """
        config, weights = load_pretrained(folder, "AutoencoderSystem")
        with building(folder):
            system = cls(Autoencoder(**config["autoencoder"]))
            system.autoencoder.load_state_dict(weights)
            system.geometry = ParallelBeam(**config["geometry"]) if config["geometry"] else None
        return system.eval()

    def _cut(self, batch: SinogramBatch, stack: Tensor, views: int) -> tuple[SinogramBatch, Tensor, Tensor]:
        """Cut a strip out of every slice: the batch with its masks cut, the strip with a seam at both ends, without."""
        turn, seam = 2 * stack.shape[-2], self.autoencoder.seam
        generators = [keyed_generator(self.seed, self.current_epoch, i, "strip") for i in batch.sample_id.tolist()]
        start = torch.cat([torch.randint(turn, (1,), generator=generator) for generator in generators])
        if batch.stack is not None:
            mask = strip(batch.stack.mask, start.to(stack.device), views)
            batch = batch._replace(stack=batch.stack._replace(mask=mask))
        given = strip(stack, (start - seam).to(stack.device), views + 2 * seam)
        return batch, given, given[:, :, seam : seam + views]

    def _log_error(self, name: str, sinogram: Tensor, batch: SinogramBatch) -> None:
        # relative to nothing, an error is infinite: slices without activity are left out
        active = batch.expected.flatten(1).any(dim=1)
        size = int(active.sum())
        error = relative_l2(sinogram[active], batch.expected[active]).sum() / max(size, 1)
        log_mean(self, {name: error}, size)

    def _losses(self, output: Tensor, mask: Tensor, target: Tensor, batch: SinogramBatch) -> dict[str, Tensor]:
        if self.autoencoder.stack_channels == 1:
            # of the mask it knows nothing: to ask it for p and n would have it split f evenly, or give none
            output, target = output[:, 1:2], target[:, 1:2]
        losses = {
            "l1": stack_loss(output, target),
            "image": F.l1_loss(weight_by_frequency(output), weight_by_frequency(target)),
        }
        if self.autoencoder.stack_channels == 3 and batch.stack is not None:
            # where nothing is emitted any mask is right
            activity = target[:, 1:2].clamp(max=1)
            losses["mask"] = ((mask - batch.stack.mask).abs() * activity).mean()
        if self.autoencoder.constraint == "free":
            positive, full, negative = output.split(1, dim=1)
            violated = [positive + negative - full]
            if batch.stack is not None:
                known = batch.stack.mask
                violated += [positive - known * full, negative - (1 - known) * full]
            losses["constraint"] = torch.cat(violated, dim=1).abs().mean()
        return losses

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        total = losses["l1"] + self.image_weight * losses["image"] + self.kl_weight * losses["kl"]
        for name, weight in (("mask", self.mask_weight), ("constraint", self.constraint_weight)):
            if name in losses:
                total = total + weight * losses[name]
        return total
