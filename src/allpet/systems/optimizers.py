"""The optimiser both stages share."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule


def cosine_adamw(
    system: LightningModule, learning_rate: float, warmup_steps: int, weight_decay: float
) -> dict[str, Any]:
    """AdamW over the trainable parameters, with linear warm-up and a cosine decay to zero at the planned last step.

    Args:
        system: whose parameters; its trainer knows how many steps are planned.
        learning_rate: the peak.
        warmup_steps: steps until the peak.
        weight_decay: of AdamW.

    Returns:
        what ``configure_optimizers`` returns.
    """
    parameters = [parameter for parameter in system.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=parameters[0].device.type == "cuda"
    )
    steps = max(int(system.trainer.estimated_stepping_batches), 1)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        share = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * share))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
