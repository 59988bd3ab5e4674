"""docs/operations.md: its backup, made while a server runs, and restored."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from contracts.release import ReleaseRegistry
from feedback.vault import open_events
from serving.access import KeyStore
from tests.serving.house import house

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.mark.skipif(
    shutil.which("sqlite3") is None and os.environ.get("CI") != "true", reason="needs sqlite3"
)
def test_backup_of_a_running_server_is_restored(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```\n(umask .*?)^```", text, re.MULTILINE | re.DOTALL)
    data, backup, restored = (tmp_path / n for n in ("instructloop-data", "backup", "restored"))
    with house(data) as here:
        key = here.key("ann")
        asked = {"model": "tiny", "prompt": "An owl at night", "max_tokens": 2}
        with here.client("ann") as client:
            answer = client.post("/v1/completions", json=asked).json()
        subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, check=True)
    shutil.copytree(backup, restored)
    shutil.unpack_archive(restored / "registry.tar", restored, filter="data")
    shutil.copy(data / "log.vault.master", restored)
    shutil.rmtree(data)

    log = open_events(f"sqlite:///{restored}/log.db")
    (completion,) = (record.event.completion for record in log.read("completions", 0, 0, 10))
    log.close()
    assert completion.completion_id == answer["id"]
    assert completion.prompt.text == "An owl at night"
    assert ReleaseRegistry(restored / "registry").current_id() == "r1"
    assert KeyStore(restored / "keys.db").authenticate(f"Bearer {key}").user_id == "ann"
