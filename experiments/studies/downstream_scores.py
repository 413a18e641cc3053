"""What a downstream task's results are judged by: held-out pairs, in the sinogram and after one fixed reconstruction.

References are the expected targets and what ``standard_image`` makes of them, so that neither the noise of a target nor
the reconstruction counts for or against a method. Vocabulary: a *target* is one wanted sinogram (a pair of *separation*
has two); a *tissue* is a label of the simulator under one tracer; a *lesion* is a connected area of hot lesion that the
reference shows: its uptake at least ``VISIBLE`` times that of the ring around it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import ndimage, stats
from torch import Tensor

from allpet.metrics import contrast_recovery, moment_residuals, psnr, relative_l2, ssim, standard_image, suv_bias
from allpet.projector import Radon
from allpet.prompts import TRACERS
from allpet.randomness import keyed_generator
from allpet.simulation.tasks import PairedBatch
from allpet.simulation.tissues import LABELS

VISIBLE = 1.5
_UNSEEN = 1.2  # uptake over the ring's below which a target does not show a lesion
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_SMALLEST, _FEWEST_PIXELS, _FEWEST_SLICES = 3, 20, 2  # pixels of a lesion; pixels and slices of a tissue
_FAINT = 0.1  # tissues with less than this share of the body's mean uptake have no bias worth a percentage
_EMPTY = ("air", "gas", "lumen", "lesion_hot", "lesion_cold")
_OBJECT = 0.01  # bins with at least this share of the sinogram's largest value lie in the object


class Lesion(NamedTuple):
    """A lesion of a held-out target.

    Attributes:
        row: of the target.
        area: its pixels, ``(rows, columns)``, bool.
        ring: the tissue around it.
        contrast: uptake of the area over that of the ring, in the reference.
    """

    row: int
    area: Tensor
    ring: Tensor
    contrast: float


class Scores(NamedTuple):
    """How good a set of results is.

    Attributes:
        numbers: flat, over all targets; biases are shares, not percentages.
        targets: number of each target, ``(targets,)`` each.
        lesions: number of each lesion, ``(lesions,)`` each.
    """

    numbers: dict[str, float | str]
    targets: dict[str, Tensor]
    lesions: dict[str, Tensor]


class HeldOut:
    """Held-out pairs, with all that results are compared with.

    Args:
        pairs: with images.
        radon: the projector.

    Attributes:
        truth: expected targets that show anything, ``(targets, 1, views, bins)``.
        image: what they look like reconstructed.
        patient: of each target.
        lesions: that can be judged.
        discordant: of two targets, lesions that the other does not show, with the row of the other.
    """

    def __init__(self, pairs: PairedBatch, radon: Radon) -> None:
        if pairs.labels is None:
            raise ValueError("The pairs have no labels: take them without symmetries.")
        self.pairs, self.radon, k = pairs, radon, pairs.expected.shape[1]
        whole = pairs.expected.flatten(0, 1)[:, None]
        self.shown = whole.flatten(1).any(1)
        self.truth = whole[self.shown]
        self.image = standard_image(radon, self.truth)
        self.labels = pairs.labels.long().repeat_interleave(k, 0)[self.shown]
        self.patient = pairs.patient_id.repeat_interleave(k)[self.shown]
        self.tracer = pairs.target_tracer.flatten()[self.shown]
        found = [lesion for row in range(len(self.truth)) for lesion in self._find_lesions(row)]
        self.lesions = [lesion for lesion in found if lesion.contrast >= VISIBLE]
        self.discordant = self._find_discordant(k)
        hot = self.labels[:, 0] == LABELS["lesion_hot"]
        near = torch.stack([_dilate(one, 2) for one in hot])[:, None]
        self.elsewhere = (self.labels > 0) & ~near

    def score(self, result: Tensor) -> Scores:
        """Judge results, ``(slices, targets, views, bins)``.

        Raises:
            ValueError: if the shape is not that of the targets.
        """
        if result.shape != self.pairs.expected.shape:
            raise ValueError(
                f"The results have shape {tuple(result.shape)}, the targets {tuple(self.pairs.expected.shape)}."
            )
        ours = result.flatten(0, 1)[:, None].float().cpu()[self.shown]
        image = standard_image(self.radon, ours)
        targets = {
            "psnr": psnr(ours, self.truth),
            "ssim": ssim(ours, self.truth),
            "l2": relative_l2(ours, self.truth),
            "psnr_image": psnr(image, self.image),
            "ssim_image": ssim(image, self.image),
            "l2_image": relative_l2(image, self.image),
            "l2_elsewhere": relative_l2(image, self.image, self.elsewhere),
            "hl0": moment_residuals(ours, self.radon.geometry, 1)[:, 0],
        }
        lesions = self._lesion_numbers(image)
        numbers: dict[str, float | str] = {name: float(values.nanmean()) for name, values in targets.items()}
        numbers |= self._tissue_numbers(image)
        if self.discordant:
            numbers["lesion_leak"] = statistics.fmean(self._leaks(image))
        numbers |= {"lesions": len(self.lesions), "lesion_patients": len(self._lesion_patients().unique())}
        for name, values in lesions.items():
            numbers[name] = float(values.nanmean())
            if name.endswith("bias"):
                numbers[f"{name}_abs"] = float(values.abs().nanmean())
        return Scores(numbers, {**targets, "patient": self.patient}, {**lesions, "patient": self._lesion_patients()})

    def _find_lesions(self, row: int) -> list[Lesion]:
        labels = self.labels[row, 0]
        hot = labels == LABELS["lesion_hot"]
        host = (labels > 0) & (labels != LABELS["gas"]) & (labels < LABELS["lesion_hot"])
        areas, count = ndimage.label(hot.numpy())
        lesions = []
        for number in range(1, count + 1):
            area = torch.from_numpy(areas == number)
            ring = _dilate(area, 3) & ~_dilate(area, 1) & host
            if area.sum() >= _SMALLEST and ring.sum() >= _SMALLEST:
                image = self.image[row, 0]
                lesions.append(Lesion(row, area, ring, float(image[area].mean() / image[ring].mean().clamp_min(1e-9))))
        return lesions

    def _find_discordant(self, k: int) -> list[tuple[Lesion, int]]:
        places = self.shown.nonzero()[:, 0].tolist()  # of all targets, slice by slice
        found = []
        for lesion in self.lesions if k == 2 else []:
            other = places[lesion.row] ^ 1
            if other in places:
                row = places.index(other)
                image = self.image[row, 0]
                if float(image[lesion.area].mean() / image[lesion.ring].mean().clamp_min(1e-9)) < _UNSEEN:
                    found.append((lesion, row))
        return found

    def _leaks(self, image: Tensor) -> list[float]:
        """Return what a result of the other tracer has too much of in each discordant lesion, over its uptake."""
        return [
            float((image[row, 0][lesion.area] - self.image[row, 0][lesion.area]).mean())
            / float(self.image[lesion.row, 0][lesion.area].mean())
            for lesion, row in self.discordant
        ]

    def _lesion_patients(self) -> Tensor:
        return self.patient[torch.tensor([lesion.row for lesion in self.lesions], dtype=torch.int64)]

    def _lesion_numbers(self, image: Tensor) -> dict[str, Tensor]:
        if not self.lesions:
            return {name: torch.zeros(0) for name in ("lesion_max_bias", "lesion_mean_bias", "lesion_recovery")}
        rows = torch.tensor([lesion.row for lesion in self.lesions])
        areas = torch.stack([lesion.area for lesion in self.lesions])[:, None]
        ours, theirs = image[rows], self.image[rows]
        recovery = [
            contrast_recovery(image[one.row][None], one.area[None, None], one.ring[None, None], one.contrast)
            for one in self.lesions
        ]
        return {
            "lesion_max_bias": suv_bias(ours, theirs, areas, "max"),
            "lesion_mean_bias": suv_bias(ours, theirs, areas),
            "lesion_recovery": torch.cat(recovery),
        }

    def _tissue_numbers(self, image: Tensor) -> dict[str, float | str]:
        """Bias of each tissue's uptake over all held-out slices: mean and worst size, signed mean and deviation.

        ``tissue_chance`` is what the mean size would be by chance alone, were nothing biased: that of normal errors as
        large as the standard errors of the biases, which how they differ between slices gives: too small where slices
        of a patient err alike, too large where slices are biased differently. ``tissue_patients`` is the mean size of
        the bias of a tissue in one patient.
        """
        biases: dict[str, float] = {}
        errors: list[float] = []
        single: list[float] = []
        body = float(self.image[self.labels > 0].mean())
        for tracer in self.tracer.unique().tolist():
            chosen = (self.tracer == tracer)[:, None, None, None]
            for name, label in LABELS.items():
                area = (self.labels == label) & chosen
                slices, pixels = int(area.flatten(1).any(1).sum()), int(area.sum())
                if name in _EMPTY or slices < _FEWEST_SLICES or pixels < _FEWEST_PIXELS:
                    continue
                theirs = float(self.image[area].mean())
                if theirs < _FAINT * body:
                    continue
                bias = float(image[area].mean()) / theirs - 1
                biases[f"{TRACERS[tracer]} {name}"] = bias
                beyond = torch.where(area, image - (1 + bias) * self.image, 0.0).flatten(1).sum(1)
                errors.append(float(beyond.norm()) * (slices / (slices - 1)) ** 0.5 / (theirs * pixels))
                for patient in self.patient[area.flatten(1).any(1)].unique():
                    its = area & (self.patient == patient)[:, None, None, None]
                    if int(its.sum()) >= _FEWEST_PIXELS:
                        single.append(float(image[its].mean() / self.image[its].mean().clamp_min(1e-9)) - 1)
        if not biases:
            names = ("tissue_bias", "tissue_chance", "tissue_signed", "tissue_sd", "tissue_patients", "worst_bias")
            return {"tissues": 0, **dict.fromkeys(names, float("nan")), "worst_tissue": ""}
        worst = max(biases, key=lambda name: abs(biases[name]))
        values = list(biases.values())
        return {
            "tissues": len(biases),
            "tissue_bias": statistics.fmean(map(abs, values)),
            "tissue_chance": (2 / math.pi) ** 0.5 * statistics.fmean(errors),
            "tissue_signed": statistics.fmean(values),
            "tissue_sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            "tissue_patients": statistics.fmean(map(abs, single)) if single else float("nan"),
            "worst_bias": abs(biases[worst]),
            "worst_tissue": worst,
        }


def calibration(samples: Tensor, truth: Tensor) -> list[dict[str, float]]:
    """Say how often intervals hold the truth, in bins of the object and in all bins.

    Args:
        samples: ``(samples, slices, targets, views, bins)``, at least 2.
        truth: expected targets, ``(slices, targets, views, bins)``.

    Returns:
        For each nominal ``level``: coverage of mean +- z std (``gauss``; ``gauss_all`` for all bins), and between the
        samples' quantiles (``quantile``), which reach (K - 1) / (K + 1) of the level at best.
    """
    if len(samples) < 2:
        raise ValueError(f"Intervals need at least 2 samples; got {len(samples)}.")
    mean, std, ordered = samples.mean(0), samples.std(0), samples.sort(0).values
    inside = truth >= _OBJECT * truth.amax((-2, -1), keepdim=True).clamp_min(1e-9)
    lines = []
    for level in LEVELS:
        within = (truth - mean).abs() <= float(stats.norm.ppf((1 + level) / 2)) * std
        low, high = (_quantile(ordered, share) for share in ((1 - level) / 2, (1 + level) / 2))
        between = (truth >= low) & (truth <= high)
        lines.append(
            {
                "level": level,
                "gauss": float(within[inside].double().mean()),
                "quantile": float(between[inside].double().mean()),
                "gauss_all": float(within.double().mean()),
            }
        )
    return lines


def interval(differences: Sequence[Tensor], patients: Sequence[Tensor], draws: int = 500) -> tuple[float, float, float]:
    """Return the mean of paired differences and its 95 % interval, by a bootstrap over patients.

    Args:
        differences: ``(n,)`` for each seed; NaN where there is none.
        patients: of each.
        draws: of the bootstrap.
    """
    values, owner = torch.cat(list(differences)).double(), torch.cat(list(patients))
    kept = values.isfinite()
    values, owner = values[kept], owner[kept]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    known, index = owner.unique(return_inverse=True)
    sums = torch.zeros(len(known), dtype=torch.float64).index_add_(0, index, values)
    counts = torch.bincount(index, minlength=len(known)).double()
    drawn = torch.randint(len(known), (draws, len(known)), generator=keyed_generator(0, "bootstrap"))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Interpolate between sorted samples; torch's own quantile takes no more than 16 million values."""
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2)
    return ordered[below].lerp(ordered[below + 1], place - below)


def _dilate(area: Tensor, pixels: int) -> Tensor:
    return torch.from_numpy(ndimage.binary_dilation(area.numpy(), iterations=pixels))
