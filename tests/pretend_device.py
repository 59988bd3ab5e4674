"""A device that is not there, for a process that has no GPU: what it holds meets nothing else.

Its tensors compute what a CPU computes, bit for bit, and say that they are on `pretend`. As on a
GPU, an operation on tensors of both sides is refused unless the other one is a single number,
random numbers are the device's own, and what makes the host wait is counted.

PyTorch takes one such device a process and never forgets it: what runs on it runs in a child.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "pretend"
# Operations that a GPU answers with a number, or with a shape, that depends on what it computed.
READING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
# What autocast multiplies in the narrow type, of that which is used here.
NARROW = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "linalg_vecdot")


class Held(Tensor):
    """A tensor of the device; its numbers are in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()


class _Mode(TorchDispatchMode):
    """For calls without a tensor of the device among what comes in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Backend(backend_registration._DummyBackendModule):
    """What torch.pretend is."""

    random = torch.Generator().get_state()

    def is_available(self) -> bool:
        """Not to who would copy by streams, of which there are none."""
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self) -> Tensor:
        return self.random.clone()

    def set_rng_state(self, state: Tensor) -> None:
        self.random = state.clone()


BACKEND = _Backend()
# How often the host waited, by what for.
waits: Counter[str] = Counter()


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Held) else x


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    inside = any(isinstance(x, Held) for x in given)
    outside = [x for x in given if not isinstance(x, Held) and x.dim()]
    if inside and outside and name != "copy_":
        raise RuntimeError(f"{func}: tensors of two devices")
    device = kwargs.get("device")
    there = inside if device is None else torch.device(device).type == NAME
    if name == "copy_":
        there = isinstance(args[0], Held)
    if why := _waits_for(name, args, kwargs, inside, there, outside):
        waits[why] += 1
    plain_args, plain_kwargs = tree_map(_held, args), tree_map(_held, kwargs)
    if inside or there:
        # A thread of the backward pass has as many threads below it as this sets, once.
        torch.get_num_threads()
        if device is not None and torch.device(device).type != "meta":
            plain_kwargs["device"] = torch.device("cpu")
    drawn = there and torch.Tag.nondeterministic_seeded in func.tags
    with _own_random() if drawn else _nothing():
        found = func(*plain_args, **plain_kwargs)
    # What was changed in place comes back as what came in.
    came = {
        id(plain): x
        for plain, x in zip(
            tree_leaves((plain_args, plain_kwargs)), tree_leaves((args, kwargs)), strict=True
        )
        if isinstance(x, Held)
    }

    def back(x: Tensor) -> Tensor:
        return came[id(x)] if id(x) in came else Held(x) if there else x

    return tree_map_only(Tensor, back, found)


def _waits_for(
    name: str, args: Any, kwargs: dict[str, Any], inside: bool, there: bool, outside: list[Tensor]
) -> str:
    """As CUDA has it: results that the host needs, copies that it did not say not to wait for."""
    if inside and name in READING:
        return name
    if inside and name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if inside and name in {"index", "index_put", "index_put_"}:
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
        return f"{name} by a mask" if masks else ""
    if name in {"_to_copy", "copy_"} and (inside or there):
        crosses = inside != there or bool(outside)
        patient = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        return "copy" if crosses and patient else ""
    return ""


@contextmanager
def _own_random() -> Iterator[None]:
    before = torch.get_rng_state()
    torch.set_rng_state(BACKEND.random)
    try:
        yield
    finally:
        BACKEND.random = torch.get_rng_state()
        torch.set_rng_state(before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _narrow(op: Any) -> Callable[..., Any]:
    """The operation on bf16, where autocast stands before it."""

    def cast(x: Any) -> Any:
        return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.dtype == torch.float32 else x

    def computed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            return op(*tree_map(cast, args), **kwargs)

    return computed


_libraries: list[torch.library.Library] = []


@contextmanager
def pretend_device() -> Iterator[None]:
    """Within the block `pretend` is a device. For a process of its own."""
    assert not _libraries, f"once a process, {os.getpid()}"
    backend_registration._setup_privateuseone_for_python_backend(NAME, BACKEND)
    _libraries[:] = [torch.library.Library(space, "IMPL") for space in ("_", "aten")]
    _libraries[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in NARROW:
        op = getattr(torch.ops.aten, name).default
        _libraries[1].impl(name, _narrow(op), "AutocastPrivateUse1")
    # Who has a kernel of it does not take it apart, which would round elsewhere. It is not reached.
    silu = torch.ops.aten.silu_backward.default
    _libraries[1].impl("silu_backward", silu, "PrivateUse1")
    # A module's weights stay themselves when they are moved, as they do on a GPU.
    torch.__future__.set_swap_module_params_on_conversion(True)
    mode: Any = _Mode
    with mode():
        yield
