"""The environment of this service: INSTRUCTLOOP_<NAME> sets the field of that name."""

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from contracts.environment import FromEnvironment
from serving.adapters import AdapterOptions
from serving.engine_arguments import EngineOptions
from serving.limits import LimitOptions
from serving.openai import Limits
from serving.swap import SwapOptions


class Settings(FromEnvironment):
    """Everything that an operator may tune in serving. Unknown names in code are refused.

    The descriptions are the lines of docs/configuration.md.
    """

    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_", frozen=True, extra="forbid")

    max_model_len: int = Field(
        default=1024,
        ge=16,
        description="most tokens of prompt and answer together; less where the model was made for "
        "less",
    )
    max_num_seqs: int = Field(
        default=64,
        ge=1,
        description="sequences that the engine works on at a time; the others queue",
    )
    kv_cache_gib: int = Field(
        default=1, ge=1, description="memory for keys and values of attention, in GiB"
    )
    dtype: str = Field(
        default="float32",
        description="what the engine computes in; a release's canary was computed in float32",
    )
    tool_call_parser: str = Field(
        default="",
        description="vLLM's parser for the calls that this model writes, such as `hermes`; empty: "
        "requests with tools are refused",
    )
    max_n: int = Field(
        default=16, ge=1, le=128, description="answers to one prompt: the most for n and best_of"
    )
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="size of a request")
    read_bound_s: float = Field(
        default=30.0, gt=0, description="how long a client may take to send a request"
    )
    stall_bound_s: float = Field(
        default=20.0,
        gt=0,
        description="how long a client may keep a stream waiting, in all, before it is cut",
    )
    requests_per_minute: int = Field(
        default=0, ge=0, description="requests of one key; 0: no limit; a key may have its own"
    )
    tokens_per_minute: int = Field(
        default=0,
        ge=0,
        description="tokens of prompts and answers of one key; 0: no limit; a key may have its own",
    )
    limit_storage: str = Field(
        default="memory://",
        pattern=r"^(memory|rediss?)://",
        description="where use is counted: `redis://host:port/0` for several replicas together",
    )
    content_filter: str = Field(
        default="",
        description="what cuts answers: `words:FILE`, one word or phrase a line, or `module:NAME`, "
        "a class or function that makes a `serving.content_filter.ContentFilter`; empty: nothing",
    )
    organization: str = Field(
        default="instructloop",
        pattern=r"^[\x21-\x7e]+$",
        description="sent as `openai-organization`, and what a client may name there",
    )
    release_poll_s: float = Field(
        default=0.5,
        gt=0,
        description="how often the registry is asked for a new release, in seconds",
    )
    drain_bound_s: float = Field(
        default=60.0,
        gt=0,
        description="how long a swap waits for running answers; those that run on are ended with "
        "an error",
    )
    canary_tolerance: float = Field(
        default=0.01,
        gt=0,
        description="largest difference from the trainer's log-probabilities that a release may "
        "show, in nats",
    )
    keep_previous: bool = Field(
        default=True,
        description="whether the weights before the last swap stay in memory, so that going back "
        "reads nothing",
    )
    push: Literal["", "tcp", "nccl"] = Field(
        default="",
        description="how a trainer may push weights into this server: `tcp`, or `nccl` from GPU to "
        "GPU; empty: not at all",
    )
    push_bound_s: float = Field(
        default=300.0, gt=0, description="how long a push may take until its last tensor is there"
    )
    max_adapters: int = Field(
        default=0,
        ge=0,
        description="adapter releases that are kept loaded beside their base, so that each can "
        "answer; one more while it comes in; 0: none, and nothing is computed for them",
    )
    max_adapter_rank: Literal[1, 8, 16, 32, 64, 128, 256] = Field(
        default=16, description="highest rank of an adapter; room for it is taken for each"
    )
    enforce_eager: bool = Field(
        default=True,
        description="whether the engine runs without compiling the model first: a faster start, "
        "slower answers",
    )
    replica: str | None = Field(
        default=None,
        description="what this server is called in the registry; `None`: the host's name and the "
        "process's number",
    )
    record_wait_s: float = Field(
        default=1.0,
        gt=0,
        description="how long a finished answer waits for its event to be durable",
    )
    consent_wait_s: float = Field(
        default=1.0,
        gt=0,
        description="how long a request waits to know whether it may be kept; then it is not",
    )
    shutdown_bound_s: int = Field(
        default=60, ge=0, description="how long the server waits for running answers when it stops"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="`text` or `json`: one line or one object for each event"
    )
    otlp_endpoint: str = Field(
        default="",
        description="where spans go, `http://collector:4318/v1/traces`; empty: nowhere",
    )

    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_gib=self.kv_cache_gib,
            dtype=self.dtype,
            enforce_eager=self.enforce_eager,
            tool_call_parser=self.tool_call_parser,
            adapter_slots=self.max_adapters + 1 if self.max_adapters else 0,
            max_adapter_rank=self.max_adapter_rank,
        )

    def swap_options(self) -> SwapOptions:
        return SwapOptions(
            poll_s=self.release_poll_s,
            drain_bound_s=self.drain_bound_s,
            canary_tolerance=self.canary_tolerance,
            keep_previous=self.keep_previous,
            push_bound_s=self.push_bound_s,
            adapters=AdapterOptions(self.max_adapters, self.max_adapter_rank),
        )

    def limits(self) -> Limits:
        return Limits(self.max_n, self.read_bound_s, self.consent_wait_s)

    def limit_options(self) -> LimitOptions:
        return LimitOptions(self.requests_per_minute, self.tokens_per_minute, self.limit_storage)
