"""Recognisers of personal data: email, card, IBAN, IP, social security and identity numbers."""

import ipaddress
import re
from collections.abc import Iterator

from feedback.pii import checksums
from feedback.pii.finding import Finding, matches

# Bounded repeats: at most 64 characters before the @ (RFC 5321), so that no text takes long.
_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w+%-](?:[\w.+%'-]{0,62}[\w+%-])?@"
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])"
)
# 12 to 19 digits, with single spaces or dashes or none between them.
_CARD = re.compile(r"(?<![\w+-])(?<!\d[ .,])\d(?:[ -]?\d){11,18}(?![\w-]|[.,]\d| \d)", re.ASCII)
# The first digits that networks hand out (ISO/IEC 7812-1): none begins with 0, 7, 8 or 9.
_ISSUED = re.compile(r"4|5[0-8]|6|3[04-9]|2[1-7]|1800")
_CALLED_CARD = re.compile(r"\b(?:card|visa|mastercard|amex)\b", re.IGNORECASE)
_IBAN_HEAD = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?=[ A-Za-z0-9])", re.ASCII)
_SSN = re.compile(r"(?<![\w-])(?!000|666)\d{3}([- ])(?!00)\d\d\1(?!0000)\d{4}(?![\w-])", re.ASCII)
_IDENTITY = re.compile(
    r"(?:passport|licen[cs]e|identity card|national id|id card|tax id|social security|insurance)"
    r"(?: (?:number|no\.?|id|code|#))?(?: ?(?:is|was|:|=|#)){1,2} ?"
    r"(?P<number>(?=[A-Za-z-]{0,6}\d)[A-Za-z0-9](?:[A-Za-z0-9-]{4,18})[A-Za-z0-9])(?![\w-])",
    re.ASCII | re.IGNORECASE,
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII)


def emails(text: str) -> Iterator[Finding]:
    if "@" in text:
        yield from matches("EMAIL", _EMAIL, text)


def cards(text: str) -> Iterator[Finding]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"[ -]", "", match[0])
        issued = _ISSUED.match(digits) or _CALLED_CARD.search(text[: match.start()][-24:])
        if issued and len(set(digits)) > 1 and checksums.luhn(digits):
            yield Finding("CARD", match.start(), match.end())


def social_security_numbers(text: str) -> Iterator[Finding]:
    yield from matches("SSN", _SSN, text)


def identity_numbers(text: str) -> Iterator[Finding]:
    """Numbers of papers, known by the words before them."""
    yield from matches("ID", _IDENTITY, text, lambda n: not _SSN.fullmatch(n), "number")


def ibans(text: str) -> Iterator[Finding]:
    """As many letters and digits as the country's IBANs have, in groups or without."""
    for head in _IBAN_HEAD.finditer(text):
        length = checksums.IBAN_LENGTHS.get(head[0][:2].upper(), 0)
        end, compact = head.start(), ""
        while len(compact) < length and end < len(text) and _goes_on(text, end):
            compact += text[end].strip()
            end += 1
        whole = not (end < len(text) and text[end].isalnum())
        if length and whole and checksums.iban(compact):
            yield Finding("IBAN", head.start(), end)


def ip_addresses(text: str) -> Iterator[Finding]:
    yield from matches("IP", _IPV4, text, _names_a_host)
    if ":" in text:
        yield from matches("IP", _IPV6, text, _names_a_host)


def _goes_on(text: str, at: int) -> bool:
    return (text[at].isascii() and text[at].isalnum()) or (text[at] == " " != text[at - 1])


def _names_a_host(text: str) -> bool:
    """A valid address of one machine; `a::b` of source code is too short to be one."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6 and len(text) < 8:
        return False
    return not (address.is_unspecified or address.is_loopback)
