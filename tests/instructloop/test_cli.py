import datetime as dt
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from contracts.errors import InvalidInput
from contracts.release import Canary, Release, ReleaseRegistry
from contracts.rollout import Replica
from instructloop.cli import app
from serving.access import KeyStore


@pytest.fixture
def registry(tmp_path: Path) -> ReleaseRegistry:
    """Two releases; replica a serves the second one."""
    registry = ReleaseRegistry(tmp_path / "registry")
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"weights")
    artifact = registry.artifacts.put("policy", tmp_path / "policy")
    for number in (1, 2):
        registry.publish(
            Release(
                id=f"r{number}",
                model="small",
                created=dt.datetime(2026, 1, number, tzinfo=dt.UTC),
                artifact=artifact,
                canary=Canary(token_ids=(1, 2), logprobs=(-0.5,)),
                parent="r1" if number == 2 else None,
                code_version="test",
            )
        )
    report(registry, "a", serving="r2")
    return registry


def report(
    registry: ReleaseRegistry, name: str, serving: str, age_s: float = 0, reason: str | None = None
) -> None:
    registry.rollout.report(
        Replica(
            name=name,
            at=dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age_s),
            state="serving",
            draining=False,
            running=0,
            serving=serving,
            target="r2",
            reason=reason,
        )
    )


def release(registry: ReleaseRegistry, *words: str) -> Result:
    return CliRunner().invoke(app, ["release", *words, "--registry", str(registry.root)])


def test_status_tells_whether_every_replica_serves_the_target(registry: ReleaseRegistry) -> None:
    report(registry, "lost", serving="r1", age_s=300)
    said = release(registry, "status")
    assert said.exit_code == 0
    assert said.output.splitlines()[:2] == ["target r2", "a  r2  serving  0 running"]
    assert "lost  r1  lost since" in said.output
    report(registry, "b", serving="r1", reason="canary: expected other numbers")
    said = release(registry, "status")
    assert said.exit_code == 1 and "canary: expected" in said.output


def test_status_fails_while_nobody_serves(tmp_path: Path) -> None:
    said = release(ReleaseRegistry(tmp_path / "empty"), "status")
    assert (said.exit_code, said.output) == (1, "target none\n")


def test_pin_swap_rollback_and_unpin_change_the_target(registry: ReleaseRegistry) -> None:
    assert release(registry, "swap", "r1").output == "r1\n"
    assert release(registry, "pin", "r2").output == "r2\n"
    assert release(registry, "status").output.startswith("target r2 (pinned)")
    assert release(registry, "rollback").output == "r1\n"
    assert registry.target_id() == "r1" and registry.pinned_id() == "r1"
    assert release(registry, "unpin").output == "r1\n"
    assert registry.pinned_id() is None


def test_share_sets_shows_and_takes_away_a_part_of_the_people(registry: ReleaseRegistry) -> None:
    assert release(registry, "share").output == ""
    assert release(registry, "share", "r1=0.25").output == "r1 0.25\n"
    assert release(registry, "share").output == "r1 0.25\n"
    for wrong in ("r1", "r1=", "r1=2"):
        error = release(registry, "share", wrong).exception
        assert isinstance(error, InvalidInput) and error.field == "share"
    assert release(registry, "share", "r1=0").output == ""
    assert registry.shares().parts == {}


def test_wrong_setting_of_a_server_is_named_before_a_model_is_read_or_a_key_made(
    tmp_path: Path,
) -> None:
    wrong = {"INSTRUCTLOOP_CONTENT_FILTER": "words:nowhere", "PYTHONPATH": str(Path.cwd())}
    said = subprocess.run(
        [sys.executable, "-m", "instructloop.cli", "serve", "--model", "nowhere"],
        cwd=tmp_path,
        env=os.environ | wrong,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert re.fullmatch("instructloop: INSTRUCTLOOP_CONTENT_FILTER: expected .*\n", said.stderr)
    assert KeyStore(tmp_path / "instructloop-data" / "keys.db").list() == []


def test_keys_are_listed_with_what_they_open_and_their_own_limits(tmp_path: Path) -> None:
    store, file = KeyStore(tmp_path / "keys.db"), str(tmp_path / "keys.db")
    _, plain = store.create("ann")
    _, bounded = store.create(
        "bob", True, ["complete"], "shop", requests_per_minute=60, tokens_per_minute=0
    )
    store.revoke(bounded)
    said = CliRunner().invoke(app, ["keys", "list", "--keys", file]).output.splitlines()
    assert set(said) == {
        f"{plain} active ann default complete,feedback",
        f"{bounded} revoked bob shop complete production requests=60/min tokens=0/min",
    }


def test_export_names_the_persons_keys_without_the_keys(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.db")
    key, key_id = keys.create("ann")
    keys.create("bob")
    words = ["consent", "export", "--user", "ann", "--log", f"sqlite:///{tmp_path}/log.db"]
    places = ["--registry", str(tmp_path / "registry"), "--keys", str(tmp_path / "keys.db")]
    said = CliRunner().invoke(app, [*words, *places])
    assert said.exit_code == 0, said.output
    (held,) = json.loads(said.output)["api_keys"]
    assert (held["id"], held["user_id"], held["revoked"]) == (key_id, "ann", None)
    assert key not in said.output


def test_a_command_that_was_started_in_the_background_of_a_script_ends_at_sigterm(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "rows")
    command = 'trap "" INT; exec "$@"'
    words = ["import", "hh", str(tmp_path / "rows"), "--log", f"sqlite:///{tmp_path}/log.db"]
    with (
        subprocess.Popen(
            ["sh", "-c", command, "sh", sys.executable, "-m", "instructloop.cli", *words]
        ) as process,
        (tmp_path / "rows").open("wb"),
    ):  # waits until it reads
        process.terminate()
        try:
            assert process.wait(60) > 0
        finally:
            process.kill()
