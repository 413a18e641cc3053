"""What stage 1's convolutions see beyond the half turn, and whether folded bins cost anything: stage 1 alone.

A sinogram goes on past either end of its half turn, p(theta + pi, s) = p(theta, -s). ``seam`` shows the network a few
views of that and lets what the decoder draws of either end fade into the other; ``no_seam`` pads with zeros.
``moebius`` and ``symmetric`` continue every layer instead, which needs bins that are not folded into channels: they are
compared with ``patch_1``, a seam with one more level, of half the width, in place of the folding. Kernels of any form
are another operation beyond the end, where bins are mirrored, than within (``moebius``); symmetric ones are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from allpet import AutoencoderSystem
from allpet.cli import main as allpet
from allpet.consistency import consistency_numbers
from allpet.metrics import psnr, relative_l2
from allpet.runs import newest_pretrained
from allpet.systems.cost import training_flops
from callbacks.figures import save_figure
from studies.few_shot import VARIANTS
from studies.rows import Row
from studies.training import Bench, Budget, Recipe, batch_size, through_stage1

KINDS: dict[str, dict[str, Any]] = {
    "seam": {},
    **{name: VARIANTS[name] for name in ("no_seam", "patch_1", "moebius", "symmetric")},
}
PAIRS = (("seam", "no_seam"), ("patch_1", "seam"), ("moebius", "patch_1"), ("symmetric", "patch_1"))
"""What is compared: the first with the second."""
EDGE = 2
"""Views at either end of the half turn whose error is told apart."""
JUDGED = ("relative_l2", "edge_l2", "seam_jump", "hl_residual")
SHOWN = (*JUDGED, "psnr", "row_sum_cv", "parameters", "training_tflop")


def rows(bench: Bench, budget: Budget, n: int, seeds: Sequence[int]) -> list[Row]:
    """Return the rows, seed by seed."""
    return [
        Row(
            f"{name}-seed{seed}",
            {"kind": name, "n": n, "seed": seed, "steps": budget.vae},
            partial(_measure, bench, budget, Recipe(n, seed, **changes)),
        )
        for seed in seeds
        for name, changes in KINDS.items()
    ]


def _measure(bench: Bench, budget: Budget, recipe: Recipe, folder: Path) -> dict[str, Any]:
    allpet(recipe.words("vae", budget, folder, bench.cache))
    system = AutoencoderSystem.from_pretrained(newest_pretrained(folder / "vae"))
    slices = bench.data(recipe.n).train_set[[0, 1, 2, 3]]
    per_step = batch_size(recipe.scale, "vae") * training_flops(system.train(), slices)
    test = bench.real_set[list(range(len(bench.real_set)))]
    drawn = through_stage1(system.eval(), test.sinogram)
    torch.save(view_errors(drawn, test.expected), folder / "views.pt")
    numbers, floors = (consistency_numbers(x, bench.held_out.geometry) for x in (drawn, test.expected))
    ends = [torch.cat([x[..., :EDGE, :], x[..., -EDGE:, :]], dim=-2) for x in (drawn, test.expected)]
    return {
        "relative_l2": float(relative_l2(drawn, test.expected).mean()),
        "edge_l2": float(relative_l2(*ends).mean()),
        "psnr": float(psnr(drawn, test.expected).mean()),
        **{name: float(values.median()) for name, values in numbers.items()},
        **{f"{name}_floor": float(values.median()) for name, values in floors.items()},
        "parameters": sum(parameter.numel() for parameter in system.autoencoder.parameters()),
        "training_tflop": budget.vae * per_step / 1e12,
    }


def view_errors(drawn: Tensor, expected: Tensor) -> Tensor:
    """Return the error of each view, relative to the slice's mean square of a view, root mean square over slices."""
    size = expected.square().sum(-1).mean(-1, keepdim=True)
    return ((drawn - expected).square().sum(-1) / size).mean((0, 1)).sqrt()


def conclusion(done: Sequence[dict[str, Any]]) -> str:
    """Say by how much each kind differs from what it is compared with, in each seed that both have."""
    found = {(row["kind"], row["seed"]): row for row in done}
    parts = []
    for first, second in PAIRS:
        seeds = sorted(seed for kind, seed in found if kind == first and (second, seed) in found)
        if not seeds:
            continue
        numbers = []
        for name in JUDGED:
            apart = [found[first, seed][name] / found[second, seed][name] - 1 for seed in seeds]
            numbers.append(f"{name} {100 * mean(apart):+.1f} % ({', '.join(f'{100 * x:+.1f}' for x in apart)})")
        parts.append(f"{first} against {second}: {', '.join(numbers)}.")
    if not parts:
        return "No two have been run that are compared."
    return " ".join(["Mean difference, and that of each seed:", *parts])


def draw(folder: Path, done: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the error of each view of held-out slices, mean over seeds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for kind in dict.fromkeys(row["kind"] for row in done):
        mine = [row["row"] for row in done if row["kind"] == kind]
        errors = [torch.load(folder / key / "views.pt", weights_only=True) for key in mine]
        axis.plot(torch.stack(errors).mean(0), label=kind)
    axis.set_xlabel("view (half a turn)")
    axis.set_ylabel("relative error")
    axis.set_title("Held-out slices through stage 1: error of each view, mean over trainings", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return save_figure(figure, path)
