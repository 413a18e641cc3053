"""Reconstruction: exact where the data are, statistical where they are noisy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from allpet import ParallelBeam, Radon, fbp, mlem, osem
from allpet.reconstruction import ramp_filter

GEOMETRY = ParallelBeam(n_views=180, n_bins=128, bin_mm=2.34, image_size=128, pixel_mm=2.34)
COUNTS = 1e6


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLPET_CACHE", str(tmp_path_factory.getbasetemp() / "radon-cache"))
        yield


@pytest.fixture(scope="module")
def radon():
    return Radon(GEOMETRY)


def ellipse(cx, cy, a, b, turn=0.0, geometry=GEOMETRY):
    x, y = geometry.pixel_centers
    c, s = math.cos(turn), math.sin(turn)
    u, v = (x - cx) * c + (y - cy) * s, (y - cy) * c - (x - cx) * s
    return ((u / a) ** 2 + (v / b) ** 2 <= 1).float()[None, None]


@pytest.fixture(scope="module")
def body():
    return ellipse(0, 0, 110, 85)


@pytest.fixture(scope="module")
def activity(body):
    hot = ellipse(40, 30, 25, 20, 0.4) + ellipse(-50, -10, 20, 30)
    return body + hot - 0.6 * ellipse(10, -40, 25, 20)


@pytest.fixture(scope="module")
def scan(radon, body, activity):
    """Counts of 65 % trues, 15 % scatter and 20 % randoms through 0.0096 /mm of water, and what explains them."""
    ideal = radon.project(activity)
    trues = torch.exp(-radon.project(0.0096 * body)) * ideal
    multiplicative = torch.exp(-radon.project(0.0096 * body)) * (0.65 * COUNTS / trues.sum())
    scatter = F.avg_pool2d(trues, (1, 31), 1, (0, 15))
    additive = 0.15 * COUNTS * scatter / scatter.sum() + 0.2 * COUNTS / trues.numel()
    generator = torch.Generator().manual_seed(1)
    return torch.poisson(multiplicative * ideal + additive, generator=generator), multiplicative, additive


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- filtered backprojection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["ramp", "hann"])
def test_fbp_returns_activity(radon, body, activity, window):
    reconstructed = fbp(radon, radon.project(activity), window)
    assert relative(reconstructed, activity) < {"ramp": 0.09, "hann": 0.15}[window]
    inside = ellipse(0, 0, 100, 78) > 0
    assert reconstructed[inside].mean() / activity[inside].mean() == pytest.approx(1, abs=1e-3)
    assert reconstructed.sum() / activity.sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "geometry",
    [ParallelBeam(90, 200, 1.5, 128, 2.34), ParallelBeam(120, 91, 4.0, 150, 2.5), ParallelBeam(128, 96, 3.2, 96, 3.2)],
    ids=["fine bins", "fine pixels", "coarse"],
)
def test_fbp_has_the_same_scale_in_every_geometry(geometry):
    radon = Radon(geometry, "strip")
    disc = 5 * ellipse(10, -20, 80, 80, geometry=geometry)
    inside = ellipse(10, -20, 60, 60, geometry=geometry) > 0
    assert fbp(radon, radon.project(disc))[inside].mean() == pytest.approx(5, rel=5e-3)


def test_fbp_agrees_with_scikit_image(radon, activity):
    transform = pytest.importorskip("skimage.transform")
    sinogram = radon.project(activity)
    # scikit-image: pixel units, angles in degrees, and its axis through the centre of pixel n // 2, half a pixel on.
    centred = GEOMETRY.bin_centers / GEOMETRY.bin_mm + 64
    s = centred - 0.5 * (GEOMETRY.angles.cos() - GEOMETRY.angles.sin())[:, None]
    shifted = np.stack([np.interp(np.arange(128), row, values) for row, values in zip(s, sinogram[0, 0], strict=True)])
    theirs = transform.iradon(shifted.T / GEOMETRY.bin_mm, np.rad2deg(GEOMETRY.angles.numpy()), filter_name="hann")
    ours = fbp(radon, sinogram, "hann")[0, 0]
    assert relative(ours, torch.from_numpy(theirs).float()) < 0.05


def test_fbp_of_interleaved_views_keeps_the_scale(radon, activity):
    sinogram = radon.project(activity)
    few = radon.subset(1, 3)
    inside = ellipse(0, 0, 100, 78) > 0
    reconstructed = fbp(few, sinogram[:, :, 1::3])
    assert reconstructed[inside].mean() == pytest.approx(activity[inside].mean().item(), rel=5e-3)


def test_a_lower_cutoff_is_smoother_and_noise_smaller(radon, scan, activity):
    counts, multiplicative, additive = scan
    sinogram = (counts - additive) / multiplicative
    errors = [relative(fbp(radon, sinogram, w, c), activity) for w, c in (("ramp", 1.0), ("hann", 1.0), ("hann", 0.6))]
    assert errors[0] > 2 * errors[1] > 2 * errors[2] * 0.9
    assert errors[0] == pytest.approx(0.82, abs=0.1)
    assert errors[1] == pytest.approx(0.32, abs=0.05)


def test_fbp_is_linear_and_differentiable(radon):
    sinogram = torch.rand(1, 1, 180, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sinogram.requires_grad_()
    (fbp(radon, sinogram) * image).sum().backward()
    assert (sinogram.grad * sinogram).sum().item() == pytest.approx((fbp(radon, sinogram) * image).sum().item())


def test_the_ramp_keeps_the_mean():
    """|f| sampled in frequency would be 0 at 0; the band-limited kernel is not quite."""
    response = ramp_filter(256, 2.0, "ramp")
    frequency = torch.fft.rfftfreq(256, 2.0, dtype=torch.float64)
    assert torch.allclose(response[8:], frequency[8:], rtol=2e-2)
    assert 0 < response[0] < frequency[1] / 2
    assert ramp_filter(256, 2.0, "hann", 0.5)[65:].abs().max() == 0


@pytest.mark.parametrize(
    ("window", "cutoff", "words"), [("shepp", 1.0, "no window 'shepp'"), ("hann", 0.0, "cutoff is 0")]
)
def test_unknown_filters_are_refused(radon, window, cutoff, words):
    with pytest.raises(ValueError, match=words):
        fbp(radon, torch.zeros(1, 1, 180, 128), window, cutoff)


# --- iterative --------------------------------------------------------------------------------------------------------


def test_osem_reaches_the_accuracy_that_the_counts_allow(radon, scan, activity):
    counts, multiplicative, additive = scan
    error = relative(osem(radon, counts, 2, 10, multiplicative, additive), activity)
    assert error <= 0.18
    ignoring = osem(radon, counts, 2, 10, multiplicative.mean())
    assert relative(ignoring, activity) > 2 * error


def test_osem_is_mlem_in_a_fraction_of_the_iterations(radon, scan):
    counts, multiplicative, additive = scan
    fast, slow = osem(radon, counts, 2, 10, multiplicative, additive), mlem(radon, counts, 20, multiplicative, additive)
    assert relative(fast, slow) < 0.05


def test_every_mlem_iterate_explains_all_counts(radon, scan, activity):
    _, multiplicative, _ = scan
    counts = torch.poisson(multiplicative * radon.project(activity), generator=torch.Generator().manual_seed(2))
    for iterations in (1, 3):
        image = mlem(radon, counts, iterations, multiplicative)
        explained = (multiplicative * radon.project(image)).double().sum()
        assert explained / counts.double().sum() == pytest.approx(1, abs=1e-5)


def test_mlem_increases_the_likelihood(radon, scan):
    counts, multiplicative, additive = scan
    likelihood = []
    for iterations in (1, 2, 4, 8):
        image = mlem(radon, counts, iterations, multiplicative, additive)
        expected = multiplicative * radon.project(image) + additive
        likelihood.append((counts * expected.log() - expected).double().sum())
    assert torch.stack(likelihood).diff().min() > 0


def test_a_batch_is_reconstructed_slice_by_slice(radon, scan):
    counts, multiplicative, additive = scan
    batch = torch.cat([counts, 2 * counts, counts.flip(-1)])
    factors = torch.cat([multiplicative, multiplicative, multiplicative.flip(-1)])
    together = osem(radon, batch, 1, 10, factors, additive)
    one_by_one = torch.cat([osem(radon, batch[k : k + 1], 1, 10, factors[k : k + 1], additive) for k in range(3)])
    assert relative(together, one_by_one) < 1e-5
    shared = osem(radon, batch, 1, 10, multiplicative, additive)
    assert relative(shared[:2], together[:2]) < 1e-5


def test_the_resolution_model_sharpens(radon, activity):
    """Data blurred by a known width, without noise: knowing it gives the better image."""
    sigma = 9.0 / GEOMETRY.pixel_mm / 2.3548
    x = torch.arange(-10, 11) / sigma
    kernel = torch.exp(-0.5 * x**2) / torch.exp(-0.5 * x**2).sum()
    blurred = F.conv2d(
        F.conv2d(activity, kernel.view(1, 1, -1, 1), padding=(10, 0)), kernel.view(1, 1, 1, -1), padding=(0, 10)
    )
    counts = radon.project(blurred)
    known, unknown = (relative(osem(radon, counts, 12, 10, psf_mm=width), activity) for width in (9.0, 0.0))
    assert known < 0.93 * unknown
    assert mlem(radon, counts, 1, psf_mm=9.0).min() >= 0


def test_unmeasured_bins_and_unseen_pixels_stay_finite(activity):
    radon = Radon(ParallelBeam(60, 80, 2.34, 128, 2.34))
    counts = radon.project(activity)
    measured = torch.zeros_like(counts)
    measured[:, :, 0, :30] = 1  # a single upright view sees only columns on the left
    image = osem(radon, counts * measured, 2, 6, measured)
    assert image.isfinite().all()
    assert image[..., 30:50].min() > 0
    assert image[..., 64:].abs().max() == 0
    assert image[..., :20].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subsets": 7}, "180 views cannot be split into 7 equal subsets"),
        ({"iterations": 0}, "iterations is 0"),
        ({"counts": -torch.ones(1, 1, 180, 128)}, "counts has negative values"),
        ({"multiplicative": -1.0}, "multiplicative has negative values"),
        ({"additive": torch.tensor(-1.0)}, "additive has negative values"),
        ({"psf_mm": -1.0}, "must not be negative"),
    ],
)
def test_impossible_terms_are_refused(radon, change, words):
    arguments = {"counts": torch.ones(1, 1, 180, 128), "iterations": 1, "subsets": 10, **change}
    with pytest.raises(ValueError, match=words):
        osem(radon, **arguments)
