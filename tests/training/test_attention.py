"""Two ways to compute attention over packed trees: in padded groups, and by FlexAttention."""

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from training.attention import Impl, attention, seen_by
from training.packing import Packed, Tree

QUERY_HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 16, 0.3


def packed_trees() -> Packed:
    rng = random.Random(0)

    def tokens(longest: int) -> list[int]:
        return [rng.randrange(99) for _ in range(rng.randint(1, longest))]

    counts = (3, 0, 2, 9, 0, 4)
    return Packed([Tree(tokens(40), [tokens(20) for _ in range(k)]) for k in counts])


def dense(q_AQD: Tensor, k_aND: Tensor, v_aND: Tensor, sees_QN: Tensor) -> Tensor:
    """Every query beside every key."""
    k_AND, v_AND = (
        x.repeat_interleave(QUERY_HEADS // KEY_HEADS, 0).double() for x in (k_aND, v_aND)
    )
    scores_AQN = (q_AQD.double() @ k_AND.mT * SCALE).masked_fill(~sees_QN, float("-inf"))
    out_QAD: Tensor = (scores_AQN.softmax(-1) @ v_AND).transpose(0, 1)
    return out_QAD


def sees(packed: Packed) -> Tensor:
    """Token by token from the trees themselves: [N, N]."""
    place: list[tuple[int, int, int]] = []
    for t, tree in enumerate(packed.trees):
        place += [(t, 0, i) for i in range(len(tree.prompt))]
        for k, response in enumerate(tree.responses, 1):
            place += [(t, k, i) for i in range(len(response))]
    return torch.tensor(
        [[t == u and (k == 0 if k != j else m <= i) for u, k, m in place] for t, j, i in place]
    )


@pytest.fixture
def _backward_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library refuses it for want of a fused one; its unfused twin has one."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.usefixtures("_backward_on_a_cpu")
@pytest.mark.parametrize("asked", ["all", "some"])
@pytest.mark.parametrize("impl", ["groups", "flex"])
def test_both_are_a_softmax_over_what_a_token_may_see(impl: Impl, asked: str) -> None:
    packed = packed_trees()
    torch.manual_seed(0)
    at_Q = torch.arange(len(packed))[:: 1 if asked == "all" else 3]
    shapes = ((QUERY_HEADS, len(at_Q)), (KEY_HEADS, len(packed)), (KEY_HEADS, len(packed)))
    q_AQD, k_aND, v_aND = (torch.randn(*x, WIDTH, requires_grad=True) for x in shapes)
    inputs = q_AQD, k_aND, v_aND
    seen = seen_by(packed, None if asked == "all" else at_Q, q_AQD.device, impl)
    out = attention(q_AQD, k_aND, v_aND, seen, SCALE)
    truth = dense(q_AQD, k_aND, v_aND, sees(packed)[at_Q])
    torch.testing.assert_close(out, truth.float(), rtol=1e-5, atol=1e-5)
    slope = torch.randn(out.shape)
    ours = torch.autograd.grad(out, inputs, slope)
    theirs = torch.autograd.grad(truth, inputs, slope.double())
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
