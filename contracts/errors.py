"""The exception tree.

InstructloopError          what any of our code raises on purpose; its message says what to do next
├── InvalidInput           a caller's value is wrong: names the field, what was expected, what came
│   └── InvalidEvent         the same, for an event that is about to enter the log
├── AccessDenied           who asks may not do this
│   └── Unauthenticated      nobody knows who asks
├── LimitReached           who asks has used up a limit; says when it is free again
├── NotFound               there is no such completion, release, artifact or key
├── CorruptEvent           an event's encrypted text differs from its key or envelope
├── LogUnavailable         the event log does not answer now; the same call may succeed later
├── CorruptArtifact        an artifact's bytes differ from its manifest, or a file is missing
├── NotReviewed            a person must confirm rows of a dataset before it is trained on
└── GateRefused            the gate refused a policy; `reasons` says why
"""

from collections.abc import Mapping


class InstructloopError(Exception):
    """Base of every error that this system raises on purpose."""


class InvalidInput(InstructloopError):
    """A value is not what its field takes."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        self.field, self.expected, self.got = field, expected, got
        super().__init__(f"{field}: expected {expected}, got {got!r}")


class InvalidEvent(InvalidInput):
    """An event breaks the rules of its schema; nothing was written."""


class AccessDenied(InstructloopError):
    """The caller is unknown, or known and not allowed; `code` is a word for programs."""

    def __init__(self, message: str, code: str | None = None) -> None:
        self.code = code
        super().__init__(message)


class Unauthenticated(AccessDenied):
    """No key, or one that opens nothing."""

    def __init__(self, message: str, code: str = "invalid_api_key") -> None:
        super().__init__(message, code)


class LimitReached(InstructloopError):
    """More than a key may ask for in a minute; `kind` is requests or tokens, and `headers` say
    what is left.
    """

    def __init__(
        self, kind: str, limit: int, retry_after_s: float, headers: Mapping[str, str]
    ) -> None:
        self.kind, self.retry_after_s, self.headers = kind, retry_after_s, headers
        super().__init__(
            f"Rate limit reached: this key may use {limit} {kind} per minute. "
            f"Try again in {retry_after_s:.0f} s."
        )


class NotFound(InstructloopError):
    """The thing that was named does not exist, or is not the caller's to see; `field` names it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        self.field = field
        super().__init__(message)


class CorruptEvent(InstructloopError):
    """An event in the log is not what was written."""


class LogUnavailable(InstructloopError):
    """The event log cannot be reached now; the same call may succeed later."""


class CorruptArtifact(InstructloopError):
    """Stored bytes do not match their manifest."""


class NotReviewed(InstructloopError):
    """Rows of a dataset wait for a reviewer."""

    def __init__(self, digest: str, waiting: int) -> None:
        self.digest, self.waiting = digest, waiting
        super().__init__(
            f"{waiting} rows wait for a reviewer: "
            f"instructloop dataset review {digest} --reviewer NAME"
        )


class GateRefused(InstructloopError):
    """The gate refused to release a policy."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__("the gate refused the policy: " + "; ".join(reasons))
