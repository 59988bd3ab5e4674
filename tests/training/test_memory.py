"""Weights in memory that processes share."""

import torch
from torch import Tensor

from training.memory import Memory

STATE = {
    "a": torch.arange(6.0).view(2, 3),
    "scalar": torch.tensor(7),
    "bf16": torch.tensor([0.5, -1.5, 3.0], dtype=torch.bfloat16),
    "turned": torch.arange(6.0).view(2, 3).t(),
}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0)


def test_what_was_written_is_read_as_it_was_and_what_is_written_next_replaces_it() -> None:
    memory = Memory()
    layout = memory.write(STATE)
    read = memory.read(layout)
    same(read, STATE)
    memory.write({name: x + 1 for name, x in STATE.items()})
    same(read, {name: x + 1 for name, x in STATE.items()})
    for shape in ((1000,), (3,)):
        other = {"other": torch.ones(shape)}
        same(memory.read(memory.write(other)), other)
    memory.close()
    memory.close()
