"""Parts of a training step over the plain way to write them: head, GAE, ranked loss."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baseline import Run, agree, in_turn, ratios
from benchmarks.result import Figure, figure
from benchmarks.trl.worker import Clock
from training.kernels import gae, ranking_loss
from training.kernels.linear_logprob import linear_logprob_loss

TOKENS, HIDDEN, VOCAB = 4096, 256, 32768
ROWS, WIDTH = 512, 2048
PROMPTS, K = 64, 9
RUNS = 5


def measure() -> list[Figure]:
    """Process CPU on one thread, both sides in turn; memory as the peak of a process of its own."""
    torch.set_num_threads(1)
    head = in_turn({"naive": partial(timed, naive_head), "ours": partial(timed, our_head)}, RUNS)
    scan = in_turn({"loop": partial(timed, loop_gae), "ours": partial(timed, our_gae)}, RUNS)
    rank = in_turn({"loop": partial(timed, loop_loss), "ours": partial(timed, our_loss)}, RUNS)
    for runs in (head, scan, rank):
        plain, ours = (side[0]["check"] for side in runs.values())
        agree("both ways", ours, plain, 1e-4 * max(1.0, abs(plain)))
    memory = [peak(our_head) / peak(naive_head) for _ in range(3)]
    return [
        figure(
            "head_time_over_naive", ratios(head["ours"], head["naive"]), "CPU s / CPU s", "<= 0.8"
        ),
        figure("head_memory_over_naive", memory, "extra bytes / extra bytes", "<= 0.25"),
        figure("gae_over_loop", ratios(scan["loop"], scan["ours"]), "x, CPU seconds", ">= 30"),
        figure("ranked_loss_over_loop", ratios(rank["loop"], rank["ours"]), "x, CPU s", ">= 300"),
    ]


def timed(work: Callable[[], Callable[[], float]]) -> Run:
    """`work` prepares, and what it returns is timed; short work is repeated for 0.2 s."""
    run = work()
    clock, count = Clock(), 0
    run()
    clock.start()
    while count == 0 or clock.cpu < 0.2:
        check = run()
        clock.stop()
        count += 1
    return {"wall": clock.wall / count, "cpu": clock.cpu / count, "check": check}


def peak(work: Callable[[], Callable[[], float]]) -> float:
    """Bytes by which the peak of a new process grows while it works."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grow, (work,))


def _grow(work: Callable[[], Callable[[], float]]) -> float:
    torch.set_num_threads(1)
    run = work()
    before = _peak_bytes()
    run()
    return _peak_bytes() - before


def _peak_bytes() -> float:
    """Of this program; getrusage's peak would count the process that started it, too."""
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    [line] = [line for line in status if line.startswith("VmHWM:")]
    return 1024.0 * int(line.split()[1])


def _head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN) * 0.02
    targets, slopes = torch.randint(VOCAB, (TOKENS,)), torch.randn(TOKENS)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, slopes


def naive_head() -> Callable[[], float]:
    hidden, weight, targets, slopes = _head()

    def run() -> float:
        hidden.grad = weight.grad = None
        logprobs = F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (logprobs * slopes).sum().backward()
        assert weight.grad is not None
        return float(weight.grad.norm())

    return run


def our_head() -> Callable[[], float]:
    hidden, weight, targets, slopes = _head()

    def run() -> float:
        hidden.grad = weight.grad = None
        loss, _ = linear_logprob_loss(
            hidden, weight, None, targets, lambda logprobs_C, at: logprobs_C * slopes[at]
        )
        loss.backward()
        assert weight.grad is not None
        return float(weight.grad.norm())

    return run


def _rollout() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)


def loop_gae() -> Callable[[], float]:
    rewards, values = _rollout()

    def run() -> float:
        running, advantages = torch.zeros(ROWS), []
        for t in reversed(range(WIDTH)):
            following = values[:, t + 1] if t + 1 < WIDTH else 0.0
            running = rewards[:, t] + following - values[:, t] + 0.95 * running
            advantages.append(running)
        whole = torch.stack(advantages[::-1], 1)
        return float((whole + values)[0, 0] + whole[-1, 7])

    return run


def our_gae() -> Callable[[], float]:
    rewards, values = _rollout()

    def run() -> float:
        advantages, returns = gae(rewards, values, 1.0, 0.95)
        return float(returns[0, 0] + advantages[-1, 7])

    return run


def _scores() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(PROMPTS, K, requires_grad=True)


def loop_loss() -> Callable[[], float]:
    scores = _scores()

    def run() -> float:
        scores.grad = None
        losses = [
            -F.logsigmoid(row[i] - row[j]) for row in scores for i, j in combinations(range(K), 2)
        ]
        torch.stack(losses).mean().backward()
        assert scores.grad is not None
        return float(scores.grad.norm())

    return run


def our_loss() -> Callable[[], float]:
    scores = _scores()
    ranks, mask = torch.arange(K).expand(PROMPTS, K), torch.ones(PROMPTS, K).bool()

    def run() -> float:
        scores.grad = None
        ranking_loss(scores, ranks, mask).backward()
        assert scores.grad is not None
        return float(scores.grad.norm())

    return run
