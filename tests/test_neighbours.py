"""Means over neighbours that look alike: a Gaussian where all are alike, walls where they are not, an exact adjoint."""

from __future__ import annotations

import math

import pytest
import torch

from allpet import neighbours
from allpet.neighbours import AlikeNeighbours
from allpet.randomness import keyed_generator


def _random(*shape: int, key: str = "image") -> torch.Tensor:
    return torch.rand(*shape, generator=keyed_generator(key))


@pytest.mark.parametrize("fwhm_mm", [3.0, 24.0, 500.0])
def test_mean_and_spread_are_adjoint_and_an_even_image_stays(fwhm_mm):
    """Also where the neighbourhood reaches far beyond the image."""
    looks = _random(2, 2, 20, 17)
    near = AlikeNeighbours(looks, fwhm_mm, 5.0)
    image, other = _random(2, 1, 20, 17, key="a").double(), _random(2, 1, 20, 17, key="b").double()
    torch.testing.assert_close((near.mean(image) * other).sum(), (image * near.spread(other)).sum())
    torch.testing.assert_close(near.mean(torch.ones_like(looks[:, :1])), torch.ones_like(looks[:, :1]))
    torch.testing.assert_close(near.spread(other).sum((1, 2, 3)), other.sum((1, 2, 3)), msg="nothing is lost")


@pytest.mark.parametrize("pixel_mm", [1.4, 5.4])
def test_where_all_is_alike_the_mean_is_a_gaussian_whatever_the_pixels(pixel_mm):
    size = round(200 / pixel_mm) | 1
    point = torch.zeros(1, 1, size, size)
    point[..., size // 2, size // 2] = 1
    near = AlikeNeighbours(torch.ones_like(point), 24.0, pixel_mm)
    drawn = near.mean(point)[0, 0]
    places = (torch.arange(size) - size // 2) * pixel_mm
    sigma = 24.0 / math.sqrt(8 * math.log(2))
    for axis in (0, 1):
        share = drawn.sum(axis)
        torch.testing.assert_close(float(share.sum()), 1.0)
        assert abs(float((share * places).sum())) < 0.1 * sigma
        assert float((share * places.square()).sum()) == pytest.approx(sigma**2, rel=0.15)


def test_weights_that_are_not_kept_are_the_same(monkeypatch):
    looks, image = _random(2, 1, 12, 12), _random(2, 1, 12, 12, key="a")
    kept = AlikeNeighbours(looks, 24.0, 5.0)
    monkeypatch.setattr(neighbours, "_MOST_KEPT", 0)
    anew = AlikeNeighbours(looks, 24.0, 5.0)
    assert anew._kept is None
    assert kept._kept is not None
    assert torch.equal(kept.mean(image), anew.mean(image))
    assert torch.equal(kept.spread(image), anew.spread(image))


def test_what_does_not_look_alike_is_no_neighbour():
    """By any of the looks; ratios count, not the scale; nothing at all is alike."""
    left = torch.zeros(1, 1, 24, 24)
    left[..., :12] = 1
    noise = _random(1, 1, 24, 24)
    for looks in (1 + left, 7e4 * (1 + left), torch.cat([torch.ones_like(left), 1 + left], dim=1), left):
        near = AlikeNeighbours(looks, 24.0, 5.0)
        torch.testing.assert_close(near.mean(left), left, atol=4e-3, rtol=0)
        means = near.mean(noise)
        assert means[..., :12].std() < 0.35 * noise[..., :12].std()
        torch.testing.assert_close(near.mean(noise + 50 * left) - 50 * left, means, atol=0.2, rtol=0)
    nearly = AlikeNeighbours(1 + 0.02 * left, 24.0, 5.0)
    assert nearly.mean(left)[..., 12].mean() > 0.3, "2 % more uptake is no wall"
    assert AlikeNeighbours(torch.zeros_like(left), 24.0, 5.0).mean(noise).isfinite().all()
