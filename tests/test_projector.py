"""The Radon transform: what it computes, that its transpose is one, and that it survives how torch handles objects."""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import pickle
import subprocess
import sys
import weakref

import astra
import astra.experimental
import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from allpet import ParallelBeam, Radon, astra_cuda, disk_cache, system_matrix, system_rows

KERNELS = ("line", "linear", "strip")
SMALL = ParallelBeam(n_views=12, n_bins=18, bin_mm=1.6, image_size=14, pixel_mm=2.0)
ODD = ParallelBeam(n_views=15, n_bins=23, bin_mm=1.6, image_size=17, pixel_mm=2.0)
PLAIN, SYMMETRIC = 10**6, 1


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ALLPET_CACHE", str(tmp_path_factory.getbasetemp() / "radon-cache"))


@pytest.fixture(params=[PLAIN, SYMMETRIC], ids=["plain", "symmetric"])
def layout(request, monkeypatch):
    """Run with whole matrices and with an eighth of the rays."""
    monkeypatch.setattr(system_rows, "SYMMETRIC_FROM", request.param)
    system_matrix._shared.clear()
    yield request.param
    system_matrix._shared.clear()


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blobs(geometry, batch=1):
    """Smooth positive asymmetric images, different in every slice."""
    x, y = geometry.pixel_centers
    radius = geometry.field_of_view_mm
    images = [
        torch.exp(
            -(((x - 0.3 * radius) / (0.2 * radius)) ** 2) - ((y + (0.1 + 0.05 * k) * radius) / (0.35 * radius)) ** 2
        )
        for k in range(batch)
    ]
    return torch.stack(images)[:, None].float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def astra_loop(geometry, kernel, images):
    """Project image by image with ASTRA's own 2D projector."""
    grid = astra.create_vol_geom(geometry.image_size, geometry.image_size)
    spacing = geometry.bin_mm / geometry.pixel_mm
    beam = astra.create_proj_geom("parallel", spacing, geometry.n_bins, geometry.angles.numpy())
    projector = astra.create_projector(kernel, beam, grid)
    sinograms = []
    for image in images[:, 0].numpy():
        handle, sinogram = astra.create_sino(image, projector)
        astra.data2d.delete(handle)
        sinograms.append(torch.from_numpy(sinogram * geometry.pixel_mm).float())
    astra.projector.delete(projector)
    return torch.stack(sinograms)[:, None]


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["even", "odd"])
def test_a_batch_equals_a_loop_over_astra(geometry, kernel):
    images = noise(5, 1, *geometry.image_shape)
    assert relative(Radon(geometry, kernel).project(images), astra_loop(geometry, kernel, images)) <= 1e-5


@pytest.mark.parametrize("kernel", ["linear", "strip"])
@pytest.mark.parametrize("n_views", [20, 36, 64])
def test_symmetries_give_the_whole_matrix(n_views, kernel, monkeypatch):
    geometry = ParallelBeam(n_views, 46, 1.7, 33, 2.0)
    monkeypatch.setattr(system_rows, "SYMMETRIC_FROM", SYMMETRIC)
    assert system_rows.is_symmetric(geometry, kernel)
    radon = Radon(geometry, kernel)
    assert radon.project(noise(1, 1, 33, 33)).abs().min() >= 0
    stored = len(radon._matrix(torch.device("cpu"), torch.float32).forward)
    assert stored == (n_views // 4 + 1) * 23
    images = blobs(geometry, 3)
    assert relative(radon.project(images), astra_loop(geometry, kernel, images)) <= 1e-5


def test_what_is_not_symmetric_is_stored_whole(monkeypatch):
    monkeypatch.setattr(system_rows, "SYMMETRIC_FROM", SYMMETRIC)
    assert not system_rows.is_symmetric(ODD, "linear")
    assert not system_rows.is_symmetric(ParallelBeam(18, 18, 1.6, 14, 2.0), "linear")
    assert not system_rows.is_symmetric(SMALL, "line")


@pytest.mark.parametrize(("x", "y"), [(9.0, 15.0), (-21.0, 3.0), (-3.0, -17.0)])
def test_a_point_lands_at_x_cos_plus_y_sin(x, y, layout):
    geometry = ParallelBeam(16, 32, 2.0, 32, 2.0)
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, int(15.5 - y / 2), int(15.5 + x / 2)] = 1
    sinogram = Radon(geometry, "strip").project(image)[0, 0].double()
    landed = (sinogram @ geometry.bin_centers) / sinogram.sum(1)
    expected = x * geometry.angles.cos() + y * geometry.angles.sin()
    assert (landed - expected).abs().max() < 0.1 * geometry.bin_mm


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_a_turn_of_the_object_flips_the_bins(kernel):
    radon = Radon(ODD, kernel)
    images = blobs(ODD, 2)
    assert relative(radon.project(images.flip(-1, -2)), radon.project(images).flip(-1)) < 1e-5


def test_a_quarter_turn_of_the_object_moves_the_views(layout):
    radon = Radon(SMALL)
    sinogram = radon.project(blobs(SMALL))
    turned = radon.project(blobs(SMALL).rot90(1, (-2, -1)))  # anticlockwise, as angles are counted
    joined = torch.cat([sinogram[:, :, 6:].flip(-1), sinogram[:, :, :6]], dim=2)
    assert relative(turned, joined) < 1e-5


def test_line_integrals_are_in_mm_whatever_the_pixel():
    peaks = []
    for pixel in (1.0, 2.0):
        geometry = ParallelBeam(8, int(64 / pixel) + 1, pixel, int(64 / pixel), pixel)
        x, y = geometry.pixel_centers
        disc = 3.0 * ((x**2 + y**2) < 20**2).float()[None, None]
        peaks.append(Radon(geometry).project(disc)[0, 0, :, geometry.n_bins // 2].mean())
    assert peaks[0] == pytest.approx(3.0 * 40, rel=0.03)
    assert peaks[1] == pytest.approx(3.0 * 40, rel=0.06)


def test_strip_keeps_the_activity_of_every_view(layout):
    geometry = ParallelBeam(12, 40, 1.6, 20, 2.0)
    sums = Radon(geometry, "strip").project(noise(1, 1, 20, 20).abs())[0, 0].sum(1) * geometry.bin_mm
    expected = noise(1, 1, 20, 20).abs().sum() * geometry.pixel_mm**2
    assert torch.allclose(sums, expected.expand(12), rtol=1e-5)


@pytest.fixture(scope="module")
def ellipses():
    """A body with organs of 5 to 30 pixels: area-averaged image and bin-averaged analytic sinogram."""
    geometry = ParallelBeam(180, 128, 2.0, 128, 2.0)
    # centre x, centre y, semi-axes, turn, activity
    parts = [
        (6.0, -8.0, 60.0, 46.0, 0.3, 1.0),
        (-30.0, 20.0, 20.0, 10.0, -0.7, 1.0),
        (30.0, 10.0, 14.0, 26.0, 1.1, 0.5),
        (0.0, -30.0, 32.0, 12.0, 0.1, 0.8),
    ]
    x, y = geometry.pixel_centers
    angle = geometry.angles[:, None]
    edges = torch.cat([geometry.bin_centers - 1.0, geometry.bin_centers[-1:] + 1.0])
    offsets = (torch.arange(8, dtype=torch.float64) - 3.5) / 4
    image, sinogram = torch.zeros(128, 128, dtype=torch.float64), torch.zeros(180, 128, dtype=torch.float64)
    for cx, cy, a, b, turn, activity in parts:
        c, s = math.cos(turn), math.sin(turn)
        for dx in offsets:
            for dy in offsets:
                u, v = x + dx - cx, y + dy - cy
                image += activity / 64 * (((u * c + v * s) / a) ** 2 + ((v * c - u * s) / b) ** 2 <= 1)
        half = torch.sqrt((a * torch.cos(angle - turn)) ** 2 + (b * torch.sin(angle - turn)) ** 2)
        t = ((edges - cx * torch.cos(angle) - cy * torch.sin(angle)) / half).clamp(-1, 1)
        # The integral of 2 a b sqrt(1 - t^2) / half over s, whose difference over a bin is mean times width.
        sinogram += activity * a * b * (t * torch.sqrt(1 - t**2) + torch.asin(t)).diff(dim=1) / geometry.bin_mm
    return geometry, image.float()[None, None], sinogram[None, None].float()


@pytest.mark.parametrize("kernel", KERNELS)
def test_ellipses_match_their_analytic_transform(kernel, ellipses):
    geometry, image, sinogram = ellipses
    assert relative(Radon(geometry, kernel).project(image), sinogram) <= 0.0065


def test_joseph_weights_equal_astra_linear_ones():
    """What serves where ASTRA is not installed."""
    for geometry in (SMALL, ODD):
        views, bins = np.arange(geometry.n_views), np.arange(geometry.n_bins)
        ours = system_rows._joseph_weights(geometry, "linear", views, bins)
        theirs = system_rows._astra_weights(geometry, "linear", views, bins)
        image = blobs(geometry).flatten().numpy()
        assert np.linalg.norm(ours @ image - theirs @ image) <= 1e-5 * np.linalg.norm(theirs @ image)


def test_without_astra_linear_still_works_and_strip_says_why_not(monkeypatch):
    images = blobs(SMALL)
    expected = Radon(SMALL).project(images)

    def missing(name):
        raise system_rows.PackageNotFoundError(name)

    monkeypatch.setattr(system_rows, "version", missing)
    system_matrix._shared.clear()
    assert relative(Radon(SMALL).project(images), expected) < 1e-5
    with pytest.raises(RuntimeError, match="strip kernel's weights come from astra-toolbox, which is not installed"):
        Radon(SMALL, "strip").project(images)


# --- linear algebra ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("geometry", [SMALL, ODD], ids=["even", "odd"])
def test_backproject_is_the_adjoint(geometry, kernel, layout):
    radon = Radon(geometry, kernel)
    image, sinogram = noise(2, 1, *geometry.image_shape), noise(2, 1, *geometry.sinogram_shape, seed=1)
    forward, back = radon.project(image), radon.backproject(sinogram)
    gap = (forward.double() * sinogram).sum() - (image.double() * back).sum()
    assert gap.abs() / (forward.norm() * sinogram.norm()) <= 1e-6


@pytest.mark.parametrize("operation", ["project", "backproject"])
def test_gradients_of_any_order(operation, layout):
    radon = Radon(ParallelBeam(4, 6, 1.3, 5, 1.5))
    shape = radon.geometry.image_shape if operation == "project" else radon.geometry.sinogram_shape
    x = noise(2, 1, *shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(getattr(radon, operation), (x,))
    assert torch.autograd.gradgradcheck(lambda x: getattr(radon, operation)(x).square(), (x,))


def test_panels_and_single_images_agree(layout):
    radon = Radon(SMALL)
    images, sinograms = noise(70, 1, *SMALL.image_shape), noise(70, 1, *SMALL.sinogram_shape)
    for operation, x in ((radon.project, images), (radon.backproject, sinograms)):
        one_by_one = torch.cat([operation(part) for part in x.split(1)])
        assert relative(operation(x), one_by_one) < 1e-6


@pytest.mark.parametrize("columns", [1, 5, 40])
def test_every_way_to_multiply_gives_the_matrix_product(columns, layout):
    """One by one, by MKL, as sums of embeddings: which one runs depends on the number of columns."""
    matrix = Radon(ODD)._matrix(torch.device("cpu"), torch.float32)
    for part in (matrix.forward, matrix.transpose):
        dense = noise(part.shape[1], columns)
        assert relative(system_matrix._multiply(part, dense), part.to_dense() @ dense) < 1e-6


def test_channels_are_projected_one_by_one_and_an_empty_batch_stays_empty():
    radon = Radon(SMALL)
    images = noise(2, 3, *SMALL.image_shape)
    assert torch.allclose(radon.project(images)[:, 1:2], radon.project(images[:, 1:2]), atol=1e-4)
    assert radon.project(images[:0]).shape == (0, 3, *SMALL.sinogram_shape)
    assert radon.backproject(torch.zeros(0, 1, *SMALL.sinogram_shape)).shape == (0, 1, *SMALL.image_shape)


def test_any_strides_give_the_same(layout):
    radon = Radon(SMALL)
    images = noise(3, 1, *SMALL.image_shape)
    assert torch.equal(radon.project(images.transpose(-1, -2).contiguous().transpose(-1, -2)), radon.project(images))
    assert torch.equal(
        radon.project(images[:1].expand(3, -1, -1, -1))[2], radon.project(images[:1].repeat(3, 1, 1, 1))[2]
    )


@pytest.mark.parametrize("step", [1, 3, 5])
def test_subsets_of_views_are_parts_of_the_whole(step, layout):
    radon = Radon(SMALL)
    images, sinograms = noise(2, 1, *SMALL.image_shape), noise(2, 1, *SMALL.sinogram_shape)
    parts = [radon.subset(k, step) for k in range(step)]
    whole = radon.project(images)
    for k, part in enumerate(parts):
        assert torch.allclose(part.project(images), whole[:, :, k::step], atol=1e-4)
        assert torch.equal(part.angles, SMALL.angles[k::step])
        assert radon.subset(k, step) is part
    summed = sum(part.backproject(sinograms[:, :, k::step]) for k, part in enumerate(parts))
    assert relative(summed, radon.backproject(sinograms)) < 1e-6


# --- how torch and Python treat it ------------------------------------------------------------------------------------


class Sinograms(Dataset):
    """Projects in a data loader's worker."""

    def __init__(self, radon):
        self.radon = radon

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.radon.project(blobs(SMALL, index + 1)[index:])[0]


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.radon = Radon(SMALL)

    def forward(self, image):
        return self.weight * self.radon.project(image)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_work_and_carry_no_matrix(again):
    radon = Radon(SMALL, "strip")
    for original in (radon, radon.subset(1, 3)):
        expected = original.project(blobs(SMALL))
        assert torch.equal(again(original).project(blobs(SMALL)), expected)
        assert len(pickle.dumps(original)) < 2000


def test_a_module_that_holds_it_can_be_averaged_and_saved():
    model = Holder()
    expected = model(blobs(SMALL))
    average = AveragedModel(model)
    average.update_parameters(model)
    assert torch.allclose(average(blobs(SMALL)), expected)
    assert list(model.state_dict()) == ["weight"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers_can_project(start):
    data = Sinograms(Radon(SMALL))
    expected = torch.stack([data[0], data[1]])  # the parent has projected before it starts its workers
    context = multiprocessing.get_context(start)
    (batch,) = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=context)
    assert torch.allclose(batch, expected)


def test_training_after_validation_in_inference_mode():
    radon = Radon(ParallelBeam(6, 10, 2.0, 8, 2.0))  # its matrix is first made in here
    with torch.inference_mode():
        radon.project(torch.ones(1, 1, 8, 8))
    image = torch.ones(2, 1, 8, 8, requires_grad=True)
    radon.project(image).square().sum().backward()
    assert torch.allclose(image.grad, 2 * radon.backproject(radon.project(image)))


def test_autocast_and_half_precision_compute_in_single():
    radon = Radon(SMALL)
    image = blobs(SMALL).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sinogram = radon.project(image)
        sinogram.sum().backward()
    assert sinogram.dtype == torch.float32
    assert torch.equal(sinogram, radon.project(image))
    half = blobs(SMALL).bfloat16().requires_grad_()
    radon.project(half).sum().backward()
    assert radon.project(half).dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16


def test_equal_geometries_share_a_matrix_that_goes_when_nobody_needs_it():
    first, second = Radon(ODD), Radon(ParallelBeam(**ODD.to_dict()))
    first.project(blobs(ODD))
    second.project(blobs(ODD))
    cpu = (torch.device("cpu"), torch.float32)
    assert first._matrix(*cpu) is second._matrix(*cpu)
    watch = weakref.ref(first._matrix(*cpu))
    del first, second
    gc.collect()
    assert watch() is None


def test_a_fresh_process_projects_without_a_warning():
    code = (
        "import torch; from allpet import ParallelBeam, Radon; "
        "Radon(ParallelBeam(12, 18, 1.6, 14, 2.0)).project(torch.ones(2, 1, 14, 14))"
    )
    # Errors from here on; what the imports warn about is not ours.
    run = subprocess.run(
        [sys.executable, "-c", f"import scipy.sparse, torch, warnings; warnings.simplefilter('error'); {code}"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""


# --- the cache on disk ------------------------------------------------------------------------------------------------


def cached_files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALLPET_CACHE", str(tmp_path))
    system_matrix._shared.clear()
    return tmp_path


def test_a_matrix_is_built_once_and_read_back(empty_cache, monkeypatch):
    expected = Radon(SMALL).project(blobs(SMALL))
    (name,) = cached_files(empty_cache)
    assert name.startswith("radon-linear-12x18-14-forward-")
    system_matrix._shared.clear()
    monkeypatch.setattr(system_matrix, "build", None)  # building again would fail
    assert torch.equal(Radon(SMALL).project(blobs(SMALL)), expected)


def test_the_transpose_is_made_when_it_is_needed_and_kept_too(empty_cache, monkeypatch):
    sinogram = Radon(SMALL).project(blobs(SMALL))
    assert len(cached_files(empty_cache)) == 1
    expected = Radon(SMALL).backproject(sinogram)
    assert [name.split("-")[4] for name in cached_files(empty_cache)] == ["forward", "transpose"]
    system_matrix._shared.clear()
    monkeypatch.setattr(system_matrix, "_transpose", None)  # making it again would fail
    assert torch.equal(Radon(SMALL).backproject(sinogram), expected)


def test_everything_the_matrix_depends_on_is_in_the_key(empty_cache, monkeypatch):
    for number, field in enumerate(("n_views", "n_bins", "bin_mm", "image_size", "pixel_mm")):
        geometry = ParallelBeam(**{**SMALL.to_dict(), field: getattr(SMALL, field) + 1})
        Radon(geometry).project(torch.ones(1, 1, *geometry.image_shape))
        assert len(cached_files(empty_cache)) == number + 1
    for kernel in KERNELS:
        Radon(SMALL, kernel).project(blobs(SMALL))
    assert len(cached_files(empty_cache)) == 8
    system_matrix._shared.clear()
    monkeypatch.setattr(system_matrix, "weights_source", lambda kernel: "astra 99")
    Radon(SMALL).project(blobs(SMALL))
    assert len(cached_files(empty_cache)) == 9


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "another format"])
def test_a_damaged_file_is_made_anew(empty_cache, damage):
    expected = Radon(SMALL).project(blobs(SMALL))
    (path,) = empty_cache.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    else:
        content = {"cut short": content[:-100], "empty": b"", "another format": pickle.dumps([1, 2])}[damage]
    path.write_bytes(content)
    system_matrix._shared.clear()
    with pytest.warns(UserWarning, match="cannot be used .* and is made anew"):
        assert torch.equal(Radon(SMALL).project(blobs(SMALL)), expected)
    assert cached_files(empty_cache) == [path.name]
    system_matrix._shared.clear()
    assert torch.equal(Radon(SMALL).project(blobs(SMALL)), expected)


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ALLPET_CACHE", str(tmp_path / "file"))
    system_matrix._shared.clear()
    with pytest.warns(UserWarning, match="could not be written .* set ALLPET_CACHE to a writable folder"):
        assert Radon(SMALL).project(blobs(SMALL)).sum() > 0


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("ALLPET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.cache_folder() == tmp_path / "allpet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert disk_cache.cache_folder().parts[-2:] == (".cache", "allpet")


def build_when_told(barrier, queue):
    barrier.wait()
    system_matrix._shared.clear()
    queue.put(Radon(SMALL).project(blobs(SMALL)).sum().item())


def test_two_processes_may_build_at_once(empty_cache):
    # not fork: the threads that earlier tests used do not survive it
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=build_when_told, args=(barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sums[0] == sums[1]
    assert len(cached_files(empty_cache)) == 1  # no temporary file is left


LARGE = """
import resource, time, torch
from allpet import ParallelBeam, Radon
start = time.process_time()
radon = Radon(ParallelBeam(512, 512, 1.4, 512, 1.4))
matrix = radon._matrix(torch.device("cpu"), torch.float32)
seconds = time.process_time() - start
radon.backproject(radon.project(torch.ones(8, 1, 512, 512)))
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_large_geometry_is_ready_soon_and_small(empty_cache, monkeypatch):
    """Seconds of processor time, so that a busy machine does not fail it."""
    for allowed in (10.0, 1.0):  # built, then read from the cache
        run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
        seconds, gibibytes = map(float, run.stdout.split())
        assert seconds < allowed
        assert gibibytes < 3


@pytest.mark.slow
def test_a_large_geometry_equals_astra_up_to_the_rounding_of_astra(own_cache):
    """ASTRA adds up ray positions in single precision, and the rays drift by up to 1e-3 pixels over 512 rows.

    Hence its projection of a mirrored image is not the mirrored projection to better than about 5e-5; a matrix with
    symmetries must be as close to ASTRA as ASTRA is to itself.
    """
    geometry = ParallelBeam(512, 512, 1.0, 512, 1.0)
    images = blobs(geometry)
    theirs, mirrored = astra_loop(geometry, "linear", torch.cat([images, images.flip(-1)])).split(1)
    itself = relative(mirrored[:, :, 1:].flip(2), theirs[:, :, 1:])
    assert relative(Radon(geometry).project(images), theirs) < 1.5 * itself < 1e-4


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(14, 14), r"\(rows, columns\) = \(14, 14\), but got \(14, 14\)"),
        (torch.zeros(1, 1, 12, 18), r"\(rows, columns\) = \(14, 14\), but got \(1, 1, 12, 18\)"),
        (torch.zeros(1, 1, 14, 14, dtype=torch.int64), r"got torch.int64; convert with .float\(\)"),
        (torch.zeros(1, 1, 14, 14, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(1, 1, 14, 14, device="meta"), "got one on meta"),
    ],
)
def test_bad_images_are_refused_in_one_sentence(tensor, words):
    with pytest.raises(ValueError, match=words) as caught:
        Radon(SMALL).project(tensor)
    assert "\n" not in str(caught.value)


def test_bad_sinograms_and_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(views, bins\) = \(12, 18\), but got \(1, 1, 18, 12\)"):
        Radon(SMALL).backproject(torch.zeros(1, 1, 18, 12))
    with pytest.raises(ValueError, match="no kernel 'joseph'; choose one of line, linear, strip"):
        Radon(SMALL, "joseph")
    with pytest.raises(ValueError, match="no backend 'cuda'; choose one of auto, astra, matrix"):
        Radon(SMALL, backend="cuda")
    with pytest.raises(ValueError, match="expected 0 <= first < step <= views"):
        Radon(SMALL).subset(3, 3)
    with pytest.raises(ValueError, match="cannot be split again"):
        Radon(SMALL).subset(1, 3).subset(0, 2)
    with pytest.raises(ValueError, match="no strip kernel; use 'linear' or backend='matrix'"):
        Radon(SMALL, "strip", backend="astra")


def test_printing_says_how_to_make_it():
    assert repr(Radon(SMALL, "strip")) == f"Radon({SMALL!r}, kernel='strip', backend='auto')"
    assert repr(Radon(SMALL).subset(1, 3)).endswith(".subset(1, 3)")


# --- ASTRA on CUDA, as far as it can be tested without ---------------------------------------------------------------


def test_slices_of_the_3d_geometry_are_the_images_of_the_batch():
    """3D rows run along +y, so (x, y) of an image is (x, -y) of the volume."""
    batch = 5
    _, volume, beam = astra_cuda._projector(ODD, ODD.angles, batch, torch.device("cuda", 0))
    handles = [
        astra.data3d.link("-vol", volume, torch.zeros(batch, *ODD.image_shape)),
        astra.data3d.link("-sino", beam, torch.zeros(batch, *ODD.sinogram_shape)),
    ]
    astra.data3d.delete(handles)  # both shapes fitted, or link would have raised
    x, y = 3.0, 5.0
    for view, angle in enumerate(ODD.angles.tolist()):
        for k in range(batch):
            column, row = astra.experimental.projectPoint(beam, x, -y, k - (batch - 1) / 2, view)
            s = (x * math.cos(angle) + y * math.sin(angle)) * ODD.pixel_mm
            assert column == pytest.approx(s / ODD.bin_mm + (ODD.n_bins - 1) / 2, abs=1e-4)
            assert row == pytest.approx(k, abs=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_cuda_without_a_gpu_gives_one_sentence():
    with pytest.raises(
        RuntimeError, match=r"backend='astra' needs a CUDA GPU, but .*; use 'auto' or 'matrix'"
    ) as caught:
        Radon(SMALL, backend="astra")
    assert "\n" not in str(caught.value)


def test_every_reason_against_astra_is_named(monkeypatch):
    monkeypatch.setattr(astra_cuda, "_why_not_installed", astra_cuda._why_not_installed.__wrapped__)  # not remembered
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert astra_cuda.why_unavailable() == "torch sees no CUDA device"
    monkeypatch.setattr(astra, "has_feature", lambda feature: False)
    assert astra_cuda.why_unavailable() == "this build of astra-toolbox has no CUDA"
    monkeypatch.setitem(sys.modules, "astra", None)
    assert astra_cuda.why_unavailable().startswith("astra-toolbox cannot be imported")


def test_astra_never_sees_a_cpu_tensor(monkeypatch):
    """As after unpickling on a machine without a GPU: ASTRA itself would kill the process."""
    monkeypatch.setattr(astra_cuda, "why_unavailable", lambda: None)
    monkeypatch.setattr(astra_cuda, "_call", None)
    radon = pickle.loads(pickle.dumps(Radon(SMALL, backend="astra")))
    with pytest.raises(ValueError, match=r"works on float32 CUDA tensors, but got torch.float32 on cpu"):
        radon.project(blobs(SMALL))
    assert Radon(SMALL).project(blobs(SMALL)).isfinite().all()  # "auto" takes the matrix
