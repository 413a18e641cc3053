"""Semi-real attenuation pairs: the inversion finds what the simulator put in."""

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from allpet import ParallelBeam, Radon, fbp
from allpet.io import DataError, read_scan
from allpet.nac_inversion import attenuation_of, hounsfield, invert_attenuation, resample_image
from allpet.simulation import patient_slices
from data_modules.command import main as allpet_data
from data_modules.nac_pairs import make_pairs

GEOMETRY = ParallelBeam(96, 96, 5.0, 96, 5.0)


@pytest.fixture(scope="module")
def radon():
    return Radon(GEOMETRY)


@pytest.fixture(scope="module")
def brain(radon):
    """Activity, attenuation and NAC image of two slices; the image is a reconstruction, free of noise."""
    body = patient_slices(3, "brain", "FDG", 2, GEOMETRY)
    activity, mu = body.activity.unsqueeze(1), body.attenuation.unsqueeze(1)
    nac = fbp(radon, torch.exp(-radon.project(mu)) * radon.project(activity))
    return activity, mu, nac


def test_the_inversion_finds_the_attenuated_sinogram(radon, brain):
    activity, mu, nac = brain
    found = invert_attenuation(radon, nac, mu)
    truth = torch.exp(-radon.project(mu)) * radon.project(activity)
    assert found.residual.max() < 0.06
    assert ((found.before - truth).norm() / truth.norm()) < 0.06
    corrected = found.before / found.factors
    assert (corrected - radon.project(activity)).norm() / radon.project(activity).norm() < 0.08
    naive = radon.project(nac) * torch.exp(radon.project(mu))
    assert (naive - radon.project(activity)).norm() > 2 * (corrected - radon.project(activity)).norm()


def test_no_attenuation_leaves_the_image_as_it_is(radon, brain):
    mu = brain[1]
    thin = invert_attenuation(radon, brain[2], torch.where(mu > 0.003, 0.00301, 0.0), iterations=0)
    ratio = thin.activity.sum() / brain[2].sum()
    assert 1.0 < ratio < 1.7  # e^(0.003 * 150 mm) at most


def test_slices_do_not_depend_on_their_batch_and_scale_along(radon, brain):
    _, mu, nac = brain
    both, one = invert_attenuation(radon, nac, mu), invert_attenuation(radon, 7 * nac[1:], mu[1:])
    torch.testing.assert_close(one.before, 7 * both.before[1:], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(one.residual, both.residual[1:], rtol=1e-4, atol=1e-6)


def test_another_body_is_not_explained(radon, brain):
    """The residual tells attenuation of the wrong slice from the right one."""
    _, mu, nac = brain
    right = invert_attenuation(radon, nac, mu).residual
    wrong = invert_attenuation(radon, nac, mu.roll(16, dims=-1)).residual
    assert (wrong > 3 * right).all()


def test_attenuation_of_water_air_and_bone():
    mu = attenuation_of(torch.tensor([-1000.0, 0.0, 47.0, 1000.0, -2000.0]))
    assert mu[0] == 0
    assert mu[4] == 0
    assert mu[1] == pytest.approx(0.0096)  # water
    assert mu[3] == pytest.approx(0.01491, rel=1e-3)
    above = attenuation_of(torch.tensor(47.001))
    assert above == pytest.approx(float(mu[2]), rel=1e-2)  # the lines meet


def test_hounsfield_units_are_told_by_their_range():
    hu = torch.tensor([[-1024.0, 0.0, 40.0], [-1023.0, 300.0, 1500.0]])
    torch.testing.assert_close(hounsfield(hu), hu)
    torch.testing.assert_close(hounsfield(hu + 1024), hu)
    torch.testing.assert_close(hounsfield((hu + 1024) / (hu + 1024).max()), hu)
    with pytest.raises(ValueError, match="no known units"):
        hounsfield(torch.tensor([0.0, 90.0]))


def test_resampling_keeps_place_and_mass():
    x = (torch.arange(200) - 99.5) * 1.0
    blob = torch.exp(-((x - 30) ** 2 + (x[:, None] + 50) ** 2) / 200)[None, None]  # at (+30, row + 50)
    fine = resample_image(blob, 1.0, 100, 2.0, blur_mm=4.0)
    centre = (torch.arange(100) - 49.5) * 2.0
    assert float((fine.sum((0, 1, 2)) * centre).sum() / fine.sum()) == pytest.approx(30, abs=0.1)
    assert float((fine.sum((0, 1, 3)) * centre).sum() / fine.sum()) == pytest.approx(-50, abs=0.1)
    assert float(fine.sum() * 4) == pytest.approx(float(blob.sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda nac, mu: (nac, mu[:1]), "have the shapes"),
        (lambda nac, mu: (nac, -mu), "must not be negative"),
        (lambda nac, mu: (nac, 0 * mu), "no attenuation above air"),
    ],
)
def test_what_cannot_be_inverted_is_refused(radon, brain, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        invert_attenuation(radon, *change(brain[2], brain[1]))


@pytest.fixture
def folders(tmp_path, brain):
    """PET of 96 x 96 and CT of 120 x 120 pixels, scaled as some public sets are; the third PET shows another slice."""
    _, mu, nac = brain
    water = torch.where(mu <= 0.01006, mu * 10 / 9.6e-5 - 1000, (mu * 10 - 4.71e-2) / 5.10e-5 - 1000)
    stored = resample_image((water + 1024).clamp_min(0), 5.0, 120, 4.0).round()
    for name, i, shift in (("a_1", 0, 0), ("a_2", 1, 0), ("b_1", 0, 24)):
        for kind, image in (("pet", nac[i, 0].roll(shift, 0)), ("ct", stored[i, 0] / stored[i, 0].max())):
            (tmp_path / kind).mkdir(exist_ok=True)
            savemat(tmp_path / kind / f"{name}.mat", {"data": image.double().numpy()})
    return tmp_path


def test_the_command_leaves_out_what_it_cannot_explain(folders, capsys):
    out, picture = folders / "pairs.h5", folders / "pairs.png"
    words = ["attenuation-pairs", folders / "pet", folders / "ct", out, "--nac-pixel-mm=5", "--ct-pixel-mm=4"]
    assert allpet_data([str(word) for word in [*words, "--picture", picture]]) == 0
    told = capsys.readouterr().out
    assert "b_1.mat" in told.split("left out")[0].splitlines()[-1]
    assert "2 of 3 slices" in told
    assert picture.stat().st_size > 10_000
    scan = read_scan(out)
    assert list(scan.table["file"]) == ["a_1.mat", "a_2.mat"]
    assert set(scan.table["patient"]) == {"a"}
    assert scan.geometry == GEOMETRY
    assert scan.acf.min() >= 1
    corrected = torch.from_numpy(scan.values * scan.acf).sum(-1)
    assert (corrected.std(1) / corrected.mean(1)).max() < 5e-3  # moment 0: consistent once corrected
    attenuated = torch.from_numpy(scan.values).sum(-1)
    assert (attenuated.std(1) / attenuated.mean(1)).min() > 0.03
    with h5py.File(out) as file:
        assert "semi-real" in file["about"][()].decode()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda place: (place / "ct" / "a_2.mat").unlink(), "1 file.s. have no partner, the first is a_2.mat"),
        (lambda place: savemat(place / "pet" / "a_2.mat", {"data": np.ones((8, 8))}), "slices of .8, 8., the first"),
        (lambda place: savemat(place / "pet" / "a_1.mat", {"data": np.ones((8, 9))}), "give square images"),
        (lambda place: savemat(place / "ct" / "a_1.mat", {"data": 90.0 * np.eye(120)}), "name them with --ct-units"),
    ],
)
def test_folders_that_do_not_fit_are_refused(folders, spoil, sentence):
    spoil(folders)
    out = folders / "pairs.h5"
    with pytest.raises(DataError, match=sentence):
        make_pairs(folders / "pet", folders / "ct", out, 5.0, 4.0)
    assert not list(folders.glob("*pairs*"))


def test_wrong_pixels_explain_nothing(folders):
    out = folders / "pairs.h5"
    with pytest.raises(DataError, match="no slice is explained to 0%"):
        make_pairs(folders / "pet", folders / "ct", out, 5.0, 4.0, max_residual=0.001)
    assert not out.exists()
