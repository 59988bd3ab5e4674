"""A trainer that sends the first half of a release's tensors, says so and then nothing more: python
-m tests.serving.half_trainer REGISTRY RELEASE URL KEY.
"""

import secrets
import sys
import threading
import time
from pathlib import Path

import httpx

from contracts.release import ReleaseRegistry
from serving.push import Offer
from serving.transport import Meeting, Tcp, admit, listen


def main() -> None:
    root, release_id, url, key = sys.argv[1:]
    registry = ReleaseRegistry(Path(root))
    release = registry.get(release_id)
    folder = registry.artifacts.path(release.artifact)
    listener = listen("127.0.0.1")
    port = listener.getsockname()[1]
    meeting = Meeting(host="127.0.0.1", port=port, secret=secrets.token_hex(32))
    offer = Offer.of(release, folder, "tcp", meeting)
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    threading.Thread(
        target=lambda: httpx.post(
            f"{url}/v1/admin/push", content=offer.model_dump_json(), headers=headers, timeout=60
        ),
        daemon=True,
    ).start()
    line = admit(listener, meeting, time.monotonic() + 60, awaited=lambda: True)
    assert line is not None
    (file,) = offer.files
    content = (folder / file.path).read_bytes()[len(file.head) :]
    Tcp(line).send(memoryview(content)[: len(content) // 2])
    print("half", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
