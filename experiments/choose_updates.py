"""How many updates towards the measured input, and among how wide a neighbourhood: chosen on validation patients.

    python experiments/choose_updates.py [--task low_dose|attenuation|delayed|conversion] [--publish]

The bridge of the downstream study, trained if it is not there, restores slices of patients that it was not trained on
and that are not those of the study's tables, by one call; its results are fitted to the input in each way: by
``allpet.consistency``'s ``fit_measured``, without attenuation correction by ``allpet.attenuation``'s
``fit_uncorrected``, of which also the updates of the attenuation that go before and how smooth these are, is tried;
of delayed scans and conversion by what ``fit_measured`` brings to the input, carried over. The defaults were read from
the tables of low dose and attenuation; other tasks share those of low dose. 6 minutes on one core beside the training.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from studies.downstream_plan import ALONE, UNCORRECTED_UPDATES, UPDATES, Plan
from studies.downstream_scores import HeldOut
from studies.training import HERE, Budget
from torch import Tensor

from allpet import BridgeSampling, Condition, Radon, attenuation
from allpet.consistency import NEIGHBOURHOOD_MM, fit_measured
from allpet.reports import FOLDER, table, write_report
from allpet.simulation.tasks import RELATED, PairOptions

REDUCTIONS = (4, 20, 100)
_USUAL, _NEAR = (2, 4, 8, 16, 32), (0.0, 12.0, 24.0, 36.0)
NEIGHBOURHOODS = {"low_dose": _NEAR, "attenuation": (0.0, 8.0, 12.0, 24.0), **dict.fromkeys(RELATED, _NEAR)}
NUMBERS = {"low_dose": _USUAL, "attenuation": (8, 16, 32, 64), **dict.fromkeys(RELATED, _USUAL)}
BEFORE, SMOOTH = (5, 10, 20, 40), (12.0, 24.0, 48.0)
"""Updates of the attenuation that go before, and the Gaussian of all of them, mm, tried with the other defaults."""
UNITS = (0.8, 1.25)
"""By which the input is off the unit of the targets, likewise."""
SHOWN = {"psnr": 1, "ssim": 1, "psnr_image": 1, "tissue_bias": 100, "worst_bias": 100, "lesion_max_bias": 100}
"""What is shown of the scores, and what it is multiplied by: 100 for per cent."""


_WIDTH = "neighbourhood_mm"


def measure(plan: Plan, seed: int, patients: int) -> list[dict[str, Any]]:
    """Return one row per dose reduction and way to fit."""
    system = plan.finetune(plan.folder / f"bridge-n{plan.pairs}-seed{seed}" / "train", seed, plan.pairs)
    rows = []
    for reduction in REDUCTIONS if plan.task == "low_dose" else (1,):
        options = PairOptions(reductions=(reduction,))
        data = plan.pairs_of(options=options, num_scans=1, val_patients=patients, test_patients=1)
        held_out = HeldOut(data.val_set[list(range(len(data.val_set)))], Radon(data.geometry))
        pairs = held_out.pairs
        condition, seeds = Condition.of_pairs(pairs), pairs.sample_id.tolist()
        restore = partial(system.restore, pairs.input, condition, seeds)
        drawn = restore(BridgeSampling(nfe=1)).mean
        for way in ways(plan.task):
            if plan.task in RELATED:  # the system knows what it makes of the input itself
                result = restore(
                    BridgeSampling(nfe=1, data_consistency=way["updates"], neighbourhood_mm=way[_WIDTH])
                ).mean
            else:
                result = fitted(drawn, pairs.input, held_out.radon, **way)
            scores = held_out.score(result).numbers
            shown = {name + "_%" * (times > 1): times * float(scores[name]) for name, times in SHOWN.items()}
            rows.append({"reduction": reduction, **way, **shown})
            print(rows[-1], flush=True)
    return rows


def ways(task: str) -> list[dict[str, Any]]:
    """Return what is tried of a task."""
    grid = [(width, number) for width in NEIGHBOURHOODS[task] for number in NUMBERS[task]]
    tried = [{"neighbourhood_mm": width, "updates": number} for width, number in [(0.0, 0), *grid]]
    if task != "attenuation":
        return tried
    usual = {"before": attenuation.BEFORE, "smooth_mm": attenuation.SMOOTH_MM, "unit": 1.0}
    ours = {"neighbourhood_mm": attenuation.NEIGHBOURHOOD_MM, "updates": UNCORRECTED_UPDATES[-1]}
    others = [{**usual, "before": before, "smooth_mm": smooth} for before in BEFORE for smooth in SMOOTH]
    others += [{**usual, "unit": unit} for unit in UNITS]
    return [{**way, **usual} for way in tried] + [{**ours, **other} for other in others if other != usual]


def fitted(
    drawn: Tensor,
    given: Tensor,
    radon: Radon,
    neighbourhood_mm: float,
    updates: int,
    before: int = 0,
    smooth_mm: float = 0.0,
    unit: float = 1.0,
) -> Tensor:
    """Fit in one of these ways; without updates of the attenuation, the input is corrected."""
    given = unit * given
    if not updates:
        return drawn
    if not before:
        return fit_measured(drawn, given, radon, updates, None, neighbourhood_mm)
    start = attenuation.explain_uncorrected(drawn, given, radon, before, smooth_mm)
    return attenuation.fit_uncorrected(drawn, given, radon, updates, None, neighbourhood_mm, start, smooth_mm)[0]


def said(rows: Sequence[dict[str, Any]]) -> str:
    """Compare the defaults with no neighbours, at each dose: as many updates as there are best, and as ours."""
    if "before" in rows[0]:
        return _said_of_attenuation(rows)
    parts = []
    for reduction in dict.fromkeys(row["reduction"] for row in rows):
        at = {(row["neighbourhood_mm"], row["updates"]): row for row in rows if row["reduction"] == reduction}
        alone = max((number for width, number in at if not width), key=lambda number: at[0.0, number]["psnr"])
        ways = {f"{alone} alone": at[0.0, alone], f"{UPDATES[-1]} alone": at[0.0, UPDATES[-1]]}
        ways[f"{UPDATES[-1]} among neighbours"] = at[NEIGHBOURHOOD_MM, UPDATES[-1]]
        shown = [f"{name} {_in_short(row)}" for name, row in ways.items()]
        parts.append(f"reduction {reduction}: " * (reduction > 1) + "; ".join(shown))
    return f"Best PSNR without neighbours, and the defaults: {'. '.join(parts)}."


def _said_of_attenuation(rows: Sequence[dict[str, Any]]) -> str:
    """Compare the defaults with nothing and with the best PSNR that was tried."""
    usual = (attenuation.NEIGHBOURHOOD_MM, UNCORRECTED_UPDATES[-1], attenuation.BEFORE, attenuation.SMOOTH_MM, 1.0)
    names = ("neighbourhood_mm", "updates", "before", "smooth_mm", "unit")
    ours = next(row for row in rows if tuple(row[name] for name in names) == usual)
    best = max((row for row in rows if row["unit"] == 1), key=lambda row: float(row["psnr"]))
    how = ", ".join(f"{name} {best[name]:g}" for name in names)
    units = [f"{row['unit']:g}: {_in_short(row)}" for row in rows if row["unit"] != 1]
    return (
        f"Not fitted: {_in_short(rows[0])}. The defaults: {_in_short(ours)}. The best PSNR ({how}): {_in_short(best)}. "
        f"With an input whose unit is that of the targets times {'; '.join(units)}."
    )


def _in_short(row: dict[str, Any]) -> str:
    return f"{row['psnr']:.2f} dB, lesions {row['lesion_max_bias_%']:+.1f} %, tissues {row['tissue_bias_%']:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(NUMBERS), default="low_dose")
    parser.add_argument("--vae-steps", type=int, help="of stage 1 (default: the scale's)")
    parser.add_argument("--ldm-steps", type=int, help="of stage 2 (default: the scale's)")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patients", type=int, default=20, help="to validate on")
    parser.add_argument("--scale", default="laptop", help="name in experiments/scale, or a file of one's own")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--cache", default="outputs/cache")
    parser.add_argument("--reports", type=Path, default=FOLDER)
    parser.add_argument("--publish", action="store_true", help="copy the report to experiments/results")
    given = parser.parse_args(arguments)
    usual = Budget.of(given.scale)
    plan = Plan(
        task=given.task,
        pairs=given.pairs,
        seeds=(given.seed,),
        stages=Budget(given.vae_steps or usual.vae, given.ldm_steps or usual.ldm),
        steps=given.steps,
        scale=given.scale,
        output=given.output,
        cache=given.cache,
    )
    rows = measure(plan, given.seed, given.patients)
    how = "towards the input as measured (fit_measured)"
    if given.task in RELATED:
        how += ", of the image that the model holds of it, and what they bring to that carried over to the result"
    ours = f"{UPDATES[-1]} updates and {NEIGHBOURHOOD_MM:g} mm, and {ALONE} alone for comparison,"
    if given.task == "attenuation":
        how = (
            "towards the input, with attenuation and scatter that are found between the two (fit_uncorrected): by "
            "updates of their own, so many before and one after each of EM, averaged with a Gaussian of smooth_mm, and "
            "with an input in another unit than the targets"
        )
        ours = (
            f"{UNCORRECTED_UPDATES[-1]} updates, every pixel alone, {attenuation.BEFORE} before and a Gaussian of "
            f"{attenuation.SMOOTH_MM:g} mm,"
        )
    remarks = (
        f"Validation patients. One call of the {given.task} bridge, then updates of EM {how}, where neighbours that "
        f"look alike in the result share what the counts say (kernelised EM), or every pixel is alone (0 mm). Columns "
        f"as in the downstream tables. The defaults, {ours} were read from it. {said(rows)}"
    )
    other = "" if given.task == "low_dose" else given.task
    title = "Updates towards the measured input, and neighbours that share them" + f": {other}" * bool(other)
    name = "choose_updates" + f"_{other}" * bool(other)
    path = write_report(name, rows, [given.seed], given.reports, title=title, remarks=remarks)
    if given.publish:
        shutil.copy(path, HERE / "results" / path.name)
    print(table(rows), said(rows), f"Numbers: {path}", sep="\n")


if __name__ == "__main__":
    main()
