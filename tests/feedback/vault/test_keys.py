import base64
import sqlite3
import threading
from pathlib import Path

import pytest

from contracts.errors import InvalidInput
from feedback.vault import open_vault, vault_path
from feedback.vault.keys import KeyVault, rotate
from feedback.vault.master import ENVIRONMENT, LocalMasterKeys

A, B = b"a" * 32, b"b" * 32


def test_a_person_keeps_one_key_and_two_people_have_two(tmp_path: Path) -> None:
    vault = KeyVault(tmp_path / "v.db", LocalMasterKeys([A]))
    first = vault.keys_for(["ann", "bob"])
    assert vault.keys_for(["bob", "ann"]) == first
    assert len({key for _, key in first.values()}) == 2 == len({i for i, _ in first.values()})
    assert vault.keys_named([first["ann"][0], "unknown"]) == {first["ann"][0]: first["ann"][1]}


def test_no_data_key_is_in_the_file_and_an_erased_one_not_even_wrapped(tmp_path: Path) -> None:
    vault = KeyVault(tmp_path / "v.db", LocalMasterKeys([A]))
    key_id, key = vault.keys_for(["ann"])["ann"]
    (wrapped,) = (
        sqlite3.connect(tmp_path / "v.db").execute("SELECT wrapped FROM data_keys").fetchone()
    )
    vault.erase("ann")
    content = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert key not in content and wrapped not in content and key_id.encode() not in content
    assert vault.keys_named([key_id]) == {} and vault.keys_for(["ann"]) == {}
    vault.readmit(["ann"])
    assert vault.keys_for(["ann"])["ann"][0] != key_id


def test_another_process_sees_an_erasure_at_once(tmp_path: Path) -> None:
    here, there = (KeyVault(tmp_path / "v.db", LocalMasterKeys([A])) for _ in range(2))
    key_id, _ = here.keys_for(["ann"])["ann"]
    assert there.keys_named([key_id])
    here.erase("ann")
    assert not there.keys_named([key_id])


def test_a_wrapped_key_opens_only_for_its_person_and_master(tmp_path: Path) -> None:
    master = LocalMasterKeys([A])
    master_id, wrapped = master.wrap(b"x" * 32, b"ann")
    assert master.unwrap(master_id, wrapped, b"ann") == b"x" * 32
    with pytest.raises(InvalidInput):
        master.unwrap(master_id, wrapped, b"bob")
    with pytest.raises(InvalidInput, match="the one named"):
        LocalMasterKeys([B]).unwrap(master_id, wrapped, b"ann")


def test_the_master_key_rotates_while_others_read_and_make_keys(tmp_path: Path) -> None:
    file = tmp_path / "v.master"
    server = KeyVault(tmp_path / "v.db", LocalMasterKeys.at(file, {}))
    before = server.keys_for([f"u{i}" for i in range(50)])
    old = file.read_bytes()
    failures, stop = list[BaseException](), threading.Event()

    def serve() -> None:
        count = 0
        try:
            while not stop.is_set():
                count += 1
                assert server.keys_named(i for i, _ in before.values())
                server.keys_for([f"new{count}"])
        except BaseException as e:  # noqa: BLE001  the test's thread has to tell
            failures.append(e)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(3):
        other = LocalMasterKeys.at(file, {})
        assert rotate(KeyVault(tmp_path / "v.db", other), other) >= 50
    stop.set()
    thread.join()
    assert failures == [] and file.read_bytes() != old
    # A fresh process knows only the last key, and every data key opens.
    fresh = KeyVault(tmp_path / "v.db", LocalMasterKeys.at(file, {}))
    rows = sqlite3.connect(tmp_path / "v.db").execute("SELECT key_id FROM data_keys").fetchall()
    assert len(fresh.keys_named(i for (i,) in rows)) == len(rows) > 50
    assert {u: k for u, (_, k) in before.items()} == {
        u: k for u, (_, k) in fresh.keys_for(before).items()
    }


def test_keys_from_the_environment_are_rotated_by_their_order(tmp_path: Path) -> None:
    a, b = (base64.b64encode(key).decode() for key in (A, B))
    path = tmp_path / "v.db"
    ids = KeyVault(path, LocalMasterKeys.at(tmp_path / "no", {ENVIRONMENT: a})).keys_for(["ann"])
    assert (
        KeyVault(path, LocalMasterKeys.at(tmp_path / "no", {ENVIRONMENT: f"{b},{a}"})).rewrap() == 1
    )
    last = KeyVault(path, LocalMasterKeys.at(tmp_path / "no", {ENVIRONMENT: b}))
    assert last.keys_for(["ann"]) == ids
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("wrong", ["", "short", "!" * 44])
def test_a_wrong_master_key_is_refused_by_name(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "m").write_text(wrong)
    with pytest.raises(InvalidInput, match="m: expected"):
        LocalMasterKeys.at(tmp_path / "m", {})


def test_the_master_key_file_is_the_owners_alone(tmp_path: Path) -> None:
    open_vault(f"sqlite:///{tmp_path}/log.db").close()
    assert (tmp_path / "log.vault.master").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "log.vault.db").stat().st_mode & 0o777 == 0o600


def test_where_the_vault_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vault_path("sqlite:///runs/log.db") == Path("runs/log.vault.db")
    assert vault_path("kafka://broker:9092") == Path("instructloop-data/vault.db")
    monkeypatch.setenv("INSTRUCTLOOP_VAULT", "/keys/v.db")
    assert vault_path("sqlite:///runs/log.db") == Path("/keys/v.db")
