"""How strongly to guide samples: chosen on validation patients.

    python experiments/choose_guidance.py [--budgets 1000/1200 1500/2400] [--seeds 0 1] [--publish]

Both stages are trained on 500 slices, for each budget (steps of stage 1 / stage 2) and seed, if they are not there;
samples guided in each way are compared with expected slices of patients that they were not trained on and that are not
those of the studies' tables. The default of ``Sampling`` was read from this table. A way takes two minutes on one core.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from studies.few_shot import SHOWN, spread
from studies.rows import Outcome, Row, run_rows
from studies.training import GUIDANCE, HERE, Bench, Budget, Recipe, facts, load, power, train

from allpet import Sampling
from allpet.reports import FOLDER, table, write_report

WEIGHTS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)


def plan(bench: Bench, budgets: Sequence[Budget], seeds: Sequence[int], folder: Path) -> list[Row]:
    """Return the rows, trainings one after another."""
    return [
        Row(
            f"{budget.vae}-{budget.ldm}-seed{seed}-{weight:g}",
            {"vae": budget.vae, "ldm": budget.ldm, "seed": seed, "samples": bench.samples}
            | facts(Sampling(guidance=weight)),
            partial(_measure, bench, budget, seed, weight, folder / f"{budget.vae}-{budget.ldm}-seed{seed}"),
        )
        for budget in budgets
        for seed in seeds
        for weight in WEIGHTS
    ]


def _measure(bench: Bench, budget: Budget, seed: int, weight: float, trained: Path, folder: Path) -> dict[str, Any]:
    train(Recipe(500, seed), budget, trained, bench.cache)
    fake, prompt = bench.generate(load(trained, Sampling(guidance=weight)), seed)
    found = bench.judge(fake, prompt, 0)
    return {**found.numbers, **power(found)}


def summary(outcome: Outcome, real_power: dict[str, float]) -> list[dict[str, Any]]:
    """Return one line per budget and weight, over seeds, and what real slices of other patients score."""
    groups: dict[tuple[int, int, float], list[dict[str, Any]]] = {}
    for row in outcome.done:
        groups.setdefault((row["vae"], row["ldm"], row["guidance"]), []).append(row)
    lines = [
        {"vae_steps": vae, "ldm_steps": ldm, "guidance": weight, "seeds": len(group)} | spread(group, SHOWN)
        for (vae, ldm, weight), group in groups.items()
    ]
    floors = [{name: row[f"{name}_floor"] for name in SHOWN if f"{name}_floor" in row} for row in outcome.done]
    return [*lines, {"vae_steps": "real slices (floor)"} | spread([{**floor, **real_power} for floor in floors], SHOWN)]


def said(done: Sequence[dict[str, Any]]) -> str:
    """Say, for each budget, which weight each distance would choose, and what the default has.

    Only seeds that were sampled with all weights are compared.
    """
    parts = []
    for budget in dict.fromkeys((row["vae"], row["ldm"]) for row in done):
        rows = [row for row in done if (row["vae"], row["ldm"]) == budget]
        ways = {seed: {row["guidance"] for row in rows if row["seed"] == seed} for seed in (r["seed"] for r in rows)}
        seeds = [seed for seed, weights in ways.items() if weights == {row["guidance"] for row in rows}]
        if not seeds:
            continue
        texts = []
        for name in ("kid_conv", "sw_conv", "energy_distance"):
            at: dict[float, list[float]] = {}
            for row in rows:
                if row["seed"] in seeds:
                    at.setdefault(row["guidance"], []).append(row[name])
            middle = {weight: mean(values) for weight, values in at.items()}
            best = min(middle, key=middle.__getitem__)
            usual = f", {middle[GUIDANCE]:.3g} with {GUIDANCE:g}" if GUIDANCE in middle and best != GUIDANCE else ""
            texts.append(f"{name} {middle[best]:.3g} with {best:g}{usual}")
        parts.append(f"{budget[0]} and {budget[1]} steps: {'; '.join(texts)}")
    return f"Lowest distances, means over seeds: {'. '.join(parts)}." if parts else "No seed has all weights yet."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["1000/1200", "1500/2400"], help="steps of stage 1 / stage 2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, help="begin no row later than this; 0 only writes the report")
    parser.add_argument("--samples", type=int, default=175, help="generated slices per row (one for each held out)")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--cache", default="outputs/cache")
    parser.add_argument("--reports", type=Path, default=FOLDER)
    parser.add_argument("--publish", action="store_true", help="copy the report to experiments/results")
    given = parser.parse_args(arguments)
    try:
        budgets = [Budget(*map(int, text.split("/", 1))) for text in given.budgets]
    except (TypeError, ValueError):
        parser.error(f"--budgets is {' '.join(given.budgets)}, but must be steps of both stages, such as 1000/1200.")
    bench = Bench(given.output, given.cache, given.samples, part="val")
    folder = given.output / "guidance"
    outcome = run_rows(plan(bench, budgets, given.seeds, folder), folder, given.minutes)
    if not outcome.done:
        raise SystemExit("No row has been run yet: give it more --minutes.")
    usual = Sampling()
    lines = summary(outcome, bench.real_power)
    missing = f" Not run: {', '.join(outcome.not_run)}." if outcome.not_run else ""
    remarks = (
        f"Validation patients; 500 training slices; {usual.steps} steps of {usual.sampler}, power "
        f"{'' if usual.restore_power else 'not '}restored; columns as in the few-shot study. The default, "
        f"{GUIDANCE:g}, was read from it. {said(outcome.done)}{missing}"
    )
    title = "How strongly samples are guided"
    path = write_report(
        "choose_guidance",
        outcome.done,
        given.seeds,
        given.reports,
        title=title,
        remarks=remarks,
        not_run=outcome.not_run,
        row_seconds=outcome.seconds,
        summary=lines,
    )
    if given.publish:
        shutil.copy(path, HERE / "results" / path.name)
    print(table(lines), said(outcome.done) + missing, f"Numbers: {path}", sep="\n")


if __name__ == "__main__":
    main()
