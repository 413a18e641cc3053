"""The table, the pictures and the conclusions of a downstream study, all computed from its rows.

*Ours* are bridges: plain, attending, or one for all tasks. What is expected of each task is written beside what was
found; a row that was not run is said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from allpet.consistency import NEIGHBOURHOOD_MM
from allpet.metrics import standard_image
from allpet.prompts import TRACERS
from allpet.simulation.tasks import RELATED
from callbacks.figures import DIFFERENCE, Tile, draw_grid, save_figure, top
from data_modules.paired_set import PairedSet, read_pairs
from studies.downstream import IDENTITIES, LONGER, SEVERAL, TIMES, WITHOUT, expanded, generated_file, label_of
from studies.downstream_plan import REDUCTION, UPDATES, Plan
from studies.downstream_scores import interval
from studies.few_shot import spread
from studies.rows import Outcome

OURS = ("bridge", "attention", "multi_task")
REGRESSIONS = ("regression", "regression_pixels")
LOW_DOSE_LIMITS = {"tissue_bias": 0.02, "lesion_max_bias": 0.10}
SHOWN = {
    "psnr": "psnr",
    "ssim": "ssim",
    "l2": "l2",
    "psnr_image": "psnr_image",
    "ssim_image": "ssim_image",
    "l2_image": "l2_image",
    "tissue_bias": "tissue_bias_%",
    "tissue_chance": "tissue_chance_%",
    "tissue_signed": "tissue_signed_%",
    "tissue_sd": "tissue_sd_%",
    "tissue_patients": "tissue_patients_%",
    "worst_bias": "worst_bias_%",
    "lesion_max_bias": "lesion_max_%",
    "lesion_max_bias_abs": "lesion_max_size_%",
    "lesion_mean_bias": "lesion_mean_%",
    "lesion_mean_bias_abs": "lesion_mean_size_%",
    "lesion_recovery": "lesion_recovery",
    "lesion_leak": "lesion_leak_%",
    "hl0": "hl0",
    "coverage_90": "coverage_90_%",
    "line_seconds": "seconds",
}
"""Columns of the table, and what they are called there; those that end in % are shares in the rows."""
_GROUP = ("method", "pairs", "nfe", "samples", "turned", "attention", "updates", "neighbourhood_mm")
_PICTURED = {
    "gauss_oracle": [(0, 0)],
    "osem_oracle": [(0, 0)],
    "regression": [(1, 0)],
    "ddbm": [(119, 0)],
    "bridge": [(1, 0), (5, 0), (20, 0), (1, None)],
    "prior": [(1, 0)],
}
"""Which lines of which methods are shown: numbers of calls and of updates, None for the most."""
Lines = Sequence[dict[str, Any]]


def summary(done: Lines) -> list[dict[str, Any]]:
    """Return one line per method, pairs and way to sample: mean and, over seeds, standard deviation."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in expanded(list(done)):
        groups.setdefault(tuple(line[name] for name in _GROUP), []).append(line)
    table = []
    for values, group in groups.items():
        shown = [
            {title: line[name] * (100 if title.endswith("%") else 1) for name, title in SHOWN.items() if name in line}
            for line in group
        ]
        table.append(
            dict(zip(_GROUP, values, strict=True)) | {"seeds": len(group)} | spread(shown, list(SHOWN.values()))
        )
    return table


def conclusions(plan: Plan, outcome: Outcome) -> list[str]:
    """Say what was found of all that the task is expected to show."""
    found = _Found(plan, expanded(outcome.done))
    if plan.task == "low_dose":
        said = [
            _against_oracle(found),
            _against_regression(found),
            _limits(found, LOW_DOSE_LIMITS),
            _fitting(found),
            _least_biased(found),
            _dbim_against_ddbm(found),
            _attention(plan, outcome),
            _coverage(found),
            _turning(found),
            _pretraining(found, plan, outcome),
            _prior(found),
            _parts(plan, outcome),
        ]
    elif plan.task == "attenuation":
        said = [_limits(found, {"tissue_bias": 0.05, "worst_bias": 0.10, "hl0": 0.03}), _against_regression(found)]
        said += [_fitting(found), _turning(found)]
    else:
        said = [_biases_beside(found, other) for other in (*IDENTITIES, "regression")]
        said += [_fitting(found), _turning(found)]
    said += [_one_for_all(found), _longer(found), _synthesis(found, plan, outcome), _lesions(found)]
    return [sentence for sentence in said if sentence]


class _Found:
    """The lines of a study, looked up by what they are, averaged over seeds."""

    def __init__(self, plan: Plan, lines: Lines) -> None:
        self.plan, self.lines = plan, lines

    def of(self, method: str, pairs: int | None = None, **facts: Any) -> list[dict[str, Any]]:
        """Return the lines of a method with the study's number of pairs, or another."""
        wanted = {"method": method, "pairs": pairs or self.plan.pairs, **facts}
        return [line for line in self.lines if all(line[name] == value for name, value in wanted.items())]

    def settings(self, methods: Sequence[str], limit: int = 10_000, **facts: Any) -> list[list[dict[str, Any]]]:
        """Return groups of lines, seeds together, of all ways to sample with at most so many calls per slice."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for method in methods:
            for line in self.of(method, **facts):
                if line["nfe"] * line["samples"] <= limit and not str(line["attention"]).startswith("roi"):
                    groups.setdefault(tuple(line[name] for name in _GROUP), []).append(line)
        return list(groups.values())

    def best(self, methods: Sequence[str], limit: int = 10_000, **facts: Any) -> list[dict[str, Any]]:
        """Return the group with the largest mean PSNR, or nothing."""
        return max(self.settings(methods, limit, **facts), key=lambda group: over(group, "psnr"), default=[])


def over(group: Lines, name: str) -> float:
    """Return the mean of a column."""
    return mean(float(line[name]) for line in group)


def named(group: Lines) -> str:
    """Say which method and way to sample a group is."""
    line = group[0]
    calls = f", {line['nfe']} call{'s' * (line['nfe'] != 1)}" if line["nfe"] else ""
    many = f", mean of {line['samples']}{' turned' * line['turned']} samples" if line["samples"] > 1 else ""
    attention = f", attention {line['attention']}" if line["attention"] else ""
    updates = f", {line['updates']} updates of data consistency" if line["updates"] else ""
    updates += ", every pixel alone" * bool(line["updates"] and not line["neighbourhood_mm"])
    return f"{line['method']}{calls}{many}{attention}{updates} ({len(group)} seed{'s' * (len(group) != 1)})"


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _missing(*methods: str) -> str:
    return f"Not all of {', '.join(methods)} have been run."


def _against_oracle(found: _Found) -> str:
    ours, oracle = found.best(OURS), found.of("gauss_oracle")
    if not ours or not oracle:
        return _missing("bridge", "gauss_oracle")
    gain = over(ours, "psnr") - over(oracle, "psnr")
    said = (
        f"Reduction {REDUCTION}, sinogram PSNR: our best, {named(ours)}, {over(ours, 'psnr'):.2f} dB, best-Gauss "
        f"oracle {over(oracle, 'psnr'):.2f} dB: {gain:+.2f} dB where +2 is expected: {_verdict(gain >= 2)}."
    )
    if image := found.of("osem_oracle"):
        gain = over(ours, "psnr") - over(image, "psnr")
        said += (
            f" The best OSEM image with a Gaussian, projected, which is told the truth, too, has "
            f"{over(image, 'psnr'):.2f} dB: ours {gain:+.2f} dB."
        )
    return said


def _against_regression(found: _Found) -> str:
    ours, theirs = found.best(OURS), found.best(REGRESSIONS)
    if not ours or not theirs:
        return _missing("bridge", "regression")
    gain = over(ours, "psnr") - over(theirs, "psnr")
    said = (
        f"Sinogram PSNR of our best, {named(ours)}, against the regression U-Net's best, {named(theirs)}: {gain:+.2f} "
        f"dB; at least as good {_verdict(gain >= 0)}."
    )
    if theirs[0]["updates"] and (ours := found.best(OURS, updates=0)):
        theirs = found.best(REGRESSIONS, updates=0)
        gain = over(ours, "psnr") - over(theirs, "psnr")
        said += f" Of neither fitted to the input: {named(ours)} against {named(theirs)} {gain:+.2f} dB."
    return said


def _limits(found: _Found, limits: dict[str, float]) -> str:
    """Hold the row of the highest PSNR against limits."""
    ours = found.best(OURS)
    if not ours:
        return _missing("bridge")
    identity = found.of("identity")
    measured = ""
    if identity and all("tissue_chance" in line for line in identity):
        bias, chance = (100 * over(identity, name) for name in ("tissue_bias", "tissue_chance"))
        measured = f" The input has a mean tissue bias of {bias:.3g} %, and would have {chance:.2g} % by chance alone."
    return f"Our best, {named(ours)}: {_within(ours, limits)}.{measured}"


def _within(ours: Lines, limits: dict[str, float]) -> str:
    words = {"tissue_bias": "mean tissue bias", "worst_bias": "worst tissue", "hl0": "Helgason-Ludwig moment 0"}
    parts = []
    for name, limit in limits.items():
        value, times, unit = over(ours, name), *((1, "") if name == "hl0" else (100, " %"))
        if name == "lesion_max_bias":
            # single lesions may be off in either direction, which their mean does not show
            size = over(ours, "lesion_max_bias_abs")
            parts.append(
                f"lesion SUVmax bias {100 * value:+.3g} % in the mean (at most {100 * limit:g} %: "
                f"{_verdict(abs(value) <= limit)}), {100 * size:.3g} % in size ({_verdict(size <= limit)})"
            )
            continue
        parts.append(
            f"{words[name]} {times * value:.3g}{unit} (at most {times * limit:g}{unit}: "
            f"{_verdict(value <= limit)}{_with_sign(ours) if name == 'tissue_bias' else ''})"
        )
    return "; ".join(parts)


def _with_sign(ours: Lines) -> str:
    """Return mean and deviation over tissues, as regional biases are mostly published; nothing where not measured."""
    if not all("tissue_signed" in line for line in ours):
        return ""
    signed, deviation = (100 * over(ours, name) for name in ("tissue_signed", "tissue_sd"))
    return f", with its sign {signed:+.1f} ± {deviation:.1f} %"


def _fitting(found: _Found) -> str:
    """Say what updates towards the measured input, or what they bring to it carried over, do to results of one call."""
    parts = []
    for method in ("bridge", "regression", "regression_pixels", "prior"):
        numbers = [0, *(updates for updates, _ in found.plan.fitting)]
        groups = [found.of(method, nfe=1, samples=1, updates=n) for n in numbers]
        if all(groups):
            parts.append(f"{method} {'; '.join(map(_in_short, groups))}")
    if not parts:
        return _missing("bridge with data consistency")
    shared = ", ".join(str(updates) for updates, width in found.plan.fitting if width)
    alone = ", ".join(str(updates) for updates, width in found.plan.fitting if not width)
    what = "Data consistency carried over from the input" if found.plan.task in RELATED else "Data consistency"
    return (
        f"{what}, 0 updates, {alone} with every pixel alone{f', and {shared}' * bool(shared)} after one call "
        f"(sinogram PSNR, mean lesion SUVmax bias, mean tissue bias): {'. '.join(parts)}."
    )


def _in_short(group: Lines) -> str:
    return (
        f"{over(group, 'psnr'):.2f} dB, lesions {100 * over(group, 'lesion_max_bias'):+.1f} %, tissues "
        f"{100 * over(group, 'tissue_bias'):.1f} %"
    )


def _least_biased(found: _Found) -> str:
    """Hold our row of the least biased lesions, of those that beat the oracle, against all that is expected of one."""
    groups, oracle, theirs = found.settings(OURS), found.of("gauss_oracle"), found.best(REGRESSIONS)
    if not groups or not oracle or not theirs:
        return _missing("bridge", "gauss_oracle", "regression")
    good = [group for group in groups if over(group, "psnr") >= over(oracle, "psnr") + 2]
    ours = min(good or groups, key=lambda group: abs(over(group, "lesion_max_bias")))
    gain, other = (over(ours, "psnr") - over(group, "psnr") for group in (oracle, theirs))
    return (
        f"Of ours the least biased lesions has {named(ours)}: {over(ours, 'psnr'):.2f} dB, {gain:+.2f} dB to the "
        f"best-Gauss oracle (+2: {_verdict(gain >= 2)}), {other:+.2f} dB to the regression U-Net's best; "
        f"{_within(ours, LOW_DOSE_LIMITS)}."
    )


def _dbim_against_ddbm(found: _Found) -> str:
    """Compare samples of few calls with DDBM's; the mean, which one call returns, has a higher PSNR by what it is."""
    ours = [group for group in found.settings(("bridge",), 10, samples=1, updates=0) if group[0]["nfe"] > 1]
    theirs = found.of("ddbm", nfe=119)
    if not ours or not theirs:
        return _missing("bridge", "ddbm")

    def apart(group: Lines) -> str:
        psnr, ssim, bias = (over(group, name) - over(theirs, name) for name in ("psnr", "ssim", "tissue_bias"))
        holds = psnr >= -0.1 and ssim >= -0.005 and 100 * bias <= 0.2
        return (
            f"{named(group)}: PSNR {psnr:+.2f} dB, SSIM {ssim:+.4f}, tissue bias {100 * bias:+.2f} points "
            f"({_verdict(holds)})"
        )

    best = max(ours, key=lambda group: over(group, "psnr"))
    said = (
        f"Against DDBM as published, {theirs[0]['nfe']} calls (at most .1 dB, .005 and .2 points worse): {apart(best)}"
    )
    once = [found.of(name, nfe=1, samples=1, updates=0) for name in ("bridge", "bridge_without_sinogram_loss")]
    own = [found.of("ddbm", nfe=nfe) for nfe in (5, 10)]
    further = [apart(group) for group in (*own, *once) if group]
    return f"{'; '.join([said, *further])}. One call returns the mean; DDBM is trained without the sinogram's error."


def _lesions(found: _Found) -> str:
    """Say how many lesions there are to judge."""
    line = next((line for line in found.lines if "lesions" in line), None)
    if line is None:
        return ""
    return f"Lesions: {line['lesions']} that can be seen, of {line['lesion_patients']} patients."


def _attention(plan: Plan, outcome: Outcome) -> str:
    kept = [
        torch.load(plan.folder / row["row"] / "scores.pt", weights_only=True)
        for row in outcome.done
        if row["method"] == "attention" and (plan.folder / row["row"] / "scores.pt").exists()
    ]
    if not kept:
        return _missing("attention")
    said = []
    for updates in (0, UPDATES[-1]):
        parts = []
        for attention, name in (
            ("1", "hot and cold areas"),
            ("roi", "lesions drawn as ROI"),
            ("roi 2", "the same of strength 2"),
        ):
            labels = [_once(strength, updates) for strength in ("0", attention)]
            for kind, column, words, change in (
                ("lesions", "lesion_recovery", "contrast recovery", lambda after, before: after - before),
                (
                    "lesions",
                    "lesion_max_bias",
                    "size of the SUVmax bias",
                    lambda after, before: after.abs() - before.abs(),
                ),
                ("targets", "l2_elsewhere", "relative error elsewhere", lambda after, before: after - before),
            ):
                parts.append(f"{name}, {words} {_interval(kept, *labels, kind, column, change)}")
        moved = [
            line
            for line in expanded(outcome.done)
            if (line["method"], line["attention"], line["updates"]) == ("attention", "roi moved", updates)
        ]
        inside, outside = over(moved, "change_in_roi"), over(moved, "change_outside_roi")
        who = f"the network and {updates} updates of the fit attend" if updates else "the network alone attends"
        said.append(
            f"Where {who}, strength 1 against 0, mean difference and 95 % interval: {'; '.join(parts)}. A ROI moved "
            f"away from the lesions changes the image by {100 * inside:.2g} % of its mean inside and "
            f"{100 * outside:.2g} % outside."
        )
    return " ".join(said)


def _once(attention: str, updates: int, nfe: int = 1, neighbourhood_mm: float = NEIGHBOURHOOD_MM) -> str:
    facts = {"nfe": nfe, "samples": 1, "turned": False, "attention": attention, "updates": updates}
    return label_of({**facts, "neighbourhood_mm": neighbourhood_mm})


def _interval(
    kept: Sequence[dict[str, Any]],
    before: str,
    after: str,
    kind: str,
    column: str,
    change: Callable[[Tensor, Tensor], Tensor],
) -> str:
    differences = [change(one[after][kind][column], one[before][kind][column]) for one in kept]
    middle, low, high = interval(differences, [one[before][kind]["patient"] for one in kept])
    return f"{middle:+.3g} ({low:+.3g} to {high:+.3g})"


def _coverage(found: _Found) -> str:
    groups = [group for group in found.settings(SEVERAL) if "coverage_90" in group[0]]
    if not groups:
        return _missing("bridge with several samples")
    parts = []
    for group in groups:
        gauss, quantile = (100 * over(group, name) for name in ("coverage_90", "coverage_90_quantile"))
        parts.append(f"{named(group)} {gauss:.1f} % ({quantile:.1f} %; 85 to 95 %: {_verdict(85 <= gauss <= 95)})")
    return (
        "The 90 % interval of several samples, mean +- 1.645 std (or between their quantiles), holds the truth in so "
        f"many of the object's bins: {'; '.join(parts)}. The calibration curve says how far off."
    )


def _turning(found: _Found) -> str:
    """Say what orientations bring: to one call, and to as many samples as are drawn without."""
    parts = []
    for method in SEVERAL:
        one, several = found.of(method, nfe=1, samples=1, updates=0), found.of(method, nfe=1, turned=True, updates=0)
        if one and several:
            count = f"one call in {several[0]['samples']} orientations"
            parts.append(f"{method}, one call, {_in_short(one)}; {count}, {_in_short(several)}")
    lying, turned = (found.of("bridge", nfe=5, turned=way, updates=0) for way in (False, True))
    if (lying := [line for line in lying if line["samples"] > 1]) and turned:
        shares = [f"{100 * over(group, 'coverage_90'):.1f} %" for group in (lying, turned)]
        parts.append(
            f"{named(lying)}, {_in_short(lying)}, 90 % intervals hold {shares[0]}; {named(turned)}, "
            f"{_in_short(turned)}, they hold {shares[1]}"
        )
    if not parts:
        return _missing("bridge with several samples")
    return (
        "Samples drawn in several orientations (sinogram PSNR, mean lesion SUVmax bias, mean tissue bias): "
        f"{'. '.join(parts)}."
    )


def _pretraining(found: _Found, plan: Plan, outcome: Outcome) -> str:
    parts = []
    for pairs in sorted({line["pairs"] for line in found.lines}):
        gain = _gain(plan, outcome, "bridge", "bridge_scratch", pairs)
        if gain is not None:
            parts.append(f"{pairs} pairs {gain[0]:+.2f} dB ({gain[1]:+.2f} to {gain[2]:+.2f}, {gain[3]} seeds)")
    if not parts:
        return _missing("bridge", "bridge_scratch")
    return (
        "Begun from stage 2 against from scratch, sinogram PSNR of one call and 95 % interval over patients: "
        f"{', '.join(parts)}."
    )


def _parts(plan: Plan, outcome: Outcome) -> str:
    gains = {method: _gain(plan, outcome, "bridge", method, plan.pairs) for method in WITHOUT}
    parts = [
        f"{method.removeprefix('bridge_without_').replace('_', ' ')} {gain[0]:+.2f} dB "
        f"({gain[1]:+.2f} to {gain[2]:+.2f}, {gain[3]} seeds)"
        for method, gain in gains.items()
        if gain is not None
    ]
    if not parts:
        return _missing("bridge", *WITHOUT)
    return (
        "What each part of the bridge brings, sinogram PSNR of one call and 95 % interval over patients: "
        f"{', '.join(parts)}."
    )


def _gain(plan: Plan, outcome: Outcome, ours: str, theirs: str, pairs: int) -> tuple[float, float, float, int] | None:
    """Return how much PSNR one method gains on another by one call: mean, 95 % interval and number of seeds."""
    kept: dict[str, dict[int, dict[str, Any]]] = {ours: {}, theirs: {}}
    for row in outcome.done:
        file = plan.folder / row["row"] / "scores.pt"
        if row["method"] in kept and row["pairs"] == pairs and file.exists():
            kept[row["method"]][row["seed"]] = torch.load(file, weights_only=True)["1-1-"]["targets"]
    seeds = sorted(kept[ours].keys() & kept[theirs].keys())
    if not seeds:
        return None
    differences = [kept[ours][seed]["psnr"] - kept[theirs][seed]["psnr"] for seed in seeds]
    return *interval(differences, [kept[ours][seed]["patient"] for seed in seeds]), len(seeds)


def _prior(found: _Found) -> str:
    prior, given, oracle = found.best(("prior",)), found.of("identity"), found.of("gauss_oracle")
    if not prior or not given or not oracle:
        return _missing("prior", "identity", "gauss_oracle")
    return (
        f"Without pairs, stage 2 alone, {named(prior)}: {over(prior, 'psnr'):.2f} dB; the input has "
        f"{over(given, 'psnr'):.2f} dB and the oracle {over(oracle, 'psnr'):.2f} dB."
    )


def _biases_beside(found: _Found, other: str) -> str:
    ours, theirs = found.best(OURS), found.best((other,))
    if not ours or not theirs:
        return _missing("bridge", other)
    mine, other_value = over(ours, "psnr"), over(theirs, "psnr")
    parts = [f"sinogram PSNR {mine:.2f} dB against {other_value:.2f} dB: {'' if mine > other_value else 'not '}better"]
    for name, words in (
        ("tissue_bias", "mean tissue bias"),
        ("lesion_mean_bias_abs", "mean size of lesion SUVmean bias"),
    ):
        mine, other_value = over(ours, name), over(theirs, name)
        verdict = "better" if mine < other_value else "not better"
        parts.append(f"{words} {100 * mine:.1f} % against {100 * other_value:.1f} %: {verdict}")
    return f"Our best, {named(ours)}, beside {named(theirs)}: {'; '.join(parts)}."


def _one_for_all(found: _Found) -> str:
    one, own = (found.of(name, nfe=1, samples=1, updates=0) for name in ("multi_task", "bridge"))
    if not one or not own:
        return _missing("multi_task", "bridge")
    return (
        "One bridge for all tasks and the task's own, one call (sinogram PSNR, mean lesion SUVmax bias, mean tissue "
        f"bias): {_in_short(one)}; {_in_short(own)}."
    )


def _longer(found: _Found) -> str:
    """Say what more steps bring."""
    parts = []
    ways = [0, *(updates for updates, _ in found.plan.fitting[-1:])]
    for longer, method in LONGER.items():
        for updates in ways:
            groups = [found.of(name, nfe=1, samples=1, updates=updates) for name in (method, longer)]
            if all(groups):
                fitted = f", {updates} updates," * bool(updates)
                parts.append(f"{method}{fitted} {'; '.join(map(_in_short, groups))}")
    if not parts:
        return _missing(*LONGER)
    return (
        f"{found.plan.steps} steps and {TIMES} times as many, one call (sinogram PSNR, mean lesion SUVmax bias, mean "
        f"tissue bias): {'. '.join(parts)}."
    )


def _synthesis(found: _Found, plan: Plan, outcome: Outcome) -> str:
    for pairs in sorted({line["pairs"] for line in found.lines}):
        gain = _gain(plan, outcome, "regression_synthetic", "regression", pairs)
        if gain is not None:
            said = "helps" if gain[1] > 0 else "harms" if gain[2] < 0 else "makes no difference that can be told"
            return (
                f"Generated pairs beside {pairs} real ones: the PSNR of the regression U-Net changes by {gain[0]:+.2f} "
                f"dB (95 % interval {gain[1]:+.2f} to {gain[2]:+.2f}, {gain[3]} seeds): it {said}."
            )
    return _missing("regression_synthetic", "regression with as few pairs")


def draw(plan: Plan, outcome: Outcome, path: Path) -> list[Path]:
    """Draw the page of pictures, and for low dose the calibration curve; return what was written."""
    kept: dict[str, Tensor] = {}
    seed = min((row["seed"] for row in outcome.done), default=0)
    for name, lines in _PICTURED.items():
        rows = [row for row in outcome.done if row["method"] == name and row["pairs"] == plan.pairs]
        rows = [row for row in rows if row["seed"] == seed]
        if rows and (file := plan.folder / rows[0]["row"] / "pictures.pt").exists():
            pictures = torch.load(file, weights_only=True)
            most, width = (plan.fitting or [(0, 0.0)])[-1]
            for nfe, asked in lines:
                updates = most if asked is None else asked
                title = f"{name}, {nfe}" if len(lines) > 1 else name
                if (label := _once("", updates, nfe, width)) in pictures:
                    kept[title + f"\n+ {updates} updates" * bool(updates)] = pictures[label].float()
    written = [save_figure(_page(plan, kept), path)]
    rows = [row for row in outcome.done if row["method"] == "regression_synthetic"]
    generated = [generated_file(plan, row["pairs"], plan.folder / row["row"]) for row in rows]
    if generated and generated[0].exists():
        pairs = read_pairs(generated[0], plan.task, plan.data.geometry)
        written.append(save_figure(_generated(plan, pairs), path.with_name(f"{path.stem}_pairs.png")))
    if found := curves(outcome.done):
        written.append(save_figure(_calibration(found), path.with_name(f"{path.stem}_calibration.png")))
    return written


def curves(done: Lines) -> dict[str, list[list[dict[str, float]]]]:
    """Return the calibration curves of the rows that have one, of each way to sample those of all seeds."""
    found: dict[str, list[list[dict[str, float]]]] = {}
    lines = ({**line, "method": row["method"]} for row in done for line in row["lines"] if "calibration" in line)
    for line in lines:
        updates = f", {line['updates']} updates" if line["updates"] else ""
        turned = ", turned" if line.get("turned") else ""
        calls = f"{line['nfe']} call{'s' * (line['nfe'] != 1)}"
        found.setdefault(f"{line['method']}, {calls}{turned}{updates}", []).append(line["calibration"])
    return found


def _page(plan: Plan, results: dict[str, Tensor]) -> Figure:
    """Four lines for each slice: sinograms, their errors, images, their errors; of two targets the first."""
    held_out, chosen = plan.held_out, plan.drawn()
    pairs, radon = held_out.pairs, held_out.radon
    truth, given = pairs.expected[chosen, :1], pairs.input[chosen]
    given = given * (truth.sum() / given.sum())
    shown = {"target": truth, "input": given, **{name: result[:, :1] for name, result in results.items()}}
    rows, labels = [], []
    names = pairs.prompt.names()
    for place, number in enumerate(chosen):
        wanted = TRACERS[int(pairs.target_tracer[number, 0])]
        name = names[number] if names[number].startswith(wanted) else f"{names[number]}\nto {wanted}"
        for what in ("sinogram", "image"):
            views = {name: values[place : place + 1] for name, values in shown.items()}
            if what == "image":
                views = {name: standard_image(radon, values) for name, values in views.items()}
            reference = views["target"]
            limit = top(reference)
            rows.append([Tile(values[0, 0], (0, limit), name) for name, values in views.items()])
            errors = [Tile((v - reference)[0, 0], (-limit / 4, limit / 4), "", DIFFERENCE) for v in views.values()]
            rows.append(errors)
            labels += [f"{name}\n{what}", "minus target\n(+- a quarter)"]
    title = f"{plan.task}: slices drawn at random among the held-out ones; the input has the target's scale"
    return draw_grid(rows, labels, title)


def _generated(plan: Plan, pairs: PairedSet, count: int = 8) -> Figure:
    """The first generated pairs, not chosen: input and targets, sinogram above image."""
    batch, radon = pairs[list(range(min(count, len(pairs))))], plan.held_out.radon
    shown = {"input": batch.input}
    shown |= {f"target {k + 1}": batch.expected[:, k : k + 1] for k in range(batch.expected.shape[1])}
    rows, labels = [], []
    for name, sinograms in shown.items():
        for what, values in (("", sinograms), ("\nimage", standard_image(radon, sinograms))):
            names = batch.prompt.names() if not rows else [""] * len(values)
            rows.append([Tile(v[0], (0, top(v)), title) for v, title in zip(values, names, strict=True)])
            labels.append(name + what)
    return draw_grid(rows, labels, f"{plan.task}: generated pairs")


def _calibration(found: dict[str, list[list[dict[str, float]]]]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    for number, (way, kept) in enumerate(found.items()):
        levels = [point["level"] for point in kept[0]]
        for name, style, label in (("gauss", "o-", way), ("quantile", "x:", "")):
            covered = [mean(curve[i][name] for curve in kept) for i in range(len(levels))]
            axis.plot(levels, covered, style, color=f"C{number}", markersize=4, label=label or None)
    axis.set_xlabel("nominal level")
    axis.set_ylabel("share of the object's bins whose truth is inside")
    axis.set_title("solid: mean +- z std of the samples; dotted: their quantiles", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
