"""Finds personal data and secrets in text and masks them by kind; needs no download and no network.

What it knows has a form: addresses of people's accounts, numbers with a checksum, keys with a
prefix. Names, street addresses and what else only a reader recognises stay: `dataset review` is for
them.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from feedback.pii import credentials, personal, phone
from feedback.pii.finding import Finding

# Another version finds or masks other things; datasets say which one made them.
VERSION = 1
# In the order of precedence: where two overlap, the earlier one is what the text is taken for.
RECOGNISERS = (
    credentials.private_keys,
    credentials.cloud_keys,
    credentials.tokens,
    credentials.passwords,
    personal.emails,
    personal.ibans,
    personal.identity_numbers,
    personal.cards,
    personal.social_security_numbers,
    personal.ip_addresses,
    phone.phone_numbers,
)
KINDS = (
    "EMAIL", "PHONE", "CARD", "IBAN", "IP", "SSN", "ID",
    "CLOUD_KEY", "TOKEN", "PRIVATE_KEY", "PASSWORD",
)  # fmt: skip
# What every recogniser needs some of; most texts have nothing.
_MAYBE = re.compile(r"[\d@:_]|-----|(?:sk|il|glpat|pypi)-|xox")
_MASK = re.compile(rf"\[({'|'.join(KINDS)})\]")


@dataclass(frozen=True)
class Masked:
    """A text without what was found, and how often each kind was; never what it was."""

    text: str
    kinds: Counter[str]


def find(text: str) -> list[Finding]:
    """What is recognised in `text`, in its order, without overlaps; masks are not looked into."""
    if not _MAYBE.search(text):
        return []
    masks = [Finding(match[1], *match.span()) for match in _MASK.finditer(text)]
    taken: list[Finding] = []
    for recognise in RECOGNISERS:
        taken += _apart(recognise(text), [*masks, *taken])
    return sorted(taken, key=lambda f: f.start)


def mask(text: str) -> Masked:
    """`text` with every finding replaced by its kind in brackets, until nothing more is found.

    A mask can set free what it stood beside, so it looks again; each round leaves less text outside
    of masks, so it ends.
    """
    kinds = Counter[str]()
    while found := find(text):
        for finding in reversed(found):
            text = f"{text[: finding.start]}[{finding.kind}]{text[finding.end :]}"
        kinds.update(finding.kind for finding in found)
    return Masked(text, kinds)


def _apart(found: Iterable[Finding], taken: list[Finding]) -> list[Finding]:
    """Those of `found` that touch nothing of `taken`."""
    return [f for f in found if all(f.end <= t.start or t.end <= f.start for t in taken)]
