"""The networks: what must hold for every weight."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from allpet import ParallelBeam, Radon
from allpet.batches import unmasked_stack
from allpet.consistency import helgason_ludwig_residual
from allpet.models.autoencoder import Autoencoder
from allpet.models.denoiser import Denoiser, RadonSandwich
from allpet.models.discriminator import PatchDiscriminator
from allpet.models.layers import DeviceAttention, close_seam, moebius_pad
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


def test_a_seam_leaves_alone_what_closes_and_closes_what_does_not():
    sinogram = torch.rand(2, 3, 10, 6)
    cover = moebius_pad(sinogram, 4)
    torch.testing.assert_close(close_seam(sinogram, cover[:, :, :4], cover[:, :, -4:]), sinogram)
    assert close_seam(sinogram, cover[:, :, :0], cover[:, :, :0]) is sinogram
    # A ramp over more than the half turn: either end goes on where the other stopped, 40 views away.
    ramp = torch.arange(48.0)[None, None, :, None].expand(1, 1, 48, 6)
    closed_ramp = close_seam(ramp[:, :, 4:44], ramp[:, :, :4], ramp[:, :, 44:])
    assert closed_ramp.diff(dim=2).abs().max() < 6
    assert (closed_ramp[:, :, 0] - closed_ramp[:, :, -1].flip(-1)).abs().max() < 6, "as between its own views"
    torch.testing.assert_close(closed_ramp[:, :, 4:-4], ramp[:, :, 8:40])
    few = close_seam(sinogram[:, :, :5], cover[:, :, :4], cover[:, :, -4:])
    torch.testing.assert_close(few[:, :, 2], sinogram[:, :, 2])


@pytest.mark.parametrize("shape", [(64, 80), (62, 77)])
def test_a_decoder_with_a_seam_closes_on_itself(shape):
    """Latents that are the same in all views and differ from left to right close nowhere; their sinograms do."""
    autoencoder = small_autoencoder(seam=8).eval()
    latent = torch.randn(8, 4, 1, autoencoder.latent_shape(*shape)[2])
    latent = latent.expand(-1, -1, autoencoder.latent_shape(*shape)[1], -1)
    with torch.no_grad():
        whole, part = (autoencoder._decode_raw(latent, shape, strip).full for strip in (False, True))
    torch.testing.assert_close(whole[:, :, 8:-8], part[:, :, 8:-8])
    # The network repeats itself every four views, and so many lie between these two.
    apart, near = (float((x[:, :, -4] - x[:, :, 0].flip(-1)).norm()) for x in (part, whole))
    assert near < 0.5 * apart


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


def test_few_bins_lower_the_order_of_the_range_layer():
    latent = torch.randn(2, *small_autoencoder().latent_shape(16, 20))
    decoded = [decode_with(order, latent) for order in (5, 20)]
    torch.testing.assert_close(*decoded)


def decode_with(order: int, latent: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return small_autoencoder(range_order=order).decode(latent, (16, 20)).full


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
    torch.testing.assert_close(decoded.stack, unmasked_stack(decoded.full))


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


def test_heads_must_divide_the_channels_that_attend():
    with pytest.raises(ValueError, match="head_channels is 32, but must divide the channels of every level with"):
        Denoiser(channels=(16, 32), attention=(True, False))
    Denoiser(channels=(16, 32), attention=(False, True))


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


@pytest.mark.parametrize("constraint", ["free", "projected", "weighted"])
def test_free_channels_fulfil_the_constraint_as_asked(constraint):
    autoencoder = small_autoencoder(constraint=constraint)
    autoencoder.set_full_weight(0.9)
    raw = 3 * torch.randn(4, *autoencoder.latent_shape(16, 20))
    p, f, n = autoencoder.decode_free(raw, (16, 20)).unbind(1)
    positive, full, negative = autoencoder._decode_raw(raw, (16, 20)).stack.unbind(1)
    violation = (positive + negative - full).abs().max()
    if constraint == "free":
        assert violation > 0.01
        torch.testing.assert_close(full, f)
        return
    assert violation <= 1e-6 * full.max()
    weight = {"projected": 2 / 3, "weighted": 0.9}[constraint]
    inside = (positive > 0) & (negative > 0)
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(full[inside], (weight * f + (1 - weight) * (p + n))[inside])
    # the nearest stack: what was added to f was taken in equal parts from p and n
    torch.testing.assert_close((p - positive)[inside], (n - negative)[inside], atol=1e-6, rtol=1e-4)


def test_heads_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="need three channels"):
        small_autoencoder(constraint="free", stack_channels=1)
    for padding in ("symmetric", "moebius"):
        with pytest.raises(ValueError, match="use patch=1"):
            small_autoencoder(padding=padding)
    with pytest.raises(ValueError, match="padding is 'round'"):
        small_autoencoder(padding="round")
    with pytest.raises(ValueError, match="nothing to be combined"):
        small_autoencoder().decode_free(torch.zeros(1, 4, 4, 4), (16, 16))
    with pytest.raises(ValueError, match="a multiple of 4"):
        closed("moebius").encode(torch.rand(1, 3, 18, 20))


def closed(padding: str) -> Autoencoder:
    return small_autoencoder(channels=(8, 16, 16), patch=1, padding=padding)


def shifted(latent: torch.Tensor, rows: int) -> torch.Tensor:
    return extend(latent).roll(rows, -2)[..., : latent.shape[-2], :]


@pytest.mark.parametrize(("padding", "exact"), [("symmetric", True), ("moebius", False), ("zero", False)])
def test_symmetric_layers_know_no_first_view(padding, exact):
    autoencoder = closed(padding)
    stack = torch.rand(2, 3, 16, 20)
    mean = autoencoder.encode(stack).mean
    turned = autoencoder.encode(shifted(stack, autoencoder.factor)).mean
    half = autoencoder.encode(stack.flip(-1)).mean
    torch.testing.assert_close(shifted(mean, 3 * 4 + 4), shifted(mean, 4 * 4))
    size = mean.std()
    assert bool((turned - shifted(mean, 1)).abs().max() < 1e-4 * size) is exact
    assert bool((half - mean.flip(-1)).abs().max() < 1e-4 * size) is exact
    decoded = autoencoder.decode(mean, (16, 20)).full
    turned = autoencoder.decode(shifted(mean, 1), (16, 20)).full
    assert bool((turned - shifted(decoded, autoencoder.factor)).abs().max() < 1e-4 * decoded.std()) is exact


@pytest.mark.parametrize("seam_rows", [0, 1])
def test_the_image_domain_projects_what_it_backprojected(seam_rows):
    """Between its matrices lie the geometry's own: noise keeps its size, and a disc comes back as its sinogram."""
    sandwich = RadonSandwich(4, 4, 8, 16, seam_rows)
    views, bins = 16, 20
    filtered, _, projection = sandwich._geometry(views + 2 * seam_rows, bins, torch.device("cpu"))
    radon = Radon(ParallelBeam(views, bins, 1.0, bins, 1.0))
    y, x = torch.meshgrid(*[torch.arange(bins) - (bins - 1) / 2] * 2, indexing="ij")
    disc = ((x - 2) ** 2 + y**2 < 25).float()[None, None]
    sinogram = radon.project(disc).flatten()
    torch.testing.assert_close(projection @ disc.flatten() / projection.norm(), sinogram / radon_norm(radon))
    back = filtered @ sinogram
    assert torch.corrcoef(torch.stack([back, disc.flatten()]))[0, 1] > 0.9
    noise = torch.randn(2000, 4, views + 2 * seam_rows, bins).repeat(1, 2, 1, 1)
    assert sandwich.backproject(noise).std() == pytest.approx(1, rel=0.02)


def radon_norm(radon: Radon) -> torch.Tensor:
    size = radon.geometry.image_size
    return radon.project(torch.eye(size**2).view(-1, 1, size, size)).norm()


def test_a_denoiser_in_the_image_domain_sees_all_views_at_once():
    """One layer of convolutions reaches the views in which a point of the image lies, wherever they are."""
    torch.manual_seed(0)
    prompt = Prompt.of(["FDG:brain"])
    reach = {}
    for domain in ("sinogram", "image"):
        denoiser = Denoiser(4, channels=(8,), attention=(False,), layers_per_block=1, head_channels=8, domain=domain)
        for parameter in denoiser.parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
        latent = torch.randn(1, 4, 32, 20, requires_grad=True)
        denoiser(latent, torch.tensor([500]), prompt)[0, :, 2].sum().backward()
        reach[domain] = latent.grad.abs().sum(dim=(0, 1, 3))
    far = {domain: float(grad[12:].sum() / grad.sum()) for domain, grad in reach.items()}
    assert far["image"] > 1.3 * far["sinogram"]
