"""The training recipes: what is learned, what is resumed, what is exported, what is sampled."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from allpet import (
    SYMMETRY_LABEL_SIZE,
    Autoencoder,
    AutoencoderSystem,
    Denoiser,
    Diffusion,
    LatentDiffusion,
    ParallelBeam,
    Prompt,
    Sampling,
    SymmetryAugmentation,
)
from allpet.batches import unmasked_stack
from allpet.consistency import helgason_ludwig_residual
from allpet.diffusion.samplers import SAMPLERS
from allpet.models.discriminator import PatchDiscriminator
from allpet.power import POINTS, restore_power
from allpet.randomness import keyed_generator
from allpet.systems.knowledge import level
from allpet.systems.sampling import add_counting_noise
from data_modules import SimulatedPET

GEOMETRY = ParallelBeam(16, 20, 21.6, 20, 21.6)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def data() -> SimulatedPET:
    module = SimulatedPET(
        GEOMETRY,
        prompts=("FDG:brain", "FDG:abdomen"),
        num_scans=16,
        slices_per_patient=2,
        val_patients=4,
        test_patients=4,
        batch_size=4,
        cache=None,
    )
    module.setup()
    return module


def stage1(stack_channels: int = 3, **changes) -> AutoencoderSystem:
    autoencoder = Autoencoder(channels=(16, 32), latent_channels=4, patch=2, stack_channels=stack_channels)
    return AutoencoderSystem(autoencoder, **{"warmup_steps": 2, "learning_rate": 3e-3, **changes})


def stage2(autoencoder: Autoencoder, label_size: int = 0, **changes) -> LatentDiffusion:
    denoiser = Denoiser(
        channels=(16, 32), layers_per_block=1, attention=(False, True), head_channels=8, label_size=label_size,
        condition_channels=4 if changes.get("linear_rank") else 0,
    )  # fmt: skip
    system = LatentDiffusion(autoencoder, denoiser, **{"warmup_steps": 2, "learning_rate": 2e-3, **changes})
    system.geometry = GEOMETRY
    return system


def trainer(**arguments) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **arguments,
    )  # fmt: skip


class Stopped(Exception):
    pass


class StopAtStep6(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)
            raise Stopped


def one_batch(data: SimulatedPET):
    return data.augment(next(iter(data.val_dataloader())))


@pytest.mark.parametrize(("optimizer", "stack_channels"), [("adamw", 3), ("muon", 3), ("adamw", 1)])
def test_stage_1_learns_to_reconstruct(optimizer, stack_channels, data):
    system = stage1(stack_channels, optimizer=optimizer)
    batch = one_batch(data)
    before = (system.reconstruct(batch) - batch.expected).norm()
    trainer(max_steps=60).fit(system, datamodule=data)
    assert (system.reconstruct(batch) - batch.expected).norm() < 0.5 * before
    assert float(system.autoencoder.scaling.scale) == pytest.approx(data.scale)


def test_one_channel_loses_nothing_to_masks_that_it_does_not_know(data):
    system = stage1(stack_channels=1)
    batch = one_batch(data)
    target = batch.as_stack() / data.scale
    full = unmasked_stack(target[:, 1:2])
    assert not torch.allclose(full, target)
    assert all(value == 0 for value in system._losses(full, full[:, :1], target, batch).values())


def test_stage_2_trains_without_a_data_module(data):
    batches = [data.augment(batch) for batch in data.val_dataloader()]
    system = stage2(stage1().autoencoder)
    before = copy.deepcopy(system.state_dict())
    trainer(max_steps=1).fit(system, torch.utils.data.DataLoader(batches, batch_size=None))
    assert any(not torch.equal(value, before[name]) for name, value in system.state_dict().items())


def test_stage_2_learns_what_stage_1_encodes(data):
    system = stage2(stage1().autoencoder)
    system.autoencoder.scaling.set_scale(data.scale)
    losses = [float(run["val/loss"]) for run in trainer().validate(system, datamodule=data, verbose=False)]
    trainer(max_steps=60).fit(system, datamodule=data)
    losses += [float(run["val/loss"]) for run in trainer().validate(system, datamodule=data, verbose=False)]
    assert losses[1] < 0.9 * losses[0]


def test_views_encoded_once_are_those_of_training(data):
    """With one view, a training step sees the latents of the first epoch's masks, whatever the epoch."""
    system = stage2(stage1().autoencoder, latent_views=1)
    trainer(max_steps=1).fit(system, datamodule=data)
    batch = data.augment(data.train_set[[3, 9, 1]], 0)
    later = data.augment(data.train_set[[3, 9, 1]], 5)
    kept, _ = system._training_latents(later, [torch.Generator() for _ in range(3)])
    torch.testing.assert_close(kept, system.encode(batch), rtol=0, atol=1e-5)
    assert not torch.allclose(kept, system.encode(later), atol=1e-3), "other masks, other latents"


@pytest.fixture(scope="module")
def turned() -> SimulatedPET:
    return SimulatedPET(
        GEOMETRY, prompts=("FDG:brain",), num_scans=4, slices_per_patient=2, val_patients=1, test_patients=1,
        batch_size=4, cache=None, symmetry=SymmetryAugmentation,
    )  # fmt: skip


def test_several_views_are_drawn_with_the_labels_of_their_symmetries(turned):
    system = stage2(stage1().autoencoder, SYMMETRY_LABEL_SIZE, latent_views=3)
    trainer(max_steps=1).fit(system, datamodule=turned)
    batch = turned.augment(turned.train_set[[2] * 40], 0)
    latents, labels = system._training_latents(batch, [torch.Generator().manual_seed(i) for i in range(40)])
    views = [turned.augment(turned.train_set[[2]], view) for view in range(3)]
    for view in views:
        same = (latents - system.encode(view)).abs().amax(dim=(1, 2, 3)) < 1e-4
        assert 3 < int(same.sum()) < 37, "each view is drawn, none always"
        assert torch.equal(labels[same], view.symmetry.expand(int(same.sum()), -1))


def test_the_denoiser_is_told_of_symmetries_in_training_and_of_none_at_sampling(turned, monkeypatch):
    system = stage2(stage1().autoencoder, SYMMETRY_LABEL_SIZE)
    told = []
    forward = Denoiser.forward
    monkeypatch.setattr(
        Denoiser,
        "forward",
        lambda self, *inputs, label=None: told.append((self.training, label)) or forward(self, *inputs, label=label),
    )
    before = system.denoiser.label.weight.detach().clone()
    trainer(max_steps=3).fit(system, datamodule=turned)
    assert not torch.equal(system.denoiser.label.weight, before)
    assert all((label is not None and bool(label.any())) == training for training, label in told)
    assert {training for training, _ in told} == {True, False}
    told.clear()
    system.eval()
    prompt = Prompt.of(["FDG:brain"])
    sample = system.sample(prompt, [0], Sampling("ddim", 3)).stack
    assert all(label is None for _, label in told)
    zeros = torch.zeros(1, SYMMETRY_LABEL_SIZE)
    monkeypatch.setattr(Denoiser, "forward", lambda self, *inputs, label=None: forward(self, *inputs, label=zeros))
    assert torch.equal(system.sample(prompt, [0], Sampling("ddim", 3)).stack, sample)


def test_symmetries_that_would_leak_are_refused(turned, data):
    for size in (0, 3):
        with pytest.raises(ValueError, match=f"label_size is {size}: give the denoiser label_size 8"):
            trainer(max_steps=1).fit(stage2(stage1().autoencoder, size), datamodule=turned)
    trainer(max_steps=1).fit(stage2(stage1().autoencoder, SYMMETRY_LABEL_SIZE), datamodule=data)


def test_unknown_optimizers_and_views_are_refused():
    with pytest.raises(ValueError, match="optimizer is 'sgd', but must be 'adamw' or 'muon'"):
        stage1(optimizer="sgd")
    with pytest.raises(ValueError, match="latent_views is -1"):
        stage2(stage1().autoencoder, latent_views=-1)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [(1, {}), (1, {"optimizer": "muon"}), (2, {}), (2, {"optimizer": "muon", "latent_views": 2, "linear_rank": 64})],
)
def test_a_resumed_run_equals_an_uninterrupted_one(stage, changes, data, tmp_path):
    def make():
        return stage1(**changes) if stage == 1 else stage2(stage1().autoencoder, **changes)

    first = make()
    start = copy.deepcopy(first.state_dict())

    def fresh(like):
        system = make()
        system.load_state_dict(start)
        if stage == 2:
            system._aside = like._aside
        return system

    whole, cut, rest = fresh(first), fresh(first), fresh(first)
    trainer(max_steps=7).fit(whole, datamodule=data)
    # Interrupted in the middle of the second epoch (4 batches each); the plan of 7 steps is part of the run.
    with pytest.raises(Stopped):
        trainer(max_steps=7, callbacks=[StopAtStep6(tmp_path / "six.ckpt")]).fit(cut, datamodule=data)
    trainer(max_steps=7).fit(rest, datamodule=data, ckpt_path=tmp_path / "six.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(rest.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_training_goes_on_from_checkpoints_that_know_no_power_gain(data, tmp_path):
    def fit(steps, **arguments):
        system = stage1()
        averaging = EMAWeightAveraging(decay=0.9)
        trainer(max_steps=steps, callbacks=[averaging]).fit(system, datamodule=data, **arguments)
        return system

    def stop(name):
        callbacks = [EMAWeightAveraging(decay=0.9), StopAtStep6(tmp_path / name)]
        with pytest.raises(Stopped):
            trainer(max_steps=7, callbacks=callbacks).fit(stage1(), datamodule=data)

    stop("new.ckpt")
    old = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for weights in (old["state_dict"], old["current_model_state"]):
        del weights["autoencoder.power_gain"]
    torch.save(old, tmp_path / "old.ckpt")
    new, old = (fit(7, ckpt_path=tmp_path / name) for name in ("new.ckpt", "old.ckpt"))
    for name, value in new.state_dict().items():
        torch.testing.assert_close(old.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_the_two_players_of_a_discriminator_do_not_move_each_other(data):
    """The autoencoder must not learn from the discriminator's loss, nor the discriminator from the verdict."""
    system = stage1(discriminator=PatchDiscriminator(channels=8, layers=2), adversarial_weight=0.0)
    system.autoencoder.scaling.set_scale(data.scale)
    system.log = system.log_dict = lambda *_, **__: None
    batch = one_batch(data)

    def gradients(adversarial_weight, part):
        system.adversarial_weight = adversarial_weight
        system.zero_grad()
        system.training_step(batch, 0).backward()
        return torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])

    with torch.random.fork_rng():
        quiet, loud = (gradients(weight, system.autoencoder) for weight in (0.0, 10.0))
        assert not torch.allclose(quiet, loud)
        quiet, loud = (gradients(weight, system.discriminator) for weight in (0.0, 10.0))
        torch.testing.assert_close(quiet, loud)
        assert quiet.abs().max() > 0
    without = stage1()
    without.autoencoder.load_state_dict(system.autoencoder.state_dict())
    without.log = without.log_dict = lambda *_, **__: None
    without.training_step(batch, 0).backward()
    alone = torch.cat([p.grad.flatten() for p in without.autoencoder.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients(0.0, system.autoencoder), alone)


def test_latents_measured_over_batches_are_those_of_the_whole_set(data):
    system = stage1()
    system.autoencoder.scaling.set_scale(data.scale)
    batches = [data.augment(batch) for batch in data.val_dataloader()]
    mean, std = system.measure_latents(batches)
    raw = torch.cat([system.autoencoder.encode(system.autoencoder.scaling(b.as_stack())).mean for b in batches])
    torch.testing.assert_close(mean, raw.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(std, raw.std(dim=(0, 2, 3), unbiased=False), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no batches"):
        system.measure_latents([])


def test_stage_1_comes_back_from_its_folder(data, tmp_path):
    system = stage1().eval()
    system.geometry = GEOMETRY
    system.autoencoder.scaling.set_scale(data.scale)
    system.autoencoder.set_latent_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    system.save_pretrained(tmp_path / "pretrained")
    loaded = AutoencoderSystem.from_pretrained(tmp_path / "pretrained")
    assert loaded.geometry == GEOMETRY
    batch = one_batch(data)
    torch.testing.assert_close(loaded.reconstruct(batch), system.reconstruct(batch))
    torch.testing.assert_close(loaded.autoencoder.latent_std, torch.arange(1.0, 5.0))
    assert stage2(str(tmp_path / "pretrained")).geometry == GEOMETRY


def test_stage_2_comes_back_whole_from_its_folder(tmp_path):
    system = stage2(stage1().autoencoder).eval()
    torch.nn.init.normal_(system.denoiser.unet.conv_out.weight, std=0.1)
    system.save_pretrained(tmp_path / "pretrained")
    loaded = LatentDiffusion.from_pretrained(tmp_path / "pretrained")
    prompt, sampling = Prompt.of(["FDG:brain", "open:abdomen"]), Sampling(steps=3)
    torch.testing.assert_close(
        loaded.sample(prompt, [5, 6], sampling).stack, system.sample(prompt, [5, 6], sampling).stack
    )
    with pytest.raises(ValueError, match="holds a LatentDiffusion, but a AutoencoderSystem is needed"):
        AutoencoderSystem.from_pretrained(tmp_path / "pretrained")


def test_flow_matching_trains_is_sampled_and_comes_back_from_its_folder(data, tmp_path):
    system = stage2(stage1().autoencoder, diffusion=Diffusion(prediction="flow"))
    trainer(max_steps=3).fit(system, datamodule=data)
    system.eval().save_pretrained(tmp_path / "pretrained")
    loaded = LatentDiffusion.from_pretrained(tmp_path / "pretrained")
    assert loaded.diffusion == Diffusion(prediction="flow")
    prompt = Prompt.of(["FDG:brain"])
    for sampler in SAMPLERS:
        samples = [one.sample(prompt, [5], Sampling(sampler, steps=3)).stack for one in (system, loaded)]
        torch.testing.assert_close(*samples)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_stage_2_starts_from_the_best_linear_denoiser_and_comes_back_with_it(prediction, data, tmp_path):
    diffusion = Diffusion(prediction=prediction)
    plain, started = (
        stage2(stage1().autoencoder, diffusion=diffusion, linear_rank=rank, learning_rate=1e-9) for rank in (0, 64)
    )
    losses = {}
    for system in (plain, started):
        system.autoencoder.scaling.set_scale(data.scale)
        system.autoencoder.set_latent_statistics(*system_statistics(system.autoencoder, data))
        trainer(max_steps=1).fit(system, datamodule=data)
        (run,) = trainer().validate(system, datamodule=data, verbose=False)
        losses[system] = float(run["val/loss"])
    assert losses[started] < 0.8 * losses[plain]
    started.save_pretrained(tmp_path / "folder")
    again = LatentDiffusion.from_pretrained(tmp_path / "folder")
    prompt, sampling = Prompt.of(["FDG:brain"] * 2), Sampling("ddim", steps=3)
    torch.testing.assert_close(
        again.sample(prompt, [1, 2], sampling).sinogram, started.eval().sample(prompt, [1, 2], sampling).sinogram
    )


def system_statistics(autoencoder: Autoencoder, data: SimulatedPET) -> tuple[torch.Tensor, torch.Tensor]:
    raw = autoencoder.encode(autoencoder.scaling(data.augment(data.train_set[list(range(16))]).as_stack())).mean
    return raw.mean((0, 2, 3)).detach(), raw.std((0, 2, 3)).detach()


def test_a_linear_start_needs_room_for_its_estimate():
    with pytest.raises(ValueError, match="linear_rank is 8 and the denoiser has 0 condition channels: give it 4"):
        LatentDiffusion(stage1().autoencoder, Denoiser(channels=(16,), attention=(False,)), linear_rank=8)


def test_generated_sinograms_are_corrected_on_request(data):
    system = stage2(stage1().autoencoder).eval()
    prompt, raw = Prompt.of(["FDG:brain"] * 2), Sampling("ddim", steps=2)
    corrected = system.sample(prompt, [1, 2], replace(raw, consistency="helgason_ludwig")).sinogram
    before = system.sample(prompt, [1, 2], raw).sinogram
    assert helgason_ludwig_residual(corrected, GEOMETRY, 4).max() < helgason_ludwig_residual(before, GEOMETRY, 4).min()
    with pytest.raises(ValueError, match="consistency is 'magic', but must be one of bow_tie"):
        Sampling(consistency="magic")


def test_stage_1_is_neither_trained_nor_stored_nor_copied_by_stage_2():
    system = stage2(stage1().autoencoder)
    assert not any("autoencoder" in name or "_aside" in name for name in system.state_dict())
    assert copy.deepcopy(system).autoencoder is system.autoencoder
    assert not any(parameter.requires_grad for parameter in system.autoencoder.parameters())


def test_samples_depend_on_seed_and_prompt_alone():
    system = stage2(stage1().autoencoder).eval()
    torch.nn.init.normal_(system.denoiser.unet.conv_out.weight, std=0.1)
    prompt = Prompt.of(["FDG:brain", "FDG:abdomen", "FDG:brain"])
    for sampler in SAMPLERS:
        together = system.sample(prompt, [1, 2, 3], Sampling(sampler, steps=4))
        apart = system.sample(prompt, [1, 2, 3], Sampling(sampler, steps=4, batch_size=2))
        torch.testing.assert_close(together.sinogram, apart.sinogram, atol=1e-4, rtol=1e-4)
    assert together.prompt.names() == prompt.names()
    other = system.sample(Prompt.of(["FDG:abdomen"]), [1], Sampling(steps=4))
    assert not torch.allclose(other.sinogram[0], system.sample(prompt, [1, 2, 3], Sampling(steps=4)).sinogram[0])


def test_guidance_is_chosen_at_sampling():
    system = stage2(stage1().autoencoder).eval()
    torch.nn.init.normal_(system.denoiser.unet.conv_out.weight, std=0.1)
    prompt = Prompt.of(["FDG:brain"])
    choices = (
        Sampling("ddim", 4, guidance=1.0),
        Sampling("ddim", 4, guidance=3.0),
        Sampling("ddim", 4, guidance=1.0, region_guidance=3.0),
        Sampling("ddim", 4, guidance=3.0, guidance_interval=(0.2, 0.8)),
    )
    stacks = [system.sample(prompt, [1], sampling).stack for sampling in choices]
    for i, stack in enumerate(stacks):
        assert all(not torch.allclose(stack, other) for other in stacks[:i])
    never = replace(choices[1], guidance_interval=(0.3, 0.4))
    assert torch.equal(system.sample(prompt, [1], never).stack, stacks[0]), "no time of four lies there"


def test_power_is_restored_in_the_sinogram_and_not_in_the_stack():
    system = stage2(stage1().autoencoder).eval()
    system.autoencoder.set_power_gain(torch.linspace(1, 2, POINTS))
    prompt = Prompt.of(["FDG:brain"] * 2)
    plain, restored = (
        system.sample(prompt, [0, 1], Sampling(steps=2, restore_power=wanted)) for wanted in (False, True)
    )
    torch.testing.assert_close(plain.stack, restored.stack)
    torch.testing.assert_close(plain.sinogram, plain.stack[:, 1:2])
    torch.testing.assert_close(restored.sinogram, restore_power(plain.sinogram, system.autoencoder.power_gain))
    assert not torch.allclose(plain.sinogram, restored.sinogram)


def test_what_a_prompt_leaves_open_is_drawn_from_the_training_slices(data, tmp_path):
    system = stage2(stage1().autoencoder)
    trainer(max_steps=1).fit(system, datamodule=data)
    system.save_pretrained(tmp_path)
    loaded = LatentDiffusion.from_pretrained(tmp_path, Sampling(steps=2))
    strength = level(data.train_set[list(range(len(data.train_set)))].sinogram[:, 0])
    assert loaded.levels is not None
    assert loaded.levels["open:open"] == pytest.approx(float(strength.median()), rel=0.2)
    asked = Prompt.of(["FDG:open", "open:abdomen", "open:open", "PSMA:open"])
    with pytest.warns(UserWarning, match=r"No training slice shows PSMA:open, .* there are FDG:abdomen, FDG:brain"):
        samples = loaded.sample(asked, [0, 1, 2, 3])
    drawn = samples.prompt.names()
    assert set(drawn[:3]) <= {"FDG:brain", "FDG:abdomen"}
    assert drawn[1] == "FDG:abdomen"
    assert drawn[3] == "PSMA:open", "no slice could say"
    torch.testing.assert_close(loaded.sample(samples.prompt, [0, 1, 2, 3]).stack, samples.stack)
    alone = loaded.sample(Prompt(asked.tracer[2:3], asked.region[2:3]), [2])
    assert alone.prompt.names() == drawn[2:3]
    left = loaded.sample(asked, [0, 1, 2, 3], Sampling(steps=2, fill_open=False))
    assert left.prompt.names() == asked.names()


def test_views_and_bins_are_chosen_at_sampling():
    system = stage2(stage1().autoencoder).eval()
    prompt = Prompt.of(["FDG:brain"] * 2)
    plain = system.sample(prompt, [0, 1], Sampling(steps=2))
    sized = system.sample(prompt, [0, 1], Sampling(steps=2, n_views=24, n_bins=28))
    assert plain.sinogram.shape[-2:] == (16, 20)
    assert sized.sinogram.shape[-2:] == (24, 28)
    assert sized.geometry.field_of_view_mm == pytest.approx(GEOMETRY.field_of_view_mm)
    # the mean over views of a view's integral is the total activity, whatever the sampling
    totals = [s.sinogram.sum(dim=(1, 2, 3)) / s.geometry.n_views * s.geometry.bin_mm for s in (plain, sized)]
    torch.testing.assert_close(totals[0], totals[1], rtol=0.02, atol=0)


def test_counting_noise_has_the_moments_of_counts():
    expected = 50 * torch.rand(1, 1, 16, 20, generator=torch.Generator().manual_seed(0))
    counts, n = 5e4, 2000
    noisy = add_counting_noise(expected.expand(n, -1, -1, -1), counts, [keyed_generator(k, "counts") for k in range(n)])
    per_count = expected.sum() / counts
    torch.testing.assert_close(noisy.mean(0, keepdim=True), expected, rtol=0.05, atol=0.1)
    ratio = noisy.var(0).sum() / (expected.sum() * per_count)
    assert abs(ratio - 1) < 0.02
    total_counts = noisy.sum(dim=(1, 2, 3)) / per_count
    assert abs(total_counts.mean() / counts - 1) < 0.001
    assert (
        torch.equal(noisy / per_count, (noisy / per_count).round())
        or ((noisy / per_count) - (noisy / per_count).round()).abs().max() < 1e-2
    )


def test_counting_noise_keeps_its_total_where_resampling_undershoots():
    expected = torch.full((200, 1, 8, 8), 10.0)
    expected[..., 0] = -4.0
    noisy = add_counting_noise(expected, 1e4, [keyed_generator(k, "counts") for k in range(200)])
    assert noisy.min() >= 0
    assert abs(noisy.sum() / expected.clamp(min=0).sum() - 1) < 0.005


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"sampler": "euler"}, "sampler is 'euler', but must be one of ddpm, ddim, dpm"),
        ({"steps": 0}, "steps is 0, but must be at least 1"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is \\(0.8, 0.2\\), but must be"),
        ({"guidance_interval": (0.2, 80)}, "share of the last time"),
        ({"n_views": 0}, "n_views is 0"),
        ({"n_bins": -5}, "n_bins is -5"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_impossible_sampling_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**wrong)


def test_what_cannot_be_sampled_is_refused():
    system = stage2(stage1().autoencoder)
    with pytest.raises(ValueError, match="There are 1 prompts and 2 seeds"):
        system.sample(Prompt.of(["FDG:brain"]), [1, 2])
    with pytest.raises(ValueError, match="counts is -1"):
        Sampling(counts=-1)
    system.geometry = None
    with pytest.raises(RuntimeError, match="training geometry is unknown"):
        system.sample(Prompt.of(["FDG:brain"]), [1])
    with pytest.raises(ValueError, match="at most 1/3"):
        LatentDiffusion(stage1().autoencoder, system.denoiser, prompt_dropout=0.5)
    with pytest.raises(ValueError, match="4 latent channels and the denoiser 8"):
        LatentDiffusion(stage1().autoencoder, Denoiser(latent_channels=8, channels=(16,), attention=(False,)))


def test_stage_2_refuses_data_of_another_geometry(data):
    system = stage2(stage1().autoencoder)
    system.geometry = ParallelBeam(32, 20, 21.6, 20, 21.6)
    with pytest.raises(ValueError, match="train stage 1 on these data first"):
        trainer(max_steps=1).fit(system, datamodule=data)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_both_stages_train_and_sample_in_bfloat16_on_a_gpu(data, tmp_path):
    arguments = {
        "accelerator": "gpu",
        "devices": 1,
        "precision": "bf16-mixed",
        "gradient_clip_val": 1.0,
        "max_steps": 30,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    torch.cuda.reset_peak_memory_stats()
    first = stage1()
    Trainer(**arguments).fit(first, datamodule=data)
    first.save_pretrained(tmp_path / "vae")
    second = stage2(str(tmp_path / "vae"))
    Trainer(**arguments).fit(second, datamodule=data)
    assert torch.cuda.max_memory_allocated() > 0
    prompt, sampling = Prompt.of(["FDG:brain", "FDG:abdomen"]), Sampling(steps=5, n_views=24, counts=1e5)
    on_gpu = second.cuda().sample(prompt, [0, 1], sampling)
    on_cpu = second.cpu().sample(prompt, [0, 1], sampling)
    assert on_gpu.stack.is_cuda
    torch.testing.assert_close(on_gpu.stack.cpu(), on_cpu.stack, atol=1e-2 * float(on_cpu.stack.max()), rtol=0.05)
