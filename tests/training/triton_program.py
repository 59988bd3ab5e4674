"""What test_device.py starts with TRITON_INTERPRET=1: steps that call the kernels as on a GPU."""

import pickle
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from tests.training.letters import World
from tests.training.test_device import one_step
from training import kernels

asked: Counter[str] = Counter()


def as_on_a_gpu(impl: kernels.Impl | None, x: Tensor) -> bool:
    """In place of the question whether to be eager. Kernels read numbers in a row."""
    asked[sys._getframe(1).f_code.co_name] += 1
    assert x.is_contiguous() and x.dtype == torch.float32
    return impl == "eager"


def main() -> None:
    world: World = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301  the test's own
    setattr(kernels, "_eager", as_on_a_gpu)  # noqa: B010  in a process of its own
    one_step(world, Path(sys.argv[2]))
    wanted = {"statistics_", "logits_gradient_", "gae", "whiten", "kl_rewards", "policy_losses"}
    assert asked.keys() == wanted | {"value_losses", "ranking_loss"}, asked


if __name__ == "__main__":
    main()
