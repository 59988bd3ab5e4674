"""The share of this machine's matrix-product rate that an update reaches."""

import time
from collections.abc import Sequence

import torch

from benchmarks.baseline import Run
from benchmarks.result import Figure, figure
from benchmarks.workloads import SHAPES
from training.device import Precision

SIDE = 2048
TRIES = 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak(precision: Precision) -> float:
    """FLOP per CPU second of a square product on this thread: the best of some."""
    ours, theirs = torch.randn(2, SIDE, SIDE).to(DTYPES[precision])
    seconds = []
    for _ in range(TRIES):
        began = time.process_time()
        ours @ theirs
        seconds.append(time.process_time() - began)
    return 2 * SIDE**3 / min(seconds)


def gemm_share(
    name: str,
    runs: Sequence[Run],
    precision: Precision,
    shape: str,
    trained: int,
    evaluated: int = 0,
) -> Figure:
    """Of runs that pushed `trained` tokens forward and backward through the layers of one model,
    and `evaluated` ones forward alone: 6 N and 2 N products a token of N weights (Kaplan et al.
    2020, 2.1), over what the time of the run would have been enough for.

    Embeddings, heads and attention's own products are not counted.
    """
    s = SHAPES[shape]
    weights = s.layers * (4 * s.hidden**2 + 3 * s.hidden * s.inner)
    products = weights * (6 * trained + 2 * evaluated)
    rate = peak(precision)
    shares = [products / run["cpu"] / rate for run in runs]
    return figure(f"{name}_gemm_share", shares, f"of {rate / 1e9:.0f} GFLOP/s")
