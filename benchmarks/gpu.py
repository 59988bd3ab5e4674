"""The kernels on a GPU: each against eager PyTorch, torch.compile and, where they are installed,
Liger-Kernel and cut-cross-entropy, in time and peak memory, and as a share of what the card can do.
And steps of training (gpu_training.py).

Every side of a case computes the same number, which is compared. Needs a CUDA device.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import gpu_training
from benchmarks.baseline import agree
from benchmarks.result import Figure, figure
from contracts.errors import InvalidInput
from training.kernels import (
    Impl,
    gae,
    kl_rewards,
    policy_losses,
    ranking_loss,
    value_losses,
    whiten,
)
from training.kernels.linear_logprob import linear_logprob_loss

RUNS = 3
# Milliseconds of warming up and of measuring, for one run of one side.
WARM_UP_MS, MEASURE_MS = 100, 400
GEMM, COPY_BYTES = 8192, 1 << 30
# Relative: bf16 logits of sides that round in other places.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Size:
    """Tokens, width and vocabulary of the head; rows and tokens of a rollout; prompts and answers
    of a batch of rankings.
    """

    tokens: int
    hidden: int
    vocab: int
    rows: int
    width: int
    prompts: int
    k: int


FULL = Size(16_384, 4096, 128_256, 512, 2048, 64, 9)
Side = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One operation, and what it must do at least: bytes to move, operations of a GEMM."""

    name: str
    sides: Mapping[str, Side]
    bytes: float
    flops: float = 0.0
    goal: str = ""


def measure() -> list[Figure]:
    """Sides in turn, three times."""
    if not torch.cuda.is_available():
        raise InvalidInput("SUITE=gpu", "a CUDA device", "none")
    flops, bandwidth = _gemm_flops(), _copy_bandwidth()
    figures = [
        figure("gemm_tflops", [flops / 1e12], "TFLOP/s, bf16, 8192^3"),
        figure("copy_tb_s", [bandwidth / 1e12], "TB/s"),
    ]
    for case in cases("cuda", FULL, "triton", compiled=True):
        check(case)
        ms: dict[str, list[float]] = {name: [] for name in case.sides}
        for _ in range(RUNS):
            for name, side in case.sides.items():
                ms[name].append(_milliseconds(side))
        limit = max(case.bytes / bandwidth, case.flops / flops) * 1000
        shares = [limit / taken for taken in ms["ours"]]
        figures.append(figure(f"{case.name}_share_of_limit", shares, "share"))
        for name, taken in ms.items():
            goal = case.goal if name == "ours" else ""
            peak = _peak_mib(case.sides[name])
            figures.append(figure(f"{case.name}_ms_{name}", taken, "ms", goal))
            figures.append(figure(f"{case.name}_mib_{name}", [peak], "MiB beside what comes in"))
            if name != "ours":
                ratio = [theirs / own for theirs, own in zip(taken, ms["ours"], strict=True)]
                figures.append(figure(f"{case.name}_over_{name}", ratio, "x"))
    return [*figures, *gpu_training.measure()]


def check(case: Case) -> None:
    """Raise where two sides do not agree."""
    plain = float(case.sides["eager"]())
    for name, side in case.sides.items():
        agree(f"{case.name}: {name}", float(side()), plain, TOLERANCE * max(1.0, abs(plain)))


def cases(device: str, size: Size, impl: Impl, *, compiled: bool) -> Iterator[Case]:
    """`impl` is ours; the others are eager, and compiled where that is wanted."""
    torch.manual_seed(0)
    yield _head(device, size, impl, compiled)
    rows = partial(torch.randn, size.rows, size.width, device=device)
    rewards, values, old = rows(), rows(), rows()
    mask = torch.ones(size.rows, size.width, dtype=torch.bool, device=device)
    entries = size.rows * size.width

    def scan(impl: Impl) -> Tensor:
        advantages, returns = gae(rewards, values, 1.0, 0.95, impl=impl)
        return advantages[:, 0].mean() + returns[:, -1].mean()

    def white(impl: Impl) -> Tensor:
        return whiten(rewards, mask, impl=impl)[:, 0].sum()

    def penalties(impl: Impl) -> Tensor:
        return kl_rewards(rewards[:, 0], values, old, mask, 0.02, impl=impl).mean()

    def clipped(impl: Impl) -> Tensor:
        policy, value = (x.detach().requires_grad_() for x in (old, values))
        loss = policy_losses(policy, values, rewards, 0.2, impl=impl).mean()
        loss = loss + value_losses(value, old, rewards, 0.2, impl=impl).mean()
        torch.autograd.backward(loss)
        assert policy.grad is not None and value.grad is not None
        return loss.detach() + entries * (policy.grad.mean() + value.grad.mean())

    scores = torch.randn(size.prompts, size.k, device=device)
    ranks = torch.argsort(torch.randn(size.prompts, size.k, device=device), 1)
    ranked = torch.ones_like(ranks, dtype=torch.bool)

    def pairs(impl: Impl) -> Tensor:
        given = scores.detach().requires_grad_()
        loss = ranking_loss(given, ranks, ranked, impl=impl)
        torch.autograd.backward(loss)
        assert given.grad is not None
        return loss.detach() + given.grad.square().sum()

    for name, run, a_number, goal in (
        ("gae", scan, 16, "<= 0.012"),
        ("whiten", white, 14, "<= 0.015"),
        ("kl_rewards", penalties, 13, ""),
        ("clipped_losses", clipped, 33, "<= 0.014"),
        ("ranking_loss", pairs, 0, "<= 0.008"),
    ):
        yield Case(name, _sides(run, impl, compiled), a_number * entries, goal=goal)


def _sides(run: Callable[[Impl], Tensor], impl: Impl, compiled: bool) -> dict[str, Side]:
    sides: dict[str, Side] = {"ours": partial(run, impl), "eager": partial(run, "eager")}
    return sides | ({"compile": torch.compile(partial(run, "eager"))} if compiled else {})


def _head(device: str, size: Size, impl: Impl, compiled: bool) -> Case:
    """Mean log-likelihood from hidden states and the unembedding, forward and backward."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(size.tokens, size.hidden, device=device, dtype=kind)
    weight = torch.randn(size.vocab, size.hidden, device=device, dtype=kind) * size.hidden**-0.5
    targets = torch.randint(size.vocab, (size.tokens,), device=device)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        loss, _ = linear_logprob_loss(
            hidden, weight, None, targets, lambda logprobs_C, _: -logprobs_C / size.tokens, impl
        )
        return loss

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": ours, "eager": eager}
    if compiled:
        losses["compile"] = torch.compile(eager)
        losses["torch_fused"] = lambda h, w: F.linear_cross_entropy(h, w, targets)
        if liger := _installed("liger_kernel.transformers.functional"):
            losses["liger"] = lambda h, w: liger.liger_fused_linear_cross_entropy(h, w, targets)
        if cut := _installed("cut_cross_entropy"):
            losses["cut_cross_entropy"] = lambda h, w: cut.linear_cross_entropy(h, w, targets)

    def both_ways(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = loss_of(h, w)
        torch.autograd.backward(loss)
        assert h.grad is not None and w.grad is not None
        checked: Tensor = loss.detach().float() + h.grad.float().norm() + w.grad.float().norm()
        return checked

    product = size.tokens * size.hidden * size.vocab
    return Case(
        "head",
        {name: partial(both_ways, loss) for name, loss in losses.items()},
        bytes=2 * hidden.element_size() * (hidden.numel() + weight.numel()),
        flops=6.0 * product,
        goal="<= 80",
    )


def _installed(module: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _milliseconds(side: Side) -> float:
    from triton.testing import do_bench

    taken: float = do_bench(side, warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median")
    return taken


def _peak_mib(side: Side) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _gemm_flops() -> float:
    """Measured on random numbers, which a card multiplies slower than zeros."""
    a, b = torch.randn(2, GEMM, GEMM, device="cuda", dtype=torch.bfloat16)
    return 2 * GEMM**3 / median(_milliseconds(lambda: a @ b) for _ in range(RUNS)) * 1000


def _copy_bandwidth() -> float:
    a = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * COPY_BYTES / median(_milliseconds(lambda: b.copy_(a)) for _ in range(RUNS)) * 1000
