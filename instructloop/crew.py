"""A program that runs on rank 0, and the jobs in it that all ranks do together."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

# How long a rank waits for the next job: as long as anything that rank 0 does alone may take.
PATIENCE = timedelta(days=7)
# What torchrun tells its processes, by how the names of variables begin. An engine in one of them
# would take it to heart.
TOLD = (
    *("TORCHELASTIC_", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"),
    *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_"),
)


class Together(Protocol):
    """Does a job, which is a function of a module with arguments that can be pickled; gives what it
    gave on rank 0.
    """

    def __call__(self, job: Callable[..., Any], *args: Any) -> Any: ...


def alone(job: Callable[..., Any], *args: Any) -> Any:
    """Where there is one rank."""
    return job(*args)


def lead(program: Callable[[Together], object]) -> None:
    """Run `program` with what does its jobs. Started by torchrun, rank 0 runs it, and the others do
    its jobs until it ends.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        program(alone)
        return
    crew = Crew()
    if crew.rank == 0:
        program(crew.together)
        crew.dismiss()
    else:
        crew.follow()


def cards_for(environment: Mapping[str, str], count: int) -> str:
    """What CUDA_VISIBLE_DEVICES has to say to a rank on a machine of `count` cards: the one of its
    own, then those that no rank has, for engines; none where there are more ranks than cards.

    So a rank's card has one name, the first, in every thread, for an engine that it starts, and in
    what ranks send each other.
    """
    seen = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    cards = [card for card in seen.split(",") if card]
    own, size = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    return ",".join([cards[own], *cards[size:]]) if len(cards) >= size else ""


class Crew:
    """The ranks that torchrun started.

    They are a process group for the time of a job only: in a group, an engine that rank 0 starts
    for itself would wait for engines of the others.
    """

    def __init__(self) -> None:
        if count_of_cards := torch.cuda.device_count():  # which does not yet open them
            os.environ["CUDA_VISIBLE_DEVICES"] = cards_for(os.environ, count_of_cards)
        again = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store, self.rank, self._size = next(rendezvous("env://", timeout=PATIENCE))
        self._store = PrefixStore(f"crew-{again}", store)
        self._numbers = count()
        for name in [n for n in os.environ if n.startswith(TOLD)]:
            del os.environ[name]

    def together(self, job: Callable[..., Any], *args: Any) -> Any:
        number = next(self._numbers)
        self._store.set(str(number), "job")
        return self._do(number, (job, args))

    def follow(self) -> None:
        """Do jobs until there is none any more."""
        for number in self._numbers:
            if self._store.get(str(number)) != b"job":
                return
            self._do(number, None)

    def dismiss(self) -> None:
        self._store.set(str(next(self._numbers)), "end")

    def _do(self, number: int, job: tuple[Callable[..., Any], tuple[Any, ...]] | None) -> Any:
        store = PrefixStore(f"job-{number}", self._store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self._size, timeout=PATIENCE
        )
        try:
            told = [job]
            dist.broadcast_object_list(told)
            assert told[0] is not None
            function, args = told[0]
            return function(*args)
        finally:
            if dist.is_initialized():  # an engine that ended took the group along
                dist.destroy_process_group()
