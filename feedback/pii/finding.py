"""What a recogniser says of a text, and the recognisers that are one pattern."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Characters `start` to `end` of a text are personal data or a secret of this kind."""

    kind: str
    start: int
    end: int


Recogniser = Callable[[str], Iterator[Finding]]


def matches(
    kind: str,
    pattern: re.Pattern[str],
    text: str,
    holds: Callable[[str], bool] = lambda _: True,
    group: int | str = 0,
) -> Iterator[Finding]:
    """Where `group` of `pattern` matches and its text `holds`."""
    for match in pattern.finditer(text):
        if match[group] and holds(match[group]):
            yield Finding(kind, match.start(group), match.end(group))
