from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from contracts.log import Log, follow
from contracts.v1 import events_pb2 as pb
from feedback.consent import ConsentLedger, ConsentState, Standing, fold
from feedback.log import open_log
from feedback.vault import open_events
from tests.feedback.samples import consent


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    yield log
    log.close()


def test_nobody_has_agreed_to_anything_at_first(log: Log) -> None:
    assert ConsentLedger(log).granted_notice("ann") is None


def test_the_ledger_sees_each_new_event_at_once(log: Log) -> None:
    ledger = ConsentLedger(log)
    log.append([consent("ann", version="1"), consent("bob", version="2")])
    assert (ledger.granted_notice("ann"), ledger.granted_notice("bob")) == ("1", "2")
    log.append([consent("ann", granted=False)])
    assert (ledger.granted_notice("ann"), ledger.granted_notice("bob")) == (None, "2")
    log.append([consent("ann", version="3")])
    assert ledger.granted_notice("ann") == "3"


def test_a_withdrawal_by_another_process_counts(log: Log, tmp_path: Path) -> None:
    ledger = ConsentLedger(log)
    log.append([consent("ann")])
    assert ledger.granted_notice("ann") == "1"
    other = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    other.append([consent("ann", granted=False)])
    other.close()
    assert ledger.granted_notice("ann") is None


def test_without_waiting_the_ledger_tells_what_is_current_or_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    with closing(open_events(url)) as log, closing(open_events(url)) as another_process:
        ledger = ConsentLedger(log)
        assert ledger.granted_notice("ann", wait=False) is None
        log.append([consent("ann")])
        with pytest.raises(BlockingIOError):
            ledger.granted_notice("ann", wait=False)
        assert ledger.granted_notice("ann") == "1"
        assert ledger.granted_notice("ann", wait=False) == "1"
        another_process.append([consent("ann", granted=False)])
        with pytest.raises(BlockingIOError):
            ledger.granted_notice("ann", wait=False)
        assert ledger.granted_notice("ann") is None
        with ledger._lock, pytest.raises(BlockingIOError):  # somebody reads a long log
            ledger.granted_notice("ann", wait=False)


def test_fold_keeps_the_time_of_the_last_withdrawal(log: Log) -> None:
    log.append(
        [
            consent("ann", at=1),
            consent("ann", granted=False, at=5),
            consent("ann", at=9),
            consent("bob", granted=False, at=7),
        ]
    )
    assert fold(follow(log, "consents", {})) == {
        "ann": ConsentState.on_all(Standing(granted="1", withdrawn_at=5.0)),
        "bob": ConsentState.on_all(Standing(granted=None, withdrawn_at=7.0)),
    }


@pytest.mark.parametrize(
    ("state", "given_at", "allowed"),
    [
        (Standing(), 3.0, False),
        (Standing(granted="1"), 3.0, True),
        (Standing(granted=None, withdrawn_at=5.0), 6.0, False),
        (Standing(granted="1", withdrawn_at=5.0), 5.0, False),
        (Standing(granted="1", withdrawn_at=5.0), 5.1, True),
    ],
)
def test_what_was_given_before_a_withdrawal_stays_out(
    state: Standing, given_at: float, allowed: bool
) -> None:
    assert state.allows(given_at) is allowed


def test_purposes_are_granted_and_withdrawn_on_their_own(log: Log) -> None:
    ledger = ConsentLedger(log)
    some = consent("ann", at=1)
    some.consent.purposes.extend([pb.PURPOSE_TRAINING, pb.PURPOSE_READING])
    log.append([some])
    assert ledger.state("ann").purposes == ["training", "reading"]
    less = consent("ann", granted=False, at=5)
    less.consent.purposes.append(pb.PURPOSE_TRAINING)
    log.append([less])
    state = ledger.state("ann")
    assert state == ConsentState(Standing(None, 5.0), Standing(), Standing("1"))
    # Nothing is kept only to be read.
    assert (state.purposes, ledger.granted_notice("ann")) == (["reading"], None)
