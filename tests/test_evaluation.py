"""The evaluation suite's parts, on distributions and sinograms whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from allpet import Autoencoder, ParallelBeam, Radon, fbp, symmetry
from allpet.evaluation import copies, denoising_utility, distances, features, spectra
from allpet.metrics import radial_power_spectrum
from allpet.randomness import keyed_generator

GEOMETRY = ParallelBeam(n_views=24, n_bins=32, bin_mm=8.0, image_size=32, pixel_mm=8.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(n: int, d: int, *key: int | str) -> Tensor:
    return torch.randn(n, d, generator=keyed_generator(*key))


def discs(n: int, *key: int | str, geometry: ParallelBeam = GEOMETRY) -> Tensor:
    """Sinograms of an off-centre disc with three hot spots, no two alike, ``(n, 1, views, bins)``."""
    x, y = geometry.pixel_centers
    unit = geometry.field_of_view_mm
    images = []
    for i in range(n):
        draw = torch.rand(12, generator=keyed_generator(*key, i)).tolist()
        image = ((x - 0.2 * unit * draw[0]) ** 2 + (1 + draw[1]) * y**2 < (0.6 * unit) ** 2).float()
        for j in range(3):
            a, b = (unit * (0.8 * value - 0.4) for value in draw[2 + 3 * j : 4 + 3 * j])
            image = image + 3 * draw[4 + 3 * j] * ((x - a) ** 2 + (y - b) ** 2 < (0.15 * unit) ** 2)
        images.append(image)
    return Radon(geometry).project(torch.stack(images)[:, None])


def test_kernel_distances_are_unbiased_and_grow_with_the_shift() -> None:
    for distance in (distances.polynomial_mmd, distances.gaussian_mmd):
        same = torch.tensor([distance(normal(60, 8, i, "a"), normal(40, 8, i, "b")) for i in range(40)])
        assert abs(same.mean()) < 3 * same.std() / 40**0.5
        assert same.min() < 0  # as it must be where the mean is zero
        shifted = [distance(normal(60, 8, 0, "a"), normal(40, 8, 0, "b") + shift) for shift in (0.5, 1.0, 2.0)]
        assert 3 * same.std() < shifted[0] < shifted[1] < shifted[2]


def test_kernel_distance_is_torchmetrics_for_equal_sizes_and_knows_its_error() -> None:
    real, fake = normal(50, 6, "real"), normal(50, 6, "fake") * 1.3
    found = distances.kernel_distance(real, fake)
    assert found.value == pytest.approx(float(poly_mmd(real.double(), fake.double())), rel=1e-6)
    assert found.low < found.value < found.high
    assert found == distances.kernel_distance(real, fake)
    many = torch.tensor(
        [distances.polynomial_mmd(normal(50, 6, i, "real"), normal(50, 6, i, "fake") * 1.3) for i in range(60)]
    )
    assert found.std == pytest.approx(float(many.std()), rel=0.6)
    assert abs(found.value - many.mean()) < 3 * found.std


def test_sliced_wasserstein_of_a_shift_is_the_shift() -> None:
    real = normal(80, 5, "real")
    shift = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0])
    found = distances.sliced_wasserstein(real, real + shift, projections=4000)
    assert found == pytest.approx(5 / math.sqrt(5), rel=0.03)
    assert distances.sliced_wasserstein(real, real.flip(0)) == 0
    # Three copies of each sample are the same distribution, and what fits no grid has its exact answer.
    assert distances.sliced_wasserstein(real, real.repeat(3, 1)) < 1e-6
    line = distances.sliced_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0], [1.0]]))
    assert line == pytest.approx(math.sqrt(1 / 6))
    equal = [distances.sliced_wasserstein(normal(n, 5, "a"), normal(n, 5, "b")) for n in (20, 200, 2000)]
    assert equal[0] > equal[1] > equal[2]


def test_prdc_of_equal_disjoint_and_collapsed_sets() -> None:
    real = normal(100, 4, "real")
    assert distances.prdc(real, real) == pytest.approx((1, 1, 1.2, 1), abs=0.01)  # each counts itself besides k
    assert distances.prdc(real, real + 100) == (0, 0, 0, 0)
    found = distances.prdc(real, normal(100, 4, "fake"))
    assert min(found) > 0.75
    assert found.density == pytest.approx(1, abs=0.25)
    collapsed = real[:1] + 1e-3 * normal(100, 4, "spread")
    one_mode = distances.prdc(real, collapsed)
    assert one_mode.precision == 1
    assert one_mode.recall < 0.05
    assert one_mode.coverage < 0.2
    with pytest.raises(ValueError, match="at least 6 samples; got 100 and 5"):
        distances.prdc(real, real[:5])


def test_features_are_deterministic_and_sample_by_sample() -> None:
    sinogram = discs(6, "features")
    convolutions = features.RandomConvolutions.of(sinogram)
    torch.manual_seed(0)
    autoencoder = Autoencoder((8, 16), seam=2)
    for extract in (convolutions, features.EncoderFeatures(autoencoder)):
        found = extract(sinogram)
        torch.testing.assert_close(extract(sinogram[2:4]), found[2:4])
        assert found.isfinite().all()
        real, other = features.standardise(found, found[:2])
        scores = real.sinh()
        torch.testing.assert_close(scores.mean(0), torch.zeros(real.shape[1]), rtol=0, atol=1e-3)
        assert scores.std(0).max() < 1.001  # 1, or less where a feature hardly varies
        assert scores.std(0).median() > 0.99
        torch.testing.assert_close(real[:2], other)
    assert found.shape == (6, 2 * 4 * 16)
    # Rectifiers without offsets: twice the activity is twice the features, so totals count.
    torch.testing.assert_close(convolutions(2 * sinogram), 2 * convolutions(sinogram))
    assert not torch.allclose(features.RandomConvolutions.of(sinogram, seed=1)(sinogram), convolutions(sinogram))


def test_random_convolutions_see_no_seam() -> None:
    """Of a disc in the centre every view is the same, so are all blocks of views."""
    x, y = GEOMETRY.pixel_centers
    sinogram = Radon(GEOMETRY).project((torch.hypot(x, y) < 80).float()[None, None]).mean(2, keepdim=True)
    sinogram = ((sinogram + sinogram.flip(-1)) / 2).expand(1, 1, 24, 32)
    found = features.RandomConvolutions.of(sinogram)(sinogram)[0].view(3, 2, 8, 4, 4)
    torch.testing.assert_close(found, found[:, :, :, :1].expand_as(found), rtol=1e-4, atol=1e-5)


def test_pooling_gives_means_and_standard_deviations() -> None:
    maps = normal(1, 2 * 10 * 12, "maps").view(1, 2, 10, 12) + 1000
    found = features.pool(maps, 2).view(2, 2, 2, 2)
    block = maps[0, 1, :5, 6:]
    assert found[0, 1, 0, 1] == pytest.approx(float(block.mean()))
    assert found[1, 1, 0, 1] == pytest.approx(float(block.std(correction=0)), rel=1e-4)


def test_spectra_of_a_known_blur() -> None:
    sinogram = discs(8, "spectra")
    fwhm = 24.0
    blurred = symmetry.blur(sinogram, GEOMETRY, fwhm)
    sigma = fwhm / math.sqrt(8 * math.log(2))

    def squared_transfer(period: float) -> float:
        return math.exp(-2 * 2 * (math.pi * sigma / period) ** 2)

    radon = Radon(GEOMETRY)
    images = [radial_power_spectrum(fbp(radon, s), GEOMETRY.pixel_mm) for s in (sinogram, blurred)]
    bins = [spectra.bin_spectrum(s, GEOMETRY) for s in (sinogram, blurred)]
    for (frequency, first), (_, second) in (images, bins):
        real, fake = spectra.typical(first), spectra.typical(second)
        for period in (60.0, 40.0):
            found = spectra.ratio_at(frequency, real, fake, 1 / period)
            assert found == pytest.approx(squared_transfer(period), rel=0.1)
            worst = spectra.worst_factor(frequency, real, fake, 1 / period)
            assert worst == pytest.approx(1 / found, rel=0.35)
    with pytest.raises(ValueError, match="the spectrum reaches from"):
        spectra.ratio_at(frequency, real, fake, 1.0)
    # One slice in eight a hundred times as bright changes little.
    outlier = first * torch.tensor([100.0] + 7 * [1.0])[:, None]
    assert spectra.ratio_at(frequency, real, spectra.typical(outlier), 1 / 60) == pytest.approx(
        100 ** (1 / 8), rel=1e-3
    )


def test_angular_harmonics() -> None:
    angles = GEOMETRY.angles[:, None]
    p = (4 * angles).cos().expand(24, 32)[None, None].float()  # even harmonics are even in s
    harmonic, power = spectra.angular_spectrum(p)
    assert harmonic[power[0].argmax()] == 4
    assert power[0].sum() == pytest.approx(float(power[0].max()), rel=1e-5)
    assert spectra.band_ratio(harmonic, power[0], 3 * power[0], 4) == pytest.approx(3)


def test_activity_and_its_histogram() -> None:
    x, y = GEOMETRY.pixel_centers
    image = 2 * (torch.hypot(x, y) < 80).float()[None, None]
    total = spectra.total_activity(Radon(GEOMETRY).project(image), GEOMETRY)
    torch.testing.assert_close(total, image.sum((1, 2, 3)) * GEOMETRY.pixel_mm**2, rtol=0.01, atol=0)
    shares = spectra.activity_histogram(torch.cat([image, image + 0.5, 9 * image]), peak=10.0)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    assert spectra.histogram_distance(shares[0], shares[1], 10.0) == pytest.approx(0.5, abs=0.03)
    inside = float((image > 0).float().mean())
    assert spectra.histogram_distance(shares[0], shares[2], 10.0) == pytest.approx(8 * inside, rel=0.01)


def test_copies_are_found_through_every_symmetry() -> None:
    training, fresh = discs(20, "training"), discs(12, "held out")
    made = [
        training[3:4],
        symmetry.roll_views(training[5:6], 31),
        symmetry.reflect_x(training[8:9]),
        symmetry.roll_views(symmetry.reflect_y(training[11:12]), 7) * 3.7,
        symmetry.translate(training[13:14], GEOMETRY, 9.0, -14.0),
    ]
    found = copies.nearest_modulo_symmetry(torch.cat(made), training, GEOMETRY)
    assert found.first.tolist() == [3, 5, 8, 11, 13]
    assert found.d1[:4].max() < 1e-3
    assert found.d1[4] < 0.02  # moved by parts of a bin
    assert found.ratio.max() < 0.2
    assert found.turn[1] == 31
    assert found.mirrored.tolist() == [False, False, True, True, False]
    fitted = copies.aligned(found, training)
    torch.testing.assert_close(3.7 * fitted[3], made[3][0], rtol=1e-4, atol=1e-2)
    held_out = copies.nearest_modulo_symmetry(fresh, training, GEOMETRY)
    assert held_out.d1.min() > 0.05
    rate = copies.copy_rate(found, held_out)
    assert rate.calibrated == rate.third == rate.near == 1
    own = copies.copy_rate(held_out, held_out)
    assert own.third == 0
    assert own.calibrated == own.near == pytest.approx(1 / 12)  # the one below the percentile


def test_distances_modulo_symmetry_are_those_of_every_turn_tried() -> None:
    for n_bins in (32, 31):
        geometry = ParallelBeam(24, n_bins, 8.0, n_bins, 8.0)
        samples, training = discs(3, "samples", geometry=geometry), discs(4, "training", geometry=geometry)
        found = copies.nearest_modulo_symmetry(samples, training, geometry, centre=False)
        every = [
            symmetry.roll_views(mirror(training), turn)
            for mirror in (lambda s: s, symmetry.reflect_y)
            for turn in range(48)
        ]
        tried = torch.stack(every).flatten(2).double()
        x = samples.flatten(1).double()
        cosine = torch.einsum("id,gjd->gij", x, tried) / (x.norm(dim=1)[:, None] * tried.norm(dim=2)[:, None])
        distance = (1 - cosine.square()).sqrt().amin(0).sort(dim=1)
        torch.testing.assert_close(found.d1, distance.values[:, 0].float(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.d2, distance.values[:, 1].float(), rtol=1e-3, atol=1e-5)
        assert found.first.tolist() == distance.indices[:, 0].tolist()


def test_the_second_nearest_is_of_another_patient() -> None:
    training = discs(6, "training")
    training[1] = 1.01 * training[0] + 0.01 * training[4]  # the neighbouring slice of the same patient
    patients = [7, 7, 8, 8, 9, 9]
    found = copies.nearest_modulo_symmetry(training[:1], training, GEOMETRY, patients)
    alone = copies.nearest_modulo_symmetry(training[:1], training, GEOMETRY)
    assert patients[int(found.second)] != 7
    assert alone.second == 1
    assert alone.d2 < 0.1 * found.d2
    assert found.ratio < 0.05
    with pytest.raises(ValueError, match="are of one; add more"):
        copies.nearest_modulo_symmetry(training[:1], training, GEOMETRY, [1] * 6)
    with pytest.raises(ValueError, match="5 patients are given for 6"):
        copies.nearest_modulo_symmetry(training[:1], training, GEOMETRY, patients[:5])


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, training = discs(5, "samples"), discs(7, "training")
    whole = copies.nearest_modulo_symmetry(samples, training, GEOMETRY)
    monkeypatch.setattr(copies, "_CHUNK_BYTES", 16 * 4 * 25 * 6)
    for ours, theirs in zip(copies.nearest_modulo_symmetry(samples, training, GEOMETRY), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_slices_are_useful_if_they_are_like_real_ones() -> None:
    """A denoiser that has seen discs denoises discs; one that has seen blank slices blanks them."""
    training, held_out, alike = (discs(32, name)[:, :, ::4, ::2] for name in ("training", "held out", "fake"))
    per_count = float(held_out.mean()) / 8
    noisy = torch.poisson(held_out / per_count, generator=torch.Generator().manual_seed(2)) * per_count
    found = {
        name: denoising_utility(fake, training, noisy, held_out, steps=40)
        for name, fake in {"alike": alike, "blank": torch.full_like(training, 0.1 * per_count)}.items()
    }
    like, unlike = found["alike"], found["blank"]
    assert like.real == unlike.real < 0.9 * like.nothing
    assert like.synthetic == pytest.approx(like.real, rel=0.1)
    assert unlike.synthetic > 1.2 * like.synthetic
    with pytest.raises(ValueError, match="at least one of each, the last two alike"):
        denoising_utility(training[:0], training, noisy, held_out)
