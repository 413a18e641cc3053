"""What else makes sinograms from the same slices with the same compute (arXiv 2509.09130, fig. 4)?

Ours and the LDM of one channel without masks are trained for the steps of the budget; GAN and score-based model for as
many steps as cost the same arithmetic; the others are fitted or draw from the training slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from allpet import (
    AutoencoderSystem,
    LatentDiffusion,
    PCAGaussian,
    Prompt,
    Radon,
    ResampledSlices,
    Sampling,
    ScoreModel,
    ScoreSampling,
    SinogramGAN,
    SymmetryAugmentation,
    VAEPrior,
    osem,
)
from allpet.cli import main as allpet
from allpet.consistency import Correction, consistency_numbers, make_consistent
from allpet.randomness import keyed_generator
from allpet.runs import newest_pretrained
from allpet.symmetry import resample
from allpet.systems.baselines.base import SinogramSystem
from allpet.systems.cost import sampling_cost, training_flops
from callbacks.figures import Tile, draw_grid, save_figure, top
from data_modules.simulated import PAPER_PROMPTS
from studies.few_shot import spread
from studies.intervals import DISTANCES, Difference, mean_of, resampled, samples_of
from studies.rows import Row
from studies.training import (
    HERE,
    TEST_PATIENTS,
    VAL_PATIENTS,
    Bench,
    Budget,
    Recipe,
    batch_size,
    facts,
    load,
    scale_file,
    system_of_run,
    train,
)

NAMES = (
    "ours",
    "ours_plain",
    "vae_prior",
    "vae_gaussian",
    "pca_gaussian",
    "resampled",
    "resampled_symmetries",
    "one_channel",
    "gan",
    "score",
)
NOISY = ("pca_gaussian", "resampled", "resampled_symmetries", "gan", "score")
"""Methods that learn noisy slices and make such; those of the others are expected ones."""
SIZES = ((96, 168), (180, 128), (256, 400))
"""Views x bins that samples are asked for besides their own."""
OPEN = 128
_DRAWN = {"FDG:brain": 3, "FDG:abdomen": 2}  # prompts of the slices in the picture, and how many of each
SHOWN = (
    "kid_conv",
    "sw_conv",
    "energy_distance",
    "precision_conv",
    "recall_conv",
    "coverage_conv",
    "suv_distance",
    "activity_distance",
    "power_min_30mm",
    "power_max_30mm",
    "power_min_20mm",
    "power_max_20mm",
    "row_sum_cv",
    "centre_residual",
    "hl_residual",
    "seam_jump",
    "copy_rate",
    "copy_control",
    "prompt_obeyed",
    "utility_synthetic",
    "utility_real",
    "parameters",
    "training_tflop",
    "sampling_gflop",
    "peak_mb",
)


def rows(bench: Bench, budget: Budget, folder: Path, n: int, seeds: Sequence[int], sampling: Sampling) -> list[Row]:
    """Return the rows, seed by seed; after ours, which others need, those that are trained come last."""
    ours = {seed: folder / f"ours-seed{seed}" for seed in seeds}
    plain = replace(sampling, guidance=1.0, restore_power=False)
    how = {"ours": sampling, "one_channel": sampling, "ours_plain": plain}
    return [
        Row(
            f"{name}-seed{seed}",
            {"method": name, "n": n, "seed": seed, "vae": budget.vae, "ldm": budget.ldm}
            | (facts(how[name]) if name in how else {}),
            partial(_measure, name, bench, budget, ours[seed], n, seed, how.get(name, sampling)),
        )
        for seed in seeds
        for name in NAMES
    ]


def _measure(
    name: str, bench: Bench, budget: Budget, ours: Path, n: int, seed: int, sampling: Sampling, folder: Path
) -> dict[str, Any]:
    generator, flops = _make(name, bench, budget, ours, n, seed, sampling, folder)
    cost = sampling_cost(generator)
    fake, prompt = bench.generate(generator, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"sinogram": fake.half(), "prompt": torch.stack(list(prompt))}, folder / "samples.pt")
    numbers = bench.judge_twice(fake, prompt, n, name in NOISY, generator) | bench.use(fake, n)
    if name == "ours":
        numbers |= look_closer(bench, generator, fake, prompt, n, seed)
    return {
        "parameters": cost.total,
        "training_tflop": flops / 1e12,
        "sampling_gflop": cost.flops_per_sample / 1e9,
        **numbers,
    }


def look_closer(
    bench: Bench, model: LatentDiffusion, fake: Tensor, prompt: Prompt, n: int, seed: int
) -> dict[str, float]:
    """Measure what is asked of our samples alone.

    Returns:
        Medians of the consistency numbers as the decoder leaves them (``NAME_raw``, of 64 samples), after each
        correction (``NAME_METHOD``) and at other sizes (``NAME_VIEWSxBINS``), and what ``open_prompts`` returns, also
        where the network is asked without a prompt (``open_unconditional``).
    """
    geometry = bench.held_out.geometry
    few = Prompt(*(index[:64] for index in prompt))
    raw = model.sample(few, range(10_000 * seed, 10_000 * seed + len(few.tracer))).stack[:, 1:2]
    looks = {"raw": (raw, geometry)}
    radon = Radon(geometry)
    looks |= {name: (make_consistent(fake, radon, name), geometry) for name in get_args(Correction)}
    for views, bins in SIZES:
        wanted = Sampling(n_views=views, n_bins=bins).geometry(geometry)
        looks[f"{views}x{bins}"] = (resample(fake, geometry, wanted), wanted)
    found = {
        f"{name}_{look}": float(values.median())
        for look, (sinogram, its) in looks.items()
        for name, values in consistency_numbers(sinogram, its).items()
    }
    found |= open_prompts(bench, model, n, seed)
    unfilled = replace(model.sampling, fill_open=False)
    return found | {"open_unconditional": open_prompts(bench, model, n, seed, sampling=unfilled)["open_distance"]}


def open_prompts(bench: Bench, model: LatentDiffusion, n: int, seed: int, **options: Any) -> dict[str, float]:
    """Compare what ``OPEN`` samples with open prompts show with the training slices, as the classifier names both.

    Returns:
        Total variation between the two mixtures (``open_distance``), and what 95 % of 200 as large draws of training
        slices stay below (``open_limit``).
    """
    nothing = torch.zeros(OPEN, dtype=torch.int64)
    seeds = range(10_000 * seed, 10_000 * seed + OPEN)
    drawn = model.sample(Prompt(nothing, nothing), seeds, **options).sinogram
    train_set = bench.data(n).train_set
    named = bench.classifier.name(train_set[list(range(len(train_set)))].expected)
    kinds = named.tracer * 100 + named.region
    shown = bench.classifier.name(drawn)

    def distance(sample: Tensor) -> float:
        both = torch.cat([kinds, sample]).unique()
        shares = [(values[:, None] == both).double().mean(0) for values in (kinds, sample)]
        return float((shares[0] - shares[1]).abs().sum() / 2)

    chance = [
        distance(kinds[torch.randint(len(kinds), (OPEN,), generator=keyed_generator(i, "open"))]) for i in range(200)
    ]
    limit = float(torch.tensor(chance).quantile(0.95))
    return {"open_distance": distance(shown.tracer * 100 + shown.region), "open_limit": limit}


def _make(
    name: str, bench: Bench, budget: Budget, ours: Path, n: int, seed: int, sampling: Sampling, folder: Path
) -> tuple[Any, float]:
    """Return a generator and the arithmetic of its training, floating-point operations."""
    recipe = Recipe(n, seed)
    data = bench.data(n)
    slices = data.train_set[list(range(len(data.train_set)))]
    if name == "pca_gaussian":
        return PCAGaussian.fit(slices, data.geometry), 0.0
    if name.startswith("resampled"):
        symmetry = SymmetryAugmentation(data.geometry) if name.endswith("symmetries") else None
        return ResampledSlices(slices, data.geometry, symmetry), 0.0
    if name == "one_channel":
        recipe = Recipe(n, seed, masks=False, stack_channels=1, range_order=None)
        train(recipe, budget, folder, bench.cache)
        model = load(folder, sampling)
        return model, _flops(model, folder, recipe, budget, slices)
    train(recipe, budget, ours, bench.cache)
    model = load(ours, sampling)
    flops = _flops(model, ours, recipe, budget, slices)
    if name in ("ours", "ours_plain"):
        return model, flops
    if name.startswith("vae"):
        # a VAE as it is usually meant: one channel, no masks, no range layer
        plain = Recipe(n, seed, masks=False, stack_channels=1, range_order=None)
        shared = ours.with_name(f"vae-seed{seed}")
        allpet(plain.words("vae", budget, shared, bench.cache))
        stage1 = newest_pretrained(shared / "vae")
        prior = VAEPrior.from_stage1(stage1)
        per_slice = training_flops(AutoencoderSystem.from_pretrained(stage1), slices_of(slices, 4))
        spent = budget.vae * batch_size(plain.scale, "vae") * per_slice
        return (prior if name == "vae_prior" else prior.fit([slices])), float(spent)
    kind: dict[str, Callable[..., Any]] = {
        "gan": SinogramGAN.from_pretrained,
        "score": partial(ScoreModel.from_pretrained, sampling=ScoreSampling()),
    }
    words = ["fit"]
    for file in (HERE / "defaults.yaml", HERE / f"baselines/{name}.yaml", scale_file(recipe.scale)):
        words += ["-c", str(file)]
    words += [
        f"--run.root={folder / name}",
        f"--seed_everything={seed}",
        f"--model.seed={seed}",
        f"--data.seed={seed}",
        f"--data.num_scans={n}",
        f"--data.prompts={list(PAPER_PROMPTS)}",
        f"--data.val_patients={VAL_PATIENTS}",
        f"--data.test_patients={TEST_PATIENTS}",
        f"--data.cache={bench.cache}",
    ]
    # one step, to learn what a step costs; then as many as ours cost
    allpet([*words, f"--run.root={folder / 'one'}", "--trainer.max_steps=1", "--trainer.val_check_interval=1"])
    probe = system_of_run(newest_pretrained(folder / "one").parent, SinogramSystem)
    probe.geometry = data.geometry
    per_step = batch_size(recipe.scale, name) * training_flops(probe.train(), slices_of(slices, 4))
    steps = max(round(flops / per_step), 1)
    allpet([*words, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"])
    return kind[name](newest_pretrained(folder / name)), float(steps * per_step)


def slices_of(slices: Any, n: int) -> Any:
    """Return the first n slices of a batch."""
    parts = {
        field: value[:n] if isinstance(value, Tensor) else value
        for field, value in slices._asdict().items()
        if field != "prompt"
    }
    return type(slices)(prompt=type(slices.prompt)(*(index[:n] for index in slices.prompt)), **parts)


def _flops(model: LatentDiffusion, folder: Path, recipe: Recipe, budget: Budget, slices: Any) -> float:
    stage1 = AutoencoderSystem.from_pretrained(newest_pretrained(folder / "vae"))
    batch = slices_of(slices, 4)
    vae = budget.vae * batch_size(recipe.scale, "vae") * training_flops(stage1.train(), batch)
    if model.denoiser.config["label_size"]:
        batch = batch._replace(symmetry=torch.zeros(4, model.denoiser.config["label_size"]))
    return float(vae + budget.ldm * batch_size(recipe.scale, "ldm") * training_flops(model.train(), batch))


_LIMITS: dict[str, tuple[str, float]] = {
    "row_sum_cv": ("at most", 0.01),
    "centre_residual": ("at most", 0.0015),
    "hl_residual": ("at most", 0.012),
    "seam_jump": ("at most", 1.5),
    "power_min_30mm": ("at least", 0.8),
    "power_max_30mm": ("at most", 1.2),
    "power_min_20mm": ("at least", 0.5),
    "power_max_20mm": ("at most", 2.0),
    "copy_rate": ("at most", 0.02),
    "prompt_obeyed": ("at least", 0.95),
}
_CONSISTENCY = ("row_sum_cv", "centre_residual", "hl_residual", "seam_jump")
_LOOKS = {
    "as sampled (power restored)": "",
    "as the decoder leaves them": "_raw",
    **{f"corrected: {name}": f"_{name}" for name in get_args(Correction)},
    **{f"{views} x {bins}": f"_{views}x{bins}" for views, bins in SIZES},
}
"""Our samples in words, and what names of their numbers end in."""


Differences = dict[str, dict[str, dict[str, Difference]]]


class WholeSets(NamedTuple):
    """Distances of all samples of a training from all held-out slices, expected or noisy.

    Attributes:
        lines: of each method, mean and, over seeds, standard deviation; and of the real slices that were trained on.
        apart: by distance, ours or ours_plain and method, that of the first minus that of the method, means over the
            seeds that both have, with intervals.
    """

    lines: list[dict[str, Any]]
    apart: Differences


def whole_sets(bench: Bench, folder: Path, done: Sequence[dict[str, Any]]) -> WholeSets:
    """Measure distances on random convolutions and on the encoder's features.

    Methods whose samples are noisy are compared among noisy slices, where ours get noise, too.
    """
    by_method: dict[str, dict[int, str]] = {}
    for row in done:
        by_method.setdefault(row["method"], {})[row["seed"]] = row["row"]
    samples = samples_of(folder, done)
    parts = (bench.real_set, bench.held_out.train_set)
    test, train_set = (part[list(range(len(part)))] for part in parts)
    apart: Differences = {}
    lines: list[dict[str, Any]] = []
    for noisy in (False, True):
        ours = [name for name in ("ours", "ours_plain") if name in by_method]
        others = [name for name in by_method if name not in ours and (name in NOISY) == noisy]
        if not others:
            continue
        sets: dict[str, Tensor] = {}
        for name in [*ours, *others]:
            for key in by_method[name].values():
                sets[key] = bench.with_noise(samples[key]) if noisy and name in ours else samples[key]
        sets["real"] = train_set.sinogram if noisy else train_set.expected
        known = test.sinogram if noisy else test.expected
        columns: dict[str, dict[str, Tensor]] = {}
        for features, extract in {"conv": None, "encoder": bench.encoder}.items():
            for distance in DISTANCES:
                columns[f"{distance}_{features}"] = resampled(known, test.patient_id, sets, distance, extract=extract)
        kind = "noisy" if noisy else "expected"
        for name in [*ours, *others]:
            keys = by_method[name].values()
            rows = [{title: float(found[key][0]) for title, found in columns.items()} for key in keys]
            lines.append({"slices": kind, "method": name, "seeds": len(rows)} | spread(rows, list(columns)))
        real = {title: float(found["real"][0]) for title, found in columns.items()}
        lines.append({"slices": kind, "method": "real training slices", "seeds": ""} | spread([real], list(columns)))
        for title, found in columns.items():
            for mine in ours:
                for name in others:
                    seeds = sorted(by_method[mine].keys() & by_method[name].keys())
                    if seeds:
                        pair = (mean_of(found, [by_method[one][seed] for seed in seeds]) for one in (mine, name))
                        apart.setdefault(title, {}).setdefault(mine, {})[name] = Difference.of(*pair)
    return WholeSets(lines, apart)


def looks(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how consistent our samples are as decoded, after each correction and at other sizes, and real slices."""
    rows = [row for row in done if row["method"] == "ours"]
    lines: list[dict[str, Any]] = [
        {"samples": words}
        | spread([{name: row[f"{name}{look}"] for name in _CONSISTENCY} for row in rows], _CONSISTENCY)
        for words, look in _LOOKS.items()
        if rows
    ]
    floors = [{name: row[f"{name}_floor"] for name in _CONSISTENCY if f"{name}_floor" in row} for row in rows]
    if any(floors):
        lines.append({"samples": "real slices (floor)"} | spread(floors, _CONSISTENCY))
    return lines


def conclusion(done: Sequence[dict[str, Any]], apart: Differences) -> str:
    """Say which limits our samples keep, which baselines they beat, and how they fare at other sizes.

    Args:
        done: rows.
        apart: of ``whole_sets``.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        by_method.setdefault(row["method"], []).append(row)
    if "ours" not in by_method:
        return "Ours was not run."

    def of(method: str, name: str) -> float:
        return mean(row[name] for row in by_method[method])

    def verdict(kept: bool) -> str:
        return "holds" if kept else "does not hold"

    def within(name: str, limit: str) -> str:
        word, value = _LIMITS[limit]
        found = of("ours", name)
        return f"{found:.3g} ({word} {value:g}: {verdict(found <= value if word == 'at most' else found >= value)})"

    parts = ["Limits, ours: " + ", ".join(f"{name} {within(name, name)}" for name in _LIMITS) + "."]
    for distance, by_ours in apart.items():
        for mine, found in by_ours.items():
            named = {name: f"{name} {found[name]}" for name in NAMES if name in found}
            better = [text for name, text in named.items() if found[name].high < 0]
            worse = [text for name, text in named.items() if found[name].low > 0]
            untold = [text for text in named.values() if text not in better + worse]
            parts.append(
                f"{distance} of whole sets, {mine} minus the other (means over the seeds that both have; 95 % interval "
                f"over slices and held-out patients, not over trainings): lower than {', '.join(better) or 'none'}; "
                f"higher than {', '.join(worse) or 'none'}; not told apart from {', '.join(untold) or 'none'}."
            )
    for method in (name for name in ("vae_prior", "vae_gaussian", "gan", "score") if name in by_method):
        kept = [name for name in _CONSISTENCY if of("ours", name) < of(method, name)]
        if len(kept) < len(_CONSISTENCY):
            lost = ", ".join(name for name in _CONSISTENCY if name not in kept)
            parts.append(f"{method} is as consistent or more so in {lost}.")
    beyond = [
        f"{words}: {name} {of('ours', name + look):.3g}"
        for words, look in _LOOKS.items()
        for name in _CONSISTENCY
        if of("ours", name + look) > _LIMITS[name][1]
    ]
    parts.append(
        "Limits of consistency, as the decoder leaves samples, after corrections and at other sizes: "
        + (f"beyond them are {'; '.join(beyond)}." if beyond else "all hold.")
    )
    parts.append(
        f"What open prompts show lies {of('ours', 'open_distance'):.3g} (total variation) from the training mixture, "
        f"from which they are drawn; 95 % of as large draws of training slices lie within "
        f"{of('ours', 'open_limit'):.3g}: it {verdict(of('ours', 'open_distance') <= of('ours', 'open_limit'))}. What "
        f"the network shows that is told nothing lies {of('ours', 'open_unconditional'):.3g} from it: as near it "
        f"{verdict(of('ours', 'open_unconditional') <= of('ours', 'open_limit'))}."
    )
    return " ".join(parts)


def draw(bench: Bench, folder: Path, done: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw sinograms and images of every method side by side, a box of each image enlarged, as the paper's figure 4.

    Slices are those of the first prompts of FDG brain and abdomen, not chosen.
    """
    test = bench.real_set
    names = test.prompt.names()
    radon = Radon(bench.held_out.geometry)
    asked = [names[int(i)] for i in bench.rows()]

    def first(prompts: Sequence[str]) -> list[int]:
        places = {kind: [i for i, name in enumerate(prompts) if name == kind] for kind in _DRAWN}
        return [i for kind, count in _DRAWN.items() for i in places[kind][:count]]

    shown: list[tuple[str, Tensor]] = [("held out", test[first(names)].expected)]
    for row in done:
        if row["seed"] == done[0]["seed"]:
            shown.append((row["method"], samples_of(folder, [row])[row["row"]][first(asked)]))
    rows, labels = [], []
    for name, sinograms in shown:
        images = osem(radon, sinograms.clamp(min=0), iterations=2, subsets=8)
        middle, half = images.shape[-1] // 2, 12
        box = (middle - half, middle - half, 2 * half, 2 * half)
        rows.append(
            [
                tile
                for s, i in zip(sinograms[:, 0], images[:, 0], strict=True)
                for tile in (
                    Tile(s, (0, top(s))),
                    Tile(i, (0, top(i)), box=box),
                    Tile(i[middle - half : middle + half, middle - half : middle + half], (0, top(i))),
                )
            ]
        )
        labels.append(name)
    drawn = " and ".join(_DRAWN)
    return save_figure(draw_grid(rows, labels, f"{drawn}: sinogram, OSEM image, and the framed part enlarged"), path)
