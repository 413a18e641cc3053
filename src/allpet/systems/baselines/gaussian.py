"""Gaussians fitted to training slices: the PCA-Gaussian over sinograms, and what VAE sampling draws latents from.

Linear mixes of consistent sinograms are consistent, so a Gaussian over principal components flatters consistency
numbers; it knows nothing of edges, and its samples look it.

Vocabulary. A *group* holds the training slices of one prompt and has a mean and a covariance of its own. A prompt that
several groups answer, such as one that is left open, draws the group first, by the number of its slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allpet.batches import SinogramBatch
from allpet.geometry import ParallelBeam
from allpet.pretrained import building, load_pretrained, save_pretrained
from allpet.prompts import Prompt, answers
from allpet.randomness import keyed_generator
from allpet.systems.baselines.base import SinogramGenerator


class PromptGaussian(nn.Module):
    """A Gaussian for each prompt: mean + factor^T e, with e standard normal; optionally plus independent noise.

    The rows of ``factor`` are principal axes times the standard deviation along them, so that factor^T factor is the
    covariance, or its best approximation of that rank. It never holds more numbers than the slices that it was fitted
    to, plus a mean and a standard deviation for each group.

    Args:
        groups: tracer:region of each group.
        counts: number of slices of each group.
        ranks: rows of each group's factor.
        shape: of what is drawn.
        diagonal: whether the variance outside the factor's span is added as independent noise for each element, which
            makes every element's variance exact.
    """

    def __init__(
        self,
        groups: Sequence[str],
        counts: Sequence[int],
        ranks: Sequence[int],
        shape: Sequence[int],
        diagonal: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "groups": list(groups),
            "counts": list(counts),
            "ranks": list(ranks),
            "shape": list(shape),
            "diagonal": diagonal,
        }
        self.known, self.counts = Prompt.of(list(groups)), torch.tensor(list(counts), dtype=torch.float64)
        self.ranks, self.shape, self.diagonal = list(ranks), tuple(shape), diagonal
        elements = math.prod(shape)
        for group, rank in enumerate(ranks):
            self.register_buffer(f"mean_{group}", torch.zeros(elements))
            self.register_buffer(f"factor_{group}", torch.zeros(rank, elements))
            if diagonal:
                self.register_buffer(f"std_{group}", torch.zeros(elements))

    @classmethod
    def fit(cls, values: Tensor, prompt: Prompt, rank: int | None = None, diagonal: bool = False) -> PromptGaussian:
        """Fit a Gaussian to the values of each prompt that occurs.

        Args:
            values: ``(slices, ...)``.
            prompt: of each slice.
            rank: principal axes to keep for each prompt; None keeps all, which is the full empirical covariance.
            diagonal: see the class.

        Raises:
            ValueError: if the rank is not positive or there are no slices.
        """
        if rank is not None and rank < 1:
            raise ValueError(f"rank is {rank}, but must be at least 1, or None for the full covariance.")
        names = prompt.names()
        if not names:
            raise ValueError("There are no slices to fit a Gaussian to: give at least one.")
        groups = list(dict.fromkeys(names))
        fitted = []
        for wanted in groups:
            rows = torch.tensor([name == wanted for name in names])
            fitted.append(_fit(values[rows].flatten(1).float().cpu(), rank))
        gaussian = cls(
            groups, [names.count(group) for group in groups], [len(f) for _, f, _ in fitted], values.shape[1:], diagonal
        )
        for group, (mean, factor, variance) in enumerate(fitted):
            gaussian.get_buffer(f"mean_{group}").copy_(mean)
            gaussian.get_buffer(f"factor_{group}").copy_(factor)
            if diagonal:
                rest = variance - factor.square().sum(0)
                gaussian.get_buffer(f"std_{group}").copy_(rest.clamp(min=0).sqrt())
        return gaussian

    def draw(self, prompt: Prompt, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw one value for each prompt, ``(batch, *shape)``, sample i from generator i, on this module's device.

        Raises:
            ValueError: if no training slice answers a prompt.
        """
        asked = list(zip(prompt.tracer.tolist(), prompt.region.tolist(), strict=True))
        weights = {words: self.counts * answers(words, self.known) for words in set(asked)}
        drawn = []
        for words, generator in zip(asked, generators, strict=True):
            group = int(torch.multinomial(weights[words], 1, generator=generator))
            mean, factor = self.get_buffer(f"mean_{group}"), self.get_buffer(f"factor_{group}")
            value = mean + torch.randn(len(factor), generator=generator).to(mean) @ factor
            if self.diagonal:
                noise = torch.randn(len(mean), generator=generator).to(mean)
                value = value + self.get_buffer(f"std_{group}") * noise
            drawn.append(value.view(self.shape))
        return torch.stack(drawn)


def _fit(values: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, factor and variances of ``(slices, elements)``; with one slice all variances are zero."""
    mean = values.mean(0)
    # covariance = X^T X = V S^2 V^T for X = U S V^T: S V^T is its factor
    centred = (values - mean) / math.sqrt(max(len(values) - 1, 1))
    most = min(len(values) - 1, values.shape[1])
    rank = most if rank is None else min(rank, most)
    _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
    return mean, spread[:rank, None] * axes[:rank], centred.square().sum(0)


class PCAGaussian(SinogramGenerator, nn.Module):
    """A Gaussian over the first principal components of the training sinograms of each prompt.

    Its samples lie in the span of the training slices of one prompt; like any Gaussian's, some of their bins are
    negative, and they are left so.

    Args:
        gaussian: over sinograms ``(1, views, bins)`` in data units.
        geometry: of the sinograms.
    """

    def __init__(self, gaussian: PromptGaussian, geometry: ParallelBeam) -> None:
        super().__init__()
        self.gaussian, self.geometry = gaussian, geometry

    @classmethod
    def fit(cls, slices: SinogramBatch, geometry: ParallelBeam, rank: int = 16) -> PCAGaussian:
        """Fit to slices, such as ``data.train_set[list(range(len(data.train_set)))]``.

        Args:
            slices: all that is trained on.
            geometry: of the slices.
            rank: principal components for each prompt.
        """
        return cls(PromptGaussian.fit(slices.sinogram, slices.prompt, rank), geometry)

    def generate(self, prompt: Prompt, seeds: Sequence[int]) -> Tensor:
        """Draw sinograms in data units, ``(batch, 1, views, bins)``."""
        return self.gaussian.draw(prompt, [keyed_generator(seed, "pca") for seed in seeds])

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write config.json, model.safetensors and README.md."""
        assert self.geometry is not None
        config = {"class": "PCAGaussian", "geometry": self.geometry.to_dict(), "gaussian": self.gaussian.config}
        save_pretrained(folder, config, self.gaussian.state_dict(), card)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PCAGaussian:
        """Load a folder written by ``save_pretrained``; raises as ``AutoencoderSystem.from_pretrained`` does."""
        config, weights = load_pretrained(folder, "PCAGaussian")
        with building(folder):
            gaussian = PromptGaussian(**config["gaussian"])
            gaussian.load_state_dict(weights)
            geometry = ParallelBeam(**config["geometry"])
        return cls(gaussian, geometry)
