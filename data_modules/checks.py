"""What to look for in slices, and how to say it: findings are rows of file, finding and remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allpet.io import content_hash
from data_modules.folder import FoundFile, patients_of, splits_of

ALL = "(all)"


class Row(NamedTuple):
    """One finding.

    Attributes:
        level: ``ERROR``, ``WARN`` or ``INFO``.
        file: file relative to the folder, or ``(all)``.
        finding: what was found, half a sentence.
        remedy: what to do, half a sentence; empty for INFO.
    """

    level: str
    file: str
    finding: str
    remedy: str = ""


def rows_for(level: str, files: Sequence[str], finding: str, remedy: str) -> list[Row]:
    """Return one row per file; of more than ten files only the first is named."""
    if len(files) > 10:
        return [Row(level, f"{files[0]} and {len(files) - 1} more", finding, remedy)]
    return [Row(level, name, finding, remedy) for name in files]


def decide_kind(files: list[FoundFile]) -> tuple[str, str]:
    """Tell images from sinograms, and say why.

    An image lies in the circle that every view covers; a sinogram does not: its first and last views, at the top and
    bottom of the array, meet the circle in a single bin.
    """
    alike = [_is_disc(image) for found in files for image in found.slices]
    share = f"{sum(alike)} of {len(alike)} slices are square and zero outside the inscribed circle"
    return ("image" if 2 * sum(alike) > len(alike) else "sinogram"), share


def _is_disc(image: np.ndarray) -> bool:
    n = len(image)
    if image.shape != (n, n):
        return False
    axis = np.arange(n) - (n - 1) / 2
    outside = np.hypot(axis, axis[:, None]) > n / 2
    top = np.abs(image).max()
    return bool(top > 0 and np.abs(image[outside]).max(initial=0) <= 1e-3 * top)


def check_slices(kind: str, files: list[FoundFile]) -> list[Row]:
    """Look at slices of one shape.

    Args:
        kind: ``sinogram`` or ``image``.
        files: at least one.
    """
    owner = [found.name for found in files for _ in found.slices]
    values = np.concatenate([found.slices for found in files])
    rows: list[Row] = []
    n = len(values)
    flat = values.reshape(n, -1)
    low, top = flat.min(1), flat.max(1)

    empty = [owner[i] for i in np.flatnonzero(low == top)]
    if empty:
        level = "ERROR" if len(empty) > 0.05 * n else "WARN"
        rows += rows_for(level, list(dict.fromkeys(empty)), f"{len(empty)} of all {n} slices are empty", "remove them")
    seen: dict[str, int] = {}
    pairs = []
    for i in np.flatnonzero(low < top).tolist():
        first = seen.setdefault(content_hash(values[i]), i)
        if first != i:
            pairs.append(f"{owner[first]} = {owner[i]}")
    if pairs:
        remedy = "remove copies, or training and validation may share slices"
        rows.append(Row("WARN", ALL, f"{len(pairs)} slice(s) occur twice ({', '.join(pairs[:3])})", remedy))
    if n > 1 and top.max() > 0 and np.ptp(top) <= 1e-6 * top.max():
        finding = f"every slice has the maximum {top[0]:g}: normalised one by one, so counts and SUV are lost"
        rows.append(Row("WARN", ALL, finding, "scale all slices of a patient alike if their ratios matter"))
    if kind == "sinogram":
        rows += _check_sinograms(values[low < top])
    else:
        finding = "images are projected: their sinograms' noise is not that of a scanner"
        rows.append(Row("WARN", ALL, finding, "use measured sinograms where there are any"))
    negative = float((values < 0).mean())
    rows.append(Row("INFO", ALL, f"{n} slice(s) of {by(values.shape[1:])} in {len(files)} file(s)"))
    rows.append(Row("INFO", ALL, f"values from {low.min():.4g} to {top.max():.4g}, {negative:.1%} negative"))
    return rows


def check_tables(files: list[FoundFile]) -> list[Row]:
    """Look at what files say of themselves: prompts below zero, tracers and regions nobody knows."""
    rows: list[Row] = []
    if all(found.scan is None for found in files):
        return rows
    from allpet.prompts import REGIONS, TRACERS, prompt_index  # brings torch, which bare arrays need not wait for

    for found in files:
        if found.scan is None:
            continue
        if "prompts" in found.scan.state and (low := float(found.slices.min())) < 0:
            finding = f"it holds {low:.4g} where its state is prompts, which are counts"
            rows.append(Row("ERROR", found.name, finding, "correct the state, or store counts before subtraction"))
        for name, vocabulary in (("tracer", TRACERS), ("region", REGIONS)):
            for entry in sorted(set(found.column(name))):
                try:
                    prompt_index(entry, vocabulary, name)
                except ValueError as error:
                    finding, _, remedy = str(error).rstrip(".").partition("; ")
                    rows.append(Row("ERROR", found.name, finding[0].lower() + finding[1:], remedy))
    tracers = Counter(entry for found in files for entry in found.column("tracer"))
    if tracers:
        rows.append(Row("INFO", ALL, ", ".join(f"{n} slice(s) of {name}" for name, n in tracers.most_common())))
    return rows


def check_leakage(files: list[FoundFile], pattern: str | None = None) -> list[Row]:
    """Look for patients and slices in two splits, where files or folders say what is trained and tested on."""
    uses = splits_of(files)
    if not any(uses):
        return []
    rows = []
    try:
        patients = patients_of(files, pattern)
    except ValueError:
        return []  # the pattern is at fault, which is said elsewhere
    whose: dict[str, set[str]] = {}
    for name, use in zip(patients.names, uses, strict=True):
        whose.setdefault(name, set()).add(use)
    shared = sorted(name for name, found in whose.items() if len(found - {""}) > 1) if patients.known else []
    if shared:
        finding = f"{len(shared)} patient(s) in two splits, the first is {shared[0]}"
        rows.append(Row("ERROR", ALL, finding, "keep all slices of a patient in one split"))
    seen: dict[str, tuple[str, str]] = {}
    pairs = []
    owners = [found.name for found in files for _ in found.slices]
    for one, use, owner in zip((one for found in files for one in found.slices), uses, owners, strict=True):
        if use and one.min() < one.max():
            first = seen.setdefault(content_hash(one), (use, owner))
            if first[0] != use:
                pairs.append(f"{first[1]} = {owner}")
    if pairs:
        finding = f"{len(pairs)} slice(s) in two splits ({', '.join(pairs[:3])})"
        rows.append(Row("ERROR", ALL, finding, "remove the copies"))
    return rows


def _check_sinograms(values: np.ndarray) -> list[Row]:
    """Look for what the Radon transform of an image cannot be. Medians, since single slices may be odd.

    Args:
        values: ``(slices, views, bins)``, none of them empty.
    """
    rows: list[Row] = []
    if not len(values):
        return rows
    n_views, n_bins = values.shape[1:]
    sums, across = values.sum(2, dtype=np.float64), values.sum(1, dtype=np.float64)
    variation, across_variation = (
        float(np.median(s.std(1) / np.maximum(np.abs(s.mean(1)), 1e-30))) for s in (sums, across)
    )
    if across_variation < 0.5 * variation:
        finding = f"columns sum alike (+-{across_variation:.0%}) and rows do not (+-{variation:.0%}): axes are swapped?"
        rows.append(Row("WARN", ALL, finding, "store slices as (views, bins)"))
        return rows
    # Attenuation changes from view to view little by little, noise, which low doses have much of, does not.
    noise = np.square(np.diff(sums, 2, axis=1)).mean(1) / 6  # 1 - 2 + 1: six times the variance of a view
    slowly = np.sqrt(np.maximum(sums.var(1) - noise, 0)) / np.maximum(np.abs(sums.mean(1)), 1e-30)
    if (variation := float(np.median(slowly))) > 0.04:
        finding = f"views sum to values that vary by {variation:.0%}: not corrected for attenuation, or no sinograms"
        rows.append(Row("WARN", ALL, finding, "correct them, or say kind=image"))
    # Averaged over the views, so that noise does not count.
    edges = values[:, :, [0, -1]].mean(1).max(1) / np.maximum(values.max((1, 2)), 1e-30)
    if (edge := float(np.median(edges))) > 0.05:
        finding = f"the outermost bins hold {edge:.0%} of the maximum: the object is cut off"
        rows.append(Row("WARN", ALL, finding, "store all bins that see activity"))
    if n_views % 2 == 0 and (misfit := _full_turn_misfit(values)) is not None:
        finding = f"the second half of the views repeats the first, mirrored (to {misfit:.0%}): 360 degrees?"
        rows.append(Row("WARN", ALL, finding, "say full_turn=true to fold them to 180"))
        return rows
    # Centre of mass of a centred acquisition: x cos(theta) + y sin(theta), without a constant.
    angles = np.arange(n_views) * (np.pi / n_views)
    harmonics = np.stack([np.cos(angles), np.sin(angles), np.ones(n_views)], 1)
    bins = np.arange(n_bins) - (n_bins - 1) / 2
    whole = np.abs(sums).min(1) > 0.1 * np.abs(sums).max(1)  # a view that sums to nearly zero has no centre
    if whole.any():
        centre = (values[whole] @ bins) / sums[whole]
        offset = float(np.median(np.linalg.lstsq(harmonics, centre.T, rcond=None)[0][2]))
        if abs(offset) > 1:
            finding = f"the axis of rotation lies {offset:+.1f} bins off the middle"
            rows.append(Row("WARN", ALL, finding, "shift the bins so that it lies in the middle"))
    return rows


def _full_turn_misfit(values: np.ndarray) -> float | None:
    """Return how well the second half of the views mirrors the first; None if not convincingly.

    An object that is round and centred looks alike in all views; it is not taken for a full turn.
    """
    half = values.shape[1] // 2
    first, second = values[:, :half], values[:, half:]

    def misfit(other: np.ndarray) -> float:
        norm = np.linalg.norm(first, axis=(1, 2))
        return float(np.median(np.linalg.norm(first - other, axis=(1, 2)) / np.maximum(norm, 1e-30)))

    mirrored = misfit(second[:, :, ::-1])
    return mirrored if mirrored < 0.3 and mirrored < 0.5 * misfit(second) else None


def by(shape: tuple[int, ...]) -> str:
    """Spell a shape."""
    return " x ".join(map(str, shape))
