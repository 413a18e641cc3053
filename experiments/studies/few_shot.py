"""How many slices, and which ingredient? n slices x augmentation x seeds at equal compute.

All rows train the same networks for the same number of steps; ``nothing`` has no masks and no symmetries, ``masks`` is
RMAS with DMM, ``symmetries`` turns and mirrors slices for stage 1, ``both`` is both, and ``conditioned`` turns and
mirrors those of stage 2, too. With 50 and 100 slices, of which stage 2 makes copies, it asks whether that prevents
them. At n = 500 single ingredients of ``both`` are changed: one channel without masks instead of three, no range layer,
``conditioned``, a linear start of stage 2, a fixed number of cells instead of DMM, binary instead of soft masks, masks
of the image instead of the sinogram, the three other forms of the constraint, and what the convolutions of stage 1 see
beyond the half turn: zeros, or its flipped continuation in every layer, instead of a seam that the ends fade into.
Continued layers, with kernels of any form (``moebius``) or as many to the left as to the right (``symmetric``), need
bins that are not folded into channels: they are compared with ``patch_1``, where one more level, of half the width,
stands in for the folding; latents and time per step are the same. (Convolutions of stage 2 see zeros in all rows; only
with a seam do its latents reach beyond the half turn.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student

from allpet import Sampling
from studies.intervals import Difference, mean_of, resampled, samples_of
from studies.rows import Outcome, Row
from studies.training import Bench, Budget, Recipe, facts, load, train

AUGMENTATIONS = {
    "nothing": {"masks": False, "symmetries": False},
    "masks": {"masks": True, "symmetries": False},
    "symmetries": {"masks": False, "symmetries": True},
    "both": {"masks": True, "symmetries": True},
}
UNFOLDED: dict[str, Any] = {"patch": 1, "channels": (32, 64, 128)}
VARIANTS: dict[str, dict[str, Any]] = {
    "one_channel": {"masks": False, "stack_channels": 1},
    "no_range_layer": {"range_order": None},
    "conditioned": {"conditioned": True},
    "linear_start": {"linear": True},
    "fixed_count": {"n_cells": (2, 2)},
    "binary": {"mask": "binary"},
    "image_masks": {"domain": "image"},
    "free": {"constraint": "free"},
    "projected": {"constraint": "projected"},
    "weighted": {"constraint": "weighted"},
    "no_seam": {"seam": False},
    "patch_1": UNFOLDED,
    "moebius": {**UNFOLDED, "padding": "moebius"},
    "symmetric": {**UNFOLDED, "padding": "symmetric"},
}
FIRST_VARIANTS = (
    "one_channel",
    "no_range_layer",
    "conditioned",
    "free",
    "fixed_count",
    "image_masks",
    "binary",
    "no_seam",
    "patch_1",
    "moebius",
    "symmetric",
)
SHOWN = (
    "kid_conv",
    "sw_conv",
    "energy_distance",
    "coverage_conv",
    "power_min_30mm",
    "power_max_30mm",
    "power_min_20mm",
    "row_sum_cv",
    "centre_residual",
    "hl_residual",
    "seam_jump",
    "copy_rate",
    "copy_control",
    "prompt_obeyed",
)


def recipes(seeds: Sequence[int]) -> list[tuple[str, str, Recipe]]:
    """Return (key, variant, recipe) of every row, in order of worth."""
    found: dict[str, tuple[str, str, Recipe]] = {}

    def add(n: int, name: str, changes: dict[str, Any], seed: int) -> None:
        key = f"n{n}-{name}-seed{seed}"
        found.setdefault(key, (key, name, Recipe(n=n, seed=seed, **changes)))

    for seed in seeds[:1]:
        for name in ("both", "nothing", "symmetries", "masks"):
            add(500, name, AUGMENTATIONS[name], seed)
        for n in (2000, 50, 100):
            add(n, "nothing", AUGMENTATIONS["nothing"], seed)
        for n in (100, 50):
            add(n, "both", AUGMENTATIONS["both"], seed)
            add(n, "conditioned", VARIANTS["conditioned"], seed)
    for seed in seeds[1:]:
        for name in AUGMENTATIONS:
            add(500, name, AUGMENTATIONS[name], seed)
        add(2000, "nothing", AUGMENTATIONS["nothing"], seed)
    for name in FIRST_VARIANTS:
        add(500, name, VARIANTS[name], seeds[0])
    for seed in seeds:
        for n in (100, 2000):
            for name, changes in AUGMENTATIONS.items():
                add(n, name, changes, seed)
    for name, changes in VARIANTS.items():
        for seed in seeds:
            add(500, name, changes, seed)
    for n in (50, 200):
        for name in ("nothing", "both"):
            for seed in seeds:
                add(n, name, AUGMENTATIONS[name], seed)
    return list(found.values())


def rows(bench: Bench, budget: Budget, seeds: Sequence[int], sampling: Sampling) -> list[Row]:
    """Return the rows of the study."""
    shared = {**dataclasses.asdict(budget), **facts(sampling)}
    return [
        Row(
            key,
            {"n": recipe.n, "augmentation": name, "seed": recipe.seed, **shared},
            partial(_measure, bench, budget, recipe, sampling),
        )
        for key, name, recipe in recipes(seeds)
    ]


def _measure(bench: Bench, budget: Budget, recipe: Recipe, sampling: Sampling, folder: Path) -> dict[str, Any]:
    spent = train(recipe, budget, folder, bench.cache)
    generator = load(folder, sampling)
    fake, prompt = bench.generate(generator, recipe.seed)
    torch.save({"sinogram": fake.half(), "prompt": torch.stack(list(prompt))}, folder / "samples.pt")
    return {**spent, **bench.judge_twice(fake, prompt, recipe.n, generator=generator)}


def summary(outcome: Outcome, real_power: dict[str, float]) -> list[dict[str, Any]]:
    """Return one line per n and augmentation: mean and, over seeds, standard deviation; the floor at the end."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in outcome.done:
        groups.setdefault((row["n"], row["augmentation"]), []).append(row)
    lines: list[dict[str, Any]] = []
    for (n, name), group in sorted(
        groups.items(),
        key=lambda item: (item[0][0], list(AUGMENTATIONS).index(item[0][1]) if item[0][1] in AUGMENTATIONS else 9),
    ):
        lines.append({"n": n, "augmentation": name, "seeds": len(group)} | spread(group, SHOWN))
    if outcome.done:
        floor = {name: [row[f"{name}_floor"] for row in outcome.done if f"{name}_floor" in row] for name in SHOWN}
        lines.append(
            {"n": "", "augmentation": "real slices (floor)", "seeds": ""}
            | {name: f"{mean(values):.3g}" for name, values in floor.items() if values}
            | {name: f"{real_power[name]:.3g}" for name in SHOWN if name in real_power}
        )
    return lines


INGREDIENTS: dict[str, list[tuple[str, str]]] = {
    "RMAS with DMM": [("masks", "nothing"), ("both", "symmetries")],
    "Symmetries": [("symmetries", "nothing"), ("both", "masks")],
    "Three channels (masks empty) instead of one": [("symmetries", "one_channel")],
    "DMM instead of a fixed count": [("both", "fixed_count")],
    "Soft masks instead of binary ones": [("both", "binary")],
    "Masks of the sinogram instead of the image": [("both", "image_masks")],
    "The constraint as decoder head instead of loss only": [("both", "free")],
    "The head instead of projection": [("both", "projected")],
    "The head instead of the weighted mean": [("both", "weighted")],
    "The range layer": [("both", "no_range_layer")],
    "Symmetries in stage 2, too": [("conditioned", "both")],
    "The linear start": [("linear_start", "both")],
    "A seam instead of zeros beyond the half turn": [("both", "no_seam")],
    "Folding instead of one more level": [("both", "patch_1")],
    "The seam instead of continued layers": [("patch_1", "moebius")],
    "The seam instead of continued layers of symmetric kernels": [("patch_1", "symmetric")],
}
"""What is asked of the rows: an ingredient, and the pairs of rows with and without it."""


LOWER = ("kid_conv", "sw_conv")
HIGHER = ("coverage_conv", "prompt_obeyed")
NEARER = ("hl_residual", "seam_jump")
BELOW = ("copy_rate",)
JUDGED = LOWER + HIGHER + NEARER + BELOW
"""Numbers that are better when lower, when higher, when nearer to those of real slices (their distance is compared),
and up to those of real slices (what is beyond is compared)."""
COLUMNS = {
    name: f"{name} from real" if name in NEARER else f"{name} beyond real" if name in BELOW else name for name in JUDGED
}


def contributions(outcome: Outcome) -> list[dict[str, Any]]:
    """Say what each ingredient brings for each n: the mean difference, with minus without it, over seeds run both ways.

    Two trainings that differ in their seed alone differ, too. By how much is estimated for each n from what is left of
    the numbers once settings and seeds, which share initial weights, prompts and noise, have had their means taken out
    (a two-way analysis of variance without repetition). A difference is called one beyond 95 % of Student's t.
    """
    rows = {(row["n"], row["augmentation"], row["seed"]): row for row in outcome.done}
    lines = []
    for ingredient, kinds in INGREDIENTS.items():
        for n in sorted({n for n, _, _ in rows}):
            pairs = [
                (row, rows[n, without, seed])
                for has, without in kinds
                for (size, name, seed), row in rows.items()
                if size == n and name == has and (n, without, seed) in rows
            ]
            if not pairs:
                continue
            line: dict[str, Any] = {"ingredient": ingredient, "n": n, "pairs": len(pairs)}
            for number in JUDGED:
                middle = mean(_judged(a, number) - _judged(b, number) for a, b in pairs)
                variance, freedom = _scatter(rows, n, number)
                if not variance:
                    line[COLUMNS[number]] = f"{middle:+.3g} (no verdict)"
                    continue
                error = (2 * variance / len(pairs)) ** 0.5
                good = (middle > 0) == (number in HIGHER)
                told = abs(middle) > float(student.ppf(0.975, freedom)) * error
                word = ("better" if good else "worse") if told else "no difference"
                line[COLUMNS[number]] = f"{middle:+.3g} ± {error:.2g} ({word})"
            lines.append(line)
    return lines


def _judged(row: dict[str, Any], number: str) -> float:
    if number in NEARER:
        return float(abs(row[number] - row[f"{number}_floor"]))
    return max(0.0, row[number] - row[f"{number}_floor"]) if number in BELOW else float(row[number])


def _scatter(rows: dict[tuple[int, str, int], dict[str, Any]], n: int, number: str) -> tuple[float, int]:
    """Variance of a number between trainings of n slices that differ by chance alone, and its degrees of freedom."""
    seeds = sorted({seed for size, _, seed in rows if size == n})
    whole = [name for name in (*AUGMENTATIONS, *VARIANTS) if all((n, name, seed) in rows for seed in seeds)]
    freedom = (len(whole) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return 0.0, 0
    values = [[_judged(rows[n, name, seed], number) for seed in seeds] for name in whole]
    by_seed = [mean(column) for column in zip(*values, strict=True)]
    left = [x - mean(line) - by_seed[j] + mean(by_seed) for line in values for j, x in enumerate(line)]
    return sum(x**2 for x in left) / freedom, freedom


def said(lines: Sequence[dict[str, Any]]) -> str:
    """Return the directions in sentences."""
    parts, verdicts = [], 0
    for line in lines:
        numbers = {name: str(value) for name, value in line.items() if name in COLUMNS.values()}
        if all("no verdict" in value for value in numbers.values()):
            continue
        verdicts += sum("no verdict" not in value for value in numbers.values())
        words = {word: [n for n, value in numbers.items() if f"({word})" in value] for word in ("better", "worse")}
        found = [f"{word} in {', '.join(names)}" for word, names in words.items() if names]
        text = "; ".join(found) or "no difference to be told from chance"
        parts.append(f"{line['ingredient']} ({line['n']} slices): {text}.")
    if verdicts:
        parts.append(f"Of {verdicts} verdicts some {round(verdicts / 20)} are chance; ± is one standard error.")
    return " ".join(parts)


def renoised(outcome: Outcome, by: Sequence[str]) -> list[dict[str, Any]]:
    """Return one line per setting of samples with counting noise against noisy slices, means over seeds; the floor."""
    powers = [f"renoised_power_{end}_{period}mm" for period in (30, 20) for end in ("min", "max")]
    names = ("renoised_kid_conv", "renoised_sw_conv", *powers)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in outcome.done:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    lines: list[dict[str, Any]] = [
        dict(zip(by, key, strict=True)) | spread(group, names) for key, group in groups.items()
    ]
    floors = [{name: row[f"{name}_floor"] for name in names if f"{name}_floor" in row} for row in outcome.done]
    if any(floors):
        lines.append(dict.fromkeys(by, "") | {by[-1]: "real slices (floor)"} | spread(floors, names))
    return lines


def spread(group: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    """Return mean and standard deviation of columns over rows, as text; of those that all rows have."""
    texts = {}
    for name in names:
        values = [float(row[name]) for row in group if name in row]
        if values and len(values) == len(group):
            texts[name] = f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")
    return texts


def data_efficiency(bench: Bench, folder: Path, outcome: Outcome, draws: int = 200) -> dict[str, Any]:
    """Compare 500 slices with the best augmentation with 2,000 without: KID500 - KID2000 against .05 (KID50 - floor).

    KID is the cubic kernel's squared distance on random convolution features, of all samples of a training, meaned over
    trainings; the floor is that of 500 real training slices, without noise, from the same held-out ones. (Halves of the
    held-out patients, which make the floor elsewhere, differ by more.) The interval is a bootstrap over generated
    slices and over held-out patients: it does not hold how trainings differ. Rows that are missing are said to be
    missing.
    """
    by_group: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in outcome.done:
        by_group.setdefault((row["n"], row["augmentation"]), []).append(row)
    at_500 = {
        name: mean(r["kid_conv"] for r in by_group[500, name]) for name in AUGMENTATIONS if (500, name) in by_group
    }
    if not at_500 or (2000, "nothing") not in by_group:
        return {"said": "Rows with 500 slices or with 2,000 and no augmentation are missing: nothing to compare yet."}
    best = min(at_500, key=at_500.__getitem__)
    test, others = bench.real_set, bench.data(2000).train_set
    groups = {
        "few": by_group[500, best],
        "many": by_group[2000, "nothing"],
        "fewest": by_group.get((50, "nothing"), []),
    }
    sets = samples_of(folder, (row for group in groups.values() for row in group))
    sets["real"] = others[list(range(0, len(others), 4))].expected
    real = test[list(range(len(test)))]
    measured = resampled(real.expected, real.patient_id, sets, draws=draws)
    kid = {name: mean_of(measured, [row["row"] for row in group]) for name, group in groups.items() if group}
    kid["real"] = measured["real"]
    difference = Difference.of(kid["few"], kid["many"])
    found: dict[str, Any] = {"best": best, "difference": difference.value, "low": difference.low}
    found |= {"high": difference.high, **{f"kid_{name}": float(values[0]) for name, values in kid.items()}}
    said = (
        f"KID with 500 slices and {best}, the best of {len(at_500)}, minus KID with 2,000 slices and nothing, means of "
        f"{len(groups['few'])} and {len(groups['many'])} trainings, with a 95 % interval over slices and held-out "
        f"patients, not over trainings: {difference}"
    )
    if "fewest" not in kid:
        return {**found, "said": said + "; the row with 50 slices, which sets the scale, was not run."}
    limit = 0.05 * (found["kid_fewest"] - found["kid_real"])
    said += (
        f"; the limit .05 (KID50 - floor) is {limit:.4g} (KID50 {found['kid_fewest']:.4g}, floor "
        f"{found['kid_real']:.4g}): it {_verdict(difference, limit)}."
    )
    return {**found, "limit": limit, "said": said}


def _verdict(difference: Difference, limit: float) -> str:
    """Say whether a difference keeps a limit, and whether its whole interval says so."""
    if difference.value <= limit:
        return "holds" if difference.high <= limit else "holds in the mean, though the interval reaches beyond it"
    return "does not hold" if difference.low > limit else "does not hold in the mean, though the interval allows it"
