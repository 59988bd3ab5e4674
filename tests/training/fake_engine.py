"""An engine that draws by arithmetic, and starts fast: it imports next to nothing."""

import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FakeSampled:
    """As training.rollout has it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class FakeEngine:
    """A response depends on its prompt, its seed and every weight."""

    def __init__(self, scratch: Path | None = None) -> None:
        """A file in `scratch` is named by this process."""
        self._weights = ""
        if scratch is not None:
            (scratch / str(os.getpid())).touch()

    def load(self, state: "Mapping[str, Tensor]") -> None:
        self._weights = "".join(f"{n} {x.dtype} {x.tolist()}" for n, x in state.items())

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        seed: Sequence[int],
        samples: int = 1,
    ) -> list[list[FakeSampled]]:
        return [
            [self._draw(f"{p}{own + k}", max_tokens) for k in range(samples)]
            for p, own in zip(prompts, seed, strict=True)
        ]

    def close(self) -> None:
        pass

    def _draw(self, of: str, max_tokens: int) -> FakeSampled:
        draw = random.Random(of + self._weights)
        ids = tuple(draw.randrange(1, 200) for _ in range(draw.randint(1, max_tokens)))
        return FakeSampled(ids, tuple(-6 * draw.random() for _ in ids), draw.random() < 0.5)


class Slow(FakeEngine):
    """Draws for ten minutes."""

    def sample(self, *_: object) -> list[list[FakeSampled]]:
        time.sleep(600)
        raise AssertionError


class Unstartable(FakeEngine):
    def __init__(self) -> None:
        raise ValueError("no such model")
