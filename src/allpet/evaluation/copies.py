"""Is a sample a copy of a training slice, perhaps turned, mirrored, moved or of another activity?

The distance of two sinograms is what is left of one after the best turn, mirroring and gain of the other,

    d(x, y) = min over turns and mirrors g and gains a of |x - a g y| / |x| = sqrt(1 - max_g cos(x, g y)^2),

after both have been moved to their centres of mass. Turns are by whole views over a full turn, which permute bins, so a
copy made by the exact symmetries (``allpet.symmetry``) lies at 0. All turns at once are a correlation over the double
cover: for every angular harmonic an inner product over the bins, then one Fourier transform; mirroring is the complex
conjugate. Since p(theta + pi, s) = p(theta, -s), half of the bins suffice.

A copy is known by its ratio d1 / d2 of the distances to the nearest slice and to the nearest one of any other patient
(Gu et al. 2023; Yoon et al. 2023 take 1/3), and what is near is judged by how near held-out slices are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from allpet.geometry import ParallelBeam
from allpet.symmetry import extend, reflect_y, roll_views, translate

_CHUNK_BYTES = 2**27


class Nearest(NamedTuple):
    """The training slices most like each sample.

    Attributes:
        d1: distance to the nearest slice, in [0, 1], ``(samples,)``.
        d2: distance to the nearest slice of any other patient than that one's.
        first: the nearest slice, int64.
        second: the one that d2 belongs to, int64.
        turn: views by which the nearest slice is turned to fit, int64.
        mirrored: whether it is mirrored (y -> -y) before it is turned, bool.
    """

    d1: Tensor
    d2: Tensor
    first: Tensor
    second: Tensor
    turn: Tensor
    mirrored: Tensor

    @property
    def ratio(self) -> Tensor:
        """d1 / d2, ``(samples,)``; 0 for copies, near 1 for samples of their own."""
        return self.d1 / self.d2.clamp_min(1e-12)


class CopyRate(NamedTuple):
    """Which share of samples are copies, by three rules.

    Attributes:
        calibrated: ratio below the larger of 1/3 and the 1st percentile of held-out slices' own ratios.
        third: ratio below 1/3.
        near: d1 below the 1st percentile of held-out slices' d1.
        ratio_threshold: the 1st percentile of held-out ratios.
        distance_threshold: the 1st percentile of held-out d1.
    """

    calibrated: float
    third: float
    near: float
    ratio_threshold: float
    distance_threshold: float


def nearest_modulo_symmetry(
    samples: Tensor,
    training: Tensor,
    geometry: ParallelBeam,
    patients: Sequence[int] | Tensor | None = None,
    centre: bool = True,
) -> Nearest:
    """Find the training slice most like each sample over all turns by whole views, mirrors, gains and positions.

    Args:
        samples: ``(samples, 1, views, bins)``.
        training: ``(slices, 1, views, bins)`` of at least two patients.
        geometry: of all of them.
        patients: number of each training slice's patient, ``(slices,)``; None: every slice is a patient of its own.
        centre: whether positions are removed by moving every sinogram to its centre of mass.

    Raises:
        ValueError: if the training slices are of fewer than two patients or a shape does not fit.
    """
    owner = torch.arange(len(training)) if patients is None else torch.as_tensor(patients)
    if len(owner) != len(training):
        raise ValueError(f"{len(owner)} patients are given for {len(training)} training slices; give one for each.")
    if len(owner.unique()) < 2:
        raise ValueError(
            "The copy test compares with a second patient, but the training slices are of one; add more, or name their "
            "patients if they are of several (subfolders or a column patient)."
        )
    x, y = (_centred(s, geometry) if centre else _checked(s, geometry) for s in (samples, training))
    fit = _best_fit(x, y)
    index = fit.cosine.argmax(1)
    same = owner[index][:, None] == owner
    second = fit.cosine.masked_fill(same, -2).argmax(1)
    d1, turn, mirrored = _distance(x, y, fit, index)
    d2, _, _ = _distance(x, y, fit, second)
    return Nearest(d1, d2, index, second, turn, mirrored)


def aligned(nearest: Nearest, training: Tensor) -> Tensor:
    """Return the nearest training slices, turned and mirrored to fit the samples, ``(samples, 1, views, bins)``."""
    return _moved(training[nearest.first], nearest.turn, nearest.mirrored)


def copy_rate(samples: Nearest, held_out: Nearest) -> CopyRate:
    """Judge samples by how near held-out real slices are to the same training slices.

    Of samples no nearer than held-out slices, about 1 % are called copies by the calibrated rules.

    Args:
        samples: of the samples.
        held_out: of real slices of patients that were not trained on.
    """
    ratio, distance = (float(x.quantile(0.01)) for x in (held_out.ratio, held_out.d1))
    return CopyRate(
        calibrated=float((samples.ratio < max(1 / 3, ratio)).float().mean()),
        third=float((samples.ratio < 1 / 3).float().mean()),
        near=float((samples.d1 < distance).float().mean()),
        ratio_threshold=ratio,
        distance_threshold=distance,
    )


class _Fit(NamedTuple):
    """For each pair the best cosine over all turns and mirrors, and where it was found, ``(samples, slices)``."""

    cosine: Tensor
    turn: Tensor
    mirrored: Tensor


def _best_fit(x: Tensor, y: Tensor) -> _Fit:
    n_views = x.shape[-2]
    # Four products, two sums and two correlations of a pair are held at once.
    pairs = max(1, _CHUNK_BYTES // (16 * 4 * (n_views + 1)))
    rows = min(len(x), max(1, int(pairs**0.5)))
    columns = max(1, pairs // rows)
    lines = []
    for part in x.split(rows):
        a = _harmonics(part)
        found = [_correlate(a, _harmonics(other), n_views) for other in y.split(columns)]
        lines.append(_Fit(*(torch.cat(values, dim=1) for values in zip(*found, strict=True))))
    return _Fit(*(torch.cat(values) for values in zip(*lines, strict=True)))


def _correlate(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], n_views: int) -> _Fit:
    rr, ii, ir, ri = (left @ right.mT for left, right in ((a[0], b[0]), (a[1], b[1]), (a[1], b[0]), (a[0], b[1])))
    # a conj(b) turns b forwards; a b correlates with the mirrored b, whose spectrum is conj(b).
    best = []
    for product in (torch.complex(rr + ii, ir - ri), torch.complex(rr - ii, ir + ri)):
        best.append(torch.fft.irfft(product, n=2 * n_views, dim=0).max(dim=0))
    plain, mirrored = best
    better = mirrored.values > plain.values
    return _Fit(
        torch.where(better, mirrored.values, plain.values),
        torch.where(better, mirrored.indices, plain.indices),
        better,
    )


def _harmonics(sinogram: Tensor) -> tuple[Tensor, Tensor]:
    """Spectrum over the full turn of sinograms scaled to norm 1, ``(harmonics, batch, bins of one half)``, two parts.

    The harmonics of the double cover are even or odd in s, so that products over all bins are twice those over one
    half; a middle bin counts half.
    """
    p = sinogram[:, 0]
    n_bins = p.shape[-1]
    # |double cover|^2 = 2 |p|^2, and half of the bins give half of it.
    p = p / p.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
    weight = torch.ones(n_bins - n_bins // 2).to(p)
    if n_bins % 2:
        weight[0] = 0.5
    spectrum = torch.fft.rfft(extend(p), dim=1)[..., n_bins // 2 :] * weight.sqrt()
    spectrum = spectrum.transpose(0, 1)
    return spectrum.real.contiguous(), spectrum.imag.contiguous()


def _distance(x: Tensor, y: Tensor, fit: _Fit, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to chosen slices from the difference itself: 1 - cosine^2 would leave copies at 1e-3."""
    turn, mirrored = (values.gather(1, index[:, None])[:, 0] for values in (fit.turn, fit.mirrored))
    other = _moved(y[index], turn, mirrored).flatten(1).double()
    sample = x.flatten(1).double()
    # A gain is positive: what resembles the negative of a slice does not resemble the slice.
    gain = ((sample * other).sum(1) / other.square().sum(1).clamp_min(1e-30)).clamp_min(0)
    left = (sample - gain[:, None] * other).norm(dim=1) / sample.norm(dim=1).clamp_min(1e-30)
    return left.float(), turn, mirrored


def _moved(sinogram: Tensor, turn: Tensor, mirrored: Tensor) -> Tensor:
    return roll_views(torch.where(mirrored[:, None, None, None], reflect_y(sinogram), sinogram), turn)


def _centred(sinogram: Tensor, geometry: ParallelBeam) -> Tensor:
    """Move sinograms to their centre of mass, whose projection is x cos(theta) + y sin(theta)."""
    p = _checked(sinogram, geometry)[:, 0]
    total = p.sum((1, 2)) / geometry.n_views
    moment = p @ geometry.bin_centers.to(p)
    angles = geometry.angles.to(p)
    # cos and sin are orthogonal over half a turn, each of norm sqrt(views / 2).
    basis = torch.stack([angles.cos(), angles.sin()], dim=1) * (2 / geometry.n_views)
    # An empty sinogram stays where it is.
    place = moment @ basis / torch.where(total == 0, 1.0, total)[:, None]
    place = torch.where((total > 0)[:, None], place, 0.0).clamp(-geometry.field_of_view_mm, geometry.field_of_view_mm)
    return translate(sinogram, geometry, -place[:, 0], -place[:, 1])


def _checked(sinogram: Tensor, geometry: ParallelBeam) -> Tensor:
    if sinogram.ndim != 4 or tuple(sinogram.shape[1:]) != (1, *geometry.sinogram_shape):
        raise ValueError(
            f"The sinograms have the shape {tuple(sinogram.shape)}, but must be (batch, 1, {geometry.n_views}, "
            f"{geometry.n_bins})."
        )
    return sinogram
