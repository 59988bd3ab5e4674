"""Recognisers of secrets: cloud keys, tokens, private keys, and what is named a password."""

import re
from collections.abc import Iterator

from feedback.pii.finding import Finding, matches

# Prefixes and lengths as the issuers publish them.
_CLOUD_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}"  # AWS access key id
    r"|AIza[\w-]{35}"  # Google API key
    r"|GOCSPX-[\w-]{28}"  # Google OAuth client secret
    r"|ya29\.[\w-]{20,200}"  # Google OAuth access token
    r"|(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,90}={0,2}"  # Azure
    r"|dop_v1_[a-f0-9]{64}"  # DigitalOcean
    r")(?![A-Za-z0-9])",
    re.ASCII,
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255}"
    r"|glpat-[\w-]{20,64}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,200}"  # Slack
    r"|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,128}"  # Stripe
    r"|sk-(?:[a-z]{2,12}\d{0,2}-)?[\w-]{20,200}"  # OpenAI, Anthropic
    r"|il-[\w-]{43}"  # our own API keys
    r"|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,250}"
    r"|SG\.[\w-]{16,32}\.[\w-]{32,64}"  # SendGrid
    r"|\d{8,10}:AA[\w-]{33}"  # Telegram
    r"|eyJ[\w-]{5,2000}\.eyJ[\w-]{5,4000}\.[\w-]{10,1000}"  # JSON Web Token
    r")(?![A-Za-z0-9])",
    re.ASCII,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<name>[A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?!-----).){0,20000}(?:-----END (?P=name)-----|\Z|(?=-----))",
    re.DOTALL,
)
_BEARER = re.compile(r"\b(?:Bearer|Basic) +(?P<value>[\w+/.~-]{16,2000}={0,2})", re.ASCII)
_URL_USER = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/@:]{0,100}:(?P<value>[^\s/@]{1,200})@")
_NAMED = re.compile(
    r"(?:passw(?:or)?d|passphrase|pwd|secret|api[_ -]?key|access[_ -]?key|auth[_ -]?token|token|"
    r"\bkey\b)[\w -]{0,24}?[\"']?(?:\s{0,3}(?::=|=>|[:=])\s{0,3}| is )[\"'`]?"
    r"(?P<value>[^\s\"'`<>\[\]]{6,400})",
    re.IGNORECASE,
)


def cloud_keys(text: str) -> Iterator[Finding]:
    yield from matches("CLOUD_KEY", _CLOUD_KEY, text)


def tokens(text: str) -> Iterator[Finding]:
    yield from matches("TOKEN", _TOKEN, text)
    yield from matches("TOKEN", _BEARER, text, _is_random, "value")


def private_keys(text: str) -> Iterator[Finding]:
    if "PRIVATE KEY" in text:
        yield from matches("PRIVATE_KEY", _PRIVATE_KEY, text)


def passwords(text: str) -> Iterator[Finding]:
    """Values of what is named a secret; a word of letters alone may be prose, so it stays."""
    if "://" in text:
        yield from matches("PASSWORD", _URL_USER, text, group="value")
    yield from matches("PASSWORD", _NAMED, text, _is_random, "value")


def _is_random(value: str) -> bool:
    """Letters and digits together, as no word of prose has."""
    return any(c.isdecimal() for c in value) and any(c.isalpha() for c in value)
