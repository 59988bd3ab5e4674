"""Cards: weights from the trainer's card into its engines', by vLLM's weight transfer over NCCL.

Not run yet on GPUs. All meet by an id that goes to the engines as any question does; vLLM's other
way to meet, a store at a port, asks nobody who he is.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor

# Asks every engine a question of its own, all at once, by name and arguments: Engines.
Ask = Callable[[str, Sequence[tuple[Any, ...]]], list[Any]]


class Cards:
    """A group of this process and its engines, in which it is rank 0."""

    def __init__(self, ask: Ask, engines: int, device: torch.device) -> None:
        """`device` is where the weights are. Raises what `ask` raises."""
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.distributed.weight_transfer.nccl_common import (
            NCCLWeightTransferInitInfo,
            uid_init_process_group,
            worker_init_payload,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        self._device, self._source = device, Source()
        unique, size = bytes(NCCLLibrary().ncclGetUniqueId().internal), 1 + engines
        group: Future[Any] = Future()

        def join() -> None:
            try:
                group.set_result(uid_init_process_group(unique, 0, size, device))
            except BaseException as e:  # noqa: BLE001  raised below
                group.set_exception(e)

        # NCCL waits for ever for an engine that is gone: the pipe tells, and nobody waits.
        Thread(target=join, daemon=True).start()
        steps = Steps(ask, engines, lambda: group.result().destroy())
        info = NCCLWeightTransferInitInfo(
            rank_offset=1,
            world_size=size,
            packed=True,
            nccl_unique_id_b64=base64.b64encode(unique).decode(),
        )
        steps.init_weight_transfer_engine(worker_init_payload(info))
        source: Any = self._source
        self._trainer = NCCLTrainerWeightTransferEngine(client=steps, source=source, packed=True)
        self._trainer.model_update_group = group.result()

    def send(self, state: Mapping[str, Tensor]) -> None:
        """Over when the engines have it."""
        self._source.state = state
        with torch.cuda.device(self._device):
            self._trainer.send_weights()
        self._source.state = {}


class Source:
    """vLLM's WeightSource: what is sent. A tied unembedding is the embedding, which goes once."""

    def __init__(self) -> None:
        self.state: Mapping[str, Tensor] = {}

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, x.dtype, tuple(x.shape)) for name, x in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        seen = set()
        for name, tensor in self.state.items():
            if (where := tensor.data_ptr()) not in seen:
                seen.add(where)
                yield name, tensor.detach()


class Steps:
    """vLLM's VLLMWeightSyncClient: each step is a step of every engine."""

    def __init__(self, ask: Ask, engines: int, abort: Callable[[], None]) -> None:
        """`abort` ends a broadcast that waits for an engine which is gone."""
        self._ask, self._engines, self._abort = ask, engines, abort

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        step = "init_weight_transfer_engine"
        offset = init_info["rank_offset"]
        infos = [{**init_info, "rank_offset": offset + i} for i in range(self._engines)]
        self._ask("transfer", [(step, info) for info in infos])

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        try:
            self._all("update_weights", update_info)
        except BaseException:
            self._abort()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")

    def _all(self, step: str, *args: Any) -> None:
        self._ask("transfer", [(step, *args)] * self._engines)
