"""What can be seen of NCCL's side without a card: who is asked what."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from training.cards import Source, Steps


class Asked:
    def __init__(self, fails: bool = False) -> None:
        self.questions: list[tuple[str, list[Any]]] = []
        self.aborted, self._fails = 0, fails

    def ask(self, what: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._fails:
            raise ConnectionError("engine 1 ended")
        self.questions.append((what, list(arguments)))
        return [None] * len(arguments)

    def abort(self) -> None:
        self.aborted += 1


def test_every_engine_is_asked_each_step_and_has_a_place_of_its_own_in_the_group() -> None:
    asked = Asked()
    steps = Steps(asked.ask, 2, asked.abort)
    steps.init_weight_transfer_engine({"rank_offset": 1, "world_size": 3})
    steps.start_weight_update()
    steps.update_weights({"names": ["a"]})
    steps.finish_weight_update()
    places = [{"rank_offset": 1, "world_size": 3}, {"rank_offset": 2, "world_size": 3}]
    assert asked.questions == [
        ("transfer", [("init_weight_transfer_engine", place) for place in places]),
        ("transfer", [("start_weight_update",)] * 2),
        ("transfer", [("update_weights", {"names": ["a"]})] * 2),
        ("transfer", [("finish_weight_update",)] * 2),
    ]
    assert asked.aborted == 0


def test_a_broadcast_to_an_engine_that_is_gone_is_ended() -> None:
    asked = Asked(fails=True)
    steps = Steps(asked.ask, 2, asked.abort)
    with pytest.raises(ConnectionError, match="engine 1"):
        steps.update_weights({})
    assert asked.aborted == 1


@pytest.mark.vllm
def test_what_is_said_of_the_weights_is_what_is_sent_and_a_tied_one_goes_once() -> None:
    source, tied = Source(), torch.ones(3, 2, dtype=torch.bfloat16)
    source.state = {"embed": tied, "norm": torch.zeros(2), "head": tied}
    sent = [(name, x.dtype, tuple(x.shape)) for name, x in source]
    assert sent == [("embed", torch.bfloat16, (3, 2)), ("norm", torch.float32, (2,))]
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == sent
    assert [name for name, _ in source] == ["embed", "norm"]
