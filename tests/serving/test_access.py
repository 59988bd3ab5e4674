import sqlite3
from pathlib import Path

import pytest

from contracts.access import Principal
from contracts.errors import AccessDenied, InvalidInput, NotFound
from serving.access import KeyStore, agreed_notice
from tests.fakes import FixedConsent


def test_key_opens_what_its_owner_may(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite", clock=lambda: 5.0)
    key, key_id = keys.create("ann", production=True)
    assert key.startswith("il-")
    # 256 bits in base64 without padding are 43 characters.
    assert len(key) == len("il-") + 43
    assert keys.authenticate(f"Bearer {key}") == Principal("ann", key_id, production=True)
    assert keys.authenticate(f"bearer  {key} ").user_id == "ann"
    (info,) = keys.list()
    assert (info.principal.key_id, info.created, info.revoked) == (key_id, 5.0, None)


@pytest.mark.parametrize("project", ["", "my shop", "caf\u00e9", "a\nb", "p" * 65])
def test_a_project_is_what_a_header_can_say(tmp_path: Path, project: str) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite")
    with pytest.raises(InvalidInput, match="project: expected"):
        keys.create("ann", project=project)
    assert keys.list() == []


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer il-wrong", "Basic x"])
def test_everything_else_is_denied(tmp_path: Path, header: str | None) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite")
    keys.create("ann")
    with pytest.raises(AccessDenied):
        keys.authenticate(header)


def test_revoked_key_opens_nothing_in_another_process_either(tmp_path: Path) -> None:
    keys, other = KeyStore(tmp_path / "keys.sqlite"), KeyStore(tmp_path / "keys.sqlite")
    key, key_id = keys.create("ann")
    assert other.authenticate(f"Bearer {key}").user_id == "ann"
    keys.revoke(key_id)
    with pytest.raises(AccessDenied):
        other.authenticate(f"Bearer {key}")
    with pytest.raises(NotFound):
        keys.revoke("key_unknown")


def test_file_does_not_hold_the_key(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "keys.sqlite")
    key, _ = keys.create("ann")
    keys.close()
    dump = "\n".join(sqlite3.connect(tmp_path / "keys.sqlite").iterdump())
    assert "ann" in dump
    assert key.removeprefix("il-") not in dump


@pytest.mark.parametrize(
    ("principal", "playground", "shown", "expected"),
    [
        (Principal("ann", "k"), False, None, "v2"),
        (Principal("ann", "k"), True, "v2", "v2"),
        (Principal("ann", "k"), True, "v1", None),
        (Principal("ann", "k"), True, None, None),
        (Principal("ann", "k", production=True), False, None, None),
        (Principal("bob", "k"), False, None, None),
        (Principal("bob", "k"), True, "v2", None),
    ],
)
def test_notice_under_which_a_completion_may_be_recorded(
    principal: Principal, playground: bool, shown: str | None, expected: str | None
) -> None:
    consent = FixedConsent({"ann": "v2"})
    assert agreed_notice(principal, consent, playground=playground, shown_notice=shown) == expected
