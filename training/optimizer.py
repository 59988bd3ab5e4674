"""Adam as the paper sets it, the two rate schedules of its stages, the average of weights."""

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.device import Precision


def adam(parameters: Iterable[nn.Parameter], rate: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """Adam with betas (0.9, 0.95) (C) and no weight decay, of the parameters that are not frozen;
    its moments are there from the start, so that a checkpoint can be read into them.
    """
    weights = [x for x in parameters if x.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=rate, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True
    )
    for x in weights:
        moments = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
        optimizer.state[x] = {"step": torch.zeros((), device=x.device), **moments}
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """One step along the gradients that were accumulated, cut to `max_norm`; their norm, a number
    on the device.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average in float32: average = decay * average + (1 - decay) * model."""
    for mean, new in zip(average.parameters(), model.parameters(), strict=True):
        if new.requires_grad:
            mean.lerp_(new, 1 - decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine_share(step: int, steps: int, final_share: float, warmup: int = 0) -> float:
    """Share of the full rate at `step` of `steps`: up over `warmup` steps, then a cosine down to
    `final_share`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_share(iteration: int, warmup: int) -> float:
    """From a tenth to 1 over `warmup` iterations, then constant (C.4)."""
    return 1.0 if warmup == 0 else min(1.0, 0.1 + 0.9 * iteration / warmup)


def autocast(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast around a forward pass on `device`, or nothing."""
    narrow = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if narrow else contextlib.nullcontext()
