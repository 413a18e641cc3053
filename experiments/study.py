"""Run a study: many short trainings on the same slices and budget, compared with one another.

    python experiments/study.py few_shot|steps|compute|layers|baselines [--minutes 60]      (make study STUDY=few_shot)
    python experiments/study.py downstream --task low_dose         (make study STUDY=downstream TASK=low_dose)

``few_shot``: n slices x augmentation x seeds; ``steps``: quality against sampling steps; ``compute``: against training
compute; ``layers``: what stage 1 sees beyond the half turn; ``baselines``: beside what else makes sinograms;
``downstream``: a downstream task beside what else solves it.
Given again, the command goes on where it was: finished rows are kept in ``outputs/studies/NAME/rows``. It leaves
``outputs/reports/study_NAME.json``, ``.md`` and ``.png`` (``downstream_TASK``); rows that were not run are listed
there. ``--publish`` writes them to ``experiments/results``, too. ``--label WORD`` makes a table of its own of other
settings (``outputs/studies/WORD_NAME``, ``study_WORD_NAME.json``).
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from studies import baselines, compute, downstream, downstream_report, few_shot, layers, steps
from studies.downstream_plan import Plan
from studies.rows import Outcome, run_rows
from studies.training import GUIDANCE, HERE, Bench, Budget, Recipe

from allpet import Sampling
from allpet.reports import FOLDER, table, write_report
from allpet.simulation.tasks import TASKS
from callbacks.figures import save_figure

TITLES = {
    "few_shot": "Few-shot study: slices and ingredients at equal compute",
    "steps": "Sampling steps: how few are enough",
    "compute": "Training compute: what more steps bring",
    "layers": "Layers of stage 1: what they see beyond the half turn",
    "baselines": "Baselines: the same slices, and at most the same compute",
    "downstream": "Downstream task {task}: bridges beside what else solves it",
}
PAPER = (
    "The paper's published animations measure 2.0 % (brain) and 2.8 % (body) in row sums and .24 and .18 % in centres: "
    "8-bit pictures over 360 degrees, measured by us."
)
REMARKS = {
    "few_shot": "Simulated slices of the paper's seven prompts, 64 x 80; every row trains both stages anew for the "
    "same numbers of steps, and is compared with the expected sinograms of 350 slices of 70 patients that nothing was "
    "trained on. KID is the unbiased cubic-kernel distance, SW the sliced Wasserstein distance, both on random "
    "convolution features; the floor is what one half of the held-out patients scores against the other, balanced by "
    "prompt. Consistency alone flatters: the range layer sets the first 21 moments right by construction, and blurred "
    "sinograms are consistent, too; read it with KID and power_min, power_max: the least and the largest power of the "
    "images over that of held-out ones at any period down to 30 or 20 mm, geometric means of the whole sets (floor: of "
    "500 training slices without noise). seam_jump: the step over the end of the half turn over that between views. "
    "copy_control: which share of copies the copy test would find, were training slices given back as stage 1 decodes "
    f"them; copy_rate is a lower bound by that. {PAPER}",
    "steps": "One stage 2 (500 slices, masks and symmetries), sampled in different ways, guided by {guidance:g}.",
    "compute": "Stage 2 trained anew for each budget, with a learning-rate schedule of its own; stage 1 once per "
    "recipe. Columns as in the few-shot study.",
    "layers": "Held-out slices as measured, encoded and decoded by stage 1, compared with their expected sinograms; "
    "all trained for the same steps. seam: the network sees some views beyond either end, and what it draws of the "
    "ends fades into what it draws beyond the others; no_seam: zeros; moebius, symmetric: every layer goes on past the "
    "half turn, with kernels of any form or symmetric ones, which needs bins that are not folded into channels, as of "
    "patch_1, which has a seam. edge_l2: relative error of the two first and the two last views; seam_jump: the step "
    "over the end of the half turn over that between views.",
    "baselines": "GAN and score-based model are trained for as many steps as cost the arithmetic of both of our "
    "stages; a VAE has those of stage 1 alone. Ours and the LDM of one channel are guided by "
    "{guidance:g} and get back the power that their decoders lose; ours_plain is the training of ours without either, "
    "and so are the other models. The decoders of VAE and LDM of one channel have no range layer, and the error of "
    "reconstruction weighs 1.5 times as much against their prior as with three channels, one of which is empty. PCA, "
    "GAN, score model and resampled training slices (copies: what distances copying reaches) are noisy: among expected "
    "slices, in the first table, they stand badly for that in distances, power and the denoising utility; differences "
    "below and the second table compare them with noisy slices. Peak memory is the most that the process "
    "held during the row. Consistency alone flatters, as PCA-Gaussian and the copies show; power_min and power_max as "
    f"in the few-shot study. {PAPER}",
    "downstream": "Simulated pairs, 64 x 80 by default; all methods train on the same pairs for the same steps and, "
    "but for what has none, with the same network; held-out patients. Compared with the expected targets, in the "
    "sinogram and after one fixed reconstruction (OSEM, 3 iterations of 14 subsets, 4 mm); a noisy target is itself "
    "some 26 dB from its expectation. tissue_bias: mean over tissues of the size of the bias of their uptake over all "
    "held-out slices; tissue_chance: how large that would be by chance, were nothing biased; tissue_signed, "
    "tissue_sd: mean with its sign, and standard deviation over tissues (all patients together, so without how "
    "patients differ); tissue_patients: mean size of the bias of a tissue in one patient; worst_bias: the largest. "
    "lesion_max, lesion_mean: mean signed bias (lesion_max_size, lesion_mean_size: mean size) of hot lesions' SUVmax "
    "and SUVmean; seconds: of a line, of a row's first with its training, where that was not there; "
    "lesion_leak: of lesions that one of two tracers shows alone, what share of their uptake a result of the other "
    "shows, too; lesion_recovery: share of their contrast. bridge is ours; bridge_scratch is the same without stage "
    "2; multi_task is one bridge for all tasks, with as many steps per task; bridge_longer and regression_longer have "
    "four times the steps; prior uses stage 2 alone and no pairs; regression_synthetic trains on few real and many "
    "generated pairs. ROI rows are told where the lesions are: no method may know that but by a clinician. updates: "
    "of EM, by which results are fitted to the input as measured (low dose, separation; of attenuation correction with "
    "attenuation and scatter that are found between the two; of delayed scans and conversion what is fitted is the "
    "image that the model holds of the input, and what that brings is carried over), among neighbours that look alike "
    "within neighbourhood_mm, or every pixel alone (0); both were chosen on other patients (choose_updates). "
    "turned: several samples are drawn in several orientations, those that training turned and mirrored pairs to, and "
    "turned back. identity is the input times the ratio of totals that training pairs of its tracers have, "
    "identity_reprojected its OSEM image projected again, likewise. The "
    "oracles are told the truth of every slice: a Gaussian in the sinogram, and OSEM with a Gaussian, projected. All "
    "trained methods begin at, or are given, the input's OSEM image projected again, beside the input as measured, "
    "and see pairs turned and mirrored (low dose all the way round, other tasks and multi_task by at most 10 "
    "degrees); bridge, regression and attention train on the decoded sinogram's error, too, ddbm, conditional and "
    "regression_pixels do not. Of ddbm, bridge, preconditioning and sampler are as published, the rest is as of ours. "
    "bridge_without_* lack one part. stage1 is what the autoencoder makes of the expected targets themselves, so what "
    "latents can hold. Stage 1 was trained on corrected sinograms alone. Conversion is hypothetical, never "
    "quantitative, and what separates two tracers is what was learned, not physics.",
}
_MARKERS = "osD^vP*X<>phd"  # of the groups of a figure, for those who cannot tell colours apart


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows there is time for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(TITLES))
    parser.add_argument("--minutes", type=float, help="begin no row later than this; 0 only writes the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--vae-steps", type=int, help="of stage 1 (default: 300; for downstream the scale's)")
    parser.add_argument("--ldm-steps", type=int, help="of stage 2 (default: 400; for downstream the scale's)")
    parser.add_argument("--samples", type=int, default=245, help="generated slices per row")
    parser.add_argument("--sampler", default="dpm++2m")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of samples of ours (%(default)s)")
    parser.add_argument("--label", help="names a table of its own, beside the usual one: other budgets, for example")
    parser.add_argument("--n", type=int, default=500, help="training slices of the baselines and of stages 1 and 2")
    parser.add_argument("--task", choices=TASKS, default="low_dose", help="of the downstream study, as all up to scale")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=600, help="of every fine-tuning")
    parser.add_argument("--intervals", type=int, default=16, help="samples of each slice, for 90 %% intervals")
    parser.add_argument("--test-patients", type=int, default=20)
    parser.add_argument("--scale", default="laptop", help="name in experiments/scale, or a file of one's own")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--cache", default="outputs/cache")
    parser.add_argument("--reports", type=Path, default=FOLDER)
    parser.add_argument("--publish", action="store_true", help="copy the report to experiments/results")
    options = parser.parse_args(arguments)
    usual = Budget.of(options.scale) if options.study == "downstream" else Budget(300, 400)
    budget = Budget(options.vae_steps or usual.vae, options.ldm_steps or usual.ldm)
    sampling = Sampling(options.sampler, options.sampling_steps, guidance=options.guidance)
    label = options.label
    if label is not None and (not re.fullmatch(r"[A-Za-z0-9_]+", label) or label.startswith(tuple(TITLES))):
        parser.error(
            f"--label is {label!r}, but must be of letters, digits and _, and begin with no study's name: files are "
            "named by it."
        )
    if options.study == "downstream":
        if options.label or options.guidance != GUIDANCE:
            parser.error(
                "--label and --guidance are for the other studies: give downstream tables an --output and --reports, "
                "and leave guidance as it is."
            )
        return downstream_study(options, budget)
    folder = options.output / _named(options)
    bench = Bench(options.output, options.cache, options.samples)
    if options.study == "few_shot":
        rows = few_shot.rows(bench, budget, options.seeds, sampling)
    elif options.study == "steps":
        rows = steps.rows(bench, budget, folder / "model", Recipe(options.n, options.seeds[0]), options.guidance)
    elif options.study == "layers":
        rows = layers.rows(bench, budget, options.n, options.seeds)
    elif options.study == "compute":
        rows = compute.rows(bench, budget, folder, options.seeds[0], sampling)
    else:
        rows = baselines.rows(bench, budget, folder, options.n, options.seeds, sampling)

    def report(outcome: Outcome) -> Path:
        return write(options, bench, folder, outcome)

    outcome = run_rows(rows, folder, options.minutes, report)
    finish(options, outcome, write(options, bench, folder, outcome, last=True))


def downstream_study(options: argparse.Namespace, budget: Budget) -> None:
    """Run the rows of a downstream task that there is time for and write the report."""
    plan = Plan(
        task=options.task,
        pairs=options.pairs,
        seeds=tuple(options.seeds),
        stages=budget,
        slices=options.n,
        steps=options.steps,
        samples=options.intervals,
        test_patients=options.test_patients,
        scale=options.scale,
        output=options.output,
        cache=options.cache,
    )

    def report(outcome: Outcome) -> Path:
        more: dict[str, Any] = {
            "title": TITLES["downstream"].format(task=plan.task),
            "not_run": outcome.not_run,
            "row_seconds": outcome.seconds,
            "summary": downstream_report.summary(outcome.done),
            "conclusions": downstream_report.conclusions(plan, outcome),
            "calibration": downstream_report.curves(outcome.done),
        }
        missing = [f"Not run: {', '.join(outcome.not_run)}."] if outcome.not_run else []
        more["remarks"] = " ".join([REMARKS["downstream"], *more["conclusions"], *missing])
        name = f"downstream_{plan.task}"
        if outcome.done:
            downstream_report.draw(plan, outcome, options.reports / f"{name}.png")
        print(table(more["summary"]), *more["conclusions"], *missing, sep="\n")
        return write_report(name, downstream.expanded(outcome.done), plan.seeds, options.reports, **more)

    outcome = run_rows(downstream.rows(plan), plan.folder, options.minutes, report)
    finish(options, outcome, report(outcome))


def finish(options: argparse.Namespace, outcome: Outcome, path: Path) -> None:
    """Publish a report and its pictures, if that is asked for, and say where it is."""
    if options.publish:
        for made in (path, *path.parent.glob(f"{path.stem}*.png")):
            shutil.copy(made, HERE / "results" / made.name)
    print(f"{len(outcome.done)} rows, {len(outcome.not_run)} not run. Numbers: {path}")


def write(options: argparse.Namespace, bench: Bench, folder: Path, outcome: Outcome, last: bool = False) -> Path:
    """Write the report of what there is so far; intervals, which take minutes, at the last."""
    name = f"study_{_named(options)}"
    more: dict[str, Any] = {
        "title": TITLES[options.study] + (f" ({options.label})" if options.label else ""),
        "not_run": outcome.not_run,
        "row_seconds": outcome.seconds,
    }
    conclusions = []
    if options.study == "few_shot":
        more["summary"] = few_shot.summary(outcome, bench.real_power if outcome.done else {})
        brought = few_shot.contributions(outcome)
        if brought:
            more["tables"] = {"What each ingredient brings: the mean difference, with minus without it": brought}
        conclusions.append(few_shot.said(brought))
        if last:
            more["data_efficiency"] = few_shot.data_efficiency(bench, folder, outcome)
            conclusions.append(more["data_efficiency"]["said"])
    else:
        studies = {"steps": steps, "compute": compute, "layers": layers, "baselines": baselines}
        shown: Sequence[str] = studies[options.study].SHOWN
        real_power = bench.real_power if outcome.done and "power_min_30mm" in shown else {}
        more["summary"] = summary(options.study, outcome.done, shown, real_power)
    if options.study == "steps":
        conclusions.append(steps.conclusion(outcome.done))
    if options.study == "layers":
        conclusions.append(layers.conclusion(outcome.done))
    if options.study == "baselines":
        whole = baselines.WholeSets([], {})
        if last and outcome.done:
            whole = baselines.whole_sets(bench, folder, outcome.done)
        conclusions.append(baselines.conclusion(outcome.done, whole.apart))
        tables = {"Distances of whole sets": whole.lines, "Consistency of ours": baselines.looks(outcome.done)}
        more["tables"] = {name: lines for name, lines in tables.items() if lines}
    if options.study in ("few_shot", "baselines"):
        by = ("n", "augmentation") if options.study == "few_shot" else ("method",)
        title = "Samples with counting noise against noisy slices"
        more["tables"] = {**more.get("tables", {}), title: few_shot.renoised(outcome, by)}
    if outcome.not_run:
        conclusions.append(f"Not run: {', '.join(outcome.not_run)}.")
    more["remarks"] = " ".join([REMARKS[options.study].format(guidance=options.guidance), *conclusions])
    picture = options.reports / f"{name}.png"
    if outcome.done:
        if options.study == "baselines":
            baselines.draw(bench, folder, outcome.done, picture)
        elif options.study == "layers":
            layers.draw(folder, outcome.done, picture)
        else:
            save_figure(curves(options.study, outcome.done), picture)
    seeds = sorted({int(row["seed"]) for row in outcome.done})
    print(table(more["summary"]), *conclusions, sep="\n")
    return write_report(name, outcome.done, seeds, options.reports, **more)


def _named(options: argparse.Namespace) -> str:
    # the label first: the pictures of a report are those whose names begin with its own
    return f"{options.label}_{options.study}" if options.label else str(options.study)


def summary(
    study: str, done: Sequence[dict[str, Any]], shown: Sequence[str], real_power: dict[str, float]
) -> list[dict[str, Any]]:
    """Return one line per setting, over seeds, and the floor."""
    keys = {
        "steps": ("sampler", "steps"),
        "compute": ("augmentation", "ldm_steps"),
        "layers": ("kind",),
        "baselines": ("method",),
    }[study]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in done:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    if study in ("steps", "compute"):
        groups = dict(sorted(groups.items()))
    lines = [dict(zip(keys, values, strict=True)) | few_shot.spread(group, shown) for values, group in groups.items()]
    if done:
        known = {name: value for name, value in real_power.items() if name in shown}
        floors = [known | {name: row[f"{name}_floor"] for name in shown if f"{name}_floor" in row} for row in done]
        lines.append({keys[0]: "real slices (floor)"} | few_shot.spread(floors, shown))
    return lines


def curves(study: str, done: Sequence[dict[str, Any]]) -> Figure:
    """Draw four numbers against what the study varies, seeds as points, means as lines, the floor dashed."""
    along, by, label = {
        "few_shot": ("n", "augmentation", "training slices"),
        "steps": ("steps", "sampler", "sampling steps"),
        "compute": ("ldm_steps", "augmentation", "steps of stage 2"),
    }[study]
    names = {
        "kid_conv": "KID, random features",
        "sw_conv": "sliced Wasserstein, random features",
        "spectrum_image_30mm": "power at 30 mm over real, of halves of the patients",
        "hl_residual": "Helgason-Ludwig residual",
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    groups = sorted({str(row[by]) for row in done})
    ticks = sorted({row[along] for row in done})
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, names.items(), strict=True):
        for i, group in enumerate(groups):
            aside = 1.025 ** (i - (len(groups) - 1) / 2)  # so that groups do not hide one another
            points = sorted((row[along], row[name]) for row in done if row[by] == group)
            places = sorted({x for x, _ in points})
            means = [sum(y for x, y in points if x == place) / sum(x == place for x, _ in points) for place in places]
            look = {"color": f"C{i}" if i < 10 else "black", "marker": _MARKERS[i % len(_MARKERS)]}
            axis.plot([aside * x for x in places], means, color=look["color"])
            axis.plot([aside * x for x, _ in points], [y for _, y in points], ls="", ms=5, label=group, **look)
        floor = sum(row[f"{name}_floor"] for row in done) / len(done)
        axis.axhline(floor, color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlabel(label)
        axis.set_title(title, fontsize=9)
        if min(row[name] for row in done) > 0:
            if floor <= 0:
                axis.set_title(f"{title} (dashed line: {floor:.2g}, below)", fontsize=9)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 5, 7)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_yticks([], minor=True)
            axis.tick_params(axis="y", labelsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    what = "one training, sampled in different ways" if study == "steps" else "trainings; lines: their means"
    figure.suptitle(f"Points: {what}; dashed: one half of the held-out patients beside the other")
    return figure


if __name__ == "__main__":
    main()
