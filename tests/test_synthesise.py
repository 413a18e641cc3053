"""The command that generates pairs of a downstream task beside few real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from allpet import Autoencoder, Bridge, Denoiser, LatentBridge, LatentDiffusion, ParallelBeam, PixelSpace
from allpet.conditions import LABEL_SIZE
from allpet.io import Scan, write_scan
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


def pixel_denoiser() -> Denoiser:
    return Denoiser(1, 1, (8, 16), **SMALL, label_size=LABEL_SIZE)


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


@pytest.mark.parametrize("own", [GEOMETRY, ParallelBeam(24, 30, 14.4, 30, 14.4)])
def test_pairs_of_ones_own_are_followed_and_joined_likewise(own, stage2, tmp_path, monkeypatch):
    """In units and geometry of their own; what is trained on has those of the model."""
    monkeypatch.chdir(tmp_path)
    data = PairedTask("low_dose", own, ["FDG:abdomen"], num_scans=12, val_patients=1, test_patients=0, cache=None)
    data.setup()
    pairs = data.train_set[list(range(12))]
    for part, values in (("input", pairs.input), ("target", pairs.noisy)):
        (tmp_path / "mine" / part).mkdir(parents=True)
        for patient in range(4):
            slices = values[3 * patient : 3 * patient + 3, 0].numpy()
            scan = Scan(1e-3 * slices, "sinogram", own, table={"patient": [f"p{patient}"] * 3})
            write_scan(tmp_path / "mine" / part / f"p{patient}.h5", scan)
    words = ["--folder", "mine", "--dose", "0.1", "--tracer", "FDG", "--region", "abdomen"]
    path = synthesise.main(["low_dose", *words, "--count", "5", "--stage2", str(stage2)])
    made = read_pairs(path, "low_dose", GEOMETRY)[list(range(5))]
    assert made.dose.tolist() == pytest.approx([0.1] * 5)
    assert (TRACERS[made.prompt.tracer[0]], REGIONS[made.prompt.region[0]]) == ("FDG", "abdomen")

    about = {"folder": "mine", "task": "low_dose", "tracer": "FDG", "region": "abdomen", "dose": 0.1}
    plain, joined = PairedFiles(**about), PairedFiles(**about, generated=str(path))
    for module in (plain, joined):
        module.setup()  # as the command line does, before there is a model
    assert joined.data_hash != plain.data_hash
    key = joined.data_hash
    prior = LatentDiffusion.from_pretrained(stage2)
    for module in (plain, joined):
        module.trainer = SimpleNamespace(lightning_module=prior, training=False)
        module.setup()
    assert joined.data_hash == key, "a resumed run is the same"
    assert len(joined.train_set) == len(plain.train_set) + 5
    gain = float(joined.summary()["gain"])
    assert gain > 100
    made = read_pairs(path, "low_dose", GEOMETRY, gain)[list(range(5))]
    levels = [float(values.mean()) for values in (joined.train_set[[0, 1, 2]].noisy, made.noisy)]
    assert 0.2 < levels[1] / levels[0] < 5, "of the same units"
    torch.testing.assert_close(joined.train_set[[len(plain.train_set)]].noisy, made.noisy[:1], rtol=1e-3, atol=1e-3)
    if own is GEOMETRY:  # a regression in sinograms knows no units, so pairs keep their own
        pixels = PairedFiles(**about, generated=str(path))
        pixels.trainer = SimpleNamespace(lightning_module=LatentBridge(PixelSpace(), pixel_denoiser()), training=False)
        pixels.setup()
        mine = pixels.train_set[[len(plain.train_set)]].noisy
        torch.testing.assert_close(gain * mine, made.noisy[:1], rtol=1e-3, atol=1e-3)


def test_other_tasks_need_a_helper_and_take_it(stage2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"which delayed needs: train it first with make finetune TASK=delayed PAIRS="):
        synthesise.main(["delayed", "--stage2", str(stage2)])
    for task, way in (("conversion", True), ("delayed", False)):
        with pytest.raises(SystemExit) as refused:
            synthesise.main([task, "--stage2", str(stage2)])
        assert ("--data.reverse=true" in str(refused.value)) == way
    with pytest.raises(SystemExit, match="Pairs of one's own are generated for low_dose, not for delayed"):
        synthesise.main(["delayed", "--stage2", str(stage2), "--folder", "mine"])
    with pytest.raises(SystemExit, match="both must be at least 1"):
        synthesise.main(["low_dose", "--count", "0", "--stage2", str(stage2)])
    with pytest.raises(SystemExit, match="holds no finished run"):
        synthesise.main(["low_dose", "--stage2", str(tmp_path / "nothing")])
    helper = LatentBridge(PixelSpace(), pixel_denoiser(), Bridge(end_share=1.0))  # a regression, as helpers are
    helper.geometry = GEOMETRY
    helper.save_pretrained(tmp_path / "helper")
    words = ["--pairs", "3", "--count", "2", "--stage2", str(stage2), "--helper", str(tmp_path / "helper")]
    path = synthesise.main(["delayed", *words])
    assert (read_pairs(path, "delayed", GEOMETRY)[[0, 1]].delay_min > 0).all()
