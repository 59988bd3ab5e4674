"""Public files of demonstrations, comparisons and rankings into the log, one file per format."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import InvalidInput
from contracts.events import Stamper, uuid7
from contracts.log import EventSink
from contracts.v1 import events_pb2 as pb
from feedback.importers import alpaca, e2e, hh, oasst, rankme
from feedback.importers.row import BadRow, Format, Said, digest

FORMATS: dict[str, Format] = {
    "alpaca": alpaca.FORMAT,
    "e2e": e2e.FORMAT,
    "hh": hh.FORMAT,
    "oasst": oasst.FORMAT,
    "rankme": rankme.FORMAT,
}
_BATCH = 500
_STAMPER = Stamper("importer")


@dataclass(frozen=True)
class ImportReport:
    """What came of a file. `events` counts those handed to the log, which keeps each id once."""

    rows: int
    events: int
    malformed: tuple[BadRow, ...]


def import_file(
    format: str,
    path: Path,
    sink: EventSink,
    *,
    licence: str | None = None,
    stamper: Stamper = _STAMPER,
) -> ImportReport:
    """Import every good row of `path`; a second time adds nothing.

    `licence` is the SPDX id of the data, or "unclear"; the published one by default. Raises
    InvalidInput for an unknown format and for a file that is not of that format at all.
    """
    if format not in FORMATS:
        raise InvalidInput("format", "one of " + ", ".join(FORMATS), format)
    notice = f"licence:{licence or FORMATS[format].licence}"
    rows, sent, malformed, waiting = 0, 0, list[BadRow](), list[pb.Event]()
    for found in _read(format, path, notice, stamper):
        if isinstance(found, BadRow):
            malformed.append(found)
            continue
        rows += 1
        sent += len(found)
        waiting += found
        if len(waiting) >= _BATCH:
            sink.append(waiting)
            waiting = []
    sink.append(waiting)
    return ImportReport(rows, sent, tuple(malformed))


def _read(
    format: str, path: Path, notice: str, stamper: Stamper
) -> Iterator[list[pb.Event] | BadRow]:
    seen = Counter[str]()
    for raw in FORMATS[format].rows(path):
        if isinstance(raw, BadRow):
            yield raw
            continue
        try:
            said = FORMATS[format].says(raw)
            row = f"{format}\0{digest(raw.content)}\0{seen[raw.content]}"
            events = [_event(s, f"{row}\0{i}", notice, stamper) for i, s in enumerate(said)]
        except InvalidInput as e:
            yield BadRow(str(path), raw.row, str(e))
        except UnicodeError:
            yield BadRow(str(path), raw.row, "expected text in UTF-8, got other bytes")
        else:
            seen[raw.content] += 1
            yield events


def _event(said: Said, place: str, notice: str, stamper: Stamper) -> pb.Event:
    """An event with the same id at every import.

    A completion's comes from its own id, as several rows may hold it; any other from the row's
    content and how often that came before.
    """
    body = said.body
    if isinstance(body, pb.Completion):
        place = body.completion_id
    body.source, body.notice_version = pb.SOURCE_IMPORT, notice
    event_id = uuid7(said.at, bytes.fromhex(digest(place)))
    return stamper.event(said.user_id, body, id=event_id, at=said.at)
