"""Each operation against float64 and plain PyTorch: values, gradients, and what it may err."""

import pytest
import torch
from torch import Tensor

from training.kernels import discounted_sums, linear_logprob_loss, linear_logprobs


def naive(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_M: Tensor) -> Tensor:
    logits_MV = torch.nn.functional.linear(hidden_MH, weight_VH, bias_V)
    return logits_MV.log_softmax(-1).gather(1, targets_M[:, None])[:, 0]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 700])
def test_linear_logprob_loss_is_that_of_the_full_softmax(tokens: int, biased: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(tokens, 16), torch.randn(50, 16), torch.randn(50)
    targets, old = torch.randint(50, (tokens,)), torch.randn(tokens) - 4
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)[: 3 if biased else 2]]
    ours_bias = inputs[2] if biased else None

    def losses(logprobs_C: Tensor, at: slice) -> Tensor:
        return (logprobs_C - old[at]).exp().clamp(max=2.0) * 0.1

    loss, logprobs = linear_logprob_loss(inputs[0], inputs[1], ours_bias, targets, losses)
    ours = torch.autograd.grad(3 * loss, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = naive(exact[0], exact[1], exact[2] if biased else None, targets)
    expected = losses(truth, slice(None)).sum()
    torch.testing.assert_close(logprobs.double(), truth.detach(), atol=1e-5, rtol=1e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(ours, torch.autograd.grad(3 * expected, exact), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-6
    without = linear_logprobs(hidden, weight, ours_bias, targets)
    torch.testing.assert_close(without, logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 100, 1500])
def test_discounted_sums_are_those_of_a_loop(width: int) -> None:
    torch.manual_seed(1)
    x_BR, expected_BR = torch.randn(3, width), torch.zeros(3, width, dtype=torch.float64)
    running_B = torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(width)):
        running_B = x_BR[:, t].double() + 0.95 * running_B
        expected_BR[:, t] = running_B
    got_BR = discounted_sums(x_BR, 0.95).double()
    torch.testing.assert_close(got_BR, expected_BR, atol=1e-5, rtol=1e-5)
