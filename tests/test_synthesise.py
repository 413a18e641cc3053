"""The command that generates pairs of a downstream task beside few real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from allpet import Autoencoder, Denoiser, LatentBridge, LatentDiffusion, ParallelBeam, PixelSpace
from allpet.conditions import LABEL_SIZE
from allpet.prompts import REGIONS, TRACERS
from data_modules import PairedFiles, PairedTask
from data_modules.paired_set import read_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import synthesise

GEOMETRY = ParallelBeam(16, 20, 21.6, 20, 21.6)
SMALL = {"layers_per_block": 1, "attention": (False, True), "head_channels": 8}


@pytest.fixture(scope="module")
def stage2(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = LatentDiffusion(Autoencoder((8, 16)), Denoiser(4, 0, (8, 16), **SMALL))
    model.geometry = GEOMETRY
    model.autoencoder.scaling.set_scale(1000.0)
    folder = tmp_path_factory.mktemp("stage2") / "pretrained"
    model.save_pretrained(folder)
    return folder


def test_generated_pairs_follow_the_real_ones_and_are_trained_on(stage2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = synthesise.main(["low_dose", "--pairs", "4", "--count", "6", "--stage2", str(stage2)])
    assert "Wrote outputs/pairs/low_dose.safetensors: 6 pairs for low_dose, generated beside 4 real" in (
        capsys.readouterr().out
    )
    made = read_pairs(path, "low_dose", GEOMETRY)[list(range(6))]
    real = PairedTask("low_dose", GEOMETRY, num_scans=4, val_patients=1, test_patients=0, cache=None)
    real.setup()
    asked = real.train_set[[0, 1, 2, 3]]
    assert made.dose.tolist() == [*asked.dose.tolist(), *asked.dose.tolist()[:2]], "their doses, in turn"
    assert made.prompt.region.tolist()[:4] == asked.prompt.region.tolist()
    low, normal = ((values - made.expected).flatten(1).norm(dim=1) for values in (made.input, made.noisy))
    assert (low > normal).all(), "fewer counts"
    more = PairedTask("low_dose", GEOMETRY, num_scans=4, val_patients=1, test_patients=0, generated=str(path))
    more.setup()
    assert len(more.train_set) == 10
    with pytest.raises(ValueError, match="holds pairs for low_dose, the task is delayed"):
        read_pairs(path, "delayed", GEOMETRY)


def test_pairs_of_ones_own_are_followed_and_joined_likewise(stage2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = PairedTask("low_dose", GEOMETRY, ["FDG:abdomen"], num_scans=12, val_patients=1, test_patients=0, cache=None)
    data.setup()
    pairs = data.train_set[list(range(12))]
    for part, values in (("input", pairs.input), ("target", pairs.noisy)):
        for patient in range(4):
            (tmp_path / "mine" / part).mkdir(parents=True, exist_ok=True)
            slices = values[3 * patient : 3 * patient + 3, 0].numpy()
            np.save(tmp_path / "mine" / part / f"p{patient}.npy", 1e-3 * slices)
    own = ["--folder", "mine", "--dose", "0.1", "--tracer", "FDG", "--region", "abdomen"]
    path = synthesise.main(["low_dose", *own, "--count", "5", "--stage2", str(stage2)])
    made = read_pairs(path, "low_dose", GEOMETRY)[list(range(5))]
    assert made.dose.tolist() == pytest.approx([0.1] * 5)
    assert (TRACERS[made.prompt.tracer[0]], REGIONS[made.prompt.region[0]]) == ("FDG", "abdomen")
    about = {"tracer": "FDG", "region": "abdomen", "dose": 0.1, "geometry": GEOMETRY}
    plain, joined = PairedFiles("mine", "low_dose", **about), PairedFiles("mine", "low_dose", **about, generated=path)
    plain.setup()
    joined.setup()
    assert len(joined.train_set) == len(plain.train_set) + 5
    assert joined.data_hash != plain.data_hash


def test_other_tasks_need_a_reverse_model_and_take_it(stage2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"which delayed needs: train it first with make finetune TASK=delayed PAIRS="):
        synthesise.main(["delayed", "--stage2", str(stage2)])
    with pytest.raises(SystemExit, match="Pairs of one's own are generated for low_dose, not for delayed"):
        synthesise.main(["delayed", "--stage2", str(stage2), "--folder", "mine"])
    with pytest.raises(SystemExit, match="both must be at least 1"):
        synthesise.main(["low_dose", "--count", "0", "--stage2", str(stage2)])
    with pytest.raises(SystemExit, match="holds no finished run"):
        synthesise.main(["low_dose", "--stage2", str(tmp_path / "nothing")])
    reverse = LatentBridge(PixelSpace(), Denoiser(1, 1, (8, 16), **SMALL, label_size=LABEL_SIZE))
    reverse.geometry = GEOMETRY
    reverse.save_pretrained(tmp_path / "reverse")
    words = ["--pairs", "3", "--count", "2", "--stage2", str(stage2), "--reverse", str(tmp_path / "reverse")]
    path = synthesise.main(["delayed", *words])
    assert (read_pairs(path, "delayed", GEOMETRY)[[0, 1]].delay_min > 0).all()
