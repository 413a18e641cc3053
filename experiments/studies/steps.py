"""Quality against sampling steps: samplers on one trained stage 2, and DDPM with all 1,000 steps to compare with."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from allpet import Sampling
from studies.rows import Row
from studies.training import Bench, Budget, Recipe, facts, load, train

STEPS = (10, 20, 5, 50, 2, 1)
SAMPLERS = ("dpm++2m", "ddim", "unipc", "ddpm")
SHOWN = ("kid_conv", "sw_conv", "energy_distance", "spectrum_image_30mm", "row_sum_cv", "hl_residual", "prompt_obeyed")
JUDGED = ("kid_conv", "sw_conv", "sw_raw")


def rows(bench: Bench, budget: Budget, model: Path, recipe: Recipe, guidance: float) -> list[Row]:
    """Return the rows: the sampler's own 10 steps and 1,000 of DDPM first, then the rest.

    Args:
        bench: to measure with.
        budget: of the training, where it has not been done.
        model: folder of the training, which is made if it is missing.
        recipe: of the training.
        guidance: of all ways to sample.
    """
    order = [("dpm++2m", 10), ("ddpm", 1000)]
    order += [(name, steps) for steps in STEPS for name in SAMPLERS if (name, steps) not in order]
    return [
        Row(
            f"{how.sampler}-{how.steps}",
            {**facts(how), "n": recipe.n, "seed": recipe.seed, "samples": len(bench.rows())},
            partial(_measure, bench, budget, model, recipe, how),
        )
        for how in (Sampling(name, steps, guidance=guidance) for name, steps in order)  # type: ignore[arg-type]
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
    """Say whether 10 solver steps are as good as 1,000 of DDPM, within the larger of 5 % and 2 sd of the floor.

    A single step, which is too few, is held to the same rule: where that passes, too, the rule tells nothing.
    """
    found = {(row["sampler"], row["steps"]): row for row in rows}
    few, many = found.get(("dpm++2m", 10)), found.get(("ddpm", 1000))
    if few is None or many is None:
        return "10 steps of DPM-Solver++ and 1,000 of DDPM have not both been run."
    parts = []
    for name in JUDGED:
        word = "holds" if _holds(name, few, many) else "does not hold"
        parts.append(
            f"{name} {few[name]:.4g} against {many[name]:.4g} (allowed {_allowed(name, many):.2g} more: {word})"
        )
    said = (
        "10 steps of DPM-Solver++ against 1,000 of DDPM, which may be exceeded by the larger of 5 % and two standard "
        f"deviations of the floor: {'; '.join(parts)}."
    )
    one = found.get(("dpm++2m", 1))
    if one is None:
        return said
    failed = [name for name in JUDGED if not _holds(name, one, many)]
    rest = [name for name in JUDGED if name not in failed]
    said += f" By the same rule a single step fails in {', '.join(failed) or 'nothing'}"
    return said + (f"; in {', '.join(rest)} the rule cannot tell even that." if rest else ".")


def _allowed(name: str, many: dict[str, Any]) -> float:
    return float(max(0.05 * abs(many[name]), 2 * many[f"{name}_floor_std"]))


def _holds(name: str, few: dict[str, Any], many: dict[str, Any]) -> bool:
    return bool(few[name] - many[name] <= _allowed(name, many))
