"""Shares: which part of the people is answered by which release."""

import hashlib
import json
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from contracts.errors import InvalidInput

# Of sums of decimal fractions.
ROUNDING = 1e-9


class Shares(BaseModel):
    """Parts of 1 by release id. Who falls into none is answered by the release that is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}

    @model_validator(mode="after")
    def _at_most_everybody(self) -> Self:
        if (total := sum(self.parts.values())) > 1 + ROUNDING:
            raise ValueError(f"expected shares of at most 1 together, got {total:g}")
        return self

    def having(self, release_id: str, share: float) -> "Shares":
        """These with another share of one release, 0 for none. Raises InvalidInput."""
        left = 1 - sum(part for name, part in self.parts.items() if name != release_id)
        if not 0 <= share <= left + ROUNDING:
            raise InvalidInput("share", f"a number from 0 to {left:g}", share)
        parts = self.parts | {release_id: share}  # a release keeps its place
        return Shares(parts={name: part for name, part in parts.items() if part})

    def release_of(self, user_id: str) -> str | None:
        """The release of this person, the same every time; None for the one that is served.

        Each release in turn takes its part of who is left, by a hash of its own: who tried one
        release is no likelier than others to try the next, a share that grows loses nobody, and one
        that was given last takes from no other.
        """
        left = 1.0
        for release_id, part in self.parts.items():
            if _uniform(release_id, user_id) * left < part:
                return release_id
            left -= part
        return None


def _uniform(release_id: str, user_id: str) -> float:
    """A number in [0, 1), as if drawn for each pair."""
    digest = hashlib.sha256(json.dumps([release_id, user_id]).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
