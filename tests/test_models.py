"""The networks: what must hold for every weight."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from allpet import ParallelBeam
from allpet.consistency import helgason_ludwig_residual
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser
from allpet.models.discriminator import PatchDiscriminator
from allpet.models.layers import DeviceAttention, moebius_pad
from allpet.prompts import Prompt
from allpet.symmetry import extend


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small_autoencoder(**changes) -> Autoencoder:
    return Autoencoder(**{"channels": (8, 16), "latent_channels": 4, "patch": 2, **changes})


def test_padding_continues_the_sinogram_on_its_double_cover():
    sinogram = torch.rand(2, 3, 10, 6)
    cover = extend(sinogram)
    padded = moebius_pad(sinogram, 4)
    torch.testing.assert_close(padded[:, :, 4:], cover[:, :, :14])
    torch.testing.assert_close(padded[:, :, :4], cover[:, :, -4:])
    assert moebius_pad(sinogram, 0) is sinogram


@pytest.mark.parametrize("shape", [(16, 20), (18, 25), (64, 80), (7, 9)])
@pytest.mark.parametrize("seam", [0, 4])
def test_the_constraint_holds_for_every_latent(shape, seam):
    autoencoder = small_autoencoder(seam=seam)
    latent = 3 * torch.randn(4, *autoencoder.latent_shape(*shape))
    stack = autoencoder.decode(latent, shape).stack
    assert stack.shape == (4, 3, *shape)
    positive, full, negative = stack.unbind(1)
    assert (positive + negative - full).abs().max() <= 1e-6 * full.max()
    assert stack.min() >= 0


@pytest.mark.parametrize("shape", [(64, 80), (60, 50)])
def test_the_range_layer_makes_latents_far_more_consistent(shape):
    geometry = ParallelBeam(*shape, 5.0, 64, 5.0)
    latent = 3 * torch.randn(4, *small_autoencoder().latent_shape(*shape))
    residual = {}
    for order in (None, 10):
        stack = small_autoencoder(range_order=order).decode(latent, shape).stack
        positive, full, negative = stack.unbind(1)
        assert (positive + negative - full).abs().max() <= 1e-6 * full.max()
        residual[order] = helgason_ludwig_residual(full[:, None], geometry, 10).median()
    assert residual[10] < 0.3 * residual[None]  # an untrained decoder fills the corners; what turned negative is cut


@pytest.mark.parametrize("shape", [(16, 20), (18, 25)])
@pytest.mark.parametrize("seam", [0, 4])
def test_latent_shape_is_what_the_encoder_gives(shape, seam):
    autoencoder = small_autoencoder(seam=seam)
    stack = torch.rand(2, 3, *shape)
    assert autoencoder.encode(stack).mean.shape[1:] == autoencoder.latent_shape(*shape)


def test_latents_are_standardised_by_the_stored_statistics_and_back():
    autoencoder = small_autoencoder().eval()
    stack = torch.rand(16, 3, 32, 40)
    raw = autoencoder.encode(stack).mean
    autoencoder.set_latent_statistics(raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3)))
    latent = autoencoder.encode_mean(stack)
    torch.testing.assert_close(latent.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latent.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(autoencoder.decode(latent, (32, 40)).stack, autoencoder(stack)[0].stack)


def test_broken_latent_statistics_are_refused():
    with pytest.raises(ValueError, match="must be finite with std > 0"):
        small_autoencoder().set_latent_statistics(torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="must be finite"):
        small_autoencoder().set_latent_statistics(torch.full((4,), float("nan")), torch.ones(4))


def test_a_seam_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="seam is 3 views, but must be a multiple of 4"):
        small_autoencoder(seam=3)


def test_one_channel_looks_at_the_full_sinogram_alone():
    autoencoder = small_autoencoder(stack_channels=1).eval()
    stack = torch.rand(2, 3, 16, 20)
    other_masks = torch.cat([stack[:, 2:], stack[:, 1:2], stack[:, :1]], dim=1)
    torch.testing.assert_close(autoencoder.encode(stack).mean, autoencoder.encode(other_masks).mean)
    decoded = autoencoder(stack)[0]
    torch.testing.assert_close(decoded.stack[:, 0], decoded.stack[:, 1])


def test_a_fresh_denoiser_predicts_zero_and_learns_to_obey():
    denoiser = Denoiser(channels=(16, 32), layers_per_block=1, attention=(False, True), head_channels=8, label_size=3)
    latent, time = torch.randn(2, 4, 9, 7), torch.tensor([10, 900])
    prompt = Prompt.of(["FDG:brain", "DOPA:brain"])
    assert denoiser(latent, time, prompt).abs().max() == 0
    with torch.no_grad():
        torch.nn.init.normal_(denoiser.unet.conv_out.weight)
    answer = denoiser(latent, time, prompt)
    assert answer.shape == latent.shape
    for other in ("PSMA:brain", "FDG:chest", "open:brain", "FDG:open"):
        changed = denoiser(latent, time, Prompt.of([other, "DOPA:brain"]))
        assert not torch.allclose(changed[0], answer[0])
        torch.testing.assert_close(changed[1], answer[1])
    torch.testing.assert_close(denoiser(latent, time, prompt, label=torch.zeros(2, 3)), answer)
    assert not torch.allclose(denoiser(latent, time, prompt, label=torch.ones(2, 3)), answer)


def test_folding_keeps_shape_and_mixes_only_at_coarser_positions():
    denoiser = Denoiser(channels=(16, 32), layers_per_block=1, patch=2, attention=(True, True), head_channels=8)
    torch.nn.init.normal_(denoiser.unet.conv_out.weight)
    latent, time, prompt = torch.randn(1, 4, 9, 10), torch.tensor([5]), Prompt.of(["FDG:brain"])
    answer = denoiser(latent, time, prompt)
    assert answer.shape == latent.shape
    assert not torch.allclose(denoiser(latent + 0.1 * torch.randn_like(latent), time, prompt), answer)


def test_attention_is_the_same_function_on_every_device():
    attention = Attention(16, heads=2, dim_head=8)
    hidden = torch.randn(2, 12, 16)
    own = DeviceAttention()
    torch.testing.assert_close(own(attention, hidden), own.fused(attention, hidden), atol=1e-5, rtol=1e-4)


def test_a_condition_left_out_means_zeros():
    denoiser = Denoiser(channels=(16,), attention=(False,), condition_channels=1, head_channels=8)
    torch.nn.init.normal_(denoiser.unet.conv_out.weight)
    latent, time, prompt = torch.randn(1, 4, 8, 8), torch.tensor([5]), Prompt.of(["FDG:brain"])
    answer = denoiser(latent, time, prompt)
    torch.testing.assert_close(denoiser(latent, time, prompt, torch.zeros(1, 1, 8, 8)), answer)
    assert not torch.allclose(denoiser(latent, time, prompt, torch.ones(1, 1, 8, 8)), answer)


def test_each_level_needs_to_know_whether_it_attends():
    with pytest.raises(ValueError, match="attention has 3 levels and channels 2"):
        Denoiser(channels=(16, 32))


def test_a_patch_discriminator_scores_patches_apart():
    discriminator = PatchDiscriminator(channels=8, layers=2)
    stack = torch.rand(1, 3, 64, 64)
    changed = stack.clone()
    changed[..., :8, :8] += 1
    difference = (discriminator(stack) - discriminator(changed)).abs()
    assert difference[..., 0, 0] > 10 * difference[..., -1, -1]
