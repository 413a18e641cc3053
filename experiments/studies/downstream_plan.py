"""What the rows of a downstream study share: stages, fine-tuning as users do it, and held-out pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from allpet import ParallelBeam, Radon
from allpet.attenuation import NEIGHBOURHOOD_MM as UNCORRECTED_MM
from allpet.cli import main as allpet
from allpet.consistency import NEIGHBOURHOOD_MM
from allpet.io.atomic import replacing
from allpet.pretrained import pretrained_class
from allpet.randomness import keyed_generator
from allpet.runs import newest_pretrained
from allpet.simulation.tasks import RELATED, PairedBatch, PairOptions
from allpet.systems.conditional_diffusion import ConditionalDiffusion
from allpet.systems.latent_bridge import LatentBridge
from allpet.systems.paired import PairedSystem
from data_modules import PairedTask
from data_modules.simulated import PAPER_PROMPTS
from studies.downstream_scores import HeldOut
from studies.training import HERE, Budget, Recipe, scale_file, train

UPDATES = (8, 16)
"""Of ``data_consistency``, by which results are judged besides, where the input says something of the targets."""
ALONE = 4
"""The same with every pixel alone (``neighbourhood_mm`` 0): as many as are best so."""
UNCORRECTED_UPDATES = (16, 32)
"""Of results for scans without attenuation correction, where every pixel stands alone."""
REDUCTION = 20
"""Dose reduction at which low dose is judged; trained on are all of them, as users would."""
ALL_PROMPTS = (*PAPER_PROMPTS, "FDG:pelvis", "PSMA:pelvis")
DRAWN = 3
"""How many held-out slices the page of pictures shows; they are drawn at random."""


@dataclass(frozen=True)
class Plan:
    """What all rows of the study share.

    Attributes:
        task: one of ``TASKS``.
        pairs: training pairs.
        seeds: of weights, order and draws.
        stages: steps of stages 1 and 2.
        slices: that stages 1 and 2 are trained on.
        steps: of every fine-tuning.
        samples: of each slice, for intervals.
        test_patients: held out.
        scale: name of a file in experiments/scale, or the path of another, ending in .yaml.
        output: folder of the studies.
        cache: folder of simulated slices.
    """

    task: str
    pairs: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    stages: Budget = field(default_factory=lambda: Budget.of("laptop"))
    slices: int = 500
    steps: int = 600
    samples: int = 16
    test_patients: int = 20
    scale: str = "laptop"
    output: Path = Path("outputs/studies")
    cache: str = "outputs/cache"

    @property
    def folder(self) -> Path:
        """Of the task's rows."""
        return self.output / f"downstream_{self.task}"

    def facts(self, method: str, pairs: int, seed: int) -> dict[str, Any]:
        """Return what is known of a row beforehand."""
        facts = {"task": self.task, "method": method, "pairs": pairs, "seed": seed, "steps": self.steps}
        facts |= {"vae": self.stages.vae, "ldm": self.stages.ldm, "slices": self.slices, "samples": self.samples}
        fitted: dict[str, Any] = {"data_consistency": list(UPDATES), "alone": ALONE}
        if self.task == "attenuation":
            fitted = {"data_consistency": list(UNCORRECTED_UPDATES), "fit": "of activity and attenuation"}
        elif self.task in RELATED:
            fitted |= {"fit": "of the input, carried over"}
        return facts | {"test_patients": self.test_patients, "scale": Path(self.scale).stem} | fitted

    @property
    def fitting(self) -> list[tuple[int, float]]:
        """Updates, and their neighbourhood in mm, by which results are judged besides."""
        if self.task == "attenuation":
            return [(updates, UNCORRECTED_MM) for updates in UNCORRECTED_UPDATES]
        return [(ALONE, 0.0), *((updates, NEIGHBOURHOOD_MM) for updates in UPDATES)]

    @cached_property
    def data(self) -> PairedTask:
        """The data module whose test patients all methods are judged on."""
        options = PairOptions(reductions=(REDUCTION,))
        return self.pairs_of(options=options, num_scans=1, val_patients=1, test_patients=self.test_patients)

    def training_pairs(self, pairs: int) -> PairedBatch:
        """Return the pairs that a row trains on."""
        train = self.pairs_of(num_scans=pairs, val_patients=4, test_patients=1).train_set
        return train[list(range(len(train)))]  # type: ignore[return-value]

    @property
    def latent_channels(self) -> int:
        """Of the scale's autoencoder."""
        return int(self._sizes["latent_channels"])

    @cached_property
    def _sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = yaml.safe_load(scale_file(self.scale).read_text(encoding="utf-8"))["scale"]
        return sizes

    def pairs_of(self, **given: Any) -> PairedTask:
        """Return the task's simulated pairs at the scale's size; arguments as of ``PairedTask``."""
        data = PairedTask(self.task, ParallelBeam(**self._sizes["geometry"]), cache=self.cache, **given)
        data.setup()
        return data

    @cached_property
    def held_out(self) -> HeldOut:
        """Test pairs and all that results are compared with."""
        test = self.data.test_set
        return HeldOut(test[list(range(len(test)))], Radon(self.data.geometry))

    def drawn(self) -> list[int]:
        """Return the held-out slices that are shown, drawn at random, the same for all methods."""
        count = len(self.held_out.pairs.input)
        return sorted(torch.randperm(count, generator=keyed_generator(0, "shown"))[:DRAWN].tolist())

    def stage2(self, seed: int) -> Path:
        """Return the folder of a seed's stages 1 and 2, trained if they are not there."""
        folder = self.output / "downstream_stages" / f"{Path(self.scale).stem}-seed{seed}"
        recipe = Recipe(self.slices, seed, prompts=ALL_PROMPTS, scale=self.scale)
        keep_settings(folder, self._stage_settings)
        try:
            newest_pretrained(folder / "ldm")
        except FileNotFoundError:
            train(recipe, self.stages, folder, self.cache)
        return folder / "ldm"

    @property
    def _stage_settings(self) -> dict[str, Any]:
        files = [HERE / "defaults.yaml", HERE / "vae.yaml", HERE / "ldm.yaml", scale_file(self.scale)]
        return {"vae": self.stages.vae, "ldm": self.stages.ldm, "slices": self.slices, "stage files": _digest(files)}

    def _files(self, overlay: str | None, task: str | None) -> list[Path]:
        files = [HERE / f"{name}.yaml" for name in ("defaults", "finetune/bridge", f"finetune/{task or self.task}")]
        return [*files, scale_file(self.scale), *([HERE / f"finetune/methods/{overlay}.yaml"] if overlay else [])]

    def recipe(self, overlay: str | None, task: str | None) -> str:
        """Return a digest of what the files of a fine-tuning say, so that rows of before they changed are told apart.

        Args:
            overlay: see ``finetune``, as the next.
            task: see there.
        """
        return _digest(self._files(overlay, task))

    def finetune(
        self,
        folder: Path,
        seed: int,
        pairs: int,
        overlay: str | None = None,
        more: Sequence[str] = (),
        task: str | None = None,
        steps: int | None = None,
    ) -> PairedSystem:
        """Fine-tune as ``make finetune`` does, or continue; return the result.

        Args:
            folder: of the runs.
            seed: of weights, order and draws, and of the stages that it starts from.
            pairs: to train on.
            overlay: file of experiments/finetune/methods; None for the bridge.
            more: words of the command line, for what is varied.
            task: file of experiments/finetune; None for the plan's task.
            steps: None for the plan's.

        Raises:
            ValueError: if what is there, in this folder or of stages 1 and 2, was trained with other settings.
        """
        steps, files = steps or self.steps, self._files(overlay, task)
        options = [word for word in more if not word.startswith("--data.generated=")]  # in the folder's name
        about = {"pairs": pairs, "steps": steps, "options": options, "files": _digest(files)}
        keep_settings(folder, about | self._stage_settings)
        stage2 = self.stage2(seed)
        words = ["fit", *(word for file in files for word in ("-c", str(file)))]
        words += [
            f"--run.root={folder}",
            f"--seed_everything={seed}",
            f"--model.seed={seed}",
            f"--data.seed={seed}",
            f"--data.num_scans={pairs}",
            "--data.val_patients=4",
            "--data.test_patients=1",
            f"--data.cache={self.cache}",
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={steps}",
            *([] if overlay == "regression_pixels" else [f"--model.autoencoder={stage2}"]),
            *more,
        ]
        try:
            newest_pretrained(folder)
        except FileNotFoundError:
            allpet(words)
        return load(folder)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what a training in a folder is made with, or compare it with what it was made with.

    Trainings are shared by rows and studies, and found by the names of their folders, which do not say all of it.

    Args:
        folder: of the training, made if it is not there.
        settings: what a result depends on and neither the folder's name nor the data say.

    Raises:
        ValueError: if the folder holds a training with other settings, or one that does not say with which.
    """
    file = folder / "settings.json"
    what_to_do = "remove it to train anew, or give the study another --output."
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(name for name, value in settings.items() if kept.get(name) != value)
        if changed:
            raise ValueError(f"{folder} was trained with another {', '.join(changed)}: {what_to_do}")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds a training that does not say with which settings: {what_to_do}")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _digest(files: Sequence[Path]) -> str:
    said = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=4).hexdigest()


def load(folder: Path) -> PairedSystem:
    """Load what a fine-tuning left."""
    path = newest_pretrained(folder)
    kinds = {"LatentBridge": LatentBridge, "ConditionalDiffusion": ConditionalDiffusion}
    return kinds[pretrained_class(path)].from_pretrained(path)  # type: ignore[attr-defined, no-any-return]
