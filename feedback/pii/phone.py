"""Telephone numbers: by country code, by the words around them, by a country's numbering plan."""

import re
from collections.abc import Iterator

import phonenumbers

from feedback.pii.finding import Finding

# 7 to 15 digits (ITU-T E.164) in groups, and an extension.
_CANDIDATE = re.compile(
    r"(?<![\w@/$€£%#+-])(?<!\d[ .,:])(?:\+|(?=[(\d]))\(?\d(?:[ .()-]{0,3}\d){6,16}"
    r"(?: ?(?:x|ext\.?) ?\d{1,6})?(?!\w|[.,:/-]\d|[%€£$]| \d)",
    re.ASCII,
)
_BEFORE = re.compile(
    r"\b(?:phone|tele?|telephone|fax|mobile|cell|desk|call(?:ed|ing)?|text|sms|whatsapp|dial|contact|"
    r"reach|messages?|answering|ring|(?:my|his|her|your|their) number|(?:office|home|work)(?=:))\b"
    r"[^\d\n]{0,24}\n?$",
    re.IGNORECASE,
)
_AFTER = re.compile(r"[ \-(]{0,3}(?:office|fax|mobile|cell|phone|home|desk|work)\b", re.IGNORECASE)
_DATE = re.compile(
    r"(?:1[89]|20)\d\d[-/. ][01]?\d[-/. ][0-3]?\d|[0-3]?\d[-/. ][0-3]?\d[-/. ](?:1[89]|20)\d\d"
)
# Whose numbering plans a number of three groups or more without country code is held against; of
# two groups are house numbers and postal codes.
_REGIONS = (
    "US", "GB", "DE", "FR", "ES", "IT", "NL", "BE", "CH", "AT", "SE", "NO", "DK", "FI", "PL", "CZ",
    "PT", "GR", "HU", "IE", "AU", "NZ", "BR", "MX", "AR", "IN", "CN", "JP", "KR", "ZA", "TR", "CY",
)  # fmt: skip
_LOOK_BACK = 40


def phone_numbers(text: str) -> Iterator[Finding]:
    for match in _CANDIDATE.finditer(text):
        if _is_number(match, text):
            yield Finding("PHONE", match.start(), match.end())


def _is_number(match: re.Match[str], text: str) -> bool:
    said = match[0]
    number = re.split(r" ?(?:x|ext)", said)[0]
    digits = re.sub(r"\D", "", number)
    if not 7 <= len(digits) <= 15 or _DATE.match(said) or len(set(digits)) == 1:
        return False
    if said.startswith(("+", "00")):
        return _valid("+" + digits.removeprefix("00"), None) or len(digits) >= 10
    if _BEFORE.search(text[max(0, match.start() - _LOOK_BACK) : match.start()]):
        return True
    if _AFTER.match(text[match.end() : match.end() + 16]):
        return True
    grouped = len(re.findall(r"\d+", number)) >= 3
    return grouped and any(_valid(number, region) for region in _REGIONS)


def _valid(number: str, region: str | None) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(number, region))
    except phonenumbers.NumberParseException:
        return False
