"""Plain-text files > documents for the base model and the pretraining mix."""

import glob
import gzip
from collections.abc import Sequence
from pathlib import Path

from contracts.errors import InvalidInput

# Every so many documents one is held out, to see whether a policy forgets how to write.
HELD_OUT_EVERY = 20
PARAGRAPHS_PER_DOCUMENT = 4


def read_documents(patterns: Sequence[str]) -> list[str]:
    """The texts of all files that match, cut into documents of a few paragraphs, in a stable order.

    A paragraph ends at an empty line; lines in it are joined. Raises InvalidInput for a pattern
    that matches nothing.
    """
    documents: list[str] = []
    for pattern in patterns:
        files = sorted(glob.glob(pattern))  # noqa: PTH207 - a pattern may be absolute
        if not files:
            raise InvalidInput("text", "a pattern that matches a file", pattern)
        for file in files:
            raw = Path(file).read_bytes()
            text = (gzip.decompress(raw) if file.endswith(".gz") else raw).decode(
                "utf-8-sig", errors="replace"
            )
            paragraphs = [" ".join(p.split()) for p in text.replace("\r\n", "\n").split("\n\n")]
            paragraphs = [p for p in paragraphs if p]
            documents += [
                "\n".join(paragraphs[i : i + PARAGRAPHS_PER_DOCUMENT])
                for i in range(0, len(paragraphs), PARAGRAPHS_PER_DOCUMENT)
            ]
    return documents


def hold_out(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(for training, held out)."""
    return (
        [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY],
        list(documents[::HELD_OUT_EVERY]),
    )
