"""The bridge between latents: linear at first, better after training, exact in its bookkeeping, resumed as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from allpet import (
    Autoencoder,
    AutoencoderSystem,
    BridgeSampling,
    Condition,
    Denoiser,
    LatentBridge,
    LatentDiffusion,
    ParallelBeam,
    Prompt,
    Radon,
    RadonMaskAugmentation,
    SinogramBatch,
)
from allpet.conditions import LABEL_SIZE
from allpet.diffusion.preconditioning import LARGEST_CORRELATION
from allpet.metrics import relative_l2
from allpet.simulation.tasks import TASKS
from allpet.systems.focus import Focus
from allpet.systems.starting import start_from
from data_modules import PairedTask, SimulatedPET

GEOMETRY = ParallelBeam(16, 20, 21.6, 20, 21.6)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pairs(task: str = "low_dose", **given: Any) -> PairedTask:
    prompts = ["FDG+PSMA:abdomen"] if task in ("separation", "conversion") else ["FDG:brain", "FDG:abdomen"]
    counts = {"num_scans": 16, "slices_per_patient": 2, "val_patients": 4, "test_patients": 2, "batch_size": 4}
    data = PairedTask(task, GEOMETRY, prompts, cache=None, **{**counts, **given})
    data.setup()
    return data


@pytest.fixture(scope="module")
def data() -> PairedTask:
    return pairs()


def drawn_stacks(sinogram: torch.Tensor) -> torch.Tensor:
    """Stacks with masks as stage 1 sees them in training, ``(batch, 3, views, bins)``."""
    masks = RadonMaskAugmentation(Radon(GEOMETRY))
    return masks.apply(sinogram, masks.draw(len(sinogram), torch.Generator().manual_seed(3))).stack


@pytest.fixture(scope="module")
def autoencoder(data: PairedTask) -> Autoencoder:
    """A stage 1 that has learned stacks with drawn masks, roughly."""
    torch.manual_seed(1)
    system = AutoencoderSystem(Autoencoder((16, 32), patch=2), learning_rate=3e-3, warmup_steps=2)
    system.autoencoder.scaling.set_scale(data.scale)
    optimizer = torch.optim.AdamW(system.parameters(), 3e-3)
    pair = data.train_set[list(range(16))]
    both = torch.cat([pair.noisy, pair.expected, pair.input])
    for _ in range(150):
        stack = system.autoencoder.scaling(drawn_stacks(both))
        optimizer.zero_grad()
        decoded, _ = system.autoencoder(stack)
        (decoded.stack - stack).abs().mean().backward()
        optimizer.step()
    batch = SinogramBatch(both, None, pair.prompt, pair.sample_id, pair.patient_id)
    mean, std = system.measure_latents([batch])
    system.autoencoder.set_latent_statistics(mean, std)
    return system.autoencoder


def bridge(autoencoder: Autoencoder | str, **given: Any) -> LatentBridge:
    conditions = 8 if given.get("reproject") else 4
    denoiser = Denoiser(4, conditions, (16, 32), 1, attention=(False, True), head_channels=8, label_size=LABEL_SIZE)
    return LatentBridge(autoencoder, denoiser, **{"learning_rate": 2e-3, "warmup_steps": 2, **given})


def trainer(folder: Path, steps: int, **given: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": False}
    return Trainer(default_root_dir=folder, **{**quiet, **settings, **given})


def fitted(data: PairedTask, autoencoder: Autoencoder, folder: Path, steps: int, **given: Any) -> LatentBridge:
    torch.manual_seed(2)
    system = bridge(autoencoder, **given)
    trainer(folder, steps).fit(system, datamodule=data)
    return system.eval()


def test_pairs_are_encoded_as_well_as_the_stacks_stage_1_has_learned(data, autoencoder):
    expected = data.val_set[list(range(8))].expected
    system, shape = bridge(autoencoder), GEOMETRY.sinogram_shape

    def error(latent: torch.Tensor) -> float:
        full = autoencoder.scaling.inverse(autoencoder.decode(latent, shape).full)
        return float(relative_l2(full, expected).mean())

    drawn = autoencoder.encode_mean(autoencoder.scaling(drawn_stacks(expected)))
    assert error(system._encode(expected)) < 1.25 * error(drawn)


def test_untrained_it_is_the_linear_regression_of_each_channel(data, autoencoder, tmp_path):
    system = fitted(data, autoencoder, tmp_path, 1, learning_rate=0.0)
    batch = data.train_set[list(range(16))]
    target, source = system._latents(batch)
    x, y = (latent.transpose(0, 1).flatten(1).double() for latent in (target, source))
    slope = ((x - x.mean(1, True)) * (y - y.mean(1, True))).mean(1) / y.var(1, correction=0)
    slope = slope.minimum(LARGEST_CORRELATION * x.std(1, correction=0) / y.std(1, correction=0))
    wanted = x.mean(1)[:, None] + slope[:, None] * (y - y.mean(1, True))
    condition = Condition.of_pairs(batch)
    generators = [torch.Generator() for _ in range(16)]
    got = system.draw(source, Focus(source), condition, generators, BridgeSampling(nfe=1))
    torch.testing.assert_close(got.transpose(0, 1).flatten(1).double(), wanted, rtol=1e-3, atol=1e-4)


def test_training_beats_the_linear_estimate(autoencoder, tmp_path):
    """Attenuation depends on the whole line: one factor per channel cannot undo it."""
    data = pairs("attenuation")
    linear, trained = (
        fitted(data, autoencoder, tmp_path, steps, learning_rate=rate, target="expected")
        for steps, rate in ((1, 0.0), (100, 3e-3))
    )
    batch = data.train_set[list(range(16))]

    def error(system: LatentBridge) -> float:
        restored = system._restore_pairs(batch, BridgeSampling(nfe=1)).mean
        return float(relative_l2(restored, batch.expected).mean())

    assert error(trained) < 0.9 * error(linear)
    assert trained._loss(batch, ("check",)) < linear._loss(batch, ("check",))


def test_results_depend_on_their_own_seed_and_input_alone(data, autoencoder, tmp_path):
    system = fitted(data, autoencoder, tmp_path, 5)
    batch, sampling = data.val_set[[0, 1, 2]], BridgeSampling(nfe=4, samples=3)
    condition = Condition.of("low_dose", batch.prompt.names(), dose=0.05)
    whole = system.restore(batch.input, condition, [5, 6, 7], sampling)
    one = system.restore(
        batch.input[1:2], Condition.of("low_dose", batch.prompt.names()[1:2], dose=0.05), [6], sampling
    )
    torch.testing.assert_close(whole.samples[:, 1], one.samples[:, 0], rtol=1e-3, atol=1e-3 * float(whole.mean.max()))
    torch.testing.assert_close(whole.mean, whole.samples.mean(0))
    torch.testing.assert_close(whole.std, whole.samples.std(0))
    assert (whole.std.amax((1, 2, 3)) > 0).all()
    other = system.restore(batch.input, condition, [8, 6, 7], sampling)
    assert not torch.equal(whole.samples[:, 0], other.samples[:, 0])
    assert (whole.samples >= 0).all()


@pytest.mark.parametrize("given", [{}, {"reproject": 2, "sinogram_weight": 10.0, "decode_batch": 3}])
def test_separated_tracers_add_up_to_the_mix(given, autoencoder, tmp_path):
    data = pairs("separation", num_scans=8)
    system = fitted(data, autoencoder, tmp_path, 3, **given)
    batch = data.val_set[[0, 1]]
    restored = system._restore_pairs(batch, BridgeSampling(nfe=3, samples=2))
    assert restored.mean.shape == batch.expected.shape
    source = system._encode(system.starting(batch.input / system.input_scale(batch.task)))
    mix = system.autoencoder.scaling.inverse(system.autoencoder.decode(source, GEOMETRY.sinogram_shape).full)
    for sample in restored.samples:
        torch.testing.assert_close(
            sample.sum(1, keepdim=True), mix * system.input_scale(batch.task), rtol=1e-4, atol=1e-3
        )


def test_inputs_of_another_scale_are_brought_to_that_of_the_targets(autoencoder, tmp_path):
    system = fitted(pairs("attenuation"), autoencoder, tmp_path, 2)
    assert (
        0.02 < float(system.input_ratio[TASKS.index("attenuation")]) < 0.7
    )  # attenuated sinograms are several times less


def test_a_resumed_run_equals_an_uninterrupted_one(data, autoencoder, tmp_path):
    """Interrupted in the middle of the second epoch of four batches."""
    systems = []
    for steps, checkpoint in ((7, None), (7, tmp_path / "kept" / "epoch=1-step=6.ckpt")):
        torch.manual_seed(2 if checkpoint is None else 3)
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=6) if checkpoint is None else None
        fit = trainer(tmp_path, steps, callbacks=[keep] if keep else [], enable_checkpointing=keep is not None)
        systems.append(bridge(autoencoder))
        fit.fit(systems[-1], datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        assert fit.global_step == 7
    whole, rest = (system.state_dict() for system in systems)
    for name, value in whole.items():
        torch.testing.assert_close(rest[name], value, rtol=0, atol=0, msg=name)


def test_what_is_exported_does_the_same(data, autoencoder, tmp_path):
    system = fitted(data, autoencoder, tmp_path, 3)
    system.save_pretrained(tmp_path / "out")
    loaded = LatentBridge.from_pretrained(tmp_path / "out")
    batch = data.val_set[[0, 1]]
    ours, theirs = (one._restore_pairs(batch, BridgeSampling(nfe=3)).mean for one in (system, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert loaded.geometry == GEOMETRY


def test_slices_without_partners_are_refused(autoencoder, tmp_path):
    data = SimulatedPET(GEOMETRY, num_scans=4, slices_per_patient=2, val_patients=1, test_patients=1, cache=None)
    with pytest.raises(ValueError, match=r"SimulatedPET gives no pairs .* use --data data_modules\.PairedTask"):
        trainer(tmp_path, 1).fit(bridge(autoencoder), datamodule=data)


def test_it_starts_from_stage_2(autoencoder, tmp_path):
    small = Denoiser(channels=(16, 32), layers_per_block=1, attention=(False, True), head_channels=8)
    torch.nn.init.normal_(small.unet.conv_out.weight)
    stage2 = LatentDiffusion(autoencoder, small)
    stage2.geometry = GEOMETRY
    stage2.save_pretrained(tmp_path / "ldm")
    system = bridge(str(tmp_path / "ldm"))
    latent, time, prompt = torch.randn(2, 4, 5, 5), torch.tensor([3.0, 700.0]), Prompt.of(["FDG:brain"] * 2)
    for network in (system.denoiser, small):
        network.unet.conv_out.weight.data.fill_(0.01)
        network.unet.conv_out.bias.data.zero_()
    condition, label = torch.randn(2, 4, 5, 5), torch.randn(2, LABEL_SIZE)
    torch.testing.assert_close(system.denoiser(latent, time, prompt, condition, label), small(latent, time, prompt))
    assert not bridge(str(tmp_path / "ldm")).denoiser.unet.conv_out.weight.any()
    torch.testing.assert_close(system.autoencoder.state_dict(), autoencoder.state_dict())


def test_what_does_not_fit_is_refused(autoencoder):
    small = {"channels": (8, 8), "attention": (False, False)}
    with pytest.raises(ValueError, match="must be 'noisy' or 'expected'"):
        bridge(autoencoder, target="clean")
    with pytest.raises(ValueError, match=f"a LatentBridge over this autoencoder needs 4, 4 and {LABEL_SIZE}"):
        LatentBridge(autoencoder, Denoiser(**small))
    with pytest.raises(ValueError, match="give it stage 2's channels, blocks and patch"):
        start_from(bridge(autoencoder).denoiser, Denoiser(**small))
    with pytest.raises(ValueError, match="one condition per target and one seed per sinogram"):
        bridge(autoencoder).restore(torch.zeros(2, 1, 16, 20), Condition.of("low_dose", ["FDG:brain"]), [0, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "none"},
        {"delay_min": -1.0},
        {"delay_min": float("nan")},
        {"delay_min": float("inf")},
        {"dose": 0.0},
        {"dose": float("nan")},
        {"target_tracers": ["FDG"] * 2},
    ],
)
def test_impossible_conditions_are_refused(wrong):
    with pytest.raises(ValueError, match=r"choose one of|in minutes|a share of the normal dose|give one for each"):
        Condition.of(**{"task": "delayed", "prompts": ["FDG:brain"], **wrong})
