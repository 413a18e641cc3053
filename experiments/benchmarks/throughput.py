"""Training steps per second, beside a plain training loop of the same networks.

    python experiments/benchmarks/throughput.py [--rounds 12] [--quick]      (part of make benchmark)

Ours is the laptop's recipe as ``allpet fit`` runs it: Lightning, the data module with masks and symmetries, the YAML's
optimiser and precision, averaged weights. The plain loop is what diffusers' example scripts do: float32, AdamW, clipped
gradients, latents encoded anew in every step; it is given our batches, so that it waits for no data, and averages
nothing. The two take turns, a few steps each, within one training, a process for each row; the ratio is the median
over the turns, with its quartiles. Every stage is measured with AdamW, too, as the plain loop has it: the steps of
Muon, the laptop's own optimiser, cost more than AdamW's and learn more. ``data_share`` is the share of our time between
steps: the wait for a batch, moving and augmenting it. Further options of ``allpet fit`` may follow. Writes
``outputs/reports/throughput.json`` and ``.md``. Five minutes on two cores, which nothing else must use.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from allpet import AutoencoderSystem, LatentDiffusion, RadonMaskAugmentation, SymmetryAugmentation
from allpet.batches import SinogramBatch
from allpet.losses import kl_divergence
from allpet.memory_report import plan
from allpet.reports import FOLDER, table, write_report
from data_modules import SimulatedPET

ROOT = Path(__file__).resolve().parents[2]
SEED = 0


def plain_step(system: LightningModule) -> Callable[[SinogramBatch], None]:
    """Return one step of the plain loop for a system's networks."""
    assert isinstance(system, (AutoencoderSystem, LatentDiffusion))
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def stage1(batch: SinogramBatch) -> Tensor:
        target = network(batch.as_stack())
        noise = torch.randn(len(target), *system.autoencoder.latent_shape(*target.shape[-2:]), device=target.device)
        decoded, posterior = system.autoencoder(target, noise)
        return F.l1_loss(decoded.stack, target) + 1e-4 * kl_divergence(posterior.mean, posterior.log_variance)

    def stage2(batch: SinogramBatch) -> Tensor:
        with torch.no_grad():
            clean = system.autoencoder.encode_mean(network(batch.as_stack()))
        noise = torch.randn_like(clean)
        time = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        prediction = system.denoiser(scheduler.add_noise(clean, noise, time), time, batch.prompt)
        return F.mse_loss(prediction, scheduler.get_velocity(clean, noise, time))

    network = system.autoencoder.scaling
    loss_of = stage1 if isinstance(system, AutoencoderSystem) else stage2
    parameters = list(system.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(batch: SinogramBatch) -> None:
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class TakingTurns(Callback):
    """After every few steps of ours, make as many of the plain loop's with the same batches, and time both.

    Args:
        plain: a step of the plain loop.
        steps: of either, per turn.
        warm_up: steps of either that do not count.
    """

    def __init__(self, plain: Callable[[SinogramBatch], None], steps: int, warm_up: int = 2) -> None:
        self.plain, self.steps, self.warm_up = plain, steps, warm_up
        self.ours: list[float] = []  # seconds per step of each turn
        self.theirs: list[float] = []
        self.working: list[float] = []
        self._batches: list[SinogramBatch] = []
        self._turn_began = self._step_began = self._worked = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there, augmented."""
        self._step_began = _now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count our step, and let the other take its turn."""
        now = _now()
        self._batches.append(batch)
        self._worked += now - self._step_began
        warming = trainer.global_step <= self.warm_up
        if len(self._batches) < self.steps and trainer.global_step != self.warm_up:
            return
        began = _now()
        for one in self._batches:
            self.plain(one)
        if not warming:
            self.ours.append((now - self._turn_began) / self.steps)
            self.working.append(self._worked / self.steps)
            self.theirs.append((_now() - began) / self.steps)
        self._batches, self._worked, self._turn_began = [], 0.0, _now()


def measure(stage: str, rounds: int, steps: int, quick: bool = False, options: Sequence[str] = ()) -> dict[str, Any]:
    """Train a stage in turns with the plain loop and return a row.

    Args:
        stage: "vae" or "ldm".
        rounds: turns of each.
        steps: per turn.
        quick: batches of two slices, to try the script.
        options: further ones of ``allpet fit``.
    """
    files = [word for name in ("defaults", stage, "scale/laptop") for word in ("-c", f"{ROOT}/experiments/{name}.yaml")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, _ = plan([*files, *options], device)
    batch_size = 2 if quick else training.batch_size
    data = SimulatedPET(
        training.geometry,
        ("FDG:brain", "FDG:abdomen"),
        num_scans=4 * batch_size,
        val_patients=1,
        test_patients=1,
        cache=None,
        batch_size=batch_size,
        augmentation=RadonMaskAugmentation,
        symmetry=SymmetryAugmentation if stage == "vae" else None,
    )
    torch.manual_seed(SEED)
    system, other = training.make_system(), training.make_system()
    turns = TakingTurns(plain_step(other.to(device)), steps)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning advises about such a short training does not matter here
        trainer = Trainer(
            max_steps=turns.warm_up + rounds * steps,
            precision=training.precision,  # type: ignore[arg-type]
            gradient_clip_val=1.0,
            callbacks=[EMAWeightAveraging(), turns],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        trainer.fit(system, data)
    ratios = sorted(b / a for a, b in zip(turns.ours, turns.theirs, strict=True))
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "stage": stage,
        "batch": batch_size,
        "optimizer": system.optimizer,
        "precision": training.precision,
        "device": device,
        "threads": torch.get_num_threads(),
        "steps_per_second": 1 / statistics.median(turns.ours),
        "plain_steps_per_second": 1 / statistics.median(turns.theirs),
        "ratio": median,
        "ratio_low": low,
        "ratio_high": high,
        "data_share": 1 - sum(turns.working) / sum(turns.ours),
    }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure both stages, print, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--quick", action="store_true", help="two rounds of tiny batches: to try the script")
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments, options = parser.parse_known_args()
    rounds, steps = (2, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    # A process of its own for each row, as ``allpet fit`` is: stage 2 ran a fifth slower in what stage 1 had left of
    # the heap, and that slowed ours more than the plain loop.
    rows = []
    for stage in ("vae", "ldm"):
        for optimizer in (["--model.optimizer=adamw"], []):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                given = (stage, rounds, steps, arguments.quick, [*optimizer, *options])
                rows.append(process.submit(measure, *given).result())
    print(table(rows))
    remarks = "Steps per second of both stages beside the same networks in a plain float32 loop with AdamW, in turns."
    path = write_report("throughput", rows, [SEED], arguments.output, title="Training speed", remarks=remarks)
    print(f"written to {path} (.md)")


if __name__ == "__main__":
    main()
