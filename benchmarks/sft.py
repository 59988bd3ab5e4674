"""One epoch of supervised fine-tuning on texts of many lengths, over TRL's packed rows."""

from functools import partial

import torch

from benchmarks import workloads
from benchmarks.baseline import Baseline, Run, agree, in_turn, ratios
from benchmarks.result import Figure, figure
from benchmarks.trl.worker import Clock
from training.device import Precision
from training.likelihood import accumulate_likelihood
from training.model import Pair
from training.optimizer import adam, step

TRL = "1.16.0"
SHAPE = "tiny"
TEXTS, WIDTH, ROWS = 64, 512, 4
RUNS = 3
MICRO_BATCHES = (1, 2, 4)


def measure() -> list[Figure]:
    """Trained tokens over process CPU on one thread, both sides in turn, TRL at its best rows."""
    torch.set_num_threads(1)
    agree_on_a_batch()
    baseline = Baseline("sft", TRL)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    settings = {"shape": SHAPE, "texts": TEXTS, "width": WIDTH, "rows": ROWS}
    sides = {}
    try:
        for precision in precisions:
            bf16 = precision == "bf16"
            theirs = partial(baseline.run, **settings, bf16=bf16)
            seconds = {micro: theirs(micro=micro)["cpu"] for micro in MICRO_BATCHES}
            micro = min(seconds, key=lambda m: seconds[m])
            sides[f"trl-{precision}"] = partial(theirs, micro=micro)
            sides[precision] = partial(ours, precision)
        runs = in_turn(sides, RUNS)
    finally:
        baseline.close()
    tokens = sum(map(len, workloads.documents(TEXTS)))
    figures = []
    for name in precisions:
        theirs_, mine = runs[f"trl-{name}"], runs[name]
        figures += [
            figure(f"{name}_over_trl", ratios(theirs_, mine), "x, CPU seconds", ">= 2"),
            figure(f"{name}_over_trl_wall", ratios(theirs_, mine, "wall"), "x, wall seconds"),
            figure(f"{name}_tokens", [tokens / r["cpu"] for r in mine], "tokens/CPU s"),
        ]
    return figures


def ours(precision: Precision) -> Run:
    """As many tokens an optimizer step as TRL's rows hold, texts as they come."""
    model = workloads.causal(SHAPE, seed=0)
    optimizer = adam(model.parameters(), 1e-5)
    texts = workloads.documents(TEXTS)
    losses = []
    clock = Clock()
    clock.start()
    batch: list[Pair] = []
    for i, text in enumerate(texts):
        batch.append((text[:1], text[1:]))
        following = texts[i + 1] if i + 1 < len(texts) else [0] * WIDTH * ROWS
        if sum(len(r) + 1 for _, r in batch) + len(following) > WIDTH * ROWS:
            losses.append(accumulate_likelihood(model, batch, precision).item())
            step(model, optimizer, 1.0)
            batch = []
    clock.stop()
    return {"wall": clock.wall, "cpu": clock.cpu, "loss": losses[-1], "steps": len(losses)}


def agree_on_a_batch() -> None:
    """The loss of four texts is that of Hugging Face's own forward pass, one text at a time."""
    model, texts = workloads.causal(SHAPE, seed=0), workloads.documents(4)
    total = 0.0
    for text in texts:
        tokens = torch.tensor([text])
        with torch.no_grad():
            total += model(input_ids=tokens, labels=tokens).loss.item() * (len(text) - 1)
    expected = total / sum(len(text) - 1 for text in texts)
    loss = accumulate_likelihood(model, [(t[:1], t[1:]) for t in texts], "fp32").item()
    agree("loss of four texts", loss, expected, 1e-5)
