"""The projector on a GPU: run with ``pytest -m gpu``.

Tests of the matrix need only torch; tests of ASTRA are skipped, saying why, where ASTRA has no CUDA.
"""

from __future__ import annotations

import pickle
import threading

import pytest
import torch

from allpet import ParallelBeam, Radon, astra_cuda, fbp, osem, system_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
WHY_NOT = astra_cuda.why_unavailable()
needs_astra = pytest.mark.skipif(WHY_NOT is not None, reason=f"ASTRA on CUDA: not run, {WHY_NOT}")
GEOMETRY = ParallelBeam(n_views=180, n_bins=140, bin_mm=1.8, image_size=128, pixel_mm=2.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ALLPET_CACHE", str(tmp_path_factory.getbasetemp() / "radon-cache"))


@pytest.fixture(params=["matrix", pytest.param("astra", marks=needs_astra)])
def backend(request):
    return request.param


def phantom(batch, geometry=GEOMETRY, device="cuda"):
    """Asymmetric images, so that a mirrored or turned projector cannot pass."""
    x, y = geometry.pixel_centers
    radius = geometry.field_of_view_mm
    image = ((x - 0.2 * radius) / 0.5) ** 2 + ((y + 0.1 * radius) / 0.7) ** 2 < radius**2
    spot = (x - 0.4 * radius) ** 2 + (y - 0.3 * radius) ** 2 < (0.1 * radius) ** 2
    scale = torch.linspace(1, 2, batch)[:, None, None, None]
    return (scale * (image.float() + 2 * spot.float())).to(device)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("batch", [1, 3, 40, 600])
def test_both_backends_project_as_the_cpu_does(backend, batch):
    images = phantom(batch)
    expected = Radon(GEOMETRY, backend="matrix").project(images.cpu())
    projected = Radon(GEOMETRY, backend=backend).project(images)
    assert projected.is_cuda
    assert relative(projected.cpu(), expected) < 1e-3


def test_both_backends_backproject_as_the_cpu_does(backend):
    """ASTRA interpolates per pixel, which is 0.6 % off the transpose for the sinogram of an object."""
    sinograms = Radon(GEOMETRY, backend="matrix").project(phantom(4).cpu())
    expected = Radon(GEOMETRY, backend="matrix").backproject(sinograms)
    tolerance = {"matrix": 1e-5, "astra": 0.015}[backend]
    assert relative(Radon(GEOMETRY, backend=backend).backproject(sinograms.cuda()).cpu(), expected) < tolerance


def test_adjoint(backend):
    """Zero-mean noise is the hardest case: 1e-6 for the matrix, about 7e-3 for ASTRA's unmatched backprojection."""
    radon = Radon(GEOMETRY, backend=backend)
    image, sinogram = noise(4, 1, 128, 128), noise(4, 1, 180, 140, seed=1)
    forward, back = radon.project(image), radon.backproject(sinogram)
    gap = (forward.double() * sinogram).sum() - (image.double() * back).sum()
    assert gap.abs() / (forward.norm() * sinogram.norm()) < {"matrix": 1e-6, "astra": 2e-2}[backend]
    image, sinogram = image.abs(), sinogram.abs()
    forward, back = radon.project(image), radon.backproject(sinogram)
    gap = (forward.double() * sinogram).sum() - (image.double() * back).sum()
    assert gap.abs() / (forward.norm() * sinogram.norm()) < {"matrix": 1e-6, "astra": 1e-3}[backend]


def test_symmetries_on_a_gpu(monkeypatch):
    geometry = ParallelBeam(64, 64, 2.0, 64, 2.0)
    expected = Radon(geometry, backend="matrix").project(phantom(3, geometry, "cpu"))
    monkeypatch.setattr(system_rows, "SYMMETRIC_FROM", 1)
    other = ParallelBeam(64, 64, 1.0, 64, 1.0)  # the same in other units, so that no matrix is shared
    projected = Radon(other, backend="matrix").project(phantom(3, geometry))
    assert relative(2 * projected.cpu(), expected) < 1e-4


def test_gradcheck_in_double_precision():
    radon = Radon(ParallelBeam(4, 6, 1.3, 5, 1.5))  # auto: ASTRA has no double precision
    x = noise(2, 1, 5, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(radon.project, (x,))
    assert torch.autograd.gradgradcheck(lambda x: radon.project(x).square(), (x,))


def test_gradients_come_from_the_thread_that_autograd_uses(backend):
    radon = Radon(GEOMETRY, backend=backend)
    images = phantom(2).requires_grad_()
    radon.project(images).square().sum().backward()
    assert relative(images.grad, 2 * radon.backproject(radon.project(images.detach()))) < 1e-5


def test_work_on_a_side_stream_is_waited_for(backend):
    radon = Radon(GEOMETRY, backend=backend)
    images = phantom(16)
    expected = radon.project(images)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(images)
            torch.cuda._sleep(50_000_000)  # some 30 ms, so that a projector that does not wait sees zeros
            late.copy_(images)
            projected = radon.project(late) * 2
        stream.synchronize()
        assert relative(projected, 2 * expected) < 1e-6


def test_threads_with_different_geometries_do_not_mix(backend):
    others = ParallelBeam(96, 100, 2.5, 128, 2.0)
    radons = [Radon(GEOMETRY, backend=backend), Radon(others, backend=backend)]
    expected = [radon.project(phantom(8)) for radon in radons]
    worst = [0.0, 0.0]

    def work(k):
        for _ in range(20):
            worst[k] = max(worst[k], relative(radons[k].project(phantom(8)), expected[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-6


def test_running_out_of_memory_raises(backend):
    radon = Radon(GEOMETRY, backend=backend)
    images = phantom(64)
    expected = radon.project(images)
    torch.cuda.empty_cache()
    hog = torch.empty(int((torch.cuda.mem_get_info()[0] - 2**28) / 4), device="cuda")
    try:
        with pytest.raises(RuntimeError):  # torch.OutOfMemoryError is one
            radon.project(torch.zeros(1, device="cuda").expand(2**13, 1, 128, 128))
    finally:
        del hog
        torch.cuda.empty_cache()
    assert torch.allclose(radon.project(images), expected)


def test_subsets_copies_and_reconstruction(backend):
    radon = Radon(GEOMETRY, backend=backend)
    images = phantom(3)
    sinograms = radon.project(images)
    assert torch.allclose(radon.subset(2, 6).project(images), sinograms[:, :, 2::6], rtol=1e-3, atol=1e-2)
    assert torch.allclose(pickle.loads(pickle.dumps(radon)).project(images), sinograms)
    for reconstructed in (fbp(radon, sinograms, "ramp"), osem(radon, sinograms, 4, 10)):
        assert relative(reconstructed, images) < 0.2


@needs_astra
def test_auto_takes_astra_for_single_precision(monkeypatch):
    called = []
    run = astra_cuda._call
    monkeypatch.setattr(astra_cuda, "_call", lambda *args: called.append(1) or run(*args))
    Radon(GEOMETRY).project(phantom(1))
    assert called
    Radon(GEOMETRY, "strip").project(phantom(1))
    Radon(GEOMETRY).project(phantom(1).double())
    assert len(called) == 1


@needs_astra
def test_astra_refuses_cpu_tensors():
    with pytest.raises(ValueError, match="works on float32 CUDA tensors"):
        Radon(GEOMETRY, backend="astra").project(phantom(1, device="cpu"))


def test_one_process_of_ddp(backend, tmp_path):
    """The gradient that DDP averages is the one that a single process computes."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.image = torch.nn.Parameter(phantom(2))
            self.radon = Radon(GEOMETRY, backend=backend)

        def forward(self):
            return self.radon.project(self.image).square().mean()

    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone, ddp = Model(), torch.nn.parallel.DistributedDataParallel(Model(), device_ids=[0])
        alone().backward()
        ddp().backward()
        assert relative(ddp.module.image.grad, alone.image.grad) < 1e-5
    finally:
        torch.distributed.destroy_process_group()
