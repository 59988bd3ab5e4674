"""Rows of CSV and JSON files, gzipped or not; a bad row does not stop the ones after it."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO

from contracts.errors import InvalidInput
from feedback.importers.row import BadRow, Raw


@contextmanager
def _text(path: Path) -> Iterator[IO[str]]:
    """The file's text; bytes that are not UTF-8 are surrogates, so that only their row is bad."""
    try:
        with path.open("rb") as file:
            content = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            yield TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="")
    except (OSError, EOFError, zlib.error) as e:
        raise InvalidInput("path", "a file that can be read to its end", f"{path}: {e}") from e


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Raw | BadRow]:
    """Records of a CSV file with a header. Raises InvalidInput where a column is missing."""
    with _text(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as e:
            raise InvalidInput(f"{path}: header", "a line of CSV", str(e)) from None
        if missing := [name for name in columns if name not in header]:
            raise InvalidInput(f"{path}: header", "a column " + ", ".join(missing), "none")
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                yield BadRow(str(path), reader.line_num, f"not CSV: {e}")
                continue
            if len(cells) == len(header):
                yield Raw(
                    reader.line_num,
                    json.dumps(cells),
                    dict(zip(header, cells, strict=True)),
                )
            else:
                reason = f"expected {len(header)} columns, got {len(cells)}"
                yield BadRow(str(path), reader.line_num, reason)


def json_lines(path: Path) -> Iterator[Raw | BadRow]:
    """One JSON object a line; blank lines are skipped."""
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as e:
                yield BadRow(
                    str(path),
                    number,
                    f"not JSON: {getattr(e, 'msg', 'nested too deep')}",
                )
                continue
            yield _object(path, number, value)


def json_items(path: Path) -> Iterator[Raw | BadRow]:
    """Objects of one JSON array, or of JSON lines."""
    with _text(path) as file:
        if not file.read(4096).lstrip().startswith("["):
            yield from json_lines(path)
            return
        file.seek(0)
        try:
            items = json.load(file)
        except (ValueError, RecursionError) as e:
            raise InvalidInput(
                str(path), "a JSON array", getattr(e, "msg", "nested too deep")
            ) from e
    for number, value in enumerate(items, 1):
        yield _object(path, number, value)


def _object(path: Path, number: int, value: object) -> Raw | BadRow:
    if not isinstance(value, dict):
        return BadRow(str(path), number, f"expected a JSON object, got {type(value).__name__}")
    try:
        return Raw(number, json.dumps(value, sort_keys=True), value)
    except RecursionError:  # writing stands a little deeper than reading did
        return BadRow(str(path), number, "not JSON: nested too deep")
