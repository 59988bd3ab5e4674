"""Each operation, eager and in Triton, against float64: values, gradients, and what it may err."""

import math
import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from torch import Tensor

from training.kernels import (
    Impl,
    gae,
    kl_rewards,
    logits_gradient_,
    policy_losses,
    ranking_loss,
    reference,
    statistics_,
    value_losses,
    whiten,
)
from training.kernels.linear_logprob import linear_logprob_loss, linear_logprobs

# Relative to the largest value of the truth: a few units in the last place of float32.
BUDGET = 2e-6
# Triton has to know that it interprets before it is imported; see the last test.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS: tuple[Impl, ...] = ("eager", "triton") if INTERPRETED else ("eager",)
both = pytest.mark.parametrize("impl", IMPLS)


def close(ours: Tensor, truth: Tensor, budget: float = BUDGET) -> None:
    ours, truth = ours.detach(), truth.detach()
    error = float((ours.double() - truth).abs().max())
    assert error <= budget * max(1.0, float(truth.abs().max()))


def ragged(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def naive(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_M: Tensor) -> Tensor:
    logits_MV = torch.nn.functional.linear(hidden_MH, weight_VH, bias_V)
    return logits_MV.log_softmax(-1).gather(1, targets_M[:, None])[:, 0]


@both
@pytest.mark.parametrize("biased", [False, True])
def test_linear_logprob_loss_is_that_of_the_full_softmax(impl: Impl, biased: bool) -> None:
    torch.manual_seed(0)
    tokens = 700 if impl == "eager" else 5  # in two chunks, and in one
    hidden, weight, bias = torch.randn(tokens, 16), torch.randn(50, 16), torch.randn(50)
    targets, old = torch.randint(50, (tokens,)), torch.randn(tokens) - 4
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)[: 3 if biased else 2]]
    ours_bias = inputs[2] if biased else None

    def losses(logprobs_C: Tensor, at: slice) -> Tensor:
        return (logprobs_C - old[at]).exp().clamp(max=2.0) * 0.1

    loss, logprobs = linear_logprob_loss(inputs[0], inputs[1], ours_bias, targets, losses, impl)
    ours = torch.autograd.grad(3 * loss, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = naive(exact[0], exact[1], exact[2] if biased else None, targets)
    expected = losses(truth, slice(None)).sum()
    close(logprobs, truth)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(ours, torch.autograd.grad(3 * expected, exact), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-6


def test_log_probabilities_and_entropies_without_gradients() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(600, 16), torch.randn(50, 16), torch.randint(50, (600,))
    logprobs, entropies = linear_logprobs(hidden, weight, None, targets)
    close(logprobs, naive(hidden.double(), weight.double(), None, targets))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    close(entropies, -(exact.exp() * exact).sum(-1))


@both
def test_rows_of_many_blocks_and_extreme_logits(impl: Impl) -> None:
    torch.manual_seed(3)
    logits, targets = torch.randn(3, 2500) * 30, torch.tensor([0, 2499, 1100])
    logits[0, :2000] = float("-inf")
    logits[0, 0] = 900.0
    truth = logits.double().requires_grad_()
    expected = truth.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    slopes = torch.tensor([0.5, -2.0, 1.0])
    [gradient] = torch.autograd.grad((expected * slopes).sum(), truth)
    logprobs, normaliser = statistics_(logits, targets, impl)
    close(logprobs, expected)
    close(logits_gradient_(logits, targets, normaliser, slopes, impl), gradient)


@both
@pytest.mark.parametrize("width", [1, 15, 16, 17, 600])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_is_that_of_a_loop(width: int, gamma: float, lam: float, impl: Impl) -> None:
    torch.manual_seed(1)
    rewards_BR, values_BR = torch.randn(2, width), torch.randn(2, width)
    expected_BR = torch.zeros(2, width, dtype=torch.float64)
    running_B = following_B = torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(width)):
        reward_B, value_B = rewards_BR[:, t].double(), values_BR[:, t].double()
        running_B = reward_B + gamma * following_B - value_B + gamma * lam * running_B
        expected_BR[:, t], following_B = running_B, value_B
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, gamma, lam, impl)
    close(advantages_BR, expected_BR)
    close(returns_BR, expected_BR + values_BR.double())


@pytest.mark.parametrize("scanned", [1, 40, 1 << 18])
def test_gae_of_many_rows_is_that_of_each(scanned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCANNED", scanned)
    torch.manual_seed(6)
    rewards_BR, values_BR = torch.randn(5, 20), torch.randn(5, 20)
    before = rewards_BR.clone(), values_BR.clone()
    whole = gae(rewards_BR, values_BR, 1.0, 0.95, "eager")
    for b in range(5):
        alone = gae(rewards_BR[b : b + 1], values_BR[b : b + 1], 1.0, 0.95, "eager")
        for together, own in zip(whole, alone, strict=True):
            close(together[b : b + 1], own.double())
    assert torch.equal(rewards_BR, before[0]) and torch.equal(values_BR, before[1])


@both
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_far_from_zero(impl: Impl, shift_mean: bool) -> None:
    # A mean of 100 with a deviation of 1: sums of squares would cancel.
    torch.manual_seed(2)
    values_BR, mask_BR = torch.randn(3, 900) + 100, ragged(900, 1, 333)
    real = values_BR.double()[mask_BR]
    expected = torch.zeros(3, 900, dtype=torch.float64)
    whitened = (real - real.mean()) / (real.var(correction=0) + 1e-8).sqrt()
    expected[mask_BR] = whitened + (0.0 if shift_mean else real.mean())
    # The values themselves are known to 100 * 2^-24.
    close(whiten(values_BR, mask_BR, shift_mean, impl), expected, 1e-5)


@both
def test_kl_rewards_of_ragged_rows(impl: Impl) -> None:
    torch.manual_seed(4)
    mask_BR, scores_B = ragged(700, 1, 513), torch.randn(3)
    logprobs_BR, ref_BR = torch.randn(3, 700), torch.randn(3, 700)
    expected = -0.3 * (logprobs_BR.double() - ref_BR.double()) * mask_BR
    for b, length in enumerate((700, 1, 513)):
        expected[b, length - 1] += scores_B[b]
    close(kl_rewards(scores_B, logprobs_BR, ref_BR, mask_BR, 0.3, impl), expected)


def clipped_by_hand(kind: str, new: float, old: float, target: float, clip: float) -> list[float]:
    """The loss of one token and its slope, in the words of the two papers."""
    if kind == "policy":
        ratio = math.exp(new - old)
        if (ratio > 1 + clip and target > 0) or (ratio < 1 - clip and target < 0):
            return [-target * min(max(ratio, 1 - clip), 1 + clip), 0.0]
        return [-target * ratio, -target * ratio]
    near = min(max(new, old - clip), old + clip)
    if abs(near - target) > abs(new - target):
        return [0.5 * (near - target) ** 2, 0.0]
    return [0.5 * (new - target) ** 2, new - target]


@both
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_clipped_losses_and_slopes_of_every_token(kind: str, impl: Impl) -> None:
    torch.manual_seed(7)
    old_N, target_N = torch.randn(1500), torch.randn(1500) * 3
    # Inside the clip, at both its sides and far outside; some advantages are 0.
    new_N = (old_N + torch.randn(1500) * 0.5).requires_grad_()
    target_N[:50] = 0.0
    weight_N = torch.randn(1500)
    losses = policy_losses if kind == "policy" else value_losses
    ours_N = losses(new_N, old_N, target_N, 0.2, impl)
    [slopes_N] = torch.autograd.grad((ours_N * weight_N).sum(), new_N)
    rows = zip(new_N.tolist(), old_N.tolist(), target_N.tolist(), strict=True)
    truth = torch.tensor([clipped_by_hand(kind, *row, 0.2) for row in rows], dtype=torch.float64)
    assert 200 < int((truth[:, 1] == 0).sum()) < 1300
    close(ours_N, truth[:, 0])
    close(slopes_N, truth[:, 1] * weight_N)


@both
def test_ranking_loss_and_gradient_over_pairs(impl: Impl) -> None:
    torch.manual_seed(5)
    mask_BK = ragged(9, 4, 2)
    ranks_BK = torch.tensor([[3, 0, 1, 1, 5, 4, 2, 6, 6], [1, 0, 2, 3] + [0] * 5, [0] * 9])
    scores_BK = (torch.randn(3, 9) * 20).requires_grad_()
    exact = scores_BK.detach().double().requires_grad_()
    prompts = []
    for b in range(2):  # the third is a tie
        pairs = [
            -torch.nn.functional.logsigmoid(exact[b, i] - exact[b, j])
            for i, j in (p for c in combinations(range(9), 2) for p in (c, c[::-1]))
            if mask_BK[b, i] and mask_BK[b, j] and ranks_BK[b, i] < ranks_BK[b, j]
        ]
        prompts.append(torch.stack(pairs).mean())
    expected = torch.stack(prompts).mean()
    loss = ranking_loss(scores_BK, ranks_BK, mask_BK, impl)
    close(loss, expected)
    [ours], [truth] = (torch.autograd.grad(x, y) for x, y in ((loss, scores_BK), (expected, exact)))
    close(ours, truth)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_triton_in_its_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
