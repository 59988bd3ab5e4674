from collections.abc import Callable
from pathlib import Path

import pytest

from contracts.errors import InvalidInput
from feedback.log.address import KafkaSettings
from feedback.log.embedded import EmbeddedLog
from feedback.log.spool import Spool
from feedback.vault.keys import KeyVault
from feedback.vault.master import LocalMasterKeys
from instructloop.environment import check_environment
from serving.access import KeyStore
from serving.settings import Settings


def test_variables_that_something_reads_are_taken() -> None:
    names = ("MAX_N", "KAFKA_TIMEOUT_S", "SPOOL_PATH", "MASTER_KEY", "LOG", "ADMIN_KEY", "PUSH")
    check_environment({f"INSTRUCTLOOP_{name}": "1" for name in names} | {"HOME": "/"})


def test_what_kubernetes_tells_of_a_service_is_passed_over() -> None:
    names = ("SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR")
    check_environment({f"INSTRUCTLOOP_{name}": "tcp://10.0.0.1:8000" for name in names})


def test_unknown_variable_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_environment({"INSTRUCTLOOP_MAXN": "secret"})
    expected = "a variable that exists, such as INSTRUCTLOOP_MAX_N"
    assert str(caught.value) == f"INSTRUCTLOOP_MAXN: expected {expected}, got 'an unknown one'"


def test_wrong_value_is_refused_by_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_MAX_N", "abc")
    monkeypatch.setenv("INSTRUCTLOOP_KAFKA_TIMEOUT_S", "0")
    with pytest.raises(InvalidInput, match=r"^INSTRUCTLOOP_MAX_N: expected a valid integer.*'abc'"):
        Settings()
    with pytest.raises(InvalidInput, match=r"^INSTRUCTLOOP_KAFKA_TIMEOUT_S: expected greater than"):
        KafkaSettings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("INSTRUCTLOOP_DTYPE", "float33"),
        ("INSTRUCTLOOP_REPLICA", "a/b"),
        ("INSTRUCTLOOP_OTLP_ENDPOINT", "collector:4318"),
    ],
)
def test_value_that_would_fail_later_is_refused_at_once(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInput, match=f"^{variable}: expected .*{value}"):
        Settings()


@pytest.mark.parametrize(
    "open_in",
    [
        KeyStore,
        EmbeddedLog,
        lambda file: Spool(file, 1 << 20),
        lambda file: KeyVault(file, LocalMasterKeys([bytes(32)])),
        lambda file: LocalMasterKeys.at(file, {}),
    ],
    ids=["keys", "log", "spool", "vault", "master"],
)
def test_file_that_cannot_be_opened_is_named(
    open_in: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "folder", Path("/proc/nowhere/file")):
        with pytest.raises(InvalidInput, match=f"^{file}: expected a file that can be read"):
            open_in(file)
