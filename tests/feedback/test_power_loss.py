"""When the power fails, every write that was not synced is gone: kill -9 cannot show that."""

from benchmarks.faults import lost_at_power_failures


def test_a_power_failure_takes_no_acknowledged_row() -> None:
    lost, rows = lost_at_power_failures(crashes=20, seed=1)
    assert lost == 0
    assert rows > 500


def test_without_a_sync_at_every_commit_it_does() -> None:
    lost, _ = lost_at_power_failures(crashes=3, seed=1, weak=True)
    assert lost > 0
