"""Engines in processes of their own, on devices of their own; behind load, sample and close, one.

A process is asked one thing at a time, over a pipe, and ends with the trainer. Weights come through
memory that it shares with the trainer or, from card to card, by NCCL.
"""

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from contracts.errors import InstructloopError, InvalidInput
from training import ranks
from training.cards import Cards
from training.engine_process import Failure, serve
from training.memory import Memory
from training.rollout import Sampled, built_for_processors, environment

SEED_BITS = 62
# How long a process whose pipe is closed may take to end.
END_S = 10.0


class EngineFailed(InstructloopError):
    """An engine's process ended, or says what went wrong in it."""


class Engines:
    """`count` engines of this machine, of which each rank has its part. Where one fails, those of
    its rank are ended.

    A prompt's responses depend on weights, seed and its place among the prompts; which engine draws
    them, and how many there are, changes no more than the rounding.
    """

    def __init__(self, count: int, engine: Callable[..., Any]) -> None:
        """Each process makes its own `engine`; where that has a card, with `transfer=True`. For the
        main thread: a process ends with the thread that made it. Raises InvalidInput, EngineFailed.
        """
        cards = visible_cards()
        own = environments(count, cards)
        make = partial(engine, transfer=True) if cards else engine
        self._on_cards, self._version, self._memory = bool(cards), 0, Memory()
        self._cards: Cards | None = None
        first = ranks.rank() * len(own)
        self._processes = [Process(first + i, x, self._memory, make) for i, x in enumerate(own)]
        self._each("start", [()] * len(own))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the weights of all engines, at once. Raises EngineFailed."""
        engines = len(self._processes)
        device = next(iter(state.values())).device
        if self._on_cards and device.type == "cuda":
            self._cards = self._cards or Cards(self._each, engines, device)
            self._cards.send(state)
        else:
            self._each("load", [(self._memory.write(state),)] * engines)
        self._version += 1
        self._each("label", [(self._version,)] * engines)

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        """`samples` responses to each prompt, which are dealt to the engines in turn. Raises
        EngineFailed.
        """
        draw, engines = random.Random(seed), len(self._processes)
        seeds = [draw.getrandbits(SEED_BITS) for _ in prompts]
        parts = [
            (prompts[i::engines], max_tokens, seeds[i::engines], samples)
            for i in range(min(engines, len(prompts)))
        ]
        drawn: list[list[Sampled]] = [[] for _ in prompts]
        for i, part in enumerate(self._each("sample", parts)):
            if part.version != self._version:
                name, asked = self._processes[i].name, self._version
                self.close()
                raise EngineFailed(f"{name} drew on weights {part.version}, asked were {asked}")
            drawn[i::engines] = part.responses
        return drawn

    def close(self) -> None:
        """End the processes, and free what they shared."""
        for process in self._processes:
            process.connection.close()
        for process in self._processes:
            process.end()
        self._processes = []
        self._memory.close()

    def _each(self, what: str, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Ask the first engines, each with arguments of its own, all at once; their answers."""
        if not self._processes:
            raise EngineFailed("the engines have ended")
        waiting = {process.connection: i for i, process in enumerate(self._processes[: len(asked)])}
        answers: list[Any] = [None] * len(asked)
        try:
            for process, arguments in zip(self._processes, asked, strict=False):
                process.ask(what, arguments)
            while waiting:
                for connection in wait(list(waiting)):
                    i = waiting.pop(connection)  # type: ignore[call-overload]  # one of them
                    answers[i] = self._processes[i].answer()
        except BaseException:
            for process in self._processes:
                process.kill()
            self.close()
            raise
        return answers


def visible_cards() -> list[str]:
    """The names of this machine's cards, as CUDA_VISIBLE_DEVICES has them; none where vLLM is built
    for processors, whose engines draw there whatever the trainer learns on.
    """
    if not torch.cuda.is_available() or built_for_processors():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def environments(count: int, cards: Sequence[str]) -> list[dict[str, str]]:
    """What this rank's engines find in their environment: a card each of those after the first,
    which is the rank's own (instructloop/crew.py); without cards the same share of the processor's
    threads. Raises InvalidInput.
    """
    size = ranks.size()
    if count % size:
        raise InvalidInput("ppo.engines", f"a multiple of the {size} ranks", count)
    own = ranks.part(range(count))
    if not cards:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        return [{"OMP_NUM_THREADS": str(threads)} for _ in own]
    free = cards[1:]
    if count > len(free):
        raise InvalidInput("ppo.engines", f"at most {len(free)}, the cards that no rank has", count)
    return [{"CUDA_VISIBLE_DEVICES": free[i]} for i in own]


class Process:
    """The trainer's side of an engine."""

    def __init__(
        self, number: int, variables: dict[str, str], memory: Memory, make: Callable[..., Any]
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name = f"engine {number}"
        self.connection, theirs = spawn.Pipe()
        arguments = (theirs, os.getpid(), memory, make)
        self._process = spawn.Process(target=serve, args=arguments, name=self.name, daemon=True)
        with environment(**variables):
            self._process.start()
        theirs.close()

    def ask(self, what: str, arguments: tuple[Any, ...]) -> None:
        """Raises EngineFailed."""
        try:
            self.connection.send((what, arguments))
        except OSError:
            raise self._ended() from None

    def answer(self) -> Any:
        """Raises EngineFailed, with the text of what the engine raised."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Failure):
            failed = EngineFailed(f"{self.name}: {answer.text}")
            failed.add_note(answer.trace)
            raise failed
        return answer

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """It ends by itself when its pipe is closed, unless it is busy."""
        self.connection.close()
        self._process.join(END_S)
        self._process.kill()
        self._process.join()
        self._process.close()

    def _ended(self) -> EngineFailed:
        self._process.join(END_S)
        code = self._process.exitcode
        how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with status {code}"
        return EngineFailed(f"{self.name} (process {self._process.pid}) ended {how}")
