"""Where a stage computes: on the processor, or on a GPU beside it.

Weights, and all that is made of them, are there; what describes a pass through a model is worked
out on the processor and goes `across`.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Precision = Literal["fp32", "bf16"]
# Instructions of x86, and of Arm.
BF16_ARITHMETIC = ("avx512_bf16", "amx_bf16", "bf16")


def _that_is_there(given: object) -> object:
    """What "auto" stands for. A process sees the one GPU that is its own (instructloop/crew.py)."""
    if given not in ("auto", "cpu", "cuda"):
        raise PydanticCustomError("device", "Input should be auto, 'cpu' or 'cuda'")
    if given == "cpu":
        return given
    if torch.cuda.is_available():
        return "cuda"
    if given == "cuda":
        raise PydanticCustomError("device", "Input should be cpu or auto: PyTorch finds no GPU")
    return "cpu"


# "auto" is a GPU where there is one, and read as what it stands for.
Device = Annotated[Literal["cpu", "cuda"], BeforeValidator(_that_is_there)]


def fastest_precision(device: str) -> Precision:
    """bf16 where the device multiplies it; where a processor would have to imitate it, fp32 is 2 to
    2.5 times as fast.
    """
    if device == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        able = any(found.get(name) for name in BF16_ARITHMETIC)
    return "bf16" if able else "fp32"


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def moved(model: M, device: Device) -> M:
    """The model itself, with its weights on `device`."""
    nn.Module.to(model, device)
    return model


def across(x: T, device: torch.device) -> T:
    """What is on the processor, a tensor or made of some, on `device` for a pass there; on the
    processor itself as it is.

    Nobody waits for a copy. A pass that asks a GPU for a number waits for all it was given to do.
    """
    return x if device.type == "cpu" else _copied(x, device)


def _copied(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, list | tuple):
        return type(x)(_copied(part, device) for part in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: _copied(getattr(x, f.name), device) for f in fields(x)})
    return x


def random_states(device: str) -> dict[str, Tensor]:
    """Of torch's random numbers: the processor's and, where that is another one, the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        states[device] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random(states: dict[str, Tensor], device: str) -> None:
    """As they were. What was drawn on another device than this begins anew."""
    torch.set_rng_state(states["cpu"])
    if device != "cpu" and device in states:
        torch.get_device_module(device).set_rng_state(states[device])
