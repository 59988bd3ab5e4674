"""In-memory twins of the interfaces, for tests."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from contracts.access import SCOPES, USER_SCOPES, Principal
from contracts.errors import AccessDenied, InvalidInput
from contracts.events import validate
from contracts.v1 import events_pb2 as pb
from serving import checkpoint
from serving.engine import Body, CacheKept, Kind, StagingFailed


class MemorySink:
    """An EventSink that keeps what it got."""

    def __init__(self) -> None:
        self.events: list[pb.Event] = []

    def append(self, events: Sequence[pb.Event]) -> None:
        for event in events:
            validate(event)
        known = {event.id for event in self.events}
        self.events.extend(event for event in events if event.id not in known)

    def completions(self) -> list[pb.Event]:
        return [event for event in self.events if event.HasField("completion")]

    def release_changes(self) -> list[pb.ReleaseChange]:
        return [event.release_change for event in self.events if event.HasField("release_change")]


class FixedConsent:
    """A ConsentReader over a dict of user id to notice version."""

    def __init__(self, granted: dict[str, str]) -> None:
        self.granted = granted

    def granted_notice(self, user_id: str) -> str | None:
        return self.granted.get(user_id)


def authenticate(authorization: str | None) -> Principal:
    """The key il-NAME belongs to NAME; il-prod-NAME is a production key of NAME, and il-root opens
    everything.
    """
    name = (authorization or "").removeprefix("Bearer il-")
    if not name or name == authorization:
        raise AccessDenied("no API key")
    production = name.startswith("prod-")
    scopes = frozenset(SCOPES) if name == "root" else USER_SCOPES
    return Principal(name.removeprefix("prod-"), f"key-{name}", production, scopes)


class FileSink:
    """An EventSink over a file, one event a line, that another process can read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, events: Sequence[pb.Event]) -> None:
        with self.path.open("a", encoding="ascii") as file:
            for event in events:
                validate(event)
                file.write(event.SerializeToString().hex() + "\n")

    def events(self) -> list[pb.Event]:
        if not self.path.exists():
            return []
        lines = self.path.read_text("ascii").splitlines()
        return [pb.Event.FromString(bytes.fromhex(line)) for line in lines]


class FakeEngine:
    """An Engine that answers with the name of the model folder that it runs, one word a token.

    `says` maps folder names to the log-probabilities that the engine gives a canary.
    """

    def __init__(self, says: dict[str, list[float]] | None = None) -> None:
        self.says = says or {}
        self.running: Path | None = None
        self.staged: Path | None = None
        self.swaps = self.stagings = 0
        self.cache_kept = False
        self.staging_error: str | None = None
        self.broken: str | None = None
        self.asked: list[Body] = []
        # Tests clear it to hold answers back.
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.may_stage, self.may_swap = asyncio.Event(), asyncio.Event()
        self.may_stage.set()
        self.may_swap.set()

    async def start(self, folder: Path, model: str) -> None:
        self.running = folder

    async def stop(self) -> None:
        self.running = None

    def failure(self) -> str | None:
        return self.broken

    async def answer(self, kind: Kind, body: Body) -> Body | AsyncGenerator[Body, None]:
        self.asked.append(body)
        if body.get("stream"):
            return self._stream(kind, body)
        await self.may_answer.wait()
        words = [self._word(i) for i in range(body["max_tokens"])]
        choices = [self._choice(kind, i, words, "length") for i in range(body["n"])]
        return self._body(kind, choices) | {
            "usage": {"total_tokens": len(words)},
            "kv_transfer_params": 1,
        }

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        assert self.running is not None
        return self.says.get(self.running.name, [0.0] * (len(token_ids) - 1))

    async def stage(self, folder: Path) -> None:
        await self.may_stage.wait()
        if self.staging_error:
            raise StagingFailed(self.staging_error)
        try:
            for _ in checkpoint.finite_tensors(folder):
                pass
        except InvalidInput as e:
            raise StagingFailed(str(e)) from e
        self.staged, self.stagings = folder, self.stagings + 1

    async def swap(self) -> None:
        assert self.staged is not None
        await self.may_swap.wait()
        if self.cache_kept:
            raise CacheKept("prefix cache: expected to be empty")
        self.running, self.staged = self.staged, self.running
        self.swaps += 1

    async def discard(self) -> None:
        self.staged = None

    async def _stream(self, kind: Kind, body: Body) -> AsyncGenerator[Body, None]:
        for token in range(body["max_tokens"]):
            await self.may_answer.wait()
            last = "length" if token + 1 == body["max_tokens"] else None
            for i in range(body["n"]):
                yield self._body(
                    kind, [self._choice(kind, i, [self._word(token)], last, delta=True)]
                )
            await asyncio.sleep(0)

    def _word(self, token: int) -> str:
        assert self.running is not None
        return f"{self.running.name[:6]}-{token} "

    def _body(self, kind: Kind, choices: list[Body]) -> Body:
        prefix = "cmpl" if kind == "completions" else "chatcmpl"
        return {
            "id": f"{prefix}-{len(self.asked)}",
            "created": 1,
            "model": "tiny",
            "choices": choices,
        }

    def _choice(
        self, kind: Kind, index: int, words: list[str], end: str | None, delta: bool = False
    ) -> Body:
        text = "".join(words)
        said = {"role": "assistant", "content": text, "reasoning": None}
        extras = {"stop_reason": None, "token_ids": [7] * len(words)}
        answer = (
            {"text": text} if kind == "completions" else {"delta" if delta else "message": said}
        )
        return {"index": index, "finish_reason": end, **answer, **extras}
