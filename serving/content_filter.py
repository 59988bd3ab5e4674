"""ContentFilter: what an answer may not say, and how an answer is cut before it says it."""

import importlib
import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from contracts.errors import InvalidInput
from serving.chunk import Chunk
from serving.engine import Body

FINISH = "content_filter"
VARIABLE = "INSTRUCTLOOP_CONTENT_FILTER"


class ContentFilter(Protocol):
    """Judges answers. It may be a list of words, or a model behind a call.

    `lookahead` is how many characters must follow a place before the verdict on it stands; a stream
    runs that far behind.
    """

    @property
    def lookahead(self) -> int: ...

    async def find(self, text: str) -> int | None:
        """Where in `text`, the answer so far, begins what it may not say; None if nowhere."""
        ...


class WordFilter:
    """Words and phrases as a list: whole words, in any case, over any white space."""

    def __init__(self, words: Iterable[str]) -> None:
        phrases = [word.split() for word in words if word.split()]
        if not phrases:
            raise InvalidInput(VARIABLE, "a list with words in it", "none")
        spaced = [r"\s{1,8}".join(map(re.escape, phrase)) for phrase in phrases]
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)", re.IGNORECASE)
        # The last character may be one more of a longer, harmless word.
        self._lookahead = max(sum(map(len, p)) + 8 * (len(p) - 1) for p in phrases) + 1

    @property
    def lookahead(self) -> int:
        return self._lookahead

    async def find(self, text: str) -> int | None:
        found = self._pattern.search(text)
        return found.start() if found else None


def load(setting: str) -> ContentFilter | None:
    """`words:FILE`, one word or phrase a line; `module:NAME`, a class or function that makes a
    filter; nothing for none. Raises InvalidInput.
    """
    if not setting:
        return None
    kind, _, name = setting.partition(":")
    try:
        if kind == "words":
            lines = Path(name).read_text(encoding="utf-8").splitlines()
            return WordFilter(line for line in lines if not line.startswith("#"))
        made: ContentFilter = getattr(importlib.import_module(kind), name)()
    except (OSError, ImportError, AttributeError, ValueError) as e:
        expected = "words:FILE or module:NAME"
        raise InvalidInput(VARIABLE, expected, f"{setting} ({e})") from e
    return made


async def filtered(body: Body, judge: ContentFilter) -> Body:
    """A whole body, its answers cut where they say what they may not."""
    choices = []
    for choice in body["choices"]:
        at = await judge.find(_text(choice))
        choices.append(choice if at is None else _cut(choice, at))
    return body | {"choices": choices}


async def filtered_stream(
    chunks: AsyncGenerator[Chunk, None], judge: ContentFilter
) -> AsyncGenerator[Chunk, None]:
    """Chunks as they come, each as soon as what follows it can change no verdict on it."""
    answers: dict[int, _Answer] = {}
    async with aclosing(chunks) as coming:
        async for chunk in coming:
            for out in await _judged(msgspec.to_builtins(chunk), answers, judge):
                yield msgspec.convert(out, Chunk)


@dataclass
class _Answer:
    """One choice on its way: what it said, and the chunks that wait, each with where it ends."""

    text: str = ""
    waiting: list[tuple[int, Body]] = field(default_factory=list)
    ended: bool = False


async def _judged(chunk: Body, answers: dict[int, _Answer], judge: ContentFilter) -> list[Body]:
    if not chunk["choices"]:
        return [chunk]
    out = []
    for choice in chunk["choices"]:
        answer = answers.setdefault(choice["index"], _Answer())
        if not answer.ended:
            single = chunk | {"choices": [choice]}
            out += await _next(single, choice, answer, judge)
    return out


async def _next(chunk: Body, choice: Body, answer: _Answer, judge: ContentFilter) -> list[Body]:
    answer.text += _text(choice)
    answer.waiting.append((len(answer.text), chunk))
    at = await judge.find(answer.text)
    answer.ended = at is not None or choice.get("finish_reason") is not None
    sure = len(answer.text) if answer.ended else len(answer.text) - judge.lookahead
    bound = sure if at is None else at
    ready = [waiting for end, waiting in answer.waiting if end <= bound]
    answer.waiting = answer.waiting[len(ready) :]
    if at is not None:
        ready.append(_last(answer, at))
    return ready


def _last(answer: _Answer, at: int) -> Body:
    """The chunk in which the cut falls, up to the cut."""
    end, chunk = answer.waiting[0]
    (choice,) = chunk["choices"]
    return chunk | {"choices": [_cut(choice, len(_text(choice)) - (end - at))]}


def _text(choice: Body) -> str:
    """All that a choice says, the arguments of tool calls included."""
    said = choice.get("message") or choice.get("delta") or choice
    calls = [call["function"].get("arguments") or "" for call in said.get("tool_calls") or ()]
    return (said.get("content") or said.get("text") or "") + "".join(calls)


def _cut(choice: Body, at: int) -> Body:
    """The first `at` characters; without log-probabilities and token ids, which say the rest."""
    kept = {k: v for k, v in choice.items() if k not in ("logprobs", "token_ids")}
    for name in ("message", "delta"):
        if name in kept:
            said = {k: v for k, v in kept[name].items() if k != "tool_calls"}
            kept[name] = said | {"content": (said.get("content") or "")[:at]}
    if "text" in kept:
        kept["text"] = (kept["text"] or "")[:at]
    return kept | {"finish_reason": FINISH}
