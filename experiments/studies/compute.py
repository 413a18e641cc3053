"""Quality against training compute: stage 2 for a quarter to four times the steps, with all ingredients and with none.

Every budget is a training of its own with its own learning-rate schedule; stage 1 is trained once per recipe.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from allpet import Sampling
from allpet.cli import main as allpet
from allpet.runs import newest_pretrained
from allpet.systems.cost import training_flops
from allpet.systems.latent_diffusion import LatentDiffusion
from studies.few_shot import AUGMENTATIONS
from studies.rows import Row
from studies.training import Bench, Budget, Recipe, batch_size, facts

SHARES = (1.0, 0.25, 4.0, 0.5, 2.0)
SHOWN = (
    "kid_conv",
    "sw_conv",
    "energy_distance",
    "spectrum_image_30mm",
    "hl_residual",
    "copy_rate",
    "copy_control",
    "prompt_obeyed",
)


def rows(bench: Bench, budget: Budget, folder: Path, seed: int, sampling: Sampling) -> list[Row]:
    """Return the rows, the whole range of ``both`` before that of ``nothing``."""
    return [
        Row(
            f"{name}-{share:g}x",
            {
                "augmentation": name,
                "ldm_steps": round(share * budget.ldm),
                "vae_steps": budget.vae,
                "seed": seed,
                **facts(sampling),
            },
            partial(
                _measure,
                bench,
                Budget(budget.vae, round(share * budget.ldm)),
                Recipe(500, seed, **AUGMENTATIONS[name]),
                folder / f"{name}-vae",
                sampling,
            ),
        )
        for name in ("both", "nothing")
        for share in SHARES
    ]


def _measure(
    bench: Bench, budget: Budget, recipe: Recipe, shared: Path, sampling: Sampling, folder: Path
) -> dict[str, Any]:
    allpet(recipe.words("vae", budget, shared, bench.cache))
    words = recipe.words("ldm", budget, folder, bench.cache)
    allpet([word for word in words if "model.autoencoder=" not in word] + [f"--model.autoencoder={shared / 'vae'}"])
    model = LatentDiffusion.from_pretrained(newest_pretrained(folder / "ldm"), sampling)
    data = bench.data(recipe.n)
    batch = data.train_set[list(range(4))]
    if recipe.conditioned:
        batch = batch._replace(symmetry=torch.zeros(4, model.denoiser.config["label_size"]))
    flops = budget.ldm * batch_size(recipe.scale, "ldm") * training_flops(model, batch)
    fake, prompt = bench.generate(model, recipe.seed)
    numbers = bench.judge(fake, prompt, recipe.n).numbers | bench.copy_control(model, recipe.n)
    return {"training_petaflop": flops / 1e15, **numbers}
