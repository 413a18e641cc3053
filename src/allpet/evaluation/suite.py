"""All numbers of the evaluation at once, each beside its floor: what real slices score against real ones.

Most distances between two finite sets are not zero even where both come from one distribution, and depend on the sizes
of the sets. So both sets are halved at random, the real one by patient where patients are known and evenly by what
slices show where prompts are (``halves``); the *value* compares a real half with a fake half, the *floor* with as many
slices of the other real half. Both are means over several splits, and their standard deviations over splits are about
the standard errors of the whole sets (delete-half jackknife). Were the samples real, value and floor would differ by
sqrt(2) of the floor's; within twice that a value cannot be told from real, and by chance one in twenty is beyond.

Where a second real set is given as *reference*, its slices stand in for the other half. Noisy slices are to be compared
with noisy samples and expected ones with expected ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from allpet.consistency import consistency_numbers
from allpet.evaluation.classifier import PromptClassifier
from allpet.evaluation.copies import Nearest, copy_rate, nearest_modulo_symmetry
from allpet.evaluation.distances import gaussian_mmd, polynomial_mmd, prdc, sliced_wasserstein
from allpet.evaluation.features import EncoderFeatures, Features, RandomConvolutions, standardise
from allpet.evaluation.halves import drawn_like, halves, heeded, kinds_of, owners_of, remarks
from allpet.evaluation.spectra import (
    activity_histogram,
    angular_spectrum,
    band_ratio,
    bin_spectrum,
    histogram_distance,
    ratio_at,
    total_activity,
    typical,
    worst_factor,
)
from allpet.evaluation.verdicts import verdict
from allpet.geometry import ParallelBeam
from allpet.metrics import diversity, energy_distance, radial_power_spectrum
from allpet.models.autoencoder import Autoencoder
from allpet.projector import Radon
from allpet.prompts import Prompt
from allpet.randomness import keyed_generator
from allpet.reconstruction import fbp

PERIODS_MM = (40, 30, 20)
HARMONICS = (4, 8, 16)
NEIGHBOURS = 5


class Spectrum(NamedTuple):
    """Typical power of both sets.

    Attributes:
        frequency: cycles per mm, or per turn, ``(f,)``.
        real: geometric mean over the real set, ``(f,)``.
        fake: of the other.
    """

    frequency: Tensor
    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        numbers: ``NAME``, ``NAME_std``, ``NAME_floor`` and ``NAME_floor_std`` of every number.
        spectra: of ``image``, ``bins`` and ``angle``, to draw.
        activity: total activity of every real and every fake slice, to draw.
        levels: mean histogram of image values of both, and the upper end of its levels.
        nearest: training slices nearest to each fake sample; None without training slices.
        said: what the floor cannot tell, in sentences.
    """

    numbers: dict[str, float]
    spectra: dict[str, Spectrum]
    activity: tuple[Tensor, Tensor]
    levels: tuple[Tensor, Tensor, float]
    nearest: Nearest | None
    said: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the names of what was measured, in order."""
        return [name.removesuffix("_floor") for name in self.numbers if name.endswith("_floor")]

    def rows(self) -> list[dict[str, Any]]:
        """Return a table: number, fake, floor, their standard deviations and the verdict in words."""
        rows = []
        for name in self.names():
            fake, std, floor, floor_std = (self.numbers[name + end] for end in ("", "_std", "_floor", "_floor_std"))
            row = {"number": name, "fake": fake, "std": std, "floor": floor, "floor_std": floor_std}
            # Were the samples real, value and floor would scatter alike; that bad ones scatter more is no excuse.
            rows.append({**row, "verdict": verdict(name, fake, floor, math.sqrt(2) * floor_std)})
        return rows


def evaluate(
    real: Tensor,
    fake: Tensor,
    geometry: ParallelBeam,
    *,
    reference: Tensor | None = None,
    patients: Sequence[int] | Tensor | None = None,
    training: Tensor | None = None,
    training_patients: Sequence[int] | Tensor | None = None,
    encoder: Autoencoder | None = None,
    classifier: PromptClassifier | None = None,
    fake_prompts: Prompt | None = None,
    real_prompts: Prompt | None = None,
    repeats: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Compare a set of samples with a set of real slices that nothing was trained on.

    Args:
        real: held-out slices, ``(n, 1, views, bins)``, at least 12.
        fake: samples, ``(m, 1, views, bins)``, at least 12, in the same units.
        geometry: of all sinograms.
        reference: a second set of real slices, which then makes the floor, at least 12.
        patients: number of each real slice's patient, ``(n,)``; None: every slice is a patient of its own.
        training: slices that were trained on, for the copy test; None leaves it out.
        training_patients: number of each training slice's patient.
        encoder: frozen autoencoder for the encoder's features; None leaves them out.
        classifier: names tracer and region (``train_classifier``); None leaves out whether prompts are obeyed.
        fake_prompts: what the samples were asked for; needed with a classifier, see ``real_prompts``.
        real_prompts: what the real slices (and the reference, appended) show; needed with a classifier. Without them
            halves that differ in what they show make the floor high.
        repeats: random splits.
        seed: keys splits, directions and kernels.

    Raises:
        ValueError: if a set is too small, there is not one prompt or patient for each slice, or a classifier comes
            without prompts.
    """
    others = [] if reference is None else [reference]
    for name, given, least in (("real", real, 12), ("fake", fake, 12), *(("reference", x, 12) for x in others)):
        if given.ndim != 4 or tuple(given.shape[1:]) != (1, *geometry.sinogram_shape):
            raise ValueError(
                f"The {name} sinograms have the shape {tuple(given.shape)}, but must be (slices, 1, "
                f"{geometry.n_views}, {geometry.n_bins})."
            )
        if len(given) < least:
            raise ValueError(
                f"There are {len(given)} {name} sinograms, but at least {least} are compared; a hundred tell much more."
            )
    sets = [real, fake, *others]
    asked, owner = _prompts_of(sets, fake_prompts, real_prompts), owners_of(patients, len(real))
    if classifier is not None and (fake_prompts is None or real_prompts is None):
        raise ValueError("A classifier judges prompts, but they are not given; pass fake_prompts and real_prompts.")
    radon = Radon(geometry)
    extractors: dict[str, Features] = {"conv": RandomConvolutions.of(real, seed)}
    if encoder is not None:
        extractors["encoder"] = EncoderFeatures(encoder)
    peak = float(torch.stack([fbp(radon, part).amax() for part in real.split(64)]).max()) * 1.2
    near: list[Nearest | None] = [None] * len(sets)
    if training is not None:
        near = [nearest_modulo_symmetry(x, training, geometry, training_patients) for x in sets]
    features = {name: [extract(x) for x in sets] for name, extract in extractors.items()}
    prepared = [
        _Prepared.of(x, radon, {name: found[i] for name, found in features.items()}, peak, near[i])
        for i, x in enumerate(sets)
    ]
    if classifier is not None:
        for one, x, prompt in zip(prepared, sets, asked, strict=True):
            assert prompt is not None
            one.values["obeyed"] = classifier.obeyed(x, prompt)
    kinds = [kinds_of(prompt, len(x)) for prompt, x in zip(asked, sets, strict=True)]
    if not heeded(owner, kinds[0]).any():
        kinds = [torch.zeros_like(kind) for kind in kinds]
    for one, kind in zip(prepared, kinds, strict=True):
        one.values["kind"] = kind
    scale = float(real.square().mean().sqrt())
    values: list[dict[str, float]] = []
    floors: list[dict[str, float]] = []
    for repeat in range(repeats):
        generator = keyed_generator(seed, repeat, "real halves")
        half, other = halves(owner, kinds[0], generator)
        against, shown = prepared[0].take(half), kinds[0][half]
        most = len(other) if reference is None else len(reference) // 2
        order = drawn_like(shown, kinds[0], kinds[1], min(len(fake) // 2, most), generator)
        if reference is None:
            second = other[drawn_like(shown, kinds[0][other], kinds[0][other], len(order), generator)]
        else:
            second = drawn_like(shown, kinds[0], kinds[2], len(order), generator)
        size = min(len(order), len(second))
        samples, floor = prepared[1].take(order[:size]), prepared[0 if reference is None else 2].take(second[:size])
        for found, one in ((values, samples), (floors, floor)):
            found.append(_measure(against, one, geometry, scale, peak, seed))
    numbers: dict[str, float] = {}
    for name in values[0]:
        for suffix, found in (("", values), ("_floor", floors)):
            measured = torch.tensor([row[name] for row in found], dtype=torch.float64)
            numbers[name + suffix] = float(measured.mean())
            numbers[f"{name}{suffix}_std"] = float(measured.std()) if repeats > 1 else 0.0
    a, b = prepared[0].values, prepared[1].values
    frequencies = prepared[0].frequencies
    return Evaluation(
        numbers,
        {name: Spectrum(f, typical(a[name]), typical(b[name])) for name, f in frequencies.items()},
        (a["activity"], b["activity"]),
        (a["levels"].mean(0), b["levels"].mean(0), peak),
        near[1],
        tuple(remarks(patients, asked[0], len(real))),
    )


def _prompts_of(sets: Sequence[Tensor], fake: Prompt | None, real: Prompt | None) -> list[Prompt | None]:
    """Return the prompts of the real set, the samples and, if there is one, the reference; None where unknown."""
    n = sum(len(x) for i, x in enumerate(sets) if i != 1)
    for name, given, wanted in (("fake", fake, len(sets[1])), ("real", real, n)):
        if given is not None and len(given.tracer) != wanted:
            raise ValueError(f"{len(given.tracer)} prompts are given for {wanted} {name} slices; give one for each.")
    parts: list[Prompt | None] = [None] * 2
    if real is not None:
        parts = [Prompt(*(half[a:b] for half in real)) for a, b in ((0, len(sets[0])), (len(sets[0]), n))]
    return [parts[0], fake, parts[1]][: len(sets)]


@dataclass(frozen=True)
class _Prepared:
    """What is computed once for each sample of a set, so that splits cost little; ``values`` have samples first."""

    values: dict[str, Tensor]
    frequencies: dict[str, Tensor]
    nearest: Nearest | None

    @classmethod
    def of(
        cls, sinogram: Tensor, radon: Radon, features: dict[str, Tensor], peak: float, nearest: Nearest | None
    ) -> _Prepared:
        geometry = radon.geometry
        values = {"sinogram": sinogram, "activity": total_activity(sinogram, geometry)}
        values |= {f"features_{name}": found for name, found in features.items()}
        values |= consistency_numbers(sinogram, geometry)
        power, levels = [], []
        for part in sinogram.split(64):
            image = fbp(radon, part)
            frequency, found = radial_power_spectrum(image, geometry.pixel_mm)
            power.append(found)
            levels.append(activity_histogram(image, peak))
        frequencies = {"image": frequency}
        values |= {"image": torch.cat(power), "levels": torch.cat(levels)}
        frequencies["bins"], values["bins"] = bin_spectrum(sinogram, geometry)
        frequencies["angle"], values["angle"] = angular_spectrum(sinogram)
        return cls(values, frequencies, nearest)

    def take(self, index: Tensor) -> _Prepared:
        nearest = None if self.nearest is None else Nearest(*(value[index] for value in self.nearest))
        return _Prepared({name: value[index] for name, value in self.values.items()}, self.frequencies, nearest)


def _measure(
    real: _Prepared, other: _Prepared, geometry: ParallelBeam, scale: float, peak: float, seed: int
) -> dict[str, float]:
    """Every number of one set beside a real one."""
    a, b = real.values, other.values
    found: dict[str, float] = {}
    for name in ("encoder", "conv"):
        if f"features_{name}" in a:
            # By the real half alone: statistics of both halves would know one side of the floor already.
            x, y = standardise(a[f"features_{name}"], b[f"features_{name}"])
            found[f"kid_{name}"] = polynomial_mmd(x, y, (a["kind"], b["kind"]))
            found[f"mmd_{name}"] = gaussian_mmd(x, y, (a["kind"], b["kind"]))
            found[f"sw_{name}"] = sliced_wasserstein(x, y, seed=seed)
            overlap = prdc(x, y, min(NEIGHBOURS, len(x) - 1, len(y) - 1))
            found |= {f"{part}_{name}": value for part, value in overlap._asdict().items()}
    found["sw_raw"] = sliced_wasserstein(a["sinogram"], b["sinogram"], seed=seed) / scale
    found["energy_distance"] = float(energy_distance(a["sinogram"], b["sinogram"])) / scale
    found["diversity"] = float(diversity(b["sinogram"]))
    found |= _spectral_numbers(real, other, geometry)
    mean_activity = float(a["activity"].mean())
    found["activity_ratio"] = float(b["activity"].mean()) / mean_activity
    found["activity_distance"] = float(wasserstein_distance(a["activity"], b["activity"])) / mean_activity
    found["suv_distance"] = histogram_distance(a["levels"].mean(0), b["levels"].mean(0), peak)
    found |= {name: float(b[name].median()) for name in ("row_sum_cv", "centre_residual", "hl_residual", "seam_jump")}
    if real.nearest is not None and other.nearest is not None:
        copies = copy_rate(other.nearest, real.nearest)
        found |= {"copy_rate": copies.calibrated, "copy_rate_third": copies.third, "near_rate": copies.near}
        found["copy_ratio"] = float(other.nearest.ratio.median())
        found["nearest_training"] = float(other.nearest.d1.median())
        found["copy_threshold"] = max(1 / 3, copies.ratio_threshold)
    if "obeyed" in b:
        found["prompt_obeyed"] = float(b["obeyed"].float().mean())
    return found


def _spectral_numbers(real: _Prepared, other: _Prepared, geometry: ParallelBeam) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, width in (("image", geometry.pixel_mm), ("bins", geometry.bin_mm)):
        frequency = real.frequencies[name]
        ours, theirs = (typical(one.values[name]) for one in (real, other))
        # What is finer than two pixels is in no image.
        for period in (period for period in PERIODS_MM if period >= 2 * width):
            found[f"spectrum_{name}_{period}mm"] = ratio_at(frequency, ours, theirs, 1 / period)
            if name == "image":
                found[f"spectrum_worst_{period}mm"] = worst_factor(frequency, ours, theirs, 1 / period)
    ours, theirs = (typical(one.values["angle"]) for one in (real, other))
    for harmonic in (h for h in HARMONICS if 1.5 * h <= geometry.n_views):
        found[f"spectrum_angle_{harmonic}"] = band_ratio(real.frequencies["angle"], ours, theirs, harmonic)
    return found
