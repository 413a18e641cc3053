"""Copies are seen, held-out slices are none, and a training that makes them stops."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_pet import TinyPET

import callbacks
from allpet import Autoencoder, AutoencoderSystem, Denoiser, LatentDiffusion
from allpet.power import POINTS
from callbacks.copy_watch import copy_numbers, small


def discs(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) + 3


def system() -> LatentDiffusion:
    torch.manual_seed(0)
    denoiser = Denoiser(channels=(8, 16), layers_per_block=1, attention=(False, True), head_channels=8)
    return LatentDiffusion(Autoencoder((8, 16)), denoiser, warmup_steps=1)


def fit(model, folder, *watching, **options) -> Trainer:
    trainer = Trainer(
        **{"max_steps": 6, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None, **options},
        accelerator="cpu", logger=False, default_root_dir=folder, callbacks=list(watching),
        enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=TinyPET())
    return trainer


def test_new_slices_are_no_copies_and_copies_are():
    training, held_out, new = discs(40, 0), discs(400, 1), discs(400, 2)
    numbers = copy_numbers(new, held_out, training)
    assert numbers.copy_rate < 0.03
    assert numbers.nearest_ratio == pytest.approx(1, abs=0.02)
    copies = training[torch.arange(400) % 40] + 0.01 * new
    assert copy_numbers(copies, held_out, training).copy_rate == 1
    assert copy_numbers(copies, held_out, training).nearest_ratio < 0.05
    half = torch.cat([new[:200], copies[:200]])
    assert copy_numbers(half, held_out, training).copy_rate == pytest.approx(0.5, abs=0.02)


def test_large_sinograms_are_compared_small():
    large = torch.rand(2, 1, 128, 80, generator=torch.Generator().manual_seed(0))
    assert small(large).shape == (2, 1, 64, 64)
    torch.testing.assert_close(small(large).mean(), large.mean(), rtol=1e-2, atol=0)
    assert torch.equal(small(large[..., :16, :16]), large[..., :16, :16])


def test_the_watch_logs_and_leaves_the_training_alone(tmp_path):
    watched, alone = system(), system()
    logged = []

    class Seen(callbacks.CopyWatch):
        def _measure(self, *arguments):
            logged.append(super()._measure(*arguments))
            return logged[-1]

    trainer = fit(watched, tmp_path, Seen(n_samples=6, steps=2, every_n_validations=2))
    fit(alone, tmp_path)
    assert len(logged) == 2, "of three validations the first and the third"
    assert float(trainer.callback_metrics["val/copy_rate"]) == pytest.approx(logged[-1].copy_rate)
    assert float(trainer.callback_metrics["val/nearest_ratio"]) == pytest.approx(logged[-1].nearest_ratio)
    for (name, value), other in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_samples_are_compared_as_the_decoder_draws_them(tmp_path):
    numbers = []

    class Seen(callbacks.CopyWatch):
        def _measure(self, *arguments):
            numbers.append(super()._measure(*arguments))
            return numbers[-1]

    for gain in (1.0, 2.5):
        watched = system()
        watched.autoencoder.set_power_gain(torch.full((POINTS,), gain))
        fit(watched, tmp_path, Seen(n_samples=6, steps=2), max_steps=2)
    assert numbers[0] == numbers[1]


def test_a_training_that_copies_is_stopped(tmp_path, monkeypatch):
    def sample(self, prompt, seeds, sampling):
        """A model that has learned the first training slice by heart."""
        assert (sampling.counts, sampling.n_views, sampling.steps) == (None, None, 2)
        data = self.trainer.datamodule
        latent = self.encode(data.augment(data.train_set[[0] * len(seeds)]))
        stack = self.autoencoder.scaling.inverse(self.autoencoder.decode(latent, (16, 16)).stack)
        return type("Samples", (), {"stack": stack})

    assert fit(system(), tmp_path, callbacks.CopyWatch(6, 2, limit=0.9)).global_step == 6
    monkeypatch.setattr(LatentDiffusion, "sample", sample)
    stopped = fit(system(), tmp_path, callbacks.CopyWatch(6, 2, limit=0.9))
    assert stopped.global_step == 2
    assert float(stopped.callback_metrics["val/copy_rate"]) == 1


def test_impossible_watches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="n_samples is 0"):
        callbacks.CopyWatch(n_samples=0)
    with pytest.raises(ValueError, match="limit is 50, but is a share"):
        callbacks.CopyWatch(limit=50)
    with pytest.raises(TypeError, match="Copies are watched for in stage 2, not in AutoencoderSystem"):
        fit(AutoencoderSystem(Autoencoder((8, 16))), tmp_path, callbacks.CopyWatch(2, 2))
