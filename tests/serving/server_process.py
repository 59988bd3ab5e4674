"""The serving app on a real engine in a process of its own: python -m tests.serving.server_process
REGISTRY PORT EVENTS MAX_ADAPTERS.

The people of the tests: ann agreed to the notice "v1", bob agreed to nothing.
"""

import logging
import sys
from pathlib import Path

import uvicorn

from contracts.release import ReleaseRegistry
from serving.app import create_app
from serving.engine import VllmEngine
from serving.settings import Settings
from tests.fakes import FileSink, FixedConsent, authenticate


def main() -> None:
    registry, port, events = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = Settings(
        max_model_len=256,
        max_num_seqs=32,
        release_poll_s=0.1,
        tool_call_parser="hermes",
        max_adapters=int(sys.argv[4]),
        push="tcp",
        push_bound_s=60,
    )
    app = create_app(
        settings,
        VllmEngine(settings.engine_options()),
        FileSink(events),
        ReleaseRegistry(registry),
        authenticate,
        FixedConsent({"ann": "v1"}),
    )
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False)


if __name__ == "__main__":
    main()
