"""Training on several ranks: each has a share of every weight and of every step's sequences.

Ranks are the processes of a torch.distributed group, as torchrun starts them; a process without a
group is the only rank, and nothing here changes what it does. What is written is written by rank 0.
"""

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from training import packing
from training.device import device_of
from training.packing import Tree

T = TypeVar("T")
# A sharded module's method that FSDP takes for a forward pass.
GATHERED = "gathered"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this rank is the one that writes."""
    return rank() == 0


def shard(model: nn.Module) -> None:
    """Keep this rank's share of every weight, and of its gradient and what an optimizer adds (FSDP,
    arXiv 2304.11277): a layer's weights are whole while it is computed, all others during a pass.

    Weights must be the same on every rank before. Gradients are sums over ranks.
    """
    if size() == 1:
        return
    mesh = init_device_mesh(device_of(model).type, (size(),))
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in (*layers, model):
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        setattr(module, GATHERED, MethodType(_on, module))
        register_fsdp_forward_method(module, GATHERED)


def gathered(module: Any, compute: Callable[..., Any], *args: Any) -> Any:
    """`compute(module, *args)` on the module's whole weights.

    FSDP gathers weights, and sums their gradients, around a module's own forward pass. A
    computation that goes around it has to say so, here. Of the outermost module it takes every
    tensor among `args` to a GPU: what is to stay on the processor is hidden in `compute`.
    """
    if isinstance(module, FSDPModule):
        return getattr(module, GATHERED)(compute, *args)
    return compute(module, *args)


def _on(module: nn.Module, compute: Callable[..., Any], *args: Any) -> Any:
    return compute(module, *args)


def passes(trees: Sequence[Tree], tokens: int) -> Iterator[tuple[list[int], float]]:
    """This rank's passes through `trees`, as indices, each with about as many tokens as `tokens`
    allows, and what they count: 1, or 0 where another rank has them too.

    Every rank makes as many, because weights are gathered from all for each. One that has nothing
    to do in a pass goes along with what does not count.
    """
    for part in packing.passes(trees, tokens * size()):
        own = part[rank() :: size()]
        yield own or part[:1], float(bool(own))


def part(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of what is dealt in order: everyone's, one after another, are all."""
    return items[len(items) * rank() // size() : len(items) * (rank() + 1) // size()]


def total(x: Tensor) -> Tensor:
    """The sum over ranks of `x`, in its place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def everyone(x: T) -> list[T]:
    """What each rank has here, in the order of ranks."""
    if size() == 1:
        return [x]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, x)
    return found


def complete(found: list[Tensor]) -> list[Tensor]:
    """Every place from a rank that filled it; where none did it stays empty."""
    places = zip(*everyone(found), strict=True)
    return [next((x for x in place if x.numel()), place[0]) for place in places]


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name, gathered on every rank; tied ones are one tensor."""
    named = model.state_dict(keep_vars=True)
    whole = {
        x: (x.full_tensor() if isinstance(x, DTensor) else x).detach()
        for x in dict.fromkeys(named.values())
    }
    return {name: whole[x] for name, x in named.items()}
