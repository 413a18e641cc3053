"""The five paired tasks: what goes in, what should come out, and the physics between the two.

============  ====================================  ==============================================================
task          input                                 target
============  ====================================  ==============================================================
low_dose      a fraction of the dose or time        the normal dose
attenuation   not corrected; scatter still in it    corrected for attenuation and scatter
delayed       the scan at the table's usual time    the same patient later: moved, bladder and bowel changed
separation    two tracers in one scan               each tracer alone; the two sum to the mix
conversion    one tracer                            another tracer in the same anatomy
============  ====================================  ==============================================================

What has to be said wherever results are shown. Low dose: which target was meant, for a noisy one caps every score.
Attenuation: the body is not given, it has to be inferred. Separation: one static scan cannot be separated by physics;
the answer comes from what was learned, so give the bias of lesions that nothing learned could foresee. Conversion: a
hypothetical image, never quantitative.

Every target comes twice: as its expectation (``expected``) and with the noise of a scan of its own (``noisy``). Say
which one a score refers to: a noisy sinogram is itself some 26 dB from its expectation. All SUVs are decay-corrected to
injection; the noise is that of the decayed activity. In *separation* no single decay correction fits both tracers, so
SUVs refer to the activity of both together at the time of the scan.

One seed is one virtual patient, the same as everywhere in the simulator. Settings (dose, delay, ratio, movement) are
drawn apart from being applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from allpet.projector import Radon
from allpet.prompts import TRACERS, Prompt, prompt_index
from allpet.randomness import keyed_generator
from allpet.simulation import brain
from allpet.simulation.acquisition import (
    DOSE_MODES,
    PSF_MM,
    Acquisition,
    Levels,
    acquire,
    draw_levels,
    gaussian_blur,
)
from allpet.simulation.fields import Draw
from allpet.simulation.lesions import Lesion
from allpet.simulation.phantoms import Patient, Scan, draw_patient, paint_patient, slice_heights
from allpet.simulation.sculptor import offset, scaled
from allpet.simulation.solids import Solid
from allpet.simulation.tracers import Tracer, tracer_table
from allpet.simulation.trunk import Trunk

TASKS = ("low_dose", "attenuation", "delayed", "separation", "conversion")
TWO_TRACERS = ("separation", "conversion")
MEASURING = {"low_dose": 1, "separation": 2, "attenuation": 1}
"""Tasks whose input measures the sum of all targets, and the number of these; of *attenuation* what is left of it, with
scatter."""
RELATED = {"delayed": 1, "conversion": 1}
"""Tasks whose input is another scan of the patient, and the number of targets: what a model loses of the one it loses
of the other."""
_VOIDED, _VOIDED_URINE = 0.4, 0.3  # share of patients who void between the scans, and their urine's activity after it
_BOWEL_MM = 6.0  # standard deviation of the displacement of a loop between the scans


@dataclass(frozen=True)
class PairOptions:
    """Ranges that the settings of pairs are drawn from.

    Attributes:
        reductions: dose reductions of ``low_dose``, one of which is drawn for each patient.
        dose_mode: ``dose``, ``time`` (see ``acquire``) or ``thinning``: the low-dose counts are a random share of those
            of the noisy target, as in subsampled list-mode data.
        delay_min: range of the time from the first to the delayed scan, minutes.
        movement_mm: range of the patient's movement between two scans, mm.
        activity_ratio: range of injected activity, second over first tracer; drawn log-uniformly.
        stagger_min: range of the time from the first to the second injection, minutes.
        discordance: share of the lesions of a trunk that only one of two tracers shows; either with equal chance.
            (In a brain the tracers' tables alone decide: DOPA does not show patches of low metabolism.)

    Raises:
        ValueError: if a range is empty or impossible.
    """

    reductions: tuple[int, ...] = (4, 10, 20, 50, 100)
    dose_mode: str = "dose"
    delay_min: tuple[float, float] = (30.0, 120.0)
    movement_mm: tuple[float, float] = (2.0, 5.0)
    activity_ratio: tuple[float, float] = (0.3, 3.0)
    stagger_min: tuple[float, float] = (0.0, 30.0)
    discordance: float = 0.3

    def __post_init__(self) -> None:
        if not self.reductions or min(self.reductions) < 1:
            raise ValueError(f"reductions are {self.reductions}, but must be factors of at least 1.")
        if self.dose_mode not in DOSE_MODES:
            raise ValueError(f"Unknown dose mode {self.dose_mode!r}; choose one of {', '.join(DOSE_MODES)}.")
        for name in ("delay_min", "movement_mm", "activity_ratio", "stagger_min"):
            low, high = getattr(self, name)
            if not 0 <= low <= high or (name == "activity_ratio" and low == 0):
                raise ValueError(f"{name} is {(low, high)}, but must be (smallest, largest), not negative.")
        if not 0 <= self.discordance <= 1:
            raise ValueError(f"discordance is {self.discordance}, but must lie between 0 and 1.")


class Setting(NamedTuple):
    """What is drawn for the pair of one patient.

    Attributes:
        dose: share of the normal dose of a low-dose scan.
        delay_min: time from the first to the delayed scan, minutes.
        activity_ratio: injected activity of the second tracer over that of the first.
        stagger_min: time from the first to the second injection, minutes.
        movement_mm: shift along x and y between two scans.
        turn_rad: turn between two scans.
        bladder: volume of the bladder in the delayed scan over that in the first.
        urine: activity of its urine over what the time alone would make of it.
    """

    dose: float
    delay_min: float
    activity_ratio: float
    stagger_min: float
    movement_mm: tuple[float, float]
    turn_rad: float
    bladder: float
    urine: float


class PairedBatch(NamedTuple):
    """Pairs of sinograms for the downstream tasks; sinograms in SUV x mm, float32.

    Attributes:
        input: what is given, with noise, ``(batch, 1, views, bins)``.
        expected: what should come out, without noise, ``(batch, targets, views, bins)``; two targets in *separation*,
            else one.
        noisy: what a scanner would have given in its place, in the same shape.
        activity: the targets' truth, SUV, ``(batch, targets, rows, columns)``; None, like the other images, where
            symmetries have turned the sinograms away from it.
        labels: integers of ``LABELS``, registered with the targets, ``(batch, 1, rows, columns)``, uint8.
        attenuation: of the targets' scan, 1/mm, ``(batch, 1, rows, columns)``.
        task: index into ``TASKS``, ``(batch,)``, int64.
        prompt: tracer and region of the input; of a mix, its first tracer.
        target_tracer: index into ``allpet.prompts.TRACERS``, ``(batch, targets)``, int64.
        delay_min: time from the input's to the target's scan in minutes, ``(batch,)``; 0 where it is the same.
        dose: share of the normal dose that the input has, ``(batch,)``; 1 but in *low_dose*.
        share: share of each target in the activity at the time of the scan, ``(batch, targets)``; 1 but in
            *separation*, where target / share is the tracer's own SUV.
        sample_id: identity of each slice in its data set, ``(batch,)``, int64.
        patient_id: of each slice's patient, ``(batch,)``, int64.
    """

    input: Tensor
    expected: Tensor
    noisy: Tensor
    activity: Tensor | None
    labels: Tensor | None
    attenuation: Tensor | None
    task: Tensor
    prompt: Prompt
    target_tracer: Tensor
    delay_min: Tensor
    dose: Tensor
    share: Tensor
    sample_id: Tensor
    patient_id: Tensor


class _Pair(NamedTuple):
    """What differs between tasks: input, noisy and expected targets, their activity and labels and attenuation."""

    input: Tensor
    targets: Sequence[Acquisition]
    activity: Sequence[Tensor]
    labels: Tensor
    attenuation: Tensor
    share: Sequence[float] = (1.0,)


def draw_setting(generator: torch.Generator, options: PairOptions) -> Setting:
    """Draw the setting of one patient's pair; the draws do not depend on the task."""
    draw = Draw(generator)
    dose = 1 / options.reductions[draw.integer(0, len(options.reductions) - 1)]
    delay, stagger = draw.uniform(*options.delay_min), draw.uniform(*options.stagger_min)
    low, high = options.activity_ratio
    ratio = low * (high / low) ** draw.uniform()
    distance, bearing = draw.uniform(*options.movement_mm), draw.uniform(0, 2 * math.pi)
    turn = draw.normal(0, 0.01) if distance else 0.0
    voided, filled, emptied = draw.chance(_VOIDED), draw.uniform(1.0, 1.8), draw.uniform(0.2, 0.5)
    movement = (distance * math.cos(bearing), distance * math.sin(bearing))
    bladder, urine = (emptied, _VOIDED_URINE) if voided else (filled, 1.0)
    return Setting(dose, delay, ratio, stagger, movement, turn, bladder, urine)


def make_pairs(
    task: str,
    radon: Radon,
    seed: int,
    region: str,
    tracers: str | Sequence[str],
    n_slices: int,
    options: PairOptions | None = None,
    *,
    setting: Setting | None = None,
    levels: Levels | None = None,
    device: str | torch.device = "cpu",
) -> PairedBatch:
    """Simulate the pairs of one virtual patient; equal arguments give bit-identical pairs (on one kind of device).

    Args:
        task: one of ``TASKS``.
        radon: the projector.
        seed: the patient.
        region: ``brain``, ``chest``, ``abdomen`` or ``pelvis``.
        tracers: one tracer, or for *separation* and *conversion* the two.
        n_slices: number of slices, evenly spread over the region.
        options: ranges that the setting is drawn from.
        setting: drawn by the patient's number if not given.
        levels: counts and fractions of the scan at normal dose; drawn by the patient's number if not given.
        device: where sinograms are made and returned; counts are drawn on the CPU, so that they are the same.

    Raises:
        ValueError: if the task, a tracer or the region is unknown, or the number of tracers does not fit the task.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}; choose one of {', '.join(TASKS)}.")
    names = [tracers] if isinstance(tracers, str) else list(tracers)
    if len(names) != (wanted := 2 if task in TWO_TRACERS else 1) or len(set(names)) != wanted:
        raise ValueError(f"{task} takes {wanted} tracer(s), but got {', '.join(names) or 'none'}.")
    if n_slices < 1:
        raise ValueError(f"n_slices is {n_slices}, but a patient needs at least one slice.")
    options = options or PairOptions()
    tables = [tracer_table(name) for name in names]
    sex = next((table.sex for table in tables if table.sex), "")
    patient = draw_patient(seed, region, radon.geometry.field_of_view_mm, sex)
    if setting is None:
        setting = draw_setting(keyed_generator(seed, task, region, *names, "setting"), options)
    if levels is None:
        levels = draw_levels([region] * n_slices, keyed_generator(seed, task, region, *names, "levels"))
    bench = _Bench(radon, patient, n_slices, levels, (seed, task, region, *names), torch.device(device))
    pair = {
        "low_dose": _low_dose,
        "attenuation": _attenuation,
        "delayed": _delayed,
        "separation": _separation,
        "conversion": _conversion,
    }[task](bench, tables, setting, options)
    shown = {"separation": names, "conversion": names[1:]}.get(task, names)
    index = [prompt_index(name, TRACERS, "tracer") for name in shown]

    def each(value: float) -> Tensor:
        return torch.full((n_slices,), value, dtype=torch.float32)

    return PairedBatch(
        input=pair.input,
        expected=torch.cat([scan.expected for scan in pair.targets], dim=1),
        noisy=torch.cat([scan.corrected for scan in pair.targets], dim=1),
        activity=torch.stack(list(pair.activity), dim=1).to(device),
        labels=pair.labels.unsqueeze(1).to(device),
        attenuation=pair.attenuation.unsqueeze(1).to(device),
        task=torch.full((n_slices,), TASKS.index(task)),
        prompt=Prompt.of([(names[0], region)] * n_slices),
        target_tracer=torch.tensor([index] * n_slices),
        delay_min=each(setting.delay_min if task == "delayed" else 0.0),
        dose=each(setting.dose if task == "low_dose" else 1.0),
        share=torch.tensor([list(pair.share)] * n_slices, dtype=torch.float32),
        sample_id=seed * n_slices + torch.arange(n_slices),
        patient_id=torch.full((n_slices,), seed),
    )


def activity_shares(first: Tracer, second: Tracer, setting: Setting) -> tuple[float, float]:
    """Return each tracer's share of the activity in the patient at the time of a scan of both.

    The first is injected ``stagger_min`` before the second, which is scanned at its table's time; both decay.
    """
    remaining = 2 ** (-(first.minutes + setting.stagger_min) / first.half_life_min)
    other = setting.activity_ratio * 2 ** (-second.minutes / second.half_life_min)
    return remaining / (remaining + other), other / (remaining + other)


def thin(scan: Acquisition, share: float, generator: torch.Generator) -> Acquisition:
    """Keep a random share of a scan's counts: what a shorter part of its list-mode data would hold."""
    full = scan.prompts.to(generator.device)
    prompts = torch.binomial(full, torch.full_like(full, share), generator=generator).to(scan.prompts.device)
    trues, scatter, randoms, scale = (share * x for x in (scan.expected_trues, scan.scatter, scan.randoms, scan.scale))
    corrected = (prompts - randoms - scatter) / (scan.attenuation_factor * scale)
    return scan._replace(
        prompts=prompts, expected_trues=trues, scatter=scatter, randoms=randoms, corrected=corrected, scale=scale
    )


class _Bench(NamedTuple):
    """A patient on the scanner's bench, ready to be painted and scanned."""

    radon: Radon
    patient: Patient
    n_slices: int
    levels: Levels
    key: tuple[int | str, ...]
    device: torch.device

    def paint(self, scans: Sequence[Scan], patient: Patient | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return activity ``(scans, n, rows, columns)``, attenuation and labels ``(n, rows, columns)``."""
        z = slice_heights(self.patient.seed, self.patient.region, self.n_slices)
        activity, attenuation, labels = paint_patient(patient or self.patient, z, self.radon.geometry, scans)
        return activity.to(self.device), attenuation.to(self.device), labels

    def scan(
        self,
        activity: Tensor,
        attenuation: Tensor,
        purpose: str,
        psf_mm: float,
        dose: float = 1.0,
        mode: str = "dose",
        levels: Levels | None = None,
    ) -> Acquisition:
        """Acquire with noise of its own, keyed by what the scan is for."""
        return acquire(
            self.radon,
            activity,
            attenuation,
            self.patient.region,
            keyed_generator(*self.key, purpose),
            dose,
            mode=mode,
            psf_mm=psf_mm,
            levels=levels or self.levels,
        )


def _low_dose(bench: _Bench, tracers: Sequence[Tracer], setting: Setting, options: PairOptions) -> _Pair:
    (tracer,) = tracers
    activity, mu, labels = bench.paint([Scan(tracer)])
    normal = bench.scan(activity[0], mu, "target", tracer.resolution_mm())
    if options.dose_mode == "thinning":
        low = thin(normal, setting.dose, keyed_generator(*bench.key, "input"))
    else:
        low = bench.scan(activity[0], mu, "input", tracer.resolution_mm(), setting.dose, options.dose_mode)
    return _Pair(low.corrected, [normal], [activity[0]], labels, mu)


def _attenuation(bench: _Bench, tracers: Sequence[Tracer], setting: Setting, options: PairOptions) -> _Pair:
    (tracer,) = tracers
    activity, mu, labels = bench.paint([Scan(tracer)])
    scan = bench.scan(activity[0], mu, "scan", tracer.resolution_mm())
    # One measurement, seen before and after its correction: the noise of both is the same counts.
    uncorrected = (scan.prompts - scan.randoms) / scan.scale
    return _Pair(uncorrected, [scan], [activity[0]], labels, mu)


def _delayed(bench: _Bench, tracers: Sequence[Tracer], setting: Setting, options: PairOptions) -> _Pair:
    (tracer,) = tracers
    activity, mu, _ = bench.paint([Scan(tracer)])
    later = later_patient(bench.patient, setting)
    activity_later, mu_later, labels = bench.paint([Scan(tracer, tracer.minutes + setting.delay_min)], later)
    first = bench.scan(activity[0], mu, "input", tracer.resolution_mm())
    # The same injection: counts per SUV fall by decay alone, those of the slice also by what the tissues gave away.
    detected = _seen(bench.radon, activity_later[0], mu_later, tracer.resolution_mm())
    before = (first.attenuation_factor * first.expected).sum((1, 2, 3))
    trues = bench.levels.trues * (detected / before).to(bench.levels.trues)
    decay = 2 ** (-setting.delay_min / tracer.half_life_min)
    levels = bench.levels._replace(trues=trues)
    delayed = bench.scan(activity_later[0], mu_later, "target", tracer.resolution_mm(), decay, levels=levels)
    return _Pair(first.corrected, [delayed], [activity_later[0]], labels, mu_later)


def _separation(bench: _Bench, tracers: Sequence[Tracer], setting: Setting, options: PairOptions) -> _Pair:
    first, second = tracers
    patient, tables = discordant(bench.patient, tracers, options.discordance)
    bench = bench._replace(patient=patient)
    scans = [Scan(tables[0], first.minutes + setting.stagger_min), Scan(tables[1])]
    activity, mu, labels = bench.paint(scans)
    share = activity_shares(first, second, setting)
    # Positrons of either isotope fly their own distance; the scanner blurs both alike.
    g = bench.radon.geometry
    parts = []
    for part, image, tracer in zip(share, activity, tracers, strict=True):
        flight = gaussian_blur(g.image_size, tracer.positron_range_mm / g.pixel_mm).to(image)
        parts.append(part * (flight @ image @ flight))
    mix = bench.scan(parts[0] + parts[1], mu, "input", PSF_MM)
    total = (mix.attenuation_factor * mix.expected).sum((1, 2, 3))
    targets = []
    for part, name in zip(parts, ("first target", "second target"), strict=True):
        # Counts per SUV as in the mix.
        trues = bench.levels.trues * (_seen(bench.radon, part, mu, PSF_MM) / total).to(bench.levels.trues)
        targets.append(bench.scan(part, mu, name, PSF_MM, levels=bench.levels._replace(trues=trues)))
    truth = [part * image for part, image in zip(share, activity, strict=True)]
    return _Pair(mix.corrected, targets, truth, labels, mu, share)


def _conversion(bench: _Bench, tracers: Sequence[Tracer], setting: Setting, options: PairOptions) -> _Pair:
    patient, tables = discordant(bench.patient, tracers, options.discordance)
    bench = bench._replace(patient=patient)
    activity, mu, labels = bench.paint([Scan(table) for table in tables])
    given, wanted = (
        bench.scan(image, mu, purpose, tracer.resolution_mm())
        for image, purpose, tracer in zip(activity, ("input", "target"), tracers, strict=True)
    )
    return _Pair(given.corrected, [wanted], [activity[1]], labels, mu)


def later_patient(patient: Patient, setting: Setting) -> Patient:
    """Return a patient as they lie in a later scan: moved as a whole, bladder and bowel changed."""
    (x, y), anatomy = setting.movement_mm, patient.anatomy
    if isinstance(anatomy, brain.Head):
        shift = (anatomy.shift[0] + x, anatomy.shift[1] + y)
        return patient._replace(anatomy=anatomy._replace(shift=shift, turn=anatomy.turn + setting.turn_rad))
    pose = anatomy.pose
    moved = pose._replace(x=pose.x + x, y=pose.y + y, turn=pose.turn + setting.turn_rad)
    solids = _displace_bowel(anatomy, Draw(keyed_generator(patient.seed, "bowel, later")))
    if (where := bladder_at(solids)) is not None:
        size = setting.bladder ** (1 / 3)
        for i in (where, where + 1):  # wall and urine
            s = solids[i]
            solids[i] = s._replace(a=scaled(s.a, size), b=scaled(s.b, size), half=s.half * size)
        solids[where + 1] = solids[where + 1]._replace(scale=solids[where + 1].scale * setting.urine)
    return patient._replace(anatomy=anatomy._replace(pose=moved, solids=tuple(solids)))


def bladder_at(solids: Sequence[Solid]) -> int | None:
    """Return the index of the bladder's wall, which its urine follows; None if there is none."""
    for i in range(len(solids) - 1):
        if solids[i].tissue == "muscle" and solids[i + 1].tissue == "urine":
            return i
    return None


def _displace_bowel(anatomy: Trunk, draw: Draw) -> list[Solid]:
    """Return the solids with every loop of bowel and what it holds displaced together."""
    solids, moves = [], {}
    for solid in anatomy.solids:
        if solid.tissue in ("bowel", "duodenum"):
            moves[solid.z] = (draw.normal(0, _BOWEL_MM), draw.normal(0, _BOWEL_MM), draw.normal(0, _BOWEL_MM))
        if (move := moves.get(solid.z)) is not None:  # a filling has the height of what it fills
            dx, dy, dz = move
            solid = solid._replace(x=offset(solid.x, dx), y=offset(solid.y, dy), z=solid.z + dz)
        solids.append(solid)
    return solids


def discordant(patient: Patient, tracers: Sequence[Tracer], share: float) -> tuple[Patient, list[Tracer]]:
    """Let a share of a trunk's lesions be seen by only one of two tracers.

    Such a lesion is of a kind of its own, for which only one tracer's table has rows. (What a table has no row for, it
    does not show: cysts and inflammation, for example, are discordant whatever the share.)

    Args:
        patient: whose lesions.
        tracers: the two tables.
        share: of the lesions that are discordant; which of the tracers shows them has equal chances.

    Returns:
        The patient and the tables, to be painted together.
    """
    tables = [tracer._replace(lesions=dict(tracer.lesions)) for tracer in tracers]
    lesions = []
    for k, lesion in enumerate(patient.lesions):
        draw = Draw(keyed_generator(patient.seed, patient.region, "discordance", k))
        alone, which = draw.chance(share), draw.integer(0, 1)
        if alone and isinstance(lesion, Lesion):
            kinds = tuple(f"{kind}, only {tracers[which].name}" for kind in lesion.kinds)
            for kind, new in zip(lesion.kinds, kinds, strict=True):
                if kind in tracers[which].lesions:
                    tables[which].lesions[new] = tracers[which].lesions[kind]
            lesion = lesion._replace(kinds=kinds)
        lesions.append(lesion)
    return patient._replace(lesions=tuple(lesions)), tables  # type: ignore[arg-type]


def _seen(radon: Radon, activity: Tensor, attenuation: Tensor, psf_mm: float) -> Tensor:
    """Return the sum of each slice's attenuated lines, ``(n,)``, to which its trues are proportional."""
    g = radon.geometry
    blur = gaussian_blur(g.image_size, psf_mm / g.pixel_mm).to(activity)
    lines = radon.project(torch.stack([blur @ activity @ blur, attenuation], dim=1))
    return (torch.exp(-lines[:, 1]) * lines[:, 0]).sum((1, 2))
