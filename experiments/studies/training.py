"""Train both stages for a study, through the command line that users have, and measure what comes out.

Every training of a study sees the same validation and test patients; the training slices are the first n of one fixed
order. The budget is a number of steps, so that equal budgets are equal compute on any machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from torch import Tensor

from allpet import AutoencoderSystem, LatentDiffusion, Prompt, Radon, Sampling
from allpet.batches import unmasked_stack
from allpet.cli import main as allpet
from allpet.evaluation.classifier import PromptClassifier, train_classifier
from allpet.evaluation.copies import copy_rate, nearest_modulo_symmetry
from allpet.evaluation.features import EncoderFeatures
from allpet.evaluation.spectra import typical
from allpet.evaluation.suite import Evaluation, evaluate
from allpet.evaluation.utility import denoising_utility
from allpet.metrics import radial_power_spectrum
from allpet.models.autoencoder import Autoencoder
from allpet.privacy import with_home
from allpet.randomness import keyed_generator
from allpet.reconstruction import fbp
from allpet.runs import newest_pretrained
from allpet.systems.sampling import Samples, add_counting_noise, finish
from data_modules import SimulatedPET, SinogramDataModule
from data_modules.base import SinogramSet
from data_modules.simulated import PAPER_PROMPTS

VAL_PATIENTS, TEST_PATIENTS = 35, 70
GUIDANCE = Sampling().guidance
"""Of all samples of ours that a study does not guide otherwise; ``choose_guidance.py`` chose it."""
HERE = Path(__file__).parents[1]
Data = TypeVar("Data", bound=SinogramDataModule)
System = TypeVar("System", bound=LightningModule)


@dataclass(frozen=True)
class Budget:
    """Optimiser steps of the two stages."""

    vae: int
    ldm: int

    @classmethod
    def of(cls, scale: str) -> Budget:
        """Return the steps that a scale's file gives its users."""
        return cls(*(int(_numbers(scale, stage)["steps"]) for stage in ("vae", "ldm")))


@dataclass(frozen=True)
class Recipe:
    """What a training of both stages is told.

    Attributes:
        n: number of training slices.
        seed: of weights, order and draws.
        masks: whether RMAS draws masks; with False stacks have an empty mask.
        symmetries: whether slices are turned and mirrored in stage 1, and for the covariance of a linear denoiser.
        conditioned: whether they are in the training of stage 2, too, which is told (``experiments/symmetries.yaml``).
        linear: whether stage 2 starts from the linear denoiser (``experiments/linear_start.yaml``).
        n_cells: fewest and most cells of a mask; equal numbers are no DMM.
        mask: "soft" or "binary".
        domain: "sinogram" or "image", where masks are applied.
        stack_channels: 3, or 1 for a network that knows the full channel alone.
        constraint: see ``Autoencoder``.
        range_order: see ``Autoencoder``; None for a decoder without the range layer.
        padding: see ``Autoencoder``; all but "zero" do without a seam.
        seam: whether a stack of views beyond the half turn is encoded with it.
        patch: see ``Autoencoder``; None: the scale's.
        channels: of stage 1, see ``Autoencoder``; None: the scale's.
        prompts: what is simulated.
        population: of whose patients.
        scale: name of a file in experiments/scale, or the path of another, ending in .yaml.
    """

    n: int
    seed: int
    masks: bool = True
    symmetries: bool = True
    conditioned: bool = False
    linear: bool = False
    n_cells: tuple[int, int] = (1, 4)
    mask: str = "soft"
    domain: str = "sinogram"
    stack_channels: int = 3
    constraint: str = "head"
    range_order: int | None = 20
    padding: str = "zero"
    seam: bool = True
    patch: int | None = None
    channels: tuple[int, ...] | None = None
    prompts: tuple[str, ...] = PAPER_PROMPTS
    population: int = 0
    scale: str = "laptop"

    def words(self, stage: str, budget: Budget, folder: Path, cache: str) -> list[str]:
        """Return the command line that trains a stage ("vae" or "ldm")."""
        files = [HERE / "defaults.yaml", HERE / f"{stage}.yaml", scale_file(self.scale)]
        if stage == "ldm":
            overlays = {"symmetries": self.conditioned, "linear_start": self.linear}
            files += [HERE / f"{name}.yaml" for name, wanted in overlays.items() if wanted]
        words = ["fit", *(word for file in files for word in ("-c", str(file)))]
        words += [
            f"--run.root={folder / stage}",
            f"--seed_everything={self.seed}",
            f"--model.seed={self.seed}",
            f"--data.seed={self.seed}",
            f"--data.num_scans={self.n}",
            f"--data.prompts={list(self.prompts)}",
            f"--data.val_patients={VAL_PATIENTS}",
            f"--data.test_patients={TEST_PATIENTS}",
            f"--data.cache={cache}",
            f"--trainer.max_steps={getattr(budget, stage)}",
            f"--trainer.val_check_interval={getattr(budget, stage)}",
        ]
        if self.population:
            words.append(f"--data.population={self.population}")
        if self.masks:
            words += [
                f"--data.augmentation.n_cells={list(self.n_cells)}",
                f"--data.augmentation.mask={self.mask}",
                f"--data.augmentation.domain={self.domain}",
            ]
        else:
            words.append("--data.augmentation=null")
        if stage == "vae":
            words += [
                f"--model.autoencoder.stack_channels={self.stack_channels}",
                f"--model.autoencoder.constraint={self.constraint}",
                f"--model.autoencoder.range_order={'null' if self.range_order is None else self.range_order}",
            ]
            if self.padding != "zero" or not self.seam:
                words += [f"--model.autoencoder.padding={self.padding}", "--model.autoencoder.seam=0"]
            if self.patch is not None:
                words.append(f"--model.autoencoder.patch={self.patch}")
            if self.channels is not None:
                words.append(f"--model.autoencoder.channels={list(self.channels)}")
            if not self.symmetries:
                words.append("--data.symmetry=null")
        else:
            words.append(f"--model.autoencoder={folder / 'vae'}")
            if self.linear:
                words.append(f"--model.linear_turned={8 if self.symmetries else 0}")
        return words


def scale_file(scale: str) -> Path:
    """Return the file of a scale, a name or a path that ends in .yaml."""
    return Path(scale) if scale.endswith(".yaml") else HERE / "scale" / f"{scale}.yaml"


def batch_size(scale: str, stage: str) -> int:
    """Return the batch size that a scale's file gives a stage ("vae", "ldm") or a baseline ("gan", "score")."""
    return int(_numbers(scale, stage)["batch_size"])


def _numbers(scale: str, stage: str) -> dict[str, Any]:
    numbers: dict[str, Any] = yaml.safe_load(scale_file(scale).read_text(encoding="utf-8"))["scale"][stage]
    return numbers


def train(recipe: Recipe, budget: Budget, folder: Path, cache: str) -> dict[str, float]:
    """Train both stages, or continue; return the seconds of each that were spent now."""
    seconds = {}
    for stage in ("vae", "ldm"):
        began = time.perf_counter()
        allpet(recipe.words(stage, budget, folder, cache))
        seconds[f"{stage}_seconds"] = round(time.perf_counter() - began, 1)
    return seconds


def data_of_run(run: Path, kind: type[Data]) -> Data:
    """Make the data that a run was trained on, from its resolved configuration.

    Args:
        run: folder of the run.
        kind: class that the data module must be of.
    """
    data: Data = _part_of_run(run, "data", kind)
    data.setup()
    return data


def system_of_run(run: Path, kind: type[System]) -> System:
    """Make the untrained system of a run, all of it: what is exported has no discriminator.

    Args:
        run: folder of the run.
        kind: class that the system must be of.
    """
    system: System = _part_of_run(run, "model", kind)
    return system


def _part_of_run(run: Path, part: str, kind: type[Any]) -> Any:
    parser = ArgumentParser()
    parser.add_subclass_arguments(kind, part)
    config = with_home(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    return parser.instantiate_classes(parser.parse_object({part: config[part]}))[part]


class Generates(Protocol):
    """Anything with ``sample``: ``LatentDiffusion`` and the baselines."""

    def sample(self, prompt: Prompt, seeds: Any) -> Samples:
        """Generate one sinogram for each prompt and seed."""


class Bench:
    """What every row of a study is measured with: held-out slices, a classifier and a frozen encoder.

    Args:
        folder: of the studies; classifier and encoder are kept there.
        cache: folder of simulated slices.
        samples: generated slices per row, at most; prompts are those of held-out slices.
        part: whose slices are held out: of the "test" patients, or of those to "val"idate on, by which settings are
            chosen.
    """

    def __init__(self, folder: Path, cache: str, samples: int = 245, part: Literal["val", "test"] = "test") -> None:
        self.folder, self.cache, self.samples, self.part = folder, cache, samples, part

    def data(self, n: int) -> SimulatedPET:
        """Return the data module of n training slices, set up, without augmentation."""
        data = SimulatedPET(
            prompts=PAPER_PROMPTS,
            num_scans=n,
            val_patients=VAL_PATIENTS,
            test_patients=TEST_PATIENTS,
            cache=self.cache,
            augmentation=None,
        )
        data.setup()
        return data

    @cached_property
    def held_out(self) -> SimulatedPET:
        """The data module whose ``real_set`` everything is compared with."""
        return self.data(500)

    @property
    def real_set(self) -> SinogramSet:
        """The held-out slices."""
        return self.held_out.val_set if self.part == "val" else self.held_out.test_set

    @cached_property
    def classifier(self) -> PromptClassifier:
        """Tells tracer and region; trained on slices of 400 patients of another population, kept on disk."""
        geometry = self.held_out.geometry
        path = self.folder / "classifier.pt"
        if path.exists():
            classifier = PromptClassifier(geometry)
            classifier.load_state_dict(torch.load(path, weights_only=True))
            return classifier.eval()
        real = SimulatedPET(prompts=PAPER_PROMPTS, num_scans=2000, population=1, cache=self.cache, augmentation=None)
        real.setup()
        slices = real.train_set[list(range(len(real.train_set)))]
        classifier = train_classifier(slices.expected, slices.prompt, geometry, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(classifier.state_dict(), path)
        return classifier

    @cached_property
    def encoder(self) -> EncoderFeatures:
        """Features of a stage 1 that no row has: of 1,000 steps on that other population, without masks, kept on disk.

        Rows that are compared by the features of one of them would not be judged alike.
        """
        folder = self.folder / "encoder"
        recipe = Recipe(2000, 0, masks=False, population=1)
        try:
            trained = newest_pretrained(folder / "vae")
        except FileNotFoundError:
            allpet(recipe.words("vae", Budget(1000, 0), folder, self.cache))
            trained = newest_pretrained(folder / "vae")
        return EncoderFeatures(AutoencoderSystem.from_pretrained(trained).autoencoder)

    def rows(self) -> Tensor:
        """Held-out slices whose prompts are asked for, spread evenly over the patients."""
        n = len(self.real_set)
        return torch.linspace(0, n - 1, min(self.samples, n)).round().long()

    def generate(self, generator: Generates, seed: int, **options: Any) -> tuple[Tensor, Prompt]:
        """Generate one slice for every chosen held-out slice's prompt."""
        rows = self.rows()
        whole = self.real_set.prompt
        prompt = Prompt(whole.tracer[rows], whole.region[rows])
        seeds = range(10_000 * seed, 10_000 * seed + len(rows))
        return generator.sample(prompt, seeds, **options).sinogram.float(), prompt

    @cached_property
    def real_power(self) -> dict[str, float]:
        """What ``power`` finds in 500 training slices, as expected, over the held-out ones: other real patients."""
        radon = Radon(self.held_out.geometry)
        spectra = []
        for part in (self.real_set, self.held_out.train_set):
            expected = part[list(range(len(part)))].expected
            images = [fbp(radon, piece) for piece in expected.split(64)]
            found = [radial_power_spectrum(image, radon.geometry.pixel_mm) for image in images]
            spectra.append(typical(torch.cat([values for _, values in found])))
        return _least_and_largest(found[0][0], *spectra)

    def judge(self, fake: Tensor, prompt: Prompt, n: int, noisy: bool = False) -> Evaluation:
        """Evaluate generated slices against held-out ones.

        Args:
            fake: as generated.
            prompt: what was asked for.
            n: training slices, for the copy test; 0 leaves it out.
            noisy: compare with noisy slices; with expected ones otherwise.
        """
        test = self.real_set
        batch = test[list(range(len(test)))]
        training = training_patients = None
        if n:
            train_set = self.data(n).train_set
            slices = train_set[list(range(len(train_set)))]
            training, training_patients = slices.expected, slices.patient_id
        return evaluate(
            batch.sinogram if noisy else batch.expected,
            fake,
            self.held_out.geometry,
            patients=batch.patient_id,
            training=training,
            training_patients=training_patients,
            classifier=self.classifier,
            fake_prompts=prompt,
            real_prompts=batch.prompt,
        )

    def with_noise(self, fake: Tensor) -> Tensor:
        """Add counting noise as strong as that of the held-out slices, see ``renoise``."""
        test = self.real_set
        batch = test[list(range(len(test)))]
        return renoise(fake, batch.sinogram, batch.expected)

    def copy_control(self, generator: Any, n: int) -> dict[str, float]:
        """Return the share of perfect copies that the copy test finds, to read a copy rate by.

        A stage 2 that has learned a training slice by heart draws its latent. So training slices as measured are
        encoded and decoded by the generator's own stage 1 and finished as its samples are; what the decoder blurs is no
        longer quite the slice, and a copy rate of c says that at least that share of the samples are copies, about
        ``c / copy_control``.

        Args:
            generator: what samples; without an ``allpet.models`` autoencoder there is no number.
            n: training slices.

        Returns:
            ``copy_control`` and ``copy_control_third``, by the rules of ``copy_rate`` and ``copy_rate_third``, or
            nothing.
        """
        if not isinstance(getattr(generator, "autoencoder", None), Autoencoder):
            return {}
        geometry = self.held_out.geometry
        test, train_set = self.real_set, self.data(n).train_set
        held_out, slices = test[list(range(len(test)))], train_set[list(range(len(train_set)))]
        rows = torch.linspace(0, len(slices.sinogram) - 1, min(self.samples, len(slices.sinogram))).round().long()
        copies = through_stage1(generator, slices.sinogram[rows])
        found, theirs = (
            nearest_modulo_symmetry(x, slices.expected, geometry, slices.patient_id)
            for x in (copies, held_out.expected)
        )
        rate = copy_rate(found, theirs)
        return {"copy_control": rate.calibrated, "copy_control_third": rate.third}

    def judge_twice(
        self, fake: Tensor, prompt: Prompt, n: int, noisy: bool = False, generator: Any = None
    ) -> dict[str, float]:
        """Return the numbers of ``judge``, those of ``power`` and, as ``renoised_NAME``, those among noisy slices.

        Args:
            fake: as generated.
            prompt: what was asked for.
            n: training slices, for the copy test.
            noisy: whether what is generated has its noise already; it is added otherwise.
            generator: what generated them, for ``copy_control``; None leaves that out.
        """
        among = self.judge(fake if noisy else self.with_noise(fake), prompt, 0, noisy=True)
        kept = {name: value for name, value in among.numbers.items() if name.startswith(("kid", "sw", "spectrum"))}
        kept |= power(among)
        expected = self.judge(fake, prompt, n)
        numbers = expected.numbers | (self.copy_control(generator, n) if n else {}) | power(expected)
        return numbers | {f"renoised_{name}": value for name, value in kept.items()}

    def use(self, fake: Tensor, n: int) -> dict[str, float]:
        """Train a small denoiser on generated slices and use it on held-out ones, beside one that saw n real slices."""
        test, train_set = self.real_set, self.data(n).train_set
        held_out, known = test[list(range(len(test)))], train_set[list(range(len(train_set)))]
        found = denoising_utility(fake, known.expected, held_out.sinogram, held_out.expected)
        return {f"utility_{name}": value for name, value in found._asdict().items()}


@torch.no_grad()
def through_stage1(generator: Any, sinogram: Tensor) -> Tensor:
    """Return slices as a generator with an autoencoder would draw them if it knew their latents.

    Args:
        generator: has ``autoencoder``, ``geometry`` and, if it restores power, ``sampling``.
        sinogram: as measured, ``(n, 1, views, bins)``.
    """
    autoencoder, sampling = generator.autoencoder, getattr(generator, "sampling", None)
    pieces = []
    for part in sinogram.split(64):
        stack = autoencoder.scaling(unmasked_stack(part.to(autoencoder.latent_mean.device)))
        full = autoencoder.decode(autoencoder.encode_mean(stack), tuple(part.shape[-2:])).full
        pieces.append(autoencoder.scaling.inverse(full).float().cpu())
    decoded = torch.cat(pieces)
    if sampling is None:
        return decoded
    return finish(decoded, generator.geometry, sampling, autoencoder.power_gain.cpu(), range(len(decoded)))


def power(found: Evaluation) -> dict[str, float]:
    """Return the least and the largest power of the images over real ones down to each of two periods, whole sets.

    The halves that ``evaluate`` compares differ by the chance of which patients they hold: down to 30 mm real ones by
    a factor of 2 at the worst frequency.
    """
    return _least_and_largest(*found.spectra["image"])


def _least_and_largest(frequency: Tensor, real: Tensor, fake: Tensor) -> dict[str, float]:
    ratio = fake / real
    shown = {f"{period}mm": ratio[(frequency > 0) & (frequency <= 1 / period + 1e-9)] for period in (30, 20)}
    return {f"power_{name}_{k}": float(getattr(v, name)()) for k, v in shown.items() for name in ("min", "max")}


def renoise(expected: Tensor, noisy: Tensor, truth: Tensor) -> Tensor:
    """Add counting noise as strong as that of real slices, whose median counts per unit of activity it takes.

    Args:
        expected: sinograms to add noise to, ``(n, 1, views, bins)``.
        noisy: real slices, ``(m, 1, views, bins)``.
        truth: what they are without noise.
    """
    per_count = (noisy - truth).square().sum((1, 2, 3)) / truth.sum((1, 2, 3)).clamp(min=1e-6)
    one = float(per_count.median())
    noisy_ones = [
        # what is empty has no counts, and stays so
        add_counting_noise(sinogram[None], float(sinogram.sum()) / one, [keyed_generator(i, "renoise")])
        if sinogram.any()
        else sinogram[None]
        for i, sinogram in enumerate(expected.clamp(min=0))
    ]
    return torch.cat(noisy_ones)


def facts(sampling: Sampling) -> dict[str, Any]:
    """Return what a row says of how it was sampled, and of how halves are made, so that other rows are told apart."""
    return {
        "halves": "even by prompt",
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "restore_power": sampling.restore_power,
    }


def load(folder: Path, sampling: Sampling) -> LatentDiffusion:
    """Load the stage 2 that ``train`` left in a folder."""
    return LatentDiffusion.from_pretrained(newest_pretrained(folder / "ldm"), sampling)
