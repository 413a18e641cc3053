"""Run a study: many short trainings on the same slices and budget, compared with one another.

    python experiments/study.py few_shot|steps|compute|baselines [--minutes 60]      (make study STUDY=few_shot)

``few_shot``: n slices x augmentation x seeds; ``steps``: quality against sampling steps; ``compute``: against training
compute; ``baselines``: beside what else makes sinograms. Given again, the command goes on where it was: finished rows
are kept in ``outputs/studies/NAME/rows``. It leaves ``outputs/reports/study_NAME.json``, ``.md`` and ``.png``; rows
that were not run are listed there. ``--publish`` writes them to ``experiments/results``, too.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from studies import baselines, compute, few_shot, steps
from studies.rows import Outcome, run_rows
from studies.training import HERE, Bench, Budget, Recipe

from allpet import Sampling
from allpet.reports import FOLDER, table, write_report
from callbacks.figures import save_figure

TITLES = {
    "few_shot": "Few-shot study: slices and ingredients at equal compute",
    "steps": "Sampling steps: how few are enough",
    "compute": "Training compute: what more steps bring",
    "baselines": "Baselines: the same slices and the same compute",
}
REMARKS = {
    "few_shot": "Simulated slices of the paper's seven prompts, 64 x 80; every row trains both stages anew for the "
    "same numbers of steps, and is compared with the expected sinograms of 350 slices of 70 patients that nothing was "
    "trained on. KID is the unbiased cubic-kernel distance, SW the sliced Wasserstein distance, both on random "
    "convolution features; the floor is what one half of the held-out patients scores against the other. Consistency "
    "alone flatters: the range layer sets the first 21 moments right by construction, and blurred sinograms are "
    "consistent, too; read it with KID and spectrum (power of the images at a 30-mm period over that of held-out "
    "ones). The paper's published animations measure 2.0 % (brain) and 2.8 % (body) in row sums and .24 and .18 % in "
    "centres: 8-bit pictures over 360 degrees, measured by us.",
    "steps": "One stage 2 (500 slices, masks and symmetries), sampled in different ways.",
    "compute": "Stage 2 trained anew for each budget, with a learning-rate schedule of its own; stage 1 once per "
    "recipe.",
    "baselines": "GAN and score-based model are trained for as many steps as cost the arithmetic of both of our "
    "stages. The VAE's decoder has one channel and no range layer. Resampled training slices are copies: they show "
    "what distances copying reaches. Peak memory is the process's resident memory after the row.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows there is time for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(TITLES))
    parser.add_argument("--minutes", type=float, help="begin no row later than this; 0 only writes the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vae-steps", type=int, default=300)
    parser.add_argument("--ldm-steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=245, help="generated slices per row")
    parser.add_argument("--sampler", default="dpm++2m")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=500, help="training slices of the baselines")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--cache", default="outputs/cache")
    parser.add_argument("--reports", type=Path, default=FOLDER)
    parser.add_argument("--publish", action="store_true", help="copy the report to experiments/results")
    options = parser.parse_args(arguments)
    budget = Budget(options.vae_steps, options.ldm_steps)
    sampling = Sampling(options.sampler, options.sampling_steps)
    folder = options.output / options.study
    bench = Bench(options.output, options.cache, None, options.samples)
    if options.study == "few_shot":
        rows = few_shot.rows(bench, budget, options.seeds, sampling)
    elif options.study == "steps":
        rows = steps.rows(bench, budget, folder / "model", Recipe(options.n, options.seeds[0]))
    elif options.study == "compute":
        rows = compute.rows(bench, budget, folder, options.seeds[0], sampling)
    else:
        rows = baselines.rows(bench, budget, folder, options.n, options.seeds, sampling)

    def report(outcome: Outcome) -> Path:
        return write(options, bench, folder, outcome)

    outcome = run_rows(rows, folder, options.minutes, report)
    path = report(outcome)
    if options.publish:
        for suffix in (".json", ".png"):
            made = path.with_suffix(suffix)
            if made.exists():
                shutil.copy(made, HERE / "results" / made.name)
    print(f"{len(outcome.done)} rows, {len(outcome.not_run)} not run. Numbers: {path}")


def write(options: argparse.Namespace, bench: Bench, folder: Path, outcome: Outcome) -> Path:
    """Write the report of what there is so far."""
    name = f"study_{options.study}"
    more: dict[str, Any] = {
        "title": TITLES[options.study],
        "not_run": outcome.not_run,
        "row_seconds": outcome.seconds,
    }
    conclusions = []
    if options.study == "few_shot":
        more["summary"] = few_shot.summary(outcome)
        more["data_efficiency"] = few_shot.data_efficiency(bench, folder, outcome)
        conclusions.append(more["data_efficiency"]["said"])
    else:
        shown = {"steps": steps.SHOWN, "compute": compute.SHOWN, "baselines": baselines.SHOWN}[options.study]
        more["summary"] = summary(options.study, outcome.done, shown)
    if options.study == "steps":
        conclusions.append(steps.conclusion(outcome.done))
    if outcome.not_run:
        conclusions.append(f"Not run: {', '.join(outcome.not_run)}.")
    more["remarks"] = " ".join([REMARKS[options.study], *conclusions])
    picture = options.reports / f"{name}.png"
    if outcome.done:
        if options.study == "baselines":
            baselines.draw(bench, folder, outcome.done, picture)
        else:
            save_figure(curves(options.study, outcome.done), picture)
    seeds = sorted({int(row["seed"]) for row in outcome.done})
    print(table(more["summary"]), *conclusions, sep="\n")
    return write_report(name, outcome.done, seeds, options.reports, **more)


def summary(study: str, done: Sequence[dict[str, Any]], shown: Sequence[str]) -> list[dict[str, Any]]:
    """Return one line per setting, over seeds, and the floor."""
    keys = {"steps": ("sampler", "steps"), "compute": ("augmentation", "ldm_steps"), "baselines": ("method",)}[study]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in done:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    if study != "baselines":
        groups = dict(sorted(groups.items()))
    lines = [dict(zip(keys, values, strict=True)) | few_shot.spread(group, shown) for values, group in groups.items()]
    if done:
        floors = [{name: row[f"{name}_floor"] for name in shown if f"{name}_floor" in row} for row in done]
        lines.append({keys[0]: "real slices (floor)"} | few_shot.spread(floors, shown))
    return lines


def curves(study: str, done: Sequence[dict[str, Any]]) -> Figure:
    """Draw four numbers against what the study varies, seeds as points, means as lines, the floor dashed."""
    along, by, label = {
        "few_shot": ("n", "augmentation", "training slices"),
        "steps": ("steps", "sampler", "denoiser calls"),
        "compute": ("ldm_steps", "augmentation", "steps of stage 2"),
    }[study]
    names = {
        "kid_conv": "KID, random features",
        "sw_conv": "sliced Wasserstein, random features",
        "spectrum_image_30mm": "power at 30 mm over real",
        "hl_residual": "Helgason-Ludwig residual",
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    groups = sorted({str(row[by]) for row in done})
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, names.items(), strict=True):
        for group in groups:
            points = sorted((row[along], row[name]) for row in done if row[by] == group)
            places = sorted({x for x, _ in points})
            means = [sum(y for x, y in points if x == place) / sum(x == place for x, _ in points) for place in places]
            (line,) = axis.plot(places, means, label=group)
            axis.plot(*zip(*points, strict=True), "o", color=line.get_color(), markersize=4)
        axis.axhline(sum(row[f"{name}_floor"] for row in done) / len(done), color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_title(f"{title} (dashed: held-out slices)", fontsize=9)
        if min(row[name] for row in done) > 0:
            axis.set_yscale("log")
    figure.axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
