"""Who asks, and whether what they send may be kept: answers that serving and feedback share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

# What a key opens: completions; a person's own feedback and stored data; the tasks of labelers; the
# metrics; keys, releases and everything else of an operator.
Scope = Literal["complete", "feedback", "label", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = ("complete", "feedback", "label", "metrics", "admin")
USER_SCOPES: frozenset[Scope] = frozenset({"complete", "feedback"})


@dataclass(frozen=True)
class Principal:
    """The owner of an API key, and what the key opens."""

    user_id: str
    key_id: str
    # Keys of production traffic are never logged, whatever their owner agreed to (InstructGPT,
    # section 3.2).
    production: bool = False
    scopes: frozenset[Scope] = USER_SCOPES
    project: str = "default"
    # The key's own limits a minute; None: those of the server.
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


# From an `Authorization` header's value (or None) to the key's owner. Raises Unauthenticated. Asked
# for every request, also on an event loop: it must not wait.
Authenticate = Callable[[str | None], Principal]


class ConsentReader(Protocol):
    """The folded state of the consent events."""

    def granted_notice(self, user_id: str, *, wait: bool = True) -> str | None:
        """The notice version that the person agreed to and did not withdraw; None without one.

        Without `wait` it may be asked on an event loop, and says the same or, where that would take
        waiting for anything, raises BlockingIOError.
        """
        ...
