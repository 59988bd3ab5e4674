"""In-memory twins of the interfaces, for tests."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import torch

from contracts.access import SCOPES, USER_SCOPES, Principal
from contracts.errors import InstructloopError, InvalidInput, Unauthenticated
from contracts.events import validate
from contracts.v1 import events_pb2 as pb
from serving import checkpoint, push
from serving.chunk import Chunk
from serving.engine import Body, Kind
from serving.push import Offer
from serving.request import prompts
from serving.twin import CacheKept, StagingFailed


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

    def granted_notice(self, user_id: str, *, wait: bool = True) -> str | None:
        return self.granted.get(user_id)


def authenticate(authorization: str | None) -> Principal:
    """The key il-NAME belongs to NAME; il-prod-NAME is a production key of NAME, and il-root opens
    everything.
    """
    name = (authorization or "").removeprefix("Bearer il-")
    if not name or name == authorization:
        raise Unauthenticated("no API key")
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
    """An Engine that answers with the name of the model folder that it runs, or of the adapter's
    folder, one word a token, at most `context` of them. Sample i says each token with
    log-probability -1 / (i + 1).

    `says` maps folder names to the log-probabilities that the engine gives a canary.
    """

    context = 64

    def __init__(self, says: dict[str, list[float]] | None = None) -> None:
        self.says = says or {}
        self.running: Path | None = None
        self.staged: Path | None = None
        self.adapters: dict[str, Path] = {}
        self.swaps = self.stagings = 0
        # What a trainer sent last, by name.
        self.received: dict[str, torch.Tensor] = {}
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

    async def answer(
        self, kind: Kind, body: Body, adapter: str | None = None
    ) -> Body | AsyncGenerator[Chunk, None]:
        self.asked.append(body)
        by = self._weights(adapter)
        if body.get("stream"):
            return self._stream(kind, body, by)
        await self.may_answer.wait()
        words = [self._word(i, by) for i in range(self._length(body))]
        answers = range(body["n"] * prompts(body.get("prompt")))
        choices = [self._choice(kind, i, words, "length") for i in answers]
        if kind == "completions" and body.get("logprobs") is not None:
            for choice in choices:
                logprobs = [-1 / (choice["index"] % body["n"] + 1)] * len(words)
                choice["logprobs"] = {"tokens": words, "token_logprobs": logprobs}
        usage = self._usage(len(words) * len(choices))
        return self._body(kind, choices) | {"usage": usage, "kv_transfer_params": 1}

    async def logprobs(self, token_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        return self.says.get(self._weights(adapter).name, [0.0] * (len(token_ids) - 1))

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

    async def receive(self, offer: Offer, bound_s: float) -> None:
        def take() -> None:
            with closing(push.weights(offer, bound_s, torch.device("cpu"))) as weights:
                for name, tensor in weights:
                    self.received[name] = tensor

        self.received.clear()
        try:
            await asyncio.to_thread(take)
        except InstructloopError as e:
            raise StagingFailed(str(e)) from e
        self.staged = Path(offer.release.artifact)

    async def swap(self) -> None:
        assert self.staged is not None
        await self.may_swap.wait()
        if self.cache_kept:
            raise CacheKept("prefix cache: expected to be empty")
        self.running, self.staged = self.staged, self.running
        self.swaps += 1

    async def discard(self) -> None:
        self.staged = None

    async def load_adapter(self, name: str, folder: Path) -> None:
        await self.may_stage.wait()
        if self.staging_error:
            raise StagingFailed(self.staging_error)
        assert name not in self.adapters
        self.adapters[name] = folder

    async def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    def _weights(self, adapter: str | None) -> Path:
        assert self.running is not None
        return self.running if adapter is None else self.adapters[adapter]

    async def _stream(self, kind: Kind, body: Body, by: Path) -> AsyncGenerator[Chunk, None]:
        length, answers = self._length(body), range(body["n"] * prompts(body.get("prompt")))
        for token in range(length):
            await self.may_answer.wait()
            last = "length" if token + 1 == length else None
            for i in answers:
                choice = self._choice(kind, i, [self._word(token, by)], last, delta=True)
                yield msgspec.convert(self._body(kind, [choice]), Chunk)
            await asyncio.sleep(0)
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"usage": self._usage(length * len(answers))}
            yield msgspec.convert(self._body(kind, []) | usage, Chunk)

    def _length(self, body: Body) -> int:
        bound: Any = body.get("max_completion_tokens", body.get("max_tokens", self.context))
        return min(int(bound), self.context)

    def _usage(self, written: int) -> Body:
        return {"prompt_tokens": 5, "completion_tokens": written, "total_tokens": 5 + written}

    def _word(self, token: int, by: Path) -> str:
        return f"{by.name[:6]}-{token} "

    def _body(self, kind: Kind, choices: list[Body]) -> Body:
        prefix = "cmpl" if kind == "completions" else "chatcmpl"
        return {
            "id": f"{prefix}-{len(self.asked)}",
            "object": "text_completion" if kind == "completions" else "chat.completion",
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
