from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.e2e.markers import leaks, marker, search


def test_what_may_not_be_kept_is_nowhere(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert found.leaked == {}
    assert found.markers == 9 and found.requests > 250
    written = {path.name for path in (tmp_path / "service").iterdir()}
    assert written >= {"log.db", "server.log", "traces", "metrics"}
    assert b"/v1/chat/completions" in (tmp_path / "service" / "traces").read_bytes()


def test_a_server_that_logs_prompts_is_found(tmp_path: Path) -> None:
    found = search(tmp_path, careless=True)
    assert len(found.leaked) == 7  # all but the authors, whose words came with files
    assert set(found.leaked.values()) == {"server.log"}


def test_a_marker_is_found_in_any_file(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "text.log").write_text(f"ValueError: {marker('never')}", encoding="utf-8")
    pq.write_table(pa.table({"said": [marker("erased")] * 9}), tmp_path / "rows.parquet")
    found, size = leaks(tmp_path, ("never", "erased", "production"))
    assert found == {marker("never"): "text.log", marker("erased"): "rows.parquet"}
    assert size > 200
