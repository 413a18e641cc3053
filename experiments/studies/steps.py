"""Quality against sampling steps: samplers on one trained stage 2, and DDPM with all 1,000 steps to compare with."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from allpet import Sampling
from studies.rows import Row
from studies.training import GUIDANCE, Bench, Budget, Recipe, facts, load, train

STEPS = (10, 20, 5, 50, 2, 1)
SAMPLERS = ("dpm++2m", "ddim", "unipc", "ddpm")
SHOWN = ("kid_conv", "sw_conv", "energy_distance", "spectrum_image_30mm", "row_sum_cv", "hl_residual", "prompt_obeyed")


def rows(bench: Bench, budget: Budget, model: Path, recipe: Recipe) -> list[Row]:
    """Return the rows: the sampler's own 10 steps and 1,000 of DDPM first, then the rest.

    Args:
        bench: to measure with.
        budget: of the training, where it has not been done.
        model: folder of the training, which is made if it is missing.
        recipe: of the training.
    """
    order = [("dpm++2m", 10), ("ddpm", 1000)]
    order += [(name, steps) for steps in STEPS for name in SAMPLERS if (name, steps) not in order]
    return [
        Row(
            f"{how.sampler}-{how.steps}",
            {**facts(how), "n": recipe.n, "seed": recipe.seed, "samples": len(bench.rows())},
            partial(_measure, bench, budget, model, recipe, how),
        )
        for how in (Sampling(name, steps, guidance=GUIDANCE) for name, steps in order)  # type: ignore[arg-type]
    ]


def _measure(
    bench: Bench, budget: Budget, model: Path, recipe: Recipe, sampling: Sampling, folder: Path
) -> dict[str, Any]:
    train(recipe, budget, model, bench.cache)
    began = time.perf_counter()
    fake, prompt = bench.generate(load(model, sampling), recipe.seed)
    spent = time.perf_counter() - began
    return {"seconds_per_sample": spent / len(fake), **bench.judge(fake, prompt, 0).numbers}


def conclusion(rows: list[dict[str, Any]]) -> str:
    """Say whether 10 solver steps are as good as 1,000 of DDPM, within the larger of 5 % and 2 sd of the floor."""
    found = {(row["sampler"], row["steps"]): row for row in rows}
    few, many = found.get(("dpm++2m", 10)), found.get(("ddpm", 1000))
    if few is None or many is None:
        return "10 steps of DPM-Solver++ and 1,000 of DDPM have not both been run."
    parts = []
    for name in ("kid_conv", "sw_conv", "sw_raw"):
        allowed = max(0.05 * abs(many[name]), 2 * many[f"{name}_floor_std"])
        worse = few[name] - many[name]
        parts.append(
            f"{name} {few[name]:.4g} against {many[name]:.4g} (allowed {allowed:.2g} more: "
            f"{'holds' if worse <= allowed else 'does not hold'})"
        )
    return "10 steps of DPM-Solver++ against 1,000 of DDPM: " + "; ".join(parts) + "."
