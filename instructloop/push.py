"""Push: a release from a trainer's registry into running servers, whose disk it need not touch."""

import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from contracts.errors import CorruptArtifact, InstructloopError, InvalidInput
from contracts.release import Release, ReleaseRegistry
from serving.push import Offer
from serving.transport import Broken, Kind, Line, Meeting, admit, listen, transport

if TYPE_CHECKING:
    import torch

# Servers have bounds of their own, and say when they are reached.
CONNECT_BOUND_S, REPLY_BOUND_S = 10.0, 3600.0


class PushRefused(InstructloopError):
    """A server did not take the release; it serves what it served before."""


def push(registry: ReleaseRegistry, release_id: str, urls: Sequence[str], key: str) -> None:
    """Hand the release's weights to the servers at `urls`, one after another; once all have them,
    have each swap to it. Raises NotFound, InvalidInput, and PushRefused with a server's reason and
    what the servers before it have by then; nothing is sent unless all of them take pushes.

    Until the release's artifact is in the registry of the servers, one that starts does not find
    it, and serves the release before.
    """
    release, urls = registry.get(release_id), [url.rstrip("/") for url in urls]
    if release.base is not None:
        raise InvalidInput("release", "one of whole weights", f"{release_id}, an adapter")
    if not (key.isascii() and key.isprintable()):
        raise InvalidInput("--key", "a key as it was printed when it was made", "another text")
    folder = registry.artifacts.path(release.artifact)
    bounds = httpx.Timeout(CONNECT_BOUND_S, read=REPLY_BOUND_S)
    with httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=bounds) as client:
        kinds = [_kind(client, url) for url in urls]
        with _said_what_is("beside what it serves", release_id) as has:
            for url, kind in zip(urls, kinds, strict=True):
                _hand_over(client, url, kind, release, folder)
                has.append(url)
        with _said_what_is("served", release_id) as has:
            for url in urls:
                swap = {"release": release_id}
                _told(url, partial(client.post, f"{url}/v1/admin/swap", json=swap))
                has.append(url)


@contextmanager
def _said_what_is(where: str, release_id: str) -> Iterator[list[str]]:
    """A refusal says which servers have the release already."""
    has: list[str] = []
    try:
        yield has
    except PushRefused as e:
        if not has:
            raise
        raise PushRefused(f"{e} ({release_id} is {where} at {', '.join(has)})") from e


def _kind(client: httpx.Client, url: str) -> Kind:
    """How the server takes weights. Raises PushRefused and InvalidInput."""
    kind: Kind | None = _told(url, partial(client.get, f"{url}/v1/admin/status")).get("push")
    if kind is None:
        raise InvalidInput("--to", "a server with INSTRUCTLOOP_PUSH set", url)
    return kind


def _hand_over(client: httpx.Client, url: str, kind: Kind, release: Release, folder: Path) -> None:
    host = _own_address(url)
    # Whatever ends this, the listener goes first: a worker at a closed door is not waited for.
    with ThreadPoolExecutor(1) as aside, closing(listen(host)) as listener:
        port = listener.getsockname()[1]
        meeting = Meeting(host=host, port=port, secret=secrets.token_hex(32))
        offer = Offer.of(release, folder, kind, meeting)
        asked = aside.submit(
            client.post,
            f"{url}/v1/admin/push",
            content=offer.model_dump_json(),
            headers={"content-type": "application/json"},
        )
        until = time.monotonic() + REPLY_BOUND_S
        line = admit(listener, meeting, until, awaited=lambda: not asked.done())
        if line is not None:
            with closing(line):
                _send(offer, folder, line, asked)
        _told(url, asked.result)


def _send(offer: Offer, folder: Path, line: Line, asked: Future[httpx.Response]) -> None:
    """All tensors. A server that hangs up has a reason, which is in its reply."""
    try:
        with closing(transport(offer.transport, line, _card(offer.transport), sends=True)) as way:
            for file in offer.files:
                with (folder / file.path).open("rb") as opened:
                    opened.seek(len(file.head))
                    for piece in file.pieces:
                        data = opened.read(piece.bytes)
                        if len(data) < piece.bytes:
                            raise CorruptArtifact(f"{opened.name}: it ends within {piece.name}")
                        way.send(memoryview(data))
            wait([asked])  # NCCL's end must last as long as the server's
    except Broken:
        pass


def _card(kind: Kind) -> "torch.device | None":
    """What NCCL sends from; None where there is none, or no need of one."""
    if kind == "tcp":
        return None
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _own_address(url: str) -> str:
    """This machine's, as the server at `url` reaches it. Raises PushRefused."""
    server = httpx.URL(url)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        with socket.create_connection((server.host, port), CONNECT_BOUND_S) as probe:
            address: str = probe.getsockname()[0]
            return address
    except OSError as e:
        raise PushRefused(f"{url}: {e}") from e


def _told(url: str, ask: Callable[[], httpx.Response]) -> dict[str, Any]:
    """The body of a reply. Raises PushRefused."""
    try:
        reply = ask()
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise PushRefused(f"{url}: {e}") from e
    try:
        body: dict[str, Any] = reply.json()
        if reply.status_code == httpx.codes.OK and body["object"] == "status":
            return body
        reason = body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = f"expected a reply of Instructloop, got another one, of status {reply.status_code}"
    raise PushRefused(f"{url}: {reason}")
