"""Opens a log through which people's texts pass encrypted; erasing a person deletes the key."""

import os
from pathlib import Path

from contracts.errors import InvalidInput
from feedback.log import open_log
from feedback.log.spool import SpoolSettings
from feedback.log.spooled import with_spool
from feedback.vault.keys import KeyVault
from feedback.vault.master import LocalMasterKeys
from feedback.vault.sealed import SealedLog

_BESIDE, _ELSEWHERE = "sqlite:///", "instructloop-data/vault.db"


def open_events(
    log: str, vault: Path | None = None, spool: SpoolSettings | None = None
) -> SealedLog:
    """The log at the URL `log`, with texts encrypted by the keys in `vault`, created if absent.

    The vault is beside an embedded log by default (log.db: log.vault.db), else below
    instructloop-data. With `spool` there is one before a log on other machines; one process at a
    time may have it. Raises InvalidInput.
    """
    inner = open_log(log)
    inner = inner if spool is None else with_spool(inner, spool)
    return SealedLog(inner, open_vault(log, vault))


def open_vault(log: str, vault: Path | None = None) -> KeyVault:
    path = vault or vault_path(log)
    return KeyVault(path, LocalMasterKeys.at(master_file(path), os.environ))


def master_file(vault: Path) -> Path:
    """Where the master key of a vault is, unless it comes from the environment."""
    setting = os.environ.get("INSTRUCTLOOP_MASTER_KEY_FILE")
    return Path(setting) if setting else vault.with_suffix(".master")


def vault_path(log: str) -> Path:
    """Where the keys of a log are, unless a setting says otherwise. Raises InvalidInput."""
    if setting := os.environ.get("INSTRUCTLOOP_VAULT"):
        return Path(setting)
    if not log.startswith(_BESIDE):
        return Path(_ELSEWHERE)
    path = Path(log.removeprefix(_BESIDE))
    if not path.name:
        raise InvalidInput("log URL", "sqlite:///PATH, without query or fragment", log)
    return path.with_suffix(".vault.db")
