"""Stage 2: a diffusion model over the latents of a frozen stage-1 autoencoder, steered by tracer and region."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from tqdm.auto import tqdm

from allpet.augmentation import SymmetryAugmentation, SymmetryParameters
from allpet.batches import PromptBatch, SinogramBatch
from allpet.diffusion.guidance import drop_prompt, guide
from allpet.diffusion.linear_denoiser import LinearDenoiser
from allpet.diffusion.samplers import StepCallback, draw_samples
from allpet.diffusion.schedule import Diffusion
from allpet.geometry import ParallelBeam
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.pretrained import building, load_pretrained, save_pretrained
from allpet.prompts import Prompt, count_prompts, draw_open, unseen
from allpet.randomness import keyed_generator
from allpet.systems.autoencoder import AutoencoderSystem
from allpet.systems.base import OptimizerName, check_label, log_mean
from allpet.systems.knowledge import level, levels_of
from allpet.systems.latents import Aside, LatentSystem
from allpet.systems.sampling import Samples, Sampling, finish

_FITTED = 2000
"""Most training slices, evenly spread, that the linear denoiser is fitted to and levels are taken of."""


class _Aside(Aside):
    """The autoencoder, and what it made of the training slices.

    Attributes:
        latents: of the training slices, ``(slices, views, latent_channels, rows, columns)``; None before a fit.
        labels: of what was done to each view, ``(slices, views, label_size)``; None where nothing is.
        row: of each sample id in ``latents``.
        linear: what the network starts from; None before a fit, or without.
        prompts: how many training slices have each tracer and region (``count_prompts``); None before a fit.
        levels: how strong they are, by prompt (``knowledge.levels_of``); None before a fit.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__(autoencoder)
        self.latents: Tensor | None = None
        self.labels: Tensor | None = None
        self.row: dict[int, int] = {}
        self.linear: LinearDenoiser | None = None
        self.prompts: Tensor | None = None
        self.levels: dict[str, float] | None = None


class LatentDiffusion(LatentSystem):
    """Latent diffusion with prompts (Rombach et al., arXiv 2112.10752, on the stacks of arXiv 2509.09130).

    Where the data module draws symmetries or mixes slices, the denoiser must have the label of that
    (``allpet.SYMMETRY_LABEL_SIZE``, ``MIXUP_LABEL_SIZE``, or their sum). It is told of them in training, of none in
    validation and at sampling (augment-conditioning, Karras et al., arXiv 2206.00364, section 5), so that patients come
    out one by one and as they lie in the data.

    Args:
        autoencoder: the trained stage-1 network, or the folder it was exported to.
        denoiser: the network to train.
        diffusion: noise schedule and training target; ``Diffusion(prediction="flow")`` is flow matching.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        optimizer: "adamw" or "muon", see ``CosineSystem``.
        others_factor: see ``CosineSystem``.
        prompt_dropout: probability of leaving open the tracer, the region, and both, each, in training.
        latent_views: 0 encodes every batch anew, with new masks, symmetries and mixtures; n encodes n such views of
            each training slice once, when training starts, and saves the encoder's share of every step.
        linear_rank: the network predicts what the best linear denoiser leaves open, and sees its estimate; that one is
            fitted when training starts and keeps so many axes of the latents' covariance (``LinearDenoiser``). It needs
            a denoiser with as many condition as latent channels. 0: the network predicts everything.
        linear_turned: copies of each training slice, turned and mirrored at random, that the covariance is measured on,
            too.
        sampling: how ``sample`` and ``predict`` draw.
        seed: keys training noise, times and prompt dropout.
    """

    def __init__(
        self,
        autoencoder: Autoencoder | str,
        denoiser: Denoiser,
        diffusion: Diffusion = Diffusion(),  # noqa: B008 - frozen
        learning_rate: float = 1e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        others_factor: float = 1.0,
        prompt_dropout: float = 0.1,
        latent_views: int = 0,
        linear_rank: int = 0,
        linear_turned: int = 8,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, optimizer, others_factor)
        self.geometry = None
        if isinstance(autoencoder, (str, Path)):
            stage1 = AutoencoderSystem.from_pretrained(autoencoder)
            autoencoder, self.geometry = stage1.autoencoder, stage1.geometry
        if autoencoder.latent_channels != denoiser.latent_channels:
            raise ValueError(
                f"The autoencoder has {autoencoder.latent_channels} latent channels and the denoiser "
                f"{denoiser.latent_channels}: give the denoiser the autoencoder's number."
            )
        self._aside: _Aside = _Aside(autoencoder)
        if not 0 <= prompt_dropout <= 1 / 3:
            raise ValueError(f"prompt_dropout is {prompt_dropout}, but each of three cases can have at most 1/3.")
        if latent_views < 0:
            raise ValueError(f"latent_views is {latent_views}, but must be 0 (encode every batch) or more.")
        if linear_rank < 0 or (linear_rank and denoiser.condition_channels != denoiser.latent_channels):
            raise ValueError(
                f"linear_rank is {linear_rank} and the denoiser has {denoiser.condition_channels} condition channels: "
                f"give it {denoiser.latent_channels}, for the linear estimate, or set linear_rank to 0."
            )
        self.linear_rank, self.linear_turned = linear_rank, linear_turned
        self.denoiser, self.diffusion, self.sampling, self.latent_views = denoiser, diffusion, sampling, latent_views
        self.prompt_dropout, self.seed = prompt_dropout, seed

    def forward(self, noisy: Tensor, time: Tensor, prompt: Prompt, label: Tensor | None = None) -> Tensor:
        """Predict the training target of noisy latents; shapes as in ``Denoiser``."""
        linear = self.linear
        if linear is None:
            return self.denoiser(noisy, time, prompt, label=label)
        alpha, sigma = (values.to(noisy.device) for values in self.diffusion.coefficients(time))
        estimate = linear(noisy, alpha, sigma, prompt)
        rest = self.denoiser(noisy, time, prompt, estimate, label)
        size = linear.error(alpha, sigma) * self.diffusion.error_factor(time).to(noisy)
        return self.diffusion.from_clean(noisy, estimate, time) + size[:, None, None, None] * rest.float()

    @property
    def levels(self) -> dict[str, float] | None:
        """How strong the training slices are, by prompt (``knowledge.levels_of``); None where that is not known."""
        return self._aside.levels

    @property
    def prompt_counts(self) -> Tensor | None:
        """How many training slices each prompt had (``prompts.count_prompts``); None where that is not known."""
        return self._aside.prompts

    @property
    def linear(self) -> LinearDenoiser | None:
        """The fitted linear denoiser, on this module's device."""
        return None if self._aside.linear is None else self._aside.linear.to(self.device)

    def setup(self, stage: str) -> None:
        """Take the geometry from the data module, and see that the denoiser is told of what is done to the slices.

        Raises:
            ValueError: if the data module draws symmetries or mixes slices and the denoiser has no label for it, or
                stage 1 was trained on another geometry.
        """
        super().setup(stage)
        if stage == "fit":
            check_label(self, self.denoiser.config["label_size"])

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Count prompts, note levels and encode ``latent_views`` views of every training slice.

        All in a fixed order, resumed or not.
        The data module must have ``train_set``, ``augment(batch, epoch)`` and, for the linear denoiser, ``unmixed()``.
        A fit without one needs ``latent_views`` and ``linear_rank`` of 0, and counts no prompts.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None:
            slices = data.train_set
            self._aside.prompts = count_prompts(slices.prompt)
            chosen = torch.linspace(0, len(slices) - 1, min(len(slices), _FITTED)).round().long()
            strength = torch.cat([level(slices[piece.tolist()].sinogram[:, 0]) for piece in chosen.split(64)])
            self._aside.levels = levels_of(Prompt(*(index[chosen] for index in slices.prompt)), strength)
        if self.linear_rank:
            self._aside.linear = self._fit_linear(data)
        if not self.latent_views:
            return
        rows, size = list(range(len(data.train_set))), self.sampling.batch_size
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        latents, labels = [], []
        for view in tqdm(range(self.latent_views), desc="Encoding the training slices", leave=False):
            batches = [data.augment(move_data_to_device(data.train_set[piece], self.device), view) for piece in pieces]
            with self.trainer.precision_plugin.forward_context():
                latents.append(torch.cat([self.encode(batch).cpu() for batch in batches]))
            labels.append([batch.symmetry for batch in batches])
        self._aside.latents = torch.stack(latents, dim=1)
        if labels[0][0] is not None:
            self._aside.labels = torch.stack([torch.cat(view).cpu() for view in labels], dim=1)
        self._aside.row = {sample: row for row, sample in enumerate(data.train_set.sample_id.tolist())}

    @torch.no_grad()
    def on_validation_start(self) -> None:
        """Fit the linear denoiser where a checkpoint is validated outside a training: checkpoints do not hold it."""
        if self.linear_rank and self._aside.linear is None:
            self._aside.linear = self._fit_linear(self.trainer.datamodule)  # type: ignore[attr-defined]

    def _fit_linear(self, data: Any) -> LinearDenoiser:
        """Encode training slices as they are trained on, and turned and mirrored at random, in a fixed order.

        Unmixed: the mean and covariance sought are those of patients, which mixtures would shrink.
        """
        turn = SymmetryAugmentation(data.geometry)
        total, size = len(data.train_set), self.sampling.batch_size
        rows = list(range(0, total, -(-total // _FITTED)))
        latents, turned = [], []
        for start in tqdm(range(0, len(rows), size), desc="Fitting the linear denoiser", leave=False):
            batch = move_data_to_device(data.train_set[rows[start : start + size]], self.device)
            with self.trainer.precision_plugin.forward_context(), data.unmixed():
                latents.append(self.encode(data.augment(batch, 0)).cpu())
                for k in range(self.linear_turned):
                    drawn = [turn.draw(1, keyed_generator("linear", i, k)) for i in batch.sample_id.tolist()]
                    parameters = SymmetryParameters(*(torch.cat(values) for values in zip(*drawn, strict=True)))
                    moved = batch._replace(sinogram=turn.apply(batch.sinogram, parameters), noise_free=None)
                    turned.append(self.encode(data.augment(moved, 1 + k)).cpu())
        copies = torch.cat(turned) if turned else None
        prompt = Prompt(*(index[rows] for index in data.train_set.prompt))
        return LinearDenoiser.fit(torch.cat(latents), prompt, copies, self.linear_rank)

    def training_step(self, batch: SinogramBatch, batch_idx: int) -> Tensor:
        """Mean squared error of the prediction at keyed random times and noise."""
        generators = [
            keyed_generator(self.seed, self.current_epoch, sample, "diffusion") for sample in batch.sample_id.tolist()
        ]
        time = torch.cat([self.diffusion.draw_times(1, generator) for generator in generators])
        draws = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(self.device)
        prompt = drop_prompt(batch.prompt, self.prompt_dropout, draws)
        clean, label = self._training_latents(batch, generators)
        loss = self._loss(clean, label, time, generators, prompt)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: SinogramBatch, batch_idx: int) -> None:
        """Log the same error at times and noise that are fixed for each slice."""
        generators = [keyed_generator("validation", sample, "diffusion") for sample in batch.sample_id.tolist()]
        time = torch.cat([self.diffusion.draw_times(1, generator) for generator in generators])
        loss = self._loss(self.encode(batch), batch.symmetry, time, generators, batch.prompt)
        log_mean(self, {"val/loss": loss}, len(batch.sinogram), prog_bar=True)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> Samples:
        """Generate one sinogram for each prompt and seed."""
        return self.sample(batch.prompt, batch.seed.tolist())

    @torch.no_grad()
    def sample(
        self,
        prompt: Prompt,
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        progress: bool = False,
        callback: StepCallback | None = None,
    ) -> Samples:
        """Generate sinograms.

        Args:
            prompt: one prompt per seed; index 0 leaves a half open, see ``Sampling.fill_open``.
            seeds: one per sample; equal seeds and prompts give equal samples whatever the batch.
            sampling: how to; None takes the system's own.
            progress: whether to show a progress bar.
            callback: called with (step, steps, estimate of the full sinograms in data units, as decoded) after every
                step.

        Raises:
            ValueError: if prompts and seeds differ in number, or there are none.
            RuntimeError: if the training geometry is not known.
        """
        sampling = sampling or self.sampling
        if len(prompt.tracer) != len(seeds):
            raise ValueError(
                f"There are {len(prompt.tracer)} prompts and {len(seeds)} seeds: give one seed per prompt."
            )
        if len(seeds) == 0:
            raise ValueError("There are no prompts: give at least one, and a seed for each.")
        if self.geometry is None:
            raise RuntimeError("The training geometry is unknown: load the model with from_pretrained.")
        known = self._aside.prompts
        if known is not None and (strange := unseen(prompt, known)):
            there = sorted(set(Prompt(*known.nonzero().unbind(1)).names()))
            warnings.warn(
                f"No training slice shows {', '.join(strange)}, so samples of it mean nothing; there are "
                f"{', '.join(there)}.",
                stacklevel=2,
            )
        if sampling.fill_open and known is not None:
            prompt = draw_open(prompt, known, [keyed_generator(seed, "prompt") for seed in seeds])
        stacks = [
            self._sample_stack(
                Prompt(prompt.tracer[start:stop], prompt.region[start:stop]),
                seeds[start:stop],
                sampling,
                progress,
                callback,
            )
            for start in range(0, len(seeds), sampling.batch_size)
            for stop in [start + sampling.batch_size]
        ]
        stack = self.autoencoder.scaling.inverse(torch.cat(stacks))
        geometry = sampling.geometry(self.geometry)
        sinogram = finish(stack[:, 1:2], self.geometry, sampling, self.autoencoder.power_gain, seeds)
        return Samples(sinogram, stack, prompt, torch.tensor(list(seeds)), geometry)

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors (both stages) and README.md, the folder to share."""
        config = {
            "class": "LatentDiffusion",
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "autoencoder": self.autoencoder.config,
            "denoiser": self.denoiser.config,
            "diffusion": self.diffusion.to_dict(),
            "linear": None if self.linear is None else self.linear.config,
            "prompts": None if self._aside.prompts is None else self._aside.prompts.tolist(),
            "levels": self._aside.levels,
        }
        weights = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        weights |= {f"denoiser.{name}": value for name, value in self.denoiser.state_dict().items()}
        if self.linear is not None:
            weights |= {f"linear.{name}": value for name, value in self.linear.state_dict().items()}
        save_pretrained(folder, config, weights, card)

    @classmethod
    def from_pretrained(cls, folder: str | Path, sampling: Sampling = Sampling()) -> LatentDiffusion:  # noqa: B008
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does."""
        config, weights = load_pretrained(folder, "LatentDiffusion")
        with building(folder):
            parts: dict[str, dict[str, Tensor]] = {"autoencoder": {}, "denoiser": {}, "linear": {}}
            for name, value in weights.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = value
            autoencoder, denoiser = Autoencoder(**config["autoencoder"]), Denoiser(**config["denoiser"])
            autoencoder.load_state_dict(parts["autoencoder"])
            denoiser.load_state_dict(parts["denoiser"])
            system = cls(autoencoder, denoiser, Diffusion(**config["diffusion"]), sampling=sampling)
            system.geometry = ParallelBeam(**config["geometry"]) if config["geometry"] else None
            # folders of earlier versions speak neither of prompts nor of a linear denoiser
            if config.get("prompts"):
                system._aside.prompts = torch.tensor(config["prompts"])
            system._aside.levels = config.get("levels")
            if config.get("linear"):
                linear = LinearDenoiser(tuple(config["linear"]["shape"]), config["linear"]["rank"])
                linear.load_state_dict(parts["linear"])
                system._aside.linear, system.linear_rank = linear, config["linear"]["rank"]
        return system.eval()

    def _training_latents(
        self, batch: SinogramBatch, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None]:
        latents, labels, row = self._aside.latents, self._aside.labels, self._aside.row
        if latents is None:
            return self.encode(batch), batch.symmetry
        rows = torch.tensor([row[sample] for sample in batch.sample_id.tolist()])
        views = torch.cat([torch.randint(self.latent_views, (1,), generator=generator) for generator in generators])
        label = None if labels is None else labels[rows, views].to(self.device)
        return latents[rows, views].to(self.device), label

    def _loss(
        self,
        clean: Tensor,
        label: Tensor | None,
        time: Tensor,
        generators: list[torch.Generator],
        prompt: Prompt,
    ) -> Tensor:
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
        noise, time = noise.to(clean), time.to(clean.device)
        prediction = self(self.diffusion.add_noise(clean, noise, time), time, prompt, label)
        return (prediction.float() - self.diffusion.target(clean, noise, time)).square().mean()

    @torch.no_grad()
    def encode(self, batch: SinogramBatch) -> Tensor:
        """Standardised latents of a batch's stacks, ``(batch, latent_channels, rows, columns)``, float32."""
        return self.autoencoder.encode_mean(self.autoencoder.scaling(batch.as_stack())).float()

    def _sample_stack(
        self, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, progress: bool, callback: StepCallback | None
    ) -> Tensor:
        assert self.geometry is not None
        if self.linear_rank and self._aside.linear is None:
            raise RuntimeError("The linear denoiser is not fitted: load the model with from_pretrained, or train it.")
        shape = self.geometry.sinogram_shape
        prompt = Prompt(prompt.tracer.to(self.device), prompt.region.to(self.device))
        low, high = (share * self.diffusion.n_steps for share in sampling.guidance_interval)
        arguments: dict[str, Any] = {
            "denoise": guide(self, prompt, sampling.guidance, sampling.region_guidance, (low, high)),
            "shape": self.autoencoder.latent_shape(*shape),
            "generators": [keyed_generator(seed, "sample") for seed in seeds],
            "diffusion": self.diffusion,
            "steps": sampling.steps,
            "device": self.device,
            "progress": progress,
        }
        if callback is not None:
            arguments["callback"] = lambda step, steps, latent: callback(
                step, steps, self.autoencoder.scaling.inverse(self.autoencoder.decode(latent, shape).full)
            )
        latent = draw_samples(sampling.sampler, **arguments, eta=sampling.eta)
        return self.autoencoder.decode(latent, shape).stack
