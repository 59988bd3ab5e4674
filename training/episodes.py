"""The policy's episodes, a rollout an iteration; with `overlap`, drawn one iteration ahead."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from training import ranks
from training.config import PpoConfig
from training.data import Order
from training.rollout import Engine, Rollout, Sampled, pack

# How far the seeds of ranks are apart: more than a run has iterations.
APART = 1_000_000_007

Prompt = Sequence[int]
Draw = Callable[[], list[list[Sampled]]]


def iteration_seed(config: PpoConfig, iteration: int) -> int:
    return config.seed * 1_000_003 + iteration


class Episodes:
    """Draws every rank's part on an engine of its own. What was drawn ahead and not yet learned
    from is part of its state.
    """

    def __init__(
        self,
        config: PpoConfig,
        sampler: Engine,
        weights: Callable[[], Mapping[str, Tensor]],
        prompts: Sequence[Prompt],
    ) -> None:
        """`weights` are those of the policy as it is when they are asked for."""
        self._config, self._sampler, self._weights = config, sampler, weights
        self._prompts, self._order = prompts, Order(len(prompts), config.seed)
        self._drawn: Rollout | None = None

    def take(self, iteration: int) -> Rollout:
        """The rollout of an iteration: what was drawn ahead, or else one on the weights of now."""
        if self._drawn is None:
            prompts, draw = self._begin(iteration)
            return self._collect(prompts, draw())
        rollout, self._drawn = self._drawn, None
        return rollout

    @contextmanager
    def ahead(self, iteration: int) -> Iterator[None]:
        """With `overlap`: while the block runs, the rollout of `iteration` is drawn on the weights
        that the block begins with. There is none after the last one.
        """
        if not self._config.overlap or iteration == self._config.iterations:
            yield
            return
        with ThreadPoolExecutor(1) as beside:
            prompts, draw = self._begin(iteration)
            drawing = beside.submit(draw)
            yield
        # Ranks meet here and not beside the block, in which they meet too.
        self._drawn = self._collect(prompts, drawing.result())

    def _begin(self, iteration: int) -> tuple[list[Prompt], Draw]:
        """The prompts of all ranks, and what draws this rank's responses; the engine has a copy of
        the weights.
        """
        config = self._config
        prompts = self._order.take(config.batch // config.samples_per_prompt)
        batch = [self._prompts[i] for i in prompts]
        self._sampler.load(self._weights())
        own, seed = ranks.part(batch), iteration_seed(config, iteration) + APART * ranks.rank()
        tokens, samples = config.max_response_tokens, config.samples_per_prompt
        return batch, partial(self._sampler.sample, own, tokens, seed, samples)

    def _collect(self, prompts: Sequence[Prompt], own: list[list[Sampled]]) -> Rollout:
        drawn = [response for part in ranks.everyone(own) for group in part for response in group]
        return pack(prompts, drawn, self._config.samples_per_prompt, self._config.device)

    def state_dict(self) -> dict[str, Any]:
        drawn = None if self._drawn is None else dict(vars(self._drawn.to("cpu")))
        return {"prompts": self._order.state_dict(), "drawn": drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.load_state_dict(state["prompts"])
        drawn = state["drawn"]
        self._drawn = Rollout(**drawn).to(self._config.device) if drawn else None
