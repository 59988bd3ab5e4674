"""The reward of every token in one pass: the penalty, and the score at the last token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


def kl_rewards(
    scores_B: Tensor, logprobs_BR: Tensor, ref_logprobs_BR: Tensor, mask_BR: Tensor, beta: float
) -> Tensor:
    rows, width = logprobs_BR.shape
    rewards_BR = torch.empty_like(logprobs_BR)
    lengths_B = mask_BR.sum(1, dtype=torch.int32)
    grid = (rows, triton.cdiv(width, BLOCK))
    _rewards[grid](
        scores_B, logprobs_BR, ref_logprobs_BR, lengths_B, rewards_BR, width, beta, BLOCK
    )
    return rewards_BR


@triton.jit
def _rewards(scores, logprobs, references, lengths, rewards, width, beta, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length, score = tl.load(lengths + row), tl.load(scores + row)
    place = row * width + at
    real = at < length
    logprob = tl.load(logprobs + place, mask=real, other=0.0)
    reference = tl.load(references + place, mask=real, other=0.0)
    reward = -beta * (logprob - reference) + tl.where(at == length - 1, score, 0.0)
    tl.store(rewards + place, tl.where(real, reward, 0.0), mask=at < width)
