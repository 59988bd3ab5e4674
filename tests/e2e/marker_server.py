"""The whole service on an engine that repeats, or fails with, what it was asked. Run as a process.

python -m tests.e2e.marker_server FOLDER PORT TRACES [careless]
"""

import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path

import uvicorn

from feedback.log.spool import SpoolSettings
from feedback.vault import open_events
from instructloop.serve import Place, create_app, hide_messages_of_exceptions
from serving.chunk import Chunk
from serving.engine import Body, Kind
from serving.settings import Settings
from tests.fakes import FakeEngine

log = logging.getLogger(__name__)


def place(folder: Path) -> Place:
    return Place(f"sqlite:///{folder}/log.db", folder / "registry", folder / "keys.db")


class RepeatingEngine(FakeEngine):
    """Every word of an answer is the prompt; a prompt that asks it to fail raises with it."""

    said, careless = "", False

    async def answer(
        self, kind: Kind, body: Body, adapter: str | None = None
    ) -> Body | AsyncGenerator[Chunk, None]:
        self.said = str(body.get("prompt") or body["messages"][-1]["content"])
        if self.careless:
            log.warning("asked %s", self.said)
        if "please fail" in self.said:
            raise RuntimeError(f"cannot answer {self.said}")
        return await super().answer(kind, body, adapter)

    def _word(self, token: int, by: Path) -> str:
        return f"{self.said} "


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    hide_messages_of_exceptions()
    settings = Settings(release_poll_s=0.05, otlp_endpoint=sys.argv[3])
    engine = RepeatingEngine()
    engine.careless = "careless" in sys.argv
    where, spool = place(Path(sys.argv[1])), SpoolSettings()
    with closing(open_events(where.log, spool=spool)) as events:
        app = create_app(where, settings, events, spool, engine)
        uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=False)
