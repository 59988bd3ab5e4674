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
    # A swap waits this long for running answers; those that run on are ended.
    drain_bound_s: float = Field(default=60.0, gt=0)
    # Largest difference from the trainer's log-probabilities that a release may show, in nats.
    canary_tolerance: float = Field(default=0.01, gt=0)
    # Whether the weights before the last swap stay in memory, so that going back reads nothing.
    keep_previous: bool = True
    # Whether the engine runs without compiling the model first.
    enforce_eager: bool = True
    # What this server is called in the registry; None: the host's name and the process's number.
    replica: str | None = None
    # How long a finished answer waits for its event to be durable.
    record_wait_s: float = Field(default=1.0, gt=0)

    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_gib=self.kv_cache_gib,
            dtype=self.dtype,
            enforce_eager=self.enforce_eager,
        )

    def swap_options(self) -> SwapOptions:
        return SwapOptions(
            poll_s=self.release_poll_s,
            drain_bound_s=self.drain_bound_s,
            canary_tolerance=self.canary_tolerance,
            keep_previous=self.keep_previous,
        )

    def limits(self) -> Limits:
        return Limits(self.max_n, self.max_body_bytes)
