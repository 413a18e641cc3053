"""What the training recipes share: the optimiser."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from allpet.optimizers import Muon, hidden_weights

OptimizerName = Literal["adamw", "muon"]


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def log_mean(system: LightningModule, values: Mapping[str, Tensor], size: int, prog_bar: bool = False) -> None:
    """Log means over the slices of a batch so that, over batches and processes, every slice counts the same.

    All processes must log the same names; what has no slice in a batch is logged with size 0.

    Args:
        system: that logs.
        values: means by name.
        size: number of slices that they are means over.
        prog_bar: whether the progress bar shows them.
    """
    # Lightning takes the mean of the processes' counts in the counts' own type: of 3 and 2 it would be 2
    count: Any = float(size)
    system.log_dict(values, prog_bar=prog_bar, batch_size=count, sync_dist=True)


def check_label(system: LightningModule, label_size: int) -> None:
    """See that a system that generates is told of all that its data module does to the slices.

    Args:
        system: attached to its trainer; without a data module nothing is done.
        label_size: length of the label that its network is told; 0 for none.

    Raises:
        ValueError: if the data module's label is another.
    """
    needed = getattr(getattr(system.trainer, "datamodule", None), "label_size", 0)
    if needed not in (0, label_size):
        raise ValueError(
            f"The data module turns, mirrors or mixes slices, and the network's label_size is {label_size}: give the "
            f"denoiser label_size {needed}, or the data neither symmetry nor mixup; else turned, mirrored or mixed "
            "patients would be generated."
        )


class CosineSystem(LightningModule, ABC):
    """A system trained with linear warm-up and a cosine decay to zero at the planned last step.

    Args:
        learning_rate: the peak.
        warmup_steps: steps until the peak.
        weight_decay: of either optimiser, decoupled.
        optimizer: "adamw", or "muon" for the hidden weights of ``backbone``, AdamW for the rest.
        others_factor: learning rate of that rest, in units of ``learning_rate``.

    Raises:
        ValueError: if the optimiser is unknown.
    """

    def __init__(
        self,
        learning_rate: float,
        warmup_steps: int,
        weight_decay: float,
        optimizer: OptimizerName = "adamw",
        others_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {optimizer!r}, but must be 'adamw' or 'muon'.")
        self.learning_rate, self.warmup_steps, self.weight_decay = learning_rate, warmup_steps, weight_decay
        self.optimizer, self.others_factor = optimizer, others_factor

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The network that is trained, without discriminators and the like."""

    def configure_optimizers(self) -> Any:
        """Optimise the trainable parameters; the trainer knows how many steps are planned.

        Raises:
            ValueError: if Muon is to update weights that are split over devices.
        """
        optimizer = self._muon() if self.optimizer == "muon" else self._adamw()
        steps = max(int(self.trainer.estimated_stepping_batches), 1)

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            share = min((step - self.warmup_steps) / max(steps - self.warmup_steps, 1), 1.0)
            return 0.5 * (1 + math.cos(math.pi * share))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which class the weights belong to."""
        checkpoint["system"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the weights with the networks before they are loaded.

        Raises:
            ValueError: if they are of another class, or of networks with other sizes.
        """
        kind, mine = checkpoint.get("system"), type(self).__name__
        if kind not in (None, mine):
            raise ValueError(f"The checkpoint is of {kind}, but {mine} is trained: name a checkpoint of that class.")
        own, given = (
            {name: value.shape for name, value in part.items()}
            for part in (self.state_dict(), checkpoint["state_dict"])
        )
        if own != given:
            differ = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise ValueError(
                f"The checkpoint holds other networks ({len(differ)} weights differ, such as {differ[0]}): give the "
                "sizes that it was trained with."
            )

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop before a loss that is no number spoils the weights; the last checkpoint stays good.

        Raises:
            Diverged: if the loss is NaN or infinite.
        """
        if not torch.isfinite(loss):
            raise Diverged(
                f"The loss is {float(loss.detach())} at step {self.global_step}: lower --model.learning_rate or check "
                "the data (make validate-data); the last checkpoint is from before."
            )

    def _adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=self.trainer.precision in ("32-true", "bf16-mixed"),
        )

    def _muon(self) -> torch.optim.Optimizer:
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError("Muon needs whole matrices, which FSDP splits: use --model.optimizer=adamw, or DDP.")
        hidden = [weight for weight in hidden_weights(self.backbone) if weight.requires_grad]
        known = set(map(id, hidden))
        others = [weight for weight in self.parameters() if weight.requires_grad and id(weight) not in known]
        return Muon(
            hidden, others, self.learning_rate, self.others_factor * self.learning_rate, weight_decay=self.weight_decay
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm in bfloat16, too: Lightning refuses with a fused optimiser, for the sake of float16's scaler."""
        if gradient_clip_val and self.trainer.precision == "bf16-mixed" and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
