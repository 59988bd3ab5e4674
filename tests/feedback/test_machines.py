import pytest
from hypothesis import Phase
from hypothesis.stateful import rule

from contracts.v1 import events_pb2 as pb
from tests.feedback.machines import MACHINES, PEOPLE, ConsentMachine, LogMachine, Machine, steps_of


class Forgetful(ConsentMachine):
    """Only the model erases."""

    @rule(user=PEOPLE)
    def erase(self, user: str) -> None:
        self.closed.add(user)
        self.readable = {c: u for c, u in self.readable.items() if u != user}


class Doubling(LogMachine):
    """What is appended comes twice, under two ids."""

    @rule(user=PEOPLE)
    def append(self, user: str) -> None:
        event = self.spoken(user)
        copy = pb.Event.FromString(event.SerializeToString())
        copy.id = self.spoken(user).id
        self.log.append([event, copy])
        self._added(event)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_model_holds_in_any_order(machine: type[Machine]) -> None:
    assert steps_of(machine, runs=15) > 100


@pytest.mark.parametrize("broken", [Forgetful, Doubling])
def test_a_log_that_does_something_else_is_found(broken: type[Machine]) -> None:
    with pytest.raises(AssertionError):
        steps_of(broken, runs=50, database=None, phases=(Phase.generate,))
