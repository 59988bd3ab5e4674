import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from contracts.errors import LogUnavailable
from contracts.log import DeadLetter, follow
from feedback.log.embedded import EmbeddedLog
from instructloop.letters import Letters
from tests.feedback.log_backends import Embedded
from tests.feedback.samples import consent

NO_EVENT = {"topic": "consents", "reason": "not an Event in protobuf's wire format"}


def test_dead_letters_are_told_by_topic_and_reason_until_they_come_back(tmp_path: Path) -> None:
    backend, told = Embedded(tmp_path / "log.db"), CollectorRegistry()
    with closing(backend.open()) as log:
        letters = Letters(log)
        told.register(letters)
        for value in (b"\xffsecret", b"\xffsecret too"):
            backend.plant("consents", "ann", value)
        list(follow(log, "consents", {}))
        counted(letters)
        assert told.get_sample_value("instructloop_dead_letters", NO_EVENT) == 2
        assert b"secret" not in generate_latest(told)
        for letter in log.dead_letters():
            log.revive(replace(letter, value=consent("ann").SerializeToString()))
        counted(letters)
        assert told.get_sample_value("instructloop_dead_letters", NO_EVENT) is None


def counted(letters: Letters) -> None:
    """Wait for a count of what is there now: one that goes on may have begun before."""
    for _ in range(2):
        letters.count().join()


class Away(EmbeddedLog):
    """A log that lets its reader wait, and then does not answer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.waited, self.answers = threading.Event(), threading.Event()

    def dead_letters(self) -> list[DeadLetter]:
        self.waited.set()
        self.answers.wait(30)
        raise LogUnavailable("it does not answer")


def test_a_log_that_does_not_answer_holds_up_no_metric(tmp_path: Path) -> None:
    told = CollectorRegistry()
    with closing(Away(tmp_path / "log.db")) as log:
        letters = Letters(log)
        told.register(letters)
        for _ in range(2):
            assert b"instructloop_dead_letters{" not in generate_latest(told)
            assert log.waited.wait(10)
        log.answers.set()
        counted(letters)
        assert b"instructloop_dead_letters{" not in generate_latest(told)
