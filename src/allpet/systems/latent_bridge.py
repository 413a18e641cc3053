"""Downstream tasks: a diffusion bridge from the latent of the given scan to that of the wanted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from tqdm.auto import tqdm

from allpet.batches import unmasked_stack
from allpet.diffusion.bridge import Bridge
from allpet.diffusion.bridge_samplers import sample_dbim
from allpet.diffusion.preconditioning import PairStatistics, Preconditioning, measure_pairs
from allpet.geometry import ParallelBeam
from allpet.metrics import psnr, relative_l2
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.pretrained import building, load_pretrained, pretrained_class, save_pretrained
from allpet.prompts import TRACERS, Prompt, prompt_index
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import TASKS, PairedBatch
from allpet.systems.autoencoder import AutoencoderSystem
from allpet.systems.base import OptimizerName, log_mean
from allpet.systems.latent_diffusion import LatentDiffusion
from allpet.systems.latents import Aside, LatentSystem

LABEL_SIZE = len(TASKS) + len(TRACERS) + 2
"""Length of ``Denoiser``'s label: task, tracer of the target, delay in hours, -log10 of the dose."""
_MEASURED = 2000  # pairs whose moments are measured


class Condition(NamedTuple):
    """What is asked of the bridge, one entry per target.

    Attributes:
        task: index into ``TASKS``, ``(batch,)``, int64.
        prompt: tracer and region of the input.
        target_tracer: index into ``TRACERS``, ``(batch,)``, int64; 0 leaves it open.
        delay_min: time from the input's to the target's scan in minutes, ``(batch,)``.
        dose: share of the normal dose that the input has, ``(batch,)``, in (0, 1].
    """

    task: Tensor
    prompt: Prompt
    target_tracer: Tensor
    delay_min: Tensor
    dose: Tensor

    @classmethod
    def of(
        cls,
        task: str,
        prompts: Sequence[str],
        target_tracers: Sequence[str] | None = None,
        delay_min: float = 0.0,
        dose: float = 1.0,
    ) -> Condition:
        """Build the condition of a batch for one task.

        Args:
            task: one of ``TASKS``.
            prompts: tracer:region of each input.
            target_tracers: tracer of each target; None for the input's.
            delay_min: minutes until the target's scan (*delayed*).
            dose: share of the normal dose (*low_dose*).

        Raises:
            ValueError: if a name is unknown or a number impossible.
        """
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
        if delay_min < 0 or not 0 < dose <= 1:
            raise ValueError(f"delay_min is {delay_min} and dose {dose}; give a delay >= 0 and a dose in (0, 1].")
        prompt = Prompt.of(prompts)
        if target_tracers is None:
            target = prompt.tracer.clone()
        else:
            target = torch.tensor([prompt_index(name, TRACERS, "tracer") for name in target_tracers])
        n = len(prompts)
        if len(target) != n:
            raise ValueError(f"There are {n} prompts and {len(target)} target tracers: give one for each.")
        return cls(
            torch.full((n,), TASKS.index(task)), prompt, target, torch.full((n,), delay_min), torch.full((n,), dose)
        )

    @classmethod
    def of_pairs(cls, batch: PairedBatch) -> Condition:
        """Return the condition of every target of a batch of pairs, the targets of a pair one after another."""
        k = batch.expected.shape[1]
        task, tracer, region, delay, dose = (
            values.repeat_interleave(k)
            for values in (batch.task, batch.prompt.tracer, batch.prompt.region, batch.delay_min, batch.dose)
        )
        return cls(task, Prompt(tracer, region), batch.target_tracer.flatten(), delay, dose)

    def label(self) -> Tensor:
        """Return ``(batch, LABEL_SIZE)``, what the network is told besides tracer and region."""
        one_hot = torch.nn.functional.one_hot
        numbers = torch.stack([self.delay_min / 60, -self.dose.log10()], dim=1)
        return torch.cat([one_hot(self.task, len(TASKS)), one_hot(self.target_tracer, len(TRACERS)), numbers], dim=1)


@dataclass(frozen=True)
class BridgeSampling:
    """How to sample; see ``sample_dbim``.

    Args:
        nfe: denoiser calls per sample; 1 returns the mean of the targets, as a regression would.
        eta: share of fresh noise per step.
        order: 1, 2 or 3.
        samples: how many to draw for each input; their mean and standard deviation are returned.
        batch_size: latents per denoiser call.
    """

    nfe: int = 5
    eta: float = 0.0
    order: Literal[1, 2, 3] = 1
    samples: int = 1
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("nfe", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")


class Restored(NamedTuple):
    """What came out, in the data set's units.

    Attributes:
        mean: over the samples, ``(batch, targets, views, bins)``.
        std: standard deviation over the samples, the same shape; zeros for one sample.
        samples: ``(samples, batch, targets, views, bins)``.
    """

    mean: Tensor
    std: Tensor
    samples: Tensor


class LatentBridge(LatentSystem):
    """A bridge between latents of the given and the wanted sinogram (DDBM, arXiv 2309.16948; endpoint-aware form).

    The stage-1 encoder sees either sinogram as a stack with an empty mask, all negative. Inputs whose scale is not that
    of the targets, as without attenuation correction, are brought to it by one number for the data set. The moments of
    the latents are measured when training starts, so that with an untrained network the bridge is the best linear
    estimate per channel; what is learned goes beyond that.

    Args:
        autoencoder: the trained stage-1 network, or a folder that holds it: of stage 1 or of stage 2.
        denoiser: the network to train, with as many condition as latent channels and ``label_size`` LABEL_SIZE.
        bridge: the bridge.
        initialise: whether to start from the denoiser in the folder of a stage 2. Its last layer, which spoke of noise,
            starts at zero.
        target: "noisy": what a scanner would give, as a user's pairs are; "expected": without noise (simulator).
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        optimizer: "adamw" or "muon", see ``CosineSystem``.
        others_factor: see ``CosineSystem``.
        sampling: how ``restore``, ``test`` and ``predict`` draw.
        seed: keys training times and noise.

    Raises:
        ValueError: if networks or folder do not fit.
    """

    moments: Tensor
    input_ratio: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder | str,
        denoiser: Denoiser,
        bridge: Bridge = Bridge(),  # noqa: B008 - frozen
        initialise: bool = True,
        target: Literal["noisy", "expected"] = "noisy",
        learning_rate: float = 1e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        others_factor: float = 1.0,
        sampling: BridgeSampling = BridgeSampling(),
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, optimizer, others_factor)
        if target not in ("noisy", "expected"):
            raise ValueError(f"target is {target!r}, but must be 'noisy' or 'expected'.")
        self.geometry = None
        trained: Denoiser | None = None
        if isinstance(autoencoder, (str, Path)):
            autoencoder, self.geometry, trained = _load_stages(Path(autoencoder))
        channels = autoencoder.latent_channels
        given = (denoiser.latent_channels, denoiser.condition_channels, denoiser.config["label_size"])
        if given != (channels, channels, LABEL_SIZE):
            raise ValueError(
                f"The denoiser has {given[0]} latent and {given[1]} condition channels and label_size {given[2]}; "
                f"a bridge over this autoencoder needs {channels}, {channels} and {LABEL_SIZE}."
            )
        if initialise and trained is not None:
            start_from(denoiser, trained)
        self._aside = Aside(autoencoder)
        self.denoiser, self.bridge, self.target, self.sampling, self.seed = denoiser, bridge, target, sampling, seed
        unit = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        self.register_buffer("moments", unit[:, None].repeat(1, channels))
        self.register_buffer("input_ratio", torch.ones(()))

    @property
    def preconditioning(self) -> Preconditioning:
        """Scalings by the measured moments."""
        return Preconditioning(self.bridge, PairStatistics(*self.moments))

    def forward(self, x: Tensor, source: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Predict the residual F of ``Preconditioning`` for latents ``(batch, channels, rows, columns)``."""
        inputs = self.preconditioning.inputs(x, source, time)
        label = condition.label().to(x)
        return self.denoiser(inputs.noisy, self.bridge.network_time(time), condition.prompt, inputs.source, label)

    def setup(self, stage: str) -> None:
        """Take the geometry from the data module.

        Raises:
            ValueError: if its slices are no pairs, or stage 1 was trained on another geometry.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and not isinstance(data.train_set[[0]], PairedBatch):
            raise ValueError(f"{type(data).__name__} gives no pairs to learn from: use --data data_modules.PairedTask.")

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Measure the moments of the training pairs' latents, in a fixed order, so that a resumed run has the same."""
        pairs: Any = self.trainer.datamodule.train_set  # type: ignore[attr-defined]
        rows, size = list(range(min(len(pairs), _MEASURED))), self.sampling.batch_size
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        sums = torch.zeros(2, dtype=torch.float64)
        for piece in pieces:
            batch = pairs[piece]
            wanted = self._targets(batch)  # of two tracers the input is the sum
            sums += torch.stack([batch.input.double().sum(), wanted.double().sum()]).cpu()
        self.input_ratio.fill_(float(sums[0] / sums[1]))
        latents = []
        for piece in tqdm(pieces, desc="Measuring the pairs' latents", leave=False):
            batch = move_data_to_device(pairs[piece], self.device)
            with self.trainer.precision_plugin.forward_context():
                latents.append([values.cpu() for values in self._latents(batch)])
        target, source = (torch.cat(parts) for parts in zip(*latents, strict=True))
        self.moments.copy_(torch.stack(list(measure_pairs(target, source))))

    def training_step(self, batch: PairedBatch, batch_idx: int) -> Tensor:
        """Mean squared error of the residual, which is that of the target times the loss weight, at keyed times."""
        loss = self._loss(batch, (self.seed, self.current_epoch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.input))
        return loss

    def validation_step(self, batch: PairedBatch, batch_idx: int) -> None:
        """Log the same error at fixed times, and the error of the mean against the expected target."""
        size = len(batch.input)
        log_mean(self, {"val/loss": self._loss(batch, ("validation",))}, size, prog_bar=True)
        self._log_errors("val", batch, BridgeSampling(nfe=1))

    def test_step(self, batch: PairedBatch, batch_idx: int) -> None:
        """Log the errors of the result, and of the input at the targets' scale, against the expected target."""
        self._log_errors("test", batch, self.sampling)

    def predict_step(self, batch: PairedBatch, batch_idx: int) -> Restored:
        """Restore a batch of pairs; sample i of a slice depends on its identity and i alone."""
        return self._restore_pairs(batch, self.sampling)

    @torch.no_grad()
    def restore(
        self,
        given: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        sampling: BridgeSampling | None = None,
        n_targets: int = 1,
        progress: bool = False,
    ) -> Restored:
        """Turn given sinograms into wanted ones.

        Args:
            given: ``(batch, 1, views, bins)`` in the data set's units.
            condition: one entry per target: ``batch * n_targets``, those of an input one after another.
            seeds: one per input; equal seeds and inputs give equal results whatever the batch.
            sampling: how to; None takes the system's own.
            n_targets: 2 for *separation*: the results then add up to the autoencoder's reconstruction of the input.
            progress: whether to show a progress bar.

        Raises:
            ValueError: if the shapes do not fit.
        """
        sampling = sampling or self.sampling
        shape = (given.shape[-2], given.shape[-1])
        if self.geometry is not None and shape != self.geometry.sinogram_shape:
            wanted = " x ".join(map(str, self.geometry.sinogram_shape))
            raise ValueError(f"The sinograms are {shape[0]} x {shape[1]}; the model was trained on {wanted}.")
        if len(condition.task) != len(given) * n_targets or len(seeds) != len(given):
            raise ValueError(
                f"There are {len(given)} sinograms of {n_targets} target(s), {len(condition.task)} conditions and "
                f"{len(seeds)} seeds: give one condition per target and one seed per sinogram."
            )
        condition = move_data_to_device(condition, self.device)
        scaled = given.to(self.device) / self.input_ratio
        source = self._encode(scaled).repeat_interleave(n_targets, 0)
        results = []
        for draw in range(sampling.samples):
            keys = [(seed, draw, k) for seed in seeds for k in range(n_targets)]
            pieces = []
            for start in range(0, len(source), sampling.batch_size):
                rows = slice(start, start + sampling.batch_size)
                part = Condition(
                    condition.task[rows],
                    Prompt(condition.prompt.tracer[rows], condition.prompt.region[rows]),
                    *(values[rows] for values in condition[2:]),
                )
                generators = [keyed_generator(*key, "restore") for key in keys[rows]]
                pieces.append(self._sample(source[rows], part, generators, sampling, progress))
            full = self.autoencoder.decode(torch.cat(pieces), shape).full
            full = self.autoencoder.scaling.inverse(full).unflatten(0, (len(given), n_targets)).squeeze(2)
            if n_targets > 1:
                decoded = self.autoencoder.decode(source[::n_targets], shape).full
                mix = self.autoencoder.scaling.inverse(decoded) * self.input_ratio
                full = full * (mix / full.sum(1, keepdim=True).clamp_min(1e-12))
            results.append(full)
        samples = torch.stack(results)
        std = samples.std(0) if len(samples) > 1 else torch.zeros_like(samples[0])
        return Restored(samples.mean(0), std, samples)

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors (autoencoder, denoiser, moments) and README.md, the folder to share."""
        config = {
            "class": "LatentBridge",
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "autoencoder": self.autoencoder.config,
            "denoiser": self.denoiser.config,
            "bridge": asdict(self.bridge),
        }
        weights = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        weights |= {f"denoiser.{name}": value for name, value in self.denoiser.state_dict().items()}
        save_pretrained(
            folder, config, {**weights, "moments": self.moments, "input_ratio": self.input_ratio.clone()}, card
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, sampling: BridgeSampling = BridgeSampling()) -> LatentBridge:
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does."""
        config, weights = load_pretrained(folder, "LatentBridge")
        with building(folder):
            autoencoder, denoiser = Autoencoder(**config["autoencoder"]), Denoiser(**config["denoiser"])
            for name, network in (("autoencoder.", autoencoder), ("denoiser.", denoiser)):
                network.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})
            system = cls(autoencoder, denoiser, Bridge(**config["bridge"]), sampling=sampling)
            system.moments.copy_(weights["moments"])
            system.input_ratio.copy_(weights["input_ratio"])
            system.geometry = ParallelBeam(**config["geometry"]) if config["geometry"] else None
        return system.eval()

    def _sample(
        self,
        source: Tensor,
        condition: Condition,
        generators: Sequence[torch.Generator],
        sampling: BridgeSampling,
        progress: bool,
    ) -> Tensor:
        def denoise(x: Tensor, time: Tensor) -> Tensor:
            return self.preconditioning.clean(x, source, time, self(x, source, time, condition).float())

        return sample_dbim(
            denoise,
            source,
            generators,
            self.bridge,
            sampling.nfe,
            sampling.eta,
            sampling.order,
            progress=progress,
        )

    def _restore_pairs(self, batch: PairedBatch, sampling: BridgeSampling) -> Restored:
        n_targets = batch.expected.shape[1]
        return self.restore(batch.input, Condition.of_pairs(batch), batch.sample_id.tolist(), sampling, n_targets)

    def _loss(self, batch: PairedBatch, run: tuple[Any, ...]) -> Tensor:
        target, source = self._latents(batch)
        keys = [(i, k) for i in batch.sample_id.tolist() for k in range(batch.expected.shape[1])]
        generators = [keyed_generator(*run, *key, "bridge") for key in keys]
        time = torch.cat([self.bridge.draw_times(1, generator) for generator in generators]).to(self.device)
        noise = torch.stack([torch.randn(target.shape[1:], generator=generator) for generator in generators])
        x = self.bridge.q_sample(target, source, time, noise.to(target))
        wanted = self.preconditioning.residual(x, source, time, target)
        return (self(x, source, time, Condition.of_pairs(batch)).float() - wanted).square().mean()

    def _log_errors(self, stage: str, batch: PairedBatch, sampling: BridgeSampling) -> None:
        restored = self._restore_pairs(batch, sampling).mean
        given = batch.input.expand_as(restored) / self.input_ratio
        for name, result in (("", restored), ("_input", given)):
            ours, truth = result.flatten(0, 1)[:, None], batch.expected.flatten(0, 1)[:, None]
            shown = truth.flatten(1).any(1)  # relative to nothing, an error is infinite
            size = int(shown.sum())
            for what, metric in (("relative_l2", relative_l2), ("psnr", psnr)):
                value = metric(ours[shown], truth[shown]).sum() / max(size, 1)
                log_mean(self, {f"{stage}/{what}{name}": value}, size)

    def _targets(self, batch: PairedBatch) -> Tensor:
        return batch.noisy if self.target == "noisy" else batch.expected

    @torch.no_grad()
    def _latents(self, batch: PairedBatch) -> tuple[Tensor, Tensor]:
        """Latents of targets and sources, both ``(batch * targets, channels, rows, columns)``."""
        targets = self._targets(batch)
        target = self._encode(targets.flatten(0, 1)[:, None])
        return target, self._encode(batch.input / self.input_ratio).repeat_interleave(targets.shape[1], 0)

    @torch.no_grad()
    def _encode(self, sinogram: Tensor) -> Tensor:
        return self.autoencoder.encode_mean(self.autoencoder.scaling(unmasked_stack(sinogram))).float()


def start_from(denoiser: Denoiser, trained: Denoiser) -> None:
    """Give a bridge's denoiser the weights of a stage 2; what the latter lacks, and the last layer, start at zero.

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
    for name in ("label.weight", "unet.conv_out.weight", "unet.conv_out.bias"):
        weights[name] = torch.zeros_like(weights[name])
    denoiser.load_state_dict(weights)


def _load_stages(folder: Path) -> tuple[Autoencoder, ParallelBeam | None, Denoiser | None]:
    """Load the autoencoder, and the denoiser if there is one, from the folder of either stage."""
    if pretrained_class(folder) == "LatentDiffusion":
        stage2 = LatentDiffusion.from_pretrained(folder)
        return stage2.autoencoder, stage2.geometry, stage2.denoiser
    stage1 = AutoencoderSystem.from_pretrained(folder)
    return stage1.autoencoder, stage1.geometry, None
