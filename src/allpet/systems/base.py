"""What the training recipes share: the optimiser."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule


class CosineSystem(LightningModule):
    """A system trained by AdamW with linear warm-up and a cosine decay to zero at the planned last step.

    Args:
        learning_rate: the peak.
        warmup_steps: steps until the peak.
        weight_decay: of AdamW.
    """

    def __init__(self, learning_rate: float, warmup_steps: int, weight_decay: float) -> None:
        super().__init__()
        self.learning_rate, self.warmup_steps, self.weight_decay = learning_rate, warmup_steps, weight_decay

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters; the trainer knows how many steps are planned."""
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            fused=self.trainer.precision in ("32-true", "bf16-mixed"),
        )
        steps = max(int(self.trainer.estimated_stepping_batches), 1)

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            share = min((step - self.warmup_steps) / max(steps - self.warmup_steps, 1), 1.0)
            return 0.5 * (1 + math.cos(math.pi * share))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
