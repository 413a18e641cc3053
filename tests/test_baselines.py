"""What the latent diffusion is compared with: fitted Gaussians, resampled slices, a GAN, a score-based model."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_pet import GEOMETRY, TinyPET

import callbacks
from allpet import (
    Autoencoder,
    AutoencoderSystem,
    Denoiser,
    LatentDiffusion,
    PCAGaussian,
    Prompt,
    ResampledSlices,
    Sampling,
    ScoreModel,
    ScoreSampling,
    SinogramGAN,
    SymmetryAugmentation,
    VAEPrior,
    sampling_cost,
    symmetry,
    training_flops,
)
from allpet.batches import SinogramBatch
from allpet.diff_augment import SinogramDiffAugment
from allpet.diffusion.edm import VarianceExploding, sample_heun
from allpet.models.discriminator import PromptDiscriminator
from allpet.models.generator import Generator
from allpet.prompts import answers
from allpet.systems.baselines.gaussian import PromptGaussian

BRAIN, ABDOMEN = "FDG:brain", "PSMA:abdomen"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> TinyPET:
    module = TinyPET()
    module.setup()
    return module


@pytest.fixture(scope="module")
def slices(data) -> SinogramBatch:
    return data.train_set[list(range(len(data.train_set)))]


def gan(**changes) -> SinogramGAN:
    torch.manual_seed(0)
    networks = Generator(16, 16, (16, 8), 4, 8), PromptDiscriminator(16, 16, (8, 16), 8, seam=4)
    return SinogramGAN(*networks, **{"warmup_steps": 1, **changes})


def score(**changes) -> ScoreModel:
    torch.manual_seed(0)
    denoiser = Denoiser(1, 0, (8, 16), 1, 2, (False, False), 8)
    return ScoreModel(denoiser, **{"warmup_steps": 1, "sampling": ScoreSampling(steps=3), **changes})


def vae() -> VAEPrior:
    torch.manual_seed(0)
    stage1 = Autoencoder((8, 16), latent_channels=2)
    stage1.scaling.set_scale(100.0)
    stage1.set_latent_statistics(torch.tensor([0.3, -0.1]), torch.tensor([0.5, 2.0]))
    return VAEPrior(stage1, GEOMETRY)


def fit(folder, system, *watching, steps: int = 3, **options) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, callbacks=list(watching), max_steps=steps,
        max_epochs=-1, check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_model_summary=False,
        enable_progress_bar=False, enable_checkpointing=any(isinstance(w, ModelCheckpoint) for w in watching),
    )  # fmt: skip
    trainer.fit(system, datamodule=TinyPET(), **options)
    return trainer


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def own_rows(values: torch.Tensor, prompt: Prompt, name: str) -> torch.Tensor:
    return values[[row for row, other in enumerate(prompt.names()) if other == name]]


# ------------------------------------------------------------------------------------------- fitted Gaussians


@pytest.mark.parametrize(("rank", "diagonal"), [(None, False), (3, True), (3, False)])
def test_a_fitted_gaussian_has_the_moments_of_its_training_set(rank, diagonal):
    """For each prompt; truncated, the leading axes, and with noise the variance of every element all the same."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([4, 3, 2, 0.5, 0.3, 0.2])
    values = (torch.randn(40, 6, generator=generator) * spread) @ torch.randn(6, 10, generator=generator)
    values = values + torch.arange(10.0)
    prompt = Prompt.of([BRAIN, ABDOMEN] * 20)
    gaussian = PromptGaussian.fit(values.view(40, 2, 5), prompt, rank, diagonal)
    n = 1500
    for name in (BRAIN, ABDOMEN):
        own = own_rows(values, prompt, name)
        drawn = gaussian.draw(Prompt.of([name] * n), generators(n))
        assert drawn.shape == (n, 2, 5)
        drawn = drawn.flatten(1)
        std = own.std(0)
        assert ((drawn.mean(0) - own.mean(0)).abs() < 5 * std / math.sqrt(n)).all()
        wanted = torch.cov(own.T)
        if rank is not None:
            values_, vectors = torch.linalg.eigh(wanted)
            kept = (vectors[:, -rank:] * values_[-rank:]) @ vectors[:, -rank:].T
            wanted = kept + torch.diag((wanted - kept).diagonal()) if diagonal else kept
        # the standard error of a covariance is at most sqrt(2 / n) times the product of the standard deviations
        error = (torch.cov(drawn.T) - wanted).abs() / (std[:, None] * std)
        assert float(error.max()) < 5 * math.sqrt(2 / n)
    held = sum(value.numel() for value in gaussian.buffers())
    assert held <= values.numel() + 2 * len(gaussian.ranks) * 10


def test_one_slice_is_its_own_gaussian():
    gaussian = PromptGaussian.fit(torch.full((1, 4), 3.0), Prompt.of([BRAIN]), diagonal=True)
    assert torch.equal(gaussian.draw(Prompt.of([BRAIN] * 2), generators(2)), torch.full((2, 4), 3.0))


def test_pca_samples_stay_in_the_span_of_their_prompt(slices):
    pca = PCAGaussian.fit(slices, GEOMETRY, rank=4)
    assert pca.gaussian.ranks == [4, 4]
    for name in (BRAIN, ABDOMEN):
        own = own_rows(slices.sinogram, slices.prompt, name).flatten(1)
        made = pca.sample(Prompt.of([name] * 20), range(20)).sinogram.flatten(1) - own.mean(0)
        axes = torch.linalg.svd(own - own.mean(0), full_matrices=False)[2][:4]
        assert float((made - made @ axes.T @ axes).norm() / made.norm()) < 1e-4
        assert torch.linalg.matrix_rank(made, rtol=1e-4) == 4


def test_what_is_left_open_gives_the_training_mixture():
    known = [BRAIN] * 30 + ["FDG:chest"] * 10 + [ABDOMEN] * 10
    values = torch.tensor([{BRAIN: 0.0, "FDG:chest": 1.0, ABDOMEN: 2.0}[name] for name in known])[:, None]
    gaussian = PromptGaussian.fit(values, Prompt.of(known))
    n = 1000

    def shares(name: str) -> torch.Tensor:
        drawn = gaussian.draw(Prompt.of([name] * n), generators(n))
        return torch.bincount(drawn.flatten().round().long(), minlength=3) / n

    error = 5 * math.sqrt(0.25 / n)
    torch.testing.assert_close(shares("open:open"), torch.tensor([0.6, 0.2, 0.2]), rtol=0, atol=error)
    torch.testing.assert_close(shares("FDG:open"), torch.tensor([0.75, 0.25, 0.0]), rtol=0, atol=error)
    torch.testing.assert_close(shares("open:trunk"), torch.tensor([0.0, 0.5, 0.5]), rtol=0, atol=error)
    with pytest.raises(ValueError, match="No slice answers DOPA:open; there are FDG:brain, FDG:chest, PSMA:abdomen"):
        answers((2, 0), Prompt.of(known))


# ---------------------------------------------------------------------------------------------- VAE sampling


def test_the_gaussian_of_latents_has_the_moments_of_the_training_latents(data, slices):
    masked = data.augment(slices)
    fitted = vae().fit([masked])
    latents = fitted.autoencoder.encode_mean(fitted.autoencoder.scaling(masked.as_stack())).detach()
    n = 1000
    for name in (BRAIN, ABDOMEN):
        own = own_rows(latents, slices.prompt, name).flatten(1)
        drawn = fitted.gaussian.draw(Prompt.of([name] * n), generators(n)).flatten(1)
        assert ((drawn.mean(0) - own.mean(0)).abs() < 6 * own.std(0) / math.sqrt(n) + 1e-5).all()
        torch.testing.assert_close(drawn.std(0), own.std(0), rtol=6 * math.sqrt(0.5 / n), atol=1e-5)


def test_the_prior_is_standard_normal_whatever_the_prompt():
    prior = vae()
    made = prior.sample(Prompt.of([BRAIN, ABDOMEN]), [7, 7])
    torch.testing.assert_close(made.sinogram[0], made.sinogram[1])
    torch.testing.assert_close(made.stack[:, :1] + made.stack[:, 2:], made.sinogram)
    seen = []
    prior.autoencoder.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    prior.sample(Prompt.of([BRAIN] * 100), range(100))
    mean, std = (values.view(1, -1, 1, 1) for values in (prior.autoencoder.latent_mean, prior.autoencoder.latent_std))
    latents = (torch.cat(seen) - mean) / std
    assert latents.shape[1:] == prior.autoencoder.latent_shape(*GEOMETRY.sinogram_shape)
    assert abs(float(latents.mean())) < 5 / math.sqrt(latents.numel())
    assert abs(float(latents.var()) - 1) < 5 * math.sqrt(2 / latents.numel())


# ------------------------------------------------------------------------------------------- resampled slices


def test_resampled_slices_are_training_slices_of_their_prompt(slices):
    made = ResampledSlices(slices, GEOMETRY).sample(Prompt.of([BRAIN] * 40), range(40)).sinogram
    own = own_rows(slices.sinogram, slices.prompt, BRAIN)
    same = (made[:, None] == own[None]).flatten(2).all(2)
    assert same.any(1).all()
    assert int(same.any(0).sum()) > len(own) // 2


def test_turned_slices_are_training_slices_up_to_symmetry(slices):
    turned = ResampledSlices(slices, GEOMETRY, SymmetryAugmentation(GEOMETRY))
    made = turned.sample(Prompt.of([ABDOMEN] * 8), range(8)).sinogram
    own = own_rows(slices.sinogram, slices.prompt, ABDOMEN)
    both = torch.cat([own, symmetry.reflect_x(own)])
    orbit = torch.cat([symmetry.roll_views(both, views) for views in range(2 * GEOMETRY.n_views)])
    same = (made[:, None] == orbit[None]).flatten(2).all(2)
    assert same.any(1).all()
    assert not (made[:, None] == own[None]).flatten(2).all(2).all(1).any(), "some are turned"


# ------------------------------------------------------------------------------------------------------- GAN


def test_augmented_sinograms_are_those_of_the_symmetries(slices):
    augment = SinogramDiffAugment(rotation_deg=40, reflection=0.5, probability=0.8)
    sinogram = slices.sinogram
    drawn = augment.draw(GEOMETRY, generators(len(sinogram)))
    made = augment.apply(sinogram, GEOMETRY, drawn)
    change, cut = drawn
    views = (change.angle_rad * GEOMETRY.n_views / math.pi).round().long()
    assert len(views.unique()) > 3
    assert int(views.abs().max()) <= 40 / 180 * GEOMETRY.n_views
    wanted = sinogram * change.gain[:, None, None, None]
    wanted = torch.where(change.mirrored[:, None, None, None], symmetry.reflect_x(wanted), wanted)
    wanted = symmetry.translate(symmetry.roll_views(wanted, views), GEOMETRY, *change.translation_mm.unbind(1))
    for sample, (view, bin_, rows, columns) in enumerate(cut.tolist()):
        wanted[sample, :, view : view + rows, bin_ : bin_ + columns] = 0
    torch.testing.assert_close(made, wanted)
    assert (cut[:, 2] * cut[:, 3] > 0).any()
    nothing = SinogramDiffAugment(reflection=0, probability=0)
    assert torch.equal(nothing(sinogram, GEOMETRY, generators(len(sinogram))), sinogram)


def test_gradients_pass_through_the_augmentation(slices):
    """It is linear in the sinogram, so its derivative along any direction is its value there."""
    augment = SinogramDiffAugment()
    sinogram = slices.sinogram[:4].double().requires_grad_()
    drawn = augment.draw(GEOMETRY, generators(4))
    weights = torch.randn(sinogram.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((augment.apply(sinogram, GEOMETRY, drawn) * weights).sum(), sinogram)
    direction = torch.rand(sinogram.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along = (augment.apply(direction, GEOMETRY, drawn) * weights).sum()
    torch.testing.assert_close((gradient * direction).sum(), along)


def test_a_step_of_the_gan_moves_both_players_and_mixes_no_gradients(tmp_path, data, slices):
    system = gan()
    before = {name: value.detach().clone() for name, value in system.named_parameters()}
    fit(tmp_path, system, steps=2)
    for player in ("generator", "discriminator"):
        moved = [name for name, value in system.named_parameters() if not torch.equal(value, before[name])]
        assert any(name.startswith(player) and name.endswith("weight") for name in moved), player
    fake = system(torch.randn(4, system.generator.noise_size), Prompt(*(index[:4] for index in slices.prompt)))
    prompt = Prompt(*(index[:4] for index in slices.prompt))
    with torch.enable_grad():
        losses = system.losses(slices.sinogram[:4] / data.scale, fake, prompt, generators(4))
    for loss, player, other in (
        ("generator", system.generator, system.discriminator),
        ("discriminator", system.discriminator, system.generator),
    ):
        system.zero_grad()
        losses[loss].backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in other.parameters()), loss
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in player.parameters()), loss


def test_the_penalty_is_the_slope_at_real_sinograms(data, slices):
    system = gan(penalty=2.0, penalty_every=4, augmentation=SinogramDiffAugment(reflection=0, probability=0))
    system.geometry = GEOMETRY
    prompt = slices.prompt
    real = slices.sinogram / data.scale
    losses = system.losses(real, real.flip(0), prompt, generators(len(real)))
    direction = torch.randn(real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judge = system.discriminator.double()
    inputs = real.double().requires_grad_()
    (slope,) = torch.autograd.grad(judge(inputs, prompt).sum(), inputs)
    step = 1e-4 * direction
    difference = judge(real.double() + step, prompt).sum() - judge(real.double() - step, prompt).sum()
    torch.testing.assert_close((slope * direction).sum(), difference.detach() / 2e-4, rtol=1e-3, atol=1e-6)
    expected = 0.5 * 2.0 * 4 * slope.square().sum((1, 2, 3)).mean()
    assert float(losses["penalty"].detach()) == pytest.approx(float(expected), rel=1e-3)


def test_the_discriminator_sees_the_seam_and_the_prompt(slices):
    judge = gan().discriminator
    prompt = Prompt.of([BRAIN] * 4)
    with torch.no_grad():
        score_ = judge(slices.sinogram[:4], prompt)
        assert not torch.equal(score_, judge(slices.sinogram[:4], Prompt.of([ABDOMEN] * 4)))
        torch.testing.assert_close(score_, judge(slices.sinogram[[0, 1, 2, 3]], prompt))


# ---------------------------------------------------------------------------------------------- score-based


def gaussian_denoiser(mean: float, std: float):
    """E[x_0 | x_sigma] of N(mean, std^2)."""

    def denoise(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        sigma = sigma[:, None, None, None]
        return (std**2 * noisy + sigma**2 * mean) / (std**2 + sigma**2)

    return denoise


def test_for_gaussian_data_the_preconditioned_network_has_nothing_to_add():
    """D with F = 0 is the best denoiser of N(0, sigma_data^2), and the target of F has unit variance."""
    process, std = VarianceExploding(), 0.3
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.02, 0.3, 5.0, 80.0):
        skip, out, into, noise = process.scalings(torch.tensor(sigma, dtype=torch.float64), std)
        noisy = torch.randn(5, 1, 1, 1, dtype=torch.float64, generator=generator)
        exact = gaussian_denoiser(0.0, std)(noisy, torch.full((5,), sigma, dtype=torch.float64))
        torch.testing.assert_close(skip * noisy, exact)
        clean = std * torch.randn(200_000, dtype=torch.float64, generator=generator)
        noisy = clean + sigma * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
        assert float((into * noisy).var()) == pytest.approx(1, rel=0.02)
        assert float(((clean - skip * noisy) / out).var()) == pytest.approx(1, rel=0.02)
        assert float(noise) == pytest.approx(250 * math.log(sigma))


@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_the_exact_score_of_a_gaussian_gives_its_mean_and_standard_deviation(churn):
    process = VarianceExploding(sigma_min=0.002)
    made = sample_heun(gaussian_denoiser(0.7, 0.3), (1, 40, 40), generators(20), process, 100, churn)
    assert float(made.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(made.std()) == pytest.approx(0.3, rel=0.02)


def test_heun_is_of_second_order():
    """Without fresh noise a sample is mean + std / sqrt(std^2 + sigma_max^2) (start - mean)."""
    denoise, process = gaussian_denoiser(0.7, 0.3), VarianceExploding(0.01, 10.0)
    start = 10 * torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = 0.7 + 0.3 / math.sqrt(0.3**2 + 100) * (start - 0.7)
    # the last step, from sigma_min to 0, is Euler's at any number of steps
    last = math.sqrt(0.3**2 / (0.3**2 + 0.01**2))
    errors = [
        float((((sample_heun(denoise, (1, 4, 4), generators(1), process, n)[0] - 0.7) / last + 0.7) - wanted).norm())
        for n in (20, 40, 80)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)


def test_the_denoiser_is_called_twice_a_step_but_for_the_last():
    calls = []
    denoise = gaussian_denoiser(0, 1)
    sample_heun(
        lambda x, sigma: calls.append(float(sigma[0])) or denoise(x, sigma), (1, 2, 2), generators(1),
        VarianceExploding(), 5,
    )  # fmt: skip
    assert len(calls) == 9
    assert calls[0] == pytest.approx(80)
    assert calls[-1] == pytest.approx(0.01)


def test_the_score_model_measures_its_data_and_learns(tmp_path, data, slices):
    system = score(learning_rate=3e-3)
    fit(tmp_path, system, steps=1)
    values = slices.sinogram / data.scale
    assert float(system.data_mean) == pytest.approx(float(values.mean()), rel=1e-4)
    assert float(system.data_std) == pytest.approx(float(values.std()), rel=1e-4)
    sets = [generators(len(values)) for _ in range(2)]
    with torch.no_grad():
        before = system._loss(slices, sets[0], slices.prompt)
        fit(tmp_path, system, steps=60)
        after = system._loss(slices, sets[1], slices.prompt)
    assert after < 0.6 * before


# ------------------------------------------------------------------------------------------------ all of them


def everything(data: TinyPET, slices: SinogramBatch) -> dict:
    trained = {"gan": gan(), "score": score()}
    for system in trained.values():
        system.geometry = GEOMETRY
        system.scaling.set_scale(data.scale)
    trained["score"].data_std.fill_(0.3)
    torch.nn.init.normal_(trained["score"].denoiser.unet.conv_out.weight, std=0.1)
    torch.nn.init.normal_(trained["gan"].generator.blocks[0].noise.weight)
    prior = vae()
    return {
        **{name: system.eval() for name, system in trained.items()},
        "prior": prior,
        "latent gaussian": prior.fit([data.augment(slices)]),
        "pca": PCAGaussian.fit(slices, GEOMETRY),
        "resampled": ResampledSlices(slices, GEOMETRY),
        "turned": ResampledSlices(slices, GEOMETRY, SymmetryAugmentation(GEOMETRY, rotation="any")),
    }


NAMES = ("gan", "score", "prior", "latent gaussian", "pca", "resampled", "turned")


@pytest.mark.parametrize("name", NAMES)
def test_samples_depend_on_seed_and_prompt_alone(name, data, slices):
    system = everything(data, slices)[name]
    prompt, seeds = Prompt.of([BRAIN, ABDOMEN, "open:open", BRAIN]), [3, 1, 4, 1]
    whole = system.sample(prompt, seeds)
    assert whole.sinogram.shape == (4, 1, *GEOMETRY.sinogram_shape)
    assert whole.stack.shape == (4, 3, *GEOMETRY.sinogram_shape)
    assert torch.equal(whole.stack[:, 1:2], whole.sinogram)
    assert whole.geometry == GEOMETRY
    assert whole.seed.tolist() == seeds
    system.batch_size = 1
    singly = system.sample(Prompt(*(index.flip(0) for index in prompt)), seeds[::-1])
    top = float(whole.sinogram.abs().max())
    torch.testing.assert_close(singly.sinogram.flip(0), whole.sinogram, rtol=1e-4, atol=1e-4 * top)
    assert not torch.allclose(whole.sinogram[0], whole.sinogram[3], atol=1e-3 * top)
    with pytest.raises(ValueError, match="There are 4 prompts and 1 seeds"):
        system.sample(prompt, [0])


@pytest.mark.parametrize("name", ["gan", "score", "prior", "latent gaussian", "pca"])
def test_what_is_exported_makes_the_same(name, data, slices, tmp_path):
    system = everything(data, slices)[name]
    system.save_pretrained(tmp_path / "out")
    loaded = type(system).from_pretrained(tmp_path / "out")
    if name == "score":
        loaded.sampling = system.sampling
    prompt = Prompt.of([BRAIN, ABDOMEN])
    assert torch.equal(loaded.sample(prompt, [0, 1]).stack, system.sample(prompt, [0, 1]).stack)


@pytest.mark.parametrize("make", [gan, score])
def test_a_resumed_run_equals_an_uninterrupted_one_and_is_exported(make, tmp_path):
    """Interrupted in the middle of the second epoch of four batches."""
    systems = [make(), make()]
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=6)
    panels = callbacks.Panels(n_slices=2, n_generated=1)
    fit(tmp_path, systems[0], keep, panels, callbacks.ExportPretrained(), steps=7, ckpt_path=None)
    for parameter in systems[1].parameters():
        parameter.data.add_(0.1)
    checkpoint = tmp_path / "kept" / "epoch=1-step=6.ckpt"
    fit(tmp_path / "rest", systems[1], steps=7, ckpt_path=checkpoint, weights_only=True)
    for name, value in systems[0].state_dict().items():
        torch.testing.assert_close(systems[1].state_dict()[name], value, rtol=0, atol=0, msg=name)
    exported = type(systems[0]).from_pretrained(tmp_path / "pretrained")
    if make is score:
        exported.sampling = systems[0].sampling
    made, own = (system.eval().sample(Prompt.of([BRAIN]), [0]).sinogram for system in (exported, systems[0]))
    torch.testing.assert_close(made, own)
    card = (tmp_path / "pretrained" / "README.md").read_text()
    assert f"from allpet import {type(exported).__name__}" in card
    assert "A baseline for ALL-PET" in card


def test_costs_are_counted(data, slices):
    found = {name: sampling_cost(system) for name, system in everything(data, slices).items()}
    made = score()
    assert found["score"].calls == 5  # three levels: 2 * 3 - 1
    assert found["score"].flops_per_sample == 5 * found["score"].flops_per_call > 0
    assert found["score"].trainable == sum(value.numel() for value in made.denoiser.parameters())
    assert found["gan"].calls == 1
    assert found["gan"].flops_per_sample == found["gan"].flops_per_call
    assert found["prior"].trainable == 0
    assert found["latent gaussian"].flops_per_sample > found["prior"].flops_per_sample
    # mean and factor of two prompts of eight slices each, whose covariance has rank 7
    elements = math.prod(GEOMETRY.sinogram_shape)
    assert found["pca"].total == 2 * elements * 8
    assert found["pca"].flops_per_sample == 2 * 7 * elements
    assert found["resampled"].total == slices.sinogram.numel()
    assert found["resampled"].flops_per_sample == 0
    ldm = LatentDiffusion(
        vae().autoencoder, Denoiser(2, 0, (8, 16), 1, 1, (False, False), 8), sampling=Sampling(steps=4, guidance=1.0)
    )
    ldm.geometry = GEOMETRY
    cost = sampling_cost(ldm)
    assert cost.calls == 4
    assert cost.flops_per_sample > 4 * cost.flops_per_call > 0
    ldm.sampling = Sampling(steps=4)  # guided: twice as many
    assert sampling_cost(ldm).calls == 8
    frozen = sum(value.numel() for part in (ldm.autoencoder.parameters, ldm.autoencoder.buffers) for value in part())
    assert cost.total == cost.trainable + frozen
    for system in (everything(data, slices)["score"], AutoencoderSystem(Autoencoder((8, 16)))):
        assert training_flops(system, data.augment(slices)) > 0
        assert all(parameter.grad is None for parameter in system.parameters())


def test_of_a_penalty_its_share_of_the_steps_is_counted(data, slices):
    def flops(**changes):
        system = gan(**changes)
        system.geometry = GEOMETRY
        return training_flops(system, data.augment(slices))

    without, always, fourth = flops(penalty=0.0), flops(penalty_every=1), flops(penalty_every=4)
    assert always > 1.2 * without
    assert fourth - without == pytest.approx((always - without) / 4, rel=0.01)


def test_what_does_not_fit_is_refused(slices, tmp_path):
    other = SinogramGAN(Generator(8, 12, (16, 8), 4, 8), PromptDiscriminator(8, 12, (8, 16), 8))
    with pytest.raises(ValueError, match=r"makes \(8, 12\) views and bins, the data have \(16, 16\): set n_views"):
        fit(tmp_path, other)
    with pytest.raises(ValueError, match="set latent_channels to 1"):
        ScoreModel(Denoiser(2, 0, (8, 16), 1, 1, (False, False), 8))
    with pytest.raises(ValueError, match=r"reflection is 0\.7, but must lie between 0 and 0\.5"):
        SinogramDiffAugment(reflection=0.7)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max must hold"):
        VarianceExploding(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(RuntimeError, match="load the model with from_pretrained"):
        score().sample(Prompt.of([BRAIN]), [0])
    with pytest.raises(ValueError, match="rank is 0"):
        PCAGaussian.fit(slices, GEOMETRY, rank=0)
