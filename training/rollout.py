"""Generate with vLLM in this process, on this iteration's weights; pack into Rollout.

Shapes: B episodes, R response tokens, right-padded.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.data import length_mask
from training.device import Device, Precision, across


@dataclass(frozen=True)
class Sampled:
    """One response: token ids with the end-of-text token where it stopped, and the engine's
    log-prob of each.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class Engine(Protocol):
    """Draws responses on the weights that it was given last: a Sampler, or Engines elsewhere."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """A Hugging Face state dict. Done when it returns: the tensors may change afterwards."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int, samples: int = 1
    ) -> list[list[Sampled]]:
        """`samples` responses to each prompt; the same for the same weights and arguments."""
        ...

    def close(self) -> None: ...


# The engine runs in this process, so that weights are handed over in memory; its threads are
# unbound, as the trainer uses the cores too.
_IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the time of a call: a child process started later must not inherit
    them.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def built_for_processors() -> bool:
    """Whether the vLLM that is installed draws on processors, also beside a GPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def engine_settings(on_cpu: bool, precision: Precision, memory: float) -> dict[str, Any]:
    """What vLLM is told of the hardware that it was built for. On a processor it computes in
    float32; on a GPU in the type of the trainer's passes, which gives it the memory and the speed
    that bf16 is chosen for.
    """
    if on_cpu:
        return {"dtype": "float32"}
    dtype = "bfloat16" if precision == "bf16" else "float32"
    return {"dtype": dtype, "gpu_memory_utilization": memory}


class Sampler:
    """A vLLM engine in this process. Its weights are replaced between iterations; it shares the
    trainer's cores or, where vLLM is built for one, its GPU.
    """

    def __init__(
        self,
        folder: Path,
        max_tokens: int,
        precision: Precision = "fp32",
        gpu_memory: float = 0.3,
        kv_cache_gib: int = 1,
        transfer: bool = False,
    ) -> None:
        """`folder` gives architecture, tokenizer and first weights; `max_tokens` bounds prompt plus
        response. `precision` is that of the trainer's passes, and `gpu_memory` a share of all. With
        `transfer` weights can come by vLLM's weight transfer, too.
        """
        with environment(VLLM_CPU_KVCACHE_SPACE=str(kv_cache_gib), **_IN_PROCESS):
            from vllm import LLM
            from vllm.config import WeightTransferConfig

            self._on_cpu = built_for_processors()
            self._llm = LLM(
                str(folder),
                **engine_settings(self._on_cpu, precision, gpu_memory),
                enforce_eager=True,
                max_model_len=max_tokens,
                max_num_seqs=256,
                # The cache would answer with the keys and values of an earlier iteration's weights.
                enable_prefix_caching=False,
                disable_log_stats=True,
                weight_transfer_config=WeightTransferConfig(backend="nccl") if transfer else None,
            )

    def close(self) -> None:
        """Free the engine's memory, and end the process group that it made or found; the sampler
        cannot be used again.
        """
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the engine's weights by a Hugging Face state dict, at once, on whatever device it
        is; in the engine's type, exactly.
        """
        core: Any = self._llm.llm_engine.engine_core
        worker = core.engine_core.model_executor.driver_worker.worker
        model = worker.model_runner.get_model()
        tied = getattr(model.config, "tie_word_embeddings", False)
        weights = (
            (n, t.detach()) for n, t in state.items() if not (tied and n == "lm_head.weight")
        )
        worker.reload_weights(weights_iterator=weights)
        # On a CPU a linear layer's weight is packed for oneDNN when it is loaded. The reload skips
        # a tied unembedding, which would go on with the old pack: whoever still holds a plain
        # weight is packed again.
        for module in model.modules() if self._on_cpu else ():
            method = getattr(module, "quant_method", None)
            if (
                method is not None
                and getattr(module, "weight", None) is not None
                and module.weight.numel()
            ):
                method.process_weights_after_loading(module)

    def transfer(self, step: str, *args: Any) -> None:
        """A step of vLLM's weight transfer: a method of its worker."""
        self._llm.collective_rpc(step, args=args)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        seed: int | Sequence[int],
        samples: int = 1,
    ) -> list[list[Sampled]]:
        """`samples` responses to each prompt, drawn at temperature 1 with top-k off and top-p 1.
        With a seed for each prompt, what else is drawn with it changes no more than the rounding.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        # OpenMP counts threads anew for each thread that asks: from this call on as torch does.
        torch.get_num_threads()
        if isinstance(seed, int):
            torch.manual_seed(seed)
        params = [
            SamplingParams(
                n=samples,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                seed=own,
                max_tokens=max_tokens,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for own in ([None] * len(prompts) if isinstance(seed, int) else seed)
        ]
        requests = [TokensPrompt(prompt_token_ids=list(p)) for p in prompts]
        results = self._llm.generate(requests, params, use_tqdm=False)
        return [[_sampled(o) for o in sorted(r.outputs, key=lambda o: o.index)] for r in results]


def _sampled(output) -> Sampled:  # type: ignore[no-untyped-def]
    ids = tuple(output.token_ids)
    logprobs = tuple(at[token].logprob for at, token in zip(output.logprobs, ids, strict=True))
    return Sampled(ids, logprobs, output.finish_reason == "stop")


@dataclass(frozen=True)
class Rollout:
    """A batch of episodes: prompt and sampled response, and what the engine said of it. `samples`
    in a row have the same prompt.
    """

    pairs: tuple[tuple[Sequence[int], Sequence[int]], ...]
    mask_BR: Tensor
    engine_logprobs_BR: Tensor
    finished_B: Tensor
    samples: int = 1

    def __len__(self) -> int:
        return len(self.pairs)

    def to(self, device: Device) -> "Rollout":
        """The same with its tensors on `device`."""
        names = ("mask_BR", "engine_logprobs_BR", "finished_B")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def places(self, part: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row and column, [M] each, of the response tokens of the episodes in `part`, in order."""
        lengths = [len(self.pairs[i][1]) for i in part]
        row_M = torch.tensor(part).repeat_interleave(torch.tensor(lengths))
        column_M = torch.cat([torch.arange(length) for length in lengths])
        return across((row_M, column_M), self.mask_BR.device)


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sampled],
    samples: int = 1,
    device: Device = "cpu",
) -> Rollout:
    """Episodes of token ids as they were sampled, `samples` of each prompt in a row; figures of
    tokens as right-padded tensors on `device`.
    """
    each = [p for p in prompts for _ in range(samples)]
    mask_BR = length_mask(torch.tensor([len(r.token_ids) for r in responses]))
    engine_BR = torch.zeros(mask_BR.shape)
    engine_BR[mask_BR] = torch.tensor([x for r in responses for x in r.logprobs])
    rollout = Rollout(
        pairs=tuple((p, r.token_ids) for p, r in zip(each, responses, strict=True)),
        mask_BR=mask_BR,
        engine_logprobs_BR=engine_BR,
        finished_B=torch.tensor([r.finished for r in responses]),
        samples=samples,
    )
    return rollout.to(device)
