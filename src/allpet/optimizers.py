"""Muon: momentum whose matrices are orthogonalised, for trainings of a few hundred steps.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the learning rate of Liu et
al., "Muon is scalable for LLM training" (arXiv 2502.16982, eq. 4), so that AdamW's learning rates carry over.
experiments/benchmarks/optimizers.py compares the two.

``torch.optim.Muon`` takes two-dimensional parameters only, which excludes convolutions, and multiplies in bfloat16,
which processors without such units emulate a hundred times slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

# The quintic whose iteration drives all singular values towards 1 fastest (Jordan et al.); they end in 0.7 .. 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(Optimizer):
    """Muon for hidden weights and AdamW for all other parameters, in one optimiser.

    Args:
        hidden: weights of two or more dimensions, ``(out, in, ...)``; all but the first count as one.
        others: parameters that AdamW updates: biases, norms, embeddings, first and last layers.
        lr: learning rate of Muon.
        others_lr: learning rate of AdamW; None takes the same.
        weight_decay: decoupled, of both.
        momentum: Muon's; Nesterov's form.
        betas: AdamW's.
        eps: AdamW's.
        iterations: of Newton and Schulz.

    Raises:
        ValueError: if a hidden weight has fewer than two dimensions.
    """

    def __init__(
        self,
        hidden: Iterable[Tensor],
        others: Iterable[Tensor],
        lr: float = 1e-3,
        others_lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        iterations: int = 5,
    ) -> None:
        hidden = list(hidden)
        for weight in hidden:
            if weight.ndim < 2:
                raise ValueError(
                    f"A hidden weight has shape {tuple(weight.shape)}, but Muon needs two or more dimensions: give it "
                    "to others."
                )
        shared = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        groups: list[dict[str, Any]] = [
            {"params": hidden, "muon": True},
            {"params": list(others), "muon": False, "lr": lr if others_lr is None else others_lr},
        ]
        super().__init__([group for group in groups if group["params"]], {**shared, "iterations": iterations})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adamw)(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            average = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
            update = orthogonalize(weight.grad.lerp(average, group["momentum"]).flatten(1), group["iterations"])
            # An orthogonal matrix has entries of size 1 / sqrt(longer side); AdamW's updates are about 0.2.
            size = 0.2 * math.sqrt(max(update.shape))
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.view_as(weight), alpha=-group["lr"] * size)

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        names = ("exp_avg", "exp_avg_sq", "step")
        averages, squares, steps = ([self.state[parameter][name] for parameter in parameters] for name in names)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def hidden_weights(network: nn.Module) -> list[Tensor]:
    """Return the weights that Muon is meant for: of linear and convolutional layers but the first and the last.

    Args:
        network: its first and last layers are called ``conv_in`` and ``conv_out``, as diffusers does.
    """
    return [
        layer.weight
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.rsplit(".", 1)[-1] not in ("conv_in", "conv_out")
    ]


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Replace the singular values of a matrix by numbers near 1 (Newton and Schulz's iteration).

    Args:
        matrix: ``(rows, columns)``, float32: small singular values are lost in anything shorter.
        iterations: after five, singular values above 1/1000 of the Frobenius norm lie in 0.3 .. 1.2.

    Returns:
        the same shape.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-12)
    gram = wide @ wide.T
    # Every iterate is polynomial(gram) @ wide. Iterating on the small square gram matrix instead of the long one
    # saves most of the work, a convolution's weight being 9 times as long as wide.
    product: Tensor | None = None
    for iteration in range(iterations):
        factor = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        factor.diagonal().add_(_A)
        product = factor if product is None else factor @ product
        if iteration + 1 < iterations:
            gram = factor @ gram @ factor
    result = wide if product is None else product @ wide
    return result.T if matrix.shape[0] > matrix.shape[1] else result
