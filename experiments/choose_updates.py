"""How many updates towards the measured input, and among how wide a neighbourhood: chosen on validation patients.

    python experiments/choose_updates.py [--publish]

The low-dose bridge of the downstream study, trained if it is not there, restores slices of patients that it was not
trained on and that are not those of the study's tables, by one call; its results are fitted to the input in each way
(``allpet.consistency``'s ``fit_measured``). The defaults, which separation shares, were read from this table. 6 minutes
on one core beside the training.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.downstream_plan import ALONE, UPDATES, Plan
from studies.downstream_scores import HeldOut
from studies.training import HERE, Budget

from allpet import BridgeSampling, Condition, Radon
from allpet.consistency import NEIGHBOURHOOD_MM
from allpet.reports import FOLDER, table, write_report
from allpet.simulation.tasks import PairOptions

REDUCTIONS = (4, 20, 100)
NEIGHBOURHOODS = (0.0, 12.0, 24.0, 36.0)
NUMBERS = (2, 4, 8, 16, 32)
SHOWN = {"psnr": 1, "ssim": 1, "psnr_image": 1, "tissue_bias": 100, "worst_bias": 100, "lesion_max_bias": 100}
"""What is shown of the scores, and what it is multiplied by: 100 for per cent."""


def measure(plan: Plan, seed: int, patients: int) -> list[dict[str, Any]]:
    """Return one row per dose reduction, neighbourhood and number of updates."""
    system = plan.finetune(plan.folder / f"bridge-n{plan.pairs}-seed{seed}" / "train", seed, plan.pairs)
    rows = []
    for reduction in REDUCTIONS:
        options = PairOptions(reductions=(reduction,))
        data = plan.pairs_of(options=options, num_scans=1, val_patients=patients, test_patients=1)
        held_out = HeldOut(data.val_set[list(range(len(data.val_set)))], Radon(data.geometry))
        pairs = held_out.pairs
        condition, seeds = Condition.of_pairs(pairs), pairs.sample_id.tolist()
        drawn = system.restore(pairs.input, condition, seeds, BridgeSampling(nfe=1)).mean
        ways = [(0, 0.0), *((number, width) for width in NEIGHBOURHOODS for number in NUMBERS)]
        for number, width in ways:
            sampling = BridgeSampling(nfe=1, data_consistency=number, neighbourhood_mm=width)
            fitted = sampling.fit(drawn[None], pairs.input, condition.task, data.geometry, seeds).samples[0]
            scores = held_out.score(fitted).numbers
            facts = {"reduction": reduction, "neighbourhood_mm": width, "updates": number}
            shown = {name + "_%" * (times > 1): times * float(scores[name]) for name, times in SHOWN.items()}
            rows.append({**facts, **shown})
            print(rows[-1], flush=True)
    return rows


def said(rows: Sequence[dict[str, Any]]) -> str:
    """Compare the defaults with no neighbours, at each dose: as many updates as there are best, and as ours."""
    parts = []
    for reduction in dict.fromkeys(row["reduction"] for row in rows):
        at = {(row["neighbourhood_mm"], row["updates"]): row for row in rows if row["reduction"] == reduction}
        alone = max((number for width, number in at if not width), key=lambda number: at[0.0, number]["psnr"])
        ways = {f"{alone} alone": at[0.0, alone], f"{UPDATES[-1]} alone": at[0.0, UPDATES[-1]]}
        ways[f"{UPDATES[-1]} among neighbours"] = at[NEIGHBOURHOOD_MM, UPDATES[-1]]
        shown = [
            f"{name} {row['psnr']:.2f} dB, lesions {row['lesion_max_bias_%']:+.1f} %, tissues "
            f"{row['tissue_bias_%']:.1f} %"
            for name, row in ways.items()
        ]
        parts.append(f"reduction {reduction}: {'; '.join(shown)}")
    return f"Best PSNR without neighbours, and the defaults: {'. '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        task="low_dose",
        pairs=given.pairs,
        seeds=(given.seed,),
        stages=Budget(given.vae_steps or usual.vae, given.ldm_steps or usual.ldm),
        steps=given.steps,
        scale=given.scale,
        output=given.output,
        cache=given.cache,
    )
    rows = measure(plan, given.seed, given.patients)
    remarks = (
        f"Validation patients. One call of the low-dose bridge, then updates of EM towards the input as measured "
        f"(fit_measured), where neighbours that look alike in the result share what the counts say (kernelised EM), or "
        f"every pixel is alone (0 mm). Columns as in the downstream tables. The defaults, {UPDATES[-1]} updates and "
        f"{NEIGHBOURHOOD_MM:g} mm, and {ALONE} alone for comparison, were read from it. {said(rows)}"
    )
    title = "Updates towards the measured input, and neighbours that share them"
    path = write_report("choose_updates", rows, [given.seed], given.reports, title=title, remarks=remarks)
    if given.publish:
        shutil.copy(path, HERE / "results" / path.name)
    print(table(rows), said(rows), f"Numbers: {path}", sep="\n")


if __name__ == "__main__":
    main()
