"""Memory: tensors in memory without a name, which processes share.

It is gone with the last process that has it, however that ends, and is bounded by no mount of
/dev/shm.
"""

import mmap
import os
from collections.abc import Mapping
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

# Where each tensor begins, its dtype, its shape.
Layout = dict[str, tuple[int, torch.dtype, torch.Size]]
ALIGNMENT = 64


class Memory:
    """Given to a process as it starts, it is the same memory there. Linux only."""

    def __init__(self) -> None:
        self._file = os.memfd_create("weights")
        self._mapped: mmap.mmap | None = None

    def write(self, state: Mapping[str, Tensor]) -> Layout:
        """Copy tensors in, over those before them. Nobody may read meanwhile."""
        layout: Layout = {}
        end = 0
        for name, tensor in state.items():
            layout[name] = (end, tensor.dtype, tensor.shape)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        os.ftruncate(self._file, end)
        for name, there in self.read(layout).items():
            there.copy_(state[name])
        return layout

    def read(self, layout: Layout) -> dict[str, Tensor]:
        """What was written last, not copied."""
        if self._mapped is None or len(self._mapped) != os.fstat(self._file).st_size:
            self._mapped = mmap.mmap(self._file, 0)
        whole = torch.frombuffer(self._mapped, dtype=torch.uint8)
        return {
            name: whole[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (at, dtype, shape) in layout.items()
        }

    def close(self) -> None:
        """Let go of it; tensors that were read stay until they are gone."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._mapped = -1, None

    def __getstate__(self) -> Any:
        return DupFd(self._file)

    def __setstate__(self, file: Any) -> None:
        self._file, self._mapped = file.detach(), None
