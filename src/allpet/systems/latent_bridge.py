"""Downstream tasks: a diffusion bridge from the latent of the given scan to that of the wanted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from allpet.conditions import Condition
from allpet.diffusion.bridge import Bridge
from allpet.diffusion.bridge_samplers import sample_bridge_heun, sample_dbim
from allpet.diffusion.preconditioning import PairStatistics, Preconditioning
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.models.pixel_space import PixelSpace
from allpet.systems.base import OptimizerName
from allpet.systems.focus import AttentionUse, Focus
from allpet.systems.paired import Errors, PairedSampling, PairedSystem


@dataclass(frozen=True, kw_only=True)
class BridgeSampling(PairedSampling):
    """How to sample; see ``sample_dbim`` and ``sample_bridge_heun``.

    Args:
        nfe: denoiser calls per sample; 1 returns the mean of the targets, as a regression would.
        samples: see ``PairedSampling``, as the next five.
        batch_size: latents per denoiser call.
        attention_strength: of a model that attends.
        data_consistency: updates towards what was measured.
        neighbourhood_mm: of pixels that share them.
        turned: whether several samples are drawn in several orientations.
        sampler: "dbim", or "heun": DDBM's own, which makes 3 steps - 1 calls (119 for its 40 steps).
        eta: of "dbim": share of fresh noise per step.
        order: of "dbim": 1, 2 or 3.
        grid: of "dbim": "cosine", more times near both ends, or "uniform".
        churn: of "heun": share of each step that is stochastic.
    """

    sampler: Literal["dbim", "heun"] = "dbim"
    eta: float = 0.0
    order: Literal[1, 2, 3] = 1
    grid: Literal["cosine", "uniform"] = "cosine"
    churn: float = 0.33

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in ("dbim", "heun"):
            raise ValueError(f"sampler is {self.sampler!r}, but must be 'dbim' or 'heun'.")
        if self.grid not in ("cosine", "uniform"):
            raise ValueError(f"grid is {self.grid!r}, but must be 'cosine' or 'uniform'.")
        if self.sampler == "heun" and (self.nfe + 1) % 3:
            raise ValueError(f"nfe is {self.nfe}, but Heun's sampler makes 3 steps - 1 calls: 2, 5, ..., 119.")

    @property
    def certain(self) -> bool:
        """Whether every draw in one orientation gives the same: the first call returns the mean, then noise comes."""
        return self.nfe == 1


class LatentBridge(PairedSystem):
    """A bridge between latents of the given and the wanted sinogram (DDBM, arXiv 2309.16948; endpoint-aware form).

    With the moments of the latents, measured when training starts, an untrained network makes the bridge the best
    linear estimate per channel; what is learned goes beyond that. Three methods to compare with are of this class, too
    (``experiments/finetune/methods``): DDBM as published (VP bridge, form "published", covariance not measured, sampler
    "heun"), and regression, on latents or ``PixelSpace``: the bridge at its end alone (``end_share`` 1, nfe 1).

    Args:
        autoencoder: the trained stage-1 network, or a folder that holds it, of stage 1 or 2; or ``PixelSpace``.
        denoiser: the network to train, with as many condition as latent channels (twice as many with ``reproject``, and
            one more where attention is a channel) and ``label_size`` LABEL_SIZE.
        bridge: the bridge.
        form: what the network predicts, see ``allpet.diffusion.preconditioning``.
        measure_covariance: whether that of input and target is measured; else it is taken for 0, as DDBM's code does.
        initialise: whether to start from the denoiser in the folder of a stage 2. Its last layer, which spoke of noise,
            starts at zero.
        target: "noisy": what a scanner would give, as a user's pairs are; "expected": without noise (simulator).
        loss: "l2", or "l1", whose best prediction is a median.
        sinogram_weight: of the error of what the prediction decodes to, see ``PairedSystem``.
        decode_batch: sinograms that are decoded at once for that, see there.
        attention: what is made of transparent medical attention; None for nothing.
        reproject: iterations of OSEM after which the input's image is projected again, see ``PairedSystem``.
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

    def __init__(
        self,
        autoencoder: Autoencoder | PixelSpace | str,
        denoiser: Denoiser,
        bridge: Bridge = Bridge(),  # noqa: B008 - frozen
        form: Literal["endpoint", "published"] = "endpoint",
        measure_covariance: bool = True,
        initialise: bool = True,
        target: Literal["noisy", "expected"] = "noisy",
        loss: Literal["l2", "l1"] = "l2",
        sinogram_weight: float = 0.0,
        decode_batch: int | None = None,
        attention: AttentionUse | None = None,
        reproject: int = 0,
        learning_rate: float = 1e-4,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        others_factor: float = 1.0,
        sampling: BridgeSampling = BridgeSampling(),
        seed: int = 0,
    ) -> None:
        super().__init__(
            autoencoder,
            denoiser,
            initialise,
            False,
            target,
            loss,
            sinogram_weight,
            decode_batch,
            attention,
            reproject,
            learning_rate,
            warmup_steps,
            weight_decay,
            optimizer,
            others_factor,
            sampling,
            seed,
        )
        if form not in ("endpoint", "published"):
            raise ValueError(f"form is {form!r}, but must be 'endpoint' or 'published'.")
        self.bridge, self.form, self.measure_covariance = bridge, form, measure_covariance

    @property
    def preconditioning(self) -> Preconditioning:
        """Scalings by the measured moments."""
        return Preconditioning(self.bridge, PairStatistics(*self.moments), self.form)

    def forward(
        self, x: Tensor, source: Tensor, time: Tensor, condition: Condition, focus: Focus | None = None
    ) -> Tensor:
        """Predict the residual F of ``Preconditioning`` for latents ``(batch, channels, rows, columns)``.

        Without a focus the network is conditioned on the source.
        """
        focus = focus or Focus(source)
        inputs = self.preconditioning.inputs(x, focus.source, time)
        given = inputs.source if focus.further is None else torch.cat([inputs.source, focus.further], dim=1)
        label = condition.label().to(x)
        return self.denoiser(inputs.noisy, self.bridge.network_time(time), condition.prompt, given, label)

    def on_fit_start(self) -> None:
        """Measure the moments of the training pairs' latents."""
        super().on_fit_start()
        if not self.measure_covariance:
            self.moments[4] = 0

    def errors(
        self,
        target: Tensor,
        source: Tensor,
        focus: Focus,
        condition: Condition,
        generators: Sequence[torch.Generator],
    ) -> Errors:
        """Return the error of the residual, whose square is that of the target times the loss weight."""
        time = torch.cat([self.bridge.draw_times(1, generator) for generator in generators]).to(self.device)
        noise = torch.stack([torch.randn(target.shape[1:], generator=generator) for generator in generators])
        x = self.bridge.q_sample(target, source, time, noise.to(target))
        wanted = self.preconditioning.residual(x, source, time, target)
        output = self(x, source, time, condition, focus).float()
        return Errors(output - wanted, self.preconditioning.clean(x, source, time, output))

    def draw(
        self,
        source: Tensor,
        focus: Focus,
        condition: Condition,
        generators: Sequence[torch.Generator],
        sampling: BridgeSampling,
        progress: bool = False,
    ) -> Tensor:
        """Follow the bridge from its source.

        Raises:
            ValueError: if a regression, which knows the end of the bridge alone, is to take several steps.
        """
        if self.bridge.end_share == 1 and sampling.nfe > 1:
            raise ValueError(
                f"nfe is {sampling.nfe}, but this model is a regression, trained for one call: use "
                "--model.sampling.nfe=1."
            )

        def denoise(x: Tensor, time: Tensor) -> Tensor:
            return self.preconditioning.clean(x, source, time, self(x, source, time, condition, focus).float())

        if sampling.sampler == "heun":
            steps = (sampling.nfe + 1) // 3
            return sample_bridge_heun(
                denoise, source, generators, self.bridge, steps, sampling.churn, progress=progress
            )
        return sample_dbim(
            denoise,
            source,
            generators,
            self.bridge,
            sampling.nfe,
            sampling.eta,
            sampling.order,
            sampling.grid,
            progress=progress,
        )

    def quick_sampling(self) -> BridgeSampling:
        """Return one call, which gives the mean."""
        return BridgeSampling(nfe=1)

    def exported(self) -> dict[str, Any]:
        """Return bridge and form."""
        return {"bridge": asdict(self.bridge), "form": self.form}

    @classmethod
    def exported_arguments(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return bridge and form."""
        return {"bridge": Bridge(**config["bridge"]), "form": config.get("form", "endpoint")}

    @classmethod
    def from_pretrained(cls, folder: str | Path, sampling: BridgeSampling = BridgeSampling()) -> LatentBridge:
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does.

        A regression, which knows one call alone, takes one whatever the sampling says, as files for all models do.
        """
        system = cls._load(folder, sampling)
        if system.bridge.end_share == 1:
            system.sampling = replace(system.sampling, nfe=1)
        return system
