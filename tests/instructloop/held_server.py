"""The whole service on an engine that holds its answers back after their first token until there is
a file `go` in FOLDER, and has failed once there is a file `broken`. Run as a process.

python -m tests.instructloop.held_server FOLDER PORT SHUTDOWN_BOUND_S
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from instructloop.serve import Place, serve
from serving.chunk import Chunk
from serving.engine import Body, Kind
from serving.settings import Settings
from tests.fakes import FakeEngine


def place(folder: Path) -> Place:
    return Place(f"sqlite:///{folder}/log.db", folder / "registry", folder / "keys.db")


class HeldEngine(FakeEngine):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def failure(self) -> str | None:
        return "broken" if (self._folder / "broken").exists() else None

    async def _stream(self, kind: Kind, body: Body, by: Path) -> AsyncGenerator[Chunk, None]:
        async for chunk in super()._stream(kind, body, by):
            yield chunk
            while not (self._folder / "go").exists():
                await asyncio.sleep(0.02)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    settings = Settings(
        release_poll_s=0.05,
        shutdown_bound_s=int(sys.argv[3]),
        # However slow the machine is, what may be kept is.
        consent_wait_s=60,
        record_wait_s=60,
    )
    serve(place(folder), settings, "127.0.0.1", int(sys.argv[2]), HeldEngine(folder))
