"""The page "Bring your own sinograms": every command and the recipe in it run, on look-alike data."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import ellipse_sinogram, gaussian_sinogram
from commands import ROOT, project_copy, run_here
from scipy.io import loadmat, savemat
from test_nac_inversion import brain, folders, radon  # noqa: F401
from test_readme import FOLDER

from allpet import ParallelBeam, Radon, fbp
from allpet.io import Scan, odd_bins, read_scan, write_scan
from data_modules.command import main

PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
EXTRA = {
    "make train-vae": FOLDER,
    "make train-ldm": FOLDER,
    "make sample": "--model.sampling.steps=2",
    "make finetune": FOLDER,
    "make attenuation-demo": f"--methods bridge --steps=1 {FOLDER.replace('--trainer.max_steps=2', '')}",
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def place(folders: Path) -> Path:  # noqa: F811
    """A copy of the project to run in, with sinograms of five patients, PET and CT."""
    project_copy(folders, small=True)
    generator, bins = np.random.default_rng(0), np.arange(80) - 39.5
    for patient in range(5):
        (folders / "my_scans" / f"patient{patient}").mkdir(parents=True)
        for part in range(3):
            view = 2 * np.sqrt(np.clip(generator.uniform(15, 30) ** 2 - bins**2, 0, None))
            sinogram = generator.poisson(50 * np.tile(view, (64, 1))).astype(np.float32)
            np.save(folders / "my_scans" / f"patient{patient}" / f"slice_{part}.npy", sinogram)
    # More neighbours of one patient: the same slices, moved and turned with their CT.
    for number in range(3, 13):
        for kind in ("pet", "ct"):
            image = loadmat(folders / kind / f"a_{1 + number % 2}.mat")["data"]
            savemat(folders / kind / f"a_{number}.mat", {"data": np.roll(np.rot90(image, number), number % 3, 0)})
    return folders


def test_every_command_works_in_the_order_given(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for command in commands():
        words = shlex.split(command)
        if words[0] == "allpet-data":
            assert main(words[1:]) == 0, command
        else:
            run_here(place, command, next(extra for start, extra in EXTRA.items() if command.startswith(start)))
    report = json.loads((place / "report.json").read_text())
    assert report["usable"]
    samples = read_scan(place / "outputs/samples/001/samples.h5")
    assert samples.geometry == ParallelBeam(64, 80, 4.0, 80, 4.0)
    for name in ("for_matlab.mat", "for_pytomography.npz"):
        exported = read_scan(place / name)
        np.testing.assert_array_equal(exported.values, samples.values)
        assert exported.provenance["synthetic"] is True
    for name in ("for_stir.hs", "for_python.npz"):
        exported = read_scan(place / name)
        assert exported.geometry.n_bins == 81
        np.testing.assert_allclose(exported.values.sum(-1), samples.values.sum(-1), rtol=1e-3, atol=1e-3)
    assert len(read_scan(place / "images.nii.gz").values) == 4
    assert len(read_scan(place / "images_dicom").values) == 2
    assert (read_scan(place / "pairs.h5").acf >= 1).all()
    demo = json.loads((place / "outputs/reports/attenuation_demo.json").read_text())
    rows = {(row["method"], row["nfe"], row["updates"]): row for row in demo["rows"]}
    ours = [("bridge", 1, 0), ("bridge", 5, 0), ("bridge", 1, 32)]
    assert list(rows) == [("identity", 0, 0), *ours, ("target", 0, 0)]
    assert rows["target", 0, 0]["l2"] == 0 < rows["identity", 0, 0]["l2"] < 1
    assert rows["target", 0, 0]["hl0"] < 0.3 * rows["identity", 0, 0]["hl0"]
    assert rows["bridge", 1, 32]["hl0"] < rows["bridge", 1, 0]["hl0"], "what is fitted is a projection"
    assert demo["slices"] == {"train": 5, "test": 2}
    for text in (demo["remarks"], (place / "outputs/reports/attenuation_demo.html").read_text()):
        assert "demonstration on one patient" in text
    assert (place / "outputs/finetune/attenuation/001/pretrained/model.safetensors").is_file()
    for name in ("sheet.png", "pairs.png", "outputs/reports/attenuation_demo.png"):
        assert (place / name).stat().st_size > 10_000


def test_the_recipe_reconstructs_what_we_do(tmp_path: Path) -> None:
    geometry = ParallelBeam(180, 128, 3.0, 129, 3.0)
    sinogram = (ellipse_sinogram(geometry) + gaussian_sinogram(geometry)).float()[0].numpy()
    write_scan(tmp_path / "for_python.npz", odd_bins(Scan(sinogram, "sinogram", geometry)))
    scan = read_scan(tmp_path / "for_python.npz")
    ours = fbp(Radon(scan.geometry), torch.from_numpy(scan.values)[:, None])[0, 0].numpy()
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1]
    code += '\nnp.savez("images.npz", by_skimage=by_skimage, by_astra=by_astra)\n'
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    axis = np.linspace(-1, 1, len(ours))
    inside = np.hypot(axis, axis[:, None]) < 0.95
    with np.load(tmp_path / "images.npz") as images:
        for name in ("by_skimage", "by_astra"):
            error = np.linalg.norm((images[name] - ours)[inside]) / np.linalg.norm(ours[inside])
            assert error <= 0.05, f"{name}: {error:.3f}"
            assert np.linalg.norm((images[name][:, ::-1] - ours)[inside]) > 0.5 * np.linalg.norm(ours[inside])
