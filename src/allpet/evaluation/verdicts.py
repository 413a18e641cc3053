"""What each number of the evaluation means, and whether it is as real slices have it, in words."""

from __future__ import annotations

MEANING = {
    "kid": ("low", "kernel distance (KID's statistic)"),
    "mmd": ("low", "kernel distance, Gaussian kernel"),
    "sw": ("low", "sliced Wasserstein distance"),
    "precision": ("high", "share of samples within reach of a real slice"),
    "recall": ("high", "share of real slices within reach of a sample"),
    "density": ("same", "real slices that a sample is within reach of, over k"),
    "coverage": ("high", "share of real slices with a sample within reach"),
    "energy_distance": ("low", "energy distance of the sinograms, over their root mean square"),
    "diversity": ("same", "mean distance of two samples, over their mean norm"),
    "spectrum_worst": ("low", "largest factor between the power spectra down to a period"),
    "spectrum_image": ("one", "power of images over real ones at a period"),
    "spectrum_bins": ("one", "power along the bins over real ones at a period"),
    "spectrum_angle": ("one", "power over real ones in the octave about an angular harmonic"),
    "activity_ratio": ("one", "mean activity over the real mean"),
    "activity_distance": ("low", "Wasserstein distance of total activities, over the real mean"),
    "suv_distance": ("low", "Wasserstein distance of image values, in the data's units"),
    "row_sum_cv": ("low", "variation of the views' sums"),
    "centre_residual": ("low", "distance of the centres of mass from a sinusoid, share of the bins"),
    "hl_residual": ("low", "Helgason-Ludwig residual"),
    "seam_jump": ("low", "step over the seam, over the usual step between views"),
    "copy_rate_third": ("low", "share with d1/d2 below 1/3"),
    "copy_rate": ("low", "share with d1/d2 below the calibrated threshold"),
    "near_rate": ("low", "share nearer to a training slice than 99 % of held-out slices"),
    "copy_ratio": ("same", "median d1/d2, modulo symmetries"),
    "nearest_training": ("same", "median distance to the nearest training slice, modulo symmetries"),
    "copy_threshold": ("", "d1/d2 below which a sample is called a copy"),
    "prompt_obeyed": ("high", "share that shows what was asked for"),
    "utility": ("high", "share of real slices that a classifier trained on samples names"),
}
"""By the beginning of a name: whether low, high, 1 or the same as of real slices is good, and what it is."""


FEW = "too few slices to tell"
"""The verdict where anything at all would pass."""


def meaning(name: str) -> tuple[str, str]:
    """Return which values of a number are good (low, high, one, same, or empty), and what the number is."""
    return next(said for start, said in MEANING.items() if name.startswith(start))


def verdict(name: str, value: float, floor: float, std: float) -> str:
    """Judge a number beside its floor, in words.

    Args:
        name: of the number.
        value: of the samples.
        floor: of real slices.
        std: standard deviation of the difference.
    """
    good, _ = meaning(name)
    if not good:
        return ""
    away = value - floor
    if abs(away) <= 2 * std + 1e-6 * abs(floor):
        # where nothing at all would pass as well, there are too few slices to say so
        blind = 2 * std >= {"high": floor, "same": floor, "one": 1.0}.get(good, float("inf"))
        return FEW if blind and floor > 0 else "as real"
    if good == "one":
        return f"{abs(value - 1):.0%} too {'much' if value > 1 else 'little'}"
    side = "above" if away > 0 else "below"
    if good != "same" and (away > 0) == (good == "high"):
        return f"{side} real"
    deviations = f" ({abs(away) / std:.0f} sd)" if std > 0 else ""
    if floor <= 0 or value > 1000 * floor:
        return f"above a floor of about 0{deviations}"
    if value > 2 * floor:
        return f"{value / floor:.1f} x real{deviations}"
    return f"{abs(away) / floor:.0%} {side} real{deviations}"
