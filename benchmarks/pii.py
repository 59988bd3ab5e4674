"""Recall and precision of the PII rule by kind, on the data folder that INSTRUCTLOOP_DATA names."""

import gzip
import json
import os
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.result import Figure, figure
from contracts.errors import InvalidInput
from feedback.pii import find
from feedback.pii.finding import Finding

# Our kinds by the entity types of presidio-research. Its other types (names, places, dates) have
# no form that a recogniser could know.
KIND_OF = {
    "EMAIL_ADDRESS": "EMAIL",
    "PHONE_NUMBER": "PHONE",
    "CREDIT_CARD": "CARD",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "US_SSN": "SSN",
    "US_DRIVER_LICENSE": "ID",
}
# Secrets of detect-secrets' samples, marked by hand: file, the line's first words, kind.
SECRETS = (
    ("config.ini", "password = 123456789a1234", "PASSWORD"),
    ("config.ini", "aws_secret_key = ", "PASSWORD"),
    ("config.yaml", "value: AKIA", "CLOUD_KEY"),
    ("config.yaml", "test_agent::allowlisted_api_key", "PASSWORD"),
    ("config.md", "key=", "PASSWORD"),
    ("private_key", "-----BEGIN", "PRIVATE_KEY"),
)


def measure() -> list[Figure]:
    data = os.environ.get("INSTRUCTLOOP_DATA")
    if not data:
        raise InvalidInput("INSTRUCTLOOP_DATA", "the folder with pii/", data)
    folder = Path(data) / "pii"
    items = json.loads(gzip.decompress((folder / "presidio_synth_v2.json.gz").read_bytes()))
    found = [find(item["full_text"]) for item in items]
    figures: list[Figure] = []
    for kind in sorted(set(KIND_OF.values())):
        figures += _scores(kind, items, found)
    hit = sum(_marked(folder / "detect_secrets_samples.zip"))
    figures.append(figure("recall.secrets", [hit / len(SECRETS)], "share", ">= 0.98"))
    return [*figures, _speed(items)]


def _scores(kind: str, items: list[dict[str, Any]], found: list[list[Finding]]) -> Iterable[Figure]:
    """A marked span is recalled where it is masked whole, whatever it is taken for; a finding is
    precise where it touches a span of its kind.
    """
    spans = [[s for s in item["spans"] if KIND_OF.get(s["entity_type"]) == kind] for item in items]
    hit = [
        any(f.start <= s["start_position"] and s["end_position"] <= f.end for f in fs)
        for of, fs in zip(spans, found, strict=True)
        for s in of
    ]
    right = [
        any(f.start < s["end_position"] and s["start_position"] < f.end for s in of)
        for of, fs in zip(spans, found, strict=True)
        for f in fs
        if f.kind == kind
    ]
    yield figure(f"recall.{kind}", [sum(hit) / len(hit)], f"share of {len(hit)}", ">= 0.98")
    yield figure(
        f"precision.{kind}", [sum(right) / len(right)], f"share of {len(right)}", ">= 0.95"
    )


def _marked(archive: Path) -> Iterator[bool]:
    """Whether the secret in each marked line is found, and taken for what it is."""
    with zipfile.ZipFile(archive) as samples:
        texts = {Path(n).name: samples.read(n).decode() for n in samples.namelist()}
    for file, line, kind in SECRETS:
        start = texts[file].index(line)
        end = len(texts[file]) if kind == "PRIVATE_KEY" else texts[file].index("\n", start)
        yield any(f.kind == kind and start <= f.start <= f.end <= end for f in find(texts[file]))


def _speed(items: list[dict[str, Any]]) -> Figure:
    texts = [item["full_text"] for item in items]
    size = sum(len(t.encode()) for t in texts) / 1000
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        Counter(f.kind for text in texts for f in find(text))
        runs.append((time.perf_counter() - started) * 1000 / size)
    return figure("ms_per_kb", runs, "ms")
