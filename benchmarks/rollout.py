"""Rollouts of ragged lengths: vLLM over Hugging Face's generate at the batch that suits it best.

The policy ends a response with the same chance at every token, so that lengths are geometric and a
few are cut. Only tokens up to the end count; `generate` goes on until a batch's longest ends.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks import workloads
from benchmarks.baseline import Run, agree, in_turn, ratios
from benchmarks.result import Figure, figure
from benchmarks.trl.tokenizer import tokenizer
from benchmarks.trl.worker import Clock
from training.model import response_logprobs, save_policy
from training.rollout import Sampler

PROMPTS, LONGEST, MEAN_LENGTH = 64, 192, 50
RUNS = 3
BATCHES = (8, 16, 32, 64)


def measure() -> list[Figure]:
    """Process CPU a thousand tokens, both sides on one thread in this process, in turn."""
    torch.set_num_threads(1)  # before the engine, which asks for the number once
    policy = ending_policy()
    prompts = [prompt for prompt, _ in workloads.episodes(PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, tokenizer(), Path(folder) / "policy")
        sampler = Sampler(Path(folder) / "policy", 64 + LONGEST)
    try:
        theirs = {size: partial(generated, policy, prompts, size) for size in BATCHES}
        seconds = {size: side()["cpu"] for size, side in theirs.items()}
        best = min(seconds, key=lambda size: seconds[size])
        sides = {f"hf-{best}": theirs[best], "vllm": partial(sampled, sampler, policy, prompts)}
        hf, vllm = in_turn(sides, RUNS).values()
    finally:
        sampler.close()
    for side in (vllm, hf):
        agree("mean length", mean([r["length"] for r in side]), MEAN_LENGTH, MEAN_LENGTH / 4)
    agree("log-probability of the engine", max(r["mismatch"] for r in vllm), 0.0, 1e-3)
    return [
        figure("rollout_over_hf", ratios(hf, vllm), "x, CPU seconds a token", ">= 2"),
        figure("rollout_over_hf_wall", ratios(hf, vllm, "wall"), "x, wall s a token"),
        figure("rollout_tokens", [1000 / r["cpu"] for r in vllm], "tokens/CPU s"),
        figure("rollout_hf_batch", [best], "prompts a batch"),
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def ending_policy() -> LlamaForCausalLM:
    """Every token begins the stream with the same first entry, which goes through to its end, where
    the end's row answers to it: about one token in `MEAN_LENGTH` ends the response.
    """
    policy = workloads.causal("tiny", seed=0)
    embedding: Any = policy.model.embed_tokens
    rows_VH = embedding.weight
    rows_VH[:, 0] = 2.0
    tokens_BT, mask_BT = left_padded([prompt for prompt, _ in workloads.episodes(PROMPTS)])
    seen = {"input_ids": tokens_BT, "attention_mask": mask_BT}
    for _ in range(4):
        first = policy.model(**seen).last_hidden_state[:, -1, 0].mean()
        ends = policy(**seen).logits[:, -1].softmax(-1)[:, workloads.EOS].mean()
        rows_VH[workloads.EOS, 0] -= (ends * MEAN_LENGTH).log() / first
    return policy


def per_thousand(clock: Clock, lengths: list[int], mismatch: float = 0.0) -> Run:
    tokens = sum(lengths)
    return {
        "wall": 1000 * clock.wall / tokens,
        "cpu": 1000 * clock.cpu / tokens,
        "length": tokens / len(lengths),
        "mismatch": mismatch,
    }


def sampled(sampler: Sampler, policy: LlamaForCausalLM, prompts: list[list[int]]) -> Run:
    """As PPO samples, log-probabilities with the tokens; these are compared with the trainer's."""
    clock = Clock()
    clock.start()
    responses = [s[0] for s in sampler.sample(prompts, LONGEST, seed=0)]
    clock.stop()
    pairs = [(p, r.token_ids) for p, r in zip(prompts, responses, strict=True)]
    said = torch.tensor([x for r in responses for x in r.logprobs])
    mismatch = (torch.cat(response_logprobs(policy, pairs)) - said).abs().max().item()
    return per_thousand(clock, [len(r.token_ids) for r in responses], mismatch)


@torch.no_grad()
def generated(policy: LlamaForCausalLM, prompts: list[list[int]], size: int) -> Run:
    """Left-padded batches of `size`; the scores, which PPO needs, are kept and nothing is made of
    them.
    """
    clock, lengths = Clock(), []
    torch.manual_seed(0)
    clock.start()
    for i in range(0, len(prompts), size):
        tokens_BT, mask_BT = left_padded(prompts[i : i + size])
        out: Any = policy.generate(  # type: ignore[misc]  # it declares itself on a mixin
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=LONGEST,
            eos_token_id=workloads.EOS,
            pad_token_id=workloads.PAD,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for row in out.sequences[:, tokens_BT.shape[1] :].tolist():
            ended = workloads.EOS in row
            lengths.append(row.index(workloads.EOS) + 1 if ended else len(row))
    clock.stop()
    return per_thousand(clock, lengths)


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, both int64 [B, T]."""
    width = max(map(len, prompts))
    tokens_BT = torch.tensor([[workloads.PAD] * (width - len(p)) + p for p in prompts])
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return tokens_BT, mask_BT
