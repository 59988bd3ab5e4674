"""The exception tree.

InstructloopError          what any of our code raises on purpose; its message says what to do next
├── InvalidInput           a caller's value is wrong: names the field, what was expected, what came
│   └── InvalidEvent         the same, for an event that is about to enter the log
├── AccessDenied           who asks may not do this
├── NotFound               there is no such completion, release, artifact or key
├── CorruptEvent           an event's encrypted text differs from its key or envelope
├── LogUnavailable         the event log does not answer now; the same call may succeed later
├── CorruptArtifact        an artifact's bytes differ from its manifest, or a file is missing
├── NotReviewed            a person must confirm rows of a dataset before it is trained on
└── GateRefused            the gate refused a policy; `reasons` says why
"""


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
    """The caller is unknown, or known and not allowed."""


class NotFound(InstructloopError):
    """The thing that was named does not exist, or is not the caller's to see."""


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
