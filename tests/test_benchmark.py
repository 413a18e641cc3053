"""The benchmark's peers compute the same as we do, its rows say what was measured, and the GPU check needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from allpet import ParallelBeam, Radon, fbp

SCRIPTS = Path(__file__).parents[1] / "experiments" / "benchmarks"
GEOMETRY = ParallelBeam(24, 48, 2.0, 48, 2.0)


@pytest.fixture(autouse=True)
def importable(monkeypatch, tmp_path_factory):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("ALLPET_CACHE", str(tmp_path_factory.getbasetemp() / "radon-cache"))


def blobs(batch):
    x, y = GEOMETRY.pixel_centers
    images = [torch.exp(-(((x - 8 - k) / 12) ** 2) - ((y + 6) / 16) ** 2) for k in range(batch)]
    return torch.stack(images)[:, None].float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# scikit-image turns about the centre of pixel n // 2, half a pixel from ours.
PEERS = {"AstraLoop": 1e-5, "ScipyCSR": 1e-5, "GridSample": 0.02, "ScikitImage": 0.15}


@pytest.mark.filterwarnings("ignore:Radon transform. image must be zero outside")
@pytest.mark.parametrize(("name", "tolerance"), PEERS.items())
def test_a_peer_is_the_same_operator_by_other_means(name, tolerance):
    peers = pytest.importorskip("peers")
    if name == "ScikitImage":
        pytest.importorskip("skimage")
    radon, peer = Radon(GEOMETRY), getattr(peers, name)(GEOMETRY)
    images = blobs(2)
    sinograms = radon.project(images)
    assert relative(peer.project(images), sinograms) < tolerance
    x, y = GEOMETRY.pixel_centers
    seen = torch.hypot(x, y) < 0.95 * GEOMETRY.field_of_view_mm  # turning the image loses its corners
    back, filtered = (peer.backproject(sinograms)[..., seen], peer.fbp(sinograms)[..., seen])
    assert relative(back, radon.backproject(sinograms)[..., seen]) < 2 * tolerance
    assert relative(filtered, fbp(radon, sinograms)[..., seen]) < max(0.05, 2 * tolerance)
    views = slice(1, None, 3)
    assert relative(getattr(peers, name)(GEOMETRY, views).project(images), sinograms[:, :, views]) < tolerance


def test_rows_compare_every_operation_with_every_peer(tmp_path, monkeypatch):
    import benchmark

    geometry = "48/24/48"
    monkeypatch.setattr(benchmark, "GEOMETRIES", {geometry: GEOMETRY})
    monkeypatch.setattr(benchmark, "SUBSETS", {geometry: 4})
    monkeypatch.setattr(benchmark, "BATCHES", {"cpu": (1, 4, 8)})
    monkeypatch.setattr(benchmark, "seconds_of", lambda run, enough: (run(), 0.5)[1])  # every call takes half a second
    threads = torch.get_num_threads()
    try:
        rows = benchmark.measure(["cpu"], [1], quick=True)
    finally:
        torch.set_num_threads(threads)
    assert {row["operation"] for row in rows} == set(benchmark.OPERATIONS)
    assert {row["peer"] for row in rows} == {"astra_cpu", "scipy_csr", "skimage", "grid_sample", "bandwidth"}
    for row in rows:
        assert row["rate"] == 2 * row["batch"]
        assert row["ratio"] == row["rate"] / row["peer_rate"]
        if row["peer"] == "astra_cpu":
            assert row["peer_rate"] == 2
    # A copy of 256 MiB in half a second; a mask moves nine sinograms.
    (floor,) = {row["peer_rate"] for row in rows if (row["peer"], row["operation"]) == ("bandwidth", "masks")}
    assert floor == pytest.approx(2 * 2**28 / 0.5 / (9 * 4 * 24 * 48))
    summary = benchmark.summarise(rows)
    assert [entry["operation"] for entry in summary] == list(benchmark.OPERATIONS)
    assert all(entry["batch"] == 8 and entry["over_astra_cpu"] == 8 for entry in summary)
    benchmark.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_cost_of_a_batch_falls_with_its_size_until_a_panel_is_full():
    import benchmark

    radon, cpu = Radon(GEOMETRY), torch.device("cpu")
    moved = [benchmark.bytes_moved(radon, "project", batch, cpu) for batch in (1, 32, 64)]
    assert moved[0] > moved[1] == moved[2]
    weights = 8 * radon._matrix(cpu, torch.float32).forward.values().numel()
    assert moved[0] - moved[1] == pytest.approx(weights * 31 / 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_check_says_so_in_a_sentence(tmp_path):
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_check.py"), "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "sees no CUDA device" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_gpu_check_records_each_test_and_what_did_not_run(tmp_path, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "test_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n\n"
        "def test_good():\n    pass\n\n"
        "def test_bad():\n    assert 1 == 2\n\n"
        "@pytest.mark.skip(reason='ASTRA on CUDA: not run')\ndef test_left_out():\n    pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs CUDA\n")
    tests = gpu_check.run_tests(tmp_path)
    rows = {row["what"]: row["outcome"] for row in tests}
    assert rows["test_good"] == "passed"
    assert rows["test_bad"].startswith("failure: ")
    assert rows["test_left_out"] == "skipped: ASTRA on CUDA: not run"
    measured = {"operation": "project", "geometry": "48/24/48", "batch": 4, "device": "cuda", "threads": 1, "rate": 6.0}
    measured |= {"peer": "cusparse", "peer_rate": 3.0, "ratio": 2.0}
    summary = gpu_check.summarise(tests, [measured], [{"part": "training", "what": "vae", "outcome": "passed"}])
    assert [row["what"] for row in summary] == ["test_bad", "test_left_out", "all others", "vae", "project, 48/24/48"]
    assert summary[2]["number"] == 1
    assert summary[-1]["over_cusparse"] == 2.0
    failed = [{"part": "benchmark", "what": "all", "outcome": "not run: ImportError"}]
    assert gpu_check.summarise(tests, failed, [])[-1:] == failed
