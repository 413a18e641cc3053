"""From nothing to generated sinograms: train both stages on simulated slices and look at what comes out.

    python experiments/demo.py [--seed 0 1 2]      (make demo)

Leaves, in ``outputs/demo/seed0/``, both runs, ``gallery.png`` (generated sinograms and their OSEM images beside
held-out ones) and ``transition.gif`` (how they emerge from noise), and the numbers in ``outputs/reports/demo.json`` and
``demo.md``: consistency of expected, noisy, reconstructed and generated sinograms, error of the reconstruction,
distance of generated sinograms to the nearest training slice and their diversity. What is measured is the raw output of
the decoder. Given again, the command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from studies.training import data_of_run
from torch import Tensor

from allpet import AutoencoderSystem, LatentDiffusion, ParallelBeam, Prompt, Radon, Sampling, SinogramBatch, fbp, osem
from allpet.cli import main as allpet
from allpet.consistency import consistency_numbers
from allpet.metrics import diversity, energy_distance, nearest_distance, relative_l2
from allpet.reports import table, write_report
from allpet.runs import newest_pretrained
from callbacks.figures import Tile, draw_grid, save_animation, save_figure, top
from data_modules import SimulatedPET

KINDS = ("expected", "noisy", "reconstructed", "generated")
SAMPLING = Sampling("dpm++2m", steps=20)
NUMBERS = ("row_sum_cv", "centre_residual", "hl_residual", "seam_jump")


def train(stage: str, folder: Path, seed: int, steps: int, extra: list[str]) -> Path:
    """Train a stage through the command line and return its pretrained folder."""
    words = ["fit"]
    for name in ("defaults", stage, "scale/laptop", "demo"):
        words += ["-c", f"experiments/{name}.yaml"]
    words += [
        f"--run.root={folder / stage}",
        f"--seed_everything={seed}",
        f"--model.seed={seed}",
        f"--data.seed={seed}",
    ]
    allpet([*words, f"--trainer.max_steps={steps}", *extra])
    return newest_pretrained(folder / stage)


def held_out(data: SimulatedPET, prompt: str) -> SinogramBatch:
    """Return all test slices of a prompt as one batch, with the masks of evaluation."""
    names = data.test_set.prompt.names()
    return data.augment(data.test_set[[row for row, name in enumerate(names) if name == prompt]])


def measure(
    kind: str, prompt: str, sinogram: Tensor, real: SinogramBatch, train_expected: Tensor, geometry: ParallelBeam
) -> dict[str, Any]:
    """Return one row of the table; every number is a median over slices but diversity and energy distance.

    Args:
        kind: one of ``KINDS``.
        prompt: of all slices.
        sinogram: what is measured, ``(slices, 1, views, bins)``.
        real: held-out slices of the same prompt.
        train_expected: expected sinograms of the training slices of the same prompt.
        geometry: of all sinograms.
    """
    row: dict[str, Any] = {"kind": kind, "prompt": prompt, "slices": len(sinogram)}
    numbers = consistency_numbers(sinogram, geometry)
    row |= {name: float(numbers[name].median()) for name in NUMBERS}
    if kind in ("noisy", "reconstructed"):
        row["relative_l2"] = float(relative_l2(sinogram, real.expected).median())
    row["nearest_training"] = float(nearest_distance(sinogram, train_expected).median())
    row["diversity"] = float(diversity(sinogram))
    row["energy_distance"] = float(energy_distance(sinogram, real.expected))
    return row


def draw(
    folder: Path,
    prompts: list[str],
    real: dict[str, SinogramBatch],
    generated: dict[str, Tensor],
    radon: Radon,
    columns: int = 8,
) -> Path:
    """Draw the gallery: for each prompt held-out slices and generated ones, sinograms above their OSEM images."""
    rows, labels = [], []
    for prompt in prompts:
        for name, sinograms in (("held-out", real[prompt].expected), ("generated", generated[prompt])):
            chosen = sinograms[torch.linspace(0, len(sinograms) - 1, columns).long()]
            images = osem(radon, chosen, iterations=2, subsets=8)
            rows += [[Tile(s[0], (0, top(s))) for s in chosen], [Tile(i[0], (0, top(i))) for i in images]]
            labels += [f"{prompt}\n{name}\nsinogram", f"{prompt}\n{name}\nOSEM image"]
    return save_figure(
        draw_grid(rows, labels, "Held-out simulated slices and generated ones, each tile in its own range"),
        folder / "gallery.png",
    )


def animate(folder: Path, model: LatentDiffusion, prompts: list[str], radon: Radon, seed: int) -> Path:
    """Draw how one sinogram of each prompt, and its image, emerge from noise."""
    frames: list[tuple[str, Tensor]] = []
    model.sample(
        Prompt.of(prompts),
        [seed + index for index in range(len(prompts))],
        callback=lambda step, steps, sinogram: frames.append((f"step {step} of {steps}", sinogram.clone())),
    )
    limits = [(top(s), top(i)) for s, i in zip(frames[-1][1], fbp(radon, frames[-1][1]), strict=True)]
    pictures = [
        [
            [Tile(s[0], (0, high)) for s, (high, _) in zip(sinogram, limits, strict=True)],
            [Tile(i[0], (0, high)) for i, (_, high) in zip(fbp(radon, sinogram), limits, strict=True)],
        ]
        for _, sinogram in frames
    ]
    return save_animation(pictures, [label for label, _ in frames], folder / "transition.gif")


def look(
    folder: Path, seed: int, vae_folder: Path, ldm_folder: Path, samples: int, sampling: Sampling = SAMPLING
) -> tuple[list[dict[str, Any]], Path]:
    """Generate, draw and measure with two trained stages; return the rows of the table and the gallery."""
    model = LatentDiffusion.from_pretrained(ldm_folder, sampling)
    autoencoder = AutoencoderSystem.from_pretrained(vae_folder)
    data = data_of_run(ldm_folder.parent, SimulatedPET)
    radon, prompts = data.radon, list(data.prompts)
    real = {prompt: held_out(data, prompt) for prompt in prompts}
    generated = {
        prompt: model.sample(Prompt.of([prompt] * samples), range(seed * 1000, seed * 1000 + samples), progress=True)
        for prompt in prompts
    }
    rows = []
    for prompt in prompts:
        train_rows = [row for row, name in enumerate(data.train_set.prompt.names()) if name == prompt]
        kinds = {
            "expected": real[prompt].expected,
            "noisy": real[prompt].sinogram,
            "reconstructed": autoencoder.reconstruct(real[prompt]),
            "generated": generated[prompt].sinogram,
        }
        trained_on = data.train_set[train_rows].expected
        for kind in KINDS:
            row = measure(kind, prompt, kinds[kind], real[prompt], trained_on, data.geometry)
            rows.append({"seed": seed, **row})
    std = torch.cat([model.encode(real[prompt]) for prompt in prompts]).std(dim=(0, 2, 3))
    print(f"Std of held-out latents per channel: {', '.join(f'{value:.2f}' for value in std.tolist())}.")
    gallery = draw(folder, prompts, real, {prompt: generated[prompt].sinogram for prompt in prompts}, radon)
    animate(folder, model, prompts, radon, seed * 1000)
    return rows, gallery


def main() -> None:
    """Train, generate, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of weights, masks, noise and samples")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of runs and pictures")
    parser.add_argument("--reports", type=Path, default=Path("outputs/reports"), help="folder of the numbers")
    parser.add_argument("--vae-steps", type=int, default=1000, help="steps of stage 1; `make train-vae` makes more")
    parser.add_argument("--ldm-steps", type=int, default=1200, help="steps of stage 2; `make train-ldm` makes more")
    parser.add_argument("--samples", type=int, default=64, help="generated sinograms per prompt")
    parser.add_argument("--sampling-steps", type=int, default=SAMPLING.steps, help="steps from noise to a sinogram")
    arguments, extra = parser.parse_known_args()
    sampling = replace(SAMPLING, steps=arguments.sampling_steps)
    began, rows, made = time.perf_counter(), [], []
    continued = any((arguments.output / f"seed{seed}").exists() for seed in arguments.seed)
    for seed in arguments.seed:
        folder = arguments.output / f"seed{seed}"
        vae_folder = train("vae", folder, seed, arguments.vae_steps, extra)
        ldm_folder = train("ldm", folder, seed, arguments.ldm_steps, [f"--model.autoencoder={vae_folder}", *extra])
        more, gallery = look(folder, seed, vae_folder, ldm_folder, arguments.samples, sampling)
        rows += more
        made += [gallery, gallery.with_name("transition.gif")]
    summary = {
        kind: {
            name: statistics.median(row[name] for row in rows if row["kind"] == kind and name in row)
            for name in (*NUMBERS, "relative_l2")
            if any(row["kind"] == kind and name in row for row in rows)
        }
        for kind in KINDS
    }
    seconds = time.perf_counter() - began
    more_keys = {"seconds": seconds, "continued": continued, **summary}
    report = write_report("demo", rows, arguments.seed, arguments.reports, **more_keys)
    print(table(rows))
    print(f"{seconds:.0f} seconds. Pictures: {', '.join(map(str, made))}. Numbers: {report}. Runs: {arguments.output}")


if __name__ == "__main__":
    main()
