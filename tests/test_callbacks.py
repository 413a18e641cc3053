from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from tiny_pet import GEOMETRY, TinyPET

import callbacks
from allpet import (
    Autoencoder,
    AutoencoderSystem,
    Denoiser,
    LatentDiffusion,
    Prompt,
    Radon,
    Sampling,
    SymmetryAugmentation,
    fbp,
)
from allpet.systems.base import Diverged
from callbacks.figures import Tile, draw_grid, pixels, save_animation, save_figure
from callbacks.memory import peak_process_bytes
from callbacks.panels import generation_figure, reconstruction_figure, spread
from callbacks.sample_writer import transition


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stage_1() -> AutoencoderSystem:
    torch.manual_seed(0)
    return AutoencoderSystem(Autoencoder((8, 16)), warmup_steps=1)


def stage_2() -> LatentDiffusion:
    torch.manual_seed(0)
    denoiser = Denoiser(channels=(8, 16), layers_per_block=1, attention=(False, True), head_channels=8)
    return LatentDiffusion(stage_1().autoencoder, denoiser, warmup_steps=1)


def fit(folder, system, *watching, resume=None, **options) -> Trainer:
    settings = {"max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=settings.pop("logger", False),
        default_root_dir=folder,
        callbacks=list(watching),
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(watcher, callbacks.StepProgress) for watcher in watching),
        enable_checkpointing=any(isinstance(watcher, callbacks.RunCheckpoint) for watcher in watching),
        **settings,
    )
    trainer.fit(system, datamodule=TinyPET(), ckpt_path=resume)
    return trainer


# ---------------------------------------------------------------------------------------------------- panels


def test_slices_are_spread_over_prompts_first():
    names = ["a"] * 8 + ["b"] * 2 + ["c"]
    assert spread(names, 3) == [0, 8, 10]
    assert spread(names, 6) == [0, 8, 10, 4, 9]  # c has no second, and two of each is what six asks for
    assert spread(["a"] * 10, 5) == [0, 2, 4, 6, 8]
    assert spread(["a", "b"], 10) == [0, 1]
    assert spread([], 3) == []


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_panels_show_the_same_slices_and_leave_the_training_alone(make, tmp_path):
    watched, alone = make(), make()
    panels = callbacks.Panels(n_slices=3, n_generated=1, steps=2)
    shown = []
    draw = panels.figure
    panels.figure = lambda system, batch, *rest: shown.append(batch) or draw(system, batch, *rest)
    fit(tmp_path, watched, panels, max_steps=5)
    fit(tmp_path / "alone", alone, max_steps=5)
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == [
        f"step-{step:08d}.png" for step in (2, 4, 5)
    ]
    assert all(torch.equal(batch.sinogram, shown[0].sinogram) for batch in shown)
    assert all(torch.equal(batch.stack.cells, shown[0].stack.cells) for batch in shown)
    assert set(shown[0].sample_id.tolist()) <= {4, 5, 6, 7}  # of the validation set
    for (name, value), other in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_panels_show_averaged_weights(tmp_path):
    system, seen = stage_1(), []
    panels = callbacks.Panels(n_slices=1)
    draw = panels.figure
    panels.figure = lambda system, *rest: seen.append(first_weight(system)) or draw(system, *rest)
    average = EMAWeightAveraging(decay=0.5)
    keep = [lambda: first_weight(average._average_model.module)]
    fit(tmp_path, system, average, panels, max_steps=2)
    # the last panel is drawn from what training ends with: the average
    assert torch.equal(seen[-1], first_weight(system))
    assert torch.equal(seen[-1], keep[0]())


def first_weight(module: torch.nn.Module) -> torch.Tensor:
    return next(module.parameters()).detach().clone()


def test_panels_of_another_system_are_refused():
    with pytest.raises(TypeError, match=r"remove callbacks\.Panels"):
        callbacks.Panels().figure(torch.nn.Linear(1, 1), None, None, "")
    with pytest.raises(ValueError, match="n_slices is 0"):
        callbacks.Panels(n_slices=0)
    with pytest.raises(ValueError, match="remove the callback"):
        callbacks.Panels(every_n_validations=0)


def test_the_colour_range_is_that_of_the_expected_slice():
    data = TinyPET()
    data.setup()
    batch = data.augment(data.val_set[[0, 1]])
    exact = reconstruction_figure(batch, batch.expected, data.radon)
    doubled = reconstruction_figure(batch, 2 * batch.expected, data.radon)
    for left, right in zip(exact.axes, doubled.axes, strict=True):
        assert left.images[0].get_clim() == right.images[0].get_clim()
    difference = exact.axes[3].images[0]
    assert abs(difference.get_array()).max() == 0
    assert difference.get_clim()[0] == -difference.get_clim()[1]


def test_generated_slices_stand_beside_the_real_one_of_their_prompt():
    data = TinyPET()
    data.setup()
    batch = data.val_set[[0, 1]]
    generated = torch.stack([batch.sinogram, 2 * batch.sinogram], dim=1)
    figure = generation_figure(batch, generated, data.radon)
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert len(shown) == 2 * 2 * 3
    assert (shown[0] == shown[1]).all()
    assert (2 * shown[0] == shown[2]).all()
    images = fbp(data.radon, batch.sinogram)
    torch.testing.assert_close(torch.tensor(shown[9].data), images[1, 0])
    assert [axis.get_ylabel() for axis in figure.axes[::6]] == batch.prompt.names()


def test_panels_show_what_the_network_makes_whatever_sampling_adds():
    data = TinyPET()
    data.setup()
    plain, noisy = stage_2(), stage_2()
    plain.geometry = noisy.geometry = GEOMETRY
    noisy.sampling = Sampling(counts=100.0, n_views=8, n_bins=8)
    panels = callbacks.Panels(n_generated=1, steps=2)
    figures = [panels.figure(system.eval(), data.val_set[[0]], data.radon, "") for system in (plain, noisy)]
    for left, right in zip(*(figure.axes for figure in figures), strict=True):
        assert (left.images[0].get_array() == right.images[0].get_array()).all()


# --------------------------------------------------------------------------------------------------- figures


def test_figures_are_written_whole(tmp_path):
    tiles = [[Tile(torch.eye(4), (0, 1), "a"), Tile(torch.ones(4, 4), (0, 1), "b")], [Tile(torch.eye(4), (0, 1))]]
    figure = draw_grid(tiles, ["first", "second"])
    path = save_figure(figure, tmp_path / "new" / "grid.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]
    assert not figure.axes[3].axison  # the second row is shorter
    rendered = pixels(figure)
    assert rendered.ndim == 3
    assert rendered.shape[2] == 3
    assert rendered.min() < 50 < 200 < rendered.max()


def test_an_animation_has_one_frame_per_moment_and_rests_on_the_last(tmp_path):
    frames = [[[Tile(torch.full((4, 4), value), (0, 1))]] for value in (0.0, 0.5, 1.0)]
    path = save_animation(frames, ["one", "two", "three"], tmp_path / "moments.gif")
    with Image.open(path) as animation:
        middles, durations = [], []
        for index in range(animation.n_frames):
            animation.seek(index)
            middles.append(animation.convert("L").getpixel((animation.width // 2, animation.height * 2 // 3)))
            durations.append(animation.info["duration"])
    assert middles == sorted(middles, reverse=True)  # activity is dark
    assert len(set(middles)) == 3
    assert durations[-1] > durations[0]


# ----------------------------------------------------------------------------------------- latents and export


def test_standardised_latents_of_the_training_set_have_mean_0_and_std_1(tmp_path, capsys):
    system = stage_1()
    trainer = fit(tmp_path, system, EMAWeightAveraging(decay=0.9), callbacks.LatentStatistics(tolerance=1e-6))
    data = trainer.datamodule
    batch = data.augment(data.train_set[list(range(len(data.train_set)))], epoch=trainer.current_epoch)
    latents = system.autoencoder.encode_mean(system.autoencoder.scaling(batch.stack.stack))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert "WARNING" in capsys.readouterr().out  # no validation set agrees to a millionth


def test_statistics_are_logged_for_the_validation_set(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, stage_1(), callbacks.LatentStatistics(), callbacks.PeakMemory(), logger=logger)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"latent/std_{channel}" for channel in range(4)} <= set(header)
    assert "memory/peak_gib" in header


def test_unequal_shares_of_processes_give_the_moments_of_the_whole():
    system, data = stage_1().eval(), TinyPET()
    data.setup()
    shares = []

    def reduce(share, reduce_op):
        assert reduce_op == "sum"
        shares.append(share)
        return sum(shares)

    strategy = SimpleNamespace(batch_to_device=lambda batch, dataloader_idx: batch, reduce=reduce)

    def measure(rows, world_size):
        trainer = SimpleNamespace(world_size=world_size, strategy=strategy)
        return callbacks.LatentStatistics._measure(trainer, system, [data.train_set[list(rows)]])

    whole = measure(range(16), 1)
    measure(range(11), 2)
    for mine, theirs in zip(measure(range(11, 16), 2), whole, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_power_that_reconstructions_lack_is_stored(tmp_path):
    system = stage_1()
    trainer = fit(tmp_path, system, callbacks.LatentStatistics())
    data = trainer.datamodule
    batch = data.augment(data.train_set[list(range(len(data.train_set)))], epoch=trainer.current_epoch)
    gain = system.eval().measure_power_gain([batch])
    torch.testing.assert_close(system.autoencoder.power_gain, gain, atol=1e-3, rtol=0)
    assert float(system.autoencoder.power_gain.max()) > 1.2, "after four steps hardly any detail comes through"


def test_the_power_is_measured_on_slices_that_are_neither_mixed_nor_moved():
    data = TinyPET()
    data.setup()
    data.symmetry = SymmetryAugmentation(GEOMETRY, dilation=(0.5, 0.6), blur_mm=20.0)
    batch = data.train_set[[0, 1]]
    with data.unmixed():
        assert not torch.equal(data.augment(batch, 0).sinogram, batch.sinogram)
    with data.unmixed(moved=False):
        assert torch.equal(data.augment(batch, 0).sinogram, batch.sinogram)
    assert data.symmetry is not None


def test_latent_statistics_of_stage_2_are_refused(tmp_path):
    with pytest.raises(TypeError, match="belong to stage 1"):
        fit(tmp_path, stage_2(), callbacks.LatentStatistics())


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_what_is_exported_works_as_what_was_trained(make, tmp_path):
    system = make()
    fit(tmp_path, system, EMAWeightAveraging(decay=0.5), callbacks.ExportPretrained())
    loaded = type(system).from_pretrained(tmp_path / "pretrained")
    system.eval()
    if make is stage_1:
        data = TinyPET()
        data.setup()
        batch = data.augment(data.val_set[[0, 1]])
        torch.testing.assert_close(loaded.reconstruct(batch), system.reconstruct(batch))
    else:
        asked = Prompt.of(["FDG:brain"]), [3]
        torch.testing.assert_close(loaded.sample(*asked).sinogram, system.sample(*asked).sinogram)
    card = (tmp_path / "pretrained" / "README.md").read_text()
    assert "4 optimiser steps" in card
    assert "discs-24-60" in card
    assert "synthetic" in card
    assert "train_ids" not in card


def test_a_card_tells_only_what_it_may(tmp_path, monkeypatch):
    summary = TinyPET.summary
    monkeypatch.setattr(TinyPET, "summary", lambda self: {**summary(self), "train_patients": ["Doe"], "folder": "here"})
    fit(tmp_path, stage_1(), callbacks.ExportPretrained(), max_steps=1)
    card = (tmp_path / "pretrained" / "README.md").read_text()
    assert "Doe" not in card
    assert "| folder |" not in card


def test_split_weights_are_refused_before_they_are_trained(tmp_path, monkeypatch):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer), "strategy", ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"needs them whole: use --trainer\.strategy=ddp"):
        callbacks.ExportPretrained().setup(trainer, stage_1(), "fit")


def test_a_training_that_diverged_exports_nothing(tmp_path):
    """With all callbacks of stage 1, as its experiment has them."""
    system = stage_1()
    with torch.no_grad():
        next(system.parameters())[0] = torch.nan
    watching = [EMAWeightAveraging(decay=0.5), callbacks.Panels(n_slices=1), callbacks.LatentStatistics()]
    with pytest.raises(Diverged, match="The loss is nan at step 0"):
        fit(tmp_path, system, *watching, callbacks.ExportPretrained(), max_steps=2)
    assert not (tmp_path / "pretrained").exists()


def test_broken_statistics_are_not_exported(tmp_path, capsys):
    system = stage_1()
    system.autoencoder.latent_std[1] = torch.nan
    fit(tmp_path, system, callbacks.ExportPretrained(), max_steps=1)
    assert "autoencoder.latent_std and 0 other weights are not finite" in capsys.readouterr().out
    assert not (tmp_path / "pretrained").exists()


# ------------------------------------------------------------------------------- checkpoints, memory, progress


@pytest.mark.parametrize("options", [{"max_steps": 7}, {"max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0}])
def test_the_last_step_is_saved_and_two_checkpoints_kept(options, tmp_path):
    if "max_epochs" in options:
        options = {**options, "check_val_every_n_epoch": 1}
    trainer = fit(tmp_path, stage_1(), callbacks.RunCheckpoint(every_n_steps=3), **options)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step=00000006.ckpt", f"step={trainer.global_step:08d}.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == names[-1]


def test_the_link_to_the_last_checkpoint_follows_a_resumed_training(tmp_path):
    folder = tmp_path / "checkpoints"
    fit(tmp_path, stage_1(), callbacks.RunCheckpoint(every_n_steps=3), max_steps=3)
    fit(tmp_path, stage_1(), callbacks.RunCheckpoint(every_n_steps=3), max_steps=6, resume=folder / "last.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.ckpt",
        "step=00000003.ckpt",
        "step=00000006.ckpt",
    ]
    assert (folder / "last.ckpt").resolve().name == "step=00000006.ckpt"


def test_a_raised_budget_goes_on_with_the_next_batch(tmp_path):
    """Stopping after 5 of 9 steps and going on gives what 9 steps at once give, bit for bit."""

    class Constant(AutoencoderSystem):
        def configure_optimizers(self):  # without a schedule, which would know the budget
            return torch.optim.AdamW(self.parameters(), 1e-3)

    def system() -> Constant:
        torch.manual_seed(0)
        return Constant(Autoencoder((8, 16)))

    once, twice = system(), system()
    fit(tmp_path / "once", once, EMAWeightAveraging(decay=0.5), max_steps=9)
    watching = [EMAWeightAveraging(decay=0.5), callbacks.RunCheckpoint(every_n_steps=100)]
    fit(tmp_path, system(), *watching, max_steps=5)
    trainer = Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False, max_steps=9,
        max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None, callbacks=watching,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(twice, datamodule=TinyPET(), ckpt_path=tmp_path / "checkpoints" / "step=00000005.ckpt")
    for (name, value), other in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_peak_memory_counts_what_was_freed():
    before = peak_process_bytes()
    assert before >= psutil.Process().memory_info().rss * 0.5
    size = before + 200 * 2**20 - psutil.Process().memory_info().rss
    block = torch.ones(size // 4)
    del block
    assert peak_process_bytes() >= before + 150 * 2**20


def test_progress_counts_steps_over_epochs(tmp_path, capsys):
    progress = callbacks.StepProgress(refresh_rate=1)
    fit(tmp_path, stage_1(), progress, max_steps=7)
    assert "7/7" in capsys.readouterr().out
    assert progress.train_progress_bar.n == progress.train_progress_bar.total == 7


# ---------------------------------------------------------------------------------------------------- samples


def test_a_transition_ends_at_the_sample(tmp_path):
    system = stage_2()
    system.geometry = GEOMETRY
    path = transition(system, ["FDG:brain", "PSMA:abdomen"], [0, 1], tmp_path / "transition.gif")
    with Image.open(path) as animation:
        assert animation.n_frames == system.sampling.steps
    moments = []
    final = system.sample(Prompt.of(["FDG:brain"]), [0], callback=lambda *moment: moments.append(moment))
    assert [step for step, _, _ in moments] == list(range(1, system.sampling.steps + 1))
    torch.testing.assert_close(moments[-1][2], final.sinogram)


def test_samples_of_stage_1_are_refused(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[callbacks.SampleWriter()], default_root_dir=tmp_path)
    with pytest.raises(TypeError, match="come from stage 2"):
        trainer.predict(stage_1(), TinyPET())


def test_sampling_that_fails_leaves_no_file(tmp_path):
    system = stage_2()
    system.geometry = GEOMETRY
    writer = callbacks.SampleWriter()
    samples = system.sample(Prompt.of(["FDG:brain"]), [0])
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    writer.on_predict_batch_end(trainer, system, samples, None, 0)
    assert list(tmp_path.iterdir())
    writer.on_exception(trainer, system, KeyboardInterrupt())
    assert not list(tmp_path.iterdir())
    assert Radon(GEOMETRY).geometry == samples.geometry
