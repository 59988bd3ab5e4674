"""What the rules need to know of events, without any text: pure, event by event, and so the part
of a build that is spread over processes, and kept from one build to the next.
"""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TypeAlias

import msgspec
from msgspec import Struct

from contracts.events import prompt_text, ranks_of
from contracts.log import Record
from contracts.v1 import events_pb2 as pb
from feedback.dataset.content import classify
from feedback.dataset.language import languages_of
from feedback.dataset.row import Prompt, Share, Words
from feedback.dataset.sketch import sketches
from feedback.pii import mask

_SOURCE_NAME = {
    pb.SOURCE_PLAYGROUND: "playground",
    pb.SOURCE_API: "api",
    pb.SOURCE_LABELER: "labeler",
    pb.SOURCE_IMPORT: "import",
}
# Whose metadata may name known answers, as "better>worse" output indices with commas between.
_KNOWN_ANSWERS, _TRUSTED_SOURCES = "known_answers", (pb.SOURCE_LABELER, pb.SOURCE_IMPORT)


class Prompted(Struct, frozen=True, tag="prompted", array_like=True, gc=False):
    """A completion, or a demonstration: a prompt and what came to it."""

    offset: int
    id: str
    owner: Share
    use_case: str
    prompt: Prompt
    # The completion's outputs, or the demonstration's one response.
    answers: tuple[Words, ...]
    completion_id: str = ""
    release_id: str = ""
    # What its source says of the order of answers beforehand; empty where that is not trusted.
    known: str = ""


class Ranked(Struct, frozen=True, tag="ranked", array_like=True, gc=False):
    """A ranking."""

    offset: int
    id: str
    rater: Share
    completion_id: str
    # Indices of outputs, ascending, and the rank of each: 0 best.
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    # What is found in the metadata; None without any.
    annotated: tuple[str, ...] | None


Outline: TypeAlias = Prompted | Ranked
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[Outline, ...])


def encode(outlines: Sequence[Outline]) -> bytes:
    return _ENCODER.encode(outlines)


def decode(value: bytes) -> tuple[Outline, ...]:
    return _DECODER.decode(value)


def outlines_of(records: Iterable[Record], prefix_chars: int) -> list[Outline]:
    """Of completions, demonstrations and rankings; `prefix_chars` is how much of a prompt counts
    as its beginning.
    """
    events = [(record.offset, record.event) for record in records]
    prompts = [_body(e).prompt for _, e in events if not e.HasField("ranking")]
    words = [prompt_text(prompt) for prompt in prompts]
    by_batch = zip(prompts, words, languages_of(words), sketches(words), strict=True)
    drawn = (_prompt(*told, prefix_chars) for told in by_batch)
    return [
        _ranked(offset, event) if event.HasField("ranking") else _prompted(offset, event, drawn)
        for offset, event in events
    ]


def _body(event: pb.Event) -> pb.Completion | pb.Demonstration:
    return event.completion if event.HasField("completion") else event.demonstration


def _prompted(offset: int, event: pb.Event, drawn: Iterator[Prompt]) -> Prompted:
    body = _body(event)
    texts = (
        [output.text for output in body.outputs]
        if isinstance(body, pb.Completion)
        else [body.response]
    )
    prompt = next(drawn)
    told = (offset, event.id, _share(event, body), body.metadata.get("use_case", ""), prompt)
    answers = tuple(words_of(text) for text in texts)
    if isinstance(body, pb.Demonstration):
        return Prompted(*told, answers)
    known = body.metadata.get(_KNOWN_ANSWERS, "") if body.source in _TRUSTED_SOURCES else ""
    return Prompted(*told, answers, body.completion_id, body.release_id, known)


def _ranked(offset: int, event: pb.Event) -> Ranked:
    body = event.ranking
    ranks = sorted(ranks_of(body).items())
    return Ranked(
        offset=offset,
        id=event.id,
        rater=_share(event, body),
        completion_id=body.completion_id,
        outputs=tuple(output for output, _ in ranks),
        ranks=tuple(rank for _, rank in ranks),
        annotated=_found(body.metadata.values()) if body.metadata else None,
    )


def _share(event: pb.Event, body: pb.Completion | pb.Ranking | pb.Demonstration) -> Share:
    at = event.time.ToNanoseconds() / 1e9
    return Share(event.user_id, _SOURCE_NAME[body.source], body.notice_version, at)


def words_of(text: str) -> Words:
    masked = mask(text)
    return Words(_digest(text), len(text), len(masked.text), tuple(sorted(masked.kinds.elements())))


def prompt_of(prompt: pb.Prompt, prefix_chars: int) -> Prompt:
    words = prompt_text(prompt)
    return _prompt(prompt, words, languages_of([words])[0], sketches([words])[0], prefix_chars)


def _prompt(
    prompt: pb.Prompt, words: str, language: str, sketch: bytes, prefix_chars: int
) -> Prompt:
    """Each message is masked by itself, as a reader of the dataset meets it."""
    parts = [prompt.text] if prompt.text else [message.content for message in prompt.messages]
    masked = [mask(part) for part in parts]
    digest = _digest(words)
    return Prompt(
        words=digest,
        said=digest if prompt.text else _digest(prompt.SerializeToString(deterministic=True)),
        chars=len(words),
        masked_chars=sum(len(m.text) for m in masked) + len(masked) - 1,
        found=tuple(sorted(kind for m in masked for kind in m.kinds.elements())),
        language=language,
        hint=classify(words),
        beginning=_digest(words[:prefix_chars]) if len(words) >= prefix_chars else b"",
        sketch=sketch,
    )


def _found(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(kind for text in texts for kind in mask(text).kinds.elements()))


def _digest(text: str | bytes) -> bytes:
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    return blake2b(data, digest_size=16).digest()
