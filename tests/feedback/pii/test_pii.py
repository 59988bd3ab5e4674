import socket
import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from feedback.pii import KINDS, find, mask
from feedback.pii.checksums import iban, luhn

# Numbers from the standards' own examples and from issuers' documentation: nobody's.
KNOWN = [
    ("Write to jo.ann+news@example.co.uk, please", "Write to [EMAIL], please"),
    ("Card 4111 1111 1111 1111, exp 12/30", "Card [CARD], exp 12/30"),
    ("amex 378282246310005.", "amex [CARD]."),
    ("Pay to GB82 WEST 1234 5698 7654 32 today", "Pay to [IBAN] today"),
    ("IBAN: DE89370400440532013000", "IBAN: [IBAN]"),
    ("from 203.0.113.7 port 22", "from [IP] port 22"),
    ("ping 2001:db8:85a3::8a2e:370:7334 now", "ping [IP] now"),
    ("My SSN is 219-09-9999.", "My SSN is [SSN]."),
    ("call me at 202-555-0143 ext 12", "call me at [PHONE]"),
    ("phone: 467 3395", "phone: [PHONE]"),
    ("+44 20 7946 0958 is mine", "[PHONE] is mine"),
    ("(202) 555-0143", "[PHONE]"),
    ("my passport number is C01X00T47", "my passport number is [ID]"),
    ("export AWS_ID=AKIAIOSFODNN7EXAMPLE", "export AWS_ID=[CLOUD_KEY]"),
    ("api_key = 'wJalrXUtnFEMI7MDENGbPxRfiCYEXAMPLEKEY'", "api_key = '[PASSWORD]'"),
    ("my password is hunter2x", "my password is [PASSWORD]"),
    ("postgres://bob:s3cr3t@db/x", "postgres://bob:[PASSWORD]@db/x"),
    ("token ghp_" + "a1B2" * 9, "token [TOKEN]"),
    ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: Bearer [TOKEN]"),
    ("il-" + "aB3_" * 10 + "xyz", "[TOKEN]"),
    (
        "key:\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nbye",
        "key:\n[PRIVATE_KEY]\nbye",
    ),
]
HARMLESS = [
    "The recall concerns cars of 2016-2018 and 1,250,000 owners.",
    "Version 1.2.3 came out on 2016-04-07 at 09:00:27.",
    "Our office is at 17151 2450 Crown Street, Apt. 704.",
    "Pi is 3.14159265358979, and 2**64 is 18446744073709551616.",
    "Listen on 127.0.0.1 or ::1; std::vector<int> v;",
    "ISBN 978-3-16-148410-0 costs $1299.00.",
    "The password is secret, as is the token of love.",
    "GB82 WEST 1234 5698 7654 33 has a wrong check digit",
    "4111 1111 1111 1112 is no card",
    "name[The Eagle], eatType[coffee shop], area[riverside], near[Burger King]",
    "@someone liked it @ home",
]


@pytest.mark.parametrize(("text", "masked"), KNOWN)
def test_what_has_a_form_is_masked_by_its_kind(text: str, masked: str) -> None:
    assert mask(text).text == masked


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert mask(text).text == text


def test_kinds_are_counted_and_the_text_is_not_kept() -> None:
    masked = mask("a@example.com, b@example.com or 203.0.113.7")
    assert masked.kinds == {"EMAIL": 2, "IP": 1}
    assert "example.com" not in repr(masked)


def test_check_digits_are_those_of_the_standards() -> None:
    assert luhn("79927398713") and not luhn("79927398710")  # ISO/IEC 7812-1's usual example
    assert iban("GB82WEST12345698765432") and iban("FR1420041010050500013M02606")
    assert not iban("GB82WEST12345698765431") and not iban("XX82WEST12345698765432")


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a recogniser opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for text, masked in KNOWN:
        assert mask(text).text == masked


# Pieces of which personal data is made, in any order.
_PIECES = st.lists(
    st.one_of(
        st.sampled_from([text for text, _ in KNOWN]),
        st.text(alphabet=string.digits + " .-:+()@/x", max_size=24),
        st.text(max_size=12),
    ),
    max_size=6,
).map("".join)


@given(_PIECES)
@example("4111 1111 1111 1111@example.com")
def test_findings_lie_in_the_text_apart_and_are_of_a_known_kind(text: str) -> None:
    end = 0
    for finding in find(text):
        assert end <= finding.start < finding.end <= len(text)
        assert finding.kind in KINDS
        end = finding.end


@given(_PIECES)
def test_a_masked_text_has_nothing_left_to_mask(text: str) -> None:
    once = mask(text)
    assert not mask(once.text).kinds
    assert all(f"[{kind}]" in once.text for kind in once.kinds)


@pytest.mark.parametrize(
    "hostile",
    ["a" * 50_000, "1 " * 25_000, "1-" * 25_000, "a@" * 25_000, "a." * 25_000, ":" * 50_000,
     "key " * 12_000, "-----BEGIN PRIVATE KEY-----" * 400, "eyJ" * 15_000, "http://a:" * 5_000,
     "AA11" * 12_000, "(" * 50_000],
)  # fmt: skip
def test_no_text_of_50_kb_takes_long(hostile: str) -> None:
    started = time.process_time()
    mask(hostile)
    assert time.process_time() - started < 5
