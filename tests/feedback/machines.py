"""State machines: any order of what can happen to consent and to a log, beside a simple model."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from contracts.errors import InvalidEvent
from contracts.log import follow
from contracts.v1 import events_pb2 as pb
from feedback.log.embedded import EmbeddedLog
from feedback.vault import open_events
from tests.feedback.log_backends import Embedded
from tests.feedback.samples import completion, consent

TOPIC = "completions"
# In memory: what a disk does with a file is another question, and most of the time.
_MEMORY = Path("/dev/shm")  # noqa: S108
PEOPLE = st.sampled_from(("ann", "bob"))


class Machine(RuleBasedStateMachine):
    """Counts the steps that were made, over all runs, and has a folder for each run."""

    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None)
        self.close: Callable[[], None] = lambda: None
        self.count = 0
        self.checked = -1  # before the first step, too

    @invariant()
    def one_step_more(self) -> None:
        self.checked += 1

    def spoken(self, user: str) -> pb.Event:
        self.count += 1
        return completion(user, f"c{self.count}", f"{user} {self.count}")

    def teardown(self) -> None:
        type(self).steps += max(0, self.checked)
        self.close()
        self.folder.cleanup()


class ConsentMachine(Machine):
    """People agree, speak, erase in any order; a dictionary says what must be readable."""

    def __init__(self) -> None:
        super().__init__()
        self.log = open_events(f"sqlite:///{self.folder.name}/log.db")
        self.close = self.log.close
        self.readable: dict[str, str] = {}
        self.closed: set[str] = set()

    @rule(user=PEOPLE)
    def agree(self, user: str) -> None:
        self.log.append([consent(user)])
        self.closed.discard(user)

    @rule(user=PEOPLE)
    def speak(self, user: str) -> None:
        event = self.spoken(user)
        self.log.append([event])
        if user not in self.closed:
            self.readable[event.completion.completion_id] = user

    @rule(user=PEOPLE)
    def erase(self, user: str) -> None:
        self.log.erase(user)
        self.closed.add(user)
        self.readable = {c: u for c, u in self.readable.items() if u != user}

    @invariant()
    def exactly_what_nobody_erased_can_be_read(self) -> None:
        events = [record.event for record in follow(self.log, TOPIC, {})]
        assert {e.completion.completion_id: e.user_id for e in events} == self.readable


@dataclass(frozen=True)
class Entry:
    """What stands in the log: an event, or what is none, which was appended at no known time."""

    event: pb.Event | None
    at: float = 0.0


class LogMachine(Machine):
    """Events, copies, poison, mending, expiry and restarts in any order; a list is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = Embedded(Path(self.folder.name) / "log.db")
        self.now = 1.0
        self.entries: list[Entry] = []
        # All that was ever shown, and what one reader that goes on saw of it.
        self.shown: list[str] = []
        self.seen: list[str] = []
        self.positions: dict[int, int] = {}
        self.committed = 0
        self._open()

    def _open(self) -> None:
        self.log = EmbeddedLog(self.backend.file, lambda: self.now)
        self.close = self.log.close

    def _added(self, event: pb.Event) -> None:
        self.entries.append(Entry(event, self.now))
        self.shown.append(event.id)

    @rule(user=PEOPLE, count=st.integers(1, 3))
    def append(self, user: str, count: int) -> None:
        self.now += 1
        events = [self.spoken(user) for _ in range(count)]
        self.log.append(events)
        for event in events:
            self._added(event)

    @precondition(lambda self: any(entry.event for entry in self.entries))
    @rule(data=st.data())
    def append_again(self, data: st.DataObject) -> None:
        self.log.append([data.draw(st.sampled_from([e.event for e in self.entries if e.event]))])

    @rule(user=PEOPLE)
    def append_one_that_is_not_valid(self, user: str) -> None:
        bad = self.spoken(user)
        bad.schema_version = 99
        with suppress(InvalidEvent):
            self.log.append([self.spoken(user), bad])

    @rule(user=PEOPLE)
    def plant(self, user: str) -> None:
        self.backend.plant(TOPIC, user, b"\xff")
        self.entries.append(Entry(None))

    @precondition(lambda self: any(entry.event is None for entry in self.entries))
    @rule(user=PEOPLE, mended=st.booleans())
    def revive(self, user: str, mended: bool) -> None:
        letter, event = self.log.dead_letters()[0], self.spoken(user)
        if not mended:
            assert self.log.revive(letter)
            return
        self.now += 1
        assert self.log.revive(replace(letter, value=event.SerializeToString())) is None
        self.entries.remove(Entry(None))
        self._added(event)

    @rule(age=st.integers(0, 5))
    def expire(self, age: int) -> None:
        before = self.now - age
        self.log.expire(TOPIC, before)
        young = [i for i, entry in enumerate(self.entries) if entry.at >= before]
        self.entries = self.entries[young[0] :] if young else []

    @rule()
    def commit(self) -> None:
        self.committed = self.positions.get(0, 0)
        self.log.commit("machine", TOPIC, 0, self.committed)

    @rule()
    def restart(self) -> None:
        self.log.close()
        self._open()

    @invariant()
    def a_replay_shows_what_is_there_in_order(self) -> None:
        records = list(follow(self.log, TOPIC, {}))
        assert [r.event for r in records] == [e.event for e in self.entries if e.event]
        assert [r.offset for r in records] == sorted({r.offset for r in records})

    @invariant()
    def who_reads_on_sees_each_event_once(self) -> None:
        self.seen += [r.event.id for r in follow(self.log, TOPIC, self.positions)]
        assert self.seen == self.shown

    @invariant()
    def what_is_no_event_is_kept_and_a_position_is_remembered(self) -> None:
        letters = self.log.dead_letters()
        assert len(letters) == sum(entry.event is None for entry in self.entries)
        assert self.log.committed("machine", TOPIC, 0) == self.committed


MACHINES: tuple[type[Machine], ...] = (ConsentMachine, LogMachine)


def steps_of(machine: type[Machine], runs: int, **more: Any) -> int:
    """Runs of up to 50 steps; how many steps were made. Raises what the machine found."""
    before = machine.steps
    run_state_machine_as_test(
        machine, settings=settings(max_examples=runs, stateful_step_count=50, deadline=None, **more)
    )
    return machine.steps - before
