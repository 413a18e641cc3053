from __future__ import annotations

import copy
import pickle

import pytest
import torch

from allpet import ParallelBeam, Radon
from allpet.masks import (
    CellTable,
    RectangleTable,
    cell_edges,
    cells_in_view,
    draw_cells,
    draw_sizes,
    image_mask,
    project_cells,
)

SQUARE = ParallelBeam(48, 64, 4.0, 64, 4.0)
ODD = ParallelBeam(37, 51, 3.3, 45, 4.1)  # nothing divides by the grid, pixels are not bins


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("geometry", [SQUARE, ODD])
def test_projected_cells_are_the_strip_kernels_projections(geometry: ParallelBeam) -> None:
    grid = 8
    cells = torch.arange(grid * grid)[:, None]
    projected = Radon(geometry, kernel="strip").project(image_mask(cells, geometry, grid))[:, 0]
    table = project_cells(geometry, grid)
    assert (table - projected).norm() <= 3e-5 * projected.norm()


def test_every_view_of_a_cell_holds_its_area() -> None:
    table = project_cells(SQUARE, 8)
    inner = table[8 * 3 + 4]
    area = (8 * SQUARE.pixel_mm) ** 2
    torch.testing.assert_close(inner.sum(dim=1) * SQUARE.bin_mm, torch.full((SQUARE.n_views,), area), rtol=1e-5, atol=0)


@pytest.mark.parametrize("geometry", [SQUARE, ODD])
@pytest.mark.parametrize("kind", ["soft", "binary"])
def test_a_mask_is_the_projection_of_its_union_of_cells(geometry: ParallelBeam, kind: str) -> None:
    cells = draw_cells(6, 8, (2, 5), generator())
    masks = CellTable(geometry, 8, kind).masks(cells)
    lengths = Radon(geometry, kernel="strip").project(image_mask(cells, geometry, 8))
    if kind == "binary":
        # Rays that only graze a corner are a matter of rounding.
        assert masks[lengths > 1e-2 * geometry.pixel_mm].min() == 1
        assert lengths[masks == 0].max() < 1e-2 * geometry.pixel_mm
        assert ((masks == 1) & (lengths == 0)).float().mean() < 0.01
    else:
        chord = 2 * (geometry.field_of_view_mm**2 - geometry.bin_centers.float() ** 2).clamp_min(0).sqrt()
        share = (lengths / chord.clamp_min(geometry.pixel_mm)).clamp(max=1)
        torch.testing.assert_close(masks, share, atol=2e-3, rtol=0)
    assert masks.min() == 0
    assert masks.max() <= 1


def test_a_mask_of_all_cells_covers_every_ray_through_the_field_of_view() -> None:
    everything = torch.arange(64)[None]
    assert CellTable(SQUARE, 8, "soft").masks(everything).min() == 1
    assert CellTable(SQUARE, 8, "binary").masks(everything).min() == 1


def test_padding_adds_nothing() -> None:
    table = CellTable(SQUARE, 8)
    assert torch.equal(table.masks(torch.tensor([[9, 30, -1, -1]])), table.masks(torch.tensor([[9, 30]])))
    assert table.masks(torch.tensor([[-1, -1]])).abs().max() == 0


def test_half_precision_tables_agree() -> None:
    cells = draw_cells(8, 8, (1, 4), generator())
    full, half = (CellTable(SQUARE, 8, dtype=dtype).masks(cells) for dtype in (torch.float32, torch.float16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=1e-3, rtol=0)


def test_tables_survive_copies_and_pickles() -> None:
    table = CellTable(SQUARE, 8, "binary")
    cells = torch.tensor([[3, 12, -1]])
    expected = table.masks(cells)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin.masks(cells), expected)
    assert len(pickle.dumps(table)) < 2000  # a recipe, not the table


def test_cells_in_view() -> None:
    assert len(cells_in_view(SQUARE, 8, "all")) == 64
    centre, whole = cells_in_view(SQUARE, 8, "centre"), cells_in_view(SQUARE, 8, "whole")
    assert (len(centre), len(whole)) == (52, 32)
    assert set(whole.tolist()) < set(centre.tolist())
    # The bins bound the field of view as the pixels do.
    narrow = ParallelBeam(48, 32, 4.0, 64, 4.0)
    assert len(cells_in_view(narrow, 8)) < 52


def test_draws_are_distinct_allowed_and_reproducible() -> None:
    allowed = cells_in_view(SQUARE, 8)
    cells = draw_cells(500, 8, (2, 6), generator(3), allowed)
    assert cells.shape == (500, 6)
    for row in cells.tolist():
        drawn = [cell for cell in row if cell >= 0]
        assert row[len(drawn) :] == [-1] * (6 - len(drawn))
        assert 2 <= len(drawn) <= 6
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(allowed.tolist())
    assert torch.equal(cells, draw_cells(500, 8, (2, 6), generator(3), allowed))
    assert not torch.equal(cells, draw_cells(500, 8, (2, 6), generator(4), allowed))


def test_numbers_and_places_are_uniform() -> None:
    n = 20_000
    cells = draw_cells(n, 4, (1, 4), generator())
    numbers = torch.bincount((cells >= 0).sum(1), minlength=5)[1:].double()
    places = torch.bincount(cells[cells >= 0], minlength=16).double()
    # Five standard deviations of the counts.
    assert (numbers - n / 4).abs().max() < 5 * (n / 4) ** 0.5
    assert (places - places.mean()).abs().max() < 5 * places.mean() ** 0.5


def test_a_fixed_number_of_cells_needs_no_padding() -> None:
    assert (draw_cells(100, 8, (3, 3), generator()) >= 0).all()


def test_edges_divide_any_image() -> None:
    edges = cell_edges(45, 8)
    assert edges[0] == 0
    assert edges[-1] == 45
    assert edges.diff().min() >= 5
    assert edges.diff().max() <= 6


def test_image_masks_number_cells_from_the_top_left() -> None:
    mask = image_mask(torch.tensor([[1, -1], [8, 63]]), SQUARE, 8)
    assert mask[0, 0, :8, 8:16].min() == 1
    assert mask[0].sum() == 64
    assert mask[1, 0, 8:16, :8].min() == 1
    assert mask[1, 0, 56:, 56:].min() == 1


def test_sizes_are_equally_likely_and_do_not_mix() -> None:
    n = 9000
    cells = draw_sizes(n, (4, 8, 16), (2, 5), generator(), (None, None, None))
    assert cells.shape == (n, 5)
    size = torch.bucketize(cells, torch.tensor([0, 16, 16 + 64]), right=True)  # 0: padding, then the grid
    largest = size.amax(dim=1, keepdim=True)
    assert ((size == largest) | (size == 0)).all()
    counts = torch.bincount(largest.flatten(), minlength=4)[1:]
    assert (counts - n / 3).abs().max() < 5 * (n / 3) ** 0.5
    assert cells.max() < 16 + 64 + 256
    numbers = (cells >= 0).sum(dim=1)
    assert (numbers.min(), numbers.max()) == (2, 5)


@pytest.mark.parametrize("geometry", [SQUARE, ODD])
def test_masks_of_several_sizes_are_those_of_their_own_grids(geometry: ParallelBeam) -> None:
    grids = (4, 8)
    both, first, second = CellTable(geometry, grids), CellTable(geometry, 4), CellTable(geometry, 8)
    large, small = torch.tensor([[5, 6, -1]]), torch.tensor([[27, 28, 40]])
    numbered_on = small + 16
    assert torch.equal(both.masks(large), first.masks(large))
    assert torch.equal(both.masks(numbered_on), second.masks(small))
    assert torch.equal(image_mask(large, geometry, grids), image_mask(large, geometry, 4))
    assert torch.equal(image_mask(numbered_on, geometry, grids), image_mask(small, geometry, 8))


@pytest.mark.parametrize("geometry", [SQUARE, ODD])
@pytest.mark.parametrize("kind", ["soft", "binary"])
def test_a_rectangle_is_the_sum_of_its_cells(geometry: ParallelBeam, kind: str) -> None:
    rectangles = torch.tensor([[[1, 2, 4, 7], [5, 0, 8, 1]], [[0, 0, 8, 8], [0, 0, 0, 0]]])  # row, column, ends
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    inside = [
        [(rows >= top) & (columns >= left) & (rows < bottom) & (columns < right) for top, left, bottom, right in one]
        for one in rectangles.tolist()
    ]
    cells = torch.full((2, 64), -1)
    for k, (one, other) in enumerate(inside):
        number = torch.nonzero((one | other).flatten()).flatten()
        cells[k, : len(number)] = number
    from_cells, from_sums = (table(geometry, 8, kind) for table in (CellTable, RectangleTable))
    difference = (from_cells.masks(cells) - from_sums.masks(rectangles)).abs()
    if kind == "soft":
        assert difference.max() < 1e-5
    else:
        assert difference.mean() < 0.005  # rays that only graze a corner are a matter of rounding
    assert from_sums.masks(torch.zeros(1, 3, 4, dtype=torch.int64)).max() == 0


def test_tables_of_rectangles_survive_copies_and_pickles() -> None:
    table = RectangleTable(SQUARE, 8)
    rectangles = torch.tensor([[[2, 2, 5, 6]]])
    expected = table.masks(rectangles)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin.masks(rectangles), expected)
    assert len(pickle.dumps(table)) < 2000


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: draw_cells(1, 8, (0, 4), generator()), "n_cells is \\(0, 4\\)"),
        (lambda: draw_cells(1, 2, (1, 5), generator()), "most <= 4"),
        (lambda: cell_edges(16, 17), "grid is 17"),
        (lambda: CellTable(SQUARE, 8, "hard"), "'soft' or 'binary'"),  # type: ignore[arg-type]
        (lambda: cells_in_view(SQUARE, 8, "edge"), "criterion"),  # type: ignore[arg-type]
        (lambda: CellTable(SQUARE, (8, 100)), "grid is 100"),
        (lambda: RectangleTable(SQUARE, 8).masks(torch.tensor([[[0, 0, 9, 1]]])), "0 <= first <= end <= 8"),
        (lambda: RectangleTable(SQUARE, 8).masks(torch.tensor([[[3, 0, 2, 1]]])), "0 <= first <= end <= 8"),
    ],
)
def test_bad_input_is_named(call, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=sentence):
        call()
