"""Distances between two sets of features, ``(n, d)`` and ``(m, d)``; n and m may differ.

``kernel_distance`` is KID's statistic (Binkowski et al. 2018), the unbiased squared maximum mean discrepancy with a
cubic polynomial kernel; ``sliced_wasserstein`` the optimal transport along random directions (Rabin et al. 2012);
``prdc`` precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

torchmetrics' ``KernelInceptionDistance`` takes feature modules of one's own and gives the same numbers (a test holds
them together), but only for sets of one size, from subsets that it draws from the global generator; all pairs give a
sharper number from the same samples, so the statistic is written out here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from allpet.randomness import keyed_generator

Kinds = tuple[Tensor, Tensor] | None
"""Kind of each sample of two sets; None where all are of one."""


class Estimate(NamedTuple):
    """A number and how well it is known.

    Attributes:
        value: from all samples.
        std: its standard error.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    value: float
    std: float
    low: float
    high: float


class Prdc(NamedTuple):
    """How two sets overlap, each a fraction (density may exceed 1).

    Attributes:
        precision: share of fake samples within reach of a real one.
        recall: share of real samples within reach of a fake one.
        density: how many real samples a fake one is within reach of, over k; 1 for equal distributions.
        coverage: share of real samples that have a fake one within their own reach.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def kernel_distance(real: Tensor, fake: Tensor, repeats: int = 100, seed: int = 0) -> Estimate:
    """Return the unbiased squared MMD with the kernel (x y / d + 1)^3, about 0 for equal distributions.

    The standard error is the spread over random halves of both sets. A half taken without replacement scatters about
    the whole as the whole does about the truth (delete-half jackknife); the usual bootstrap would pair samples with
    copies of themselves, which this statistic leaves out.

    Args:
        real: features, ``(n, d)``, n >= 4, standardised.
        fake: ``(m, d)``, m >= 4.
        repeats: halves drawn.
        seed: keys the draws.
    """
    n = _check(real, fake, 4)
    kernel = _cubic(torch.cat([real, fake]).double())
    value = float(_unbiased(kernel, torch.ones(1, n), torch.ones(1, len(fake)))[0])
    generator = keyed_generator(seed, "halves of two sets")
    halves = [_halves(size, repeats, generator) for size in (n, len(fake))]
    std = float(_unbiased(kernel, *halves).std())
    return Estimate(value, std, value - 1.96 * std, value + 1.96 * std)


def polynomial_mmd(real: Tensor, fake: Tensor, kinds: Kinds = None) -> float:
    """Return the value of ``kernel_distance`` alone.

    Args:
        real: features, ``(n, d)``, n >= 2, standardised.
        fake: ``(m, d)``, m >= 2.
        kinds: of both sets' samples, ``(n,)`` and ``(m,)``, where their numbers of each kind were chosen and not drawn.
            Pairs of one kind are then rarer than in random sets, which would count as distance below zero.
    """
    _check(real, fake, 2)
    return _squared_mmd(_cubic(torch.cat([real, fake]).double()), len(real), kinds)


def gaussian_mmd(real: Tensor, fake: Tensor, kinds: Kinds = None) -> float:
    """Return the unbiased squared MMD with a Gaussian kernel as wide as the median distance of two real samples.

    Arguments as of ``polynomial_mmd``.
    """
    n = _check(real, fake, 2)
    both = torch.cat([real, fake]).double()
    width = functional.pdist(both[:n]).median().clamp_min(1e-12)
    kernel = torch.exp(-torch.cdist(both, both).square() / (2 * width**2))
    return _squared_mmd(kernel, n, kinds)


def sliced_wasserstein(real: Tensor, fake: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Return the root mean square over random directions of the 2-Wasserstein distance along them.

    Directions are unit vectors, so a set moved by a vector v is at a distance of |v| / sqrt(d): the root mean square
    shift of a coordinate, in the units of the data. It is biased upwards for small sets; compare equal sizes.

    Args:
        real: ``(n, ...)``, features or raw sinograms.
        fake: ``(m, ...)``.
        projections: directions.
        seed: keys the directions.
    """
    x, y = real.flatten(1), fake.flatten(1)
    _check(x, y, 1)
    generator = keyed_generator(seed, x.shape[1], "directions")
    directions = torch.randn(x.shape[1], projections, generator=generator).to(x)
    directions = directions / directions.norm(dim=0)
    a, b = ((z @ directions).sort(dim=0).values for z in (x, y))
    first, second, weight = _quantile_pairs(len(x), len(y))
    squared = (weight.to(a) @ (a[first] - b[second]).square()).mean()
    return float(squared.sqrt())


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> Prdc:
    """Return precision, recall, density and coverage.

    The *reach* of a sample is the distance to its k-th nearest neighbour in its own set.

    Args:
        real: features, ``(n, d)``, n > k.
        fake: ``(m, d)``, m > k.
        k: neighbours.

    Raises:
        ValueError: if a set is too small.
    """
    _check(real, fake, k + 1)

    def reach(x: Tensor) -> Tensor:
        # The nearest is the sample itself.
        return _distances(x, x).kthvalue(k + 1, dim=1).values

    between, of_real, of_fake = _distances(real, fake), reach(real), reach(fake)
    near = between <= of_real[:, None]
    return Prdc(
        precision=float(near.any(0).float().mean()),
        recall=float((between <= of_fake).any(1).float().mean()),
        density=float(near.float().sum(0).mean() / k),
        coverage=float(near.any(1).float().mean()),
    )


def _cubic(x: Tensor) -> Tensor:
    return (x @ x.T / x.shape[1] + 1) ** 3


def _unbiased(kernel: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Mean of k(x, x') + mean of k(y, y') - 2 mean of k(x, y) without pairs of a sample with itself.

    Args:
        kernel: ``(n + m, n + m)``, float64.
        first: which of the first n samples count, 0 or 1, ``(repeats, n)``.
        second: which of the other m, ``(repeats, m)``.

    Returns:
        ``(repeats,)``.
    """
    a, b = first.to(kernel), second.to(kernel)
    n = a.shape[1]
    off_diagonal = kernel - torch.diag(kernel.diagonal())

    def total(left: Tensor, block: Tensor, right: Tensor) -> Tensor:
        return ((left @ block) * right).sum(1)

    n_a, n_b = a.sum(1), b.sum(1)
    within = total(a, off_diagonal[:n, :n], a) / (n_a * (n_a - 1))
    within = within + total(b, off_diagonal[n:, n:], b) / (n_b * (n_b - 1))
    return within - 2 * total(a, kernel[:n, n:], b) / (n_a * n_b)


def _squared_mmd(kernel: Tensor, n: int, kinds: Kinds) -> float:
    """As ``_unbiased`` of all samples, the first n of which are one set; pairs of a kind count as in random sets."""
    blocks = [kernel[:n, :n], kernel[n:, n:]]
    if kinds is None:
        kinds = (torch.zeros(n), torch.zeros(len(kernel) - n))
    within = sum(float((_pair_weights(kind) * block).sum()) for kind, block in zip(kinds, blocks, strict=True))
    return within - 2 * float(kernel[:n, n:].mean())


def _pair_weights(kind: Tensor) -> Tensor:
    """Weight of each pair of two samples, ``(n, n)``, of sum 1: a pair of kinds as much as the shares of both."""
    _, what, count = kind.unique(return_inverse=True, return_counts=True)
    single = count[what] == 1  # has no partner of its kind; such samples make a kind together
    group = torch.where(single, -1, what)
    same = (group[:, None] == group).double()
    size = same.sum(1)
    weight = torch.where(same > 0, (size / (size - 1).clamp_min(1))[:, None], torch.ones_like(same))
    weight.fill_diagonal_(0)
    return weight / weight.sum()


def _halves(n: int, repeats: int, generator: torch.Generator) -> Tensor:
    """Draw random halves of n samples as zeros and ones, ``(repeats, n)``."""
    order = torch.rand(repeats, n, generator=generator).argsort(dim=1)
    return (order < n // 2).float()


def _quantile_pairs(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which sorted samples of two sets belong together, and the share of each pair: optimal transport on a line."""
    common = math.lcm(n, m)
    ends = torch.unique(torch.cat([torch.arange(n + 1) * (common // n), torch.arange(m + 1) * (common // m)]))
    begin, width = ends[:-1], ends.diff()
    return begin // (common // n), begin // (common // m), width / common


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # By differences: inner products leave equal samples at a distance of 1e-3.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _check(real: Tensor, fake: Tensor, least: int) -> int:
    """Check two sets and return the size of the first."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"The sets have shapes {tuple(real.shape)} and {tuple(fake.shape)}, but must be (n, d) and (m, d)."
        )
    if min(len(real), len(fake)) < least:
        raise ValueError(f"Each set needs at least {least} samples; got {len(real)} and {len(fake)}.")
    return len(real)
