"""The evaluation suite's parts, on distributions and sinograms whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from allpet import Autoencoder, ParallelBeam, Radon, fbp, symmetry
from allpet.evaluation import copies, denoising_utility, distances, features, halves, spectra
from allpet.metrics import radial_power_spectrum
from allpet.prompts import Prompt
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


def test_kernel_distances_of_chosen_numbers_of_each_kind_are_unbiased() -> None:
    kind = torch.tensor([0] * 12 + [1] * 8)
    far = 4.0 * torch.eye(8)[:2][kind]
    for distance in (distances.polynomial_mmd, distances.gaussian_mmd):
        sets = [(normal(20, 8, i, "a") + far, normal(20, 8, i, "b") + far) for i in range(60)]
        found = torch.tensor([distance(*pair, (kind, kind)) for pair in sets])
        plain = torch.tensor([distance(*pair) for pair in sets])
        assert abs(found.mean()) < 3 * found.std() / 60**0.5
        assert plain.mean() < -5 * plain.std() / 60**0.5, "as if they were drawn: too few pairs of a kind"
        one = (torch.zeros(20), torch.zeros(20))
        assert distance(*sets[0], one) == pytest.approx(float(plain[0]))
        each = (torch.arange(20), torch.arange(20))
        assert distance(*sets[0], each) == pytest.approx(float(plain[0])), "kinds of one sample tell nothing"


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


def tallies(kind: Tensor, rows: Tensor) -> list[int]:
    return torch.bincount(kind[rows], minlength=int(kind.max()) + 1).tolist()


def some_kinds(case: str) -> tuple[Tensor, Tensor]:
    """Owners and kinds of slices: patients of one kind each, or of several, of equal and of different sizes."""
    if case == "one kind each":  # 7, 6 and 11 patients of 5 slices, kind by kind
        return torch.arange(24).repeat_interleave(5), torch.tensor([0] * 7 + [1] * 6 + [2] * 11).repeat_interleave(5)
    sizes = torch.randint(4, 9, (15,), generator=keyed_generator("sizes"))
    owner = torch.arange(15).repeat_interleave(sizes)
    return owner, torch.randint(3, (len(owner),), generator=keyed_generator("kinds"))


@pytest.mark.parametrize("case", ["one kind each", "several kinds each"])
def test_halves_show_the_same_and_share_no_patient(case: str) -> None:
    owner, kind = some_kinds(case)
    assert torch.equal(halves.heeded(owner, kind), kind)
    firsts = []
    for draw in range(20):
        first, second = halves.halves(owner, kind, keyed_generator(draw))
        assert tallies(kind, first) == tallies(kind, second)
        assert not set(owner[first].tolist()) & set(owner[second].tolist())
        assert len(first) + len(second) > 0.75 * len(owner)
        assert len(first.unique()) == len(first)
        firsts.append(first)
    assert len({tuple(sorted(set(owner[first].tolist()))) for first in firsts}) > 15, "halves are random"
    often = torch.bincount(torch.cat([owner[first].unique() for first in firsts]), minlength=len(owner.unique()))
    assert often.min() > 0
    assert often.max() < 20


@pytest.mark.parametrize("sizes", [(10, 11, 12, 13), (6, 7, 8, 9, 11), (3, 4, 5, 6, 7, 9)])
def test_halves_of_few_patients_are_not_ever_the_same(sizes: tuple[int, ...]) -> None:
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    splits = set()
    for draw in range(20):
        first, second = halves.halves(owner, torch.zeros_like(owner), keyed_generator(draw))
        assert min(len(first), len(second)) > 0.25 * len(owner)
        splits.add(frozenset({frozenset(owner[first].tolist()), frozenset(owner[second].tolist())}))
    assert len(splits) >= 3


def test_without_kinds_halves_have_all_slices() -> None:
    owner = torch.arange(20).repeat_interleave(3)
    first, second = halves.halves(owner, torch.zeros(60, dtype=torch.int64), keyed_generator(0))
    assert sorted(torch.cat([first, second]).tolist()) == list(range(60))
    assert len(first) == len(second)


def test_what_two_halves_cannot_share_is_left_out_and_said() -> None:
    owner = torch.arange(9).repeat_interleave(4)
    names = ["FDG:brain"] * 16 + ["FDG:chest"] * 16 + ["PSMA:pelvis"] * 4
    prompt = Prompt.of(names)
    kind = halves.kinds_of(prompt, 36)
    for draw in range(5):
        rows = torch.cat(halves.halves(owner, halves.heeded(owner, kind), keyed_generator(draw)))
        assert {names[i] for i in rows.tolist()} == {"FDG:brain", "FDG:chest"}
    (said,) = halves.remarks(owner, prompt, 36)
    assert "alone shows PSMA:pelvis" in said
    assert halves.remarks(owner[:32], Prompt(*(half[:32] for half in prompt)), 32) == []
    # nine patients of nine kinds: nothing can be balanced
    assert not halves.heeded(owner, owner).any()
    tracers, regions = owner % 3 + 1, owner // 3 + 1
    assert "Hardly any prompt" in halves.remarks(owner, Prompt(tracers, regions), 36)[0]
    assert "are of 3 patient(s)" in halves.remarks(torch.arange(36) % 3, None, 36)[0]


def test_parts_are_drawn_with_the_shares_that_are_wanted() -> None:
    known = torch.tensor([0] * 40 + [1] * 40 + [2] * 20)
    wanted = torch.tensor([0] * 10 + [1] * 40)  # a quarter of the first kind, all of the second, none of the third
    kind = torch.tensor([0] * 80 + [1] * 20 + [2] * 10 + [3] * 40)
    shares = torch.zeros(4)
    for draw in range(50):
        rows = halves.drawn_like(wanted, known, kind, 40, keyed_generator(draw))
        assert len(rows.unique()) == len(rows) == 40
        shares += torch.bincount(kind[rows], minlength=4) / 50
    # chances .5, 2, 0 and 1, which is how often a kind is drawn that no known slice has
    chances = torch.tensor([80 * 0.5, 20 * 2.0, 0, 40])
    torch.testing.assert_close(shares, 40 * chances / chances.sum(), rtol=0, atol=0.5)
    first = torch.cat([halves.drawn_like(known, known, known, 50, keyed_generator(i))[:10] for i in range(50)])
    assert known[first].double().mean() == pytest.approx(float(known.double().mean()), abs=0.12), "in random order"
