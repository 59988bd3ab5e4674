"""The environment of this service: INSTRUCTLOOP_<NAME> sets the field of that name."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from serving.engine import EngineOptions
from serving.openai import Limits
from serving.swap import SwapOptions


class Settings(BaseSettings):
    """Everything that an operator may tune in serving. Unknown names in code are refused."""

    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_", frozen=True, extra="forbid")

    # Most tokens of prompt and answer together; less where the model was made for less.
    max_model_len: int = Field(default=1024, ge=16)
    # Sequences that the engine works on at a time; the others queue.
    max_num_seqs: int = Field(default=64, ge=1)
    # Memory for keys and values of attention, in GiB.
    kv_cache_gib: int = Field(default=1, ge=1)
    # float32 on a CPU: a release's canary was computed in it.
    dtype: str = "float32"
    # Answers that one request may ask for.
    max_n: int = Field(default=16, ge=1, le=128)
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    # How often the registry is asked for a new release, in seconds.
    release_poll_s: float = Field(default=0.5, gt=0)
    # A swap waits this long for running answers, and is tried again later if they run on.
    drain_bound_s: float = Field(default=60.0, gt=0)
    # Largest difference from the trainer's log-probabilities that a release may show, in nats.
    canary_tolerance: float = Field(default=0.01, gt=0)
    # How long a finished answer waits for its event to be durable.
    record_wait_s: float = Field(default=1.0, gt=0)

    def engine_options(self) -> EngineOptions:
        return EngineOptions(self.max_model_len, self.max_num_seqs, self.kv_cache_gib, self.dtype)

    def swap_options(self) -> SwapOptions:
        return SwapOptions(self.release_poll_s, self.drain_bound_s, self.canary_tolerance)

    def limits(self) -> Limits:
        return Limits(self.max_n, self.max_body_bytes)
