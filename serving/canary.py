"""The canary: whether the engine computes what the trainer computed."""

from contracts.errors import InstructloopError
from contracts.release import Canary
from serving.engine import Engine


class CanaryFailed(InstructloopError):
    """The engine computes something else than the trainer did."""


async def check(
    engine: Engine, canary: Canary, tolerance: float, adapter: str | None = None
) -> None:
    """Raise CanaryFailed unless the engine, through the adapter, gives the canary the
    log-probabilities that the trainer gave it, each within `tolerance` nats.
    """
    got = await engine.logprobs(canary.token_ids, adapter)
    differences = [abs(a - b) for a, b in zip(got, canary.logprobs, strict=True)]
    wrong = [d for d in differences if not d <= tolerance]  # NaN is not <= anything
    if wrong:
        raise CanaryFailed(
            f"canary: expected the trainer's log-probabilities within {tolerance}, "
            f"got {len(wrong)} of {len(differences)} that differ more, one by {wrong[0]:.4g}"
        )
