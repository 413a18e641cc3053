"""What systems have in common that turn the latent of a given sinogram into that of a wanted one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from allpet.attention import Areas, TransparentMedicalAttention
from allpet.attenuation import NEIGHBOURHOOD_MM as UNCORRECTED_MM
from allpet.attenuation import explain_uncorrected, fit_uncorrected, warn_of_attenuation
from allpet.batches import unmasked_stack
from allpet.conditions import LABEL_SIZE, Condition, RestorationBatch
from allpet.consistency import NEIGHBOURHOOD_MM, carry_over, fit_measured, reproject
from allpet.diffusion.preconditioning import measure_pairs
from allpet.geometry import ParallelBeam
from allpet.metrics import psnr, relative_l2
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.models.pixel_space import PixelSpace
from allpet.orientations import Orientation, Orientations
from allpet.pretrained import building, load_pretrained, save_pretrained
from allpet.projector import Radon
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import MEASURING, RELATED, TASKS, PairedBatch
from allpet.systems.base import OptimizerName, log_mean
from allpet.systems.focus import AttentionUse, Focus
from allpet.systems.knowledge import Knowledge, Seen, warn_of_doubts
from allpet.systems.latents import Aside, LatentSystem
from allpet.systems.starting import load_stages, start_from

UNCORRECTED = TASKS.index("attenuation")
_MEASURED, _MEASURED_VALUES = 2000, 2**26  # most pairs, and values of their latents, whose moments are measured
_LEAST_DRAWN = 0.01  # of the size of a slice's targets (of squares for l2); what is drawn may be nothing at first
_SUITING = {"attenuation": 32, "conversion": 0}  # updates, where sixteen do not suit
_STATISTICS = ("moments", "given_moments", "input_ratio")  # measured when training starts
Self = TypeVar("Self", bound="PairedSystem")


class Restored(NamedTuple):
    """What came out, in the data set's units.

    Attributes:
        mean: over the samples, ``(batch, targets, views, bins)``.
        std: standard deviation over the samples, the same shape; zeros for one sample.
        samples: ``(samples, batch, targets, views, bins)``.
        areas: that the fit to the input attended to; None where nothing was fitted, or nothing attends.
        attenuation: that the fit found between input and result, mean over the samples, 1/mm, ``(batch, 1, rows,
            columns)``; None where nothing was fitted, or no input is without attenuation correction, and 0 of those
            that are corrected.
    """

    mean: Tensor
    std: Tensor
    samples: Tensor
    areas: Areas | None = None
    attenuation: Tensor | None = None

    @classmethod
    def of(cls, samples: Tensor, areas: Areas | None = None, attenuation: Tensor | None = None) -> Restored:
        """Mean and standard deviation of ``(samples, batch, targets, views, bins)``."""
        std = samples.std(0) if len(samples) > 1 else torch.zeros_like(samples[0])
        return cls(samples.mean(0), std, samples, areas, attenuation)


class Fitted(NamedTuple):
    """Samples after their fit to the input.

    Attributes:
        samples: ``(samples, batch, targets, views, bins)``.
        attenuation: see ``Restored``.
    """

    samples: Tensor
    attenuation: Tensor | None


def nothing_attends(strength: float) -> str:
    """Return why a strength of attention is refused."""
    return (
        f"attention_strength is {strength:g}, but nothing attends: give a region of interest (ROI=, BOX=), use a model "
        "that attends (experiments/finetune/methods/attention.yaml), or leave it out."
    )


class Errors(NamedTuple):
    """What a network makes of latents in training.

    Attributes:
        residual: prediction - truth of what the network is trained towards, ``(batch, channels, rows, columns)``.
        clean: the target latents that the prediction stands for, the same shape.
    """

    residual: Tensor
    clean: Tensor


@dataclass(frozen=True, kw_only=True)
class PairedSampling:
    """How to sample, whatever the system.

    Args:
        nfe: network calls per sample.
        samples: how many to draw for each input; their mean and standard deviation are returned.
        batch_size: latents per network call, and slices that are fitted at once.
        attention_strength: how strongly a model that attends, or the fit where a ROI is given, does so, see
            ``TransparentMedicalAttention``; None for 1. Where nothing attends, another number is refused.
        data_consistency: updates by which each result of a task whose input measures the sum of the targets
            (``MEASURING``: low dose, separation, attenuation correction) is brought nearer to it, see ``fit_measured``
            and, of attenuation, ``fit_uncorrected``, or, where it is another scan (``RELATED``: delayed, conversion),
            corrected as the model's own image of the input is, see ``carry_over``. 0 for none; None for as many as suit
            the task, see ``updates``. Of several samples each is fitted to a measurement with as much noise again, so
            that their spread still says how well the counts are known; with K samples the noise of their mean has 1 / K
            more variance. Where a model attends, or a ROI is given, updates count more by ``attention_strength``: in
            the ROI, or in the hot and cold areas of what the network has drawn.
        neighbourhood_mm: full width at half maximum of the neighbours that look alike among which updates share what
            the counts say: less bias for as much noise; 0 for every pixel alone; None for 24 mm, and for every pixel
            alone without attenuation correction, where there are the counts of whole scans.
        turned: whether several samples are drawn in several orientations, those that the model was trained on
            (``allpet.orientations``): a better mean, and a spread that says more of its errors, for as many calls; the
            input is encoded for each sample anew. The first is drawn as the input lies.
    """

    nfe: int = 5
    samples: int = 1
    batch_size: int = 64
    attention_strength: float | None = None
    data_consistency: int | None = 0
    neighbourhood_mm: float | None = None
    turned: bool = True

    def __post_init__(self) -> None:
        for name in ("nfe", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"attention_strength is {self.attention_strength}, but must be finite and not negative.")
        if self.data_consistency is not None and self.data_consistency < 0:
            raise ValueError(
                f"data_consistency is {self.data_consistency}, but must be a number of updates, 0 for none or null for "
                "as many as suit the task."
            )
        if self.neighbourhood_mm is not None and not 0 <= self.neighbourhood_mm < float("inf"):
            raise ValueError(f"neighbourhood_mm is {self.neighbourhood_mm}, but must be finite and not negative.")

    @property
    def strength(self) -> float:
        """Of attention."""
        return 1.0 if self.attention_strength is None else self.attention_strength

    @property
    def certain(self) -> bool:
        """Whether every draw in one orientation gives the same."""
        return False

    def width(self, uncorrected: bool) -> float:
        """Return the neighbourhood in mm, of scans without attenuation correction or of others."""
        if self.neighbourhood_mm is not None:
            return self.neighbourhood_mm
        return UNCORRECTED_MM if uncorrected else NEIGHBOURHOOD_MM

    def updates(self, task: str) -> int:
        """Return how many updates the results of a task get that can be fitted: those asked for, or what suits it.

        Chosen on validation patients (``experiments/choose_updates.py``): sixteen; thirty-two without attenuation
        correction, for whole scans have more counts; none for another tracer, which gains too little by them for the
        bright spots they leave where the input shows next to nothing.
        """
        return _SUITING.get(task, 16) if self.data_consistency is None else self.data_consistency

    def fitted(self, task: Tensor, n_targets: int) -> list[int]:
        """Return which of the tasks ``(batch,)`` of so many targets have results that are fitted to their input."""
        each = (MEASURING | RELATED).items()
        whole = [TASKS.index(name) for name, targets in each if targets == n_targets and self.updates(name)]
        return [row for row, number in enumerate(task.tolist()) if number in whole]

    def fit(
        self,
        samples: Tensor,
        measured: Tensor,
        task: Tensor,
        geometry: ParallelBeam | None,
        seeds: Sequence[int],
        attention: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Fitted:
        """Return samples after the ``updates`` of their task, where the measurement says something of the targets.

        The noise that is added for several samples is what the measurement differs from the sample by, with random
        signs (wild bootstrap, Wu 1986, Liu 1988): it needs no model of the variance, which attenuation and corrections
        make uneven, but takes errors of the sample for noise, too.

        Args:
            samples: ``(samples, batch, targets, views, bins)``.
            measured: at the same scale, ``(batch, 1, views, bins)``; in the same unit, where not corrected.
            task: of each, ``(batch,)``.
            geometry: of the sinograms.
            seeds: one per measurement; the signs depend on it and the number of the sample alone.
            attention: of each pixel, ``(batch, 1, rows, columns)``, see ``fit_measured``; None for 1.
            reference: what the model makes of what was measured itself, in its shape, see ``carry_over``; None where no
                task is ``RELATED``.

        Raises:
            RuntimeError: if the geometry is needed and None.
            ValueError: if the reference is.
        """
        if not (chosen := self.fitted(task, samples.shape[2])):
            return Fitted(samples, None)
        if geometry is None:
            raise RuntimeError("The geometry is unknown, without which no data are fitted: train on data first.")
        radon, samples = Radon(geometry), samples.clone()
        attenuation = torch.zeros(len(measured), 1, *geometry.image_shape, device=samples.device)
        body = torch.zeros_like(attenuation, dtype=torch.bool)
        kinds: dict[int, list[int]] = {}  # rows by task: what is done differs
        for row in chosen:
            kinds.setdefault(int(task[row]), []).append(row)
        pieces = [(kind, rows) for kind, part in kinds.items() for rows in _split(part, self.batch_size)]
        with torch.autocast(samples.device.type, enabled=False):
            for draw, results in enumerate(samples):
                for kind, rows in pieces:
                    ours, given = results[rows].float(), measured[rows].float()
                    expected, start, own = ours.sum(1, keepdim=True), None, None
                    if kind == UNCORRECTED:
                        start = explain_uncorrected(ours, given, radon)
                        expected = start.factor * expected + start.scatter
                    elif TASKS[kind] in RELATED:
                        if reference is None:
                            raise ValueError(
                                f"reference is None, but {TASKS[kind]} needs what the model makes of inputs."
                            )
                        expected = own = reference[rows].float()
                    if len(samples) > 1:
                        generators = [keyed_generator(seeds[row], draw, "measured") for row in rows]
                        coins = [torch.randint(2, given.shape[1:], generator=generator) for generator in generators]
                        given = given + (given - expected) * (2 * torch.stack(coins).to(given) - 1)
                    where = None if attention is None else attention[rows]
                    how = (self.updates(TASKS[kind]), where, self.width(kind == UNCORRECTED))
                    if start is not None:
                        fitted, found = fit_uncorrected(ours, given, radon, *how, start)
                        attenuation[rows] += found.attenuation / len(samples)
                        body[rows] |= found.body
                    elif own is not None:
                        fitted = carry_over(ours, own, given, radon, *how)
                    else:
                        fitted = fit_measured(ours, given, radon, *how)
                    results[rows] = fitted.to(results)
        if UNCORRECTED not in kinds:
            return Fitted(samples, None)
        warn_of_attenuation(attenuation[body])
        return Fitted(samples, attenuation)


class PairedSystem(LatentSystem):
    """Learn to turn given sinograms into wanted ones, in the latents of a frozen stage 1 or as they are.

    The stage-1 encoder sees either sinogram as a stack with an empty mask, all negative. Inputs whose scale is not that
    of the targets, as without attenuation correction, are brought to it by one number for each task. These numbers and
    the moments of the latents, one set for all tasks, are measured when training starts. ``knowledge`` is what the
    training pairs were, None where that is not known, as of exports of before it was noted; ``orientations`` is how
    they were turned and mirrored.

    With ``reproject`` the source is not the given sinogram but the projection of its image after so many iterations of
    OSEM. What no image could have caused, most of the noise of a low dose among it, is then gone, before anything is
    learned; what else the given sinogram says, as of attenuation, the network finds in its latent, a further condition.

    Args:
        autoencoder: the trained stage-1 network, or a folder that holds it, of stage 1 or 2; or ``PixelSpace``.
        denoiser: the network to train, with as many condition as latent channels (twice as many with ``reproject``, and
            one more where attention is a channel) and ``label_size`` LABEL_SIZE.
        initialise: whether to start from the denoiser in the folder of a stage 2.
        keep_output: whether its last layer is kept, too; else, and where stage 2 started from a linear denoiser and so
            predicts what that leaves open, it starts at zero.
        target: "noisy" or "expected".
        loss: "l2" or "l1".
        sinogram_weight: of the error of the decoded prediction in the loss, relative to the size of what is
            drawn; what of the latents matters, and how much, the decoder then says. 0: the error of the latents alone.
        decode_batch: sinograms that are decoded at once for that, each anew in the backward pass, which takes less
            memory and more time; None for all of the batch, which are kept.
        attention: what is made of attention; None for nothing.
        reproject: iterations of OSEM, of 8 subsets; 0 for the given sinogram as it is.
        learning_rate: peak of the cosine schedule.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay.
        optimizer: see ``CosineSystem``.
        others_factor: see ``CosineSystem``.
        sampling: how ``restore``, ``test`` and ``predict`` draw.
        seed: keys training times and noise.

    Raises:
        ValueError: if networks or folder do not fit.
    """

    moments: Tensor
    given_moments: Tensor
    input_ratio: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder | PixelSpace | str,
        denoiser: Denoiser,
        initialise: bool,
        keep_output: bool,
        target: Literal["noisy", "expected"],
        loss: Literal["l2", "l1"],
        sinogram_weight: float,
        decode_batch: int | None,
        attention: AttentionUse | None,
        reproject: int,
        learning_rate: float,
        warmup_steps: int,
        weight_decay: float,
        optimizer: OptimizerName,
        others_factor: float,
        sampling: PairedSampling,
        seed: int,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, weight_decay, optimizer, others_factor)
        for name, given, known in (("target", target, ("noisy", "expected")), ("loss", loss, ("l2", "l1"))):
            if given not in known:
                raise ValueError(f"{name} is {given!r}, but must be {known[0]!r} or {known[1]!r}.")
        if not 0 <= sinogram_weight < float("inf"):
            raise ValueError(f"sinogram_weight is {sinogram_weight}, but must be finite and not negative.")
        if decode_batch is not None and decode_batch < 1:
            raise ValueError(f"decode_batch is {decode_batch}, but must be at least 1, or null for the whole batch.")
        if reproject < 0:
            raise ValueError(f"reproject is {reproject}, but must be a number of iterations, or 0 for none.")
        self.geometry = None
        trained: Denoiser | None = None
        whole = False
        if isinstance(autoencoder, (str, Path)):
            autoencoder, self.geometry, trained, whole = load_stages(Path(autoencoder))
        channels = autoencoder.latent_channels
        attends = attention is not None and "channel" in attention.uses
        wanted = channels * (2 if reproject else 1) + attends
        found = (denoiser.latent_channels, denoiser.condition_channels, denoiser.config["label_size"])
        if found != (channels, wanted, LABEL_SIZE):
            ways = [" reproject" * bool(reproject), " attention as a channel" * attends]
            raise ValueError(
                f"The denoiser has {found[0]} latent and {found[1]} condition channels and label_size {found[2]}; "
                f"a {type(self).__name__} over this autoencoder{' with' * any(ways)}{' and'.join(filter(None, ways))} "
                f"needs {channels}, {wanted} and {LABEL_SIZE}."
            )
        if initialise and trained is not None:
            start_from(denoiser, trained, keep_output and whole)
        self._aside = Aside(autoencoder)
        self.denoiser, self.target, self.loss, self.seed = denoiser, target, loss, seed
        self.sampling, self.attention_use, self.reproject = sampling, attention, reproject
        self.sinogram_weight, self.decode_batch = sinogram_weight, decode_batch
        self._attention: TransparentMedicalAttention | None = None
        self.knowledge: Knowledge | None = None
        self.orientations = Orientations()
        unit = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        self.register_buffer("moments", unit[:, None].repeat(1, channels))
        self.register_buffer("given_moments", unit[[0, 2], None].repeat(1, channels))
        self.register_buffer("input_ratio", torch.ones(len(TASKS)))

    @property
    def attention(self) -> TransparentMedicalAttention | None:
        """The attention on the training geometry; None for a system that does not attend.

        Raises:
            RuntimeError: if the geometry is not known yet.
        """
        if self.attention_use is None:
            return None
        if self.geometry is None:
            raise RuntimeError(
                "The geometry is unknown, without which nothing can be attended to: train on data first."
            )
        if self._attention is None or self._attention.radon.geometry != self.geometry:
            self._attention = self.attention_use.areas(Radon(self.geometry))
        return self._attention

    def attention_to(self, roi: Tensor | None) -> TransparentMedicalAttention | None:
        """Return the system's attention, or where it has none and a ROI is given, one that the fit can heed it by."""
        if self.attention is None and roi is not None and self.geometry is not None:
            return TransparentMedicalAttention(Radon(self.geometry))
        return self.attention

    def input_scale(self, task: Tensor) -> Tensor:
        """Return the scale of the inputs of tasks ``(batch,)`` over that of their targets, ``(batch, 1, 1, 1)``."""
        return self.input_ratio[task.to(self.input_ratio.device)][:, None, None, None]

    @abstractmethod
    def errors(
        self,
        target: Tensor,
        source: Tensor,
        focus: Focus,
        condition: Condition,
        generators: Sequence[torch.Generator],
    ) -> Errors:
        """Return the errors of the network's prediction at times and noise of the generators.

        Args:
            target: latents, ``(batch, channels, rows, columns)``.
            source: latents of the inputs.
            focus: what the network is conditioned on.
            condition: one entry per latent.
            generators: one per latent.
        """

    @abstractmethod
    def draw(
        self,
        source: Tensor,
        focus: Focus,
        condition: Condition,
        generators: Sequence[torch.Generator],
        sampling: Any,
        progress: bool = False,
    ) -> Tensor:
        """Draw target latents for source latents; arguments as of ``errors``, sampling the system's own."""

    @abstractmethod
    def quick_sampling(self) -> PairedSampling:
        """Return how validation draws: by few calls."""

    def setup(self, stage: str) -> None:
        """Take the geometry from the data module.

        Raises:
            ValueError: if its slices are no pairs, or stage 1 was trained on another geometry.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and stage != "predict" and not isinstance(data.train_set[[0]], PairedBatch):
            raise ValueError(
                f"{type(data).__name__} gives no pairs to learn from: use --data data_modules.PairedTask, or "
                "data_modules.PairedFiles for your own."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how training pairs are turned, which changes what several samples are."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["orientations"] = asdict(self.orientations)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept checkpoints of before inputs were reprojected, with averaged weights or without."""
        self.orientations = Orientations(**checkpoint.get("orientations", {}))
        for weights in ("state_dict", "current_model_state"):
            if weights in checkpoint:
                checkpoint[weights].setdefault("given_moments", self.given_moments)
        super().on_load_checkpoint(checkpoint)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Measure the moments of the training pairs' latents, the same each time, so that a resumed run has the same.

        What the pairs are, and how they will be turned, is noted, too.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.orientations = Orientations.seen(getattr(data, "symmetry", None))
        pairs, size = data.train_set, self.sampling.batch_size
        if isinstance(self.autoencoder, PixelSpace):
            self.autoencoder.scaling.set_scale(data.scale)
        views, bins = pairs[[0]].input.shape[-2:]
        channels, rows, columns = self.autoencoder.latent_shape(views, bins)
        count = min(len(pairs), _MEASURED, max(_MEASURED_VALUES // (channels * rows * columns), 1))
        # from all over: pairs of one patient, or generated ones, stand together, and tasks take turns
        some = torch.randperm(len(pairs), generator=keyed_generator("measured"))[:count].sort().values.tolist()
        pieces = [some[start : start + size] for start in range(0, count, size)]
        sums = torch.zeros(2, len(TASKS), dtype=torch.float64)
        seen = []
        for piece in pieces:
            batch = pairs[piece]
            seen.append(Seen.of(batch))
            wanted = self._targets(batch)  # of two tracers the input is the sum
            totals = [values.double().sum((1, 2, 3)).cpu() for values in (batch.input, wanted)]
            sums.index_add_(1, batch.task.cpu(), torch.stack(totals))
        self.knowledge = Knowledge.of(seen)
        # A task that is not trained on has the others' scale.
        self.input_ratio.copy_(torch.where(sums[1] != 0, sums[0] / sums[1], sums[0].sum() / sums[1].sum()))
        latents = []
        for piece in tqdm(pieces, desc="Measuring the pairs' latents", leave=False):
            batch = move_data_to_device(pairs[piece], self.device)
            with self.trainer.precision_plugin.forward_context():
                target, source = self._latents(batch)
                given = self._encode(self._scaled(batch)) if self.reproject else source[:: batch.expected.shape[1]]
                latents.append([values.cpu() for values in (target, source, given)])
        target, source, given = (torch.cat(parts) for parts in zip(*latents, strict=True))
        self.moments.copy_(torch.stack(list(measure_pairs(target, source))))
        self.given_moments.copy_(torch.stack([given.double().mean((0, 2, 3)), given.double().var((0, 2, 3))]))

    def training_step(self, batch: PairedBatch, batch_idx: int) -> Tensor:
        """Mean error of what the network is trained towards, and of its sinograms, at keyed times and noise."""
        loss = self._loss(batch, (self.seed, self.current_epoch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.input))
        return loss

    def validation_step(self, batch: PairedBatch, batch_idx: int) -> None:
        """Log the same error at fixed times, and the error of a quick result against the expected target.

        Models are compared by ``val/relative_l2`` and ``val/psnr``: the loss is relative to what is drawn, which those
        that draw too much have more of.
        """
        size = len(batch.input)
        log_mean(self, {"val/loss": self._loss(batch, ("validation",))}, size, prog_bar=True)
        self._log_errors("val", batch, self.quick_sampling())

    def test_step(self, batch: PairedBatch, batch_idx: int) -> None:
        """Log the errors of the result, and of the input at the targets' scale, against the expected target."""
        self._log_errors("test", batch, self.sampling)

    def predict_step(self, batch: PairedBatch | RestorationBatch, batch_idx: int) -> Restored:
        """Restore a batch; sample i of a slice depends on its identity, i, and whether there are several alone."""
        if isinstance(batch, RestorationBatch):
            seeds = batch.seed.tolist()
            self.check(batch.condition, None, batch.n_targets)  # the data have told what is doubtful
            return self._restored(batch.input, batch.condition, seeds, self.sampling, batch.n_targets, roi=batch.roi)
        return self._restore_pairs(batch, self.sampling)

    @torch.no_grad()
    def restore(
        self,
        given: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        sampling: Any = None,
        n_targets: int = 1,
        progress: bool = False,
        roi: Tensor | None = None,
        attention_strength: float | None = None,
    ) -> Restored:
        """Turn given sinograms into wanted ones; warn of prompts, doses and delays that training never showed.

        Args:
            given: ``(batch, 1, views, bins)`` in the data set's units.
            condition: one entry per target: ``batch * n_targets``, those of an input one after another.
            seeds: one per input; equal seeds and inputs give equal results whatever the batch.
            sampling: how to; None takes the system's own.
            n_targets: 2 for *separation*: the results then add up to the autoencoder's reconstruction of the source,
                or, with ``data_consistency``, nearly to the given sinogram.
            progress: whether to show a progress bar.
            roi: where a clinician wants the model to look, ``(batch or 1, 1, rows, columns)``, bool. A model that
                attends does so there, and where results are fitted to the input, the fit of every model does.
            attention_strength: how strongly; None for the sampling's.

        Raises:
            ValueError: if the shapes do not fit, a ROI is given to a model that cannot heed it, or a strength where
                nothing attends, or ``check`` refuses.
        """
        sampling = sampling or self.sampling
        if attention_strength is not None:
            sampling = replace(sampling, attention_strength=attention_strength)
        self.check(condition, sampling, n_targets)
        warn_of_doubts(self.knowledge, condition)
        return self._restored(given, condition, seeds, sampling, n_targets, progress, roi)

    def check(self, condition: Condition, sampling: PairedSampling | None = None, n_targets: int = 1) -> None:
        """Refuse what the model was not trained for, and samples that would all be the same.

        Args:
            condition: one entry per target.
            sampling: how to; None takes the system's own.
            n_targets: of each input.

        Raises:
            ValueError: in one sentence.
        """
        sampling = sampling or self.sampling
        if self.knowledge is not None:
            self.knowledge.check(condition)
        task = condition.task[::n_targets]
        known = self.ways(sampling)
        if sampling.certain and sampling.samples > known and len(sampling.fitted(task, n_targets)) < len(task):
            what = f"has {known} results, one for each orientation" if known > 1 else "gives the same each time"
            other = "" if sampling.turned else ", or --model.sampling.turned=true where pairs were turned in training"
            raise ValueError(
                f"samples is {sampling.samples}, but one call (nfe=1) {what}: use --model.sampling.samples={known}"
                f"{other}; bridges give samples that differ with --model.sampling.nfe=2 and more."
            )

    def ways(self, sampling: PairedSampling) -> int:
        """Return in how many orientations samples can be drawn; 1 where they are drawn as the input lies."""
        return self.orientations.count(self.geometry.n_views) if sampling.turned and self.geometry is not None else 1

    @torch.no_grad()
    def _restored(
        self,
        given: Tensor,
        condition: Condition,
        seeds: Sequence[int],
        sampling: PairedSampling,
        n_targets: int,
        progress: bool = False,
        roi: Tensor | None = None,
    ) -> Restored:
        shape = (given.shape[-2], given.shape[-1])
        self._check(given, shape, condition, seeds, sampling, n_targets, roi)
        condition = move_data_to_device(condition, self.device)
        ratio = self.input_scale(condition.task[::n_targets])
        scaled = given.to(self.device) / ratio
        start, attended = self.starting(scaled), self.attend(scaled, roi, sampling.strength)
        results: list[Tensor] = []
        encoded: Orientation | None = None
        for draw in range(sampling.samples):
            lies = self.orientations.of(draw if sampling.turned else 0, shape[0])
            if lies != encoded:
                encoded, laid = lies, lies.lay(start)
                source = self._encode(laid)
                shown = None if attended is None else lies.lay(attended)
                focus = self.focus(lies.lay(scaled), source, shown, laid).repeat(n_targets)
                source = source.repeat_interleave(n_targets, 0)
            keys = [(seed, draw, k) for seed in seeds for k in range(n_targets)]
            pieces = []
            for first in range(0, len(source), sampling.batch_size):
                rows = slice(first, first + sampling.batch_size)
                generators = [keyed_generator(*key, "restore") for key in keys[rows]]
                part = source[rows], focus.part(rows), condition.part(rows)
                pieces.append(self.draw(*part, generators, sampling, progress))
            full = self._decode(torch.cat(pieces), shape).unflatten(0, (len(given), n_targets)).squeeze(2)
            if n_targets > 1:
                mix = self._decode(source[::n_targets], shape) * ratio
                full = full * (mix / full.sum(1, keepdim=True).clamp_min(1e-12))
            results.append(lies.lay_back(full))
        # Two targets add up to the input as given, and attenuation is what makes its scale another: both are their own.
        tasks = condition.task[::n_targets]
        own = (tasks == UNCORRECTED) | (n_targets > 1)
        measured = torch.where(own[:, None, None, None].to(scaled.device), given.to(scaled), scaled)
        areas, emphasis = None, None
        drawn = torch.stack(results)
        chosen = sampling.fitted(tasks, n_targets)
        if chosen and (attention := self.attention_to(roi)):
            # In what the network has drawn, noise makes far fewer areas than in the input.
            areas = attention.areas(drawn.mean(0).sum(1, keepdim=True), roi)
            emphasis = attention.emphasise(areas, sampling.strength)
        related = any(TASKS[int(tasks[row])] in RELATED for row in chosen)
        reference = self._decode(self._encode(start), shape) if related else None
        fitted = sampling.fit(drawn, measured, tasks, self.geometry, seeds, emphasis, reference)
        return Restored.of(fitted.samples, areas, fitted.attenuation)

    def starting(self, given: Tensor) -> Tensor:
        """Return the source of given sinograms at the targets' scale, ``(batch, 1, views, bins)``.

        Raises:
            RuntimeError: if they are to be reprojected and the geometry is not known yet.
        """
        if not self.reproject:
            return given
        if self.geometry is None:
            raise RuntimeError("The geometry is unknown, without which nothing is reprojected: train on data first.")
        with torch.autocast(given.device.type, enabled=False):
            return reproject(given.float(), Radon(self.geometry), self.reproject)

    def attend(self, given: Tensor, roi: Tensor | None, strength: Tensor | float) -> Tensor | None:
        """Return the attention to given sinograms, see ``TransparentMedicalAttention``; None for none."""
        return None if self.attention is None else self.attention(given, roi, strength)

    def focus(self, given: Tensor, source: Tensor, attended: Tensor | None, start: Tensor | None = None) -> Focus:
        """Return what the network is conditioned on.

        Args:
            given: inputs at the targets' scale, ``(batch, 1, views, bins)``.
            source: their latents.
            attended: the attention to them, see ``attend``.
            start: what ``starting`` makes of them; None to find it where it is needed.
        """
        further = []
        if self.reproject:
            mean, variance = self.given_moments.float()[:, :, None, None]
            further.append((self._encode(given) - mean) / variance.sqrt())
        weight, weight_of_bins = None, None
        if self.attention_use is not None and attended is not None:
            uses = self.attention_use.uses
            if "gain" in uses:
                source = self._encode((self.starting(given) if start is None else start) * attended)
            pooled = self.autoencoder.pool(attended - 1)
            if "channel" in uses:
                further.append(pooled)
            if "loss" in uses:
                weight = (1 + pooled) / (1 + pooled).mean((1, 2, 3), keepdim=True)
                weight_of_bins = attended / attended.mean((1, 2, 3), keepdim=True)
        return Focus(source, torch.cat(further, dim=1) if further else None, weight, weight_of_bins)

    def exported(self) -> dict[str, Any]:
        """Return what ``config.json`` says beyond networks and attention, JSON-able."""
        return {}

    @classmethod
    def exported_arguments(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Return the constructor's arguments that ``exported`` has written."""
        return {}

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors (autoencoder, denoiser, moments) and README.md, the folder to share."""
        use = self.attention_use
        attention = None if use is None or self.attention is None else self.attention.config
        config = {
            "class": type(self).__name__,
            "geometry": None if self.geometry is None else self.geometry.to_dict(),
            "space": "pixels" if isinstance(self.autoencoder, PixelSpace) else "latents",
            "autoencoder": self.autoencoder.config,
            "denoiser": self.denoiser.config,
            "attention": use and {"uses": use.uses, "strengths": use.strengths, "areas": attention},
            "reproject": self.reproject,
            "trained": self.knowledge and self.knowledge.to_dict(),
            "orientations": asdict(self.orientations),
            **self.exported(),
        }
        weights = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        weights |= {f"denoiser.{name}": value for name, value in self.denoiser.state_dict().items()}
        measured = {name: getattr(self, name).clone() for name in _STATISTICS}
        save_pretrained(folder, config, {**weights, **measured}, card)

    @classmethod
    def _load(cls: type[Self], folder: str | Path, sampling: PairedSampling) -> Self:
        config, weights = load_pretrained(folder, cls.__name__)
        with building(folder):
            in_pixels = config.get("space") == "pixels"
            autoencoder = PixelSpace() if in_pixels else Autoencoder(**config["autoencoder"])
            denoiser, attention = Denoiser(**config["denoiser"]), config.get("attention")
            for name, network in (("autoencoder.", autoencoder), ("denoiser.", denoiser)):
                network.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})
            if attention:
                areas = partial(TransparentMedicalAttention, **attention["areas"])
                attention = AttentionUse(tuple(attention["uses"]), tuple(attention["strengths"]), areas)
            arguments = {"attention": attention, "sampling": sampling, **cls.exported_arguments(config)}
            arguments["reproject"] = config.get("reproject", 0)  # exports of before have none
            system: Self = cls(autoencoder, denoiser, **arguments)
            if not system.reproject:
                weights.setdefault("given_moments", system.given_moments)
            for name in _STATISTICS:
                getattr(system, name).copy_(weights[name])
            system.geometry = ParallelBeam(**config["geometry"]) if config["geometry"] else None
            if config.get("trained"):
                system.knowledge = Knowledge.from_dict(config["trained"])
            system.orientations = Orientations(**config.get("orientations", {}))  # exports of before have none
        return system.eval()

    def _check(
        self,
        given: Tensor,
        shape: tuple[int, int],
        condition: Condition,
        seeds: Sequence[int],
        sampling: PairedSampling,
        n_targets: int,
        roi: Tensor | None,
    ) -> None:
        if self.geometry is not None and shape != self.geometry.sinogram_shape:
            wanted = " x ".join(map(str, self.geometry.sinogram_shape))
            raise ValueError(f"The sinograms are {shape[0]} x {shape[1]}; the model was trained on {wanted}.")
        if len(condition.task) != len(given) * n_targets or len(seeds) != len(given):
            raise ValueError(
                f"There are {len(given)} sinograms of {n_targets} target(s), {len(condition.task)} conditions and "
                f"{len(seeds)} seeds: give one condition per target and one seed per sinogram."
            )
        attends = self.attention_use is not None and set(self.attention_use.uses) != {"loss"}
        fits = len(sampling.fitted(condition.task[::n_targets], n_targets)) == len(given)
        if roi is not None and not attends and not fits:
            raise ValueError(
                "This model cannot heed a region of interest: leave it out, fit results to the input (UPDATES=, "
                "data_consistency), or train a model that attends by gain or channel "
                "(experiments/finetune/methods/attention.yaml)."
            )
        looks = roi is not None or attends or (self.attention_use is not None and fits)
        if sampling.attention_strength not in (None, 1.0) and not looks:  # 1 is what files of before say unasked
            raise ValueError(nothing_attends(sampling.strength))

    def _restore_pairs(self, batch: PairedBatch, sampling: PairedSampling) -> Restored:
        n_targets = batch.expected.shape[1]
        # pairs of all splits, whatever of them was trained on
        return self._restored(batch.input, Condition.of_pairs(batch), batch.sample_id.tolist(), sampling, n_targets)

    def _loss(self, batch: PairedBatch, run: tuple[Any, ...]) -> Tensor:
        n_targets, ids = batch.expected.shape[1], batch.sample_id.tolist()
        target, source = self._latents(batch)
        generators = [keyed_generator(*run, i, k, "bridge") for i in ids for k in range(n_targets)]
        given = self._scaled(batch)
        attended = self.attend(given, None, self._strengths(run, ids))
        focus = self.focus(given, source[::n_targets], attended).repeat(n_targets)
        errors = self.errors(target, source, focus, Condition.of_pairs(batch), generators)
        error = self._size(errors.residual)
        loss = (error if focus.weight is None else focus.weight * error).mean()
        if not self.sinogram_weight:
            return loss
        return loss + self.sinogram_weight * self._sinogram_error(errors.clean, batch, focus.weight_of_bins)

    def _sinogram_error(self, clean: Tensor, batch: PairedBatch, weight: Tensor | None) -> Tensor:
        """Mean over slices of the decoded latents' error, relative to what is drawn of the slice, all targets together.

        Relative to the targets, weak ones would count for more among those that one input may have, and what is drawn
        would lie below their mean, the more the less is known of their strength. What is drawn has no gradient as a
        reference, so that this part of the loss stands still at the mean (l2; l1: at the median), as a quasi-likelihood
        does whose standard deviation grows with the mean (Wedderburn 1974). Slices of empty targets do not count.
        """
        targets = self._targets(batch)
        full = self._decode_for_gradients(clean, (targets.shape[-2], targets.shape[-1]))
        wanted = self.autoencoder.scaling(targets)
        drawn = full.view_as(wanted)
        error = self._size(drawn - wanted)
        if weight is not None:
            error = weight.view_as(wanted) * error
        size = self._size(wanted).sum((1, 2, 3))
        shown = size > 0
        reference = self._size(drawn.detach()).sum((1, 2, 3)).maximum(_LEAST_DRAWN * size)
        relative = error.sum((1, 2, 3)) / torch.where(shown, reference, 1)
        return (shown * relative).sum() / shown.sum().clamp_min(1)

    def _decode_for_gradients(self, latent: Tensor, shape: tuple[int, int]) -> Tensor:
        def decode(piece: Tensor) -> Tensor:
            return self.autoencoder.decode(piece, shape).full

        if self.decode_batch is None:
            return decode(latent)
        pieces = latent.split(self.decode_batch)
        return torch.cat([checkpoint(decode, piece, use_reentrant=False) for piece in pieces])

    def _size(self, difference: Tensor) -> Tensor:
        return difference.square() if self.loss == "l2" else difference.abs()

    def _strengths(self, run: tuple[Any, ...], ids: Sequence[int]) -> Tensor:
        """Draw the attention's strength for each slice, ``(batch,)``, by its identity."""
        low, high = (1.0, 1.0) if self.attention_use is None else self.attention_use.strengths
        draws = [torch.rand((), generator=keyed_generator(*run, i, "attention")) for i in ids]
        return low + (high - low) * torch.stack(draws).to(self.device)

    def _log_errors(self, stage: str, batch: PairedBatch, sampling: PairedSampling) -> None:
        restored = self._restore_pairs(batch, sampling).mean
        given = self._scaled(batch).expand_as(restored)
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
        source = self._encode(self.starting(self._scaled(batch)))
        return target, source.repeat_interleave(targets.shape[1], 0)

    def _scaled(self, batch: PairedBatch) -> Tensor:
        return batch.input / self.input_scale(batch.task)

    @torch.no_grad()
    def _encode(self, sinogram: Tensor) -> Tensor:
        return self.autoencoder.encode_mean(self.autoencoder.scaling(unmasked_stack(sinogram))).float()

    @torch.no_grad()
    def _decode(self, latent: Tensor, shape: tuple[int, int]) -> Tensor:
        return self.autoencoder.scaling.inverse(self.autoencoder.decode(latent, shape).full)


def _split(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
